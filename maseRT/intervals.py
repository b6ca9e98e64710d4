"""95 % intervals by bootstrap: of latencies measured in rounds, of their ratios, and of differences of scores."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Rounds = Sequence[Sequence[float]]

REPLICATES = 1000
FIGURES = {"p50": 50, "p90": 90, "p99": 99}
"""Name -> percentile; the mean is the fourth figure."""

_LEVEL = 0.95
_MOST_DRAWS = 1 << 22
"""Draws held in memory at once."""

_FEW_VALUES = 64


def bootstrap_latency(rounds: Rounds, *, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Return 95 % intervals of "mean", "p50", "p90" and "p99" over the calls of all rounds.

    A two-stage bootstrap: rounds are drawn with replacement, since calls of one round share the machine's state and are
    worth less than as many independent ones, then calls within each drawn round (Davison and Hinkley, Bootstrap Methods
    and their Application, 1997, section 3.8). Percentile intervals, widened for the number of rounds.

    Args:
        rounds: times of the calls of each round, in milliseconds.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    data = [np.asarray(each, dtype=np.float64) for each in rounds]
    found = np.array([_figures(_drawn(data, _choice(rng, len(data)), rng)) for _ in range(REPLICATES)])
    low, high = _ends(found, len(data))
    return {name: (float(low[i]), float(high[i])) for i, name in enumerate(("mean", *FIGURES))}


def ratio_interval(base: Rounds, other: Rounds, *, seed: int = 0) -> tuple[float, float, float]:
    """Return how many times faster `other` is: the ratio of the medians base / other and its 95 % interval.

    Rounds are drawn in pairs, so that what disturbed both rows of a round cancels.

    Args:
        base: times of the calls of each round.
        other: of the same rounds.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    bases, others = ([np.asarray(each, dtype=np.float64) for each in rounds] for rounds in (base, other))
    found = np.empty(REPLICATES)
    for i in range(REPLICATES):
        chosen = _choice(rng, len(bases))
        found[i] = np.median(_drawn(bases, chosen, rng)) / np.median(_drawn(others, chosen, rng))
    low, high = _ends(found, len(bases))
    ratio = float(np.median(np.concatenate(bases)) / np.median(np.concatenate(others)))
    return ratio, float(low), float(high)


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


def t_quantile(probability: float, freedom: int) -> float:
    """Return Student's t quantile by its Cornish-Fisher expansion (Abramowitz and Stegun, 26.7.5); exact for 1 and 2.

    Args:
        probability: between 0.5 and 1.
        freedom: degrees of freedom.
    """
    p, n = probability, float(freedom)
    if freedom == 1:
        return math.tan(math.pi * (p - 0.5))
    if freedom == 2:
        return (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
    z = NormalDist().inv_cdf(p)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / n**power for power, term in enumerate(terms, start=1))


def _choice(rng: np.random.Generator, count: int) -> Array:
    return rng.integers(count, size=count)


def _drawn(data: Sequence[Array], chosen: Array, rng: np.random.Generator) -> Array:
    """Return calls drawn with replacement within each of the chosen rounds."""
    return np.concatenate([data[i][rng.integers(len(data[i]), size=len(data[i]))] for i in chosen])


def _figures(times: Array) -> list[float]:
    return [float(times.mean()), *np.percentile(times, list(FIGURES.values())).tolist()]


def _ends(found: Array, units: int) -> tuple[Any, Any]:
    """Return the ends of the percentile interval over the first axis.

    With few units it would be too short by sqrt((n - 1) / n) and by the ratio of the normal quantile to Student's t;
    its percentiles are moved outwards accordingly: the "expanded percentile interval" of Hesterberg, What Teachers
    Should Know About the Bootstrap, The American Statistician 69, 2015.
    """
    wide = math.sqrt(units / (units - 1)) * t_quantile((1 + _LEVEL) / 2, units - 1) if units > 1 else 1.96
    tail = 1 - NormalDist().cdf(wide)
    low, high = np.quantile(found, [tail, 1 - tail], axis=0)
    return low, high


def _chunks(count: int) -> Iterator[int]:
    """Yield row counts of blocks of draws that fit in memory, REPLICATES in all."""
    rows = max(1, _MOST_DRAWS // count)
    for start in range(0, REPLICATES, rows):
        yield min(rows, REPLICATES - start)
