"""Scaled dot-product attention: over whole rows, and of one new token per text over a cache.

Queries, keys, values and results are (B, T, H, D): T tokens of H heads with D dimensions each.
"""

from typing import Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

from lib import kernels
from lib.devices import cast


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
              mask: torch.Tensor | None = None, dropout: float = 0.0) -> torch.Tensor:
    """q: (B, T, H, D). k, v: (B, S, H, D). mask: what each query attends to, bool or added to the
    scores, broadcasts to (B, H, T, S); None: causal, S = T."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # views, no copies
    causal = mask is None
    y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
    return y.transpose(1, 2)


class SpanAttention(nn.Module):
    """Causal `attention`, in training within spans of `span` tokens that rows are cut into.

    torch.compile does not trace it, so changing the span does not recompile the model.
    """

    span: int | None = None  # a divisor of T; None: the whole row

    @torch.compiler.disable
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                dropout: float = 0.0) -> torch.Tensor:
        """q, k, v: (B, T, H, D)."""
        if self.span is None or not self.training:
            return attention(q, k, v, dropout=dropout)
        B, T, H, D = q.shape
        q, k, v = (part.reshape(-1, self.span, H, D) for part in (q, k, v))
        return attention(q, k, v, dropout=dropout).reshape(B, T, H, D)


class AttentionContext(Protocol):
    """What the tokens of a forward pass attend to, if not simply their row: a KVCache
    (lib/decoding.py) while decoding, a Packed (lib/packing.py) for several texts per row."""

    positions: torch.Tensor  # int64 (B, T), each token's position in its text

    def attend(self, layer: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
               dropout: float = 0.0) -> torch.Tensor:
        """The attention of one layer, (B, T, H, D)."""

    def previous(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """The vector before each of x (B, T, C) in its text; zeros for the first of a text."""


class MaskedFirst:
    """Attention of one query per text, (n, 1, H, D), to the first `counts`, int64 (n,), of its
    cached tokens. span: at least the largest count."""

    def __init__(self, counts: torch.Tensor, span: int):
        seen = torch.arange(span, device=counts.device) < counts[:, None]               # (n, span)
        mask = torch.zeros_like(seen, dtype=torch.float32).masked_fill(~seen, -torch.inf)
        self.span = span
        self.mask = cast(mask)[:, None, None]

    def __call__(self, q, keys, values):
        return attention(q, keys[:, :self.span], values[:, :self.span], self.mask)


class FlashFirst:
    """MaskedFirst with flash attention, which reads only the used part of the cache; see
    `flash_fits`. span: length of the cache.

    The kernel takes texts without gaps between them, so the unused rest of each row is passed as a
    text of its own, without queries.
    """

    def __init__(self, counts: torch.Tensor, span: int):
        rows = torch.arange(len(counts), device=counts.device) * span
        # starts of each text and of the unused rest of its row
        starts = torch.stack((rows, rows + counts), dim=1).flatten()
        self.starts = F.pad(starts, (0, 1), value=len(counts) * span).int()             # (2n + 1,)
        # queries before each start: 0, 1, 1, 2, 2, ...
        self.queries = ((torch.arange(len(self.starts), device=counts.device) + 1) // 2).int()
        self.span = span

    def __call__(self, q, keys, values):
        q = cast(q).flatten(0, 1)                                                       # (n, H, D)
        keys = keys.flatten(0, 1)                                                  # (n span, H, D)
        values = values.flatten(0, 1)
        y = varlen_attn(q, keys, values, self.queries, self.starts, 1, self.span)
        return y[:, None]


def flash_fits(device: torch.device, head_dim: int) -> bool:
    """Whether FlashFirst is supported: on Ampere or newer, under autocast, with a torch built for
    it and a head size that its kernels support."""
    if device.type != "cuda" or not torch.is_autocast_enabled("cuda"):
        return False
    if kernels.without("varlen") or not kernels.has_flash(device):
        return False
    return head_dim % 8 == 0 and head_dim <= 256
