"""What makes an INT8 engine slower than a float one, on engines written by hand and on two that tensorrt-rtx builds."""

import json
import tomllib
from dataclasses import replace

import pytest
import torch
from blame_engines import real, receipt
from placement_nets import calibrated, exported, lively, planned
from torch import nn

from maseRT.blame.compare import blame
from maseRT.blame.kernels import NO_LAYER, KernelGraph
from maseRT.errors import UsageError
from maseRT.onnx_graph import layer_precisions
from maseRT.receipt import names_in, receipt_from
from maseRT.runtimes import get_compiler
from maseRT.runtimes.base import BatchRange, BuildOptions

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
    assert remedy.saves_ms == pytest.approx(0.12 + 0.03)  # what it reads is not converted; what it writes is quantized
    assert found.predicted_ms == found.advised_ms == pytest.approx(0.25)


def test_conversions_tell_what_they_lie_between():
    found = blame(quantized(first=0.1), FLOAT)
    told = [(c.before, c.after, c.reads, c.writes, c.ms) for c in found.conversions]
    assert told[0] == ((), ("conv1",), ("fp32",), ("int8",), 0.1)
    assert told[1][:2] == (("conv1",), ("depthwise",))
    assert [c[-1] for c in told] == [0.1, 0.03, 0.03]


def test_layers_that_only_pay_together_are_proposed_together():
    """Alone, neither is worth it: the other one would keep the change of layout between them."""
    kernels = [
        ("conv1", "in", "a", "int8>fp16", 0.05),
        ("convert", "a", "a2", "fp16>fp16", 0.20),
        ("conv2", "a2", "out", "fp16>fp32", 0.05),
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


def unconnected(times, float_ms=0.1):
    """Return an INT8 and a float engine of layers between which all tensors are float: nothing is converted."""
    names = [f"l{i}" for i in range(len(times))]
    engines = []
    for precision, each_ms in (("int8", times), ("fp16", [float_ms] * len(times))):
        kernels = [
            (n, f"t{i}", f"t{i + 1}", "fp16>fp16", ms) for i, (n, ms) in enumerate(zip(names, each_ms, strict=True))
        ]
        engines.append(receipt(dict.fromkeys(names, precision), kernels))
    return engines


def test_the_largest_gain_comes_first_and_small_ones_are_no_gain():
    found = blame(*unconnected((0.14, 0.1001, 0.3, 0.05, 0.105)))
    assert [remedy.layers for remedy in found.remedies] == [("l2",), ("l0",)]
    assert [remedy.predicted_ms for remedy in found.remedies] == [pytest.approx(0.4951), pytest.approx(0.4551)]
    assert [remedy.int8_left for remedy in found.remedies] == [4, 3]


def test_small_gains_are_proposed_where_they_add_up():
    """Each of them is 1.7 % of the time; three of them are 5 %."""
    times = [0.12, 0.12, 0.12, *[0.07] * 11]
    found = blame(*unconnected(times))
    (remedy,) = found.remedies
    assert remedy.layers == ("l0", "l1", "l2")
    assert blame(*unconnected([0.1, *times[1:]])).remedies == ()


def test_many_small_gains_are_worth_a_rule_that_has_them_all():
    """No layer saves 0.4 % of the time; one that no pattern of theirs selects is not worth a line of its own."""
    names = [f"blocks.{n}.{part}" for n in range(30) for part in ("depthwise", "pointwise")] + ["head"]
    slow = {name: 0.012 for name in names if "depth" in name} | {"head": 0.012}
    engines = []
    for precision, times in (("int8", slow), ("fp16", {})):
        kernels = [(n, f"t{i}", f"t{i + 1}", "fp16>fp16", times.get(n, 0.01)) for i, n in enumerate(names)]
        kernels.append(("", f"t{len(names)}", "out", "fp16>fp16", 0.1))
        engines.append(receipt(dict.fromkeys(names, precision), kernels))
    (remedy,) = blame(*engines).remedies
    assert remedy.rules == ('{ name = "blocks.*.depthwise", type = "Conv2d", precision = "fp16" },',)
    assert remedy.saves_ms == pytest.approx(30 * 0.002)


def test_times_that_a_profiler_does_not_tell_apart_are_equal():
    found = blame(*unconnected((0.0068, 0.0061, 0.0088), float_ms=0.006))
    assert [each.layer for each in found.slower] == ["l2"]


def test_engines_that_are_nearly_as_fast_are_not_ranked():
    found = blame(*unconnected((0.1005, 0.1005)))
    assert not found.prefers_float
    assert found.lines()[-1] == "no rule is expected to make it faster"


def test_an_engine_that_is_faster_everywhere_has_no_rules():
    found = blame(quantized(depthwise=0.04), FLOAT)
    assert found.remedies == found.slower == ()
    assert found.predicted_ms == found.ms
    assert found.lines()[-1] == "no rule is expected to make it faster"


def test_the_rules_paste_into_a_config():
    lines = blame(quantized(), FLOAT).lines()
    pasted = "\n".join(line for line in lines if line.startswith("  "))
    assert tomllib.loads(f"rules = [\n{pasted}\n]")["rules"] == [{"name": "depthwise", "precision": "fp16"}]
    told = json.loads(json.dumps(blame(quantized(), FLOAT).as_dict()))
    assert told["lines"] == lines
    assert (told["rules"], told["prefers_float"]) == ([pasted.partition("  #")[0].strip()], False)


def test_the_float_engine_is_advised_alone_where_no_rule_makes_up_for_it():
    """A rule for each layer would only make a float engine of it."""
    found = blame(*unconnected((0.3,)))
    assert (found.advised, found.rules, found.advised_ms) == ((), (), found.ms)
    assert found.lines()[-1] == 'the float engine stays the faster one: set [quantize] precision = "fp16"'
    assert not any("rules" in line for line in found.lines())
    (remedy,) = found.as_dict()["remedies"]
    assert remedy["layers"] == ("l0",)


def test_of_a_real_engine_the_first_convolution_comes_first():
    """Its FP16 form needs neither the quantization of the model's input nor the change of its layout."""
    quantized, float_ = real("mobilenetv3.json")
    found = blame(quantized, float_)
    first = found.remedies[0]
    assert first.layers == ("features.0.0",)
    gone, new = 0.0258 + 0.1259 + 0.1036, 0.0465 + 0.0257
    assert first.saves_ms == pytest.approx(gone - new)
    assert found.lines()[-3:] == [
        'the float engine stays the faster one: set [quantize] precision = "fp16"',
        f"to stay with INT8, put this first into [quantize] rules, for an expected {found.ms - gone + new:.4f} ms:",
        '  { name = "features.0.0", precision = "fp16" },  # saves 0.1831 ms',
    ]


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
