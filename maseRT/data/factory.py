"""A user's own data sets from `package.module:factory`, each sample checked when it is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from maseRT.config import DataSection
from maseRT.data.arrays import ID_TYPES
from maseRT.data.checks import held_labels, known_labels
from maseRT.data.splits import PARTS, Splits
from maseRT.errors import MaseRTError, UsageError
from maseRT.factories import call_factory

_FIX = "return (train, validation, test), each with __len__ and __getitem__ that gives an (input, target) pair"
_JOINED = (
    "join the inputs into one tensor, such as torch.cat([image.flatten(), numbers]), and let a wrapper of the model "
    "take it apart; a padding mask can be told from padded ids, such as ids != 0"
)
_SHAPE_FIX = "pad, crop or resize all samples to one shape; a model can tell padding from a value that nothing else has"
_REREAD = 3
_ID_TYPES = tuple(getattr(torch, name) for name in ID_TYPES)

Target = int | Tensor


class CheckedDataset(Dataset[tuple[Tensor, Target]]):
    """A user's data set as (tensor of one shape and type, target) pairs; anything else is a UsageError.

    Inputs may be tensors or arrays: floating-point ones are given as float32, int32 and int64 ones, which are ids such
    as tokens, as they are. Targets may be ints or integers of zero dimensions, which are given
    as ints, or floats, tensors and arrays, which are given as float32 or int64 tensors; all of one kind and shape.
    """

    def __init__(self, dataset: Any, *, part: str, where: str) -> None:
        self.dataset = dataset
        self._shape: tuple[int, ...] | None = None
        self._type: torch.dtype | None = None
        self._target_like = ""
        self._part = part
        self._where = where

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        try:
            pair = self.dataset[index]
        except MaseRTError:
            raise
        except Exception as error:
            raise self._error(index, f"raised {type(error).__name__}: {error}") from error
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise self._error(index, f"is not an (input, target) pair but {_described(pair)}", fix=_FIX)
        sample, target = self._input(index, pair[0]), self._target(index, pair[1])
        return sample, target

    @property
    def labels(self) -> npt.NDArray[np.int64] | None:
        """The labels that the user's data set holds, unread; None when it holds none."""
        return held_labels(self.dataset)

    @property
    def inputs(self) -> Tensor | None:
        """The inputs that the user's data set holds, unread; None when it is no TensorDataset."""
        return self.dataset.tensors[0] if type(self.dataset) is TensorDataset else None

    def sample_name(self, index: int) -> str:
        """Return what errors call the sample."""
        return f"sample {index} of the {self._part} data"

    def expect(self, sample: tuple[Tensor, Target]) -> None:
        """Refuse inputs of any other shape or type, and targets of any other kind or shape, from now on."""
        self._shape = tuple(sample[0].shape)
        self._type = sample[0].dtype
        self._target_like = _like(sample[1])

    def _input(self, index: int, value: Any) -> Tensor:
        tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) and value.dtype.kind in "fi" else value
        if not isinstance(tensor, Tensor) or not (tensor.is_floating_point() or tensor.dtype in _ID_TYPES):
            what = f"has an input that is not one tensor of floats or of int32 or int64 ids but {_described(value)}"
            raise self._error(index, what, fix=_input_fix(value))
        if self._shape is not None and tuple(tensor.shape) != self._shape:
            what = f"has shape {list(tensor.shape)}, the first one {list(self._shape)}"
            raise self._error(index, what, fix=_SHAPE_FIX)
        checked = tensor.detach().to(dtype=torch.float32) if tensor.is_floating_point() else tensor.detach()
        if self._type not in (None, checked.dtype):
            raise self._error(index, f"is {_type_name(checked.dtype)}, the first one {_type_name(self._type)}")
        if not torch.isfinite(checked).all():
            raise self._error(index, "holds NaN or infinite values", fix="remove or repair the sample")
        return checked

    def _target(self, index: int, value: Any) -> Target:
        target = _as_target(value)
        if target is None:
            raise self._error(index, f"has a target that is no number and no tensor of numbers but {_described(value)}")
        if isinstance(target, Tensor) and not torch.isfinite(target).all():
            raise self._error(index, "has a target with NaN or infinite values")
        if self._target_like and _like(target) != self._target_like:
            raise self._error(index, f"has a target of another form, {_like(target)}; the first: {self._target_like}")
        return target

    def check_repeats(self) -> None:
        """Read the first samples twice.

        Raises:
            UsageError: one is another one each time, so that models could not be compared on the same samples.
        """
        for index in range(min(len(self), _REREAD)):
            (first, target), (again, other) = self[index], self[index]
            if not (torch.equal(first, again) and torch.equal(torch.as_tensor(target), torch.as_tensor(other))):
                fix = "keep random augmentation to the training data"
                raise self._error(index, "is another one each time it is read", fix=fix)

    def _error(self, index: int, what: str, *, fix: str = "") -> UsageError:
        return UsageError(f"{self.sample_name(index)} {what}", where=self._where, fix=fix)


