"""What a report says about itself once its figures are there: findings, gates, and the verdict over both."""

from __future__ import annotations

from typing import Any

from maseRT.config import GateSection
from maseRT.report.audit import audit
from maseRT.report.gates import judge
from maseRT.report.schema import Report
from maseRT.report.verdict import verdict


def judged(report: Report, gate: GateSection | None) -> Report:
    """Return the report audited, held against the gates, and with the verdict that follows."""
    gates = judge(report, gate) if gate else []
    report = report.model_copy(update={"findings": audit(report), "gates": gates})
    return report.model_copy(update={"verdict": verdict(report)})


def judgement(report: Report) -> dict[str, Any]:
    """Return verdict, findings and gates as plain values, for a step's summary."""
    return report.model_dump(mode="json", include={"verdict", "findings", "gates"})
