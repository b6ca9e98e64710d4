"""Jet substructure classification: the smallest network of LogicNets (Umuroglu et al., 2020), as MASE has it."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from maseRT.errors import UsageError


class JscToy(nn.Module):
    """BatchNorm and ReLU on the features, then Linear 16-8-8-5, each with BatchNorm and ReLU.

    The last ReLU is part of the published network: logits are never negative. State names are MASE's.
    """

    def __init__(self, features: int, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.BatchNorm1d(features), nn.ReLU()]
        for inputs, outputs in pairwise((features, 8, 8, num_classes)):
            layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]
        self.seq_blocks = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, num_classes] of features [N, F]."""
        logits: Tensor = self.seq_blocks(x)
        return logits


def jsc_toy(*, num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """Build JscToy for vectors of any length.

    Raises:
        UsageError: the inputs are no vectors.
    """
    if len(input_shape) != 1:
        raise UsageError(
            f"jsc-toy takes feature vectors; one input of this data set is {'x'.join(map(str, input_shape))}",
            where="[model] name",
            fix="choose a model for this data, or data for this model",
        )
    return JscToy(input_shape[0], num_classes)
