"""export: the quantized model and its float baseline as ONNX files, each checked against torch."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor, nn

from maseRT.agreement import Agreement, agreement
from maseRT.errors import CheckError, UsageError
from maseRT.onnx_export import export_onnx
from maseRT.onnx_graph import count_qdq
from maseRT.quant.quantizer import quantizers
from maseRT.runtimes import get_runtime
from maseRT.steps.common import Setting, load_float_weights, rebuild, set_up
from maseRT.steps.table import STEPS, Context, StepResult, final_checkpoint, final_plan, made_by
from maseRT.workspace import atomic_path, write_json

log = logging.getLogger(__name__)

EXACT = 1e-4
"""Largest relative error of ONNX Runtime, its optimizations off, against the fake-quantized model."""


def run(context: Context) -> StepResult:
    """Export both models, compare them with torch in ONNX Runtime, and count the Q/DQ pairs."""
    section = context.config.export
    if section is None:
        raise UsageError("the config has no [export] section")
    workspace = context.workspace
    setting = set_up(context)
    load_float_weights(context, setting.model)
    sample = next(iter(setting.batches(context, "validation")))[0]
    float_check = _export(context, setting, setting.model, workspace.float_onnx, section.opset, sample)
    checkpoint = final_checkpoint(context.config, workspace)
    model, plan = rebuild(
        context,
        setting,
        final_plan(context.config, workspace),
        checkpoint,
        made_by=made_by(workspace)[checkpoint],
    )
    check = _export(context, setting, model, workspace.onnx, section.opset, sample)
    pairs = _check_pairs(workspace.onnx, model)
    summary = {
        "onnx_path": str(workspace.onnx),
        "opset": section.opset,
        "qdq_pairs": pairs,
        "checks": {"float": float_check, "quantized": check},
    }
    write_json(workspace.export, summary)
    return StepResult(
        headline=f"{workspace.onnx}, opset {section.opset}, {pairs} Q/DQ pairs{_described(check)}",
        outputs=[workspace.onnx, workspace.float_onnx, workspace.export],
        summary=summary,
    )
