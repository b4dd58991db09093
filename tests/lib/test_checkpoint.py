"""Runs that are interrupted, resumed and killed, against undisturbed ones: python -m pytest tests/test_checkpoint.py -n 2

The slow test kills a real run twenty times: python -m pytest tests/test_checkpoint.py -m slow -s
"""
# ruff: noqa: F401, F811 (fixtures of another test file are imported, then named as parameters)

import contextlib
import errno
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, TINY_FLAGS, read_log, sentences, tiny, tiny_checkpoint, write_data
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import train_gpt2
from lib import checkpoint
from lib.cli import BadInput, RankError
from lib.tokenizers import train_bpe
from train_gpt2 import ShardLoader, Shards

# 60 steps are 3.3 epochs of the toy data, and its shards end every 6 steps
RUN = [*TINY_FLAGS, "--max_steps", "60", "--shuffle", "--micro_batch", "4", "--eval_every", "8", "--save_every", "8",
       "--keep", "0"]
KINDS = {"gpt2": ["--dropout", "0.1"],
         "modern": ["--preset", "modern", "--qk_norm", "--no-tie_embeddings", "--schedule", "wsd", "--dropout", "0.1"]}
LONG = ["--max_steps", "250", "--save_every", "50", "--eval_every", "0"]  # long enough to be caught by a signal
EXAMPLES = settings(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None)
linux = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")


# ----------------------------------------------------------------------------------------------------------------------
# Helpers


def command(data, folder, *flags):
    return [str(word) for word in (*RUN, "--data", data, "--log_dir", folder.parent, "--run_name", folder.name, *flags)]


def train(data, folder, *flags):
    """A run in this process -> its folder."""
    train_gpt2.main(command(data, folder, *flags))
    return folder


def cut(source, to, step):
    """A copy of a run folder as if the run had been killed before its next checkpoint after `step`."""
    shutil.copytree(source, to)
    for later, path in checkpoint.found(to):
        if later > step:
            path.unlink()
    return to


def lines(folder, first=0):
    """log.txt's lines from step `first` on."""
    return [line for line in (folder / "log.txt").read_text().splitlines() if int(line.split()[0]) >= first]


def flat(state, name=""):
    """A nested checkpoint -> {path: leaf}."""
    if isinstance(state, (dict, list, tuple)):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {key: leaf for k, value in items for key, leaf in flat(value, f"{name}/{k}").items()}
    return {name: state}


def same(a, b):
    """Two nested states are equal, tensors bit for bit."""
    a, b = flat(a), flat(b)
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


def final(folder):
    """The newest checkpoint, less the settings: runs differ in their names."""
    return {k: v for k, v in checkpoint.read(checkpoint.found(folder)[0][1]).items() if k not in ("train_config",)}


def assert_same_runs(folder, whole):
    """log.txt byte for byte, the last checkpoint tensor for tensor."""
    assert (folder / "log.txt").read_bytes() == (whole / "log.txt").read_bytes()
    assert checkpoint.found(folder)[0][0] == checkpoint.found(whole)[0][0]
    assert same(final(folder), final(whole))


def scalars(folder):
    """What TensorBoard shows: {tag: [(step, value), ...]}, without the speed."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    shown = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert [step for step, _ in shown["perf/tok_per_sec"]] == [step for step, _ in shown["train/loss"]]
    return {tag: values for tag, values in shown.items() if not tag.startswith("perf/")}


def wait_for(condition, process, seconds=60):
    """Poll until `condition()` holds, while `process` runs."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert process.poll() is None and time.monotonic() < end, f"ended with {process.poll()} before what was waited for"
        time.sleep(0.002)
    return value


def logged(folder):
    """How many lines log.txt has now."""
    with contextlib.suppress(FileNotFoundError):
        return (folder / "log.txt").read_bytes().count(b"\n")
    return 0


def hang_up(action):
    """What a child does on SIGHUP, whatever this process does (it may be under nohup)."""
    return lambda: signal.signal(signal.SIGHUP, action)


@contextlib.contextmanager
def running(words, out, torchrun=(), on_hangup=signal.SIG_DFL):
    """The real train_gpt2.py in the background, what it prints in the file `out`; ended with the block at the latest."""
    launcher = ["-m", "torch.distributed.run", *torchrun, "--"] if torchrun else []
    start = [sys.executable, *launcher, str(ROOT / "train_gpt2.py")]
    with open(out, "w") as file, subprocess.Popen(
            [*start, *words], stdout=file, stderr=subprocess.STDOUT, cwd=out.parent,
            env=os.environ | {"OMP_NUM_THREADS": "1"}, preexec_fn=hang_up(on_hangup)) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(40)
                except subprocess.TimeoutExpired:
                    process.kill()


