"""What all commands share: signal handling, exit codes, error messages, and the JSON object of --json."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from maseRT import interrupts
from maseRT.cli_endings import Ending, failed, interrupted, raised, terminated
from maseRT.errors import ExitCode, MaseRTError
from maseRT.termination import Termination, terminable


@dataclass(frozen=True)
class Reply:
    """What a command returns.

    Attributes:
        value: plain values for --json.
        error: the reason for another exit code than 0 although the command completed, such as a failed gate.
    """

    value: Mapping[str, Any] = field(default_factory=dict)
    error: MaseRTError | None = None


class CommandLine(TyperGroup):
    """The group of all commands. A command returns a `Reply` or raises; only this class prints JSON and exits."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> NoReturn:
        """Run a command and exit with a documented code, never with a traceback."""
        arguments = list(sys.argv[1:] if args is None else args)
        name = next((each for each in arguments if each in self.commands), "")
        as_json = "--json" in arguments and "--help" not in arguments

        def run() -> Any:
            return super(CommandLine, self).main(arguments, "masert", complete_var, False, windows_expand_args, **extra)

        with terminable() as termination:
            ending = interrupted()
            try:
                with interrupts.listening(note) as listener, _own_stdout() if as_json else nullcontext():
                    ending = _ended(run, name, listener, termination)
            except KeyboardInterrupt:  # raised just before the command began, or after it ended
                ending = interrupted()
            except SystemExit:
                if not termination.asked:
                    raise
                ending = terminated()
            termination.end()
            if as_json:
                ending = _answered(name, ending)
            if ending.tell:
                with suppress(OSError):  # stderr is closed or full
                    ending.tell()
        sys.exit(ending.code)

    def invoke(self, ctx: Any) -> Any:
        """Run the named command, with warnings on stderr."""
        from maseRT.console import set_up_logging

        set_up_logging()
        return super().invoke(ctx)


def _ended(run: Callable[[], Any], name: str, listener: interrupts.Listener, termination: Termination) -> Ending:
    """Run a command and return how it ended, whatever it raised."""
    try:
        found = run()
        if termination.asked:
            return terminated()
        if listener.asked or found == ExitCode.INTERRUPTED:  # typer returns this after a KeyboardInterrupt
            return interrupted()
        if isinstance(found, Reply):
            return Ending(value=found.value) if found.error is None else failed(found.error, found.value)
        return Ending(found if isinstance(found, int) else ExitCode.DONE)
    except (KeyboardInterrupt, typer.Abort):
        return interrupted()
    except SystemExit as error:
        if error.code != ExitCode.TERMINATED:
            raise
        return terminated()
    except Exception as error:
        if termination.asked:  # the SystemExit may have become another error, such as an ImportError
            return terminated()
        if listener.raised:  # so may a KeyboardInterrupt
            return interrupted()
        return raised(error, name)
    finally:
        listener.end()


def _answered(name: str, ending: Ending) -> Ending:
    """Print the JSON object; return how the command ends, which is a failure if it cannot be written."""
    from maseRT.console import print_json

    failure = {"error": ending.described, "exit_code": int(ending.code)} if ending.described else {}
    try:
        print_json(name, {**ending.value, **failure})
    except MaseRTError as error:
        return failed(error)
    return ending


def note(text: str) -> None:
    """Print a line from a signal handler; it must not import the console, as that import may be what it interrupted."""
    console = sys.modules.get("maseRT.console")
    show: Callable[[str], None] = getattr(console, "print_note", lambda line: typer.echo(line, err=True))
    show(text)


def set_up_streams() -> None:
    """Make stdin, stdout and stderr usable: open on /dev/null what the process was started without (`masert ... >&-`).

    Otherwise the next file that is opened gets such a descriptor, and what a library prints is written to that file.
    What stdout has no character for, in a path or a name, is escaped there, as on stderr.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # the lowest free descriptor is this one, so it is what open returns
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def _own_stdout() -> Iterator[None]:
    from maseRT.console import stdout_for_json

    with stdout_for_json():
        yield
