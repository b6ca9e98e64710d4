"""The least and the greatest value of tensors inside an ONNX model, measured on data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper

from maseRT.errors import StepError

Array = np.ndarray[Any, Any]
_EXTREMES = ("ReduceMin", "ReduceMax")


def measure_ranges(
    model: ModelProto, tensors: Sequence[str], feeds: Iterable[Mapping[str, Array]], *, threads: int | None = None
) -> dict[str, tuple[float, float]]:
    """Run batches through a model in ONNX Runtime and return each tensor's extremes.

    Args:
        model: not changed.
        tensors: names of float tensors in it.
        feeds: one mapping from input name to array per batch.
        threads: CPU threads; None: all cores.

    Raises:
        StepError: a value is not finite, or there is no batch.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    # Beyond "basic" the tensors asked for keep whole chains of kernels from fusing, which is slower than not trying.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    probed = _probed(model, tensors)
    session = ort.InferenceSession(probed.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [f"{tensor}::{op}" for tensor in tensors for op in _EXTREMES]
    batches = [np.array(session.run(names, dict(feed)), np.float64) for feed in feeds]
    if not batches:
        raise StepError("there is no calibration data", where="onnxruntime")
    values = np.stack(batches).reshape(len(batches), len(tensors), 2)
    low, high = values[:, :, 0].min(axis=0), values[:, :, 1].max(axis=0)
    for tensor, ends in zip(tensors, zip(low, high, strict=True), strict=True):
        if not np.isfinite(ends).all():
            raise StepError("NaN or infinite values on the calibration data", where=tensor)
    return {tensor: (float(a), float(b)) for tensor, a, b in zip(tensors, low, high, strict=True)}


def _probed(model: ModelProto, tensors: Sequence[str]) -> ModelProto:
    """Return a copy whose outputs are the extremes of the tensors."""
    probed = ModelProto()
    probed.CopyFrom(model)
    del probed.graph.output[:]
    for tensor in tensors:
        for op in _EXTREMES:
            name = f"{tensor}::{op}"
            probed.graph.node.append(helper.make_node(op, [tensor], [name], name=name, keepdims=0))
            probed.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, []))
    return probed
