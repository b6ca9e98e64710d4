"""What learning leaves after each epoch, and calibration after each method, so that a run that was stopped goes on."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from maseRT.checkpoints import load_tensors, save_tensors
from maseRT.errors import StepError

log = logging.getLogger(__name__)

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
