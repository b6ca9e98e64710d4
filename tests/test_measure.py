"""What a latency says of its calls."""

import numpy as np
import pytest

from maseRT.intervals import bootstrap_latency
from maseRT.measure import latency, wall_times_ms


def p50_interval(rounds):
    interval = latency(rounds, "wall").intervals["p50"]
    return interval.low, interval.high


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


def test_what_other_launches_would_show_is_added():
    rounds = [[3.0, 3.0]] * 5
    for interval in latency(rounds, "wall").intervals.values():
        assert (interval.low, interval.high) == pytest.approx((3 * np.exp(-0.0196), 3 * np.exp(0.0196)), rel=1e-4)


def test_runs_on_a_restless_machine_agree_within_their_intervals():
    """A machine that is half as fast for seconds or minutes at a time: averages over a run do not settle."""
    rng = np.random.default_rng(11)
    slow = np.zeros(4000)
    for mean in (5, 50, 500):  # switches at several scales: the longest are longer than a run
        at = 0
        while at < len(slow):
            until = at + 1 + int(rng.exponential(mean))
            slow[at:until] += rng.integers(2) * 0.2
            at = until
    runs = [
        [(2 * np.exp(level) * rng.lognormal(0, 0.02, 20)).tolist() for level in levels]
        for levels in slow.reshape(200, 20)[::5]
    ]

    def agreement(interval_of):
        found = [interval_of(run) for run in runs]
        pairs = list(zip(runs, found, strict=True))
        return np.mean(
            [
                abs(np.log(np.median(other) / np.median(one)))
                <= np.hypot(np.log(high / low) / 2, np.log(more / less) / 2)
                for index, (one, (low, high)) in enumerate(pairs)
                for other, (less, more) in pairs[index + 1 :]
            ]
        )

    alone = agreement(lambda run: bootstrap_latency(run)["p50"])
    assert alone < 0.6
    assert agreement(p50_interval) > alone + 0.2


def test_an_accident_in_one_round_tells_nothing_of_other_runs():
    rounds = [[3.0] * 10] * 19 + [[9.0] * 10]
    assert p50_interval(rounds) == pytest.approx((3 * np.exp(-0.0196), 3 * np.exp(0.0196)), rel=1e-4)


@pytest.mark.parametrize(("waited", "bound"), [(None, False), (0, False), (20, False), (21, True), (40, True)])
def test_a_latency_is_launch_bound_where_the_device_waited_in_most_calls(waited, bound):
    found = latency([[1.0, 1.1]] * 20, "device events", waited=waited)
    assert found.waited == (None if waited is None else waited / 40)
    assert found.launch_bound == bound


def test_only_what_comes_after_the_warm_up_is_timed():
    calls = []
    times_ms = wall_times_ms(lambda: calls.append(0), warmup=3, iterations=range(5))
    assert (len(calls), len(times_ms)) == (8, 5)


def test_a_clock_that_does_not_resolve_every_call():
    found = latency([[0.0, 0.0, 0.5], [0.5, 0.5, 1.0]] * 5, "device events")
    for name, interval in found.intervals.items():
        assert interval.low <= getattr(found, f"{name}_ms") <= interval.high
