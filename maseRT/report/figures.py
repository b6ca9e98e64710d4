"""The report's figures as Plotly JSON: plain dictionaries, drawn in the browser.

Colours stand as "var(--name)", the page's own; its script puts in the colours of the light or the dark page.
Names are escaped, as Plotly reads a little HTML in texts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from maseRT.report.schema import (
    Calibration,
    CalibratorResult,
    HistogramStrip,
    Learning,
    Precision,
    Report,
    Row,
    Rung,
    Task,
    Timing,
)
from maseRT.report.wording import (
    decibels,
    is_share,
    metric_name,
    metric_of,
    metric_value,
    percent,
    row_title,
    significant,
)

Trace = dict[str, Any]

BINS = 128
"""Bars of a histogram; calibration's bins are joined to no more than these."""

_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "star", "cross", "hexagon", "triangle-down", "x", "pentagon")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_LEVELS = ("int8", "fp8", "fp16", "bf16", "fp32", "mixed", "unknown")
_SHORT = {"int8": "8", "fp8": "f8", "fp16": "16", "bf16": "b16", "fp32": "32", "mixed": "mix", "unknown": "?"}
_LABELLED = 48
_COUNTED = 15


@dataclass(frozen=True)
class Choice:
    """One of several things that a figure can show: what replaces its traces, and goes over its layout."""

    name: str
    data: list[Trace]
    layout: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Figure:
    """A figure.

    Attributes:
        key: its id in the page.
        title: its heading.
        alt: what it shows, in words, for those who do not see it.
        height: in pixels.
        min_width: in pixels; a narrower page scrolls the figure in its own box.
        choices: where there is a selector; the first is shown at first. `data` is empty then.
        choose: the selector's label.
    """

    key: str
    title: str
    alt: str
    data: list[Trace]
    layout: dict[str, Any]
    height: int = 360
    min_width: int = 0
    choices: tuple[Choice, ...] = ()
    choose: str = ""

    def spec(self) -> dict[str, Any]:
        """Return what the page's script draws."""
        first = self.choices[0] if self.choices else None
        return {
            "data": first.data if first else self.data,
            "layout": {**self.layout, **(first.layout if first else {}), "height": self.height},
            "choices": [{"data": choice.data, "layout": choice.layout} for choice in self.choices],
        }


def trade_offs(report: Report) -> list[Figure]:
    """Return the primary metric against latency, and against energy where it was measured, with the Pareto fronts."""
    batch = report.batch()
    metric = report.task.primary
    speed = [(row, timing) for row in report.ran() if batch and (timing := report.timing(row.name, batch))]
    energy = [(row, row.energy) for row in report.ran() if row.energy is not None]
    found = []
    if len(speed) > 1:
        points = [
            _Point(row, timing.end_to_end.p50_ms, *_ends(timing)) for row, timing in speed if timing.end_to_end.p50_ms
        ]
        found.append(_trade_off(report, points, "latency", f"median of one call at batch {batch}, ms", "ms"))
    if len(energy) > 1:
        points = [_Point(row, 1e3 * used.joules_per_sample) for row, used in energy]
        found.append(_trade_off(report, points, "energy", "energy of one sample, mJ", "mJ"))
    return [figure for figure in found if figure.data and metric]


@dataclass(frozen=True)
class _Point:
    row: Row
    cost: float
    low: float | None = None
    high: float | None = None


def pareto(points: Sequence[tuple[float, float]], *, higher_is_better: bool) -> list[int]:
    """Return the indices of the (cost, metric) points that no other beats in both, the cheapest first.

    Of points that are equal in both, the first stays.
    """
    sign = 1 if higher_is_better else -1
    order = sorted(range(len(points)), key=lambda index: (points[index][0], -sign * points[index][1], index))
    front: list[int] = []
    for index in order:
        if not front or sign * points[index][1] > sign * points[front[-1]][1]:
            front.append(index)
    return front


