"""Checkpoints written in the background: python -m pytest tests/lib/test_checkpoint_writer.py"""

import os
import re
import shutil
import time

import pytest
import torch
from runs import KINDS, assert_same_runs, disk_full_when, same, steps_saved, train

from lib import checkpoint
from lib.checkpoint_writer import CheckpointWriter
from lib.cli import BadInput
from lib.parallel import AdamW


def write(writer, step, state, **options):
    """Write a checkpoint and wait for it -> the line about it."""
    writer.start(step, state, **options)
    writer.wait_copied()
    return writer.collect(wait=True)


def three_checkpoints(folder):
    for step in (1, 2, 3):
        checkpoint.write(checkpoint.path_of(folder, step), {"x": torch.ones(1000)})


@pytest.mark.parametrize("keep, left", [(2, [4, 5]), (0, [1, 2, 3, 4, 5]), (9, [1, 2, 3, 4, 5])])
def test_the_newest_are_kept(keep, left, tmp_path):
    (tmp_path / "ckpt_00001.pt.aside").touch()
    writer = CheckpointWriter(tmp_path, keep)
    for step in range(1, 6):
        assert writer.collect() is None
        line = write(writer, step, {"step": step, "x": torch.full((4,), float(step))})
        assert re.fullmatch(rf"saved {tmp_path}/ckpt_0000{step}.pt, 0.00 GB in \d+\.\d s; "
                            r"training waited \d+ ms", line)
    assert steps_saved(tmp_path) == left
    for step, path in checkpoint.found(tmp_path):
        assert checkpoint.read(path)["x"].tolist() == [step] * 4
    assert {path.suffix for path in tmp_path.iterdir()} == {".pt", ".aside"}


def test_all_but_the_newest_make_room(tmp_path, monkeypatch):
    writer = CheckpointWriter(tmp_path, keep=5)
    three_checkpoints(tmp_path)
    with monkeypatch.context() as patch:
        disk_full_when(patch, lambda: len(steps_saved(tmp_path)) >= 3)
        write(writer, 4, {"x": torch.ones(1000)})
    assert steps_saved(tmp_path) == [2, 3, 4]
    disk_full_when(monkeypatch, lambda: True)
    with pytest.raises(BadInput, match="free some disk space"):
        write(writer, 5, {"x": torch.ones(1000)})
    assert steps_saved(tmp_path) == [4]


def test_the_best_does_not_make_room(tmp_path, monkeypatch):
    writer = CheckpointWriter(tmp_path, keep=5)
    three_checkpoints(tmp_path)
    disk_full_when(monkeypatch, lambda: True)
    with pytest.raises(BadInput, match="free some disk space"):
        write(writer, 4, {"x": torch.ones(1000), "best": [2.0, 4]}, former_best=1)
    assert steps_saved(tmp_path) == [1, 3]  # 3: the newest


@pytest.mark.parametrize("extra, leaves", [
    ({"finished": True}, True), ({"best": [2.0, 2]}, True), ({"best": [2.0, 1]}, False),
    ({"finished": False}, False),
])
def test_the_end_and_the_best_leave_weights(extra, leaves, tmp_path):
    tied = torch.randn(100)
    state = {"step": 2, "model": {"wte": tied, "head": tied, "n": torch.tensor(7)},
             "optimizer": {"m": torch.ones(100)}, "loader": {"epoch": 0}, **extra}
    line = write(CheckpointWriter(tmp_path, 0), 2, state)
    path = checkpoint.path_of(tmp_path, 2, "weights")
    assert path.exists() == leaves
    assert line.endswith("; also weights_00002.pt, without the optimizer") == leaves
    if not leaves:
        return
    weights = checkpoint.read(path)
    assert weights["step"] == 2
    assert not {"optimizer", "loader", "finished"} & weights.keys()
    model = weights["model"]
    assert torch.equal(model["wte"], tied.bfloat16())
    assert model["wte"].data_ptr() == model["head"].data_ptr()
    assert model["n"] == 7


