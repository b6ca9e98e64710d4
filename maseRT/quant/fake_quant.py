"""The arithmetic of fake quantization and its straight-through gradient: no modules, no state.

Everything computes y = clip(round(x / scale), quant_min, quant_max) * scale, rounding half to even, as ONNX
QuantizeLinear and DequantizeLinear do. The gradient of x passes where quant_min <= round(x / scale) <= quant_max.

`torch.fake_quantize_per_tensor_affine` works value by value on CPU and writes a mask for its backward pass; a chain of
vectorized element-wise kernels takes a tenth of its time (0.4 ms against 4.2 ms for a million values on one core).
On CUDA torch divides by a number by multiplying with its inverse: there a quotient within an ulp of a tie may round the
other way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_HALF = 2.0**-24
"""The smallest positive half float."""
AMAX_FLOOR = 127 * SMALLEST_HALF
"""What no weight channel's range has to be below, and the range of weights of zeros: its scale is the smallest half."""
SMALLEST_RANGE = 2.0**-100
"""Below it a range counts as zero: the scale of a two-thousandth of it would hardly be a normal float32."""
_FLOOR_SHARE = 2.0**-10


@dataclass(frozen=True, slots=True)
class Grid:
    """The values that one scale can represent.

    Attributes:
        scale: the step, exactly a float32.
        low: quant_min * scale.
        high: quant_max * scale.
        open_low: the float32 nearest to zero that rounds to an integer below quant_min.
        open_high: the float32 nearest to zero that rounds to an integer above quant_max.
    """

    scale: float
    low: float
    high: float
    open_low: float
    open_high: float


def grid_from_scale(scale: float, *, quant_min: int, quant_max: int) -> Grid:
    """Return the grid of a positive scale that is exactly a float32."""
    step = np.float32(scale)
    return Grid(
        scale=float(step),
        low=float(step * np.float32(quant_min)),
        high=float(step * np.float32(quant_max)),
        open_low=_first_outside(step, quant_min - 0.5, lambda q: q < quant_min),
        open_high=_first_outside(step, quant_max + 0.5, lambda q: q > quant_max),
    )


def _first_outside(scale: np.float32, edge: float, outside: Callable[[np.float32], np.bool]) -> float:
    """Return the float32 nearest to zero whose rounded quotient is outside; scale * edge is within a few ulp of it."""
    x, zero, far = scale * np.float32(edge), np.float32(0), np.float32(math.copysign(math.inf, edge))
    while outside(np.rint(x / scale)):
        x = np.nextafter(x, zero)
    while not outside(np.rint(x / scale)):
        x = np.nextafter(x, far)
    return float(x)


def fake_quantize(x: Tensor, grid: Grid) -> Tensor:
    """Fake-quantize a float32 tensor of any shape with one scale.

    The gradient is hardtanh's, whose mask is open at both ends; the values are then moved onto the grid behind
    autograd's back. That spares the overhead of a Python autograd.Function, which small models feel.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return _onto_grid_(torch.clamp(x, grid.low, grid.high), grid)
    y = F.hardtanh(x, grid.open_low, grid.open_high)
    _onto_grid_(y.detach().clamp_(grid.low, grid.high), grid)
    return y


def fake_quantize_unclipped(x: Tensor, scale: Tensor) -> Tensor:
    """Fake-quantize x with a scale that covers it, as with amax = max|x|: nothing is clipped, every gradient passes."""
    y = x.clone()
    y.detach().div_(scale).round_().mul_(scale)
    return y


def fake_quantize_scaled(x: Tensor, scale: Tensor, *, quant_min: int, quant_max: int) -> Tensor:
    """Fake-quantize x with a scale that broadcasts against it and takes no gradient; torch.compile understands it."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Scaled.apply(x, scale, quant_min, quant_max)  # type: ignore[no-any-return, no-untyped-call]
    return torch.div(x, scale).round_().clamp_(quant_min, quant_max).mul_(scale)


def fake_quantize_learned(x: Tensor, amax: Tensor, grid: Grid) -> Tensor:
    """Fake-quantize x with the grid of a range of shape [] that is trained (LSQ, Esser et al. 2020, equations 1 to 3).

    The gradient of the scale s is round(x/s) - x/s inside the range and quant_min or quant_max outside, summed over x
    and divided by sqrt(numel * quant_max); that of amax = s * quant_max follows.
    """
    return _Learned.apply(x, amax, grid)  # type: ignore[no-any-return, no-untyped-call]


def max_abs(x: Tensor, axis: int | None) -> Tensor:
    """Return max|x|, [] or along one axis [C], in float32, without gradient, floored."""
    x = x.detach()
    dims = [d for d in range(x.dim()) if axis is None or d != axis % x.dim()]
    if not dims:
        highest = x.abs()
    elif x.is_cuda:
        highest = torch.linalg.vector_norm(x, math.inf, dims)  # one kernel, but fifty times slower than these on CPU
    else:
        highest = torch.maximum(x.amax(dims), x.amin(dims).neg_())
    return floored(highest.float())


def floored(amax: Tensor) -> Tensor:
    """Return the ranges of a weight, [] or [C] float32, without those that are next to nothing.

    Pretrained networks have dead channels, whose scales would be zero in half precision. A channel's range is at least
    AMAX_FLOOR, or a thousandth of the largest one where that is less: all weights of a layer may be tiny.
    """
    floor = F.threshold(amax.amax(), SMALLEST_RANGE, AMAX_FLOOR / _FLOOR_SHARE)
    return torch.maximum(amax, floor.mul_(_FLOOR_SHARE).clamp_(max=AMAX_FLOOR))


def _onto_grid_(x: Tensor, grid: Grid) -> Tensor:
    """Round x, which lies between grid.low and grid.high, in place."""
    return x.div_(grid.scale).round_().mul_(grid.scale)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, quant_min: int, quant_max: int) -> Tensor:
        q = torch.div(x, scale).round_()
        ctx.save_for_backward((q >= quant_min) & (q <= quant_max))
        # Nothing in place that is returned: compiled by torch 2.11, every gradient would be zero.
        return q.clamp(quant_min, quant_max).mul(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None, None


class _Learned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, amax: Tensor, grid: Grid) -> Tensor:
        y = torch.clamp(x, grid.low, grid.high).div_(grid.scale).round_().mul(grid.scale)  # as in _Scaled
        ctx.save_for_backward(x, y)
        ctx.grid = grid
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (x, y), grid = ctx.saved_tensors, ctx.grid
        passed = torch.ops.aten.hardtanh_backward(grad, x, grid.open_low, grid.open_high)
        along_scale = (torch.vdot(grad.flatten(), y.flatten()) - torch.vdot(passed.flatten(), x.flatten())) / grid.scale
        quant_max = round(grid.high / grid.scale)
        return passed, along_scale / (math.sqrt(x.numel() * quant_max) * quant_max), None
