"""Helpers of the layer tests: calibrate a twin on its own input."""

from typing import Any

import torch
from torch import Tensor, nn

from maseRT.precision import QuantSpec
from maseRT.quant import quantize_layer, quantizers
from maseRT.quant.fake_quant import max_abs

Output = Any


def quantized(layer: nn.Module, *args: Any, bits: int = 8, **kwargs: Any) -> nn.Module:
    """Turn a layer into its twin, with every range the largest value that these arguments give."""
    quantize_layer(layer, name="layer", input=QuantSpec(bits=bits), weight=QuantSpec(bits=bits, axis=0))
    return with_max_ranges(layer, *args, **kwargs)


def with_max_ranges(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """Set every range of a model to the largest value that one call gives."""
    seen: dict[str, Tensor] = {}
    found = quantizers(model)
    for name, quantizer in found.items():

        def look(x: Tensor, name: str = name, axis: int | None = quantizer.spec.axis) -> None:
            amax = max_abs(x, axis)
            seen[name] = torch.maximum(seen[name], amax) if name in seen else amax

        quantizer.observer = look
    with torch.no_grad():
        model(*args, **kwargs)
    for name, quantizer in found.items():
        quantizer.observer = None
        quantizer.amax.copy_(seen[name])
    return model


def tensors(output: Output) -> list[Tensor]:
    """Every tensor of a layer's result, in order."""
    if isinstance(output, Tensor):
        return [output]
    return [] if output is None else [tensor for part in output for tensor in tensors(part)]
