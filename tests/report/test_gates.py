"""Gates: one line each, asked and got; a figure that is not there does not pass."""

from __future__ import annotations

from typing import Any

import pytest
from build import regression_report, report, row

from maseRT.config import GateSection
from maseRT.errors import UsageError
from maseRT.report.gates import judge
from maseRT.report.schema import Gate, Report

RESULT = "onnxruntime-qdq"


def gate_of(found: Report, **limits: Any) -> Gate:
    (gate,) = judge(found, GateSection.model_validate(limits))
    return gate


def value_of(found: Report, *path: Any) -> Any:
    value: Any = found.row(RESULT)
    for key in path:
        value = value[key] if isinstance(key, int) else getattr(value, key)
    return value


def test_no_limits_make_no_gates():
    assert judge(report(), GateSection()) == []


def test_a_gate_names_its_row_what_was_asked_and_what_was_got():
    found = report()
    gate = gate_of(found, max_latency_ms=1.0)
    assert (gate.name, gate.row, gate.passed) == ("max_latency_ms", RESULT, True)
    assert gate.asked == "at most 1 ms"
    assert f"{value_of(found, 'timings', 0, 'end_to_end', 'p50_ms'):.4g} ms" in gate.got


# (limits that just pass, limits that just fail), by the figure of the sound report
LIMITS = {
    "latency": (("timings", 0, "end_to_end", "p50_ms"), lambda v: {"max_latency_ms": v}, 1.001, 0.999),
    "size": (("size_bytes",), lambda v: {"max_size_mb": v / 1e6}, 1.001, 0.999),
    "agreement": (("agreement", "label_agreement"), lambda v: {"min_agreement": v}, 0.999, 1.001),
    "energy": (("energy", "joules_per_sample"), lambda v: {"max_energy_mj": v * 1000}, 1.001, 0.999),
    "accuracy": (("difference", "value"), lambda v: {"max_accuracy_drop": -v}, 1.001, 0.999),
    "speedup": (
        ("timings", 0, "ratio"),
        lambda v: {"min_speedup": {"over": "torch-fp32", "ratio": v}},
        0.999,
        1.001,
    ),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_a_limit_is_held_against_the_figure(limit):
    path, limits, passing, failing = LIMITS[limit]
    found = report()
    value = value_of(found, *path)
    assert gate_of(found, **limits(value * passing)).passed
    assert gate_of(found, **limits(value)).passed, "a limit that is just reached"
    assert not gate_of(found, **limits(value * failing)).passed


def test_an_energy_whose_interval_reaches_over_the_limit_passes_and_says_so():
    found = report()
    millijoules = value_of(found, "energy", "joules_per_sample") * 1e3
    assert "the interval reaches over the limit" in gate_of(found, max_energy_mj=millijoules * 1.02).got
    gate = gate_of(found, max_energy_mj=millijoules * 1.04)
    assert gate.passed
    assert "limit" not in gate.got
    assert f"(95 % {millijoules * 0.97:.4g} to {millijoules * 1.03:.4g})" in gate.got


def spoiled(**values: Any) -> Report:
    return report(spoil=lambda raw: row(raw, RESULT).update(values))


@pytest.mark.parametrize(
    ("found", "limits", "why"),
    [
        (spoiled(timings=[]), {"max_latency_ms": 1}, "onnxruntime-qdq was not timed"),
        (spoiled(timings=[]), {"min_speedup": {"over": "torch-fp32", "ratio": 1}}, "onnxruntime-qdq was not timed"),
        (report(), {"min_speedup": {"over": "tensorrt-int8", "ratio": 1}}, "tensorrt-int8 was not timed"),
        (report(), {"min_speedup": {"over": "torch-int8", "ratio": 1}}, "torch-int8 is simulated in float"),
        (spoiled(energy=None, energy_note="no RAPL counters"), {"max_energy_mj": 1}, "no RAPL counters"),
        (spoiled(size_bytes=0), {"max_size_mb": 1}, "size is not known"),
        (spoiled(agreement=None), {"min_agreement": 0.5}, "not compared with torch-fp32"),
        (regression_report(), {"min_agreement": 0.5}, "no classes"),
        (report(), {"max_size_mb": 1, "row": "tensorrt-int8"}, "did not run: no NVIDIA driver here"),
        (report(spoil=lambda raw: raw.update(result="")), {"max_size_mb": 1}, "tensorrt-int8: no NVIDIA driver"),
    ],
)
def test_a_figure_that_is_not_there_does_not_pass_and_says_why(found, limits, why):
    gate = gate_of(found, **limits)
    assert not gate.passed
    assert why in gate.got


def test_a_gate_may_be_about_another_row():
    gate = gate_of(report(), max_size_mb=0.2, row="onnxruntime-fp32")
    assert (gate.row, gate.passed, gate.got) == ("onnxruntime-fp32", False, "0.4 MB")


@pytest.mark.parametrize(
    ("limits", "where"),
    [
        ({"row": "onnxruntime-int9", "max_size_mb": 1}, "[gate] row"),
        ({"min_speedup": {"over": "onnxruntime-int9", "ratio": 1}}, "[gate] min_speedup over"),
    ],
)
def test_a_row_that_there_is_not_is_a_usage_error_naming_the_rows(limits, where):
    with pytest.raises(UsageError) as caught:
        judge(report(), GateSection.model_validate(limits))
    assert caught.value.where == where
    assert "did you mean 'onnxruntime-int8'" in caught.value.what
    assert "tensorrt-int8" in caught.value.fix


def test_several_speedups_are_several_gates():
    found = report()
    asked = [{"over": "torch-fp32", "ratio": 2.0}, {"over": "onnxruntime-fp32", "ratio": 1.1}]
    gates = judge(found, GateSection.model_validate({"min_speedup": asked}))
    assert [gate.asked for gate in gates] == ["at least 2x torch-fp32", "at least 1.1x onnxruntime-fp32"]
    medians = [found.timing(name, 1).end_to_end.p50_ms for name in ("onnxruntime-fp32", RESULT)]
    assert gates[1].got.startswith(f"{medians[0] / medians[1]:.3g}x")


def test_an_interval_that_reaches_over_the_limit_is_told():
    found = report()
    drop, interval = -value_of(found, "difference", "value"), value_of(found, "difference", "interval")
    worst = -interval.low
    assert "reaches over the limit" in gate_of(found, max_accuracy_drop=(drop + worst) / 2).got
    assert "reaches over the limit" not in gate_of(found, max_accuracy_drop=worst * 1.01).got
    failed = gate_of(found, max_accuracy_drop=drop / 2)
    assert not failed.passed
    assert "reaches" not in failed.got
    median = value_of(found, "timings", 0, "end_to_end", "p50_ms")
    assert "reaches over the limit" in gate_of(found, max_latency_ms=median * 1.001).got
    ratio = value_of(found, "timings", 0, "ratio")
    barely = gate_of(found, min_speedup={"over": "torch-fp32", "ratio": ratio * 0.999})
    assert barely.passed
    assert "reaches over the limit" in barely.got


def test_where_less_is_better_a_rise_is_the_drop():
    found = regression_report()
    worse = value_of(found, "difference", "value")
    assert worse > 0
    assert gate_of(found, max_accuracy_drop=worse * 1.01).passed
    assert not gate_of(found, max_accuracy_drop=worse * 0.99).passed
    assert "mse rise" in gate_of(found, max_accuracy_drop=0.1).asked


def test_a_better_row_passes_any_drop():
    better = {"metric": "accuracy", "value": 0.01, "interval": {"low": 0.005, "high": 0.02}}
    gate = gate_of(spoiled(difference=better), max_accuracy_drop=0)
    assert gate.passed
    assert gate.got == "-0.01 (95 % -0.02 to -0.005)"


def test_times_are_of_the_first_batch_size():
    found = report(batches=(64, 1))
    gate = gate_of(found, max_latency_ms=1e3)
    assert "at batch 64" in gate.got
    assert f"{value_of(found, 'timings', 0, 'end_to_end', 'p50_ms'):.4g}" in gate.got
