"""What several steps need: the data, the float model, the fake-quantized model."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from torch.utils.data import DataLoader

from maseRT.checkpoints import load_tensors, save_tensors
from maseRT.config import Config
from maseRT.data.checks import check_data, extreme_ids
from maseRT.data.loading import load_data, loader
from maseRT.data.splits import Splits
from maseRT.errors import StepError
from maseRT.evaluate import Metrics, evaluate_module
from maseRT.factories import load_module
from maseRT.learning import set_up_torch
from maseRT.models.build import build_model
from maseRT.models.check import check_model
from maseRT.models.checkpoint import Checkpoint, load_checkpoint
from maseRT.models.weights import load_weights
from maseRT.plan import Plan
from maseRT.quant.prepare import quantize_model
from maseRT.records import sha256
from maseRT.steps.table import Context, final_checkpoint, final_plan, producers, trains
from maseRT.tasks import Task, check_task, load_task, outputs_in
from maseRT.workspace import read_json

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setting:
    """The task of a run, its data set, and an untrained model that fits both.

    Attributes:
        example: a small batch of inputs.
        outputs: size of the last dimension of the model's outputs; classes, for a classifier.
    """

    splits: Splits
    model: nn.Module
    example: Tensor
    outputs: int
    task: Task

    def new_model(self, context: Context) -> nn.Module:
        """Return another model of the same initial weights; the data is not read again."""
        return new_model(context, num_classes=self.splits.num_classes, input_shape=self.splits.input_shape)

    def batches(
        self, context: Context, part: str, *, shuffle: bool = False, epoch: int = 0
    ) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return a loader of "train", "validation" or "test"; shuffled by the run's seed and the epoch."""
        data = context.config.data
        return loader(
            getattr(self.splits, part),
            batch_size=data.batch_size,
            shuffle=shuffle,
            seed=context.config.run.seed + epoch,
            workers=data.workers,
        )


def set_up(context: Context) -> Setting:
    """Seed torch, import the plug-ins, load the task and the data, build the model, and check that they fit.

    Raises:
        UsageError: a plug-in, the task, the data or the model cannot be used; says why.
    """
    config = context.config
    set_up_torch(seed=config.run.seed, threads=context.threads)
    load_plugins(config)
    task = load_task(config.model.task)
    splits = load_data(config.data, seed=config.run.seed)
    model = new_model(context, num_classes=splits.num_classes, input_shape=splits.input_shape)
    inputs, targets = next(iter(loader(splits.train, batch_size=2)))
    outputs = check_model(model, inputs, classes=task.classes)
    ids = extreme_ids(splits)
    if ids is not None:
        check_model(model, ids, classes=task.classes)
    check_data(splits, outputs=outputs_in(outputs), classes=task.classes)
    check_task(task, outputs, targets)
    return Setting(splits, model, inputs, outputs_in(outputs), task)


def load_plugins(config: Config) -> None:
    """Import the modules that register a user's own quantized layers."""
    for plugin in config.quantize.plugins if config.quantize else ():
        load_module(plugin, where=f"[quantize] plugins, '{plugin}'")


def new_model(context: Context, *, num_classes: int | None, input_shape: tuple[int, ...]) -> nn.Module:
    """Return a model with the run's initial weights, on the run's number of threads."""
    set_up_torch(seed=context.config.run.seed, threads=context.threads)
    return build_model(context.config.model, num_classes=num_classes, input_shape=input_shape)


def user_checkpoint(context: Context) -> Checkpoint | None:
    """Return the checkpoint that the config names, if it names one."""
    model = context.config.model
    if model.checkpoint is None:
        return None
    return load_checkpoint(model.checkpoint, kind=model.kind, allow_globals=model.allow_globals)


def load_float_weights(context: Context, model: nn.Module) -> None:
    """Fill a float model with the baseline: trained here, a user's checkpoint, or random where that is allowed."""
    checkpoint = user_checkpoint(context)
    if checkpoint is not None:
        left_out = load_weights(model, checkpoint, where=str(context.config.model.checkpoint))
        if left_out:
            log.info("left out of the checkpoint: %s", ", ".join(left_out))
    elif trains(context.config):
        state, _ = load_tensors(context.workspace.float_checkpoint, made_by="train")
        model.load_state_dict(state)


def load_plan(path: Path, *, made_by: str) -> Plan:
    """Read a plan that a step wrote."""
    return Plan.from_json(read_json(path, made_by=made_by))


def save_quantized(path: Path, model: nn.Module, plan: Path) -> None:
    """Save a fake-quantized model's state with the hash of the plan that gives it its shape."""
    save_tensors(path, model.state_dict(), {"plan": sha256(plan)})


def load_quantized(path: Path, model: nn.Module, plan: Path, *, made_by: str) -> None:
    """Load a fake-quantized model's state.

    Raises:
        StepError: the file is damaged, or was made with another plan.
    """
    state, metadata = load_tensors(path, made_by=made_by)
    if metadata.get("plan") != sha256(plan):
        raise StepError(
            "was made with another plan",
            where=str(path),
            fix=f"run `masert {made_by}` again, so that it follows {plan.name}",
        )
    model.load_state_dict(state)


def rebuild(
    context: Context, model: nn.Module, plan_path: Path, checkpoint: Path, *, master_weights: bool
) -> tuple[nn.Module, Plan]:
    """Return the fake-quantized model of a plan and a checkpoint, in eval mode.

    Args:
        context: of the step.
        model: becomes it; its weights may be any.
        plan_path: the plan.
        checkpoint: made with this plan.
        master_weights: everything that is not INT8 in FP32, for calibration and training.
    """
    made_by = producers(context.workspace)
    plan = load_plan(plan_path, made_by=made_by[plan_path])
    model = quantize_model(model, plan, master_weights=master_weights)
    load_quantized(checkpoint, model, plan_path, made_by=made_by[checkpoint])
    return model.eval(), plan


def rebuild_final(context: Context, model: nn.Module) -> tuple[nn.Module, Plan]:
    """Return the model that is exported, in its own precisions and eval mode. The given model becomes it."""
    config, workspace = context.config, context.workspace
    plan, checkpoint = final_plan(config, workspace), final_checkpoint(config, workspace)
    return rebuild(context, model, plan, checkpoint, master_weights=False)


def validate(context: Context, setting: Setting, model: nn.Module) -> Metrics:
    """Evaluate a model on the validation set."""
    batches = setting.batches(context, "validation")
    tracked = context.reporter.track(batches, description="validate", total=len(batches), unit="batch")
    return evaluate_module(model, tracked, task=setting.task, outputs=setting.outputs, device=context.device)
