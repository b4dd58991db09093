"""Rotary position embeddings (Su et al. 2021, https://arxiv.org/abs/2104.09864): frequencies and
tables, also for more positions than a model was trained with."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from lib.cli import BadInput, flag

BASE = 10_000.0


@dataclass
class ContextConfig:
    context: int | None = flag(
        None,
        "context length, tokens, instead of the one trained with; a longer one needs --pos rope",
        at_least=2, at_most=2**20)
    rope_scaling: Literal["plain", "ntk",
                          "yarn"] = flag("plain",
                                         "how rotary positions stretch to a longer --context")


def frequencies(head_dim, scaling="plain", factor=1.0, trained=1):
    """-> (radians per position of each pair of dimensions, fp32 (head_dim / 2,), factor on the
    cosines and sines).

    For `factor` times the `trained` positions:
    plain: as trained; positions beyond turn on.
    ntk:   a larger base, so that the slowest pair turns no further than in training and the fastest
    as fast as there (NTK-aware
           scaling: bloc97 2023, in Peng et al. section 3.1).
    yarn:  pairs that turn less than once in training are slowed down by the factor, those that turn
    more than 32 times not at
           all, those between by degrees; and attention is sharpened (Peng et al. 2023, https://arxiv.org/abs/2309.00071,
           sections 3.2 to 3.4).
    """
    base = BASE * factor ** (head_dim / max(head_dim - 2, 1)) if scaling == "ntk" else BASE
    freq = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if scaling != "yarn" or factor == 1:
        return freq, 1.0
    # the pairs of such turns
    low, high = (head_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(BASE))
                 for turns in (32, 1))
    low, high = max(math.floor(low), 0), min(math.ceil(high), head_dim - 1)
    slowed = ((torch.arange(head_dim // 2, dtype=torch.float32) - low)
              / max(high - low, 1e-3)).clamp(0, 1)
    return freq * (1 - slowed + slowed / factor), 0.1 * math.log(factor) + 1


def tables(freq, scale, length):
    """What `frequencies` returns, and a number of positions -> cosines and sines, fp32 (length,
    head_dim / 2) each."""
    angle = torch.outer(torch.arange(length, dtype=torch.float32), freq)
    return angle.cos() * scale, angle.sin() * scale


def extend(model, cfg):
    """Give a GPT, as trained, the context of a ContextConfig; returns it. Raises BadInput if its
    positions are learned and end before, or if there is nothing to scale."""
    trained = model.config.block_size
    if cfg.rope_scaling != "plain" and (cfg.context or 0) <= trained:
        raise BadInput(f"--rope_scaling {cfg.rope_scaling} is for a --context longer than the {trained:,} tokens trained with: "
                       "name one, or leave it out")
    if cfg.context is None:
        return model
    if cfg.context > trained and model.config.pos != "rope":
        raise BadInput(f"--context {cfg.context:,}: this model has learned its {trained:,} positions and knows no others; only "
                       "--pos rope goes beyond")
    head_dim, device = model.config.n_embd // model.config.n_head, next(model.parameters()).device
    how = frequencies(head_dim, cfg.rope_scaling, max(cfg.context / trained, 1.0), trained)
    cos, sin = (table.to(device) for table in tables(*how, cfg.context)
                )  # the same for all layers: a long context's are large
    for rotary in (module for module in model.modules() if hasattr(module, "cos")):
        rotary.cos, rotary.sin = cos, sin
    model.config = replace(model.config, block_size=cfg.context)
    return model
