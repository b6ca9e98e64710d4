"""FP16 models: what is exported in FP16 is planned so, and what computes in FP32 whatever is asked is planned FP32."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from placement_nets import batch, calibrated, exported, in_onnxruntime, planned
from torch import Tensor, nn

from maseRT.onnx_graph import layer_precisions
from maseRT.precision import Precision
from maseRT.receipt import Verdict, names_in, receipt_from
from maseRT.runtimes import get_compiler
from maseRT.runtimes.base import BatchRange, BuildOptions

FP16, FP32 = Precision.FP16, Precision.FP32


class Norm(nn.Module):
    """An RMSNorm of one's own, as libraries write it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * wide.to(x.dtype)


class FunctionalNorm(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, 1e-6)


class LayerNorm32(nn.LayerNorm):
    """One whose weight does not go with what it reads, once that is in half precision."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type(x.dtype)


class Gate(nn.Module):
    """Computes in its input's type; casts, but to that."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x.to(x.dtype)) + torch.arange(x.shape[-1], dtype=torch.float32).to(x.dtype)


class Summed(nn.Module):
    """Sums up by a function that the exporter writes in FP32."""

    def __init__(self, function: Callable[..., Tensor], **settings: object) -> None:
        super().__init__()
        self.function, self.settings = function, settings

    def forward(self, x: Tensor) -> Tensor:
        return x / (1 + self.function(x.abs(), dim=-1, **self.settings))


class Similar(nn.CosineSimilarity):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x.flip(1))


class Attended(nn.Module):
    """Its product is in half, its softmax is not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(F.linear(x, self.weight), dim=-1, dtype=torch.float32).to(x.dtype)


SERIES, IMAGE, VOLUME = (4, 16), (3, 12, 12), (2, 8, 8, 8)
_ACTIVATIONS = """
    CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish PReLU RReLU ReLU ReLU6 SELU SiLU
    Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink
