"""ablate.py, launched at a tiny size: python -m pytest tests/test_ablate.py"""

import contextlib
import dataclasses
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import forks
import numpy as np
import pytest
import scipy.stats
import torch
from helpers import ROOT, TINY_FLAGS, read_log
from runs import LONG, contents, linux, logged, train, wait_for

import ablate
import train_gpt2
from lib.cli import BadInput
from lib.files import locked


def rows(folder):
    """ablation.md -> {change: cells}."""
    found = {}
    for line in (folder / "ablation.md").read_text().splitlines():
        if line.startswith("| "):
            change, *cells = [cell.strip() for cell in line.split("|")[1:-1]]
            found[change] = cells
    return found


@pytest.fixture
def forked_runs(monkeypatch):
    """The runs of ablate.py, called in this process, are forked as forks.py does."""
    def popen(command, env, stdout, **_):
        return forks.start(command[1:], os.getcwd(), [stdout] * 3, [env])

    if forks.POSSIBLE:
        forking = SimpleNamespace(Popen=popen, STDOUT=subprocess.STDOUT)
        monkeypatch.setattr(ablate, "subprocess", forking)


def times(out):
    """When the files of all runs were last written."""
    return {path: path.stat().st_mtime_ns for path in (*out.glob("*/*"), *out.glob("*.json"))}


def result_of(folder):
    return json.loads((folder / "config.json").read_text())["result"]


def table_in(printed):
    return printed[printed.index("| change"):].strip()


def test_a_change_is_compared_with_the_base_of_the_same_seed_and_runs_once(
        forked_runs, data, tmp_path, capsys):
    out = tmp_path / "out"
    changes = tmp_path / "changes.txt"
    changes.write_text("# two\n--no-bias\n\nwide: --n_embd 64 --n_head 4  # twice\n")
    words = ["--changes", changes, "--seeds", "1", "2", "--price_per_hour", "36000", "--out", out,
             "--", *TINY_FLAGS, "--data", data]
    words = [str(word) for word in words]
    ablate.main(words)
    printed = capsys.readouterr().out
    table = rows(out)
    losses = {}
    for name in ("base", "no-bias", "wide"):
        losses[name] = [read_log(out / f"{name}_seed{seed}")[6, "val"] for seed in (1, 2)]
    assert len({loss for pair in losses.values() for loss in pair}) == 6  # each its own run
    base = losses["base"]
    for name, pair in losses.items():
        cells = dict(zip(table["change"], table[name], strict=True))
        assert cells["val loss, by seed"] == f"1: {pair[0]:.4f}, 2: {pair[1]:.4f}"
        expected = []
        if name != "base":
            expected = [loss - base_loss for loss, base_loss in zip(pair, base)]
        differences = [float(text) for text in cells["difference in loss"].split(", ") if text]
        assert differences == pytest.approx(expected, abs=1.1e-4)
        if name == "base":
            assert not cells["verdict"]
        else:
            assert cells["verdict"] == ablate.verdict(expected)
        seconds, spread = map(float, cells["seconds"].split(" ± "))
        assert float(cells["dollars"]) == pytest.approx(10 * seconds, abs=0.51)
        results = [result_of(out / f"{name}_seed{seed}") for seed in (1, 2)]
        whole = statistics.mean(result["seconds"] for result in results)
        step_ms = statistics.mean(result["step_ms"] for result in results)
        for column, mean in (("wall clock", whole), ("ms per step", step_ms)):
            assert float(cells[column].split(" ± ")[0]) == pytest.approx(mean, abs=0.06)
        assert cells["memory, GB"] == "n/a"  # of a GPU only
        records = [json.loads((out / f"{name}_seed{seed}.json").read_text()) for seed in (1, 2)]
        half_range = abs(records[0]["seconds"] - records[1]["seconds"]) / 2
        assert spread == pytest.approx(half_range, abs=0.051)
        assert re.match(r"\d+\.\d ± \d+\.\d", cells["ms per step"])
    # the best change first
    changed = sorted(("no-bias", "wide"), key=lambda name: sum(losses[name]))
    assert list(table) == ["change", "base", *changed]
    ends = [line for line in printed.splitlines() if "_seed" in line]
    order = [line.partition(":")[0] for line in ends]
    assert order == [f"{name}_seed{seed}" for seed in (1, 2) for name in losses]
    for left, line in zip((5, 4, 3, 2, 1), ends):
        assert re.search(rf"; {left} to go, ETA \d:\d\d:\d\d$", line)
    assert ends[5].endswith("; the last one")
    assert "The base comes first, then the changes" in printed
    assert f"differ by {abs(base[0] - base[1]):.4f}. {ablate.RULE}" in printed
    assert not list(out.glob("*/*.pt"))
    assert (out / "ablation.png").stat().st_size > 5000

    before = times(out)
    ablate.main(words)
    assert times(out) == before
    assert table_in(capsys.readouterr().out) == table_in(printed)
    with pytest.raises(BadInput, match="base_seed1 is a run with other flags"):
        ablate.main([*words, "--max_lr", "1e-3"])


