"""Weights that are computed in each forward: plain ones before anything is planned or quantized."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from maseRT.config import QuantizeSection
from maseRT.precision import Precision
from maseRT.quant.computed_weights import computed_weights, store_weights, with_stored_weights
from maseRT.quant.planning import make_plan
from maseRT.quant.prepare import quantize_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.nn.utils import spectral_norm as hooked_spectral_norm
    from torch.nn.utils import weight_norm as hooked_weight_norm


class Net(nn.Module):
    """Every way in which torch computes weights, for convolutions, linear layers and an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.conv = parametrizations.weight_norm(nn.Conv1d(3, 32, 3, padding=1))
            self.spectral = parametrizations.spectral_norm(nn.Linear(32, 32))
            self.old = hooked_weight_norm(nn.Linear(32, 32))
            self.old_spectral = hooked_spectral_norm(nn.Linear(32, 32))
            self.lstm = parametrizations.weight_norm(nn.LSTM(32, 16, batch_first=True), "weight_hh_l0")
            self.old_lstm = hooked_weight_norm(nn.LSTM(16, 16, batch_first=True), "weight_hh_l0")

    def forward(self, x: Tensor) -> Tensor:
        y = self.old_spectral(self.old(self.spectral(self.conv(x).transpose(1, 2)).relu()))
        return self.old_lstm(self.lstm(y)[0])[0].mean(1)


X = torch.randn(4, 3, 48, generator=torch.Generator().manual_seed(0))
COMPUTED = ["conv.weight", "spectral.weight", "old.weight", "old_spectral.weight"]
COMPUTED += ["lstm.weight_hh_l0", "old_lstm.weight_hh_l0"]


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    model(X)  # with gradients, in training mode: the power iterations go on, and the weights are no leaves
    return model.eval()


def test_a_copy_computes_the_same_with_plain_weights_and_the_model_stays(model: nn.Module) -> None:
    names, before = list(model.state_dict()), model(X)
    stored = with_stored_weights(model)
    assert computed_weights(model) == COMPUTED
    assert computed_weights(stored) == []
    assert torch.equal(stored(X), before)
    assert torch.equal(model(X), before)
    assert list(model.state_dict()) == names
    assert {type(part) for part in stored.modules()} == {Net, nn.Conv1d, nn.Linear, nn.LSTM}
    assert all(parameter.requires_grad for parameter in stored.parameters())
    stored.train()(X).sum().backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None for parameter in stored.parameters())


def test_a_model_without_any_is_returned_itself() -> None:
    plain = nn.Linear(2, 2)
    assert with_stored_weights(plain) is plain


def test_copies_of_a_parametrized_layer_are_independent() -> None:
    first = parametrizations.weight_norm(nn.Linear(4, 4))
    second = copy.deepcopy(first)
    both = nn.Sequential(first, second)
    before = both(X[:, 0, :4])
    store_weights(both)
    assert torch.equal(both(X[:, 0, :4]), before)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_the_tensor_that_a_weight_is_computed_from_may_belong_to_another_layer_too() -> None:
    both = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    both[1].weight = both[0].weight
    parametrize.register_parametrization(both[1], "weight", Doubled())
    before = both(X[:, 0, :4])
    store_weights(both)
    assert torch.allclose(both(X[:, 0, :4]), before)


def test_they_are_planned_quantized_and_rebuilt_as_their_plain_types(model: nn.Module) -> None:
    plan = make_plan(model, X, QuantizeSection(), model_name="net")
    layers = {layer.name: layer for layer in plan.layers}
    assert {name: layers[name].type for name in ("conv", "spectral", "lstm")} == {
        "conv": "Conv1d",
        "spectral": "Linear",
        "lstm": "LSTM",
    }
    assert {layers[name].precision for name in ("conv", "spectral", "old", "old_spectral")} == {Precision.INT8}
    assert any(note.startswith("conv.weight") and "plain weights" in note for note in plan.notes)
    state = quantize_model(model, plan).state_dict()
    torch.manual_seed(1)
    rebuilt = quantize_model(Net().eval(), plan)
    rebuilt.load_state_dict(state, strict=True)
