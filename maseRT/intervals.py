"""95 % intervals by bootstrap: of latencies measured in rounds, and of differences of scores."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from maseRT.spread import FEWEST_ROUNDS, LEVEL, t_quantile

Array = npt.NDArray[Any]
Rounds = Sequence[Sequence[float]]

REPLICATES = 1000
FIGURES = {"p50": 50, "p90": 90, "p99": 99}
"""Name -> percentile; the mean comes before them."""

_MOST_DRAWS = 1 << 22
"""Draws held in memory at once."""

_FEW_VALUES = 64


def latency_figures(rounds: Rounds) -> dict[str, float]:
    """Return "mean", "p50", "p90" and "p99" over the calls of all rounds, as `bootstrap_latency` takes them of a draw.

    A percentile is the time of a call: the shortest that so many percent of the calls do not exceed. Between the two
    next to it, as one interpolates elsewhere, there may be an outlier's length and no call.
    """
    return _named(_point(_units(rounds)))


def bootstrap_latency(rounds: Rounds, *, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Return 95 % intervals of "mean", "p50", "p90" and "p99" over the calls of all rounds.

    Rounds are drawn with replacement and their calls kept together: calls of one round share the machine's state and
    are worth less than as many independent ones (Davison and Hinkley, Bootstrap Methods and their Application, 1997,
    section 3.8, strategy 1). Where neighbouring rounds resemble each other, since the machine is slower for a while,
    several in a row are drawn at once: see `block_length`. Percentile intervals, widened for the number of blocks. Of
    fewer than eight rounds they are somewhat too short. Other runs may find more: `maseRT.spread.with_other_runs`.

    Args:
        rounds: times of the calls of each round, in milliseconds, in order. Of fewer than four, each call counts as a
            round.
        seed: of the draws.
    """
    data = _units(rounds)
    length = block_length([float(np.median(each)) for each in data])
    found = np.concatenate([_figures(data, counts) for counts in _draws(len(data), length, data, seed=seed)])
    low, high = map(_named, _ends(found, len(data) / length))
    return {name: (low[name], high[name]) for name in low}


def block_length(values: Sequence[float]) -> int:
    """Return how many neighbouring rounds to draw together: 1 where they are independent, at most a quarter of all.

    (3/2 n)^(1/3) (2 r / (1 - r^2))^(2/3) with the correlation r of neighbours: the best length for the variance of an
    autoregressive series (Carlstein, The Annals of Statistics 14, 1986, for blocks that overlap as in Kuensch, The
    Annals of Statistics 17, 1989).

    Args:
        values: one of each round.
    """
    series = np.asarray(values, dtype=np.float64)
    spread = series - series.mean()
    power = float(spread @ spread)
    correlation = float(spread[1:] @ spread[:-1]) / power if power > 0 else 0.0
    if correlation <= 0:
        return 1
    best = float((1.5 * len(series)) ** (1 / 3) * (2 * correlation / (1 - correlation**2)) ** (2 / 3))
    return max(1, min(round(best), len(series) // 4))


def difference_interval(base: Array, other: Array, *, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of mean(other) - mean(base) over the same samples: a paired percentile bootstrap.

    Where all samples score alike it is (0, 0): it tells nothing of samples unlike them.

    Args:
        base: score of every sample.
        other: score of the same samples.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    differences = np.asarray(other, dtype=np.float64) - np.asarray(base, dtype=np.float64)
    count = len(differences)
    values, counts = np.unique(differences, return_counts=True)
    if len(values) <= _FEW_VALUES:  # right or wrong: drawing how often each value comes is the same, and fast
        means = rng.multinomial(count, counts / count, size=REPLICATES) @ values / count
    else:
        means = np.concatenate(
            [differences[rng.integers(count, size=(rows, count))].mean(axis=1) for rows in _chunks(count)]
        )
    low, high = _ends(means, count)
    return float(low), float(high)


def _units(rounds: Rounds) -> list[Array]:
    data = [np.asarray(each, dtype=np.float64) for each in rounds]
    return data if len(data) >= FEWEST_ROUNDS else list(np.concatenate(data).reshape(-1, 1))


def _draws(units: int, length: int, data: Sequence[Array], *, seed: int) -> Iterator[Array]:
    """Yield blocks of draws [draws, units] that fit in memory: how often each unit comes.

    A draw is made of runs of `length` units, from anywhere, around the end as well (circular blocks).
    """
    rng = np.random.default_rng(seed)
    for rows in _chunks(sum(map(len, data))):
        starts = rng.integers(units, size=(rows, -(-units // length)))
        chosen = (starts[:, :, None] + np.arange(length)) % units
        flat = chosen.reshape(rows, -1)[:, :units] + units * np.arange(rows)[:, None]
        yield np.bincount(flat.ravel(), minlength=rows * units).reshape(rows, units)


def _figures(data: Sequence[Array], counts: Array) -> Array:
    """Return mean and percentiles [draws, figures] of calls whose unit comes `counts` [draws, units] times."""
    times = np.concatenate(data)
    order = np.argsort(times)
    unit = np.repeat(np.arange(len(data)), [len(each) for each in data])[order]
    times = times[order]
    weights = counts[:, unit].astype(np.float32)
    reached = np.cumsum(weights, axis=1, dtype=np.float64)
    total = reached[:, -1]
    sums = np.array([each.sum() for each in data])
    at = [(reached < total[:, None] * percent / 100).sum(axis=1) for percent in FIGURES.values()]
    return np.stack([counts @ sums / total, *(times[index] for index in at)], axis=1)


def _point(data: Sequence[Array]) -> Array:
    """Return the figures of the calls as they came."""
    found: Array = _figures(data, np.ones((1, len(data)), dtype=np.int64))[0]
    return found


def _named(figures: Array) -> dict[str, float]:
    return dict(zip(("mean", *FIGURES), figures.tolist(), strict=True))


def _ends(found: Array, units: float) -> tuple[Any, Any]:
    """Return the ends of the percentile interval over the first axis.

    With few units it would be too short by sqrt((n - 1) / n) and by the ratio of the normal quantile to Student's t;
    its percentiles are moved outwards accordingly: the "expanded percentile interval" of Hesterberg, What Teachers
    Should Know About the Bootstrap, The American Statistician 69, 2015.
    """
    freedom = max(1, math.floor(units) - 1)
    wide = math.sqrt((freedom + 1) / freedom) * t_quantile((1 + LEVEL) / 2, freedom)
    tail = 1 - NormalDist().cdf(wide)
    low, high = np.quantile(found, [tail, 1 - tail], axis=0)
    return low, high


def _chunks(count: int) -> Iterator[int]:
    """Yield row counts of blocks of draws that fit in memory, REPLICATES in all."""
    rows = max(1, _MOST_DRAWS // count)
    for start in range(0, REPLICATES, rows):
        yield min(rows, REPLICATES - start)
