"""Biases of products: int32 in steps of input step times weight step as the kernels add them, or nodes of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto

from maseRT.onnxrt.graph import Array, Graph, attribute
from maseRT.onnxrt.qdq import is_dequantized, weight_shape

_LARGEST = 2.0**30
"""What a bias may be in its steps: half of int32, so that the sum of products fits beside it."""


@dataclass(frozen=True)
class _Product:
    """A convolution or Gemm of integers with a constant bias [C].

    Attributes:
        weight: the weight's DequantizeLinear.
        bias: [C].
        input_step: of the activation.
        weight_step: [C].
    """

    node: NodeProto
    weight: NodeProto
    bias: Array
    input_step: float
    weight_step: Array


def make_room_for_biases(graph: Graph) -> int:
    """Coarsen the steps of weight channels that are so small that their bias would not fit into int32.

    Such channels come from BatchNorms that switched a channel off: weights next to zero, and a bias. Each product
    changes by less than a millionth of that bias. To be called before weights are stored as integers.

    Returns:
        how many channels there were.
    """
    channels = 0
    for product in _products(graph):
        least = np.abs(product.bias) / (product.input_step * _LARGEST)
        small = product.weight_step < least
        if small.any():
            scale = np.maximum(product.weight_step, least).astype(product.weight_step.dtype)
            name = graph.add_constant(f"{product.weight.input[1]}_with_room", _like(scale, graph, product.weight))
            quantize = graph.producer(product.weight.input[0])
            for node in (product.weight, quantize):
                if node is not None:
                    graph.set_input(node, 1, name)
            channels += int(small.sum())
    return channels


def quantize_biases(graph: Graph) -> int:
    """Store the bias of every Gemm of integers whose result stays float as int32; returns how many there were.

    ONNX Runtime does that by itself where the result is quantized; without it, the Gemm would run in float.
    """
    found = [product for product in _products(graph) if product.node.op_type == "Gemm" and not _rounded(graph, product)]
    for product in found:
        step = (np.float32(product.input_step) * product.weight_step).astype(np.float32)
        name = product.node.input[2]
        values = graph.add_constant(f"{name}_quantized", np.rint(product.bias / step).astype(np.int32))
        scale = graph.add_constant(f"{name}_scale", step)
        zero_point = graph.add_constant(f"{name}_zero_point", np.zeros(len(step), np.int32))
        result = graph.fresh(f"{name}_dequantized")
        graph.add_node("DequantizeLinear", [values, scale, zero_point], result, like=product.node, axis=0)
        graph.set_input(product.node, 2, result)
    return len(found)


def write_biases_apart(graph: Graph) -> None:
    """Write the constant bias of every convolution as a subtraction behind it; no value changes.

    OpenVINO's ONNX reader asks a convolution with a bias for its shape. Where something else in the model needs the
    batch size (an LSTM's first state, an Expand), OpenVINO 2025.4 and 2026.4 take it from there: the convolution then
    has two readers, is fused with nothing, and where its result is rounded, all channels get the bias of the first.
    ONNX Runtime would put an addition back into a convolution of floats before OpenVINO sees it. To be called last.
    """
    for node in [node for node in graph.nodes if node.op_type == "Conv" and len(node.input) > 2]:
        bias, shape = graph.constant(node.input[2]), weight_shape(graph, node.input[1])
        if bias is None or shape is None:
            continue
        name = graph.shared_constant(f"{node.input[2]}_negative", -bias.reshape(1, -1, *[1] * (len(shape) - 2)))
        graph.set_input(node, 2, "")
        del node.input[2]
        result, product = node.output[0], graph.fresh(f"{node.output[0]}_without_bias")
        graph.rename_output(node, result, product)
        graph.add_node("Sub", [product, name], result, like=node)


def _products(graph: Graph) -> Iterator[_Product]:
    for node in list(graph.nodes):
        if node.op_type not in ("Conv", "Gemm") or len(node.input) < 3 or not is_dequantized(graph, node.input[0]):
            continue
        bias, weight, source = (
            graph.constant(node.input[2]),
            graph.producer(node.input[1]),
            graph.producer(node.input[0]),
        )
        if bias is None or source is None or weight is None or weight.op_type != "DequantizeLinear":
            continue
        steps = graph.constant(source.input[1]), graph.constant(weight.input[1])
        if steps[0] is None or steps[1] is None or steps[1].dtype != np.float32:
            continue
        if bias.ndim != 1 or not _is_plain(node):
            continue
        weight_step = np.broadcast_to(steps[1].reshape(-1), bias.shape)
        yield _Product(node, weight, bias, float(steps[0].reshape(())), weight_step)


def _is_plain(node: NodeProto) -> bool:
    """Tell whether a Gemm is x W^T + b; a convolution always is."""
    factors = [attribute(node, name, 1.0) for name in ("alpha", "beta")]
    return node.op_type == "Conv" or (factors == [1.0, 1.0] and not attribute(node, "transA", 0))


def _rounded(graph: Graph, product: _Product) -> bool:
    reader = graph.only_reader(product.node.output[0])
    if reader is not None and reader.op_type == "Relu":  # it disappears in the rounding
        reader = graph.only_reader(reader.output[0])
    return reader is not None and reader.op_type == "QuantizeLinear"


def _like(scale: Array, graph: Graph, weight: NodeProto) -> Array:
    """Return a scale [C], as one value where the weight has only one."""
    known = graph.constant(weight.input[1])
    return scale.max().reshape(known.shape) if known is not None and known.size == 1 else scale
