"""Writing the report: report.json, report.md and report.html, each in one piece."""

from __future__ import annotations

from pathlib import Path

from maseRT.report.html import html
from maseRT.report.markdown import markdown
from maseRT.report.schema import Report
from maseRT.report.verdict import verdict
from maseRT.workspace import Workspace, write_text


def publish(report: Report, workspace: Workspace) -> list[Path]:
    """Write the report in its three forms, with its verdict, and return their paths.

    Raises:
        StepError: the disk is full or read-only.
    """
    judged = report if report.verdict else report.model_copy(update={"verdict": verdict(report)})
    texts = {
        workspace.report: json_text(judged),
        workspace.report_markdown: markdown(judged),
        workspace.report_html: html(judged),
    }
    for path, text in texts.items():
        write_text(path, text)
    return list(texts)


def json_text(report: Report) -> str:
    """Return a report as JSON, keys in the schema's order; what is not a number is null, as JSON has no NaN."""
    return report.model_dump_json(indent=2) + "\n"
