"""Compiling for training: python -m pytest tests/lib/test_compiler.py"""

import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT
from torch._dynamo.utils import counters

from lib import compiler
from lib.cli import RankError
from train_gpt2 import GPT, GPTConfig

H200 = torch.device("cuda")


def tiny(**settings):
    return GPTConfig(vocab_size=61, block_size=8, n_embd=16, n_head=2, **settings)


def graphs_of(n_layer, **settings):
    """Count graphs compiled -> (for training, in addition for evaluation)."""
    torch._dynamo.reset()
    before = counters["stats"]["unique_graphs"]
    model = GPT(tiny(n_layer=n_layer, **settings))
    model.compile(dynamic=False, backend="aot_eager")
    idx = torch.zeros(2, 8, dtype=torch.long)
    model(idx, idx).backward()
    training = counters["stats"]["unique_graphs"] - before
    model.eval()
    assert not model(idx, idx).requires_grad
    return training, counters["stats"]["unique_graphs"] - before - training


@pytest.mark.parametrize("settings, training", [
    (dict(), 4),  # embedding, block, last norm, loss
    (dict(value_residual=True), 5)])  # the first block differs: it has nothing to mix
def test_the_number_of_graphs_does_not_grow_with_depth(settings, training):
    """Evaluation adds only its loss."""
    assert graphs_of(3, **settings) == graphs_of(6, **settings) == (training, 1)


def test_off_runs_as_plain_pytorch():
    torch._dynamo.reset()
    model = GPT(tiny(n_layer=2)).eval()
    model.compile(dynamic=False, backend="aot_eager")
    before = counters["stats"]["unique_graphs"]
    with compiler.off(), torch.no_grad():
        for length in (3, 5, 8):
            idx = torch.zeros(1, length, dtype=torch.long)
            assert model(idx).shape == (1, length, 61)
    assert counters["stats"]["unique_graphs"] == before


def test_compiling_pays_for_long_runs_on_a_gpu(monkeypatch):
    monkeypatch.setattr(compiler, "peak_flops", lambda *_: 1e15)
    twenty_seconds = 20 * 1e15 * compiler.MFU_COMPILED  # FLOPs
    assert compiler.worth_compiling(twenty_seconds, H200)
    assert not compiler.worth_compiling(twenty_seconds / 10, H200)
    assert not compiler.worth_compiling(twenty_seconds, torch.device("cpu"))
    monkeypatch.setattr(compiler, "peak_flops", lambda *_: None)  # an unknown GPU
    assert compiler.worth_compiling(1.0, H200)


COMPILE = """
import torch
from lib.compiler import compile_ahead

class Half(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8))

    def forward(self, idx, targets):
        return (self.weight * idx.float()).sin().sum()

idx = torch.ones(4, 8, dtype=torch.long)
compile_ahead(Half(), [(idx, idx)], False, print)
"""


@pytest.mark.slow
def test_the_cache_is_used_and_a_damaged_one_costs_a_warning(tmp_path):
    def run():
        env = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)
        }
        done = subprocess.run([sys.executable, "-c", COMPILE], cwd=tmp_path, env=env, timeout=600,
                              capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "compiled 1 graphs, 0 of them from the cache" in run()
    assert "compiled 1 graphs, 1 of them from the cache" in run()
    for library in (tmp_path / "cache").rglob("*.so"):
        library.write_bytes(b"torn")
    damaged = run()
    assert "warning: compiling failed" in damaged
    assert "compiled 1 graphs" in damaged.splitlines()[-1]


@pytest.mark.parametrize("given", [None, "mine"])
def test_the_cache_is_in_the_project_unless_another_is_set(given, tmp_path):
    """The process ends while the background thread still imports."""
    code = """
import os, pathlib, sys
import train_gpt2  # imports parts of inductor
from lib import compiler
compiler.CACHE = pathlib.Path(sys.argv[1])
compiler.prepare()
print(os.environ["TORCHINDUCTOR_CACHE_DIR"])
"""
    env = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    if given:
        env["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / given)
    words = [sys.executable, "-c", code, tmp_path / "cache"]
    result = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert result.stdout == f"{tmp_path / (given or 'cache')}\n"
    assert not result.stderr


class Sharded(torch.nn.Module):
    """Cannot be compiled."""

    def unshard(self):
        pass

    def forward(self, idx, targets):
        raise RuntimeError("no headers")


def test_a_sharded_model_is_not_used_after_a_failed_pass():
    idx = torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(RankError, match="no headers.*--no-compile"):
        compiler._compile(Sharded(), [(idx, idx)], False, print)
