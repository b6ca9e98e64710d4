"""The table of layers: twins off equal their layers bit for bit, on they err within bounds; registering, refusing."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from layer_cases import quantized, tensors
from torch import Tensor, nn
from torch.nn.utils import prune

from maseRT.errors import StepError, UsageError
from maseRT.precision import QuantSpec
from maseRT.quant import (
    LAYERS,
    Quantizer,
    default_specs,
    operands,
    quantize_layer,
    quantizers,
    quantizers_off,
    refusal,
    register,
)

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
POOLS = {
    "MaxPool": {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d},
    "AvgPool": {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d},
    "AdaptiveMaxPool": {1: nn.AdaptiveMaxPool1d, 2: nn.AdaptiveMaxPool2d, 3: nn.AdaptiveMaxPool3d},
    "AdaptiveAvgPool": {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d},
}
Case = tuple[nn.Module, Tensor]


@st.composite
def linears(draw: st.DrawFn) -> Case:
    layer = nn.Linear(draw(st.integers(1, 9)), draw(st.integers(1, 9)), bias=draw(st.booleans()))
    lead = draw(st.lists(st.integers(1, 4), max_size=3))
    return layer, torch.randn(*lead, layer.in_features) * draw(st.sampled_from([1e-3, 1.0, 100.0]))


@st.composite
def convs(draw: st.DrawFn) -> Case:
    rank = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 3))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    dilation = draw(st.integers(1, 2))
    string = draw(st.sampled_from([None, "same", "valid"]))
    padding = string or tuple(draw(st.integers(0, 2)) for _ in range(rank))
    layer = CONVS[rank](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 3)),
        kernel,
        stride=1 if string == "same" else draw(st.integers(1, 2)),
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    )
    batch = (2,) if draw(st.booleans()) else ()
    return layer, torch.randn(*batch, layer.in_channels, *[draw(st.integers(6, 8)) for _ in range(rank)])


@st.composite
def transposed_convs(draw: st.DrawFn) -> Case:
    rank = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 3))
    stride, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    layer = TRANSPOSED[rank](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 3)),
        tuple(draw(st.integers(1, 3)) for _ in range(rank)),
        stride=stride,
        padding=draw(st.integers(0, 1)),
        output_padding=draw(st.integers(0, max(stride, dilation) - 1)),
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
    )
    batch = (2,) if draw(st.booleans()) else ()
    return layer, torch.randn(*batch, layer.in_channels, *[draw(st.integers(4, 5)) for _ in range(rank)])


@st.composite
def pools(draw: st.DrawFn) -> Case:
    name, rank = draw(st.sampled_from(sorted(POOLS))), draw(st.integers(1, 3))
    options: dict[str, Any]
    if name.startswith("Adaptive"):
        options = {"output_size": draw(st.integers(1, 4))}
    else:
        kernel = draw(st.integers(1, 3))
        options = {"kernel_size": kernel, "stride": draw(st.integers(1, 3)), "ceil_mode": draw(st.booleans())}
        options["padding"] = draw(st.integers(0, kernel // 2))
    if name == "MaxPool":
        options["dilation"] = draw(st.integers(1, 2))
    if name == "AvgPool":
        options["count_include_pad"] = draw(st.booleans())
        if rank > 1 and draw(st.booleans()):
            options["divisor_override"] = draw(st.integers(1, 5))
    if "Max" in name:
        options["return_indices"] = draw(st.booleans())
    return POOLS[name][rank](**options), torch.randn(2, 3, *[draw(st.integers(6, 8)) for _ in range(rank)])


def run(layer: nn.Module, x: Tensor) -> Any:
    """The layer's result; cases whose arguments torch itself refuses are left out."""
    try:
        return layer(x)
    except RuntimeError:
        assume(False)


def check_off_equals_float(layer: nn.Module, x: Tensor) -> None:
    wanted, state = tensors(run(layer, x)), layer.state_dict()
    quantize_layer(layer, input=QuantSpec(), weight=QuantSpec(axis=0))
    with quantizers_off(layer):
        got = tensors(layer(x))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert set(state) == {key for key in layer.state_dict() if "_quantizer" not in key}


