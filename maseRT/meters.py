"""What counts joules here: NVML's counter or its power samples for a GPU, RAPL for CPUs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

from maseRT.errors import MaseRTError
from maseRT.hardware import cuda_index, nvidia_gpus, why_no_gpu
from maseRT.nvml import NvmlGpu, open_gpu

_POWERCAP = Path("/sys/class/powercap")


class Meter(Protocol):
    """Something that counts joules.

    Attributes:
        source: what counts, in words.
        device: whose energy it is.
    """

    source: str
    device: str

    def joules(self) -> float:
        """Return the energy since some fixed moment."""


class GpuCounter:
    """A GPU's total energy counter (Volta and later)."""

    source = "NVML total energy counter"

    def __init__(self, gpu: NvmlGpu, device: str) -> None:
        self._gpu = gpu
        self._last = 0.0
        self.device = device

    def joules(self) -> float:
        """Return the counter; its last value where one reading fails."""
        self._last = self._gpu.energy_j() or self._last
        return self._last


class GpuPower:
    """Integrates power samples, for GPUs without a counter: less exact, since the samples are averages themselves."""

    source = "NVML power samples (no energy counter)"

    def __init__(self, gpu: NvmlGpu, device: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self._gpu = gpu
        self._clock = clock
        self._before = clock()
        self._total = 0.0
        self.device = device

    def joules(self) -> float:
        """Add what was used since the last call."""
        now = self._clock()
        self._total += (self._gpu.power_w() or 0.0) * (now - self._before)
        self._before = now
        return self._total


class Rapl:
    """The counters of all CPU packages; each wraps around at its own range."""

    source = "RAPL package counters"

    def __init__(self, packages: Sequence[Path]) -> None:
        self._files = [package / "energy_uj" for package in packages]
        self._ranges = [int((package / "max_energy_range_uj").read_text(encoding="ascii")) for package in packages]
        self._last = self._read()
        self._total = 0
        self.device = f"{len(packages)} CPU package{'s' * (len(packages) != 1)}"

    def joules(self) -> float:
        """Return the energy of all packages since the start."""
        now = self._read()
        for before, after, size in zip(self._last, now, self._ranges, strict=True):
            self._total += (after - before) % (size + 1)
        self._last = now
        return self._total / 1e6

    def _read(self) -> list[int]:
        return [int(file.read_text(encoding="ascii")) for file in self._files]


@contextmanager
def open_meter(device: str, *, powercap: Path = _POWERCAP) -> Iterator[Meter | str]:
    """Yield the meter of hardware ("cpu", "cuda:N", ...), or the reason why its energy cannot be measured.

    Args:
        device: a GPU is found by its UUID, so that it is the one that runs.
        powercap: where Linux shows RAPL.
    """
    if device == "cpu":
        yield _rapl(powercap)
        return
    if not device.startswith("cuda"):
        yield f"no energy counter of {device} is known"
        return
    index = cuda_index(device)
    reason = why_no_gpu(index)
    if reason:
        yield reason
        return
    gpu = nvidia_gpus()[index]
    with ExitStack() as stack:
        try:
            opened = stack.enter_context(open_gpu(gpu.uuid))
        except MaseRTError as error:
            yield f"{error.what}{f': {error.fix}' if error.fix else ''}"
            return
        yield _gpu_meter(opened, f"{gpu.name} {gpu.uuid}")


def _gpu_meter(gpu: NvmlGpu, name: str) -> Meter | str:
    if gpu.energy_j() is not None:
        return GpuCounter(gpu, name)
    return GpuPower(gpu, name) if gpu.power_w() is not None else "NVML tells neither energy nor power of this GPU"


def _rapl(powercap: Path) -> Meter | str:
    try:
        zones = sorted(powercap.glob("intel-rapl:*"))  # AMD's are called so too; those below a package have two colons
        packages = [zone for zone in zones if (zone / "name").read_text(encoding="ascii").startswith("package")]
        return Rapl(packages) if packages else "this CPU, or the machine around it, shows no RAPL counters"
    except PermissionError:
        return f"the RAPL counters may not be read here (allow it: chmod a+r {powercap}/*/energy_uj)"
    except (OSError, ValueError) as error:
        return f"the RAPL counters cannot be read: {error}"
