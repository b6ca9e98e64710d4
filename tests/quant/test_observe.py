"""Observing a model: every quantized tensor, once per weight, named in errors; ranges loaded strictly."""

import pytest
import torch
from torch import Tensor, nn

from maseRT.errors import StepError
from maseRT.precision import QuantSpec
from maseRT.quant.calibrators import Method, amax_from_histograms
from maseRT.quant.histogram import Histogram
from maseRT.quant.layers import quantize_layer
from maseRT.quant.observe import load_amax, observe
from maseRT.quant.quantizer import quantizers

NAMES = ["0.input", "0.weight", "2.input", "2.weight"]


def quantized_model() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    for name in ("0", "2"):
        quantize_layer(model.get_submodule(name), name=name, input=QuantSpec(), weight=QuantSpec(axis=0))
    return model.eval()


def collected(model: nn.Module, *batches: Tensor) -> dict[str, Histogram]:
    with observe(model) as histograms:
        for batch in batches:
            model(batch)
    return histograms


def calibrate(model: nn.Module, *batches: Tensor) -> None:
    load_amax(model, amax_from_histograms(collected(model, *batches), lambda _: Method("max")))


def test_every_quantized_tensor_has_a_histogram_of_what_it_saw() -> None:
    model = quantized_model()
    batches = [torch.randn(5, 6), torch.randn(2, 6)]
    histograms = collected(model, *batches)
    assert list(histograms) == NAMES
    assert histograms["0.input"].max == torch.cat(batches).abs().max()
    assert histograms["0.input"].count.item() == 7 * 6
    hidden = torch.relu(nn.functional.linear(torch.cat(batches), model[0].weight, model[0].bias))
    assert histograms["2.input"].max.item() == pytest.approx(hidden.max().item())
    assert torch.equal(histograms["2.weight"].max, model[2].weight.abs().amax(1))


def test_weights_are_counted_once_and_again_when_they_change() -> None:
    model = quantized_model()
    with observe(model) as histograms:
        model(torch.randn(2, 6))
        model(torch.randn(2, 6))
        assert histograms["0.weight"].count.tolist() == [6, 6, 6, 6]
        with torch.no_grad():
            model[0].weight.mul_(2)
        model(torch.randn(2, 6))
    assert histograms["0.weight"].count.tolist() == [12, 12, 12, 12]


def test_the_model_computes_in_float_inside_and_nothing_is_collected_after() -> None:
    model = quantized_model()
    x = torch.randn(5, 6)
    expected = nn.Sequential(*(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)))
    expected.load_state_dict({k: v for k, v in model.state_dict().items() if "quantizer" not in k})
    with observe(model) as histograms:
        assert torch.equal(model(x), expected(x))
    load_amax(model, amax_from_histograms(histograms, lambda _: Method("max")))
    assert not torch.equal(model(x), expected(x))
    assert histograms["0.input"].count.item() == x.numel()


def test_observers_are_removed_after_an_error() -> None:
    model = quantized_model()
    with pytest.raises(RuntimeError), observe(model):
        model(torch.randn(5, 7))
    assert all(quantizer.observer is None for quantizer in quantizers(model).values())


def test_a_bad_batch_is_named_with_its_number() -> None:
    model = quantized_model()
    bad = torch.zeros(2, 6)
    bad[1, 3] = float("nan")
    with pytest.raises(StepError, match=r"0\.input, calibration batch 3: 1 NaN and 0 infinite values among 12"):
        collected(model, torch.randn(2, 6), torch.randn(2, 6), bad)


def test_a_bad_weight_is_named() -> None:
    model = quantized_model()
    model[2].weight.data[0, 0] = float("inf")
    with pytest.raises(StepError, match=r"2\.weight: 0 NaN and 1 infinite values among 12"):
        collected(model, torch.randn(2, 6))


def test_a_layer_that_no_batch_reached_is_named() -> None:
    model = quantized_model()
    with observe(model) as histograms:
        model[0](torch.randn(2, 6))
    with pytest.raises(StepError, match=r"2\.input, 2\.weight: no calibration batch reached it"):
        amax_from_histograms(histograms, lambda _: Method("max"))


@pytest.mark.parametrize("method", ["max", "mse", "entropy", "percentile-99.9"])
def test_a_calibrated_model_answers_like_the_float_one(method: str) -> None:
    model = quantized_model()
    x = torch.randn(400, 6)
    with observe(model) as histograms:
        expected = model(x)
    load_amax(model, amax_from_histograms(histograms, lambda _: Method.parse(method)))
    assert (model(x) - expected).square().mean() < 1e-3 * expected.square().mean()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"2.input": None}, r"2\.input: no range for it"),
        ({"3.input": torch.tensor(1.0)}, r"3\.input: a range for it"),
        ({"2.weight": torch.ones(4)}, r"2\.weight: the range has the shape \[4\], the quantizer needs \[3\]"),
        ({"2.weight": torch.tensor([1.0, float("nan"), 1.0])}, r"2\.weight: the range is nan"),
        ({"2.input": torch.tensor(float("inf"))}, r"2\.input: the range is inf"),
        ({"2.input": torch.tensor(0.0)}, r"2\.input: the range is 0"),
        ({"2.input": torch.tensor(-1.0)}, r"2\.input: the range is -1"),
        ({"2.input": torch.tensor(1e-37)}, r"2\.input: the range is 1e-37"),
    ],
)
def test_ranges_that_do_not_fit_are_refused_and_change_nothing(change: dict[str, Tensor | None], message: str) -> None:
    model = quantized_model()
    calibrate(model, torch.randn(5, 6))
    before = {name: quantizer.amax.clone() for name, quantizer in quantizers(model).items()}
    amax = {name.removesuffix("_quantizer"): value * 2 for name, value in before.items()} | change
    with pytest.raises(StepError, match=message):
        load_amax(model, {name: value for name, value in amax.items() if value is not None})
    for name, quantizer in quantizers(model).items():
        assert torch.equal(quantizer.amax, before[name])
