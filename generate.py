"""Write text with a checkpoint, token by token.

    python generate.py --checkpoint log/<run>/ckpt_<step>.pt --prompt "Once upon a time" --max_new_tokens 100
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from cli import BadInput, flag, parse, run
from devices import any_shape, autocast, pick_device


@dataclass
class Config:
    checkpoint: str | None = flag(None, "a ckpt_<step>.pt of this project")
    device: Literal["auto", "cuda", "mps", "cpu"] = flag("auto", "auto: cuda, then mps, then cpu")


@dataclass
class SampleConfig:
    prompt: str = flag("Hello, I'm a language model,", "text to continue; empty: a document of its own")
    samples: int = flag(4, "texts to write")
    max_new_tokens: int = flag(32, "tokens a text, beyond the prompt")
    temperature: float = flag(1.0, "below 1 safer, above 1 wilder, 0 always the likeliest token")
    top_k: int = flag(50, "draw from the k likeliest tokens; 0: from all")
    seed: int = flag(42, "seed of the draws")


class Past:
    """The keys and values of earlier tokens: none. What a whole text, which training and scoring see at once, goes by."""

    length = 0

    def extend(self, layer, k, v):
        """Keys and values of new tokens (B, H, T, D) -> those of all tokens so far, in this layer."""
        return k, v


class KVCache(Past):
    """Keeps the keys and values of every layer, so that generating a token computes one position, not all (Pope et al. 2022,
    https://arxiv.org/abs/2211.05102, section 2)."""

    def __init__(self):
        self.layers = {}

    @property
    def length(self):
        return next(iter(self.layers.values()))[0].size(2) if self.layers else 0

    def extend(self, layer, k, v):
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
    block_size, past, new = model.config.block_size, KVCache(), idx
    with any_shape():
        for _ in range(max_new_tokens):
            if idx.size(1) > block_size:  # the window moves on, and with it every token's position: what was kept is of no use
                past, new = KVCache(), idx[:, -block_size:]
            new = choose(model(new, at=(slice(None), -1), past=past).float())
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


def main(argv):
    from train_gpt2 import load_checkpoint  # imports this file for its samples; only the command line needs it back

    (cfg, sampling), _ = parse((Config, SampleConfig), argv, __doc__)
    if cfg.checkpoint is None:
        raise BadInput("name a --checkpoint, for instance one under log/")
    for name, low in (("samples", 1), ("max_new_tokens", 1), ("temperature", 0), ("top_k", 0)):
        if not getattr(sampling, name) >= low:  # nan, too
            raise BadInput(f"--{name} must be at least {low}, not {getattr(sampling, name)}")
    if not 0 <= sampling.seed < 2**63:  # what torch takes
        raise BadInput(f"--seed must be at least 0 and below 2^63, not {sampling.seed}")
    model, tokenizer, _ = load_checkpoint(cfg.checkpoint, pick_device(cfg.device))
    for text in sample(model, tokenizer, sampling):
        print(f"{text}\n---")


if __name__ == "__main__":
    run(main)
