"""The data sets by name, and the files each is read from. Torch-free: step keys are computed from here."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from maseRT.config import DataSection
from maseRT.errors import MissingError, UsageError, did_you_mean
from maseRT.factories import is_factory

Locate = Callable[[Path], list[Path]]
ImageParts = dict[str, dict[str, list[Path]]]

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
HDF5_SUFFIXES = (".h5", ".hdf5", ".z")
PART_NAMES: Mapping[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test",),
}
_CIFAR10_BATCHES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
_IDX_FILES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


@dataclass(frozen=True)
class Source:
    """A data set that a config can name.

    Attributes:
        reader: "module:function", called with the section and `seed=`; gives the `Splits`.
        locate: the files below [data] path, or a MissingError with the names looked for; None: needs no path.
        options: which of `path`, `mean`, `std` and `image_size` it uses.
    """

    reader: str
    locate: Locate | None
    options: frozenset[str]


def data_files(section: DataSection) -> list[Path]:
    """Return the files that the data are read from, for the step key (path, size, mtime); [] for embedded data.

    A user's factory opens what it likes: the files below [data] path count when that is given. Its code is another
    matter (`maseRT.user_code`).

    Raises:
        UsageError: the name is not in the table, or a path is missing from the config.
        MissingError: files are not there; says which were looked for, and where.
    """
    source = find_source(section)
    if source.locate is None:
        return []
    if section.path is None and is_factory(section.name):
        return []
    return source.locate(data_path(section))


def find_source(section: DataSection) -> Source:
    """Return the table's entry for [data] name, after a check that every option given is one it uses."""
    source = FACTORY if is_factory(section.name) else SOURCES.get(section.name)
    if source is None:
        hint = did_you_mean(section.name, list(SOURCES))
        fix = "name one of the table, or package.module:factory for your own"
        raise UsageError(f"there is no data set '{section.name}'{hint}", where="[data] name", fix=fix)
    for option in ("path", "mean", "std", "image_size"):
        if getattr(section, option) is not None and option not in source.options:
            users = ", ".join(name for name, other in SOURCES.items() if option in other.options)
            fix = f"remove it; it is for {users}"
            raise UsageError(f"{section.name} does not use {option}", where=f"[data] {option}", fix=fix)
    return source


def data_path(section: DataSection) -> Path:
    """Return [data] path with `~` expanded.

    Raises:
        UsageError: no path is given, or it cannot be read.
        MissingError: there is nothing at the path, or an empty folder.
    """
    if section.path is None:
        fix = _PATH_HINTS.get(section.name, 'add path = "..."')
        raise UsageError(f"{section.name} is read from files, and no path is given", where="[data] path", fix=fix)
    path = section.path.expanduser()
    where = f"[data] path = {path}"
    try:
        path.stat()
        if path.is_dir() and not any(path.iterdir()):
            raise MissingError("the folder is empty", where=where, fix=_hint(section.name))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingError("no such file or folder", where=where, fix=_hint(section.name)) from error
    except OSError as error:
        raise _unreadable(error, path) from error
    return path


def idx_files(path: Path) -> list[Path]:
    """Return the training images and labels, then the test images and labels, of an MNIST-like data set."""
    wanted = [_idx_spellings(stem) for stem in _IDX_FILES]
    return _find_all(path, folders=("", "raw", "FashionMNIST/raw"), wanted=wanted, name="fashion-mnist")


def _idx_spellings(stem: str) -> tuple[str, ...]:
    """Return the names a file has on the mirrors: train-images-idx3-ubyte, train-images.idx3-ubyte, with .gz or not."""
    start, _, kind = stem.rpartition("-")
    return tuple(f"{start}{mark}{kind}-ubyte{end}" for mark in "-." for end in ("", ".gz"))


def cifar10_files(path: Path) -> list[Path]:
    """Return data_batch_1 to data_batch_5, then test_batch; also from inside cifar-10-batches-py/."""
    wanted = [(name,) for name in _CIFAR10_BATCHES]
    return _find_all(path, folders=("", "cifar-10-batches-py"), wanted=wanted, name="cifar10")


def jsc_file(path: Path) -> list[Path]:
    """Return the one .h5, .npz or .arff file."""
    return [_find_table(path, suffixes=(*HDF5_SUFFIXES, ".npz", ".arff"), name="jsc")]


def npz_file(path: Path) -> list[Path]:
    """Return the one .npz file."""
    return [_find_table(path, suffixes=(".npz",), name="npz")]


def image_files(path: Path) -> list[Path]:
    """Return every image of an image-folder."""
    return [file for classes in image_parts(path).values() for files in classes.values() for file in files]


def any_files(path: Path) -> list[Path]:
    """Return the file itself, or every file below a folder, in a fixed order."""
    return _walk(path) if path.is_dir() else [path]