def _trade_off(report: Report, points: Sequence[_Point], kind: str, title: str, unit: str) -> Figure:
    task = report.task
    known = [(point, value) for point in points if math.isfinite(value := _primary(point.row, task.primary))]
    factor = 100 if is_share(task.primary) else 1
    plane = [(point.cost, factor * value) for point, value in known]
    front = pareto(plane, higher_is_better=task.higher_is_better)
    traces = [
        _point_trace(report, point, cost, value, _SYMBOLS[index % len(_SYMBOLS)], unit)
        for index, ((point, _), (cost, value)) in enumerate(zip(known, plane, strict=True))
    ]
    line = {
        "type": "scatter",
        "mode": "lines",
        "name": "Pareto front",
        "x": [plane[index][0] for index in front],
        "y": [plane[index][1] for index in front],
        "line": {"shape": "hv", "width": 1.5, "dash": "dot", "color": "var(--muted)"},
        "hoverinfo": "skip",
    }
    best = ", ".join(known[index][0].row.name for index in front)
    name = metric_name(task.primary)
    costs = [cost for cost, _ in plane]
    wide = bool(costs) and min(costs) > 0 and max(costs) > 8 * min(costs)
    layout = _layout(
        xaxis=_axis(title, type="log" if wide else "linear", **({"dtick": "D2"} if wide else {"rangemode": "tozero"})),
        yaxis=_metric_axis(task, [value for _, value in plane]),
    )
    facts = "; ".join(
        f"{point.row.name} {significant(cost)} {unit}, {_shown(point.row, task)}"
        for (point, _), (cost, _) in zip(known, plane, strict=True)
    )
    return Figure(
        key=f"figure-{kind}",
        title=f"{name[0].upper()}{name[1:]} against {kind}",
        alt=f"{facts}. No other row is better in both than: {best}.",
        data=[line, *traces] if traces else [],
        layout=layout,
        height=360 + 11 * len(traces),
    )


def _point_trace(report: Report, point: _Point, cost: float, value: float, symbol: str, unit: str) -> Trace:
    row = point.row
    interval = None
    trace: Trace = {
        "type": "scatter",
        "mode": "markers",
        "name": escape(row.name, quote=False),
        "x": [cost],
        "y": [value],
        "marker": {
            "symbol": symbol,
            "size": 12,
            "color": f"var(--{_level(row.precision)})",
            "line": {"width": 1.5, "color": "var(--ink)"},
        },
        "hoverinfo": "text",
    }
    if point.low is not None and point.high is not None:
        interval = f"{significant(point.low)}–{significant(point.high)}"
        trace["error_x"] = _error(point.high - cost, cost - point.low)
    difference = row.difference
    if difference is not None and difference.interval is not None and difference.metric == report.task.primary:
        factor = 100 if is_share(report.task.primary) else 1
        up, down = difference.interval.high - difference.value, difference.value - difference.interval.low
        trace["error_y"] = _error(factor * up, factor * down)
    ends = f" ({interval})" if interval else ""
    trace["hovertext"] = [
        f"<b>{escape(row.name, quote=False)}</b><br>{significant(cost)}{ends} {unit}<br>{_shown(row, report.task)}"
    ]
    return trace


def _error(up: float, down: float) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(up, 0.0)],
        "arrayminus": [max(down, 0.0)],
        "thickness": 1,
        "width": 3,
        "color": "var(--muted)",
    }


def _ends(timing: Timing) -> tuple[float | None, float | None]:
    interval = timing.end_to_end.intervals.get("p50")
    return (interval.low, interval.high) if interval else (None, None)


def _primary(row: Row, metric: str) -> float:
    value = metric_of(row.metrics, metric) if row.metrics else None
    return math.nan if value is None else value


def _shown(row: Row, task: Task) -> str:
    samples = row.metrics.samples if row.metrics else 0
    return f"{metric_name(task.primary)} {metric_value(task.primary, _primary(row, task.primary), samples)}"


