"""The convolution that cuts an image into patches, for a transformer that goes on in float."""

import numpy as np
import onnx
import pytest
import torch
from exported import Exported
from torch import nn

from maseRT.onnxrt.graph import Graph
from maseRT.onnxrt.kernels import kernels_of
from maseRT.onnxrt.providers import SessionSettings

SHAPE = (3, 32, 32)


class Tokens(nn.Module):
    def __init__(self, patches):
        super().__init__()
        self.patches, self.norm = patches, nn.LayerNorm(64)
        self.up, self.down, self.head = nn.Linear(64, 256), nn.Linear(256, 64), nn.Linear(64, 10)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + 0.3 * self.down(nn.functional.gelu(self.up(self.norm(x))))
        return self.head(x.mean(1))


def made(folder, patches):
    torch.manual_seed(0)
    return Exported(folder, Tokens(patches).eval(), SHAPE)


def sqnr_db(expected, found):
    return 20 * np.log10(np.linalg.norm(expected) / np.linalg.norm(found - expected))


def test_what_it_writes_is_not_rounded(tmp_path):
    exported = made(tmp_path, nn.Conv2d(3, 64, 8, stride=8))
    path, form = exported.cpu()
    assert not [tensor for tensor, _, _ in form.added]
    kernels = kernels_of(path, "cpu", SessionSettings(threads=1))
    assert (kernels.float_convolutions, kernels.integer_convolutions) == (1, 0)
    assert kernels.integer_products == 2
    found = exported.infer(path)
    assert sqnr_db(exported.float, found) > sqnr_db(exported.float, exported.quantized) - 1


def test_its_weight_is_not_dequantized_in_every_run(tmp_path):
    exported = made(tmp_path, nn.Conv2d(3, 64, 8, stride=8))
    path, form = exported.cpu()
    graph = Graph(onnx.load(path))
    weight = next(node for node in graph.nodes if node.op_type == "Conv").input[1]
    assert graph.constant(weight).dtype == np.float32
    assert form.rounded_weights == 1


@pytest.mark.parametrize(
    "patches",
    [
        nn.Sequential(nn.Conv2d(3, 64, 8, stride=8), nn.ReLU()),
        nn.Conv2d(3, 64, 8, stride=4, padding=2),
        nn.Sequential(nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 4, stride=4)),
    ],
)
def test_other_convolutions_run_in_integers(patches, tmp_path):
    exported = made(tmp_path, patches)
    kernels = kernels_of(exported.cpu()[0], "cpu", SessionSettings(threads=1))
    assert kernels.float_convolutions == 0
    assert kernels.integer_convolutions == sum(isinstance(module, nn.Conv2d) for module in exported.model.modules())
