"""fp16 and its loss scale: python -m pytest tests/lib/test_precision.py

torch's CPU autocast stands in for a GPU before Ampere.
"""

import math

import pytest
import torch
from helpers import read_log
from runs import assert_same_runs, cut, events, final, run_script, train

from lib import checkpoint, precision
from lib.cli import BadInput
from lib.precision import Precision
from train_gpt2 import GPT

FP16 = ["--dtype", "fp16"]
MUON = ["--optimizer", "muon", "--preset", "speedrun", "--n_embd", 32, "--n_head", 2,
        "--block_size", 16, "--n_layer", 2, "--total_batch_size", 256, "--batch_warmup", 0]
KINDS = {"adamw": ["--preset", "modern"], "muon": MUON}
TOO_LARGE = 2.0**40


@pytest.fixture
def overflowing(monkeypatch):
    """The first steps overflow."""
    monkeypatch.setattr(precision, "START", TOO_LARGE)


def model_in(dtype):
    model = torch.nn.Linear(2, 2)
    model.autocast_dtype = dtype
    return model


def fill(parameters, value):
    for p in parameters:
        p.grad = torch.full_like(p, value)


# --------------------------------------------------------------------------------------------------
# The scale


@pytest.mark.parametrize("dtype", ["auto", "bf16", "fp32"])
def test_without_fp16_there_is_no_scale(dtype):
    model = model_in(dtype)
    state = Precision(model)
    fill(model.parameters(), 1.0)
    state.unscale(list(model.parameters()))
    state.grow()
    assert not state.overflowed(1.0)
    assert state.scale == 1.0
    assert state.state_dict() == state.scalars() == {}
    assert all((p.grad == 1).all() for p in model.parameters())


def test_the_scale_follows_torch_s_grad_scaler(monkeypatch):
    monkeypatch.setattr(precision, "INTERVAL", 3)
    model = model_in("fp16")
    parameters = list(model.parameters())
    ours = Precision(model)
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    torchs = torch.amp.GradScaler("cpu", init_scale=ours.scale, growth_interval=3)
    for finite in (1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1):
        scaled = 5.0 * ours.scale if finite else math.inf
        fill(parameters, scaled)
        torchs.scale(torch.ones(()))
        torchs.step(optimizer)
        torchs.update()
        fill(parameters, scaled)
        ours.unscale(parameters)
        if finite:
            assert all((p.grad == 5.0).all() for p in parameters)
            ours.grow()
        else:
            assert ours.overflowed(1.0)
        assert ours.scale == torchs.get_scale()
    assert ours.adjustments == 3
    again = Precision(model, ours.state_dict()["loss_scale"])
    assert vars(again) == vars(ours)


def test_what_the_scale_cannot_cause_is_not_an_overflow():
    state = Precision(model_in("fp16"))
    assert not state.overflowed(math.nan)
    assert state.scale == precision.START
    state.scale = precision.LEAST
    assert not state.overflowed(1.0)


# --------------------------------------------------------------------------------------------------
# Runs


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_fp32(kind, data, tmp_path):
    """Closer than bf16's, which has fewer digits."""
    logs = {}
    for dtype in ("fp32", "bf16", "fp16"):
        folder = train(data, tmp_path / dtype, *KINDS[kind], "--max_steps", 20, "--dtype", dtype)
        logs[dtype] = list(read_log(folder).values())
    exact = torch.tensor(logs["fp32"])
    distance = {dtype: (torch.tensor(log) - exact).abs().mean() for dtype, log in logs.items()}
    assert 0 < distance["fp16"] < distance["bf16"] < 0.01 * exact.mean()


