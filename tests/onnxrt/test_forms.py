"""The forms of a quantized model: what ONNX Runtime makes of them, and what their numbers are worth."""

from copy import deepcopy

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exported import Exported
from onnx import numpy_helper
from torch import nn

from maseRT.config import ModelSection
from maseRT.models.build import build_model
from maseRT.onnxrt.bounds import is_nonnegative
from maseRT.onnxrt.graph import Graph
from maseRT.onnxrt.kernels import kernels_of
from maseRT.onnxrt.providers import SessionSettings
from maseRT.onnxrt.qdq import is_dequantized
from maseRT.onnxrt.ranges import measure_ranges
from maseRT.runtimes.onnxruntime import OnnxRuntime

SETTINGS = SessionSettings(threads=1)


def error(found, expected):
    """The relative error, in the Euclidean norm."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def zoo(name, shape, classes=10):
    torch.manual_seed(0)
    section = ModelSection(name=name, random_weights=True)
    return build_model(section, num_classes=classes, input_shape=shape)


CASES = {"vgg7": (3, 16, 16), "resnet18": (3, 64, 64), "mobilenetv2": (3, 64, 64)}


@pytest.fixture(scope="module", params=list(CASES))
def exported(request, tmp_path_factory):
    shape = CASES[request.param]
    return Exported(tmp_path_factory.mktemp(request.param), zoo(request.param, shape), shape)


def test_no_float_convolution_is_left(exported):
    """The gate: every convolution runs in integers, and nothing is left to absorb."""
    path, form = exported.cpu()
    convolutions = [node for node in exported.onnx.graph.node if node.op_type == "Conv"]
    kernels = kernels_of(path, "cpu", SETTINGS)
    assert kernels.float_convolutions == 0
    assert kernels.batchnorms == 0
    assert kernels.integer_convolutions == kernels.operators["QLinearConv"] == len(convolutions)
    assert kernels.float_products <= 1  # a tiny last layer stays float
    assert kernels.conversions <= 2  # the input, and what a float last layer reads
    assert not kernels.copies
    assert form.int8_weights >= len(convolutions)


def test_the_form_is_as_exact_as_the_quantized_model(exported):
    found = exported.infer(exported.cpu()[0])
    ours, torchs = error(found, exported.float), error(exported.quantized, exported.float)
    assert ours < 1.15 * torchs + 0.002
    assert error(found, exported.quantized) < 1.5 * torchs + 0.002


def test_the_file_shrinks_to_a_quarter(exported):
    path, _ = exported.cpu()
    whole = sum(numpy_helper.to_array(tensor).nbytes for tensor in exported.onnx.graph.initializer)
    assert path.stat().st_size < 0.25 * whole + 400_000  # scales, biases and node names stay


def test_the_openvino_form_refines_what_is_never_negative_and_keeps_the_rest(exported):
    path, form = exported.openvino()
    model = onnx.load(path)
    graph = Graph(model)
    pairs = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert not any(_quantizes_constant(model, node) for node in pairs)
    for node in pairs:
        zero_point = graph.constant(node.input[2])
        assert not zero_point.any()
        assert zero_point.dtype == (np.uint8 if is_nonnegative(graph, node.input[0]) else np.int8)
    assert set(form.refined) <= {node.input[0] for node in pairs}
    assert "255 steps" in form.changes()[0]
    assert not any("int32" in sentence for sentence in form.changes())


def test_pools_of_the_openvino_form_read_integers(exported):
    """Else the convolution before them writes floats, and what they read is converted."""
    graph = Graph(onnx.load(exported.openvino()[0]))
    pools = [node for node in graph.nodes if "Pool" in node.op_type]
    assert pools
    assert all(is_dequantized(graph, node.input[0]) for node in pools)


def test_the_openvino_form_is_more_exact_than_the_symmetric_one(exported):
    found = _plain(exported.openvino()[0], exported)
    assert error(found, exported.float) < error(exported.quantized, exported.float)


def test_refined_activations_are_off_by_half_a_step_of_255_at_most(exported):
    """As the plain operators compute them, beside the float values that they round."""
    path, form = exported.openvino()
    probe, graph = onnx.load(path), Graph(onnx.load(path))
    steps = {}
    for tensor in form.refined:
        quantize = next(node for node in graph.readers(tensor) if node.op_type == "QuantizeLinear")
        rounded = graph.readers(quantize.output[0])[0].output[0]
        steps[tensor, rounded] = float(graph.constant(quantize.input[1]))
    names = list(dict.fromkeys(name for pair in steps for name in pair))
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
    values = dict(zip(names, session.run(names, {"input": exported.inputs[:4].numpy()}), strict=True))
    for (tensor, rounded), step in steps.items():
        inside = values[tensor] <= 255 * step
        assert inside.mean() > 0.9
        assert np.abs(values[tensor] - values[rounded])[inside].max() <= 0.5001 * step


def test_openvino_computes_what_its_form_says(in_openvino, exported):
    path, _ = exported.openvino()
    expected, found = _plain(path, exported), in_openvino(path, exported)
    assert error(found, expected) < 0.4 * error(expected, exported.float) + 0.002


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [("transformer-classifier", (1, 8, 8), 10), ("lstm-classifier", (29, 12), 9), ("digits-cnn", (1, 8, 8), 10)],
)
def test_openvino_computes_what_its_form_says_of_other_models(in_openvino, name, shape, classes, tmp_path):
    exported = Exported(tmp_path, zoo(name, shape, classes), shape)
    path, _ = exported.openvino()
    assert error(in_openvino(path, exported), _plain(path, exported)) < 0.01


@pytest.fixture
def in_openvino():
    """What OpenVINO computes of a file on the CPU, with float layers in float32."""
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    return lambda path, exported: openvino.Core().compile_model(str(path), "CPU", options)(exported.inputs.numpy())[0]


BODIES = {
    "no activation": (nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3)), 128),
    "hardswish": (nn.Sequential(nn.Conv2d(4, 8, 3), nn.Hardswish(), nn.Conv2d(8, 8, 3), nn.Hardswish()), 128),
    "pools": (nn.Sequential(nn.Conv2d(4, 8, 3), nn.MaxPool2d(2), nn.Conv2d(8, 8, 2), nn.ReLU(), nn.AvgPool2d(2)), 8),
    "depthwise": (nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.ReLU6(), nn.Conv2d(4, 8, 1)), 512),
    "padding outside": (nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(4, 8, 3, stride=2), nn.ReLU()), 128),
}


@pytest.mark.parametrize("body", list(BODIES))
def test_openvino_computes_what_its_form_says_around_convolutions(in_openvino, body, tmp_path):
    layers, features = BODIES[body]
    exported = odd(tmp_path, deepcopy(layers), features)
    path, _ = exported.openvino()
    assert error(in_openvino(path, exported), _plain(path, exported)) < 0.005


def test_openvino_keeps_the_biases_of_a_patch_embedding(in_openvino, tmp_path):
    """It would lose them if the embedding's result were rounded: it is read for its shape, too, and hence not fused."""
    exported = odd(tmp_path, Patches(), 0, shape=(3, 16, 16), head=nn.Identity())
    path, form = exported.openvino()
    assert form.added == ()
    assert error(in_openvino(path, exported), _plain(path, exported)) < 0.005


