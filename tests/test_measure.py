"""What a latency says of its calls."""

import numpy as np
import pytest

from maseRT.measure import latency, wall_times_ms


def test_a_latency_sums_up_all_rounds():
    rounds = np.random.default_rng(0).normal(10, 1, (8, 25)).tolist()
    found = latency(rounds, "wall")
    calls = np.concatenate(rounds)
    assert (found.iterations, found.clock) == (200, "wall")
    assert found.mean_ms == pytest.approx(calls.mean())
    assert (found.p50_ms, found.p90_ms, found.p99_ms) == tuple(
        np.percentile(calls, [50, 90, 99], method="inverted_cdf")
    )
    assert found.cov == pytest.approx(calls.std() / calls.mean())
    assert set(found.intervals) == {"mean", "p50", "p90", "p99"}
    assert found.intervals["p50"].low < found.p50_ms < found.intervals["p50"].high


@pytest.mark.parametrize("calls", [5, 10, 30])
def test_figures_lie_within_their_intervals_where_each_round_has_a_stall(calls):
    found = latency([[*[0.5] * (calls - 1), 8.0]] * 10, "wall")
    for name, interval in found.intervals.items():
        assert interval.low <= getattr(found, f"{name}_ms") <= interval.high


@pytest.mark.parametrize(("waited", "bound"), [(None, False), (0, False), (20, False), (21, True), (40, True)])
def test_a_latency_is_launch_bound_where_the_device_waited_in_most_calls(waited, bound):
    found = latency([[1.0, 1.1]] * 20, "device events", waited=waited)
    assert found.waited == (None if waited is None else waited / 40)
    assert found.launch_bound == bound


def test_only_what_comes_after_the_warm_up_is_timed():
    calls = []
    times_ms = wall_times_ms(lambda: calls.append(0), warmup=3, iterations=range(5))
    assert (len(calls), len(times_ms)) == (8, 5)
