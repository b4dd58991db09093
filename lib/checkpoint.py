"""Checkpoint files: name, find, write, read and verify them.

A checkpoint is a dict of tensors, numbers, strings, lists and dicts, saved by torch.save as
ckpt_<step>.pt: a zip archive whose records have CRC-32 checksums, which torch.load ignores and
`read` verifies. Files are written under a temporary name, flushed to the disk, then renamed.
weights_<step>.pt is the same without optimizer and data position, its weights in bf16: enough for
everything but --resume.
"""

import contextlib
import errno
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from lib.cli import BadInput, RankError, flag, note, path_flag
from lib.files import check_room, open_file, read_json, replace
from lib.hooks import without_commands

NAME = re.compile(r"(ckpt|weights)_([0-9]{1,12})\.pt")
Kind = Literal["ckpt", "weights"]
# what only --resume needs
TRAINING_STATE = {"optimizer", "loader", "skipped", "consecutive_skips", "timed", "finished",
                  "max_steps", "hours", "dollars", "loss_scale"}
# errors of the system, not of the file being read
NOT_THE_FILE = (errno.EIO, errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.ESTALE)
NO_ROOM = "free some disk space, or --keep fewer; the existing checkpoints are intact"
DIFFERENT = "the processes found different checkpoints: name one ckpt_<step>.pt"
GPT2 = Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]


class Torn(BadInput):
    """A file that could be read but is not a complete checkpoint."""


# --------------------------------------------------------------------------------------------------
# Names


@dataclass(frozen=True)
class ModelConfig:
    """The flags that name a trained model, for train_gpt2.py's `load_checkpoint`."""

    checkpoint: str | None = path_flag(
        None, "a run folder (its best checkpoint if --keep_best kept it, else the newest), "
              "a ckpt_<step>.pt or weights_<step>.pt, or a folder written by export_hf.py")
    model: GPT2 | None = flag(None, "OpenAI's GPT-2 from Hugging Face, instead of a checkpoint")


def named(cfg: ModelConfig) -> str:
    """The model that a ModelConfig names. Raises BadInput unless exactly one flag is given."""
    names = [name for name in (cfg.checkpoint, cfg.model) if name is not None]
    if len(names) != 1:
        raise BadInput("name either --checkpoint or --model, for instance --checkpoint log/<run>")
    return names[0]


def path_of(folder: str | Path, step: int, kind: Kind = "ckpt") -> Path:
    return Path(folder) / f"{kind}_{step:05d}.pt"


def found(folder: str | Path, kind: Kind = "ckpt") -> list[tuple[int, Path]]:
    """(step, path) of each checkpoint in a folder, by file name, newest first."""
    if not os.path.isdir(folder):
        return []
    steps = []
    for path in Path(folder).glob(f"{kind}_*.pt"):
        match = NAME.fullmatch(path.name)
        if match:
            steps.append((int(match[2]), path))
    return sorted(steps, reverse=True)


def is_weights(path: str | Path) -> bool:
    """Whether a file is named weights_<step>.pt."""
    match = NAME.fullmatch(os.path.basename(path))
    return match is not None and match[1] == "weights"


def is_hugging_face(name: str) -> bool:
    """Whether lib/huggingface.py loads it: OpenAI's GPT-2, or a folder of transformers."""
    if name in get_args(GPT2):
        return True
    if not os.path.isdir(name) or found(name) or found(name, "weights"):
        return False
    path = Path(name, "config.json")
    config = read_json(path, "name another") if path.exists() else {}
    return isinstance(config, dict) and "model_type" in config  # a run's config.json has none


def pick(name: str) -> str:
    """Resolve the name of a model to what to load: for a run folder, the path of a checkpoint.

    It is the one with the lowest validation loss if --keep_best kept it, else the newest complete
    one; prints which. Files of weights count only if there are no checkpoints. Raises BadInput if
    there is neither.
    """
    if is_hugging_face(name):
        return name
    if not os.path.isdir(name):
        open_file(name, "name a run folder under log/, or a ckpt_<step>.pt in one").close()
        return name
    kind: Kind = "ckpt" if found(name) else "weights"
    candidate = newest(name, note, "name another run folder", kind)
    if candidate is None:
        raise BadInput(f"{name} has neither a ckpt_<step>.pt nor a model of transformers: "
                       "name a run folder under log/")
    path, state = candidate
    what = "the newest"
    with ours(path):
        if best := state.get("best"):
            loss, step = best
            if path_of(name, step, kind).exists():
                path = path_of(name, step, kind)
                what = f"the best, validation loss {loss:.4f}"
    note(f"{name}: {path.name}, {what}")
    return str(path)


def leads_to(name: str, picked: str) -> bool:
    """Whether `name` is `picked` itself or, if that is a checkpoint, its run folder."""
    places = [picked]
    if NAME.fullmatch(os.path.basename(picked)):
        places.append(os.path.dirname(picked))
    return name == picked or os.path.realpath(name) in map(os.path.realpath, places)


# --------------------------------------------------------------------------------------------------
# Reading


