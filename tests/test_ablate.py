"""ablate.py, launched for real at a tiny size: python -m pytest tests/test_ablate.py"""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import forks
import pytest
import torch
from helpers import ROOT, TINY_FLAGS, read_log
from runs import LONG, contents, logged, train, wait_for

import ablate
import train_gpt2
from lib.cli import BadInput


def rows(folder):
    """ablation.md -> {change: cells}."""
    lines = [
        line for line in (folder / "ablation.md").read_text().splitlines() if line.startswith("| ")
    ]
    return {
        cells[0]: cells[1:]
        for cells in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    }


@pytest.fixture
def forked_runs(monkeypatch):
    """The runs of ablate.py, called in this process, are forked as forks.py does."""
    def popen(command, env, stdout, **_):
        return forks.start(command[1:], os.getcwd(), [stdout] * 3, [env])

    if forks.POSSIBLE:
        forking = SimpleNamespace(Popen=popen, STDOUT=subprocess.STDOUT)
        monkeypatch.setattr(ablate, "subprocess", forking)


def test_a_change_is_priced_against_the_base_of_the_same_seed_and_is_run_once(
        forked_runs, data, tmp_path, capsys):
    out, changes = tmp_path / "out", tmp_path / "changes.txt"
    changes.write_text("# two\n--no-bias\n\nwide: --n_embd 64 --n_head 4  # twice\n")
    ours = [
        "--changes", changes, "--seeds", "1", "2", "--price_per_hour", "36000", "--out", out, "--"
    ]
    words = [str(word) for word in (*ours, *TINY_FLAGS, "--data", data)]
    ablate.main(words)
    printed = capsys.readouterr().out
    head, table = rows(out)["change"], rows(out)
    worth = {name: sum(map(float, table[name][3].split(", "))) for name in ("no-bias", "wide")}
    assert [*table] == ["change", "base", *sorted(worth, key=worth.get, reverse=True)]
    losses = {
        name: [read_log(out / f"{name}_seed{seed}")[6, "val"]
               for seed in (1, 2)]
        for name in ("base", "no-bias", "wide")
    }
    assert len({loss for found in losses.values() for loss in found}) == 6  # each its own run
    for name, found in losses.items():
        cells = dict(zip(head, table[name], strict=True))
        assert cells["val loss, by seed"] == f"1: {found[0]:.4f}, 2: {found[1]:.4f}"
        apart = [float(d) for d in cells["difference in loss"].split(", ") if d]
        assert apart == pytest.approx(
            [] if name == "base" else [a - b for a, b in zip(found, losses["base"])], abs=1.1e-4)
        seconds, spread = map(float, cells["seconds"].split(" ± "))
        assert float(cells["dollars"]) == pytest.approx(10 * seconds, abs=0.51)
        each = [
            json.loads((out / f"{name}_seed{seed}.json").read_text())["seconds"] for seed in (1, 2)
        ]
        assert spread == pytest.approx((max(each) - min(each)) / 2, abs=0.051)
        assert re.match(r"\d+\.\d ± \d+\.\d", cells["ms per step"])
    ends = [line for line in printed.splitlines() if "_seed" in line]
    assert [re.search(r"; (\d) to go, ETA \d:\d\d:\d\d$", line)[1]
            for line in ends[:5]] == ["5", "4", "3", "2", "1"]
    assert ends[5].endswith(
        "; the last one") and "The base comes first" in printed
    assert f"differ by {abs(losses['base'][0] - losses['base'][1]):.4f}" in printed
    assert not [*out.glob("*/*.pt")] and (out / "ablation.png").stat().st_size > 5000

    before = {path: path.stat().st_mtime_ns for path in (*out.glob("*/*"), *out.glob("*.json"))}
    ablate.main(words)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    again = capsys.readouterr().out
    assert again[again.index("| change"):].strip() == printed[printed.index("| change"):].strip()
    with pytest.raises(BadInput, match="base_seed1 is a run of other flags"):
        ablate.main([*words, "--max_lr", "1e-3"])


RATES = {"max_lr", "embedding_lr", "head_lr", "vector_lr"}  # which an optimizer brings


