"""A small transformer that predicts the next byte of a text."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["ByteTransformer"]

_BYTES = 256


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        projected = self.query_key_value(hidden).view(batch, length, 3, self.heads, -1)
        query, key, value = projected.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        output: Tensor = self.output(mixed.transpose(1, 2).reshape(batch, length, width))
        return output


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, inner_width: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = _Attention(width, heads)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, inner_width), nn.GELU(), nn.Linear(inner_width, width)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden))
        output: Tensor = hidden + self.feed_forward(self.feed_forward_norm(hidden))
        return output


class ByteTransformer(nn.Module):
    """A decoder-only transformer over bytes.

    Parameters
    ----------
    width, heads, layers
        Of the hidden states, of attention, of the stack.
    inner_width
        Of the feed-forward part. Where it is no multiple of the number of ranks, the shards
        of the checkpoint are uneven.
    length
        The longest text, in bytes, that it can be shown.
    """

    def __init__(
        self, *, width: int, heads: int, layers: int, inner_width: int, length: int
    ) -> None:
        super().__init__()
        self.byte_embedding = nn.Embedding(_BYTES, width)
        self.position_embedding = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(_Block(width, heads, inner_width) for _ in range(layers))
        self.final_norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, _BYTES, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        """Return the scores of the byte that follows each byte: [batch, length, 256]."""
        positions = torch.arange(text.shape[1], device=text.device)
        hidden = self.byte_embedding(text) + self.position_embedding(positions)
        for block in self.blocks:
            hidden = block(hidden)
        scores: Tensor = self.output(self.final_norm(hidden))
        return scores
