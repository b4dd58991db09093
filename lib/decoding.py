"""Writing text with a model: the cache of keys and values, drawing the next token, the loop over tokens."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lib.cli import BadInput, flag
from lib.devices import any_shape, autocast


class NonFinite(BadInput):
    """Logits that are NaN or infinite: nothing can be drawn from them."""


@dataclass
class SampleConfig:
    prompt: str = flag("Hello, I'm a language model,", "text to continue; empty: a document of its own")
    samples: int = flag(4, "texts to write")
    max_new_tokens: int = flag(32, "tokens a text, beyond the prompt")
    temperature: float = flag(1.0, "below 1 safer, above 1 wilder, 0 always the likeliest token")
    top_k: int = flag(50, "draw from the k likeliest tokens; 0: from all")
    seed: int = flag(42, "seed of the draws")


class KVCache:
    """Keeps the keys and values of every layer, so that generating a token computes one position, not all (Pope et al. 2022,
    https://arxiv.org/abs/2211.05102, section 2)."""

    def __init__(self):
        self.layers = {}

    @property
    def length(self):
        return next(iter(self.layers.values()))[0].size(2) if self.layers else 0

    def update(self, layer, k, v):
        """Keys and values of new tokens (B, H, T, D) -> those of all tokens so far, in this layer."""
        if layer in self.layers:
            k, v = (torch.cat(pair, dim=2) for pair in zip(self.layers[layer], (k, v), strict=True))
        self.layers[layer] = k, v
        return k, v


def draw(logits, temperature, generator=None):
    """Indices drawn from softmax(logits / temperature), logits being (B, n): int64 (B, 1). 0: the largest one's."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    probs = F.softmax((logits - logits.amax(dim=-1, keepdim=True)) / temperature, dim=-1)  # a tiny temperature must not make inf - inf
    return torch.multinomial(probs, 1, generator=generator)


@torch.no_grad()
def generate(model, idx, max_new_tokens, choose, done=lambda idx: False):
    """Continue idx, int64 (B, T), token by token -> (B, up to T + max_new_tokens).

    choose: logits, fp32 (B, vocab_size) -> the next tokens, int64 (B, 1). done: all tokens so far -> whether to end here.
    Autocast and evaluation mode are the caller's business.
    """
    block_size, kv_cache, new = model.config.block_size, KVCache(), idx
    with any_shape():
        for _ in range(max_new_tokens):
            if idx.size(1) > block_size:  # the window moves on, and with it every token's position: what was kept is of no use
                kv_cache, new = KVCache(), idx[:, -block_size:]
            logits = model(new, kv_cache=kv_cache, logits_at=(slice(None), -1)).float()
            if not logits.isfinite().all():
                raise NonFinite("the model's logits are NaN or infinite: use an earlier checkpoint")
            new = choose(logits)
            idx = torch.cat((idx, new), dim=1)
            if done(idx):
                break
    return idx


@torch.no_grad()
def sample(model, tokenizer, cfg):
    """Continue cfg.prompt cfg.samples times -> list of str, prompts included. Seeded; changes no other random state."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    ids = tokenizer.encode(cfg.prompt).tolist() or [tokenizer.eot]
    idx = torch.tensor(ids, device=device).repeat(cfg.samples, 1)                       # (samples, T)
    generator = torch.Generator(device=device).manual_seed(cfg.seed)

    def choose(logits):
        top, choices = logits.topk(min(cfg.top_k or logits.size(-1), logits.size(-1)))
        return choices.gather(-1, draw(top, cfg.temperature, generator))

    with autocast(device):
        idx = generate(model, idx, cfg.max_new_tokens, choose)
    model.train(training)
    rows = [row[0 if cfg.prompt else 1:] for row in idx.tolist()]  # an end of text ends a sample
    return [tokenizer.decode(row[:row.index(tokenizer.eot)] if tokenizer.eot in row else row) for row in rows]
