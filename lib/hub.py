"""The Hugging Face hub: check that it answers, list a dataset's token shards, and download files.

`huggingface_hub` is imported where it is used, as importing it is slow. It reads HF_ENDPOINT,
HF_TOKEN and HF_HUB_OFFLINE.
"""

import asyncio
import fnmatch
import hashlib
import posixpath
import shutil
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from lib.cli import BadInput
from lib.files import DISK_FULL, check_room, open_file
from lib.network import is_reachable
from lib.shard_meta import SPLITS, split_of

DOWNLOADS = ".download"       # in the folder of the shards: files in progress
WAITS = (1, 2, 4, 8, 16, 32)  # seconds before each retry
AGAIN = "give the same command again: what is already there stays"
RETRIED = (408, 429)          # client errors that may pass: timeout, too many requests


class File(NamedTuple):
    """A file of a dataset. sha256: None for a small file, for which the hub has none."""
    path: str  # in the dataset
    size: int
    sha256: str | None

    @property
    def name(self) -> str:
        return posixpath.basename(self.path)

    @property
    def folder(self) -> str:
        return posixpath.dirname(self.path)


class Dataset(NamedTuple):
    """A dataset at one commit. shards: split -> its Files, sorted by name. beside: name -> File for
    the files next to the train shards."""
    id: str
    commit: str
    shards: dict[str, list[File]]
    beside: dict[str, File]


# --------------------------------------------------------------------------------------------------
# The client libraries


def client() -> Any:
    """`huggingface_hub`, silent except for progress bars on a terminal."""
    import huggingface_hub.constants
    import huggingface_hub.utils

    logging = huggingface_hub.utils.logging
    logging.set_verbosity(logging.CRITICAL)  # what it logs is raised as well
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    return huggingface_hub


def datasets_library() -> Any:
    """`datasets`, silent, and without its usage-counting requests."""
    import datasets

    logging = datasets.utils.logging
    logging.set_verbosity(logging.CRITICAL)  # what it logs is raised as well
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    return datasets


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE is set: then `datasets` reads only what it has cached."""
    return client().constants.HF_HUB_OFFLINE


def check_answers(name: str) -> None:
    """Raises BadInput if the hub does not answer. The client itself would retry for half a minute.
    """
    url = client().constants.ENDPOINT
    if not is_offline() and not is_reachable(url):
        raise explain(ConnectionError(f"{url} does not answer"), name)


def demand_whole_answers() -> None:
    """Make `datasets` retry when a part of a file arrives incomplete.

    Without a Content-Length, the client would take the end of a response as the end of the file,
    and the corpus would silently end there.
    """
    from huggingface_hub.hf_file_system import HfFileSystemFile

    fetch = HfFileSystemFile._fetch_range  # called by fsspec for the bytes start to end - 1
    if fetch.__module__ == __name__:
        return

    def fetch_whole(self, start, end):
        data = fetch(self, start, end)
        size = min(end, self.size) - start
        if len(data) != size:
            # one of the errors after which `datasets` retries
            raise asyncio.TimeoutError(f"{len(data):,} bytes came of {size:,}")
        return data

    HfFileSystemFile._fetch_range = fetch_whole  # type: ignore[method-assign]


# --------------------------------------------------------------------------------------------------
# Errors


def explain(error: Exception, name: str,
            remedy: str = f"{AGAIN}, or name another dataset") -> BadInput:
    """The BadInput for an error of the client: the dataset does not exist, is not accessible, or
    cannot be reached; otherwise with the start of the error's text."""
    from huggingface_hub import errors

    cause = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    missing = (errors.RepositoryNotFoundError, errors.HFValidationError)
    if isinstance(error, errors.GatedRepoError):
        return BadInput(f"the dataset {name} is gated: request access on its page and set "
                        "HF_TOKEN, or name another")
    if isinstance(error, missing) or status_of(error) == 401:  # not logged in
        return BadInput(f"the hub has no dataset {name}, or it is private: check the name, or set "
                        "HF_TOKEN; it is not a local file or folder")
    if isinstance(error, ConnectionError):
        return BadInput(f"cannot reach the dataset {name} ({cause}): it is not a local file or "
                        "folder, so check the name and the network, or give local files")
    return BadInput(f"cannot read the dataset {name} ({cause}): {remedy}")


