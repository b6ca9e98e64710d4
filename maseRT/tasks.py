"""What a model is for: the loss it is trained with, the metrics it is judged by, and which of them decides."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanAbsoluteError, MeanSquaredError, Metric, R2Score
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)

from maseRT.errors import MaseRTError, UsageError, did_you_mean
from maseRT.factories import call_factory, is_factory

Array = npt.NDArray[Any]
Scores = npt.NDArray[np.float64]

CONFUSION = "confusion"
"""The one metric that may be a matrix."""
RESERVED = frozenset({"samples", "loss"})
"""Names that a report uses beside the metrics."""
TOP5_CLASSES = 20
"""From this many classes on, top-5 accuracy is told: with fewer, five guesses are a quarter of all answers and more."""
CONFUSION_CLASSES = 50
"""Up to this many classes, the confusion matrix is told: a larger one cannot be read."""

_WHERE = "[model] task"


@dataclass(frozen=True)
class Task:
    """What a model is for. A `module:function` of a user takes no arguments and returns one:

        def multilabel():
            return Task(
                name="multi-label",
                loss=lambda outputs, targets: binary_cross_entropy_with_logits(outputs, targets.float()),
                metrics=lambda labels: {"f1": MultilabelF1Score(labels), "exact": MultilabelExactMatch(labels)},
                primary="f1",
                higher_is_better=True,
                share=True,
                scores=lambda outputs, targets: ((outputs > 0) == targets).mean(axis=1),
            )

    Attributes:
        name: for messages and reports.
        loss: (outputs, targets) of a batch -> their mean loss, a scalar with a gradient. It is called on the device
            that trains: a tensor of its own, such as class weights, has to follow `outputs.device`.
        metrics: size of the outputs' last dimension -> new torchmetrics by name, in the order to show. They are given
            outputs and targets on the CPU, floats in float64. Each gives one number, but for one called "confusion".
        primary: the metric that decides which calibrator and which epoch is best.
        higher_is_better: of the primary metric.
        scores: (outputs, targets) of all evaluated samples -> float64 [samples], whose mean is the primary metric, or
            stands for it: intervals of differences are drawn from them. See `linearized_scores`.
        classes: outputs are [N, classes] and targets class numbers [N]: labels can be compared.
        share: the primary metric lies in [0, 1] and is shown in percent.
        loss_sum: (outputs, targets) of a batch -> the sum of the losses, and how many they are. Needed where `loss` is
            not a mean over samples, such as one that leaves out padding; default: `loss` times the samples.
    """

    name: str
    loss: Callable[[Tensor, Tensor], Tensor]
    metrics: Callable[[int], Mapping[str, Metric]]
    primary: str
    higher_is_better: bool
    scores: Callable[[Array, Array], Array]
    classes: bool = False
    share: bool = False
    loss_sum: Callable[[Tensor, Tensor], tuple[Tensor, int]] | None = None


def load_task(name: str) -> Task:
    """Return the task that a config names.

    Raises:
        UsageError: an unknown name, or a user's function that fails or returns something else.
    """
    if is_factory(name):
        task = call_factory(name, what="task")
        if not isinstance(task, Task):
            what = f"the function returned {type(task).__name__}, not a maseRT.tasks.Task"
            raise UsageError(what, where=f"task '{name}'", fix="return maseRT.tasks.Task(...)")
        return task
    if name not in TASKS:
        raise UsageError(
            f"no task is called '{name}'{did_you_mean(name, list(TASKS))}",
            where=_WHERE,
            fix=f"choose one of {', '.join(TASKS)}, or module:function",
        )
    return TASKS[name]


def outputs_in(outputs: Tensor | Array) -> int:
    """Return the size of the last dimension of a batch of outputs; 1 where there is only the batch's."""
    return int(outputs.shape[-1]) if outputs.ndim > 1 else 1


