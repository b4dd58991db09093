"""The lines before a run's first step: python -m pytest tests/lib/test_description.py"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny

from lib.corpus import Corpus
from lib.description import days, describe, matmul_flops, warnings
from lib.plan import RunPlan
from train_gpt2 import GPT

DEVICE = torch.device("cpu")
PROCESSES = SimpleNamespace(world_size=2, main=True, device=DEVICE)


def settings(**changes):
    defaults = dict(minutes=None, total_batch_size=128, batch_warmup=0, data="toy", val_tokens=100,
                    curriculum_steps=None, init_from=None)
    return SimpleNamespace(**defaults | changes)


def plan(steps=10, rows=4):
    return RunPlan(steps, block_size=16, rows=rows, most_rows=4, eval_every=0, sample_every=0,
                   micro_batch=2)


class Toy:
    """A Corpus of one folder of 640 tokens."""

    shards = SimpleNamespace(folder="toy", train=["a", "b"], tokens={"train": 640, "val": 50},
                             is_finished=True)
    sources = (SimpleNamespace(shards=shards),)
    is_mixed = False
    describe = Corpus.describe

    def most_repeated(self, tokens):
        return tokens / 640, "toy"


@pytest.fixture(scope="module")
def model():
    return GPT(tiny(bias=False))


def lines(model, cfg, its_plan):
    return describe(cfg, its_plan, model, Toy(), PROCESSES).splitlines()


def test_parameters_flops_and_batch_arithmetic(model):
    """2 layers of 4 x 32^2 attention and 8 x 32^2 MLP weights: 6 FLOPs per weight and token, 12 L C
    T for attention."""
    weights = sum(p.numel() for name, p in model.named_parameters() if "wpe" not in name)
    total = weights + 16 * 32
    flops = 6 * weights + 12 * 2 * 32 * 16
    about_model, about_data, length, batch, device = lines(model, settings(), plan())
    assert about_model == (
        f"model   {total:,} parameters: embedding {80 * 32:,}, 2 layers of "
        f"{12 * 32**2 + 2 * 32:,}; vocabulary 61, padded to 64; "
        f"{flops / 1e6:,.1f} MFLOPs per token")
    assert about_data == "data    toy: 640 train tokens in 2 shards, validation on 48 tokens"
    assert length == (f"length  10 steps of 128 tokens = 1,280 tokens (2.00 epochs of toy, "
                      f"{1280 / total:,.4g} tokens per parameter), {1280 * flops:.2e} FLOPs")
    assert batch == "batch   2 sequences x 16 tokens x 2 accumulation steps x 2 processes"
    assert device.startswith("device  cpu, ")


def test_half_batches_in_the_description(model):
    cfg = settings(batch_warmup=300)  # 4 steps of 64 tokens
    _, _, length, batch, _ = lines(model, cfg, plan(rows=2))
    assert length.startswith("length  10 steps of 128 tokens, of 64 in the first 4 = 1,024 tokens "
                             "(1.60 epochs of toy, ")
    assert batch == ("batch   2 sequences x 16 tokens x 1 accumulation steps x 2 processes; "
                     "twice the accumulation from step 4 on")
    batch = lines(model, cfg, replace(plan(rows=2), micro_batch=4))[3]
    assert batch == ("batch   2 sequences x 16 tokens x 1 accumulation steps x 2 processes; "
                     "4 sequences x 1 accumulation steps from step 4 on")
    length = lines(model, cfg, plan(steps=4, rows=2))[2]  # none of the whole batch
    assert length.startswith("length  4 steps of 64 tokens, half of --total_batch_size = 256 "
                             "tokens (0.40 epochs of toy, ")


def test_many_epochs_are_warned_about(model):
    assert not [line for line in lines(model, settings(), plan(steps=20)) if "warning" in line]
    warned = [line for line in lines(model, settings(), plan(steps=21)) if "warning" in line]
    assert len(warned) == 1 and warned[0].startswith("warning: 4.2 epochs of toy, more than 4")


def test_a_run_that_ends_within_its_batch_warm_up_is_warned_about():
    corpus = SimpleNamespace(most_repeated=lambda tokens: (tokens / 10**6, "toy"))
    cfg = settings(batch_warmup=256)
    (line,) = warnings(cfg, corpus, 4)
    assert "--batch_warmup" in line
    assert warnings(cfg, corpus, 5) == []


def test_a_run_of_days_is_warned_about(model, monkeypatch):
    assert matmul_flops(DEVICE) > 0
    monkeypatch.setattr("lib.description.matmul_flops", lambda device: 50e9)
    alone = SimpleNamespace(world_size=1, main=True, device=DEVICE)
    other = SimpleNamespace(world_size=2, main=False, device=DEVICE)
    per_day = 50e9 * 86_400 / (256 * model.flops_per_token())
    steps = round(10.2 * per_day)
    cfg = settings(total_batch_size=256)
    (line,) = days(cfg, steps, model, alone, 0)
    assert "at least 10 days" in line
    (line,) = days(cfg, steps, model, PROCESSES, 0)
    assert "at least 5 days" in line
    assert days(cfg, steps, model, alone, round(9.5 * per_day)) == []  # resumed near its end
    assert days(cfg, steps, model, other, 0) == []
    assert days(settings(minutes=1.0), steps, model, alone, 0) == []
