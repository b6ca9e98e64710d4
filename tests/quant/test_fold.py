"""Folding: a layer and its BatchNorm become one layer that computes the same."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from placement_nets import lively, planned
from torch import Tensor, nn

from maseRT.errors import UsageError
from maseRT.plan import Fold
from maseRT.precision import Precision
from maseRT.quant import LAYERS, quantize_model, quantizers_off, register
from maseRT.quant.fold import fold_batchnorm, fold_refusal, folded

CASES = [
    (nn.Linear(6, 8), nn.BatchNorm1d(8), (5, 6)),
    (nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), (5, 6)),
    (nn.Conv1d(4, 8, 3, groups=2), nn.BatchNorm1d(8), (2, 4, 9)),
    (nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8), (2, 4, 9, 9)),
    (nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8, affine=False), (2, 4, 9, 9)),
    (nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), (2, 2, 5, 5, 5)),
    (nn.ConvTranspose1d(4, 6, 3, stride=2), nn.BatchNorm1d(6), (2, 4, 9)),
    (nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    (nn.ConvTranspose3d(4, 4, 2, groups=4), nn.BatchNorm3d(4), (2, 4, 3, 3, 3)),
]


@pytest.mark.parametrize(("layer", "batchnorm", "shape"), CASES, ids=lambda case: str(case)[:60])
def test_a_folded_layer_computes_what_the_two_did(
    layer: nn.Module, batchnorm: nn.Module, shape: tuple[int, ...]
) -> None:
    if batchnorm.affine:
        lively(batchnorm)
    net = nn.Sequential(layer, batchnorm).eval()
    x = torch.randn(shape)
    before = net(x)
    fold_batchnorm(net, "0", "1")
    torch.testing.assert_close(net(x), before, rtol=1e-5, atol=1e-5)
    assert set(net.state_dict()) == {"0.weight", "0.bias"}


def test_the_folded_weights_are_known_without_changing_the_layer() -> None:
    layer, batchnorm = nn.Conv2d(3, 4, 1), lively(nn.BatchNorm2d(4))
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    weight, bias = folded(layer, batchnorm)
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())
    net = nn.Sequential(layer, batchnorm)
    fold_batchnorm(net, "0", "1")
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer.bias, bias)


def test_a_weight_that_another_layer_shares_stays_as_it_is_there() -> None:
    net = nn.Sequential(nn.Linear(6, 6), lively(nn.BatchNorm1d(6)), nn.Linear(6, 6), lively(nn.BatchNorm1d(6))).eval()
    net[2].weight = net[0].weight
    x = torch.randn(5, 6)
    before = net(x)
    fold_batchnorm(net, "0", "1")
    fold_batchnorm(net, "2", "3")
    torch.testing.assert_close(net(x), before, rtol=1e-5, atol=1e-5)


class ActivatedBatchNorm(nn.BatchNorm2d):
    """A BatchNorm with an activation inside, as libraries of models have it."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input))


@pytest.mark.parametrize(
    ("layer", "batchnorm", "reason"),
    [
        (nn.ReLU(), nn.BatchNorm2d(4), "follows a ReLU"),
        (nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), "no running statistics"),
        (nn.Conv2d(3, 4, 1), nn.BatchNorm2d(8), "8 channels of 4"),
        (nn.Conv2d(3, 4, 1), ActivatedBatchNorm(4), "code of its own"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4), "Parametrized"),
        (nn.utils.spectral_norm(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4), "is computed"),
    ],
)
def test_what_cannot_be_folded(layer: nn.Module, batchnorm: nn.Module, reason: str) -> None:
    assert reason in str(fold_refusal(layer, batchnorm))
    with pytest.raises(UsageError, match="cannot be folded"):
        fold_batchnorm(nn.Sequential(layer, batchnorm), "0", "1")