def bound_of(layer: nn.Module, x: Tensor) -> Tensor:
    """What the error of a layer that is linear in x and in w can be at most, element by element.

    With ranges that cover everything, a value moves by at most half a step: |dx| <= sx / 2 and |dw| <= sw / 2. So
    |sum (w + dw)(x + dx) - sum w x| <= sum (|w| + sw / 2)(|x| + sx / 2) - sum |w| |x|, which is the difference of two
    runs of the layer itself on absolute values, whatever its padding, stride and groups are. Biases cancel.
    """
    bare = copy.deepcopy(layer)
    steps = {name: quantizer.scale for name, quantizer in quantizers(layer).items()}
    with torch.no_grad(), quantizers_off(bare):
        for parameter in bare.parameters():
            parameter.abs_()
        small = bare(x.abs())
        if "weight_quantizer" in steps:
            axis = layer.weight_quantizer.spec.axis
            shape = [-1 if d == axis else 1 for d in range(bare.weight.dim())]
            bare.weight.add_(steps["weight_quantizer"].view(shape) / 2)
        return bare(x.abs() + steps["input_quantizer"] / 2) - small


def check_error_is_bounded(layer: nn.Module, x: Tensor) -> None:
    wanted = run(layer, x).detach()
    quantized(layer, x)
    bound = bound_of(layer, x)
    error = (layer(x).detach() - wanted).abs()
    assert (error <= bound * 1.001 + 1e-5 * wanted.abs().max()).all()


@given(linears() | convs() | transposed_convs() | pools())
@settings(deadline=None, max_examples=150)
def test_off_equals_the_float_layer_bit_for_bit(case: Case) -> None:
    check_off_equals_float(*case)


@given(linears() | convs() | transposed_convs())
@settings(deadline=None, max_examples=150)
def test_the_error_of_linear_layers_is_bounded_by_the_scales(case: Case) -> None:
    check_error_is_bounded(*case)


@given(pools())
@settings(deadline=None, max_examples=80)
def test_the_error_of_pools_is_bounded_by_the_scale(case: Case) -> None:
    """A maximum moves by at most half a step; an average is linear in x, so the bound of linear layers holds."""
    layer, x = case
    if "Avg" in type(layer).__name__:
        check_error_is_bounded(layer, x)
        return
    layer.return_indices = False
    wanted = run(layer, x)
    quantized(layer, x)
    assert ((layer(x) - wanted).abs() <= layer.input_quantizer.scale / 2 * 1.001).all()


@given(linears() | convs() | transposed_convs())
@settings(deadline=None, max_examples=40)
def test_gradients_reach_input_and_weights_and_are_finite(case: Case) -> None:
    layer, x = case
    run(layer, x)
    quantized(layer, x)
    x.requires_grad_()
    layer(x).square().sum().backward()
    assert x.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


EXAMPLES: dict[type[nn.Module], Callable[[], nn.Module]] = {
    nn.Linear: lambda: nn.Linear(3, 4),
    nn.Embedding: lambda: nn.Embedding(5, 4),
    **{cls: (lambda cls=cls: cls(2, 4, 3)) for cls in CONVS.values()},
    **{cls: (lambda cls=cls: cls(2, 4, 3, groups=2)) for cls in TRANSPOSED.values()},
    **{cls: (lambda cls=cls: cls(2)) for kind in POOLS.values() for cls in kind.values()},
    nn.LSTM: lambda: nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2),
    nn.LSTMCell: lambda: nn.LSTMCell(3, 4),
    nn.MultiheadAttention: lambda: nn.MultiheadAttention(8, 2),
}


@pytest.fixture(params=sorted(EXAMPLES, key=lambda cls: cls.__name__), ids=lambda cls: cls.__name__)
def layer(request: pytest.FixtureRequest) -> nn.Module:
    return EXAMPLES[request.param]()


def test_the_examples_cover_the_table() -> None:
    assert set(EXAMPLES) == set(LAYERS)


def test_a_state_dict_loads_strictly_into_a_twin_made_anew(layer: nn.Module) -> None:
    spec = {"input": QuantSpec(), "weight": QuantSpec(axis=0)}
    fresh = copy.deepcopy(layer)
    quantize_layer(layer, **spec)
    for index, quantizer in enumerate(quantizers(layer).values()):
        quantizer.amax.fill_(index + 1.0)
    quantize_layer(fresh, **spec)
    fresh.load_state_dict(layer.state_dict(), strict=True)
    loaded = {name: quantizer.amax for name, quantizer in quantizers(fresh).items()}
    assert loaded.keys() == quantizers(layer).keys()
    assert all(torch.equal(loaded[name], quantizer.amax) for name, quantizer in quantizers(layer).items())


