"""The twin of the embedding layer: a quantized table, looked up by ids that stay integers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from maseRT.quant.operand import Operand, weight_operand
from maseRT.quant.quantizer import Quantizer


class QuantEmbedding(nn.Embedding):
    """Embedding with a quantized table; gradients are dense, also where `sparse` is set."""

    weight_quantizer: Quantizer | nn.Identity

    def forward(self, input: Tensor) -> Tensor:
        """Ids [...] -> [..., features]."""
        table = self.weight_quantizer(self.weight)
        return F.embedding(input, table, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)


def embedded(layer: nn.Module) -> tuple[Operand, ...]:
    """Return the one operand of Embedding: the table [ids, features], with one scale.

    One per id would be finer, but then each result had a scale of its own, which no DequantizeLinear can apply.
    """
    return (weight_operand("weight", None),)


def embedding_refusal(layer: nn.Module) -> str | None:
    """Say why a table cannot be quantized, or None when it can."""
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return "max_norm rewrites its table while it runs: scale the rows once, and leave it out"
    return None
