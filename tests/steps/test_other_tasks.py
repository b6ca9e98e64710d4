"""Runs whose model is no classifier: a regression, several labels a sample, and a language model's perplexity."""

import json
import math
import re
from contextlib import ExitStack

import numpy as np
import pytest
from projects import Project, new_project, working_in
from sklearn.datasets import load_diabetes

from maseRT.errors import UsageError

CONFIG = """
[run]
threads = 1
device = "cpu"
[model]
name = "own:net"
task = "{task}"
[data]
name = "{data}"
batch_size = 64
[train]
epochs = {epochs}
learning_rate = 1e-2
[quantize]
placement = "layerwise"
[calibrate]
batches = 2
methods = ["max", {{ percentile = 50 }}]
[finetune]
epochs = 1
initial_learning_rate = 1e-4
[export]
[analyze]
runtimes = ["torch", "onnxruntime"]
warmup = 1
iterations = 2
seconds = 0
isolate = false
energy = false
"""

DIABETES = """
from torch import nn

def net():
    return nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 1))
"""

MULTILABEL = """
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

def data():
    digits = load_digits()
    numbers = torch.from_numpy(digits.target)
    labels = torch.stack([numbers % 2 == 0, numbers % 3 == 0, numbers > 4], dim=1)
    whole = torch.from_numpy(digits.data).float() / 16, labels.long()
    return [TensorDataset(*(part[start:stop] for part in whole)) for start, stop in ((0, 640), (640, 800), (800, 1000))]

def net():
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))
"""

LABELS = """
from torch.nn.functional import binary_cross_entropy_with_logits
from torchmetrics.classification import MultilabelExactMatch, MultilabelF1Score
from maseRT.tasks import Task

def task():
    return Task(
        name="multi-label",
        loss=lambda outputs, targets: binary_cross_entropy_with_logits(outputs, targets.float()),
        metrics=lambda labels: {"f1": MultilabelF1Score(labels), "exact": MultilabelExactMatch(labels)},
        primary="f1",
        higher_is_better=True,
        share=True,
        scores=lambda outputs, targets: ((outputs > 0) == targets).mean(axis=1),
    )
"""

LANGUAGE = """
import math
import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.data import TensorDataset
from torchmetrics.text import Perplexity
from maseRT.tasks import Task, linearized_scores

TEXT = "the quick brown fox jumps over the lazy dog and the slow red hen walks under the busy cat " * 12
LETTERS = sorted(set(TEXT))
STEPS = 8

def data():
    text = torch.tensor([LETTERS.index(letter) for letter in TEXT])
    windows = text.unfold(0, STEPS + 1, 3)
    inputs = one_hot(windows[:, :-1], len(LETTERS)).float()
    whole = inputs, windows[:, 1:].contiguous()
    return [TensorDataset(*(part[start:stop] for part in whole)) for start, stop in ((0, 200), (200, 270), (270, 340))]

def net():
    return nn.Sequential(nn.Linear(len(LETTERS), 32), nn.ReLU(), nn.Linear(32, len(LETTERS)))

def nll(outputs, targets):
    logits = torch.from_numpy(outputs).double().flatten(0, 1)
    losses = cross_entropy(logits, torch.from_numpy(targets).flatten(), reduction="none")
    return losses.reshape(targets.shape).mean(dim=1).numpy()

def task():
    return Task(
        name="language model",
        loss=lambda outputs, targets: cross_entropy(outputs.flatten(0, 1), targets.flatten()),
        metrics=lambda letters: {"perplexity": Perplexity()},
        primary="perplexity",
        higher_is_better=False,
        scores=lambda outputs, targets: linearized_scores(nll(outputs, targets), math.exp, math.exp),
    )
"""


def read(path):
    return json.loads(path.read_text())


def measured(project):
    """Return the metrics of the report's rows, with all rows judged by one split."""
    report = read(project.workspace.report)
    assert len(report["rows"]) >= 5
    assert all(row["agreement"]["label_agreement"] is None for row in report["rows"][1:])
    assert [finding for finding in report["findings"] if finding["severity"] == "error"] == []
    for row in report["rows"][1:]:
        interval = row["difference"]["interval"]
        assert interval["low"] <= row["difference"]["value"] <= interval["high"]
    return report["task"], {row["name"]: row["metrics"] for row in report["rows"]}


