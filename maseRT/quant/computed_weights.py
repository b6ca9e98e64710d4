"""Weights that are computed anew in each forward (weight norm, spectral norm, parametrizations), made plain ones."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook
from torch.nn.utils.weight_norm import WeightNorm

_HOOKS = (WeightNorm, SpectralNorm)


def computed_weights(model: nn.Module) -> list[str]:
    """Return the names of the parameters and buffers that are computed from others in each forward."""
    names = []
    for name, module in model.named_modules():
        names += [f"{name}.{tensor}" if name else tensor for tensor in _computed_by(module)]
    return names


def store_weights(model: nn.Module) -> None:
    """Put plain parameters, of the values that are computed in eval mode, in the place of all `computed_weights`.

    The model computes what it did; its state dict has the names that it would have without them.
    """
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            _store_parametrized(module)
        for hook in list(_hooks(module)):
            _store_hooked(module, hook)


def with_stored_weights(model: nn.Module) -> nn.Module:
    """Return a copy with `store_weights`; the model itself where nothing is computed."""
    if not computed_weights(model):
        return model
    # What a forward with gradients left behind refuses to be copied.
    left = {id(tensor): tensor.detach().clone() for tensor in _held(model) if not tensor.is_leaf}
    model = copy.deepcopy(model, left)
    store_weights(model)
    return model


def _held(model: nn.Module) -> Iterator[Tensor]:
    """Return the tensors that modules hold as plain attributes, in lists too."""
    for module in model.modules():
        for value in vars(module).values():
            yield from (each for each in (value if isinstance(value, list) else [value]) if isinstance(each, Tensor))


def _computed_by(module: nn.Module) -> list[str]:
    parametrized = cast(nn.ModuleDict, module.parametrizations) if parametrize.is_parametrized(module) else ()
    return [*parametrized, *(hook.name for hook in _hooks(module))]


def _hooks(module: nn.Module) -> Iterator[WeightNorm | SpectralNorm]:
    return (hook for hook in module._forward_pre_hooks.values() if isinstance(hook, _HOOKS))


def _store_parametrized(module: nn.Module) -> None:
    """Undo all parametrizations of a module.

    torch's `remove_parametrizations` takes the computed tensor off the module's class, which copies of the module
    share, and writes over the parameter that it is computed from, which another module may share.
    """
    parametrizations = cast(nn.ModuleDict, module.parametrizations)
    plain = parametrize.type_before_parametrizations(module)
    parametrizations.eval()  # spectral norm iterates in training mode
    with torch.no_grad():
        values = {name: getattr(module, name).detach().clone() for name in parametrizations}
    learned = {name: [p.requires_grad for p in steps.parameters()] for name, steps in parametrizations.items()}
    del module.parametrizations
    module.__class__ = plain
    for name, value in values.items():
        if learned[name]:
            setattr(module, name, nn.Parameter(value, requires_grad=any(learned[name])))
        else:
            module.register_buffer(name, value)


def _store_hooked(module: nn.Module, hook: WeightNorm | SpectralNorm) -> None:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)  # they are deprecated in favour of parametrizations
        remove = remove_weight_norm if isinstance(hook, WeightNorm) else remove_spectral_norm
        remove(module, hook.name)
    for key, loading in list(module._load_state_dict_pre_hooks.items()):
        # torch wraps this hook and then does not find it again: it would ask checkpoints for the tensors that are gone.
        if isinstance(getattr(loading, "hook", loading), SpectralNormLoadStateDictPreHook):
            del module._load_state_dict_pre_hooks[key]
    stored: Tensor = getattr(module, hook.name)
    stored.requires_grad_(True)
