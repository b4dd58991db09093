"""Train GPT-2 (124M) from token shards, with modern improvements, each behind one flag.

    python fineweb.py                                            # text -> shards in edu_fineweb10B/
    python train_gpt2.py                                         # one GPU, or a CPU
    torchrun --standalone --nproc_per_node=8 train_gpt2.py       # eight GPUs
    python train_gpt2.py --preset gpt2                           # the classic baseline
    python train_gpt2.py --mlp gelu --no-emb_norm --run_name no_swiglu_no_embnorm
    python train_gpt2.py --init_from gpt2 --max_lr 1e-4          # begin with OpenAI's weights
    tensorboard --logdir log                                     # watch it

Improvements over the baseline and their flags:
    SwiGLU or ReLU^2 MLP  --mlp            3x learning rate       --max_lr
    RMSNorm               --norm           4 epochs               --epochs
    RoPE                  --pos            a length in minutes    --minutes
    post-embedding norm   --emb_norm       new shuffle each epoch --shuffle
    query-key norm        --qk_norm        Muon                   --optimizer
    token shift           --token_shift    WSD, linear schedules  --schedule, --cooldown
    value residual        --value_residual small batches at first --batch_warmup
    residual scalars      --residual_scalars
    short context first   --context_warmup table of bigrams      --bigram
    bounded logits        --softcap        weight initialization  --init
    no biases             --no-bias        dropout                --dropout
    untied head           --no-tie_embeddings
    Mixture of Experts    --n_experts

All output goes to log/<run>/: config.json, log.txt, TensorBoard events, ckpt_<step>.pt.
"""

import lib.startup  # noqa: F401 (before torch)

# isort: split

import contextlib
import math
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from lib import checkpoint, compiler, doctor, huggingface, nodes, repeat, rope, sizing
from lib.attention import AttentionContext, SpanAttention, attention
from lib.budget import (
    LENGTHS,
    UNMEASURED,
    batch_size,
    context_length,
    contexts,
    half_steps,
    length_flag,
    mean_context,
    only_length,
    tokens_of,
)
from lib.cli import (
    BadInput,
    RankError,
    check,
    flag,
    launched,
    note,
    path_flag,
    read_flags,
    resolve,
    run,
)
from lib.corpus import CURRICULUM_MIX, Corpus
from lib.cross_entropy import LinearCrossEntropy, soft_cap
from lib.decoding import SHOWN, KVCache, NonFinite, sample
from lib.description import describe
from lib.devices import (
    Processes,
    autocast,
    cast,
    compute_dtype,
    device_name,
    device_of,
    dtype_flag,
    gradient_sync,
    parallel,
    peak_flops,
    peak_memory_gb,
    pick_micro_batch,
    to_device,
    to_host,
)
from lib.evals import harness, hellaswag
from lib.failures import explain_failures
from lib.follow import GrowingShards
from lib.forecast import forecast
from lib.logger import RecompileMonitor, SpikeDetector, progress, serve_tensorboard
from lib.moe import ExpertConfig, LoadBalancer, MoE, check_experts
from lib.muon import Muon
from lib.packing import Packed
from lib.parallel import (
    MODES,
    AdamW,
    check_parallel,
    gradient_norms,
    load_weights,
    n_shards,
    prepare,
    state_of,
)
from lib.plan import RunPlan, Settings, check_memory, make_plan
from lib.precision import Precision
from lib.resume import Position, Resume, find_resume, may_change, merge
from lib.run_folder import RunFolder, closing
from lib.shards import check_ids, read_shard, read_validation
from lib.signals import StopSignals, hold_notices
from lib.spending import reached
from lib.streams import (
    CorpusLike,
    FollowingStream,
    Mixture,
    Stream,
    StreamLike,
    TaskLike,
    micro_batches,
    unchanged,
)
from lib.timer import StepTimer
from lib.tokenizers import Tokenizer, load_tokenizer, names_ids

# --------------------------------------------------------------------------------------------------
# Configuration. Every field with a help text is a flag. The defaults are the classic baseline
# (--preset gpt2). `choices` is a lambda where the dict of choices is defined further down.


