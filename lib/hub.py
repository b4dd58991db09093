"""The Hugging Face hub: whether it answers, which token shards a dataset holds, and whole files
from it.

`huggingface_hub` does the talking, imported where it is used: importing it is slow. HF_ENDPOINT,
HF_TOKEN and HF_HUB_OFFLINE mean what they mean to it.
"""

import asyncio
import fnmatch
import hashlib
import posixpath
import shutil
import sys
import time
from pathlib import Path
from typing import NamedTuple

from lib.cli import BadInput
from lib.files import DISK_FULL, check_room, open_file
from lib.network import is_reachable
from lib.shard_meta import SPLITS, split_of

DOWNLOADS = ".download"       # in the folder of the shards: files on their way
WAITS = (1, 2, 4, 8, 16, 32)  # seconds before another try
AGAIN = "give the same command again: what is already there stays"


class File(NamedTuple):
    """A file of a dataset: its path there, its bytes, their SHA-256 (None: a small file, which the
    hub keeps without)."""
    path: str
    size: int
    sha256: str | None

    @property
    def name(self):
        return posixpath.basename(self.path)


class Dataset(NamedTuple):
    """A dataset at one commit: `shards`, dict split -> its Files in order of names;
    `beside`, dict name -> File, of their folder."""
    id: str
    commit: str
    shards: dict
    beside: dict


def client():
    """`huggingface_hub`, silent but for its progress bars on a terminal."""
    import huggingface_hub.constants
    import huggingface_hub.utils

    huggingface_hub.utils.logging.set_verbosity(
        huggingface_hub.utils.logging.CRITICAL)  # what it logs is raised as well
    if not sys.stderr.isatty():
        huggingface_hub.utils.disable_progress_bars()
    return huggingface_hub


def datasets_library():
    """`datasets`, silent, without the HEAD request by which it counts uses of its readers, even on
    local files."""
    import datasets

    logging = datasets.utils.logging
    logging.set_verbosity(logging.CRITICAL)  # what it logs is raised as well
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    return datasets


def is_offline():
    """Whether HF_HUB_OFFLINE says so: then `datasets` reads what it has cached, or says that it has
    not."""
    return client().constants.HF_HUB_OFFLINE


def check_answers(name):
    """Raises BadInput where the hub does not answer: without a network, the client itself would try
    again for half a minute."""
    url = client().constants.ENDPOINT
    if not is_offline() and not is_reachable(url):
        raise explain(ConnectionError(f"{url} does not answer"), name)


def demand_whole_answers():
    """Let a part of a file that comes shorter than asked count as a broken connection, after which
    `datasets` tries again.

    Where no Content-Length tells, the client takes the end of the answer for the end of the file:
    the corpus would end there.
    """
    from huggingface_hub.hf_file_system import HfFileSystemFile

    fetch = HfFileSystemFile._fetch_range  # what fsspec calls for the bytes from `start` to before `end`
    if fetch.__module__ == __name__:
        return

    def fetch_whole(self, start, end):
        data, size = fetch(self, start, end), min(end, self.size) - start
        if len(data) != size:
            # one of the errors that `datasets` tries again after
            raise asyncio.TimeoutError(f"{len(data):,} bytes came of {size:,}")
        return data

    HfFileSystemFile._fetch_range = fetch_whole


def explain(error, name, remedy=f"{AGAIN}, or name another dataset"):
    """The BadInput for an error of the client: it does not exist, may not be read, cannot be
    reached; or the error's first words."""
    from huggingface_hub import errors

    cause = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if isinstance(error, errors.GatedRepoError):
        return BadInput(
            f"the dataset {name} is gated: ask for access on its page and set HF_TOKEN, or name another"
        )
    if (isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError))
            or status_of(error) == 401):  # not logged in
        return BadInput(f"the hub has no dataset {name}, or it is private: check the name, or set HF_TOKEN; it is not a local "
                        "file or folder")
    if isinstance(error, ConnectionError):
        return BadInput(f"cannot reach the dataset {name} ({cause}): it is not a local file or folder, so check the name "
                        "and the network, or give local files")
    return BadInput(f"cannot read the dataset {name} ({cause}): {remedy}")


