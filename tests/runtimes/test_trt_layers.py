"""What real tensorrt-rtx engines execute, as their build's log tells it."""

import pytest

from maseRT.runtimes import get_compiler
from maseRT.runtimes.base import BatchRange, BuildOptions
from maseRT.runtimes.trt.layers import executed, precision


@pytest.fixture(scope="module")
def layers(mixed_engine):
    return mixed_engine[1].layers


@pytest.mark.parametrize(
    ("layer", "how"),
    [
        ("stem", "int8"),
        ("body", "int8"),
        ("halved", "fp16"),
        ("full", "fp32"),
        ("pool", "fp32"),
        ("head", "fp32"),
        ("nothing", "not observed"),
    ],
)
def test_each_torch_layer_is_told_as_it_runs(layers, layer, how):
    assert executed(layers, layer) == how


def test_a_convolution_is_one_engine_layer_with_its_tensors(layers):
    own = [layer for layer in layers if "body" in layer.owners and "node_conv2d_1" in layer.name]
    assert len(own) == 1
    convolution = own[0]
    assert [tensor.dtype for tensor in convolution.inputs] == ["int8"]
    assert convolution.inputs[0].shape[-2:] == (8, 8)
    assert "NHWC" in convolution.inputs[0].format
    assert any(tensor.dtype == "int8" and tensor.shape == (16, 16, 3, 3) for tensor in convolution.constants)
    assert convolution.tactic
    assert "node_conv2d_1" in convolution.nodes
    assert precision(convolution) == "int8"


def test_the_engine_starts_at_the_input_and_ends_at_the_output(layers):
    assert any(tensor.name == "input" and tensor.shape == (-1, 1, 8, 8) for each in layers for tensor in each.inputs)
    assert [tensor.name for tensor in layers[-1].outputs] == ["output"]


def test_quantizers_are_not_taken_for_layers(layers):
    named = {name for layer in layers for name in layer.onnx_layers}
    assert {"stem", "body", "halved", "full", "head"} <= named
    assert not any("quantizer" in name for name in named)


def test_what_only_converts_is_marked(layers):
    assert all(not layer.onnx_layers for layer in layers if layer.converts_only)
    assert all(not layer.converts_only for layer in layers if layer.owners)


def test_an_activation_that_is_fused_names_its_host(linear_onnx, tmp_path):
    options = BuildOptions(batch=BatchRange(1, 4, 8), compute_capability="8.9")
    built = get_compiler("tensorrt-rtx").build(linear_onnx, tmp_path / "model.trt", options).layers
    assert executed(built, "head") == "fp32"
    assert executed(built, "act") == "fused into head"