RATES = {"max_lr", "embedding_lr", "bigram_lr", "head_lr", "vector_lr"}  # which an optimizer brings


def set_by(words):
    """All settings that these flags make, but for the rates."""
    train, model, *_ = train_gpt2.settings(words)
    whole = dataclasses.asdict(train) | dataclasses.asdict(model)
    return {name: value for name, value in whole.items() if name not in RATES}


def test_without_a_list_each_part_beyond_gpt2_is_taken_out():
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


def test_without_a_list_each_available_part_is_put_into_gpt2():
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
    "text, base, says",
    [
        ("--no-bias\nx: --mlp gelo", "", "x: --mlp: invalid choice: 'gelo'"),
        ("--n_head 5", "", "n_head_5: --n_embd 32 must be a multiple of --n_head 5"),
        ("--seed 3", "", "seed_3: leave --seed out and give --seeds"),
        ("--no-bias", "--run_name mine", "base: leave --run_name out"),
        ("--no-bias", "--eval_every 0", "base: --eval_every 0 measures no loss"),
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
        ("--sample_prompt " + 300 * "x", "", "give a short one as `name: flags`"),
        ("a: --no-bias\na: --pos rope", "", "the name 'a' is missing or already used"),
        ("base: --no-bias", "", "the name 'base' is missing or already used"),
        ("--data 'a b", "", "is not a list of flags (No closing quotation): check its quotes"),
        ("# nothing\n", "", "has no changes")
    ])
def test_bad_changes_are_refused_before_any_run(data, tmp_path, text, base, says):
    (tmp_path / "changes.txt").write_text(text)
    ours = ["--changes", str(tmp_path / "changes.txt"), "--out", str(tmp_path / "out"), "--"]
    with pytest.raises(BadInput, match=re.escape(says)):
        ablate.main([*ours, *TINY_FLAGS, "--data", str(data), *base.split()])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("base, words, says", [
    ("--preset modern --max_steps 3", "--preset tiny", "--val_tokens must be the same"),
    ("--preset gpt2 --epochs 1", "--preset modern --epochs 2", "--epochs must be the same"),
    ("--preset tiny --tokens_per_param 1", "--pos learned",
     "--tokens_per_param sets a different length for each change"),
])
def test_settings_of_a_preset_must_compare_too(data, base, words, says):
    with pytest.raises(BadInput, match=re.escape(says)):
        ablate.check_flags([*base.split(), "--data", str(data)], words.split())


SPEEDRUN = ["--preset", "speedrun", "--max_steps", "9"]


def test_a_grid_is_every_combination_but_the_base():
    changes = ablate.grid_changes(("max_lr .02 .03", "--bias true false"), SPEEDRUN)
    assert changes == {
        "max_lr_.02_bias": ["--max_lr=.02", "--bias"],
        "max_lr_.02_no-bias": ["--max_lr=.02", "--no-bias"],
        "max_lr_.03_bias": ["--max_lr=.03", "--bias"],
    }  # speedrun has 0.03 and no bias
    for words in changes.values():
        ablate.settings([*SPEEDRUN, *words])


