"""What a model is for: scores, the checks of a user's own task, and what its mistakes are called."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics import MeanAbsoluteError, MeanMetric

from maseRT.errors import UsageError
from maseRT.tasks import Task, add_batch, check_task, linearized_scores, load_task, metric_value, new_metrics

CLASSIFICATION, REGRESSION = load_task("classification"), load_task("regression")

OWN = """
from torch.nn.functional import l1_loss
from torchmetrics import MeanAbsoluteError
from maseRT.tasks import Task

def make():
    return Task("own", l1_loss, lambda outputs: {"mae": MeanAbsoluteError()}, "mae", False, lambda o, t: abs(o - t))

def number():
    return 7

def fails():
    raise KeyError("gone")

def asks(size):
    return size
"""


def own(**changes) -> Task:
    fields = {
        "name": "own",
        "loss": nn.functional.l1_loss,
        "metrics": lambda outputs: {"mae": MeanAbsoluteError()},
        "primary": "mae",
        "higher_is_better": False,
        "scores": lambda outputs, targets: np.abs(outputs - targets).mean(axis=1),
    }
    return Task(**{**fields, **changes})


def test_the_scores_of_a_classifier_are_its_accuracy():
    outputs, targets = np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]]), np.array([0, 0, 0])
    assert CLASSIFICATION.scores(outputs, targets).tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("shape", [(40,), (40, 1), (40, 3)])
def test_the_mean_of_the_scores_of_a_regression_is_its_rmse(shape):
    rng = np.random.default_rng(0)
    outputs, targets = rng.normal(size=shape).astype(np.float32), rng.normal(size=shape).astype(np.float32)
    scores = REGRESSION.scores(outputs, targets)
    assert scores.shape == (40,)
    assert scores.mean() == pytest.approx(math.sqrt(((outputs.astype(float) - targets) ** 2).mean()))
    assert REGRESSION.scores(outputs[:, None], targets).mean() == pytest.approx(scores.mean()) if len(shape) == 1 else 1
    assert not REGRESSION.scores(targets, targets).any()


def test_differences_of_linearized_scores_are_those_of_the_metric_to_first_order():
    errors = np.random.default_rng(0).exponential(size=1000)
    scores = linearized_scores(errors, math.exp, math.exp)
    half = slice(0, 1000, 2)
    assert scores.mean() == pytest.approx(math.exp(errors.mean()))
    assert scores[half].mean() == pytest.approx(math.exp(errors[half].mean()), rel=2e-3)


def test_a_users_own_task(write):
    write("own_task.py", OWN)
    task = load_task("own_task:make")
    assert (task.name, task.primary, task.classes, task.share) == ("own", "mae", False, False)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_task:number", "the function returned int, not a maseRT.tasks.Task"),
        ("own_task:fails", "KeyError: 'gone'"),
        ("own_task:asks", "cannot be called without arguments"),
        ("own_task:mak", "has no 'mak'; did you mean 'make'"),
        ("no_such_module:make", "no module 'no_such_module'"),
        ("clasification", "no task is called 'clasification'; did you mean 'classification'"),
    ],
)
def test_a_task_that_cannot_be_loaded(write, name, message):
    write("own_task.py", OWN)
    with pytest.raises(UsageError, match=message):
        load_task(name)


def test_good_tasks_pass():
    check_task(own(), torch.randn(2, 3), torch.randn(2, 3))
    check_task(CLASSIFICATION, torch.randn(2, 30), torch.tensor([0, 29]))
    check_task(REGRESSION, torch.randn(2, 1), torch.randn(2))
    check_task(REGRESSION, torch.randn(1), torch.randn(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"loss": lambda o, t: (o - t).abs()},
            r"the loss of outputs float32 \[2, 3\] and .* is not a scalar but float32",
        ),
        ({"loss": lambda o, t: 1.0}, "is not a scalar but float"),
        (
            {"loss": lambda o, t: o @ t},
            r"the loss of outputs float32 \[2, 3\] and targets float32 \[2, 3\] raised Runtime",
        ),
        ({"loss_sum": lambda o, t: (o - t).abs().sum()}, "the loss of .* raised TypeError"),
        ({"metrics": lambda n: MeanAbsoluteError()}, "metrics does not return a dict"),
        ({"metrics": lambda n: {"mae": nn.L1Loss()}}, "metrics does not return a dict"),
        ({"metrics": lambda n: {"mae": MeanAbsoluteError(n + 1)}}, "metric mae of .* raised"),
        ({"metrics": lambda n: {}}, "the primary metric 'mae' is none of its metrics: there are none"),
        ({"primary": "rmse"}, "the primary metric 'rmse' is none of its metrics: mae"),
        ({"metrics": lambda n: {"mae": MeanAbsoluteError(), "loss": MeanMetric()}}, "no metric may be called loss"),
        ({"scores": lambda o, t: np.abs(o - t)}, r"the scores of .* have shape \[2, 3\], not one per sample"),
        ({"scores": lambda o, t: o.no()}, "the scores of .* raised AttributeError"),
    ],
)
def test_a_task_that_does_not_fit(changes, message):
    with pytest.raises(UsageError, match=message) as caught:
        check_task(own(**changes), torch.randn(2, 3), torch.randn(2, 3))
    assert caught.value.where == "[model] task"


def test_a_metric_that_is_no_number():
    task = own(metrics=lambda outputs: {"mae": MeanAbsoluteError(num_outputs=3)})
    metrics = new_metrics(task, 3)
    add_batch(task, metrics, torch.randn(4, 3), torch.randn(4, 3))
    with pytest.raises(UsageError, match=r"metric mae is not one number but float32 \[3\]"):
        metric_value(task, "mae", metrics["mae"])


def test_class_numbers_are_no_targets_of_a_regression():
    with pytest.raises(UsageError, match=r'targets are integers, but \[model\] task = "regression"') as caught:
        check_task(REGRESSION, torch.randn(2, 1), torch.tensor([1, 2]))
    assert "classification" in caught.value.fix


@pytest.mark.parametrize(("outputs", "targets"), [((2, 1), (2, 3)), ((2, 2, 3), (2, 3, 2)), ((2,), (2, 2))])
def test_outputs_and_targets_of_another_shape_are_not_broadcast(outputs, targets):
    with pytest.raises(UsageError, match=r"outputs of shape \[.*\] a sample, the data targets of shape \[.*\]"):
        check_task(REGRESSION, torch.randn(outputs), torch.randn(targets))
