"""The pipeline: what runs, what is skipped and why, and what is left after a fault."""

import json
import os
from pathlib import Path

import pytest
import torch
from projects import Project, new_project
from safetensors.torch import load_file

from maseRT.config_file import load_config
from maseRT.data.loading import calibration_subset, load_data
from maseRT.errors import StepError, UsageError
from maseRT.quant import LAYERS
from maseRT.quant.bias_correction import correct_biases
from maseRT.records import read_record, sha256

ORDER = ["train", "quantize", "calibrate", "finetune", "export", "analyze"]


def statuses(outcomes) -> dict[str, str]:
    return {name: outcome.status for name, outcome in outcomes.items()}


def test_a_finished_run_is_skipped_whole(finished):
    outcomes = finished.transform()
    assert list(outcomes) == ORDER
    assert set(statuses(outcomes).values()) == {"cached"}


def test_single_steps_give_the_same_files_as_one_transform(pristine, empty):
    for name in ORDER:
        assert empty.single(name).status == "done"
    for path in ("onnx/model.onnx", "onnx/float.onnx", "ckpts/fine_tuning/best.safetensors", "json/calibration.json"):
        assert sha256(empty.workspace.root / path) == sha256(pristine.workspace.root / path), path


def test_a_changed_section_reruns_its_step_and_what_follows(finished):
    preview = {o.step: o for o in finished.run("finetune.epochs=1").preview()}
    assert statuses(preview) == {
        "train": "cached",
        "quantize": "cached",
        "calibrate": "cached",
        "finetune": "would run",
        "export": "would run",
        "analyze": "would run",
    }
    assert preview["finetune"].why == "finetune.epochs 2 -> 1"
    assert preview["export"].why == "finetune runs before it"
    outcomes = finished.transform("finetune.epochs=1", last="finetune")
    assert statuses(outcomes)["finetune"] == "done"
    assert outcomes["finetune"].why == "finetune.epochs 2 -> 1"
    assert not finished.workspace.epoch_checkpoint(2).exists()


def test_preview_changes_nothing(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.folder.rglob("*")}
    finished.run("data.batch_size=32").preview()
    assert {path: path.stat().st_mtime_ns for path in finished.folder.rglob("*")} == before


def test_analyze_alone_changes_nothing_else(finished):
    outcomes = finished.transform("analyze.iterations=4")
    assert statuses(outcomes) == {**dict.fromkeys(ORDER, "cached"), "analyze": "done"}


def test_force_runs_what_is_done(finished):
    assert finished.single("quantize", force=True).why == "--force"


def test_another_batch_size_reruns_all(finished):
    preview = finished.run("data.batch_size=32").preview()
    assert {outcome.status for outcome in preview} == {"would run"}
    assert "data.batch_size 128 -> 32" in preview[0].why


@pytest.mark.parametrize("name", ["ckpts/calibrated.safetensors", "json/plan.json", "onnx/model.onnx"])
def test_a_truncated_artifact_is_made_again_by_transform(finished, name):
    path = finished.workspace.root / name
    good = sha256(path)
    path.write_bytes(path.read_bytes()[:100])
    outcomes = finished.transform()
    assert any(name in outcome.why and outcome.status == "done" for outcome in outcomes.values())
    assert sha256(path) == good


def test_a_step_names_a_damaged_input_and_the_command_that_makes_it(finished):
    path = finished.workspace.calibrated_checkpoint
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(StepError) as caught:
        finished.single("finetune", force=True)
    assert "calibrated.safetensors" in str(caught.value)
    assert "masert calibrate" in str(caught.value)


def test_a_missing_input_names_the_command_that_makes_it(empty):
    with pytest.raises(StepError, match="not there yet") as caught:
        empty.single("calibrate")
    assert f"masert quantize --config {empty.config}" in caught.value.fix


def test_from_a_step_whose_inputs_are_missing(empty):
    with pytest.raises(StepError, match="not there yet"):
        empty.transform(first="export")


def test_from_takes_what_lies_there(finished):
    outcomes = finished.transform("train.epochs=3", first="export", last="export")
    assert list(outcomes) == ["export"]


def test_a_step_refuses_inputs_that_the_config_has_overtaken(finished):
    with pytest.raises(StepError, match="quantize is out of date") as caught:
        finished.single("export", "quantize.precision='fp16'")
    assert "masert quantize" in caught.value.fix


