"""masert report, compare and audit, and what gates and findings do to the end of analyze."""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from build import raw_report, row
from typer.testing import CliRunner

from maseRT.cli import app
from maseRT.cli_outcomes import shortfall
from maseRT.errors import ExitCode
from maseRT.steps.pipeline import Outcome


@pytest.fixture
def run_folder(tmp_path) -> Callable[..., Path]:
    """Writes the folder of a run, as analyze leaves it."""

    def _run_folder(name: str = "run", spoil: Callable[[dict], object] = lambda raw: None) -> Path:
        raw = raw_report() | {"run": name}
        spoil(raw)
        file = tmp_path / name / "json" / "report.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(raw))
        return tmp_path / name

    return _run_folder


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def energy_off(raw: dict) -> None:
    """E is not P t any more: an error."""
    next(each for each in raw["rows"] if each.get("energy"))["energy"]["joules_per_sample"] *= 3


def busy(raw: dict) -> None:
    """A figure that is less sure than it looks: a warning."""
    row(raw, "onnxruntime-qdq")["timings"][0]["end_to_end"]["cov"] = 0.9


def test_report_writes_where_analyze_does(run_folder, tmp_path):
    folder = run_folder()
    result = invoke("report", folder)
    assert result.exit_code == 0, result.output
    assert (folder / "report.html").read_text().lstrip().startswith("<!")
    assert "torch-fp32" in (folder / "report.md").read_text()
    alone = tmp_path / "elsewhere.json"
    alone.write_text((folder / "json/report.json").read_text())
    assert invoke("report", alone).exit_code == 0
    assert (tmp_path / "report.html").is_file()
    assert invoke("report", folder / "json/report.json", "--output", tmp_path / "o").exit_code == 0
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["report.html", "report.md"]


def test_report_prints_the_schema():
    assert "Row" in json.loads(invoke("report", "--schema").stdout)["$defs"]


@pytest.mark.parametrize("command", ["report", "audit"])
def test_what_is_no_report_is_said(command, tmp_path):
    result = invoke(command, tmp_path)
    assert (result.exit_code, result.stdout) == (ExitCode.USAGE, "")
    assert "report.json" in result.stderr


@pytest.mark.parametrize("command", ["report", "audit", "compare"])
def test_what_a_newer_version_added_is_left_out_with_a_word(command, run_folder):
    folders = [run_folder("a", lambda raw: raw.update(masert="9.1.0", weather="rain"))]
    folders += [run_folder("b")] if command == "compare" else []
    result = invoke(command, *folders)
    assert result.exit_code == 0, result.output
    assert "written by maseRT 9.1.0" in " ".join(result.stderr.split())
    assert json.loads(invoke(command, *folders, "--json").stdout)


def test_a_sound_report_passes_the_audit(run_folder):
    result = invoke("audit", run_folder(), "--strict")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "nothing contradicts itself" in result.stdout


