"""Jet-substructure classification: 16 features of a jet, 5 classes; standardised with training statistics.

The set is hls4ml_lhc_jets_hlf (OpenML 42468), or the HDF5 files it was made from (Zenodo 2602260 and the earlier
table t_allpar_new). Classes are numbered g, q, w, z, t, in the order of those files' label columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from maseRT.config import DataSection
from maseRT.data.arrays import check_same_shape, checked_arrays
from maseRT.data.files import HDF5_SUFFIXES, data_path, jsc_file
from maseRT.data.npz import ArrayPair, array_pairs, read_npz_arrays
from maseRT.data.splits import Splits, splits_from_arrays
from maseRT.errors import MissingError, UsageError, did_you_mean

FEATURES = (
    "zlogz",
    "c1_b0_mmdt",
    "c1_b1_mmdt",
    "c1_b2_mmdt",
    "c2_b1_mmdt",
    "c2_b2_mmdt",
    "d2_b1_mmdt",
    "d2_b2_mmdt",
    "d2_a1_b1_mmdt",
    "d2_a1_b2_mmdt",
    "m2_b1_mmdt",
    "m2_b2_mmdt",
    "n2_b1_mmdt",
    "n2_b2_mmdt",
    "mass_mmdt",
    "multiplicity",
)
CLASSES = ("g", "q", "w", "z", "t")
_TARGET = "class"

Columns = Mapping[str, npt.NDArray[Any]]


def read_jsc(section: DataSection, *, seed: int) -> Splits:
    """Return 16 standardised features in 5 classes.

    Files hold either columns by name (arff, HDF5 tables; a leading "j_" is dropped) or the arrays x [N, 16] and y
    (npz, HDF5), whose labels are class numbers, letters or one-hot rows. HDF5 tables have a row for each particle
    of a jet: repeated rows are kept once.
    """
    (path,) = jsc_file(data_path(section))
    if path.suffix.lower() == ".arff":
        pairs = {"train": _pair_from_columns(_read_arff(path), where=str(path))}
    elif path.suffix.lower() in HDF5_SUFFIXES:
        pairs = _read_hdf5(path)
    else:
        pairs = array_pairs(read_npz_arrays(path), where=str(path))
    parts = {}
    for part, (inputs, labels) in pairs.items():
        where = f"{path} ({part})"
        if inputs.ndim != 2 or inputs.shape[1] != len(FEATURES):
            what = f"the inputs have shape {list(inputs.shape)}, not [samples, {len(FEATURES)}]"
            raise UsageError(what, where=where)
        parts[part] = checked_arrays(inputs, class_numbers(labels, where=where), where=where)
    check_same_shape(parts, where=str(path))
    return splits_from_arrays(parts, section, seed=seed, num_classes=len(CLASSES), standardize=True)


def class_numbers(labels: npt.NDArray[Any], *, where: str) -> npt.NDArray[Any]:
    """Return labels given as letters (g, q, w, z, t; also "j_g") or one-hot rows [N, 5] as class numbers [N].

    Raises:
        UsageError: another letter, or rows that are not one-hot.
    """
    if labels.ndim == 2 and labels.shape[1] == len(CLASSES):
        wrong = ~((labels == 1).sum(axis=1) == 1)
        if wrong.any():
            raise UsageError(f"sample {int(wrong.argmax())} does not belong to exactly one class", where=where)
        return np.asarray(labels.argmax(axis=1))
    if labels.dtype.kind not in "SU":
        return labels
    words = np.char.lower(labels.astype(str))
    words = np.char.replace(np.char.strip(words, " '\""), "j_", "")
    unknown = sorted(set(words.tolist()) - set(CLASSES))
    if unknown:
        raise UsageError(f"'{unknown[0]}' is no class of this set{did_you_mean(unknown[0], CLASSES)}", where=where)
    numbers = np.zeros(len(words), dtype=np.int64)
    for number, name in enumerate(CLASSES):
        numbers[words == name] = number
    return numbers


def _pair_from_columns(columns: Columns, *, where: str) -> ArrayPair:
    missing = [name for name in FEATURES if name not in columns]
    if missing:
        raise UsageError(f"lacks the columns {', '.join(missing)}", where=where, fix="use OpenML's hls4ml_lhc_jets_hlf")
    inputs = np.stack([columns[name] for name in FEATURES], axis=1)
    if _TARGET in columns:
        return inputs, columns[_TARGET]
    if all(name in columns for name in CLASSES):
        return inputs, np.stack([columns[name] for name in CLASSES], axis=1)
    raise UsageError(f"has neither a column {_TARGET} nor the columns {', '.join(CLASSES)}", where=where)


def _read_arff(path: Path) -> Columns:
    from scipy.io import arff

    try:
        table, meta = arff.loadarff(path)
    except (OSError, ValueError, NotImplementedError, StopIteration, UnicodeDecodeError, arff.ArffError) as error:
        raise UsageError(f"cannot be read as arff: {error}", where=str(path), fix="fetch the file again") from error
    return {_plain(name): table[name] for name in meta.names()}


def _plain(column: str) -> str:
    return column.removeprefix("j_")


def _read_hdf5(path: Path) -> dict[str, ArrayPair]:
    try:
        import h5py
    except ImportError as error:
        fix = 'pip install "maseRT[h5]"'
        raise MissingError("reading HDF5 needs the package h5py", where=str(path), fix=fix) from error
    try:
        with h5py.File(path, "r") as file:
            columns = _hdf5_columns(file)
            arrays = (
                {} if columns else {name: np.asarray(item) for name, item in file.items() if hasattr(item, "shape")}
            )
    except (OSError, RuntimeError) as error:
        raise UsageError(f"cannot be read as HDF5: {error}", where=str(path), fix="fetch the file again") from error
    if columns is None:
        return array_pairs(arrays, where=str(path))
    return {"train": _unrepeated(_pair_from_columns(columns, where=str(path)))}


def _hdf5_columns(file: Any) -> Columns | None:
    """Return the columns of a table, of one data set each, or of a matrix `jets` with its `jetFeatureNames`.

    None: the file has none of these.
    """
    wanted = {*FEATURES, *CLASSES, _TARGET}
    for table in file.values():
        names = getattr(getattr(table, "dtype", None), "names", None)
        if names:
            kept = [name for name in names if _plain(name) in wanted]
            rows = table.fields(kept)[()] if kept else {}
            return {_plain(name): rows[name] for name in kept}
    if all(any(name in file for name in (feature, f"j_{feature}")) for feature in FEATURES):
        return {_plain(name): file[name][()] for name in file if _plain(name) in wanted}
    if "jets" in file and "jetFeatureNames" in file:
        matrix = file["jets"][()]
        names = [name.decode() if isinstance(name, bytes) else str(name) for name in file["jetFeatureNames"][()]]
        return {_plain(name): matrix[:, index] for index, name in enumerate(names) if _plain(name) in wanted}
    return None


def _unrepeated(pair: ArrayPair) -> ArrayPair:
    inputs, labels = pair
    codes = labels if labels.ndim == 2 else np.unique(labels, return_inverse=True)[1][:, None]
    _, first = np.unique(np.concatenate([inputs, codes], axis=1), axis=0, return_index=True)
    first.sort()
    return inputs[first], labels[first]
