"""Data sets of a user's own."""

import sys
import textwrap

import pytest
import torch

from maseRT.config import DataSection
from maseRT.data.checks import check_data, labels_of
from maseRT.data.loading import load_data, loader
from maseRT.errors import UsageError

HEAD = """
import numpy as np
import torch
from torch.utils.data import Dataset, TensorDataset

class Pairs:
    def __init__(self, pairs):
        self.pairs = pairs
    def __len__(self):
        return len(self.pairs)
    def __getitem__(self, index):
        return self.pairs[index]

GOOD = TensorDataset(torch.arange(24.0).view(12, 2), torch.arange(12) % 3)
"""


@pytest.fixture
def given(tmp_path, monkeypatch):
    """Loads what a factory in the working directory returns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def _given(body, *, batch_size=4):
        (tmp_path / "given_data.py").write_text(
            HEAD + "\ndef make():\n" + textwrap.indent(textwrap.dedent(body), "    ")
        )
        sys.modules.pop("given_data", None)
        return load_data(DataSection(name="given_data:make", batch_size=batch_size), seed=0)

    yield _given
    sys.modules.pop("given_data", None)


@pytest.mark.parametrize("brackets", ["GOOD, GOOD, GOOD", "[GOOD, GOOD, GOOD]"])
def test_three_data_sets(given, brackets):
    splits = given(f"return {brackets}")
    assert (splits.name, splits.input_shape, splits.num_classes) == ("given_data:make", (2,), 3)
    assert [len(part) for part in splits.parts().values()] == [12, 12, 12]
    inputs, labels = next(iter(loader(splits.train, batch_size=12)))
    assert torch.equal(inputs, torch.arange(24.0).view(12, 2))
    assert labels.tolist() == [0, 1, 2] * 4
    check_data(splits, outputs=3)


@pytest.mark.parametrize(
    "pair",
    [
        "(torch.ones(2, dtype=torch.float64), 1)",
        "[torch.ones(2, dtype=torch.float16), torch.tensor(1)]",
        "(np.ones(2), np.int32(1))",
        "(np.ones(2, dtype=np.float32), np.array(1, dtype=np.uint8))",
        "(torch.ones(2, requires_grad=True), 1)",
    ],
)
def test_inputs_become_float32_and_labels_integers(given, pair):
    splits = given(f"return (Pairs([{pair}] * 6),) * 3")
    inputs, labels = next(iter(loader(splits.train, batch_size=6)))
    assert inputs.dtype == torch.float32
    assert torch.equal(inputs, torch.ones(6, 2))
    assert labels.tolist() == [1] * 6


@pytest.mark.parametrize("kind", ["int32", "int64"])
@pytest.mark.parametrize("made", ["torch.tensor([7, 9], dtype=torch.{})", "np.array([7, 9], dtype=np.{})"])
def test_ids_stay_as_they_are(given, kind, made):
    splits = given(f"return (Pairs([({made.format(kind)}, 1)] * 6),) * 3")
    inputs, _ = next(iter(loader(splits.train, batch_size=6)))
    assert inputs.dtype == getattr(torch, kind)
    assert inputs.tolist() == [[7, 9]] * 6
    assert splits.input_shape == (2,)


def test_the_number_of_classes_where_it_is_known(given):
    body = "data = Pairs([(torch.ones(2), n % 4) for n in range(8)])\n"
    assert given(body + "return data, data, data").num_classes is None
    assert given(body + "data.classes = list('abcdef')\nreturn data, data, data").num_classes == 6
    assert given(body + "data.targets = [n % 4 for n in range(8)]\nreturn data, data, data").num_classes == 4
    assert given(body + "data.targets = [n % 4 for n in range(8)]\nreturn data, data, GOOD").num_classes == 4
    assert labels_of(given(body + "return data, data, data").train).tolist() == [0, 1, 2, 3] * 2


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return GOOD", "the factory returned a TensorDataset"),
        ("return None", "the factory returned a NoneType"),
        ("return GOOD, GOOD", "the factory returned a tuple of length 2"),
        ("return {'train': GOOD}", "the factory returned a dict"),
        ("return GOOD, GOOD, None", "the test data are a NoneType"),
        ("return GOOD, iter(GOOD), GOOD", "the validation data are a"),
        ("return Pairs([]), GOOD, GOOD", "the training data are empty"),
        ("raise OSError('disk on fire')", r"the factory raised OSError: disk on fire \(.*given_data\.py:\d+\)"),
    ],
)
def test_a_factory_that_gives_something_else(given, body, message):
    with pytest.raises(UsageError, match=message) as caught:
        given(body)
    assert caught.value.where == "data set 'given_data:make'"


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ("torch.ones(2)", r"is not an \(input, target\) pair but a Tensor of shape \[2\]"),
        ("(torch.ones(2), 1, 2)", r"is not an \(input, target\) pair but a tuple of length 3"),
        (
            "(torch.ones(2, dtype=torch.uint8), 1)",
            r"not one tensor of floats or of int32 or int64 ids but a Tensor of shape \[2\] and type torch\.uint8",
        ),
        ("(torch.ones(2) > 0, 1)", r"not one tensor of floats .* ids but a Tensor of shape \[2\] and type torch\.bool"),
        ("(np.ones(2) + 1j, 1)", r"not one tensor of floats .* but a ndarray of shape \[2\] and type complex128"),
        ("([1.0, 2.0], 1)", "not one tensor of floats or of int32 or int64 ids but a list of length 2"),
        ("((torch.ones(2), torch.ones(2)), 1)", "not one tensor of floats .* ids but a tuple of length 2"),
        ("(np.ones(2, dtype=int), 1)", "is int64, the first one float32"),
        ("(torch.ones(3), 1)", r"has shape \[3\], the first one \[2\]"),
        ("(torch.ones(2), True)", "a target that is no number and no tensor of numbers but a bool"),
        ("(torch.ones(2), [0, 1])", "a target that is no number and no tensor of numbers but a list of length 2"),
        ("(torch.ones(2), torch.tensor([True]))", r"a target that is no number .* but a Tensor of shape \[1\]"),
        ("(torch.ones(2), 1.0)", r"a target of another form, floats of shape \[\]; the first: an integer"),
        ("(torch.ones(2), torch.tensor([0, 1]))", r"a target of another form, integers of shape \[2\]; the first: an"),
        ("(torch.tensor([1, np.nan]), 1)", "holds NaN or infinite values"),
        ("(np.array([1, -np.inf]), 1)", "holds NaN or infinite values"),
        ("(np.array([1, 1e300]), 1)", "holds NaN or infinite values"),
        ("(torch.ones(2), float('nan'))", "a target with NaN or infinite values"),
    ],
)
@pytest.mark.parametrize("part", ["train", "test"])
def test_a_sample_that_is_something_else(given, sample, message, part):
    body = f"""
    bad = Pairs([(torch.zeros(2), 0), (torch.ones(2), 1), (torch.ones(2), 1), {sample}])
    return {"bad, GOOD, GOOD" if part == "train" else "GOOD, GOOD, bad"}
    """
    splits = given(body)
    with pytest.raises(UsageError, match=f"sample 3 of the {part} data .*{message}") as caught:
        list(loader(getattr(splits, part), batch_size=2))
    assert caught.value.where == "data set 'given_data:make'"
    with pytest.raises(UsageError, match="sample 3 of the"):
        check_data(splits, outputs=3)


RANDOM = """
    class Random(Pairs):
        def __getitem__(self, index):
            return super().__getitem__(index)[0] + torch.rand(2), 1
    shaken = Random([(torch.zeros(2), 1)] * 6)
