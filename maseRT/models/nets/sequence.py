"""Classifiers of sequences: an LSTM and a Conv1d network."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from maseRT.models.nets.shapes import sequence_shape


class Steps(nn.Module):
    """Inputs to sequences [N, steps, features]; the rows of images [N, C, H, W] are steps of C * W features."""

    def __init__(self, *, images: bool, channels_first: bool) -> None:
        super().__init__()
        self.images = images
        self.channels_first = channels_first

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, steps, features]."""
        if self.images:
            return x.transpose(1, 2).flatten(2)
        return x.transpose(1, 2) if self.channels_first else x


class LSTMClassifier(nn.Module):
    """An LSTM over the steps and a Linear on its last hidden states."""

    def __init__(
        self,
        steps: Steps,
        features: int,
        num_classes: int,
        *,
        width: int,
        depth: int,
        bidirectional: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.steps = steps
        self.bidirectional = bidirectional
        between = dropout if depth > 1 else 0.0
        self.lstm = nn.LSTM(features, width, depth, bidirectional=bidirectional, batch_first=True, dropout=between)
        self.fc = nn.Linear(width * (2 if bidirectional else 1), num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, num_classes]."""
        _, (hidden, _) = self.lstm(self.steps(x))
        last = torch.cat([hidden[-2], hidden[-1]], dim=1) if self.bidirectional else hidden[-1]
        logits: Tensor = self.fc(last)
        return logits


class Conv1dClassifier(nn.Module):
    """Convolutions over the steps, each with BatchNorm and ReLU, the mean over the steps and a Linear."""

    def __init__(self, steps: Steps, features: int, num_classes: int, *, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.steps = steps
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise((features, *widths)):
            layers += [nn.Conv1d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm1d(outputs), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool1d(1)
        self.fc = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, num_classes]."""
        features = self.features(self.steps(x).transpose(1, 2))
        logits: Tensor = self.fc(self.avgpool(features).flatten(1))
        return logits


def lstm_classifier(
    *,
    num_classes: int,
    input_shape: tuple[int, ...],
    width: int = 64,
    depth: int = 1,
    bidirectional: bool = True,
    channels_first: bool = False,
    dropout: float = 0.0,
) -> nn.Module:
    """Build an LSTM classifier.

    Args:
        num_classes: outputs.
        input_shape: [steps, features], or an image [C, H, W] that is read row by row.
        width: hidden size per direction.
        depth: stacked LSTM layers.
        bidirectional: read the steps backwards too.
        channels_first: sequences are [features, steps].
        dropout: between stacked layers, while training.
    """
    _, features = sequence_shape(input_shape, model="lstm-classifier", channels_first=channels_first)
    steps = Steps(images=len(input_shape) == 3, channels_first=channels_first)
    return LSTMClassifier(
        steps, features, num_classes, width=width, depth=depth, bidirectional=bidirectional, dropout=dropout
    )


def conv1d_classifier(
    *,
    num_classes: int,
    input_shape: tuple[int, ...],
    widths: tuple[int, ...] = (32, 64, 64),
    channels_first: bool = False,
) -> nn.Module:
    """Build a Conv1d classifier; works on any number of steps.

    Args:
        num_classes: outputs.
        input_shape: [steps, features], or an image [C, H, W] that is read row by row.
        widths: output channels of the convolutions.
        channels_first: sequences are [features, steps].
    """
    _, features = sequence_shape(input_shape, model="conv1d-classifier", channels_first=channels_first)
    steps = Steps(images=len(input_shape) == 3, channels_first=channels_first)
    return Conv1dClassifier(steps, features, num_classes, widths=tuple(widths))
