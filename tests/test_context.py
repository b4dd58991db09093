"""benchmarks/context.py at a tiny size: python -m pytest tests/test_context.py"""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import sentences, tiny_checkpoint

from benchmarks import context
from lib.cli import BadInput
from lib.shards import Shards, read_validation
from lib.tokenizers import train_bpe

COMMAND = ("benchmarks/context.py", "--tokens", 256, "--device", "cpu", "--checkpoint",
           "ckpt_00001.pt")


@torch.no_grad()
def bits_per_byte(model, data, tokenizer):
    """Of plain logits, in rows of 32 tokens."""
    inputs, targets = read_validation(Shards(data), 256, 128, tokenizer)
    x = torch.from_numpy(inputs).view(-1, 32)
    y = torch.from_numpy(targets).view(-1, 32)
    nats = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum").item()
    return nats / math.log(2) / tokenizer.token_bytes()[targets].sum()


def test_the_table_of_a_checkpoint(data, tokenizer, tmp_path, launch):
    model = tiny_checkpoint(tmp_path / "ckpt_00001.pt", tokenizer, pos="rope")
    result = launch(*COMMAND, "--data", data)
    assert result.returncode == 0, result.stderr
    rows = []
    for line in result.stdout.splitlines()[2:]:
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    run = tmp_path.name  # also of a checkpoint in the current folder
    expected = [(run, "rope", "0.5x32"), (run, "rope", "1x32")]
    for factor in (2, 4):
        for scaling in ("plain", "ntk", "yarn"):
            expected.append((run, f"rope, {scaling}", f"{factor}x32"))
    assert [tuple(row[:3]) for row in rows] == expected
    as_trained = float(rows[1][-1])
    assert as_trained == pytest.approx(bits_per_byte(model, data, tokenizer), abs=2e-3)


def test_a_missing_checkpoint_is_refused_before_the_table(data, tokenizer, tmp_path, launch):
    tiny_checkpoint(tmp_path / "ckpt_00001.pt", tokenizer, pos="rope")
    result = launch(*COMMAND, "gone.pt", "--data", data)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert "gone.pt" in result.stderr


def test_data_that_do_not_fit_a_checkpoint_are_refused(data, tokenizer, tmp_path):
    """Another tokenizer with as many ids would give plausible, wrong numbers."""
    path = tmp_path / "ckpt_00001.pt"
    other = train_bpe(sentences(50, 7), 284)
    for own, tokens, says in (
        (other, 256, "tokens of another tokenizer than"),
        (tokenizer, 100, "rows of 128 .*: raise --tokens"),
    ):
        tiny_checkpoint(path, own, pos="rope")
        with pytest.raises(BadInput, match=says):
            context.main(["--checkpoint", str(path), "--data", str(data), "--tokens", str(tokens),
                          "--device", "cpu"])
