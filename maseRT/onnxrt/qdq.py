"""Q/DQ pairs in an ONNX graph: which tensors come from integers, which pairs are symmetric."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from maseRT.errors import StepError
from maseRT.onnxrt.graph import Array, Graph

PRODUCTS = frozenset(("Conv", "Gemm", "MatMul"))
"""The operators that ONNX Runtime's CPU provider has integer kernels for, with a weight."""


def is_dequantized(graph: Graph, tensor: str) -> bool:
    """Tell whether a tensor is an activation that comes out of a DequantizeLinear."""
    node = graph.producer(tensor)
    return node is not None and node.op_type == "DequantizeLinear" and graph.constant(node.input[0]) is None


def symmetric_pairs(graph: Graph) -> list[NodeProto]:
    """Return the QuantizeLinear nodes of activations that are int8 with one scale and zero point 0, with DQ behind."""
    found = []
    for node in graph.nodes:
        if node.op_type != "QuantizeLinear" or len(node.input) < 3 or graph.constant(node.input[0]) is not None:
            continue
        scale, zero_point = graph.constant(node.input[1]), graph.constant(node.input[2])
        if scale is None or zero_point is None or scale.size != 1 or zero_point.dtype != np.int8 or zero_point.any():
            continue
        readers = graph.readers(node.output[0])
        if readers and all(reader.op_type == "DequantizeLinear" for reader in readers):
            found.append(node)
    return found


def scale_of(graph: Graph, quantize: NodeProto) -> Array:
    """Return the scale of one of `symmetric_pairs`, without dimensions.

    Raises:
        StepError: it is computed.
    """
    scale = graph.constant(quantize.input[1])
    if scale is None:
        raise StepError("the scale of a QuantizeLinear is not a constant", where=quantize.name)
    return scale.reshape(())


def weight_dequantizers(graph: Graph) -> list[NodeProto]:
    """Return the DequantizeLinear nodes of constants, quantized in the file or by a QuantizeLinear before them."""
    found = []
    for node in graph.nodes:
        if node.op_type != "DequantizeLinear":
            continue
        quantize = graph.producer(node.input[0])
        source = quantize.input[0] if quantize is not None and quantize.op_type == "QuantizeLinear" else node.input[0]
        if graph.constant(source) is not None:
            found.append(node)
    return found


def has_integer_kernel(graph: Graph, dequantize: NodeProto) -> bool:
    """Tell whether everything that reads a weight's DequantizeLinear is a product of integers.

    A convolution is one where its result is rounded.
    """
    readers = graph.readers(dequantize.output[0])
    products = []
    for reader in readers:
        behind = graph.readers(reader.output[0]) if reader.op_type == "Transpose" else [reader]
        products += behind
    return bool(products) and all(
        node.op_type in PRODUCTS
        and is_dequantized(graph, node.input[0])
        and (node.op_type != "Conv" or is_rounded(graph, node.output[0]))
        for node in products
    )


def rounding_of(graph: Graph, tensor: str) -> NodeProto | None:
    """Return the QuantizeLinear of a tensor that comes out of a Q/DQ pair; None for any other."""
    dequantize = graph.producer(tensor) if is_dequantized(graph, tensor) else None
    return None if dequantize is None else graph.producer(dequantize.input[0])


def weight_shape(graph: Graph, tensor: str) -> tuple[int, ...] | None:
    """Return the shape of a constant weight, before or behind its rounding; None where the weight is computed."""
    while (weight := graph.constant(tensor)) is None:
        node = graph.producer(tensor)
        if node is None or node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            return None
        tensor = node.input[0]
    shape: tuple[int, ...] = weight.shape
    return shape


def is_rounded(graph: Graph, tensor: str) -> bool:
    """Tell whether only QuantizeLinear reads a tensor, behind the activation that disappears in it if there is one."""
    readers = graph.readers(tensor)
    if len(readers) == 1 and readers[0].op_type in ("Relu", "Clip"):
        readers = graph.readers(readers[0].output[0])
    return bool(readers) and all(reader.op_type == "QuantizeLinear" for reader in readers)
