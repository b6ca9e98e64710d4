"""What is sure about a tensor's values from the graph alone: never negative, never above a bound."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from maseRT.onnxrt.graph import Graph, attribute

_NONNEGATIVE = frozenset(("Relu", "Sigmoid", "HardSigmoid", "Softmax", "Softplus", "Abs", "Exp", "Sqrt"))
_UP_TO_ONE = frozenset(("Sigmoid", "HardSigmoid", "Softmax"))
SHAPE_OPS = frozenset(
    (
        "Reshape",
        "Flatten",
        "Transpose",
        "Squeeze",
        "Unsqueeze",
        "Identity",
        "Slice",
        "Split",
        "Gather",
        "Expand",
        "Tile",
    )
)
"""They hand on values of their first input."""
_KEEPING = frozenset(
    (*SHAPE_OPS, "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceMax", "ReduceMin")
)
"""A bound on their first input holds for their output. (Zeros that an AveragePool pads with stay inside, too.)"""
_QDQ = frozenset(("QuantizeLinear", "DequantizeLinear"))
_ALL_OPERANDS = frozenset(("Add", "Mul", "Concat", "Max", "Min", "ReduceSum", "Sum", "Div"))


def is_nonnegative(graph: Graph, tensor: str) -> bool:
    """Tell whether no input of the model makes any value of a tensor negative."""
    constant = graph.constant(tensor)
    if constant is not None:
        return bool((constant >= 0).all())
    node = graph.producer(tensor)
    if node is None:
        return False
    if node.op_type in _NONNEGATIVE:
        return True
    if node.op_type == "Clip":
        low = clip_limits(graph, node)[0]
        return (low is not None and low >= 0) or (
            is_nonnegative(graph, node.input[0]) and _max_at_least_zero(graph, node)
        )
    if node.op_type in _ALL_OPERANDS:
        operands = node.input[:1] if node.op_type == "ReduceSum" else node.input
        return all(is_nonnegative(graph, name) for name in operands)
    return _keeps_bounds(graph, node) and is_nonnegative(graph, node.input[0])


def upper_bound(graph: Graph, tensor: str) -> float | None:
    """Return a value that a tensor never exceeds, where the graph says one: ReLU6 says 6."""
    node = graph.producer(tensor)
    if node is None:
        return None
    if node.op_type in _UP_TO_ONE:
        return 1.0
    if node.op_type == "Clip":
        return clip_limits(graph, node)[1]
    if _keeps_bounds(graph, node):
        return upper_bound(graph, node.input[0])
    return None


def copies_values(node: NodeProto) -> bool:
    """Tell whether a node's results are values of its first input as they are: rounding can be done before or after."""
    if node.op_type == "Resize":
        return bool(attribute(node, "mode", b"nearest") == b"nearest")
    return node.op_type in SHAPE_OPS or node.op_type == "MaxPool"


def _keeps_bounds(graph: Graph, node: NodeProto) -> bool:
    """Tell whether zero or a positive bound on a node's first input holds for its output."""
    if node.op_type == "Resize":
        # A cubic one overshoots, and a crop fills in a value of its own.
        mode, placed = attribute(node, "mode", b"nearest"), attribute(node, "coordinate_transformation_mode", b"")
        return mode in (b"nearest", b"linear") and placed != b"tf_crop_and_resize"
    if node.op_type == "Pad":
        value = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(1)
        return value is not None and not value.any()
    return node.op_type in (_KEEPING | _QDQ)


def clip_limits(graph: Graph, node: NodeProto) -> tuple[float | None, float | None]:
    """Return the constant limits of a Clip; None for one that is absent or computed."""
    limits = [graph.constant(name) if name else None for name in [*node.input[1:3], "", ""][:2]]
    low, high = (None if limit is None else float(limit.reshape(())) for limit in limits)
    return low, high


def _max_at_least_zero(graph: Graph, clip: NodeProto) -> bool:
    high = clip_limits(graph, clip)[1]
    return len(clip.input) < 3 or not clip.input[2] or (high is not None and high >= 0)
