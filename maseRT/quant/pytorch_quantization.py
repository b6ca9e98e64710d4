"""NVIDIA's pytorch-quantization 2.1.3: its TensorQuantizer as a backend, and the checkpoints trained with it.

The backend runs a plan with the library's quantizers in this package's layers, so observing, loading ranges, training
and exporting go on as with the native one, and state dicts have the same names. The library multiplies by 127 / amax
where ONNX and the native backend divide by amax / 127: values that lie half-way between two levels, up to float
rounding, may come out one level apart. Its default range is the full one, -128..127, as here.

A layer is quantized only where the library's own module computes what torch's computes; see `library_refusal`.
"""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from maseRT.config import PrecisionRule, QuantizeSection
from maseRT.errors import MissingError, StepError, UsageError
from maseRT.plan import Fold, LayerPlan, Plan, SitePlan
from maseRT.precision import Precision, QuantSpec
from maseRT.quant.calibrators import shortened
from maseRT.quant.fake_quant import AMAX_FLOOR, max_abs
from maseRT.quant.fold import batchnorm_gain, per_output_channel
from maseRT.quant.layers import LAYERS, default_specs, operands, refusal
from maseRT.quant.operand import Operand
from maseRT.quant.operations import joined
from maseRT.quant.quantizer import Quantizer

FOLDED_SQNR_DB = 60.0
"""What a BatchNorm's fold may cost the levels of a weight: about a hundredth of what rounding to them has cost."""
ZERO_RANGE = 2.0**-24
"""The library takes ranges up to this one for zero, and quantizes everything in them to 0."""


