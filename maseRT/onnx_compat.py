"""Rewrites of an exported ONNX model for parsers that lack newer forms of its operators; its results stay the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

_PASS_ZEROS_ON = frozenset({"Cast", "Expand", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})
_RECURRENT = {"LSTM": (5, 6), "GRU": (5,), "RNN": (5,)}
"""Operator -> positions of its optional initial states, zero where they are left out."""


def for_tensorrt_8(model: ModelProto) -> None:
    """Rewrite a model, in place, as TensorRT 8.6's parser takes it.

    It does not mind the `start` and `end` of Shape (opset 15), so that shapes put together from them come out wrong;
    and initial states of a dynamic batch are not needed where they are zero.
    """
    for rewrite in (whole_shapes, default_states, without_dead_nodes):
        rewrite(model.graph)


def whole_shapes(graph: GraphProto) -> None:
    """Take parts of a shape by Slice instead of Shape's own attributes."""
    nodes: list[NodeProto] = []
    for node in graph.node:
        bounds = {attribute.name: attribute.i for attribute in node.attribute}
        if node.op_type != "Shape" or not bounds:
            nodes.append(node)
            continue
        part = node.output[0]
        start, end = bounds.get("start", 0), bounds.get("end", 2**63 - 1)
        names = [_constant(graph, f"{part}_{what}", [value]) for what, value in (("start", start), ("end", end))]
        whole = helper.make_node("Shape", node.input, [f"{part}_whole"], name=f"{node.name}_whole")
        cut = helper.make_node("Slice", [f"{part}_whole", *names], [part], name=node.name)
        for made in (whole, cut):
            made.metadata_props.extend(node.metadata_props)
        nodes += [whole, cut]
    _replace_nodes(graph, nodes)


def default_states(graph: GraphProto) -> None:
    """Leave out a recurrent node's initial states where they are zero, which is what they are by default."""
    zero = _zeros(graph)
    for node in graph.node:
        for position in _RECURRENT.get(node.op_type, ()):
            if position < len(node.input) and zero(node.input[position]):
                node.input[position] = ""
        while node.op_type in _RECURRENT and node.input and not node.input[-1]:
            del node.input[-1]


def without_dead_nodes(graph: GraphProto) -> None:
    """Remove nodes and constants that nothing reads."""
    wanted = {value.name for value in graph.output}
    alive: list[NodeProto] = []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            alive.append(node)
            wanted.update(_read_by(node))
    _replace_nodes(graph, reversed(alive))
    constants = [constant for constant in graph.initializer if constant.name in wanted]
    del graph.initializer[:]
    graph.initializer.extend(constants)
    values = [value for value in graph.value_info if value.name in wanted]
    del graph.value_info[:]
    graph.value_info.extend(values)


def _read_by(node: NodeProto) -> set[str]:
    """Return what a node reads, the graphs inside it included."""
    names = set(node.input)
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            for inner in attribute.g.node:
                names |= _read_by(inner)
            names.update(value.name for value in attribute.g.output)
    return names


def _zeros(graph: GraphProto) -> Callable[[str], bool]:
    """Return a function that tells whether a tensor is zero whatever the input is."""
    constants = {constant.name: constant for constant in graph.initializer}
    maker = {name: node for node in graph.node for name in node.output}

    def zero(name: str) -> bool:
        if name in constants:
            return not numpy_helper.to_array(constants[name]).any()
        node = maker.get(name)
        if node is None:
            return False
        if node.op_type == "ConstantOfShape":
            return all(not numpy_helper.to_array(attribute.t).any() for attribute in node.attribute)
        return node.op_type in _PASS_ZEROS_ON and zero(node.input[0])

    return zero


def _constant(graph: GraphProto, name: str, values: list[int]) -> str:
    graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
    return name


def _replace_nodes(graph: GraphProto, nodes: Iterable[NodeProto]) -> None:
    kept = list(nodes)
    del graph.node[:]
    graph.node.extend(kept)
