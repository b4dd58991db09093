"""The files in a run folder, also of killed runs: python -m pytest tests/lib/test_run_folder.py

The slow test kills a real run twenty times: python -m pytest tests/lib/test_run_folder.py -m slow
"""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time

import pytest
import torch
from helpers import ROOT, TINY_FLAGS
from runs import (
    KINDS,
    LONG,
    again,
    assert_same_runs,
    command,
    contents,
    cut,
    disk_full_when,
    lines,
    linux,
    logged,
    running,
    same,
    scalars,
    steps_saved,
    stop_when,
    train,
    wait_for,
    worker,
)

import train_gpt2
from lib import checkpoint, run_folder
from lib.cli import BadInput, RankError
from lib.existing_runs import check_name
from lib.files import locked

# --------------------------------------------------------------------------------------------------
# What a run leaves


def starts_of(folder):
    return json.loads((folder / "config.json").read_text())["starts"]


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
    starts = starts_of(folder)
    assert [start["step"] for start in starts] == [0, 24, 16]
    assert [start["from"] for start in starts] == [
        None, str(folder / "ckpt_00024.pt"), str(folder / "ckpt_00016.pt")]
    assert starts[:1] == starts_of(whole("gpt2"))


def test_a_run_killed_before_its_first_checkpoint_starts_over(whole, data, tmp_path, capsys):
    folder = cut(whole("gpt2"), tmp_path / "a", -1)
    begun = "".join(f"{line}\n" for line in lines(folder)[:5])
    (folder / "log.txt").write_text(begun + "5 tra")
    (folder / "ckpt_00008.pt.tmp").write_bytes(b"half")
    train(data, folder, *KINDS["gpt2"])
    assert "has no checkpoint: starting its run over" in capsys.readouterr().out
    assert_same_runs(folder, whole("gpt2"))
    assert scalars(folder) == scalars(whole("gpt2"))
    assert not list(folder.glob("*.tmp"))


def test_a_finished_run_without_checkpoints_is_refused(whole, data, tmp_path):
    folder = cut(whole("gpt2"), tmp_path / "a", -1)
    before = contents(folder)
    with pytest.raises(BadInput, match="already contains a finished run"):
        train(data, folder, *KINDS["gpt2"])
    assert contents(folder) == before


def append(path, line):
    with open(path, "a") as file:
        file.write(f"{line}\n")


