"""What a GPU says about itself through NVML: energy, power, clocks, temperature, and what holds it back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median_low
from typing import Any, TypeVar

from maseRT.errors import MissingError, StepError

T = TypeVar("T", int, float)

_IDLE = 0x1
_REASONS = {
    _IDLE: "idle",
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "display clocks",
}
"""NVML's nvmlClocksEventReasons (nvml.h)."""


@dataclass(frozen=True)
class GpuState:
    """A GPU at one moment; None for what it does not tell.

    Attributes:
        limits: what holds the clocks down, in words; idleness is not among them.
    """

    sm_clock_mhz: int | None
    memory_clock_mhz: int | None
    temperature_c: int | None
    power_w: float | None
    power_limit_w: float | None
    limits: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**asdict(self), "limits": list(self.limits)}


def typical_state(states: Sequence[GpuState]) -> GpuState | None:
    """Return what a GPU was like over several moments of work; None where there are none.

    Clocks are the median ones, as latencies are: a GPU that just woke up is not held back. The rest is the worst:
    the highest temperature and power, and everything that ever held the clocks down.
    """
    if not states:
        return None
    return GpuState(
        sm_clock_mhz=_of_known(median_low, (state.sm_clock_mhz for state in states)),
        memory_clock_mhz=_of_known(median_low, (state.memory_clock_mhz for state in states)),
        temperature_c=_of_known(max, (state.temperature_c for state in states)),
        power_w=_of_known(max, (state.power_w for state in states)),
        power_limit_w=_of_known(min, (state.power_limit_w for state in states)),
        limits=tuple(dict.fromkeys(limit for state in states for limit in state.limits)),
    )


def _of_known(choose: Callable[[list[T]], T], values: Iterable[T | None]) -> T | None:
    known = [value for value in values if value is not None]
    return choose(known) if known else None


class NvmlGpu:
    """One GPU, named by its UUID: NVML's order is not CUDA's."""

    def __init__(self, nvml: Any, uuid: str) -> None:
        self._nvml = nvml
        self._handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        self.uuid = uuid

    def energy_j(self) -> float | None:
        """Return the energy since the driver was loaded; None where the GPU has no counter (before Volta)."""
        millijoules = self._ask(self._nvml.nvmlDeviceGetTotalEnergyConsumption)
        return None if millijoules is None else millijoules / 1000

    def power_w(self) -> float | None:
        """Return the power now, or over the last second, as the GPU's generation has it; None where it has neither."""
        milliwatts = self._ask(self._nvml.nvmlDeviceGetPowerUsage)
        return None if milliwatts is None else milliwatts / 1000

    def memory_mb(self) -> float | None:
        """Return the memory in use, by whatever process, in MiB; None where it is not told."""
        memory = self._ask(self._nvml.nvmlDeviceGetMemoryInfo)
        return None if memory is None else memory.used / 2**20

    def state(self) -> GpuState:
        """Return clocks, temperature, power and limits now."""
        nvml = self._nvml
        reasons = self._ask(nvml.nvmlDeviceGetCurrentClocksThrottleReasons) or 0
        milliwatts = self._ask(nvml.nvmlDeviceGetEnforcedPowerLimit)
        return GpuState(
            sm_clock_mhz=self._ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
            memory_clock_mhz=self._ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_MEM),
            temperature_c=self._ask(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
            power_w=self.power_w(),
            power_limit_w=None if milliwatts is None else milliwatts / 1000,
            limits=limits_from_mask(reasons),
        )

    def _ask(self, call: Callable[..., Any], *args: Any) -> Any:
        """Return an answer; None where this GPU or its host does not give it."""
        try:
            return call(self._handle, *args)
        except self._nvml.NVMLError:
            return None


def limits_from_mask(mask: int) -> tuple[str, ...]:
    """Return NVML's clock event reasons in words, without idleness."""
    return tuple(text for bit, text in _REASONS.items() if mask & bit and bit != _IDLE)


@contextmanager
def open_gpu(uuid: str) -> Iterator[NvmlGpu]:
    """Open the GPU of a UUID such as `maseRT.hardware.Gpu` has.

    Raises:
        MissingError: nvidia-ml-py is not installed.
        StepError: NVML does not start, or does not know the GPU.
    """
    try:
        import pynvml
    except ImportError:
        raise MissingError(
            "nvidia-ml-py is not installed", where="GPU clocks and energy", fix="pip install nvidia-ml-py"
        ) from None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise StepError(f"NVML does not start: {error}", where="GPU clocks and energy") from error
    try:
        try:
            gpu = NvmlGpu(pynvml, uuid)
        except pynvml.NVMLError as error:
            raise StepError(f"NVML does not know it: {error}", where=uuid) from error
        yield gpu
    finally:
        pynvml.nvmlShutdown()
