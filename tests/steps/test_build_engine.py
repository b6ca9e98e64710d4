"""build-engine and explain: what a mismatch leaves behind, and what the files tell afterwards."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from projects import UNTRAINED, Project, new_project, working_in
from typer.testing import CliRunner

from maseRT.cli import app
from maseRT.errors import CheckError, ExitCode, StepError
from maseRT.records import read_record

MODEL = """
from torch import nn

def make():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.ConvTranspose2d(16, 16, 2, stride=2),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(2048, 10),
    )
"""
CONFIG = (
    UNTRAINED.replace("digits-cnn", "upscaler:make")
    + """
[quantize]
[calibrate]
batches = 1
methods = ["max"]
[export]
[build-engine]
runtime = "tensorrt-rtx"
batch = { min = 1, opt = 8, max = 8 }
[analyze]
runtimes = ["tensorrt-rtx"]
"""
)
RULES = "quantize.rules=[{ name = '3', precision = 'fp32' }]"


@dataclass(frozen=True)
class Built:
    """A project whose engine has a mismatch, and the error that says so."""

    project: Project
    error: CheckError


@pytest.fixture(scope="module")
def in_folder(tmp_path_factory):
    """A working directory with the model's file."""
    folder = tmp_path_factory.mktemp("up")
    with working_in(folder, upscaler=MODEL):
        yield folder


@pytest.fixture(scope="module")
def built(in_folder: Path) -> Built:
    project = new_project(in_folder, CONFIG)
    with pytest.raises(CheckError) as caught:
        project.transform()
    return Built(project, caught.value)


@pytest.fixture
def copied(built: Built, tmp_path: Path) -> Project:
    """A copy of the project, to go on with."""
    shutil.copytree(built.project.folder, tmp_path / "project")
    return Project(tmp_path / "project")


def explained(project: Project, *arguments: str):
    options = ["--config", str(project.config), "--output", str(project.folder / "out"), *arguments]
    return CliRunner().invoke(app, ["explain", *options])


def test_a_mismatch_names_the_layers_and_a_rule_to_paste(built):
    error = built.error
    assert error.exit_code == ExitCode.CHECK
    assert "3 (ConvTranspose2d): asked int8, runs in fp32" in error.what
    assert '{ name = "3", precision = "fp32" },' in error.fix
    assert 'on_mismatch = "warn"' in error.fix


def test_an_engine_that_differs_does_not_look_complete(built):
    workspace = built.project.workspace
    assert workspace.engine.exists()
    assert not workspace.sidecar.exists()
    assert read_record(workspace, "build-engine") is None
    with pytest.raises(StepError, match="not there yet"):
        built.project.single("analyze")


def test_the_receipt_is_kept_and_explained(built):
    result = explained(built.project)
    assert result.exit_code == 0, result.stderr
    row = next(line for line in result.stdout.splitlines() if "ConvTranspose2d" in line)
    assert row.split()[:6] == ["3", "ConvTranspose2d", "int8", "int8", "fp32", "differs"]
    assert '{ name = "3", precision = "fp32" },' in result.stdout
    assert "kernels only change types or layouts" in result.stdout


def test_one_layer_is_explained_with_its_kernels(built):
    result = explained(built.project, "3")
    assert result.exit_code == 0
    assert "deconv" in result.stdout
    found = json.loads(explained(built.project, "0", "--json").stdout)
    assert found["layer"]["verdict"] == "as asked"
    assert found["layer"]["reason"] == "default"
    assert any("int8" in kernel["reads"] for kernel in found["kernels"])
    assert found["counts"]["differs"] == 1


def test_a_pattern_selects_layers_and_a_wrong_name_is_an_error(built):
    found = json.loads(explained(built.project, "[03]", "--json").stdout)
    assert [layer["name"] for layer in found["layers"]] == ["0", "3"]
    result = explained(built.project, "convx")
    assert result.exit_code == ExitCode.USAGE
    assert "no layer 'convx'" in result.stderr


def test_explaining_loads_no_torch(built):
    code = "import sys; from maseRT.cli import main; sys.argv[1:] = sys.argv[1:]\ntry: main()\n"
    code += "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    options = ["explain", "--config", built.project.config, "--output", built.project.folder / "out"]
    command = [sys.executable, "-c", code, *map(str, options)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.endswith("0 False\n")


def test_a_warning_is_enough_where_the_config_says_so(copied, caplog):
    outcomes = copied.transform("build-engine.on_mismatch='warn'", last="build-engine")
    assert outcomes["build-engine"].status == "done"
    assert outcomes["build-engine"].summary["precision"]["differ"] == ["3"]
    assert copied.workspace.sidecar.exists()
    assert "asked int8, runs in fp32" in caplog.text


def test_the_pasted_rule_ends_the_mismatch_and_an_old_receipt_is_refused(copied):
    copied.transform(RULES, last="export")
    result = explained(copied)
    assert result.exit_code == ExitCode.FAILED
    assert "is of an older plan or ONNX file" in result.stderr
    outcomes = copied.transform(RULES)
    assert outcomes["build-engine"].summary["precision"]["differ"] == []
    report = json.loads(copied.workspace.report.read_text())
    assert report["precision"]["layers"]
    assert "differs" not in {layer["verdict"] for layer in report["precision"]["layers"]}


def test_before_there_is_an_engine_what_is_known_is_told(in_folder, tmp_path):
    project = new_project(tmp_path / "early", CONFIG)
    assert explained(project).exit_code == ExitCode.FAILED
    project.transform(last="quantize")
    found = json.loads(explained(project, "--json").stdout)
    assert {layer["verdict"] for layer in found["layers"]} == {"not observed"}
    project.transform(last="export")
    found = json.loads(explained(project, "--json").stdout)
    assert {layer["exported"] for layer in found["layers"]} == {"int8", "fp32", "folded into 0"}
    assert {layer["verdict"] for layer in found["layers"]} == {"not observed", "nothing to run"}
