"""All figures of the page."""

from __future__ import annotations

from collections.abc import Iterable

from maseRT.report.figures.calibration import calibrators, histograms
from maseRT.report.figures.confusion import confusion
from maseRT.report.figures.drift import drift_ladder
from maseRT.report.figures.figure import Figure
from maseRT.report.figures.learning import learning
from maseRT.report.figures.precision import precision_strip
from maseRT.report.figures.throughput import throughput
from maseRT.report.figures.trade_offs import trade_offs
from maseRT.report.schema import Report


def page_figures(report: Report) -> dict[str, list[Figure]]:
    """Return the figures for each place in the HTML template, in the order of the page.

    A list is empty where the report lacks the data for its figures.
    """
    task, calibration = report.task, report.calibration
    return {
        "trade_offs": trade_offs(report),
        "throughput": _present([throughput(report)]),
        "precision": _present([precision_strip(report.precision) if report.precision else None]),
        "drift": drift_ladder(report.drift, task),
        "calibrators": _present([calibrators(calibration, task) if calibration else None]),
        "histograms": _present([histograms(calibration.histograms) if calibration else None]),
        "training": learning(report.training, task, key="training", title="Training") if report.training else [],
        "finetuning": learning(report.finetuning, task, key="qat", title="Fine-tuning") if report.finetuning else [],
        "confusion": _present([confusion(report)]),
    }


def _present(figures: Iterable[Figure | None]) -> list[Figure]:
    return [figure for figure in figures if figure is not None]
