"""The comparison of an INT8 engine with a float engine."""

from __future__ import annotations

from collections import Counter

from maseRT.blame.findings import Blame, SlowerLayer
from maseRT.blame.kernels import KernelGraph, timed_together
from maseRT.blame.limits import RESOLUTION_MS
from maseRT.blame.remedies import find_remedies
from maseRT.blame.savings import Savings, int8_layers
from maseRT.errors import UsageError
from maseRT.receipt import Receipt


def blame(quantized: Receipt, float_: Receipt) -> Blame:
    """Compare an INT8 engine with a float engine of the same model, kernel by kernel.

    Args:
        quantized: the INT8 engine's receipt, with kernel times.
        float_: the float engine's receipt, with kernel times, for the same GPU.

    Raises:
        UsageError: there are no times, the models differ, or the second engine has INT8 layers.
    """
    _check(quantized, float_)
    together = timed_together(quantized, float_)
    mine, theirs = KernelGraph(quantized, together), KernelGraph(float_, together)
    names = (*(layer.name for layer in quantized.layers), *together)
    layers = [SlowerLayer(name, mine.ms_of(name), theirs.ms_of(name)) for name in names]
    slower = [each for each in layers if each.ms - each.float_ms > RESOLUTION_MS]
    return Blame(
        ms=mine.total_ms,
        float_ms=theirs.total_ms,
        float_precision=Counter(layer.asked for layer in float_.layers).most_common(1)[0][0],
        slower=tuple(sorted(slower, key=lambda each: each.float_ms - each.ms)),
        conversions=mine.conversions(),
        remedies=find_remedies(Savings(quantized, mine, theirs, together), quantized, float_),
    )


def _check(quantized: Receipt, float_: Receipt) -> None:
    for receipt, which in ((quantized, "INT8"), (float_, "float")):
        if not any(kernel.ms for kernel in receipt.kernels):
            raise UsageError(
                f"the kernels of the {which} engine were not timed", where="blame", fix="run `masert analyze` on a GPU"
            )
    if {layer.name for layer in quantized.layers} != {layer.name for layer in float_.layers}:
        raise UsageError("the two engines are of different models", where="blame", fix="compare two runs of one model")
    if int8_layers(float_):
        raise UsageError(
            f"the engine to compare with has INT8 layers too: {', '.join(sorted(int8_layers(float_))[:3])}",
            where="blame",
            fix='make it with [quantize] precision = "fp16"',
        )
    if quantized.target != float_.target:
        raise UsageError(f"the engines are for {quantized.target} and {float_.target}", where="blame")
