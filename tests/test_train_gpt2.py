"""train_gpt2.py against references, and run for real at a tiny size.

    python -m pytest tests/test_train_gpt2.py
"""

import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import socket
import threading
from collections import Counter
from dataclasses import FrozenInstanceError, asdict, fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import (
    ROOT,
    TINY_FLAGS,
    hellaswag_items,
    read_log,
    sentences,
    tiny,
    tiny_checkpoint,
    write_bin,
    write_data,
    write_lines,
)
from runs import events, run_script, steps_saved

import train_gpt2
from lib import checkpoint, devices, huggingface
from lib.budget import UNMEASURED, steps_of
from lib.cli import BadInput, parse
from lib.decoding import SHOWN, sample
from lib.logger import SpikeDetector, quoted
from lib.shards import Shards, read_validation
from lib.tokenizers import load_tokenizer, train_bpe
from train_gpt2 import GPT, PRESETS, SIZES, GPTConfig, ShardLoader, TrainConfig


def go(data, folder, *flags):
    """Train a tiny model in this process -> the run's folder."""
    words = [*TINY_FLAGS, "--data", data, "--log_dir", folder.parent, "--run_name", folder.name]
    train_gpt2.main([str(word) for word in (*words, *flags)])
    return folder


def without(flags, name):
    """The flags less `name` and its value."""
    at = flags.index(name)
    return [*flags[:at], *flags[at + 2:]]


def steps_trained(folder):
    """The steps whose training loss is in log.txt."""
    return [step for step, kind in read_log(folder) if kind == "train"]


def weights_in(path):
    """The weights in a checkpoint, in the order of GPT.parameters(): a tied head occurs once."""
    return list(train_gpt2.load_checkpoint(path)[0].parameters())


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --------------------------------------------------------------------------------------------------
# Settings


def length(data, *argv):
    """Steps of a run with these flags, of a model of 1,000 parameters."""
    cfg = train_gpt2.settings(["--data", str(data), *argv]).train
    return steps_of(cfg, Shards(data).tokens["train"], 1000)


GPT2 = dict(mlp="gelu", norm="layernorm", pos="learned", emb_norm=False, qk_norm=False, bias=True,
            tie_embeddings=True, init="gpt2", dropout=0.0, n_layer=12, n_head=12, n_embd=768,
            block_size=1024, optimizer="adamw", max_lr=6e-4, schedule="cosine", epochs=1.0,
            shuffle=False, total_batch_size=524_288)
MODERN = dict(mlp="swiglu", norm="rmsnorm", pos="rope", emb_norm=True, bias=False,
              tie_embeddings=True, n_layer=12, n_head=6, n_embd=768, max_lr=1.8e-3, epochs=4.0,
              shuffle=True)


@pytest.mark.parametrize("preset, want", [("gpt2", GPT2), ("modern", MODERN)])
def test_presets(preset, want):
    argv = ["--preset", preset]
    (cfg, model_cfg), given = parse((TrainConfig, GPTConfig), argv, None, PRESETS)
    have = asdict(cfg) | asdict(model_cfg)
    assert {name: have[name] for name in want} == want
    assert given == {"preset"}


def test_modern_is_the_default_preset():
    assert TrainConfig().preset == "modern"


@pytest.mark.parametrize("argv, want", [
    (["--size", "gpt2-medium"], dict(n_layer=24, n_head=16, n_embd=1024)),
    (["--size", "gpt2-xl", "--n_layer", "6"], dict(n_layer=6, n_head=25, n_embd=1600)),
    (["--depth", "1"], dict(n_layer=1, n_head=1, n_embd=128)),
    (["--depth", "7", "--preset", "tiny"], dict(n_layer=7, n_head=4, n_embd=512)),
    (["--depth", "12", "--preset", "gpt2"], dict(n_layer=12, n_head=6, n_embd=768)),
    (["--depth", "12", "--n_embd", "384"], dict(n_layer=12, n_head=6, n_embd=384)),
])
def test_size_sets_the_shape_and_flags_override_it(argv, want):
    model_cfg = train_gpt2.settings(argv).model
    assert {name: getattr(model_cfg, name) for name in want} == want


def test_a_run_of_depth_keeps_only_its_shape(data, tmp_path):
    flags = ["--preset", "speedrun", "--depth", 2, "--block_size", 32, "--total_batch_size", 256,
             "--batch_warmup", 0, "--context_warmup", 0, "--data", data, "--device", "cpu",
             "--hellaswag_every", 0, "--sample_every", 0, "--log_dir", tmp_path, "--run_name", "a"]
    train_gpt2.main([str(word) for word in [*flags, "--max_steps", 2]])
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    shape = {name: config["model"][name] for name in ("n_layer", "n_head", "n_embd")}
    assert shape == dict(n_layer=2, n_head=1, n_embd=128)
    assert config["train"]["depth"] is None
    flags = ["--log_dir", tmp_path, "--run_name", "a", "--max_steps", 3]
    train_gpt2.main([str(word) for word in [*flags, "--depth", 2]])
    with pytest.raises(BadInput, match="--n_layer"):
        train_gpt2.main([str(word) for word in [*flags, "--depth", 3]])


def test_size_and_depth_exclude_each_other():
    with pytest.raises(BadInput, match="--size and --depth"):
        train_gpt2.settings(["--size", "gpt2", "--depth", "3"])
    with pytest.raises(BadInput, match="--depth must be above 0"):
        train_gpt2.settings(["--depth", "0"])


def test_settings_are_frozen():
    chosen = train_gpt2.settings([])
    with pytest.raises(FrozenInstanceError):
        chosen.train.max_lr = 1.0
    with pytest.raises(FrozenInstanceError):
        chosen.model.n_layer = 1


@pytest.mark.parametrize("flag, names", [
    ("mlp", train_gpt2.MLPS), ("optimizer", train_gpt2.OPTIMIZERS),
    ("schedule", train_gpt2.SCHEDULES), ("preset", PRESETS)])
def test_choices_are_the_names_of_their_dict(flag, names):
    with pytest.raises(BadInput, match=f"--{flag}: .*{'.*'.join(names)}"):
        train_gpt2.settings([f"--{flag}", "other"])


MUON = train_gpt2.RATES["muon"]


@pytest.mark.parametrize("argv, want", [
    ("--preset modern --optimizer muon", MUON),  # the preset's 1.8e-3 is AdamW's
    ("--preset modern --optimizer muon --max_lr 0.02 --head_lr 0.1",
     MUON | {"max_lr": 0.02, "head_lr": 0.1}),
    ("--preset modern --optimizer adamw", {"max_lr": 1.8e-3, "embedding_lr": None}),
    ("--preset speedrun --optimizer adamw", train_gpt2.RATES["adamw"]),
    ("--preset tiny --optimizer muon", {"max_lr": 0.025, "embedding_lr": 0.5, "head_lr": 0.004}),
])
def test_an_optimizer_brings_its_own_rates(argv, want):
    cfg, *_ = train_gpt2.settings(argv.split())
    assert {name: getattr(cfg, name) for name in want} == want


@pytest.mark.parametrize("argv, flag", [
    ("--preset gpt2 --optimizer muon --max_lr 1e-3", "--max_lr 0.001"),
    ("--preset speedrun --optimizer adamw --max_lr 0.03", "--max_lr 0.03"),
    ("--preset modern --momentum 0.9", "--momentum"),
    ("--preset gpt2 --cooldown 0.7", "--cooldown"),
    ("--preset speedrun --head_lr 0.01", "--head_lr"),
    ("--preset gpt2 --max_lr 1.8e-3", None),
    ("--preset speedrun", None),
    ("--preset tiny --head_lr 0.01 --cooldown 0.5 --momentum 0.95", None),
])
def test_flags_without_effect_and_unusual_rates_are_warned_about(argv, flag):
    cfg, model_cfg, explicit, *_ = train_gpt2.settings(argv.split())
    lines = train_gpt2.flag_warnings(cfg, model_cfg, explicit)
    if flag is None:
        assert lines == []
        return
    [line] = lines
    assert line.startswith(f"warning: {flag} ")


def test_a_run_keeps_the_rates_it_started_with(data, tmp_path, capsys):
    go(data, tmp_path / "a", "--optimizer", "muon", "--max_lr", "1e-3")
    assert capsys.readouterr().err.count("warning: --max_lr 0.001") == 1
    again = ["--preset", "gpt2", "--optimizer", "muon", "--log_dir", str(tmp_path)]
    cfg, *_ = train_gpt2.settings([*again, "--run_name", "a"])
    assert (cfg.max_lr, cfg.embedding_lr) == (1e-3, 0.01)  # the checkpoint's


def test_every_number_has_its_bounds():
    for cls in (TrainConfig, GPTConfig):
        for field in fields(cls):
            if not field.metadata.get("help") or not re.search("int|float", str(field.type)):
                continue
            for value in ("nan", "inf", "-1", "1e999", f"1{'0' * 400}"):
                with pytest.raises(BadInput, match=f"--{field.name}"):
                    parse((TrainConfig, GPTConfig), [f"--{field.name}={value}"], None, PRESETS)


# --------------------------------------------------------------------------------------------------
# Length of a run, and its batches


