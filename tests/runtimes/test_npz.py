"""`masert run`: engines on files of arrays, on a device that is host memory."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("cuda.bindings.runtime")

from device_in_memory import WEIGHT, Cuda, TensorRT

from maseRT.cli import app
from maseRT.hardware import Gpu
from maseRT.runtimes.base import EngineInfo, ShapeRange
from maseRT.runtimes.trt import cuda as calls
from maseRT.runtimes.trt import roles
from maseRT.runtimes.trt import session as module

X = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
SIDECAR = EngineInfo(
    runtime="tensorrt",
    version="0",
    target="9.0",
    gpu="NVIDIA X",
    profiles=({"input": ShapeRange((1, 4), (8, 4), (8, 4))},),
    onnx_sha256="",
    engine_sha256=hashlib.sha256(b"engine").hexdigest(),
    seconds=1.0,
    bytes=6,
    layers=None,
    layers_from="",
    notes=(),
)


@pytest.fixture
def machine(monkeypatch):
    device = Cuda()
    for user in (calls, module):
        monkeypatch.setattr(user, "cudart", lambda: device)
    monkeypatch.setattr(roles, "load", lambda flavour: TensorRT(device, [(1, 8)]))
    monkeypatch.setattr(roles, "why_cannot_run", lambda flavour, index: None)
    monkeypatch.setattr(roles, "nvidia_gpus", lambda: (Gpu(0, "NVIDIA X", "9.0", 1, "GPU-0"),))
    return device


@pytest.fixture
def files(tmp_path):
    (tmp_path / "model.trt").write_bytes(b"engine")
    (tmp_path / "model.json").write_text(json.dumps(SIDECAR.to_json()))
    np.savez(tmp_path / "x.npz", input=X)
    return tmp_path


def run(folder, *more, source="x.npz"):
    options = ["--engine", "model.trt", "--input", source, "--output", "y.npz"]
    paths = [str(folder / each) if "." in each else each for each in options]
    return CliRunner().invoke(app, ["run", *paths, *more])


def result(folder):
    with np.load(folder / "y.npz") as file:
        assert file.files == ["output"]
        return file["output"]


@pytest.mark.parametrize("batch", [[], ["--batch", "2"], ["--batch", "5"], ["--batch", "8"]])
def test_arrays_go_through_an_engine(machine, files, batch):
    told = run(files, *batch)
    assert told.exit_code == 0, told.output
    assert "y.npz: output [5, 3] float32" in told.stdout
    np.testing.assert_allclose(result(files), X @ WEIGHT, rtol=1e-5, atol=1e-5)
    assert not machine.alive, "memory and streams were not given back"


def test_batches_as_large_as_the_engine_takes(machine, files):
    x = np.concatenate([X, X, X, X])
    np.savez(files / "x.npz", input=x)
    assert run(files).exit_code == 2
    assert not (files / "y.npz").exists()
    assert run(files, "--batch", "8").exit_code == 0
    np.testing.assert_allclose(result(files), x @ WEIGHT, rtol=1e-5, atol=1e-5)


def test_json_has_shapes_and_types(machine, files):
    told = json.loads(run(files, "--json").stdout)
    assert told["outputs"] == {"output": {"shape": [5, 3], "dtype": "float32"}}


def test_an_engine_without_its_sidecar_is_trusted_only_expressly(machine, files):
    (files / "model.json").unlink()
    told = run(files)
    assert told.exit_code == 5
    assert "no sidecar" in told.stderr
    assert not (files / "y.npz").exists()
    assert run(files, "--trust").exit_code == 0


@pytest.mark.parametrize("more", [[], ["--trust"]])
def test_an_engine_without_weights_is_refused(machine, files, more):
    (files / "model.json").write_text(json.dumps({**SIDECAR.to_json(), "stripped": True}))
    told = run(files, *more)
    assert told.exit_code == 5
    assert "stripped, refit first" in told.stderr
    assert not (files / "y.npz").exists()


def test_another_gpus_engine_is_refused(machine, files):
    (files / "model.json").write_text(json.dumps({**SIDECAR.to_json(), "target": "8.9"}))
    told = run(files)
    assert told.exit_code == 5
    assert "built for compute capability 8.9; here it is 9.0" in told.stderr


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "no arrays in it"),
        ({"x": X}, "x"),
        ({"input": X[:, :3]}, "input"),
        ({"input": X.astype(np.float64)}, "float64"),
        ({"input": np.array([None])}, "not an .npz file of numbers"),
    ],
    ids=["none", "name", "shape", "dtype", "objects"],
)
def test_arrays_that_do_not_fit_are_refused(machine, files, arrays, message):
    np.savez(files / "x.npz", **arrays)
    told = run(files)
    assert told.exit_code == 2, told.output
    assert message in told.stderr


@pytest.mark.parametrize("content", [None, b"", b"rubbish", b"PK\x03\x04rubbish"])
def test_files_that_cannot_be_read_are_named(machine, files, content):
    if content is not None:
        (files / "bad.npz").write_bytes(content)
    told = run(files, source="bad.npz")
    assert told.exit_code == 2, told.output
    assert "bad.npz" in told.stderr


def test_a_single_array_is_no_npz_file(machine, files):
    np.save(files / "bad.npy", X)
    assert run(files, source="bad.npy").exit_code == 2


def test_arrays_of_different_lengths_are_not_cut(machine, files):
    np.savez(files / "x.npz", input=X, other=X[:2])
    told = run(files, "--batch", "2")
    assert told.exit_code == 2
    assert "differ in their first dimension" in told.stderr


def test_a_missing_engine_is_named(machine, files):
    (files / "model.trt").unlink()
    told = run(files)
    assert told.exit_code == 4
    assert "model.trt" in told.stderr


PROGRAM = """
import sys
sys.modules.update(dict.fromkeys(["torch", "onnx", "onnxruntime"]))
sys.path.insert(0, {tests!r})
from device_in_memory import Cuda, TensorRT
from maseRT.hardware import Gpu
from maseRT.runtimes.trt import cuda, roles, session
device = Cuda()
cuda.cudart = session.cudart = lambda: device
roles.load = lambda flavour: TensorRT(device, [(1, 8)])
roles.why_cannot_run = lambda flavour, index: None
roles.nvidia_gpus = lambda: (Gpu(0, "NVIDIA X", "9.0", 1, "GPU-0"),)
from maseRT.cli import main
main()
"""


def test_torch_is_not_needed(files):
    program = PROGRAM.format(tests=str(Path(__file__).parent))
    options = ["run", "--engine", "model.trt", "--input", "x.npz", "--output", "y.npz"]
    done = subprocess.run(
        [sys.executable, "-c", program, *options], cwd=files, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(result(files), X @ WEIGHT, rtol=1e-5, atol=1e-5)


def test_without_a_gpu_it_is_said(files):
    from maseRT.hardware import nvidia_gpus

    if nvidia_gpus():
        pytest.skip("there is a GPU")
    assert run(files).exit_code == 3
