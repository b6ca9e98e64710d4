"""NVIDIA's pytorch-quantization: a backend beside the native one, and checkpoints beside the library itself."""

import copy
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor, nn

from maseRT.config import PrecisionRule, QuantizeSection, load_config
from maseRT.errors import ConfigError, MissingError, StepError, UsageError
from maseRT.models import build_model, fit_names, load_checkpoint, load_weights
from maseRT.models.nets.convnet import digits_cnn
from maseRT.onnx_export import export_onnx
from maseRT.onnx_graph import count_qdq
from maseRT.plan import Plan
from maseRT.precision import Precision, QuantSpec
from maseRT.progress import Silent
from maseRT.quant import Quantizer, exporting, make_plan, quantize_model, quantizers
from maseRT.quant.backends import get_backend
from maseRT.quant.calibrators import Method, amax_from_histograms
from maseRT.quant.observe import load_amax, observe
from maseRT.quant.pytorch_quantization import NvidiaQuantizer, library_refusal, plan_with_ranges
from maseRT.runtimes.onnxruntime import OnnxRuntime
from maseRT.steps.pipeline import Run
from maseRT.workspace import Workspace

quant_nn = pytest.importorskip("pytorch_quantization.nn")
quant_modules = pytest.importorskip("pytorch_quantization.quant_modules")
QuantDescriptor = pytest.importorskip("pytorch_quantization.tensor_quant").QuantDescriptor

LIBRARY = QuantizeSection(backend="pytorch-quantization")


class Residual(nn.Module):
    """A block with a shortcut and BatchNorm; its shortcut takes a quantizer when the library trains it."""

    def __init__(self, residual_quantizer: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8 * 64, 10)
        if residual_quantizer is not None:
            self.residual_quantizer = residual_quantizer

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn0(self.stem(x)))
        skip = self.residual_quantizer(x) if hasattr(self, "residual_quantizer") else x
        x = torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + skip)
        return self.fc(x.flatten(1))


class Plain(nn.Module):
    """Convolutions of several kinds without BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.wide = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2)
        self.pool = nn.AvgPool2d(2)
        self.fc = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(torch.relu(self.wide(torch.relu(self.conv(x))))).flatten(1))


class Rows(nn.Module):
    """An LSTM over the rows of an image, and a cell on its last output."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 6, batch_first=True, **options)
        self.cell = nn.LSTMCell(6 * (2 if options.get("bidirectional") else 1), 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(self.lstm(x.squeeze(1))[0][:, -1])[0]


class Upsampling(nn.Module):
    """A transposed convolution with as many inputs as outputs, and BatchNorm."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8 * 256, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.bn(self.up(torch.relu(self.conv(x))))).flatten(1))


@pytest.fixture(autouse=True)
def quiet() -> None:
    """Keep the library from announcing every range."""
    logging.getLogger("absl").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Digits:
    images: Tensor
    labels: Tensor


@pytest.fixture(scope="module")
def digits() -> Digits:
    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 16
    return Digits(images[:512], torch.from_numpy(data.target).long()[:512])


@contextmanager
def library_modules() -> Iterator[None]:
    """Build torch.nn layers as the library's, as its users do."""
    quant_modules.initialize()
    try:
        yield
    finally:
        quant_modules.deactivate()


def library_quantizers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, quant_nn.TensorQuantizer)]


def trained(build: Callable[[], nn.Module], digits: Digits, steps: int = 24) -> nn.Module:
    """A model that the library calibrated and then trained; the weights have left the ranges that they had."""
    with library_modules():
        model = build()
    return train(model, digits, steps)


def train(model: nn.Module, digits: Digits, steps: int = 24) -> nn.Module:
    for quantizer in library_quantizers(model):
        quantizer.disable_quant()
        quantizer.enable_calib()
    with torch.no_grad():
        model(digits.images[:128])
    for quantizer in library_quantizers(model):
        quantizer.load_calib_amax()
        quantizer.disable_calib()
        quantizer.enable_quant()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        part = slice(step % 8 * 64, step % 8 * 64 + 64)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(digits.images[part]), digits.labels[part]).backward()
        optimizer.step()
    return model.eval()


