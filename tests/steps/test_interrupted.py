"""Ctrl-C, with real signals: the unit under way is finished, what was done is kept, the next run goes on from it."""

import json
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from projects import CONFIG, Project, new_project

from maseRT.energy import Energy
from maseRT.errors import ExitCode
from maseRT.interrupts import listening
from maseRT.records import read_record, sha256
from maseRT.report.files import load_report
from maseRT.steps import build_engine, export, onnxruntime
from maseRT.steps.analysis import evaluating, measuring
from maseRT.steps.analysis.answers import Answers, prune
from maseRT.workers.local import LocalWorker
from maseRT.workers.memory import Peak

WITH_MODES = '\n[onnxruntime]\nmodes = ["optimized", "dynamic"]\ndevice = "cpu"\nbatches = 1\n'
WITH_ENGINE = '\n[build-engine]\nruntime = "tensorrt-rtx"\nbatch = { min = 1, opt = 8, max = 8 }\n'


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run as far as its ONNX files, with sections for what can follow; nobody may change it."""
    config = CONFIG.replace("[export]", '[export]\ntargets = ["onnxruntime-cpu"]') + WITH_MODES + WITH_ENGINE
    project = new_project(tmp_path_factory.mktemp("exported") / "project", config)
    project.transform(last="export")
    return project


@pytest.fixture
def project(exported, tmp_path):
    """A copy of it."""
    shutil.copytree(exported.folder, tmp_path / "project")
    return Project(tmp_path / "project")


def calls(monkeypatch, owner, name, *, press_in=None, times=1):
    """Count the calls of a function; in one of them Ctrl-C is pressed, so many times, before it goes on."""
    function, seen = getattr(owner, name), []

    def counted(*arguments, **options):
        seen.append(arguments)
        if len(seen) == press_in:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, counted)
    return seen


def interrupted(work):
    """Do some work in which Ctrl-C is pressed; returns what was said about it."""
    told = []
    with listening(told.append), pytest.raises(KeyboardInterrupt):
        work()
    return told


# analyze


def test_answers_are_kept_batch_by_batch(finished, monkeypatch):
    before = load_report(finished.workspace.root)
    with monkeypatch.context() as patch:
        inferred = calls(patch, LocalWorker, "infer", press_in=7)  # of 5 rows and 3 batches: in the second batch
        told = interrupted(lambda: finished.single("analyze", force=True))
    assert told == ["finishing a batch of answers; Ctrl-C again stops at once"]
    assert len(inferred) == 10
    assert read_record(finished.workspace, "analyze") is None
    inferred = calls(monkeypatch, LocalWorker, "infer")
    finished.single("analyze")
    assert len(inferred) == 5
    report = load_report(finished.workspace.root)
    assert [row.metrics for row in report.rows] == [row.metrics for row in before.rows]
    assert report.samples == before.samples
    assert report.drift == before.drift
    (section,) = report.sections
    assert section.values == {"answers": dict.fromkeys((row.name for row in report.ran()), 256), "latency": {}}
    assert "- torch-fp32: 256 of 270 answers are of an earlier analysis" in section.lines


def test_the_next_analysis_asks_only_what_has_changed(finished, monkeypatch):
    before = load_report(finished.workspace.root)
    inferred = calls(monkeypatch, LocalWorker, "infer")
    timed = calls(monkeypatch, measuring, "measure_rows")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", SimpleNamespace(__version__="loaded by somebody else"))
    finished.single("analyze", "analyze.iterations=4")
    assert (len(inferred), len(timed)) == (0, 1)
    report = load_report(finished.workspace.root)
    assert [row.metrics for row in report.rows] == [row.metrics for row in before.rows]
    assert report.sections[0].values["answers"]["onnxruntime-fp32"] == 270
    finished.transform("calibrate.methods=['entropy']")
    (section,) = load_report(finished.workspace.root).sections
    assert section.values["answers"] == {"torch-fp32": 270, "onnxruntime-fp32": 270}
    assert len(inferred) == 3 * 3
    finished.single("analyze", "calibrate.methods=['entropy']", force=True)
    assert len(inferred) == 3 * 3 + 5 * 3
    assert load_report(finished.workspace.root).sections == []


def test_latency_is_kept_batch_size_by_batch_size(finished, monkeypatch):
    sizes = "analyze.batch_sizes=[1, 8]"
    with monkeypatch.context() as patch:
        calls(patch, measuring, "measure_rows", press_in=1)
        told = interrupted(lambda: finished.single("analyze", sizes))
    assert told == ["finishing latency of batch 1; Ctrl-C again stops at once"]
    assert read_record(finished.workspace, "analyze") is None
    timed = calls(monkeypatch, measuring, "measure_rows")
    finished.single("analyze", sizes)
    assert [len(arguments[1]) for arguments in timed] == [8]
    report = load_report(finished.workspace.root)
    assert [timing.batch for timing in report.row("onnxruntime-int8").timings] == [1, 8]
    assert list(report.sections[0].values["latency"]) == ["1"]
    assert any(
        line.startswith("- latency of batch 1: measured before an interruption") for line in report.sections[0].lines
    )
    assert [finding for finding in report.findings if finding.severity == "error"] == []
    finished.single("analyze", sizes, "analyze.iterations=4")  # a finished analysis leaves no times behind
    assert [len(arguments[1]) for arguments in timed] == [8, 1, 8]


def test_energy_is_kept(finished, monkeypatch):
    power = {"source": "a counter", "device": "a CPU", "seconds": 2.0, "samples": 512, "watts": 9.0, "idle_watts": 4.0}
    unknown = ("watts", "idle_watts", "joules", "net_joules")
    ends = {f"{name}_{end}": None for name in unknown for end in ("low", "high")}
    joules = {"joules_per_sample": 9 * 2 / 512, "net_joules_per_sample": 5 * 2 / 512}
    found = Energy(**power, **ends, **joules, visits=4)
    monkeypatch.setattr(measuring, "measure_energies", lambda workers, *args, **rest: dict.fromkeys(workers, found))
    with monkeypatch.context() as patch:
        calls(patch, measuring, "measure_energies", press_in=1)
        told = interrupted(lambda: finished.single("analyze", force=True))
    assert told == ["finishing energy; Ctrl-C again stops at once"]
    measured = calls(monkeypatch, measuring, "measure_energies")
    finished.single("analyze")
    assert measured == []
    report = load_report(finished.workspace.root)
    for row in report.rows:
        assert (row.energy and row.energy.joules_per_sample) == (9 * 2 / 512 if row.timings else None)
    assert report.sections[0].values["energy"]
    assert report.sections[0].lines[-1].startswith("- energy: measured before an interruption, until 20")
    finished.single("analyze", force=True)
    assert len(measured) == 1


def test_twice_stops_at_once_and_keeps_what_was_finished(finished, monkeypatch):
    with monkeypatch.context() as patch:
        inferred = calls(patch, LocalWorker, "infer", press_in=7, times=2)
        interrupted(lambda: finished.single("analyze", force=True))
    assert len(inferred) == 7
    inferred = calls(monkeypatch, LocalWorker, "infer")
    finished.single("analyze")
    assert len(inferred) == 15 - 6
    kept = load_report(finished.workspace.root).sections[0].values["answers"]
    assert sorted(kept.values()) == [128, 128, 128, 128, 256]


@pytest.mark.slow
def test_the_command_ends_with_130_and_goes_on(finished, monkeypatch):
    options = ("--config", "digits.toml", "--output", "out", "--set", "analyze.seconds=0.2")
    command = [sys.executable, "-m", "maseRT.cli", "analyze", *options]
    monkeypatch.chdir(finished.folder)
    process = subprocess.Popen(
        [*command, "--force"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    about = finished.workspace.answers / "torch-fp32.json"
    about.unlink()
    while not about.exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.5)  # the latency takes four seconds
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == ExitCode.INTERRUPTED
    assert "finishing latency of batch 128; Ctrl-C again stops at once" in stderr
    assert stderr.endswith("interrupted; what was done is kept\n")
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    assert "latency of batch 128 was measured before" in done.stderr
    assert json.loads(done.stdout)["rows"]


# what lies on disk


def kept(path, *outputs, sha256="first"):
    answers = Answers(path, {"files": "a"})
    for each in outputs:
        answers.add(np.asarray(each, dtype=np.float32), sha256=sha256, memory=Peak(1.0))
    answers.save()
    return answers


def test_answers_are_found_again_by_what_they_depend_on(tmp_path):
    kept(tmp_path / "row", [[1, 2]], [[3, 4]])
    again = Answers(tmp_path / "row", {"files": "a"})
    assert again.read().tolist() == [[1, 2], [3, 4]]
    assert (again.kept, again.told.sha256, again.told.memory) == (2, "first", Peak(1.0))
    assert Answers(tmp_path / "row", {"files": "b"}).kept == 0
    assert Answers(tmp_path / "row", {"files": "a"}).kept == 0  # they are about to be overwritten


def test_what_a_kill_left_behind_the_last_batch_is_cut_off(tmp_path):
    kept(tmp_path / "row", [[1, 2]])
    with open(tmp_path / "row", "ab") as file:
        file.write(b"half a batch")
    again = kept(tmp_path / "row", [[5, 6]])
    assert again.read().tolist() == [[1, 2], [5, 6]]
    with open(tmp_path / "row", "r+b") as file:
        file.truncate(9)
    assert Answers(tmp_path / "row", {"files": "a"}).kept == 0


def test_a_finished_analysis_keeps_the_answers_of_its_rows_up_to_a_limit(tmp_path):
    for name, count in (("small", 1), ("large", 9), ("gone", 1), ("not here", 2)):
        kept(tmp_path / name, [[1, 2]] * count)
    (tmp_path / "half").write_bytes(b"of a row that was killed")
    prune(tmp_path, ["small", "large", "not here"], most_bytes=40)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["not here", "not here.json", "small", "small.json"]
    assert Answers(tmp_path / "small", {"files": "a"}).kept == 1
    prune(tmp_path / "none", [])


def test_answers_of_a_row_that_is_gone_go_too(finished):
    finished.single("analyze", "analyze.runtimes=['torch']")
    assert not [path for path in finished.workspace.answers.iterdir() if path.name.startswith("onnxruntime")]
    assert (finished.workspace.answers / "torch-fp32.json").exists()


def test_answers_to_other_samples_are_asked_for_again(finished, monkeypatch, caplog):
    about = finished.workspace.answers / "torch-fp32.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "sha256": "of other samples"}))
    inferred = calls(monkeypatch, evaluating, "_answer")
    finished.single("analyze", "analyze.iterations=4")
    assert len(inferred) > 15
    assert "the samples are not those of the kept answers" in caplog.text
    assert load_report(finished.workspace.root).sections == []


# the steps that make files


def test_export_keeps_each_file(project, monkeypatch):
    with monkeypatch.context() as patch:
        calls(patch, export, "export_onnx", press_in=1)
        told = interrupted(lambda: project.single("export", force=True))
    assert told == ["finishing export of float.onnx; Ctrl-C again stops at once"]
    before = json.loads(project.workspace.export.read_text())
    made = calls(monkeypatch, export, "export_onnx")
    project.transform(last="export")
    assert len(made) == 1
    after = json.loads(project.workspace.export.read_text())
    assert [after[name] for name in ("checks", "qdq_pairs")] == [before[name] for name in ("checks", "qdq_pairs")]
    assert not project.workspace.unfinished("export").exists()


def test_onnxruntime_keeps_each_mode(project, monkeypatch):
    with monkeypatch.context() as patch:
        calls(patch, onnxruntime, "kernels_of", press_in=1)
        told = interrupted(lambda: project.single("onnxruntime"))
    assert told == ["finishing onnxruntime mode optimized; Ctrl-C again stops at once"]
    made = calls(monkeypatch, onnxruntime, "_make")
    outcome = project.single("onnxruntime")
    assert [mode for _, mode in made] == ["dynamic"]
    assert [row[0] for row in outcome.table] == ["mode", "optimized", "dynamic"]
    for mode in ("optimized", "dynamic"):
        sidecar = json.loads(project.workspace.onnxrt_sidecar(mode).read_text())
        assert sidecar["sha256"] == sha256(project.workspace.onnxrt_model(mode))
    assert project.single("onnxruntime").status == "cached"


def test_a_file_that_was_changed_is_made_again(project, monkeypatch):
    with monkeypatch.context() as patch:
        calls(patch, onnxruntime, "kernels_of", press_in=1)
        interrupted(lambda: project.single("onnxruntime"))
    project.workspace.onnxrt_model("optimized").write_bytes(b"")
    made = calls(monkeypatch, onnxruntime, "_make")
    project.single("onnxruntime")
    assert [mode for _, mode in made] == ["optimized", "dynamic"]


def building(monkeypatch, times):
    """Press Ctrl-C while the engine is built."""
    compiler = build_engine.choose_compiler("tensorrt-rtx")
    seen = calls(monkeypatch, type(compiler), "build", press_in=1, times=times)
    monkeypatch.setattr(build_engine, "choose_compiler", lambda name: compiler)
    return seen


def test_build_engine_finishes_the_build_and_does_not_build_again(project, monkeypatch):
    built = building(monkeypatch, times=1)
    told = interrupted(lambda: project.single("build-engine"))
    assert told == ["finishing the build of the engine; Ctrl-C again stops at once"]
    workspace = project.workspace
    engine = sha256(workspace.engine)
    outcome = project.single("build-engine")
    assert (len(built), sha256(workspace.engine)) == (1, engine)
    assert outcome.summary["bytes"] == workspace.engine.stat().st_size
    assert json.loads(workspace.sidecar.read_text())["engine_sha256"] == engine
    assert not workspace.unfinished("build-engine").exists()


def test_build_engine_stopped_at_once_leaves_no_engine(project, monkeypatch):
    built = building(monkeypatch, times=2)
    interrupted(lambda: project.single("build-engine"))
    folder = project.workspace.engine.parent
    assert [path.name for path in folder.glob("*")] == []
    project.single("build-engine")
    assert len(built) == 2
    assert project.workspace.sidecar.exists()


def test_analysis_without_an_interrupt_tells_of_nothing_kept(finished):
    assert load_report(finished.workspace.root).sections == []
    assert not finished.workspace.unfinished("analyze").exists()
