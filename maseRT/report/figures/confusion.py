"""Confusion matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from maseRT.report.figures.figure import Choice, Figure, Trace
from maseRT.report.figures.style import axis, layout
from maseRT.report.schema import Report
from maseRT.report.wording import row_title

_MOST_NUMBERED = 15
"""Up to this many classes every class has a tick, and every cell its count."""

Matrix = Sequence[Sequence[int]]
"""Counts; rows are the true classes, columns the answers."""


def confusion(report: Report) -> Figure | None:
    """Return the rows' confusion matrices with a selector, the judged row's first; None where no row has one."""
    found = [(row, row.metrics.confusion) for row in report.ran() if row.metrics and row.metrics.confusion]
    if not found:
        return None
    found.sort(key=lambda pair: pair[0].name != report.result)
    first, matrix = found[0]
    square = {"showgrid": False, "zeroline": False, "constrain": "domain", **_class_ticks(len(matrix))}
    return Figure(
        key="figure-confusion",
        title="Confusion matrix",
        alt=f"{len(matrix)} classes; the diagonal holds the right answers. {_mistakes(first.name, matrix)}",
        data=[],
        layout=layout(
            xaxis=axis("answered", **square),
            yaxis=axis("true class", autorange="reversed", scaleanchor="x", constraintoward="top", **square),
        ),
        height=min(520, 260 + 24 * len(matrix)),
        min_width=300,
        choices=tuple(Choice(row_title(row, report.rows), [_heatmap(counts)]) for row, counts in found),
        choose="Row",
    )


def _class_ticks(classes: int) -> dict[str, Any]:
    return {"dtick": 1} if classes <= _MOST_NUMBERED else {"nticks": 11}


def _heatmap(matrix: Matrix) -> Trace:
    """Return a matrix coloured by the share of each true class."""
    shares = [[count / sum(line) if sum(line) else 0.0 for count in line] for line in matrix]
    texts = [[str(count) if count else "" for count in line] for line in matrix]
    return {
        "type": "heatmap",
        "z": shares,
        "customdata": matrix,
        "zmin": 0,
        "zmax": 1,
        "colorscale": [[0, "var(--card)"], [0.02, "var(--heat-low)"], [1, "var(--heat-high)"]],
        "showscale": False,
        "xgap": 1,
        "ygap": 1,
        "hovertemplate": "true %{y}, answered %{x}: %{customdata} (%{z:.1%})<extra></extra>",
        **({"text": texts, "texttemplate": "%{text}"} if len(matrix) <= _MOST_NUMBERED else {}),
    }


def _mistakes(name: str, matrix: Matrix) -> str:
    mistakes = [
        (count, true, answered)
        for true, line in enumerate(matrix)
        for answered, count in enumerate(line)
        if count and true != answered
    ]
    if not mistakes:
        return f"{name} made no mistake."
    count, true, answered = max(mistakes)
    return f"The commonest mistake of {name}: {count} of class {true} answered as {answered}."