def status_of(error):
    """The HTTP status that an error of the client stands for; None for other errors."""
    return getattr(getattr(error, "response", None), "status_code", None)


def find_dataset(name, pattern, commit=None):
    """The token shards of a dataset whose path, or whose folder, is `pattern` ("": all). commit:
    None is its newest.

    Raises BadInput if there is none, or two of one name.
    """
    check_answers(name)
    api = client().HfApi()
    try:
        commit = commit or api.dataset_info(name).sha
        tree = list(api.list_repo_tree(name, repo_type="dataset", revision=commit, recursive=True))
    except Exception as error:  # each version of the client raises its own
        raise explain(error, name) from error
    found = [entry for entry in tree if hasattr(entry, "blob_id")]  # not a folder
    files = [
        File(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None) for entry in found
    ]
    files = sorted((file for file in files if ".." not in file.path.split("/")), key=lambda file:
                   (file.name, file.path))
    found = [
        file for file in files
        if split_of(file.name) and (not pattern or fnmatch.fnmatchcase(file.path, pattern)
                                    or file.path.startswith(pattern.rstrip("/") + "/"))
    ]
    shards = {split: [file for file in found if split_of(file.name) == split] for split in SPLITS}
    where = f"the dataset {name}" + f" at {pattern}" * bool(pattern)
    for split in ("train", "val"):
        if not shards[split]:
            others = ", ".join(file.path for file in files[:3]) or "nothing"
            raise BadInput(f"{where} holds no {split} shards, files that end in _{split}_<index>.npy or .bin "
                           f"(it holds {others}, ...): name another, or tokenize its text with --source")
    if twins := next(((a.path, b.path) for a, b in zip(found, found[1:]) if a.name == b.name),
                     None):
        raise BadInput(f"{where} holds {' and '.join(twins)}: choose one folder, as in "
                       f"{name}:{posixpath.dirname(twins[0]) or posixpath.dirname(twins[1])}")
    folder = posixpath.dirname(shards["train"][0].path)
    return Dataset(name, commit, shards,
                   {file.name: file for file in files if posixpath.dirname(file.path) == folder})


def download(dataset, file, folder):
    """One whole file -> its path below <folder>/.download, its size and SHA-256 compared. Tries
    again when the network fails.

    Raises BadInput when it goes on failing, or the disk is full.
    """
    name = f"{file.path} of {dataset.id}"
    for wait in (*WAITS, None):
        try:
            path = Path(client().hf_hub_download(dataset.id, file.path, repo_type="dataset",
                                                 revision=dataset.commit,
                                                 local_dir=Path(folder) / DOWNLOADS))
            if is_whole(path, file):
                return path
            path.unlink()
            failure = BadInput(
                f"{name} arrives damaged (its size or SHA-256 is not the one the hub tells): {AGAIN}"
            )
        except Exception as error:  # each version of the client raises its own
            check_room(folder, file.size, f"downloading {name}", f"free some space and {AGAIN}")
            if getattr(error, "errno", None) in DISK_FULL:
                raise
            if 400 <= (status_of(error) or 0) < 500 and status_of(error) not in (408, 429):
                raise explain(error, name) from error
            failure, failure.__cause__ = explain(error, name), error
        if wait:
            time.sleep(wait)
    raise failure


def is_whole(path, file):
    """Whether a local file has the bytes that the hub tells of it."""
    with open_file(path, "check the disk") as content:
        if path.stat().st_size != file.size:
            return False
        digest = hashlib.sha256()
        for piece in iter(lambda: content.read(2**20), b""):
            digest.update(piece)
        return file.sha256 in (None, digest.hexdigest())


def forget(folder):
    """Remove what downloading left in a folder."""
    shutil.rmtree(Path(folder) / DOWNLOADS, ignore_errors=True)
