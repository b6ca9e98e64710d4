"""ONNX forms of the torch operators that the exporter drops an argument of, or does not know."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram


def translations(program: ExportedProgram) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return what `torch.onnx.export` takes as `custom_translation_table` for a program."""
    from onnxscript.function_libs.torch_lib.ops import nn as known

    aten = torch.ops.aten
    table: dict[Callable[..., Any], Callable[..., Any]] = {
        aten.avg_pool2d.default: _average_pool(known.aten_avg_pool2d),
        aten.avg_pool3d.default: _average_pool(known.aten_avg_pool3d),
        aten._adaptive_avg_pool3d.default: _adaptive_avg_pool,
        aten.rrelu_with_noise_functional.default: _rrelu,
    }
    if _adaptive_pools_divide(program):  # else the exporter takes them apart, and computes in FP32 what is in half
        table[aten._adaptive_avg_pool2d.default] = _adaptive_avg_pool
    return table


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


def _adaptive_pools_divide(program: ExportedProgram) -> bool:
    """Whether in every adaptive average pool of one or two dimensions each output averages as many inputs."""
    aten = torch.ops.aten
    pools = (aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default)
    calls = (node for node in program.graph.nodes if node.target in pools)
    return all(_divides(list(call.args[0].meta["val"].shape)[-len(call.args[1]) :], call.args[1]) for call in calls)


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
