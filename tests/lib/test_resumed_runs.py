"""Resumed runs against uninterrupted ones: python -m pytest tests/lib/test_resumed_runs.py"""

import errno
import itertools
import json
import math
import os
import re
import shlex
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import TINY_FLAGS, read_log, sentences, write_data, write_lines
from runs import (
    KINDS,
    RUN,
    again,
    assert_same_runs,
    command,
    contents,
    cut,
    final,
    lines,
    logged,
    same,
    scalars,
    steps_saved,
    stop_when,
    train,
)

import fineweb
import train_gpt2
from lib import checkpoint, resume
from lib.cli import BadInput, RankError
from lib.shards import Shards
from lib.tokenizers import train_bpe
from train_gpt2 import GPTConfig, ShardLoader, TrainConfig

# --------------------------------------------------------------------------------------------------
# Where to start


@pytest.mark.parametrize("kind, step", [("gpt2", 40), ("modern", 24)])
def test_the_same_command_continues_exactly(kind, step, whole, data, tmp_path, capsys):
    loader = final(whole(kind))["loader"]
    assert loader["epoch"] >= 3 and loader["offset"] > 0
    folder = cut(whole(kind), tmp_path / "whole", step)
    train(data, folder, *KINDS[kind])
    path = folder / f"ckpt_{step:05d}.pt"
    assert f"resume  {path}, step {step}; as before\n" in capsys.readouterr().out
    assert_same_runs(folder, whole(kind))


def test_going_back_in_the_same_folder(whole, tmp_path, monkeypatch):
    """By a relative path. Later checkpoints are set aside."""
    monkeypatch.chdir(tmp_path)
    folder = cut(whole("gpt2"), tmp_path / "log" / "a", 60)
    train_gpt2.main(["--resume", "log/a/ckpt_00040.pt"])
    assert_same_runs(folder, whole("gpt2"))
    assert sorted(path.name for path in folder.glob("*.aside")) == [
        "ckpt_00048.pt.aside", "ckpt_00056.pt.aside", "ckpt_00060.pt.aside",
        "weights_00060.pt.aside"
    ]
    assert steps_saved(folder) == [8, 16, 24, 32, 40, 48, 56, 60]
    assert os.listdir(tmp_path) == ["log"]
    assert os.listdir(tmp_path / "log") == ["a"]


def test_a_stopped_run_that_went_back_prints_how_to_continue(whole, tmp_path, monkeypatch, capsys):
    """With another --resume, since the same one would go back again."""
    monkeypatch.chdir(tmp_path)
    folder = cut(whole("gpt2"), tmp_path / "log" / "a", 60)
    with monkeypatch.context() as patch:
        stop_when(patch, lambda: logged(folder) >= 50)
        train_gpt2.main(["--resume", "log/a/ckpt_00040.pt"])
    printed = re.search(r"stopped at step (\d+) of 60: .* with (--resume .+) to continue\n",
                        capsys.readouterr().out)
    step, flags = printed.groups()
    assert int(step) > 40
    train_gpt2.main(["--resume", "log/a/ckpt_00040.pt", *shlex.split(flags)])
    assert f"step {step}; as before" in capsys.readouterr().out
    assert_same_runs(folder, whole("gpt2"))


def test_a_branch(whole, data, tmp_path, capsys):
    source = cut(whole("gpt2"), tmp_path / "source", 60)
    branch = tmp_path / "branch"
    before = contents(source)
    flags = ["--resume", source / "ckpt_00024.pt", *KINDS["gpt2"]]
    train(data, branch, *flags)
    assert lines(branch) == lines(whole("gpt2"), 24)
    assert same(final(branch), final(whole("gpt2")))

    for step in (48, 56, 60):
        (branch / f"ckpt_{step:05d}.pt").unlink()
    capsys.readouterr()
    train(data, branch, *flags)  # continues from its own checkpoints
    assert f"resume  {branch / 'ckpt_00040.pt'}, step 40" in capsys.readouterr().out
    assert lines(branch) == lines(whole("gpt2"), 24)
    assert same(final(branch), final(whole("gpt2")))

    train(data, branch, *flags)
    assert "ckpt_00060.pt is the end of a run of 60 steps" in capsys.readouterr().out
    assert contents(source) == before


