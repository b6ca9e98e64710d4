"""A BatchNorm that applies an activation behind itself, as timm's BatchNormAct2d, is folded down to that."""

import pytest
import torch
import torch.nn.functional as F
from placement_nets import calibrated, exported, in_onnxruntime, lively, planned
from torch import Tensor, nn

from maseRT.plan import Fold, Plan
from maseRT.precision import Precision
from maseRT.quant import quantize_model, quantizers_off


class BatchNormAct2d(nn.BatchNorm2d):
    """The shape of timm's class: a forward of its own, and the children `drop` and `act`."""

    def __init__(self, features: int, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__(features)
        self.drop = nn.Identity()
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        training = self.training or self.running_mean is None
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training, self.momentum, self.eps
        )
        return self.act(self.drop(x))


class Swapped(BatchNormAct2d):
    """It has the children, but normalizes what it has activated."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.drop(self.act(x)), self.running_mean, self.running_var, self.weight, self.bias)


class Scaled(BatchNormAct2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Net(nn.Module):
    """A block as in timm's networks: the second BatchNorm applies nothing, and a shortcut is added behind it."""

    input_shape = (3, 8, 8)

    def __init__(self, norm: type[nn.Module] = BatchNormAct2d) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = norm(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.bn2 = BatchNormAct2d(16, nn.Identity)
        self.conv3 = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x))
        return self.conv3(torch.relu(self.bn2(self.conv2(x)) + x))


FOLDS = (Fold("conv1", "bn1"), Fold("conv2", "bn2"))


def test_the_batchnorm_part_folds_and_the_rest_stays():
    net = lively(Net())
    x = torch.randn(4, *Net.input_shape)
    wanted, plan = net(x), planned(net)
    assert plan.folds == FOLDS
    assert plan.notes == ()
    assert {operation.name for operation in plan.operations} == {"add", "relu"}
    assert plan.of("bn1.act").precision is Precision.FP32
    quantize_model(net, plan, master_weights=True)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    assert isinstance(net.bn1.act, nn.ReLU)
    with quantizers_off(net):
        torch.testing.assert_close(net(x), wanted, rtol=1e-4, atol=1e-5)


def test_placement_sees_through_it():
    """The shortcut is quantized, and ranges behind its ReLU are known not to be negative."""
    plan = planned(lively(Net()))
    assert [site.name for site in plan.sites] == ["add.1"]
    assert plan.residual_adds[0].layer == "conv2"
    assert "conv2.input" in plan.nonnegative
    assert ("conv1", "bn1.act") in plan.flow
    assert ("conv2", "add") in plan.flow


def test_the_plan_alone_rebuilds_the_model(tmp_path):
    torch.manual_seed(0)
    net = lively(Net())
    plan = planned(net, float="fp32")
    calibrated(net, plan)
    again = quantize_model(Net().eval(), Plan.from_json(plan.to_json()))
    again.load_state_dict(net.state_dict(), strict=True)
    x = torch.randn(4, *Net.input_shape)
    assert torch.equal(again(x), net(x))
    path = exported(net, tmp_path / "model.onnx")
    torch.testing.assert_close(in_onnxruntime(path, x, optimize=False), net(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("norm", [Swapped, Scaled])
def test_other_code_is_not_folded(norm):
    plan = planned(lively(Net(norm)))
    assert plan.folds == FOLDS[1:]
    (note,) = plan.notes
    assert note.startswith("BatchNorm is not folded in bn1")


@pytest.mark.parametrize(("told", "folds"), [("fp16", FOLDS), ("fp32", FOLDS[1:])])
def test_a_rule_about_it_is_obeyed(told, folds):
    rule = {"name": "bn1.batch_norm", "precision": told}
    assert planned(lively(Net()), float="fp16", rules=[rule]).folds == folds
