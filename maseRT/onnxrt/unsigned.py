"""Activations made unsigned: all 255 steps for those that are never negative, and what kernels of uint8 need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto

from maseRT.onnxrt.bounds import copies_values, is_nonnegative, upper_bound
from maseRT.onnxrt.graph import Graph
from maseRT.onnxrt.qdq import is_dequantized, rounding_of, scale_of, symmetric_pairs

_LEVELS = 255
_CLEARLY_LESS = 0.95
"""The share of a symmetric range that data fill, above which it stays as it is."""

Range = tuple[float, float]


@dataclass(frozen=True)
class Unsigned:
    """What became of the activations' Q/DQ pairs.

    Attributes:
        refined: tensors that are never negative: zero point 0, and steps of amax / 255 instead of amax / 127.
        fitted: signed ones whose data fill their range unevenly: it shrinks to what the data fill, in 255 steps.
        shifted: the other ones: zero point 128, the same step and the same values.
    """

    refined: tuple[str, ...]
    fitted: tuple[str, ...]
    shifted: tuple[str, ...]


def signed_tensors(graph: Graph) -> list[str]:
    """Return the activations with symmetric int8 pairs that may be negative: their ranges are worth measuring."""
    tensors = (node.input[0] for node in symmetric_pairs(graph))
    return [tensor for tensor in dict.fromkeys(tensors) if not is_nonnegative(graph, tensor)]


def refine_nonnegative(graph: Graph) -> tuple[str, ...]:
    """Turn the symmetric int8 pairs of activations that are never negative into uint8; returns these.

    OpenVINO wants no more than that: it multiplies int8 by int8 as well, and zero points are work for it.
    """
    # Asked before anything changes: a pair that is already unsigned would hide what lies behind it.
    pairs = [node for node in symmetric_pairs(graph) if is_nonnegative(graph, node.input[0])]
    for node in pairs:
        _refine(graph, node)
    return tuple(node.input[0] for node in pairs)


def make_unsigned(graph: Graph, ranges: Mapping[str, Range]) -> Unsigned:
    """Turn every symmetric int8 Q/DQ pair of an activation into uint8.

    ONNX Runtime's CPU kernels multiply uint8 by int8, and hardly any int8 by int8.

    Args:
        graph: edited.
        ranges: least and greatest value of the signed activations; a pair keeps its range without one.
    """
    signed = set(signed_tensors(graph))
    refined = refine_nonnegative(graph)
    fitted: list[str] = []
    shifted: list[str] = []
    pairs = [node for node in symmetric_pairs(graph) if node.input[0] in signed]
    shared = _ranges_by_scale(pairs, ranges)
    for node in pairs:
        name = node.input[1]
        scale = scale_of(graph, node)
        fit = _fit(shared.get(name), float(scale) * 127)
        if fit is not None:
            fitted.append(node.input[0])
            step, zero = fit
            name = graph.shared_constant(f"{name}_fitted", np.array(step, scale.dtype))
            _requantize(graph, node, name, zero)
        else:
            shifted.append(node.input[0])
            _requantize(graph, node, name, 128)
    return Unsigned(refined, tuple(fitted), tuple(shifted))


def keep_the_rounding_before_copies(graph: Graph) -> tuple[str, ...]:
    """Give the Q/DQ pairs of copies of rounded values the parameters of these; returns the activations that had others.

    Copies, and maxima, of integers are integers: there is nothing to round. Data give them other parameters where the
    extreme was not taken along, and then a max pool or a split runs in float. To be called when all pairs are unsigned.
    """
    changed = []
    for node in [node for node in graph.nodes if copies_values(node) and is_dequantized(graph, node.input[0])]:
        source = graph.producer(node.input[0])
        for tensor in node.output:
            readers = graph.readers(tensor)
            if source is None or graph.is_output(tensor) or any(each.op_type != "QuantizeLinear" for each in readers):
                continue
            others = [each for each in readers if list(each.input[1:]) != list(source.input[1:])]
            for quantize in others:
                _share(graph, quantize, source.input[1], source.input[2])
            changed += [tensor] if others else []
    return tuple(changed)


def share_the_steps_of_concatenations(graph: Graph) -> tuple[str, ...]:
    """Give what is concatenated the steps in which the result is rounded; returns the activations that had others.

    They end in these steps anyway, and are rounded once instead of twice; floats are rounded before they are joined, as
    OpenVINO does by itself. Where any is negative, all become uint8 with zero point 128: with int8 ones, what OpenVINO
    2026.4 computes of a U-Net is wrong by half. To be called when all pairs have their final types.
    """
    changed: list[str] = []
    for node in [node for node in graph.nodes if node.op_type == "Concat" and not graph.is_output(node.output[0])]:
        readers = graph.readers(node.output[0])
        sources = [rounding_of(graph, name) for name in node.input]
        parameters = {tuple(reader.input[1:3]) for reader in readers}
        rounded = all(reader.op_type == "QuantizeLinear" for reader in readers)
        if not rounded or len(parameters) != 1:
            continue
        scale, zero_point = parameters.pop()
        changed += [source.input[0] for source in sources if source is not None and source.input[1] != scale]
        zero = graph.constant(zero_point)
        if zero is not None and zero.dtype == np.int8:
            zero_point = graph.shared_constant("zero_point_128", np.array(128, np.uint8))
        for quantize in readers:
            _share(graph, quantize, scale, zero_point)
        for index, source in enumerate(sources):
            tensor = node.input[index] if source is None else source.input[0]
            graph.set_input(node, index, _another_pair(graph, tensor, scale, zero_point, like=node))
    return tuple(changed)


def _another_pair(graph: Graph, tensor: str, scale: str, zero_point: str, *, like: NodeProto) -> str:
    """Return a tensor behind a new pair; one that it has may have other readers."""
    integers, result = graph.fresh(f"{tensor}_joined"), graph.fresh(f"{tensor}_joined_dequantized")
    graph.add_node("QuantizeLinear", [tensor, scale, zero_point], integers, like=like)
    graph.add_node("DequantizeLinear", [integers, scale, zero_point], result, like=like)
    return result


def _share(graph: Graph, quantize: NodeProto, scale: str, zero_point: str) -> None:
    for each in (quantize, *graph.readers(quantize.output[0])):
        graph.set_input(each, 1, scale)
        graph.set_input(each, 2, zero_point)


def _refine(graph: Graph, node: NodeProto) -> None:
    scale = scale_of(graph, node)
    step = unsigned_step(float(scale) * 127, upper_bound(graph, node.input[0]))
    _requantize(graph, node, graph.shared_constant(f"{node.input[1]}_unsigned", np.array(step, scale.dtype)), 0)


def _requantize(graph: Graph, node: NodeProto, scale: str, zero: int) -> None:
    """Give a QuantizeLinear and what reads it another scale and a uint8 zero point."""
    zero_point = graph.shared_constant(f"zero_point_{zero}", np.array(zero, np.uint8))
    for pair_node in (node, *graph.readers(node.output[0])):
        graph.set_input(pair_node, 1, scale)
        graph.set_input(pair_node, 2, zero_point)


def _ranges_by_scale(pairs: list[NodeProto], ranges: Mapping[str, Range]) -> dict[str, Range]:
    """Return one range per scale: pairs that share one, such as those around a max pool, go on sharing it."""
    found: dict[str, Range] = {}
    for node in pairs:
        if node.input[0] in ranges:
            low, high = ranges[node.input[0]]
            before = found.get(node.input[1], (low, high))
            found[node.input[1]] = min(low, before[0]), max(high, before[1])
    return found


def _fit(measured: Range | None, amax: float) -> tuple[np.float32, int] | None:
    """Return the step and the zero point of what data fill of [-amax, amax], where that is clearly less than all."""
    if measured is None:
        return None
    low, high = max(measured[0], -amax), min(measured[1], amax)
    if high - low > _CLEARLY_LESS * 2 * amax:
        return None
    return unsigned_parameters(low, high, nonnegative=False, bound=None)


def unsigned_parameters(low: float, high: float, *, nonnegative: bool, bound: float | None) -> tuple[np.float32, int]:
    """Return the step and the zero point of a range in uint8; the range is widened to hold zero exactly."""
    if nonnegative or low >= 0:
        return unsigned_step(high if high > 0 else 1.0, bound), 0
    low, high = min(low, 0.0), max(high, 0.0)
    step = np.float32((high - low) / _LEVELS)
    return step, int(np.clip(np.rint(-low / step), 0, _LEVELS))


def unsigned_step(amax: float, bound: float | None) -> np.float32:
    """Return the step of [0, amax] in uint8, as float32.

    Where values never exceed a bound, the range ends there at the latest, and not a rounding above it: only then does
    ONNX Runtime see that a ReLU6 before the QuantizeLinear does nothing any more.
    """
    limit = amax if bound is None or bound <= 0 else min(amax, bound)
    step = np.float32(limit / _LEVELS)
    while bound is not None and bound > 0 and step * np.float32(_LEVELS) > np.float32(bound):
        step = np.nextafter(step, np.float32(0))
    return step
