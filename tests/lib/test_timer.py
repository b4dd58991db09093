"""--minutes become steps at the measured speed: python -m pytest tests/lib/test_timer.py"""

from types import SimpleNamespace

import pytest

from lib.budget import UNMEASURED, half_steps
from lib.timer import StepTimer


def test_the_length_follows_the_speed_for_a_quarter_of_the_minutes():
    cfg = SimpleNamespace(minutes=1.0, total_batch_size=100, batch_warmup=0, context_warmup=0.0)
    timer = StepTimer(cfg, UNMEASURED)
    step, spent = 1, 0.0
    while step < timer.steps:
        seconds = 0.2 if step < 50 else 0.1  # it becomes faster while the length still follows
        step += 1
        spent += seconds
        timer.update(step, seconds)
        if step == 80:  # stopped and resumed: what was timed is in the checkpoint
            timer = StepTimer(cfg, timer.steps, timer.timed)
    assert timer.is_fixed
    assert timer.timed[:2] == (100 * (step - 1), pytest.approx(spent))
    assert 45 < spent < 60  # the slow steps count in the mean


def test_the_length_follows_the_speed_until_the_whole_context_was_timed():
    cfg = SimpleNamespace(minutes=1.0, total_batch_size=100, batch_warmup=0, context_warmup=0.75)
    timer = StepTimer(cfg, UNMEASURED)
    step, spent = 1, 0.0
    while step < timer.steps:
        seconds = 0.1 if step < 0.75 * timer.steps else 0.11  # the whole context takes longer
        step += 1
        spent += seconds
        timer.update(step, seconds)
        assert timer.is_fixed == (spent >= 0.9 * 60)
    assert spent == pytest.approx(60, rel=0.02)


def test_half_batches_count_half():
    cfg = SimpleNamespace(total_batch_size=256, batch_warmup=1000, minutes=1.0, context_warmup=0.0)
    timer = StepTimer(cfg, UNMEASURED)
    timer.update(2, 1.0)  # 128 tokens per second, 59 seconds left, 5 more steps of 128
    assert timer.steps == 2 + 5 + (59 * 128 - 5 * 128) // 256


def run(cfg, half_seconds, whole_seconds, slower=0.0):
    """Train until the end -> seconds. Asserts that a fixed length stays.

    slower: more seconds of the first whole batch, which loads kernels.
    """
    timer = StepTimer(cfg, UNMEASURED)
    step = 1
    spent = 0.0
    fixed = []
    while step < timer.steps:
        seconds = half_seconds if step < half_steps(cfg) else whole_seconds
        if step == half_steps(cfg):
            seconds += slower
        step += 1
        spent += seconds
        timer.update(step, seconds)
        if timer.is_fixed:
            fixed.append(timer.steps)
        timer = StepTimer(cfg, timer.steps, timer.timed)  # as if stopped and resumed
    assert len(set(fixed)) == 1
    return spent


@pytest.mark.parametrize("warmup", [200, 900, 2100, 2900])
def test_slow_half_batches_do_not_shorten_the_run(warmup):
    """Half batches are slower per token: 0.9 s for 50 tokens where 100 take 1 s."""
    cfg = SimpleNamespace(total_batch_size=100, batch_warmup=warmup, minutes=1.0,
                          context_warmup=0.0)
    assert run(cfg, 0.9, 1.0) == pytest.approx(60, abs=1.0)
    assert run(cfg, 0.9, 1.0, slower=4.0) == pytest.approx(60, abs=1.0)


def test_a_run_of_half_batches_alone_is_fixed_after_a_quarter():
    cfg = SimpleNamespace(total_batch_size=100, batch_warmup=10**6, minutes=1.0,
                          context_warmup=0.0)
    timer = StepTimer(cfg, UNMEASURED)
    for step in range(2, 17):
        assert not timer.is_fixed
        timer.update(step, 1.0)
    assert timer.is_fixed and timer.steps == 1 + 60


def test_a_checkpoint_from_before_half_batches_were_timed_apart():
    cfg = SimpleNamespace(total_batch_size=100, batch_warmup=200, minutes=1.0, context_warmup=0.0)
    timer = StepTimer(cfg, 30, (1000, 20.0))
    assert timer.is_fixed and timer.length(12) == 12 + 40 // 2


def test_without_minutes_the_length_is_fixed():
    timer = StepTimer(SimpleNamespace(minutes=None), 7)
    timer.update(3, 1.0)
    assert timer.is_fixed and timer.steps == 7
