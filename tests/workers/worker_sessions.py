"""Sessions that workers open in these tests; imported by their processes, too."""

import logging
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from maseRT.errors import ConfigError
from maseRT.runtimes.base import TensorSpec
from maseRT.runtimes.device_times import DeviceTimes


class Bound:
    def __init__(self, batch):
        self._batch = batch

    def run(self):
        pass

    def repeat(self, iterations):
        time.sleep(0.001 * iterations)

    def device_times(self, iterations):
        return DeviceTimes([float(self._batch)] * iterations, waited=iterations - 1)


class Doubling:
    """Answers twice its input after so many seconds; every call appends a letter to a file."""

    providers = ("FirstProvider", "SecondProvider")
    assigned = {"FirstProvider": 3}  # noqa: RUF012

    def __init__(self, *, seconds=0.0, journal=None, letter=""):
        self.inputs = (TensorSpec("pixels", "float32", None),)
        self.outputs = (TensorSpec("scores", "float32", None),)
        self._seconds, self._journal, self._letter = seconds, journal, letter

    def infer(self, feed):
        time.sleep(self._seconds)
        if self._journal:
            with self._journal.open("a") as file:
                file.write(self._letter)
        return {"scores": 2 * feed["pixels"]}

    def prepare(self, feed):
        return lambda: list(self.infer(feed).values())

    def bind(self, feed):
        return Bound(len(feed["pixels"]))

    def layer_times_ms(self, feed, *, iterations):
        return {"conv": float(iterations)}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._journal:
            with self._journal.open("a") as file:
                file.write("|")


class Plain:
    """Neither profiled nor with a clock of its own."""

    def __init__(self):
        self.inputs = (TensorSpec("input", "float32", None),)
        self.outputs = (TensorSpec("output", "float32", None),)

    def infer(self, feed):
        return {"output": feed["input"]}

    def prepare(self, feed):
        return lambda: [feed["input"]]

    def bind(self, feed):
        bound = Bound(1)
        bound.device_times = lambda iterations: None
        return bound

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def doubling(**options):
    return Doubling(**options)


def plain():
    return Plain()


def greedy(mebibytes):
    session = Plain()
    session.weights = np.ones(mebibytes << 20, dtype=np.uint8)
    return session


def broken(text):
    raise ValueError(text)


def mistaken():
    raise ConfigError(["one", "two"], where="run.toml")


def quitting():
    sys.exit(7)


def talking():
    print("to standard output", flush=True)
    print("to standard error", file=sys.stderr, flush=True)
    logging.getLogger("maseRT.somewhere").warning("mind this")
    return Plain()


def dying(how):
    print("something happened", file=sys.stderr, flush=True)
    if isinstance(how, signal.Signals):
        os.kill(os.getpid(), how)
        time.sleep(10)
    os._exit(how)


class DyingLater(Plain):
    def infer(self, feed):
        os.kill(os.getpid(), signal.SIGSEGV)


def dying_later():
    return DyingLater()


class Stuck(Plain):
    """Does not end, whoever asks."""

    def __exit__(self, *_):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)


def stuck():
    return Stuck()


def interrupted(journal: Path):
    os.kill(os.getpid(), signal.SIGINT)
    journal.write_text(str(os.getpid()))
    return Plain()


def loaded_modules(path: Path):
    path.write_text(" ".join(sorted(sys.modules)))
    return Plain()
