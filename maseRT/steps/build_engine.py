"""build-engine: the ONNX file as an engine, with a sidecar that says what it is and what it was made from."""

from __future__ import annotations

import logging

from maseRT.config import BuildEngineSection
from maseRT.errors import UsageError
from maseRT.runtimes import choose_compiler
from maseRT.runtimes.base import BatchRange, BuildOptions, EngineInfo
from maseRT.steps.table import Context, StepResult
from maseRT.workspace import atomic_path, write_json

log = logging.getLogger(__name__)


def run(context: Context) -> StepResult:
    """Build the engine; the sidecar is written after it, so that an engine without one was never finished."""
    section = context.config.build_engine
    if section is None:
        raise UsageError("the config has no [build-engine] section")
    workspace = context.workspace
    compiler = choose_compiler(section.runtime)
    options = build_options(section, context.device)
    with context.reporter.spinner(f"build-engine: {compiler.name}"), atomic_path(workspace.engine) as temporary:
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


def build_options(section: BuildEngineSection, device: str) -> BuildOptions:
    """Return a section as the compilers want it."""
    return BuildOptions(
        batch=BatchRange(section.batch.min, section.batch.opt, section.batch.max),
        compute_capability=section.compute_capability,
        device=device if device.startswith("cuda") else "cuda:0",
        workspace_mb=section.workspace_mb,
        optimization_level=section.optimization_level,
        tf32=section.tf32,
    )


def _target(info: EngineInfo) -> str:
    return info.gpu or f"compute capability {info.target}"
