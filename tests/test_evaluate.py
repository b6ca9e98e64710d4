"""Metrics, latency and agreement against values worked out by hand or by scikit-learn."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    confusion_matrix,
    f1_score,
    mean_absolute_error,
    mean_squared_error,
    precision_score,
    r2_score,
    recall_score,
)
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from maseRT.agreement import agreement
from maseRT.evaluate import Metrics, TaskMeter, evaluate, evaluate_module
from maseRT.tasks import Task, load_task

CLASSIFICATION, REGRESSION = load_task("classification"), load_task("regression")


def in_batches(outputs, targets, *, size):
    return list(zip(outputs.split(size), targets.split(size), strict=True))


def padded():
    """A task whose targets of -1 count neither in the loss nor in the metric."""

    def loss_sum(outputs, targets):
        total = nn.functional.cross_entropy(outputs, targets, ignore_index=-1, reduction="sum")
        return total, int((targets >= 0).sum())

    return Task(
        name="padded",
        loss=lambda outputs, targets: nn.functional.cross_entropy(outputs, targets, ignore_index=-1),
        metrics=lambda outputs: {"accuracy": MulticlassAccuracy(outputs, ignore_index=-1)},
        primary="accuracy",
        higher_is_better=True,
        scores=lambda outputs, targets: np.ones(len(outputs)),
        loss_sum=loss_sum,
    )


def test_metrics_equal_scikit_learns_whatever_the_batches():
    logits = torch.randn(101, 5)
    labels = torch.randint(0, 5, (101,))
    found = evaluate(lambda x: x, in_batches(logits, labels, size=17), task=CLASSIFICATION, outputs=5)
    predicted = logits.argmax(1)
    assert found.samples == 101
    assert found.values == pytest.approx(
        {
            "accuracy": (predicted == labels).float().mean().item(),
            "precision": precision_score(labels, predicted, average="macro"),
            "recall": recall_score(labels, predicted, average="macro"),
            "f1": f1_score(labels, predicted, average="macro"),
        }
    )
    assert found.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert found.confusion == confusion_matrix(labels, predicted).tolist()
    assert list(found.as_dict()) == ["samples", "accuracy", "precision", "recall", "f1", "loss"]


def test_a_difference_of_shares_is_that_of_the_counts():
    labels = torch.zeros(1000, dtype=torch.long)
    accuracies = []
    for right in (910, 905):
        logits = nn.functional.one_hot((torch.arange(1000) >= right).long(), 30).float()
        found = evaluate(lambda x: x, in_batches(logits, labels, size=300), task=CLASSIFICATION, outputs=30)
        accuracies.append(found.values["accuracy"])
    assert accuracies == [0.91, 0.905]


def test_top5_and_the_confusion_matrix_follow_the_number_of_classes():
    labels = torch.randint(0, 60, (200,))
    logits = torch.randn(200, 60)
    found = evaluate(lambda x: x, [(logits, labels)], task=CLASSIFICATION, outputs=60)
    right = (logits.topk(5).indices == labels[:, None]).any(1).float().mean().item()
    assert found.values["top5"] == pytest.approx(right)
    assert list(found.values)[:2] == ["accuracy", "top5"]
    assert found.confusion is None


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3)])
def test_regression_equals_scikit_learn(shape):
    targets = 1e3 + torch.randn(50, *shape)
    outputs = targets + 0.1 * torch.randn(50, *shape)
    found = evaluate(lambda x: x, in_batches(outputs, targets, size=8), task=REGRESSION, outputs=3)
    flat = targets.double().reshape(50, -1).numpy(), outputs.double().reshape(50, -1).numpy()
    assert found.values == pytest.approx(
        {
            "rmse": math.sqrt(mean_squared_error(*flat)),
            "mse": mean_squared_error(*flat),
            "mae": mean_absolute_error(*flat),
            "r2": r2_score(*flat),
        },
        rel=1e-6,
    )
    assert found.loss == pytest.approx(found.values["mse"], rel=1e-5)


def test_a_column_of_outputs_fits_a_list_of_targets():
    outputs, targets = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1.0, 2.0, 3.0])
    found = evaluate(lambda x: x, [(outputs, targets)], task=REGRESSION, outputs=1)
    assert (found.values["mse"], found.values["mae"]) == pytest.approx((1 / 3, 1 / 3))


def test_r2_knows_no_unit():
    targets = torch.randn(40)
    outputs = targets + 0.5 * torch.randn(40)
    small, large = (
        evaluate(lambda x: x, [(outputs * unit, targets * unit)], task=REGRESSION, outputs=1).values["r2"]
        for unit in (1e-6, 1e3)
    )
    assert small == pytest.approx(large, rel=1e-5)
    constant = evaluate(lambda x: x, [(outputs, torch.full((40,), 0.1))], task=REGRESSION, outputs=1)
    assert constant.values["r2"] == 0


@pytest.mark.parametrize("size", [1, 7, 50, 99])
@pytest.mark.parametrize(
    ("task", "outputs", "targets"),
    [
        (CLASSIFICATION, torch.randn(100, 25), torch.arange(100) % 25),
        (REGRESSION, 50 + torch.randn(100, 2), 50 + torch.randn(100, 2)),
        (padded(), torch.randn(100, 4), torch.arange(100) % 5 - 1),
    ],
    ids=["classification", "regression", "padded"],
)
def test_the_cut_into_batches_does_not_matter(task, outputs, targets, size):
    count = outputs.shape[1]
    whole = evaluate(lambda x: x, [(outputs, targets)], task=task, outputs=count)
    cut = evaluate(lambda x: x, in_batches(outputs, targets, size=size), task=task, outputs=count)
    assert cut.values == pytest.approx(whole.values, rel=1e-9)
    assert cut.loss == pytest.approx(whole.loss, rel=1e-6)
    assert (cut.samples, cut.confusion) == (whole.samples, whole.confusion)


def test_half_precision_outputs_are_measured_in_full_precision():
    meter = TaskMeter(REGRESSION, 1)
    meter.update(torch.full((10, 1), 300.0, dtype=torch.float16), torch.zeros(10))
    assert meter.compute().values["mse"] == 90_000


def test_metrics_are_ranked_by_the_primary_one_and_ties_by_the_loss():
    def made(value, loss, *, higher):
        return Metrics(10, loss, {"m": value}, "m", higher, share=higher)

    assert made(0.9, 5.0, higher=True).rank > made(0.8, 1.0, higher=True).rank
    assert made(54.2, 5.0, higher=False).rank > made(60.0, 1.0, higher=False).rank
    assert made(0.9, 1.0, higher=True).rank > made(0.9, 2.0, higher=True).rank
    assert made(1e9, 9.0, higher=False).rank > made(math.nan, 0.0, higher=False).rank


def test_shares_alone_are_shown_in_percent():
    accuracy = Metrics(10, 0.1, {"accuracy": 0.9741}, "accuracy", True, share=True)
    rmse = Metrics(10, 0.1, {"rmse": 54.2}, "rmse", False, share=False)
    assert (accuracy.describe(), rmse.describe()) == ("accuracy 97.41%", "rmse 54.2")
    assert rmse.change_shown(Metrics(10, 0.1, {"rmse": 54.0}, "rmse", False, share=False)) == "+0.2"


def test_evaluating_a_module_leaves_its_mode_alone():
    model = nn.Sequential(nn.Dropout(0.9), nn.Linear(4, 3)).train()
    batches = [(torch.randn(8, 4), torch.zeros(8, dtype=torch.long))]
    first, second = (evaluate_module(model, batches, task=CLASSIFICATION, outputs=3) for _ in range(2))
    assert first == second
    assert model.training


def test_agreement():
    reference = np.array([[1.0, 0.0], [0.0, 2.0]])
    found = agreement(reference, np.array([[1.0, 0.0], [0.2, 0.1]]))
    assert found.label_agreement == 0.5
    assert found.max_error == pytest.approx(1.9)
    assert found.relative_error == pytest.approx(0.95)
    assert found.sqnr_db == pytest.approx(10 * math.log10(5 / (0.2**2 + 1.9**2)))
    assert agreement(reference, reference).sqnr_db is None
    assert found.describe() == "50.0% same labels, SQNR 1 dB"


def test_agreement_of_outputs_that_are_no_classes():
    reference = np.arange(1.0, 7.0).reshape(3, 2)
    found = agreement(reference, reference * 1.01, classes=False)
    assert found.label_agreement is None
    assert found.sqnr_db == pytest.approx(40)
    assert found.describe() == "SQNR 40 dB"
    assert agreement(reference[:, 0], reference[:, 0], classes=False).describe() == "equal"
