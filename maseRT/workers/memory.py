"""How much memory one row's own work adds to its process and to its GPU, while other rows sleep."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
_KIB_PER_MIB = 1024


class Peak(NamedTuple):
    """The most memory that was taken, in MiB; None where the system does not tell."""

    host_mb: float | None = None
    device_mb: float | None = None

    def most(self, other: Peak) -> Peak:
        """Return the greater one of each."""
        return Peak(_greater(self.host_mb, other.host_mb), _greater(self.device_mb, other.device_mb))


def _greater(one: float | None, other: float | None) -> float | None:
    return max((mb for mb in (one, other) if mb is not None), default=None)


class MemoryUse:
    """Adds up what watched blocks take, and keeps the peak.

    Differences over blocks, not totals: other rows may live in the same process or on the same GPU. What the process
    had freed before and takes again does not show: only a process of its own tells all.

    Args:
        device_mb: returns the memory in use on the GPU, in MiB; None where that is not told.
    """

    def __init__(self, device_mb: Callable[[], float | None]) -> None:
        self._device_mb = device_mb
        self._host, self._device = _Growth(), _Growth()

    @property
    def peak(self) -> Peak:
        """The most that was taken."""
        return Peak(self._host.peak, self._device.peak)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count what the block takes."""
        with suppress(OSError):  # without the reset, a peak counts where it is higher than all before
            _CLEAR.write_text(_RESET_PEAK, encoding="ascii")
        host, device = resident_mb(), self._device_mb()
        try:
            yield
        finally:
            after = resident_mb()
            if host and after:
                peak = after[1] if after[1] > host[1] else after[0]
                self._host.add(host[0], after[0], peak)
            used = self._device_mb()
            if device is not None and used is not None:
                self._device.add(device, used, used)


class _Growth:
    """Memory held so far, and the most at any time; None as long as nothing was told."""

    def __init__(self) -> None:
        self.peak: float | None = None
        self._held = 0.0

    def add(self, before: float, after: float, peak: float) -> None:
        self.peak = max(self.peak or 0.0, self._held + peak - before)
        self._held += after - before


def resident_mb() -> tuple[float, float] | None:
    """Return this process's resident memory and its peak in MiB; None where /proc does not tell."""
    try:
        text = _STATUS.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    told = dict(re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB$", text, re.MULTILINE))
    if len(told) != 2:
        return None
    return int(told["VmRSS"]) / _KIB_PER_MIB, int(told["VmHWM"]) / _KIB_PER_MIB
