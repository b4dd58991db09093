"""The length of a run in steps, tokens, hours and dollars.

Tokens per parameter count all parameters, embeddings included, as in Hoffmann et al. 2022
(Chinchilla, https://arxiv.org/abs/2203.15556, appendix F), whose rule of thumb is 20. Kaplan et al.
2020 (https://arxiv.org/abs/2001.08361, section 1.3) exclude embeddings, which is much of why the
two disagree (Pearce & Song 2024, https://arxiv.org/abs/2406.12907). Tied matrices count once.
"""

import math
from collections.abc import Sequence
from typing import Any

from lib.cli import BadInput

LENGTHS = ("epochs", "max_steps", "minutes", "tokens_per_param")  # flags that set the length
MOST_STEPS = 2**31
UNMEASURED = MOST_STEPS  # length of a run of --minutes until its speed is known


def length_flag(cfg: Any) -> str:
    """The flag of LENGTHS that sets the length of the run."""
    for name in LENGTHS:
        if name != "epochs" and getattr(cfg, name):
            return name
    return "epochs"


def only_length(explicit: set[str]) -> dict:
    """Settings that drop the length of a preset or a checkpoint if `explicit` flags set another."""
    if not explicit & set(LENGTHS):
        return {}
    return {name: None for name in LENGTHS if name != "epochs" and name not in explicit}


def batch_size(step: int, cfg: Any) -> int:
    """Tokens of update `step`: half of --total_batch_size for the first --batch_warmup tokens.

    At first, small batches learn more per token; the critical batch size grows during training
    (McCandlish et al. 2018, https://arxiv.org/abs/1812.06162).
    """
    if step < half_steps(cfg):
        return cfg.total_batch_size // 2
    return cfg.total_batch_size


def half_steps(cfg: Any) -> int:
    """Number of half-batch steps at the start of a run."""
    return cfg.batch_warmup // max(cfg.total_batch_size // 2, 1)


def context_length(step: int, steps: int, cfg: Any, block_size: int) -> int:
    """Tokens that attention sees at most in update `step` of `steps`: two of `contexts` during
    --context_warmup, half of it each, then the last one.

    A short context costs less, and a long one is of little use at first (sequence length warm-up,
    Li et al. 2021, https://arxiv.org/abs/2108.06084; modded-nanogpt lengthens its windows).
    """
    short, half, whole = contexts(block_size)
    progress = step / steps
    if progress < cfg.context_warmup / 2:
        return short
    if progress < cfg.context_warmup:
        return half
    return whole


def contexts(block_size: int) -> tuple[int, int, int]:
    """The context lengths of --context_warmup: a quarter of `block_size`, a half, all."""
    return block_size // 4, block_size // 2, block_size


def mean_context(cfg: Any, block_size: int) -> float:
    """The mean of `context_length` over a run."""
    return block_size * (1 - 0.625 * cfg.context_warmup)


def tokens_of(steps: int, cfg: Any) -> int:
    """Tokens in the first `steps` updates."""
    halved = min(steps, half_steps(cfg))
    return steps * cfg.total_batch_size - halved * (cfg.total_batch_size // 2)


def work_of(step: int, steps: int, cfg: Any, costs: Sequence[float]) -> float:
    """FLOPs of the first `step` updates of `steps`.

    costs: FLOPs per token at each of `contexts`.
    """
    warmup = steps * cfg.context_warmup
    ends = (math.ceil(warmup / 2), math.ceil(warmup), step)
    work = 0.0
    before = 0
    for end, cost in zip(ends, costs, strict=True):
        tokens = tokens_of(min(step, end), cfg)
        work += cost * (tokens - before)
        before = tokens
    return work


def steps_in(tokens: float, cfg: Any) -> int:
    """Full steps in `tokens`: the inverse of `tokens_of`."""
    half = cfg.total_batch_size // 2
    missing = half_steps(cfg) * half  # tokens that half-batch steps have less than full ones
    if tokens < missing:
        return int(tokens // half)
    return int((tokens + missing) // cfg.total_batch_size)


def steps_of(cfg: Any, train_tokens: int | None, parameters: int | None) -> int:
    """Optimizer steps of a run, from the active flag of LENGTHS.

    train_tokens: tokens per epoch. parameters: number of parameters. None: unknown. With
    --minutes the result is UNMEASURED, until lib/timer.py's StepTimer knows the speed. Raises
    BadInput unless there are 1 to MOST_STEPS steps.
    """
    if cfg.minutes:
        return UNMEASURED
    if cfg.tokens_per_param:
        if not parameters:
            raise BadInput("--tokens_per_param needs the number of parameters: write vocab_size "
                           "into the meta.json of --data")
        name = "tokens_per_param"
        tokens = cfg.tokens_per_param * parameters
        length = f"{cfg.tokens_per_param:g} tokens for each of {parameters:,} parameters"
    else:
        name = "epochs"
        if train_tokens is None and not cfg.max_steps:
            raise BadInput("--epochs needs the size of --data, which is unfinished and does not "
                           "state it: give --max_steps or --minutes")
        tokens = cfg.epochs * (train_tokens or 0)
        length = f"{cfg.epochs:g} epochs of {train_tokens or 0:,} tokens"
    tokens = min(tokens, MOST_STEPS * cfg.total_batch_size)  # no overflow of huge values
    steps = cfg.max_steps or steps_in(tokens, cfg)
    batch = f"steps of {batch_size(steps, cfg):,}"
    if steps == 0:
        raise BadInput(f"{length} are too few for {batch}: raise --{name} or lower "
                       "--total_batch_size")
    if steps >= MOST_STEPS:
        raise BadInput(f"{length} are too many {batch}: "
                       f"lower --{name} or raise --total_batch_size")
    return steps


def hours_and_dollars(seconds: float, price_per_hour: float | None) -> str:
    """Format a duration and, if the machine's price is known, its cost."""
    hours = seconds / 3600
    text = f"{hours:,.2f} hours" if hours >= 2 else f"{60 * hours:.1f} minutes"
    if price_per_hour:
        text += f", ${hours * price_per_hour:,.2f} at ${price_per_hour:g} per hour"
    return text