def follow(
    library: nn.Module, build: Callable[[], nn.Module], digits: Digits, folder: Path, section: QuantizeSection = LIBRARY
) -> tuple[nn.Module, Plan]:
    """The way from the library's state dict to a quantized model, as the quantize step goes it."""
    path = folder / "library.pt"
    torch.save(library.state_dict(), path)
    checkpoint = load_checkpoint(path, kind="pytorch-quantization")
    model = build().eval()
    load_weights(model, checkpoint, where=path.name)
    fitted, _ = fit_names(checkpoint, model, where=path.name)

    def make(section: QuantizeSection) -> Plan:
        return make_plan(model, digits.images[:2], section, model_name="net")

    plan, ranges = plan_with_ranges(model, section, fitted.amax, make=make, where=path.name)
    plan = Plan.from_json(plan.to_json())
    quantize_model(model, plan)
    load_amax(model, ranges)
    return model, plan


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(x)


def sqnr_db(expected: Tensor, got: Tensor) -> float:
    return float(10 * torch.log10(expected.double().square().sum() / (expected - got).double().square().sum()))


def assert_same(expected: Tensor, got: Tensor) -> None:
    """Equal but for float rounding, and what a rounding changes where a value lies between two levels."""
    assert torch.equal(expected.argmax(1), got.argmax(1))
    assert sqnr_db(expected, got) > 55


def rule(name: str, precision: Precision = Precision.FP32) -> QuantizeSection:
    return QuantizeSection(rules=(PrecisionRule(name=name, precision=precision),))


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


# The quantizer


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


def test_learned_ranges_are_refused_by_config_and_quantizer(tmp_path: Path) -> None:
    with pytest.raises(StepError, match="two bounds"):
        quantizer_with(1.0).learn_amax()
    config = tmp_path / "run.toml"
    config.write_text(
        '[model]\nname = "digits-cnn"\nrandom_weights = true\n[data]\nname = "digits"\n'
        '[quantize]\nbackend = "pytorch-quantization"\n[calibrate]\n[finetune]\nlearned_amax = true\n'
    )
    with pytest.raises(ConfigError, match='learned_amax needs \\[quantize\\] backend = "native"'):
        load_config(config)


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


# The backend


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


# Checkpoints


def test_outputs_of_a_checkpoint_without_batchnorm_are_the_librarys_bit_for_bit(digits: Digits, tmp_path: Path) -> None:
    library = trained(Plain, digits)
    model, plan = follow(library, Plain, digits, tmp_path)
    assert [layer.name for layer in plan.layers if layer.precision is Precision.INT8] == ["conv", "wide", "pool", "fc"]
    assert torch.equal(outputs(library, digits.images), outputs(model, digits.images))
    native, _ = follow(library, Plain, digits, tmp_path, QuantizeSection())
    assert_same(outputs(library, digits.images), outputs(native, digits.images))


@pytest.mark.parametrize("backend", ["native", "pytorch-quantization"])
@pytest.mark.parametrize("placement", ["tensorrt", "layerwise"])
def test_outputs_of_a_checkpoint_with_batchnorm(digits: Digits, tmp_path: Path, backend: str, placement: str) -> None:
    def build() -> nn.Module:
        return digits_cnn(num_classes=10, input_shape=(1, 8, 8))

    library = trained(build, digits)
    amax = library.conv2._weight_quantizer.amax.flatten()
    assert bool((library.conv2.weight.abs().amax((1, 2, 3)) > amax).any()), "training left the ranges"
    with torch.no_grad():
        library.bn3.weight[0] = 0
        library.bn2.weight[3] *= -1
        library.conv2.weight[3].clamp_(-amax[3], amax[3])
        library.conv2.weight[3, 0, 0, 0] = -1.5 * amax[3]
    model, plan = follow(library, build, digits, tmp_path, QuantizeSection(backend=backend, placement=placement))
    assert len(plan.folds) == 3
    assert "negative gains of bn2 turn 1 weights from -128 to 127" in plan.notes
    assert [layer.name for layer in plan.layers if layer.weighted and layer.precision.is_float] == []
    assert_same(outputs(library, digits.images), outputs(model, digits.images))
    assert (outputs(library, digits.images).argmax(1) == digits.labels).float().mean() > 0.8


def test_the_folded_weights_keep_their_levels(digits: Digits, tmp_path: Path) -> None:
    library = trained(Residual, digits)
    model, _ = follow(library, Residual, digits, tmp_path)
    for name in ("stem", "conv1", "conv2"):
        before = library.get_submodule(name)
        quantizer = before._weight_quantizer
        levels = quantizer(before.weight) / quantizer.amax * 127
        after = model.get_submodule(name)
        scale = after.weight_quantizer.scale.view(-1, 1, 1, 1)
        folded_levels = after.weight_quantizer(after.weight) / scale
        sign = library.get_submodule({"stem": "bn0", "conv1": "bn1", "conv2": "bn2"}[name]).weight.sign()
        torch.testing.assert_close(folded_levels, levels * sign.view(-1, 1, 1, 1), atol=1e-3, rtol=0)


