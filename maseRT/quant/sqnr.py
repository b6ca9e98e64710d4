"""What quantization costs a tensor, told from its histogram: squared error and signal-to-quantization-noise ratio."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from maseRT.quant.histogram import Histogram


def squared_error_integral(x: Tensor, step: Tensor, quant_max: int) -> Tensor:
    """Integrate (t - step * min(round(t / step), quant_max))^2 over t from 0 to x >= 0; the arguments broadcast.

    With k = min(round(x / step), quant_max) the integral is k * step^3 / 12 + (x - k * step)^3 / 3: k whole steps of
    rounding error, then what is left of the last one, which past quant_max is clipping error.
    """
    level = (x / step).round_().clamp_(max=quant_max)
    rest = torch.addcmul(x, level, step, value=-1)
    return rest.pow_(3).div_(3).add_(level.mul_(step**3 / 12))


def noise(histogram: Histogram, amax: Tensor) -> Tensor:
    """Return the expected sum of squared quantization errors per row, [R] float64.

    Values are taken as spread evenly inside a bin, zeros as exact, and both signs as clipped at quant_max (the grid has
    one more level on the negative side).

    Args:
        histogram: of the tensor.
        amax: its range, [] or [C], positive.
    """
    quant_max = 2 ** (histogram.spec.bits - 1) - 1
    bins = histogram.counts.shape[1]
    edges = torch.arange(bins + 1, dtype=torch.float64, device=histogram.device)
    step = (amax.to(histogram.device, torch.float64).reshape(-1) / quant_max / histogram.width)[:, None]
    per_value = squared_error_integral(edges, step, quant_max).diff(dim=1)
    per_row = (histogram.counts * per_value).sum(1) - histogram.zeros * per_value[:, 0]
    return per_row * histogram.width.square()


def sqnr_db(histogram: Histogram, amax: Tensor) -> float:
    """Return the signal-to-quantization-noise ratio of a whole tensor in dB; infinite where nothing is lost."""
    return _decibels(histogram.square_sum.sum(), noise(histogram, amax).sum()).item()


def layer_sqnr_db(operands_db: Iterable[float]) -> float:
    """Return the ratio expected at a layer's output from those of its quantized operands (input, weight), in dB.

    A layer is linear in each operand, so relative noise powers of independent operands add.
    """
    lost = torch.tensor([10 ** (-db / 10) for db in operands_db], dtype=torch.float64)
    return _decibels(torch.ones((), dtype=torch.float64), lost.sum()).item()


def _decibels(signal: Tensor, noise: Tensor) -> Tensor:
    ratio = 10 * torch.log10(signal / noise)
    return torch.where(noise > 0, ratio, torch.inf)
