"""Any data set as arrays in an .npz file."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from maseRT.config import DataSection
from maseRT.data.arrays import check_same_shape, checked_arrays, outputs_for
from maseRT.data.files import PART_NAMES, data_path, npz_file
from maseRT.data.splits import Splits, splits_from_arrays
from maseRT.errors import UsageError

ArrayPair = tuple[npt.NDArray[Any], npt.NDArray[Any]]


def read_npz(section: DataSection, *, seed: int) -> Splits:
    """Return the arrays x [N, ...] and y [N] or [N, ...], or x_train, y_train, x_val, y_val, x_test and y_test.

    Inputs of int32 or int64 are ids, such as tokens, and stay as they are; all others, uint8 images too, and
    floating-point targets become float32, integer targets int64. There are as many classes as the largest label plus
    one.
    Parts that are not there are cut off the training data. Validation may be spelled val, valid or validation.
    """
    (path,) = npz_file(data_path(section))
    pairs = array_pairs(read_npz_arrays(path), where=str(path))
    parts = {
        part: checked_arrays(*pair, where=f"{path} ({part})", any_targets=True, ids=True)
        for part, pair in pairs.items()
    }
    check_same_shape(parts, where=str(path))
    return splits_from_arrays(parts, section, seed=seed, num_classes=outputs_for(parts.values()))


def read_npz_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Return every array of an .npz file, by name.

    Raises:
        UsageError: unreadable, damaged, or Python objects instead of numbers (those are not unpickled).
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, AttributeError, TypeError) as error:
        raise UsageError(
            f"cannot be read: {error}", where=str(path), fix="write it with numpy.savez(path, x=x, y=y)"
        ) from error


def array_pairs(arrays: Mapping[str, npt.NDArray[Any]], *, where: str) -> dict[str, ArrayPair]:
    """Return part -> (inputs, labels) of arrays named x and y, or x_train, y_train and so on (X too).

    Raises:
        UsageError: no training pair, one array of a pair without the other, or arrays that belong to no pair.
    """
    named = {name.lower(): array for name, array in arrays.items()}
    suffixes = {"train": ("", *(f"_{name}" for name in PART_NAMES["train"]))}
    suffixes |= {part: tuple(f"_{name}" for name in PART_NAMES[part]) for part in ("validation", "test")}
    pairs = {
        part: (named.pop(f"x{end}"), named.pop(f"y{end}"))
        for part, ends in suffixes.items()
        for end in ends
        if f"x{end}" in named and f"y{end}" in named
    }
    if "train" not in pairs or named:
        left = f"; left over: {', '.join(named)}" if named and "train" in pairs else ""
        what = (
            f"holds {', '.join(arrays) or 'no arrays'}{left}; looked for x and y, or x_train and y_train (_val, _test)"
        )
        raise UsageError(what, where=where, fix="numpy.savez(path, x=x, y=y) writes such a file")
    return pairs
