"""Whose quantizer modules a plan is run with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from maseRT.errors import UsageError, did_you_mean
from maseRT.quant.pytorch_quantization import NvidiaQuantizer, library_refusal
from maseRT.quant.quantizer import Quantizer


@dataclass(frozen=True)
class Backend:
    """One value of [quantize] backend.

    Attributes:
        quantizer: the class of its quantizers.
        refusal: says why it cannot quantize a layer of the table, or None when it can.
    """

    quantizer: type[Quantizer]
    refusal: Callable[[nn.Module], str | None]


BACKENDS = {
    "native": Backend(Quantizer, lambda layer: None),
    "pytorch-quantization": Backend(NvidiaQuantizer, library_refusal),
}


def get_backend(name: str) -> Backend:
    """Return a backend of the table.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in BACKENDS:
        raise UsageError(
            f"there is no backend '{name}'{did_you_mean(name, list(BACKENDS))}", where="[quantize] backend"
        )
    return BACKENDS[name]
