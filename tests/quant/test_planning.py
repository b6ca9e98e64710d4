"""make_plan: rules, precisions and their reasons, FP16 overflow, BF16, mistakes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from placement_nets import Encoder, Inception, MobileBlock, ResNet, SequenceNet, SharedLayer, lively, planned
from torch import Tensor, nn
from torch.nn.utils import prune

from maseRT.errors import UsageError
from maseRT.plan import INPUT, Plan
from maseRT.precision import Precision, QuantSpec
from maseRT.quant import quantize_model

FP32, FP16, BF16, INT8 = Precision.FP32, Precision.FP16, Precision.BF16, Precision.INT8


def test_every_layer_is_listed_in_the_order_of_execution() -> None:
    plan = planned(MobileBlock().eval())
    assert [layer.name for layer in plan.layers[:6]] == [
        "stem.0",
        "stem.1",
        "stem.2",
        "depthwise.0",
        "depthwise.1",
        "depthwise.2",
    ]
    assert all(layer.reason for layer in plan.layers)
    assert plan.of("act").reason == "a PReLU has no quantized form"
    assert plan.of("stem.1").reason == "folded into stem.0"


def test_int8_layers_have_per_channel_weights_and_per_tensor_inputs() -> None:
    plan = planned(ResNet().eval())
    assert plan.of("conv1").weight == QuantSpec(axis=0)
    assert plan.of("conv1").input == QuantSpec()
    assert plan.of("maxpool").weight is None


def test_the_plan_says_which_rule_decided() -> None:
    rules = [{"last": 1, "precision": "fp32"}, {"name": "layer1.*", "precision": "fp16"}]
    plan = planned(ResNet().eval(), rules=rules)
    assert plan.of("fc").reason == "rule 1: last = 1"
    assert plan.of("layer1.0.conv2").precision is FP16
    assert plan.of("layer1.0.conv2").reason == 'rule 2: name = "layer1.*"'
    assert plan.of("conv1").reason == "default"


def test_functional_operations_are_listed_with_their_precision() -> None:
    plan = planned(MobileBlock().eval(), float="fp16", rules=[{"name": "se.sigmoid", "precision": "fp32"}])
    operations = {operation.name: operation for operation in plan.operations}
    assert list(operations) == ["se.mean", "se.relu", "se.sigmoid", "se.mul", "add", "mean"]
    assert operations["se.mul"].precision is FP16
    assert operations["se.sigmoid"].precision is FP32
    assert operations["se.sigmoid"].reason == 'rule 1: name = "se.sigmoid"'


def test_a_float_precision_without_float_is_the_whole_model_s() -> None:
    plan = planned(ResNet().eval(), precision="fp16")
    assert plan.float is FP16
    assert {layer.precision for layer in plan.layers} == {FP16}
    assert not plan.has_int8
    apart = planned(ResNet().eval(), precision="fp16", float="fp32")
    assert apart.of("conv1").precision is FP16
    assert apart.of("relu").precision is FP32


def test_int8_layers_take_the_float_type_around_them() -> None:
    plan = planned(ResNet().eval(), float="fp16", rules=[{"first": 1, "precision": "fp32"}])
    assert plan.of("conv1").float is FP32
    assert plan.of("layer1.0.conv1").precision is INT8
    assert plan.of("layer1.0.conv1").float is FP16
    assert plan.output_of(INPUT) is FP32


def test_a_shared_layer_is_planned_once_with_both_names() -> None:
    plan = planned(SharedLayer().eval(), rules=[{"name": "body.1", "precision": "fp16"}])
    assert plan.of("first") is plan.of("body.1")
    assert plan.of("body.1").aliases == ("body.1",)
    assert plan.of("first").precision is FP16
    with pytest.raises(UsageError, match="one shared layer"):
        rules = [{"name": "body.1", "precision": "fp16"}, {"name": "first", "precision": "fp32"}]
        planned(SharedLayer().eval(), rules=rules)


def test_int8_for_a_type_that_cannot_is_an_error_with_the_list() -> None:
    with pytest.raises(UsageError) as caught:
        planned(ResNet().eval(), rules=[{"type": "BatchNorm2d", "precision": "int8"}])
    assert "BatchNorm2d has no quantized form" in str(caught.value)
    assert "Conv2d" in caught.value.fix
    assert "quantize.rules[0]" in caught.value.where


def test_int8_for_several_layers_leaves_out_those_that_cannot() -> None:
    plan = planned(ResNet().eval(), precision="fp32", rules=[{"name": "layer1.*", "precision": "int8"}])
    assert plan.of("layer1.0.conv1").precision is INT8
    assert plan.of("layer1.0.relu").reason == "a ReLU has no quantized form"


def test_int8_for_an_operation_is_an_error() -> None:
    with pytest.raises(UsageError, match="it is an operation"):
        planned(Inception().eval(), rules=[{"name": "cat", "precision": "int8"}])


def test_a_rule_behind_others_that_take_all_its_layers_is_noted() -> None:
    rules = [{"type": "Linear", "precision": "fp16"}, {"name": "fc", "precision": "fp32"}]
    plan = planned(ResNet().eval(), rules=rules)
    assert plan.notes == ('rule 2 (name = "fc") decides nothing: earlier rules match the same layers',)


def test_a_pruned_layer_says_why_it_stays_float() -> None:
    class Net(nn.Module):
        input_shape = (32, 8, 8)

        def __init__(self) -> None:
            super().__init__()
            self.a = prune.l1_unstructured(nn.Conv2d(32, 32, 3), "weight", amount=0.5)
            self.c = nn.Conv2d(32, 32, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(x))

    plan = planned(Net().eval())
    assert plan.of("a").precision is FP32
    assert "undo weight_norm, spectral_norm or pruning first" in plan.of("a").reason
    assert plan.of("c").precision is INT8


def test_a_layer_that_the_example_does_not_reach_stays_float() -> None:
    class Net(nn.Module):
        input_shape = (256,)

        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(256, 256), nn.Linear(256, 256)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    plan = planned(Net().eval())
    assert plan.layers[-1].name == "spare"
    assert plan.of("spare").reason == "the example does not reach it"
    asked = planned(Net().eval(), rules=[{"name": "spare", "precision": "int8"}])
    assert asked.of("spare").precision is INT8


def test_modules_of_the_user_s_own_are_listed() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x * self.gain)

    class Net(nn.Sequential):
        input_shape = (3, 16, 16)

    plan = planned(Net(Scale(), nn.Conv2d(3, 8, 3)).eval(), float="fp16", rules=[{"name": "0", "precision": "fp32"}])
    assert plan.of("0").type == "Scale"
    assert plan.of("0").precision is FP32
    assert plan.operations == ()
    assert plan.output_of(INPUT) is FP32


def test_nothing_int8_is_said() -> None:
    plan = planned(
        SequenceNet().eval(), rules=[{"type": "Linear", "precision": "fp32"}, {"first": 1, "precision": "fp32"}]
    )
    assert not plan.has_int8
    assert plan.notes == ("no layer is INT8, although that is the default precision; each layer's reason says why",)


def test_planning_changes_nothing() -> None:
    net = lively(ResNet())
    before = copy.deepcopy(net.state_dict())
    planned(net, float="fp16")
    assert list(net.state_dict()) == list(before)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_the_plan_does_not_depend_on_the_weights() -> None:
    assert planned(ResNet().eval()) == planned(lively(ResNet()))


def overflowing(**settings: object) -> Plan:
    net = ResNet().eval()
    with torch.no_grad():
        net.layer1[0].conv1.weight[0, 0, 0, 0] = 1e5
        net.bn1.weight.fill_(1e6)
        net.fc.weight.mul_(1e6)
    return planned(net, **settings)


def test_weights_beyond_the_half_range_are_kept_in_fp32() -> None:
    rules = [{"last": 1, "precision": "fp16"}]
    plan = overflowing(float="fp16", rules=rules)
    assert plan.of("layer1.0.conv1").precision is INT8
    assert plan.of("layer1.0.conv1").float is FP32
    assert "weight reaches 1e+05" in plan.of("layer1.0.conv1").reason
    assert plan.of("conv1").float is FP32  # its own weights are small; with the BatchNorm folded in they are not
    assert plan.of("fc").precision is FP32
    assert plan.of("layer2.0.conv1").float is FP16
    assert {note.split()[0] for note in plan.notes} == {"layer1.0.conv1", "conv1", "fc"}
    assert overflowing(float="bf16").notes == overflowing().notes == ()


def test_weights_beyond_the_half_range_can_be_refused() -> None:
    with pytest.raises(UsageError) as caught:
        overflowing(float="fp16", overflow="error")
    assert "layer1.0.conv1 (weight reaches 1e+05)" in str(caught.value)


def test_a_loose_parameter_beyond_the_half_range_is_refused() -> None:
    net = Encoder().eval()
    nn.init.constant_(net.positions, 1e5)
    with pytest.raises(UsageError, match="belongs to no layer") as caught:
        planned(net, float="fp16")
    assert caught.value.where == "positions"


def test_what_has_no_bf16_form_stays_fp32() -> None:
    plan = planned(ResNet().eval(), float="bf16")
    assert plan.of("conv1").precision is INT8
    assert plan.of("conv1").float is FP32
    assert plan.of("avgpool").precision is FP32
    assert "no BF16 form" in plan.of("avgpool").reason
    assert plan.of("fc").float is plan.of("relu").float is BF16
    with pytest.raises(UsageError, match="asks for bf16: conv1 cannot take it"):
        planned(ResNet().eval(), rules=[{"type": "Conv2d", "precision": "bf16"}])


class SameConv2d(nn.Conv2d):
    """A convolution of one's own that has its padding inside."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.padded = nn.ZeroPad2d((0, 1, 0, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.padded(x), self.weight, self.bias)


