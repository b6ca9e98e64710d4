"""A tiny ONNX file."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper


@pytest.fixture
def linear_onnx(tmp_path):
    """Relu(x W), x [N, 4]."""
    weight = numpy_helper.from_array(np.arange(12, dtype=np.float32).reshape(4, 3) - 5, "weight")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["input", "weight"], ["y"]), helper.make_node("Relu", ["y"], ["output"])],
        "linear",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 3])],
        [weight],
    )
    path = tmp_path / "linear.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path
