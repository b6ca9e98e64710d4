"""Inputs and targets as arrays: checked on the way in, then normalised."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from maseRT.config import DataSection
from maseRT.errors import UsageError

ID_TYPES = ("int32", "int64")
"""The types of inputs that a model looks up in a table, and that stay as they are."""

_CHUNK = 4096  # samples whose finiteness is tested at a time, so that no mask of the whole array is made


@dataclass(frozen=True)
class Arrays:
    """One part of a data set: inputs [N, ...] and labels [N] in int64, or other targets [N, ...].

    Inputs are float32; or int32 or int64 where they are ids, such as tokens. Other targets are float32 or int64.
    """

    inputs: npt.NDArray[Any]
    labels: npt.NDArray[Any]


def checked_arrays(
    inputs: npt.NDArray[Any], labels: npt.NDArray[Any], *, where: str, any_targets: bool = False, ids: bool = False
) -> Arrays:
    """Return `Arrays` of inputs [N, ...] (any real type, values unchanged) and labels [N] (any integer type).

    Args:
        inputs: of the samples; they become float32.
        labels: of the samples; other targets [N, ...], of any real type, only with `any_targets`.
        where: for errors.
        any_targets: what fits is told later, when the task is known.
        ids: inputs of `ID_TYPES` are ids, and stay as they are.

    Raises:
        UsageError: another shape or type, no samples, lengths that differ, or a value that is not finite in float32.
    """
    _check_inputs(inputs, where=where)
    if any_targets:
        _check_targets(labels, where=where)
    else:
        _check_labels(labels, where=where)
    if len(inputs) != len(labels):
        raise UsageError(f"{len(inputs)} inputs but {len(labels)} labels", where=where)
    kind = np.float32 if labels.dtype.kind == "f" else np.int64
    input_kind = inputs.dtype.newbyteorder("=") if ids and inputs.dtype.name in ID_TYPES else np.float32
    with np.errstate(over="ignore"):
        arrays = Arrays(np.ascontiguousarray(inputs, dtype=input_kind), np.ascontiguousarray(labels, dtype=kind))
    _check_finite(arrays.inputs, "", where=where)
    if kind is np.float32:
        _check_finite(arrays.labels, " in its target", where=where)
    return arrays


def _check_finite(values: npt.NDArray[Any], part: str, *, where: str) -> None:
    for index in range(0, len(values), _CHUNK):
        chunk = values[index : index + _CHUNK]
        finite = np.isfinite(chunk).reshape(len(chunk), -1).all(axis=1)
        if not finite.all():
            what = f"sample {index + int(np.argmin(finite))} holds NaN or infinite values{part}"
            raise UsageError(what, where=where, fix="remove or repair the sample")


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


def _check_targets(targets: npt.NDArray[Any], *, where: str) -> None:
    described = f"shape {list(targets.shape)} and type {targets.dtype}"
    if targets.ndim == 0 or 0 in targets.shape[1:]:
        raise UsageError(f"the targets need a shape [samples, ...]: {described}", where=where)
    if targets.dtype.kind not in "fiu":
        fix = "store class numbers, for example y.astype('int64'), or floats for a regression"
        raise UsageError(f"the targets are neither integers nor floats: {described}", where=where, fix=fix)


def check_same_shape(parts: Mapping[str, Arrays], *, where: str) -> None:
    """Refuse parts whose samples or targets have other shapes or types than those of the training data."""
    inputs = parts["train"].inputs
    expected = inputs.shape[1:]
    targets = parts["train"].labels
    for part, arrays in parts.items():
        labels = arrays.labels
        if labels.shape[1:] != targets.shape[1:] or labels.dtype != targets.dtype:
            got = f"{part} targets are {labels.dtype} of shape {list(labels.shape[1:])}"
            raise UsageError(f"{got}, train targets {targets.dtype} of shape {list(targets.shape[1:])}", where=where)
        if arrays.inputs.shape[1:] != expected:
            got = f"{part} samples have shape {list(arrays.inputs.shape[1:])}"
            raise UsageError(f"{got}, train samples {list(expected)}", where=where)
        if arrays.inputs.dtype != inputs.dtype:
            what = f"{part} samples are {arrays.inputs.dtype}, train samples {inputs.dtype}"
            raise UsageError(what, where=where, fix="store all parts in one type: int32 or int64 stay as they are")


def outputs_for(parts: Iterable[Arrays]) -> int | None:
    """Return how many outputs the targets ask for: the largest label plus one, or the number of floats of a sample.

    None for several integers a sample, of which only the task knows the meaning.
    """
    targets = [arrays.labels for arrays in parts]
    if targets[0].dtype.kind == "f":
        return int(np.prod(targets[0].shape[1:]))
    return max(int(labels.max()) for labels in targets) + 1 if targets[0].ndim == 1 else None


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
        UsageError: one without the other, or not one value per channel.
    """
    if section.mean is None and section.std is None:
        return None
    mean, std = section.mean or (), section.std or ()
    if len(mean) != channels or len(std) != channels:
        what = f"need {channels} values each, one per channel, got {len(mean)} and {len(std)}"
        raise UsageError(what, where="[data] mean, std", fix=f"give {channels} values in both, or neither")
    as_channels = (np.asarray(values, dtype=np.float32).reshape(-1, 1, 1) for values in (mean, std))
    return next(as_channels), next(as_channels)
