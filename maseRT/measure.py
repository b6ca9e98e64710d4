"""How fast something is: latency after warm-up, with its spread."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Latency:
    """The time of one call, in milliseconds.

    Attributes:
        batch: samples per call.
        iterations: timed calls.
    """

    batch: int
    iterations: int
    mean_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float

    @property
    def throughput(self) -> float:
        """Samples per second at the mean latency."""
        return self.batch / self.mean_ms * 1000

    def as_dict(self) -> dict[str, float]:
        """Return plain values for JSON."""
        return {**asdict(self), "throughput": self.throughput}


def latency_from_times(times_ms: Sequence[float], *, batch: int) -> Latency:
    """Summarize the times of single calls."""
    p50, p90, p99 = np.percentile(times_ms, [50, 90, 99]).tolist()
    return Latency(batch, len(times_ms), float(np.mean(times_ms)), p50, p90, p99)


def measure_latency(call: Callable[[], object], *, batch: int, warmup: int, iterations: Iterable[int]) -> Latency:
    """Time a call that ends when its result is there.

    Args:
        call: one inference.
        batch: samples per call.
        warmup: calls before the clock starts.
        iterations: one timed call each.
    """
    for _ in range(warmup):
        call()
    times_ms = []
    for _ in iterations:
        start = time.perf_counter()
        call()
        times_ms.append((time.perf_counter() - start) * 1000)
    return latency_from_times(times_ms, batch=batch)