def status_of(error: Exception) -> int | None:
    """The HTTP status in an error of the client; None for other errors."""
    return getattr(getattr(error, "response", None), "status_code", None)


def is_final(error: Exception) -> bool:
    """Whether retrying is useless, as for a client error such as 404."""
    status = status_of(error)
    return status is not None and 400 <= status < 500 and status not in RETRIED


# --------------------------------------------------------------------------------------------------
# Shards of a dataset


def find_dataset(name: str, pattern: str, commit: str | None = None) -> Dataset:
    """The token shards of a dataset whose path matches `pattern` or is in that folder ("": all).
    commit: None is the newest.

    Raises BadInput if a split has none, or if two have the same name.
    """
    check_answers(name)
    api = client().HfApi()
    try:
        commit = commit or api.dataset_info(name).sha
        tree = list(api.list_repo_tree(name, repo_type="dataset", revision=commit, recursive=True))
    except Exception as error:  # each version of the client raises its own
        raise explain(error, name) from error
    files = []
    for entry in tree:
        is_file = hasattr(entry, "blob_id")
        if is_file and ".." not in entry.path.split("/"):
            files.append(File(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None))
    files.sort(key=lambda file: (file.name, file.path))

    shards: dict[str, list[File]] = {split: [] for split in SPLITS}
    for file in files:
        split = split_of(file.name)
        if split and is_wanted(file, pattern):
            shards[split].append(file)
    where = f"the dataset {name} at {pattern}" if pattern else f"the dataset {name}"
    for split in ("train", "val"):
        if not shards[split]:
            others = ", ".join(file.path for file in files[:3]) or "nothing"
            raise BadInput(f"{where} has no {split} shards, files that end in "
                           f"_{split}_<index>.npy or .bin (it has {others}, ...): name another, "
                           "or tokenize its text with --source")
        check_names(name, where, shards[split])
    folder = shards["train"][0].folder
    beside = {file.name: file for file in files if file.folder == folder}
    return Dataset(name, commit, shards, beside)


def is_wanted(file: File, pattern: str) -> bool:
    """Whether a file matches a pattern or is in the folder of that name."""
    if not pattern or fnmatch.fnmatchcase(file.path, pattern):
        return True
    return file.path.startswith(pattern.rstrip("/") + "/")


def check_names(name: str, where: str, shards: list[File]) -> None:
    """Raises BadInput if two of the shards, sorted by name, have the same name."""
    for a, b in zip(shards, shards[1:]):
        if a.name == b.name:
            raise BadInput(f"{where} has {a.path} and {b.path}: choose one folder, as in "
                           f"{name}:{a.folder or b.folder}")


# --------------------------------------------------------------------------------------------------
# Whole files


def download(dataset: Dataset, file: File, folder: Path) -> Path:
    """Download a file -> its path below <folder>/.download, with size and SHA-256 checked. Retries
    when the network fails.

    Raises BadInput if it keeps failing, OSError if the disk is full.
    """
    name = f"{file.path} of {dataset.id}"
    for wait in (*WAITS, None):
        try:
            path = Path(client().hf_hub_download(dataset.id, file.path, repo_type="dataset",
                                                 revision=dataset.commit,
                                                 local_dir=folder / DOWNLOADS))
            if is_whole(path, file):
                return path
            path.unlink()
            failure = BadInput(f"{name} arrives damaged (its size or SHA-256 is not what the hub "
                               f"states): {AGAIN}")
        except Exception as error:  # each version of the client raises its own
            check_room(folder, file.size, f"downloading {name}", f"free some space and {AGAIN}")
            if getattr(error, "errno", None) in DISK_FULL:
                raise
            failure = explain(error, name)
            failure.__cause__ = error
            if is_final(error):
                raise failure from error
        if wait:
            time.sleep(wait)
    raise failure


def is_whole(path: Path, file: File) -> bool:
    """Whether a local file has the size and the SHA-256 that the hub states."""
    with open_file(path, "check the disk") as content:
        if path.stat().st_size != file.size:
            return False
        digest = hashlib.sha256()
        for piece in iter(lambda: content.read(2**20), b""):
            digest.update(piece)
        return file.sha256 in (None, digest.hexdigest())


def forget(folder: Path) -> None:
    """Remove leftovers of downloads from a folder."""
    shutil.rmtree(folder / DOWNLOADS, ignore_errors=True)
