"""The plan of a run, and checks across settings: python -m pytest tests/lib/test_plan.py"""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from lib.budget import UNMEASURED
from lib.cli import BadInput
from lib.plan import Settings, check_batch, check_flags, make_plan, steps_left
from train_gpt2 import GPTConfig, TrainConfig

CFG = TrainConfig(total_batch_size=256, max_steps=40, warmup_steps=0)
MODEL = GPTConfig(block_size=32)
CORPUS = SimpleNamespace(tokens={"train": 2560}, check_length=lambda cfg, steps: None)


def plan(cfg, world_size=1, resume=None, explicit=()):
    return make_plan(Settings(cfg, MODEL, set(explicit), resume), CORPUS, None, world_size)


def resumed(step=10, **train_config):
    state = {"step": step, "max_steps": 43, "train_config": train_config}
    return SimpleNamespace(state=state)


def test_a_plan_by_hand():
    made = plan(replace(CFG, eval_every=7, sample_every=9), world_size=2)
    assert (made.steps, made.block_size, made.rows) == (40, 32, 4)
    assert (made.eval_every, made.sample_every, made.micro_batch) == (7, 9, None)
    assert plan(replace(CFG, max_steps=None)).steps == 10  # one epoch
    halved = plan(replace(CFG, batch_warmup=1000))
    assert (halved.rows, halved.most_rows) == (4, 8)


@pytest.mark.parametrize("micro_batch, first", [(1, 1), (4, 4), (8, 4), (12, 12), (24, 12)])
def test_half_batches_are_divided_evenly(micro_batch, first):
    cfg = replace(CFG, total_batch_size=32 * 24, batch_warmup=10_000, micro_batch=micro_batch)
    check_batch(cfg, 32, world_size=1)
    made = replace(plan(cfg), micro_batch=micro_batch)
    assert made.first_micro_batch == first


def test_a_context_that_has_no_quarter_is_refused():
    cfg = replace(CFG, context_warmup=0.5)
    check_batch(cfg, 32, world_size=1)
    with pytest.raises(BadInput, match="--context_warmup .* --block_size 2"):
        check_batch(cfg, 2, world_size=1)


def test_unset_intervals_are_ten_validations_with_samples():
    cfg = replace(CFG, eval_every=None, sample_every=None)
    assert plan(replace(cfg, max_steps=41)).eval_every == 5
    assert plan(replace(cfg, eval_every=7)).sample_every == 7


def test_the_length_of_minutes_is_unknown_until_steps_were_timed():
    cfg = replace(CFG, max_steps=None, minutes=1.0)
    assert plan(cfg).steps == UNMEASURED
    was = resumed(minutes=2.0)
    assert plan(cfg, resume=was, explicit={"minutes"}).steps == UNMEASURED
    was.state["timed"] = (256 * 10, 10.0)  # a step per second
    assert plan(cfg, resume=was, explicit={"minutes"}).steps == 60
    same = resumed(minutes=1.0, total_batch_size=256)
    assert plan(cfg, resume=same, explicit={"minutes"}).steps == 43


@pytest.mark.parametrize("flag, steps", [("max_lr", 43), ("epochs", None), ("data", None),
                                         ("replay", None)])
def test_a_run_keeps_its_length_unless_a_flag_sets_another(flag, steps):
    assert steps_left(Settings(TrainConfig(), GPTConfig(), {flag}, resumed())) == steps


@pytest.mark.parametrize("changes, explicit, says", [
    ({}, {"eval_tasks_limit"}, "--eval_tasks_limit need --eval_tasks"),
    ({}, {"max_steps", "epochs"}, "--epochs and --max_steps each set the length"),
    ({}, {"curriculum_mix"}, "--curriculum_mix needs --curriculum"),
    ({}, {"tok_per_sec"}, "--tok_per_sec is for --plan"),
    ({}, {"n_active", "router"}, "--n_active, --router: only for Mixture of Experts"),
    ({"keep_best": True, "eval_every": 0}, {"keep_best"}, "--keep_best needs validations"),
    ({"warmup_steps": 40}, {"warmup_steps"}, "--warmup_steps 40 must be below"),
])
def test_flags_that_exclude_or_need_each_other(changes, explicit, says):
    with pytest.raises(BadInput, match=says):
        check_flags(Settings(replace(CFG, **changes), MODEL, explicit), 40)


@pytest.mark.parametrize("micro_batch, processes, says", [
    (1, 4, None), (2, 2, None), ("auto", 1, None),
    ("auto", 3, "x 3 processes; 6144 is"),
    ("auto", 16, "fewer than 16 processes"),
    (3, 2, "--micro_batch 3 must divide the 2 sequences .* / 2 processes"),
    (4, 2, "--micro_batch 4 must divide the 2"),
])
def test_a_step_is_divided_evenly(micro_batch, processes, says):
    cfg = replace(CFG, total_batch_size=4096, micro_batch=micro_batch)  # 4 sequences of 1,024
    if says is None:
        check_batch(cfg, 1024, processes)
        return
    with pytest.raises(BadInput, match=says):
        check_batch(cfg, 1024, processes)