def check_task(task: Task, outputs: Tensor, targets: Tensor) -> None:
    """Try a task on a batch, so that what does not fit is told before any work is done.

    Raises:
        UsageError: the loss, a metric or the scores raise or return something else than they should.
    """
    given = _given(outputs, targets)
    loss = _attempt(task, f"the loss of {given}", lambda: task.loss(outputs, targets))
    if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.is_floating_point():
        got = _described(loss) if isinstance(loss, Tensor) else type(loss).__name__
        raise _error(task, f"the loss of {given} is not a scalar but {got}", fix="return the mean over the batch")
    summed_loss(task, outputs, targets)
    add_batch(task, new_metrics(task, outputs_in(outputs)), outputs, targets)
    scores = _attempt(task, f"the scores of {given}", lambda: task.scores(outputs.numpy(), targets.numpy()))
    if np.shape(scores) != (len(targets),):
        what = f"the scores of {given} have shape {list(np.shape(scores))}, not one per sample"
        raise _error(task, what, fix="average over everything but the first dimension")


def summed_loss(task: Task, outputs: Tensor, targets: Tensor) -> tuple[float, int]:
    """Return the sum of a batch's losses, and how many they are.

    Raises:
        UsageError: the loss raises.
    """

    def total() -> tuple[float, int]:
        if task.loss_sum is None:
            return float(task.loss(outputs, targets)) * len(targets), len(targets)
        summed, count = task.loss_sum(outputs, targets)
        return float(summed), int(count)

    found: tuple[float, int] = _attempt(task, f"the loss of {_given(outputs, targets)}", total)
    return found


def new_metrics(task: Task, outputs: int) -> dict[str, Metric]:
    """Return a task's metrics, new and empty.

    Raises:
        UsageError: not a mapping of names to torchmetrics, a name that is taken, or no primary metric among them.
    """
    metrics = _attempt(task, f"metrics({outputs})", lambda: task.metrics(outputs))
    if not isinstance(metrics, Mapping) or not all(isinstance(metric, Metric) for metric in metrics.values()):
        raise _error(task, "metrics does not return a dict of torchmetrics.Metric", fix='such as {"mae": metric}')
    taken = sorted(RESERVED & set(metrics))
    if taken:
        raise _error(task, f"no metric may be called {' or '.join(taken)}", fix="choose another name")
    if task.primary not in metrics or task.primary == CONFUSION:
        what = f"the primary metric '{task.primary}' is none of its metrics: {', '.join(metrics) or 'there are none'}"
        raise _error(task, what, fix="name one of them, or add it")
    return dict(metrics)


def add_batch(task: Task, metrics: Mapping[str, Metric], outputs: Tensor, targets: Tensor) -> None:
    """Give metrics a batch, floats in float64, so that their sums hardly depend on how samples are cut into batches.

    Raises:
        UsageError: a metric refuses it.
    """
    precise = outputs.double(), targets.double() if targets.is_floating_point() else targets
    for name, metric in metrics.items():
        _attempt(task, f"metric {name} of {_given(*precise)}", partial(metric.update, *precise))


def metric_value(task: Task, name: str, metric: Metric) -> Any:
    """Return what a metric found: a float, or rows of counts for "confusion".

    Raises:
        UsageError: it raises, or finds something else.
    """
    value = _attempt(task, f"metric {name}", metric.compute)
    if isinstance(value, Tensor) and name == CONFUSION and value.dim() == 2:
        return value.long().tolist()
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    got = _described(value) if isinstance(value, Tensor) else type(value).__name__
    raise _error(task, f"metric {name} is not one number but {got}", fix="average it, for example over the classes")


def linearized_scores(means: Array, function: Callable[[float], float], slope: Callable[[float], float]) -> Scores:
    """Return scores whose mean is `function` of the mean of per-sample values, such as a root or an exponential.

    Their differences from that mean are first-order (the delta method), so that an interval bootstrapped from them is
    in the metric's own unit.

    Args:
        means: per sample [N], such as squared errors.
        function: such as math.sqrt.
        slope: its derivative.
    """
    values = np.asarray(means, dtype=np.float64)
    mean = float(values.mean())
    scores: Scores = function(mean) + slope(mean) * (values - mean)
    return scores


def _classification_metrics(classes: int) -> dict[str, Metric]:
    """Return macro averages but for the accuracy, as in every table of the field.

    In float64: in float32, 0.910 is more than 0.005 above 0.905, and a gate of 0.005 would fail.
    """
    metrics: dict[str, Metric] = {"accuracy": MulticlassAccuracy(classes, average="micro")}
    if classes >= TOP5_CLASSES:
        metrics["top5"] = MulticlassAccuracy(classes, average="micro", top_k=5)
    metrics["precision"] = MulticlassPrecision(classes, average="macro")
    metrics["recall"] = MulticlassRecall(classes, average="macro")
    metrics["f1"] = MulticlassF1Score(classes, average="macro")
    if classes <= CONFUSION_CLASSES:
        metrics[CONFUSION] = MulticlassConfusionMatrix(classes)
    return {name: metric.set_dtype(torch.float64) for name, metric in metrics.items()}


