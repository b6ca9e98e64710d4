"""What a person sees: progress and messages on stderr, results on stdout."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from maseRT.errors import MaseRTError

T = TypeVar("T")

SCHEMA = 1
"""Version of every JSON object that --json prints."""


class _PipeConsole(Console):
    """A console whose reader may leave (`masert ... | head`): the work goes on, in silence."""

    def on_broken_pipe(self) -> None:
        """Stop writing; what is still buffered goes nowhere."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


_NUMBER = re.compile(r"[-+]?[\d.,]+ ?(%|x|dB|ms|kB|MB|s)?")

out = _PipeConsole(highlight=False, soft_wrap=True, width=10_000)  # results are never cut or folded
err = Console(stderr=True, highlight=False, soft_wrap=True)


class RichReporter:
    """Progress bars and spinners on a terminal's stderr, gone when they are done."""

    def track(self, items: Iterable[T], *, description: str, total: int | None = None) -> Iterator[T]:
        """Yield the items under a progress bar."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=err, transient=True) as progress:
            yield from progress.track(items, description=description, total=total)

    @contextmanager
    def spinner(self, description: str) -> Iterator[None]:
        """Show elapsed time while the block runs."""
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=err, transient=True) as progress:
            progress.add_task(description, total=None)
            yield


def set_up_logging(*, verbose: bool, quiet: bool) -> None:
    """Send the messages of maseRT to stderr."""
    level = logging.DEBUG if verbose else logging.ERROR if quiet else logging.WARNING
    handler = RichHandler(console=err, show_time=False, show_path=False, markup=False)
    handler.setLevel(level)
    logger = logging.getLogger("maseRT")
    logger.handlers = [handler]
    logger.setLevel(logging.DEBUG)
    logger.propagate = False


def print_json(command: str, value: Mapping[str, Any]) -> None:
    """Print one JSON object to stdout."""
    print_line(json.dumps({"schema": SCHEMA, "command": command, **value}, default=str))


def print_line(text: str) -> None:
    """Print plain text to stdout as it is."""
    out.print(text, markup=False, emoji=False)


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
