"""NVIDIA's pytorch-quantization 2.1.3 as a backend: its TensorQuantizer instead of the native fake quantization.

The backend puts the library's quantizers into this package's layers, so that observing, loading ranges, training and
exporting work as with the native backend, and state dicts have the same keys. The library multiplies by 127 / amax
where ONNX and the native backend divide by amax / 127: a value half-way between two levels, up to float rounding, may
be rounded to the other one. Both use the full range of -128..127.

A layer is only quantized where the library's own module computes what torch's does; see `library_refusal`.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from maseRT.errors import MissingError, StepError
from maseRT.precision import QuantSpec
from maseRT.quant.fake_quant import max_abs
from maseRT.quant.pooling import AVERAGE_POOLS
from maseRT.quant.quantizer import Quantizer

ZERO_RANGE = 2.0**-24
"""The library treats ranges up to this one as zero, and quantizes all values to 0."""


class NvidiaQuantizer(Quantizer):
    """A Quantizer whose values and gradients are those of NVIDIA's TensorQuantizer.

    The library only computes in float32 here: its float16 path overflows for small ranges, and its bfloat16 path rounds
    the quotient to 8 bits. The gradient passes where |x| <= amax; in the native backend it passes up to half a level
    further.

    Attributes:
        tensor_quantizer: the library's module; it gets amax in every forward pass, and has no state of its own.
    """

    def __init__(self, spec: QuantSpec, channels: int | None = None) -> None:
        super().__init__(spec, channels)
        self.tensor_quantizer = _tensor_quantizer(spec)
        self._beyond_zero: object = None

    def learn_amax(self) -> None:
        """Refuse: the library learns a lower and an upper bound, but a symmetric Q/DQ pair has a single range.

        Raises:
            StepError: always.
        """
        raise StepError(
            "pytorch-quantization learns two bounds, which no symmetric Q/DQ pair holds",
            where=self.name,
            fix='[finetune] learned_amax = false, or [quantize] backend = "native"',
        )

    def check(self) -> None:
        """Raise StepError for a range that is NaN, infinite, or so small that the library treats it as zero."""
        known = self._known()
        if known is not self._beyond_zero:
            if bool((self.amax <= ZERO_RANGE).any()):
                raise StepError(
                    f"pytorch-quantization takes the range {float(self.amax.min()):.3g} for zero",
                    where=self.name or "a quantizer",
                    fix='keep the layer in float with a rule, or set [quantize] backend = "native"',
                )
            self._beyond_zero = known

    def _fake_quantize(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        amax = self._range_in(x, dtype)
        if self.spec.axis is not None:
            amax = amax.view([-1 if d == self.spec.axis % x.dim() else 1 for d in range(x.dim())])
        self.tensor_quantizer._amax = amax
        result: Tensor = self.tensor_quantizer(x)
        return result

    def _range_in(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the range for a scale that is rounded to dtype, as in the exported model."""
        if self.follow:
            amax = max_abs(x, self.spec.axis)
            with torch.no_grad():
                self.amax.copy_(amax)
            return amax
        self.check()
        return self.amax if dtype is torch.float32 else self._scale(dtype) * self.spec.quant_max


def _tensor_quantizer(spec: QuantSpec) -> nn.Module:
    """Return the library's module: symmetric, signed, full range.

    Raises:
        MissingError: the library is not installed.
    """
    with _unchanged_logging():
        try:
            from pytorch_quantization.nn import TensorQuantizer
            from pytorch_quantization.tensor_quant import QuantDescriptor
        except ImportError as error:
            raise MissingError(
                f"pytorch-quantization cannot be imported: {error}",
                where='[quantize] backend = "pytorch-quantization"',
                fix='pip install "maseRT[pytorch-quantization]", or use backend = "native"',
            ) from error
    module: nn.Module = TensorQuantizer(QuantDescriptor(num_bits=spec.bits, axis=spec.axis))
    return module


@contextmanager
def _unchanged_logging() -> Iterator[None]:
    """Undo what importing the library does to the root logger: it replaces the handlers and sets a level."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # it uses torch.jit.script
            yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.getLogger("absl").setLevel(logging.WARNING)  # it announces every quantizer


_LIBRARY_LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    *AVERAGE_POOLS,
    nn.LSTM,
    nn.LSTMCell,
)


def library_refusal(layer: nn.Module) -> str | None:
    """Return why the library has no correct module for a layer; None if it has, and for types outside of torch.

    A user's own layer type brings its forward pass itself, and only needs the library's quantizers.
    """
    name = type(layer).__name__
    if type(layer) not in _LIBRARY_LAYERS:
        return f"pytorch-quantization has no {name}" if type(layer).__module__.startswith("torch.") else None
    if isinstance(layer, nn.LSTM) and layer.proj_size:
        return "pytorch-quantization has no LSTM with proj_size"
    if not isinstance(layer, _ConvNd) or isinstance(layer, _ConvTransposeNd):
        return None
    if isinstance(layer.padding, str):
        return f'pytorch-quantization has no {name} with padding = "{layer.padding}"'
    if layer.padding_mode == "zeros" or not any(layer.padding):
        return None
    wrong = "pads half as much" if layer.padding_mode == "circular" else "pads with zeros"
    return f'pytorch-quantization {wrong} where padding_mode is "{layer.padding_mode}"'
