"""CIFAR-10 from the original Python batches (www.cs.toronto.edu/~kriz/cifar.html), unpickled without trusting them."""

from __future__ import annotations

import codecs
import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from maseRT.config import DataSection
from maseRT.data.arrays import Arrays, image_arrays
from maseRT.data.files import cifar10_files, data_path
from maseRT.data.splits import Splits, splits_from_arrays
from maseRT.errors import UsageError

_FIX = "unpack cifar-10-python.tar.gz again"


def read_cifar10(section: DataSection, *, seed: int) -> Splits:
    """Return 3x32x32 RGB images in [0, 1] in 10 classes; the files' own test part is kept."""
    *train, test = cifar10_files(data_path(section))
    parts = {"train": _part(train, section), "test": _part([test], section)}
    return splits_from_arrays(parts, section, seed=seed, num_classes=10)


def _part(files: Sequence[Path], section: DataSection) -> Arrays:
    batches = [read_batch(file) for file in files]
    pixels = np.concatenate([pixels for pixels, _ in batches]).reshape(-1, 3, 32, 32)
    labels = np.concatenate([labels for _, labels in batches])
    return image_arrays(pixels, labels, white=255, section=section, where=str(files[0].parent))


def read_batch(path: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return the pixels [N, 3072] and labels [N] of one batch file.

    Raises:
        UsageError: unreadable, truncated, no such batch, or a pickle that holds more than arrays and plain values.
    """
    try:
        batch = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except UsageError as error:
        raise UsageError(error.what, where=str(path), fix=error.fix) from error
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to say
        raise UsageError(f"cannot be read: {type(error).__name__}: {error}", where=str(path), fix=_FIX) from error
    pixels, labels = _fields(batch, path)
    if (
        pixels.ndim != 2
        or pixels.shape[1] != 3 * 32 * 32
        or pixels.dtype != np.uint8
        or labels.shape != pixels.shape[:1]
    ):
        got = f"data {list(pixels.shape)} of {pixels.dtype} and labels {list(labels.shape)}"
        raise UsageError(f"holds {got}, not data [N, 3072] of uint8 and labels [N]", where=str(path), fix=_FIX)
    return pixels, labels


def _fields(batch: Any, path: Path) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    fields = {_text(key): value for key, value in batch.items()} if isinstance(batch, dict) else {}
    try:
        return np.asarray(fields["data"]), np.asarray(fields["labels"], dtype=np.int64)
    except (KeyError, TypeError, ValueError) as error:
        what = f"not a CIFAR-10 batch: no data and labels, but {', '.join(fields) or type(batch).__name__}"
        raise UsageError(what, where=str(path), fix=_FIX) from error


def _text(key: Any) -> str:
    return key.decode("latin-1") if isinstance(key, bytes) else str(key)


# NumPy moved its rebuilding functions; the original files name the old place.
_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
    ("numpy._core.multiarray", "_reconstruct"): np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
    ("numpy._core.numeric", "_frombuffer"): np._core.numeric._frombuffer,  # type: ignore[attr-defined]
    ("_codecs", "encode"): codecs.encode,
    ("builtins", "bytes"): bytes,
    ("builtins", "bytearray"): bytearray,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Admits NumPy arrays, bytes and plain containers, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            what = f"the pickle asks for {module}.{name}, which a CIFAR-10 batch does not need; it was not loaded"
            raise UsageError(what, fix="use the original files")
        return _ADMITTED[module, name]
