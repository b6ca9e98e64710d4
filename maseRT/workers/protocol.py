"""What every worker offers: one open session, alone in its process or not, and what is measured on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import numpy.typing as npt

from maseRT.energy import VISIT_SECONDS, Visit
from maseRT.nvml import GpuState
from maseRT.runtimes.base import Session
from maseRT.runtimes.device_times import DeviceTimes
from maseRT.workers.memory import Peak

Array = npt.NDArray[Any]

Opener = Callable[[], Session]
"""Opens the session, in the worker. For a process of its own it must be picklable: a function of a module, or a
functools.partial of one; whatever that module imports, the process imports."""


@dataclass(frozen=True)
class Opened:
    """What a worker says about its session.

    Attributes:
        got: ONNX Runtime's execution providers, first choice first; empty for other runtimes.
        nodes: how many nodes of the graph each provider took, where that is told.
        versions: of the packages that compute, as far as the process has loaded them.
        seconds: that opening took, imports included.
    """

    got: tuple[str, ...]
    nodes: dict[str, int]
    versions: dict[str, str]
    seconds: float


class Worker(Protocol):
    """One row's session: opened once, measured in turns, asleep in between. A context manager that closes it.

    Every method raises a MaseRTError when it fails: the one that was raised in the worker, or a StepError that names
    the row.
    """

    @property
    def name(self) -> str:
        """The row's name."""

    def open(self) -> Opened:
        """Run the opener. Call this first, and once."""

    def infer(self, inputs: Array) -> Array:
        """Return the output of one batch, from host memory to host memory."""

    def bind(self, inputs: Array) -> None:
        """Keep the batch that is measured from now on."""

    def warm_up(self, count: int) -> None:
        """Infer the bound batch so many times."""

    def times_ms(self, count: int) -> list[float]:
        """Return the wall time of each of `count` inferences, from host memory to host memory.

        Some untimed ones come first: after other rows' turns, caches hold none of this row's weights.
        """

    def device_times(self, count: int) -> DeviceTimes | None:
        """Return the time of each of `count` inferences on data that is on the device, by the device's clock.

        None where the runtime has none.
        """

    def energy(self, *, seconds: float = VISIT_SECONDS) -> Visit | str:
        """Return the power of inferring the bound batch over `seconds` of steady work, or why it cannot be measured."""

    def memory(self) -> Peak:
        """Return the most host and device memory that opening and inferring took.

        Host memory is resident memory above what the process had before opening, libraries included that it had not
        loaded by then.
        """

    def gpu_state(self) -> GpuState | None:
        """Return the state of the row's GPU over the timed turns of the bound batch, read before it rested.

        None on a CPU, or where NVML is not there; see `maseRT.nvml.typical_state`.
        """

    def kernel_times_ms(self, iterations: int) -> dict[str, float]:
        """Return the mean time of every engine layer on the bound batch; empty where the session does not tell."""

    def close(self) -> None:
        """Free everything. Never hangs, and may be called again."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