def _range(values: Sequence[float], percentage: bool) -> list[float]:
    """Return ends that leave room around the values: small differences stay small to the eye."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = max(0.35 * (high - low), 0.5 if percentage else 0.02 * max(abs(low), abs(high)), 1e-9)
    return [low - room, min(high + room, 100.4) if percentage else high + room]


def throughput(report: Report) -> Figure | None:
    """Return samples per second against the batch size; None where there are not two sizes."""
    rows = [row for row in report.ran() if len(row.timings) > 1]
    if not rows:
        return None
    by_batch = {row.name: sorted(row.timings, key=lambda timing: timing.batch) for row in rows}
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": escape(row.name, quote=False),
            "x": [timing.batch for timing in by_batch[row.name]],
            "y": [timing.throughput for timing in by_batch[row.name]],
            "line": {"dash": _DASHES[index % len(_DASHES)], "width": 2, "color": _line_colour(row.precision)},
            "marker": {"symbol": _SYMBOLS[index % len(_SYMBOLS)], "size": 9},
            "hovertemplate": "batch %{x}: %{y:,.0f} samples/s",
        }
        for index, row in enumerate(rows)
    ]
    batches = sorted({timing.batch for row in rows for timing in row.timings})
    layout = _layout(
        xaxis=_axis("batch size", type="log", tickvals=batches, ticktext=[str(batch) for batch in batches]),
        yaxis=_axis("samples per second", type="log", dtick="D2", exponentformat="SI"),
    )
    facts = "; ".join(
        f"{row.name} " + ", ".join(f"{significant(each.throughput)} at {each.batch}" for each in by_batch[row.name])
        for row in rows
    )
    return Figure("figure-throughput", "Throughput by batch size", f"Samples per second: {facts}.", traces, layout, 340)


def precision_strip(precision: Precision) -> Figure | None:
    """Return per layer what was asked, exported and executed; folded and fused layers run nowhere of their own."""
    layers = [layer for layer in precision.layers if layer.verdict not in ("nothing to run", "fused")]
    if not layers:
        return None
    stages = ("executed", "exported", "asked")
    levels = [[_level(getattr(layer, stage)) for layer in layers] for stage in stages]
    few = len(layers) <= _LABELLED
    index = list(range(len(layers)))
    hover = [
        [
            f"<b>{escape(layer.name, quote=False)}</b> ({escape(layer.type, quote=False)})<br>"
            f"{stage}: {escape(getattr(layer, stage) or 'not known', quote=False)}<br>{layer.verdict}"
            for layer in layers
        ]
        for stage in stages
    ]
    last = len(_LEVELS) - 1
    steps = [
        [(position + side) / (last + 1), f"var(--{level})"] for position, level in enumerate(_LEVELS) for side in (0, 1)
    ]
    heat = {
        "type": "heatmap",
        "x": index,
        "y": [0, 1, 2],
        "z": [[_LEVELS.index(level) for level in row] for row in levels],
        "zmin": -0.5,
        "zmax": last + 0.5,
        "colorscale": steps,
        "showscale": False,
        "xgap": 2 if few else 0,
        "ygap": 4,
        "hoverinfo": "text",
        "hovertext": hover,
    }
    shown = [level for level in _LEVELS if any(level in row for row in levels)]
    differ = [position for position, layer in enumerate(layers) if layer.verdict == "differs"]
    traces = [
        heat,
        *([_labels(levels)] if few else []),
        *(_legend_entry(level) for level in shown),
        *([_differs(differ)] if differ else []),
    ]
    timed = any(layer.ms is not None for layer in layers)
    if timed:
        traces.append(
            {
                "type": "bar",
                "x": index,
                "y": [layer.ms for layer in layers],
                "yaxis": "y2",
                "marker": {"color": [f"var(--{_level(layer.executed)})" for layer in layers]},
                "showlegend": False,
                "hoverinfo": "text",
                "hovertext": [
                    f"<b>{escape(layer.name, quote=False)}</b><br>{significant(layer.ms)} ms" if layer.ms else ""
                    for layer in layers
                ],
            }
        )
    ticks = (
        {"tickvals": index, "ticktext": [escape(_tail(layer.name), quote=False) for layer in layers], "tickangle": -60}
        if few
        else {"showticklabels": False}
    )
    layout = _layout(
        xaxis=_axis("" if few else "layers in order", showgrid=False, zeroline=False, anchor="y", **ticks),
        yaxis=_axis(
            "",
            domain=[0, 0.54 if timed else 1],
            showgrid=False,
            zeroline=False,
            range=[-0.5, 3.1 if differ else 2.5],
            tickvals=[0, 1, 2],
            ticktext=list(stages),
        ),
        **({"yaxis2": _axis("ms", domain=[0.64, 1], rangemode="tozero", nticks=4)} if timed else {}),
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        bargap=0.15,
    )
    told = f" They differ for {', '.join(layers[position].name for position in differ)}." if differ else ""
    counts = ", ".join(f"{sum(level == each for each in levels[0])} in {level}" for level in shown)
    return Figure(
        key="figure-precision",
        title="Precision of each layer",
        alt=f"{len(layers)} layers; executed: {counts}.{told} The table below has every layer.",
        data=traces,
        layout=layout,
        height=(420 if timed else 300) + (40 if few else 0),
        min_width=max(300, min(24 * len(layers), 900)) if few else 640,
    )


def _labels(levels: Sequence[Sequence[str]]) -> Trace:
    """Return the words in the strip's cells, each in a colour that reads on its cell's."""
    cells = [(x, y, level) for y, row in enumerate(levels) for x, level in enumerate(row)]
    return {
        "type": "scatter",
        "mode": "text",
        "x": [x for x, _, _ in cells],
        "y": [y for _, y, _ in cells],
        "text": [_SHORT[level] for _, _, level in cells],
        "textfont": {"color": [f"var(--on-{level})" for _, _, level in cells]},
        "showlegend": False,
        "hoverinfo": "skip",
    }


def _legend_entry(level: str) -> Trace:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "not observed" if level == "unknown" else f"{level.upper()} ({_SHORT[level]})",
        "x": [None],
        "y": [None],
        "marker": {
            "symbol": "square",
            "size": 13,
            "color": f"var(--{level})",
            "line": {"width": 1, "color": "var(--muted)"},
        },
        "hoverinfo": "skip",
    }


def _differs(positions: Sequence[int]) -> Trace:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "does not run as asked",
        "x": list(positions),
        "y": [2.8] * len(positions),
        "marker": {"symbol": "triangle-down", "size": 11, "color": "var(--bad)"},
        "hoverinfo": "skip",
    }


def _line_colour(precision: str) -> str:
    """Return a colour that a thin line can have: FP32's areas are too pale for one."""
    level = _level(precision)
    return "var(--muted)" if level in ("fp32", "unknown") else f"var(--{level})"


