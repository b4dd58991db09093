"""train_gpt2.py against references, and launched for real. Run: python -m pytest
tests/test_train_gpt2.py -n 2"""

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
import time
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
from runs import events, steps_saved

import train_gpt2
from lib import checkpoint, devices, huggingface
from lib.budget import steps_of
from lib.cli import BadInput, parse
from lib.decoding import SHOWN, sample
from lib.logger import SpikeDetector, quoted
from lib.shards import Shards, read_validation
from lib.tokenizers import load_tokenizer, train_bpe
from train_gpt2 import GPT, PRESETS, SIZES, GPTConfig, ShardLoader, TrainConfig

TOGGLES = {
    "mlp": tuple(train_gpt2.MLPS), "norm": tuple(train_gpt2.NORMS),
    "pos": ("learned", "rope"), "emb_norm": (False, True), "qk_norm": (False, True),
    "bias": (True, False), "tie_embeddings": (True, False), "dropout": (0.0, 0.1),
}
RECIPE = {
    "value_residual": (False, True), "residual_scalars": (False, True), "softcap": (0.0, 15.0),
    "n_experts": (0, 4),
}


def combinations(*names):
    """Every combination of these toggles, as dicts."""
    values = [TOGGLES[name] for name in names]
    return [dict(zip(names, chosen)) for chosen in itertools.product(*values)]


def pairs_of(settings):
    return set(itertools.combinations(settings.items(), 2))


def all_pairs(toggles):
    """A few combinations in which every pair of values of two toggles occurs (greedy, from a fixed
    seed)."""
    names = list(toggles)
    rng = random.Random(0)
    missing = set()
    for a, b in itertools.combinations(names, 2):
        missing |= {((a, x), (b, y)) for x in toggles[a] for y in toggles[b]}
    chosen = []
    while missing:
        tries = [{name: rng.choice(toggles[name]) for name in names} for _ in range(200)]
        best = max(tries, key=lambda settings: len(pairs_of(settings) & missing))
        missing -= pairs_of(best)
        chosen.append(best)
    return chosen


def go(data, folder, *flags):
    """A tiny run in this process -> its folder."""
    train_gpt2.main([str(word) for word in (*TINY_FLAGS, "--data", data, "--log_dir", folder.parent,
                                            "--run_name", folder.name, *flags)])
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# Configuration


def length(data, *argv):
    """Steps of a run with these flags, of a model of 1,000 parameters."""
    cfg = train_gpt2.settings(["--data", str(data), *argv]).train
    return steps_of(cfg, Shards(data).tokens["train"], 1000)


GPT2 = dict(
    mlp="gelu", norm="layernorm", pos="learned", emb_norm=False, qk_norm=False, bias=True,
    n_layer=12, n_head=12, n_embd=768, block_size=1024, tie_embeddings=True, init="gpt2",
    dropout=0.0, optimizer="adamw", max_lr=6e-4, schedule="cosine", epochs=1.0, shuffle=False,
    total_batch_size=524_288,
)
MODERN = dict(
    mlp="swiglu", norm="rmsnorm", pos="rope", emb_norm=True, bias=False, n_layer=12, n_head=6,
    n_embd=768, tie_embeddings=True, max_lr=1.8e-3, epochs=4.0, shuffle=True,
)


@pytest.mark.parametrize("argv, want", [
    (["--preset", "gpt2"], GPT2), (["--preset", "modern"], MODERN), ([], MODERN),
])
def test_presets(argv, want):
    cfg, model_cfg, explicit, *_ = train_gpt2.settings(argv)
    have = asdict(cfg) | asdict(model_cfg)
    assert {name: have[name] for name in want} == want
    assert explicit == ({"preset"} if argv else set())


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
    cfg = train_gpt2.settings(argv.split()).train
    assert {name: getattr(cfg, name) for name in want} == want


@pytest.mark.parametrize("argv, says", [
    ("--preset gpt2 --optimizer muon --max_lr 1e-3",
     "--max_lr 0.001 is 0.033 times the rate that suits --optimizer muon"),
    ("--preset speedrun --optimizer adamw --max_lr 0.03",
     "--max_lr 0.03 is 50 times the rate that suits --optimizer adamw"),
    ("--preset modern --momentum 0.9", "--momentum has no effect without --optimizer muon"),
    ("--preset gpt2 --cooldown 0.7", "--cooldown has no effect without --schedule wsd"),
    ("--preset speedrun --head_lr 0.01", "--head_lr has no effect without --no-tie_embeddings"),
    ("--preset gpt2 --max_lr 1.8e-3", None),
    ("--preset speedrun", None),
    ("--preset tiny --head_lr 0.01 --cooldown 0.5 --momentum 0.95", None),
])
def test_flags_without_effect_and_rates_far_off_are_warned_of(argv, says):
    cfg, model_cfg, explicit, *_ = train_gpt2.settings(argv.split())
    lines = train_gpt2.flag_warnings(cfg, model_cfg, explicit)
    assert len(lines) == bool(says)
    assert not says or lines[0].startswith(f"warning: {says}")


def test_a_run_keeps_the_rates_it_began_with(data, tmp_path, capsys):
    flags = [*TINY_FLAGS, "--data", str(data), "--log_dir", str(tmp_path), "--optimizer", "muon"]
    train_gpt2.main([*flags, "--run_name", "a", "--max_lr", "1e-3"])
    assert capsys.readouterr().err.count("warning: --max_lr 0.001") == 1
    cfg, *_ = train_gpt2.settings(
        ["--preset", "gpt2", "--optimizer", "muon", "--log_dir",
         str(tmp_path), "--run_name", "a"])
    assert (cfg.max_lr, cfg.embedding_lr) == (1e-3, 0.01)  # the checkpoint's


@pytest.mark.parametrize("argv, want", [
    (["--size", "gpt2-medium"], dict(n_layer=24, n_head=16, n_embd=1024)),
    (["--size", "gpt2-xl", "--n_layer", "6"], dict(n_layer=6, n_head=25, n_embd=1600)),
])
def test_size_sets_the_shape_and_flags_override_it(argv, want):
    model_cfg = train_gpt2.settings(argv).model
    assert {name: getattr(model_cfg, name) for name in want} == want


def test_settings_are_frozen_and_choices_are_the_names_of_their_dicts():
    cfg, model_cfg, *_ = train_gpt2.settings([])
    for config, name in ((cfg, "max_lr"), (model_cfg, "n_layer")):
        with pytest.raises(FrozenInstanceError):
            setattr(config, name, 1)
    for name, names in (("mlp", train_gpt2.MLPS), ("optimizer", train_gpt2.OPTIMIZERS),
                        ("schedule", train_gpt2.SCHEDULES), ("preset", PRESETS)):
        with pytest.raises(BadInput, match=f"--{name}: .*{'.*'.join(names)}"):
            train_gpt2.settings([f"--{name}", "other"])


