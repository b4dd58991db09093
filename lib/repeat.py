"""--config: the settings of an earlier run for a new one, and what they cannot repeat."""

import os
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from lib.budget import LENGTHS
from lib.cli import BadInput, note, resolve
from lib.files import read_json
from lib.hooks import COMMANDS
from lib.plan import Settings
from lib.provenance import code_changes, commit
from lib.resume import START_FLAGS, TEXT_FLAGS
from lib.streams import CorpusLike

REMEDY = "name another --config"


def read_settings(flags: dict[str, Any], *classes: type) -> dict[str, Any]:
    """The settings of the run that --config names, as one source of `resolve`; {} without it.

    flags: those given. classes: the configs of the script. Left out are settings of one start, such
    as run_name, and commands, which may write over that run's copies. A setting younger than the
    file is at its default, off, whatever today's preset says. Raises BadInput if the file is not of
    a run of this script.
    """
    if "config" not in flags:
        return {}
    if "preset" in flags:
        raise BadInput("--config and --preset each choose all settings: give one of them")
    path, config = read(flags["config"])
    settings = [field for cls in classes for field in fields(cls)]
    takes_checkpoint = any(setting.name == "checkpoint" for setting in settings)
    if takes_checkpoint != ("checkpoint" in config["train"]):
        raise BadInput(f"{path} is of another script's run: {REMEDY}")
    before = config["train"] | config["model"]
    found = {}
    for setting in settings:
        if setting.name in START_FLAGS | {"config", *COMMANDS} or not setting.metadata["help"]:
            continue
        value = before.get(setting.name, setting.default)
        found[setting.name] = tuple(value) if isinstance(value, list) else value
    try:
        for cls in classes:
            resolve(cls(), found)
    except BadInput as error:
        raise BadInput(f"{path}: {error}; {REMEDY}") from error
    return found


def read(name: str) -> tuple[Path, dict[str, Any]]:
    """A config.json, or the run folder that holds it -> (its path, its content). Raises BadInput.
    """
    path = Path(name)
    if os.path.isdir(path):
        path = path / "config.json"
    config = read_json(path, REMEDY)
    is_run = isinstance(config, dict) and isinstance(config.get("train"), dict)
    if not is_run or not isinstance(config.get("model"), dict):
        raise BadInput(f"{path} is not the config.json of a run: {REMEDY}")
    return path, config


def note_differences(settings: Settings, corpus: CorpusLike) -> None:
    """Print a line for each thing that a new run with --config does not repeat.

    corpus: the data of the new run.
    """
    name = settings.train.config
    if not name or settings.resume:  # a resumed run has the settings of its checkpoint
        return
    path, config = read(name)
    for line in differences(path, config, settings, corpus):
        note(f"--config {path} is not repeated exactly: {line}")


def differences(path: Path, config: dict[str, Any], settings: Settings,
                corpus: CorpusLike) -> list[str]:
    found = []
    known = (corpus.identity, corpus.former_identity)
    if not settings.explicit & TEXT_FLAGS and config.get("data") not in known:
        found.append(f"its training data is not what {shlex.join(settings.train.data)} holds now")
    starts = [start for start in config.get("starts") or () if isinstance(start, dict)] or [{}]
    found += other_code(path.parent, starts)
    if config.get("torch") != torch.__version__:
        found.append(f"torch {config.get('torch')} ran it, this is {torch.__version__}")
    if starts[0].get("step"):
        found.append(f"it began at step {starts[0]['step']} of {starts[0].get('from')}")
    for start in starts:
        if start.get("changed"):
            found.append(f"its settings changed at step {start.get('step')}: {start['changed']}")
    if settings.train.minutes and not settings.explicit & set(LENGTHS):
        steps = config.get("max_steps")
        found.append(f"its --minutes were {steps} steps: for as many, give --max_steps {steps}")
    return found


def other_code(folder: Path, starts: list[dict[str, Any]]) -> list[str]:
    """A line if this code is not that of the run in `folder`, as far as git knows; else none."""
    before = starts[-1].get("commit")
    now = commit().get("commit")
    if before != now:
        return [f"commit {before or 'unknown'} ran it, this is {now or 'unknown'}"]
    if now is None:  # not a git checkout
        return []
    path = folder / "code.diff"
    changes = path.read_bytes() if path.is_file() else b""
    if changes != code_changes():
        return [f"the changes on top of commit {now} are not those of {path}"]
    return []
