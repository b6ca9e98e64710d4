"""Zero padding in front of a convolution as the convolution's own: exact, since zero is an integer of every range."""

from __future__ import annotations

from onnx import NodeProto, helper

from maseRT.onnxrt.graph import Graph, attribute


def absorb_pads(graph: Graph) -> int:
    """Turn Pad -> Q -> DQ -> Conv into Q -> DQ -> Conv with more padding; returns how many there were.

    TensorFlow's "same" padding is uneven where the stride is 2, so that ported models pad outside the convolution.
    """
    absorbed = 0
    for pad in [node for node in graph.nodes if node.op_type == "Pad"]:
        convolutions = _convolutions_behind(graph, pad)
        amounts = _spatial_zeros(graph, pad)
        if not convolutions or amounts is None:
            continue
        for convolution in convolutions:
            before = list(attribute(convolution, "pads", [0] * len(amounts)))
            _set(convolution, "pads", [a + b for a, b in zip(before, amounts, strict=True)])
        graph.redirect(pad.output[0], pad.input[0], graph.readers(pad.output[0]))
        graph.remove(pad)
        absorbed += 1
    return absorbed


def _convolutions_behind(graph: Graph, pad: NodeProto) -> list[NodeProto]:
    """Return the convolutions that read a padded tensor, through one Q/DQ pair; empty if anything else reads it."""
    quantize = graph.only_reader(pad.output[0])
    if quantize is None or quantize.op_type != "QuantizeLinear":
        return []
    found = []
    for dequantize in graph.readers(quantize.output[0]):
        readers = graph.readers(dequantize.output[0]) if dequantize.op_type == "DequantizeLinear" else []
        if not readers or not all(_takes_padding(node, dequantize.output[0]) for node in readers):
            return []
        found += readers
    return found


def _takes_padding(node: NodeProto, tensor: str) -> bool:
    return node.op_type == "Conv" and node.input[0] == tensor and attribute(node, "auto_pad", b"NOTSET") == b"NOTSET"


def _spatial_zeros(graph: Graph, pad: NodeProto) -> list[int] | None:
    """Return the padding of the spatial axes as a convolution has it, if it is constant, by zeros and nowhere else."""
    if attribute(pad, "mode", b"constant") != b"constant" or (len(pad.input) > 3 and pad.input[3]):
        return None
    amounts = graph.constant(pad.input[1])
    value = graph.constant(pad.input[2]) if len(pad.input) > 2 and pad.input[2] else None
    if amounts is None or (len(pad.input) > 2 and pad.input[2] and (value is None or value.any())):
        return None
    whole = [int(amount) for amount in amounts]
    rank = len(whole) // 2
    begins, ends = whole[:rank], whole[rank:]
    if any((*begins[:2], *ends[:2])) or min(whole) < 0:
        return None
    return [*begins[2:], *ends[2:]]


def _set(node: NodeProto, name: str, value: list[int]) -> None:
    for entry in [entry for entry in node.attribute if entry.name == name]:
        node.attribute.remove(entry)
    node.attribute.append(helper.make_attribute(name, value))