def _level(text: str) -> str:
    """Return the colour's name of a receipt's words."""
    if text in _LEVELS:
        return text
    parts = text.split("+")
    return "mixed" if len(parts) > 1 and all(part in _LEVELS for part in parts) else "unknown"


def _tail(name: str, most: int = 22) -> str:
    return name if len(name) <= most else f"…{name[-most + 1 :]}"


def drift_ladder(rungs: Sequence[Rung], task: Task) -> list[Figure]:
    """Return the primary metric along the ladder, and how much signal each rung leaves over its noise."""
    if len(rungs) < 2:
        return []
    name = metric_name(task.primary)
    factor = 100 if is_share(task.primary) else 1
    stations = {rungs[0].source: rungs[0].metric_before, **{rung.target: rung.metric_after for rung in rungs}}
    values = {station: factor * value for station, value in stations.items() if math.isfinite(value)}
    fell = {rung.target for rung in rungs if not rung.holds}
    metric = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [escape(station, quote=False) for station in values],
        "y": list(values.values()),
        "line": {"color": "var(--accent)", "width": 2},
        "marker": {
            "size": 11,
            "symbol": ["x" if station in fell else "circle" for station in values],
            "color": ["var(--bad)" if station in fell else "var(--accent)" for station in values],
        },
        "hovertemplate": "%{x}: %{y:.4g}<extra></extra>",
    }
    noise = [rung for rung in rungs if rung.agreement.sqnr_db is not None]
    bars = {
        "type": "bar",
        "x": [f"to {escape(rung.target, quote=False)}" for rung in noise],
        "y": [rung.agreement.sqnr_db for rung in noise],
        "text": [decibels(rung.agreement.sqnr_db) for rung in noise],
        "textposition": "outside",
        "cliponaxis": False,
        "marker": {
            "color": ["var(--accent)" if rung.holds else "var(--bad)" for rung in noise],
            "pattern": {"shape": ["" if rung.holds else "/" for rung in noise]},
        },
        "hoverinfo": "skip",
    }
    steps = _layout(xaxis=_axis("", type="category"), yaxis=_metric_axis(task, list(values.values())), showlegend=False)
    figures = [
        Figure(
            "figure-drift",
            f"{name[0].upper()}{name[1:]} along the ladder",
            "; ".join(f"{station} {significant(value)}" for station, value in values.items()),
            [metric],
            steps,
            300,
        )
    ]
    if noise:
        layout = _layout(
            xaxis=_axis("", type="category"), yaxis=_axis("SQNR, dB", rangemode="tozero"), showlegend=False
        )
        alt = "; ".join(f"{rung.source} to {rung.target} {decibels(rung.agreement.sqnr_db)}" for rung in noise)
        figures.append(Figure("figure-sqnr", "Signal over noise of each rung", alt, [bars], layout, 300))
    return figures


