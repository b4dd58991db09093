"""--max_hours and --max_cost: python -m pytest tests/lib/test_spending.py"""

from types import SimpleNamespace

import pytest
from runs import (
    LONG,
    assert_same_runs,
    command,
    cut,
    events,
    final,
    logged,
    run_script,
    steps_saved,
    train,
)

import train_gpt2
from lib import checkpoint
from lib.cli import BadInput
from lib.spending import Spending, reached

HOUR = 0.001  # a step, in the tests with a clock of their own


def config(price_per_hour=None, max_hours=None, max_cost=None):
    return SimpleNamespace(price_per_hour=price_per_hour, max_hours=max_hours, max_cost=max_cost)


@pytest.fixture
def clock(monkeypatch):
    """A clock for Spending: hours since the start, to be set."""
    now = SimpleNamespace(hours=0.0)
    monkeypatch.setattr(Spending, "_now", lambda self: now.hours)
    return now


def test_hours_and_dollars_add_up_over_starts_of_different_prices(clock):
    first = Spending(config(price_per_hour=2.0), {})
    clock.hours = 1.5
    assert first.state() == {"hours": 1.5, "dollars": 3.0}
    second = Spending(config(price_per_hour=4.0, max_cost=8.0), first.state())
    clock.hours = 0.5
    assert second.state() == {"hours": 2.0, "dollars": 5.0}
    assert second.hours_left() == 0.75
    assert second.limit() is None
    clock.hours = 1.25
    assert second.limit() == "--max_cost 8"
    assert reached(second.cfg, second.state()) == "--max_cost 8"


def test_hours_without_a_price_count_at_the_price_of_today(clock):
    before = {"hours": 3.0, "dollars": None}
    assert Spending(config(), before).dollars is None
    assert Spending(config(price_per_hour=2.0), before).dollars == 6.0
    assert reached(config(price_per_hour=2.0, max_cost=6.0), before) == "--max_cost 6"
    assert reached(config(max_hours=2.0), {}) is None  # a checkpoint of an older version


def test_a_limit_that_comes_before_the_end_is_foreseen(clock):
    spending = Spending(config(max_hours=2.0), {})
    clock.hours = 1.0
    assert spending.foresee(100, 300, seconds=3600.0) is None
    assert "near step 200 of 300" in spending.foresee(100, 300, seconds=7200.0)


def per_step(monkeypatch, folder):
    """Let each logged step of the run in `folder` take HOUR."""
    before = logged(folder)
    monkeypatch.setattr(Spending, "_now", lambda self: (logged(folder) - before) * HOUR)


@pytest.mark.parametrize("limit, flag", [
    (["--max_hours", 20 * HOUR], "--max_hours 0.02"),
    (["--price_per_hour", 3, "--max_cost", 60 * HOUR], "--max_cost 0.06")])
def test_a_run_stops_at_its_limit_and_continues_with_more(limit, flag, whole, data, tmp_path,
                                                          monkeypatch, capsys):
    folder = tmp_path / "a"
    per_step(monkeypatch, folder)
    train(data, folder, *LONG, *limit)
    printed = capsys.readouterr().out
    assert "warning: --max_hours or --max_cost will stop this run near step 2" not in printed
    [step] = steps_saved(folder)
    assert 20 <= step <= 22
    assert f"\nstopped at step {step} by {flag}: " in printed
    assert f"spent   {60 * HOUR * step:.1f} minutes" in printed

    train(data, folder, *LONG)  # the limit and what was spent are in the checkpoint
    assert f"belongs to a run that has reached {flag}: raise it" in capsys.readouterr().out
    assert steps_saved(folder) == [step]

    per_step(monkeypatch, folder)
    train(data, folder, *LONG, *limit[:-1], 1000)
    assert_same_runs(folder, whole("long", *LONG))
    state = checkpoint.read(folder / "ckpt_00250.pt")
    assert state["hours"] == pytest.approx(250 * HOUR, abs=3 * HOUR)
    if "--max_cost" in flag:
        dollars = dict(events(folder)["perf/dollars"])
        assert dollars[249] == pytest.approx(3 * 250 * HOUR, rel=0.05)
        assert state["dollars"] == pytest.approx(3 * state["hours"])


def test_hours_without_a_step_are_recorded_too(data, tmp_path, capsys):
    """A run may reach its limit while it waits for data, at a step that is saved."""
    folder = cut(train(data, tmp_path / "whole", "--max_steps", 24), tmp_path / "a", 8)
    limit = ["--max_hours", checkpoint.read(folder / "ckpt_00008.pt")["hours"] + 1e-9]
    train(data, folder, "--max_steps", 24, *limit)
    assert steps_saved(folder)[-1] == 8
    assert "stopped at step 8 by --max_hours" in capsys.readouterr().out
    train(data, folder, "--max_steps", 24, *limit)
    assert "has reached --max_hours" in capsys.readouterr().out


def test_all_processes_stop_together(data, tmp_path):
    folder = tmp_path / "a"
    flags = command(data, folder, *LONG, "--micro_batch", 2, "--max_hours", 1e-9)
    done = run_script("train_gpt2.py", *flags, cwd=tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    assert "stopped at step 1 by --max_hours 1e-09" in done.stdout
    assert steps_saved(folder) == [1]
    assert final(folder)["step"] == 1


def test_a_limit_in_dollars_needs_the_price(data, tmp_path):
    with pytest.raises(BadInput, match="--price_per_hour"):
        train_gpt2.main(command(data, tmp_path / "a", "--max_cost", 5))
