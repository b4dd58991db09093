"""Existing run folders: whether one may be written to, and which one to continue."""

import os
import re
from pathlib import Path
from typing import Any

from lib import checkpoint, nodes
from lib.cli import BadInput
from lib.files import leftovers, read_json
from lib.provenance import launch_id, this_command


def check_name(name: str) -> None:
    """Raises BadInput unless `name` can name a single folder.

    An empty name (an unset variable in a start script) would start a new run every time.
    """
    unusable = not name.strip() or name in (".", "..") or len(name.encode()) > 200
    if unusable or re.search(r"[/\\\0\n\r]", name):
        raise BadInput(f"--run_name {name!r} is not the name of a folder: give a plain name; "
                       "--log_dir is its parent folder")


def check_ours(folder: Path) -> None:
    """Raises BadInput if `folder` has files but is not a run folder of this project.

    Resuming rewinds, replaces and removes files, so no other folder may be mistaken for a run.
    """
    if has_foreign_config(folder):
        raise BadInput(f"{folder} is not a run folder, its config.json is another program's: "
                       "give another --run_name")
    if not os.path.isdir(folder) or read_config(folder) or checkpoint.found(folder):
        return
    unfinished = {path.name for path in leftovers(folder, "config.json")}
    if any(path.name not in unfinished for path in folder.iterdir()):
        raise BadInput(f"{folder} is not a run folder, it has no config.json of a run: "
                       "give another --run_name")


def has_foreign_config(folder: Path) -> bool:
    """Whether config.json is another program's, e.g. a Hugging Face model's.

    A damaged one may be a run's.
    """
    config = read_config(folder)
    return bool(config) and not {"train", "starts"} & config.keys()


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a run folder; {} if it cannot be read, since no run depends on it."""
    try:
        config = read_json(folder / "config.json", "")
    except BadInput:
        return {}
    return config if isinstance(config, dict) else {}


def starts(folder: Path) -> list[dict[str, Any]]:
    """What config.json records about each start of a run, oldest first."""
    recorded = read_config(folder).get("starts")
    if not isinstance(recorded, list):
        return []
    return [start for start in recorded if isinstance(start, dict)]


def restarted(log_dir: str) -> Path | None:
    """The folder of the run that this torchrun started before --max_restarts restarted it."""
    counted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    # a torchrun does not count a restart that another node caused
    if not counted and not (nodes.several() and launch_id()):
        return None
    for path in Path(log_dir).glob("*/config.json"):
        recorded = starts(path.parent)
        if recorded and recorded[-1].get("launch") == launch_id():
            return path.parent
    return None


def interrupted(log_dir: str) -> Path | None:
    """The folder of the last run that this same command started, unless that run is finished."""
    own = {}  # time of the start -> folder
    for path in Path(log_dir).glob("*/config.json"):
        for start in starts(path.parent):
            if start.get("command") == this_command():
                own[str(start.get("time"))] = path.parent
    if not own:
        return None
    latest = own[max(own)]
    return None if is_finished(latest) else latest


def is_finished(folder: Path) -> bool:
    """Whether the newest checkpoint of a run folder is from the end of the run."""
    found = checkpoint.found(folder)
    length = read_config(folder).get("max_steps")
    if not found or not isinstance(length, int):
        return False
    step, path = found[0]
    if step < length:
        return False
    try:
        return bool(checkpoint.read(path).get("finished", True))
    except BadInput:  # torn: the run continues from the checkpoint before
        return False
