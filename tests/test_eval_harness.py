"""eval_harness.py, launched for real, and the harness in training: python -m pytest
tests/test_eval_harness.py"""

import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from helpers import TINY_FLAGS, save_random_gpt2, task_items, tiny_checkpoint, write_data, write_lines
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import eval_harness
import train_gpt2
from lib.cli import BadInput
from lib.evals import harness

TASKS = ("arc_easy", "arc_challenge_chat", "piqa", "lambada_openai", "wikitext")

pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for task in TASKS:
        write_lines(folder / f"{task}.jsonl", task_items(task))
    return folder


@pytest.fixture
def checkpoint(tokenizer, tmp_path):
    """Path of an untrained model with opinions and a tokenizer of its own."""
    (tmp_path / "log" / "a").mkdir(parents=True)
    path = tmp_path / "log" / "a" / "ckpt_00020.pt"
    tiny_checkpoint(path, tokenizer, init="xavier", block_size=48, pos="rope", norm="rmsnorm",
                    mlp="swiglu")
    return path


def accuracies(path):
    return json.loads(path.read_text())["results"]


def test_one_and_two_processes_give_the_same_results(launch, checkpoint, tasks, tmp_path):
    flags = [
        "--checkpoint", checkpoint, "--tasks", "arc_easy,wikitext,arc_challenge_chat", "--limit", 5,
        "--data_dir", tasks, "--batch_size", 2, "--device", "cpu"
    ]  # the chat task generates, 2 and 2 and 1 texts
    env = {"HF_HOME": str(tmp_path / "hf")}
    one = launch("eval_harness.py", *flags, env=env)
    assert one.returncode == 0, one.stderr
    assert "|arc_easy" in one.stdout and "bits_per_byte" in one.stdout
    beside = checkpoint.with_name("eval_00020_limit5.json")
    assert f"results: {beside}" in one.stdout
    two = launch("eval_harness.py", *flags, "--output", tmp_path / "two.json", processes=2, env=env)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("|arc_easy") == 1
    have, want = accuracies(tmp_path / "two.json"), accuracies(beside)
    assert have.keys() == want.keys() == {"arc_easy", "wikitext", "arc_challenge_chat"}
    for task, values in want.items():
        assert have[task].keys() == values.keys()
        assert all(have[task][key] == (v if isinstance(v, str) else pytest.approx(v, rel=1e-5))
                   for key, v in values.items())
    assert json.loads(beside.read_text())["n-samples"]["arc_easy"]["effective"] == 5


@pytest.mark.parametrize(
    "flags, says",
    [
        ([], "name either --checkpoint or --model"),
        (["--checkpoint", "log/a/ckpt_00020.pt", "--chart", "a.png"], "--chart is for --compare"),
        (["--compare", "log/a", "--checkpoint", "log/a/ckpt_00020.pt", "--limit", "9"
          ], "leave out --checkpoint and --limit, or evaluate first"),
        (["--checkpoint", "log/a/ckpt_00020.pt", "--batch_size", "0"
          ], "--batch_size must be at least 1"),
        (["--checkpoint", "log/a/ckpt_00020.pt", "--output", "there.json"
          ], "there.json exists: name another --output"),
        (["--checkpoint", "log/a/ckpt_00020.pt", "--output", "log"
          ], "log exists: name another --output"),
        (["--checkpoint", "log/a/ckpt_00020.pt", "--output", "there.json/more.json"
          ], "cannot write to there.json"),
        (["--checkpoint", "log/a/ckpt_00020.pt", "--output", "x" * 300
          ], "too long for a file name"),
        (["--checkpoint", "log/a/ckpt_00020.pt", "--tasks", "piqa", "--data_dir", "nowhere"
          ], "no folder nowhere: it should hold <task>.jsonl"),
        (["--model", "gpt2", "--tasks", "piqa", "--data_dir", "tasks"
          ], "cannot load the Hugging Face model gpt2"),  # offline here
        (["--model", "no_tokenizer", "--tasks", "piqa", "--data_dir", "tasks"
          ], "no_tokenizer: it has no tokenizer. Give a folder"),
        (["--model", "torn", "--tasks", "piqa", "--data_dir", "tasks"
          ], "cannot load the Hugging Face model torn: "),
    ])