@pytest.mark.parametrize("argv, want", [
    ("--epochs 2.5", lambda tokens: int(2.5 * tokens / 256)),
    ("--max_steps 7", lambda tokens: 7),
    ("--preset tiny --epochs 1", lambda tokens: tokens // 256),
    ("--preset tiny", lambda tokens: PRESETS["tiny"]["max_steps"]),
    ("--preset tiny --tokens_per_param 20", lambda tokens: 20 * 1000 // 256),
])
def test_length_of_a_run(argv, want, data):
    base = ["--block_size", "32", "--total_batch_size", "256"]
    assert length(data, *base, *argv.split()) == want(Shards(data).tokens["train"])


def test_a_run_of_less_than_a_step_is_refused(data):
    with pytest.raises(BadInput, match="raise --epochs or lower --total_batch_size"):
        length(data, "--preset", "gpt2")  # of 524,288 tokens


def row_of(table, name, ratio):
    """The words of a row of the table of --plan."""
    rows = [line.split() for line in table.splitlines()]
    (row,) = [row for row in rows if row[0] == name and row[3:4] == [ratio]]
    return row


def test_a_plan_needs_no_data_and_trains_nothing(launch, data, tmp_path, capsys):
    done = launch("train_gpt2.py", "--plan", "--preset", "gpt2", "--tok_per_sec", "1e6",
                  "--price_per_hour", "16")
    assert done.returncode == 0 and not list(tmp_path.iterdir())
    assert row_of(done.stdout, "gpt2", "20") == [
        "gpt2", "124,475,904", "85,056,000", "20", "2,489,518,080", "4,748", "2.13e+18", "0.7",
        "11.06"]
    # the vocabulary of --data counts
    train_gpt2.main(["--plan", "--preset", "gpt2", "--data", str(data), "--tokens_per_param",
                     "2.5"])
    parameters = 124_475_904 - (50_304 - 384) * 768
    assert row_of(capsys.readouterr().out, "gpt2", "2.5")[1:5] == [
        f"{parameters:,}", "85,056,000", "2.5", f"{2.5 * parameters:,.0f}"]


def test_tokens_per_parameter_set_the_length_of_a_run_and_its_price_is_said(data, tmp_path, capsys):
    flags = [word for word in TINY_FLAGS if word not in ("--max_steps", "6")]
    train_gpt2.main([*flags, "--data", str(data), "--log_dir", str(tmp_path), "--run_name", "a",
                     "--tokens_per_param", "0.2", "--price_per_hour", "3.6"])
    out = capsys.readouterr().out
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    model = GPT(GPTConfig(**config["model"]))
    parameters = sum(p.numel() for p in model.parameters())
    steps = sum(kind == "train" for _, kind in read_log(tmp_path / "a"))
    assert steps == int(0.2 * parameters) // 256
    assert re.search(r"predicted: [0-9.]+ minutes, \$[0-9.]+ at \$3.6 per hour of training steps, "
                     "at [0-9,]+ tok/s", out)
    assert f"{steps * 256 / parameters:,.4g} tokens per parameter" in out


def test_every_number_has_its_bounds():
    for cls in (TrainConfig, GPTConfig):
        for field in fields(cls):
            if field.metadata.get("help") and re.search("int|float", str(field.type)):
                for value in ("nan", "inf", "-1", "1e999", f"1{'0' * 400}"):
                    with pytest.raises(BadInput, match=f"--{field.name}"):
                        parse((TrainConfig, GPTConfig), [f"--{field.name}={value}"], None, PRESETS)


# ----------------------------------------------------------------------------------------------------------------------
# Model


def test_gpt2_has_124_475_904_parameters():
    with torch.device("meta"):
        counts = GPT(GPTConfig()).parameter_counts()
    assert counts["total"] == 124_475_904
    assert counts["embedding"] == 50_304 * 768 + 1024 * 768
    assert counts["layer"] == 12 * 768**2 + 13 * 768


def test_mlps_have_like_parameter_counts():
    for size in SIZES.values():
        with torch.device("meta"):
            gelu, swiglu, relu2 = (sum(
                p.numel()
                for p in train_gpt2.MLPS[name](GPTConfig(**size, bias=False)).parameters())
                                   for name in ("gelu", "swiglu", "relu2"))
        assert relu2 == gelu and swiglu == pytest.approx(gelu, rel=0.02)
    assert train_gpt2.SwiGLUMLP(GPTConfig(n_embd=2)).c_proj.weight.shape == (
        2, 16)  # never without hidden units


def test_rope_against_transformers_llama():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    q, k = torch.randn(2, 3, 40, 16), torch.randn(2, 3, 40, 16)
    config = LlamaConfig(hidden_size=48, num_attention_heads=3, max_position_embeddings=64)
    cos, sin = LlamaRotaryEmbedding(config)(q, torch.arange(40)[None])
    rotary = train_gpt2.Rotary(16, 64)
    for x, want in zip((q, k), apply_rotary_pos_emb(q, k, cos, sin)):  # theirs: (B, H, T, D)
        torch.testing.assert_close(rotary(x.transpose(1, 2), slice(40)), want.transpose(1, 2),
                                   rtol=0, atol=1e-5)
        torch.testing.assert_close(rotary(x.transpose(1, 2)[:, 7:], slice(7, 40)),
                                   want.transpose(1, 2)[:, 7:], rtol=0, atol=1e-5)
    assert rotary(q.transpose(1, 2).bfloat16(), slice(40)).dtype == torch.bfloat16
    assert not rotary.state_dict()  # the tables follow from the config: not in checkpoints


def test_norms_against_torch():
    x, weight, bias = torch.randn(4, 5, 32) * 3 + 1, torch.randn(32), torch.randn(32)
    rms, layer = train_gpt2.RMSNorm(32, bias=True), train_gpt2.LayerNorm(32, bias=True)
    assert [name for name, _ in rms.named_parameters()] == ["weight"]
    assert train_gpt2.LayerNorm(32, bias=False).bias is None
    rms.weight.data, layer.weight.data, layer.bias.data = weight, weight, bias
    torch.testing.assert_close(rms(x), x /
                               (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight)
    torch.testing.assert_close(layer(x), F.layer_norm(x, (32,), weight, bias))
    low = x.bfloat16()  # computed in fp32, whatever comes in
    assert torch.equal(rms(low), F.rms_norm(low.float(), (32,), weight, eps=1e-5).bfloat16())


@pytest.mark.parametrize("bias", [False, True])
def test_mlps_by_hand(bias):
    x, config = torch.randn(7, 48), GPTConfig(n_embd=48, bias=bias)
    for name, cls in train_gpt2.MLPS.items():
        mlp = cls(config)
        a, b = mlp.c_fc, mlp.c_proj
        h = x @ a.weight.T + (a.bias if bias else 0)
        if name == "swiglu":
            assert h.size(1) == 2 * 128  # 8/3 x 48
            gate, value = h[:, :128], h[:, 128:]
            h = gate / (1 + torch.exp(-gate)) * value
        elif name == "relu2":
            h = h.clamp(min=0) ** 2
        else:
            h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        torch.testing.assert_close(mlp(x), h @ b.weight.T + (b.bias if bias else 0), rtol=1e-4,
                                   atol=1e-5)


@pytest.mark.parametrize("mlp", TOGGLES["mlp"])
def test_every_combination_runs_and_trains_every_parameter(mlp):
    idx = torch.randint(61, (2, 9))
    for init in ("gpt2", "xavier", "kaiming"):
        for toggles in combinations(*list(TOGGLES)[1:]):
            model = GPT(tiny(n_layer=1, n_embd=16, mlp=mlp, init=init, **toggles))
            loss = model(idx[:, :-1], idx[:, 1:])
            loss.backward()
            assert loss.shape == () and 2 < loss / 16 < 8
            for name, p in model.named_parameters():
                assert p.grad is not None and p.grad.isfinite().all(), (toggles, name)
                if "k_norm.bias" not in name:  # moves all scores of a query alike, which softmax does not see
                    assert p.grad.any(), (toggles, name)


@pytest.mark.parametrize("toggles", all_pairs(TOGGLES | RECIPE),
                         ids=lambda t: "-".join(map(str, t.values())))
def test_no_graph_breaks(toggles):
    torch._dynamo.reset()
    model, idx = GPT(tiny(**toggles)), torch.randint(61, (2, 9))
    torch.manual_seed(1)  # of dropout
    want = model(idx[:, :-1], idx[:, 1:])
    model.compile(backend="eager", fullgraph=True, dynamic=False)
    torch.manual_seed(1)
    have = model(idx[:, :-1], idx[:, 1:])
    have.backward()
    torch.testing.assert_close(have, want)


@pytest.mark.parametrize("mlp", TOGGLES["mlp"])
def test_causality(mlp):
    a = torch.randint(61, (1, 12))
    for toggles in (*combinations("norm", "pos", "emb_norm", "qk_norm"),
                    {name: on for name, (_, on) in RECIPE.items()}):
        model = GPT(tiny(mlp=mlp, init="xavier", **toggles)).eval()
        for t in (1, 6, 11):
            b = a.clone()
            b[0, t] = (b[0, t] + 1) % 61
            with torch.no_grad():
                difference = (model(a) - model(b))[0].abs().amax(dim=-1)
            assert difference[:t].max() < 1e-6, (toggles, t)
            assert difference[t:].min() > 1e-5, (toggles, t)  # and what follows does look back


def test_logits_are_cut_and_targets_of_minus_one_are_not_counted():
    model, idx = GPT(tiny()), torch.randint(61, (2, 16))
    assert model(idx).shape == (2, 16, 61)
    rows, columns = torch.tensor([1, 0, 1]), torch.tensor([15, 3, 3])
    torch.testing.assert_close(model(idx, logits_at=(rows, columns)), model(idx)[rows, columns])
    targets = idx.roll(-1, 1)
    targets[:, 10:] = -1
    full = model.lm_head(model.transformer.ln_f(hidden(model, idx)))[:, :10].flatten(0, 1)
    torch.testing.assert_close(model(idx, targets),
                               F.cross_entropy(full, targets[:, :10].flatten(), reduction="sum"))


@torch.no_grad()
def test_logits_are_capped_in_fp32_as_the_loss_caps_them():
    """In bf16, capped logits near the cap are 1/16 apart: what is scored and generated would be
    another model than the one whose loss is measured."""
    torch.manual_seed(0)
    model = GPT(tiny(softcap=15.0, vocab_size=64, norm="rmsnorm", bias=False)).eval()
    model.lm_head.weight.normal_(std=4.0)  # logits far beyond the cap
    idx = torch.randint(64, (8, 16))
    targets = torch.randint(64, (8, 16))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(idx)
        loss = model(idx, targets)
    assert logits.abs().amax(dim=-1).median() > 14 and logits.dtype == torch.float32
    nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(nats, loss, rtol=1e-6, atol=0)


def hidden(model, idx):
    """The residual stream before the last norm, by the plain loop."""
    positions = slice(idx.size(1))
    x = x0 = model.transformer.emb_norm(model.transformer.wpe(model.transformer.wte(idx),
                                                              positions))
    v_first = None
    for block in model.transformer.h:
        x, v_first = block(x, x0, v_first, positions)
    return x


@torch.no_grad()
def test_the_speedrun_model_against_a_plain_one():
    """Written out once more with nothing shared but the weights, drawn at random
    so that no gain or scalar hides at its start."""
    config = tiny(n_layer=3, mlp="relu2", norm="rmsnorm", pos="rope", emb_norm=True, qk_norm=True,
                  bias=False, token_shift=True, value_residual=True, residual_scalars=True,
                  softcap=3.0, init="zero_proj")
    model, idx = GPT(config).eval(), torch.randint(61, (2, 16))
    for p in model.parameters():
        p.normal_(std=0.3)
    w = dict(model.named_parameters())

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[name]

    def rope(x):  # (B, T, H, D): complex numbers of dimension i and i + D/2
        turn = torch.outer(torch.arange(16.0), 10_000 ** (-torch.arange(0, 16, 2) / 16))[:, None]
        z = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(turn), turn)
        return torch.cat((z.real, z.imag), -1)

    x = x0 = norm(w["transformer.wte.weight"][idx], "transformer.emb_norm.weight")
    for i in range(3):
        b = f"transformer.h.{i}"
        r = w[f"{b}.mix_residual.mix"]
        x = r[0] * x + r[1] * x0
        y = norm(x, f"{b}.ln_1.weight")
        y[:, 1:] = y[:, 1:] + w[f"{b}.token_shift.weight"] * y[:, :-1]
        q, k, v = (y @ w[f"{b}.attn.c_attn.weight"].T).view(2, 16, 3, 2, 16).unbind(2)
        q, k = rope(norm(q, f"{b}.attn.q_norm.weight")), rope(norm(k, f"{b}.attn.k_norm.weight"))
        if i == 0:
            v_first = v
        else:
            m = w[f"{b}.attn.mix_values.mix"]
            v = m[0] * v + m[1] * v_first
        scores = torch.einsum("bthd,bshd->bhts", q, k) / 4
        scores = scores.masked_fill(torch.ones(16, 16).triu(1).bool(), -math.inf).softmax(-1)
        x = x + torch.einsum("bhts,bshd->bthd", scores, v).reshape(
            2, 16, 32) @ w[f"{b}.attn.c_proj.weight"].T
        h = norm(x, f"{b}.ln_2.weight") @ w[f"{b}.mlp.c_fc.weight"].T
        x = x + h.clamp(min=0) ** 2 @ w[f"{b}.mlp.c_proj.weight"].T
    z = norm(x, "transformer.ln_f.weight") @ w["transformer.wte.weight"].T
    z = 3 * z / (z.square() + 9).sqrt()
    torch.testing.assert_close(model(idx), z[..., :61], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        model(idx[:, :-1], idx[:, 1:]),
        F.cross_entropy(z[:, :-1].flatten(0, 1), idx[:, 1:].flatten(), reduction="sum"))


@pytest.mark.parametrize("preset", ["modern", "speedrun", "tiny"])
def test_no_preset_begins_above_the_loss_of_a_guess(preset):
    """But for `gpt2`, which keeps the initialization of GPT-2 itself: its logits spread, and it
    begins 0.15 above."""
    (_, config), _ = parse((TrainConfig, GPTConfig), ["--preset", preset], None, PRESETS)
    torch.manual_seed(0)
    idx = torch.randint(config.vocab_size, (4, 65))
    with torch.no_grad():
        loss = GPT(replace(config, n_layer=2))(idx[:, :-1], idx[:, 1:]) / 256
    assert loss < math.log(config.vocab_size) + 0.1


def test_the_blocks_of_zero_proj_begin_as_the_identity_and_learn():
    model, idx = GPT(tiny(init="zero_proj", tie_embeddings=False, mlp="relu2",
                          bias=False)), torch.randint(61, (2, 17))
    x = model.transformer.wpe(model.transformer.wte(idx[:, 1:]), slice(16))
    assert torch.equal(hidden(model, idx[:, 1:]),
                       x) and model.transformer.wte.weight.std().item() == pytest.approx(
                           1, rel=0.1)
    assert not model(idx[:, :-1]).any()  # the head is zero
    for name, p in model.named_parameters():
        if name.endswith("c_fc.weight"):
            assert p.std().item() == pytest.approx((1 / 3 / p.size(1)) ** 0.5, rel=0.1)
    optimizer = train_gpt2.make_optimizer(model, TrainConfig(optimizer="muon"))
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        model(idx[:, :-1], idx[:, 1:]).backward()
        optimizer.step()
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before))


