"""benchmarks/throughput.py, launched at a tiny size.

    python -m pytest tests/test_throughput.py
"""

import ast
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import throughput

TINY = "--preset gpt2 --n_layer 1 --n_head 2 --n_embd 16 --device cpu"
FLAGS = ["-B", 2, "-T", 16, "--total", 64, "--warmup", 2, "--steps", 3]


def table_row(row, figures, ratio):
    """A row of the table with the medians of one round."""
    return (f"| `{row}` | {figures['ms']:.1f} ({figures['ms']:.1f}) | {figures['data']:.2f} | "
            f"{figures['rate']:,.0f} | n/a | {ratio:.3f} | n/a | {figures['first']:.0f} |")


def test_rows_are_timed_and_compared(launch):
    rows = [TINY, f"{TINY} --mlp swiglu --total_batch_size 128"]
    result = launch("benchmarks/throughput.py", "--row", rows[0], "--row", rows[1], "--rounds", 1,
                    *FLAGS)
    assert result.returncode == 0, result.stderr
    found = re.findall(r"^--preset .*: (\{.*\})$", result.stderr, re.M)
    first, second = map(ast.literal_eval, found)  # not rounded
    for figures, tokens in ((first, 64), (second, 128)):
        assert 0 <= figures["data"] <= figures["ms"]
        assert figures["rate"] * figures["ms"] / 1e3 == pytest.approx(tokens)
    table = [line for line in result.stdout.splitlines() if line.startswith("| `")]
    assert table == [table_row(rows[0], first, 1.0),
                     table_row(rows[1], second, second["rate"] / first["rate"])]


def test_a_failing_row_shows_its_error(launch):
    row = f"{TINY} --n_embd 17"
    result = launch("benchmarks/throughput.py", "--row", row, "--rounds", 1, *FLAGS)
    assert result.returncode == 1
    assert "--n_embd 17" in result.stderr


def test_profile_names_the_kernels(launch):
    flags = ["--row", TINY, "--profile", "--kernels", 1000, *FLAGS]
    result = launch("benchmarks/throughput.py", *flags)
    assert result.returncode == 0, result.stderr
    groups = re.findall(r"^\| ([a-z ]+) \| [\d.]+ \| (\d+) \|$", result.stdout, re.M)
    calls = {group: int(n) for group, n in groups}  # times may round to 0.0 ms
    assert min(calls[group] for group in ("matmul", "attention", "loss", "optimizer")) > 0
    assert re.search(r"ms +\d+ x aten::addmm", result.stdout)


def working_in(folder):
    """Processes that work in a folder made under `folder`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if os.readlink(process / "cwd").startswith(f"{folder}/"):
                found.append(process)
    return found


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="looks for processes in /proc")
def test_ending_it_ends_all_training_processes(tmp_path):
    script = ROOT / "benchmarks" / "throughput.py"
    command = [sys.executable, script, "--row", TINY, *FLAGS[:-1], 100000]
    env = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen([str(word) for word in command], cwd=tmp_path, env=env,
                          stderr=subprocess.DEVNULL) as process:
        try:
            while not working_in(tmp_path):
                time.sleep(0.1)
                assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            assert process.wait() == 1
        finally:  # a failure must not wait for 100,000 steps
            process.terminate()
    assert not working_in(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_signal_while_a_process_starts_ends_it(tmp_path, monkeypatch):
    started = []

    class Interrupted(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    try:
        with pytest.raises(SystemExit, match="terminated"):
            throughput.run(["sleep", "60"], tmp_path)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert started[0].returncode == -signal.SIGKILL
