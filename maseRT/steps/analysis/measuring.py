"""Measures the open rows of a report: speed and energy in turns, then memory and kernels."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any

from torch import Tensor

from maseRT.config import AnalyzeSection
from maseRT.energy import Energy
from maseRT.interrupts import finishing
from maseRT.nvml import GpuState, typical_state
from maseRT.progress import Reporter
from maseRT.steps.resume import Finished
from maseRT.workers.memory import Peak
from maseRT.workers.protocol import Worker
from maseRT.workers.schedule import RowTimes, measure_energies, measure_rows

log = logging.getLogger(__name__)

_ENERGY = "energy"
"""The unit's name."""


@dataclass
class Measured:
    """What was measured of one row.

    Attributes:
        times: by batch size.
        energy: of one sample in the last batch size, or why there is none.
        memory: the most that it took.
        kernels_ms: of an engine, by kernel.
    """

    times: dict[int, RowTimes] = field(default_factory=dict)
    energy: Energy | str = ""
    memory: Peak = field(default_factory=Peak)
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


@dataclass(frozen=True)
class Measurement:
    """What was measured.

    Attributes:
        rows: by name.
        resumed: batch sizes that were measured before an interruption, and when.
        energy_resumed: when the energy was, "" if it was not.
        earlier_seconds: that all those took.
    """

    rows: dict[str, Measured]
    resumed: dict[int, str] = field(default_factory=dict)
    energy_resumed: str = ""
    earlier_seconds: float = 0.0


def measure(
    workers: Mapping[str, Worker],
    devices: Mapping[str, str],
    batches: Mapping[int, Tensor],
    section: AnalyzeSection,
    finished: Finished,
    reporter: Reporter,
) -> Measurement:
    """Measure every row.

    Args:
        workers: open, by row.
        devices: of each row, as `maseRT.hardware.computing` names it.
        batches: what is inferred, by batch size.
        section: [analyze].
        finished: what was measured before an interruption, all rows in turns: batch sizes, and energy.
        reporter: shows progress.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed; what was measured so far is in `finished`.
    """
    measured = {name: Measured() for name in workers}
    if not workers:
        return Measurement(measured)
    resumed: dict[int, str] = {}
    earlier_seconds = 0.0
    for size, inputs in batches.items():
        unit = f"latency of batch {size}"
        told = _before(finished, unit)
        if told is not None:
            resumed[size] = told["ended"]
            earlier_seconds += told["seconds"]
            for worker in workers.values():
                worker.bind(inputs.numpy())  # for what is measured besides
        else:
            with finishing(unit):
                told = _in_turns(workers, inputs, devices, section, reporter, size)
                finished.add(unit, told)
        for name, row in measured.items():
            row.times[size] = _row_times(told["rows"][name])
            row.memory = row.memory.most(Peak(*told["memory"][name]))
    energies = _before(finished, _ENERGY)
    energy_resumed = energies["ended"] if energies else ""
    earlier_seconds += energies["seconds"] if energies else 0.0
    if energies is None:
        with finishing(_ENERGY):
            energies = _energies(workers, devices, section, reporter)
            if any(isinstance(energy, dict) for energy in energies["rows"].values()):
                finished.add(_ENERGY, energies)
    for name, worker in workers.items():
        energy = energies["rows"][name]
        measured[name].energy = Energy(**energy) if isinstance(energy, dict) else energy
        measured[name].memory = measured[name].memory.most(worker.memory())
        measured[name].kernels_ms = worker.kernel_times_ms(section.iterations)
    return Measurement(measured, resumed, energy_resumed, earlier_seconds)


def _before(finished: Finished, unit: str) -> Any:
    """Return what a unit told that was measured before an interruption; None if it was not."""
    told = finished.get(unit)
    if told is not None:
        log.warning("%s was measured before", unit)
    return told


def _in_turns(
    workers: Mapping[str, Worker],
    inputs: Tensor,
    devices: Mapping[str, str],
    section: AnalyzeSection,
    reporter: Reporter,
    size: int,
) -> dict[str, Any]:
    """Time a batch on all rows; returns values that JSON has."""
    start = time.perf_counter()
    found = measure_rows(
        workers,
        inputs.numpy(),
        warmup=section.warmup,
        iterations=section.iterations,
        seconds=section.seconds,
        device=any(device != "cpu" for device in devices.values()),
        track=partial(reporter.track, unit="round"),
        description=f"latency, batch {size}",
    )
    return {
        "rows": {name: asdict(times) for name, times in found.items()},
        "memory": {name: worker.memory() for name, worker in workers.items()},
        "seconds": time.perf_counter() - start,
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _row_times(told: Mapping[str, Any]) -> RowTimes:
    gpu = told["gpu"]
    state = GpuState(**{**gpu, "limits": tuple(gpu["limits"])}) if gpu else None
    return RowTimes(told["wall"], told["device"], state, told["waited"])


def _energies(
    workers: Mapping[str, Worker], devices: Mapping[str, str], section: AnalyzeSection, reporter: Reporter
) -> dict[str, Any]:
    """Measure the energy of all rows, or say why it is not known; returns values that JSON has."""
    start = time.perf_counter()
    found: dict[str, Energy | str] = dict.fromkeys(workers, "[analyze] energy = false")
    if section.energy:
        found = measure_energies(workers, devices, track=partial(reporter.track, unit="visit"))
    return {
        "rows": {name: energy.as_dict() if isinstance(energy, Energy) else energy for name, energy in found.items()},
        "seconds": time.perf_counter() - start,
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
    }
