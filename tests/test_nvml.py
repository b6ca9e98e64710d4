"""What a GPU says about itself, with an NVML that is an object here."""

import sys
from dataclasses import replace

import pytest
from fake_nvml import Nvml

from maseRT.errors import MissingError, StepError
from maseRT.nvml import limits_from_mask, open_gpu, typical_state


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


def test_over_several_moments_clocks_are_the_median_and_the_rest_is_the_worst(nvml):
    nvml()
    with open_gpu("GPU-1") as gpu:
        state = gpu.state()
    waking = replace(state, sm_clock_mhz=345, memory_clock_mhz=None, power_w=90.0, limits=())
    hot = replace(state, temperature_c=88, limits=("software thermal slowdown", "power cap"))
    assert typical_state([waking, state, hot]) == replace(
        state, temperature_c=88, limits=("power cap", "software thermal slowdown")
    )
    assert typical_state([waking, state]).sm_clock_mhz == 345
    assert typical_state([]) is None


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
