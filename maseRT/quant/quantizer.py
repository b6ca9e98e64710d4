"""The fake quantizer: one module per quantized tensor, a straight-through gradient, real Q/DQ nodes while exporting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from maseRT.errors import StepError
from maseRT.precision import QuantSpec

SUFFIX = "_quantizer"


class Quantizer(nn.Module):
    """Rounds a tensor to the values that an INT8 kernel would see (symmetric, zero point 0, half to even).

    y = clip(round(x / scale), quant_min, quant_max) * scale with scale = amax / quant_max, as ONNX QuantizeLinear and
    DequantizeLinear compute it.

    Attributes:
        spec: bits and channel axis.
        amax: the range, [] per tensor or [C] per channel, float32; NaN until it is calibrated.
        name: where the quantizer sits in its model, for messages.
        enabled: False makes the quantizer the identity, bit for bit.
        observer: called with the tensor while ranges are collected; the tensor then passes unchanged.
        follow: for weights in training: amax is max|x| again whenever the weights have changed. What is saved after a
            step and before the next forward pass holds the range of the weights before that step.
    """

    amax: Tensor

    def __init__(self, spec: QuantSpec, channels: int | None = None) -> None:
        super().__init__()
        if (spec.axis is None) != (channels is None):
            raise StepError(f"axis {spec.axis} does not go with {channels} channels", where="Quantizer")
        self.spec = spec
        self.name = ""
        self.enabled = True
        self.observer: Callable[[Tensor], None] | None = None
        self.follow = False
        self._constants: tuple[Tensor, Tensor] | None = None
        self._checked: tuple[int, int] | None = None
        self._followed: tuple[int, int] | None = None
        self.register_buffer("amax", torch.full(() if channels is None else (channels,), float("nan")))

    @property
    def scale(self) -> Tensor:
        """The step between two neighbouring values, float32, shaped like amax."""
        return self.amax / self.spec.quant_max

    def observe(self, x: Tensor) -> None:
        """Show x to the observer, if there is one."""
        if self.observer is not None:
            self.observer(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return x on the grid of the integers, in x's own shape and dtype."""
        if self.observer is not None:
            self.observer(x)
            return x
        if not self.enabled:
            return x
        if self._constants is not None:
            return self._quantize_dequantize(x, *self._constants)
        if self.follow:
            self._follow(x)
        else:
            self._check()
        return self._fake_quantize(x)

    def extra_repr(self) -> str:
        """Describe the grid: bits, axis, shape of amax."""
        return f"bits={self.spec.bits}, axis={self.spec.axis}, amax={tuple(self.amax.shape)}"

    def _check(self) -> None:
        """Raise on an amax that was never set; looks at the values only when they may have changed."""
        version = (id(self.amax), self.amax._version)
        if version == self._checked:
            return
        if not bool(torch.isfinite(self.amax).all() & (self.amax > 0).all()):
            raise StepError(
                "the range (amax) is not set, or not positive and finite",
                where=self.name or "a quantizer",
                fix="calibrate the model, or load a calibrated checkpoint",
            )
        self._checked = version

    def _follow(self, x: Tensor) -> None:
        version = (id(x), x._version)
        if version == self._followed:
            return
        with torch.no_grad():
            axis = self.spec.axis
            dims = [d for d in range(x.dim()) if d != axis]
            self.amax.copy_(x.detach().abs().amax(dims) if dims else x.detach().abs())
        self._followed = version

    def _fake_quantize(self, x: Tensor) -> Tensor:
        low, high, axis = self.spec.quant_min, self.spec.quant_max, self.spec.axis
        zero_point = torch.zeros_like(self.amax, dtype=torch.int32)
        if axis is None:
            return torch.fake_quantize_per_tensor_affine(x, self.scale, zero_point, low, high)
        return torch.fake_quantize_per_channel_affine(x, self.scale, zero_point, axis, low, high)

    def _quantize_dequantize(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        attributes = {} if self.spec.axis is None else {"axis": self.spec.axis}
        operands = (scale.to(x.dtype), zero_point)
        quantized = torch.onnx.ops.symbolic(
            "QuantizeLinear", (x, *operands), attributes, dtype=torch.int8, shape=x.shape
        )
        return torch.onnx.ops.symbolic(
            "DequantizeLinear", (quantized, *operands), attributes, dtype=x.dtype, shape=x.shape
        )


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """Return every quantizer by its module name, such as `layer1.0.conv1.input_quantizer`; shared ones once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Quantizer)}


def amax_name(quantizer_name: str) -> str:
    """Return the name of a quantizer's range: `conv1.input` for `conv1.input_quantizer`."""
    return quantizer_name.removesuffix(SUFFIX)


@contextmanager
def quantizers_off(model: nn.Module) -> Iterator[None]:
    """Run the model in float: every quantizer is the identity inside the block."""
    before = {quantizer: quantizer.enabled for quantizer in quantizers(model).values()}
    try:
        for quantizer in before:
            quantizer.enabled = False
        yield
    finally:
        for quantizer, enabled in before.items():
            quantizer.enabled = enabled


@contextmanager
def exporting(model: nn.Module) -> Iterator[None]:
    """Make the model's quantizers emit ONNX QuantizeLinear and DequantizeLinear nodes while it is traced.

    Inside the block the model computes zeros when it is run eagerly.

    Raises:
        StepError: a range was never set.
    """
    active = [quantizer for quantizer in quantizers(model).values() if quantizer.enabled]
    for quantizer in active:
        quantizer._check()
    try:
        for quantizer in active:
            quantizer._constants = quantizer.scale.detach(), torch.zeros_like(quantizer.amax, dtype=torch.int8)
        yield
    finally:
        for quantizer in active:
            quantizer._constants = None