def places(value: object, *path: object) -> Iterator[tuple[object, ...]]:
    """Yield the paths of all values within one."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield (*path, key)
        yield from places(one, *path, key)


def edit(raw: dict, rng: random.Random) -> None:
    """Change a value as a person could who edits the file, most often to one of the same type."""
    *path, key = rng.choice(list(places(raw)))
    target: Any = raw
    for step in path:
        target = target[step]
    value = target[key]
    if rng.random() < 0.2:
        del target[key]
    elif isinstance(value, float):
        target[key] = rng.choice([0.0, -value, value * 1e9, 1e308, -1e308, 5e-324])
    elif isinstance(value, int) and not isinstance(value, bool):
        target[key] = rng.choice([0, -value, 2**63])
    elif isinstance(value, str):
        target[key] = rng.choice(["", "torch-fp32", "<script>", "a|b\n# c", "\0", "\ud800", "x" * 5000])
    else:
        target[key] = rng.choice([None, [], {}, 1.0])


@pytest.mark.parametrize("seed", range(3))
def test_no_report_that_was_edited_by_hand_is_a_bug(run_folder, tmp_path, seed):
    rng = random.Random(seed)
    sound = run_folder("sound")
    for number in range(12):
        edited = run_folder(f"edited-{number}", lambda raw: [edit(raw, rng) for _ in range(rng.choice([1, 2, 4]))])
        for arguments in (
            ("audit", edited, "--junit", tmp_path / "junit.xml"),
            ("report", edited),
            ("compare", "--allow-different-methods", sound, edited),
        ):
            result = invoke(*arguments)
            file = edited / "json/report.json"
            assert result.exit_code != ExitCode.BUG, f"{arguments[0]}: {result.stderr}\n{file.read_text()}"


def test_an_error_ends_the_audit_with_5(run_folder, tmp_path):
    folder = run_folder(spoil=energy_off)
    result = invoke("audit", folder, "--junit", tmp_path / "junit.xml")
    assert result.exit_code == ExitCode.CHECK
    assert "audit error: " in result.stdout
    assert "the audit has" in result.stderr
    failures = [case.get("classname") for case in ElementTree.parse(tmp_path / "junit.xml").iter("failure")]
    assert failures
    found = json.loads(invoke("audit", folder, "--json").stdout)
    assert "error" in {finding["severity"] for finding in found["findings"]}


def test_a_warning_ends_the_audit_with_5_only_when_strict(run_folder, tmp_path):
    folder = run_folder(spoil=busy)
    found = json.loads(invoke("audit", folder, "--json").stdout)
    severities = {finding["severity"] for finding in found["findings"]}
    assert "warning" in severities
    if severities == {"warning"}:
        assert invoke("audit", folder).exit_code == 0
    assert invoke("audit", folder, "--strict", "--junit", tmp_path / "junit.xml").exit_code == ExitCode.CHECK
    assert list(ElementTree.parse(tmp_path / "junit.xml").iter("failure"))


def test_compare_puts_runs_side_by_side(run_folder):
    one, two = run_folder("one"), run_folder("two")
    result = invoke("compare", one, two)
    assert result.exit_code == 0, result.output
    assert "two" in result.stdout
    assert invoke("compare", one).exit_code == ExitCode.USAGE


def test_a_run_in_the_default_place_goes_by_its_name(run_folder, tmp_path, monkeypatch):
    place = tmp_path / "mase_output/tensorrt/quantization"
    for name in ("base", "other"):
        shutil.copytree(run_folder(name), place / name)
        shutil.rmtree(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert invoke("compare", "base", "other").exit_code == 0
    assert invoke("audit", "base").exit_code == 0
    assert invoke("report", "other").exit_code == 0
    assert (place / "other/report.html").is_file()
    assert "no such file" in invoke("audit", "neither").output


def test_runs_of_one_name_are_told_apart_by_what_differs_in_their_paths(run_folder, tmp_path):
    folder = run_folder("one")
    for place in ("before/a", "after"):
        shutil.copytree(folder, tmp_path / place / "out" / "one")
    runs = tmp_path / "before/a/out/one", tmp_path / "after/out/one", run_folder("two")
    found = json.loads(invoke("compare", *runs, "--json").stdout)
    assert found["runs"] == ["one (before/a)", "one (after)", "two"]
    found = json.loads(invoke("compare", runs[0], runs[0], "--json").stdout)
    assert found["runs"] == ["one (1)", "one (2)"]


def test_compare_refuses_different_methods_unless_told(run_folder):
    def threads(raw: dict) -> None:
        for each in (each for each in raw["rows"] if "method" in each):
            each["method"]["threads"] += 1

    one, two = run_folder("one"), run_folder("two", threads)
    result = invoke("compare", one, two)
    assert result.exit_code != 0
    assert "threads" in result.stderr
    assert "--allow-different-methods" in result.stderr
    assert invoke("compare", one, two, "--allow-different-methods").exit_code == 0


def test_reports_need_neither_torch_nor_a_run(run_folder):
    code = (
        "import sys\nfrom maseRT.cli import main\ntry: main()\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    for command in (["report"], ["audit"], ["compare", str(run_folder("other"))]):
        arguments = [sys.executable, "-c", code, *command, str(run_folder(command[0]))]
        result = subprocess.run(arguments, capture_output=True, text=True, check=True)
        assert result.stdout.splitlines()[-1] == "0 False", result.stderr


CONFIG = """
[model]
name = "digits-cnn"
random_weights = true
[data]
name = "digits"
[quantize]
"""
GATES = [
    {"name": "max_size_mb", "row": "onnxruntime-qdq", "asked": "<= 1 MB", "got": "0.2 MB", "passed": True},
    {"name": "max_latency_ms", "row": "onnxruntime-qdq", "asked": "<= 1 ms", "got": "2.5 ms", "passed": False},
]
FINDING = {"check": "spread", "severity": "warning", "row": "torch-fp32", "message": "the clock moved"}


def outcome(**summary) -> Outcome:
    return Outcome("analyze", "cached", "", 1.0, "nothing changed, skipped", summary, ())


@pytest.mark.parametrize(
    ("summary", "code", "strict_code"),
    [
        ({}, 0, 0),
        ({"gates": GATES[:1]}, 0, 0),
        ({"gates": GATES}, ExitCode.CHECK, ExitCode.CHECK),
        ({"not_run": ["tensorrt-int8: no GPU"]}, 0, ExitCode.MISSING),
        ({"findings": [FINDING]}, 0, ExitCode.CHECK),
        ({"findings": [FINDING], "not_run": ["tensorrt-int8: no GPU"]}, 0, ExitCode.MISSING),
        ({"gates": GATES, "not_run": ["tensorrt-int8: no GPU"]}, ExitCode.CHECK, ExitCode.CHECK),
    ],
)
def test_what_falls_short(summary, code, strict_code):
    ends = [shortfall([outcome(**summary)], strict=strict) for strict in (False, True)]
    assert [end.exit_code if end else 0 for end in ends] == [code, strict_code]


def test_each_gate_is_told_in_a_line(monkeypatch, tmp_path):
    (tmp_path / "digits.toml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("maseRT.steps.pipeline.Run.single", lambda *_: outcome(gates=GATES, findings=[FINDING]))
    result = invoke("analyze", "--config", "digits.toml")
    assert result.exit_code == ExitCode.CHECK
    assert result.stdout.splitlines()[1:] == [
        "gate passed: max_size_mb of onnxruntime-qdq: asked <= 1 MB, got 0.2 MB",
        "gate FAILED: max_latency_ms of onnxruntime-qdq: asked <= 1 ms, got 2.5 ms",
        "audit warning: spread: torch-fp32: the clock moved",
    ]
    assert "1 of 2 gates failed" in result.stderr
    assert "max_latency_ms of onnxruntime-qdq: asked <= 1 ms, got 2.5 ms" in result.stderr


def test_junit_needs_a_report(monkeypatch, tmp_path):
    (tmp_path / "digits.toml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    result = invoke("transform", "--config", "digits.toml", "--junit", "junit.xml")
    assert result.exit_code == ExitCode.USAGE
    assert "there will be no report" in result.stderr
    assert not (tmp_path / "mase_output").exists()