class SameNet(nn.Sequential):
    input_shape = (3, 8, 8)


def test_a_convolution_of_ones_own_is_one_layer() -> None:
    net = SameNet(SameConv2d(3, 4, 2), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    plan = planned(net, rules=[{"first": 1, "precision": "fp32"}])
    assert [layer.name for layer in plan.layers] == ["0", "1", "2"]
    assert plan.of("0").reason.startswith("rule 1")
    assert planned(net).of("0").precision is Precision.INT8
    assert plan.operations == ()


def test_one_with_more_than_a_convolution_inside_says_why_it_stays_float() -> None:
    class Doubled(SameConv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    reason = planned(SameNet(Doubled(3, 4, 2), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()).of("0").reason
    assert "Doubled is a Conv2d with code of its own, and its forward goes on with what conv2d gives" in reason


def test_a_convolution_of_ones_own_takes_a_float_precision() -> None:
    net = SameNet(SameConv2d(3, 4, 2), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    x = torch.randn(2, *SameNet.input_shape)
    wanted, plan = net(x), planned(net, precision="fp32", rules=[{"type": "SameConv2d", "precision": "fp16"}])
    quantize_model(net, plan)
    assert net[0].weight.dtype is torch.float16
    assert 0 < (net(x) - wanted).abs().max() < 1e-2


def test_a_layer_with_layers_inside_is_not_one() -> None:
    class Adapted(nn.Linear):
        def __init__(self) -> None:
            super().__init__(16, 64)
            self.down, self.up = nn.Linear(16, 4), nn.Linear(4, 64)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight, self.bias) + self.up(self.down(x))

    class Net(nn.Sequential):
        input_shape = (16,)

    plan = planned(Net(Adapted()).eval())
    assert [layer.name for layer in plan.layers] == ["0.down", "0.up"]
    assert "0.linear" in [operation.name for operation in plan.operations]


class ActivatedBatchNorm(nn.BatchNorm2d):
    """A BatchNorm with its activation inside, as libraries of models have it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, input: Tensor) -> Tensor:
        return self.act(super().forward(input))


@pytest.mark.parametrize("traceable", [True, False])
def test_a_batchnorm_inside_of_other_code_is_not_folded_and_the_plan_says_so(traceable: bool) -> None:
    class Net(nn.Sequential):
        input_shape = (3, 16, 16)

        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            return x if traceable or len(x) % 2 else 2 * x

    net = lively(Net(nn.Conv2d(3, 8, 3), ActivatedBatchNorm(8), nn.Conv2d(8, 8, 3)))
    plan = planned(net)
    assert plan.folds == ()
    assert any("placed layer by layer" in note for note in plan.notes) is not traceable
    assert any("BatchNorm is not folded in 1:" in note for note in plan.notes)


class Branches(nn.Module):
    """A convolution beside a BatchNorm, as RepVGG trains them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.identity = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)) + self.identity(x))

    def reparameterize(self) -> None:
        """Merge them."""


