"""Layers that share a weight: each may have another BatchNorm behind it, and another precision."""

import pytest
from projects import CONFIG, new_project, working_in

from maseRT.workspace import read_json

NET = """
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        for i in range(4):
            setattr(self, f"conv{i}", nn.Conv2d(16, 16, 3, padding=1, bias=False))
            getattr(self, f"conv{i}").weight = self.conv0.weight
        self.norm0, self.norm1 = nn.BatchNorm2d(16), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 10)
    def forward(self, x):
        x = self.stem(x).relu()
        x = self.norm0(self.conv0(x)).relu()
        x = self.norm1(self.conv1(x)).relu()
        x = self.conv3(self.conv2(x).relu()).relu()
        return self.head(x.mean((2, 3)))
"""


@pytest.fixture
def project(tmp_path):
    with working_in(tmp_path, tied_net=NET):
        yield new_project(tmp_path, CONFIG.replace('"digits-cnn"', '"tied_net:Net"'))


@pytest.mark.parametrize(
    "rules", ["[]", '[{name = "conv1", precision = "fp16"}, {name = "conv2", precision = "fp32"}]']
)
def test_tied_layers_are_folded_and_converted_each_for_itself(project, rules):
    outcomes = project.transform(f"quantize.rules={rules}", "finetune.epochs=1", last="export")
    assert outcomes["export"].status == "done"
    trained = outcomes["train"].summary["validation"]["loss"]
    calibrated = read_json(project.workspace.root / "json" / "calibration.json", made_by="calibrate")
    assert calibrated["float"]["loss"] == pytest.approx(trained, rel=1e-4)