def test_length_of_a_run(data):
    tokens = Shards(data).tokens["train"]
    base = ["--block_size", "32", "--total_batch_size", "256"]
    tiny_steps = PRESETS["tiny"]["max_steps"]
    for argv, want in [("--epochs 2.5", int(2.5 * tokens / 256)),
                       ("--max_steps 7", 7),
                       ("--preset tiny", tiny_steps),
                       ("--preset tiny --epochs 1", tokens // 256),
                       ("--preset tiny --tokens_per_param 20", 20 * 1000 // 256)]:
        assert length(data, *base, *argv.split()) == want
    with pytest.raises(BadInput, match="--epochs .* --total_batch_size"):
        length(data, "--preset", "gpt2")  # less than one step of 524,288 tokens


def plan_of(text, ratio):
    """The row of --plan's table for gpt2 at `ratio` tokens per parameter."""
    rows = [line.split() for line in text.splitlines() if line.startswith("gpt2  ")]
    [row] = [row for row in rows if row[3] == ratio]
    return row


def test_a_plan_needs_no_data_and_trains_nothing(launch, tmp_path):
    flags = ["--preset", "gpt2", "--tok_per_sec", "1e6", "--price_per_hour", "16"]
    done = launch("train_gpt2.py", "--plan", *flags)
    assert done.returncode == 0
    assert not list(tmp_path.iterdir())
    assert plan_of(done.stdout, "20") == [
        "gpt2", "124,475,904", "85,056,000", "20", "2,489,518,080", "4,748", "2.13e+18", "0.7",
        "11.06"
    ]


def test_a_plan_counts_the_vocabulary_of_the_data(data, capsys):
    flags = ["--preset", "gpt2", "--data", str(data), "--tokens_per_param", "2.5"]
    train_gpt2.main(["--plan", *flags])
    parameters = 124_475_904 - (50_304 - 384) * 768
    row = plan_of(capsys.readouterr().out, "2.5")
    assert row[1] == f"{parameters:,}"
    assert row[4] == f"{2.5 * parameters:,.0f}"


def test_tokens_per_parameter_set_the_length_of_a_run_and_its_price_is_printed(
        data, tmp_path, capsys):
    flags = without(TINY_FLAGS, "--max_steps")
    flags += ["--data", str(data), "--log_dir", str(tmp_path), "--run_name", "a"]
    train_gpt2.main([*flags, "--tokens_per_param", "0.2", "--price_per_hour", "3.6"])
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    parameters = sum(p.numel() for p in GPT(GPTConfig(**config["model"])).parameters())
    steps = len(steps_trained(tmp_path / "a"))
    assert steps == int(0.2 * parameters) // 256
    out = capsys.readouterr().out
    assert re.search(r"predicted: [0-9.]+ minutes, \$[0-9.]+ at \$3.6 per hour", out)
    assert f"{steps * 256 / parameters:,.4g} tokens per parameter" in out


# --------------------------------------------------------------------------------------------------
# Parts of the model


def test_gpt2_has_124_475_904_parameters():
    with torch.device("meta"):
        counts = GPT(GPTConfig()).parameter_counts()
    assert counts["total"] == 124_475_904
    assert counts["embedding"] == 50_304 * 768 + 1024 * 768
    assert counts["layer"] == 12 * 768**2 + 13 * 768


def parameters_of_mlp(name, config):
    with torch.device("meta"):
        return sum(p.numel() for p in train_gpt2.MLPS[name](config).parameters())


@pytest.mark.parametrize("size", SIZES)
def test_mlps_have_similar_parameter_counts(size):
    config = GPTConfig(**SIZES[size], bias=False)
    gelu = parameters_of_mlp("gelu", config)
    assert parameters_of_mlp("relu2", config) == gelu
    assert parameters_of_mlp("swiglu", config) == pytest.approx(gelu, rel=0.02)


def test_swiglu_always_has_hidden_units():
    assert train_gpt2.SwiGLUMLP(GPTConfig(n_embd=2)).c_proj.weight.shape == (2, 16)


def test_rope_against_transformers_llama():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    q = torch.randn(2, 3, 40, 16)  # transformers: (B, H, T, D); here: (B, T, H, D)
    k = torch.randn(2, 3, 40, 16)
    config = LlamaConfig(hidden_size=48, num_attention_heads=3, max_position_embeddings=64)
    cos, sin = LlamaRotaryEmbedding(config)(q, torch.arange(40)[None])
    rotary = train_gpt2.Rotary(16, 64)
    for x, want in zip((q, k), apply_rotary_pos_emb(q, k, cos, sin)):
        x = x.transpose(1, 2)
        want = want.transpose(1, 2)
        torch.testing.assert_close(rotary(x, slice(40)), want, rtol=0, atol=1e-5)
        late = rotary(x[:, 7:], slice(7, 40))
        torch.testing.assert_close(late, want[:, 7:], rtol=0, atol=1e-5)
        assert rotary(x.bfloat16(), slice(40)).dtype == torch.bfloat16
    assert not rotary.state_dict()  # the tables follow from the config: not in checkpoints


def test_norms_against_torch():
    x = torch.randn(4, 5, 32) * 3 + 1
    weight = torch.randn(32)
    bias = torch.randn(32)
    rms = train_gpt2.RMSNorm(32, bias=True)
    layer = train_gpt2.LayerNorm(32, bias=True)
    assert [name for name, _ in rms.named_parameters()] == ["weight"]
    assert train_gpt2.LayerNorm(32, bias=False).bias is None
    rms.weight.data = layer.weight.data = weight
    layer.bias.data = bias
    root = (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(rms(x), x / root * weight)
    torch.testing.assert_close(layer(x), F.layer_norm(x, (32,), weight, bias))
    low = x.bfloat16()  # computed in fp32 for any input
    assert torch.equal(rms(low), F.rms_norm(low.float(), (32,), weight, eps=1e-5).bfloat16())


def swiglu(h):
    gate, value = h.chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * value


def relu2(h):
    return h.clamp(min=0)**2


def gelu(h):
    return 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name, act, width", [("swiglu", swiglu, 2 * 128),  # 8/3 x 48
                                              ("relu2", relu2, 4 * 48), ("gelu", gelu, 4 * 48)])
def test_mlps_by_hand(name, act, width, bias):
    mlp = train_gpt2.MLPS[name](GPTConfig(n_embd=48, bias=bias))
    x = torch.randn(7, 48)
    h = F.linear(x, mlp.c_fc.weight, mlp.c_fc.bias)
    assert h.size(1) == width
    assert (mlp.c_fc.bias is not None) == (mlp.c_proj.bias is not None) == bias
    want = F.linear(act(h), mlp.c_proj.weight, mlp.c_proj.bias)
    torch.testing.assert_close(mlp(x), want, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# The model, for combinations of its flags

TOGGLES = {
    "mlp": tuple(train_gpt2.MLPS),
    "norm": tuple(train_gpt2.NORMS),
    "pos": ("learned", "rope"),
    "emb_norm": (False, True),
    "qk_norm": (False, True),
    "bias": (True, False),
    "tie_embeddings": (True, False),
    "dropout": (0.0, 0.1),
}
RECIPE = {
    "value_residual": (False, True),
    "residual_scalars": (False, True),
    "softcap": (0.0, 15.0),
    "n_experts": (0, 4),
}


def combinations(*names):
    """Every combination of these toggles, as dicts."""
    values = (TOGGLES[name] for name in names)
    return [dict(zip(names, chosen)) for chosen in itertools.product(*values)]


def pairs(toggles):
    """The pairs of two toggles' values in one combination."""
    return set(itertools.combinations(toggles.items(), 2))


def all_pairs(toggles):
    """A few combinations in which every pair of values of two toggles occurs.

    Greedy: the next one is that of 200 random combinations with the most new pairs.
    """
    rng = random.Random(0)
    missing = set()
    for values in itertools.product(*toggles.values()):
        missing |= pairs(dict(zip(toggles, values)))
    chosen = []
    while missing:
        tries = [{name: rng.choice(toggles[name]) for name in toggles} for _ in range(200)]
        best = max(tries, key=lambda one: len(pairs(one) & missing))
        missing -= pairs(best)
        chosen.append(best)
    return chosen


def name_of(toggles):
    return "-".join(map(str, toggles.values()))


@pytest.mark.parametrize("mlp", TOGGLES["mlp"])
def test_every_combination_runs_and_trains_every_parameter(mlp):
    idx = torch.randint(61, (2, 9))
    others = combinations(*list(TOGGLES)[1:])
    inits = itertools.cycle(("gpt2", "xavier", "kaiming"))
    for toggles, init in zip(others, inits):
        model = GPT(tiny(n_layer=1, n_embd=16, mlp=mlp, init=init, **toggles))
        loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        assert loss.shape == ()
        assert 2 < loss / 16 < 8
        for name, p in model.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all(), (toggles, name)
            # a bias of the keys moves all scores of a query alike: softmax does not see it
            assert p.grad.any() or "k_norm.bias" in name, (toggles, name)


@pytest.mark.parametrize("toggles", all_pairs(TOGGLES | RECIPE), ids=name_of)
def test_no_graph_breaks(toggles):
    torch._dynamo.reset()
    model = GPT(tiny(**toggles))
    idx = torch.randint(61, (2, 9))
    torch.manual_seed(1)  # of dropout
    want = model(idx[:, :-1], idx[:, 1:])
    model.compile(backend="eager", fullgraph=True, dynamic=False)
    torch.manual_seed(1)
    have = model(idx[:, :-1], idx[:, 1:])
    have.backward()
    torch.testing.assert_close(have, want)


@pytest.mark.parametrize("mlp", TOGGLES["mlp"])
@torch.no_grad()
def test_causality(mlp):
    a = torch.randint(61, (1, 12))
    recipe = {name: on for name, (_, on) in RECIPE.items()}
    for toggles in (*combinations("norm", "pos", "emb_norm", "qk_norm"), recipe):
        model = GPT(tiny(mlp=mlp, init="xavier", **toggles)).eval()
        for t in (1, 6, 11):
            b = a.clone()
            b[0, t] = (b[0, t] + 1) % 61
            difference = (model(a) - model(b))[0].abs().amax(dim=-1)
            assert difference[:t].max() < 1e-6, (toggles, t)
            assert difference[t:].min() > 1e-5, (toggles, t)  # later tokens do look back


# --------------------------------------------------------------------------------------------------
# The whole model


def hidden(model, idx):
    """The residual stream before the last norm, by a plain loop."""
    positions = slice(idx.size(1))
    x = model.transformer.wpe(model.transformer.wte(idx), positions)
    x = x0 = model.transformer.emb_norm(x)
    v_first = None
    for block in model.transformer.h:
        x, v_first = block(x, x0, v_first, positions)
    return x


def plain_logits(model, idx):
    """The logits of the padded vocabulary, without a cap."""
    return model.lm_head(model.transformer.ln_f(hidden(model, idx)))


def test_logits_have_no_padding_and_targets_of_minus_one_are_ignored():
    model = GPT(tiny())
    idx = torch.randint(61, (2, 16))
    assert model(idx).shape == (2, 16, 61)
    at = torch.tensor([1, 0, 1]), torch.tensor([15, 3, 3])  # rows, columns
    torch.testing.assert_close(model(idx, logits_at=at), model(idx)[at])
    targets = idx.roll(-1, 1)
    targets[:, 10:] = -1
    logits = plain_logits(model, idx)[:, :10].flatten(0, 1)
    want = F.cross_entropy(logits, targets[:, :10].flatten(), reduction="sum")
    torch.testing.assert_close(model(idx, targets), want)


@torch.no_grad()
def test_logits_are_capped_in_fp32_as_the_loss_caps_them():
    """In bf16, capped logits near the cap are 1/16 apart: evaluation and generation would use
    another model than training."""
    torch.manual_seed(0)
    model = GPT(tiny(softcap=15.0, vocab_size=64, norm="rmsnorm", bias=False)).eval()
    model.lm_head.weight.normal_(std=4.0)  # logits far beyond the cap
    idx = torch.randint(64, (8, 16))
    targets = torch.randint(64, (8, 16))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(idx)
        loss = model(idx, targets)
    assert logits.dtype == torch.float32
    assert logits.abs().amax(dim=-1).median() > 14
    nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(nats, loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bigram, width", [(0, 0), (37, 32), (37, 12)])
@torch.no_grad()
def test_the_speedrun_model_against_a_plain_one(bigram, width):
    """Written out once more. Shares only the weights, drawn at random so that every gain and
    scalar counts."""
    config = tiny(n_layer=3, mlp="relu2", norm="rmsnorm", pos="rope", emb_norm=True, qk_norm=True,
                  bias=False, token_shift=True, value_residual=True, residual_scalars=not bigram,
                  bigram=bigram, bigram_dim=width, softcap=3.0, init="zero_proj")
    model = GPT(config).eval()
    idx = torch.randint(61, (2, 16))
    for p in model.parameters():
        p.normal_(std=0.3)
    w = dict(model.named_parameters())

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[name]

    def rope(x):  # (B, T, H, D): complex numbers of dimension i and i + D/2
        turn = torch.outer(torch.arange(16.0), 10_000**(-torch.arange(0, 16, 2) / 16))[:, None]
        z = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(turn), turn)
        return torch.cat((z.real, z.imag), -1)

    future = torch.ones(16, 16).triu(1).bool()
    x = x0 = norm(w["transformer.wte.weight"][idx], "transformer.emb_norm.weight")
    if bigram:
        before = F.pad(idx + 1, (1, 0))[:, :-1]
        x0 = torch.zeros(2, 16, 32)
        rows = (before * 2_654_435_761 + idx) % 37
        x0[..., :width] = w["transformer.bigram.weight"][rows]
    for i in range(3):
        b = f"transformer.h.{i}"
        r = w[f"{b}.mix_residual.mix"]
        x = x + r * x0 if bigram else r[0] * x + r[1] * x0
        y = norm(x, f"{b}.ln_1.weight")
        y[:, 1:] = y[:, 1:] + w[f"{b}.token_shift.weight"] * y[:, :-1]
        q, k, v = (y @ w[f"{b}.attn.c_attn.weight"].T).view(2, 16, 3, 2, 16).unbind(2)
        q = rope(norm(q, f"{b}.attn.q_norm.weight"))
        k = rope(norm(k, f"{b}.attn.k_norm.weight"))
        if i == 0:
            v_first = v
        else:
            m = w[f"{b}.attn.mix_values.mix"]
            v = m[0] * v + m[1] * v_first
        scores = torch.einsum("bthd,bshd->bhts", q, k) / 4
        scores = scores.masked_fill(future, -math.inf).softmax(-1)
        y = torch.einsum("bhts,bshd->bthd", scores, v).reshape(2, 16, 32)
        x = x + y @ w[f"{b}.attn.c_proj.weight"].T
        h = norm(x, f"{b}.ln_2.weight") @ w[f"{b}.mlp.c_fc.weight"].T
        x = x + h.clamp(min=0)**2 @ w[f"{b}.mlp.c_proj.weight"].T
    z = norm(x, "transformer.ln_f.weight") @ w["transformer.wte.weight"].T
    z = 3 * z / (z.square() + 9).sqrt()
    torch.testing.assert_close(model(idx), z[..., :61], rtol=1e-4, atol=1e-5)
    targets = idx[:, 1:].flatten()
    loss = F.cross_entropy(z[:, :-1].flatten(0, 1), targets, reduction="sum")
    torch.testing.assert_close(model(idx[:, :-1], idx[:, 1:]), loss)


@pytest.mark.parametrize("settings, says", [
    (dict(n_head=5), "--n_embd 32 must be a multiple of --n_head 5"),
    (dict(n_embd=6, pos="rope"), "--pos rope needs an even head size"),
    (dict(bigram=50, residual_scalars=True), "--bigram and --residual_scalars"),
    (dict(bigram=50, bigram_dim=33), "--bigram_dim 33")])
def test_settings_of_the_model_that_contradict_are_refused(settings, says):
    with pytest.raises(BadInput, match=says):
        train_gpt2.check_model(tiny(**settings))


def test_a_short_context_is_as_if_rows_were_cut():
    """Rotary positions are relative, so attention does not see where a span begins."""
    model = GPT(tiny(pos="rope", qk_norm=True, init="xavier"))
    model.vary_context()
    idx, targets = torch.randint(61, (2, 4, 16))
    whole = model(idx, targets)
    cut = model(idx.view(16, 4), targets.view(16, 4))
    assert abs(whole - cut) > 0.01
    model.set_context(4)
    torch.testing.assert_close(model(idx, targets), cut)
    model.eval()
    torch.testing.assert_close(model(idx, targets), whole)


def test_dropout_is_on_in_training_and_off_in_evaluation():
    model = GPT(tiny(dropout=0.3))
    idx = torch.randint(61, (2, 16))
    assert not torch.equal(model(idx), model(idx))
    model.eval()
    assert torch.equal(model(idx), model(idx))
    plain = GPT(tiny(dropout=0.0))
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(idx), plain(idx))
    attention = model.transformer.h[0].attn.train()  # the scores are dropped out as well
    x = torch.randn(2, 16, 32)
    assert not torch.equal(attention(x, None, 0)[0], attention(x, None, 0)[0])


def test_flops_per_token_by_hand():
    with torch.device("meta"):
        gpt2 = GPT(GPTConfig())
        untied = GPT(GPTConfig(tie_embeddings=False))
        small = GPT(tiny(pos="rope", bias=False))
        bigrams = GPT(tiny(pos="rope", bias=False, bigram=500))
    # PaLM, appendix B: 6N + 12 L H Q T
    want = 6 * (124_475_904 - 1024 * 768) + 12 * 12 * 12 * 64 * 1024
    assert gpt2.flops_per_token() == want == 855_383_040
    assert untied.flops_per_token() == want  # the second table is looked up, not multiplied
    matrices = 64 * 32 + 2 * (12 * 32**2 + 2 * 32) + 32
    assert small.flops_per_token() == 6 * matrices + 12 * 2 * 32 * 16
    assert small.flops_per_token(context=4) == 6 * matrices + 12 * 2 * 32 * 4
    assert bigrams.flops_per_token() == small.flops_per_token() + 6 * 2  # a scalar per layer


# --------------------------------------------------------------------------------------------------
# Initialization


def expected_std(init, name, mlp):
    """Standard deviation of a matrix in a block, 3 layers of width 192."""
    hidden = {"gelu": 768, "swiglu": 512}[mlp]
    fan_in, fan_out, gain = {  # of one matrix; gain of the non-linearity
        "attn.c_attn": (192, 192, 1), "attn.c_proj": (192, 192, 1),
        "mlp.c_fc": (192, hidden, 2), "mlp.c_proj": (hidden, 192, 1)}[name]
    std = {"gpt2": 0.02, "xavier": (2 / (fan_in + fan_out))**0.5, "kaiming": (gain / fan_in)**0.5}
    residual = 1 / math.sqrt(6) if "c_proj" in name else 1
    return std[init] * residual


@pytest.mark.parametrize("init", ["gpt2", "xavier", "kaiming"])
@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_init_stds(init, mlp):
    torch.manual_seed(0)
    config = tiny(n_embd=192, n_head=4, n_layer=3, block_size=256, vocab_size=1024, init=init,
                  mlp=mlp, emb_norm=True, qk_norm=True, tie_embeddings=False)
    matrices = 0
    for name, p in GPT(config).named_parameters():
        if name.endswith("bias"):
            assert not p.any()
            continue
        if p.dim() == 1:
            assert (p == 1).all()
            continue
        matrices += 1
        if name.startswith("transformer.h."):
            std = expected_std(init, name.removesuffix(".weight").split(".", 3)[3], mlp)
            assert abs(p.mean().item()) < 0.05 * std
        else:
            std = 0.01 if "wpe" in name else 0.02
        assert p.std().item() == pytest.approx(std, rel=0.02), name
    assert matrices == 3 * 4 + 3


def test_init_fails_on_a_parameter_it_does_not_know():
    model = GPT(tiny())
    model.transformer["gate"] = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="transformer.gate.weight"):
        train_gpt2.init_weights(model)


@pytest.mark.parametrize("preset", ["modern", "speedrun", "tiny"])
@torch.no_grad()
def test_a_preset_starts_at_the_loss_of_a_uniform_guess(preset):
    """Except gpt2, which keeps GPT-2's own initialization: its logits spread, and it begins 0.15
    above."""
    argv = ["--preset", preset]
    (_, config), _ = parse((TrainConfig, GPTConfig), argv, None, PRESETS)
    config = replace(config, n_layer=2)
    torch.manual_seed(0)
    idx = torch.randint(config.vocab_size, (4, 65))
    loss = GPT(config)(idx[:, :-1], idx[:, 1:]) / 256
    assert loss < math.log(config.vocab_size) + 0.1


def test_the_blocks_of_zero_proj_start_as_the_identity_and_learn():
    model = GPT(tiny(init="zero_proj", tie_embeddings=False, mlp="relu2", bias=False))
    idx = torch.randint(61, (2, 17))
    inputs = idx[:, :-1]
    x = model.transformer.wpe(model.transformer.wte(inputs), slice(16))
    assert torch.equal(hidden(model, inputs), x)
    assert model.transformer.wte.weight.std().item() == pytest.approx(1, rel=0.1)
    assert not model(inputs).any()  # the head is zero
    for name, p in model.named_parameters():
        if name.endswith("c_fc.weight"):
            assert p.std().item() == pytest.approx((1 / 3 / p.size(1))**0.5, rel=0.1)
    optimizer = train_gpt2.make_optimizer(model, TrainConfig(optimizer="muon"))
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        model(inputs, idx[:, 1:]).backward()
        optimizer.step()
    for p, old in zip(model.parameters(), before):
        assert not torch.equal(p, old)


# --------------------------------------------------------------------------------------------------
# Optimizer and schedule


@pytest.mark.parametrize("toggles", [
    {}, dict(tie_embeddings=False, qk_norm=True, emb_norm=True, norm="rmsnorm", bias=False,
             bigram=50)])
def test_optimizer_groups(toggles):
    model = GPT(tiny(**toggles))
    optimizer = train_gpt2.make_optimizer(model, TrainConfig(weight_decay=0.3))
    groups = {}
    for group in optimizer.param_groups:
        groups |= dict.fromkeys(group["params"], group)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(groups)
    assert groups.keys() == set(model.parameters())
    normed = toggles.get("emb_norm", False)
    for name, p in model.named_parameters():
        group = groups[p]
        assert group["weight_decay"] == (0.0 if p.dim() == 1 else 0.3), name
        # initial_lr is what the schedule multiplies; behind a norm, embeddings learn faster
        embedding = name.startswith(tuple(f"transformer.{x}" for x in ("wte", "wpe", "bigram")))
        rate = 5 * 6e-4 if normed and embedding else 6e-4
        assert group["initial_lr"] == group["lr"] == rate, name


@pytest.mark.parametrize("mlp, fc", [("relu2", 1), ("swiglu", 2)])
def test_muon_takes_the_matrices_in_blocks_and_each_kind_its_rate(mlp, fc):
    model = GPT(tiny(mlp=mlp, tie_embeddings=False, residual_scalars=True, pos="rope"))
    cfg = TrainConfig(optimizer="muon", max_lr=0.02, embedding_lr=0.3, head_lr=0.004,
                      vector_lr=0.015, momentum=0.9, weight_decay=0.1)
    groups = {}
    for group in train_gpt2.make_optimizer(model, cfg).param_groups:
        groups |= dict.fromkeys(group["params"], group)
    splits = {"c_attn": 3, "c_fc": fc, "c_proj": 1}
    rates = {"wte": 0.3, "lm_head": 0.004}
    for name, p in model.named_parameters():
        group = groups[p]
        layer = name.split(".")[-2]
        if p.dim() > 1 and ".h." in name:
            want = dict(kind="muon", lr=0.02, splits=splits[layer], momentum=0.9, weight_decay=0.1)
        else:
            want = dict(kind="adamw", lr=rates.get(layer, 0.015), weight_decay=0.0)
        assert {key: group[key] for key in want} == want, name


def test_one_step_of_adamw_by_hand():
    model = GPT(tiny())
    optimizer = train_gpt2.make_optimizer(model, TrainConfig(max_lr=1e-2, weight_decay=0.1))
    idx = torch.randint(61, (2, 17))
    model(idx[:, :-1], idx[:, 1:]).backward()
    # after one step, the bias-corrected moments are g and g^2 (Loshchilov & Hutter 2019, alg. 2)
    want = []
    for p in model.parameters():
        decay = 0.1 if p.dim() > 1 else 0
        want.append(p.detach() * (1 - 1e-2 * decay) - 1e-2 * p.grad / (p.grad.abs() + 1e-8))
    optimizer.step()
    for p, expected in zip(model.parameters(), want):
        torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-6)
    assert all(group["betas"] == (0.9, 0.95) for group in optimizer.param_groups)