@contextlib.contextmanager
def ours(path: str | Path) -> Iterator[None]:
    """Raise BadInput if the block fails because a checkpoint's content is not this project's."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error
    except Exception as error:
        reason = type(error).__name__
        if isinstance(error, KeyError) and error.args:
            reason = f"it has no {error.args[0]}"
        raise BadInput(f"{path} is not a checkpoint of this project ({reason}): "
                       "name one that train_gpt2.py wrote") from error


def read(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint, with tensors on the CPU, memory-mapped if possible.

    Raises Torn if it is incomplete, damaged or another program's, else BadInput. Loads with
    weights_only=True, so a downloaded file cannot run code.
    """
    open_file(path, "name a ckpt_<step>.pt of a folder under log/").close()
    try:
        _verify(path)
        state = _load(path)
        if not isinstance(state, dict):
            raise TypeError(type(state).__name__)
        if not all(map(_is_plain, tensors(state))):
            raise TypeError("a tensor without data, sparse, complex or quantized")
        return state
    except Exception as error:  # zipfile and torch.load raise many types for a damaged file
        reason = f"{type(error).__name__}: {str(error)[:80]}"
        if is_memory(error):
            size = f"{os.path.getsize(path) / 1e9:.2f} GB"
            raise RankError(f"cannot read {path} ({reason}): it needs {size} of memory, "
                            "free some, or raise `ulimit -v`") from error
        if getattr(error, "errno", None) in NOT_THE_FILE:
            raise RankError(f"cannot read {path} ({reason}): fix that and start again") from error
        raise Torn(f"{path} is not a complete checkpoint of this project ({reason}): "
                   "try an earlier ckpt_<step>.pt") from error


def _verify(path: str | Path) -> None:
    """Raises an error if a record of the archive is damaged or cannot be torch.save's."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        # torch.save does not compress; compressed or overlapping records could have any size
        compressed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
        if compressed or sum(record.file_size for record in records) > os.path.getsize(path):
            raise ValueError("compressed or overlapping records")
        damaged = archive.testzip()
        if damaged:
            raise ValueError(f"checksum of {damaged}")


def _is_plain(t: torch.Tensor) -> bool:
    """Whether a tensor is of a kind that this project saves, as torch.load reads others, too."""
    has_data = t.device.type == "cpu" and t.layout == torch.strided
    return has_data and not t.is_complex() and not t.is_quantized


def check_finite(weights: dict[str, torch.Tensor], path: str | Path) -> None:
    """Raises BadInput if a checkpoint's weights are NaN or infinite and so cannot be trained."""
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise BadInput(f"{path} has weights that are NaN or infinite ({name}): "
                           "name an earlier ckpt_<step>.pt")


def _load(path: str | Path) -> Any:
    load = partial(torch.load, path, map_location="cpu", weights_only=True)
    try:
        return load(mmap=True)
    except RuntimeError as error:
        if "unable to mmap" not in str(error):
            raise
    return load(mmap=False)  # the file system has no mmap, or `ulimit -v` is too low for it


def is_memory(error: BaseException) -> bool:
    """Whether an error means out of memory on the CPU, for which torch has no class of its own."""
    if isinstance(error, RuntimeError):
        return bool(re.search("allocate memory|not enough memory", str(error)))
    return isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM


def newest(folder: str | Path, warn: Callable[[str], Any],
           remedy: str = "move them away to start the run over, or give another --run_name",
           kind: Kind = "ckpt") -> tuple[Path, dict[str, Any]] | None:
    """(path, state) of the newest complete checkpoint in a run folder; None if there is none.

    Skips incomplete ones, after calling `warn` with a line about each. Raises BadInput, ending in
    `remedy`, if all are incomplete.
    """
    candidates = found(folder, kind)
    for _, path in candidates:
        try:
            return path, read(path)
        except Torn as error:
            warn(f"skipped: {error}")
    if candidates:
        raise BadInput(f"none of the checkpoints in {folder} is complete: {remedy}")
    return None


# --------------------------------------------------------------------------------------------------
# Writing


def write(path: str | Path, state: dict[str, Any]) -> None:
    """Write `state` atomically. Raises BadInput if there is no room or no permission."""
    check_room(Path(path).parent, n_bytes(state), "a checkpoint", NO_ROOM)
    try:
        replace(path, lambda file: torch.save(state, file))
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        reason = f"{type(error).__name__}: {str(error)[:80]}"
        raise BadInput(f"cannot save {path} ({reason}): free some disk space, or check the disk; "
                       "earlier checkpoints are intact") from error


def tensors(state: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested dicts, lists and tuples."""
    if isinstance(state, torch.Tensor):
        yield state
        return
    if isinstance(state, dict):
        state = list(state.values())
    if isinstance(state, (list, tuple)):
        for value in state:
            yield from tensors(value)


def map_tensors(change: Callable[[torch.Tensor], torch.Tensor], state: Any) -> Any:
    """`state` with `change` applied to each tensor; tuples become lists."""
    if isinstance(state, torch.Tensor):
        return change(state)
    if isinstance(state, dict):
        return {key: map_tensors(change, value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [map_tensors(change, value) for value in state]
    return state


def weights_of(state: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """What a weights_<step>.pt holds of a checkpoint. Tied weights stay one tensor.

    Not --sync and --on_end: they may contain secrets, and weights are shared.
    """
    converted: dict[tuple, torch.Tensor] = {}

    def convert(tensor: torch.Tensor) -> torch.Tensor:
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if key not in converted:
            converted[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        return converted[key]

    kept = {name: value for name, value in state.items() if name not in TRAINING_STATE}
    if "train_config" in kept:
        kept["train_config"] = without_commands(kept["train_config"])
    return map_tensors(convert, kept)


def n_bytes(state: Any) -> int:
    """Bytes of the tensors in `state`; tensors that share memory are counted once."""
    sizes = {(t.data_ptr(), t.shape): t.numel() * t.element_size() for t in tensors(state)}
    return sum(sizes.values())
