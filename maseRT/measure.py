"""How fast something is: the times of its calls, and what they come to with their spread."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from maseRT.intervals import bootstrap_latency, latency_figures
from maseRT.report import schema
from maseRT.spread import with_other_runs


def latency(rounds: Sequence[Sequence[float]], clock: str, *, waited: int | None = None) -> schema.Latency:
    """Summarize calls that were timed in rounds, with 95 % intervals that hold other runs on this machine, too.

    Args:
        rounds: times of the calls of each round, in milliseconds.
        clock: "wall" or "device events".
        waited: for how many of them the device waited for the host; None where the device's clock was not asked.
    """
    times = np.concatenate([np.asarray(each, dtype=np.float64) for each in rounds])
    figures = latency_figures(rounds)
    of_rounds = [latency_figures([each]) for each in rounds]
    intervals = {
        name: with_other_runs(figures[name], interval, [each[name] for each in of_rounds])
        for name, interval in bootstrap_latency(rounds).items()
    }
    return schema.Latency(
        iterations=len(times),
        mean_ms=figures["mean"],
        p50_ms=figures["p50"],
        p90_ms=figures["p90"],
        p99_ms=figures["p99"],
        cov=float(times.std()) / figures["mean"],
        intervals={name: schema.Interval(low=low, high=high) for name, (low, high) in intervals.items()},
        clock=clock,
        waited=None if waited is None else waited / len(times),
        rounds=[each["p50"] for each in of_rounds],
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
