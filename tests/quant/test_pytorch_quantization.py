"""The pytorch-quantization backend: values, gradients and outputs beside the library and the native backend."""

import copy
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from library_models import LIBRARY, Digits, Plain, Residual, Upsampling, library_quantizers, outputs, rule, sqnr_db
from torch import Tensor, nn

from maseRT.config import QuantizeSection
from maseRT.errors import MissingError, StepError, UsageError
from maseRT.onnx_export import export_onnx
from maseRT.onnx_graph import count_qdq
from maseRT.plan import Plan
from maseRT.precision import Precision, QuantSpec
from maseRT.quant import Quantizer, exporting, make_plan, quantize_model, quantizers
from maseRT.quant.backends import get_backend
from maseRT.quant.calibrators import Method, amax_from_histograms
from maseRT.quant.observe import load_amax, observe
from maseRT.quant.pytorch_quantization import NvidiaQuantizer, library_refusal
from maseRT.runtimes.onnxruntime import OnnxRuntime

quant_nn = pytest.importorskip("pytorch_quantization.nn")
QuantDescriptor = pytest.importorskip("pytorch_quantization.tensor_quant").QuantDescriptor


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits.load()


def prepared(model: nn.Module, x: Tensor, section: QuantizeSection) -> tuple[nn.Module, Plan]:
    plan = make_plan(model, x[:2], section, model_name="net")
    return quantize_model(copy.deepcopy(model), plan), plan


def calibrate(model: nn.Module, plan: Plan, x: Tensor) -> dict[str, Tensor]:
    with observe(model) as histograms, torch.inference_mode():
        model(x)
    amax = amax_from_histograms(histograms, lambda name: Method("max"), ties=plan.ties)
    load_amax(model, amax)
    return amax


def quantizer_with(amax: float | Tensor, axis: int | None = None, kind: type[Quantizer] = NvidiaQuantizer) -> Quantizer:
    value = torch.as_tensor(amax, dtype=torch.float32)
    quantizer = kind(QuantSpec(axis=axis), None if axis is None else len(value))
    quantizer.amax.copy_(value)
    return quantizer


