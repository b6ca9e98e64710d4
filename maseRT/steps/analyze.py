"""analyze: every runtime on the same samples, and the report."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from maseRT.agreement import agreement
from maseRT.config import AnalyzeSection
from maseRT.errors import UsageError
from maseRT.evaluate import evaluate
from maseRT.hardware import cpu, nvidia_gpus
from maseRT.measure import latency_from_times, measure_latency
from maseRT.onnx_export import INPUT, OUTPUT
from maseRT.onnxrt.kernels import kernels_of
from maseRT.onnxrt.providers import SessionSettings
from maseRT.plan import Plan
from maseRT.precision import Precision
from maseRT.receipt import Receipt
from maseRT.records import dependency_versions
from maseRT.report.legacy import Finding, Row, report_json, report_markdown, table
from maseRT.runtimes import get_runtime
from maseRT.runtimes.base import Profiled, Runtime, Session
from maseRT.runtimes.onnxruntime import OnnxRuntime
from maseRT.steps.common import Setting, load_float_weights, load_plan, rebuild_final, set_up
from maseRT.steps.onnxruntime import session_settings
from maseRT.steps.sensitivity import Sensitivity, sensitivity
from maseRT.steps.table import Context, StepResult, final_checkpoint, final_plan
from maseRT.workspace import read_json, write_json, write_text


@dataclass(frozen=True)
class Artifact:
    """Something that a runtime can open.

    Attributes:
        label: "fp32" for the baseline, "int8" (or the plan's float type) for the result.
        load: makes it, when its turn has come: an nn.Module or a path.
        size: bytes on disk.
        missing: why there is nothing to open.
        settings: of the ONNX Runtime session; None for other runtimes.
    """

    runtime: str
    label: str
    load: Callable[[], Any]
    size: int
    device: str
    missing: str = ""
    settings: SessionSettings | None = None

    @property
    def name(self) -> str:
        """The row's name."""
        return f"{self.runtime}-{self.label}"


Samples = list[tuple[Tensor, Tensor]]
Logits = np.ndarray[Any, Any]


def run(context: Context) -> StepResult:
    """Evaluate and time every artifact in every runtime that the config names, and write the report."""
    section = context.config.analyze
    if section is None:
        raise UsageError("the config has no [analyze] section")
    setting = set_up(context)
    samples = _samples(context, setting, section)
    rows: list[Row] = []
    kernels_ms: dict[str, float] = {}
    reference: Logits | None = None
    for name in section.runtimes:
        runtime = get_runtime(name)
        for artifact in _artifacts(context, setting, name):
            why_not = artifact.missing or runtime.missing(artifact.device)
            if why_not:
                rows.append(Row(artifact.name, name, artifact.label, artifact.size, not_run=why_not))
                continue
            with _open(runtime, artifact) as session:
                row, logits = _measure(context, session, artifact, samples, section, setting.classes)
                if isinstance(session, Profiled):
                    feed = {INPUT: _timed_batch(context, samples, section).numpy()}
                    kernels_ms = session.layer_times_ms(feed, iterations=section.iterations)
            if artifact.settings is not None:
                row = replace(row, kernels=kernels_of(artifact.load(), artifact.device, artifact.settings))
            if reference is None:
                reference = logits
            else:
                row = replace(row, agreement=agreement(reference, logits))
            rows.append(row)
    ranking = sensitivity(context, setting, section) if section.sensitivity else None
    return _write(context, rows, _precision(context, kernels_ms), ranking, _method(context, section, samples))


def _open(runtime: Runtime, artifact: Artifact) -> Session:
    if artifact.settings is None:
        return runtime.open(artifact.load(), artifact.device)
    return OnnxRuntime().open(artifact.load(), artifact.device, settings=artifact.settings)


def _samples(context: Context, setting: Setting, section: AnalyzeSection) -> Samples:
    """Return the batches that every row sees, in memory: loading is not what is measured."""
    return list(islice(setting.batches(context, section.split), section.batches))


def _artifacts(context: Context, setting: Setting, runtime: str) -> list[Artifact]:
    """Return what a run has for a runtime: the float baseline and the result; or one engine."""
    config, workspace = context.config, context.workspace
    label = _label(context)
    if runtime == "torch":
        return [
            Artifact(runtime, "fp32", lambda: _float_module(context, setting), _float_bytes(context), context.device),
            Artifact(
                runtime,
                label,
                lambda: _quantized_module(context, setting),
                final_checkpoint(config, workspace).stat().st_size,
                context.device,
            ),
        ]
    if runtime == "onnxruntime":
        if config.export is None:
            return [Artifact(runtime, label, Path, 0, context.device, missing="the config has no [export] section")]
        return [
            _file("fp32", workspace.float_onnx, context),
            _file(label, workspace.onnx, context),
            *_onnxruntime_modes(context),
        ]
    return [_engine(context, runtime, label)]


def _engine(context: Context, runtime: str, label: str) -> Artifact:
    workspace = context.workspace
    if context.config.build_engine is None:
        return Artifact(runtime, label, Path, 0, "", missing="the config has no [build-engine] section")
    builder = read_json(workspace.sidecar, made_by="build-engine")["runtime"]
    missing = "" if builder == runtime else f"the engine was built by {builder}"
    device = context.device if context.device.startswith("cuda") else "cuda:0"
    return Artifact(runtime, label, lambda: workspace.engine, workspace.engine.stat().st_size, device, missing)


def _file(label: str, path: Path, context: Context) -> Artifact:
    settings = SessionSettings(threads=context.threads)
    return Artifact("onnxruntime", label, lambda: path, path.stat().st_size, context.device, settings=settings)


def _onnxruntime_modes(context: Context) -> list[Artifact]:
    """Return the models of the onnxruntime step, on the device that it made them for."""
    section, workspace = context.config.onnxruntime, context.workspace
    if section is None:
        return []
    device = read_json(workspace.onnxruntime, made_by="onnxruntime")["device"]
    settings = replace(session_settings(context, section), cuda_graph=False)
    return [
        Artifact("onnxruntime", mode, partial(workspace.onnxrt_model, mode), path.stat().st_size, device, "", settings)
        for mode in section.modes
        for path in [workspace.onnxrt_model(mode)]
    ]


def _label(context: Context) -> str:
    plan = _plan(context)
    return str(Precision.INT8 if plan.has_int8 else plan.float)


def _plan(context: Context) -> Plan:
    return load_plan(final_plan(context.config, context.workspace), made_by="quantize")


def _float_module(context: Context, setting: Setting) -> nn.Module:
    model = setting.new_model(context)
    load_float_weights(context, model)
    return model.eval()


def _quantized_module(context: Context, setting: Setting) -> nn.Module:
    return rebuild_final(context, setting.new_model(context))[0]


def _float_bytes(context: Context) -> int:
    path = context.config.model.checkpoint or context.workspace.float_checkpoint
    return path.stat().st_size if path.exists() else 0


def _measure(
    context: Context, session: Session, artifact: Artifact, samples: Samples, section: AnalyzeSection, classes: int
) -> tuple[Row, Logits]:
    collected: list[Tensor] = []

    def infer(inputs: Tensor) -> Tensor:
        collected.append(torch.from_numpy(session.infer({INPUT: inputs.numpy()})[OUTPUT]))
        return collected[-1]

    track = context.reporter.track
    metrics = evaluate(infer, track(samples, description=artifact.name, total=len(samples)), classes=classes)
    feed = {INPUT: _timed_batch(context, samples, section).numpy()}
    batch = len(feed[INPUT])
    latency = measure_latency(
        lambda: session.infer(feed),
        batch=batch,
        warmup=section.warmup,
        iterations=track(range(section.iterations), description=f"{artifact.name} latency", total=section.iterations),
    )
    times_ms = session.bind(feed).device_times_ms(section.iterations)
    row = Row(
        artifact.name,
        artifact.runtime,
        artifact.label,
        artifact.size,
        metrics=metrics,
        latency=latency,
        device_latency=latency_from_times(times_ms, batch=batch) if times_ms else None,
    )
    return row, torch.cat(collected).numpy()


def _timed_batch(context: Context, samples: Samples, section: AnalyzeSection) -> Tensor:
    """Return a full batch of real samples, repeated where the data set is smaller."""
    size = (section.batch_sizes or (context.config.data.batch_size,))[0]
    inputs = torch.cat([inputs for inputs, _ in islice(samples, -(-size // len(samples[0][0])))])
    return inputs.repeat(-(-size // len(inputs)), *(1 for _ in inputs.shape[1:]))[:size].contiguous()


def _method(context: Context, section: AnalyzeSection, samples: Samples) -> dict[str, Any]:
    return {
        "samples": f"{sum(len(labels) for _, labels in samples)} of the {section.split} split"
        + (f", the first {section.batches} batches" if section.batches else ""),
        "batch": (section.batch_sizes or (context.config.data.batch_size,))[0],
        "warm_up": section.warmup,
        "iterations": section.iterations,
        "latency": "wall time from inputs in host memory to outputs in host memory",
        "device": context.device,
        "threads": context.threads,
        "cpu": cpu().name,
        "gpus": ", ".join(gpu.name for gpu in nvidia_gpus()) or "none",
        "python": platform.python_version(),
        **dependency_versions(),
    }


def _precision(context: Context, kernels_ms: dict[str, float]) -> list[Finding]:
    """Return what the engine's receipt says, and leave the kernels' times for `explain`."""
    workspace = context.workspace
    if context.config.build_engine is None:
        return []
    receipt = Receipt.from_json(read_json(workspace.receipt, made_by="build-engine"), where=str(workspace.receipt))
    if kernels_ms:
        write_json(workspace.kernel_times, {"onnx_sha256": receipt.onnx_sha256, "ms": kernels_ms})
    timed = receipt.with_times(kernels_ms)
    told = [timed.summary(), timed.conversions(), *(layer.describe() for layer in timed.mismatches)]
    lines = [f"- {line}" for line in told if line]
    return [Finding("precision", timed.overview(), "Precision of the engine", lines)]


def _write(
    context: Context, rows: list[Row], findings: list[Finding], ranking: Sensitivity | None, method: dict[str, Any]
) -> StepResult:
    workspace = context.workspace
    if ranking is not None:
        findings = [*findings, ranking.finding()]
    config = context.config.model_dump(mode="json", by_alias=True, exclude_none=True)
    write_json(workspace.report, report_json(rows, method=method, findings=findings, config=config))
    notes = _plan(context).notes
    text = report_markdown(rows, run=workspace.run, method=method, findings=findings, notes=notes)
    write_text(workspace.report_markdown, text)
    not_run = [f"{row.name}: {row.not_run}" for row in rows if row.not_run]
    return StepResult(
        headline=f"{workspace.report_markdown}" + (f", {len(not_run)} not run here" if not_run else ""),
        outputs=[workspace.report, workspace.report_markdown, *([workspace.sensitivity] if ranking else [])],
        summary={"rows": [row.as_dict() for row in rows], "not_run": not_run, "report": str(workspace.report)},
        table=table(rows),
        remarks=[*(f"not run: {reason}" for reason in not_run), *_sensitivity_remarks(context, ranking)],
    )


def _sensitivity_remarks(context: Context, ranking: Sensitivity | None) -> list[str]:
    if ranking is not None:
        return ranking.remarks()
    wanted = context.config.analyze is not None and context.config.analyze.sensitivity
    return ["sensitivity: the plan has no INT8 layer"] if wanted else []
