"""How long a run is: steps, tokens, epochs, FLOPs."""

import torch

from lib.cli import BadInput
from lib.devices import compute_dtype, memory_bytes

MOST_STEPS = 2**31
UNMEASURED = 1_000_000  # steps of a run of --minutes until its speed is known
FIT_SHARE = 0.25  # of --minutes in which the number of steps follows the measured speed; then it stands


def batch_size(step, cfg):
    """Tokens of update `step`: half of --total_batch_size within the first --batch_warmup tokens. Small steps learn more per token at
    first, and the batch from which on they do not grows with training (McCandlish et al. 2018, https://arxiv.org/abs/1812.06162)."""
    return cfg.total_batch_size // 2 if step < _halved(cfg) else cfg.total_batch_size


def _halved(cfg):
    """How many steps of half the batch a run begins with."""
    return cfg.batch_warmup // max(cfg.total_batch_size // 2, 1)


def tokens_of(steps, cfg):
    """Tokens in the first `steps` updates."""
    return steps * cfg.total_batch_size - min(steps, _halved(cfg)) * (cfg.total_batch_size // 2)


def steps_in(tokens, cfg):
    """Whole updates that so many tokens are enough for: the inverse of `tokens_of`."""
    halved, half = _halved(cfg), cfg.total_batch_size // 2
    return int(tokens // half if tokens < halved * half else (tokens + halved * half) // cfg.total_batch_size)


def steps_of(cfg, train_tokens):
    """Optimizer steps of a run: --max_steps, or --epochs passes over so many tokens; with --minutes UNMEASURED, until StepTimer
    has fitted it. Raises BadInput if there is not one."""
    if cfg.minutes:
        return UNMEASURED
    steps = cfg.max_steps or min(steps_in(cfg.epochs * train_tokens, cfg), MOST_STEPS)
    if not 0 < steps < MOST_STEPS:
        raise BadInput(f"{cfg.epochs:g} epochs of {train_tokens:,} tokens are {'no' if not steps else 'too many'} steps of "
                       f"{cfg.total_batch_size:,}: change --epochs or --total_batch_size")
    return steps


def check_memory(tensors, device):
    """Raises BadInput if `device` has not the memory for tensors like these: a model's weights, gradients and optimizer state."""
    needed, there = sum(t.numel() * t.element_size() for t in tensors), memory_bytes(device)
    if there and needed > there:
        raise BadInput(f"this model's weights, gradients and optimizer state need {needed / 1e9:,.0f} GB, and there are "
                       f"{there / 1e9:,.0f}: lower --n_embd, --n_layer or --block_size")


class StepTimer:
    """Fits cfg.steps, the length of the run, to --minutes of training steps; without --minutes, leaves it. timed: tokens, their seconds."""

    def __init__(self, cfg, timed):
        self.cfg, self.timed = cfg, tuple(timed)

    def fit(self, step, seconds):
        """`step` updates are behind, the last of which took `seconds` -> cfg.steps."""
        if self.cfg.minutes:
            self.timed = tokens, total = self.timed[0] + batch_size(step - 1, self.cfg), self.timed[1] + seconds
            limit = 60 * self.cfg.minutes
            if total < FIT_SHARE * limit or self.cfg.steps == UNMEASURED:
                self.cfg.steps = max(steps_in(tokens_of(step, self.cfg) + (limit - total) * tokens / total, self.cfg), step + 1)
        return self.cfg.steps


def describe(cfg, model, shards, processes):
    """What is about to happen, in a few lines."""
    counts, c, device, halved = model.parameter_counts(), model.config, processes.device, _halved(cfg)
    rows, tokens, flops = batch_size(0, cfg) // c.block_size // processes.world_size, tokens_of(cfg.steps, cfg), model.flops_per_token()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"
    length = (f"{cfg.minutes:g} minutes of steps of {cfg.total_batch_size:,} tokens" if cfg.minutes else
              f"{cfg.steps:,} steps of {cfg.total_batch_size:,} tokens = {tokens:,} tokens ({tokens / shards.tokens['train']:.2f} epochs), "
              f"{tokens * flops:.2e} FLOPs")
    return "\n".join([
        f"model   {counts['total']:,} parameters: embedding {counts['embedding']:,}, {c.n_layer} layers of {counts['layer']:,}; "
        f"{flops / 1e6:,.1f} MFLOPs per token",
        f"data    {cfg.data}: {shards.tokens['train']:,} train tokens in {len(shards.train)} shards, "
        f"validation on {min(cfg.val_tokens, shards.tokens['val'] - 1) // c.block_size * c.block_size:,}; vocabulary {c.vocab_size:,}, "
        f"padded to {c.padded_vocab_size:,}",
        f"length  {length}",
        f"batch   {cfg.sequences} sequences x {c.block_size} tokens x {rows // cfg.sequences} accumulation steps x "
        f"{processes.world_size} processes" + (f"; twice the accumulation from step {halved:,} on" if 0 < halved < cfg.steps else ""),
        f"device  {name}, {str(compute_dtype(device)).removeprefix('torch.')}, torch {torch.__version__}",
    ])
