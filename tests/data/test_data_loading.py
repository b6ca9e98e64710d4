"""Batches, the calibration subset, and errors that come out of loader processes."""

import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from maseRT.config import DataSection
from maseRT.data.loading import calibration_subset, load_data, loader
from maseRT.data.splits import Splits
from maseRT.errors import UsageError

DIGITS = DataSection(name="digits")


@pytest.fixture(scope="module")
def digits():
    return load_data(DIGITS, seed=0)


def numbered(count):
    return TensorDataset(torch.arange(count, dtype=torch.float32)[:, None], torch.arange(count))


def splits_of(dataset):
    return Splits("own", dataset, dataset, dataset, input_shape=(1,), num_classes=None)


class Broken(Dataset):
    """Sample 5 cannot be read."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 5:
            raise UsageError("not readable", where="five.png", fix="remove it")
        return torch.zeros(1), index


def test_every_sample_once_and_a_short_last_batch():
    batches = list(loader(numbered(10), batch_size=4))
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(10))
    assert batches[0][0].dtype == torch.float32
    assert batches[0][1].dtype == torch.int64
    assert len(loader(numbered(10), batch_size=4)) == 3


def test_shuffled_by_the_seed_alone():
    def order(**options):
        return [int(label) for _, labels in loader(numbered(50), batch_size=8, **options) for label in labels]

    assert order() == list(range(50))
    first = order(shuffle=True, seed=1)
    assert sorted(first) == list(range(50)) != first
    torch.manual_seed(99)
    assert order(shuffle=True, seed=1) == first
    assert order(shuffle=True, seed=1, workers=2) == first
    assert order(shuffle=True, seed=2) != first


def test_each_pass_has_an_order_of_its_own():
    batches = loader(numbered(50), batch_size=50, shuffle=True, seed=1)
    first, second = (next(iter(batches))[1].tolist() for _ in range(2))
    assert sorted(first) == sorted(second)
    assert first != second


@pytest.mark.parametrize("workers", [0, 2])
def test_a_samples_error_arrives_as_it_was_raised(workers):
    batches = iter(loader(Broken(), batch_size=2, workers=workers))
    assert next(batches)[1].tolist() == [0, 1]
    assert next(batches)[1].tolist() == [2, 3]
    with pytest.raises(UsageError) as caught:
        next(batches)
    assert str(caught.value) == "five.png: not readable\nfix: remove it"


def test_a_batch_larger_than_the_training_data():
    with pytest.raises(UsageError, match="a batch of 2000 is larger than the training data, which hold 1298") as caught:
        load_data(DataSection(name="digits", batch_size=2000), seed=0)
    assert caught.value.where == "[data] batch_size"
    assert len(load_data(DataSection(name="digits", batch_size=1298), seed=0).train) == 1298


def test_calibration_samples_are_fixed_and_from_the_training_data(digits):
    def taken(seed):
        return torch.stack([image for image, _ in calibration_subset(digits, samples=40, seed=seed)])

    assert torch.equal(taken(0), taken(0))
    assert not torch.equal(taken(0), taken(1))
    assert len(torch.unique(taken(0), dim=0)) == 40
    train = {image.numpy().tobytes() for image, _ in digits.train}
    assert all(image.numpy().tobytes() in train for image in taken(0))


def test_more_calibration_samples_than_there_are():
    subset = calibration_subset(splits_of(numbered(6)), samples=640, seed=0)
    assert sorted(int(label) for _, label in subset) == list(range(6))