@dataclass(frozen=True)
class GPTConfig(ExpertConfig):  # and the flags of lib/moe.py
    # shape
    block_size: int = flag(1024, "context length, tokens", at_least=2, at_most=2**20)
    n_layer: int = flag(12, "transformer blocks", above=0, at_most=1000)
    n_head: int = flag(12, "attention heads per block", above=0, at_most=1024)
    n_embd: int = flag(768, "width of the residual stream", above=0, at_most=65_536)
    # improvements
    mlp: str = flag(
        "gelu", "feed-forward layer; all have the same parameter count", choices=lambda: MLPS)
    norm: str = flag(
        "layernorm", "normalization before each layer and the head", choices=lambda: NORMS)
    pos: Literal["learned", "rope"] = flag("learned", "positional encoding: learned or rotary")
    emb_norm: bool = flag(False, "norm right after the embeddings (post-embedding norm)")
    qk_norm: bool = flag(False, "norm on each head's queries and keys")
    bias: bool = flag(True, "biases in linear layers and LayerNorm")
    tie_embeddings: bool = flag(True, "token embedding and output head share one matrix")
    dropout: float = flag(
        0.0, "dropout on embeddings, attention and residual branches", at_least=0, below=1)
    token_shift: bool = flag(
        False, "add the previous token, times learned weights, to each attention layer's input")
    value_residual: bool = flag(
        False, "mix the first layer's values into the values of every other layer")
    residual_scalars: bool = flag(
        False, "learned weights of residual stream and embedding in each block's input")
    bigram: int = flag(
        0, "rows of a table of vectors for pairs of tokens, hashed, added to each block's input; "
           "0: none", at_least=0, at_most=2**26)
    bigram_dim: int = flag(
        0, "width of the --bigram vectors, which are added to as many channels; 0: --n_embd",
        at_least=0, at_most=2**16)
    softcap: float = flag(
        0.0, "bound logits to -softcap..softcap; 0: off", at_least=0, at_most=1e4)
    init: str = flag("gpt2", "weight initialization, see init_weights", choices=lambda: INITS)
    # set by the data or the checkpoint, not by a flag
    vocab_size: int = flag(50257, None, above=0, at_most=2**24)  # ids the tokenizer can produce
    vocab_multiple: int = flag(128, None, above=0, at_most=2**16)

    @property
    def padded_vocab_size(self) -> int:
        """vocab_size, padded to a multiple for tensor-core efficiency."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


LEARNING_RATE: dict[str, Any] = dict(above=0, at_most=1e6)


@dataclass(frozen=True)
class TrainConfig:
    preset: str = flag(
        "modern", "starting point, overridden by other flags", choices=lambda: PRESETS)
    config: str | None = path_flag(
        None, "run folder, or its config.json, whose settings a new run repeats, overridden by "
              "other flags; instead of --preset")
    size: str | None = flag(
        None, "sets n_layer, n_head and n_embd: gpt2 124M, gpt2-medium 350M, gpt2-large 774M, "
              "gpt2-xl 1.6B; auto: the best --depth for --minutes, --max_steps or --dollars",
        choices=lambda: (*SIZES, sizing.AUTO))
    depth: int | None = flag(
        None, "sets n_layer to this, n_embd to 64 times this, rounded up to whole heads of 128",
        above=0, at_most=1000)
    # data
    data: tuple[str, ...] = path_flag(
        ("edu_fineweb10B",), "folders of token shards, DIR[:WEIGHT] each; weights are shares of "
                             "the tokens; unset: by size")
    curriculum: str | None = path_flag(
        None, "folder of shards to start with, such as simple text; --data gradually replaces it")
    curriculum_steps: int | None = flag(
        None, "steps until --data has replaced --curriculum", above=0, below=2**31)
    curriculum_mix: str = flag(
        "cosine", "how the share of --curriculum decays; step: all at once",
        choices=lambda: CURRICULUM_MIX)
    follow: bool = flag(
        False, "start while fineweb.py is still writing --data, and wait for its shards: the first "
               "epoch reads them in order")
    shuffle: bool = flag(False, "reshuffle shards, and the documents in each, every epoch")
    val_tokens: int = flag(
        10_485_760, "validation tokens per folder, from the start of its val shards", above=0)
    # length and batch
    epochs: float = flag(1.0, "passes over the training shards", above=0)
    max_steps: int | None = flag(
        None, "optimizer steps; instead of --epochs", above=0, below=2**31)
    minutes: float | None = flag(
        None, "minutes of training steps, without evaluations; instead of --epochs", above=0,
        at_most=1e7)
    dollars: float | None = flag(
        None, "what the run may cost at --price_per_hour, start-up and evaluations included; "
              "instead of --epochs", above=0, at_most=1e9)
    tokens_per_param: float | None = flag(
        None, "tokens per parameter, 20 in Chinchilla; instead of --epochs", above=0, at_most=1e6)
    total_batch_size: int = flag(
        524_288, "tokens per optimizer step, over all processes", above=0, at_most=2**28)
    batch_warmup: int = flag(
        0, "use half of --total_batch_size for this many tokens at the start", at_least=0)
    context_warmup: float = flag(
        0.0, "share of the run in which attention sees less than --block_size: spans of a quarter "
             "of it in the first half of that share, then spans of a half", at_least=0, at_most=1)
    micro_batch: int | Literal["auto"] = flag(
        "auto", "sequences per forward pass; auto: the largest that fits in memory", above=0)
    plan: bool = flag(
        False, "print steps, FLOPs and cost of 8 to 40 tokens per parameter at every --size, and "
               "exit")
    doctor: bool = flag(
        False, "check whether this machine is ready to train, time ten steps, and exit")
    tok_per_sec: float | None = flag(
        None, "measured throughput of all GPUs together, for --plan, --size auto and --dollars",
        above=0)
    price_per_hour: float | None = flag(
        None, "dollars per hour of the machine, for the cost of a run", above=0)
    max_hours: float | None = flag(
        None, "stop, with a checkpoint, after this many hours, start-up and earlier starts "
              "included", above=0)
    max_cost: float | None = flag(
        None, "stop, with a checkpoint, after this many dollars at --price_per_hour", above=0)
    # optimizer
    optimizer: str = flag(
        "adamw", "muon: Muon for the matrices in blocks, AdamW for the rest",
        choices=lambda: OPTIMIZERS)
    max_lr: float = flag(
        6e-4, "peak learning rate; with another --optimizer than the preset's, this and the next "
              "four default to that optimizer's", **LEARNING_RATE)
    embedding_lr: float | None = flag(
        None, "peak rate of embeddings; unset: --max_lr, or 5 times that with --emb_norm",
        **LEARNING_RATE)
    bigram_lr: float | None = flag(
        None, "peak rate of the --bigram table; unset: --embedding_lr", **LEARNING_RATE)
    head_lr: float | None = flag(
        None, "peak rate of an untied head; unset: --max_lr", **LEARNING_RATE)
    vector_lr: float | None = flag(
        None, "peak rate of norms, biases and scalars; unset: --max_lr", **LEARNING_RATE)
    min_lr_frac: float = flag(
        0.1, "final learning rate as a fraction of the peak", at_least=0, at_most=1)
    warmup_steps: int | None = flag(
        None, "steps of linear warm-up; unset: 3.75% of the run, at least 40 or a quarter of it",
        at_least=0)
    schedule: str = flag(
        "cosine", "learning rate after the warm-up", choices=lambda: SCHEDULES)
    cooldown: float = flag(
        0.2, "share of a wsd run in which the learning rate decays", above=0, at_most=1)
    momentum: float = flag(0.95, "Muon's momentum", at_least=0, below=1)
    weight_decay: float = flag(
        0.1, "on matrices; with AdamW also on embeddings and head", at_least=0, at_most=1e6)
    grad_clip: float = flag(1.0, "clip the gradient norm to this; 0: no clipping", at_least=0)
    # what happens along the way (0: never)
    eval_every: int = flag(250, "steps between validations", at_least=0)
    hellaswag_every: int = flag(250, "steps between HellaSwag evaluations", at_least=0)
    hellaswag_file: str | None = path_flag(
        None, "hellaswag_val.jsonl; unset: downloaded once into hellaswag/")
    eval_tasks: str | None = flag(
        None, "comma-separated tasks of lm-evaluation-harness, see eval_harness.py")
    eval_tasks_every: int = flag(1000, "steps between evaluations on --eval_tasks", at_least=0)
    eval_tasks_dir: str | None = path_flag(
        None, "folder of <task>.jsonl for --eval_tasks; unset: the Hugging Face hub")
    eval_tasks_limit: int | None = flag(None, "items per task; unset: all", above=0)
    sample_every: int = flag(250, "steps between printed samples", at_least=0)
    sample_prompt: str = flag("Hello, I'm a language model,", "prompt of the samples")
    save_every: int = flag(
        5000, "steps between checkpoints, 0: never; the last step is always saved", at_least=0)
    save_minutes: float = flag(10.0, "minutes between checkpoints, 0: never", at_least=0)
    keep: int = flag(3, "number of newest checkpoints to keep; 0: all", at_least=0)
    keep_best: bool = flag(
        False, "also save and keep the checkpoint with the lowest validation loss")
    max_skipped: int = flag(10, "abort after N consecutive non-finite steps", above=0)
    spike: float = flag(
        0.2, "report a loss that exceeds the median of the last 50 by 8 times their spread and by "
             "at least N nats; 0: never", at_least=0)
    log_every: int | None = flag(
        None, "steps between lines on the console; unset: the first ten, then about one per "
              "second or per hundred steps", above=0)
    # the run
    run_name: str | None = flag(
        None, "name of the run's folder in --log_dir; unset: preset and time")
    log_dir: str = path_flag("log", "folder of all runs")
    sync: str | None = flag(
        None, "shell command that copies the run elsewhere after each save; {folder} and {name} "
              "stand for its folder and name")
    on_end: str | None = flag(
        None, "shell command to run when the run has ended or failed, see $RUN_OUTCOME")
    resume: str | None = path_flag(
        None, "checkpoint or run folder to resume; auto: the newest of --run_name (the default), "
              "or without a name the last unfinished run of this same command")
    init_from: str | None = path_flag(
        None, "weights and shape to start a new run from: gpt2 to gpt2-xl, a run folder, a "
              "checkpoint, or a folder written by export_hf.py")
    tensorboard: int = flag(
        0, "port to serve TensorBoard of --log_dir on; 0: not served", at_least=0, below=2**16)
    tensorboard_host: str = flag(
        "127.0.0.1", "address that --tensorboard listens on; 0.0.0.0: all of this machine's")
    tracker: Literal["trackio", "wandb"] | None = flag(
        None, "log to this tracker, too, what TensorBoard shows; needs its package")
    deterministic: bool = flag(
        False, "reproducible losses on GPUs, too, at a cost in speed")
    seed: int = flag(
        1337, "seed of weights, shuffling, dropout and samples", at_least=0, below=2**63)
    device: Literal["auto", "cuda", "mps", "cpu"] = flag("auto", "auto: cuda, then mps, then cpu")
    dtype: str = dtype_flag("; fp16 scales the loss")
    compile: bool | None = flag(
        None, "torch.compile the model; unset: on cuda, if it saves time")
    parallel: str = flag(
        "ddp", "fsdp: split weights and optimizer state over the processes", choices=lambda: MODES)
    checkpoint_activations: bool = flag(
        False, "recompute each block in the backward pass: less memory, a third more FLOPs")


# Peak learning rates where --optimizer is not the preset's
RATES: dict[str, dict] = {
    "adamw": dict(max_lr=6e-4, embedding_lr=None, bigram_lr=None, head_lr=None, vector_lr=None),
    "muon": dict(max_lr=0.03, embedding_lr=0.01, bigram_lr=0.3, head_lr=0.004, vector_lr=0.015),
}
FAR_OFF = 10  # warn if --max_lr differs from the usual rate by more than this factor

MODERN = dict(
    n_head=6, mlp="swiglu", norm="rmsnorm", pos="rope", emb_norm=True, bias=False,
    max_lr=1.8e-3, epochs=4.0, shuffle=True,
)
SPEEDRUN = dict(
    # model
    n_layer=11, n_head=4, n_embd=512, block_size=2048,
    mlp="relu2", norm="rmsnorm", pos="rope", emb_norm=True, qk_norm=True, bias=False,
    token_shift=True, value_residual=True, residual_scalars=True, softcap=15.0, init="zero_proj",
    # optimizer
    optimizer="muon", momentum=0.9, **RATES["muon"], weight_decay=0.1, grad_clip=0.0,
    schedule="wsd", cooldown=0.7, warmup_steps=0, min_lr_frac=0.0,
    # length and batch
    total_batch_size=131_072, batch_warmup=12_000_000, context_warmup=0.75, epochs=4.0,
    shuffle=True,
)
TINY = SPEEDRUN | dict(
    n_layer=4, n_head=2, n_embd=128, block_size=256, tie_embeddings=False, softcap=0.0,
    residual_scalars=False, bigram=16_384,
    max_lr=0.025, embedding_lr=0.5, weight_decay=0.03, cooldown=0.4,
    data=("docstrings",), max_steps=920, total_batch_size=2048, batch_warmup=0, context_warmup=0.0,
    val_tokens=65_536, eval_every=230, hellaswag_every=0, sample_every=460,
    sample_prompt="Return the", compile=False,
)
PRESETS: dict[str, dict] = {"gpt2": {}, "modern": MODERN, "speedrun": SPEEDRUN, "tiny": TINY}
SIZES: dict[str, dict] = {
    "gpt2":        dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large":  dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl":     dict(n_layer=48, n_head=25, n_embd=1600),
}
# --depth: nanochat's ratio. The winners in benchmarks/race_h100_202611.md have it, except two
# narrower ones for 6 and 10 s
WIDTH_PER_LAYER = 64
HEAD = 128


def shape_of(depth: int) -> dict[str, int]:
    """The shape of --depth."""
    n_head = -(-depth * WIDTH_PER_LAYER // HEAD)
    return dict(n_layer=depth, n_head=n_head, n_embd=n_head * HEAD)


# --------------------------------------------------------------------------------------------------
# Model. Shapes in comments: B sequences, T tokens, C = n_embd, H heads of D = C / H, V padded
# vocabulary. A choice is a name in the config and a class in a dict; constructors branch, forward
# does not.


class LayerNorm(nn.LayerNorm):
    """Ba et al. 2016, https://arxiv.org/abs/1607.06450."""

    def __init__(self, dim: int, bias: bool):
        super().__init__(dim, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)  # torch.compile skips modules that are torch's own


class RMSNorm(nn.RMSNorm):
    """Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467. Has no bias.

    In fp32 under autocast, as LayerNorm is.
    """

    def __init__(self, dim: int, bias: bool):
        super().__init__(dim, eps=1e-5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps)
        return y.type_as(x)


class NoPositions(nn.Module):
    """A no-op in place of the positional encoding that was not chosen."""

    def forward(self, x: torch.Tensor, positions: Any) -> torch.Tensor:
        return x


class LearnedPositions(nn.Embedding):
    """GPT-2's encoding, added to the embeddings (B, T, C). positions: a slice or int64 (B, T)."""

    def forward(self, x: torch.Tensor, positions: Any) -> torch.Tensor:  # type: ignore[override]
        return x + self.weight[positions]


