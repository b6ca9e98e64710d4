"""The ranges of a layer in a checkpoint of pytorch-quantization, assigned to the layer's operands.

The library has one range for all inputs of a layer and one for all its weights; this package has one per operand.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from maseRT.errors import UsageError
from maseRT.precision import QuantSpec
from maseRT.quant.fake_quant import floored
from maseRT.quant.layers import default_specs, operands
from maseRT.quant.operand import Operand
from maseRT.quant.operations import joined

_CELL_OPERANDS = {"input": ("input", "hidden"), "weight": ("weight_ih", "weight_hh")}


def ranges_by_operand(name: str, layer: nn.Module, ranges: Mapping[str, Tensor], *, where: str) -> dict[str, Tensor]:
    """Return the ranges by operand, [] or [C].

    Args:
        name: the layer's.
        layer: not quantized yet.
        ranges: by the library's quantizers, such as "input", "weight", or "input_0" for an LSTM.
        where: the checkpoint, for messages.

    Raises:
        UsageError: a range has a shape that no INT8 kernel supports or belongs to no operand, or only some of the
            layer's inputs or weights have ranges.
    """
    match layer:
        case nn.LSTM():
            named = _lstm_ranges(name, layer, ranges, where=where)
        case nn.LSTMCell():
            named = {operand: value for key, value in ranges.items() for operand in _CELL_OPERANDS.get(key, (key,))}
        case _:
            named = dict(ranges)
    known = operands(layer)
    unknown = named.keys() - {operand.name for operand in known}
    if unknown:
        raise UsageError(
            f"has ranges that a {type(layer).__name__} has no place for: {', '.join(sorted(unknown))}",
            where=f"{where}, {name}",
        )
    for role in ("input", "weight"):
        present = [operand.name in named for operand in known if operand.role == role]
        if any(present) and not all(present):
            raise UsageError(f"has ranges for some of its {role}s only", where=f"{where}, {name}")
    return {
        operand.name: _range_of(operand, layer, named[operand.name], where=f"{where}, {joined(name, operand.name)}")
        for operand in known
        if operand.name in named
    }


def input_spec(layer: nn.Module, ranges: Mapping[str, Tensor]) -> QuantSpec | None:
    """Return how the inputs of a layer are quantized with these ranges by operand; None leaves them float."""
    return QuantSpec() if _of_role("input", layer, ranges) else None


def weight_spec(layer: nn.Module, ranges: Mapping[str, Tensor], *, where: str) -> QuantSpec | None:
    """Return how the weights of a layer are quantized with these ranges by operand; None leaves them float.

    Raises:
        UsageError: some are per tensor and some per channel.
    """
    found = _of_role("weight", layer, ranges)
    if not found:
        return None
    if len({value.dim() for value in found}) > 1:
        raise UsageError("has ranges per tensor and per channel in one layer", where=where)
    return default_specs(layer)[1] if found[0].dim() else QuantSpec()


def _of_role(role: str, layer: nn.Module, ranges: Mapping[str, Tensor]) -> list[Tensor]:
    return [ranges[operand.name] for operand in operands(layer) if operand.role == role and operand.name in ranges]


def _lstm_ranges(name: str, layer: nn.LSTM, ranges: Mapping[str, Tensor], *, where: str) -> dict[str, Tensor]:
    """Return the ranges by operand: for each layer and direction the library has one of [x, h], one of [W_ih, W_hh].

    Raises:
        UsageError: the two directions of a layer have different ranges for the input that they share.
    """
    named: dict[str, Tensor] = {}
    directions = 2 if layer.bidirectional else 1
    for key, value in ranges.items():
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
                where=f"{where}, {name}",
                fix=f'keep it float: [quantize] rules = [{{ name = "{name}", precision = "fp32" }}]',
            )
    return named


def _range_of(operand: Operand, layer: nn.Module, value: Tensor, *, where: str) -> Tensor:
    """Return a range in float32: [] per tensor, [C] per output channel of a weight.

    Raises:
        UsageError: it has another shape.
    """
    if value.numel() == 1:
        return value.detach().float().reshape(())
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
    return floored(value.detach().float().reshape(-1))
