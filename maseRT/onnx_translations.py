"""ONNX forms of the torch operators that the exporter drops an argument of, or does not know in all their forms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return what `torch.onnx.export` takes as `custom_translation_table`."""
    from onnxscript.function_libs.torch_lib.ops import nn as known

    aten = torch.ops.aten
    return {
        aten.avg_pool2d.default: _average_pool(known.aten_avg_pool2d),
        aten.avg_pool3d.default: _average_pool(known.aten_avg_pool3d),
        aten._adaptive_avg_pool3d.default: _adaptive_avg_pool,
        aten.rrelu_with_noise_functional.default: _rrelu,
        aten.celu.default: _celu(known.aten_celu),
        aten.threshold.default: _threshold,
        aten.upsample_linear1d.vec: known.aten_upsample_bilinear2d_vec,  # a Resize of any number of dimensions
    }


def _average_pool(average_pool: Callable[..., Any]) -> Callable[..., Any]:
    """Return a translation that minds divisor_override, which the exporter's own drops without a word.

    Where nothing is padded, padding counts, which makes no difference but to TensorRT-RTX: else it has no INT8 kernel.
    """

    def translate(
        self: Any,
        kernel_size: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] = (0,),
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Any:
        from onnxscript import opset18 as op

        if not any(padding) and not ceil_mode:
            count_include_pad = True
        if divisor_override is None:
            return average_pool(self, kernel_size, stride, padding, ceil_mode, count_include_pad)
        if ceil_mode:
            raise NotImplementedError("divisor_override together with ceil_mode")
        mean = average_pool(self, kernel_size, stride, padding, ceil_mode, True)
        factor: Any = op.Constant(value_float=math.prod(kernel_size) / divisor_override)
        return op.Mul(mean, op.CastLike(factor, mean))

    return translate


def plain_pools(program: ExportedProgram) -> None:
    """Make adaptive pools in which each output is of as many inputs plain ones, in place.

    The exporter takes average pools apart, and computes in FP32 what is in half; of max pools it knows none before
    torch 2.13. Average pools over everything are means, and stay.
    """
    aten = torch.ops.aten
    averages = {
        aten.adaptive_avg_pool1d.default: aten.avg_pool1d.default,
        aten.adaptive_avg_pool2d.default: aten.avg_pool2d.default,
    }
    maxima = {
        aten.adaptive_max_pool1d.default: aten.max_pool1d_with_indices.default,
        aten.adaptive_max_pool2d.default: aten.max_pool2d_with_indices.default,
        aten.adaptive_max_pool3d.default: aten.max_pool3d_with_indices.default,
    }
    plain = averages | maxima
    for node in program.graph.nodes:
        if node.target in plain:
            x, output_size = node.args
            sizes = list(x.meta["val"].shape)[-len(output_size) :]
            is_mean = node.target in averages and all(out == 1 for out in output_size)
            if _divides(sizes, output_size) and not is_mean:
                kernel = [size // out for size, out in zip(sizes, output_size, strict=True)]
                node.target, node.args = plain[node.target], (x, kernel, kernel)


def attention_with_heads(program: ExportedProgram) -> None:
    """Give attention over [N, L, E] a dimension of one head, in place: the exporter only knows [N, heads, L, E]."""
    aten = torch.ops.aten
    graph = program.graph
    for node in list(graph.nodes):
        if node.target is not aten.scaled_dot_product_attention.default or node.args[0].meta["val"].dim() != 3:
            continue
        with graph.inserting_before(node):
            operands = [graph.call_function(aten.unsqueeze.default, (each, 0)) for each in node.args[:3]]
        for operand, each in zip(operands, node.args[:3], strict=True):
            operand.meta = {**node.meta, "val": each.meta["val"].unsqueeze(0)}
        node.args = (*operands, *node.args[3:])  # a mask [L, S] or [N, L, S] fits as it is
        with graph.inserting_after(node):
            result = graph.call_function(aten.squeeze.dim, (node, 0))
        node.replace_all_uses_with(result, delete_user_cb=lambda user, result=result: user is not result)
        program.graph_signature.replace_all_uses(node.name, result.name)
        result.meta, node.meta = node.meta, {**node.meta, "val": node.meta["val"].unsqueeze(0)}


def _divides(sizes: Sequence[Any], output_size: Sequence[Any]) -> bool:
    """Whether sizes, which may be symbols, are multiples of those of the output."""
    pairs = list(zip(sizes, output_size, strict=True))
    return all(isinstance(size, int) and isinstance(out, int) and size % out == 0 for size, out in pairs)


def _adaptive_avg_pool(self: Any, output_size: Sequence[int]) -> Any:
    """Translate the case in which every output averages as many inputs: it is a plain AveragePool."""
    from onnxscript import opset18 as op

    dims = len(output_size)
    sizes = list(self.shape)[-dims:]
    if not _divides(sizes, output_size):
        raise NotImplementedError(
            f"an adaptive {dims}-d pool from {sizes} to {list(output_size)}, which does not divide it"
        )
    kernel = [size // out for size, out in zip(sizes, output_size, strict=True)]
    return op.AveragePool(self, kernel_shape=kernel, strides=kernel, count_include_pad=1)  # as in `_average_pool`


def _rrelu(
    self: Any, noise: Any, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, generator: Any = None
) -> Any:
    """Translate RReLU in eval mode, where its slope is the mean of what it is drawn from."""
    from onnxscript import opset18 as op

    return op.LeakyRelu(self, alpha=(lower + upper) / 2), noise


def _celu(in_fp32: Callable[..., Any]) -> Callable[..., Any]:
    """Return a translation that computes in the input's type; ONNX has Celu in FP32 alone."""

    def translate(self: Any, alpha: float = 1.0) -> Any:
        from onnxscript import FLOAT
        from onnxscript import opset18 as op

        if self.dtype == FLOAT.dtype:
            return in_fp32(self, alpha)
        if alpha == 1:
            return op.Elu(self)
        factor = _like(self, alpha)
        return op.Where(op.Greater(self, _like(self, 0.0)), self, op.Mul(op.Elu(op.Div(self, factor)), factor))

    return translate


def _threshold(self: Any, threshold: float, value: float) -> Any:
    """Translate Threshold in the input's type."""
    from onnxscript import opset18 as op

    return op.Where(op.LessOrEqual(self, _like(self, threshold)), _like(self, value), self)


def _like(tensor: Any, value: float) -> Any:
    """Return a constant of a tensor's type."""
    from onnxscript import opset18 as op

    constant: Any = op.Constant(value_float=float(value))
    return op.CastLike(constant, tensor)
