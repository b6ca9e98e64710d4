"""Is everything there that a row must have, and nothing that it cannot have? Were all shown the same samples?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from maseRT.report.checks.told import Told, error
from maseRT.report.schema import Metrics, Report


def numbers(report: Report) -> Iterator[Told]:
    """Every number is finite: JSON has no others, and comparisons with NaN are never true."""
    plain = report.model_dump(mode="python", exclude={"config", "sections", "findings", "gates"})
    for where, value in _floats(plain, ""):
        if not math.isfinite(value):
            yield error(f"{where} is {value}; nothing else was checked")


def _floats(value: Any, where: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, float):
        yield where, value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from _floats(each, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from _floats(each, f"{where}[{index}]")


def rows(report: Report) -> Iterator[Told]:
    """Names are unique; baseline and result are rows that ran; where anything deployed was timed there is one."""
    for name, count in Counter(row.name for row in report.rows).items():
        if count > 1:
            yield error(f"{count} rows have this name", name)
    baseline, ran = report.row(report.baseline), report.ran()
    if ran and (baseline is None or baseline.metrics is None):
        yield error(f"the others are compared with {report.baseline!r}, which is no row that ran")
    for row in ran:
        if row.role == "baseline" and row.name != report.baseline:
            yield error(f"is the float model, and the others are compared with {report.baseline}", row.name)
    deployed = [row.name for row in ran if row.role == "deployed" and row.timings]
    if report.result:
        judged = report.row(report.result)
        if judged is None or judged.metrics is None or judged.role == "simulated":
            yield error(f"the result, {report.result!r}, is no row that ran where it can be deployed")
    elif deployed:
        yield error(f"names no result, though {', '.join(deployed)} ran and was timed")


def not_run(report: Report) -> Iterator[Told]:
    """A row either ran or says why not, and one that did not run has no measurements."""
    for row in report.rows:
        if row.metrics is None and not row.not_run:
            yield error("has no metrics and does not say why it did not run", row.name)
        measured = [name for name in ("metrics", "timings", "energy", "memory", "agreement") if getattr(row, name)]
        if row.not_run and measured:
            yield error(f"did not run ({row.not_run}), and still has {', '.join(measured)}", row.name)


def simulated(report: Report) -> Iterator[Told]:
    """Fake quantization computes in float: its speed and energy are those of no INT8 model, so it has none."""
    for row in report.rows:
        if row.role == "simulated" and (row.timings or row.energy):
            yield error("is simulated in float; its latency and energy mean nothing and must not be shown", row.name)


def samples(report: Report) -> Iterator[Told]:
    """All rows answered the same number of samples, that which the report states: else the metrics are of subsets."""
    stated = report.samples.evaluated
    for row in report.ran():
        if row.metrics is not None and row.metrics.samples != stated:
            yield error(f"was evaluated on {row.metrics.samples} samples, the report says {stated}", row.name)
        if row.agreement is not None and row.agreement.samples != stated:
            yield error(f"was compared on {row.agreement.samples} samples, the report says {stated}", row.name)
    for rung in report.drift:
        if rung.agreement.samples != stated:
            told = f"{rung.source} -> {rung.target} was compared on {rung.agreement.samples} samples"
            yield error(f"{told}, the report says {stated}")


def whole_split(report: Report) -> Iterator[Told]:
    """The samples are the whole split, its short last batch too, unless [analyze] batches limits them."""
    shown = report.samples
    analyze = report.config.get("analyze")
    batches = analyze.get("batches") if isinstance(analyze, dict) else None
    limit = batches * shown.batch_size if isinstance(batches, int) and not isinstance(batches, bool) else None
    expected = shown.available if limit is None else min(shown.available, limit)
    if shown.evaluated == expected:
        return
    told = f"{shown.evaluated} samples of the {shown.split} split were evaluated, of {shown.available}"
    if limit is not None:
        yield error(f"{told}; [analyze] batches = {batches} of {shown.batch_size} makes {expected}")
    else:
        yield error(f"{told}, and no [analyze] batches limits them")


def same_validation(report: Report) -> Iterator[Told]:
    """Calibrators, and the epochs of one training, were judged on the same number of samples."""
    for what, found in _series(report):
        counts = {metrics.samples for metrics in found}
        if len(counts) > 1:
            listed = ", ".join(str(count) for count in sorted(counts))
            yield error(f"{what} were evaluated on different numbers of samples: {listed}")


def _series(report: Report) -> Iterator[tuple[str, list[Metrics]]]:
    if report.calibration is not None:
        yield "the calibrators", [method.metrics for method in report.calibration.methods]
    for what, learning in (("training", report.training), ("fine-tuning", report.finetuning)):
        if learning is not None:
            yield f"the epochs of {what}", [epoch.validation for epoch in learning.epochs]