def test_operands_name_the_quantizers_and_their_channels(layer: nn.Module) -> None:
    described = operands(layer)
    made = quantize_layer(layer, name="net.x", input=QuantSpec(), weight=QuantSpec(axis=0))
    assert list(made) == [operand.name for operand in described]
    assert set(quantizers(layer)) == {f"{operand.name}_quantizer" for operand in described}
    for operand in described:
        quantizer = made[operand.name]
        assert quantizer.name == f"net.x.{operand.name}"
        axis = operand.axis
        expected = () if axis is None else (layer.get_parameter(operand.parameter).shape[axis],)
        assert quantizer.amax.shape == expected
        assert (axis is None) == (operand.role == "input" or isinstance(layer, nn.Embedding))


def test_default_specs_are_per_tensor_and_per_channel(layer: nn.Module) -> None:
    activations, weights = default_specs(layer)
    if isinstance(layer, nn.Embedding):  # it reads ids, and its rows share one scale
        assert (activations, weights) == (None, QuantSpec())
        return
    assert activations == QuantSpec(axis=None)
    axis = 1 if isinstance(layer, tuple(TRANSPOSED.values())) else 0
    assert weights == (QuantSpec(axis=axis) if list(layer.parameters()) else None)


def test_an_axis_of_none_gives_weights_one_scale(layer: nn.Module) -> None:
    made = quantize_layer(layer, input=QuantSpec(), weight=QuantSpec())
    assert all(quantizer.amax.shape == () for quantizer in made.values())


def test_hooks_parameters_and_attributes_stay() -> None:
    layer = nn.Conv2d(2, 4, 3, padding="same", padding_mode="circular")
    calls: list[str] = []
    layer.register_forward_hook(lambda *_: calls.append("hook"))
    weight = layer.weight
    x = torch.randn(1, 2, 6, 6)
    quantized(layer, x)
    calls.clear()
    layer(x)
    assert calls == ["hook"]
    assert layer.weight is weight
    assert isinstance(layer, nn.Conv2d)
    assert layer.padding == "same"


def test_a_spec_of_none_leaves_the_operand_float() -> None:
    layer, x = nn.Linear(3, 4), torch.randn(5, 3)
    wanted = layer(x)
    made = quantize_layer(layer, weight=QuantSpec(axis=0))
    assert set(made) == {"weight"}
    made["weight"].follow = True
    assert (layer(x) - wanted).abs().max() <= made["weight"].scale.max() / 2 * x.abs().sum(1).max() * 1.001
    alone = nn.Linear(3, 4)
    wanted = alone(x)
    assert quantize_layer(alone) == {}
    assert torch.equal(alone(x), wanted)


def test_output_size_of_a_transposed_convolution() -> None:
    layer, x = nn.ConvTranspose2d(2, 3, 3, stride=2), torch.randn(1, 2, 4, 4)
    wanted = layer(x, output_size=[10, 10])
    quantized(layer, x)
    with quantizers_off(layer):
        assert torch.equal(layer(x, output_size=[10, 10]), wanted)
    assert layer(x, output_size=[10, 10]).shape == wanted.shape


def test_groups_of_a_transposed_convolution_share_their_scales() -> None:
    layer = nn.ConvTranspose2d(4, 6, 3, groups=2)
    assert quantize_layer(layer, input=QuantSpec(), weight=QuantSpec(axis=1))["weight"].amax.shape == (3,)


