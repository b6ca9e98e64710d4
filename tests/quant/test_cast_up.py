"""FP16 and BF16 models: what a module's own code casts to FP32 is computed in FP32, layers inside or not."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from placement_nets import batch, calibrated, exported, in_onnxruntime, planned
from torch import Tensor, nn

from maseRT.precision import Precision

FP16, FP32 = Precision.FP16, Precision.FP32


class Block(nn.Module):
    """A function of two layers; sequences [N, 6, 32]."""

    input_shape = (6, 32)

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(32, 32), nn.LayerNorm(32)
        self.gain = nn.Parameter(torch.rand(32) + 0.5)
        self.function = function
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def attention(net: nn.Module, x: Tensor) -> Tensor:
    x = net.fc(x)
    weights = (x.float() @ x.float().mT).softmax(-1).to(x.dtype)
    return weights @ x


def softmax_alone(net: nn.Module, x: Tensor) -> Tensor:
    x = net.fc(x)
    return F.softmax(x @ x.mT, dim=-1, dtype=torch.float32).type_as(x) @ x


def root_mean_square(net: nn.Module, x: Tensor) -> Tensor:
    wide = net.fc(x).to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return net.fc(wide.to(x.dtype) * net.gain)


def own_mask(net: nn.Module, x: Tensor) -> Tensor:
    x = net.fc(x)
    mask = torch.triu(torch.full((x.shape[1], x.shape[1]), -9.0), 1) + torch.arange(6, dtype=torch.float32)
    return (x @ x.mT + mask).softmax(-1).to(x.dtype) @ (x * net.gain)


@pytest.mark.parametrize(
    ("function", "in_fp32"),
    [
        (attention, ["matmul", "softmax"]),
        (softmax_alone, ["softmax"]),
        (root_mean_square, ["pow", "mean", "add", "rsqrt", "mul"]),
        (own_mask, []),
    ],
)
def test_operations(function: Callable[[nn.Module, Tensor], Tensor], in_fp32: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Block(function)
    x = batch(net)
    with torch.no_grad():
        wanted = net(x)
    plan = planned(net, precision="fp16")
    assert [operation.name for operation in plan.operations if operation.precision is FP32] == in_fp32
    assert {operation.reason for operation in plan.operations if operation.precision is FP32} <= {
        "float; fp32: the code around it casts to FP32"
    }
    assert plan.of("fc").precision is FP16
    path = exported(calibrated(net, plan), tmp_path / "model.onnx")
    with torch.no_grad():
        got = net(x)
    assert (got - wanted).abs().max() < 3e-3 * wanted.abs().max()
    assert (in_onnxruntime(path, x, optimize=False) - got).abs().max() < 3e-3 * wanted.abs().max()


def test_what_half_precision_has_no_number_for_is_kept() -> None:
    def unit_length(net: nn.Module, x: Tensor) -> Tensor:
        wide = x.float()
        return net.fc((wide / (wide.pow(2).sum(-1, keepdim=True).sqrt() + 1e-12)).to(x.dtype))

    net = Block(unit_length)
    x = torch.zeros(2, *net.input_shape)
    wanted = net(x)
    calibrated(net, planned(net, precision="fp16"))
    torch.testing.assert_close(net(x), wanted, rtol=1e-3, atol=1e-3)


def test_layers_without_products_too() -> None:
    net = Block(lambda net, x: net.fc(net.norm(net.fc(x).float()).to(x.dtype)))
    plan = planned(net, precision="fp16")
    assert {layer.name: layer.precision for layer in plan.layers} == {"fc": FP16, "norm": FP32}
    plan = planned(Block(lambda net, x: net.fc(net.norm(net.fc(x)).float())), precision="fp16")
    assert {layer.precision for layer in plan.layers} == {FP16}


@pytest.mark.parametrize("name", ["softmax", "*"])
def test_a_rule_decides_otherwise(name: str) -> None:
    plan = planned(Block(softmax_alone), precision="fp16", rules=[{"name": name, "precision": "fp16"}])
    assert {operation.precision for operation in plan.operations} == {FP16}


def test_code_that_does_not_run_in_half_precision_is_planned_as_ever() -> None:
    def picky(net: nn.Module, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError("takes float32 alone")
        return net.fc(x) + 1

    plan = planned(Block(picky), precision="bf16")
    assert [operation.precision for operation in plan.operations] == [Precision.BF16]


def test_what_a_model_keeps_between_calls_stays_in_fp32() -> None:
    class Keeping(nn.Module):
        input_shape = (6, 32)

        def __init__(self) -> None:
            super().__init__()
            self.linear, self.size, self.factors = nn.Linear(32, 32), 0, torch.empty(0)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            if len(x) != self.size:
                self.size, self.factors = len(x), torch.arange(32).to(y.dtype)
            return y * self.factors

    net = Keeping().eval()
    planned(net, precision="fp16")
    assert net.factors.dtype is torch.float32
