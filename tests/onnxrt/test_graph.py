"""Edits of a graph, bounds of its tensors, and the arithmetic of quantized weights."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from maseRT.onnxrt.bounds import is_nonnegative, upper_bound
from maseRT.onnxrt.graph import Graph
from maseRT.onnxrt.kernels import count_kernels
from maseRT.onnxrt.unsigned import unsigned_parameters, unsigned_step
from maseRT.onnxrt.weights import dequantize, quantize


def model_of(nodes, constants=None, *, shape=("N", 4)):
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()]
    graph = helper.make_graph(
        [
            helper.make_node(*node[:3], name=f"node_{index}", **(node[3] if len(node) > 3 else {}))
            for index, node in enumerate(nodes)
        ],
        "graph",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


ZERO, SIX, MINUS = np.float32(0), np.float32(6), np.float32(-1)


@pytest.mark.parametrize(
    ("nodes", "constants", "expected"),
    [
        ([("Relu", ["input"], ["output"])], {}, True),
        ([("Identity", ["input"], ["output"])], {}, False),
        ([("Clip", ["input", "low", "high"], ["output"])], {"low": ZERO, "high": SIX}, True),
        ([("Clip", ["input", "low", "high"], ["output"])], {"low": MINUS, "high": SIX}, False),
        ([("Clip", ["input", "", "high"], ["output"])], {"high": SIX}, False),
        ([("Relu", ["input"], ["a"]), ("Clip", ["a", "", "high"], ["output"])], {"high": SIX}, True),
        ([("Relu", ["input"], ["a"]), ("Clip", ["a", "", "high"], ["output"])], {"high": MINUS}, False),
        ([("Relu", ["input"], ["a"]), ("Add", ["a", "c"], ["output"])], {"c": SIX}, True),
        ([("Relu", ["input"], ["a"]), ("Add", ["a", "c"], ["output"])], {"c": MINUS}, False),
        ([("Relu", ["input"], ["a"]), ("Add", ["a", "input"], ["output"])], {}, False),
        ([("Relu", ["input"], ["a"]), ("Sub", ["a", "a"], ["output"])], {}, False),
        ([("Sigmoid", ["input"], ["a"]), ("Reshape", ["a", "s"], ["output"])], {"s": np.array([-1])}, True),
        ([("Softmax", ["input"], ["a"]), ("Concat", ["a", "input"], ["output"], {"axis": 1})], {}, False),
        ([("Relu", ["input"], ["a"]), ("Neg", ["a"], ["output"])], {}, False),
    ],
)
def test_only_what_is_sure_is_nonnegative(nodes, constants, expected):
    assert is_nonnegative(Graph(model_of(nodes, constants)), "output") is expected


def test_bounds_pass_through_what_keeps_them():
    nodes = [("Clip", ["input", "low", "high"], ["a"]), ("Reshape", ["a", "s"], ["output"])]
    assert upper_bound(Graph(model_of(nodes, {"low": ZERO, "high": SIX, "s": np.array([-1])})), "output") == 6
    assert upper_bound(Graph(model_of([("Relu", ["input"], ["output"])])), "output") is None


@pytest.mark.parametrize("amax", [0.5, 5.99, 6.0, np.nextafter(np.float32(6), np.float32(7)), 123.4])
def test_an_unsigned_range_never_ends_above_its_bound(amax):
    step = unsigned_step(float(amax), 6.0)
    assert step * np.float32(255) <= np.float32(6)
    assert step * 255 == pytest.approx(min(amax, 6), rel=1e-6)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.5, 2.0), (-3.0, -1.0), (-1e-9, 1.0), (0.0, 0.0)])
def test_a_measured_range_holds_zero_and_its_ends(low, high):
    step, zero = unsigned_parameters(low, high, nonnegative=False, bound=None)
    assert 0 <= zero <= 255
    assert step > 0
    assert -zero * step <= low + step / 2 + 1e-12
    assert (255 - zero) * step >= high - step / 2 - 1e-12


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_stored_weights_are_what_onnxruntime_would_compute(axis):
    import onnxruntime

    generator = np.random.default_rng(0)
    weight = generator.normal(size=(5, 5)).astype(np.float32)
    weight[0, 0], weight[1, 1] = 0.5, 1.5  # halves round to even
    scale = np.full(5, 1.0, np.float32) if axis == 0 else generator.uniform(0.01, 0.02, 5).astype(np.float32)
    zero = np.zeros(5, np.int8)
    nodes = [
        ("QuantizeLinear", ["input", "scale", "zero"], ["q"], {"axis": axis}),
        ("DequantizeLinear", ["q", "scale", "zero"], ["output"], {"axis": axis}),
    ]
    model = model_of(nodes, {"scale": scale, "zero": zero}, shape=(5, 5))
    model.graph.output.append(helper.make_tensor_value_info("q", TensorProto.INT8, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected, expected_q = session.run(["output", "q"], {"input": weight})
    quantized = quantize(weight, scale, zero, axis=axis)
    np.testing.assert_array_equal(quantized, expected_q)
    np.testing.assert_array_equal(dequantize(quantized, scale, zero, axis=axis), expected)


def test_edits_leave_a_sorted_graph_without_dead_parts():
    nodes = [("Relu", ["input"], ["a"]), ("Neg", ["input"], ["dead"]), ("Add", ["a", "c"], ["output"])]
    model = model_of(nodes, {"c": SIX, "unread": SIX})
    graph = Graph(model)
    graph.redirect("a", "b", graph.readers("a"))
    graph.add_node("Abs", ["a"], "b")
    assert [node.op_type for node in graph.readers("a")] == ["Abs"]
    result = graph.finish()
    assert [node.op_type for node in result.graph.node] == ["Relu", "Abs", "Add"]
    assert [tensor.name for tensor in result.graph.initializer] == ["c"]


def test_a_reader_inside_a_branch_counts():
    inner = helper.make_graph(
        [helper.make_node("Neg", ["a"], ["y"])],
        "branch",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    nodes = [("Relu", ["input"], ["a"]), ("If", ["c"], ["output"], {"then_branch": inner, "else_branch": inner})]
    graph = Graph(model_of(nodes, {"c": np.array(True)}))
    assert [node.op_type for node in graph.readers("a")] == ["If"]
    assert [node.op_type for node in graph.finish().graph.node] == ["Relu", "If"]


def test_fresh_names_are_new():
    graph = Graph(model_of([("Relu", ["input"], ["output"])], {"c": SIX}))
    assert graph.fresh("c") != "c"
    assert graph.fresh("d") != graph.fresh("d")
    assert graph.shared_constant("six", np.array(6, np.float32)) == graph.shared_constant(
        "six", np.array(6, np.float32)
    )
    assert graph.shared_constant("six", np.array(7, np.float32)) != "six"


def test_kernels_are_counted_by_kind():
    names = [
        "QLinearConv",
        "Conv",
        "FusedConv",
        "MatMulIntegerToFloat",
        "LSTM",
        "MemcpyToHost",
        "QuantizeLinear",
        "Relu",
    ]
    model = onnx.ModelProto()
    model.graph.node.extend(helper.make_node(name, [], []) for name in names)
    kernels = count_kernels(model)
    counts = kernels.as_dict()
    assert [counts[key] for key in ("integer_convolutions", "float_convolutions", "integer_products")] == [1, 2, 1]
    assert [counts[key] for key in ("float_products", "copies", "conversions", "batchnorms")] == [1, 1, 1, 0]
    assert "1 copies between host and device" in kernels.describe()
