"""The lines printed before a run's first step: model, data, length, batch, device, warnings."""

import math
import time
from typing import Any

import torch

from lib import kernels
from lib.budget import half_steps, tokens_of
from lib.devices import Processes, compute_dtype, device_name, dtype_name, dtype_of
from lib.streams import CorpusLike

# up to here, repeated text is worth nearly as much as new text (Muennighoff et al. 2023,
# https://arxiv.org/abs/2305.16264)
MANY_EPOCHS = 4
DAY = 86_400   # seconds
SLOWEST = 1e9  # FLOP/s that any machine reaches


def describe(cfg: Any, plan: Any, model: Any, corpus: CorpusLike, processes: Processes,
             first: int = 0) -> str:
    """The lines printed before a run that starts at step `first`."""
    lines = [_model_line(model)]
    if cfg.init_from:
        lines.append(f"start   with the weights of {cfg.init_from}")
    lines += corpus.describe(cfg, plan)
    lines.append(_length_line(cfg, plan, model, corpus))
    if not cfg.minutes:  # else printed once the length is fixed
        lines += warnings(cfg, corpus, plan.steps)
    lines.append(_batch_line(cfg, plan, processes))
    dtype = dtype_of(model)
    lines.append(_device_line(processes.device, dtype))
    lines += kernels.notes(processes.device, dtype, bool(model.config.n_experts))
    lines += days(cfg, plan.steps, model, processes, first)
    return "\n".join(lines)


def _model_line(model):
    c = model.config
    counts = model.parameter_counts()
    active = ""
    if counts["active"] < counts["total"]:
        active = f", {counts['active']:,} of them active per token"
    return (f"model   {counts['total']:,} parameters{active}: embedding {counts['embedding']:,}, "
            f"{c.n_layer} layers of {counts['layer']:,}; vocabulary {c.vocab_size:,}, "
            f"padded to {c.padded_vocab_size:,}; "
            f"{model.flops_per_token() / 1e6:,.1f} MFLOPs per token")


def _length_line(cfg, plan, model, corpus):
    if cfg.minutes:
        return f"length  {cfg.minutes:g} minutes of {_batches(cfg)}"
    tokens = tokens_of(plan.steps, cfg)
    epochs, name = corpus.most_repeated(tokens)
    ratio = tokens / model.parameter_counts()["total"]
    passes = ""
    if epochs:  # 0: the size of the data is unknown
        passes = f"{epochs:.2f} epochs of {name}, "
    return (f"length  {plan.steps:,} {_batches(cfg, plan.steps)} = {tokens:,} tokens "
            f"({passes}{ratio:,.4g} tokens per parameter), "
            f"{tokens * model.flops_per_token():.2e} FLOPs")


def _batches(cfg, steps=None):
    """The batch sizes of a run as text; steps None: of unknown length."""
    halved = half_steps(cfg)
    half = cfg.total_batch_size // 2
    if not halved:
        return f"steps of {cfg.total_batch_size:,} tokens"
    if steps is not None and steps <= halved:
        return f"steps of {half:,} tokens, half of --total_batch_size"
    return f"steps of {cfg.total_batch_size:,} tokens, of {half:,} in the first {halved:,}"


def _batch_line(cfg, plan, processes):
    first = plan.first_micro_batch
    passes = plan.rows // first
    line = (f"batch   {first} sequences x {plan.block_size} tokens x "
            f"{passes} accumulation steps x {processes.world_size} processes")
    halved = half_steps(cfg)
    if not 0 < halved < plan.steps:
        return line
    if first == plan.micro_batch:
        return f"{line}; twice the accumulation from step {halved:,} on"
    passes = plan.most_rows // plan.micro_batch
    return (f"{line}; {plan.micro_batch} sequences x {passes} accumulation steps from step "
            f"{halved:,} on")


def _device_line(device, dtype):
    name = device_name(device)
    return f"device  {name}, {dtype_name(dtype)}, torch {torch.__version__}"


def warnings(cfg: Any, corpus: CorpusLike, steps: int) -> list[str]:
    """Warnings about a run of this length."""
    lines = []
    if (cfg.curriculum_steps or 0) > steps:
        lines.append(f"warning: --curriculum_steps {cfg.curriculum_steps:,} is longer than the "
                     f"{steps:,} steps that --minutes allow: the run ends within the curriculum; "
                     "shorten it, or give more minutes")
    if steps <= half_steps(cfg):
        lines.append(f"warning: all {steps:,} steps are of half of --total_batch_size: the run "
                     f"ends within its --batch_warmup of {cfg.batch_warmup:,} tokens; lower it, or "
                     "train for longer")
    epochs, name = corpus.most_repeated(tokens_of(steps, cfg))
    if epochs > MANY_EPOCHS:
        lines.append(f"warning: {epochs:,.1f} epochs of {name}, more than {MANY_EPOCHS}, beyond "
                     "which repeated text teaches less and less: get more text, or train less on "
                     "this")
    return lines


def days(cfg: Any, steps: int, model: Any, processes: Processes, first: int) -> list[str]:
    """A warning if the steps from `first` on take days on this machine, else none."""
    tokens = tokens_of(steps, cfg) - tokens_of(first, cfg)
    flops = model.flops_per_token() * tokens
    if cfg.minutes or flops < DAY * SLOWEST or not processes.main:
        return []
    speed = matmul_flops(processes.device) * processes.world_size
    if flops < DAY * speed:
        return []
    return [f"warning: this run takes at least {flops / speed / DAY:,.0f} days on this machine, "
            f"whose matmuls make {speed / 1e9:,.0f} GFLOP/s: shorten it by --max_steps or "
            "--minutes, or choose a smaller model"]


def matmul_flops(device: torch.device) -> float:
    """FLOP/s of matrix multiplications on this device, measured in 0.1 s: an upper bound of what
    training reaches."""
    n = 4096 if device.type == "cuda" else 512
    a = torch.ones(n, n, device=device, dtype=compute_dtype(device))
    (a @ a)[0, 0].item()  # loads kernels, for longer than all products take
    fastest = math.inf
    end = time.perf_counter() + 0.1
    while time.perf_counter() < end or fastest == math.inf:
        started = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        fastest = min(fastest, time.perf_counter() - started)
    return 2 * n**3 / fastest
