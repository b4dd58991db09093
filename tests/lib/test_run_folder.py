"""Runs that are interrupted, resumed, moved and killed, against undisturbed ones: python -m pytest
tests/lib/test_run_folder.py

The slow test kills a real run twenty times: python -m pytest tests/lib/test_run_folder.py -m slow
-s
"""

import errno
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, TINY_FLAGS, read_log, sentences, write_data, write_lines
from runs import (
    KINDS,
    LONG,
    RUN,
    again,
    assert_same_runs,
    command,
    contents,
    cut,
    final,
    lines,
    linux,
    logged,
    running,
    same,
    scalars,
    steps_saved,
    train,
    wait_for,
    worker,
)

import fineweb
import train_gpt2
from lib import checkpoint, run_folder
from lib.cli import BadInput, RankError
from lib.files import locked
from lib.run_folder import Writer, check_name, rewind
from lib.shards import Shards
from lib.signals import StopSignals
from lib.tokenizers import train_bpe
from train_gpt2 import GPTConfig, ShardLoader, TrainConfig


def stop_in_step(last, monkeypatch):
    """A run in this process gets SIGTERM in this step, and has heard it before the next one."""
    logged, signals = run_folder.RunFolder.log_step, []

    def listening(*args):
        signals.append(StopSignals(*args))
        return signals[0]

    def interrupt(run, step, *args):
        logged(run, step, *args)
        if step == last:
            os.kill(os.getpid(), signal.SIGTERM)
            while signals[0].received is None:
                time.sleep(0.001)

    monkeypatch.setattr(train_gpt2, "StopSignals", listening)
    monkeypatch.setattr(run_folder.RunFolder, "log_step", interrupt)


# ----------------------------------------------------------------------------------------------------------------------
# Resuming


@pytest.mark.parametrize("kind, step", [("gpt2", 40), ("modern", 24)])
def test_the_same_command_goes_on_exactly(kind, step, whole, data, tmp_path, capsys):
    loader = checkpoint.read(whole(kind) / "ckpt_00060.pt")["loader"]
    assert loader["epoch"] >= 3 and loader["offset"] > 0
    folder = cut(whole(kind), tmp_path / "whole", step)
    train(data, folder, *KINDS[kind])
    assert f"resume  {folder / f'ckpt_{step:05d}.pt'}, step {step}; as before\n" in capsys.readouterr(
    ).out
    assert_same_runs(folder, whole(kind))


def test_settings_younger_than_a_checkpoint_stay_off(whole):
    state = checkpoint.read(next(whole("gpt2").glob("ckpt_*.pt")))
    batch = state["train_config"]["total_batch_size"]
    state |= {"timed": (3, 2.0)}  # steps and their seconds, when steps were all alike
    state["train_config"] = {name: v for name, v in state["train_config"].items()
                             if name not in ("batch_warmup", "curriculum")} | {"data": "one"}
    state["model_config"] = {
        name: v
        for name, v in state["model_config"].items()
        if name not in ("token_shift", "n_experts")
    }
    cfg, model_cfg = TrainConfig(batch_warmup=512), GPTConfig(
        token_shift=True)  # as today's preset may say
    run_folder.Resume("old", state, set()).adopt(cfg, model_cfg, set())
    assert (cfg.batch_warmup, cfg.data,
            model_cfg.token_shift) == (0, ("one",), False) and state["timed"] == (3 * batch, 2.0)


def test_relative_paths_and_going_back_in_the_same_folder(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = cut(whole("gpt2"), tmp_path / "log" / "a", 60)
    train_gpt2.main(["--resume", "log/a/ckpt_00040.pt"])
    assert_same_runs(folder, whole("gpt2"))
    assert {path.name for path in folder.glob("*.aside")
            } == {f"ckpt_000{step}.pt.aside" for step in (48, 56, 60)}
    assert steps_saved(folder) == [8, 16, 24, 32, 40, 48, 56, 60]
    assert os.listdir(tmp_path) == ["log"] and os.listdir(tmp_path / "log") == ["a"]


def test_a_run_that_went_back_and_is_stopped_says_how_to_go_on(whole, tmp_path, monkeypatch,
                                                               capsys):
    """Not with --run_name beside the same --resume, which would go back again."""
    monkeypatch.chdir(tmp_path)
    folder = cut(whole("gpt2"), tmp_path / "log" / "a", 60)
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt2.StopSignals, "requested",
                      property(lambda self: logged(folder) >= 50))
        train_gpt2.main(["--resume", "log/a/ckpt_00040.pt"])
    says = re.search(r"stopped at step (\d+) of 60: the same command with (.+) goes on\n",
                     capsys.readouterr().out)
    train_gpt2.main(["--resume", "log/a/ckpt_00040.pt", *says[2].split()])
    assert int(says[1]) > 40 and f"step {says[1]}; as before" in capsys.readouterr().out
    assert_same_runs(folder, whole("gpt2"))


def test_a_branch(whole, data, tmp_path, capsys):
    source, branch = cut(whole("gpt2"), tmp_path / "source", 60), tmp_path / "branch"
    before, flags = contents(source), ["--resume", source / "ckpt_00024.pt", *KINDS["gpt2"]]
    train(data, branch, *flags)
    assert lines(branch) == lines(whole("gpt2"), 24) and same(final(branch), final(whole("gpt2")))

    for step in (48, 56, 60):
        (branch / f"ckpt_{step:05d}.pt").unlink()
    capsys.readouterr()
    train(data, branch, *flags)  # an on-start script: goes on with its own
    assert f"resume  {branch / 'ckpt_00040.pt'}, step 40" in capsys.readouterr().out
    assert lines(branch) == lines(whole("gpt2"), 24) and same(final(branch), final(whole("gpt2")))

    train(data, branch, *flags)
    assert "ckpt_00060.pt is the end of a run of 60 steps" in capsys.readouterr().out
    assert contents(source) == before


def test_resume_from_a_folder(whole, data, tmp_path):
    source = cut(whole("gpt2"), tmp_path / "source", 48)
    train(data, tmp_path / "other", "--resume", source, *KINDS["gpt2"])
    assert lines(tmp_path / "other") == lines(whole("gpt2"), 48)
    train_gpt2.main(["--resume", str(source)])  # without --run_name: in that folder
    assert_same_runs(source, whole("gpt2"))


def test_a_path_into_the_run_itself_counts_however_it_is_written(whole, tmp_path, capsys):
    folder = cut(whole("gpt2"), tmp_path / "log" / "a", 60)
    (tmp_path / "link").symlink_to(tmp_path / "log")
    for log in (tmp_path / "log" / ".." / "log", tmp_path / "link"):
        again(folder, "--resume", log / "a" / "ckpt_00056.pt")
        assert "ckpt_00056.pt, step 56; as before\n" in capsys.readouterr().out  # not its newest
        assert_same_runs(folder, whole("gpt2"))


