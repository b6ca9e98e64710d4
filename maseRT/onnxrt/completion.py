"""Q/DQ pairs that CPU kernels want beyond those of the symmetric form.

TensorRT fuses a convolution with what follows it in float and quantizes at the end. ONNX Runtime's integer kernels read
and write integers: a convolution, addition, concatenation or pool without a QuantizeLinear behind it runs in float.
OpenVINO fuses a convolution with activations and additions as TensorRT does, but not with pools.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto

from maseRT.onnxrt.bounds import SHAPE_OPS, clip_limits, copies_values, is_nonnegative, upper_bound
from maseRT.onnxrt.gates import is_gate
from maseRT.onnxrt.graph import Graph, attribute
from maseRT.onnxrt.norms import could_be_convolution
from maseRT.onnxrt.qdq import is_dequantized, rounding_of
from maseRT.onnxrt.unsigned import Range, unsigned_parameters

_JOINS = frozenset(("Add", "Mul", "Concat"))
_POOLS = frozenset(("AveragePool", "GlobalAveragePool"))

_FUSED_WITH_GEMM = frozenset(
    ("LeakyRelu", "Sigmoid", "Tanh", "Elu", "HardSigmoid", "Selu", "Softplus", "Softsign", "ThresholdedRelu")
)
"""Activations that ONNX Runtime fuses with a Gemm in float before it looks for Q/DQ pairs; Relu is another one."""


@dataclass(frozen=True)
class Incomplete:
    """A tensor that needs a Q/DQ pair.

    Attributes:
        tensor: its name.
        reason: what for.
        like: whose range it can share at no loss: a QuantizeLinear, or the name of a tensor that gets a pair before it;
            None when the range has to be measured.
    """

    tensor: str
    reason: str
    like: NodeProto | str | None


def skip_joins_of_one(graph: Graph) -> int:
    """Take out Concat nodes of one tensor, as dense blocks begin with; returns how many there were."""
    found = [node for node in graph.nodes if node.op_type == "Concat" and len(node.input) == 1]
    found = [node for node in found if not graph.is_output(node.output[0])]
    for node in found:
        graph.redirect(node.output[0], node.input[0], graph.readers(node.output[0]))
        graph.remove(node)
    return len(found)


def keep_relus_apart(graph: Graph) -> int:
    """Write the Relu of an integer Gemm with a float result as Max(x, 0); returns how many there were.

    ONNX Runtime would fuse Gemm and Relu in float before it looks for Q/DQ pairs. No value changes.
    """
    found = 0
    for node in list(graph.nodes):
        if not _is_integer_gemm(graph, node):
            continue
        relu = graph.only_reader(node.output[0])
        behind = None if relu is None or relu.op_type != "Relu" else graph.only_reader(relu.output[0])
        if relu is None or relu.op_type != "Relu" or (behind is not None and behind.op_type == "QuantizeLinear"):
            continue
        zero = graph.shared_constant("relu_zero", np.array(0, np.float32))
        source, output = relu.input[0], relu.output[0]
        graph.remove(relu)
        graph.add_node("Max", [source, zero], output, like=relu)
        found += 1
    return found


def _is_integer_gemm(graph: Graph, node: NodeProto) -> bool:
    if node.op_type != "Gemm" or not is_dequantized(graph, node.input[0]):
        return False
    weight = graph.producer(node.input[1])
    return weight is not None and weight.op_type == "DequantizeLinear"


def incomplete_tensors(graph: Graph, *, activations: bool = True) -> list[Incomplete]:
    """Return the tensors that need a Q/DQ pair so that every integer kernel that can run does, in execution order.

    Args:
        graph: not changed.
        activations: also those around Sigmoid, HardSigmoid and LeakyRelu, which not every runtime runs in integers.
    """
    found: dict[str, Incomplete] = {}
    for node in graph.nodes:
        if activations:
            found |= {entry.tensor: entry for entry in _copies_of_integers(graph, node, found)}
        reason = _wants_integer_output(graph, node, found, activations=activations)
        if reason is None:
            continue
        tensor = _fused_output(graph, node)
        readers = graph.readers(tensor)
        if graph.is_output(tensor) or not all(reader.op_type == "QuantizeLinear" for reader in readers):
            found[tensor] = Incomplete(tensor, reason, _shared_range(graph, tensor))
    return list(found.values())


def incomplete_around_pools(graph: Graph) -> list[Incomplete]:
    """Return the tensors that need a Q/DQ pair so that OpenVINO's convolutions write integers wherever they can.

    Those are outputs that are rounded anyway, but only behind a max pool or a reshaping, and what a global pool reads.
    To be called when the global pools are written as such.
    """
    tensors = incomplete_tensors(graph, activations=False)
    return [entry for entry in tensors if entry.like is not None or _is_pooled(graph, entry.tensor)]


def _is_pooled(graph: Graph, tensor: str) -> bool:
    """Tell whether a tensor that is never negative ends in a global pool."""
    reader = graph.only_reader(tensor)
    return reader is not None and reader.op_type == "GlobalAveragePool" and is_nonnegative(graph, tensor)


def _copies_of_integers(graph: Graph, node: NodeProto, found: Mapping[str, Incomplete]) -> list[Incomplete]:
    """Return a node's results that are copies of integers and joined with others, as upsampled or shuffled ones are.

    Without a pair of their own they are no integers to the kernel that joins them.
    """
    if not copies_values(node):
        return []
    source = node.input[0]
    like = source if source in found else rounding_of(graph, source)
    if like is None:
        return []
    return [
        Incomplete(tensor, "copies of integers that are joined with others", like)
        for tensor in node.output
        if _is_joined(graph, tensor) and any(reader.op_type != "QuantizeLinear" for reader in graph.readers(tensor))
    ]


def _is_joined(graph: Graph, tensor: str) -> bool:
    """Tell whether a tensor or copies of it are added, multiplied or concatenated."""
    return any(
        reader.op_type in _JOINS or (copies_values(reader) and any(_is_joined(graph, name) for name in reader.output))
        for reader in graph.readers(tensor)
    )


def complete(graph: Graph, tensors: list[Incomplete], ranges: Mapping[str, Range]) -> None:
    """Insert the pairs, uint8 where the range is a measured one.

    Args:
        graph: edited.
        tensors: of `incomplete_tensors`.
        ranges: least and greatest value of every tensor that shares no range.
    """
    known: dict[str, tuple[str, str]] = {}
    for entry in tensors:
        if isinstance(entry.like, str):
            scale, zero_point = known[entry.like]
        elif entry.like is not None:
            scale, zero_point = entry.like.input[1], entry.like.input[2]
        else:
            step, zero = unsigned_parameters(
                *ranges[entry.tensor],
                nonnegative=is_nonnegative(graph, entry.tensor),
                bound=upper_bound(graph, entry.tensor),
            )
            scale = graph.add_constant(f"{entry.tensor}_scale", np.array(step, np.float32))
            zero_point = graph.shared_constant(f"zero_point_{zero}", np.array(zero, np.uint8))
        known[entry.tensor] = scale, zero_point
        _insert_pair(graph, entry.tensor, scale, zero_point)


def _insert_pair(graph: Graph, tensor: str, scale: str, zero_point: str) -> None:
    producer = graph.producer(tensor)
    if producer is None:
        return
    readers = [node for node in graph.readers(tensor) if node.op_type != "QuantizeLinear"]
    source, result = tensor, graph.fresh(f"{tensor}_dequantized")
    if graph.is_output(tensor):
        source, result = graph.fresh(f"{tensor}_float"), tensor
        graph.rename_output(producer, tensor, source)
        graph.redirect(tensor, source, [node for node in graph.readers(tensor) if node.op_type == "QuantizeLinear"])
    else:
        graph.redirect(tensor, result, readers)
    quantized = graph.fresh(f"{tensor}_quantized")
    graph.add_node("QuantizeLinear", [source, scale, zero_point], quantized, like=producer)
    graph.add_node("DequantizeLinear", [quantized, scale, zero_point], result, like=producer)


def _wants_integer_output(
    graph: Graph, node: NodeProto, found: Mapping[str, Incomplete], *, activations: bool
) -> str | None:
    """Say why a node's output has to be integer; None when it need not."""

    def integer(tensor: str) -> bool:
        return tensor in found or is_dequantized(graph, tensor)

    if node.op_type == "Conv":
        weight = graph.producer(node.input[1])
        ready = integer(node.input[0]) and weight is not None and weight.op_type == "DequantizeLinear"
        return "result of an INT8 convolution" if ready and not _embeds_patches(graph, node) else None
    if node.op_type == "Gemm" and _is_integer_gemm(graph, node):
        reader = graph.only_reader(node.output[0])
        return "INT8 Gemm before an activation" if reader is not None and reader.op_type in _FUSED_WITH_GEMM else None
    if node.op_type in _JOINS and len(node.input) > 1 and all(integer(name) for name in node.input):
        return f"result of {node.op_type} on integers"
    if node.op_type in _POOLS and integer(node.input[0]):
        return f"result of {node.op_type} on integers"
    if activations and could_be_convolution(graph, node) and integer(node.input[0]):
        return "BatchNormalization of integers" if _goes_on_in_integers(graph, node) else None
    if activations and node.op_type == "LeakyRelu" and integer(node.input[0]):
        return "result of LeakyRelu on integers"
    return f"{node.op_type} that multiplies integers" if activations and is_gate(graph, node, integer) else None


