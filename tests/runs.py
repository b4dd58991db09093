"""What tests of interrupted runs share: start one, here or as a real process,
and compare what it leaves with an undisturbed run's."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

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
    "gpt2": ["--dropout", "0.1"], "modern": [
        "--preset", "modern", "--qk_norm", "--no-tie_embeddings", "--schedule", "wsd", "--dropout",
        "0.1"
    ]
}
LONG = ["--max_steps", "250", "--save_every", "50", "--eval_every",
        "0"]  # long enough to be caught by a signal
linux = pytest.mark.skipif(not Path("/proc/self/environ").exists(),
                           reason="looks for processes in /proc")


# ----------------------------------------------------------------------------------------------------------------------
# Run


def command(data, folder, *flags):
    return [
        str(word) for word in (*RUN, "--data", data, "--log_dir", folder.parent, "--run_name",
                               folder.name, *flags)
    ]


def train(data, folder, *flags):
    """A run in this process -> its folder."""
    train_gpt2.main(command(data, folder, *flags))
    return folder


def again(folder, *flags):
    """The run of `folder`, continued by its name alone -> its folder."""
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


@contextlib.contextmanager
def running(words, out, torchrun=(), on_hangup=signal.SIG_DFL):
    """The real train_gpt2.py in the background, what it prints in the file `out`; ended with the
    block at the latest."""
    start = [
        sys.executable, *(["-m", "torch.distributed.run", *torchrun] if torchrun else []),
        str(ROOT / "train_gpt2.py")
    ]
    with open(out, "w") as file, subprocess.Popen(
            [*start, *words], stdout=file, stderr=subprocess.STDOUT, cwd=out.parent,
            env=os.environ | {"OMP_NUM_THREADS": "1"}, preexec_fn=hang_up(on_hangup)) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(40)
                except subprocess.TimeoutExpired:
                    process.kill()


def hang_up(action):
    """What a child does on SIGHUP, whatever this process does (it may be under nohup)."""
    return lambda: signal.signal(signal.SIGHUP, action)


def wait_for(condition, process, seconds=60):
    """Poll until `condition()` holds, while `process` runs."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert process.poll() is None and time.monotonic(
        ) < end, f"ended with {process.poll()} before what was waited for"
        time.sleep(0.002)
    return value


def worker(agent, rank):
    """The process id of torchrun's worker of this rank, or None."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            mine = f"\nPPid:\t{agent.pid}\n" in (folder / "status").read_text()
            if mine and f"RANK={rank}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                return int(folder.name)
    return None


# ----------------------------------------------------------------------------------------------------------------------
# Compare


def contents(folder):
    """{name: bytes} of a folder's files."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def lines(folder, first=0):
    """log.txt's lines from step `first` on."""
    return [
        line for line in (folder / "log.txt").read_text().splitlines()
        if int(line.split()[0]) >= first
    ]


def logged(folder):
    """How many lines log.txt has now."""
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
    return sorted(step for step, _ in checkpoint.found(folder))


def flat(state, name=""):
    """A nested checkpoint -> {path: leaf}."""
    if isinstance(state, (dict, list, tuple)):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {key: leaf for k, value in items for key, leaf in flat(value, f"{name}/{k}").items()}
    return {name: state}


def same(a, b):
    """Two nested states are equal, tensors bit for bit."""
    a, b = flat(a), flat(b)
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype if isinstance(a[k], torch.Tensor
                                                                           ) else a[k] == b[k]
        for k in a)


def final(folder):
    """The newest checkpoint, less the settings: runs differ in their names."""
    return {
        k: v
        for k, v in checkpoint.read(checkpoint.found(folder)[0][1]).items()
        if k != "train_config"
    }


def assert_same_runs(folder, whole):
    """log.txt byte for byte, the last checkpoint tensor for tensor."""
    assert (folder / "log.txt").read_bytes() == (whole / "log.txt").read_bytes()
    assert steps_saved(folder)[-1] == steps_saved(whole)[-1]
    assert same(final(folder), final(whole))


def events(folder):
    """All that TensorBoard shows: {tag: [(step, value), ...]}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def scalars(folder):
    """What TensorBoard shows: {tag: [(step, value), ...]}, without the speed."""
    shown = events(folder)
    assert [step for step, _ in shown["perf/tok_per_sec"]
            ] == [step for step, _ in shown["Loss/train"]]
    return {tag: values for tag, values in shown.items() if not tag.startswith("perf/")}
