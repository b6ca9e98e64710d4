"""The table of rows: which columns it has and what stands in them. Console, Markdown and HTML show the same figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from maseRT.report.estimates import millijoules
from maseRT.report.schema import Latency, Report, Row, Timing
from maseRT.report.wording import (
    decibels,
    difference,
    is_share,
    megabytes,
    metric_name,
    metric_value,
    names,
    percent,
    ratio,
    significant,
    with_digits,
)


@dataclass(frozen=True)
class Cell:
    """A figure.

    Attributes:
        text: "" where the row has none.
        interval: the ends of its 95 % interval, "" where it has none.
        exact: the figure in full, for those who ask; "" where `text` is all.
    """

    text: str = ""
    interval: str = ""
    exact: str = ""


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        title: its heading, with the unit.
        meaning: the heading in a sentence.
        shown: "everywhere"; "pages": not on the console; "aside": in a table of its own where there is room for one.
    """

    title: str
    meaning: str
    cells: tuple[Cell, ...]
    shown: Literal["everywhere", "pages", "aside"] = "everywhere"


def columns(report: Report) -> list[Column]:
    """Return the columns in which any row has a figure, in order; cells stand in the order of `report.rows`."""
    batch = report.batch()
    at = f" at batch {batch}" if batch is not None else ""

    def timed(show: Callable[[Timing], Cell]) -> Callable[[Row], Cell]:
        def cell(row: Row) -> Cell:
            timing = report.timing(row.name, batch) if batch is not None else None
            return show(timing) if timing is not None else Cell()

        return cell

    found = [
        *_metric_columns(report),
        _column(report, "loss", "mean loss per sample", _loss),
        _column(report, "p50 ms", f"median time of one call{at}, end to end", timed(_p50)),
        _column(report, "p99 ms", f"99 % of calls{at} are faster", timed(_p99)),
        _column(report, "device ms", f"median{at} with the data on the device; ≤: launch-bound", timed(_device)),
        _column(report, "samples/s", f"throughput{at}, end to end", timed(_throughput)),
        _column(
            report, "speed-up", f"of the rounds' medians{at}, over {report.baseline}", timed(_ratio), shown="pages"
        ),
        _column(report, "W", "average power while it works", _watts),
        _column(report, "mJ", "energy of one sample, all power counted", _millijoules),
        _column(report, "memory MiB", "peak host memory of loading and inferring", _memory, shown="aside"),
        _column(report, "GPU MiB", "peak GPU memory", _device_memory, shown="aside"),
        _column(report, "MB", "on disk, 10^6 bytes", _size),
    ]
    return [column for column in found if any(cell.text for cell in column.cells)]


def launch_bound_sentence(report: Report) -> str:
    """Return in which rows of the table the device waits for the host, and what follows; "" where it does in none."""
    batch = report.batch()
    timings = {row.name: report.timing(row.name, batch) for row in report.rows} if batch is not None else {}
    found = [name for name, timing in timings.items() if timing and timing.device and timing.device.launch_bound]
    if not found:
        return ""
    return (
        f"launch-bound at batch {batch}: {names(found)}; the device waits for the host, so that its time (≤) is that "
        "of launching, and its own is less"
    )


def _metric_columns(report: Report) -> list[Column]:
    known = dict.fromkeys(name for row in report.ran() for name in (row.metrics.values if row.metrics else ()))
    ordered = sorted(known, key=lambda name: name != report.task.primary)
    found = []
    for name in ordered:
        title = f"{metric_name(name)} %" if is_share(name) else metric_name(name)
        found.append(_column(report, title, _meaning(name), _metric(name)))
        if name == report.task.primary:
            meaning = f"{metric_name(name)} less that of {report.baseline}, same samples; the interval is paired"
            found.append(_column(report, "change", meaning, _change, shown="pages"))
    baseline = report.baseline
    return [
        *found,
        _column(report, "same label %", f"samples with the label of {baseline}", _same_label, shown="aside"),
        _column(report, "SQNR dB", f"of the outputs, against {baseline}", _sqnr, shown="aside"),
    ]


