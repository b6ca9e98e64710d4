"""How a command can end: its exit code, what --json shows, and the message for a person."""

from __future__ import annotations

import errno
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from maseRT import __version__
from maseRT.errors import ExitCode, MaseRTError, MissingError, StepError, UsageError

_FIXES = {
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "give permission, or choose another place"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free space, or choose another place"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE, errno.ENOMEM), "free what has run out, and try again"),
    errno.EIO: "check the disk",
}
"""Errors of the machine, such as a full disk: no bug in maseRT, wherever they occur."""


_NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"
"""What torch says, in a RuntimeError like any other; on a GPU it has an OutOfMemoryError."""


@dataclass(frozen=True)
class Ending:
    """How a command ended.

    Attributes:
        code: the exit code.
        value: the command's result in plain values, for --json.
        described: the error in plain values, for --json.
        tell: prints the error for a person.
    """

    code: int = ExitCode.DONE
    value: Mapping[str, Any] = field(default_factory=dict)
    described: Mapping[str, str] | None = None
    tell: Callable[[], None] | None = None


def interrupted() -> Ending:
    """Return the ending of a command that Ctrl-C stopped."""
    return _stopped("interrupted; what was done is kept", ExitCode.INTERRUPTED)


def terminated() -> Ending:
    """Return the ending of a command that SIGTERM stopped."""
    return _stopped("terminated; what was done is kept", ExitCode.TERMINATED)


def _stopped(what: str, code: ExitCode) -> Ending:
    return Ending(code, described=_description(what), tell=lambda: typer.echo(what, err=True))


def raised(error: Exception, name: str) -> Ending:
    """Return the ending of a command that raised an error.

    Args:
        error: raised by maseRT, by the machine, by typer for a command line that it cannot parse, or by a bug.
        name: the command's, "" if none was given.
    """
    if isinstance(error, MaseRTError):
        return failed(error)
    if isinstance(error, OSError) and error.errno in _FIXES:
        where = str(error.filename) if error.filename is not None else ""
        return failed(StepError(error.strerror or str(error), where=where, fix=_FIXES[error.errno]))
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _NO_MEMORY in str(error):
        return failed(StepError(f"out of memory: {error}", fix="choose smaller batches"))
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("maseRT"):
        fix = "install what maseRT needs: `masert doctor` lists it"
        return failed(MissingError(f"the Python module '{error.name}' is not installed", fix=fix))
    if hasattr(error, "format_message"):
        return _misused(error, name)
    return _crashed(error, name)


def failed(error: MaseRTError, value: Mapping[str, Any] | None = None) -> Ending:
    """Return the ending of a command with an error of maseRT's, and the result that it has in spite of it."""

    def tell() -> None:
        from maseRT.console import print_error

        print_error(error)

    described = _description(error.what, error.where, error.fix)
    return Ending(int(error.exit_code), value or {}, described, tell)


def _misused(error: Any, name: str) -> Ending:
    """Return the ending for a command line that typer cannot parse."""
    message = error.format_message()
    if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help, empty if that is printed already
        return Ending(ExitCode.USAGE, tell=lambda: typer.echo(message, nl=bool(message)))
    command = f"masert {name}".rstrip()
    return failed(UsageError(message, where=command, fix=f"see `{command} --help`"))


def _crashed(error: Exception, name: str) -> Ending:
    what = f"internal error, a bug in maseRT: {type(error).__name__}: {error}"
    try:
        details = f"details: {_write_crash(name)}"
    except OSError as unwritable:
        details = f"details could not be written: {unwritable}"
    return Ending(ExitCode.BUG, {}, _description(what, fix=details), lambda: typer.echo(f"{what}\n{details}", err=True))


def _write_crash(name: str) -> Path:
    handle, path = tempfile.mkstemp(prefix=f"masert-{name or 'command'}-", suffix=".log")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(f"masert {__version__} {sys.argv[1:]}\n{traceback.format_exc()}")
    logging.getLogger("maseRT").debug("crash log in %s", path)
    return Path(path)


def _description(what: str, where: str = "", fix: str = "") -> dict[str, str]:
    return {"what": what, "where": where, "fix": fix}
