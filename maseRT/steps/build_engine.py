"""build-engine: the ONNX file as an engine, with a sidecar that says what it is and what it was made from."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from maseRT.config import BuildEngineSection
from maseRT.errors import UsageError
from maseRT.runtimes import choose_compiler
from maseRT.runtimes.base import BatchRange, BuildOptions, EngineInfo, ShapeRange
from maseRT.steps.table import Context, StepResult
from maseRT.workspace import Workspace, atomic_path, write_json

log = logging.getLogger(__name__)


def run(context: Context) -> StepResult:
    """Build the engine; the sidecar is written after it, so that an engine without one was never finished."""
    section = context.config.build_engine
    if section is None:
        raise UsageError("the config has no [build-engine] section")
    workspace = context.workspace
    compiler = choose_compiler(section.runtime)
    options = build_options(section, context.device, timing_caches=workspace.timing_caches)
    title = f"build-engine: {compiler.name}{_last_build(workspace)}"
    with context.reporter.spinner(title), atomic_path(workspace.engine) as temporary:
        info = compiler.build(workspace.onnx, temporary, options)
    write_json(workspace.sidecar, info.to_json())
    for note in info.notes:
        log.warning("build-engine: %s", note)
    return StepResult(
        headline=f"{workspace.engine}, {info.runtime} {info.version} for {_target(info)}, {info.bytes / 1e6:.2f} MB",
        outputs=[workspace.engine, workspace.sidecar],
        summary={
            "onnx_path": str(workspace.onnx),
            "trt_engine_path": str(workspace.engine),
            "runtime": info.runtime,
            "version": info.version,
            "target": info.target,
            "build_seconds": info.seconds,
            "bytes": info.bytes,
            "notes": list(info.notes),
        },
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
