"""Step records: what a step was made from, so that it is run again exactly when something changed.

A record is written last, by rename: it is there if and only if its step completed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from maseRT.errors import StepError
from maseRT.workspace import Workspace, write_json

DEPENDENCIES = (
    "torch",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-ep-openvino",
    "tensorrt",
    "tensorrt-rtx",
    "numpy",
    "lightning-fabric",
    "torchmetrics",
)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def source_hash() -> str:
    """Return one hash over all of maseRT's Python sources."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@cache
def dependency_versions() -> dict[str, str]:
    """Return the installed versions of what a result depends on, without importing any of it."""
    versions = {}
    for name in DEPENDENCIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


@dataclass(frozen=True)
class FileState:
    """A file as a record remembers it."""

    sha256: str
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> FileState:
        """Read and hash a file."""
        stat = path.stat()
        return cls(sha256(path), stat.st_size, stat.st_mtime_ns)

    def holds(self, path: Path) -> bool:
        """Tell whether the file still has this content; hashes it only when size or time differ."""
        try:
            stat = path.stat()
            if stat.st_size != self.size:
                return False
            return stat.st_mtime_ns == self.mtime_ns or sha256(path) == self.sha256
        except OSError:
            return False


@dataclass(frozen=True)
class StepRecord:
    """A completed step.

    Attributes:
        key: everything the result depends on, flat: "section.key" -> JSON text.
        outputs: files the step left, relative to the run's folder.
        summary: the step's result in a few plain values.
        seconds: wall time.
    """

    step: str
    key: dict[str, str]
    outputs: dict[str, FileState]
    summary: dict[str, Any]
    seconds: float
    versions: dict[str, str] = field(default_factory=dict)

    def write(self, workspace: Workspace) -> None:
        """Save the record: from now on the step counts as done."""
        write_json(workspace.record(self.step), asdict(self))


def read_record(workspace: Workspace, step: str) -> StepRecord | None:
    """Return the record of a completed step; None when it never completed or the record is damaged."""
    try:
        raw = json.loads(workspace.record(step).read_text(encoding="utf-8"))
        outputs = {name: FileState(**state) for name, state in raw.pop("outputs").items()}
        record = StepRecord(outputs=outputs, **raw)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return record if isinstance(record.key, dict) and isinstance(record.summary, dict) else None


def flatten(prefix: str, value: Any) -> dict[str, str]:
    """Return {"finetune": {"epochs": 2}} as {"finetune.epochs": "2"}."""
    if isinstance(value, Mapping) and value:
        return {k: v for key, inner in value.items() for k, v in flatten(f"{prefix}.{key}", inner).items()}
    return {prefix: json.dumps(value, sort_keys=True, default=str)}


def why_stale(record: StepRecord | None, key: Mapping[str, str], root: Path) -> str | None:
    """Return why a step must run, in words; None when its record still holds."""
    if record is None:
        return "never completed"
    changes = _changes(record.key, key)
    if changes:
        return changes
    for name, state in record.outputs.items():
        path = root / name
        if not path.exists():
            return f"{name} is gone"
        if not state.holds(path):
            return f"{name} was changed or damaged after it was written"
    return None


def _changes(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    words = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if before == after:
            continue
        if key.startswith("file."):
            words.append(f"{key.removeprefix('file.')} changed")
        elif key == "maseRT.sources":
            words.append("maseRT itself changed")
        else:
            words.append(f"{key} {before or 'absent'} -> {after or 'absent'}")
    return "; ".join(words[:4]) + ("; ..." if len(words) > 4 else "")


def check_inputs(workspace: Workspace, paths: Sequence[Path], made_by: Mapping[Path, str], *, options: str) -> None:
    """Hash the inputs of a step against the records of the steps that made them.

    Raises:
        StepError: an input is missing, or is not what its step wrote; names the command that makes it.
    """
    for path in paths:
        step = made_by[path]
        name = workspace.name_of(path)
        record = read_record(workspace, step)
        if record is None or name not in record.outputs:
            raise StepError("not there yet", where=str(path), fix=f"run `masert {step} {options}` first")
        again = f"rebuild it with `masert {step} {options} --force`"
        if not path.exists():
            raise StepError("missing", where=str(path), fix=again)
        if sha256(path) != record.outputs[name].sha256:
            raise StepError("damaged: its content is not what was written", where=str(path), fix=again)
