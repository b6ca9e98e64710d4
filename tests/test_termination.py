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


@pytest.fixture(autouse=True)
def _as_before():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_it_leaves_the_block_and_no_more_of_it_changes_the_exit_code():
    with pytest.raises(SystemExit) as ending, terminable() as termination:
        terminate()
    terminate()
    assert (ending.value.code, termination.asked) == (ExitCode.TERMINATED, True)


def test_where_none_came_the_handler_is_what_it_was():
    before = signal.getsignal(signal.SIGTERM)
    with terminable() as termination:
        pass
    assert signal.getsignal(signal.SIGTERM) is before
    assert not termination.asked


def test_one_that_is_swallowed_comes_again():
    with pytest.raises(SystemExit), terminable():
        with suppress(SystemExit):
            terminate()
        time.sleep(60)


def test_a_second_one_does_not_disturb_the_cleaning_up():
    cleaned = []
    with pytest.raises(SystemExit), terminable():
        try:
            terminate()
        finally:
            terminate()
            cleaned.append("up")
    assert cleaned == ["up"]


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
