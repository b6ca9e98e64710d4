"""SiLU, hard swish, LeakyReLU and squeeze-and-excitation on ONNX Runtime's CPU kernels."""

import numpy as np
import onnx
import pytest
import torch
from exported import Exported
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from maseRT.onnxrt.gates import add_hardsigmoids, is_gate, write_out_hardswishes
from maseRT.onnxrt.graph import Graph
from maseRT.onnxrt.kernels import kernels_of
from maseRT.onnxrt.providers import SessionSettings

SHAPE = (3, 24, 24)


class Excited(nn.Module):
    """Scales channels by a gate that a few small convolutions compute from their means."""

    def __init__(self, channels, gate):
        super().__init__()
        self.reduce, self.expand, self.gate = nn.Conv2d(channels, 8, 1), nn.Conv2d(8, channels, 1), gate

    def forward(self, x):
        return x * self.gate(self.expand(torch.relu(self.reduce(x.mean((2, 3), keepdim=True)))))


class Block(nn.Module):
    def __init__(self, channels, act, gate):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 48, 1, bias=False),
            nn.BatchNorm2d(48),
            act(),
            nn.Conv2d(48, 48, 3, padding=1, groups=48, bias=False),
            nn.BatchNorm2d(48),
            act(),
            Excited(48, gate()),
            nn.Conv2d(48, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x):
        return x + self.body(x)


class Net(nn.Module):
    def __init__(self, act, gate):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(24), act())
        self.blocks = nn.Sequential(Block(24, act, gate), Block(24, act, gate))
        self.head = nn.Linear(24, 10)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


CASES = {
    "silu": (nn.SiLU, nn.Sigmoid),
    "hardswish": (nn.Hardswish, nn.Hardsigmoid),
    "leaky": (nn.LeakyReLU, nn.Sigmoid),
}


@pytest.fixture(scope="module", params=list(CASES))
def exported(request, tmp_path_factory):
    torch.manual_seed(0)
    return Exported(tmp_path_factory.mktemp(request.param), Net(*CASES[request.param]).eval(), SHAPE)


def error(found, expected):
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_activations_and_gates_run_in_integers(exported):
    kernels = kernels_of(exported.cpu()[0], "cpu", SessionSettings(threads=1))
    found = kernels.operators
    assert kernels.integer_convolutions == 7
    products = [node for node in exported.onnx.graph.node if node.op_type in ("Mul", "HardSwish")]
    assert found["QLinearMul"] == len(products)
    assert not found.keys() & {"Mul", "Add", "LeakyRelu", "HardSwish", "GlobalAveragePool"}
    assert found.get("Sigmoid", 0) + found.get("HardSigmoid", 0) <= 2  # of the small gates, which are computed in float


def test_the_form_is_as_exact_as_the_quantized_model(exported):
    found = exported.infer(exported.cpu()[0])
    assert error(found, exported.float) < 1.3 * error(exported.quantized, exported.float) + 0.002


def test_the_openvino_form_leaves_them_to_openvino(exported):
    graph = Graph(onnx.load(exported.openvino()[0]))
    gates = [node for node in graph.nodes if node.op_type in ("Sigmoid", "HardSigmoid", "HardSwish", "LeakyRelu")]
    assert gates
    assert not any(
        reader.op_type == "QuantizeLinear" and node.op_type in ("Sigmoid", "HardSigmoid")
        for node in gates
        for reader in graph.readers(node.output[0])
    )


def _graph(nodes, *constants, output="y"):
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 5]) for name in ("x", output)]
    inits = [numpy_helper.from_array(np.array(value), name) for name, value in constants]
    return Graph(helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:], inits)))


def _rounded_hardsigmoid(step, dtype=np.uint8, beta=0.5):
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("HardSigmoid", ["d"], ["h"], alpha=1 / 6, beta=beta),
        helper.make_node("QuantizeLinear", ["h", "t", "w"], ["r"]),
        helper.make_node("DequantizeLinear", ["r", "t", "w"], ["y"]),
    ]
    constants = ("s", np.float32(0.04)), ("z", np.uint8(128)), ("t", np.float32(step)), ("w", dtype(0))
    return _graph(nodes, *constants)


def _run(graph, x):
    import onnxruntime

    model = graph.finish()
    model.opset_import[0].version, model.ir_version = 20, 10
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("step", [1 / 255, 0.6 / 255])
def test_a_hard_sigmoid_as_an_addition_rounds_to_the_same_steps(step):
    x = np.linspace(-5, 5, 10, dtype=np.float32).reshape(2, 5)
    graph = _rounded_hardsigmoid(step)
    assert add_hardsigmoids(graph) == 1
    assert [node.op_type for node in graph.nodes].count("HardSigmoid") == 0
    np.testing.assert_allclose(_run(graph, x), _run(_rounded_hardsigmoid(step), x), atol=1.01 * step)


@pytest.mark.parametrize(
    "options", [{"step": 2 / 255}, {"step": 1 / 255, "beta": 0.4}, {"step": 1 / 255, "dtype": np.int8}]
)
def test_one_that_rounding_does_not_clip_stays(options):
    assert add_hardsigmoids(_rounded_hardsigmoid(**options)) == 0


def test_hard_swish_is_written_out():
    x = np.linspace(-5, 5, 10, dtype=np.float32).reshape(2, 5)
    graph = _graph([helper.make_node("HardSwish", ["x"], ["y"])])
    assert write_out_hardswishes(graph) == 1
    assert [node.op_type for node in graph.nodes] == ["HardSigmoid", "Mul"]
    np.testing.assert_allclose(_run(graph, x), x * np.clip(x / 6 + 0.5, 0, 1), rtol=1e-6)


def test_a_sigmoid_that_something_else_reads_is_no_gate():
    gate = helper.make_node("Sigmoid", ["x"], ["s"])
    both = [gate, helper.make_node("Mul", ["x", "s"], ["m"]), helper.make_node("Add", ["m", "s"], ["y"])]
    graph = _graph(both)
    assert not is_gate(graph, graph.nodes[0], lambda name: True)
    graph = _graph([gate, helper.make_node("Mul", ["x", "s"], ["y"])])
    assert is_gate(graph, graph.nodes[0], lambda name: name == "x")
    assert not is_gate(graph, graph.nodes[0], lambda name: False)
