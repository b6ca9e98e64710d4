"""The three forms of a report are written, and JSON stays JSON."""

import json
import math

import reports
from reports import make

from maseRT.report.publish import json_text, publish
from maseRT.report.schema import Report
from maseRT.report.verdict import verdict
from maseRT.workspace import Workspace


def test_a_report_is_published_in_three_forms(tmp_path):
    workspace = Workspace(tmp_path, "digits")
    report = make(reports.digits())
    assert publish(report, workspace) == [workspace.report, workspace.report_markdown, workspace.report_html]
    saved = Report.model_validate_json(workspace.report.read_text())
    assert saved.verdict == verdict(report)
    assert saved.model_copy(update={"verdict": ""}) == report
    assert saved.verdict in workspace.report_markdown.read_text()
    assert not list(tmp_path.rglob(".partial-*"))


def test_a_verdict_that_was_given_is_kept(tmp_path):
    workspace = Workspace(tmp_path, "digits")
    publish(make(reports.digits(), verdict="As it was."), workspace)
    assert json.loads(workspace.report.read_text())["verdict"] == "As it was."
    assert "As it was." in workspace.report_html.read_text()


def test_json_has_null_for_what_is_no_number_and_reads_back():
    raw = reports.digits()
    raw["rows"][0]["metrics"]["loss"] = float("nan")
    raw["sections"] = [{"key": "k", "title": "t", "values": {"x": float("inf")}, "lines": []}]
    text = json_text(make(raw))

    def refuse(name):
        raise AssertionError(name)

    loaded = json.loads(text, parse_constant=refuse)
    assert loaded["rows"][0]["metrics"]["loss"] is None
    assert loaded["sections"][0]["values"]["x"] is None
    assert math.isnan(Report.model_validate_json(text).rows[0].metrics.loss)


def test_keys_stand_in_the_schema_s_order():
    assert list(json.loads(json_text(make(reports.digits())))) == list(Report.model_fields)
