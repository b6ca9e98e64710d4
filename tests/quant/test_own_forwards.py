"""Subclasses of linear and convolution layers with a forward of their own: quantized as their base, or told why not."""

import copy
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from layer_cases import quantized
from placement_nets import batch, calibrated, exported, in_onnxruntime, lively, planned, sqnr_db
from torch import Tensor, nn

from maseRT.errors import StepError
from maseRT.onnx_graph import layer_precisions
from maseRT.plan import Fold, Plan
from maseRT.precision import Precision, QuantSpec
from maseRT.quant import quantize_layer, quantize_model, quantizers_off, refusal


class Same(nn.Conv2d):
    """Pads as TensorFlow does, as timm's Conv2dSame."""

    def forward(self, x: Tensor) -> Tensor:
        amounts = []
        for size, kernel, stride in zip(x.shape[:-3:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            whole = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            amounts += [whole // 2, whole - whole // 2]
        return F.conv2d(F.pad(x, amounts), self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


class Standardized(nn.Conv2d):
    """Standardizes its weight and multiplies it with a gain, as timm's ScaledStdConv2d."""

    def __init__(self, *args: int, **kwargs: int) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, self.out_channels))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(rows, None, None, weight=self.gain, training=True, momentum=0.0)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding)


class Named(nn.Linear):
    """Casts, and names its arguments."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(bias=self.bias, weight=self.weight.to(input.dtype), input=input)


class Upwards(nn.ConvTranspose1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.abs())


class WithBias(nn.Conv1d):
    """Computes its bias."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.weight, self.bias * 2)


LAYERS = {
    "same": lambda: (Same(3, 8, 3, 2, bias=False), torch.randn(2, 3, 9, 10)),
    "same-depthwise": lambda: (Same(4, 4, 5, 2, groups=4), torch.randn(2, 4, 11, 11)),
    "standardized": lambda: (Standardized(3, 8, 3, padding=1), torch.randn(2, 3, 9, 9)),
    "named": lambda: (Named(12, 8), torch.randn(2, 5, 12)),
    "transposed": lambda: (Upwards(4, 6, 3, stride=2), torch.randn(2, 4, 9)),
    "computed-bias": lambda: (WithBias(4, 6, 3), torch.randn(2, 4, 9)),
}


@pytest.mark.parametrize("case", LAYERS)
def test_the_twin_computes_what_the_layer_does(case: str) -> None:
    layer, x = LAYERS[case]()
    wanted = layer.eval()(x)
    twin = quantized(copy.deepcopy(layer), x)
    with quantizers_off(twin):
        torch.testing.assert_close(twin(x), wanted, rtol=0, atol=0)
    assert 30 < sqnr_db(wanted.detach(), twin(x).detach()) < 60
    assert isinstance(twin, type(layer))


@pytest.mark.parametrize("case", LAYERS)
def test_gradients_reach_what_the_twin_multiplies_with(case: str) -> None:
    layer, x = LAYERS[case]()
    twin = quantized(layer, x)
    twin.train()(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (twin.weight, twin.bias) if p is not None)


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Adapted(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 8)
        self.down = nn.Parameter(torch.randn(2, 8))

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input + F.linear(F.linear(input, self.down), self.down.T), self.weight, self.bias)


class Attending(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * input.mean(), self.bias)


class Biasless(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight)


class Multiplied(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T + self.bias


class Masked(nn.Linear):
    def forward(self, input: Tensor, mask: Tensor) -> Tensor:
        return F.linear(input * mask, self.weight, self.bias)


class Sliced(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight[:4])


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Scaled(8, 8), "goes on with what linear gives"),
        (Adapted(), "calls linear, linear, linear"),
        (Attending(8, 8), "depends on the input"),
        (Biasless(8, 8), "does not add its bias"),
        (Multiplied(8, 8), "calls matmul"),
        (Masked(8, 8), "does not run on a test input"),
        (Sliced(8, 8), "of another shape"),
    ],
)
def test_a_forward_that_is_no_single_product_is_refused(layer: nn.Module, reason: str) -> None:
    told = refusal(layer)
    assert f"{type(layer).__name__} is a Linear with code of its own, and" in told
    assert reason in told
    assert "quant.register" in told
    with pytest.raises(StepError, match="code of its own"):
        quantize_layer(layer, input=QuantSpec(), weight=QuantSpec(axis=0))


def test_a_layer_is_left_as_it_was_when_it_is_tried_out() -> None:
    calls = []

    class Counting(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            assert not self.training
            return super().forward(x)

    layer = Counting(3, 4, 3, bias=False).train()
    layer.register_forward_hook(lambda *_: calls.append(1))
    state = copy.deepcopy(layer.state_dict())
    assert refusal(layer) is None
    assert layer.training
    assert layer.bias is None
    assert not calls
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


def test_a_forward_that_turns_out_to_do_something_else_is_an_error() -> None:
    class Twice(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            once = F.linear(input, self.weight, self.bias)
            return F.linear(once, self.weight, self.bias) if self.training else once

    twin = quantized(Twice(4, 4).eval(), torch.randn(2, 4))
    with pytest.raises(StepError, match="layer: its forward calls linear 2 times here"):
        twin.train()(torch.randn(2, 4))


class Net(nn.Module):
    """A stem that pads by itself, standardized convolutions, a head that casts."""

    input_shape = (3, 17, 17)

    def __init__(self) -> None:
        super().__init__()
        self.stem = Same(3, 16, 3, 2, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.deep = Standardized(16, 16, 3, padding=1)
        self.other = Standardized(16, 16, 1)
        self.norm2 = nn.BatchNorm2d(16)
        self.head = Named(16 * 9 * 9, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        return self.head(self.norm2(self.other(self.deep(x) + x)).relu().flatten(1))


@pytest.fixture
def net() -> nn.Module:
    return lively(Net())


def test_the_plan_quantizes_them_and_folds_what_is_linear(net: nn.Module) -> None:
    plan = planned(net)
    assert {plan.of(name).precision for name in ("stem", "deep", "other", "head")} == {Precision.INT8}
    assert plan.folds == (Fold("stem", "norm"),)
    assert "Standardized computes its weight" in plan.of("norm2").reason
    assert [site.operation for site in plan.sites] == ["add"]
    assert "2 Standardized: the weights that they compute become plain ones" in "".join(plan.notes)


def test_it_is_rebuilt_from_plan_and_checkpoint(net: nn.Module) -> None:
    x = batch(net, 4)
    plan = planned(net)
    model = calibrated(net, plan)
    wanted = model(x)
    again = quantize_model(Net().eval(), Plan.from_json(plan.to_json()))
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(x), wanted, rtol=0, atol=0)


def test_the_file_has_plain_int8_products(net: nn.Module, tmp_path: Path) -> None:
    x = batch(net, 8)
    before = net(x).detach()
    model = calibrated(net, planned(net))
    path = exported(model, tmp_path / "net.onnx")
    precisions = layer_precisions(path)
    assert {precisions[name].precision for name in ("stem", "deep", "other", "head")} == {"int8"}
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert operators.count("BatchNormalization") == 1
    assert "ReduceMean" not in operators
    torch.testing.assert_close(in_onnxruntime(path, x, optimize=False), model(x).detach(), rtol=0, atol=1e-1)
    assert sqnr_db(before, in_onnxruntime(path, x, optimize=False)) > 20


def test_what_is_folded_into_a_float_layer_of_its_own_code_stays(net: nn.Module) -> None:
    x = batch(net, 4)
    wanted = net(x)
    model = quantize_model(net, planned(net, precision="fp32"))
    assert isinstance(model.norm, nn.Identity)
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)