COSINE = {35: 0.1 + 0.45 * (1 + math.sqrt(0.5)), 60: 0.55,
          109: 0.1 + 0.45 * (1 + math.cos(0.99 * math.pi))}
LINEAR = {35: 0.775, 60: 0.55, 85: 0.325, 109: 0.109}
WSD = {35: 1.0, 60: 1.0, 88: 1.0, 99: 0.55, 109: 0.1 + 0.9 / 22}  # decays over the last fifth


@pytest.mark.parametrize("schedule, points, steepest", [
    ("cosine", COSINE, 0.0142), ("linear", LINEAR, 0.00901), ("wsd", WSD, 0.041)])
def test_schedule_by_hand(schedule, points, steepest):
    """Warm-up over 10 of 110 steps to 1.0, then down to 0.1."""
    cfg = TrainConfig(schedule=schedule, min_lr_frac=0.1, warmup_steps=10)
    lr = [train_gpt2.lr_multiplier(step, cfg, 110) for step in range(110)]
    for step, want in ({0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0} | points).items():
        assert lr[step] == pytest.approx(want), step
    assert max(lr) == pytest.approx(1.0)
    assert min(lr) >= 0.1 - 1e-12
    falls = -np.diff(lr[9:])
    assert falls.min() >= -1e-12
    assert falls.max() < steepest  # no jumps


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("warmup, steps", [(0, 1), (0, 5), (4, 5), (9, 10), (None, 1), (None, 100)])
def test_no_step_of_a_short_run_has_a_rate_of_zero(schedule, warmup, steps):
    cfg = TrainConfig(schedule=schedule, min_lr_frac=0.0, warmup_steps=warmup)
    lr = [train_gpt2.lr_multiplier(step, cfg, steps) for step in range(steps)]
    assert max(lr) == pytest.approx(1.0)
    assert min(lr) > 0


@pytest.mark.parametrize("steps, warmup", [(19_073, 715), (1_067, 40), (300, 40), (100, 25),
                                           (7, 1)])
