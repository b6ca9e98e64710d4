"""The tables of the HTML page beside that of the results: the detail behind its figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from maseRT.report.columns import Cell, columns, latency_cell
from maseRT.report.drift import metric_before_and_after, same_label
from maseRT.report.schema import Epoch, GpuState, Latency, Learning, Metrics, Report, Row, Timing
from maseRT.report.wording import decibels, metric_name, metric_value, percent, ratio, significant


@dataclass(frozen=True)
class Table:
    """A table; the first cell of each row is the row's heading.

    Attributes:
        caption: what it shows.
        left: whether its cells are aligned left, as words are, rather than right, as numbers.
    """

    caption: str
    header: tuple[str, ...]
    rows: Sequence[Sequence[str | Cell]]
    left: bool = False


def page_tables(report: Report) -> dict[str, Table | None]:
    """Return the tables by their place in the HTML template; None where the report lacks the data."""
    return {
        "closeness": _closeness(report),
        "latencies": _latencies(report),
        "providers": _providers(report),
        "receipt": _receipt(report),
        "drift": _drift(report),
        "calibrators": _calibrators(report),
        "ranges": _ranges(report),
        "gpu": _gpu_states(report),
    }


def epoch_tables(report: Report) -> list[Table]:
    """Return a table of the epochs for training, and one for fine-tuning, where there were any."""
    curves = (("Training", report.training), ("Fine-tuning", report.finetuning))
    return [_epochs(f"{title} by epoch", curve) for title, curve in curves if curve is not None and curve.epochs]


def _closeness(report: Report) -> Table | None:
    """Return the columns for which the table of the results has no room."""
    aside = [column for column in columns(report) if column.shown == "aside"]
    if not aside:
        return None
    rows: list[list[str | Cell]] = [
        [row.name, *(column.cells[index] for column in aside)]
        for index, row in enumerate(report.rows)
        if any(column.cells[index].text for column in aside)
    ]
    header = ("row", *(column.title for column in aside))
    return Table(f"Outputs against those of {report.baseline}, and memory", header, rows)


def _latencies(report: Report) -> Table | None:
    rows = [
        _latency(row, timing, latency)
        for row in report.rows
        for timing in row.timings
        for latency in (timing.end_to_end, timing.device)
        if latency is not None
    ]
    header = ("row", "batch", "clock", "mean ms", "p50 ms", "p90 ms", "p99 ms", "CoV", "calls", "samples/s", "speed-up")
    return Table("Latency of every row at every batch size, with 95 % intervals", header, rows) if rows else None


def _latency(row: Row, timing: Timing, latency: Latency) -> list[str | Cell]:
    """Return a line of one clock; throughput and speed-up belong to the end-to-end one."""
    end_to_end = latency is timing.end_to_end
    text, interval = ratio(timing) if end_to_end else ("", "")
    return [
        row.name,
        str(timing.batch),
        f"{'end to end' if end_to_end else 'on the device'}, {latency.clock}"
        f"{', launch-bound' if latency.launch_bound else ''}",
        *(latency_cell(latency, figure) for figure in ("mean", "p50", "p90", "p99")),
        percent(latency.cov),
        f"{latency.iterations:,}",
        significant(timing.throughput) if end_to_end else "",
        Cell(text, interval),
    ]


def _providers(report: Report) -> Table | None:
    rows = [
        (
            row.name,
            row.provider.asked,
            ", ".join(row.provider.got),
            ", ".join(f"{name} {number}" for name, number in row.provider.nodes.items()),
            ", ".join(f"{key} {value}" for key, value in row.provider.kernels.items() if value),
        )
        for row in report.rows
        if row.provider is not None
    ]
    header = ("row", "asked", "got", "nodes", "kernels")
    return Table("Execution providers of ONNX Runtime", header, rows, left=True) if rows else None


def _receipt(report: Report) -> Table | None:
    if report.precision is None or not report.precision.layers:
        return None
    layers = report.precision.layers
    timed = any(layer.ms is not None for layer in layers)
    header = ("layer", "type", "asked", "exported", "executed", "verdict", *(("ms",) if timed else ()))
    rows = [
        (
            *(layer.name, layer.type, layer.asked, layer.exported or "–", layer.executed or "–", layer.verdict),
            *((significant(layer.ms) if layer.ms is not None else "",) if timed else ()),
        )
        for layer in layers
    ]
    return Table("Every layer: asked, exported, executed", header, rows, left=True)


def _drift(report: Report) -> Table | None:
    metric = report.task.primary
    rows = [
        (
            rung.source,
            rung.target,
            metric_before_and_after(rung, metric),
            same_label(rung),
            decibels(rung.agreement.sqnr_db),
            significant(rung.agreement.max_error),
            "✓ holds" if rung.holds else "✗ falls below the limit",
        )
        for rung in report.drift
    ]
    header = ("from", "to", metric_name(metric), "same label", "SQNR", "largest error", "outcome")
    caption = "Each step from the float model to the engine, against the one before"
    return Table(caption, header, rows) if rows else None


def _calibrators(report: Report) -> Table | None:
    if report.calibration is None or not report.calibration.methods:
        return None
    metric = report.task.primary
    rows = [
        (
            each.name,
            _metric_text(each.metrics, metric),
            significant(each.metrics.loss, 4),
            decibels(each.mean_sqnr_db) if each.mean_sqnr_db is not None else "",
            "✓ chosen" if each.chosen else "",
        )
        for each in report.calibration.methods
    ]
    header = ("calibrator", metric_name(metric), "loss", "mean SQNR", "")
    return Table("Calibrators compared on the validation split", header, rows)


def _ranges(report: Report) -> Table | None:
    if report.calibration is None or not report.calibration.histograms:
        return None
    rows = [
        (strip.tensor, significant(strip.amax, 4), percent(strip.clipped_share(), 3), f"{sum(strip.counts):,}")
        for strip in report.calibration.histograms
    ]
    return Table("Chosen ranges", ("tensor", "range", "clipped", "values seen"), rows)


def _epochs(caption: str, curve: Learning) -> Table:
    metrics = list(curve.epochs[0].validation.values)

    def line(epoch: Epoch) -> tuple[str, ...]:
        return (
            str(epoch.epoch),
            significant(epoch.loss, 4) if epoch.loss is not None else "",
            significant(epoch.validation.loss, 4),
            *(_metric_text(epoch.validation, metric) for metric in metrics),
            "✓ best" if epoch.epoch == curve.best_epoch else "",
        )

    header = ("epoch", "training loss", "validation loss", *map(metric_name, metrics), "")
    return Table(caption, header, [line(epoch) for epoch in curve.epochs])


def _metric_text(metrics: Metrics, name: str) -> str:
    return metric_value(name, metrics.values[name], metrics.samples) if name in metrics.values else ""


def _gpu_states(report: Report) -> Table | None:
    rows = [(row.name, *_gpu_state(row.gpu)) for row in report.rows if row.gpu is not None]
    header = ("row", "SM MHz", "memory MHz", "°C", "W", "limit W", "held back by")
    return Table("The GPU while each row was measured", header, rows) if rows else None


def _gpu_state(gpu: GpuState) -> tuple[str, ...]:
    readings = (gpu.sm_clock_mhz, gpu.memory_clock_mhz, gpu.temperature_c, gpu.power_w, gpu.power_limit_w)
    numbers = ("" if reading is None else f"{reading:,.0f}" for reading in readings)
    return (*numbers, ", ".join(gpu.limits) or "nothing")
