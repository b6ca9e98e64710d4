"""onnxruntime: models for ONNX Runtime on one device, by its own tools and by this toolchain, with their kernels."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import onnx

from maseRT.agreement import Agreement, agreement
from maseRT.config import OnnxRuntimeSection
from maseRT.errors import MissingError
from maseRT.measure import wall_times_ms
from maseRT.onnx_export import INPUT, OUTPUT
from maseRT.onnxrt.forms import Form
from maseRT.onnxrt.kernels import kernels_of
from maseRT.onnxrt.mixed import auto_mixed
from maseRT.onnxrt.providers import PROVIDERS, SessionSettings, parse_device, why_unavailable
from maseRT.onnxrt.quantizers import StaticSettings, optimize, preprocess, quantize_dynamic, quantize_static
from maseRT.records import sha256
from maseRT.report.wording import count
from maseRT.runtimes.onnxruntime import OnnxRuntime
from maseRT.steps.common import Setting, set_up
from maseRT.steps.resume import Finished
from maseRT.steps.table import Context, StepResult
from maseRT.steps.targets import calibration_feeds, write_form
from maseRT.workspace import atomic_path, write_json

HEADER = ("mode", "kernels", "against FP32", "size")
_PROBE_SECONDS = 1.0
_LEAST_PROBES = 5


@dataclass(frozen=True)
class Made:
    """What one mode left.

    Attributes:
        details: what the mode has to say about its model, for the sidecar.
        changes: sentences for people.
    """

    details: dict[str, Any]
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Work:
    """What the modes have in common.

    Attributes:
        device: resolved, never "auto".
        settings: of every session.
    """

    context: Context
    setting: Setting
    section: OnnxRuntimeSection
    device: str
    settings: SessionSettings

    @property
    def form(self) -> str:
        """The target whose form of the quantized model the device likes."""
        return parse_device(self.device)[0].form

    def feeds(self) -> Any:
        """Return the calibration batches."""
        return calibration_feeds(self.context, self.setting, batches=self.section.batches)


def run(context: Context, section: OnnxRuntimeSection) -> StepResult:
    """Make the model of every mode, and say which kernels run it and how far it is from FP32."""
    reason = OnnxRuntime().missing()
    if reason:
        raise MissingError(reason, where="onnxruntime")
    setting = set_up(context)
    device, chosen = _choose_device(context, setting, section)
    work = Work(context, setting, section, device, session_settings(context, section))
    workspace = context.workspace
    finished = Finished(workspace.unfinished("onnxruntime"), key={**context.key, "device": device}, step="onnxruntime")
    made: dict[str, Any] = {}
    rows: list[tuple[str, ...]] = [HEADER]
    for mode in section.modes:
        made[mode], row = finished.once(
            f"onnxruntime mode {mode}", workspace.onnxrt_model(mode), partial(_make, work, mode)
        )
        write_json(workspace.onnxrt_sidecar(mode), made[mode])
        rows.append(tuple(row))
    summary = {"device": device, "device_chosen": chosen, "modes": made}
    write_json(workspace.onnxruntime, summary)
    finished.clear()
    outputs = [
        path for mode in section.modes for path in (workspace.onnxrt_model(mode), workspace.onnxrt_sidecar(mode))
    ]
    return StepResult(
        headline=f"{workspace.onnxrt}, {count(len(made), 'model')} for {device}" + (f": {chosen}" if chosen else ""),
        outputs=[*outputs, workspace.onnxruntime],
        summary=summary,
        table=rows,
        remarks=[f"{mode}: {change}" for mode in made for change in made[mode]["changes"]],
    )


def session_settings(context: Context, section: OnnxRuntimeSection) -> SessionSettings:
    """Return a section as the sessions want it."""
    return SessionSettings(
        threads=context.threads,
        optimization=section.optimization,
        cuda_graph=section.cuda_graph,
        allow_fallback=section.allow_fallback,
        cache=context.workspace.onnxrt_cache,
        float32=section.openvino_fp32,
    )


def _make(work: Work, mode: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Make one mode's model; returns what its sidecar holds, and the row for the console."""
    path = work.context.workspace.onnxrt_model(mode)
    with work.context.reporter.spinner(f"onnxruntime: {mode}"):
        made = _MODES[mode](work, path)
        kernels = kernels_of(path, work.device, work.settings)
        agreed = _agreement(work, path)
    sidecar = {
        "mode": mode,
        "device": work.device,
        "file": str(path),
        "sha256": sha256(path),
        "bytes": path.stat().st_size,
        "kernels": kernels.as_dict() if kernels else None,
        "agreement_with_fp32": agreed.as_dict(),
        "changes": list(made.changes),
        **made.details,
    }
    described = kernels.describe() if kernels else "compiled by the provider"
    return sidecar, (mode, described, agreed.describe(), f"{path.stat().st_size / 1e6:.2f} MB")


def _optimized(work: Work, out: Path) -> Made:
    with atomic_path(out) as temporary:
        optimize(work.context.workspace.float_onnx, temporary, work.device)
    return Made({"made_from": "float"})


def _static(work: Work, out: Path) -> Made:
    section = work.section
    settings = StaticSettings(
        section.calibrator,
        section.percentile,
        signed=work.form != "onnxruntime-cpu",
        openvino=work.form == "openvino",
    )
    prepared = _preprocessed(work)
    with atomic_path(out) as temporary:
        quantize_static(prepared, temporary, work.feeds(), settings)
    kind = "int8 with zero point 0, float biases" if settings.signed else "uint8"
    if settings.openvino:
        kind += ", uint8 where they are concatenated"
    return Made(
        {"made_from": "float", "calibrator": settings.calibrator, "activations": kind},
        (f"what ONNX Runtime chose is {kind}, with {settings.calibrator} ranges; weights int8 per channel",),
    )


