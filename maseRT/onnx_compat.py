"""Rewrites of an exported ONNX model for parsers that lack newer forms of its operators; its results stay the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper, shape_inference

_PASS_ZEROS_ON = frozenset({"Cast", "Expand", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})
_RECURRENT = {"LSTM": (5, 6), "GRU": (5,), "RNN": (5,)}
"""Operator -> positions of its optional initial states, zero where they are left out."""

_AXES_AS_INPUT = frozenset(
    f"Reduce{what}" for what in ("Mean", "Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")
)
"""Reductions whose axes became an input with opset 18; ReduceSum's did with 13, which every parser knows."""

_TYPE_ATTRIBUTES = frozenset({"to", "dtype", "output_dtype"})
_WIDER = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16})


def for_tensorrt_8(model: ModelProto) -> None:
    """Rewrite a model, in place, as TensorRT 8.6's parser takes it.

    It does not mind the `start` and `end` of Shape (opset 15), so that shapes put together from them come out wrong;
    initial states of a dynamic batch are not needed where they are zero; and means over an image are pools. The model
    stays one that every runtime takes; `attribute_axes` and `widen` are further rewrites for that parser.
    """
    global_pools(model)
    for rewrite in (whole_shapes, default_states, without_dead_nodes):
        rewrite(model.graph)


def global_pools(model: ModelProto) -> None:
    """Write a ReduceMean over all spatial axes that keeps them as GlobalAveragePool."""
    graph = model.graph
    ranks = {
        value.name: len(value.type.tensor_type.shape.dim)
        for value in (*graph.input, *shape_inference.infer_shapes(model).graph.value_info)
        if value.type.tensor_type.HasField("shape")
    }
    constant = _constants(graph)
    for node in graph.node:
        rank = ranks.get(node.input[0], 0) if node.input else 0
        axes = _axes(node, constant)
        if node.op_type != "ReduceMean" or rank < 3 or axes is None or not _attribute(node, "keepdims", 1):
            continue
        if sorted(axis % rank for axis in axes) == list(range(2, rank)):
            node.op_type = "GlobalAveragePool"
            del node.input[1:], node.attribute[:]


def attribute_axes(graph: GraphProto) -> None:
    """Give reductions their axes as the attribute that they were before opset 18.

    TensorRT 8.6's parser reads nothing else, and reduces everything where there is an input instead. The result is for
    that parser alone: in the model's own opset these nodes are not valid.
    """
    constant = _constants(graph)
    for node in graph.node:
        if node.op_type not in _AXES_AS_INPUT:
            continue
        axes = _axes(node, constant)
        given = len(node.input) > 1 and node.input[1]
        if given and axes is None:
            continue  # computed: no attribute can say them
        if not axes and _attribute(node, "noop_with_empty_axes", 0):
            continue  # works on each element by itself: no attribute can say that
        kept = [each for each in node.attribute if each.name not in ("axes", "noop_with_empty_axes")]
        del node.input[1:], node.attribute[:]
        node.attribute.extend(kept)
        if axes:
            node.attribute.append(helper.make_attribute("axes", axes))
    without_dead_nodes(graph)


def widen(model: ModelProto) -> None:
    """Write every FP16 tensor of a model, in place, as FP32, and leave out the Casts between the two.

    For a library that is told types layer by layer instead, and that does not read FP16 scales of Q/DQ. Inputs and
    outputs become FP32, too. Results differ by the rounding to FP16 that is left out.
    """
    types = _element_types(model)
    renamed: dict[str, str] = {}
    for graph in reversed(list(_graphs(model.graph))):  # inner ones first: to replace nodes is to copy what is in them
        for tensor in graph.initializer:
            _widen_tensor(tensor)
        for value in (*graph.input, *graph.output):
            if value.type.tensor_type.elem_type == TensorProto.FLOAT16:
                value.type.tensor_type.elem_type = TensorProto.FLOAT
        del graph.value_info[:]
        for node in graph.node:
            _widen_attributes(node)
        _drop_casts(graph, types, renamed)
    for graph in _graphs(model.graph):
        for node in graph.node:
            for position, name in enumerate(node.input):
                while name in renamed:
                    name = renamed[name]
                node.input[position] = name


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


def _drop_casts(graph: GraphProto, types: dict[str, int], renamed: dict[str, str]) -> None:
    """Remove Casts between FP32 and FP16; one that makes an output of the graph becomes an Identity.

    Args:
        graph: already without FP16.
        types: of the tensors before.
        renamed: takes what the removed Casts made -> what they read.
    """
    outputs = {value.name for value in graph.output}
    kept = []
    for node in graph.node:
        if node.op_type in ("Cast", "CastLike") and {types.get(node.input[0]), types.get(node.output[0])} <= _WIDER:
            if node.output[0] not in outputs:
                renamed[node.output[0]] = node.input[0]
                continue
            node.op_type = "Identity"
            del node.input[1:], node.attribute[:]
        kept.append(node)
    _replace_nodes(graph, kept)


def _widen_tensor(tensor: TensorProto) -> None:
    if tensor.data_type == TensorProto.FLOAT16:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))


def _widen_attributes(node: NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.TENSOR:
            _widen_tensor(attribute.t)
        elif attribute.name in _TYPE_ATTRIBUTES and attribute.i == TensorProto.FLOAT16:
            attribute.i = TensorProto.FLOAT


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """Yield a graph and those inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from _graphs(attribute.g)


def _element_types(model: ModelProto) -> dict[str, int]:
    """Return tensor name -> TensorProto's number of its type, where inference finds one."""
    types: dict[str, int] = {}
    for graph in _graphs(shape_inference.infer_shapes(model).graph):
        types.update({tensor.name: tensor.data_type for tensor in graph.initializer})
        for value in (*graph.input, *graph.value_info, *graph.output):
            types[value.name] = value.type.tensor_type.elem_type
    return types


def _constants(graph: GraphProto) -> Callable[[str], list[int] | None]:
    """Return a function that gives the whole numbers of a constant; None for what is computed."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                tensors[node.output[0]] = attribute.t

    def constant(name: str) -> list[int] | None:
        return numpy_helper.to_array(tensors[name]).ravel().tolist() if name in tensors else None

    return constant


def _axes(node: NodeProto, constant: Callable[[str], list[int] | None]) -> list[int] | None:
    """Return a reduction's axes, as input or attribute; None where there are none or they are computed."""
    if len(node.input) > 1 and node.input[1]:
        return constant(node.input[1])
    return next((list(each.ints) for each in node.attribute if each.name == "axes"), None)


def _attribute(node: NodeProto, name: str, default: int) -> int:
    return next((each.i for each in node.attribute if each.name == name), default)


def _read_by(node: NodeProto) -> set[str]:
    """Return what a node reads, the graphs inside it included."""
    names = set(node.input)
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
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
