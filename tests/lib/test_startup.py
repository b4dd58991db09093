"""Every script before torch is imported: python -m pytest tests/lib/test_startup.py"""

import os
import subprocess
import sys

import pytest
from helpers import ROOT

SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))
OURS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")
# replaces numpy and torch, the first slow modules that the scripts import
REPORT = f"import os; print(*[os.environ.get(name) for name in {OURS}], flush=True); os._exit(0)"
INTERRUPT = "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(60)"


def start(words, tmp_path, module, **environment):
    """Run Python on `words`; `module` is the source of numpy and torch."""
    for name in ("numpy.py", "torch.py"):
        (tmp_path / name).write_text(module)
    env = {name: value for name, value in os.environ.items() if name not in OURS}
    env |= {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"} | environment
    return subprocess.run([sys.executable, *map(str, words)], env=env, cwd=tmp_path,
                          capture_output=True, text=True, timeout=600, check=False)


def waiting(words, tmp_path, **environment):
    """The variables of OpenMP when the slow imports begin."""
    return start(words, tmp_path, REPORT, **environment).stdout.split()


@pytest.mark.parametrize("script", SCRIPTS)
def test_waiting_threads_sleep(script, tmp_path):
    assert waiting([ROOT / script], tmp_path) == ["PASSIVE", "1000", "None", "None"]


@pytest.mark.parametrize("environment, want", [
    ({"OMP_NUM_THREADS": "1"}, ["PASSIVE", "1000", "None", "1"]),  # torchrun's
    ({"OMP_WAIT_POLICY": "ACTIVE"}, ["ACTIVE", "None", "None", "None"]),
    ({"KMP_BLOCKTIME": "0"}, ["None", "None", "0", "None"])])
def test_the_environment_decides_how_threads_wait(environment, want, tmp_path):
    assert waiting([ROOT / "train_gpt2.py"], tmp_path, **environment) == want


def test_importing_a_script_leaves_the_environment_and_ctrl_c_alone(tmp_path):
    assert waiting(["-c", "import train_gpt2"], tmp_path) == 4 * ["None"]
    assert "KeyboardInterrupt" in start(["-c", "import train_gpt2"], tmp_path, INTERRUPT).stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_during_imports_is_one_line(script, tmp_path):
    done = start([ROOT / script], tmp_path, INTERRUPT)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\ninterrupted\n")


def test_only_rank_0_prints(tmp_path):
    done = start([ROOT / "train_gpt2.py"], tmp_path, INTERRUPT, RANK="1")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_ctrl_c_later_is_an_exception_again(tmp_path):
    code = """
import os, signal, sys
from lib import startup
startup.interrupt_quietly()
from lib.cli import run

def main(argv):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
    finally:
        print("saved", flush=True)

run(main)
"""
    done = start(["-c", code], tmp_path, "")
    assert (done.returncode, done.stdout, done.stderr) == (130, "saved\n", "\ninterrupted\n")


def test_garbage_is_not_collected_while_a_script_imports(tmp_path):
    report = "import gc, os; print(gc.isenabled(), flush=True); os._exit(0)"
    assert start([ROOT / "train_gpt2.py"], tmp_path, report).stdout == "False\n"
    assert start(["-c", "import train_gpt2"], tmp_path, report).stdout == "True\n"
    (tmp_path / "after.py").write_text("import gc\nfrom lib.cli import run\n"
                                       "gc.disable()\nrun(lambda argv: print(gc.isenabled()))")
    assert start([tmp_path / "after.py"], tmp_path, "").stdout == "True\n"


@pytest.mark.parametrize("version", ["2.9.1+cu128", "2.10.0"])
def test_an_old_torch_is_one_line(version, tmp_path):
    info = tmp_path / f"torch-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    done = start([ROOT / "train_gpt2.py"], tmp_path, REPORT)
    assert done.returncode == 2
    assert done.stderr.startswith(f"train_gpt2.py: error: torch {version} is too old")
    assert done.stderr.count("\n") == 1
