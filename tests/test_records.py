"""A step runs again exactly when something it depends on has changed."""

import os
from dataclasses import replace

import pytest

from maseRT.errors import StepError
from maseRT.records import FileState, StepRecord, check_inputs, flatten, read_record, why_stale
from maseRT.workspace import Workspace, write_text


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path, "run")


@pytest.fixture
def record(workspace):
    write_text(workspace.plan, "{}")
    state = {"json/plan.json": FileState.of(workspace.plan)}
    return StepRecord("quantize", {"finetune.epochs": "1", "file.a.bin": "12"}, state, {"n": 1}, 0.5)


def test_a_record_survives_the_disk(workspace, record):
    assert read_record(workspace, "quantize") is None
    record.write(workspace)
    assert read_record(workspace, "quantize") == record


WITHOUT_KEY = '{"step": "quantize", "key": [], "outputs": {}, "summary": {}, "seconds": 1}'


@pytest.mark.parametrize("text", ["", "{}", '{"outputs": 3}', WITHOUT_KEY, "nonsense"])
def test_a_damaged_record_counts_as_none(workspace, text):
    write_text(workspace.record("quantize"), text)
    assert read_record(workspace, "quantize") is None


def test_nothing_changed(workspace, record):
    assert why_stale(record, record.key, workspace.root) is None


def test_the_reason_names_what_changed(workspace, record):
    assert why_stale(None, {}, workspace.root) == "never completed"
    new = {**record.key, "finetune.epochs": "2"}
    assert why_stale(record, new, workspace.root) == "finetune.epochs 1 -> 2"
    assert why_stale(record, {**record.key, "file.a.bin": "13"}, workspace.root) == "a.bin changed"


def test_an_output_that_is_gone_or_damaged(workspace, record):
    workspace.plan.write_text("[]")
    os.utime(workspace.plan, ns=(1, 1))
    assert "changed or damaged" in why_stale(record, record.key, workspace.root)
    workspace.plan.unlink()
    assert why_stale(record, record.key, workspace.root) == "json/plan.json is gone"


def test_a_touched_but_equal_file_is_no_change(workspace, record):
    os.utime(workspace.plan, ns=(1, 1))
    assert why_stale(record, record.key, workspace.root) is None


def test_inputs_are_checked_against_the_step_that_made_them(workspace, record):
    made_by = {workspace.plan: "quantize"}
    with pytest.raises(StepError, match="not there yet") as caught:
        check_inputs(workspace, [workspace.plan], made_by, options="--config x.toml")
    assert "masert quantize --config x.toml" in caught.value.fix
    record.write(workspace)
    check_inputs(workspace, [workspace.plan], made_by, options="--config x.toml")
    workspace.plan.write_text("{ ")
    with pytest.raises(StepError, match="damaged"):
        check_inputs(workspace, [workspace.plan], made_by, options="--config x.toml")
    replace(record, outputs={}).write(workspace)
    with pytest.raises(StepError, match="not there yet"):
        check_inputs(workspace, [workspace.plan], made_by, options="--config x.toml")


def test_flatten():
    assert flatten("a", {"b": {"c": 1}, "d": "x", "e": {}}) == {"a.b.c": "1", "a.d": '"x"', "a.e": "{}"}
