"""The table of layers that can be quantized, each with its twin: same parameters and state keys, plus quantizers.

A layer becomes quantized by changing its class to its twin, so that parameters, hooks and every constructor argument
stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maseRT.errors import StepError, UsageError
from maseRT.precision import QuantSpec
from maseRT.quant.quantizer import SUFFIX, Quantizer


@dataclass(frozen=True)
class Operand:
    """One tensor of a layer that is quantized.

    Attributes:
        name: the end of its amax name: `input`, `weight_ih_l0`; the quantizer is the layer's `<name>_quantizer`.
        role: an input is an activation with one scale; a weight is a parameter.
        parameter: the weight's path below the layer, such as `out_proj.weight`; empty for an input.
        axis: the channel axis of a weight that has a scale of its own per channel.
    """

    name: str
    role: Literal["input", "weight"]
    parameter: str = ""
    axis: int | None = None

    @property
    def spec(self) -> QuantSpec:
        """The spec that this operand has when a plan says nothing else."""
        return QuantSpec(axis=self.axis)


@dataclass(frozen=True)
class LayerKind:
    """How one type of layer is quantized.

    Attributes:
        twin: the class that a layer of this type takes on.
        operands: the quantized tensors of a given layer, inputs first.
        refusal: why this very layer cannot be quantized, or None.
    """

    twin: type[nn.Module]
    operands: Callable[[nn.Module], tuple[Operand, ...]]
    refusal: Callable[[nn.Module], str | None] = lambda layer: None


class QuantLinear(nn.Linear):
    """Linear with quantized input and weight."""

    input_quantizer: Quantizer
    weight_quantizer: Quantizer

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return F.linear(self.input_quantizer(input), self.weight_quantizer(self.weight), self.bias)


class _QuantConv(nn.modules.conv._ConvNd):
    """Convolution with quantized input and weight; padding comes first, so that Q/DQ stands next to the convolution."""

    input_quantizer: Quantizer
    weight_quantizer: Quantizer
    functional: ClassVar[Callable[..., Tensor]]

    def forward(self, input: Tensor) -> Tensor:
        """[N, in, ...] or [in, ...] -> [N, out, ...] or [out, ...]."""
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        weight = self.weight_quantizer(self.weight)
        quantized = self.input_quantizer(input)
        return type(self).functional(quantized, weight, self.bias, self.stride, padding, self.dilation, self.groups)


class QuantConv1d(_QuantConv, nn.Conv1d):
    """Conv1d with quantized input and weight."""

    functional = staticmethod(F.conv1d)


class QuantConv2d(_QuantConv, nn.Conv2d):
    """Conv2d with quantized input and weight."""

    functional = staticmethod(F.conv2d)


class QuantConv3d(_QuantConv, nn.Conv3d):
    """Conv3d with quantized input and weight."""

    functional = staticmethod(F.conv3d)


def _weighted(axis: int) -> Callable[[nn.Module], tuple[Operand, ...]]:
    operands = (Operand("input", "input"), Operand("weight", "weight", "weight", axis))
    return lambda layer: operands


LAYERS: dict[type[nn.Module], LayerKind] = {
    nn.Linear: LayerKind(QuantLinear, _weighted(0)),
    nn.Conv1d: LayerKind(QuantConv1d, _weighted(0)),
    nn.Conv2d: LayerKind(QuantConv2d, _weighted(0)),
    nn.Conv3d: LayerKind(QuantConv3d, _weighted(0)),
}


def register(
    layer: type[nn.Module],
    twin: type[nn.Module],
    *,
    inputs: tuple[str, ...] = ("input",),
    weights: Mapping[str, int | None] | None = None,
) -> None:
    """Add a layer type of your own to the table.

    Args:
        layer: the float layer.
        twin: a subclass of it whose forward calls `self.<name>_quantizer` on each operand.
        inputs: names of the quantized activations.
        weights: quantized parameters and their channel axis (None: one scale), such as {"weight": 0}.

    Raises:
        UsageError: the twin is no subclass of the layer, or the type is in the table already.
    """
    if not issubclass(twin, layer) or twin is layer:
        raise UsageError(f"{twin.__name__} is no subclass of {layer.__name__}", where="quant.register")
    if layer in LAYERS:
        raise UsageError(f"{layer.__name__} is in the table already", where="quant.register")
    operands = tuple(Operand(name, "input") for name in inputs)
    operands += tuple(Operand(path.replace(".", "_"), "weight", path, axis) for path, axis in (weights or {}).items())
    LAYERS[layer] = LayerKind(twin, lambda module: operands)


def refusal(layer: nn.Module) -> str | None:
    """Say why a layer cannot be quantized, or None when it can."""
    kind = LAYERS.get(type(layer))
    if kind is None:
        table = ", ".join(sorted(known.__name__ for known in LAYERS))
        return f"{type(layer).__name__} is not in the table of quantized layers ({table})"
    reason = kind.refusal(layer)
    if reason is not None:
        return reason
    for operand in kind.operands(layer):
        if operand.role == "weight":
            reason = _weight_refusal(layer.get_parameter(operand.parameter), operand)
            if reason is not None:
                return reason
    return None


def _weight_refusal(weight: Tensor, operand: Operand) -> str | None:
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return f"{operand.parameter} has no shape yet: run the lazy layer once"
    if not weight.is_floating_point():
        return f"{operand.parameter} is {weight.dtype}, not a float"
    if weight.numel() == 0:
        return f"{operand.parameter} is empty: shape {tuple(weight.shape)}"
    return None


def quantize_layer(
    layer: nn.Module, *, name: str = "", input: QuantSpec | None = None, weight: QuantSpec | None = None
) -> dict[str, Quantizer]:
    """Turn a layer into its quantized twin, in place, and return its new quantizers by operand name.

    Args:
        layer: a module whose type is in the table.
        name: the layer's name in its model, for messages.
        input: spec of its activations; None leaves them float.
        weight: spec of its weights; None leaves them float. An axis that is given replaces the table's.

    Raises:
        StepError: the layer cannot be quantized; the reason is in the message.
    """
    reason = refusal(layer)
    if reason is not None:
        raise StepError(f"cannot be quantized: {reason}", where=name or type(layer).__name__)
    kind = LAYERS[type(layer)]
    made: dict[str, Quantizer] = {}
    for operand in kind.operands(layer):
        spec = input if operand.role == "input" else weight
        if spec is None:
            layer.add_module(operand.name + SUFFIX, nn.Identity())
            continue
        quantizer = Quantizer(spec, _channels(layer, operand, spec))
        quantizer.name = f"{name}.{operand.name}" if name else operand.name
        quantizer.to(next((p.device for p in layer.parameters()), torch.device("cpu")))
        layer.add_module(operand.name + SUFFIX, quantizer)
        made[operand.name] = quantizer
    layer.__class__ = kind.twin
    return made


def _channels(layer: nn.Module, operand: Operand, spec: QuantSpec) -> int | None:
    if spec.axis is None:
        return None
    if operand.role == "input":
        raise StepError("an activation has one scale per tensor, not one per channel", where=operand.name)
    return int(layer.get_parameter(operand.parameter).shape[spec.axis])
