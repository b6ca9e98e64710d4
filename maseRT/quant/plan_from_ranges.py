"""The plan for a checkpoint that was trained with pytorch-quantization: its ranges decide what is quantized."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from maseRT.config import PrecisionRule, QuantizeSection
from maseRT.errors import UsageError, shortened
from maseRT.plan import Fold, LayerPlan, Plan, SitePlan
from maseRT.precision import Precision
from maseRT.quant.checkpoint_ranges import input_spec, ranges_by_operand, weight_spec
from maseRT.quant.fake_quant import floored
from maseRT.quant.fold import batchnorm_gain, per_output_channel
from maseRT.quant.layers import LAYERS, default_specs, refusal
from maseRT.quant.operations import joined
from maseRT.quant.pytorch_quantization import library_refusal

FOLDED_SQNR_DB = 60.0
"""A BatchNorm is folded if this leaves the weight's quantized values with at least this SQNR: a hundredth
of the noise that quantizing the weight, at about 40 dB, has made already."""


def plan_from_ranges(
    model: nn.Module,
    section: QuantizeSection,
    ranges: Mapping[str, Tensor],
    *,
    make: Callable[[QuantizeSection], Plan],
    where: str,
) -> tuple[Plan, dict[str, Tensor]]:
    """Return a plan that quantizes exactly the tensors for which the checkpoint has ranges, and these ranges.

    The quantized model then computes what the trained one did. Where a BatchNorm is folded into a weight, the weight's
    range is multiplied by the BatchNorm's gain as the weight is; a BatchNorm whose fold would change the weight's
    quantized values is not folded. The section's own rules come first, and can keep layers float. If the section's
    precision is float, only layers that a rule makes INT8 are quantized.

    Args:
        model: float, in eval mode, with the checkpoint's weights.
        section: the rules and settings.
        ranges: the checkpoint's, named after the model's layers.
        make: returns the plan of this model for a section, as `make_plan` does.
        where: the checkpoint, for messages.

    Returns:
        The plan, and all its ranges by amax name, for `load_amax`.

    Raises:
        UsageError: a range belongs to nothing in the model, has a shape that no INT8 kernel supports, or is missing.
    """
    by_layer, residuals = _by_layer(model, ranges, where=where)
    planned = make(_with_rules(section, model, by_layer))
    return _Follower(model, planned, section, where).follow(by_layer, residuals)


def _by_layer(
    model: nn.Module, ranges: Mapping[str, Tensor], *, where: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Return layer -> tensor -> range, and module -> range of the shortcut that its addition reads."""
    modules = dict(model.named_modules(remove_duplicate=False))
    by_layer: dict[str, dict[str, Tensor]] = {}
    residuals: dict[str, Tensor] = {}
    lost = []
    for name, value in ranges.items():
        owner, _, tensor = name.rpartition(".")
        if type(modules.get(owner)) in LAYERS:
            by_layer.setdefault(owner, {})[tensor] = value
        elif owner in modules and tensor == "residual":
            residuals[owner] = value
        else:
            lost.append(name)
    if lost:
        raise UsageError(
            f"has ranges that the model has no place for: {shortened(lost)}",
            where=where,
            fix="give the [model] name and args that the checkpoint was trained with",
        )
    return by_layer, residuals


def _with_rules(section: QuantizeSection, model: nn.Module, names: Mapping[str, object]) -> QuantizeSection:
    """Return the section with INT8 for the named layers that support it, after its own rules, and float otherwise."""
    if section.precision.is_float:
        return section
    rules = [
        PrecisionRule(regex=re.escape(name), precision=Precision.INT8)
        for name in names
        if _obstacle(model.get_submodule(name)) is None
    ]
    return section.model_copy(update={"precision": section.float, "rules": (*section.rules, *rules)})


def _obstacle(layer: nn.Module) -> str | None:
    """Return why a layer cannot be quantized as the library does, or None."""
    return refusal(layer) or library_refusal(layer)


