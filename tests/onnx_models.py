"""Small ONNX models from lists of nodes, and what ONNX Runtime computes of them without its optimizations."""

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

X = np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32)


def model_of(nodes, constants=None, *, shape=("batch", 3, 4, 4), opset=20, kind=TensorProto.FLOAT):
    """Return a model from `input` to `output`; each node is (operator, inputs, output, attributes)."""
    made = [helper.make_node(op, i, [o], name=f"node_{o}", **attributes) for op, i, o, attributes in nodes]
    graph = helper.make_graph(
        made,
        "g",
        [helper.make_tensor_value_info("input", kind, shape)],
        [helper.make_tensor_value_info("output", kind, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def run(model, x=X):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"input": x})[0]
