"""Numbers as people read them."""

import pytest

from maseRT.report.schema import Interval
from maseRT.report.wording import (
    change_interval,
    duration,
    is_share,
    measured,
    metric_change,
    metric_value,
    moment,
    names,
    percent,
    significant,
    size,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.23456, "1.23"), (0.0012345, "0.00123"), (123.4, "123"), (23392.4, "23,392"), (0, "0"), (-1.5, "−1.50"),
        (9.996, "10.0"), (0.09996, "0.100"), (999.6, "1,000"), (3.1e-7, "3.10e-07"), (-3.1e-7, "−3.10e-07"),
        (float("nan"), "not a number"), (float("inf"), "infinite"),
    ],
)  # fmt: skip
def test_three_digits_are_shown(value, text):
    assert significant(value) == text


def test_an_interval_stands_in_brackets_with_digits_that_tell_its_ends_apart():
    assert measured(1.23, Interval(low=1.2, high=1.27), "ms") == "1.23 (1.20–1.27) ms"
    assert measured(0.74541, Interval(low=0.74522, high=0.74549)) == "0.7454 (0.7452–0.7455)"
    assert measured(2.0, None) == "2.00"


def test_shares_are_percent_and_points_and_other_metrics_are_not():
    assert metric_value("accuracy", 0.98519, 270) == "98.5 %"
    assert metric_value("top5", 0.98519, 50_000) == "98.52 %"
    assert metric_value("perplexity", 12.3456, 270) == "12.35"
    assert metric_change("accuracy", -0.0037, 270) == "−0.4 points"
    assert metric_change("accuracy", -0.0001, 270) == "−0.01 points"
    assert metric_change("accuracy", 1e-9, 270) == "0 points"
    assert metric_change("mse", 0.5, 270) == "+0.50"
    assert change_interval("accuracy", Interval(low=-0.015, high=0.004), 270) == "−1.5 to +0.4"


def test_only_all_is_100_percent_and_only_nothing_0():
    assert percent(1.0, 2) == "100.00 %"
    assert percent(0.999999, 2) == "99.99 %"
    assert percent(0.5) == "50.0 %"
    assert percent(1e-6, 2) == "under 0.01 %"
    assert percent(0.0) == "0.0 %"


def test_sizes_and_durations_have_the_unit_that_fits():
    assert size(94408) == "94.4 kB"
    assert size(14_411_000) == "14.4 MB"
    assert size(12) == "12 bytes"
    assert duration(131) == "2 min 11 s"
    assert duration(3725) == "1 h 2 min"
    assert duration(0.5) == "0.50 s"


def test_names_read_as_a_sentence():
    assert names(["a"]) == "a"
    assert names(["a", "b"]) == "a and b"
    assert names(["a", "b", "c", "d"]) == "a, b and 2 more"
    assert names([]) == ""


def test_metrics_between_0_and_1_are_told_by_their_names():
    names = ("accuracy", "top5", "top-1", "f1_macro", "mean_iou", "exact_match", "average_precision", "mAP")
    assert [name for name in names if not is_share(name)] == []
    names = ("perplexity", "rmse", "topology", "mean_average_error", "accuracy_loss", "r2", "mapping", "5")
    assert [name for name in names if is_share(name)] == []


def test_a_moment_is_told_in_utc_to_the_minute():
    assert moment("2026-01-31T18:25:19+00:00") == "2026-01-31 18:25 UTC"
    assert moment("2026-01-31T18:25:19+02:00") == "2026-01-31 16:25 UTC"
    assert moment("yesterday") == "yesterday"
