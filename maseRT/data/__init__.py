"""Data sets: one table of names, the same split on every run, loaders, and checks of what was read.

The names below are loaded on first use: importing this package imports neither torch nor numpy, and
`data_files` (what a step key covers) never does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maseRT.data.checks import check_data, extreme_ids, labels_of
    from maseRT.data.files import SOURCES, data_files
    from maseRT.data.loading import calibration_subset, load_data, loader
    from maseRT.data.splits import Splits

_HOME = {
    "SOURCES": "files",
    "Splits": "splits",
    "calibration_subset": "loading",
    "check_data": "checks",
    "data_files": "files",
    "extreme_ids": "checks",
    "labels_of": "checks",
    "load_data": "loading",
    "loader": "loading",
}

__all__ = [
    "SOURCES",
    "Splits",
    "calibration_subset",
    "check_data",
    "data_files",
    "extreme_ids",
    "labels_of",
    "load_data",
    "loader",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
