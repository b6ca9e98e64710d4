"""JUnit XML: well-formed whatever the texts hold, and counted as CI systems read it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from xml.etree import ElementTree

import pytest
from build import report
from hypothesis import given, settings
from hypothesis import strategies as st

from maseRT.report.junit import junit_xml
from maseRT.report.schema import Finding, Gate, Report

SOUND = cache(report)


def made(*, gates: Sequence[Gate] = (), findings: Sequence[Finding] = (), run: str = "digits") -> Report:
    return SOUND().model_copy(update={"gates": list(gates), "findings": list(findings), "run": run})


def gate(name: str = "max_size_mb", *, passed: bool, asked: str = "at most 1 MB", got: str = "2 MB") -> Gate:
    return Gate(name=name, row="onnxruntime-qdq", asked=asked, got=got, passed=passed)


def error(message: str = "wrong", *, check: str = "f1-bound", row: str = "torch-int8") -> Finding:
    return Finding(check=check, severity="error", row=row, message=message)


def suite(text: str, name: str) -> ElementTree.Element:
    return next(each for each in parsed(text) if each.get("name") == name)


def parsed(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text.encode("utf-8"))


def test_a_gate_is_a_test_case():
    found = suite(junit_xml(made(gates=[gate(passed=True), gate("max_latency_ms", passed=False)])), "gates")
    passed, failed = found.findall("testcase")
    assert passed.find("failure") is None
    assert failed.find("failure").get("message") == "onnxruntime-qdq: asked at most 1 MB, got 2 MB"
    assert failed.get("name") == "max_latency_ms (at most 1 MB)"
    assert failed.get("classname") == "masert.digits.gates"
    assert (found.get("tests"), found.get("failures")) == ("2", "1")


def test_an_error_is_a_failed_case_and_a_warning_is_told():
    warning = Finding(check="variation", severity="warning", row="torch-fp32", message="varies by 20 %")
    found = suite(junit_xml(made(findings=[error("one"), error("two"), warning])), "audit")
    failed, told = found.findall("testcase")
    assert failed.find("failure").text == "one\ntwo"
    assert failed.get("name") == "f1-bound torch-int8"
    assert told.find("failure") is None
    assert "varies by 20 %" in told.find("system-out").text
    assert found.get("failures") == "1"


def test_no_errors_are_a_case_that_passes():
    found = suite(junit_xml(made()), "audit")
    assert [case.get("name") for case in found] == ["no errors"]
    assert found.get("failures") == "0"


def test_rows_carry_their_time_and_those_that_did_not_run_are_skipped():
    written = report()
    found = suite(junit_xml(written), "rows")
    cases = {case.get("name"): case for case in found}
    assert list(cases) == [row.name for row in written.rows]
    assert float(cases["torch-fp32"].get("time")) == pytest.approx(written.row("torch-fp32").seconds, abs=1e-3)
    assert cases["tensorrt-int8"].find("skipped").get("message") == "no NVIDIA driver here"
    assert found.get("skipped") == "1"


def test_what_strict_ends_with_fails():
    warning = Finding(check="variation", severity="warning", row="torch-fp32", message="varies by 20 %")
    written = made(findings=[warning])
    assert suite(junit_xml(written, warnings_fail=True), "rows").get("failures") == "0"
    text = junit_xml(written, warnings_fail=True, missing_fail=True)
    assert [case.find("failure").text for case in suite(text, "audit")] == ["varies by 20 %"]
    (missing,) = [case for case in suite(text, "rows") if case.find("failure") is not None]
    assert (missing.get("name"), missing.find("failure").text) == ("tensorrt-int8", "no NVIDIA driver here")
    assert parsed(text).get("failures") == "2"


def test_the_sums_of_the_root_are_those_of_its_suites():
    root = parsed(junit_xml(made(gates=[gate(passed=False)], findings=[error()])))
    assert root.tag == "testsuites"
    for count in ("tests", "failures", "errors"):
        assert int(root.get(count)) == sum(int(each.get(count)) for each in root)
        assert all(len(each.findall("testcase")) == int(each.get("tests")) for each in root)
    assert all(each.get("timestamp") == "2026-11-23T09:00:00" for each in root)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30))
def test_any_text_makes_well_formed_xml(text):
    text = "".join(each for each in text if not 0xD800 <= ord(each) <= 0xDFFF) + "\x00\x1b[31m<&\"']]>\uffff"
    found = made(gates=[gate(passed=False, asked=text, got=text)], findings=[error(text, row=text)], run=text)
    failure = suite(junit_xml(found), "audit").find("testcase/failure")
    assert "\ufffd[31m<&\"']]>\ufffd" in failure.text


ATTRIBUTES = {
    "testsuites": {"name", "time", "tests", "failures", "errors"},
    "testsuite": {"name", "time", "tests", "failures", "errors", "skipped", "timestamp"},
    "testcase": {"name", "time", "classname"},
    "failure": {"message", "type"},
    "skipped": {"message"},
    "system-out": set(),
}
"""What junit-10.xsd allows, by which Jenkins' xUnit plug-in judges a file before it reads it."""


def test_there_is_nothing_that_the_schema_does_not_know():
    seen = set()
    not_run = SOUND().rows[-1].model_copy(update={"metrics": None, "not_run": "no such library"})
    found = made(gates=[gate(passed=False)], findings=[error()])
    root = parsed(junit_xml(found.model_copy(update={"rows": [*found.rows, not_run]})))
    for element in root.iter():
        seen.add(element.tag)
        assert set(element.keys()) <= ATTRIBUTES[element.tag]
    assert seen == set(ATTRIBUTES)
