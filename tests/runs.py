"""Start runs, in this process or in others, and compare a run with an undisturbed one."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import forks
import pytest
import torch
from helpers import ROOT, TINY_FLAGS

import train_gpt2
from lib import checkpoint

# 60 steps are 3.3 epochs of the toy data, and its shards end every 6 steps
RUN = [
    *TINY_FLAGS, "--max_steps", "60", "--shuffle", "--micro_batch", "4", "--eval_every", "8",
    "--save_every", "8", "--keep", "0"
]
KINDS = {
    "gpt2": ["--dropout", "0.1"],
    "modern": ["--preset", "modern", "--qk_norm", "--no-tie_embeddings", "--schedule", "wsd",
               "--dropout", "0.1"],
}
# long enough to be caught by a signal
LONG = ["--max_steps", "250", "--save_every", "50", "--eval_every", "0"]
linux = pytest.mark.skipif(not Path("/proc/self/environ").exists(),
                           reason="looks for processes in /proc")


# --------------------------------------------------------------------------------------------------
# Run


def command(data, folder, *flags):
    """train_gpt2.py's flags for RUN and `flags`, in this run folder."""
    place = ["--data", data, "--log_dir", folder.parent, "--run_name", folder.name]
    return [str(word) for word in (*RUN, *place, *flags)]


def train(data, folder, *flags):
    """Run train_gpt2.py in this process -> the run's folder."""
    train_gpt2.main(command(data, folder, *flags))
    return folder


def again(folder, *flags):
    """Continue the run in `folder` by its name alone -> `folder`."""
    train_gpt2.main(["--log_dir", str(folder.parent), "--run_name", folder.name, *map(str, flags)])
    return folder


def cut(source, to, step):
    """A copy of a run folder as if the run had been killed before its next checkpoint after `step`.
    """
    shutil.copytree(source, to)
    for later, path in checkpoint.found(to):
        if later > step:
            path.unlink()
    return to


def run_script(script, *flags, cwd, processes=1, env=None, input="", timeout=600, real=False):
    """Run a script to its end -> CompletedProcess (text).

    processes: how many, joined as torchrun joins them. The processes are forked (forks.py), unless
    real: then Python or torchrun starts them, as a user would.
    """
    words = [str(ROOT / script), *map(str, flags)]
    env = os.environ | (env or {})
    run = run_real if real or not forks.POSSIBLE else forks.run
    return run(words, cwd, env, processes, timeout, input)


def run_real(words, cwd, env, processes, timeout, input):
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run([*start, *words], cwd=cwd, env=env, input=input, timeout=timeout,
                          capture_output=True, text=True, check=False)


@contextlib.contextmanager
def running(words, out, torchrun=(), on_hangup=signal.SIG_DFL):
    """Context with train_gpt2.py in the background, its output in the file `out`; killed at the end
    of the block. Forked (forks.py), or started by torchrun with the flags `torchrun`."""
    words = [str(ROOT / "train_gpt2.py"), *words]
    with open(out, "w") as file:
        process = start(words, file, torchrun, on_hangup)
        with process:
            try:
                yield process
            finally:
                if torchrun:
                    process.terminate()  # it has to end its workers
                else:
                    process.kill()


def start(words, file, torchrun, on_hangup):
    cwd = Path(file.name).parent
    if forks.POSSIBLE and not torchrun:
        ignored = [signal.SIGHUP] if on_hangup == signal.SIG_IGN else []
        with open(os.devnull) as nothing:
            return forks.start(words, cwd, [nothing, file, file], [dict(os.environ)], ignored)
    python = [sys.executable]
    if torchrun:
        python += ["-m", "torch.distributed.run", *torchrun]
    return subprocess.Popen([*python, *words], stdout=file, stderr=subprocess.STDOUT, cwd=cwd,
                            preexec_fn=hang_up(on_hangup))


def hang_up(action):
    """A preexec_fn that sets what a child does on SIGHUP: this process may be under nohup."""
    return lambda: signal.signal(signal.SIGHUP, action)


def wait_for(condition, process):
    """Poll until `condition()` holds, while `process` runs -> its value."""
    while True:
        ended = process.poll() is not None
        value = condition()
        if value:
            return value
        assert not ended, f"ended with exit code {process.returncode} too early"
        time.sleep(0.002)


def worker(agent, rank):
    """The process id of torchrun's worker of this rank, or None."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            mine = f"\nPPid:\t{agent.pid}\n" in (folder / "status").read_text()
            if mine and f"RANK={rank}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                return int(folder.name)
    return None


# --------------------------------------------------------------------------------------------------
# Compare


def contents(folder):
    """{name: bytes} of a folder's files."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def lines(folder, first=0):
    """log.txt's lines from step `first` on."""
    found = (folder / "log.txt").read_text().splitlines()
    return [line for line in found if int(line.split()[0]) >= first]


def logged(folder):
    """The number of lines in log.txt so far."""
    with contextlib.suppress(FileNotFoundError):
        return (folder / "log.txt").read_bytes().count(b"\n")
    return 0


def stop_when(monkeypatch, condition):
    """Runs in this process get a stop request once `condition()` holds."""
    requested = property(lambda self: condition())
    monkeypatch.setattr(train_gpt2.StopSignals, "requested", requested)


def disk_full_when(monkeypatch, condition):
    """From now on every disk has 1,000 bytes free whenever `condition()` holds."""
    usage = shutil.disk_usage

    def limited(folder):
        return usage(folder)._replace(free=1000) if condition() else usage(folder)

    monkeypatch.setattr(shutil, "disk_usage", limited)


def steps_saved(folder):
    """The steps of a run folder's checkpoints, in order."""
    return sorted(step for step, _ in checkpoint.found(folder))


def flat(state, name=""):
    """A nested checkpoint -> {path: leaf}."""
    if isinstance(state, dict):
        items = state.items()
    elif isinstance(state, (list, tuple)):
        items = enumerate(state)
    else:
        return {name: state}
    leaves = {}
    for key, value in items:
        leaves |= flat(value, f"{name}/{key}")
    return leaves


def equal(a, b):
    """Two leaves are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


def same(a, b):
    """Two nested states are equal, tensors bit for bit."""
    a = flat(a)
    b = flat(b)
    return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)


def final(folder):
    """The newest checkpoint without the settings, which contain the run's name, and the hours."""
    _, path = checkpoint.found(folder)[0]
    state = checkpoint.read(path)
    for name in ("train_config", "hours", "dollars"):
        del state[name]
    return state


def assert_same_runs(folder, whole):
    """log.txt byte for byte, the last checkpoint tensor for tensor."""
    assert (folder / "log.txt").read_bytes() == (whole / "log.txt").read_bytes()
    assert steps_saved(folder)[-1] == steps_saved(whole)[-1]
    assert same(final(folder), final(whole))


def events(folder):
    """All of TensorBoard's scalars: {tag: [(step, value), ...]}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    shown = {}
    for tag in found.Tags()["scalars"]:
        shown[tag] = [(event.step, event.value) for event in found.Scalars(tag)]
    return shown


def scalars(folder):
    """TensorBoard's scalars without the speed: {tag: [(step, value), ...]}."""
    shown = events(folder)
    timed = [step for step, _ in shown["perf/tok_per_sec"]]
    assert timed == [step for step, _ in shown["Loss/train"]]
    return {tag: values for tag, values in shown.items() if not tag.startswith("perf/")}
