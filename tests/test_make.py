"""The README's first command, in a clean copy.

    python -m pytest -m slow tests/test_make.py
"""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import ROOT


def make_train(folder):
    """`make train`, for 12 steps -> its output."""
    # this Python has a torch in range: the new venv must see it instead of installing another
    flags = "ARGS=--max_steps 12 --val_tokens 4096 --sample_every 12"
    command = ["make", "train", f"PYTHON={sys.executable}", flags]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("version, kept", [
    ("2.10.0", False), ("2.11.0+cu130", True), ("2.14.1+cu132", True), ("2.15.0", True),
    ("2.16.0", False), ("2.15.0a0+git", False)])
def test_a_machine_s_torch_is_kept(version, kept, tmp_path):
    """A stand-in for torch; the script of the Makefile runs on it."""
    (tmp_path / "torch.py").write_text(f"__version__ = {version!r}\n")
    makefile = (ROOT / "Makefile").read_text()
    script = re.search(r"define FIND_TORCH\n(.*?)\nendef", makefile, re.DOTALL)
    python = tmp_path / "python"  # of the new venv; prints the folder of its packages
    python.write_text(f"#!/bin/sh\necho {shlex.quote(str(tmp_path))}\n")
    python.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", script[1].replace("\\", ""), python],
                          capture_output=True, text=True, check=True, cwd=tmp_path)
    assert (f"keeping torch {version}" in done.stdout) == kept
    assert (tmp_path / "box.pth").exists() == (tmp_path / ".keeps_torch").exists() == kept


@pytest.mark.slow
def test_make_train_in_a_clean_copy_and_again(tmp_path):
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True,
                           check=True).stdout.split()
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    first = make_train(tmp_path)
    for line in (f"keeping torch {torch.__version__}", "training a BPE of 4096 ids",
                 "step 12 | val loss", "bits per byte", "\n> Return the",
                 "\nresult  validation loss", "tensorboard --logdir log",
                 "python generate.py --checkpoint log/tiny_", "the real run:  python fineweb.py"):
        assert line in first
    meta = json.loads((tmp_path / "docstrings" / "meta.json").read_text())
    assert meta["vocab_size"] == 4092  # 4 of the 4,096 ids are reserved for chat
    assert sum(split["bytes"] for split in meta["splits"].values()) > 5_000_000

    again = make_train(tmp_path)  # the first run has ended: this is a new one
    assert "docstrings/ is complete" in again
    assert "training a BPE" not in again
    runs = sorted((tmp_path / "log").glob("tiny_*"))
    assert len(runs) == 2
    for run in runs:
        assert (run / "ckpt_00012.pt").exists()
        assert list(run.glob("events*"))
    torchrun = [tmp_path / ".venv/bin/torchrun", "--standalone", "--nproc_per_node=1"]
    shown = subprocess.run([*torchrun, "train_gpt2.py", "--run_name", "x", "--help"], cwd=tmp_path,
                           capture_output=True, text=True, check=False)
    assert "usage: train_gpt2.py" in shown.stdout