def test_resume_from_a_folder(whole, data, tmp_path):
    source = cut(whole("gpt2"), tmp_path / "source", 48)
    train(data, tmp_path / "other", "--resume", source, *KINDS["gpt2"])
    assert lines(tmp_path / "other") == lines(whole("gpt2"), 48)
    train_gpt2.main(["--resume", str(source)])  # without --run_name: in that folder
    assert_same_runs(source, whole("gpt2"))


@pytest.mark.parametrize("log_dir", ["log/../log", "link"])
def test_a_path_into_the_run_itself_may_be_written_in_any_way(log_dir, whole, tmp_path, capsys):
    folder = cut(whole("gpt2"), tmp_path / "log" / "a", 60)
    (tmp_path / "link").symlink_to(tmp_path / "log")
    again(folder, "--resume", tmp_path / log_dir / "a" / "ckpt_00056.pt")
    assert "ckpt_00056.pt, step 56; as before\n" in capsys.readouterr().out  # not the newest
    assert_same_runs(folder, whole("gpt2"))


@pytest.mark.parametrize("path", ["nowhere.pt", "empty"])
def test_a_resume_without_a_checkpoint_is_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=path):
        train_gpt2.main(["--resume", path])
    assert os.listdir(tmp_path) == ["empty"]


def test_resume_auto_without_a_name_continues_only_the_same_command(data, tmp_path, monkeypatch,
                                                                    capsys):
    """As in `make train`: an interrupted run is continued, a finished one is followed by a new one.
    """
    clock = itertools.count()
    monkeypatch.setattr("lib.run_folder.time.strftime", lambda form: f"{next(clock):04d}")

    def start(*flags, stop=False):
        """-> (the folder's name, the step it started at, whether the run finished)."""
        words = [*RUN, "--data", str(data), "--log_dir", str(tmp_path), "--resume", "auto",
                 "--max_steps", "24", *flags]
        before = set(tmp_path.iterdir())
        monkeypatch.setattr(sys, "argv", ["train_gpt2.py", *words])
        with monkeypatch.context() as patch:
            if stop:
                stop_when(patch, lambda: max(map(logged, tmp_path.iterdir())) >= 12)
            train_gpt2.main(words)
        out = capsys.readouterr().out
        resumed = re.search(r"resume  (.+)/ckpt_(\d+).pt", out)
        if resumed:
            return Path(resumed[1]).name, int(resumed[2]), "done: " in out
        (new,) = set(tmp_path.iterdir()) - before
        return new.name, 0, "done: " in out

    first, step, finished = start(stop=True)
    assert (step, finished) == (0, False)
    other, step, finished = start("--max_lr", "1e-3")  # other flags: a run of its own
    assert other != first
    assert (step, finished) == (0, True)
    interrupted_at = steps_saved(tmp_path / first)[-1]
    assert 0 < interrupted_at < 24
    assert start() == (first, interrupted_at, True)
    new, step, finished = start()
    assert new not in (first, other)
    assert (step, finished) == (0, True)


def test_resume_auto_with_a_name_begins_or_continues(whole, data, tmp_path):
    (tmp_path / "a").mkdir()  # a run may use an empty folder
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
    assert "changed: --micro_batch 4 -> 2\n" in result.stdout
    assert "x 2 processes\n" in result.stdout
    back = train(data, cut(two, tmp_path / "back", 10), *short, "--micro_batch", "8")
    assert len(read_log(one)) == 18
    for folder in (two, back):
        assert read_log(folder) == pytest.approx(read_log(one), rel=1e-5)
        assert final(folder)["loader"] == final(one)["loader"]


# --------------------------------------------------------------------------------------------------
# Settings


def test_settings_come_from_the_checkpoint(whole, tmp_path):
    folder = again(cut(whole("modern"), tmp_path / "a", 48))
    assert_same_runs(folder, whole("modern"))
    config = json.loads((folder / "config.json").read_text())
    assert config["train"]["schedule"] == "wsd"
    assert config["model"]["n_layer"] == 2


