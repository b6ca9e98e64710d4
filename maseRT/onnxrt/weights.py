"""Weights as INT8 initializers: a quarter of the file, and nothing to quantize when it is loaded."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from maseRT.onnxrt.graph import Array, Graph, attribute
from maseRT.onnxrt.qdq import has_integer_kernel, weight_dequantizers


def store_weights_as_int8(graph: Graph) -> int:
    """Replace QuantizeLinear of a constant by its result, and return how many there were. No value changes."""
    stored = 0
    for node in list(graph.nodes):
        if node.op_type != "QuantizeLinear":
            continue
        weight, scale, zero_point = (graph.constant(name) for name in [*node.input, "", ""][:3])
        if weight is None or scale is None or zero_point is None:
            continue
        quantized = quantize(weight, scale, zero_point, axis=attribute(node, "axis", 1))
        name = graph.add_constant(f"{node.input[0]}_quantized", quantized)
        graph.redirect(node.output[0], name, graph.readers(node.output[0]))
        graph.remove(node)
        stored += 1
    return stored


def transpose_weights(graph: Graph) -> int:
    """Apply the Transpose behind a weight's DequantizeLinear to the weight itself; returns how many there were."""
    turned = 0
    for node in list(graph.nodes):
        source = graph.producer(node.input[0]) if node.op_type == "Transpose" else None
        if source is None or source.op_type != "DequantizeLinear":
            continue
        weight = graph.constant(source.input[0])
        if weight is None:
            continue
        order = attribute(node, "perm", list(range(weight.ndim))[::-1])
        name = graph.add_constant(f"{source.input[0]}_transposed", np.ascontiguousarray(weight.transpose(order)))
        axis = list(order).index(attribute(source, "axis", 1) % weight.ndim)
        output = node.output[0]
        graph.remove(node)
        graph.add_node("DequantizeLinear", [name, *source.input[1:]], output, like=node, axis=axis)
        turned += 1
    return turned


def look_up_integers(graph: Graph) -> int:
    """Take rows of INT8 tables before they are dequantized, not after; returns how many tables were looked up so.

    ONNX Runtime would dequantize the whole table in every run. To be called when the weights are stored as INT8; no
    value changes. The tables have one scale.
    """
    turned = 0
    for node in weight_dequantizers(graph):
        table, scale, zero_point = (graph.constant(name) for name in [*node.input, "", ""][:3])
        if table is None or scale is None or zero_point is None or scale.size != 1:
            continue
        lookups = [reader for reader in graph.readers(node.output[0]) if _looks_up(reader, node.output[0])]
        for lookup in lookups:
            output, rows = lookup.output[0], graph.fresh(f"{lookup.output[0]}_quantized")
            graph.set_input(lookup, 0, node.input[0])
            graph.rename_output(lookup, output, rows)
            graph.add_node("DequantizeLinear", [rows, *node.input[1:]], output, like=lookup)
        if lookups and not graph.readers(node.output[0]):
            graph.remove(node)
        turned += bool(lookups)
    return turned


def _looks_up(node: NodeProto, table: str) -> bool:
    return node.op_type == "Gather" and node.input[0] == table


def round_float_weights(graph: Graph) -> int:
    """Store weights that no integer kernel reads as float numbers on the INT8 grid; returns how many there were.

    ONNX Runtime would dequantize them anew in every run. To be called when the weights are stored as INT8.
    """
    rounded = 0
    for node in weight_dequantizers(graph):
        weight, scale, zero_point = (graph.constant(name) for name in [*node.input, "", ""][:3])
        if weight is None or scale is None or zero_point is None or has_integer_kernel(graph, node):
            continue
        values = dequantize(weight, scale, zero_point, axis=attribute(node, "axis", 1))
        name = graph.add_constant(f"{node.input[0]}_rounded", values)
        graph.redirect(node.output[0], name, graph.readers(node.output[0]))
        graph.remove(node)
        rounded += 1
    return rounded


def quantize(values: Array, scale: Array, zero_point: Array, *, axis: int) -> Array:
    """Return QuantizeLinear's result: rounded half to even, saturated, of the zero point's type."""
    limits = np.iinfo(zero_point.dtype)
    rounded = np.rint(values / _along(scale, values.ndim, axis)) + _along(zero_point, values.ndim, axis)
    result: Array = np.clip(rounded, limits.min, limits.max).astype(zero_point.dtype)
    return result


def dequantize(values: Array, scale: Array, zero_point: Array, *, axis: int) -> Array:
    """Return DequantizeLinear's result, of the scale's type."""
    shifted = values.astype(np.int32) - _along(zero_point.astype(np.int32), values.ndim, axis)
    result: Array = shifted.astype(scale.dtype) * _along(scale, values.ndim, axis)
    return result


def _along(parameter: Array, rank: int, axis: int) -> Array:
    """Shape a scale or zero point [C] so that it broadcasts along one axis; one value stays one value."""
    if parameter.size == 1:
        return parameter.reshape(())
    return parameter.reshape([-1 if index == axis % rank else 1 for index in range(rank)])
