"""One job: its engines, then all its rows, interleaved, in one process."""

from __future__ import annotations

import platform
import time
import traceback
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from gpu_bench.energy import measure_energies
from gpu_bench.engines import build_all
from gpu_bench.jobs import Job, Options
from gpu_bench.rows import Row, open_rows
from gpu_bench.times import measure_rows
from maseRT.blame.compare import blame
from maseRT.errors import MaseRTError
from maseRT.hardware import cpu, nvidia_driver, nvidia_gpus
from maseRT.onnx_export import INPUT
from maseRT.receipt import Receipt
from maseRT.records import dependency_versions
from maseRT.workspace import Workspace, read_json, write_json


def measure_job(job: Job, options: Options) -> None:
    """Build, measure, and write the result after each part, so that nothing is lost when time runs out."""
    result: dict[str, Any] = {"job": str(job), "model": job.model, "batch": job.batch, "complete": False}
    result |= {"machine": machine(), "builds": {}, "rows": {}, "ratios": {}}

    def save() -> None:
        write_json(options.part(job), result)

    try:
        engines = build_all(job, options, result, save)
        with ExitStack() as stack:
            rows = open_rows(job, options, engines, result, stack)
            save()
            measure_rows(job, options, rows, result)
            save()
            result["layers"] = layer_times(job, rows)
            result["blame"] = blamed(engines, result["layers"])
            save()
            measure_energies(job, options, rows, result)
        result["complete"] = "tensorrt int8" in result["layers"] and "out of time" not in str(result)
    except Exception:
        result["error"] = traceback.format_exc()[-3000:]
        print(result["error"], flush=True)
    save()


def machine() -> dict[str, Any]:
    driver = nvidia_driver()
    return {
        "gpus": [gpu.name for gpu in nvidia_gpus()],
        "driver": driver.version if driver else None,
        "cpu": cpu().name,
        "threads": cpu().threads,
        "python": platform.python_version(),
        "torch_cuda": torch.version.cuda,
        "date": time.strftime("%Y-%m-%d"),
        **dependency_versions(),
    }


def layer_times(job: Job, rows: list[Row]) -> dict[str, dict[str, float]]:
    """Return the engines' times per layer, by the library's profiler."""
    found = {}
    for row in rows:
        if row.name in ("tensorrt int8", "tensorrt fp16"):
            try:
                x = np.random.default_rng(1).standard_normal((job.batch, *job.shape), dtype=np.float32)
                found[row.name] = row.session.layer_times_ms({INPUT: x}, iterations=20)
                row.bound = row.session.bind({INPUT: x})
            except MaseRTError as error:
                print(f"{row.name}: no layer times: {error}", flush=True)
    return found


def blamed(engines: dict[str, Workspace], layers: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Return what in the INT8 engine costs more than in the FP16 one, and the rules that avoid it."""
    times = [layers.get(f"tensorrt {precision}") for precision in ("int8", "fp16")]
    if None in times:
        return {}
    paths = [engines[precision].receipt for precision in ("int8", "fp16")]
    receipts = [Receipt.from_json(read_json(path, made_by="build-engine"), where=str(path)) for path in paths]
    try:
        return blame(*(receipt.with_times(ms) for receipt, ms in zip(receipts, times, strict=True))).as_dict()
    except MaseRTError as error:
        return {"error": str(error)}
