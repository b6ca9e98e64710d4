"""What other runs would find: never less than launches differ, and as far as rounds do."""

import numpy as np
import pytest
from scipy import stats

from maseRT.spread import BETWEEN_LAUNCHES, between_runs, paired_error, t_quantile


def test_rounds_that_differ_like_launches_or_less_add_nothing():
    rng = np.random.default_rng(1)
    assert between_runs([3.0] * 20) == BETWEEN_LAUNCHES
    assert between_runs(rng.lognormal(0, 0.005, 20).tolist()) == BETWEEN_LAUNCHES
    assert between_runs([1.0, 2.0, 3.0]) == BETWEEN_LAUNCHES  # too few to tell
    assert between_runs([3.0] * 20, launches=2) == pytest.approx(BETWEEN_LAUNCHES * 2**0.5)


def test_rounds_that_differ_more_tell_of_other_runs():
    times = np.random.default_rng(2).lognormal(0, 0.2, 2000).tolist()
    assert between_runs(times) == pytest.approx(0.2, rel=0.05)
    assert between_runs([1000 * time for time in times]) == pytest.approx(between_runs(times))


def test_an_accident_in_one_round_tells_nothing_of_other_runs():
    assert between_runs([3.0] * 19 + [9.0]) == BETWEEN_LAUNCHES


def test_the_error_of_a_paired_ratio():
    ratios = np.exp(0.02 * stats.norm.ppf(np.linspace(0.025, 0.975, 20))).tolist()
    mean = stats.t.ppf(0.975, 19) * np.log(ratios).std(ddof=1) / np.sqrt(20)
    assert paired_error(ratios) == pytest.approx(np.hypot(mean, 1.96 * between_runs(ratios, launches=2)), rel=1e-3)
    assert paired_error([2.0] * 20) == pytest.approx(1.96 * 2**0.5 * BETWEEN_LAUNCHES, rel=1e-3)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 19, 100])
def test_students_quantiles(freedom):
    assert t_quantile(0.975, freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=2e-3)
