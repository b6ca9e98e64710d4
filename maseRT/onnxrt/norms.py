"""BatchNorms that no convolution absorbed, in integers: networks that normalize first, or behind a concatenation.

ONNX Runtime has no integer kernel for BatchNormalization. One between integers costs a DequantizeLinear, a pass in
float, a QuantizeLinear and, since integer convolutions keep channels last, two transpositions. As a convolution of one
weight per channel it is one more kernel of the chain.
"""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from maseRT.onnxrt.graph import Array, Graph, attribute
from maseRT.onnxrt.qdq import is_dequantized, is_rounded

_RANKS = (3, 4)
"""[N, C, L] and [N, C, H, W]: convolutions of integers are slow on more."""
_STEPS = 127


def could_be_convolution(graph: Graph, node: NodeProto) -> bool:
    """Tell whether a node is a BatchNormalization by constants, of a tensor that convolutions are fast on."""
    return (
        node.op_type == "BatchNormalization"
        and graph.rank(node.input[0]) in _RANKS
        and all(graph.constant(name) is not None for name in node.input[1:5])
    )


def write_batchnorms_as_convolutions(graph: Graph) -> int:
    """Write BatchNormalizations between integers as convolutions of integers; returns how many there were.

    Every weight is 127 steps of its own channel, which is exact. To be called when activations have all their pairs, on
    a graph that knows its ranks.
    """
    found = [
        node
        for node in graph.nodes
        if could_be_convolution(graph, node)
        and is_dequantized(graph, node.input[0])
        and is_rounded(graph, node.output[0])
    ]
    for node in found:
        _write(graph, node)
    return len(found)


def _write(graph: Graph, node: NodeProto) -> None:
    scale, shift = _line(graph, node)
    data, output = node.input[0], node.output[0]
    positions = (graph.rank(data) or 0) - 2
    graph.remove(node)
    # A channel that is switched off has weight 0 in whatever steps.
    step = (np.where(scale == 0, 1, np.abs(scale)) / _STEPS).astype(np.float32)
    names = [
        graph.add_constant(
            f"{output}_weight", (np.sign(scale) * _STEPS).astype(np.int8).reshape(-1, *[1] * (positions + 1))
        ),
        graph.add_constant(f"{output}_weight_scale", step),
        graph.add_constant(f"{output}_weight_zero_point", np.zeros(len(step), np.int8)),
    ]
    weight = graph.fresh(f"{output}_weight_dequantized")
    graph.add_node("DequantizeLinear", names, weight, like=node, axis=0)
    bias = graph.add_constant(f"{output}_bias", shift.astype(np.float32))
    graph.add_node("Conv", [data, weight, bias], output, like=node, group=len(step), kernel_shape=[1] * positions)


def _line(graph: Graph, node: NodeProto) -> tuple[Array, Array]:
    """Return factor and summand of every channel, [C] each, in float64."""
    gamma, beta, mean, variance = (np.float64(graph.constant(name)) for name in node.input[1:5])
    scale = gamma / np.sqrt(variance + attribute(node, "epsilon", 1e-5))
    return scale, beta - mean * scale
