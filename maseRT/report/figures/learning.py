"""Learning curves of training and of fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from maseRT.report.figures.figure import Figure, Trace
from maseRT.report.figures.metric import axis_title, scaled
from maseRT.report.figures.style import axis, layout
from maseRT.report.schema import Learning, Task
from maseRT.report.wording import metric_name, metric_of, metric_value, significant

_MOST_TICKS = 15
_MOST_MARKERS = 60


def learning(curve: Learning, task: Task, *, key: str, title: str) -> list[Figure]:
    """Return the loss and the primary metric by epoch; nothing for a single epoch.

    Args:
        key: part of the figures' ids.
        title: what the titles start with.
    """
    if len(curve.epochs) < 2:
        return []
    marked = _best_epoch(curve.best_epoch) if curve.best_epoch is not None else {}
    ticks = {"dtick": 1} if len(curve.epochs) <= _MOST_TICKS else {}
    common = {"xaxis": axis("epoch", **ticks), **marked}
    figures = [_losses(curve, common, key=key, title=title)]
    if any(metric_of(each.validation, task.primary) is not None for each in curve.epochs):
        figures.append(_metric(curve, task, common, key=key, title=title))
    return figures


def _losses(curve: Learning, common: dict[str, Any], *, key: str, title: str) -> Figure:
    numbers = [each.epoch for each in curve.epochs]
    training = [each.loss for each in curve.epochs]
    validation = [each.validation.loss for each in curve.epochs]
    facts = ", ".join(f"epoch {each.epoch} {significant(each.validation.loss)}" for each in curve.epochs)
    return Figure(
        key=f"figure-{key}-loss",
        title=f"{title}: loss",
        alt=f"Validation loss: {facts}.",
        data=[
            _line("training", numbers, training, color="var(--muted)", dash="dash", symbol="square"),
            _line("validation", numbers, validation),
        ],
        layout=layout(**common, yaxis=axis("loss", rangemode="tozero")),
        height=320,
    )


def _metric(curve: Learning, task: Task, common: dict[str, Any], *, key: str, title: str) -> Figure:
    values = [metric_of(each.validation, task.primary) for each in curve.epochs]
    facts = ", ".join(
        f"epoch {each.epoch} {metric_value(task.primary, value, each.validation.samples)}"
        for each, value in zip(curve.epochs, values, strict=True)
        if value is not None
    )
    percentages = [None if value is None else scaled(value, task) for value in values]
    return Figure(
        key=f"figure-{key}-metric",
        title=f"{title}: {metric_name(task.primary)}",
        alt=f"{facts}.",
        data=[_line("validation", [each.epoch for each in curve.epochs], percentages)],
        layout=layout(**common, yaxis=axis(axis_title(task))),
        height=320,
    )


def _line(
    name: str,
    x: Sequence[int],
    y: Sequence[float | None],
    *,
    color: str = "var(--accent)",
    dash: str = "solid",
    symbol: str = "circle",
) -> Trace:
    """Return a curve; values that are not finite leave a gap, as JSON has no NaN."""
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(x) <= _MOST_MARKERS else "lines",
        "name": name,
        "x": list(x),
        "y": [value if value is not None and math.isfinite(value) else None for value in y],
        "line": {"color": color, "dash": dash, "width": 2},
        "marker": {"symbol": symbol, "size": 7},
        "hovertemplate": "epoch %{x}: %{y:.4g}",
    }


def _best_epoch(epoch: int) -> dict[str, Any]:
    """Return the line and the label that mark the best epoch in a layout."""
    line = {"color": "var(--muted)", "width": 1.5, "dash": "dot"}
    mark = {"x": epoch, "yref": "paper", "y": 1, "yanchor": "bottom", "showarrow": False, "text": "best"}
    return {
        "shapes": [{"type": "line", "x0": epoch, "x1": epoch, "yref": "paper", "y0": 0, "y1": 1, "line": line}],
        "annotations": [{**mark, "font": {"color": "var(--muted)"}}],
    }
