"""ONNX Runtime's quantizers on our exports, and FP16 by tolerance."""

from functools import partial

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from maseRT.config import ModelSection
from maseRT.errors import StepError
from maseRT.models.build import build_model
from maseRT.onnx_export import export_onnx
from maseRT.onnxrt.graph import Graph
from maseRT.onnxrt.kernels import kernels_of
from maseRT.onnxrt.mixed import auto_mixed
from maseRT.onnxrt.providers import SessionSettings
from maseRT.onnxrt.quantizers import StaticSettings, optimize, preprocess, quantize_dynamic, quantize_static
from maseRT.runtimes.onnxruntime import OnnxRuntime

SETTINGS = SessionSettings(threads=1)


class FloatModel:
    def __init__(self, folder, model, shape):
        self.folder = folder
        self.inputs = torch.randn(16, *shape, generator=torch.Generator().manual_seed(3))
        self.path = folder / "float.onnx"
        export_onnx(model.eval(), self.inputs[:2], self.path, opset=20)
        with torch.inference_mode():
            self.expected = model(self.inputs).numpy()
        self.prepared = folder / "prepared.onnx"
        preprocess(self.path, self.prepared)

    def feeds(self):
        return [{"input": self.inputs.numpy()}]

    def error(self, path):
        with OnnxRuntime().open(path, threads=1) as session:
            found = session.infer({"input": self.inputs.numpy()})["output"]
        return float(np.linalg.norm(found - self.expected) / np.linalg.norm(self.expected))


def zoo(folder, name, shape, **args):
    torch.manual_seed(0)
    section = ModelSection(name=name, args=args, random_weights=True)
    return FloatModel(folder, build_model(section, num_classes=10, input_shape=shape), shape)


@pytest.fixture(scope="module")
def convnet(tmp_path_factory):
    return zoo(tmp_path_factory.mktemp("convnet"), "digits-cnn", (1, 8, 8))


@pytest.fixture(scope="module")
def transformer(tmp_path_factory):
    return zoo(tmp_path_factory.mktemp("transformer"), "transformer-classifier", (1, 8, 8))


def test_optimizing_changes_nothing_but_the_graph(convnet, tmp_path):
    out = tmp_path / "optimized.onnx"
    optimize(convnet.path, out, "cpu")
    assert convnet.error(out) < 1e-5
    assert "BatchNormalization" not in {node.op_type for node in onnx.load(out).graph.node}


@pytest.mark.parametrize(("device", "fuses"), [("cpu", True), ("openvino", False), ("migraphx:1", False)])
def test_optimizing_fuses_operators_for_providers_that_have_their_kernels(convnet, tmp_path, device, fuses):
    out = tmp_path / "optimized.onnx"
    optimize(convnet.path, out, device)
    assert convnet.error(out) < 1e-5
    domains = {node.domain for node in onnx.load(out).graph.node}
    assert domains == ({"", "com.microsoft"} if fuses else {""})


@pytest.mark.parametrize("calibrator", ["minmax", "entropy", "percentile"])
def test_static_quantization_runs_in_integers(convnet, tmp_path, calibrator):
    out = tmp_path / "static.onnx"
    quantize_static(convnet.prepared, out, convnet.feeds(), StaticSettings(calibrator))
    kernels = kernels_of(out, "cpu", SETTINGS)
    assert (kernels.integer_convolutions, kernels.float_convolutions) == (3, 0)
    assert convnet.error(out) < 0.1


