"""Networks on digits, built and trained with NVIDIA's pytorch-quantization."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from maseRT.config import PrecisionRule, QuantizeSection
from maseRT.precision import Precision

quant_nn = pytest.importorskip("pytorch_quantization.nn")
quant_modules = pytest.importorskip("pytorch_quantization.quant_modules")

LIBRARY = QuantizeSection(backend="pytorch-quantization")


class Residual(nn.Module):
    """A block with a shortcut and BatchNorm; its shortcut takes a quantizer when the library trains it."""

    def __init__(self, residual_quantizer: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8 * 64, 10)
        if residual_quantizer is not None:
            self.residual_quantizer = residual_quantizer

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn0(self.stem(x)))
        skip = self.residual_quantizer(x) if hasattr(self, "residual_quantizer") else x
        x = torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + skip)
        return self.fc(x.flatten(1))


class Plain(nn.Module):
    """Convolutions of several kinds without BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.wide = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2)
        self.pool = nn.AvgPool2d(2)
        self.fc = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(torch.relu(self.wide(torch.relu(self.conv(x))))).flatten(1))


class Rows(nn.Module):
    """An LSTM over the rows of an image, and a cell on its last output."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 6, batch_first=True, **options)
        self.cell = nn.LSTMCell(6 * (2 if options.get("bidirectional") else 1), 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(self.lstm(x.squeeze(1))[0][:, -1])[0]


class Upsampling(nn.Module):
    """A transposed convolution with as many inputs as outputs, and BatchNorm."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8 * 256, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.bn(self.up(torch.relu(self.conv(x))))).flatten(1))


@dataclass(frozen=True)
class Digits:
    """512 images of handwritten digits, [512, 1, 8, 8] in [0, 1], and their labels."""

    images: Tensor
    labels: Tensor

    @classmethod
    def load(cls) -> "Digits":
        data = load_digits()
        images = torch.from_numpy(data.images).float().unsqueeze(1) / 16
        return cls(images[:512], torch.from_numpy(data.target).long()[:512])


@contextmanager
def library_modules() -> Iterator[None]:
    """Build torch.nn layers as the library's, as its users do."""
    quant_modules.initialize()
    try:
        yield
    finally:
        quant_modules.deactivate()


def library_quantizers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, quant_nn.TensorQuantizer)]


def trained(build: Callable[[], nn.Module], digits: Digits, steps: int = 24) -> nn.Module:
    """A model that the library calibrated and then trained; the weights have left the ranges that they had."""
    with library_modules():
        model = build()
    return train(model, digits, steps)


def train(model: nn.Module, digits: Digits, steps: int = 24) -> nn.Module:
    for quantizer in library_quantizers(model):
        quantizer.disable_quant()
        quantizer.enable_calib()
    with torch.no_grad():
        model(digits.images[:128])
    for quantizer in library_quantizers(model):
        quantizer.load_calib_amax()
        quantizer.disable_calib()
        quantizer.enable_quant()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        part = slice(step % 8 * 64, step % 8 * 64 + 64)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(digits.images[part]), digits.labels[part]).backward()
        optimizer.step()
    return model.eval()


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(x)


def sqnr_db(expected: Tensor, got: Tensor) -> float:
    return float(10 * torch.log10(expected.double().square().sum() / (expected - got).double().square().sum()))


def rule(name: str, precision: Precision = Precision.FP32) -> QuantizeSection:
    return QuantizeSection(rules=(PrecisionRule(name=name, precision=precision),))
