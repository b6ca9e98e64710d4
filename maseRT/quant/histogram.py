"""Histograms of |x| that stream: fixed memory, exact integer counts, and one result whatever the batches were.

Why bins of a power-of-two width. A histogram covers [0, 2^e) with the smallest e that holds every value seen, in 2^k
bins. When the range grows, 2^n neighbouring bins become one, so every count lands where it would have landed had the
range been known from the start: nothing is smeared, the order and the size of the batches do not matter, histograms of
several tensors can be added, and the bin of a float is found without rounding.

Why finer bins than the calibrators use. The entropy calibrator's divergence is a jagged function of the bins' width:
2048 bins over [0, 2^e) move its minimum by up to 200 bins against 2048 bins over [0, max]. So a tensor is collected in
64 times 2048 bins (1 MiB), and `Histogram.bins` regroups them into 2048 bins over [0, max], a whole fine bin at a time.
A channel of a weight holds few values and is collected in 2048 bins, of which those up to its maximum are used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maseRT.errors import StepError
from maseRT.precision import QuantSpec

BINS = 2048
_LOG2_BINS = 11
_LOG2_FINE_BINS = 17
_SMALLEST_NORMAL_EXPONENT = -126
_CHUNK_CPU = 1 << 20
_CHUNK_GPU = 1 << 24
_FIELDS = ("index", "count", "exponent", "max", "zeros", "square_sum")


@dataclass(frozen=True)
class Bins:
    """What calibrators read: R histograms side by side, one per tensor or per channel.

    Attributes:
        counts: [R, 2048] int64; bin b of row r covers [b, b + 1) * width[r].
        used: [R] int64, how many leading bins are in use; the last of them holds the maximum.
        width: [R] float64.
        max: [R] float32, the exact maximum of |x|.
        zeros: [R] int64, how many values were exactly 0 (they are counted in bin 0 too).
        bits: width of the integers that the tensors will be quantized to.
    """

    counts: Tensor
    used: Tensor
    width: Tensor
    max: Tensor
    zeros: Tensor
    bits: int

    @staticmethod
    def stack(parts: Sequence[Bins]) -> Bins:
        """Put histograms of the same bits and device under each other."""
        return Bins(
            counts=torch.cat([part.counts for part in parts]),
            used=torch.cat([part.used for part in parts]),
            width=torch.cat([part.width for part in parts]),
            max=torch.cat([part.max for part in parts]),
            zeros=torch.cat([part.zeros for part in parts]),
            bits=parts[0].bits,
        )


class Histogram:
    """Counts of |x| for one tensor, collected batch by batch on the tensor's device.

    Everything is held in rows: R = 1 per tensor, R = C per channel.

    Attributes:
        spec: bits and channel axis of the tensor.
        counts: [R, fine bins] int64 over [0, 2^exponent).
        exponent: [R] int32.
        max: [R] float32, the exact maximum of |x|.
        zeros: [R] int64, values that are exactly 0.
        square_sum: [R] float64, the sum of x^2.
    """

    def __init__(
        self, spec: QuantSpec, *, channels: int | None = None, device: torch.device | str | None = None
    ) -> None:
        if (spec.axis is None) != (channels is None):
            raise ValueError(f"axis {spec.axis} does not go with {channels} channels")
        self.spec = spec
        rows = 1 if channels is None else channels
        fine_bins = 2**self._log2_bins
        self.counts = torch.zeros(rows, fine_bins, dtype=torch.int64, device=device)
        self.exponent = torch.full(
            (rows,), self._log2_bins + _SMALLEST_NORMAL_EXPONENT, dtype=torch.int32, device=device
        )
        self.max = torch.zeros(rows, dtype=torch.float32, device=device)
        self.zeros = torch.zeros(rows, dtype=torch.int64, device=device)
        self.square_sum = torch.zeros(rows, dtype=torch.float64, device=device)

    @property
    def _log2_bins(self) -> int:
        return _LOG2_FINE_BINS if self.spec.axis is None else _LOG2_BINS

    @property
    def device(self) -> torch.device:
        """Where the counts lie."""
        return self.counts.device

    @property
    def count(self) -> Tensor:
        """[R] int64, how many values were seen."""
        return self.counts.sum(1)

    @property
    def width(self) -> Tensor:
        """[R] float64, the width of a fine bin."""
        return _power_of_two(self.exponent - self._log2_bins).double()

    def shaped(self, rows: Tensor) -> Tensor:
        """Turn a result per row, [R], into the shape of the tensor's amax: [] or [C]."""
        return rows[0] if self.spec.axis is None else rows

    def collect(self, x: Tensor, *, where: str = "a tensor") -> None:
        """Count the values of one batch.

        Args:
            x: any floating-point tensor; with a channel axis, of as many channels as the histogram.
            where: names the tensor and the batch in errors.

        Raises:
            StepError: x holds NaN or infinite values (nothing of it is counted), or other channels.
        """
        values = self._rows(x, where)
        if values.numel() == 0:
            return
        peak = values.abs().amax(1) if self.spec.axis is not None else values.abs().amax().reshape(1)
        if not bool(torch.isfinite(peak).all()):
            raise _not_finite(x, where)
        self.max = torch.maximum(self.max, peak)
        exponent = torch.where(peak > 0, torch.frexp(peak).exponent, self.exponent)
        self._grow(torch.maximum(self.exponent, exponent))
        per_width = _power_of_two(self._log2_bins - self.exponent)[:, None]
        first = torch.arange(len(values), dtype=torch.int32, device=self.device)[:, None] * self.counts.shape[1]
        chunk = _CHUNK_CPU if self.device.type == "cpu" else _CHUNK_GPU
        for part in torch.split(values, max(1, chunk // len(values)), dim=1):
            scaled = part.abs()
            self.zeros += part.shape[1] - scaled.sign().sum(1).long()
            index = (scaled.mul_(per_width).int() + first).flatten()
            self.counts += torch.bincount(index, minlength=self.counts.numel()).view_as(self.counts)
            self.square_sum += scaled.square_().sum(1).double() * self.width.square()

    def bins(self) -> Bins:
        """Return the counts as calibrators read them: 2048 bins over [0, max].

        Per tensor a fine bin goes, whole, to the bin that holds its middle. Per channel the bins stay as they are, and
        1025 to 2048 of them reach up to the maximum.
        """
        peak = self.max.double()
        if self.spec.axis is not None:
            used = (peak / self.width).long() + 1
            return Bins(self.counts, used, self.width, self.max, self.zeros, self.spec.bits)
        middle = torch.arange(self.counts.shape[1], dtype=torch.float64, device=self.device) + 0.5
        target = (middle * (self.width * BINS / peak)).clamp(0, BINS - 1).long()
        counts = torch.zeros(BINS, dtype=torch.int64, device=self.device).index_add_(0, target, self.counts[0])
        used = torch.full_like(self.zeros, BINS)
        return Bins(counts[None], used, peak / BINS, self.max, self.zeros, self.spec.bits)

    def to(self, device: torch.device | str) -> Histogram:
        """Return a copy on another device."""
        moved = Histogram(self.spec, channels=None if self.spec.axis is None else len(self.max), device=device)
        for name in ("counts", "exponent", "max", "zeros", "square_sum"):
            setattr(moved, name, getattr(self, name).to(device, copy=True))
        return moved

    def _rows(self, x: Tensor, where: str) -> Tensor:
        values = x.detach().to(self.device, torch.float32)
        if self.spec.axis is None:
            return values.reshape(1, -1)
        if not -x.dim() <= self.spec.axis < x.dim() or x.shape[self.spec.axis] != len(self.max):
            raise StepError(
                f"shape {tuple(x.shape)} does not have {len(self.max)} channels on axis {self.spec.axis}", where=where
            )
        return values.movedim(self.spec.axis, 0).flatten(1) if x.dim() > 1 else values[:, None]

    def _grow(self, exponent: Tensor) -> None:
        """Merge bins until every row covers [0, 2^exponent)."""
        shift = exponent - self.exponent
        if bool((shift > 0).any()):
            target = torch.arange(self.counts.shape[1], device=self.device) >> shift[:, None].clamp(max=62)
            self.counts = torch.zeros_like(self.counts).scatter_add_(1, target, self.counts)
            self.exponent = exponent


def merged(histograms: Sequence[Histogram]) -> Histogram:
    """Add up the histograms of tensors that share one range; exact. All have one spec, one shape and one device."""
    total = histograms[0].to(histograms[0].device)
    for other in histograms[1:]:
        if other.spec != total.spec or other.max.shape != total.max.shape:
            raise ValueError(f"cannot add histograms of {total.spec} and {other.spec}")
        exponent = torch.maximum(total.exponent, other.exponent)
        addend = other.to(total.device)
        total._grow(exponent)
        addend._grow(exponent)
        total.counts = total.counts + addend.counts
        total.max = torch.maximum(total.max, addend.max)
        total.zeros = total.zeros + addend.zeros
        total.square_sum = total.square_sum + addend.square_sum
    return total


def tensors_from_histograms(histograms: Mapping[str, Histogram]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and metadata that safetensors can save; of the counts only those that are not zero are kept."""
    tensors: dict[str, Tensor] = {}
    described: dict[str, dict[str, Any]] = {}
    for name, histogram in histograms.items():
        flat = histogram.counts.flatten()
        index = flat.nonzero().flatten()
        fields = (index.int(), flat[index], histogram.exponent, histogram.max, histogram.zeros, histogram.square_sum)
        for field, tensor in zip(_FIELDS, fields, strict=True):
            tensors[f"{name}.{field}"] = tensor.cpu().contiguous()
        described[name] = {"bits": histogram.spec.bits, "axis": histogram.spec.axis}
    return tensors, {"histograms": json.dumps(described)}


def histograms_from_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Histogram]:
    """Rebuild what `tensors_from_histograms` returned, on the tensors' device.

    Raises:
        StepError: tensors or metadata are missing, or do not belong together.
    """
    try:
        described = json.loads(metadata["histograms"])
        return {name: _rebuilt(tensors, name, QuantSpec(**spec)) for name, spec in described.items()}
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
        raise StepError(
            f"not the histograms that calibration saves: {error}",
            where="histograms",
            fix="run `masert calibrate` again",
        ) from error


def _rebuilt(tensors: Mapping[str, Tensor], name: str, spec: QuantSpec) -> Histogram:
    index, count, exponent, peak, zeros, square_sum = (tensors[f"{name}.{field}"] for field in _FIELDS)
    histogram = Histogram(spec, channels=None if spec.axis is None else len(peak), device=count.device)
    for field, tensor in (("exponent", exponent), ("max", peak), ("zeros", zeros), ("square_sum", square_sum)):
        getattr(histogram, field).copy_(tensor)
    histogram.counts.view(-1)[index.long()] = count
    return histogram


def _power_of_two(exponent: Tensor) -> Tensor:
    """Return 2^exponent in float32, exactly, for exponents from -126 to 127: the float's own exponent bits."""
    return ((exponent.int() + 127) << 23).view(torch.float32)


def _not_finite(x: Tensor, where: str) -> StepError:
    nan = int(torch.isnan(x).sum())
    infinite = x.numel() - nan - int(torch.isfinite(x.float()).sum())
    return StepError(
        f"{nan} NaN and {infinite} infinite values among {x.numel()}",
        where=where,
        fix="look for NaN in the data and the weights, and for an overflow in the layers before",
    )
