"""How long a run is: python -m pytest tests/lib/test_budget.py"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny

from lib.budget import (
    StepTimer,
    batch_size,
    days,
    describe,
    hours_and_dollars,
    matmul_flops,
    plan,
    steps_in,
    steps_left,
    steps_of,
    tokens_of,
    warnings,
)
from lib.cli import BadInput
from lib.corpus import Corpus
from train_gpt2 import GPT, GPTConfig, TrainConfig


def length(tokens, batch=256, epochs=1.0, max_steps=None, ratio=None, parameters=None):
    cfg = SimpleNamespace(max_steps=max_steps, minutes=None, epochs=epochs, tokens_per_param=ratio,
                          total_batch_size=batch, batch_warmup=0)
    return steps_of(cfg, tokens, parameters)


def test_steps_are_given_or_follow_from_epochs():
    assert length(10_000_000_000, 524_288) == 19_073  # build-nanogpt's
    assert (length(2560), length(2559), length(2560,
                                               epochs=2.5), length(2560,
                                                                   max_steps=7)) == (10, 9, 25, 7)


def test_a_run_of_days_is_told_before_its_first_step(monkeypatch):
    device = torch.device("cpu")
    assert matmul_flops(device) > 1e6
    monkeypatch.setattr("lib.budget.matmul_flops", lambda device: 50e9)
    model = GPT(tiny())
    steps_per_day = 50e9 * 86_400 / (256 * model.flops_per_token())
    cfg = SimpleNamespace(minutes=None, total_batch_size=256, batch_warmup=0,
                          steps=round(10.2 * steps_per_day))
    processes = SimpleNamespace(world_size=1, main=True, device=device)
    line, = days(cfg, model, processes, 0)
    assert line.startswith(
        "warning: this run takes at least 10 days on this machine, whose matmuls make 50 GFLOP/s: ")
    assert days(cfg, model, SimpleNamespace(world_size=2, main=True, device=device),
                0)[0].count("least 5 days") == 1
    assert days(cfg, model, processes, round(9.5 * steps_per_day)) == []  # resumed near its end
    assert days(cfg, model, SimpleNamespace(world_size=2, main=False, device=device), 0) == []
    cfg.minutes = 1.0
    assert days(cfg, model, processes, 0) == []


def test_a_run_may_begin_with_half_batches():
    cfg = SimpleNamespace(total_batch_size=256, batch_warmup=1000, minutes=1.0, steps=1_000_000)
    assert [batch_size(step, cfg) for step in (0, 6, 7, 99)
            ] == [128, 128, 256, 256]  # 7 halves are 896 of the 1,000 tokens
    assert [tokens_of(steps, cfg) for steps in (0, 6, 7, 10)] == [0, 768, 896, 1664]
    assert [steps_in(tokens, cfg)
            for tokens in (0, 767, 768, 896, 1151, 1152, 1664)] == [0, 5, 6, 7, 7, 8, 10]
    timer = StepTimer(cfg, (0, 0.0))
    assert timer.fit(
        2, 1.0) == 2 + 5 + (59 * 128 - 5 * 128) // 256  # 128 tokens per second, 59 s to go


@pytest.mark.parametrize("tokens, epochs, says", [
    (255, 1.0, "no steps of 256: raise --epochs or lower"),
    (2560, 0.01, "no steps of 256: raise --epochs or lower"),
    (2560, 1e300, "too many steps of 256: lower --epochs or raise"),
    (10**15, 1.0, "too many steps of 256: lower --epochs or raise")])
def test_a_run_without_a_step_or_with_too_many_is_refused(tokens, epochs, says):
    with pytest.raises(BadInput, match=f"are {says} --total_batch_size"):
        length(tokens, epochs=epochs)


def test_the_start_says_parameters_flops_and_batch_arithmetic():
    """2 layers of 4 x 32^2 attention and 8 x 32^2 MLP weights: 6 FLOPs per weight and token, 12 L C
    T for attention."""
    model = GPT(tiny(bias=False))
    weights = sum(p.numel() for name, p in model.named_parameters() if "wpe" not in name)
    flops = 6 * weights + 12 * 2 * 32 * 16
    cfg = SimpleNamespace(steps=10, minutes=None, total_batch_size=128, batch_warmup=0, data="toy",
                          val_tokens=100, sequences=2, curriculum_steps=None, init_from=None)
    shards = SimpleNamespace(folder="toy", train=["a", "b"], tokens={"train": 640, "val": 50})
    corpus = SimpleNamespace(sources=[SimpleNamespace(shards=shards)], tokens=shards.tokens,
                             is_mixed=False)
    corpus.describe, corpus.most_repeated = partial(Corpus.describe,
                                                    corpus), lambda tokens: (tokens / 640, "toy")
    processes = SimpleNamespace(world_size=2, device=next(model.parameters()).device)
    lines = describe(cfg, model, corpus, processes).splitlines()
    assert lines[0] == (f"model   {weights + 16 * 32:,} parameters: embedding {80 * 32:,}, 2 layers of "
                        f"{12 * 32**2 + 2 * 32:,}; vocabulary 61, padded to 64; {flops / 1e6:,.1f} MFLOPs per token")
    assert lines[1] == "data    toy: 640 train tokens in 2 shards, validation on 48"
    ratio = 1280 / (weights + 16 * 32)
    assert lines[2] == ("length  10 steps of 128 tokens = 1,280 tokens (2.00 epochs of toy, "
                        f"{ratio:,.4g} tokens per parameter), {1280 * flops:.2e} FLOPs")
    assert lines[3] == "batch   2 sequences x 16 tokens x 2 accumulation steps x 2 processes"
    assert lines[4].startswith("device  cpu, ") and len(lines) == 5
    cfg.batch_warmup, cfg.sequences = 300, 2  # 4 steps of 64 tokens
    lines = describe(cfg, model, corpus, processes).splitlines()
    assert lines[2].startswith(
        "length  10 steps of 128 tokens, of 64 in the first 4 = 1,024 tokens (1.60 epochs of toy, ")
    assert lines[3] == ("batch   2 sequences x 16 tokens x 1 accumulation steps x 2 processes; "
                        "twice the accumulation from step 4 on")
    cfg.steps = 4  # none of them of the whole batch
    lines = describe(cfg, model, corpus, processes).splitlines()
    assert lines[2].startswith(
        "length  4 steps of 64 tokens, half of --total_batch_size = 256 tokens (0.40 epochs of toy, "
    )
    cfg.batch_warmup = 0
    cfg.steps = round(1000 * (weights + 16 * 32) / 128)
    assert ", 1,000 tokens per parameter)" in describe(cfg, model, corpus, processes)
    cfg.steps = 21
    assert "\nwarning: 4.2 epochs of toy, more than 4" in describe(cfg, model, corpus, processes)


def test_a_run_that_ends_within_its_batch_warm_up_says_so():
    corpus = SimpleNamespace(most_repeated=lambda tokens: (tokens / 10**6, "toy"))
    cfg = SimpleNamespace(steps=4, minutes=None, total_batch_size=128, batch_warmup=256,
                          curriculum_steps=None)
    (line,) = warnings(cfg, corpus)
    assert line.startswith(
        "warning: all 4 steps are of half of --total_batch_size: the run ends within its --batch_warmup"
    )
    cfg.steps = 5
    assert warnings(cfg, corpus) == []


def test_minutes_become_steps_at_the_measured_speed():
    cfg = SimpleNamespace(minutes=1.0, steps=10**6, total_batch_size=100, batch_warmup=0)
    timer, step, spent = StepTimer(cfg, (0, 0.0)), 1, 0.0
    while step < cfg.steps:
        seconds = 0.2 if step < 50 else 0.1  # it becomes faster while the length is still fitted
        step, spent = step + 1, spent + seconds
        timer.fit(step, seconds)
        if step == 80:  # stopped and resumed: what was timed goes with the checkpoint
            timer = StepTimer(cfg, timer.timed)
    assert timer.timed == (
        100 *
        (step - 1), pytest.approx(spent)) and 45 < spent < 60  # the slow steps count in the mean
    plain = SimpleNamespace(minutes=None, steps=7)
    assert StepTimer(plain, (0, 0.0)).fit(3, 1.0) == 7


def test_tokens_per_parameter_count_the_embeddings():
    """Chinchilla itself: 70B parameters on 1.4T tokens (Hoffmann et al. 2022, table 1).
    GPT-2: 124,475,904 with the padded embeddings."""
    assert length(10**10, batch=2**20, ratio=20,
                  parameters=70 * 10**9) == 1_400_000_000_000 // 2**20
    gpt2 = GPT(GPTConfig()).parameter_counts()["total"]
    assert length(10**10, batch=524_288, ratio=20, parameters=gpt2) == 20 * 124_475_904 // 524_288
    with pytest.raises(BadInput, match="0.001 tokens for each of 1,000 parameters are no steps of 256: "
                                       "raise --tokens_per_param"):
        length(10**10, ratio=0.001, parameters=1000)
    with pytest.raises(BadInput, match="write vocab_size into the meta.json"):
        length(10**10, ratio=20)


def test_the_plan_by_hand():
    """Rows of two models; hours only with a measurement, those of the other model at the same
    FLOP/s."""
    models = {"a": GPT(tiny()), "b": GPT(tiny(n_layer=4))}
    cfg = SimpleNamespace(total_batch_size=1024, batch_warmup=0, tok_per_sec=None,
                          price_per_hour=2.0, tokens_per_param=30.0)
    head = plan(cfg, models, "a").splitlines()
    assert "dollars" not in head[1] and head[0].endswith(
        f"a vocabulary of {models['a'].config.vocab_size:,}")
    cfg.tok_per_sec = 50.0
    rows = [line.split() for line in plan(cfg, models, "a").splitlines()[2:-1]]
    assert [(row[0], row[3]) for row in rows] == [(name, ratio)
                                                  for name in "ab"
                                                  for ratio in ("8", "12", "20", "30", "40")]
    for name, *numbers in rows:
        total, inner, ratio, tokens, steps = (int(number.replace(",", ""))
                                              for number in numbers[:5])
        counts, flops = models[name].parameter_counts(), models[name].flops_per_token()
        assert (total, inner, tokens, steps) == (
            counts["total"], total - counts["embedding"], ratio * total, ratio * total // 1024)
        hours = tokens / 50 / 3600 * flops / models["a"].flops_per_token()
        assert numbers[5:] == [f"{tokens * flops:.2e}", f"{'~' * (name == 'b')}{hours:,.1f}",
                               f"{'~' * (name == 'b')}{2 * hours:,.2f}"]


def test_the_plan_does_not_repeat_a_size_under_the_name_of_a_preset():
    """Heads change neither parameters nor FLOPs; layers do."""
    cfg = SimpleNamespace(total_batch_size=1024, batch_warmup=0, tok_per_sec=50.0,
                          price_per_hour=None, tokens_per_param=None)
    models = {"a": GPT(tiny()), "b": GPT(tiny(n_layer=4))}
    assert plan(cfg, models | {"own": GPT(tiny(n_head=4))}, "own") == plan(cfg, models, "a")
    assert plan(cfg, models | {"own": GPT(tiny(n_layer=3))}, "own").count("\nown ") == 4


def test_hours_and_dollars():
    assert hours_and_dollars(5400, None) == "90.0 minutes"
    assert hours_and_dollars(9000, 2.5) == "2.50 hours, $6.25 at $2.5 per hour"


@pytest.mark.parametrize("flag, steps", [("max_lr", 43), ("epochs", None), ("data", None),
                                         ("replay", None)])
def test_a_run_keeps_its_length_unless_a_flag_sets_another(flag, steps):
    resume = SimpleNamespace(state={"max_steps": 43, "train_config": {}})
    assert steps_left(TrainConfig(), {flag}, resume) == steps