class _Follower:
    """Changes the plan that the rules gave into the one that the checkpoint was trained with."""

    def __init__(self, model: nn.Module, plan: Plan, section: QuantizeSection, where: str) -> None:
        self._model = model
        self._plan = plan
        self._section = section
        self._where = where
        self._notes = ["the ranges come from the checkpoint, taken as signed 8 bits, which it does not say"]
        self._amax: dict[str, Tensor] = {}
        self._saturated: dict[str, int] = {}  # BatchNorm -> weights that its negative gain moves by a level
        self._unused: list[str] = []

    def follow(
        self, by_layer: Mapping[str, Mapping[str, Tensor]], residuals: Mapping[str, Tensor]
    ) -> tuple[Plan, dict[str, Tensor]]:
        ranges = {self._plan.of(name).name: found for name, found in by_layer.items()}
        self._refuse_missing(ranges)
        layers = {layer.name: self._layer(layer, ranges.get(layer.name)) for layer in self._plan.layers}
        folds = tuple(fold for fold in self._plan.folds if self._fold(fold, layers, ranges))
        sites = self._sites(residuals)
        if self._saturated:
            count = sum(self._saturated.values())
            self._notes.append(
                f"negative gains of {shortened(list(self._saturated))} turn {count} weights from -128 to 127"
            )
        if self._unused:
            self._notes.append(f"ranges that the config leaves unused: {shortened(self._unused)}")
        notes = (*self._own_notes(), *self._notes)
        plan = replace(self._plan, layers=tuple(layers.values()), folds=folds, sites=sites, ties=(), notes=notes)
        return plan, self._amax

    def _refuse_missing(self, ranges: Mapping[str, object]) -> None:
        missing = [p.name for p in self._plan.layers if p.precision is Precision.INT8 and p.name not in ranges]
        if missing:
            raise UsageError(
                f"has no ranges for {shortened(missing)}, which a rule makes INT8",
                where=self._where,
                fix="remove the rule, or load the weights alone and calibrate",
            )

    def _own_notes(self) -> list[str]:
        """Return the plan's notes, without those on the rules that `_with_rules` added."""
        count = len(self._section.rules)
        found = [(re.match(r"rule (\d+) \(", note), note) for note in self._plan.notes]
        return [note for match, note in found if match is None or int(match[1]) <= count]

    def _layer(self, layer: LayerPlan, ranges: Mapping[str, Tensor] | None) -> LayerPlan:
        module = self._model.get_submodule(layer.name)
        if ranges is None:
            quantizable = layer.weighted and layer.reason == "default" and not self._section.precision.is_float
            return replace(layer, reason="the checkpoint has no ranges for it") if quantizable else layer
        if layer.precision.is_float:
            return self._left_out(layer, module)
        amax = ranges_by_operand(layer.name, module, ranges, where=self._where)
        self._amax |= {joined(layer.name, operand): value for operand, value in amax.items()}
        return replace(
            layer,
            input=input_spec(module, amax),
            weight=weight_spec(module, amax, where=f"{self._where}, {layer.name}"),
            reason="the checkpoint has its ranges",
        )

    def _left_out(self, layer: LayerPlan, module: nn.Module) -> LayerPlan:
        """Return a float layer that has ranges.

        Raises:
            UsageError: it is not the config that keeps it float, but that it cannot be quantized as it was trained.
        """
        decided = re.match(r"rule (\d+): ", layer.reason) is not None or self._section.precision.is_float
        if not decided:
            raise UsageError(
                f"was trained with {layer.name} quantized, which cannot be loaded: {_obstacle(module)}",
                where=self._where,
                fix=f'keep it float: [quantize] rules = [{{ name = "{layer.name}", precision = "fp32" }}]',
            )
        self._unused.append(layer.name)
        return layer

    def _fold(self, fold: Fold, layers: dict[str, LayerPlan], ranges: Mapping[str, Mapping[str, Tensor]]) -> bool:
        """Apply a fold to the range of the weight; return False if the BatchNorm is not to be folded."""
        name = joined(fold.layer, "weight")
        if name not in self._amax:
            return True
        layer, batchnorm = self._model.get_submodule(fold.layer), self._model.get_submodule(fold.batchnorm)
        amax, gain = ranges[fold.layer]["weight"], batchnorm_gain(batchnorm)
        new, saturated, sqnr_db = _folded_range(layer, gain, amax), *_saturated(layer, gain, amax)
        if new is None or sqnr_db < FOLDED_SQNR_DB:
            reason = f"not folded: {fold.layer} could not keep the levels of its weights"
            if fold.batchnorm in layers:
                layers[fold.batchnorm] = replace(layers[fold.batchnorm], reason=reason)
            self._notes.append(f"{fold.batchnorm}: {reason}")
            return False
        if saturated:
            self._saturated[fold.batchnorm] = saturated
        self._amax[name] = new
        layers[fold.layer] = replace(layers[fold.layer], weight=default_specs(layer)[1])
        return True

    def _sites(self, residuals: Mapping[str, Tensor]) -> tuple[SitePlan, ...]:
        """Return the sites for which the checkpoint has ranges.

        Raises:
            UsageError: a shortcut's range does not belong to exactly one addition, and no rule explains that by keeping
                a layer float that has ranges.
        """
        kept = []
        for owner, value in residuals.items():
            found = [site for site in self._plan.sites if site.owner == owner and site.op == "add"]
            if not found and self._unused:
                self._unused.append(joined(owner, "residual"))
                continue
            if len(found) != 1 or value.numel() != 1:
                raise UsageError(
                    f"has a range for the shortcut of {owner or 'the model'}, where the plan quantizes "
                    f"{len(found)} additions",
                    where=self._where,
                    fix='set [quantize] placement = "tensorrt"',
                )
            kept.append(found[0])
            self._amax[found[0].name] = value.detach().float().reshape(())
        lost = [site.name for site in self._plan.sites if site not in kept]
        if lost:
            self._notes.append(f"operands that stay float, as the checkpoint has no ranges for them: {shortened(lost)}")
        return tuple(kept)


def _folded_range(layer: nn.Module, gain: Tensor, amax: Tensor) -> Tensor | None:
    """Return the range, [C], with which a weight has the same quantized values after a BatchNorm is folded into it.

    None if there is none: groups of a transposed convolution share their ranges, but not their gain.

    Args:
        layer: with its trained weight.
        gain: of the BatchNorm, [output channels].
        amax: of the weight: [], or one per output channel in a shape that broadcasts against the weight.
    """
    if isinstance(layer, _ConvTransposeNd):
        groups = gain.reshape(layer.groups, -1).abs()
        if not bool((groups == groups[0]).all()):
            return None
        gain = groups[0]
    return floored((amax.detach().double().reshape(-1) * gain.abs()).float())


def _saturated(layer: nn.Module, gain: Tensor, amax: Tensor) -> tuple[int, float]:
    """Return how many weights a negative gain turns from -128 into 127, and the SQNR in dB that this leaves.

    Their mirror image, 128, does not exist in INT8. Only weights beyond their range are quantized to -128. The
    arguments are those of `_folded_range`.
    """
    weight = layer.get_parameter("weight").detach()
    levels = torch.round(weight * (127 / amax)).clamp(-128, 127)
    saturated = int(((levels < -127) & (per_output_channel(layer, gain) < 0)).sum())
    if not saturated:
        return 0, math.inf
    return saturated, 10 * math.log10(float(levels.double().square().sum()) / saturated)
