"""The user's side of two cases: models of one's own, and a plug-in for a layer type that maseRT does not know."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

CONVOLUTIONS = "model_cases.same_padding"
"""The plug-in of `efficientnet_lite0`."""


def prelu_cnn(width: int = 16) -> nn.Module:
    """Build a CNN for 1x28x28 images in 10 classes, with learned slopes per channel (PReLU)."""
    layers: list[nn.Module] = []
    channels = 1
    for step in range(3):
        layers += [
            nn.Conv2d(channels, width << step, 3, padding=1, bias=False),
            nn.BatchNorm2d(width << step),
            nn.PReLU(width << step),
        ]
        layers += [nn.MaxPool2d(2)] if step < 2 else []
        channels = width << step
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def efficientnet_lite0() -> nn.Module:
    """Build EfficientNet-lite0 as the package efficientnet-lite-pytorch has it, layers of its own included.

    Stochastic depth is off: its operations run in training only, which would keep the residual adds next to them from
    being quantized (the plan says so).
    """
    from efficientnet_lite_pytorch import EfficientNet

    model: nn.Module = EfficientNet.from_name("efficientnet-lite0", drop_connect_rate=0.0)
    return model


def padded_convolution(layer: nn.Module, x: Tensor) -> Tensor:
    """Compute what Conv2dStaticSamePadding does, through the layer's quantizers."""
    x = layer.input_quantizer(layer.static_padding(x))
    return F.conv2d(x, layer.weight_quantizer(layer.weight), layer.bias, layer.stride, 0, layer.dilation, layer.groups)
