"""What both workers do alike, and what only a process of its own can do."""

import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import worker_sessions as sessions
from fake_nvml import Nvml

from maseRT import energy
from maseRT.errors import CheckError, ConfigError, StepError, UsageError
from maseRT.hardware import Gpu
from maseRT.runtimes.device_times import DeviceTimes
from maseRT.workers import local
from maseRT.workers.local import LocalWorker
from maseRT.workers.process import ProcessWorker

ONES = np.ones((4, 3), dtype=np.float32)


@pytest.fixture(params=[LocalWorker, ProcessWorker])
def make(request):
    opened = []

    def _make(opener, **options):
        opened.append(request.param("a-row", opener, **options))
        return opened[-1]

    yield _make
    for worker in opened:
        worker.close()


@pytest.fixture
def process():
    opened = []

    def _make(opener):
        opened.append(ProcessWorker("a-row", opener))
        return opened[-1]

    yield _make
    for worker in opened:
        worker.close()


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


# alike


def test_opening_tells_providers_and_versions(make):
    opened = make(sessions.doubling).open()
    assert (opened.got, opened.nodes) == (("FirstProvider", "SecondProvider"), {"FirstProvider": 3})
    assert opened.seconds > 0
    assert all(isinstance(version, str) for version in opened.versions.values())


def test_inference_by_the_sessions_own_tensor_names(make):
    worker = make(sessions.doubling)
    worker.open()
    assert np.array_equal(worker.infer(ONES), 2 * ONES)


def test_a_hundred_megabytes_pass(make):
    worker = make(sessions.plain)
    worker.open()
    batch = np.arange(25_000_000, dtype=np.float32).reshape(100, -1)
    assert np.array_equal(worker.infer(batch), batch)


def test_times_are_wall_times_of_so_many_calls_after_untimed_ones(make, tmp_path):
    journal = tmp_path / "journal"
    worker = make(partial(sessions.doubling, seconds=0.005, journal=journal, letter="a"))
    worker.open()
    worker.bind(ONES)
    worker.warm_up(3)
    assert journal.read_text() == "aaa"
    times = worker.times_ms(4)
    assert (len(times), min(times) >= 5) == (4, True)
    assert journal.read_text() == "a" * (3 + 1 + 4)


def test_device_times_and_kernel_times_are_of_the_bound_batch(make):
    worker = make(sessions.doubling)
    worker.open()
    worker.bind(ONES)
    assert worker.device_times(3) == DeviceTimes([4.0, 4.0, 4.0], waited=2)
    assert worker.kernel_times_ms(7) == {"conv": 7.0}


def test_sessions_without_clock_and_profile_say_nothing(make):
    worker = make(sessions.plain)
    worker.open()
    worker.bind(ONES)
    assert worker.device_times(3) is None
    assert worker.kernel_times_ms(3) == {}
    assert worker.gpu_state() is None


def test_memory_is_what_the_row_itself_takes(make):
    worker = make(partial(sessions.greedy, 64))
    worker.open()
    host, device = worker.memory()
    fresh = isinstance(worker, ProcessWorker)  # a process with a past may hold freed memory that is taken again
    assert (60 if fresh else 0) <= host < 120
    assert device is None


def test_energy_without_a_counter_is_a_reason_at_once(make, monkeypatch):
    worker = make(sessions.plain, device="cuda:97")
    worker.open()
    worker.bind(ONES)
    start = time.monotonic()
    told = worker.energy(seconds=30)
    assert isinstance(told, str)
    assert told
    assert time.monotonic() - start < 10


def test_an_error_of_the_package_arrives_as_it_is(make):
    worker = make(sessions.mistaken)
    with pytest.raises(ConfigError) as caught:
        worker.open()
    assert caught.value.problems == ("one", "two")
    assert (caught.value.where, caught.value.exit_code) == ("run.toml", 2)


