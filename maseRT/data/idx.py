"""Fashion-MNIST from its idx files (the format is described at the end of yann.lecun.com/exdb/mnist)."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from maseRT.config import DataSection
from maseRT.data.arrays import Arrays, image_arrays
from maseRT.data.files import data_path, idx_files
from maseRT.data.splits import Splits, splits_from_arrays
from maseRT.errors import UsageError

_UNSIGNED_BYTES = 8
_FIX = "fetch the file again"


def read_fashion_mnist(section: DataSection, *, seed: int) -> Splits:
    """Return 1x28x28 images in [0, 1] in 10 classes; the files' own test part is kept."""
    train_images, train_labels, test_images, test_labels = idx_files(data_path(section))
    parts = {
        "train": _part(train_images, train_labels, section),
        "test": _part(test_images, test_labels, section),
    }
    return splits_from_arrays(parts, section, seed=seed, num_classes=10)


def _part(images: Path, labels: Path, section: DataSection) -> Arrays:
    pixels = read_idx(images, dimensions=3)
    return image_arrays(pixels[:, None], read_idx(labels, dimensions=1), white=255, section=section, where=str(images))


def read_idx(path: Path, *, dimensions: int) -> npt.NDArray[np.uint8]:
    """Return the array of unsigned bytes in an idx file, gzipped or plain.

    Raises:
        UsageError: unreadable, truncated, another format, or another number of dimensions.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"cannot be read: {error}", where=str(path), fix=_FIX) from error
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4] != bytes((0, 0, _UNSIGNED_BYTES, dimensions)):
        what = f"not an idx file of unsigned bytes in {dimensions} dimensions: it begins with {content[:4].hex(' ')}"
        raise UsageError(what, where=str(path), fix=_FIX)
    shape = tuple(int(size) for size in np.frombuffer(content[4:header], dtype=">u4"))
    if len(content) - header != math.prod(shape):
        what = f"holds {len(content) - header} bytes after its header, which announces {list(shape)}"
        raise UsageError(what, where=str(path), fix=_FIX)
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)
