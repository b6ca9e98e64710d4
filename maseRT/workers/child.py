"""The other end of `maseRT.workers.process`: serves one `LocalWorker` until the parent closes it or dies."""

from __future__ import annotations

import faulthandler
import logging
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from maseRT.errors import MaseRTError, StepError
from maseRT.runtimes.base import Session
from maseRT.workers.local import LocalWorker


@dataclass(frozen=True)
class Task:
    """What the worker is for; the parent's first message.

    Attributes:
        opener: pickled, so that what its module imports is counted as the row's memory.
    """

    name: str
    opener: bytes
    device: str


@dataclass(frozen=True)
class Call:
    """A method of the worker; None in its place ends the process."""

    method: str
    args: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What a call gave.

    Attributes:
        error: in place of a value.
        logged: what was logged meanwhile: logger, level and message.
    """

    value: Any = None
    error: MaseRTError | None = None
    logged: tuple[tuple[str, int, str], ...] = ()


def main() -> None:
    """Serve the connection whose descriptor is the last argument.

    Ctrl-C reaches the whole process group: it is the parent's to act on. Standard input ends when the parent does,
    whatever ended it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    threading.Thread(target=_end_with_parent, args=(_take_input(),), daemon=True).start()
    descriptor = int(sys.argv[-1])
    os.set_inheritable(descriptor, False)
    records = _Records()
    logging.getLogger("maseRT").addHandler(records)
    with Connection(descriptor) as connection:
        try:
            serve(connection, records)
        except (EOFError, OSError):  # the parent is gone
            os._exit(1)


def serve(connection: Connection[Any, Any], records: _Records) -> None:
    """Answer calls until there are no more."""
    task: Task = connection.recv()
    with LocalWorker(task.name, _Unpickled(task.opener), device=task.device) as worker:
        while (call := connection.recv()) is not None:
            answer = _answered(worker, call, records)
            try:
                connection.send(answer)
            except (pickle.PicklingError, TypeError, AttributeError) as error:
                told = StepError(f"its answer cannot leave the process: {error}", where=task.name)
                connection.send(Answer(error=told))


def _answered(worker: LocalWorker, call: Call, records: _Records) -> Answer:
    try:
        value = getattr(worker, call.method)(*call.args, **call.options)
    except MaseRTError as error:
        traceback.print_exc()
        sys.stderr.flush()
        return Answer(error=error, logged=records.take())
    return Answer(value, logged=records.take())


class _Unpickled:
    """An opener that is unpickled when it is called."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def __call__(self) -> Session:
        opener: Callable[[], Session] = pickle.loads(self._content)
        return opener()


class _Records(logging.Handler):
    """Keeps what is logged for the next answer."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._kept: list[tuple[str, int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._kept.append((record.name, record.levelno, record.getMessage()))

    def take(self) -> tuple[tuple[str, int, str], ...]:
        taken, self._kept = tuple(self._kept), []
        return taken


def _take_input() -> int:
    """Return standard input under another descriptor; whoever reads the usual one finds it empty."""
    taken = os.dup(0)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    return taken


def _end_with_parent(descriptor: int) -> None:
    while os.read(descriptor, 1):
        pass
    os._exit(1)
