"""Scaled dot-product attention: over whole texts, and of one new token per text over those that
were kept.

Queries, keys, values and results are (B, T, H, D): T tokens of H heads with D dimensions each.
"""

from typing import Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

from lib.devices import cast


def attention(q, k, v, mask=None, dropout=0.0):
    """q: (B, T, H, D). k, v: (B, S, H, D). mask: what each query sees, bool or added to the scores,
    broadcasts to (B, H, T, S); None, with S = T: itself and the tokens before it."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # nothing is moved
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask
                                          is None).transpose(1, 2)


class AttentionContext(Protocol):
    """What the tokens of a forward pass attend to, if it is not simply the row they are in:
    a KVCache (lib/decoding.py) while decoding, a Packed (lib/packing.py) for several texts per row.
    """

    positions: torch.Tensor  # int64 (B, T), each token's position in its text

    def attend(self, layer: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
               dropout: float = 0.0) -> torch.Tensor:
        """The attention of one layer, (B, T, H, D)."""

    def previous(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """The vector before each of x (B, T, C) in its text; zeros for the first."""


class MaskedFirst:
    """Attention of one query per text, (n, 1, H, D), to the first `counts`, int64 (n,), of its kept
    tokens, none above `span`."""

    def __init__(self, counts, span):
        seen = torch.arange(span, device=counts.device) < counts[:, None]               # (n, span)
        mask = cast(torch.zeros_like(seen, dtype=torch.float32).masked_fill(~seen, -torch.inf))
        self.span, self.mask = span, mask[:, None, None]

    def __call__(self, q, keys, values):
        return attention(q, keys[:, :self.span], values[:, :self.span], self.mask)


class FlashFirst:
    """The same by flash attention, which reads no more of the cache than counts: see `flash_fits`.
    span: the cache's whole length.

    It takes texts without gaps between them, so the unused rest of each row is a text of its own,
    without queries.
    """

    def __init__(self, counts, span):
        texts = torch.arange(len(counts), device=counts.device)
        starts = torch.stack((texts * span, texts * span + counts),
                             dim=1).flatten()  # of a text, of the rest behind it
        self.starts = F.pad(starts, (0, 1), value=len(counts) * span).int()             # (2n + 1,)
        # how many queries come before each: 0, 1, 1, 2, 2, ...
        self.queries = ((torch.arange(len(self.starts), device=counts.device) + 1) // 2).int()
        self.span = span

    def __call__(self, q, keys, values):
        kept = keys.flatten(0, 1), values.flatten(0, 1)  # (n span, H, D)
        return varlen_attn(cast(q).flatten(0, 1), *kept, self.queries, self.starts, 1,
                           self.span)[:, None]


def flash_fits(device, head_dim):
    """Whether FlashFirst runs: a GPU since Ampere, a torch built for it, under autocast,
    and a head size its kernels support."""
    return (device.type == "cuda" and torch.is_autocast_enabled("cuda")
            and torch.cuda.get_device_capability(device) >= (8, 0)
            and torch.backends.cuda.is_flash_attention_available() and head_dim % 8 == 0
            and head_dim <= 256)
