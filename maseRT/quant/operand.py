"""What a layer tells about each of its quantized tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from maseRT.precision import QuantSpec


@dataclass(frozen=True)
class Operand:
    """One tensor of a layer that is quantized.

    Attributes:
        name: the end of its amax name, such as `input` or `weight_ih_l0`; its quantizer is `<name>_quantizer`.
        role: an input is an activation with one scale; a weight is a parameter.
        parameter: the weight's path below the layer, such as `out_proj.weight`; empty for an input.
        axis: the axis of a weight's output channels; None when only one scale per tensor makes sense.
    """

    name: str
    role: Literal["input", "weight"] = "input"
    parameter: str = ""
    axis: int | None = None

    @property
    def spec(self) -> QuantSpec:
        """How this operand is quantized when a plan says nothing else."""
        return QuantSpec(axis=self.axis)

    def resolve(self, spec: QuantSpec) -> QuantSpec:
        """Return the spec with this operand's own axis if it asks for one scale per channel."""
        return QuantSpec(bits=spec.bits, axis=None if spec.axis is None else self.axis)

    def channels(self, layer: nn.Module, spec: QuantSpec) -> int | None:
        """Return how many scales the spec asks for, None for one per tensor."""
        return None if spec.axis is None else int(layer.get_parameter(self.parameter).shape[spec.axis])


def weight_operand(parameter: str, axis: int | None = 0) -> Operand:
    """Return the operand of a parameter, named after its path."""
    return Operand(parameter.replace(".", "_"), "weight", parameter, axis)
