"""benchmarks/generate_speed.py at a tiny size: python -m pytest tests/test_generate_speed.py"""

from helpers import tiny_checkpoint

COMMAND = ("benchmarks/generate_speed.py", "--checkpoint", "ckpt_00001.pt", "--batch", 2,
           "--prompt_tokens", 4, "--new_tokens", 3, "--rounds", 1, "--device", "cpu")


def test_greedy_tokens_are_those_of_transformers(launch, tokenizer, tmp_path):
    tiny_checkpoint(tmp_path / "ckpt_00001.pt", tokenizer, init="xavier")
    result = launch(*COMMAND)
    assert result.returncode == 0, result.stderr
    assert f"| {tmp_path.name} | 2 | eager steps" in result.stdout
    rows = result.stdout.splitlines()[4:]
    agree = [row.split(" | ")[-1] for row in rows]
    assert agree == ["100.0% |", " |", "100.0% |"]


def test_a_model_that_transformers_lacks_is_refused_before_the_table(launch, tokenizer, tmp_path):
    tiny_checkpoint(tmp_path / "ckpt_00001.pt", tokenizer, softcap=15.0)
    result = launch(*COMMAND)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert "--softcap" in result.stderr
