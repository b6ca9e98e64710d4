"""build-engine: the ONNX file as an engine, a sidecar that says what it is, and the receipt of its precisions."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from maseRT.config import BuildEngineSection
from maseRT.errors import CheckError
from maseRT.onnx_graph import layer_precisions
from maseRT.plan import Plan
from maseRT.receipt import Receipt, names_in, receipt_from
from maseRT.runtimes import choose_compiler
from maseRT.runtimes.base import BatchRange, BuildOptions, EngineInfo, ShapeRange
from maseRT.steps.resume import Finished
from maseRT.steps.table import Context, StepResult, final_plan
from maseRT.workspace import Workspace, atomic_path, read_json, write_json

log = logging.getLogger(__name__)


def run(context: Context, section: BuildEngineSection) -> StepResult:
    """Build the engine, and compare it with the plan.

    The sidecar is written last: an engine without one was never finished, or does not run as asked.

    Raises:
        CheckError: a layer does not run as asked, unless the config only wants a warning.
    """
    workspace = context.workspace
    compiler = choose_compiler(section.runtime)
    options = build_options(section, context.device, timing_caches=workspace.timing_caches)
    title = f"build-engine: {compiler.name}{_last_build(workspace)}"
    workspace.sidecar.unlink(missing_ok=True)

    def build() -> dict[str, Any]:
        with context.reporter.spinner(title), atomic_path(workspace.engine) as temporary:
            return compiler.build(workspace.onnx, temporary, options).to_json()

    finished = Finished(workspace.unfinished("build-engine"), key=context.key, step="build-engine")
    info = EngineInfo.from_json(finished.once("the build of the engine", workspace.engine, build))
    finished.clear()
    for note in info.notes:
        log.warning("build-engine: %s", note)
    plan = Plan.from_json(read_json(final_plan(context.config, workspace), made_by="quantize"))
    exported = layer_precisions(workspace.onnx, names_in(plan))
    receipt = receipt_from(plan, exported, info, onnx_sha256=info.onnx_sha256)
    write_json(workspace.receipt, receipt.to_json())
    if receipt.mismatches:
        _complain(receipt, plan, workspace, section)
    write_json(workspace.sidecar, info.to_json())
    return StepResult(
        headline=f"{workspace.engine}, {info.runtime} {info.version} for {_target(info)}, {info.bytes / 1e6:.2f} MB",
        outputs=[workspace.engine, workspace.receipt, workspace.sidecar],
        summary={
            "onnx_path": str(workspace.onnx),
            "trt_engine_path": str(workspace.engine),
            "runtime": info.runtime,
            "version": info.version,
            "target": info.target,
            "build_seconds": info.seconds,
            "bytes": info.bytes,
            "notes": list(info.notes),
            "precision": {"layers": receipt.counts, "differ": [layer.name for layer in receipt.mismatches]},
        },
        remarks=[f"precision of the layers: {receipt.summary()}", *filter(None, [receipt.hiding()])],
    )


def _complain(receipt: Receipt, plan: Plan, workspace: Workspace, section: BuildEngineSection) -> None:
    """Say which layers do not run as asked: as a warning where the config wants that, else as an error."""
    lines = [f"{len(receipt.mismatches)} of {len(receipt.layers)} layers do not run as asked:"]
    lines += [f"  {layer.describe()}" for layer in receipt.mismatches]
    if section.on_mismatch == "warn":
        log.warning("build-engine: %s", "\n".join(lines))
        return
    rules = [f"  {rule}" for rule in receipt.rules(plan)]
    paste = ["put this first into [quantize] rules:", *rules] if rules else ["see `masert explain`,"]
    raise CheckError(
        "\n".join(lines),
        where=str(workspace.engine),
        fix="\n".join([*paste, 'or set [build-engine] on_mismatch = "warn"']),
    )


def build_options(section: BuildEngineSection, device: str, *, timing_caches: Path) -> BuildOptions:
    """Return a section as the compilers want it.

    Args:
        section: of the config.
        device: of the run; an engine is built on a GPU whatever it is.
        timing_caches: the folder to keep timing caches in where the section names none.
    """
    return BuildOptions(
        batch=BatchRange(section.batch.min, section.batch.opt, section.batch.max),
        profiles=tuple(
            {name: ShapeRange(shape.min, shape.opt, shape.max) for name, shape in profile.items()}
            for profile in section.profiles
        ),
        compute_capability=section.compute_capability,
        device=device if device.startswith("cuda") else "cuda:0",
        workspace_mb=section.workspace_mb,
        optimization_level=section.optimization_level,
        tf32=section.tf32,
        timing_caches=section.timing_caches or timing_caches,
        reproducible=section.reproducible,
        tactic_sources=section.tactic_sources,
        version_compatible=section.version_compatible,
        hardware_compatible=section.hardware_compatible,
        refit=section.refit,
        strip=section.strip,
        max_threads=section.max_threads,
    )


def _last_build(workspace: Workspace) -> str:
    """Return what the engine that is replaced took to build, in words; "" where there is none."""
    try:
        seconds = float(json.loads(workspace.sidecar.read_text(encoding="utf-8"))["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return f" (last time: {seconds:.0f} s)"


def _target(info: EngineInfo) -> str:
    return info.gpu or f"compute capability {info.target}"
