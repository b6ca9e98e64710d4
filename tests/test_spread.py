"""What other runs would find: never less than launches differ, and as far as rounds do."""

import numpy as np
import pytest
from scipy import stats

from maseRT.spread import BETWEEN_LAUNCHES, between_runs, mean_error, t_quantile


def test_rounds_that_differ_like_launches_or_less_add_nothing():
    rng = np.random.default_rng(1)
    assert between_runs([3.0] * 20) == BETWEEN_LAUNCHES
    assert between_runs(rng.lognormal(0, 0.005, 20).tolist()) == BETWEEN_LAUNCHES
    assert between_runs([1.0, 2.0, 3.0]) == BETWEEN_LAUNCHES  # too few to tell


def test_rounds_that_differ_more_tell_of_other_runs():
    times = np.random.default_rng(2).lognormal(0, 0.2, 2000).tolist()
    assert between_runs(times) == pytest.approx(0.2, rel=0.05)
    assert between_runs([1000 * time for time in times]) == pytest.approx(between_runs(times))


def test_an_accident_in_one_round_tells_nothing_of_other_runs():
    assert between_runs([3.0] * 19 + [9.0]) == BETWEEN_LAUNCHES


def test_the_error_of_a_mean_is_students():
    values = np.random.default_rng(3).normal(5, 2, 20).tolist()
    low, high = stats.t.interval(0.95, 19, loc=np.mean(values), scale=stats.sem(values))
    assert mean_error(values) == pytest.approx((high - low) / 2, rel=1e-3)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 19, 100])
def test_students_quantiles(freedom):
    assert t_quantile(0.975, freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=2e-3)