def worker(agent, rank):
    """The process id of torchrun's worker of this rank, or None."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            mine = f"\nPPid:\t{agent.pid}\n" in (folder / "status").read_text()
            if mine and f"RANK={rank}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                return int(folder.name)
    return None


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """whole("gpt2") -> the folder of an undisturbed run, to be read only."""
    made = {}

    def folder(kind, *flags):
        if (kind, *flags) not in made:
            made[(kind, *flags)] = train(data, tmp_path_factory.mktemp(kind) / "whole", *KINDS.get(kind, ()), *flags)
        return made[(kind, *flags)]
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# Resuming


@pytest.mark.parametrize("kind, step", [("gpt2", 40), ("modern", 24)])
def test_the_same_command_goes_on_exactly(kind, step, whole, data, tmp_path, capsys):
    loader = checkpoint.read(whole(kind) / "ckpt_00060.pt")["loader"]
    assert loader["epoch"] >= 3 and loader["offset"] > 0
    folder = cut(whole(kind), tmp_path / "whole", step)
    train(data, folder, *KINDS[kind])
    assert f"resume  {folder / f'ckpt_{step:05d}.pt'}, step {step}; as before\n" in capsys.readouterr().out
    assert_same_runs(folder, whole(kind))


def test_relative_folders(whole, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cut(whole("gpt2"), tmp_path / "log" / "a", 40)
    words = [*RUN, "--data", os.path.relpath(data), "--run_name", "a"]
    train_gpt2.main([*words, *KINDS["gpt2"]])
    assert lines(tmp_path / "log" / "a") == lines(whole("gpt2"))
    train_gpt2.main(["--resume", "log/a/ckpt_00024.pt"])  # back, in its own folder
    assert lines(tmp_path / "log" / "a") == lines(whole("gpt2"))


def test_a_branch(whole, data, tmp_path, capsys):
    source, branch = cut(whole("gpt2"), tmp_path / "source", 60), tmp_path / "branch"
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    flags = ["--resume", source / "ckpt_00024.pt", *KINDS["gpt2"]]
    train(data, branch, *flags)
    assert lines(branch) == lines(whole("gpt2"), 24) and same(final(branch), final(whole("gpt2")))

    for path in (branch / "ckpt_00048.pt", branch / "ckpt_00056.pt", branch / "ckpt_00060.pt"):
        path.unlink()
    capsys.readouterr()
    train(data, branch, *flags)  # goes on with its own
    assert f"resume  {branch / 'ckpt_00040.pt'}, step 40" in capsys.readouterr().out
    assert lines(branch) == lines(whole("gpt2"), 24) and same(final(branch), final(whole("gpt2")))
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before

    train(data, branch, *flags)
    assert "ckpt_00060.pt is the end of a run of 60 steps" in capsys.readouterr().out


def test_resume_from_a_folder(whole, data, tmp_path, capsys):
    source = cut(whole("gpt2"), tmp_path / "source", 48)
    train(data, tmp_path / "other", "--resume", source, *KINDS["gpt2"])
    assert f"resume  {source / 'ckpt_00048.pt'}, step 48" in capsys.readouterr().out
    assert lines(tmp_path / "other") == lines(whole("gpt2"), 48)

    train_gpt2.main(["--resume", str(source)])  # without --run: in that folder
    assert_same_runs(source, whole("gpt2"))


def test_resume_from_a_path_without_run_sets_later_checkpoints_aside(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = cut(whole("gpt2"), tmp_path / "log" / "a", 60)
    train_gpt2.main(["--resume", "log/a/ckpt_00040.pt"])
    assert_same_runs(folder, whole("gpt2"))
    assert {path.name for path in folder.glob("*.aside")} == {f"ckpt_000{step}.pt.aside" for step in (48, 56, 60)}
    assert sorted(step for step, _ in checkpoint.found(folder)) == [8, 16, 24, 32, 40, 48, 56, 60]
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
    assert [path.name for path in (tmp_path / "log").iterdir()] == ["a"]


def test_a_path_into_the_run_itself_counts_however_it_is_written(whole, tmp_path, capsys):
    folder = cut(whole("gpt2"), tmp_path / "log" / "a", 60)
    (tmp_path / "link").symlink_to(tmp_path / "log")
    for log in (tmp_path / "log" / ".." / "log", tmp_path / "link"):
        capsys.readouterr()
        train_gpt2.main(["--resume", str(log / "a" / "ckpt_00040.pt"), "--run_name", "a", "--log_dir", str(tmp_path / "log")])
        assert "ckpt_00040.pt, step 40; as before\n" in capsys.readouterr().out  # not its newest
        assert_same_runs(folder, whole("gpt2"))


@pytest.mark.parametrize("flags, says", [
    (["--resume", "auto"], "--resume auto continues the run that --run names"),
    (["--resume", "nowhere.pt"], "no checkpoint at nowhere.pt"),
    (["--resume", "empty"], "--resume empty: this folder holds no ckpt_<step>.pt"),
])
def test_a_resume_that_cannot_be(flags, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput) as error:
        train_gpt2.main(flags)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_resume_auto_begins_and_goes_on(whole, data, tmp_path):
    train(data, tmp_path / "a", "--resume", "auto", "--max_steps", "6")
    assert [step for step, _ in checkpoint.found(tmp_path / "a")] == [6]
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
    back = cut(two, tmp_path / "back", 10)
    train(data, back, *short, "--micro_batch", "8")
    assert len(read_log(one)) == 19
    for folder in (two, back):
        assert read_log(folder) == pytest.approx(read_log(one), rel=1e-5)
        assert final(folder)["loader"] == final(one)["loader"]


# ----------------------------------------------------------------------------------------------------------------------
# Flags


def test_all_settings_come_from_the_checkpoint(whole, tmp_path, capsys):
    folder = cut(whole("modern"), tmp_path / "a", 48)
    train_gpt2.main(["--run_name", "a", "--log_dir", str(tmp_path)])
    assert "ckpt_00048.pt, step 48; as before\n" in capsys.readouterr().out
    assert_same_runs(folder, whole("modern"))


def test_the_length_stays_as_it_was_when_the_data_has_changed_its_size(whole, tmp_path):
    folder = cut(whole("gpt2"), tmp_path / "a", 48)
    state = checkpoint.read(folder / "ckpt_00048.pt")
    state["train_config"] |= {"max_steps": None, "epochs": 5.0}  # as if 5 epochs had been 60 steps
    checkpoint.write(folder / "ckpt_00048.pt", state)
    train_gpt2.main(["--run_name", "a", "--log_dir", str(tmp_path)])
    assert_same_runs(folder, whole("gpt2"))


def test_training_flags_may_change_and_take_effect(whole, data, tmp_path, capsys):
    folder = cut(whole("gpt2"), tmp_path / "a", 48)
    train_gpt2.main(["--run_name", "a", "--log_dir", str(tmp_path), "--max_lr", "1e-3", "--weight_decay", "0.7", "--dropout", "0"])
    resumes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("resume")]
    assert len(resumes) == 1 and sorted(resumes[0].partition("; changed: ")[2].split(", ")) == [
        "--dropout 0.1 -> 0.0", "--max_lr 0.005 -> 0.001", "--weight_decay 0.1 -> 0.7"]
    assert json.loads((folder / "config.json").read_text())["starts"][1]["changed"] in resumes[0]
    before = len(lines(whole("gpt2"))) - len(lines(whole("gpt2"), 48))
    assert lines(folder)[:before] == lines(whole("gpt2"))[:before] and len(lines(folder)) == len(lines(whole("gpt2")))
    assert lines(folder, 49) != lines(whole("gpt2"), 49)
    state = checkpoint.read(folder / "ckpt_00060.pt")
    assert state["train_config"]["max_lr"] == 1e-3 and state["model_config"]["dropout"] == 0
    cfg = SimpleNamespace(max_lr=1e-3, min_lr_frac=0.1, warmup_steps=2, schedule="cosine")
    groups = state["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.7, 0.0]
    assert [group["lr"] for group in groups] == [train_gpt2.get_lr(59, cfg, 60)] * 2
    assert dict(scalars(folder)["lr"])[48] == pytest.approx(train_gpt2.get_lr(48, cfg, 60))


@pytest.mark.parametrize("kind, flags, names", [
    ("gpt2", ["--n_layer", "3"], ["--n_layer 2 -> 3"]),
    ("gpt2", ["--mlp", "relu2"], ["--mlp gelu -> relu2"]),  # the same shapes, another function
    ("gpt2", ["--pos", "rope", "--no-bias"], ["--pos learned -> rope", "--bias True -> False"]),
    ("gpt2", ["--block_size", "16"], ["--block_size 32 -> 16"]),
    ("gpt2", ["--size", "gpt2"], ["--n_layer 2 -> 12", "--n_head 2 -> 12", "--n_embd 32 -> 768"]),
    ("gpt2", ["--preset", "modern"], ["--mlp gelu -> swiglu", "--norm layernorm -> rmsnorm", "--emb_norm False -> True"]),
    ("modern", ["--n_head", "4"], ["--n_head 2 -> 4"]),
], ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else value)
def test_model_flags_that_differ_are_refused(kind, flags, names, whole, tmp_path):
    cut(whole(kind), tmp_path / "a", 48)
    with pytest.raises(BadInput, match="does not fit these flags") as error:
        train_gpt2.main(["--run_name", "a", "--log_dir", str(tmp_path), *flags])
    assert all(name in str(error.value) for name in names) and "\n" not in str(error.value)
    assert (tmp_path / "a" / "log.txt").read_bytes() == (whole(kind) / "log.txt").read_bytes()


def test_the_context_may_change_with_rotary_positions(whole, tmp_path, capsys):
    folder = cut(whole("modern"), tmp_path / "a", 56)
    train_gpt2.main(["--run_name", "a", "--log_dir", str(tmp_path), "--block_size", "64"])
    assert "changed: --block_size 32 -> 64" in capsys.readouterr().out
    state = checkpoint.read(folder / "ckpt_00060.pt")
    assert state["model_config"]["block_size"] == 64 and state["loader"] == final(whole("modern"))["loader"]


def test_the_context_may_change_whatever_the_flags_say_of_positions(whole, tmp_path):
    state = checkpoint.read(whole("modern") / "ckpt_00060.pt")
    state["train_config"] |= {"preset": "gpt2"}  # as if made by --preset gpt2 --pos rope ...
    checkpoint.write(tmp_path / "ckpt_00060.pt", state)
    argv = ["--preset", "gpt2", "--block_size", "64", "--resume", str(tmp_path / "ckpt_00060.pt")]
    _, model_cfg, _, _ = train_gpt2.settings(argv)
    assert (model_cfg.block_size, model_cfg.pos) == (64, "rope")


def test_the_whole_command_after_a_resume_without_flags(whole, data, tmp_path):
    folder = cut(whole("gpt2"), tmp_path / "a", 48)
    train_gpt2.main(["--run_name", "a", "--log_dir", str(tmp_path)])
    (folder / "ckpt_00060.pt").unlink()
    train(data, folder, *KINDS["gpt2"])
    assert_same_runs(folder, whole("gpt2"))
    assert json.loads((folder / "config.json").read_text())["train"]["preset"] == "gpt2"


def test_another_preset_whose_model_is_the_same(whole, data, tmp_path):
    folder = cut(whole("modern"), tmp_path / "a", 48)
    train(data, folder, *KINDS["modern"], "--preset", "tiny")  # every flag of its own, but for the preset's
    assert len(lines(folder)) == len(lines(whole("modern")))


def test_data_of_another_tokenizer_is_refused(whole, tmp_path):
    for size in (270, 400):  # with the padding the same matrices, and others
        texts = [*sentences(200, seed=7), *(f"{n}{n}" * 2 for n in range(1000))]
        other = write_data(tmp_path / f"data{size}", train_bpe(texts, size))
        folder = cut(whole("gpt2"), tmp_path / f"run{size}", 48)
        with pytest.raises(BadInput, match="made with another tokenizer") as error:
            train_gpt2.main(["--resume", str(folder), "--data", str(other)])
        assert "\n" not in str(error.value)
        assert (folder / "log.txt").read_bytes() == (whole("gpt2") / "log.txt").read_bytes()


def test_other_data_of_the_same_tokenizer_is_read_from_its_beginning(whole, tokenizer, tmp_path, capsys):
    folder, other = cut(whole("gpt2"), tmp_path / "a", 48), write_data(tmp_path / "data", tokenizer, shards=2)
    train_gpt2.main(["--resume", str(folder), "--data", str(other)])
    says = r"step 48; changed: --data \S+ -> \S+, other training data[:,] read from its beginning\n"
    assert re.search(says, capsys.readouterr().out)
    loader = ShardLoader(Shards(other).train, tokenizer, 1337)
    for _ in range(12):
        loader.next(256)
    assert final(folder)["loader"] == loader.state_dict()


def test_the_same_data_elsewhere_goes_on_where_it_was(whole, data, tmp_path, capsys):
    folder = cut(whole("gpt2"), tmp_path / "a", 48)
    train_gpt2.main(["--resume", str(folder), "--data", str(shutil.copytree(data, tmp_path / "moved"))])
    assert "other training data" not in capsys.readouterr().out
    assert_same_runs(folder, whole("gpt2"))


def test_a_finished_run_says_so_and_stays_as_it_is(whole, data, tmp_path, capsys):
    folder = cut(whole("gpt2"), tmp_path / "a", 60)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    for argv in (["--run_name", "a", "--log_dir", str(tmp_path)], command(data, folder, *KINDS["gpt2"])):
        train_gpt2.main(argv)
        assert capsys.readouterr().out == (f"{folder / 'ckpt_00060.pt'} is the end of a run of 60 steps: "
                                           "give more --max_steps to go on\n")
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before


@pytest.mark.parametrize("flags, end", [(["--max_steps", "66"], 66), (["--epochs", "3.6"], 66)], ids=["max_steps", "epochs"])
def test_a_finished_run_goes_on_with_a_greater_length(flags, end, whole, data, tmp_path, capsys):
    assert int(3.6 * Shards(data).tokens["train"] / 256) == 66
    folder = cut(whole("gpt2"), tmp_path / "a", 60)
    train_gpt2.main(["--run_name", "a", "--log_dir", str(tmp_path), *flags])
    assert "ckpt_00060.pt, step 60; changed: " in capsys.readouterr().out
    log = read_log(folder)
    assert [step for step, kind in log if kind == "train"] == list(range(end)) and (end, "val") in log
    assert checkpoint.found(folder)[0][0] == checkpoint.read(folder / f"ckpt_{end:05d}.pt")["max_steps"] == end


def test_a_run_killed_before_its_first_checkpoint_begins_anew(whole, data, tmp_path):
    folder = cut(whole("gpt2"), tmp_path / "a", -1)
    (folder / "log.txt").write_text("".join(f"{line}\n" for line in lines(folder)[:5]) + "5 tra")
    (folder / "ckpt_00008.tmp").write_bytes(b"half")
    time.sleep(1.1)  # TensorBoard reads its files in the order of the seconds in their names
    train(data, folder, *KINDS["gpt2"])
    assert_same_runs(folder, whole("gpt2"))
    assert scalars(folder) == scalars(whole("gpt2")) and not list(folder.glob("*.tmp"))


def test_a_finished_run_without_checkpoints_is_refused(whole, data, tmp_path):
    folder = cut(whole("gpt2"), tmp_path / "a", -1)
    with pytest.raises(BadInput, match="already holds a run, finished and without checkpoints"):
        train(data, folder, *KINDS["gpt2"])
    assert (folder / "log.txt").read_bytes() == (whole("gpt2") / "log.txt").read_bytes()


@pytest.mark.parametrize("change", ["untrained", "no optimizer", "odd step", "no loader", "other"])
def test_a_checkpoint_without_training_state_is_refused(change, whole, data, tokenizer, tmp_path):
    path = tmp_path / "ckpt_00001.pt"
    if change == "untrained":
        tiny_checkpoint(path, tokenizer)
    else:
        state = checkpoint.read(whole("gpt2") / "ckpt_00008.pt")
        state.pop({"no optimizer": "optimizer", "no loader": "loader"}.get(change), None)
        state |= {"step": "8"} if change == "odd step" else {}
        checkpoint.write(path, {"other": 1} if change == "other" else state)
    with pytest.raises(BadInput, match=r"ckpt_00001.pt is not a checkpoint of a training run") as error:
        train_gpt2.main(["--resume", str(path), "--log_dir", str(tmp_path / "log")])
    assert "\n" not in str(error.value) and not (tmp_path / "log").exists()


# ----------------------------------------------------------------------------------------------------------------------
# What a resumed run leaves behind


def test_log_tensorboard_and_config_after_resuming_twice(whole, data, tmp_path):
    folder = cut(whole("gpt2"), tmp_path / "a", 24)
    for step in (24, 16):
        time.sleep(1.1)  # TensorBoard reads its files in the order of the seconds in their names
        for later, path in checkpoint.found(folder):
            if later > step:
                path.unlink()
        train(data, folder, *KINDS["gpt2"])
    assert_same_runs(folder, whole("gpt2"))
    shown = scalars(folder)
    assert shown == scalars(whole("gpt2"))
    assert [step for step, _ in shown["train/loss"]] == list(range(60))
    assert [step for step, _ in shown["val/loss"]] == [*range(0, 60, 8), 60]
    config, first = (json.loads((path / "config.json").read_text()) for path in (folder, whole("gpt2")))
    assert [start["step"] for start in config["starts"]] == [0, 24, 16] and config["starts"][:1] == first["starts"]
    assert [start["from"] for start in config["starts"]] == [None, str(folder / "ckpt_00024.pt"), str(folder / "ckpt_00016.pt")]
    assert config["max_steps"] == 60 and config["model"] == first["model"]


def test_rewind(tmp_path):
    names = ["ckpt_00004.pt", "ckpt_00008.pt", "ckpt_00012.pt", "ckpt_100000.pt", "ckpt_00012.tmp", "log.tmp", "notes.txt"]
    for name in names:
        (tmp_path / name).write_text(name)
    kept = "a line of another kind\n0 val 5.000000\n0 train 5.000000\n7 train 4.000000\n"
    (tmp_path / "log.txt").write_text(kept + "8 val 3.000000\n8 train 3.000000\n10 train 2.000000\n1")  # torn: of step 11
    checkpoint.rewind(tmp_path, 8)
    assert (tmp_path / "log.txt").read_text() == kept
    assert {path.name for path in tmp_path.iterdir()} == {
        "ckpt_00004.pt", "ckpt_00008.pt", "ckpt_00012.pt.aside", "ckpt_100000.pt.aside", "notes.txt", "log.txt"}
    assert (tmp_path / "ckpt_00012.pt.aside").read_text() == "ckpt_00012.pt"
    checkpoint.rewind(tmp_path, 8)  # again: nothing more
    assert (tmp_path / "log.txt").read_text() == kept


def test_checkpoints_are_found_by_number(tmp_path):
    for name in ("ckpt_00002.pt", "ckpt_99999.pt", "ckpt_100000.pt", "ckpt_00003.pt.aside", "ckpt_00004.tmp", "ckpt_x.pt",
                 "a.pt"):
        (tmp_path / name).touch()
    assert [step for step, _ in checkpoint.found(tmp_path)] == [100_000, 99_999, 2]
    assert checkpoint.found(tmp_path)[0][1] == checkpoint.path_of(tmp_path, 100_000)


def test_a_run_folder_in_use(whole, data, tmp_path):
    folder = cut(whole("gpt2"), tmp_path / "a", 56)
    with checkpoint.locked(folder), pytest.raises(BadInput, match="in use by a run") as error:
        train(data, folder, *KINDS["gpt2"])
    assert "\n" not in str(error.value)
    assert (folder / "log.txt").read_bytes() == (whole("gpt2") / "log.txt").read_bytes()
    train(data, folder, *KINDS["gpt2"])  # free again
    assert_same_runs(folder, whole("gpt2"))


# ----------------------------------------------------------------------------------------------------------------------
# Reading


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(path, state, bytes) of a small checkpoint."""
    path = tmp_path_factory.mktemp("small") / "ckpt_00001.pt"
    state = {"step": 1, "model": {"a": torch.arange(12.0), "b": torch.ones(3, 2, dtype=torch.bfloat16)}, "tokenizer": "gpt2"}
    checkpoint.write(path, state)
    return path, state, path.read_bytes()