def calibrators(calibration: Calibration, task: Task) -> Figure | None:
    """Return the calibrators side by side: the primary metric, and the mean SQNR of the layers where it is known."""
    methods = [each for each in reversed(calibration.methods) if math.isfinite(_metric_of(each, task.primary))]
    if len(methods) < 2:
        return None
    factor = 100 if is_share(task.primary) else 1
    values = [factor * _metric_of(each, task.primary) for each in methods]
    labels = [f"{escape(each.name, quote=False)}{' ✓' if each.chosen else ''}" for each in methods]
    noise = [each.mean_sqnr_db for each in methods]
    both = any(value is not None for value in noise)
    traces = [_dots(labels, values, methods, "x", "%{x:.4g}")]
    layout = _layout(
        xaxis={**_metric_axis(task, values), "domain": [0, 0.47 if both else 1], "nticks": 4},
        yaxis=_axis("", type="category"),
        showlegend=False,
    )
    if both:
        traces.append(_dots(labels, noise, methods, "x2", "%{x:.1f} dB"))
        finite = [value for value in noise if value is not None]
        layout["xaxis2"] = _axis("mean SQNR, dB", domain=[0.53, 1], range=_range(finite, False), anchor="y", nticks=4)
    facts = "; ".join(
        f"{each.name} {metric_value(task.primary, _metric_of(each, task.primary), each.metrics.samples)}"
        f"{f', {decibels(each.mean_sqnr_db)}' if each.mean_sqnr_db is not None else ''}"
        f"{', chosen' if each.chosen else ''}"
        for each in reversed(methods)
    )
    return Figure(
        "figure-calibrators",
        "Calibrators on validation",
        f"{facts}.",
        traces,
        layout,
        130 + 34 * len(methods),
        460 if both else 0,
    )


def _dots(
    labels: Sequence[str], values: Sequence[float | None], methods: Sequence[CalibratorResult], axis: str, hover: str
) -> Trace:
    return {
        "type": "scatter",
        "mode": "markers",
        "x": list(values),
        "y": list(labels),
        "xaxis": axis,
        "marker": {
            "size": 13,
            "symbol": ["circle" if each.chosen else "circle-open" for each in methods],
            "color": "var(--accent)",
            "line": {"width": 2, "color": "var(--accent)"},
        },
        "hovertemplate": f"%{{y}}: {hover}<extra></extra>",
    }


def _metric_of(method: CalibratorResult, name: str) -> float:
    value = metric_of(method.metrics, name)
    return math.nan if value is None else value


def histograms(strips: Sequence[HistogramStrip]) -> Figure | None:
    """Return one figure with a selector: what calibration saw of each tensor, and the range that was chosen."""
    if not strips:
        return None
    layout = _layout(
        xaxis=_axis("magnitude |x|"),
        yaxis=_axis("values", type="log", dtick=1, exponentformat="SI"),
        showlegend=False,
        bargap=0,
    )
    return Figure(
        "figure-histograms",
        "Histograms and the chosen ranges",
        f"Histograms of the magnitudes of {len(strips)} tensors, each with its chosen range; pick one in the list.",
        [],
        layout,
        340,
        choices=tuple(_histogram(strip) for strip in strips),
        choose="Tensor",
    )


