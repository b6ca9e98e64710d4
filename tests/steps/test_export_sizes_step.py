"""export and build-engine where the images' sizes stay free."""

import pytest
from projects import UNTRAINED, new_project, working_in

from maseRT.errors import UsageError
from maseRT.onnx_export import export_onnx
from maseRT.runtimes import get_compiler
from maseRT.steps import export
from maseRT.workspace import read_json

MODEL = """
from torch import nn

def make():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )
"""
CONFIG = (
    UNTRAINED.replace("digits-cnn", "pooling:make")
    + """
[quantize]
[calibrate]
batches = 1
methods = ["max"]
[export]
dynamic = ["batch", "height", "width"]
[build-engine]
runtime = "tensorrt-rtx"
compute_capability = "8.9"
on_mismatch = "warn"
profiles = [{ input = { min = [1, 1, 8, 8], opt = [16, 1, 16, 24], max = [64, 1, 32, 32] } }]
"""
)


@pytest.fixture
def project(tmp_path):
    with working_in(tmp_path, pooling=MODEL):
        yield new_project(tmp_path, CONFIG)


def test_both_sizes_are_checked_and_the_engine_takes_the_profile(project):
    if get_compiler("tensorrt-rtx").missing():
        pytest.skip("no tensorrt-rtx")
    project.transform(last="build-engine")
    checks = read_json(project.workspace.export, made_by="export")["checks"]
    for found in checks.values():
        elsewhere = found["disabled, images of another size"]
        assert elsewhere["samples"] == 8
        assert elsewhere["sqnr_db"] is None or elsewhere["sqnr_db"] > 30
    (profile,) = read_json(project.workspace.sidecar, made_by="build-engine")["profiles"]
    assert profile["input"]["max"] == [64, 1, 32, 32]


def test_a_file_that_takes_one_size_after_all_is_refused(project, monkeypatch):
    project.transform(last="calibrate")

    def fixed(*args, dynamic, **options):
        export_onnx(*args, **options)

    monkeypatch.setattr(export, "export_onnx", fixed)
    with pytest.raises(UsageError, match=r"not \[any, 1, 8, 8\]"):
        project.single("export")
    assert not project.workspace.onnx.exists()