"""


@pytest.mark.parametrize(
    ("returned", "part"),
    [("GOOD, shaken, GOOD", "validation"), ("GOOD, GOOD, shaken", "test"), ("shaken, GOOD, GOOD", "")],
)
def test_only_training_samples_may_change_from_time_to_time(given, returned, part):
    body = f"{RANDOM}    return {returned}"
    if not part:
        assert len(given(body).train) == 6
        return
    with pytest.raises(UsageError, match=f"sample 0 of the {part} data is another one each time it is read") as caught:
        given(body)
    assert "training data" in caught.value.fix


@pytest.mark.parametrize(
    ("target", "outputs", "held"),
    [
        ("0.5 * n", 1, torch.tensor([0.0, 0.5, 1.0])),
        ("np.float64(0.5 * n)", 1, torch.tensor([0.0, 0.5, 1.0])),
        ("np.array([n, 2.5])", 2, torch.tensor([[0.0, 2.5], [1.0, 2.5], [2.0, 2.5]])),
        ("torch.tensor([[n, 1], [0, 1]], dtype=torch.uint8)", None, torch.tensor([[[n, 1], [0, 1]] for n in range(3)])),
    ],
)
def test_targets_of_other_tasks(given, target, outputs, held):
    splits = given(
        f"data = Pairs([(torch.zeros(2), {target}) for n in range(3)])\nreturn data, data, data", batch_size=3
    )
    assert splits.num_classes == outputs
    targets = next(iter(loader(splits.train, batch_size=3)))[1]
    assert torch.equal(targets, held)
    assert targets.dtype == held.dtype
    check_data(splits, outputs=1, classes=False)
    with pytest.raises(UsageError, match=r'\[model\] task = "classification" needs class numbers') as caught:
        check_data(splits, outputs=9)
    assert 'task = "regression"' in caught.value.fix


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_raises(given, workers):
    splits = given(
        """
        class Raises(Pairs):
            def __getitem__(self, index):
                if index == 2:
                    raise KeyError("gone")
                return super().__getitem__(index)
        bad = Raises([(torch.zeros(2), n % 2) for n in range(6)])
        return bad, GOOD, GOOD
        """
    )
    with pytest.raises(UsageError, match=r"sample 2 of the train data raised KeyError: 'gone'") as caught:
        list(loader(splits.train, batch_size=2, workers=workers))
    assert "Traceback" not in str(caught.value)


def test_held_labels_that_a_transform_changed_are_read_instead(given):
    splits = given(
        """
        class Shifted(Pairs):
            targets = [0, 1, 2, 3]
        data = Shifted([(torch.zeros(2), 3 - n) for n in range(4)])
        return data, GOOD, GOOD
        """
    )
    assert labels_of(splits.train).tolist() == [3, 2, 1, 0]
    assert splits.num_classes is None


def test_empty_validation_data_and_a_batch_too_large(given):
    with pytest.raises(UsageError, match="the validation split is empty"):
        check_data(given("return GOOD, Pairs([]), GOOD"), outputs=3)
    with pytest.raises(UsageError, match="a batch of 13 is larger than the training data, which hold 12 samples"):
        given("return GOOD, GOOD, GOOD", batch_size=13)


@pytest.mark.parametrize(
    ("samples", "fix"),
    [
        ("[((torch.ones(2), torch.ones(3)), 1)]", "join the inputs into one tensor"),
        ('[({"ids": torch.ones(2), "mask": torch.ones(2)}, 1)]', "mask can be told from padded ids"),
        ("[((torch.ones(2), 2), 1)]", "join the inputs into one tensor"),
        ("[([1.0, 2.0], 1)]", "give it as floats"),
        (
            "[*[(torch.ones(2), 1)] * 4, (torch.ones(3), 1)]",
            "pad, crop or resize all samples to one shape",
        ),
    ],
)
def test_what_to_do_with_several_inputs_and_with_many_lengths(given, samples, fix):
    with pytest.raises(UsageError) as caught:
        list(loader(given(f"return Pairs({samples}), GOOD, GOOD").train, batch_size=1))
    assert fix in caught.value.fix
