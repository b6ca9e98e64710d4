"""Can these figures come from one set of times, measured for all rows alike?"""

from __future__ import annotations

import math
from collections.abc import Iterator

from maseRT.report.checks.told import ROUNDED, Told, error, near, pairs, warning
from maseRT.report.estimates import in_same_rounds, times_faster
from maseRT.report.schema import Energy, Interval, Latency, Report, Row, Timing, interval_of

_TIGHT = 1e-6
"""Relative: what floating point may add when the same numbers are summed in another order."""

_DEVICE_COV = 0.02
"""A GPU that holds its clocks repeats a kernel to a few tenths of a percent by its own events; 2 % is a clock that
moves, or somebody else's work."""

_WALL_COV = 0.10
"""Wall time of a call on a quiet CPU varies by 2 to 8 % (timer interrupts, turbo steps, allocation, the wake-up after a
copy): only beyond 10 % do other processes, or a clock that moves, show."""

_RATIO = 0.02
"""Relative: a ratio may be the median over the rounds, rather than the ratio of the medians."""

_TRANSFERS = 0.10
"""Relative: how much faster the end to end time may look than the device's part of it, which was timed in calls of its
own."""


def _latencies(report: Report) -> Iterator[tuple[Row, str, Latency]]:
    """Yield (row, what is timed, latency)."""
    for row in report.rows:
        for timing in row.timings:
            yield row, f"end to end at batch {timing.batch}", timing.end_to_end
            if timing.device is not None:
                yield row, f"on the device at batch {timing.batch}", timing.device


def percentiles(report: Report) -> Iterator[Told]:
    """A latency is positive, p50 <= p90 <= p99, and p50 lies among those of the rounds."""
    for row, what, times in _latencies(report):
        if not 0 < times.p50_ms <= times.p90_ms <= times.p99_ms or times.mean_ms <= 0:
            told = f"p50 {times.p50_ms:g}, p90 {times.p90_ms:g}, p99 {times.p99_ms:g}, mean {times.mean_ms:g} ms"
            yield error(f"{what}: {told} are no latencies of one measurement", row.name)
        if times.rounds and not 0 < min(times.rounds) <= times.p50_ms <= max(times.rounds):
            told = f"its rounds have {min(times.rounds):g} to {max(times.rounds):g} ms"
            yield error(f"{what}: p50 is {times.p50_ms:g} ms, and {told}", row.name)


def spread(report: Report) -> Iterator[Told]:
    """Mean, coefficient of variation and percentiles are of the same times.

    With standard deviation s: the median is within s of the mean, and the quantile of p is at most
    mean + s sqrt(p / (1 - p)) (one-sided Chebyshev inequality): p90 <= mean + 3 s, p99 <= mean + 9.95 s. And a mean of
    positive times is at least 0.4 p50 + 0.09 p90, for 40 % of them lie between p50 and p90, and 9 % up to p99.
    """
    for row, what, times in _latencies(report):
        mean, deviation = times.mean_ms, times.cov * times.mean_ms
        slack = ROUNDED * max(mean, times.p50_ms)
        if abs(mean - times.p50_ms) > deviation + slack:
            told = f"mean {mean:g} and median {times.p50_ms:g} ms are further apart than"
            yield error(f"{what}: {told} one standard deviation, {deviation:g} ms", row.name)
        for name, quantile, share in (("p90", times.p90_ms, 0.9), ("p99", times.p99_ms, 0.99)):
            most = mean + deviation * math.sqrt(share / (1 - share))
            if quantile > most + slack:
                told = f"{name} {quantile:g} ms cannot be, with mean {mean:g} ms and CoV {times.cov:.1%}"
                yield error(f"{what}: {told}: {most:g} ms at most", row.name)


def throughput(report: Report) -> Iterator[Told]:
    """Throughput is the batch over the mean end to end time."""
    for row in report.rows:
        for timing in row.timings:
            if timing.end_to_end.mean_ms <= 0:
                continue
            value = timing.batch / timing.end_to_end.mean_ms * 1000
            if not near(timing.throughput, value):
                told = f"{timing.throughput:g} samples/s, by the mean time it is {value:g}"
                yield error(f"batch {timing.batch}: throughput is {told}", row.name)


def ratio(report: Report) -> Iterator[Told]:
    """A ratio is that of the rounds; without these that of the medians, within 2 % or the interval."""
    for row in report.rows:
        for timing in row.timings:
            base = report.timing(report.baseline, timing.batch)
            if timing.ratio is None or timing.end_to_end.p50_ms <= 0:
                continue
            if base is None:
                yield error(f"batch {timing.batch}: has a ratio, and the baseline was not timed there", row.name)
                continue
            if base.end_to_end.p50_ms <= 0:
                continue
            value = times_faster(base.end_to_end, timing.end_to_end).value
            by_rounds = in_same_rounds(base.end_to_end, timing.end_to_end)
            inside = timing.ratio_interval is not None and _inside(value, timing.ratio_interval)
            if not near(timing.ratio, value, relative=ROUNDED if by_rounds else _RATIO) and (by_rounds or not inside):
                by = "rounds" if by_rounds else "medians"
                told = f"its ratio to {report.baseline} is {timing.ratio:g}, by the {by} it is {value:g}"
                yield error(f"batch {timing.batch}: {told}", row.name)


def intervals(report: Report) -> Iterator[Told]:
    """An interval is not upside down and holds its estimate."""
    for row, what, value, interval in _estimates(report):
        if interval.low > interval.high or not _inside(value, interval):
            told = f"{what} is {value:g}, outside of its 95 % interval, {interval.low:g} to {interval.high:g}"
            yield error(told, row)


