"""Float precisions: parameters in their layer's type, and casts at the doors of layers, operations and the model.

The model's input and output stay FP32. Inside, a layer hands its result on in the type of the region around it, or in
its own where everything that reads it wants that one, so that no tensor is cast there and back.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from maseRT.plan import INPUT, OperationPlan, Plan
from maseRT.precision import Precision
from maseRT.quant import half_kernels
from maseRT.quant.operations import as_type
from maseRT.quant.quantizer import SUFFIX, Quantizer
from maseRT.quant.sites import set_precisions

DTYPES = {Precision.FP32: torch.float32, Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}

_Made = dict[tuple[nn.Parameter, torch.dtype], nn.Parameter]


def set_float_precisions(model: nn.Module, plan: Plan) -> None:
    """Give every layer and operation its float type, in place. Quantizers keep their ranges in float32."""
    types = {plan.float, *(layer.float for layer in plan.layers), *(o.precision for o in plan.operations)}
    if types == {Precision.FP32}:
        return
    layers = {layer.name: model.get_submodule(layer.name) for layer in plan.layers}
    inside = {module for layer in layers.values() for module in layer.modules()}
    made: _Made = {}
    for module in model.modules():
        if module not in inside and not isinstance(module, Quantizer):
            _convert(module, DTYPES[plan.float], made)
    for layer in plan.layers:
        module = layers[layer.name]
        _convert_all(module, DTYPES[layer.float], made)
        if layer.float is not Precision.FP32:
            half_kernels.cover(module)
        module.register_forward_pre_hook(functools.partial(_cast_inputs, DTYPES[layer.float]), with_kwargs=True)
        module.register_forward_hook(functools.partial(_cast_output, DTYPES[plan.output_of(layer.name)]))

    def dtypes(operation: OperationPlan) -> tuple[torch.dtype, torch.dtype]:
        return DTYPES[operation.precision], DTYPES[plan.output_of(operation.name)]

    set_precisions(model, plan.operations, dtypes)
    entry = functools.partial(_cast_inputs, DTYPES[plan.output_of(INPUT)])
    model.register_forward_pre_hook(entry, with_kwargs=True, prepend=True)
    model.register_forward_hook(functools.partial(_cast_output, torch.float32))


def _convert_all(module: nn.Module, dtype: torch.dtype, made: _Made) -> None:
    _convert(module, dtype, made)
    for name, child in module.named_children():
        if not name.endswith(SUFFIX):
            _convert_all(child, dtype, made)


def _convert(module: nn.Module, dtype: torch.dtype, made: _Made) -> None:
    """Change the type of a module's own floating-point parameters and buffers; quantizers and submodules stay.

    Layers that share a parameter still do where they have one type. `made` holds the new parameters.
    """
    for name, parameter in list(module._parameters.items()):
        if parameter is not None and parameter.is_floating_point() and parameter.dtype != dtype:
            if (parameter, dtype) not in made:
                made[parameter, dtype] = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
            setattr(module, name, made[parameter, dtype])
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.is_floating_point():
            module._buffers[name] = buffer.to(dtype)


def _cast_inputs(
    dtype: torch.dtype, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return as_type(args, dtype), as_type(kwargs, dtype)


def _cast_output(dtype: torch.dtype, module: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
    return as_type(result, dtype)
