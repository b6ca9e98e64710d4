"""A job's engines: built by the pipeline's own step, timed, and counted by precision."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from gpu_bench.jobs import FREE, Job, Options
from gpu_bench.prepare import open_run
from maseRT.runtimes.trt import build as build_module
from maseRT.steps.table import STEPS
from maseRT.workspace import Workspace, read_json

ENGINE_SECONDS = 150
"""What the FP32 one takes at most, and any other too: those that can wait are left out when less is left."""


def build_all(job: Job, options: Options, result: dict[str, Any], save: Callable[[], None]) -> dict[str, Workspace]:
    """Build the engines; the INT8 one twice, the second time with a warm timing cache."""
    caches = {path.name: path.stat().st_size for path in options.timing.glob("*.cache")}
    result["timing_caches_before"] = caches
    engines: dict[str, Workspace] = {}
    for precision in options.precisions:
        if precision == "fp32" and options.deadline - time.time() < ENGINE_SECONDS:
            result["builds"][precision] = {"error": "left out: out of time"}
            continue
        build_engine(job, precision, options, engines, result)
        save()
    return engines


def build_engine(
    job: Job,
    precision: str,
    options: Options,
    engines: dict[str, Workspace],
    result: dict[str, Any],
    *,
    rules: Sequence[str] = (),
) -> None:
    """Build one engine and add it; what went wrong is left in its place.

    Args:
        rules: of [quantize], which need an ONNX file of their own.
    """
    print(f"{job}: building {precision}", flush=True)
    build: dict[str, Any] = {}
    result["builds"][precision] = build
    try:
        if rules:
            open_run(job, precision, options, rules=rules).transform(last="export")
        # A cached engine of an earlier call counts as none: the build is timed.
        run = open_run(job, precision, options, force=True, rules=rules)
        with free_types() if precision == FREE else nullcontext():
            outcome = run.single(STEPS["build-engine"])
        build |= {key: outcome.summary[key] for key in ("build_seconds", "bytes", "notes", "version", "precision")}
        build["step_seconds"] = outcome.seconds
        # As long as the first build at worst: it is the measurements that must not run out of time.
        spare = options.deadline - time.time() - ENGINE_SECONDS
        if precision == "int8" and not options.dry_run and outcome.summary["build_seconds"] < spare:
            build["warm_seconds"] = run.single(STEPS["build-engine"]).summary["build_seconds"]
        build["precisions"] = precision_counts(run.workspace)
        engines[precision] = run.workspace
    except Exception as error:
        build["error"] = str(error)[-2000:]
        print(f"{job} {precision}: {error}", flush=True)


class FreeTypes:
    """Lets a weakly typed builder choose FP16 for whatever is not INT8."""

    def __init__(self, trt: Any, network: Any, config: Any, onnx: Any) -> None:
        self.notes: list[str] = []
        for flag in (trt.BuilderFlag.INT8, trt.BuilderFlag.FP16):
            config.set_flag(flag)

    def relax(self, heard: Any) -> bool:
        """There is nothing to give up."""
        return False


@contextmanager
def free_types() -> Any:
    told = build_module.WeakTypes
    build_module.WeakTypes = FreeTypes
    try:
        yield
    finally:
        build_module.WeakTypes = told


def precision_counts(workspace: Workspace) -> dict[str, int]:
    """Count engine layers by what they compute in, and those that only convert."""
    layers = read_json(workspace.sidecar, made_by="build-engine")["layers"] or []
    counts: dict[str, int] = {}
    for layer in layers:
        kind = "conversions" if layer["converts_only"] else layer["precision"] or "unknown"
        counts[kind] = counts.get(kind, 0) + 1
    return counts