def test_a_checkpoint_without_newer_settings(whole, data, tmp_path, capsys):
    folder = cut(whole("gpt2"), tmp_path / "a", 56)
    path = folder / "ckpt_00056.pt"
    state = checkpoint.read(path)
    state["train_config"]["data"] = str(data)  # not a tuple yet
    for name in ("batch_warmup", "curriculum"):
        del state["train_config"][name]
    for name in ("token_shift", "n_experts"):
        del state["model_config"][name]
    state["timed"] = (0, 0.0)
    checkpoint.write(path, state)
    again(folder)
    assert "step 56; as before\n" in capsys.readouterr().out
    assert_same_runs(folder, whole("gpt2"))

    state["timed"] = (3, 2.0)  # steps and seconds; newer versions count tokens
    resume.Resume(path, state, set()).adopt(TrainConfig(), GPTConfig(), set())
    assert state["timed"] == (3 * 256, 2.0)


def test_the_length_stays_if_the_size_of_the_data_changes(whole, tmp_path):
    folder = cut(whole("gpt2"), tmp_path / "a", 48)
    state = checkpoint.read(folder / "ckpt_00048.pt")
    state["train_config"] |= {"max_steps": None, "epochs": 5.0}  # as if 5 epochs were 60 steps
    checkpoint.write(folder / "ckpt_00048.pt", state)
    assert_same_runs(again(folder), whole("gpt2"))


