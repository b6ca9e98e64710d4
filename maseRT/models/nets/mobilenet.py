"""MobileNetV2 and MobileNetV3-Small (Sandler et al., 2018; Howard et al., 2019) with torchvision's state names."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from maseRT.models.nets.resnet import Stem, checked_stem
from maseRT.models.nets.shapes import image_shape

Norm = Callable[[int], nn.Module]


def _conv(
    inputs: int,
    outputs: int,
    *,
    norm: Norm,
    activation: Callable[[], nn.Module] | None,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
) -> nn.Sequential:
    """Build a convolution, its norm (named 0 and 1) and its activation, padded to keep the size at stride 1."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)
    layers = [conv, norm(outputs)]
    return nn.Sequential(*layers, activation()) if activation else nn.Sequential(*layers)


def _divisible_by_8(channels: float) -> int:
    """Round to a multiple of 8 without losing more than 10 % (the papers' rule)."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


class InvertedResidual(nn.Module):
    """MobileNetV2's block: 1x1 expansion, depth-wise 3x3, linear 1x1 projection, a skip where shapes allow it."""

    def __init__(self, inputs: int, outputs: int, *, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers.append(_conv(inputs, hidden, norm=nn.BatchNorm2d, activation=nn.ReLU6))
        layers += [
            _conv(hidden, hidden, norm=nn.BatchNorm2d, activation=nn.ReLU6, kernel=3, stride=stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        self.conv = nn.Sequential(*layers)
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, outputs, H / stride, W / stride]."""
        out: Tensor = self.conv(x)
        return x + out if self.skip else out


class MobileNetV2(nn.Module):
    """17 inverted residuals between two convolutions, global average pooling, dropout and a Linear."""

    # expansion, channels, repeats, stride of the first
    STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self, *, channels: int, num_classes: int, stem_stride: int, dropout: float) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            _conv(channels, 32, norm=nn.BatchNorm2d, activation=nn.ReLU6, kernel=3, stride=stem_stride)
        ]
        inputs = 32
        for expansion, outputs, repeats, stride in self.STAGES:
            for position in range(repeats):
                first = stride if position == 0 else 1
                layers.append(InvertedResidual(inputs, outputs, stride=first, expansion=expansion))
                inputs = outputs
        layers.append(_conv(inputs, 1280, norm=nn.BatchNorm2d, activation=nn.ReLU6))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(1280, num_classes))
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, num_classes] of images [N, C, H, W]."""
        logits: Tensor = self.classifier(self.avgpool(self.features(x)).flatten(1))
        return logits


class SqueezeExcitation(nn.Module):
    """Scale every channel by a gate computed from the channels' means (Hu et al., 2018)."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.activation = nn.ReLU()
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.scale_activation = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """Return x scaled, same shape."""
        gate: Tensor = self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(x)))))
        return gate * x


def _norm_v3(channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels, eps=0.001, momentum=0.01)


class InvertedResidualV3(nn.Module):
    """MobileNetV3's block: expansion, depth-wise convolution, squeeze and excitation, linear projection, skip."""

    def __init__(
        self, inputs: int, outputs: int, *, hidden: int, kernel: int, stride: int, squeeze: bool, hardswish: bool
    ) -> None:
        super().__init__()
        activation = nn.Hardswish if hardswish else nn.ReLU
        layers: list[nn.Module] = []
        if hidden != inputs:
            layers.append(_conv(inputs, hidden, norm=_norm_v3, activation=activation))
        layers.append(
            _conv(hidden, hidden, norm=_norm_v3, activation=activation, kernel=kernel, stride=stride, groups=hidden)
        )
        if squeeze:
            layers.append(SqueezeExcitation(hidden, _divisible_by_8(hidden // 4)))
        layers.append(_conv(hidden, outputs, norm=_norm_v3, activation=None))
        self.block = nn.Sequential(*layers)
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, outputs, H / stride, W / stride]."""
        out: Tensor = self.block(x)
        return out + x if self.skip else out


class MobileNetV3Small(nn.Module):
    """11 inverted residuals between two convolutions, global average pooling and two Linear layers."""

    # kernel, hidden, outputs, squeeze, hardswish, stride
    BLOCKS = (
        (3, 16, 16, True, False, 2),
        (3, 72, 24, False, False, 2),
        (3, 88, 24, False, False, 1),
        (5, 96, 40, True, True, 2),
        (5, 240, 40, True, True, 1),
        (5, 240, 40, True, True, 1),
        (5, 120, 48, True, True, 1),
        (5, 144, 48, True, True, 1),
        (5, 288, 96, True, True, 2),
        (5, 576, 96, True, True, 1),
        (5, 576, 96, True, True, 1),
    )

    def __init__(self, *, channels: int, num_classes: int, stem_stride: int, dropout: float) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            _conv(channels, 16, norm=_norm_v3, activation=nn.Hardswish, kernel=3, stride=stem_stride)
        ]
        inputs = 16
        for kernel, hidden, outputs, squeeze, hardswish, stride in self.BLOCKS:
            layers.append(
                InvertedResidualV3(
                    inputs, outputs, hidden=hidden, kernel=kernel, stride=stride, squeeze=squeeze, hardswish=hardswish
                )
            )
            inputs = outputs
        layers.append(_conv(inputs, 576, norm=_norm_v3, activation=nn.Hardswish))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(576, 1024), nn.Hardswish(), nn.Dropout(dropout), nn.Linear(1024, num_classes)
        )
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, num_classes] of images [N, C, H, W]."""
        logits: Tensor = self.classifier(self.avgpool(self.features(x)).flatten(1))
        return logits


def _initialize(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.01)
            nn.init.zeros_(module.bias)


def _stem_stride(stem: Stem) -> int:
    return 1 if checked_stem(stem) == "small" else 2


def mobilenetv2(
    *, num_classes: int, input_shape: tuple[int, ...], stem: Stem = "imagenet", dropout: float = 0.2
) -> nn.Module:
    """Build MobileNetV2 of width 1.

    Args:
        num_classes: outputs.
        input_shape: [C, H, W]; any size of 1 or more.
        stem: "imagenet" halves the image in the first convolution, "small" does not (images of about 32x32).
        dropout: before the Linear, while training.

    Raises:
        ValueError: no such stem, or no probability.
    """
    channels, _, _ = image_shape(input_shape, model="mobilenetv2")
    return MobileNetV2(channels=channels, num_classes=num_classes, stem_stride=_stem_stride(stem), dropout=dropout)


def mobilenetv3_small(
    *, num_classes: int, input_shape: tuple[int, ...], stem: Stem = "imagenet", dropout: float = 0.2
) -> nn.Module:
    """Build MobileNetV3-Small of width 1; see `mobilenetv2` for the arguments."""
    channels, _, _ = image_shape(input_shape, model="mobilenetv3-small")
    return MobileNetV3Small(channels=channels, num_classes=num_classes, stem_stride=_stem_stride(stem), dropout=dropout)
