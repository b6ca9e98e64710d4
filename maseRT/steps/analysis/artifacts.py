"""What a run has to measure: the float model, the fake-quantized ones, ONNX files and the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from maseRT.onnxrt.providers import SessionSettings, parse_device, why_no_kernels
from maseRT.plan import Plan
from maseRT.precision import Precision
from maseRT.progress import Silent
from maseRT.records import sha256
from maseRT.runtimes import get_runtime
from maseRT.runtimes.base import Session
from maseRT.runtimes.feeds import dtype_name
from maseRT.runtimes.opening import FileOpener
from maseRT.runtimes.trt.sidecar import STRIPPED
from maseRT.steps.analysis.modules import ModuleOpener, State
from maseRT.steps.common import Setting, load_plan
from maseRT.steps.onnxruntime import session_settings
from maseRT.steps.table import Context, final_checkpoint, final_plan
from maseRT.workspace import read_json

Role = Literal["baseline", "float", "simulated", "deployed"]


@dataclass(frozen=True)
class Artifact:
    """Something that a runtime can open, and a row of the report.

    Attributes:
        runtime: its name in configs.
        label: "fp32" for the float model, "int8" (or the plan's float type) for the result, a mode of ONNX Runtime.
        role: see `maseRT.report.schema.Row`.
        precision: what was asked for.
        device: that runs it.
        files: what it is on disk.
        opener: opens it, also in another process; None where there is nothing to open.
        missing: why it cannot run here.
        settings: of the ONNX Runtime session; None for other runtimes.
    """

    runtime: str
    label: str
    role: Role
    precision: str
    device: str
    files: tuple[Path, ...] = ()
    opener: Callable[[], Session] | None = None
    missing: str = ""
    settings: SessionSettings | None = None

    @property
    def name(self) -> str:
        """The row's name."""
        return f"{self.runtime}-{self.label}"

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in self.files if path.exists())

    @property
    def sha256(self) -> str:
        """Of its only file; "" where there is none."""
        return sha256(self.files[0]) if len(self.files) == 1 and self.files[0].exists() else ""

    @property
    def timed(self) -> bool:
        """Whether its speed means anything: fake quantization computes in float."""
        return self.role != "simulated"


def artifacts(context: Context, setting: Setting) -> list[Artifact]:
    """Return what the runtimes of [analyze] have to run, baseline first, with why it cannot run here, if so."""
    section = context.config.analyze
    plan = load_plan(final_plan(context.config, context.workspace), made_by="quantize")
    label = str(Precision.INT8 if plan.has_int8 else plan.float)
    found: list[Artifact] = []
    for runtime in section.runtimes if section else ():
        match runtime:
            case "torch":
                found += _modules(context, setting, plan, label)
            case "onnxruntime":
                found += _onnx_files(context, label)
            case _:
                found.append(_engine(context, runtime, label))
    named: dict[str, Artifact] = {}
    for artifact in found:
        if artifact.name not in named or named[artifact.name].role == "float":  # of a plan of FP32 alone: the result
            named[artifact.name] = artifact
    return [_judged(artifact) for artifact in named.values()]


def _judged(artifact: Artifact) -> Artifact:
    missing = artifact.missing or get_runtime(artifact.runtime).missing(artifact.device) or ""
    return replace(artifact, missing=missing)


def _modules(context: Context, setting: Setting, plan: Plan, label: str) -> Iterator[Artifact]:
    config, workspace = context.config, context.workspace
    splits, inputs = setting.splits, dtype_name(setting.example)

    def opener(state: State) -> ModuleOpener:
        return ModuleOpener(replace(context, reporter=Silent()), state, splits.num_classes, splits.input_shape, inputs)

    device = context.device
    weights = config.model.checkpoint or workspace.float_checkpoint
    yield Artifact("torch", "fp32", "baseline", "fp32", device, (weights,), opener("float"))
    role: Role = "simulated" if plan.has_int8 else "deployed"
    if plan.has_int8 and config.finetune is not None:
        files = (workspace.calibrated_checkpoint,)
        yield Artifact("torch", f"{label}-ptq", role, label, device, files, opener("calibrated"))
    final = (final_checkpoint(config, workspace),)
    yield Artifact("torch", label, role, label, device, final, opener("final"))


def _onnx_files(context: Context, label: str) -> Iterator[Artifact]:
    workspace = context.workspace
    if context.config.export is None:
        missing = "the config has no [export] section"
        yield Artifact("onnxruntime", label, "deployed", label, context.device, missing=missing)
        return
    settings = SessionSettings(threads=context.threads)
    yield _onnx_file("fp32", "float", "fp32", workspace.float_onnx, context.device, settings)
    best = _likes_best(context)
    precision = _computed(label, widened=best != workspace.onnx)
    yield _onnx_file(label, "deployed", precision, best, context.device, settings)
    yield from _onnxruntime_modes(context, label)


def _likes_best(context: Context) -> Path:
    """Return the quantized model in the form that ONNX Runtime has kernels for on this device, if it was exported."""
    export, workspace = context.config.export, context.workspace
    form = parse_device(context.device)[0].form
    return workspace.target_onnx(form) if export and form in export.targets else workspace.onnx


def _onnxruntime_modes(context: Context, label: str) -> Iterator[Artifact]:
    """Yield the models of the onnxruntime step, on the device that it made them for."""
    section, workspace = context.config.onnxruntime, context.workspace
    if section is None:
        return
    told = read_json(workspace.onnxruntime, made_by="onnxruntime")
    settings = replace(session_settings(context, section), cuda_graph=False)
    widened = told["modes"].get("qdq", {}).get("widened", False)
    precisions = {"optimized": "fp32", "auto-mixed": "fp16", "qdq": _computed(label, widened=widened)}
    for mode in section.modes:
        precision = told["modes"][mode].get("precision") or precisions.get(mode, "int8")
        role: Role = "float" if precision == "fp32" else "deployed"
        yield _onnx_file(mode, role, precision, workspace.onnxrt_model(mode), told["device"], settings)


def _computed(label: str, *, widened: bool) -> str:
    """Return the precision of a form: those for CPUs are `widened`, FP32 where the exported model is FP16."""
    return "fp32" if label == "fp16" and widened else label


def _onnx_file(label: str, role: Role, precision: str, path: Path, device: str, settings: SessionSettings) -> Artifact:
    opener = FileOpener("onnxruntime", path, device, settings)
    missing = (why_no_kernels(path, device) or "") if path.exists() else ""
    return Artifact("onnxruntime", label, role, precision, device, (path,), opener, missing, settings)


def _engine(context: Context, runtime: str, label: str) -> Artifact:
    workspace = context.workspace
    device = context.device if context.device.startswith("cuda") else "cuda:0"
    if context.config.build_engine is None:
        missing = "the config has no [build-engine] section"
        return Artifact(runtime, label, "deployed", label, device, missing=missing)
    sidecar = read_json(workspace.sidecar, made_by="build-engine")
    missing = "" if sidecar["runtime"] == runtime else f"the engine was built by {sidecar['runtime']}"
    missing = STRIPPED if sidecar.get("stripped") and not missing else missing
    opener = FileOpener(runtime, workspace.engine, device)
    return Artifact(runtime, label, "deployed", label, device, (workspace.engine,), opener, missing)