def _meaning(name: str) -> str:
    if name in ("precision", "recall", "f1"):
        return f"{metric_name(name)}, mean over the classes"
    return f"{metric_name(name)}, of all samples"


def _column(
    report: Report,
    title: str,
    meaning: str,
    cell: Callable[[Row], Cell],
    *,
    shown: Literal["everywhere", "pages", "aside"] = "everywhere",
) -> Column:
    return Column(title, meaning, tuple(cell(row) for row in report.rows), shown)


def _metric(name: str) -> Callable[[Row], Cell]:
    def cell(row: Row) -> Cell:
        value = row.metrics.values.get(name) if row.metrics else None
        if row.metrics is None or value is None:
            return Cell()
        return Cell(metric_value(name, value, row.metrics.samples).removesuffix(" %"), exact=repr(value))

    return cell


def _change(row: Row) -> Cell:
    text, ends = difference(row)
    return Cell(text.removesuffix(" points"), ends, repr(row.difference.value) if row.difference else "")


def _loss(row: Row) -> Cell:
    return Cell(significant(row.metrics.loss), exact=repr(row.metrics.loss)) if row.metrics else Cell()


def _same_label(row: Row) -> Cell:
    share = row.agreement.label_agreement if row.agreement else None
    return Cell(percent(share, 2).removesuffix(" %"), exact=repr(share)) if share is not None else Cell()


def _sqnr(row: Row) -> Cell:
    return Cell(decibels(row.agreement.sqnr_db).removesuffix(" dB")) if row.agreement else Cell()


def latency_cell(latency: Latency, figure: str) -> Cell:
    """Return "mean", "p50", "p90" or "p99" of a latency."""
    value: float = getattr(latency, f"{figure}_ms")
    text, ends = with_digits(value, latency.intervals.get(figure))
    return Cell(text, ends, f"{value!r} ms")


def _p50(timing: Timing) -> Cell:
    return latency_cell(timing.end_to_end, "p50")


def _p99(timing: Timing) -> Cell:
    return Cell(significant(timing.end_to_end.p99_ms), exact=f"{timing.end_to_end.p99_ms!r} ms")


def _device(timing: Timing) -> Cell:
    if timing.device is None:
        return Cell()
    bound = "≤" if timing.device.launch_bound else ""
    return Cell(f"{bound}{significant(timing.device.p50_ms)}", exact=f"{bound}{timing.device.p50_ms!r} ms")


def _throughput(timing: Timing) -> Cell:
    return Cell(significant(timing.throughput), exact=repr(timing.throughput))


def _ratio(timing: Timing) -> Cell:
    text, ends = ratio(timing)
    return Cell(text, ends, repr(timing.ratio) if text else "")


def _watts(row: Row) -> Cell:
    energy = row.energy
    if energy is None:
        return Cell()
    power = _with_ends(energy.watts, energy.watts_low, energy.watts_high)
    idle = _with_ends(energy.idle_watts, energy.idle_watts_low, energy.idle_watts_high)
    return Cell(significant(energy.watts), exact=f"{power}, {idle} without work")


def _with_ends(watts: float, low: float | None, high: float | None) -> str:
    ends = f" ({significant(low)}–{significant(high)})" if low is not None and high is not None else ""
    return f"{watts!r} W{ends}"


def _millijoules(row: Row) -> Cell:
    if row.energy is None:
        return Cell()
    found = millijoules(row.energy)
    text, ends = with_digits(found.value, found.interval)
    return Cell(text, ends, f"{row.energy.joules_per_sample!r} J")


def _memory(row: Row) -> Cell:
    known = row.memory.host_mb if row.memory else None
    return Cell(significant(known)) if known is not None else Cell()


def _device_memory(row: Row) -> Cell:
    known = row.memory.device_mb if row.memory else None
    return Cell(significant(known)) if known is not None else Cell()


def _size(row: Row) -> Cell:
    return Cell(megabytes(row.size_bytes), exact=f"{row.size_bytes} bytes") if row.size_bytes else Cell()