def test_a_run_folder_names_its_code(data, launch, tmp_path):
    """Commit and diff of a changed checkout; a later start adds its own code."""
    checkout = tmp_path / "checkout"

    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", "-C", checkout, *identity, *words], check=True,
                              capture_output=True, text=True)
        return done.stdout.strip()

    checkout.mkdir()
    shutil.copy(ROOT / "train_gpt2.py", checkout)
    shutil.copytree(ROOT / "lib", checkout / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    append(checkout / "lib" / "budget.py", "# a change")
    script = checkout / "train_gpt2.py"
    words = [*TINY_FLAGS, "--data", data, "--run_name", "a", "--save_every", "3"]
    assert launch(script, *words).returncode == 0
    folder = tmp_path / "log" / "a"
    assert starts_of(folder)[0]["commit"] == git("rev-parse", "HEAD")
    assert "\n+# a change\n" in (folder / "code.diff").read_text()
    assert (folder / "train_gpt2.py").read_bytes() == script.read_bytes()

    append(script, "# another change")
    (folder / "ckpt_00006.pt").unlink()
    assert launch(script, *words).returncode == 0
    assert "# another change" in (folder / "train_gpt2_from_00003.py").read_text()
    assert "# another change" in (folder / "code_from_00003.diff").read_text()
    assert "another" not in (folder / "code.diff").read_text()


# --------------------------------------------------------------------------------------------------
# Folders of something else, in use, damaged, or gone


@pytest.mark.parametrize(
    "name", ["", " ", ".", "..", "a/b", "/tmp/a", "../a", "a\nb", "a\0b", "a\\b", "x" * 201])
def test_a_run_name_must_name_a_single_folder(name):
    with pytest.raises(BadInput, match="--run_name"):
        check_name(name)
    check_name("a run.v2")


@pytest.mark.parametrize("name", ["", "..", "mine"])
def test_a_foreign_folder_is_left_as_it_is(name, data, tmp_path):
    (tmp_path / "log" / "mine").mkdir(parents=True)
    folders = [tmp_path, tmp_path / "log" / name]
    for folder in folders:
        (folder / "log.txt").write_text("0 a diary\n1 of mine\n2 train 3.0\n")
        (folder / "ckpt_00001.pt.tmp").write_text("x")
        (folder / "thesis.tmp").write_text("x")
    before = [contents(folder) for folder in folders]
    with pytest.raises(BadInput, match="--run_name"):
        train_gpt2.main([*TINY_FLAGS, "--data", str(data), "--log_dir", str(tmp_path / "log"),
                         "--run_name", name])
    assert [contents(folder) for folder in folders] == before


def test_a_hugging_face_folder_is_left_as_it_is(whole, data, tmp_path, monkeypatch):
    """Also with a checkpoint of this project in it, from which a run may start."""
    export = tmp_path / "runs" / "exported"
    export.mkdir(parents=True)
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    (export / "config.json").write_text(json.dumps(config))
    (export / "model.safetensors").write_bytes(b"weights")
    before = contents(export)
    with pytest.raises(BadInput, match="is not a run folder"):
        train(data, export)
    assert contents(export) == before

    shutil.copy(whole("gpt2") / "ckpt_00056.pt", export)
    before = contents(export)
    with pytest.raises(BadInput, match="is not a run folder"):
        train(data, export, *KINDS["gpt2"])
    monkeypatch.chdir(tmp_path)
    train_gpt2.main(["--resume", str(export / "ckpt_00056.pt")])
    [begun] = (tmp_path / "log").iterdir()
    assert contents(export) == before
    assert steps_saved(begun) == [60]


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
@pytest.mark.parametrize("name", ["config.json", "log.txt"])
def test_a_folder_or_pipe_in_place_of_a_file_is_refused(name, make, whole, tmp_path):
    folder = cut(whole("gpt2"), tmp_path / "a", 56)
    (folder / name).unlink()
    make(folder / name)
    before = contents(folder)
    with pytest.raises(BadInput, match=f"cannot write {folder / name}"):
        again(folder)
    assert contents(folder) == before


@pytest.mark.parametrize("name", ["train_gpt2.py", "code.diff"])
def test_a_folder_in_place_of_saved_code_is_left_alone(name, whole, tmp_path):
    folder = cut(whole("gpt2"), tmp_path / "a", 56)
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()
    assert_same_runs(again(folder), whole("gpt2"))


def test_a_log_with_a_number_of_5000_digits(whole, tmp_path):
    folder = cut(whole("gpt2"), tmp_path / "a", 56)
    line = b"9" * 5000 + b" train 1\n"
    (folder / "log.txt").write_bytes(line + (folder / "log.txt").read_bytes())
    again(folder)
    assert (folder / "log.txt").read_bytes() == line + (whole("gpt2") / "log.txt").read_bytes()


@pytest.mark.parametrize("damage", [
    b"", b"{", b"[1, 2]", b'{"starts": 3, "max_steps": "x"}', b"\xff\xfe", b"[" * 100_000
])
def test_a_damaged_config_does_not_stop_a_run(damage, whole, tmp_path):
    folder = cut(whole("gpt2"), tmp_path / "a", 56)
    (folder / "config.json").write_bytes(damage)
    assert_same_runs(again(folder), whole("gpt2"))
    assert [start["step"] for start in starts_of(folder)] == [56]


def test_a_run_folder_in_use(whole, data, tmp_path):
    folder = cut(whole("gpt2"), tmp_path / "a", 56)
    before = contents(folder)
    with locked(folder, ""), pytest.raises(BadInput, match="in use by another process"):
        train(data, folder, *KINDS["gpt2"])
    assert contents(folder) == before
    assert_same_runs(train(data, folder, *KINDS["gpt2"]), whole("gpt2"))  # unlocked again


def test_a_checkpoint_saved_between_looking_and_locking(whole, data, tmp_path, monkeypatch):
    folder = cut(whole("gpt2"), tmp_path / "whole", 40)
    settings = train_gpt2.settings

    def meanwhile(*args):  # another process of this run saves and ends
        found = settings(*args)
        shutil.copy(whole("gpt2") / "ckpt_00048.pt", folder)
        return found

    monkeypatch.setattr(train_gpt2, "settings", meanwhile)
    with pytest.raises(BadInput, match="has just been written by another process"):
        train(data, folder, *KINDS["gpt2"])
    assert steps_saved(folder)[-1] == 48


@pytest.mark.parametrize("moved", [True, False], ids=["moved", "removed"])
def test_a_run_recreates_its_folder_if_it_is_removed(moved, data, tmp_path):
    folder = tmp_path / "log" / "a"
    elsewhere = tmp_path / "elsewhere"
    out = tmp_path / "out.txt"
    with running(command(data, folder, *LONG, "--save_every", "25"), out) as process:
        wait_for((folder / "ckpt_00025.pt").exists, process)
        wait_for(lambda: logged(folder) > 30, process)
        if moved:
            folder.rename(elsewhere)
        else:
            shutil.rmtree(folder.rename(tmp_path / "trash"))  # at once: the run is writing there
        assert process.wait(600) == 0
    printed = out.read_text()
    assert f"{folder} was moved or removed during the run: made again" in printed
    assert "Traceback" not in printed
    assert "done: " in printed
    assert steps_saved(folder)[-3:] == [200, 225, 250]
    assert (folder / "config.json").exists()
    assert checkpoint.read(folder / "ckpt_00250.pt")["finished"]
    assert lines(folder)[-1].startswith("249 train")
    if moved:
        assert (elsewhere / "ckpt_00025.pt").exists()
        assert logged(elsewhere) > 30


# --------------------------------------------------------------------------------------------------
# Full disks, no memory


def test_a_run_does_not_start_on_a_full_disk(data, tmp_path, monkeypatch):
    disk_full_when(monkeypatch, lambda: True)
    with pytest.raises(BadInput, match="free some disk space"):
        train(data, tmp_path / "a")
    assert not os.listdir(tmp_path)


def test_a_failed_start_leaves_no_empty_folder(data, tmp_path):
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
    whole("gpt2")
    # asked at the start and before each checkpoint: full at steps 16 and 24
    is_full = iter([False, False, True, True])
    disk_full_when(monkeypatch, lambda: next(is_full, False))
    capsys.readouterr()
    train(data, folder, *KINDS["gpt2"])
    out = capsys.readouterr().out
    assert out.count("a checkpoint needs 0.00 GB and") == 2
    assert "done: " in out
    assert steps_saved(folder) == [8, 32, 40, 48, 56, 60]
    assert_same_runs(folder, whole("gpt2"))


def raising(error):
    """A function that raises `error` for any arguments."""
    def function(*args, **options):
        raise error
    return function


@pytest.mark.parametrize("code, says", [(errno.ENOSPC, "is full"),
                                        (errno.EIO, r"fails \(Input/output error\)")])
def test_a_log_that_cannot_be_written_ends_a_run(code, says, data, tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder.Logger, "log_step", raising(OSError(code, os.strerror(code))))
    with pytest.raises(RankError, match=f"the disk of {tmp_path} {says}"):
        train(data, tmp_path / "a")


@pytest.mark.parametrize("error", [
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
])
def test_out_of_memory_ends_a_run_in_one_line(error, data, tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt2, "train", raising(error))
    with pytest.raises(RankError, match="out of memory: .*--micro_batch"):
        train(data, tmp_path / "a")


def test_the_last_checkpoint_must_be_written(data, tmp_path, monkeypatch):
    disk_full_when(monkeypatch, lambda: logged(tmp_path / "a") > 3)
    with pytest.raises(BadInput, match="free some disk space"):
        train(data, tmp_path / "a", "--max_steps", "4")


# --------------------------------------------------------------------------------------------------
# Weights without the optimizer


def weights_steps(folder):
    return sorted(step for step, _ in checkpoint.found(folder, "weights"))


def final_weights(folder):
    """weights_00060.pt without the settings, which hold the run's name."""
    state = checkpoint.read(checkpoint.path_of(folder, 60, "weights"))
    del state["train_config"]
    return state


def test_a_run_killed_before_its_last_checkpoint_has_the_same_weights(whole, tmp_path):
    """Here after the weights, which come before it."""
    folder = cut(whole("gpt2"), tmp_path / "a", 48)
    assert weights_steps(folder) == [60]
    again(folder)
    assert_same_runs(folder, whole("gpt2"))
    assert weights_steps(folder) == [60]
    assert (folder / "weights_00060.pt.aside").exists()
    assert same(final_weights(folder), final_weights(whole("gpt2")))
    state = checkpoint.read(folder / "ckpt_00060.pt")
    for name, weight in final_weights(folder)["model"].items():
        assert torch.equal(weight, state["model"][name].bfloat16())
    size = (folder / "weights_00060.pt").stat().st_size
    assert size < (folder / "ckpt_00060.pt").stat().st_size / 3  # a sixth, for larger models


def test_the_best_checkpoint_has_weights_and_keeping_deletes_both(data, tmp_path, monkeypatch):
    with_losses(monkeypatch, [5.0, 4.0, 3.0, 6.0])
    folder = train(data, tmp_path / "a", "--keep_best", "--keep", 1)
    assert steps_saved(folder) == weights_steps(folder) == [24, 60]
    going_back = ["--resume", str(folder / "ckpt_00024.pt"), "--max_steps", "30"]
    train_gpt2.main(going_back)
    assert steps_saved(folder) == weights_steps(folder) == [24, 30]


def test_scripts_take_weights_and_resume_refuses_them(whole, data, tmp_path):
    path = checkpoint.path_of(whole("gpt2"), 60, "weights")
    rounded, _, _ = train_gpt2.load_checkpoint(str(path))
    model, _, _ = train_gpt2.load_checkpoint(str(checkpoint.path_of(whole("gpt2"), 60)))
    for own, theirs in zip(rounded.parameters(), model.parameters(), strict=True):
        assert torch.equal(own, theirs.bfloat16().float())
    for extra in ([], ["--run_name", "b"]):
        with pytest.raises(BadInput, match="weights_00060.pt holds weights without an optimizer"):
            train_gpt2.main(["--resume", str(path), *extra])
    flags = [*TINY_FLAGS, "--data", str(data), "--log_dir", str(tmp_path), "--run_name", "c"]
    train_gpt2.main([*flags, "--init_from", str(path)])
    train_gpt2.main([*flags, "--init_from", str(path.parent)])  # finished: the same beginning
    assert steps_saved(tmp_path / "c") == [6]


# --------------------------------------------------------------------------------------------------
# When checkpoints are saved, and the best one


def with_losses(monkeypatch, losses):
    """Validations return these losses one after another, the last one repeatedly."""
    left = list(losses)

    def evaluate(*_):
        return left.pop(0) if len(left) > 1 else left[0]

    monkeypatch.setattr(train_gpt2, "mean_loss", evaluate)


@pytest.mark.parametrize("later, best", [(3.5, [3.5, 32]), (6.0, [4.0, 16])])
def test_the_best_checkpoint_is_one_that_was_written(later, best, data, tmp_path, monkeypatch,
                                                     capsys):
    """The lowest loss is that of step 24, whose checkpoint cannot be written."""
    with_losses(monkeypatch, [5.0, 4.0, 3.0, later, 6.0])
    written = checkpoint.write

    def fails(path, state):
        if path.name == "ckpt_00024.pt":
            raise BadInput("no room for it")
        written(path, state)

    monkeypatch.setattr(checkpoint, "write", fails)
    folder = train(data, tmp_path / "a", "--keep_best", "--keep", 1, "--save_every", 0)
    out = capsys.readouterr().out
    loss, step = best
    assert "no room for it" in out
    assert steps_saved(folder) == [step, 60]  # --keep 1 deletes the others
    assert checkpoint.read(folder / "ckpt_00060.pt")["best"] == best
    kept = checkpoint.path_of(folder, step)
    assert f"best    validation loss {loss:.4f}, at step {step}: {kept}\n" in out


def test_a_step_is_saved_once(data, tmp_path, monkeypatch, capsys):
    """It may be due, the best, and the last before a signal."""
    folder = tmp_path / "a"
    with_losses(monkeypatch, [5.0, 4.0])
    with monkeypatch.context() as patch:
        stop_when(patch, lambda: logged(folder) >= 16)  # in step 15
        train(data, folder, "--keep_best")
    saved = re.findall(r"saved .+ckpt_(\d+).pt", capsys.readouterr().out)
    assert saved == ["00008", "00016"]
    assert steps_saved(folder) == [8, 16]
    with_losses(monkeypatch, [4.0, 5.0])
    again(folder)
    # measured again, since it was not saved
    assert checkpoint.read(folder / "ckpt_00060.pt")["best"] == [4.0, 16]


def test_a_run_outlives_a_folder_that_cannot_be_written_for_a_while(whole, data, tmp_path,
                                                                    monkeypatch, capsys):
    """config.json is written with each checkpoint, before it."""
    folder = tmp_path / "a"
    config = folder / "config.json"
    aside = folder / "aside.json"
    log_step = run_folder.RunFolder.log_step

    def in_the_way(run, step, *args):
        log_step(run, step, *args)
        if step == 10:
            run.poll(wait=True)  # until the checkpoint of step 8 is written
            config.rename(aside)
            config.mkdir()
        if step == 30:
            run.poll(wait=True)  # until that of step 24 has failed
            config.rmdir()
            aside.rename(config)

    whole("gpt2")
    monkeypatch.setattr(run_folder.RunFolder, "log_step", in_the_way)
    capsys.readouterr()
    train(data, folder, *KINDS["gpt2"])
    out = capsys.readouterr().out
    assert out.count(f"cannot save a checkpoint in {folder} (Is a directory)") == 2
    assert "done: " in out
    assert steps_saved(folder) == [8, 32, 40, 48, 56, 60]
    assert_same_runs(folder, whole("gpt2"))


# --------------------------------------------------------------------------------------------------
# torchrun, and killed again and again

TWO = ["--max_steps", "300", "--save_every", "50", "--eval_every", "100", "--micro_batch", "2"]


@pytest.mark.slow
@linux
def test_torchrun_restarts_a_process_that_died(launch, data, tmp_path):
    result = launch("train_gpt2.py", *command(data, tmp_path / "whole", *TWO), processes=2)
    assert result.returncode == 0, result.stderr
    words = command(data, tmp_path / "log" / "unnamed", *TWO)
    at = words.index("--run_name")
    del words[at:at + 2]  # the restarted processes find the folder by themselves
    torchrun = ["--standalone", "--nproc_per_node=2", "--max_restarts=1"]
    with running(words, tmp_path / "out.txt", torchrun) as agent:
        wait_for(lambda: list(tmp_path.glob("log/*/ckpt_00050.pt")), agent)
        os.kill(worker(agent, 1), 9)
        code = agent.wait(120)
    assert code == 0, (tmp_path / "out.txt").read_text()[-3000:]
    [folder] = (tmp_path / "log").iterdir()
    _, second = starts_of(folder)
    assert second["step"] >= 50
    assert second["from"].startswith(str(folder))
    assert_same_runs(folder, tmp_path / "whole")


def is_writing(folder):
    return any(folder.glob("ckpt_*.tmp"))


def stop_while_saving(process, folder):
    """Halt a run in the middle of a save, however fast the disk is."""
    while process.poll() is None:
        if is_writing(folder):
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.05)  # threads stop a moment later
            if is_writing(folder):
                return
            process.send_signal(signal.SIGCONT)


