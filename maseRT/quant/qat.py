"""What ranges do while a fake-quantized model is trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from maseRT.quant.quantizer import amax_name, quantizers


def is_weight(amax: str) -> bool:
    """Tell whether an amax name is a weight's, such as `fc.weight` or `lstm.weight_ih_l0`, and not an activation's."""
    return "weight" in amax.rpartition(".")[2]


def train_ranges(model: nn.Module, *, learned: bool, ties: Iterable[Sequence[str]] = ()) -> None:
    """Prepare a calibrated model for quantization-aware training, in place.

    The ranges of weights follow the weights. Those of activations stay as calibrated or, when `learned`, become
    parameters (LSQ), one for all the names of a tie.
    """
    by_name = {amax_name(name): quantizer for name, quantizer in quantizers(model).items()}
    for name, quantizer in by_name.items():
        if is_weight(name):
            quantizer.follow = True
        elif learned:
            quantizer.learn_amax()
    if learned:
        for first, *others in ties:
            for other in others:
                by_name[other].amax = by_name[first].amax