def test_warm_up_without_the_flag(steps, warmup):
    """3.75% of a long run, 40 steps (2 / (1 - beta2)) of a shorter one, a quarter of the shortest.
    """
    cfg = TrainConfig()
    assert cfg.warmup_steps is None
    *rise, top, after = (
        train_gpt2.lr_multiplier(step, cfg, steps) for step in range(warmup + 2))
    assert [*rise, top] == pytest.approx([*(np.arange(1, warmup + 1) / warmup), 1.0])
    assert after < 1


@pytest.mark.parametrize("steps", [UNMEASURED, 10**11])
def test_endless_minutes_have_the_shortest_warm_up(steps):
    """A share of --minutes 1e7 would be a warm-up of years."""
    assert train_gpt2.warmup_length(TrainConfig(minutes=1e7), steps) == train_gpt2.WARMUP_LEAST


@pytest.mark.parametrize("toggles", [
    {}, dict(tie_embeddings=False, emb_norm=True, qk_norm=True, pos="rope")])
def test_gradient_groups_cover_every_parameter_once(toggles):
    model = GPT(tiny(**toggles))
    groups = train_gpt2.gradient_groups(model)
    assert list(groups)[0] == "embedding"
    assert {"block_00", "block_01", "rest"} < groups.keys()
    counts = Counter(itertools.chain(*groups.values()))
    assert counts == Counter(model.parameters())
    assert any(p is model.transformer.wte.weight for p in groups["embedding"])


# --------------------------------------------------------------------------------------------------
# The loader

EOT = 0
FAKE = SimpleNamespace(vocab_size=100, eot=EOT)  # a tokenizer


def make_shards(folder, mid_document=False):
    """Shards of 5, 1, 7 and 3 short documents -> (files, list of documents per shard).

    mid_document: shards begin within a document, as those that were cut at a fixed length.
    """
    rng = np.random.default_rng(0)
    files = []
    shards = []
    for n_documents in (5, 1, 7, 3):
        documents = []
        for _ in range(n_documents):
            text = rng.integers(1, 100, rng.integers(0, 9))
            documents.append(np.array([EOT, *text], dtype=np.uint16))
        if mid_document and len(documents[0]) > 1:
            documents[0] = documents[0][1:]
        files.append(folder / f"toy_train_{len(files):06d}.npy")
        np.save(files[-1], np.concatenate(documents))
        shards.append(documents)
    return files, shards


def reference_epoch(shards, seed, epoch):
    """The documents of an epoch in the loader's order, written out plainly."""
    if seed is None:
        return list(itertools.chain(*shards))
    documents = []
    for shard in np.random.default_rng((seed, epoch)).permutation(len(shards)):
        order = np.random.default_rng((seed, epoch, int(shard))).permutation(len(shards[shard]))
        documents += [shards[shard][d] for d in order]
    return documents


def count_tokens(shards):
    return sum(map(len, itertools.chain(*shards)))


