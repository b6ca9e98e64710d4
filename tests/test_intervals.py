"""Intervals against theory: how often they hold the truth, and what they make of drift and of pairs."""

import numpy as np
import pytest

from maseRT.intervals import block_length, bootstrap_latency, difference_interval


def drawn(rng, *, rounds=20, calls=30, between=0.1, within=0.3, mean=10.0):
    return [rng.normal(rng.normal(mean, between), within, calls).tolist() for _ in range(rounds)]


@pytest.mark.parametrize("rounds", [8, 20])
def test_nineteen_of_twenty_intervals_hold_the_truth(rounds):
    rng = np.random.default_rng(1)
    held = []
    for seed in range(150):
        found = bootstrap_latency(drawn(rng, rounds=rounds, calls=10), seed=seed)
        held.append([found[name][0] <= 10.0 <= found[name][1] for name in ("mean", "p50")])
    shares = np.mean(held, axis=0)
    assert all(0.89 <= share <= 1.0 for share in shares)  # 95 %, three standard errors and the bootstrap's own bias


def test_calls_of_one_round_are_not_independent():
    rng = np.random.default_rng(2)
    rounds = drawn(rng, between=1.0, within=0.01)
    low, high = bootstrap_latency(rounds)["mean"]
    of_rounds = 2 * 2.09 * np.std([np.mean(each) for each in rounds], ddof=1) / np.sqrt(20)
    assert high - low == pytest.approx(of_rounds, rel=0.2)


def test_a_machine_that_is_slower_for_a_while_widens_the_interval():
    rng = np.random.default_rng(3)
    levels = np.repeat([10.0, 12.0], 10)
    rounds = [rng.normal(level, 0.05, 20).tolist() for level in levels]
    shuffled = [rounds[i] for i in rng.permutation(20)]
    together, apart = (bootstrap_latency(each)["mean"] for each in (rounds, shuffled))
    assert together[1] - together[0] > 1.3 * (apart[1] - apart[0])


def test_block_length_follows_the_correlation_of_neighbours():
    rng = np.random.default_rng(4)
    assert block_length([1.0] * 20) == 1
    assert block_length(rng.normal(size=200).tolist()) <= 2
    assert block_length([1.0, 2.0] * 10) == 1
    assert block_length([0.0] * 10 + [1.0] * 10) == 5
    wandering = np.cumsum(rng.normal(size=200))
    assert block_length(wandering.tolist()) == 50


def test_every_interval_holds_its_figure():
    rng = np.random.default_rng(5)
    times = [rng.exponential(1.0, 40).tolist() for _ in range(6)]
    everything = np.concatenate(times)
    found = bootstrap_latency(times)
    points = {"mean": everything.mean(), **{f"p{q}": np.percentile(everything, q) for q in (50, 90, 99)}}
    assert list(found) == list(points)
    for name, (low, high) in found.items():
        assert low <= points[name] <= high


@pytest.mark.parametrize("rounds", [[[3.0]], [[3.0, 3.0]], [[3.0], [3.0]]])
def test_times_that_are_all_the_same(rounds):
    assert set(bootstrap_latency(rounds).values()) == {(3.0, 3.0)}


def test_a_single_round_falls_back_on_its_calls():
    low, high = bootstrap_latency([np.random.default_rng(6).normal(10, 1, 100).tolist()])["mean"]
    assert 0.2 < high - low < 0.6  # 2 x 1.98 / sqrt(100)


def test_the_same_seed_gives_the_same_interval():
    rounds = drawn(np.random.default_rng(7))
    assert bootstrap_latency(rounds, seed=3) == bootstrap_latency(rounds, seed=3)
    assert bootstrap_latency(rounds, seed=3) != bootstrap_latency(rounds, seed=4)


def test_rounds_of_different_lengths():
    rounds = [[1.0] * 10, [1.0] * 30, [1.0] * 5, [1.0] * 7, [1.0]]
    assert bootstrap_latency(rounds)["p99"] == (1.0, 1.0)


def test_a_difference_of_scores_is_paired():
    rng = np.random.default_rng(9)
    base = rng.normal(0, 10, 2000)
    other = base + rng.normal(0.5, 0.1, 2000)
    low, high = difference_interval(base, other)
    assert 0.49 < low < 0.5 < high < 0.51


def test_a_difference_of_right_and_wrong_is_mcnemars():
    base = np.repeat([1.0, 1.0, 0.0], [900, 60, 40])
    other = np.repeat([1.0, 0.0, 1.0], [900, 60, 40])
    low, high = difference_interval(base, other)
    error = np.sqrt((100 - 20**2 / 1000) / 1000**2)
    assert low == pytest.approx(-0.02 - 1.96 * error, abs=0.004)
    assert high == pytest.approx(-0.02 + 1.96 * error, abs=0.004)


def test_equal_scores_differ_by_nothing():
    assert difference_interval(np.ones(50), np.ones(50)) == (0.0, 0.0)


def test_fifty_thousand_samples_take_little_memory():
    rng = np.random.default_rng(10)
    base = rng.normal(size=50_000)
    low, high = difference_interval(base, base + rng.normal(size=50_000))
    assert high - low == pytest.approx(2 * 1.96 / np.sqrt(50_000), rel=0.15)
