"""Placement on small networks: what is folded, which operands are quantized, which ranges are shared."""

import pytest
import torch
import torch.nn.functional as F
from placement_nets import (
    BasicBlock,
    Branching,
    Encoder,
    Inception,
    MobileBlock,
    ResNet,
    SequenceNet,
    conv_bn_relu,
    planned,
)
from torch import Tensor, nn

from maseRT.plan import Fold, Plan, ResidualAdd
from maseRT.precision import Precision

INT8 = Precision.INT8


def int8_layers(plan: Plan) -> set[str]:
    return {layer.name for layer in plan.layers if layer.precision is INT8}


def sites(plan: Plan) -> list[str]:
    return [site.name for site in plan.sites]


class Body(nn.Module):
    """Convolutions 8 -> 8 and what else a test needs, joined by a function; images [N, 8, 8, 8]."""

    input_shape = (8, 8, 8)

    def __init__(self, function: object, **more: nn.Module) -> None:
        super().__init__()
        for name in "abcd":
            setattr(self, name, nn.Conv2d(8, 8, 3, padding=1))
        for name, module in more.items():
            setattr(self, name, module)
        self.function = function
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def test_resnet() -> None:
    plan = planned(ResNet().eval())
    assert plan.folds == tuple(
        Fold(layer, batchnorm)
        for layer, batchnorm in [
            ("conv1", "bn1"),
            ("layer1.0.conv1", "layer1.0.bn1"),
            ("layer1.0.conv2", "layer1.0.bn2"),
            ("layer2.0.downsample.0", "layer2.0.downsample.1"),
            ("layer2.0.conv1", "layer2.0.bn1"),
            ("layer2.0.conv2", "layer2.0.bn2"),
        ]
    )
    assert int8_layers(plan) == {fold.layer for fold in plan.folds} | {"maxpool", "fc"}
    assert sites(plan) == ["layer1.0.add.1", "layer2.0.add.1"]
    assert plan.residual_adds == (
        ResidualAdd("layer1.0.add", "layer1.0.conv2", skip=1),
        ResidualAdd("layer2.0.add", "layer2.0.conv2", skip=1),
    )
    assert plan.ties == (
        ("layer1.0.add.1", "layer1.0.conv1.input", "maxpool.input"),
        ("layer2.0.conv1.input", "layer2.0.downsample.0.input"),
    )
    assert plan.global_pools == ("avgpool.input",)
    assert plan.of("avgpool").reason == "global pool"
    assert {"layer1.0.add.1", "maxpool.input", "fc.input"} <= set(plan.nonnegative)
    assert not {"conv1.input", "layer2.0.add.1"} & set(plan.nonnegative)


def test_concatenations_share_one_range_with_their_readers() -> None:
    plan = planned(Inception().eval())
    assert sites(plan) == ["max_pool2d.0", "cat.0", "cat.1", "cat.2", "cat_1.0", "cat_1.1"]
    assert plan.ties == (
        ("a.0.input", "b.0.0.input", "c.0.input", "max_pool2d.0"),
        ("cat.0", "cat.1", "cat.2", "out1.0.input", "out2.0.input"),
        ("cat_1.0", "cat_1.1", "fc.input"),
    )


def test_a_concatenation_that_a_float_layer_reads_stays_float() -> None:
    rules = [{"name": "out2.0", "precision": "fp32"}]
    assert "cat.0" not in sites(planned(Inception().eval(), rules=rules))


def test_depthwise_convolutions_and_gates() -> None:
    plan = planned(MobileBlock().eval())
    assert plan.of("depthwise.0").precision is INT8
    assert plan.of("se.fc1").reason.startswith("tiny: 128 multiply-adds")
    assert sites(plan) == ["add.0"]
    assert plan.residual_adds == (ResidualAdd("add", "project.0", skip=0),)
    assert plan.ties == (("add.0", "depthwise.0.input"),)
    assert plan.global_pools == ("se.mean.0", "mean.0")
    assert "project.0.input" in plan.nonnegative
    assert "act.input" not in plan.nonnegative

    without = planned(MobileBlock().eval(), depthwise=False)
    assert without.of("depthwise.0").reason == "depth-wise, and depthwise = false"
    assert without.ties == ()
    by_rule = planned(MobileBlock().eval(), depthwise=False, rules=[{"name": "depth*.0", "precision": "int8"}])
    assert by_rule.of("depthwise.0").precision is INT8