@pytest.mark.parametrize("flags, says", [
    (["--resume", "nowhere.pt"], "cannot read nowhere.pt"),
    (["--resume", "empty"], "--resume empty: this folder holds no ckpt_<step>.pt"),
])
def test_a_resume_that_cannot_be(flags, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=says):
        train_gpt2.main(flags)
    assert os.listdir(tmp_path) == ["empty"]


def test_resume_auto_without_a_name_goes_on_with_the_same_command_alone(
        data, tmp_path, monkeypatch, capsys):
    """What `make train` is: given again, it goes on after an interruption and begins a new run
    after the end."""
    def start(*flags, stop_at=None):
        """-> the folder of the run, the step it began at, whether it is finished."""
        words = [
            *RUN, "--data",
            str(data), "--log_dir",
            str(tmp_path), "--resume", "auto", "--max_steps", "24", *flags
        ]
        monkeypatch.setattr(sys, "argv", ["train_gpt2.py", *words])
        monkeypatch.setattr("lib.run_folder.time.strftime", lambda form: f"{next(clock):04d}")
        with monkeypatch.context() as patch:
            if stop_at:
                patch.setattr(train_gpt2.StopSignals, "requested",
                              property(lambda self: logged_steps(tmp_path) >= stop_at))
            before = set(tmp_path.iterdir())
            train_gpt2.main(words)
        out = capsys.readouterr().out
        begun = re.search(r"resume  (\S+)/ckpt_(\d+).pt", out)
        folder = Path(begun[1]) if begun else (set(tmp_path.iterdir()) - before).pop()
        return folder.name, int(begun[2]) if begun else 0, "done: " in out

    def logged_steps(folder):
        return max(logged(run) for run in folder.iterdir())

    clock = itertools.count()
    first, at, finished = start(stop_at=12)
    assert (at, finished) == (0, False)
    other, at, finished = start("--max_lr", "1e-3")  # other flags: a run of its own
    assert other != first and (at, finished) == (0, True)
    again_at = steps_saved(tmp_path / first)[-1]
    assert start() == (first, again_at, True) and 0 < again_at < 24
    new, at, finished = start()
    assert new not in (first, other) and (at, finished) == (0, True)
    assert start("--max_lr", "1e-3")[0] not in (first, other, new)


def test_resume_auto_begins_and_goes_on(whole, data, tmp_path):
    (tmp_path / "a").mkdir()  # an empty folder may become a run's
    assert steps_saved(train(data, tmp_path / "a", "--resume", "auto", "--max_steps", "6")) == [6]
    folder = cut(whole("gpt2"), tmp_path / "b", 56)
    train(data, folder, "--resume", "auto", *KINDS["gpt2"])
    assert_same_runs(folder, whole("gpt2"))


def test_another_number_of_processes_and_micro_batch(launch, whole, data, tmp_path):
    short = ["--max_steps", "15", "--save_every", "5", "--eval_every", "5"]
    one = whole("one", *short)
    two = cut(one, tmp_path / "two", 5)
    result = launch("train_gpt2.py", *command(data, two, *short, "--micro_batch", 2), processes=2)
    assert result.returncode == 0, result.stderr
    assert "changed: --micro_batch 4 -> 2\n" in result.stdout and "x 2 processes\n" in result.stdout
    back = train(data, cut(two, tmp_path / "back", 10), *short, "--micro_batch", "8")
    assert len(read_log(one)) == 18
    for folder in (two, back):
        assert read_log(folder) == pytest.approx(read_log(one), rel=1e-5)
        assert final(folder)["loader"] == final(one)["loader"]


# ----------------------------------------------------------------------------------------------------------------------
# Settings


def test_settings_come_from_the_checkpoint(whole, data, tmp_path, capsys):
    folder = cut(whole("modern"), tmp_path / "a", 48)
    again(folder)
    assert "ckpt_00048.pt, step 48; as before\n" in capsys.readouterr().out
    assert_same_runs(folder, whole("modern"))
    (folder / "ckpt_00060.pt").unlink()
    train(data, folder, *KINDS["modern"])  # and by the whole command
    assert_same_runs(folder, whole("modern"))
    config = json.loads((folder / "config.json").read_text())
    assert config["train"]["schedule"] == "wsd" and config["model"]["n_layer"] == 2


def test_the_length_stays_as_it_was_when_the_data_has_changed_its_size(whole, tmp_path):
    folder = cut(whole("gpt2"), tmp_path / "a", 48)
    state = checkpoint.read(folder / "ckpt_00048.pt")
    state["train_config"] |= {"max_steps": None, "epochs": 5.0}  # as if 5 epochs had been 60 steps
    checkpoint.write(folder / "ckpt_00048.pt", state)
    assert_same_runs(again(folder), whole("gpt2"))


