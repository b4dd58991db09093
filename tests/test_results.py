"""results.py and the result that a run leaves: python -m pytest tests/test_results.py"""

import json
import statistics

import pytest
from helpers import read_log
from runs import contents, events, stop_when, train

import results
from lib.cli import BadInput
from lib.noise import noise_of


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """A folder with two seeds of one setting, another setting, and a run in a subfolder."""
    log = tmp_path_factory.mktemp("log")
    short = ["--max_steps", 8, "--price_per_hour", 2]
    train(data, log / "a", *short)
    train(data, log / "a2", *short, "--seed", 2)
    train(data, log / "wide", *short, "--n_embd", 64, "--norm", "rmsnorm")
    train(data, log / "ablation" / "base_seed1", "--max_steps", 4)
    return log


def read(log, capsys, *flags):
    """{name: its JSON object}, in the order printed."""
    capsys.readouterr()
    results.main(["--log_dir", str(log), "--json", *flags])
    return {run["name"]: run for run in json.loads(capsys.readouterr().out)}


def result_of(folder):
    return json.loads((folder / "config.json").read_text())["result"]


def test_the_last_line_of_a_run_is_its_result(data, tmp_path, capsys):
    train(data, tmp_path / "a", "--max_steps", 4)
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed.pop("run") == str(tmp_path / "a")
    assert printed == result_of(tmp_path / "a")
    assert (printed["outcome"], printed["step"], printed["tokens"]) == ("finished", 4, 4 * 256)


def test_a_stopped_run_has_a_result_until_it_continues(data, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "a"
    with monkeypatch.context() as patch:
        stop_when(patch, lambda: (folder / "ckpt_00008.pt").exists())
        train(data, folder, "--max_steps", 40)
    stopped = result_of(folder)
    assert (stopped["outcome"], stopped["steps"]) == ("stopped", 40)
    assert stopped["step"] < 40
    train(data, folder, "--max_steps", 40)
    finished = result_of(folder)
    assert (finished["outcome"], finished["step"]) == ("finished", 40)
    assert finished["seconds"] >= stopped["seconds"]  # both starts


def test_a_result_is_that_of_the_logs(runs, capsys):
    found = read(runs, capsys)
    assert set(found) == {"a", "a2", "wide", "ablation/base_seed1"}
    for name, run in found.items():
        log = read_log(runs / name)
        last = max(step for step, kind in log if kind == "val")
        assert run["val_loss"] == pytest.approx(log[last, "val"], abs=1e-6)
        bits = dict(events(runs / name)["Loss/val_bpb"])
        assert run["bits_per_byte"] == pytest.approx(bits[last], abs=1e-6)
        assert run["tokens"] == last * 256
        milliseconds = [ms for _, ms in events(runs / name)["perf/step_ms"]]
        second_half = milliseconds[len(milliseconds) // 2:]
        assert run["step_ms"] == pytest.approx(statistics.median(second_half), rel=1e-3)
        assert run["memory_gb"] is None  # of a GPU only
    priced = found["wide"]
    assert priced["dollars"] == pytest.approx(priced["seconds"] / 3600 * 2, abs=1e-4)
    assert found["ablation/base_seed1"]["dollars"] is None
    assert found["wide"]["changes"]["norm"] == "rmsnorm"
    assert "norm" not in found["a"]["changes"]
    assert found["a2"]["changes"]["seed"] == 2


def test_runs_are_different_beyond_the_noise_of_their_seeds(runs, capsys):
    found = read(runs, capsys)
    losses = [run["val_loss"] for run in found.values()]
    assert losses == sorted(losses)
    pair = [found["a"]["val_loss"], found["a2"]["val_loss"]]
    noise = 12.706 * 2**0.5 * statistics.stdev(pair)
    for run in found.values():
        assert run["noise"] == pytest.approx(noise)
        assert run["gap"] == pytest.approx(run["val_loss"] - losses[0], abs=1e-6)
        assert run["differs"] == (run["gap"] > noise)


def test_noise_is_pooled_over_groups():
    assert noise_of([[1.0], [2.0]]) is None
    pooled = ((0.1**2 + 0.1**2) + (0.3**2 + 0.3**2)) / 2
    assert noise_of([[1.0, 1.2], [5.0, 5.6], [9.0]]) == pytest.approx(4.303 * (2 * pooled) ** 0.5)


def test_a_run_without_a_result_is_read_from_its_log(runs, data, tmp_path, capsys):
    folder = train(data, tmp_path / "a", "--max_steps", 4)
    config = json.loads((folder / "config.json").read_text())
    result = config.pop("result")
    (folder / "config.json").write_text(json.dumps(config))
    before = contents(folder)
    [run] = read(tmp_path, capsys).values()
    assert run["outcome"] is run["seconds"] is None
    for name in ("val_loss", "tokens"):
        assert run[name] == pytest.approx(result[name], abs=1e-6)
    assert run["parameters"] == result["parameters"]
    assert contents(folder) == before


def test_the_table_is_sorted_and_says_what_the_noise_is(runs, capsys):
    results.main(["--log_dir", str(runs), "--sort", "parameters"])
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["name", "parameters"]
    assert lines[3].startswith("wide")
    assert "gpt2: gaps up to" in lines[-1]


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(BadInput, match="--log_dir"):
        results.main(["--log_dir", str(tmp_path)])


@pytest.mark.parametrize("name, value", [
    ("train", {}), ("train", []), ("model", None), ("starts", ["x"]), ("result", "x"),
    ("parameters", None),
])
def test_a_damaged_config_is_left_out(name, value, runs, tmp_path, capsys):
    for run in ("good", "bad"):
        (tmp_path / run).mkdir()
        config = json.loads((runs / "a" / "config.json").read_text())
        if run == "bad":
            config[name] = value
        (tmp_path / run / "config.json").write_text(json.dumps(config))
    results.main(["--log_dir", str(tmp_path)])
    printed = capsys.readouterr()
    assert f"{tmp_path / 'bad' / 'config.json'} is damaged" in printed.err
    assert "good" in printed.out and "bad " not in printed.out


def test_a_loss_that_is_nan_is_unknown(runs, tmp_path, capsys):
    for run in ("a", "wide"):
        (tmp_path / run).mkdir()
        config = json.loads((runs / run / "config.json").read_text())
        if run == "a":
            del config["result"]
        (tmp_path / run / "config.json").write_text(json.dumps(config))
    (tmp_path / "a" / "log.txt").write_text("7 train nan\n8 val nan\n8 hella 0.25\n")
    found = read(tmp_path, capsys)
    assert found["a"]["val_loss"] is None and found["wide"]["gap"] == 0
    assert found["a"]["evals"] == {"hellaswag": 0.25} and found["a"]["tokens"] == 8 * 256