def test_bad_flags(flags, says, checkpoint, tasks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.symlink(tasks, "tasks")
    if "torn" in flags or "no_tokenizer" in flags:
        save_random_gpt2(tmp_path / "whole")
        for folder, size in (("no_tokenizer", None), ("torn", 999)):
            Path(folder).mkdir()
            shutil.copy("whole/config.json", folder)
            Path(folder, "model.safetensors").write_bytes(
                Path("whole/model.safetensors").read_bytes()[:size])
    write_lines(tmp_path / "there.json", [{}])
    with pytest.raises(BadInput) as error:
        eval_harness.main(flags)
    assert says in str(error.value) and not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("package, flags", [("lm_eval", ["--checkpoint", "log/a/ckpt_00020.pt"]),
                                            ("tabulate", ["--compare", "log/a"])])
def test_missing_packages(package, flags, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BadInput, match=f"missing {package}: pip install -r requirements-dev.txt"):
        eval_harness.main(flags)


def test_bad_input_of_a_real_process_is_one_line(launch, checkpoint):
    result = launch("eval_harness.py", "--checkpoint", checkpoint, "--device", "cpu", "--limit", 0)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("eval_harness.py: error: ") and result.stderr.count(
        "\n") == 1, result.stderr


def test_results_of_other_tasks_are_written_where_one_fails(checkpoint, tmp_path, capsys):
    write_lines(tmp_path / "wikitext.jsonl",
                [{"page": "one_word_of_very_many_letters" * 90}])  # exp(nats / words) overflows
    write_lines(tmp_path / "piqa.jsonl", task_items("piqa"))
    flags = [
        "--checkpoint",
        str(checkpoint), "--data_dir",
        str(tmp_path), "--device", "cpu", "--dtype", "float32"
    ]
    with pytest.raises(
            BadInput, match=
            r"no results of wikitext \(OverflowError: .*\): fix that, or leave it out of --tasks"):
        eval_harness.main([*flags, "--tasks", "wikitext,piqa"])
    saved = json.loads(checkpoint.with_name("eval_00020.json").read_text())
    assert saved["results"].keys() == {"piqa"} and "|piqa" in capsys.readouterr().out
    assert saved["config"]["checkpoint"] == str(checkpoint)


# ----------------------------------------------------------------------------------------------------------------------
# Comparison


def test_hugging_face_model_and_comparison(checkpoint, tasks, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--tasks", "piqa,lambada_openai", "--data_dir", str(tasks), "--device", "cpu"]
    eval_harness.main(["--model", str(save_random_gpt2(tmp_path / "random-gpt2")), *flags])
    eval_harness.main(
        ["--checkpoint",
         str(checkpoint), *flags, "--limit", "4", "--batch_size", "2"])
    capsys.readouterr()
    eval_harness.main(["--compare", "log/hf_random-gpt2", "log/a/eval_00020_limit4.json"])
    text, markdown, note, chart = capsys.readouterr().out.strip().split("\n\n")
    results = [
        accuracies(Path("log", name))
        for name in ("hf_random-gpt2/eval.json", "a/eval_00020_limit4.json")
    ]
    for table in (text, markdown):
        assert "random-gpt2" in table and "lambada_openai" in table and "perplexity (lower is better)" in table
        for values in results:
            assert f"{values['piqa']['acc,none']:.4f} ± {values['piqa']['acc_stderr,none']:.4f}" in table
    assert markdown.startswith("| task")
    rows, *unequal = note.splitlines()
    assert rows.startswith("rows: tasks in alphabetical order")
    order = [line.split()[1] for line in markdown.splitlines()[2:]]
    assert order == sorted(order) and set(order) == {"lambada_openai", "piqa"}
    assert unequal == [f"{task}: not the same items, 6 (hf_random-gpt2), 4 (a/eval_00020_limit4)"
                       for task in ("lambada_openai", "piqa")]
    assert chart == "chart: compare.png" and Path("compare.png").read_bytes().startswith(b"\x89PNG")


def results_file(path, **values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({
            "results": {"t": values}, "n-samples": {"t": {"original": 9, "effective": 9}},
            "higher_is_better": {"t": {"acc": True}}
        }))
    return path


def test_a_run_is_its_newest_results(tmp_path):
    for step, acc in ((900, 0.1), (1000, 0.3), (95000, 0.2), (100000, 0.25)):
        results_file(tmp_path / "a" / f"eval_{step:05d}.json",
                     **{"acc,none": acc, "acc_stderr,none": "N/A"})
    name, data = eval_harness.newest_results(tmp_path / "a")
    assert (name, data["results"]["t"]["acc,none"]) == ("a 100000", 0.25)
    more = {"results": {"u": {"acc,none": 0.5}}, "n-samples": {}, "higher_is_better": {}}
    for name in (
            "eval_100000_more.json",
            "eval_00900_of_a_long_name.json"):  # other tasks, of the same checkpoint and another
        (tmp_path / "a" / name).write_text(json.dumps(more))
    assert eval_harness.newest_results(tmp_path / "a")[1]["results"].keys() == {"t", "u"}
    name, data = eval_harness.newest_results(tmp_path / "a" / "eval_01000.json")
    assert (name, data["results"]["t"]["acc,none"]) == ("a/eval_01000", 0.3)
    other = results_file(tmp_path / "b" / "eval.json",
                         **{"exact_match,strict": 0.5, "exact_match_stderr,strict": 0.125})
    headers, rows, notes = eval_harness.tabulate_runs([(name, data),
                                                       eval_harness.newest_results(other.parent)])
    assert headers == ["task", "metric", "a/eval_01000", "b"] and notes == []
    assert rows == [["t", "acc", "0.3000", ""],
                    ["t", "exact_match (strict)", "", "0.5000 ± 0.1250"]]


def test_a_limited_trial_stands_for_nothing_and_blocks_nothing(checkpoint, tasks, tmp_path):
    """The checkpoint is named by its run folder."""
    flags = [
        "--checkpoint",
        str(checkpoint.parent), "--tasks", "piqa", "--data_dir",
        str(tasks), "--device", "cpu"
    ]
    eval_harness.main([*flags, "--limit", "2"])
    with pytest.raises(BadInput, match="those with --context or --limit do not count"):
        eval_harness.newest_results(checkpoint.parent)
    eval_harness.main(flags)
    assert {path.name for path in checkpoint.parent.glob("eval*")
            } == {"eval_00020_limit2.json", "eval_00020.json"}
    assert eval_harness.newest_results(checkpoint.parent)[1]["n-samples"]["piqa"]["effective"] == 6
    saved = json.loads(checkpoint.with_name("eval_00020.json").read_text())
    assert saved["config"]["checkpoint"] == str(checkpoint)


def test_results_with_a_context_are_apart(checkpoint, tasks, tmp_path):
    """The texts are longer than 48 tokens, so that what is seen of them counts."""
    flags = [
        "--checkpoint",
        str(checkpoint), "--tasks", "wikitext", "--data_dir",
        str(tasks), "--device", "cpu"
    ]
    for more in ([], ["--context", "96", "--rope_scaling", "yarn"]):
        eval_harness.main([*flags, *more])
    results = {
        path.name: accuracies(path)["wikitext"]["bits_per_byte,none"]
        for path in checkpoint.parent.glob("eval*.json")
    }
    trained, longer = "eval_00020.json", "eval_00020_context96_yarn.json"
    assert results.keys() == {trained, longer} and results[trained] != results[longer]
    for path, name in ((checkpoint.parent, trained), (checkpoint.with_name(longer), longer)):
        assert eval_harness.newest_results(
            path)[1]["results"]["wikitext"]["bits_per_byte,none"] == results[name]
    checkpoint.with_name("eval_00020.json").unlink()
    with pytest.raises(BadInput, match="those with --context or --limit do not count"):
        eval_harness.newest_results(checkpoint.parent)
    results_file(checkpoint.with_name("eval_00010.json"), **{"acc,none": 0.5})
    assert eval_harness.newest_results(checkpoint.parent)[0] == "a 10"


@pytest.mark.parametrize("text", [
    "{", "[]", "{}", '{"results": {}}', '{"results": 3, "n-samples": {}, "higher_is_better": {}}',
    "[" * 10**5, "\xff", '{"results": {"t": 3}, "n-samples": {}, "higher_is_better": {}}', None,
    "folder", "pipe", "link"
])
def test_what_does_not_hold_results_is_bad_input(text, tmp_path):
    path = tmp_path / "eval_1.json"
    odd = {"folder": os.mkdir, "pipe": os.mkfifo, "link": lambda path: os.symlink("nowhere", path)}
    if text is not None:
        odd.get(text, lambda path: path.write_text(text, encoding="latin-1"))(path)
    for name in (tmp_path, path):
        with pytest.raises(BadInput,
                           match="eval_1.json.*: name a run folder|holds no eval_<step>.json"):
            eval_harness.newest_results(name)


def test_odd_values_among_results_do_no_harm(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, value in (("a", "NaN"), ("b", "-1e30"), ("c", '"0.5"'), ("d", "[1]")):
        values = {"acc,none": 0.25, "acc_stderr,none": "ODD", "exact_match,none": "ODD"}
        path = results_file(tmp_path / name / "eval.json", **values)
        path.write_text(path.read_text().replace('"ODD"', value))
    eval_harness.main(["--compare", "a", "b", "c", "d", "--chart", "a.svg"])
    assert "0.2500" in capsys.readouterr().out and "<svg" in Path("a.svg").read_text()


def test_the_chart_draws_accuracies_and_their_errors(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: drawn.append(figure))
    runs = [("a", {
        "results": {
            "piqa": {
                "acc,none": 0.6, "acc_stderr,none": 0.1, "acc_norm,none": 0.5,
                "acc_norm_stderr,none": 0.2
            }, "wikitext": {"bits_per_byte,none": 1.5, "bits_per_byte_stderr,none": "N/A"}
        }
    }), ("b", {"results": {"boolq": {"acc,none": 0.7, "acc_stderr,none": "N/A"}}})]
    eval_harness.bar_chart(runs, tmp_path / "chart.png")
    (axes,) = drawn[0].axes
    assert [label.get_text()
            for label in axes.get_xticklabels()] == ["boolq\nacc", "piqa\nacc_norm"]
    heights = [[bar.get_height()
                for bar in bars]
               for bars in axes.containers
               if hasattr(bars, "patches")]
    assert heights == [[pytest.approx(math.nan, nan_ok=True), 0.5],
                       [0.7, pytest.approx(math.nan, nan_ok=True)]]
    assert "alphabetical" in axes.get_xlabel()


@pytest.mark.parametrize("chart", ["nowhere/a.png", "a.xyz", "a", "/dev/null"])
def test_a_chart_that_cannot_be_written(chart, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    results_file(tmp_path / "a" / "eval.json", **{"acc,none": 0.5, "acc_stderr,none": 0.1})
    with pytest.raises(BadInput, match=f"{chart} .*--chart"):
        eval_harness.main(["--compare", "a", "--chart", chart])


# ----------------------------------------------------------------------------------------------------------------------
# In training


@pytest.mark.parametrize("processes", [1, 2])
def test_training_logs_what_the_script_finds_in_its_checkpoint(processes, launch, tokenizer, tasks,
                                                               tmp_path):
    shards = write_data(tmp_path / "shards", tokenizer)
    # lambada has a metric whose standard error the harness bootstraps in processes of its own, if
    # it is asked to
    flags = [
        "--eval_tasks", "piqa,arc_easy,wikitext,lambada_openai", "--eval_tasks_dir", tasks,
        "--eval_tasks_limit", 4
    ]
    run = launch("train_gpt2.py", *TINY_FLAGS, "--data", shards, "--max_steps", 3,
                 "--eval_tasks_every", 2, *flags, "--run_name", "r", "--device", "cpu",
                 processes=processes)
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in (tmp_path / "log" / "r" / "log.txt").read_text().splitlines()]
    logged = {kind: [(int(step), float(value)) for step, k, value in lines if k == f"eval/{kind}"]
              for kind in ("piqa", "arc_easy", "wikitext", "lambada_openai")}
    assert [[step for step, _ in values] for values in logged.values()] == [[2, 3]] * 4
    scored = launch("eval_harness.py", "--checkpoint", "log/r/ckpt_00003.pt", "--tasks",
                    "piqa,arc_easy,wikitext", "--data_dir", tasks, "--limit", 4, "--device", "cpu")
    assert scored.returncode == 0, scored.stderr
    results = json.loads((tmp_path / "log" / "r" / "eval_00003_limit4.json").read_text())["results"]
    for task, metric in (("piqa", "acc_norm,none"), ("arc_easy", "acc_norm,none"),
                         ("wikitext", "bits_per_byte,none")):
        assert logged[task][-1][1] == pytest.approx(results[task][metric], rel=1e-4)
        assert f"eval/{task} {results[task][metric]:.4f}" in run.stdout
    events = EventAccumulator(str(tmp_path / "log" / "r"))
    events.Reload()
    assert [event.step for event in events.Scalars("eval/piqa")] == [2, 3]


def test_both_hellaswags_have_names_of_their_own(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [{
        "activity_label": "Sitting", "ctx": item["ctx_a"][:60], "endings": item["endings"],
        "label": int(item["label"])
    } for item in task_items("hellaswag", 9)]
    write_lines(tmp_path / "hellaswag.jsonl", lines)
    shards = str(write_data(tmp_path / "shards", tokenizer))
    train_gpt2.main([
        *TINY_FLAGS, "--data", shards, "--max_steps", "2", "--warmup_steps", "1", "--run_name", "r",
        "--hellaswag_every", "1", "--hellaswag_file", "hellaswag.jsonl", "--eval_tasks",
        "hellaswag", "--eval_tasks_dir", ".", "--eval_tasks_every", "1"
    ])
    events = EventAccumulator("log/r").Reload()
    lines = [line.split() for line in Path("log/r/log.txt").read_text().splitlines()]
    for tag, kind in (("eval/hellaswag", "hella"), ("eval/hellaswag_lm_eval",
                                                    "eval/hellaswag_lm_eval")):
        assert [(event.step, pytest.approx(event.value, abs=1e-6)) for event in events.Scalars(tag)
                ] == [(int(step), float(value)) for step, k, value in lines if k == kind]
        assert [event.step for event in events.Scalars(tag)] == [1, 2]


def test_training_survives_tasks_that_fail_and_stops_within_one(tokenizer, tasks, tmp_path,
                                                                monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks").mkdir()
    write_lines(tmp_path / "tasks" / "wikitext.jsonl",
                [{"page": "one_word_of_very_many_letters" * 90}])
    shutil.copy(tasks / "piqa.jsonl", tmp_path / "tasks")
    flags = [
        *TINY_FLAGS, "--data",
        write_data(tmp_path / "shards", tokenizer), "--max_steps", 6, "--run_name", "r", "--device",
        "cpu", "--eval_tasks", "wikitext,piqa", "--eval_tasks_dir", tmp_path / "tasks",
        "--eval_tasks_every", 2
    ]
    score, calls = harness.score, []

    def stop_at_the_second(*args, stopped, **kwargs):
        calls.append(stopped())
        if len(calls) == 4:  # piqa at step 4
            os.kill(os.getpid(), signal.SIGTERM)
            while not stopped():
                time.sleep(0.01)
        return score(*args, stopped=stopped, **kwargs)

    monkeypatch.setattr(harness, "score", stop_at_the_second)
    train_gpt2.main([str(flag) for flag in flags])
    out = capsys.readouterr().out
    assert "wikitext has no result: OverflowError" in out and "step 2 | eval/piqa " in out
    assert "step 4 | eval/piqa" not in out and "stopped at step 4 of 6" in out and calls == [False
                                                                                             ] * 4
    train_gpt2.main([str(flag) for flag in flags])
    assert "step 4 | eval/piqa " in capsys.readouterr().out
    lines = [
        line.split()[:2] for line in (tmp_path / "log" / "r" / "log.txt").read_text().splitlines()
    ]
    assert [step for step, kind in lines if kind == "eval/piqa"] == ["2", "4", "6"]