def refused_or_equal(path, content, state):
    """Whether read() refuses these bytes; what it does not refuse must be the state."""
    path.write_bytes(content)
    try:
        loaded = checkpoint.read(path)
    except BadInput as error:
        assert str(path) in str(error) and "try an earlier" in str(error)
        return True
    assert same(loaded, state)
    return False


@settings(EXAMPLES, max_examples=200)
@given(st.data())
def test_a_flipped_bit_is_found_or_harmless(small, tmp_path, choice):
    _, state, whole = small
    directory = whole.index(b"PK\1\2")  # the archive's own bookkeeping deserves half of the flips
    position = choice.draw(st.one_of(st.integers(0, len(whole) - 1), st.integers(directory, len(whole) - 1)))
    flipped = bytearray(whole)
    flipped[position] ^= 1 << choice.draw(st.integers(0, 7))
    refused_or_equal(tmp_path / "ckpt_00001.pt", bytes(flipped), state)


def test_a_flipped_bit_in_a_tensor_or_its_names_is_found(small, tmp_path):
    _, state, whole = small
    for part in (state["model"]["a"].numpy().tobytes(), b"tokenizer"):
        position = whole.index(part) + 2
        for bit in range(8):
            flipped = bytearray(whole)
            flipped[position] ^= 1 << bit
            torch_alone = tmp_path / "torch.pt"  # would not see it
            torch_alone.write_bytes(flipped)
            assert refused_or_equal(tmp_path / "ckpt_00001.pt", bytes(flipped), state)
    with contextlib.suppress(Exception):
        assert not same(torch.load(torch_alone, weights_only=True), state)


