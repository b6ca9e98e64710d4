"""Twins of linear and convolution layers with a forward of their own: padding inside, standardized weights, casts.

Such a subclass of nn.Conv2d, nn.Linear, ... can be quantized as its base when its forward does one product of the
base's kind and returns it. Whether it does is tried out on a small input; the twin then runs the same forward and
quantizes the operands of that product on their way into it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.overrides import TorchFunctionMode

from maseRT.errors import StepError
from maseRT.eval_mode import evaluating
from maseRT.quant.operations import operation_name, spellings
from maseRT.quant.quantizer import SUFFIX, Quantizer

PRODUCTS: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.ConvTranspose3d: "conv_transpose3d",
}
"""The layers whose subclasses are tried out, each with the operation that it is."""

ALL_PRODUCTS = frozenset((*PRODUCTS.values(), "matmul", "mm", "bmm", "einsum", "addmm", "baddbmm", "bilinear"))
_SMALLEST_IMAGE = 8


@dataclass(frozen=True)
class OwnForward:
    """What the forward of a subclass turned out to do.

    Attributes:
        refusal: why it cannot be quantized as its base, as a clause; None where it can.
        computes: its weight or bias is computed from its parameters, whatever the input.
        takes_bias: it adds the layer's `bias` whenever there is one.
    """

    refusal: str | None = None
    computes: bool = False
    takes_bias: bool = True

    @property
    def is_linear(self) -> bool:
        """Whether its result is linear in its weight and bias, so that a BatchNorm may become part of them."""
        return self.refusal is None and not self.computes and self.takes_bias


def base_of(layer: nn.Module) -> type[nn.Module] | None:
    """Return the type of PRODUCTS that a layer is a subclass of, itself not included."""
    if type(layer) in PRODUCTS or any(name.endswith(SUFFIX) for name in layer._modules):  # or a twin already
        return None
    return next((base for base in type(layer).__mro__ if base in PRODUCTS), None)


def own_forward(layer: nn.Module) -> OwnForward:
    """Try out what the forward of a subclass of a type of PRODUCTS does; each layer is run once and remembered."""
    known = _TRIED.get(layer)
    if known is None or known[0] is not type(layer):
        known = _TRIED[layer] = type(layer), _tried(layer)
    return known[1]


def computes_weights(layer: nn.Module) -> bool:
    """Whether a layer can be quantized although it computes its weight or bias from its parameters."""
    own = own_forward(layer) if base_of(layer) is not None else None
    return own is not None and own.refusal is None and own.computes


_TRIED: WeakKeyDictionary[nn.Module, tuple[type[nn.Module], OwnForward]] = WeakKeyDictionary()


def store_computed(layer: nn.Module) -> None:
    """Put the weight and bias that a layer's forward computes in place of the parameters that it computes them from.

    Its twin multiplies with these from then on. What else they were computed from, such as a gain, stays unused.
    """
    product = _run(layer, 0.0).products[0]
    with torch.no_grad():
        for parameter, used in ((layer.weight, product.weight), (layer.bias, product.bias)):
            if isinstance(parameter, Tensor) and used is not None and used is not parameter:
                parameter.copy_(used)


def twin_of(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the twin of a subclass: the same forward, whose one product reads quantized operands."""
    if cls in _TWINS:
        return _TWINS[cls]

    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        base = next(base for base in cls.__mro__ if base in PRODUCTS)
        with _QuantizedOperands(self, PRODUCTS[base]) as mode:
            result = cls.forward(self, *args, **kwargs)
        mode.check()
        return result

    members = {"forward": forward, "__module__": cls.__module__, "__doc__": f"{cls.__name__} with quantized operands."}
    _TWINS[cls] = type(f"Quant{cls.__name__}", (cls,), members)
    return _TWINS[cls]


_TWINS: dict[type[nn.Module], type[nn.Module]] = {}


class _QuantizedOperands(TorchFunctionMode):
    """Passes input and weight of the one product through the layer's quantizers; weight and bias are its parameters."""

    def __init__(self, layer: nn.Module, op: str) -> None:
        super().__init__()
        self._layer = layer
        self._op = op
        self._functions = _functions_of(op)
        self._calls = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in self._functions:
            return func(*args, **(kwargs or {}))
        self._calls += 1
        product = Product.of(args, kwargs or {})
        layer: Any = self._layer
        x, weight = layer.input_quantizer(product.input), layer.weight_quantizer(layer.weight)
        return func(x, weight, layer.bias, *product.args, **product.kwargs)

    def check(self) -> None:
        """Check that the forward still does one product, as it did when it was tried out.

        Raises:
            StepError: it does not.
        """
        if self._calls != 1:
            quantizer = self._layer.input_quantizer
            raise StepError(
                f"its forward calls {self._op} {self._calls} times here, and once on a test input",
                where=quantizer.name.removesuffix(".input") if isinstance(quantizer, Quantizer) else "",
                fix="keep the layer float with a rule",
            )