def test_a_batchnorm_that_would_turn_many_weights_of_the_lowest_level_stays(digits: Digits, tmp_path: Path) -> None:
    library = trained(Residual, digits)
    amax = library.conv1._weight_quantizer.amax.flatten()
    with torch.no_grad():
        library.bn1.weight[2] = -0.7
        library.conv1.weight[2] = -2 * amax[2]
    model, plan = follow(library, Residual, digits, tmp_path)
    assert [fold.batchnorm for fold in plan.folds] == ["bn0", "bn2"]
    assert any("bn1: not folded" in note for note in plan.notes)
    assert_same(outputs(library, digits.images), outputs(model, digits.images))


def test_ranges_per_tensor_become_ranges_per_channel_behind_a_fold(digits: Digits, tmp_path: Path) -> None:
    with library_modules():
        library = Residual()
    for name in ("stem", "conv1", "conv2", "fc"):
        library.get_submodule(name)._weight_quantizer = quant_nn.TensorQuantizer(QuantDescriptor())
    train(library, digits)
    model, plan = follow(library, Residual, digits, tmp_path)
    assert plan.of("fc").weight == QuantSpec()
    assert plan.of("conv1").weight == QuantSpec(axis=0)
    assert_same(outputs(library, digits.images), outputs(model, digits.images))


def test_a_quantized_shortcut(digits: Digits, tmp_path: Path) -> None:
    library = trained(lambda: Residual(quant_nn.TensorQuantizer(QuantDescriptor())), digits)
    model, plan = follow(library, Residual, digits, tmp_path)
    assert [site.name for site in plan.sites] == ["add.1"]
    assert_same(outputs(library, digits.images), outputs(model, digits.images))
    with pytest.raises(UsageError, match="range for the shortcut of the model, where the plan quantizes 0 additions"):
        follow(library, Residual, digits, tmp_path, QuantizeSection(placement="layerwise"))
    _, plan = follow(library, Residual, digits, tmp_path, rule("conv2"))
    assert "ranges that the config leaves unused: conv2, residual" in plan.notes
    without = trained(Residual, digits)
    model, plan = follow(without, Residual, digits, tmp_path)
    assert plan.sites == ()
    assert "operands that stay float, as the checkpoint has no ranges for them: add.1" in plan.notes
    assert_same(outputs(without, digits.images), outputs(model, digits.images))


def test_transposed_convolutions_need_ranges_of_their_output_channels(digits: Digits, tmp_path: Path) -> None:
    library = trained(Upsampling, digits)
    with pytest.raises(
        UsageError, match=r"ranges of shape \[8, 1, 1, 1\] .* takes one per output channel, \[1, 8, 1, 1\]"
    ):
        follow(library, Upsampling, digits, tmp_path)
    _, plan = follow(library, Upsampling, digits, tmp_path, rule("up"))
    assert plan.of("up").precision is Precision.FP32
    assert "ranges that the config leaves unused: up" in plan.notes


@pytest.mark.parametrize(("groups", "folds"), [(1, 1), (2, 0)])
def test_transposed_convolutions_with_ranges_of_their_output_channels(
    digits: Digits, tmp_path: Path, groups: int, folds: int
) -> None:
    def build() -> nn.Module:
        return Upsampling(groups)

    with library_modules():
        library = build()
    library.up._weight_quantizer = quant_nn.TensorQuantizer(QuantDescriptor(axis=(1)))
    train(library, digits)
    model, plan = follow(library, build, digits, tmp_path)
    assert len(plan.folds) == folds
    assert_same(outputs(library, digits.images), outputs(model, digits.images))


@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"bidirectional": True}], ids=str)
def test_lstms(digits: Digits, tmp_path: Path, options: dict) -> None:
    def build() -> nn.Module:
        return Rows(**options)

    library = trained(build, digits)
    for quantizer in library.lstm._input_quantizers:
        quantizer.amax = 1.0
    model, plan = follow(library, build, digits, tmp_path)
    assert [layer.precision for layer in plan.layers if layer.weighted] == [Precision.INT8, Precision.INT8]
    torch.testing.assert_close(outputs(model, digits.images), outputs(library, digits.images), atol=2e-3, rtol=0)
    assert sqnr_db(outputs(library, digits.images), outputs(model, digits.images)) > 50
    if options.get("bidirectional"):
        library.lstm._input_quantizers[1].amax = 0.9
        with pytest.raises(UsageError, match="the two directions of layer 0 quantize their input with different"):
            follow(library, build, digits, tmp_path)


