"""TensorRT-RTX: builds ahead of time, without a GPU too; runs on compute capability 7.5, 8.0, 8.6, 8.9 and 12.x."""

from __future__ import annotations

from functools import partial

from maseRT.runtimes.trt.flavour import Flavour
from maseRT.runtimes.trt.roles import TrtCompiler, TrtRuntime

FLAVOUR = Flavour(
    name="tensorrt-rtx",
    module="tensorrt_rtx",
    install="pip install tensorrt-rtx",
    runs_on=("7.5", "8.0", "8.6", "8.9", "12."),
    ahead_of_time=True,
)

TensorRTRTXRuntime = partial(TrtRuntime, FLAVOUR)
TensorRTRTXCompiler = partial(TrtCompiler, FLAVOUR)
