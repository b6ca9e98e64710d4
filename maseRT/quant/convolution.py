"""Twins of the linear and the convolution layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from maseRT.quant.operand import Operand, weight_operand
from maseRT.quant.quantizer import Quantizer


class QuantLinear(nn.Linear):
    """Linear with quantized input and weight."""

    input_quantizer: Quantizer | nn.Identity
    weight_quantizer: Quantizer | nn.Identity

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return F.linear(self.input_quantizer(input), self.weight_quantizer(self.weight), self.bias)


class _QuantConv(_ConvNd):
    """Pads first where the kernel does not, so that the input's Q/DQ pair stands right before the convolution."""

    functional: Callable[..., Tensor]
    input_quantizer: Quantizer | nn.Identity
    weight_quantizer: Quantizer | nn.Identity

    def forward(self, input: Tensor) -> Tensor:
        """[N, in, ...] or [in, ...] -> [N, out, ...] or [out, ...]."""
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input, padding = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        weight = self.weight_quantizer(self.weight)
        return self.functional(
            self.input_quantizer(input), weight, self.bias, self.stride, padding, self.dilation, self.groups
        )


class QuantConv1d(_QuantConv, nn.Conv1d):
    """Conv1d with quantized input and weight."""

    functional = staticmethod(F.conv1d)


class QuantConv2d(_QuantConv, nn.Conv2d):
    """Conv2d with quantized input and weight."""

    functional = staticmethod(F.conv2d)


class QuantConv3d(_QuantConv, nn.Conv3d):
    """Conv3d with quantized input and weight."""

    functional = staticmethod(F.conv3d)


class _QuantConvTranspose(_ConvTransposeNd):
    functional: Callable[..., Tensor]
    input_quantizer: Quantizer | nn.Identity
    weight_quantizer: Quantizer | nn.Identity

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """[N, in, ...] or [in, ...] -> [N, out, ...] or [out, ...]; output_size settles what the stride leaves open."""
        sizes: tuple[Any, ...] = self.stride, self.padding, self.kernel_size, len(self.kernel_size), self.dilation
        output_padding = self._output_padding(input, output_size, *sizes)
        weight = self.weight_quantizer(self.weight)
        quantized = self.input_quantizer(input)
        return self.functional(
            quantized, weight, self.bias, self.stride, self.padding, output_padding, self.groups, self.dilation
        )


class QuantConvTranspose1d(_QuantConvTranspose, nn.ConvTranspose1d):
    """ConvTranspose1d with quantized input and weight."""

    functional = staticmethod(F.conv_transpose1d)


class QuantConvTranspose2d(_QuantConvTranspose, nn.ConvTranspose2d):
    """ConvTranspose2d with quantized input and weight."""

    functional = staticmethod(F.conv_transpose2d)


class QuantConvTranspose3d(_QuantConvTranspose, nn.ConvTranspose3d):
    """ConvTranspose3d with quantized input and weight."""

    functional = staticmethod(F.conv_transpose3d)


def weighted(layer: nn.Module) -> tuple[Operand, ...]:
    """Return the operands of Linear and Conv: the weight is [out, in / groups, ...]."""
    return Operand("input"), weight_operand("weight", 0)


def transposed(layer: nn.Module) -> tuple[Operand, ...]:
    """Return the operands of ConvTranspose: the weight is [in, out / groups, ...], so axis 1 counts output channels.

    With groups an entry of axis 1 is one output channel of every group, and these share its scale. Axis 0 would be
    finer but lies along the sum over the inputs, which an INT8 kernel cannot scale.
    """
    return Operand("input"), weight_operand("weight", 1)
