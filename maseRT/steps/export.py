"""export: the quantized model and its float baseline as ONNX files, each checked against torch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from maseRT.agreement import Agreement, agreement
from maseRT.config import CalibrateSection, ExportSection
from maseRT.errors import CheckError
from maseRT.onnx_export import INPUT, OUTPUT, export_onnx, other_size
from maseRT.onnx_graph import count_qdq
from maseRT.onnxrt.providers import Optimization, why_no_kernels
from maseRT.plan import Plan
from maseRT.quant.quantizer import quantizers
from maseRT.runtimes.onnxruntime import OnnxRuntime
from maseRT.steps.common import Setting, load_float_weights, rebuild_final, set_up
from maseRT.steps.resume import Finished
from maseRT.steps.table import Context, StepResult
from maseRT.steps.targets import write_form
from maseRT.workspace import atomic_path, write_json

log = logging.getLogger(__name__)

Logits = NDArray[np.float32]

MIN_SQNR_DB = 30.0
"""What ONNX Runtime's logits must reach against torch's: the same computation up to a rounding here and there.

Where quantization itself costs more than that, its own SQNR is the bar: roundings that fall on the other side are worth
a step each, as quantization is.
"""

_IMAGES_OF_OTHER_SIZE = 8


@dataclass(frozen=True)
class Work:
    """What the files have in common.

    Attributes:
        sample: one batch of the validation set.
    """

    context: Context
    section: ExportSection
    setting: Setting
    sample: Tensor

    def export(self, model: nn.Module, path: Path, reference: Logits, floor_db: float) -> dict[str, Any]:
        """Export one model, and say how far each level of optimization is from it; the file appears when it passed."""
        dynamic = self.section.dynamic
        with self.context.reporter.spinner(f"export: {path.name}"), atomic_path(path) as temporary:
            conditions = export_onnx(model, self.sample[:2], temporary, opset=self.section.opset, dynamic=dynamic)
            if conditions:
                log.warning("%s is right only for images where %s", path.name, conditions)
            found = self.compare(temporary, self.sample, reference)
            _require(found, path, floor_db)
            if {"height", "width"} & set(dynamic):
                images = other_size(self.sample[:_IMAGES_OF_OTHER_SIZE], dynamic)
                elsewhere = self.compare(temporary, images, _logits(model, images))
                _require(elsewhere, path, floor_db)
                found |= {f"{level}, images of another size": agreed for level, agreed in elsewhere.items()}
            return {level: agreed.as_dict() for level, agreed in found.items()}

    def write_target(self, target: str, float_logits: Logits) -> dict[str, Any]:
        """Write the quantized model in a target's form; return what differs, and how far it is from the float model."""
        context, workspace = self.context, self.context.workspace
        path = workspace.target_onnx(target)
        batches = (context.config.calibrate or CalibrateSection()).batches
        # Without kernels no ranges can be measured of it, and none of its forms would run.
        as_exported = why_no_kernels(workspace.onnx, "cpu") is not None
        form_of = "tensorrt" if as_exported else target
        with context.reporter.spinner(f"export: {path.name}"):
            form = write_form(context, self.setting, target=form_of, source=workspace.onnx, out=path, batches=batches)
        found = self.compare(path, self.sample, float_logits)
        told = form.as_dict()
        if as_exported:
            told |= {"changes": ["none, it is the exported model: it computes in BF16"]}
        return {
            "path": str(path),
            **told,
            "agreement_with_float": {level: agreed.as_dict() for level, agreed in found.items()},
        }

    def compare(self, file: Path, sample: Tensor, reference: Logits) -> dict[str, Agreement]:
        """Run an exported file in ONNX Runtime, with and without its optimizations."""
        runtime = OnnxRuntime()
        why_not = runtime.missing() or why_no_kernels(file, "cpu")
        if why_not:
            log.warning("not compared with torch: %s", why_not)
            return {}
        found: dict[str, Agreement] = {}
        levels: tuple[Optimization, ...] = ("disabled", "all")
        for level in levels:
            with runtime.open(file, "cpu", threads=self.context.threads, optimization=level) as session:
                output = session.infer({INPUT: sample.numpy()})[OUTPUT]
                found[level] = agreement(reference, output, classes=self.setting.task.classes)
        return found


