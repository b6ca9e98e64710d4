"""SIGTERM: what swallows the exception must not swallow the end."""

import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from maseRT.errors import ExitCode
from maseRT.termination import terminable


def terminate() -> None:
    signal.raise_signal(signal.SIGTERM)


def test_it_leaves_the_block_and_restores_what_was_there():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ending, terminable() as termination:
        terminate()
    assert (ending.value.code, termination.asked) == (ExitCode.TERMINATED, True)
    assert signal.getsignal(signal.SIGTERM) is before


def test_one_that_is_swallowed_comes_again():
    with pytest.raises(SystemExit), terminable():
        with suppress(SystemExit):
            terminate()
        time.sleep(60)


def test_one_that_comes_after_the_end_means_nothing():
    with terminable() as termination:
        termination.end()
        terminate()
    assert not termination.asked


def test_a_process_that_will_not_end_is_ended():
    code = """
import signal, time
from maseRT import termination
termination._PATIENCE_SECONDS = 0.05
with termination.terminable():
    while True:
        try:
            signal.raise_signal(signal.SIGTERM)
            time.sleep(1)
        except SystemExit:
            pass
"""
    result = subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert result.returncode == ExitCode.TERMINATED
