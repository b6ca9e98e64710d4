"""Input that cannot work: one clear message each, the right exit code, and nothing half-done."""

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from projects import UNTRAINED, Project, new_project

from maseRT.checkpoints import load_tensors, save_tensors
from maseRT.data.loading import load_data
from maseRT.errors import ExitCode, MaseRTError, StepError, UsageError
from maseRT.records import read_record, sha256
from maseRT.steps.epochs import Epochs

USER_CODE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(64, 128)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(128, 128)
        self.unused = nn.Linear(128, 128)
        self.head = nn.Linear(128, 10)

    def forward(self, x):
        x = self.relu(self.fc1(self.flatten(x)))
        return self.head(self.relu(self.fc2(x)))

class Shared(Net):
    def __init__(self):
        super().__init__()
        self.unused = self.fc2

    def forward(self, x):
        x = self.relu(self.fc1(self.flatten(x)))
        return self.head(self.unused(self.relu(self.fc2(x))))

class Dead(Net):
    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.fc2.weight)
        nn.init.constant_(self.fc2.bias, -1.0)
        self.fc2.requires_grad_(False)

    def forward(self, x):
        x = self.relu(self.fc1(self.flatten(x)))
        return self.head(self.unused(self.relu(self.fc2(x))) + x)

class TwoInputs(Net):
    def forward(self, x, y):
        return x + y

class Pair(Net):
    def forward(self, x):
        return super().forward(x), x

class Branching(Net):
    def forward(self, x):
        return super().forward(x if x.mean() > 0 else -x)

def broken():
    raise RuntimeError("no weights today")

def images(labels=lambda n: torch.arange(n) % 10, scale=1.0):
    return TensorDataset(torch.rand(40, 1, 8, 8) * scale, labels(40))

def one_class():
    zeros = lambda n: torch.zeros(n, dtype=torch.long)
    return images(zeros), images(zeros), images(zeros)

def many_classes():
    many = lambda n: torch.arange(n)
    return images(many), images(many), images(many)

def no_validation():
    return images(), TensorDataset(torch.rand(0, 1, 8, 8), torch.zeros(0, dtype=torch.long)), images()

def nan():
    return images(scale=float("nan")), images(), images()
