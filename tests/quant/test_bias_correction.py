"""Biases corrected: mean outputs as in float, layer by layer; what cannot be corrected is left alone."""

import pytest
import torch
from torch import Tensor, nn

from maseRT.config import QuantizeSection
from maseRT.plan import Plan
from maseRT.quant import make_plan, quantize_model, quantizers_off
from maseRT.quant.bias_correction import correct_biases, restore_biases
from maseRT.quant.calibrators import Method, amax_from_histograms
from maseRT.quant.observe import load_amax, observe

INT8 = QuantizeSection(rules=[{"name": "*", "precision": "int8"}])


def calibrated(model: nn.Module, x: Tensor) -> Plan:
    """Quantize a model; its ranges clip, so that means are off."""
    plan = make_plan(model.eval(), x, INT8, model_name="model")
    quantize_model(model, plan)
    with torch.no_grad(), observe(model.eval()) as histograms:
        model(x)
    clipping = Method("percentile", 97.0)
    load_amax(model, amax_from_histograms(histograms, lambda _: clipping, ties=plan.ties))
    return plan


def channel_means(model: nn.Module, x: Tensor, axes: dict[str, int]) -> dict[str, Tensor]:
    """Return the mean of each named layer's output over everything but the channel axis."""
    found: dict[str, Tensor] = {}

    def hook(name: str):
        return lambda layer, arguments, output: found.update({name: output.transpose(0, axes[name]).flatten(1).mean(1)})

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in axes]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(
    ("make", "shape", "axes"),
    [
        (
            lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2)),
            (3, 8, 8),
            {"0": 1, "3": 1},
        ),
        (lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5)), (7, 6), {"0": 2, "2": 2}),
        (lambda: nn.Sequential(nn.Conv1d(4, 8, 3), nn.ReLU(), nn.Conv1d(8, 8, 3)), (4, 12), {"0": 1, "2": 1}),
    ],
    ids=["images", "tokens", "sequences"],
)
def test_every_layers_mean_output_is_that_of_the_float_model(make, shape, axes):
    torch.manual_seed(0)
    model, x = make(), torch.randn(64, *shape)
    plan = calibrated(model, x)
    with quantizers_off(model):
        wanted = channel_means(model, x, axes)
    before = channel_means(model, x, axes)
    assert set(correct_biases(model, plan, x)) == set(axes)
    after = channel_means(model, x, axes)
    for name in axes:
        off, still_off = ((found[name] - wanted[name]).abs().max().item() for found in (before, after))
        assert off > 1e-3
        assert still_off < 1e-5


def test_restored_biases_give_the_same_outputs():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)), torch.randn(16, 3, 8, 8)
    plan = calibrated(model, x)
    with torch.no_grad():
        before = model(x)
        biases = correct_biases(model, plan, x)
        assert not torch.equal(model(x), before)
        restore_biases(model, biases)
        assert torch.equal(model(x), before)


class Shared(nn.Module):
    """One layer that runs twice, and one without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(8, 8)
        self.plain = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.plain(torch.relu(self.twice(torch.relu(self.twice(x))))))
        return result


def test_a_layer_that_runs_twice_and_one_without_a_bias_are_left_alone():
    torch.manual_seed(0)
    model, x = Shared(), torch.randn(32, 8)
    plan = calibrated(model, x)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert list(correct_biases(model, plan, x)) == ["head"]
    assert [name for name, value in model.state_dict().items() if not torch.equal(value, state[name])] == ["head.bias"]
