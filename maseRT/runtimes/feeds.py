"""Feeds: named numpy arrays or torch tensors, checked against what a session takes. Torch itself is never imported."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from maseRT.errors import UsageError
from maseRT.runtimes.base import TensorSpec

Array = npt.NDArray[Any]


def is_torch(value: Any) -> bool:
    """Tell whether a value is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def dtype_name(value: Any) -> str:
    """Return the dtype of an array or tensor by numpy's name, such as "float32"."""
    return str(value.dtype).removeprefix("torch.")


def arrays_fit(feed: Mapping[str, Any], specs: Sequence[TensorSpec]) -> bool:
    """Tell whether a feed is of numpy arrays and fits; where not, `check_feed` says why, or lets it pass.

    It takes a microsecond: some models take ten.
    """
    if len(feed) != len(specs):
        return False
    for spec in specs:
        value, dtype = feed.get(spec.name), _numpy_dtype(spec.dtype)
        if type(value) is not np.ndarray or dtype is None or value.dtype != dtype:
            return False
        if spec.shape is not None and not _fits(value.shape, spec.shape):
            return False
    return True


def check_feed(feed: Mapping[str, Any], specs: Sequence[TensorSpec], *, where: str) -> None:
    """Check names, kinds, dtypes and shapes.

    Raises:
        UsageError: the feed is not what the session takes; says what it takes.
    """
    if arrays_fit(feed, specs):
        return
    names = [spec.name for spec in specs]
    if set(feed) != set(names):
        raise UsageError(f"got inputs {sorted(feed)}, takes {names}", where=where)
    for spec in specs:
        value = feed[spec.name]
        if not (isinstance(value, np.ndarray) or is_torch(value)):
            kind = type(value).__name__
            raise UsageError(f"input '{spec.name}' is a {kind}, not a numpy array or torch tensor", where=where)
        if dtype_name(value) != spec.dtype:
            raise UsageError(f"input '{spec.name}' is {dtype_name(value)}, not {spec.dtype}", where=where)
        if spec.shape is not None and not _fits(tuple(value.shape), spec.shape):
            wanted = ", ".join("any" if size is None else str(size) for size in spec.shape)
            raise UsageError(f"input '{spec.name}' has shape {list(value.shape)}, not [{wanted}]", where=where)


def to_numpy(value: Any) -> Array:
    """Return an array or tensor as a numpy array; copied to the host if it is not there."""
    array: Array = value.detach().cpu().numpy() if is_torch(value) else value
    return array


def like_feed(outputs: Mapping[str, Array], feed: Mapping[str, Any]) -> dict[str, Any]:
    """Return outputs as they are or, where torch tensors were fed, as torch tensors on their device."""
    fed = next(iter(feed.values()))
    if not is_torch(fed):
        return dict(outputs)
    torch = sys.modules["torch"]
    return {name: torch.from_numpy(array).to(fed.device) for name, array in outputs.items()}


@cache
def _numpy_dtype(name: str) -> np.dtype[Any] | None:
    try:
        return np.dtype(name)
    except TypeError:  # such as bfloat16
        return None


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    if len(shape) != len(wanted):
        return False
    for size, want in zip(shape, wanted, strict=True):  # noqa: SIM110  (a generator takes three times as long)
        if want is not None and size != want:
            return False
    return True