"""
IN_HALF = {
    SERIES: [
        *(getattr(nn, name)() for name in _ACTIVATIONS.split()),
        nn.CELU(0.3),
        nn.Threshold(0.1, 0.5),
        nn.GLU(),
        nn.Softmax(-1),
        nn.LogSoftmax(-1),
        nn.LayerNorm(16),
        nn.GroupNorm(2, 4),
        nn.InstanceNorm1d(4),
        nn.LPPool1d(2, 2),
        nn.AdaptiveMaxPool1d(1),
        nn.AdaptiveAvgPool1d(1),
        nn.AdaptiveAvgPool1d(4),
        nn.Upsample(scale_factor=2, mode="linear"),
        nn.Upsample(size=37, mode="linear", align_corners=True),
        Gate(),
        Attended(),
    ],
    IMAGE: [
        nn.LocalResponseNorm(2),
        nn.LPPool2d(2, 2),
        nn.AdaptiveMaxPool2d(1),
        nn.AdaptiveAvgPool2d(4),
        nn.Upsample(scale_factor=1.5, mode="nearest"),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Upsample(scale_factor=2, mode="bicubic"),
        nn.PixelShuffle(1),
    ],
    VOLUME: [
        nn.LPPool3d(2, 2),
        nn.AdaptiveMaxPool3d(1),
        nn.AdaptiveAvgPool3d(4),
        nn.Upsample(scale_factor=2, mode="trilinear"),
    ],
}
IN_FP32 = {
    SERIES: [
        nn.RMSNorm(16),
        nn.RMSNorm(16, eps=1e-5, elementwise_affine=False),
        nn.AdaptiveAvgPool1d(5),
        nn.Upsample(scale_factor=2, mode="nearest-exact"),
        Similar(-1),
        Norm(16),
        FunctionalNorm(16),
        LayerNorm32(16),
        Summed(torch.sum, keepdim=True),
        Summed(torch.var, keepdim=True),
        Summed(torch.std, keepdim=True),
        Summed(torch.cumsum),
    ],
    IMAGE: [nn.AdaptiveAvgPool2d((5, 4)), nn.Upsample(scale_factor=2, mode="nearest-exact")],
}


class Around(nn.Module):
    """Layers side by side behind a linear one, which gives them half precision; no two read the same numbers."""

    def __init__(self, *layers: nn.Module, shape: tuple[int, ...] = SERIES) -> None:
        super().__init__()
        self.input_shape = shape
        self.first = nn.Linear(shape[-1], shape[-1])
        self.layers = nn.ModuleList(layers)
        self.eval()

    def outputs(self, x: Tensor) -> list[Tensor]:
        x = self.first(x)
        return [layer(x * (1 + index / 64)).flatten(1) for index, layer in enumerate(self.layers)]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.outputs(x), dim=1)


@pytest.mark.parametrize(
    ("shape", "layers", "precision"),
    [*((*case, FP16) for case in IN_HALF.items()), *((*case, FP32) for case in IN_FP32.items())],
    ids=["series", "images", "volumes", "fp32 series", "fp32 images"],
)
def test_layers_of_an_fp16_model_are_exported_as_planned(
    shape: tuple[int, ...], layers: list[nn.Module], precision: Precision, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net = Around(*layers, shape=shape)
    x = batch(net)
    with torch.no_grad():
        sizes = [output.shape[1] for output in net.outputs(x)]
    plan = planned(net, precision="fp16")
    planned_as = {layer.name: (layer.type, layer.precision) for layer in plan.layers if layer.name != "first"}
    assert planned_as == {name: (kind, precision) for name, (kind, _) in planned_as.items()}
    assert all(("; fp32: " in plan.of(name).reason) is (precision is FP32) for name in planned_as)
    assert plan.notes == ()
    path = exported(calibrated(net, plan), tmp_path / "model.onnx")
    receipt = receipt_from(plan, layer_precisions(path, names_in(plan)), None, onnx_sha256="")
    assert [layer.describe() for layer in receipt.layers if layer.exported != layer.asked] == []
    assert receipt.mismatches == ()
    with torch.no_grad():
        wanted = net(x).split(sizes, dim=1)
    got = in_onnxruntime(path, x, optimize=False).split(sizes, dim=1)
    for layer, part, want in zip(layers, got, wanted, strict=True):
        # in the mean, since a value next to a threshold of an activation may fall on its other side
        assert (part - want).abs().mean() < 3e-3 * want.abs().mean(), str(layer)


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "bf16"},
        {"precision": "fp16", "rules": [{"type": "AdaptiveMaxPool2d", "precision": "fp32"}]},
        {"precision": "fp16", "rules": [{"type": "Softsign", "precision": "fp32"}]},
    ],
    ids=str,
)
def test_layers_in_fp32_stay_so_in_the_file(settings: dict[str, object], tmp_path: Path) -> None:
    net = Around(nn.AdaptiveMaxPool2d(1), nn.Softsign(), nn.LocalResponseNorm(2), nn.RMSNorm(12), shape=IMAGE)
    plan = planned(net, **settings)
    assert FP32 in {layer.precision for layer in plan.layers}
    path = exported(calibrated(net, plan), tmp_path / "model.onnx")
    receipt = receipt_from(plan, layer_precisions(path, names_in(plan)), None, onnx_sha256="")
    assert [layer.describe() for layer in receipt.layers if layer.exported != layer.asked] == []


def test_fp32_models_are_planned_as_ever() -> None:
    plan = planned(Around(Norm(16)), precision="fp32")
    assert {layer.reason for layer in plan.layers} == {"default", "float"}


def test_beside_int8_layers_too() -> None:
    plan = planned(Around(nn.RMSNorm(16)), float="fp16", placement="layerwise")
    assert plan.of("first").precision is Precision.INT8
    assert plan.of("layers.0").precision is FP32


@pytest.mark.parametrize("layer", [nn.RMSNorm(16), Norm(16)], ids=["torch", "own"])
def test_a_rule_that_asks_for_half_precision_gets_a_note(layer: nn.Module) -> None:
    rules = [{"type": type(layer).__name__, "precision": "fp16"}]
    plan = planned(Around(layer), precision="fp16", rules=rules)
    assert plan.of("layers.0").precision is FP32
    assert plan.of("layers.0").reason.startswith("rule 1: ")
    (note,) = plan.notes
    assert note.startswith("layers.0: fp32, although a rule asks for fp16: ")


@pytest.mark.parametrize(
    ("function", "precision"),
    [
        (lambda x: F.rms_norm(x, (16,)), FP32),
        (lambda x: F.cosine_similarity(x, x.flip(1), dim=-1), FP32),
        (lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact"), FP32),
        (lambda x: F.interpolate(x, None, 2, "linear"), FP16),
        (lambda x: x.sum(1, keepdim=True), FP32),
        (lambda x: x.var(-1, keepdim=True), FP32),
        (lambda x: x.std(-1, keepdim=True), FP32),
        (lambda x: x.cumsum(1), FP32),
        (lambda x: x.mean(1, keepdim=True), FP16),
        (lambda x: F.adaptive_avg_pool1d(x, 5), FP32),
        (lambda x: F.adaptive_avg_pool1d(x, 8), FP16),
    ],
)
def test_functions_too_in_modules_that_hold_layers(
    function: Callable[[Tensor], Tensor], precision: Precision, tmp_path: Path
) -> None:
    class Block(Around):
        def forward(self, x: Tensor) -> Tensor:
            return self.layers[0](function(self.first(x)) + 1.0)

    torch.manual_seed(0)
    net = Block(nn.ReLU())
    plan = planned(net, precision="fp16")
    assert [operation.precision for operation in plan.operations] == [precision, FP16]
    path = exported(calibrated(net, plan), tmp_path / "model.onnx")
    x = batch(net)
    with torch.no_grad():
        wanted = net(x)
    assert (in_onnxruntime(path, x, optimize=False) - wanted).abs().max() < 3e-3 * wanted.abs().max()


def fourier(net: nn.Module, x: Tensor) -> Tensor:
    return x + torch.fft.fft2(x).real


def filtered(net: nn.Module, x: Tensor) -> Tensor:
    return torch.fft.irfft(torch.fft.rfft(x, norm="ortho") * torch.view_as_complex(net.filter), n=16, norm="ortho")


def rotated(net: nn.Module, x: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones(8), torch.arange(8.0))).flatten(-2).type_as(x)


@pytest.mark.parametrize("function", [fourier, filtered, rotated])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_complex_numbers_are_made_in_fp32(
    function: Callable[[nn.Module, Tensor], Tensor], precision: str, tmp_path: Path
) -> None:
    class Block(Around):
        def forward(self, x: Tensor) -> Tensor:
            return self.layers[0](function(self, self.first(x)))

    torch.manual_seed(0)
    net = Block(nn.LayerNorm(16))
    net.filter = nn.Parameter(torch.randn(9, 2))
    x = batch(net)
    with torch.no_grad():
        wanted = net(x)
    plan = planned(net, precision=precision)
    assert {layer.precision for layer in plan.layers} == {Precision(precision)}
    path = exported(calibrated(net, plan), tmp_path / "model.onnx")
    with torch.no_grad():
        assert (net(x) - wanted).abs().max() < 3e-2 * wanted.abs().max()
    if precision == "fp16":  # ONNX Runtime has no BF16 kernels on CPUs
        assert (in_onnxruntime(path, x, optimize=False) - wanted).abs().max() < 3e-3 * wanted.abs().max()


def test_operations_without_a_bf16_form_are_fp32(tmp_path: Path) -> None:
    class Block(Around):
        def forward(self, x: Tensor) -> Tensor:
            x = self.layers[0](self.first(x))
            waves = [torch.tan, torch.atan, torch.sinh, torch.cosh, torch.asinh, torch.sinc, torch.asin, torch.atanh]
            stacked = torch.hstack([x.sort(-1)[0], *(wave(x) for wave in waves), torch.atan2(x, 2 - x)])
            return torch.vstack([stacked, torch.dstack([x, x]).flatten(-2).repeat(1, 5, 1).reshape_as(stacked)])

    net = Block(nn.Tanh())
    plan = planned(net, precision="bf16")
    assert {operation.op for operation in plan.operations if operation.precision.value == "bf16"} == {"rsub"}
    exported(calibrated(net, plan), tmp_path / "model.onnx")  # the checker passes it


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.interpolate(x, size=8, mode="area"),
        lambda x: nn.Upsample(size=8, mode="area")(x),
        lambda x: x.gather(1, x.argsort(1)),
        lambda x: x.msort(),
    ],
)
def test_so_are_area_interpolation_and_what_sorts(function: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    class Block(Around):
        def forward(self, x: Tensor) -> Tensor:
            return self.layers[0](function(self.first(x)) + 1.0)

    net = Block(nn.Tanh())
    plan = planned(net, precision="bf16")
    assert [operation.precision for operation in plan.operations] == [FP32, Precision.BF16]
    exported(calibrated(net, plan), tmp_path / "model.onnx")  # the checker passes it


def test_a_layer_that_upsamples_by_areas_has_no_bf16_form(tmp_path: Path) -> None:
    net = Around(nn.Upsample(size=8, mode="area"))
    plan = planned(net, precision="bf16")
    assert plan.of("layers.0").precision is FP32
    exported(calibrated(net, plan), tmp_path / "model.onnx")


def test_trying_a_layer_out_leaves_it_as_it_is() -> None:
    net = Around(Norm(16))
    x = batch(net)
    with torch.no_grad():
        wanted = net(x)
    planned(net, precision="fp16")
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}
    with torch.no_grad():
        assert torch.equal(net(x), wanted)


def test_tensorrt_rtx_builds_what_is_planned(tmp_path: Path) -> None:
    layers = (nn.RMSNorm(16), nn.CELU(), nn.CELU(0.3), nn.Softsign(), nn.Threshold(0.1, 0.5), Norm(16))
    net = Around(*layers, nn.LPPool1d(2, 2), nn.Upsample(scale_factor=2, mode="linear"))
    plan = planned(net, precision="fp16")
    path = exported(calibrated(net, plan), tmp_path / "model.onnx")
    options = BuildOptions(batch=BatchRange(1, 4, 8), compute_capability="8.9")
    info = get_compiler("tensorrt-rtx").build(path, tmp_path / "model.trt", options)
    receipt = receipt_from(plan, layer_precisions(path, names_in(plan)), info, onnx_sha256="")
    assert receipt.mismatches == ()
    assert receipt.layers[0].verdict is Verdict.AS_ASKED
