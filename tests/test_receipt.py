"""The precision receipt, on engines that tensorrt-rtx really builds, and on pieces of them."""

import json
from dataclasses import replace

import pytest
import torch
from placement_nets import Encoder, calibrated, exported, lively, planned
from torch import nn

from maseRT.errors import StepError
from maseRT.onnx_graph import layer_precisions
from maseRT.receipt import Receipt, Verdict, names_in, receipt_from
from maseRT.runtimes import get_compiler
from maseRT.runtimes.base import BatchRange, BuildOptions


class Net(nn.Module):
    """What compilers do otherwise than asked: a transposed convolution, an FP32 island, a pool before a reshape."""

    input_shape = (3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.bn = nn.BatchNorm2d(16)
        self.act = nn.ReLU()
        self.up = nn.ConvTranspose2d(16, 16, 2, stride=2)
        self.down = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.island = nn.Conv2d(32, 32, 3, padding=1)
        self.behind = nn.ReLU()
        self.last = nn.Conv2d(32, 32, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(512, 64)

    def forward(self, x):
        x = self.down(self.up(self.act(self.bn(self.stem(x)))))
        x = torch.relu(self.last(self.behind(self.island(x))))
        return self.head(self.pool(x).flatten(1))


RULES = [
    {"name": "island", "precision": "fp32"},
    {"name": "behind", "precision": "fp16"},  # else it would be FP32 along with the island
    {"name": "down", "precision": "fp16"},
]


def build(net, folder, **settings):
    """Return the plan, the exported layers and the engine of a net."""
    torch.manual_seed(0)
    plan = planned(net, **settings)
    path = exported(calibrated(net, plan), folder / "model.onnx")
    options = BuildOptions(batch=BatchRange(1, 4, 8), compute_capability="8.9")
    info = get_compiler("tensorrt-rtx").build(path, folder / "model.trt", options)
    return plan, layer_precisions(path, names_in(plan)), info


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    torch.manual_seed(0)
    return build(lively(Net()), tmp_path_factory.mktemp("net"), float="fp16", rules=RULES)


@pytest.fixture(scope="module")
def receipt(built) -> Receipt:
    return receipt_from(*built, onnx_sha256="abc")


@pytest.mark.parametrize(
    ("layer", "asked", "exported", "executed", "verdict"),
    [
        ("stem", "int8", "int8", "int8", Verdict.AS_ASKED),
        ("bn", "fp16", "folded into stem", "", Verdict.NOTHING),
        ("act", "fp16", "fp16", "fused into stem", Verdict.FUSED),
        ("up", "int8", "int8", "fp16", Verdict.DIFFERS),
        ("down", "fp16", "fp16", "fp16", Verdict.AS_ASKED),
        ("island", "fp32", "fp32", "fp16", Verdict.DIFFERS),
        ("behind", "fp16", "fp16", "fused into island", Verdict.FUSED),
        ("last", "int8", "int8", "int8", Verdict.AS_ASKED),
        ("pool", "fp16", "fp16", "int8", Verdict.SAME_VALUES),
        ("head", "int8", "int8", "int8", Verdict.AS_ASKED),
    ],
)
def test_each_layer_is_judged_by_what_the_engine_runs(receipt, layer, asked, exported, executed, verdict):
    found = next(each for each in receipt.layers if each.name == layer)
    assert (found.asked, found.exported, found.executed, found.verdict) == (asked, exported, executed, verdict)


def test_only_layers_that_differ_are_mismatches(receipt):
    assert [layer.name for layer in receipt.mismatches] == ["up", "island"]
    assert receipt.mismatches[0].describe() == "up (ConvTranspose2d): asked int8, runs in fp16"
    assert receipt.counts["differs"] == 2
    assert "2 differs" in receipt.summary()
    assert "build log" in receipt.summary()


def test_the_rules_end_the_mismatches(built, receipt, tmp_path):
    rules = receipt.rules(built[0])
    assert rules == ['{ name = "up", precision = "fp16" },', '{ name = "behind", precision = "fp32" },']
    pasted = [{"name": "up", "precision": "fp16"}, {"name": "behind", "precision": "fp32"}]
    torch.manual_seed(0)
    again = build(lively(Net()), tmp_path, float="fp16", rules=[*pasted, *RULES])
    assert receipt_from(*again, onnx_sha256="").mismatches == ()


def test_a_layer_owns_the_kernels_with_its_product(receipt):
    kernels = receipt.kernels_of("last")
    assert any(kernel.type == "correlation" and kernel.reads == ("int8",) and kernel.tactic for kernel in kernels)
    assert receipt.kernels_of("behind") == ()


def test_times_are_added_up_by_layer(receipt):
    assert receipt.ms_of("last") is None
    assert receipt.converting_share is None
    timed = receipt.with_times({kernel.name: 0.5 for kernel in receipt.kernels})
    assert timed.ms_of("last") == 0.5 * len(receipt.kernels_of("last"))
    assert timed.ms_of("behind") is None
    assert timed.converting_share == len(receipt.converting) / len(receipt.kernels)
    assert "of the time" in timed.conversions()
    assert 0 < len(receipt.converting) < len(receipt.kernels)


def test_a_receipt_survives_its_json(receipt):
    timed = receipt.with_times({receipt.kernels[0].name: 0.25})
    assert Receipt.from_json(json.loads(json.dumps(timed.to_json())), where="r.json") == timed
    with pytest.raises(StepError, match="not a precision receipt"):
        Receipt.from_json({"layers": []}, where="r.json")


@pytest.mark.parametrize("unobserved", [True, False])
def test_what_cannot_be_observed_is_no_mismatch(built, unobserved):
    plan, layers, info = built
    receipt = receipt_from(
        plan, layers, replace(info, layers=None, layers_from="") if unobserved else None, onnx_sha256=""
    )
    assert {layer.verdict for layer in receipt.layers} == {Verdict.NOT_OBSERVED, Verdict.NOTHING}
    assert receipt.conversions() == ""
    assert receipt.mismatches == ()


def test_what_is_exported_otherwise_differs_and_has_no_rule(built):
    plan, layers, info = built
    changed = {**layers, "stem": replace(layers["stem"], precision="fp16")}
    del changed["head"]
    receipt = receipt_from(plan, changed, info, onnx_sha256="")
    found = {layer.name: layer for layer in receipt.mismatches}
    assert found["stem"].describe() == "stem (Conv2d): asked int8, exported as fp16, runs in int8"
    assert found["head"].describe() == "head (Linear): asked int8, exported as no nodes, runs in nothing"
    assert not any("stem" in rule or "head" in rule for rule in receipt.rules(plan))


def test_a_product_of_which_no_kernel_tells_is_not_observed(built):
    """TensorRT 8 hides whole subgraphs in a layer whose inputs and outputs alone are told."""
    plan, layers, info = built
    hidden = tuple(replace(each, type="Myelin") if each.type == "correlation" else each for each in info.layers)
    receipt = receipt_from(plan, layers, replace(info, layers=hidden), onnx_sha256="")
    verdicts = {layer.name: layer.verdict for layer in receipt.layers}
    assert verdicts["stem"] is verdicts["last"] is Verdict.NOT_OBSERVED


def test_layers_that_are_compiled_into_one_kernel_are_counted_with_its_time(built):
    plan, layers, info = built
    hidden, beside = [name for name, each in layers.items() if each.products][:2], info.layers[-1]
    nodes = tuple(node for name in hidden for node in layers[name].nodes)
    opaque = replace(beside, name="{ForeignNode[first...last]}", type="Myelin", nodes=nodes, precision="")
    receipt = receipt_from(plan, layers, replace(info, layers=(opaque, replace(beside, nodes=()))), onnx_sha256="")
    assert receipt.hiding() == "2 layers are compiled into one kernel that tells no types inside"
    timed = receipt.with_times({opaque.name: 0.3, beside.name: 0.1})
    assert timed.hiding().endswith("inside, 75.0% of the time")
    assert timed.ms_of(hidden[0]) is None
    assert [kernel.name for kernel in timed.kernels_of(hidden[0])] == [opaque.name]
    assert Receipt.from_json(json.loads(json.dumps(timed.to_json())), where="") == timed


def test_an_int8_table_that_is_kept_in_float_has_the_same_rows(built):
    """`up` stands for an embedding: asked for and exported in INT8, executed in FP16."""
    plan, layers, info = built
    changed = {**layers, "up": replace(layers["up"], looks_up=True)}
    receipt = receipt_from(plan, changed, info, onnx_sha256="")
    (table,) = (layer for layer in receipt.layers if layer.name == "up")
    assert (table.executed, table.verdict) == ("fp16", Verdict.SAME_VALUES)


def test_attention_is_judged_by_its_projections(tmp_path):
    """The products of activations inside stay float, and so does what scales behind the INT8 kernels."""
    torch.manual_seed(0)
    plan, layers, info = build(lively(Encoder()), tmp_path, float="fp32")
    receipt = receipt_from(plan, layers, info, onnx_sha256="")
    assert receipt.mismatches == ()
    attention = next(layer for layer in receipt.layers if layer.type == "MultiheadAttention")
    assert (attention.asked, attention.executed) == ("int8", "int8")
