"""Runs that are stopped by a signal: python -m pytest tests/lib/test_signals.py"""

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
def test_a_stopped_run_is_saved_and_continues(name, whole, data, tmp_path):
    folder = tmp_path / "a"
    out = tmp_path / "out.txt"
    nohup = name == "SIGTERM"
    on_hangup = signal.SIG_IGN if nohup else signal.SIG_DFL
    with running(command(data, folder, *LONG), out, on_hangup=on_hangup) as process:
        wait_for(lambda: logged(folder) > 20, process)
        if nohup:  # the run ignores that its terminal is closed
            seen = logged(folder)
            process.send_signal(signal.SIGHUP)
            wait_for(lambda: logged(folder) > seen + 20, process)
        if name == "SIGINT":
            with pytest.raises(BadInput, match="in use by another process"):
                train(data, folder, *LONG)
        process.send_signal(getattr(signal, name))
        if name == "SIGTERM":  # again, as timeout(1) signals its child, then the child's group
            wait_for(lambda: "SIGTERM: this" in out.read_text(), process)
            process.send_signal(signal.SIGTERM)
        assert process.wait(600) == 0
    step = len(lines(folder))
    assert step < 250
    assert lines(folder)[-1].startswith(f"{step - 1} train ")
    printed = out.read_text()
    assert printed.count(f"{name}: this step is finished, then the run is saved; "
                         "another signal after 2 s ends it at once\n") == 1
    assert (f"\nstopped at step {step} of 250: run the same command again with --run_name a "
            "to continue\n") in printed
    assert "Traceback" not in printed
    assert steps_saved(folder)[-1] == step
    assert not list(folder.glob("*.tmp"))
    train(data, folder, *LONG)
    assert_same_runs(folder, whole("long", *LONG))


@pytest.mark.parametrize("step", [8, 60], ids=["first evaluation", "last"])
def test_a_signal_during_an_evaluation_stops_the_run_after_it(step, whole, data, tmp_path,
                                                              monkeypatch, capsys):
    folder = tmp_path / "a"
    evaluate = train_gpt2.mean_loss
    steps = iter([*range(8, 60, 8), 60])  # of the evaluations
    signals_seen = []

    def listening(*args):
        signals_seen.append(signals.StopSignals(*args))
        return signals_seen[-1]

    def stopped(*args):
        if next(steps) == step:
            os.kill(os.getpid(), signal.SIGTERM)
            while signals_seen[-1].received is None:
                time.sleep(0.001)
        return evaluate(*args)

    monkeypatch.setattr(train_gpt2, "StopSignals", listening)

    monkeypatch.setattr(train_gpt2, "mean_loss", stopped)
    sampling = [*KINDS["gpt2"], "--sample_every", "4"]
    train(data, folder, *sampling)
    assert f"stopped at step {step} of 60" in capsys.readouterr().out
    assert steps_saved(folder)[-1] == step
    monkeypatch.undo()
    train(data, folder, *sampling)
    out = capsys.readouterr().out
    assert "\ndone: " in out
    assert "\n> " in out  # the samples of the last step
    assert_same_runs(folder, whole("gpt2", "--sample_every", "4"))
    train(data, folder, *sampling)
    assert "is the end of a run of 60 steps" in capsys.readouterr().out


