"""Differences and ratios of two estimates: published examples, ends, and how often the intervals cover the truth."""

import numpy as np
import pytest
from build import energy

from maseRT.measure import latency
from maseRT.report.estimates import Estimate, difference, millijoules, ratio, share, times_faster
from maseRT.report.schema import Energy, Interval


def test_newcombes_interval_is_that_of_his_paper():
    """56/70 against 48/80: 0.0524 to 0.3339, method 10 of table II in Newcombe (1998)."""
    found = difference(share(48 / 80, 80), share(56 / 70, 70)).interval
    assert (round(found.low, 4), round(found.high, 4)) == (0.0524, 0.3339)


@pytest.mark.parametrize(("hits", "samples"), [(0, 10), (10, 10), (0, 0)])
def test_a_share_at_the_end_stays_within_0_and_1(hits, samples):
    found = share(hits / samples if samples else 0.0, samples)
    if found.interval is not None:
        assert 0 <= found.interval.low <= found.value <= found.interval.high <= 1 + 1e-12


def test_estimates_without_intervals_have_a_difference_without_one():
    assert difference(Estimate(1.0), Estimate(3.0, Interval(low=2, high=4))) == Estimate(2.0)
    sound = Estimate(3.0, Interval(low=2, high=4))
    assert ratio(Estimate(2.0, Interval(low=0, high=4)), sound).interval is None
    assert ratio(Estimate(2.0, Interval(low=1, high=-4)), sound).interval is None


def test_millijoules_have_the_interval_over_the_visits_or_that_of_an_older_report():
    raw = energy(1.5, watts=60.0)
    found = millijoules(Energy.model_validate(raw))
    assert found.value == raw["joules_per_sample"] * 1e3
    assert found.interval == Interval(low=raw["joules_low"] * 1e3, high=raw["joules_high"] * 1e3)
    older = Energy.model_validate(raw | {"joules_low": None, "joules_high": None, "visits": 1, "watts_high": 66.0})
    assert millijoules(older).interval.high == pytest.approx(found.value * 1.1)
    assert millijoules(older.model_copy(update={"watts_low": None})) == Estimate(found.value)


def test_the_intervals_cover_the_truth_in_19_of_20_pairs():
    """Lognormal figures with lopsided intervals of their own: difference and ratio are covered as often as stated."""
    rng = np.random.default_rng(0)
    truths, spreads, trials = (2.0, 3.0), (0.05, 0.1), 2000
    hits = np.zeros(2)
    for _ in range(trials):
        drawn = [
            Estimate(value, Interval(low=value * np.exp(-1.96 * spread), high=value * np.exp(1.96 * spread)))
            for truth, spread in zip(truths, spreads, strict=True)
            for value in [truth * np.exp(spread * rng.standard_normal())]
        ]
        for index, (found, truth) in enumerate(((difference(*drawn), 1.0), (ratio(*drawn), 1.5))):
            hits[index] += found.interval.low <= truth <= found.interval.high
    assert np.all((hits / trials > 0.935) & (hits / trials < 0.965))


def test_what_slows_down_both_rows_of_a_round_cancels_in_their_ratio():
    rng = np.random.default_rng(8)
    slower = rng.choice([1.0, 2.0], 20)
    base, other = (
        latency([(factor * rng.normal(ms, 0.01, 30)).tolist() for factor in slower], "wall") for ms in (8, 4)
    )
    found = times_faster(base, other)
    assert found.interval.low <= found.value <= found.interval.high
    assert (found.interval.low, found.interval.high) == (pytest.approx(2.0, rel=0.05), pytest.approx(2.0, rel=0.05))
    assert found.value == pytest.approx(2.0, rel=0.01)
    apart = ratio(Estimate(other.p50_ms, other.intervals["p50"]), Estimate(base.p50_ms, base.intervals["p50"]))
    assert apart.interval.low < 1 < found.interval.low  # as two runs on such a machine they would not differ


def test_rows_of_older_reports_are_compared_as_independent_ones():
    base, other = (latency([[ms * 0.99, ms, ms * 1.01]] * 20, "wall") for ms in (8.0, 4.0))
    older = base.model_copy(update={"rounds": []})
    assert times_faster(older, other) == ratio(
        Estimate(4.0, other.intervals["p50"]), Estimate(8.0, base.intervals["p50"])
    )