def test_an_overflow_is_not_a_non_finite_step(overflowing, data, tmp_path, capsys):
    folder = train(data, tmp_path / "a", *FP16, "--max_steps", 40, "--max_skipped", 2)
    out = capsys.readouterr().out
    state = final(folder)
    adjustments = state["loss_scale"]["adjustments"]
    assert 3 < adjustments < 35
    assert state["loss_scale"]["scale"] == TOO_LARGE / 2**adjustments
    assert state["skipped"] == 0
    assert out.count("skipped because fp16 overflowed") == adjustments
    assert "non-finite" not in out
    for moments in state["optimizer"]["state"].values():
        assert int(moments["step"]) == 40 - adjustments
    assert events(folder)["optim/scale_adjustments"][-1][1] == adjustments
    losses = list(read_log(folder).values())
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [8, 24])
def test_a_resumed_run_is_as_one_that_was_not_stopped(kind, step, overflowing, data, tmp_path):
    """Stopped while the scale is falling (8), and later."""
    flags = [*KINDS[kind], *FP16, "--max_steps", 40]
    whole = train(data, tmp_path / "whole", *flags)
    assert final(whole)["loss_scale"]["adjustments"] > 8
    folder = cut(whole, tmp_path / "again" / "whole", step)
    train(data, folder, *flags)
    assert_same_runs(folder, whole)


def test_two_processes_overflow_together(data, tmp_path):
    """They train as one process does, from a scale that is too large on.

    DDP divides by their number, so that of one process is twice as large.
    """
    start = train(data, tmp_path / "start", *FP16, "--max_steps", 8)
    path = checkpoint.path_of(start, 8)
    state = torch.load(path, weights_only=True)
    results = []
    for processes in (1, 2):
        state["loss_scale"]["scale"] = TOO_LARGE / processes
        checkpoint.write(path, state)
        name = f"on_{processes}"
        flags = ["--resume", start, "--log_dir", tmp_path, "--run_name", name, "--max_steps", 40]
        done = run_script("train_gpt2.py", *flags, cwd=tmp_path, processes=processes)
        assert done.returncode == 0, done.stderr
        results.append((list(read_log(tmp_path / name).values()), final(tmp_path / name)))
    (one, state), (two, other_state) = results
    assert two == pytest.approx(one, rel=1e-3)
    adjustments = state["loss_scale"]["adjustments"]
    assert adjustments == other_state["loss_scale"]["adjustments"] > 3
    assert state["skipped"] == other_state["skipped"] == 0


def test_gradients_that_no_scale_makes_finite_end_the_run(data, tmp_path, monkeypatch):
    forward = GPT.forward

    def broken(self, idx, targets=None, *rest, **named):
        loss = forward(self, idx, targets, *rest, **named)
        if targets is not None and loss.requires_grad:
            loss.register_hook(lambda grad: grad * math.inf)
        return loss

    monkeypatch.setattr(GPT, "forward", broken)
    with pytest.raises(BadInput, match="the last 3 steps were non-finite.*--dtype fp32"):
        train(data, tmp_path / "a", *FP16, "--max_steps", 60, "--max_skipped", 3)


def test_the_checkpoint_from_before_non_finite_steps_counts_no_later_overflow(
        data, tmp_path, monkeypatch):
    """The loss is non-finite in the first two steps and the fourth; the third overflows."""
    forward = GPT.forward
    factors = iter((math.nan, math.nan, math.inf, math.nan))

    def broken(self, idx, targets=None, *rest, **named):
        loss = forward(self, idx, targets, *rest, **named)
        if not loss.requires_grad:
            return loss
        factor = next(factors)
        if factor == math.inf:
            loss.register_hook(lambda grad: grad * factor)
            return loss
        return loss * factor

    with monkeypatch.context() as patch:
        patch.setattr(GPT, "forward", broken)
        with pytest.raises(BadInput, match="the last 3 steps were non-finite"):
            train(data, tmp_path / "a", *FP16, "--micro_batch", 8, "--max_skipped", 3)
    state = final(train(data, tmp_path / "a", *FP16, "--micro_batch", 8))
    assert state["loss_scale"] == {"scale": precision.START, "good_steps": state["step"],
                                   "adjustments": 0}


def test_a_run_continues_in_another_dtype(overflowing, data, tmp_path):
    """Its optimizer has made no step yet."""
    start = train(data, tmp_path / "a", *FP16, "--max_steps", 4)
    assert final(start)["loss_scale"]["adjustments"] == 4
    state = final(train(data, start, "--dtype", "bf16", "--max_steps", 12))
    assert state["step"] == 12
    assert state["loss_scale"]["adjustments"] == 4


def test_flags_of_a_missing_dtype(data, tmp_path):
    with pytest.raises(BadInput, match="--dtype"):
        train(data, tmp_path / "a", "--dtype", "fp8")
