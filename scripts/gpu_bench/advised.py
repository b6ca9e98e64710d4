"""An experiment: an INT8 engine with the rules that the comparison of the job's INT8 and FP16 engines proposes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from gpu_bench.engines import ENGINE_SECONDS, build_engine
from gpu_bench.jobs import ADVISED, ADVISED_ROW, Job, Options
from maseRT.blame.compare import blame
from maseRT.errors import MaseRTError
from maseRT.onnx_export import INPUT
from maseRT.receipt import Receipt
from maseRT.runtimes import get_runtime
from maseRT.workspace import Workspace, read_json

COMPARED = ("int8", "fp16")

WARMUP_SECONDS = 0.5
"""Of work before a profile: an idle GPU's clocks are low."""


def build_advised(
    job: Job, options: Options, engines: dict[str, Workspace], result: dict[str, Any], save: Callable[[], None]
) -> None:
    """Compare the engines, and add one that is built as advised; or say in the row's place why there is none."""
    result["advised"] = found = compared(job, options, engines)
    reason = left_out(found, options)
    if not reason:
        build_engine(job, ADVISED, options, engines, result, rules=found["rules"])
        reason = "" if ADVISED in engines else "no engine"
    if reason:
        result["rows"][ADVISED_ROW] = {"not_run": reason}
    save()


def compared(job: Job, options: Options, engines: dict[str, Workspace]) -> dict[str, Any]:
    """Return what the comparison of the engines says, or under "error" why there is none."""
    try:
        return blamed(engines, {f"tensorrt {each}": profile(job, options, engines[each]) for each in COMPARED})
    except Exception as error:
        return {"error": f"no kernel times: {type(error).__name__}: {error}"}


def left_out(found: dict[str, Any], options: Options) -> str:
    """Return why there is nothing to build; "" if there is."""
    if "error" in found:
        return str(found["error"])
    if not found["rules"]:
        floats = f'the advice is precision = "{found["float_precision"]}"'
        return floats if found["prefers_float"] else "no rule is advised"
    return "out of time" if options.deadline - time.time() < ENGINE_SECONDS else ""


def profile(job: Job, options: Options, engine: Workspace) -> dict[str, float]:
    """Return an engine's times per layer, in a session of its own."""
    with get_runtime(options.runtime).open(engine.engine, "cuda:0") as session:
        bound = session.bind({INPUT: noise(job)})
        start = time.perf_counter()
        while time.perf_counter() - start < WARMUP_SECONDS:
            bound.repeat(20)
        return layer_times_ms(job, session)


def layer_times_ms(job: Job, session: Any) -> dict[str, float]:
    """Return a session's times per layer, by the library's profiler."""
    times: dict[str, float] = session.layer_times_ms({INPUT: noise(job)}, iterations=20)
    return times


def noise(job: Job) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((job.batch, *job.shape), dtype=np.float32)


def blamed(engines: dict[str, Workspace], layers: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Return what in the INT8 engine costs more than in the FP16 one, and the rules that avoid it."""
    if not all(f"tensorrt {precision}" in layers for precision in COMPARED):
        return {}
    receipts = []
    for precision in COMPARED:
        path = engines[precision].receipt
        receipt = Receipt.from_json(read_json(path, made_by="build-engine"), where=str(path))
        receipts.append(receipt.with_times(layers[f"tensorrt {precision}"]))
    try:
        return blame(*receipts).as_dict()
    except MaseRTError as error:
        return {"error": str(error)}
