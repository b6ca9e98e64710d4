"""What makes an INT8 engine slower than a float one, on engines written by hand and on two that tensorrt-rtx builds."""

import json
import tomllib
from dataclasses import replace

import pytest
import torch
from placement_nets import calibrated, exported, lively, planned
from torch import nn

from maseRT.blame.compare import blame
from maseRT.blame.kernels import NO_LAYER, KernelGraph
from maseRT.errors import UsageError
from maseRT.onnx_graph import layer_precisions
from maseRT.receipt import Kernel, LayerReceipt, Receipt, Verdict, names_in, receipt_from
from maseRT.runtimes import get_compiler
from maseRT.runtimes.base import BatchRange, BuildOptions


def receipt(precisions, kernels):
    """Return a receipt.

    Args:
        precisions: layer -> asked for.
        kernels: (layer, tensors read, tensor written, types as "before>after", ms) each; "a+b" hides two layers.
    """
    layers = tuple(LayerReceipt(n, "Conv2d", asked, asked, asked, Verdict.AS_ASKED) for n, asked in precisions.items())
    made = []
    for number, (layer, reads, writes, types, ms) in enumerate(kernels):
        before, after = types.split(">")
        made.append(
            Kernel(
                name=f"k{number}",
                layer="" if layer == "convert" or "+" in layer else layer,
                hides=tuple(layer.split("+")) if "+" in layer else (),
                type="",
                tactic="",
                precision="",
                reads=(before,) * len(reads.split()),
                writes=(after,),
                converts=layer == "convert",
                ms=ms,
                inputs=tuple(reads.split()),
                outputs=(writes,),
            )
        )
    return Receipt("tensorrt", "8.6.1", "9.0", "abc", "inspector", layers, tuple(made))


LAYERS = ("conv1", "depthwise", "conv2", "head")
FLOAT = receipt(
    dict.fromkeys(LAYERS, "fp16"),
    [
        ("convert", "in", "half", "fp32>fp16", 0.01),
        ("conv1", "half", "a", "fp16>fp16", 0.10),
        ("depthwise", "a", "b", "fp16>fp16", 0.08),
        ("conv2", "b", "c", "fp16>fp16", 0.10),
        ("head", "c", "out", "fp16>fp32", 0.02),
    ],
)


def quantized(**changed):
    """Return an engine whose depthwise layer is slow, between changes of layout; `changed`: kernel -> ms."""
    kernels = [
        ("convert", "in", "q", "fp32>int8", changed.get("first", 0.02)),
        ("conv1", "q", "a", "int8>int8", changed.get("conv1", 0.05)),
        ("convert", "a", "a2", "int8>int8", 0.03),
        ("depthwise", "a2", "b", "int8>int8", changed.get("depthwise", 0.20)),
        ("convert", "b", "b2", "int8>int8", 0.03),
        ("conv2", "b2", "c", "int8>fp16", changed.get("conv2", 0.05)),
        ("head", "c", "out", "fp16>fp32", 0.02),
    ]
    return receipt({**dict.fromkeys(LAYERS, "int8"), "head": "fp16"}, kernels)


def test_a_slow_layer_is_named_with_the_rule_that_avoids_it():
    found = blame(quantized(), FLOAT)
    assert (found.ms, found.float_ms) == (pytest.approx(0.40), pytest.approx(0.31))
    assert [(s.layer, s.ms, s.float_ms) for s in found.slower] == [("depthwise", 0.20, 0.08)]
    assert found.rules == ('{ name = "depthwise", precision = "fp16" },',)
    (remedy,) = found.remedies
    assert remedy.saves_ms == pytest.approx(0.12)
    assert found.predicted_ms == pytest.approx(0.28)


def test_conversions_tell_what_they_lie_between():
    found = blame(quantized(first=0.1), FLOAT)
    told = [(c.before, c.after, c.reads, c.writes, c.ms) for c in found.conversions]
    assert told[0] == ((), ("conv1",), ("fp32",), ("int8",), 0.1)
    assert told[1][:2] == (("conv1",), ("depthwise",))
    assert [c[-1] for c in told] == [0.1, 0.03, 0.03]


def test_layers_that_only_pay_together_are_proposed_together():
    """Alone, neither is worth it: the other one would keep the change of layout between them."""
    kernels = [
        ("conv1", "in", "a", "int8>int8", 0.05),
        ("convert", "a", "a2", "int8>int8", 0.20),
        ("conv2", "a2", "out", "int8>fp32", 0.05),
    ]
    floats = [("conv1", "in", "a", "fp16>fp16", 0.06), ("conv2", "a", "out", "fp16>fp32", 0.06)]
    names = ("conv1", "conv2")
    found = blame(receipt(dict.fromkeys(names, "int8"), kernels), receipt(dict.fromkeys(names, "fp16"), floats))
    (remedy,) = found.remedies
    assert remedy.layers == names
    assert remedy.saves_ms == pytest.approx(0.18)
    assert found.lines()[-1] == 'the float engine stays the faster one: set [quantize] precision = "fp16"'


