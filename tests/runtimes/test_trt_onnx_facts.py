import numpy as np
import pytest

from maseRT.runtimes.base import TensorSpec
from maseRT.runtimes.trt.onnx_facts import lower_opset, read_onnx


@pytest.fixture(scope="module")
def facts(mixed_onnx):
    return read_onnx(mixed_onnx)


def test_what_is_read_from_a_mixed_export(facts):
    assert facts.opset == 20
    assert facts.inputs == (TensorSpec("input", "float32", (None, 1, 8, 8)),)
    assert facts.has_qdq
    assert facts.floats == {"float32", "float16"}


def test_nodes_know_their_torch_layer(facts):
    by_layer = {layer: facts.ops[node] for node, layer in facts.layers.items()}
    assert by_layer["stem.input_quantizer"] == "DequantizeLinear"
    assert by_layer["stem"] == by_layer["full"] == "Conv"
    assert by_layer["pool"] == "MaxPool"
    assert facts.layers["node_relu"] == ""


def test_only_nodes_that_quantization_leaves_alone_have_types_of_their_own(facts):
    """A node beside a Q or DQ, or an activation right behind one, must stay free to fuse into an INT8 kernel."""
    types = {facts.layers[node] or node: kind for node, kind in facts.float_nodes().items()}
    assert types["full"] == types["pool"] == types["head"] == "float32"
    halved = {
        kind
        for node, kind in facts.float_nodes().items()
        if facts.layers[node] == "halved" and facts.ops[node] == "Conv"
    }
    assert halved == {"float16"}
    assert not {"stem", "body", "node_relu", "node_relu_1", "node_add_24"} & set(types)
    quantized = {node for node, op in facts.ops.items() if op in ("QuantizeLinear", "DequantizeLinear", "Add")}
    assert not quantized & set(facts.float_nodes())


def test_for_tensorrt_8_types_are_remembered_instead_of_written(facts):
    import onnx

    rewritten = facts.for_tensorrt_8()
    assert rewritten.sha256 == facts.sha256
    assert rewritten.floats == facts.floats
    assert not any(node.op_type == "Cast" for node in rewritten.model.graph.node)
    inferred = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(rewritten.data)).graph
    kinds = {value.type.tensor_type.elem_type for value in inferred.value_info}
    kinds |= {tensor.data_type for tensor in inferred.initializer}
    assert onnx.TensorProto.FLOAT16 not in kinds
    types = {facts.layers[node]: kind for node, kind in rewritten.float_nodes().items()}
    assert types["halved"] == "float16"
    assert types["full"] == types["pool"] == types["head"] == "float32"
    assert not {"stem", "body"} & set(types)
    assert any(node.op_type == "Cast" for node in facts.model.graph.node), "the file itself must stay"


def test_a_whole_chain_around_qdq_stays_free(onnx_file):
    """Until the next operator that computes with weights of its own."""
    scale = np.float32(0.1), np.int8(0)
    nodes = [
        ("QuantizeLinear", ["input", "s", "z"], "q", "stem.input_quantizer", {}),
        ("DequantizeLinear", ["q", "s", "z"], "dq", "stem.input_quantizer", {}),
        ("MatMul", ["dq", "w"], "mm", "stem", {}),
        ("Add", ["mm", "b"], "biased", "stem", {}),
        ("Relu", ["biased"], "act", "act", {}),
        ("Reshape", ["act", "size"], "flat", "", {}),
        ("MatMul", ["flat", "w"], "float", "body", {}),
        ("Softmax", ["float"], "soft", "soft", {}),
        ("Mul", ["soft", "b"], "scaled", "", {}),
        ("QuantizeLinear", ["scaled", "s", "z"], "q2", "head.input_quantizer", {}),
        ("DequantizeLinear", ["q2", "s", "z"], "output", "head.input_quantizer", {}),
    ]
    constants = {
        "s": scale[0],
        "z": scale[1],
        "w": np.ones((4, 4), np.float32),
        "b": np.ones(4, np.float32),
        "size": np.int64([-1, 4]),
    }
    assert set(read_onnx(onnx_file(nodes, constants=constants)).float_nodes()) == {"node_float", "node_soft"}


def test_a_float_model_has_no_quantization(linear_onnx):
    facts = read_onnx(linear_onnx)
    assert not facts.has_qdq
    assert facts.floats == {"float32"}
    assert facts.float_nodes() == {"node_x": "float32", "node_output": "float32"}


@pytest.mark.parametrize(
    ("op", "opset", "lower"), [("Gelu", 20, 19), ("Relu", 20, None), ("Gelu", 21, 19), ("Nope", 20, None)]
)
def test_the_opset_that_writes_an_operator_otherwise(onnx_file, op, opset, lower):
    facts = read_onnx(onnx_file([("Relu", ["input"], "output", "act", {})], opset=opset))
    assert lower_opset(facts, op, lowest=19) == lower


def test_initializers_among_the_inputs_are_no_inputs(onnx_file):
    import onnx
    from onnx import TensorProto, helper

    path = onnx_file([("MatMul", ["input", "w"], "output", "head", {})], constants={"w": np.ones((4, 3), np.float32)})
    model = onnx.load(path)
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 3]))
    onnx.save(model, path)
    assert [spec.name for spec in read_onnx(path).inputs] == ["input"]
