"""BatchNorm becomes part of the convolution or linear layer before it."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from maseRT.errors import UsageError
from maseRT.quant.layers import REPLACED, kind_of
from maseRT.quant.own_code import base_of

BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def applies_activation(batchnorm: nn.Module) -> bool:
    """Whether a module is a BatchNorm followed by its own children `drop` and `act`, as timm's BatchNormAct2d."""
    children = [name for name, _ in batchnorm.named_children()]
    return isinstance(batchnorm, BATCHNORMS) and type(batchnorm) not in BATCHNORMS and children == ["drop", "act"]


def fold_refusal(layer: nn.Module, batchnorm: nn.Module) -> str | None:
    """Say why a BatchNorm cannot become part of a layer whose output it reads, or None when it can."""
    if "forward" in vars(layer) or "forward" in vars(batchnorm):
        return REPLACED
    if layer._forward_hooks or batchnorm._forward_hooks or batchnorm._forward_pre_hooks:
        return "hooks look at what is between them, or at what it gives"
    kind = kind_of(layer)
    if kind is not None and not kind.folds_batchnorm and base_of(layer) is not None:
        return f"{type(layer).__name__} computes its weight or bias"
    if kind is None or not kind.folds_batchnorm:
        return f"it follows a {type(layer).__name__}"
    if isinstance(batchnorm, BATCHNORMS) and type(batchnorm) not in BATCHNORMS and not applies_activation(batchnorm):
        return f"{type(batchnorm).__name__} has code of its own, which would be lost"
    if not isinstance(batchnorm, BATCHNORMS) or batchnorm.running_mean is None or batchnorm.running_var is None:
        return "it has no running statistics"
    if "weight" not in layer._parameters:
        return f"the weight of the {type(layer).__name__} is computed"
    outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if outputs != batchnorm.num_features:
        return f"it normalizes {batchnorm.num_features} channels of {outputs}"
    return None


def folded(layer: nn.Module, batchnorm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the weight and bias of a layer that computes batchnorm(layer(x)); neither module is changed.

    w' = w * gamma / sqrt(var + eps) per output channel, b' = (b - mean) * gamma / sqrt(var + eps) + beta, in double.
    """
    weight, old_bias = layer.get_parameter("weight"), layer.bias
    mean, gain = batchnorm.get_buffer("running_mean"), batchnorm_gain(batchnorm)
    bias = -mean.double() if old_bias is None else old_bias.detach().double() - mean.double()  # type: ignore[operator]
    bias = bias * gain
    if isinstance(batchnorm.bias, Tensor):
        bias = bias + batchnorm.bias.detach().double()
    new_weight = weight.detach().double() * per_output_channel(layer, gain)
    return new_weight.to(weight.dtype), bias.to(weight.dtype)


def batchnorm_gain(batchnorm: nn.Module) -> Tensor:
    """Return gamma / sqrt(var + eps), [channels] in double: what folding multiplies each channel's weights with."""
    gain = torch.rsqrt(batchnorm.get_buffer("running_var").double() + float(batchnorm.eps))  # type: ignore[arg-type]
    return gain * batchnorm.weight.detach().double() if isinstance(batchnorm.weight, Tensor) else gain


def fold_batchnorm(model: nn.Module, layer_name: str, batchnorm_name: str) -> None:
    """Fold a BatchNorm into a layer, in place; an Identity takes its place, or what it applies behind itself.

    Raises:
        UsageError: the two modules are not what the plan says.
    """
    layer, batchnorm = model.get_submodule(layer_name), model.get_submodule(batchnorm_name)
    reason = fold_refusal(layer, batchnorm)
    if reason is not None:
        raise UsageError(f"{batchnorm_name} cannot be folded into {layer_name}: {reason}", where="plan")
    # New parameters, not new values of the old ones: those may be another layer's too.
    layer.weight, layer.bias = map(nn.Parameter, folded(layer, batchnorm))
    parent, _, child = batchnorm_name.rpartition(".")
    rest = nn.Sequential(OrderedDict(batchnorm.named_children())) if applies_activation(batchnorm) else nn.Identity()
    setattr(model.get_submodule(parent), child, rest.train(batchnorm.training))


def per_output_channel(layer: nn.Module, gain: Tensor) -> Tensor:
    """Return the gain in a shape that multiplies the weight: [out, ...], transposed [in, out / groups, ...]."""
    weight = layer.get_parameter("weight")
    if not isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return gain.reshape(-1, *[1] * (weight.dim() - 1))
    per_group = gain.reshape(layer.groups, 1, -1).expand(-1, weight.shape[0] // layer.groups, -1)
    return per_group.reshape(weight.shape[0], -1, *[1] * (weight.dim() - 2))
