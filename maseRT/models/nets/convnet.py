"""Small convolutional networks for digits, Fashion-MNIST and tests."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

from torch import Tensor, nn

from maseRT.models.nets.shapes import image_shape


def digits_cnn(*, num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """Three convolutions of 16, 32 and 32 channels, pooled twice, and a hidden layer of 64."""
    return _convnet(
        image_shape(input_shape, model="digits-cnn", smallest=4), (16, 32, 32), pooled=(2, 3), num_classes=num_classes
    )


def fashion_cnn(*, num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """Three convolutions of 16, 32 and 64 channels, each pooled, and a hidden layer of 64."""
    return _convnet(
        image_shape(input_shape, model="fashion-cnn", smallest=8),
        (16, 32, 64),
        pooled=(1, 2, 3),
        num_classes=num_classes,
    )


def _convnet(
    image: tuple[int, int, int], widths: tuple[int, ...], *, pooled: tuple[int, ...], num_classes: int
) -> nn.Sequential:
    """Build conv1, bn1, relu1, pool1, ... fc1, relu, fc2; `pooled` numbers the convolutions a pool follows."""
    channels, height, width = image
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (inputs, outputs) in enumerate(pairwise((channels, *widths)), start=1):
        layers[f"conv{number}"] = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        layers[f"bn{number}"] = nn.BatchNorm2d(outputs)
        layers[f"relu{number}"] = nn.ReLU()
        if number in pooled:
            layers[f"pool{number}"] = nn.MaxPool2d(2)
    shrink = 2 ** len(pooled)
    layers["flatten"] = nn.Flatten()
    layers["fc1"] = nn.Linear(widths[-1] * (height // shrink) * (width // shrink), 64)
    layers["relu"] = nn.ReLU()
    layers["fc2"] = nn.Linear(64, num_classes)
    return nn.Sequential(layers)


class ToyConvNet(nn.Module):
    """Conv2d 8-16, then Conv1d 32-64 over the flattened image, and a Linear; state names as in MASE's toy_convnet."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.block_1 = nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU())
        self.maxpool = nn.MaxPool2d(2)
        self.block_2 = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU())
        self.block_3 = nn.Sequential(nn.Conv1d(16, 32, 3, padding=1), nn.ReLU())
        self.block_4 = nn.Sequential(nn.Conv1d(32, 64, 3, padding=1), nn.ReLU())
        self.avgpool = nn.AdaptiveAvgPool1d(1)
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, num_classes] of images [N, C, H, W]."""
        x = self.block_2(self.maxpool(self.block_1(x)))
        x = self.block_4(self.block_3(x.flatten(2)))
        logits: Tensor = self.linear(self.avgpool(x).flatten(1))
        return logits


def toy_convnet(*, num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """Build MASE's toy_convnet for any number of channels."""
    channels, _, _ = image_shape(input_shape, model="toy-convnet", smallest=2)
    return ToyConvNet(channels, num_classes)
