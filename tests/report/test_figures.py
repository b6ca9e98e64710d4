"""Figures are valid Plotly and hold the report's numbers."""

import json
import re
from itertools import chain

import plotly.graph_objects
import pytest
import reports
from reports import make

from maseRT.report.figures.calibration import MOST_BARS, histograms
from maseRT.report.figures.confusion import confusion
from maseRT.report.figures.learning import learning
from maseRT.report.figures.metric import padded_range
from maseRT.report.figures.page import page_figures
from maseRT.report.figures.precision import precision_strip
from maseRT.report.figures.style import log_axis
from maseRT.report.figures.throughput import throughput
from maseRT.report.figures.trade_offs import pareto, trade_offs
from maseRT.report.schema import HistogramStrip


def every_figure(report):
    return list(chain.from_iterable(page_figures(report).values()))


def trace_with(figure, **wanted):
    """Return the one trace of a figure that has these values."""
    (found,) = [trace for trace in figure.data if wanted.items() <= trace.items()]
    return found


@pytest.mark.parametrize("make_raw", [reports.digits, reports.vgg7, reports.regression, reports.nothing_ran])
def test_plotly_accepts_every_figure(make_raw):
    figures = every_figure(make(make_raw()))
    assert figures
    for figure in figures:
        spec = json.loads(re.sub(r"var\(--[a-z0-9-]+\)", "#123456", json.dumps(figure.spec(), allow_nan=False)))
        for choice in spec["choices"] or [{"data": spec["data"], "layout": {}}]:
            plotly.graph_objects.Figure(data=choice["data"], layout={**spec["layout"], **choice["layout"]})


def test_the_trade_off_has_a_point_for_every_timed_row():
    report = make(reports.vgg7())
    latency, energy = trade_offs(report)
    points = {trace["name"]: trace for trace in latency.data if trace["mode"] == "markers"}
    assert set(points) == {row.name for row in report.rows if row.timings}
    timing = report.timing("tensorrt-int8", 64)
    assert points["tensorrt-int8"]["x"] == [timing.end_to_end.p50_ms]
    assert points["tensorrt-int8"]["y"] == [100 * report.row("tensorrt-int8").metrics.values["accuracy"]]
    (engine,) = (trace for trace in energy.data if trace["name"] == "tensorrt-int8")
    assert engine["x"] == [pytest.approx(2.251)]
    assert engine["error_x"]["array"] == [pytest.approx(2.251 * 0.02)]


def test_ticks_of_a_logarithmic_axis_are_labelled_in_full():
    axis = log_axis("ms", [0.026, 0.32])
    told = dict(zip(axis["tickvals"], axis["ticktext"], strict=True))
    assert [told[each] for each in told if 0.015 < each < 0.6] == ["0.02", "0.05", "0.1", "0.2", "0.5"]
    wide = log_axis("samples/s", [900.0, 3e6])
    assert [text for tick, text in zip(wide["tickvals"], wide["ticktext"], strict=True) if 1e3 <= tick <= 1e6] == [
        "1k", "10k", "100k", "1M",
    ]  # fmt: skip


@pytest.mark.parametrize("values", [[1e-310, 1e308], [5e-324, 5e-324], []])
def test_a_logarithmic_axis_survives_what_somebody_wrote_into_a_report(values):
    assert log_axis("ms", values)["type"] == "log"


def test_the_axis_of_the_metric_holds_its_intervals():
    raw = reports.vgg7()
    row = next(row for row in raw["rows"] if row["name"] == "onnxruntime-int8")
    row["difference"]["interval"] = {"low": row["difference"]["value"] - 0.2, "high": row["difference"]["value"] + 0.05}
    (figure, *_) = trade_offs(make(raw))
    low, high = figure.layout["yaxis"]["range"]
    (trace,) = [trace for trace in figure.data if trace["name"] == "onnxruntime-int8"]
    assert low < trace["y"][0] - trace["error_y"]["arrayminus"][0] == pytest.approx(trace["y"][0] - 20)
    assert high > trace["y"][0] + trace["error_y"]["array"][0] == pytest.approx(trace["y"][0] + 5)


