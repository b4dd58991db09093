"""The provenance of a run: its command, launch, commit and code."""

import contextlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

from lib.cli import launched
from lib.files import replace

ROOT = Path(__file__).resolve().parent.parent


def this_command() -> str:
    """The command that started this process."""
    environment = launched()
    launcher = ["python"]
    if environment:
        launcher = ["torchrun", f"--nproc_per_node={environment['local_world_size']}"]
    return shlex.join([*launcher, *sys.argv])


def launch_id() -> str | None:
    """An id shared by all processes and restarts of one torchrun; None without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    parent = os.getppid()
    started = ""
    with contextlib.suppress(OSError):  # no /proc outside Linux: the process id has to do
        stat = Path(f"/proc/{parent}/stat").read_text()
        started = stat.rpartition(")")[2].split()[19]  # process ids are reused, start times are not
    return f"{os.environ['TORCHELASTIC_RUN_ID']} {parent} {started}"


def commit() -> dict[str, str]:
    """{"commit": hash} if the project is a git checkout, else {}."""
    output = _git("rev-parse", "HEAD")
    return {"commit": output.decode().strip()} if output else {}


def code_changes() -> bytes:
    """The diff against the commit; empty if the project is not a git checkout."""
    return _git("diff", "HEAD") or b""


def save_code(folder: Path, step: int) -> None:
    """Save train_gpt2.py, the running script and the diff against the commit into a run folder.

    A start at `step` with different code saves its own next to it, as <name>_from_<step>.
    """
    contents = {}
    for path in sorted({ROOT / "train_gpt2.py", Path(sys.argv[0]).resolve()}):
        if path.parent == ROOT and path.suffix == ".py":
            contents[path.name] = path.read_bytes()
    contents["code.diff"] = code_changes()
    for name, content in contents.items():
        path = folder / name
        if path.exists() and (not path.is_file() or path.read_bytes() != content):
            path = path.with_name(f"{path.stem}_from_{step:05d}{path.suffix}")
        if content:
            _write(path, content)


def _write(path: Path, content: bytes) -> None:
    replace(path, lambda file: file.write(content))


def _git(*arguments: str) -> bytes | None:
    """The output of a git command; None without git or outside a checkout."""
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
