"""The published schema is that of the code, and describes the reports that the code writes."""

from __future__ import annotations

import json
from pathlib import Path

from build import report

from maseRT.report.files import schema_json
from maseRT.report.schema import SCHEMA, Report

PUBLISHED = Path(__file__).parents[2] / "docs" / "report.schema.json"


def test_the_published_schema_is_up_to_date():
    assert PUBLISHED.read_text(encoding="utf-8") == schema_json(), (
        "docs/report.schema.json is out of date; write it anew: masert report --schema > docs/report.schema.json"
    )


def test_the_schema_says_what_a_report_holds():
    schema = json.loads(schema_json())
    assert set(schema["properties"]) == set(Report.model_fields)
    assert schema["properties"]["schema_version"]["const"] == SCHEMA
    assert schema["additionalProperties"] is False


def test_a_written_report_has_only_what_the_schema_names():
    schema = json.loads(schema_json())
    _check(report(device="cuda:0").model_dump(mode="json"), schema, schema["$defs"])


def _check(value, schema, definitions):
    """Follow a value along its schema: every object's keys are named, every required one is there."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rsplit("/", 1)[1]]
    if "anyOf" in schema:
        kinds = [each for each in schema["anyOf"] if each.get("type") != "null"]
        if value is not None:
            _check(value, kinds[0], definitions)
        return
    if isinstance(value, dict) and "properties" in schema:
        assert set(schema.get("required", ())) <= set(value) <= set(schema["properties"])
        for key, each in value.items():
            _check(each, schema["properties"][key], definitions)
    elif isinstance(value, list):
        for each in value:
            _check(each, schema["items"], definitions)
