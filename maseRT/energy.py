"""Energy of steady work: a device's own energy counter over several visits, what it takes when idle subtracted."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from maseRT.errors import MaseRTError, StepError
from maseRT.hardware import cuda_index, nvidia_gpus, why_no_gpu
from maseRT.intervals import t_quantile
from maseRT.nvml import NvmlGpu, open_gpu

VISITS = 4
"""To each row: what changes between them (clocks, heat, somebody else's work) is no part of a single one's interval."""

VISIT_SECONDS = 1.0
"""Of steady state; shorter than this, the counters' coarse steps would show."""

IDLE_SECONDS = 1.0

_POLL_SECONDS = 0.02
_WARMUP_SECONDS = 0.5
_WINDOWS = 8
_POWERCAP = Path("/sys/class/powercap")


class Meter(Protocol):
    """Something that counts joules.

    Attributes:
        source: what counts, in words.
        device: whose energy it is.
    """

    source: str
    device: str

    def joules(self) -> float:
        """Return the energy since some fixed moment."""


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


class GpuCounter:
    """A GPU's total energy counter (Volta and later)."""

    source = "NVML total energy counter"

    def __init__(self, gpu: NvmlGpu, device: str) -> None:
        self._gpu = gpu
        self._last = 0.0
        self.device = device

    def joules(self) -> float:
        """Return the counter; its last value where one reading fails."""
        self._last = self._gpu.energy_j() or self._last
        return self._last


class GpuPower:
    """Integrates power samples, for GPUs without a counter: less exact, since the samples are averages themselves."""

    source = "NVML power samples (no energy counter)"

    def __init__(self, gpu: NvmlGpu, device: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self._gpu = gpu
        self._clock = clock
        self._before = clock()
        self._total = 0.0
        self.device = device

    def joules(self) -> float:
        """Add what was used since the last call."""
        now = self._clock()
        self._total += (self._gpu.power_w() or 0.0) * (now - self._before)
        self._before = now
        return self._total


class Rapl:
    """The counters of all CPU packages; each wraps around at its own range."""

    source = "RAPL package counters"

    def __init__(self, packages: Sequence[Path]) -> None:
        self._files = [package / "energy_uj" for package in packages]
        self._ranges = [int((package / "max_energy_range_uj").read_text(encoding="ascii")) for package in packages]
        self._last = self._read()
        self._total = 0
        self.device = f"{len(packages)} CPU package{'s' * (len(packages) != 1)}"

    def joules(self) -> float:
        """Return the energy of all packages since the start."""
        now = self._read()
        for before, after, size in zip(self._last, now, self._ranges, strict=True):
            self._total += (after - before) % (size + 1)
        self._last = now
        return self._total / 1e6

    def _read(self) -> list[int]:
        return [int(file.read_text(encoding="ascii")) for file in self._files]


@contextmanager
def open_meter(device: str, *, powercap: Path = _POWERCAP) -> Iterator[Meter | str]:
    """Yield the meter of hardware ("cpu", "cuda:N", ...), or the reason why its energy cannot be measured.

    Args:
        device: a GPU is found by its UUID, so that it is the one that runs.
        powercap: where Linux shows RAPL.
    """
    if device == "cpu":
        yield _rapl(powercap)
        return
    if not device.startswith("cuda"):
        yield f"no energy counter of {device} is known"
        return
    index = cuda_index(device)
    reason = why_no_gpu(index)
    if reason:
        yield reason
        return
    gpu = nvidia_gpus()[index]
    with ExitStack() as stack:
        try:
            opened = stack.enter_context(open_gpu(gpu.uuid))
        except MaseRTError as error:
            yield f"{error.what}{f': {error.fix}' if error.fix else ''}"
            return
        yield _gpu_meter(opened, f"{gpu.name} {gpu.uuid}")


def _gpu_meter(gpu: NvmlGpu, name: str) -> Meter | str:
    if gpu.energy_j() is not None:
        return GpuCounter(gpu, name)
    return GpuPower(gpu, name) if gpu.power_w() is not None else "NVML tells neither energy nor power of this GPU"


def _rapl(powercap: Path) -> Meter | str:
    try:
        zones = sorted(powercap.glob("intel-rapl:*"))  # AMD's are called so too; those below a package have two colons
        packages = [zone for zone in zones if (zone / "name").read_text(encoding="ascii").startswith("package")]
        return Rapl(packages) if packages else "this CPU, or the machine around it, shows no RAPL counters"
    except PermissionError:
        return f"the RAPL counters may not be read here (allow it: chmod a+r {powercap}/*/energy_uj)"
    except (OSError, ValueError) as error:
        return f"the RAPL counters cannot be read: {error}"


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
    between = _student(values) if len(values) > 1 else None
    return max((each for each in (between, within) if each is not None), default=None)


def _student(values: Sequence[float]) -> float:
    """Return half the 95 % interval of the mean of two values or more, by Student's t."""
    return t_quantile(0.975, len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))


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
    margin = _student(each.tolist())
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
