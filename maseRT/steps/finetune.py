"""finetune: quantization-aware training, from the calibrated model, with everything needed to go on after a kill."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn

from maseRT.checkpoints import flatten_optimizer, load_tensors, restore_optimizer
from maseRT.config import Config, FinetuneSection
from maseRT.errors import StepError, UsageError
from maseRT.evaluate import Metrics
from maseRT.interrupts import finishing
from maseRT.learning import NonFiniteLossError, make_fabric, make_optimizer
from maseRT.models.checkpoint import Checkpoint
from maseRT.quant.qat import train_ranges
from maseRT.quant.quantizer import quantizers
from maseRT.steps.common import Setting, rebuild, save_quantized, set_up, user_checkpoint, validate
from maseRT.steps.epochs import Epochs
from maseRT.steps.resume import load_progress, save_progress
from maseRT.steps.table import Context, StepResult
from maseRT.workspace import atomic_path, write_json

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to fine-tune; `why` says where the values come from."""

    epochs: int
    initial_learning_rate: float
    final_learning_rate: float
    optimizer: str
    weight_decay: float
    why: str


@dataclass(frozen=True)
class Epoch:
    """A model on the way: epoch 0 is the calibrated one."""

    epoch: int
    loss: float | None
    validation: Metrics

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"epoch": self.epoch, "loss": self.loss, "validation": self.validation.as_dict()}


def schedule_from(config: Config, checkpoint: Checkpoint | None) -> Schedule:
    """Return the schedule: the config's own values, else fractions of the original training's.

    Defaults: 10 % of the original epochs, at least 1; 1 % of the original learning rate, annealed to 1 % of that.

    Raises:
        UsageError: nothing says how the model was trained, and [finetune] does not give its own values.
    """
    section = config.finetune or FinetuneSection()
    train = config.train
    epochs = train.epochs if train else checkpoint.epochs if checkpoint else None
    rate = train.learning_rate if train else checkpoint.learning_rate if checkpoint else None
    wanting = [
        name
        for name, given in (
            ("epochs", section.epochs or epochs),
            ("initial_learning_rate", section.initial_learning_rate or rate),
        )
        if given is None
    ]
    if wanting:
        raise UsageError(
            f"{' and '.join(wanting)} cannot be told: there is no [train], and the checkpoint does not say",
            where="[finetune]",
            fix=f"give {' and '.join(wanting)} in [finetune]",
        )
    initial = section.initial_learning_rate or (rate or 0.0) * 0.01
    source = "[train]" if train else "the checkpoint"
    return Schedule(
        epochs=section.epochs or max(1, round((epochs or 0) * 0.1)),
        initial_learning_rate=initial,
        final_learning_rate=section.final_learning_rate or initial * 0.01,
        optimizer=section.optimizer or (train.optimizer if train else "adam"),
        weight_decay=section.weight_decay
        if section.weight_decay is not None
        else (train.weight_decay if train else 0.0),
        why="[finetune]"
        if section.epochs and section.initial_learning_rate
        else f"10 % of the epochs, 1 % of the rate of {source}",
    )


def run(context: Context, section: FinetuneSection) -> StepResult:
    """Fine-tune, keep a checkpoint per epoch, and choose the best of them and the calibrated model."""
    workspace = context.workspace
    setting = set_up(context)
    model, plan = rebuild(
        context, setting.model, workspace.final_plan, workspace.calibrated_checkpoint, master_weights=True
    )
    if not plan.has_int8:
        return _nothing_to_do(context)
    schedule = schedule_from(context.config, user_checkpoint(context))
    fabric = make_fabric(context.device)
    model = model.to(context.device)
    calibrated = Epoch(0, None, validate(context, setting, model))
    train_ranges(model, learned=section.learned_amax, ties=plan.ties)
    compile_seconds = _compile(context, setting, model) if section.compile else 0.0
    history, stopped = _train(context, setting, fabric, model, schedule, calibrated)
    return _choose(context, history, schedule, stopped, compile_seconds)


def _compile(context: Context, setting: Setting, model: nn.Module) -> float:
    """Compile the training step, in place; returns the seconds that takes. One batch runs, and changes no weight."""
    start = time.perf_counter()
    with context.reporter.spinner("finetune: torch.compile"):
        model.train()
        model.compile()
        inputs, targets = next(iter(setting.batches(context, "train")))
        loss = setting.task.loss(model(inputs.to(context.device)), targets.to(context.device))
        loss.backward()  # type: ignore[no-untyped-call]
        model.zero_grad(set_to_none=True)
    return time.perf_counter() - start


