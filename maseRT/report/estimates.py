"""Differences and ratios of two estimates that have 95 % intervals of their own, by closed formulas. No numpy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean

from maseRT.report.schema import Energy, Interval, Latency
from maseRT.spread import BETWEEN_LAUNCHES, FEWEST_ROUNDS, Z, mean_error

_MOST = 700.0
"""Logarithm of a ratio that a float can hold."""


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval, None where it has none."""

    value: float
    interval: Interval | None = None


def millijoules(energy: Energy) -> Estimate:
    """Return the energy per sample in mJ.

    The interval of an older report is that of the power within one visit: it holds no change between visits.
    """
    value = energy.joules_per_sample * 1e3
    if energy.joules_low is not None and energy.joules_high is not None:
        return Estimate(value, Interval(low=energy.joules_low * 1e3, high=energy.joules_high * 1e3))
    if energy.watts_low is None or energy.watts_high is None or energy.watts <= 0:
        return Estimate(value)
    low, high = (value * watts / energy.watts for watts in (energy.watts_low, energy.watts_high))
    return Estimate(value, Interval(low=low, high=high))


def milliseconds(latency: Latency, figure: str = "p50") -> Estimate:
    """Return a figure of a latency: "mean", "p50", "p90" or "p99"."""
    return Estimate(getattr(latency, f"{figure}_ms"), latency.intervals.get(figure))


def difference(before: Estimate, after: Estimate) -> Estimate:
    """Return after - before of two independent estimates.

    The interval is MOVER's, "square and add": with a, b the values and (la, ua), (lb, ub) their intervals, it reaches
    sqrt((b - lb)^2 + (ua - a)^2) below b - a and sqrt((ub - b)^2 + (a - la)^2) above it (Zou and Donner, Construction
    of confidence limits about effect measures: a general approach, Statistics in Medicine 27, 2008). Intervals may be
    lopsided, as those of a bootstrap are. There is none where one of the two has none.
    """
    value = after.value - before.value
    if before.interval is None or after.interval is None:
        return Estimate(value)
    below = math.hypot(after.value - after.interval.low, before.interval.high - before.value)
    above = math.hypot(after.interval.high - after.value, before.value - before.interval.low)
    return Estimate(value, Interval(low=value - below, high=value + above))


def ratio(before: Estimate, after: Estimate) -> Estimate:
    """Return after / before of two independent positive estimates: the difference of their logarithms, by `difference`.

    There is no interval where an end of one is not positive.
    """
    logarithm = difference(_log(before), _log(after))
    found = logarithm.interval
    return Estimate(_exp(logarithm.value), Interval(low=_exp(found.low), high=_exp(found.high)) if found else None)


def in_same_rounds(base: Latency, other: Latency) -> bool:
    """Return whether two rows can be compared by their rounds: in a report that was edited these may be anything."""
    return len(base.rounds) == len(other.rounds) >= FEWEST_ROUNDS and min(*base.rounds, *other.rounds) > 0


def times_faster(base: Latency, other: Latency) -> Estimate:
    """Return how many times faster `other` is, by rounds in which both were timed.

    It is the geometric mean of the rounds' ratios of p50 (Fleming and Wallace, How Not to Lie with Statistics,
    Communications of the ACM 29, 1986): what slows a round down slows both rows, and where a machine is fast or slow by
    turns, the p50 of all calls is that of the turn which lasted longer. The interval is the mean logarithm's, widened
    by what differs between launches of the two. Reports from before there were rounds give the ratio of the p50s, as
    if of two runs.
    """
    if not in_same_rounds(base, other):
        return ratio(milliseconds(other), milliseconds(base))
    logarithms = [math.log(one / two) for one, two in zip(base.rounds, other.rounds, strict=True)]
    value = math.exp(fmean(logarithms))
    error = math.exp(math.hypot(mean_error(logarithms), Z * math.sqrt(2) * BETWEEN_LAUNCHES))
    return Estimate(value, Interval(low=value / error, high=value * error))


def _log(estimate: Estimate) -> Estimate:
    found = estimate.interval
    if found is None or min(found.low, found.high) <= 0:
        return Estimate(math.log(estimate.value))
    return Estimate(math.log(estimate.value), Interval(low=math.log(found.low), high=math.log(found.high)))


def _exp(value: float) -> float:
    return math.exp(min(value, _MOST))


def share(value: float, samples: int) -> Estimate:
    """Return a share of independent samples with Wilson's interval.

    Two of them in `difference` make Newcombe's hybrid score interval for the difference of two proportions (Newcombe,
    Interval estimation for the difference between independent proportions, Statistics in Medicine 17, 1998, method 10).
    """
    if samples <= 0:
        return Estimate(value)
    extra = Z**2 / samples
    centre = (value + extra / 2) / (1 + extra)
    margin = Z * math.sqrt(max(value * (1 - value), 0) / samples + extra / (4 * samples)) / (1 + extra)
    return Estimate(value, Interval(low=min(centre - margin, value), high=max(centre + margin, value)))
