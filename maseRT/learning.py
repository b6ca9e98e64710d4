"""What training and fine-tuning share: the optimizer, the epoch, the reproducible state of randomness."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from maseRT.errors import MaseRTError, StepError
from maseRT.token_ids import looked_up


class NonFiniteLossError(StepError):
    """The loss became NaN or infinite."""


def set_up_torch(*, seed: int, threads: int) -> None:
    """Make torch reproducible on this machine: seeds, thread count, deterministic kernels where they exist."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False


def make_fabric(device: str) -> Fabric:
    """Return Lightning Fabric on one device ("cpu", "cuda" or "cuda:N")."""
    kind, _, index = device.partition(":")
    return Fabric(accelerator=kind, devices=[int(index)] if index else 1)


def make_optimizer(
    name: str,
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
    *,
    learning_rate: float,
    weight_decay: float,
) -> torch.optim.Optimizer:
    """Return the optimizer that a config names; SGD comes with momentum 0.9."""
    match name:
        case "sgd":
            return torch.optim.SGD(parameters, lr=learning_rate, weight_decay=weight_decay, momentum=0.9)
        case "adamw":
            return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay)
        case _:
            return torch.optim.Adam(parameters, lr=learning_rate, weight_decay=weight_decay)


def cosine_rate(step: int, steps: int, *, initial: float, final: float) -> float:
    """Return the learning rate at `step` of `steps`: cosine annealing from `initial` to `final` (SGDR, eq. 5)."""
    progress = step / max(steps - 1, 1)
    return final + (initial - final) * (1 + math.cos(math.pi * progress)) / 2


def train_epoch(
    fabric: Fabric,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    rate_at: Iterable[float],
    seed: int,
) -> float:
    """Train for one epoch and return the mean loss per sample.

    Args:
        loss_of: (outputs, targets) -> mean loss of the batch.
        rate_at: the learning rate of each batch.
        seed: seeds dropout, so that a resumed epoch equals an uninterrupted one.

    Raises:
        NonFiniteLossError: the loss is NaN or infinite; the weights of the last good batch are lost.
        StepError: the model or the loss cannot be trained like this.
    """
    torch.manual_seed(seed)
    model.train()
    total, samples = 0.0, 0
    for (inputs, targets), rate in zip(batches, rate_at, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rate
        inputs, targets = fabric.to_device((inputs, targets))
        optimizer.zero_grad(set_to_none=True)
        with _explained(len(inputs)), looked_up(inputs):
            loss = loss_of(_one_tensor(model(inputs)), targets)
            fabric.backward(loss)
        optimizer.step()
        total += loss.item() * len(targets)
        samples += len(targets)
        if not math.isfinite(total):
            raise NonFiniteLossError(
                f"the loss became {loss.item()} after {samples} samples", fix="lower the learning rate"
            )
    return total / samples


def _one_tensor(outputs: Any) -> Tensor:
    if isinstance(outputs, Tensor):
        return outputs
    raise StepError(
        f"the model returns a {type(outputs).__name__} in training mode, and one tensor in eval mode",
        where="training",
        fix="let it return the same in both, such as without auxiliary classifiers ([model] args)",
    )


@contextmanager
def _explained(batch: int) -> Iterator[None]:
    """Say what a training step that raises means for the user, whose model and loss it is.

    Raises:
        StepError: in place of any other error.
    """
    try:
        yield
    except MaseRTError:
        raise
    except torch.OutOfMemoryError as error:
        fix = "choose a smaller [data] batch_size"
        raise StepError(f"not enough memory for a batch of {batch}", where="training", fix=fix) from error
    except Exception as error:
        text, fix = str(error).strip().partition("\n")[0], ""
        if "more than 1 value per channel" in text:
            fix = "choose a [data] batch_size that leaves more than one sample for the last batch"
        elif "inplace operation" in text:
            fix = "write what gradients go through without in-place operations, such as x = x + y for x += y"
        raise StepError(
            f"the model cannot be trained on a batch of {batch}: {type(error).__name__}: {text}",
            where="training",
            fix=fix,
        ) from error
