"""Ranges from histograms: against pytorch-quantization where it is right, against brute force, and in properties."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from maseRT.errors import StepError, UsageError
from maseRT.precision import QuantSpec
from maseRT.quant.calibrators import (
    METHODS,
    Method,
    always_zero,
    amax_entropy,
    amax_from_histograms,
    amax_max,
    amax_mse,
    amax_percentile,
)
from maseRT.quant.histogram import Bins, Histogram
from maseRT.quant.sqnr import sqnr_db

NAMES = ["max", "entropy", "mse", "percentile-99.9", "percentile-50"]

DISTRIBUTIONS = {
    "normal": lambda: torch.randn(50_000),
    "relu": lambda: torch.randn(50_000).relu(),
    "exponential": lambda: torch.randn(50_000).exp(),
    "outliers": lambda: torch.cat([torch.randn(50_000) * 0.1, torch.tensor([9.0, -30.0])]),
}


def histogram_of(*batches: Tensor, axis: int | None = None) -> Histogram:
    histogram = Histogram(QuantSpec(axis=axis), channels=None if axis is None else batches[0].shape[axis])
    for batch in batches:
        histogram.collect(batch)
    return histogram


def amax_of(histogram: Histogram, method: str) -> Tensor:
    return amax_from_histograms({"x": histogram}, lambda _: Method.parse(method))["x"]


def bins_of(counts: Tensor, width: float = 0.01) -> Bins:
    """Bins whose maximum is the upper end of the last one."""
    rows, size = counts.shape
    ones = torch.ones(rows)
    return Bins(
        counts=counts,
        used=(ones * size).long(),
        width=ones.double() * width,
        max=(ones.double() * size * width).float(),
        zeros=torch.zeros_like(ones).long(),
        bits=8,
    )


def fake_quantized(x: Tensor, amax: float) -> Tensor:
    scale = amax / 127
    return (x / scale).round().clamp(-128, 127) * scale


def mean_squared_error(x: Tensor, amax: float) -> float:
    return (fake_quantized(x.double(), amax) - x.double()).square().mean().item()


class TestAgainstPytorchQuantization:
    @pytest.fixture
    def library(self):
        return pytest.importorskip("pytorch_quantization.calib.histogram")

    @staticmethod
    def counts_and_edges(bins: Bins) -> tuple[np.ndarray, np.ndarray]:
        size = int(bins.used[0])
        return bins.counts[0, :size].numpy().copy(), (torch.arange(size + 1) * bins.width[0]).numpy()

    @pytest.mark.parametrize("distribution", ["relu", "outliers"])
    def test_entropy_of_collected_histograms(self, library, distribution: str) -> None:
        bins = histogram_of(DISTRIBUTIONS[distribution]()).bins()
        expected = library._compute_amax_entropy(*self.counts_and_edges(bins), 8, False)
        torch.testing.assert_close(amax_entropy(bins)[0], expected.float(), rtol=1e-6, atol=0)

    @pytest.mark.parametrize("seed", range(8))
    @pytest.mark.parametrize("kind", ["dense", "sparse", "decaying"])
    def test_entropy_of_short_histograms(self, library, kind: str, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        size = 260 + 20 * seed
        decay = torch.exp(-torch.arange(size) / 60) if kind == "decaying" else torch.ones(size)
        counts = (torch.rand(size, generator=generator) * 1000 * decay).long()
        if kind == "sparse":
            counts *= torch.rand(size, generator=generator) < 0.3
        counts[-1] = 1
        bins = bins_of(counts[None])
        expected = library._compute_amax_entropy(*self.counts_and_edges(bins), 8, False)
        torch.testing.assert_close(amax_entropy(bins)[0], expected.float(), rtol=1e-6, atol=0)

    @pytest.mark.parametrize("percentile", [10.0, 99.0, 99.9, 99.99, 99.999])
    @pytest.mark.parametrize("distribution", DISTRIBUTIONS)
    def test_percentile(self, library, distribution: str, percentile: float) -> None:
        bins = histogram_of(DISTRIBUTIONS[distribution]()).bins()
        expected = library._compute_amax_percentile(*self.counts_and_edges(bins), percentile)
        if expected > 0:
            torch.testing.assert_close(amax_percentile(bins, percentile)[0], expected.float(), rtol=1e-6, atol=0)
        else:
            assert amax_percentile(bins, percentile)[0] == bins.width[0].float()

    @pytest.mark.parametrize("axis", [None, 0])
    def test_max(self, axis: int | None) -> None:
        calibrators = pytest.importorskip("pytorch_quantization.calib")
        batches = [torch.randn(5, 40) * scale for scale in (0.1, 3.0, 1.0)]
        calibrator = calibrators.MaxCalibrator(8, axis, False)
        for batch in batches:
            calibrator.collect(batch)
        expected = calibrator.compute_amax()
        assert torch.equal(
            amax_of(histogram_of(*batches, axis=axis), "max"), expected.flatten() if axis == 0 else expected
        )

    @pytest.mark.parametrize("method", ["percentile", "mse"])
    def test_its_own_histogram_of_the_whole_stream_is_within_a_bin(self, library, method: str, monkeypatch) -> None:
        batches = [torch.randn(20_000) * scale for scale in (0.5, 1.0, 0.9)]
        calibrator = library.HistogramCalibrator(8, None, False)
        calibrator.collect(torch.cat(batches))
        monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
        expected = float(calibrator.compute_amax(method, percentile=99.9))
        histogram = histogram_of(*batches)
        ours = amax_of(histogram, "mse" if method == "mse" else "percentile-99.9").item()
        width = histogram.bins().width.item()
        if method == "percentile":
            assert abs(ours - expected) <= width * 1.001
        else:
            everything = torch.cat(batches)
            assert mean_squared_error(everything, ours) <= 1.002 * mean_squared_error(everything, expected)


def test_mse_of_a_normal_distribution() -> None:
    histogram = histogram_of(*(torch.randn(2**20) for _ in range(8)))
    assert amax_of(histogram, "mse").item() == pytest.approx(3.92, abs=0.03)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_mse_is_as_good_as_the_best_of_all_ranges(distribution: str) -> None:
    x = DISTRIBUTIONS[distribution]()
    ours = amax_of(histogram_of(x), "mse").item()
    candidates = torch.linspace(0.02, 1, 150).double() * x.abs().max()
    best = min(mean_squared_error(x, amax.item()) for amax in candidates)
    assert mean_squared_error(x, ours) <= 1.01 * best


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31), st.integers(20, 60))
def test_mse_equals_its_definition_written_out(seed: int, size: int) -> None:
    counts = torch.randint(0, 50, (1, size), generator=torch.Generator().manual_seed(seed))
    counts[0, -1] += 1
    points = (torch.arange(size * 400, dtype=torch.float64) + 0.5) / 400
    weight = counts[0].double().repeat_interleave(400) / 400
    error = torch.stack([(weight * (fake_quantized(points, c) - points) ** 2).sum() for c in range(1, size + 1)])
    chosen = round(amax_mse(bins_of(counts, width=1.0)).item())
    assert error[chosen - 1] <= error.min() * 1.001


def test_mse_knows_that_zeros_cost_nothing() -> None:
    x = torch.randn(20_000).exp() * 0.1
    with_zeros = histogram_of(x, torch.zeros(2_000_000))
    assert torch.equal(amax_of(with_zeros, "mse"), amax_of(histogram_of(x), "mse"))


@pytest.mark.parametrize("method", NAMES)
def test_a_stream_gives_what_its_concatenation_gives(method: str) -> None:
    batches = [torch.randn(3000) * scale for scale in (1e-3, 1.0, 100.0, 5.0)]
    streamed, at_once = histogram_of(*batches), histogram_of(torch.cat(batches))
    assert torch.equal(amax_of(streamed, method), amax_of(at_once, method))


@pytest.mark.parametrize("method", NAMES)
def test_channels_are_calibrated_one_by_one(method: str) -> None:
    weight = torch.randn(3, 700) * torch.tensor([1e-3, 1.0, 50.0])[:, None]
    together = amax_of(histogram_of(weight, axis=0), method)
    alone = [amax_of(histogram_of(row[None], axis=0), method) for row in weight]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("method", NAMES)
def test_a_constant_tensor_gets_its_value(method: str) -> None:
    histogram = histogram_of(torch.full((1000,), -0.37))
    assert amax_of(histogram, method).item() == pytest.approx(0.37, rel=1 / 2000)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=30), min_size=1, max_size=3),
    st.sampled_from(NAMES),
)
def test_a_range_is_positive_and_never_above_the_maximum(batches: list[list[float]], method: str) -> None:
    tensors = [torch.tensor(batch) for batch in batches]
    peak = max(tensor.abs().max() for tensor in tensors)
    assume(peak > 2**-99)
    amax = amax_of(histogram_of(*tensors), method)
    assert 0 < amax <= peak


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.001, 100), min_size=2, max_size=5), st.integers(0, 2**31))
def test_a_larger_percentile_never_gives_a_smaller_range(percentiles: list[float], seed: int) -> None:
    bins = histogram_of(torch.randn(300, generator=torch.Generator().manual_seed(seed)).exp()).bins()
    ranges = [amax_percentile(bins, percentile).item() for percentile in sorted(percentiles)]
    assert ranges == sorted(ranges)


@pytest.mark.parametrize("method", NAMES)
def test_the_scale_of_a_dead_channel_is_a_half_float(method: str) -> None:
    weight = torch.randn(3, 64) * torch.tensor([[1.0], [3e-9], [1e-3]])
    histograms = {"conv.weight": histogram_of(weight, axis=0)}
    amax = amax_from_histograms(histograms, lambda _: Method.parse(method))["conv.weight"]
    assert (amax / 127).half().gt(0).all()
    assert amax[1] < 1e-5
    own = amax_from_histograms({"conv.weight": histogram_of(weight[[0, 2]], axis=0)}, lambda _: Method.parse(method))
    assert torch.equal(amax[[0, 2]], own["conv.weight"])


@pytest.mark.parametrize("method", NAMES)
def test_tiny_weights_are_quantized_as_large_ones_are(method: str) -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    weight[1] *= 0.01
    ranges = [amax_of(histogram_of(weight * size, axis=0), method) / size for size in (1.0, 2.0**-24)]
    assert torch.equal(*ranges)


def test_percentile_keeps_its_share_of_the_values() -> None:
    x = torch.rand(100_000)
    assert amax_of(histogram_of(x), "percentile-90").item() == pytest.approx(0.9, abs=0.005)
    assert amax_of(histogram_of(x), "percentile-100") == x.max()


def test_all_tensors_in_one_call_get_what_each_gets_alone() -> None:
    histograms = {
        "a.input": histogram_of(torch.randn(500)),
        "a.weight": histogram_of(torch.randn(4, 50), axis=0),
        "b.input": histogram_of(torch.rand(500)),
    }
    methods = {"a.input": "entropy", "a.weight": "max", "b.input": "entropy"}
    amax = amax_from_histograms(histograms, lambda name: Method.parse(methods[name]))
    assert list(amax) == list(histograms)
    for name, value in amax.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, amax_of(histograms[name], methods[name]))


def test_more_channels_than_one_call_takes() -> None:
    histograms = {f"{i}.weight": histogram_of(torch.rand(1500, 2) + i, axis=0) for i in range(4)}
    amax = amax_from_histograms(histograms, lambda _: Method("max"))
    for name, histogram in histograms.items():
        assert torch.equal(amax[name], histogram.max)


def test_tied_tensors_share_the_range_of_all_their_values() -> None:
    parts = {"cat.0": torch.randn(400), "cat.1": torch.randn(400) * 7, "other": torch.randn(400)}
    histograms = {name: histogram_of(part) for name, part in parts.items()}
    amax = amax_from_histograms(histograms, lambda _: Method("mse"), ties=[("cat.0", "cat.1")])
    assert list(amax) == list(parts)
    both = amax_of(histogram_of(parts["cat.0"], parts["cat.1"]), "mse")
    assert amax["cat.0"] == amax["cat.1"] == both
    assert amax["other"] == amax_of(histograms["other"], "mse")
    for wrong in ([("cat.0", "cat.9")], [("cat.0", "cat.1"), ("other", "cat.1")]):
        with pytest.raises(StepError, match=r"cat\.[19]: a shared range"):
            amax_from_histograms(histograms, lambda _: Method("max"), ties=wrong)


def test_a_channel_of_zeros_gets_a_range_that_represents_it() -> None:
    weight = torch.randn(3, 20)
    weight[1] = 0
    amax = amax_of(histogram_of(weight, axis=0), "max")
    assert amax[1] == amax.max() == weight.abs().max()


@pytest.mark.parametrize("method", ["max", "entropy", "mse", "percentile-99.9"])
def test_tensors_of_zeros_get_ranges_whose_scales_are_normal_halves(method: str) -> None:
    histograms = {
        "fc.input": histogram_of(torch.zeros(5)),
        "fc.weight": histogram_of(torch.zeros(2, 3), axis=0),
        "head.weight": histogram_of(torch.zeros(2, 3)),
        "head.input": histogram_of(torch.ones(5)),
        "out.input": histogram_of(torch.full((5,), 1e-40)),
    }
    amax = amax_from_histograms(histograms, lambda _: Method.parse(method))
    assert amax["fc.weight"].shape == (2,)
    assert all(bool((value / 127 >= torch.finfo(torch.float16).tiny).all()) for value in amax.values())
    assert always_zero(histograms) == ["fc.input", "out.input"]


def test_tensors_without_data_are_named() -> None:
    histograms = {"fc.weight": histogram_of(torch.zeros(2, 3), axis=0)}
    many = {f"l{i}.input": Histogram(QuantSpec()) for i in range(11)}
    with pytest.raises(StepError, match=r"l0.input, .* and 3 more: no calibration batch reached it"):
        amax_from_histograms({**histograms, **many}, lambda _: Method("max"))


@pytest.mark.parametrize("name", ["max", "entropy", "mse", "percentile-99.9", "percentile-99.99999", "percentile-100"])
def test_names_of_methods_are_read_back(name: str) -> None:
    assert Method.parse(name).name == name
    assert Method.parse(name).kind in METHODS


def test_config_entries_become_methods() -> None:
    @dataclass(frozen=True)
    class Entry:
        percentile: float

    assert Method.of("entropy") == Method("entropy")
    assert Method.of(Entry(99.99)) == Method.parse("percentile-99.99")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("entorpy", "did you mean 'entropy'"),
        ("percentile", "has a number"),
        ("max-3", "has a number"),
        ("percentile-x", "'x' is not a number"),
        ("percentile-0", "not in"),
        ("percentile-101", "not in"),
        ("percentile-nan", "not in"),
    ],
)
def test_names_that_are_no_methods_are_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Method.parse(name)


def test_max_is_exact_beside_the_bins() -> None:
    x = torch.tensor([math.pi, -math.e])
    assert amax_max(histogram_of(x).bins()) == x.max()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("axis", [None, 0])
def test_a_gpu_gives_what_the_cpu_gives(method: str, axis: int | None) -> None:
    batches = [(torch.randn(80, 700) * scale).half() for scale in (1e-3, 1.0, 100.0)]
    on_gpu = Histogram(QuantSpec(axis=axis), channels=None if axis is None else 80, device="cuda")
    for batch in batches:
        on_gpu.collect(batch.cuda())
    on_cpu = histogram_of(*batches, axis=axis)
    assert on_gpu.device.type == "cuda"
    assert torch.equal(on_gpu.counts.cpu(), on_cpu.counts)
    amax = amax_of(on_gpu, method)
    assert amax.device.type == "cuda"
    torch.testing.assert_close(amax.cpu(), amax_of(on_cpu, method), rtol=1e-6, atol=0)
    assert sqnr_db(on_gpu, amax) == pytest.approx(sqnr_db(on_cpu, amax.cpu()), abs=1e-3)
