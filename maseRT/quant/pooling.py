"""Twins of the pooling layers: a quantized input keeps a chain of INT8 layers together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from maseRT.quant.operand import Operand
from maseRT.quant.quantizer import Quantizer

MAX_POOLS = (
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
)
AVERAGE_POOLS = (
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
)
POOLS = (*MAX_POOLS, *AVERAGE_POOLS)
"""The pooling layers of torch.nn that can be INT8."""

_MAX_SETTINGS = "kernel_size stride padding dilation ceil_mode return_indices"
_AVERAGE_SETTINGS = "kernel_size stride padding ceil_mode count_include_pad divisor_override"
_ADAPTIVE_SETTINGS = "output_size return_indices"
_FUNCTIONS: dict[str, tuple[type[nn.Module], str]] = {
    "max_pool1d": (nn.MaxPool1d, _MAX_SETTINGS),
    "max_pool2d": (nn.MaxPool2d, _MAX_SETTINGS),
    "max_pool3d": (nn.MaxPool3d, _MAX_SETTINGS),
    "adaptive_max_pool1d": (nn.AdaptiveMaxPool1d, _ADAPTIVE_SETTINGS),
    "adaptive_max_pool2d": (nn.AdaptiveMaxPool2d, _ADAPTIVE_SETTINGS),
    "adaptive_max_pool3d": (nn.AdaptiveMaxPool3d, _ADAPTIVE_SETTINGS),
    "avg_pool1d": (nn.AvgPool1d, _AVERAGE_SETTINGS),
    "avg_pool2d": (nn.AvgPool2d, _AVERAGE_SETTINGS),
    "avg_pool3d": (nn.AvgPool3d, _AVERAGE_SETTINGS),
    "adaptive_avg_pool1d": (nn.AdaptiveAvgPool1d, _ADAPTIVE_SETTINGS),
    "adaptive_avg_pool2d": (nn.AdaptiveAvgPool2d, _ADAPTIVE_SETTINGS),
    "adaptive_avg_pool3d": (nn.AdaptiveAvgPool3d, _ADAPTIVE_SETTINGS),
}
"""Pooling functions, each with the layer that does the same and the order of its own settings."""

_ADAPTIVE_AVERAGES = {nn.AdaptiveAvgPool1d: 1, nn.AdaptiveAvgPool2d: 2, nn.AdaptiveAvgPool3d: 3}
"""The adaptive average pools and their numbers of dimensions."""

Shapes = tuple[tuple[int, ...], tuple[int, ...]]
"""Of what one call reads and what it writes."""

_NO_KERNEL = "TensorRT 8.6 has no kernel for INT8 3-D max pools, and TensorRT-RTX runs them in float"
_RUNS_IN_FLOAT = "TensorRT-RTX runs 1-D and 3-D average pools in float"
_DIVIDES = "TensorRT-RTX runs an average pool in float that does not divide by the size of its window, padding included"
_UNEQUAL = "TensorRT-RTX runs an average pool in float whose outputs average unequal numbers of inputs"
_WITHOUT_KERNEL = {
    nn.MaxPool3d: _NO_KERNEL,
    nn.AdaptiveMaxPool3d: _NO_KERNEL,
    nn.AvgPool1d: _RUNS_IN_FLOAT,
    nn.AvgPool3d: _RUNS_IN_FLOAT,
    nn.AdaptiveAvgPool1d: _RUNS_IN_FLOAT,
    nn.AdaptiveAvgPool3d: _RUNS_IN_FLOAT,
}


def pool_of(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module | None:
    """Return the layer that does what a call of a pooling function does, or None for any other function.

    Args:
        op: the function's name, see `maseRT.quant.operations.operation_name`.
        args: its arguments, tensors among them or anything in their place.
        kwargs: its keyword arguments.
    """
    if op not in _FUNCTIONS:
        return None
    layer, names = _FUNCTIONS[op]
    settings = dict(zip(["input", *names.split()], args, strict=False)) | kwargs
    settings.pop("input", None)
    return layer(**settings)


def without_kernel(layer: nn.Module, shapes: Iterable[Shapes] = ()) -> str | None:
    """Say of a pool for which TensorRT has no INT8 kernel what comes of that; None for any other layer.

    It loses nothing in float: a maximum of rounded numbers is the rounded maximum, and a mean only gets closer.

    Args:
        layer: a pool or anything else.
        shapes: of what it reads and writes, for each of its calls.
    """
    if isinstance(layer, nn.AvgPool2d) and _divides_by_less(layer):
        return _DIVIDES
    if not averages_equally(layer, shapes):
        return _UNEQUAL
    return next((reason for pool, reason in _WITHOUT_KERNEL.items() if isinstance(layer, pool)), None)


def averages_equally(layer: nn.Module, shapes: Iterable[Shapes]) -> bool:
    """Whether each output of a layer, if that is an adaptive average pool, averages as many inputs.

    Args:
        layer: an adaptive average pool or anything else.
        shapes: of what it reads and writes, for each of its calls.
    """
    dims = next((dims for pool, dims in _ADAPTIVE_AVERAGES.items() if isinstance(layer, pool)), None)
    if dims is None:
        return True
    pairs = (pair for read, written in shapes for pair in zip(read[-dims:], written[-dims:], strict=True))
    return all(size % out == 0 for size, out in pairs)


def _divides_by_less(pool: nn.AvgPool2d) -> bool:
    beyond = pool.ceil_mode or pool.padding not in (0, (0, 0))
    return pool.divisor_override is not None or (beyond and not pool.count_include_pad)


class _QuantPool(nn.Module):
    input_quantizer: Quantizer | nn.Identity

    def forward(self, input: Tensor) -> Any:
        """Pool the quantized input; the result is what the float layer returns, indices included."""
        return super().forward(self.input_quantizer(input))


class QuantMaxPool1d(_QuantPool, nn.MaxPool1d):
    """MaxPool1d with quantized input."""


class QuantMaxPool2d(_QuantPool, nn.MaxPool2d):
    """MaxPool2d with quantized input."""


class QuantMaxPool3d(_QuantPool, nn.MaxPool3d):
    """MaxPool3d with quantized input."""


class QuantAvgPool1d(_QuantPool, nn.AvgPool1d):
    """AvgPool1d with quantized input."""


class QuantAvgPool2d(_QuantPool, nn.AvgPool2d):
    """AvgPool2d with quantized input."""


class QuantAvgPool3d(_QuantPool, nn.AvgPool3d):
    """AvgPool3d with quantized input."""


class QuantAdaptiveMaxPool1d(_QuantPool, nn.AdaptiveMaxPool1d):
    """AdaptiveMaxPool1d with quantized input."""


class QuantAdaptiveMaxPool2d(_QuantPool, nn.AdaptiveMaxPool2d):
    """AdaptiveMaxPool2d with quantized input."""


class QuantAdaptiveMaxPool3d(_QuantPool, nn.AdaptiveMaxPool3d):
    """AdaptiveMaxPool3d with quantized input."""


class QuantAdaptiveAvgPool1d(_QuantPool, nn.AdaptiveAvgPool1d):
    """AdaptiveAvgPool1d with quantized input."""


class QuantAdaptiveAvgPool2d(_QuantPool, nn.AdaptiveAvgPool2d):
    """AdaptiveAvgPool2d with quantized input."""


class QuantAdaptiveAvgPool3d(_QuantPool, nn.AdaptiveAvgPool3d):
    """AdaptiveAvgPool3d with quantized input."""


def pooled(layer: nn.Module) -> tuple[Operand, ...]:
    """Return the one operand of a pool."""
    return (Operand("input"),)
