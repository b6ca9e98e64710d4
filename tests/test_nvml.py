"""What a GPU says about itself, with an NVML that is an object here."""
# ruff: noqa: N802  (the names are NVML's)

import sys
from types import SimpleNamespace

import pytest

from maseRT.errors import MissingError, StepError
from maseRT.nvml import limits_from_mask, open_gpu


class NVMLError(Exception):
    pass


class Nvml:
    """The module pynvml; a value of None is what this GPU does not support."""

    NVMLError = NVMLError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = "sm", "memory", "core"

    def __init__(self, **values):
        self.values = {
            "energy": 5_000,
            "power": 350_000,
            "reasons": 0x1 | 0x4,
            "sm": 1980,
            "memory": 3201,
            "core": 41,
            "limit": 700_000,
            "used": 3 * 2**30,
        } | values
        self.starts = True
        self.running = 0

    def _say(self, handle, what):
        assert handle == "handle of GPU-1"
        if self.values[what] is None:
            raise NVMLError("Not Supported")
        return self.values[what]

    def nvmlInit(self):
        if not self.starts:
            raise NVMLError("Driver Not Loaded")
        self.running += 1

    def nvmlShutdown(self):
        self.running -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid != "GPU-1":
            raise NVMLError("Not Found")
        return f"handle of {uuid}"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        return self._say(handle, "energy")

    def nvmlDeviceGetPowerUsage(self, handle):
        return self._say(handle, "power")

    def nvmlDeviceGetEnforcedPowerLimit(self, handle):
        return self._say(handle, "limit")

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(used=self._say(handle, "used"))

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return self._say(handle, "reasons")

    def nvmlDeviceGetClockInfo(self, handle, kind):
        return self._say(handle, kind)

    def nvmlDeviceGetTemperature(self, handle, kind):
        return self._say(handle, kind)


@pytest.fixture
def nvml(monkeypatch):
    def install(**values):
        library = Nvml(**values)
        monkeypatch.setitem(sys.modules, "pynvml", library)
        return library

    return install


def test_units_are_joules_and_watts(nvml):
    nvml()
    with open_gpu("GPU-1") as gpu:
        assert (gpu.energy_j(), gpu.power_w()) == (5.0, 350.0)


def test_memory_is_in_mib(nvml):
    nvml()
    with open_gpu("GPU-1") as gpu:
        assert gpu.memory_mb() == 3072


def test_a_state_is_plain_values(nvml):
    nvml()
    with open_gpu("GPU-1") as gpu:
        assert gpu.state().as_dict() == {
            "sm_clock_mhz": 1980,
            "memory_clock_mhz": 3201,
            "temperature_c": 41,
            "power_w": 350.0,
            "power_limit_w": 700.0,
            "limits": ["power cap"],
        }


def test_what_a_gpu_does_not_tell_is_none(nvml):
    nvml(energy=None, power=None, reasons=None, core=None, limit=None, used=None)
    with open_gpu("GPU-1") as gpu:
        assert (gpu.energy_j(), gpu.memory_mb()) == (None, None)
        state = gpu.state()
    assert state.power_limit_w is None
    assert (state.power_w, state.temperature_c, state.limits, state.sm_clock_mhz) == (None, None, (), 1980)


@pytest.mark.parametrize(
    ("mask", "limits"),
    [
        (0, ()),
        (1, ()),
        (0x60, ("software thermal slowdown", "hardware thermal slowdown")),
        (0x81, ("hardware power brake",)),
    ],
)
def test_limits_in_words(mask, limits):
    assert limits_from_mask(mask) == limits


def test_nvml_is_shut_down_whatever_happens(nvml):
    library = nvml()
    with pytest.raises(KeyError), open_gpu("GPU-1"):
        assert library.running == 1
        raise KeyError
    assert library.running == 0


def test_an_unknown_gpu_is_named(nvml):
    library = nvml()
    with pytest.raises(StepError, match="GPU-7: NVML does not know it: Not Found"), open_gpu("GPU-7"):
        pass
    assert library.running == 0


def test_an_nvml_that_does_not_start_says_why(nvml):
    nvml().starts = False
    with pytest.raises(StepError, match="Driver Not Loaded"), open_gpu("GPU-1"):
        pass


def test_a_missing_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(MissingError, match="nvidia-ml-py is not installed"), open_gpu("GPU-1"):
        pass