def _goes_on_in_integers(graph: Graph, node: NodeProto) -> bool:
    """Tell whether what reads a node's result has an integer kernel: only then is it worth a rounding."""
    integer = {"QuantizeLinear", "Sigmoid", "HardSigmoid", "LeakyRelu"} | _JOINS | _POOLS
    return any(reader.op_type in integer for reader in graph.readers(_fused_output(graph, node)))


def _embeds_patches(graph: Graph, convolution: NodeProto) -> bool:
    """Tell whether a convolution turns patches of the model's input into vectors that go on in float.

    So a vision transformer starts. What it writes is added up through all blocks, rounding and all, while its share of
    the products is about a hundredth: it had better run in float.
    """
    weight = graph.producer(convolution.input[1])
    shape = None if weight is None else graph.constant(weight.input[0])
    if shape is None and weight is not None and (quantize := graph.producer(weight.input[0])) is not None:
        shape = graph.constant(quantize.input[0])
    strides, pads = attribute(convolution, "strides"), attribute(convolution, "pads", [])
    if shape is None or strides is None or list(shape.shape[2:]) != list(strides) or max(strides) < 2 or any(pads):
        return False
    source = graph.producer(convolution.input[0])
    rounding = None if source is None else graph.producer(source.input[0])
    if rounding is None or graph.producer(rounding.input[0]) is not None:  # something comes before it
        return False
    tensor = convolution.output[0]
    ops = {reader.op_type for reader in graph.readers(tensor)}
    return bool(ops & (SHAPE_OPS | {"LayerNormalization"})) and _shared_range(graph, tensor) is None


