"""Measures the open rows of a report: speed in turns, then energy and memory, one row after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from maseRT.config import AnalyzeSection
from maseRT.energy import Energy
from maseRT.nvml import GpuState, typical_state
from maseRT.progress import Reporter
from maseRT.workers.protocol import Worker
from maseRT.workers.schedule import RowTimes, idle_power, measure_rows


@dataclass
class Measured:
    """What was measured of one row.

    Attributes:
        times: by batch size.
        energy: of one sample in the last batch size, or why there is none.
        memory: most host and device memory, MiB.
        kernels_ms: of an engine, by kernel.
    """

    times: dict[int, RowTimes] = field(default_factory=dict)
    energy: Energy | str = ""
    memory: tuple[float | None, float | None] = (None, None)
    kernels_ms: dict[str, float] = field(default_factory=dict)

    @property
    def gpu(self) -> GpuState | None:
        """The state of its GPU while it was timed."""
        return typical_state([times.gpu for times in self.times.values() if times.gpu])

    @property
    def seconds(self) -> float:
        """On the clock, over all timed calls."""
        calls = [calls for times in self.times.values() for calls in (*times.wall, *(times.device or []))]
        return sum(map(sum, calls)) / 1000

    @property
    def all_seconds(self) -> float:
        """On the clock, energy included."""
        return self.seconds + (self.energy.seconds if isinstance(self.energy, Energy) else 0.0)


def measure(
    workers: Mapping[str, Worker],
    devices: Mapping[str, str],
    batches: Mapping[int, Tensor],
    section: AnalyzeSection,
    reporter: Reporter,
) -> dict[str, Measured]:
    """Measure every row.

    Args:
        workers: open, by row.
        devices: of each row, "cpu" or "cuda:N".
        batches: what is inferred, by batch size.
        section: [analyze].
        reporter: shows progress.
    """
    measured = {name: Measured() for name in workers}
    if not workers:
        return measured
    for size, inputs in batches.items():
        found = measure_rows(
            workers,
            inputs.numpy(),
            warmup=section.warmup,
            iterations=section.iterations,
            seconds=section.seconds,
            device=any(device != "cpu" for device in devices.values()),
            track=reporter.track,
            description=f"latency, batch {size}",
        )
        for name, times in found.items():
            measured[name].times[size] = times
    _energy(workers, devices, measured, section, reporter)
    for name, worker in workers.items():
        measured[name].memory = worker.memory()
        measured[name].kernels_ms = worker.kernel_times_ms(section.iterations)
    return measured


def _energy(
    workers: Mapping[str, Worker],
    devices: Mapping[str, str],
    measured: Mapping[str, Measured],
    section: AnalyzeSection,
    reporter: Reporter,
) -> None:
    if not section.energy:
        for row in measured.values():
            row.energy = "[analyze] energy = false"
        return
    with reporter.spinner("power without work"):
        idle = {device: idle_power(device) for device in dict.fromkeys(devices.values())}
    for name, worker in reporter.track(list(workers.items()), description="energy", total=len(workers)):
        measured[name].energy = worker.energy(idle[devices[name]])
