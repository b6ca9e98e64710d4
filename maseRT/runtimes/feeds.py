"""Feeds: named numpy arrays or torch tensors, checked against what a session takes. Torch itself is never imported."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
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


def check_feed(feed: Mapping[str, Any], specs: Sequence[TensorSpec], *, where: str) -> None:
    """Check names, kinds, dtypes and shapes.

    Raises:
        UsageError: the feed is not what the session takes; says what it takes.
    """
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


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(
        want is None or size == want for size, want in zip(shape, wanted, strict=True)
    )
