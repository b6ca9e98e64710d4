"""The table of layers that can be quantized, each with its twin: same parameters and state keys, plus quantizers.

A layer becomes quantized by changing its class to its twin, so that parameters, hooks and every constructor argument
stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

from maseRT.errors import StepError, UsageError
from maseRT.precision import QuantSpec
from maseRT.quant import pooling
from maseRT.quant.attention import QuantMultiheadAttention, attention_operands
from maseRT.quant.convolution import (
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantConvTranspose3d,
    QuantLinear,
    transposed,
    weighted,
)
from maseRT.quant.embedding import QuantEmbedding, embedded, embedding_refusal
from maseRT.quant.lstm import QuantLSTM, QuantLSTMCell, lstm_cell_operands, lstm_operands
from maseRT.quant.operand import Operand, weight_operand
from maseRT.quant.own_code import base_of, own_forward, store_computed, twin_of
from maseRT.quant.quantizer import SUFFIX, Quantizer

REPLACED = "its forward was replaced on this very module, past its class"


@dataclass(frozen=True)
class LayerKind:
    """How one type of layer is quantized.

    Attributes:
        twin: the class that a layer of this type takes on.
        operands: the quantized tensors of a given layer, inputs first.
        folds_batchnorm: a BatchNorm behind it can become part of its weight and bias.
        refusal: why a given layer cannot be quantized, None when it can; as far as its weights do not tell.
        settle: what is done to a layer before it takes on the twin's class.
    """

    twin: type[nn.Module]
    operands: Callable[[nn.Module], tuple[Operand, ...]]
    folds_batchnorm: bool = False
    refusal: Callable[[nn.Module], str | None] = lambda layer: None
    settle: Callable[[nn.Module], None] = lambda layer: None


LAYERS: dict[type[nn.Module], LayerKind] = {
    nn.Linear: LayerKind(QuantLinear, weighted, folds_batchnorm=True),
    nn.Conv1d: LayerKind(QuantConv1d, weighted, folds_batchnorm=True),
    nn.Conv2d: LayerKind(QuantConv2d, weighted, folds_batchnorm=True),
    nn.Conv3d: LayerKind(QuantConv3d, weighted, folds_batchnorm=True),
    nn.ConvTranspose1d: LayerKind(QuantConvTranspose1d, transposed, folds_batchnorm=True),
    nn.ConvTranspose2d: LayerKind(QuantConvTranspose2d, transposed, folds_batchnorm=True),
    nn.ConvTranspose3d: LayerKind(QuantConvTranspose3d, transposed, folds_batchnorm=True),
    nn.MaxPool1d: LayerKind(pooling.QuantMaxPool1d, pooling.pooled),
    nn.MaxPool2d: LayerKind(pooling.QuantMaxPool2d, pooling.pooled),
    nn.MaxPool3d: LayerKind(pooling.QuantMaxPool3d, pooling.pooled),
    nn.AvgPool1d: LayerKind(pooling.QuantAvgPool1d, pooling.pooled),
    nn.AvgPool2d: LayerKind(pooling.QuantAvgPool2d, pooling.pooled),
    nn.AvgPool3d: LayerKind(pooling.QuantAvgPool3d, pooling.pooled),
    nn.AdaptiveMaxPool1d: LayerKind(pooling.QuantAdaptiveMaxPool1d, pooling.pooled),
    nn.AdaptiveMaxPool2d: LayerKind(pooling.QuantAdaptiveMaxPool2d, pooling.pooled),
    nn.AdaptiveMaxPool3d: LayerKind(pooling.QuantAdaptiveMaxPool3d, pooling.pooled),
    nn.AdaptiveAvgPool1d: LayerKind(pooling.QuantAdaptiveAvgPool1d, pooling.pooled),
    nn.AdaptiveAvgPool2d: LayerKind(pooling.QuantAdaptiveAvgPool2d, pooling.pooled),
    nn.AdaptiveAvgPool3d: LayerKind(pooling.QuantAdaptiveAvgPool3d, pooling.pooled),
    nn.Embedding: LayerKind(QuantEmbedding, embedded, refusal=embedding_refusal),
    nn.LSTM: LayerKind(QuantLSTM, lstm_operands),
    nn.LSTMCell: LayerKind(QuantLSTMCell, lstm_cell_operands),
    nn.MultiheadAttention: LayerKind(QuantMultiheadAttention, attention_operands),
}
"""Every layer type that can be quantized; an entry holds for exactly its type. See `kind_of` for subclasses."""


def kind_of(layer: nn.Module) -> LayerKind | None:
    """Return how a layer is quantized, or None where its type says nothing.

    That is its type's entry. A subclass of a linear or convolution layer with a forward of its own has the operands of
    its base where that forward comes down to one product of the same kind; see `maseRT.quant.own_code`.
    """
    kind = LAYERS.get(type(layer))
    base = None if kind is not None or is_parametrized(layer) else base_of(layer)
    if base is None:
        return kind
    own = own_forward(layer)
    if own.refusal is not None:
        return None
    kind = replace(LAYERS[base], twin=twin_of(type(layer)), folds_batchnorm=own.is_linear)
    return replace(kind, settle=store_computed) if own.computes else kind


def register(
    layer: type[nn.Module],
    twin: type[nn.Module],
    *,
    inputs: Sequence[str] = ("input",),
    weights: Mapping[str, int | None] | None = None,
    folds_batchnorm: bool = False,
) -> None:
    """Add a layer type of your own to the table.

    Args:
        layer: the float layer.
        twin: a subclass of it whose forward passes each operand through `self.<name>_quantizer`. It gets no
            constructor of its own: layers turn into twins by changing their class.
        inputs: names of the quantized activations, one scale each.
        weights: the quantized parameters, each with the axis of its output channels, or None for a single scale.
        folds_batchnorm: for a subclass of a linear or convolution layer: a BatchNorm behind it may become part of its
            weight and bias. True only where the output is linear in these two, as it is in the base class.

    Raises:
        UsageError: the twin is not a subclass of the layer, the type is in the table already, or BatchNorm is to
            become part of a type that is no linear or convolution layer.
    """
    if not (isinstance(twin, type) and issubclass(twin, layer)) or twin is layer:
        raise UsageError(f"{twin} is not a subclass of {layer.__name__}", where="quant.register")
    if layer in LAYERS:
        raise UsageError(f"{layer.__name__} is in the table already", where="quant.register")
    if folds_batchnorm and not any(kind.folds_batchnorm for base, kind in LAYERS.items() if issubclass(layer, base)):
        raise UsageError(
            f"no BatchNorm can become part of {layer.__name__}: it is no linear or convolution layer",
            where="quant.register",
        )
    operands = (*map(Operand, inputs), *(weight_operand(path, axis) for path, axis in (weights or {}).items()))
    LAYERS[layer] = LayerKind(twin, lambda layer: operands, folds_batchnorm)


def operands(layer: nn.Module) -> tuple[Operand, ...]:
    """Return the tensors of a layer that are quantized, inputs first.

    Raises:
        StepError: the layer's type is not in the table.
    """
    kind = kind_of(layer)
    if kind is None:
        raise StepError(_unknown(layer), where=type(layer).__name__)
    return kind.operands(layer)


def default_specs(layer: nn.Module) -> tuple[QuantSpec | None, QuantSpec | None]:
    """Return how a layer's inputs and its weights are quantized by default; None where it has none."""
    by_role = {role: [o.spec for o in operands(layer) if o.role == role] for role in ("input", "weight")}
    return next(iter(by_role["input"]), None), next(iter(by_role["weight"]), None)


