"""What a step leaves after each unit of its work, so that one that was stopped goes on from there."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from maseRT.checkpoints import load_tensors, save_tensors
from maseRT.errors import StepError
from maseRT.interrupts import finishing
from maseRT.records import sha256

log = logging.getLogger(__name__)

T = TypeVar("T")

Entries = list[dict[str, Any]]


def save_progress(
    path: Path, tensors: Mapping[str, Tensor], *, key: Mapping[str, str], history: Sequence[Mapping[str, Any]]
) -> None:
    """Write the state after a unit of work in one piece.

    Args:
        path: the file.
        tensors: such as those of the optimizer.
        key: everything that the result depends on.
        history: what is known of each finished unit, in plain values.
    """
    metadata = {"key": json.dumps(key, sort_keys=True), "history": json.dumps([dict(entry) for entry in history])}
    save_tensors(path, tensors, metadata)


def load_progress(
    path: Path, *, key: Mapping[str, str], work: str, made_by: str
) -> tuple[dict[str, Tensor], Entries] | None:
    """Return the tensors and the history of unfinished work of the same key; None, and a warning, of other work.

    Args:
        path: the file; it may be missing.
        key: everything that the result depends on.
        work: what was not finished, in words.
        made_by: the step.
    """
    if not path.exists():
        return None
    try:
        tensors, metadata = load_tensors(path, made_by=made_by)
        if "key" not in metadata:  # of finished work
            return None
        if metadata["key"] != json.dumps(key, sort_keys=True):
            log.warning("the unfinished %s was started with another plan, config or data; starting over", work)
            return None
        history: Entries = json.loads(metadata["history"])
    except (StepError, KeyError, ValueError) as error:
        log.warning("cannot resume: %s; starting over", error)
        return None
    return tensors, history


class Finished:
    """The units of a step that are finished, with what they told, in a file that lasts until all of the step is.

    Args:
        path: the file.
        key: everything that the result depends on.
        step: whose units they are.
    """

    def __init__(self, path: Path, *, key: Mapping[str, str], step: str) -> None:
        self._path, self._key = path, dict(key)
        found = load_progress(path, key=key, work=step, made_by=step)
        self._told: dict[str, Any] = {entry["unit"]: entry["told"] for entry in found[1]} if found else {}

    def get(self, unit: str) -> Any:
        """Return what a finished unit told; None where it is not finished."""
        return self._told.get(unit)

    def add(self, unit: str, told: Any) -> None:
        """Keep what a unit told, in values that JSON has."""
        self._told[unit] = told
        save_progress(self._path, {}, key=self._key, history=[{"unit": u, "told": t} for u, t in self._told.items()])

    def once(self, unit: str, file: Path, make: Callable[[], T]) -> T:
        """Let `make` write a file, and return what it tells; neither is done again while the file is what it was.

        Args:
            unit: what it is called; Ctrl-C waits for it.
            file: that `make` writes.
            make: returns values that JSON has.
        """
        kept = self.get(unit)
        if kept is not None and file.exists() and sha256(file) == kept["sha256"]:
            log.warning("%s was finished before", unit)
            told: T = kept["told"]
            return told
        with finishing(unit):
            told = make()
            self.add(unit, {"sha256": sha256(file), "told": told})
        return told

    def clear(self) -> None:
        """Forget everything: the step is done."""
        self._path.unlink(missing_ok=True)
