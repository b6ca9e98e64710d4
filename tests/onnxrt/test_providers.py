"""Devices and their execution providers; those that cannot run here by their mapping alone."""

import json
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
from onnxruntime.capi import _pybind_state

from maseRT.errors import CheckError, MissingError, UsageError
from maseRT.onnxrt import providers
from maseRT.onnxrt.providers import (
    CPU,
    PROVIDERS,
    SessionSettings,
    parse_device,
    provider_options,
    saturating_products,
    why_unavailable,
)
from maseRT.runtimes.onnxruntime import OnnxRuntime, check_assignment, create_session


@pytest.mark.parametrize(
    ("device", "name", "index"),
    [
        ("cpu", "CPUExecutionProvider", 0),
        ("cuda", "CUDAExecutionProvider", 0),
        ("cuda:1", "CUDAExecutionProvider", 1),
        ("tensorrt", "TensorrtExecutionProvider", 0),
        ("migraphx:2", "MIGraphXExecutionProvider", 2),
        ("openvino", "OpenVINOExecutionProvider", 0),
        ("directml", "DmlExecutionProvider", 0),
        ("coreml", "CoreMLExecutionProvider", 0),
    ],
)
def test_every_device_has_its_provider(device, name, index):
    provider, found = parse_device(device)
    assert (provider.name, found) == (name, index)


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "", "CPU"])
def test_an_unknown_device_is_a_usage_error(device):
    with pytest.raises(UsageError, match="is no device of onnxruntime"):
        parse_device(device)


@pytest.mark.parametrize("device", ["cpu:0", "cpu:3", "coreml:1"])
def test_a_number_behind_a_device_without_numbers_is_a_usage_error(device):
    with pytest.raises(UsageError, match=f"'{device}' is no device of onnxruntime: [a-z]+ has no numbers"):
        parse_device(device)


def test_options_reach_the_provider_they_are_for(tmp_path):
    settings = SessionSettings(threads=3, cuda_graph=True, cache=tmp_path, float32=True)
    options = {device: provider_options(PROVIDERS[device], 1, settings) for device in PROVIDERS}
    assert options["cpu"] == {}
    assert options["cuda"] == {"device_id": "1", "enable_cuda_graph": "1"}
    assert options["migraphx"] == options["directml"] == {"device_id": "1"}
    assert options["tensorrt"] == {
        "device_id": "1",
        "trt_int8_enable": "1",
        "trt_fp16_enable": "1",
        "trt_cuda_graph_enable": "1",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(tmp_path),
    }
    assert options["coreml"] == {"ModelFormat": "MLProgram", "MLComputeUnits": "ALL"}
    assert options["openvino"]["num_of_threads"] == "3"
    assert options["openvino"]["cache_dir"] == str(tmp_path)
    assert json.loads(options["openvino"]["load_config"]) == {"CPU": {"INFERENCE_PRECISION_HINT": "f32"}}
    assert provider_options(PROVIDERS["openvino"], 0, SessionSettings()) == {}


@pytest.mark.parametrize("device", ["migraphx", "directml", "coreml"])
def test_a_provider_that_is_not_built_in_says_how_to_get_it(device, linear_onnx):
    if PROVIDERS[device].name in onnxruntime.get_available_providers():
        pytest.skip("it is built in here")
    reason = why_unavailable(device)
    assert PROVIDERS[device].name in reason
    assert "pip install" in reason
    with pytest.raises(MissingError):
        OnnxRuntime().open(linear_onnx, device)


def test_a_plugin_without_a_device_for_this_hardware_says_so(monkeypatch):
    monkeypatch.setattr(providers, "find_spec", lambda name: object())
    monkeypatch.setattr(providers, "plugin_devices", lambda provider: [])
    assert "offers no device 0 for this machine's hardware" in why_unavailable("openvino")


def test_a_plugin_that_is_not_installed_says_so(monkeypatch):
    monkeypatch.setattr(providers, "find_spec", lambda name: None if name == "onnxruntime_ep_openvino" else object())
    assert "pip install onnxruntime-ep-openvino" in why_unavailable("openvino")


def has_openvino_built_in(monkeypatch, devices: list[str]) -> None:
    """Make the installed onnxruntime look like onnxruntime-openvino, with these devices and no plugin."""
    name = PROVIDERS["openvino"].name
    monkeypatch.setattr(providers, "find_spec", lambda name: None if name == "onnxruntime_ep_openvino" else object())
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [name, CPU])
    monkeypatch.setattr(_pybind_state, "get_available_openvino_device_ids", lambda: devices, raising=False)


