"""FP16 models as FP32 ones: what is left in the graph, and that results stay."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx_models import X, model_of, run

from maseRT.onnx_widen import widen


def quantized_half():
    """An FP16 network: a quantized MatMul, an FP32 island, constants as initializers and nodes."""
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(4, 4)).astype(np.float16)
    half = TensorProto.FLOAT16
    shift = numpy_helper.from_array(np.float16([0.25]))
    return model_of(
        [
            ("Cast", ["input"], "x", {"to": half}),
            ("QuantizeLinear", ["x", "scale", "zero"], "q", {}),
            ("DequantizeLinear", ["q", "scale", "zero"], "dq", {}),
            ("MatMul", ["dq", "weight"], "y", {}),
            ("Constant", [], "shift", {"value": shift}),
            ("Add", ["y", "shift"], "y2", {}),
            ("Cast", ["y2"], "wide", {"to": TensorProto.FLOAT}),
            ("Softmax", ["wide"], "soft", {"axis": -1}),
            ("Cast", ["soft"], "narrow", {"to": half}),
            ("Shape", ["narrow"], "size", {}),
            ("Cast", ["size"], "sizes", {"to": half}),
            ("Mul", ["narrow", "sizes"], "scaled", {}),
            ("Cast", ["scaled"], "output", {"to": TensorProto.FLOAT}),
        ],
        {"weight": weight, "scale": np.float16(0.0201), "zero": np.int8(0)},
    )


def test_a_widened_model_computes_the_same_but_for_roundings_to_half():
    model = quantized_half()
    before = run(model)
    widen(model)
    after = run(model)
    assert after.dtype == np.float32
    np.testing.assert_allclose(after, before, rtol=4e-3, atol=4e-3)


def test_nothing_of_a_widened_model_is_half():
    model = quantized_half()
    widen(model)
    inferred = onnx.shape_inference.infer_shapes(model).graph
    kinds = {value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.output)}
    kinds |= {tensor.data_type for tensor in inferred.initializer}
    assert TensorProto.FLOAT16 not in kinds
    assert not model.graph.value_info
    scale = next(tensor for tensor in model.graph.initializer if tensor.name == "scale")
    assert scale.data_type == TensorProto.FLOAT
    assert numpy_helper.to_array(scale) == np.float16(0.0201)


def test_only_casts_that_change_more_than_the_width_stay():
    model = quantized_half()
    widen(model)
    (cast,) = (node for node in model.graph.node if node.op_type == "Cast")
    assert cast.name == "node_sizes"
    assert cast.attribute[0].i == TensorProto.FLOAT
    assert model.graph.node[-1].op_type == "Identity"  # the output keeps its name
    assert model.graph.node[0].input[0] == "input"


def test_half_inputs_and_outputs_are_widened():
    model = model_of([("Relu", ["input"], "output", {})], kind=TensorProto.FLOAT16)
    widen(model)
    np.testing.assert_array_equal(run(model), np.maximum(X, 0))


def test_graphs_inside_nodes_are_widened():
    half = TensorProto.FLOAT16
    body = helper.make_graph(
        [
            helper.make_node("Add", ["x", "two"], ["sum"], name="sum"),
            helper.make_node("Cast", ["sum"], ["inner"], name="inner", to=TensorProto.FLOAT),
        ],
        "body",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.float16(2), "two")],
    )
    model = model_of(
        [
            ("Cast", ["input"], "x", {"to": half}),
            ("If", ["yes"], "output", {"then_branch": body, "else_branch": body}),
        ],
        {"yes": np.array(True)},
    )
    widen(model)
    np.testing.assert_array_equal(run(model), X + 2)
