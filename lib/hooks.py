"""Shell commands of a run: --sync copies its folder elsewhere after each save, --on_end runs at
its end.

Both run in sessions of their own, so they outlive a killed run, and Ctrl-C does not reach them. As
they may contain secrets, neither a command nor its output is printed: the output goes to sync.log
and on_end.log in the run folder.
"""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from lib.cli import BadInput

COMMANDS = ("sync", "on_end")  # flags
PLACEHOLDER = re.compile(r"(?<!\$)\{(folder|name)\}")  # but not the shell's ${name}
# set by torchrun; Python in a command must not take itself for one of torchrun's processes
LAUNCHER = re.compile(r"(RANK|WORLD_SIZE|MASTER_\w+|(TORCHELASTIC|LOCAL|GROUP|ROLE)_\w+)")

DELAYS = (30.0, 60.0, 120.0, 300.0, 600.0)  # seconds between attempts at a copy; then the last
LAST_DELAY = 5.0  # seconds between attempts at the last copy
ATTEMPTS = 3      # at the last copy
PATIENCE = 900.0  # seconds that a run, and then --on_end, wait for the last copy
END_PATIENCE = 60.0  # seconds that a run waits for --on_end
RESTARTED = ("failed", "gave_up", "killed")  # outcomes after which torchrun restarts a run

# Reads lines of code from the run when it ends; there are none if the run is killed. A copy that
# --sync has not finished holds the lock of sync.log: the command may stop the machine.
WATCH = """
export RUN_OUTCOME="$2" RUN_ERROR="the process was killed"
while IFS= read -r line && [ "$line" != end ]; do eval "$line"; done
[ -n "$RUN_OUTCOME" ] || exit 0
copy="$RUN_FOLDER/sync.log"
[ -f "$copy" ] && command -v flock > /dev/null && flock -w "$3" "$copy" true
log=/dev/null
[ -f "$RUN_FOLDER/config.json" ] && log="$RUN_FOLDER/on_end.log"
exec sh -c "$1" >> "$log" 2>&1
"""


def check_commands(cfg: Any) -> None:
    """Raises BadInput if --sync or --on_end is given and there is no shell to run it."""
    for name in COMMANDS:
        if getattr(cfg, name) and not shutil.which("sh"):
            raise BadInput(f"--{name} needs a POSIX shell, sh: leave it out, or use WSL on Windows")


def fill(command: str, folder: Path) -> str:
    """A command with {folder} and {name} replaced by the run folder and its name, quoted."""
    values = {"folder": str(folder), "name": folder.name}
    return PLACEHOLDER.sub(lambda match: shlex.quote(values[match[1]]), command)


def environment(folder: Path) -> dict[str, str]:
    """The environment of a command: this process's, without torchrun's part, and the run's."""
    kept = {name: value for name, value in os.environ.items() if not LAUNCHER.fullmatch(name)}
    return kept | {"RUN_FOLDER": str(folder), "RUN_NAME": folder.name}


