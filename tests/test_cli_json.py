"""--json on every command: exactly one object on stdout, whatever happens."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from maseRT.cli import app
from maseRT.errors import ExitCode

CONFIG = """
[run]
threads = 1
device = "cpu"
[model]
name = "chatty:make"
[data]
name = "digits"
[train]
epochs = 1
learning_rate = 1e-3
[quantize]
[calibrate]
batches = 1
methods = ["max"]
[finetune]
epochs = 1
[export]
[onnxruntime]
device = "cpu"
modes = ["dynamic"]
[analyze]
runtimes = ["torch", "onnxruntime"]
batch_sizes = [8]
warmup = 0
iterations = 2
seconds = 0
isolate = false
energy = false
"""
CHATTY = """
import os
from torch import nn
print("a module that prints when it is imported")

def make():
    os.write(1, b"a factory that writes past Python\\n")
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
"""
ON_A_RUN = ("--config", "digits.toml")
REPORT = "mase_output/tensorrt/quantization/digits"
ARGUMENTS = {
    "transform": ON_A_RUN,
    **dict.fromkeys(("train", "quantize", "calibrate", "finetune", "export", "onnxruntime", "analyze"), ON_A_RUN),
    "explain": ON_A_RUN,
    "init": ("--file", "new.toml", "--force"),
    "doctor": (),
    "config": ON_A_RUN,
    "report": (REPORT,),
    "compare": (REPORT, REPORT),
    "audit": (REPORT,),
}
"""What each command needs to end well here."""
NOT_HERE = {"build-engine": "[build-engine]", "run": "--engine"}
"""Commands that need what a test of all machines does not have, and what their errors name."""
COMMANDS = sorted(typer.main.get_command(app).commands)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a finished run."""
    made = tmp_path_factory.mktemp("run")
    (made / "digits.toml").write_text(CONFIG)
    (made / "chatty.py").write_text(CHATTY)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        patch.syspath_prepend(made)
        result = CliRunner().invoke(app, ["transform", "--config", "digits.toml"])
        assert result.exit_code == 0, result.output
    return made


@pytest.fixture
def answer(folder, monkeypatch):
    """Calls a command with --json; returns its object and its exit code."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)

    def _answer(*arguments: str):
        result = CliRunner().invoke(app, [*arguments, "--json"])
        found = json.loads(result.stdout)
        assert result.stdout.count("\n") == 1
        assert (found["schema"], found["command"]) == (1, arguments[0] if arguments[0] in COMMANDS else "")
        assert ("error" in found) == (result.exit_code != 0)
        assert found.get("exit_code", 0) == result.exit_code
        return found, result.exit_code

    return _answer


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - set(NOT_HERE)))
def test_every_command_answers_with_one_object(answer, command):
    assert command in ARGUMENTS, "a new command: say here what it needs"
    found, code = answer(command, *ARGUMENTS[command])
    assert code == 0, found
    assert len(found) > 2


@pytest.mark.parametrize("command", COMMANDS)
def test_a_misspelt_option_is_one_object(answer, command):
    found, code = answer(command, "--no-such-option")
    assert code == ExitCode.USAGE
    assert "--no-such-option" in found["error"]["what"]
    assert found["error"]["fix"] == f"see `masert {command} --help`"


@pytest.mark.parametrize("command", ["init", "doctor", "config"])
def test_too_many_arguments_are_one_object(answer, command):
    assert answer(command, "surplus")[1] == ExitCode.USAGE


@pytest.mark.parametrize("command", sorted({*COMMANDS} - {"init", "doctor", "config", "report", "compare", "audit"}))
def test_what_is_missing_is_one_object(answer, command):
    found, code = answer(command)
    assert code == ExitCode.USAGE
    assert "Missing option" in found["error"]["what"]


@pytest.mark.parametrize("command", ["config", "report", "compare", "audit"])
def test_a_command_without_its_subject_is_one_object(answer, command):
    assert answer(command)[1] == ExitCode.USAGE


@pytest.mark.parametrize("command", sorted(NOT_HERE))
def test_an_error_of_a_step_is_one_object(answer, command):
    wanted = {"build-engine": ON_A_RUN, "run": ("--engine", "x.trt", "--input", "x.npz", "--output", "y.npz")}
    found, code = answer(command, *wanted[command])
    assert code in (ExitCode.USAGE, ExitCode.MISSING, ExitCode.FAILED)
    assert found["error"]["what"]


def test_schemas_are_one_object(answer):
    assert "build-engine" in answer("config", "--schema")[0]["json_schema"]["properties"]
    assert "rows" in answer("report", "--schema")[0]["json_schema"]["properties"]


def test_an_unknown_command_is_one_object(answer):
    found, code = answer("trian")
    assert code == ExitCode.USAGE
    assert "Did you mean 'train'?" in found["error"]["what"]


def test_a_bug_is_one_object(answer, monkeypatch):
    def broken() -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("maseRT.doctor.examine", broken)
    found, code = answer("doctor")
    assert code == ExitCode.BUG
    assert "ZeroDivisionError: a bug" in found["error"]["what"]
    Path(found["error"]["fix"].removeprefix("details: ")).unlink()


@pytest.mark.parametrize(
    ("raised", "code"), [(KeyboardInterrupt(), ExitCode.INTERRUPTED), (SystemExit(143), ExitCode.TERMINATED)]
)
def test_a_signal_is_one_object(answer, monkeypatch, raised, code):
    def stopped() -> None:
        raise raised

    monkeypatch.setattr("maseRT.doctor.examine", stopped)
    assert answer("doctor")[1] == code


def test_a_gate_that_fails_is_one_object_with_the_results(answer):
    found, code = answer("analyze", *ON_A_RUN, "--set", "gate.max_size_mb=1e-6")
    assert code == ExitCode.CHECK
    assert found["status"] in ("cached", "done")
    assert [gate["passed"] for gate in found["gates"]] == [False]
    assert "1 of 1 gates failed" in found["error"]["what"]


def test_help_stays_help():
    result = CliRunner().invoke(app, ["train", "--help", "--json"])
    assert result.exit_code == 0
    assert "Usage: masert train" in result.stdout
