"""The command line as a shell sees it: output, exit codes, signals."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from maseRT.cli import app
from maseRT.config_file import load_config
from maseRT.errors import ExitCode

CONFIG = """
[run]
threads = 1
[model]
name = "digits-cnn"
[data]
name = "digits"
[train]
epochs = 1
learning_rate = 1e-3
"""

UNBUFFERED = {**os.environ, "PYTHONUNBUFFERED": "1"}
COMMANDS = ["train", "quantize", "calibrate", "finetune", "export", "build-engine", "analyze"]


@pytest.fixture
def config(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "digits.toml"
    path.write_text(CONFIG)
    return path


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_help_names_every_command_and_loads_nothing_heavy():
    code = "import sys; from maseRT.cli import main; sys.argv[1:] = ['--help']\ntry: main()\n"
    code += "except SystemExit: print({'torch', 'onnx', 'numpy', 'pydantic'} & set(sys.modules) or 'light')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(name in result.stdout for name in ["transform", *COMMANDS, "explain", "report", "compare", "audit"])
    assert result.stdout.endswith("light\n")


@pytest.mark.parametrize("command", ["transform", *COMMANDS])
def test_a_missing_config_is_one_message_and_exit_code_2(command):
    result = invoke(command, "--config", "nowhere.toml")
    assert result.exit_code == ExitCode.USAGE
    assert result.stdout == ""
    assert "nowhere.toml: no such config file" in result.stderr


def test_json_reports_errors_as_one_object(config):
    result = invoke("quantize", "--config", config, "--set", "data.nme='x'", "--json")
    found = json.loads(result.stdout)
    assert found["exit_code"] == result.exit_code == ExitCode.USAGE
    assert "data.nme: unknown key; did you mean 'name'?" in found["error"]["what"]


def test_train_prints_its_result_and_json_only_json(config):
    result = invoke("train", "--config", config)
    assert result.exit_code == 0
    assert re.match(r"train +[\d.]+ s  validation accuracy", result.stdout)
    result = invoke("train", "--config", config, "--json")
    found = json.loads(result.stdout)
    assert (found["status"], found["command"], found["schema"]) == ("cached", "train", 1)
    assert found["validation"]["samples"] > 0
    assert Path(found["outputs"][0]).is_file()


def test_dry_run_writes_nothing(config, tmp_path):
    result = invoke("transform", "--config", config, "--dry-run", "--json")
    (step,) = json.loads(result.stdout)["steps"]
    assert (step["status"], step["why"]) == ("would run", "never completed")
    assert not (tmp_path / "mase_output").exists()


def test_output_and_run_name_the_folder(config, tmp_path):
    result = invoke("train", "--config", config, "--output", tmp_path / "o", "--run", "r", "--quiet")
    assert (result.exit_code, result.stdout) == (0, "")
    assert (tmp_path / "o/tensorrt/quantization/r/ckpts/float.safetensors").is_file()


def test_an_unknown_step_suggests_the_nearest(config):
    result = invoke("transform", "--config", config, "--from", "quantise")
    assert result.exit_code == ExitCode.USAGE
    assert "did you mean 'quantize'?" in result.stderr


def test_a_fix_works_on_the_same_run(config):
    options = ("--config", config, "--output", "o ut", "--run", "other")
    result = invoke("quantize", *options, "--set", "quantize.precision='int8'")
    assert result.exit_code == ExitCode.FAILED
    assert f"run `masert train --config {config} --output 'o ut' --run other` first" in result.stderr


def test_load_takes_the_place_of_training(config, tmp_path):
    invoke("train", "--config", config)
    weights = tmp_path / "mase_output/tensorrt/quantization/digits/ckpts/float.safetensors"
    options = ("--config", config, "--run", "loaded", "--load", weights, "--load-type", "safetensors")
    assert invoke("train", *options).exit_code == ExitCode.USAGE
    result = invoke("quantize", *options, "--set", "quantize.precision='int8'")
    assert result.exit_code == 0, result.stderr


def test_a_reader_that_leaves_does_not_hurt(config):
    command = f"{sys.executable} -m maseRT.cli config --schema | head -1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "{\n", "")


def bash(command: str) -> subprocess.CompletedProcess:
    """Run a command line in which $masert stands for the command."""
    masert = f"{sys.executable} -m maseRT"
    return subprocess.run(
        ["bash", "-c", command.replace("$masert", masert)], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_change_no_exit_code(config, closed):
    assert bash(f"$masert --version {closed}").returncode == 0
    result = bash(f"$masert train --config missing.toml --json {closed}")
    assert result.returncode == ExitCode.USAGE
    assert "Traceback" not in result.stderr


def test_what_is_opened_first_does_not_become_stdout(config):
    """A library that prints would write into it."""
    Path("mine.py").write_text("import os\nfile = open('mine.txt', 'w')\nos.write(1, b'chatter')\nmake = None\n")
    bash(f"$masert train --config {config} --set model.name=mine:make >&- 2>&-")
    assert Path("mine.txt").read_text() == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("options", ["config --schema", "config --schema --json", "--help"])
def test_an_output_that_cannot_be_written_is_no_bug(options):
    result = bash(f"$masert {options} > /dev/full")
    assert result.returncode == ExitCode.FAILED
    assert "No space left on device" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_name_that_the_terminal_cannot_show_is_no_bug(config, encoding):
    result = bash(f"PYTHONIOENCODING={encoding} $masert init --file 中.toml")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("wrote 中.toml" if encoding == "utf-8" else r"wrote \u4e2d.toml")


def test_messages_that_cannot_be_written_change_no_exit_code():
    assert bash("$masert train --config missing.toml 2> /dev/full").returncode == ExitCode.USAGE


def test_terminated_while_working_ends_with_143_and_the_next_run_completes(config):
    command = [sys.executable, "-m", "maseRT.cli", "train", "--config", str(config), "--set", "train.epochs=500"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    lock = Path("mase_output/tensorrt/quantization/digits/cache/lock")
    while not lock.exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == ExitCode.TERMINATED
    assert invoke("train", "--config", config).exit_code == 0


def _listen_to_interrupts() -> None:
    """A process started in the background ignores them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def training(epochs: int, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "maseRT.cli", "train", "--config", "digits.toml", f"--set=train.epochs={epochs}"]
    return subprocess.Popen(
        [*command, *options], stderr=subprocess.PIPE, text=True, preexec_fn=_listen_to_interrupts, env=UNBUFFERED
    )


