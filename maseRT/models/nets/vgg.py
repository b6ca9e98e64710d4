"""The CIFAR-10 VGG of ternary-weight papers, as the MASE project has it."""

from __future__ import annotations

from torch import Tensor, nn

from maseRT.models.nets.shapes import image_shape


class VGG7(nn.Module):
    """Three stages of two convolutions with BatchNorm, each stage pooled; three Linear layers.

    State names are those of MASE's vgg7, so that its checkpoints load.
    """

    def __init__(self, image: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = image
        layers: list[nn.Module] = []
        for outputs in (128, 256, 512):
            for inputs in (channels, outputs):
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
            channels = outputs
        self.feature_layers = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Linear(512 * (height // 8) * (width // 8), 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU()
        )
        self.last_layer = nn.Linear(1024, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, num_classes] of images [N, C, H, W]."""
        logits: Tensor = self.last_layer(self.classifier(self.feature_layers(x).flatten(1)))
        return logits


def vgg7(*, num_classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """Build VGG7; sides are halved three times."""
    return VGG7(image_shape(input_shape, model="vgg7", smallest=8), num_classes)
