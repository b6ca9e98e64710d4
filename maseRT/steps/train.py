"""train: the float baseline, where there is no checkpoint."""

from __future__ import annotations

import logging

import torch
from torch import nn

from maseRT.checkpoints import flatten_optimizer, restore_optimizer, save_tensors
from maseRT.config import TrainSection
from maseRT.interrupts import finishing
from maseRT.learning import make_fabric, make_optimizer
from maseRT.onnx_export import check_traceable
from maseRT.steps.common import set_up, validate
from maseRT.steps.epochs import Epochs
from maseRT.steps.resume import Entries, load_progress, save_progress
from maseRT.steps.table import Context, StepResult
from maseRT.workspace import write_json

log = logging.getLogger(__name__)

_WEIGHTS, _OPTIMIZER = "model.", "optimizer."


def run(context: Context, section: TrainSection) -> StepResult:
    """Train from scratch and save the weights of the last epoch.

    Raises:
        StepError: the model is to be exported, and cannot be traced: told before the first epoch.
    """
    setting = set_up(context)
    if context.config.export is not None and not context.workspace.training_state.exists():
        check_traceable(setting.model, setting.example, dynamic=context.config.export.dynamic)
    setting.model.to(context.device)
    fabric = make_fabric(context.device)
    optimizer = make_optimizer(
        section.optimizer,
        setting.model.parameters(),
        learning_rate=section.learning_rate,
        weight_decay=section.weight_decay,
    )
    history = _resume(context, setting.model, optimizer)
    if history:
        metrics = validate(context, setting, setting.model)
    model, optimizer = fabric.setup(setting.model, optimizer)
    final = 0.0 if section.schedule == "cosine" else section.learning_rate
    epochs = Epochs(context, setting, fabric, model, optimizer, section.epochs, section.learning_rate, final)
    for epoch in epochs.after(len(history), description="train"):
        with finishing(f"training epoch {epoch} of {section.epochs}"):
            loss = epochs.train(epoch, seed=epoch - 1)
            metrics = validate(context, setting, setting.model)
            history.append({"epoch": epoch, "loss": loss, "validation": metrics.as_dict()})
            _save_progress(context, setting.model, optimizer, history)
    workspace = context.workspace
    save_tensors(workspace.float_checkpoint, setting.model.state_dict())
    write_json(workspace.training, {"epochs": history})
    workspace.training_state.unlink(missing_ok=True)
    return StepResult(
        headline=f"validation {metrics.describe()} after {section.epochs} epochs",
        outputs=[workspace.float_checkpoint, workspace.training],
        summary={"epochs": section.epochs, "validation": metrics.as_dict()},
    )


def _save_progress(context: Context, model: nn.Module, optimizer: torch.optim.Optimizer, history: Entries) -> None:
    tensors = {_WEIGHTS + name: value for name, value in model.state_dict().items()}
    tensors |= {_OPTIMIZER + name: value for name, value in flatten_optimizer(optimizer).items()}
    save_progress(context.workspace.training_state, tensors, key=context.key, history=history)


def _resume(context: Context, model: nn.Module, optimizer: torch.optim.Optimizer) -> Entries:
    """Load the last finished epoch of an interrupted training of the very same model; returns the history so far."""
    found = load_progress(context.workspace.training_state, key=context.key, work="training", made_by="train")
    if found is None:
        return []
    tensors, history = found
    model.load_state_dict({k.removeprefix(_WEIGHTS): v for k, v in tensors.items() if k.startswith(_WEIGHTS)})
    restore_optimizer(
        optimizer, {k.removeprefix(_OPTIMIZER): v for k, v in tensors.items() if k.startswith(_OPTIMIZER)}
    )
    log.warning("resuming after epoch %d", len(history))
    return history
