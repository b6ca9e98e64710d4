"""Ranges (amax) from histograms: max, percentile, entropy, mse. Pure functions, vectorised over tensors and channels.

Every calibrator reads `Bins` and returns [R] float32, never above the exact maximum.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from maseRT.errors import StepError, UsageError, did_you_mean, shortened
from maseRT.quant.fake_quant import SMALLEST_RANGE, floored
from maseRT.quant.histogram import Bins, Histogram, merged
from maseRT.quant.qat import is_weight
from maseRT.quant.sqnr import squared_error_integral

RANGE_OF_ZEROS = 1.0
"""The range of an activation that was always 0: any positive one represents that."""
_RANGE_OF_ZERO_WEIGHTS = 127 * 2.0**-14
"""Its scale is the smallest normal half float: integer kernels add biases in steps of the scales' product."""
_TIE = 1e-12
_ROWS_AT_ONCE_CPU = 1
_ROWS_AT_ONCE_GPU = 64
_ROWS_PER_CALL = 4096


class HasPercentile(Protocol):
    """An object, such as a config's entry, that asks for a percentile."""

    @property
    def percentile(self) -> float:
        """The percentage of values inside the range."""


@dataclass(frozen=True)
class Method:
    """A calibrator and its parameter.

    Attributes:
        kind: a key of METHODS.
        percentile: the percentage of values inside the range, in (0, 100]; for the kind "percentile" only.
    """

    kind: str
    percentile: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in METHODS:
            raise UsageError(f"'{self.kind}' is no calibration method{did_you_mean(self.kind, list(METHODS))}")
        if (self.kind == "percentile") != (self.percentile is not None):
            raise UsageError("the method percentile, and no other, has a number", fix='for example "percentile-99.9"')
        if self.percentile is not None and not 0 < self.percentile <= 100:
            raise UsageError(f"the percentile {self.percentile} is not in (0, 100]")

    @property
    def name(self) -> str:
        """`max`, `entropy`, `mse`, or `percentile-99.9`; `Method.parse` reads it back."""
        return self.kind if self.percentile is None else f"{self.kind}-{repr(self.percentile).removesuffix('.0')}"

    @classmethod
    def parse(cls, name: str) -> Self:
        """Read a method's name.

        Raises:
            UsageError: there is no such method, or its number is not one.
        """
        kind, dash, number = name.partition("-")
        if not dash:
            return cls(kind)
        try:
            return cls(kind, float(number))
        except ValueError:
            raise UsageError(f"'{name}' is no calibration method: '{number}' is not a number") from None

    @classmethod
    def of(cls, entry: str | HasPercentile) -> Self:
        """Turn a config's entry, a name or an object with a percentile, into a method."""
        return cls.parse(entry) if isinstance(entry, str) else cls("percentile", float(entry.percentile))


def amax_max(bins: Bins) -> Tensor:
    """Return the exact maximum."""
    return bins.max


def amax_percentile(bins: Bins, percentile: float) -> Tensor:
    """Return the lower edge of the bin in which the given percentage of the values is reached.

    This is pytorch-quantization's definition, in the same order of roundings (hence on the CPU), but for two results
    that are wrong there: 100 gives the maximum, and the first bin gives its upper edge instead of the range 0.
    """
    if percentile == 100:
        return bins.max
    counts = bins.counts.cpu().double()
    share = (counts / counts.sum(1, keepdim=True)).cumsum(1)
    wanted = torch.full((len(share), 1), percentile / 100, dtype=torch.float64)
    found = torch.searchsorted(share, wanted)[:, 0].clamp(min=1)
    return _at_edge(bins, found.to(bins.counts.device))


