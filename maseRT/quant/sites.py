"""Treats the operands and results of functional operations: Q/DQ on an operand, a float precision for the operation.

A module whose forward calls such operations takes on a subclass of its own class whose forward runs under a small
TorchFunctionMode; a forward that was replaced on the module itself is wrapped there. The mode counts the calls as the
recording did. It works eagerly, in training, under torch.export and
under torch.compile, and leaves the module's code as it is.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, ValuesView
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from maseRT.errors import UsageError
from maseRT.plan import LayerPlan, OperationPlan, SitePlan
from maseRT.quant import half_kernels
from maseRT.quant.operations import as_type, operation_name, spellings, with_tensors, writes_in_place
from maseRT.quant.own_code import Product
from maseRT.quant.quantizer import SUFFIX, Quantizer

_ATTRIBUTE = "_treated_operations"


@dataclass
class Treatment:
    """What happens around one call of an operation.

    Attributes:
        quantizers: operand -> where below the owner its quantizer is, as (container, name).
        precision: the type that floating-point operands are cast to; None leaves them.
        output: the type that the result is cast to.
    """

    quantizers: dict[int, tuple[str, str]] = field(default_factory=dict)
    precision: torch.dtype | None = None
    output: torch.dtype | None = None


@dataclass
class _Treated:
    """What a module does with its operations.

    Attributes:
        treatments: by operation and how many calls of it precede this one.
        functions: torch's functions of these names, each with its name and whether it writes in place.
        depth: how many submodules' forwards are running.
        containers: names of the submodules that hold the quantizers.
        linears: layers that run where the module multiplies with their weight.
        forward: what replaced the class's forward on the module itself, if anything did.
    """

    treatments: dict[tuple[str, int], Treatment] = field(default_factory=dict)
    functions: dict[Callable[..., Any], tuple[str, bool]] = field(default_factory=dict)
    depth: int = 0
    containers: set[str] = field(default_factory=set)
    linears: list[nn.Linear] = field(default_factory=list)
    forward: Callable[..., Any] | None = None

    def add(self, op: str, index: int) -> Treatment:
        """Return the treatment of one call, a new one where there is none."""
        self.functions |= {function: (op, in_place) for function, in_place in spellings(op).items()}
        return self.treatments.setdefault((op, index), Treatment())

    def linear_of(self, product: Product) -> nn.Linear | None:
        """Return the layer that is to run in place of a product; None where there is none."""
        return next((layer for layer in self.linears if layer.weight is product.weight), None)

    def look_up(self, function: Callable[..., Any]) -> tuple[str, bool]:
        """Return a function's name and whether it writes in place; "" for one that is not treated."""
        known = self.functions.get(function)
        if known is not None or torch.compiler.is_dynamo_compiling():  # which cannot look at a function's name
            return known or ("", False)
        return operation_name(function), writes_in_place(function)

    def enter(self, *_: object) -> None:
        self.depth += 1

    def leave(self, *_: object) -> None:
        self.depth -= 1


def add_sites(model: nn.Module, sites: Iterable[SitePlan], *, quantizer: type[Quantizer] = Quantizer) -> None:
    """Give every site its quantizer, a submodule of the owner, and route the operand through it.

    Args:
        model: holds the owners.
        sites: which operands.
        quantizer: the class of the quantizers.

    Raises:
        UsageError: the model has no such owner.
    """
    for site in sites:
        owner = _owner(model, site.owner)
        container = site.operation.removeprefix(f"{site.owner}.") if site.owner else site.operation
        treatment = _treatment(owner, site.op, site.index)
        if container not in owner._modules:
            owner.add_module(container, nn.ModuleDict())
            getattr(owner, _ATTRIBUTE).containers.add(container)
        made = quantizer(site.spec)
        made.name = site.name
        key = f"{site.operand}{SUFFIX}"
        owner.get_submodule(container).add_module(key, made.to(_device(model)))
        treatment.quantizers[site.operand] = (container, key)


def set_precisions(
    model: nn.Module,
    operations: Iterable[OperationPlan],
    dtypes: Callable[[OperationPlan], tuple[torch.dtype, torch.dtype]],
) -> None:
    """Make operations compute in a float type of their own.

    Args:
        model: holds the owners.
        operations: which ones.
        dtypes: the types in which an operation computes and hands on its result.

    Raises:
        UsageError: the model has no such owner.
    """
    for operation in operations:
        treatment = _treatment(_owner(model, operation.owner), operation.op, operation.index)
        treatment.precision, treatment.output = dtypes(operation)