class Rotary(nn.Module):
    """Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864) of queries or
    keys (B, T, H, D).

    Dimension i is paired with i + D/2, as in Llama and GPT-NeoX. Angles are computed in fp32: bf16
    cannot distinguish position 1000 from 1001.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, head_dim: int, block_size: int):
        super().__init__()
        cos, sin = rope.tables(*rope.frequencies(head_dim), block_size)     # (block_size, D/2)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x: torch.Tensor, positions: Any) -> torch.Tensor:
        cos = self.cos[positions].unsqueeze(-2)                             # (T or B, T, 1, D/2)
        sin = self.sin[positions].unsqueeze(-2)
        a, b = x.float().chunk(2, dim=-1)                                   # (B, T, H, D/2) each
        # (B T, H, D/2): with four dimensions, inductor's layout of a single token has strides that
        # attention kernels reject.
        first = (a * cos - b * sin).flatten(0, 1)
        second = (a * sin + b * cos).flatten(0, 1)
        return torch.cat((first, second), dim=-1).view(x.shape).type_as(x)


class Mix(nn.Module):
    """A learned weighted sum of two tensors: w[0] x + w[1] y."""

    def __init__(self, start: tuple[float, float]):
        super().__init__()
        self.start = start
        self.mix = nn.Parameter(torch.empty(2))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        w = self.mix.type_as(x)
        return w[0] * x + w[1] * y


class First(nn.Module):
    """Returns the first of its inputs: for a Mix, AddScaled or TokenShift that was not chosen."""

    def forward(self, x: torch.Tensor, y: Any) -> torch.Tensor:
        return x


class AddScaled(nn.Module):
    """x + w y with a learned number w."""

    def __init__(self, start: float):
        super().__init__()
        self.start = (start,)
        self.mix = nn.Parameter(torch.empty(1))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + self.mix.type_as(x) * y


class Bigrams(nn.Embedding):
    """A vector for each token together with the one before it: (B, T) -> (B, T, C) in the autocast
    dtype. Each block adds it to its input.

    Pairs are hashed to the rows of the table, and may share one (Bojanowski et al. 2017,
    https://arxiv.org/abs/1607.04606, section 3.2). Such tables are from modded-nanogpt. Rows may be
    narrower than C; the other channels get 0.
    """

    PRIME = 2_654_435_761  # near 2^32 / golden ratio (Knuth, TAOCP, section 6.4)

    def __init__(self, config: GPTConfig):
        width = config.bigram_dim or config.n_embd
        super().__init__(config.bigram, width)
        self.missing = config.n_embd - width  # channels

    def forward(self, idx: torch.Tensor,  # type: ignore[override]
                context: AttentionContext | None = None) -> torch.Tensor:
        ids = idx + 1  # 0 is left for the start of a text
        if context is None:
            previous = F.pad(ids, (1, 0))[:, :-1]
        else:
            previous = context.previous(self, ids.unsqueeze(-1)).squeeze(-1)
        y = super().forward((previous * self.PRIME + idx) % self.num_embeddings)
        return F.pad(cast(y), (0, self.missing))


class ValueMix(Mix):
    """Value residual (Zhou et al. 2024, https://arxiv.org/abs/2410.17897): mixes the first layer's
    values into a layer's own."""

    def forward(self, v: torch.Tensor, v_first: torch.Tensor) -> tuple:  # type: ignore[override]
        return super().forward(v, v_first), v_first


class FirstValues(nn.Module):
    """Value residual in the first layer: its values become v_first of the others."""

    def forward(self, v: torch.Tensor, v_first: None) -> tuple[torch.Tensor, torch.Tensor]:
        return v, v


class OwnValues(nn.Module):
    """No value residual. The interface is the same, so that all layers share one compiled block."""

    def forward(self, v: torch.Tensor, v_first: None) -> tuple[torch.Tensor, None]:
        return v, v_first


class TokenShift(nn.Module):
    """x_t + w * x_{t-1} with a learned weight per channel: a causal depthwise convolution over two
    tokens, after Primer (So et al. 2021, https://arxiv.org/abs/2109.08668).

    Keys then contain the previous token, which would otherwise take a layer.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: torch.Tensor, context: AttentionContext | None = None) -> torch.Tensor:
        if context is None:
            previous = F.pad(x, (0, 0, 1, 0))[:, :-1]
        else:
            previous = context.previous(self, x)
        return x + self.weight.type_as(x) * previous


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        head_dim = config.n_embd // config.n_head
        norm = NORMS[config.norm]
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        # query-key norm: Henry et al. 2020, https://arxiv.org/abs/2010.04245
        self.q_norm = norm(head_dim, config.bias) if config.qk_norm else nn.Identity()
        self.k_norm = norm(head_dim, config.bias) if config.qk_norm else nn.Identity()
        rotary = config.pos == "rope"
        self.rotary = Rotary(head_dim, config.block_size) if rotary else NoPositions()
        self.attend: Callable = attention  # or SpanAttention, see GPT.vary_context
        if not config.value_residual:
            self.mix_values: nn.Module = OwnValues()
        elif layer == 0:
            self.mix_values = FirstValues()
        else:
            self.mix_values = ValueMix((0.5, 0.5))

    def forward(self, x: torch.Tensor, v_first: torch.Tensor | None, positions: Any,
                context: AttentionContext | None = None
                ) -> tuple[torch.Tensor, torch.Tensor | None]:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, -1).unbind(2)   # (B, T, H, D) each
        q = self.rotary(self.q_norm(q), positions)
        k = self.rotary(self.k_norm(k), positions)
        v, v_first = self.mix_values(v, v_first)                            # v_first: layer 0's
        attend = self.attend if context is None else partial(context.attend, self)
        y = attend(q, k, v, dropout=self.dropout_p())                       # (B, T, H, D)
        return self.c_proj(y.reshape(B, T, C)), v_first

    def dropout_p(self) -> float:
        """0 in eval mode, where SDPA would apply dropout, too.

        Without dropout `training` is not read, so that training and evaluation share a compiled
        graph.
        """
        if self.dropout == 0.0:
            return 0.0
        return self.dropout if self.training else 0.0


def dropout(p: float) -> nn.Module:
    """Dropout, or a no-op for p = 0, so that training and evaluation share a compiled graph."""
    return nn.Dropout(p) if p else nn.Identity()


class MLP(nn.Module):
    """Two linear layers with `act` in between, and `width` hidden units (default: by class).

    Experts (lib/moe.py) use `act` and `fused` of these classes.
    """

    fused = 1      # matrices in c_fc
    penalty = 0.0  # auxiliary losses, which only a MoE has
    act: Any       # the activation, set by subclasses

    def __init__(self, config: GPTConfig, width: int | None = None):
        super().__init__()
        width = width or self.width(config.n_embd)
        self.c_fc = nn.Linear(config.n_embd, self.fused * width, bias=config.bias)
        self.c_proj = nn.Linear(width, config.n_embd, bias=config.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(self.act(self.c_fc(x)))

    @staticmethod
    def width(n_embd: int) -> int:
        return 4 * n_embd


class GeluMLP(MLP):
    """GPT-2's MLP: GELU in its tanh approximation (Hendrycks & Gimpel 2016,
    https://arxiv.org/abs/1606.08415)."""
    act = staticmethod(partial(F.gelu, approximate="tanh"))


class ReLU2MLP(MLP):
    """Squared ReLU (So et al. 2021, Primer, https://arxiv.org/abs/2109.08668)."""
    act = staticmethod(lambda h: F.relu(h).square())


class SwiGLUMLP(MLP):
    """Shazeer 2020, https://arxiv.org/abs/2002.05202. Gate and value are fused into one matrix.

    It has three matrices instead of two, so 8/3 C hidden units instead of 4C keep the parameter
    count (2048 at C = 768), rounded to a multiple of 16 for the tensor cores.
    """
    fused = 2

    @staticmethod
    def width(n_embd: int) -> int:
        return 16 * max(round(n_embd * 8 / 3 / 16), 1)

    @staticmethod
    def act(h: torch.Tensor) -> torch.Tensor:
        gate, value = h.chunk(2, dim=-1)
        return F.silu(gate) * value


NORMS: dict[str, type[nn.Module]] = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}
MLPS: dict[str, type[MLP]] = {"gelu": GeluMLP, "swiglu": SwiGLUMLP, "relu2": ReLU2MLP}


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        norm = NORMS[config.norm]
        mlp = MLPS[config.mlp]
        self.mix_residual: nn.Module = First()
        if config.residual_scalars:
            self.mix_residual = Mix((1.0, 0.0))
        elif config.bigram:
            self.mix_residual = AddScaled(0.05)
        self.ln_1 = norm(config.n_embd, config.bias)
        self.token_shift = TokenShift(config.n_embd) if config.token_shift else First()
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = norm(config.n_embd, config.bias)
        self.mlp = MoE(config, mlp) if config.n_experts else mlp(config)
        self.drop = dropout(config.dropout)

    def forward(self, x: torch.Tensor, x0: torch.Tensor, v_first: torch.Tensor | None,
                positions: Any, context: AttentionContext | None = None
                ) -> tuple[torch.Tensor, torch.Tensor | None]:
        x = self.mix_residual(x, x0)
        y = self.token_shift(self.ln_1(x), context)
        y, v_first = self.attn(y, v_first, positions, context)
        x = x + self.drop(y)
        x = x + self.drop(self.mlp(self.ln_2(x)))
        return x, v_first


class GPT(nn.Module):
    """A decoder-only transformer, by default GPT-2 (Radford et al. 2019).

    GPTConfig lists the alternatives. Parameter names are Hugging Face's. Post-embedding norm:
    Kumar et al. 2023, https://arxiv.org/abs/2302.01327. autocast_dtype: the --dtype of its forward
    passes (lib/devices.py, `autocast`); weights are fp32.
    """

    autocast_dtype = "auto"

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        norm = NORMS[config.norm]
        learned = config.pos == "learned"
        self.transformer: Any = nn.ModuleDict(dict(
            wte=nn.Embedding(config.padded_vocab_size, config.n_embd),
            wpe=LearnedPositions(config.block_size, config.n_embd) if learned else NoPositions(),
            emb_norm=norm(config.n_embd, config.bias) if config.emb_norm else nn.Identity(),
            drop=dropout(config.dropout),
            h=nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)]),
            ln_f=norm(config.n_embd, config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.transformer.wte.weight  # type: ignore
        if config.bigram:
            self.transformer.bigram = Bigrams(config)
        self.loss = LinearCrossEntropy(config.softcap)
        init_weights(self)

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None,
                packed: Packed | None = None, kv_cache: KVCache | None = None,
                logits_at: Any = ...) -> torch.Tensor:
        """idx: int64 (B, T), T at most block_size. packed: a Packed, if rows contain several texts.
        kv_cache: a KVCache; None: no cache (training, scoring).

        Without targets, returns logits, fp32 (B, T, vocab_size), or only those at `logits_at`,
        (rows, columns) -> (n, vocab_size). The padding of the vocabulary is cut off, so that it is
        never sampled. With targets, int64 (B, T), returns the sum of their cross-entropies in nats,
        a scalar; targets of -1 are ignored.
        """
        context = packed if kv_cache is None else kv_cache  # None: causal over the whole row
        positions = slice(idx.size(1)) if context is None else context.positions
        x, x0 = self.embed(idx, positions, context)                         # (B, T, C) each
        v_first = None
        for block in self.transformer.h:
            x, v_first = block(x, x0, v_first, positions, context)
        x = self.transformer.ln_f(x)
        if targets is None:
            logits = self.lm_head(x[logits_at])[..., :self.config.vocab_size]
            # in fp32, as in the loss: in bf16, large logits would tie
            return soft_cap(logits.float(), self.config.softcap)
        loss = self.loss(x.flatten(0, 1), self.lm_head.weight, targets.flatten())
        # the experts' penalty is 0, but has the gradients of their auxiliary losses
        return loss + sum(block.mlp.penalty for block in self.transformer.h)

    def embed(self, idx: torch.Tensor, positions: Any, context: AttentionContext | None = None
              ) -> tuple[torch.Tensor, torch.Tensor]:
        """idx, int64 (B, T) -> (x, x0), (B, T, C) each, in the autocast dtype.

        x: the input of the first block. x0: what each block mixes into its input: the vectors of
        bigrams, or x without --bigram.
        """
        x = self.transformer.wpe(self.transformer.wte(idx), positions)
        x = self.transformer.drop(cast(self.transformer.emb_norm(x)))
        if self.config.bigram:
            return x, self.transformer.bigram(idx, context)
        return x, x

    def vary_context(self) -> None:
        """Prepare for `set_context`. Call before `compile`."""
        for block in self.transformer.h:
            block.attn.attend = SpanAttention()

    def set_context(self, tokens: int) -> None:
        """In training, let attention see spans of `tokens` tokens. Needs `vary_context`."""
        for block in self.transformer.h:
            block.attn.attend.span = tokens

    def compile(self, **settings: Any) -> None:
        """torch.compile part by part. All blocks have the same structure and share one compiled
        graph, so compile time does not grow with depth."""
        self.embed = torch.compile(self.embed, **settings)  # type: ignore[method-assign]
        for part in (*self.transformer.h, self.transformer.ln_f, self.loss):
            part.compile(**settings)

    def parameter_counts(self) -> dict[str, int]:
        """dict: total, active (per token), embedding (tokens, positions, bigrams and an untied
        head), layer (one block)."""
        counts = {"total": 0, "active": 0, "embedding": 0}
        for name, p in self.named_parameters():
            counts["total"] += p.numel()
            if p.dim() == 3:  # experts; each token uses n_active of them
                counts["active"] += p[0].numel() * self.config.n_active
            else:
                counts["active"] += p.numel()
            if name.split(".")[-2] in ("wte", "wpe", "bigram", "lm_head"):
                counts["embedding"] += p.numel()
        return counts | {"layer": count_parameters(self.transformer.h[0])}

    def flops_per_token(self, context: int | None = None) -> int:
        """Forward and backward matmul FLOPs per token: 6N + 12 n_layer n_embd T (Chowdhery et
        al. 2022, PaLM, appendix B), for a context of T tokens, by default block_size.

        N excludes inactive experts and lookup tables: learned positions, bigrams, and the token
        embedding if the head is untied.
        """
        c = self.config
        n = self.parameter_counts()["active"] - count_parameters(self.transformer.wpe)
        if c.bigram:
            n -= count_parameters(self.transformer.bigram)
        if not c.tie_embeddings:
            n -= count_parameters(self.transformer.wte)
        return 6 * n + 12 * c.n_layer * c.n_embd * (context or c.block_size)

    @classmethod
    def from_pretrained(cls, name: str | Path) -> "GPT":
        """A GPT with the weights of Hugging Face's "gpt2", ..., "gpt2-xl", or of a folder written
        by export_hf.py."""
        return huggingface.read(name, lambda **fields: cls(GPTConfig(**fields)))


