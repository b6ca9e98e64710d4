"""The MultiheadAttention twin: all its arguments, inside nn.TransformerEncoderLayer too."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_cases import quantized, tensors, with_max_ranges
from torch import Tensor, nn

from maseRT.errors import StepError
from maseRT.precision import QuantSpec
from maseRT.quant import quantize_layer, quantizers, quantizers_off

Case = tuple[nn.MultiheadAttention, tuple[Tensor, ...], dict[str, Any]]
HEADS, EMBED, LONG, SHORT, BATCH = 2, 8, 5, 4, 3


@st.composite
def attentions(draw: st.DrawFn) -> Case:
    self_attention = draw(st.booleans())
    other = not self_attention and draw(st.booleans())
    layer = nn.MultiheadAttention(
        EMBED,
        HEADS,
        bias=draw(st.booleans()),
        add_bias_kv=draw(st.booleans()),
        add_zero_attn=draw(st.booleans()),
        kdim=6 if other else None,
        vdim=7 if other else None,
        batch_first=draw(st.booleans()),
    ).eval()
    batched = draw(st.booleans())

    def sequence(length: int, size: int) -> Tensor:
        if not batched:
            return torch.randn(length, size)
        return torch.randn(BATCH, length, size) if layer.batch_first else torch.randn(length, BATCH, size)

    query = sequence(LONG, EMBED)
    key = query if self_attention else sequence(SHORT, layer.kdim)
    value = key if self_attention or (not other and draw(st.booleans())) else sequence(SHORT, layer.vdim)
    source = LONG if self_attention else SHORT
    options: dict[str, Any] = {"need_weights": draw(st.booleans()), "average_attn_weights": draw(st.booleans())}
    kind = draw(st.sampled_from(["none", "2d", "3d"]))
    boolean = draw(st.booleans())
    if kind != "none":
        shape = (LONG, source) if kind == "2d" else ((BATCH if batched else 1) * HEADS, LONG, source)
        options["attn_mask"] = _mask(shape, boolean=boolean)
    if draw(st.booleans()):
        options["key_padding_mask"] = _mask((BATCH, source) if batched else (source,), boolean=boolean)
    return layer, (query, key, value), options


def _mask(shape: tuple[int, ...], *, boolean: bool) -> Tensor:
    """A mask that leaves the first source position open, so that no row is masked completely."""
    if not boolean:
        return torch.randn(shape)
    mask = torch.rand(shape) < 0.3
    mask[..., 0] = False
    return mask


@given(attentions())
@settings(deadline=None, max_examples=80)
def test_off_equals_the_float_layer_bit_for_bit(case: Case) -> None:
    layer, args, options = case
    wanted = tensors(layer(*args, **options))
    quantize_layer(layer, input=QuantSpec(), weight=QuantSpec(axis=0))
    with quantizers_off(layer):
        assert all(torch.equal(a, b) for a, b in zip(tensors(layer(*args, **options)), wanted, strict=True))


@given(attentions())
@settings(deadline=None, max_examples=80)
def test_the_error_vanishes_with_the_scales(case: Case) -> None:
    """Softmax and the products are Lipschitz on bounded tensors, so the error is a constant times the largest scale.

    22 bits make the scales 2^14 times smaller than 8 do: below 1e-6 of the tensors, with a constant of about ten. So
    the computation has to be the float layer's, and 8 bits may err by at most what scales 2^14 times larger give.
    """
    layer, args, options = case
    wanted = tensors(layer(*args, **options))
    quantized(layer, *args, bits=22, **options)
    got = tensors(layer(*args, **options))
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, atol=1e-5)


@given(attentions())
@settings(deadline=None, max_examples=30)
def test_gradients_reach_every_parameter(case: Case) -> None:
    layer, args, options = case
    quantized(layer, *args, **options)
    layer(*args, **options)[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_eight_bits_are_used_on_all_four_projections() -> None:
    layer, x = nn.MultiheadAttention(EMBED, HEADS, batch_first=True), torch.randn(BATCH, LONG, EMBED)
    wanted = layer(x, x, x)[0]
    made = quantize_layer(layer, input=QuantSpec(), weight=QuantSpec(axis=0))
    assert {name: tuple(q.amax.shape) for name, q in made.items()} == {
        "input": (),
        "attended": (),
        "in_proj_weight": (3 * EMBED,),
        "out_proj_weight": (EMBED,),
    }
    with_max_ranges(layer, x, x, x)
    results = [layer(x, x, x)[0]]
    for quantizer in made.values():
        quantizer.enabled = False
        results.append(layer(x, x, x)[0])
        quantizer.enabled = True
    assert all(not torch.equal(results[0], other) for other in results[1:])
    assert (results[0] - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_other_sizes_of_key_and_value_have_ranges_of_their_own() -> None:
    layer = nn.MultiheadAttention(EMBED, HEADS, kdim=6, vdim=7)
    assert set(quantize_layer(layer, input=QuantSpec(), weight=QuantSpec(axis=0))) == {
        *("query", "key", "value", "attended"),
        *("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj_weight"),
    }


def test_dropout_works_in_training_only() -> None:
    layer, x = nn.MultiheadAttention(EMBED, HEADS, dropout=0.5).eval(), torch.randn(LONG, BATCH, EMBED)
    quantized(layer, x, x, x)
    for need_weights in (True, False):
        layer.eval()
        assert torch.equal(*(layer(x, x, x, need_weights=need_weights)[0] for _ in range(2)))
        layer.train()
        assert not torch.equal(*(layer(x, x, x, need_weights=need_weights)[0] for _ in range(2)))


def test_a_causal_hint_goes_with_its_mask() -> None:
    layer, x = nn.MultiheadAttention(EMBED, HEADS), torch.randn(LONG, BATCH, EMBED)
    mask = nn.Transformer.generate_square_subsequent_mask(LONG)
    wanted = layer(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
    quantized(layer, x, x, x, bits=22, attn_mask=mask)
    got = layer(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
    assert torch.allclose(got, wanted, atol=1e-5)
    with pytest.raises(StepError, match=r"layer: is_causal"):
        layer(x, x, x, is_causal=True)


def test_nested_tensors_are_refused_by_name() -> None:
    layer = nn.MultiheadAttention(EMBED, HEADS, batch_first=True)
    quantize_layer(layer, name="encoder.attn", input=QuantSpec(), weight=QuantSpec(axis=0))
    nested = torch.nested.nested_tensor([torch.randn(3, EMBED), torch.randn(2, EMBED)])
    with pytest.raises(StepError, match=r"encoder\.attn: .*nested"):
        layer(nested, nested, nested)


@pytest.mark.parametrize("norm_first", [False, True])
def test_every_linear_of_an_encoder_layer_is_quantized_in_training(norm_first: bool) -> None:
    model = nn.TransformerEncoderLayer(EMBED, HEADS, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
    x = torch.randn(BATCH, LONG, EMBED)
    wanted = model(x)
    for name in ("self_attn", "linear1", "linear2"):
        quantize_layer(model.get_submodule(name), name=name, input=QuantSpec(), weight=QuantSpec(axis=0))
    with_max_ranges(model, x)
    assert len(quantizers(model)) == 8
    got = model(x)
    assert not torch.equal(got, wanted)
    assert (got - wanted).abs().max() < 0.1 * wanted.abs().max()
