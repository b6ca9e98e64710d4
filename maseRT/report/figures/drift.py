"""The drift ladder: how the metric and the outputs change on the way from the float model to the engine."""

from __future__ import annotations

import math
from collections.abc import Sequence

from maseRT.report.figures.figure import Figure
from maseRT.report.figures.metric import metric_axis, metric_heading, scaled
from maseRT.report.figures.style import axis, escaped, layout
from maseRT.report.schema import Rung, Task
from maseRT.report.wording import decibels, significant


def drift_ladder(rungs: Sequence[Rung], task: Task) -> list[Figure]:
    """Return the primary metric along the ladder, and the SQNR of each rung; nothing for fewer than two rungs."""
    if len(rungs) < 2:
        return []
    noisy = [rung for rung in rungs if rung.agreement.sqnr_db is not None]
    return [_metric_along(rungs, task), *([_sqnr_of(noisy)] if noisy else [])]


def _metric_along(rungs: Sequence[Rung], task: Task) -> Figure:
    metric = {rungs[0].source: rungs[0].metric_before, **{rung.target: rung.metric_after for rung in rungs}}
    values = {row: scaled(value, task) for row, value in metric.items() if math.isfinite(value)}
    fell = {rung.target for rung in rungs if not rung.holds}
    trace = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [escaped(row) for row in values],
        "y": list(values.values()),
        "line": {"color": "var(--accent)", "width": 2},
        "marker": {
            "size": 11,
            "symbol": ["x" if row in fell else "circle" for row in values],
            "color": ["var(--bad)" if row in fell else "var(--accent)" for row in values],
        },
        "hovertemplate": "%{x}: %{y:.4g}<extra></extra>",
    }
    return Figure(
        key="figure-drift",
        title=f"{metric_heading(task)} along the ladder",
        alt="; ".join(f"{row} {significant(value)}" for row, value in values.items()),
        data=[trace],
        layout=layout(
            xaxis=axis("", type="category"), yaxis=metric_axis(task, list(values.values())), showlegend=False
        ),
        height=300,
    )


def _sqnr_of(rungs: Sequence[Rung]) -> Figure:
    trace = {
        "type": "bar",
        "x": [f"to {escaped(rung.target)}" for rung in rungs],
        "y": [rung.agreement.sqnr_db for rung in rungs],
        "text": [decibels(rung.agreement.sqnr_db) for rung in rungs],
        "textposition": "outside",
        "cliponaxis": False,
        "marker": {
            "color": ["var(--accent)" if rung.holds else "var(--bad)" for rung in rungs],
            "pattern": {"shape": ["" if rung.holds else "/" for rung in rungs]},
        },
        "hoverinfo": "skip",
    }
    return Figure(
        key="figure-sqnr",
        title="Signal over noise of each rung",
        alt="; ".join(f"{rung.source} to {rung.target} {decibels(rung.agreement.sqnr_db)}" for rung in rungs),
        data=[trace],
        layout=layout(xaxis=axis("", type="category"), yaxis=axis("SQNR, dB", rangemode="tozero"), showlegend=False),
        height=300,
    )