def refusal(layer: nn.Module) -> str | None:
    """Say why a layer cannot be quantized, or None when it can."""
    if "forward" in vars(layer):
        return REPLACED
    kind = kind_of(layer)
    if kind is None:
        return _unknown(layer)
    reasons = (_weight_refusal(layer, operand) for operand in kind.operands(layer) if operand.role == "weight")
    return next((reason for reason in (kind.refusal(layer), *reasons) if reason is not None), None)


def _unknown(layer: nn.Module) -> str:
    if is_parametrized(layer):
        return "its parameters are parametrized: call torch.nn.utils.parametrize.remove_parametrizations first"
    base = next((base for base in type(layer).__mro__ if base in LAYERS), None)
    if base is not None:
        why = f", and {own_forward(layer).refusal}" if base_of(layer) is not None else ""
        return f"{type(layer).__name__} is a {base.__name__} with code of its own{why}: add a twin with quant.register"
    table = ", ".join(sorted(known.__name__ for known in LAYERS))
    return f"{type(layer).__name__} is not in the table of quantized layers ({table})"


def _weight_refusal(layer: nn.Module, operand: Operand) -> str | None:
    path = operand.parameter
    try:
        weight = layer.get_parameter(path)
    except AttributeError:
        return f"{path} is not a parameter: undo weight_norm, spectral_norm or pruning first"
    if isinstance(weight, UninitializedParameter):
        return f"{path} has no shape yet: run the lazy layer once"
    if not weight.is_floating_point():
        return f"{path} is {weight.dtype}, not a real float"
    if weight.numel() == 0:
        return f"{path} is empty: its shape is {tuple(weight.shape)}"
    if operand.axis is not None and not 0 <= operand.axis < weight.dim():
        return f"{path} of shape {tuple(weight.shape)} has no axis {operand.axis}"
    return None


def quantize_layer(
    layer: nn.Module,
    *,
    name: str = "",
    input: QuantSpec | None = None,
    weight: QuantSpec | None = None,
    quantizer: type[Quantizer] = Quantizer,
) -> dict[str, Quantizer]:
    """Turn a layer into its quantized twin, in place, and return its new quantizers by operand name.

    Args:
        layer: a module whose type is in the table.
        name: the layer's name in its model, for messages.
        input: how its activations are quantized; None leaves them float.
        weight: how its weights are quantized; None leaves them float. An axis asks for one scale per output channel;
            which axis that is, the table says.
        quantizer: the class of the quantizers.

    Raises:
        StepError: the layer cannot be quantized; the message holds the reason.
    """
    where = name or type(layer).__name__
    kind, reason = kind_of(layer), refusal(layer)
    if kind is None or reason is not None:
        raise StepError(f"cannot be quantized: {reason}", where=where, fix="leave it float with a rule")
    if input is not None and input.axis is not None:
        raise StepError("an activation has one scale per tensor, not one per channel", where=where)
    made: dict[str, Quantizer | nn.Identity] = {}
    for operand in operands(layer):
        spec = input if operand.role == "input" else weight
        made[operand.name] = nn.Identity() if spec is None else _made(quantizer, layer, operand, operand.resolve(spec))
    device = next((p.device for p in layer.parameters()), None)
    kind.settle(layer)
    layer.__class__ = kind.twin
    for operand_name, module in made.items():
        layer.add_module(operand_name + SUFFIX, module if device is None else module.to(device))
        if isinstance(module, Quantizer):
            module.name = f"{name}.{operand_name}" if name else operand_name
    return {key: module for key, module in made.items() if isinstance(module, Quantizer)}


def _made(quantizer: type[Quantizer], layer: nn.Module, operand: Operand, spec: QuantSpec) -> Quantizer:
    return quantizer(spec, operand.channels(layer, spec))