class Decoder(nn.Module):
    """Concatenates what is never negative with what may be, as a U-Net does."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.join, self.out = nn.Conv2d(32, 16, 3, padding=1), nn.Conv2d(16, 5, 1)

    def forward(self, x):
        skip = torch.relu(self.down(x))
        up = nn.functional.interpolate(self.up(nn.functional.max_pool2d(skip, 2)), scale_factor=2)
        return self.out(torch.relu(self.join(torch.cat([up, skip], 1)))).flatten(1)


def test_openvino_gets_concatenations_in_one_step_and_type(tmp_path):
    """Of int8 ones it computes something else."""
    exported = odd(tmp_path, Decoder(), 0, shape=(3, 16, 16), head=nn.Identity())
    path, form = exported.openvino()
    graph = Graph(onnx.load(path))
    (join,) = (node for node in graph.nodes if node.op_type == "Concat")
    pairs = [graph.producer(name) for name in join.input] + graph.readers(join.output[0])
    assert len({tuple(node.input[1:3]) for node in pairs}) == 1
    assert graph.constant(pairs[0].input[2]).dtype == np.uint8
    assert any("concatenated activation" in change for change in form.changes())
    assert error(_plain(path, exported), exported.float) < 0.05


def test_openvino_computes_what_its_form_says_of_concatenations(in_openvino, tmp_path):
    exported = odd(tmp_path, Decoder(), 0, shape=(3, 16, 16), head=nn.Identity())
    path, _ = exported.openvino()
    assert error(in_openvino(path, exported), _plain(path, exported)) < 0.01


class Halves(nn.Module):
    """Concatenates floats, the halves of an activation and what comes of one, as detectors do."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.join, self.out = nn.Conv2d(24, 16, 1), nn.Conv2d(16, 5, 3)

    def forward(self, x):
        left, right = nn.functional.leaky_relu(self.first(x), 0.1).chunk(2, 1)
        x = torch.cat([left, right, right + nn.functional.leaky_relu(self.second(right), 0.1)], 1)
        return self.out(nn.functional.leaky_relu(self.join(x), 0.1)).flatten(1)


