"""Transformer classifiers made of nn.TransformerEncoderLayer, over image patches or sequence steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maseRT.models.nets.shapes import patch_grid, sequence_shape


class PatchTokens(nn.Module):
    """Images [N, C, H, W] to tokens [N, patches, width]."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        """Return one token per patch, row by row."""
        tokens: Tensor = self.projection(x)
        return tokens.flatten(2).transpose(1, 2)


class TransformerClassifier(nn.Module):
    """Tokens with learned positions, pre-norm encoder layers, LayerNorm, a Linear on the class token or the mean."""

    def __init__(
        self,
        input_shape: tuple[int, ...],
        *,
        model: str,
        num_classes: int,
        width: int,
        depth: int,
        heads: int,
        patch: int,
        class_token: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        if len(input_shape) == 3:
            rows, columns = patch_grid(input_shape, patch, model=model)
            tokens = rows * columns
            self.embedding: nn.Module = PatchTokens(input_shape[0], width, patch)
        else:
            tokens, features = sequence_shape(input_shape, model=model)
            self.embedding = nn.Linear(features, width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width)) if class_token else None
        self.positions = nn.Parameter(torch.empty(1, tokens + class_token, width).normal_(std=0.02))
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width, heads, 4 * width, dropout=dropout, activation="gelu", batch_first=True, norm_first=True
                )
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [N, num_classes] of images [N, C, H, W] or sequences [N, steps, features]."""
        tokens = self.embedding(x)
        if self.class_token is not None:
            tokens = torch.cat([self.class_token.expand(x.shape[0], -1, -1), tokens], dim=1)
        tokens = self.norm(self.layers(tokens + self.positions))
        logits: Tensor = self.head(tokens.mean(dim=1) if self.class_token is None else tokens[:, 0])
        return logits


def transformer_classifier(
    *,
    num_classes: int,
    input_shape: tuple[int, ...],
    width: int = 64,
    depth: int = 2,
    heads: int = 4,
    patch: int | None = None,
    dropout: float = 0.1,
) -> nn.Module:
    """Build a small transformer that classifies the mean of its tokens.

    Args:
        num_classes: outputs.
        input_shape: [C, H, W], sides multiples of the patch, or [steps, features].
        width: features of a token, a multiple of heads.
        depth: encoder layers.
        heads: attention heads.
        patch: side of a patch in pixels; default 2 for images under 16 pixels, 4 below 64, else 16.
        dropout: in every layer, while training.
    """
    side = input_shape[-1]
    default = 2 if side < 16 else 4 if side < 64 else 16
    return TransformerClassifier(
        input_shape,
        model="transformer-classifier",
        num_classes=num_classes,
        width=width,
        depth=depth,
        heads=heads,
        patch=patch or default,
        class_token=False,
        dropout=dropout,
    )


def transformer_d384(
    *, num_classes: int, input_shape: tuple[int, ...], depth: int = 6, patch: int = 16, dropout: float = 0.0
) -> nn.Module:
    """Build a transformer of width 384 with 6 heads that classifies its class token.

    Args:
        num_classes: outputs.
        input_shape: [C, H, W], sides multiples of the patch (3x224x224 has 197 tokens), or [steps, features].
        depth: encoder layers.
        patch: side of a patch in pixels.
        dropout: in every layer, while training.
    """
    return TransformerClassifier(
        input_shape,
        model="transformer-d384",
        num_classes=num_classes,
        width=384,
        depth=depth,
        heads=6,
        patch=patch,
        class_token=True,
        dropout=dropout,
    )