def test_weights_go_with_their_checkpoint(tmp_path, monkeypatch):
    writer = CheckpointWriter(tmp_path, keep=1)
    state = {"x": torch.ones(1000)}
    for step in (1, 2, 3):  # each is the best so far
        write(writer, step, state | {"best": [4.0 - step, step]}, former_best=step - 1)
    write(writer, 4, state | {"best": [1.0, 3]}, former_best=3)
    assert steps_saved(tmp_path) == [3, 4]
    assert [step for step, _ in checkpoint.found(tmp_path, "weights")] == [3]
    written = checkpoint.write

    def fails(path, state):
        if path.name == "ckpt_00005.pt":
            raise BadInput("no room for it")
        written(path, state)

    monkeypatch.setattr(checkpoint, "write", fails)
    with pytest.raises(BadInput):
        write(writer, 5, state | {"finished": True})
    assert [step for step, _ in checkpoint.found(tmp_path, "weights")] == [3]


def test_a_checkpoint_matters_more_than_its_weights(tmp_path, monkeypatch):
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=5000))
    state = {"x": torch.ones(1000), "finished": True}
    line = write(CheckpointWriter(tmp_path, 0), 1, state)  # of 4,000 bytes
    assert "; no weights_00001.pt (with the checkpoint it needs" in line
    assert os.listdir(tmp_path) == ["ckpt_00001.pt"]


def test_tied_tensors_stay_one(tmp_path):
    tied = torch.randn(200, 100)
    state = {"wte": tied, "head": tied, "parts": [tied, tied.clone()]}
    write(CheckpointWriter(tmp_path, 0), 1, state)
    assert 160_000 < (tmp_path / "ckpt_00001.pt").stat().st_size < 170_000
    loaded = checkpoint.read(tmp_path / "ckpt_00001.pt")
    assert loaded["wte"].data_ptr() == loaded["head"].data_ptr()
    assert loaded["wte"].data_ptr() != loaded["parts"][1].data_ptr()
    assert same(loaded, state)


def test_training_waits_for_the_copy_but_not_for_the_disk(whole, data, tmp_path, monkeypatch):
    copy = CheckpointWriter._to_host
    save = torch.save
    step = AdamW.step
    updates = []

    def late_copy(*args):
        time.sleep(0.1)  # without waiting, the tensors would have changed by then
        return copy(*args)

    def late_save(state, file):
        last = min(len(updates) + 2, 60)
        deadline = time.monotonic() + 300
        while len(updates) < last:  # training continues meanwhile
            assert time.monotonic() < deadline, "training waits for the disk"
            time.sleep(0.001)
        save(state, file)

    def counted(optimizer):
        updates.append(1)
        step(optimizer)

    monkeypatch.setattr(AdamW, "step", counted)
    monkeypatch.setattr(CheckpointWriter, "_to_host", late_copy)
    monkeypatch.setattr(torch, "save", late_save)
    folder = train(data, tmp_path / "a", *KINDS["gpt2"])
    assert_same_runs(folder, whole("gpt2"))
    for saved, path in checkpoint.found(folder):
        ours = checkpoint.read(path)
        theirs = checkpoint.read(checkpoint.path_of(whole("gpt2"), saved))
        for name in ("model", "optimizer", "loader", "step", "skipped"):
            assert same(ours[name], theirs[name]), (saved, name)


def test_errors_in_the_background_are_raised_by_collect(tmp_path, monkeypatch):
    writer = CheckpointWriter(tmp_path, 1)
    write(writer, 1, {"x": torch.zeros(9)})

    def half(state, file):
        file.write(b"half")
        raise RuntimeError("enforce fail: unexpected pos")

    def no_memory(*args, **kwargs):
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch, pytest.raises(BadInput, match="cannot save"):
        patch.setattr(torch, "save", half)
        write(writer, 2, {"x": torch.zeros(9)})
    with monkeypatch.context() as patch, pytest.raises(BadInput, match="no memory for a copy"):
        patch.setattr(torch, "empty", no_memory)
        write(writer, 2, {"x": torch.zeros(10)})
    assert os.listdir(tmp_path) == ["ckpt_00001.pt"]  # the old one was not deleted for them
    assert write(writer, 3, {"x": torch.ones(9)}).startswith("saved")
    assert os.listdir(tmp_path) == ["ckpt_00003.pt"]
