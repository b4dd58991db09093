"""--sync and --on_end, run by a real shell: python -m pytest tests/lib/test_hooks.py"""

import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT
from runs import LONG, assert_same_runs, command, logged, run_script, stop_when, train

import train_gpt2
from lib import checkpoint, hooks
from lib.cli import BadInput
from lib.hooks import OnEnd, Sync, environment, fill

SECRET = "not-to-be-shown"
# copies a run folder to <place>/<name>, as rclone copy does
COPY = "mkdir -p {place}; cp -r {{folder}} {place}; : " + SECRET
END = 'echo "$RUN_OUTCOME $RUN_STEP/$RUN_STEPS $RUN_NAME rank=$RANK: $RUN_ERROR" >> {path}'


@pytest.fixture
def lines():
    """What a Sync says."""
    return []


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(hooks, "DELAYS", (0.01,))
    monkeypatch.setattr(hooks, "LAST_DELAY", 0.01)


def wait_until(condition):
    while not condition():
        time.sleep(0.005)


def quoted(path):
    """A path as a word of a shell."""
    return shlex.quote(str(path))


def count(path):
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_placeholders_are_quoted_and_the_shells_own_stay(tmp_path):
    folder = tmp_path / "it's a run"
    filled = fill('echo {folder} {name} "${name}" {other} {{}}', folder)
    assert filled == (f"echo {shlex.quote(str(folder))} {shlex.quote(folder.name)} "
                      '"${name}" {other} {{}}')


def test_commands_do_not_take_themselves_for_processes_of_torchrun(monkeypatch, tmp_path):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("TOKEN", SECRET)
    found = environment(tmp_path / "a")
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"} & found.keys()
    assert not [name for name in found if name.startswith("TORCHELASTIC")]
    assert (found["TOKEN"], found["RUN_NAME"]) == (SECRET, "a")


# --------------------------------------------------------------------------------------------------
# --sync, alone


def test_there_is_one_copy_at_a_time_and_the_last_state_is_copied(tmp_path, lines):
    wait = "echo start >> log; while [ ! -e go ]; do sleep 0.01; done; echo end >> log"
    sync = Sync(f"cd {quoted(tmp_path)}; {wait}", tmp_path, lines.append)
    log = tmp_path / "log"
    sync.request()
    wait_until(lambda: count(log) == 1)
    sync.request()
    sync.request()
    assert len(lines) == 2 and all("an earlier state" in line for line in lines)
    (tmp_path / "go").touch()
    wait_until(lambda: count(log) == 4)  # both requests are one copy
    sync.close()
    assert log.read_text() == "start\nend\n" * 3
    assert sum(line.startswith("copied by --sync in ") for line in lines) == 3


def test_a_failed_copy_is_reported_and_tried_again(tmp_path, lines, impatient):
    up = quoted(tmp_path / "up")
    command = f"echo details; test -e {up} || exit 3 # {SECRET}"
    sync = Sync(command, tmp_path, lines.append)
    sync.request()
    wait_until(lambda: len(lines) >= 2)
    (tmp_path / "up").touch()
    wait_until(lambda: lines[-1].startswith("copied"))
    sync.close()
    assert lines[0].startswith(f"warning: --sync failed with exit code 3, see {tmp_path}/sync.log")
    assert "trying again in 0.01 s" in lines[0]
    assert not [line for line in lines if SECRET in line or "details" in line]
    assert "details" in (tmp_path / "sync.log").read_text()


def test_the_last_copy_is_tried_a_few_times(tmp_path, lines, impatient):
    sync = Sync("exit 3", tmp_path, lines.append)
    sync.close()
    assert len(lines) == hooks.ATTEMPTS
    assert lines[-1].startswith("warning: --sync failed: the last state is not copied")
    assert not sync.thread.is_alive()


def test_a_run_does_not_wait_for_ever(tmp_path, lines, monkeypatch):
    monkeypatch.setattr(hooks, "PATIENCE", 0.01)
    go = quoted(tmp_path / "go")
    sync = Sync(f"while [ ! -e {go} ]; do sleep 0.01; done", tmp_path, lines.append)
    sync.close()
    assert "at most 0.01 s" in lines[0]
    assert "it continues without this process" in lines[1]
    (tmp_path / "go").touch()
    sync.thread.join()


# --------------------------------------------------------------------------------------------------
# --on_end, alone

