"""Energy of steady work: a meter read over several visits, and what the device takes when idle subtracted."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from maseRT.errors import StepError
from maseRT.meters import Meter
from maseRT.spread import mean_error

VISITS = 4
"""To each row: what changes between them (clocks, heat, somebody else's work) is no part of a single one's interval."""

VISIT_SECONDS = 1.0
"""Of steady state; shorter than this, the counters' coarse steps would show."""

IDLE_SECONDS = 1.0

_POLL_SECONDS = 0.02
_WARMUP_SECONDS = 0.5
_WINDOWS = 8


@dataclass(frozen=True)
class Power:
    """Average power over a while.

    Attributes:
        low_w: of a 95 % interval, from the spread over windows of the while; `high_w` likewise. None where the counter
            moved too seldom for two windows.
        seconds: how long.
    """

    watts: float
    low_w: float | None
    high_w: float | None
    seconds: float


@dataclass(frozen=True)
class Visit:
    """Steady work for a while.

    Attributes:
        source: what counted.
        device: whose energy it is.
        power: meanwhile.
        seconds: of steady state.
        samples: inferred in them.
    """

    source: str
    device: str
    power: Power
    seconds: float
    samples: int


@dataclass(frozen=True)
class Energy:
    """What one sample costs in steady state, over all visits. Ends of 95 % intervals are None where they are not known.

    Attributes:
        source: what counted.
        device: whose energy it is.
        seconds: of steady state.
        samples: inferred in them.
        watts: average power; `watts_low` and `watts_high` are its interval.
        idle_watts: average power without work, before, between and after the visits; with its interval.
        joules_per_sample: of all the power: `watts` x `seconds` / `samples`; with its interval.
        net_joules_per_sample: of the power above idle; its interval has that of `idle_watts` in it.
        visits: how many.
    """

    source: str
    device: str
    seconds: float
    samples: int
    watts: float
    watts_low: float | None
    watts_high: float | None
    idle_watts: float
    joules_per_sample: float
    net_joules_per_sample: float
    visits: int
    idle_watts_low: float | None
    idle_watts_high: float | None
    joules_low: float | None
    joules_high: float | None
    net_joules_low: float | None
    net_joules_high: float | None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def measure_idle(meter: Meter, *, seconds: float = IDLE_SECONDS) -> Power:
    """Measure the power without work; call it where nothing has run for a moment."""
    with _Sampler(meter) as sampler:
        time.sleep(seconds)
    return power_from_readings(sampler.readings)


def measure_energy(
    repeat: Callable[[int], object], meter: Meter, *, batch: int, seconds: float = VISIT_SECONDS
) -> Visit:
    """Run something for `seconds` of steady state and read the meter meanwhile; `energy_of` puts visits together.

    Args:
        repeat: infers so many batches back to back and returns when they are done.
        meter: of the device that runs them.
        batch: samples per inference.
        seconds: of steady state, after a warm-up.
    """
    chunk = _chunk(repeat)
    _run_for(repeat, chunk, _WARMUP_SECONDS)
    with _Sampler(meter) as sampler:
        start = time.perf_counter()
        count = _run_for(repeat, chunk, seconds)
        elapsed = time.perf_counter() - start
    return Visit(meter.source, meter.device, power_from_readings(sampler.readings), elapsed, count * batch)


def energy_of(visits: Sequence[Visit], idle: Sequence[Power]) -> Energy:
    """Put the visits to one row together.

    Joules, seconds and samples are added up, and the rest follows from the sums. Intervals are Student's t over the
    visits, and never narrower than what the windows within the visits give: few visits may agree by chance. That of the
    net energy also has the power without work in it, whose own is over `idle` in the same way.

    Args:
        visits: one at least, with the same meter.
        idle: power without work, before, between and after them; one at least.
    """
    seconds = sum(visit.seconds for visit in visits)
    samples = sum(visit.samples for visit in visits)
    per_sample = seconds / samples
    watts, within = _pooled([(visit.power, visit.seconds) for visit in visits])
    idle_watts, idle_within = _pooled([(power, power.seconds) for power in idle])
    idle_margin = _margin([power.watts for power in idle], idle_within)

    def margin_above(base: float) -> float | None:
        each = [(visit.power.watts - base) * visit.seconds / visit.samples for visit in visits]
        return _margin(each, None if within is None else within * per_sample)

    joules, net = watts * per_sample, (watts - idle_watts) * per_sample
    above = margin_above(idle_watts)
    both = None if above is None or idle_margin is None else math.hypot(above, idle_margin * per_sample)
    watts_low, watts_high = _ends(watts, _margin([visit.power.watts for visit in visits], within))
    idle_low, idle_high = _ends(idle_watts, idle_margin)
    low, high = _ends(joules, margin_above(0.0))
    net_low, net_high = _ends(net, both)
    return Energy(
        source=visits[0].source,
        device=visits[0].device,
        seconds=seconds,
        samples=samples,
        watts=watts,
        watts_low=watts_low,
        watts_high=watts_high,
        idle_watts=idle_watts,
        joules_per_sample=joules,
        net_joules_per_sample=net,
        visits=len(visits),
        idle_watts_low=idle_low,
        idle_watts_high=idle_high,
        joules_low=low,
        joules_high=high,
        net_joules_low=net_low,
        net_joules_high=net_high,
    )


def _pooled(powers: Sequence[tuple[Power, float]]) -> tuple[float, float | None]:
    """Return the average of powers over their seconds, and half the interval that those of the single powers make."""
    total = sum(seconds for _, seconds in powers)
    watts = sum(power.watts * seconds for power, seconds in powers) / total
    halves = [
        (power.high_w - power.low_w) / 2 * seconds
        for power, seconds in powers
        if power.low_w is not None and power.high_w is not None
    ]
    return watts, math.hypot(*halves) / total if len(halves) == len(powers) else None


def _margin(values: Sequence[float], within: float | None) -> float | None:
    """Return half the interval of a mean; None where neither the values nor what is within them tells."""
    between = mean_error(values) if len(values) > 1 else None
    return max((each for each in (between, within) if each is not None), default=None)


def _ends(value: float, margin: float | None) -> tuple[float | None, float | None]:
    return (None, None) if margin is None else (value - margin, value + margin)


def power_from_readings(readings: Sequence[tuple[float, float]]) -> Power:
    """Return the average power of (seconds, joules) readings, and its 95 % interval.

    A counter that moves in steps is read where it has just moved. The interval is Student's t over windows of equal
    length.

    Raises:
        StepError: the counter did not move twice.
    """
    moved = [after for before, after in pairwise(readings) if after[1] != before[1]]
    if len(moved) < 2:
        raise StepError("the energy counter stood still", where="energy", fix="measure for longer")
    times, joules = np.array(moved).T
    seconds = float(times[-1] - times[0])
    watts = float(joules[-1] - joules[0]) / seconds
    windows = min(_WINDOWS, len(moved) - 1)
    if windows < 2:
        return Power(watts, None, None, seconds)
    ends = np.linspace(0, len(moved) - 1, windows + 1).round().astype(int)
    each = np.diff(joules[ends]) / np.diff(times[ends])
    margin = mean_error(each.tolist())
    return Power(watts, watts - margin, watts + margin, seconds)


def _chunk(repeat: Callable[[int], object]) -> int:
    """Return how many inferences take about a tenth of a second."""
    count = 1
    while True:
        start = time.perf_counter()
        repeat(count)
        elapsed = time.perf_counter() - start
        if elapsed > 0.05:
            return max(1, round(count * 0.1 / elapsed))
        count *= 2


def _run_for(repeat: Callable[[int], object], chunk: int, seconds: float) -> int:
    """Repeat for at least so long; return how many inferences that were."""
    end = time.perf_counter() + seconds
    count = 0
    while time.perf_counter() < end:
        repeat(chunk)
        count += chunk
    return count


class _Sampler:
    """Reads a meter from a thread of its own while a block runs.

    Attributes:
        readings: (seconds, joules).
    """

    def __init__(self, meter: Meter) -> None:
        self.readings: list[tuple[float, float]] = []
        self._meter = meter
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)

    def _read(self) -> None:
        while True:
            now = time.perf_counter()  # once the counter is read, this thread may wait for the interpreter's lock
            self.readings.append((now, self._meter.joules()))
            if self._done.wait(_POLL_SECONDS):
                return

    def __enter__(self) -> _Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
