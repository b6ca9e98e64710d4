import subprocess
import sys

import pytest

from maseRT.errors import ExitCode, MissingError, UsageError
from maseRT.runtimes import COMPILERS, RUNTIMES, choose_compiler, get_compiler, get_runtime
from maseRT.runtimes.base import BatchRange
from maseRT.runtimes.trt import flavour


@pytest.mark.parametrize("name", RUNTIMES)
def test_every_runtime_has_its_name(name):
    assert get_runtime(name).name == name


@pytest.mark.parametrize("name", COMPILERS)
def test_every_compiler_has_its_name(name):
    assert get_compiler(name).name == name


def test_an_unknown_runtime_gets_the_nearest_name():
    with pytest.raises(UsageError, match="did you mean 'tensorrt'"):
        get_runtime("tensorr")


def test_a_runtime_that_does_not_build_is_no_compiler():
    with pytest.raises(UsageError, match="'torch' is no runtime that builds engines"):
        get_compiler("torch")


@pytest.fixture
def not_installed(monkeypatch):
    def hide(*modules):
        find = flavour.find_spec
        monkeypatch.setattr(flavour, "find_spec", lambda name: None if name in modules else find(name))

    return hide


def test_auto_takes_tensorrt_rtx_where_tensorrt_is_missing(not_installed):
    not_installed("tensorrt")
    assert choose_compiler("auto").name == "tensorrt-rtx"


def test_nothing_that_builds_is_missing_and_says_what_to_install(not_installed):
    not_installed("tensorrt", "tensorrt_rtx")
    with pytest.raises(MissingError) as caught:
        choose_compiler("auto")
    assert caught.value.exit_code is ExitCode.MISSING
    assert "tensorrt: tensorrt is not installed: pip install tensorrt" in str(caught.value)
    assert "tensorrt-rtx: tensorrt-rtx is not installed: pip install tensorrt-rtx" in str(caught.value)


def test_the_one_asked_for_is_not_replaced(not_installed):
    not_installed("tensorrt")
    with pytest.raises(MissingError, match="tensorrt is not installed"):
        choose_compiler("tensorrt")


def test_a_library_that_does_not_load_says_so(monkeypatch):
    def fail(name):
        raise OSError("libnvinfer.so.8: cannot open shared object file")

    monkeypatch.setattr(flavour, "import_module", fail)
    assert "tensorrt_rtx is installed but does not load: libnvinfer.so.8" in get_compiler("tensorrt-rtx").missing()


@pytest.mark.parametrize(("low", "opt", "high"), [(0, 1, 1), (2, 1, 4), (1, 8, 4)])
def test_batch_ranges_are_ordered(low, opt, high):
    with pytest.raises(UsageError, match="1 <= min <= opt <= max"):
        BatchRange(low, opt, high)


def test_the_registry_loads_no_runtime():
    code = "import sys, maseRT.runtimes; sys.exit(bool({'torch', 'numpy', 'onnxruntime', 'onnx'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