def test_signed_static_quantization_is_what_tensorrt_takes(convnet, tmp_path):
    """int8 with zero point 0 everywhere, and biases left float."""
    out = tmp_path / "static.onnx"
    quantize_static(convnet.prepared, out, convnet.feeds(), StaticSettings(signed=True))
    model = onnx.load(out)
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    points = [values[n.input[2]] for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert points
    assert all(point.dtype == np.int8 and not point.any() for point in points)


class MaskedPool(nn.Module):
    """The mean and the maximum over the steps whose first feature is positive: by a softmax, and by -inf."""

    def __init__(self, mask):
        super().__init__()
        self.project, self.score, self.out = nn.Linear(16, 32), nn.Linear(32, 1), nn.Linear(64, 5)
        self.mask = mask

    def forward(self, x):
        left_out = x[:, :, 0] < 0
        x = torch.tanh(self.project(x))
        if self.mask == "added":
            scores = self.score(x).squeeze(-1) + left_out.float() * -10000.0
        else:
            scores = self.score(x).squeeze(-1).masked_fill(left_out, self.mask)
        mean = (scores.softmax(-1).unsqueeze(1) @ x).squeeze(1)
        most = x.masked_fill(left_out.unsqueeze(-1), float("-inf")).amax(1)
        return self.out(torch.cat([mean, most], 1))


@pytest.mark.parametrize("mask", [float("-inf"), torch.finfo(torch.float32).min, "added"])
def test_static_quantization_keeps_masks_out_of_ranges(tmp_path, mask):
    torch.manual_seed(0)
    model = FloatModel(tmp_path, MaskedPool(mask), (12, 16))
    quantize_static(model.prepared, tmp_path / "static.onnx", model.feeds(), StaticSettings())
    assert model.error(tmp_path / "static.onnx") < 0.1
    assert kernels_of(tmp_path / "static.onnx", "cpu", SETTINGS).integer_products > 0


class Gated(nn.Module):
    """A block of a language model: RMSNorm and SwiGLU, with a residual."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(32, eps=1e-6)
        self.gate, self.up, self.down = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


def test_static_quantization_keeps_root_mean_square_norms_float(tmp_path):
    torch.manual_seed(0)
    model = FloatModel(tmp_path, nn.Sequential(nn.Linear(32, 32), Gated(), Gated(), Gated()), (8, 32))
    quantize_static(model.prepared, tmp_path / "static.onnx", model.feeds(), StaticSettings())
    graph = Graph(onnx.load(tmp_path / "static.onnx"))
    roots = [node for node in graph.nodes if node.op_type == "Sqrt"]
    assert len(roots) == 3
    assert {node.op_type for root in roots for node in graph.readers(root.output[0])} == {"Reciprocal"}
    inverse = [graph.readers(root.output[0])[0].output[0] for root in roots]
    assert {node.op_type for name in inverse for node in graph.readers(name)} == {"Mul"}
    assert kernels_of(tmp_path / "static.onnx", "cpu", SETTINGS).integer_products == 10


class Fire(nn.Module):
    """Two convolutions of one tensor, concatenated, as SqueezeNet has them."""

    def __init__(self):
        super().__init__()
        self.squeeze = nn.Conv2d(3, 8, 3, padding=1)
        self.narrow, self.wide = nn.Conv2d(8, 16, 1), nn.Conv2d(8, 16, 3, padding=1)
        self.out = nn.Conv2d(32, 5, 3)

    def forward(self, x):
        x = torch.relu(self.squeeze(x))
        return self.out(torch.cat([torch.relu(self.narrow(x)), self.wide(x)], 1)).flatten(1)


@pytest.fixture(scope="module")
def fire(tmp_path_factory):
    """A model with its file for OpenVINO."""
    torch.manual_seed(1)
    model = FloatModel(tmp_path_factory.mktemp("fire"), Fire(), (3, 8, 8))
    quantize_static(model.prepared, model.folder / "s.onnx", model.feeds(), StaticSettings(signed=True, openvino=True))
    return model, model.folder / "s.onnx"


def test_static_quantization_for_openvino_avoids_what_it_computes_wrongly(fire):
    model, path = fire
    graph = Graph(onnx.load(path))
    assert all(len(node.input) == 2 for node in graph.nodes if node.op_type == "Conv")
    (join,) = (node for node in graph.nodes if node.op_type == "Concat")
    pairs = [graph.producer(name) for name in join.input] + graph.readers(join.output[0])
    assert len({tuple(node.input[1:3]) for node in pairs}) == 1
    assert graph.constant(pairs[0].input[2]).dtype == np.uint8
    assert model.error(path) < 0.05


def test_openvino_computes_what_the_static_file_says(fire):
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    model, path = fire
    options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    found = openvino.Core().compile_model(str(path), "CPU", options)(model.inputs.numpy())[0]
    with OnnxRuntime().open(path, threads=1, optimization="disabled") as session:
        expected = session.infer({"input": model.inputs.numpy()})["output"]
    assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)


def test_attention_stays_exact_in_static_quantization(transformer, tmp_path):
    """With its default settings, onnxruntime quantizes the products of activations and every addition, too."""
    out = tmp_path / "static.onnx"
    quantize_static(transformer.prepared, out, transformer.feeds(), StaticSettings())
    assert transformer.error(out) < 0.05
    readers = {node.op_type for node in onnx.load(out).graph.node if node.op_type == "Softmax"}
    assert readers == {"Softmax"}
    assert kernels_of(out, "cpu", SETTINGS).integer_products >= 8


def test_dynamic_quantization_finds_lstms_in_our_exports(tmp_path):
    lstm = zoo(tmp_path, "lstm-classifier", (12, 6), width=32)
    out = tmp_path / "dynamic.onnx"
    assert quantize_dynamic(lstm.prepared, out)
    operators = kernels_of(out, "cpu", SETTINGS).operators
    assert operators["DynamicQuantizeLSTM"] == 1
    assert "LSTM" not in operators
    assert lstm.error(out) < 0.05


def test_dynamic_quantization_leaves_convolutions_alone(convnet, tmp_path):
    out = tmp_path / "dynamic.onnx"
    quantize_dynamic(convnet.prepared, out)
    kernels = kernels_of(out, "cpu", SETTINGS)
    assert kernels.float_convolutions == 3
    assert kernels.integer_products == 2
    assert convnet.error(out) < 0.05


def test_dynamic_quantization_says_when_it_found_nothing(tmp_path):
    convolutions = FloatModel(tmp_path, nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1)), (3, 8, 8))
    preprocess(convolutions.path, tmp_path / "prepared.onnx")
    assert not quantize_dynamic(tmp_path / "prepared.onnx", tmp_path / "dynamic.onnx")


def test_a_file_that_is_no_model_is_named(tmp_path):
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"no model")
    for call in (partial(optimize, device="cpu"), preprocess, quantize_dynamic):
        with pytest.raises(StepError, match=r"failed|cannot load") as caught:
            call(path, tmp_path / "out.onnx")
        assert str(path) in str(caught.value)


class Large(nn.Module):
    """Its middle exceeds what FP16 holds; the rest does not."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        return self.last((self.first(x) * 1e4).square().sqrt() / 1e4)


def test_a_wide_tolerance_turns_everything_to_fp16(convnet):
    model, mixed = auto_mixed(onnx.load(convnet.path), convnet.feeds(), rtol=0.05, atol=0.05, keep_io_types=True)
    onnx.checker.check_model(model, full_check=True)
    assert mixed.kept == ()
    assert mixed.worst <= 0.05
    assert model.ByteSize() < 0.6 * convnet.path.stat().st_size
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_inputs_and_outputs_turn_to_fp16_where_asked(convnet):
    model, _ = auto_mixed(onnx.load(convnet.path), convnet.feeds(), rtol=0.05, atol=0.05, keep_io_types=False)
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16


def test_no_tolerance_turns_nothing(convnet):
    model, mixed = auto_mixed(
        onnx.load(convnet.path), convnet.feeds(), rtol=0, atol=0, keep_io_types=True, max_trials=12
    )
    assert mixed.trials <= 12
    assert mixed.worst == 0
    types = {tensor.data_type for tensor in model.graph.initializer}
    assert mixed.half == 0 or onnx.TensorProto.FLOAT in types


def test_what_overflows_stays_fp32(tmp_path):
    torch.manual_seed(0)
    large = FloatModel(tmp_path, Large(), (4,))
    model, mixed = auto_mixed(onnx.load(large.path), large.feeds(), rtol=0.01, atol=0.01, keep_io_types=True)
    assert mixed.half >= 2
    assert mixed.kept
    kept = {node.op_type for node in onnx.load(large.path).graph.node if node.name in mixed.kept}
    assert kept <= {"Mul", "Pow", "Sqrt", "Div"}
    out = tmp_path / "mixed.onnx"
    onnx.save(model, out)
    assert large.error(out) < 0.01


def test_trials_are_not_spent_on_the_first_nodes_alone():
    """Sixteen products, of which the first eight overflow in FP16."""
    factors = [1e6, *[1.0] * 6, 1e-6, *[1.0] * 8]
    names = ["input", *(f"x{index}" for index in range(15)), "output"]
    nodes = [helper.make_node("Mul", [names[i], f"w{i}"], [names[i + 1]], name=f"mul{i}") for i in range(16)]
    weights = [numpy_helper.from_array(np.array(factor, np.float32), f"w{i}") for i, factor in enumerate(factors)]
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", 4]) for name in ("input", "output")]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    feed = {"input": np.linspace(1, 2, 8, dtype=np.float32).reshape(2, 4)}
    _, mixed = auto_mixed(model, [feed], rtol=0.01, atol=0.01, keep_io_types=True, max_trials=6)
    assert mixed.half >= 8
    assert "mul0" in mixed.kept
