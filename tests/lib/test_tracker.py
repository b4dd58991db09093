"""--tracker: the tags of TensorBoard, with stand-ins for trackio and wandb, and the real trackio
where it is installed. Run: python -m pytest tests/lib/test_tracker.py"""

import json
import math
import sqlite3
import sys
import threading
from types import ModuleType, SimpleNamespace

import pytest
from helpers import TINY_FLAGS

import train_gpt2
from lib import tracker
from lib.cli import BadInput
from lib.logger import read_scalars
from lib.tracker import Tracker

EXPERTS = ["--preset", "modern", "--mlp", "gelu", "--n_experts", "4", "--n_active", "2",
           "--n_head", "2"]
FLAGS = [*TINY_FLAGS, *EXPERTS, "--sample_every", "3", "--save_every", "2", "--keep", "0",
         "--run_name", "a"]


class StandIn(ModuleType):
    """What trackio 0.43 and wandb 0.31 share, as far as it is used.

    runs: of each `init`, its arguments and what was logged: (step or None, values).
    """

    def __init__(self, name, fails_at=None):
        super().__init__(name)
        self.runs = []
        self.fails_at = fails_at
        self.Settings = SimpleNamespace
        self.Markdown = self.Html = lambda text: ("text", text)
        self.Histogram = lambda np_histogram: ("histogram", *np_histogram)

    def init(self, **arguments):
        run = SimpleNamespace(arguments=arguments, logged=[], metrics=[], finished=False)
        self.runs.append(run)

        def log(values, step=None):
            if len(run.logged) == self.fails_at:
                raise ConnectionError("the server is gone.\nand more")
            run.logged.append((step, values))

        def finish():
            run.finished = True

        run.log = log
        run.finish = finish
        run.define_metric = lambda name, step_metric: run.metrics.append((name, step_metric))
        return run


@pytest.fixture(params=["trackio", "wandb"])
def module(request, monkeypatch):
    module = StandIn(request.param)
    monkeypatch.setitem(sys.modules, request.param, module)
    return module


def train(data, folder, *flags):
    train_gpt2.main([*FLAGS, "--data", str(data), "--log_dir", str(folder), *flags])
    return folder / "a"


def points(run):
    """{tag: {step: value}} of what a stand-in's run logged."""
    found = {}
    for step, values in run.logged:
        at = values["step"] if step is None else step
        for tag, value in values.items():
            if tag != "step":
                found.setdefault(tag, {})[at] = value
    return found


def test_it_gets_what_tensorboard_gets(module, data, tmp_path):
    folder = train(data, tmp_path, "--tracker", module.__name__)
    [run] = module.runs
    assert run.finished
    assert run.arguments["config"]["n_embd"] == 32
    logged = points(run)
    scalars = read_scalars(folder)
    shown = {tag: values for tag, values in logged.items() if tag in scalars}
    assert shown.keys() == scalars.keys()
    for tag, values in shown.items():
        assert values.keys() == scalars[tag].keys()
        for step, value in values.items():
            assert math.isclose(value, scalars[tag][step], rel_tol=1e-6, abs_tol=1e-12)
    kind, bars, edges = logged["moe/load_00"][0]
    assert (kind, len(bars), edges) == ("histogram", 4, [-0.5, 0.5, 1.5, 2.5, 3.5])
    assert list(logged["samples"]) == [3, 6]
    assert "a language model," in logged["samples"][3][1]
    assert logged.keys() - scalars.keys() == {"samples", "moe/load_00", "moe/load_01"}


