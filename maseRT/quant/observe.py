"""Show a model's tensors to histograms while calibration data runs through it, and load the ranges that come out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from maseRT.errors import StepError, shortened
from maseRT.quant.histogram import Histogram
from maseRT.quant.quantizer import Quantizer, amax_name, quantizers


@contextmanager
def observe(model: nn.Module) -> Iterator[dict[str, Histogram]]:
    """Collect a histogram of every quantized tensor from the batches that run through the model inside the block.

    The model computes in float meanwhile. A weight is counted once, not once per batch.

    Yields:
        amax name -> histogram, on the device of the quantizer; each is complete when the block ends.

    Raises:
        StepError: a tensor held NaN or infinite values; its name and the batch are in the message.
    """
    found = {amax_name(name): quantizer for name, quantizer in quantizers(model).items()}
    histograms = {name: _histogram_for(quantizer) for name, quantizer in found.items()}
    batches = 0

    def count_batch(*_: object) -> None:
        nonlocal batches
        batches += 1

    hook = model.register_forward_pre_hook(count_batch)
    try:
        for name, quantizer in found.items():
            quantizer.observer = _observer(name, histograms[name], lambda: batches)
        yield histograms
    finally:
        hook.remove()
        for quantizer in found.values():
            quantizer.observer = None


def _histogram_for(quantizer: Quantizer) -> Histogram:
    amax = quantizer.amax
    channels = None if quantizer.spec.axis is None else len(amax)
    return Histogram(quantizer.spec, channels=channels, device=amax.device)


def _observer(name: str, histogram: Histogram, batch: Callable[[], int]) -> Callable[[Tensor], None]:
    seen: tuple[int, int] | None = None

    def collect(x: Tensor) -> None:
        nonlocal seen
        if isinstance(x, nn.Parameter):
            if seen == (id(x), x._version):
                return
            seen = (id(x), x._version)
            histogram.collect(x, where=name)
        else:
            histogram.collect(x, where=f"{name}, calibration batch {batch()}")

    return collect


def load_amax(model: nn.Module, amax: Mapping[str, Tensor]) -> None:
    """Give every quantizer of a model its range; nothing is changed when one does not fit.

    Args:
        model: with quantizers.
        amax: amax name -> [] or [C].

    Raises:
        StepError: names missing or too many, other shapes, and ranges that are NaN, infinite, zero or negative.
    """
    found = {amax_name(name): quantizer for name, quantizer in quantizers(model).items()}
    fix = "run `masert calibrate` again"
    for what, names in (
        ("no range for it, although the model quantizes it", found.keys() - amax.keys()),
        ("a range for it, although the model does not quantize it", amax.keys() - found.keys()),
    ):
        if names:
            raise StepError(what, where=shortened(sorted(names)), fix=fix)
    for name, quantizer in found.items():
        _check_range(name, amax[name], quantizer)
    with torch.no_grad():
        for name, quantizer in found.items():
            quantizer.amax.copy_(amax[name])


def known_amax(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the ranges that a model's quantizers have, by amax name; those that are not set are left out."""
    found = {amax_name(name): quantizer.amax for name, quantizer in quantizers(model).items()}
    return {name: amax.detach().clone() for name, amax in found.items() if not bool(amax.isnan().any())}


def _check_range(name: str, amax: Tensor, quantizer: Quantizer) -> None:
    if amax.shape != quantizer.amax.shape:
        raise StepError(
            f"the range has the shape {list(amax.shape)}, the quantizer needs {list(quantizer.amax.shape)}", where=name
        )
    smallest = quantizer.spec.quant_max * torch.finfo(torch.float32).tiny
    good = torch.isfinite(amax) & (amax >= smallest)
    if not bool(good.all()):
        bad = amax[~good].flatten()[0].item()
        raise StepError(
            f"the range is {bad:g}; it must be positive and finite",
            where=name,
            fix="keep the layer in float with a rule, or calibrate on data that reaches it",
        )
