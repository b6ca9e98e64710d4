"""Whether a model can be trained and measured on a data set."""

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from maseRT.config import DataSection
from maseRT.data.checks import check_data, extreme_ids, labels_of
from maseRT.data.loading import load_data
from maseRT.data.splits import Splits
from maseRT.errors import UsageError


def labelled(*labels):
    return TensorDataset(torch.zeros(len(labels), 2), torch.tensor(labels, dtype=torch.int64))


def splits(train=(0, 1, 2), validation=(0, 1), test=(2,)):
    return Splits("own", labelled(*train), labelled(*validation), labelled(*test), input_shape=(2,), num_classes=3)


class Reads(Dataset):
    """A data set that counts its reads and holds what it is given."""

    def __init__(self, given, **held):
        self._given = given
        self.reads = 0
        for name, value in held.items():
            setattr(self, name, value)

    def __len__(self):
        return len(self._given)

    def __getitem__(self, index):
        self.reads += 1
        return torch.zeros(2), self._given[index]


def test_good_data_pass():
    check_data(splits(), outputs=3)
    check_data(load_data(DataSection(name="digits"), seed=0), outputs=10)


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_an_empty_part(part):
    with pytest.raises(UsageError, match=f"the {part} split is empty"):
        check_data(splits(**{part: ()}), outputs=3)


def test_a_share_that_leaves_no_validation_sample():
    data = load_data(DataSection(name="digits", validation=0.0001), seed=0)
    with pytest.raises(UsageError, match="the validation split is empty") as caught:
        check_data(data, outputs=10)
    assert "[data] validation" in caught.value.fix


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_labels_beyond_the_outputs(part):
    with pytest.raises(
        UsageError, match=rf"label 7 is beyond the model's 3 outputs.* \({part} data, sample 1\)"
    ) as caught:
        check_data(splits(**{part: (1, 7, 2)}), outputs=3)
    assert "at least 8 outputs" in caught.value.fix
    check_data(splits(**{part: (1, 7, 2)}), outputs=8)


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_negative_labels(part):
    with pytest.raises(UsageError, match=rf"negative label -100 \({part} data, sample 2\)"):
        check_data(splits(**{part: (0, 1, -100)}), outputs=3)


def test_one_class_only():
    with pytest.raises(UsageError, match="one class only: every label is 1"):
        check_data(splits(train=(1, 1, 1)), outputs=3)
    check_data(splits(test=(1, 1)), outputs=3)


def test_a_sample_of_a_subset_has_its_number_in_the_whole():
    whole = labelled(0, 1, 0, 1, 9)
    data = Splits("own", Subset(whole, [0, 1, 4]), whole, whole, input_shape=(2,), num_classes=2)
    with pytest.raises(UsageError, match=r"\(train data, sample 4\)"):
        check_data(data, outputs=2)


@pytest.mark.parametrize("name", ["labels", "targets"])
@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_labels_that_are_held_are_not_read_but_for_a_few(name, kind):
    labels = [index % 5 for index in range(1000)]
    data = Reads(labels, **{name: kind(labels)})
    assert labels_of(data).tolist() == labels
    assert 2 <= data.reads < 20
    assert labels_of(Subset(data, [2, 3, 999])).tolist() == [2, 3, 4]
    assert labels_of(ConcatDataset([data, labelled(7)])).tolist() == [*labels, 7]


@pytest.mark.parametrize(
    "held",
    [
        {},
        {"targets": [0, 1]},
        {"targets": [3, 1, 2, 1]},
        {"targets": [0, 1, 2, 0]},
        {"targets": [0, 9, 2, 1], "target_transform": int},
        {"targets": ["a", "b", "c", "d"]},
        {"targets": [[0], [1, 2], [2], [1]]},
        {"targets": np.eye(4, dtype=int)},
        {"labels": None},
    ],
)
def test_labels_that_are_not_held_or_do_not_agree_are_read(held):
    data = Reads([0, 1, 2, 1], **held)
    assert labels_of(data).tolist() == [0, 1, 2, 1]
    assert labels_of(ConcatDataset([data, labelled(5)])).tolist() == [0, 1, 2, 1, 5]


def test_extreme_ids_of_every_part_without_reading_a_sample():
    ids = torch.arange(24).reshape(12, 2)
    whole = TensorDataset(ids, torch.arange(12) % 3)
    parts = Subset(whole, [3, 1, 2]), Subset(Subset(whole, [5, 6, 7]), [1, 0]), TensorDataset(*whole[8:])
    found = extreme_ids(Splits("own", *parts, input_shape=(2,), num_classes=3))
    assert found.tolist() == [[2, 3], [6, 7], [10, 11], [12, 13], [16, 17], [22, 23]]
    unread = Reads([0, 1, 2])
    assert extreme_ids(Splits("own", unread, unread, unread, input_shape=(2,), num_classes=3)) is None
    assert unread.reads == 0
    assert extreme_ids(splits()) is None  # floats
