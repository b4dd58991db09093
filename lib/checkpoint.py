"""One checkpoint file: name it, write it, read it, verify it.

A checkpoint is a dict of tensors, numbers, strings, lists and dicts, ckpt_<step>.pt, as torch.save
writes it: a zip archive whose every record carries a CRC-32. torch.load does not look at these;
`read` does. It is written under a temporary name, flushed to the disk, then renamed.
"""

import contextlib
import errno
import os
import re
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch

from lib.cli import BadInput, RankError, flag, note, path_flag
from lib.files import check_room, open_file, read_json, replace

NAME = re.compile(r"ckpt_([0-9]{1,12})\.pt")
# errors of reading that say nothing about the file
NOT_THE_FILE = (errno.EIO, errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.ESTALE)
NO_ROOM = "free some disk space, or --keep fewer; the checkpoints already there are whole"


def found(folder):
    """The checkpoints of a run folder by their names: list of (step, path), newest first."""
    names = [(NAME.fullmatch(path.name), path)
             for path in Path(folder).glob("ckpt_*.pt")] if os.path.isdir(folder) else []
    return sorted(((int(match[1]), path) for match, path in names if match), reverse=True)


class Torn(BadInput):
    """A file that could be read, and is not a whole checkpoint."""


def path_of(folder, step):
    return Path(folder) / f"ckpt_{step:05d}.pt"


DIFFERENT = "the processes found different checkpoints: name one ckpt_<step>.pt"
GPT2 = Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]


@dataclass(frozen=True)
class ModelConfig:
    """The flags that name a trained model, for train_gpt2.py's `load_checkpoint`."""

    checkpoint: str | None = path_flag(
        None, "a run folder: its best checkpoint where --keep_best kept it, else the newest; "
              "a ckpt_<step>.pt; or a folder that export_hf.py made")
    model: GPT2 | None = flag(None, "OpenAI's GPT-2 instead, from Hugging Face")


def named(cfg):
    """The name that a ModelConfig gives. Raises BadInput unless one of its flags is given."""
    if (cfg.checkpoint is None) == (cfg.model is None):
        raise BadInput("name either --checkpoint or --model, for instance --checkpoint log/<run>")
    return cfg.checkpoint or cfg.model


def is_hugging_face(name):
    """Whether lib/huggingface.py reads it: one of OpenAI's models, or a folder of transformers."""
    if name in get_args(GPT2):
        return True
    if not os.path.isdir(name) or found(name):
        return False
    path = Path(name, "config.json")
    config = read_json(path, "name another") if path.exists() else {}
    return isinstance(config, dict) and "model_type" in config  # which a run's config.json has not


def pick(name):
    """The name of a model -> what to load; of a run folder a checkpoint, after a line that says
    which.

    That is the one of the lowest validation loss, where --keep_best kept it, else the newest that
    is whole. Raises BadInput if there is none.
    """
    if is_hugging_face(name):
        return name
    if not os.path.isdir(name):
        open_file(name, "name a run folder under log/, or a ckpt_<step>.pt in one").close()
        return name
    candidate = newest(name, note, "name another run folder")
    if candidate is None:
        raise BadInput(f"{name} holds neither a ckpt_<step>.pt nor a model of transformers: "
                       "name a run folder under log/")
    path, state = candidate
    what = "the newest"
    with ours(path):
        if best := state.get("best"):
            loss, step = best
            if path_of(name, step).exists():
                path = path_of(name, step)
                what = f"the best, of validation loss {loss:.4f}"
    note(f"{name}: {path.name}, {what}")
    return str(path)


def leads_to(name, picked):
    """Whether `picked` is what a user names: itself, or a checkpoint of that run folder."""
    places = [picked]
    if NAME.fullmatch(os.path.basename(picked)):
        places.append(os.path.dirname(picked))
    return name == picked or os.path.realpath(name) in map(os.path.realpath, places)