def test_a_grid_and_a_list_are_both_tried(tmp_path):
    (tmp_path / "changes.txt").write_text("wide: --n_embd 1024")
    cfg = ablate.Config(changes=str(tmp_path / "changes.txt"), grid=("n_layer 4 6",))
    assert [*ablate.find_changes(cfg, SPEEDRUN)] == ["wide", "n_layer_4", "n_layer_6"]
    (tmp_path / "changes.txt").write_text("n_layer_4: --n_layer 4")
    with pytest.raises(BadInput, match="--changes and --grid both hold n_layer_4"):
        ablate.find_changes(cfg, SPEEDRUN)


@pytest.mark.parametrize("words, says", [
    ("--grid max_lr .02", "--grid max_lr: give a flag and its values in quotes"),
    ("--grid 'n_head 2' --grid 'n_head 4'", "--grid n_head 4: a flag or a value is given twice"),
    ("--grid 'n_head 4 4'", "--grid n_head 4 4: a flag or a value is given twice"),
    ("--grid 'n_head 4 5'", "n_head_5: --n_embd 32 must be a multiple of --n_head 5"),
    ("--grid 'bias 0'", "bias_0: --bias"),
    ("--grid 'seed 1 2'", "seed_1: leave --seed out and give --seeds"),
])
def test_a_bad_grid_is_refused_before_any_run(data, tmp_path, words, says):
    ours = [*shlex.split(words), "--out", str(tmp_path / "out"), "--"]
    with pytest.raises(BadInput, match=re.escape(says)):
        ablate.main([*ours, *TINY_FLAGS, "--data", str(data)])
    assert not (tmp_path / "out").exists()


def test_a_run_of_another_command_is_left_alone(data, tmp_path):
    base = ["--", *TINY_FLAGS, "--data", str(data), "--pos", "rope"]
    folder = train(data, tmp_path / "base_seed1", "--max_steps", "6")
    before = contents(folder)
    with pytest.raises(BadInput, match="base_seed1 was not started by ablate.py: give another"):
        ablate.main(["--out", str(tmp_path), "--seeds", "1", *base])
    assert contents(folder) == before
    (tmp_path / "out" / "ablation.md").mkdir(parents=True)
    with pytest.raises(BadInput, match="ablation.md is a folder: name another --out"):
        ablate.main(["--out", str(tmp_path / "out"), *base])


@pytest.mark.parametrize("n, tolerance", [(2, 1e-3), (3, 1e-3), (5, 1e-3), (11, 1e-3), (30, 0.1)])
def test_the_interval_is_that_of_a_paired_t_test(n, tolerance):
    rng = np.random.default_rng(n)
    base = rng.normal(5, 0.05, n)
    changed = base + rng.normal(0.01, 0.02, n)
    mean, margin = ablate.interval((changed - base).tolist())
    low, high = scipy.stats.ttest_rel(changed, base).confidence_interval(0.95)
    assert mean == pytest.approx((low + high) / 2)
    assert margin == pytest.approx((high - low) / 2, rel=tolerance)


@pytest.mark.parametrize("differences, says", [
    ([0.030, 0.034], "worse: +0.0320 ± 0.0254"),
    ([-0.030, -0.034, -0.026], "better: -0.0300 ± 0.0099"),
    ([0.030, 0.040], "within noise: +0.0350 ± 0.0635"),  # the seeds agree, but there are two
    ([0.030, -0.010, 0.020], "within noise: +0.0133 ± 0.0517"),
    ([0.0, 0.0], "within noise: +0.0000 ± 0.0000"),
    ([0.3], ""),
    ([math.nan, 0.1], "not finite"),
])
def test_a_verdict_needs_seeds_that_agree(differences, says):
    assert ablate.verdict(differences) == says


