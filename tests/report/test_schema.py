"""The published schema is that of the code and fits the reports that the code writes; derived values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from build import report

from maseRT.report.files import schema_json
from maseRT.report.schema import SCHEMA, HistogramStrip, Report

PUBLISHED = Path(__file__).parents[2] / "docs" / "report.schema.json"


def test_the_published_schema_is_up_to_date():
    assert PUBLISHED.read_text(encoding="utf-8") == schema_json(), (
        "docs/report.schema.json is out of date; write it anew: masert report --schema > docs/report.schema.json"
    )


def test_the_schema_says_what_a_report_holds():
    schema = json.loads(schema_json())
    assert set(schema["properties"]) == set(Report.model_fields)
    assert schema["properties"]["schema_version"]["const"] == SCHEMA
    assert '"additionalProperties": false' not in schema_json()


def test_a_written_report_has_only_what_the_schema_names():
    schema = json.loads(schema_json())
    _check(report(device="cuda:0").model_dump(mode="json"), schema, schema["$defs"])


@pytest.mark.parametrize(("amax", "share"), [(4.0, 0.0), (3.0, 0.25), (2.5, 0.25), (2.0, 0.5), (0.0, 1.0)])
def test_bins_wholly_beyond_the_range_are_clipped(amax, share):
    assert HistogramStrip(tensor="t", amax=amax, top=4.0, counts=[5, 5, 5, 5]).clipped_share() == share


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
