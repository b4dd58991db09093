"""Train GPT-2 (124M) from token shards, with modern improvements, each behind one flag.

    python fineweb.py                                            # text -> shards in edu_fineweb10B/
    python train_gpt2.py                                         # one GPU, or a CPU
    torchrun --standalone --nproc_per_node=8 train_gpt2.py       # eight GPUs
    python train_gpt2.py --preset gpt2                           # the classic baseline, nothing modern
    python train_gpt2.py --mlp gelu --no-emb_norm --run no_swiglu_no_embnorm
    tensorboard --logdir log                                     # watch it

Improvements over the baseline and their flags:
    SwiGLU or ReLU^2 MLP  --mlp            3x learning rate       --max_lr
    RMSNorm               --norm           4 epochs               --epochs
    RoPE                  --pos            new shuffle each epoch --shuffle
    post-embedding norm   --emb_norm       other schedules        --schedule
    query-key norm        --qk_norm        Xavier, Kaiming init   --init
    no biases             --no-bias        dropout                --dropout
    untied head           --no-tie_embeddings

Everything a run makes goes to log/<run>/: config.json, log.txt, TensorBoard events, ckpt_<step>.pt.
"""

import contextlib
import dataclasses
import datetime
import errno
import inspect
import json
import math
import os
import shlex
import statistics
import sys
import textwrap
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import eval_harness
import hellaswag
from lib import checkpoint
from lib.cli import BadInput, RankError, flag, parse, run
from lib.cross_entropy import linear_cross_entropy
from lib.decoding import SampleConfig, sample
from lib.devices import CompileOnce, Processes, autocast, cast, compute_dtype, peak_flops, pick_micro_batch, to_device
from lib.logger import Logger, serve_tensorboard
from lib.shards import Shards, check_ids, check_shards, read_shard
from lib.tokenizers import load_tokenizer

# ----------------------------------------------------------------------------------------------------------------------
# Configuration. Every field with a help text is a flag; the defaults are the classic baseline (--preset gpt2).


@dataclass
class GPTConfig:
    # shape
    block_size: int = flag(1024, "context length, tokens")
    n_layer: int = flag(12, "transformer blocks")
    n_head: int = flag(12, "attention heads a block")
    n_embd: int = flag(768, "width of the residual stream")
    # improvements
    mlp: Literal["gelu", "swiglu", "relu2"] = flag("gelu", "feed-forward layer, the same parameter count each")
    norm: Literal["layernorm", "rmsnorm"] = flag("layernorm", "normalization before each layer and the head")
    pos: Literal["learned", "rope"] = flag("learned", "position information: added embeddings or rotated q and k")
    emb_norm: bool = flag(False, "norm right after the embeddings (post-embedding norm, as in Dual PatchNorm)")
    qk_norm: bool = flag(False, "norm on each head's queries and keys")
    bias: bool = flag(True, "biases in linear layers and LayerNorm")
    tie_embeddings: bool = flag(True, "token embedding and output head share one matrix")
    dropout: float = flag(0.0, "dropout on embeddings, attention and residual branches; off in evaluation")
    init: Literal["gpt2", "xavier", "kaiming"] = flag("gpt2", "weight initialization, see init_weights")
    # set by the data or the checkpoint, not by a flag
    vocab_size: int = 50257      # ids the tokenizer can produce
    vocab_multiple: int = 128    # the matrices are padded to a multiple of this, which tensor cores like

    @property
    def padded_vocab_size(self):
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


@dataclass
class TrainConfig:
    preset: Literal["gpt2", "modern", "tiny"] = flag("modern", "starting point; every other flag overrides it")
    size: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] | None = flag(
        None, "sets n_layer, n_head and n_embd: gpt2 124M, gpt2-medium 350M, gpt2-large 774M, gpt2-xl 1.6B")
    # data
    data: str = flag("edu_fineweb10B", "folder of token shards")
    shuffle: bool = flag(False, "new order of shards, and of documents inside each, every epoch")
    val_tokens: int = flag(10_485_760, "validation tokens, from the start of the val shards")
    # length and batch
    epochs: float = flag(1.0, "passes over the training shards")
    max_steps: int | None = flag(None, "optimizer steps; takes the place of --epochs")
    total_batch_size: int = flag(524_288, "tokens an optimizer step, over all processes and accumulation")
    micro_batch: int | Literal["auto"] = flag("auto", "sequences a forward pass; auto: as many as memory takes")
    # optimizer
    optimizer: Literal["adamw"] = flag("adamw", "optimizer")
    max_lr: float = flag(6e-4, "peak learning rate")
    min_lr_frac: float = flag(0.1, "final learning rate as a fraction of the peak")
    warmup_steps: int = flag(715, "steps of linear warm-up")
    schedule: Literal["cosine", "wsd", "linear"] = flag("cosine", "learning rate after the warm-up, see get_lr")
    weight_decay: float = flag(0.1, "on matrices and embeddings; vectors are never decayed")
    grad_clip: float = flag(1.0, "largest gradient norm; 0: no clipping")
    # what happens along the way (0: never)
    eval_every: int = flag(250, "steps between validations")
    hellaswag_every: int = flag(250, "steps between HellaSwag evaluations")
    hellaswag_file: str | None = flag(None, "hellaswag_val.jsonl; without it, downloaded once into hellaswag/")
    eval_tasks: str | None = flag(None, "tasks of lm-evaluation-harness, joined by commas: see eval_harness.py")
    eval_tasks_every: int = flag(1000, "steps between evaluations on them")
    eval_tasks_dir: str | None = flag(None, "folder of <task>.jsonl for them, instead of the Hugging Face hub")
    eval_tasks_limit: int | None = flag(None, "items of each of them; without it, all")
    sample_every: int = flag(250, "steps between printed samples")
    sample_prompt: str = flag("Hello, I'm a language model,", "what the samples continue")
    save_every: int = flag(5000, "steps between checkpoints, 0: never; the last step is always saved")
    save_minutes: float = flag(10.0, "minutes between checkpoints, 0: never")
    keep: int = flag(3, "checkpoints kept, the newest; 0: all")
    max_skipped: int = flag(10, "end the run after so many updates in a row without a finite loss and gradient")
    spike: float = flag(1.0, "report steps whose loss is so many nats above the median of the 50 before; 0: none")
    # the run
    run: str | None = flag(None, "name of the folder under --log_dir, or preset and time")
    log_dir: str = flag("log", "where run folders go")
    resume: str | None = flag(None, "a checkpoint or run folder to continue from, or auto: the newest of --run, if there is one; "
                              "without the flag, auto")
    tensorboard: int = flag(0, "port at which this run serves TensorBoard for --log_dir, to all hosts")
    deterministic: bool = flag(False, "the same losses from the same seed on a GPU too, at a cost in speed")
    seed: int = flag(1337, "seed of weights, shuffling, dropout and samples")
    device: Literal["auto", "cuda", "mps", "cpu"] = flag("auto", "auto: cuda, then mps, then cpu")
    compile: bool | None = flag(None, "torch.compile the model; without the flag, on cuda only")


