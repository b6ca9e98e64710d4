"""Layers whose weights are far smaller than FP16 numbers, from the plan to the exported files."""

import pytest
from projects import UNTRAINED, new_project, working_in

from maseRT.workspace import read_json

NET = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.quiet = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)
        with torch.no_grad():
            self.quiet.weight.mul_(1e-6)
            self.quiet.bias.mul_(1e-3)
    def forward(self, x):
        x = self.quiet(self.stem(x).relu() * 1e3).relu() * 1e3
        return self.head(x.mean((2, 3)))
"""

CONFIG = (
    UNTRAINED.replace("digits-cnn", "quiet_net:Net")
    + """
[quantize]
[calibrate]
batches = 2
methods = ["max", "mse"]
[finetune]
epochs = 1
initial_learning_rate = 1e-4
[export]
"""
)


@pytest.fixture
def project(tmp_path):
    with working_in(tmp_path, quiet_net=NET):
        yield new_project(tmp_path, CONFIG)


@pytest.mark.parametrize("float_precision", ["fp32", "fp16"])
def test_its_int8_layer_is_as_exact_as_others_and_its_scales_are_fp32(project, caplog, float_precision):
    outcomes = project.transform(f"quantize.float={float_precision}")
    assert outcomes["export"].status == "done"
    calibrated = read_json(project.workspace.calibration, made_by="calibrate")
    assert all(method["sqnr_db"]["quiet"] > 30 for method in calibrated["methods"].values())
    plan = {layer["name"]: layer for layer in read_json(project.workspace.final_plan, made_by="calibrate")["layers"]}
    assert plan["quiet"]["precision"] == "int8"
    assert plan["quiet"]["float"] == "fp32"
    assert ("quiet is kept in fp32: quiet.weight reaches" in caplog.text) == (float_precision == "fp16")
    checks = read_json(project.workspace.export, made_by="export")["checks"]
    assert checks["quantized"]["all"]["sqnr_db"] > 30