def test_training_flags_may_change(whole, tmp_path, capsys):
    before = whole("gpt2")
    folder = again(cut(before, tmp_path / "a", 48),
                   "--max_lr", "1e-3", "--weight_decay", "0.7", "--dropout", "0")
    changed = re.search(r"^resume .*; changed: (.*)$", capsys.readouterr().out, re.MULTILINE)[1]
    assert sorted(changed.split(", ")) == [
        "--dropout 0.1 -> 0.0", "--max_lr 0.005 -> 0.001", "--weight_decay 0.1 -> 0.7"]
    assert json.loads((folder / "config.json").read_text())["starts"][1]["changed"] == changed

    earlier = len(lines(before)) - len(lines(before, 48))
    assert lines(folder)[:earlier] == lines(before)[:earlier]
    assert len(lines(folder)) == len(lines(before))
    assert lines(folder, 49) != lines(before, 49)

    state = final(folder)
    assert state["model_config"]["dropout"] == 0
    groups = state["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.7, 0.0}
    rates = dict(scalars(folder)["optim/lr"])
    rates_before = dict(scalars(before)["optim/lr"])  # of --max_lr 5e-3
    assert rates[48] == pytest.approx(rates_before[48] / 5)
    assert [group["lr"] for group in groups] == pytest.approx([rates_before[59] / 5] * len(groups))


@pytest.mark.parametrize("kind, flags, misfits", [
    ("gpt2", ["--n_layer", "3"], ["--n_layer 2 -> 3"]),
    ("gpt2", ["--mlp", "relu2"], ["--mlp gelu -> relu2"]),  # the same shapes, another function
    ("gpt2", ["--block_size", "16"], ["--block_size 32 -> 16"]),
    ("gpt2", ["--size", "gpt2"],
     ["--n_layer 2 -> 12", "--n_head 2 -> 12", "--n_embd 32 -> 768"]),
    ("gpt2", ["--preset", "modern"], ["--mlp gelu -> swiglu", "--norm layernorm -> rmsnorm"]),
    ("modern", ["--n_head", "4"], ["--n_head 2 -> 4"]),
])
def test_flags_that_do_not_fit_the_weights_are_refused(kind, flags, misfits, whole, tmp_path):
    folder = cut(whole(kind), tmp_path / "a", 48)
    before = contents(folder)
    with pytest.raises(BadInput) as error:
        again(folder, *flags)
    assert all(misfit in str(error.value) for misfit in misfits)
    assert contents(folder) == before


def test_the_context_may_change_with_rotary_positions(whole, tmp_path, capsys):
    folder = again(cut(whole("modern"), tmp_path / "a", 56), "--block_size", "64")
    assert "changed: --block_size 32 -> 64" in capsys.readouterr().out
    assert final(folder)["model_config"]["block_size"] == 64
    assert final(folder)["loader"] == final(whole("modern"))["loader"]


def test_a_finished_run_stays_as_it_is(whole, data, tmp_path, capsys):
    folder = cut(whole("gpt2"), tmp_path / "a", 60)
    before = contents(folder)
    says = f"{folder / 'ckpt_00060.pt'} is the end of a run of 60 steps: "
    again(folder)
    assert capsys.readouterr().out.startswith(says)
    train(data, folder, *KINDS["gpt2"])
    assert capsys.readouterr().out.startswith(says)
    assert contents(folder) == before


@pytest.mark.parametrize("flags", [["--max_steps", "66"], ["--epochs", "3.6"]],
                         ids=["max_steps", "epochs"])
def test_a_finished_run_continues_with_a_greater_length(flags, whole, data, tmp_path, capsys):
    assert int(3.6 * Shards(data).tokens["train"] / 256) == 66
    folder = again(cut(whole("gpt2"), tmp_path / "a", 60), *flags)
    assert "ckpt_00060.pt, step 60; changed: " in capsys.readouterr().out
    log = read_log(folder)
    assert [step for step, kind in log if kind == "train"] == list(range(66))
    assert (66, "val") in log
    assert steps_saved(folder)[-1] == final(folder)["max_steps"] == 66


@pytest.mark.parametrize("kind, flags, warns", [
    ("gpt2", ["--max_steps", "120"], True),
    ("modern", ["--max_steps", "120"], True),
    ("gpt2", ["--max_steps", "120", "--max_lr", "2e-4"], False),
], ids=["cosine", "wsd", "lower"])
def test_a_longer_run_warns_that_its_learning_rate_rises(kind, flags, warns, whole, tmp_path,
                                                         capsys, monkeypatch):
    folder = cut(whole(kind), tmp_path / "a", 60)
    before = logged(folder)
    stop_when(monkeypatch, lambda: logged(folder) > before)
    again(folder, *flags)
    assert ("rises again" in capsys.readouterr().out) == warns
    if kind == "gpt2" and warns:
        # 58 of 118 steps after the warm-up: half a cosine from 5e-3 down to a tenth of it
        assert dict(scalars(folder)["optim/lr"])[60] == pytest.approx(2.81e-3, abs=5e-6)


# --------------------------------------------------------------------------------------------------
# Data


@pytest.mark.parametrize("size", [270, 400])  # padded to the same size of embedding, and another
def test_data_of_another_tokenizer_is_refused(size, whole, tmp_path):
    texts = [*sentences(200, seed=7), *(f"{n}{n}" * 2 for n in range(1000))]
    other = write_data(tmp_path / "data", train_bpe(texts, size))
    folder = cut(whole("gpt2"), tmp_path / "a", 48)
    before = contents(folder)
    with pytest.raises(BadInput, match="another tokenizer"):
        again(folder, "--data", other)
    assert contents(folder) == before


def test_other_data_is_read_from_its_beginning(whole, tokenizer, tmp_path, capsys):
    other = write_data(tmp_path / "data", tokenizer, shards=2)
    folder = again(cut(whole("gpt2"), tmp_path / "a", 48), "--data", other)
    assert "other training data, read from its beginning\n" in capsys.readouterr().out
    loader = ShardLoader(Shards(other).train, tokenizer, 1337)
    for _ in range(12):
        loader.next(256)
    assert final(folder)["loader"] == loader.state_dict()


def test_other_text_in_shards_of_the_same_names_and_lengths(tokenizer, tmp_path, capsys):
    """As --max_tokens makes from two sources: only an explicit --data continues with new text."""
    data = tmp_path / "data"
    tokenizer.save(tmp_path / "tokenizer.json")

    def make(seed):
        shutil.rmtree(data, ignore_errors=True)
        rows = [{"text": text} for text in sentences(400, seed)]
        source = write_lines(tmp_path / "text.jsonl", rows)
        fineweb.main(["--source", str(source), "--out", str(data),
                      "--tokenizer", str(tmp_path / "tokenizer.json"),
                      "--max_tokens", "9000", "--shard_size", "3000", "--val_tokens", "1000"])
        return Shards(data)

    first = make(seed=1)
    folder = train(data, tmp_path / "a", "--max_steps", 6)
    other = make(seed=2)
    assert (other.former_identity, other.tokens) == (first.former_identity, first.tokens)
    before = contents(folder)
    name = re.escape(shlex.quote(str(data)))
    with pytest.raises(BadInput, match=f"{name} no longer contains the text .*--data {name}"):
        again(folder, "--max_steps", 8)
    assert contents(folder) == before

    # a checkpoint of a version that compared only names and lengths
    old = cut(folder, tmp_path / "old", 6)
    state = checkpoint.read(old / "ckpt_00006.pt")
    checkpoint.write(old / "ckpt_00006.pt", state | {"data": first.former_identity})
    capsys.readouterr()
    again(old, "--max_steps", 8)
    assert "other training data" not in capsys.readouterr().out
    assert final(old)["data"] == other.identity

    back = cut(folder, tmp_path / "back", 6)
    again(folder, "--max_steps", 8, "--data", data)
    assert "other training data, read from its beginning" in capsys.readouterr().out
    assert final(folder)["loader"]["offset"] == 2 * 256

    make(seed=1)
    again(back, "--max_steps", 8)
    assert "other training data" not in capsys.readouterr().out


def test_the_same_data_elsewhere_continues_where_it_was(whole, data, tmp_path, capsys):
    moved = shutil.copytree(data, tmp_path / "moved")
    folder = again(cut(whole("gpt2"), tmp_path / "a", 48), "--data", moved)
    assert "other training data" not in capsys.readouterr().out
    assert_same_runs(folder, whole("gpt2"))


# --------------------------------------------------------------------------------------------------
# Checkpoints that cannot be resumed


def moments(change):
    """A change of all moments in a checkpoint."""
    def apply(state):
        kept = state["optimizer"]["state"]
        for parameter in kept:
            kept[parameter] = change(kept[parameter])
    return apply


TAMPERED = {
    "no optimizer": lambda s: s.pop("optimizer"),
    "no loader": lambda s: s.pop("loader"),
    "step as text": lambda s: s.update(step="8"),
    "negative step": lambda s: s.update(step=-8),
    "endless": lambda s: s.update(max_steps=10**30),
    "shard 10^6": lambda s: s["loader"].update(shard=10**6),
    "schedule": lambda s: s["train_config"].update(schedule="nonsense"),
    "batch of a list": lambda s: s["train_config"].update(total_batch_size=[256]),
    "10^9 layers": lambda s: s["model_config"].update(n_layer=10**9),
    "no moments": moments(lambda m: {}),
    "moments of another shape": moments(lambda m: m | {"exp_avg": torch.zeros(3, 5)}),
    "one moment missing": moments(lambda m: {"step": m["step"], "exp_avg": m["exp_avg"]}),
    "moments as text": moments(lambda m: m | {"exp_avg": "much"}),
    "moments not finite": moments(lambda m: m | {"exp_avg": m["exp_avg"] * math.nan}),
    "negative count of steps": moments(lambda m: m | {"step": torch.tensor(-5.0)}),
    "no tokenizer": lambda s: s.pop("tokenizer"),
    "tokenizer": lambda s: s.update(tokenizer=7),
    "weights of another shape": lambda s: s["model"].update(
        {"transformer.ln_f.weight": torch.ones(31)}),
    "nothing known": lambda s: (s.clear(), s.update(other=1)),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_a_tampered_checkpoint_is_refused_and_nothing_changes(what, whole, tmp_path):
    folder = cut(whole("gpt2"), tmp_path / "a", 8)
    state = checkpoint.read(folder / "ckpt_00008.pt")
    TAMPERED[what](state)
    checkpoint.write(folder / "ckpt_00008.pt", state)
    before = contents(folder)
    with pytest.raises(BadInput, match="ckpt_00008.pt") as error:
        again(folder)
    assert len(str(error.value)) < 400
    assert contents(folder) == before


def test_a_torn_newest_checkpoint_costs_only_its_steps(whole, data, tmp_path, capsys):
    folder = cut(whole("gpt2"), tmp_path / "a", 56)
    path = folder / "ckpt_00056.pt"
    torn = bytearray(path.read_bytes())
    torn[len(torn) // 2] ^= 16
    path.write_bytes(torn)
    train(data, folder, *KINDS["gpt2"])
    out, err = capsys.readouterr()
    assert err.count("skipped: ") == 1
    assert "ckpt_00056.pt" in err.splitlines()[0]
    assert "ckpt_00048.pt, step 48; as before" in out
    assert_same_runs(folder, whole("gpt2"))
    assert (folder / "ckpt_00056.pt.aside").read_bytes() == torn
    assert same(checkpoint.read(path)["model"],
                checkpoint.read(whole("gpt2") / "ckpt_00056.pt")["model"])


def test_a_temporarily_unreadable_disk_sets_nothing_aside(whole, data, tmp_path, monkeypatch):
    folder = cut(whole("gpt2"), tmp_path / "whole", 40)
    opened = zipfile.ZipFile

    def fails(path, *args):
        if "00040" in str(path):
            raise OSError(errno.EIO, "Input/output error")
        return opened(path, *args)

    monkeypatch.setattr(zipfile, "ZipFile", fails)
    with pytest.raises(RankError, match="ckpt_00040.pt .*Input/output error"):
        train(data, folder, *KINDS["gpt2"])
    monkeypatch.undo()
    assert_same_runs(train(data, folder, *KINDS["gpt2"]), whole("gpt2"))


def with_weights(folder, value):
    """Set the gains of the last norm in a run's checkpoint of step 8."""
    state = checkpoint.read(folder / "ckpt_00008.pt")
    state["model"]["transformer.ln_f.weight"] = torch.full((32,), value)
    checkpoint.write(folder / "ckpt_00008.pt", state)


def test_weights_that_are_nan_are_refused(whole, launch, tmp_path):
    folder = cut(whole("gpt2"), tmp_path / "log" / "a", 8)
    path = folder / "ckpt_00008.pt"
    with_weights(folder, math.nan)
    before = contents(folder)
    for script, *flags in (("train_gpt2.py", "--run_name", "a", "--max_steps", 10),
                           ("posttrain.py", "--checkpoint", path, "--data", tmp_path)):
        result = launch(script, *flags)
        assert result.returncode == 2
        assert result.stdout == ""
        assert result.stderr.count("\n") == 1
        assert "ckpt_00008.pt has weights that are NaN or infinite" in result.stderr
    assert contents(folder) == before
    assert os.listdir(tmp_path / "log") == ["a"]


@pytest.mark.parametrize("steps, skipped", [(10, 2), (20, 3)])
def test_weights_without_a_finite_loss_end_a_run(steps, skipped, whole, tmp_path, capsys):
    """Also with fewer steps to go than --max_skipped."""
    folder = cut(whole("gpt2"), tmp_path / "log" / "a", 8)
    with_weights(folder, 3e38)
    with pytest.raises(BadInput, match=f"the last {skipped} steps were non-finite"):
        again(folder, "--max_steps", steps, "--max_skipped", 3, "--sample_every", 2)
    out = capsys.readouterr().out
    assert out.count("skipped because non-finite") == skipped
    assert "done: " not in out
    assert steps_saved(folder) == [8]


def test_a_run_that_diverges_ends_with_a_checkpoint(launch, data, tmp_path):
    result = launch("train_gpt2.py", *TINY_FLAGS, "--data", data, "--run_name", "a",
                    "--max_lr", "1e6", "--max_steps", 60, "--warmup_steps", 0, "--sample_every", 1,
                    "--grad_clip", 0, "--weight_decay", 1e6, "--max_skipped", 2)
    warning, error = result.stderr.splitlines()
    assert result.returncode == 2
    assert "--max_lr 1e+06 is" in warning
    assert "the last 2 steps were non-finite" in error
    [(step, path)] = checkpoint.found(tmp_path / "log" / "a")
    assert step < 60
    assert all(weight.isfinite().all() for weight in checkpoint.read(path)["model"].values())


def test_the_optimizer_keeps_its_own_settings():
    model = torch.nn.Linear(3, 3)
    before = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.2)
    model(torch.ones(1, 3)).sum().backward()
    before.step()
    after = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1, fused=True)
    resume.load_optimizer(after, before.state_dict(), 1)
    assert after.param_groups[0]["fused"] is True
    assert after.param_groups[0]["weight_decay"] == 0.1
    assert same(after.state_dict()["state"], before.state_dict()["state"])
