"""report.md and the console's table hold the report's figures."""

import pytest
import reports
from reports import make

from maseRT.report.drift import falls
from maseRT.report.html import html
from maseRT.report.markdown import console_table, markdown, markdown_table


def test_the_console_shows_what_the_ancestor_s_table_did():
    header, *rows = console_table(make(reports.vgg7()))
    assert header == (
        "what", "accuracy %", "precision %", "recall %", "F1 %", "loss", "p50 ms", "p99 ms", "device ms", "samples/s",
        "W", "mJ", "MB",
    )  # fmt: skip
    (engine,) = (row for row in rows if row[0] == "tensorrt-int8")
    assert engine[1] == "93.02"
    assert engine[5:] == ("0.247", "0.360", "0.429", "0.295", "175,920", "398", "2.25", "14.4")


def test_empty_columns_are_left_out_and_rows_that_did_not_run_stay():
    header, *rows = console_table(make(reports.digits()))
    assert "device ms" not in header
    assert rows[-1][0] == "tensorrt-rtx-int8"
    assert set(rows[-1][1:-1]) == {""}


def test_other_tasks_have_their_own_metrics():
    header, first, *_ = console_table(make(reports.regression()))
    assert header[1:5] == ("MSE", "MAE", "R²", "loss")
    assert first[1:3] == ("0.2512", "0.3911")


def launch_bound(name):
    raw = reports.vgg7()
    (found,) = (row for row in raw["rows"] if row["name"] == name)
    found["timings"][0]["device"]["waited"] = 0.97
    return make(raw)


def test_a_device_that_waits_for_the_host_is_seen_beside_its_time():
    report = launch_bound("onnxruntime-int8")
    header, *rows = console_table(report)
    place = header.index("device ms")
    assert {row[0]: row[place] for row in rows if row[place].startswith("≤")} == {"onnxruntime-int8": "≤1.58"}
    text = markdown(report)
    assert "| ≤1.58 |" in text
    assert "Launch-bound at batch 64: onnxruntime-int8; the device waits for the host" in text
    assert "; launch-bound at batch 64: the device waits for the host, its own time is less" in text
    assert "aunch-bound" not in markdown(make(reports.vgg7()))


def test_all_rows_of_the_console_are_as_long_as_its_header():
    for raw in (reports.bare(), reports.nothing_ran(), reports.huge()):
        assert len({len(row) for row in console_table(make(raw))}) == 1


def test_a_table_without_figures_is_no_table():
    raw = reports.nothing_ran()
    raw["rows"] = [{**row, "size_bytes": 0} for row in raw["rows"] if row.get("not_run")]
    assert console_table(make(raw)) == []


def test_a_pull_request_gets_what_matters_first():
    text = markdown(make(reports.vgg7()))
    parts = ["**TensorRT INT8 is", "## Gates", "## What the self-audit found", "| what |", "## Drift", "## Not run"]
    places = [text.index(part) for part in [*parts, "## Sensitivity", "<summary>Method", "<summary>Config"]]
    assert places == sorted(places)
    assert "**failed**: min_speedup of tensorrt-int8, asked at least 6x torch-fp32, got 5.50x" in text
    assert "| tensorrt-int8 | 93.02 | −0.10 (−0.16 to −0.04) |" in text
    assert "0.360 (0.359–0.362)" in text
    assert "part at feature_layers.6 (SQNR 19.2 dB, the first after feature_layers.3)" in text
    assert "- analyze.drift.accuracy_drop = 0.02" in text


def test_a_step_of_the_ladder_that_falls_says_which_limits_it_misses():
    report = make(reports.vgg7())
    (fallen,) = [rung for rung in report.drift if not rung.holds]
    parted = "their outputs part at feature_layers.6 (SQNR 19.2 dB, the first after feature_layers.3)"
    (told,) = falls(report)
    assert told.startswith(f"{fallen.source} -> {fallen.target} falls; {parted}")
    spoiled = fallen.model_copy(update={"short": ["a < b", "c"]})
    report = report.model_copy(update={"drift": [spoiled, *[rung for rung in report.drift if rung.holds]]})
    (told,) = falls(report)
    assert told.startswith(f"{fallen.source} -> {fallen.target} falls: a < b; c; {parted}")
    assert "falls: a &lt; b; c;" in markdown(report)
    assert "falls: a &lt; b; c;" in html(report)


def test_how_often_a_batch_was_timed_is_told_as_what_it_is_a_least():
    raw = reports.vgg7()
    assert "- timed: 400 calls in 20 rounds" in markdown(make(raw))
    for row in raw["rows"]:
        if row.get("method"):
            row["method"]["seconds"] = 0.5
    assert "- timed: at least 400 calls and 0.5 s on the clock, in 20 rounds" in markdown(make(raw))


def test_sections_without_data_are_left_out():
    text = markdown(make(reports.bare()))
    assert not [part for part in ("## Gates", "## Drift", "## Not run", "self-audit") if part in text]


def test_hostile_names_stay_text():
    raw = reports.digits()
    raw["rows"][-1]["not_run"] = "<script>alert(1)</script> | a\nb"
    text = markdown(make(raw))
    assert "<script>" not in text
    assert "&lt;script>alert(1)&lt;/script> \\| a b" in text


def test_no_text_of_a_report_becomes_markup():
    """Whatever stands in it: a report may be another person's."""

    def evil(value):
        if isinstance(value, dict):
            return {key: evil(one) for key, one in value.items()}
        if isinstance(value, list):
            return [evil(one) for one in value]
        return f"{value}<b>" if isinstance(value, str) else value

    raw = reports.digits()
    told = ("run", "verdict", "notes", "samples", "machine", "config", "precision")
    text = markdown(make(raw | {key: evil(raw[key]) for key in told if key in raw}))
    assert "&lt;b>" in text
    assert "<b>" not in text


def test_cells_of_a_table_are_escaped():
    assert markdown_table([("a", "b"), ("x|y", "<i>")]) == ["| a | b |", "| --- | ---: |", "| x\\|y | &lt;i> |"]


@pytest.mark.parametrize("raw", [reports.digits(), reports.vgg7(), reports.huge()])
def test_it_is_short(raw):
    assert len(markdown(make(raw))) < 12_000
