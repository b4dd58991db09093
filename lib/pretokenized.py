"""Download ready-made shards from the hub, each checked before it gets its final name."""

import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lib import hub
from lib.cli import BadInput
from lib.files import check_room, move
from lib.shard_meta import (
    Meta,
    Record,
    Start,
    check_described,
    check_tokenizer_place,
    new_meta,
    own_tokenizer,
    read_meta,
)
from lib.shards import BIN_HEADER, check_eot, check_ids, missing_records, read_shard
from lib.tokenizers import Tokenizer, load_tokenizer, names_ids

NPY_HEADER = 128  # bytes of a .npy's header, which numpy pads


@dataclass(frozen=True)
class Request:
    """The shards to download.

    pretokenized: "owner/name", or with ":folder" or ":pattern" after it. shards: number of train
    shards; None: all, or enough for `max_tokens`. tokenizer: a spec; None: the dataset's own, else
    gpt2. command: for meta.json.
    """
    pretokenized: str
    shards: int | None
    max_tokens: int | None
    tokenizer: str | None
    command: str

    @property
    def name(self) -> str:
        return self.pretokenized.partition(":")[0]

    @property
    def pattern(self) -> str:
        return self.pretokenized.partition(":")[2]

    @property
    def settings(self) -> dict:
        return {"pretokenized": self.pretokenized}

    def is_met(self, meta: Meta) -> bool:
        """Whether meta.json counts enough shards; it may list more."""
        train = meta.split("train").shards
        if self.shards:
            return train >= self.shards
        if train == meta.setting("train_shards"):  # all there are
            return True
        return bool(self.max_tokens and train and meta.tokens >= self.max_tokens)


def download_shards(request: Request, folder: Path, meta: Meta | None) -> Meta:
    """Download shards into the folder and list them in its meta.json. Returns the Meta.

    meta: of a folder started earlier, maybe with fewer shards; it is continued from the same commit
    of the dataset. Raises BadInput for unusable shards.
    """
    commit = meta.setting("commit") if meta else None
    dataset = hub.find_dataset(request.name, request.pattern, commit)
    train = dataset.shards["train"]
    if request.shards and request.shards > len(train):
        raise BadInput(f"{request.pretokenized} has {len(train):,} train shards: "
                       f"lower --shards {request.shards:,}")
    theirs, tokenizer = find_tokenizer(request, folder, dataset, meta)
    meta = meta or new_meta(tokenizer, request.settings, request.command)
    known = {"commit": dataset.commit, "train_shards": len(train)}
    meta.settings = (meta.settings or {}) | known
    meta.command = request.command

    missing = {record.name for record in missing_records(folder, meta)}
    there = {record.name for record in meta.records} - missing
    files = wanted_files(request, dataset, missing)
    n_val = len(dataset.shards["val"])
    count = expected_count(request, files, n_val)
    meta.promised = sum(tokens_in(file, tokenizer) for file in files[n_val:count]) or None
    needed = [file.size for file in files[:count] if file.name not in there]
    print(f"{request.name} at commit {dataset.commit[:7]}: {len(needed):,} shards to download, "
          f"{sum(needed) / 1e9:.1f} GB")
    check_room(folder, sum(needed) + 2**20, f"downloading {len(needed):,} shards",
               "free some space, lower --shards, or give another --out")

    downloader = Downloader(folder, dataset, tokenizer, meta, theirs)
    for file in tqdm(files, total=count, desc=request.name, unit="shard", disable=None):
        is_new = file.name not in there and not request.is_met(meta)
        if file.name in missing or is_new:
            downloader.take(file)
    meta.complete = True
    meta.resume = None
    meta.write(folder)
    hub.forget(folder)
    return meta


def wanted_files(request: Request, dataset: hub.Dataset, missing: set[str]) -> list[hub.File]:
    """The files that may be needed, validation first. missing: names of shards that are listed but
    must be downloaded again."""
    files = list(dataset.shards["val"])
    for i, file in enumerate(dataset.shards["train"]):
        if request.shards is None or i < request.shards or file.name in missing:
            files.append(file)
    return files


