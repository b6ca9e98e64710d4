"""How fast something is: wall time and the device's own time after warm-up, with their spread, for every runtime."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from maseRT.intervals import bootstrap_latency
from maseRT.report import schema
from maseRT.runtimes.base import Bound


@dataclass(frozen=True)
class Latency:
    """The time of one call, in milliseconds.

    Attributes:
        batch: samples per call.
        iterations: timed calls.
        cov: coefficient of variation, standard deviation over mean.
    """

    batch: int
    iterations: int
    mean_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    cov: float

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
    mean = float(np.mean(times_ms))
    return Latency(batch, len(times_ms), mean, p50, p90, p99, float(np.std(times_ms)) / mean)


def latency(rounds: Sequence[Sequence[float]], clock: str) -> schema.Latency:
    """Summarize calls that were timed in rounds, with 95 % intervals.

    Args:
        rounds: times of the calls of each round, in milliseconds.
        clock: "wall" or "device events".
    """
    summary = latency_from_times([time_ms for each in rounds for time_ms in each], batch=1)
    intervals = bootstrap_latency(rounds)
    return schema.Latency(
        iterations=summary.iterations,
        mean_ms=summary.mean_ms,
        p50_ms=summary.p50_ms,
        p90_ms=summary.p90_ms,
        p99_ms=summary.p99_ms,
        cov=summary.cov,
        intervals={name: schema.Interval(low=low, high=high) for name, (low, high) in intervals.items()},
        clock=clock,
    )


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


def bound_times_ms(bound: Bound, iterations: int) -> tuple[list[float], str]:
    """Return the times of inferences on data that is on the device, and what measured them.

    The device's own events, one inference queued behind another; where the runtime gives none away, the wall clock
    around inferences that are waited for one by one.
    """
    times_ms = bound.device_times_ms(iterations)
    if times_ms is not None:
        return times_ms, "device events"
    times_ms = []
    for _ in range(iterations):
        start = time.perf_counter()
        bound.run()
        times_ms.append((time.perf_counter() - start) * 1000)
    return times_ms, "wall clock"
