"""How fast something is: wall time and the device's own time after warm-up, with their spread, for every runtime."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from maseRT.intervals import bootstrap_latency, latency_figures
from maseRT.report import schema
from maseRT.runtimes.base import Bound


def latency(rounds: Sequence[Sequence[float]], clock: str) -> schema.Latency:
    """Summarize calls that were timed in rounds, with 95 % intervals.

    Args:
        rounds: times of the calls of each round, in milliseconds.
        clock: "wall" or "device events".
    """
    times = np.concatenate([np.asarray(each, dtype=np.float64) for each in rounds])
    figures = latency_figures(rounds)
    intervals = bootstrap_latency(rounds)
    return schema.Latency(
        iterations=len(times),
        mean_ms=figures["mean"],
        p50_ms=figures["p50"],
        p90_ms=figures["p90"],
        p99_ms=figures["p99"],
        cov=float(times.std()) / figures["mean"],
        intervals={name: schema.Interval(low=low, high=high) for name, (low, high) in intervals.items()},
        clock=clock,
    )


def wall_times_ms(call: Callable[[], object], *, warmup: int, iterations: Iterable[int]) -> list[float]:
    """Time a call that ends when its result is there, once for each of `iterations`, after `warmup` untimed ones."""
    for _ in range(warmup):
        call()
    times_ms = []
    for _ in iterations:
        start = time.perf_counter()
        call()
        times_ms.append((time.perf_counter() - start) * 1000)
    return times_ms


def bound_times_ms(bound: Bound, iterations: int) -> tuple[list[float], str]:
    """Return the times of inferences on data that is on the device, and what measured them.

    The device's own events, one inference queued behind another; where the runtime gives none away, the wall clock
    around inferences that are waited for one by one.
    """
    times_ms = bound.device_times_ms(iterations)
    if times_ms is not None:
        return times_ms, "device events"
    return wall_times_ms(bound.run, warmup=0, iterations=range(iterations)), "wall clock"
