"""Twins of the pooling layers: a quantized input keeps a chain of INT8 layers together."""

from __future__ import annotations

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

_NO_KERNEL = "TensorRT 8.6 has no kernel for INT8 3-D max pools, and TensorRT-RTX runs them in float"
_RUNS_IN_FLOAT = "TensorRT-RTX runs 1-D and 3-D average pools in float"
_DIVIDES = "TensorRT-RTX runs an average pool in float that does not divide by the size of its window, padding included"
_WITHOUT_KERNEL = {
    nn.MaxPool3d: _NO_KERNEL,
    nn.AdaptiveMaxPool3d: _NO_KERNEL,
    nn.AvgPool1d: _RUNS_IN_FLOAT,
    nn.AvgPool3d: _RUNS_IN_FLOAT,
    nn.AdaptiveAvgPool1d: _RUNS_IN_FLOAT,
    nn.AdaptiveAvgPool3d: _RUNS_IN_FLOAT,
}


def without_kernel(layer: nn.Module) -> str | None:
    """Say of a pool for which TensorRT has no INT8 kernel what comes of that; None for any other layer.

    It loses nothing in float: a maximum of rounded numbers is the rounded maximum, and a mean only gets closer.
    """
    if isinstance(layer, nn.AvgPool2d) and _divides_by_less(layer):
        return _DIVIDES
    return next((reason for pool, reason in _WITHOUT_KERNEL.items() if isinstance(layer, pool)), None)


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
