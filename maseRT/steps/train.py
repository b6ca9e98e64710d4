"""train: the float baseline, where there is no checkpoint."""

from __future__ import annotations

from maseRT.checkpoints import save_tensors
from maseRT.errors import UsageError
from maseRT.learning import cosine_rate, make_fabric, make_optimizer, train_epoch
from maseRT.steps.common import set_up, validate
from maseRT.steps.table import Context, StepResult
from maseRT.workspace import write_json


def run(context: Context) -> StepResult:
    """Train from scratch and save the weights of the last epoch."""
    section = context.config.train
    if section is None:
        raise UsageError("the config has no [train] section")
    setting = set_up(context)
    fabric = make_fabric(context.device)
    optimizer = make_optimizer(
        section.optimizer,
        setting.model.parameters(),
        learning_rate=section.learning_rate,
        weight_decay=section.weight_decay,
    )
    model, optimizer = fabric.setup(setting.model, optimizer)
    per_epoch = len(setting.batches(context, "train"))
    steps = section.epochs * per_epoch
    final = 0.0 if section.schedule == "cosine" else section.learning_rate
    history = []
    for epoch in range(section.epochs):
        batches = setting.batches(context, "train", shuffle=True, epoch=epoch)
        first = epoch * per_epoch
        loss = train_epoch(
            fabric,
            model,
            optimizer,
            context.reporter.track(batches, description=f"train epoch {epoch + 1}/{section.epochs}", total=per_epoch),
            rate_at=(
                cosine_rate(first + i, steps, initial=section.learning_rate, final=final) for i in range(per_epoch)
            ),
            seed=context.config.run.seed + epoch,
        )
        metrics = validate(context, setting, setting.model)
        history.append({"epoch": epoch + 1, "loss": loss, "validation": metrics.as_dict()})
    workspace = context.workspace
    save_tensors(workspace.float_checkpoint, setting.model.state_dict())
    write_json(workspace.training, {"epochs": history})
    return StepResult(
        headline=f"validation accuracy {metrics.accuracy:.2%} after {section.epochs} epochs",
        outputs=[workspace.float_checkpoint, workspace.training],
        summary={"epochs": section.epochs, "validation": metrics.as_dict()},
    )