def test_dropout_is_on_in_training_and_off_in_evaluation():
    model, idx = GPT(tiny(dropout=0.3)), torch.randint(61, (2, 16))
    assert not torch.equal(model(idx), model(idx))
    model.eval()
    assert torch.equal(model(idx), model(idx))
    plain = GPT(tiny(dropout=0.0))
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(idx), plain(idx))
    attention, x = model.transformer.h[0].attn.train(), torch.randn(
        2, 16, 32)  # the scores are dropped out as well
    assert not torch.equal(attention(x, None, 0)[0], attention(x, None, 0)[0])


@pytest.mark.parametrize("init", ["gpt2", "xavier", "kaiming"])
@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_init_stds(init, mlp):
    torch.manual_seed(0)
    model = GPT(
        tiny(n_embd=192, n_head=4, n_layer=3, block_size=256, vocab_size=1024, init=init, mlp=mlp,
             emb_norm=True, qk_norm=True, tie_embeddings=False))
    hidden, residual = {"gelu": 768, "swiglu": 512}[mlp], 1 / math.sqrt(6)
    want = {  # (fan_in, fan_out) of one matrix; gain of the non-linearity
        "attn.c_attn": (192, 192, 1), "attn.c_proj": (192, 192, 1),
        "mlp.c_fc": (192, hidden, 2), "mlp.c_proj": (hidden, 192, 1)}
    seen = 0
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any()
        elif p.dim() == 1:
            assert (p == 1).all()
        elif name.startswith("transformer.h."):
            fan_in, fan_out, gain = want[name.removesuffix(".weight").split(".", 3)[3]]
            std = {
                "gpt2": 0.02, "xavier": (2 / (fan_in + fan_out))**0.5,
                "kaiming": (gain / fan_in)**0.5
            }[init]
            std *= residual if "c_proj" in name else 1
            assert p.std().item() == pytest.approx(std, rel=0.02), name
            assert abs(p.mean().item()) < 0.05 * std
            seen += 1
        else:
            assert p.std().item() == pytest.approx(0.01 if "wpe" in name else 0.02, rel=0.02), name
            seen += 1
    assert seen == 3 * 4 + 3


def test_init_fails_on_a_parameter_it_does_not_know():
    model = GPT(tiny())
    model.transformer["gate"] = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="does not know the parameter transformer.gate.weight"):
        train_gpt2.init_weights(model)


# ----------------------------------------------------------------------------------------------------------------------
# Optimizer, schedule, FLOPs


@pytest.mark.parametrize(
    "toggles",
    [{}, dict(tie_embeddings=False, qk_norm=True, emb_norm=True, norm="rmsnorm", bias=False)])
def test_optimizer_groups(toggles):
    model = GPT(tiny(**toggles))
    optimizer = train_gpt2.make_optimizer(model, TrainConfig(weight_decay=0.3))
    decay = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert sum(len(group["params"])
               for group in optimizer.param_groups) == len(decay) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        assert decay[id(p)] == (0.0 if p.dim() == 1 else 0.3), name
    normed = toggles.get("emb_norm", False)
    for group in optimizer.param_groups:  # initial_lr is what the schedule multiplies
        outside = any(p is table.weight
                      for table in (model.transformer.wte, model.transformer.wpe)
                      for p in group["params"])
        assert group["initial_lr"] == group["lr"] == (5 * 6e-4 if normed and outside else 6e-4)


@pytest.mark.parametrize("mlp, fc", [("relu2", 1), ("swiglu", 2)])
def test_muon_takes_the_matrices_in_blocks_and_each_kind_its_rate(mlp, fc):
    model = GPT(tiny(mlp=mlp, tie_embeddings=False, residual_scalars=True, pos="rope"))
    cfg = TrainConfig(optimizer="muon", max_lr=0.02, embedding_lr=0.3, head_lr=0.004,
                      vector_lr=0.015, momentum=0.9, weight_decay=0.1)
    groups = {
        id(p): g for g in train_gpt2.make_optimizer(model, cfg).param_groups for p in g["params"]
    }
    for name, p in model.named_parameters():
        g = groups[id(p)]
        if p.dim() > 1 and ".h." in name:
            splits = 3 if "c_attn" in name else fc if "c_fc" in name else 1
            assert (g["kind"], g["lr"], g["splits"], g["momentum"],
                    g["weight_decay"]) == ("muon", 0.02, splits, 0.9, 0.1)
        else:
            lr = 0.3 if "wte" in name else 0.004 if "lm_head" in name else 0.015
            assert (g["kind"], g["lr"], g["weight_decay"]) == ("adamw", lr, 0.0)


def test_one_step_of_adamw_by_hand():
    model = GPT(tiny())
    optimizer = train_gpt2.make_optimizer(model, TrainConfig(max_lr=1e-2, weight_decay=0.1))
    idx = torch.randint(61, (2, 17))
    model(idx[:, :-1], idx[:, 1:]).backward()
    # after one step the bias-corrected moments are g and g^2 (Loshchilov & Hutter 2019, algorithm
    # 2)
    want = [
        p.detach() * (1 - 1e-2 * (0.1 if p.dim() > 1 else 0)) - 1e-2 * p.grad /
        (p.grad.abs() + 1e-8) for p in model.parameters()
    ]
    optimizer.step()
    for p, expected in zip(model.parameters(), want):
        torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-6)
    assert all(group["betas"] == (0.9, 0.95) for group in optimizer.param_groups)


@pytest.mark.parametrize(
    "schedule, points, steepest",
    [
        # warm-up over 10 of 110 steps to 1.0, then down to 0.1
        ("cosine", {
            35: 0.1 + 0.45 * (1 + math.sqrt(0.5)), 60: 0.55, 109: 0.1 + 0.45 *
            (1 + math.cos(0.99 * math.pi))
        }, 0.0142),
        ("linear", {35: 0.775, 60: 0.55, 85: 0.325, 109: 0.109}, 0.00901),
        ("wsd", {35: 1.0, 60: 1.0, 88: 1.0, 99: 0.55, 109: 0.1 + 0.9 / 22
                 }, 0.041),  # decays over the last fifth: 88 to 110
    ])
def test_schedule_by_hand(schedule, points, steepest):
    cfg = TrainConfig(schedule=schedule, min_lr_frac=0.1, warmup_steps=10)
    lr = [train_gpt2.lr_multiplier(step, cfg, 110) for step in range(110)]
    for step, want in ({0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0} | points).items():
        assert lr[step] == pytest.approx(want), step
    assert max(lr) == pytest.approx(1.0) and min(lr) >= 0.1 - 1e-12
    assert np.abs(np.diff(lr[9:])).max() < steepest  # no jumps
    assert (np.diff(lr[9:]) <= 1e-12).all()


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("warmup, steps", [(0, 1), (0, 5), (4, 5), (9, 10), (None, 1), (None, 100)])
def test_schedule_of_short_runs(schedule, warmup, steps):
    cfg = TrainConfig(schedule=schedule, min_lr_frac=0.0, warmup_steps=warmup)
    lr = [train_gpt2.lr_multiplier(step, cfg, steps) for step in range(steps)]
    assert max(lr) == pytest.approx(1.0) and min(lr) > 0  # no step is wasted on a rate of zero


def test_warm_up_is_a_share_of_the_run_without_the_flag():
    """3.75% of a long run, 40 steps (2 / (1 - beta2)) of a shorter one, a quarter of the shortest.
    """
    for steps, warmup in ((19_073, 715), (1_067, 40), (300, 40), (100, 25), (7, 1)):
        cfg = TrainConfig()
        assert cfg.warmup_steps is None
        lr = [train_gpt2.lr_multiplier(step, cfg, steps) for step in range(warmup + 2)]
        assert lr == pytest.approx([*np.arange(1, warmup + 1) / warmup, 1.0, lr[-1]]) and lr[-1] < 1


def test_flops_per_token_by_hand():
    with torch.device("meta"):
        gpt2, untied, small = (GPT(c) for c in (GPTConfig(), GPTConfig(tie_embeddings=False),
                                                tiny(pos="rope", bias=False)))
    # PaLM, appendix B: 6N + 12 L H Q T
    want = 6 * (124_475_904 - 1024 * 768) + 12 * 12 * 12 * 64 * 1024
    assert gpt2.flops_per_token() == want == 855_383_040
    assert untied.flops_per_token(
    ) == want  # the same matrices are multiplied; one more is looked up
    assert small.flops_per_token() == 6 * (64 * 32 + 2 *
                                           (12 * 32**2 + 2 * 32) + 32) + 12 * 2 * 32 * 16


@pytest.mark.parametrize(
    "toggles", [{}, dict(tie_embeddings=False, emb_norm=True, qk_norm=True, pos="rope")])
def test_gradient_groups_cover_every_parameter_once(toggles):
    model = GPT(tiny(**toggles))
    groups = train_gpt2.gradient_groups(model)
    assert list(groups)[0] == "embedding" and {"block_00", "block_01", "rest"} < set(groups)
    assert Counter(id(p)
                   for part in groups.values()
                   for p in part) == Counter(id(p) for p in model.parameters())
    assert any(p is model.transformer.wte.weight for p in groups["embedding"])


# ----------------------------------------------------------------------------------------------------------------------
# Shards and the loader

EOT = 0
FAKE = SimpleNamespace(vocab_size=100, eot=EOT)


def make_shards(folder, mid_document=False):
    """Shards of 5, 1, 7 and 3 short documents -> (files, list of documents per shard)."""
    rng = np.random.default_rng(0)
    contents = [[
        np.array([EOT, *rng.integers(1, 100, rng.integers(0, 9))], dtype=np.uint16)
        for _ in range(n)
    ]
                for n in (5, 1, 7, 3)]
    if mid_document:  # the shards were cut at a fixed length
        contents = [[documents[0][1:], *documents[1:]] if len(documents[0]) > 1 else documents
                    for documents in contents]
    files = [folder / f"toy_train_{i:06d}.npy" for i in range(len(contents))]
    for file, documents in zip(files, contents):
        np.save(file, np.concatenate(documents))
    return files, contents


def reference_epoch(contents, seed, epoch):
    """The documents of an epoch in the loader's order, written out plainly."""
    if seed is None:
        return [document for documents in contents for document in documents]
    order = np.random.default_rng((seed, epoch)).permutation(len(contents))
    return [
        contents[shard][d]
        for shard in order
        for d in np.random.default_rng((seed, epoch, int(shard))).permutation(len(contents[shard]))
    ]


