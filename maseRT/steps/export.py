"""export: the quantized model and its float baseline as ONNX files, each checked against torch."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor, nn

from maseRT.agreement import Agreement, agreement
from maseRT.errors import CheckError, UsageError
from maseRT.onnx_export import INPUT, OUTPUT, export_onnx
from maseRT.onnx_graph import count_qdq
from maseRT.quant.quantizer import quantizers
from maseRT.runtimes.onnxruntime import OnnxRuntime, Optimization
from maseRT.steps.common import Setting, load_float_weights, rebuild_final, set_up
from maseRT.steps.table import Context, StepResult
from maseRT.workspace import atomic_path, write_json

log = logging.getLogger(__name__)

MIN_SQNR_DB = 30.0
MIN_AGREEMENT = 0.99
"""What ONNX Runtime's logits must reach against torch's: the same computation up to a rounding here and there."""


def run(context: Context) -> StepResult:
    """Export both models, compare them with torch in ONNX Runtime, and count the Q/DQ pairs."""
    section = context.config.export
    if section is None:
        raise UsageError("the config has no [export] section")
    workspace = context.workspace
    setting = set_up(context)
    sample = _sample(setting, context)
    load_float_weights(context, setting.model)
    checks = {"float": _export(context, setting.model, workspace.float_onnx, section.opset, sample)}
    model, _ = rebuild_final(context, setting)
    checks["quantized"] = _export(context, model, workspace.onnx, section.opset, sample)
    pairs = _check_pairs(workspace.onnx, model)
    summary = {
        "onnx_path": str(workspace.onnx),
        "opset": section.opset,
        "qdq_pairs": pairs,
        "checks": {name: {level: a.as_dict() for level, a in found.items()} for name, found in checks.items()},
    }
    write_json(workspace.export, summary)
    return StepResult(
        headline=f"{workspace.onnx}, opset {section.opset}, {pairs} Q/DQ pairs{_described(checks['quantized'])}",
        outputs=[workspace.onnx, workspace.float_onnx, workspace.export],
        summary=summary,
    )


def _sample(setting: Setting, context: Context) -> Tensor:
    """Return one batch of the validation set."""
    batch: Tensor = next(iter(setting.batches(context, "validation")))[0]
    return batch


def _export(context: Context, model: nn.Module, path: Path, opset: int, sample: Tensor) -> dict[str, Agreement]:
    """Export one model; the file appears only after it passed its checks."""
    model.eval().cpu()
    with torch.inference_mode():
        reference = model(sample)
    with context.reporter.spinner(f"export: {path.name}"), atomic_path(path) as temporary:
        export_onnx(model, sample[:2], temporary, opset=opset)
        return _compare(temporary, sample, reference, path, threads=context.threads)


def _compare(file: Path, sample: Tensor, reference: Tensor, path: Path, *, threads: int) -> dict[str, Agreement]:
    """Run an exported file in ONNX Runtime, with and without its optimizations.

    Raises:
        CheckError: it does not compute what the torch model computes.
    """
    runtime = OnnxRuntime()
    why_not = runtime.missing()
    if why_not:
        log.warning("%s was not compared with torch: %s", path.name, why_not)
        return {}
    found: dict[str, Agreement] = {}
    levels: tuple[Optimization, ...] = ("disabled", "all")
    for level in levels:
        with runtime.open(file, "cpu", threads=threads, optimization=level) as session:
            logits = session.infer({INPUT: sample.numpy()})[OUTPUT]
        found[level] = agreement(reference.numpy(), logits)
        _require(found[level], path, level)
    return found


def _require(found: Agreement, path: Path, level: str) -> None:
    if found.label_agreement < MIN_AGREEMENT or (found.sqnr_db is not None and found.sqnr_db < MIN_SQNR_DB):
        raise CheckError(
            f"ONNX Runtime (optimizations: {level}) gives other answers than torch: {_agreed(found)}",
            where=str(path),
            fix="this is a fault of the export, please report it; [quantize] rules can keep single layers in float",
        )


def _check_pairs(path: Path, model: nn.Module) -> int:
    """Return the number of Q/DQ pairs.

    Raises:
        CheckError: it is not the number of the model's quantizers that were reached.
    """
    pairs = count_qdq(path)
    expected = len(quantizers(model))
    if pairs < expected:
        raise CheckError(f"{pairs} Q/DQ pairs, but the plan has {expected} quantized tensors", where=str(path))
    return pairs


def _described(found: dict[str, Agreement]) -> str:
    return f", ONNX Runtime against torch: {_agreed(found['all'])}" if found else ", not compared with torch"


def _agreed(found: Agreement) -> str:
    sqnr = "equal" if found.sqnr_db is None else f"SQNR {found.sqnr_db:.0f} dB"
    return f"{found.label_agreement:.1%} same labels, {sqnr}"
