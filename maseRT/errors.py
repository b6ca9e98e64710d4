"""Errors that say what happened, where, and how to fix it; each class carries its exit code."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from enum import IntEnum
from typing import Any


class ExitCode(IntEnum):
    """What a `masert` process ends with."""

    DONE = 0
    BUG = 1
    USAGE = 2
    MISSING = 3
    FAILED = 4
    CHECK = 5
    INTERRUPTED = 130
    TERMINATED = 143


class MaseRTError(Exception):
    """Something a user can act on.

    Args:
        what: what went wrong, in one sentence.
        where: the file, key, layer or step it concerns.
        fix: what to do about it.
    """

    exit_code = ExitCode.FAILED

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        super().__init__(what, where, fix)
        self.what = what
        self.where = where
        self.fix = fix

    def __reduce__(self) -> tuple[Any, ...]:
        """Let it cross to another process as it is; pickling would call the class with `args` alone."""
        return _restored, (type(self), self.args, dict(self.__dict__))

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.fix:
            lines.append(f"fix: {self.fix}")
        return "\n".join(lines)


def _restored(kind: type[MaseRTError], args: tuple[Any, ...], state: dict[str, Any]) -> MaseRTError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class UsageError(MaseRTError):
    """A command line, config, model or data set that cannot be used as given."""

    exit_code = ExitCode.USAGE


class ConfigError(UsageError):
    """Every mistake of one config file, shown together."""

    def __init__(self, problems: Sequence[str], *, where: str) -> None:
        self.problems = tuple(problems)
        count = f"{len(problems)} problems" if len(problems) > 1 else "1 problem"
        super().__init__("\n".join([f"{count} in the config", *(f"  {p}" for p in problems)]), where=where)


class MissingError(MaseRTError):
    """A package, device or file that this machine does not have."""

    exit_code = ExitCode.MISSING


class StepError(MaseRTError):
    """A step that started and could not finish."""

    exit_code = ExitCode.FAILED


class CheckError(MaseRTError):
    """A result that is not what was asked for."""

    exit_code = ExitCode.CHECK


def did_you_mean(word: str, valid: Sequence[str], *, listed: bool = True) -> str:
    """Return `; did you mean 'x'?` for the nearest valid spelling, else the list of valid ones, unless that is long."""
    near = get_close_matches(word, valid, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; valid: {', '.join(valid)}" if listed and valid else ""


def shortened(names: Sequence[str], most: int = 8) -> str:
    """Join names for a message; beyond the first ones they are counted."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
