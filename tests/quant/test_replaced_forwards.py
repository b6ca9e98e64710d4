"""Modules whose forward was replaced on the module itself, or that hooks look at, keep doing what they did."""

import copy
import types
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
import torch.nn.functional as F
from placement_nets import batch, calibrated, exported, in_onnxruntime, lively, planned
from torch import Tensor, nn

from maseRT.precision import Precision


class Net(nn.Module):
    """Images [N, 8, 8, 8]."""

    input_shape = (8, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(8, 8, 3, padding=1) for _ in "abc")
        self.bn, self.act, self.same = nn.BatchNorm2d(8), nn.ReLU(), nn.Identity()
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.same(self.act(self.b(F.relu(self.bn(self.drop(self.a(x))))))))


def replace_convolution(net: Net) -> None:
    net.a.forward = lambda x: F.conv2d(x, net.a.weight, net.a.bias, padding=1) * 2


def replace_activation(net: Net) -> None:
    net.act.forward = lambda x: x.clamp(min=-1)


def replace_identity(net: Net) -> None:
    net.same.forward = lambda x: x - 1


def replace_dropout(net: Net) -> None:
    net.drop.forward = lambda x: x * 2


class Shifted(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - 1


def subclass_activation(net: Net) -> None:
    net.act = Shifted()


def hook_convolution(net: Net) -> None:
    net.a.register_forward_hook(lambda module, args, result: result * 2)


def hook_dropout(net: Net) -> None:
    net.drop.register_forward_hook(lambda module, args, result: result * 2)


def hook_batchnorm(net: Net) -> None:
    net.bn.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


CHANGES = (replace_convolution, replace_activation, replace_identity, replace_dropout, subclass_activation)
AHEAD_OF_ACT = (replace_convolution, replace_dropout)
HOOKS = (hook_convolution, hook_dropout, hook_batchnorm)


@pytest.mark.parametrize("change", [*CHANGES, *HOOKS], ids=lambda change: change.__name__)
@pytest.mark.parametrize("settings", [{"precision": "fp16"}, {"float": "fp16"}], ids=["fp16", "int8"])
def test_the_numbers_stay(change: object, settings: dict[str, object]) -> None:
    torch.manual_seed(0)
    net = Net()
    change(net)
    x = batch(lively(net))
    with torch.no_grad():
        wanted = net(x)
    plan = planned(net, **settings)
    with torch.no_grad():
        got = calibrated(net, plan)(x)
    assert (got - wanted).norm() < (0.1 if plan.has_int8 else 2e-3) * wanted.norm()


def test_what_such_a_module_computes_is_not_taken_for_granted(tmp_path: Path) -> None:
    for change in CHANGES:
        net = Net()
        change(net)
        assert "c.input" not in planned(lively(net)).nonnegative or change in AHEAD_OF_ACT
    net = Net()
    replace_convolution(net)
    plan = planned(lively(net))
    assert plan.of("a").precision is Precision.FP32
    assert "replaced on this very module" in plan.of("a").reason
    assert plan.folds == ()


def test_an_fp16_file_has_the_replaced_forward(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net()
    replace_activation(net)
    x = batch(lively(net))
    with torch.no_grad():
        wanted = net(x)
    path = exported(calibrated(net, planned(net, precision="fp16")), tmp_path / "model.onnx")
    assert (in_onnxruntime(path, x, optimize=False) - wanted).norm() < 3e-3 * wanted.norm()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.d = (nn.Conv2d(8, 8, 3, padding=1) for _ in "cd")

    def forward(self, x: Tensor) -> Tensor:
        return self.d(F.relu(self.c(x)))


def residual(self: Block, x: Tensor) -> Tensor:
    x = F.relu(x + self.d(F.relu(self.c(x))))
    return x * torch.softmax(x, 1)


def of_the_class(self: Block, x: Tensor) -> Tensor:
    x = F.relu(x + type(self).forward(self, x))
    return x * torch.softmax(x, 1)


class Blocks(nn.Module):
    """Images [N, 8, 8, 8]."""

    input_shape = (8, 8, 8)

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Conv2d(8, 8, 3, padding=1), Block(), nn.Conv2d(8, 8, 3)
        self.b.forward = types.MethodType(forward, self.b)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.b(F.relu(self.a(x))))


@pytest.mark.parametrize("forward", [residual, of_the_class])
def test_operations_of_a_replaced_forward_are_treated(forward: Callable[..., Tensor], tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Blocks(forward)
    x = batch(lively(net))
    with torch.no_grad():
        wanted = net(x)
    rules = [{"name": "b.softmax", "precision": "fp32"}]
    plan = planned(net, float="fp16", rules=rules)
    assert [site.owner for site in plan.sites] == ["b"]
    net = calibrated(net, plan)
    path = exported(net, tmp_path / "model.onnx")
    softmax = next(n for n in onnx.load(path).graph.node if n.op_type == "Softmax")
    casts = [n for n in onnx.load(path).graph.node if n.op_type == "Cast" and n.output[0] == softmax.input[0]]
    assert [attribute.i for node in casts for attribute in node.attribute if attribute.name == "to"] == [
        onnx.TensorProto.FLOAT
    ]
    with torch.no_grad():
        assert (net(x) - wanted).norm() < 0.1 * wanted.norm()
        assert (in_onnxruntime(path, x, optimize=False) - net(x)).norm() < 1e-2 * wanted.norm()
        copied = copy.deepcopy(net)
        copied.b.d.bias.zero_()
        assert torch.equal(copied.b(x[:1]), copied.b.forward(x[:1]))
        assert not torch.equal(copied(x), net(x))
