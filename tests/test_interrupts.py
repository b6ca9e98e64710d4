"""Ctrl-C: what a unit finishes, what a second one stops, and what must not swallow it."""

import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from maseRT.errors import ExitCode
from maseRT.interrupts import finishing, listening


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def test_outside_of_units_it_stops_at_once():
    told = []
    with listening(told.append) as listener, pytest.raises(KeyboardInterrupt):
        press()
    assert (told, listener.asked, listener.raised) == ([], 1, True)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_unit_is_finished_first_and_says_so():
    told, done = [], []
    with listening(told.append), pytest.raises(KeyboardInterrupt), finishing("epoch 3 of 10"):
        press()
        done.append("rest of the epoch")
    assert told == ["finishing epoch 3 of 10; Ctrl-C again stops at once"]
    assert done == ["rest of the epoch"]


def test_the_second_one_does_not_wait():
    done = []
    with listening(done.append), pytest.raises(KeyboardInterrupt), finishing("epoch 3 of 10"):
        press()
        press()
        done.append("never")
    assert "never" not in done


def test_the_outermost_unit_counts():
    told, done = [], []
    with listening(told.append), pytest.raises(KeyboardInterrupt), finishing("epoch 1 of 2"):
        with finishing("checkpoint"):
            press()
        done.append("after the inner unit")
    assert told == ["finishing epoch 1 of 2; Ctrl-C again stops at once"]
    assert done == ["after the inner unit"]


def test_one_that_was_swallowed_is_raised_before_the_next_unit():
    done = []
    with listening(done.append):
        with suppress(KeyboardInterrupt):
            press()
        with pytest.raises(KeyboardInterrupt), finishing("epoch 2 of 2"):
            done.append("never")
    assert done == []


def test_an_error_in_the_unit_stays_that_error():
    with listening(lambda line: None) as listener:
        with pytest.raises(ZeroDivisionError), finishing("epoch 2 of 2"):
            press()
            raise ZeroDivisionError
        assert not listener.raised


def test_without_a_listener_a_unit_means_nothing():
    done = []
    with pytest.raises(KeyboardInterrupt), finishing("epoch 1 of 2"):
        press()
        done.append("never")
    assert done == []


def test_an_import_is_finished_first(write):
    path = write("slow.py", "import signal\nsignal.raise_signal(signal.SIGINT)\nwhole = True\n")
    sys.path.insert(0, str(path.parent))
    told = []
    with listening(told.append), pytest.raises(KeyboardInterrupt):
        import slow

        assert slow.whole
        while True:
            time.sleep(0.01)
    assert told == ["finishing an import; Ctrl-C again stops at once"]


def test_one_that_nobody_could_receive_is_raised_again():
    class Deleted:
        def __del__(self):
            press()

    with listening(print), pytest.raises(KeyboardInterrupt):
        del_me = Deleted()
        del del_me
        while True:
            time.sleep(0.01)


def run_pressing(code: str, times: int) -> subprocess.CompletedProcess:
    """Run code until it prints a line, and press Ctrl-C."""
    command = [sys.executable, "-c", "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n" + code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    for _ in range(times):
        time.sleep(0.3)  # the second of two signals in a row would be lost in the first
        process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def test_code_without_python_in_it_is_stopped_by_the_second_one():
    code = """
import hashlib
from maseRT.interrupts import finishing, listening
with listening(print), finishing("a build"):
    print("building", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""
    assert run_pressing(code, 2).returncode == ExitCode.INTERRUPTED


def test_a_forked_worker_leaves_it_to_its_parent():
    code = """
import os, time
from maseRT.interrupts import finishing, listening
with listening(lambda line: None), finishing("a batch"):
    worker = os.fork()
    if not worker:
        os.kill(os.getpid(), 2)
        os._exit(7)
    print("waiting", flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]), flush=True)
    time.sleep(1)
    print("finished", flush=True)
"""
    assert run_pressing(code, 1).stdout == "7\nfinished\n"


def test_a_process_ends_with_the_code_whatever_the_interrupt_passed_through():
    code = """
import signal
from maseRT.interrupts import end_process
try:
    exec("signal.raise_signal(signal.SIGINT)")
except KeyboardInterrupt:
    print("ending", flush=True)
    end_process()
"""
    assert run_pressing(code, 0).returncode == ExitCode.INTERRUPTED
