"""A worker in a process of its own: what it loads, spins or breaks is not another row's business."""

from __future__ import annotations

import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, BinaryIO, Concatenate, ParamSpec, TypeVar

from maseRT.closing import Closing
from maseRT.energy import VISIT_SECONDS, Visit
from maseRT.errors import MissingError, StepError
from maseRT.nvml import GpuState
from maseRT.runtimes.device_times import DeviceTimes
from maseRT.workers.child import Answer, Call, Task
from maseRT.workers.local import LocalWorker
from maseRT.workers.memory import Peak
from maseRT.workers.protocol import Array, Opened, Opener

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

_START = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from maseRT.workers.child import main; main()"
"""With the parent's path, so that the process finds the same modules as the parent, a user's among them."""

_PATIENCE_SECONDS = 5.0
_LAST_LINES = 8
_TAIL_BYTES = 1 << 16
_LINE = 200
_CRASH = "Fatal Python error:"


class ProcessWorker(Closing):
    """See `maseRT.workers.protocol.Worker`.

    The process has its own group, so that Ctrl-C is the parent's alone, and ends with the parent, whatever ends that.
    What it prints goes to the log.

    Args:
        name: the row's name.
        opener: returns the session; picklable.
        device: the hardware that computes: "cpu" or "cuda:N".
    """

    def __init__(self, name: str, opener: Opener, *, device: str = "cpu") -> None:
        self._name = name
        self._opener = opener
        self._device = device
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection[Any, Any] | None = None
        self._said: BinaryIO | None = None
        self._waiting = False

    @property
    def name(self) -> str:
        """The row's name."""
        return self._name

    @property
    def pid(self) -> int | None:
        """The process; None where there is none."""
        return self._process.pid if self._process else None

    def open(self) -> Opened:
        """Start the process and run the opener there.

        Raises:
            MissingError: this system cannot hand descriptors to processes.
            StepError: the opener cannot be pickled, or the process died.
            MaseRTError: whatever the opener raised.
        """
        if self._process is not None:
            raise StepError("is open already", where=self.name)
        self._start(Task(self._name, self._pickled_opener(), self._device))
        return self._ask(LocalWorker.open)

    def infer(self, inputs: Array) -> Array:
        """Return the output of one batch."""
        return self._ask(LocalWorker.infer, inputs)

    def bind(self, inputs: Array) -> None:
        """Keep the batch that is measured from now on."""
        self._ask(LocalWorker.bind, inputs)

    def warm_up(self, count: int) -> None:
        """Infer the bound batch so many times."""
        self._ask(LocalWorker.warm_up, count)

    def times_ms(self, count: int) -> list[float]:
        """Return the wall time of each inference."""
        return self._ask(LocalWorker.times_ms, count)

    def device_times(self, count: int) -> DeviceTimes | None:
        """Return the time of each inference by the device's clock; None where it has none."""
        return self._ask(LocalWorker.device_times, count)

    def energy(self, *, seconds: float = VISIT_SECONDS) -> Visit | str:
        """Return the power of inferring the bound batch, or why it cannot be measured."""
        return self._ask(LocalWorker.energy, seconds=seconds)

    def memory(self) -> Peak:
        """Return the most host and device memory that opening and inferring took."""
        return self._ask(LocalWorker.memory)

    def gpu_state(self) -> GpuState | None:
        """Return the state of the row's GPU while it worked on the bound batch."""
        return self._ask(LocalWorker.gpu_state)

    def kernel_times_ms(self, iterations: int) -> dict[str, float]:
        """Return the mean time of every engine layer."""
        return self._ask(LocalWorker.kernel_times_ms, iterations)

    def close(self) -> None:
        """End the process: it is asked, then made to."""
        process, connection = self._process, self._connection
        self._process = self._connection = None
        if process is None or connection is None:
            return
        try:
            if not self._waiting:  # else it is busy and would not listen
                with suppress(OSError):
                    connection.send(None)
                _wait(process, _PATIENCE_SECONDS)
        finally:
            connection.close()
            _end(process)
            self._log_what_it_said()

    def _pickled_opener(self) -> bytes:
        try:
            return pickle.dumps(self._opener)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise StepError(
                f"what opens it cannot be sent to a process: {error}",
                where=self.name,
                fix="set [analyze] isolate = false",
            ) from error

    def _start(self, task: Task) -> None:
        if os.name != "posix":
            raise MissingError(
                "rows cannot have processes of their own on this system",
                where=self.name,
                fix="set [analyze] isolate = false",
            )
        here, there = Pipe()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the process)
        path = [os.path.abspath(entry) for entry in sys.path]
        command = [sys.executable, "-P", "-c", _START, json.dumps(path), str(there.fileno())]
        with there:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=self._said,
                stderr=self._said,
                pass_fds=[there.fileno()],
                process_group=0,
            )
        self._connection = here
        self._tell(task)

    def _ask(self, method: Callable[Concatenate[LocalWorker, P], R], *args: P.args, **options: P.kwargs) -> R:
        """Have the worker at the other end do something, and return or raise what came of it."""
        answer = self._exchange(Call(method.__name__, args, options))
        for name, level, message in answer.logged:
            logging.getLogger(name).log(level, "%s: %s", self.name, message)
        if answer.error is not None:
            raise answer.error
        value: R = answer.value
        return value

    def _exchange(self, call: Call) -> Answer:
        self._tell(call)
        try:
            answer: Answer = self._open_connection().recv()
        except (EOFError, OSError) as error:
            raise self._death() from error
        except (ImportError, AttributeError, TypeError, pickle.UnpicklingError) as error:
            self._waiting = False
            raise StepError(f"its answer is not understood: {error}", where=self.name) from error
        self._waiting = False
        return answer

    def _tell(self, message: Task | Call) -> None:
        connection = self._open_connection()
        self._waiting = True
        try:
            connection.send(message)
        except OSError as error:
            raise self._death() from error
        if isinstance(message, Task):
            self._waiting = False

    def _open_connection(self) -> Connection[Any, Any]:
        if self._connection is None:
            raise StepError("is not open", where=self.name)
        return self._connection

    def _death(self) -> StepError:
        """Return how the process ended, and end it for good."""
        process = self._process
        if process is None:
            return StepError("is not open", where=self.name)
        _wait(process, _PATIENCE_SECONDS)
        how = _how_it_ended(process.returncode)
        lines = "".join(f"\n  {line}" for line in self._last_lines())
        self.close()
        killed = process.returncode == -signal.SIGKILL
        return StepError(
            f"its process {how}" + (f"; the last it said:{lines}" if lines else ""),
            where=self.name,
            fix="the system kills so when memory runs out: fewer rows or smaller batches" if killed else "",
        )

    def _last_lines(self) -> list[str]:
        """Return the end of what it said, without Python's own account of a crash: that one is in the log."""
        said, _, _ = self._tail().partition(_CRASH)
        lines = [line.rstrip()[:_LINE] for line in said.splitlines()]
        return [line for line in lines if line][-_LAST_LINES:]

    def _tail(self) -> str:
        if self._said is None:
            return ""
        end = self._said.seek(0, os.SEEK_END)
        self._said.seek(max(0, end - _TAIL_BYTES))
        return self._said.read().decode("utf-8", errors="replace")

    def _log_what_it_said(self) -> None:
        text = self._tail().strip()
        if text:
            log.info("%s said:\n%s", self.name, text)
        if self._said is not None:
            self._said.close()
            self._said = None


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that still runs; closing its standard input alone would end it, if it listened."""
    if process.poll() is None:
        process.kill()
        _wait(process, _PATIENCE_SECONDS)
    if process.stdin is not None:
        process.stdin.close()


def _how_it_ended(status: int | None) -> str:
    if status is None:
        return "stopped answering"
    if status >= 0:
        return f"ended with status {status}"
    return f"was killed by {signal.Signals(-status).name}"
