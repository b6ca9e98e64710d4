# ruff: noqa: N802  (the stand-in has the names of NVML)
import os
import subprocess
import sys

import pytest
import torch

from maseRT import hardware
from maseRT.errors import ExitCode, MissingError, UsageError
from maseRT.hardware import Driver, computing, read_nvml


class Nvml:
    """Answers like libnvidia-ml: 0 for success, results through pointers."""

    def __init__(self, gpus, *, init=0, forbidden=()):
        self.gpus = gpus
        self.init = init
        self.forbidden = forbidden
        self.open = 0

    def nvmlInit_v2(self):
        self.open += self.init == 0
        return self.init

    def nvmlShutdown(self):
        self.open -= 1
        return 0

    def nvmlSystemGetDriverVersion(self, buffer, size):
        buffer.value = b"580.65.06"
        return 0

    def nvmlSystemGetCudaDriverVersion_v2(self, version):
        version._obj.value = 13010
        return 0

    def nvmlDeviceGetCount_v2(self, count):
        count._obj.value = len(self.gpus)
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, handle):
        handle._obj.value = index + 1
        return 4 if index in self.forbidden else 0

    def nvmlDeviceGetName(self, handle, buffer, size):
        buffer.value = self.gpus[handle.value - 1][0].encode()
        return 0

    def nvmlDeviceGetUUID(self, handle, buffer, size):
        buffer.value = f"GPU-{handle.value - 1}abc".encode()
        return 0

    def nvmlDeviceGetCudaComputeCapability(self, handle, major, minor):
        major._obj.value, minor._obj.value = self.gpus[handle.value - 1][1]
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle, memory):
        memory._obj.total = 24 << 30
        return 0


PAIR = [("NVIDIA A", (8, 9)), ("NVIDIA B", (12, 0))]


def test_nvml_is_read_and_left():
    library = Nvml(PAIR)
    driver, gpus = read_nvml(library, visible=None)
    assert driver == Driver("580.65.06", "13.1")
    assert [(gpu.index, gpu.name, gpu.compute_capability, gpu.memory_mb) for gpu in gpus] == [
        (0, "NVIDIA A", "8.9", 24576),
        (1, "NVIDIA B", "12.0", 24576),
    ]
    assert library.open == 0


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        ("", []),
        ("-1", []),
        ("1", ["NVIDIA B"]),
        ("1,0", ["NVIDIA B", "NVIDIA A"]),
        (" 0 , 1", ["NVIDIA A", "NVIDIA B"]),
        ("0,7,1", ["NVIDIA A"]),
        ("GPU-1a", ["NVIDIA B"]),
        ("GPU-", []),
    ],
)
def test_cuda_visible_devices_selects_and_orders(visible, names):
    _, gpus = read_nvml(Nvml(PAIR), visible=visible)
    assert [gpu.name for gpu in gpus] == names
    assert [gpu.index for gpu in gpus] == list(range(len(names)))


def test_a_gpu_that_may_not_be_read_is_left_out():
    _, gpus = read_nvml(Nvml(PAIR, forbidden=(0,)), visible=None)
    assert [gpu.name for gpu in gpus] == ["NVIDIA B"]


def test_a_driver_that_does_not_start_counts_as_none():
    assert read_nvml(Nvml(PAIR, init=9), visible=None) == (None, ())


def test_cpu_is_named_and_counted():
    cpu = hardware.cpu()
    assert cpu.name
    assert 1 <= cpu.threads <= os.cpu_count()
    assert cpu.cores >= 1


def test_torch_cuda_is_what_torch_says():
    assert hardware.torch_cuda() == torch.version.cuda


def test_auto_is_what_torch_can_use():
    assert hardware.resolve_device("cpu") == "cpu"
    assert hardware.resolve_device("auto") == ("cuda:0" if torch.cuda.is_available() else "cpu")


def test_a_gpu_that_is_not_there_is_missing_with_the_reason():
    with pytest.raises(MissingError, match="cuda:99") as caught:
        hardware.resolve_device("cuda:99")
    assert caught.value.exit_code is ExitCode.MISSING
    assert caught.value.what


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "mps"])
def test_other_names_are_refused(name):
    with pytest.raises(UsageError, match=f"'{name}' is not a device"):
        hardware.resolve_device(name)


@pytest.fixture
def machine(monkeypatch):
    def pretend(*, driver=None, gpus=(), torch_cuda=None):
        monkeypatch.setattr(hardware, "nvidia_driver", lambda: driver)
        monkeypatch.setattr(hardware, "nvidia_gpus", lambda: tuple(gpus))
        monkeypatch.setattr(hardware, "torch_cuda", lambda: torch_cuda)

    return pretend


GPU = hardware.Gpu(0, "NVIDIA A", "8.9", 24576, "GPU-0")
NEW = Driver("580.65.06", "13.0")
OLD = Driver("525.1", "12.0")


@pytest.mark.parametrize(
    ("here", "reason"),
    [
        ({"driver": NEW, "gpus": [GPU]}, "CPU build"),
        ({"torch_cuda": "13.0"}, "no NVIDIA driver"),
        ({"driver": NEW, "torch_cuda": "13.0"}, "0 NVIDIA GPUs visible"),
        (
            {"driver": OLD, "gpus": [GPU], "torch_cuda": "13.0"},
            "needs a driver for CUDA 13.0; driver 525.1 runs CUDA 12.0",
        ),
    ],
)
def test_why_torch_has_no_gpu(machine, here, reason):
    machine(**here)
    assert reason in hardware.why_no_torch_cuda(0)
    assert hardware.resolve_device("auto") == "cpu"
    with pytest.raises(MissingError, match=reason):
        hardware.resolve_device("cuda")


def test_a_gpu_that_torch_can_use_is_used(machine):
    machine(driver=OLD, gpus=[GPU], torch_cuda="12.8")  # minor versions are compatible
    assert hardware.resolve_device("auto") == hardware.resolve_device("cuda") == "cuda:0"


def test_hidden_gpus_are_said_to_be_hidden(machine, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    machine(driver=NEW, torch_cuda="13.0")
    assert "CUDA_VISIBLE_DEVICES is ''" in hardware.why_no_gpu()


def test_torch_is_not_imported():
    code = (
        "import sys; from maseRT import hardware;"
        "hardware.cpu(); hardware.nvidia_gpus(); hardware.resolve_device('auto');"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("device", "hardware"),
    [
        ("cpu", "cpu"),
        ("openvino:0", "cpu"),
        ("openvino:1", "openvino:1"),
        ("cuda", "cuda:0"),
        ("cuda:1", "cuda:1"),
        ("tensorrt:2", "cuda:2"),
        ("directml:0", "directml:0"),
    ],
)
def test_the_hardware_of_a_device(device, hardware):
    assert computing(device) == hardware
