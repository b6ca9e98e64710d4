"""The epochs of training and fine-tuning: their batches, learning rates and progress."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lightning_fabric import Fabric
from torch import nn
from torch.optim import Optimizer

from maseRT.learning import cosine_rate, train_epoch
from maseRT.steps.common import Setting
from maseRT.steps.table import Context


@dataclass(frozen=True)
class Epochs:
    """What all epochs have in common.

    Attributes:
        model: set up by the fabric, like the optimizer.
        count: how many there are.
        initial_rate: the learning rate of the first batch, annealed over all epochs.
        final_rate: that of the last batch.
    """

    context: Context
    setting: Setting
    fabric: Fabric
    model: nn.Module
    optimizer: Optimizer
    count: int
    initial_rate: float
    final_rate: float

    def after(self, done: int, *, description: str) -> Iterator[int]:
        """Yield the numbers of the epochs that follow the first `done` ones, and show how many are over."""
        numbers = range(done + 1, self.count + 1)
        return self.context.reporter.track(numbers, description=description, total=self.count, unit="epoch", done=done)

    def train(self, number: int, *, seed: int) -> float:
        """Train for one epoch and return the mean loss per sample.

        Args:
            number: from 1 to `count`.
            seed: of this epoch, added to the run's: for the order of the samples and for dropout.

        Raises:
            NonFiniteLossError: the loss is NaN or infinite.
        """
        context = self.context
        batches = self.setting.batches(context, "train", shuffle=True, epoch=seed)
        first, steps = (number - 1) * len(batches), self.count * len(batches)
        return train_epoch(
            self.fabric,
            self.model,
            self.optimizer,
            context.reporter.track(batches, description=f"epoch {number}", total=len(batches), unit="batch"),
            loss_of=self.setting.task.loss,
            rate_at=(
                cosine_rate(first + step, steps, initial=self.initial_rate, final=self.final_rate)
                for step in range(len(batches))
            ),
            seed=context.config.run.seed + seed,
        )