def count_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def row_blocks(config: GPTConfig) -> dict[str, int]:
    """{module: number of matrices stacked in its weight}: q, k, v; gate, value."""
    return {"c_attn": 3, "c_fc": MLPS[config.mlp].fused, "c_proj": 1, "router": 1}


INITS: dict[str, Callable] = {  # standard deviation of a matrix, see init_weights
    "gpt2": lambda fan_in, fan_out, squared_gain: 0.02,
    "xavier": lambda fan_in, fan_out, squared_gain: math.sqrt(2 / (fan_in + fan_out)),
    "kaiming": lambda fan_in, fan_out, squared_gain: math.sqrt(squared_gain / fan_in),
    "zero_proj": lambda fan_in, fan_out, squared_gain: math.sqrt(1 / 3 / fan_in),
}


@torch.no_grad()
def init_weights(model: GPT) -> None:
    """Initialize every parameter as config.init says; fails on a parameter it does not know.

    gpt2:      normal, std 0.02 (positions: 0.01, as in OpenAI's code).
    xavier:    normal, std sqrt(2 / (fan_in + fan_out)) (Glorot & Bengio 2010).
    kaiming:   normal, std gain / sqrt(fan_in), gain sqrt(2) into the MLP's non-linearity, else 1
               (He et al. 2015).
    In these three, projections back into the residual stream (c_proj) are scaled by
    1 / sqrt(2 n_layer), since 2 n_layer of them add up (Radford et al. 2019, section 2.3), and
    embeddings and head have std 0.02.
    zero_proj: normal, std 1 / sqrt(3 fan_in); projections and an untied head start at 0, so that
               every block starts as the identity; an untied embedding has std 1.

    A tied embedding followed by a post-embedding norm has std 0.005: the norm undoes its scale, and
    with a larger std the first logits would favor repeating the input token. Norms start at 1,
    biases at 0. fan_in and fan_out are those of a single matrix in a fused weight, or of a single
    expert.
    """
    config = model.config
    zero_proj = config.init == "zero_proj"
    projection_scale = 0.0 if zero_proj else (2 * config.n_layer) ** -0.5
    table_std = 0.02
    if config.tie_embeddings and config.emb_norm:
        table_std = 0.005
    elif zero_proj and not config.tie_embeddings:
        table_std = 1.0
    fused = row_blocks(config)
    for name, p in model.named_parameters():
        *_, module, kind = name.split(".")
        if kind == "bias" or module in ("token_shift", "bigram"):
            p.zero_()
        elif module in ("ln_1", "ln_2", "ln_f", "emb_norm", "q_norm", "k_norm"):
            p.fill_(1.0)
        elif kind == "mix":
            p.copy_(torch.tensor(model.get_submodule(name.rpartition(".")[0]).start))
        elif module == "lm_head" and zero_proj:
            p.zero_()
        elif module in ("wte", "lm_head"):
            p.normal_(std=table_std)
        elif module == "wpe":
            p.normal_(std=0.01)
        elif module in fused:
            fan_out = p.size(-2) / fused[module]
            fan_in = p.size(-1)
            squared_gain = 2 if module == "c_fc" else 1
            std = INITS[config.init](fan_in, fan_out, squared_gain)
            p.normal_(std=std * projection_scale if module == "c_proj" else std)
        else:
            raise ValueError(f"init_weights does not know the parameter {name}")


# --------------------------------------------------------------------------------------------------
# Optimizer set-up and schedule. No other code depends on an optimizer's state.

EMB_NORM_LR = 5  # times --max_lr, for normalized embeddings: at --max_lr they learn too slowly


def make_optimizer(model: GPT, cfg: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of --optimizer, with every parameter in exactly one group.

    A group keeps its peak rate as initial_lr, which the schedule multiplies, and the number of
    matrices in its fused weights as `splits`.
    """
    outside = {"wte": "embedding", "wpe": "embedding", "bigram": "bigram", "lm_head": "head"}
    fused = row_blocks(model.config)
    members: dict[tuple[str, int], list] = {}
    for name, p in model.named_parameters():
        module = name.split(".")[-2]
        kind = outside.get(module, "matrix")
        splits = fused.get(module, 1)
        if p.dim() == 1:
            kind = "vector"
        if kind != "matrix":
            splits = 1
        members.setdefault((kind, splits), []).append(p)

    rates = {"embedding": cfg.embedding_lr, "head": cfg.head_lr, "vector": cfg.vector_lr}
    if model.config.emb_norm and not cfg.embedding_lr:
        rates["embedding"] = cfg.max_lr * EMB_NORM_LR
    rates["bigram"] = cfg.bigram_lr or rates["embedding"]
    groups: list[dict] = []
    for (kind, splits), params in members.items():
        rate = rates.get(kind) or cfg.max_lr
        groups.append(dict(params=params, kind=kind, splits=splits, lr=rate))
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(map(id, model.parameters())), "not each parameter once"

    optimizer = OPTIMIZERS[cfg.optimizer](groups, cfg)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def adamw(groups: list[dict], cfg: TrainConfig) -> torch.optim.Optimizer:
    """Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101, with GPT-3's betas (Brown et al.
    2020, appendix B). Weight decay on matrices and embeddings, not on vectors."""
    decayed = []
    for group in groups:
        weight_decay = 0.0 if group["kind"] == "vector" else cfg.weight_decay
        decayed.append(group | dict(kind="adamw", weight_decay=weight_decay))
    fused = groups[0]["params"][0].is_cuda
    return AdamW(decayed, betas=(0.9, 0.95), eps=1e-8, fused=fused)


def muon(groups: list[dict], cfg: TrainConfig) -> torch.optim.Optimizer:
    """Muon with weight decay for the matrices in blocks; AdamW with modded-nanogpt's betas and no
    weight decay for all other parameters."""
    of_matrices = dict(kind="muon", momentum=cfg.momentum, weight_decay=cfg.weight_decay)
    of_others = dict(kind="adamw", betas=(0.8, 0.95), eps=1e-10)
    matrices = [group | of_matrices for group in groups if group["kind"] == "matrix"]
    others = [group | of_others for group in groups if group["kind"] != "matrix"]
    return Muon(matrices + others)


OPTIMIZERS: dict[str, Callable] = {"adamw": adamw, "muon": muon}


def state_like(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Tensors with the shapes of the optimizer's future state: AdamW's two moments, Muon's
    momentum."""
    copies = {"adamw": 2, "muon": 1}
    like = []
    for group in optimizer.param_groups:
        like += group["params"] * copies[group["kind"]]
    return like


# The share is build-nanogpt's; the minimum is 2 / (1 - beta2) for AdamW (Ma & Yarats 2021,
# https://arxiv.org/abs/1910.04209)
WARMUP_SHARE = 0.0375  # of all steps
WARMUP_LEAST = 40      # steps


def lr_multiplier(step: int, cfg: TrainConfig, steps: int) -> float:
    """Factor from 0 to 1 for the learning rates of update `step`, 0 <= step < steps."""
    # 1) linear warm-up, from above zero in the first step
    warmup = warmup_length(cfg, steps)
    if step < warmup:
        return (step + 1) / warmup
    # 2) decay from the peak to min_lr_frac times the peak
    left = SCHEDULES[cfg.schedule](step, warmup, steps, cfg.cooldown)
    return cfg.min_lr_frac + left * (1 - cfg.min_lr_frac)


def warmup_length(cfg: TrainConfig, steps: int) -> int:
    """Steps of warm-up in a run of `steps`."""
    if cfg.warmup_steps is not None:
        return min(cfg.warmup_steps, steps - 1)
    least = min(WARMUP_LEAST, steps // 4)
    if steps >= UNMEASURED:  # --minutes: no length yet, or one that no run reaches
        return least
    return max(least, round(WARMUP_SHARE * steps))


def decay_progress(step: int, start: int, steps: int) -> float:
    """Progress from 0 to 1 of the decay from step `start` to the end of the run."""
    progress = (step - start) / max(steps - start, 1)
    return min(max(progress, 0.0), 1.0)


def linear(step: int, start: int, steps: int, cooldown: float) -> float:
    return 1 - decay_progress(step, start, steps)


def cosine(step: int, start: int, steps: int, cooldown: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * decay_progress(step, start, steps)))


def wsd(step: int, start: int, steps: int, cooldown: float) -> float:
    """Warm-up, stable, decay: linear decay in the last share `cooldown` of all steps (Hägele et
    al. 2024, https://arxiv.org/abs/2405.18392)."""
    start = max(start, round(steps * (1 - cooldown)))
    return linear(step, start, steps, cooldown)


# (step, first step of the decay, steps of the run, --cooldown) -> fraction of the peak, 1 to 0
SCHEDULES: dict[str, Callable] = {"cosine": cosine, "wsd": wsd, "linear": linear}


def rate_rise(cfg: TrainConfig, steps: int, state: dict) -> str | None:
    """A line of text if extending a run to `steps` makes its learning rate rise again, else None.
    state: the checkpoint."""
    before = state["max_steps"]
    if cfg.minutes or steps <= before:
        return None
    names = ("schedule", "cooldown", "warmup_steps", "min_lr_frac", "max_lr")
    shape = {name: state["train_config"].get(name, getattr(cfg, name)) for name in names}
    old_cfg = replace(cfg, **shape)
    step = state["step"]
    was = old_cfg.max_lr * lr_multiplier(step, old_cfg, before)
    now = cfg.max_lr * lr_multiplier(step, cfg, steps)
    if now <= 1.01 * was:
        return None
    return (f"rate    rises again, from {was:.2e} to {now:.2e}: the {cfg.schedule} schedule now "
            f"ends at step {steps:,}, not {before:,}; lower --max_lr to avoid this")