MODERN = dict(n_head=6, mlp="swiglu", norm="rmsnorm", pos="rope", emb_norm=True, bias=False, max_lr=1.8e-3, epochs=4.0,
              shuffle=True)
PRESETS = {
    "gpt2":   {},
    "modern": MODERN,
    "tiny":   MODERN | dict(n_layer=4, n_head=4, n_embd=128, block_size=256, data="docstrings", max_steps=900,
                            total_batch_size=2048, max_lr=3e-3, warmup_steps=50, val_tokens=65_536, eval_every=300,
                            hellaswag_every=0, sample_every=450, sample_prompt="Return the", compile=False),
}
SIZES = {
    "gpt2":        dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large":  dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl":     dict(n_layer=48, n_head=25, n_embd=1600),
}

# ----------------------------------------------------------------------------------------------------------------------
# Model. Shapes in comments: B sequences, T tokens, C = n_embd, H heads of D = C / H, V padded vocabulary.
# A choice is a name in the config and a class in a dict; branches stand in constructors, never in forward.


class LayerNorm(nn.LayerNorm):
    """Ba et al. 2016, https://arxiv.org/abs/1607.06450."""

    def __init__(self, dim, bias):
        super().__init__(dim, bias=bias)


class RMSNorm(nn.RMSNorm):
    """Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467. Has no bias. In fp32 under autocast, as LayerNorm is."""

    def __init__(self, dim, bias):
        super().__init__(dim, eps=1e-5)

    def forward(self, x):
        return super().forward(x.float()).type_as(x)


class NoPositions(nn.Module):
    """Stands where the kind of positions not chosen would: learned ones are added to embeddings, rotary ones turn q and k."""

    def forward(self, x, start):
        return x


class LearnedPositions(nn.Embedding):
    """GPT-2's position embeddings, added to the embeddings (B, T, C) of tokens number `start` to `start` + T - 1."""

    def forward(self, x, start):
        return x + self.weight[start:start + x.size(1)]


class Rotary(nn.Module):
    """Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864), for queries or keys (B, T, H, D).

    Dimension i turns together with i + D/2, the pairing that Llama and GPT-NeoX use. Angles are computed in fp32:
    bf16 cannot tell position 1000 from 1001.
    """

    def __init__(self, head_dim, block_size, base=10_000.0):
        super().__init__()
        freq = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        angle = torch.outer(torch.arange(block_size, dtype=torch.float32), freq)        # (block_size, D/2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, x, start):
        cos, sin = (table[start:start + x.size(1), None] for table in (self.cos, self.sin))
        a, b = x.float().chunk(2, dim=-1)                                               # (B, T, H, D/2) each
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        head_dim = config.n_embd // config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        # query-key norm: Henry et al. 2020, https://arxiv.org/abs/2010.04245
        self.q_norm = NORMS[config.norm](head_dim, config.bias) if config.qk_norm else nn.Identity()
        self.k_norm = NORMS[config.norm](head_dim, config.bias) if config.qk_norm else nn.Identity()
        self.rotary = Rotary(head_dim, config.block_size) if config.pos == "rope" else NoPositions()

    def forward(self, x, start, kv_cache=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, -1).unbind(2)               # (B, T, H, D) each
        q, k = self.rotary(self.q_norm(q), start), self.rotary(self.k_norm(k), start)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))                          # (B, H, T, D), nothing is moved
        if kv_cache is not None:
            k, v = kv_cache.update(self, k, v)                                          # (B, H, start + T, D)
        # SDPA drops out whenever it is told to, also in evaluation
        dropout = self.dropout if self.training else 0.0
        # a decoding step attends to the whole cache, so no mask
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=T > 1)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class GeluMLP(nn.Module):
    """GPT-2's: 4C hidden units, GELU in the tanh form (Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415)."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class ReLU2MLP(GeluMLP):
    """Squared ReLU (So et al. 2021, Primer, https://arxiv.org/abs/2109.08668)."""

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())


class SwiGLUMLP(nn.Module):
    """Shazeer 2020, https://arxiv.org/abs/2002.05202.

    Three matrices instead of two, so 8/3 C hidden units instead of 4C keep the parameter count (2048 at C = 768);
    rounded to a multiple of 16 for the tensor cores. Gate and value are one matrix.
    """

    def __init__(self, config):
        super().__init__()
        hidden = 16 * round(config.n_embd * 8 / 3 / 16)
        self.c_fc = nn.Linear(config.n_embd, 2 * hidden, bias=config.bias)
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=config.bias)

    def forward(self, x):
        gate, value = self.c_fc(x).chunk(2, dim=-1)
        return self.c_proj(F.silu(gate) * value)


