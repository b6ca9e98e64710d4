"""The energy of the rows, in turns."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from gpu_bench.jobs import Job, Options
from gpu_bench.rows import Row, cudnn_benchmark
from maseRT.energy import VISIT_SECONDS, Energy, Visit, measure_energy
from maseRT.errors import MaseRTError
from maseRT.meters import open_meter
from maseRT.workers import schedule


@dataclass(frozen=True)
class Metered:
    """A row that works for its energy."""

    row: Row
    device: str
    batch: int

    def energy(self, *, seconds: float = VISIT_SECONDS) -> Visit | str:
        """Return the power of inferring the bound batch, or why it cannot be measured."""
        with open_meter(self.device) as meter, cudnn_benchmark(self.row.benchmark):
            if isinstance(meter, str):
                return meter
            try:
                return measure_energy(self.row.bound.repeat, meter, batch=self.batch, seconds=seconds)
            except MaseRTError as error:
                return error.what


def measure_energies(job: Job, options: Options, rows: list[Row], result: dict[str, Any]) -> None:
    """Measure the energy of the rows in turns, as the package does; no round of visits begins after the deadline."""
    device = "cpu" if options.dry_run else "cuda:0"
    metered = {row.name: Metered(row, device, job.batch) for row in rows if row.metered}
    if options.deadline < time.time():
        found: dict[str, Energy | str] = dict.fromkeys(metered, "out of time")
    else:
        track = functools.partial(until, options.deadline, len(metered))
        found = schedule.measure_energies(metered, dict.fromkeys(metered, device), track=track)
    for row in rows:
        if row.name in found:
            energy = found[row.name]
            row.result["energy"] = f"not measured: {energy}" if isinstance(energy, str) else energy.as_dict()
    told = [each for each in found.values() if not isinstance(each, str)]
    result["energy"] = (
        {"source": told[0].source, "device": told[0].device, "idle_watts": told[0].idle_watts}
        if told
        else f"not measured: {', '.join(sorted(map(str, {*found.values()})))}"
    )
    result["energy_ratios"] = energy_ratios(rows)


def until(deadline: float, rows: int, turns: Iterable[int], **_: Any) -> Iterator[int]:
    """Yield turns; after the first round of all rows, no round begins after the deadline."""
    for turn in turns:
        if turn and turn % rows == 0 and deadline < time.time():
            return
        yield turn


def energy_ratios(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Return how many times less net energy per sample the INT8 engine takes, with intervals from the two rows' own."""
    energies = {row.name: row.result["energy"] for row in rows if isinstance(row.result.get("energy"), dict)}
    mine = energies.get("tensorrt int8")
    if mine is None:
        return {}
    found = {}
    for name, other in energies.items():
        if other is mine or other["net_joules_low"] is None or (mine["net_joules_low"] or 0.0) <= 0:
            continue
        low = other["net_joules_low"] / mine["net_joules_high"]
        high = other["net_joules_high"] / mine["net_joules_low"]
        ratio = other["net_joules_per_sample"] / mine["net_joules_per_sample"]
        gross = other["joules_per_sample"] / mine["joules_per_sample"]
        found[f"tensorrt int8 vs {name}"] = {"ratio": ratio, "low": low, "high": high, "gross_ratio": gross}
    return found
