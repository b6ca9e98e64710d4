"""scikit-learn's digits: 1797 handwritten digits of 8x8 pixels, inside the package; nothing is downloaded."""

from __future__ import annotations

import numpy as np

from maseRT.config import DataSection
from maseRT.data.arrays import image_arrays
from maseRT.data.splits import Splits, splits_from_arrays


def read_digits(section: DataSection, *, seed: int) -> Splits:
    """Return 1x8x8 images in [0, 1] (the set counts 0..16) in 10 classes."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.asarray(digits.images)[:, None]
    train = image_arrays(images, np.asarray(digits.target), white=16, section=section, where="digits")
    return splits_from_arrays({"train": train}, section, seed=seed, num_classes=10)