def read_factory(section: DataSection, *, seed: int) -> Splits:
    """Return the train, validation and test data sets that a call of [data] name gives, in a tuple or list.

    The number of classes is that of the training data's `classes`, else the largest of the labels that all three
    hold as `targets` or `labels` plus one, else None: samples are not read for it. Where targets are floats, it is how
    many of them a sample has.

    Raises:
        UsageError: the factory fails (see `maseRT.factories`), returns something else, or validation or test data that
            differ each time.
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
    first = train[0]
    for dataset in checked:
        dataset.expect(first)
    for dataset in (validation, test):
        dataset.check_repeats()
    outputs = _output_count(checked, first[1])
    return Splits(section.name, train, validation, test, input_shape=tuple(first[0].shape), num_classes=outputs)


def _input_fix(value: Any) -> str:
    parts = value if isinstance(value, tuple | list) else ()
    several = isinstance(value, Mapping) or any(isinstance(part, Tensor | np.ndarray) for part in parts)
    return _JOINED if several else "give it as floats, such as image.float() / 255 of integers"


def _as_target(value: Any) -> Target | None:
    """Return a label as an int and other numbers as a float32 or int64 tensor; None for anything else."""
    if isinstance(value, bool | np.bool_):
        return None
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return torch.tensor(value, dtype=torch.float32)
    if isinstance(value, np.ndarray) and value.dtype.kind in "iuf":
        value = torch.from_numpy(value)
    if not isinstance(value, Tensor) or value.dtype is torch.bool or value.is_complex():
        return None
    tensor: Tensor = value.detach().cpu()
    if tensor.is_floating_point():
        return tensor.to(dtype=torch.float32)
    return int(tensor) if tensor.dim() == 0 else tensor.to(dtype=torch.int64)


def _type_name(kind: torch.dtype | None) -> str:
    return str(kind).removeprefix("torch.")


def _like(target: Target) -> str:
    """Return a target's kind and shape in words."""
    if isinstance(target, int):
        return "an integer"
    return f"{'floats' if target.is_floating_point() else 'integers'} of shape {list(target.shape)}"


def _output_count(parts: Sequence[CheckedDataset], target: Target) -> int | None:
    if isinstance(target, Tensor) and target.is_floating_point():
        return target.numel()
    classes = getattr(parts[0].dataset, "classes", None)
    if isinstance(classes, tuple | list) and classes:
        return len(classes)
    if isinstance(target, Tensor):
        return None
    known = [known_labels(part) for part in parts]
    found = [int(labels.max()) for labels in known if labels is not None and len(labels)]
    return max(found) + 1 if all(labels is not None for labels in known) else None


def _described(value: Any) -> str:
    """Return a value's type, with its length or shape and dtype where it has them."""
    text = f"a {type(value).__name__}"
    if isinstance(value, Tensor | np.ndarray):
        return f"{text} of shape {list(value.shape)} and type {value.dtype}"
    return f"{text} of length {len(value)}" if isinstance(value, tuple | list) else text
