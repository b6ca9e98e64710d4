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
    "keep_in_fp32": "maseRT.quant.overflow",
    "make_plan": "maseRT.quant.planning",
    "observed_overflow": "maseRT.quant.overflow",
    "operands": "maseRT.quant.layers",
    "quantize_layer": "maseRT.quant.layers",
    "quantize_model": "maseRT.quant.prepare",
    "quantizers": "maseRT.quant.quantizer",
    "quantizers_off": "maseRT.quant.quantizer",
    "ranges_below_half": "maseRT.quant.overflow",
    "refusal": "maseRT.quant.layers",
    "register": "maseRT.quant.layers",
    "set_float_precisions": "maseRT.quant.casts",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