def test_steps_out_of_order(empty):
    with pytest.raises(UsageError, match="comes after"):
        empty.run().preview(first="export", last="train")


def test_a_step_that_the_config_does_not_have(empty):
    with pytest.raises(UsageError, match=r"no \[build-engine\] section"):
        empty.single("build-engine")
    with pytest.raises(UsageError, match=r"no \[build-engine\] section"):
        empty.transform(last="build-engine")


def test_two_configs_with_one_run_name(finished):
    other = Project(finished.folder / "elsewhere")
    new_project(other.folder)
    run = other.run()
    stolen = type(run)(run.config, run.config_path, finished.workspace, run.reporter)
    with pytest.raises(UsageError, match="another config"):
        stolen.transform()


class _CrashedError(BaseException):
    """Stands in for a kill: no handler of the program may catch it."""


def _crash_at(monkeypatch, number: int) -> None:
    """Die in place of the `number`-th rename of a finished file."""
    replace, count = Path.replace, iter(range(number))

    def dying(self, target):
        if next(count, None) is None:
            raise _CrashedError
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", dying)


@pytest.mark.parametrize("number", [3, 9, 16, 20, 25])
def test_whatever_write_a_run_dies_at_the_next_one_completes_it(pristine, empty, monkeypatch, number):
    with monkeypatch.context() as patch, pytest.raises(_CrashedError):
        _crash_at(patch, number)
        empty.transform()
    complete = [name for name in ORDER if read_record(empty.workspace, name)]
    outcomes = empty.transform()
    assert [name for name, outcome in outcomes.items() if outcome.status == "cached"] == complete
    for path in (empty.workspace.onnx, empty.workspace.best_checkpoint, empty.workspace.final_plan):
        relative = path.relative_to(empty.workspace.root)
        assert sha256(path) == sha256(pristine.workspace.root / relative), relative


def test_an_output_folder_that_is_a_file(empty):
    (empty.folder / "out").write_text("")
    with pytest.raises(StepError, match="cannot write"):
        empty.transform()


