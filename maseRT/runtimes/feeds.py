"""Feeds: named numpy arrays or torch tensors, checked against what a session takes. Torch itself is never imported."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from maseRT.errors import UsageError
from maseRT.runtimes.base import TensorSpec

Array = npt.NDArray[Any]

_IDS = ("int32", "int64")


def is_torch(value: Any) -> bool:
    """Tell whether a value is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray)


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
        if not (_is_array(value) or is_torch(value)):
            kind = type(value).__name__
            raise UsageError(f"input '{spec.name}' is a {kind}, not a numpy array or torch tensor", where=where)
        if dtype_name(value) != spec.dtype:
            what = f"input '{spec.name}' is {dtype_name(value)}, not {spec.dtype}"
            raise UsageError(what, where=where, fix=_conversion(value, spec.dtype))
        if spec.shape is not None and not _fits(tuple(value.shape), spec.shape):
            wanted = ", ".join("any" if size is None else str(size) for size in spec.shape)
            raise UsageError(f"input '{spec.name}' has shape {list(value.shape)}, not [{wanted}]", where=where)


def _conversion(value: Any, dtype: str) -> str:
    """Return how to convert an input to the type that is taken; "" where numpy has no such type."""
    if _numpy_dtype(dtype) is None:
        return ""
    return f"give it as .to(torch.{dtype})" if is_torch(value) else f'give it as .astype("{dtype}")'


def signature(feed: Mapping[str, Any], specs: Sequence[TensorSpec]) -> Hashable:
    """Return what decides whether and how a feed is taken, all but the values: feeds of one signature share the answer.

    It is None where the number of names is another one.

    Raises:
        AttributeError: something fed is no array.
    """
    if len(feed) != len(specs):
        return None
    values: list[Any] = [feed.get(spec.name) for spec in specs]
    return tuple([(type(value), value.shape, value.dtype, value.device) for value in values])


def with_ids_as_taken(feed: Mapping[str, Any], specs: Sequence[TensorSpec], *, where: str) -> Mapping[str, Any]:
    """Return a feed whose ids, int32 or int64, have the one of these types that the session takes; all else stays.

    TensorRT 8 knows no int64: its engines take int32 in place of it.

    Raises:
        UsageError: an id is too large for int32.
    """
    taken = {spec.name: spec.dtype for spec in specs if spec.dtype in _IDS}
    given = {name: value for name, value in feed.items() if name in taken and (_is_array(value) or is_torch(value))}
    changed = {
        name: _ids_as(value, taken[name], name=name, where=where)
        for name, value in given.items()
        if dtype_name(value) in _IDS and dtype_name(value) != taken[name]
    }
    return {**feed, **changed} if changed else feed


def _ids_as(value: Any, dtype: str, *, name: str, where: str) -> Any:
    limits = np.iinfo(dtype)
    count = value.numel() if is_torch(value) else value.size
    if count and not limits.min <= int(value.min()) <= int(value.max()) <= limits.max:
        what = f"input '{name}' holds ids from {int(value.min())} to {int(value.max())}"
        raise UsageError(f"{what}; {dtype}, which it takes, ends at {limits.max}", where=where)
    return value.to(getattr(sys.modules["torch"], dtype)) if is_torch(value) else value.astype(dtype)


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
