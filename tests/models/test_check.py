import pytest
import torch
from torch import nn

from maseRT.errors import UsageError
from maseRT.models.check import check_model

EXAMPLE = torch.randn(2, 4)


class Returns(nn.Module):
    """A classifier whose logits go through a function."""

    def __init__(self, function):
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.function = function

    def forward(self, x):
        return self.function(self.fc(x))


def test_logits_come_back_and_the_model_is_as_it_was():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).train()
    model[1].eval()
    before = model[1].running_mean.clone()
    logits = check_model(model, EXAMPLE)
    assert logits.shape == (2, 3)
    assert not logits.requires_grad
    assert torch.equal(model[1].running_mean, before)
    assert [model.training, model[1].training, model[2].training] == [True, False, True]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda y: (y, y), "returns a tuple of 2 instead of one tensor"),
        (lambda y: {"logits": y, "loss": y}, "returns a dict with the keys logits, loss instead of one tensor"),
        (lambda y: None, "returns a NoneType instead of one tensor"),
        (lambda y: y[:, :, None], r"float32 of shape \[2, 3, 1\] for a batch of 2, not float logits \[2, classes\]"),
        (lambda y: y[:1], r"shape \[1, 3\] for a batch of 2"),
        (lambda y: y.argmax(1, keepdim=True), r"int64 of shape \[2, 1\]"),
        (lambda y: nn.functional.dropout(y + 9, 0.5), "gives other outputs for the same input"),
        (lambda y: y / 0, "output holds NaN or infinity although its weights are finite"),
    ],
)
def test_outputs_that_are_not_logits(function, message):
    with pytest.raises(UsageError, match=message) as caught:
        check_model(Returns(function), EXAMPLE)
    assert caught.value.fix


@pytest.mark.parametrize(("function", "shape"), [(lambda y: y[:, 0], (2,)), (lambda y: y[:, :, None], (2, 3, 1))])
def test_other_tasks_may_have_outputs_of_any_shape(function, shape):
    assert check_model(Returns(function), EXAMPLE, classes=False).shape == shape


@pytest.mark.parametrize("function", [lambda y: y.mean(), lambda y: y[:1], lambda y: y > 0])
def test_outputs_that_are_no_rows_of_floats(function):
    with pytest.raises(UsageError, match=r"for a batch of 2, not floats \[2, \.\.\.\]"):
        check_model(Returns(function), EXAMPLE, classes=False)


def test_several_inputs_are_named():
    class Two(nn.Module):
        def forward(self, x, mask, scale=1.0):
            return x

    with pytest.raises(UsageError, match="needs 2 inputs: x, mask"):
        check_model(Two(), EXAMPLE)


def test_optional_inputs_are_no_obstacle():
    class Optional(nn.Module):
        def forward(self, x, mask=None, *more, **options):
            return x

    assert check_model(Optional(), EXAMPLE).shape == (2, 4)


def test_an_input_of_another_shape():
    model = nn.Linear(5, 3).train()
    with pytest.raises(UsageError, match=r"cannot take an input of shape \[2, 4\]: RuntimeError: mat1") as caught:
        check_model(model, EXAMPLE)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert model.training


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite(value):
    model = nn.Linear(4, 3)
    with torch.no_grad():
        model.weight[1, 2] = value
    with pytest.raises(UsageError, match=r"NaN or infinity in weight \(1 of 12 values\)"):
        check_model(model, EXAMPLE)


@pytest.mark.parametrize(("value", "fine"), [(float("-inf"), True), (float("nan"), False)])
def test_a_mask_may_be_infinite(value, fine):
    model = nn.Sequential(nn.Linear(4, 3))
    model.register_buffer("mask", torch.full((3,), value))
    if fine:
        check_model(model, EXAMPLE)
        return
    with pytest.raises(UsageError, match=r"NaN or infinity in mask \(3 of 3 values\)"):
        check_model(model, EXAMPLE)


def test_ids_go_into_an_embedding():
    model = nn.Sequential(nn.Embedding(8, 4), nn.Flatten(), nn.Linear(8, 3))
    assert check_model(model, torch.tensor([[0, 7], [3, 3]])).shape == (2, 3)


@pytest.mark.parametrize(
    ("model", "why"), [(nn.Embedding(7, 3), "IndexError: index out of range"), (nn.Linear(2, 3), "RuntimeError: ")]
)
def test_ids_that_a_model_cannot_take(model, why):
    with pytest.raises(UsageError, match=rf"cannot take int64 ids from 0 to 7, of shape \[2, 2\]: {why}") as caught:
        check_model(model, torch.tensor([[0, 7], [3, 3]]))
    assert "below the num_embeddings of an nn.Embedding" in caught.value.fix
    assert 'x.astype("float32")' in caught.value.fix


def test_floats_that_should_be_ids():
    with pytest.raises(UsageError, match="cannot take an input of shape") as caught:
        check_model(nn.Embedding(8, 3), torch.ones(2, 2))
    assert 'x.astype("int64")' in caught.value.fix