def test_training_flags_may_change_and_take_effect(whole, tmp_path, capsys):
    folder = again(cut(whole("gpt2"), tmp_path / "a", 48), "--max_lr", "1e-3", "--weight_decay",
                   "0.7", "--dropout", "0")
    [resumed] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("resume")]
    assert sorted(resumed.partition("; changed: ")[2].split(", ")) == [
        "--dropout 0.1 -> 0.0", "--max_lr 0.005 -> 0.001", "--weight_decay 0.1 -> 0.7"]
    assert json.loads((folder / "config.json").read_text())["starts"][1]["changed"] in resumed
    before = len(lines(whole("gpt2"))) - len(lines(whole("gpt2"), 48))
    assert lines(folder)[:before] == lines(whole("gpt2"))[:before]
    assert len(lines(folder)) == len(lines(whole("gpt2"))) and lines(folder, 49) != lines(
        whole("gpt2"), 49)
    state = checkpoint.read(folder / "ckpt_00060.pt")
    assert state["train_config"]["max_lr"] == 1e-3 and state["model_config"]["dropout"] == 0
    cfg = SimpleNamespace(min_lr_frac=0.1, warmup_steps=2, schedule="cosine", steps=60)
    groups = state["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.7, 0.0}
    assert {group["lr"] for group in groups} == {1e-3 * train_gpt2.lr_multiplier(59, cfg)}
    assert dict(scalars(folder)["optim/lr"])[48] == pytest.approx(
        1e-3 * train_gpt2.lr_multiplier(48, cfg))


@pytest.mark.parametrize(
    "kind, flags, misfits",
    [
        ("gpt2", ["--n_layer", "3"], ["--n_layer 2 -> 3"]),
        ("gpt2", ["--mlp", "relu2"], ["--mlp gelu -> relu2"]),  # the same shapes, another function
        ("gpt2", ["--block_size", "16"], ["--block_size 32 -> 16"]),
        ("gpt2", ["--size", "gpt2"
                  ], ["--n_layer 2 -> 12", "--n_head 2 -> 12", "--n_embd 32 -> 768"]),
        ("gpt2", ["--preset", "modern"],
         ["--mlp gelu -> swiglu", "--norm layernorm -> rmsnorm", "--emb_norm False -> True"]),
        ("modern", ["--n_head", "4"], ["--n_head 2 -> 4"]),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else value)
def test_flags_that_do_not_fit_the_weights_are_refused(kind, flags, misfits, whole, tmp_path):
    folder = cut(whole(kind), tmp_path / "a", 48)
    before = contents(folder)
    with pytest.raises(BadInput, match="does not fit these flags") as error:
        again(folder, *flags)
    assert all(misfit in str(error.value) for misfit in misfits) and contents(folder) == before


def test_the_context_may_change_with_rotary_positions(whole, tmp_path, capsys):
    folder = again(cut(whole("modern"), tmp_path / "a", 56), "--block_size", "64")
    assert "changed: --block_size 32 -> 64" in capsys.readouterr().out
    state = checkpoint.read(folder / "ckpt_00060.pt")
    assert state["model_config"]["block_size"] == 64 and state["loader"] == final(
        whole("modern"))["loader"]


@pytest.mark.parametrize("size", [270, 400])  # with the padding the same matrices, and others
def test_data_of_another_tokenizer_is_refused(size, whole, tmp_path):
    texts = [*sentences(200, seed=7), *(f"{n}{n}" * 2 for n in range(1000))]
    other, folder = write_data(tmp_path / "data",
                               train_bpe(texts, size)), cut(whole("gpt2"), tmp_path / "a", 48)
    before = contents(folder)
    with pytest.raises(BadInput, match="made with another tokenizer"):
        again(folder, "--data", other)
    assert contents(folder) == before


def test_other_data_of_the_same_tokenizer_is_read_from_its_beginning(whole, tokenizer, tmp_path,
                                                                     capsys):
    other = write_data(tmp_path / "data", tokenizer, shards=2)
    folder = again(cut(whole("gpt2"), tmp_path / "a", 48), "--data", other)
    assert re.search(
        r"step 48; changed: --data \S+ -> \S+, other training data, read from its beginning\n",
        capsys.readouterr().out)
    loader = ShardLoader(Shards(other).train, tokenizer, 1337)
    for _ in range(12):
        loader.next(256)
    assert final(folder)["loader"] == loader.state_dict()


def test_other_text_in_shards_of_the_same_names_and_lengths(tokenizer, tmp_path, capsys):
    """What --max_tokens makes of two sources. The text has changed without a word: only --data goes
    on in it."""
    data, folder = tmp_path / "data", tmp_path / "a"
    tokenizer.save(tmp_path / "tokenizer.json")

    def make(seed):
        shutil.rmtree(data, ignore_errors=True)
        source = write_lines(tmp_path / "text.jsonl",
                             [{"text": text} for text in sentences(400, seed)])
        words = [
            "--source", source, "--out", data, "--tokenizer", tmp_path / "tokenizer.json",
            "--max_tokens", 9000, "--shard_size", 3000, "--val_tokens", 1000
        ]
        fineweb.main([str(word) for word in words])
        return Shards(data)

    first = make(seed=1)
    train(data, folder, "--max_steps", 6)
    other = make(seed=2)
    assert (other.former_identity, other.tokens) == (first.former_identity, first.tokens)
    before = contents(folder)
    with pytest.raises(BadInput, match=f"{data} no longer holds the text that .*ckpt_00006.pt was trained on: "
                                       f"put it back, or give --data {data} to train on the new text"):
        again(folder, "--max_steps", 8)
    assert contents(folder) == before

    capsys.readouterr()
    made_before = cut(folder, tmp_path / "made_before",
                      6)  # by a version that knew names and lengths alone
    state = checkpoint.read(made_before / "ckpt_00006.pt")
    checkpoint.write(made_before / "ckpt_00006.pt", state | {"data": first.former_identity})
    again(made_before, "--max_steps", 8)
    assert "other training data" not in capsys.readouterr().out
    assert checkpoint.read(made_before / "ckpt_00008.pt")["data"] == other.identity

    again(folder, "--max_steps", 8, "--data", data)
    assert "other training data, read from its beginning" in capsys.readouterr().out
    assert final(folder)["loader"]["offset"] == 2 * 256

    make(seed=1)
    again(cut(folder, tmp_path / "back", 6), "--max_steps", 8)
    assert "other training data" not in capsys.readouterr().out


def test_the_same_data_elsewhere_goes_on_where_it_was(whole, data, tmp_path, capsys):
    folder = again(cut(whole("gpt2"), tmp_path / "a", 48), "--data",
                   shutil.copytree(data, tmp_path / "moved"))
    assert "other training data" not in capsys.readouterr().out
    assert_same_runs(folder, whole("gpt2"))


def test_a_finished_run_says_so_and_stays_as_it_is(whole, data, tmp_path, capsys):
    folder = cut(whole("gpt2"), tmp_path / "a", 60)
    before = contents(folder)
    for start in (lambda: again(folder), lambda: train(data, folder, *KINDS["gpt2"])):
        start()
        assert capsys.readouterr().out == (f"{folder / 'ckpt_00060.pt'} is the end of a run of 60 steps: "
                                           "give more --max_steps to go on\n")
    assert contents(folder) == before


@pytest.mark.parametrize("flags", [["--max_steps", "66"], ["--epochs", "3.6"]],
                         ids=["max_steps", "epochs"])
def test_a_finished_run_goes_on_with_a_greater_length(flags, whole, data, tmp_path, capsys):
    assert int(3.6 * Shards(data).tokens["train"] / 256) == 66
    folder = again(cut(whole("gpt2"), tmp_path / "a", 60), *flags)
    assert "ckpt_00060.pt, step 60; changed: " in capsys.readouterr().out
    log = read_log(folder)
    assert [step for step, kind in log if kind == "train"] == list(range(66)) and (66, "val") in log
    assert steps_saved(folder)[-1] == checkpoint.read(folder / "ckpt_00066.pt")["max_steps"] == 66


@pytest.mark.parametrize(
    "kind, flags, says",
    [
        # half a cosine from 5e-3 down to a tenth of it: at its end, and 58 of 118 steps behind the
        # warm-up
        ("gpt2", ["--max_steps", "120"],
         "rate    rises again, from 5.00e-04 to 2.81e-03: the cosine schedule now ends"),
        ("modern", ["--max_steps", "120"], "the wsd schedule now ends at step 120, not 60"),
        ("gpt2", ["--max_steps", "120", "--max_lr", "2e-4"], None),
    ],
    ids=["cosine", "wsd", "lower"])
def test_a_longer_run_says_that_its_rate_rises_again(kind, flags, says, whole, tmp_path, capsys,
                                                     monkeypatch):
    folder = cut(whole(kind), tmp_path / "a", 60)
    stop_in_step(60, monkeypatch)
    again(folder, *flags)
    out = capsys.readouterr().out
    assert says in out if says else "rises again" not in out
    if kind == "gpt2" and says:
        assert dict(scalars(folder)["optim/lr"])[60] == pytest.approx(2.81e-3, abs=5e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints that must not be resumed


def change_moments(state, change):
    state["optimizer"]["state"] = {
        p: change(moments) for p, moments in state["optimizer"]["state"].items()
    }


TAMPERED = {
    "no optimizer": lambda s: s.pop("optimizer"), "no loader": lambda s: s.pop("loader"),
    "step as text": lambda s: s.update(step="8"), "negative step": lambda s: s.update(step=-8),
    "endless": lambda s: s.update(max_steps=10**30),
    "shard 10^6": lambda s: s["loader"].update(shard=10**6),
    "schedule": lambda s: s["train_config"].update(schedule="nonsense"),
    "batch of a list": lambda s: s["train_config"].update(total_batch_size=[256]),
    "10^9 layers": lambda s: s["model_config"].update(n_layer=10**9),
    "no moments": lambda s: change_moments(s, lambda moments: {}),
    "moments of another shape": lambda s: change_moments(
        s, lambda m: m | {"exp_avg": torch.zeros(3, 5)}),
    "one moment missing": lambda s: change_moments(
        s, lambda m: {k: v for k, v in m.items() if k != "exp_avg_sq"}),
    "moments as text": lambda s: change_moments(s, lambda m: m | {"exp_avg": "much"}),
    "moments not finite": lambda s: change_moments(
        s, lambda m: m | {"exp_avg": m["exp_avg"] * math.nan}), "negative count of steps": lambda s:
    change_moments(s, lambda m: m | {"step": torch.tensor(-5.0)}),
    "no tokenizer": lambda s: s.pop("tokenizer"), "weights of another shape": lambda s: s[
        "model"].update({"transformer.ln_f.weight": torch.ones(31)}),
    "tokenizer": lambda s: s.update(tokenizer=7), "nothing known": lambda s:
    (s.clear(), s.update(other=1)),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_a_tampered_checkpoint_is_refused_and_nothing_changes(what, whole, tmp_path):
    folder = cut(whole("gpt2"), tmp_path / "a", 8)
    state = checkpoint.read(folder / "ckpt_00008.pt")
    TAMPERED[what](state)
    checkpoint.write(folder / "ckpt_00008.pt", state)
    before = contents(folder)
    with pytest.raises(BadInput) as error:
        again(folder)
    assert "ckpt_00008.pt" in str(error.value) and len(str(error.value)) < 400
    assert contents(folder) == before


def test_a_torn_newest_checkpoint_costs_only_its_steps(whole, data, tmp_path, capsys):
    folder = cut(whole("gpt2"), tmp_path / "a", 56)
    torn = bytearray((folder / "ckpt_00056.pt").read_bytes())
    torn[len(torn) // 2] ^= 16
    (folder / "ckpt_00056.pt").write_bytes(torn)
    train(data, folder, *KINDS["gpt2"])
    out, err = capsys.readouterr()
    assert err.count("skipped: ") == 1 and "ckpt_00056.pt" in err.splitlines(
    )[0] and "ckpt_00048.pt, step 48; as before" in out
    assert_same_runs(folder, whole("gpt2"))
    assert (folder / "ckpt_00056.pt.aside").read_bytes() == torn
    assert same(
        checkpoint.read(folder / "ckpt_00056.pt")["model"],
        checkpoint.read(whole("gpt2") / "ckpt_00056.pt")["model"])


def test_a_disk_that_cannot_be_read_for_now_sets_nothing_aside(whole, data, tmp_path, monkeypatch):
    folder, opened = cut(whole("gpt2"), tmp_path / "whole", 40), zipfile.ZipFile

    def fails(path, *args):
        if "00040" in str(path):
            raise OSError(errno.EIO, "Input/output error")
        return opened(path, *args)

    monkeypatch.setattr(zipfile, "ZipFile", fails)
    with pytest.raises(RankError, match="cannot read .*ckpt_00040.pt .*Input/output error"):
        train(data, folder, *KINDS["gpt2"])
    monkeypatch.undo()
    assert_same_runs(train(data, folder, *KINDS["gpt2"]), whole("gpt2"))


def with_weights(folder, value):
    """The gains of the last norm in a run's checkpoint of step 8 become `value`."""
    state = checkpoint.read(folder / "ckpt_00008.pt")
    state["model"]["transformer.ln_f.weight"] = torch.full((32,), value)
    checkpoint.write(folder / "ckpt_00008.pt", state)


def test_weights_that_are_nan_are_refused(whole, launch, tmp_path):
    folder = cut(whole("gpt2"), tmp_path / "log" / "a", 8)
    with_weights(folder, math.nan)
    before = contents(folder)
    for script, *flags in (("train_gpt2.py", "--run_name", "a", "--max_steps", 10),
                           ("posttrain.py", "--checkpoint", folder / "ckpt_00008.pt", "--data",
                            tmp_path)):
        result = launch(script, *flags)
        assert result.returncode == 2 and result.stderr.count("\n") == 1 and result.stdout == ""
        assert "ckpt_00008.pt holds weights that are NaN or infinite (transformer.ln_f.weight)" in result.stderr
    assert contents(folder) == before and os.listdir(tmp_path / "log") == ["a"]


@pytest.mark.parametrize("steps, skipped", [(10, 2), (20, 3)])
def test_weights_without_a_finite_loss_end_a_run(steps, skipped, whole, tmp_path, capsys):
    """Also one with fewer steps to go than --max_skipped."""
    folder = cut(whole("gpt2"), tmp_path / "log" / "a", 8)
    with_weights(folder, 3e38)
    with pytest.raises(
            BadInput,
            match=f"the last {skipped} steps were non-finite; .*ckpt_00008.pt is from before: "):
        again(folder, "--max_steps", steps, "--max_skipped", 3, "--sample_every", 2)
    out = capsys.readouterr().out
    assert out.count("skipped because non-finite") == skipped and "done: " not in out
    assert steps_saved(folder) == [8]


def test_a_run_that_diverges_ends_with_a_checkpoint(launch, data, tmp_path):
    result = launch("train_gpt2.py", *TINY_FLAGS, "--data", data, "--run_name", "a", "--max_lr",
                    "1e6", "--max_steps", 60, "--warmup_steps", 0, "--sample_every", 1,
                    "--grad_clip", 0, "--weight_decay", 1e6, "--max_skipped", 2)
    warned, error = result.stderr.splitlines()
    assert result.returncode == 2 and "--max_lr 1e+06 is" in warned and "the last 2 steps were non-finite" in error
    [(step, path)] = checkpoint.found(tmp_path / "log" / "a")
    assert step < 60 and all(weights.isfinite().all()
                             for weights in checkpoint.read(path)["model"].values())


# ----------------------------------------------------------------------------------------------------------------------
# What a run leaves behind


def test_log_tensorboard_and_config_after_resuming_twice(whole, data, tmp_path):
    folder = cut(whole("gpt2"), tmp_path / "a", 24)
    for step in (24, 16):
        for later, path in checkpoint.found(folder):
            if later > step:
                path.unlink()
        train(data, folder, *KINDS["gpt2"])
    assert_same_runs(folder, whole("gpt2"))
    shown = scalars(folder)
    assert shown == scalars(whole("gpt2"))
    assert [step for step, _ in shown["Loss/train"]] == list(range(60))
    assert [step for step, _ in shown["Loss/val"]] == [*range(8, 60, 8), 60]
    config, first = (json.loads((path / "config.json").read_text())
                     for path in (folder, whole("gpt2")))
    assert [start["step"] for start in config["starts"]
            ] == [0, 24, 16] and config["starts"][:1] == first["starts"]
    assert [start["from"] for start in config["starts"]
            ] == [None, str(folder / "ckpt_00024.pt"),
                  str(folder / "ckpt_00016.pt")]
    assert config["max_steps"] == 60 and config["model"] == first["model"]


def test_a_run_killed_before_its_first_checkpoint_begins_anew(whole, data, tmp_path, capsys):
    folder = cut(whole("gpt2"), tmp_path / "a", -1)
    (folder / "log.txt").write_text("".join(f"{line}\n" for line in lines(folder)[:5]) + "5 tra")
    (folder / "ckpt_00008.pt.tmp").write_bytes(b"half")
    train(data, folder, *KINDS["gpt2"])
    assert "holds no checkpoint: its run begins anew" in capsys.readouterr().out
    assert_same_runs(folder, whole("gpt2"))
    assert scalars(folder) == scalars(whole("gpt2")) and not list(folder.glob("*.tmp"))


def test_a_finished_run_without_checkpoints_is_refused(whole, data, tmp_path):
    folder = cut(whole("gpt2"), tmp_path / "a", -1)
    before = contents(folder)
    with pytest.raises(BadInput, match="already holds a run, finished and without checkpoints"):
        train(data, folder, *KINDS["gpt2"])
    assert contents(folder) == before


def test_rewind(tmp_path):
    names = [
        "ckpt_00004.pt", "ckpt_00008.pt", "ckpt_00012.pt", "ckpt_100000.pt",
        "ckpt_00012.pt.0123abcd.tmp", "config.json.0123abcd.tmp", "log.txt.0123abcd.tmp",
        "notes.tmp", "ckpt_00012.pt.tmp", "config.json.tmp"
    ]  # the last two are an earlier version's
    for name in names:
        (tmp_path / name).write_text(name)
    kept = "a line of another kind\n0 val 5.000000\n0 train 5.000000\n7 train 4.000000\n"
    (tmp_path / "log.txt").write_text(
        kept + "8 val 3.000000\n8 train 3.000000\n10 train 2.000000\n1")  # torn: of step 11
    for _ in range(2):  # the second time there is nothing more to do
        rewind(tmp_path, 8)
        assert (tmp_path / "log.txt").read_text() == kept
        assert {path.name for path in tmp_path.iterdir()} == {
            "ckpt_00004.pt", "ckpt_00008.pt", "ckpt_00012.pt.aside", "ckpt_100000.pt.aside",
            "notes.tmp", "log.txt"
        }
        assert (tmp_path / "ckpt_00012.pt.aside").read_text() == "ckpt_00012.pt"


def test_going_back_again_and_again_sets_every_course_aside(tmp_path):
    for course in ("first", "second", "third"):
        (tmp_path / "ckpt_00012.pt").write_text(course)
        rewind(tmp_path, 8)
    kept = [(tmp_path / f"ckpt_00012.pt.aside{number}").read_text() for number in ("", ".2", ".3")]
    assert kept == ["first", "second", "third"] and not checkpoint.found(tmp_path)


def test_a_run_folder_names_its_code(data, launch, tmp_path):
    """A checkout of its own, changed after the commit: the folder holds commit and diff,
    and a later start's own code beside them."""
    def git(*words):
        return subprocess.run(
            ["git", "-C", checkout, "-c", "user.name=a", "-c", "user.email=a@b", *words],
            check=True, capture_output=True, text=True).stdout

    checkout = tmp_path / "checkout"
    checkout.mkdir()
    shutil.copy(ROOT / "train_gpt2.py", checkout)
    shutil.copytree(ROOT / "lib", checkout / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    with open(checkout / "lib" / "budget.py", "a") as file:
        file.write("# a change\n")
    script, words = checkout / "train_gpt2.py", [
        *TINY_FLAGS, "--data", data, "--run_name", "a", "--save_every", "3"
    ]
    assert launch(script, *words).returncode == 0
    folder = tmp_path / "log" / "a"
    assert json.loads(
        (folder / "config.json").read_text())["starts"][0]["commit"] == git("rev-parse",
                                                                            "HEAD").strip()
    assert "\n+# a change\n" in (folder / "code.diff").read_text()
    assert (folder / "train_gpt2.py").read_bytes() == script.read_bytes()

    with open(script, "a") as file:
        file.write("# another change\n")
    (folder / "ckpt_00006.pt").unlink()
    assert launch(script, *words).returncode == 0
    assert "# another change" in (folder / "train_gpt2_from_00003.py").read_text()
    assert "# another change" in (folder / "code_from_00003.diff").read_text()
    assert "another" not in (folder / "code.diff").read_text()


# ----------------------------------------------------------------------------------------------------------------------
# Folders that are not a run's, or in use, or gone


@pytest.mark.parametrize(
    "name", ["", " ", ".", "..", "a/b", "/tmp/a", "../a", "a\nb", "a\0b", "a\\b", "x" * 201])
def test_a_run_name_is_that_of_one_folder(name):
    with pytest.raises(BadInput, match="is not the name of a folder"):
        check_name(name)
    check_name("a run.v2")


@pytest.mark.parametrize("name", ["", "..", "mine"])
def test_a_foreign_folder_is_left_as_it_is(name, data, tmp_path):
    (tmp_path / "log" / "mine").mkdir(parents=True)
    folder = tmp_path / "log" / name
    for place in (tmp_path, folder):
        (place / "log.txt").write_text("0 a diary\n1 of mine\n2 train 3.0\n")
        (place / "ckpt_00001.pt.tmp").write_text("x")
        (place / "thesis.tmp").write_text("x")
    before = [contents(place) for place in (tmp_path, folder)]
    with pytest.raises(
            BadInput, match="is not a run folder, it holds no config.json"
            if name == "mine" else "is not the name of a folder|is empty"):
        train_gpt2.main([
            *TINY_FLAGS, "--data",
            str(data), "--log_dir",
            str(tmp_path / "log"), "--run_name", name
        ])
    assert [contents(place) for place in (tmp_path, folder)] == before


def test_a_folder_with_the_config_of_another_program_is_left_as_it_is(whole, data, tmp_path,
                                                                      monkeypatch):
    """A Hugging Face export, into which someone put a checkpoint of ours: no run's folder, but a
    place to begin from."""
    export = tmp_path / "runs" / "hfexp"
    export.mkdir(parents=True)
    (export
     / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}')
    (export / "model.safetensors").write_bytes(b"weights")
    before = contents(export)
    with pytest.raises(BadInput,
                       match="hfexp is not a run folder, its config.json is another program's"):
        train(data, export)
    assert contents(export) == before

    shutil.copy(whole("gpt2") / "ckpt_00056.pt", export)
    before = contents(export)
    with pytest.raises(BadInput,
                       match="hfexp is not a run folder, its config.json is another program's"):
        train(data, export, *KINDS["gpt2"])
    monkeypatch.chdir(tmp_path)
    train_gpt2.main(["--resume", str(export / "ckpt_00056.pt")])
    [begun] = (tmp_path / "log").iterdir()
    assert contents(export) == before and steps_saved(begun) == [60]


@pytest.mark.parametrize("name, make, refused", [("config.json", os.mkdir, True),
                                                 ("config.json", os.mkfifo, True),
                                                 ("log.txt", os.mkdir, True),
                                                 ("log.txt", os.mkfifo, True),
                                                 ("train_gpt2.py", os.mkdir, False),
                                                 ("code.diff", os.mkdir, False)],
                         ids=lambda value: getattr(value, "__name__", value))
def test_a_folder_or_pipe_in_the_place_of_a_file(name, make, refused, whole, tmp_path):
    folder = cut(whole("gpt2"), tmp_path / "a", 56)
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    before = contents(folder) if make is os.mkdir else None
    if not refused:
        assert_same_runs(again(folder), whole("gpt2"))
    else:
        with pytest.raises(BadInput, match=f"cannot write {folder / name}"):
            again(folder)
        assert before is None or contents(folder) == before


def test_a_log_with_a_number_of_5000_digits(whole, tmp_path):
    folder = cut(whole("gpt2"), tmp_path / "a", 56)
    odd = b"9" * 5000 + b" train 1\n"
    (folder / "log.txt").write_bytes(odd + (folder / "log.txt").read_bytes())
    again(folder)
    assert (folder / "log.txt").read_bytes() == odd + (whole("gpt2") / "log.txt").read_bytes()


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[1, 2]", b'{"starts": 3, "max_steps": "x"}', b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_config_does_not_stop_a_run(damage, whole, tmp_path):
    folder = cut(whole("gpt2"), tmp_path / "a", 56)
    (folder / "config.json").write_bytes(damage)
    assert_same_runs(again(folder), whole("gpt2"))
    assert [start["step"]
            for start in json.loads((folder / "config.json").read_text())["starts"]] == [56]


def test_a_run_folder_in_use(whole, data, tmp_path):
    folder = cut(whole("gpt2"), tmp_path / "a", 56)
    before = contents(folder)
    with locked(folder, ""), pytest.raises(BadInput, match="in use by another process"):
        train(data, folder, *KINDS["gpt2"])
    assert contents(folder) == before
    assert_same_runs(train(data, folder, *KINDS["gpt2"]), whole("gpt2"))  # free again


def test_a_checkpoint_saved_between_looking_and_locking(whole, data, tmp_path, monkeypatch):
    folder, settings = cut(whole("gpt2"), tmp_path / "whole", 40), train_gpt2.settings

    def meanwhile(*args):  # another process of this run saves, and ends
        found = settings(*args)
        shutil.copy(whole("gpt2") / "ckpt_00048.pt", folder)
        return found

    monkeypatch.setattr(train_gpt2, "settings", meanwhile)
    with pytest.raises(BadInput, match="has just been written by another process: start again"):
        train(data, folder, *KINDS["gpt2"])
    assert steps_saved(folder)[-1] == 48


@pytest.mark.parametrize("moved", [True, False], ids=["moved", "removed"])
def test_a_run_whose_folder_goes_away_says_so_and_saves(moved, data, tmp_path):
    folder, out = tmp_path / "log" / "a", tmp_path / "out.txt"
    with running(command(data, folder, *LONG, "--save_every", "25"), out) as process:
        wait_for((folder / "ckpt_00025.pt").exists, process)
        wait_for(lambda: logged(folder) > 30, process)
        if moved:
            folder.rename(tmp_path / "elsewhere")
        else:
            shutil.rmtree(folder.rename(tmp_path / "trash"))  # at once: the run is writing there
        assert process.wait(60) == 0
    told = out.read_text()
    assert f"{folder} was moved or removed while the run went on: made again" in told
    assert "Traceback" not in told and "done: " in told
    assert steps_saved(folder)[-3:] == [200, 225, 250] and (folder / "config.json").exists()
    assert checkpoint.read(
        folder / "ckpt_00250.pt")["finished"] and lines(folder)[-1].startswith("249 train")
    if moved:
        assert (tmp_path / "elsewhere" / "ckpt_00025.pt").exists() and logged(
            tmp_path / "elsewhere") > 30


# ----------------------------------------------------------------------------------------------------------------------
# Full disks


def full_when(monkeypatch, condition):
    """From here on the disk has 1,000 bytes free whenever `condition(folder)` holds."""
    usage = shutil.disk_usage
    monkeypatch.setattr(
        shutil, "disk_usage", lambda folder: usage(folder)._replace(free=1000)
        if condition(folder) else usage(folder))


def test_a_run_does_not_begin_on_a_full_disk(data, tmp_path, monkeypatch):
    full_when(monkeypatch, lambda folder: True)
    with pytest.raises(BadInput, match="free some disk space"):
        train(data, tmp_path / "a")
    assert not os.listdir(tmp_path)


def test_a_start_that_fails_leaves_no_empty_folder(data, tmp_path):
    bad = ["--hellaswag_every", 2, "--hellaswag_file", "nowhere.jsonl"]
    with pytest.raises(BadInput, match="nowhere.jsonl"):
        train(data, tmp_path / "log" / "a", *bad)
    assert not os.listdir(tmp_path)
    (tmp_path / "mine").mkdir()
    with pytest.raises(BadInput, match="nowhere.jsonl"):
        train(data, tmp_path / "mine", *bad)
    assert os.listdir(tmp_path) == ["mine"]  # made by the user


def test_a_run_outlives_a_disk_that_is_full_for_a_while(whole, data, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "a"
    full_when(monkeypatch, lambda _: steps_saved(folder) == [8] and logged(folder) < 30)
    whole("gpt2")
    capsys.readouterr()
    train(data, folder, *KINDS["gpt2"])
    out = capsys.readouterr().out
    assert out.count("a checkpoint needs 0.00 GB and") >= 1 and "done: " in out
    assert steps_saved(folder) == [8, 32, 40, 48, 56, 60]
    assert_same_runs(folder, whole("gpt2"))


@pytest.mark.parametrize("code, told", [(errno.ENOSPC, "is full: free some space"),
                                        (errno.EIO, r"fails \(Input/output error\): see to it")])
def test_a_log_that_cannot_grow_ends_a_run_in_one_line(code, told, data, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder.Logger, "log_step",
                        lambda *_: (_ for _ in ()).throw(OSError(code, os.strerror(code))))
    with pytest.raises(RankError, match=f"the disk of {tmp_path} {told}"):
        train(data, tmp_path / "a")


@pytest.mark.parametrize("error", [
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
])
def test_want_of_memory_ends_a_run_in_one_line(error, data, tmp_path, monkeypatch):
    def step(*_):
        raise error

    monkeypatch.setattr(train_gpt2, "train", step)
    with pytest.raises(RankError, match="out of memory: free some, raise `ulimit -v`, or"):
        train(data, tmp_path / "a")


def test_the_last_checkpoint_must_be_written(data, tmp_path, monkeypatch):
    full_when(monkeypatch, lambda _: logged(tmp_path / "a") > 3)
    with pytest.raises(BadInput, match="free some disk space"):
        train(data, tmp_path / "a", "--max_steps", "4")


# ----------------------------------------------------------------------------------------------------------------------
# The best checkpoint, and saving once per step


def with_losses(monkeypatch, losses):
    """Validations find these losses, one after the other, the last one again and again."""
    left = list(losses)
    monkeypatch.setattr(train_gpt2, "evaluate", lambda *_: left.pop(0)
                        if len(left) > 1 else left[0])


@pytest.mark.parametrize("later, best", [(3.5, [3.5, 32]), (6.0, [4.0, 16])])
def test_the_best_checkpoint_is_one_that_was_written(later, best, data, tmp_path, monkeypatch,
                                                     capsys):
    """The lowest loss is that of step 24, whose checkpoint cannot be written; --keep 1 prunes all
    others but the best."""
    with_losses(monkeypatch, [5.0, 4.0, 3.0, later, 6.0])
    written = checkpoint.write

    def fails(path, state):
        if path.name == "ckpt_00024.pt":
            raise BadInput("no room for it")
        written(path, state)

    monkeypatch.setattr(checkpoint, "write", fails)
    folder = train(data, tmp_path / "a", "--keep_best", "--keep", 1, "--save_every", 0)
    out, kept = capsys.readouterr().out, checkpoint.path_of(folder, best[1])
    assert "no room for it" in out and steps_saved(folder) == [best[1], 60]
    assert checkpoint.read(folder / "ckpt_00060.pt")["best"] == best
    assert f"best    validation loss {best[0]:.4f}, at step {best[1]}: {kept}\n" in out


def test_a_step_is_saved_once(data, tmp_path, monkeypatch, capsys):
    """It may be due, the best, and the last before a signal."""
    with_losses(monkeypatch, [5.0, 4.0])
    stop_in_step(15, monkeypatch)
    folder = train(data, tmp_path / "a", "--keep_best")
    saved = re.findall(r"saved \S+ckpt_(\d+).pt", capsys.readouterr().out)
    assert saved == ["00008", "00016"] and steps_saved(folder) == [8, 16]
    monkeypatch.undo()
    with_losses(monkeypatch, [4.0, 5.0])
    again(folder)
    assert checkpoint.read(
        folder / "ckpt_00060.pt")["best"] == [4.0, 16]  # measured again, as it was not noted


def test_a_run_outlives_a_folder_that_cannot_be_written_for_a_while(whole, data, tmp_path,
                                                                    monkeypatch, capsys):
    """config.json comes first: what holds for the checkpoint beside it holds for it."""
    folder, whole_run = tmp_path / "a", whole("gpt2")
    logged = run_folder.RunFolder.log_step

    def in_the_way(run, step, *args):
        logged(run, step, *args)
        if step == 10:
            (folder / "config.json").rename(folder / "aside.json")
            (folder / "config.json").mkdir()
        if step == 30:
            (folder / "config.json").rmdir()
            (folder / "aside.json").rename(folder / "config.json")

    monkeypatch.setattr(run_folder.RunFolder, "log_step", in_the_way)
    capsys.readouterr()
    train(data, folder, *KINDS["gpt2"])
    out = capsys.readouterr().out
    assert out.count(
        f"cannot save a checkpoint in {folder} (Is a directory): see what became of it") == 2
    assert steps_saved(folder) == [8, 32, 40, 48, 56, 60] and "done: " in out
    assert_same_runs(folder, whole_run)


# ----------------------------------------------------------------------------------------------------------------------
# Writing in the background


def write(writer, step, state):
    """A checkpoint by `writer`, waited for -> what it says."""
    writer.start(step, state)
    writer.wait_copied()
    return writer.collect(wait=True)


@pytest.mark.parametrize("keep, left", [(2, [4, 5]), (0, [1, 2, 3, 4, 5]), (9, [1, 2, 3, 4, 5])])
def test_the_writer_keeps_the_newest(keep, left, tmp_path):
    (tmp_path / "ckpt_00001.pt.aside").touch()
    writer = Writer(tmp_path, keep)
    for step in range(1, 6):
        assert writer.collect() is None
        says = rf"saved {tmp_path}/ckpt_0000{step}.pt, 0.00 GB in \d+\.\d s; training waited \d+ ms"
        assert re.fullmatch(
            says, write(writer, step, {"step": step, "x": torch.full((4,), float(step))}))
    assert steps_saved(tmp_path) == left
    assert all(
        checkpoint.read(path)["x"].tolist() == [step] * 4
        for step, path in checkpoint.found(tmp_path))
    assert {path.suffix for path in tmp_path.iterdir()} == {".pt", ".aside"}


def test_the_writer_makes_room_but_for_the_newest(tmp_path, monkeypatch):
    writer = Writer(tmp_path, keep=5)
    for step in (1, 2, 3):
        checkpoint.write(checkpoint.path_of(tmp_path, step), {"x": torch.ones(1000)})
    with monkeypatch.context() as patch:
        full_when(patch, lambda _: len(steps_saved(tmp_path)) >= 3)
        write(writer, 4, {"x": torch.ones(1000)})
    assert steps_saved(tmp_path) == [2, 3, 4]
    full_when(monkeypatch, lambda _: True)
    with pytest.raises(BadInput, match="free some disk space"):
        write(writer, 5, {"x": torch.ones(1000)})
    assert steps_saved(tmp_path) == [4]  # the newest stays


def test_the_best_checkpoint_makes_no_room(tmp_path, monkeypatch):
    writer = Writer(tmp_path, keep=5)
    for step in (1, 2, 3):
        checkpoint.write(checkpoint.path_of(tmp_path, step), {"x": torch.ones(1000)})
    full_when(monkeypatch, lambda _: True)
    writer.start(4, {"x": torch.ones(1000), "best": [2.0, 4]}, former_best=1)
    with pytest.raises(BadInput, match="free some disk space"):
        writer.collect(wait=True)
    assert steps_saved(tmp_path) == [1, 3]  # and the newest


def test_tied_tensors_stay_one(tmp_path):
    tied = torch.randn(200, 100)
    state = {"wte": tied, "head": tied, "parts": [tied, tied.clone()]}
    write(Writer(tmp_path, 0), 1, state)
    assert 160_000 < (tmp_path / "ckpt_00001.pt").stat().st_size < 170_000
    loaded = checkpoint.read(tmp_path / "ckpt_00001.pt")
    assert loaded["wte"].data_ptr() == loaded["head"].data_ptr() != loaded["parts"][1].data_ptr(
    ) and same(loaded, state)


def test_training_waits_for_the_copy_and_not_for_the_disk(whole, data, tmp_path, monkeypatch):
    copy, save, updates = Writer._to_host, torch.save, []

    def late_copy(*args):
        time.sleep(0.1)  # the tensors would have changed by then
        return copy(*args)

    def late_save(state, file):
        seen = len(updates)
        while len(updates) < min(seen + 2, 60):  # training goes on meanwhile
            time.sleep(0.001)
        save(state, file)

    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (updates.append(1), step(self)))
    monkeypatch.setattr(Writer, "_to_host", late_copy)
    monkeypatch.setattr(torch, "save", late_save)
    folder = train(data, tmp_path / "a", *KINDS["gpt2"])
    assert_same_runs(folder, whole("gpt2"))
    for step, path in checkpoint.found(folder):
        ours, theirs = checkpoint.read(path), checkpoint.read(
            checkpoint.path_of(whole("gpt2"), step))
        assert all(
            same(ours[name], theirs[name])
            for name in ("model", "optimizer", "loader", "step", "skipped")), step


def test_what_fails_in_the_background_comes_out_of_collect(tmp_path, monkeypatch):
    writer = Writer(tmp_path, 1)
    write(writer, 1, {"x": torch.zeros(9)})

    def half(state, file):
        file.write(b"half")
        raise RuntimeError("enforce fail: unexpected pos")

    with monkeypatch.context() as patch, pytest.raises(
            BadInput, match=r"cannot save \S+ckpt_00002.pt \(RuntimeError: .*free some disk space"):
        patch.setattr(torch, "save", half)
        write(writer, 2, {"x": torch.zeros(9)})
    with monkeypatch.context() as patch, pytest.raises(BadInput,
                                                       match="no copy of it fits into memory"):
        patch.setattr(torch, "empty", lambda *args, **kwargs:
                      (_ for _ in ()).throw(RuntimeError("no memory")))
        write(writer, 2, {"x": torch.zeros(10)})
    assert os.listdir(tmp_path) == ["ckpt_00001.pt"]  # the old one was not dropped for them
    assert write(writer, 3, {"x": torch.ones(9)
                             }).startswith("saved") and os.listdir(tmp_path) == ["ckpt_00003.pt"]


def test_the_optimizer_keeps_its_own_settings():
    model = torch.nn.Linear(3, 3)
    before = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.2)
    model(torch.ones(1, 3)).sum().backward()
    before.step()
    after = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1, fused=True)
    run_folder.load_optimizer(after, before.state_dict(), 1)
    assert after.param_groups[0]["fused"] is True and after.param_groups[0]["weight_decay"] == 0.1
    assert same(after.state_dict()["state"], before.state_dict()["state"])


# ----------------------------------------------------------------------------------------------------------------------
# torchrun, and killed again and again

TWO = ["--max_steps", "300", "--save_every", "50", "--eval_every", "100", "--micro_batch", "2"]


@pytest.mark.slow
@linux
def test_torchrun_restarts_what_died(launch, data, tmp_path):
    result = launch("train_gpt2.py", *command(data, tmp_path / "whole", *TWO), processes=2)
    assert result.returncode == 0, result.stderr
    words = command(data, tmp_path / "log" / "unnamed", *TWO)
    at = words.index("--run_name")
    del words[at:at + 2]  # the restarted processes find the folder by themselves
    with running(words, tmp_path / "out.txt",
                 ["--standalone", "--nproc_per_node=2", "--max_restarts=1"]) as agent:
        wait_for(lambda: list(tmp_path.glob("log/*/ckpt_00050.pt")), agent)
        os.kill(worker(agent, 1), 9)
        code = agent.wait(120)
    assert code == 0, (tmp_path / "out.txt").read_text()[-3000:]
    [folder] = (tmp_path / "log").iterdir()
    starts = json.loads((folder / "config.json").read_text())["starts"]
    assert len(starts) == 2 and starts[1]["step"] >= 50 and starts[1]["from"].startswith(
        str(folder))
    assert_same_runs(folder, tmp_path / "whole")


@pytest.mark.slow
def test_twenty_kills_leave_no_trace(data, tmp_path):
    rng, torn, kills = random.Random(6), 0, 20
    flags = [
        "--max_steps", "600", "--n_embd", "128", "--save_every", "2", "--keep", "3", "--eval_every",
        "50"
    ]
    whole, folder = train(data, tmp_path / "whole", *flags), tmp_path / "killed"
    for kill in range(kills):
        with running(command(data, folder, *flags), tmp_path / "out.txt") as process:
            wait_for(lambda: "step " in (tmp_path / "out.txt").read_text(), process)
            time.sleep(rng.uniform(0, 0.5))
            if kill % 2:  # right in a save
                while process.poll() is None and not any(
                        name.endswith(".tmp") for name in os.listdir(folder)):
                    pass
            assert process.poll() is None, "the run is too short for so many kills"
            process.kill()
            process.wait()
        left = list(folder.glob("ckpt_*.tmp"))
        torn += bool(left)
        print(
            f"kill {kill + 1}: {logged(folder)} lines, newest checkpoint {checkpoint.found(folder)[:1]}, torn {left}"
        )
    with running(command(data, folder, *flags), tmp_path / "out.txt") as process:
        assert process.wait(120) == 0
    print(f"{torn} of {kills} kills hit a save")
    assert torn >= 3
    assert_same_runs(folder, whole)
    assert scalars(folder) == scalars(whole)
    assert not list(folder.glob("*.tmp")) and len(steps_saved(folder)) == 3
    assert len(json.loads((folder / "config.json").read_text())["starts"]) == kills + 1
