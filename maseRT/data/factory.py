"""A user's own data sets from `package.module:factory`, each sample checked when it is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from maseRT.config import DataSection
from maseRT.data.checks import held_labels, known_labels
from maseRT.data.splits import PARTS, Splits
from maseRT.errors import MaseRTError, UsageError
from maseRT.factories import call_factory

_FIX = "return (train, validation, test), each with __len__ and __getitem__ that gives an (input, label) pair"


class CheckedDataset(Dataset[tuple[Tensor, int]]):
    """A user's data set as (float32 tensor of one shape, int label) pairs; anything else is a UsageError.

    Inputs may be floating-point tensors or arrays, labels ints or integers of zero dimensions.
    """

    def __init__(self, dataset: Any, *, part: str, where: str) -> None:
        self.dataset = dataset
        self._shape: tuple[int, ...] | None = None
        self._part = part
        self._where = where

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            pair = self.dataset[index]
        except MaseRTError:
            raise
        except Exception as error:
            raise self._error(index, f"raised {type(error).__name__}: {error}") from error
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise self._error(index, f"is not an (input, label) pair but {_described(pair)}")
        sample, label = self._input(index, pair[0]), self._label(index, pair[1])
        return sample, label

    @property
    def labels(self) -> npt.NDArray[np.int64] | None:
        """The labels that the user's data set holds, unread; None when it holds none."""
        return held_labels(self.dataset)

    def sample_name(self, index: int) -> str:
        """Return what errors call the sample."""
        return f"sample {index} of the {self._part} data"

    def expect(self, shape: tuple[int, ...]) -> None:
        """Refuse samples of any other shape from now on."""
        self._shape = shape

    def _input(self, index: int, value: Any) -> Tensor:
        tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) and value.dtype.kind == "f" else value
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise self._error(index, f"has an input that is not a floating-point tensor but {_described(value)}")
        if self._shape is not None and tuple(tensor.shape) != self._shape:
            raise self._error(index, f"has shape {list(tensor.shape)}, the first one {list(self._shape)}")
        return tensor.detach().to(dtype=torch.float32)

    def _label(self, index: int, value: Any) -> int:
        if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise self._error(index, f"has a label that is not an integer but {_described(value)}")
        return int(value)

    def _error(self, index: int, what: str) -> UsageError:
        return UsageError(f"{self.sample_name(index)} {what}", where=self._where)


def read_factory(section: DataSection, *, seed: int) -> Splits:
    """Return the train, validation and test data sets that a call of [data] name gives, in a tuple or list.

    The number of classes is that of the training data's `classes`, else the largest of the labels that all three
    hold as `targets` or `labels` plus one, else None: samples are not read for it.

    Raises:
        UsageError: the factory fails (see `maseRT.factories`), or returns something else.
    """
    where = f"data set '{section.name}'"
    returned = call_factory(section.name, what="data set")
    if not isinstance(returned, tuple | list) or len(returned) != len(PARTS):
        raise UsageError(f"the factory returned {_described(returned)}", where=where, fix=_FIX)
    for part, dataset in zip(PARTS, returned, strict=True):
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise UsageError(f"the {part} data are {_described(dataset)}", where=where, fix=_FIX)
    checked = [CheckedDataset(data, part=part, where=where) for part, data in zip(PARTS, returned, strict=True)]
    train, validation, test = checked
    if len(train) == 0:
        raise UsageError("the training data are empty", where=where)
    shape = tuple(train[0][0].shape)
    for dataset in checked:
        dataset.expect(shape)
    classes = _class_count(checked)
    return Splits(section.name, train, validation, test, input_shape=shape, num_classes=classes)


def _class_count(parts: Sequence[CheckedDataset]) -> int | None:
    classes = getattr(parts[0].dataset, "classes", None)
    if isinstance(classes, tuple | list) and classes:
        return len(classes)
    known = [known_labels(part) for part in parts]
    found = [int(labels.max()) for labels in known if labels is not None and len(labels)]
    return max(found) + 1 if all(labels is not None for labels in known) else None


def _described(value: Any) -> str:
    """Return a value's type, with its length or shape and dtype where it has them."""
    text = f"a {type(value).__name__}"
    if isinstance(value, Tensor | np.ndarray):
        return f"{text} of shape {list(value.shape)} and type {value.dtype}"
    return f"{text} of length {len(value)}" if isinstance(value, tuple | list) else text
