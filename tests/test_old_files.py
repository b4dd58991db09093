"""Files written by an earlier version still work: python -m pytest tests/test_old_files.py

They are in tests/fixtures/d997247; its README describes how they were made.
"""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from helpers import ROOT, hellaswag_items, read_log, write_lines

import chat
import export_hf
import fineweb
import generate
import hellaswag
import posttrain
import train_gpt2
from lib import checkpoint

ARCHIVE = ROOT / "tests" / "fixtures" / "d997247" / "runs.tar.xz"
SAVED = {"gpt2": 8, "speedrun": 8, "mixture": 8, "chat": 24}  # step of each run's checkpoint
BLOCK_SIZE = 64


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A copy of the files, as the current folder: the runs name their data by relative paths."""
    shutil.unpack_archive(ARCHIVE, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def path_of(run):
    return checkpoint.path_of(f"log/{run}", SAVED[run])


@torch.no_grad()
def validation_loss(model, folder):
    """Mean loss on the first 512 tokens of a folder's validation shard."""
    ids = torch.from_numpy(np.load(f"{folder}/{folder}_val_000000.npy").astype(np.int64))
    idx = ids[:512].view(-1, BLOCK_SIZE)
    targets = ids[1:513].view(-1, BLOCK_SIZE)
    return model(idx, targets).item() / 512


@pytest.mark.parametrize("run", SAVED)
def test_a_checkpoint_has_the_loss_it_had(run, old):
    model, _, _ = train_gpt2.load_checkpoint(str(path_of(run)))
    loss = validation_loss(model, "data")
    if run == "mixture":  # --data data:2 more:1
        loss = (2 * loss + validation_loss(model, "more")) / 3
    kind = "val_pretraining" if run == "chat" else "val"
    assert loss == pytest.approx(read_log(old / "log" / run)[SAVED[run], kind], rel=1e-4)


@pytest.mark.parametrize("run", SAVED)
def test_a_run_resumes_with_the_losses_it_had(run, old, capsys):
    before = read_log(old / "log" / run)
    main = posttrain.main if run == "chat" else train_gpt2.main
    main(["--run_name", run])
    assert f"step {SAVED[run]}; as before\n" in capsys.readouterr().out
    assert read_log(old / "log" / run) == pytest.approx(before, rel=1e-4)


@pytest.mark.parametrize("run", SAVED)
def test_a_run_is_repeated_by_its_config(run, old, capsys):
    main = posttrain.main if run == "chat" else train_gpt2.main
    main(["--config", f"log/{run}", "--run_name", "again"])
    before = read_log(old / "log" / run)
    if run != "chat":
        del before[0, "val"]  # random weights were evaluated then
    assert read_log(old / "log" / "again") == pytest.approx(before, rel=1e-4)
    assert "is not repeated exactly: commit " in capsys.readouterr().err


def test_post_training_begins_with_a_checkpoint(old):
    posttrain.main(["--run_name", "new", "--checkpoint", "log/speedrun", "--data", "chats.jsonl",
                    "--device", "cpu", "--max_steps", "2"])
    assert checkpoint.found("log/new")[0][0] == 2


def test_the_chat_model_answers(old, monkeypatch, capsys):
    posttrain.main(["--run_name", "chat"])
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\n"))
    chat.main(["--checkpoint", "log/chat/ckpt_00048.pt", "--device", "cpu", "--temperature", "0"])
    assert capsys.readouterr().out == "sat on the mat.\n"


@pytest.mark.parametrize("run", SAVED)
def test_a_checkpoint_generates_text(run, old, capsys):
    generate.main(["--checkpoint", f"log/{run}", "--prompt", "the cat", "--samples", "1",
                   "--max_new_tokens", "8", "--device", "cpu"])
    assert "the cat" in capsys.readouterr().out


@pytest.mark.parametrize("run", SAVED)
def test_a_checkpoint_is_evaluated(run, old, capsys):
    write_lines(old / "questions.jsonl", hellaswag_items(4))
    hellaswag.main(["--checkpoint", f"log/{run}", "--file", "questions.jsonl", "--device", "cpu"])
    assert "acc_norm" in capsys.readouterr().out


@pytest.mark.parametrize("run, family", [("gpt2", "GPT2LMHeadModel"),
                                         ("mixture", "Glm4MoeForCausalLM")])
def test_a_checkpoint_is_exported(run, family, old):
    export_hf.main(["--checkpoint", f"log/{run}", "--out", "exported", "--check"])
    assert json.loads((old / "exported" / "config.json").read_text())["architectures"] == [family]


def test_a_shard_folder_is_completed(old, datasets_cache):
    """The same command writes what is missing, byte for byte."""
    lost = old / "data" / "data_train_000002.npy"
    before = lost.read_bytes()
    lost.unlink()
    fineweb.main(["--source", "text.jsonl", "--out", "data", "--tokenizer", "bpe:280",
                  "--shard_size", "2500", "--val_tokens", "600"])
    assert lost.read_bytes() == before
