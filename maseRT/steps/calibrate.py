"""calibrate: one pass over the data, every calibrator's ranges from it, and the best of them on validation."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from maseRT.checkpoints import save_tensors
from maseRT.config import CalibrateSection, MethodRule, QuantizeSection
from maseRT.data.loading import calibration_subset, loader
from maseRT.errors import shortened
from maseRT.evaluate import Metrics
from maseRT.interrupts import finishing
from maseRT.layer_rules import matching_layers
from maseRT.plan import Plan
from maseRT.quant.bias_correction import correct_biases, restore_biases
from maseRT.quant.calibrators import RANGE_OF_ZEROS, Method, always_zero, amax_from_histograms
from maseRT.quant.histogram import Histogram, tensors_from_histograms
from maseRT.quant.observe import known_amax, load_amax, observe
from maseRT.quant.overflow import keep_in_fp32, observed_overflow, ranges_below_half
from maseRT.quant.qat import is_weight
from maseRT.quant.quantizer import quantizers_off
from maseRT.quant.sqnr import layer_sqnr_db, sqnr_db
from maseRT.steps.candidates import CHECKPOINT, Candidate, Comparison, Correction
from maseRT.steps.common import Setting, rebuild, save_quantized, set_up, validate
from maseRT.steps.resume import load_progress, save_progress
from maseRT.steps.table import Context, StepResult
from maseRT.token_ids import looked_up
from maseRT.workspace import write_json

log = logging.getLogger(__name__)

_MOST_VALUES = 1 << 24
"""Of the inputs that correct the biases, which run as one batch: 111 images of 3x224x224."""


@dataclass(frozen=True)
class Subject:
    """What is calibrated, and with what.

    Attributes:
        setting: data and task.
        model: fake-quantized, on the context's device.
        plan: of the model, without what FP16 cannot hold.
        histograms: of every quantized tensor, by amax name.
        inputs: of the calibration data [N, ...], as many as one batch may have.
    """

    context: Context
    section: CalibrateSection
    setting: Setting
    model: nn.Module
    plan: Plan
    histograms: Mapping[str, Histogram]
    inputs: Tensor


def run(context: Context, section: CalibrateSection) -> StepResult:
    """Observe, compare the methods on validation, and save the model with the best one's ranges.

    Ranges that the checkpoint was trained with stay, and so do the biases beside them.
    """
    workspace = context.workspace
    setting = set_up(context)
    model, plan = rebuild(context, setting.model, workspace.plan, workspace.quantized_checkpoint, master_weights=True)
    model.to(context.device)
    histograms, plan, inputs = _observe(context, setting, model, plan, section)
    if not plan.has_int8:
        return _nothing_to_do(context, model, plan)
    subject = Subject(context, section, setting, model, plan, histograms, inputs)
    with quantizers_off(model):
        float_metrics = validate(context, setting, model)
    trained = known_amax(model)
    candidates = [_scored(subject, CHECKPOINT, trained)] if trained else _candidates(subject)
    comparison = Comparison(candidates, float_metrics)
    load_amax(model, comparison.best.amax)
    if section.bias_correction and not trained:
        comparison = replace(comparison, correction=_corrected(subject, comparison.best))
    return _save(subject, comparison)


def _observe(
    context: Context, setting: Setting, model: nn.Module, plan: Plan, section: CalibrateSection
) -> tuple[dict[str, Histogram], Plan, Tensor]:
    """Return every quantized tensor's histogram, the plan without what FP16 cannot hold, and the first inputs."""
    data = context.config.data
    missing = max(1, _MOST_VALUES // math.prod(setting.splits.input_shape))
    first: list[Tensor] = []
    subset = calibration_subset(setting.splits, samples=section.batches * data.batch_size, seed=context.config.run.seed)
    batches = loader(subset, batch_size=data.batch_size)
    with torch.inference_mode(), observed_overflow(model, plan) as overflow, observe(model) as histograms:
        for inputs, _ in context.reporter.track(batches, description="observe", total=len(batches), unit="batch"):
            if missing > 0:
                first.append(inputs[:missing])
                missing -= len(inputs)
            with looked_up(inputs):
                model(inputs.to(context.device))
    quantize = context.config.quantize or QuantizeSection()
    outside = ranges_below_half(plan, histograms) | overflow
    kept = keep_in_fp32(plan, outside, overflow=quantize.overflow)
    for note in kept.notes[len(plan.notes) :]:
        log.warning("%s", note)
    return histograms, kept, torch.cat(first)


def _candidates(subject: Subject) -> list[Candidate]:
    methods = _methods(subject)
    track = subject.context.reporter.track
    tracked = track(methods.items(), description="calibrate", total=len(methods), unit="method")
    return [_candidate(subject, name, method_of) for name, method_of in tracked]


def _methods(subject: Subject) -> dict[str, dict[str, Method]]:
    """Return each candidate's name and its method for every tensor.

    A layer that a rule names has that rule's method in every candidate; weights have their own setting.
    """
    section, plan = subject.section, subject.plan
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
            tensor: fixed.get(plan.owner_of(tensor), weights if is_weight(tensor) else method)
            for tensor in subject.histograms
        }
    return candidates


