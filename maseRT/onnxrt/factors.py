"""Factors of channels behind a convolution, as layer scales are, in the convolution's own weights."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from maseRT.onnxrt.graph import Array, Graph, attribute


def absorb_channel_factors(graph: Graph) -> int:
    """Write Conv -> Mul by one number per channel as the Conv alone; returns how many there were.

    The integers of the weights stay what they are, but for their sign and the steps they are in, so no product changes,
    unless a weight is -128 in a channel of negative factor. To be called before weights are stored as integers.
    """
    absorbed = 0
    for node in [node for node in graph.nodes if node.op_type == "Mul"]:
        for data, other in (tuple(node.input), tuple(node.input)[::-1]):
            convolution, factors = graph.producer(data), graph.constant(other)
            if convolution is None or factors is None or convolution.op_type != "Conv":
                continue
            if graph.only_reader(data) is node and _absorb(graph, convolution, factors):
                graph.redirect(node.output[0], data, graph.readers(node.output[0]))
                graph.remove(node)
                if graph.is_output(node.output[0]):
                    graph.rename_output(convolution, data, node.output[0])
                absorbed += 1
                break
    return absorbed


def _absorb(graph: Graph, convolution: NodeProto, factors: Array) -> bool:
    """Multiply a convolution's weight, its steps and its bias; tells whether they could be."""
    dequantize = graph.producer(convolution.input[1])
    quantize = None if dequantize is None else graph.producer(dequantize.input[0])
    if dequantize is None or quantize is None or dequantize.op_type != "DequantizeLinear":
        return False
    alone = all(graph.only_reader(name) is not None for name in (dequantize.output[0], quantize.output[0]))
    weight, step = graph.constant(quantize.input[0]), graph.constant(quantize.input[1])
    bias = graph.constant(convolution.input[2]) if len(convolution.input) > 2 else np.zeros(1, np.float32)
    if not alone or weight is None or step is None or bias is None:
        return False
    channels = len(weight)
    per_channel = (channels, *[1] * (weight.ndim - 2))
    if factors.shape not in (per_channel, (1, *per_channel)) or step.shape != (channels,):
        return False
    if attribute(quantize, "axis", 1) != 0:
        return False
    each = factors.reshape(-1)
    values = weight * each.reshape(-1, *[1] * (weight.ndim - 1))
    # A channel that is switched off is zero in whatever steps.
    larger = (step * np.where(each == 0, 1, np.abs(each))).astype(step.dtype)
    steps = graph.add_constant(f"{quantize.input[1]}_scaled", larger)
    graph.set_input(quantize, 0, graph.add_constant(f"{quantize.input[0]}_scaled", values.astype(weight.dtype)))
    for node in (quantize, dequantize):
        graph.set_input(node, 1, steps)
    if len(convolution.input) > 2:
        scaled = graph.add_constant(f"{convolution.input[2]}_scaled", (bias * each).astype(bias.dtype))
        graph.set_input(convolution, 2, scaled)
    return True
