"""What this machine can compute on. Torch is not imported and no process is started: step keys ask for it."""

from __future__ import annotations

import ctypes
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from maseRT.errors import MissingError, UsageError

_NVML = "libnvidia-ml.so.1"
_NAME_BYTES = 96


@dataclass(frozen=True)
class Cpu:
    """The processor.

    Attributes:
        cores: physical cores.
        threads: hardware threads that this process may use (affinity and the container's quota).
    """

    name: str
    cores: int
    threads: int


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU that CUDA programs started here see.

    Attributes:
        index: N of `cuda:N`. NVML's order, which is CUDA's where all GPUs are alike.
        compute_capability: such as "8.9".
        memory_mb: in MiB.
        uuid: names the GPU to NVML, whatever the environment hides.
    """

    index: int
    name: str
    compute_capability: str
    memory_mb: int
    uuid: str


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver.

    Attributes:
        version: such as "580.65.06".
        cuda: the newest CUDA it runs, such as "13.0".
    """

    version: str
    cuda: str


@cache
def cpu() -> Cpu:
    """Return the processor's name, its cores, and the threads that this process may use."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        text = ""
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    name = named.group(1).strip() if named else platform.processor() or platform.machine()
    packages = re.findall(r"^physical id\s*:\s*(\d+)$", text, re.MULTILINE)
    ids = re.findall(r"^core id\s*:\s*(\d+)$", text, re.MULTILINE)
    cores = len(set(zip(packages, ids, strict=True))) if ids and len(ids) == len(packages) else os.cpu_count() or 1
    return Cpu(name, cores, usable_threads())


def usable_threads() -> int:
    """Return how many threads this process can run at once: its CPU affinity, cut to a container's CPU quota."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        limit = threads if quota == "max" else max(1, int(quota) // int(period))
    except (OSError, ValueError):  # no version 2 control groups here
        limit = threads
    return min(threads, limit)


def nvidia_gpus() -> tuple[Gpu, ...]:
    """Return the NVIDIA GPUs that CUDA sees here, in the order of `cuda:N`; CUDA_VISIBLE_DEVICES is honoured."""
    return _inventory()[1]


def nvidia_driver() -> Driver | None:
    """Return the NVIDIA driver; None when there is none."""
    return _inventory()[0]


@cache
def torch_cuda() -> str | None:
    """Return the CUDA version that the installed torch was built for; None for a CPU build or no torch.

    It is read from torch's version.py, since importing torch takes over a second.
    """
    spec = find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    source = (Path(spec.submodule_search_locations[0]) / "version.py").read_text(encoding="utf-8")
    found = re.search(r"^cuda\b[^=]*=\s*['\"]([\d.]+)['\"]", source, re.MULTILINE)
    return found.group(1) if found else None


def resolve_device(device: str) -> str:
    """Return the torch device that "auto", "cpu", "cuda" or "cuda:N" stands for: "cpu" or "cuda:N".

    Raises:
        MissingError: a GPU was asked for and torch cannot use it; says why.
        UsageError: not the name of a device.
    """
    if device in ("auto", "cpu"):
        return "cpu" if device == "cpu" or why_no_torch_cuda(0) else "cuda:0"
    index = cuda_index(device)
    reason = why_no_torch_cuda(index)
    if reason:
        raise MissingError(reason, where=f"device {device}", fix='use "auto" or "cpu", or run where a GPU is')
    return f"cuda:{index}"


def computing(device: str) -> str:
    """Return the hardware of a device of `maseRT.onnxrt.providers`: "cpu", "cuda:N", or the device's own name where it
    is neither. OpenVINO's first device is the CPU.
    """
    kind, _, index = device.partition(":")
    if kind in ("cuda", "tensorrt"):
        return f"cuda:{index or 0}"
    return "cpu" if kind == "cpu" or (kind == "openvino" and int(index or 0) == 0) else device


def cuda_index(device: str) -> int:
    """Return N of "cuda:N", 0 of "cuda".

    Raises:
        UsageError: not the name of a CUDA device.
    """
    match = re.fullmatch(r"cuda(?::(\d+))?", device)
    if not match:
        raise UsageError(f"'{device}' is not a device", where="device", fix="use auto, cpu, cuda or cuda:N")
    return int(match.group(1) or 0)