"""


@pytest.fixture
def project(tmp_path, monkeypatch) -> Project:
    """A project with user code in the working directory."""
    made = new_project(tmp_path / "project")
    (made.folder / f"user_{tmp_path.name}.py").write_text(USER_CODE)
    monkeypatch.chdir(made.folder)
    return made


def user(tmp_path: Path, name: str) -> str:
    return f"user_{tmp_path.name}:{name}"


def refusal(project: Project, *overrides: str, last: str = "calibrate") -> MaseRTError:
    with pytest.raises(MaseRTError) as caught:
        project.transform(*overrides, last=last)
    return caught.value


def test_a_pattern_that_matches_no_layer_names_the_nearest(project):
    error = refusal(project, "quantize.rules=[{ name = 'conv9', precision = 'fp16' }]")
    assert error.exit_code == ExitCode.USAGE
    assert 'name = "conv9"' in str(error)
    assert "did you mean 'conv" in str(error)


def test_a_calibration_rule_that_matches_no_layer(project):
    error = refusal(project, "calibrate.methods=['max', { type = 'Linar', method = 'mse' }]")
    assert error.exit_code == ExitCode.USAGE
    assert "Linar" in str(error)


@pytest.mark.parametrize(
    ("name", "message"),
    [("broken", "no weights today"), ("TwoInputs", "input"), ("Pair", "tensor"), ("missing", "has no 'missing'")],
)
def test_a_model_that_cannot_be_used(project, tmp_path, name, message):
    error = refusal(project, f"model.name='{user(tmp_path, name)}'")
    assert error.exit_code == ExitCode.USAGE
    assert message in str(error)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("one_class", "class"),
        ("many_classes", "label"),
        ("no_validation", "validation"),
        ("nan", "NaN"),
    ],
)
def test_data_that_cannot_be_used(project, tmp_path, name, message):
    model = f"model.name='{user(tmp_path, 'Net')}'"  # ten outputs, whatever the data
    error = refusal(project, model, f"data.name='{user(tmp_path, name)}'", "data.batch_size=16")
    assert message.lower() in str(error).lower()
    assert not project.workspace.calibrated_checkpoint.exists()


def test_a_batch_larger_than_the_data(project):
    error = refusal(project, "data.batch_size=5000")
    assert "5000" in str(error)


def test_a_layer_that_the_data_never_reaches(project, tmp_path):
    """The planner sees that it does not run, says so, and leaves it float."""
    project.transform(f"model.name='{user(tmp_path, 'Net')}'", last="calibrate")
    plan = json.loads(project.workspace.plan.read_text())
    told = [layer for layer in plan["layers"] if layer["name"] == "unused"] or plan["notes"]
    assert "unused" in json.dumps(told)
    assert "unused.input" not in load_tensors(project.workspace.amax("max"), made_by="calibrate")[0]


def test_weights_and_activations_of_zeros_are_quantized(project, tmp_path):
    outcomes = project.transform(
        f"model.name='{user(tmp_path, 'Dead')}'",
        "train.epochs=1",
        "export.targets=['tensorrt', 'onnxruntime-cpu']",
        last="export",
    )
    (told,) = [remark for remark in outcomes["calibrate"].remarks if " 0 in all" in remark]
    assert told == "unused.input: 0 in all of the calibration data; the range is 1"
    assert outcomes["export"].summary["checks"]["quantized"]["all"]["sqnr_db"] > 30


def test_a_model_that_cannot_be_traced_is_told_before_it_is_trained_or_calibrated(project, tmp_path):
    name = f"model.name='{user(tmp_path, 'Branching')}'"
    error = refusal(project, name, last="quantize")
    assert error.exit_code == ExitCode.FAILED
    assert "avoid Python branches on tensor values" in error.fix
    assert not project.workspace.float_checkpoint.exists()
    without = project.config.read_text().replace("[export]\n", "")
    project.config.write_text(without)
    assert project.transform(name, last="quantize")["quantize"].status == "done"


def test_a_shared_layer_is_planned_once(project, tmp_path):
    project.transform(f"model.name='{user(tmp_path, 'Shared')}'", last="export")
    plan = json.loads(project.workspace.plan.read_text())
    (shared,) = (layer for layer in plan["layers"] if layer["name"] == "fc2")
    assert shared["aliases"] == ["unused"]


def test_a_checkpoint_of_another_model(project):
    project.transform(last="train")
    weights = project.workspace.float_checkpoint
    error = refusal(project, f"model.checkpoint='{weights}'", "model.name='fashion-cnn'")
    assert error.exit_code == ExitCode.USAGE
    assert "another shape" in str(error)


def test_weights_that_are_not_finite(project):
    project.transform(last="train")
    state, _ = load_tensors(project.workspace.float_checkpoint, made_by="train")
    state["conv1.weight"][0] = math.nan
    save_tensors(project.folder / "nan.safetensors", state)
    error = refusal(project, f"model.checkpoint='{project.folder / 'nan.safetensors'}'")
    assert "conv1.weight" in str(error)


def test_fine_tuning_that_nothing_describes(project):
    project.transform(last="train")
    text = project.config.read_text()
    bare = text.replace("[train]\nepochs = 2\nlearning_rate = 5e-3\n", "").replace("epochs = 2", "")
    bare = bare.replace("initial_learning_rate = 1e-4", "")
    project.config.write_text(bare)
    error = refusal(project, f"model.checkpoint='{project.workspace.float_checkpoint}'", last="finetune")
    assert read_record(project.workspace, "quantize") is None, "told before anything takes time"
    assert error.exit_code == ExitCode.USAGE
    assert "epochs and initial_learning_rate" in str(error)


def test_a_loss_that_blows_up_keeps_the_best(finished, caplog):
    with caplog.at_level(logging.WARNING, logger="maseRT"):
        logging.getLogger("maseRT").propagate = True
        outcome = finished.transform("finetune.initial_learning_rate=1e30", last="finetune")["finetune"]
    assert outcome.summary["stopped"]
    assert outcome.summary["best_epoch"] == 0
    workspace = finished.workspace
    assert sha256(workspace.best_checkpoint) == sha256(workspace.calibrated_checkpoint)


class _CrashedError(BaseException):
    """Stands in for a kill."""


def _crash_in_epoch(monkeypatch, epoch: int) -> None:
    train = Epochs.train

    def dying(self, number, *, seed):
        if number == epoch:
            raise _CrashedError
        return train(self, number, seed=seed)

    monkeypatch.setattr(Epochs, "train", dying)


def test_interrupted_fine_tuning_resumes_to_the_same_result(finished, monkeypatch):
    workspace, override = finished.workspace, "finetune.epochs=3"
    finished.transform(override, last="finetune")
    expected = sha256(workspace.epoch_checkpoint(3))
    with monkeypatch.context() as patch, pytest.raises(_CrashedError):
        _crash_in_epoch(patch, 3)
        finished.single("finetune", override, force=True)
    assert read_record(workspace, "finetune") is None
    assert workspace.resume_state.exists()
    before = workspace.epoch_checkpoint(1).stat().st_mtime_ns
    finished.transform(override, last="finetune")
    assert workspace.epoch_checkpoint(1).stat().st_mtime_ns == before
    assert sha256(workspace.epoch_checkpoint(3)) == expected
    assert not workspace.resume_state.exists()


def test_interrupted_training_resumes_to_the_same_result(empty, monkeypatch):
    workspace = empty.workspace
    with monkeypatch.context() as patch, pytest.raises(_CrashedError):
        _crash_in_epoch(patch, 3)
        empty.transform("train.epochs=3", last="train")
    assert workspace.training_state.exists()
    empty.transform("train.epochs=3", last="train")
    resumed = json.loads(workspace.training.read_text()), sha256(workspace.float_checkpoint)
    assert not workspace.training_state.exists()
    empty.single("train", "train.epochs=3", force=True)
    assert (json.loads(workspace.training.read_text()), sha256(workspace.float_checkpoint)) == resumed


def test_interrupted_calibration_keeps_the_methods_it_finished(finished, monkeypatch, caplog):
    import maseRT.steps.calibrate as module

    scored, names = module._scored, []

    def dying(*arguments):
        names.append(arguments[1])
        if len(names) == 2:
            raise _CrashedError
        return scored(*arguments)

    with monkeypatch.context() as patch, pytest.raises(_CrashedError):
        patch.setattr(module, "_scored", dying)
        finished.single("calibrate", force=True)
    expected = json.loads(finished.workspace.calibration.read_text())
    monkeypatch.setattr(module, "_scored", lambda *arguments: (names.append(arguments[1]), scored(*arguments))[1])
    finished.transform(last="calibrate")
    assert names == ["max", "mse", "mse"]
    assert json.loads(finished.workspace.calibration.read_text()) == expected


def test_unfinished_fine_tuning_of_another_plan_starts_over_and_says_so(finished, monkeypatch, caplog):
    with monkeypatch.context() as patch, pytest.raises(_CrashedError):
        _crash_in_epoch(patch, 2)
        finished.single("finetune", force=True)
    logging.getLogger("maseRT").propagate = True
    finished.transform("quantize.rules=[{ last = 1, precision = 'fp32' }]", last="finetune")
    assert "another plan" in caplog.text


def test_a_checkpoint_of_another_plan_is_refused(finished):
    workspace = finished.workspace
    state, _ = load_tensors(workspace.calibrated_checkpoint, made_by="calibrate")
    from maseRT.steps.common import load_quantized

    save_tensors(workspace.epoch_checkpoint(9), state, {"plan": "0" * 64})
    with pytest.raises(StepError, match="another plan"):
        load_quantized(workspace.epoch_checkpoint(9), torch.nn.Identity(), workspace.final_plan, made_by="finetune")


def test_the_calibration_subset_comes_from_the_training_data_alone(project):
    from maseRT.config_file import load_config
    from maseRT.data.loading import calibration_subset

    splits = load_data(load_config(project.config).data, seed=0)
    held_out = {tuple(x.flatten().tolist()) for part in (splits.validation, splits.test) for x, _ in part}
    subset = calibration_subset(splits, samples=200, seed=0)
    overlap = sum(tuple(x.flatten().tolist()) in held_out for x, _ in subset)
    assert overlap == 0


def test_a_model_without_int8_has_nothing_to_calibrate(project):
    outcomes = project.transform("quantize.precision='fp16'", "quantize.float='fp16'", last="export")
    assert "nothing to do" in outcomes["calibrate"].headline
    assert "nothing to do" in outcomes["finetune"].headline
    assert outcomes["export"].summary["qdq_pairs"] == 0


def test_a_bf16_plan_is_exported_without_onnx_runtime(project, caplog):
    logging.getLogger("maseRT").propagate = True
    override = "quantize.float='bf16'"
    outcome = project.transform(override, "quantize.rules=[{ type = 'Linear', precision = 'bf16' }]", last="export")
    assert outcome["export"].summary["checks"]["quantized"] == {}
    assert "BF16" in caplog.text


@pytest.mark.parametrize(
    "override", ["finetune.learned_amax=true", pytest.param("finetune.compile=true", marks=pytest.mark.slow)]
)
def test_other_ways_to_fine_tune_leave_a_model_that_exports(finished, override):
    outcomes = finished.transform(override, "finetune.weight_decay=0.1", "finetune.epochs=1", last="export")
    assert outcomes["finetune"].summary["stopped"] == ""
    history = json.loads(finished.workspace.finetuning_history.read_text())
    assert (history["compile_seconds"] > 0) == ("compile" in override)
    assert history["epochs"][1]["validation"]["accuracy"] > 0.9
    before, _ = load_tensors(finished.workspace.calibrated_checkpoint, made_by="calibrate")
    after, _ = load_tensors(finished.workspace.epoch_checkpoint(1), made_by="finetune")
    moved = bool((before["conv2.input_quantizer.amax"] != after["conv2.input_quantizer.amax"]).any())
    assert moved == ("learned" in override)


def test_int8_layers_without_a_calibration_are_told_before_anything_is_made(tmp_path):
    """`transform` used to train and quantize, and to say at the export that a range was not set."""
    project = new_project(tmp_path / "project", UNTRAINED + "[quantize]\n[export]\n")
    with pytest.raises(UsageError, match="no step measures their ranges") as caught:
        project.transform()
    assert "[calibrate]" in caught.value.fix
    assert not project.workspace.plan.exists()