@settings(EXAMPLES, max_examples=60)
@given(st.data())
def test_a_truncated_checkpoint_is_refused(small, tmp_path, choice):
    _, state, whole = small
    assert refused_or_equal(tmp_path / "ckpt_00001.pt", whole[:choice.draw(st.integers(0, len(whole) - 1))], state)


@settings(EXAMPLES, max_examples=60)
@given(st.one_of(st.binary(max_size=300), st.binary(max_size=300).map(lambda b: b"PK\3\4" + b + b"PK\5\6" + bytes(18))))
@example(b"PK\5\6" + bytes(18))  # an empty zip
def test_random_bytes_are_refused(small, tmp_path, content):
    assert refused_or_equal(tmp_path / "ckpt_00001.pt", content, None)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    path, ran = tmp_path / "ckpt_00001.pt", str(tmp_path / "ran")
    for save in (torch.save, lambda o, p: torch.save(o, p, _use_new_zipfile_serialization=False),
                 lambda o, p: p.write_bytes(pickle.dumps(o))):
        save({"step": 1, "model": Evil(ran)}, path)
        with pytest.raises(BadInput, match="not a whole checkpoint"):
            checkpoint.read(path)
        assert not os.path.exists(ran)
    pickle.loads(path.read_bytes())
    assert os.path.exists(ran)  # it does where it is let


