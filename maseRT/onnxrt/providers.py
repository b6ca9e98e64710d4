"""Execution providers by device: their names, options and packages, and why one is not here."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from maseRT.errors import UsageError, did_you_mean
from maseRT.hardware import why_no_gpu

CPU = "CPUExecutionProvider"

Optimization = Literal["all", "extended", "basic", "disabled"]


@dataclass(frozen=True)
class SessionSettings:
    """How a session is set up.

    Attributes:
        threads: CPU threads of one inference; None: all cores.
        optimization: how far ONNX Runtime rewrites the graph.
        cuda_graph: capture and replay CUDA graphs; needs bound inputs of one shape.
        allow_fallback: accept that another provider than the one asked for runs the model, or parts of it on the CPU.
        cache: a folder for engines and compiled models of providers that keep some.
        float32: OpenVINO computes what is not INT8 in FP32, where it would take BF16 on CPUs that have it.
    """

    threads: int | None = None
    optimization: Optimization = "all"
    cuda_graph: bool = False
    allow_fallback: bool = False
    cache: Path | None = None
    float32: bool = False


@dataclass(frozen=True)
class Provider:
    """What a device is to ONNX Runtime.

    Attributes:
        device: what configs call it.
        name: the execution provider.
        install: how to get it.
        form: which form of a quantized model its kernels like: "onnxruntime-cpu", "openvino" or "tensorrt".
        plugin: the module of the package that brings the provider as a library beside a stock onnxruntime; "" if none.
        tested: whether the project runs it in its tests.
    """

    device: str
    name: str
    install: str
    form: str
    plugin: str = ""
    tested: bool = False


PROVIDERS: dict[str, Provider] = {
    provider.device: provider
    for provider in (
        Provider("cpu", CPU, "pip install onnxruntime", "onnxruntime-cpu", tested=True),
        Provider("cuda", "CUDAExecutionProvider", "pip install onnxruntime-gpu[cuda,cudnn]", "tensorrt"),
        Provider("tensorrt", "TensorrtExecutionProvider", "pip install onnxruntime-gpu tensorrt", "tensorrt"),
        Provider("migraphx", "MIGraphXExecutionProvider", "pip install onnxruntime-migraphx", "tensorrt"),
        Provider(
            "openvino",
            "OpenVINOExecutionProvider",
            "pip install onnxruntime-ep-openvino",
            "openvino",
            plugin="onnxruntime_ep_openvino",
            tested=True,
        ),
        Provider("directml", "DmlExecutionProvider", "pip install onnxruntime-directml (Windows)", "tensorrt"),
        Provider("coreml", "CoreMLExecutionProvider", "pip install onnxruntime (macOS)", "onnxruntime-cpu"),
    )
}
"""Device -> provider. "Tested" says what the project's own tests run; the others are mapped, not run."""

_SINGLE = ("cpu", "coreml")
"""Devices of which there is one, so that a number behind them would mean nothing."""


def parse_device(device: str) -> tuple[Provider, int]:
    """Return the provider and the index of a device such as "cpu" or "cuda:1"; OpenVINO's index 0 is the CPU.

    Raises:
        UsageError: there is no such device.
    """
    match = re.fullmatch(r"([a-z]+)(?::(\d+))?", device)
    if not match or match.group(1) not in PROVIDERS:
        raise UsageError(f"'{device}' is no device of onnxruntime{did_you_mean(device, list(PROVIDERS))}")
    provider = PROVIDERS[match.group(1)]
    if match.group(2) and provider.device in _SINGLE:
        raise UsageError(f"'{device}' is no device of onnxruntime: {provider.device} has no numbers")
    return provider, int(match.group(2) or 0)


def why_unavailable(device: str) -> str | None:
    """Return why a device's provider cannot run here, and what to install; None when it can.

    Raises:
        UsageError: there is no such device.
    """
    provider, index = parse_device(device)
    if not find_spec("onnxruntime"):
        return "onnxruntime is not installed: pip install onnxruntime (for a GPU: onnxruntime-gpu; never both)"
    if provider.name == CPU:
        return None
    if provider.device in ("cuda", "tensorrt"):
        reason = why_no_gpu(index)
        if reason:
            return reason
    if built_in(provider):
        return _why_no_openvino_device(index) if provider.device == "openvino" else None
    if provider.plugin:
        return _why_no_plugin_device(provider, index)
    return f"the installed onnxruntime has no {provider.name}: {provider.install}"


def built_in(provider: Provider) -> bool:
    """Tell whether the installed onnxruntime has a provider itself, as `onnxruntime-openvino` has OpenVINO's."""
    import onnxruntime as ort

    return provider.name in ort.get_available_providers()


