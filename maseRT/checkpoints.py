"""Safetensors files with their descriptions: weights, ranges, optimizer state. Nothing here is a pickle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from maseRT.errors import StepError
from maseRT.workspace import atomic_path


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors in one piece. Tensors that share memory are stored once per name."""
    with atomic_path(path) as temporary:
        whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        try:
            save_file(whole, temporary, dict(metadata or {}))
        except SafetensorError as error:  # its I/O errors are not OSErrors
            raise OSError(str(error)) from error


def load_tensors(path: Path, *, made_by: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and their description.

    Raises:
        StepError: the file is missing or damaged; names the command that makes it.
    """
    fix = f"rebuild it with `masert {made_by} --config ... --force`"
    if not path.exists():
        raise StepError("missing", where=str(path), fix=fix)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise StepError(f"damaged: {error}", where=str(path), fix=fix) from error


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's per-parameter state as flat tensors, "INDEX.NAME" -> value."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": value if isinstance(value, Tensor) else torch.tensor(value)
        for index, entries in state.items()
        for name, value in entries.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Load what `flatten_optimizer` returned into a fresh optimizer of the same model."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
