"""benchmarks/race.py: its clock, and seconds to a loss: python -m pytest tests/test_race.py"""

import json
import shutil
import sys
import time

import pytest
from helpers import ROOT, read_log

from lib.shards import Shards
from train_gpt2 import load_checkpoint

sys.path.insert(0, str(ROOT / "benchmarks"))
from race import Result, reaches, read_logs

ROW = ("a: --preset gpt2 --n_layer 1 --n_head 2 --n_embd 16 --block_size 16 --max_steps 4 "
       "--total_batch_size 64 --val_tokens 64 --device cpu")


def test_compilation_does_not_count_and_a_loss_is_interpolated():
    """Step 0 compiles, and step 4 a new shape. Each counts as the median of its neighbors, so these
    are 6 steps of 1 s."""
    steps = [50.0, 1.0, 1.0, 1.0, 11.0, 1.0]
    curve = Result(steps=steps, val=[(0, 9.0), (2, 7.0), (4, 4.0), (6, 3.0)]).curve()
    assert curve == [(0, 0, 9.0), (2, 2, 7.0), (4, 4, 4.0), (6, 6, 3.0)]
    assert reaches(curve, 8.0) == 1.0
    assert reaches(curve, 4.0) == 4.0
    assert reaches(curve, 3.25) == 5.5
    assert reaches(curve, 2.0) is None
    falls_twice = [(0, 0, 9.0), (1, 1, 4.0), (2, 2, 6.0), (3, 3, 4.0)]
    assert reaches(falls_twice, 5.0) == pytest.approx(0.8)


def test_the_log_of_a_row_is_what_training_logged(launch, data, tmp_path):
    data = shutil.copytree(data, tmp_path / "toy")
    meta = json.loads((data / "meta.json").read_text())
    meta["splits"] = {}
    for name, n in Shards(data).tokens.items():
        meta["splits"][name] = {"shards": 1, "tokens": n, "bytes": n}
    (data / "meta.json").write_text(json.dumps(meta))
    out = tmp_path / "race"
    started = time.monotonic()
    result = launch("benchmarks/race.py", "--data", data, "--row", ROW, "--every", 2, "--out", out,
                    "--price_per_hour", 3600)
    longest = time.monotonic() - started
    assert result.returncode == 0, result.stderr
    head, curve = read_logs(out)["a"]
    assert curve[-1][0] < head["command"] < longest
    assert f" | {head['command']:.1f} | {head['command']:.3f} | " in result.stdout
    run = out / "runs" / "a" / "run"
    val = {step: loss for (step, kind), loss in read_log(run).items() if kind == "val"}
    assert list(val) == [2, 4]
    assert {int(step): loss for _, step, loss in curve} == pytest.approx(val, abs=1e-6)
    model, *_ = load_checkpoint(run / "ckpt_00004.pt")
    assert head["kind"] == "other"
    assert head["parameters"] == sum(p.numel() for p in model.parameters())
    assert f"| a | {head['parameters']:,} | " in result.stdout
