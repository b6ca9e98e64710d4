"""Ctrl-C: the first one waits for what must not be cut in two, the second one does not.

A step declares its units (`with finishing("epoch 3 of 10"):`), the command line listens (`with listening(tell):`).
Where nobody listens (a library, a worker) Ctrl-C does what it always does in Python, and a unit means nothing.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from maseRT.errors import ExitCode

_NUDGE_SECONDS = 0.05
_PATIENCE_SECONDS = 3.0
_IMPORTING = "<frozen importlib."


class Listener:
    """The handler of SIGINT.

    Outside of units the first Ctrl-C raises KeyboardInterrupt, but never in the middle of an import: C code there may
    swallow it or turn it into an ImportError, so it is raised when the import is over. The second one raises at once,
    wherever that is. Where Python has no turn, because a library's own code runs, the second one ends the process.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        """Say with `tell` what is waited for."""
        self.previous_hook = sys.unraisablehook
        self._tell = tell
        self._units: list[str] = []
        self._handled = 0
        self._arrived = 0
        self._nudges = 0
        self._nudges_handled = 0
        self._raised = False
        self._over = False

    @property
    def asked(self) -> int:
        """How often a person asked; Python calls the handler once for several signals that came while it was busy."""
        return max(self._handled, self._arrived - self._nudges)

    @property
    def raised(self) -> bool:
        """Whether KeyboardInterrupt was raised: any exception that comes later may be what became of it."""
        return self._raised

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle SIGINT, in the main thread."""
        nudged = self._nudges > self._nudges_handled
        self._nudges_handled = self._nudges
        if nudged and (self._raised or self._over):
            return
        if self._over:
            os._exit(ExitCode.INTERRUPTED)
        self._handled += not nudged
        waits_for = self._units[0] if self._units else "an import" if _importing(frame) else ""
        if self.asked > 1 or not waits_for:
            self._raise()
        if not nudged:
            self._tell(f"finishing {waits_for}; Ctrl-C again stops at once")
        if not self._units:
            self._nudge_soon()

    def enter(self, unit: str) -> None:
        """Begin a unit, unless an interrupt waits."""
        if self.asked and not self._units:
            self._raise()
        self._units.append(unit)

    def leave(self) -> None:
        """End a unit."""
        self._units.pop()

    def check(self) -> None:
        """Raise the interrupt that waited for the outermost unit.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed, and no unit is open.
        """
        if self.asked and not self._units:
            self._raise()

    def end(self) -> None:
        """From now on there is nothing to finish or clean up: another Ctrl-C ends the process."""
        self._over = True

    def _raise(self) -> None:
        self._raised = True
        raise KeyboardInterrupt

    def _nudge_soon(self) -> None:
        """Have the handler called again when no import runs."""
        threading.Thread(target=self._nudge, daemon=True).start()

    def _nudge(self) -> None:
        main = threading.main_thread().ident or 0
        time.sleep(_NUDGE_SECONDS)
        while _importing(sys._current_frames().get(main)):
            time.sleep(_NUDGE_SECONDS)
        if not self._over and _listener() is self:
            self._nudges += 1
            signal.pthread_kill(main, signal.SIGINT)

    def lost(self, unraisable: sys.UnraisableHookArgs) -> None:
        """Raise a KeyboardInterrupt again that nobody could receive, as in `__del__`; other exceptions are told."""
        if unraisable.exc_type is KeyboardInterrupt:
            self._raised = False
            self._nudge_soon()
        else:
            self.previous_hook(unraisable)

    def watch(self, signals: socket.socket) -> None:
        """Count the signals as they arrive, in a thread of its own: also while Python has no turn."""
        with signals:
            while number := signals.recv(1):
                self._arrived += number[0] == signal.SIGINT
                if self.asked > 1 and not self._raised:
                    patience = threading.Timer(_PATIENCE_SECONDS, self._give_up)
                    patience.daemon = True
                    patience.start()

    def _give_up(self) -> None:
        if not self._raised and not self._over:
            os._exit(ExitCode.INTERRUPTED)


def listen(tell: Callable[[str], None]) -> Listener | None:
    """Handle Ctrl-C from now on; None where it is ignored, or somebody else's.

    Args:
        tell: shows a line to a person; called from a signal handler.
    """
    if threading.current_thread() is not threading.main_thread():
        return None
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return None
    listener = Listener(tell)
    received, sent = socket.socketpair()
    sent.setblocking(False)
    threading.Thread(target=listener.watch, args=(received,), daemon=True).start()
    signal.set_wakeup_fd(sent.detach(), warn_on_full_buffer=False)
    sys.unraisablehook = listener.lost
    signal.signal(signal.SIGINT, listener)
    return listener


def stop_listening() -> None:
    """Give Ctrl-C back to Python."""
    listener = _listener()
    if listener is None:
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.close(signal.set_wakeup_fd(-1))
    sys.unraisablehook = listener.previous_hook
    listener.end()


def end_process() -> NoReturn:
    """End an interrupted process with its code.

    Left to itself, Python ends by the signal in place of the code once a KeyboardInterrupt has passed through `exec`
    or `eval` of a text, as dataclasses and named tuples use them (`_Py_UnhandledKeyboardInterrupt`).
    """
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(ExitCode.INTERRUPTED)


@contextmanager
def listening(tell: Callable[[str], None]) -> Iterator[Listener]:
    """Handle Ctrl-C while the block runs; a process that listens already goes on as it does.

    Args:
        tell: shows a line to a person; called from a signal handler.
    """
    mine = listen(tell)
    listener = mine or _listener() or Listener(tell)
    try:
        yield listener
    finally:
        if mine:
            stop_listening()


@contextmanager
def finishing(unit: str) -> Iterator[None]:
    """Let the block end before a Ctrl-C stops the work; units may hold further ones.

    Args:
        unit: what it is called, such as "epoch 3 of 10".

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed, before the block or in it.
    """
    listener = _listener()
    if listener is None:
        yield
        return
    listener.enter(unit)
    try:
        yield
    finally:
        listener.leave()
    listener.check()


def _listener() -> Listener | None:
    found = signal.getsignal(signal.SIGINT)
    return found if isinstance(found, Listener) else None


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith(_IMPORTING):
            return True
        frame = frame.f_back
    return False


def _in_child() -> None:
    """Leave Ctrl-C to the parent: a data loader's worker goes on until the unit is finished."""
    if _listener() is not None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)


os.register_at_fork(after_in_child=_in_child)
