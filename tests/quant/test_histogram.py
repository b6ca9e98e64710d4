"""Histograms: exact counts whatever the batches, ranges that grow, bad values, saving."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maseRT.errors import StepError
from maseRT.precision import QuantSpec
from maseRT.quant.histogram import BINS, Histogram, histograms_from_tensors, merged, tensors_from_histograms

FIELDS = ("counts", "exponent", "max", "zeros")


def histogram_of(*batches: Tensor, axis: int | None = None) -> Histogram:
    histogram = Histogram(QuantSpec(axis=axis), channels=None if axis is None else batches[0].shape[axis])
    for batch in batches:
        histogram.collect(batch)
    return histogram


def assert_same(a: Histogram, b: Histogram) -> None:
    for field in FIELDS:
        assert torch.equal(getattr(a, field), getattr(b, field)), field
    torch.testing.assert_close(a.square_sum, b.square_sum, rtol=1e-5, atol=0)


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)
batches_of_floats = st.lists(st.lists(floats, max_size=20), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(batches_of_floats, st.randoms(use_true_random=False))
def test_batches_and_their_order_do_not_matter(batches: list[list[float]], random) -> None:
    tensors = [torch.tensor(batch) for batch in batches]
    shuffled = random.sample(tensors, len(tensors))
    once = histogram_of(torch.cat(tensors))
    assert_same(histogram_of(*tensors), once)
    assert_same(histogram_of(*shuffled), once)


@settings(max_examples=60, deadline=None)
@given(batches_of_floats)
def test_growing_loses_no_count_and_moves_no_value_out_of_its_bin(batches: list[list[float]]) -> None:
    histogram = histogram_of(*(torch.tensor(batch) for batch in batches))
    values = torch.tensor([abs(value) for batch in batches for value in batch], dtype=torch.float64)
    expected = torch.bincount((values / histogram.width).long(), minlength=histogram.counts.shape[1])
    assert torch.equal(histogram.counts[0], expected)
    assert histogram.count.item() == histogram.bins().counts.sum().item() == len(values)
    assert histogram.zeros.item() == int((values == 0).sum())
    assert histogram.max.item() == (values.max().item() if len(values) else 0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(-30, 30))
def test_bins_reach_the_maximum_and_shift_no_value_by_a_bin(seed: int, log2_scale: float) -> None:
    values = torch.randn(500, generator=torch.Generator().manual_seed(seed)) * 2.0**log2_scale
    bins = histogram_of(values).bins()
    assert bins.counts.shape == (1, BINS)
    torch.testing.assert_close(bins.width * BINS, values.abs().max().double()[None])
    exact = (values.abs().double() / bins.width).clamp(max=BINS - 1).long().sort().values
    binned = torch.arange(BINS).repeat_interleave(bins.counts[0])
    assert (exact - binned).abs().max() <= 1
    assert (exact != binned).float().mean() < 0.06


def test_tiny_then_huge_keeps_memory_and_counts() -> None:
    histogram = Histogram(QuantSpec())
    size = histogram.counts.numel()
    for scale in (0.0, 1e-3, 100.0, 1e-3, 1e30):
        histogram.collect(torch.full((50,), scale))
    assert histogram.counts.numel() == size
    assert histogram.count.item() == 250
    assert histogram.zeros.item() == 50
    assert histogram.max.item() == torch.tensor(1e30).item()


def test_counts_do_not_saturate() -> None:
    histogram = histogram_of(torch.full((2**20,), 3.0))
    for _ in range(5):
        histogram = merged([histogram, histogram])
    histogram.collect(torch.full((1,), 3.0))
    assert histogram.count.item() == histogram.counts.max().item() == 2**25 + 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_count_as_their_float32_values(dtype: torch.dtype) -> None:
    values = torch.randn(3, 7, 11).to(dtype)
    assert_same(histogram_of(values), histogram_of(values.float()))


def test_half_precision_values_whose_squares_overflow_keep_a_finite_sum() -> None:
    values = torch.full((4,), 6e4, dtype=torch.float16)
    torch.testing.assert_close(histogram_of(values).square_sum, values.double().square().sum()[None])


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_each_channel_has_its_own_histogram(axis: int) -> None:
    weight = torch.randn(4, 5, 3) * torch.logspace(-4, 3, 5)[:, None] * torch.logspace(-2, 2, 4)[:, None, None]
    whole = histogram_of(weight, axis=axis)
    for channel, values in enumerate(weight.unbind(axis)):
        alone = histogram_of(values[None], axis=0)
        for field in FIELDS:
            assert torch.equal(getattr(whole, field)[channel], getattr(alone, field)[0])


def test_the_first_bins_of_a_channel_reach_its_maximum() -> None:
    weight = torch.randn(6, 400) * torch.logspace(-3, 3, 6)[:, None]
    bins = histogram_of(weight, axis=0).bins()
    assert torch.equal(bins.max, weight.abs().amax(1))
    assert bool((((bins.used - 1) * bins.width <= bins.max) & (bins.max < bins.used * bins.width)).all())
    assert bool(((bins.used > BINS // 2) & (bins.used <= BINS)).all())


def test_a_channel_axis_that_does_not_fit_is_refused() -> None:
    with pytest.raises(StepError, match=r"fc.weight: shape .* 5 channels on axis 0"):
        Histogram(QuantSpec(axis=0), channels=5).collect(torch.ones(4, 3), where="fc.weight")
    with pytest.raises(ValueError, match="channels"):
        Histogram(QuantSpec(axis=0))


def test_an_empty_batch_counts_nothing() -> None:
    histogram = histogram_of(torch.empty(0, 3))
    assert histogram.count.item() == 0


@pytest.mark.parametrize(
    ("bad", "message"), [(float("nan"), "1 NaN and 0 infinite"), (float("-inf"), "0 NaN and 1 infinite")]
)
@pytest.mark.parametrize("axis", [None, 0])
def test_values_that_are_not_finite_are_refused_and_not_counted(bad: float, message: str, axis: int | None) -> None:
    histogram = histogram_of(torch.ones(2, 3), axis=axis)
    with pytest.raises(StepError, match=f"conv1.input, batch 3: {message} values among 6"):
        histogram.collect(torch.tensor([[1.0, bad, 2.0], [9.0, 9.0, 9.0]]), where="conv1.input, batch 3")
    assert_same(histogram, histogram_of(torch.ones(2, 3), axis=axis))


def test_histograms_add_up_to_that_of_all_values() -> None:
    parts = [torch.randn(100) * scale for scale in (1e-3, 50.0, 1.0)]
    histograms = [histogram_of(part) for part in parts]
    assert_same(merged(histograms), histogram_of(torch.cat(parts)))
    assert_same(histograms[0], histogram_of(parts[0]))
    with pytest.raises(ValueError, match="cannot add"):
        merged([histograms[0], histogram_of(torch.ones(2, 2), axis=0)])


def test_a_copy_does_not_follow_its_original() -> None:
    original = histogram_of(torch.ones(3))
    copy = original.to("cpu")
    original.collect(torch.ones(3))
    assert copy.count.item() == 3


def test_saved_histograms_come_back(tmp_path: Path) -> None:
    histograms = {
        "layer1.0.add.1": histogram_of(torch.randn(1000), torch.zeros(5)),
        "conv1.weight": histogram_of(torch.randn(6, 4, 3), axis=1),
        "never": Histogram(QuantSpec(bits=4)),
    }
    tensors, metadata = tensors_from_histograms(histograms)
    file = tmp_path / "histograms.safetensors"
    safetensors.torch.save_file(tensors, file, metadata)
    with safetensors.safe_open(file, "pt") as opened:
        loaded = histograms_from_tensors({name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata())  # noqa: SIM118
    assert list(loaded) == list(histograms)
    for name, histogram in histograms.items():
        assert loaded[name].spec == histogram.spec
        assert_same(loaded[name], histogram)
    loaded["conv1.weight"].collect(torch.randn(6, 4, 3))
    assert file.stat().st_size < 40_000


def test_tensors_that_are_no_histograms_are_refused() -> None:
    tensors, metadata = tensors_from_histograms({"a.input": histogram_of(torch.ones(3))})
    missing = {name: tensor for name, tensor in tensors.items() if not name.endswith("max")}
    beyond = {**tensors, "a.input.index": torch.tensor([10**9], dtype=torch.int32)}
    for bad_tensors, bad_metadata in (
        (missing, metadata),
        (beyond, metadata),
        (tensors, {}),
        (tensors, {"histograms": "[1, 2]"}),
        (tensors, {"histograms": json.dumps({"a.input": {"bits": 8, "axis": None, "color": 1}})}),
    ):
        with pytest.raises(StepError, match="not the histograms that calibration saves"):
            histograms_from_tensors(bad_tensors, bad_metadata)
