"""Which layers and operations compute in FP32 although they are in half precision: torch, ONNX or their code does it.

They are planned as FP32, which is what runs either way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from maseRT.quant import half_kernels
from maseRT.quant.layers import LAYERS
from maseRT.quant.operations import RESHAPING, SELECTING, as_type, operation_name, tensors_of
from maseRT.quant.own_code import ALL_PRODUCTS
from maseRT.quant.placement import pooling_of
from maseRT.quant.pooling import averages_equally
from maseRT.quant.trace import Node
from maseRT.quant.walk import tensors_in

_RMS_NORM = "it sums up squares, and torch computes it in FP32 whatever its type is, lest they overflow"
_DOES_NOT_DIVIDE = "its outputs average unequal numbers of inputs, which has an ONNX form in FP32 alone"
_SUMS = "it sums up products, which has an ONNX form in FP32 alone"
_SUMMED_UP = "it sums up, and so is exported in FP32, as kernels compute it"
_EXACT = "nearest-exact"
_NEAREST_EXACT = "nearest-exact has an ONNX form in FP32 alone"
_OWN_CODE = "its own code computes in FP32, whatever its type is"
_FAILS = "its own code does not run in half precision"

_COMPLEX = "there are no complex numbers in half precision"

_OPERATIONS = (
    {"rms_norm": _RMS_NORM, "cosine_similarity": _SUMS}
    | dict.fromkeys(("stft", "istft", "view_as_complex", "complex", "polar"), _COMPLEX)
    | dict.fromkeys(("sum", "nansum", "cumsum", "prod", "var", "std", "var_mean", "std_mean", "mse_loss"), _SUMMED_UP)
)
_ADAPTIVE = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)


def layers_in_fp32(
    model: nn.Module, layers: Mapping[str, nn.Module], calls: Mapping[str, Iterable[Node]], example: Tensor
) -> dict[str, str]:
    """Return the layers that compute in FP32 also where they are given half precision, and why.

    Layers of the user's own are tried out in FP16 on what they read when the model runs on the example.

    Args:
        model: float, in eval mode.
        layers: of the model, by name.
        calls: how they were recorded; for the sizes of what they read.
        example: a batch of the model's input.
    """
    known = {name: _known(layer, calls.get(name, ())) for name, layer in layers.items()}
    found = {name: reason for name, reason in known.items() if reason is not None}
    return found | _tried(model, {name: layer for name, layer in layers.items() if _is_own(layer)}, example)


def operation_in_fp32(call: Node) -> str | None:
    """Say why an operation computes in FP32 also where it is given half precision, or None."""
    if call.op == "interpolate" and call.argument(3, "mode") == _EXACT:
        return _NEAREST_EXACT
    if call.op.startswith("fft_"):
        return _COMPLEX
    pool = pooling_of(call)
    return _OPERATIONS.get(call.op) if pool is None else _known(pool, [call])


def _known(layer: nn.Module, calls: Iterable[Node]) -> str | None:
    if isinstance(layer, nn.RMSNorm):
        return _RMS_NORM
    if isinstance(layer, nn.CosineSimilarity):
        return _SUMS
    if isinstance(layer, nn.Upsample) and layer.mode == _EXACT:
        return _NEAREST_EXACT
    if isinstance(layer, _ADAPTIVE) and not averages_equally(layer, [call.shapes for call in calls]):
        return _DOES_NOT_DIVIDE
    return None


def _is_own(layer: nn.Module) -> bool:
    cls = type(layer)
    return not cls.__module__.startswith("torch.nn.") and cls not in LAYERS and not isinstance(layer, tuple(LAYERS))


def _tried(model: nn.Module, layers: Mapping[str, nn.Module], example: Tensor) -> dict[str, str]:
    found: dict[str, str] = {}

    def try_out(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            reason = found.get(name) or _of_own_code(layer, args, kwargs)
            if reason is not None:
                found[name] = reason

        return hook

    handles = [layer.register_forward_pre_hook(try_out(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            if handles:
                model(example)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _of_own_code(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Run a copy of a layer in FP16 and say what comes of it, or None. The copy shares what is not a tensor."""
    half = copy.copy(layer)
    half._parameters = as_type(dict(layer._parameters), torch.float16)
    half._buffers = as_type(dict(layer._buffers), torch.float16)
    half_args, half_kwargs = as_type((args, kwargs), torch.float16)
    watch = _Watch(tensors_of(half_args, half_kwargs))
    forward = type(layer).forward
    try:
        with watch:
            half_kernels.call(forward, half, *half_args, **half_kwargs)
    except Exception:  # a user's code: where its types do not fit together, whatever it raises
        return _FAILS
    return _OWN_CODE if watch.in_fp32 else None


class _Watch(TorchFunctionMode):
    """Looks for operations that give FP32: the products with weights among them where there are any.

    That is how the precision receipt looks at a layer.

    Args:
        inputs: what the operations have to depend on; what is made of constants is computed before.
    """

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        super().__init__()
        self._computed = {id(tensor): tensor for tensor in inputs}
        self._types: dict[bool, set[torch.dtype]] = {True: set(), False: set()}

    @property
    def in_fp32(self) -> bool:
        """Whether what tells the layer's precision is in FP32, or a part of it."""
        return torch.float32 in (self._types[True] or self._types[False])

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        read = tensors_of(args, kwargs)
        computed = [id(tensor) in self._computed for tensor in read]
        if not any(computed):
            return result
        self._computed |= {id(tensor): tensor for tensor in tensors_in(result)}
        op = operation_name(func)
        if op not in RESHAPING and op not in SELECTING:
            product = op in ALL_PRODUCTS and not all(computed[:2])
            self._types[product] |= {tensor.dtype for tensor in tensors_in(result) if tensor.is_floating_point()}
            if op in _OPERATIONS:
                self._types[product].add(torch.float32)
        return result
