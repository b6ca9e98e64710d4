"""Where and how a report was measured, and its config, as names and values to show."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from maseRT.report.schema import Energy, Method, Report, Row, Timing, interval_of
from maseRT.report.wording import count, duration, measured

Facts = list[tuple[str, str]]


@dataclass(frozen=True)
class Values:
    """One section of the config."""

    name: str
    values: Facts

    def flat(self) -> Facts:
        """Return the values under their whole names."""
        return [(f"{self.name}.{key}" if self.name else key, value) for key, value in self.values]


def samples_sentence(report: Report) -> str:
    """Return what every row was shown."""
    seen = report.samples
    share = "all" if seen.evaluated == seen.available else f"{seen.evaluated:,} of"
    return f"every row saw {share} {seen.available:,} samples of the {seen.split} split of {seen.data}"


def machine_facts(report: Report) -> Facts:
    """Return the machine, the software and the samples."""
    machine, samples = report.machine, report.samples
    facts = [
        ("CPU", f"{machine.cpu}, {count(machine.cores, 'core')}"),
        ("GPU", ", ".join(machine.gpus) or "none"),
        ("driver", machine.driver),
        ("system", machine.system),
        ("Python", machine.python),
        ("maseRT", report.masert),
        *machine.versions.items(),
        ("samples", f"{samples_sentence(report)}, in batches of {samples.batch_size}"),
        ("samples' SHA-256", samples.sha256),
        ("the whole analysis took", duration(report.wall_seconds)),
    ]
    return [(key, value) for key, value in facts if value]


def common_method(report: Report) -> Facts:
    """Return what all rows have in common in how they were measured."""
    every = list(_methods(report).values())
    if not every:
        return []
    return [(key, value) for key, value in every[0].items() if all(other.get(key) == value for other in every)]


def differing_method(report: Report) -> list[tuple[str, Facts]]:
    """Return per row what not all rows have in common; empty where all were measured alike."""
    common = dict(common_method(report))
    rows = [
        (name, [(key, value) for key, value in method.items() if key not in common])
        for name, method in _methods(report).items()
    ]
    return [(name, values) for name, values in rows if values]


def _methods(report: Report) -> dict[str, dict[str, str]]:
    return {row.name: _facts(row, row.method) for row in report.rows if row.method is not None}


def _facts(row: Row, method: Method) -> dict[str, str]:
    graph = {None: "", True: "replayed", False: "not used"}[method.cuda_graph]
    facts = {
        "device": method.device,
        "hardware": method.hardware,
        "threads": str(method.threads),
        "batch sizes": ", ".join(map(str, method.batch_sizes)),
        "warm-up": count(method.warmup, "call"),
        "timed": _timed(method),
        "transfers": method.transfers,
        "device time": _device_time(row.timings),
        "energy": _energy(row.energy) if row.energy is not None else "",
        "CUDA graph": graph,
        "process": "of its own, rows in turns" if method.isolated else "shared by all rows",
        "versions": ", ".join(f"{name} {version}" for name, version in method.versions.items()),
    }
    return {key: value for key, value in facts.items() if value}


def _timed(method: Method) -> str:
    """Return how often each batch was timed; the tables have how often it was in the end."""
    if not method.iterations:
        return ""
    rounds = f"in {count(method.rounds, 'round')}"
    if method.seconds is None:
        return f"{count(method.iterations, 'call')} {rounds}"
    least = f"at least {count(method.iterations, 'call')}"
    return f"{least}{f' and {method.seconds:g} s on the clock' if method.seconds else ''}, {rounds}"


def _device_time(timings: Sequence[Timing]) -> str:
    """Return how the device was timed, and at which batch sizes it waited for the host."""
    found = [(timing.batch, timing.device) for timing in timings if timing.device is not None]
    if not found:
        return ""
    clocks = ", ".join(dict.fromkeys(latency.clock for _, latency in found))
    bound = ", ".join(str(batch) for batch, latency in found if latency.launch_bound)
    waits = f"; launch-bound at batch {bound}: the device waits for the host, its own time is less" if bound else ""
    return f"by {clocks}, calls queued one behind another{waits}"


def _energy(energy: Energy) -> str:
    """Return what counted energy, how often, and what the device takes without work."""
    interval = interval_of(energy.idle_watts_low, energy.idle_watts_high)
    visits = f"{energy.visits} visits in turns" if energy.visits > 1 else "one visit"
    return f"{energy.source}, {visits}; {measured(energy.idle_watts, interval, 'W')} without work"


def config_values(config: Mapping[str, Any]) -> list[Values]:
    """Return every value of a config by section, tables within sections under dotted names."""
    loose = {key: value for key, value in config.items() if not isinstance(value, Mapping)}
    sections = [(key, value) for key, value in config.items() if isinstance(value, Mapping)]
    return [Values(name, _flat(values)) for name, values in (("", loose), *sections) if values]


def _flat(table: Mapping[str, Any], prefix: str = "") -> Facts:
    flat: Facts = []
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            flat += _flat(value, f"{prefix}{key}.")
        else:
            flat.append((f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    return flat
