"""calibrate: one pass over the data, every calibrator's ranges from it, and the best of them on validation."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from maseRT.checkpoints import save_tensors
from maseRT.config import CalibrateSection, MethodRule, QuantizeSection
from maseRT.data import calibration_subset, loader
from maseRT.errors import UsageError
from maseRT.evaluate import Metrics
from maseRT.interrupts import finishing
from maseRT.layer_rules import matching_layers
from maseRT.plan import Plan
from maseRT.quant import keep_in_fp32, observed_overflow
from maseRT.quant.bias_correction import correct_biases, restore_biases
from maseRT.quant.calibrators import Method, amax_from_histograms
from maseRT.quant.histogram import Histogram, tensors_from_histograms
from maseRT.quant.observe import known_amax, load_amax, observe
from maseRT.quant.qat import is_weight
from maseRT.quant.quantizer import quantizers_off
from maseRT.quant.sqnr import layer_sqnr_db, sqnr_db
from maseRT.steps.common import Setting, rebuild, save_quantized, set_up, validate
from maseRT.steps.resume import load_progress, save_progress
from maseRT.steps.table import Context, StepResult
from maseRT.token_ids import looked_up
from maseRT.workspace import write_json

log = logging.getLogger(__name__)

CHECKPOINT = "checkpoint"
"""The name of the ranges that a checkpoint brought along; they are not calibrated again."""

_MOST_VALUES = 1 << 24
"""Of the inputs that correct the biases, which run as one batch: 111 images of 3x224x224."""


@dataclass(frozen=True)
class Candidate:
    """The ranges of one calibration method, and how the model does with them.

    Attributes:
        sqnr_db: of every layer's output, as expected from the histograms of its operands.
    """

    name: str
    amax: dict[str, Tensor]
    metrics: Metrics
    sqnr_db: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; the SQNR of a layer that loses nothing is null."""
        sqnr_db = {layer: value if math.isfinite(value) else None for layer, value in self.sqnr_db.items()}
        return {"validation": self.metrics.as_dict(), "sqnr_db": sqnr_db}

    @property
    def worst_layer(self) -> str:
        """The layer that loses most, by expected SQNR."""
        return min(self.sqnr_db, key=lambda name: self.sqnr_db[name])


@dataclass(frozen=True)
class Correction:
    """What the correction of biases came to.

    Attributes:
        layers: whose biases were corrected.
        metrics: on validation, with the corrected biases.
        kept: the model has them; otherwise it is as it was.
    """

    layers: int
    metrics: Metrics
    kept: bool

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"layers": self.layers, "kept": self.kept, "validation": self.metrics.as_dict()}


def run(context: Context) -> StepResult:
    """Observe, compare the methods on validation, and save the model with the best one's ranges.

    Ranges that the checkpoint was trained with stay, and so do the biases beside them.
    """
    section = context.config.calibrate
    if section is None:
        raise UsageError("the config has no [calibrate] section")
    workspace = context.workspace
    setting = set_up(context)
    model, plan = rebuild(context, setting.model, workspace.plan, workspace.quantized_checkpoint, master_weights=True)
    model.to(context.device)
    histograms, plan = _observe(context, setting, model, plan, section)
    if not plan.has_int8:
        return _nothing_to_do(context, model, plan)
    with quantizers_off(model):
        float_metrics = validate(context, setting, model)
    trained = known_amax(model)
    if trained:
        candidates = [_scored(context, setting, model, plan, histograms, CHECKPOINT, trained)]
    else:
        wanted = _methods(section, plan, histograms)
        candidates = [
            _candidate(context, setting, model, plan, histograms, name, methods)
            for name, methods in context.reporter.track(
                wanted.items(), description="calibrate", total=len(wanted), unit="method"
            )
        ]
    best = max(candidates, key=lambda candidate: candidate.metrics.rank)
    load_amax(model, best.amax)
    correct = section.bias_correction and not trained
    correction = _corrected(context, setting, model, plan, section, best) if correct else None
    return _save(context, model, plan, histograms, candidates, best, float_metrics, correction)


