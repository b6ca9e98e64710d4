"""`masert run` on ONNX files: no engine, no GPU, no torch."""

import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
from typer.testing import CliRunner

from maseRT.cli import app


@pytest.fixture
def files(linear_onnx, tmp_path):
    """The folder of the model, with x.npz beside it."""
    assert linear_onnx == tmp_path / "model.onnx"
    (wanted,) = onnxruntime.InferenceSession(linear_onnx, providers=["CPUExecutionProvider"]).get_inputs()
    x = np.random.default_rng(0).normal(size=(5, *wanted.shape[1:])).astype(np.float32)
    np.savez(tmp_path / "x.npz", **{wanted.name: x})
    return tmp_path


def expected(folder):
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    with np.load(folder / "x.npz") as feed:
        return session.run(None, dict(feed))[0]


def run(folder, *more):
    paths = ["--engine", str(folder / "model.onnx"), "--input", str(folder / "x.npz")]
    return CliRunner().invoke(app, ["run", *paths, "--output", str(folder / "y.npz"), *more])


@pytest.mark.parametrize("more", [[], ["--batch", "2"], ["--device", "cpu"]])
def test_arrays_go_through_an_onnx_file(files, more):
    told = run(files, *more)
    assert told.exit_code == 0, told.output
    with np.load(files / "y.npz") as outputs:
        (name,) = outputs.files
        np.testing.assert_allclose(outputs[name], expected(files), rtol=1e-5, atol=1e-6)


def test_a_device_that_is_not_here_and_one_that_does_not_exist(files):
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        assert run(files, "--device", "cuda:0").exit_code == 3
    assert run(files, "--device", "gpu").exit_code == 2
    assert not (files / "y.npz").exists()


def test_a_damaged_file_is_named(files):
    (files / "model.onnx").write_bytes(b"rubbish")
    told = run(files)
    assert told.exit_code == 4
    assert "model.onnx" in told.stderr


def test_torch_is_not_needed(files):
    program = "import sys; sys.modules['torch'] = None; from maseRT.cli import main; main()"
    options = ["run", "--engine", "model.onnx", "--input", "x.npz", "--output", "y.npz"]
    done = subprocess.run(
        [sys.executable, "-c", program, *options], cwd=files, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (files / "y.npz").exists()