def amax_entropy(bins: Bins) -> Tensor:
    """Return the range whose quantized distribution diverges least (Kullback-Leibler) from the clipped one.

    The definition is TensorRT's and pytorch-quantization's: for every candidate i from 128 bins on, the first i bins,
    with all that lies beyond added to the last one, are the reference p; their counts averaged over 128 levels (over
    bins that are not empty) are q; bin 0 counts what bin 1 does; of equal candidates the last one wins. In closed form
    sum p log(p/q) needs prefix sums of h, h log h and h > 0 only.
    """
    levels = 2 ** (bins.bits - 1)
    candidates = torch.arange(levels, bins.counts.shape[1] + 1, device=bins.counts.device)
    # Level j of candidate i begins at the first bin b with b >= i * j / levels.
    edges = -(-candidates[:, None] * torch.arange(levels + 1, device=candidates.device) // levels)
    best = []
    at_once = _ROWS_AT_ONCE_CPU if candidates.device.type == "cpu" else _ROWS_AT_ONCE_GPU
    for row in range(0, len(bins.counts), at_once):
        block = slice(row, row + at_once)
        divergence = _divergence(bins.counts[block].double(), candidates, edges)
        divergence.masked_fill_((candidates > bins.used[block, None]) | divergence.isnan(), torch.inf)
        least = divergence.amin(1, keepdim=True)
        best.append(torch.where(divergence <= least + _TIE, candidates, 0).amax(1))
    return _at_edge(bins, torch.cat(best))


def _divergence(counts: Tensor, candidates: Tensor, edges: Tensor) -> Tensor:
    """Return KL(p, q) for rows of counts [R, B], candidates [K] and edges [K, levels + 1] as [R, K]."""
    counts = counts.clone()
    counts[:, 0] = counts[:, 1]
    total = _prefix(counts)
    in_level = total[:, edges].diff(dim=2)
    not_empty = _prefix((counts > 0).double())[:, edges].diff(dim=2)
    average = in_level / not_empty.clamp_(min=1)
    own = counts[:, candidates - 1]
    tail = total[:, -1:] - total[:, candidates]
    last = own + tail
    p_log_p = _prefix(torch.xlogy(counts, counts))[:, candidates - 1] + torch.xlogy(last, last)
    p_log_q = torch.xlogy(in_level, average).sum(2) + torch.xlogy(tail, average[:, :, -1])
    divergence = (p_log_p - p_log_q) / total[:, -1:] - torch.log(total[:, -1:]) + torch.log(total[:, candidates])
    return divergence.masked_fill_((own == 0) & (tail > 0), torch.inf)


def _prefix(values: Tensor) -> Tensor:
    """[R, B] -> [R, B + 1], the sums of the first 0, 1, ..., B values."""
    return torch.nn.functional.pad(values.cumsum(1), (1, 0))


def amax_mse(bins: Bins) -> Tensor:
    """Return the range of least mean squared error on the integer grid, of all bin edges as candidates.

    Values are taken as spread evenly inside a bin, zeros as exact. The error of bin b under candidate c is, in units of
    a bin, the same for every histogram, so one matrix product serves all rows.
    """
    size = bins.counts.shape[1]
    quant_max = 2 ** (bins.bits - 1) - 1
    edges = torch.arange(size + 1, dtype=torch.float64, device=bins.counts.device)
    error = squared_error_integral(edges, edges[1:, None] / quant_max, quant_max).diff(dim=1)
    counts = bins.counts.double()
    counts[:, 0] -= bins.zeros
    cost = counts @ error.T
    candidates = torch.arange(1, size + 1, device=cost.device)
    cost.masked_fill_(candidates > bins.used[:, None], torch.inf)
    return _at_edge(bins, cost.argmin(1) + 1)


def _at_edge(bins: Bins, edge: Tensor) -> Tensor:
    return torch.minimum((edge * bins.width).float(), bins.max)


METHODS: dict[str, Callable[..., Tensor]] = {
    "max": amax_max,
    "entropy": amax_entropy,
    "mse": amax_mse,
    "percentile": amax_percentile,
}
"""Calibration methods by name. Each takes `Bins`; percentile takes the percentage as well."""


def amax_from_histograms(
    histograms: Mapping[str, Histogram],
    method_of: Callable[[str], Method],
    *,
    ties: Iterable[Sequence[str]] = (),
) -> dict[str, Tensor]:
    """Compute every tensor's range, [] or [C] float32, on its histogram's device.

    Tensors of one method go through it together. Any positive range quantizes zeros exactly: a channel that holds
    nothing else gets the largest range of its tensor, and a tensor of nothing else a constant. The ranges of dead
    channels are floored, as in training.

    Args:
        histograms: by amax name.
        method_of: the calibration method of an amax name.
        ties: names that share one range; it is that of all their values together, by the first name's method.

    Raises:
        StepError: names the tensors that no batch reached, or that a tie names in vain.
    """
    groups = [tuple(group) for group in ties]
    _check_ranges(histograms, groups)
    own = dict(histograms)
    for group in groups:
        own[group[0]] = merged([own.pop(name) for name in group])
    amax: dict[str, Tensor] = {}
    for method, names in _batches(own, method_of):
        arguments = () if method.percentile is None else (method.percentile,)
        rows = METHODS[method.kind](Bins.stack([own[name].bins() for name in names]), *arguments)
        for name, part in zip(names, torch.split(rows, [len(own[name].max) for name in names]), strict=True):
            amax[name] = own[name].shaped(_for_zeros(own[name], part, name=name))
    for group in groups:
        amax |= {name: amax[group[0]].clone() for name in group[1:]}
    return {name: amax[name] for name in histograms}


def always_zero(histograms: Mapping[str, Histogram]) -> list[str]:
    """Return the names of the activations that were 0 throughout; their ranges say nothing about other values."""
    return [name for name, histogram in histograms.items() if not is_weight(name) and _is_zero(histogram)]


def _is_zero(histogram: Histogram) -> bool:
    return float(histogram.max.max()) < SMALLEST_RANGE


def _for_zeros(histogram: Histogram, ranges: Tensor, *, name: str) -> Tensor:
    """Return a tensor's ranges [R], with positive ones where it holds nothing but zeros."""
    if _is_zero(histogram):
        return torch.full_like(ranges, _RANGE_OF_ZERO_WEIGHTS if is_weight(name) else RANGE_OF_ZEROS)
    ranges = torch.where(histogram.max < SMALLEST_RANGE, ranges.max(), ranges)
    return ranges if histogram.spec.axis is None else floored(ranges)


def _batches(
    histograms: Mapping[str, Histogram], method_of: Callable[[str], Method]
) -> Iterator[tuple[Method, list[str]]]:
    """Group names whose histograms can go through a calibrator together, so many rows at a time."""
    alike: dict[tuple[Method, int, torch.device], list[str]] = defaultdict(list)
    for name, histogram in histograms.items():
        names = alike[method_of(name), histogram.spec.bits, histogram.device]
        names.append(name)
        if sum(len(histograms[other].max) for other in names) >= _ROWS_PER_CALL:
            yield method_of(name), names.copy()
            names.clear()
    yield from ((method, names) for (method, _, _), names in alike.items() if names)


def _check_ranges(histograms: Mapping[str, Histogram], groups: Sequence[Sequence[str]]) -> None:
    tied = [name for group in groups for name in group]
    wrong = sorted({name for name in tied if name not in histograms or tied.count(name) > 1})
    if wrong:
        raise StepError("a shared range names it twice, or it has no histogram", where=shortened(wrong))
    empty = [name for name, histogram in histograms.items() if not int(histogram.count.sum())]
    if empty:
        raise StepError(
            "no calibration batch reached it",
            where=shortened(empty),
            fix="keep the layer in float with a rule, or calibrate on data that uses it",
        )