def _observe(
    context: Context, setting: Setting, model: nn.Module, plan: Plan, section: CalibrateSection
) -> tuple[dict[str, Histogram], Plan]:
    """Return every quantized tensor's histogram, and the plan without what would overflow in FP16."""
    data = context.config.data
    subset = calibration_subset(setting.splits, samples=section.batches * data.batch_size, seed=context.config.run.seed)
    batches = loader(subset, batch_size=data.batch_size)
    with torch.inference_mode(), observed_overflow(model, plan) as overflow, observe(model) as histograms:
        for inputs, _ in context.reporter.track(batches, description="observe", total=len(batches), unit="batch"):
            with looked_up(inputs):
                model(inputs.to(context.device))
    quantize = context.config.quantize or QuantizeSection()
    return histograms, keep_in_fp32(plan, overflow, overflow=quantize.overflow)


def _methods(
    section: CalibrateSection, plan: Plan, histograms: Mapping[str, Histogram]
) -> dict[str, dict[str, Method]]:
    """Return each candidate's name and its method for every tensor.

    A layer that a rule names has that rule's method in every candidate; weights have their own setting.
    """
    weights = Method.of(section.weights)
    fixed: dict[str, Method] = {}
    for index, rule in enumerate(entry for entry in section.methods if isinstance(entry, MethodRule)):
        for layer in matching_layers(plan, rule, where=f"calibrate.methods rule {index + 1}"):
            fixed.setdefault(layer.name, Method.of(rule.method))
    candidates: dict[str, dict[str, Method]] = {}
    for entry in section.methods:
        if isinstance(entry, MethodRule):
            continue
        method = Method.of(entry)
        candidates[method.name] = {
            tensor: fixed.get(plan.owner_of(tensor), weights if is_weight(tensor) else method) for tensor in histograms
        }
    return candidates


def _candidate(
    context: Context,
    setting: Setting,
    model: nn.Module,
    plan: Plan,
    histograms: Mapping[str, Histogram],
    name: str,
    methods: Mapping[str, Method],
) -> Candidate:
    """Return one method's ranges and their score; those that an interrupted calibration has left are taken."""
    path = context.workspace.amax(name)
    found = load_progress(path, key=context.key, work=f"calibration {name}", made_by="calibrate")
    if found is not None:
        amax, (metrics,) = found
        log.warning("%s was finished before", name)
        return Candidate(name, amax, Metrics(**metrics), _layers_sqnr_db(plan, histograms, amax))
    with finishing(f"calibration method {name}"), context.reporter.spinner(name):
        amax = amax_from_histograms(histograms, methods.__getitem__, ties=plan.ties)
        candidate = _scored(context, setting, model, plan, histograms, name, amax)
        save_progress(path, amax, key=context.key, history=[asdict(candidate.metrics)])
        return candidate


def _scored(
    context: Context,
    setting: Setting,
    model: nn.Module,
    plan: Plan,
    histograms: Mapping[str, Histogram],
    name: str,
    amax: dict[str, Tensor],
) -> Candidate:
    load_amax(model, amax)
    metrics = validate(context, setting, model)
    return Candidate(name, amax, metrics, _layers_sqnr_db(plan, histograms, amax))


def _corrected(
    context: Context, setting: Setting, model: nn.Module, plan: Plan, section: CalibrateSection, best: Candidate
) -> Correction | None:
    """Correct the biases, and keep that where validation is better for it; None: no layer has one to correct."""
    with context.reporter.spinner("bias correction"):
        before = correct_biases(model, plan, _calibration_inputs(context, setting, section).to(context.device))
    if not before:
        return None
    metrics = validate(context, setting, model)
    kept = metrics.rank > best.metrics.rank
    if not kept:
        restore_biases(model, before)
    return Correction(len(before), metrics, kept)


