"""Opening engines: sidecars, profiles, and what is missing here. Running them is in test_trt_gpu.py."""

import json
import subprocess
import sys

import pytest

from maseRT import hardware
from maseRT.errors import CheckError, ExitCode, MissingError, StepError, UsageError
from maseRT.hardware import Driver, Gpu
from maseRT.runtimes import get_runtime
from maseRT.runtimes.base import ShapeRange
from maseRT.runtimes.trt import flavour, roles
from maseRT.runtimes.trt.shapes import fit
from maseRT.runtimes.trt.sidecar import check_sidecar, sidecar_path


@pytest.fixture
def engine(mixed_engine, tmp_path):
    """Return a copy of the Mixed engine with its sidecar, and what it was built for."""
    path, info = tmp_path / "model.trt", mixed_engine[1]
    path.write_bytes(mixed_engine[0].read_bytes())
    sidecar_path(path).write_text(json.dumps(info.to_json()))
    return path, {"runtime": info.runtime, "version": info.version, "capability": info.target}


def test_the_sidecar_lies_beside_its_engine(engine):
    path, here = engine
    assert sidecar_path(path).name == "model.json"
    assert check_sidecar(path, path.read_bytes(), **here).target == "8.9"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runtime": "tensorrt"}, "built for runtime tensorrt-rtx; here it is tensorrt"),
        ({"version": "11.4.0"}, "here it is 11.4.0"),
        ({"capability": "8.6"}, "built for compute capability 8.9; here it is 8.6"),
    ],
)
def test_an_engine_for_something_else_is_refused(engine, change, message):
    path, here = engine
    with pytest.raises(CheckError, match=message) as caught:
        check_sidecar(path, path.read_bytes(), **{**here, **change})
    assert caught.value.exit_code is ExitCode.CHECK
    assert "masert build-engine" in caught.value.fix


def test_another_engine_under_the_same_name_is_refused(engine):
    path, here = engine
    with pytest.raises(CheckError, match=r"not the engine that model\.json speaks of"):
        check_sidecar(path, path.read_bytes() + b"x", **here)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"layers": 3}'])
def test_a_damaged_sidecar_is_named(engine, text):
    path, here = engine
    sidecar_path(path).write_text(text)
    with pytest.raises(CheckError, match=r"model\.json: damaged"):
        check_sidecar(path, path.read_bytes(), **here)


def test_an_engine_without_a_sidecar_is_not_loaded(engine):
    path, here = engine
    sidecar_path(path).unlink()
    with pytest.raises(CheckError, match="no sidecar"):
        check_sidecar(path, path.read_bytes(), **here)


@pytest.mark.parametrize(
    ("promise", "here", "loads"),
    [
        ("hardware_compatible", {"capability": "12.0"}, True),
        ("hardware_compatible", {"capability": "8.6"}, False),
        ("version_compatible", {"version": "11.0.0"}, True),
        ("version_compatible", {"version": "1.6.0"}, False),
    ],
)
def test_compatible_engines_load_on_what_is_newer(engine, promise, here, loads):
    path, built = engine
    sidecar_path(path).write_text(json.dumps({**json.loads(sidecar_path(path).read_text()), promise: True}))
    if loads:
        assert check_sidecar(path, path.read_bytes(), **{**built, **here})
    else:
        with pytest.raises(CheckError):
            check_sidecar(path, path.read_bytes(), **{**built, **here})


PROFILES = (
    {"input": ShapeRange((1, 4), (1, 4), (1, 4))},
    {"input": ShapeRange((8, 4), (16, 4), (32, 4))},
)


@pytest.mark.parametrize(
    ("batch", "profile", "computed"),
    [(1, 0, 1), (8, 1, 8), (32, 1, 32), (5, 1, 8), (0, 0, 1)],
)
def test_a_batch_gets_a_profile_and_is_filled_up_only_where_it_must(batch, profile, computed):
    assert fit({"input": (batch, 4)}, PROFILES, where="e") == (profile, {"input": (computed, 4)})


@pytest.mark.parametrize("shape", [(33, 4), (8, 5)])
def test_what_no_profile_takes_says_what_they_take(shape):
    with pytest.raises(
        UsageError, match=r"takes 'input' \[1, 4\] to \[1, 4\]; 'input' \[8, 4\] to \[32, 4\]; got 'input'"
    ):
        fit({"input": shape}, PROFILES, where="e")