def test_a_clearly_worse_change_is_dropped_after_its_first_seed(forked_runs, data, tmp_path,
                                                                capsys):
    out = tmp_path / "out"
    words = ["--grid", "max_lr 1e-9 4e-3", "--seeds", "1", "2", "3", "--drop", "--out", str(out),
             "--", *TINY_FLAGS, "--data", str(data)]
    ablate.main(words)
    printed = capsys.readouterr().out
    assert "max_lr_1e-9: dropped, clearly worse with seed 1\n" in printed
    assert "max_lr_4e-3_seed3: val loss" in printed and "; the last one\n" in printed
    assert not list(out.glob("max_lr_1e-9_seed[23]*"))
    table = rows(out)
    verdicts = {name: cells[table["change"].index("verdict")] for name, cells in table.items()}
    assert verdicts["max_lr_1e-9"] == "worse, dropped"
    assert "±" in verdicts["max_lr_4e-3"]
    base = [read_log(out / f"base_seed{seed}")[6, "val"] for seed in (1, 2, 3)]
    limit = 4.303 * 2 ** 0.5 * np.std(base, ddof=1)  # of the difference of two runs
    assert limit > ablate.LEAST_DROP
    assert f"their loss was more than {limit:.3f}" in printed
    before = times(out)
    ablate.main(words)
    assert times(out) == before
    assert table_in(capsys.readouterr().out) == table_in(printed)
    ablate.main([word for word in words if word != "--drop"])
    assert "dropped" not in (out / "ablation.md").read_text()
    assert (out / "max_lr_1e-9_seed3").is_dir()


def test_dropping_needs_the_spread_of_seeds(data):
    with pytest.raises(BadInput, match="--drop needs the spread of several seeds"):
        ablate.main(["--drop", "--seeds", "1", "--", *TINY_FLAGS, "--data", str(data)])
    runs = [ablate.Run(change, seed, [], "", finished=True, loss=5.0)
            for change in ("base", "same", "diverged") for seed in (1, 2)]
    cfg = ablate.Config(seeds=(1, 2), drop=True)
    runs[4].loss = math.nan
    runs[3].finished = False
    runs[5].finished = False
    assert ablate.dropped(runs, cfg) == ["diverged"]
    runs[1].finished = False  # the base's spread is unknown
    assert ablate.dropped(runs, cfg) == []


def test_a_run_that_fails_is_named_and_the_others_are_kept(forked_runs, data, tmp_path, monkeypatch,
                                                           capsys):
    monkeypatch.chdir(tmp_path)
    fails = "lost: --hellaswag_every 1 --hellaswag_file missing"
    (tmp_path / "changes.txt").write_text(f"{fails}\n--no-bias")
    words = ["--changes", "changes.txt", "--out", "out", "--seeds", "1", "--", *TINY_FLAGS]
    with pytest.raises(BadInput, match="1 of 3 runs failed, lost_seed1: train_gpt2.py: error: "):
        ablate.main([*words, "--data", str(data)])
    assert [*rows(tmp_path / "out")] == ["change", "base", "no-bias"]
    table = rows(tmp_path / "out")
    assert not table["no-bias"][table["change"].index("verdict")]
    assert "One seed proves little" in capsys.readouterr().out