def gradient_groups(model: GPT) -> dict[str, list]:
    """{part (embedding, block_00, ..., rest): its parameters}, for gradient norms in TensorBoard. A
    tied head is in embedding."""
    parts: dict[str, list] = {}
    for name, p in model.named_parameters():
        path = name.split(".")  # transformer.h.0.ln_1.weight, transformer.wte.weight, ...
        part = "rest"
        if path[1] == "h":
            part = f"block_{int(path[2]):02d}"
        elif path[1] in ("wte", "wpe", "bigram"):
            part = "embedding"
        parts.setdefault(part, []).append(p)
    return parts


# --------------------------------------------------------------------------------------------------
# Data: the global token stream


class ShardLoader(Stream):
    """An endless stream of tokens. It depends only on (files, seed), so it is the same on every
    process.

    Every epoch passes over all shards. With a seed, (seed, epoch) determines the order of the
    shards and of the documents in each; with None everything stays in order. No token is dropped at
    the end of a shard. The position is three integers: epoch, shard (index in the epoch's order)
    and offset (tokens into the permuted shard). Background threads read and permute the next shard,
    and prepare the next batch.
    """

    names = "epoch", "shard", "offset"

    def __init__(self, files: list[Path], tokenizer: Tokenizer, seed: int | None,
                 transform: Callable = unchanged, growing: GrowingShards | None = None):
        """transform: callable run in the prefetch thread, int64 tokens (n + 1,) -> what `next`
        returns. growing: with --follow, the folder that adds to `files`; shards then stay in order
        in the first epoch."""
        self.files = files
        self.tokenizer = tokenizer
        self.seed = seed
        self.transform = transform
        self.growing = growing
        self.loaded: dict = {}  # (epoch, shard) -> future of its tokens
        self.reader = ThreadPoolExecutor(max_workers=1)
        super().__init__(0, 0, 0)

    def read_batch(self, n: int, epoch: int, shard: int, offset: int) -> tuple:
        """-> (n + 1 tokens from a position on, int64, transformed; the position n tokens later:
        epoch, shard, offset)."""
        pieces = []
        missing = n + 1
        while missing:
            piece = self._tokens(epoch, shard)[offset:offset + missing]
            pieces.append(piece)
            missing -= len(piece)
            offset += len(piece)
            if missing:
                epoch, shard = self._after(epoch, shard)
                offset = 0
        following = self._after(epoch, shard)
        if self.growing is None or self.growing.has(*following):
            self._read_ahead(*following)
        tokens = np.concatenate(pieces).astype(np.int64)
        return self.transform(tokens), epoch, shard, offset - 1  # the last target is read again

    def progress(self) -> dict[str, float]:
        return {"data/epoch": self.position[0]}

    def where(self, state: dict[str, Any]) -> str:
        file = self.files[self._index(state["epoch"], state["shard"])].name
        permuted = "" if self.seed is None else ", permuted"
        return f"epoch {state['epoch']}, from token {state['offset']:,} of {file}{permuted}"

    def _after(self, epoch, shard):
        if shard + 1 < len(self.files):
            return epoch, shard + 1
        return epoch + 1, 0

    def _tokens(self, epoch, shard):
        """The tokens of a shard. Frees earlier shards."""
        self._read_ahead(epoch, shard)
        self.loaded = {key: future for key, future in self.loaded.items() if key >= (epoch, shard)}
        return self.loaded[epoch, shard].result()

    def _read_ahead(self, epoch, shard):
        if (epoch, shard) not in self.loaded:
            self.loaded[epoch, shard] = self.reader.submit(self._read, epoch, shard)

    def _index(self, epoch, shard):
        """The index of the file that is number `shard` of an epoch."""
        if self.seed is None or (self.growing and epoch == 0):
            return shard
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.files))
        return int(order[shard])

    def _read(self, epoch, shard):
        index = self._index(epoch, shard)
        tokens = read_shard(self.files[index])
        check_ids(tokens, self.tokenizer.vocab_size, self.files[index])
        if self.seed is None:
            return tokens
        tokens = np.asarray(tokens)  # the same memory; slices of a memmap are slow to make
        starts = np.flatnonzero(tokens == self.tokenizer.eot)
        if len(starts) == 0 or starts[0] != 0:
            starts = np.concatenate(([0], starts))  # a shard may begin in the middle of a document
        ends = np.append(starts[1:], len(tokens))
        documents = np.random.default_rng((self.seed, epoch, index)).permutation(len(starts))
        return np.concatenate([tokens[starts[d]:ends[d]] for d in documents])


def token_stream(corpus: Corpus, tokenizer: Tokenizer, seed: int | None, block_size: int,
                 transform: Callable = unchanged) -> Stream:
    """The training tokens of a Corpus: a ShardLoader, or a Mixture of several folders.
    seed None: no shuffling."""
    if not corpus.is_mixed:
        files = corpus.sources[0].shards.train
        return ShardLoader(files, tokenizer, seed, transform, corpus.growing)
    loaders = [ShardLoader(source.shards.train, tokenizer, seed) for source in corpus.sources]
    return Mixture(corpus, loaders, block_size, transform)


# --------------------------------------------------------------------------------------------------
# Evaluation. Every process takes part in every forward pass.


