"""The outcomes of steps: as text, as JSON, and as an exit code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maseRT.errors import CheckError, MaseRTError, MissingError

if TYPE_CHECKING:
    from maseRT.steps.pipeline import Outcome

Plain = Mapping[str, Any]


def show(outcome: Outcome) -> None:
    """Print a step's outcome: its headline, table and remarks, the gates, and the findings of the audit."""
    from maseRT.console import print_line, print_table

    timing = f"{outcome.seconds:7.1f} s" if outcome.status == "done" else f"{outcome.status:>9}"
    print_line(f"{outcome.step:<13}{timing}  {outcome.headline or outcome.why or 'nothing changed'}")
    if outcome.table:
        print_table(outcome.table)
    for line in (*outcome.remarks, *map(gate_line, _gates([outcome])), *map(finding_line, _findings([outcome]))):
        print_line(line)


def as_dict(outcome: Outcome) -> dict[str, Any]:
    """Return a step's outcome as plain values for JSON."""
    return {
        "step": outcome.step,
        "status": outcome.status,
        "why": outcome.why,
        "seconds": round(outcome.seconds, 3),
        "summary": outcome.summary,
        "outputs": [str(path) for path in outcome.outputs],
    }


def shortfall(outcomes: Sequence[Outcome], *, strict: bool) -> MaseRTError | None:
    """Return the error of a command whose steps completed, or None.

    Gates that failed come first. With `strict`, rows that did not run are an error too, and findings of the audit.
    """
    failed = [gate for gate in _gates(outcomes) if not gate["passed"]]
    if failed:
        return CheckError(
            "\n".join([f"{len(failed)} of {len(_gates(outcomes))} gates failed", *map(gate_line, failed)]),
            where="[gate]",
        )
    if not strict:
        return None
    missing = [row for outcome in outcomes for row in outcome.summary.get("not_run", [])]
    if missing:
        return MissingError(
            "\n".join(missing), where="--strict", fix="install what is missing, or leave it out of [analyze] runtimes"
        )
    return audit_error(_findings(outcomes), where="--strict")


def audit_error(findings: Sequence[Plain], *, where: str) -> CheckError | None:
    """Return the error that lists the findings of an audit; None without findings."""
    if not findings:
        return None
    counted = "1 finding" if len(findings) == 1 else f"{len(findings)} findings"
    return CheckError("\n".join([f"the audit has {counted}", *map(finding_line, findings)]), where=where)


def gate_line(gate: Plain) -> str:
    """Return a gate on one line: its outcome, the limit and the value."""
    row = f" of {gate['row']}" if gate["row"] else ""
    judged = "passed" if gate["passed"] else "FAILED"
    return f"gate {judged}: {gate['name']}{row}: asked {gate['asked']}, got {gate['got']}"


def finding_line(finding: Plain) -> str:
    """Return a finding of the audit on one line."""
    row = f" {finding['row']}:" if finding["row"] else ""
    return f"audit {finding['severity']}: {finding['check']}:{row} {finding['message']}"


def write_junit(target: Path, report: Path, *, strict: bool) -> None:
    """Write the rows, gates and findings of a report.json as JUnit test cases; with `strict`, `shortfall`'s fail.

    Raises:
        UsageError: there is no such report.
        StepError: the report is damaged, or the file cannot be written.
    """
    from maseRT.report.files import load_report
    from maseRT.report.junit import junit_xml
    from maseRT.workspace import write_text

    write_text(target, junit_xml(load_report(report), warnings_fail=strict, missing_fail=strict))


def _gates(outcomes: Sequence[Outcome]) -> list[Plain]:
    return [gate for outcome in outcomes for gate in outcome.summary.get("gates", [])]


def _findings(outcomes: Sequence[Outcome]) -> list[Plain]:
    return [finding for outcome in outcomes for finding in outcome.summary.get("findings", [])]
