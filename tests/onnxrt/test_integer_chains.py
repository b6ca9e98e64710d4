"""What stands between convolutions, in integers on ONNX Runtime's CPU kernels: norms, pools, copies, activations."""

import numpy as np
import onnx
import pytest
import torch
from exported import Exported
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn import functional

from maseRT.onnxrt.bounds import is_nonnegative, upper_bound
from maseRT.onnxrt.graph import Graph
from maseRT.onnxrt.kernels import kernels_of
from maseRT.onnxrt.norms import write_batchnorms_as_convolutions
from maseRT.onnxrt.pools import divide_by_what_is_there
from maseRT.onnxrt.providers import SessionSettings
from maseRT.onnxrt.quantizers import StaticSettings, preprocess, quantize_static
from maseRT.runtimes.onnxruntime import OnnxRuntime

SETTINGS = SessionSettings(threads=1)


def error(found, expected):
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def conv(channels, out, size=3):
    return nn.Conv2d(channels, out, size, padding=size // 2)


def form_of(folder, model, shape, **options):
    """Return the model's CPU form: its kernels, its error against the float model, and what is told of it."""
    torch.manual_seed(0)
    exported = Exported(folder, model, shape, **options)
    path, form = exported.cpu()
    return kernels_of(path, "cpu", SETTINGS), error(exported.infer(path), exported.float), form


class PreActivated(nn.Module):
    """A residual block that normalizes first, behind a dense one that begins with the concatenation of one tensor."""

    def __init__(self):
        super().__init__()
        self.stem = conv(3, 24)
        self.norms = nn.ModuleList([nn.BatchNorm2d(24), nn.BatchNorm2d(24), nn.BatchNorm2d(48), nn.BatchNorm2d(48)])
        self.convolutions = nn.ModuleList([conv(24, 24), conv(24, 24), conv(48, 48)])
        self.head = nn.Linear(48, 10)

    def forward(self, x):
        first, second, third, last = self.norms
        x = self.stem(x)
        x = x + self.convolutions[0](torch.relu(first(x)))
        y = self.convolutions[1](torch.relu(second(torch.cat([x], 1))))
        x = torch.cat([x, y], 1)
        x = x + self.convolutions[2](torch.relu(third(x)))
        return self.head(torch.relu(last(x)).mean((2, 3)))


def test_batchnorms_that_nothing_absorbs_run_in_integers(tmp_path):
    kernels, off, form = form_of(tmp_path, PreActivated(), (3, 16, 16))
    assert kernels.batchnorms == 0
    assert kernels.float_convolutions == 0
    assert kernels.conversions <= 2
    assert kernels.integer_convolutions == 4 + 4
    assert form.batchnorms == 4
    assert form.as_dict()["batchnorms"] == 4
    assert off < 0.03


def _normalized(scale):
    """x -> Q -> DQ -> BatchNormalization -> Q -> DQ of 4 channels, the first of which is switched off."""
    steps = {"s": np.float32(0.02), "z": np.uint8(100), "t": np.float32(0.05), "u": np.uint8(120)}
    rng = np.random.default_rng(0)
    norm = {"gamma": scale, "beta": rng.normal(size=4), "mean": rng.normal(size=4), "var": rng.uniform(0.5, 2, 4)}
    norm = {name: np.asarray(values, np.float32) for name, values in norm.items()}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["a"]),
        helper.make_node("DequantizeLinear", ["a", "s", "z"], ["b"]),
        helper.make_node("BatchNormalization", ["b", *norm], ["c"]),
        helper.make_node("QuantizeLinear", ["c", "t", "u"], ["d"]),
        helper.make_node("DequantizeLinear", ["d", "t", "u"], ["y"]),
    ]
    return _model(nodes, steps | norm, shape=[2, 4, 5, 5])


def _model(nodes, constants, *, shape):
    values = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "graph", [x], [y], values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def _run(model, x, folder):
    path = folder / "model.onnx"
    onnx.save(model, path)
    with OnnxRuntime().open(path, threads=1, optimization="disabled") as session:
        return session.infer({"x": x})["y"]