NORMS = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}
MLPS = {"gelu": GeluMLP, "swiglu": SwiGLUMLP, "relu2": ReLU2MLP}


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = NORMS[config.norm](config.n_embd, config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = NORMS[config.norm](config.n_embd, config.bias)
        self.mlp = MLPS[config.mlp](config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x, start, kv_cache=None):
        x = x + self.drop(self.attn(self.ln_1(x), start, kv_cache))
        return x + self.drop(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    """A decoder-only transformer, GPT-2's by default (Radford et al. 2019); parameter names are Hugging Face's.

    Features, by GPTConfig: GELU, SwiGLU or ReLU^2; LayerNorm or RMSNorm; learned positions or RoPE; post-embedding
    norm (Kumar et al. 2023, https://arxiv.org/abs/2302.01327); query-key norm; biases or none; tied or untied head.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        learned = config.pos == "learned"
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.padded_vocab_size, config.n_embd),
            wpe=LearnedPositions(config.block_size, config.n_embd) if learned else NoPositions(),
            emb_norm=NORMS[config.norm](config.n_embd, config.bias) if config.emb_norm else nn.Identity(),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=NORMS[config.norm](config.n_embd, config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
        init_weights(self)

    def forward(self, idx, targets=None, kv_cache=None, logits_at=...):
        """idx: int64 (B, T), T at most block_size. With a KVCache, first any T, then one token at a time behind them.

        Without targets: logits (B, T, vocab_size), or only those at the positions `logits_at`, (rows, columns) -> (n, vocab_size).
        The padding of the vocabulary is cut off, so no padded id can win.
        With targets, int64 (B, T): the mean cross-entropy in nats, a scalar; targets of -1 are not counted.
        """
        start = 0 if kv_cache is None else kv_cache.length
        x = self.transformer.wpe(self.transformer.wte(idx), start)                      # (B, T, C)
        x = self.transformer.drop(cast(self.transformer.emb_norm(x)))                   # from here on in autocast's type
        for block in self.transformer.h:
            x = block(x, start, kv_cache)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[logits_at])[..., :self.config.vocab_size]                    # (B, T, V), cut
        return linear_cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets.flatten())

    def parameter_counts(self):
        """dict of parameter counts: total, embedding (tokens, positions and an untied head), layer (one block)."""
        total = sum(p.numel() for p in self.parameters())
        layer = sum(p.numel() for p in self.transformer.h[0].parameters())
        outside = sum(p.numel() for name, p in self.named_parameters() if name.split(".")[-2] in ("wte", "wpe", "lm_head"))
        return {"total": total, "embedding": outside, "layer": layer}

    def flops_per_token(self):
        """Forward and backward matmul FLOPs a token: 6N + 12 L H Q T (Chowdhery et al. 2022, PaLM, appendix B).

        N leaves out what is looked up rather than multiplied: learned positions, and the embedding of an untied head.
        """
        c = self.config
        looked_up = sum(p.numel() for name, p in self.named_parameters()
                        if name == "transformer.wpe.weight" or (name == "transformer.wte.weight" and not c.tie_embeddings))
        n = self.parameter_counts()["total"] - looked_up
        return 6 * n + 12 * c.n_layer * c.n_embd * c.block_size

    @classmethod
    def from_pretrained(cls, name):
        """A GPT with the weights of a Hugging Face GPT-2: "gpt2", ..., "gpt2-xl", or a folder save_pretrained made."""
        try:
            from transformers import GPT2LMHeadModel
        except ImportError as error:
            raise BadInput("loading a Hugging Face model needs transformers: pip install -r requirements-dev.txt") from error
        try:
            hf, report = GPT2LMHeadModel.from_pretrained(name, output_loading_info=True)
        except (OSError, ValueError) as error:
            raise BadInput(f"cannot load the Hugging Face GPT-2 {name}: {str(error).splitlines()[0]}") from error
        c = hf.config
        # another architecture's weights are left out with no more than a warning, and a variant computes otherwise
        classic = dict(activation_function="gelu_new", layer_norm_epsilon=1e-5, tie_word_embeddings=True, scale_attn_weights=True,
                       scale_attn_by_inverse_layer_idx=False, n_inner=c.n_inner and 4 * c.n_embd)
        odd = sorted(report["missing_keys"]) or [key for key, value in classic.items() if getattr(c, key) != value]
        if odd:
            raise BadInput(f"{name} is no GPT-2 as OpenAI's: see its {', '.join(odd[:4])}")
        # no padding: its rows would be untrained weights, and take part in the softmax of the loss
        model = cls(GPTConfig(block_size=c.n_positions, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd,
                              vocab_size=c.vocab_size, vocab_multiple=1))
        theirs, ours = hf.state_dict(), model.state_dict()
        if theirs.keys() != ours.keys():
            raise BadInput(f"{name} is no GPT-2: parameters {sorted(theirs.keys() ^ ours.keys())[:4]} do not match")
        for key, value in theirs.items():
            ours[key].copy_(value.t() if key.endswith(CONV1D) else value)
        return model


CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # Hugging Face's Conv1D holds the transpose of a Linear's weight


@torch.no_grad()
def init_weights(model):
    """Initialize every parameter, by config.init; fails on a parameter it does not know.

    gpt2:    normal, std 0.02 (positions 0.01, as in OpenAI's code).
    xavier:  normal, std sqrt(2 / (fan_in + fan_out))   (Glorot & Bengio 2010).
    kaiming: normal, std gain / sqrt(fan_in), gain sqrt(2) into the MLP's non-linearity, else 1   (He et al. 2015).
    In all three: the projections back into the residual stream (c_proj) are scaled by 1 / sqrt(2 n_layer), as there are
    2 n_layer of them to add up (Radford et al. 2019, section 2.3); embeddings and head are normal with std 0.02,
    norms start at 1, biases at 0. Fans are those of one matrix where several are fused (q, k, v; gate and value).
    """
    config, residual_scale = model.config, (2 * model.config.n_layer) ** -0.5
    fused = {"c_attn": 3, "c_fc": 2 if config.mlp == "swiglu" else 1, "c_proj": 1}
    for name, p in model.named_parameters():
        module, kind = f".{name}".split(".")[-2:]
        if kind == "bias":
            p.zero_()
        elif module in ("ln_1", "ln_2", "ln_f", "emb_norm", "q_norm", "k_norm"):
            p.fill_(1.0)
        elif module in ("wte", "lm_head"):
            p.normal_(std=0.02)
        elif module == "wpe":
            p.normal_(std=0.01)
        elif module in fused:
            fan_out, fan_in = p.size(0) / fused[module], p.size(1)
            std = {"gpt2": 0.02,
                   "xavier": math.sqrt(2 / (fan_in + fan_out)),
                   "kaiming": math.sqrt((2 if module == "c_fc" else 1) / fan_in)}[config.init]
            p.normal_(std=std * (residual_scale if module == "c_proj" else 1.0))
        else:
            raise ValueError(f"init_weights does not know the parameter {name}")


# ----------------------------------------------------------------------------------------------------------------------
# Optimizer and schedule


def make_optimizer(model, cfg):
    """The optimizer --optimizer names, over all parameters of `model`; only matrices and embeddings are decayed."""
    params = list(model.parameters())
    groups = [dict(params=[p for p in params if p.dim() >= 2], weight_decay=cfg.weight_decay),
              dict(params=[p for p in params if p.dim() < 2], weight_decay=0.0)]
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in params), "not each once"
    return OPTIMIZERS[cfg.optimizer](groups, cfg)


def adamw(groups, cfg):
    """Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101, with GPT-3's betas (Brown et al. 2020, appendix B)."""
    fused = groups[0]["params"][0].is_cuda
    return torch.optim.AdamW(groups, lr=cfg.max_lr, betas=(0.9, 0.95), eps=1e-8, fused=fused)


OPTIMIZERS = {"adamw": adamw}
WSD_DECAY = 0.2  # share of a wsd run that decays (Haegele et al. 2024, https://arxiv.org/abs/2405.18392)


def get_lr(step, cfg, max_steps):
    """Learning rate of update `step`, 0 <= step < max_steps."""
    # 1) linear warm-up, from the first step above zero
    if step < cfg.warmup_steps:
        return cfg.max_lr * (step + 1) / cfg.warmup_steps
    # 2) how far the decay has come, 0 to 1; wsd (warm-up, stable, decay) begins it late
    start = max(cfg.warmup_steps, round(max_steps * (1 - WSD_DECAY))) if cfg.schedule == "wsd" else cfg.warmup_steps
    progress = min(max((step - start) / max(max_steps - start, 1), 0.0), 1.0)
    # 3) from the peak down to min_lr_frac of it, along half a cosine or a line
    left = 0.5 * (1 + math.cos(math.pi * progress)) if cfg.schedule == "cosine" else 1 - progress
    return cfg.max_lr * (cfg.min_lr_frac + left * (1 - cfg.min_lr_frac))


def gradient_groups(model):
    """dict: name of a part (embedding, block_00, ..., rest) -> its parameters; every parameter in exactly one part.

    A tied head counts as embedding. These are the parts whose gradient norms TensorBoard shows.
    """
    groups = {}
    for name, p in model.named_parameters():
        words = name.split(".")
        part = "embedding" if words[1] in ("wte", "wpe") else f"block_{int(words[2]):02d}" if words[1] == "h" else "rest"
        groups.setdefault(part, []).append(p)
    return groups


# ----------------------------------------------------------------------------------------------------------------------
# Data: the global token stream


class ShardLoader:
    """One endless stream of tokens, the same for every process, that depends on (files, seed) alone.

    Every epoch passes over all shards; with a seed, the order of the shards and of the documents inside each is drawn
    anew from (seed, epoch). Without one (None) everything stays in order. Nothing is dropped at a shard's end. The
    state is three integers: epoch, shard (position in the epoch's order), offset (tokens into the permuted shard).
    Background threads read and permute the next shard while the current one is used, and have the next call's tokens ready.
    """

    def __init__(self, files, tokenizer, seed, place=None):
        """place: what is done with each call's tokens, in the background too: brings them to the device, say."""
        self.files, self.tokenizer, self.seed, self.place = files, tokenizer, seed, place or (lambda tokens: tokens)
        self.epoch, self.shard, self.offset = 0, 0, 0
        self.loaded, self.reader = {}, ThreadPoolExecutor(max_workers=1)  # shards, by epoch and shard
        self.ahead, self.cutter = {}, ThreadPoolExecutor(max_workers=1)   # the next tokens, by their position and number

    def next(self, n):
        """The stream's next n tokens and one more, the last target: int64 (n + 1,), placed. Advances by n."""
        self.prefetch(n)
        (future,) = self.ahead.values()
        tokens, self.epoch, self.shard, self.offset = future.result()
        self.prefetch(n)
        return tokens

    def prefetch(self, n):
        """Have the next n tokens made ready in the background."""
        key = (n, self.epoch, self.shard, self.offset)
        if key not in self.ahead:
            self.ahead = {key: self.cutter.submit(self.cut, *key)}

    def cut(self, n, epoch, shard, offset):
        """-> (the n + 1 tokens from a position on, placed, and the position n tokens later: epoch, shard, offset)."""
        pieces, missing = [], n + 1
        while missing:
            piece = self._tokens(epoch, shard)[offset:offset + missing]
            pieces.append(piece)
            missing -= len(piece)
            offset += len(piece)
            if missing:
                epoch, shard, offset = *self._after(epoch, shard), 0
        self._read_ahead(*self._after(epoch, shard))
        return self.place(np.concatenate(pieces).astype(np.int64)), epoch, shard, offset - 1  # the extra token comes again

    def state_dict(self):
        return {"epoch": self.epoch, "shard": self.shard, "offset": self.offset}

    def load_state_dict(self, state):
        self.epoch, self.shard, self.offset = state["epoch"], state["shard"], state["offset"]

    def _after(self, epoch, shard):
        return (epoch, shard + 1) if shard + 1 < len(self.files) else (epoch + 1, 0)

    def _tokens(self, epoch, shard):
        """The tokens of a shard; forgets earlier ones."""
        self._read_ahead(epoch, shard)
        self.loaded = {key: future for key, future in self.loaded.items() if key >= (epoch, shard)}
        return self.loaded[epoch, shard].result()

    def _read_ahead(self, epoch, shard):
        if (epoch, shard) not in self.loaded:
            self.loaded[epoch, shard] = self.reader.submit(self._read, epoch, shard)

    def where(self, state):
        """A position as text: what to look at after a spike."""
        file = self.files[self._index(state["epoch"], state["shard"])].name
        return f"epoch {state['epoch']}, from token {state['offset']:,} of {file}" + (", permuted" if self.seed is not None else "")

    def _index(self, epoch, shard):
        """Which file is the epoch's shard number `shard`."""
        if self.seed is None:
            return shard
        return int(np.random.default_rng((self.seed, epoch)).permutation(len(self.files))[shard])

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


def read_validation(shards, cfg, block_size, tokenizer):
    """The first cfg.val_tokens tokens of the val split, whole rows: int64 arrays x, y (rows, block_size)."""
    rows = min(cfg.val_tokens, shards.tokens["val"] - 1) // block_size
    if rows < 1:
        raise BadInput(f"validation needs {block_size + 1} tokens: there are {shards.tokens['val']} in {cfg.data}, and "
                       f"--val_tokens is {cfg.val_tokens}; lower --block_size or make a larger val split")
    tokens, *_ = ShardLoader(shards.val, tokenizer, seed=None).cut(rows * block_size, 0, 0, 0)
    return tokens[:-1].reshape(rows, block_size), tokens[1:].reshape(rows, block_size)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints


def load_checkpoint(path, device="cpu"):
    """-> (GPT in evaluation mode on `device`, its Tokenizer, the whole checkpoint). Raises BadInput if it is none."""
    state = checkpoint.read(path)
    try:
        model = GPT(GPTConfig(**state["model_config"]))
        model.load_state_dict(state["model"])
        tokenizer = load_tokenizer(state["tokenizer"])
    except BadInput:
        raise
    except KeyError as error:
        raise BadInput(f"{path} is not a checkpoint of this project, it holds no {error.args[0]}: name one that train_gpt2.py wrote") from error
    except Exception as error:  # another project's file, whatever it holds
        raise BadInput(f"{path} is not a checkpoint of this project ({type(error).__name__}): name another one") from error
    return model.to(device).eval(), tokenizer, state


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation and samples. HellaSwag and samples go through the uncompiled module, whose shapes may change freely


@torch.no_grad()
def evaluate(model, rows, micro_batch, processes):
    """Mean loss in nats a token over all validation rows x, y (rows, T), shared out over the processes.

    Sums are gathered, not means: the result is the same for any number of processes and any micro-batch. `model` may be
    compiled: it sees one shape, (micro_batch, T), the last batch filled up with rows that do not count.
    """
    model.eval()
    x, y = (part[processes.rank::processes.world_size] for part in rows)
    losses = [torch.zeros((), device=processes.device)]
    for i in range(0, len(x), micro_batch):
        xb, yb = x[i:i + micro_batch], y[i:i + micro_batch]
        missing = ((0, micro_batch - len(xb)), (0, 0))
        xb, yb = np.pad(xb, missing), np.pad(yb, missing, constant_values=-1)
        with autocast(processes.device):
            loss = model(to_device(xb, processes.device), to_device(yb, processes.device))
        losses.append(loss * int((yb >= 0).sum()))
    model.train()
    nats, count = processes.sum([torch.stack(losses).cpu().double().sum().item(), y.size])
    return nats / count


# ----------------------------------------------------------------------------------------------------------------------
# The run


def settings(argv):
    """The command line -> TrainConfig, GPTConfig, the names given, and the checkpoint.Resume to continue from or None."""
    (cfg, model_cfg), given = parse((TrainConfig, GPTConfig), argv, __doc__, PRESETS)
    if cfg.size:
        for name, value in SIZES[cfg.size].items():
            setattr(model_cfg, name, getattr(model_cfg, name) if name in given else value)
        given |= SIZES[cfg.size].keys()
    resume = checkpoint.to_resume(cfg, given)
    if resume:
        try:
            other_preset = "preset" in given and cfg.preset != resume.state["train_config"]["preset"]
            resume.adopt(cfg, model_cfg, given | (set().union(*PRESETS.values()) if other_preset else set()))
            with torch.device("meta"):
                GPT(model_cfg).load_state_dict(resume.state["model"], assign=True)  # shapes alone
        except BadInput:
            raise
        except Exception as error:  # another project's file, whatever it holds
            raise BadInput(f"{resume.path} is not a checkpoint of a training run of this project ({type(error).__name__}): name "
                           "another --resume") from error
    return cfg, model_cfg, given, resume


def plan(cfg, model_cfg, given, world):
    """Check the flags against each other and the data, before anything is built. Returns (Shards, max_steps)."""
    def need(condition, message):
        if not condition:
            raise BadInput(message)

    for config in (cfg, model_cfg):
        for name in ("block_size", "n_layer", "n_head", "n_embd", "total_batch_size", "max_lr", "epochs", "max_steps",
                     "micro_batch", "val_tokens", "max_skipped", "eval_tasks_limit"):
            value = getattr(config, name, None)
            need(value in (None, "auto") or 0 < value < math.inf, f"--{name} must be above zero and finite, not {value}")
        for name in ("warmup_steps", "grad_clip", "eval_every", "hellaswag_every", "eval_tasks_every", "sample_every",
                     "save_every", "save_minutes", "keep", "spike", "seed"):
            need(getattr(config, name, 0) >= 0, f"--{name} must not be negative or nan")
    need(0 <= cfg.weight_decay < math.inf, f"--weight_decay must not be negative, and finite, not {cfg.weight_decay}")
    need(cfg.total_batch_size <= 2**28, f"--total_batch_size must be at most {2**28:,} tokens, not {cfg.total_batch_size:,}")
    need(cfg.seed < 2**63, f"--seed must be below 2^63, not {cfg.seed}")
    need(0 <= cfg.tensorboard < 2**16, f"--tensorboard must be a port, 1 to 65535, not {cfg.tensorboard}")
    c, T = model_cfg, model_cfg.block_size
    need(c.n_embd % c.n_head == 0, f"--n_embd {c.n_embd} must be a multiple of --n_head {c.n_head}")
    need(c.pos != "rope" or c.n_embd // c.n_head % 2 == 0, f"--pos rope needs an even head size, not {c.n_embd // c.n_head}")
    need(0 <= c.dropout < 1, f"--dropout must be at least 0 and below 1, not {c.dropout}")
    need(0 <= cfg.min_lr_frac <= 1, f"--min_lr_frac must be between 0 and 1, not {cfg.min_lr_frac}")
    need(cfg.eval_tasks or not given & {"eval_tasks_every", "eval_tasks_dir", "eval_tasks_limit"},
         "--eval_tasks_every, --eval_tasks_dir and --eval_tasks_limit are for --eval_tasks: name some")
    need(not {"epochs", "max_steps"} <= given, "--epochs and --max_steps both set the length: give one of them")
    need(cfg.total_batch_size // T >= world, f"--total_batch_size {cfg.total_batch_size} is {cfg.total_batch_size // T} sequences of "
         f"--block_size {T}, fewer than {world} processes: raise it, or lower --nproc_per_node")
    need(cfg.total_batch_size % (T * world) == 0,
         f"--total_batch_size {cfg.total_batch_size} must be a multiple of --block_size {T} x {world} processes; "
         f"{-(-cfg.total_batch_size // (T * world)) * T * world} is")
    rows = cfg.total_batch_size // T // world
    need(cfg.micro_batch == "auto" or rows % cfg.micro_batch == 0,
         f"--micro_batch {cfg.micro_batch} must divide the {rows} sequences a process has in a step "
         f"(--total_batch_size {cfg.total_batch_size} / --block_size {T} / {world} processes)")

    shards = Shards(cfg.data)
    need(shards.tokens["train"], f"{cfg.data} holds no training tokens: make it again with fineweb.py")
    if "max_steps" not in given and "epochs" in given:
        cfg.max_steps = None  # a preset's
    max_steps = cfg.max_steps or int(min(cfg.epochs, 1e9) * shards.tokens["train"] / cfg.total_batch_size)
    need(max_steps > 0, f"{cfg.data} holds {shards.tokens['train']:,} training tokens, {cfg.epochs:g} epochs of which "
         f"are less than one step of {cfg.total_batch_size:,}: lower --total_batch_size or raise --epochs")
    need(max_steps < 2**31, f"{max_steps:,} steps are more than any run has: lower --max_steps or --epochs")
    need(cfg.warmup_steps < max_steps, f"--warmup_steps {cfg.warmup_steps} must be below the run's {max_steps} steps: "
         "give a smaller one")
    return shards, max_steps


def describe(cfg, model, shards, max_steps, micro_batch, processes):
    """What is about to happen, in a few lines."""
    counts, c, device = model.parameter_counts(), model.config, processes.device
    rows = cfg.total_batch_size // c.block_size // processes.world_size
    tokens = max_steps * cfg.total_batch_size
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"
    return "\n".join([
        f"model   {counts['total']:,} parameters: embedding {counts['embedding']:,}, {c.n_layer} layers of {counts['layer']:,}; "
        f"{model.flops_per_token() / 1e6:,.1f} MFLOPs a token",
        f"data    {cfg.data}: {shards.tokens['train']:,} train tokens in {len(shards.train)} shards, "
        f"validation on {min(cfg.val_tokens, shards.tokens['val'] - 1) // c.block_size * c.block_size:,}; vocabulary {c.vocab_size:,}, "
        f"padded to {c.padded_vocab_size:,}",
        f"length  {max_steps:,} steps of {cfg.total_batch_size:,} tokens = {tokens:,} tokens "
        f"({tokens / shards.tokens['train']:.2f} epochs), {tokens * model.flops_per_token():.2e} FLOPs",
        f"batch   {micro_batch} sequences x {c.block_size} tokens x {rows // micro_batch} accumulation steps x "
        f"{processes.world_size} processes",
        f"device  {name}, {str(compute_dtype(device)).removeprefix('torch.')}, torch {torch.__version__}",
    ])


def main(argv):
    cfg, model_cfg, given, resume = settings(argv)
    shards, max_steps = plan(cfg, model_cfg, given, int(os.environ.get("WORLD_SIZE", 1)))
    if resume:
        if not {"data", "epochs", "max_steps", "total_batch_size"} & given:
            max_steps = resume.state["max_steps"]
        if resume.state["step"] >= max_steps and resume.state.get("finished", True):
            if os.environ.get("RANK", "0") == "0":
                print(f"{resume.path} is the end of a run of {max_steps} steps: give more --max_steps to go on")
            return
    processes = Processes(cfg.device)
    name = cfg.run or f"{cfg.preset}_{time.strftime('%Y%m%d_%H%M%S')}"
    folder = checkpoint.make_run_folder(cfg.log_dir, name, resumes=bool(resume)) if processes.main else None
    try:
        with checkpoint.locked(folder):
            if folder and {step for step, _ in checkpoint.found(folder)} != (resume.seen if resume else set()):
                raise RankError(f"{folder} has just been written by another process: start again")
            if processes.main and cfg.tensorboard:
                serve_tensorboard(cfg.log_dir, cfg.tensorboard)
            with processes:
                trainer = Trainer(cfg, model_cfg, shards, max_steps, processes)
                if resume:
                    trainer.load(resume)
                if processes.main:
                    trainer.open(folder, resume)
                trainer.run()
    except torch.cuda.OutOfMemoryError as error:
        raise RankError(f"out of GPU memory with --micro_batch {cfg.micro_batch}: give a smaller one") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RankError(f"the disk of {folder} is full: free some space, and the same command with --run {name} goes on from the "
                        "newest checkpoint") from error


class Trainer:
    """One run: the parts it is built of, the loop over its steps, and what happens at a step.

    step: updates made so far, skipped ones included. skipped: updates left out for want of a finite loss, in all.
    """

    def __init__(self, cfg, model_cfg, shards, max_steps, processes):
        self.cfg, self.shards, self.max_steps, self.processes = cfg, shards, max_steps, processes
        self.device, T = processes.device, model_cfg.block_size
        with processes.main_first():
            self.tokenizer = load_tokenizer(shards.tokenizer)
            examples = hellaswag.load(cfg.hellaswag_file) if cfg.hellaswag_every else []
            if cfg.eval_tasks:
                manager, names = eval_harness.find_tasks(cfg.eval_tasks)
                self.tasks = manager, eval_harness.load_tasks(manager, names, cfg.eval_tasks_dir)
                eval_harness.check_tasks(self.tasks[1], processes.world_size, cfg.eval_tasks_limit)
        check_shards(shards, self.tokenizer)
        model_cfg.vocab_size = self.tokenizer.vocab_size
        self.questions = hellaswag.render(examples, self.tokenizer, T)
        self.val_rows = read_validation(shards, cfg, T, self.tokenizer)
        self.bytes_per_token = self.tokenizer.token_bytes()[self.val_rows[1]].sum() / self.val_rows[1].size
        self.loader = ShardLoader(shards.train, self.tokenizer, cfg.seed if cfg.shuffle else None, self.place)

        if cfg.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
            torch.use_deterministic_algorithms(True)
        torch.set_float32_matmul_precision("high")
        torch.manual_seed(cfg.seed)
        try:
            self.raw_model = GPT(model_cfg).to(self.device)  # the plain module: evaluated, sampled from, saved
        except (RuntimeError, MemoryError) as error:
            raise RankError(f"no memory for this model ({str(error).splitlines()[0]}): lower --n_embd, --n_layer or --block_size") from error
        self.rows = cfg.total_batch_size // T // processes.world_size
        self.micro_batch = pick_micro_batch(self.raw_model, cfg.micro_batch, self.rows, processes)
        self.optimizer = make_optimizer(self.raw_model, cfg)
        self.model = self.raw_model
        if cfg.compile or (cfg.compile is None and self.device.type == "cuda"):
            self.model = torch.compile(self.model, dynamic=False)
        self.eval_model = self.model
        if processes.distributed:
            # the only buffers are RoPE's constant tables; torch 2.13 renamed the option that leaves them alone
            names = inspect.signature(DDP).parameters
            buffers = {"forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False}
            self.model = DDP(self.model, device_ids=[self.device.index] if self.device.type == "cuda" else None,
                             gradient_as_bucket_view=True, **buffers)
        self.parts, self.parameters = gradient_groups(self.raw_model), list(self.raw_model.parameters())
        self.flops, self.peak = self.raw_model.flops_per_token() * cfg.total_batch_size, peak_flops(self.device)  # of a step
        self.step, self.skipped, self.streak, self.finished = 0, 0, 0, False
        self.once = CompileOnce(lambda line: self.log.say(f"step {self.step} | {line}"))
        self.log, self.writer = Logger.null(), Logger.null()  # rank 0 opens its own

    def load(self, resume):
        """Go on where a checkpoint was saved."""
        state = resume.state
        if state["tokenizer"] != self.tokenizer.spec:
            raise BadInput(f"{resume.path} was made with another tokenizer than {self.cfg.data}: its ids mean other text; give "
                           "--data of its own tokenizer")
        try:
            self.raw_model.load_state_dict(state["model"])
            checkpoint.load_optimizer(self.optimizer, state["optimizer"])
        except (ValueError, KeyError, RuntimeError, TypeError, AttributeError) as error:
            raise BadInput(f"the optimizer of {resume.path} does not fit ({error}): begin another --run") from error
        self.step, self.skipped, self.streak = state["step"], state.get("skipped", 0), state.get("streak", 0)
        if state.get("data", self.shards.identity) == self.shards.identity:
            self.loader.load_state_dict(state["loader"])
        else:  # a position means nothing in other files
            resume.changed.append("other training data, read from its beginning")
        state.clear()  # its tensors are mapped from the file, which --keep may delete: free the disk space then

    def open(self, folder, resume):
        """Open the log and write config.json, on rank 0. resume: what was loaded, or None."""
        cfg, model_cfg, processes = self.cfg, self.raw_model.config, self.processes
        checkpoint.check_room(folder, 3 * 4 * sum(p.numel() for p in self.parameters))  # weights and AdamW's two moments
        anew = not resume and (folder / "log.txt").stat().st_size > 0
        checkpoint.rewind(folder, self.step)
        launcher = ["torchrun", f"--nproc_per_node={processes.world_size}", "--"] if processes.distributed else ["python"]
        command, changed = shlex.join([*launcher, *sys.argv]), ", ".join(resume.changed) if resume else ""
        start = {"step": self.step, "from": resume and str(resume.path), "changed": changed, "command": command,
                 "time": time.strftime("%Y-%m-%d %H:%M:%S"), "launch": checkpoint.launch_id()}
        config = {"model": dataclasses.asdict(model_cfg), "train": dataclasses.asdict(cfg), "max_steps": self.max_steps,
                  "micro_batch": self.micro_batch, "world": processes.world_size, "tokenizer": self.tokenizer.name,
                  "command": command, "torch": torch.__version__, "starts": [*checkpoint.starts(folder), start],
                  "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type}
        checkpoint.replace(folder / "config.json", lambda file: file.write(json.dumps(config, indent=2).encode()))
        code, kept = Path(__file__).read_bytes(), folder / "train_gpt2.py"  # the code that made the run
        if kept.exists() and kept.read_bytes() != code:
            kept = folder / f"train_gpt2_from_{self.step:05d}.py"
        checkpoint.replace(kept, lambda file: file.write(code))
        self.folder, self.log, self.writer = folder, Logger(folder, self.max_steps, self.step), checkpoint.Writer(folder, cfg.keep)
        self.writer.reserve(self.parameters, copies=3)  # for the same three; while the first step compiles
        self.log.say(describe(cfg, self.raw_model, self.shards, self.max_steps, self.micro_batch, processes))
        if resume:
            self.log.say(f"resume  {resume.path}, step {self.step}; " + (f"changed: {changed}" if changed else "as before"))
        if anew:
            self.log.say(f"{folder} holds no checkpoint: its run begins anew")
        self.log.hyperparameters(self.step, config["train"] | config["model"])

    def run(self):
        """The loop. It ends after the last step or, by a signal, after the current one; either way with a checkpoint."""
        say = self.log.say if self.processes.main else lambda line: None
        self.first, self.stopping, self.saved_at = self.step, False, time.monotonic()
        self.recent = deque(maxlen=20)   # seconds of the latest steps, but for the first, which compiles
        self.losses = deque(maxlen=50)
        # torchrun kills what has not ended 30 s after a signal
        patient = dict(patience=20.0 if self.processes.world_size > 1 else None, echo=2.0) if self.processes.distributed else {}
        if self.processes.sum([self.step])[0] != self.step * self.processes.world_size:
            raise RankError("the processes found different checkpoints: see that all read the same folder, and start again")
        self.before = self.position()
        self.loader.prefetch(self.cfg.total_batch_size)
        with contextlib.closing(self.log), checkpoint.StopSignals(say, **patient) as self.stop:
            while self.step < self.max_steps and not self.stopping:
                if self.step > self.first and self.due_to_save():
                    self.save()
                self.look()
                if not self.stopping:
                    self.update()
                self.collect()
            if self.step == self.max_steps:
                self.look(last=True)
                self.finished = not self.stopping
            self.stop.heard()
            self.save(wait=True)
            self.processes.barrier()
            if self.processes.main and self.finished:
                say(f"done: watch it with `tensorboard --logdir {self.cfg.log_dir}`, sample again with "
                    f"`python generate.py --checkpoint {checkpoint.path_of(self.folder, self.step)}`")
            elif self.processes.main:
                say(f"stopped at step {self.step} of {self.max_steps}: the same command with --run {self.folder.name} goes on")

    # -- what happens at a step --

    def look(self, last=False):
        """Validation, HellaSwag and samples, where they are due; the last step has them all."""
        cfg, log, step = self.cfg, self.log, self.step

        def due(every):
            return every and (step % every == 0 or last) and not self.agree_to_stop()

        if due(cfg.eval_every):
            with self.once("validation"):
                loss = evaluate(self.eval_model, self.val_rows, self.micro_batch, self.processes)
            bpb = loss / math.log(2) / self.bytes_per_token
            log.say(f"step {step} | val loss {loss:.4f} | {bpb:.4f} bits per byte")
            log.record(step, "val", loss)
            log.scalars(step, {"val/loss": loss, "val/bpb": bpb})

        if due(cfg.hellaswag_every):
            self.raw_model.eval()
            with autocast(self.device):
                scores = hellaswag.evaluate(self.raw_model, self.questions, self.device, self.processes.rank, self.processes.world_size,
                                            self.asked_to_stop)
            self.raw_model.train()
            n, _, correct = self.processes.sum(scores[:3])
            if not self.agree_to_stop():
                log.say(f"step {step} | HellaSwag acc_norm {int(correct)}/{int(n)} = {correct / n:.4f}")
                log.record(step, "hella", correct / n)
                log.scalars(step, {"eval/hellaswag": correct / n})

        if cfg.eval_tasks and due(cfg.eval_tasks_every):
            self.raw_model.eval()
            lm = eval_harness.adapter(self.raw_model, self.tokenizer, self.processes, progress=False, stopped=self.asked_to_stop)
            results = eval_harness.evaluate(lm, *self.tasks, cfg.eval_tasks_limit, bootstrap=0, progress=False)
            self.raw_model.train()
            if not self.agree_to_stop() and self.processes.main:
                for task, key in eval_harness.headlines(results).items():
                    value, metric = results["results"][task][key], key.partition(",")[0]
                    log.say(f"step {step} | {task} {metric} {value:.4f}")
                    tag = "eval/hellaswag_lm_eval" if task == "hellaswag" else f"eval/{task}"  # eval/hellaswag is build-nanogpt's figure
                    log.record(step, tag, value)
                    log.scalars(step, {tag: value})
                for task, reason in results["failed"].items():
                    log.say(f"step {step} | {task} has no result: {reason}")

        if due(cfg.sample_every) and self.processes.main and step > 0:
            texts = sample(self.raw_model, self.tokenizer, SampleConfig(prompt=cfg.sample_prompt))
            log.say("\n".join(f"> {text!r}" for text in texts))
            log.text(step, "samples", "\n\n---\n\n".join(textwrap.indent(text, "    ") for text in texts))

    def asked_to_stop(self):
        """Whether a stop signal came to this process, whose main thread has then heard it."""
        if self.stop.received is not None:
            self.stop.heard()
        return self.stop.received is not None

    def agree_to_stop(self):
        """Whether one came to any process; all must ask. An evaluation may take longer than a box that is being stopped leaves."""
        self.stopping = self.stopping or self.processes.sum([self.asked_to_stop()])[0] > 0
        if self.stopping:
            self.stop.heard()
        return self.stopping

    def place(self, tokens):
        """A global batch, int64 (n + 1,) -> this process's inputs and targets on its device, (rows, T) each."""
        size = self.rows * self.raw_model.config.block_size
        tokens = to_device(tokens[self.processes.rank * size:][:size + 1], self.device)
        return tokens[:-1].view(self.rows, -1), tokens[1:].clone().view(self.rows, -1)

    def update(self):
        """One step: `accumulation` micro-batches of this process's share of the global batch, then the optimizer."""
        cfg, step, processes = self.cfg, self.step, self.processes
        if not self.streak:
            self.before = self.position()
        started = time.perf_counter()
        # dropout follows from (seed, step, rank), so that there is no random state to save
        torch.manual_seed(int(np.random.SeedSequence((cfg.seed, step, processes.rank)).generate_state(1, np.uint64)[0]))
        read_from = self.loader.state_dict()
        try:
            x, y = self.loader.next(cfg.total_batch_size)                                         # (rows, T) each
        except BadInput as error:  # the others may not come to say it
            raise RankError(str(error)) from error
        fetched = time.perf_counter() - started
        accumulation, loss_sum = self.rows // self.micro_batch, torch.zeros((), device=self.device)
        with self.once("training"):
            for i in range(accumulation):
                # gradients are exchanged with the last micro-batch only; DDP decides that in forward
                wait = processes.distributed and i < accumulation - 1
                with self.model.no_sync() if wait else contextlib.nullcontext():
                    with autocast(self.device):
                        loss = self.model(*(part[i * self.micro_batch:(i + 1) * self.micro_batch] for part in (x, y))) / accumulation
                    loss.backward()
                loss_sum += loss.detach()
        shared = torch.stack([loss_sum, torch.full_like(loss_sum, self.stop.received is not None)])
        if processes.distributed:
            dist.all_reduce(shared)
        norms = torch.stack([torch.nn.utils.get_total_norm([p.grad for p in part]) for part in self.parts.values()])
        norm = norms.norm()
        loss, stop, *norms = torch.cat((shared, norm[None], norms)).tolist()  # waits for the device
        loss /= processes.world_size
        self.stopping = stop > 0 or (not processes.distributed and self.stop.received is not None)
        if self.stopping:
            self.stop.heard()

        self.writer.wait_copied()  # what is being saved must not change yet
        lr = get_lr(step, cfg, self.max_steps)
        if math.isfinite(loss) and math.isfinite(norms[0]):  # the same on every rank
            if cfg.grad_clip:
                torch.nn.utils.clip_grads_with_norm_(self.parameters, cfg.grad_clip, norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self.streak = 0
        else:
            self.streak, self.skipped = self.streak + 1, self.skipped + 1
            self.log.say(f"step {step} | skipped: loss {loss}, gradient norm {norms[0]}; its batch: {self.loader.where(read_from)}")
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        seconds = time.perf_counter() - started
        if processes.main:
            self.note(loss, lr, norms, seconds, fetched, read_from)
        if self.streak == cfg.max_skipped:
            self.give_up()

    def note(self, loss, lr, norms, seconds, fetched, read_from):
        """Log the step that was just made (rank 0). norms: of all gradients, then of each part. fetched: seconds it waited for data."""
        cfg, log, step, world = self.cfg, self.log, self.step - 1, self.processes.world_size
        if step > self.first:  # the first step compiles
            self.recent.append(seconds)
        typical, rate = statistics.median(self.recent or [seconds]), cfg.total_batch_size / seconds
        mfu = self.flops / seconds / self.peak / world if self.peak else None
        left = datetime.timedelta(seconds=round(typical * (self.max_steps - self.step)))
        log.record(step, "train", loss)
        memory = torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else None
        scalars = {"train/loss": loss, "train/skipped_steps": self.skipped, "lr": lr, "perf/tok_per_sec": rate, "perf/step_ms": seconds * 1e3,
                   "perf/data_ms": fetched * 1e3, "perf/mfu": mfu, "perf/memory_gb": memory, "perf/compiled_again": self.once.again,
                   **dict(zip(["grad_norm", *(f"grad_norm/{part}" for part in self.parts)], norms, strict=True))}
        log.scalars(step, {tag: value for tag, value in scalars.items() if value is not None})
        log.progress(step, f"loss {loss:.4f} | lr {lr:.2e} | norm {norms[0]:.3f} | {seconds * 1e3:.0f} ms | {rate:,.0f} tok/s | "
                     f"MFU {f'{mfu:.1%}' if mfu is not None else 'n/a'} | {f'{memory:.1f} GB | ' if memory else ''}ETA {left}")
        if self.step - self.first == min(10, self.max_steps):
            log.say(f"predicted: {typical * (self.max_steps - self.first) / 60:.1f} minutes of training steps")
        if cfg.spike and len(self.losses) >= 10 and loss > statistics.median(self.losses) + cfg.spike:
            line = f"spike: loss {loss:.4f}, median before {statistics.median(self.losses):.4f}; its batch: {self.loader.where(read_from)}"
            log.say(f"step {step} | {line}")
            log.text(step, "spikes", line)
        if math.isfinite(loss):
            self.losses.append(loss)

    # -- checkpoints --

    def position(self):
        """Where the run is: what a checkpoint holds besides weights, moments and settings."""
        return {"step": self.step, "skipped": self.skipped, "streak": self.streak, "finished": self.finished,
                "loader": self.loader.state_dict()}

    def due_to_save(self):
        cfg, minutes = self.cfg, (time.monotonic() - self.saved_at) / 60
        if self.streak:  # what comes after these updates may be no better than before: keep the checkpoints from before
            return False
        return (cfg.save_every and self.step % cfg.save_every == 0) or (cfg.save_minutes and minutes >= cfg.save_minutes)

    def save(self, position=None, wait=False):
        """Begin to write a checkpoint; with `wait`, raise BadInput if it cannot be written. Does nothing but on rank 0."""
        if not self.processes.main:
            return
        self.collect(wait=True)  # the one before
        self.log.flush()
        position, self.saved_at = position or self.position(), time.monotonic()
        if not (position["step"] == self.first < self.max_steps and checkpoint.path_of(self.folder, self.first).exists()):
            self.writer.start(position["step"], {
                **position, "model": self.raw_model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "model_config": dataclasses.asdict(self.raw_model.config), "train_config": dataclasses.asdict(self.cfg),
                "max_steps": self.max_steps, "tokenizer": self.tokenizer.spec, "data": self.shards.identity})
        if wait and (error := self.collect(wait=True)):
            raise error

    def collect(self, wait=False):
        """Say that the checkpoint begun is written, or why not: that alone does not end a run. Returns the error or None."""
        try:
            if line := self.writer.collect(wait):
                self.log.say(line)
        except BadInput as error:
            self.log.say(str(error))
            return error
        return None

    def give_up(self):
        """Too many updates in a row were skipped."""
        self.collect(wait=True)
        if self.processes.main and not checkpoint.found(self.folder):
            self.save(self.before, wait=True)
        self.processes.barrier()
        kept = checkpoint.found(self.folder)[0][1] if self.processes.main else None
        raise BadInput(f"the last {self.streak} updates had no finite loss or gradient; {kept} is from before: lower --max_lr or "
                       "lengthen --warmup_steps, and --resume it")


if __name__ == "__main__":
    run(main)