def test_ctrl_c_finishes_the_epoch_and_the_next_run_goes_on_from_there(config):
    process = training(30)
    state = Path("mase_output/tensorrt/quantization/digits/ckpts/float_resume.safetensors")
    while not state.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == ExitCode.INTERRUPTED
    assert stderr.splitlines()[-1] == "interrupted; what was done is kept"
    assert "Traceback" not in stderr
    result = invoke("train", "--config", config, "--set", "train.epochs=30", "--json")
    assert "resuming after epoch" in result.stderr
    assert json.loads(result.stdout)["epochs"] == 30
    assert not state.exists()


def test_ctrl_c_twice_stops_at_once_and_leaves_no_half_written_file(config):
    process = training(500)
    folder = Path("mase_output/tensorrt/quantization/digits")
    while not (folder / "ckpts/float_resume.safetensors").exists():
        time.sleep(0.01)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == ExitCode.INTERRUPTED
    assert "Traceback" not in stderr
    assert list(folder.rglob(".partial-*")) == []


IMPORTING = """
import pathlib, time
pathlib.Path("importing").touch()
try:
    for _ in range(100):
        time.sleep(0.01)
except KeyboardInterrupt:
    raise ImportError("cannot import what was interrupted")

def make():
    time.sleep(60)
"""


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_during_an_import_is_no_bug(config, times):
    """However often it is pressed: importing code may turn the second one into another error."""
    Path("mine.py").write_text(IMPORTING)
    process = training(1, "--set", "model.name='mine:make'")
    while not Path("importing").exists():
        time.sleep(0.01)
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    _, stderr = process.communicate(timeout=50)
    assert process.returncode == ExitCode.INTERRUPTED
    assert "finishing an import; Ctrl-C again stops at once" in stderr
    assert stderr.endswith("interrupted; what was done is kept\n")


