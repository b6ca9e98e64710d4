"""How far a measured figure lies from that of another run: what its own calls cannot tell. No numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, quantiles, stdev

LEVEL = 0.95
"""Of all intervals."""

Z = NormalDist().inv_cdf((1 + LEVEL) / 2)

FEWEST_ROUNDS = 4
"""Fewer tell nothing of their spread."""

BETWEEN_LAUNCHES = 0.01
"""Standard deviation of a latency between launches of the same program, as a share of it.

Where the system puts memory differs each time, and calls of one process cannot tell (Mytkowicz and others, Producing
Wrong Data Without Doing Anything Obviously Wrong, ASPLOS 2009; Kalibera and Jones, Rigorous Benchmarking in Reasonable
Time, ISMM 2013). scripts/bench_measuring.py found 0.9 to 1.1 % for p50s whose own intervals were +-0.25 %.
"""


def between_runs(rounds: Sequence[float]) -> float:
    """Return the standard deviation of a figure between runs, as a share of it.

    It is `BETWEEN_LAUNCHES`, or the spread of the rounds where that is wider. A machine that other programs slow down
    is not slowed alike for every second, minute and hour: averages over a run do not settle, and the next run meets
    some state that this one's rounds have seen. Of runs of ten seconds beside other programs, whose rounds differed by
    5 to 30 %, 75 % of the figures agreed with the run after, and 48 % with any run of twelve minutes, by
    `BETWEEN_LAUNCHES` alone; with the rounds' spread 95 % and 83 %. Left to itself, that
    machine's neighbours still slowed down single rounds: 89 % and 75 %, and with the spread 99 %.

    Args:
        rounds: the figure in each round, positive.
    """
    if len(rounds) < FEWEST_ROUNDS:
        return BETWEEN_LAUNCHES
    # From the first decile to the last: an accident in one round tells nothing of other runs.
    low, *_, high = quantiles(map(math.log, rounds), n=10, method="inclusive")
    return max(BETWEEN_LAUNCHES, (high - low) / (2 * NormalDist().inv_cdf(0.9)))


def with_other_runs(value: float, interval: tuple[float, float], rounds: Sequence[float]) -> tuple[float, float]:
    """Return the interval of a figure of one run, widened to hold what another run on this machine would find.

    The two errors are independent, and added by logarithms, so that times stay positive.

    Args:
        value: the figure, positive.
        interval: what holds it if this run had gone on.
        rounds: the figure in each round.
    """
    low, high = interval
    if min(low, *rounds) <= 0:  # a clock that does not resolve the calls: there are no shares of nothing
        return interval
    more = Z * between_runs(rounds)
    below, above = (math.hypot(max(math.log(arm), 0.0), more) for arm in (value / low, high / value))
    return value * math.exp(-below), value * math.exp(above)


def mean_error(values: Sequence[float]) -> float:
    """Return the half length of the 95 % interval of the mean of independent values, by Student's t.

    Args:
        values: two at least.
    """
    return t_quantile((1 + LEVEL) / 2, len(values) - 1) * stdev(values) / math.sqrt(len(values))


def t_quantile(probability: float, freedom: int) -> float:
    """Return Student's t quantile by its Cornish-Fisher expansion (Abramowitz and Stegun, 26.7.5); exact for 1 and 2.

    Workers measure power, and import no scipy: it would take its time and memory there.

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
