"""FP16 models as FP32 ones, for libraries that compute half no faster or do not read all of it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper, shape_inference

_TYPE_ATTRIBUTES = frozenset({"to", "dtype", "output_dtype"})
_WIDER = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16})


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
    del graph.node[:]
    graph.node.extend(kept)


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
