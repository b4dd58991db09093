"""Remove what a run wrote after a checkpoint, so that these steps can run again."""

import os
import re
from pathlib import Path

from lib import checkpoint
from lib.files import leftovers, replace


def rewind(folder: str | Path, step: int) -> None:
    """Restore a run folder to its state when the checkpoint of `step` was saved.

    Removes half-written files and the lines of log.txt from `step` on. Renames later checkpoints
    (torn, or of an abandoned branch) to ckpt_<step>.pt.aside, or .aside.2 and so on if that name
    is taken, and files of weights likewise. TensorBoard's events are rewound by the Logger.
    """
    folder = Path(folder)
    for name in ("ckpt_*.pt", "weights_*.pt", "*.json", "log.txt"):
        for unfinished in leftovers(folder, name):
            unfinished.unlink()
    for later, path in [*checkpoint.found(folder), *checkpoint.found(folder, "weights")]:
        if later > step:
            os.replace(path, free_name(path.with_suffix(".pt.aside")))
    log = folder / "log.txt"
    log.touch()
    lines = log.read_bytes().splitlines(keepends=True)
    kept = b"".join(line for line in lines if _is_kept(line, step))
    replace(log, lambda file: file.write(kept))


def _is_kept(line: bytes, step: int) -> bool:
    """Whether a line of log.txt is complete and from before `step`."""
    number = re.match(rb"(\d{1,12}) ", line)
    is_earlier = number is None or int(number[1]) < step
    return is_earlier and line.endswith(b"\n")


def free_name(path: Path) -> Path:
    """`path`, or the first of <path>.2, <path>.3, ... if that name is taken."""
    candidate = path
    number = 1
    while os.path.lexists(candidate):
        number += 1
        candidate = path.with_name(f"{path.name}.{number}")
    return candidate
