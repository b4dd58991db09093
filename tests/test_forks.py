"""forks.py: a forked process against one that Python starts. Run: python -m pytest
tests/test_forks.py"""

import os
import signal
import subprocess
import sys
import tempfile

import forks
import pytest
import torch

pytestmark = pytest.mark.skipif(not forks.POSSIBLE, reason="not where torch survives a fork")

SCRIPT = """
import atexit, os, signal, sys
from dataclasses import dataclass
from typing import get_type_hints

@dataclass
class Config:
    here: "Local"

class Local:
    pass

assert get_type_hints(Config) == {"here": Local}
atexit.register(print, "the end")
print(os.path.basename(__file__), __name__, sys.argv[1:], os.path.basename(sys.path[0]))
print(os.getcwd(), os.environ.get("SOME_NAME"), "lib" in sys.modules, sys.stdin.read())
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
print("no error", file=sys.stderr)
exec(sys.argv[1])
"""


@pytest.mark.parametrize("ending, code", [("pass", 0), ("sys.exit(3)", 3), ("sys.exit('why')", 1),
                                          ("1 / 0", 1), ("os.kill(os.getpid(), 9)", -9)])
def test_a_forked_process_is_like_one_that_python_starts(ending, code, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "script.py").write_text(SCRIPT)
    words = ["folder/script.py", ending, "a b"]
    env = os.environ | {"SOME_NAME": "x"}
    want = subprocess.run([sys.executable, *words], cwd=tmp_path, env=env, text=True, check=False,
                          capture_output=True, input="typed")
    have = forks.run(words, tmp_path, env, input="typed")
    assert have.returncode == want.returncode == code
    assert have.stdout == want.stdout
    assert have.stderr.splitlines()[-1] == want.stderr.splitlines()[-1]


def test_no_fork_where_cuda_is_available(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not forks.possible()


def test_a_package_that_fails_to_import_is_left_out(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("raise RuntimeError('no such driver')")
    (tmp_path / "sound_package.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    forks.preload(["broken_package", "sound_package"])
    assert "sound_package" in sys.modules


def test_code_and_its_arguments(tmp_path):
    done = forks.run(["-c", "import sys; print(sys.argv)", "x"], tmp_path, dict(os.environ))
    assert done.stdout == "['-c', 'x']\n"


def test_processes_meet_and_one_that_fails_ends_the_others(tmp_path):
    meet = "import torch.distributed as dist\ndist.init_process_group('gloo')\n"
    show = "dist.barrier(); print(dist.get_rank()); dist.destroy_process_group()"
    done = forks.run(["-c", meet + show], tmp_path, dict(os.environ), processes=2)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.replace("\n", "")) == ["0", "1"]  # lines may interleave
    fail = "dist.barrier()\nimport sys, time; time.sleep(3600) if dist.get_rank() else sys.exit(5)"
    assert forks.run(["-c", meet + fail], tmp_path, dict(os.environ), processes=2).returncode == 5


def test_a_signal_reaches_a_running_process(tmp_path):
    with tempfile.TemporaryFile("w+") as out:
        words = ["-c", "import time; time.sleep(3600)"]
        with forks.start(words, tmp_path, [out] * 3, [dict(os.environ)]) as process:
            assert process.poll() is None
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.01)
            process.send_signal(signal.SIGTERM)
            assert process.wait() == -signal.SIGTERM
