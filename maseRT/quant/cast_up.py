"""Which operations of a model its own code casts up to FP32, as `softmax(scores.float())` does in half precision.

Nothing in an FP32 model tells `x.float()` from `x.to(other.dtype)`, so the model is run once with FP16 tensors between
its layers. What a rule, overflow or the lack of a kernel makes FP32 is decided elsewhere.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from maseRT.quant import half_kernels
from maseRT.quant.operations import (
    RESHAPING,
    SELECTING,
    as_type,
    joined,
    local_name,
    tensors_of,
    with_tensors,
    writes_in_place,
)
from maseRT.quant.walk import Call, Walker, any_complex, tensors_in


def cast_up(
    model: nn.Module, layers: Mapping[str, nn.Module], *, weighted: Collection[str], example: Tensor
) -> frozenset[str]:
    """Return the operations, and the layers without products, that read what the model's code has cast to FP32.

    As far as the model runs in half precision at all: where its code fails there, what came before is returned.

    Args:
        model: float, in eval mode; a copy of it is run, since its code may keep tensors, which are FP16 ones here.
        layers: of the model, by name; they are in FP32 themselves.
        weighted: names of the layers that multiply with weights: what these read is cast to their own type.
        example: a batch of the model's input.
    """
    with suppress(Exception):  # a user's model may refuse to be copied in any way it likes: it is run itself, then
        model, layers = copy.deepcopy((model, dict(layers)))
    run = _HalfRun(model, layers, weighted)
    try:
        with torch.no_grad(), run.hooked(), run:
            model(run.entering(example))
    except Exception:  # a user's code: it may not go with half precision, whatever it raises
        pass
    finally:
        run.unhook()
    return frozenset(run.found)


class _HalfRun(Walker):
    """Runs a model with FP16 tensors between its layers, and notes what computes in FP32 all the same.

    Constants and parameters take on the type of what they meet, as they do in a plan.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], weighted: Collection[str]) -> None:
        inside = {part for layer in layers.values() for part in layer.modules()}
        others = {module: name for name, module in model.named_modules() if module not in inside}
        super().__init__({layer: name for name, layer in layers.items()}, others)
        self.found: set[str] = set()
        self._weighted = weighted
        self._computed: dict[int, Tensor] = {}
        self._handles = [
            handle
            for layer in layers.values()
            for handle in (
                layer.register_forward_pre_hook(self._enter_in_fp32, with_kwargs=True),
                layer.register_forward_hook(self._leave_in_half, with_kwargs=True),
            )
        ]

    def unhook(self) -> None:
        for handle in self._handles:
            handle.remove()

    def entering(self, example: Tensor) -> Tensor:
        with self._unseen():
            half: Tensor = as_type(example, torch.float16)
            self._noted(half)
        return half

    def on_operation(self, call: Call) -> Any:
        if not any(id(tensor) in self._computed for tensor in call.inputs):
            return call.run()
        result = self._run(call)
        if any_complex(call.inputs):  # which are FP32 by nature: what is real again is no cast of the code's
            result = as_type(result, torch.float16)
        self._noted(result)
        if call.op not in RESHAPING and call.op not in SELECTING and _in_fp32(tensors_in(result)):
            self.found.add(joined(call.frame.name, local_name(call.frame.module, call.op, call.ordinal)))
        return result

    def _run(self, call: Call) -> Any:
        def in_half(operand: int, tensor: Tensor) -> Tensor:
            return tensor if id(tensor) in self._computed else as_type(tensor, torch.float16)

        if writes_in_place(call.function) and id(call.inputs[0]) not in self._computed:
            return call.run()
        args, kwargs = with_tensors(call.args, call.kwargs, in_half)
        try:
            return half_kernels.call(call.function, *args, **kwargs)
        except RuntimeError:  # types that do not go together, or no kernel for half
            result = call.function(*as_type(args, torch.float32), **as_type(kwargs, torch.float32))
            wide = all(t.dtype is torch.float32 for t in tensors_of(args, kwargs) if t.is_floating_point())
            return result if wide else as_type(result, torch.float16)

    def _enter_in_fp32(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = self._layers[layer]
        computed = [tensor for tensor in tensors_of(args, kwargs) if id(tensor) in self._computed]
        if name not in self._weighted and _in_fp32(computed):
            self.found.add(name)
        with self._unseen():
            return as_type(args, torch.float32), as_type(kwargs, torch.float32)

    def _leave_in_half(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        if self._layers[layer] in self.found:
            return self._noted(result)
        with self._unseen():
            return self._noted(as_type(result, torch.float16))

    def _noted(self, result: Any) -> Any:
        """Remember that tensors depend on the input."""
        self._computed |= {id(tensor): tensor for tensor in tensors_in(result)}
        return result


def _in_fp32(tensors: list[Tensor]) -> bool:
    return any(tensor.dtype is torch.float32 for tensor in tensors)
