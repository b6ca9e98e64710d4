"""Runs side by side: changes with intervals, verdicts that hold up against simulation, and refusals."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from build import regression_report, report, row

from maseRT.errors import UsageError
from maseRT.report.change import Change
from maseRT.report.compare import Comparison, compare
from maseRT.report.schema import Report

ROW = "onnxruntime-qdq"
P50 = "p50 at batch 1"


def compared(base: Report, other: Report, *, allow: bool = False) -> Comparison:
    return compare({"base": base, "other": other}, allow_different_methods=allow)


def change_of(found: Comparison, figure: str, name: str = ROW) -> Change:
    return next(change for change in found.changes if (change.row, change.figure) == (name, figure))


def spoiled(*path: Any, to: Any, name: str = ROW) -> Report:
    def spoil(raw: dict[str, Any]) -> None:
        target = row(raw, name) if name else raw
        for key in path[:-1]:
            target = target[key]
        target[path[-1]] = to

    return report(spoil=spoil)


def test_a_run_is_the_same_as_itself():
    found = compared(report(), report())
    assert {change.verdict for change in found.changes} == {"same"}
    assert not any(" -> " in line for line in found.lines())


def test_a_faster_run_is_significantly_better():
    change = change_of(compared(report(), report(speed=0.9)), P50)
    assert (change.verdict, change.better) == ("significant", True)
    assert change.change == pytest.approx(0.9)
    assert change.low < 0.9 < change.high < 1
    back = change_of(compared(report(speed=0.9), report()), P50)
    assert (back.verdict, back.better) == ("significant", False)


def test_a_change_within_the_intervals_is_noise():
    change = change_of(compared(report(), report(speed=1.005)), P50)
    assert change.verdict == "noise"
    assert change.low < 1 < change.high
    assert change.told() == "0.50 % more (0.91 % less to 1.9 % more)"


def test_a_line_says_what_changed_by_how_much_and_whether_it_counts():
    base, other = report(), report(speed=0.9)
    line = next(line for line in compared(base, other).lines() if line.startswith(f"{ROW}: p50"))
    values = [each.timing(ROW, 1).end_to_end.p50_ms for each in (base, other)]
    assert (
        line
        == f"{ROW}: p50 at batch 1 {values[0]:.4f} -> {values[1]:.4f} ms, 10 % less (8.7 to 11 %), significant, better"
    )


def test_the_table_has_a_line_per_row_and_figure():
    found = compared(report(), report(speed=0.9))
    header, *lines = found.table()
    assert header == ("row", "figure", "base", "other", "change (95 %)", "verdict")
    assert {len(line) for line in lines} == {6}
    assert len(lines) == len(found.changes)


def test_the_first_of_several_runs_is_the_base_of_all():
    reports = {"a": report(), "b": report(speed=0.9), "c": report(speed=1.2)}
    found = compare(reports, allow_different_methods=False)
    header, *lines = found.table()
    assert header == ("row", "figure", "a", "b", "change (95 %)", "verdict", "c", "change (95 %)", "verdict")
    line = next(each for each in lines if each[:2] == (ROW, f"{P50}, ms"))
    assert "less" in line[4]
    assert "more" in line[7]
    assert any(each.startswith("c: onnxruntime-qdq: p50") for each in found.lines())


def test_plain_values_are_json():
    found = compared(report(), report(speed=0.9)).as_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["base"] == "base"
    assert found["changes"][0]["row"] == "torch-fp32"


def test_size_is_counted_and_not_measured():
    change = change_of(compared(report(), spoiled("size_bytes", to=100_000)), "size")
    assert (change.verdict, change.better, change.low) == ("exact", True, None)


def test_a_launch_bound_time_is_called_so():
    def waited(raw):
        row(raw, ROW)["timings"][0]["device"]["waited"] = 1.0

    found = compared(report(device="cuda:0"), report(device="cuda:0", speed=0.9, spoil=waited))
    assert change_of(found, "p50 on the device, launch-bound at batch 1").verdict == "significant"
    assert change_of(found, "p50 on the device at batch 64").verdict == "significant"


def more_energy(factor, *, older=False):
    def spoil(raw):
        used = row(raw, ROW)["energy"]
        for name in used:
            if "joules" in name or name.startswith("watts"):
                used[name] *= factor
        if older:
            used |= {"visits": 1, "joules_low": None, "joules_high": None}

    return report(spoil=spoil)


def test_energy_is_compared_by_the_intervals_over_the_visits():
    figure = "energy per sample"
    assert change_of(compared(report(), more_energy(1.03)), figure).verdict == "noise"
    change = change_of(compared(report(), more_energy(1.06)), figure)
    assert (change.verdict, change.better) == ("significant", False)
    assert "visit" not in change.by


def test_energy_of_an_older_report_is_compared_and_the_interval_called_what_it_is():
    change = change_of(compared(more_energy(1.0, older=True), more_energy(1.06)), "energy per sample")
    assert change.verdict == "significant"
    assert "the interval of a single visit holds no change between visits" in change.by


def test_figures_without_an_interval_are_not_judged():
    changed = spoiled("metrics", "loss", to=0.7)
    assert change_of(compared(report(), changed), "loss").verdict == "not judged"


def test_rows_that_only_one_run_has_are_named():
    found = compared(report(), spoiled("not_run", to="no", name="tensorrt-int8"))
    assert not any(line.startswith("only in") for line in found.notes)

    def without(raw: dict[str, Any]) -> None:
        raw["rows"] = [each for each in raw["rows"] if each["name"] != ROW]

    found = compared(report(), report(spoil=without))
    assert f"only in base: {ROW}" in found.notes


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("threads", 8), ("device", "cuda:0"), ("hardware", "Xeon"), ("warmup", 0), ("iterations", 5), ("rounds", 1),
        ("transfers", "none"), ("cuda_graph", True), ("isolated", False), ("batch_sizes", [1]), ("seconds", 0.1),
        ("versions", {"numpy": "1.26"}),
    ],
)  # fmt: skip
def test_different_methods_are_refused_unless_told(field, value):
    other = spoiled("method", field, to=value)
    words = {"versions": "version of numpy"}.get(field, field.replace("_", " "))
    with pytest.raises(UsageError) as caught:
        compared(report(), other)
    assert f"  {words}: " in caught.value.what
    assert ROW in caught.value.what
    assert "--allow-different-methods" in caught.value.fix
    found = compared(report(), other, allow=True)
    assert len(found.differences) == 1
    assert found.lines()[0] == f"different: {found.differences[0]}"


def test_a_report_that_does_not_tell_the_seconds_can_be_compared():
    assert compared(report(), spoiled("method", "seconds", to=None)).differences == ()


def test_a_difference_that_all_rows_share_is_told_once():
    def slower(raw: dict[str, Any]) -> None:
        for each in raw["rows"]:
            if "method" in each:
                each["method"]["threads"] = 1

    (difference,) = compared(report(), report(spoil=slower), allow=True).differences
    assert difference.startswith("threads: 2 in base, 1 in other (torch-fp32, onnxruntime-fp32")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("sha256", "b" * 64, "samples (sha256): aaaaaaaaaaaa... in base, bbbbbbbbbbbb... in other"),
        ("split", "validation", "split: test in base, validation in other"),
        ("data", "cifar10", "data: digits in base, cifar10 in other"),
    ],
)
def test_other_samples_are_refused_and_their_metrics_never_compared(field, value, words):
    other = spoiled("samples", field, to=value, name="")
    with pytest.raises(UsageError) as caught:
        compared(report(), other)
    assert words in caught.value.what
    found = compared(report(), other, allow=True)
    assert {change.figure for change in found.changes}.isdisjoint({"accuracy", "f1", "loss"})
    assert change_of(found, P50).verdict == "same"
    assert any("not compared" in note for note in found.notes)


def test_there_must_be_two_runs_with_a_row_in_common():
    with pytest.raises(UsageError, match="nothing to compare"):
        compare({"one": report()}, allow_different_methods=False)

    def renamed(raw: dict[str, Any]) -> None:
        for each in raw["rows"]:
            each["name"] = f"other-{each['name']}"

    with pytest.raises(UsageError, match="no row ran in both"):
        compared(report(), report(spoil=renamed))


def test_accuracy_with_one_baseline_is_compared_through_the_paired_differences():
    base, other = report(), report(seed=3)
    change = change_of(compared(base, other), "accuracy")
    assert "paired" in change.by
    ends = [each.row(ROW).difference.interval for each in (base, other)]
    half = [(each.high - each.low) / 2 for each in ends]
    assert change.high - change.low == pytest.approx(2 * np.hypot(*half))


def test_accuracy_of_another_baseline_takes_newcombes_interval():
    base, other = report(), report(seed=3)
    retrained = other.model_copy(
        update={"rows": [other.rows[0].model_copy(update={"sha256": "e" * 64}), *other.rows[1:]]}
    )
    change, paired = (change_of(compared(base, each), "accuracy") for each in (retrained, other))
    assert "Newcombe" in change.by
    assert change.high - change.low > paired.high - paired.low
    assert change.change == pytest.approx(paired.change)


def test_where_less_is_better_more_is_worse():
    base, raw = regression_report(), regression_report().model_dump()
    changed = row(raw, ROW)
    changed["metrics"]["values"]["mse"] += 0.1
    changed["difference"]["value"] += 0.1
    changed["difference"]["interval"] = {key: end + 0.1 for key, end in changed["difference"]["interval"].items()}
    change = change_of(compared(base, Report.model_validate(raw)), "mse")
    assert (change.verdict, change.better) == ("significant", False)
