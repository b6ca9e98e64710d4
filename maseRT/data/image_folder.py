"""Images in class folders, read when they are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from maseRT.config import DataSection
from maseRT.data.arrays import normalization
from maseRT.data.files import data_path, image_parts
from maseRT.data.splits import Splits, split_indices, splits_from_datasets
from maseRT.errors import UsageError, did_you_mean

_DEFAULT_SIZE = 224
_EIGHT_BIT_MODES = frozenset(
    {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}
)


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """Images as float32 [C, size, size]: the central square, resized (bilinear, antialiased).

    Args:
        files: the images; `labels` their class numbers.
        channels: 3 for RGB, 1 for grey; every image is converted.
        scaling: mean and std [C, 1, 1] applied to values in [0, 1].
    """

    def __init__(
        self,
        files: Sequence[Path],
        labels: Sequence[int],
        *,
        size: int,
        channels: int,
        scaling: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None,
    ) -> None:
        self.files = tuple(files)
        self.labels = tuple(labels)
        self._size = size
        self._mode = "L" if channels == 1 else "RGB"
        self._scaling = scaling

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels = np.asarray(self._cropped(self.files[index]), dtype=np.float32) / 255
        values = np.moveaxis(pixels, -1, 0) if pixels.ndim == 3 else pixels[None]
        if self._scaling is not None:
            mean, std = self._scaling
            values = (values - mean) / std
        return torch.from_numpy(np.ascontiguousarray(values)), self.labels[index]

    def sample_name(self, index: int) -> str:
        """Return the image's path, for errors."""
        return str(self.files[index])

    def _cropped(self, path: Path) -> Image.Image:
        image = _read_image(path).convert(self._mode)
        side = min(image.size)
        left, top = ((length - side) / 2 for length in image.size)
        box = (left, top, left + side, top + side)
        return image.resize((self._size, self._size), Image.Resampling.BILINEAR, box=box)


def _read_image(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
    except Exception as error:  # every decoder of Pillow has its own exceptions for damaged files
        raise UsageError(f"not a readable image: {error}", where=str(path), fix="replace or remove the file") from error
    if image.mode not in _EIGHT_BIT_MODES:
        what = f"its pixels ({image.mode}) do not fit 8 bits, and converting would clip them"
        raise UsageError(what, where=str(path), fix="save it with 8 bits per channel")
    return image


def read_image_folder(section: DataSection, *, seed: int) -> Splits:
    """Return the images below [data] path, of class sub-folders, optionally below train/, val/ and test/.

    Classes are numbered in the order of their names. [data] image_size is the side (224 when absent); one value in
    [data] mean and std makes the images grey, three or none make them RGB.
    """
    folders = image_parts(data_path(section))
    classes = sorted(folders["train"])
    channels = len(section.mean) if section.mean is not None else 3
    if channels not in (1, 3):
        raise UsageError(f"need 1 value (grey) or 3 (RGB), got {channels}", where="[data] mean, std")
    size = section.image_size or _DEFAULT_SIZE
    scaling = normalization(section, channels=channels)
    parts: dict[str, Dataset[Any]] = {}
    for part, found in folders.items():
        files, labels = _numbered(found, classes, part=part)
        parts[part] = ImageFolder(files, labels, size=size, channels=channels, scaling=scaling)
    count = sum(map(len, folders["train"].values()))
    indices = split_indices(count, present=frozenset(parts), section=section, seed=seed)
    shape = (channels, size, size)
    return splits_from_datasets(parts, indices, name=section.name, input_shape=shape, num_classes=len(classes))


def _numbered(
    found: Mapping[str, Sequence[Path]], classes: Sequence[str], *, part: str
) -> tuple[list[Path], list[int]]:
    unknown = sorted(set(found) - set(classes))
    if unknown:
        what = f"the {part} data have a class '{unknown[0]}' that the training data have not"
        raise UsageError(f"{what}{did_you_mean(unknown[0], classes)}", where="[data] path")
    files = [(file, classes.index(name)) for name in sorted(found) for file in found[name]]
    return [file for file, _ in files], [label for _, label in files]