@pytest.mark.parametrize("mid_document", [False, True])
@pytest.mark.parametrize("seed", [None, 0, 1337])
@pytest.mark.parametrize("n", [1, 7, 16, 1000])  # 1000 tokens: more than the whole data
def test_stream_against_reference(n, seed, mid_document, tmp_path):
    files, shards = make_shards(tmp_path, mid_document)
    size = count_tokens(shards)
    documents = []
    for epoch in range(3 + 4 * n // size):
        documents += reference_epoch(shards, seed, epoch)
    stream = np.concatenate(documents)
    loader = ShardLoader(files, FAKE, seed)
    for start in range(0, min(len(stream) - n - 1, 3 * size + 3 * n), n):
        assert np.array_equal(loader.next(n), stream[start:start + n + 1]), start


@pytest.mark.parametrize("seed", [None, 5])
def test_loader_continues_exactly_from_any_point(seed, tmp_path):
    files, shards = make_shards(tmp_path)
    size = count_tokens(shards)
    loader = ShardLoader(files, FAKE, seed)
    states = []
    batches = []
    for n in [1, 2, 3, 5, 8, 13, 21, size, 2 * size + 1, 4, 4]:
        states.append(json.loads(json.dumps(loader.state_dict())))
        batches.append(loader.next(n))
    jumping = ShardLoader(files, FAKE, seed)  # has other batches prefetched when it is moved
    for i in [3, 0, 8, 7, 1, 9, 2, 10, 4, 6, 5]:
        for resumed in (ShardLoader(files, FAKE, seed), jumping):
            resumed.load_state_dict(states[i])
            for state, batch in zip(states[i:], batches[i:]):
                assert resumed.state_dict() == state
                assert np.array_equal(resumed.next(len(batch) - 1), batch)
                resumed.prefetch(i + 1)
    assert [type(value) for value in states[-1].values()] == [int, int, int]


def test_the_next_batch_is_transformed_in_the_background(tmp_path):
    files, _ = make_shards(tmp_path)
    threads = []

    def negate(tokens):
        threads.append(threading.current_thread())
        return -tokens

    loader = ShardLoader(files, FAKE, 1, negate)
    plain = ShardLoader(files, FAKE, 1)
    for _ in range(10):
        assert np.array_equal(loader.next(4), -plain.next(4))
    loader.next(4)
    assert len(threads) >= 11  # one batch each, and one ahead
    assert threading.main_thread() not in threads


def test_a_bad_id_fails_the_call_that_reaches_it_and_none_before(tmp_path):
    for name, ids in (("a", [1, 99, 3, 4]), ("b", [5, 100, 3])):
        np.save(tmp_path / f"{name}.npy", np.array(ids, dtype=np.uint16))
    loader = ShardLoader([tmp_path / "a.npy", tmp_path / "b.npy"], FAKE, None)
    assert loader.next(2).tolist() == [1, 99, 3]
    loader.prefetch(2)  # its last target is in the bad shard
    assert loader.next(1).tolist() == [3, 4]
    before = loader.state_dict()
    for _ in range(2):
        with pytest.raises(BadInput, match=r"b\.npy .*100"):
            loader.next(1)
    assert loader.state_dict() == before == {"epoch": 0, "shard": 0, "offset": 3}
    loader.load_state_dict({"epoch": 0, "shard": 0, "offset": 0})
    assert loader.next(3).tolist() == [1, 99, 3, 4]


def test_shards_of_other_projects(tmp_path):
    ids = np.arange(500) * 100
    last = ids[:-101:-1]
    for name in ("build-nanogpt", "llm.c", "llama"):
        (tmp_path / name).mkdir()
    for split, part in (("val", last), ("train", ids)):
        name = f"{split}_000001"
        gpt2_ids = part.astype(np.uint16)
        llama_ids = (part + 70_000).astype(np.uint32)
        np.save(tmp_path / "build-nanogpt" / f"edufineweb_{name}.npy", gpt2_ids)
        write_bin(tmp_path / "llm.c" / f"fineweb_{name}.bin", gpt2_ids, 20240520, 1)
        write_bin(tmp_path / "llama" / f"fineweb_{name}.bin", llama_ids, 20240801, 7)
    for name, first in (("build-nanogpt", 0), ("llm.c", 0), ("llama", 70_000)):
        shards = Shards(tmp_path / name)
        assert shards.tokenizer == "gpt2"
        assert shards.tokens == {"train": 500, "val": 100}
        loader = ShardLoader(shards.train, SimpleNamespace(vocab_size=200_000, eot=50256), None)
        assert np.array_equal(loader.next(400), ids[:401] + first)


def test_read_validation(tmp_path):
    files, documents = make_shards(tmp_path)
    stream = np.concatenate(list(itertools.chain(*documents)))
    shards = SimpleNamespace(folder="toy", val=files, tokens={"val": len(stream)})
    for limit, rows in ((10**9, (len(stream) - 1) // 8), (24, 3), (31, 3)):
        x, y = read_validation(shards, limit, 8, FAKE)
        assert x.shape == y.shape == (rows, 8)
        assert np.array_equal(x.ravel(), stream[:8 * rows])
        assert np.array_equal(y.ravel(), stream[1:8 * rows + 1])
    with pytest.raises(BadInput, match="--val_tokens"):
        read_validation(shards, 7, 8, FAKE)


# --------------------------------------------------------------------------------------------------
# Evaluation


class HalfAndThird(nn.Module):
    """The loss of a token is half of its id and a third of its target's. Records its calls."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, idx, targets):
        shapes = tuple(idx.shape), tuple(targets.shape)
        self.seen.append((*shapes, idx.dtype, torch.is_grad_enabled()))
        return (idx / 2 + targets / 3)[targets >= 0].sum()


VAL = np.random.default_rng(0).integers(61, size=(7, 17))
ROWS = VAL[:, :-1], VAL[:, 1:]


class Share(SimpleNamespace):
    """One of `world_size` processes; `parts` collects what they would sum."""

    def __init__(self, rank, world_size, parts):
        super().__init__(rank=rank, world_size=world_size, main=rank == 0, parts=parts,
                         device=torch.device("cpu"))

    def sum(self, values):
        self.parts.append(values)
        return 0.0, 1.0


@pytest.mark.parametrize("world_size", [1, 2, 3, 9])  # of 9, two have no rows
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 7, 8, 50])
def test_evaluate_is_the_mean_in_equally_many_passes_of_one_shape(micro_batch, world_size):
    x, y = ROWS
    parts = []
    passes = set()
    for rank in range(world_size):
        model = HalfAndThird()
        train_gpt2.mean_loss(model, ROWS, micro_batch, Share(rank, world_size, parts))
        assert set(model.seen) == {((micro_batch, 16), (micro_batch, 16), torch.int64, True)}
        passes.add(len(model.seen))
    nats, count = np.sum(parts, axis=0)
    assert count == y.size
    assert nats / count == pytest.approx((x / 2 + y / 3).mean(), rel=1e-6)
    assert len(passes) == 1  # a sharded model needs every process in every forward pass


@pytest.mark.parametrize("micro_batch, passes", [(2, 4), (4, 2), (7, 1)])
def test_evaluate_may_be_stopped_after_each_pass(micro_batch, passes):
    model = HalfAndThird()
    answers = iter([False, True, True, True])
    loss = train_gpt2.mean_loss(model, ROWS, micro_batch, Share(0, 1, []), lambda: next(answers))
    assert len(model.seen) == min(passes, 2)
    assert math.isnan(loss) == (passes > 1)


# --------------------------------------------------------------------------------------------------
# Checkpoints


@pytest.mark.parametrize("toggles", [
    {}, dict(mlp="swiglu", pos="rope", norm="rmsnorm", bias=False, tie_embeddings=False)])
def test_checkpoint_round_trip(toggles, tokenizer, tmp_path):
    model = tiny_checkpoint(tmp_path / "a.pt", tokenizer, **toggles)
    loaded, same_tokenizer, state = train_gpt2.load_checkpoint(tmp_path / "a.pt")
    idx = torch.randint(280, (2, 20))
    assert torch.equal(loaded(idx), model(idx))
    assert not loaded.training
    assert state["step"] == 1
    assert same_tokenizer.encode("the cat").tolist() == tokenizer.encode("the cat").tolist()


CONFIG_CHANGES = [
    dict(n_head=3), dict(block_size=0), dict(n_layer=10**9), dict(n_layer=0),
    dict(n_layer=1000, n_embd=65_536), dict(n_layer=2.0), dict(n_embd="32"), dict(mlp="geglu"),
    dict(mlp="swiglu"), dict(dropout=math.nan), dict(bias=None), dict(block_size=64),
    dict(vocab_size=10**12), dict(vocab_size=512), dict(vocab_size=-1), dict(vocab_multiple=0),
    dict(unknown=1)]
CHANGES = [dict(tokenizer="gpt2"), dict(tokenizer=7), dict(tokenizer="{}"), dict(model={}),
           dict(model=None), dict(model_config=[])]


def assert_refused(state, path):
    torch.save(state, path)
    with pytest.raises(BadInput, match=path.name) as error:
        train_gpt2.load_checkpoint(path)
    assert "\n" not in str(error.value)


def test_a_checkpoint_whose_parts_do_not_fit_is_bad_input(tokenizer, tmp_path):
    path = tmp_path / "a.pt"
    tiny_checkpoint(path, tokenizer)  # of 280 ids: gpt2's tokenizer has 50,257
    state = torch.load(path, weights_only=True)
    for changes in CONFIG_CHANGES:
        assert_refused(state | {"model_config": state["model_config"] | changes}, path)
    for changes in CHANGES:
        assert_refused(state | changes, path)
    assert_refused({"model": {}}, path)
    assert_refused([1], path)


# --------------------------------------------------------------------------------------------------
# Real runs


@pytest.fixture(scope="module")
def real_run(data, tmp_path_factory):
    """A run of a process that Python starts, with every kind of evaluation -> (folder, output)."""
    place = tmp_path_factory.mktemp("real")
    questions = write_lines(place / "hella.jsonl", hellaswag_items(6))
    flags = [
        *TINY_FLAGS, "--data", data, "--shuffle", "--run_name", "real", "--max_steps", 42,
        "--hellaswag_every", 40, "--hellaswag_file", questions, "--eval_every", 20,
        "--sample_every", 40, "--save_every", 40, "--sample_prompt", "the dog",
        "--total_batch_size", 512
    ]
    result = run_script("train_gpt2.py", *flags, cwd=place, real=True)
    assert result.returncode == 0, result.stderr
    return place / "log" / "real", result.stdout


def test_a_run_writes_its_folder(real_run):
    folder, _ = real_run
    names = {path.name for path in folder.iterdir()}
    assert names > {"config.json", "log.txt", "ckpt_00040.pt", "ckpt_00042.pt", "train_gpt2.py"}
    assert not list(folder.glob("*.tmp"))
    config = json.loads((folder / "config.json").read_text())
    assert config["model"]["n_embd"] == 32
    assert config["model"]["vocab_size"] == 280
    assert config["train"]["shuffle"] is True
    assert config["max_steps"] == 42
    assert "--run_name real" in config["command"]


def test_a_run_learns_and_evaluates_at_the_set_intervals(real_run):
    folder, out = real_run
    log = read_log(folder)
    assert steps_trained(folder) == list(range(42))
    assert [step for step, kind in log if kind == "val"] == [20, 40, 42]  # the last step as well
    assert [step for step, kind in log if kind == "hella"] == [40, 42]
    assert log[0, "train"] == pytest.approx(math.log(384), abs=0.3)
    assert log[41, "train"] < 0.6 * log[0, "train"]
    assert log[42, "val"] < 0.6 * log[0, "train"]
    assert "ln 280 = 5.63\n" in out  # what a guess costs


def validation_rows(data):
    """The whole rows of 330 validation tokens, (10, 32) each."""
    val = np.load(data / "toy_val_000000.npy").astype(np.int64)
    return val[:320].reshape(10, 32), val[1:321].reshape(10, 32)


def test_a_checkpoint_has_the_logged_loss(real_run, data):
    folder, out = real_run
    torch.load(folder / "ckpt_00042.pt", weights_only=True)
    model, tokenizer, state = train_gpt2.load_checkpoint(folder / "ckpt_00042.pt")
    assert state["step"] == 42
    assert state.keys() >= {"optimizer", "loader", "skipped", "max_steps", "train_config"}
    assert not any(key.startswith(("_orig_mod", "module.")) for key in state["model"])
    x, y = validation_rows(data)
    with torch.no_grad():
        loss = model(torch.tensor(x), torch.tensor(y)).item() / 320
    assert loss == pytest.approx(read_log(folder)[42, "val"], rel=1e-5)
    assert f"\n{quoted(sample(model, tokenizer, ['the dog'], SHOWN))}\ndone: " in out


def test_tensorboard_has_what_the_log_has_and_more(real_run, data, tokenizer):
    folder, _ = real_run
    shown = events(folder)
    parts = [f"weights/grad_norm_{part}" for part in ("embedding", "block_00", "block_01", "rest")]
    assert shown.keys() >= {
        "Loss/train", "Loss/val", "Loss/val_bpb", "eval/hellaswag", "optim/lr", "optim/grad_norm",
        "optim/skipped_steps", "perf/tok_per_sec", "perf/step_ms", "perf/data_ms",
        "perf/recompilations", *parts
    }
    log = read_log(folder)
    for tag, kind in (("Loss/train", "train"), ("Loss/val", "val"), ("eval/hellaswag", "hella")):
        logged = {step: value for (step, k), value in log.items() if k == kind}
        assert dict(shown[tag]) == pytest.approx(logged, abs=1e-5)

    _, y = validation_rows(data)
    texts = y[y != tokenizer.eot].tolist()
    n_bytes = sum(len(tokenizer.encoding.decode_single_token_bytes(t)) for t in texts)
    for (_, nats), (_, bits) in zip(shown["Loss/val"], shown["Loss/val_bpb"], strict=True):
        assert bits == pytest.approx(nats * 320 / (math.log(2) * n_bytes), rel=1e-5)

    cfg = TrainConfig(warmup_steps=2)
    rates = [5e-3 * train_gpt2.lr_multiplier(step, cfg, 42) for step in range(42)]
    assert [rate for _, rate in shown["optim/lr"]] == pytest.approx(rates)
    norms = np.array([shown[part] for part in parts])[..., 1]
    whole = [norm for _, norm in shown["optim/grad_norm"]]
    assert whole == pytest.approx(np.linalg.norm(norms, axis=0).tolist(), rel=1e-4)


def test_tensorboard_has_texts_and_hyperparameters(real_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(real_run[0])).Reload()
    text = {}
    for tag in ("samples/text_summary", "hyperparameters/text_summary"):
        text[tag] = b"".join(found.Tensors(tag)[-1].tensor_proto.string_val).decode()
    assert "the dog" in text["samples/text_summary"]
    assert "|n_embd|32|" in text["hyperparameters/text_summary"]
    summary = found.SummaryMetadata("_hparams_/session_start_info")
    assert summary.plugin_data.plugin_name == "hparams"


def test_the_time_a_step_waits_for_its_data_is_logged(data, tmp_path, monkeypatch):
    read = ShardLoader.next
    clock = SimpleNamespace(now=0.0)

    def slow(self, n):
        clock.now += 0.25
        return read(self, n)

    monkeypatch.setattr(ShardLoader, "next", slow)
    monkeypatch.setattr(train_gpt2, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    shown = events(go(data, tmp_path / "a", "--max_steps", 3, "--eval_every", 0))
    for tag in ("perf/data_ms", "perf/step_ms"):
        assert shown[tag] == [(0, 250.0), (1, 250.0), (2, 250.0)]


def test_a_modern_run_with_dropout_and_accumulation_is_the_same_again(data, tmp_path, capsys):
    flags = [
        "--preset", "modern", "--max_steps", 5, "--qk_norm", "--dropout", 0.1,
        "--no-tie_embeddings", "--schedule", "wsd", "--grad_clip", 0, "--micro_batch", 2,
        "--eval_every", 0, "--save_every", 0
    ]
    before = set(threading.enumerate())
    log = read_log(go(data, tmp_path / "modern", *flags))
    started = set(threading.enumerate()) - before
    assert not any(thread.daemon for thread in started)  # with tensors, one may abort Python's exit
    assert [kind for _, kind in log] == ["train"] * 5
    assert steps_saved(tmp_path / "modern") == [5]  # the last step, always
    out = capsys.readouterr().out
    assert "2 sequences x 32 tokens x 4 accumulation steps x 1 processes" in out
    assert read_log(go(data, tmp_path / "again", *flags)) == log


def test_deterministic_runs_on_a_cpu_and_changes_nothing_there(launch, data, tmp_path):
    flags = ["--max_steps", 3, "--dropout", 0.1]
    # in a process of its own: it is a global switch
    result = launch("train_gpt2.py", *TINY_FLAGS, "--data", data, *flags, "--run_name", "a",
                    "--deterministic")
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "log" / "a"
    assert read_log(folder) == read_log(go(data, tmp_path / "log" / "plain", *flags))
    assert json.loads((folder / "config.json").read_text())["train"]["deterministic"] is True
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("flags", [
    ["--n_embd", "2", "--preset", "modern", "--pos", "learned"],
    ["--block_size", "2", "--val_tokens", "6"],
    ["--max_lr", "1e6", "--max_skipped", "99"],
    ["--val_tokens", "1e18"],
    ["--min_lr_frac", "0", "--weight_decay", "1e6"],
], ids=" ".join)
def test_extreme_values_within_the_bounds_train(flags, data, tmp_path):
    go(data, tmp_path / "a", "--sample_every", 2, *flags)
    assert len(steps_trained(tmp_path / "a")) == 6
    assert (tmp_path / "a" / "ckpt_00006.pt").exists()


def test_printed_commands_work_with_spaces_and_a_tilde_is_the_home_folder(launch, data, tmp_path):
    (tmp_path / "home").mkdir()
    flags = ["--max_steps", 3, "--data", data, "--log_dir=~/my log", "--run_name", "a run"]
    env = {"HOME": str(tmp_path / "home")}
    result = launch("train_gpt2.py", *TINY_FLAGS, *flags, env=env)
    assert result.returncode == 0, result.stderr
    last = result.stdout.splitlines()[-2]
    tensorboard, generate = map(shlex.split, re.findall("`(.*?)`", last))
    assert tensorboard[-1] == str(tmp_path / "home" / "my log")
    assert not (tmp_path / "~").exists()
    result = launch(*generate[1:], "--max_new_tokens", 1, "--samples", 1)
    assert result.returncode == 0, result.stderr


# --------------------------------------------------------------------------------------------------
# Several processes

MASKED = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import train_gpt2
from lib.cli import run
real = train_gpt2.micro_batches
def masked(*args, **settings):
    batches = real(*args, **settings)
    return [(idx, targets.masked_fill(targets % 7 == 3, -1)) for idx, targets in batches]
train_gpt2.micro_batches = masked
run(train_gpt2.main)
"""


def plain_loop(data, argv, masked):
    """Train with the flags `argv` in a plain loop -> (the losses of 6 steps, gradient norms)."""
    (cfg, model_cfg), _ = parse((TrainConfig, GPTConfig), argv, None, PRESETS)
    model_cfg = replace(model_cfg, vocab_size=280)
    torch.manual_seed(cfg.seed)
    model = GPT(model_cfg)
    tokenizer = SimpleNamespace(vocab_size=280, eot=279)
    loader = ShardLoader(Shards(data).train, tokenizer, cfg.seed)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.5}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    losses = {}
    norms = []
    for step in range(6):
        tokens = torch.from_numpy(loader.next(256))
        idx = tokens[:-1].view(8, 32)
        targets = tokens[1:].clone().view(8, 32)
        if masked:
            targets[targets % 7 == 3] = -1
        logits = plain_logits(model, idx)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.7).item())
        for group in optimizer.param_groups:
            group["lr"] = cfg.max_lr * train_gpt2.lr_multiplier(step, cfg, cfg.max_steps)
        optimizer.step()
        losses[step, "train"] = loss.item()
    return losses, norms


@pytest.mark.parametrize("masked", [False, True])
def test_the_losses_of_a_plain_loop_for_any_number_of_processes_and_micro_batch(
        masked, launch, data, tmp_path):
    """Masked targets are left out of the mean over all; each process and micro-batch has another
    number of them."""
    flags = [*TINY_FLAGS, "--grad_clip", "1.7", "--weight_decay", "0.5", "--val_tokens", "300",
             "--shuffle"]
    losses, norms = plain_loop(data, flags, masked)
    assert min(norms) < 1.7 < max(norms)  # Adam would not notice if all steps were scaled alike

    (tmp_path / "masked.py").write_text(MASKED)
    script = tmp_path / "masked.py" if masked else "train_gpt2.py"
    logs = {}
    states = {}
    for run, processes, micro_batch in (("one", 1, 8), ("small", 1, 1), ("two", 2, 2)):
        result = launch(script, *flags, "--data", data, "--run_name", run, "--micro_batch",
                        micro_batch, processes=processes)
        assert result.returncode == 0, result.stderr
        folder = tmp_path / "log" / run
        logs[run] = read_log(folder)
        states[run] = torch.load(folder / "ckpt_00006.pt", weights_only=True)
        trained = {key: loss for key, loss in logs[run].items() if key[1] == "train"}
        assert trained == pytest.approx(losses, rel=1e-5), run
        assert logs[run] == pytest.approx(logs["one"], rel=1e-5)
    assert logs["one"].keys() > {(4, "val"), (6, "val")}
    assert states["one"]["loader"] == states["two"]["loader"]
    assert states["one"]["model"].keys() == states["two"]["model"].keys()