@pytest.mark.parametrize(
    ("opener", "what"), [(partial(sessions.broken, "no weights"), "ValueError: no weights"), (sessions.quitting, "7")]
)
def test_any_other_error_names_the_row(make, opener, what):
    with pytest.raises(StepError) as caught:
        make(opener).open()
    assert caught.value.where == "a-row"
    assert what in caught.value.what


@pytest.mark.parametrize("call", [lambda w: w.infer(ONES), lambda w: w.times_ms(1), lambda w: w.bind(ONES)])
def test_a_worker_that_is_not_open_says_so(make, call):
    worker = make(sessions.plain)
    with pytest.raises(StepError, match="a-row: is not open"):
        call(worker)
    worker.open()
    worker.close()
    with pytest.raises(StepError, match="a-row: is not open"):
        call(worker)


def test_opening_twice_and_measuring_nothing_are_errors(make):
    worker = make(sessions.plain)
    worker.open()
    with pytest.raises(StepError, match="is open already"):
        worker.open()
    with pytest.raises(StepError, match="no batch is bound"):
        worker.times_ms(1)


def test_an_error_leaves_the_worker_usable(make):
    worker = make(sessions.doubling)
    worker.open()
    with pytest.raises(StepError, match="a-row: TypeError"):
        worker.infer(None)
    assert np.array_equal(worker.infer(ONES), 2 * ONES)


def test_closing_ends_the_session_once(make, tmp_path):
    journal = tmp_path / "journal"
    with make(partial(sessions.doubling, journal=journal)) as worker:
        worker.open()
    worker.close()
    assert journal.read_text() == "|"


# with a counter


class Counter:
    source, device = "counter", "cpu"

    def joules(self):
        return 30.0 * time.perf_counter()


def test_a_visit_with_a_counter(monkeypatch):
    from contextlib import contextmanager

    monkeypatch.setattr(local, "open_meter", contextmanager(lambda device: iter([Counter()])))
    monkeypatch.setattr(energy, "_WARMUP_SECONDS", 0.0)
    with LocalWorker("a-row", sessions.doubling) as worker:
        worker.open()
        worker.bind(ONES)
        told = worker.energy(seconds=0.3)
    assert told.power.watts == pytest.approx(30, rel=0.05)
    assert told.seconds >= 0.3
    assert told.samples % 4 == 0


# with a GPU that says what it does


def test_a_gpu_is_looked_at_while_it_is_hot(monkeypatch):
    """Its clocks drop as soon as the row sleeps."""
    library = Nvml(sm=345, reasons=0)

    class Working(sessions.Plain):
        def prepare(self, feed):
            return lambda: library.values.update(sm=1980)

    def fall_asleep():
        library.values.update(sm=345, reasons=0)

    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setattr(local, "nvidia_gpus", lambda: (Gpu(0, "NVIDIA H", "9.0", 1, "GPU-1"),))
    monkeypatch.setattr(local, "_fall_asleep", fall_asleep)
    with LocalWorker("a-row", Working, device="cuda:0") as worker:
        worker.open()
        worker.bind(ONES)
        assert worker.gpu_state() is None
        worker.warm_up(1)
        worker.times_ms(2)
        library.values.update(reasons=0x4, core=70)
        worker.times_ms(2)
        worker.times_ms(2)
        state = worker.gpu_state()
        assert (state.sm_clock_mhz, state.temperature_c, state.limits) == (1980, 70, ("power cap",))
        worker.bind(ONES)
        assert worker.gpu_state() is None


# a process of its own


def test_the_process_loads_no_torch_unless_its_opener_does(process, tmp_path):
    process(partial(sessions.loaded_modules, tmp_path / "modules")).open()
    assert not {"torch", "onnx", "pydantic", "scipy"} & set((tmp_path / "modules").read_text().split())


