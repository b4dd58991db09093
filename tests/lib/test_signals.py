"""Requests to stop, and what becomes of a run that gets one: python -m pytest
tests/lib/test_signals.py"""

import os
import shlex
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from helpers import ROOT
from runs import (
    KINDS,
    LONG,
    assert_same_runs,
    command,
    hang_up,
    lines,
    linux,
    logged,
    running,
    steps_saved,
    train,
    wait_for,
    worker,
)

import train_gpt2
from lib import checkpoint, signals
from lib.cli import BadInput

TWO = ["--max_steps", "300", "--save_every", "50", "--eval_every", "100", "--micro_batch", "2"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_stopped_run_is_saved_and_goes_on(name, whole, data, tmp_path):
    folder, words = tmp_path / "a", command(data, tmp_path / "a", *LONG)
    nohup = name == "SIGTERM"
    with running(words, tmp_path / "out.txt",
                 on_hangup=signal.SIG_IGN if nohup else signal.SIG_DFL) as process:
        wait_for(lambda: logged(folder) > 20, process)
        if nohup:  # the terminal is closed: not meant for this run
            seen = logged(folder)
            process.send_signal(signal.SIGHUP)
            wait_for(lambda: logged(folder) > seen + 20, process)
        if name == "SIGINT":
            with pytest.raises(BadInput, match="in use by another process"):
                train(data, folder, *LONG)
        process.send_signal(getattr(signal, name))
        if name == "SIGTERM":  # as timeout(1) does: to its child, then to the group that the child is in
            wait_for(lambda: "SIGTERM: this" in (tmp_path / "out.txt").read_text(), process)
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    out, step = (tmp_path / "out.txt").read_text(), len(lines(folder))
    assert step < 250 and lines(folder)[-1].startswith(f"{step - 1} train ")
    assert out.count(f"{name}: this step is finished, then the run is saved; "
                     "another signal, from 2 s on, ends it at once\n") == 1
    assert f"\nstopped at step {step} of 250: the same command with --run_name a goes on\n" in out and "Traceback" not in out
    assert steps_saved(folder)[-1] == step and not list(folder.glob("*.tmp"))
    train(data, folder, *LONG)
    assert_same_runs(folder, whole("long", *LONG))


@pytest.mark.parametrize("step", [8, 60])  # in the midst of the run, and at its last evaluation
def test_a_signal_during_an_evaluation_stops_before_what_comes_next(step, whole, data, tmp_path,
                                                                    monkeypatch, capsys):
    evaluate, folder, calls = train_gpt2.mean_loss, tmp_path / "a", []

    def stopped(*args):
        calls.append(1)
        if len(calls) == step // 8 + (step == 60):  # at steps 8, 16, ... and at the last
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)  # the thread that listens hears it
        return evaluate(*args)

    monkeypatch.setattr(train_gpt2, "mean_loss", stopped)
    sampling = [*KINDS["gpt2"], "--sample_every", "4"]
    train(data, folder, *sampling)
    assert f"stopped at step {step} of 60" in capsys.readouterr().out
    assert steps_saved(folder)[-1] == step
    train(data, folder, *sampling)
    out = capsys.readouterr().out
    assert "\ndone: " in out and "\n> " in out  # the samples of the last step were made, too
    assert_same_runs(folder, whole("gpt2", "--sample_every", "4"))
    train(data, folder, *sampling)
    assert "is the end of a run of 60 steps" in capsys.readouterr().out


