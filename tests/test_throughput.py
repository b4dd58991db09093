"""benchmarks/throughput.py, launched at a tiny size. Run: python -m pytest tests/test_throughput.py"""

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
    result = launch("benchmarks/throughput.py", *(word for row in rows for word in ("--row", row)), "--rounds", 1, *FLAGS)
    assert result.returncode == 0, result.stderr
    found = re.findall(r"^\| `(.*)` \| ([\d.]+) \(([\d.]+)\) \| ([\d.]+) \| ([\d,]+) \| n/a \| ([\d.]+) \| n/a \| \d+ \|$", result.stdout, re.M)
    assert [row[0] for row in found] == rows and found[0][5] == "1.000"
    rates = [float(row[4].replace(",", "")) for row in found]
    for (_, median, only, data, _, ratio), rate, tokens in zip(found, rates, (64, 64, 128), strict=True):
        assert median == only and float(data) < float(median)
        assert rate * float(median) / 1e3 == pytest.approx(tokens, rel=0.05)
        assert float(ratio) == pytest.approx(rate / rates[0], abs=0.002)


def test_a_failing_row_shows_its_error(launch):
    result = launch("benchmarks/throughput.py", "--row", f"{TINY} --n_embd 17", "--rounds", 1, *FLAGS)
    assert result.returncode == 1 and "--n_embd 17 must be a multiple of --n_head 2" in result.stderr


def test_profile_names_the_kernels(launch):
    result = launch("benchmarks/throughput.py", "--row", TINY, "--profile", *FLAGS)
    assert result.returncode == 0, result.stderr
    groups = dict(re.findall(r"^\| ([a-z ]+) \| ([\d.]+) \|$", result.stdout, re.M))
    assert float(groups["matmul"]) > 0 and float(groups["attention"]) > 0 and float(groups["loss"]) > 0
    assert re.search(r"ms +\d+ x aten::addmm", result.stdout)


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="looks for processes in /proc")
def test_nothing_trains_on_when_it_is_ended(tmp_path):
    def training():
        """Processes that work in a folder made under tmp_path."""
        folders = (path for path in Path("/proc").glob("[0-9]*/cwd"))
        return [path for path in folders if os.path.realpath(path).startswith(f"{tmp_path}/")]

    flags = [*map(str, FLAGS[:-1]), "100000"]
    with subprocess.Popen([sys.executable, ROOT / "benchmarks/throughput.py", "--row", TINY, *flags], cwd=tmp_path, text=True,
                          env=os.environ | {"TMPDIR": str(tmp_path)}, stderr=subprocess.PIPE) as process:
        while not training():
            time.sleep(0.1)
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 1
    assert not training() and not list(tmp_path.iterdir())