def test_what_a_process_prints_goes_to_the_log(process, capfd, caplog, monkeypatch):
    # Commands that ran before, and libraries, have handlers of their own that print.
    monkeypatch.setattr(logging.getLogger("maseRT"), "handlers", [caplog.handler])
    monkeypatch.setattr(logging.getLogger("maseRT"), "propagate", False)
    with caplog.at_level(logging.INFO, "maseRT"), process(sessions.talking) as worker:
        worker.open()
        assert ("maseRT.somewhere", logging.WARNING, "a-row: mind this") in caplog.record_tuples
    assert "to standard output\nto standard error" in caplog.text
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("how", "told"), [(signal.SIGSEGV, "killed by SIGSEGV"), (signal.SIGKILL, "killed by SIGKILL"), (3, "status 3")]
)
def test_a_process_that_dies_is_told_by_row_status_and_last_words(process, how, told):
    worker = process(partial(sessions.dying, how))
    with pytest.raises(StepError) as caught:
        worker.open()
    assert caught.value.where == "a-row"
    assert told in caught.value.what
    assert caught.value.what.endswith("\n  something happened")
    assert ("memory" in caught.value.fix) == (how is signal.SIGKILL)


def test_a_process_that_dies_later_is_told_and_stays_dead(process):
    worker = process(sessions.dying_later)
    worker.open()
    with pytest.raises(StepError, match="SIGSEGV"):
        worker.infer(ONES)
    with pytest.raises(StepError, match="is not open"):
        worker.infer(ONES)


def test_an_opener_that_cannot_travel_says_what_to_do(process):
    with pytest.raises(StepError, match="isolate = false"):
        process(lambda: None).open()


def test_a_process_ignores_ctrl_c(process, tmp_path):
    worker = process(partial(sessions.interrupted, tmp_path / "survived"))
    worker.open()
    assert int((tmp_path / "survived").read_text()) == worker.pid


def test_a_process_that_does_not_end_is_killed(process, monkeypatch):
    monkeypatch.setattr("maseRT.workers.process._PATIENCE_SECONDS", 0.3)
    worker = process(sessions.stuck)
    worker.open()
    pid = worker.pid
    worker.close()
    assert not alive(pid)


def test_closing_amid_a_call_does_not_wait_for_it(process):
    worker = process(partial(sessions.doubling, seconds=60.0))
    worker.open()
    pid = worker.pid
    before = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            worker.infer(ONES)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    start = time.monotonic()
    worker.close()
    assert time.monotonic() - start < 4
    assert not alive(pid)


PARENT = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from functools import partial
import numpy as np
import worker_sessions as sessions
from maseRT.workers.process import ProcessWorker
worker = ProcessWorker("a-row", partial(sessions.doubling, seconds=60.0))
worker.open()
print(worker.pid, flush=True)
{then}
"""


@pytest.mark.parametrize("then", ["sys.stdin.read()", "worker.infer(np.ones(3, dtype=np.float32))"])
def test_a_process_dies_with_its_parent_whatever_kills_that(then):
    code = PARENT.format(then=then)
    with subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(sys.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        pid = int(parent.stdout.readline())
        assert alive(pid)
        parent.send_signal(signal.SIGKILL)
    assert wait_until(lambda: not alive(pid))


def test_a_sleeping_process_uses_no_cpu(process):
    worker = process(sessions.plain)
    worker.open()
    worker.bind(ONES)
    worker.times_ms(10)

    def ticks():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    before = ticks()
    time.sleep(0.5)
    assert ticks() - before <= 1  # of 10 ms


@pytest.mark.parametrize(
    "error", [UsageError("what", where="where", fix="fix"), CheckError("only what"), ConfigError(["a"], where="b")]
)
def test_errors_cross_processes(error):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert (str(again), vars(again), again.args) == (str(error), vars(error), error.args)


def test_the_parents_descriptors_do_not_pile_up(process):
    def count():
        return len(os.listdir("/proc/self/fd"))

    for _ in range(2):
        with process(sessions.plain) as worker:
            worker.open()
        before = count()
    assert count() == before
