"""quantize: the precision of every layer, and the fake-quantized model that follows from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import Tensor

from maseRT.config import QuantizeSection
from maseRT.errors import UsageError
from maseRT.models.weights import fit_names
from maseRT.onnx_export import check_traceable
from maseRT.plan import LayerPlan, Plan
from maseRT.precision import Precision
from maseRT.quant.observe import load_amax
from maseRT.quant.plan_from_ranges import plan_from_ranges
from maseRT.quant.planning import make_plan
from maseRT.quant.prepare import quantize_model
from maseRT.steps.common import Setting, load_float_weights, save_quantized, set_up, user_checkpoint
from maseRT.steps.finetune import schedule_from
from maseRT.steps.table import Context, StepResult
from maseRT.workspace import write_json

_SHOWN = 12


def run(context: Context, section: QuantizeSection) -> StepResult:
    """Plan, fold BatchNorms, swap the layers, and save the model, its ranges unknown unless the checkpoint has them."""
    setting = set_up(context)
    load_float_weights(context, setting.model)
    _check_ahead(context, setting)
    plan, ranges = _plan(context, setting, section)
    _check_ranges_come(context, plan, ranges)
    workspace = context.workspace
    write_json(workspace.plan, plan.to_json())
    model = quantize_model(setting.model, plan, master_weights=True)
    if ranges:
        load_amax(model, ranges)
    save_quantized(workspace.quantized_checkpoint, model, workspace.plan)
    shown = [layer for layer in plan.layers if layer.weighted or layer.precision is Precision.INT8]
    counts = Counter(str(layer.precision) for layer in shown)
    return StepResult(
        headline=", ".join(f"{count} layers {precision}" for precision, count in sorted(counts.items()))
        + f"; {len(plan.folds)} BatchNorms folded",
        outputs=[workspace.plan, workspace.quantized_checkpoint],
        summary={"layers": dict(sorted(counts.items())), "folded": len(plan.folds), "notes": list(plan.notes)},
        table=_exceptions(shown, section.precision),
        remarks=[*plan.notes, f"every layer: {workspace.plan}"],
    )


def _check_ahead(context: Context, setting: Setting) -> None:
    """Tell what later steps cannot do before calibration and fine-tuning take their time.

    Raises:
        UsageError: [finetune] lacks values.
        StepError: the model cannot be traced.
    """
    config = context.config
    if config.finetune is not None:
        schedule_from(config, user_checkpoint(context))
    if config.export is not None:
        check_traceable(setting.model, setting.example, dynamic=config.export.dynamic)


def _check_ranges_come(context: Context, plan: Plan, ranges: dict[str, Tensor]) -> None:
    """Tell of INT8 layers that are to be exported, and whose ranges nothing measures.

    Raises:
        UsageError: there are such.
    """
    config = context.config
    if plan.has_int8 and not ranges and config.export is not None and config.calibrate is None:
        raise UsageError(
            "the model gets INT8 layers, and no step measures their ranges",
            where=str(config.model.name),
            fix='add a [calibrate] section, or ask for another [quantize] precision, such as "fp16"',
        )


def _plan(context: Context, setting: Setting, section: QuantizeSection) -> tuple[Plan, dict[str, Tensor]]:
    """Return the plan and, for a checkpoint that was trained with quantizers, all its ranges."""

    def make(section: QuantizeSection) -> Plan:
        return make_plan(setting.model, setting.example, section, model_name=context.config.model.name)

    checkpoint = user_checkpoint(context)
    if checkpoint is None or not checkpoint.amax:
        return make(section), {}
    where = str(context.config.model.checkpoint)
    fitted, _ = fit_names(checkpoint, setting.model, where=where)
    return plan_from_ranges(setting.model, section, fitted.amax, make=make, where=where)


def _exceptions(layers: Sequence[LayerPlan], precision: Precision) -> list[tuple[str, ...]]:
    """Return the layers that did not get the precision that was asked for all, as a table."""
    rows = [(e.name, e.type, str(e.precision), e.reason) for e in layers if e.precision is not precision]
    if not rows:
        return []
    more = [("...", f"{len(rows) - _SHOWN} more", "", "")] if len(rows) > _SHOWN else []
    return [("layer", "type", "precision", "why"), *rows[:_SHOWN], *more]
