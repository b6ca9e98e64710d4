"""ONNX forms of the torch operators that the exporter drops an argument of, or does not know."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return what `torch.onnx.export` takes as `custom_translation_table`."""
    from onnxscript.function_libs.torch_lib.ops import nn as known

    aten = torch.ops.aten
    return {
        aten.avg_pool2d.default: _with_divisor(known.aten_avg_pool2d),
        aten.avg_pool3d.default: _with_divisor(known.aten_avg_pool3d),
        aten._adaptive_avg_pool3d.default: _adaptive_avg_pool3d,
        aten.rrelu_with_noise_functional.default: _rrelu,
    }


def _with_divisor(average_pool: Callable[..., Any]) -> Callable[..., Any]:
    """Return a translation that minds divisor_override, which the exporter's own drops without a word."""

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

        if divisor_override is None:
            return average_pool(self, kernel_size, stride, padding, ceil_mode, count_include_pad)
        if ceil_mode:
            raise NotImplementedError("divisor_override together with ceil_mode")
        mean = average_pool(self, kernel_size, stride, padding, ceil_mode, True)
        factor: Any = op.Constant(value_float=math.prod(kernel_size) / divisor_override)
        return op.Mul(mean, op.CastLike(factor, mean))

    return translate


def _adaptive_avg_pool3d(self: Any, output_size: Sequence[int]) -> Any:
    """Translate the case in which every output averages as many inputs: it is a plain AveragePool."""
    from onnxscript import opset18 as op

    sizes = list(self.shape)[-3:]
    if any(not isinstance(size, int) or size % out for size, out in zip(sizes, output_size, strict=True)):
        raise NotImplementedError(f"an adaptive 3-d pool from {sizes} to {list(output_size)}, which does not divide it")
    kernel = [size // out for size, out in zip(sizes, output_size, strict=True)]
    return op.AveragePool(self, kernel_shape=kernel, strides=kernel)


def _rrelu(
    self: Any, noise: Any, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, generator: Any = None
) -> Any:
    """Translate RReLU in eval mode, where its slope is the mean of what it is drawn from."""
    from onnxscript import opset18 as op

    return op.LeakyRelu(self, alpha=(lower + upper) / 2), noise
