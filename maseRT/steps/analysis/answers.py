"""A row's answers on disk: compared from there, and kept for as long as nothing that they depend on changes."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maseRT.errors import StepError
from maseRT.workers.memory import Peak
from maseRT.workspace import write_json

Array = NDArray[Any]

KEPT_BYTES = 1 << 30
"""What a finished analysis keeps: answers of a language model or a segmentation can be larger than all else."""


@dataclass(frozen=True)
class Told:
    """What lies in a file of answers.

    Attributes:
        samples: how many were answered.
        sha256: of these samples, inputs and targets in order.
        shape: of one answer.
        dtype: by numpy's name.
        memory: that it took, see `maseRT.workers.protocol.Worker.memory`.
    """

    samples: int = 0
    sha256: str = ""
    shape: tuple[int, ...] = ()
    dtype: str = "float32"
    memory: Peak = field(default_factory=Peak)

    @property
    def bytes(self) -> int:
        """Of all answers."""
        return self.samples * prod(self.shape) * np.dtype(self.dtype).itemsize


class Answers:
    """One row's outputs in the order of the samples, written batch by batch: what was stopped goes on from there.

    Args:
        path: the file of the values; a second one beside it says what they are.
        key: everything that the answers depend on, but for the samples themselves.
    """

    def __init__(self, path: Path, key: Mapping[str, str]) -> None:
        self._path, self._about = path, path.with_name(f"{path.name}.json")
        self._key = dict(key)
        self.told = self._found()
        self.kept = self.told.samples
        """How many there were before."""

    def add(self, outputs: Array, *, sha256: str, memory: Peak) -> None:
        """Write the answers [N, ...] to a batch.

        Args:
            outputs: of the batch that follows the answered samples.
            sha256: of all samples up to the end of the batch.
            memory: that the row took so far.

        Raises:
            StepError: the disk is full, or the answers change their shape.
        """
        told = self.told
        shape, dtype = outputs.shape[1:], str(outputs.dtype)
        if told.samples and (shape, dtype) != (told.shape, told.dtype):
            what = f"answers were {told.dtype} {list(told.shape)} and are {dtype} {list(shape)} now"
            raise StepError(what, where=self._path.stem)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "r+b" if told.samples else "wb") as file:
                file.truncate(told.bytes)
                file.seek(told.bytes)
                file.write(np.ascontiguousarray(outputs).data)
        except OSError as error:
            raise StepError(
                f"cannot write: {error.strerror or error}", where=str(self._path), fix="free space"
            ) from error
        self.told = Told(told.samples + len(outputs), sha256, shape, dtype, told.memory.most(memory))

    def save(self) -> None:
        """Say what was written, so that it is found again."""
        if self.told.samples > self.kept:
            with open(self._path, "rb+") as file:
                os.fsync(file.fileno())
            write_json(self._about, {**asdict(self.told), "key": self._key})

    def discard(self) -> None:
        """Start over."""
        self._about.unlink(missing_ok=True)
        self.told, self.kept = Told(), 0

    def read(self) -> Array:
        """Return all answers [N, ...], mapped into memory; what is written to them stays there."""
        shape = (self.told.samples, *self.told.shape)
        return np.memmap(self._path, dtype=self.told.dtype, mode="c", shape=shape)

    def _found(self) -> Told:
        try:
            about = json.loads(self._about.read_text(encoding="utf-8"))
            key = about.pop("key")
            about |= {"shape": tuple(about["shape"]), "memory": Peak(*about["memory"])}
            told = Told(**about)
            if key == self._key and self._path.stat().st_size >= told.bytes:
                return told
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass
        self._about.unlink(missing_ok=True)  # before the values are overwritten
        return Told()


def prune(folder: Path, rows: Collection[str], *, most_bytes: int = KEPT_BYTES) -> None:
    """Delete answers that a finished analysis keeps for nobody: of other rows, and the largest beyond the limit.

    Args:
        folder: of the answers.
        rows: names of those that the next analysis can ask for.
        most_bytes: what may stay, in all.
    """
    kept = 0
    for path in sorted(folder.glob("*.json"), key=lambda path: _size(path.with_suffix(""))):
        size = _size(path.with_suffix(""))
        if path.stem in rows and kept + size <= most_bytes:
            kept += size
        else:
            path.unlink(missing_ok=True)
    for path in folder.iterdir() if folder.exists() else ():
        if path.suffix != ".json" and not path.with_name(f"{path.name}.json").exists():
            path.unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
