"""ViT-B/16 (Dosovitskiy et al., 2020) with torchvision's state names, so that its checkpoints load."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

from maseRT.models.nets.shapes import image_shape, patch_grid


class EncoderBlock(nn.Module):
    """Pre-norm self-attention and a two-layer perceptron, each with a skip."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=1e-6)
        self.self_attention = nn.MultiheadAttention(width, heads, dropout=dropout, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.ln_2 = nn.LayerNorm(width, eps=1e-6)
        linears = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.mlp = nn.Sequential(linears[0], nn.GELU(), nn.Dropout(dropout), linears[1], nn.Dropout(dropout))
        for linear in linears:
            nn.init.xavier_uniform_(linear.weight)
            nn.init.normal_(linear.bias, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens [N, T, width], same shape."""
        normed = self.ln_1(x)
        attended, _ = self.self_attention(normed, normed, normed, need_weights=False)
        x = x + self.dropout(attended)
        mixed: Tensor = self.mlp(self.ln_2(x))
        return x + mixed


class Encoder(nn.Module):
    """Learned positions, encoder blocks and a final LayerNorm."""

    def __init__(self, tokens: int, depth: int, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.empty(1, tokens, width).normal_(std=0.02))
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.Sequential(
            OrderedDict((f"encoder_layer_{i}", EncoderBlock(width, heads, hidden, dropout)) for i in range(depth))
        )
        self.ln = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens [N, T, width], same shape."""
        encoded: Tensor = self.ln(self.layers(self.dropout(x + self.pos_embedding)))
        return encoded


class VisionTransformer(nn.Module):
    """Patches, a class token, an encoder and a Linear on the class token."""

    def __init__(self, input_shape: tuple[int, ...], *, patch: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        channels, _, _ = image_shape(input_shape, model="vit-b-16")
        rows, columns = patch_grid(input_shape, patch, model="vit-b-16")
        width, depth, heads, hidden = 768, 12, 12, 3072
        self.conv_proj = nn.Conv2d(channels, width, patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.encoder = Encoder(rows * columns + 1, depth, width, heads, hidden, dropout)
        head = nn.Linear(width, num_classes)
        self.heads = nn.Sequential(OrderedDict(head=head))
        nn.init.trunc_normal_(self.conv_proj.weight, std=math.sqrt(1 / (channels * patch * patch)))
        nn.init.zeros_(self.conv_proj.bias)  # type: ignore[arg-type]
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, num_classes] of images [N, C, H, W]."""
        tokens = self.conv_proj(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(x.shape[0], -1, -1), tokens], dim=1)
        logits: Tensor = self.heads(self.encoder(tokens)[:, 0])
        return logits


def vit_b_16(*, num_classes: int, input_shape: tuple[int, ...], patch: int = 16, dropout: float = 0.0) -> nn.Module:
    """Build ViT-B: 12 blocks of width 768 with 12 heads.

    Args:
        num_classes: outputs.
        input_shape: [C, H, W], sides multiples of the patch; 3x224x224 has 197 tokens.
        patch: side of a patch in pixels.
        dropout: in every block, while training.
    """
    return VisionTransformer(input_shape, patch=patch, num_classes=num_classes, dropout=dropout)