class Evaluation(NamedTuple):
    """An evaluation during training.

    run: (model, micro_batch, stopped) -> {tag: number or texts}, called on every process.
    micro_batch: sequences per forward pass in training. stopped: callable that returns whether to
    stop early; every process must call it equally often. compiled: batches have the shape of
    training batches, so the compiled model is used; other evaluations run uncompiled.
    """
    name: str
    every: int  # steps, 0: never
    run: Callable
    at_start: bool = True
    compiled: bool = False

    def mode(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.compiled else compiler.off()

    def is_due(self, step: int, last: bool) -> bool:
        if not self.every or (step == 0 and not self.at_start):
            return False
        return last or step % self.every == 0


def mean_loss(model: nn.Module, rows: Any, micro_batch: int, processes: Processes,
              stopped: Callable[[], bool] = lambda: False) -> float:
    """Mean loss in nats per target over all validation rows, computed by all processes.

    rows: (x, y), or (x, y, documents) if they are packed. stopped: called equally often on every
    process; once it returns true, the result is nan. Sums are gathered, not means, so the result
    does not depend on the number of processes or the micro-batch. Every process runs equally many
    forward passes of one shape, (micro_batch, T), padded with rows without targets. Gradients stay
    enabled, since a compiled forward pass would be recompiled without them; in eval mode the loss
    computes none.
    """
    nats = [torch.zeros((), device=processes.device)]
    mine = [part[processes.rank::processes.world_size] for part in rows]
    passes = range(0, -(-len(rows[0]) // processes.world_size), micro_batch)
    for i in progress(passes, "validation", processes):
        idx, targets, *documents = (part[i:i + micro_batch] for part in mine)
        idx = pad_rows(idx, micro_batch, 0, processes.device)
        targets = pad_rows(targets, micro_batch, -1, processes.device)
        packing = [Packed(pad_rows(part, micro_batch, 0, processes.device)) for part in documents]
        with autocast(model):
            nats.append(model(idx, targets, *packing).detach())
        if stopped():
            return math.nan
    total = torch.stack(nats).cpu().double().sum().item()
    count: float = int((mine[1] >= 0).sum())
    total, count = processes.sum([total, count])
    return total / count


def pad_rows(rows: np.ndarray, n: int, fill: int, device: torch.device) -> torch.Tensor:
    """int64 (at most n, T) -> a tensor (n, T) on `device`; missing rows are filled with `fill`."""
    missing = n - len(rows)
    return to_device(np.pad(rows, ((0, missing), (0, 0)), constant_values=fill), device)


def validation(cfg: TrainConfig, plan: RunPlan, corpus: Corpus, tokenizer: Tokenizer,
               processes: Processes, tag: str = "Loss/val") -> Callable:
    """The `run` of an Evaluation: the loss on the val splits of a Corpus, weighted as training data
    is once a curriculum has ended."""
    rows = [read_validation(source.shards, cfg.val_tokens, plan.block_size, tokenizer)
            for source in corpus.sources]
    bytes_per_token = None  # unless the ids are text
    if tokenizer.is_text:
        sizes = tokenizer.token_bytes()
        bytes_per_token = corpus.weights @ [sizes[y].sum() / y.size for _, y in rows]

    def run(model, micro_batch, stopped):
        losses = [mean_loss(model, part, micro_batch, processes, stopped) for part in rows]
        loss = float(corpus.weights @ losses)
        results = {tag: loss}
        if bytes_per_token:
            results[f"{tag}_bpb"] = loss / math.log(2) / bytes_per_token
        return results | corpus.tags(tag, losses)

    return run


# --------------------------------------------------------------------------------------------------
# The training loop


def train(cfg: TrainConfig, plan: RunPlan, model: GPT, optimizer: torch.optim.Optimizer,
          stream: StreamLike, evaluations: list, run: Any, processes: Processes,
          position: Position) -> None:
    """Train `model` from `position` to the last step.

    stream: `next(tokens)` returns this process's micro-batches, equally many on every process:
    (idx, targets), int64 (B, T) each, and a Packed if rows contain several texts. Targets of -1 are
    ignored. run: the RunFolder; a null object except on rank 0.

    Ends after the last step, or after the step during which a stop signal arrives; either way it
    saves a checkpoint. Raises BadInput after cfg.max_skipped consecutive non-finite steps, and,
    also after saving, if the stream's data will not arrive.
    """
    device = processes.device
    ddp = parallel(model, processes)
    parameters = list(model.parameters())
    parts = gradient_groups(model)
    peak = peak_flops(device, cfg.dtype)
    precision = Precision(model, position.loss_scale)
    # Muon computes most of its update before the sync; AdamW has nothing to prepare
    prepare_update = getattr(optimizer, "prepare", lambda: None)

    step = position.step
    first = position.step
    skipped = position.skipped
    consecutive_skips = position.consecutive_skips
    timer = StepTimer(cfg, plan.steps, position.timed)
    seconds = 0.0  # of the previous step
    save_due = False
    last = False

    def say(line):
        run.say(f"step {step} | {line}")

    def counts():
        """Entries of a checkpoint that each step changes, besides tensors."""
        return {"step": step, "skipped": skipped, "loader": stream.state_dict(),
                **precision.state_dict()}

    def snapshot(**changes):
        return {**counts(), "consecutive_skips": consecutive_skips, "finished": False,
                "max_steps": timer.steps, "timed": timer.timed,
                **state_of(model, optimizer, processes), **changes}

    def stopped():
        """Whether to stop waiting for data. A checkpoint may be written meanwhile."""
        run.poll()
        return stop.agree()

    def evaluate():
        """Run the evaluations that are due, until a stop is requested."""
        for evaluation in evaluations:
            if not evaluation.is_due(step, last):
                continue
            if stop.agree():
                return
            try:
                results = measure(evaluation, model, plan.micro_batch, stop, monitor)
            except NonFinite as error:  # the next steps will be skipped, and may end the run
                say(f"{evaluation.name} | {error}")
                continue
            if stop.agree():
                return
            run.log_evaluation(step, results)
            if cfg.keep_best and "Loss/val" in results and step and not consecutive_skips:
                save_if_best(results["Loss/val"])

    def save_if_best(loss):
        is_best = bool(run.is_best(loss, step))  # only rank 0 knows the checkpoints
        is_best = processes.sum([is_best])[0]
        if is_best and not last:
            run.save(snapshot())

    def give_up():
        """End a run of non-finite steps; its newest checkpoint is from before them."""
        kept = run.give_up(snapshot(**last_good, consecutive_skips=0))
        processes.barrier()
        raise BadInput(f"the last {consecutive_skips} steps were non-finite; {kept} is from "
                       f"before: lower --max_lr or lengthen --warmup_steps{precision.remedy}, "
                       "and --resume it")

    last_good = counts()  # before the latest non-finite steps
    find_spike = SpikeDetector(cfg.spike)
    monitor = RecompileMonitor(say)
    balance = LoadBalancer(model, processes, say)
    stream.prefetch(batch_size(step, cfg))
    with StopSignals(run.say, processes, run.limit_is_reached) as stop:
        while True:
            last = step >= timer.steps  # greater if resumed with a shorter length

            # ---- save in the background, but not after a skipped step: weights may be bad already
            if cfg.save_every and step > first and step % cfg.save_every == 0:
                save_due = True
            if save_due and not last and not consecutive_skips:
                run.save(snapshot())
                save_due = False

            # ---- evaluate
            evaluate()
            run.poll()
            data_error = None
            if not last:  # with --follow, the shard of the next batch may not have arrived
                data_error = stream.wait(batch_size(step, cfg), stopped, say)
            if last or stop.agreed or data_error:
                break

            # ---- batch
            started = time.perf_counter()
            read_from = stream.state_dict()
            if not consecutive_skips:
                last_good = counts()
            tokens = batch_size(step, cfg)
            batch = stream.next(tokens)
            waited = time.perf_counter() - started

            # ---- forward and backward
            span = context_length(step, timer.steps, cfg, plan.block_size)
            if cfg.context_warmup:
                model.set_context(span)
            seed_dropout(cfg.seed, step, processes.rank)
            n_targets: Any = sum((targets >= 0).sum() for _, targets, *_ in batch)
            processes.all_reduce(n_targets)
            balance.weigh(n_targets / tokens)
            with monitor("training"):
                loss_sum = accumulate(ddp, batch, n_targets, processes, precision)
            precision.unscale(parameters)

            # ---- agree: loss, stop and save requests in one all-reduce
            requests = [stop.requested, bool(run.save_is_due(cfg.save_minutes)),
                        seconds / processes.world_size]
            shared = torch.stack([loss_sum, *(torch.full_like(loss_sum, x) for x in requests)])
            processes.all_reduce(shared)
            norms: Any = gradient_norms(parts.values())
            total_norm = norms.norm()
            numbers = to_host(torch.cat((shared, total_norm[None], norms)))
            if cfg.grad_clip:
                torch.nn.utils.clip_grads_with_norm_(parameters, cfg.grad_clip, total_norm)
            prepare_update()

            # ---- wait for these numbers, the only device sync; the GPU meanwhile prepares the step
            loss, stop_requests, save_requests, mean_seconds, norm, *norms = numbers()
            stop.agree(stop_requests)
            save_due = save_due or save_requests > 0
            if step > first + 1:  # the first step also loads kernels, so it is not timed
                timer.update(step, mean_seconds)
                run.set_length(timer.steps, timer.is_fixed)

            # ---- update, unless non-finite; every process decides alike
            run.wait_copied()  # the weights may still be being copied to a checkpoint
            multiplier = lr_multiplier(step, cfg, timer.steps)
            finite = math.isfinite(loss) and math.isfinite(norm)
            routing = balance(finite)  # expert load
            if finite:
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * multiplier
                optimizer.step()
                precision.grow()
                consecutive_skips = 0
            elif precision.overflowed(loss):
                say(f"skipped because fp16 overflowed: the scale of the loss is now "
                    f"{precision.scale:g}")
            else:
                skipped += 1
                consecutive_skips += 1
                say(f"skipped because non-finite: loss {loss}, gradient norm {norm}; its batch: "
                    f"{stream.where(read_from)}")
            optimizer.zero_grad(set_to_none=True)

            # ---- log
            seconds = time.perf_counter() - started
            tok_per_sec = tokens / seconds
            flops = model.flops_per_token(span) / processes.world_size
            scalars = {
                "Loss/train": loss,
                "optim/lr": cfg.max_lr * multiplier,
                "optim/grad_norm": norm,
                "optim/skipped_steps": skipped,
                "perf/tok_per_sec": tok_per_sec,
                "perf/step_ms": seconds * 1e3,
                "perf/data_ms": waited * 1e3,
                "perf/recompilations": monitor.count,
                "perf/mfu": flops * tok_per_sec / peak if peak else None,
                "perf/memory_gb": peak_memory_gb(device),
            }
            for part, value in zip(parts, norms, strict=True):
                scalars[f"weights/grad_norm_{part}"] = value
            scalars |= stream.progress() | routing | precision.scalars()
            run.log_step(step, scalars, seconds)
            spike = find_spike(loss)
            if spike:
                say(f"{spike}; its batch: {stream.where(read_from)}")

            step += 1
            if consecutive_skips >= min(cfg.max_skipped, timer.steps - first):
                give_up()
        stop.heard()
        finished = last and not stop.agreed
        run.save(snapshot(finished=finished), wait=True)
        processes.barrier()
        run.conclude(step, finished=finished)
        if data_error:
            raise data_error


def measure(evaluation: Evaluation, model: GPT, micro_batch: int, stop: StopSignals,
            monitor: RecompileMonitor) -> dict:
    """The results of an Evaluation, meaningless once a stop is requested. Raises NonFinite."""
    model.eval()
    try:
        with monitor(evaluation.name), evaluation.mode():
            return evaluation.run(model, micro_batch, stop.agree)
    finally:
        model.train()


def seed_dropout(seed: int, step: int, rank: int) -> None:
    """Seed dropout by (seed, step, rank), so that checkpoints need no random state."""
    state = np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]))


def accumulate(ddp: nn.Module, batch: list, n_targets: torch.Tensor, processes: Processes,
               precision: Precision) -> torch.Tensor:
    """Forward and backward over the micro-batches of a step -> this process's share of the loss:
    the sum over its targets, divided by the number of targets on all processes.

    Gradients are multiplied by the scale of `precision`.
    """
    factor = processes.world_size * precision.scale  # DDP takes the mean over processes
    loss_sum = torch.zeros((), device=processes.device)
    for i, (idx, targets, *packing) in enumerate(batch):
        with gradient_sync(ddp, last=i == len(batch) - 1):
            with precision.autocast():
                loss = ddp(idx, targets, *packing) / n_targets
            (loss * factor).backward()
        loss_sum += loss.detach()
    return loss_sum


# --------------------------------------------------------------------------------------------------
# The command


def load_checkpoint(name: str, device: str | torch.device = "cpu",
                    dtype: str = "auto") -> tuple[GPT, Tokenizer, dict]:
    """Load a model -> (GPT in eval mode on `device`, its Tokenizer, its checkpoint).

    name: a run folder, a ckpt_<step>.pt or weights_<step>.pt, a folder written by export_hf.py, or
    "gpt2" to "gpt2-xl", see lib/checkpoint.py's `pick`. For the last two, the checkpoint is a dict
    of model_config, tokenizer and, if the model can chat, chat_template. dtype: a choice of
    --dtype. Raises BadInput if the model does not exist.
    """
    name = checkpoint.pick(name)
    if checkpoint.is_hugging_face(name):
        model = GPT.from_pretrained(name)
        tokenizer, template = huggingface.read_tokenizer(name)
        state = {"model_config": asdict(model.config), "tokenizer": tokenizer.spec}
        if template:
            state["chat_template"] = template
    else:
        state = checkpoint.read(name)
        with checkpoint.ours(name):
            config = GPTConfig(**state["model_config"])
            check_model(config)
            # compare shapes before allocating memory
            on_meta(config).load_state_dict(state["model"], assign=True)
            model = GPT(config)
            model.load_state_dict(state["model"])
            tokenizer = load_tokenizer(state["tokenizer"])
    ids = model.config.vocab_size
    if tokenizer.vocab_size > ids:
        raise BadInput(f"{name}: its tokenizer has {tokenizer.vocab_size} ids, its model {ids}: "
                       "name another")
    model.autocast_dtype = dtype
    return model.to(device).eval(), tokenizer, state


def settings(argv: list[str]) -> Settings:
    """Parse the command line into Settings. Later sources win: defaults, preset, --config, the
    default rates of --optimizer if the preset has another, the checkpoint of --resume or
    --init_from, --size or --depth, flags. --depth leaves only its shape in the settings.

    If --preset differs from the checkpoint's, all its settings count as flags. A flag that sets the
    length of the run replaces any other length.
    """
    flags = read_flags((TrainConfig, GPTConfig), argv, __doc__, PRESETS)
    preset = PRESETS[flags.get("preset", TrainConfig.preset)]
    auto = take_auto(flags)
    flags = named_shape(flags) | flags
    explicit = set(flags)
    repeated = repeat.read_settings(flags, TrainConfig, GPTConfig)
    base = preset | repeated
    cfg = resolve(TrainConfig(), base, other_rates(base, flags), flags)
    model_cfg = resolve(GPTConfig(), base, flags)

    resume, folder = find_resume(cfg, explicit)
    cfg = resolve(cfg, folder)
    start = None
    if resume:
        cfg, model_cfg = adopt(resume, cfg, model_cfg, explicit)
    elif cfg.init_from:
        given = explicit
        if "init_from" not in explicit:  # but in --config, whose settings count as flags, too
            given = explicit | repeated.keys()
        cfg, model_cfg, start = begin_with(cfg, model_cfg, given)
    cfg = resolve(cfg, only_length(explicit), {"depth": None})
    if "depth" in explicit:
        cfg = replace(cfg, size=None)  # --config may have set it
    return Settings(cfg, model_cfg, explicit, resume, start, auto)


def take_auto(flags: dict) -> dict[str, Any]:
    """Remove --size auto and --dollars from `flags` -> {name: value}, for `sized`. Later code only
    sees a shape and a length. Raises BadInput for flags that exclude them."""
    auto = {}
    if flags.get("size") == sizing.AUTO:
        auto["size"] = flags.pop("size")
        for name in ("depth", "n_layer", "n_embd", "n_head", "init_from"):
            if name in flags:
                raise BadInput(f"--size auto chooses the shape: leave --{name} out")
    if "dollars" in flags:
        auto["dollars"] = flags.pop("dollars")
        for name in LENGTHS:
            if name in flags:
                raise BadInput(f"--dollars and --{name} each set the length: give one of them")
    resolve(TrainConfig(), auto)  # checks the bounds
    return auto


