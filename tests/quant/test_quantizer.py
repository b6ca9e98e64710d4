"""The quantizer: its values, its gradient at the clip edge, its states."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from maseRT.errors import StepError
from maseRT.precision import QuantSpec
from maseRT.quant import Quantizer, amax_name, exporting, quantizers, quantizers_off

SCALES = st.floats(2.0**-20, 2.0**10, width=32)


def calibrated(amax: float | torch.Tensor, spec: QuantSpec = QuantSpec()) -> Quantizer:  # noqa: B008
    amax = torch.as_tensor(amax, dtype=torch.float32)
    quantizer = Quantizer(spec, None if spec.axis is None else len(amax))
    quantizer.amax.copy_(amax)
    return quantizer


def expected(x: np.ndarray, scale: np.ndarray, low: int = -128, high: int = 127) -> np.ndarray:
    """ONNX QuantizeLinear, then DequantizeLinear, in float32."""
    return np.clip(np.rint(x / scale), low, high).astype(np.float32) * scale


def around(values: np.ndarray) -> np.ndarray:
    """Each value with its two float32 neighbours."""
    infinity = np.float32(np.inf)
    return np.concatenate([np.nextafter(values, -infinity), values, np.nextafter(values, infinity)])


@given(scale=SCALES)
@settings(deadline=None, max_examples=50)
def test_values_are_those_of_onnx_also_at_ties_and_beyond_the_range(scale: float) -> None:
    quantizer = calibrated(127 * scale)
    step = quantizer.scale.numpy()
    x = around(step * np.arange(-132, 133, 0.5, dtype=np.float32))
    got = quantizer(torch.from_numpy(x)).numpy()
    np.testing.assert_array_equal(got, expected(x, step))


@given(scale=SCALES)
@settings(deadline=None, max_examples=50)
def test_gradient_passes_exactly_where_the_rounded_value_is_in_range(scale: float) -> None:
    quantizer = calibrated(127 * scale)
    step = quantizer.scale.numpy()
    edges = np.array([-129, -128.5, -128, 0, 127, 127.5, 128], np.float32)
    x = torch.from_numpy(around(around(step * edges))).requires_grad_()
    upstream = torch.arange(1.0, len(x) + 1)
    quantizer(x).backward(upstream)
    q = np.rint(x.detach().numpy() / step)
    inside = torch.from_numpy((q >= -128) & (q <= 127))
    assert torch.equal(x.grad, upstream * inside)
    assert inside.any()
    assert not inside.all()


def test_the_tie_at_the_upper_edge_is_outside_and_at_the_lower_edge_inside() -> None:
    x = torch.tensor([127.5, 127.49, -128.5, -128.51], requires_grad=True)
    quantizer = calibrated(127.0)
    y = quantizer(x)
    y.sum().backward()
    assert y.tolist() == [127.0, 127.0, -128.0, -128.0]
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("axis", [0, 1])
def test_every_channel_has_its_own_scale_and_clip_edge(axis: int) -> None:
    amax = torch.tensor([127.0, 12.7, 1.0])
    quantizer = calibrated(amax, QuantSpec(axis=axis))
    x = torch.linspace(-130, 130, 3 * 3 * 50).view(3, 3, 50).requires_grad_()
    y = quantizer(x)
    y.sum().backward()
    shape = (3, 1, 1) if axis == 0 else (1, 3, 1)
    scale = (amax / 127).numpy().reshape(shape)
    values = x.detach().numpy()
    np.testing.assert_array_equal(y.detach().numpy(), expected(values, scale))
    q = np.rint(values / scale)
    np.testing.assert_array_equal(x.grad.numpy(), ((q >= -128) & (q <= 127)).astype(np.float32))


def test_bits_set_the_range() -> None:
    quantizer = calibrated(7.0, QuantSpec(bits=4))
    assert quantizer(torch.tensor([-9.0, -8.0, 3.4, 9.0])).tolist() == [-8.0, -8.0, 3.0, 7.0]


def test_half_tensors_are_quantized_with_a_half_scale() -> None:
    quantizer = calibrated(3.0)
    x = torch.linspace(-4, 4, 101, dtype=torch.float16)
    scale = np.float32(np.float16(np.float32(3.0) / np.float32(127)))
    want = expected(x.float().numpy(), scale).astype(np.float16)
    y = quantizer(x)
    assert y.dtype is torch.float16
    np.testing.assert_array_equal(y.numpy(), want)


def test_a_range_too_small_for_half_is_refused() -> None:
    quantizer = calibrated(1e-6)
    quantizer.name = "conv.input"
    assert quantizer(torch.ones(3)).tolist() == pytest.approx([1e-6] * 3)
    with pytest.raises(StepError, match=r"conv\.input.*too small for torch\.float16"):
        quantizer(torch.ones(3, dtype=torch.float16))


@pytest.mark.parametrize("amax", [float("nan"), 0.0, -1.0, float("inf")])
@pytest.mark.parametrize("axis", [None, 0])
def test_a_range_that_is_not_set_is_named(amax: float, axis: int | None) -> None:
    quantizer = calibrated(amax if axis is None else torch.tensor([1.0, amax]), QuantSpec(axis=axis))
    quantizer.name = "layer1.0.conv1.weight"
    with pytest.raises(StepError, match=r"layer1\.0\.conv1\.weight"):
        quantizer(torch.ones(2, 3))
    with pytest.raises(StepError, match="calibrate"), exporting(quantizer):
        pass


def test_a_range_changed_in_place_or_loaded_counts_at_once() -> None:
    quantizer, x = calibrated(127.0), torch.tensor([100.4])
    assert quantizer(x).item() == 100.0
    quantizer.amax.copy_(torch.tensor(50.0))
    assert quantizer(x).item() == 50.0
    quantizer.load_state_dict(calibrated(12.7).state_dict())
    assert quantizer(x).item() == pytest.approx(12.7)
    quantizer.load_state_dict(calibrated(127.0).state_dict(), assign=True)
    assert quantizer(x).item() == 100.0
    quantizer.amax.fill_(float("nan"))
    with pytest.raises(StepError):
        quantizer(x)


def test_a_copy_has_its_own_range() -> None:
    quantizer, x = calibrated(127.0), torch.tensor([100.4])
    quantizer(x)
    twin = copy.deepcopy(quantizer)
    twin.amax.fill_(50.0)
    assert (quantizer(x).item(), twin(x).item()) == (100.0, 50.0)


def test_channels_have_to_go_with_the_axis() -> None:
    with pytest.raises(StepError):
        Quantizer(QuantSpec(axis=0))
    with pytest.raises(StepError):
        Quantizer(QuantSpec(), 3)
    assert Quantizer(QuantSpec(axis=0), 3).amax.shape == (3,)


def test_off_is_the_identity_and_comes_back_on_after_an_error() -> None:
    model, x = nn.Sequential(calibrated(1.0), calibrated(float("nan"))), torch.randn(5)
    with pytest.raises(RuntimeError), quantizers_off(model):
        assert torch.equal(model(x), x)
        raise RuntimeError
    assert not torch.equal(model[0](x), x)


def test_off_leaves_what_was_off_before() -> None:
    model = nn.Sequential(calibrated(1.0), calibrated(1.0))
    model[0].enabled = False
    with quantizers_off(model):
        pass
    assert [q.enabled for q in model] == [False, True]


def test_an_observer_sees_the_tensor_which_passes_unchanged() -> None:
    quantizer, seen = Quantizer(QuantSpec()), []
    quantizer.observer = seen.append
    x = torch.randn(4)
    assert quantizer(x) is x
    assert seen[0] is x
    quantizer.enabled = False
    assert quantizer.active


def test_quantizers_lists_shared_modules_once_under_their_amax_names() -> None:
    model = nn.ModuleDict({"input_quantizer": Quantizer(QuantSpec()), "block": nn.Module()})
    model["block"].weight_quantizer = Quantizer(QuantSpec(axis=0), 2)
    model["block"].again_quantizer = model["input_quantizer"]
    assert [amax_name(name) for name in quantizers(model)] == ["input", "block.weight"]


class TestFollow:
    def test_the_range_is_the_largest_weight_of_the_moment_and_every_gradient_passes(self) -> None:
        weight = torch.randn(4, 3, 5, requires_grad=True)
        quantizer = Quantizer(QuantSpec(axis=1), 3)
        quantizer.follow = True
        for _ in range(2):
            y = quantizer(weight)
            amax = weight.detach().abs().amax((0, 2))
            assert torch.equal(quantizer.amax, amax)
            scale = (amax / 127).numpy().reshape(1, 3, 1)
            np.testing.assert_array_equal(y.detach().numpy(), expected(weight.detach().numpy(), scale))
            weight.grad = None
            y.sum().backward()
            assert torch.equal(weight.grad, torch.ones_like(weight))
            with torch.no_grad():
                weight.mul_(3)

    def test_one_scale_for_the_tensor(self) -> None:
        quantizer = Quantizer(QuantSpec())
        quantizer.follow = True
        quantizer(torch.tensor([[1.0, -3.0], [0.5, 2.0]]))
        assert quantizer.amax.item() == 3.0

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_a_channel_of_zeros_stays_zero(self, dtype: torch.dtype) -> None:
        quantizer = Quantizer(QuantSpec(axis=0), 2)
        quantizer.follow = True
        weight = torch.tensor([[0.0, 0.0], [1.0, -1.0]], dtype=dtype)
        assert torch.allclose(quantizer(weight), weight, atol=1e-3)
        quantizer.follow = False
        quantizer.check()
        assert quantizer(weight)[0].tolist() == [0.0, 0.0]


class TestLearnedRange:
    def test_it_is_a_parameter_under_the_same_state_key(self) -> None:
        quantizer = calibrated(2.0)
        before = quantizer.state_dict()
        quantizer.learn_amax()
        quantizer.learn_amax()
        assert [name for name, _ in quantizer.named_parameters()] == ["amax"]
        assert quantizer.state_dict().keys() == before.keys()
        fresh = Quantizer(QuantSpec())
        fresh.load_state_dict(quantizer.state_dict(), strict=True)
        assert fresh.amax.item() == 2.0

    def test_its_gradient_is_that_of_lsq(self) -> None:
        quantizer = calibrated(1.0)
        quantizer.learn_amax()
        x = torch.linspace(-1.5, 1.5, 200).requires_grad_()
        upstream = torch.randn(200)
        y = quantizer(x)
        y.backward(upstream)
        v = x.detach().double() / quantizer.scale.double()
        q = v.round()
        along = torch.where(q > 127, 127.0, torch.where(q < -128, -128.0, q - v))
        want = (upstream * along).sum() / (200 * 127) ** 0.5 / 127
        assert quantizer.amax.grad.item() == pytest.approx(want.item(), rel=1e-3)
        assert torch.equal(x.grad, upstream * ((q >= -128) & (q <= 127)))

    def test_values_are_the_same_in_training_and_eval(self) -> None:
        quantizer, x = calibrated(1.3), torch.randn(1000)
        quantizer.learn_amax()
        assert torch.equal(quantizer.train()(x), quantizer.eval()(x))

    def test_training_widens_a_range_that_clips_too_much(self) -> None:
        quantizer, x = calibrated(0.1), torch.randn(2000)
        quantizer.learn_amax()
        optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.05)
        for _ in range(100):
            optimizer.zero_grad()
            (quantizer(x) - x).square().sum().backward()
            optimizer.step()
        assert 1.5 < quantizer.amax.item() < 5

    def test_a_range_driven_below_zero_does_not_give_nan(self) -> None:
        quantizer = calibrated(1.0)
        quantizer.learn_amax()
        with torch.no_grad():
            quantizer.amax.fill_(-0.5)
        assert quantizer(torch.randn(5)).isfinite().all()

    def test_only_ranges_per_tensor_that_are_set(self) -> None:
        with pytest.raises(StepError, match="per tensor"):
            calibrated(torch.ones(2), QuantSpec(axis=0)).learn_amax()
        with pytest.raises(StepError, match="calibrate"):
            Quantizer(QuantSpec()).learn_amax()


def test_exporting_takes_8_bits_only() -> None:
    with pytest.raises(StepError, match="4 bits"), exporting(nn.Sequential(calibrated(1.0, QuantSpec(bits=4)))):
        pass


def test_a_compiled_quantizer_gives_the_same_values_and_gradients() -> None:
    model = nn.Sequential(calibrated(1.0), nn.Tanh(), calibrated(0.5))
    x, y = (torch.linspace(-2, 2, 64).requires_grad_() for _ in range(2))
    model(x).sum().backward()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    result = compiled(y)
    result.sum().backward()
    assert torch.equal(result, model(x))
    assert torch.equal(x.grad, y.grad)
