"""Whose turn it is, and how often."""

import time
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import worker_sessions as sessions

from maseRT.energy import Power, Visit
from maseRT.errors import StepError
from maseRT.workers import schedule
from maseRT.workers.local import LocalWorker
from maseRT.workers.schedule import calls_per_round, idle_power, measure_energies, measure_rows

ONES = np.ones((2, 3), dtype=np.float32)


@pytest.fixture
def rows(tmp_path):
    workers = {}
    for letter in "ab":
        opener = partial(sessions.doubling, seconds=0.002, journal=tmp_path / "journal", letter=letter)
        workers[letter] = LocalWorker(letter, opener)
        workers[letter].open()
    yield workers
    for worker in workers.values():
        worker.close()


def turns(journal, *, after):
    """Return whose turns they were, without repetitions."""
    text = journal.read_text()[after:]
    return "".join(letter for i, letter in enumerate(text) if i == 0 or text[i - 1] != letter)


def test_rows_take_turns_and_every_other_round_is_reversed(rows, tmp_path):
    found = measure_rows(rows, ONES, warmup=2, iterations=9, seconds=0, rounds=3)
    pilot = 2 * (2 + 1 + 3)
    assert turns(tmp_path / "journal", after=pilot) == "abab"  # ab ba ab
    for times in found.values():
        assert [len(each) for each in times.wall] == [3, 3, 3]
        assert times.device is None


def test_device_times_come_in_the_same_rounds(rows):
    found = measure_rows(rows, ONES, warmup=0, iterations=4, seconds=0, rounds=2, device=True)
    assert found["a"].device == [[2.0, 2.0], [2.0, 2.0]]
    assert found["a"].waited == 2


def test_no_more_rounds_than_calls(rows):
    found = measure_rows(rows, ONES, warmup=0, iterations=2, seconds=0)
    assert [len(times.wall) for times in found.values()] == [2, 2]


def test_rounds_are_spread_over_more_than_their_own_time(rows):
    start = time.perf_counter()
    measure_rows(rows, ONES, warmup=0, iterations=4, seconds=0.02, rounds=4)
    assert time.perf_counter() - start >= 0.3  # 20 times the seconds, less the last round


def test_progress_counts_rounds(rows):
    seen = []

    def track(items, *, description, total):
        for item in items:
            yield item
            seen.append((description, total))

    measure_rows(rows, ONES, warmup=0, iterations=3, seconds=0, rounds=3, track=track, description="batch 2")
    assert seen == [("batch 2", 3)] * 3


def test_a_row_that_fails_is_named():
    with LocalWorker("bad", sessions.dying_later) as worker, pytest.raises(StepError, match="bad: is not open"):
        measure_rows({"bad": worker}, ONES, warmup=0, iterations=1, seconds=0)


@pytest.mark.parametrize(
    ("call_ms", "iterations", "seconds", "calls"),
    [
        (10.0, 50, 0.5, 3),  # 50 calls, 2.5 in a round
        (10.0, 50, 2.0, 10),  # 0.1 s in a round
        (1000.0, 50, 0.5, 3),
        (0.01, 50, 0.5, 1000),  # as many as count
        (0.0, 1, 0.0, 1),
    ],
)
def test_calls_are_enough_in_number_and_in_time(call_ms, iterations, seconds, calls):
    assert calls_per_round(call_ms, iterations, seconds, 20) == calls


# energy, on a meter and rows without seconds


class Metered:
    """A device's meter and its rows: each visit or look without work takes the next of some powers.

    Attributes:
        journal: what came in which order: rows by their names, looks without work by the device's.
    """

    def __init__(self, monkeypatch, watts, idle):
        self.watts, self.idle = {name: iter(each) for name, each in watts.items()}, iter(idle)
        self.journal = []
        monkeypatch.setattr(schedule, "idle_power", self.look)

    def look(self, device, *, seconds):
        self.journal.append(device)
        return self.told(next(self.idle), seconds)

    def worker(self, name):
        def energy(*, seconds):
            self.journal.append(name)
            power = self.told(next(self.watts[name]), seconds)
            return power if isinstance(power, str) else Visit("counter", "device", power, seconds, 100)

        return SimpleNamespace(energy=energy)

    def told(self, watts, seconds):
        return watts if isinstance(watts, str) else Power(watts, None, None, seconds)

    def measure(self, devices, **options):
        return measure_energies({name: self.worker(name) for name in self.watts}, devices, **options)