def test_a_zip_of_something_else_and_other_objects_are_refused(tmp_path):
    path = tmp_path / "ckpt_00001.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.txt", "hello")
    with pytest.raises(BadInput, match="not a whole checkpoint"):
        checkpoint.read(path)
    torch.save([torch.zeros(2)], path)
    with pytest.raises(BadInput, match="TypeError: list"):
        checkpoint.read(path)


def test_newest_skips_what_is_torn(small, tmp_path):
    _, state, content = small
    warnings = []
    assert checkpoint.newest(tmp_path, warnings.append) is None
    for step in (1, 2, 3, 100_000):
        (tmp_path / f"ckpt_{step:05d}.pt").write_bytes(content if step < 3 else content[:-step % 1000 - 9])
    path, loaded = checkpoint.newest(tmp_path, warnings.append)
    assert path.name == "ckpt_00002.pt" and same(loaded, state)
    assert len(warnings) == 2 and "ckpt_100000.pt" in warnings[0] and "ckpt_00003.pt" in warnings[1]
    assert all(warning.startswith("skipped: ") and "\n" not in warning for warning in warnings)
    for step in (1, 2):
        (tmp_path / f"ckpt_{step:05d}.pt").write_bytes(b"")
    with pytest.raises(BadInput, match="holds no whole checkpoint"):
        checkpoint.newest(tmp_path, warnings.append)


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
    train(data, folder, *KINDS["gpt2"])
    assert_same_runs(folder, whole("gpt2"))


def test_a_checkpoint_saved_between_looking_and_locking(whole, data, tmp_path, monkeypatch):
    folder = cut(whole("gpt2"), tmp_path / "whole", 40)
    plan = train_gpt2.plan

    def meanwhile(*args):  # another process of this run saves, and ends
        shutil.copy(whole("gpt2") / "ckpt_00048.pt", folder)
        return plan(*args)

    monkeypatch.setattr(train_gpt2, "plan", meanwhile)
    with pytest.raises(BadInput, match="has just been written by another process: start again"):
        train(data, folder, *KINDS["gpt2"])
    assert checkpoint.found(folder)[0][0] == 48
    monkeypatch.undo()
    train(data, folder, *KINDS["gpt2"])
    assert_same_runs(folder, whole("gpt2"))


def test_the_optimizer_keeps_its_own_kernels_and_moves_its_step_counts():
    model = torch.nn.Linear(3, 3)

    def make(**own):
        return torch.optim.AdamW(model.parameters(), lr=0.1, **own)

    before, after = make(weight_decay=0.2), make(weight_decay=0.1, fused=True)
    model(torch.ones(1, 3)).sum().backward()
    before.step()
    with torch.device("meta"):
        moved = torch.nn.Linear(3, 3)
    elsewhere = torch.optim.AdamW(moved.parameters(), lr=0.1)
    elsewhere.param_groups[0]["fused"] = True  # a fused AdamW wants its step counts beside the weights
    for optimizer, device in ((after, "cpu"), (elsewhere, "meta")):
        checkpoint.load_optimizer(optimizer, before.state_dict())
        assert optimizer.param_groups[0]["fused"] is True
        assert {t.device.type for state in optimizer.state.values() for t in state.values()} == {device}
    assert after.param_groups[0]["weight_decay"] == 0.1


