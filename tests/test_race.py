"""benchmarks/race.py: the clock, and seconds to a loss. Run: python -m pytest tests/test_race.py"""

import json
import shutil
import sys

import pytest
from helpers import ROOT, read_log

from lib.shards import Shards
from train_gpt2 import load_checkpoint

sys.path.insert(0, str(ROOT / "benchmarks"))
from race import Result, reaches, read_logs


def test_compilation_is_left_out_and_a_loss_reached_between_two_validations():
    """Step 0 compiles, and step 4 a new shape, each counted as the median of its neighbours: 6
    steps of 1 s."""
    curve = Result(steps=[50.0, 1.0, 1.0, 1.0, 11.0, 1.0], val=[(0, 9.0), (2, 7.0), (4, 4.0),
                                                                (6, 3.0)]).curve()
    assert curve == [(0, 0, 9.0), (2, 2, 7.0), (4, 4, 4.0), (6, 6, 3.0)]
    assert [reaches(curve, target) for target in (8.0, 4.0, 3.25, 2.0)] == [1.0, 4.0, 5.5, None]
    assert reaches([(0, 0, 9.0), (1, 1, 4.0), (2, 2, 6.0), (3, 3, 4.0)],
                   5.0) == pytest.approx(0.8)  # the first time


def test_a_row_runs_and_its_log_is_what_training_logged(launch, data, tmp_path):
    data = shutil.copytree(data, tmp_path / "toy")
    splits = {
        name: {"shards": 1, "tokens": n, "bytes": n} for name, n in Shards(data).tokens.items()
    }  # as fineweb.py writes
    (data / "meta.json").write_text(
        json.dumps(json.loads((data / "meta.json").read_text()) | {"splits": splits}))
    flags = ("--preset gpt2 --n_layer 1 --n_head 2 --n_embd 16 --block_size 16 --total_batch_size 64 --max_steps 4 "
             "--val_tokens 64 --device cpu")
    done = launch("benchmarks/race.py", "--data", data, "--row", f"a: {flags}", "--every", 2,
                  "--out", tmp_path / "race")
    assert done.returncode == 0, done.stderr
    (head, curve), run = read_logs(tmp_path / "race")["a"], tmp_path / "race" / "runs" / "a" / "run"
    val = {step: loss for (step, kind), loss in read_log(run).items() if kind == "val"}
    assert {int(step): loss
            for _, step, loss in curve} == pytest.approx(val, abs=1e-6) and list(val) == [2, 4]
    model = load_checkpoint(run / "ckpt_00004.pt")[0]
    assert (head["kind"], head["parameters"]) == ("other", sum(p.numel()
                                                               for p in model.parameters()))
    assert f"| a | {head['parameters']:,} | " in done.stdout
