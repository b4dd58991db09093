"""benchmarks/context.py, launched at a tiny size. Run: python -m pytest tests/test_context.py"""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import sentences, tiny_checkpoint

from benchmarks import context
from lib.cli import BadInput
from lib.shards import Shards, read_validation
from lib.tokenizers import train_bpe


def test_a_table_of_whole_checkpoints_or_one_line(data, tokenizer, tmp_path, launch):
    """The mean of the second row against bits per byte of plain logits;
    a missing second checkpoint is told before the table begins."""
    model = tiny_checkpoint(tmp_path / "ckpt_00001.pt", tokenizer, pos="rope")
    done = launch("benchmarks/context.py", "--checkpoint", "ckpt_00001.pt", "--data", data,
                  "--tokens", 256, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip()
             for cell in line.strip("|").split("|")]
            for line in done.stdout.splitlines()]
    name = tmp_path.name  # the run's, also of a checkpoint in the folder one stands in
    assert [tuple(row[:3]) for row in rows[2:]] == [
        (name, "rope", "0.5x32"), (name, "rope", "1x32"),
        *((name, f"rope, {how}", f"{n}x32") for n in (2, 4) for how in ("plain", "ntk", "yarn"))]
    x, y = (torch.from_numpy(part).view(-1, 32)
            for part in read_validation(Shards(data), 256, 128, tokenizer))
    with torch.no_grad():
        nats = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum").item()
    assert float(rows[3][-1]) == pytest.approx(
        nats / math.log(2) / tokenizer.token_bytes()[y.numpy()].sum(), abs=2e-3)
    done = launch("benchmarks/context.py", "--checkpoint", "ckpt_00001.pt", "gone.pt", "--data",
                  data, "--tokens", 256, "--device", "cpu")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count(
        "\n") == 1 and "gone.pt" in done.stderr


def test_data_that_do_not_fit_a_checkpoint_are_refused(data, tokenizer, tmp_path):
    """A tokenizer of as many ids gives numbers that look like any other."""
    path = tmp_path / "ckpt_00001.pt"
    for own, tokens, says in ((train_bpe(sentences(50, 7),
                                         284), 256, "tokens of another tokenizer than"),
                              (tokenizer, 100, "rows of 128 .*: raise --tokens")):
        tiny_checkpoint(path, own, pos="rope")
        with pytest.raises(BadInput, match=says):
            context.main([
                "--checkpoint",
                str(path), "--data",
                str(data), "--tokens",
                str(tokens), "--device", "cpu"
            ])