class TestRefusal:
    def test_a_type_outside_the_table_gets_the_table(self) -> None:
        assert "Conv2d" in refusal(nn.LayerNorm(3))
        with pytest.raises(StepError, match=r"block\.norm: cannot be quantized: LayerNorm"):
            quantize_layer(nn.LayerNorm(3), name="block.norm", input=QuantSpec())
        with pytest.raises(StepError, match="LayerNorm"):
            operands(nn.LayerNorm(3))

    def test_a_subclass_is_not_taken_for_its_base(self) -> None:
        class Scaled(nn.Linear):
            def forward(self, input: Tensor) -> Tensor:
                return super().forward(input) * 2

        assert "quant.register" in refusal(Scaled(2, 2))

    @pytest.mark.parametrize(
        ("layer", "reason"),
        [
            (nn.LazyLinear(3), "LazyLinear"),
            (nn.Linear(0, 3), "empty"),
            (nn.Linear(3, 3, dtype=torch.complex64), "complex64"),
            (nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), "remove_parametrizations"),
        ],
    )
    def test_a_weight_that_cannot_be_quantized_says_why(self, layer: nn.Module, reason: str) -> None:
        assert reason in refusal(layer)
        with pytest.raises(StepError, match=reason):
            quantize_layer(layer, input=QuantSpec(), weight=QuantSpec(axis=0))
        assert not quantizers(layer)

    def test_a_pruned_weight(self) -> None:
        layer = nn.Linear(3, 3)
        prune.l1_unstructured(layer, "weight", amount=0.5)
        assert "pruning" in refusal(layer)

    def test_what_fits_is_not_refused(self, layer: nn.Module) -> None:
        assert refusal(layer) is None

    def test_activations_have_one_scale(self) -> None:
        with pytest.raises(StepError, match="per tensor"):
            quantize_layer(nn.Linear(3, 3), input=QuantSpec(axis=1))


class GatedLinear(nn.Module):
    """A layer of one's own: one input, two weights."""

    def __init__(self, size: int, out: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.randn(out, size))
        self.gate = nn.Parameter(torch.randn(out, size))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.value) * F.linear(x, self.gate).sigmoid()


class QuantGatedLinear(GatedLinear):
    """Its twin: the same forward, with a quantizer around each operand."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.input_quantizer(x)
        value = F.linear(x, self.value_quantizer(self.value))
        return value * F.linear(x, self.gate_quantizer(self.gate)).sigmoid()


class TestRegister:
    @pytest.fixture(autouse=True)
    def _table(self) -> Iterator[None]:
        before = dict(LAYERS)
        yield
        LAYERS.clear()
        LAYERS.update(before)

    def test_a_layer_of_ones_own_is_quantized_like_any_other(self) -> None:
        register(GatedLinear, QuantGatedLinear, weights={"value": 0, "gate": 0})
        layer, x = GatedLinear(8, 4), torch.randn(16, 8)
        wanted = layer(x)
        quantized(layer, x)
        assert {name: tuple(q.amax.shape) for name, q in quantizers(layer).items()} == {
            "input_quantizer": (),
            "value_quantizer": (4,),
            "gate_quantizer": (4,),
        }
        assert not torch.equal(layer(x), wanted)
        assert (layer(x) - wanted).abs().max() < 0.05 * wanted.abs().max()
        with quantizers_off(layer):
            assert torch.equal(layer(x), wanted)

    def test_one_scale_for_a_weight_without_channels(self) -> None:
        register(GatedLinear, QuantGatedLinear, weights={"value": 0, "gate": None})
        made = quantize_layer(GatedLinear(8, 4), input=QuantSpec(), weight=QuantSpec(axis=0))
        assert (made["value"].amax.shape, made["gate"].amax.shape) == ((4,), ())

    def test_an_axis_that_the_weight_lacks_is_a_reason(self) -> None:
        register(GatedLinear, QuantGatedLinear, weights={"value": 2, "gate": 0})
        assert "no axis 2" in refusal(GatedLinear(8, 4))

    @pytest.mark.parametrize("twin", [GatedLinear, Quantizer])
    def test_the_twin_has_to_be_a_subclass(self, twin: type[nn.Module]) -> None:
        with pytest.raises(UsageError, match="subclass"):
            register(GatedLinear, twin)

    def test_only_linear_layers_and_convolutions_fold_a_batchnorm(self) -> None:
        with pytest.raises(UsageError, match="GatedLinear: it is no linear"):
            register(GatedLinear, QuantGatedLinear, weights={"value": 0}, folds_batchnorm=True)

    def test_a_type_is_registered_once(self) -> None:
        with pytest.raises(UsageError, match="already"):
            register(nn.Linear, LAYERS[nn.Linear].twin)