class NvidiaQuantizer(Quantizer):
    """A Quantizer whose values and gradients are those of NVIDIA's TensorQuantizer.

    The library computes in float32 alone: its half path overflows with small ranges and its bfloat16 path rounds the
    quotient to 8 bits. The gradient passes where |x| <= amax, half a level earlier than in the native backend.

    Attributes:
        tensor_quantizer: the library's module; it is given amax in every forward pass and keeps no state.
    """

    def __init__(self, spec: QuantSpec, channels: int | None = None) -> None:
        super().__init__(spec, channels)
        self.tensor_quantizer = _tensor_quantizer(spec)
        self._beyond_zero: object = None

    def learn_amax(self) -> None:
        """Refuse: the library learns a lower and an upper bound, and a symmetric Q/DQ pair has one range.

        Raises:
            StepError: always.
        """
        raise StepError(
            "pytorch-quantization learns two bounds, which no symmetric Q/DQ pair holds",
            where=self.name,
            fix='[finetune] learned_amax = false, or [quantize] backend = "native"',
        )

    def check(self) -> None:
        """Raise StepError when a range is NaN, infinite, or so small that the library takes it for zero."""
        known = self._known()
        if known is not self._beyond_zero:
            if bool((self.amax <= ZERO_RANGE).any()):
                raise StepError(
                    f"pytorch-quantization takes the range {float(self.amax.min()):.3g} for zero",
                    where=self.name or "a quantizer",
                    fix='keep the layer in float with a rule, or set [quantize] backend = "native"',
                )
            self._beyond_zero = known

    def _fake_quantize(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        amax = self._range_in(x, dtype)
        if self.spec.axis is not None:
            amax = amax.view([-1 if d == self.spec.axis % x.dim() else 1 for d in range(x.dim())])
        self.tensor_quantizer._amax = amax
        result: Tensor = self.tensor_quantizer(x)
        return result

    def _range_in(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the range whose scale, rounded to dtype, is what an exported model uses."""
        if self.follow:
            amax = max_abs(x, self.spec.axis)
            with torch.no_grad():
                self.amax.copy_(amax)
            return amax
        self.check()
        return self.amax if dtype is torch.float32 else self._scale(dtype) * self.spec.quant_max


def _tensor_quantizer(spec: QuantSpec) -> nn.Module:
    """Return the library's module: symmetric, signed, full range.

    Raises:
        MissingError: the library is not installed.
    """
    with _unchanged_logging():
        try:
            from pytorch_quantization.nn import TensorQuantizer
            from pytorch_quantization.tensor_quant import QuantDescriptor
        except ImportError as error:
            raise MissingError(
                f"pytorch-quantization cannot be imported: {error}",
                where='[quantize] backend = "pytorch-quantization"',
                fix='pip install "maseRT[pytorch-quantization]", or use backend = "native"',
            ) from error
    module: nn.Module = TensorQuantizer(QuantDescriptor(num_bits=spec.bits, axis=spec.axis))
    return module


@contextmanager
def _unchanged_logging() -> Iterator[None]:
    """Undo what importing the library does to the root logger: a handler of its own for the ones there, and a level."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # it uses torch.jit.script
            yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.getLogger("absl").setLevel(logging.WARNING)  # it announces every quantizer


_LIBRARY_LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
    nn.LSTM,
    nn.LSTMCell,
)


def library_refusal(layer: nn.Module) -> str | None:
    """Say what the library's module of a layer's type cannot do or does wrong, or None.

    Types of a user's own, which the library has none for, are taken: their quantizers are all it would bring.
    """
    name = type(layer).__name__
    if type(layer) not in _LIBRARY_LAYERS:
        return f"pytorch-quantization has no {name}" if type(layer).__module__.startswith("torch.") else None
    if isinstance(layer, nn.LSTM) and layer.proj_size:
        return "pytorch-quantization has no LSTM with proj_size"
    if not isinstance(layer, _ConvNd) or isinstance(layer, _ConvTransposeNd):
        return None
    if isinstance(layer.padding, str):
        return f'pytorch-quantization has no {name} with padding = "{layer.padding}"'
    if layer.padding_mode == "zeros" or not any(layer.padding):
        return None
    wrong = "pads half as much" if layer.padding_mode == "circular" else "pads with zeros"
    return f'pytorch-quantization {wrong} where padding_mode is "{layer.padding_mode}"'


def plan_with_ranges(
    model: nn.Module,
    section: QuantizeSection,
    ranges: Mapping[str, Tensor],
    *,
    make: Callable[[QuantizeSection], Plan],
    where: str,
) -> tuple[Plan, dict[str, Tensor]]:
    """Plan for a checkpoint that was trained with the library: what it has ranges for is quantized, and nothing else.

    The quantized model then computes what the trained one computed. A range of weights is multiplied, with the weights,
    by the gain of the BatchNorm that is folded into them; where that would change their levels the BatchNorm stays.
    Rules of the section come first: they can keep layers float. Where its precision is float, only layers that a rule
    makes INT8 are quantized.

    Args:
        model: float, in eval mode, with the checkpoint's weights.
        section: the rules and settings.
        ranges: the checkpoint's, under the names that the model has for its layers.
        make: plans for this model by a section; `make_plan`.
        where: the checkpoint, for messages.

    Returns:
        The plan, and all its ranges by amax name, for `load_amax`.

    Raises:
        UsageError: a range that the model has no place for, that no INT8 kernel could use, or that is missing.
    """
    by_layer, residuals = _assigned(model, ranges, where=where)
    planned = make(_with_rules(section, model, by_layer))
    return _Follower(model, planned, section, where).follow(by_layer, residuals)


def _assigned(
    model: nn.Module, ranges: Mapping[str, Tensor], *, where: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Return layer -> tensor -> range, and owner -> range of the shortcut that its addition reads."""
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


def _with_rules(section: QuantizeSection, model: nn.Module, by_layer: Mapping[str, object]) -> QuantizeSection:
    """Return the section with INT8 for the named layers that can take it, behind its own rules, and float otherwise."""
    if section.precision.is_float:
        return section
    rules = [
        PrecisionRule(regex=re.escape(name), precision=Precision.INT8)
        for name in by_layer
        if _obstacle(model.get_submodule(name)) is None
    ]
    return section.model_copy(update={"precision": section.float, "rules": (*section.rules, *rules)})


def _obstacle(layer: nn.Module) -> str | None:
    return refusal(layer) or library_refusal(layer)


class _Follower:
    """Turns the plan that the rules gave into the one that the checkpoint was trained with."""

    def __init__(self, model: nn.Module, plan: Plan, section: QuantizeSection, where: str) -> None:
        self._model = model
        self._plan = plan
        self._section = section
        self._where = where
        self._notes = ["the ranges come from the checkpoint, taken as signed 8 bits, which it does not say"]
        self._amax: dict[str, Tensor] = {}
        self._moved: dict[str, int] = {}
        self._unused: list[str] = []

    def follow(
        self, by_layer: Mapping[str, Mapping[str, Tensor]], residuals: Mapping[str, Tensor]
    ) -> tuple[Plan, dict[str, Tensor]]:
        tensors = {self._plan.of(name).name: found for name, found in by_layer.items()}
        self._refuse_missing(tensors)
        layers = {layer.name: self._layer(layer, tensors.get(layer.name)) for layer in self._plan.layers}
        folds = tuple(fold for fold in self._plan.folds if self._fold(fold, layers, tensors))
        sites = self._sites(residuals)
        if self._moved:
            count = sum(self._moved.values())
            self._notes.append(
                f"negative gains of {shortened(list(self._moved))} turn {count} weights from -128 to 127"
            )
        if self._unused:
            self._notes.append(f"ranges that the config leaves unused: {shortened(self._unused)}")
        notes = (*self._own_notes(), *self._notes)
        plan = replace(self._plan, layers=tuple(layers.values()), folds=folds, sites=sites, ties=(), notes=notes)
        return plan, self._amax

    def _refuse_missing(self, tensors: Mapping[str, object]) -> None:
        missing = [p.name for p in self._plan.layers if p.precision is Precision.INT8 and p.name not in tensors]
        if missing:
            raise UsageError(
                f"has no ranges for {shortened(missing)}, which a rule makes INT8",
                where=self._where,
                fix="remove the rule, or load the weights alone and calibrate",
            )

    def _own_notes(self) -> list[str]:
        """Return the plan's notes without those about the rules that were added to the section's."""
        count = len(self._section.rules)
        found = [(re.match(r"rule (\d+) \(", note), note) for note in self._plan.notes]
        return [note for match, note in found if match is None or int(match[1]) <= count]

    def _layer(self, layer: LayerPlan, tensors: Mapping[str, Tensor] | None) -> LayerPlan:
        module = self._model.get_submodule(layer.name)
        if tensors is None:
            quantizable = layer.weighted and layer.reason == "default" and not self._section.precision.is_float
            return replace(layer, reason="the checkpoint has no ranges for it") if quantizable else layer
        if layer.precision.is_float:
            return self._left_out(layer, module)
        found = self._operand_ranges(layer.name, module, tensors)
        roles: dict[str, list[Tensor]] = {"input": [], "weight": []}
        for operand in operands(module):
            if operand.name in found:
                roles[operand.role].append(found[operand.name])
        self._amax |= {joined(layer.name, name): value for name, value in found.items()}
        return replace(
            layer,
            input=QuantSpec() if roles["input"] else None,
            weight=self._weight_spec(layer.name, module, roles["weight"]),
            reason="the checkpoint has its ranges",
        )

    def _left_out(self, layer: LayerPlan, module: nn.Module) -> LayerPlan:
        """Remember that the config keeps a layer float.

        Raises:
            UsageError: it does not; the layer cannot be quantized as the checkpoint was.
        """
        obstacle = _obstacle(module)
        decided = re.match(r"rule (\d+): ", layer.reason) is not None or self._section.precision.is_float
        if not decided:
            raise UsageError(
                f"was trained with {layer.name} quantized, which cannot be loaded: {obstacle}",
                where=self._where,
                fix=f'keep it float: [quantize] rules = [{{ name = "{layer.name}", precision = "fp32" }}]',
            )
        self._unused.append(layer.name)
        return layer

    def _operand_ranges(self, name: str, layer: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the ranges by operand, [] or [C].

        Raises:
            UsageError: one has a shape that no INT8 kernel could use, or is missing while its like are there.
        """
        match layer:
            case nn.LSTM():
                named = self._lstm_ranges(name, layer, tensors)
            case nn.LSTMCell():
                pairs = {"input": ("input", "hidden"), "weight": ("weight_ih", "weight_hh")}
                named = {own: value for key, value in tensors.items() for own in pairs.get(key, (key,))}
            case _:
                named = dict(tensors)
        known = operands(layer)
        unknown = named.keys() - {operand.name for operand in known}
        if unknown:
            raise UsageError(
                f"has ranges that a {type(layer).__name__} has no place for: {', '.join(sorted(unknown))}",
                where=f"{self._where}, {name}",
            )
        for role in ("input", "weight"):
            present = [operand.name in named for operand in known if operand.role == role]
            if any(present) and not all(present):
                raise UsageError(f"has ranges for some of its {role}s only", where=f"{self._where}, {name}")
        return {
            operand.name: self._shaped(name, layer, operand, named[operand.name])
            for operand in known
            if operand.name in named
        }

    def _lstm_ranges(self, name: str, layer: nn.LSTM, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give each operand its range: per layer and direction the library has one of [x, h] and one of [W_ih, W_hh].

        Raises:
            UsageError: the two directions quantize their one input differently.
        """
        named: dict[str, Tensor] = {}
        directions = 2 if layer.bidirectional else 1
        for key, value in tensors.items():
            kind, _, index = key.rpartition("_")
            if kind not in ("input", "weight"):
                named[key] = value
                continue
            number, direction = divmod(int(index), directions)
            suffix = f"_l{number}" + ("_reverse" if direction else "")
            if kind == "weight":
                named |= {f"weight_ih{suffix}": value, f"weight_hh{suffix}": value}
                continue
            named[f"hidden{suffix}"] = value
            if not torch.equal(named.setdefault(f"input_l{number}", value), value):
                raise UsageError(
                    f"the two directions of layer {number} quantize their input with different ranges",
                    where=f"{self._where}, {name}",
                    fix=f'keep it float: [quantize] rules = [{{ name = "{name}", precision = "fp32" }}]',
                )
        return named

    def _shaped(self, name: str, layer: nn.Module, operand: Operand, value: Tensor) -> Tensor:
        if value.numel() == 1:
            return value.detach().float().reshape(())
        where = f"{self._where}, {joined(name, operand.name)}"
        if operand.role == "input" or operand.axis is None:
            raise UsageError(f"has {value.numel()} ranges for a tensor that can have one", where=where)
        weight = layer.get_parameter(operand.parameter)
        expected = [size if axis == operand.axis else 1 for axis, size in enumerate(weight.shape)]
        if list(value.shape) != expected:
            raise UsageError(
                f"has ranges of shape {list(value.shape)} for weights of shape {list(weight.shape)}; an INT8 kernel "
                f"takes one per output channel, {expected}",
                where=where,
                fix=f"train it with QuantDescriptor(axis=({operand.axis})), or keep the layer float with a rule",
            )
        return value.detach().float().reshape(-1).clamp(min=AMAX_FLOOR)

    def _weight_spec(self, name: str, layer: nn.Module, ranges: list[Tensor]) -> QuantSpec | None:
        if not ranges:
            return None
        if len({value.dim() for value in ranges}) > 1:
            raise UsageError("has ranges per tensor and per channel in one layer", where=f"{self._where}, {name}")
        return default_specs(layer)[1] if ranges[0].dim() else QuantSpec()

    def _fold(self, fold: Fold, layers: dict[str, LayerPlan], tensors: Mapping[str, Mapping[str, Tensor]]) -> bool:
        """Carry a fold over to the weight's range, or say why the BatchNorm stays."""
        name = joined(fold.layer, "weight")
        if name not in self._amax:
            return True
        layer, batchnorm = self._model.get_submodule(fold.layer), self._model.get_submodule(fold.batchnorm)
        amax, gain = tensors[fold.layer]["weight"], batchnorm_gain(batchnorm)
        new, moved, moved_db = _folded_range(layer, gain, amax), *_moved_levels(layer, gain, amax)
        if new is None or moved_db < FOLDED_SQNR_DB:
            reason = f"not folded: {fold.layer} could not keep the levels of its weights"
            if fold.batchnorm in layers:
                layers[fold.batchnorm] = replace(layers[fold.batchnorm], reason=reason)
            self._notes.append(f"{fold.batchnorm}: {reason}")
            return False
        if moved:
            self._moved[fold.batchnorm] = moved
        self._amax[name] = new
        layers[fold.layer] = replace(layers[fold.layer], weight=default_specs(layer)[1])
        return True

    def _sites(self, residuals: Mapping[str, Tensor]) -> tuple[SitePlan, ...]:
        """Return the sites whose ranges the checkpoint has.

        Raises:
            UsageError: a shortcut's range, and not one addition that it could belong to, although the config keeps no
                layer float that has ranges.
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
    """Return the range that keeps the levels of a weight that a BatchNorm is folded into.

    None if there is none: groups of a transposed convolution share their ranges, but not their gain.

    Args:
        layer: with its trained weight.
        gain: of the BatchNorm, [output channels].
        amax: of the weight, [] or one per output channel, in a shape that broadcasts against it.
    """
    if isinstance(layer, _ConvTransposeNd):
        groups = gain.reshape(layer.groups, -1).abs()
        if not bool((groups == groups[0]).all()):
            return None
        gain = groups[0]
    return (amax.detach().double().reshape(-1) * gain.abs()).float().clamp(min=AMAX_FLOOR)


def _moved_levels(layer: nn.Module, gain: Tensor, amax: Tensor) -> tuple[int, float]:
    """Return how many weights a fold moves by a level, and the levels' signal-to-noise ratio in dB.

    A negative gain turns -128, which only a weight beyond its range has, into 128, which there is not. The arguments
    are those of `_folded_range`.
    """
    weight = layer.get_parameter("weight").detach()
    levels = torch.round(weight * (127 / amax)).clamp(-128, 127)
    moved = int(((levels < -127) & (per_output_channel(layer, gain) < 0)).sum())
    return moved, 10 * math.log10(float(levels.double().square().sum()) / moved) if moved else math.inf
