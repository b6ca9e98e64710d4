"""The report as Markdown, short enough for a pull request, and its table for the console."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from maseRT.report.columns import Cell, columns, launch_bound_sentence
from maseRT.report.drift import falls, metric_before_and_after, same_label
from maseRT.report.environment import common_method, config_values, differing_method, machine_facts, samples_sentence
from maseRT.report.schema import Report
from maseRT.report.verdict import verdict
from maseRT.report.wording import capitalized, decibels, metric_name


def console_table(report: Report) -> list[tuple[str, ...]]:
    """Return the rows as text, the header first; columns that are empty in every row are left out. [] if all are."""
    shown = [column for column in columns(report) if column.shown == "everywhere"]
    if not shown:
        return []
    header = ("what", *(column.title for column in shown))
    rows = [(row.name, *(column.cells[index].text for column in shown)) for index, row in enumerate(report.rows)]
    return [header, *rows]


def markdown(report: Report) -> str:
    """Return the report as Markdown; method, machine and config are folded away."""
    parts = [
        [f"# {_plain(report.run)}", "", f"**{_plain(report.verdict or verdict(report))}**"],
        _gates(report),
        _findings(report),
        _rows(report),
        _drift(report),
        _not_run(report),
        *(["", f"## {_plain(section.title)}", "", *section.lines] for section in report.sections),
        _folded("Method and machine", _method(report)),
        _folded("Config", _config(report.config)),
    ]
    return "\n".join(line for part in parts for line in part).rstrip() + "\n"


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table; all columns but the first are right-aligned.

    Args:
        rows: the header and the rows, in plain text; characters with a meaning in Markdown are escaped.
    """
    header, *cells = ([_plain(cell) for cell in row] for row in rows)
    return [f"| {' | '.join(row)} |" for row in (header, ["---", *("---:" for _ in header[1:])], *cells)]


def _plain(text: str) -> str:
    """Return text on one line that Markdown shows as it is: names come from users' models and can hold anything."""
    text = " ".join(text.split()).replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    for mark in "|`*[]":
        text = text.replace(mark, f"\\{mark}")
    return text


def _rows(report: Report) -> list[str]:
    shown = [column for column in columns(report) if column.shown != "aside"]
    ran = [index for index, row in enumerate(report.rows) if row.metrics is not None]
    if not ran:
        return []
    header = ("what", *(column.title for column in shown))
    cells = [(report.rows[index].name, *(_text(column.cells[index]) for column in shown)) for index in ran]
    batch = report.batch()
    seen = _plain(samples_sentence(report))
    told = f"{capitalized(seen)}{f'; times at batch {batch}' if batch is not None else ''}"
    bound = launch_bound_sentence(report)
    return [
        "",
        *markdown_table([header, *cells]),
        "",
        f"{told}; in brackets 95 % intervals.{f' {capitalized(_plain(bound))}.' if bound else ''}",
    ]


def _text(cell: Cell) -> str:
    return f"{cell.text} ({cell.interval})" if cell.interval else cell.text


def _gates(report: Report) -> list[str]:
    if not report.gates:
        return []
    lines = [
        f"- {'passed' if gate.passed else '**failed**'}: {_plain(gate.name)}"
        f"{f' of {_plain(gate.row)}' if gate.row else ''}, asked {_plain(gate.asked)}, got {_plain(gate.got)}"
        for gate in sorted(report.gates, key=lambda gate: gate.passed)
    ]
    return ["", "## Gates", "", *lines]


def _findings(report: Report) -> list[str]:
    if not report.findings:
        return []
    lines = [
        f"- **{finding.severity}**{f' in {_plain(finding.row)}' if finding.row else ''}: {_plain(finding.message)} "
        f"({_plain(finding.check)})"
        for finding in sorted(report.findings, key=lambda finding: finding.severity)
    ]
    return ["", "## What the self-audit found", "", *lines]


def _drift(report: Report) -> list[str]:
    if not report.drift:
        return []
    header = ("from", "to", metric_name(report.task.primary), "same label", "SQNR", "")
    cells = [
        (
            rung.source,
            rung.target,
            metric_before_and_after(rung, report.task.primary),
            same_label(rung),
            decibels(rung.agreement.sqnr_db),
            "holds" if rung.holds else "falls",
        )
        for rung in report.drift
    ]
    told = [f"- {_plain(sentence)}" for sentence in falls(report)]
    return ["", "## Drift", "", *markdown_table([header, *cells]), *(["", *told] if told else [])]


def _not_run(report: Report) -> list[str]:
    missing = [f"- {_plain(row.name)}: {_plain(row.not_run)}" for row in report.rows if row.metrics is None]
    return ["", "## Not run", "", *missing] if missing else []


def _method(report: Report) -> list[str]:
    facts = [*machine_facts(report), *common_method(report)]
    lines = [f"- {_plain(key)}: {_plain(value)}" for key, value in facts]
    lines += [
        f"- {_plain(row)}: {_plain(', '.join(f'{key} {value}' for key, value in values))}"
        for row, values in differing_method(report)
    ]
    notes = [f"- {_plain(note)}" for note in report.notes]
    return [*lines, *(["", "Notes of the plan:", "", *notes] if notes else [])]


def _config(config: Mapping[str, Any]) -> list[str]:
    return [f"- {_plain(key)} = {_plain(value)}" for section in config_values(config) for key, value in section.flat()]


def _folded(summary: str, lines: Iterable[str]) -> list[str]:
    return ["", "<details>", f"<summary>{summary}</summary>", "", *lines, "", "</details>"]
