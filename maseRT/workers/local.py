"""A worker in this process; `maseRT.workers.process` puts the same one into a process of its own."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from importlib import metadata
from typing import Any, Concatenate, ParamSpec, TypeVar

from maseRT.closing import Closing
from maseRT.energy import VISIT_SECONDS, Visit, measure_energy
from maseRT.errors import MaseRTError, StepError
from maseRT.hardware import cuda_index, nvidia_gpus
from maseRT.meters import open_meter
from maseRT.nvml import GpuState, NvmlGpu, open_gpu, typical_state
from maseRT.runtimes.base import Profiled, Session
from maseRT.runtimes.device_times import DeviceTimes
from maseRT.workers.memory import MemoryUse, Peak
from maseRT.workers.protocol import Array, Opened, Opener

LEAD_IN_SECONDS = {"cpu": 0.001, "cuda": 0.05}
"""Untimed calls before timed ones, by the kind of device: one at least, more of those that are short.

On a CPU they fetch the weights into the caches again. Before a GPU's row the host slept, and launches at half its speed
for the first hundredths of a second.
"""

_COMPUTING = ("torch", "onnxruntime", "onnxruntime_ep_openvino", "tensorrt", "tensorrt_rtx")
_NAP_SECONDS = 0.002
_NAPS = 50
_ASLEEP = 0.1

P = ParamSpec("P")
R = TypeVar("R")


def _telling(
    method: Callable[Concatenate[LocalWorker, P], R],
) -> Callable[Concatenate[LocalWorker, P], R]:
    """Turn what is no MaseRTError into a StepError that names the row."""

    @wraps(method)
    def told(self: LocalWorker, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(self, *args, **kwargs)
        except MaseRTError:
            raise
        except (Exception, SystemExit) as error:  # a user's module may call sys.exit
            raise StepError(f"{type(error).__name__}: {error}", where=self.name) from error

    return told


class LocalWorker(Closing):
    """See `maseRT.workers.protocol.Worker`.

    Args:
        name: the row's name.
        opener: returns the session.
        device: the hardware that computes: "cpu" or "cuda:N".
    """

    def __init__(self, name: str, opener: Opener, *, device: str = "cpu") -> None:
        self._name = name
        self._opener = opener
        self._device = device
        self._stack = ExitStack()
        self._gpu: NvmlGpu | None = None
        self._states: list[GpuState] = []
        self._memory = MemoryUse(self._device_mb)
        self._session: Session | None = None
        self._feed: dict[str, Array] | None = None

    @property
    def name(self) -> str:
        """The row's name."""
        return self._name

    @_telling
    def open(self) -> Opened:
        """Run the opener."""
        if self._session is not None:
            raise StepError("is open already", where=self.name)
        start = time.perf_counter()
        if self._device != "cpu":
            self._gpu = _nvml_gpu(self._device, self._stack)
        with self._memory.watching():
            self._session = self._stack.enter_context(self._opener())
        return Opened(
            got=tuple(getattr(self._session, "providers", ())),
            nodes=dict(getattr(self._session, "assigned", {})),
            versions={name: _version(name) for name in _COMPUTING if name in sys.modules},
            seconds=time.perf_counter() - start,
        )

    @_telling
    def infer(self, inputs: Array) -> Array:
        """Return the output of one batch."""
        session = self._live()
        with self._memory.watching():
            output: Array = session.infer({session.inputs[0].name: inputs})[session.outputs[0].name]
        return output

    @_telling
    def bind(self, inputs: Array) -> None:
        """Keep the batch that is measured from now on."""
        self._feed = {self._live().inputs[0].name: inputs}
        self._states = []

    @_telling
    def warm_up(self, count: int) -> None:
        """Infer the bound batch so many times."""
        call = self._live().prepare(self._bound_feed())
        with self._memory.watching():
            for _ in range(count):
                call()
        _fall_asleep()

    @_telling
    def times_ms(self, count: int) -> list[float]:
        """Return the wall time of each inference."""
        call, clock = self._live().prepare(self._bound_feed()), time.perf_counter_ns
        times_ns = []
        with _no_collection():
            _lead_in(call, self._device)
            for _ in range(count):
                start = clock()
                call()
                times_ns.append(clock() - start)
        self._look_at_gpu()
        _fall_asleep()
        return [time_ns / 1e6 for time_ns in times_ns]

    @_telling
    def device_times(self, count: int) -> DeviceTimes | None:
        """Return the time of each inference by the device's clock; None where it has none."""
        bound = self._live().bind(self._bound_feed())  # an inference since the last turn may have taken its place
        if bound.device_times(1) is None:
            return None
        with _no_collection():
            _lead_in(bound.run, self._device)
            times = bound.device_times(count)
        self._look_at_gpu()
        _fall_asleep()
        return times

    @_telling
    def energy(self, *, seconds: float = VISIT_SECONDS) -> Visit | str:
        """Return the power of inferring the bound batch, or why it cannot be measured."""
        feed = self._bound_feed()
        with open_meter(self._device) as meter:
            if isinstance(meter, str):
                return meter
            bound = self._live().bind(feed)
            batch = len(next(iter(feed.values())))
            try:
                return measure_energy(bound.repeat, meter, batch=batch, seconds=seconds)
            except StepError as error:
                return error.what
            finally:
                _fall_asleep()

    @_telling
    def memory(self) -> Peak:
        """Return the most host and device memory that opening and inferring took."""
        return self._memory.peak

    @_telling
    def gpu_state(self) -> GpuState | None:
        """Return the state of the row's GPU while it worked on the bound batch."""
        return typical_state(self._states)

    @_telling
    def kernel_times_ms(self, iterations: int) -> dict[str, float]:
        """Return the mean time of every engine layer."""
        session = self._live()
        if not isinstance(session, Profiled):
            return {}
        return session.layer_times_ms(self._bound_feed(), iterations=iterations)

    @_telling
    def close(self) -> None:
        """Close the session."""
        self._session = self._feed = self._gpu = None
        self._stack.close()

    def _look_at_gpu(self) -> None:
        """Note the GPU's state right after work: once it rests, its clocks drop."""
        if self._gpu is not None:
            self._states.append(self._gpu.state())

    def _live(self) -> Session:
        if self._session is None:
            raise StepError("is not open", where=self.name)
        return self._session

    def _bound_feed(self) -> dict[str, Array]:
        if self._feed is None:
            raise StepError("no batch is bound", where=self.name)
        return self._feed

    def _device_mb(self) -> float | None:
        return self._gpu.memory_mb() if self._gpu else None


def _version(module: str) -> str:
    """Return the version of a loaded module; OpenVINO's plugin has one in its package alone."""
    told = getattr(sys.modules[module], "__version__", None)
    return str(told) if told else metadata.version(module)


def _nvml_gpu(device: str, stack: ExitStack) -> NvmlGpu | None:
    """Return the GPU as NVML shows it; None where NVML is not there: what it tells is then left out."""
    index, gpus = cuda_index(device), nvidia_gpus()
    if index >= len(gpus):
        return None
    try:
        return stack.enter_context(open_gpu(gpus[index].uuid))
    except MaseRTError:
        return None


def _lead_in(call: Callable[[], Any], device: str) -> None:
    end = time.perf_counter() + LEAD_IN_SECONDS[device.partition(":")[0]]
    call()
    while time.perf_counter() < end:
        call()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector out of the block; it comes afterwards."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _fall_asleep() -> None:
    """Wait until this process uses no CPU: OpenMP's threads spin for milliseconds after their work is done."""
    for _ in range(_NAPS):
        before = time.process_time()
        time.sleep(_NAP_SECONDS)
        if time.process_time() - before < _ASLEEP * _NAP_SECONDS:
            return
