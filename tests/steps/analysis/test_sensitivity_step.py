"""The ranking of layers by what quantizing each alone costs."""

import json

import pytest
import tomli
from projects import CONFIG, Project, new_project

from maseRT.config import PrecisionRule

SECTIONS = CONFIG[: CONFIG.index("[finetune]")]
ANALYZE = """
[analyze]
runtimes = ["torch"]
iterations = 1
warmup = 0
sensitivity = true
sensitivity_batches = 1
sensitivity_layers = 2
"""
BAD_RANGE = 'calibrate.methods=["max", { name = "conv2", method = { percentile = 5 } }]'


@pytest.fixture(scope="module")
def ranked(tmp_path_factory) -> Project:
    """A run in which conv2 has a range that cuts off nearly everything."""
    project = new_project(tmp_path_factory.mktemp("ranked"), SECTIONS + ANALYZE)
    project.transform(BAD_RANGE)
    return project


def ranking(project: Project) -> dict:
    return json.loads(project.workspace.sensitivity.read_text())


def test_the_layer_with_the_bad_range_is_the_worst(ranked):
    found = ranking(ranked)
    worst, *others = found["layers"]
    assert worst["layer"] == "conv2"
    assert worst["loss_change"] > 10 * max(abs(layer["loss_change"]) for layer in others)
    assert worst["accuracy_change"] < 0
    assert worst["sqnr_db"] < 10 < min(layer["sqnr_db"] for layer in others)
    assert found["float"]["samples"] == 128


def test_the_ranking_falls(ranked):
    losses = [layer["loss_change"] for layer in ranking(ranked)["layers"]]
    assert losses == sorted(losses, reverse=True)
    plan = json.loads(ranked.workspace.plan.read_text())
    assert {layer["layer"] for layer in ranking(ranked)["layers"]} == {
        layer["name"] for layer in plan["layers"] if layer["precision"] == "int8"
    }


def test_the_rules_can_be_pasted(ranked):
    rules = ranking(ranked)["rules"]
    parsed = tomli.loads(f"rules = [{''.join(rules)}]")["rules"]
    assert parsed[0] == {"name": "conv2", "precision": "fp16"}
    assert len(parsed) <= 2
    assert all(PrecisionRule.model_validate(rule) for rule in parsed)


def test_the_report_holds_the_ranking(ranked):
    text = ranked.workspace.report_markdown.read_text()
    assert text.index("## Sensitivity") < text.index("| conv2 |")
    assert '{ name = "conv2", precision = "fp16" },' in text
    sections = {section["key"]: section for section in json.loads(ranked.workspace.report.read_text())["sections"]}
    assert sections["sensitivity"]["values"] == ranking(ranked)


def test_the_console_is_told(ranked):
    outcome = ranked.transform(BAD_RANGE, "analyze.sensitivity_batches=2")["analyze"]
    assert "256 validation samples" in " ".join(outcome.remarks) or "229 validation samples" in " ".join(
        outcome.remarks
    )
    assert any(line.startswith("  conv2") for line in outcome.remarks)
    assert '  { name = "conv2", precision = "fp16" },' in outcome.remarks


def test_a_plan_without_int8_has_no_ranking(tmp_path):
    project = new_project(tmp_path / "project", SECTIONS + ANALYZE)
    outcome = project.transform("quantize.precision='fp32'")["analyze"]
    assert outcome.status == "done"
    assert "sensitivity: the plan has no INT8 layer" in outcome.remarks
    assert not project.workspace.sensitivity.exists()
