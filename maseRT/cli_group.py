"""How every command begins and ends: signals, exit codes, errors in words, and the one object of --json."""

from __future__ import annotations

import errno
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from maseRT import __version__, interrupts
from maseRT.errors import ExitCode, MaseRTError, StepError, UsageError
from maseRT.termination import Termination, terminable

_MACHINES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""What the machine has run out of is no bug in maseRT."""


@dataclass(frozen=True)
class Reply:
    """What a command returns.

    Attributes:
        value: plain values for --json.
        error: why it does not end with 0 although there is a value, as when a gate failed.
    """

    value: Mapping[str, Any] = field(default_factory=dict)
    error: MaseRTError | None = None


@dataclass(frozen=True)
class _Ending:
    """The end of a command.

    Attributes:
        value: for --json.
        described: the error, for --json.
        tell: shows the error to a person.
    """

    code: int = ExitCode.DONE
    value: Mapping[str, Any] = field(default_factory=dict)
    described: Mapping[str, str] | None = None
    tell: Callable[[], None] | None = None


class CommandLine(TyperGroup):
    """The group of all commands. They return a `Reply`, or raise; none of them prints JSON, or exits."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> NoReturn:
        """Run a command and exit with its documented code, without a traceback."""
        arguments = list(sys.argv[1:] if args is None else args)
        name = next((each for each in arguments if each in self.commands), "")
        as_json = "--json" in arguments and "--help" not in arguments

        def run() -> Any:
            return super(CommandLine, self).main(arguments, "masert", complete_var, False, windows_expand_args, **extra)

        with terminable() as termination:
            ending = _interrupted()
            try:
                with interrupts.listening(note) as listener, _own_stdout() if as_json else nullcontext():
                    ending = _ended(run, name, listener, termination)
            except KeyboardInterrupt:  # one that came in the very moment in which the command began or ended
                ending = _interrupted()
            except SystemExit:
                if not termination.asked:
                    raise
                ending = _terminated()
            termination.end()
            if as_json:
                ending = _answered(name, ending)
            if ending.tell:
                with suppress(OSError):  # nobody can be told
                    ending.tell()
        sys.exit(ending.code)

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was named, with its warnings on stderr."""
        from maseRT.console import set_up_logging

        set_up_logging()
        return super().invoke(ctx)


def _ended(run: Callable[[], Any], name: str, listener: interrupts.Listener, termination: Termination) -> _Ending:
    """Run a command, and turn every way it can end into one."""
    try:
        found = run()
        if termination.asked:
            return _terminated()
        if listener.asked or found == ExitCode.INTERRUPTED:  # typer's own word for it
            return _interrupted()
        if isinstance(found, Reply):
            return _Ending(value=found.value) if found.error is None else _failed(found.error, found.value)
        return _Ending(found if isinstance(found, int) else ExitCode.DONE)
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except SystemExit as error:
        if error.code != ExitCode.TERMINATED:
            raise
        return _terminated()
    except Exception as error:
        if termination.asked:  # what became of the SystemExit on its way, such as an ImportError
            return _terminated()
        if listener.raised:  # and of a KeyboardInterrupt
            return _interrupted()
        if isinstance(error, MaseRTError):
            return _failed(error)
        if isinstance(error, OSError) and error.errno in _MACHINES:
            return _failed(_machines(error))
        if hasattr(error, "format_message"):
            return _misused(error, name)
        return _crashed(error, name)
    finally:
        listener.end()


def _failed(error: MaseRTError, value: Mapping[str, Any] | None = None) -> _Ending:
    def tell() -> None:
        from maseRT.console import print_error

        print_error(error)

    described = _description(error.what, error.where, error.fix)
    return _Ending(int(error.exit_code), value or {}, described, tell)


def _misused(error: Any, name: str) -> _Ending:
    """Describe a command line that cannot be parsed."""
    message = error.format_message()
    if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help, which may be printed already
        return _Ending(ExitCode.USAGE, tell=lambda: typer.echo(message, nl=bool(message)))
    command = f"masert {name}".rstrip()
    return _failed(UsageError(message, where=command, fix=f"see `{command} --help`"))


def _interrupted() -> _Ending:
    described = _description("interrupted; what was done is kept")
    return _Ending(ExitCode.INTERRUPTED, described=described, tell=lambda: typer.echo(described["what"], err=True))


def _terminated() -> _Ending:
    described = _description("terminated; what was done is kept")
    return _Ending(ExitCode.TERMINATED, described=described, tell=lambda: typer.echo(described["what"], err=True))


def _machines(error: OSError) -> StepError:
    """Describe an error that is the machine's, wherever it comes up."""
    where = str(error.filename) if error.filename is not None else ""
    return StepError(error.strerror or str(error), where=where, fix="free what has run out, and try again")


def _crashed(error: Exception, name: str) -> _Ending:
    path = _write_crash(name)
    what = f"internal error, a bug in maseRT: {type(error).__name__}: {error}"
    described = _description(what, fix=f"details: {path}")
    return _Ending(ExitCode.BUG, {}, described, lambda: typer.echo(f"{what}\ndetails: {path}", err=True))


def _description(what: str, where: str = "", fix: str = "") -> dict[str, str]:
    return {"what": what, "where": where, "fix": fix}


def _answered(name: str, ending: _Ending) -> _Ending:
    """Print the object; return how the command ends after that."""
    from maseRT.console import print_json

    failure = {"error": ending.described, "exit_code": int(ending.code)} if ending.described else {}
    try:
        print_json(name, {**ending.value, **failure})
    except MaseRTError as error:
        return _failed(error)
    return ending


def note(text: str) -> None:
    """Show a line while a signal is handled, which may be in the middle of importing the console."""
    console = sys.modules.get("maseRT.console")
    show: Callable[[str], None] = getattr(console, "print_note", lambda line: typer.echo(line, err=True))
    show(text)


def open_standard_streams() -> None:
    """Open those of the three that the process was started without (`masert ... >&-`), on nothing.

    Else the next file that is opened gets such a descriptor, and what a library prints ends up in it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # it is the lowest one free, so this opens it
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))


@contextmanager
def _own_stdout() -> Iterator[None]:
    from maseRT.console import stdout_for_json

    with stdout_for_json():
        yield


def _write_crash(name: str) -> Path:
    handle, path = tempfile.mkstemp(prefix=f"masert-{name or 'command'}-", suffix=".log")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(f"masert {__version__} {sys.argv[1:]}\n{traceback.format_exc()}")
    logging.getLogger("maseRT").debug("crash log in %s", path)
    return Path(path)
