"""One job: its engines, then all its rows, interleaved, in one process."""

from __future__ import annotations

import platform
import time
import traceback
from contextlib import ExitStack
from typing import Any

import torch

from gpu_bench.advised import blamed, build_advised, layer_times_ms, noise
from gpu_bench.energy import measure_energies
from gpu_bench.engines import build_all
from gpu_bench.jobs import ADVISED_ROW, Job, Options
from gpu_bench.rows import Row, open_rows
from gpu_bench.times import measure_rows
from maseRT.errors import MaseRTError
from maseRT.hardware import cpu, nvidia_driver, nvidia_gpus
from maseRT.onnx_export import INPUT
from maseRT.records import dependency_versions
from maseRT.workspace import write_json


def measure_job(job: Job, options: Options) -> None:
    """Build, measure, and write the result after each part, so that nothing is lost when time runs out."""
    result: dict[str, Any] = {"job": str(job), "model": job.model, "batch": job.batch, "complete": False}
    result |= {"machine": machine(), "builds": {}, "rows": {}, "ratios": {}}

    def save() -> None:
        write_json(options.part(job), result)

    try:
        engines = build_all(job, options, result, save)
        if options.advised:
            build_advised(job, options, engines, result, save)
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
        if row.name in ("tensorrt int8", "tensorrt fp16", ADVISED_ROW):
            try:
                found[row.name] = layer_times_ms(job, row.session)
                row.bound = row.session.bind({INPUT: noise(job)})
            except MaseRTError as error:
                print(f"{row.name}: no layer times: {error}", flush=True)
    return found
