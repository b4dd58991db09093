"""Settings that a resumed run takes from its checkpoint; whole runs are resumed in
test_run_folder.py. Run: python -m pytest tests/lib/test_resume.py"""

from dataclasses import asdict, replace

import pytest
import torch

from lib.cli import BadInput
from lib.resume import Resume, leaves, load_optimizer, may_change, merge
from train_gpt2 import GPTConfig, TrainConfig


def resume(train=None, model=None, **state):
    """A Resume of a finished run of the gpt2 preset."""
    train_config = asdict(replace(TrainConfig(preset="gpt2"), **(train or {})))
    model_config = asdict(replace(GPTConfig(), **(model or {})))
    defaults = {"step": 9, "max_steps": 9, "loader": {"epoch": 0}, "optimizer": {},
                "tokenizer": "gpt2"}
    state = {"train_config": train_config, "model_config": model_config, **defaults, **state}
    return Resume("ckpt_00009.pt", state, {9})


def test_explicit_settings_win_over_the_checkpoint_and_that_over_presets():
    before = resume(train=dict(max_lr=0.5, seed=7), model=dict(dropout=0.1))
    cfg = TrainConfig(max_lr=0.25, seed=3, run_name="mine")
    model_cfg = GPTConfig(dropout=0.2)
    cfg, model_cfg = before.adopt(cfg, model_cfg, {"max_lr", "dropout"})
    assert (cfg.max_lr, cfg.seed, cfg.run_name) == (0.25, 7, "mine")
    assert model_cfg.dropout == 0.2
    assert before.changed == ["--max_lr 0.5 -> 0.25", "--dropout 0.1 -> 0.2"]


@pytest.mark.parametrize("train, model, explicit", [
    ({}, dict(n_layer=3), {"n_layer"}),
    (dict(optimizer="muon"), {}, {"optimizer"}),
])
def test_settings_that_the_weights_depend_on_are_refused(train, model, explicit):
    cfg = replace(TrainConfig(), **train)
    model_cfg = replace(GPTConfig(), **model)
    with pytest.raises(BadInput, match=f"--{explicit.copy().pop()}"):
        resume().adopt(cfg, model_cfg, explicit)


def test_other_initial_weights_are_refused():
    begun = resume(train=dict(init_from="gpt2"))
    cfg = TrainConfig(init_from="gpt2-xl")
    with pytest.raises(BadInput, match="--init_from gpt2, not --init_from gpt2-xl"):
        begun.adopt(cfg, GPTConfig(), {"init_from"})
    cfg, _ = begun.adopt(TrainConfig(), GPTConfig(), set())
    assert cfg.init_from == "gpt2"


@pytest.mark.parametrize("state", [
    dict(step=-1), dict(step=2.5), dict(skipped="1"), dict(max_steps=2**62), dict(optimizer=[]),
    dict(tokenizer=None), dict(loader={"epoch": [0, -1]}), dict(best=[float("nan"), 3]),
])
def test_a_state_that_is_not_of_a_run_is_refused(state):
    with pytest.raises(TypeError):
        resume(**state).adopt(TrainConfig(), GPTConfig(), set())


def test_a_setting_newer_than_the_checkpoint_is_off():
    before = asdict(GPTConfig(n_layer=3))
    del before["token_shift"]
    config, changed, misfits = merge(GPTConfig(token_shift=True), before, set(), set())
    assert (config.token_shift, config.n_layer, changed, misfits) == (False, 3, [], [])


def test_a_value_out_of_bounds_is_refused():
    with pytest.raises(BadInput, match="--n_layer must be above 0"):
        merge(GPTConfig(), {"n_layer": 0}, set(), set())


def test_what_trained_weights_do_not_depend_on():
    learned = dict(pos="learned", block_size=64, balance="bias")
    assert may_change(learned) == {"dropout", "init", "router_z_loss"}
    assert "block_size" in may_change(learned, block_size=32)
    assert "block_size" not in may_change(learned, block_size=128)
    assert may_change(learned | dict(pos="rope", balance="loss")) >= {"block_size", "balance"}


def test_leaves():
    assert leaves({"a": [1, (2, 3)], "b": {"c": 4}}) == [1, 2, 3, 4]


@pytest.mark.parametrize("damage", ["shape", "nan", "count", "missing"])
def test_damaged_moments_are_refused(damage):
    p = torch.nn.Parameter(torch.ones(2, 3))
    optimizer = torch.optim.AdamW([p], lr=0.1)
    p.grad = torch.ones(2, 3)
    optimizer.step()
    state = optimizer.state_dict()
    load_optimizer(optimizer, state, updates=1)
    moments = state["state"][0]
    if damage == "shape":
        moments["exp_avg"] = torch.ones(3, 2)
    elif damage == "nan":
        moments["exp_avg"] = torch.full((2, 3), float("nan"))
    elif damage == "count":
        moments["step"] = torch.tensor(-1.0)
    else:
        del moments["exp_avg_sq"]
    with pytest.raises(ValueError, match="shape \\(2, 3\\)"):
        load_optimizer(optimizer, state, updates=1)
