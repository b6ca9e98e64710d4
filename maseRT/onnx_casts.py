"""Takes out casts that the exporter puts around operators which are exact in any float type."""

from __future__ import annotations

from onnx import GraphProto, NodeProto, TensorProto

_EXACT = frozenset(("Abs", "ReduceMax", "ReduceMin"))
"""Operators that give one of the numbers that they read, or its negative; the exporter computes them in FP32."""
_PROMOTION = "convert_element_type"
"""What is in the names of the casts that the exporter adds by itself; casts of the model are copies."""
_HALVES = frozenset((TensorProto.FLOAT16, TensorProto.BFLOAT16))


def compute_in_half(graph: GraphProto) -> None:
    """Turn Cast to FP32, exact operator, Cast back into the operator alone, in place: the numbers are the same.

    The model's own casts stay, such as those around a layer that is to be in FP32.
    """
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info)}
    types |= {weight.name: weight.data_type for weight in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    outputs = {value.name for value in graph.output}
    for node in [node for node in graph.node if node.op_type in _EXACT]:
        up = makers.get(node.input[0])
        backs = _readers(graph, node.output[0])
        if up is None or _cast_to(up) != TensorProto.FLOAT or not backs:
            continue
        half = types.get(up.input[0])
        if half not in _HALVES or any(_cast_to(back) != half or back.output[0] in outputs for back in backs):
            continue
        node.input[0] = up.input[0]
        for back in backs:
            _reroute(graph, back, node.output[0])
        if up.output[0] not in outputs and not _readers(graph, up.output[0]):
            graph.node.remove(up)
        for value in graph.value_info:
            if value.name == node.output[0]:
                value.type.tensor_type.elem_type = half


def _cast_to(node: NodeProto) -> int | None:
    """Return the type that a Cast of the exporter's gives; None for any other node."""
    if node.op_type != "Cast" or _PROMOTION not in node.name:
        return None
    return next((each.i for each in node.attribute if each.name == "to"), None)


def _readers(graph: GraphProto, name: str) -> list[NodeProto]:
    return [node for node in graph.node if name in node.input]


def _reroute(graph: GraphProto, cast: NodeProto, source: str) -> None:
    """Make the readers of a cast read `source`, and remove it."""
    for reader in _readers(graph, cast.output[0]):
        reader.input[:] = [source if name == cast.output[0] else name for name in reader.input]
    graph.node.remove(cast)