@pytest.mark.parametrize("mid_document", [False, True])
@pytest.mark.parametrize("seed", [None, 0, 1337])
@pytest.mark.parametrize("n", [1, 7, 16, 1000])  # 1000 tokens: more than the whole data
def test_stream_against_reference(n, seed, mid_document, tmp_path):
    files, contents = make_shards(tmp_path, mid_document)
    size = sum(len(d) for documents in contents for d in documents)
    epochs = 3 + 4 * n // size
    stream = np.concatenate(
        [d for epoch in range(epochs) for d in reference_epoch(contents, seed, epoch)])
    loader = ShardLoader(files, FAKE, seed)
    for start in range(0, min(len(stream) - n - 1, 3 * size + 3 * n), n):
        assert np.array_equal(loader.next(n), stream[start:start + n + 1]), start


@pytest.mark.parametrize("seed", [None, 5])
def test_loader_continues_exactly_from_any_point(seed, tmp_path):
    files, contents = make_shards(tmp_path)
    size = sum(len(d) for documents in contents for d in documents)
    loader = ShardLoader(files, FAKE, seed)
    other = ShardLoader(files, FAKE,
                        seed)  # one loader that jumps about, with other batches made ready ahead
    states, batches = [], []
    for n in [1, 2, 3, 5, 8, 13, 21, size, 2 * size + 1, 4, 4]:
        states.append(json.loads(json.dumps(loader.state_dict())))
        batches.append(loader.next(n))
    for i in [3, 0, 8, 7, 1, 9, 2, 10, 4, 6, 5]:
        for resumed in (ShardLoader(files, FAKE, seed), other):
            resumed.load_state_dict(states[i])
            for state, batch in zip(states[i:], batches[i:]):
                assert resumed.state_dict() == state
                assert np.array_equal(resumed.next(len(batch) - 1), batch)
                resumed.prefetch(i + 1)
    assert all(type(v) is int for v in states[-1].values()) and len(states[-1]) == 3


def test_the_next_call_finds_its_tokens_ready_and_transformed(tmp_path):
    files, _ = make_shards(tmp_path)
    threads = []
    loader = ShardLoader(files, FAKE, 1,
                         lambda tokens: threads.append(threading.current_thread()) or -tokens)
    plain = ShardLoader(files, FAKE, 1)
    for _ in range(10):
        assert np.array_equal(loader.next(4), -plain.next(4))
    loader.next(4)
    assert len(
        threads) >= 11 and threading.main_thread() not in threads  # one batch each, and one ahead


def test_a_bad_id_ends_the_call_that_reaches_it_and_none_before(tmp_path):
    for name, ids in (("a", [1, 99, 3, 4]), ("b", [5, 100, 3])):
        np.save(tmp_path / f"{name}.npy", np.array(ids, dtype=np.uint16))
    loader = ShardLoader([tmp_path / "a.npy", tmp_path / "b.npy"], FAKE, None)
    assert loader.next(2).tolist() == [1, 99, 3]
    loader.prefetch(2)  # its last target stands in the bad shard
    assert loader.next(1).tolist() == [3, 4]
    before = loader.state_dict()
    for _ in range(2):
        with pytest.raises(BadInput, match=r"b\.npy holds the id 100"):
            loader.next(1)
    assert loader.state_dict() == before == {"epoch": 0, "shard": 0, "offset": 3}
    loader.load_state_dict({"epoch": 0, "shard": 0, "offset": 0})
    assert loader.next(3).tolist() == [1, 99, 3, 4]


def test_shards_of_other_projects(tmp_path):
    ids = np.arange(500) * 100
    nanogpt, llmc, llama = (tmp_path / name for name in ("build-nanogpt", "llm.c", "llama"))
    for folder in (nanogpt, llmc, llama):
        folder.mkdir()
    for split, part in (("val", ids[:-101:-1]), ("train", ids)):
        np.save(nanogpt / f"edufineweb_{split}_000001.npy", part.astype(np.uint16))
        write_bin(llmc / f"fineweb_{split}_000001.bin", part.astype(np.uint16), 20240520, 1)
        write_bin(llama / f"fineweb_{split}_000001.bin", (part + 70_000).astype(np.uint32),
                  20240801, 7)
    for folder, add in ((nanogpt, 0), (llmc, 0), (llama, 70_000)):
        shards = Shards(folder)
        assert shards.tokenizer == "gpt2" and shards.tokens == {"train": 500, "val": 100}
        loader = ShardLoader(shards.train, SimpleNamespace(vocab_size=200_000, eot=50256), None)
        assert np.array_equal(loader.next(400), ids[:401] + add)


def test_read_validation(tmp_path):
    files, contents = make_shards(tmp_path)
    stream = np.concatenate([d for documents in contents for d in documents])
    shards = SimpleNamespace(folder="toy", val=files, tokens={"val": len(stream)})
    for limit, rows in ((10**9, (len(stream) - 1) // 8), (24, 3), (31, 3)):
        x, y = read_validation(shards, limit, 8, FAKE)
        assert x.shape == y.shape == (rows, 8)
        assert np.array_equal(x.ravel(), stream[:8 * rows]) and np.array_equal(
            y.ravel(), stream[1:8 * rows + 1])
    with pytest.raises(BadInput, match="validation needs"):
        read_validation(shards, 7, 8, FAKE)


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation, checkpoints


class HalfAndThird(nn.Module):
    """The loss of a token is half of its id and a third of its target's; notes what it is called
    with."""
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, idx, targets):
        self.seen.append(
            (tuple(idx.shape), tuple(targets.shape), idx.dtype, torch.is_grad_enabled()))
        return (idx / 2 + targets / 3)[targets >= 0].sum()


@pytest.mark.parametrize("world_size", [1, 2, 3, 9])  # of 9, two have no rows
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 7, 8, 50])
def test_evaluate_is_the_plain_mean_by_equally_many_passes_of_one_shape(micro_batch, world_size):
    parts, calls, tokens = [], [], np.random.default_rng(0).integers(61, size=(7, 17))
    x, y = tokens[:, :-1], tokens[:, 1:]
    for rank in range(world_size):
        share = SimpleNamespace(rank=rank, world_size=world_size, main=rank == 0,
                                device=torch.device("cpu"),
                                sum=lambda v: parts.append(v) or (0.0, 1.0))
        model = HalfAndThird()
        train_gpt2.mean_loss(model, (x, y), micro_batch, share)
        assert set(model.seen) == {((micro_batch, 16), (micro_batch, 16), torch.int64, True)}
        calls.append(len(model.seen))
    nats, count = np.sum(parts, axis=0)
    assert count == y.size and nats / count == pytest.approx((x / 2 + y / 3).mean(), rel=1e-6)
    assert len(set(calls)) == 1  # a sharded model needs every process in every forward pass
    model, asked = HalfAndThird(), []
    assert math.isnan(
        train_gpt2.mean_loss(model, (x, y), micro_batch, share,
                            lambda: asked.append(1) or len(asked) == 2)) == (calls[0] > 1)
    assert len(model.seen) == len(asked) == min(
        calls[0], 2)  # after each pass, so that no stop waits for a long validation


@pytest.mark.parametrize(
    "toggles",
    [{}, dict(mlp="swiglu", pos="rope", norm="rmsnorm", bias=False, tie_embeddings=False)])
def test_checkpoint_round_trip(toggles, tokenizer, tmp_path):
    model = tiny_checkpoint(tmp_path / "a.pt", tokenizer, **toggles)
    loaded, same, state = train_gpt2.load_checkpoint(tmp_path / "a.pt")
    idx = torch.randint(280, (2, 20))
    assert torch.equal(loaded(idx), model(idx)) and not loaded.training and state["step"] == 1
    assert same.encode("the cat").tolist() == tokenizer.encode("the cat").tolist()


def change_config(**changes):
    return lambda state: state | {"model_config": state["model_config"] | changes}


@pytest.mark.parametrize("change", [
    *(change_config(**changes)
      for changes in (dict(n_head=3), dict(block_size=0), dict(n_layer=10**9), dict(n_layer=0),
                      dict(n_layer=1000, n_embd=65_536), dict(n_layer=2.0), dict(n_embd="32"),
                      dict(mlp="geglu"), dict(mlp="swiglu"), dict(dropout=math.nan),
                      dict(bias=None), dict(block_size=64), dict(vocab_size=10**12),
                      dict(vocab_size=512), dict(vocab_size=-1), dict(vocab_multiple=0),
                      dict(unknown=1))),
    *(lambda state, changes=changes: state | changes
      for changes in (dict(tokenizer="gpt2"), dict(tokenizer=7), dict(tokenizer="{}"),
                      dict(model={}), dict(model=None), dict(model_config=[]))),
    lambda state: {"model": {}}, lambda state: [1],
])
def test_a_checkpoint_whose_parts_do_not_fit_is_bad_input(change, tokenizer, tmp_path):
    tiny_checkpoint(tmp_path / "a.pt", tokenizer)  # of 280 ids: gpt2's tokenizer has 50,257
    torch.save(change(torch.load(tmp_path / "a.pt", weights_only=True)), tmp_path / "a.pt")
    with pytest.raises(BadInput, match="a.pt") as error:
        train_gpt2.load_checkpoint(tmp_path / "a.pt")
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------------------------------
# Real runs


