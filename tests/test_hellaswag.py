"""hellaswag.py, launched on tiny checkpoints: python -m pytest tests/test_hellaswag.py"""

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
    """(path, model) of an untrained model with confident predictions."""
    path = tmp_path / "ckpt_00001.pt"
    return path, tiny_checkpoint(path, tokenizer, init="xavier", block_size=48)


def accuracies(text):
    """The printed accuracies, without the time."""
    return [line for line in text.splitlines() if line.startswith(("acc", "lm_eval"))]


def accuracy(name, correct, n):
    """The expected line; the standard error is lm-evaluation-harness's."""
    from lm_eval.api.metrics import mean_stderr

    error = mean_stderr([1] * correct + [0] * (n - correct))
    return f"{name} {correct}/{n} = {correct / n:.4f} ± {error:.4f} (chance: 0.25)"


def expected_accuracies(model, items, tokenizer):
    processes = Processes("cpu")
    n, acc, acc_norm, _ = count_correct(model, render(items, tokenizer), processes)
    *_, per_character = count_correct(model, render(items, tokenizer, "lm_eval"), processes)
    return [accuracy("acc", acc, n), accuracy("acc_norm", acc_norm, n),
            accuracy("lm_eval_acc_norm", per_character, n)]


def test_one_and_two_processes_print_the_same(launch, checkpoint, tokenizer, tmp_path):
    path, model = checkpoint
    items = hellaswag_items(12)
    expected = expected_accuracies(model, items[:9], tokenizer)
    file = write_lines(tmp_path / "h.jsonl", items)
    for processes in (1, 2):
        result = launch("hellaswag.py", "--checkpoint", path.parent, "--file", file, "--limit", 9,
                        "--device", "cpu", processes=processes)
        assert result.returncode == 0, result.stderr
        assert accuracies(result.stdout) == expected
        assert result.stderr.count("ckpt_00001.pt, the newest\n") == 1  # of the run folder


def test_a_longer_context_is_evaluated(launch, tokenizer, tmp_path):
    items = hellaswag_items(12)
    for item in items:
        item["ctx"] = " ".join([item["ctx"]] * 9)  # longer than 48 tokens
    path = tmp_path / "ckpt_00001.pt"
    model = tiny_checkpoint(path, tokenizer, init="xavier", block_size=48, pos="rope")
    plain = expected_accuracies(model, items, tokenizer)
    expected = expected_accuracies(extend(model, ContextConfig(192, "yarn")), items, tokenizer)
    file = write_lines(tmp_path / "h.jsonl", items)
    result = launch("hellaswag.py", "--checkpoint", path, "--file", file, "--device", "cpu",
                    "--context", 192, "--rope_scaling", "yarn")
    assert result.returncode == 0, result.stderr
    assert accuracies(result.stdout)[:2] == expected[:2] != plain[:2]


def test_items_without_an_activity(checkpoint, tmp_path, capsys):
    path, _ = checkpoint
    items = hellaswag_items(3)
    for item in items:
        del item["activity_label"]
    file = write_lines(tmp_path / "h.jsonl", items)
    hellaswag.main(["--checkpoint", str(path), "--file", str(file), "--device", "cpu"])
    *_, last = accuracies(capsys.readouterr().out)
    assert last == "lm_eval_acc_norm n/a: an item has no activity_label"


@pytest.mark.parametrize("flags, says", [
    ([], "name either --checkpoint or --model"),
    (["--checkpoint", "a.pt", "--model", "gpt2"], "name either --checkpoint or --model"),
    (["--checkpoint", "ckpt_00001.pt", "--file", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
    (["--checkpoint", "ckpt_00001.pt", "--file", "good.jsonl", "--limit", "0"],
     "--limit must be at least 1"),
    # offline here
    (["--model", "gpt2", "--file", "good.jsonl"], "load it once where the hub can be reached"),
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
    for name, p in state["model"].items():
        if name.endswith("c_fc.weight"):
            p.fill_(math.nan)
    checkpoints.write(tmp_path / "nan.pt", state)
    file = write_lines(tmp_path / "h.jsonl", hellaswag_items(3))
    result = launch("hellaswag.py", "--checkpoint", "nan.pt", "--file", file, "--device", "cpu")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("hellaswag.py: error: the model's logits are NaN")
    assert result.stderr.count("\n") == 1