def set_by(words):
    """All settings that these flags make, but for the rates."""
    train, model, *_ = train_gpt2.settings(words)
    whole = dataclasses.asdict(train) | dataclasses.asdict(model)
    return {name: value for name, value in whole.items() if name not in RATES}


def test_without_a_list_each_part_that_gpt2_has_not_is_taken_out():
    base = ["--preset", "speedrun"]
    changes = ablate.default_changes(base)
    assert {"mlp_gelu", "no-token_shift", "softcap_0.0", "bias", "optimizer_adamw"} <= {*changes}
    whole, classic = set_by(base), set_by(["--preset", "gpt2"])
    taken_out = set()
    for words in changes.values():
        [(field, value)] = set_by([*base, *words]).items() - whole.items()
        assert value == classic[field]
        taken_out.add(field)
    model = dataclasses.asdict(train_gpt2.settings(base).model)
    differing = {name for name, value in model.items() if value != classic[name]}
    shape = {"n_layer", "n_head", "n_embd", "block_size"}
    assert taken_out == differing - shape | {"optimizer", "schedule"}


def test_without_a_list_each_part_there_is_is_put_into_gpt2():
    base = ["--preset", "gpt2", "--n_layer", "3"]
    changes = ablate.default_changes(base)
    for name in ("mlp", "norm", "init"):
        choices = {"mlp": train_gpt2.MLPS, "norm": train_gpt2.NORMS, "init": train_gpt2.INITS}[name]
        assert {f"{name}_{choice}" for choice in [*choices][1:]} <= {*changes}
    assert {"pos_rope", "no-bias", "dropout_0.1", "softcap_15.0", "optimizer_muon",
            "schedule_wsd"} <= {*changes}
    whole = set_by(base)
    for words in changes.values():
        assert len(set_by([*base, *words]).items() - whole.items()) == 1


@pytest.mark.parametrize(
    "text, base, told",
    [
        ("--no-bias\nx: --mlp gelo", "", "x: --mlp: invalid choice: 'gelo'"),
        ("--n_head 5", "", "n_head_5: --n_embd 32 must be a multiple of --n_head 5"),
        ("--seed 3", "", "seed_3: leave --seed out and give --seeds"),
        ("--no-bias", "--run_name mine", "base: leave --run_name out"),
        ("--no-bias", "--eval_every 0", "base: --eval_every 0 would measure no loss"),
        ("--no-bias", "--minutes 1", "base: --max_steps and --minutes each set the length"),
        ("--total_batch_size 250", "",
         "total_batch_size_250: --total_batch_size 250 must be a multiple of"),
        ("--val_tokens 99", "",
         "val_tokens_99: --val_tokens must be the same as the base's, or losses do not compare"),
        ("--data missing", "", "data_missing: --data must be the same as the base's"),
        ("--max_steps 3", "", "max_steps_3: --max_steps must be the same as the base's"),
        ("x:--no-bias", "", "x_--no-bias: unexpected argument x:--no-bias"),
        ("--help", "", "help: leave --help out"),
        ("--sample_prompt seed --n_head 5", "",
         "must be a multiple of --n_head 5"),  # a value, not the flag
        ("--no-bias", "--resume auto", "base: leave --resume out"),
        ("--sample_prompt " + 300 * "x", "", "give a short one, `name: flags`"),
        ("a: --no-bias\na: --pos rope", "", "the name 'a' is missing or already used"),
        ("base: --no-bias", "", "the name 'base' is missing or already used"),
        ("--data 'a b", "", "is not a list of flags (No closing quotation): close its quotes"),
        ("# nothing\n", "", "holds no change")
    ])
def test_what_cannot_be_run_ends_before_anything_is(data, tmp_path, text, base, told):
    (tmp_path / "changes.txt").write_text(text)
    ours = ["--changes", str(tmp_path / "changes.txt"), "--out", str(tmp_path / "out"), "--"]
    with pytest.raises(BadInput, match=re.escape(told)):
        ablate.main([*ours, *TINY_FLAGS, "--data", str(data), *base.split()])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "base, words, told",
    [("--preset modern --max_steps 3", "--preset tiny", "--val_tokens must be the same as the base's"),
     ("--preset gpt2 --epochs 1", "--preset modern --epochs 2", "--epochs must be the same as the base's"),
     ("--preset tiny --tokens_per_param 1", "--pos learned",
      "--tokens_per_param would give each change another length")])
