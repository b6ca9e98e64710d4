"""SIGTERM, as CI systems send it: the command cleans up and ends, whatever swallows the exception that says so."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from maseRT.errors import ExitCode

_PATIENCE_SECONDS = 1.0
_TIMES = 8


class Termination:
    """The handler of SIGTERM: raises SystemExit, and a second later again if the command has not ended.

    Once may not be enough: `__del__` and callbacks of C code drop an exception, an import of C code turns it into an
    ImportError, and those of optional packages are caught. More often than that it would disturb the cleaning up, so
    that it does not matter how many SIGTERM come. Where Python has no turn any more, the process just ends.
    """

    def __init__(self) -> None:
        self._asked = False
        self._due = True
        self._ended = False
        self._lock = threading.Lock()

    @property
    def asked(self) -> bool:
        """Whether SIGTERM came: any exception that comes later may be what became of it."""
        return self._asked

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle SIGTERM, in the main thread."""
        if self._ended or not self._due:
            return
        self._due = False
        if not self._asked:
            self._asked = True
            self._insist_later(_TIMES)
        raise SystemExit(ExitCode.TERMINATED)

    def end(self) -> None:
        """From now on there is nothing to stop: what came of the command is being told."""
        with self._lock:
            self._ended = True

    def _insist_later(self, times: int) -> None:
        timer = threading.Timer(_PATIENCE_SECONDS, self._insist, (times,))
        timer.daemon = True
        timer.start()

    def _insist(self, times: int) -> None:
        with self._lock:
            if self._ended:
                return
            if not times:
                os._exit(ExitCode.TERMINATED)
            self._due = True
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        self._insist_later(times - 1)


@contextmanager
def terminable() -> Iterator[Termination]:
    """Handle SIGTERM while the block runs; in the main thread, others get none.

    If it came, any more of it is ignored from then on: the process is about to end, with the code for that.
    """
    termination = Termination()
    if threading.current_thread() is not threading.main_thread():
        yield termination
        return
    previous = signal.signal(signal.SIGTERM, termination)
    try:
        yield termination
    finally:
        termination.end()
        signal.signal(signal.SIGTERM, signal.SIG_IGN if termination.asked else previous)