def test_a_run_outlives_its_console(data, tmp_path, whole):
    folder = tmp_path / "a"
    words = [sys.executable, ROOT / "train_gpt2.py",
             *command(data, folder, *LONG, "--log_every", 1)]
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while not process.stdout.readline().startswith(b"step 10 |"):
        assert process.poll() is None
    process.stdout.close()  # as Ctrl-C ends `| tee`
    seen = logged(folder)
    wait_for(lambda: logged(folder) > seen + 5, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(600) == 0
    assert steps_saved(folder)[-1] == len(lines(folder)) > 10
    train(data, folder, *LONG)
    assert_same_runs(folder, whole("long", *LONG))


@pytest.mark.parametrize("console", [">&- 2>&-", "> /dev/full"])
def test_a_run_without_a_console_is_saved(console, data, tmp_path):
    words = [sys.executable, str(ROOT / "train_gpt2.py"),
             *command(data, tmp_path / "a", "--max_steps", "4")]
    done = subprocess.run(f"{shlex.join(words)} {console}", shell=True, cwd=tmp_path, check=False)
    assert done.returncode == 0
    assert steps_saved(tmp_path / "a") == [4]
    assert len(lines(tmp_path / "a")) == 5


# the main thread hangs outside of Python, as in a collective after another process has died
HANGS = """
import ctypes, sys, time
from types import SimpleNamespace
from lib import signals
patience = float(sys.argv[1])
signals.PATIENCE = patience
signals.ECHO = float(sys.argv[2])
hang = sys.argv[3] == "hang"
processes = SimpleNamespace(world_size=2 if patience else 1, distributed=patience > 0,
                            sum=lambda values: values)
with signals.StopSignals(lambda line: print(line, flush=True), processes) as stop:
    print("ready", flush=True)
    if hang:
        mutex = ctypes.create_string_buffer(64)
        libc = ctypes.CDLL(None)
        libc.pthread_mutex_lock(mutex)
        libc.pthread_mutex_lock(mutex)
    while not stop.agree():
        time.sleep(0.01)
    time.sleep(1.5 * patience)
    print("heard", stop.received)
"""


@linux
@pytest.mark.parametrize("argv, signals, code", [
    (["0", "0", "hang"], ["SIGTERM", "SIGHUP"], 128 + signal.SIGHUP),
    (["1", "60", "hang"], ["SIGINT", "SIGINT"], 1),
    (["3", "60", "well"], ["SIGTERM", "SIGINT"], 0),
], ids=["second signal", "patience", "heard"])
def test_signals_while_the_main_thread_hangs(argv, signals, code, tmp_path):
    with subprocess.Popen([sys.executable, "-c", HANGS, *argv], text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, cwd=tmp_path,
                          env=os.environ | {"PYTHONPATH": str(ROOT)},
                          preexec_fn=hang_up(signal.SIG_DFL)) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(getattr(signal, signals[0]))
            assert process.stdout.readline().startswith(f"{signals[0]}: this step is finished")
            process.send_signal(getattr(signal, signals[1]))
            out, err = process.communicate(timeout=600)
        finally:
            process.kill()
    assert process.returncode == code
    assert err.count("\n") == (code == 1)  # it says that the step was not finished
    assert out == ("heard SIGTERM\n" if code == 0 else "")


@pytest.mark.parametrize("notice", ["SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_a_scheduler_s_notice_is_a_request_and_never_ends_the_process(notice, monkeypatch):
    monkeypatch.setattr(signals, "ECHO", -1.0)  # any second order would end it
    number = getattr(signal, notice)
    before = signal.signal(number, lambda *_: None)
    said = []
    try:
        with signals.StopSignals(said.append, SimpleNamespace(world_size=1)) as stop:
            # at the time limit comes SIGTERM, which is the first order
            for sent in (number, number, signal.SIGTERM, number):
                os.kill(os.getpid(), sent)
                while not said:
                    time.sleep(0.01)
    finally:
        signal.signal(number, before)
    assert said == [f"{notice}: this step is finished, then the run is saved"]
    assert stop.received == notice


@linux
def test_notices_outside_of_the_training_loop_wait_for_it(data, tmp_path):
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
    assert "\nstopped at step 1 of 250" in done.stdout
    assert steps_saved(tmp_path / "a") == [1]


def test_nothing_is_left_open():
    code = """
from types import SimpleNamespace
from lib.signals import StopSignals
with StopSignals(print, SimpleNamespace(world_size=1)):
    pass
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT,
                          capture_output=True, text=True, check=True)
    assert done.stderr == ""


@linux
def test_a_repeat_read_after_a_slow_console_is_not_a_second_signal():
    code = """
import os, signal, time
from types import SimpleNamespace
from lib import signals
now = [0.0]
signals.time = SimpleNamespace(monotonic=lambda: now[0])
def say(line):
    now[0] += 2 * signals.ECHO
with signals.StopSignals(say, SimpleNamespace(world_size=1)) as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    while not stop.received:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)
"""  # __exit__ waits for the listening thread, which reads both first
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@linux
def test_torchrun_ends_when_a_process_dies(data, tmp_path):
    folder = tmp_path / "a"
    with running(command(data, folder, *TWO), tmp_path / "out.txt",
                 ["--standalone", "--nproc_per_node=2"]) as agent:
        wait_for((folder / "ckpt_00050.pt").exists, agent)
        os.kill(worker(agent, 1), signal.SIGKILL)
        assert agent.wait(600) != 0
    assert "Signal 9 (SIGKILL)" in (tmp_path / "out.txt").read_text()
    assert checkpoint.read(folder / "ckpt_00050.pt")["step"] == 50


@pytest.mark.slow
@linux
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_torchrun_passes_a_signal_on(name, data, tmp_path):
    folder, out = tmp_path / "a", tmp_path / "out.txt"
    handled = [f"--signals-to-handle=SIGTERM,{name}"]  # as the docs say
    with running(command(data, folder, *TWO), out,
                 ["--standalone", "--nproc_per_node=2", *handled]) as agent:
        wait_for(lambda: logged(folder) > 20, agent)
        if name == "SIGINT":  # a terminal sends it to every process, and torchrun passes it on
            for rank in (0, 1):
                os.kill(worker(agent, rank), signal.SIGINT)
        agent.send_signal(getattr(signal, name))
        agent.wait(600)
    step = steps_saved(folder)[-1]
    assert step < 300
    assert lines(folder)[-1].startswith(f"{step - 1} train ")
    assert f"stopped at step {step} of 300" in out.read_text()
    assert not list(folder.glob("*.tmp"))