def test_a_torn_newest_checkpoint_costs_only_its_steps(whole, data, tmp_path, capsys):
    folder = cut(whole("gpt2"), tmp_path / "a", 56)
    torn = bytearray((folder / "ckpt_00056.pt").read_bytes())
    torn[len(torn) // 2] ^= 16
    (folder / "ckpt_00056.pt").write_bytes(torn)
    train(data, folder, *KINDS["gpt2"])
    out, err = capsys.readouterr()
    assert err.count("skipped: ") == 1 and "ckpt_00056.pt" in err.splitlines()[0] and "ckpt_00048.pt, step 48; as before" in out
    assert_same_runs(folder, whole("gpt2"))
    assert (folder / "ckpt_00056.pt.aside").read_bytes() == torn
    assert same(checkpoint.read(folder / "ckpt_00056.pt")["model"], checkpoint.read(whole("gpt2") / "ckpt_00056.pt")["model"])


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def test_the_writer_makes_room_but_for_the_newest(tmp_path, monkeypatch):
    writer = checkpoint.Writer(tmp_path, keep=5)
    for step in (1, 2, 3):
        checkpoint.write(checkpoint.path_of(tmp_path, step), {"x": torch.ones(100)})
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=500 if len(checkpoint.found(tmp_path)) < 3 else 0))
    writer.start(4, {"x": torch.ones(100)})
    writer.collect(wait=True)
    assert [step for step, _ in checkpoint.found(tmp_path)] == [4, 3, 2]
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=0))
    writer.start(5, {"x": torch.ones(100)})
    with pytest.raises(BadInput, match="free some disk space"):
        writer.collect(wait=True)
    assert [step for step, _ in checkpoint.found(tmp_path)] == [4]  # the newest stays


def test_a_copy_that_fits_nowhere_is_said(tmp_path, monkeypatch):
    writer = checkpoint.Writer(tmp_path, keep=1)
    monkeypatch.setattr(writer, "_allocate", lambda tensor: (_ for _ in ()).throw(RuntimeError("no memory")))
    writer.start(1, {"x": torch.ones(3)})
    writer.wait_copied()
    with pytest.raises(BadInput, match="no copy of it fits into memory"):
        writer.collect(wait=True)


@pytest.mark.parametrize("keep, left", [(2, [5, 4]), (0, [5, 4, 3, 2, 1]), (9, [5, 4, 3, 2, 1])])
def test_the_writer_keeps_the_newest(keep, left, tmp_path):
    (tmp_path / "ckpt_00001.pt.aside").touch()
    writer = checkpoint.Writer(tmp_path, keep)
    for step in range(1, 6):
        assert writer.collect() is None
        writer.start(step, {"step": step, "x": torch.full((4,), float(step))})
        writer.wait_copied()
        says = rf"saved {tmp_path}/ckpt_0000{step}.pt, 0.00 GB in \d+\.\d s; training waited \d+ ms"
        assert re.fullmatch(says, writer.collect(wait=True))
    assert [step for step, _ in checkpoint.found(tmp_path)] == left
    assert all(checkpoint.read(path)["x"].tolist() == [step] * 4 for step, path in checkpoint.found(tmp_path))
    assert {path.suffix for path in tmp_path.iterdir()} == {".pt", ".aside"}


def test_the_copy_is_taken_before_tensors_change(tmp_path, monkeypatch):
    write, save, changed = checkpoint.Writer._write, torch.save, threading.Event()

    def late_copy(*args):
        time.sleep(0.2)
        return write(*args)

    def late_save(state, file):
        assert changed.wait(20)
        save(state, file)

    monkeypatch.setattr(checkpoint.Writer, "_write", late_copy)
    monkeypatch.setattr(torch, "save", late_save)
    old = {"x": torch.randn(50, 50), "parts": [{"y": torch.arange(9)}, (torch.ones(2), 7)], "step": 3}
    state = {"x": old["x"].clone(), "parts": [{"y": old["parts"][0]["y"].clone()}, (torch.ones(2), 7)], "step": 3}
    writer = checkpoint.Writer(tmp_path, 0)
    writer.start(3, state)
    writer.wait_copied()
    for tensor in checkpoint.tensors(state):
        tensor.zero_()
    assert writer.collect() is None  # not yet
    changed.set()
    assert writer.collect(wait=True).startswith("saved") and writer.stall >= 0.1
    assert same(checkpoint.read(tmp_path / "ckpt_00003.pt"), old)


def test_training_waits_for_the_copy(whole, data, tmp_path, monkeypatch):
    undisturbed, write = whole("gpt2"), checkpoint.Writer._write

    def late_copy(*args):
        time.sleep(0.1)
        return write(*args)

    monkeypatch.setattr(checkpoint.Writer, "_write", late_copy)
    folder = train(data, tmp_path / "a", *KINDS["gpt2"])
    assert_same_runs(folder, undisturbed)
    for step, path in checkpoint.found(folder):
        ours, theirs = checkpoint.read(path), checkpoint.read(checkpoint.path_of(undisturbed, step))
        assert all(same(ours[name], theirs[name]) for name in ("model", "optimizer", "loader", "step", "skipped")), step


def test_tied_tensors_stay_one(tmp_path):
    tied = torch.randn(200, 100)
    state = {"wte": tied, "head": tied, "parts": [tied, tied.clone()]}
    assert checkpoint.n_bytes(state) == 2 * 80_000
    writer = checkpoint.Writer(tmp_path, 0)
    writer.start(1, state)
    writer.collect(wait=True)
    assert 160_000 < (tmp_path / "ckpt_00001.pt").stat().st_size < 170_000
    loaded = checkpoint.read(tmp_path / "ckpt_00001.pt")
    assert loaded["wte"].data_ptr() == loaded["head"].data_ptr() != loaded["parts"][1].data_ptr() and same(loaded, state)


