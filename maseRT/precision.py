"""The small frozen types that say how a tensor is represented."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Precision(StrEnum):
    """The number format a layer computes in."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"

    @property
    def is_float(self) -> bool:
        """Whether it needs no ranges."""
        return self is not Precision.INT8


@dataclass(frozen=True)
class QuantSpec:
    """Symmetric signed quantization of one tensor: zero point 0, range [-2^(bits-1), 2^(bits-1) - 1].

    Attributes:
        bits: width of the integer.
        axis: the channel axis that has a scale of its own per entry; None for one scale per tensor.
    """

    bits: int = 8
    axis: int | None = None

    @property
    def quant_min(self) -> int:
        """The smallest integer."""
        return -(1 << (self.bits - 1))

    @property
    def quant_max(self) -> int:
        """The largest integer, which amax maps to."""
        return (1 << (self.bits - 1)) - 1
