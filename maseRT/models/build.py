"""[model] -> nn.Module: a zoo name, a user's factory, or a model of another package."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from maseRT.config import ModelSection
from maseRT.errors import MaseRTError, UsageError, did_you_mean
from maseRT.factories import call_factory, load_factory, module_source
from maseRT.models.packages import PACKAGES, build_from_package
from maseRT.models.zoo import ZOO

_WHERE = "[model] name"


def build_model(section: ModelSection, *, num_classes: int | None, input_shape: tuple[int, ...]) -> nn.Module:
    """Build the model that a config names, in eval mode, with the weights its factory gives it (random in the zoo).

    Args:
        section: name and args; zoo and package models take num_classes and input_shape (or the package's words
            for them) from the data unless args say otherwise, a user's factory gets args alone.
        num_classes: outputs; None when the data does not say, which leaves the model's own default.
        input_shape: the shape of one input, without the batch.

    Raises:
        UsageError: an unknown name or argument, a factory that fails or gives no nn.Module, a model that cannot
            take such inputs.
        MissingError: the package of the prefix is not installed or does not import.
    """
    prefix, colon, rest = section.name.partition(":")
    if not colon:
        model = _from_zoo(section.name, section.args, num_classes=num_classes, input_shape=input_shape)
    elif prefix in PACKAGES:
        model = build_from_package(prefix, rest, section.args, num_classes=num_classes, input_shape=input_shape)
    else:
        model = _from_factory(section.name, section.args)
    return model.eval()


def _from_zoo(
    name: str, arguments: dict[str, Any], *, num_classes: int | None, input_shape: tuple[int, ...]
) -> nn.Module:
    entry = ZOO.get(name)
    if entry is None:
        module, _, attribute = name.rpartition(".")
        meant = f"; did you mean '{module}:{attribute}'?" if module_source(module) else did_you_mean(name, list(ZOO))
        raise UsageError(
            f"there is no model '{name}'{meant}",
            where=_WHERE,
            fix=f"give a zoo name, package.module:factory, or {', '.join(f'{p}:NAME' for p in PACKAGES)}",
        )
    module, _, function = entry.factory.partition(":")
    factory = getattr(import_module(module), function)
    known = list(inspect.signature(factory).parameters)
    for key in arguments:
        if key not in known:
            raise UsageError(
                f"'{name}' takes no argument '{key}'{did_you_mean(key, known)}",
                where="[model] args",
                fix=f"it takes {', '.join(known)}",
            )
    defaults = {"num_classes": num_classes or entry.num_classes, "input_shape": input_shape}
    try:
        return factory(**(defaults | arguments))  # type: ignore[no-any-return]
    except MaseRTError:
        raise
    except Exception as error:
        raise UsageError(
            f"'{name}' cannot be built with these arguments: {error}",
            where="[model] args",
            fix=f"args given: {arguments}",
        ) from error


def _from_factory(name: str, arguments: dict[str, Any]) -> nn.Module:
    where = f"model '{name}'"
    if isinstance(load_factory(name, what="model"), nn.Module):
        attribute = name.partition(":")[2]
        raise UsageError(
            f"'{attribute}' is a model, not a factory",
            where=where,
            fix=f"name a function that returns it: def make_model(): return {attribute}",
        )
    model = call_factory(name, what="model", **arguments)
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"the factory returned a {type(model).__name__}, not a torch.nn.Module",
            where=where,
            fix="return the model itself",
        )
    _refuse_wrappers(model, where=where)
    lazy = [key for key, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise UsageError(
            f"the model has parameters without a shape: {', '.join(lazy)}",
            where=where,
            fix="run the model once inside the factory, or give the lazy layers their sizes",
        )
    _check_types(model, where=where)
    return model


def _refuse_wrappers(model: nn.Module, *, where: str) -> None:
    """Refuse models that hide their layers from whoever looks for them.

    Raises:
        UsageError: a part of the model is compiled, scripted, or spread over several devices.
    """
    for name, module in model.named_modules():
        part = f"{name} is" if name else "the model is"
        if isinstance(module, torch.jit.ScriptModule):
            raise UsageError(f"{part} TorchScript", where=where, fix="return the model that was scripted or traced")
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            kind = type(module).__name__
            raise UsageError(f"{part} wrapped in {kind}", where=where, fix="return the module inside, model.module")
        # By its name: the module that the class lies in takes seconds to import.
        if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
            fix = "return the model that was compiled; [finetune] compile = true compiles the training step"
            raise UsageError(f"{part} compiled", where=where, fix=fix)


def _check_types(model: nn.Module, *, where: str) -> None:
    found = {str(p.dtype): name for name, p in model.named_parameters() if p.is_floating_point()}
    for dtype, name in found.items():
        if dtype != "torch.float32":
            raise UsageError(
                f"the model's parameters are {dtype.removeprefix('torch.')} instead of float32, such as {name}",
                where=where,
                fix="return model.float(); [quantize] chooses the precision that each layer runs in",
            )
