"""Generating text with a model: the cache of keys and values, sampling the next token, the loop over tokens."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lib.cli import BadInput, flag
from lib.devices import any_shape, autocast


class NonFinite(BadInput):
    """A model whose logits are NaN or infinite: there is nothing to generate or evaluate."""

    def __init__(self):
        super().__init__("the model's logits are NaN or infinite: its weights are damaged or the run diverged; name an "
                         "earlier checkpoint")


@dataclass
class SampleConfig:
    prompt: str = flag("Hello, I'm a language model,", "text to continue; empty: a document of its own")
    samples: int = flag(4, "texts to generate", at_least=1, at_most=4096)
    max_new_tokens: int = flag(32, "tokens per text, beyond the prompt", at_least=1, at_most=1_000_000)
    temperature: float = flag(1.0, "below 1 safer, above 1 wilder, 0 always the likeliest token", at_least=0, at_most=100)
    top_k: int = flag(50, "sample from the k likeliest tokens; 0: from all", at_least=0)
    seed: int = flag(42, "seed of the samples", at_least=0, below=2**63)


class KVCache:
    """Keeps the keys and values of every layer, so that a new token costs one position, not all (Pope et al. 2022,
    https://arxiv.org/abs/2211.05102, section 2)."""

    def __init__(self):
        self.layers, self.last = {}, {}

    @property
    def length(self):
        return next(iter(self.layers.values()))[0].size(2) if self.layers else 0

    def update(self, layer, k, v):
        """Keys and values of new tokens (B, H, T, D) -> those of all tokens so far, in this layer."""
        if layer in self.layers:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self.layers[layer], (k, v), strict=True))
        self.layers[layer] = k, v
        return k, v

    def previous(self, layer, x):
        """What stood before the new tokens x (B, T, C) of a layer: (B, 1, C), zeros before the first token."""
        before, self.last[layer] = self.last.get(layer, torch.zeros_like(x[:, :1])), x[:, -1:]
        return before


def draw(logits, temperature, generator=None):
    """Logits (B, n) -> indices sampled from softmax(logits / temperature), int64 (B, 1); temperature 0: the largest logit's.

    Raises NonFinite.
    """
    if not logits.isfinite().all():
        raise NonFinite
    if temperature < 1e-6:  # in fp32, dividing by less overflows or makes 0 / 0
        return logits.argmax(dim=-1, keepdim=True)
    probs = F.softmax((logits - logits.amax(dim=-1, keepdim=True)) / temperature, dim=-1)  # at most 0: no inf - inf
    return torch.multinomial(probs, 1, generator=generator)


@torch.no_grad()
def generate(model, idx, max_new_tokens, choose, done=lambda idx: False):
    """Continue idx, int64 (B, T), token by token -> (B, up to T + max_new_tokens).

    choose: logits, fp32 (B, vocab_size) -> the next tokens, int64 (B, 1). done: all tokens so far -> whether to end here.
    The caller sets autocast and eval mode.
    """
    block_size, kv_cache, new = model.config.block_size, KVCache(), idx
    with any_shape():
        for _ in range(max_new_tokens):
            if idx.size(1) > block_size:  # the window moves on, and with it every token's position: the cache is stale
                kv_cache, new = KVCache(), idx[:, -block_size:]
            new = choose(model(new, kv_cache=kv_cache, logits_at=(slice(None), -1)).float())
            idx = torch.cat((idx, new), dim=1)
            if done(idx):
                break
    return idx


@torch.no_grad()
def sample(model, tokenizer, cfg):
    """Continue cfg.prompt cfg.samples times -> list of str, prompts included. Seeded; leaves all other random state alone.

    Of several processes each generates the same texts, in the same number of forward passes. Raises NonFinite.
    """
    training, device = model.training, next(model.parameters()).device
    ids = tokenizer.encode(cfg.prompt).tolist() or [tokenizer.eot]
    idx = torch.tensor(ids, device=device).repeat(cfg.samples, 1)                       # (samples, T)
    generator = torch.Generator(device=device).manual_seed(cfg.seed)

    def choose(logits):
        top, choices = logits.topk(min(cfg.top_k or logits.size(-1), logits.size(-1)))
        return choices.gather(-1, draw(top, cfg.temperature, generator))

    model.eval()
    try:
        with autocast(device):
            idx = generate(model, idx, cfg.max_new_tokens, choose)
    finally:
        model.train(training)
    rows = [row[0 if cfg.prompt else 1:] for row in idx.tolist()]  # an end-of-text token ends a sample
    return [tokenizer.decode(row[:row.index(tokenizer.eot)] if tokenizer.eot in row else row) for row in rows]