def test_openvino_gets_floats_rounded_before_they_are_concatenated(tmp_path):
    exported = odd(tmp_path, Halves(), 0, shape=(3, 16, 16), head=nn.Identity())
    path, _ = exported.openvino()
    graph = Graph(onnx.load(path))
    (join,) = (node for node in graph.nodes if node.op_type == "Concat")
    pairs = [graph.producer(name) for name in join.input] + graph.readers(join.output[0])
    assert len({tuple(node.input[1:3]) for node in pairs}) == 1
    assert graph.constant(pairs[0].input[2]).dtype == np.uint8
    assert error(_plain(path, exported), exported.quantized) < 0.01


def test_openvino_computes_what_its_form_says_of_concatenated_floats(in_openvino, tmp_path):
    exported = odd(tmp_path, Halves(), 0, shape=(3, 16, 16), head=nn.Identity())
    path, _ = exported.openvino()
    assert error(in_openvino(path, exported), _plain(path, exported)) < 0.01


class Reader(nn.Module):
    """Convolutions before an LSTM, as in text recognition: the LSTM's first state is as large as the batch."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.lstm = nn.LSTM(16 * 4, 8, batch_first=True)

    def forward(self, x):
        x = nn.functional.max_pool2d(torch.relu(self.first(x)), 2)
        x = nn.functional.max_pool2d(torch.relu(self.second(x)), 2)
        return self.lstm(x.permute(0, 3, 1, 2).flatten(2))[0].flatten(1)


def test_openvino_gets_biases_beside_their_convolutions(tmp_path):
    """It asks a convolution with a bias for its shape, and may then give all channels the bias of the first."""
    exported = odd(tmp_path, Reader(), 0, shape=(1, 16, 16), head=nn.Identity())
    path, _ = exported.openvino()
    graph = Graph(onnx.load(path))
    convolutions = [node for node in graph.nodes if node.op_type == "Conv"]
    assert [len(node.input) for node in convolutions] == [2, 2]
    for node, layer in zip(convolutions, (exported.model.body.first, exported.model.body.second), strict=True):
        (behind,) = graph.readers(node.output[0])
        assert behind.op_type == "Sub"  # ONNX Runtime would join an Add with a convolution of floats
        np.testing.assert_array_equal(graph.constant(behind.input[1]), -layer.bias.detach().reshape(1, -1, 1, 1))
    np.testing.assert_allclose(_plain(path, exported), exported.float, atol=0.05)


def test_openvino_computes_what_its_form_says_before_an_lstm(in_openvino, tmp_path):
    exported = odd(tmp_path, Reader(), 0, shape=(1, 16, 16), head=nn.Identity())
    path, _ = exported.openvino()
    assert error(in_openvino(path, exported), _plain(path, exported)) < 0.005


class Patches(nn.Module):
    """A vision transformer's first layers."""

    def __init__(self):
        super().__init__()
        self.projection = nn.Conv2d(3, 32, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 32))
        self.positions = nn.Parameter(torch.randn(1, 17, 32))
        self.norm = nn.LayerNorm(32)
        self.linear = nn.Linear(32, 64)

    def forward(self, x):
        patches = self.projection(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), patches], 1)
        return self.linear(self.norm(tokens + self.positions))


def _plain(path, exported):
    """What ONNX Runtime computes without optimizations."""
    with OnnxRuntime().open(path, threads=1, optimization="disabled") as session:
        return session.infer({"input": exported.inputs.numpy()})["output"]


