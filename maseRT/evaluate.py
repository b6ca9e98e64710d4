"""One evaluator for every row of a report: whatever runs the model, the samples and the metrics are the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from maseRT.eval_mode import evaluating
from maseRT.tasks import CONFUSION, Task, add_batch, metric_value, new_metrics, summed_loss
from maseRT.token_ids import looked_up


@dataclass(frozen=True)
class Metrics:
    """How well a model did on a number of samples.

    Attributes:
        loss: mean.
        values: every other metric by name, in the order to show.
        primary: the metric that decides.
        higher_is_better: of the primary metric.
        share: the primary metric lies in [0, 1].
        confusion: counts; rows are the true classes. None where there is none.
    """

    samples: int
    loss: float
    values: dict[str, float]
    primary: str
    higher_is_better: bool
    share: bool
    confusion: list[list[int]] | None = None

    @property
    def primary_value(self) -> float:
        """The metric that decides."""
        return self.values[self.primary]

    @property
    def rank(self) -> tuple[float, float]:
        """Higher is better: the primary metric first, then a lower loss; NaN is the worst of all."""
        signed = self.primary_value if self.higher_is_better else -self.primary_value
        return _or_worst(signed), _or_worst(-self.loss)

    @property
    def shown(self) -> str:
        """The primary metric as text, shares in percent."""
        return f"{self.primary_value:.2%}" if self.share else f"{self.primary_value:.4g}"

    def change_shown(self, before: Metrics) -> str:
        """Return how the primary metric changed, as text with its sign."""
        change = self.primary_value - before.primary_value
        return f"{change:+.2%}" if self.share else f"{change:+.4g}"

    def describe(self) -> str:
        """Return the primary metric with its name, such as "accuracy 97.41%" or "rmse 54.2"."""
        return f"{self.primary} {self.shown}"

    def as_dict(self) -> dict[str, float]:
        """Return the numbers, flat, for JSON; without the confusion matrix."""
        return {"samples": self.samples, **self.values, "loss": self.loss}


class TaskMeter:
    """Collects outputs batch by batch, and turns them into metrics; how they are cut into batches does not matter.

    Memory does not grow with the samples, unless a user's metric keeps them.
    """

    def __init__(self, task: Task, outputs: int) -> None:
        """Start empty; `outputs` is the size of the outputs' last dimension."""
        self._task = task
        self._metrics = new_metrics(task, outputs)
        self._samples = 0
        self._loss, self._losses = 0.0, 0

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch [N, ...] on the CPU.

        Raises:
            UsageError: the task's loss or a metric refuses it.
        """
        outputs = outputs.float()
        add_batch(self._task, self._metrics, outputs, targets)
        loss, losses = summed_loss(self._task, outputs, targets)
        self._loss += loss
        self._losses += losses
        self._samples += len(targets)

    def compute(self) -> Metrics:
        """Return the metrics of everything so far.

        Raises:
            UsageError: a metric cannot be computed from these samples.
        """
        values = {name: metric_value(self._task, name, metric) for name, metric in self._metrics.items()}
        return Metrics(
            samples=self._samples,
            loss=self._loss / self._losses,
            confusion=values.pop(CONFUSION, None),
            values=values,
            primary=self._task.primary,
            higher_is_better=self._task.higher_is_better,
            share=self._task.share,
        )


def evaluate(
    infer: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]], *, task: Task, outputs: int
) -> Metrics:
    """Run a model over batches and return its metrics.

    Args:
        infer: inputs [N, ...] -> outputs [N, ...], on the CPU.
        batches: (inputs, targets) pairs; a short last batch counts like any other.
        task: what is measured.
        outputs: size of the outputs' last dimension.
    """
    meter = TaskMeter(task, outputs)
    for inputs, targets in batches:
        with looked_up(inputs):
            outputs_of_batch = infer(inputs)
        meter.update(outputs_of_batch, targets)
    return meter.compute()


def evaluate_module(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, task: Task, outputs: int, device: str = "cpu"
) -> Metrics:
    """Evaluate a torch module in eval mode."""
    with evaluating(model), torch.inference_mode():
        return evaluate(lambda x: model(x.to(device)).cpu(), batches, task=task, outputs=outputs)


def _or_worst(value: float) -> float:
    return -math.inf if math.isnan(value) else value