def test_layers_without_ranges_stay_float(digits: Digits, tmp_path: Path) -> None:
    library = trained(Plain, digits)
    library.fc = nn.Linear(128, 10)
    del library.wide._input_quantizer._amax
    library.wide._input_quantizer.disable()
    model, plan = follow(library, Plain, digits, tmp_path)
    assert plan.of("fc").precision is Precision.FP32
    assert plan.of("fc").reason == "the checkpoint has no ranges for it"
    assert (plan.of("wide").input, plan.of("wide").weight) == (None, QuantSpec(axis=0))
    assert torch.equal(outputs(library, digits.images), outputs(model, digits.images))


def test_rules_and_ranges_that_do_not_go_together(digits: Digits, tmp_path: Path) -> None:
    library = trained(Plain, digits)
    _, plan = follow(library, Plain, digits, tmp_path, rule("fc"))
    assert "ranges that the config leaves unused: fc" in plan.notes
    assert not any("decides nothing" in note for note in plan.notes)
    _, plan = follow(library, Plain, digits, tmp_path, QuantizeSection(precision=Precision.FP32))
    assert not plan.has_int8
    assert "ranges that the config leaves unused: conv, wide, pool, fc" in plan.notes
    library.fc = nn.Linear(128, 10)
    with pytest.raises(UsageError, match="no ranges for fc, which a rule makes INT8"):
        follow(library, Plain, digits, tmp_path, rule("fc", Precision.INT8))
    library.register_module("_extra_quantizer", library.conv._input_quantizer)
    with pytest.raises(UsageError, match="ranges that the model has no place for: extra"):
        follow(library, Plain, digits, tmp_path)


def test_a_layer_that_the_library_trained_wrongly_is_refused(digits: Digits, tmp_path: Path) -> None:
    def build() -> nn.Module:
        convolution = nn.Conv2d(1, 8, 3, padding=1, padding_mode="replicate")
        return nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))

    library = trained(build, digits)
    for section in (LIBRARY, QuantizeSection()):
        with pytest.raises(UsageError, match="with 0 quantized, which cannot be loaded: pytorch-quantization pads"):
            follow(library, build, digits, tmp_path, section)
    _, plan = follow(library, build, digits, tmp_path, rule("0"))
    assert plan.of("3").precision is Precision.INT8


def test_a_range_of_zero_is_named(digits: Digits, tmp_path: Path) -> None:
    library = trained(Plain, digits)
    library.wide._input_quantizer._amax.zero_()
    with pytest.raises(StepError, match=r"wide\.input: the range is 0"):
        follow(library, Plain, digits, tmp_path)


CONFIG = """
[run]
threads = 1
device = "cpu"
[model]
name = "digits-cnn"
checkpoint = "{checkpoint}"
kind = "pytorch-quantization"
[data]
name = "digits"
batch_size = 128
[quantize]
backend = "pytorch-quantization"
[calibrate]
batches = 2
[finetune]
epochs = 1
initial_learning_rate = 1e-4
[export]
"""


def test_the_pipeline_keeps_and_trains_on_from_the_checkpoints_ranges(digits: Digits, tmp_path: Path) -> None:
    def build() -> nn.Module:
        return digits_cnn(num_classes=10, input_shape=(1, 8, 8))

    library = trained(build, digits)
    torch.save({"state_dict": {f"model.{k}": v for k, v in library.state_dict().items()}}, tmp_path / "trained.ckpt")
    path = tmp_path / "digits.toml"
    path.write_text(CONFIG.format(checkpoint=tmp_path / "trained.ckpt"))
    config, workspace = load_config(path), Workspace(tmp_path / "out", "digits")
    outcomes = {outcome.step: outcome for outcome in Run(config, path, workspace, Silent(), False).transform()}
    assert [outcome.status for outcome in outcomes.values()] == ["done"] * 4
    assert "the ranges come from the checkpoint" in outcomes["calibrate"].headline
    plan = Plan.from_json(json.loads(workspace.final_plan.read_text()))
    model = quantize_model(build_model(config.model, num_classes=10, input_shape=(1, 8, 8)), plan)
    model.load_state_dict(load_file(workspace.calibrated_checkpoint))
    assert_same(outputs(library, digits.images), outputs(model.eval(), digits.images))
    assert count_qdq(workspace.onnx) == len(quantizers(model)) == 10
    tuned = load_file(workspace.epoch_checkpoint(1))
    np.testing.assert_allclose(tuned["fc2.weight_quantizer.amax"], tuned["fc2.weight"].abs().amax(1), rtol=1e-2)
    assert tuned["fc2.input_quantizer.amax"] == library.fc2._input_quantizer.amax