def _train(
    context: Context, setting: Setting, fabric: Fabric, model: nn.Module, schedule: Schedule, calibrated: Epoch
) -> tuple[list[Epoch], str]:
    """Return the history, epoch 0 first, and why training stopped early, if it did."""
    workspace = context.workspace
    optimizer = make_optimizer(
        schedule.optimizer,
        _parameter_groups(model),
        learning_rate=schedule.initial_learning_rate,
        weight_decay=schedule.weight_decay,
    )
    history = _resume(context, model, optimizer)
    if history is None:
        _discard(context)
        history = [calibrated]
    forward, optimizer = fabric.setup(model, optimizer)
    rates = schedule.initial_learning_rate, schedule.final_learning_rate
    epochs = Epochs(context, setting, fabric, forward, optimizer, schedule.epochs, *rates)
    for epoch in epochs.after(len(history) - 1, description="finetune"):
        with finishing(f"fine-tuning epoch {epoch} of {schedule.epochs}"):
            try:
                loss = epochs.train(epoch, seed=epoch)
            except NonFiniteLossError as error:
                log.warning("fine-tuning stops in epoch %d: %s", epoch, error.what)
                return history, f"epoch {epoch}: {error.what}"
            history.append(Epoch(epoch, loss, validate(context, setting, model)))
            save_quantized(workspace.epoch_checkpoint(epoch), model, workspace.final_plan)
            _save_resume(context, optimizer, history)
    return history, ""


def _parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return the weights, and the learned ranges apart: decay would shrink them whatever the loss says."""
    ranges = {id(quantizer.amax) for quantizer in quantizers(model).values()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    learned = [parameter for parameter in trained if id(parameter) in ranges]
    groups: list[dict[str, Any]] = [{"params": [p for p in trained if id(p) not in ranges]}]
    return [*groups, {"params": learned, "weight_decay": 0.0}] if learned else groups


def _save_resume(context: Context, optimizer: torch.optim.Optimizer, history: list[Epoch]) -> None:
    entries = [asdict(epoch) for epoch in history]
    save_progress(context.workspace.resume_state, flatten_optimizer(optimizer), key=context.key, history=entries)


def _resume(context: Context, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Epoch] | None:
    """Load the last finished epoch of an interrupted run of the very same work; None when there is none."""
    workspace = context.workspace
    found = load_progress(workspace.resume_state, key=context.key, work="fine-tuning", made_by="finetune")
    if found is None:
        return None
    state, history = found[0], [_epoch_from(entry) for entry in found[1]]
    try:
        weights, _ = load_tensors(workspace.epoch_checkpoint(history[-1].epoch), made_by="finetune")
    except StepError as error:
        log.warning("cannot resume: %s; starting over", error)
        return None
    model.load_state_dict(weights)
    restore_optimizer(optimizer, state)
    log.warning("resuming after epoch %d", history[-1].epoch)
    return history


def _epoch_from(entry: Mapping[str, Any]) -> Epoch:
    return Epoch(entry["epoch"], entry["loss"], Metrics(**entry["validation"]))


def _discard(context: Context) -> None:
    """Delete the epochs of earlier work."""
    context.workspace.resume_state.unlink(missing_ok=True)
    for path in context.workspace.finetuning.glob("epoch_*.safetensors"):
        path.unlink()


def _choose(
    context: Context, history: list[Epoch], schedule: Schedule, stopped: str, compile_seconds: float
) -> StepResult:
    workspace = context.workspace
    best = max(history, key=lambda epoch: (*epoch.validation.rank, -epoch.epoch))
    source = workspace.epoch_checkpoint(best.epoch) if best.epoch else workspace.calibrated_checkpoint
    with atomic_path(workspace.best_checkpoint) as temporary:
        shutil.copyfile(source, temporary)
    write_json(
        workspace.finetuning_history,
        {
            "schedule": asdict(schedule),
            "best_epoch": best.epoch,
            "stopped": stopped,
            "compile_seconds": compile_seconds,
            "epochs": [epoch.as_dict() for epoch in history],
        },
    )
    workspace.resume_state.unlink(missing_ok=True)
    before = history[0].validation
    kept = f"epoch {best.epoch} is best" if best.epoch else "no epoch was better: the calibrated model is kept"
    return StepResult(
        headline=f"{kept}: validation {before.describe()} -> {best.validation.shown}"
        + (f"; stopped, {stopped}" if stopped else ""),
        outputs=[
            *(workspace.epoch_checkpoint(epoch.epoch) for epoch in history[1:]),
            workspace.best_checkpoint,
            workspace.finetuning_history,
        ],
        summary={
            "best_epoch": best.epoch,
            "stopped": stopped,
            "schedule": asdict(schedule),
            "calibrated": history[0].validation.as_dict(),
            "best": best.validation.as_dict(),
        },
    )


def _nothing_to_do(context: Context) -> StepResult:
    """Pass a model without INT8 layers on."""
    workspace = context.workspace
    with atomic_path(workspace.best_checkpoint) as temporary:
        shutil.copyfile(workspace.calibrated_checkpoint, temporary)
    return StepResult(
        headline="nothing to do: the plan has no INT8 layer",
        outputs=[workspace.best_checkpoint],
        summary={"nothing_to_do": True},
    )
