"""What quantizing each layer alone costs, and the rules that would keep the worst ones in half precision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from maseRT.checkpoints import load_tensors
from maseRT.config import AnalyzeSection
from maseRT.evaluate import Metrics, evaluate_module
from maseRT.layer_rules import rule_line
from maseRT.plan import Plan
from maseRT.precision import Precision
from maseRT.quant.histogram import Histogram, histograms_from_tensors
from maseRT.quant.observe import known_amax
from maseRT.quant.quantizer import quantizers_off
from maseRT.quant.sensitivity import expected_sqnr_db, only_quantized, tensors_by_layer
from maseRT.report.markdown import markdown_table
from maseRT.report.schema import Section
from maseRT.steps.common import Setting, rebuild
from maseRT.steps.table import Context, final_checkpoint, final_plan
from maseRT.workspace import write_json

_SHOWN = 12


@dataclass(frozen=True)
class Cost:
    """What quantizing one layer alone costs.

    Attributes:
        layer: its name; an operation's where its operands belong to no layer.
        loss: validation loss minus the float model's.
        metric: name of the task's primary metric.
        change: validation's primary metric minus the float model's.
        change_shown: the same as text.
        sqnr_db: ratio expected at its output from calibration's histograms, infinite where nothing is lost; None where
            there are no histograms.
    """

    layer: str
    loss: float
    metric: str
    change: float
    change_shown: str
    sqnr_db: float | None

    @property
    def rank(self) -> tuple[float, float]:
        """Lower is worse: the loss decides, then the SQNR."""
        return -self.loss, math.inf if self.sqnr_db is None else self.sqnr_db

    def cells(self) -> tuple[str, ...]:
        """Return the layer, its loss, primary metric and SQNR as text."""
        sqnr = "" if self.sqnr_db is None else f"{self.sqnr_db:.1f} dB"
        return self.layer, f"{self.loss:+.6f}", self.change_shown, sqnr

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; an infinite SQNR is null."""
        finite = self.sqnr_db is not None and math.isfinite(self.sqnr_db)
        return {
            "layer": self.layer,
            "loss_change": self.loss,
            f"{self.metric}_change": self.change,
            "sqnr_db": self.sqnr_db if finite else None,
        }


@dataclass(frozen=True)
class Sensitivity:
    """The ranking of a model's layers.

    Attributes:
        baseline: the model with nothing quantized.
        costs: of every quantized layer, the worst first.
        rules: [quantize] rules, in TOML, that would keep the worst ones in half precision.
    """

    baseline: Metrics
    costs: tuple[Cost, ...]
    rules: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        costs = [cost.as_dict() for cost in self.costs]
        return {"float": self.baseline.as_dict(), "layers": costs, "rules": list(self.rules)}

    @property
    def header(self) -> tuple[str, ...]:
        """The ranking's columns."""
        return "layer", "loss", self.baseline.primary, "SQNR"

    @property
    def method(self) -> str:
        """How it was measured."""
        return (
            f"One layer quantized at a time: change of loss and {self.baseline.primary} on {self.baseline.samples} "
            f"validation samples (float: {self.baseline.loss:.6f}, {self.baseline.shown}), SQNR expected at the "
            "layer's output"
        )

    @property
    def advice(self) -> str:
        """What the rules are for."""
        if not self.rules:
            return "No layer alone raises the loss"
        worst = "worst layer" if len(self.rules) == 1 else f"{len(self.rules)} worst layers"
        return f"To keep the {worst} in half precision, put this first into [quantize] rules:"

    def section(self) -> Section:
        """Return it as a section of the report."""
        ranking = markdown_table([self.header, *(cost.cells() for cost in self.costs)])
        code = ["", "```toml", *self.rules, "```"] if self.rules else []
        lines = [f"{self.method}.", "", *ranking, "", self.advice, *code]
        return Section(key="sensitivity", title="Sensitivity", values=self.as_dict(), lines=lines)

    def remarks(self) -> list[str]:
        """Return it as lines for the console."""
        rows = [cost.cells() for cost in self.costs[:_SHOWN]]
        widths = [max(len(row[column]) for row in rows) for column in range(len(self.header))]
        lines = ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        more = [f"  ... {len(self.costs) - _SHOWN} more"] if len(self.costs) > _SHOWN else []
        return [f"{self.method}:", *lines, *more, self.advice, *(f"  {rule}" for rule in self.rules)]


def sensitivity(context: Context, setting: Setting, section: AnalyzeSection) -> Sensitivity | None:
    """Rank the layers of the run's final model, and save the ranking; None when it has no INT8 layer.

    Each layer takes a pass over the same validation batches, in FP32 but for its own quantizers.
    """
    config, workspace = context.config, context.workspace
    plan_path, checkpoint = final_plan(config, workspace), final_checkpoint(config, workspace)
    model, plan = rebuild(context, setting.new_model(context), plan_path, checkpoint, master_weights=True)
    if not plan.has_int8:
        return None
    model.to(context.device)
    samples = list(islice(setting.batches(context, "validation"), section.sensitivity_batches))

    def evaluated() -> Metrics:
        return evaluate_module(model, samples, task=setting.task, outputs=setting.outputs, device=context.device)

    with quantizers_off(model):
        baseline = evaluated()
    amax = known_amax(model)
    histograms = _histograms(context)
    groups = tensors_by_layer(plan, amax)
    costs = []
    for layer, names in context.reporter.track(
        groups.items(), description="sensitivity", total=len(groups), unit="layer"
    ):
        with only_quantized(model, names):
            metrics = evaluated()
        sqnr = expected_sqnr_db(names, histograms, amax)
        costs.append(_cost(layer, metrics, baseline, sqnr))
    costs.sort(key=lambda cost: cost.rank)
    found = Sensitivity(baseline, tuple(costs), tuple(_rules(plan, costs)[: section.sensitivity_layers]))
    write_json(workspace.sensitivity, found.as_dict())
    return found


def _cost(layer: str, metrics: Metrics, baseline: Metrics, sqnr_db: float | None) -> Cost:
    return Cost(
        layer,
        metrics.loss - baseline.loss,
        metrics.primary,
        metrics.primary_value - baseline.primary_value,
        metrics.change_shown(baseline),
        sqnr_db,
    )


def _histograms(context: Context) -> dict[str, Histogram]:
    """Return what calibration observed; nothing when the ranges came with the checkpoint and none was run."""
    if context.config.calibrate is None:
        return {}
    return histograms_from_tensors(*load_tensors(context.workspace.histograms, made_by="calibrate"))


def _rules(plan: Plan, costs: Sequence[Cost]) -> list[str]:
    """Return a rule for each layer that raises the loss."""
    half = plan.float if plan.float is Precision.BF16 else Precision.FP16
    layers = {layer.name for layer in plan.layers}
    return [rule_line(half, name=cost.layer) for cost in costs if cost.loss > 0 and cost.layer in layers]