def test_a_disk_that_fills_up(empty, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(StepError, match="No space left on device"):
        empty.single("train") if patch.setattr(os, "fsync", full) else empty.transform()
    assert not read_record(empty.workspace, "train")
    assert not list(empty.folder.rglob("*.safetensors"))


def test_the_report_holds_every_row_and_says_why_one_did_not_run(pristine):
    report = json.loads(pristine.workspace.report.read_text())
    rows = {row["name"]: row for row in report["rows"]}
    simulated = ["torch-int8-ptq", "torch-int8"]
    assert list(rows) == ["torch-fp32", *simulated, "onnxruntime-fp32", "onnxruntime-int8", "tensorrt-int8"]
    assert "[build-engine]" in rows["tensorrt-int8"]["not_run"]
    for name in list(rows)[:5]:
        assert rows[name]["metrics"]["samples"] == 270
        assert rows[name]["metrics"]["values"]["accuracy"] > 0.9
        assert len(rows[name]["timings"]) == (0 if name in simulated else 1)
    for name in (*simulated, "onnxruntime-int8"):
        assert rows[name]["agreement"]["label_agreement"] > 0.95
    for page in (pristine.workspace.report_markdown, pristine.workspace.report_html):
        assert all(name in page.read_text() for name in rows)


def test_the_plan_keeps_placement_data_for_later_targets(pristine):
    plan = json.loads(pristine.workspace.plan.read_text())
    assert plan["flow"]
    assert plan["nonnegative"]


def test_export_records_its_checks(pristine):
    export = json.loads(pristine.workspace.export.read_text())
    assert export["qdq_pairs"] > 0
    assert export["checks"]["quantized"]["disabled"]["label_agreement"] == 1.0


def test_calibration_compares_every_method_on_validation(pristine):
    calibration = json.loads(pristine.workspace.calibration.read_text())
    assert set(calibration["methods"]) == {"max", "mse"}
    best = calibration["methods"][calibration["best"]]["validation"]
    assert best["accuracy"] == max(entry["validation"]["accuracy"] for entry in calibration["methods"].values())
    assert all(entry["sqnr_db"] for entry in calibration["methods"].values())


def _biases(path):
    return {name: value for name, value in load_file(path).items() if name.endswith(".bias")}


def test_corrected_biases_are_kept_where_validation_is_better(pristine):
    workspace = pristine.workspace
    calibration = json.loads(workspace.calibration.read_text())
    correction = calibration["bias_correction"]
    best = calibration["methods"][calibration["best"]]["validation"]
    got = correction["validation"]
    better = (got["accuracy"], -got["loss"]) > (best["accuracy"], -best["loss"])
    assert correction["kept"] == better
    before, after = _biases(workspace.quantized_checkpoint), _biases(workspace.calibrated_checkpoint)
    changed = sum(not torch.equal(before[name], after[name]) for name in before)
    assert changed == (correction["layers"] if better else 0)
    told = json.loads(workspace.report.read_text())["calibration"]["methods"]
    assert [method["chosen"] for method in told].count(True) == 1
    assert told[-1]["name"] == f"{calibration['best']}, biases corrected"
    assert told[-1]["chosen"] == better


def test_biases_that_make_it_worse_are_taken_back(finished, monkeypatch):
    def spoil(model, plan, inputs):
        before = {"conv1": model.conv1.bias.detach().clone()}
        with torch.no_grad():
            model.conv1.bias.add_(100)
        return before

    monkeypatch.setattr("maseRT.steps.calibrate.correct_biases", spoil)
    outcome = finished.single("calibrate", force=True)
    assert outcome.summary["bias_correction"]["kept"] is False
    assert "corrected" not in outcome.headline
    before, after = (
        _biases(path) for path in (finished.workspace.quantized_checkpoint, finished.workspace.calibrated_checkpoint)
    )
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_calibration_data_is_read_once(finished, monkeypatch):
    reads, given = [], []

    class Counted(torch.utils.data.Dataset):
        def __init__(self, subset):
            self.subset = subset

        def __len__(self):
            return len(self.subset)

        def __getitem__(self, index):
            reads.append(index)
            return self.subset[index]

    def subset(splits, **settings):
        return Counted(calibration_subset(splits, **settings))

    def remember(model, plan, inputs):
        given.append(inputs)
        return correct_biases(model, plan, inputs)

    monkeypatch.setattr("maseRT.steps.calibrate.calibration_subset", subset)
    monkeypatch.setattr("maseRT.steps.calibrate.correct_biases", remember)
    monkeypatch.setattr("maseRT.steps.calibrate._MOST_VALUES", 150 * 64)  # of images of 8x8: a batch and a part
    finished.single("calibrate", force=True)
    assert reads == list(range(256))
    splits = load_data(load_config(finished.config, ()).data, seed=0)
    first = [image for image, _ in calibration_subset(splits, samples=150, seed=0)]
    assert torch.equal(given[0], torch.stack(first))


def test_biases_stay_as_they_are_where_that_is_asked_for(finished):
    outcome = finished.single("calibrate", "calibrate.bias_correction=false")
    assert outcome.summary["bias_correction"] is None
    assert "bias_correction" not in json.loads(finished.workspace.calibration.read_text())


OWN_LAYERS = """
from torch import nn
class Own(nn.Conv2d):
    pass
def make():
    return nn.Sequential(Own(1, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))
"""
OWN_TWIN = """
from own_layers import Own
from torch import nn
from maseRT.quant import LAYERS, register
class QuantOwn(LAYERS[nn.Conv2d].twin, Own):
    pass
register(Own, QuantOwn, weights={"weight": 0}, folds_batchnorm=True)
"""


def test_plug_ins_are_imported_before_the_plan_is_made(empty, monkeypatch):
    monkeypatch.chdir(empty.folder)
    (empty.folder / "own_layers.py").write_text(OWN_LAYERS)
    (empty.folder / "own_twin.py").write_text(OWN_TWIN)
    before = dict(LAYERS)
    try:
        done = empty.transform("model.name=own_layers:make", "quantize.plugins=['own_twin']", last="export")
    finally:
        LAYERS.clear()
        LAYERS.update(before)
    assert done["quantize"].summary["layers"] == {"fp32": 1, "int8": 1}  # the Linear is tiny
    assert done["quantize"].summary["folded"] == 1
    assert done["export"].summary["qdq_pairs"] == 2


def test_a_plug_in_that_is_not_there_is_a_mistake_of_the_config(empty):
    with pytest.raises(UsageError, match=r"own_twins.*no module") as error:
        empty.transform("quantize.plugins=['own_twins']", last="train")
    assert "[quantize] plugins" in error.value.where