def test_a_batchnorm_as_a_convolution_computes_the_same(tmp_path):
    x = np.random.default_rng(1).normal(size=(2, 4, 5, 5)).astype(np.float32)
    expected = _run(_normalized([0.0, 1.5, -0.7, 1e-3]), x, tmp_path)
    graph = Graph(_normalized([0.0, 1.5, -0.7, 1e-3]))
    assert write_batchnorms_as_convolutions(graph) == 1
    model = graph.finish()
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    assert np.abs(_run(model, x, tmp_path) - expected).max() <= 0.05 + 1e-6  # a step, where a rounding falls otherwise
    assert (_run(model, x, tmp_path) == expected).mean() > 0.99


class Upsampled(nn.Module):
    """Adds and concatenates upsampled, pooled and shuffled results of convolutions."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = conv(3, 16), conv(16, 16), conv(16, 16)
        self.last, self.head = conv(32, 32), nn.Linear(32, 10)

    def forward(self, x):
        x = torch.relu(self.first(x))
        small = self.second(functional.max_pool2d(x, 2))
        x = x + functional.interpolate(small, scale_factor=2, mode="nearest")
        left, right = torch.chunk(torch.relu(self.third(x)), 2, 1)
        x = torch.cat([right, left, x], 1)
        shuffled = x.reshape(-1, 2, 16, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
        return self.head(torch.relu(self.last(shuffled)).mean((2, 3)))


def test_copies_of_integers_are_joined_as_integers(tmp_path):
    kernels, off, _ = form_of(tmp_path, Upsampled(), (3, 16, 16))
    assert {"Add", "Concat"}.isdisjoint(kernels.operators)
    assert kernels.operators["QLinearAdd"] == kernels.operators["QLinearConcat"] == 1
    assert kernels.conversions <= 2
    assert off < 0.03


def test_a_maximum_of_integers_is_not_rounded_again(tmp_path):
    """The ranges before and behind differ where the extreme is a negative one."""
    body = nn.Sequential(conv(3, 16), nn.Tanh(), nn.MaxPool2d(2), conv(16, 16), nn.ReLU(), nn.Flatten())
    nn.init.constant_(body[0].bias, -1.0)
    kernels, off, form = form_of(tmp_path, nn.Sequential(*body, nn.Linear(16 * 64, 10)), (3, 16, 16))
    assert "MaxPool" not in kernels.operators
    assert kernels.operators["NhwcMaxPool"] == 1
    assert form.copied == ("max_pool2d",)
    assert any(change.startswith("1 activation behind a copy or maximum") for change in form.changes())
    assert off < 0.03


def test_a_prelu_of_one_slope_runs_in_integers(tmp_path):
    body = [conv(3, 16), nn.PReLU(), conv(16, 16), nn.PReLU(16), conv(16, 16), nn.ReLU(), nn.Flatten()]
    kernels, off, _ = form_of(tmp_path, nn.Sequential(*body, nn.Linear(16 * 64, 10)), (3, 8, 8))
    assert kernels.operators["QLinearLeakyRelu"] == 1
    assert kernels.operators["PRelu"] == 1  # its slopes are one per channel
    assert off < 0.03


@pytest.mark.parametrize(("padding", "integer"), [(0, True), (1, False)])
def test_averages_that_round_their_size_up_are_divided_by_what_is_there(padding, integer, tmp_path):
    """ONNX Runtime's integer kernel divides the last window by the positions outside, too."""
    pool = nn.AvgPool2d(3, 2, padding, ceil_mode=True)
    body = [conv(3, 16), nn.ReLU(), pool, conv(16, 16), nn.ReLU(), nn.Flatten()]
    size = 4 if not padding else 5
    kernels, off, _ = form_of(tmp_path, nn.Sequential(*body, nn.Linear(16 * size**2, 10)), (3, 8, 8))
    assert ("QLinearAveragePool" in kernels.operators) == integer
    assert off < 0.02


