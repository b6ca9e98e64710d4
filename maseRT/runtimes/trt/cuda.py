"""The few CUDA runtime calls that a session makes, through cuda-python, with errors as exceptions."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from maseRT.errors import MissingError, StepError
from maseRT.runtimes.base import Bound
from maseRT.runtimes.device_times import DeviceTimes


@cache
def cudart() -> Any:
    """Return cuda-python's runtime module.

    Raises:
        MissingError: cuda-python is not installed.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise MissingError("cuda-python is not installed", where="CUDA", fix="pip install cuda-python") from error
    return runtime


def checked(result: tuple[Any, ...]) -> Any:
    """Return the value of a cuda-python result (error, value); None where there is no value.

    Raises:
        StepError: the call failed; has CUDA's name and text of the error.
    """
    error = result[0]
    if error:
        runtime = cudart()
        name, text = (ask(error)[1].decode() for ask in (runtime.cudaGetErrorName, runtime.cudaGetErrorString))
        raise StepError(f"{name}: {text}", where="CUDA")
    return result[1] if len(result) > 1 else None


def set_device(index: int) -> None:
    """Make `cuda:<index>` the calling thread's device."""
    checked(cudart().cudaSetDevice(index))


def capture(stream: int, work: Callable[[], bool]) -> Any | None:
    """Return an executable graph of what `work` puts into the stream; None where that cannot be captured."""
    runtime = cudart()
    checked(runtime.cudaStreamBeginCapture(stream, runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal))
    done = False
    try:
        done = work()
    finally:
        error, graph = runtime.cudaStreamEndCapture(stream)
    if error or not done:
        runtime.cudaGetLastError()  # clears the error of an invalidated capture
        return None
    try:
        return checked(runtime.cudaGraphInstantiate(graph, 0))
    finally:
        runtime.cudaGraphDestroy(graph)


def device_times(stream: int, work: Callable[[], object], iterations: int) -> DeviceTimes:
    """Return how long the stream takes for each of `iterations` runs of `work`, queued one behind another.

    An untimed run comes first, so that the stream has work while the first timed one is queued. Errors are looked at
    in the end: where the device waits for the host, whatever the host does between two events is in the time.
    """
    runtime = cudart()
    record, clock_ns = runtime.cudaEventRecord, time.perf_counter_ns
    with ExitStack() as stack:
        events = []
        for _ in range(2 * iterations + 1):
            events.append(checked(runtime.cudaEventCreateWithFlags(runtime.cudaEventDefault)))
            stack.callback(runtime.cudaEventDestroy, events[-1])
        origin, *others = events
        pairs = list(zip(others[::2], others[1::2], strict=True))
        checked(runtime.cudaStreamSynchronize(stream))  # so that the origin is recorded at once
        results = [record(origin, stream)]
        origin_ns = clock_ns()
        work()
        queued_ns = [clock_ns()]
        for start, end in pairs:
            results.append(record(start, stream))
            work()
            results.append(record(end, stream))
            queued_ns.append(clock_ns())
        for result in results:
            checked(result)
        checked(runtime.cudaStreamSynchronize(stream))
        elapsed_ms = runtime.cudaEventElapsedTime
        return DeviceTimes.of(
            [float(checked(elapsed_ms(start, end))) for start, end in pairs],
            done_ms=[float(checked(elapsed_ms(origin, end))) for _, end in pairs],
            queued_ms=[(each - origin_ns) / 1e6 for each in queued_ns],
        )


class Resources:
    """Device memory, pinned host memory, a stream and events of one owner, freed together in reverse order.

    Attributes:
        stream: the owner's own stream, as an integer handle.
    """

    def __init__(self) -> None:
        self._runtime = cudart()
        self._stack = ExitStack()
        self._stream = self._own(self._runtime.cudaStreamCreateWithFlags, self._runtime.cudaStreamDestroy, 1)
        self.stream = int(self._stream)

    def device_memory(self, size: int) -> int:
        """Return the address of new device memory of `size` bytes."""
        return int(self._own(self._runtime.cudaMalloc, self._runtime.cudaFree, size))

    def pinned(self, size: int) -> npt.NDArray[np.uint8]:
        """Return new page-locked host memory as bytes."""
        address = int(self._own(self._runtime.cudaMallocHost, self._runtime.cudaFreeHost, size))
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def event(self) -> Any:
        """Return a new event that orders streams."""
        runtime = self._runtime
        return self._own(runtime.cudaEventCreateWithFlags, runtime.cudaEventDestroy, runtime.cudaEventDisableTiming)

    def synchronize(self) -> None:
        """Wait until the stream has done everything."""
        checked(self._runtime.cudaStreamSynchronize(self._stream))

    def on_close(self, callback: Callable[[], None]) -> None:
        """Call something at the end, before anything that is owned by now is freed."""
        self._stack.callback(callback)

    def close(self) -> None:
        """Free everything."""
        self._stack.close()

    def _own(self, make: Callable[..., Any], free: Callable[[Any], Any], *args: Any) -> Any:
        made = checked(make(*args))
        self._stack.callback(free, made)
        return made

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def bound_to_stream(launch: Callable[[], object], memory: Resources, device: int) -> Bound:
    """Return a batch that lies on `cuda:<device>`, and that `launch` infers by the stream of `memory`."""

    def times(iterations: int) -> DeviceTimes:
        set_device(device)
        return device_times(memory.stream, launch, iterations)

    return Bound(launch, memory.synchronize, times)
