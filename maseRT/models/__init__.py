"""Models: the zoo, users' own factories, other packages' models, and checkpoints. Imported lazily."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maseRT.models.build import build_model
    from maseRT.models.check import check_model
    from maseRT.models.checkpoint import Checkpoint, load_checkpoint
    from maseRT.models.weights import fit_names, load_weights
    from maseRT.models.zoo import ZOO, ZooEntry

__all__ = [
    "ZOO",
    "Checkpoint",
    "ZooEntry",
    "build_model",
    "check_model",
    "fit_names",
    "load_checkpoint",
    "load_weights",
]

_HOMES = {
    "ZOO": "zoo",
    "Checkpoint": "checkpoint",
    "ZooEntry": "zoo",
    "build_model": "build",
    "check_model": "check",
    "fit_names": "weights",
    "load_checkpoint": "checkpoint",
    "load_weights": "weights",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
