"""Convolutions that ONNX Runtime's CPU provider computes faster in float than in integers."""

from __future__ import annotations

from onnx import NodeProto

from maseRT.onnxrt.graph import Graph, attribute
from maseRT.onnxrt.qdq import is_dequantized, rounding_of, weight_shape

_VOLUME = 5
"""The rank of a 3-D convolution's input."""
_FEWEST_CHANNELS = 12
"""Per group. With 16 the integer kernel is 1.3 times as fast as the float one, with 8 it takes 1.4 times as long, with
one 10 to 25 times (16 to 32 positions a side, 3 x 3 x 3, a CPU with VNNI)."""


def compute_in_float(graph: Graph) -> tuple[str, ...]:
    """Make convolutions that are slower in integers read what the rounding before them reads; returns their results.

    Their weights stay rounded. To be called before pairs are added.
    """
    found = [node for node in graph.nodes if is_dequantized(graph, node.input[0]) and _is_slow(graph, node)]
    for node in found:
        quantize = rounding_of(graph, node.input[0])
        if quantize is not None:
            graph.set_input(node, 0, quantize.input[0])
    return tuple(node.output[0] for node in found)


def _is_slow(graph: Graph, node: NodeProto) -> bool:
    """Tell whether a node is a 3-D convolution of few channels that is not one per channel."""
    weight = None if node.op_type != "Conv" else weight_shape(graph, node.input[1])
    if weight is None or len(weight) != _VOLUME or weight[1] >= _FEWEST_CHANNELS:
        return False
    groups = attribute(node, "group", 1)
    return bool(groups == 1 or weight[1] > 1 or weight[0] != groups)