def image_parts(path: Path) -> ImageParts:
    """Return part -> class -> images of a folder with class sub-folders, optionally below train/, val/ and test/.

    Classes and files are sorted by name, sub-folders of a class are searched too, and hidden entries are not.

    Raises:
        MissingError: not a folder, no class folders, or a training class without an image.
        UsageError: part folders without train/.
    """
    where = f"[data] path = {path}"
    if not path.is_dir():
        raise MissingError("not a folder", where=where, fix=_hint("image-folder"))
    folders = {folder.name: folder for folder in _subfolders(path)}
    named = {part: folders[name] for part, names in PART_NAMES.items() for name in names if name in folders}
    if "train" in named:
        return {part: _classes_in(folder, required=part == "train") for part, folder in named.items()}
    if named and len(named) == len(folders):
        fix = "name the folder of the training images train/, with one sub-folder for each class"
        raise UsageError(f"has {', '.join(sorted(folders))} but no train folder", where=where, fix=fix)
    return {"train": _classes_in(path, required=True)}


def _subfolders(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _classes_in(folder: Path, *, required: bool) -> dict[str, list[Path]]:
    where = f"[data] path = {folder}"
    classes = {
        sub.name: [file for file in _walk(sub) if file.suffix.lower() in IMAGE_SUFFIXES] for sub in _subfolders(folder)
    }
    if required and not classes:
        raise MissingError("holds no class folders", where=where, fix=_hint("image-folder"))
    empty = [name for name, files in classes.items() if not files]
    if required and empty:
        what = f"no image in {', '.join(empty)}; looked for {' '.join(sorted(IMAGE_SUFFIXES))}"
        raise MissingError(what, where=where, fix="add images, or remove the folder")
    return classes


def _walk(folder: Path) -> list[Path]:
    """Return the files below a folder, sorted, without hidden ones; linked folders are followed.

    Raises:
        UsageError: a folder cannot be read, or is reached twice, so that its files would count twice.
    """
    found: list[Path] = []
    seen: set[str] = set()
    for base, folders, names in os.walk(folder, followlinks=True, onerror=_raise_unreadable):
        real = os.path.realpath(base)
        if real in seen:
            raise UsageError(f"a link leads to {real} a second time", where=base, fix="remove the link")
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(base, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _raise_unreadable(error: OSError) -> None:
    raise _unreadable(error, error.filename) from error


def _unreadable(error: OSError, path: Path | str) -> UsageError:
    return UsageError(f"cannot be read: {error.strerror}", where=str(path), fix="check the path and its permissions")


def _find_all(path: Path, *, folders: Sequence[str], wanted: Sequence[tuple[str, ...]], name: str) -> list[Path]:
    """Return one file for each tuple of spellings, from the first of `folders` that holds them all."""
    where = f"[data] path = {path}"
    if not path.is_dir():
        raise MissingError("not a folder", where=where, fix=_hint(name))
    tried = [[_first(path / sub, words) for words in wanted] for sub in folders]
    for files in tried:
        found = [file for file in files if file is not None]
        if len(found) == len(wanted):
            return found
    nearest = min(tried, key=lambda files: files.count(None))
    missing = ", ".join(words[0] for words, file in zip(wanted, nearest, strict=True) if file is None)
    inside = ", ".join(str(path / sub) for sub in folders)
    raise MissingError(f"{missing} not found; looked in {inside}", where=where, fix=_hint(name))


def _first(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _find_table(path: Path, *, suffixes: tuple[str, ...], name: str) -> Path:
    where = f"[data] path = {path}"
    if path.is_file():
        if path.suffix.lower() not in suffixes:
            raise UsageError(f"'{path.suffix}' is not one of {' '.join(suffixes)}", where=where, fix=_hint(name))
        return path
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in suffixes)
    if not found:
        raise MissingError(
            f"holds no file named {' '.join(f'*{end}' for end in suffixes)}", where=where, fix=_hint(name)
        )
    if len(found) > 1:
        listed = ", ".join(file.name for file in found)
        raise UsageError(f"holds several files: {listed}", where=where, fix="name one of them in path")
    return found[0]


_PATH_HINTS = {
    "fashion-mnist": "give the folder of train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and "
    "t10k-labels-idx1-ubyte (plain or .gz); Debian: apt install dataset-fashion-mnist, then "
    'path = "/usr/share/datasets/fashion-mnist"',
    "cifar10": "unpack cifar-10-python.tar.gz and give the folder of data_batch_1 to data_batch_5 and test_batch",
    "jsc": "give the OpenML set hls4ml_lhc_jets_hlf as an .arff, .h5 or .npz file",
    "npz": "give an .npz file with the arrays x and y, or x_train, y_train and so on",
    "image-folder": "give a folder with one sub-folder of images for each class; train/, val/ and test/ may be above",
}


def _hint(name: str) -> str:
    return _PATH_HINTS.get(name, "check the path")


_PATH = frozenset({"path"})
_COLOURS = frozenset({"mean", "std"})
FACTORY = Source("maseRT.data.factory:read_factory", any_files, _PATH)
SOURCES: Mapping[str, Source] = {
    "digits": Source("maseRT.data.digits:read_digits", None, _COLOURS),
    "fashion-mnist": Source("maseRT.data.idx:read_fashion_mnist", idx_files, _PATH | _COLOURS),
    "cifar10": Source("maseRT.data.cifar10:read_cifar10", cifar10_files, _PATH | _COLOURS),
    "jsc": Source("maseRT.data.jsc:read_jsc", jsc_file, _PATH),
    "npz": Source("maseRT.data.npz:read_npz", npz_file, _PATH),
    "image-folder": Source(
        "maseRT.data.image_folder:read_image_folder", image_files, _PATH | _COLOURS | {"image_size"}
    ),
}