def test_visits_take_turns_with_rests_before_between_and_after(monkeypatch):
    device = Metered(monkeypatch, {"a": [10.0] * 4, "b": [20.0] * 4, "c": [30.0] * 4}, [5.0, 5.0, 6.0, 7.0, 7.0])
    found = device.measure(dict.fromkeys("abc", "cpu"))
    assert "".join(device.journal).replace("cpu", "-") == "-abc-cba-abc-cba-"
    assert found["b"].visits == 4
    assert found["b"].seconds == pytest.approx(4.0)
    assert found["b"].joules_per_sample == pytest.approx(20.0 / 100)
    assert found["b"].idle_watts == pytest.approx(6.0)
    assert found["b"].idle_watts_low < 5.5 < 6.5 < found["b"].idle_watts_high  # it drifts
    assert found["b"].net_joules_low < 14 / 100 < found["b"].net_joules_high


def test_each_device_rests(monkeypatch):
    device = Metered(monkeypatch, {"a": [10.0], "b": [20.0]}, [5.0, 6.0, 5.0, 6.0])
    found = device.measure({"a": "cpu", "b": "cuda:0"}, visits=1)
    assert device.journal == ["cpu", "cuda:0", "a", "b", "cpu", "cuda:0"]
    assert (found["a"].idle_watts, found["b"].idle_watts) == (5.0, 6.0)


def test_a_device_without_a_meter_is_not_asked_again(monkeypatch):
    device = Metered(monkeypatch, {"a": [10.0] * 2, "b": []}, [5.0, "no meter", 5.0, 5.0])
    found = device.measure({"a": "cpu", "b": "cuda:0"}, visits=2)
    assert device.journal == ["cpu", "cuda:0", "a", "cpu", "a", "cpu"]
    assert found["b"] == "no meter"
    assert found["a"].visits == 2


def test_a_row_that_cannot_be_measured_says_why_and_the_others_go_on(monkeypatch):
    device = Metered(monkeypatch, {"a": [10.0, "the energy counter stood still"], "b": [20.0] * 3}, [5.0] * 4)
    found = device.measure({"a": "cpu", "b": "cpu"}, visits=3)
    assert found["a"] == "the energy counter stood still"
    assert found["b"].visits == 3


def test_without_the_power_at_rest_in_the_end_there_is_no_energy(monkeypatch):
    device = Metered(monkeypatch, {"a": [10.0]}, [5.0, "the power without work is not known"])
    assert device.measure({"a": "cpu"}, visits=1) == {"a": "the power without work is not known"}


def test_progress_counts_visits(monkeypatch):
    device, seen = Metered(monkeypatch, {"a": [10.0] * 2, "b": [20.0] * 2}, [5.0] * 3), []

    def track(items, *, description, total):
        for item in items:
            yield item
            seen.append((description, total))

    device.measure(dict.fromkeys("ab", "cpu"), visits=2, track=track)
    assert seen == [("energy", 4)] * 4


def test_no_rows_take_no_energy(monkeypatch):
    assert Metered(monkeypatch, {}, []).measure({}) == {}


def test_a_device_without_a_meter_says_why_at_once():
    start = time.perf_counter()
    assert isinstance(idle_power("cuda:97", seconds=30), str)
    assert time.perf_counter() - start < 10


def test_a_counter_that_stands_still_is_a_reason(monkeypatch):
    meter = SimpleNamespace(source="counter", device="cpu", joules=lambda: 7.0)
    monkeypatch.setattr(schedule, "open_meter", contextmanager(lambda device: iter([meter])))
    monkeypatch.setattr(schedule, "_REST_SECONDS", 0.0)
    assert idle_power("cpu", seconds=0.05) == "the power without work is not known: the energy counter stood still"
