"""Shift the biases of quantized layers so that their mean outputs are what they were in float."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from maseRT.plan import Plan
from maseRT.precision import Precision
from maseRT.quant.quantizer import quantizers_off

Hook = Callable[[str, nn.Module, Tensor], Tensor | None]


def correct_biases(model: nn.Module, plan: Plan, inputs: Tensor) -> dict[str, Tensor]:
    """Correct the biases of a calibrated model's INT8 layers, in place, and return what was there before.

    Rounded weights and clipped activations shift the mean of a layer's outputs; what is shifted is subtracted from the
    bias, per output channel. Layers are corrected in the order in which they run, each on inputs that come from
    corrected layers: the empirical bias correction of Nagel, van Baalen, Blankevoort and Welling, Data-Free
    Quantization Through Weight Equalization and Bias Correction, ICCV 2019, appendix D. It takes two forward passes,
    since each layer hands its corrected output on.

    Layers without a bias, and those that a forward pass reaches more than once, are left alone.

    Args:
        model: fake-quantized, with all ranges, in eval mode.
        plan: of the model.
        inputs: [N, ...] calibration data; all of it is run as one batch.

    Returns:
        Layer name -> its bias [C] before the correction; `restore_biases` takes it back.
    """
    layers = _layers(model, plan)
    means: dict[str, list[Tensor]] = {name: [] for name in layers}

    def remember(name: str, layer: nn.Module, output: Tensor) -> None:
        means[name].append(_channel_means(layer, output))

    with torch.no_grad(), quantizers_off(model), _hooked(layers, remember):
        model(inputs)
    once = {name: layer for name, layer in layers.items() if len(means[name]) == 1}
    before: dict[str, Tensor] = {}

    def correct(name: str, layer: nn.Module, output: Tensor) -> Tensor:
        shift = means[name][0] - _channel_means(layer, output)
        before[name] = _bias(layer).detach().clone()
        _bias(layer).add_(shift)
        return output + shift.reshape(
            [-1 if axis == _channel_axis(layer, output) else 1 for axis in range(output.dim())]
        )

    with torch.no_grad(), _hooked(once, correct):
        model(inputs)
    return before


def restore_biases(model: nn.Module, biases: Mapping[str, Tensor]) -> None:
    """Give layers the biases [C] that `correct_biases` returned, by layer name."""
    with torch.no_grad():
        for name, bias in biases.items():
            _bias(model.get_submodule(name)).copy_(bias)


def _layers(model: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    """Return the INT8 layers with one weight and one bias, by name; LSTMs and attention have several."""
    named = {layer.name: model.get_submodule(layer.name) for layer in plan.layers if layer.precision is Precision.INT8}
    return {
        name: layer
        for name, layer in named.items()
        if isinstance(getattr(layer, "weight", None), Tensor) and isinstance(getattr(layer, "bias", None), Tensor)
    }


@contextmanager
def _hooked(layers: Mapping[str, nn.Module], hook: Hook) -> Iterator[None]:
    def calling(name: str) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
        return lambda layer, arguments, output: hook(name, layer, output)

    handles = [layer.register_forward_hook(calling(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _channel_axis(layer: nn.Module, output: Tensor) -> int:
    return output.dim() - 1 if isinstance(layer, nn.Linear) else 1


def _channel_means(layer: nn.Module, output: Tensor) -> Tensor:
    """Return the mean output of every channel, [C]."""
    channel = _channel_axis(layer, output)
    others = [axis for axis in range(output.dim()) if axis != channel]
    return output.mean(dim=others, dtype=torch.float64).to(output.dtype)


def _bias(layer: nn.Module) -> Tensor:
    return cast(Tensor, layer.bias)
