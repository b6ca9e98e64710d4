"""How long the rows take, block by block in turns."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gpu_bench.jobs import Job, Options
from gpu_bench.rows import Row, cudnn_benchmark
from maseRT.hardware import nvidia_gpus
from maseRT.measure import wall_times_ms
from maseRT.nvml import open_gpu
from maseRT.onnx_export import INPUT
from maseRT.runtimes.base import Bound

BOOTSTRAPS = 4000


@dataclass(frozen=True)
class BoundTimes:
    """The times of inferences on data that is on the device.

    Attributes:
        ms: of each.
        clock: what measured them.
        waited: see `maseRT.runtimes.device_times.DeviceTimes`.
    """

    ms: list[float]
    clock: str
    waited: int = 0


def bound_times(bound: Bound, iterations: int) -> BoundTimes:
    """Return the times of inferences on data that is on the device.

    The device's own events, one inference queued behind another; where the runtime gives none away, the wall clock
    around inferences that are waited for one by one.
    """
    found = bound.device_times(iterations)
    if found is not None:
        return BoundTimes(found.ms, "device events", found.waited)
    return BoundTimes(wall_times_ms(bound.run, warmup=0, iterations=range(iterations)), "wall clock")


def measure_rows(job: Job, options: Options, rows: list[Row], result: dict[str, Any]) -> None:
    """Time all rows block by block, in an order that rotates, and take the ratios of every row to the INT8 engine."""
    states = []
    with ExitStack() as stack:
        gpu = None if options.dry_run else stack.enter_context(open_gpu(nvidia_gpus()[0].uuid))
        for block in range(options.blocks):
            for row in rows[block % len(rows) :] + rows[: block % len(rows)]:
                with cudnn_benchmark(row.benchmark):
                    row.bound.repeat(max(2, row.count // 10))
                    times = bound_times(row.bound, row.count)
                row.timed_by = times.clock
                row.waited += times.waited
                row.times_ms += times.ms
                row.blocks_ms.append(float(np.median(times.ms)))
            states += [gpu.state().as_dict()] if gpu else []
    result["states"] = states[:: max(1, len(states) // 5)]
    x = torch.from_numpy(np.load(options.data(job))["x_test"][: job.batch])
    for row in rows:
        with cudnn_benchmark(row.benchmark):
            wall = wall_times_ms(row.bound.run, warmup=5, iterations=range(30))
            feed = {INPUT: host_array(row.inputs(x))}
            whole = wall_times_ms(functools.partial(row.session.infer, feed), warmup=3, iterations=range(20))
            row.bound = row.session.bind({INPUT: row.inputs(x)})  # a session's buffers now hold another batch
            row.bound.repeat(3)
        p50, p90, p99 = np.percentile(row.times_ms, [50, 90, 99]).tolist()
        row.result |= {
            "median_ms": float(np.median(row.blocks_ms)),
            "p50_ms": p50,
            "p90_ms": p90,
            "p99_ms": p99,
            "cov": float(np.std(row.blocks_ms, ddof=1) / np.mean(row.blocks_ms)),
            "wall_ms": float(np.median(wall)),
            "end_to_end_ms": float(np.median(whole)),
            "timed_by": row.timed_by,
            "timed": len(row.times_ms),
            "waited": row.waited / len(row.times_ms),
        }
    result["ratios"] = ratios({row.name: row.blocks_ms for row in rows})


def host_array(value: Any) -> np.ndarray:
    """Return what comes from the host in an end-to-end measurement."""
    return value.numpy() if isinstance(value, torch.Tensor) else value


def ratios(blocks: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Return how many times faster TensorRT's engines are than every other row, with bootstrapped 95 % intervals.

    Blocks are resampled whole: what disturbed a block disturbed all its rows.
    """
    random = np.random.default_rng(0)
    found = {}
    for mine in ("tensorrt int8", "tensorrt fp16"):
        for other, theirs in blocks.items():
            if mine not in blocks or other == mine:
                continue
            a, b = np.array(theirs), np.array(blocks[mine])
            picks = random.integers(0, len(a), (BOOTSTRAPS, len(a)))
            samples = np.median(a[picks], axis=1) / np.median(b[picks], axis=1)
            low, high = np.percentile(samples, [2.5, 97.5])
            ratio = float(np.median(a) / np.median(b))
            found[f"{mine} vs {other}"] = {"ratio": ratio, "low": float(low), "high": float(high)}
    return found