@pytest.mark.parametrize(
    ("values", "ends"), [([11.0, 97.7], (0, 100)), ([50.0, 100.0], (32.5, 100)), ([97.0, 97.4], (96.5, 97.9))]
)
def test_an_axis_of_shares_ends_where_shares_do(values, ends):
    low, high = padded_range(values, percentage=True)
    room = 0.05 * (max(values) - min(values))
    assert ends[0] - room < low <= ends[0] < ends[1] <= high < ends[1] + room
    assert low < min(values) < max(values) < high


def test_the_front_holds_what_nothing_beats_in_both():
    points = [(3.0, 0.9), (1.0, 0.8), (2.0, 0.7), (2.5, 0.9), (1.0, 0.85)]
    assert pareto(points, higher_is_better=True) == [4, 3]
    assert pareto(points, higher_is_better=False) == [1, 2]
    assert pareto([(1.0, 1.0), (1.0, 1.0)], higher_is_better=True) == [0]


def test_the_strip_shows_what_runs_of_its_own_and_marks_what_differs():
    report = make(reports.vgg7())
    figure = precision_strip(report.precision)
    heat, labels, marks, times = (
        trace_with(figure, **wanted)
        for wanted in ({"type": "heatmap"}, {"mode": "text"}, {"name": "does not run as asked"}, {"type": "bar"})
    )
    shown = [each for each in report.precision.layers if each.verdict not in ("fused", "nothing to run")]
    assert len(heat["x"]) == len(shown)
    place = [each.name for each in shown].index("feature_layers.6")
    assert marks["x"] == [place]
    words = dict(zip(zip(labels["x"], labels["y"], strict=True), labels["text"], strict=True))
    assert [words[place, stage] for stage in range(3)] == ["16", "8", "8"]  # executed, exported, asked
    assert times["y"] == [each.ms for each in shown]


def test_histograms_lose_no_value_when_bins_are_joined():
    report = make(reports.digits())
    figure = histograms(report.calibration.histograms)
    for choice, strip in zip(figure.choices, report.calibration.histograms, strict=True):
        assert choice.name == strip.tensor
        assert sum(choice.data[0]["y"]) == sum(strip.counts)
        assert len(choice.data[0]["y"]) <= MOST_BARS
        assert choice.layout["shapes"][0]["x0"] == strip.amax


def test_empty_histograms_and_curves_draw_nothing_wrong():
    figure = histograms([HistogramStrip(tensor="t", amax=0.0, top=0.0, counts=[0, 0])])
    assert figure.choices[0].data[0]["y"] == []
    assert histograms([]) is None
    report = make(reports.digits())
    one = report.training.model_copy(update={"epochs": report.training.epochs[:1]})
    assert learning(one, report.task, key="k", title="t") == []


def test_names_are_escaped_for_plotly():
    raw = reports.digits()
    raw["precision"]["layers"][0]["name"] = "<a href='javascript:x'>conv</a>"
    text = json.dumps(precision_strip(make(raw).precision).data)
    assert "<a href" not in text
    assert "&lt;a href" in text


def test_a_diverged_model_leaves_no_nan_in_a_figure():
    raw = reports.digits()
    raw["rows"][1]["metrics"]["values"]["accuracy"] = float("nan")
    raw["drift"][0]["metric_after"] = float("nan")
    raw["training"]["epochs"][3]["validation"]["loss"] = float("nan")
    for figure in every_figure(make(raw)):
        json.dumps(figure.spec(), allow_nan=False)


def test_the_confusion_matrix_of_the_result_comes_first():
    report = make(reports.vgg7())
    figure = confusion(report)
    assert figure.choices[0].data[0]["customdata"] == report.row("tensorrt-int8").metrics.confusion
    assert figure.choices[0].name == "TensorRT INT8"


def test_throughput_needs_two_batch_sizes_and_sorts_them():
    report = make(reports.vgg7())
    assert throughput(report).data[0]["x"] == [1, 64, 256]
    one = reports.bare()
    one["rows"][0]["timings"] = one["rows"][0]["timings"][:1]
    assert throughput(make(one)) is None
