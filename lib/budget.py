"""How long a run is: steps, tokens, epochs, FLOPs."""

import torch

from lib.cli import BadInput
from lib.devices import compute_dtype, memory_bytes

MOST_STEPS = 2**31
UNMEASURED = 1_000_000  # steps of a run of --minutes until its speed is known
FIT_SHARE = 0.25  # of --minutes in which the number of steps follows the measured speed; then it stands


def steps_of(cfg, train_tokens):
    """Optimizer steps of a run: --max_steps, or --epochs passes over so many tokens; with --minutes UNMEASURED, until StepTimer
    has fitted it. Raises BadInput if there is not one."""
    if cfg.minutes:
        return UNMEASURED
    steps = cfg.max_steps or int(min(cfg.epochs * train_tokens / cfg.total_batch_size, MOST_STEPS))
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
    """Fits cfg.steps, the length of the run, to --minutes of training steps; without --minutes, leaves it. timed: steps, their seconds."""

    def __init__(self, cfg, timed):
        self.cfg, self.timed = cfg, tuple(timed)

    def fit(self, step, seconds):
        """`step` updates are behind, the last of which took `seconds` -> cfg.steps."""
        if self.cfg.minutes:
            self.timed = count, total = self.timed[0] + 1, self.timed[1] + seconds
            limit = 60 * self.cfg.minutes
            if total < FIT_SHARE * limit or self.cfg.steps == UNMEASURED:
                self.cfg.steps = max(step + round((limit - total) * count / total), step + 1)
        return self.cfg.steps


def describe(cfg, model, shards, processes):
    """What is about to happen, in a few lines."""
    counts, c, device = model.parameter_counts(), model.config, processes.device
    rows, tokens, flops = cfg.total_batch_size // c.block_size // processes.world_size, cfg.steps * cfg.total_batch_size, model.flops_per_token()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"
    active = f", {counts['active']:,} of them active per token" if counts["active"] < counts["total"] else ""
    length = (f"{cfg.minutes:g} minutes of steps of {cfg.total_batch_size:,} tokens" if cfg.minutes else
              f"{cfg.steps:,} steps of {cfg.total_batch_size:,} tokens = {tokens:,} tokens ({tokens / shards.tokens['train']:.2f} epochs), "
              f"{tokens * flops:.2e} FLOPs")
    return "\n".join([
        f"model   {counts['total']:,} parameters{active}: embedding {counts['embedding']:,}, {c.n_layer} layers of {counts['layer']:,}; "
        f"{flops / 1e6:,.1f} MFLOPs per token",
        f"data    {cfg.data}: {shards.tokens['train']:,} train tokens in {len(shards.train)} shards, "
        f"validation on {min(cfg.val_tokens, shards.tokens['val'] - 1) // c.block_size * c.block_size:,}; vocabulary {c.vocab_size:,}, "
        f"padded to {c.padded_vocab_size:,}",
        f"length  {length}",
        f"batch   {cfg.sequences} sequences x {c.block_size} tokens x {rows // cfg.sequences} accumulation steps x "
        f"{processes.world_size} processes",
        f"device  {name}, {str(compute_dtype(device)).removeprefix('torch.')}, torch {torch.__version__}",
    ])
