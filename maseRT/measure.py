"""How fast something is: latency after warm-up, with its spread."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Latency:
    """Wall time of one call, in milliseconds, from inputs in host memory to outputs in host memory."""

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


def measure_latency(call: Callable[[], object], *, batch: int, warmup: int, iterations: Iterable[int]) -> Latency:
    """Time a call that ends when its result is there.

    Args:
        batch: samples per call.
        warmup: calls before the clock starts.
        iterations: one timed call each.
    """
    for _ in range(warmup):
        call()
    times = []
    for _ in iterations:
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1000)
    p50, p90, p99 = np.percentile(times, [50, 90, 99]).tolist()
    return Latency(batch, len(times), float(np.mean(times)), p50, p90, p99)
