"""Signed activations made unsigned: ONNX Runtime's CPU kernels multiply uint8 by int8, and hardly any int8 by int8."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from maseRT.onnxrt.bounds import is_nonnegative, upper_bound
from maseRT.onnxrt.graph import Graph
from maseRT.onnxrt.qdq import symmetric_pairs

_LEVELS = 255


@dataclass(frozen=True)
class Unsigned:
    """What became of the activations' Q/DQ pairs.

    Attributes:
        refined: tensors that are never negative: zero point 0, and steps of amax / 255 instead of amax / 127.
        shifted: the other ones: zero point 128, the same step and the same values.
    """

    refined: tuple[str, ...]
    shifted: tuple[str, ...]


def make_unsigned(graph: Graph) -> Unsigned:
    """Turn every symmetric int8 Q/DQ pair of an activation into uint8."""
    refined: list[str] = []
    shifted: list[str] = []
    # Asked before anything changes: a pair that is already unsigned would hide what lies behind it.
    pairs = [(node, is_nonnegative(graph, node.input[0])) for node in symmetric_pairs(graph)]
    for node, nonnegative in pairs:
        scale = graph.constant(node.input[1])
        if scale is None:
            continue
        (refined if nonnegative else shifted).append(node.input[0])
        readers = graph.readers(node.output[0])
        name = node.input[1]
        if nonnegative:
            amax = float(scale.reshape(())) * 127
            step = unsigned_step(amax, upper_bound(graph, node.input[0]))
            name = graph.shared_constant(f"{node.input[1]}_unsigned", np.array(step, scale.dtype))
        zero_point = graph.shared_constant("zero_point_0" if nonnegative else "zero_point_128", _zero(nonnegative))
        for pair_node in (node, *readers):
            graph.set_input(pair_node, 1, name)
            graph.set_input(pair_node, 2, zero_point)
    return Unsigned(tuple(refined), tuple(shifted))


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


def _zero(nonnegative: bool) -> np.ndarray[tuple[()], np.dtype[np.uint8]]:
    return np.array(0 if nonnegative else 128, np.uint8)