def _dynamic(work: Work, out: Path) -> Made:
    prepared = _preprocessed(work)
    with atomic_path(out) as temporary:
        quantized = quantize_dynamic(prepared, temporary)
    if not quantized:
        return Made({"made_from": "float", "precision": "fp32"}, ("no products, LSTMs or embeddings: it stays FP32",))
    return Made(
        {"made_from": "float"},
        ("weights of products, LSTMs and embeddings are int8; what products read is uint8, by each batch's range",),
    )


def _auto_mixed(work: Work, out: Path) -> Made:
    section = work.section
    feed = next(iter(work.feeds()))
    model, mixed = auto_mixed(
        onnx.load(work.context.workspace.float_onnx),
        [feed],
        rtol=section.rtol,
        atol=section.atol,
        keep_io_types=section.keep_io_types,
    )
    with atomic_path(out) as temporary:
        temporary.write_bytes(model.SerializeToString(deterministic=True))
    details = {
        "made_from": "float",
        "fp16_nodes": mixed.half,
        "fp32_nodes": list(mixed.kept),
        "untried": mixed.untried,
        "trials": mixed.trials,
    }
    changes = [f"{mixed.half} nodes in FP16, {len(mixed.kept)} in FP32"]
    if mixed.untried:
        changes.append(f"{mixed.untried} of the FP32 nodes could not be tried apart in {mixed.trials} trials")
    if mixed.half and parse_device(work.device)[0].device == "cpu":
        changes.append("ONNX Runtime's CPU kernels compute FP16 in FP32: a smaller file, not a faster model")
    return Made(details, tuple(changes))


def _qdq(work: Work, out: Path) -> Made:
    form: Form = write_form(
        work.context,
        work.setting,
        target=work.form,
        source=work.context.workspace.onnx,
        out=out,
        batches=work.section.batches,
    )
    return Made({"made_from": "quantized", "form": work.form, **form.as_dict()}, tuple(form.changes()))


_MODES: dict[str, Callable[[Work, Path], Made]] = {
    "optimized": _optimized,
    "static": _static,
    "dynamic": _dynamic,
    "auto-mixed": _auto_mixed,
    "qdq": _qdq,
}


def _preprocessed(work: Work) -> Path:
    """Return the float model as ONNX Runtime's quantizers need it, written once per run of the step."""
    path = work.context.workspace.onnxrt_model("pre_processed")
    source = work.context.workspace.float_onnx
    if not path.exists() or path.stat().st_mtime_ns < source.stat().st_mtime_ns:
        with atomic_path(path) as temporary:
            preprocess(source, temporary)
    return path


def _agreement(work: Work, path: Path) -> Agreement:
    """Compare a model on the device with the float one on the CPU, on one validation batch."""
    sample = next(iter(work.setting.batches(work.context, "validation")))[0].numpy()
    runtime = OnnxRuntime()
    with runtime.open(work.context.workspace.float_onnx, "cpu", threads=work.context.threads) as session:
        expected = session.infer({INPUT: sample})[OUTPUT]
    # Replaying CUDA graphs needs inputs that stay in one place.
    with runtime.open(path, work.device, settings=replace(work.settings, cuda_graph=False)) as session:
        return agreement(expected, session.infer({INPUT: sample})[OUTPUT], classes=work.setting.task.classes)


def _choose_device(context: Context, setting: Setting, section: OnnxRuntimeSection) -> tuple[str, str]:
    """Return the device and, where it was chosen here, why.

    Raises:
        MissingError: the device that the config names cannot run here.
    """
    if section.device != "auto":
        reason = why_unavailable(section.device)
        if reason:
            raise MissingError(reason, where=f"[onnxruntime] device = {section.device}", fix='use device = "auto"')
        return section.device, ""
    if context.device.startswith("cuda") and why_unavailable(context.device) is None:
        return context.device, "auto, a GPU is there"
    reason = why_unavailable("openvino")
    if reason:
        return "cpu", f"auto, without OpenVINO: {reason}"
    return _faster(context, setting, section)


def _faster(context: Context, setting: Setting, section: OnnxRuntimeSection) -> tuple[str, str]:
    """Run the quantized model for a second in ONNX Runtime's CPU provider and in OpenVINO, each in its own form."""
    sample = next(iter(setting.batches(context, "validation")))[0][:1].numpy()
    settings = session_settings(context, section)
    times: dict[str, float] = {}
    for device in ("cpu", "openvino"):
        path = context.workspace.onnxrt_probe(device)
        target = PROVIDERS[device].form
        source = context.workspace.onnx
        write_form(context, setting, target=target, source=source, out=path, batches=section.batches)
        with OnnxRuntime().open(path, device, settings=settings) as session:
            times[device] = _milliseconds(partial(session.infer, {INPUT: sample}))
        path.unlink()
    best = min(times, key=lambda device: times[device])
    measured = ", ".join(f"{device} {ms:.2f} ms" for device, ms in times.items())
    return best, f"auto, measured at batch 1: {measured}"


def _milliseconds(call: Callable[[], object]) -> float:
    """Return the median time of a call over about a second."""

    def until_done() -> Iterator[int]:
        start = time.perf_counter()
        count = 0
        while count < _LEAST_PROBES or time.perf_counter() - start < _PROBE_SECONDS:
            yield count
            count += 1

    return median(wall_times_ms(call, warmup=3, iterations=until_done()))