class Folding(nn.Sequential):
    def fuse(self) -> None:
        """Do what a plan does anyway."""


def test_branches_that_their_model_can_merge_are_told_of() -> None:
    folding = Folding(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    notes = planned(SameNet(folding, Branches(), Branches()).eval()).notes
    told = [note for note in notes if "reparameterize()" in note]
    assert len(told) == 1
    assert told[0].startswith("1, 2: the model's own reparameterize() merges")
    assert not any("fuse()" in note for note in notes)


def test_products_with_parameters_that_are_no_layers_are_told() -> None:
    class Tied(nn.Module):
        input_shape = (6, 160)

        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(160, 160)
            self.weight = nn.Parameter(torch.randn(160, 160))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.first(x)) @ self.weight
            return F.linear(x @ x.mT @ x, self.first.weight.T)

    (note,) = planned(Tied()).notes
    assert note.startswith("matmul, linear: stays float, since it multiplies with a weight itself; INT8 takes a layer")
    assert planned(Tied(), precision="fp16").notes == ()


class Positions(nn.Embedding):
    """Is asked for a number of positions, and reads no tensor."""

    def forward(self, count: int) -> Tensor:
        return self.weight[:count]


def test_a_layer_may_read_no_tensor() -> None:
    class Net(nn.Module):
        input_shape = (6, 160)

        def __init__(self) -> None:
            super().__init__()
            self.positions, self.linear = Positions(6, 160), nn.Linear(160, 160)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x + self.positions(x.shape[1]))

    assert {layer.name: layer.precision for layer in planned(Net()).layers} == {"positions": FP32, "linear": INT8}