def test_a_resumed_run_continues_the_same_run(module, data, tmp_path):
    folder = train(data, tmp_path, "--tracker", module.__name__)
    (folder / "ckpt_00006.pt").unlink()
    train(data, tmp_path, "--tracker", module.__name__)
    first, second = module.runs
    assert first.arguments["name"] == second.arguments["name"]
    assert first.arguments.get("id") == second.arguments.get("id")
    assert first.arguments["resume"] in (None, "never")
    assert second.arguments["resume"] == "allow"
    repeated = points(second)["Loss/train"]
    assert repeated == {step: points(first)["Loss/train"][step] for step in (4, 5)}
    if module.__name__ == "wandb":  # its own step cannot go back
        assert second.metrics == [("*", "step")]

    (folder / "ckpt_00006.pt").unlink()
    train(data, tmp_path)  # a setting of one start
    assert len(module.runs) == 2
    train_gpt2.main([*FLAGS, "--data", str(data), "--log_dir", str(tmp_path), "--run_name", "b",
                     "--tracker", module.__name__])
    other = module.runs[2].arguments
    assert (other["name"], other.get("id")) != (first.arguments["name"], first.arguments.get("id"))


@pytest.mark.parametrize("fails_at", [0, 4])
def test_a_failing_tracker_is_reported_once_and_does_not_stop_training(fails_at, module, data,
                                                                       tmp_path, capsys):
    module.fails_at = fails_at
    folder = train(data, tmp_path, "--tracker", module.__name__)
    out = capsys.readouterr().out
    assert out.count("warning: no more is logged to") == 1
    assert f"{module.__name__}: ConnectionError: the server is gone; TensorBoard" in out
    assert (folder / "ckpt_00006.pt").exists()
    assert list(read_scalars(folder)["Loss/train"]) == list(range(6))


def test_a_failing_start_is_reported(module, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "init", lambda **arguments: sys.exit("no account"))
    folder = train(data, tmp_path, "--tracker", module.__name__)
    assert capsys.readouterr().out.count(f"{module.__name__}: SystemExit: no account") == 1
    assert (folder / "ckpt_00006.pt").exists()


@pytest.mark.parametrize("most, says", [(2, "it does not keep up"), (99, "it did not finish")])
def test_a_tracker_that_hangs_is_left_behind(most, says, monkeypatch):
    monkeypatch.setattr(tracker, "LIMIT", 0.01)
    monkeypatch.setattr(tracker, "MOST", most)
    lines = []
    released = threading.Event()
    one = Tracker("wandb", released.wait, lines.append)
    for step in range(5):  # returns at once
        one.write_scalars(step, {"Loss/train": 1.0})
    one.close()
    released.set()
    assert len(lines) == 1
    assert says in lines[0]


def test_a_failing_end_is_reported_at_once():
    def finish():
        raise OSError("disk full")

    lines = []
    logged = []
    one = Tracker("wandb", lambda: (lambda *entry: logged.append(entry), finish), lines.append)
    one.write_scalars(0, {"Loss/train": 1.0})
    one.close()
    assert not one.thread.is_alive()
    assert logged == [(0, {"Loss/train": 1.0})]
    assert len(lines) == 1
    assert "OSError: disk full" in lines[0]


def test_without_the_flag_there_is_no_tracker(module, data, tmp_path):
    folder = train(data, tmp_path)
    assert module.runs == []
    assert not (folder / "tracker.json").exists()


@pytest.mark.parametrize("found", [None, ModuleType("wandb")])
def test_a_missing_package_is_named(found, data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", found)  # the other is an empty folder wandb/
    with pytest.raises(BadInput, match="pip install wandb"):
        train(data, tmp_path, "--tracker", "wandb")
    assert not (tmp_path / "a").exists()


def test_the_real_trackio(data, tmp_path, launch):
    pytest.importorskip("trackio")
    folder = tmp_path / "log" / "a"
    for _ in range(2):
        (folder / "ckpt_00006.pt").unlink(missing_ok=True)
        done = launch("train_gpt2.py", *FLAGS, "--data", data, "--tracker", "trackio",
                      env={"TRACKIO_DIR": str(tmp_path / "trackio")})
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stdout
    with sqlite3.connect(tmp_path / "trackio" / "train_gpt2.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics").fetchall()
    assert len({name for name, _, _ in rows}) == 1
    losses = {}
    for _, step, metrics in rows:
        values = json.loads(metrics)
        if "Loss/train" in values:
            losses[step] = values["Loss/train"]
    assert losses == pytest.approx(read_scalars(folder)["Loss/train"], rel=1e-6)