@functools.cache
def _functions_of(op: str) -> frozenset[Callable[..., Any]]:
    return frozenset(spellings(op))


@dataclass(frozen=True)
class Product:
    """The arguments of one product: its operands, and the other ones (stride, padding, ...)."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Product:
        """Read a call of F.linear or F.conv2d or the like."""
        named = dict(kwargs)
        x, weight, bias = (
            args[position] if position < len(args) else named.pop(name, None)
            for position, name in enumerate(("input", "weight", "bias"))
        )
        return cls(x, weight, bias, args[3:], named)


class _Run(TorchFunctionMode):
    """Notes the products of one forward.

    Attributes:
        products: those of the base's kind.
        others: names of the other ones.
        result: what the last of `products` gave.
        returned: the forward returned that.
    """

    def __init__(self, op: str) -> None:
        super().__init__()
        self._functions = _functions_of(op)
        self.products: list[Product] = []
        self.others: list[str] = []
        self.result: Any = None
        self.returned = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in self._functions:
            self.products.append(Product.of(args, kwargs or {}))
            self.result = result
        elif operation_name(func) in ALL_PRODUCTS:
            self.others.append(operation_name(func))
        return result


def _tried(layer: nn.Module) -> OwnForward:
    base = base_of(layer)
    if base is None or isinstance(layer._parameters.get("weight"), UninitializedParameter):
        return OwnForward("it has no shape yet, run it once" if base else f"a {type(layer).__name__} has no such base")
    try:
        with _with_bias(layer) as bias:
            runs = _run(layer, 0.0), _run(layer, 1.0)
            weight = layer.get_parameter("weight")
    except Exception as error:  # a user's layer: whatever it raises
        return OwnForward(f"its forward does not run on a test input ({type(error).__name__}: {error})")
    refusal = _product_refusal(runs, PRODUCTS[base], weight, bias)
    if refusal is not None:
        return OwnForward(refusal)
    product = runs[0].products[0]
    if product.bias is None and layer.bias is not None:
        return OwnForward("it does not add its bias")
    computes = product.weight is not weight or (product.bias is not None and product.bias is not bias)
    return OwnForward(computes=computes, takes_bias=product.bias is not None)


def _product_refusal(runs: tuple[_Run, _Run], op: str, weight: Tensor, bias: Tensor) -> str | None:
    """Say why a forward is not one product of the base's kind; None where it is."""
    for run in runs:
        if len(run.products) != 1 or run.others:
            calls = [op] * len(run.products) + run.others
            return f"its forward has to call {op} once, and calls {', '.join(calls) or 'nothing of the kind'}"
        if not run.returned:
            return f"its forward goes on with what {op} gives"
    product, again = (run.products[0] for run in runs)
    if product.weight.shape != weight.shape or (product.bias is not None and product.bias.shape != bias.shape):
        return "it multiplies with a weight, or adds a bias, of another shape than its parameter's"
    if not (_same(product.weight, again.weight) and _same(product.bias, again.bias)):
        return "its weight or bias depends on the input"
    return None


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one is other or torch.allclose(one, other, equal_nan=True)


def _run(layer: nn.Module, value: float) -> _Run:
    """Run a layer's forward in eval mode, past its hooks, on a small input of one value and a little of another."""
    base = base_of(layer)
    run = _Run(PRODUCTS[base] if base else "")
    with evaluating(layer), torch.no_grad():
        x = _example(layer, value)
        with run:
            run.returned = type(layer).forward(layer, x) is run.result
    return run


def _example(layer: Any, value: float) -> Tensor:
    """Return [2, in, ...] with every image a little larger than the kernel."""
    weight = layer.weight
    if isinstance(layer, nn.Linear):
        shape = [2, layer.in_features]
    else:
        reach = [(size - 1) * step + 1 for size, step in zip(layer.kernel_size, layer.dilation, strict=True)]
        shape = [2, layer.in_channels, *(max(_SMALLEST_IMAGE, size) for size in reach)]
    x = torch.full(shape, value, dtype=weight.dtype, device=weight.device)
    x[..., ::2] /= 2
    return x


@contextmanager
def _with_bias(layer: Any) -> Iterator[Tensor]:
    """Yield the layer's bias; it gets one of zeros inside the block where it has none."""
    missing = layer._parameters.get("bias") is None
    if missing:
        weight = layer.get_parameter("weight")
        channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        layer._parameters["bias"] = nn.Parameter(weight.new_zeros(channels))
    try:
        yield layer.bias
    finally:
        if missing:
            layer._parameters["bias"] = None
