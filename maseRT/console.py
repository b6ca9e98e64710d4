"""What a person sees: progress and messages on stderr, results on stdout."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.table import Column, Table
from rich.text import Text

from maseRT.errors import MaseRTError, StepError
from maseRT.progress import Reporter, Silent

T = TypeVar("T")

SCHEMA = 1
"""Version of every JSON object that --json prints."""


class _Results(Console):
    """A console whose reader may leave (`masert ... | head`): the work goes on, in silence."""

    def on_broken_pipe(self) -> None:
        """Stop writing; what is still buffered goes nowhere."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def print(self, *objects: Any, **options: Any) -> None:
        """Print to stdout.

        Raises:
            StepError: it cannot be written, as a file on a full disk.
        """
        try:
            super().print(*objects, **options)
        except OSError as error:
            self.on_broken_pipe()
            what = f"cannot write: {error.strerror or error}"
            raise StepError(what, where="standard output", fix="free space, or send it elsewhere") from error


class _Messages(Console):
    """A console that nobody may be able to read: what it would say decides nothing."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print to stderr, if that can be written."""
        with suppress(OSError):
            super().print(*objects, **options)


_NUMBER = re.compile(r"[-+]?[\d.,]+ ?(%|x|dB|ms|kB|MB|s)?")

out = _Results(highlight=False, soft_wrap=True, width=10_000)  # results are never cut or folded
err = _Messages(stderr=True, highlight=False, soft_wrap=True)


class _PlainHandler(logging.Handler):
    """Messages for a pipe or a file: a line each, never folded."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message."""
        err.print(f"{record.levelname} {self.format(record)}", markup=False, emoji=False)


class _CountColumn(ProgressColumn):
    """How many are done, of how many."""

    def render(self, task: Task) -> Text:
        """Return "3/10", or nothing for a spinner."""
        if task.fields["spinning"]:
            return Text("")
        total = "?" if task.total is None else f"{task.total:.0f}"
        return Text(f"{task.completed:.0f}/{total}", style="progress.download", justify="right")


class _PaceColumn(ProgressColumn):
    """How fast it goes, and how long it still takes; of a spinner, how long it has taken."""

    def render(self, task: Task) -> Text:
        """Return "12.3 batch/s, 0:42 left"."""
        return Text(pace(task), style="progress.remaining")


def pace(task: Task) -> str:
    """Return how fast a task goes and the time left, judged by all the items that it finished."""
    elapsed = task.elapsed or 0.0
    worked = task.fields["worked_seconds"]
    done = task.completed - task.fields["done"]
    if task.fields["spinning"] or not done or not worked:
        return clock(elapsed)
    unit = task.fields["unit"] or "item"
    rate = done / worked
    told = f"{rate:.{0 if rate >= 100 else 1}f} {unit}/s" if rate >= 1 else f"{1 / rate:.1f} s/{unit}"
    if task.total is None:
        return told
    left = (task.total - task.fields["done"]) / rate - elapsed
    return f"{told}, {clock(max(left, 0.0))} left"