def test_an_error_while_writing_comes_out_of_collect(tmp_path, monkeypatch):
    writer, save = checkpoint.Writer(tmp_path, 1), torch.save
    writer.start(1, {"x": torch.zeros(9)})
    writer.collect(wait=True)

    def half(state, file):
        file.write(b"half")
        raise RuntimeError("enforce fail: unexpected pos")

    monkeypatch.setattr(torch, "save", half)
    writer.start(2, {"x": torch.zeros(9)})
    with pytest.raises(BadInput, match=r"cannot save \S+ckpt_00002.pt \(RuntimeError: .*free some disk space"):
        writer.collect(wait=True)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt_00001.pt"]  # the old one was not dropped for it
    monkeypatch.setattr(torch, "save", save)
    writer.start(3, {"x": torch.ones(9)})
    assert writer.collect(wait=True).startswith("saved") and [path.name for path in tmp_path.iterdir()] == ["ckpt_00003.pt"]


def test_a_disk_that_fills_up_for_real(tmp_path):
    code = ("import resource, sys, torch\nfrom lib import checkpoint\nfrom lib.cli import BadInput\n"
            "checkpoint.write('ckpt_00001.pt', {'x': torch.arange(9)})\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
            "try:\n    checkpoint.write('ckpt_00001.pt', {'x': torch.zeros(200_000)})\n"
            "except BadInput as error:\n    print(error)\n")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
                            env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert (result.returncode, result.stderr) == (0, "")
    assert re.fullmatch(r"cannot save ckpt_00001.pt \(\w+Error: .*\): free some disk space.*\n", result.stdout)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt_00001.pt"]
    assert checkpoint.read(tmp_path / "ckpt_00001.pt")["x"].tolist() == list(range(9))


def test_a_disk_that_is_full_beforehand(tmp_path, monkeypatch):
    path = tmp_path / "ckpt_00001.pt"
    checkpoint.write(path, {"x": torch.arange(9)})
    before = path.read_bytes()
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=20_000_000))
    checkpoint.write(tmp_path / "ckpt_00002.pt", {"x": torch.zeros(1000)})  # has room
    with pytest.raises(BadInput, match=r"needs 0.04 GB and \S+ has 0.02 GB free: free some disk space"):
        checkpoint.write(path, {"x": torch.zeros(10_000_000)})
    assert path.read_bytes() == before and {p.name for p in tmp_path.iterdir()} == {"ckpt_00001.pt", "ckpt_00002.pt"}


def test_a_run_outlives_a_disk_that_is_full_for_a_while(whole, data, tmp_path, monkeypatch, capsys):
    undisturbed, calls, usage = whole("gpt2"), [], shutil.disk_usage
    capsys.readouterr()

    def full_for_a_while(folder):
        calls.append(folder)
        return SimpleNamespace(free=1000) if 3 <= len(calls) <= 4 else usage(folder)  # the first is before the first step

    monkeypatch.setattr(checkpoint.shutil, "disk_usage", full_for_a_while)
    folder = train(data, tmp_path / "a", *KINDS["gpt2"])
    out = capsys.readouterr().out
    assert out.count("a checkpoint needs 0.00 GB and") == 2 and "done: " in out
    assert sorted(step for step, _ in checkpoint.found(folder)) == [8, 32, 40, 48, 56, 60]
    assert_same_runs(folder, undisturbed)


def test_a_run_does_not_begin_on_a_full_disk(data, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(BadInput, match="free some disk space"):
        train(data, tmp_path / "a")
    assert not (tmp_path / "a" / "log.txt").read_text()


# ----------------------------------------------------------------------------------------------------------------------
# Signals


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_stopped_run_is_saved_and_goes_on(name, whole, data, tmp_path):
    folder, words = tmp_path / "a", command(data, tmp_path / "a", *LONG)
    nohup = name == "SIGTERM"
    with running(words, tmp_path / "out.txt", on_hangup=signal.SIG_IGN if nohup else signal.SIG_DFL) as process:
        wait_for(lambda: logged(folder) > 20, process)
        if nohup:  # the terminal is closed: not meant for this run
            seen = logged(folder)
            process.send_signal(signal.SIGHUP)
            wait_for(lambda: logged(folder) > seen + 20, process)
        if name == "SIGINT":
            with pytest.raises(BadInput, match="in use by a run"):
                train(data, folder, *LONG)
        process.send_signal(getattr(signal, name))
        assert process.wait(60) == 0
    out, step = (tmp_path / "out.txt").read_text(), len(lines(folder))
    assert step < 250 and lines(folder)[-1].startswith(f"{step - 1} train ")
    assert out.count(f"{name}: this step is finished, then the run is saved; a second signal ends it at once\n") == 1
    assert f"\nstopped at step {step} of 250: the same command with --run a goes on\n" in out and "Traceback" not in out
    assert checkpoint.found(folder)[0][0] == step and not list(folder.glob("*.tmp"))
    train(data, folder, *LONG)
    assert_same_runs(folder, whole("long", *LONG))


@pytest.mark.parametrize("step", [8, 60])  # in the midst of the run, and at its last evaluation
def test_a_signal_during_an_evaluation_stops_before_what_comes_next(step, whole, data, tmp_path, monkeypatch, capsys):
    evaluate, folder, calls = train_gpt2.evaluate, tmp_path / "a", []

    def stopped(*args):
        calls.append(1)
        if len(calls) == step // 8 + 1 + (step == 60):  # at steps 0, 8, 16, ... and at the last
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)  # the thread that listens hears it
        return evaluate(*args)

    monkeypatch.setattr(train_gpt2, "evaluate", stopped)
    train(data, folder, *KINDS["gpt2"], "--sample_every", "4")
    assert f"stopped at step {step} of 60" in capsys.readouterr().out
    assert lines(folder)[-1].startswith(f"{step} val ") and checkpoint.found(folder)[0][0] == step
    train(data, folder, *KINDS["gpt2"], "--sample_every", "4")
    out = capsys.readouterr().out
    assert "\ndone: " in out and out.count("> ") >= 4  # the samples of the last step were made, too
    assert_same_runs(folder, whole("gpt2", "--sample_every", "4"))
    train(data, folder, *KINDS["gpt2"], "--sample_every", "4")
    assert "is the end of a run of 60 steps" in capsys.readouterr().out