def test_a_real_run(launch, data, tokenizer, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    questions = write_lines(tmp_path / "hella.jsonl", hellaswag_items(6))
    flags = [
        *TINY_FLAGS, "--data", data, "--shuffle", "--run_name", "real", "--max_steps", 42,
        "--hellaswag_every", 40, "--hellaswag_file", questions, "--eval_every", 20,
        "--sample_every", 40, "--save_every", 40, "--sample_prompt", "the dog",
        "--total_batch_size", 512
    ]
    result = launch("train_gpt2.py", *flags)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "log" / "real"
    assert {p.name for p in folder.iterdir()
            } > {"config.json", "log.txt", "ckpt_00040.pt", "ckpt_00042.pt", "train_gpt2.py"}
    assert not list(folder.glob("*.tmp"))

    config = json.loads((folder / "config.json").read_text())
    assert config["model"]["n_embd"] == 32 and config["model"]["vocab_size"] == 280
    assert config["train"]["shuffle"] is True and config[
        "max_steps"] == 42 and "--run_name real" in config["command"]

    log = read_log(folder)
    assert [step for step, kind in log if kind == "train"] == list(range(42))
    assert [step for step, kind in log if kind == "val"] == [20, 40, 42]  # the last step too
    assert [step for step, kind in log if kind == "hella"] == [40, 42]
    assert log[0, "train"] == pytest.approx(math.log(384), abs=0.3)
    assert log[41, "train"] < 0.6 * log[0, "train"] and log[42, "val"] < 0.6 * log[0, "train"]
    assert "step 0 | random weights are not evaluated; their loss is about ln 280 = 5.63\n" in result.stdout

    # the checkpoint gives the logged loss
    torch.load(folder / "ckpt_00042.pt", weights_only=True)
    model, same, state = train_gpt2.load_checkpoint(folder / "ckpt_00042.pt")
    assert state["step"] == 42 and set(state) >= {
        "optimizer", "loader", "skipped", "max_steps", "train_config"
    }
    assert not any(key.startswith(("_orig_mod", "module.")) for key in state["model"])
    val = np.load(data / "toy_val_000000.npy").astype(np.int64)
    x, y = val[:320].reshape(10, 32), val[1:321].reshape(10, 32)  # whole rows of 330 tokens
    with torch.no_grad():
        assert model(torch.tensor(x), torch.tensor(y)).item() / 320 == pytest.approx(
            log[42, "val"], rel=1e-5)
    assert f"\n{quoted(sample(model, same, ['the dog'], SHOWN))}\ndone: " in result.stdout

    # TensorBoard, by its own reader
    events = EventAccumulator(str(folder)).Reload()
    scalars = set(events.Tags()["scalars"])
    assert scalars >= {
        "Loss/train", "Loss/val", "Loss/val_bpb", "eval/hellaswag", "optim/lr", "optim/grad_norm",
        "optim/skipped_steps", "perf/tok_per_sec", "perf/step_ms", "perf/data_ms",
        "perf/recompilations",
        *(f"weights/grad_norm_{part}" for part in ("embedding", "block_00", "block_01", "rest"))
    }
    for tag, kind in (("Loss/train", "train"), ("Loss/val", "val"), ("eval/hellaswag", "hella")):
        assert {(e.step, kind): e.value for e in events.Scalars(tag)} == pytest.approx(
            {key: value for key, value in log.items() if key[1] == kind}, abs=1e-5)
    n_bytes = sum(
        len(tokenizer.encoding.decode_single_token_bytes(t))
        for t in y.ravel().tolist()
        if t != tokenizer.eot)
    for nats, bits in zip(events.Scalars("Loss/val"), events.Scalars("Loss/val_bpb")):
        assert bits.value == pytest.approx(nats.value * 320 / (math.log(2) * n_bytes), rel=1e-5)
    cfg = TrainConfig(warmup_steps=2)
    assert [e.value for e in events.Scalars("optim/lr")] == pytest.approx(
        [5e-3 * train_gpt2.lr_multiplier(s, cfg, 42) for s in range(42)])
    parts = [[e.value
              for e in events.Scalars(tag)]
             for tag in sorted(scalars)
             if tag.startswith("weights/")]
    assert [e.value for e in events.Scalars("optim/grad_norm")] == pytest.approx(
        np.linalg.norm(parts, axis=0).tolist(), rel=1e-4)
    text = {
        tag: b"".join(events.Tensors(tag)[-1].tensor_proto.string_val).decode()
        for tag in events.Tags()["tensors"]
        if tag.endswith("/text_summary")
    }
    assert "the dog" in text["samples/text_summary"] and "|n_embd|32|" in text[
        "hyperparameters/text_summary"]
    assert events.SummaryMetadata(
        "_hparams_/session_start_info").plugin_data.plugin_name == "hparams"


MASKED = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import train_gpt2
from lib.cli import run
real = train_gpt2.micro_batches
def masked(*args, **settings):
    return [(idx, targets.masked_fill(targets % 7 == 3, -1)) for idx, targets in real(*args, **settings)]
train_gpt2.micro_batches = masked
if __name__ == "__main__":
    run(train_gpt2.main)
"""


@pytest.mark.parametrize("masked", [False, True])
def test_the_losses_of_a_plain_loop_for_any_number_of_processes_and_micro_batch(
        masked, launch, data, tmp_path):
    """Masked targets, of which every process and micro-batch has another number, are left out of
    the mean over all."""
    flags = ["--grad_clip", "1.7", "--weight_decay", "0.5", "--val_tokens", "300", "--shuffle"]
    (cfg, model_cfg), _ = parse((TrainConfig, GPTConfig), [*TINY_FLAGS, *flags], None, PRESETS)
    model_cfg = replace(model_cfg, vocab_size=280)
    torch.manual_seed(cfg.seed)
    model, loader = GPT(model_cfg), ShardLoader(
        Shards(data).train, SimpleNamespace(vocab_size=280, eot=279), cfg.seed)
    matrices, vectors = [p for p in model.parameters()
                         if p.dim() > 1], [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.5}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95))
    losses, norms = {}, []
    for step in range(6):
        tokens = torch.from_numpy(loader.next(256))
        idx, targets = tokens[:-1].view(8, 32), tokens[1:].clone().view(8, 32)
        if masked:
            targets[targets % 7 == 3] = -1
        logits = model.lm_head(model.transformer.ln_f(hidden(model, idx)))
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.7).item())
        for group in optimizer.param_groups:
            group["lr"] = cfg.max_lr * train_gpt2.lr_multiplier(step, cfg, cfg.max_steps)
        optimizer.step()
        losses[step, "train"] = loss.item()
    assert min(norms) < 1.7 < max(norms)  # Adam would not notice if all steps were scaled alike

    script = tmp_path / "masked.py" if masked else "train_gpt2.py"
    (tmp_path / "masked.py").write_text(MASKED)
    logs, states = [], []
    for run, processes, micro_batch in (("one", 1, 8), ("small", 1, 1), ("two", 2, 2)):
        result = launch(script, *TINY_FLAGS, "--data", data, *flags, "--run_name", run,
                        "--micro_batch", micro_batch, processes=processes)
        assert result.returncode == 0, result.stderr
        logs.append(read_log(tmp_path / "log" / run))
        states.append(torch.load(tmp_path / "log" / run / "ckpt_00006.pt", weights_only=True))
        assert {key: value
                for key, value in logs[-1].items()
                if key[1] == "train"} == pytest.approx(losses, rel=1e-5), run
        assert logs[-1] == pytest.approx(
            logs[0], rel=1e-5) and (4, "val") in logs[0] and (6, "val") in logs[0]
    assert states[0]["loader"] == states[2]["loader"] and states[0]["model"].keys(
    ) == states[2]["model"].keys()


def test_a_speedrun_is_the_same_for_two_processes_and_after_a_stop(launch, data, tmp_path):
    flags = [*TINY_FLAGS[2:], "--preset", "speedrun", "--data", data, "--total_batch_size", 512,
             "--batch_warmup", 1100, "--save_every", 3]
    for run, processes in (("one", 1), ("two", 2), ("resumed", 1), ("resumed", 2)):
        result = launch("train_gpt2.py", *flags, "--run_name", run, processes=processes)
        assert result.returncode == 0, result.stderr
        if run == "resumed" and processes == 1:  # as if it had ended after step 3
            (tmp_path / "log" / run / "ckpt_00006.pt").unlink()
    logs = {run: read_log(tmp_path / "log" / run) for run in ("one", "two", "resumed")}
    assert logs["two"] == pytest.approx(logs["one"], rel=1e-4) and logs["resumed"] == pytest.approx(
        logs["one"], rel=1e-4)
    assert logs["one"][5, "train"] < logs["one"][0, "train"] - 0.5
    # its speed, and so its MFU, knows of the half batches of steps 0 to 3, also in a resumed run
    shown = events(tmp_path / "log" / "one")
    tokens = [
        speed * ms / 1e3
        for (_, speed), (_,
                         ms) in zip(shown["perf/tok_per_sec"], shown["perf/step_ms"], strict=True)
    ]
    assert tokens == pytest.approx([256, 256, 256, 256, 512, 512], rel=1e-5)


def test_a_run_resumed_beyond_its_length_ends(data, tmp_path):
    flags = [*TINY_FLAGS, "--data", str(data), "--log_dir", str(tmp_path)]
    train_gpt2.main([*flags, "--run_name", "long", "--save_every", "4"])
    train_gpt2.main([
        *flags, "--run_name", "short", "--resume",
        str(tmp_path / "long" / "ckpt_00004.pt"), "--max_steps", "3"
    ])
    state = torch.load(tmp_path / "short" / "ckpt_00004.pt", weights_only=True)
    assert state["finished"] and state["step"] == 4


def test_minutes_set_the_length(data, tmp_path):
    flags = [flag for flag in TINY_FLAGS if flag not in ("--max_steps", "6")]
    folder = tmp_path / "short"
    train_gpt2.main([*flags, "--data", str(data), "--log_dir", str(tmp_path), "--run_name", "short",
                     "--minutes", "0.02", "--eval_every", "0"])
    state = torch.load(next(folder.glob("ckpt_*.pt")), weights_only=True)
    assert state["finished"] and state["max_steps"] == state["step"] < 1000
    assert f"\n{state['step'] - 1} train " in (folder / "log.txt").read_text()


def test_minutes_have_a_rate_and_no_eta_before_they_are_measured(data, tmp_path, capsys):
    """A warm-up that is a share of the run cannot be that of a length which is not known; and a run
    extended by minutes knows its speed."""
    at = TINY_FLAGS.index("--max_steps")  # and --warmup_steps behind it
    flags = [
        *TINY_FLAGS[:at], *TINY_FLAGS[at + 4:], "--data",
        str(data), "--log_dir",
        str(tmp_path), "--run_name", "a", "--eval_every", "0"
    ]
    train_gpt2.main([*flags, "--minutes", "0.02"])
    said = capsys.readouterr().out
    assert said.count("ETA unknown") == 2 and " days" not in said
    rates = dict(events(tmp_path / "a")["optim/lr"])
    assert [rates[0], rates[1]] == pytest.approx([5e-3 / 40, 5e-3 * 2 / 40])
    first = len(rates)
    train_gpt2.main([*flags, "--minutes", "0.04"])
    assert "ETA unknown" not in capsys.readouterr().out
    rates = dict(events(tmp_path / "a")["optim/lr"])
    steps = len(rates)  # half of the time is over: its length is fixed
    want = [5e-3 * train_gpt2.lr_multiplier(step, TrainConfig(), steps)
            for step in range(first, steps)]
    assert [rates[step] for step in range(first, len(rates))] == pytest.approx(want)


def test_a_curriculum_longer_than_the_minutes_allow_is_told_once(data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "simple")
    flags = [flag for flag in TINY_FLAGS if flag not in ("--max_steps", "6")]
    flags += [
        "--data",
        str(data), "--curriculum",
        str(tmp_path / "simple"), "--log_dir",
        str(tmp_path), "--minutes", "0.02", "--eval_every", "0"
    ]
    for steps, times in (("900000", 1), ("1", 0)):
        train_gpt2.main([*flags, "--run_name", steps, "--curriculum_steps", steps])
        assert (out := capsys.readouterr().out).count("within the curriculum") == times
        if times:  # in the length that then stands, not in a first guess
            (told,), (last,) = re.findall(r"is longer than the ([\d,]+) steps",
                                            out), re.findall(r"done: .*ckpt_(\d+).pt", out)
            assert int(told.replace(",", "")) == int(last)


def test_a_run_that_ends_within_its_curriculum_goes_on_after_a_stop(data, tmp_path, capsys,
                                                                    monkeypatch):
    shutil.copytree(data, tmp_path / "simple")
    flags = [flag for flag in TINY_FLAGS if flag not in ("--max_steps", "6")]
    flags += [
        "--data",
        str(data), "--curriculum",
        str(tmp_path / "simple"), "--log_dir",
        str(tmp_path), "--minutes", "0.05", "--eval_every", "0", "--run_name", "a",
        "--curriculum_steps", "900000"
    ]
    with monkeypatch.context() as patch:
        patch.setattr(SpikeDetector, "__call__", lambda *_: (
            capsys.readouterr().out.count("within the") and os.kill(os.getpid(), signal.SIGTERM)))
        train_gpt2.main(flags)
    assert "\nstopped at step" in capsys.readouterr().out
    train_gpt2.main(flags)
    assert (out :=
            capsys.readouterr().out).count("within the curriculum") == 1 and "\ndone: " in out


def test_a_modern_run_with_dropout_and_accumulation_is_the_same_again(data, tmp_path, capsys):
    flags = [
        "--preset", "modern", "--max_steps", 5, "--qk_norm", "--dropout", 0.1,
        "--no-tie_embeddings", "--schedule", "wsd", "--grad_clip", 0, "--micro_batch", 2,
        "--eval_every", 0, "--save_every", 0
    ]
    threads = set(threading.enumerate())
    log = read_log(go(data, tmp_path / "modern", *flags))
    # with tensors, it may abort Python's exit
    assert not [thread for thread in set(threading.enumerate()) - threads if thread.daemon]
    assert [kind for _, kind in log] == ["train"] * 5
    assert [p.name for p in (tmp_path / "modern").glob("ckpt*")] == ["ckpt_00005.pt"
                                                                     ]  # the last step, always
    assert "2 sequences x 32 tokens x 4 accumulation steps x 1 processes" in capsys.readouterr().out
    assert read_log(go(data, tmp_path / "again", *flags)) == log


def test_printed_commands_work_with_spaces_and_a_tilde_is_the_home_folder(launch, data, tmp_path):
    (tmp_path / "home").mkdir()
    flags = [
        *TINY_FLAGS, "--max_steps", 3, "--data", data, "--log_dir=~/my log", "--run_name", "a run"
    ]
    result = launch("train_gpt2.py", *flags, env={"HOME": str(tmp_path / "home")})
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "home" / "my log" / "a run"
    tensorboard, generate = (shlex.split(command)
                             for command in re.findall("`(.*?)`",
                                                       result.stdout.splitlines()[-1]))
    assert tensorboard[-1] == str(folder.parent) and not (tmp_path / "~").exists()
    result = launch(*generate[1:], "--max_new_tokens", 1, "--samples", 1)
    assert result.returncode == 0, result.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Other weights to begin with

FROM = [
    "--total_batch_size", "256", "--max_steps", "2", "--warmup_steps", "1", "--val_tokens", "330",
    "--eval_every", "1", "--hellaswag_every", "0", "--sample_every", "0", "--device", "cpu"
]


def begin(name, data, folder, *flags):
    """A run of two steps of the default preset that begins with other weights -> its folder."""
    train_gpt2.main([
        str(word) for word in (*FROM, "--init_from", name, "--data", data, "--log_dir",
                               folder.parent, "--run_name", folder.name, *flags)
    ])
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
    """What transformers computes on the validation tokens, its vocabulary padded to `rows` ids with
    the mean logit."""
    x, y = (torch.from_numpy(part).long()
            for part in read_validation(Shards(data), 330, 32, tokenizer))
    logits = model(x).logits
    missing = rows - logits.size(-1)
    padded = torch.cat([logits, logits.mean(dim=-1, keepdim=True).expand(-1, -1, missing)], dim=-1)
    return F.cross_entropy(padded.flatten(0, 1), y.flatten()).item()


def test_a_run_begins_with_the_weights_of_hugging_faces_gpt2_and_resumes_without_them(
        gpt2_folder, data, tokenizer, tmp_path, capsys):
    folder = begin("gpt2", data, tmp_path / "log" / "a", "--dropout", "0.1")
    before = reference_loss(gpt2_folder, data, tokenizer, 384)
    assert read_log(folder)[0,
                            "val"] == pytest.approx(before,
                                                    rel=1e-4)  # at step 0, as transformers has it
    config = json.loads((folder / "config.json").read_text())
    want = dict(n_layer=2, n_head=2, n_embd=32, block_size=32, pos="learned", mlp="gelu", bias=True,
                dropout=0.1, vocab_size=tokenizer.vocab_size, vocab_multiple=128)
    assert {name: config["model"][name]
            for name in want} == want and config["train"]["init_from"] == "gpt2"
    shutil.rmtree("gpt2")  # what follows has to do without
    begin("gpt2", data, folder, "--max_steps", "4")
    assert "step 2; changed: --max_steps 2 -> 4\n" in capsys.readouterr().out
    assert (3, "train") in read_log(folder)
    with pytest.raises(
            BadInput,
            match="is of a run that began with --init_from gpt2, not --init_from elsewhere"):
        begin("elsewhere", data, folder)


def test_a_run_does_not_begin_with_weights_that_are_not_finite(whole, data, tmp_path):
    state = checkpoint.read(whole("gpt2") / "ckpt_00060.pt")
    state["model"]["transformer.ln_f.weight"] = torch.full((state["model_config"]["n_embd"],),
                                                           math.nan)
    checkpoint.write(tmp_path / "ckpt_00060.pt", state)
    with pytest.raises(BadInput, match="holds weights that are NaN or infinite"):
        begin(tmp_path / "ckpt_00060.pt", data, tmp_path / "log" / "a")
    assert not (tmp_path / "log").exists()


def test_a_run_begins_with_a_run_folder_a_checkpoint_or_an_export(whole, data, tokenizer, tmp_path):
    source = whole("gpt2")
    last = source / "ckpt_00060.pt"
    loss = read_log(source)[60, "val"]
    for name in (source, last):
        folder = begin(name, data, tmp_path / "log" / f"of_{name.name}")
        assert read_log(folder)[0, "val"] == pytest.approx(loss, abs=1e-4)
        state = checkpoint.read(folder / "ckpt_00002.pt")
        assert state["train_config"]["init_from"] == str(
            last) and state["step"] == 2  # with an optimizer of its own:
        assert {float(moments["step"]) for moments in state["optimizer"]["state"].values()} == {2.0}
    begin(source, data, folder, "--max_steps",
          "3")  # goes on, whichever way the beginning is spelled
    model, _, _ = train_gpt2.load_checkpoint(source)
    huggingface.write(model, tokenizer, tmp_path / "exported")
    exported = begin(tmp_path / "exported", data, tmp_path / "log" / "exported")
    assert read_log(exported)[0, "val"] == pytest.approx(
        loss, abs=0.3)  # the rows that pad the vocabulary are new
    short = begin(source, data, tmp_path / "log" / "short", "--block_size", "16")
    assert checkpoint.read(short / "ckpt_00002.pt")["model"]["transformer.wpe.weight"].shape == (16,
                                                                                                 32)


def test_what_does_not_fit_the_weights_to_begin_with_is_refused_before_anything_is_written(
        gpt2_folder, data, tmp_path):
    other = write_data(tmp_path / "other", train_bpe(sentences(300, 5), 290))
    (tmp_path / "empty").mkdir()
    for name, shards, flags, says in (("gpt2", data, ["--n_layer", "3", "--mlp", "swiglu"],
                                       "--n_layer 2 -> 3, --mlp gelu -> swiglu"),
                                      ("gpt2", data, ["--block_size",
                                                      "64"], "--block_size 32 -> 64"),
                                      ("gpt2", data, ["--init", "xavier"], "--init gpt2 -> xavier"),
                                      ("gpt2", other, [], "another tokenizer"),
                                      ("nowhere", data, [], "cannot read nowhere"),
                                      ("empty", data, [],
                                       "holds neither a ckpt_<step>.pt nor a model")):
        with pytest.raises(BadInput) as error:
            begin(name, shards, tmp_path / "log" / "x", *flags)
        assert says in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "log").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


LONG = "x" * 5000  # longer than any file system lets a name be
BAD_FLAGS = [
    (["--epoch", "3"], "unknown flag --epoch: did you mean --epochs"),
    (["--preset", "modem"], "modern"),
    (["--vocab_size", "3"], "unknown flag --vocab_size"),  # set by the data, not by a flag
    (["--data", "nowhere"], "nowhere/ is not there (in /"),
    (["--data", LONG], ""),
    (["--data", "notes.txt"],
     "--data notes.txt is a file, not a folder of shards: name one that fineweb.py --source made"),
    (["--data", "{other}/toy_val_000000.npy"],
     "is a file, not a folder of shards: name the folder that it is in"),
    (["--data", "{other}"], "their ids mean different text"),
    (["--total_batch_size", "352", "--batch_warmup", "1000"],
     "352, which --batch_warmup halves, must be a multiple of 2 x --block_size 32 x 1 processes; 384 is"
     ),
    (["--total_batch_size",
      "250"], "--total_batch_size 250 must be a multiple of --block_size 32 x 1 processes; 256 is"),
    (["--warmup_steps", "6"], "--warmup_steps 6 must be below the run's 6 steps"),
    (["--epochs", "2"], "--epochs and --max_steps each set the length: give one"),
    (["--curriculum_mix", "linear"], "is for a --curriculum"),
    (["--tok_per_sec", "1000"], "--tok_per_sec is for --plan"),
    (["--eval_tasks_limit", "2"], "are for --eval_tasks"),
    (["--tensorboard", "{port}"], "TensorBoard cannot use port {port}"),
    (["--val_tokens", "20"], "validation needs 33 tokens"),
    (["--val_tokens", "20"], "--val_tokens is 20; raise it"),
    (["--device", "mps"], "--device mps"),
    (["--minutes", "1e308"], "--minutes must be above 0 and at most"),
    (["--keep_best", "--eval_every", "0"], "--keep_best needs validations"),
    (["--total_batch_size", "384", "--batch_warmup", "1000", "--micro_batch", "4"],
     "(--total_batch_size 384, which --batch_warmup halves, / --block_size 32 / 1 processes)"),
    (["--hellaswag_every", "2", "--hellaswag_file", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
    # what shapes the weights
    (["--n_embd", "64", "--n_head", "4"], "--n_head 2 -> 4, --n_embd 32 -> 64"),
    (["--n_layer", "3"], "--n_layer 2 -> 3"),
    (["--mlp", "swiglu"], "--mlp gelu -> swiglu"),
    (["--norm", "rmsnorm"], "--norm layernorm -> rmsnorm"),
    (["--pos", "rope"], "--pos learned -> rope"),
    (["--no-bias"], "--bias True -> False"),
    (["--qk_norm"], "--qk_norm False -> True"),
    (["--emb_norm"], "--emb_norm False -> True"),
    (["--no-tie_embeddings"], "--tie_embeddings True -> False"),
    (["--block_size", "16"], "--block_size 32 -> 16"),
    (["--preset", "modern"], "--mlp gelu -> swiglu"),
    # another run
    (["--run_name", ".."], "is not the name of a folder"),
    (["--run_name", ""], "--run_name is empty"),
    (["--run_name", "taken"], "already holds a run"),
    *((["--run_name", "new", *flags], says) for flags, says in (
        (["--n_embd", "33"], "--n_embd 33 must be a multiple"),
        (["--pos", "rope", "--n_embd", "30"], "even head size, not 15"),
        (["--n_layer", "1000", "--n_embd", "65536"], "optimizer state need"),
        (["--max_lr", "1e300"], "--max_lr must be above 0"),
        (["--n_layer", "1e5"], "--n_layer must be"), (["--n_embd", "1e308"], "--n_embd must be"),
        (["--max_steps", "1e18"], "--max_steps must be"),
        (["--log_dir", "notes.txt"], "cannot write to notes.txt/new"), (["--log_dir", LONG], ""),
        (["--resume", LONG], ""), (["--resume", "nowhere.pt"], "cannot read nowhere.pt"),
        (["--resume", "notes.txt"], "notes.txt is not a whole checkpoint"),
        (["--resume", "others.pt"], "others.pt is not a checkpoint of this project"),
        (["--resume", "untrained.pt"], "untrained.pt is not a checkpoint of this project"))),
]


def short(value):
    return " ".join(value)[:40] if isinstance(value, list) else ""


@pytest.fixture(scope="session")
def half_a_run(data, tmp_path_factory):
    """A run folder with the checkpoint of step 4; the tests' flags would go on to 6."""
    return go(data, tmp_path_factory.mktemp("half") / "half", "--max_steps", 4)


@pytest.fixture
def place(tmp_path, tokenizer, half_a_run, monkeypatch):
    """The current folder, with all that BAD_FLAGS name in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("nothing of use\n")
    torch.save(nn.Linear(2, 2).state_dict(), "others.pt")
    tiny_checkpoint(tmp_path / "untrained.pt",
                    tokenizer)  # without an optimizer or a place in the data
    write_data(tmp_path / "other", train_bpe(sentences(200), 270))
    (tmp_path / "log" / "taken").mkdir(parents=True)
    (tmp_path / "log" / "taken" / "config.json").write_text('{"train": {}, "max_steps": 2}')
    (tmp_path / "log" / "taken" / "log.txt").write_text("0 train 5.0\n1 train 4.0\n")
    shutil.copytree(half_a_run, tmp_path / "log" / "half")
    return tmp_path


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("flags, says", BAD_FLAGS, ids=short)
def test_a_bad_start_is_one_line_and_changes_nothing_that_was_there(flags, says, data, place):
    before = contents(place)
    with socket.socket() as listener:
        listener.bind(("0.0.0.0", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(BadInput) as error:
            train_gpt2.main([*TINY_FLAGS, "--data", str(data), "--run_name", "half",
                             *(flag.format(port=port, other="other") for flag in flags)])
    assert says.format(port=port) in str(error.value) and "\n" not in str(error.value)
    after = contents(place)
    assert {name: after.get(name)
            for name in before} == before and not any("ckpt" in name
                                                      for name in after.keys() - before)
    assert sorted(os.listdir(place / "log" / "half")) == sorted(name[9:]
                                                                for name in before
                                                                if name.startswith("log/half/"))


@pytest.mark.parametrize(
    "flags",
    [["--n_embd", "2", "--preset", "modern", "--pos", "learned"],
     ["--block_size", "2", "--val_tokens", "6"], ["--max_lr", "1e6", "--max_skipped", "99"],
     ["--val_tokens", "1e18"], ["--min_lr_frac", "0", "--weight_decay", "1e6"]], ids=short)
def test_odd_sizes_within_the_bounds_train(flags, data, tmp_path):
    go(data, tmp_path / "a", "--sample_every", 2, *flags)
    assert len([kind for _, kind in read_log(tmp_path / "a") if kind == "train"]) == 6
    assert (tmp_path / "a" / "ckpt_00006.pt").exists()


@pytest.mark.parametrize("flags, says",
                         [(["--max_step", 5], "unknown flag --max_step: did you mean --max_steps"),
                          ([*TINY_FLAGS, "--data", "toy"], "toy_train_000002.npy")],
                         ids=["flag", "shard"])
def test_bad_input_of_a_real_process_is_one_line(flags, says, launch, tokenizer, tmp_path):
    path = write_data(tmp_path / "toy", tokenizer) / "toy_train_000002.npy"
    path.write_bytes(path.read_bytes()[:-2])
    result = launch("train_gpt2.py", *flags)
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert result.stderr.startswith("train_gpt2.py: error: ") and says in result.stderr
    assert not list(tmp_path.glob("log/*/ckpt*"))


def test_without_internet_hellaswag_is_left_out_unless_asked_for(
    launch, data, tmp_path, monkeypatch
):
    flags = [*TINY_FLAGS, "--data", data, "--max_steps", 2, "--warmup_steps", 1, "--run_name", "a"]
    at = flags.index("--hellaswag_every")
    del flags[at : at + 2]
    result = launch("train_gpt2.py", *flags, processes=2, env={"https_proxy": "http://127.0.0.1:9"})
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("warning: training goes on without HellaSwag: cannot download") == 1
    assert (1, "train") in read_log(tmp_path / "log" / "a")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(BadInput, match="cannot download HellaSwag"):
        train_gpt2.main([str(word) for word in (*flags[:-1], "b", "--hellaswag_every", 250)])


def test_debug_shows_where_bad_input_was_found(launch, data):
    result = launch("train_gpt2.py", *TINY_FLAGS, "--data", data, "--val_tokens", 20, "--debug")
    assert result.returncode == 2 and result.stdout == ""
    trace, line = result.stderr.strip().rsplit("\n", 1)
    assert trace.startswith(
        "Traceback"
    ) and "in read_validation" in trace and f'File "{ROOT / "train_gpt2.py"}"' in trace
    assert line.startswith("train_gpt2.py: error: validation needs 33 tokens")


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--val_tokens", 20], "validation needs 33 tokens"),  # which all processes meet
        (
            ["--hellaswag_every", 1, "--hellaswag_file", "h.jsonl"],
            "h.jsonl, line 1: ",
        ),  # rank 0 meets it first
    ],
    ids=["all", "first"],
)
def test_bad_input_under_torchrun_is_said_once_and_closes_its_report(
    flags, says, launch, data, tmp_path
):
    (tmp_path / "h.jsonl").write_text("{")
    result = launch("train_gpt2.py", *TINY_FLAGS, "--data", data, *flags, processes=2)
    lines, said = result.stderr.splitlines(), f"train_gpt2.py: error: {says}"
    assert result.returncode != 0 and sum(line.startswith(said) for line in lines) == 1
    assert sum(said in line for line in lines) == 2  # that line, and once in torchrun's report
    assert any(line.strip(" :").startswith("traceback : " + said) for line in lines[-3:])
    frames = [
        line
        for line in lines
        if 'File "' in line and "site-packages" not in line and "<frozen" not in line
    ]
    assert not frames  # torchrun's own traceback is its own business


# ----------------------------------------------------------------------------------------------------------------------
# Steps that go wrong


def test_a_run_that_diverges_ends_in_one_line_with_a_checkpoint_from_before(data, tmp_path):
    with pytest.raises(BadInput,
                       match=r"the last 3 steps were non-finite; .*ckpt_0000\d.pt is from before"):
        go(data, tmp_path / "a", "--max_steps", 90, "--warmup_steps", 0, "--max_lr", 1e6,
           "--grad_clip", 0, "--max_skipped", 3, "--eval_every", 1, "--sample_every",
           1)  # neither validation nor samples end it before


def patch_training(monkeypatch, change):
    """Each training batch's mean loss becomes change(number of the batch, loss) -> list of (batch,
    weights before it)."""
    calls, real = [], GPT.forward

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
    return lambda n, loss: how(loss) if n in steps else loss


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other))


def weights_in(path):
    """The weights in a checkpoint, in the order of GPT.parameters(): a tied head is one with the
    embedding."""
    return list(train_gpt2.load_checkpoint(path)[0].parameters())


@pytest.mark.parametrize("how", [nan_loss, infinite_gradient])
def test_an_update_without_a_finite_loss_or_gradient_is_left_out(how, data, tmp_path, monkeypatch,
                                                                 capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    calls = patch_training(monkeypatch, at({3, 7}, how))
    folder = go(data, tmp_path / "a", "--max_steps", 8)
    log = read_log(folder)
    finite = [n not in (3, 7) or how is infinite_gradient for n in range(8)]
    assert [math.isfinite(log[step, "train"]) for step in range(8)] == finite
    assert ("3 train nan" in (folder / "log.txt").read_text()) == (how is nan_loss)
    weights = [w for _, w in calls] + [weights_in(folder / "ckpt_00008.pt")]
    assert [same(a, b) for a, b in itertools.pairwise(weights)] == [n in (3, 7) for n in range(8)]
    loader = ShardLoader(Shards(data).train, SimpleNamespace(vocab_size=280), None)
    for batch, _ in calls:  # each is read once, the bad ones too
        assert np.array_equal(batch.ravel(), loader.next(256)[:-1])
    state = torch.load(folder / "ckpt_00008.pt", weights_only=True)
    assert (state["step"], state["skipped"]) == (8, 2) and {
        int(s["step"]) for s in state["optimizer"]["state"].values()
    } == {6}
    events = EventAccumulator(str(folder)).Reload()
    assert [e.value for e in events.Scalars("optim/skipped_steps")] == [0, 0, 0, 1, 1, 1, 1, 2]
    out = capsys.readouterr().out
    assert out.count("skipped because non-finite: ") == 2
    assert "; its batch: epoch 0, from token 768 of toy_train_000001.npy" in out
    assert (
        f"step 3 | skipped because non-finite: loss {'nan' if how is nan_loss else log[3, 'train']:.3}"
        in out[:out.index("step 4 |")])


def test_a_checkpoint_due_after_a_skipped_update_comes_later(data, tmp_path, monkeypatch):
    patch_training(monkeypatch, at({3, 4}, nan_loss))
    folder = go(data, tmp_path / "a", "--max_steps", 9, "--save_every", 4, "--eval_every", 0)
    assert steps_saved(folder) == [6, 8, 9]


def test_skipped_updates_that_are_not_in_a_row_do_not_end_a_run(data, tmp_path, monkeypatch):
    patch_training(monkeypatch, at({0, 1, 3, 4, 6, 7}, nan_loss))
    folder = go(data, tmp_path / "a", "--max_steps", 8, "--max_skipped", 3)
    assert torch.load(folder / "ckpt_00008.pt", weights_only=True)["skipped"] == 6


def test_a_run_given_up_leaves_the_checkpoint_from_before(data, half_a_run, tmp_path, monkeypatch):
    shutil.copytree(half_a_run, tmp_path / "half")
    before = (half_a_run / "ckpt_00004.pt").read_bytes()
    calls = patch_training(monkeypatch, at({1, 2, 3}, nan_loss))
    with pytest.raises(
            BadInput,
            match=r"the last 3 steps were non-finite; .*half/ckpt_00004.pt is from before"):
        go(data, tmp_path / "half", "--max_steps", 20, "--max_skipped", 3, "--save_every", 6,
           "--keep_best", "--eval_every", 7)  # which would be of the skipped updates
    assert len(calls) == 4 and [p.name
                                for p in (tmp_path / "half").glob("ckpt*")] == ["ckpt_00004.pt"]
    assert (tmp_path / "half" / "ckpt_00004.pt").read_bytes() == before


def test_a_run_stopped_amid_skipped_updates_is_given_up_by_a_lower_bound(
        data, half_a_run, tmp_path, monkeypatch):
    shutil.copytree(half_a_run, tmp_path / "half")
    checkpoint.write(
        tmp_path / "half" / "ckpt_00004.pt",
        checkpoint.read(half_a_run / "ckpt_00004.pt") | {"skipped": 3, "consecutive_skips": 3})
    calls = patch_training(monkeypatch, at({0}, nan_loss))
    with pytest.raises(BadInput, match="the last 4 steps were non-finite"):
        go(data, tmp_path / "half", "--max_steps", 20, "--max_skipped", 2)
    assert len(calls) == 1


@pytest.mark.parametrize("weights, kept", [((1, 9), True), ((9, 1), False)])
def test_the_best_loss_is_forgotten_when_the_sources_weigh_otherwise(weights, kept, data, tokenizer,
                                                                     tmp_path):
    other, folder = write_data(tmp_path / "other", tokenizer, shards=1), tmp_path / "a"
    flags = ["--keep_best", "--eval_every", 2]
    go(f"{data}:1", folder, "--data", f"{other}:9", "--max_steps", 4, *flags)
    state = checkpoint.read(folder / "ckpt_00004.pt")
    checkpoint.write(folder / "ckpt_00004.pt", state | {"best": [0.1, 4]})
    go(f"{data}:{weights[0]}", folder, "--data", f"{other}:{weights[1]}", "--max_steps", 6, *flags)
    loss, step = checkpoint.read(folder / "ckpt_00006.pt")["best"]
    assert (loss, step) == (0.1, 4) if kept else loss > 1 and step == 6


@pytest.mark.parametrize("first", [0, 3])
def test_a_run_given_up_without_a_checkpoint_writes_one_from_before_the_first_skipped_update(
        first, data, tmp_path, monkeypatch):
    flags = ["--shuffle", "--dropout", 0.1, "--max_skipped", 3]
    whole, folder, saved = go(data, tmp_path / "undisturbed",
                              *flags), tmp_path / "a", tmp_path / "a" / f"ckpt_{first:05d}.pt"
    with monkeypatch.context() as patch:
        calls = patch_training(patch, at(range(first, 99), nan_loss))
        with pytest.raises(
                BadInput,
                match=f"the last 3 steps .*a/{saved.name} is from before: lower --max_lr"):
            go(data, folder, *flags)
    assert len(calls) == first + 3 and list(folder.glob("ckpt*")) == [saved] and same(
        calls[first][1], weights_in(saved))
    state = torch.load(saved, weights_only=True)
    assert (state["step"], state["skipped"]) == (first, 0)
    go(data, folder, *flags)  # the same command goes on from there, as if nothing had been
    assert read_log(folder) == read_log(whole)
    assert same(*(weights_in(run / "ckpt_00006.pt") for run in (folder, whole)))


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


def test_both_processes_skip_what_one_has_no_finite_loss_for(launch, data, tmp_path):
    (tmp_path / "one_rank_fails.py").write_text(ONE_RANK_FAILS)
    flags = [*TINY_FLAGS, "--data", data, "--max_steps", 8, "--run_name", "a", "--micro_batch", 4]
    result = launch(tmp_path / "one_rank_fails.py", *flags, processes=2)
    assert result.returncode == 0, result.stderr
    log, folder = read_log(tmp_path / "log" / "a"), tmp_path / "log" / "a"
    assert [math.isnan(log[step, "train"]) for step in range(8)] == [step == 3 for step in range(8)]
    assert torch.load(folder / "ckpt_00008.pt", weights_only=True)["skipped"] == 2
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert same(*ranks) and all(p.isfinite().all() for p in ranks[0])
    assert same(ranks[0], weights_in(folder / "ckpt_00008.pt"))


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_spike_names_its_batch(shuffle, data, tmp_path, monkeypatch, capsys):
    spikes = {4, 15, 30}  # of the first, too early, nothing can be told
    calls = patch_training(monkeypatch, at(spikes, lambda loss: loss + 5))
    go(data, tmp_path / "a", "--max_steps", 36, "--eval_every", 0,
       *(["--shuffle"] if shuffle else []))
    lines = [line for line in capsys.readouterr().out.splitlines() if "spike:" in line]
    assert [line.split()[1] for line in lines] == ["15", "30"]
    log, files, tokens = read_log(tmp_path / "a"), Shards(data).train, load_tokenizer(
        str(data / "tokenizer.json"))
    for line, step in zip(lines, (15, 30)):
        found = re.search(r"spike: loss ([\d.]+), median before ([\d.]+), spread [\d.]+; "
                          r"its batch: epoch (\d+), from token ([\d,]+) of (\S+?)(, permuted)?$", line)
        assert float(found[1]) == pytest.approx(log[step, "train"], abs=1e-4)
        assert float(found[2]) == pytest.approx(np.median([log[s, "train"] for s in range(step)]),
                                                abs=1e-4)
        assert bool(found[6]) == shuffle
        epoch, index = int(found[3]), [file.name for file in files].index(found[5])
        # read what it names, and nothing else: the batch that the model saw
        order = np.random.default_rng(
            (1337, epoch)).permutation(len(files)).tolist() if shuffle else list(range(len(files)))
        loader = ShardLoader(files, tokens, 1337 if shuffle else None)
        loader.load_state_dict(
            {"epoch": epoch, "shard": order.index(index), "offset": int(found[4].replace(",", ""))})
        assert np.array_equal(loader.next(256)[:-1], calls[step][0].ravel())
    assert epoch > 0  # more than the first pass was tried
    assert SpikeDetector(1.0)(9.0) is None  # of the first losses, nothing can be told
    for threshold, count in ((0.0, 0), (4.0, 1), (6.0, 0)):
        is_spike = SpikeDetector(threshold)
        assert len([line for loss in [2.0] * 12 + [7.0] + [2.0] * 3
                    if (line := is_spike(loss))]) == count


def test_the_time_a_step_waits_for_its_data_is_logged(data, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    real = ShardLoader.next
    monkeypatch.setattr(ShardLoader, "next", lambda self, n: time.sleep(0.2) or real(self, n))
    events = EventAccumulator(str(go(data, tmp_path / "a", "--max_steps", 3, "--eval_every",
                                     0))).Reload()
    waited, took = ([event.value
                     for event in events.Scalars(tag)]
                    for tag in ("perf/data_ms", "perf/step_ms"))
    assert len(waited) == 3 and all(199 < wait <= step
                                    for wait, step in zip(waited, took, strict=True))


def test_deterministic_runs_on_a_cpu_and_changes_nothing_there(launch, data, tmp_path):
    flags = ["--max_steps", 3, "--dropout", 0.1]
    # a process of its own: it is a global switch
    result = launch("train_gpt2.py", *TINY_FLAGS, "--data", data, *flags, "--run_name",
                    "deterministic", "--deterministic")
    assert result.returncode == 0, result.stderr
    plain = go(data, tmp_path / "log" / "plain", *flags)
    assert read_log(plain) == read_log(
        tmp_path / "log" / "deterministic") and not torch.are_deterministic_algorithms_enabled()
    assert json.loads((tmp_path / "log" / "deterministic"
                       / "config.json").read_text())["train"]["deterministic"] is True


def test_a_compiled_run_compiles_each_part_once_and_has_the_losses_of_a_plain_one(
        launch, data, tmp_path):
    flags = [
        "--preset",
        "modern",
        "--n_experts",
        4,
        "--n_shared",
        1,  # the shared expert is a dense MLP
        "--micro_batch",
        4,
        "--eval_every",
        2,
        "--sample_every",
        3,
        "--save_every",
        2
    ]  # 10 rows of validation
    result = launch("train_gpt2.py", *TINY_FLAGS, "--data", data, *flags, "--run_name", "compiled",
                    "--compile", timeout=300)
    assert result.returncode == 0, result.stderr
    assert "was recompiled" not in result.stdout and "recompil" not in result.stderr
    plain = read_log(go(data, tmp_path / "log" / "plain", *flags))
    assert len(plain) == 6 + 3 and read_log(tmp_path / "log" / "compiled") == pytest.approx(
        plain, rel=1e-4)


def test_compile_without_a_compiler_is_one_line(launch, data, tmp_path):
    result = launch("train_gpt2.py", *TINY_FLAGS, "--data", data, "--eval_every", 0, "--compile",
                    timeout=300,
                    env={"CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")})
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert "torch.compile failed (InvalidCxxCompiler" in result.stderr and "or give --no-compile" in result.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_run_on_a_gpu_compiled_in_bf16_and_resumed(deterministic, launch, data, tmp_path):
    """Its checkpoints are copied to the host by a stream of their own while training goes on."""
    flags = [
        *TINY_FLAGS, "--data", data, "--preset", "modern", "--max_steps", 15, "--save_every", 5,
        "--keep", 0, "--dropout", 0.1, "--micro_batch", "auto", "--device", "cuda", "--compile",
        *(["--deterministic"] if deterministic else [])
    ]
    log = tmp_path / "log"
    done = launch("train_gpt2.py", *flags, "--run_name", "whole", timeout=400)
    assert done.returncode == 0, done.stderr
    assert "bfloat16" in done.stdout and "was recompiled" not in done.stdout
    want = read_log(log / "whole")
    assert want[14, "train"] < want[0, "train"] and len(
        [kind for _, kind in want if kind == "train"]) == 15
    model, _, _ = train_gpt2.load_checkpoint(log / "whole" / "ckpt_00015.pt", "cuda")
    idx = torch.randint(0, model.config.vocab_size, (2, 16), device="cuda")
    with devices.autocast(idx.device):
        half = model(idx)
    assert (half - model(idx)).abs().max() < 0.05
    for step in (5, 10):
        shutil.copytree(log / "whole", log / f"from_{step}")
        for later in range(step + 5, 16, 5):
            (log / f"from_{step}" / f"ckpt_{later:05d}.pt").unlink()
        again = launch("train_gpt2.py", *flags, "--run_name", f"from_{step}", timeout=400)
        assert again.returncode == 0, again.stderr
        assert f"step {step - 1} | loss" not in again.stdout and f"step {step} | loss" in again.stdout
        assert read_log(log / f"from_{step}") == pytest.approx(
            want, abs=1.5e-6 if deterministic else 1e-3)
