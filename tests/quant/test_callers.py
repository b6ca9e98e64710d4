"""Linear layers whose weight another module's forward multiplies with, as in the attention of BEiT."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from placement_nets import batch, calibrated, exported, in_onnxruntime, planned, sqnr_db
from torch import Tensor, nn

from maseRT.onnx_graph import layer_precisions
from maseRT.plan import Plan
from maseRT.precision import Precision
from maseRT.quant import quantize_model, quantizers_off


class Attention(nn.Module):
    """Its keys have no bias: the bias is put together in every call, and the layer has none."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(features, 3 * features, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(features)), nn.Parameter(torch.randn(features))
        self.proj = nn.Linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = F.linear(bias=bias, weight=self.qkv.weight, input=x).chunk(3, -1)
        return F.linear(torch.softmax(q @ k.transpose(1, 2), -1) @ v, self.proj.weight, self.proj.bias)


class Net(nn.Module):
    input_shape = (8, 64)

    def __init__(self, attention: type[nn.Module] = Attention) -> None:
        super().__init__()
        self.attention = attention(64)
        self.head = nn.Linear(64, 256)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.attention(x)).mean(1))


class Unbiased(Attention):
    """It leaves out the bias that one of its layers has."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.qkv(x).chunk(3, -1)[0], self.proj.weight)


LAYERS = ("attention.qkv", "attention.proj")


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def test_they_are_layers_of_the_plan(net: nn.Module) -> None:
    plan = planned(net)
    assert {name: plan.of(name).precision for name in LAYERS} == dict.fromkeys(LAYERS, Precision.INT8)
    assert {plan.of(name).callers for name in LAYERS} == {("attention",)}
    assert plan.of("head").callers == ()
    assert not any(operation.op == "linear" for operation in plan.operations)
    assert Plan.from_json(plan.to_json()) == plan


def test_off_the_model_computes_what_it_did(net: nn.Module) -> None:
    x = batch(net)
    wanted = net(x)
    quantize_model(net, planned(net))
    with quantizers_off(net):
        torch.testing.assert_close(net(x), wanted)


def test_the_file_has_them_in_int8(net: nn.Module, tmp_path: Path) -> None:
    x = batch(net)
    wanted = net(x).detach()
    model = calibrated(net, planned(net))
    found = model(x).detach()
    assert 25 < sqnr_db(wanted, found) < 60
    path = exported(model, tmp_path / "net.onnx")
    precisions = layer_precisions(path)
    assert {precisions[name].precision for name in LAYERS} == {"int8"}
    torch.testing.assert_close(in_onnxruntime(path, x, optimize=False), found, rtol=0, atol=1e-4)


def test_a_float_precision_of_their_own(net: nn.Module, tmp_path: Path) -> None:
    x = batch(net)
    wanted = net(x).detach()
    plan = planned(net, precision="fp32", rules=[{"name": "attention.qkv", "precision": "fp16"}])
    model = quantize_model(net, plan)
    assert model.attention.qkv.weight.dtype is torch.float16
    torch.testing.assert_close(model(x).detach(), wanted, rtol=0, atol=1e-2)
    assert layer_precisions(exported(model, tmp_path / "net.onnx"))["attention.qkv"].precision == "fp16"


def test_ranges_are_found_in_training_too(net: nn.Module) -> None:
    model = calibrated(net, planned(net)).train()
    model(batch(net)).square().sum().backward()
    assert all(model.get_submodule(name).weight.grad.abs().sum() > 0 for name in LAYERS)


def test_a_layer_whose_bias_is_left_out_is_not_called() -> None:
    plan = planned(Net(Unbiased).eval())
    assert plan.of("attention.proj").callers == ()
    assert plan.of("attention.proj").precision is Precision.FP32
    assert [operation.op for operation in plan.operations if operation.owner == "attention"] == ["linear"]


def test_a_bias_that_depends_on_the_input_is_part_of_an_operation() -> None:
    class Biased(Attention):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.qkv.weight, x.mean((0, 1)).repeat(3)).chunk(3, -1)[0]

    plan = planned(Net(Biased).eval())
    assert plan.of("attention.qkv").callers == ()
    assert "linear" in [operation.op for operation in plan.operations]
