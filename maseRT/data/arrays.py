"""Inputs and labels as arrays: checked on the way in, then normalised."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from maseRT.config import DataSection
from maseRT.errors import UsageError

_CHUNK = 4096  # samples whose finiteness is tested at a time, so that no mask of the whole array is made


@dataclass(frozen=True)
class Arrays:
    """One part of a data set: inputs [N, ...] in float32 and labels [N] in int64."""

    inputs: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]


def checked_arrays(inputs: npt.NDArray[Any], labels: npt.NDArray[Any], *, where: str) -> Arrays:
    """Return `Arrays` of inputs [N, ...] (any real type, values unchanged) and labels [N] (any integer type).

    Raises:
        UsageError: another shape or type, no samples, lengths that differ, or a value that is not finite in float32.
    """
    _check_inputs(inputs, where=where)
    _check_labels(labels, where=where)
    if len(inputs) != len(labels):
        raise UsageError(f"{len(inputs)} inputs but {len(labels)} labels", where=where)
    with np.errstate(over="ignore"):
        arrays = Arrays(np.ascontiguousarray(inputs, dtype=np.float32), np.ascontiguousarray(labels, dtype=np.int64))
    for index in range(0, len(inputs), _CHUNK):
        finite = np.isfinite(arrays.inputs[index : index + _CHUNK]).reshape(-1, _features(inputs)).all(axis=1)
        if not finite.all():
            sample = index + int(np.argmin(finite))
            fix = "remove or repair the sample"
            raise UsageError(f"sample {sample} holds NaN or infinite values", where=where, fix=fix)
    return arrays


def _features(inputs: npt.NDArray[Any]) -> int:
    return int(np.prod(inputs.shape[1:]))


def _check_inputs(inputs: npt.NDArray[Any], *, where: str) -> None:
    described = f"shape {list(inputs.shape)} and type {inputs.dtype}"
    if inputs.dtype.kind not in "fiu":
        raise UsageError(f"the inputs are not real numbers: {described}", where=where)
    if inputs.ndim < 2 or 0 in inputs.shape[1:]:
        raise UsageError(f"the inputs need a shape [samples, ...]: {described}", where=where)
    if len(inputs) == 0:
        raise UsageError(f"there are no samples: {described}", where=where)


def _check_labels(labels: npt.NDArray[Any], *, where: str) -> None:
    described = f"shape {list(labels.shape)} and type {labels.dtype}"
    if labels.ndim != 1:
        fix = "y.argmax(1) turns one-hot rows into class numbers, y.ravel() a column into a list"
        raise UsageError(f"the labels need a shape [samples]: {described}", where=where, fix=fix)
    if labels.dtype.kind not in "iu":
        fix = "store class numbers, for example y.astype('int64')"
        raise UsageError(f"the labels are not integers: {described}", where=where, fix=fix)


def check_same_shape(parts: Mapping[str, Arrays], *, where: str) -> None:
    """Refuse parts whose samples have other shapes than the training samples."""
    expected = parts["train"].inputs.shape[1:]
    for part, arrays in parts.items():
        if arrays.inputs.shape[1:] != expected:
            got = f"{part} samples have shape {list(arrays.inputs.shape[1:])}"
            raise UsageError(f"{got}, train samples {list(expected)}", where=where)


def classes_in(parts: Iterable[Arrays]) -> int:
    """Return the largest label plus one."""
    return max(int(arrays.labels.max()) for arrays in parts) + 1


def standardized(parts: Mapping[str, Arrays], *, chosen: npt.NDArray[np.int64]) -> dict[str, Arrays]:
    """Return the parts with mean 0 and standard deviation 1 over the `chosen` training samples, per feature.

    A feature that is constant there is only centred.
    """
    train = parts["train"].inputs[chosen]
    mean = train.mean(axis=0, dtype=np.float64)
    std = train.std(axis=0, dtype=np.float64)
    std[std == 0] = 1
    return {
        part: Arrays(((arrays.inputs - mean) / std).astype(np.float32), arrays.labels) for part, arrays in parts.items()
    }


def image_arrays(
    pixels: npt.NDArray[Any], labels: npt.NDArray[Any], *, white: float, section: DataSection, where: str
) -> Arrays:
    """Return images [N, C, H, W] scaled from [0, white] to [0, 1], then by [data] mean and std where given."""
    scaled = np.divide(pixels, np.float32(white), dtype=np.float32)
    channels = normalization(section, channels=scaled.shape[1])
    if channels is not None:
        mean, std = channels
        scaled -= mean
        scaled /= std
    return checked_arrays(scaled, labels, where=where)


def normalization(
    section: DataSection, *, channels: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None:
    """Return [data] mean and std as arrays [C, 1, 1]; None when neither is given.

    Raises:
        UsageError: one without the other, not one value per channel, or a std that is not positive.
    """
    if section.mean is None and section.std is None:
        return None
    mean, std = section.mean or (), section.std or ()
    if len(mean) != channels or len(std) != channels:
        what = f"need {channels} values each, one per channel, got {len(mean)} and {len(std)}"
        raise UsageError(what, where="[data] mean, std", fix=f"give {channels} values in both, or neither")
    if not all(np.isfinite(mean)) or not all(0 < value < np.inf for value in std):
        raise UsageError("must be finite, and std above 0", where="[data] mean, std")
    as_channels = (np.asarray(values, dtype=np.float32).reshape(-1, 1, 1) for values in (mean, std))
    return next(as_channels), next(as_channels)
