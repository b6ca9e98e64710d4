"""Rows of measurements -> report.json, report.md and the table on the console."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from maseRT.agreement import Agreement
from maseRT.evaluate import Metrics
from maseRT.measure import Latency
from maseRT.onnxrt.kernels import Kernels

SCHEMA = 1

HEADER = (
    "what",
    "accuracy",
    "precision",
    "recall",
    "F1",
    "loss",
    "mean ms",
    "p50",
    "p90",
    "p99",
    "samples/s",
    "size",
)


@dataclass(frozen=True)
class Row:
    """One model in one runtime.

    Attributes:
        name: such as "onnxruntime-int8".
        size: bytes on disk.
        latency: from inputs in host memory to outputs in host memory.
        device_latency: by the device's own clock, without copies; None where it has none.
        agreement: with the first row that ran, over the evaluated samples.
        not_run: why it did not run here; the measurements are None then.
        kernels: ONNX Runtime's kernels in its optimised graph, counted; None for other runtimes.
    """

    name: str
    runtime: str
    artifact: str
    size: int
    metrics: Metrics | None = None
    latency: Latency | None = None
    device_latency: Latency | None = None
    agreement: Agreement | None = None
    not_run: str = ""
    kernels: Kernels | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        row = {key: value for key, value in asdict(self).items() if value not in (None, "")}
        if self.metrics is not None:
            row["metrics"] = self.metrics.as_dict()
        for name in ("latency", "device_latency"):
            latency: Latency | None = getattr(self, name)
            if latency is not None:
                row[name] = latency.as_dict()
        if self.kernels is not None:
            row["kernels"] = self.kernels.as_dict()
        return row

    def cells(self) -> tuple[str, ...]:
        """Return the row as text, under `HEADER`."""
        if self.metrics is None or self.latency is None:
            return (self.name, *("" for _ in HEADER[2:]), _size(self.size))
        m, t = self.metrics, self.latency
        shares = (
            f"{m.as_dict().get(name, math.nan):.4f}" for name in ("accuracy", "precision", "recall", "f1", "loss")
        )
        times = (f"{value:.3f}" for value in (t.mean_ms, t.p50_ms, t.p90_ms, t.p99_ms))
        return (self.name, *shares, *times, f"{t.throughput:.0f}", _size(self.size))


@dataclass(frozen=True)
class Finding:
    """What a report tells beside its rows.

    Attributes:
        key: its name in report.json.
        values: plain values for report.json.
        title: its heading in report.md.
        lines: its text in report.md.
    """

    key: str
    values: Mapping[str, Any]
    title: str
    lines: Sequence[str]


def table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Return the rows as text, first the header."""
    return [HEADER, *(row.cells() for row in rows)]


def report_json(
    rows: Sequence[Row], *, method: Mapping[str, Any], findings: Sequence[Finding], config: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the report as plain values."""
    return {
        "schema": SCHEMA,
        "method": dict(method),
        "rows": [row.as_dict() for row in rows],
        **{finding.key: dict(finding.values) for finding in findings},
        "config": dict(config),
    }


def report_markdown(
    rows: Sequence[Row],
    *,
    run: str,
    method: Mapping[str, Any],
    findings: Sequence[Finding],
    notes: Sequence[str],
) -> str:
    """Return the report as Markdown: the table, what was found, how it was measured, and what the plan left out."""
    cells = [row.cells() for row in rows if row.metrics is not None]
    lines = [f"# {run}", "", *markdown_table([HEADER, *cells])]
    missing = [row for row in rows if row.metrics is None]
    if missing:
        lines += ["", "## Not run", "", *(f"- {row.name}: {row.not_run}" for row in missing)]
    compared = [row for row in rows if row.agreement is not None]
    if compared:
        lines += ["", f"## Agreement with {cells[0][0]}", ""]
        lines += [f"- {row.name}: {_agreement(row.agreement)}" for row in compared if row.agreement is not None]
    counted = [row for row in rows if row.kernels is not None]
    if counted:
        lines += ["", "## Kernels of ONNX Runtime", ""]
        lines += [f"- {row.name}: {row.kernels.describe()}" for row in counted if row.kernels is not None]
    for finding in findings:
        lines += ["", f"## {finding.title}", "", *finding.lines]
    lines += ["", "## Method", "", *(f"- {key.replace('_', ' ')}: {value}" for key, value in method.items())]
    if notes:
        lines += ["", "## Notes of the plan", "", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def _agreement(value: Agreement) -> str:
    sqnr = "equal" if value.sqnr_db is None else f"{value.sqnr_db:.1f} dB"
    if value.label_agreement is None:
        return f"output SQNR {sqnr} over {value.samples} samples"
    return f"same label for {value.label_agreement:.2%} of {value.samples} samples, logit SQNR {sqnr}"


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table, of which the first row is the header; all columns but the first stand right."""
    header, *cells = rows
    return [_markdown_row(row) for row in (header, ["---", *("---:" for _ in header[1:])], *cells)]


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _size(size: int) -> str:
    return f"{size / 1e6:.2f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