def _quantizes_constant(model, node):
    return node.op_type == "QuantizeLinear" and node.input[0] in {i.name for i in model.graph.initializer}


def test_the_record_says_what_changes(exported):
    _, form = exported.cpu()
    said = " ".join(form.changes())
    assert "255 steps" in said
    assert "int32" in said
    described = form.as_dict()
    assert described["changes"] == form.changes()
    assert len(described["refined"]) == len(form.refined) > 0
    for entry in described["added"]:
        assert entry["reason"]
        assert entry["range"] is None or entry["range"][0] <= entry["range"][1]


class Odd(nn.Module):
    """Layers whose surroundings are unlike those of the zoo's networks."""

    def __init__(self, body, head):
        super().__init__()
        self.body = body
        self.head = head

    def forward(self, x):
        return self.head(self.body(x).flatten(1))


def odd(folder, body, features, *, shape=(4, 8, 8), head=None, **options):
    torch.manual_seed(1)
    return Exported(folder, Odd(body, head or nn.Linear(features, 96)).eval(), shape, **options)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(), nn.Sigmoid(), nn.Hardswish(), nn.SiLU()])
def test_every_activation_behind_a_convolution_agrees(activation, tmp_path):
    body = nn.Sequential(nn.Conv2d(4, 16, 3), activation, nn.Conv2d(16, 16, 3), activation)
    exported = odd(tmp_path, body, 16 * 4 * 4)
    path, _ = exported.cpu()
    kernels = kernels_of(path, "cpu", SETTINGS)
    assert kernels.integer_convolutions == 2
    assert kernels.float_convolutions == 0
    assert error(exported.infer(path), exported.float) < 1.2 * error(exported.quantized, exported.float) + 0.005


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.Tanh(), nn.GELU()])
def test_a_linear_layer_before_a_float_one_stays_integer(activation, tmp_path):
    """ONNX Runtime fuses Gemm and activation in float, unless they are kept apart."""
    head = nn.Sequential(nn.Linear(256, 128), activation, nn.Linear(128, 3))
    exported = odd(tmp_path, nn.Identity(), 256, head=head)
    path, _ = exported.cpu()
    kernels = kernels_of(path, "cpu", SETTINGS)
    assert kernels.integer_products == 1
    assert error(exported.infer(path), exported.quantized) < 0.02


def test_transposed_convolutions_keep_float_weights_on_the_int8_grid(tmp_path):
    """There is no integer kernel for them, and ONNX Runtime would dequantize their weights in every run."""
    body = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 8, 3), nn.ReLU())
    exported = odd(tmp_path, body, 8 * 8 * 8)
    path, form = exported.cpu()
    assert form.rounded_weights == 1
    assert error(exported.infer(path), exported.float) < 1.2 * error(exported.quantized, exported.float) + 0.002


def test_a_switched_off_channel_keeps_its_bias(tmp_path):
    """Weights next to zero have steps so small that the bias, in steps, does not fit into int32."""
    torch.manual_seed(1)
    body = nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU())
    with torch.no_grad():
        body[0].weight[3] *= 1e-12
        body[0].bias[3] = 7.5
    exported = Exported(tmp_path, Odd(body, nn.Linear(576, 96)).eval(), (4, 8, 8))
    path, form = exported.cpu()
    assert form.coarsened_channels == 1
    assert any("next to zero" in sentence for sentence in form.changes())
    assert error(exported.infer(path), exported.float) < 1.2 * error(exported.quantized, exported.float) + 0.002


def test_a_convolution_that_ends_the_model_stays_named(tmp_path):
    exported = odd(tmp_path, nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)), 0, head=nn.Identity())
    path, _ = exported.cpu()
    assert [value.name for value in onnx.load(path).graph.output] == ["output"]
    assert kernels_of(path, "cpu", SETTINGS).integer_convolutions == 2
    assert error(exported.infer(path), exported.float) < 1.5 * error(exported.quantized, exported.float) + 0.005


def test_one_dimensional_convolutions_run_in_integers(tmp_path):
    body = nn.Sequential(nn.Conv1d(4, 16, 3), nn.BatchNorm1d(16), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(16, 16, 3))
    exported = odd(tmp_path, body, 16 * 13, shape=(4, 32))
    path, _ = exported.cpu()
    kernels = kernels_of(path, "cpu", SETTINGS)
    assert (kernels.integer_convolutions, kernels.float_convolutions) == (2, 0)
    assert error(exported.infer(path), exported.float) < 1.2 * error(exported.quantized, exported.float) + 0.003


