"""hellaswag.py, launched for real: python -m pytest tests/test_hellaswag.py"""

import math

import pytest
from helpers import hellaswag_items, tiny_checkpoint, write_lines

import hellaswag
from lib import checkpoint as checkpoints
from lib.cli import BadInput
from lib.devices import Processes
from lib.evals.hellaswag import count_correct, render
from lib.rope import ContextConfig, extend


@pytest.fixture
def checkpoint(tokenizer, tmp_path):
    """(path, model) of an untrained model with opinions."""
    path = tmp_path / "ckpt_00001.pt"
    return path, tiny_checkpoint(path, tokenizer, init="xavier", block_size=48)


def figures(text):
    """The lines of accuracies, without the time."""
    return [line for line in text.splitlines() if line.startswith(("acc", "lm_eval"))]


def line(name, right, n):
    """What is printed: the standard error is that of lm-evaluation-harness."""
    from lm_eval.api.metrics import mean_stderr

    error = mean_stderr([1] * right + [0] * (n - right))
    return f"{name} {right}/{n} = {right / n:.4f} ± {error:.4f} (chance: 0.25)"


def test_one_and_two_processes_give_the_same_figures(launch, checkpoint, tokenizer, tmp_path):
    path, model = checkpoint
    items, want = hellaswag_items(12), []
    for style, names in (("completion", {"acc": 1,
                                         "acc_norm": 2}), ("lm_eval", {"lm_eval_acc_norm": 3})):
        counts = count_correct(model, render(items[:9], tokenizer, style), Processes("cpu"))
        want += [line(name, counts[k], 9) for name, k in names.items()]
    flags = [
        "--checkpoint", path.parent, "--file",
        write_lines(tmp_path / "h.jsonl", items), "--limit", 9, "--device", "cpu"
    ]
    for processes in (1, 2):
        result = launch("hellaswag.py", *flags, processes=processes)
        assert result.returncode == 0, result.stderr
        assert figures(result.stdout) == want
        assert result.stderr.count("ckpt_00001.pt, the newest\n") == 1  # of the run folder


def test_a_longer_context_is_evaluated(launch, tokenizer, tmp_path):
    items, path = hellaswag_items(12), tmp_path / "ckpt_00001.pt"
    for item in items:
        item["ctx"] = " ".join([item["ctx"]] * 9)  # longer than 48 tokens
    model, want = tiny_checkpoint(path, tokenizer, init="xavier", block_size=48, pos="rope"), []
    for longer in (model,
                   extend(
                       tiny_checkpoint(path, tokenizer, init="xavier", block_size=48, pos="rope"),
                       ContextConfig(192, "yarn"))):
        counts = count_correct(longer, render(items, tokenizer, "completion"), Processes("cpu"))
        want.append([line(name, counts[k], 12) for name, k in (("acc", 1), ("acc_norm", 2))])
    result = launch("hellaswag.py", "--checkpoint", path, "--file",
                    write_lines(tmp_path / "h.jsonl", items), "--device", "cpu", "--context", 192,
                    "--rope_scaling", "yarn")
    assert result.returncode == 0, result.stderr
    assert figures(result.stdout)[:2] == want[1] != want[0]


def test_items_without_an_activity(checkpoint, tmp_path, capsys):
    items = [{key: item[key] for key in ("ctx", "endings", "label")} for item in hellaswag_items(3)]
    path = write_lines(tmp_path / "h.jsonl", items)
    hellaswag.main(["--checkpoint", str(checkpoint[0]), "--file", str(path), "--device", "cpu"])
    assert figures(
        capsys.readouterr().out)[2] == "lm_eval_acc_norm n/a: an item has no activity_label"


@pytest.mark.parametrize(
    "flags, says",
    [
        ([], "name either --checkpoint or --model"),
        (["--checkpoint", "a.pt", "--model", "gpt2"], "name either --checkpoint or --model"),
        (["--checkpoint", "ckpt_00001.pt", "--file", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
        (["--checkpoint", "ckpt_00001.pt", "--file", "good.jsonl", "--limit", "0"
          ], "--limit must be at least 1"),
        (["--model", "gpt2", "--file", "good.jsonl"
          ], "load it once where the hub can be reached"),  # offline here
    ])
def test_bad_flags(flags, says, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "good.jsonl", hellaswag_items(1))
    with pytest.raises(BadInput) as error:
        hellaswag.main(flags)
    assert says in str(error.value)


def test_a_damaged_model_is_one_line_and_no_accuracy(launch, checkpoint, tmp_path):
    path, _ = checkpoint
    state = checkpoints.read(path)
    damaged = {
        name: p * (math.nan if name.endswith("c_fc.weight") else 1)
        for name, p in state["model"].items()
    }
    checkpoints.write(tmp_path / "nan.pt", state | {"model": damaged})
    result = launch("hellaswag.py", "--checkpoint", "nan.pt", "--file",
                    write_lines(tmp_path / "h.jsonl", hellaswag_items(3)), "--device", "cpu")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(
        "hellaswag.py: error: the model's logits are NaN") and result.stderr.count("\n") == 1
