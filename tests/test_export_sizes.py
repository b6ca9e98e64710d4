"""Files whose images may have any size: right at several sizes in ONNX Runtime, and built with a profile."""

import numpy as np
import onnx
import pytest
import torch
from placement_nets import calibrated, lively, planned
from torch import nn

from maseRT.errors import StepError, UsageError
from maseRT.onnx_export import export_onnx, other_size
from maseRT.runtimes import get_compiler
from maseRT.runtimes.base import BatchRange, BuildOptions, ShapeRange
from maseRT.runtimes.onnxruntime import OnnxRuntime

ALL = ("batch", "height", "width")


def sizes_of(path):
    (value,) = onnx.load(path).graph.input
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def in_onnxruntime(path, x):
    with OnnxRuntime().open(path, threads=1, optimization="disabled") as session:
        return session.infer({"input": x.numpy()})["output"]


class Segmenter(nn.Module):
    """Writes as many pixels as it reads, and joins what it reads to what it made smaller and larger again."""

    input_shape = (3, 16, 16)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.bn = nn.BatchNorm2d(16)
        self.down = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.head = nn.Conv2d(32, 4, 1)

    def forward(self, x):
        x = torch.relu(self.bn(self.stem(x)))
        return self.head(torch.cat([x, self.up(torch.relu(self.down(x)))], 1))


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    torch.manual_seed(0)
    net = lively(Segmenter())
    plan = planned(net, rules=[{"name": "up", "precision": "fp32"}])
    model = calibrated(net, plan).eval()
    path = tmp_path_factory.mktemp("sizes") / "model.onnx"
    export_onnx(model, torch.randn(2, *Segmenter.input_shape), path, opset=20, dynamic=ALL)
    return model, path


@pytest.mark.parametrize("size", [(16, 16), (32, 48), (8, 24)])
def test_a_quantized_file_takes_images_of_other_sizes(segmenter, size):
    model, path = segmenter
    assert sizes_of(path) == ["batch", 3, "height", "width"]
    x = torch.randn(3, 3, *size)
    with torch.no_grad():
        wanted = model(x)
    output = in_onnxruntime(path, x)
    assert output.shape == (3, 4, *size)
    far = np.abs(output - wanted.numpy()) > 1e-4
    assert far.mean() < 0.01  # a rounding that falls on the other side here and there


def test_a_file_of_free_sizes_builds_with_a_profile(segmenter, tmp_path):
    compiler = get_compiler("tensorrt-rtx")
    if compiler.missing():
        pytest.skip(compiler.missing())
    shapes = ShapeRange((1, 3, 8, 8), (4, 3, 16, 16), (4, 3, 32, 48))
    options = BuildOptions(profiles=({"input": shapes},), compute_capability="8.9")
    info = compiler.build(segmenter[1], tmp_path / "model.trt", options)
    assert info.profiles == ({"input": shapes},)
    assert any(layer.precision == "int8" for layer in info.layers)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (None, r"\[build-engine\] profiles"),
        (ShapeRange((1, 4, 8, 8), (4, 4, 16, 16), (4, 4, 32, 48)), r"has \[batch, 3, height, width\]"),
        (ShapeRange((1, 3), (4, 3), (4, 3)), r"has \[batch, 3, height, width\]"),
    ],
)
def test_without_sizes_that_fit_nothing_is_built(segmenter, tmp_path, shapes, message):
    compiler = get_compiler("tensorrt-rtx")
    if compiler.missing():
        pytest.skip(compiler.missing())
    profiles = ({"input": shapes},) if shapes else ()
    options = BuildOptions(batch=BatchRange(1, 4, 4), profiles=profiles, compute_capability="8.9")
    with pytest.raises(UsageError, match=message):
        compiler.build(segmenter[1], tmp_path / "model.trt", options)


class Shrinking(nn.Module):
    """Leaves one pixel of 8 x 8."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c, 4, 3, stride=2, padding=1) for c in (1, 4, 4))
        self.same = nn.Conv2d(4, 4, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        for conv in self.convs:
            x = torch.relu(conv(x))
        return self.head(self.pool(x + self.same(x)).flatten(1))


def test_a_feature_map_of_one_pixel_is_no_constant(tmp_path):
    """torch.export would take it for one, and leave the pooling out."""
    torch.manual_seed(0)
    model, x = Shrinking().eval(), torch.randn(2, 1, 8, 8)
    export_onnx(model, x, tmp_path / "model.onnx", opset=20, dynamic=ALL)
    for images in (x, other_size(x, ALL)):
        with torch.no_grad():
            np.testing.assert_allclose(in_onnxruntime(tmp_path / "model.onnx", images), model(images), atol=1e-5)


def test_one_free_dimension_alone(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()).eval()
    export_onnx(model, torch.randn(1, 1, 8, 8), tmp_path / "model.onnx", opset=20, dynamic=("batch", "width"))
    assert sizes_of(tmp_path / "model.onnx") == ["batch", 1, 8, "width"]


class Loop(nn.Module):
    def forward(self, x):
        return sum(x[..., column] for column in range(x.shape[3])).flatten(1)


@pytest.mark.parametrize(
    ("layer", "shape", "where", "message"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), (1, 8, 8), "1.1", "takes no images of another size"),
        (Loop(), (1, 8, 8), "Sequential", "fixes the width"),
        (nn.ReLU(), (8,), "[export] dynamic", "has no height and width"),
    ],
)
def test_a_model_of_one_size_is_refused(layer, shape, where, message, tmp_path):
    with pytest.raises(StepError, match=message) as caught:
        export_onnx(nn.Sequential(nn.ReLU(), layer), torch.randn(2, *shape), tmp_path / "m.onnx", opset=20, dynamic=ALL)
    assert caught.value.where == where
    assert not list(tmp_path.iterdir())


class Branching(nn.Module):
    """Halves wide images before it pools them."""

    def forward(self, x):
        if x.shape[3] > 10:
            x = nn.functional.avg_pool2d(x, 2)
        return x.amax((2, 3))


def test_a_branch_on_the_size_is_told(tmp_path):
    path, images = tmp_path / "model.onnx", torch.randn(2, 3, 12, 12)
    told = export_onnx(Branching(), images, path, opset=20, dynamic=ALL)
    assert "width > 10" in told.split(" and ")  # torch before 2.13 tells the parities, too
    assert export_onnx(Branching(), images, path, opset=20) == ""
    assert export_onnx(Shrinking(), torch.randn(2, 1, 8, 8), path, opset=20, dynamic=ALL) == ""
