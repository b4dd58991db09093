"""The plan of a run, derived from its settings, data and machine, and checks that settings fit
each other."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from lib.budget import LENGTHS, UNMEASURED, batch_size, steps_of
from lib.cli import BadInput
from lib.devices import memory_bytes
from lib.moe import ExpertConfig
from lib.streams import CorpusLike
from lib.timer import StepTimer

EVALUATIONS = 10  # validations per run if --eval_every is unset, the default in posttrain.py
# flags that change the text of an epoch; all but the first are posttrain.py's
EPOCH_FLAGS = {"data", "replay", "val_share", "val_data", "strict"}
LENGTH_FLAGS = {*LENGTHS, *EPOCH_FLAGS, "total_batch_size", "batch_warmup"}


class Settings(NamedTuple):
    """The settings of a run, resolved once and never changed."""

    train: Any               # TrainConfig
    model: Any               # GPTConfig
    explicit: set[str]       # names of the flags given on the command line
    resume: Any = None       # lib.resume.Resume, None for a new run
    start: list | None = None  # [(GPT, Tokenizer)] of --init_from, popped to free memory
    auto: dict = {}          # --size auto and --dollars, until train_gpt2.py's `sized`


@dataclass(frozen=True)
class RunPlan:
    """Values derived from the settings, the data and the machine before a run starts."""

    steps: int                      # length of the run; UNMEASURED until --minutes are measured
    block_size: int                 # tokens per sequence
    rows: int                       # sequences per process in the first step
    most_rows: int                  # and in a step after --batch_warmup
    eval_every: int                 # steps between validations, 0: never
    sample_every: int               # steps between samples, 0: never
    micro_batch: int | None = None  # sequences per forward pass; None until memory is probed

    @property
    def first_micro_batch(self) -> int:
        """Sequences per forward pass in the first step, once `micro_batch` is known."""
        assert self.micro_batch
        return math.gcd(self.rows, self.micro_batch)


def make_plan(settings: Settings, corpus: CorpusLike, parameters: int | None,
              world_size: int) -> RunPlan:
    """The RunPlan of a run, before its micro-batch is known.

    parameters: number of parameters of the model, None if unknown. Raises BadInput if the settings
    do not fit each other, the data or the number of processes.
    """
    cfg = settings.train
    steps = steps_left(settings) or steps_of(cfg, corpus.tokens["train"], parameters)
    if settings.resume and steps == UNMEASURED:
        state = settings.resume.state
        steps = StepTimer(cfg, steps, state.get("timed", (0, 0.0))).length(state["step"])
    check_flags(settings, steps)
    block_size = settings.model.block_size
    check_batch(cfg, block_size, world_size)
    corpus.check_length(cfg, steps)

    eval_every = cfg.eval_every
    if eval_every is None:
        eval_every = -(-steps // EVALUATIONS)
    sample_every = cfg.sample_every
    if sample_every is None:
        sample_every = eval_every
    unit = block_size * world_size
    rows = batch_size(0, cfg) // unit
    most_rows = cfg.total_batch_size // unit
    return RunPlan(steps, block_size, rows, most_rows, eval_every, sample_every)


def steps_left(settings: Settings) -> int | None:
    """The length of the resumed run; None for a new run, or if a flag sets another length."""
    resume = settings.resume
    if resume is None:
        return None
    if not LENGTH_FLAGS & settings.explicit:
        return resume.state["max_steps"]
    train = settings.train
    names = ["total_batch_size", "batch_warmup"]
    if train.follow:
        names += [*LENGTHS, "data"]
    elif train.minutes:
        names.append("minutes")
    else:
        return None
    before = resume.state["train_config"]
    for name in names:
        was = before.get(name, 0)
        if isinstance(was, list):
            was = tuple(was)
        if getattr(train, name) != was:
            return None
    # fitted to the same minutes, or to the size that an unfinished folder promised
    return resume.state["max_steps"]


def check_flags(settings: Settings, steps: int) -> None:
    """Raises BadInput for flags that exclude or need each other."""
    cfg, model_cfg, explicit, *_ = settings
    of_tasks = explicit & {"eval_tasks_every", "eval_tasks_dir", "eval_tasks_limit"}
    if of_tasks and not cfg.eval_tasks:
        raise BadInput("--eval_tasks_every, --eval_tasks_dir and --eval_tasks_limit need "
                       "--eval_tasks: name tasks")
    lengths = [name for name in LENGTHS if name in explicit]
    if len(lengths) > 1:
        raise BadInput(f"--{' and --'.join(lengths)} each set the length: give one of them")
    if "curriculum_mix" in explicit and not cfg.curriculum:
        raise BadInput("--curriculum_mix needs --curriculum: name its folder")
    if "tok_per_sec" in explicit:
        raise BadInput("--tok_per_sec is for --plan, --size auto and --dollars; other runs measure "
                       "their own speed: leave it out")
    of_experts = explicit & ExpertConfig.__annotations__.keys() - {"n_experts"}
    if of_experts and not model_cfg.n_experts:
        flags = ", ".join(f"--{name}" for name in sorted(of_experts))
        raise BadInput(f"{flags}: only for Mixture of Experts, give --n_experts above 0")
    if cfg.max_cost and not cfg.price_per_hour:
        raise BadInput("--max_cost needs the price of the machine: give --price_per_hour")
    if "keep_best" in explicit and cfg.keep_best and cfg.eval_every == 0:
        raise BadInput("--keep_best needs validations: give --eval_every above 0")
    if (cfg.warmup_steps or 0) >= steps:
        raise BadInput(f"--warmup_steps {cfg.warmup_steps} must be below the run's {steps} steps: "
                       "give a smaller one")


def check_batch(cfg: Any, block_size: int, world_size: int) -> None:
    """Raises BadInput unless a step is a whole number of sequences per process, and these divide
    into micro-batches."""
    first = batch_size(0, cfg)
    total = f"--total_batch_size {cfg.total_batch_size}"
    halves = 1
    if first < cfg.total_batch_size:
        halves = 2
        total += ", which --batch_warmup halves,"
    if world_size > first // block_size:
        raise BadInput(f"{total} is {first // block_size} sequences of --block_size {block_size}, "
                       f"fewer than {world_size} processes: raise it, or lower --nproc_per_node")
    unit = block_size * world_size
    if first * halves != cfg.total_batch_size or first % unit:
        fitting = -(-first // unit) * unit * halves
        factors = f"--block_size {block_size} x {world_size} processes"
        if halves > 1:
            factors = f"{halves} x {factors}"
        raise BadInput(f"{total} must be a multiple of {factors}; {fitting} is")
    if cfg.context_warmup and block_size % 4:
        raise BadInput(f"--context_warmup takes quarters of --block_size {block_size}: give a "
                       "multiple of 4")
    rows = cfg.total_batch_size // unit
    if cfg.micro_batch != "auto" and rows % cfg.micro_batch:
        raise BadInput(
            f"--micro_batch {cfg.micro_batch} must divide the {rows} sequences per process and "
            f"step (--total_batch_size {cfg.total_batch_size} / --block_size {block_size} / "
            f"{world_size} processes)")


def check_memory(tensors: Iterable[torch.Tensor], device: torch.device, shards: int = 1) -> None:
    """Raises BadInput if `device` lacks the memory for these tensors, a model's weights, gradients
    and optimizer state, or for one of `shards` equal parts."""
    needed = sum(t.numel() * t.element_size() for t in tensors) / shards
    there = memory_bytes(device)
    if there and needed > there:
        raise BadInput("this model's weights, gradients and optimizer state need "
                       f"{needed / 1e9:,.0f} GB, but there are {there / 1e9:,.0f}: "
                       "lower --n_embd, --n_layer or --block_size")
