"""The key figures of the judged row: speed, quality and cost, each against the baseline."""

from __future__ import annotations

from dataclasses import dataclass

from maseRT.report.estimates import millijoules
from maseRT.report.schema import Report, Row, Timing
from maseRT.report.wording import (
    capitalized,
    count,
    difference,
    metric_name,
    metric_value,
    ratio,
    row_title,
    significant,
    size,
    with_digits,
)


@dataclass(frozen=True)
class Card:
    """A key figure.

    Attributes:
        title: what it is.
        value: with its unit.
        note: its interval, or what it is compared with.
    """

    title: str
    value: str
    note: str


def cards(report: Report) -> list[Card]:
    """Return the key figures of the judged row; none where no row ran."""
    result = report.row(report.result)
    if result is None or result.metrics is None:
        return []
    batch = report.batch()
    timing = report.timing(result.name, batch) if batch is not None else None
    found = [
        _speed(report, timing) if timing else None,
        _quality(report, result),
        *(_batch_speed(timing) if timing else ()),
        _energy(report, result),
        _size(report, result),
    ]
    return [card for card in found if card is not None]


def _speed(report: Report, timing: Timing) -> Card:
    """Return the speed-up over the baseline, or the median latency where there is none."""
    baseline = report.row(report.baseline)
    times, interval = ratio(timing)
    if times and baseline is not None:
        over = f"over {row_title(baseline, report.rows)}"
        return Card("Speed-up", times, f"{interval}, {over}" if interval else over)
    return _median("Median latency", timing)


def _median(title: str, timing: Timing) -> Card:
    text, interval = with_digits(timing.end_to_end.p50_ms, timing.end_to_end.intervals.get("p50"))
    return Card(title, f"{text} ms", interval)


def _quality(report: Report, result: Row) -> Card | None:
    """Return the primary metric, and its change against the baseline."""
    metric, metrics = report.task.primary, result.metrics
    value = metrics.values.get(metric) if metrics else None
    if metrics is None or value is None:
        return None
    change, interval = difference(result)
    note = f"{change}{f' ({interval})' if interval else ''}" if change else f"of {count(metrics.samples, 'sample')}"
    return Card(capitalized(metric_name(metric)), metric_value(metric, value, metrics.samples), note)


def _batch_speed(timing: Timing) -> list[Card]:
    throughput = f"{significant(timing.throughput)}/s"
    return [
        _median(f"Median at batch {timing.batch}", timing),
        Card("Throughput", throughput, f"samples at batch {timing.batch}"),
    ]


def _energy(report: Report, result: Row) -> Card | None:
    if result.energy is None:
        return None
    used, baseline = millijoules(result.energy), report.row(report.baseline)
    other = millijoules(baseline.energy) if baseline is not None and baseline.energy is not None else None
    note = f"{significant(used.value / other.value)}x that of {report.baseline}" if other else "all power"
    text, interval = with_digits(used.value, used.interval)
    return Card("Energy of a sample", f"{text} mJ", f"{interval}, {note}" if interval else note)


def _size(report: Report, result: Row) -> Card | None:
    if not result.size_bytes:
        return None
    baseline = report.row(report.baseline)
    other = baseline.size_bytes if baseline is not None else 0
    note = f"{significant(result.size_bytes / other)}x {report.baseline}" if other else "on disk"
    return Card("Size on disk", size(result.size_bytes), note)