def _candidate(subject: Subject, name: str, methods: Mapping[str, Method]) -> Candidate:
    """Return one method's ranges and their score; those that an interrupted calibration has left are taken."""
    context = subject.context
    path = context.workspace.amax(name)
    found = load_progress(path, key=context.key, work=f"calibration {name}", made_by="calibrate")
    if found is not None:
        amax, (metrics,) = found
        log.warning("%s was finished before", name)
        return Candidate(name, amax, Metrics(**metrics), _layers_sqnr_db(subject, amax))
    with finishing(f"calibration method {name}"), context.reporter.spinner(name):
        amax = amax_from_histograms(subject.histograms, methods.__getitem__, ties=subject.plan.ties)
        candidate = _scored(subject, name, amax)
        save_progress(path, amax, key=context.key, history=[asdict(candidate.metrics)])
        return candidate


def _scored(subject: Subject, name: str, amax: dict[str, Tensor]) -> Candidate:
    load_amax(subject.model, amax)
    metrics = validate(subject.context, subject.setting, subject.model)
    return Candidate(name, amax, metrics, _layers_sqnr_db(subject, amax))


def _layers_sqnr_db(subject: Subject, amax: Mapping[str, Tensor]) -> dict[str, float]:
    operands: dict[str, list[float]] = {}
    for tensor, value in amax.items():
        operands.setdefault(subject.plan.owner_of(tensor), []).append(sqnr_db(subject.histograms[tensor], value))
    return {layer: layer_sqnr_db(values) for layer, values in operands.items()}


def _corrected(subject: Subject, best: Candidate) -> Correction | None:
    """Correct the biases, and keep that where validation is better for it; None: no layer has one to correct."""
    context, model = subject.context, subject.model
    with context.reporter.spinner("bias correction"):
        before = correct_biases(model, subject.plan, subject.inputs.to(context.device))
    if not before:
        return None
    metrics = validate(context, subject.setting, model)
    kept = metrics.rank > best.metrics.rank
    if not kept:
        restore_biases(model, before)
    return Correction(len(before), metrics, kept)


def _save(subject: Subject, comparison: Comparison) -> StepResult:
    workspace = subject.context.workspace
    save_tensors(workspace.histograms, *tensors_from_histograms(subject.histograms))
    for candidate in comparison.candidates:
        save_tensors(workspace.amax(candidate.name), candidate.amax)
    write_json(workspace.calibration, comparison.as_dict())
    write_json(workspace.final_plan, subject.plan.to_json())
    save_quantized(workspace.calibrated_checkpoint, subject.model, workspace.final_plan)
    return StepResult(
        headline=comparison.headline,
        outputs=[
            workspace.histograms,
            *(workspace.amax(candidate.name) for candidate in comparison.candidates),
            workspace.calibration,
            workspace.final_plan,
            workspace.calibrated_checkpoint,
        ],
        summary=comparison.summary(),
        table=comparison.table(),
        remarks=_on_zeros(subject) if comparison.best.name != CHECKPOINT else [],
    )


def _on_zeros(subject: Subject) -> list[str]:
    """Say which activations the calibration data tell nothing about: dead ones, or ones that other data reach."""
    names = always_zero(subject.histograms)
    return [f"{shortened(names)}: 0 in all of the calibration data; the range is {RANGE_OF_ZEROS:g}"] if names else []


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