@given(amax=st.floats(2.0**-16, 2.0**12, width=32), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_values_and_gradients_are_the_librarys(amax: float, seed: int) -> None:
    x = torch.randn(500, generator=torch.Generator().manual_seed(seed)) * amax
    reference = quant_nn.TensorQuantizer(QuantDescriptor())
    reference.amax = amax
    results = []
    for quantizer in (reference, quantizer_with(amax)):
        leaf = x.clone().requires_grad_()
        y = quantizer(leaf)
        y.backward(x)
        results.append((y.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert not torch.equal(results[0][1], x)


@given(
    amax=st.floats(2.0**-12, 2.0**8, width=32), dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
)
@settings(deadline=None, max_examples=60)
def test_values_are_the_native_ones_but_half_way_between_two_levels(amax: float, dtype: torch.dtype) -> None:
    native = quantizer_with(amax, kind=Quantizer)
    x = (torch.linspace(-1.1, 1.1, 4001) * amax).to(dtype)
    ours, theirs = native(x), quantizer_with(amax)(x)
    assert theirs.dtype is dtype
    step = native.scale.to(dtype).float()
    levels = x.float() / step
    between = ((levels % 1) - 0.5).abs() < 1e-4
    rounding = torch.finfo(dtype).eps * 256 * step
    assert torch.all((ours.float() - theirs.float()).abs() <= torch.where(between, step * 1.01, 0) + rounding)
    assert theirs.float().min() == pytest.approx(-128 * float(step), rel=float(torch.finfo(dtype).eps))


@pytest.mark.parametrize("axis", [0, 1])
def test_ranges_per_channel(axis: int) -> None:
    x = torch.randn(4, 5, 3, 3)
    amax = torch.rand(x.shape[axis]) + 0.1
    library = quant_nn.TensorQuantizer(QuantDescriptor(axis=axis))
    library._amax = amax.view([-1 if d == axis else 1 for d in range(4)])
    assert torch.equal(quantizer_with(amax, axis)(x), library(x))


def test_weight_ranges_follow_the_weights_also_of_a_layer_that_is_called_twice() -> None:
    quantizer = quantizer_with(torch.ones(2), axis=0)
    quantizer.follow = True
    weight = nn.Parameter(torch.tensor([[3.0, -5.0], [0.5, 0.25]]))
    (quantizer(weight) + quantizer(weight * 1.0)).sum().backward()
    assert quantizer.amax.tolist() == [5.0, 0.5]
    assert torch.equal(weight.grad, torch.full((2, 2), 2.0))


def test_off_it_is_the_identity_and_unset_it_says_so() -> None:
    quantizer = NvidiaQuantizer(QuantSpec())
    quantizer.name = "conv1.input"
    x = torch.randn(4)
    with pytest.raises(StepError, match=r"conv1\.input: the range \(amax\) is not set"):
        quantizer(x)
    quantizer.enabled = False
    assert quantizer(x) is x


def test_a_range_that_the_library_takes_for_zero_is_refused() -> None:
    quantizer = quantizer_with(2.0**-24)
    reference = quant_nn.TensorQuantizer(QuantDescriptor())
    reference.amax = 2.0**-24
    x = torch.tensor([2.0**-25])
    assert reference(x) == 0
    with pytest.raises(StepError, match=r"takes the range 5\.96e-08 for zero"):
        quantizer(x)
    with pytest.raises(StepError, match="for zero"), exporting(nn.Sequential(quantizer)):
        pass
    quantizer.amax.fill_(2.0**-23)
    assert quantizer(x) != 0


def test_learned_ranges_are_refused() -> None:
    with pytest.raises(StepError, match="two bounds"):
        quantizer_with(1.0).learn_amax()


def test_importing_the_library_leaves_logging_alone() -> None:
    script = (
        "import logging; logging.basicConfig(level=logging.INFO); before = logging.root.handlers[:]\n"
        "from maseRT.precision import QuantSpec\n"
        "from maseRT.quant.pytorch_quantization import NvidiaQuantizer\n"
        "import sys; assert 'pytorch_quantization' not in sys.modules\n"
        "NvidiaQuantizer(QuantSpec()); assert 'pytorch_quantization' in sys.modules\n"
        "assert logging.root.handlers == before and logging.root.level == logging.INFO\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_missing_library_is_said_with_what_to_install(monkeypatch: pytest.MonkeyPatch, digits: Digits) -> None:
    plan = make_plan(Plain().eval(), digits.images[:2], LIBRARY, model_name="net")
    monkeypatch.setitem(sys.modules, "pytorch_quantization.nn", None)
    level = logging.getLogger().level
    with pytest.raises(MissingError, match=r"maseRT\[pytorch-quantization\]"):
        quantize_model(Plain().eval(), plan)
    assert logging.getLogger().level == level


def test_an_unknown_backend_in_a_plan() -> None:
    with pytest.raises(UsageError, match="did you mean 'native'"):
        get_backend("nativ")


@pytest.mark.parametrize("build", [Residual, Plain, Upsampling], ids=lambda build: build.__name__)
def test_same_plan_and_ranges_give_the_native_outputs(build: Callable[[], nn.Module], digits: Digits) -> None:
    float_model = build().eval()
    native, native_plan = prepared(float_model, digits.images, QuantizeSection())
    library, plan = prepared(float_model, digits.images, LIBRARY)
    assert plan.layers == native_plan.layers
    assert plan.sites == native_plan.sites
    load_amax(library, calibrate(native, native_plan, digits.images))
    assert {type(q) for q in quantizers(library).values()} == {NvidiaQuantizer}
    assert quantizers(library).keys() == quantizers(native).keys()
    expected, got = outputs(native, digits.images), outputs(library, digits.images)
    assert sqnr_db(expected, got) > sqnr_db(outputs(float_model, digits.images), got) + 15
    assert sqnr_db(expected, got) > 60


def test_ranges_observed_with_it_are_the_native_ones(digits: Digits) -> None:
    model = Residual().eval()
    native, library = (prepared(model, digits.images, section) for section in (QuantizeSection(), LIBRARY))
    expected, got = (calibrate(*pair, digits.images) for pair in (native, library))
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_half_precision_around_it(digits: Digits) -> None:
    model = Residual().eval()
    halves = [QuantizeSection(float=Precision.FP16, backend=name) for name in ("native", "pytorch-quantization")]
    trained, plan = prepared(model, digits.images, LIBRARY)
    calibrate(trained, plan, digits.images)
    results = []
    for section in halves:
        quantized, _ = prepared(model, digits.images, section)
        quantized.load_state_dict(trained.state_dict())
        assert {quantizer.amax.dtype for quantizer in quantizers(quantized).values()} == {torch.float32}
        results.append(outputs(quantized, digits.images))
    assert sqnr_db(*results) > 55


def test_state_dicts_fit_both_backends(digits: Digits) -> None:
    model = Residual().eval()
    library, plan = prepared(model, digits.images, LIBRARY)
    calibrate(library, plan, digits.images)
    state = library.state_dict()
    again = quantize_model(Residual().eval(), Plan.from_json(plan.to_json()))
    again.load_state_dict(state, strict=True)
    assert torch.equal(outputs(again, digits.images), outputs(library, digits.images))
    native, _ = prepared(model, digits.images, QuantizeSection())
    native.load_state_dict(state, strict=True)
    assert sqnr_db(outputs(native, digits.images), outputs(library, digits.images)) > 55
    assert torch.equal(outputs(copy.deepcopy(library), digits.images), outputs(library, digits.images))


def test_export_has_the_native_pairs_and_onnx_runtime_agrees(digits: Digits, tmp_path: Path) -> None:
    model = Residual().eval()
    files = {}
    for section in (QuantizeSection(), LIBRARY):
        quantized, plan = prepared(model, digits.images, section)
        calibrate(quantized, plan, digits.images)
        files[section.backend] = tmp_path / f"{section.backend}.onnx"
        expected = outputs(quantized, digits.images)
        export_onnx(quantized, digits.images[:2], files[section.backend], opset=20)
        assert count_qdq(files[section.backend]) == len(quantizers(quantized)) - 1, "conv1 and the shortcut share one"
    assert files["native"].read_bytes() == files["pytorch-quantization"].read_bytes()
    with OnnxRuntime().open(files["pytorch-quantization"], "cpu", threads=1, optimization="disabled") as session:
        got = torch.from_numpy(session.infer({"input": digits.images.numpy()})["output"])
    assert sqnr_db(expected, got) > 55


def layers_and_inputs() -> Iterator[tuple[str, Callable[[], nn.Module], str, tuple[int, ...]]]:
    """A name, a torch layer, the library's module, and an input's shape."""
    images = {1: (2, 4, 9), 2: (2, 4, 9, 9), 3: (2, 4, 9, 9, 9)}
    for d, shape in images.items():
        for mode in ("zeros", "reflect", "replicate", "circular"):
            for padding in (0, 1):
                options = {"padding": padding, "padding_mode": mode}
                yield f"Conv{d}d-{mode}-{padding}", (f"Conv{d}d", (4, 6, 3), options), shape
        for padding in ("same", "valid"):
            yield f"Conv{d}d-{padding}", (f"Conv{d}d", (4, 6, 3), {"padding": padding}), shape
        options = {"stride": 2, "padding": 2, "dilation": 2, "groups": 2, "bias": False}
        yield f"Conv{d}d-options", (f"Conv{d}d", (4, 6, 3), options), shape
        options = {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2, "dilation": 2}
        yield f"ConvTranspose{d}d-options", (f"ConvTranspose{d}d", (4, 6, 3), options), shape
        options = {"stride": 2, "padding": 1, "ceil_mode": True}
        yield f"MaxPool{d}d", (f"MaxPool{d}d", (3,), {**options, "return_indices": True}), shape
        yield f"AvgPool{d}d", (f"AvgPool{d}d", (3,), {**options, "count_include_pad": False}), shape
        yield f"AdaptiveAvgPool{d}d", (f"AdaptiveAvgPool{d}d", (2,), {}), shape
        yield f"AdaptiveMaxPool{d}d", (f"AdaptiveMaxPool{d}d", (2,), {}), shape
    yield "Linear", ("Linear", (4, 3), {"bias": False}), (2, 5, 4)
    yield "LSTM", ("LSTM", (4, 3), {"num_layers": 2, "bidirectional": True, "batch_first": True}), (2, 5, 4)
    yield "LSTM-proj_size", ("LSTM", (4, 3), {"proj_size": 2}), (2, 5, 4)
    yield "LSTMCell", ("LSTMCell", (4, 3), {}), (2, 4)
    yield "MultiheadAttention", ("MultiheadAttention", (4, 2), {}), (2, 5, 4)


def flat(value: object) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [tensor for part in value for tensor in flat(part)]


def library_is_right(name: str, args: tuple, options: Mapping, layer: nn.Module, x: Tensor) -> bool:
    """Whether the library's own module, its quantizers off, computes what torch's does."""
    kind = getattr(quant_nn, f"Quant{name}", None)
    if kind is None:
        return False
    try:
        module = kind(*args, **options)
        module.load_state_dict(layer.state_dict())
        for quantizer in library_quantizers(module):
            quantizer.disable()
        pairs = list(zip(flat(layer(x)), flat(module(x)), strict=True))
    except (TypeError, ValueError):
        return False
    return all(a.shape == b.shape and torch.allclose(a.float(), b.float(), atol=1e-5) for a, b in pairs)


@pytest.mark.parametrize(("case", "shape"), [pytest.param(c, s, id=i) for i, c, s in layers_and_inputs()])
def test_exactly_what_the_library_does_wrong_is_refused(case: tuple, shape: tuple[int, ...]) -> None:
    name, args, options = case
    layer = getattr(nn, name)(*args, **options)
    reason = library_refusal(layer)
    assert (reason is None) == library_is_right(name, args, options, layer, torch.randn(shape))
    assert reason is None or "pytorch-quantization" in reason


def test_refused_layers_stay_float_and_the_plan_says_why(digits: Digits) -> None:
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    plan = make_plan(model, digits.images[:2], LIBRARY, model_name="net")
    assert plan.of("0").precision is Precision.FP32
    assert plan.of("0").reason == 'pytorch-quantization pads with zeros where padding_mode is "reflect"'
    assert plan.of("2").precision is Precision.INT8
    asking = LIBRARY.model_copy(update={"rules": rule("0", Precision.INT8).rules})
    with pytest.raises(UsageError, match="asks for int8: 0 cannot take it, pytorch-quantization pads with zeros"):
        make_plan(model, digits.images[:2], asking, model_name="net")
    assert make_plan(model, digits.images[:2], QuantizeSection(), model_name="net").of("0").precision is Precision.INT8
