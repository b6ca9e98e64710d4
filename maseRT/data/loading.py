"""From a [data] section to splits, batches and the calibration subset."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from maseRT.config import DataSection
from maseRT.data.checks import sample_count
from maseRT.data.files import find_source
from maseRT.data.splits import Splits, permutation
from maseRT.errors import MaseRTError, UsageError


def load_data(section: DataSection, *, seed: int) -> Splits:
    """Read the data set that a config names; the same split on every run for a seed.

    Raises:
        UsageError: an unknown name, an option it does not use, unreadable content, or a batch larger than the
            training data.
        MissingError: files or a package that are not there.
    """
    source = find_source(section)
    module, _, function = source.reader.partition(":")
    read: Callable[..., Splits] = getattr(import_module(module), function)
    splits = read(section, seed=seed)
    count = sample_count(splits.train)
    if section.batch_size > count:
        what = f"a batch of {section.batch_size} is larger than the training data, which hold {count} samples"
        raise UsageError(what, where="[data] batch_size", fix=f"set it to {max(count, 1)} or less")
    return splits


def loader(
    dataset: Dataset[Any], *, batch_size: int, shuffle: bool = False, seed: int = 0, workers: int = 0
) -> DataLoader[Any]:
    """Return batches of (inputs [N, ...], targets, int64 [N] if labels); the last, short batch is never dropped.

    Args:
        shuffle: in an order drawn from `seed`, another one in each pass; independent of `workers`. A run that may
            be resumed makes one loader per epoch, with a seed per epoch.
        workers: processes that read samples. Their errors arrive as they would without them.
    """
    return _Loader(
        _Guarded(dataset),
        batch_size=batch_size,
        shuffle=shuffle,
        generator=torch.Generator().manual_seed(seed),
        num_workers=workers,
        collate_fn=_collate,
    )


def calibration_subset(splits: Splits, *, samples: int, seed: int) -> Dataset[Any]:
    """Return `samples` training samples, the same ones in the same order for a seed; all there are, if fewer."""
    order = permutation(sample_count(splits.train), seed=seed, stream=1)
    return Subset(splits.train, order[:samples].tolist())


class _Guarded(Dataset[Any]):
    """A data set that gives its errors as values: of one raised in a process, torch leaves a traceback's text."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return sample_count(self.dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except MaseRTError as error:
            return error


def _collate(samples: Sequence[Any]) -> Any:
    error = next((sample for sample in samples if isinstance(sample, MaseRTError)), None)
    return default_collate(list(samples)) if error is None else error


class _Loader(DataLoader[Any]):
    """Raises the first error among a batch's samples in the process that asked for the batch."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch declares its private iterator
        for batch in super().__iter__():
            if isinstance(batch, MaseRTError):
                raise batch
            yield batch
