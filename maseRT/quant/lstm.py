"""Twins of LSTM and LSTMCell: every matrix product takes quantized operands; gates and cell state stay float.

Quantized, an LSTM is written out step by step, so its exported sequence length is fixed and its graph grows with it.
With all its quantizers off it is the float layer, one node in an exported graph; one with projections is written out
there as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._decomp import decompositions
from torch.nn.utils.rnn import PackedSequence

from maseRT.errors import StepError
from maseRT.quant.operand import Operand, weight_operand
from maseRT.quant.quantizer import SUFFIX, Quantizer, any_active

State = tuple[Tensor, Tensor]


def _cell(gates: Tensor, c: Tensor) -> State:
    """[N, 4H] and [N, H] -> the output before its projection and the cell state, [N, H] each."""
    i, f, g, o = gates.chunk(4, dim=-1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


class QuantLSTMCell(nn.LSTMCell):
    """LSTMCell with quantized input, hidden state and weights."""

    input_quantizer: Quantizer | nn.Identity
    hidden_quantizer: Quantizer | nn.Identity
    weight_ih_quantizer: Quantizer | nn.Identity
    weight_hh_quantizer: Quantizer | nn.Identity

    def forward(self, input: Tensor, hx: State | None = None) -> State:
        """[N, in] or [in], and the state [N, H] or [H] -> the next state."""
        if not any_active(self):
            return super().forward(input, hx)
        if hx is None:
            hx = (input.new_zeros(*input.shape[:-1], self.hidden_size),) * 2
        from_input = self.input_quantizer(input) @ self.weight_ih_quantizer(self.weight_ih).t()
        from_hidden = self.hidden_quantizer(hx[0]) @ self.weight_hh_quantizer(self.weight_hh).t()
        gates = from_input + from_hidden
        return _cell(gates + (self.bias_ih + self.bias_hh) if self.bias else gates, hx[1])


class QuantLSTM(nn.LSTM):
    """LSTM with quantized inputs, hidden states and weights in every layer and direction."""

    def forward(self, input: Tensor | PackedSequence, hx: State | None = None) -> tuple[Tensor, State]:  # type: ignore[override]
        """Run over [T, N, in], [N, T, in] with batch_first, or [T, in] unbatched.

        Raises:
            StepError: the input is a PackedSequence.
        """
        if not any_active(self):
            return cast(tuple[Tensor, State], super().forward(input, hx))
        if isinstance(input, PackedSequence):
            raise StepError(
                "a quantized LSTM takes no PackedSequence",
                where=_name_of(self),
                fix='pad the sequences, or keep the layer float: { type = "LSTM", precision = "fp16" }',
            )
        return _WrittenOut(self, self._quantize).run(input, hx)

    def _quantize(self, name: str, x: Tensor) -> Tensor:
        return cast(Tensor, getattr(self, name + SUFFIX)(x))


class _WrittenOut:
    """An LSTM as its matrix products and gates, step by step.

    Args:
        lstm: whose parameters and settings these are.
        quantize: takes the name of an operand of `lstm_operands` and the operand.
    """

    def __init__(self, lstm: nn.LSTM, quantize: Callable[[str, Tensor], Tensor]) -> None:
        self._lstm = lstm
        self._quantize = quantize

    def run(self, input: Tensor, hx: State | None = None) -> tuple[Tensor, State]:
        """Return what the layer's forward returns."""
        lstm, batched = self._lstm, input.dim() == 3
        x = input if batched else input.unsqueeze(0 if lstm.batch_first else 1)
        if hx is not None and not batched:
            hx = (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        if hx is None:
            hx = self._zeros(x)
        lstm.check_forward_args(x, hx, None)
        output, (h, c) = self._layers(x.transpose(0, 1) if lstm.batch_first else x, hx)
        if lstm.batch_first:
            output = output.transpose(0, 1)
        if not batched:
            return output.squeeze(0 if lstm.batch_first else 1), (h.squeeze(1), c.squeeze(1))
        return output, (h, c)

    def _zeros(self, x: Tensor) -> State:
        lstm = self._lstm
        count = lstm.num_layers * (2 if lstm.bidirectional else 1)
        batch = x.shape[0 if lstm.batch_first else 1]
        return x.new_zeros(count, batch, lstm.proj_size or lstm.hidden_size), x.new_zeros(
            count, batch, lstm.hidden_size
        )

    def _layers(self, x: Tensor, hx: State) -> tuple[Tensor, State]:
        """[T, N, in] -> [T, N, out] and the last states [layers * directions, N, ...]."""
        last: list[State] = []
        for layer in range(self._lstm.num_layers):
            if layer > 0 and self._lstm.dropout > 0:
                x = F.dropout(x, self._lstm.dropout, self._lstm.training)
            quantized = self._quantize(f"input_l{layer}", x)
            outputs = []
            for suffix in _suffixes(self._lstm, layer):
                output, state = self._direction(quantized, suffix, hx[0][len(last)], hx[1][len(last)])
                outputs.append(output)
                last.append(state)
            x = torch.cat(outputs, dim=-1)
        return x, (torch.stack([h for h, _ in last]), torch.stack([c for _, c in last]))

    def _direction(self, x: Tensor, suffix: str, h: Tensor, c: Tensor) -> tuple[Tensor, State]:
        lstm = self._lstm
        bias = self._parameter(f"bias_ih{suffix}") + self._parameter(f"bias_hh{suffix}") if lstm.bias else None
        from_input = F.linear(x, self._weight(f"weight_ih{suffix}"), bias)
        from_hidden = self._weight(f"weight_hh{suffix}").t()
        projection = self._weight(f"weight_hr{suffix}").t() if lstm.proj_size else None
        outputs: list[Tensor] = []
        backwards = suffix.endswith("_reverse")
        for gates in reversed(from_input.unbind(0)) if backwards else from_input.unbind(0):
            h, c = _cell(gates + self._quantize(f"hidden{suffix}", h) @ from_hidden, c)
            if projection is not None:
                h = self._quantize(f"unprojected{suffix}", h) @ projection
            outputs.append(h)
        return torch.stack(outputs[::-1] if backwards else outputs), (h, c)

    def _parameter(self, name: str) -> Tensor:
        return cast(Tensor, getattr(self._lstm, name))

    def _weight(self, name: str) -> Tensor:
        return self._quantize(name, self._parameter(name))


@contextmanager
def projections_written_out(model: nn.Module) -> Iterator[None]:
    """Write out the LSTMs with projections, also float ones: ONNX's LSTM has none, and an exporter gives one whose
    states have the wrong size."""
    projected = [each for each in model.modules() if isinstance(each, nn.LSTM) and each.proj_size]
    lstms = [each for each in projected if not any_active(each)]
    for lstm in lstms:
        lstm.forward = _WrittenOut(lstm, _unquantized).run  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        for lstm in lstms:
            del lstm.forward


@contextmanager
def states_traced_in_shape() -> Iterator[None]:
    """Trace the states of LSTMs as [layers * directions, N, H]: torch before 2.13 puts a 1 before the N.

    It squeezes the wrong dimension where it takes a layer apart, so that what comes after the states fails to trace.
    """
    original: Callable[..., Any] = decompositions.one_layer_lstm

    def one_layer_lstm(*args: Any, **options: Any) -> tuple[Tensor, State]:
        output, (h, c) = original(*args, **options)
        return output, (h.reshape(h.shape[-2:]), c.reshape(c.shape[-2:]))

    decompositions.one_layer_lstm = one_layer_lstm
    try:
        yield
    finally:
        decompositions.one_layer_lstm = original


def _unquantized(_name: str, x: Tensor) -> Tensor:
    return x


def _suffixes(layer: nn.LSTM, index: int) -> tuple[str, ...]:
    """Return the endings of the parameters of one layer of an LSTM, one per direction."""
    return (f"_l{index}", f"_l{index}_reverse") if layer.bidirectional else (f"_l{index}",)


def _name_of(layer: nn.LSTM) -> str:
    return getattr(layer.input_l0_quantizer, "name", "").removesuffix(".input_l0") or "LSTM"


def lstm_operands(layer: nn.Module) -> tuple[Operand, ...]:
    """Return the operands of an LSTM: the weights are [4H, in], [4H, out] and, with proj_size, [proj, H]."""
    lstm = cast(nn.LSTM, layer)
    suffixes = [suffix for index in range(lstm.num_layers) for suffix in _suffixes(lstm, index)]
    inputs = [f"input_l{index}" for index in range(lstm.num_layers)] + [f"hidden{suffix}" for suffix in suffixes]
    weights = [f"weight_{kind}{suffix}" for suffix in suffixes for kind in ("ih", "hh")]
    if lstm.proj_size:
        inputs += [f"unprojected{suffix}" for suffix in suffixes]
        weights += [f"weight_hr{suffix}" for suffix in suffixes]
    return (*map(Operand, inputs), *map(weight_operand, weights))


def lstm_cell_operands(layer: nn.Module) -> tuple[Operand, ...]:
    """Return the operands of an LSTMCell: the weights are [4H, in] and [4H, H]."""
    return Operand("input"), Operand("hidden"), weight_operand("weight_ih"), weight_operand("weight_hh")