def test_transformers_keep_their_adds_float() -> None:
    plan = planned(Encoder().eval())
    assert int8_layers(plan) == {f"layers.layers.0.{name}" for name in ("self_attn", "linear1", "linear2")}
    assert sites(plan) == []
    assert plan.of("head").reason.startswith("tiny")
    assert "layers.layers.0.add_1" in {operation.name for operation in plan.operations}


def test_query_key_and_value_projections_share_the_range_of_what_they_read() -> None:
    plan = planned(Body(lambda net, x: net.a(x) * net.b(x) + net.c(x).sigmoid()))
    assert plan.ties == (("a.input", "b.input", "c.input"),)


def test_lstm_stays_float_unless_a_rule_names_it() -> None:
    assert plan_reason(planned(SequenceNet().eval()), "lstm") == (Precision.FP32, True)
    for rule in ({"type": "LSTM"}, {"name": "ls*"}):
        plan = planned(SequenceNet().eval(), rules=[{**rule, "precision": "int8"}])
        assert plan.of("lstm").precision is INT8
    by_position = planned(SequenceNet().eval(), rules=[{"first": 9, "precision": "int8"}])
    assert by_position.of("lstm").precision is Precision.FP32


def plan_reason(plan: Plan, name: str) -> tuple[Precision, bool]:
    return plan.of(name).precision, "unroll" in plan.of(name).reason


def test_layerwise_quantizes_layers_and_nothing_else() -> None:
    plan = planned(ResNet().eval(), placement="layerwise")
    assert plan.sites == plan.ties == ()
    assert {"avgpool", "maxpool", "fc"} <= int8_layers(plan)
    assert len(plan.folds) == 6
    assert plan.residual_adds
    assert plan.nonnegative
    assert not planned(MobileBlock().eval(), placement="layerwise").of("se.fc1").precision.is_float


def test_what_cannot_be_recorded_is_placed_layer_by_layer_and_says_what_is_lost() -> None:
    plan = planned(Branching().eval())
    assert plan.placement == "layerwise"
    assert "depends on the data" in plan.notes[0]
    assert "residual adds" in plan.notes[0]
    assert plan.folds == (Fold("stem.0", "stem.1"),)
    assert int8_layers(plan) == {"stem.0", "conv", "fc"}
    assert plan.sites == plan.ties == plan.flow == plan.operations == ()


@pytest.mark.parametrize(
    ("function", "skip"),
    [
        (lambda net, x: net.a(x) + x, "add.1"),
        (lambda net, x: x + net.a(x), "add.0"),
        (lambda net, x: net.b(F.relu(net.a(x))) + net.c(x), "add.1"),
        (lambda net, x: net.c(x) + net.b(F.relu(net.a(x))), "add.0"),
        (lambda net, x: F.dropout(net.a(x), training=net.training) + x, "add.1"),
    ],
)
def test_the_skip_is_the_operand_that_no_convolution_fuses_with(function: object, skip: str) -> None:
    assert sites(planned(Body(function))) == [skip]


@pytest.mark.parametrize(
    "function",
    [
        lambda net, x: F.relu(net.a(x)) + x,  # the activation is fused, the add stands alone
        lambda net, x: net.a(x) + net.a.bias.sum(),  # no activation
        lambda net, x: net.a(x) + x.mean((2, 3), keepdim=True),  # broadcast
        lambda net, x: net.b(y := net.a(x)) * 0 + (y + y),  # doubled
        lambda net, x: (y := net.a(x)).relu() + (y + x),  # the convolution's output is needed by itself
    ],
)
def test_adds_that_are_not_fused_stay_float(function: object) -> None:
    assert sites(planned(Body(function))) == []


def test_a_float_convolution_takes_no_int8_addend() -> None:
    plan = planned(Body(lambda net, x: net.a(x) + x), rules=[{"name": "a", "precision": "fp32"}])
    assert plan.sites == ()
    assert plan.residual_adds == (ResidualAdd("add", "a", skip=1),)