def test_a_speedrun_is_the_same_for_two_processes_and_after_a_stop(launch, data, tmp_path):
    flags = [*TINY_FLAGS[2:], "--preset", "speedrun", "--data", data, "--total_batch_size", 512,
             "--batch_warmup", 1100, "--save_every", 3]
    passes = {1: "8 sequences x 32 tokens x 1 accumulation steps x 1 processes; twice the",
              2: "4 sequences x 32 tokens x 1 accumulation steps x 2 processes; 8 sequences x 1"}
    for run, processes in (("one", 1), ("two", 2), ("resumed", 1), ("resumed", 2)):
        result = launch("train_gpt2.py", *flags, "--run_name", run, processes=processes)
        assert result.returncode == 0, result.stderr
        assert passes[processes] in result.stdout
        if run == "resumed" and processes == 1:  # as if it had ended after step 3
            (tmp_path / "log" / run / "ckpt_00006.pt").unlink()
    logs = {run: read_log(tmp_path / "log" / run) for run in ("one", "two", "resumed")}
    assert logs["two"] == pytest.approx(logs["one"], rel=1e-4)
    assert logs["resumed"] == pytest.approx(logs["one"], rel=1e-4)
    assert logs["one"][5, "train"] < logs["one"][0, "train"] - 0.5
    # speed, and with it MFU, counts the half batches of steps 0 to 3
    shown = events(tmp_path / "log" / "one")
    tokens = []
    for (_, rate), (_, ms) in zip(shown["perf/tok_per_sec"], shown["perf/step_ms"], strict=True):
        tokens.append(rate * ms / 1e3)
    assert tokens == pytest.approx([256, 256, 256, 256, 512, 512], rel=1e-5)


# --------------------------------------------------------------------------------------------------
# Runs that a time limit ends, and curricula


@pytest.fixture
def clock(monkeypatch):
    """Every training step takes 1/128 s: the clock is read when it starts, has its data and ends.
    """
    ticks = itertools.count(step=1 / 256)
    fake = SimpleNamespace(perf_counter=lambda: next(ticks))
    monkeypatch.setattr(train_gpt2, "time", fake)


def open_end(data, folder, *flags):
    """Flags of a run without a number of steps."""
    words = [*without(TINY_FLAGS, "--max_steps"), "--data", data, "--log_dir", folder.parent,
             "--run_name", folder.name, "--eval_every", 0, *flags]
    return [str(word) for word in words]


def test_a_run_resumed_beyond_its_length_ends(data, tmp_path):
    go(data, tmp_path / "long", "--save_every", "4")
    start = tmp_path / "long" / "ckpt_00004.pt"
    go(data, tmp_path / "short", "--resume", start, "--max_steps", "3")
    state = torch.load(tmp_path / "short" / "ckpt_00004.pt", weights_only=True)
    assert state["finished"]
    assert state["step"] == 4


@pytest.mark.usefixtures("clock")
def test_minutes_set_the_length(data, tmp_path):
    folder = tmp_path / "short"
    train_gpt2.main(open_end(data, folder, "--minutes", 0.02))
    [step] = steps_saved(folder)
    assert step == math.ceil(0.02 * 60 * 128)
    state = torch.load(folder / f"ckpt_{step:05d}.pt", weights_only=True)
    assert state["finished"]
    assert state["max_steps"] == state["step"] == step
    assert steps_trained(folder) == list(range(step))


@pytest.mark.usefixtures("clock")
def test_minutes_have_a_rate_and_no_eta_before_they_are_measured(data, tmp_path, capsys):
    """A warm-up that is a share of the run needs a length, which is not known yet. A run extended
    by minutes knows its speed."""
    flags = without(open_end(data, tmp_path / "a"), "--warmup_steps")
    train_gpt2.main([*flags, "--minutes", "0.02"])
    out = capsys.readouterr().out
    assert out.count("ETA unknown") == 2
    assert " days" not in out
    rates = dict(events(tmp_path / "a")["optim/lr"])
    assert [rates[0], rates[1]] == pytest.approx([5e-3 / 40, 5e-3 * 2 / 40])
    first = len(rates)
    train_gpt2.main([*flags, "--minutes", "0.04"])
    assert "ETA unknown" not in capsys.readouterr().out
    rates = dict(events(tmp_path / "a")["optim/lr"])
    steps = len(rates)  # half of the time is over: the length is set
    want = [5e-3 * train_gpt2.lr_multiplier(step, TrainConfig(), steps)
            for step in range(first, steps)]
    assert [rates[step] for step in range(first, len(rates))] == pytest.approx(want)


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("steps, warned", [("900000", True), ("1", False)])
def test_a_curriculum_longer_than_the_minutes_allow_is_warned_about_once(
        steps, warned, data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "simple")
    train_gpt2.main(open_end(data, tmp_path / "a", "--minutes", 0.02, "--curriculum",
                             tmp_path / "simple", "--curriculum_steps", steps))
    lengths = re.findall(r"is longer than the ([\d,]+) steps", capsys.readouterr().out)
    # the final length, not a first guess
    final = [f"{step:,}" for step in steps_saved(tmp_path / "a")[-1:]]
    assert lengths == (final if warned else [])


@pytest.mark.usefixtures("clock")
def test_a_run_that_ends_within_its_curriculum_continues_after_a_stop(data, tmp_path, capsys,
                                                                      monkeypatch):
    shutil.copytree(data, tmp_path / "simple")
    flags = open_end(data, tmp_path / "a", "--minutes", 0.05, "--curriculum", tmp_path / "simple",
                     "--curriculum_steps", 900_000)

    def stop_once_warned(*_):
        if "within the curriculum" in capsys.readouterr().out:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(SpikeDetector, "__call__", stop_once_warned)
        train_gpt2.main(flags)
    assert "\nstopped at step" in capsys.readouterr().out
    train_gpt2.main(flags)
    out = capsys.readouterr().out
    assert out.count("within the curriculum") == 1
    assert "\ndone: " in out


# --------------------------------------------------------------------------------------------------
# Runs that start from other weights

FROM = [
    "--total_batch_size", "256", "--max_steps", "2", "--warmup_steps", "1", "--val_tokens", "330",
    "--eval_every", "1", "--hellaswag_every", "0", "--sample_every", "0", "--device", "cpu"
]


def begin(name, data, folder, *flags):
    """Two steps of the default preset from the weights `name` -> the run's folder."""
    words = [*FROM, "--init_from", name, "--data", data, "--log_dir", folder.parent, "--run_name",
             folder.name, *flags]
    train_gpt2.main([str(word) for word in words])
    return folder


@pytest.fixture
def gpt2_folder(tokenizer, tmp_path, monkeypatch):
    """A random GPT2LMHeadModel and its tokenizer, where transformers finds it as "gpt2": in the
    current folder."""
    from transformers import GPT2Config, GPT2LMHeadModel

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(5)
    ids = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eot)
    config = GPT2Config(vocab_size=tokenizer.vocab_size, n_positions=32, n_embd=32, n_layer=2,
                        n_head=2, **ids)
    model = GPT2LMHeadModel(config).eval()
    for p in model.parameters():  # biases begin at 0, as if there were none
        p.data += 0.1 * torch.randn_like(p)
    model.save_pretrained("gpt2")
    huggingface.write_tokenizer(tokenizer, "gpt2", 32)
    return model


@torch.no_grad()
def reference_loss(model, data, tokenizer, rows):
    """The validation loss by transformers, its vocabulary padded to `rows` ids with the mean logit.
    """
    x, y = read_validation(Shards(data), 330, 32, tokenizer)
    logits = model(torch.from_numpy(x).long()).logits
    missing = rows - logits.size(-1)
    padding = logits.mean(dim=-1, keepdim=True).expand(-1, -1, missing)
    padded = torch.cat([logits, padding], dim=-1)
    return F.cross_entropy(padded.flatten(0, 1), torch.from_numpy(y).long().flatten()).item()


def test_a_run_begins_with_the_weights_of_hugging_faces_gpt2_and_resumes_without_them(
        gpt2_folder, data, tokenizer, tmp_path, capsys):
    folder = begin("gpt2", data, tmp_path / "log" / "a", "--dropout", "0.1")
    before = reference_loss(gpt2_folder, data, tokenizer, 384)
    assert read_log(folder)[0, "val"] == pytest.approx(before, rel=1e-4)
    config = json.loads((folder / "config.json").read_text())
    want = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, pos="learned", mlp="gelu", bias=True,
                dropout=0.1, vocab_size=tokenizer.vocab_size, vocab_multiple=128)
    assert {name: config["model"][name] for name in want} == want
    assert config["train"]["init_from"] == "gpt2"
    shutil.rmtree("gpt2")  # resuming has to do without
    begin("gpt2", data, folder, "--max_steps", "4")
    assert "step 2; changed: --max_steps 2 -> 4\n" in capsys.readouterr().out
    assert (3, "train") in read_log(folder)
    with pytest.raises(BadInput, match="--init_from gpt2.* --init_from elsewhere"):
        begin("elsewhere", data, folder)


def test_a_run_does_not_begin_with_weights_that_are_not_finite(whole, data, tmp_path):
    state = checkpoint.read(whole("gpt2") / "ckpt_00060.pt")
    width = state["model_config"]["n_embd"]
    state["model"]["transformer.ln_f.weight"] = torch.full((width,), math.nan)
    checkpoint.write(tmp_path / "ckpt_00060.pt", state)
    with pytest.raises(BadInput, match="NaN or infinite"):
        begin(tmp_path / "ckpt_00060.pt", data, tmp_path / "log" / "a")
    assert not (tmp_path / "log").exists()


def test_a_run_begins_with_a_run_folder_or_a_checkpoint(whole, data, tmp_path):
    source = whole("gpt2")
    last = source / "ckpt_00060.pt"
    loss = read_log(source)[60, "val"]
    for name in (source, last):
        folder = begin(name, data, tmp_path / "log" / f"of_{name.name}")
        assert read_log(folder)[0, "val"] == pytest.approx(loss, abs=1e-4)
        state = checkpoint.read(folder / "ckpt_00002.pt")
        assert state["train_config"]["init_from"] == str(last)
        assert state["step"] == 2
        for moments in state["optimizer"]["state"].values():  # an optimizer of its own
            assert float(moments["step"]) == 2
    begin(source, data, folder, "--max_steps", "3")  # resumes: both names mean the same weights


def test_a_run_begins_with_an_export(whole, data, tokenizer, tmp_path):
    source = whole("gpt2")
    model, _, _ = train_gpt2.load_checkpoint(source)
    huggingface.write(model, tokenizer, tmp_path / "exported")
    folder = begin(tmp_path / "exported", data, tmp_path / "log" / "a")
    loss = read_log(source)[60, "val"]
    # the rows that pad the vocabulary are new
    assert read_log(folder)[0, "val"] == pytest.approx(loss, abs=0.3)


def test_a_run_may_begin_with_a_shorter_context(whole, data, tmp_path):
    short = begin(whole("gpt2"), data, tmp_path / "log" / "short", "--block_size", "16")
    weights = checkpoint.read(short / "ckpt_00002.pt")["model"]
    assert weights["transformer.wpe.weight"].shape == (16, 32)


def test_what_does_not_fit_the_weights_is_refused_before_anything_is_written(
        gpt2_folder, data, tmp_path):
    other = write_data(tmp_path / "other", train_bpe(sentences(300, 5), 290))
    (tmp_path / "empty").mkdir()
    for name, shards, flags, message in [
            ("gpt2", data, ["--n_layer", "3", "--mlp", "swiglu"], "--n_layer 2 -> 3, --mlp gelu"),
            ("gpt2", data, ["--block_size", "64"], "--block_size 32 -> 64"),
            ("gpt2", data, ["--init", "xavier"], "--init gpt2 -> xavier"),
            ("gpt2", other, [], "tokenizer"),
            ("nowhere", data, [], "nowhere"),
            ("empty", data, [], "empty")]:
        with pytest.raises(BadInput) as error:
            begin(name, shards, tmp_path / "log" / "x", *flags)
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "log").exists()


