"""eval_harness.py on tiny checkpoints, and the harness during training:
python -m pytest tests/test_eval_harness.py"""

import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from helpers import (
    TINY_FLAGS,
    save_random_gpt2,
    task_items,
    tiny_checkpoint,
    write_data,
    write_lines,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import eval_harness
import train_gpt2
from lib.cli import BadInput
from lib.evals import harness

# an item of wikitext whose perplexity, exp(nats / words), overflows
OVERFLOWS = {"page": "one_word_of_very_many_letters" * 90}
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
    """The path of an untrained model with confident predictions."""
    path = tmp_path / "log" / "a" / "ckpt_00020.pt"
    path.parent.mkdir(parents=True)
    tiny_checkpoint(path, tokenizer, init="xavier", block_size=48, pos="rope", norm="rmsnorm",
                    mlp="swiglu")
    return path


def read_results(path):
    return json.loads(path.read_text())["results"]


def test_one_and_two_processes_have_the_same_results(launch, checkpoint, tasks, tmp_path):
    # the chat task generates, in batches of 2, 2 and 1 texts
    names = {"arc_easy", "wikitext", "arc_challenge_chat"}
    flags = ["--checkpoint", checkpoint, "--tasks", ",".join(names), "--limit", 5,
             "--data_dir", tasks, "--batch_size", 2, "--device", "cpu"]
    env = {"HF_HOME": str(tmp_path / "hf")}
    one = launch("eval_harness.py", *flags, env=env)
    assert one.returncode == 0, one.stderr
    assert "|arc_easy" in one.stdout
    assert "bits_per_byte" in one.stdout
    beside = checkpoint.with_name("eval_00020_limit5.json")
    assert f"results: {beside}" in one.stdout
    two = launch("eval_harness.py", *flags, "--output", tmp_path / "two.json", processes=2, env=env)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("|arc_easy") == 1
    by_two = read_results(tmp_path / "two.json")
    by_one = read_results(beside)
    assert by_two.keys() == by_one.keys() == names
    for task, values in by_one.items():
        assert by_two[task].keys() == values.keys()
        for key, value in values.items():
            if not isinstance(value, str):
                value = pytest.approx(value, rel=1e-5)
            assert by_two[task][key] == value
    assert json.loads(beside.read_text())["n-samples"]["arc_easy"]["effective"] == 5


CHECKPOINT = ["--checkpoint", "log/a/ckpt_00020.pt"]
PIQA = ["--tasks", "piqa", "--data_dir", "tasks"]


@pytest.mark.parametrize("flags, says", [
    ([], "name either --checkpoint or --model"),
    ([*CHECKPOINT, "--chart", "a.png"], "--chart is for --compare"),
    (["--compare", "log/a", *CHECKPOINT, "--limit", "9"],
     "leave out --checkpoint and --limit, or evaluate first"),
    ([*CHECKPOINT, "--batch_size", "0"], "--batch_size must be at least 1"),
    ([*CHECKPOINT, "--output", "there.json"], "there.json exists: name another --output"),
    ([*CHECKPOINT, "--output", "log"], "log exists: name another --output"),
    ([*CHECKPOINT, "--output", "there.json/more.json"], "cannot write to there.json"),
    ([*CHECKPOINT, "--output", "x" * 300], "too long for a file name"),
    ([*CHECKPOINT, "--tasks", "piqa", "--data_dir", "nowhere"],
     "no folder nowhere: it should contain <task>.jsonl"),
    (["--model", "gpt2", *PIQA], "cannot load the Hugging Face model gpt2"),  # offline here
    (["--model", "no_tokenizer", *PIQA], "no_tokenizer: it has no tokenizer. Give a folder"),
    (["--model", "torn", *PIQA], "cannot load the Hugging Face model torn: "),
])
def test_bad_flags(flags, says, checkpoint, tasks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.symlink(tasks, "tasks")
    if "torn" in flags or "no_tokenizer" in flags:
        whole = save_random_gpt2(tmp_path / "whole")
        weights = (whole / "model.safetensors").read_bytes()
        for folder, size in (("no_tokenizer", None), ("torn", 999)):
            Path(folder).mkdir()
            shutil.copy(whole / "config.json", folder)
            Path(folder, "model.safetensors").write_bytes(weights[:size])
    write_lines(tmp_path / "there.json", [{}])
    with pytest.raises(BadInput) as error:
        eval_harness.main(flags)
    assert says in str(error.value)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("package, flags", [
    ("lm_eval", CHECKPOINT),
    ("tabulate", ["--compare", "log/a"]),
])
def test_missing_packages(package, flags, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BadInput, match=f"missing {package}: pip install -r requirements-dev.txt"):
        eval_harness.main(flags)


def test_bad_input_of_a_real_process_is_one_line(launch, checkpoint):
    result = launch("eval_harness.py", "--checkpoint", checkpoint, "--device", "cpu", "--limit", 0)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("eval_harness.py: error: ")
    assert result.stderr.count("\n") == 1, result.stderr


def test_if_a_task_fails_the_results_of_others_are_written(checkpoint, tmp_path, capsys):
    write_lines(tmp_path / "wikitext.jsonl", [OVERFLOWS])
    write_lines(tmp_path / "piqa.jsonl", task_items("piqa"))
    says = r"no results of wikitext \(OverflowError: .*\): fix that, or leave it out of --tasks"
    with pytest.raises(BadInput, match=says):
        eval_harness.main(["--checkpoint", str(checkpoint), "--data_dir", str(tmp_path),
                           "--device", "cpu", "--dtype", "float32", "--tasks", "wikitext,piqa"])
    assert "|piqa" in capsys.readouterr().out
    saved = json.loads(checkpoint.with_name("eval_00020.json").read_text())
    assert saved["results"].keys() == {"piqa"}
    assert saved["config"]["checkpoint"] == str(checkpoint)


# --------------------------------------------------------------------------------------------------
# Comparison


def test_hugging_face_model_and_comparison(checkpoint, tasks, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--tasks", "piqa,lambada_openai", "--data_dir", str(tasks), "--device", "cpu"]
    model = save_random_gpt2(tmp_path / "random-gpt2")
    eval_harness.main(["--model", str(model), *flags])
    eval_harness.main(["--checkpoint", str(checkpoint), *flags, "--limit", "4",
                       "--batch_size", "2"])
    capsys.readouterr()
    limited = "log/a/eval_00020_limit4.json"
    eval_harness.main(["--compare", "log/hf_random-gpt2", limited])
    text, markdown, notes, chart = capsys.readouterr().out.strip().split("\n\n")
    for table in (text, markdown):
        assert "random-gpt2" in table
        assert "lambada_openai" in table
        assert "perplexity (lower is better)" in table
        for path in ("log/hf_random-gpt2/eval.json", limited):
            piqa = read_results(Path(path))["piqa"]
            assert f"{piqa['acc,none']:.4f} ± {piqa['acc_stderr,none']:.4f}" in table
    assert markdown.startswith("| task")
    order = [line.split()[1] for line in markdown.splitlines()[2:]]
    assert order == sorted(order)
    assert set(order) == {"lambada_openai", "piqa"}
    rows, *unequal = notes.splitlines()
    assert rows.startswith("rows: tasks in alphabetical order")
    counts = "not the same items, 6 (hf_random-gpt2), 4 (a/eval_00020_limit4)"
    assert unequal == [f"lambada_openai: {counts}", f"piqa: {counts}"]
    assert chart == "chart: compare.png"
    assert Path("compare.png").read_bytes().startswith(b"\x89PNG")


def results_file(path, **values):
    path.parent.mkdir(parents=True, exist_ok=True)
    results = {
        "results": {"t": values},
        "n-samples": {"t": {"original": 9, "effective": 9}},
        "higher_is_better": {"t": {"acc": True}},
    }
    path.write_text(json.dumps(results))
    return path


def newest_tasks(path):
    """The results by task."""
    return eval_harness.newest_results(path)[1]["results"]


def test_a_run_is_its_newest_results(tmp_path):
    folder = tmp_path / "a"
    for step, acc in ((900, 0.1), (1000, 0.3), (95000, 0.2), (100000, 0.25)):
        values = {"acc,none": acc, "acc_stderr,none": "N/A"}
        results_file(folder / f"eval_{step:05d}.json", **values)
    name, data = eval_harness.newest_results(folder)
    assert (name, data["results"]["t"]["acc,none"]) == ("a 100000", 0.25)
    # other tasks, of the same checkpoint and of another
    more = {"results": {"u": {"acc,none": 0.5}}, "n-samples": {}, "higher_is_better": {}}
    for name in ("eval_100000_more.json", "eval_00900_of_a_long_name.json"):
        (folder / name).write_text(json.dumps(more))
    assert newest_tasks(folder).keys() == {"t", "u"}
    older = eval_harness.newest_results(folder / "eval_01000.json")
    name, data = older
    assert (name, data["results"]["t"]["acc,none"]) == ("a/eval_01000", 0.3)
    values = {"exact_match,strict": 0.5, "exact_match_stderr,strict": 0.125}
    results_file(tmp_path / "b" / "eval.json", **values)
    other = eval_harness.newest_results(tmp_path / "b")
    headers, rows, notes = eval_harness.tabulate_runs([older, other])
    assert headers == ["task", "metric", "a/eval_01000", "b"]
    assert notes == []
    assert rows == [
        ["t", "acc", "0.3000", ""],
        ["t", "exact_match (strict)", "", "0.5000 ± 0.1250"],
    ]


def test_limited_results_do_not_count_and_block_nothing(checkpoint, tasks, tmp_path):
    """The checkpoint is named by its run folder."""
    flags = ["--checkpoint", str(checkpoint.parent), "--tasks", "piqa", "--data_dir", str(tasks),
             "--device", "cpu"]
    eval_harness.main([*flags, "--limit", "2"])
    with pytest.raises(BadInput, match="those with --context or --limit do not count"):
        eval_harness.newest_results(checkpoint.parent)
    eval_harness.main(flags)
    names = {path.name for path in checkpoint.parent.glob("eval*")}
    assert names == {"eval_00020_limit2.json", "eval_00020.json"}
    assert eval_harness.newest_results(checkpoint.parent)[1]["n-samples"]["piqa"]["effective"] == 6
    saved = json.loads(checkpoint.with_name("eval_00020.json").read_text())
    assert saved["config"]["checkpoint"] == str(checkpoint)


def test_results_with_a_context_are_separate(checkpoint, tasks, tmp_path):
    """The texts are longer than 48 tokens, so the context matters."""
    flags = ["--checkpoint", str(checkpoint), "--tasks", "wikitext", "--data_dir", str(tasks),
             "--device", "cpu"]
    eval_harness.main(flags)
    eval_harness.main([*flags, "--context", "96", "--rope_scaling", "yarn"])
    trained = checkpoint.with_name("eval_00020.json")
    longer = checkpoint.with_name("eval_00020_context96_yarn.json")
    assert set(checkpoint.parent.glob("eval*.json")) == {trained, longer}
    assert read_results(trained)["wikitext"] != read_results(longer)["wikitext"]
    assert newest_tasks(checkpoint.parent) == read_results(trained)
    assert newest_tasks(longer) == read_results(longer)
    checkpoint.with_name("eval_00020.json").unlink()
    with pytest.raises(BadInput, match="those with --context or --limit do not count"):
        eval_harness.newest_results(checkpoint.parent)
    results_file(checkpoint.with_name("eval_00010.json"), **{"acc,none": 0.5})
    assert eval_harness.newest_results(checkpoint.parent)[0] == "a 10"


def make_special(kind, path):
    """A missing file, a folder, a pipe or a broken link."""
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to("nowhere")


@pytest.mark.parametrize("content", [
    "{", "[]", "{}", "[" * 10**5, "\xff", '{"results": {}}',
    '{"results": 3, "n-samples": {}, "higher_is_better": {}}',
    '{"results": {"t": 3}, "n-samples": {}, "higher_is_better": {}}',
    "missing", "folder", "pipe", "link",
])
def test_a_file_without_results_is_bad_input(content, tmp_path):
    path = tmp_path / "eval_1.json"
    if content in ("missing", "folder", "pipe", "link"):
        make_special(content, path)
    else:
        path.write_text(content, encoding="latin-1")
    for name in (tmp_path, path):
        with pytest.raises(BadInput,
                           match="eval_1.json.*: name a run folder|has no eval_<step>.json"):
            eval_harness.newest_results(name)


def test_values_that_are_not_finite_numbers_are_left_out(tmp_path, monkeypatch, capsys):
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
    piqa = {"acc,none": 0.6, "acc_stderr,none": 0.1, "acc_norm,none": 0.5,
            "acc_norm_stderr,none": 0.2}
    wikitext = {"bits_per_byte,none": 1.5, "bits_per_byte_stderr,none": "N/A"}
    boolq = {"acc,none": 0.7, "acc_stderr,none": "N/A"}
    runs = [("a", {"results": {"piqa": piqa, "wikitext": wikitext}}),
            ("b", {"results": {"boolq": boolq}})]
    eval_harness.bar_chart(runs, tmp_path / "chart.png")
    (axes,) = drawn[0].axes
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["boolq\nacc", "piqa\nacc_norm"]
    heights = []
    for bars in axes.containers:
        if hasattr(bars, "patches"):  # not the error bars
            heights.append([bar.get_height() for bar in bars])
    nan = pytest.approx(math.nan, nan_ok=True)
    assert heights == [[nan, 0.5], [0.7, nan]]
    assert "alphabetical" in axes.get_xlabel()


@pytest.mark.parametrize("chart", ["nowhere/a.png", "a.xyz", "a", "/dev/null"])
def test_a_chart_that_cannot_be_written(chart, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    results_file(tmp_path / "a" / "eval.json", **{"acc,none": 0.5, "acc_stderr,none": 0.1})
    with pytest.raises(BadInput, match=f"{chart} .*--chart"):
        eval_harness.main(["--compare", "a", "--chart", chart])


# --------------------------------------------------------------------------------------------------
# In training


@pytest.mark.parametrize("processes", [1, 2])
def test_training_logs_what_the_script_finds_in_its_checkpoint(
        processes, launch, tokenizer, tasks, tmp_path):
    shards = write_data(tmp_path / "shards", tokenizer)
    # lambada has a metric whose standard error the harness bootstraps in processes of its own
    names = ["piqa", "arc_easy", "wikitext", "lambada_openai"]
    flags = ["--eval_tasks", ",".join(names), "--eval_tasks_dir", tasks, "--eval_tasks_limit", 4]
    run = launch("train_gpt2.py", *TINY_FLAGS, "--data", shards, "--max_steps", 3,
                 "--eval_tasks_every", 2, *flags, "--run_name", "r", "--device", "cpu",
                 processes=processes)
    assert run.returncode == 0, run.stderr
    logged = {name: [] for name in names}
    for line in (tmp_path / "log" / "r" / "log.txt").read_text().splitlines():
        step, kind, value = line.split()
        if kind.startswith("eval/"):
            logged[kind.removeprefix("eval/")].append((int(step), float(value)))
    for values in logged.values():
        assert [step for step, _ in values] == [2, 3]
    scored = launch("eval_harness.py", "--checkpoint", "log/r/ckpt_00003.pt", "--tasks",
                    "piqa,arc_easy,wikitext", "--data_dir", tasks, "--limit", 4, "--device", "cpu")
    assert scored.returncode == 0, scored.stderr
    results = read_results(tmp_path / "log" / "r" / "eval_00003_limit4.json")
    for task, metric in (("piqa", "acc_norm,none"), ("arc_easy", "acc_norm,none"),
                         ("wikitext", "bits_per_byte,none")):
        assert logged[task][-1][1] == pytest.approx(results[task][metric], rel=1e-4)
        assert f"eval/{task} {results[task][metric]:.4f}" in run.stdout
    events = EventAccumulator(str(tmp_path / "log" / "r")).Reload()
    assert [event.step for event in events.Scalars("eval/piqa")] == [2, 3]


def test_both_hellaswags_have_names_of_their_own(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    items = []
    for item in task_items("hellaswag", 9):
        items.append({"activity_label": "Sitting", "ctx": item["ctx_a"][:60],
                      "endings": item["endings"], "label": int(item["label"])})
    write_lines(tmp_path / "hellaswag.jsonl", items)
    shards = str(write_data(tmp_path / "shards", tokenizer))
    train_gpt2.main([
        *TINY_FLAGS, "--data", shards, "--max_steps", "2", "--warmup_steps", "1",
        "--run_name", "r", "--hellaswag_every", "1", "--hellaswag_file", "hellaswag.jsonl",
        "--eval_tasks", "hellaswag", "--eval_tasks_dir", ".", "--eval_tasks_every", "1",
    ])
    events = EventAccumulator("log/r").Reload()
    lines = [line.split() for line in Path("log/r/log.txt").read_text().splitlines()]
    kinds = {"eval/hellaswag": "hella", "eval/hellaswag_lm_eval": "eval/hellaswag_lm_eval"}
    for tag, kind in kinds.items():
        logged = {int(step): float(value) for step, k, value in lines if k == kind}
        scalars = {event.step: event.value for event in events.Scalars(tag)}
        assert list(scalars) == [1, 2]
        assert scalars == pytest.approx(logged, abs=1e-6)


def test_training_survives_tasks_that_fail_and_stops_within_one(tokenizer, tasks, tmp_path,
                                                                monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks").mkdir()
    write_lines(tmp_path / "tasks" / "wikitext.jsonl", [OVERFLOWS])
    shutil.copy(tasks / "piqa.jsonl", tmp_path / "tasks")
    shards = write_data(tmp_path / "shards", tokenizer)
    flags = [*TINY_FLAGS, "--data", shards, "--max_steps", 6, "--run_name", "r",
             "--eval_tasks", "wikitext,piqa", "--eval_tasks_dir", tmp_path / "tasks",
             "--eval_tasks_every", 2]
    score = harness.score
    calls = []

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
    assert "wikitext has no result: OverflowError" in out
    assert "step 2 | eval/piqa " in out
    assert "step 4 | eval/piqa" not in out
    assert "stopped at step 4 of 6" in out
    assert calls == [False] * 4
    train_gpt2.main([str(flag) for flag in flags])
    assert "step 4 | eval/piqa " in capsys.readouterr().out
    lines = (tmp_path / "log" / "r" / "log.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines if " eval/piqa " in line] == ["2", "4", "6"]
