"""What sets of layers are estimated to save, on an excerpt of a real engine and on engines written by hand."""

import pytest
from blame_engines import real, receipt

from maseRT.blame.kernels import KernelGraph, timed_together
from maseRT.blame.savings import Savings


def savings(quantized, float_):
    together = timed_together(quantized, float_)
    return Savings(quantized, KernelGraph(quantized, together), KernelGraph(float_, together), together)


def test_with_all_layers_float_it_is_the_float_engine():
    quantized, float_ = real("mobilenetv3.json")
    found = savings(quantized, float_)
    left_ms = found.total_ms - found.saved(found.int8)
    assert left_ms == pytest.approx(sum(kernel.ms for kernel in float_.kernels))


def test_a_conversion_vanishes_with_the_layer_that_reads_its_result():
    """A depthwise layer without an INT8 kernel is dequantized for; the layer before it can write FP16 itself."""
    found = savings(*real("mobilenetv3.json"))
    assert found.saved({"features.4.block.1.0"}) == pytest.approx(0.0195 + 0.0206 - 0.0286)


def between(reads, ms):
    """Return engines of two INT8 layers with a conversion between them, and without in float."""
    kernels = [
        ("a", "in", "x", "int8>int8", 0.1),
        ("convert", "x", "y", reads, ms),
        ("b", "y", "out", "int8>fp16", 0.1),
        ("rest", "out", "end", "fp16>int8", 0.1),
        ("other", "end", "last", "int8>fp16", 0.1),
    ]
    floats = [("a", "in", "x", "fp16>fp16", 0.1), ("b", "x", "out", "fp16>fp16", 0.1)]
    floats += [("rest", "out", "end", "fp16>fp16", 0.1), ("other", "end", "last", "fp16>fp16", 0.1)]
    asked = {"a": "int8", "b": "int8", "rest": "fp16", "other": "int8"}
    return receipt(asked, kernels), receipt(dict.fromkeys(asked, "fp16"), floats)


def test_the_writer_of_a_converted_tensor_does_not_end_the_conversion():
    found = savings(*between("int8>int8", 0.05))
    assert found.saved({"a"}) == pytest.approx(0.0)
    assert found.saved({"b"}) == pytest.approx(0.05)


def test_a_change_between_float_types_needs_all_layers_around_it():
    found = savings(*between("fp16>fp16", 0.05))
    assert found.saved({"b"}) == pytest.approx(0.0)
    assert found.saved({"a", "b"}) == pytest.approx(0.05)


def test_a_tensor_of_which_one_reader_stays_int8_is_quantized_by_a_kernel():
    kernels = [
        ("convert", "in", "q", "fp32>int8", 0.02),
        ("a", "q", "x", "int8>int8", 0.1),
        ("b", "x", "y", "int8>fp16", 0.3),
        ("c", "x", "z", "int8>fp16", 0.3),
    ]
    floats = [(layer, reads, writes, "fp16>fp16", 0.1) for layer, reads, writes, *_ in kernels[1:]]
    names = ("a", "b", "c")
    found = savings(receipt(dict.fromkeys(names, "int8"), kernels), receipt(dict.fromkeys(names, "fp16"), floats))
    assert found.saved({"b"}) == pytest.approx(0.2 - 0.02)
    assert found.saved({"c"}, {"b"}) == pytest.approx(0.2 + 0.02)
    assert found.saved({"b", "c"}) == pytest.approx(0.4)


def test_an_int8_tensor_may_reach_its_reader_through_a_float_layer():
    kernels = [
        ("a", "in", "x", "int8>int8", 0.2),
        ("pool", "x", "p", "int8>int8", 0.1),
        ("b", "p", "out", "int8>fp16", 0.1),
        ("convert", "out", "end", "fp16>fp32", 0.03),
    ]
    floats = [(layer, reads, writes, "fp16>fp16", 0.1) for layer, reads, writes, *_ in kernels[:3]]
    asked = {"a": "int8", "pool": "fp16", "b": "int8"}
    found = savings(receipt(asked, kernels), receipt(dict.fromkeys(asked, "fp16"), floats))
    assert found.saved({"a"}) == pytest.approx(0.1 - 0.03)


def test_a_difference_that_no_layer_causes_is_that_of_all():
    quantized, float_ = between("int8>int8", 0.05)
    kernels = [
        *(
            (k.layer or "convert", k.inputs[0], k.outputs[0], f"{k.reads[0]}>{k.writes[0]}", k.ms)
            for k in quantized.kernels
        )
    ]
    asked = {layer.name: layer.asked for layer in quantized.layers}
    copying = receipt(asked, [*kernels, ("convert", "far", "away", "fp32>fp16", 0.07)])
    found = savings(copying, float_)
    assert found.saved({"a", "b"}) == pytest.approx(0.05)
    assert found.saved({"a", "b", "other"}) == pytest.approx(0.05 + 0.07)
