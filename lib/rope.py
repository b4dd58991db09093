"""Rotary position embeddings, also for contexts longer than a model was trained with.

Su et al. 2021, https://arxiv.org/abs/2104.09864.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from lib.cli import BadInput, flag

BASE = 10_000.0


@dataclass
class ContextConfig:
    context: int | None = flag(
        None, "context length, tokens; unset: as trained; a longer one needs --pos rope",
        at_least=2, at_most=2**20)
    rope_scaling: Literal["plain", "ntk", "yarn"] = flag(
        "plain", "how rotary positions scale to a longer --context")


def frequencies(head_dim: int, scaling: str = "plain", factor: float = 1.0,
                trained: int = 1) -> tuple[torch.Tensor, float]:
    """Rotary frequencies for a context `factor` times as long as the `trained` context, in tokens.

    Returns radians per position for each pair of dimensions, fp32 (head_dim / 2,), and a scale for
    cosines and sines. scaling is one of:
    plain: as trained; positions are extrapolated.
    ntk:   a larger base, so that the slowest pair rotates no further than in training, and the
           fastest as fast (NTK-aware scaling: bloc97 2023, in Peng et al. section 3.1).
    yarn:  pairs with less than one full rotation in training are slowed down by `factor`, those
           with more than 32 not at all, with a linear ramp between; the scale sharpens attention
           (Peng et al. 2023, https://arxiv.org/abs/2309.00071, sections 3.2 to 3.4).
    """
    base = BASE
    if scaling == "ntk":
        base *= factor ** (head_dim / max(head_dim - 2, 1))
    freq = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if scaling != "yarn" or factor == 1:
        return freq, 1.0
    low = max(math.floor(_pair_with(32, head_dim, trained)), 0)
    high = min(math.ceil(_pair_with(1, head_dim, trained)), head_dim - 1)
    pairs = torch.arange(head_dim // 2, dtype=torch.float32)
    slowed = ((pairs - low) / max(high - low, 1e-3)).clamp(0, 1)
    return freq * (1 - slowed + slowed / factor), 0.1 * math.log(factor) + 1


def _pair_with(rotations: int, head_dim: int, trained: int) -> float:
    """The (fractional) index of the pair that makes this many rotations in the trained context."""
    return head_dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(BASE))


def tables(freq: torch.Tensor, scale: float, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of `length` positions, fp32 (length, head_dim / 2) each.

    freq, scale: from `frequencies`.
    """
    angle = torch.outer(torch.arange(length, dtype=torch.float32), freq)
    return angle.cos() * scale, angle.sin() * scale


def extend(model: Any, cfg: ContextConfig) -> Any:
    """Set the context length of a trained GPT, in place; returns it.

    Raises BadInput if it has too few learned positions, or if --rope_scaling has no effect.
    """
    trained = model.config.block_size
    if cfg.rope_scaling != "plain" and (cfg.context or 0) <= trained:
        raise BadInput(f"--rope_scaling {cfg.rope_scaling} needs a --context longer than the "
                       f"{trained:,} tokens trained with: give one, or leave it out")
    if cfg.context is None:
        return model
    if cfg.context > trained and model.config.pos != "rope":
        raise BadInput(f"--context {cfg.context:,}: this model has {trained:,} learned positions: "
                       "give fewer, or train with --pos rope")
    head_dim = model.config.n_embd // model.config.n_head
    device = next(model.parameters()).device
    factor = max(cfg.context / trained, 1.0)
    freq, scale = frequencies(head_dim, cfg.rope_scaling, factor, trained)
    cos, sin = tables(freq, scale, cfg.context)
    cos = cos.to(device)  # shared by all layers, as tables of a long context are large
    sin = sin.to(device)
    for module in model.modules():
        if hasattr(module, "cos"):
            module.cos = cos
            module.sin = sin
    model.config = replace(model.config, block_size=cfg.context)
    return model
