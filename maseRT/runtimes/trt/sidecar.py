"""An engine's sidecar: what it was built from and for, compared before the engine is loaded."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from maseRT.errors import CheckError
from maseRT.runtimes.base import EngineInfo

STRIPPED = "stripped, refit first: it has no weights"
"""Why such an engine does not run."""

_REBUILD = "rebuild it with `masert build-engine --force`"


def sidecar_path(engine: Path) -> Path:
    """Return where an engine's sidecar lies."""
    return engine.with_suffix(".json")


def check_sidecar(engine: Path, content: bytes, *, runtime: str, version: str, capability: str) -> EngineInfo:
    """Return an engine's sidecar if it says that this engine runs here.

    Args:
        content: the engine's bytes.
        runtime: the runtime that is to load it, and its `version`.
        capability: compute capability of the GPU.

    Raises:
        CheckError: there is none, it speaks of another engine, runtime, version or GPU, or of one without weights.
    """
    path = sidecar_path(engine)
    try:
        info = EngineInfo.from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise CheckError(
            f"it has no sidecar ({path.name}); an engine is code, and only one that was built here is loaded",
            where=str(engine),
            fix=f"{_REBUILD}, or trust it expressly",
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckError(f"damaged: {error}", where=str(path), fix=_REBUILD) from error
    if info.engine_sha256 != hashlib.sha256(content).hexdigest():
        raise CheckError(f"it is not the engine that {path.name} speaks of", where=str(engine), fix=_REBUILD)
    check_weights(engine)
    wanted = {
        "runtime": (info.runtime, runtime, False),
        "version": (info.version, version, info.version_compatible),
        "compute capability": (info.target, capability, info.hardware_compatible),
    }
    for what, (built, here, newer_too) in wanted.items():
        if built != here and not (newer_too and _numbers(here) > _numbers(built)):
            raise CheckError(f"built for {what} {built}; here it is {here}", where=str(engine), fix=_REBUILD)
    return info


def check_weights(engine: Path) -> None:
    """Check that an engine's sidecar, where there is one, does not say that it has no weights.

    Raises:
        CheckError: it does; such an engine would load, and answer nonsense.
    """
    try:
        stripped = json.loads(sidecar_path(engine).read_text(encoding="utf-8"))["stripped"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if stripped:
        raise CheckError(
            STRIPPED, where=str(engine), fix="refit it with TensorRT's Refitter, or build it with strip = false"
        )


def _numbers(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", text)]
