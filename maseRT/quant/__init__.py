"""Fake quantization: quantizers, layer twins, placement, calibration. Names are imported when they are first used."""

from importlib import import_module
from typing import Any

_HOMES = {
    "LAYERS": "maseRT.quant.layers",
    "LayerKind": "maseRT.quant.layers",
    "Operand": "maseRT.quant.operand",
    "Quantizer": "maseRT.quant.quantizer",
    "amax_name": "maseRT.quant.quantizer",
    "default_specs": "maseRT.quant.layers",
    "exporting": "maseRT.quant.quantizer",
    "fastpath_off": "maseRT.quant.attention",
    "operands": "maseRT.quant.layers",
    "quantize_layer": "maseRT.quant.layers",
    "quantizers": "maseRT.quant.quantizer",
    "quantizers_off": "maseRT.quant.quantizer",
    "refusal": "maseRT.quant.layers",
    "register": "maseRT.quant.layers",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
