"""Gates, x * sigmoid(y), in integers: SiLU, hard swish, squeeze-and-excitation.

ONNX Runtime has integer kernels for Sigmoid, Mul and Add, and none for HardSigmoid. In float a gate costs more than the
convolution before it gains: efficientnet_b0 runs slower than its float model.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import NodeProto

from maseRT.onnxrt.graph import Graph, attribute
from maseRT.onnxrt.qdq import is_dequantized

_HARD = {"alpha": 1 / 6, "beta": 0.5}
"""clip(x / 6 + 1 / 2, 0, 1): torch's hard sigmoid, and that in its hard swish; ONNX's default is another one."""


def write_out_hardswishes(graph: Graph) -> int:
    """Write HardSwish(x) as x * HardSigmoid(x), as ONNX Runtime would itself; returns how many there were."""
    found = [node for node in graph.nodes if node.op_type == "HardSwish"]
    for node in found:
        data, output = node.input[0], node.output[0]
        graph.remove(node)
        gate = graph.fresh(f"{output}_gate")
        graph.add_node("HardSigmoid", [data], gate, like=node, **_HARD)
        graph.add_node("Mul", [data, gate], output, like=node)
    return len(found)


def use_leaky_relus(graph: Graph) -> int:
    """Write PRelu of one slope as LeakyRelu, which has an integer kernel; returns how many there were."""
    found = 0
    for node in [node for node in graph.nodes if node.op_type == "PRelu"]:
        slope = graph.constant(node.input[1])
        if slope is not None and slope.size == 1:
            data, output = node.input[0], node.output[0]
            graph.remove(node)
            graph.add_node("LeakyRelu", [data], output, like=node, alpha=float(slope.reshape(())))
            found += 1
    return found


def is_gate(graph: Graph, node: NodeProto, integer: Callable[[str], bool]) -> bool:
    """Tell whether a node's result only multiplies a tensor that is rounded to integers.

    Args:
        graph: of the node.
        node: any node.
        integer: tells whether a tensor is rounded to integers.
    """
    if node.op_type not in ("Sigmoid", "HardSigmoid"):
        return False
    reader = graph.only_reader(node.output[0])
    if reader is None or reader.op_type != "Mul":
        return False
    return any(integer(name) for name in reader.input if name != node.output[0])


def add_hardsigmoids(graph: Graph) -> int:
    """Write HardSigmoid between integers as an addition, and return how many there were.

    6 * clip(x / 6 + 1 / 2, 0, 1) = clip(x + 3, 0, 6), and the QuantizeLinear behind clips. So that one gets the steps
    of x + 3, and the DequantizeLinear behind it keeps a sixth of them. To be called last: it reads unsigned
    pairs, and leaves a constant that looks like a weight.
    """
    found = 0
    for node in [node for node in graph.nodes if node.op_type == "HardSigmoid"]:
        quantize = graph.only_reader(node.output[0])
        if quantize is None or not is_dequantized(graph, node.input[0]) or not _clips(graph, node, quantize):
            continue
        source, output = node.input[0], node.output[0]
        step = graph.constant(quantize.input[1])
        if step is None:
            continue
        graph.remove(node)
        graph.add_node("Add", [source, _three(graph, node)], output, like=node)
        scale = graph.add_constant(f"{quantize.input[1]}_of_sum", (step * 6).astype(np.float32))
        graph.set_input(quantize, 1, scale)
        found += 1
    return found


def _three(graph: Graph, node: NodeProto) -> str:
    three = graph.fresh(f"{node.output[0]}_three")
    names = [
        graph.shared_constant("three_level", np.array(1, np.uint8)),
        graph.shared_constant("three_step", np.array(3, np.float32)),
        graph.shared_constant("zero_point_0", np.array(0, np.uint8)),
    ]
    graph.add_node("DequantizeLinear", names, three, like=node)
    return three


def _clips(graph: Graph, node: NodeProto, quantize: NodeProto) -> bool:
    """Tell whether rounding to uint8 does all the clipping of torch's hard sigmoid."""
    if quantize.op_type != "QuantizeLinear" or len(quantize.input) < 3:
        return False
    if any(abs(attribute(node, name, 0.0) - value) > 1e-6 for name, value in _HARD.items()):
        return False
    step, zero_point = graph.constant(quantize.input[1]), graph.constant(quantize.input[2])
    if step is None or zero_point is None or zero_point.dtype != np.uint8 or zero_point.any():
        return False
    return bool(step.size == 1 and step.dtype == np.float32 and float(step.reshape(())) * 255 <= 1.0 + 1e-6)