def named_shape(flags: dict) -> dict[str, int]:
    """The shape that --size or --depth stands for; {} without them."""
    if "size" in flags and "depth" in flags:
        raise BadInput("--size and --depth each set the shape: give one of them")
    if "size" in flags:
        return SIZES[flags["size"]]
    if "depth" in flags:
        return shape_of(flags["depth"])
    return {}


def other_rates(base: dict, flags: dict) -> dict:
    """The learning rates of --optimizer if it is not that of `base`, whose rates would not fit.
    base: the settings of --preset or --config."""
    usual = base.get("optimizer", TrainConfig.optimizer)
    optimizer = flags.get("optimizer", usual)
    return RATES.get(optimizer, {}) if optimizer != usual else {}


def adopt(resume: Resume, cfg: Any, model_cfg: GPTConfig,
          explicit: set[str]) -> tuple[Any, GPTConfig]:
    """-> (cfg, model_cfg) with the settings of a Resume, except explicit ones. Raises BadInput if
    these do not fit its weights."""
    with checkpoint.ours(resume.path):
        before = resume.state["train_config"]
        if "preset" in explicit and cfg.preset != before["preset"]:
            explicit = explicit.union(*PRESETS.values())  # all that the new preset sets
        cfg, model_cfg = resume.adopt(cfg, model_cfg, explicit)
        check_model(model_cfg)
        # compare shapes before allocating memory
        on_meta(model_cfg).load_state_dict(resume.state["model"], assign=True)
    return cfg, model_cfg


def begin_with(cfg: TrainConfig, model_cfg: GPTConfig,
               explicit: set[str]) -> tuple[TrainConfig, GPTConfig, list]:
    """--init_from -> (cfg with the resolved path, model_cfg with the settings of the weights except
    explicit ones that do not affect them, [(a GPT, its Tokenizer)]).

    The caller pops the model from the list to free memory. Raises BadInput for explicit settings
    that do not fit, and if the model does not exist or its weights are not finite.
    """
    path = checkpoint.pick(str(cfg.init_from))
    model, tokenizer, _ = load_checkpoint(path)
    checkpoint.check_finite(model.state_dict(), path)
    before = asdict(model.config) | {"vocab_multiple": model_cfg.vocab_multiple}
    free = may_change(before, model_cfg.block_size) - {"init"}
    model_cfg, _, misfits = merge(model_cfg, before, explicit, free)
    if misfits:
        raise BadInput(f"--init_from {path} does not fit these flags: {', '.join(misfits)}; "
                       "leave them out")
    if model_cfg.pos == "learned":
        positions = model.transformer.wpe.weight[:model_cfg.block_size]
        model.transformer.wpe.weight = nn.Parameter(positions.detach().clone())
    return replace(cfg, init_from=path), model_cfg, [(model, tokenizer)]


def flag_warnings(cfg: TrainConfig, model_cfg: GPTConfig, explicit: set[str]) -> list[str]:
    """Warnings about flags without effect, and about a learning rate that is unusual for the
    optimizer."""
    idle = {
        "momentum": (cfg.optimizer != "muon", "--optimizer muon"),
        "cooldown": (cfg.schedule != "wsd", "--schedule wsd"),
        "head_lr": (model_cfg.tie_embeddings, "--no-tie_embeddings"),
        "bigram_dim": (not model_cfg.bigram, "--bigram"),
        "bigram_lr": (not model_cfg.bigram, "--bigram"),
    }
    lines = [f"warning: --{name} has no effect without {needed}"
             for name, (is_idle, needed) in idle.items() if is_idle and name in explicit]
    usual = RATES.get(cfg.optimizer, {}).get("max_lr", cfg.max_lr)
    if "max_lr" in explicit and not usual / FAR_OFF <= cfg.max_lr <= usual * FAR_OFF:
        lines.append(
            f"warning: --max_lr {cfg.max_lr:g} is {cfg.max_lr / usual:.2g} times the usual rate of "
            f"--optimizer {cfg.optimizer}, {usual:g}: leave it out, or check that the loss falls")
    return lines


def check_model(c: GPTConfig) -> None:
    """Raises BadInput if a setting of the model is out of bounds, or settings contradict."""
    check(c)
    if c.n_embd % c.n_head:
        raise BadInput(f"--n_embd {c.n_embd} must be a multiple of --n_head {c.n_head}")
    if c.bigram and c.residual_scalars:
        raise BadInput("--bigram and --residual_scalars both add to each block's input: give "
                       "--no-residual_scalars or --bigram 0")
    if c.bigram and c.bigram_dim > c.n_embd:
        raise BadInput(f"--bigram_dim {c.bigram_dim} is more than --n_embd {c.n_embd}")
    if c.pos == "rope" and c.n_embd // c.n_head % 2:
        raise BadInput(f"--pos rope needs an even head size, not {c.n_embd // c.n_head}")
    check_experts(c, MLPS[c.mlp].width(c.n_embd))


def on_meta(model_cfg: GPTConfig) -> GPT:
    """A GPT on the meta device: its weights have shapes, but no memory."""
    with torch.device("meta"):
        return GPT(model_cfg)


def build_model(model_cfg: GPTConfig, cfg: TrainConfig, processes: Processes) -> GPT:
    """A GPT on the process's device, initialized from cfg.seed and prepared for --parallel. Raises
    BadInput if there is not enough memory to train it."""
    like = on_meta(model_cfg)
    weights = list(like.parameters())
    gradients = weights
    device = processes.device
    state = state_like(make_optimizer(like, cfg))
    check_memory([*weights, *gradients, *state], device, n_shards(cfg, processes))
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(cfg.seed)
    try:
        with device:
            model = GPT(model_cfg)
    except (RuntimeError, MemoryError) as error:
        raise RankError(f"no memory for the model ({str(error).splitlines()[0]}): "
                        "lower --n_embd, --n_layer") from error
    model.autocast_dtype = cfg.dtype
    if cfg.context_warmup:
        model.vary_context()
    prepare(model, cfg, processes)
    return model


@torch.no_grad()
def fit_vocabulary(model: GPT, vocab_size: int) -> None:
    """Resize the embedding and the head of a GPT to `vocab_size` ids, padded as in GPTConfig.

    Models from Hugging Face have no padding. New rows start as the mean of the other rows: their
    logits are then the mean of the other logits, so that each gets at most 1 / vocab_size of the
    probability (by Jensen's inequality).
    """
    c = replace(model.config, vocab_size=vocab_size, vocab_multiple=GPTConfig.vocab_multiple)
    model.config = c
    for module in (model.transformer.wte, model.lm_head):
        rows = module.weight[:c.padded_vocab_size]
        missing = c.padded_vocab_size - len(rows)
        mean = rows[:vocab_size].mean(dim=0).expand(missing, -1)
        module.weight = nn.Parameter(torch.cat([rows, mean]))
    if c.tie_embeddings:
        model.lm_head.weight = model.transformer.wte.weight


class Pretraining:
    """The task that `launch` trains: its data, initial weights and evaluations. posttrain.py has
    another.

    corpus: a CorpusLike. weights: [the initial state dict], or (). extra: more entries for
    checkpoints.
    """

    weights: list | tuple = ()
    extra: dict = {}

    def __init__(self, cfg: Any, explicit: set[str], start: list | None = None):
        """start: from `begin_with`, or None. Raises BadInput for data of another tokenizer."""
        self.corpus: Any = Corpus(cfg)
        self.explicit = explicit
        if start:
            model, tokenizer = start.pop()  # drops the last other reference
            self.corpus.check_tokenizer(tokenizer)
            fit_vocabulary(model, tokenizer.vocab_size)
            self.weights = [model.state_dict()]

    def vocabulary(self, model_cfg: GPTConfig) -> tuple[Tokenizer, GPTConfig]:
        """-> (the data's Tokenizer, model_cfg with its vocabulary)."""
        tokenizer = load_tokenizer(self.corpus.tokenizer)
        self.corpus.check_shards(tokenizer)
        return tokenizer, replace(model_cfg, vocab_size=tokenizer.vocab_size)

    def evaluations(self, cfg: Any, plan: RunPlan, tokenizer: Tokenizer,
                    processes: Processes) -> list:
        """-> list of Evaluation. Raises BadInput if something they need is missing."""
        at_start = self.has_learned  # evaluating random weights would waste seconds to minutes
        own_loss = self.validation(cfg, plan, tokenizer, processes)
        asked = bool(self.explicit & {"hellaswag_every", "hellaswag_file"})
        questions: Any = hellaswag.tracked(cfg, tokenizer, processes, required=asked)
        tasks = harness.tracked(cfg, tokenizer, processes)
        tasks_every = cfg.eval_tasks_every if cfg.eval_tasks else 0
        texts = self.samples(cfg, tokenizer)
        found = [Evaluation("validation", plan.eval_every, own_loss, at_start, compiled=True),
                 Evaluation("HellaSwag", cfg.hellaswag_every, questions, at_start),
                 Evaluation("tasks", tasks_every, tasks, at_start),
                 Evaluation("samples", plan.sample_every, texts, at_start=False)]
        return [evaluation for evaluation in found if evaluation.run is not None]

    @property
    def has_learned(self) -> bool:
        """Whether a new run starts from trained weights."""
        return bool(self.weights)

    def validation(self, cfg: Any, plan: RunPlan, tokenizer: Tokenizer,
                   processes: Processes) -> Callable:
        return validation(cfg, plan, self.corpus, tokenizer, processes)

    def samples(self, cfg: Any, tokenizer: Tokenizer) -> Callable:
        tokenizer.encode(cfg.sample_prompt)  # raises now what would end the run later

        def run(model, micro_batch, stopped):
            return {"samples": sample(model, tokenizer, [cfg.sample_prompt], SHOWN)}

        return run

    def stream(self, cfg: Any, plan: Any, tokenizer: Tokenizer,
               processes: Processes) -> StreamLike:
        stride = plan.block_size
        if self.corpus.is_mixed:  # its rows share no token, so each needs one more as last target
            stride += 1
        batches = partial(micro_batches, block_size=plan.block_size, stride=stride,
                          micro_batch=plan.micro_batch, processes=processes)
        seed = cfg.seed if cfg.shuffle else None
        stream = token_stream(self.corpus, tokenizer, seed, plan.block_size, batches)
        if self.corpus.growing:
            processes.check_same(plan.steps, "--data was finished while the processes started, so "
                                             "their run lengths differ: start again")
            return FollowingStream(stream, self.corpus.growing, processes)
        return stream

    def packed(self, idx: torch.Tensor) -> tuple:
        """More inputs of the model for these ids: (a Packed,) if rows contain several texts."""
        return ()

    def conclude(self, run: RunFolder) -> None:
        """Print a closing summary."""


def size_of(model_cfg: GPTConfig, corpus: CorpusLike) -> int | None:
    """Number of parameters for this Corpus, before its tokenizer is loaded; None if its vocabulary
    is unknown."""
    if not corpus.vocab_size:
        return None
    model = on_meta(replace(model_cfg, vocab_size=corpus.vocab_size))
    return model.parameter_counts()["total"]


