"""Functional operations (`a + b`, torch.cat, F.relu, ...): how they are named and counted, recorded or not.

An operation is known by the module whose forward calls it (its owner), its name, and how many calls of that
name precede it within one forward of the owner. Calls inside a submodule count for that submodule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_SAME = {
    "iadd": "add",
    "radd": "add",
    "isub": "sub",
    "subtract": "sub",
    "imul": "mul",
    "rmul": "mul",
    "multiply": "mul",
    "truediv": "div",
    "itruediv": "div",
    "divide": "div",
    "true_divide": "div",
    "rmatmul": "matmul",
    "concat": "cat",
    "concatenate": "cat",
    "clip": "clamp",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "moveaxis": "movedim",
    "max_pool1d_with_indices": "max_pool1d",
    "max_pool2d_with_indices": "max_pool2d",
    "max_pool3d_with_indices": "max_pool3d",
    "adaptive_max_pool1d_with_indices": "adaptive_max_pool1d",
    "adaptive_max_pool2d_with_indices": "adaptive_max_pool2d",
    "adaptive_max_pool3d_with_indices": "adaptive_max_pool3d",
}

_RESHAPING = """
    flatten unflatten view view_as reshape reshape_as permute transpose movedim squeeze unsqueeze contiguous clone
    detach t T mT expand expand_as to float half bfloat16 type type_as cpu cuda dropout dropout1d dropout2d dropout3d
    alpha_dropout feature_dropout pixel_shuffle pixel_unshuffle channel_shuffle flip roll repeat tile repeat_interleave
"""
_SELECTING = "getitem chunk split tensor_split narrow select unbind index_select gather take"
RESHAPING = frozenset(_RESHAPING.split())
SELECTING = frozenset(_SELECTING.split())


def operation_name(function: Callable[..., Any]) -> str:
    """Return the name that every spelling of a function shares: `+`, `+=`, torch.add and Tensor.add_ are all "add"."""
    name = getattr(function, "__name__", "")
    if name == "__get__":  # a property such as x.T
        name = getattr(getattr(function, "__self__", None), "__name__", name)
    name = name.strip("_")
    return _SAME.get(name, name)


def writes_in_place(function: Callable[..., Any]) -> bool:
    """Whether a caller may go on with the first operand instead of the result: `x.add_(y)`, but not `x += y`."""
    name = getattr(function, "__name__", "")
    return name.endswith("_") and not name.endswith("__")


def spellings(op: str) -> dict[Callable[..., Any], bool]:
    """Return torch's functions of one name, and whether each writes in place."""
    namespaces = torch.overrides.get_overridable_functions().values()
    return {f: writes_in_place(f) for functions in namespaces for f in functions if operation_name(f) == op}


def local_name(owner: nn.Module, op: str, index: int) -> str:
    """Return what an operation is called below its owner: `add`, then `add_1`; `add_op` where `add` is an attribute."""
    name = op if index == 0 else f"{op}_{index}"
    return f"{name}_op" if hasattr(owner, name) else name


def runs_as(layer: nn.Module, types: tuple[type[nn.Module], ...]) -> bool:
    """Whether a layer is of one of some types and computes as that does: with no forward of its own."""
    if "forward" in vars(layer):
        return False
    return any(isinstance(layer, each) and type(layer).forward is each.forward for each in types)


def joined(owner: str, name: str) -> str:
    """Return the path of something below a module; "" is the model itself."""
    return f"{owner}.{name}" if owner else name


def tensors_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors among a call's arguments, those inside lists too, in order: an operand is an index in here."""
    return [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]


def with_tensors(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[int, Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a call's arguments with every tensor replaced by change(operand, tensor)."""
    if not kwargs and all(isinstance(value, Tensor) for value in args):  # most calls, and flattening takes time
        return tuple(change(operand, tensor) for operand, tensor in enumerate(args)), kwargs
    leaves, structure = pytree.tree_flatten((args, kwargs))
    operand = 0
    for position, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            leaves[position] = change(operand, leaf)
            operand += 1
    changed_args, changed_kwargs = pytree.tree_unflatten(leaves, structure)
    return changed_args, changed_kwargs


def as_type(value: Any, dtype: torch.dtype) -> Any:
    """Return the value with the floating-point tensors inside it in another type; what has that type already stays."""
    return pytree.tree_map_only(
        Tensor, lambda t: t.to(dtype) if t.is_floating_point() and t.dtype != dtype else t, value
    )
