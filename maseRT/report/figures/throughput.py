"""Throughput by batch size."""

from __future__ import annotations

from maseRT.report.figures.figure import Figure
from maseRT.report.figures.style import DASHES, SYMBOLS, axis, escaped, layout, line_colour, log_axis
from maseRT.report.schema import Report
from maseRT.report.wording import significant


def throughput(report: Report) -> Figure | None:
    """Return samples per second against the batch size; None where no row was timed at two sizes."""
    rows = [row for row in report.ran() if len(row.timings) > 1]
    if not rows:
        return None
    timings = {row.name: sorted(row.timings, key=lambda timing: timing.batch) for row in rows}
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": escaped(row.name),
            "x": [timing.batch for timing in timings[row.name]],
            "y": [timing.throughput for timing in timings[row.name]],
            "line": {"dash": DASHES[index % len(DASHES)], "width": 2, "color": line_colour(row.precision)},
            "marker": {"symbol": SYMBOLS[index % len(SYMBOLS)], "size": 9},
            "hovertemplate": "batch %{x}: %{y:,.0f} samples/s",
        }
        for index, row in enumerate(rows)
    ]
    batches = sorted({timing.batch for row in rows for timing in row.timings})
    facts = "; ".join(
        f"{row.name} " + ", ".join(f"{significant(each.throughput)} at {each.batch}" for each in timings[row.name])
        for row in rows
    )
    return Figure(
        key="figure-throughput",
        title="Throughput by batch size",
        alt=f"Samples per second: {facts}.",
        data=traces,
        layout=layout(
            xaxis=axis("batch size", type="log", tickvals=batches, ticktext=[str(batch) for batch in batches]),
            yaxis=log_axis(
                "samples per second", [each.throughput for row in rows for each in row.timings if each.throughput > 0]
            ),
        ),
        height=340,
    )
