"""Tensors that hold a mask's -inf, -1e9 or the like: the steps of such a range leave nothing of the other values."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, numpy_helper

from maseRT.onnxrt.graph import Graph, attribute

_EXTREME = 1e4
"""Constants from this magnitude on stand for infinity: a step of eight bits would be 39 and more."""
_HANDING_ON = frozenset(
    (
        *("Where", "Add", "Sub", "Mul", "Div", "Neg", "Max", "Min", "Cast", "Identity", "Reshape", "Transpose"),
        *("Squeeze", "Unsqueeze", "Flatten", "Expand", "Tile", "Concat", "Slice", "Split", "Gather", "Pad"),
    )
)
"""Operators whose result holds an extreme value where an operand does. Softmaxes, maxima over a dimension and
activations end it."""


def nodes_at_masks(graph: Graph) -> list[str]:
    """Return the names of the nodes that write or read tensors with such values, those that end them included.

    To be called on a graph whose nodes are in order.
    """
    masked: set[str] = set()
    found = []
    for node in graph.nodes:
        reads = any(name in masked for name in node.input)
        writes = _holds_extreme(node) or (
            node.op_type in _HANDING_ON and (reads or any(_is_extreme(graph, name) for name in node.input))
        )
        if writes:
            masked.update(node.output)
        if reads or writes:
            found.append(node.name)
    return found


def _is_extreme(graph: Graph, name: str) -> bool:
    value = graph.constant(name)
    return value is not None and value.dtype.kind == "f" and bool((np.abs(value) >= _EXTREME).any())


def _holds_extreme(node: NodeProto) -> bool:
    filled = attribute(node, "value") if node.op_type == "ConstantOfShape" else None
    if filled is None:
        return False
    value = numpy_helper.to_array(filled)
    return value.dtype.kind == "f" and bool((np.abs(value) >= _EXTREME).any())
