"""Twin of MultiheadAttention: its four projections take quantized operands; the products between them stay float."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maseRT.errors import StepError
from maseRT.quant.operand import Operand, weight_operand
from maseRT.quant.quantizer import SUFFIX, Quantizer, any_active


class QuantMultiheadAttention(nn.MultiheadAttention):
    """MultiheadAttention with quantized inputs and weights of its projections.

    With one packed weight for query, key and value these share one range, `input`, and in self-attention one product;
    with kdim or vdim each has its own. `attended` is what goes into out_proj.
    """

    attended_quantizer: Quantizer | nn.Identity

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as the float layer does; its arguments and shapes hold.

        Raises:
            StepError: nested tensors, or is_causal without a mask.
        """
        if not any_active(self):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if query.is_nested or key.is_nested or value.is_nested:
            raise StepError(
                "quantized attention takes no nested tensors", where=_name_of(self), fix="pad the sequences"
            )
        if is_causal and attn_mask is None:
            raise StepError("is_causal needs attn_mask as well", where=_name_of(self), fix="pass the causal mask")
        q = self._batch_first(query)
        k = q if key is query else self._batch_first(key)
        v = k if value is key else self._batch_first(value)
        output, weights = self._attend(
            *self._project(q, k, v), _additive(attn_mask, q.dtype), _additive(key_padding_mask, q.dtype), need_weights
        )
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if query.dim() == 2:
            return output.squeeze(0), weights if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _batch_first(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[N, L, E], [N, S, kdim], [N, S, vdim] -> q, k, v, each with E in its last place."""
        bias = self.in_proj_bias
        if query is key and key is value and self._qkv_same_embed_dim:
            packed = F.linear(self._quantize("input", query), self._weight("in_proj_weight"), bias)
            return cast(tuple[Tensor, Tensor, Tensor], packed.chunk(3, dim=-1))
        if self._qkv_same_embed_dim:
            weights = list(self._weight("in_proj_weight").chunk(3))
            names = ("input", "input", "input")
        else:
            weights = [self._weight(f"{letter}_proj_weight") for letter in "qkv"]
            names = ("query", "key", "value")
        inputs = [self._quantize(name, x) for name, x in zip(names, (query, key, value), strict=True)]
        biases = (None, None, None) if bias is None else bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))
        return q, k, v

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, padding: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """[N, L, E] and twice [N, S, E] -> [N, L, E], and the weights per head [N, heads, L, S] if they are wanted."""
        k, v = self._extend(k, self.bias_k), self._extend(v, self.bias_v)
        q, k, v = (x.view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2) for x in (q, k, v))
        merged = self._merge(mask, padding, extra=(self.bias_k is not None) + self.add_zero_attn)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            logits = (q * math.sqrt(1.0 / self.head_dim)) @ k.transpose(-2, -1)
            weights = F.dropout(torch.softmax(logits if merged is None else logits + merged, dim=-1), dropout)
            attended = weights @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v, merged, dropout)
        attended = self.attended_quantizer(attended.transpose(1, 2).flatten(2))
        return F.linear(attended, self._quantize("out_proj_weight", self.out_proj.weight), self.out_proj.bias), weights

    def _extend(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Append what add_bias_kv and add_zero_attn add to the sequence: [N, S, E] -> [N, S + extra, E]."""
        if bias is not None:
            x = torch.cat([x, bias.expand(x.shape[0], 1, -1)], dim=1)
        return F.pad(x, (0, 0, 0, 1)) if self.add_zero_attn else x

    def _merge(self, mask: Tensor | None, padding: Tensor | None, *, extra: int) -> Tensor | None:
        """[L, S] or [N * heads, L, S], and [N, S] or [S] -> what is added to the logits [N, heads, L, S + extra]."""
        if mask is not None and mask.dim() == 3:
            mask = mask.view(-1, self.num_heads, *mask.shape[1:])
        if padding is not None:
            padding = padding.reshape(-1, 1, 1, padding.shape[-1])
            mask = padding if mask is None else mask + padding
        return mask if mask is None or not extra else F.pad(mask, (0, extra))

    def _quantize(self, name: str, x: Tensor) -> Tensor:
        return cast(Tensor, getattr(self, name + SUFFIX)(x))

    def _weight(self, name: str) -> Tensor:
        return self._quantize(name, cast(Tensor, getattr(self, name)))


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a mask that is added to logits: True becomes -inf."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def _name_of(layer: QuantMultiheadAttention) -> str:
    return getattr(layer.attended_quantizer, "name", "").removesuffix(".attended") or "MultiheadAttention"


def attention_operands(layer: nn.Module) -> tuple[Operand, ...]:
    """Return the operands of a MultiheadAttention: its weights are [3E, E], or [E, E], [E, kdim] and [E, vdim]."""
    if cast(nn.MultiheadAttention, layer)._qkv_same_embed_dim:
        inputs, weights = ["input"], ["in_proj_weight"]
    else:
        inputs, weights = ["query", "key", "value"], ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    return (*map(Operand, [*inputs, "attended"]), *map(weight_operand, [*weights, "out_proj.weight"]))
