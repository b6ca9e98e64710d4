"""A new config file, every option of it explained by the section that reads it."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomlkit
from pydantic import BaseModel
from tomlkit.items import Table

from maseRT.config import Config
from maseRT.errors import UsageError
from maseRT.workspace import write_text

CHOSEN: dict[str, dict[str, Any]] = {
    "run": {"seed": 0},
    "model": {},
    "data": {"batch_size": 64},
    "train": {"epochs": 10, "learning_rate": 1e-3},
    "quantize": {"precision": "int8"},
    "calibrate": {"batches": 10},
    "finetune": {"epochs": 2, "initial_learning_rate": 1e-5},
    "export": {},
    "build-engine": {},
    "analyze": {"runtimes": ["torch", "onnxruntime"]},
}
"""What a new config sets; every other option of a section stands in a comment."""


def write_config(path: Path, *, model: str, data: str, overwrite: bool = False) -> None:
    """Write a commented config.

    Raises:
        UsageError: the file is there already.
    """
    if path.exists() and not overwrite:
        raise UsageError("is there already", where=str(path), fix="choose another --file, or overwrite it with --force")
    write_text(path, config_text(path.name, model=model, data=data))


def config_text(name: str, *, model: str, data: str) -> str:
    """Return a config as TOML."""
    document = tomlkit.document()
    document.add(tomlkit.comment(f"masert transform --config {name}"))
    chosen = {**CHOSEN, "model": {"name": model}, "data": {"name": data, **CHOSEN["data"]}}
    fields = {field.alias or key: field for key, field in Config.model_fields.items()}
    for key, values in chosen.items():
        document.add(tomlkit.nl())
        document.add(key, _table(_section(fields[key].annotation), values))
    return tomlkit.dumps(document)


def _table(section: type[BaseModel], values: dict[str, Any]) -> Table:
    table = tomlkit.table()
    if section.__doc__:
        table.comment(section.__doc__.split(": ", 1)[-1].splitlines()[0].rstrip("."))
    for name, field in section.model_fields.items():
        if name in values:
            table.add(name, values[name])
            if field.description:
                table[name].comment(field.description)
        else:
            shown = _literal(field.get_default(call_default_factory=True))
            table.add(tomlkit.comment(f"{name} = {shown}" + (f"  # {field.description}" if field.description else "")))
    return table


def _literal(value: Any) -> str:
    """Return a default as TOML; "..." where there is none."""
    match value:
        case None:
            return "..."
        case enum.Enum():
            return f'"{value.value}"'
        case BaseModel():
            inner = (f"{key} = {_literal(entry)}" for key, entry in value)
            return "{ " + ", ".join(inner) + " }"
        case bool():
            return str(value).lower()
        case str():
            return f'"{value}"'
        case Sequence():
            return "[" + ", ".join(_literal(entry) for entry in value) + "]"
        case dict():
            return "{}"
        case _:
            return str(value)


def _section(annotation: Any) -> type[BaseModel]:
    """Return the section class of a field that may be optional."""
    options = getattr(annotation, "__args__", (annotation,))
    found: type[BaseModel] = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return found
