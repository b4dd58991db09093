"""benchmarks/generate_speed.py, launched at a tiny size. Run: python -m pytest
tests/test_generate_speed.py"""

from helpers import tiny_checkpoint

FLAGS = ("--batch", 2, "--prompt_tokens", 4, "--new_tokens", 3, "--rounds", 1, "--device", "cpu")


def test_a_table_or_one_line(launch, tokenizer, tmp_path):
    """In fp32, greedy tokens are transformers'; what transformers has no class for is told before
    the table begins."""
    tiny_checkpoint(tmp_path / "ckpt_00001.pt", tokenizer, init="xavier")
    done = launch("benchmarks/generate_speed.py", "--checkpoint", "ckpt_00001.pt", *FLAGS)
    assert f"| {tmp_path.name} | 2 | eager steps" in done.stdout
    assert done.returncode == 0, done.stderr
    assert [line.split(" | ")[-1]
            for line in done.stdout.splitlines()[4:]] == ["100.0% |", " |", "100.0% |"], done.stderr
    tiny_checkpoint(tmp_path / "ckpt_00001.pt", tokenizer, softcap=15.0)
    done = launch("benchmarks/generate_speed.py", "--checkpoint", "ckpt_00001.pt", *FLAGS)
    assert (done.returncode,
            done.stdout) == (2, "") and done.stderr.count("\n") == 1 and "--softcap" in done.stderr
