"""FP16 holds nothing beyond 65504, and hardly anything below 6e-5: which layers and operations must stay in FP32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from operator import itemgetter
from typing import Any, Literal

import torch
from torch import Tensor, nn

from maseRT.errors import UsageError
from maseRT.plan import Plan
from maseRT.precision import Precision
from maseRT.quant.fake_quant import SMALLEST_HALF, SMALLEST_RANGE
from maseRT.quant.fold import folded
from maseRT.quant.histogram import Histogram
from maseRT.quant.islands import keep_islands_whole
from maseRT.quant.operations import joined
from maseRT.quant.walk import Call, Frame, Walker, tensors_in

HALF_MAX = 65504.0
"""The largest FP16 number."""
HALF_NORMAL = 2.0**-14
"""The smallest FP16 number of full precision; what is smaller is a multiple of 2^-24."""
SMALLEST_HALF_RANGE = 127 * 16 * SMALLEST_HALF
"""INT8 ranges below it have an FP16 scale of less than 16 times 2^-24: rounding moves it by 3 % or more."""


def keep_in_fp32(plan: Plan, found: Mapping[str, str], *, overflow: Literal["keep-fp32", "error"]) -> Plan:
    """Return the plan with some layers and operations in FP32 (INT8 layers: with FP32 scales), and a note for each.

    FP32 convolutions, those of rules too, take along what is fused behind them; see `maseRT.quant.islands`.

    Args:
        plan: as it was.
        found: names of layers and operations, and what leaves the range of FP16.
        overflow: "error" refuses them instead.

    Raises:
        UsageError: there are such layers, and overflow is "error".
    """
    if found and overflow == "error":
        raise UsageError(
            f"outside the FP16 range of {HALF_NORMAL:.1g} to {HALF_MAX:g}: "
            + "; ".join(f"{name} ({what})" for name, what in found.items()),
            where='[quantize] overflow = "error"',
            fix='keep these layers in fp32 with rules, or set overflow = "keep-fp32"',
        )
    for name, what in found.items():
        plan = plan.with_float(name, Precision.FP32, f"kept in fp32: {what}, outside the FP16 range")
    notes = (*plan.notes, *(f"{name} is kept in fp32: {what}" for name, what in found.items()))
    return keep_islands_whole(replace(plan, notes=notes))


def weights_beyond_half(model: nn.Module, plan: Plan) -> dict[str, str]:
    """Return the layers that are to be FP16 but hold weights outside its range, BatchNorms folded in, and which.

    Weights are too small where the largest of a matrix or kernel is; INT8 ones have `ranges_below_half` for that.

    Raises:
        UsageError: a parameter outside of all layers does; none can be kept in FP32 for it.
    """
    found = {}
    folds = {fold.layer: fold.batchnorm for fold in plan.folds}
    for layer in plan.layers:
        if layer.float is not Precision.FP16 or layer.name in folds.values():
            continue
        module = model.get_submodule(layer.name)
        tensors: dict[str, Tensor] = dict(module.state_dict())
        if layer.name in folds:
            tensors["weight"], tensors["bias"] = folded(module, model.get_submodule(folds[layer.name]))
        name, peak = max(
            ((name, _peak(tensor)) for name, tensor in tensors.items()), key=itemgetter(1), default=("", 0)
        )
        if peak > HALF_MAX:
            found[layer.name] = f"{name} reaches {peak:.4g}"
        elif layer.precision is Precision.FP16:
            matrices = {name: _peak(tensor) for name, tensor in tensors.items() if tensor.dim() > 1}
            small = [name for name, peak in matrices.items() if 0 < peak < HALF_NORMAL]
            if small:
                found[layer.name] = f"{small[0]} reaches {matrices[small[0]]:.4g} only"
    if plan.float is Precision.FP16:
        _check_loose_tensors(model, plan)
    return found


def _check_loose_tensors(model: nn.Module, plan: Plan) -> None:
    inside = {part for layer in plan.layers for part in model.get_submodule(layer.name).modules()}
    inside |= {model.get_submodule(fold.batchnorm) for fold in plan.folds}
    for prefix, module in model.named_modules():
        loose = {} if module in inside else {**module._parameters, **module._buffers}
        for name, tensor in loose.items():
            if tensor is not None and _peak(tensor) > HALF_MAX:
                raise UsageError(
                    f"reaches {_peak(tensor):.4g}, beyond the FP16 range of {HALF_MAX:g}, and belongs to no layer",
                    where=joined(prefix, name),
                    fix='set [quantize] float = "fp32" or "bf16"',
                )


def _peak(tensor: Tensor) -> float:
    return float(tensor.detach().abs().max()) if tensor.is_floating_point() and tensor.numel() else 0.0


def ranges_below_half(plan: Plan, histograms: Mapping[str, Histogram]) -> dict[str, str]:
    """Return the INT8 layers and operations whose scales are to be FP16 but too small for it, and the tensor.

    Args:
        plan: of the model whose tensors were observed.
        histograms: of every quantized tensor, by amax name.
    """
    peaks = {name: float(histogram.max.max()) for name, histogram in histograms.items()}
    for tie in plan.ties:
        peaks |= dict.fromkeys(tie, max(peaks[name] for name in tie))
    found = {}
    for name, peak in peaks.items():
        owner = plan.owner_of(name)
        if SMALLEST_RANGE <= peak < SMALLEST_HALF_RANGE and plan.floats.get(owner) is Precision.FP16:
            found[owner] = f"{name} reaches {peak:.4g} only"
    return found


@contextmanager
def observed_overflow(model: nn.Module, plan: Plan) -> Iterator[dict[str, str]]:
    """Find the layers and operations whose tensors leave the FP16 range in the batches that run inside the block.

    The model must run in FP32 (`quantize_model(model, plan, master_weights=True)`); an FP16 one has overflowed already.

    Yields:
        layer or operation name -> what was seen, for `keep_in_fp32`; complete when the block ends.
    """
    found: dict[str, str] = {}
    halves = {layer.name for layer in plan.layers if layer.float is Precision.FP16}
    operations = {(o.owner, o.op, o.index): o.name for o in plan.operations if o.precision is Precision.FP16}
    if not halves and not operations:
        yield found
        return
    walker = _PeakWalker(model, plan, halves, operations)
    with walker.hooked(), walker:
        yield found
    found |= walker.overflowing()


class _PeakWalker(Walker):
    """Remembers the largest magnitude that each FP16 layer and operation reads or writes."""

    def __init__(
        self, model: nn.Module, plan: Plan, halves: set[str], operations: dict[tuple[str, str, int], str]
    ) -> None:
        layers = {model.get_submodule(layer.name): layer.name for layer in plan.layers}
        inside = {module for layer in layers for module in layer.modules()}
        super().__init__(layers, {module: name for name, module in model.named_modules() if module not in inside})
        self._halves = halves
        self._operations = operations
        self._peaks: dict[str, Tensor] = {}

    def overflowing(self) -> dict[str, str]:
        peaks = {name: float(peak) for name, peak in self._peaks.items()}
        return {name: f"its tensors reach {peak:.4g}" for name, peak in peaks.items() if peak > HALF_MAX}

    def on_operation(self, call: Call) -> Any:
        name = self._operations.get((call.frame.name, call.op, call.ordinal))
        result = call.run()
        if name is not None:
            self._see(name, [*call.inputs, *tensors_in(result)])
        return result

    def leave_layer(self, frame: Frame, inputs: list[Tensor], result: Any) -> None:
        if frame.name in self._halves:
            self._see(frame.name, [*inputs, *tensors_in(result)])

    def _see(self, name: str, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            if tensor.is_floating_point() and tensor.numel():
                finite = torch.nan_to_num(tensor.detach().float(), nan=0.0, posinf=0.0, neginf=0.0)  # masks hold -inf
                peak = finite.abs().amax()
                before = self._peaks.get(name)
                self._peaks[name] = peak if before is None else torch.maximum(before, peak)
