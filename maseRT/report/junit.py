"""JUnit XML, the form in which CI systems read results: rows, gates and the self-audit as test cases."""

from __future__ import annotations

import re
from dataclasses import dataclass
from xml.etree import ElementTree

from maseRT.report.schema import Finding, Gate, Report, Row

_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 cannot hold, not even escaped."""


@dataclass(frozen=True)
class _Case:
    """A test case.

    Attributes:
        failure: why it failed; "" if it did not.
        skipped: why it was not run; "" if it was.
        kind: of failure.
    """

    name: str
    seconds: float = 0.0
    failure: str = ""
    skipped: str = ""
    kind: str = ""
    told: str = ""


def junit_xml(report: Report, *, warnings_fail: bool = False, missing_fail: bool = False) -> str:
    """Return a report as JUnit XML.

    Three suites: "rows", where a row that did not run is skipped, with the time that each took; "gates", where a gate
    that is not reached fails; "audit", where each finding that is an error fails, and warnings stand in the output. As
    Jenkins, GitLab, GitHub actions and others read it (testsuites, testsuite, testcase, failure, skipped, system-out).

    Args:
        report: audited and held against the gates.
        warnings_fail: as the command does with --strict.
        missing_fail: so do rows that did not run.
    """
    suites = {
        "rows": [_row(row, missing_fail=missing_fail) for row in report.rows],
        "gates": [_gate(gate) for gate in report.gates],
        "audit": _audit(report.findings, warnings_fail=warnings_fail),
    }
    cases = [case for found in suites.values() for case in found]
    root = ElementTree.Element("testsuites", {"name": _text(f"masert {report.run}"), **_counts(cases)})
    root.set("time", f"{report.wall_seconds:.3f}")
    for name, found in suites.items():
        _add_suite(root, report, name, found)
    ElementTree.indent(root)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{ElementTree.tostring(root, encoding="unicode")}\n'


def _row(row: Row, *, missing_fail: bool) -> _Case:
    why = "" if row.metrics is not None else row.not_run or "did not run"
    if missing_fail:
        return _Case(row.name, row.seconds, failure=why, kind="row")
    return _Case(row.name, row.seconds, skipped=why)


def _gate(gate: Gate) -> _Case:
    told = f"{gate.row + ': ' if gate.row else ''}asked {gate.asked}, got {gate.got}"
    name = f"{gate.name} ({gate.asked})"
    return _Case(name, failure="" if gate.passed else told, kind="gate", told=told)


def _audit(findings: list[Finding], *, warnings_fail: bool) -> list[_Case]:
    """Return a failing case per check and row that has errors; one that passes where there are none."""
    if warnings_fail:
        findings = [finding.model_copy(update={"severity": "error"}) for finding in findings]
    errors: dict[tuple[str, str], list[str]] = {}
    for finding in findings:
        if finding.severity == "error":
            errors.setdefault((finding.check, finding.row), []).append(finding.message)
    warned = "\n".join(
        f"warning: {each.row + ': ' if each.row else ''}{each.message} ({each.check})"
        for each in findings
        if each.severity == "warning"
    )
    failed = [
        _Case(f"{check} {row}".strip(), failure="\n".join(messages), kind=check)
        for (check, row), messages in errors.items()
    ]
    return (
        [*failed, _Case("warnings", told=warned)] if failed and warned else failed or [_Case("no errors", told=warned)]
    )


def _add_suite(root: ElementTree.Element, report: Report, name: str, cases: list[_Case]) -> None:
    suite = ElementTree.SubElement(root, "testsuite", {"name": name, **_counts(cases)})
    suite.set("skipped", str(sum(case.skipped != "" for case in cases)))  # Jenkins' schema has it here alone
    suite.set("time", f"{sum(case.seconds for case in cases):.3f}")
    suite.set("timestamp", _text(report.created[:19]))  # the schema wants no time zone
    for case in cases:
        classname = _text(f"masert.{report.run}.{name}")
        element = ElementTree.SubElement(suite, "testcase", {"classname": classname, "name": _text(case.name)})
        element.set("time", f"{case.seconds:.3f}")
        if case.skipped:
            ElementTree.SubElement(element, "skipped", {"message": _text(case.skipped)})
        if case.failure:
            failure = ElementTree.SubElement(
                element, "failure", {"message": _text(case.failure), "type": _text(case.kind)}
            )
            failure.text = _text(case.failure)
        if case.told:
            ElementTree.SubElement(element, "system-out").text = _text(case.told)


def _counts(cases: list[_Case]) -> dict[str, str]:
    return {
        "tests": str(len(cases)),
        "failures": str(sum(case.failure != "" for case in cases)),
        "errors": "0",
    }


def _text(text: str) -> str:
    return _NOT_XML.sub("\ufffd", text)