def test_layers_that_one_kernel_hides_are_compared_together():
    """The float engine hides one layer more than the INT8 engine: three layers of which no times can be told apart."""
    kernels = [
        ("stem", "in", "a", "int8>fp32", 0.02),
        ("norm", "a", "b", "fp32>fp32", 0.01),
        ("mix+head", "b", "out", "fp32>fp32", 0.09),
    ]
    floats = [("stem", "in", "a", "fp16>fp16", 0.02), ("norm+mix+head", "a", "out", "fp16>fp32", 0.06)]
    asked = {"stem": "int8", "norm": "fp16", "mix": "int8", "head": "int8"}
    found = blame(receipt(asked, kernels), receipt(dict.fromkeys(asked, "fp16"), floats))
    (slower,) = found.slower
    assert slower.layer == "norm ... head (3 layers in one)"
    assert (slower.ms, slower.float_ms) == (pytest.approx(0.10), pytest.approx(0.06))
    assert found.conversions == ()
    (remedy,) = found.remedies
    assert remedy.layers == ("mix", "head")
    assert remedy.saves_ms == pytest.approx(0.04)


def test_a_conversion_that_a_rule_would_need_is_counted():
    """Its result goes straight into an INT8 layer, which would have to be quantized by a kernel of its own."""
    kernels = [
        ("convert", "in", "q", "fp32>int8", 0.05),
        ("conv1", "q", "a", "int8>int8", 0.10),
        ("conv2", "a", "out", "int8>fp32", 0.05),
    ]
    floats = [("conv1", "in", "a", "fp32>fp16", 0.08), ("conv2", "a", "out", "fp16>fp32", 0.20)]
    names = ("conv1", "conv2")
    quantized, float_ = receipt(dict.fromkeys(names, "int8"), kernels), receipt(dict.fromkeys(names, "fp16"), floats)
    saved = blame(quantized, float_).remedies[0].saves_ms
    assert saved == pytest.approx(0.02 + 0.05 - 0.05)  # the layer, its conversion, the new one


def test_the_largest_gain_comes_first_and_noise_is_no_gain():
    floats = receipt(
        dict.fromkeys(LAYERS, "fp16"),
        [(layer, f"t{i}", f"t{i + 1}", "fp16>fp32", 0.1) for i, layer in enumerate(LAYERS)],
    )
    times = (0.12, 0.1001, 0.3, 0.05)
    # what lies between them goes through float tensors: nothing has to be converted anew
    kernels = [(n, f"t{i}", f"t{i + 1}", "int8>fp16", ms) for i, (n, ms) in enumerate(zip(LAYERS, times, strict=True))]
    found = blame(receipt(dict.fromkeys(LAYERS, "int8"), kernels), floats)
    assert [remedy.layers for remedy in found.remedies] == [("conv2",), ("conv1",)]
    assert [remedy.predicted_ms for remedy in found.remedies] == [pytest.approx(0.3701), pytest.approx(0.3501)]


def test_an_engine_that_is_faster_everywhere_has_no_rules():
    found = blame(quantized(depthwise=0.04), FLOAT)
    assert found.remedies == found.slower == ()
    assert found.predicted_ms == found.ms
    assert found.lines()[-1] == "no rule is expected to make it faster"


def test_the_rules_paste_into_a_config():
    lines = blame(quantized(), FLOAT).lines()
    pasted = "\n".join(line for line in lines if line.startswith("  "))
    assert tomllib.loads(f"rules = [\n{pasted}\n]")["rules"] == [{"name": "depthwise", "precision": "fp16"}]
    assert json.loads(json.dumps(blame(quantized(), FLOAT).as_dict()))["lines"] == lines


def test_engines_that_cannot_be_compared_are_refused():
    with pytest.raises(UsageError, match="INT8 engine were not timed"):
        blame(quantized().with_times({}), FLOAT)
    with pytest.raises(UsageError, match="different models"):
        blame(quantized(), replace(FLOAT, layers=FLOAT.layers[1:]))
    with pytest.raises(UsageError, match="has INT8 layers too: conv1"):
        blame(quantized(), quantized())
    with pytest.raises(UsageError, match=r"for 9\.0 and 8\.9"):
        blame(quantized(), replace(FLOAT, target="8.9"))


class Small(nn.Module):
    input_shape = (3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Conv2d(16, 32, 3, padding=1)
        self.act = nn.Sigmoid()
        self.last = nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x):
        return self.last(self.act(self.body(torch.relu(self.stem(x)))))


def test_kernels_of_a_real_engine_are_connected_by_their_tensors(tmp_path):
    torch.manual_seed(0)
    net = lively(Small())
    plan = planned(net, float="fp16")
    path = exported(calibrated(net, plan), tmp_path / "model.onnx")
    options = BuildOptions(batch=BatchRange(4, 4, 4), compute_capability="8.9")
    info = get_compiler("tensorrt-rtx").build(path, tmp_path / "model.trt", options)
    graph = KernelGraph(receipt_from(plan, layer_precisions(path, names_in(plan)), info, onnx_sha256=""), {})
    around = {name: layers - {NO_LAYER} for name, layers in graph.neighbours().items()}
    assert around == {"stem": {"stem", "body"}, "body": {"stem", "body", "last"}, "last": {"body", "last"}}
