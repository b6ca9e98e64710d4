"""The report as one HTML file that needs no network: tables from a template, figures drawn by inlined Plotly."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup

from maseRT.report.columns import Cell, Column, columns, latency_cell
from maseRT.report.environment import (
    common_method,
    config_values,
    differing_method,
    machine_facts,
    samples_sentence,
)
from maseRT.report.figures import (
    Figure,
    calibrators,
    clipped_share,
    confusion,
    drift_ladder,
    histograms,
    learning,
    precision_strip,
    throughput,
    trade_offs,
)
from maseRT.report.markdown import divergence_sentence, metric_change_text, same_label
from maseRT.report.schema import Report, Row
from maseRT.report.verdict import verdict
from maseRT.report.wording import (
    count,
    decibels,
    difference,
    metric_name,
    metric_value,
    percent,
    ratio,
    row_title,
    significant,
    size,
    with_digits,
)

_ORDER = {"error": 0, "warning": 1}


@dataclass(frozen=True)
class Card:
    """One of the key figures below the verdict.

    Attributes:
        note: what it is compared with, or its interval.
    """

    title: str
    value: str
    note: str


@dataclass(frozen=True)
class Table:
    """A plain table: cells stand in the columns of `header`, the first column names the row.

    Attributes:
        caption: what it shows, for those who hear it.
        left: whether cells hold words rather than figures.
    """

    caption: str
    header: tuple[str, ...]
    rows: Sequence[Sequence[str | Cell]]
    left: bool = False


def html(report: Report) -> str:
    """Return the report as one HTML file: no link, font, image or script in it is loaded from elsewhere."""
    figures, shown = _Figures(), columns(report)
    context = {
        "report": report,
        "verdict": report.verdict or verdict(report),
        "cards": _cards(report),
        "findings": sorted(report.findings, key=lambda finding: _ORDER[finding.severity]),
        "gates": sorted(report.gates, key=lambda gate: gate.passed),
        "columns": [column for column in shown if column.shown != "aside"],
        "aside": _aside(report, shown),
        "samples": samples_sentence(report),
        "trade_offs": figures.add(trade_offs(report)),
        "throughput": figures.add([throughput(report)]),
        "latencies": _latencies(report),
        "providers": _providers(report),
        "strip": figures.add([precision_strip(report.precision)] if report.precision else []),
        "receipt": _receipt(report),
        "drift": _drift(report),
        "drift_figures": figures.add(drift_ladder(report.drift, report.task)),
        "divergences": [sentence for rung in report.drift if (sentence := divergence_sentence(rung))],
        "calibrators": _calibrators(report),
        "calibrator_figure": figures.add([calibrators(report.calibration, report.task)] if report.calibration else []),
        "histograms": figures.add([histograms(report.calibration.histograms)] if report.calibration else []),
        "ranges": _ranges(report),
        "training": figures.add(learning(report.training, report.task, key="training", title="Training"))
        if report.training
        else [],
        "finetuning": figures.add(learning(report.finetuning, report.task, key="qat", title="Fine-tuning"))
        if report.finetuning
        else [],
        "epochs": _epochs(report),
        "confusion": figures.add([confusion(report)]),
        "sections": [(section, _rendered(section.lines)) for section in report.sections],
        "machine": machine_facts(report),
        "method": common_method(report),
        "methods": differing_method(report),
        "gpu": _gpu_states(report),
        "config": config_values(report.config),
        "style": Markup(_asset("style.css")),
        "script": Markup(_asset("figures.js")),
        "plotly": Markup(_plotly()) if figures.all else "",
        "figures": {figure.key: figure.spec() for figure in figures.all},
    }
    return _environment().get_template("report.html").render(context)


class _Figures:
    """The figures of one page, in order."""

    def __init__(self) -> None:
        self.all: list[Figure] = []

    def add(self, found: Iterable[Figure | None]) -> list[Figure]:
        """Keep those that there are, and return them."""
        there = [figure for figure in found if figure is not None]
        self.all += there
        return there


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("maseRT.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"row_title": row_title, "count": count}
    environment.filters |= {"size": size, "metric_name": metric_name}
    return environment


@cache
def _asset(name: str) -> str:
    return (files("maseRT.report") / "templates" / name).read_text(encoding="utf-8")


@cache
def _plotly() -> str:
    """Return plotly.js, whole: the package ships no smaller bundle."""
    from plotly.offline import get_plotlyjs

    script: str = get_plotlyjs()
    return script.replace("</script", "<\\/script")


def _cards(report: Report) -> list[Card]:
    result = report.row(report.result)
    if result is None or result.metrics is None:
        return []
    cards = [_speed_card(report, result), _quality_card(report, result), *_cost_cards(report, result)]
    return [card for card in cards if card is not None]


def _speed_card(report: Report, result: Row) -> Card | None:
    batch = report.batch()
    timing = report.timing(result.name, batch) if batch is not None else None
    if timing is None:
        return None
    latency, baseline = timing.end_to_end, report.row(report.baseline)
    text, ends = with_digits(latency.p50_ms, latency.intervals.get("p50"))
    times, times_ends = ratio(timing)
    if times and baseline is not None:
        over = f"over {row_title(baseline, report.rows)}"
        return Card("Speed-up", times, f"{times_ends}, {over}" if times_ends else over)
    return Card("Median latency", f"{text} ms", ends)


def _quality_card(report: Report, result: Row) -> Card | None:
    metric, metrics = report.task.primary, result.metrics
    value = metrics.values.get(metric) if metrics else None
    if metrics is None or value is None:
        return None
    change, ends = difference(result)
    note = f"{change}{f' ({ends})' if ends else ''}" if change else f"of {count(metrics.samples, 'sample')}"
    name = metric_name(metric)
    return Card(f"{name[0].upper()}{name[1:]}", metric_value(metric, value, metrics.samples), note)


def _cost_cards(report: Report, result: Row) -> list[Card]:
    batch = report.batch()
    timing = report.timing(result.name, batch) if batch is not None else None
    baseline = report.row(report.baseline)
    cards = []
    if timing is not None:
        latency = timing.end_to_end
        text, ends = with_digits(latency.p50_ms, latency.intervals.get("p50"))
        cards.append(Card(f"Median at batch {timing.batch}", f"{text} ms", ends))
        cards.append(Card("Throughput", f"{significant(timing.throughput)}/s", f"samples at batch {timing.batch}"))
    if result.energy is not None:
        used = result.energy.joules_per_sample
        other = baseline.energy if baseline is not None else None
        compared = f"{significant(used / other.joules_per_sample)}x that of {report.baseline}" if other else "all power"
        cards.append(Card("Energy of a sample", f"{significant(1e3 * used)} mJ", compared))
    if result.size_bytes:
        share = result.size_bytes / baseline.size_bytes if baseline is not None and baseline.size_bytes else None
        note = f"{significant(share)}x {report.baseline}" if share is not None else "on disk"
        cards.append(Card("Size on disk", size(result.size_bytes), note))
    return cards


def _aside(report: Report, shown: Sequence[Column]) -> Table | None:
    aside = [column for column in shown if column.shown == "aside"]
    header = ("row", *(column.title for column in aside))
    rows: list[list[str | Cell]] = [
        [row.name, *(column.cells[index] for column in aside)]
        for index, row in enumerate(report.rows)
        if any(column.cells[index].text for column in aside)
    ]
    return Table(f"Outputs against those of {report.baseline}, and memory", header, rows) if aside else None


def _latencies(report: Report) -> Table | None:
    clocks = [
        (row, timing, latency)
        for row in report.rows
        for timing in row.timings
        for latency in (timing.end_to_end, timing.device)
        if latency is not None
    ]
    if not clocks:
        return None
    header = ("row", "batch", "clock", "mean ms", "p50 ms", "p90 ms", "p99 ms", "CoV", "calls", "samples/s", "speed-up")
    rows: list[list[str | Cell]] = []
    for row, timing, latency in clocks:
        whole = latency is timing.end_to_end
        figures = [latency_cell(latency, figure) for figure in ("mean", "p50", "p90", "p99")]
        text, ends = ratio(timing) if whole else ("", "")
        rows.append(
            [
                row.name,
                str(timing.batch),
                f"{'end to end' if whole else 'on the device'}, {latency.clock}",
                *figures,
                percent(latency.cov),
                f"{latency.iterations:,}",
                significant(timing.throughput) if whole else "",
                Cell(text, ends),
            ]
        )
    return Table("Latency of every row at every batch size, with 95 % intervals", header, rows)


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
    if not report.drift:
        return None
    metric = report.task.primary
    header = ("from", "to", metric_name(metric), "same label", "SQNR", "largest error", "outcome")
    rows = [
        (
            rung.source,
            rung.target,
            metric_change_text(rung, metric),
            same_label(rung),
            decibels(rung.agreement.sqnr_db),
            significant(rung.agreement.max_error),
            "✓ holds" if rung.holds else "✗ falls below the limit",
        )
        for rung in report.drift
    ]
    return Table("Each step from the float model to the engine, against the one before", header, rows)


def _calibrators(report: Report) -> Table | None:
    if report.calibration is None or not report.calibration.methods:
        return None
    metric, methods = report.task.primary, report.calibration.methods
    header = ("calibrator", metric_name(metric), "loss", "mean SQNR", "")
    rows = [
        (
            each.name,
            metric_value(metric, each.metrics.values[metric], each.metrics.samples)
            if metric in each.metrics.values
            else "",
            significant(each.metrics.loss, 4),
            f"{significant(each.mean_sqnr_db)} dB" if each.mean_sqnr_db is not None else "",
            "✓ chosen" if each.chosen else "",
        )
        for each in methods
    ]
    return Table("Calibrators compared on the validation split", header, rows)


def _ranges(report: Report) -> Table | None:
    if report.calibration is None or not report.calibration.histograms:
        return None
    rows = [
        (strip.tensor, significant(strip.amax, 4), percent(clipped_share(strip), 3), f"{sum(strip.counts):,}")
        for strip in report.calibration.histograms
    ]
    return Table("Chosen ranges", ("tensor", "range", "clipped", "values seen"), rows)


def _epochs(report: Report) -> list[Table]:
    found = []
    for title, curve in (("Training", report.training), ("Fine-tuning", report.finetuning)):
        if curve is None or not curve.epochs:
            continue
        names = list(curve.epochs[0].validation.values)
        header = ("epoch", "training loss", "validation loss", *map(metric_name, names), "")
        rows = [
            (
                str(each.epoch),
                significant(each.loss, 4) if each.loss is not None else "",
                significant(each.validation.loss, 4),
                *(
                    metric_value(name, each.validation.values[name], each.validation.samples)
                    if name in each.validation.values
                    else ""
                    for name in names
                ),
                "✓ best" if each.epoch == curve.best_epoch else "",
            )
            for each in curve.epochs
        ]
        found.append(Table(f"{title} by epoch", header, rows))
    return found


def _gpu_states(report: Report) -> Table | None:
    header = ("row", "SM MHz", "memory MHz", "°C", "W", "limit W", "held back by")
    rows = [
        (
            row.name,
            *(
                "" if value is None else f"{value:,.0f}"
                for value in (
                    row.gpu.sm_clock_mhz,
                    row.gpu.memory_clock_mhz,
                    row.gpu.temperature_c,
                    row.gpu.power_w,
                    row.gpu.power_limit_w,
                )
            ),
            ", ".join(row.gpu.limits) or "nothing",
        )
        for row in report.rows
        if row.gpu is not None
    ]
    return Table("The GPU while each row was measured", header, rows) if rows else None


def _rendered(lines: Sequence[str]) -> Markup:
    """Return Markdown as HTML: raw HTML in it stays text, images stay out, tables scroll in their own box."""
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    markdown.add_render_rule("table_open", _table_open)
    markdown.add_render_rule("table_close", _table_close)
    markdown.add_render_rule("th_open", _heading_open)
    return Markup(markdown.render("\n".join(lines)))


def _table_open(*_: Any) -> str:
    return '<div class="scroll" tabindex="0"><table class="rendered">\n'


def _table_close(*_: Any) -> str:
    return "</table></div>\n"


def _heading_open(_: Any, tokens: Sequence[Token], index: int, *__: Any) -> str:
    style = tokens[index].attrGet("style")
    return f'<th scope="col"{f" style={style!r}" if style else ""}>'
