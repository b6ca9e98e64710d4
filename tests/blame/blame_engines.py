"""Receipts of engines, with kernel times: written by hand, or of real ones."""

import json
from pathlib import Path
from types import MappingProxyType

from maseRT.receipt import Kernel, LayerReceipt, Receipt, Verdict


def receipt(precisions, kernels, *, types=MappingProxyType({})):
    """Return a receipt.

    Args:
        precisions: layer -> asked for.
        kernels: (layer, tensors read, tensor written, types as "before>after", ms) each; "a+b" hides two layers.
        types: layer -> class, of those that are no Conv2d.
    """
    layers = tuple(
        LayerReceipt(name, types.get(name, "Conv2d"), asked, asked, asked, Verdict.AS_ASKED)
        for name, asked in precisions.items()
    )
    made = []
    for number, (layer, reads, writes, types, ms) in enumerate(kernels):
        before, after = types.split(">")
        made.append(
            Kernel(
                name=f"k{number}",
                layer="" if layer == "convert" or "+" in layer else layer,
                hides=tuple(layer.split("+")) if "+" in layer else (),
                type="",
                tactic="",
                precision="",
                reads=(before,) * len(reads.split()),
                writes=(after,),
                converts=layer == "convert",
                ms=ms,
                inputs=tuple(reads.split()),
                outputs=(writes,),
            )
        )
    return Receipt("tensorrt", "8.6.1", "9.0", "abc", "inspector", layers, tuple(made))


def real(name):
    """Return the INT8 and the FP16 engine of a file in this folder, which says what they are."""
    engines = json.loads((Path(__file__).parent / name).read_text())
    return [
        receipt(
            {layer: asked for layer, _, asked in engines[precision]["layers"]},
            engines[precision]["kernels"],
            types={layer: kind for layer, kind, _ in engines[precision]["layers"]},
        )
        for precision in ("int8", "fp16")
    ]