def test_what_a_preset_brings_must_compare_too(data, base, words, told):
    with pytest.raises(BadInput, match=re.escape(told)):
        ablate.check_flags([*base.split(), "--data", str(data)], words.split())


def test_a_run_that_is_not_its_own_is_left_alone(data, tmp_path):
    folder = train(data, tmp_path / "base_seed1", "--max_steps", "6")
    before = contents(folder)
    with pytest.raises(BadInput, match="base_seed1 was not started by ablate.py: give another --out"):
        ablate.main([
            "--out",
            str(tmp_path), "--seeds", "1", "--", *TINY_FLAGS, "--data",
            str(data), "--pos", "rope"
        ])
    assert contents(folder) == before
    (tmp_path / "out" / "ablation.md").mkdir(parents=True)
    with pytest.raises(BadInput, match="ablation.md is a folder: name another --out"):
        ablate.main([
            "--out",
            str(tmp_path / "out"), "--", *TINY_FLAGS, "--data",
            str(data), "--pos", "rope"
        ])


def test_a_run_that_fails_is_named_and_the_others_are_kept(forked_runs, data, tmp_path, monkeypatch,
                                                           capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path
     / "changes.txt").write_text("lost: --hellaswag_every 1 --hellaswag_file missing\n--no-bias")
    words = ["--changes", "changes.txt", "--out", "out", "--seeds", "1", "--", *TINY_FLAGS]
    with pytest.raises(BadInput, match="1 of 3 runs failed, lost_seed1: train_gpt2.py: error: "):
        ablate.main([*words, "--data", str(data)])
    assert [*rows(tmp_path / "out")] == ["change", "base", "no-bias"]
    assert "One seed proves little" in capsys.readouterr().out


def test_stopped_it_goes_on_and_ends_as_if_it_had_not_been(data, tmp_path, request):
    (tmp_path / "changes.txt").write_text("--no-bias")
    flags = [*TINY_FLAGS, *LONG, "--eval_every", "1000000", "--data", str(data)]
    words = [
        "--changes",
        str(tmp_path / "changes.txt"), "--out",
        str(tmp_path / "out"), "--seeds", "7", "--", *flags
    ]
    with subprocess.Popen([sys.executable, str(ROOT / "ablate.py"), *words], stderr=subprocess.PIPE,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        wait_for(lambda: logged(tmp_path / "out" / "base_seed7") > 40, process)
        process.send_signal(signal.SIGTERM)
        assert "stopped: run the same command again to continue" in process.stderr.read()
        assert process.wait(60) == 130
    assert not (tmp_path / "out" / "no-bias_seed7").exists()
    stopped = max(step for step, kind in read_log(tmp_path / "out" / "base_seed7")
                  if kind == "train")
    assert 30 < stopped < 249
    with pytest.raises(BadInput, match="base_seed7 is a run of other flags"):
        ablate.main([*words, "--max_lr", "1e-3"])
    request.getfixturevalue("forked_runs")
    ablate.main(words)
    train_gpt2.main([*flags, "--seed", "7", "--log_dir", str(tmp_path), "--run_name", "whole"])
    whole = read_log(tmp_path / "whole")
    assert rows(tmp_path / "out")["base"][1] == f"7: {whole[250, 'val']:.4f}"
    assert {
        key: loss
        for key, loss in read_log(tmp_path / "out" / "base_seed7").items()
        if key[1] == "train"
    } == {key: loss for key, loss in whole.items() if key[1] == "train"}


def test_one_run_at_a_time_on_every_gpu_that_may_be_used(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert ablate.slots({"auto"}) == ["0", "1"] and ablate.slots({"cpu"}) == [None]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    assert ablate.slots({"auto", "cuda"}) == ["3", "GPU-5"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert ablate.slots({"auto"}) == [None]
