"""Small networks, one per question that placement has to answer, and how the tests prepare them."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maseRT.config import QuantizeSection
from maseRT.onnx_export import export_onnx
from maseRT.plan import Plan
from maseRT.quant import make_plan, quantize_model, set_float_precisions
from maseRT.quant.observe import load_amax, observe
from maseRT.runtimes.onnxruntime import OnnxRuntime


def conv_bn_relu(inputs: int, outputs: int, kernel: int = 1, *, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class BasicBlock(nn.Module):
    """ResNet's: its one ReLU runs twice, and the sum is written in place."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += skip
        return self.relu(out)


class ResNet(nn.Module):
    """Stem, one block without and one with downsampling, head; images [N, 3, 16, 16]."""

    input_shape = (3, 16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(BasicBlock(16, 16))
        self.layer2 = nn.Sequential(BasicBlock(16, 32, 2))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(32, 600)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(self.layer2(self.layer1(x))), 1))


class Inception(nn.Module):
    """Three branches, one behind a functional max pool, concatenated twice; images [N, 3, 8, 8]."""

    input_shape = (3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 16, 3)
        self.a = conv_bn_relu(16, 8)
        self.b = nn.Sequential(conv_bn_relu(16, 8), conv_bn_relu(8, 16, 3))
        self.c = conv_bn_relu(16, 8)
        self.out1 = conv_bn_relu(32, 16, 3)
        self.out2 = conv_bn_relu(32, 8)
        self.fc = nn.Linear(24 * 64, 20)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([self.a(x), self.b(x), self.c(F.max_pool2d(x, 3, 1, 1))], 1)
        return self.fc(torch.cat((self.out1(x), self.out2(x)), dim=1).flatten(1))


class SqueezeExcitation(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, 8, 1)
        self.fc2 = nn.Conv2d(8, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True))))
        return x * torch.sigmoid(gate)


class MobileBlock(nn.Module):
    """Depth-wise convolution, squeeze and excitation, a linear projection added to its input, PReLU; [N, 3, 8, 8]."""

    input_shape = (3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 16, 3)
        self.depthwise = conv_bn_relu(16, 16, 3, groups=16)
        self.se = SqueezeExcitation(16)
        self.project = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.act = nn.PReLU()
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.project(self.se(self.depthwise(x)))
        return self.fc(self.act(x).mean((2, 3)))


class SequenceNet(nn.Module):
    """Conv1d, a bidirectional LSTM, a Linear; series [N, 12, 9]."""

    input_shape = (12, 9)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(12, 32, 3, padding="same")
        self.bn = nn.BatchNorm1d(32)
        self.lstm = nn.LSTM(32, 16, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(32, 600)

    def forward(self, x: Tensor) -> Tensor:
        steps, _ = self.lstm(F.relu(self.bn(self.conv(x))).transpose(1, 2))
        return self.fc(steps[:, -1])


class Encoder(nn.Module):
    """A TransformerEncoderLayer over tokens [N, 6, 32]."""

    input_shape = (6, 32)

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(6, 32) * 0.1)
        self.layers = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(32, 2, 128, dropout=0.0, batch_first=True, norm_first=True),
            1,
            enable_nested_tensor=False,
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x + self.positions).mean(1))


class SharedLayer(nn.Module):
    """One Linear under two names; vectors [N, 160]."""

    input_shape = (160,)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(160, 160)
        self.body = nn.Sequential(nn.ReLU(), self.first, nn.PReLU())
        self.last = nn.Linear(160, 160)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self.first(x)))


class Branching(nn.Module):
    """Its operations depend on the data; images [N, 3, 8, 8]."""

    input_shape = (3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8 * 64, 64)

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            x = -x
        y = self.stem(x)
        return self.fc((y + self.conv(y)).flatten(1))


NETS = {net.__name__: net for net in (ResNet, Inception, MobileBlock, SequenceNet, Encoder, SharedLayer)}


def lively(net: nn.Module) -> nn.Module:
    """Return the net in eval mode with BatchNorm statistics that are worth folding."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return net.eval()


def batch(net: nn.Module, size: int = 8) -> Tensor:
    return torch.randn(size, *net.input_shape)


def planned(net: nn.Module, **settings: object) -> Plan:
    section = QuantizeSection.model_validate(settings)
    return make_plan(net, batch(net, 2), section, model_name=type(net).__name__)


def calibrated(net: nn.Module, plan: Plan) -> nn.Module:
    """Return the quantized net with max ranges, in the plan's float precisions."""
    quantize_model(net, plan, master_weights=True)
    if plan.has_int8:
        with torch.no_grad(), observe(net) as histograms:
            net(batch(net, 32))
        peaks = {name: h.max if h.spec.axis is not None else h.max[0] for name, h in histograms.items()}
        for tie in plan.ties:
            peaks |= dict.fromkeys(tie, torch.stack([peaks[name] for name in tie]).max())
        load_amax(net, peaks)
    set_float_precisions(net, plan)
    return net


def exported(net: nn.Module, path: Path) -> Path:
    export_onnx(net, batch(net, 2), path, opset=20)
    return path


def in_onnxruntime(path: Path, x: Tensor, *, optimize: bool) -> Tensor:
    with OnnxRuntime().open(path, "cpu", threads=1, optimization="all" if optimize else "disabled") as session:
        return torch.from_numpy(session.infer({"input": x.numpy()})["output"])


def sqnr_db(reference: Tensor, other: Tensor) -> float:
    noise = (other - reference).double().square().sum().clamp(min=1e-30)
    return float(10 * torch.log10(reference.double().square().sum() / noise))