def _fused_output(graph: Graph, node: NodeProto) -> str:
    """Return a node's output behind the activation that disappears in the rounding to unsigned integers."""
    reader = graph.only_reader(node.output[0])
    if reader is None:
        return str(node.output[0])
    if reader.op_type == "Relu" or (reader.op_type == "Clip" and clip_limits(graph, reader)[0] == 0):
        return str(reader.output[0])
    return str(node.output[0])


def _shared_range(graph: Graph, tensor: str) -> NodeProto | None:
    """Return a QuantizeLinear that all readers of a tensor lead to, where nothing is lost by quantizing as it does.

    That is one that reads the tensor itself, or stands behind max pools and reshapings of it, which commute with
    rounding.
    """
    for reader in graph.readers(tensor):
        if reader.op_type == "QuantizeLinear":
            return reader
    ahead = [_quantizer_ahead(graph, reader) for reader in graph.readers(tensor)]
    if not ahead or graph.is_output(tensor) or any(node is None for node in ahead):
        return None
    parameters = {(node.input[1], node.input[2]) for node in ahead if node is not None}
    return ahead[0] if len(parameters) == 1 else None


def _quantizer_ahead(graph: Graph, node: NodeProto) -> NodeProto | None:
    if node.op_type == "QuantizeLinear":
        return node
    if not copies_values(node):
        return None
    reader = graph.only_reader(node.output[0])
    return None if reader is None else _quantizer_ahead(graph, reader)
