"""The fake quantizer module: one per quantized tensor; real Q/DQ nodes while a model is exported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from maseRT.errors import StepError
from maseRT.precision import QuantSpec
from maseRT.quant.fake_quant import (
    SMALLEST_HALF,
    SMALLEST_RANGE,
    Grid,
    fake_quantize,
    fake_quantize_learned,
    fake_quantize_scaled,
    fake_quantize_unclipped,
    grid_from_scale,
    max_abs,
)

SUFFIX = "_quantizer"


@dataclass
class _Checked:
    """What was derived from one value of amax, and which value that was."""

    amax: Tensor
    version: int
    scales: dict[torch.dtype, Tensor] = field(default_factory=dict)
    grids: dict[torch.dtype, Grid] = field(default_factory=dict)


class Quantizer(nn.Module):
    """Rounds a tensor to the values that an INT8 kernel would see (symmetric, zero point 0, half to even).

    y = clip(round(x / scale), quant_min, quant_max) * scale with scale = amax / quant_max, as ONNX QuantizeLinear and
    DequantizeLinear compute it. Half and bfloat16 tensors are computed in float32 with the scale rounded to
    their dtype.

    Change amax in place (`copy_`) or through `load_state_dict`: its values are looked at only when it has changed.

    Attributes:
        spec: bits and channel axis.
        amax: the range, [] per tensor or [C] per channel, float32; NaN until it is calibrated.
        name: where the quantizer sits in its model, for messages.
        enabled: False makes the quantizer the identity, bit for bit.
        observer: called with the tensor while ranges are collected; the tensor then passes unchanged.
        follow: for weights in training: every forward pass sets amax to max|x|. A state dict taken after an optimizer
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
        self._checked: _Checked | None = None
        self._onnx: dict[torch.dtype, Tensor] | None = None
        self.register_buffer("amax", torch.full(() if channels is None else (channels,), float("nan")))

    @property
    def scale(self) -> Tensor:
        """The step between two neighbouring values, float32, shaped like amax."""
        return self.amax.detach() / self.spec.quant_max

    @property
    def active(self) -> bool:
        """False when the quantizer neither looks at its tensor nor changes it."""
        return self.enabled or self.observer is not None

    def learn_amax(self) -> None:
        """Turn amax into a parameter that is trained with the weights (LSQ); its state key stays.

        Raises:
            StepError: the range is per channel, or not set.
        """
        if self.spec.axis is not None:
            raise StepError("only a range per tensor can be learned", where=self.name)
        self.check()
        if not isinstance(self.amax, nn.Parameter):
            value = self.amax
            del self.amax
            self.amax = nn.Parameter(value)

    def forward(self, x: Tensor) -> Tensor:
        """Return x, of any shape, on the grid of the integers, in its own dtype."""
        if self.observer is not None:
            self.observer(x)
            return x
        if not self.enabled:
            return x
        if self._onnx is not None:
            return self._quantize_dequantize(x, self._onnx[x.dtype], self._onnx[torch.int8])
        if x.dtype is not torch.float32:
            return self._fake_quantize(x.float(), x.dtype).to(x.dtype)
        return self._fake_quantize(x, x.dtype)

    def check(self) -> None:
        """Raise StepError when a range is NaN, infinite, zero or negative; costs nothing while amax is unchanged."""
        self._known()

    def extra_repr(self) -> str:
        """Describe the grid: bits, axis, shape of amax."""
        return f"bits={self.spec.bits}, axis={self.spec.axis}, amax={tuple(self.amax.shape)}"

    def _fake_quantize(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        low, high, axis = self.spec.quant_min, self.spec.quant_max, self.spec.axis
        compiling = torch.compiler.is_compiling()
        if self.follow:
            with torch.no_grad():
                self.amax.copy_(max_abs(x, axis))
            if dtype is torch.float32 and not compiling:
                return fake_quantize_unclipped(x, _along(axis, self.scale, x))
        elif isinstance(self.amax, nn.Parameter) and self.training:
            scale = float(self.scale.clamp(min=SMALLEST_RANGE / high))
            return fake_quantize_learned(x, self.amax, grid_from_scale(scale, quant_min=low, quant_max=high))
        if self.follow or compiling:
            return fake_quantize_scaled(
                x, _along(axis, self._rounded_scale(dtype).float(), x), quant_min=low, quant_max=high
            )
        if axis is not None:
            return fake_quantize_scaled(x, _along(axis, self._scale(dtype), x), quant_min=low, quant_max=high)
        known = self._known()
        if dtype not in known.grids:
            known.grids[dtype] = grid_from_scale(float(self._scale(dtype)), quant_min=low, quant_max=high)
        return fake_quantize(x, known.grids[dtype])

    def _known(self) -> _Checked:
        known = self._checked
        if known is None or known.amax is not self.amax or known.version != self.amax._version:
            if not bool((torch.isfinite(self.amax) & (self.amax > 0)).all()):
                raise StepError(
                    "the range (amax) is not set, or not finite and positive",
                    where=self.name or "a quantizer",
                    fix="calibrate the model, or load a calibrated checkpoint",
                )
            known = self._checked = _Checked(self.amax, self.amax._version)
        return known

    def _scale(self, dtype: torch.dtype) -> Tensor:
        """Return the scale rounded to dtype, as float32."""
        known = self._known()
        if dtype not in known.scales:
            scale = self._rounded_scale(dtype).float()
            if not bool((scale > 0).all()):
                raise StepError(
                    f"the range (amax) {float(self.amax.min()):.3g} is too small for {dtype}",
                    where=self.name or "a quantizer",
                    fix="keep the layer in fp32",
                )
            known.scales[dtype] = scale
        return known.scales[dtype]

    def _rounded_scale(self, dtype: torch.dtype) -> Tensor:
        """Return the scale in dtype; that of a channel is not rounded to zero."""
        scale = self.scale.to(dtype)
        if dtype is torch.float16 and self.spec.axis is not None:
            return scale.clamp(min=SMALLEST_HALF)
        return scale

    def _quantize_dequantize(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        axis: dict[str, Any] = {} if self.spec.axis is None else {"axis": self.spec.axis}
        emit = torch.onnx.ops.symbolic
        quantized = emit("QuantizeLinear", (x, scale, zero_point), axis, dtype=torch.int8, shape=x.shape)
        return emit("DequantizeLinear", (quantized, scale, zero_point), axis, dtype=x.dtype, shape=x.shape)


def _along(axis: int | None, scale: Tensor, x: Tensor) -> Tensor:
    """Return the scale in a shape that broadcasts against x."""
    return scale if axis is None else scale.view([-1 if d == axis % x.dim() else 1 for d in range(x.dim())])


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """Return every quantizer by its module name, such as `layer1.0.conv1.input_quantizer`; shared ones once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Quantizer)}


def any_active(layer: nn.Module) -> bool:
    """Say whether one of a layer's own quantizers looks at its tensor or changes it."""
    return any(isinstance(child, Quantizer) and child.active for child in layer.children())


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
    """Make the quantizers emit ONNX QuantizeLinear and DequantizeLinear nodes while the model is traced.

    Run eagerly inside the block, the model computes zeros.

    Raises:
        StepError: a range was never set, or is not one of 8 bits.
    """
    active = {name: quantizer for name, quantizer in quantizers(model).items() if quantizer.enabled}
    for name, quantizer in active.items():
        quantizer.check()
        if quantizer.spec.bits != 8:
            raise StepError(f"{quantizer.spec.bits} bits cannot be exported, 8 can", where=amax_name(name))
    try:
        for quantizer in active.values():
            quantizer._onnx = _onnx_constants(quantizer)
        yield
    finally:
        for quantizer in active.values():
            quantizer._onnx = None


def _onnx_constants(quantizer: Quantizer) -> dict[torch.dtype, Tensor]:
    """Return the scale for every float dtype that its input may have, and the zero point under int8."""
    floats = (torch.float32, torch.float16, torch.bfloat16)
    constants = {dtype: quantizer._rounded_scale(dtype) for dtype in floats}
    return {**constants, torch.int8: torch.zeros_like(quantizer.amax, dtype=torch.int8)}
