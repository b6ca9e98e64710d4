"""What every reader gives, and the seeded split into training, validation and test data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from maseRT.config import DataSection
from maseRT.data.arrays import Arrays, standardized
from maseRT.errors import UsageError

Indices = npt.NDArray[np.int64]
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Splits:
    """A data set in three parts, each of (tensor of `input_shape`, target) pairs.

    The tensors are float32; or all int32 or all int64 where they are ids, such as tokens.
    A target is an integer label, or whatever another task than classification takes: an int64 or float32 tensor.

    Attributes:
        input_shape: of one sample, without the batch dimension.
        num_classes: outputs that a model for these data needs: classes, or floats of a target; None where the data do
            not say.
    """

    name: str
    train: Dataset[Any]
    validation: Dataset[Any]
    test: Dataset[Any]
    input_shape: tuple[int, ...]
    num_classes: int | None

    def parts(self) -> dict[str, Dataset[Any]]:
        """Return the parts by name, in the order train, validation, test."""
        return {part: getattr(self, part) for part in PARTS}


def permutation(count: int, *, seed: int, stream: int) -> Indices:
    """Return a shuffled 0..count-1; `stream` tells apart the draws made from one seed.

    RandomState's stream is frozen across NumPy versions (NEP 19), Generator's is not.
    """
    state = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, stream])))
    return state.permutation(count).astype(np.int64)


def split_indices(count: int, *, present: frozenset[str], section: DataSection, seed: int) -> dict[str, Indices]:
    """Cut the parts that are not `present` off `count` training samples; the same on every run for a seed.

    Test data, where there are none, are [data] test of all samples; validation data are [data] validation of what
    remains for training. The draw is uniform, not stratified by class. Indices are sorted; no part shares one.

    Raises:
        UsageError: nothing is left for training.
    """
    order = permutation(count, seed=seed, stream=0)
    cuts = {}
    for part, share in (("test", section.test), ("validation", section.validation)):
        if part not in present:
            size = round(len(order) * share)
            cuts[part], order = np.sort(order[:size]), order[size:]
    if not len(order):
        fix = "add samples, or lower [data] validation and test"
        raise UsageError(f"no training samples are left of {count}", where=f"data set '{section.name}'", fix=fix)
    return {"train": np.sort(order), **cuts}


def splits_from_datasets(
    parts: Mapping[str, Dataset[Any]],
    indices: Mapping[str, Indices],
    *,
    name: str,
    input_shape: tuple[int, ...],
    num_classes: int | None,
) -> Splits:
    """Return `Splits` of the data sets that are there and, by index, of those cut off the training data."""
    whole = dict(parts)
    if len(indices) > 1:  # something was cut off the training data
        whole |= {part: Subset(parts["train"], chosen.tolist()) for part, chosen in indices.items()}
    return Splits(name=name, **whole, input_shape=input_shape, num_classes=num_classes)


def splits_from_arrays(
    parts: Mapping[str, Arrays],
    section: DataSection,
    *,
    seed: int,
    num_classes: int | None,
    standardize: bool = False,
) -> Splits:
    """Return `Splits` of arrays in memory; what is missing is cut off "train".

    Args:
        parts: "train" and perhaps "validation" and "test".
        standardize: subtract the mean and divide by the standard deviation of the training samples, per feature.
    """
    train = parts["train"]
    indices = split_indices(len(train.labels), present=frozenset(parts), section=section, seed=seed)
    if standardize:
        parts = standardized(parts, chosen=indices["train"])
    datasets = {
        part: TensorDataset(torch.from_numpy(arrays.inputs), torch.from_numpy(arrays.labels))
        for part, arrays in parts.items()
    }
    shape = tuple(train.inputs.shape[1:])
    return splits_from_datasets(datasets, indices, name=section.name, input_shape=shape, num_classes=num_classes)