def _estimates(report: Report) -> Iterator[tuple[str, str, float, Interval]]:
    for row, what, times in _latencies(report):
        for name, interval in times.intervals.items():
            value = getattr(times, f"{name}_ms", None)
            if value is not None:
                yield row.name, f"{what}: {name}", value, interval
    for row in report.rows:
        for timing in row.timings:
            if timing.ratio is not None and timing.ratio_interval is not None:
                yield row.name, f"batch {timing.batch}: the ratio", timing.ratio, timing.ratio_interval
        if row.difference is not None and row.difference.interval is not None:
            yield row.name, f"the difference in {row.difference.metric}", row.difference.value, row.difference.interval
        if row.energy is not None:
            yield from _energy_estimates(row.name, row.energy)


def _energy_estimates(row: str, energy: Energy) -> Iterator[tuple[str, str, float, Interval]]:
    for what, value, low, high in (
        ("power", energy.watts, energy.watts_low, energy.watts_high),
        ("power without work", energy.idle_watts, energy.idle_watts_low, energy.idle_watts_high),
        ("joules per sample", energy.joules_per_sample, energy.joules_low, energy.joules_high),
        ("joules above idle", energy.net_joules_per_sample, energy.net_joules_low, energy.net_joules_high),
    ):
        interval = interval_of(low, high)
        if interval is not None:
            yield row, what, value, interval


def _inside(value: float, interval: Interval) -> bool:
    slack = _TIGHT * max(abs(value), abs(interval.low), abs(interval.high))
    return interval.low - slack <= value <= interval.high + slack


def wall_clock(report: Report) -> Iterator[Told]:
    """Calls that followed one another do not take longer in sum than the clock on the wall says that all of it took."""
    total = 0.0
    for row in report.rows:
        parts = [times for timing in row.timings for times in (timing.end_to_end, timing.device) if times]
        timed = max(sum(times.mean_ms * times.iterations for times in parts) / 1000, row.measured_seconds)
        total += timed + (row.energy.seconds if row.energy else 0.0)
        if row.seconds and timed > row.seconds * (1 + ROUNDED):
            told = f"its timed calls add up to {timed:.2f} s, and all that was done for it took {row.seconds:.2f} s"
            yield error(told, row.name)
    if total > report.wall_seconds * (1 + ROUNDED):
        yield error(f"the measurements add up to {total:.2f} s, and the analysis took {report.wall_seconds:.2f} s")


def transfers(report: Report) -> Iterator[Told]:
    """End to end time has the device's time in it and the copies; else copies were timed for one and not for others.

    A launch-bound device time is no part of it: it is that of launching, between events that take time to record.
    """
    for row in report.rows:
        for timing in row.timings:
            device, whole = timing.device, timing.end_to_end
            if device is None:
                continue
            if whole.mean_ms == device.mean_ms and whole.p50_ms == device.p50_ms:
                yield error(f"batch {timing.batch}: end to end and device time are the same figures", row.name)
            elif whole.p50_ms < device.p50_ms * (1 - _TRANSFERS) and not device.launch_bound:
                told = f"end to end {whole.p50_ms:g} ms is less than the device's part of it, {device.p50_ms:g} ms"
                yield error(f"batch {timing.batch}: {told}", row.name)


def clocks(report: Report) -> Iterator[Told]:
    """The same clock timed all rows: end to end, and on the device."""
    for kind in ("end_to_end", "device"):
        used: dict[str, list[str]] = {}
        for row in report.rows:
            for clock in dict.fromkeys(each.clock for each in _kind(row, kind)):
                used.setdefault(clock, []).append(row.name)
        if len(used) > 1:
            told = "; ".join(f"{clock}: {', '.join(names)}" for clock, names in used.items())
            yield error(f"{kind.replace('_', ' ')} times are by different clocks: {told}")


def _kind(row: Row, kind: str) -> list[Latency]:
    found = [timing.end_to_end if kind == "end_to_end" else timing.device for timing in row.timings]
    return [each for each in found if each is not None]


def variation(report: Report) -> Iterator[Told]:
    """A measurement that varies much is not of a quiet machine: 2 % by a device's clock, 10 % by the wall clock.

    A launch-bound time is the host's, whatever clock tells it.
    """
    found: dict[str, list[str]] = {}
    for row, what, times in _latencies(report):
        limit = _WALL_COV if times.clock.startswith("wall") or times.launch_bound else _DEVICE_COV
        if times.cov > limit:
            found.setdefault(row.name, []).append(f"{what} by {times.cov:.1%} (more than {limit:.0%})")
    for name, told in found.items():
        yield warning(f"times vary: {', '.join(told)}: the machine was not quiet, or its clock moved", name)


def copied_latency(report: Report) -> Iterator[Told]:
    """No two rows take the same time to the last bit, in mean and percentiles: one was copied."""
    for one, other in pairs(report):
        batches = [timing.batch for timing in other.timings if _same(timing, report.timing(one.name, timing.batch))]
        if batches:
            listed = ", ".join(map(str, batches))
            yield error(f"has the latency of {one.name} to the last bit at batch {listed}", other.name)


def _same(one: Timing, other: Timing | None) -> bool:
    if other is None:
        return False
    mine, theirs = one.end_to_end, other.end_to_end
    figures = ("mean_ms", "p50_ms", "p90_ms", "p99_ms", "cov")
    return all(getattr(mine, name) == getattr(theirs, name) for name in figures)
