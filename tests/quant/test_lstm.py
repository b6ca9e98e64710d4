"""LSTM and LSTMCell twins: equal to the float layers without quantization and to a written-out LSTM with it."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import quantized, tensors
from torch import Tensor, nn

from maseRT.errors import StepError
from maseRT.precision import QuantSpec
from maseRT.quant import quantize_layer, quantizers, quantizers_off

State = tuple[Tensor, Tensor]


@st.composite
def lstms(draw: st.DrawFn) -> tuple[nn.LSTM, Tensor, State | None]:
    hidden = draw(st.integers(2, 5))
    layer = nn.LSTM(
        draw(st.integers(1, 4)),
        hidden,
        draw(st.integers(1, 3)),
        bias=draw(st.booleans()),
        batch_first=draw(st.booleans()),
        bidirectional=draw(st.booleans()),
        proj_size=draw(st.integers(0, hidden - 1)),
    )
    batch = (3,) if draw(st.booleans()) else ()
    length = (draw(st.integers(1, 5)),)
    x = torch.randn(*(batch + length if layer.batch_first else length + batch), layer.input_size)
    count = layer.num_layers * (1 + layer.bidirectional)
    sizes = (layer.proj_size or hidden, hidden)
    state = tuple(torch.randn(count, *batch, size) for size in sizes) if draw(st.booleans()) else None
    return layer, x, state


@given(lstms())
@settings(deadline=None, max_examples=60)
def test_off_equals_the_float_layer_bit_for_bit(case: tuple[nn.LSTM, Tensor, State | None]) -> None:
    layer, x, state = case
    wanted = tensors(layer(x, state))
    quantize_layer(layer, input=QuantSpec(), weight=QuantSpec(axis=0))
    with quantizers_off(layer):
        assert all(torch.equal(a, b) for a, b in zip(tensors(layer(x, state)), wanted, strict=True))


@given(lstms())
@settings(deadline=None, max_examples=60)
def test_the_error_vanishes_with_the_scales(case: tuple[nn.LSTM, Tensor, State | None]) -> None:
    """Sigmoid and tanh are Lipschitz, so the error is at most a constant times the largest scale.

    The constant is below 1e4 for these sizes, and 22 bits make the scales 2^14 times smaller than 8 do, below 1e-5 of
    the tensors: the written-out computation has to give the float layer's results, shapes and states included.
    """
    layer, x, state = case
    wanted = tensors(layer(x, state))
    quantized(layer, x, state, bits=22)
    got = tensors(layer(x, state))
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, atol=1e-5)


@given(lstms())
@settings(deadline=None, max_examples=30)
def test_gradients_reach_everything(case: tuple[nn.LSTM, Tensor, State | None]) -> None:
    layer, x, state = case
    quantized(layer, x, state)
    x.requires_grad_()
    sum(tensor.square().sum() for tensor in tensors(layer(x, state))).backward()
    assert x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@given(bias=st.booleans(), batched=st.booleans(), with_state=st.booleans(), size=st.integers(1, 6))
@settings(deadline=None, max_examples=50)
def test_the_error_of_a_cell_is_bounded_by_the_scales(bias: bool, batched: bool, with_state: bool, size: int) -> None:
    """Each gate's input is linear in the operands, so it errs by at most d, the bound of linear layers.

    Sigmoid is 1/4-Lipschitz and tanh 1-Lipschitz, both at most 1: c' = sigmoid(f) c + sigmoid(i) tanh(g) errs by at
    most |c| d/4 + d/4 + d, and h = sigmoid(o) tanh(c') by at most d/4 plus that.
    """
    layer = nn.LSTMCell(size, 4, bias=bias)
    lead = (3,) if batched else ()
    x = torch.randn(*lead, size)
    state = (torch.randn(*lead, 4), torch.randn(*lead, 4)) if with_state else None
    wanted = layer(x, state)
    quantized(layer, x, state)
    with quantizers_off(layer):
        assert all(torch.equal(a, b) for a, b in zip(layer(x, state), wanted, strict=True))
    h, c = state or (torch.zeros(*lead, 4), torch.zeros(*lead, 4))

    def gate_bound(operand: Tensor, weight: Tensor, s_operand: Tensor, s_weight: Tensor) -> Tensor:
        operand, weight = operand.abs(), weight.abs()
        return (operand + s_operand / 2) @ (weight + s_weight[:, None] / 2).t() - operand @ weight.t()

    scale = {name.removesuffix("_quantizer"): q.scale for name, q in quantizers(layer).items()}
    d = gate_bound(x, layer.weight_ih, scale["input"], scale["weight_ih"])
    d = d + gate_bound(h, layer.weight_hh, scale["hidden"], scale["weight_hh"])
    d = d.unflatten(-1, (4, 4)).amax(-2)
    c_bound = c.abs() * d / 4 + d / 4 + d
    got = layer(x, state)
    assert ((got[1] - wanted[1]).abs() <= c_bound + 1e-6).all()
    assert ((got[0] - wanted[0]).abs() <= d / 4 + c_bound + 1e-6).all()


def test_a_layer_is_its_cell_step_by_step() -> None:
    lstm, x = nn.LSTM(3, 4), torch.randn(6, 2, 3)
    quantized(lstm, x)
    cell = nn.LSTMCell(3, 4)
    quantize_layer(cell, input=QuantSpec(), weight=QuantSpec(axis=0))
    cell.load_state_dict({key.replace("_l0", ""): value for key, value in lstm.state_dict().items()}, strict=True)
    state = (torch.zeros(2, 4), torch.zeros(2, 4))
    output, (h, c) = lstm(x)
    for step, wanted in zip(x, output, strict=True):
        state = cell(step, state)
        assert torch.allclose(state[0], wanted, atol=1e-6)
    assert torch.allclose(state[1], c[0], atol=1e-6)
    assert torch.equal(h[0], output[-1])


def test_eight_bits_are_used() -> None:
    layer, x = nn.LSTM(3, 4, 2), torch.randn(6, 2, 3)
    wanted = layer(x)[0]
    quantized(layer, x)
    error = (layer(x)[0] - wanted).abs().max()
    assert 1e-4 < error < 0.05


def test_dropout_between_layers_works_in_training_only() -> None:
    layer, x = nn.LSTM(3, 4, 2, dropout=0.5), torch.randn(6, 2, 3)
    layer.eval()
    quantized(layer, x)
    assert torch.equal(layer(x)[0], layer(x)[0])
    layer.train()
    assert not torch.equal(layer(x)[0], layer(x)[0])
    single = nn.LSTM(3, 4)
    quantized(single.train(), x)
    assert torch.equal(single(x)[0], single(x)[0])


def test_ranges_have_a_name_per_layer_and_direction() -> None:
    layer = nn.LSTM(3, 4, 2, bidirectional=True, proj_size=2)
    made = quantize_layer(layer, name="rnn", input=QuantSpec(), weight=QuantSpec(axis=0))
    directions = ("l0", "l0_reverse", "l1", "l1_reverse")
    assert set(made) == {
        "input_l0",
        "input_l1",
        *(
            f"{kind}_{d}"
            for d in directions
            for kind in ("hidden", "unprojected", "weight_ih", "weight_hh", "weight_hr")
        ),
    }
    assert made["weight_ih_l1_reverse"].name == "rnn.weight_ih_l1_reverse"


def test_a_packed_sequence_is_refused_by_name() -> None:
    layer = nn.LSTM(3, 4)
    packed = nn.utils.rnn.pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])
    wanted = layer(packed)[0].data
    quantize_layer(layer, name="encoder.rnn", input=QuantSpec(), weight=QuantSpec(axis=0))
    with pytest.raises(StepError, match=r"encoder\.rnn: .*PackedSequence"):
        layer(packed)
    with quantizers_off(layer):
        assert torch.equal(layer(packed)[0].data, wanted)


@pytest.mark.parametrize("shape", [(4, 2, 5), (4,), (1, 4, 2, 3)])
def test_a_wrong_shape_is_refused_as_the_float_layer_does(shape: tuple[int, ...]) -> None:
    layer = nn.LSTM(3, 4)
    quantized(layer, torch.randn(4, 2, 3))
    with pytest.raises((RuntimeError, ValueError)):
        layer(torch.randn(shape))


def test_a_copy_computes_the_same() -> None:
    layer, x = nn.LSTM(3, 4, bidirectional=True), torch.randn(5, 2, 3)
    quantized(layer, x)
    assert torch.equal(copy.deepcopy(layer)(x)[0], layer(x)[0])
