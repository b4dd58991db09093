"""benchmarks/context.py, launched at a tiny size.

    python -m pytest tests/test_context.py
"""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import sentences, tiny_checkpoint

from benchmarks import context
from lib.cli import BadInput
from lib.shards import Shards, read_validation
from lib.tokenizers import train_bpe


@torch.no_grad()
def test_bits_per_byte_are_those_of_plain_logits(data, tokenizer, tmp_path, launch):
    model = tiny_checkpoint(tmp_path / "ckpt_00001.pt", tokenizer, pos="rope")
    done = launch("benchmarks/context.py", "--checkpoint", "ckpt_00001.pt", "--data", data,
                  "--tokens", 256, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    rows = []
    for line in done.stdout.splitlines():
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    name = tmp_path.name  # the run's, also of a checkpoint in the current folder
    longer = [(name, f"rope, {how}", f"{n}x32") for n in (2, 4) for how in ("plain", "ntk", "yarn")]
    labels = [tuple(row[:3]) for row in rows[2:]]
    assert labels == [(name, "rope", "0.5x32"), (name, "rope", "1x32"), *longer]

    x, y = read_validation(Shards(data), 256, 128, tokenizer)
    logits = model(torch.from_numpy(x).view(-1, 32)).flatten(0, 1)
    nats = F.cross_entropy(logits, torch.from_numpy(y).flatten(), reduction="sum").item()
    n_bytes = tokenizer.token_bytes()[y].sum()
    assert float(rows[3][-1]) == pytest.approx(nats / math.log(2) / n_bytes, abs=2e-3)


def test_a_missing_checkpoint_is_bad_input(data, tokenizer, tmp_path, launch):
    tiny_checkpoint(tmp_path / "ckpt_00001.pt", tokenizer, pos="rope")
    done = launch("benchmarks/context.py", "--checkpoint", "ckpt_00001.pt", "gone.pt", "--data",
                  data, "--tokens", 256, "--device", "cpu")
    assert done.returncode == 2
    assert done.stdout == ""  # no table was started
    assert done.stderr.count("\n") == 1
    assert "gone.pt" in done.stderr


def test_data_that_does_not_fit_a_checkpoint_is_refused(data, tokenizer, tmp_path):
    """Another tokenizer with the same number of ids would produce plausible numbers."""
    path = tmp_path / "ckpt_00001.pt"
    other = train_bpe(sentences(50, 7), 284)
    for own, tokens, message in ((other, 256, "tokenizer"), (tokenizer, 100, "--tokens")):
        tiny_checkpoint(path, own, pos="rope")
        flags = ["--checkpoint", path, "--data", data, "--tokens", tokens, "--device", "cpu"]
        with pytest.raises(BadInput, match=message):
            context.main([str(flag) for flag in flags])