def _histogram(strip: HistogramStrip) -> Choice:
    used = max((index + 1 for index, count in enumerate(strip.counts) if count), default=0)
    width = strip.top / len(strip.counts) if strip.counts else 0.0
    joined = max(1, math.ceil(used / BINS))
    bars = [sum(strip.counts[start : start + joined]) for start in range(0, used, joined)]
    clipped = clipped_share(strip)
    end = 1.03 * max(strip.amax, used * width) or 1.0
    told = f"range {significant(strip.amax)}, {percent(clipped, 2)} clipped" if clipped else "nothing clipped"
    line = {"color": "var(--range)", "width": 2}
    trace = {
        "type": "bar",
        "x0": width * joined / 2,
        "dx": width * joined,
        "y": bars,
        "width": width * joined,
        "marker": {"color": "var(--accent)", "line": {"width": 0}},
        "hovertemplate": "%{x:.4g}: %{y:,} values<extra></extra>",
    }
    side = "right" if strip.amax > 0.5 * end else "left"
    layout = {
        "xaxis": _axis("magnitude |x|", range=[0, end]),
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
                "xshift": -6 if side == "right" else 6,
                "showarrow": False,
                "text": f"range {significant(strip.amax)}<br>{told.split(', ')[-1]}",
                "align": side,
                "font": {"color": "var(--ink)"},
                "bgcolor": "var(--card)",
            }
        ],
    }
    return Choice(strip.tensor, [trace], layout)


def clipped_share(strip: HistogramStrip) -> float:
    """Return the share of values beyond the range, by the bins that lie wholly beyond it."""
    total = sum(strip.counts)
    if not total:
        return 0.0
    first = math.ceil(strip.amax / strip.top * len(strip.counts) - 1e-9) if strip.top else len(strip.counts)
    return sum(strip.counts[first:]) / total


def learning(curve: Learning, task: Task, *, key: str, title: str) -> list[Figure]:
    """Return the loss and the primary metric by epoch; nothing for a single epoch."""
    epochs = curve.epochs
    if len(epochs) < 2:
        return []
    name = metric_name(task.primary)
    factor = 100 if is_share(task.primary) else 1
    numbers = [each.epoch for each in epochs]
    losses = [
        _curve("training", numbers, [each.loss for each in epochs], "var(--muted)", "dash", "square"),
        _curve("validation", numbers, [each.validation.loss for each in epochs], "var(--accent)", "solid", "circle"),
    ]
    values = [metric_of(each.validation, task.primary) for each in epochs]
    scaled = [None if value is None else factor * value for value in values]
    best = _best(curve.best_epoch) if curve.best_epoch is not None else {}
    epoch_axis = _axis("epoch", **({"dtick": 1} if len(epochs) <= _COUNTED else {}))
    facts = ", ".join(
        f"epoch {each.epoch} {metric_value(task.primary, value, each.validation.samples)}"
        for each, value in zip(epochs, values, strict=True)
        if value is not None
    )
    loss_alt = ", ".join(f"epoch {each.epoch} {significant(each.validation.loss)}" for each in epochs)
    figures = [
        Figure(
            f"figure-{key}-loss",
            f"{title}: loss",
            f"Validation loss: {loss_alt}.",
            losses,
            _layout(xaxis=epoch_axis, yaxis=_axis("loss", rangemode="tozero"), **best),
            320,
        )
    ]
    if any(value is not None for value in values):
        trace = _curve("validation", numbers, scaled, "var(--accent)", "solid", "circle")
        layout = _layout(xaxis=epoch_axis, yaxis=_axis(_metric_title(task)), **best)
        figures.append(Figure(f"figure-{key}-metric", f"{title}: {name}", f"{facts}.", [trace], layout, 320))
    return figures


def _best(epoch: int) -> dict[str, Any]:
    """Return what marks an epoch in a layout."""
    line = {"color": "var(--muted)", "width": 1.5, "dash": "dot"}
    mark = {"x": epoch, "yref": "paper", "y": 1, "yanchor": "bottom", "showarrow": False, "text": "best"}
    return {
        "shapes": [{"type": "line", "x0": epoch, "x1": epoch, "yref": "paper", "y0": 0, "y1": 1, "line": line}],
        "annotations": [{**mark, "font": {"color": "var(--muted)"}}],
    }


