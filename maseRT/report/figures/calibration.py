"""Calibration: the calibrators compared, and the histogram of each tensor with the range that was chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from maseRT.report.figures.figure import Choice, Figure, Trace
from maseRT.report.figures.metric import metric_axis, padded_range, scaled
from maseRT.report.figures.style import axis, escaped, layout
from maseRT.report.schema import Calibration, CalibratorResult, HistogramStrip, Task
from maseRT.report.wording import decibels, metric_of, metric_value, percent, significant

MOST_BARS = 128
"""Bars of a histogram; neighbouring bins are merged down to this number."""


def calibrators(calibration: Calibration, task: Task) -> Figure | None:
    """Return the primary metric of each calibrator, beside its mean SQNR where one is known.

    None for fewer than two calibrators with a finite metric.
    """
    found = [
        (each, value)
        for each in calibration.methods
        if (value := metric_of(each.metrics, task.primary)) is not None and math.isfinite(value)
    ]
    if len(found) < 2:
        return None
    methods = [method for method, _ in reversed(found)]  # Plotly draws the first category at the bottom
    values = [scaled(value, task) for _, value in reversed(found)]
    noise = [each.mean_sqnr_db for each in methods]
    known = [value for value in noise if value is not None]
    traces = [_dots(methods, values, axis_name="x", hover="%{x:.4g}")]
    axes = {"xaxis": {**metric_axis(task, values), "domain": [0, 0.47 if known else 1], "nticks": 4}}
    if known:
        traces.append(_dots(methods, noise, axis_name="x2", hover="%{x:.1f} dB"))
        ends = padded_range(known, percentage=False)
        axes["xaxis2"] = axis("mean SQNR, dB", domain=[0.53, 1], range=ends, anchor="y", nticks=4)
    return Figure(
        key="figure-calibrators",
        title="Calibrators on validation",
        alt=f"{'; '.join(_in_words(method, value, task) for method, value in found)}.",
        data=traces,
        layout=layout(**axes, yaxis=axis("", type="category"), showlegend=False),
        height=130 + 34 * len(methods),
        min_width=460 if known else 0,
    )


def _dots(methods: Sequence[CalibratorResult], values: Sequence[float | None], *, axis_name: str, hover: str) -> Trace:
    return {
        "type": "scatter",
        "mode": "markers",
        "x": list(values),
        "y": [f"{escaped(each.name)}{' ✓' if each.chosen else ''}" for each in methods],
        "xaxis": axis_name,
        "marker": {
            "size": 13,
            "symbol": ["circle" if each.chosen else "circle-open" for each in methods],
            "color": "var(--accent)",
            "line": {"width": 2, "color": "var(--accent)"},
        },
        "hovertemplate": f"%{{y}}: {hover}<extra></extra>",
    }


def _in_words(method: CalibratorResult, value: float, task: Task) -> str:
    metric = f"{method.name} {metric_value(task.primary, value, method.metrics.samples)}"
    noise = f", {decibels(method.mean_sqnr_db)}" if method.mean_sqnr_db is not None else ""
    return f"{metric}{noise}{', chosen' if method.chosen else ''}"


def histograms(strips: Sequence[HistogramStrip]) -> Figure | None:
    """Return one figure with a selector: each tensor's histogram, and the range that was chosen for it."""
    if not strips:
        return None
    return Figure(
        key="figure-histograms",
        title="Histograms and the chosen ranges",
        alt=f"Histograms of the magnitudes of {len(strips)} tensors, each with its chosen range; pick one in the list.",
        data=[],
        layout=layout(
            xaxis=axis("magnitude |x|"),
            yaxis=axis("values", type="log", dtick=1, exponentformat="SI"),
            showlegend=False,
            bargap=0,
        ),
        height=340,
        choices=tuple(_histogram(strip) for strip in strips),
        choose="Tensor",
    )


def _histogram(strip: HistogramStrip) -> Choice:
    """Return a tensor's histogram, up to the last bin that is not empty."""
    used = max((index + 1 for index, count in enumerate(strip.counts) if count), default=0)
    merged = max(1, math.ceil(used / MOST_BARS))
    bin_width = strip.top / len(strip.counts) if strip.counts else 0.0
    bar_width = bin_width * merged
    trace = {
        "type": "bar",
        "x0": bar_width / 2,
        "dx": bar_width,
        "y": [sum(strip.counts[start : start + merged]) for start in range(0, used, merged)],
        "width": bar_width,
        "marker": {"color": "var(--accent)", "line": {"width": 0}},
        "hovertemplate": "%{x:.4g}: %{y:,} values<extra></extra>",
    }
    end = 1.03 * max(strip.amax, used * bin_width) or 1.0
    return Choice(strip.tensor, [trace], {"xaxis": axis("magnitude |x|", range=[0, end]), **_range_mark(strip, end)})


def _range_mark(strip: HistogramStrip, end: float) -> dict[str, Any]:
    """Return the line and the label that mark the chosen range; the label is on the side with more room up to `end`."""
    clipped = strip.clipped_share()
    told = f"{percent(clipped, 2)} clipped" if clipped else "nothing clipped"
    side, shift = ("right", -6) if strip.amax > 0.5 * end else ("left", 6)
    line = {"color": "var(--range)", "width": 2}
    return {
        "shapes": [
            {"type": "line", "x0": strip.amax, "x1": strip.amax, "yref": "paper", "y0": 0, "y1": 1, "line": line}
        ],
        "annotations": [
            {
                "x": strip.amax,
                "yref": "paper",
                "y": 1,
                "xanchor": side,
                "yanchor": "top",
                "xshift": shift,
                "showarrow": False,
                "text": f"range {significant(strip.amax)}<br>{told}",
                "align": side,
                "font": {"color": "var(--ink)"},
                "bgcolor": "var(--card)",
            }
        ],
    }
