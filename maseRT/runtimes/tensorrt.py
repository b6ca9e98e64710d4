"""TensorRT 8.6, 10 and 11: builds for, and runs on, the GPU that is here."""

from __future__ import annotations

from functools import partial

from maseRT.runtimes.trt.flavour import Flavour
from maseRT.runtimes.trt.roles import TrtCompiler, TrtRuntime

FLAVOUR = Flavour(
    name="tensorrt",
    module="tensorrt",
    install="pip install tensorrt",
    runs_on=None,
    ahead_of_time=False,
)

TensorRTRuntime = partial(TrtRuntime, FLAVOUR)
TensorRTCompiler = partial(TrtCompiler, FLAVOUR)