def test_a_run_outlives_its_console(data, tmp_path, whole):
    folder = tmp_path / "a"
    process = subprocess.Popen([
        sys.executable,
        str(ROOT / "train_gpt2.py"), *command(data, folder, *LONG, "--log_every", 1)
    ], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    while not process.stdout.readline().startswith(b"step 10 |"):
        assert process.poll() is None
    process.stdout.close()  # as when Ctrl-C has ended `| tee`
    seen = logged(folder)
    wait_for(lambda: logged(folder) > seen + 5, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert steps_saved(folder)[-1] == len(lines(folder)) > 10
    train(data, folder, *LONG)
    assert_same_runs(folder, whole("long", *LONG))


@pytest.mark.parametrize("console", [">&- 2>&-", "> /dev/full"])
def test_a_run_without_a_console_is_saved(console, data, tmp_path):
    words = shlex.join([
        sys.executable,
        str(ROOT / "train_gpt2.py"), *command(data, tmp_path / "a", "--max_steps", "4")
    ])
    assert subprocess.run(f"{words} {console}", shell=True, cwd=tmp_path,
                          check=False).returncode == 0
    assert steps_saved(tmp_path / "a") == [4] and len(lines(tmp_path / "a")) == 5


# the main thread hangs where no Python runs, as in a collective whose other process is gone
HANGS = """
import ctypes, sys, time
from types import SimpleNamespace
from lib import signals
patience, echo, hang = float(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "hang"
signals.PATIENCE, signals.ECHO = patience, echo
many = SimpleNamespace(world_size=2 if patience else 1, distributed=patience > 0, sum=lambda values: values)
with signals.StopSignals(lambda line: print(line, flush=True), many) as stop:
    print("ready", flush=True)
    if hang:
        mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
        libc.pthread_mutex_lock(mutex)
        libc.pthread_mutex_lock(mutex)
    while not stop.agree():
        time.sleep(0.01)
    time.sleep(2 * patience)
    print("heard", stop.received)
"""


@linux
@pytest.mark.parametrize(
    "argv, signals, code, says",
    [(["0", "0", "hang"], ["SIGTERM", "SIGHUP"], 128 + signal.SIGHUP, ""),
     (["1", "60", "hang"], ["SIGINT", "SIGINT"], 1,
      "SIGINT, and this process did not come to the end of its step within 1 s\n"),
     (["0.5", "60", "well"], ["SIGTERM", "SIGINT"], 0, ""), ],
    ids=["second signal", "patience", "heard"])
def test_signals_while_the_main_thread_hangs(argv, signals, code, says, tmp_path):
    with subprocess.Popen([sys.executable, "-c", HANGS, *argv], text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, cwd=tmp_path,
                          env=os.environ | {"PYTHONPATH": str(ROOT)},
                          preexec_fn=hang_up(signal.SIG_DFL)) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(getattr(signal, signals[0]))
            assert process.stdout.readline().startswith(f"{signals[0]}: this step is finished")
            process.send_signal(getattr(signal, signals[1]))
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, err) == (code, says)
    assert out == ("heard SIGTERM\n" if code == 0 else "")


@pytest.mark.parametrize("notice", ["SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_what_schedulers_send_before_the_end_is_a_request_and_never_ends_the_process(
    notice, monkeypatch
):
    monkeypatch.setattr(signals, "ECHO", -1.0)  # any second order would end it
    said, before = [], signal.signal(getattr(signal, notice), lambda *_: None)
    try:
        with signals.StopSignals(said.append, SimpleNamespace(world_size=1)) as stop:
            for name in (
                notice,
                notice,
                "SIGTERM",
                notice,
            ):  # at the limit itself, SIGTERM is the first order
                os.kill(os.getpid(), getattr(signal, name))
                end = time.monotonic() + 30
                while not said and time.monotonic() < end:
                    time.sleep(0.01)
    finally:
        signal.signal(getattr(signal, notice), before)
    assert said == [f"{notice}: this step is finished, then the run is saved"
                    ] and stop.received == notice


@linux
def test_a_notice_before_the_first_step_or_after_the_last_waits_for_the_loop(data, tmp_path):
    code = """
import os, signal, sys, train_gpt2
build, train = train_gpt2.build_model, train_gpt2.train
def signalled(function):
    def call(*args):
        os.kill(os.getpid(), signal.SIGUSR1)
        result = function(*args)
        os.kill(os.getpid(), signal.SIGUSR1)
        return result
    return call
train_gpt2.build_model, train_gpt2.train = signalled(build), signalled(train)
train_gpt2.main(sys.argv[1:])
"""
    words = [sys.executable, "-c", code, *command(data, tmp_path / "a", *LONG)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "\nstopped at step 1 of 250" in done.stdout and steps_saved(tmp_path / "a") == [1]


def test_nothing_is_left_open():
    code = """
from types import SimpleNamespace
from lib.signals import StopSignals
with StopSignals(print, SimpleNamespace(world_size=1)):
    pass
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""


@linux
def test_an_echo_that_waits_behind_a_slow_console_is_no_second_signal():
    code = """
import os, signal, sys, time
from types import SimpleNamespace
from lib import signals
signals.ECHO = 0.5
with signals.StopSignals(lambda line: time.sleep(1), SimpleNamespace(world_size=1)) as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    while not stop.received:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)
"""  # the end waits for the thread that listens, which reads both first
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@linux
def test_torchrun_ends_when_a_process_dies(data, tmp_path):
    folder = tmp_path / "a"
    with running(command(data, folder, *TWO), tmp_path / "out.txt",
                 ["--standalone", "--nproc_per_node=2"]) as agent:
        wait_for((folder / "ckpt_00050.pt").exists, agent)
        os.kill(worker(agent, 1), signal.SIGKILL)
        assert agent.wait(30) != 0
    assert "Signal 9 (SIGKILL)" in (tmp_path / "out.txt").read_text()
    assert checkpoint.read(folder / "ckpt_00050.pt")["step"] == 50


@pytest.mark.slow
@linux
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_torchrun_passes_a_signal_on(name, data, tmp_path):
    folder, out = tmp_path / "a", tmp_path / "out.txt"
    handled = [f"--signals-to-handle=SIGTERM,{name}"]  # as the README says
    with running(command(data, folder, *TWO), out,
                 ["--standalone", "--nproc_per_node=2", *handled]) as agent:
        wait_for(lambda: logged(folder) > 20, agent)
        if name == "SIGINT":  # as a terminal does: to every process; torchrun then passes it on once more
            for rank in (0, 1):
                os.kill(worker(agent, rank), signal.SIGINT)
        agent.send_signal(getattr(signal, name))
        agent.wait(60)
    step = steps_saved(folder)[-1]
    assert step < 300 and lines(folder)[-1].startswith(f"{step - 1} train ")
    assert f"stopped at step {step} of 300" in out.read_text() and not list(folder.glob("*.tmp"))
