"""ResNet-18 and ResNet-50 (He et al., 2015) with torchvision's state names, so that its checkpoints load."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from maseRT.models.nets.shapes import image_shape

Stem = Literal["imagenet", "small"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a skip."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _downsample(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, width, H / stride, W / stride]."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        skip = x if self.downsample is None else self.downsample(x)
        activated: Tensor = self.relu(out + skip)
        return activated


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolutions and a skip."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.relu = nn.ReLU()
        self.downsample = _downsample(inputs, width * self.expansion, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, 4 * width, H / stride, W / stride]."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        skip = x if self.downsample is None else self.downsample(x)
        activated: Tensor = self.relu(out + skip)
        return activated


Block = type[BasicBlock] | type[Bottleneck]


def _downsample(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))


def _stage(block: Block, inputs: int, width: int, depth: int, *, stride: int) -> nn.Sequential:
    """Build `depth` blocks; the first takes the stride and the change of channels."""
    first = block(inputs, width, stride)
    return nn.Sequential(first, *(block(width * block.expansion, width, 1) for _ in range(depth - 1)))


class ResNet(nn.Module):
    """A stem, four stages of residual blocks, global average pooling and a Linear."""

    def __init__(
        self,
        block: Block,
        depths: tuple[int, int, int, int],
        *,
        channels: int,
        num_classes: int,
        stem: Stem,
    ) -> None:
        super().__init__()
        small = stem == "small"
        self.conv1 = nn.Conv2d(
            channels, 64, 3 if small else 7, stride=1 if small else 2, padding=1 if small else 3, bias=False
        )
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.maxpool: nn.Module = nn.Identity() if small else nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = _stage(block, 64, 64, depths[0], stride=1)
        self.layer2 = _stage(block, 64 * block.expansion, 128, depths[1], stride=2)
        self.layer3 = _stage(block, 128 * block.expansion, 256, depths[2], stride=2)
        self.layer4 = _stage(block, 256 * block.expansion, 512, depths[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, num_classes] of images [N, C, H, W]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


def resnet18(*, num_classes: int, input_shape: tuple[int, ...], stem: Stem = "imagenet") -> nn.Module:
    """Build ResNet-18.

    Args:
        num_classes: outputs.
        input_shape: [C, H, W]; any size of 1 or more.
        stem: "imagenet" is torchvision's 7x7 convolution with stride 2 and a pool; "small" is the usual 3x3
            convolution with stride 1 for images of about 32x32 (conv1.weight then has another shape).

    Raises:
        ValueError: no such stem.
    """
    channels, _, _ = image_shape(input_shape, model="resnet18")
    return ResNet(BasicBlock, (2, 2, 2, 2), channels=channels, num_classes=num_classes, stem=checked_stem(stem))


def resnet50(*, num_classes: int, input_shape: tuple[int, ...], stem: Stem = "imagenet") -> nn.Module:
    """Build ResNet-50; see `resnet18` for the arguments."""
    channels, _, _ = image_shape(input_shape, model="resnet50")
    return ResNet(Bottleneck, (3, 4, 6, 3), channels=channels, num_classes=num_classes, stem=checked_stem(stem))


def checked_stem(stem: Stem) -> Stem:
    """Return the stem.

    Raises:
        ValueError: it is neither "imagenet" nor "small".
    """
    if stem not in ("imagenet", "small"):
        raise ValueError(f'stem is "imagenet" or "small", not {stem!r}')
    return stem