# --------------------------------------------------------------------------------------------------
# Bad input

TOO_LONG = "x" * 5000  # for a file name

# flags, and what the error must name
BAD_FLAGS = [
    ("--epoch 3", "--epochs"),
    ("--preset modem", "modern"),
    ("--vocab_size 3", "--vocab_size"),  # set by the data, not by a flag
    ("--data nowhere", "nowhere"),
    (f"--data {TOO_LONG}", ""),
    ("--data notes.txt", "--data notes.txt"),
    ("--data other/toy_val_000000.npy", "toy_val_000000.npy"),
    ("--data other", "other"),  # another tokenizer
    ("--total_batch_size 352 --batch_warmup 1000", "--batch_warmup"),
    ("--total_batch_size 250", "--total_batch_size 250"),
    ("--warmup_steps 6", "--warmup_steps 6"),
    ("--epochs 2", "--epochs"),
    ("--curriculum_mix linear", "--curriculum"),
    ("--tok_per_sec 1000", "--tok_per_sec"),
    ("--eval_tasks_limit 2", "--eval_tasks"),
    ("--tensorboard {port}", "{port}"),
    ("--val_tokens 20", "--val_tokens"),
    ("--device mps", "--device mps"),
    ("--minutes 1e308", "--minutes"),
    ("--keep_best --eval_every 0", "--keep_best"),
    ("--total_batch_size 384 --batch_warmup 1000 --micro_batch 5", "--micro_batch"),
    ("--hellaswag_every 2 --hellaswag_file nowhere.jsonl", "nowhere.jsonl"),
    # settings that determine the shapes of the resumed weights
    ("--n_embd 64 --n_head 4", "--n_head 2 -> 4, --n_embd 32 -> 64"),
    ("--n_layer 3", "--n_layer 2 -> 3"),
    ("--mlp swiglu", "--mlp gelu -> swiglu"),
    ("--norm rmsnorm", "--norm layernorm -> rmsnorm"),
    ("--pos rope", "--pos learned -> rope"),
    ("--no-bias", "--bias True -> False"),
    ("--qk_norm", "--qk_norm False -> True"),
    ("--emb_norm", "--emb_norm False -> True"),
    ("--no-tie_embeddings", "--tie_embeddings True -> False"),
    ("--block_size 16", "--block_size 32 -> 16"),
    ("--preset modern", "--mlp gelu -> swiglu"),
    # another run
    ("--run_name ..", "--run_name"),
    ("--run_name=", "--run_name"),
    ("--run_name taken", "taken"),
    ("--run_name new --n_embd 33", "--n_embd 33"),
    ("--run_name new --pos rope --n_embd 30", "15"),  # an odd head size
    ("--run_name new --n_layer 1000 --n_embd 65536", ""),  # more than the memory
    ("--run_name new --max_lr 1e300", "--max_lr"),
    ("--run_name new --n_layer 1e5", "--n_layer"),
    ("--run_name new --n_embd 1e308", "--n_embd"),
    ("--run_name new --max_steps 1e18", "--max_steps"),
    ("--run_name new --log_dir notes.txt", "notes.txt"),
    (f"--run_name new --log_dir {TOO_LONG}", ""),
    (f"--run_name new --resume {TOO_LONG}", ""),
    ("--run_name new --resume nowhere.pt", "nowhere.pt"),
    ("--run_name new --resume notes.txt", "notes.txt"),
    ("--run_name new --resume others.pt", "others.pt"),
    ("--run_name new --resume untrained.pt", "untrained.pt"),
]


@pytest.fixture(scope="session")
def half_a_run(data, tmp_path_factory):
    """A run folder with the checkpoint of step 4; the tests' flags continue to 6."""
    return go(data, tmp_path_factory.mktemp("half") / "half", "--max_steps", 4)


@pytest.fixture(scope="module")
def bad_files(tokenizer, half_a_run, tmp_path_factory):
    """A folder with all files that BAD_FLAGS name."""
    place = tmp_path_factory.mktemp("bad")
    (place / "notes.txt").write_text("nothing of use\n")
    torch.save(nn.Linear(2, 2).state_dict(), place / "others.pt")
    tiny_checkpoint(place / "untrained.pt", tokenizer)  # without an optimizer or data position
    write_data(place / "other", train_bpe(sentences(200), 270))
    taken = place / "log" / "taken"
    taken.mkdir(parents=True)
    (taken / "config.json").write_text('{"train": {}, "max_steps": 2}')
    (taken / "log.txt").write_text("0 train 5.0\n1 train 4.0\n")
    shutil.copytree(half_a_run, place / "log" / "half")
    return place


