"""The quantized model in the form that each target likes best; several steps write such files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import onnx
from onnx import ModelProto

from maseRT.data.loading import calibration_subset, loader
from maseRT.errors import StepError
from maseRT.onnx_export import INPUT
from maseRT.onnx_widen import widen
from maseRT.onnxrt.forms import Form, cpu_form, openvino_form
from maseRT.onnxrt.quantizers import Feed
from maseRT.onnxrt.ranges import measure_ranges
from maseRT.onnxrt.unsigned import Range
from maseRT.steps.common import Setting
from maseRT.steps.table import Context
from maseRT.workspace import atomic_path


def calibration_feeds(context: Context, setting: Setting, *, batches: int) -> Iterator[Feed]:
    """Yield the fixed calibration subset of the training data, as `calibrate` draws it."""
    config = context.config
    samples = batches * config.data.batch_size
    subset = calibration_subset(setting.splits, samples=samples, seed=config.run.seed)
    for inputs, _ in loader(subset, batch_size=config.data.batch_size):
        yield {INPUT: inputs.numpy()}


def write_form(context: Context, setting: Setting, *, target: str, source: Path, out: Path, batches: int) -> Form:
    """Write an exported model in a target's form; the file appears only after the ONNX checker passed it.

    Args:
        context: of the step.
        setting: whose data ranges are measured on, where the plan has none.
        target: "tensorrt" (the exported model itself), "onnxruntime-cpu" or "openvino".
        source: the exported model.
        out: the file.
        batches: calibration batches.

    Raises:
        StepError: the checker refuses the result.
    """

    def ranges_of(model: ModelProto, tensors: Sequence[str]) -> dict[str, Range]:
        feeds = calibration_feeds(context, setting, batches=batches)
        return measure_ranges(model, tensors, feeds, threads=context.threads)

    model, form = onnx.load(source), Form()
    halves = target != "tensorrt" and _has_halves(model)
    if halves:  # CPUs compute half no faster, and their integer kernels want FP32 scales
        widen(model)
    if target == "onnxruntime-cpu":
        model, form = cpu_form(model, ranges_of)
    elif target == "openvino":
        model, form = openvino_form(model, ranges_of)
    form = replace(form, widened=halves)
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:
        raise StepError(f"the ONNX checker refuses the {target} form: {error}", where=str(out)) from error
    with atomic_path(out) as temporary:
        temporary.write_bytes(model.SerializeToString(deterministic=True))
    return form


def _has_halves(model: ModelProto) -> bool:
    casts = (a.i for node in model.graph.node if node.op_type == "Cast" for a in node.attribute if a.name == "to")
    return onnx.TensorProto.FLOAT16 in {*casts, *(tensor.data_type for tensor in model.graph.initializer)}