def compiles(cfg: TrainConfig, plan: RunPlan, model_cfg: GPTConfig, processes: Processes,
             first: int) -> bool:
    """Whether to torch.compile: --compile, else whether the run from step `first` on is long enough
    for it to pay off."""
    if cfg.compile is not None:
        return cfg.compile
    if cfg.minutes:  # compile time does not count
        return processes.device.type == "cuda"
    tokens = tokens_of(plan.steps, cfg) - tokens_of(first, cfg)
    flops = tokens * on_meta(model_cfg).flops_per_token()
    return compiler.worth_compiling(flops / processes.world_size, processes.device, cfg.dtype)


def launch(settings: Settings, task: TaskLike) -> None:
    """Train a task, such as Pretraining, on all processes, from scratch or from a checkpoint.

    All checks come before anything is written, and those that need no GPU come first.
    """
    cfg, model_cfg, explicit, resume, *_ = settings
    hold_notices()  # a scheduler may send a warning before training starts
    processes = Processes(cfg.device, cfg.deterministic)
    compute_dtype(processes.device, cfg.dtype)  # raises BadInput if there is no such dtype
    check_parallel(cfg, model_cfg, processes.device)

    # ---- plan: settings, data and number of processes must fit each other
    corpus = task.corpus
    parameters = size_of(model_cfg, corpus)
    plan = make_plan(settings, corpus, parameters, processes.world_size)
    if resume and is_over(resume.state, plan):
        if processes.main:
            print(f"{resume.path} is the end of a run of {resume.state['step']} steps: "
                  f"raise --{length_flag(cfg)} to continue")
        return
    limit = reached(cfg, resume.state) if resume else None
    if resume and limit:
        if processes.main:
            print(f"{resume.path} belongs to a run that has reached {limit}: raise it to continue")
        return
    if resume:
        resume.compare_text(cfg, corpus, explicit)

    # ---- run folder, locked from here on. `explain_failures` is outermost: it turns machine
    # failures into one line wherever they occur
    run = RunFolder(cfg, resume, corpus) if processes.main else RunFolder.null()
    with explain_failures(cfg), closing(run), processes:
        if processes.main and cfg.tensorboard:
            serve_tensorboard(cfg.log_dir, cfg.tensorboard, cfg.tensorboard_host)

        # ---- tokenizer and evaluations: their files may be missing
        with processes.main_first():  # it may download
            tokenizer, model_cfg = task.vocabulary(model_cfg)
        evaluations = task.evaluations(cfg, plan, tokenizer, processes)

        # ---- model and optimizer, while compilation is prepared in the background
        compiling = compiles(cfg, plan, model_cfg, processes, resume.state["step"] if resume else 0)
        if compiling:
            compiler.prepare()
        model = build_model(model_cfg, cfg, processes)
        optimizer = make_optimizer(model, cfg)
        # Several processes have so few sequences each that launching kernels takes longer than
        # running them, so half batches do not limit the micro-batch. For one process, a second size
        # would only take time to compile.
        rows = plan.most_rows if processes.world_size > 1 else plan.rows
        micro_batch = pick_micro_batch(model, cfg.micro_batch, rows, processes,
                                       state_like(optimizer), task.packed)
        plan = replace(plan, micro_batch=micro_batch)
        stream = task.stream(cfg, plan, tokenizer, processes)

        # ---- weights, only now: pick_micro_batch may change the model
        position = Position()
        rise = None
        if resume:
            resume.share(processes)
            rise = rate_rise(cfg, plan.steps, resume.state)
            position = resume.restore(model, optimizer, stream, tokenizer.spec)
        elif task.weights:
            load_weights(model, task.weights.pop())  # popped to free memory
        processes.check_same_text(corpus.identity, "the processes read different training data: "
                                                   "copy one data folder to every node")
        processes.check_same(position.step, "the processes found different checkpoints: make sure "
                                            "that all read one folder, and start again")

        # ---- all checks passed: from here on the run folder is written to
        description = describe(cfg, plan, model, corpus, processes, position.step)
        if rise:
            description += f"\n{rise}"
        setup = train_config(cfg, plan) | machine_of(cfg, plan, model, processes)
        config = {"model": asdict(model_cfg), "train": setup,
                  "max_steps": plan.steps, "tokenizer": tokenizer.spec, "data": corpus.identity,
                  "parameters": model.parameter_counts(), **task.extra}
        like = [*model.parameters(), *state_like(optimizer)]
        run.set_costs([model.flops_per_token(context) for context in contexts(plan.block_size)])
        run.begin(config, description, position, resume, like)

        # ---- compile, then train
        with explain_failures(cfg, micro_batch):
            if compiling:
                is_halved = position.step < half_steps(cfg)
                compile_model(model, plan, task, run, is_halved)
            elif cfg.compile is None and processes.device.type == "cuda":
                run.say("not compiled: the run is too short for compiling to pay off; --compile "
                        "compiles anyway")
            if position.step == 0 and plan.eval_every and not evaluations[0].at_start:
                run.say("step 0 | random weights are not evaluated; their loss is about "
                        f"ln {model_cfg.vocab_size:,} = {math.log(model_cfg.vocab_size):.2f}")
            train(cfg, plan, model, optimizer, stream, evaluations, run, processes, position)
        task.conclude(run)


def is_over(state: dict, plan: RunPlan) -> bool:
    """Whether a checkpoint's run is finished, and the plan does not extend it."""
    return state["step"] >= plan.steps and state.get("finished", True)


def train_config(cfg: TrainConfig, plan: RunPlan) -> dict:
    """The settings of a run for config.json and checkpoints, with unset ones filled in from the
    plan."""
    return asdict(cfg) | {"eval_every": plan.eval_every, "sample_every": plan.sample_every,
                          "steps": plan.steps, "sequences": plan.micro_batch}


def machine_of(cfg: TrainConfig, plan: RunPlan, model: GPT, processes: Processes) -> dict:
    """Device, number of processes and FLOPs per token, for config.json and checkpoints."""
    context = int(mean_context(cfg, plan.block_size))
    return {"device_name": device_name(processes.device), "processes": processes.world_size,
            "flops_per_token": model.flops_per_token(context)}


def compile_model(model: GPT, plan: Any, task: TaskLike, run: RunFolder, is_halved: bool) -> None:
    """is_halved: whether the next step is a half batch, whose micro-batch may be smaller."""
    sizes = [plan.micro_batch]
    if is_halved and plan.first_micro_batch != plan.micro_batch:
        sizes.append(plan.first_micro_batch)
    batches = []
    for size in sizes:
        idx = torch.zeros(size, plan.block_size, dtype=torch.long, device=device_of(model))
        batches.append((idx, idx, *task.packed(idx)))
    compiler.compile_ahead(model, batches, plan.eval_every > 0, run.say)


def main(argv: list[str]) -> None:
    chosen = settings(argv)
    check_model(chosen.model)
    if chosen.train.plan:
        print_forecast(chosen)
        return
    if chosen.auto:
        chosen = sized(chosen)
    cfg, model_cfg, explicit, resume, start, _ = chosen
    if cfg.doctor:
        examine(cfg, model_cfg)
    for line in flag_warnings(cfg, model_cfg, explicit):
        note(line)
    task = Pretraining(cfg, explicit, start)
    has_prompt = resume or "sample_prompt" in explicit
    if names_ids(task.corpus.tokenizer) and not has_prompt:
        # the presets' prompts are text; an empty one starts a document
        chosen = chosen._replace(train=replace(cfg, sample_prompt=""))
    repeat.note_differences(chosen, task.corpus)
    launch(chosen, task)


def examine(cfg: TrainConfig, model_cfg: GPTConfig) -> NoReturn:
    """Print the report of --doctor. Exits with code 0 if this machine is ready to train, else 1."""
    if launched():
        raise BadInput("--doctor starts its own processes: run it with python, without torchrun")

    def build(vocab_size):
        return on_meta(replace(model_cfg, vocab_size=vocab_size))

    machine = doctor.Machine(cfg, build, Path(__file__))
    sys.exit(0 if doctor.examine(machine) else 1)


def print_forecast(chosen: Settings) -> None:
    """Print the tables of --plan: every --size and the chosen model; with a price, what dollars
    buy."""
    cfg = chosen.train
    corpus = Corpus(cfg) if "data" in chosen.explicit else None  # the tables need no data
    sizer = sizer_of(chosen, corpus)
    own = cfg.size or cfg.preset
    models = {name: sizer.build(shape) for name, shape in SIZES.items()}
    models[own] = sizer.model
    print(forecast(cfg, models, own))
    if cfg.price_per_hour:
        print(f"\n{sizing.table(sizer, measured='size' in chosen.auto)}")


def sizer_of(chosen: Settings, corpus: Any) -> sizing.Sizer:
    """The Sizer of a run. corpus: a Corpus or None."""
    vocab_size = corpus and corpus.vocab_size
    model_cfg = replace(chosen.model, vocab_size=vocab_size or chosen.model.vocab_size)

    def build(shape):
        return on_meta(replace(model_cfg, **shape))

    return sizing.Sizer(chosen.train, build, shape_of, corpus, Path(__file__))


def sized(chosen: Settings) -> Settings:
    """Settings with the shape and length that --size auto and --dollars choose; prints why. A
    resumed run keeps its own."""
    cfg, model_cfg, explicit, resume, *_ = chosen
    dollars = chosen.auto.get("dollars")
    resize = "size" in chosen.auto
    explicit = explicit - {"tok_per_sec"}
    if resume:
        if resize:
            note("--size auto is for new runs: this one keeps its shape")
        if dollars:
            note("--dollars is for new runs: this one keeps its length")
        return chosen._replace(explicit=explicit, auto={})
    if resize and chosen.start:  # by --config: `take_auto` refuses the flag
        raise BadInput(f"--size auto chooses the shape, but --init_from {cfg.init_from} has one: "
                       "leave --size auto out")
    if dollars and not cfg.price_per_hour:
        raise BadInput("--dollars needs the price of the machine: give --price_per_hour")
    if not (dollars or cfg.minutes or cfg.max_steps):
        raise BadInput("--size auto depends on the length: give --minutes, --max_steps or "
                       "--dollars with --price_per_hour")

    def choose():
        return sizer_of(chosen, Corpus(cfg)).choose(dollars, resize)

    if launched():
        depth, minutes = nodes.from_rank_0("size", choose, unchanged)
    else:
        depth, minutes = choose()
    if depth:
        model_cfg = replace(model_cfg, **shape_of(depth))
        cfg = replace(cfg, size=None)  # --config may have set it
        check_model(model_cfg)
    if minutes:
        explicit = explicit | {"minutes"}
        cfg = resolve(cfg, {"minutes": minutes}, only_length(explicit))
    return Settings(cfg, model_cfg, explicit, start=chosen.start)


if __name__ == "__main__":
    run(main)