@pytest.mark.parametrize("padding", [0, 1])
def test_static_quantization_divides_them_right_too(padding, tmp_path):
    constants = {"w": np.eye(4, dtype=np.float32).reshape(4, 4, 1, 1)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="first"),
        helper.make_node("AveragePool", ["a"], ["b"], name="pool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1,
                         pads=[padding] * 4, count_include_pad=1),
        helper.make_node("Conv", ["b", "w"], ["y"], name="last"),
    ]  # fmt: skip
    model = _model(nodes, constants, shape=[1, 4, 8, 8])
    x = np.random.default_rng(0).uniform(0, 1, (1, 4, 8, 8)).astype(np.float32)
    expected = _run(model, x, tmp_path)
    source, prepared, out = (tmp_path / f"{name}.onnx" for name in ("float", "prepared", "static"))
    onnx.save(model, source)
    preprocess(source, prepared)
    quantize_static(prepared, out, [{"x": x}], StaticSettings())
    with OnnxRuntime().open(out, threads=1) as session:
        assert np.abs(session.infer({"x": x})["y"] - expected).max() < 0.02


def test_other_averages_stay_as_they_are():
    nodes = [helper.make_node("AveragePool", ["x"], ["y"], kernel_shape=[3, 3], count_include_pad=1, pads=[1] * 4)]
    graph = Graph(_model(nodes, {}, shape=[1, 4, 8, 8]))
    assert divide_by_what_is_there(graph) == 0


class Scaled(nn.Module):
    """Factors of channels, as layer scales are, of both signs and zero."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = conv(3, 16), conv(16, 16), conv(16, 16)
        self.scale = nn.Parameter(torch.linspace(-1, 1, 16).reshape(16, 1, 1))
        self.other = nn.Parameter(torch.linspace(0, 2, 16).reshape(1, 16, 1, 1))
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = x + self.second(x) * self.scale
        x = torch.relu(self.other * self.third(torch.relu(x)))
        return self.head(x.mean((2, 3)))


def test_factors_of_channels_move_into_the_weights(tmp_path):
    torch.manual_seed(0)
    exported = Exported(tmp_path, Scaled(), (3, 8, 8))
    path, _ = exported.cpu()
    kernels = kernels_of(path, "cpu", SETTINGS)
    assert {"Mul", "QLinearMul"}.isdisjoint(kernels.operators)
    assert kernels.integer_convolutions == 3
    assert error(exported.infer(path), exported.float) < 0.03


class Volumes(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv3d(1, 16, 3, padding=1), nn.Conv3d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.head(x.mean((2, 3, 4)))


def test_volumes_of_few_channels_stay_float_and_are_told(tmp_path):
    """Their integer kernel takes ten times as long."""
    kernels, off, form = form_of(tmp_path, Volumes(), (1, 6, 8, 8), float="fp32")
    assert kernels.integer_convolutions == 1
    assert kernels.float_convolutions == 1
    assert len(form.float_convolutions) == 1
    assert any("1 3-D convolution" in change for change in form.changes())
    assert off < 0.03


@pytest.mark.parametrize(
    ("op_type", "operands", "attributes", "kept"),
    [
        ("Resize", ["p", "", "scales"], {"mode": "nearest"}, True),
        ("Resize", ["p", "", "scales"], {"mode": "linear"}, True),
        ("Resize", ["p", "", "scales"], {"mode": "cubic"}, False),
        ("Pad", ["p", "pads"], {}, True),
        ("Pad", ["p", "pads", "minus"], {}, False),
    ],
)
def test_bounds_pass_through_resizing_and_padding(op_type, operands, attributes, kept):
    nodes = [helper.make_node("Sigmoid", ["x"], ["p"]), helper.make_node(op_type, operands, ["y"], **attributes)]
    constants = {"scales": np.array([1, 1, 2, 2], np.float32), "pads": np.array([0, 0, 1, 1] * 2, np.int64)}
    graph = Graph(_model(nodes, constants | {"minus": np.float32(-1)}, shape=[1, 2, 4, 4]))
    assert is_nonnegative(graph, "y") == kept
    assert (upper_bound(graph, "y") == 1.0) == kept