def run(context: Context, section: ExportSection) -> StepResult:
    """Export both models, compare them with torch in ONNX Runtime, and count the Q/DQ pairs."""
    workspace = context.workspace
    setting = set_up(context)
    sample: Tensor = next(iter(setting.batches(context, "validation")))[0]
    work = Work(context, section, setting, sample)
    load_float_weights(context, setting.model)
    float_logits = _logits(setting.model, sample)
    finished = Finished(workspace.unfinished("export"), key=context.key, step="export")

    def export(model: nn.Module, path: Path, reference: Logits, floor_db: float) -> dict[str, Any]:
        return finished.once(f"export of {path.name}", path, lambda: work.export(model, path, reference, floor_db))

    checks = {"float": export(setting.model, workspace.float_onnx, float_logits, MIN_SQNR_DB)}
    model, plan = rebuild_final(context, setting.model)
    logits = _logits(model, sample)
    quantization_db = agreement(float_logits, logits, classes=False).sqnr_db
    floor_db = MIN_SQNR_DB if quantization_db is None else min(MIN_SQNR_DB, quantization_db)
    checks["quantized"] = export(model, workspace.onnx, logits, floor_db)
    pairs = _check_pairs(workspace.onnx, plan, model, sample)
    targets = {
        target: finished.once(
            f"export for {target}", workspace.target_onnx(target), partial(work.write_target, target, float_logits)
        )
        for target in section.targets
        if target != "tensorrt"
    }
    summary = {
        "onnx_path": str(workspace.onnx),
        "opset": section.opset,
        "qdq_pairs": pairs,
        "checks": checks,
        "targets": targets,
    }
    write_json(workspace.export, summary)
    finished.clear()
    return StepResult(
        headline=f"{workspace.onnx}, opset {section.opset}, {pairs} Q/DQ pairs{_described(checks['quantized'])}",
        outputs=[
            workspace.onnx,
            workspace.float_onnx,
            *(workspace.target_onnx(target) for target in targets),
            workspace.export,
        ],
        summary=summary,
        remarks=[f"{target}: {change}" for target, told in targets.items() for change in told["changes"]],
    )


def _logits(model: nn.Module, sample: Tensor) -> Logits:
    model.eval().cpu()
    with torch.inference_mode():
        logits: Logits = model(sample).numpy()
    return logits


def _require(found: Mapping[str, Agreement], path: Path, floor_db: float) -> None:
    """Check that a file computes what the torch model computes.

    The file itself is judged without ONNX Runtime's optimizations: those round in other places, and quantize biases,
    which no other runtime does.

    Raises:
        CheckError: it does not.
    """
    low = {level for level, agreed in found.items() if agreed.sqnr_db is not None and agreed.sqnr_db < floor_db}
    if "disabled" in low:
        raise CheckError(
            f"the file gives other answers in ONNX Runtime than the model in torch: {found['disabled'].describe()}",
            where=str(path),
            fix="this is a fault of the export, please report it; [quantize] rules can keep single layers in float",
        )
    if "all" in low:
        log.warning(
            "%s: ONNX Runtime's optimizations change its answers (%s); other runtimes are not concerned",
            path.name,
            found["all"].describe(),
        )


def _check_pairs(path: Path, plan: Plan, model: nn.Module, sample: Tensor) -> int:
    """Return the number of Q/DQ pairs: one for each time a quantizer runs, or one for several of the same tensor, which
    may be that of a tie or a weight that layers share.

    Raises:
        CheckError: the file has more or fewer.
    """
    pairs, most = count_qdq(path), _quantizer_calls(model, sample)
    weights = [weight for module in model.modules() for weight in module.parameters(recurse=False)]
    shared = len(weights) - len(set(weights))
    least = len(quantizers(model)) - sum(len(tie) - 1 for tie in plan.ties) - shared
    if not least <= pairs <= most:
        raise CheckError(f"{pairs} Q/DQ pairs, but quantizers run {most} times in the model", where=str(path))
    return pairs


def _quantizer_calls(model: nn.Module, sample: Tensor) -> int:
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    hooks = [quantizer.register_forward_hook(count) for quantizer in quantizers(model).values()]
    try:
        with torch.inference_mode():
            model(sample[:1])
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _described(found: Mapping[str, Any]) -> str:
    if not found:
        return ", not compared with torch"
    return f", ONNX Runtime against torch: {Agreement(**found['all']).describe()}"
