"""The primary metric against what an inference costs, with the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from maseRT.report.estimates import millijoules
from maseRT.report.figures.figure import Figure, Trace
from maseRT.report.figures.metric import metric_axis, metric_heading, scaled
from maseRT.report.figures.style import SYMBOLS, axis, escaped, layout, level_of, log_axis
from maseRT.report.schema import Interval, Report, Row, Task
from maseRT.report.wording import metric_name, metric_of, metric_value, significant


@dataclass(frozen=True)
class _Point:
    """A row in the plane.

    Attributes:
        cost: in the figure's unit.
        metric: the primary metric, scaled for the axis.
        interval: 95 % interval of the cost.
        words: the metric's name and value.
    """

    row: Row
    cost: float
    metric: float
    interval: Interval | None
    words: str


def trade_offs(report: Report) -> list[Figure]:
    """Return the primary metric against latency and against energy; each needs two rows that were measured."""
    batch = report.batch()
    timed = [(row, timing) for row in report.ran() if batch and (timing := report.timing(row.name, batch))]
    metered = [(row, row.energy) for row in report.ran() if row.energy is not None]
    latencies = _points(
        report.task,
        (
            (row, timing.end_to_end.p50_ms, timing.end_to_end.intervals.get("p50"))
            for row, timing in timed
            if timing.end_to_end.p50_ms
        ),
    )
    spent = [(row, millijoules(used)) for row, used in metered]
    energies = _points(report.task, ((row, used.value, used.interval) for row, used in spent))
    figures = []
    if len(timed) > 1 and latencies:
        title = f"median of one call at batch {batch}, ms"
        figures.append(_trade_off(report, latencies, kind="latency", title=title, unit="ms"))
    if len(metered) > 1 and energies:
        figures.append(_trade_off(report, energies, kind="energy", title="energy of one sample, mJ", unit="mJ"))
    return figures


def pareto(points: Sequence[tuple[float, float]], *, higher_is_better: bool) -> list[int]:
    """Return the indices of the (cost, metric) points that no other point beats in both, the cheapest first.

    Of points that are equal in both, the first stays.
    """
    sign = 1 if higher_is_better else -1
    order = sorted(range(len(points)), key=lambda index: (points[index][0], -sign * points[index][1], index))
    front: list[int] = []
    for index in order:
        if not front or sign * points[index][1] > sign * points[front[-1]][1]:
            front.append(index)
    return front


def _points(task: Task, costs: Iterable[tuple[Row, float, Interval | None]]) -> list[_Point]:
    """Return the points of the rows whose metric is a finite number."""
    points = []
    for row, cost, interval in costs:
        value = metric_of(row.metrics, task.primary) if row.metrics else None
        if row.metrics is not None and value is not None and math.isfinite(value):
            words = f"{metric_name(task.primary)} {metric_value(task.primary, value, row.metrics.samples)}"
            points.append(_Point(row, cost, scaled(value, task), interval, words))
    return points


def _trade_off(report: Report, points: Sequence[_Point], *, kind: str, title: str, unit: str) -> Figure:
    plane = [(point.cost, point.metric) for point in points]
    front = [points[index] for index in pareto(plane, higher_is_better=report.task.higher_is_better)]
    markers = [
        _marker(report, point, symbol=SYMBOLS[index % len(SYMBOLS)], unit=unit) for index, point in enumerate(points)
    ]
    costs = [point.cost for point in points]
    wide = min(costs) > 0 and max(costs) > 8 * min(costs)
    facts = "; ".join(f"{point.row.name} {significant(point.cost)} {unit}, {point.words}" for point in points)
    best = ", ".join(point.row.name for point in front)
    return Figure(
        key=f"figure-{kind}",
        title=f"{metric_heading(report.task)} against {kind}",
        alt=f"{facts}. No other row is better in both than: {best}.",
        data=[_front_line(front), *markers],
        layout=layout(
            xaxis=log_axis(title, costs) if wide else axis(title, type="linear", rangemode="tozero"),
            yaxis=metric_axis(report.task, [end for point in points for end in _metric_ends(point, report.task)]),
        ),
        height=360 + 11 * len(points),
    )


def _front_line(front: Sequence[_Point]) -> Trace:
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "Pareto front",
        "x": [point.cost for point in front],
        "y": [point.metric for point in front],
        "line": {"shape": "hv", "width": 1.5, "dash": "dot", "color": "var(--muted)"},
        "hoverinfo": "skip",
    }


def _marker(report: Report, point: _Point, *, symbol: str, unit: str) -> Trace:
    """Return a row's marker, with its 95 % intervals as error bars."""
    row, interval = point.row, point.interval
    name = escaped(row.name)
    cost = significant(point.cost)
    if interval is not None:
        cost += f" ({significant(interval.low)}–{significant(interval.high)})"
    trace: Trace = {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [point.cost],
        "y": [point.metric],
        "marker": {
            "symbol": symbol,
            "size": 12,
            "color": f"var(--{level_of(row.precision)})",
            "line": {"width": 1.5, "color": "var(--ink)"},
        },
        "hoverinfo": "text",
        "hovertext": [f"<b>{name}</b><br>{cost} {unit}<br>{point.words}"],
    }
    if interval is not None:
        trace["error_x"] = _error_bar(interval.high - point.cost, point.cost - interval.low)
    low, high = _metric_ends(point, report.task)
    if low < high:
        trace["error_y"] = _error_bar(high - point.metric, point.metric - low)
    return trace


def _metric_ends(point: _Point, task: Task) -> tuple[float, float]:
    """Return the ends of a row's upright bar, the 95 % interval of its change; the point itself where it has none."""
    change = point.row.difference
    if change is None or change.interval is None or change.metric != task.primary:
        return point.metric, point.metric
    down, up = change.interval.low - change.value, change.interval.high - change.value
    if not math.isfinite(up - down):  # the baseline diverged
        return point.metric, point.metric
    return point.metric + min(scaled(down, task), 0.0), point.metric + max(scaled(up, task), 0.0)


def _error_bar(up: float, down: float) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(up, 0.0)],
        "arrayminus": [max(down, 0.0)],
        "thickness": 1,
        "width": 3,
        "color": "var(--muted)",
    }