def test_a_stopped_command_continues_and_ends_as_an_uninterrupted_one(data, tmp_path, request):
    changes = tmp_path / "changes.txt"
    changes.write_text("--no-bias")
    flags = [*TINY_FLAGS, *LONG, "--eval_every", "1000000", "--data", str(data)]
    words = ["--changes", str(changes), "--out", str(tmp_path / "out"), "--seeds", "7",
             "--", *flags]
    with subprocess.Popen([sys.executable, str(ROOT / "ablate.py"), *words], stderr=subprocess.PIPE,
                          text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        wait_for(lambda: logged(tmp_path / "out" / "base_seed7") > 40, process)
        process.send_signal(signal.SIGTERM)
        assert "stopped: run the same command again to continue" in process.stderr.read()
        assert process.wait(600) == 130
    assert not (tmp_path / "out" / "no-bias_seed7").exists()
    steps = [step for step, kind in read_log(tmp_path / "out" / "base_seed7") if kind == "train"]
    assert 30 < max(steps) < 249
    with pytest.raises(BadInput, match="base_seed7 is a run with other flags"):
        ablate.main([*words, "--max_lr", "1e-3"])
    request.getfixturevalue("forked_runs")
    ablate.main(words)
    train_gpt2.main([*flags, "--seed", "7", "--log_dir", str(tmp_path), "--run_name", "whole"])
    expected = read_log(tmp_path / "whole")
    assert rows(tmp_path / "out")["base"][1] == f"7: {expected[250, 'val']:.4f}"
    assert train_losses(tmp_path / "out" / "base_seed7") == train_losses(tmp_path / "whole")


@pytest.fixture
def two_runs(forked_runs, data, tmp_path):
    """(flags of ablate.py, its finished folder with a base and one change)."""
    (tmp_path / "changes.txt").write_text("--no-bias")
    out = tmp_path / "out"
    words = ["--changes", str(tmp_path / "changes.txt"), "--out", str(out), "--seeds", "1",
             "--checkpoints", "--", *TINY_FLAGS, "--data", str(data)]
    ablate.main(words)
    return words, out


def started(monkeypatch):
    """The names of the runs that ablate.py starts from now on."""
    names = []
    launch = ablate.launch

    def noted(one, gpu, children):
        names.append(one.name)
        return launch(one, gpu, children)

    monkeypatch.setattr(ablate, "launch", noted)
    return names


def unfinish(out, name):
    """The record of a run as it is while the run is in training."""
    path = out / f"{name}.json"
    record = json.loads(path.read_text())
    one = ablate.Run(record["change"], record["seed"], record["flags"], record["folder"])
    path.write_text(json.dumps(vars(one)))


def test_the_records_alone_continue_on_another_machine(two_runs, monkeypatch):
    words, out = two_runs
    before = (out / "ablation.md").read_text()
    for folder in out.glob("*/"):
        shutil.rmtree(folder)
    names = started(monkeypatch)
    ablate.main(words)
    assert names == []
    assert (out / "ablation.md").read_text() == before
    (out / "no-bias_seed1.json").unlink()
    ablate.main(words)
    assert names == ["no-bias_seed1"]


@pytest.mark.parametrize("killed, again", [
    ("before ablate.py read its result", []),
    ("before its result", ["base_seed1"]),
    ("before its last checkpoint", ["base_seed1"]),
])
def test_a_run_killed_near_its_end_is_completed(killed, again, two_runs, monkeypatch):
    words, out = two_runs
    folder = out / "base_seed1"
    before = rows(out)["base"][1]
    unfinish(out, "base_seed1")
    if killed != "before ablate.py read its result":
        config = json.loads((folder / "config.json").read_text())
        del config["result"]
        (folder / "config.json").write_text(json.dumps(config))
    if killed == "before its last checkpoint":
        for path in folder.glob("*.pt"):
            path.unlink()
    names = started(monkeypatch)
    ablate.main(words)
    assert names == again
    assert rows(out)["base"][1] == before


@linux
def test_a_killed_command_keeps_its_table_and_continues(data, tmp_path, request, monkeypatch):
    (tmp_path / "changes.txt").write_text("--no-bias")
    out = tmp_path / "out"
    words = ["--changes", str(tmp_path / "changes.txt"), "--out", str(out), "--seeds", "7", "--",
             *TINY_FLAGS, *LONG, "--eval_every", "1000000", "--data", str(data)]
    with subprocess.Popen([sys.executable, str(ROOT / "ablate.py"), *words],
                          env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        wait_for(lambda: logged(out / "no-bias_seed7") > 10, process)
        process.kill()
    kill_training(out / "no-bias_seed7")
    assert [*rows(out)] == ["change", "base"]
    request.getfixturevalue("forked_runs")
    names = started(monkeypatch)
    ablate.main(words)
    assert names == ["no-bias_seed7"]
    assert [*rows(out)] == ["change", "base", "no-bias"]


def test_a_run_in_training_is_not_removed(two_runs):
    _, out = two_runs
    folder = out / "no-bias_seed1"
    config = json.loads((folder / "config.json").read_text())
    del config["result"]
    (folder / "config.json").write_text(json.dumps(config))
    before = contents(folder)
    one = ablate.Run("no-bias", 1, [], str(folder))
    with locked(folder, "wait"), pytest.raises(BadInput, match="end that run first"):
        ablate.remove_unusable(one)
    assert contents(folder) == before
    ablate.remove_unusable(one)
    assert not folder.exists()


def test_a_table_that_cannot_be_written_fails_no_run(two_runs, monkeypatch, capsys):
    words, out = two_runs
    (out / "no-bias_seed1.json").unlink()
    shutil.rmtree(out / "no-bias_seed1")
    save = ablate.save_table
    calls = []

    def once_without_room(*args):
        calls.append(args)
        if len(calls) == 1:
            raise BadInput("no room")
        return save(*args)

    monkeypatch.setattr(ablate, "save_table", once_without_room)
    ablate.main(words)
    printed = capsys.readouterr().out
    assert "warning: the table is not written (no room)" in printed
    assert [*rows(out)] == ["change", "base", "no-bias"]


def kill_training(folder):
    """Kill the train_gpt2.py of a run folder, and wait until its lock is free."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_text().split("\0")
            if f"--run_name={folder.name}" in words and f"--log_dir={folder.parent}" in words:
                os.kill(int(path.parent.name), signal.SIGKILL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(BadInput), locked(folder, "wait"):
            return
        time.sleep(0.01)
    raise AssertionError(f"{folder} is still in use")


def test_max_hours_starts_no_run_that_would_end_too_late(two_runs, monkeypatch, capsys):
    words, out = two_runs
    (out / "no-bias_seed1.json").unlink()
    shutil.rmtree(out / "no-bias_seed1")
    record = json.loads((out / "base_seed1.json").read_text())
    (out / "base_seed1.json").write_text(json.dumps(record | {"total_seconds": 7200}))
    names = started(monkeypatch)
    ablate.main(["--max_hours", "1.9", *words])
    assert names == []
    printed = capsys.readouterr().out
    assert "--max_hours 1.9 left no time for 1 of 2 runs: no-bias_seed1." in printed
    assert [*rows(out)] == ["change", "base"]
    ablate.main(["--max_hours", "2.1", *words])
    assert names == ["no-bias_seed1"]


LISTS = {
    "gpt2": "--preset gpt2 --total_batch_size 131072 --epochs 1",
    "modern": "--preset modern --total_batch_size 131072 --epochs 1",
    "speedrun": "--preset speedrun --n_layer 12 --n_head 6 --n_embd 768 --epochs 1",
}


@pytest.mark.parametrize("name", LISTS)
def test_every_line_of_the_lists_in_benchmarks_is_accepted(name, data, tmp_path):
    (tmp_path / "data").mkdir()
    for path in data.glob("*"):
        shutil.copy(path, tmp_path / "data")
    tokens = np.zeros(20_000_000, dtype=np.uint16)  # enough for steps of 524,288
    np.save(tmp_path / "data" / "toy_train_000009.npy", tokens)
    base = [*LISTS[name].split(), "--data", str(tmp_path / "data")]
    changes = ablate.read_changes(str(ROOT / "benchmarks" / "improvements" / f"{name}.txt"))
    for words in changes.values():
        ablate.check_flags(base, words)
        assert not ablate.is_base(base, words)


@pytest.mark.parametrize("name", LISTS)
def test_the_lists_run_at_a_tiny_size(name, forked_runs, data, tmp_path):
    lines = (ROOT / "benchmarks" / "improvements" / f"{name}.txt").read_text().splitlines()
    first = [line for line in lines if line.partition("#")[0].strip()][:2]
    (tmp_path / "changes.txt").write_text("\n".join(first))
    small = ["--n_head", "2", "--n_embd", "32", "--n_layer", "2", "--block_size", "32",
             "--total_batch_size", "256", "--val_tokens", "330", "--max_steps", "4",
             "--device", "cpu", "--data", str(data)]
    ablate.main(["--changes", str(tmp_path / "changes.txt"), "--seeds", "1",
                 "--out", str(tmp_path / "out"), "--", "--preset", name, *small])
    assert len(rows(tmp_path / "out")) == 4


def train_losses(folder):
    return {step: loss for (step, kind), loss in read_log(folder).items() if kind == "train"}


def test_one_run_at_a_time_on_every_visible_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert ablate.slots({"auto"}) == ["0", "1"]
    assert ablate.slots({"cpu"}) == [None]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    assert ablate.slots({"auto", "cuda"}) == ["3", "GPU-5"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert ablate.slots({"auto"}) == [None]
