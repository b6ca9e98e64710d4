"""Rewrites for TensorRT 8.6's parser: what is left in the graph, and that results stay."""

import numpy as np
import pytest
from onnx import helper, numpy_helper
from onnx_models import X, model_of, run

from maseRT.onnx_compat import attribute_axes, for_tensorrt_8


def ops(model):
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("axes", [[2, 3], [-1, -2], [3, -2]])
def test_a_mean_over_an_image_is_a_pool(axes):
    model = model_of([("ReduceMean", ["input", "axes"], "output", {"keepdims": 1})], {"axes": np.int64(axes)})
    before = run(model)
    for_tensorrt_8(model)
    assert ops(model) == ["GlobalAveragePool"]
    assert not model.graph.initializer
    np.testing.assert_allclose(run(model), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("axes", "keepdims", "shape"),
    [([2, 3], 0, ("n", 3, 4, 4)), ([1, 2, 3], 1, ("n", 3, 4, 4)), ([3], 1, ("n", 3, 4, 4)), ([1], 1, ("n", 4))],
)
def test_other_means_are_no_pools(axes, keepdims, shape):
    nodes = [("ReduceMean", ["input", "axes"], "output", {"keepdims": keepdims})]
    model = model_of(nodes, {"axes": np.int64(axes)}, shape=shape)
    for_tensorrt_8(model)
    assert ops(model) == ["ReduceMean"]


CLIPS = np.random.default_rng(2).normal(size=(2, 3, 5, 6, 7)).astype(np.float32)
SHAPE = ("batch", 3, 5, 6, 7)


def max_pooled(pool, *, shape=SHAPE):
    """Return a model: a Q/DQ pair and a max pool."""
    nodes = [
        ("QuantizeLinear", ["input", "scale", "zero"], "q", {}),
        ("DequantizeLinear", ["q", "scale", "zero"], "dq", {}),
        ("MaxPool", ["dq"], "output", pool),
    ]
    return model_of(nodes, {"scale": np.float32(0.02), "zero": np.int8(0)}, shape=shape)


@pytest.mark.parametrize(
    "pool",
    [
        {"kernel_shape": [2, 2, 2], "strides": [2, 2, 2]},
        {"kernel_shape": [1, 3, 2], "strides": [1, 2, 1], "pads": [0, 1, 0, 0, 1, 1]},
        {"kernel_shape": [3, 2, 1], "strides": [2, 3, 4], "pads": [1, 0, 0, 0, 1, 0], "ceil_mode": 1},
        {"kernel_shape": [2, 3, 4]},
    ],
)
def test_a_3d_max_pool_of_a_quantized_model_is_two_2d_ones(pool):
    model = max_pooled(pool)
    before = run(model, CLIPS)
    for_tensorrt_8(model)
    pools = [node for node in model.graph.node if node.op_type == "MaxPool"]
    kernels = [list(each.ints) for node in pools for each in node.attribute if each.name == "kernel_shape"]
    assert kernels == [pool["kernel_shape"][1:], [pool["kernel_shape"][0], 1]]
    assert model.graph.node[-1].name == "node_output"
    np.testing.assert_array_equal(run(model, CLIPS), before)


def test_other_max_pools_stay():
    pool = {"kernel_shape": [2, 2, 2]}
    for model in (
        model_of([("MaxPool", ["input"], "output", pool)], shape=SHAPE),  # nothing is quantized
        max_pooled(pool, shape=("batch", 3, 5, "height", 7)),
        max_pooled({"kernel_shape": [2, 2, 2], "dilations": [1, 2, 1]}),
        max_pooled({"kernel_shape": [2, 2]}, shape=("batch", 3, 6, 7)),
    ):
        before = ops(model)
        for_tensorrt_8(model)
        assert ops(model) == before


@pytest.mark.parametrize("what", ["Mean", "Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare"])
@pytest.mark.parametrize("constant", ["initializer", "node"])
def test_axes_become_the_attribute_of_older_opsets(what, constant):
    nodes = [(f"Reduce{what}", ["input", "axes"], "output", {"keepdims": 0})]
    constants = {"axes": np.int64([1, -1])}
    if constant == "node":
        nodes.insert(0, ("Constant", [], "axes", {"value": numpy_helper.from_array(constants.pop("axes"))}))
    model = model_of(nodes, constants)
    before = run(model, abs(X))
    attribute_axes(model.graph)
    (node,) = model.graph.node
    assert list(node.input) == ["input"]
    assert {each.name: helper.get_attribute_value(each) for each in node.attribute} == {"keepdims": 0, "axes": [1, -1]}
    assert not model.graph.initializer
    # With opset 17 the node says the same as before.
    model.opset_import[0].version = 17
    np.testing.assert_allclose(run(model, abs(X)), before, rtol=1e-5)


def test_reductions_that_older_opsets_cannot_say_stay():
    computed = [("Identity", ["given"], "axes", {}), ("ReduceMax", ["input", "axes"], "output", {})]
    each = [("ReduceSumSquare", ["input"], "output", {"noop_with_empty_axes": 1})]
    total = [("ReduceSum", ["input", "given"], "output", {})]
    for nodes in (computed, each, total):
        model = model_of(nodes, {"given": np.int64([1])})
        before = [node.SerializeToString() for node in model.graph.node]
        attribute_axes(model.graph)
        assert [node.SerializeToString() for node in model.graph.node] == before


def test_all_axes_need_no_attribute():
    model = model_of([("ReduceMax", ["input"], "output", {"noop_with_empty_axes": 0, "keepdims": 0})])
    attribute_axes(model.graph)
    assert [each.name for each in model.graph.node[0].attribute] == ["keepdims"]


def test_parts_of_shapes_are_cut_by_slices():
    model = model_of([("Shape", ["input"], "size", {"start": 1, "end": 3}), ("Cast", ["size"], "output", {"to": 1})])
    before = run(model)
    for_tensorrt_8(model)
    assert ops(model) == ["Shape", "Slice", "Cast"]
    assert not model.graph.node[0].attribute
    np.testing.assert_array_equal(run(model), before)


def test_zero_states_of_recurrent_nodes_are_left_out():
    rng = np.random.default_rng(2)
    constants = {
        "w": rng.normal(size=(1, 8, 4)).astype(np.float32),
        "r": rng.normal(size=(1, 8, 2)).astype(np.float32),
        "b": rng.normal(size=(1, 16)).astype(np.float32),
        "size": np.int64([1, 4, 2]),
        "state": rng.normal(size=(1, 4, 2)).astype(np.float32),
    }
    zeros = ("ConstantOfShape", ["size"], "zeros", {})
    for states, left in ((["zeros", "zeros"], 4), (["zeros", "state"], 7)):
        lstm = ("LSTM", ["input", "w", "r", "b", "", *states], "output", {"hidden_size": 2})
        model = model_of([zeros, lstm], constants, shape=(3, 4, 4))
        x = X[0]
        before = run(model, x)
        for_tensorrt_8(model)
        assert len(model.graph.node[-1].input) == left
        assert ops(model) == ["LSTM"]
        np.testing.assert_array_equal(run(model, x), before)