def _curve(name: str, x: Sequence[int], y: Sequence[float | None], color: str, dash: str, symbol: str) -> Trace:
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(x) <= 60 else "lines",
        "name": name,
        "x": list(x),
        "y": [value if value is not None and math.isfinite(value) else None for value in y],
        "line": {"color": color, "dash": dash, "width": 2},
        "marker": {"symbol": symbol, "size": 7},
        "hovertemplate": "epoch %{x}: %{y:.4g}",
    }


def confusion(report: Report) -> Figure | None:
    """Return the confusion matrices, with a selector where several rows have one; that of the result first."""
    rows = [row for row in report.ran() if row.metrics is not None and row.metrics.confusion]
    rows.sort(key=lambda row: row.name != report.result)
    if not rows or rows[0].metrics is None or rows[0].metrics.confusion is None:
        return None
    classes = len(rows[0].metrics.confusion)
    layout = _layout(
        xaxis=_axis("answered", showgrid=False, zeroline=False, constrain="domain", **_class_ticks(classes)),
        yaxis=_axis(
            "true class",
            showgrid=False,
            zeroline=False,
            autorange="reversed",
            scaleanchor="x",
            constrain="domain",
            constraintoward="top",
            **_class_ticks(classes),
        ),
    )
    return Figure(
        "figure-confusion",
        "Confusion matrix",
        f"{classes} classes; the diagonal holds the right answers. {_mistakes(rows[0])}",
        [],
        layout,
        min(520, 260 + 24 * classes),
        min_width=300,
        choices=tuple(Choice(row_title(row, report.rows), [_matrix(row)]) for row in rows),
        choose="Row",
    )


def _class_ticks(classes: int) -> dict[str, Any]:
    return {"dtick": 1} if classes <= _COUNTED else {"nticks": 11}


def _matrix(row: Row) -> Trace:
    counts = (row.metrics.confusion if row.metrics else None) or []
    shares = [[count / sum(line) if sum(line) else 0.0 for count in line] for line in counts]
    texts = [[str(count) if count else "" for count in line] for line in counts]
    return {
        "type": "heatmap",
        "z": shares,
        "customdata": counts,
        "zmin": 0,
        "zmax": 1,
        "colorscale": [[0, "var(--card)"], [0.02, "var(--heat-low)"], [1, "var(--heat-high)"]],
        "showscale": False,
        "xgap": 1,
        "ygap": 1,
        "hovertemplate": "true %{y}, answered %{x}: %{customdata} (%{z:.1%})<extra></extra>",
        **({"text": texts, "texttemplate": "%{text}"} if len(counts) <= _COUNTED else {}),
    }


def _mistakes(row: Row) -> str:
    counts = row.metrics.confusion if row.metrics else None
    pairs = [
        (count, true, answered)
        for true, line in enumerate(counts or [])
        for answered, count in enumerate(line)
        if count and true != answered
    ]
    if not pairs:
        return f"{row.name} made no mistake."
    count, true, answered = max(pairs)
    return f"The commonest mistake of {row.name}: {count} of class {true} answered as {answered}."


def _metric_axis(task: Task, values: Sequence[float]) -> dict[str, Any]:
    return _axis(_metric_title(task), range=_range(values, is_share(task.primary)))


def _metric_title(task: Task) -> str:
    return f"{metric_name(task.primary)}, %" if is_share(task.primary) else metric_name(task.primary)


def _axis(title: str, **more: Any) -> dict[str, Any]:
    return {
        "title": {"text": title, "font": {"size": 13}, "standoff": 8},
        "gridcolor": "var(--line)",
        "linecolor": "var(--line-strong)",
        "zerolinecolor": "var(--line)",
        "tickcolor": "var(--line-strong)",
        "automargin": True,
        "fixedrange": False,
        **more,
    }


def _layout(**more: Any) -> dict[str, Any]:
    return {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"size": 12, "color": "var(--ink)", "family": "system-ui, -apple-system, 'Segoe UI', sans-serif"},
        "margin": {"l": 12, "r": 12, "t": 18, "b": 12},
        "hoverlabel": {"bgcolor": "var(--card)", "bordercolor": "var(--line-strong)", "font": {"color": "var(--ink)"}},
        "legend": {"orientation": "h", "y": -0.22, "yanchor": "top", "x": 0},
        "dragmode": False,
        **more,
    }