def without_commands(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that may be shown."""
    return {name: value for name, value in settings.items() if name not in COMMANDS}


# --------------------------------------------------------------------------------------------------
# --sync


class Sync:
    """Runs --sync in the background after each `request`, one copy at a time.

    Requests during a copy lead to one more copy. A failed copy is tried again, at the latest when
    the next one is requested. A thread waits for the commands, so only `close` blocks.
    """

    def __init__(self, command: str, folder: Path, say: Callable[[str], Any]):
        folder = folder.absolute()
        self.command = fill(command, folder)
        self.environment = environment(folder)
        self.log = folder / "sync.log"
        self.say = say
        self.wanted = 0  # number of the latest state that was requested
        self.copied = 0  # number of the state in the latest copy
        self.started: float | None = None  # time of the copy in progress
        self.is_closing = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._work, name="sync", daemon=True)
        self.thread.start()

    def request(self) -> None:
        """Copy the folder as it is now."""
        with self.changed:
            self.wanted += 1
            self.changed.notify()
        started = self.started
        if started:
            seconds = time.monotonic() - started
            self.say(f"--sync has been copying an earlier state for {seconds:.0f} s, this one "
                     "waits")

    def close(self) -> None:
        """Copy the last state and wait for it, at most PATIENCE seconds."""
        with self.changed:
            self.wanted += 1
            self.is_closing = True
            self.changed.notify()
        self.thread.join(1)
        if self.thread.is_alive():
            self.say(f"--sync: waiting for the copy of the last state, at most {PATIENCE:g} s")
            self.thread.join(PATIENCE)
        if self.thread.is_alive():
            self.say("warning: --sync has not finished copying the last state: it continues "
                     f"without this process, see {self.log}")
        elif self.copied < self.wanted:
            self.say(f"warning: --sync failed: the last state is not copied, see {self.log}")

    def _work(self) -> None:
        failures = 0
        last_failures = 0  # of the last copy
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.wanted > self.copied or self.is_closing)
                state = self.wanted
                is_last = self.is_closing
            if state == self.copied:
                return
            code = self._copy()
            if code == 0:
                self.copied = state
                failures = 0
                continue
            failures += 1
            last_failures += is_last
            if last_failures == ATTEMPTS:
                return
            delay = LAST_DELAY if is_last else DELAYS[min(failures, len(DELAYS)) - 1]
            sooner = "" if is_last else ", or after the next save"
            self.say(f"warning: --sync failed with exit code {code}, see {self.log}: trying again "
                     f"in {delay:g} s{sooner}")
            self._wait(state, delay)

    def _wait(self, state: int, delay: float) -> None:
        """Wait `delay` seconds, or until a later state than `state` is to be copied."""
        with self.changed:
            self.changed.wait_for(lambda: self.wanted > state, delay)

    def _copy(self) -> int:
        """Run the command -> its exit code."""
        self.started = time.monotonic()
        try:
            code = self._run()
        finally:
            seconds = time.monotonic() - self.started
            self.started = None
        if code == 0:
            self.say(f"copied by --sync in {seconds:.1f} s")
        return code

    def _run(self) -> int:
        try:
            with open(self.log, "ab") as log:
                lock(log)
                log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
                log.flush()
                process = subprocess.Popen(
                    ["sh", "-c", self.command], stdin=subprocess.DEVNULL, stdout=log,
                    stderr=log, env=self.environment, start_new_session=True)
            return process.wait()
        except OSError as error:  # the folder was removed, or no process can be started
            return error.errno or 1


def lock(file: IO[bytes]) -> None:
    """Wait for the lock of an open file. A command whose output is the file holds the lock, too, so
    it never runs beside the command of an earlier, killed run."""
    with contextlib.suppress(ImportError, OSError):  # not on Windows or on every file system
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)


# --------------------------------------------------------------------------------------------------
# --on_end


class OnEnd:
    """Runs --on_end once the run has ended: a shell waits for `finish`, or for the run's death.

    Call `tell` before.
    """

    def __init__(self, command: str, folder: Path):
        folder = folder.absolute()
        # torchrun restarts a killed run, which then has not ended
        outcome = "" if is_restarted("killed") else "killed"
        self.process = subprocess.Popen(
            ["sh", "-c", WATCH, "on_end", fill(command, folder), outcome, str(PATIENCE)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env=environment(folder), start_new_session=True)

    def tell(self, outcome: str, values: dict[str, Any]) -> None:
        """Set RUN_OUTCOME and RUN_<name> of `values` in the command's environment.

        A run that torchrun restarts has not ended: its command will not run.
        """
        if is_restarted(outcome):
            outcome = ""
        lines = []
        for name, value in {"outcome": outcome, **values}.items():
            text = "" if value is None else " ".join(str(value).split())
            lines.append(f"export RUN_{name.upper()}={shlex.quote(text)}\n")
        assert self.process.stdin
        with contextlib.suppress(OSError):  # it was killed
            self.process.stdin.write("".join(lines).encode(errors="replace"))
            self.process.stdin.flush()

    def finish(self) -> str | None:
        """Run the command, wait for it at most END_PATIENCE seconds -> a line on failure, or None.
        """
        try:
            self.process.communicate(b"end\n", END_PATIENCE)
        except subprocess.TimeoutExpired:
            return "--on_end is still running: it continues without this process"
        if self.process.returncode:
            return (f"warning: --on_end failed with exit code {self.process.returncode}, see "
                    "on_end.log in the run folder")
        return None


def is_restarted(outcome: str) -> bool:
    """Whether torchrun restarts this process after such an outcome (--max_restarts)."""
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    most = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    return outcome in RESTARTED and restarts < most
