"""The forms of one exported model: each target gets the quantized model the way its kernels like it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import ModelProto

from maseRT.onnxrt.biases import make_room_for_biases, quantize_biases, write_biases_apart
from maseRT.onnxrt.completion import (
    Incomplete,
    complete,
    incomplete_around_pools,
    incomplete_tensors,
    keep_relus_apart,
    skip_joins_of_one,
)
from maseRT.onnxrt.factors import absorb_channel_factors
from maseRT.onnxrt.gates import add_hardsigmoids, use_leaky_relus, write_out_hardswishes
from maseRT.onnxrt.graph import Graph
from maseRT.onnxrt.norms import write_batchnorms_as_convolutions
from maseRT.onnxrt.pads import absorb_pads
from maseRT.onnxrt.pools import divide_by_what_is_there, use_global_pools
from maseRT.onnxrt.slow_kernels import compute_in_float
from maseRT.onnxrt.unsigned import (
    Range,
    keep_the_rounding_before_copies,
    make_unsigned,
    refine_nonnegative,
    share_the_steps_of_concatenations,
    signed_tensors,
)
from maseRT.onnxrt.weights import look_up_integers, round_float_weights, store_weights_as_int8, transpose_weights

RangesOf = Callable[[ModelProto, Sequence[str]], Mapping[str, Range]]
"""Measures the least and greatest value of tensors in a model on calibration data."""


@dataclass(frozen=True)
class Form:
    """A model made for a target, and everything in it that computes something else than the exported model.

    Attributes:
        refined: activations that are never negative, now in 255 steps instead of 127 over the same range.
        fitted: signed activations that fill their range unevenly, now in 255 steps over what the data fill of it.
        shifted: activations with the same values in other integers.
        added: activations that are newly rounded, and why; with their ranges where these were measured.
        int8_weights: weights stored as integers; no value changes.
        rounded_weights: weights stored as float numbers on the INT8 grid, for kernels that only exist in float.
        rounded_biases: the kernels add the biases of INT8 products as int32.
        int32_biases: biases of matrix products with a float result, stored as int32.
        coarsened_channels: weight channels next to zero, with larger steps so that their bias fits into int32.
        global_pools: means over all positions written as global pools; the sums are the same but for their order.
        copied: activations that are copies or maxima of rounded ones, and now have their steps: no rounding is left.
        joined: activations in the steps in which their concatenation is rounded: once, instead of twice.
        float_convolutions: results of convolutions that read floats, since the integer kernel is slower.
        batchnorms: BatchNorms written as convolutions of integers.
        widened: what is FP16 in the exported model is FP32: CPUs compute half no faster.
    """

    refined: tuple[str, ...] = ()
    fitted: tuple[str, ...] = ()
    shifted: tuple[str, ...] = ()
    added: tuple[tuple[str, str, Range | None], ...] = ()
    int8_weights: int = 0
    rounded_weights: int = 0
    rounded_biases: bool = False
    int32_biases: int = 0
    coarsened_channels: int = 0
    global_pools: int = 0
    copied: tuple[str, ...] = ()
    joined: tuple[str, ...] = ()
    float_convolutions: tuple[str, ...] = ()
    batchnorms: int = 0
    widened: bool = False

    def changes(self) -> list[str]:
        """Say in sentences what the numbers of this form differ in from those of the symmetric one."""
        said = ["what is FP16 in the exported model is FP32"] if self.widened else []
        for count, noun, change in (
            (len(self.refined), "activation", ", never negative: 255 steps of amax / 255 instead of 127 of amax / 127"),
            (
                len(self.fitted),
                "signed activation",
                ": 255 steps where the calibration data lie, instead of over the symmetric range",
            ),
            (len(self.added), "more activation", ": rounded to uint8, for integer kernels on both sides"),
            (len(self.copied), "activation", " behind a copy or maximum of rounded ones: not rounded again"),
            (
                len(self.joined),
                "concatenated activation",
                ": rounded once, in the steps of the result",
            ),
            (len(self.float_convolutions), "3-D convolution", " of few channels: in float, where the kernel is faster"),
            (self.coarsened_channels, "weight channel", " next to zero: larger steps, for the bias"),
        ):
            if count:
                said.append(f"{count} {noun}{'' if count == 1 else 's'}{change}")
        if self.rounded_biases:
            said.append("the biases of INT8 products are rounded to int32, in steps of input step x weight step")
        return said

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "changes": self.changes(),
            "refined": list(self.refined),
            "fitted": list(self.fitted),
            "shifted": list(self.shifted),
            "added": [{"tensor": t, "reason": r, "range": list(ends) if ends else None} for t, r, ends in self.added],
            "int8_weights": self.int8_weights,
            "rounded_weights": self.rounded_weights,
            "rounded_biases": self.rounded_biases,
            "int32_biases": self.int32_biases,
            "coarsened_channels": self.coarsened_channels,
            "global_pools": self.global_pools,
            "copied": list(self.copied),
            "joined": list(self.joined),
            "float_convolutions": list(self.float_convolutions),
            "batchnorms": self.batchnorms,
            "widened": self.widened,
        }


def openvino_form(model: ModelProto, ranges_of: RangesOf) -> tuple[ModelProto, Form]:
    """Return the model in the form that OpenVINO's CPU plugin has integer kernels for.

    It keeps signed activations symmetric, but for what is concatenated: a zero point that is not 0 costs time there.

    Args:
        model: exported, with symmetric int8 Q/DQ pairs; not changed.
        ranges_of: measures the tensors that need a range of their own.
    """
    graph, pools = _prepared(model)
    tensors = incomplete_around_pools(graph)
    ranges = _measured(graph, tensors, [], ranges_of)
    complete(graph, tensors, ranges)
    refined = refine_nonnegative(graph)
    stored = store_weights_as_int8(graph)
    joined = avoid_errors_of_openvino(graph)
    return graph.finish(), Form(
        refined=refined,
        joined=joined,
        added=_described(tensors, ranges),
        int8_weights=stored,
        global_pools=pools,
    )


def avoid_errors_of_openvino(graph: Graph) -> tuple[str, ...]:
    """Rewrite what OpenVINO's CPU plugin computes wrongly in a quantized model; to be called last.

    Returns the activations that are rounded once instead of twice by it.
    """
    joined = share_the_steps_of_concatenations(graph)
    write_biases_apart(graph)
    return joined


def cpu_form(model: ModelProto, ranges_of: RangesOf) -> tuple[ModelProto, Form]:
    """Return the model in the form that ONNX Runtime's CPU provider has integer kernels for.

    Args:
        model: exported, with symmetric int8 Q/DQ pairs; not changed.
        ranges_of: measures the tensors that need a range of their own.
    """
    graph, pools = _prepared(model)
    absorb_channel_factors(graph)
    use_leaky_relus(graph)
    write_out_hardswishes(graph)
    slow = compute_in_float(graph)
    divide_by_what_is_there(graph)
    graph = _reopened(graph)
    tensors = incomplete_tensors(graph)
    ranges = _measured(graph, tensors, signed_tensors(graph), ranges_of)
    complete(graph, tensors, ranges)
    unsigned = make_unsigned(graph, ranges)
    copied = keep_the_rounding_before_copies(graph)
    graph = _reopened(graph)
    norms = write_batchnorms_as_convolutions(graph)
    coarsened = make_room_for_biases(graph)
    keep_relus_apart(graph)
    biases = quantize_biases(graph)
    stored = store_weights_as_int8(graph)
    look_up_integers(graph)
    rounded = round_float_weights(graph)
    transpose_weights(graph)
    add_hardsigmoids(graph)
    return graph.finish(), Form(
        refined=unsigned.refined,
        fitted=unsigned.fitted,
        shifted=unsigned.shifted,
        added=_described(tensors, ranges),
        int8_weights=stored - rounded,
        rounded_weights=rounded,
        rounded_biases=stored > 0,
        int32_biases=biases,
        coarsened_channels=coarsened,
        global_pools=pools,
        copied=copied,
        float_convolutions=slow,
        batchnorms=norms,
    )


def _prepared(model: ModelProto) -> tuple[Graph, int]:
    """Return a copy with global pools and paddings as kernels know them, and how many pools were written anew."""
    graph = Graph(onnx.shape_inference.infer_shapes(model))
    pools = use_global_pools(graph)
    skip_joins_of_one(graph)
    absorb_pads(graph)
    return Graph(graph.finish()), pools


def _reopened(graph: Graph) -> Graph:
    """Return the edited graph with the ranks of its tensors."""
    return Graph(onnx.shape_inference.infer_shapes(graph.finish()))


def _measured(
    graph: Graph, tensors: Sequence[Incomplete], others: Sequence[str], ranges_of: RangesOf
) -> Mapping[str, Range]:
    unknown = list(dict.fromkeys([*(entry.tensor for entry in tensors if entry.like is None), *others]))
    return ranges_of(graph.finish(), unknown) if unknown else {}


def _described(tensors: Sequence[Incomplete], ranges: Mapping[str, Range]) -> tuple[tuple[str, str, Range | None], ...]:
    return tuple((e.tensor, e.reason, ranges.get(e.tensor) if e.like is None else None) for e in tensors)