def expected_count(request: Request, files: list[hub.File], val_shards: int) -> int:
    """How many of the files --max_tokens needs, by their sizes: 2 bytes per token, so never too
    few."""
    if not request.max_tokens:
        return len(files)
    ends = np.cumsum([file.size // 2 for file in files])
    return max(val_shards + 1, int(np.searchsorted(ends, request.max_tokens)) + 1)


def tokens_in(file: hub.File, tokenizer: Tokenizer) -> int:
    """Tokens of a shard on the hub, from its size."""
    header = 4 * BIN_HEADER if file.name.endswith(".bin") else NPY_HEADER
    itemsize = 2 if tokenizer.vocab_size <= 2**16 else 4
    return max((file.size - header) // itemsize, 0)


def find_tokenizer(request: Request, folder: Path, dataset: hub.Dataset,
                   meta: Meta | None) -> tuple[Meta | None, Tokenizer]:
    """(The Meta next to the shards on the hub, or None; their tokenizer, saved in the folder unless
    it is tiktoken's)."""
    remedy = (f"{dataset.id} cannot be used as it is: name another dataset, "
              "or tokenize text with --source")
    theirs = None
    if "meta.json" in dataset.beside:
        path = hub.download(dataset, dataset.beside["meta.json"], folder)
        theirs = read_meta(path.parent, remedy)
    if theirs:
        tokenizer = described_tokenizer(theirs, folder, dataset, remedy)
    elif meta and request.tokenizer is None:
        tokenizer = own_tokenizer(folder, meta)
    else:
        tokenizer = load_tokenizer(request.tokenizer or "gpt2")
    tokenizer.require_text("fineweb.py")
    if theirs and request.tokenizer and load_tokenizer(request.tokenizer).spec != tokenizer.spec:
        raise BadInput(f"the meta.json of {dataset.id} says that its tokenizer is "
                       f"{theirs.tokenizer}, not {request.tokenizer}: leave --tokenizer out")
    check_described(theirs, tokenizer, remedy)
    check_described(meta, tokenizer)
    if tokenizer.is_trained:
        check_tokenizer_place(folder, meta, tokenizer)
        tokenizer.save(folder / "tokenizer.json")
    return theirs, tokenizer


def described_tokenizer(theirs: Meta, folder: Path, dataset: hub.Dataset,
                        remedy: str) -> Tokenizer:
    """The tokenizer that a dataset's meta.json names: a tiktoken name, or its tokenizer.json."""
    spec = theirs.tokenizer
    if spec == "tokenizer.json" and spec in dataset.beside:
        return load_tokenizer(str(hub.download(dataset, dataset.beside[spec], folder)))
    is_name = re.fullmatch(r"[\w-]+", spec) or names_ids(spec)
    if not is_name:  # a path would be one of this machine
        raise BadInput(f"the meta.json of {dataset.id} names the tokenizer {spec[:80]}, which is "
                       f"not next to it: {remedy}")
    return load_tokenizer(spec)


class Downloader:
    """Downloads shards of a dataset into a folder. theirs: the dataset's own Meta, or None."""

    def __init__(self, folder: Path, dataset: hub.Dataset, tokenizer: Tokenizer, meta: Meta,
                 theirs: Meta | None):
        self.folder = folder
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.meta = meta
        self.listed = {record.name: record for record in meta.records}
        self.expected = dict(self.listed)  # of both lists
        if theirs:
            for record in theirs.records:
                self.expected.setdefault(record.name, record)

    def take(self, file: hub.File) -> None:
        """Download one file, check all its ids, then move it to its final name and list it."""
        path = self.folder / file.name
        # whole already if a run was killed before it could list it
        if not (path.is_file() and hub.is_whole(path, file)):
            path = hub.download(self.dataset, file, self.folder)
        ids = self._read(path, file)
        record = Record(file.name, len(ids), zlib.crc32(ids.data), Start())
        expected = self.expected.get(file.name, record)
        if (expected.tokens, expected.crc32) != (record.tokens, record.crc32):
            raise BadInput(f"{file.path} of {self.dataset.id} is not the shard that meta.json "
                           "lists: name another dataset")
        if file.name in self.listed:  # it was missing or damaged
            move(path, self.folder / file.name)
        else:
            self._list(path, record, ids)
        tqdm.write(f"{file.name}: {self.meta.tokens:,} tokens so far")

    def _read(self, path: Path, file: hub.File) -> np.ndarray:
        """The ids of a downloaded shard. Raises BadInput if they are not the tokenizer's."""
        remedy = f"name the tokenizer of {self.dataset.id} by --tokenizer, or name another dataset"
        ids = read_shard(path, remedy)
        check_ids(ids, self.tokenizer.vocab_size, path, remedy)
        check_eot(ids, self.tokenizer, path, remedy)
        if not self.meta.shards:
            self.meta.dtype = ids.dtype.name
        if ids.dtype != self.meta.dtype:
            raise BadInput(f"{file.path} of {self.dataset.id} is {ids.dtype}, others are "
                           f"{self.meta.dtype}: they are of different tokenizers; choose a folder, "
                           f"as in {self.dataset.id}:folder")
        return ids

    def _list(self, path: Path, record: Record, ids: np.ndarray) -> None:
        self.meta.complete = False
        self.meta.resume = Start()
        self.meta.write(self.folder)  # a run killed after its first shard must find whose it is
        move(path, self.folder / record.name)
        self.meta.add(record, ids, self.tokenizer)
        self.meta.write(self.folder)