def pause(seconds, folder):
    """Let a run train for a time, but on a fast machine for 24 steps at most."""
    end = time.monotonic() + seconds
    last = logged(folder) + 24
    while time.monotonic() < end and logged(folder) < last:
        time.sleep(0.002)


@pytest.mark.slow
def test_twenty_kills_leave_no_trace(data, tmp_path):
    rng = random.Random(6)
    torn = 0
    kills = 20
    flags = ["--max_steps", "600", "--n_embd", "128", "--save_every", "2", "--keep", "3",
             "--eval_every", "50"]
    whole = train(data, tmp_path / "whole", *flags)
    folder = tmp_path / "killed"
    out = tmp_path / "out.txt"
    for kill in range(kills):
        with running(command(data, folder, *flags), out) as process:
            wait_for(lambda: "step " in out.read_text(), process)
            pause(rng.uniform(0, 0.5), folder)
            if kill % 2:
                stop_while_saving(process, folder)
            assert process.poll() is None, "the run is too short for so many kills"
            process.kill()
            process.wait()
        torn += is_writing(folder)
    with running(command(data, folder, *flags), out) as process:
        assert process.wait() == 0
    assert torn >= kills // 2
    assert_same_runs(folder, whole)
    assert scalars(folder) == scalars(whole)
    assert not list(folder.glob("*.tmp"))
    assert len(steps_saved(folder)) == 3
    assert weights_steps(folder) == [600]
    assert len(starts_of(folder)) == kills + 1
