"""Which tensors can never be negative, checked by structure and by running."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maseRT.quant.nonnegative import nonnegative_nodes
from maseRT.quant.trace import record


class Net(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function
        self.relu6 = nn.ReLU6()
        self.pool = nn.AvgPool2d(2)
        self.hard = nn.Hardtanh(0, 4)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear")
        self.bicubic = nn.Upsample(scale_factor=2, mode="bicubic")
        self.swish = nn.Hardswish()

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


NEVER = [
    lambda net, x: F.relu(x),
    lambda net, x: net.pool(net.relu6(x)),
    lambda net, x: net.hard(x),
    lambda net, x: x.softmax(1).flatten(1),
    lambda net, x: torch.cat([x.sigmoid(), x.abs()], 1),
    lambda net, x: x.clamp(min=0) + F.relu(x) * 2,
    lambda net, x: torch.clamp(x, 0.0, 6.0)[:, :1],
    lambda net, x: net.up(F.relu(x)),
    lambda net, x: F.max_pool2d(F.hardsigmoid(x), 2).mean((2, 3)),
    lambda net, x: F.interpolate(F.relu(x), scale_factor=2, mode="nearest"),
]
SOMETIMES = [
    lambda net, x: x + 1,
    lambda net, x: x.clamp(max=0),
    lambda net, x: F.relu(x) - 1,
    lambda net, x: F.relu(x) * -1,
    lambda net, x: torch.cat([F.relu(x), x], 1),
    lambda net, x: net.swish(x),
    lambda net, x: net.bicubic(F.relu(x)),
    lambda net, x: F.relu(x) + torch.full((), -1.0),
]


def is_nonnegative(function: object) -> bool:
    graph = record(Net(function).eval(), torch.randn(2, 3, 4, 4))
    return graph.nodes[-1].operands[0].source in nonnegative_nodes(graph)


@pytest.mark.parametrize("function", NEVER)
def test_never_negative(function: object) -> None:
    assert is_nonnegative(function)
    assert Net(function)(torch.randn(8, 3, 8, 8) * 10).min() >= 0


@pytest.mark.parametrize("function", SOMETIMES)
def test_sometimes_negative(function: object) -> None:
    assert not is_nonnegative(function)
    assert Net(function)(torch.randn(8, 3, 8, 8) * 10).min() < 0
