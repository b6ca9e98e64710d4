"""FP32 convolutions in a half-precision region: what follows them has to be FP32 too, or compilers run them in half.

TensorRT-RTX takes Cast, Conv, Cast for a convolution in the outer type, whatever the file says; it leaves one alone
whose reader is FP32. So a convolution that is to be FP32 takes along what it is fused with.
"""

from __future__ import annotations

from dataclasses import replace

from maseRT.plan import OUTPUT, LayerPlan, Plan
from maseRT.precision import Precision
from maseRT.quant.placement import ACTIVATIONS

_HALVES = (Precision.FP16, Precision.BF16)
_ACTIVATION_LAYERS = frozenset(name.replace("_", "") for name in ACTIVATIONS) | {"prelu"}


def keep_islands_whole(plan: Plan) -> Plan:
    """Return the plan with FP32 also for what is fused behind its FP32 convolutions, and a note for each of those.

    That is the activation or addition behind one, and the activation behind that addition; an INT8 layer right behind
    one gets FP32 scales. What a rule gave its precision keeps it. Where there is nothing of the kind, nothing changes:
    the precision receipt tells whether the compiler minds.
    """
    notes = []
    for layer in plan.layers:
        company = _company(plan, layer)
        for name in company:
            plan = plan.with_float(name, Precision.FP32, f"fp32 along with {layer.name}")
        if company:
            names = ", ".join(company)
            notes.append(f"{names}: fp32 along with {layer.name}, which compilers would run in half between two casts")
    return replace(plan, notes=(*plan.notes, *notes))


def _company(plan: Plan, layer: LayerPlan) -> list[str]:
    """Return the layers and operations that have to be FP32 too."""
    if "Conv" not in layer.type or layer.precision is not Precision.FP32:
        return []
    readers = plan.readers_of(layer.name)
    floats = plan.floats
    writers = [writer for writer, reader in plan.flow if reader == layer.name]
    if not readers or any(floats[name] not in _HALVES for name in readers):
        return []
    if not any(floats[name] in _HALVES for name in writers):
        return []
    fused = [name for name in readers if _is_free(plan, name) and (_is_activation(plan, name) or _is_add(plan, name))]
    behind = [
        name
        for add in fused
        if _is_add(plan, add)
        for name in plan.readers_of(add)
        if name != OUTPUT and _is_activation(plan, name) and _is_free(plan, name) and floats[name] in _HALVES
    ]
    if fused:
        return list(dict.fromkeys([*fused, *behind]))
    return [each.name for each in plan.layers if each.name in readers and each.precision is Precision.INT8]


def _is_add(plan: Plan, name: str) -> bool:
    return any(operation.name == name and operation.op == "add" for operation in plan.operations)


def _is_activation(plan: Plan, name: str) -> bool:
    return any(operation.name == name and operation.op in ACTIVATIONS for operation in plan.operations) or any(
        layer.name == name and layer.type.lower() in _ACTIVATION_LAYERS for layer in plan.layers
    )


def _is_free(plan: Plan, name: str) -> bool:
    """Whether no rule decided about a layer or an operation."""
    reasons = {each.name: each.reason for each in plan.layers} | {each.name: each.reason for each in plan.operations}
    return not reasons.get(name, "").startswith("rule ")