def test_a_run_outlives_its_console(data, tmp_path, whole):
    folder = tmp_path / "a"
    process = subprocess.Popen([sys.executable, str(ROOT / "train_gpt2.py"), *command(data, folder, *LONG)], cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while not process.stdout.readline().startswith(b"step 10 |"):
        assert process.poll() is None
    process.stdout.close()  # as when Ctrl-C has ended `| tee`
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert checkpoint.found(folder)[0][0] == len(lines(folder)) > 10
    train(data, folder, *LONG)
    assert_same_runs(folder, whole("long", *LONG))


# the main thread hangs where no Python runs, as in a collective whose other process is gone
HANGS = """
import ctypes, sys, time
from lib import checkpoint
patience, echo, hang = float(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "hang"
with checkpoint.StopSignals(lambda line: print(line, flush=True), patience or None, echo) as stop:
    print("ready", flush=True)
    if hang:
        mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
        libc.pthread_mutex_lock(mutex)
        libc.pthread_mutex_lock(mutex)
    while stop.received is None:
        time.sleep(0.01)
    stop.heard()
    time.sleep(2 * patience)
    print("heard", stop.received)
"""


@linux
@pytest.mark.parametrize("argv, signals, code, says", [
    (["0", "0", "hang"], ["SIGTERM", "SIGHUP"], 128 + signal.SIGHUP, ""),
    (["1", "60", "hang"], ["SIGINT", "SIGINT"], 1, "SIGINT, and this process did not come to the end of its step within 1 s\n"),
    (["0.5", "60", "well"], ["SIGTERM", "SIGINT"], 0, ""),
], ids=["second signal", "patience", "heard"])
def test_signals_while_the_main_thread_hangs(argv, signals, code, says, tmp_path):
    with subprocess.Popen([sys.executable, "-c", HANGS, *argv], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
                          preexec_fn=hang_up(signal.SIG_DFL)) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(getattr(signal, signals[0]))
            assert process.stdout.readline().startswith(f"{signals[0]}: this step is finished")
            process.send_signal(getattr(signal, signals[1]))
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, err) == (code, says)
    assert out == ("heard SIGTERM\n" if code == 0 else "")


# ----------------------------------------------------------------------------------------------------------------------
# torchrun


TWO = ["--max_steps", "300", "--save_every", "50", "--eval_every", "100", "--micro_batch", "2"]


@linux
def test_torchrun_ends_when_a_process_dies(data, tmp_path):
    folder = tmp_path / "a"
    with running(command(data, folder, *TWO), tmp_path / "out.txt", ["--standalone", "--nproc_per_node=2"]) as agent:
        wait_for((folder / "ckpt_00050.pt").exists, agent)
        os.kill(worker(agent, 1), signal.SIGKILL)
        assert agent.wait(30) != 0
    assert "Signal 9 (SIGKILL)" in (tmp_path / "out.txt").read_text()
    assert checkpoint.read(folder / "ckpt_00050.pt")["step"] == 50


@pytest.mark.slow
@linux
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_torchrun_passes_a_signal_on(name, data, tmp_path):
    folder, out = tmp_path / "a", tmp_path / "out.txt"
    with running(command(data, folder, *TWO), out, ["--standalone", "--nproc_per_node=2"]) as agent:
        wait_for(lambda: logged(folder) > 20, agent)
        if name == "SIGINT":  # as a terminal does: to every process; torchrun then passes it on once more
            for rank in (0, 1):
                os.kill(worker(agent, rank), signal.SIGINT)
        agent.send_signal(getattr(signal, name))
        agent.wait(60)
    step = checkpoint.found(folder)[0][0]
    assert step < 300 and lines(folder)[-1].startswith(f"{step - 1} train ")
    assert f"stopped at step {step} of 300" in out.read_text() and not list(folder.glob("*.tmp"))


@pytest.mark.slow
@linux
def test_torchrun_restarts_what_died(launch, data, tmp_path):
    result = launch("train_gpt2.py", *command(data, tmp_path / "whole", *TWO), processes=2)
    assert result.returncode == 0, result.stderr
    words = command(data, tmp_path / "log" / "unnamed", *TWO)
    at = words.index("--run_name")
    del words[at:at + 2]  # the restarted processes find the folder by themselves
    with running(words, tmp_path / "out.txt", ["--standalone", "--nproc_per_node=2", "--max_restarts=1"]) as agent:
        wait_for(lambda: list(tmp_path.glob("log/*/ckpt_00050.pt")), agent)
        os.kill(worker(agent, 1), signal.SIGKILL)
        code = agent.wait(120)
    out = (tmp_path / "out.txt").read_text()
    assert code == 0, out[-3000:]
    [folder] = (tmp_path / "log").iterdir()
    assert (folder / "log.txt").read_text() == (tmp_path / "whole" / "log.txt").read_text()
    starts = json.loads((folder / "config.json").read_text())["starts"]
    assert len(starts) == 2 and starts[1]["step"] >= 50 and starts[1]["from"].startswith(str(folder))
    assert same(final(folder), final(tmp_path / "whole"))


# ----------------------------------------------------------------------------------------------------------------------
# Killed again and again


@pytest.mark.slow
def test_twenty_kills_leave_no_trace(data, tmp_path):
    rng, torn, kills = random.Random(6), 0, 20
    flags = ["--max_steps", "600", "--n_embd", "128", "--save_every", "2", "--keep", "3", "--eval_every", "50"]
    whole, folder = train(data, tmp_path / "whole", *flags), tmp_path / "killed"
    for kill in range(kills):
        with running(command(data, folder, *flags), tmp_path / "out.txt") as process:
            wait_for(lambda: "step " in (tmp_path / "out.txt").read_text(), process)
            time.sleep(rng.uniform(0, 0.5))
            if kill % 2:  # right in a save
                while process.poll() is None and not any(name.endswith(".tmp") for name in os.listdir(folder)):
                    pass
            assert process.poll() is None, "the run is too short for so many kills"
            process.kill()
            process.wait()
        left = list(folder.glob("ckpt_*.tmp"))
        torn += bool(left)
        print(f"kill {kill + 1}: {logged(folder)} lines, newest checkpoint {checkpoint.found(folder)[:1]}, torn {left}")
    with running(command(data, folder, *flags), tmp_path / "out.txt") as process:
        assert process.wait(120) == 0
    print(f"{torn} of {kills} kills hit a save")
    assert torn >= 3
    assert_same_runs(folder, whole)
    assert scalars(folder) == scalars(whole)
    assert not list(folder.glob("*.tmp")) and len(checkpoint.found(folder)) == 3
    assert len(json.loads((folder / "config.json").read_text())["starts"]) == kills + 1
