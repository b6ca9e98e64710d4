"""Squared error and SQNR from histograms against the error of really quantized values."""

import math

import pytest
import torch
from torch import Tensor

from maseRT.precision import QuantSpec
from maseRT.quant.histogram import Histogram
from maseRT.quant.sqnr import layer_sqnr_db, noise, sqnr_db, squared_error_integral


def histogram_of(x: Tensor, axis: int | None = None, bits: int = 8) -> Histogram:
    histogram = Histogram(QuantSpec(bits=bits, axis=axis), channels=None if axis is None else x.shape[axis])
    histogram.collect(x)
    return histogram


def measured_db(x: Tensor, amax: Tensor, bits: int = 8) -> float:
    top = 2 ** (bits - 1) - 1
    scale = amax.double() / top
    quantized = (x.double() / scale).round().clamp(-top, top) * scale
    return 10 * math.log10(x.double().square().sum() / (quantized - x.double()).square().sum())


@pytest.mark.parametrize("amax", [0.5, 2.5, 4.0, 100.0])
@pytest.mark.parametrize("kind", ["normal", "relu", "mostly zeros", "large"])
def test_sqnr_of_a_tensor(kind: str, amax: float) -> None:
    x = torch.randn(100_000)
    if kind == "relu":
        x = x.relu()
    if kind == "mostly zeros":
        x = x * (torch.rand_like(x) < 0.01)
    if kind == "large":
        x, amax = x * 1e20, amax * 1e20
    assert sqnr_db(histogram_of(x), torch.tensor(amax)) == pytest.approx(measured_db(x, torch.tensor(amax)), abs=0.15)


def test_fewer_bits_cost_more() -> None:
    x, amax = torch.randn(50_000), torch.tensor(3.0)
    assert sqnr_db(histogram_of(x, bits=4), amax) == pytest.approx(measured_db(x, amax, bits=4), abs=0.1)


def test_sqnr_of_channels_and_of_all_together() -> None:
    weight = torch.randn(3, 20_000) * torch.tensor([0.1, 1.0, 10.0])[:, None]
    amax = torch.tensor([0.3, 4.0, 20.0])
    histogram = histogram_of(weight, axis=0)
    scale = amax[:, None].double() / 127
    lost = ((weight / scale).round().clamp(-127, 127) * scale - weight).square().sum(1)
    assert noise(histogram, amax).tolist() == pytest.approx(lost.tolist(), rel=0.02)
    assert sqnr_db(histogram, amax) == pytest.approx(
        10 * math.log10(weight.double().square().sum() / lost.sum()), abs=0.1
    )


def test_a_tensor_of_zeros_loses_nothing() -> None:
    assert sqnr_db(histogram_of(torch.zeros(10)), torch.tensor(1.0)) == math.inf


def test_a_layer_is_as_noisy_as_its_operands_together() -> None:
    operands = torch.randn(3000, 64), torch.randn(64, 64)
    amax = torch.tensor(5.0)
    scale = amax / 127
    quantized = [(operand / scale).round().clamp(-127, 127) * scale for operand in operands]
    exact, got = (operands[0] @ operands[1]).double(), (quantized[0] @ quantized[1]).double()
    measured = 10 * math.log10(exact.square().sum() / (got - exact).square().sum())
    expected = layer_sqnr_db(sqnr_db(histogram_of(operand), amax) for operand in operands)
    assert measured == pytest.approx(expected, abs=0.5)
    assert layer_sqnr_db([30.0, math.inf]) == pytest.approx(30.0)


def test_the_integral_of_the_squared_error() -> None:
    points = (torch.arange(400_000, dtype=torch.float64) + 0.5) * 1e-3
    step = torch.tensor(2.7, dtype=torch.float64)
    error = points - step * (points / step).round().clamp(max=127)
    for end in (0.5, 1.35, 2.7, 100.0, 342.9, 344.25, 400.0):
        expected = error[points < end].square().sum() * 1e-3
        got = squared_error_integral(torch.tensor(end, dtype=torch.float64), step, 127)
        assert got.item() == pytest.approx(expected.item(), rel=1e-4)
