"""Whose turn it is, and how often."""

import time
from functools import partial

import numpy as np
import pytest
import worker_sessions as sessions

from maseRT.errors import StepError
from maseRT.workers.local import LocalWorker
from maseRT.workers.schedule import calls_per_round, idle_power, measure_rows

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


def test_a_device_without_a_meter_has_no_idle_power():
    assert idle_power("cuda:97", seconds=30) is None
