"""Reads a config: a TOML file, with values overridden on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli
from pydantic import ValidationError

from maseRT.config import Config
from maseRT.config_errors import problems_from_validation
from maseRT.errors import ConfigError, UsageError


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read and validate a TOML file; all its mistakes are reported at once, each with the nearest valid spelling.

    Args:
        path: the file.
        overrides: `section.key=value` strings, each value in TOML (a bare word is a string).

    Raises:
        UsageError: the file is missing, unreadable or not TOML.
        ConfigError: it has mistakes; holds all of them.
    """
    document = _read_toml(path)
    for override in overrides:
        _apply_override(document, override)
    try:
        return Config.model_validate(document)
    except ValidationError as error:
        raise ConfigError(problems_from_validation(error, Config), where=str(path)) from error


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return _toml(path.read_text(encoding="utf-8-sig"), where=str(path))
    except FileNotFoundError:
        raise UsageError(
            "no such config file", where=str(path), fix="check the path, or write one with `masert init`"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the config: {error}", where=str(path)) from error
    except tomli.TOMLDecodeError as error:
        where = f"{path}, line {error.lineno}, column {error.colno}"
        raise UsageError(f"not TOML: {error.msg}", where=where, fix="correct that line") from error


def _toml(text: str, *, where: str) -> dict[str, Any]:
    try:
        return tomli.loads(text)
    except tomli.TOMLDecodeError:
        raise
    except (RecursionError, ValueError) as error:  # hundreds of brackets, numbers of thousands of digits
        raise UsageError(f"cannot be read: {error}", where=where) from error


def _apply_override(document: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise UsageError(
            f"'{override}' is not section.key=value", where="--set", fix="for example --set data.batch_size=32"
        )
    try:
        value = _toml(f"value = {text}", where=f"--set {key}")["value"]
    except tomli.TOMLDecodeError as error:
        if text.lstrip()[:1] in ("[", "{"):  # a shell takes the quotes away
            fix = f"put it into single quotes, which keep the double ones from the shell: --set '{key}=...'"
            raise UsageError(f"{text} is not TOML: {error.msg}", where=f"--set {key}", fix=fix) from error
        value = text
    table = document
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise UsageError(f"'{part}' is not a section", where=f"--set {override}")
    table[parts[-1]] = value