def clock(seconds: float) -> str:
    """Return a duration as "0:42" or "1:02:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class RichReporter:
    """Progress bars and spinners on a terminal, one below the other where work holds further work; gone when done."""

    def __init__(self, console: Console = err) -> None:
        """Draw on a console."""
        self._console = console
        self._progress: Progress | None = None
        self._depth = 0

    def track(
        self, items: Iterable[T], *, description: str, total: int | None = None, unit: str = "", done: int = 0
    ) -> Iterator[T]:
        """Yield the items under a progress bar."""
        with self._task(description, total=total, done=done, unit=unit) as (progress, task):
            for item in items:
                yield item
                progress.update(task, advance=1, worked_seconds=progress.tasks[progress.task_ids.index(task)].elapsed)

    @contextmanager
    def spinner(self, description: str) -> Iterator[None]:
        """Show elapsed time while the block runs."""
        with self._task(description, spinning=True):
            yield

    def close(self) -> None:
        """Take down what is still shown, after an error."""
        if self._progress is not None:
            self._progress.stop()
        self._progress, self._depth = None, 0

    @contextmanager
    def _task(
        self, description: str, *, total: int | None = None, done: int = 0, unit: str = "", spinning: bool = False
    ) -> Iterator[tuple[Progress, TaskID]]:
        """Add a line to the display that is there, or begin one: a console can have only one at a time."""
        progress = self._progress = self._progress or self._new()
        task = progress.add_task(
            "  " * self._depth + description,
            total=total,
            completed=done,
            unit=unit,
            done=done,
            worked_seconds=0.0,
            spinning=spinning,
        )
        self._depth += 1
        try:
            yield progress, task
        finally:
            if self._progress is progress:
                progress.remove_task(task)
                self._depth -= 1
                if not progress.tasks:
                    self.close()

    def _new(self) -> Progress:
        line = partial(Column, no_wrap=True)  # on a narrow terminal the bar gives way
        text = TextColumn("{task.description}", markup=False, table_column=line())
        # A terminal that also shows the results must not show them between two frames.
        progress = Progress(
            SpinnerColumn(),
            text,
            BarColumn(bar_width=24),
            _CountColumn(line()),
            _PaceColumn(line()),
            console=self._console,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),
        )
        progress.start()
        return progress


@contextmanager
def reporting(*, quiet: bool) -> Iterator[Reporter]:
    """Yield what shows progress: nothing unless stderr is a terminal that can be drawn on."""
    if quiet or not sys.stderr.isatty() or not err.is_interactive:
        yield Silent()
        return
    reporter = RichReporter()
    try:
        yield reporter
    finally:
        reporter.close()


def set_up_logging(*, verbose: bool = False, quiet: bool = False) -> None:
    """Send the messages of maseRT to stderr."""
    level = logging.DEBUG if verbose else logging.ERROR if quiet else logging.WARNING
    handler: logging.Handler = _PlainHandler()
    if sys.stderr.isatty():
        handler = RichHandler(console=err, show_time=False, show_path=False, markup=False)
    handler.setLevel(level)
    logger = logging.getLogger("maseRT")
    logger.handlers = [handler]
    logger.setLevel(logging.DEBUG)
    logger.propagate = False


@contextmanager
def stdout_for_json() -> Iterator[None]:
    """Send what anybody else writes to stdout in the block to stderr: a user's factory, a library's C++."""
    stdout = sys.stdout
    stdout.flush()
    saved: int | None = None
    with suppress(OSError):  # a process may have neither
        saved = os.dup(1)
        os.dup2(2, 1)
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        sys.stdout = stdout
        if saved is not None:
            os.dup2(saved, 1)
            os.close(saved)


def print_json(command: str, value: Mapping[str, Any]) -> None:
    """Print one JSON object to stdout."""
    print_line(json.dumps({"schema": SCHEMA, "command": command, **value}, default=str))


def print_line(text: str) -> None:
    """Print plain text to stdout as it is."""
    out.print(text, markup=False, emoji=False)


def print_note(text: str) -> None:
    """Print a line to stderr, above a progress bar; also from a signal handler, where that may be impossible."""
    with suppress(RuntimeError):  # the interrupted code was writing to stderr itself
        err.print(text, markup=False)


def print_error(error: MaseRTError) -> None:
    """Print what went wrong, where, and the fix, to stderr."""
    err.print("[bold red]error[/]", end=" ")
    err.print(str(error), markup=False)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows to stdout, the first one as the header; numbers stand to the right. Lines are never folded."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading, *cells in zip(*rows, strict=True):
        numeric = any(cells) and all(_NUMBER.fullmatch(cell) for cell in cells if cell)
        table.add_column(heading, justify="right" if numeric else "left", no_wrap=True)
    for row in rows[1:]:
        table.add_row(*(Text(cell) for cell in row))
    out.print(table)
