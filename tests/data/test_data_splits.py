"""The seeded split, and arrays on their way in; on scikit-learn's digits and small arrays."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Subset

from maseRT.config import DataSection
from maseRT.data.arrays import Arrays, check_same_shape, checked_arrays, normalization, outputs_for, standardized
from maseRT.data.loading import load_data
from maseRT.data.splits import Splits, permutation, split_indices, splits_from_arrays
from maseRT.errors import UsageError

DIGITS = DataSection(name="digits")


def arrays(count, features=3, seed=0):
    rng = np.random.default_rng(seed)
    return checked_arrays(rng.normal(5, 2, (count, features)), np.arange(count) % 4, where="test")


def stacked(dataset):
    return torch.stack([dataset[index][0] for index in range(len(dataset))])


def test_digits_are_images_in_the_unit_interval_with_integer_labels():
    splits = load_data(DIGITS, seed=0)
    assert (splits.name, splits.input_shape, splits.num_classes) == ("digits", (1, 8, 8), 10)
    assert [len(part) for part in splits.parts().values()] == [1298, 229, 270]
    image, label = splits.train[0]
    assert image.shape == (1, 8, 8)
    assert image.dtype == torch.float32
    assert int(label) in range(10)
    pixels = stacked(splits.train)
    assert (pixels.min(), pixels.max()) == (0, 1)


def test_digits_standardised_by_mean_and_std():
    plain = stacked(load_data(DIGITS, seed=0).train)
    section = DataSection(name="digits", mean=(float(plain.mean()),), std=(float(plain.std()),))
    scaled = stacked(load_data(section, seed=0).train)
    assert scaled.mean() == pytest.approx(0, abs=1e-5)
    assert scaled.std() == pytest.approx(1, abs=1e-5)


def test_the_split_is_the_same_for_a_seed_and_another_for_another():
    def labels(seed):
        return [int(label) for _, label in load_data(DIGITS, seed=seed).test]

    assert labels(3) == labels(3)
    assert labels(3) != labels(4)


def test_the_permutation_never_changes_between_versions():
    assert permutation(10, seed=0, stream=0).tolist() == [6, 1, 0, 5, 3, 8, 7, 9, 2, 4]
    assert permutation(10, seed=0, stream=1).tolist() != permutation(10, seed=0, stream=0).tolist()
    assert sorted(permutation(10, seed=2**70, stream=0)) == list(range(10))


@given(
    st.integers(4, 500), st.floats(0.01, 0.4), st.floats(0.01, 0.4), st.integers(0, 2**64), st.booleans(), st.booleans()
)
def test_parts_share_no_sample_and_lose_none(count, validation, test, seed, has_validation, has_test):
    section = DataSection(name="digits", validation=validation, test=test)
    present = {"train"} | ({"validation"} if has_validation else set()) | ({"test"} if has_test else set())
    parts = split_indices(count, present=frozenset(present), section=section, seed=seed)
    assert set(parts) == {"train", "validation", "test"} - (present - {"train"})
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(count))
    after_test = count - len(parts.get("test", ()))
    assert count - after_test == (0 if has_test else round(count * test))
    assert len(parts.get("validation", ())) == (0 if has_validation else round(after_test * validation))


def test_nothing_left_for_training():
    section = DataSection(name="npz", validation=0.9)
    with pytest.raises(UsageError, match="no training samples are left of 2"):
        split_indices(2, present=frozenset({"train"}), section=section, seed=0)


def test_parts_that_are_there_stay_whole():
    given_parts = {"train": arrays(40), "validation": arrays(7, seed=1), "test": arrays(5, seed=2)}
    splits = splits_from_arrays(given_parts, DIGITS, seed=0, num_classes=4)
    assert [len(part) for part in splits.parts().values()] == [40, 7, 5]
    assert torch.equal(stacked(splits.test), torch.from_numpy(given_parts["test"].inputs))
    cut = splits_from_arrays({"train": arrays(40), "test": arrays(5)}, DIGITS, seed=0, num_classes=4)
    assert [len(part) for part in cut.parts().values()] == [34, 6, 5]
    assert isinstance(cut, Splits)


def test_standardised_with_the_statistics_of_the_training_samples_alone():
    parts = {"train": arrays(400), "test": arrays(50, seed=9)}
    splits = splits_from_arrays(parts, DIGITS, seed=0, num_classes=4, standardize=True)
    train = stacked(splits.train)
    assert torch.allclose(train.mean(0), torch.zeros(3), atol=1e-5)
    assert torch.allclose(train.std(0, correction=0), torch.ones(3), atol=1e-5)
    assert isinstance(splits.train, Subset)
    chosen = parts["train"].inputs[splits.train.indices]
    expected = (parts["test"].inputs - chosen.mean(0)) / chosen.std(0)
    assert np.allclose(stacked(splits.test).numpy(), expected, atol=1e-4)
    assert stacked(splits.validation).mean().abs() > 1e-4


def test_a_constant_feature_is_only_centred():
    inputs = np.full((4, 1), 3, dtype=np.float32)
    out = standardized({"train": Arrays(inputs, np.zeros(4, dtype=np.int64))}, chosen=np.arange(4))
    assert out["train"].inputs.tolist() == [[0], [0], [0], [0]]


@pytest.mark.parametrize("kind", ["float64", "float16", "uint8", "int32", ">f4"])
def test_inputs_of_any_real_type_become_float32_unchanged(kind):
    values = np.array([[0, 1], [200, 7]], dtype=kind)
    out = checked_arrays(values, np.array([0, 1], dtype=np.uint8), where="here")
    assert out.inputs.dtype == np.float32
    assert out.labels.dtype == np.int64
    assert out.inputs.tolist() == [[0, 1], [200, 7]]


@pytest.mark.parametrize(
    ("inputs", "labels", "message"),
    [
        (np.zeros((3, 2), dtype=complex), [0, 1, 2], r"not real numbers: shape \[3, 2\] and type complex128"),
        (np.array([["a"]]), [0], "not real numbers"),
        (np.zeros((3, 2), dtype=bool), [0, 1, 2], "not real numbers"),
        (np.zeros(3), [0, 1, 2], r"need a shape \[samples, \.\.\.\]: shape \[3\]"),
        (np.zeros((3, 0)), [0, 1, 2], "need a shape"),
        (np.zeros((0, 2)), [], "there are no samples"),
        (np.zeros((3, 2)), [0, 1], "3 inputs but 2 labels"),
        (np.zeros((3, 2)), np.eye(3, dtype=int), r"labels need a shape \[samples\]: shape \[3, 3\] and type int64"),
        (np.zeros((3, 2)), [0.0, 1.0, 2.0], "labels are not integers: .*float64"),
        (np.array([[0, 1], [2, np.nan]]), [0, 1], "sample 1 holds NaN or infinite values"),
        (np.array([[0, 1], [2, 1e300]]), [0, 1], "sample 1 holds NaN or infinite values"),
    ],
)
def test_arrays_that_cannot_be_used(inputs, labels, message):
    labels = np.asarray(labels, dtype=np.int64) if len(labels) == 0 else np.asarray(labels)
    with pytest.raises(UsageError, match=message) as caught:
        checked_arrays(inputs, labels, where="set.npz")
    assert caught.value.where == "set.npz"


def test_a_nan_is_found_far_in():
    inputs = np.zeros((9000, 2))
    inputs[8500, 1] = np.inf
    with pytest.raises(UsageError, match="sample 8500 holds"):
        checked_arrays(inputs, np.zeros(9000, dtype=int), where="here")


def test_parts_of_another_shape():
    with pytest.raises(UsageError, match=r"test samples have shape \[4\], train samples \[3\]"):
        check_same_shape({"train": arrays(5), "test": arrays(5, features=4)}, where="here")


def test_classes_are_counted_over_all_parts():
    assert outputs_for([arrays(2), arrays(8)]) == 4


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((0.5,), None, "need 1 values each, one per channel, got 1 and 0"),
        (None, (0.5,), "got 0 and 1"),
        ((0.5, 0.5), (0.5, 0.5), "need 1 values each"),
    ],
)
def test_mean_and_std_that_do_not_fit(mean, std, message):
    with pytest.raises(UsageError, match=message):
        normalization(DataSection(name="digits", mean=mean, std=std), channels=1)
