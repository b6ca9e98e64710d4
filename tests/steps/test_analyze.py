"""analyze: one evaluation for all rows, whatever process they run in; the report; gates judged without measuring."""

import time
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest

from maseRT import energy
from maseRT.checkpoints import load_tensors, save_tensors
from maseRT.errors import UsageError
from maseRT.hardware import cpu
from maseRT.report.files import load_report
from maseRT.runtimes.onnxruntime import OnnxRuntime
from maseRT.steps.analysis import artifacts, measuring
from maseRT.workers import local, schedule
from maseRT.workers.schedule import measure_energies

DROP = "gate.max_accuracy_drop=0.1"
IMPOSSIBLE = "gate.max_latency_ms=1e-6"


def _report(project):
    return load_report(project.workspace.root)


def test_rows_in_processes_of_their_own_answer_as_rows_in_this_one(finished):
    before = {row.name: row for row in _report(finished).rows}
    finished.single("analyze", "analyze.isolate=true")
    report = _report(finished)
    assert [row.name for row in report.rows] == list(before)
    for row in report.ran():
        assert row.metrics == before[row.name].metrics
        assert row.method.isolated == (row.role != "simulated")
        if row.memory:
            assert row.memory.host_mb > 1
            assert before[row.name].memory.host_mb is None  # rows of one process take what others freed
        assert report.samples.evaluated == row.metrics.samples == 270


def test_what_ran_is_compared_with_the_float_model(finished):
    report = _report(finished)
    assert report.baseline == "torch-fp32"
    assert report.result == "onnxruntime-int8"
    base, result = report.row(report.baseline), report.row(report.result)
    assert base.difference is None
    assert result.difference.metric == "accuracy"
    change = result.metrics.values["accuracy"] - base.metrics.values["accuracy"]
    assert result.difference.value == pytest.approx(change)
    assert result.difference.interval.low <= change <= result.difference.interval.high
    ratio = base.timings[0].end_to_end.p50_ms / result.timings[0].end_to_end.p50_ms
    assert result.timings[0].ratio == pytest.approx(ratio, rel=0.5)
    assert result.provider.got[0] == "CPUExecutionProvider"
    assert result.method.versions["onnxruntime"]
    assert sum(map(sum, result.metrics.confusion)) == 270


def test_every_batch_size_is_measured(finished):
    finished.single("analyze", "analyze.batch_sizes=[1, 300]")
    report = _report(finished)
    assert [timing.batch for timing in report.row("onnxruntime-int8").timings] == [1, 300]


def test_a_limit_on_batches_is_told(finished):
    finished.single("analyze", "analyze.batches=1")
    samples = _report(finished).samples
    assert (samples.evaluated, samples.available) == (128, 270)


def test_a_step_of_the_drift_ladder_that_falls_is_told_on_the_console(finished):
    outcome = finished.single("analyze", "analyze.drift.sqnr_db=100")
    told = [line for line in outcome.remarks if line.startswith("drift: ")]
    assert [line.split(" falls: ")[0] for line in told] == [
        f"drift: {rung.source} -> {rung.target}" for rung in _report(finished).drift
    ]
    assert all(" dB, below 100; their outputs part at " in line for line in told)


def test_new_gates_judge_the_old_measurement(finished):
    outcome = finished.single("analyze", DROP)
    assert [gate["passed"] for gate in outcome.summary["gates"]] == [True]
    measured = _report(finished).created
    outcome = finished.single("analyze", DROP, IMPOSSIBLE)
    assert outcome.status == "cached"
    assert {gate["name"]: gate["passed"] for gate in outcome.summary["gates"]} == {
        "max_accuracy_drop": True,
        "max_latency_ms": False,
    }
    report = _report(finished)
    assert report.created == measured
    assert outcome.summary["verdict"] == report.verdict
    assert "gate" in report.verdict
    assert report.config["gate"] == {"max_accuracy_drop": 0.1, "max_latency_ms": 1e-6}
    assert "max_latency_ms" in finished.workspace.report_markdown.read_text()
    assert finished.single("analyze", DROP, IMPOSSIBLE).status == "cached"


def test_a_row_that_there_will_not_be_is_told_before_anything_is_measured(finished, monkeypatch):
    monkeypatch.setattr(local.LocalWorker, "open", lambda worker: pytest.fail("opened"))
    with pytest.raises(UsageError, match="no row 'onnxruntime-int4'"):
        finished.single("analyze", "analyze.iterations=4", "gate.row='onnxruntime-int4'")


def test_energy_is_of_visits_to_each_row_and_the_audit_agrees(finished, monkeypatch):
    meter = SimpleNamespace(source="a counter", device="a CPU", joules=lambda: 20.0 * time.perf_counter())
    for module in (local, schedule):
        monkeypatch.setattr(module, "open_meter", contextmanager(lambda device: iter([meter])))
    monkeypatch.setattr(schedule, "_REST_SECONDS", 0.0)
    monkeypatch.setattr(energy, "_WARMUP_SECONDS", 0.0)
    short = partial(measure_energies, visits=2, seconds=0.1, idle_seconds=0.1)
    monkeypatch.setattr(measuring, "measure_energies", short)
    finished.single("analyze", "analyze.isolate=false", force=True)
    report = _report(finished)
    timed = [row for row in report.rows if row.timings]
    assert timed
    for row in timed:
        assert (row.energy.source, row.energy.visits, row.energy_note) == ("a counter", 2, "")
        assert row.energy.joules_low <= row.energy.joules_per_sample <= row.energy.joules_high
    told = {finding.check for finding in report.findings if finding.severity == "error"}
    assert not told & {"energy", "intervals", "wall-clock"}
    assert "a counter, 2 visits in turns" in finished.workspace.report_markdown.read_text()


def test_a_row_of_openvino_is_measured_as_one_of_the_cpu(finished, monkeypatch):
    modes = 'onnxruntime.modes=["optimized"]'
    finished.single("onnxruntime", modes)
    read = artifacts.read_json
    monkeypatch.setattr(artifacts, "read_json", lambda *args, **rest: {**read(*args, **rest), "device": "openvino:0"})
    monkeypatch.setattr(OnnxRuntime, "missing", lambda self, device=None: None)
    on_cpu = OnnxRuntime.open
    monkeypatch.setattr(OnnxRuntime, "open", lambda self, file, device, **rest: on_cpu(self, file, "cpu", **rest))
    finished.single("analyze", modes)
    row = _report(finished).row("onnxruntime-optimized")
    assert row.timings[0].end_to_end.p50_ms > 0
    assert row.method.device == "openvino:0"
    assert row.method.hardware == cpu().name
    assert row.energy or "RAPL" in row.energy_note


def test_a_broken_range_is_found_by_the_ladder(finished):
    workspace = finished.workspace
    tensors, metadata = load_tensors(workspace.calibrated_checkpoint, made_by="calibrate")
    tensors["conv2.input_quantizer.amax"] = tensors["conv2.input_quantizer.amax"] / 30
    save_tensors(workspace.calibrated_checkpoint, tensors, metadata)
    finished.single("analyze", force=True)
    rung = _report(finished).drift[0]
    assert (rung.source, rung.target, rung.holds) == ("torch-fp32", "torch-int8-ptq", False)
    assert rung.divergence.layer == "conv2"
