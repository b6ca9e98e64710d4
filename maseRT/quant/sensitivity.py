"""Quantize one layer at a time: which tensors go together, and a model in which only those are quantized."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from maseRT.plan import Plan
from maseRT.quant.histogram import Histogram
from maseRT.quant.quantizer import amax_name, quantizers, quantizers_off
from maseRT.quant.sqnr import layer_sqnr_db, sqnr_db


def tensors_by_layer(plan: Plan, names: Iterable[str]) -> dict[str, list[str]]:
    """Return the quantized tensors of each layer, by amax name.

    The operands of a residual addition count for the layer that it is fused with, as they do in rules; those of another
    operation stand under its own name.
    """
    fused = {add.operation: add.layer for add in plan.residual_adds}
    groups: dict[str, list[str]] = {}
    for name in names:
        owner = plan.owner_of(name)
        groups.setdefault(fused.get(owner, owner), []).append(name)
    return groups


@contextmanager
def only_quantized(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Run the model with these tensors alone quantized, by amax name; all others are float inside the block."""
    with quantizers_off(model):
        for name, quantizer in quantizers(model).items():
            quantizer.enabled = amax_name(name) in names
        yield


def expected_sqnr_db(
    names: Iterable[str], histograms: Mapping[str, Histogram], amax: Mapping[str, Tensor]
) -> float | None:
    """Return the SQNR expected at a layer's output when these tensors are quantized, in dB; None without histograms."""
    known = [sqnr_db(histograms[name], amax[name].cpu()) for name in names if name in histograms]
    return layer_sqnr_db(known) if known else None
