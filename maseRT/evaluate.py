"""One evaluator for every row of a report: whatever runs the model, the samples and the metrics are the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassPrecision, MulticlassRecall


@dataclass(frozen=True)
class Metrics:
    """How well a classifier did on a number of samples; precision, recall and F1 are macro averages in [0, 1]."""

    samples: int
    accuracy: float
    precision: float
    recall: float
    f1: float
    loss: float

    def as_dict(self) -> dict[str, float]:
        """Return plain values for JSON."""
        return asdict(self)


def evaluate(infer: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]], *, classes: int) -> Metrics:
    """Run a classifier over batches and return its metrics.

    Args:
        infer: inputs [N, ...] -> logits [N, classes], on the CPU.
        batches: (inputs, labels [N]) pairs; a short last batch counts like any other.
    """
    collection = MetricCollection(
        {
            "accuracy": MulticlassAccuracy(classes, average="micro"),
            "precision": MulticlassPrecision(classes, average="macro"),
            "recall": MulticlassRecall(classes, average="macro"),
            "f1": MulticlassF1Score(classes, average="macro"),
        }
    )
    samples, loss = 0, 0.0
    for inputs, labels in batches:
        logits = infer(inputs).float()
        collection.update(logits, labels)
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        samples += len(labels)
    values = {name: value.item() for name, value in collection.compute().items()}
    return Metrics(samples=samples, loss=loss / samples, **values)


def evaluate_module(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, classes: int, device: str = "cpu"
) -> Metrics:
    """Evaluate a torch module in eval mode; the module's own mode is restored."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            return evaluate(lambda x: model(x.to(device)).cpu(), batches, classes=classes)
    finally:
        model.train(training)
