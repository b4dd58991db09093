"""The README's first command from a clean copy. Run: make test-slow, or python -m pytest -m slow
tests/test_make.py"""

import json
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT


@pytest.mark.slow
def test_make_train_from_a_clean_copy_and_again(tmp_path):
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True,
                           check=True).stdout.split()
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)

    def make_train(
    ):  # this Python has a torch in range, so the new venv must see it instead of installing another
        flags = "ARGS=--max_steps 12 --val_tokens 4096 --sample_every 12"
        done = subprocess.run(["make", "train", f"PYTHON={sys.executable}", flags], cwd=tmp_path,
                              capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    first = make_train()
    assert f"keeping torch {__import__('torch').__version__}" in first and "training a BPE of 4096 ids" in first
    assert "step 12 | val loss" in first and "bits per byte" in first and "\n> Return the" in first
    assert "\nresult  validation loss" in first
    for hint in ("tensorboard --logdir log", "python generate.py --checkpoint log/tiny_",
                 "the real run:  python fineweb.py"):
        assert hint in first
    meta = json.loads((tmp_path / "docstrings" / "meta.json").read_text())
    assert meta["vocab_size"] == 4092  # 4 of the 4,096 ids are reserved for chat
    assert sum(split["bytes"] for split in meta["splits"].values()) > 5_000_000
    again = make_train()  # the first has come to its end: a new run
    assert "docstrings/ is complete" in again and "training a BPE" not in again
    runs = sorted((tmp_path / "log").glob("tiny_*"))
    assert len(runs) == 2 and all(
        (run / "ckpt_00012.pt").exists() and list(run.glob("events*")) for run in runs)
    words = [tmp_path / ".venv/bin/torchrun", "--standalone", "--nproc_per_node=1", "train_gpt2.py",
             "--run_name", "x", "--help"]
    assert "usage: train_gpt2.py" in subprocess.run(words, cwd=tmp_path, capture_output=True,
                                                    text=True, check=False).stdout
