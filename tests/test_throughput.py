"""benchmarks/throughput.py, launched at a tiny size. Run: python -m pytest tests/test_throughput.py
"""

import ast
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT

TINY = "--preset gpt2 --n_layer 1 --n_head 2 --n_embd 16 --device cpu"
FLAGS = ["-B", 2, "-T", 16, "--total", 64, "--warmup", 2, "--steps", 3]


def test_rows_are_timed_and_compared(launch):
    rows = [TINY, f"{TINY} --mlp swiglu", f"{TINY} --total_batch_size 128"]
    words = []
    for row in rows:
        words += ["--row", row]
    result = launch("benchmarks/throughput.py", *words, "--rounds", 1, *FLAGS)
    assert result.returncode == 0, result.stderr
    printed = re.findall(r"^--preset .*: (\{.*\})$", result.stderr, re.M)
    figures = [ast.literal_eval(text) for text in printed]  # not rounded
    table = [line for line in result.stdout.splitlines() if line.startswith("| `")]
    first = figures[0]["rate"]
    for row, tokens, f, line in zip(rows, (64, 64, 128), figures, table, strict=True):
        assert 0 <= f["data"] <= f["ms"]
        assert f["rate"] * f["ms"] / 1e3 == pytest.approx(tokens)
        assert line == (f"| `{row}` | {f['ms']:.1f} ({f['ms']:.1f}) | {f['data']:.2f} | "
                        f"{f['rate']:,.0f} | n/a | {f['rate'] / first:.3f} | n/a | "
                        f"{f['first']:.0f} |")


def test_a_failing_row_shows_its_error(launch):
    result = launch("benchmarks/throughput.py", "--row", f"{TINY} --n_embd 17", "--rounds", 1,
                    *FLAGS)
    assert result.returncode == 1
    assert "--n_embd 17 must be a multiple of --n_head 2" in result.stderr


def test_profile_names_the_kernels(launch):
    result = launch("benchmarks/throughput.py", "--row", TINY, "--profile", "--kernels", 1000,
                    *FLAGS)
    assert result.returncode == 0, result.stderr
    groups = re.findall(r"^\| ([a-z ]+) \| [\d.]+ \| (\d+) \|$", result.stdout, re.M)
    calls = {group: int(n) for group, n in groups}
    for group in ("matmul", "attention", "loss", "optimizer"):
        assert calls[group] > 0  # times may round to 0.0 ms
    assert re.search(r"ms +\d+ x aten::addmm", result.stdout)


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="looks for processes in /proc")
def test_no_run_continues_after_it_is_terminated(tmp_path):
    def training():
        """Processes that work in a folder made under tmp_path."""
        folders = (path for path in Path("/proc").glob("[0-9]*/cwd"))
        return [path for path in folders if os.path.realpath(path).startswith(f"{tmp_path}/")]

    flags = [*map(str, FLAGS[:-1]), "100000"]
    with subprocess.Popen(
        [sys.executable, ROOT / "benchmarks/throughput.py", "--row", TINY, *flags], cwd=tmp_path,
            text=True, env=os.environ | {"TMPDIR": str(tmp_path)},
            stderr=subprocess.PIPE) as process:
        while not training():
            time.sleep(0.1)
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 1
    assert not training() and not list(tmp_path.iterdir())