def why_no_kernels(file: Path, device: str) -> str | None:
    """Return why a device's provider has no kernels for an ONNX file, where that is known; None otherwise."""
    if parse_device(device)[0].name != CPU:
        return None
    import onnx

    graph = onnx.load(file, load_external_data=False).graph
    casts = (a.i for node in graph.node if node.op_type == "Cast" for a in node.attribute if a.name == "to")
    if onnx.TensorProto.BFLOAT16 not in {*casts, *(tensor.data_type for tensor in graph.initializer)}:
        return None
    return "ONNX Runtime's CPU provider has no BF16 kernels"


def _why_no_plugin_device(provider: Provider, index: int) -> str | None:
    if not find_spec(provider.plugin):
        return f"its plugin is not installed: {provider.install}"
    if len(plugin_devices(provider)) > index:
        return None
    import onnxruntime as ort

    vendors = sorted({device.device.vendor for device in ort.get_ep_devices()} - {""})
    return f"{provider.name} offers no device {index} for this machine's hardware ({', '.join(vendors) or 'unknown'})"


def _why_no_openvino_device(index: int) -> str | None:
    """Return why OpenVINO's built-in provider has no device of an index; None where it has. The first is the CPU."""
    found = _openvino_devices() if index else ["CPU"]
    return None if index < len(found) else f"OpenVINO has no device {index} here: {', '.join(found)}"


def _openvino_devices() -> list[str]:
    """Return OpenVINO's names of the devices of its built-in provider, such as "GPU.0"; CPUs before others."""
    from onnxruntime.capi import _pybind_state

    ids: list[str] = _pybind_state.get_available_openvino_device_ids()
    return sorted(ids, key=lambda name: not name.startswith("CPU"))


def plugin_devices(provider: Provider) -> list[Any]:
    """Return the devices that a plugin provider offers, its library registered first; CPUs before others."""
    import onnxruntime as ort

    def offered() -> list[Any]:
        return [device for device in ort.get_ep_devices() if device.ep_name == provider.name]

    if not offered() and provider.plugin not in _REGISTERED:
        ort.register_execution_provider_library(provider.plugin, import_module(provider.plugin).get_library_path())
        _REGISTERED.add(provider.plugin)
    return sorted(offered(), key=lambda device: device.device.type != ort.OrtHardwareDeviceType.CPU)


_REGISTERED: set[str] = set()
"""Plugins whose library this process has registered: a second time is an error."""


def provider_options(provider: Provider, index: int, settings: SessionSettings) -> dict[str, str]:
    """Return a provider's options as strings."""
    options: dict[str, str] = {}
    if provider.device in ("cuda", "tensorrt", "migraphx", "directml"):
        options["device_id"] = str(index)
    if provider.device == "cuda" and settings.cuda_graph:
        options["enable_cuda_graph"] = "1"
    if provider.device == "tensorrt":
        # The Q/DQ pairs decide the precision; the flags only allow it.
        options |= {"trt_int8_enable": "1", "trt_fp16_enable": "1"}
        if settings.cuda_graph:
            options["trt_cuda_graph_enable"] = "1"
        if settings.cache is not None:
            options |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(settings.cache)}
    if provider.device == "openvino":
        options |= _openvino_options(settings)
        if built_in(provider):
            options["device_type"] = _openvino_devices()[index] if index else "CPU"
    if provider.device == "coreml":
        options |= {"ModelFormat": "MLProgram", "MLComputeUnits": "ALL"}
    return options


def _openvino_options(settings: SessionSettings) -> dict[str, str]:
    options = {"num_of_threads": str(settings.threads)} if settings.threads else {}
    if settings.float32:
        options["load_config"] = json.dumps({"CPU": {"INFERENCE_PRECISION_HINT": "f32"}})
    if settings.cache is not None:
        options["cache_dir"] = str(settings.cache)
    return options


@cache
def saturating_products() -> bool:
    """Tell whether uint8 times int8 saturates at 16 bits here: on x86 CPUs without VNNI.

    ONNX Runtime then has to be asked for its exact, slower kernels.
    """
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux: the flags are not told, and such machines mostly have VNNI or are no x86
        return False
    flags = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return flags is not None and not {"avx512_vnni", "avx_vnni", "avx512vnni"} & set(flags.group(1).split())


def node_counts(session: Any) -> Mapping[str, int]:
    """Return how many nodes of the graph each provider took, by its name.

    Args:
        session: an onnxruntime.InferenceSession made to record that.
    """
    counts: dict[str, int] = {}
    for part in session.get_provider_graph_assignment_info():
        counts[part.ep_name] = counts.get(part.ep_name, 0) + len(part.get_nodes())
    return counts
