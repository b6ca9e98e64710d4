"""Puts together the rows of a report from what was evaluated and measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from maseRT.agreement import agreement
from maseRT.energy import Energy
from maseRT.hardware import computing, cpu, cuda_index, nvidia_gpus
from maseRT.intervals import difference_interval
from maseRT.measure import latency
from maseRT.onnxrt.kernels import kernels_of
from maseRT.onnxrt.providers import parse_device
from maseRT.report import schema
from maseRT.report.estimates import times_faster
from maseRT.steps.analysis.artifacts import Artifact
from maseRT.steps.analysis.evaluating import Evaluated
from maseRT.steps.analysis.history import metrics_of
from maseRT.steps.analysis.measuring import Measured
from maseRT.tasks import Scores, Task
from maseRT.workers.protocol import Opened
from maseRT.workers.schedule import RowTimes

_FLOAT32 = 2.0**-21
"""Relative: what rounding and sums in float32 leave of a metric."""

TRANSFERS = "inputs from host memory, outputs to host memory"


def not_run(artifact: Artifact, why: str) -> schema.Row:
    """Return the row of something that cannot run here."""
    return _row(artifact, not_run=why)


def row_of(
    artifact: Artifact,
    opened: Opened,
    evaluated: Evaluated,
    measured: Measured | None,
    *,
    timings: Sequence[schema.Timing],
    baseline: str,
    task: Task,
    method: schema.Method,
) -> schema.Row:
    """Return the row of something that ran.

    Args:
        artifact: what ran.
        opened: what its worker said.
        evaluated: everybody's outputs and metrics.
        measured: None for a row that is not timed.
        timings: of its latencies, as `timings_of` gives them.
        baseline: name of the row that the others are compared with.
        task: gives the scores that differences are drawn from.
        method: how it was measured.
    """
    name = artifact.name
    rest = _compared(name, baseline, evaluated, task) if name != baseline else {}
    if measured is not None:
        rest |= {"timings": timings, **_measured(measured, isolated=method.isolated)}
    metrics = evaluated.metrics[name]
    return _row(
        artifact,
        metrics=metrics_of({**metrics.as_dict(), "confusion": metrics.confusion}),
        provider=_provider(artifact, opened),
        method=method.model_copy(update={"versions": method.versions | versions_of(artifact, opened)}),
        seconds=evaluated.seconds[name] + opened.seconds + (measured.all_seconds if measured else 0.0),
        measured_seconds=measured.seconds if measured else 0.0,
        **rest,
    )


def versions_of(artifact: Artifact, opened: Opened) -> dict[str, str]:
    """Return the versions of what computed a row: a process of several rows has loaded what others compute with."""
    modules = {artifact.runtime.replace("-", "_")}
    if artifact.runtime == "onnxruntime":
        modules.add(parse_device(artifact.device)[0].plugin)
    return {name: version for name, version in opened.versions.items() if name in modules}


def hardware_name(device: str) -> str:
    """Return the name of the CPU or the NVIDIA GPU of a row's device; that of the device where it is neither."""
    hardware = computing(device)
    if hardware == "cpu":
        return cpu().name
    index = cuda_index(hardware) if hardware.startswith("cuda") else len(nvidia_gpus())
    return nvidia_gpus()[index].name if index < len(nvidia_gpus()) else device


def _row(artifact: Artifact, **rest: object) -> schema.Row:
    return schema.Row.model_validate(
        {
            "name": artifact.name,
            "runtime": artifact.runtime,
            "artifact": artifact.label,
            "role": artifact.role,
            "precision": artifact.precision,
            "size_bytes": artifact.size,
            "sha256": artifact.sha256,
            **rest,
        }
    )


def _compared(name: str, baseline: str, evaluated: Evaluated, task: Task) -> dict[str, object]:
    """Return the difference of the primary metric and the agreement of the outputs, against the baseline."""
    outputs, base = evaluated.outputs[name], evaluated.outputs[baseline]
    before, after = evaluated.metrics[baseline], evaluated.metrics[name]
    difference = schema.Difference(
        metric=task.primary,
        **_change(
            before.primary_value,
            after.primary_value,
            task.scores(base, evaluated.targets),
            task.scores(outputs, evaluated.targets),
        ),
    )
    compared = agreement(base, outputs, classes=task.classes)
    return {"difference": difference, "agreement": schema.Agreement.model_validate(compared.as_dict())}


def _change(before: float, after: float, base_scores: Scores, scores: Scores) -> dict[str, Any]:
    """Return the change of the primary metric, and its interval.

    The change is that of the scores, in float64, where the metric is their mean: one that computes in float32 could be
    rounded out of the interval, or over a gate that it reaches. Where the scores only stand for the metric, the
    interval is as wide as theirs, around the change of the metric.
    """
    change, by_scores = after - before, float(np.mean(scores) - np.mean(base_scores))
    if abs(change - by_scores) <= _FLOAT32 * max(abs(before), abs(after)):
        change = by_scores
    low, high = (end + (change - by_scores) for end in difference_interval(base_scores, scores))
    return {"value": change, "interval": schema.Interval(low=low, high=high)}


def timings_of(measured: Mapping[str, Measured], *, baseline: str) -> dict[str, list[schema.Timing]]:
    """Return the speed of each row at each batch size, and how it compares with the baseline's."""
    walls = {
        name: {size: latency(times.wall, clock="wall") for size, times in row.times.items()}
        for name, row in measured.items()
    }
    base = walls.get(baseline, {})
    return {
        name: [
            _timing(size, times, walls[name][size], base=None if name == baseline else base.get(size))
            for size, times in row.times.items()
        ]
        for name, row in measured.items()
    }


def _measured(measured: Measured, *, isolated: bool) -> dict[str, object]:
    """Return what was measured; host memory only of a process of its own: in another, rows take what others freed."""
    peak = measured.memory if isolated else measured.memory._replace(host_mb=None)
    energy = measured.energy
    return {
        "energy": schema.Energy.model_validate({**energy.as_dict(), "batch": _last_batch(measured)})
        if isinstance(energy, Energy)
        else None,
        "energy_note": "" if isinstance(energy, Energy) else energy,
        "memory": schema.Memory(**peak._asdict()),
        "gpu": schema.GpuState.model_validate(measured.gpu.as_dict()) if measured.gpu else None,
    }


def _last_batch(measured: Measured) -> int:
    """Return the batch size that was bound last: energy is measured on it."""
    return list(measured.times)[-1]


def _timing(size: int, times: RowTimes, end_to_end: schema.Latency, *, base: schema.Latency | None) -> schema.Timing:
    faster = times_faster(base, end_to_end) if base else None
    return schema.Timing(
        batch=size,
        end_to_end=end_to_end,
        device=latency(times.device, clock="device events", waited=times.waited) if times.device else None,
        throughput=size / end_to_end.mean_ms * 1000,
        ratio=faster.value if faster else None,
        ratio_interval=faster.interval if faster else None,
    )


def _provider(artifact: Artifact, opened: Opened) -> schema.Provider | None:
    """Return what ONNX Runtime made of what it was asked for."""
    if artifact.settings is None:
        return None
    kernels = kernels_of(artifact.files[0], artifact.device, artifact.settings)
    return schema.Provider(
        asked=parse_device(artifact.device)[0].name,
        got=list(opened.got),
        nodes=opened.nodes,
        kernels=kernels.as_dict() if kernels else {},
    )