@pytest.mark.parametrize(
    ("function", "quantized"),
    [
        (lambda net, x: net.b(net.pool(F.relu(net.a(x)))), True),
        (lambda net, x: net.b(net.pool(x)), True),
        (lambda net, x: net.b(F.relu(net.pool(net.a(x)))), False),  # between a convolution and its activation
        (lambda net, x: net.pool(net.a(x)), False),
        (lambda net, x: net.b(y := net.pool(net.a(x))) + y.sigmoid(), False),
        (lambda net, x: net.b(net.pool(net.a(net.pool(x)))), False),  # one module, two places
        (lambda net, x: net.b(net.pool(net.a(x)).transpose(2, 3)), False),  # TensorRT-RTX does that by itself
    ],
)
def test_max_pools(function: object, *, quantized: bool) -> None:
    plan = planned(Body(function, pool=nn.MaxPool2d(3, 1, 1)))
    assert (plan.of("pool").precision is INT8) is quantized
    assert plan.ties == ((("b.input", "pool.input"),) if quantized else ())


@pytest.mark.parametrize(
    ("function", "quantized"),
    [
        (lambda net, x: net.b(net.pool(F.relu(net.a(x)))), True),
        (lambda net, x: net.b(net.pool(net.a(x) + x)), True),
        (lambda net, x: net.b(net.pool(x)), False),
        (lambda net, x: net.pool(F.relu(net.a(x))), False),
    ],
)
def test_average_pools_have_a_range_of_their_own(function: object, *, quantized: bool) -> None:
    plan = planned(Body(function, pool=nn.AvgPool2d(3, 1, 1)))
    assert (plan.of("pool").precision is INT8) is quantized
    assert not any("pool.input" in tie for tie in plan.ties)


def test_a_rule_quantizes_any_pool() -> None:
    net = Body(lambda net, x: net.pool(net.a(x)), pool=nn.AdaptiveAvgPool2d(1))
    assert planned(net).of("pool").precision is Precision.FP32
    assert planned(net, rules=[{"type": "AdaptiveAvgPool2d", "precision": "int8"}]).of("pool").precision is INT8


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda net, x: net.bn(F.relu(net.a(x))), "follows the operation relu"),
        (lambda net, x: net.bn(net.act(net.a(x))), "follows a ReLU"),
        (lambda net, x: net.bn(net.a(x)) + net.bn(net.b(x)), "used more than once"),
        (lambda net, x: net.bn(y := net.a(x)) + y, "reads the output of a too"),
        (lambda net, x: net.bn(x), "follows the model's input"),
    ],
)
def test_batchnorms_that_are_not_folded(function: object, reason: str) -> None:
    plan = planned(Body(function, bn=nn.BatchNorm2d(8), act=nn.ReLU()))
    assert plan.folds == ()
    assert "not folded: " in plan.of("bn").reason
    assert reason in plan.of("bn").reason
    assert plan.of("bn").precision is Precision.FP32


def test_a_batchnorm_over_another_axis_is_not_folded() -> None:
    class Net(nn.Module):
        input_shape = (8, 8)

        def __init__(self) -> None:
            super().__init__()
            self.fc, self.bn = nn.Linear(8, 8), nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.fc(x))

    assert planned(Net().eval()).folds == ()


def test_a_batchnorm_that_a_rule_keeps_apart_is_not_folded() -> None:
    rules = [{"type": "BatchNorm2d", "precision": "fp32"}]
    assert planned(ResNet().eval(), float="fp16", rules=rules).folds == ()
    assert planned(ResNet().eval(), rules=rules).folds


def test_operations_that_differ_in_training_are_left_alone() -> None:
    def function(net: nn.Module, x: Tensor) -> Tensor:
        if net.training:
            x = x + torch.randn_like(x)
        return net.a(x) + x

    plan = planned(Body(function))
    assert plan.sites == ()
    assert any("in the model" in note for note in plan.notes)


def test_models_of_tiny_layers_only_are_quantized_all_the_same() -> None:
    class Tiny(nn.Sequential):
        input_shape = (16,)

    plan = planned(Tiny(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5)).eval())
    assert int8_layers(plan) == {"0", "3"}
    assert "nothing larger" in plan.of("0").reason


def test_a_chain_of_blocks_has_no_pair_between_a_convolution_and_what_it_fuses_with() -> None:
    class Net(nn.Sequential):
        input_shape = (3, 16, 16)

    plan = planned(Net(conv_bn_relu(3, 16, 3), BasicBlock(16, 16), BasicBlock(16, 16), conv_bn_relu(16, 8)).eval())
    quantized_reads = {(producer, consumer) for producer, consumer in plan.flow if consumer in int8_layers(plan)}
    fused = {layer for layer in int8_layers(plan) if layer.endswith(("conv2", ".0"))}
    assert not {(producer, consumer) for producer, consumer in quantized_reads if producer in fused}