def why_no_torch_cuda(index: int) -> str | None:
    """Return why torch cannot use the GPU `cuda:<index>`; None when it can."""
    if find_spec("torch") is None:
        return "torch is not installed"
    built_for = torch_cuda()
    if built_for is None:
        return "the installed torch is a CPU build"
    return why_no_gpu(index) or why_driver_too_old(built_for, what=f"the installed torch (CUDA {built_for})")


def why_no_gpu(index: int = 0) -> str | None:
    """Return why there is no GPU `cuda:<index>` here; None when there is one."""
    if nvidia_driver() is None:
        return f"no NVIDIA driver here ({_NVML} does not load)"
    count = len(nvidia_gpus())
    if index < count:
        return None
    hidden = f" (CUDA_VISIBLE_DEVICES is '{_visible_devices()}')" if _visible_devices() is not None else ""
    return f"cuda:{index} does not exist: {count} NVIDIA GPU{'s' * (count != 1)} visible{hidden}"


def why_driver_too_old(cuda: str, *, what: str) -> str | None:
    """Return why the driver cannot run `what`, which needs the CUDA version `cuda`; None when it can.

    Within one major version newer minor ones run on an older driver (CUDA's minor version compatibility).
    """
    driver = nvidia_driver()
    if driver is None or int(driver.cuda.split(".")[0]) >= int(cuda.split(".")[0]):
        return None
    return f"{what} needs a driver for CUDA {cuda}; driver {driver.version} runs CUDA {driver.cuda} at most"


def _visible_devices() -> str | None:
    return os.environ.get("CUDA_VISIBLE_DEVICES")


@cache
def _inventory() -> tuple[Driver | None, tuple[Gpu, ...]]:
    try:
        library = ctypes.CDLL(_NVML)
    except OSError:
        return None, ()
    return read_nvml(library, visible=_visible_devices())


def read_nvml(library: Any, *, visible: str | None) -> tuple[Driver | None, tuple[Gpu, ...]]:
    """Return the driver and the visible GPUs as the NVML `library` tells them.

    Args:
        library: libnvidia-ml, loaded.
        visible: CUDA_VISIBLE_DEVICES; None when it is not set.
    """
    if library.nvmlInit_v2() != 0:
        return None, ()
    try:
        version = ctypes.create_string_buffer(_NAME_BYTES)
        cuda = ctypes.c_int()
        library.nvmlSystemGetDriverVersion(version, _NAME_BYTES)
        library.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(cuda))
        driver = Driver(version.value.decode(), f"{cuda.value // 1000}.{cuda.value % 1000 // 10}")
        count = ctypes.c_uint()
        library.nvmlDeviceGetCount_v2(ctypes.byref(count))
        found = [gpu for index in range(count.value) if (gpu := _read_gpu(library, index))]
        return driver, _as_cuda_sees(found, visible)
    finally:
        library.nvmlShutdown()


class _Memory(ctypes.Structure):
    """nvmlMemory_t, in bytes."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def _read_gpu(library: Any, index: int) -> Gpu | None:
    handle = ctypes.c_void_p()
    if library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) != 0:  # another container's GPU
        return None
    name, uuid = (ctypes.create_string_buffer(_NAME_BYTES) for _ in range(2))
    major, minor, memory = ctypes.c_int(), ctypes.c_int(), _Memory()
    library.nvmlDeviceGetName(handle, name, _NAME_BYTES)
    library.nvmlDeviceGetUUID(handle, uuid, _NAME_BYTES)
    library.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
    library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    capability = f"{major.value}.{minor.value}"
    return Gpu(index, name.value.decode(), capability, memory.total >> 20, uuid.value.decode())


def _as_cuda_sees(found: Sequence[Gpu], visible: str | None) -> tuple[Gpu, ...]:
    """Select and renumber GPUs as CUDA does: it stops at the first entry that names none."""
    if visible is None:
        chosen = list(found)
    else:
        chosen = []
        for entry in visible.split(","):
            word = entry.strip()
            by_uuid = word.startswith("GPU-")
            matches = [g for g in found if (g.uuid.startswith(word) if by_uuid else word == str(g.index))]
            if len(matches) != 1:
                break
            chosen += matches
    return tuple(replace(gpu, index=index) for index, gpu in enumerate(chosen))