def test_layerwise_placement_gets_integer_convolutions_too(tmp_path):
    exported = Exported(tmp_path, zoo("digits-cnn", (1, 8, 8)), (1, 8, 8), placement="layerwise")
    path, _ = exported.cpu()
    kernels = kernels_of(path, "cpu", SETTINGS)
    assert (kernels.integer_convolutions, kernels.float_convolutions) == (3, 0)


def test_attention_keeps_its_float_products_and_integer_weights(tmp_path):
    exported = Exported(tmp_path, zoo("transformer-classifier", (1, 8, 8)), (1, 8, 8))
    path, _ = exported.cpu()
    kernels = kernels_of(path, "cpu", SETTINGS)
    weights = [node for node in onnx.load(path).graph.node if node.op_type in ("MatMul", "Gemm")]
    assert kernels.integer_products + kernels.float_products == len(weights)
    assert kernels.float_products <= 5  # two products of activations in each of two layers, a tiny last layer
    assert error(exported.infer(path), exported.float) < 0.05


def test_lstms_stay_one_operator(tmp_path):
    exported = Exported(tmp_path, zoo("lstm-classifier", (29, 12), 9), (29, 12))
    path, _ = exported.cpu()
    assert [node.op_type for node in onnx.load(path).graph.node].count("LSTM") == 1
    assert error(exported.infer(path), exported.float) < 0.01


def test_uneven_ranges_of_signed_activations_shrink_to_their_data(tmp_path):
    """Behind a GELU nothing is below -0.17: half of a symmetric range would go unused."""
    body = nn.Sequential(nn.Conv2d(4, 16, 3), nn.GELU(), nn.Conv2d(16, 16, 3), nn.GELU())
    exported = odd(tmp_path, body, 256)
    path, form = exported.cpu()
    assert len(form.fitted) >= 2
    assert any("where the calibration data lie" in sentence for sentence in form.changes())
    assert error(exported.infer(path), exported.float) < error(exported.quantized, exported.float)


def test_clips_disappear_even_where_the_range_ends_a_rounding_above_them(tmp_path):
    exported = odd(tmp_path, nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU6(), nn.Conv2d(8, 8, 3), nn.ReLU6()), 128)
    for tensor in exported.onnx.graph.initializer:
        if "input_quantizer" in tensor.name and tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.CopyFrom(
                numpy_helper.from_array(np.array(np.nextafter(np.float32(6), 9) / 127, np.float32), tensor.name)
            )
    path, _ = exported.cpu()
    assert "Clip" not in kernels_of(path, "cpu", SETTINGS).operators


def test_padding_outside_the_convolution_moves_into_it(tmp_path):
    """TensorFlow's "same" padding at stride 2 is uneven: models ported from there pad by a layer of its own."""
    uneven = [nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU6()]
    exported = odd(tmp_path, nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU6(), *uneven), 128)
    path, _ = exported.cpu()
    operators = kernels_of(path, "cpu", SETTINGS).operators
    assert "Pad" not in operators
    assert operators["QLinearConv"] == 2
    assert error(exported.infer(path), exported.float) < 1.2 * error(exported.quantized, exported.float) + 0.002


def test_ranges_are_those_of_the_data(tmp_path):
    exported = odd(tmp_path, nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU()), 288)
    graph = Graph(exported.onnx)
    relu = next(node for node in graph.nodes if node.op_type == "Relu")
    batches = [{"input": exported.inputs[i : i + 8].numpy()} for i in (0, 8)]
    low, high = measure_ranges(exported.onnx, [relu.output[0]], batches, threads=1)[relu.output[0]]
    probe = onnx.ModelProto()
    probe.CopyFrom(exported.onnx)
    probe.graph.output.append(onnx.helper.make_tensor_value_info(relu.output[0], onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(probe.SerializeToString(), providers=["CPUExecutionProvider"])
    values = session.run([relu.output[0]], {"input": exported.inputs[:16].numpy()})[0]
    assert (low, high) == (pytest.approx(values.min()), pytest.approx(values.max(), rel=1e-5))
