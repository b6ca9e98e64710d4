"""Training: the schedule, the optimizer's state, and a loss that blows up."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from maseRT.checkpoints import flatten_optimizer, load_tensors, restore_optimizer, save_tensors
from maseRT.errors import StepError
from maseRT.learning import NonFiniteLossError, cosine_rate, make_fabric, make_optimizer, train_epoch


def test_cosine_goes_from_the_initial_to_the_final_rate():
    rates = [cosine_rate(step, 11, initial=1.0, final=0.01) for step in range(11)]
    assert rates[0] == 1.0
    assert rates[5] == pytest.approx(0.505)
    assert rates[-1] == pytest.approx(0.01)
    assert rates == sorted(rates, reverse=True)
    assert cosine_rate(0, 1, initial=1.0, final=0.01) == 1.0


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_an_optimizer_goes_on_where_it_was_saved(tmp_path, name):
    def steps(model, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            (model(torch.ones(2, 3)) ** 2).sum().backward()
            optimizer.step()

    model = nn.Linear(3, 2)
    optimizer = make_optimizer(name, model.parameters(), learning_rate=0.1, weight_decay=0.01)
    steps(model, optimizer, 3)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    save_tensors(tmp_path / "state.safetensors", flatten_optimizer(optimizer), {"epoch": "3"})
    steps(model, optimizer, 2)

    resumed = nn.Linear(3, 2)
    resumed.load_state_dict(weights)
    fresh = make_optimizer(name, resumed.parameters(), learning_rate=0.1, weight_decay=0.01)
    tensors, metadata = load_tensors(tmp_path / "state.safetensors", made_by="finetune")
    restore_optimizer(fresh, tensors)
    steps(resumed, fresh, 2)
    assert metadata == {"epoch": "3"}
    assert torch.equal(resumed.weight, model.weight)


def test_a_loss_that_blows_up_stops_the_epoch():
    model = nn.Linear(3, 2)
    optimizer = make_optimizer("sgd", model.parameters(), learning_rate=1.0, weight_decay=0.0)
    batches = [(torch.full((4, 3), math.inf), torch.zeros(4, dtype=torch.long))]
    with pytest.raises(NonFiniteLossError):
        train_epoch(make_fabric("cpu"), model, optimizer, batches, loss_of=cross_entropy, rate_at=[0.1], seed=0)


class Through(nn.Module):
    """A layer whose outputs go through a function that knows the mode."""

    def __init__(self, function):
        super().__init__()
        self.fc, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.function = function

    def forward(self, x):
        return self.function(self.fc(x), self)


@pytest.mark.parametrize(
    ("function", "batch", "message", "fix"),
    [
        (
            lambda y, net: y.sigmoid().mul_(2).add_(y.sigmoid_()),
            2,
            "modified by an inplace operation",
            "without in-place",
        ),
        (lambda y, net: (y, y) if net.training else y, 2, "a tuple in training mode, and one tensor in eval", "same"),
        (lambda y, net: y.detach(), 2, "cannot be trained on a batch of 2: RuntimeError: .*does not require grad", ""),
        (lambda y, net: net.norm(y), 1, "batch of 1: ValueError: .*more than 1 value per channel", "batch_size"),
    ],
)
def test_what_cannot_be_trained_is_told(function, batch, message, fix):
    model = Through(function)
    optimizer = make_optimizer("sgd", model.parameters(), learning_rate=0.1, weight_decay=0.0)
    batches = [(torch.randn(batch, 4), torch.zeros(batch, dtype=torch.long))]
    with pytest.raises(StepError, match=message) as caught:
        train_epoch(make_fabric("cpu"), model, optimizer, batches, loss_of=cross_entropy, rate_at=[0.1], seed=0)
    assert caught.value.where == "training"
    assert fix in caught.value.fix


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "[:10]])
def test_a_damaged_checkpoint_names_its_command(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(StepError, match="damaged") as caught:
        load_tensors(path, made_by="calibrate")
    assert "masert calibrate" in caught.value.fix


def test_a_truncated_checkpoint_is_never_read(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"w": torch.randn(100)})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(StepError, match="damaged"):
        load_tensors(path, made_by="train")


def test_tensors_that_share_memory_are_saved_whole(tmp_path):
    tied = torch.randn(4)
    save_tensors(tmp_path / "x.safetensors", {"a": tied, "b": tied, "c": tied[:2]})
    tensors, _ = load_tensors(tmp_path / "x.safetensors", made_by="train")
    assert torch.equal(tensors["b"], tied)
    assert torch.equal(tensors["c"], tied[:2])