@pytest.fixture
def place(bad_files, tmp_path, monkeypatch):
    """A copy of bad_files, the current folder."""
    shutil.copytree(bad_files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files_in(folder):
    """{path: bytes} of a folder's files, in all its folders."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.mark.parametrize("flags, names", BAD_FLAGS, ids=lambda flags: flags[:40])
def test_a_bad_start_is_one_line_and_changes_nothing_that_was_there(flags, names, data, place):
    before = files_in(place)
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        port = listener.getsockname()[1]
        words = flags.format(port=port).split()
        with pytest.raises(BadInput) as error:
            train_gpt2.main([*TINY_FLAGS, "--data", str(data), "--run_name", "half", *words])
    assert names.format(port=port) in str(error.value)
    assert "\n" not in str(error.value)
    after = files_in(place)
    new = after.keys() - before.keys()
    assert {name: after.get(name) for name in before} == before
    assert not [name for name in new if "ckpt" in name or name.startswith("log/half/")]


@pytest.mark.parametrize("flags, message", [
    (["--max_step", 5], "unknown flag --max_step: did you mean --max_steps"),
    ([*TINY_FLAGS, "--data", "toy"], "toy_train_000002.npy"),
], ids=["flag", "shard"])
def test_bad_input_of_a_real_process_is_one_line(flags, message, launch, tokenizer, tmp_path):
    path = write_data(tmp_path / "toy", tokenizer) / "toy_train_000002.npy"
    path.write_bytes(path.read_bytes()[:-2])
    result = launch("train_gpt2.py", *flags, real=message.startswith("unknown"))
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("train_gpt2.py: error: ")
    assert message in result.stderr
    assert not list(tmp_path.glob("log/*/ckpt*"))


def test_debug_shows_where_bad_input_was_found(launch, data):
    result = launch("train_gpt2.py", *TINY_FLAGS, "--data", data, "--val_tokens", 20, "--debug")
    assert result.returncode == 2
    assert result.stdout == ""
    trace, line = result.stderr.strip().rsplit("\n", 1)
    assert trace.startswith("Traceback")
    assert "in read_validation" in trace
    assert f'File "{ROOT / "train_gpt2.py"}"' in trace
    assert line.startswith("train_gpt2.py: error: ")


def test_bad_input_on_all_processes_is_printed_once_and_in_torchruns_report(launch, data):
    flags = [*TINY_FLAGS, "--data", data, "--val_tokens", 20]
    result = launch("train_gpt2.py", *flags, processes=2, real=True)
    assert result.returncode != 0
    lines = result.stderr.splitlines()
    [error] = [line for line in lines if line.startswith("train_gpt2.py: error: ")]
    assert "--val_tokens" in error
    assert sum(error in line for line in lines) == 2  # that line, and once in torchrun's report
    assert any(line.strip(" :").startswith("traceback : " + error) for line in lines[-3:])
    frames = [line for line in lines if 'File "' in line]  # torchrun's own traceback is its affair
    assert all("site-packages" in line or "<frozen" in line for line in frames)


def test_bad_input_found_first_by_rank_0_is_printed_once(launch, data, tmp_path):
    (tmp_path / "h.jsonl").write_text("{")
    flags = [*TINY_FLAGS, "--data", data, "--hellaswag_every", 1, "--hellaswag_file", "h.jsonl"]
    result = launch("train_gpt2.py", *flags, processes=2)
    assert result.returncode == 2
    [error] = result.stderr.splitlines()
    assert error.startswith("train_gpt2.py: error: ")
    assert "h.jsonl" in error


def test_without_internet_hellaswag_is_left_out_unless_requested(
        launch, data, tmp_path, monkeypatch):
    nowhere = {"https_proxy": "http://127.0.0.1:9"}
    flags = [*without(TINY_FLAGS, "--hellaswag_every"), "--data", data, "--max_steps", 2,
             "--warmup_steps", 1]
    result = launch("train_gpt2.py", *flags, "--run_name", "a", processes=2, env=nowhere)
    assert result.returncode == 0, result.stderr
    [warning] = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert "HellaSwag" in warning
    assert steps_trained(tmp_path / "log" / "a") == [0, 1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("https_proxy", nowhere["https_proxy"])
    flags += ["--run_name", "b", "--hellaswag_every", 250]
    with pytest.raises(BadInput, match="HellaSwag"):
        train_gpt2.main([str(word) for word in flags])


# --------------------------------------------------------------------------------------------------
# Non-finite steps


def test_a_run_that_diverges_ends_in_one_line_with_a_checkpoint_from_before(data, tmp_path):
    flags = ["--max_steps", 90, "--warmup_steps", 0, "--max_lr", 1e6, "--grad_clip", 0]
    often = ["--eval_every", 1, "--sample_every", 1]  # neither ends the run before
    with pytest.raises(BadInput, match=r"3 steps .*ckpt_0000\d.pt"):
        go(data, tmp_path / "a", *flags, *often, "--max_skipped", 3)


def patch_training(monkeypatch, change):
    """Each training batch's mean loss becomes change(number of the batch, loss).

    Returns a list of (batch, weights before it), which grows with each batch.
    """
    calls = []
    real = GPT.forward

    def forward(self, idx, targets=None, **settings):
        out = real(self, idx, targets, **settings)
        if targets is None or not self.training:
            return out
        calls.append((idx.clone(), [p.detach().clone() for p in self.parameters()]))
        return change(len(calls) - 1, out / targets.numel()) * targets.numel()

    monkeypatch.setattr(GPT, "forward", forward)
    return calls


def nan_loss(loss):
    return loss * math.nan


def infinite_gradient(loss):
    loss.register_hook(lambda grad: grad * math.inf)
    return loss


def at(steps, how):
    """A change for patch_training: `how`, at these steps."""
    return lambda n, loss: how(loss) if n in steps else loss


@pytest.mark.parametrize("how", [nan_loss, infinite_gradient])
def test_a_step_without_a_finite_loss_or_gradient_is_skipped(how, data, tmp_path, monkeypatch):
    calls = patch_training(monkeypatch, at({3, 7}, how))
    folder = go(data, tmp_path / "a", "--max_steps", 8)
    weights = [before for _, before in calls]
    weights.append(weights_in(folder / "ckpt_00008.pt"))
    unchanged = [same(one, after) for one, after in itertools.pairwise(weights)]
    assert unchanged == [n in (3, 7) for n in range(8)]
    loader = ShardLoader(Shards(data).train, SimpleNamespace(vocab_size=280), None)
    for batch, _ in calls:  # each is read once, the skipped ones too
        assert np.array_equal(batch.ravel(), loader.next(256)[:-1])
    state = torch.load(folder / "ckpt_00008.pt", weights_only=True)
    assert (state["step"], state["skipped"]) == (8, 2)
    for moments in state["optimizer"]["state"].values():
        assert int(moments["step"]) == 6


@pytest.mark.parametrize("how", [nan_loss, infinite_gradient])
def test_a_skipped_step_is_logged_and_its_batch_named(how, data, tmp_path, monkeypatch, capsys):
    patch_training(monkeypatch, at({3, 7}, how))
    folder = go(data, tmp_path / "a", "--max_steps", 8)
    out = capsys.readouterr().out
    log = read_log(folder)
    for n in range(8):
        assert math.isfinite(log[n, "train"]) == (how is infinite_gradient or n not in (3, 7))
    assert ("3 train nan" in (folder / "log.txt").read_text()) == (how is nan_loss)
    skipped = [value for _, value in events(folder)["optim/skipped_steps"]]
    assert skipped == [0, 0, 0, 1, 1, 1, 1, 2]
    lines = [line for line in out.splitlines() if "skipped because non-finite" in line]
    assert [line.split()[:2] for line in lines] == [["step", "3"], ["step", "7"]]
    assert f"loss {log[3, 'train']:.3}" in lines[0]
    assert "epoch 0, from token 768 of toy_train_000001.npy" in lines[0]
    assert out.index(lines[0]) < out.index("step 4 |")


def test_a_checkpoint_due_after_a_skipped_step_comes_later(data, tmp_path, monkeypatch):
    patch_training(monkeypatch, at({3, 4}, nan_loss))
    folder = go(data, tmp_path / "a", "--max_steps", 9, "--save_every", 4, "--eval_every", 0)
    assert steps_saved(folder) == [6, 8, 9]


def test_skipped_steps_that_are_not_consecutive_do_not_end_a_run(data, tmp_path, monkeypatch):
    patch_training(monkeypatch, at({0, 1, 3, 4, 6, 7}, nan_loss))
    folder = go(data, tmp_path / "a", "--max_steps", 8, "--max_skipped", 3)
    assert torch.load(folder / "ckpt_00008.pt", weights_only=True)["skipped"] == 6


def test_an_aborted_run_leaves_the_checkpoint_from_before(data, half_a_run, tmp_path, monkeypatch):
    folder = shutil.copytree(half_a_run, tmp_path / "half")
    calls = patch_training(monkeypatch, at({1, 2, 3}, nan_loss))
    # --keep_best would save the weights of skipped steps
    flags = ["--max_steps", 20, "--save_every", 6, "--keep_best", "--eval_every", 7]
    with pytest.raises(BadInput, match=r"3 steps .*half/ckpt_00004.pt"):
        go(data, folder, *flags, "--max_skipped", 3)
    assert len(calls) == 4
    assert steps_saved(folder) == [4]
    before = (half_a_run / "ckpt_00004.pt").read_bytes()
    assert (folder / "ckpt_00004.pt").read_bytes() == before


def test_a_run_stopped_amid_skipped_steps_is_aborted_by_a_lower_bound(
        data, half_a_run, tmp_path, monkeypatch):
    folder = shutil.copytree(half_a_run, tmp_path / "half")
    state = checkpoint.read(half_a_run / "ckpt_00004.pt")
    checkpoint.write(folder / "ckpt_00004.pt", state | {"skipped": 3, "consecutive_skips": 3})
    calls = patch_training(monkeypatch, at({0}, nan_loss))
    with pytest.raises(BadInput, match="4 steps"):
        go(data, folder, "--max_steps", 20, "--max_skipped", 2)
    assert len(calls) == 1


@pytest.mark.parametrize("first", [0, 3])
def test_an_aborted_run_without_a_checkpoint_writes_one_from_before_the_first_skipped_step(
        first, data, tmp_path, monkeypatch):
    flags = ["--shuffle", "--dropout", 0.1, "--max_skipped", 3]
    whole = go(data, tmp_path / "whole", *flags)
    folder = tmp_path / "a"
    saved = folder / f"ckpt_{first:05d}.pt"
    with monkeypatch.context() as patch:
        calls = patch_training(patch, at(range(first, 99), nan_loss))
        with pytest.raises(BadInput, match=f"3 steps .*a/{saved.name} .*--max_lr"):
            go(data, folder, *flags)
    assert len(calls) == first + 3
    assert steps_saved(folder) == [first]
    assert same(calls[first][1], weights_in(saved))
    state = torch.load(saved, weights_only=True)
    assert (state["step"], state["skipped"]) == (first, 0)
    go(data, folder, *flags)  # the same command continues, as if nothing had happened
    assert read_log(folder) == read_log(whole)
    assert same(weights_in(folder / "ckpt_00006.pt"), weights_in(whole / "ckpt_00006.pt"))


ONE_RANK_FAILS = f"""
import math, os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, train_gpt2
from lib.cli import run
real, calls = train_gpt2.GPT.forward, []
def forward(self, idx, targets=None, **settings):
    out = real(self, idx, targets, **settings)
    if targets is None or not self.training:
        return out
    calls.append(self)
    if os.environ["RANK"] == "1" and len(calls) - 1 == 3:
        return out * math.nan
    if os.environ["RANK"] == "1" and len(calls) - 1 == 5:
        out.register_hook(lambda grad: grad * math.inf)
    return out
train_gpt2.GPT.forward = forward
run(train_gpt2.main)
torch.save([p.detach() for p in calls[0].parameters()], f"rank{{os.environ['RANK']}}.pt")
"""


def test_both_processes_skip_a_step_that_is_non_finite_on_one(launch, data, tmp_path):
    (tmp_path / "one_rank_fails.py").write_text(ONE_RANK_FAILS)
    flags = [*TINY_FLAGS, "--data", data, "--max_steps", 8, "--run_name", "a", "--micro_batch", 4]
    result = launch(tmp_path / "one_rank_fails.py", *flags, processes=2)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "log" / "a"
    log = read_log(folder)
    assert [step for step in range(8) if math.isnan(log[step, "train"])] == [3]
    assert torch.load(folder / "ckpt_00008.pt", weights_only=True)["skipped"] == 2
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert same(first, second)
    assert same(first, weights_in(folder / "ckpt_00008.pt"))
    assert all(p.isfinite().all() for p in first)


# --------------------------------------------------------------------------------------------------
# Spikes, and the best loss

SPIKE = re.compile(r"step (?P<step>\d+) .*spike: loss (?P<loss>[\d.]+), median before "
                   r"(?P<median>[\d.]+), .*: epoch (?P<epoch>\d+), from token (?P<token>[\d,]+) of "
                   r"(?P<file>\S+?)(?P<permuted>, permuted)?$")


def batch_named(found, data, seed):
    """The batch that a spike's line names."""
    files = Shards(data).train
    loader = ShardLoader(files, load_tokenizer(str(data / "tokenizer.json")), seed)
    epoch = int(found["epoch"])
    order = list(range(len(files)))
    if seed is not None:
        order = np.random.default_rng((seed, epoch)).permutation(len(files)).tolist()
    index = [file.name for file in files].index(found["file"])
    offset = int(found["token"].replace(",", ""))
    loader.load_state_dict({"epoch": epoch, "shard": order.index(index), "offset": offset})
    return loader.next(256)[:-1]


@pytest.mark.parametrize("seed", [None, 1337])
def test_a_spike_names_its_batch(seed, data, tmp_path, monkeypatch, capsys):
    # the first is too early to be detected, the last in another epoch
    calls = patch_training(monkeypatch, at({4, 15, 30}, lambda loss: loss + 5))
    shuffle = ["--shuffle"] if seed else []
    go(data, tmp_path / "a", "--max_steps", 36, "--eval_every", 0, *shuffle)
    spikes = list(filter(None, map(SPIKE.match, capsys.readouterr().out.splitlines())))
    assert [int(found["step"]) for found in spikes] == [15, 30]
    assert int(spikes[-1]["epoch"]) > 0
    log = read_log(tmp_path / "a")
    losses = [log[step, "train"] for step in range(36)]
    for found in spikes:
        step = int(found["step"])
        assert float(found["loss"]) == pytest.approx(losses[step], abs=1e-4)
        assert float(found["median"]) == pytest.approx(np.median(losses[:step]), abs=1e-4)
        assert (found["permuted"] is not None) == bool(shuffle)
        assert np.array_equal(batch_named(found, data, seed), calls[step][0].ravel())


@pytest.mark.parametrize("weights, kept", [((1, 9), True), ((9, 1), False)])
def test_the_best_loss_is_forgotten_when_the_weights_of_the_sources_change(
        weights, kept, data, tokenizer, tmp_path):
    other = write_data(tmp_path / "other", tokenizer, shards=1)
    folder = tmp_path / "a"
    flags = ["--keep_best", "--eval_every", 2]
    go(f"{data}:1", folder, "--data", f"{other}:9", "--max_steps", 4, *flags)
    state = checkpoint.read(folder / "ckpt_00004.pt")
    checkpoint.write(folder / "ckpt_00004.pt", state | {"best": [0.1, 4]})
    go(f"{data}:{weights[0]}", folder, "--data", f"{other}:{weights[1]}", "--max_steps", 6, *flags)
    loss, step = checkpoint.read(folder / "ckpt_00006.pt")["best"]
    if kept:
        assert (loss, step) == (0.1, 4)
    else:
        assert loss > 1
        assert step == 6


# --------------------------------------------------------------------------------------------------
# Compilation, GPUs


@pytest.mark.slow  # a C++ compiler builds 33 kernels
def test_a_compiled_run_compiles_each_part_once_and_has_the_losses_of_a_plain_one(
        launch, data, tmp_path):
    flags = [
        "--preset", "modern", "--n_experts", 4, "--n_shared", 1,  # the shared expert is a dense MLP
        "--bigram", 100, "--context_warmup", 0.7,  # three contexts in six steps
        "--micro_batch", 4, "--eval_every", 2, "--sample_every", 3, "--save_every", 2
    ]  # 10 rows of validation
    result = launch("train_gpt2.py", *TINY_FLAGS, "--data", data, *flags, "--run_name", "compiled",
                    "--compile")
    assert result.returncode == 0, result.stderr
    assert "was recompiled" not in result.stdout
    assert "recompil" not in result.stderr
    plain = read_log(go(data, tmp_path / "log" / "plain", *flags))
    assert len(plain) == 6 + 3
    assert read_log(tmp_path / "log" / "compiled") == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("compiler", ["/bin/false", "/nowhere"])
def test_compile_without_a_compiler_trains_on(compiler, launch, data, tmp_path):
    """The first is only found out by compiling."""
    env = {"CXX": compiler, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    flags = [*TINY_FLAGS, "--data", data, "--max_steps", 4, "--eval_every", 2]
    result = launch("train_gpt2.py", *flags, "--run_name", "compiled", "--compile", env=env,
                    real=True)
    assert result.returncode == 0
    assert result.stderr == ""
    [line] = [line for line in result.stdout.splitlines() if line.startswith("warning")]
    assert "without torch.compile, slower" in line
    plain = go(data, tmp_path / "log" / "plain", "--max_steps", 4, "--eval_every", 2)
    assert read_log(tmp_path / "log" / "compiled") == read_log(plain)


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_run_on_a_gpu_compiled_in_bf16_and_resumed(deterministic, launch, data, tmp_path):
    """A separate CUDA stream copies checkpoints to the host while training continues."""
    flags = [
        *TINY_FLAGS, "--data", data, "--preset", "modern", "--max_steps", 15, "--save_every", 5,
        "--keep", 0, "--dropout", 0.1, "--micro_batch", "auto", "--device", "cuda", "--compile",
        *(["--deterministic"] if deterministic else [])
    ]
    log = tmp_path / "log"
    done = launch("train_gpt2.py", *flags, "--run_name", "whole")
    assert done.returncode == 0, done.stderr
    assert "bfloat16" in done.stdout
    assert "was recompiled" not in done.stdout
    want = read_log(log / "whole")
    assert steps_trained(log / "whole") == list(range(15))
    assert want[14, "train"] < want[0, "train"]
    model, _, _ = train_gpt2.load_checkpoint(log / "whole" / "ckpt_00015.pt", "cuda")
    idx = torch.randint(0, model.config.vocab_size, (2, 16), device="cuda")
    with devices.autocast(model):
        half = model(idx)
    assert (half - model(idx)).abs().max() < 0.05
    for step in (5, 10):
        folder = shutil.copytree(log / "whole", log / f"from_{step}")
        for later in range(step + 5, 16, 5):
            (folder / f"ckpt_{later:05d}.pt").unlink()
        again = launch("train_gpt2.py", *flags, "--run_name", folder.name)
        assert again.returncode == 0, again.stderr
        assert f"step {step - 1} | loss" not in again.stdout
        assert f"step {step} | loss" in again.stdout
        assert read_log(folder) == pytest.approx(want, abs=1.5e-6 if deterministic else 1e-3)