class PaddedConv2d(nn.Conv2d):
    """A convolution of one's own that pads on one side only."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias)


class QuantPaddedConv2d(PaddedConv2d):
    def forward(self, x: Tensor) -> Tensor:
        x = self.input_quantizer(F.pad(x, (0, 1, 0, 1)))
        return F.conv2d(x, self.weight_quantizer(self.weight), self.bias)


class PaddedNet(nn.Sequential):
    input_shape = (3, 8, 8)


@pytest.fixture
def _table() -> Iterator[None]:
    yield
    LAYERS.pop(PaddedConv2d, None)


@pytest.mark.parametrize("folds", [True, False])
@pytest.mark.usefixtures("_table")
def test_a_layer_of_ones_own_says_whether_it_folds(folds: bool) -> None:
    register(PaddedConv2d, QuantPaddedConv2d, weights={"weight": 0}, folds_batchnorm=folds)
    net = lively(PaddedNet(PaddedConv2d(3, 8, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU()))
    x = torch.randn(4, *PaddedNet.input_shape)
    wanted, plan = net(x), planned(net)
    assert plan.of("0").precision is Precision.INT8
    assert plan.folds == ((Fold("0", "1"),) if folds else ())
    quantize_model(net, plan)
    with quantizers_off(net):
        torch.testing.assert_close(net(x), wanted, rtol=1e-5, atol=1e-5)


class LinearNorm(nn.Module):
    """A linear layer over tokens [N, L, C] with a BatchNorm over its channels, as LeViT has it."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, outputs, bias=False)
        self.bn = nn.BatchNorm1d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return self.bn(x.flatten(0, 1)).reshape_as(x)


class TokenNet(nn.Module):
    input_shape = (6, 16)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = LinearNorm(16, 64), LinearNorm(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.second(F.hardswish(self.first(x)))).mean(1)


class Merged(TokenNet):
    """Its BatchNorm normalizes tokens and channels as one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(16, 16), nn.BatchNorm1d(96)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.linear(x).flatten(1))


class ReadTwice(TokenNet):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first.linear(x)
        return (self.first.bn(hidden.flatten(0, 1)).reshape_as(hidden) + hidden).mean(1)


class Behind(nn.Module):
    """A convolution, what is between it and its BatchNorm, and the BatchNorm."""

    def __init__(self, between: Callable[[Tensor], Tensor], batchnorm: nn.Module, size: int = 8) -> None:
        super().__init__()
        self.input_shape = (3, size, size)
        self.conv, self.between, self.bn = nn.Conv2d(3, 8, 3), between, batchnorm

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.between(self.conv(x))))


def test_a_batchnorm_over_tokens_is_folded() -> None:
    net = lively(TokenNet())
    x = torch.randn(4, *TokenNet.input_shape)
    wanted, plan = net(x), planned(net)
    assert plan.folds == (Fold("first.linear", "first.bn"), Fold("second.linear", "second.bn"))
    quantize_model(net, plan)
    with quantizers_off(net):
        torch.testing.assert_close(net(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "net",
    [
        lambda: Behind(nn.Identity(), nn.BatchNorm2d(8)),
        lambda: Behind(nn.Dropout(0.5), nn.BatchNorm2d(8)),
        lambda: Behind(nn.Sequential(nn.Identity(), nn.Dropout2d(0.5)), nn.BatchNorm2d(8)),
        lambda: Behind(lambda x: x.contiguous(), nn.BatchNorm2d(8)),
        lambda: Behind(lambda x: x.flatten(2), nn.BatchNorm1d(8)),
        lambda: Behind(nn.Flatten(), nn.BatchNorm1d(8), size=3),
    ],
    ids=["identity", "dropout", "both", "contiguous", "pixels in a row", "one pixel"],
)
def test_a_batchnorm_is_folded_behind_what_keeps_the_channels(net: Callable[[], nn.Module]) -> None:
    net = lively(net())
    x = torch.randn(4, *net.input_shape)
    wanted, plan = net(x), planned(net)
    assert [fold.layer for fold in plan.folds] == ["conv"]
    quantize_model(net, plan)
    with quantizers_off(net):
        torch.testing.assert_close(net(x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("between", "batchnorm", "reason"),
    [
        (lambda x: x.transpose(1, 2), nn.BatchNorm2d(6), "follows the operation transpose"),
        (lambda x: x.reshape(-1, 6), nn.BatchNorm1d(6), "6 channels of 8"),
        (lambda x: x.reshape(-1, 8), nn.BatchNorm1d(8), "follows the operation reshape"),
        (lambda x: F.dropout(x, 0.0), nn.BatchNorm2d(8), "follows the operation dropout"),  # it may drop in eval mode
    ],
)
def test_a_batchnorm_stays_behind_what_mixes_the_channels(
    between: Callable[[Tensor], Tensor], batchnorm: nn.Module, reason: str
) -> None:
    plan = planned(lively(Behind(between, batchnorm)))
    assert plan.folds == ()
    assert reason in plan.of("bn").reason


@pytest.mark.parametrize(
    ("net", "reason"), [(Merged, "follows the operation flatten"), (ReadTwice, "something else reads")]
)
def test_a_batchnorm_over_something_else_stays(net: type[nn.Module], reason: str) -> None:
    plan = planned(lively(net()))
    assert plan.folds == ()
    assert any(reason in layer.reason for layer in plan.layers if layer.type == "BatchNorm1d")
