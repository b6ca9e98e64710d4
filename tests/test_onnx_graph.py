"""Reading exported files: facts, Q/DQ pairs, precisions per torch layer."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from placement_nets import Encoder, SequenceNet, calibrated, exported, lively, planned

from maseRT.errors import StepError
from maseRT.onnx_graph import SCOPES, ExportedLayer, count_qdq, layer_precisions

N = 4


def node(op: str, inputs: list[str], output: str, scope: str, **attributes: object) -> onnx.NodeProto:
    made = helper.make_node(op, inputs, [output], name=output, **attributes)
    scopes = ["", *([scope] if scope else []), output]
    made.metadata_props.add(key=SCOPES, value=str(scopes))
    return made


def quantized(tensor: str, scope: str, scale: str = "scale") -> list[onnx.NodeProto]:
    return [
        node("QuantizeLinear", [tensor, scale, "zero"], f"{tensor}_q", f"{scope}_quantizer"),
        node("DequantizeLinear", [f"{tensor}_q", scale, "zero"], f"{tensor}_dq", f"{scope}_quantizer"),
    ]


def save(path: Path, nodes: list[onnx.NodeProto], output: str, *, kind: int = TensorProto.FLOAT) -> Path:
    weights = {
        "w": np.ones((N, N), np.float32),
        "w16": np.ones((N, N), np.float16),
        "scale": np.float32(0.1),
        "scale16": np.float16(0.1),
        "zero": np.int8(0),
        "shape": np.array([-1, N], np.int64),
    }
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", N])],
        [helper.make_tensor_value_info(output, kind, ["batch", N])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


def test_int8_needs_both_operands(tmp_path: Path) -> None:
    both = [*quantized("input", "fc.input"), *quantized("w", "fc.weight")]
    path = save(tmp_path / "m.onnx", [*both, node("MatMul", ["input_dq", "w_dq"], "y", "fc")], "y")
    assert count_qdq(path) == 2
    assert layer_precisions(path) == {"fc": ExportedLayer("int8", "fp32", ("y",), ("y",))}
    half = [*quantized("w", "fc.weight"), node("MatMul", ["input", "w_dq"], "y", "fc")]
    assert layer_precisions(save(path, half, "y"))["fc"].precision == "fp32"


def test_moved_data_stays_quantized(tmp_path: Path) -> None:
    nodes = [
        *quantized("input", "fc.input"),
        *quantized("w", "fc.weight"),
        node("Reshape", ["input_dq", "shape"], "r", "fc"),
        node("Transpose", ["w_dq"], "t", "fc", perm=[1, 0]),
        node("MatMul", ["r", "t"], "y", "fc"),
    ]
    assert layer_precisions(save(tmp_path / "m.onnx", nodes, "y"))["fc"].precision == "int8"


def test_float_types_and_casts(tmp_path: Path) -> None:
    nodes = [
        node("Cast", ["input"], "c", "", to=TensorProto.FLOAT16),
        node("MatMul", ["c", "w16"], "h", "half"),
        node("Relu", ["h"], "a", "act"),
        node("Cast", ["a"], "f", "single", to=TensorProto.FLOAT),
        node("MatMul", ["f", "w"], "y", "single"),
    ]
    found = layer_precisions(save(tmp_path / "m.onnx", nodes, "y"))
    assert {name: layer.precision for name, layer in found.items()} == {"half": "fp16", "act": "fp16", "single": "fp32"}


def test_int8_with_half_scales(tmp_path: Path) -> None:
    nodes = [
        node("Cast", ["input"], "x", "", to=TensorProto.FLOAT16),
        *quantized("x", "fc.input", "scale16"),
        *quantized("w16", "fc.weight", "scale16"),
        node("MatMul", ["x_dq", "w16_dq"], "y", "fc"),
    ]
    found = layer_precisions(save(tmp_path / "m.onnx", nodes, "y", kind=TensorProto.FLOAT16))
    assert (found["fc"].precision, found["fc"].float) == ("int8", "fp16")


def test_layers_without_weights(tmp_path: Path) -> None:
    nodes = [
        *quantized("input", "pool.input"),
        node("Sigmoid", ["input_dq"], "p", "pool"),
        node("Relu", ["p"], "y", "act"),
    ]
    found = layer_precisions(save(tmp_path / "m.onnx", nodes, "y"))
    assert {name: layer.precision for name, layer in found.items()} == {"pool": "int8", "act": "fp32"}


def test_a_layer_of_several_precisions_shows_them_all(tmp_path: Path) -> None:
    nodes = [
        *quantized("input", "cell.input"),
        *quantized("w", "cell.weight"),
        node("MatMul", ["input_dq", "w_dq"], "i", "cell"),
        node("MatMul", ["i", "w"], "y", "cell"),
    ]
    assert layer_precisions(save(tmp_path / "m.onnx", nodes, "y"))["cell"].precision == "fp32+int8"


def test_modules_that_count_as_a_whole(tmp_path: Path) -> None:
    net = lively(Encoder())
    plan = planned(net)
    calibrated(net, plan)
    path = exported(net, tmp_path / "m.onnx")
    found = layer_precisions(path, [layer.name for layer in plan.layers])
    assert found["layers.layers.0.self_attn"].precision == "int8"
    assert found["layers.layers.0.norm1"].precision == "fp32"
    assert set(found) == {layer.name for layer in plan.layers}


def test_recurrent_layers(tmp_path: Path) -> None:
    by_rule = [{"type": "LSTM", "precision": "int8"}]
    # Two directions of nine steps: one product for all inputs of a direction, one per step for its hidden state.
    for rules, expected in ((), ("fp32", 1)), (by_rule, ("int8", 20)):
        net = lively(SequenceNet())
        calibrated(net, planned(net, rules=rules))
        path = exported(net, tmp_path / "m.onnx")
        lstm = layer_precisions(path, ["lstm"])["lstm"]
        products = [
            each
            for each in onnx.load(path).graph.node
            if each.op_type in ("LSTM", "MatMul") and each.name in lstm.nodes
        ]
        assert (lstm.precision, len(products)) == expected


@pytest.mark.parametrize("function", [count_qdq, layer_precisions])
def test_missing_and_damaged_files(function: object, tmp_path: Path) -> None:
    with pytest.raises(StepError, match="no such ONNX file"):
        function(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"not a model at all")
    with pytest.raises(StepError, match="damaged"):
        function(tmp_path / "bad.onnx")
