"""When a device waited for the host: on a stream whose clock, and the host's, are made of numbers."""

import pytest
import torch

pytest.importorskip("cuda.bindings.runtime")

from device_in_memory import OK, OUT_OF_MEMORY, Cuda

from maseRT.errors import StepError
from maseRT.runtimes import torch as torch_runtime
from maseRT.runtimes.device_times import DeviceTimes
from maseRT.runtimes.torch import event_times
from maseRT.runtimes.trt import cuda as calls

EVENT_MS = 0.001


class Timeline:
    """A host that queues kernels, and a device that runs them in order, once they are queued.

    Args:
        deep: how many kernels the device takes before the host has to wait.
    """

    def __init__(self, deep=1000):
        self.host_ms = self.device_ms = 0.0
        self._deep = deep
        self._ends = []

    def queue(self, host_ms, device_ms):
        if len(self._ends) >= self._deep:
            self.host_ms = max(self.host_ms, self._ends[-self._deep])
        self.host_ms += host_ms
        self.device_ms = max(self.device_ms, self.host_ms) + device_ms
        self._ends.append(self.device_ms)

    def record(self):
        self.host_ms += EVENT_MS
        return max(self.device_ms, self.host_ms)

    def wait(self):
        self.host_ms = max(self.host_ms, self.device_ms)

    def clock_ns(self):
        return self.host_ms * 1e6


class TimedCuda(Cuda):
    """Events of a timeline."""

    def __init__(self, timeline):
        self.timeline, self.at, self.broken = timeline, {}, False
        super().__init__()

    def cudaEventRecord(self, event, stream):  # noqa: N802
        self.at[event] = self.timeline.record()
        return (OUT_OF_MEMORY if self.broken else OK,)

    def cudaEventElapsedTime(self, start, end):  # noqa: N802
        return OK, self.at[end] - self.at[start]

    def cudaStreamSynchronize(self, stream):  # noqa: N802
        self.timeline.wait()
        return (OK,)


class Event:
    """A torch event of a timeline."""

    timeline = None

    def __init__(self, *, enable_timing):
        assert enable_timing

    def record(self, stream=None):
        self.ms = self.timeline.record()

    def elapsed_time(self, end):
        return end.ms - self.ms


@pytest.fixture(params=["stream", "torch"])
def timed(request, monkeypatch):
    """Return what times inferences of so many kernels, (host ms, device ms) each."""

    def by_stream(timeline, kernels, iterations):
        monkeypatch.setattr(calls, "cudart", lambda: TimedCuda(timeline))
        return calls.device_times(7, lambda: [timeline.queue(*each) for each in kernels], iterations)

    def by_torch(timeline, kernels, iterations):
        from contextlib import nullcontext

        monkeypatch.setattr(Event, "timeline", timeline)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "device", nullcontext)
        monkeypatch.setattr(torch.cuda, "synchronize", timeline.wait)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: 7)
        return event_times(lambda: [timeline.queue(*each) for each in kernels], "cuda:0", iterations)

    def timed(kernels, iterations, **options):
        timeline = Timeline(**options)
        for user in (calls, torch_runtime):
            monkeypatch.setattr(user.time, "perf_counter_ns", timeline.clock_ns)
        return {"stream": by_stream, "torch": by_torch}[request.param](timeline, kernels, iterations)

    return timed


def test_small_kernels_take_the_time_of_launching_them_and_that_is_told(timed):
    found = timed([(0.010, 0.002)] * 20, 30)
    assert found.ms == [pytest.approx(0.2, abs=0.01)] * 30
    assert found.waited == 30


def test_large_kernels_take_their_own_time(timed):
    found = timed([(0.010, 0.050)] * 20, 30)
    assert found.ms == [pytest.approx(1.0)] * 30
    assert found.waited == 0


def test_a_graph_that_is_launched_ahead_takes_its_own_time(timed):
    found = timed([(0.005, 0.020)], 200)
    assert found.ms[1:] == [pytest.approx(0.020)] * 199
    assert found.waited <= 2


def test_a_small_graph_that_is_not_is_told(timed):
    assert timed([(0.010, 0.004)], 200).waited == 200


@pytest.mark.parametrize("deep", [1000, 15])
def test_a_host_that_is_held_up_by_a_full_queue_is_not_slow(timed, deep):
    found = timed([(0.001, 0.050)] * 30, 100, deep=deep)
    assert found.ms == [pytest.approx(1.5)] * 100
    assert found.waited == 0


def test_a_single_inference_is_judged_alike(timed):
    assert timed([(0.010, 0.050)] * 20, 1).waited == 0
    assert timed([(0.010, 0.002)] * 20, 1).waited == 1


def test_the_last_kernel_may_be_a_large_one(timed):
    """The host launches the next inference meanwhile, and still needs all of the time."""
    found = timed([(0.010, 0.002)] * 40 + [(0.010, 0.080)], 50)
    assert found.waited == 50


def test_as_long_and_soon():
    """A host of 0.9 ms and a device of 1 ms; the device is done a quarter of its time later, and then more."""
    queued = [0.0, 0.9, 1.8]
    assert DeviceTimes.of([1.0, 1.0], done_ms=[1.1, 2.1], queued_ms=queued) == DeviceTimes([1.0, 1.0], 1)
    assert DeviceTimes.of([1.1, 1.1], done_ms=[1.1, 2.0], queued_ms=queued).waited == 0


def test_an_error_of_an_event_is_told_and_leaves_nothing(monkeypatch):
    cuda = TimedCuda(Timeline())
    cuda.broken = True
    monkeypatch.setattr(calls, "cudart", lambda: cuda)
    with pytest.raises(StepError, match="out of memory"):
        calls.device_times(7, lambda: None, 3)
    assert cuda.alive == {}