class _TreatingMode(TorchFunctionMode):
    """Counts an owner's operations in one forward and treats those that have a treatment."""

    def __init__(self, owner: nn.Module, treated: _Treated) -> None:
        super().__init__()
        self._owner = owner
        self._treated = treated
        self._counts: dict[str, int] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._treated.depth:
            return func(*args, **kwargs)
        op, in_place = self._treated.look_up(func)
        index = self._counts.get(op, 0)
        self._counts[op] = index + 1
        if op == "linear" and self._treated.linears:
            product = Product.of(args, kwargs)
            layer = self._treated.linear_of(product)
            if layer is not None:
                result = layer(product.input)
                return result if product.bias is None or layer.bias is not None else result + product.bias
        treatment = self._treated.treatments.get((op, index))
        if treatment is None:
            return func(*args, **kwargs)
        return self._call(treatment, func, args, kwargs, in_place=in_place or bool(kwargs.get("inplace")))

    def _call(
        self,
        treatment: Treatment,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        in_place: bool,
    ) -> Any:
        replaced: list[tuple[Tensor, Tensor]] = []

        def treat(operand: int, tensor: Tensor) -> Tensor:
            new: Tensor = tensor if treatment.precision is None else as_type(tensor, treatment.precision)
            if operand in treatment.quantizers:
                container, key = treatment.quantizers[operand]
                new = self._owner.get_submodule(container).get_submodule(key)(new)
            if operand == 0 and new is not tensor:
                replaced.append((tensor, new))
            return new

        new_args, new_kwargs = with_tensors(args, kwargs, treat)
        result = half_kernels.call(func, *new_args, **new_kwargs)
        if replaced and in_place:
            original, copy = replaced[0]
            result = original.copy_(copy)
        return result if treatment.output is None else as_type(result, treatment.output)


def call_layers(model: nn.Module, layers: Iterable[LayerPlan]) -> None:
    """Make modules that multiply with a layer's weight call the layer, so that its quantizers and casts see it.

    Args:
        model: holds the callers.
        layers: those with callers.

    Raises:
        UsageError: the model has no such caller.
    """
    for layer in layers:
        for caller in layer.callers:
            treated = _treated(_owner(model, caller))
            treated.functions |= dict.fromkeys(spellings("linear"), ("linear", False))
            treated.linears.append(cast(nn.Linear, model.get_submodule(layer.name)))


def _treatment(owner: nn.Module, op: str, index: int) -> Treatment:
    return _treated(owner).add(op, index)


def _treated(owner: nn.Module) -> _Treated:
    treated: _Treated | None = getattr(owner, _ATTRIBUTE, None)
    if treated is None:
        treated = _Treated()
        setattr(owner, _ATTRIBUTE, treated)
        for module in owner.modules():
            if module is not owner:
                module.register_forward_pre_hook(treated.enter)
                module.register_forward_hook(treated.leave, always_call=True)
        if "forward" in vars(owner):
            treated.forward = vars(owner)["forward"]
            owner.forward = types.MethodType(_treating_replaced(treated.forward), owner)
        owner.__class__ = _treating(type(owner))
    return treated


def _treating_replaced(replaced: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that runs a module's own forward under the mode, of the same signature.

    It finds that forward by the module, so that it is a copy's own in a copy.
    """

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        treated: _Treated = getattr(self, _ATTRIBUTE)
        treated.depth = 0
        with _TreatingMode(self, treated):
            return cast(Callable[..., Any], treated.forward)(*args, **kwargs)

    signature = inspect.signature(replaced)
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    parameters = [own, *signature.parameters.values()]
    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return forward


_TREATING: dict[type[nn.Module], type[nn.Module]] = {}


def _treating(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass whose forward runs under the mode; its signature stays, torch.export reads it."""
    if cls in _TREATING:
        return _TREATING[cls]

    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        treated: _Treated = getattr(self, _ATTRIBUTE)
        if treated.forward is not None:  # which calls this one
            return cls.forward(self, *args, **kwargs)
        treated.depth = 0
        with _TreatingMode(self, treated):
            return cls.forward(self, *args, **kwargs)

    bases = (_Container, cls) if issubclass(cls, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) else (cls,)
    _TREATING[cls] = type(f"Treated{cls.__name__}", bases, {"forward": forward, "__module__": cls.__module__})
    return _TREATING[cls]


class _Container(nn.Module):
    """Keeps the quantizers of a container's own operations out of what its forward iterates over."""

    def __iter__(self) -> Iterator[Any]:
        return iter(self.keys() if isinstance(self, nn.ModuleDict) else self.values())

    def __len__(self) -> int:
        return len(self._shown())

    def keys(self) -> KeysView[str]:
        """Return the names of what the container held before."""
        return self._shown().keys()

    def values(self) -> ValuesView[nn.Module]:
        """Return what the container held before."""
        return self._shown().values()

    def items(self) -> ItemsView[str, nn.Module]:
        """Return what the container held before, with names."""
        return self._shown().items()

    def _shown(self) -> dict[str, nn.Module]:
        hidden: set[str] = getattr(self, _ATTRIBUTE).containers
        return {name: module for name, module in self._modules.items() if name not in hidden and module is not None}


def _owner(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise UsageError(f"the model has no module '{name}'", where="plan", fix="run `masert quantize` again") from None


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
