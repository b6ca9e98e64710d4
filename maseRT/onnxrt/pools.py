"""Pools as the kernels know them: global ones by name, averages that are divided right."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from maseRT.onnxrt.graph import Graph, attribute

_SPATIAL = ([2, 3], [-2, -1])


def use_global_pools(graph: Graph) -> int:
    """Write means over all positions as GlobalAveragePool, which has an integer kernel; returns how many there were."""
    found = [node for node in graph.nodes if _is_global_mean(graph, node)]
    for node in found:
        data, output = node.input[0], node.output[0]
        keep = bool(attribute(node, "keepdims", 1))
        graph.remove(node)
        pooled = output if keep else graph.fresh(f"{output}_pooled")
        graph.add_node("GlobalAveragePool", [data], pooled, like=node)
        if not keep:
            graph.add_node("Flatten", [pooled], output, like=node, axis=1)
    return len(found)


def divide_by_what_is_there(graph: Graph) -> int:
    """Keep integer kernels from average pools that they would divide wrongly; returns how many there were.

    Where only rounding the size up takes a window beyond the padding, ONNX Runtime 1.31's kernel counts what is not
    there, if it counts the padding. Without padding there is no difference but that; with it, the pool stays in float.
    No value changes.
    """
    found = [node for node in graph.nodes if is_divided_wrongly(node)]
    for node in found:
        if any(attribute(node, "pads", [])):
            least = graph.shared_constant("least_number", np.array(np.finfo(np.float32).min))
            apart = graph.fresh(f"{node.input[0]}_float")
            graph.add_node("Max", [node.input[0], least], apart, like=node)
            graph.set_input(node, 0, apart)
        else:
            _without(node, "count_include_pad")
    return len(found)


def is_divided_wrongly(node: NodeProto) -> bool:
    """Tell whether a node is an average pool that counts its padding and rounds its size up."""
    counts = node.op_type == "AveragePool" and attribute(node, "auto_pad", b"NOTSET") == b"NOTSET"
    return counts and bool(attribute(node, "ceil_mode", 0)) and bool(attribute(node, "count_include_pad", 0))


def _is_global_mean(graph: Graph, node: NodeProto) -> bool:
    if node.op_type != "ReduceMean" or len(node.input) < 2 or graph.rank(node.input[0]) != 4:
        return False
    axes = graph.constant(node.input[1])
    return axes is not None and sorted(axes.tolist()) in _SPATIAL


def _without(node: NodeProto, *names: str) -> None:
    kept = [entry for entry in node.attribute if entry.name not in names]
    del node.attribute[:]
    node.attribute.extend(kept)