def test_a_bug_ends_with_its_log_and_no_traceback(config, monkeypatch):
    def broken(*arguments):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("maseRT.steps.pipeline.Run.single", broken)
    result = invoke("train", "--config", config)
    assert result.exit_code == ExitCode.BUG
    assert "Traceback" not in result.stderr
    log = Path(re.search(r"details: (.*)", result.stderr).group(1))
    assert "ZeroDivisionError: a bug" in log.read_text()
    log.unlink()


def test_a_bug_whose_log_cannot_be_written_is_told_all_the_same(monkeypatch):
    def broken(*arguments, **options):
        raise PermissionError("no such place") if "prefix" in options else ZeroDivisionError("a bug")

    monkeypatch.setattr("maseRT.doctor.examine", broken)
    monkeypatch.setattr("tempfile.mkstemp", broken)
    result = invoke("doctor")
    assert result.exit_code == ExitCode.BUG
    assert "ZeroDivisionError: a bug\ndetails could not be written: no such place" in result.stderr


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC, errno.EMFILE, errno.EIO])
def test_what_is_the_machines_is_no_bug(monkeypatch, number):
    def broken():
        raise OSError(number, os.strerror(number), "some/file")

    monkeypatch.setattr("maseRT.doctor.examine", broken)
    result = invoke("doctor")
    assert result.exit_code == ExitCode.FAILED
    assert f"error some/file: {os.strerror(number)}\nfix: " in result.stderr


def test_a_batch_for_which_the_memory_does_not_suffice_is_no_bug(monkeypatch):
    def broken():
        import torch

        torch.empty(1 << 60)

    monkeypatch.setattr("maseRT.doctor.examine", broken)
    result = invoke("doctor")
    assert result.exit_code == ExitCode.FAILED
    assert "error out of memory: " in result.stderr


def test_a_package_that_is_not_installed_is_named(config, monkeypatch):
    monkeypatch.setattr("maseRT.steps.table.get_step", lambda name: __import__("a_package_that_is_not_there"))
    result = invoke("train", "--config", config)
    assert result.exit_code == ExitCode.MISSING
    assert "the Python module 'a_package_that_is_not_there' is not installed" in result.stderr


def test_strict_ends_with_3_when_a_runtime_is_left_out(config):
    sections = ["quantize.precision='fp32'", "analyze.runtimes=['tensorrt']"]
    options = [argument for section in sections for argument in ("--set", section)]
    result = invoke("transform", "--config", config, *options, "--strict")
    assert result.exit_code == ExitCode.MISSING
    assert "tensorrt" in result.stderr
    assert invoke("transform", "--config", config, *options).exit_code == 0


def test_init_writes_a_config_that_loads(config, tmp_path):
    path = tmp_path / "new.toml"
    assert invoke("init", "--model", "vgg7", "--data", "cifar10", "--file", path).exit_code == 0
    assert load_config(path).model.name == "vgg7"
    assert invoke("init", "--file", path).exit_code == ExitCode.USAGE
    assert invoke("init", "--file", path, "--force").exit_code == 0
    assert load_config(path).model.name == "digits-cnn"


def test_config_prints_the_schema_and_the_resolved_file(config):
    schema = json.loads(invoke("config", "--schema").stdout)
    assert "build-engine" in schema["properties"]
    resolved = json.loads(invoke("config", "--config", config, "--set", "data.batch_size=8").stdout)
    assert resolved["data"]["batch_size"] == 8
    assert invoke("config").exit_code == ExitCode.USAGE


def test_doctor_says_which_runtimes_work_here():
    found = json.loads(invoke("doctor", "--json").stdout)
    assert found["command"] == "doctor"
    assert "onnxruntime" in json.dumps(found)
    assert "onnxruntime" in invoke("doctor").stdout


@pytest.mark.skipif(os.name != "posix", reason="completion scripts are tested for bash")
def test_shell_completion_offers_the_commands():
    environment = {**os.environ, "_MASERT_COMPLETE": "complete_bash", "COMP_WORDS": "masert tr", "COMP_CWORD": "1"}
    masert_path = Path(sys.executable).with_name("masert")
    result = subprocess.run([masert_path], env=environment, capture_output=True, text=True, check=False)
    assert {"transform", "train"} <= set(result.stdout.split())
