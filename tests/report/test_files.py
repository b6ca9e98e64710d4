"""Reports come back as they were written; everything else is refused in plain words."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from build import raw_report, report
from hypothesis import given, settings
from hypothesis import strategies as st

from maseRT.errors import MaseRTError, StepError, UsageError
from maseRT.report.files import load_report
from maseRT.report.schema import Report


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def changed(*path: Any, to: Any) -> dict[str, Any]:
    raw = report().model_dump(mode="json")
    target: Any = raw
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = to
    return raw


@pytest.mark.parametrize("options", [{}, {"device": "cuda:0"}])
def test_a_report_comes_back_as_it_was_written(tmp_path, options):
    written = report(**options)
    path = write(tmp_path / "r.json", written.model_dump_json())
    assert load_report(path) == written


def test_fields_that_have_defaults_may_be_left_out(tmp_path):
    assert load_report(write(tmp_path / "r.json", raw_report())) == report()


def test_a_runs_folder_stands_for_its_report(tmp_path):
    folder = tmp_path / "mase_output" / "tensorrt" / "quantization" / "digits"
    write(folder / "json" / "report.json", raw_report())
    assert load_report(folder).run == "digits"


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        ("", UsageError, "not JSON"),
        ("# digits\n\nINT8 is faster", UsageError, "not JSON"),
        ("[1, 2]", UsageError, "JSON array"),
        ("12", UsageError, "JSON number"),
        ('{"a": 1}', UsageError, "no report: it has no schema_version"),
        ('{"schema_version": 2, "run": ', StepError, "damaged"),
        ('{"schema_version": 2, "run": "half \\ud800"}', StepError, "surrogates not allowed"),
        ('{"schema_version": 2, "wall_seconds": NaN}', StepError, "NaN is no number"),
        ('{"schema_version": 2, "wall_seconds": 1e999}', StepError, "1e999 is no number"),
        ("[" * 100_000, StepError, "too deeply nested"),
        ('{"schema": 1, "rows": []}', StepError, "older maseRT: schema version 1"),
        ('{"schema_version": 1}', StepError, "older maseRT: schema version 1"),
        ('{"schema_version": 3}', StepError, "newer maseRT: schema version 3"),
        ('{"schema_version": "two"}', StepError, "schema version 'two'"),
        ('{"schema_version": true}', StepError, "schema version True"),
        ('{"schema_version": 2}', StepError, "[run] is missing"),
    ],
)
def test_what_is_no_report_is_refused_in_plain_words(tmp_path, content, error, words):
    path = write(tmp_path / "report.json", content)
    with pytest.raises(error) as caught:
        load_report(path)
    assert words in caught.value.what
    assert caught.value.where == str(path)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("rows", 0, "metrics", "loss"), "0.3", "rows[0].metrics.loss"),
        (("rows", 0, "metrics", "samples"), 1.5, "rows[0].metrics.samples"),
        (("rows", 0, "size_bytes"), -1, "rows[0].size_bytes"),
        (("rows", 0, "role"), "base", "rows[0].role"),
        (("rows",), {}, "rows"),
        (("samples",), None, "samples"),
        (("rows", 5, "agreement", "label_agreement"), 1.5, "rows[5].agreement.label_agreement"),
    ],
)
def test_values_of_wrong_types_are_named_by_their_place(tmp_path, path, value, words):
    with pytest.raises(StepError) as caught:
        load_report(write(tmp_path / "report.json", changed(*path, to=value)))
    assert words in caught.value.what
    assert "analyze" in caught.value.fix


def test_keys_of_a_newer_version_are_left_out_and_told(tmp_path, caplog):
    raw = report().model_dump(mode="json")
    raw |= {"masert": "9.1.0", "weather": {"rain": True}}
    raw["rows"][0]["timings"][0]["end_to_end"]["p95_ms"] = raw["rows"][1]["Colour"] = 1.0
    assert load_report(write(tmp_path / "r.json", raw)) == report().model_copy(update={"masert": "9.1.0"})
    (told,) = caplog.messages
    assert "written by maseRT 9.1.0" in told
    assert told.endswith("does not know: rows[0].timings[0].end_to_end.p95_ms, rows[1].Colour, weather")


def test_a_known_key_is_missing_however_many_unknown_ones_there_are(tmp_path):
    raw = report().model_dump(mode="json")
    raw["rows"][0]["Runtime"] = raw["rows"][0].pop("runtime")
    with pytest.raises(StepError, match=r"rows\[0\]\.runtime: is missing"):
        load_report(write(tmp_path / "r.json", raw))


def test_many_mistakes_are_counted_and_not_all_listed(tmp_path):
    raw = report().model_dump(mode="json")
    for row in raw["rows"]:
        row["size_bytes"] = "x" * 10_000
    with pytest.raises(StepError) as caught:
        load_report(write(tmp_path / "report.json", raw))
    assert f"and {len(raw['rows']) - 5} more" in caught.value.what
    assert max(map(len, caught.value.what.splitlines())) < 200


def test_files_that_are_not_there_are_usage_errors(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        load_report(tmp_path / "nothing.json")
    with pytest.raises(UsageError, match="the folder has no"):
        load_report(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80ONNX")
    with pytest.raises(UsageError, match="not text"):
        load_report(tmp_path / "binary")
    write(tmp_path / "file", "{}")
    with pytest.raises(UsageError, match="no such file"):
        load_report(tmp_path / "file" / "json")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(Report.model_fields)), VALUES)
def test_any_value_in_any_place_is_read_or_refused(tmp_path_factory, key, value):
    path = tmp_path_factory.getbasetemp() / "any.json"
    write(path, {**_PLAIN, key: value})
    with suppress(MaseRTError):
        assert load_report(path).model_dump(mode="json")[key] == value


_PLAIN = report().model_dump(mode="json")
