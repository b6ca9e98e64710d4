"""The verdict says what the intervals allow, and no more."""

import pytest
import reports
from reports import make

from maseRT.report.verdict import verdict


def changed(raw, name, **changes):
    for row in raw["rows"]:
        if row["name"] == name:
            row.update(changes)
    return raw


def clean():
    """The GPU run without what its gates and audit found."""
    raw = reports.vgg7()
    raw["precision"]["layers"][6]["verdict"] = "as asked"
    raw["precision"]["layers"][6]["executed"] = "int8"
    return make(raw, findings=[], gates=[])


def test_a_gain_is_told_against_the_float_engine_and_the_baseline():
    assert verdict(clean()) == (
        "TensorRT INT8 is 1.35x faster than TensorRT FP16 and 5.50x than PyTorch FP32 at −0.10 points of accuracy; "
        "2 layers stayed FP16."
    )


def test_what_the_interval_does_not_tell_apart_is_no_difference():
    raw = reports.digits()
    for row in raw["rows"]:
        for timing in row.get("timings", []):
            if "ratio" in timing and row["name"] == "onnxruntime-qdq":
                timing["ratio"], timing["ratio_interval"] = 1.02, {"low": 0.97, "high": 1.07}
                timing["end_to_end"] = reports.latency(0.7454, spread=0.05)
    said = verdict(make(raw))
    assert "shows no measurable difference in speed from ONNX Runtime FP32 and PyTorch FP32" in said
    assert "faster" not in said
    assert "PyTorch FP32, and none in accuracy" in said


def test_the_float_row_that_is_the_baseline_is_told_once():
    raw = reports.digits()
    raw["rows"] = [row for row in raw["rows"] if row["runtime"] != "torch"]
    report = make(raw, baseline="onnxruntime-fp32")
    assert verdict(report).count("than ONNX Runtime FP32") == 1
    assert "PyTorch" not in verdict(report)


def test_an_engine_that_nobody_asked_for_is_not_missed():
    assert "; the engine did not run here" in verdict(make(reports.digits()))
    raw = changed(reports.digits(), "tensorrt-rtx-int8", size_bytes=0, not_run="the config has no [build-engine]")
    assert "engine" not in verdict(make(raw))


def test_a_slower_result_is_called_slower():
    raw = make(reports.digits(), result="onnxruntime-int8")
    assert "is 1.25x slower than ONNX Runtime FP32 and 2.75x faster than PyTorch FP32" in verdict(raw)


def test_ratios_without_intervals_say_so():
    raw = reports.digits()
    for row in raw["rows"]:
        for timing in row.get("timings", []):
            timing.pop("ratio_interval", None)
    assert "4.95x than PyTorch FP32 (no interval)" in verdict(make(raw))


def test_an_equal_metric_is_the_same():
    raw = changed(reports.digits(), "onnxruntime-qdq", difference=reports.change(0.0, 0.0))
    assert "at the same accuracy" in verdict(make(raw))


def test_a_diverged_result_is_not_praised():
    raw = changed(reports.digits(), "onnxruntime-qdq", difference=reports.change(float("nan"), 0.0))
    assert "but its accuracy is not a number" in verdict(make(raw))


def test_a_metric_that_is_no_share_has_no_points_and_says_which_way_it_went():
    said = verdict(make(reports.regression()))
    assert "at +0.0040 of MSE, which is worse" in said
    assert "points" not in said


def test_nothing_ran_is_said_with_the_reason():
    said = verdict(make(reports.nothing_ran()))
    assert said.startswith("No deployed model ran here (onnxruntime-int8: onnxruntime is not installed")
    assert "in simulation, INT8 comes out with no measurable difference in accuracy" in said


def test_a_result_without_times_claims_no_speed():
    said = verdict(make(changed(reports.digits(), "onnxruntime-qdq", timings=[])))
    assert "was not timed" in said
    assert "faster" not in said


def test_failed_gates_and_errors_end_the_sentence():
    said = verdict(make(reports.vgg7()))
    assert said.endswith("but 1 of 2 gates failed and the self-audit found 1 error, so do not rely on these figures.")
    assert "1 layer does not run as asked" in said


def test_layers_are_told_of_the_result_s_own_engine_alone():
    assert "stayed" not in verdict(make(reports.vgg7(), result="onnxruntime-int8"))


@pytest.mark.parametrize("raw", [reports.bare(), reports.huge(), reports.digits()])
def test_it_is_one_sentence(raw):
    said = verdict(make(raw))
    assert said.endswith(".")
    assert "\n" not in said
    assert ". " not in said
