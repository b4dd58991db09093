"""--minutes become steps at the measured speed: python -m pytest tests/lib/test_timer.py"""

from types import SimpleNamespace

import pytest

from lib.budget import UNMEASURED
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
    assert timer.timed == (100 * (step - 1), pytest.approx(spent))
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


def test_without_minutes_the_length_is_fixed():
    timer = StepTimer(SimpleNamespace(minutes=None), 7)
    timer.update(3, 1.0)
    assert timer.is_fixed and timer.steps == 7