def test_a_provider_that_is_built_in_needs_no_plugin(linear_onnx, monkeypatch):
    name = PROVIDERS["openvino"].name
    asked = {}
    has_openvino_built_in(monkeypatch, ["CPU"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda file, options, **rest: asked.update(rest))
    assert why_unavailable("openvino") is None
    create_session(linear_onnx, "openvino", SessionSettings(threads=2))
    assert asked["providers"] == [name, CPU]
    assert asked["provider_options"][0]["num_of_threads"] == "2"


@pytest.mark.parametrize(
    ("device", "openvino_name"),
    [("openvino", "CPU"), ("openvino:0", "CPU"), ("openvino:1", "GPU.0"), ("openvino:2", "GPU.1")],
)
def test_a_number_chooses_the_device_of_a_provider_that_is_built_in(device, openvino_name, linear_onnx, monkeypatch):
    asked = {}
    has_openvino_built_in(monkeypatch, ["GPU.0", "GPU.1", "CPU"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda file, options, **rest: asked.update(rest))
    assert why_unavailable(device) is None
    create_session(linear_onnx, device, SessionSettings())
    assert asked["provider_options"][0]["device_type"] == openvino_name


def test_a_number_beyond_the_devices_of_a_built_in_provider_is_refused(linear_onnx, monkeypatch):
    has_openvino_built_in(monkeypatch, ["CPU", "GPU"])
    with pytest.raises(MissingError, match="OpenVINO has no device 2 here: CPU, GPU"):
        OnnxRuntime().open(linear_onnx, "openvino:2")


def test_plugin_libraries_are_registered_once(monkeypatch):
    registered = []
    monkeypatch.setattr(providers, "_REGISTERED", set())
    monkeypatch.setattr(providers, "import_module", lambda name: SimpleNamespace(get_library_path=lambda: "lib.so"))
    monkeypatch.setattr(
        onnxruntime, "register_execution_provider_library", lambda *args: registered.append(args), raising=False
    )
    for _ in range(2):
        providers.plugin_devices(PROVIDERS["openvino"])
    assert registered == [("onnxruntime_ep_openvino", "lib.so")]


def test_openvino_runs_on_the_plugin_where_it_has_a_device(linear_onnx):
    reason = why_unavailable("openvino")
    if reason:
        pytest.skip(reason)
    settings = SessionSettings(threads=1, float32=True)
    x = np.ones((2, 4), np.float32)
    with OnnxRuntime().open(linear_onnx) as session:
        expected = session.infer({"input": x})["output"]
    with OnnxRuntime().open(linear_onnx, "openvino", settings=settings) as session:
        assert session.providers[0] == "OpenVINOExecutionProvider"
        assert session.assigned["OpenVINOExecutionProvider"] > 0
        np.testing.assert_allclose(session.infer({"input": x})["output"], expected, rtol=1e-5)


def test_a_provider_that_took_no_node_is_an_error():
    with pytest.raises(CheckError, match="took no node") as caught:
        check_assignment("CUDAExecutionProvider", {"CPUExecutionProvider": 7}, where="model.onnx")
    assert "allow_fallback" in str(caught.value)
    check_assignment("CUDAExecutionProvider", {"CUDAExecutionProvider": 5, "CPUExecutionProvider": 2}, where="")


def test_a_fallback_that_is_allowed_runs(linear_onnx, monkeypatch):
    """onnxruntime drops the CUDA provider that it does not have, and goes on with the CPU's."""
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("it would not be replaced")
    monkeypatch.setattr(OnnxRuntime, "missing", lambda self, device=None: None)
    settings = SessionSettings(allow_fallback=True)
    with pytest.warns(UserWarning, match="not in available provider"):
        session = OnnxRuntime().open(linear_onnx, "cuda", settings=settings)
    with session:
        assert session.providers == ("CPUExecutionProvider",)


@pytest.mark.parametrize(
    ("flags", "saturates"), [("fpu avx2", True), ("fpu avx2 avx_vnni", False), ("avx512_vnni", False), (None, False)]
)
def test_products_saturate_without_vnni(flags, saturates, monkeypatch):
    text = "model name : x\n" if flags is None else f"model name : x\nflags\t\t: {flags}\n"
    monkeypatch.setattr(providers.Path, "read_text", lambda self, **options: text)
    saturating_products.cache_clear()
    try:
        assert saturating_products() is saturates
    finally:
        saturating_products.cache_clear()
