"""Half precision on a CPU: torch has no kernels there for a few operators, such as avg_pool3d and _cdist_forward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from maseRT.quant.operations import as_type

_MISSING = {"not implemented for 'Half'": torch.float16, "not implemented for 'BFloat16'": torch.bfloat16}


def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function; where the CPU has no half-precision kernel for an operator inside, that one runs in float32.

    Nothing is done, and nothing costs time, as long as there are kernels: on GPUs, and where torch only traces.

    Raises:
        NotImplementedError: an operator has no kernel in float32 either.
    """
    try:
        return function(*args, **kwargs)
    except NotImplementedError as error:
        if _missing(error) is None:
            raise
    with _InFloat32():  # type: ignore[no-untyped-call]
        return function(*args, **kwargs)


def cover(layer: nn.Module) -> None:
    """Make a layer's forward run by `call`; that of this very layer, where its class's was replaced."""
    own = vars(layer).get("forward")
    covered = functools.partial(_forward, layer) if own is None else functools.partial(call, own)
    layer.forward = functools.update_wrapper(covered, layer.forward)


def _forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return call(functools.partial(type(layer).forward, layer), *args, **kwargs)


class _InFloat32(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes operators without a half-precision kernel in float32 and rounds the result once.

    That is what such kernels do, which add up in float32: the values are the same.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        try:
            return func(*args, **kwargs)
        except NotImplementedError as error:
            dtype = _missing(error)
            if dtype is None or func._schema.is_mutable or not _on_cpu((args, kwargs)):
                raise
        return as_type(func(*as_type(args, torch.float32), **as_type(kwargs, torch.float32)), dtype)


def _missing(error: NotImplementedError) -> torch.dtype | None:
    """Return the type of which an error says that there is no kernel for it."""
    return next((dtype for text, dtype in _MISSING.items() if text in str(error)), None)


def _on_cpu(value: Any) -> bool:
    return all(leaf.device.type == "cpu" for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))