def _calibration_inputs(context: Context, setting: Setting, section: CalibrateSection) -> Tensor:
    """Return the inputs of the calibration subset [N, ...], as many as one batch may have."""
    data = context.config.data
    samples = min(section.batches * data.batch_size, max(1, _MOST_VALUES // math.prod(setting.splits.input_shape)))
    subset = calibration_subset(setting.splits, samples=samples, seed=context.config.run.seed)
    return torch.cat([inputs for inputs, _ in loader(subset, batch_size=data.batch_size)])


def _layers_sqnr_db(plan: Plan, histograms: Mapping[str, Histogram], amax: Mapping[str, Tensor]) -> dict[str, float]:
    operands: dict[str, list[float]] = {}
    for tensor, value in amax.items():
        operands.setdefault(plan.owner_of(tensor), []).append(sqnr_db(histograms[tensor], value))
    return {layer: layer_sqnr_db(values) for layer, values in operands.items()}


def _save(
    context: Context,
    model: nn.Module,
    plan: Plan,
    histograms: Mapping[str, Histogram],
    candidates: list[Candidate],
    best: Candidate,
    float_metrics: Metrics,
    correction: Correction | None,
) -> StepResult:
    workspace = context.workspace
    save_tensors(workspace.histograms, *tensors_from_histograms(histograms))
    for candidate in candidates:
        save_tensors(workspace.amax(candidate.name), candidate.amax)
    comparison = {
        "best": best.name,
        "float": float_metrics.as_dict(),
        "methods": {c.name: c.as_dict() for c in candidates},
    }
    if correction is not None:
        comparison["bias_correction"] = correction.as_dict()
    write_json(workspace.calibration, comparison)
    write_json(workspace.final_plan, plan.to_json())
    save_quantized(workspace.calibrated_checkpoint, model, workspace.final_plan)
    chosen = "the ranges come from the checkpoint" if best.name == CHECKPOINT else f"{best.name} is best"
    final = best.metrics
    if correction is not None and correction.kept:
        chosen, final = f"{chosen}, with corrected biases", correction.metrics
    return StepResult(
        headline=f"{chosen}: validation {final.describe()}, float {float_metrics.shown}",
        outputs=[
            workspace.histograms,
            *(workspace.amax(candidate.name) for candidate in candidates),
            workspace.calibration,
            workspace.final_plan,
            workspace.calibrated_checkpoint,
        ],
        summary={
            "best": best.name,
            "float": float_metrics.as_dict(),
            "validation": {candidate.name: candidate.metrics.as_dict() for candidate in candidates},
            "bias_correction": correction.as_dict() if correction is not None else None,
        },
        table=_table(candidates, best, correction),
    )


def _table(candidates: list[Candidate], best: Candidate, correction: Correction | None) -> list[tuple[str, ...]]:
    """Return the comparison for the console, with a star at what was chosen."""
    kept = correction is not None and correction.kept
    rows: list[tuple[str, ...]] = [("method", best.metrics.primary, "loss", "mean SQNR", "worst layer")]
    rows += [_row(candidate, chosen=candidate is best and not kept) for candidate in candidates]
    if correction is not None:
        name = f"{best.name}, biases corrected"
        metrics = correction.metrics
        rows.append((f"{name} *" if kept else name, metrics.shown, f"{metrics.loss:.4f}", "", ""))
    return rows


def _row(candidate: Candidate, *, chosen: bool) -> tuple[str, ...]:
    finite = [value for value in candidate.sqnr_db.values() if math.isfinite(value)]
    worst = candidate.worst_layer
    return (
        f"{candidate.name} *" if chosen else candidate.name,
        candidate.metrics.shown,
        f"{candidate.metrics.loss:.4f}",
        f"{sum(finite) / max(len(finite), 1):.1f} dB",
        f"{worst} {candidate.sqnr_db[worst]:.1f} dB",
    )


def _nothing_to_do(context: Context, model: nn.Module, plan: Plan) -> StepResult:
    """Pass a model without INT8 layers on."""
    workspace = context.workspace
    save_tensors(workspace.histograms, *tensors_from_histograms({}))
    write_json(workspace.final_plan, plan.to_json())
    save_quantized(workspace.calibrated_checkpoint, model, workspace.final_plan)
    return StepResult(
        headline="nothing to do: the plan has no INT8 layer",
        outputs=[workspace.histograms, workspace.final_plan, workspace.calibrated_checkpoint],
        summary={"nothing_to_do": True},
    )