@contextlib.contextmanager
def ours(path):
    """While a checkpoint's content is taken for one of this project: whatever it holds instead ends
    as BadInput."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error
    except Exception as error:
        lack = f"it holds no {error.args[0]}" if isinstance(
            error, KeyError) and error.args else type(error).__name__
        raise BadInput(
            f"{path} is not a checkpoint of this project ({lack}): name one that train_gpt2.py wrote"
        ) from error


def read(path):
    """A checkpoint, its tensors on the CPU, memory-mapped where the system allows it.

    Raises Torn if it is torn, damaged or foreign, else BadInput. Loaded with weights_only=True:
    nothing in a downloaded file can run.
    """
    open_file(path, "name a ckpt_<step>.pt of a folder under log/").close()
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            if (any(r.compress_type != zipfile.ZIP_STORED for r in records)
                    or sum(r.file_size for r in records) > os.path.getsize(path)):
                raise ValueError("compressed or overlapping records"
                                 )  # torch.save makes none, and they could be of any size
            if damaged := archive.testzip():
                raise ValueError(f"checksum of {damaged}")
        state = _load(path)
        if not isinstance(state, dict):
            raise TypeError(type(state).__name__)
        if any(t.device.type != "cpu" or t.layout != torch.strided or t.is_complex()
               or t.is_quantized for t in tensors(state)):
            # torch.load makes them, a model fails on them
            raise TypeError("a tensor without data, sparse, complex or quantized")
        return state
    except Exception as error:  # zipfile and torch.load raise many kinds on a foreign or torn file
        reason = f"{type(error).__name__}: {str(error)[:80]}"
        if is_memory(error):
            size = f"{os.path.getsize(path) / 1e9:.2f} GB"
            raise RankError(f"cannot read {path} ({reason}): it needs {size} of memory, "
                            "free some, or raise `ulimit -v`") from error
        if getattr(error, "errno", None) in NOT_THE_FILE:
            raise RankError(f"cannot read {path} ({reason}): fix that and start again") from error
        raise Torn(f"{path} is not a whole checkpoint of this project ({reason}): "
                   "try an earlier ckpt_<step>.pt") from error


def check_finite(weights, path):
    """Raises BadInput if a checkpoint's weights, {name: tensor}, hold NaN or infinity: nothing can
    be trained from them."""
    if bad := [name for name, weight in weights.items() if not weight.isfinite().all()]:
        raise BadInput(
            f"{path} holds weights that are NaN or infinite ({bad[0]}): name an earlier ckpt_<step>.pt"
        )


def _load(path):
    load = partial(torch.load, path, map_location="cpu", weights_only=True)
    try:
        return load(mmap=True)
    except RuntimeError as error:
        if "unable to mmap" not in str(error):
            raise
    return load(mmap=False)  # a file system without it, or `ulimit -v`


def is_memory(error):
    """Whether an error is want of memory: torch has no class of its own for that."""
    if isinstance(error, RuntimeError):
        return bool(re.search("allocate memory|not enough memory", str(error)))
    return isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM


def newest(folder, warn, remedy="move them away to begin again there, or give another --run_name"):
    """(path, state) of the newest whole checkpoint of a run folder, or None if there are none at
    all.

    Torn ones are skipped, after `warn` has been called with a line about each. Raises BadInput if
    all are torn.
    """
    candidates = found(folder)
    for _, path in candidates:
        try:
            return path, read(path)
        except Torn as error:
            warn(f"skipped: {error}")
    if candidates:
        raise BadInput(f"none of the checkpoints in {folder} is whole: {remedy}")
    return None


def write(path, state):
    """Write `state` so that `path` is never half a checkpoint. Raises BadInput if there is no room
    or no permission."""
    check_room(Path(path).parent, n_bytes(state), "a checkpoint", NO_ROOM)
    try:
        replace(path, lambda file: torch.save(state, file))
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        raise BadInput(f"cannot save {path} ({type(error).__name__}: {str(error)[:80]}): free some disk space, "
                       "or see to the disk; the checkpoints before it stay") from error


def tensors(state):
    """All tensors in nested dicts, lists and tuples."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, (dict, list, tuple)):
        for value in state.values() if isinstance(state, dict) else state:
            yield from tensors(value)


def map_tensors(change, state):
    """`state` with `change` applied to each tensor; tuples become lists."""
    if isinstance(state, torch.Tensor):
        return change(state)
    if isinstance(state, dict):
        return {key: map_tensors(change, value) for key, value in state.items()}
    return [map_tensors(change, value) for value in state] if isinstance(state,
                                                                         (list, tuple)) else state


def n_bytes(state):
    """Bytes of the tensors in `state`, those that share memory counted once."""
    return sum({(t.data_ptr(), t.shape): t.numel() * t.element_size()
                for t in tensors(state)}.values())
