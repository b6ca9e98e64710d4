"""What real tensorrt-rtx engines execute, as their build's log tells it."""

import json

import numpy as np
import pytest
from onnx import TensorProto

from maseRT.runtimes import get_compiler
from maseRT.runtimes.base import BatchRange, BuildOptions
from maseRT.runtimes.trt.layers import executed, layers_from_json
from maseRT.runtimes.trt.onnx_facts import read_onnx


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
    assert convolution.precision == "int8"


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


@pytest.fixture
def built(onnx_file, tmp_path):
    def built(nodes, **options):
        target = BuildOptions(batch=BatchRange(1, 4, 8), compute_capability="8.9")
        return get_compiler("tensorrt-rtx").build(onnx_file(nodes, **options), tmp_path / "model.trt", target).layers

    return built


def test_a_recurrent_layer_is_observed_although_its_products_have_no_names(built):
    rng = np.random.default_rng(0)
    constants = {name: rng.normal(size=(1, 32, 8)).astype(np.float32) for name in ("w", "r")}
    nodes = [("LSTM", ["input", "w", "r"], "output", "lstm", {"hidden_size": 8})]
    assert executed(built(nodes, shape=(3, 2, 8), constants=constants), "lstm") == "fp32"


def test_casts_inside_a_generated_kernel_are_not_taken_for_a_mismatch(built):
    """The kernel reads and writes FP32 and computes in FP16, which nothing in the engine shows."""
    half, full = {"to": TensorProto.FLOAT16}, {"to": TensorProto.FLOAT}
    nodes = [
        ("Cast", ["input"], "h", "act", half),
        ("Sigmoid", ["h"], "s", "act", {}),
        ("Cast", ["s"], "output", "act", full),
    ]
    assert executed(built(nodes), "act") == "not observed"


def test_what_follows_a_fused_qdq_pair_is_computed_in_float(built):
    scale = {"scale": np.array(0.1, np.float32), "zero": np.array(0, np.int8)}
    nodes = [
        ("QuantizeLinear", ["input", "scale", "zero"], "q", "act.input_quantizer", {}),
        ("DequantizeLinear", ["q", "scale", "zero"], "d", "act.input_quantizer", {}),
        ("Sigmoid", ["d"], "output", "act", {}),
    ]
    assert executed(built(nodes, constants=scale), "act") == "fp32"


def test_an_int8_pool_is_int8(built):
    scale = {"scale": np.array(0.1, np.float32), "zero": np.array(0, np.int8)}
    pairs = [
        (op, [tensor, "scale", "zero"], output, f"pool.{which}", {})
        for tensor, output, which, op in (
            ("input", "q", "input_quantizer", "QuantizeLinear"),
            ("q", "d", "input_quantizer", "DequantizeLinear"),
            ("p", "q2", "next_quantizer", "QuantizeLinear"),
            ("q2", "output", "next_quantizer", "DequantizeLinear"),
        )
    ]
    pool = ("MaxPool", ["d"], "p", "pool", {"kernel_shape": [2, 2], "strides": [2, 2]})
    nodes = [*pairs[:2], pool, *pairs[2:]]
    assert executed(built(nodes, shape=("batch", 16, 8, 8), constants=scale), "pool") == "int8"


def test_what_has_no_name_is_not_taken_for_a_conversion(built):
    rng = np.random.default_rng(0)
    constants = {name: rng.normal(size=(1, 32, 8)).astype(np.float32) for name in ("w", "r")}
    layers = built(
        [("LSTM", ["input", "w", "r"], "output", "lstm", {"hidden_size": 8})], shape=(3, 2, 8), constants=constants
    )
    products = [layer for layer in layers if layer.type == "gemm"]
    assert products
    assert not any(layer.converts_only for layer in products)


def test_only_a_products_kernel_tells_how_it_runs(layers):
    scaling = [each for each in layers if "node_conv2d_1" in each.nodes and each.type == "kgen"]
    assert scaling
    assert executed(layers, "body", ["node_conv2d_1"]) == "int8"
    assert executed(scaling, "body", ["node_conv2d_1"]) == "not observed"


def _tensor(name, kind):
    return {"Name": name, "Dimensions": [64, 4], "Format/Datatype": f"Row major linear {kind}"}


@pytest.mark.parametrize("copied", [False, True], ids=["directly", "through a copy"])
def test_what_a_myelin_layer_of_tensorrt_8_hides_is_found_between_its_ends(onnx_file, copied):
    """Its name tells the first weight and the last operation, here a cast: no reason to take it for a conversion."""
    weights = {name: np.eye(4, dtype=np.float32) for name in ("stem.weight", "norm.weight", "head.weight")}
    nodes = [
        ("MatMul", ["input", "stem.weight"], "stem", "stem", {}),
        ("Mul", ["stem", "norm.weight"], "norm", "norm", {}),
        ("MatMul", ["norm", "head.weight"], "head", "head", {}),
        ("Cast", ["head"], "output", "", {"to": TensorProto.FLOAT}),
    ]
    origin = read_onnx(onnx_file(nodes, constants=weights)).origin
    first, *_, last = origin.ops
    named = {"Metadata": "", "TacticName": ""}
    copy = _tensor("Reformatted Input Tensor 0 to {ForeignNode}", "FP16")
    raw = [
        {
            "Name": first,
            "LayerType": "gemm",
            "Inputs": [_tensor("input", "FP16")],
            "Outputs": [_tensor("stem", "FP16")],
        },
        {"Name": "copy", "LayerType": "Reformat", "Inputs": [_tensor("stem", "FP16")], "Outputs": [copy]},
        {
            "Name": f"{{ForeignNode[norm.weight...{last}]}}",
            "LayerType": "Myelin",
            "Inputs": [copy if copied else _tensor("stem", "FP16")],
            "Outputs": [_tensor("output", "FP32")],
        },
    ]
    layers = layers_from_json(json.dumps({"Layers": [{**named, **each} for each in raw]}), origin)
    myelin = layers[-1]
    assert (myelin.onnx_layers, myelin.owners, myelin.converts_only) == (("norm", "head"), ("head",), False)
    assert [executed(layers, layer) for layer in ("stem", "norm", "head")] == ["fp16", "not observed", "not observed"]