@pytest.fixture
def machine(monkeypatch):
    def pretend(*, capability=None, cuda="13.0"):
        gpus = (Gpu(0, "NVIDIA X", capability, 1, "GPU-0"),) if capability else ()
        for module in (hardware, flavour, roles):
            monkeypatch.setattr(module, "nvidia_gpus", lambda: gpus)
        monkeypatch.setattr(hardware, "nvidia_driver", lambda: Driver("580", cuda))
        monkeypatch.setattr(flavour, "find_spec", lambda name: True)

    return pretend


@pytest.mark.parametrize("capability", ["7.5", "8.0", "8.6", "8.9", "12.0", "12.1"])
def test_gpus_that_tensorrt_rtx_runs_on(machine, capability):
    machine(capability=capability)
    assert get_runtime("tensorrt-rtx").missing() is None


@pytest.mark.parametrize("capability", ["7.0", "8.7", "9.0", "10.0", "1.2"])
def test_gpus_that_tensorrt_rtx_does_not_run_on(machine, capability):
    machine(capability=capability)
    reason = get_runtime("tensorrt-rtx").missing("cuda:0")
    assert f"does not run on NVIDIA X (compute capability {capability})" in reason
    assert "it runs on 7.5, 8.0, 8.6, 8.9, 12.x" in reason


def test_an_old_driver_is_the_reason(machine):
    machine(capability="8.9", cuda="12.4")
    assert "needs a driver for CUDA 13; driver 580 runs CUDA 12.4" in get_runtime("tensorrt-rtx").missing()


def test_no_gpu_is_the_reason(machine, engine):
    machine()
    assert "0 NVIDIA GPUs visible" in get_runtime("tensorrt-rtx").missing()
    with pytest.raises(MissingError, match="0 NVIDIA GPUs visible") as caught:
        get_runtime("tensorrt-rtx").open(engine[0], "cuda:0")
    assert caught.value.exit_code is ExitCode.MISSING


def test_a_gpu_of_another_number_is_missing(machine):
    machine(capability="8.9")
    assert "cuda:1 does not exist: 1 NVIDIA GPU visible" in get_runtime("tensorrt-rtx").missing("cuda:1")


def test_a_missing_cuda_python_says_what_to_install(machine, monkeypatch):
    machine(capability="8.9")
    monkeypatch.setattr(flavour, "find_spec", lambda name: None if name == "cuda" else True)
    assert get_runtime("tensorrt-rtx").missing() == "cuda-python is not installed: pip install cuda-python"


def test_a_missing_engine_is_named(machine, tmp_path):
    machine(capability="8.9")
    with pytest.raises(StepError, match=r"nothing\.trt: cannot read"):
        get_runtime("tensorrt-rtx").open(tmp_path / "nothing.trt", "cuda:0")


def test_a_wrong_sidecar_is_refused_before_the_engine_is_loaded(machine, engine):
    machine(capability="8.6")
    with pytest.raises(CheckError, match=r"capability 8\.9; here it is 8\.6"):
        get_runtime("tensorrt-rtx").open(engine[0], "cuda:0")


@pytest.mark.skipif(hardware.nvidia_gpus() != (), reason="there is a GPU")
def test_a_cuda_error_has_its_name_and_text():
    pytest.importorskip("cuda.bindings.runtime")
    from maseRT.runtimes.trt.cuda import Resources

    with pytest.raises(StepError, match=r"CUDA: cudaError\w+: \w+"):
        Resources()


@pytest.mark.parametrize("module", ["tensorrt", "tensorrt_rtx", "trt.session", "trt.cuda", "trt.build"])
def test_neither_torch_nor_onnx_is_needed_to_load_it(module):
    """A deployed engine has the library, cuda-python and numpy beside it, and nothing else."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'onnx', 'pydantic', 'filelock', 'rich', 'tomli']));"
        f"import maseRT.runtimes.{module}; from maseRT.runtimes import get_runtime;"
        "get_runtime('tensorrt').missing(); get_runtime('tensorrt-rtx').missing()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
