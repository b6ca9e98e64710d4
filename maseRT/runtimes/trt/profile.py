"""How long each layer of an engine takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from maseRT.errors import StepError

_WARMUP = 3


def layer_times_ms(trt: Any, context: Any, enqueue: Callable[[], bool], iterations: int) -> dict[str, float]:
    """Return the mean time of every layer, by its name, in the order of execution.

    A profiled inference waits after every layer and replays no CUDA graph: the sum is more than an inference takes.

    Args:
        trt: the library.
        context: an execution context of its own, its shapes and addresses set; it keeps the profiler.
        enqueue: runs the context once and tells whether it could.
        iterations: profiled inferences.

    Raises:
        StepError: an inference failed.
    """
    totals: dict[str, float] = {}

    class Profiler(trt.IProfiler):  # type: ignore[misc]
        """Adds up what it is told."""

        def __init__(self) -> None:
            super().__init__()

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            totals[layer_name] = totals.get(layer_name, 0.0) + ms

    context.profiler = profiler = Profiler()
    for iteration in range(_WARMUP + iterations):
        if iteration == _WARMUP:
            totals.clear()
        if not enqueue():
            raise StepError("a profiled inference failed", where=trt.__name__)
    del profiler  # the bindings hold no reference of their own: it had to live until here
    return {name: total / iterations for name, total in totals.items()}