def _right_labels(outputs: Array, targets: Array) -> Scores:
    return np.asarray(outputs.argmax(axis=1) == targets, dtype=np.float64)


def _cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets)


def _summed_cross_entropy(outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    return F.cross_entropy(outputs, targets, reduction="sum"), len(targets)


class _Rows(Metric):
    """A regression metric over [N, values]: outputs [N, 1] and targets [N] mean the same."""

    full_state_update = False

    def __init__(self, metric: Metric) -> None:
        super().__init__()
        self.metric = metric.set_dtype(torch.float64)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch."""
        self.metric.update(outputs.reshape(len(outputs), -1), targets.reshape(len(targets), -1))

    def compute(self) -> Tensor:
        """Return the metric of all batches."""
        value: Tensor = self.metric.compute()
        return value


class _R2(R2Score):
    """R2, averaged over the outputs. The parent takes sums of squares below 1e-4 for zero, whatever the unit is."""

    def compute(self) -> Tensor:
        """Return 1 - residual / total sum of squares; of constant targets, 1 where all are met and 0 where not."""
        total = self.sum_squared_error - self.sum_error**2 / self.total
        varies = total > 1e-12 * self.sum_squared_error
        return torch.where(varies, 1 - self.residual / total, (self.residual == 0).double()).mean()


def _regression_metrics(outputs: int) -> dict[str, Metric]:
    """Return the metrics over all values of a sample, however many `outputs` there are."""
    del outputs
    return {
        "rmse": _Rows(MeanSquaredError(squared=False)),
        "mse": _Rows(MeanSquaredError()),
        "mae": _Rows(MeanAbsoluteError()),
        "r2": _Rows(_R2()),
    }


def _mean_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean squared error.

    Raises:
        UsageError: targets that are class numbers, or of another size than the outputs, which would be broadcast.
    """
    if not targets.is_floating_point():
        raise UsageError(
            'the targets are integers, but [model] task = "regression" needs floating-point numbers',
            where=_WHERE,
            fix='store them as floats, y.astype("float32"), or set task = "classification" if they are class numbers',
        )
    if [size for size in outputs.shape[1:] if size > 1] != [size for size in targets.shape[1:] if size > 1]:
        raise UsageError(
            f"the model gives outputs of shape {list(outputs.shape[1:])} a sample, the data targets of shape "
            f"{list(targets.shape[1:])}",
            where=_WHERE,
            fix="use a model with one output for each target value",
        )
    return F.mse_loss(outputs, targets.reshape(outputs.shape))


def _root_scores(outputs: Array, targets: Array) -> Scores:
    difference = outputs.reshape(len(outputs), -1).astype(np.float64) - targets.reshape(len(targets), -1)
    squared = (difference**2).mean(axis=1)
    return linearized_scores(squared, math.sqrt, lambda mean: 0.5 / math.sqrt(mean) if mean else 0.0)


def _given(outputs: Tensor, targets: Tensor) -> str:
    return f"outputs {_described(outputs)} and targets {_described(targets)}"


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _attempt(task: Task, what: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except MaseRTError:
        raise
    except Exception as error:
        raise _error(task, f"{what} raised {type(error).__name__}: {error}") from error


def _error(task: Task, what: str, *, fix: str = "") -> UsageError:
    return UsageError(f"{task.name}: {what}", where=_WHERE, fix=fix)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="classification",
            loss=_cross_entropy,
            metrics=_classification_metrics,
            primary="accuracy",
            higher_is_better=True,
            scores=_right_labels,
            classes=True,
            share=True,
            loss_sum=_summed_cross_entropy,
        ),
        Task(
            name="regression",
            loss=_mean_squared_error,
            metrics=_regression_metrics,
            primary="rmse",
            higher_is_better=False,
            scores=_root_scores,
        ),
    )
}
