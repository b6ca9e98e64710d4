"""Rewrites of an exported ONNX model for parsers that lack newer forms of its operators: its results stay the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper, shape_inference

_PASS_ZEROS_ON = frozenset({"Cast", "Expand", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})
_RECURRENT = {"LSTM": (5, 6), "GRU": (5,), "RNN": (5,)}
"""Operator -> positions of its optional initial states, zero where they are left out."""

_AXES_AS_INPUT = frozenset(
    f"Reduce{what}" for what in ("Mean", "Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")
)
"""Reductions whose axes became an input with opset 18; ReduceSum's did with 13, which every parser knows."""


def for_tensorrt_8(model: ModelProto) -> None:
    """Rewrite a model, in place, as TensorRT 8.6's parser takes it.

    It does not mind the `start` and `end` of Shape (opset 15), so that shapes put together from them come out wrong;
    initial states of a dynamic batch are not needed where they are zero; and means over an image are pools. In a
    quantized model a 3-D max pool is two 2-D ones: the builder moves Q and DQ across it, and has no kernel for it then.
    The model stays one that every runtime takes; `attribute_axes` and `maseRT.onnx_widen` do the rest.
    """
    global_pools(model)
    if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        flat_max_pools(model)
    for rewrite in (whole_shapes, default_states, without_dead_nodes):
        rewrite(model.graph)


def global_pools(model: ModelProto) -> None:
    """Write a ReduceMean over all spatial axes that keeps them as GlobalAveragePool."""
    graph = model.graph
    shapes = _shapes(model)
    constant = _constants(graph)
    for node in graph.node:
        rank = len(shapes.get(node.input[0], ())) if node.input else 0
        axes = _axes(node, constant)
        if node.op_type != "ReduceMean" or rank < 3 or axes is None or not _attribute(node, "keepdims", 1):
            continue
        if sorted(axis % rank for axis in axes) == list(range(2, rank)):
            node.op_type = "GlobalAveragePool"
            del node.input[1:], node.attribute[:]


def flat_max_pools(model: ModelProto) -> None:
    """Write each 3-D max pool as one over height and width and one over depth, with the same results.

    Those with an unknown size beside the batch, with dilations or with indices stay.
    """
    graph = model.graph
    if not any(map(_can_be_flat, graph.node)):
        return  # most models: inferring their shapes takes a while
    shapes = _shapes(model)
    nodes: list[NodeProto] = []
    for node in graph.node:
        sizes = shapes.get(node.input[0], []) if _can_be_flat(node) else []
        nodes += _flattened(graph, node, sizes) if sizes and all(sizes[1:]) else [node]
    _replace_nodes(graph, nodes)


def _can_be_flat(node: NodeProto) -> bool:
    """Whether a node is a 3-D max pool without dilations and indices."""
    if node.op_type != "MaxPool" or len(node.output) != 1:
        return False
    given = {each.name: list(each.ints) for each in node.attribute}
    return len(given["kernel_shape"]) == 3 and set(given.get("dilations", [1])) == {1}


def _pooled(size: int, kernel: int, stride: int, pads: tuple[int, int], *, ceil_mode: int) -> int:
    """Return how many windows lie along a dimension; with ceil_mode, all of them start inside or in the first padding.

    Shape inference of onnx counts those beyond as well, which neither torch nor ONNX Runtime does.
    """
    free = size + sum(pads) - kernel
    windows = 1 + (-(-free // stride) if ceil_mode else free // stride)
    return windows - (ceil_mode and (windows - 1) * stride >= size + pads[0])


def _flattened(graph: GraphProto, pool: NodeProto, read: Sequence[int]) -> list[NodeProto]:
    """Return the nodes that a 3-D max pool [N, C, D, H, W] becomes: [N, C*D, H, W], then [N, C, D, H*W]."""
    given = {each.name: list(each.ints) for each in pool.attribute}
    kernel = given["kernel_shape"]
    strides, pads = given.get("strides", [1, 1, 1]), given.get("pads", [0] * 6)
    channels, depth, height, width = read[1:]
    ceil_mode = _attribute(pool, "ceil_mode", 0)
    planes, rows, columns = (
        _pooled(read[2 + i], kernel[i], strides[i], (pads[i], pads[3 + i]), ceil_mode=ceil_mode) for i in range(3)
    )
    output = pool.output[0]
    nodes: list[NodeProto] = []

    def add(op: str, *more: str, **attributes: Any) -> None:
        before = nodes[-1].output[0] if nodes else pool.input[0]
        made = f"{output}_{len(nodes)}"
        nodes.append(helper.make_node(op, [before, *more], [made], name=f"{pool.name}_{len(nodes)}", **attributes))
        nodes[-1].metadata_props.extend(pool.metadata_props)

    def reshape(*sizes: int) -> None:
        add("Reshape", _constant(graph, f"{output}_{len(nodes)}_sizes", [0, *sizes]))

    reshape(channels * depth, height, width)
    add("MaxPool", kernel_shape=kernel[1:], strides=strides[1:], pads=[*pads[1:3], *pads[4:]], ceil_mode=ceil_mode)
    reshape(channels, depth, rows * columns)
    depth_pads = [pads[0], 0, pads[3], 0]
    add("MaxPool", kernel_shape=[kernel[0], 1], strides=[strides[0], 1], pads=depth_pads, ceil_mode=ceil_mode)
    reshape(channels, planes, rows, columns)
    nodes[-1].output[0] = output
    nodes[-1].name = pool.name
    return nodes


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


def _shapes(model: ModelProto) -> dict[str, list[int]]:
    """Return tensor name -> its sizes, 0 for a free one, where inference finds them."""
    graph = shape_inference.infer_shapes(model).graph
    return {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.value_info, *graph.output)
        if value.type.tensor_type.HasField("shape")
    }


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