KILLED = """
import os, signal, sys
from pathlib import Path
from lib.hooks import OnEnd
end = OnEnd("echo $RUN_OUTCOME: $RUN_ERROR > ended", Path("a"))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_ends_too(tmp_path):
    (tmp_path / "a").mkdir()
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{KILLED}"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False)
    ended = tmp_path / "ended"
    wait_until(lambda: count(ended))
    assert ended.read_text() == "killed: the process was killed\n"


@pytest.mark.parametrize("outcome, restarts, ends", [
    ("failed", 0, False), ("gave_up", 0, False), ("finished", 0, True), ("failed", 2, True)])
def test_a_run_that_torchrun_restarts_has_not_ended(outcome, restarts, ends, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    end = OnEnd(f"touch {quoted(tmp_path / 'ended')}", tmp_path)
    end.tell(outcome, {})
    assert end.finish() is None
    assert (tmp_path / "ended").exists() == ends


def test_values_may_contain_anything(tmp_path):
    end = OnEnd(f'printf "%s" "$RUN_ERROR" > {quoted(tmp_path / "error")}', tmp_path)
    end.tell("failed", {"error": "it's $HOME;\nend\n`date`"})
    assert end.finish() is None
    assert (tmp_path / "error").read_text() == "it's $HOME; end `date`"


def test_a_command_that_fails_is_reported(tmp_path):
    end = OnEnd("exit 7", tmp_path)
    end.tell("finished", {})
    assert "exit code 7" in end.finish()


@pytest.mark.skipif(not shutil.which("flock"), reason="no flock")
def test_a_machine_is_not_stopped_during_a_copy(tmp_path, lines, monkeypatch):
    log = quoted(tmp_path / "log")
    go = quoted(tmp_path / "go")
    wait = f"echo copying > {log}; while [ ! -e {go} ]; do sleep 0.01; done"
    sync = Sync(wait, tmp_path, lines.append)
    sync.request()
    wait_until(lambda: count(tmp_path / "log"))
    monkeypatch.setattr(hooks, "END_PATIENCE", 0.1)
    end = OnEnd(f"echo stop >> {log}", tmp_path)
    end.tell("stopped", {})
    assert "still running" in end.finish()
    assert (tmp_path / "log").read_text() == "copying\n"
    (tmp_path / "go").touch()
    wait_until(lambda: count(tmp_path / "log") == 2)
    sync.close()


# --------------------------------------------------------------------------------------------------
# Whole runs


def test_a_fresh_machine_continues_from_the_copy(whole, data, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "log" / "a"
    place = tmp_path / "elsewhere"
    copy = COPY.format(place=quoted(place))
    ended = tmp_path / "ended"
    flags = ["--sync", copy, "--on_end", END.format(path=quoted(ended))]
    stop_when(monkeypatch, lambda: logged(folder) >= 120)
    train(data, folder, *LONG, *flags)
    monkeypatch.undo()
    assert (place / "a" / "log.txt").read_bytes() == (folder / "log.txt").read_bytes()
    assert ended.read_text().startswith("stopped 12")

    shutil.rmtree(folder)
    shutil.copytree(place / "a", folder)  # the one command
    train(data, folder, *LONG)  # keeps the commands
    assert_same_runs(folder, whole("long", *LONG))
    assert_same_runs(place / "a", whole("long", *LONG))
    assert ended.read_text().splitlines()[1:] == ["finished 250/250 a rank=: "]

    printed = capsys.readouterr()
    assert "copied by --sync in" in printed.out
    assert SECRET not in printed.out + printed.err
    shown = b"".join(path.read_bytes() for path in folder.glob("events.*"))
    assert SECRET.encode() not in shown


def test_other_commands_are_named_but_not_shown(data, tmp_path, capsys):
    folder = train(data, tmp_path / "a", "--max_steps", 4, "--sync", "true", "--on_end", "true")
    train(data, folder, "--max_steps", 6, "--sync", f"true {SECRET}")
    printed = capsys.readouterr().out
    assert "--sync changed" in printed
    assert SECRET not in printed
    state = checkpoint.read(folder / "ckpt_00006.pt")["train_config"]
    assert (state["sync"], state["on_end"]) == (f"true {SECRET}", "true")
    weights = checkpoint.read(folder / "weights_00006.pt")
    assert not {"sync", "on_end"} & weights["train_config"].keys()
    # a new run with these settings must not write over the copies of the first
    train_gpt2.main(["--config", str(folder), "--log_dir", str(tmp_path), "--run_name", "b"])
    assert checkpoint.read(tmp_path / "b" / "ckpt_00006.pt")["train_config"]["sync"] is None


def test_how_a_run_ends(data, tmp_path):
    ended = tmp_path / "ended"
    end = ["--on_end", END.format(path=quoted(ended))]
    train(data, tmp_path / "limit", *end, "--max_hours", 1e-9, "--eval_every", 0)
    with pytest.raises(BadInput, match="non-finite"):
        train(data, tmp_path / "skips", *end, "--max_lr", 1e6, "--save_every", 0)
    with pytest.raises(BadInput, match="nowhere"):
        train(data, tmp_path / "fails", *end, "--hellaswag_every", 2, "--hellaswag_file", "nowhere")
    limit, skips, fails = ended.read_text().splitlines()
    assert limit == "limit 1/60 limit rank=: "
    assert skips.startswith("gave_up 1") and "steps were non-finite" in skips
    assert fails.startswith("failed / fails rank=: cannot read nowhere")
    assert not (tmp_path / "fails").exists()


def test_one_of_several_processes_runs_the_commands(data, tmp_path):
    end = "echo $RUN_OUTCOME rank=$RANK"
    flags = command(data, tmp_path / "a", "--micro_batch", 2, "--sync", "echo one copy",
                    "--on_end", end)
    done = run_script("train_gpt2.py", *flags, cwd=tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a" / "on_end.log").read_text() == "finished rank=\n"
    copies = (tmp_path / "a" / "sync.log").read_text().splitlines()
    assert copies.count("one copy") == len(copies) / 2 <= 9
    assert "one copy" not in done.stdout
    assert Path(tmp_path / "a" / "ckpt_00060.pt").exists()
