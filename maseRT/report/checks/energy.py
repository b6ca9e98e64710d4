"""Is energy power times time, of each row's own work, and was the GPU free to run?"""

from __future__ import annotations

from collections.abc import Iterator

from maseRT.report.checks.told import ROUNDED, Told, error, near, pairs, rounded, warning
from maseRT.report.schema import Energy, Report, Row

_STEADY = 1.5
"""How many times the energy's seconds per sample may differ from the latency's: seconds of full load meet power limits
that a few timed calls do not, and inferences that queue on a GPU hide the launch of the next. Confusing the batch with
the sample, or joules of one measurement with watts of another, errs by more."""

_LAUNCHING = 2.0
"""How many times faster than in a few timed calls a host may launch over seconds: its clock rises with work, and no
events are recorded."""

_OVER_LIMIT = 1.1
"""A power limit is kept over milliseconds; readings of a few seconds go over it by their own error."""

_CLOCKS = 0.02
"""Relative: clocks of two rows that differ by more make their ratio that of the clocks as well."""

_HARMLESS = frozenset(("application clocks", "display clocks", "sync boost"))
"""Limits that somebody set, the same for every row; the rest come and go with load and heat."""


def power_times_time(report: Report) -> Iterator[Told]:
    """Energy is power times time: joules per sample x samples = watts x seconds.

    Of several visits all four are sums or follow from them; of one, it holds within the power's interval.
    """
    for row, energy in _energies(report):
        if energy.seconds <= 0 or energy.samples <= 0:
            yield error(f"energy of {energy.samples} samples in {energy.seconds:g} s", row.name)
            continue
        watts = energy.joules_per_sample * energy.samples / energy.seconds
        low, high = _bounds(energy)
        if not low <= watts <= high:
            told = f"{energy.joules_per_sample * 1e3:.4g} mJ x {energy.samples} samples in {energy.seconds:.3g} s"
            yield error(
                f"{told} is {watts:.4g} W, measured were {energy.watts:.4g} W ({low:.4g} to {high:.4g})", row.name
            )
        idle = (energy.joules_per_sample - energy.net_joules_per_sample) * energy.samples / energy.seconds
        if not near(idle, energy.idle_watts, absolute=(high - low) / 2 + ROUNDED * abs(energy.watts)):
            told = f"energy above idle leaves {idle:.4g} W for idleness, measured were {energy.idle_watts:.4g} W"
            yield error(told, row.name)


def _bounds(energy: Energy) -> tuple[float, float]:
    slack = ROUNDED * abs(energy.watts)
    if energy.visits > 1:
        return energy.watts - slack, energy.watts + slack
    low = energy.watts if energy.watts_low is None else min(energy.watts_low, energy.watts)
    high = energy.watts if energy.watts_high is None else max(energy.watts_high, energy.watts)
    return low - slack, high + slack


def steady_time(report: Report) -> Iterator[Told]:
    """The time of a sample while energy was read is that of the latency, at the same batch, within a factor of 1.5.

    A launch-bound row may be faster, by the factor that a host that launches for seconds is.
    """
    for row, energy in _energies(report):
        timing = report.timing(row.name, energy.batch)
        if timing is None or energy.samples <= 0:
            continue
        known = [timing.end_to_end.mean_ms, *([timing.device.mean_ms] if timing.device else [])]
        per_batch = energy.seconds / energy.samples * energy.batch * 1000
        fastest = min(known) / _STEADY
        if timing.device is not None and timing.device.launch_bound:
            fastest /= _LAUNCHING
        if not fastest <= per_batch <= max(known) * _STEADY:
            told = f"a batch of {energy.batch} took {per_batch:.4g} ms while energy was read"
            yield error(f"{told}, and {' or '.join(f'{each:.4g}' for each in known)} ms when it was timed", row.name)


def copied_energy(report: Report) -> Iterator[Told]:
    """No two rows have the same energy to the last bit: one was copied, or both were never told apart.

    A figure that somebody rounded may be equal by chance, and power and energy together hardly.
    """
    for one, other in pairs(report):
        if one.energy is None or other.energy is None:
            continue
        figures = ("joules_per_sample", "watts")
        same = [name for name in figures if getattr(one.energy, name) == getattr(other.energy, name) != 0]
        if len(same) == len(figures) or any(not rounded(getattr(one.energy, name)) for name in same):
            told = " and ".join(name.replace("_", " ") for name in same)
            yield error(f"has the {told} of {one.name} to the last bit", other.name)


def idle_power(report: Report) -> Iterator[Told]:
    """Work takes more power than idleness; if not, somebody else worked while idleness was measured."""
    for row, energy in _energies(report):
        high = energy.watts if energy.watts_high is None else max(energy.watts_high, energy.watts)
        if high < energy.idle_watts:
            told = f"takes {energy.watts:.4g} W at work and {energy.idle_watts:.4g} W when idle"
            yield warning(f"{told}: something else ran meanwhile", row.name)


def power_limit(report: Report) -> Iterator[Told]:
    """A GPU does not take more than its power limit."""
    for row, energy in _energies(report):
        limit = row.gpu.power_limit_w if row.gpu else None
        if limit and energy.source.startswith("NVML") and energy.watts > limit * _OVER_LIMIT:
            yield error(f"takes {energy.watts:.4g} W, above the GPU's limit of {limit:.4g} W", row.name)


def throttling(report: Report) -> Iterator[Told]:
    """Heat or a power limit held the clocks down: the latency is that of this machine on this day."""
    for row in report.rows:
        held = [limit for limit in (row.gpu.limits if row.gpu else []) if limit not in _HARMLESS]
        if held:
            yield warning(f"the GPU was held back: {', '.join(held)}", row.name)


def gpu_clocks(report: Report) -> Iterator[Told]:
    """Rows that are compared ran at the same clocks of one GPU."""
    for kind in ("sm_clock_mhz", "memory_clock_mhz"):
        at: dict[str, list[tuple[int, Row]]] = {}
        for row in report.ran():
            clock = getattr(row.gpu, kind, None)
            if clock and row.method is not None:
                at.setdefault(row.method.hardware, []).append((clock, row))
        for seen in at.values():
            (low, slow), (high, fast) = min(seen, key=_clock), max(seen, key=_clock)
            if high > low * (1 + _CLOCKS):
                told = f"ran at {low} MHz, {fast.name} at {high} MHz ({kind.removesuffix('_mhz').replace('_', ' ')})"
                yield warning(told, slow.name)


def _clock(seen: tuple[int, Row]) -> int:
    return seen[0]


def _energies(report: Report) -> Iterator[tuple[Row, Energy]]:
    for row in report.rows:
        if row.energy is not None:
            yield row, row.energy