@pytest.fixture
def project(tmp_path):
    """Starts a project with modules of its own in the working directory."""
    with ExitStack() as stack:

        def _project(*, task, data, epochs, **modules) -> Project:
            stack.enter_context(working_in(tmp_path / "project", **modules))
            return new_project(tmp_path / "project", CONFIG.format(task=task, data=data, epochs=epochs))

        yield _project


def test_a_regression(project):
    project = project(task="regression", data="npz", epochs=25, own=DIABETES)
    x, y = load_diabetes(return_X_y=True)
    np.savez(project.folder / "diabetes.npz", x=x * 20, y=y / 50)
    more = ("onnxruntime.modes=['optimized']", "onnxruntime.device=cpu", "analyze.sensitivity=true")
    done = project.transform("data.path=diabetes.npz", *more)
    assert re.fullmatch(r"validation rmse \d\.\d+ after 25 epochs", done["train"].headline)
    calibration = read(project.workspace.calibration)
    rmse = {name: found["validation"]["rmse"] for name, found in calibration["methods"].items()}
    assert calibration["best"] == "max" == min(rmse, key=rmse.get)
    epochs = read(project.workspace.finetuning_history)
    best = min(epochs["epochs"], key=lambda epoch: epoch["validation"]["rmse"])
    assert epochs["best_epoch"] == best["epoch"]
    assert "torch: SQNR" in done["export"].headline
    assert done["onnxruntime"].table[1][2] == "equal" or done["onnxruntime"].table[1][2].startswith("SQNR")
    task, metrics = measured(project)
    assert task == {"name": "regression", "primary": "rmse", "higher_is_better": False}
    for found in metrics.values():
        assert list(found["values"]) == ["rmse", "mse", "mae", "r2"]
        assert found["values"]["rmse"] < np.std(y / 50)
        assert found["values"]["r2"] > 0.2
    assert read(project.workspace.sensitivity)["layers"][0].keys() == {"layer", "loss_change", "rmse_change", "sqnr_db"}


def test_several_labels_and_the_key_that_holds_their_task(project):
    project = project(task="labels:task", data="own:data", epochs=8, own=MULTILABEL, labels=LABELS)
    done = project.transform()
    assert re.search(r"validation f1 8\d\.\d\d%", done["train"].headline)
    assert done["calibrate"].table[0][1] == "f1"
    task, metrics = measured(project)
    assert (task["name"], task["primary"]) == ("multi-label", "f1")
    assert metrics["torch-fp32"]["values"].keys() == {"f1", "exact"}
    assert metrics["onnxruntime-int8"]["values"]["f1"] == pytest.approx(metrics["torch-int8"]["values"]["f1"], abs=0.02)
    (project.folder / "labels.py").write_text(LABELS + "# changed")
    assert "labels.py" in project.run().preview()[0].why


def test_a_language_model(project):
    project = project(task="own:task", data="own:data", epochs=10, own=LANGUAGE)
    done = project.transform()
    assert done["calibrate"].summary["best"] == "max"
    task, metrics = measured(project)
    assert (task["primary"], task["higher_is_better"]) == ("perplexity", False)
    for found in metrics.values():
        assert found["values"]["perplexity"] == pytest.approx(math.exp(found["loss"]), rel=1e-5)
        assert found["values"]["perplexity"] < 20
    rung = read(project.workspace.report)["drift"][0]
    assert rung["metric_before"] == pytest.approx(metrics["torch-fp32"]["values"]["perplexity"], rel=1e-6)


def test_floats_are_no_classes(project):
    project = project(task="classification", data="npz", epochs=1, own=DIABETES)
    np.savez(project.folder / "diabetes.npz", x=np.ones((90, 10)), y=np.linspace(0, 1, 90))
    with pytest.raises(UsageError, match=r'targets are float32 .* but \[model\] task = "classification"') as caught:
        project.transform("data.path=diabetes.npz", last="train")
    assert '[model] task = "regression"' in caught.value.fix


def test_classes_are_no_floats(project):
    project = project(task="regression", data="digits", epochs=1, own=DIABETES)
    with pytest.raises(UsageError, match=r'targets are integers, but \[model\] task = "regression"'):
        project.transform("model.name=digits-cnn", last="train")


def test_a_task_that_is_not_there(project):
    project = project(task="own:judge", data="digits", epochs=1, own=LANGUAGE)
    with pytest.raises(UsageError, match="has no 'judge'"):
        project.transform(last="train")
