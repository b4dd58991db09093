"""Read a folder of token shards, made by fineweb.py, and check it against its meta.json.

A shard is one array of token ids in a file <prefix>_{train|val}_<index>.npy, or .bin in the format
of llm.c and modded-nanogpt. Only that ending determines the split, not the rest of the name.
"""

import hashlib
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from lib.cli import BadInput
from lib.files import Unreadable, open_file, replace
from lib.shard_meta import (
    OTHER,
    SPLITS,
    Meta,
    Record,
    check_described,
    own_tokenizer,
    read_meta,
    split_of,
    tokenizer_spec,
)
from lib.tokenizers import Tokenizer, load_ids, names_ids

BIN_DTYPES = {(20240520, 1): np.uint16,  # (magic, version) of llm.c and modded-nanogpt
              (20240801, 7): np.uint32}
BIN_HEADER = 256  # int32: magic, version, tokens, zeros
EDGE = 4096       # ids compared at each end of two shards of equal length
PROBED = 1_000_000  # ids at the start of a shard that are checked against the tokenizer
UNREADABLE = "check the disk, the permissions and `ulimit -n`"
REPAIR = ("if fineweb.py made the folder, run its command again: it rewrites what is missing or "
          "damaged")


class Damaged(BadInput):
    """A file that could be read, but is not a complete shard."""


# --------------------------------------------------------------------------------------------------
# One shard


class Header(NamedTuple):
    dtype: np.dtype
    tokens: int
    offset: int  # bytes before the ids


def read_header(path: str | Path, remedy: str = REPAIR) -> Header:
    """The header of a shard, compared with the size of its file.

    Raises Damaged, ending in `remedy`, if it is not a complete shard; Unreadable if it could not be
    read, so that its ids may be fine.
    """
    with open_file(path, UNREADABLE) as file:
        return _read_header(file, Path(path), remedy)


def read_shard(path: str | Path, remedy: str = REPAIR) -> np.ndarray:
    """A shard -> read-only token ids (n,), uint16 or uint32, memory-mapped where possible.

    Raises Damaged and Unreadable like `read_header`.
    """
    with open_file(path, UNREADABLE) as file:
        dtype, tokens, offset = _read_header(file, Path(path), remedy)
        try:
            return np.asarray(
                np.memmap(file, dtype=dtype, mode="r", offset=offset, shape=(tokens,)))
        except OSError:  # not on this file system, or `ulimit -v`
            pass
        try:
            file.seek(offset)
            ids = np.fromfile(file, dtype=dtype, count=tokens)
        except MemoryError as error:
            raise Unreadable(f"cannot read {path} (no memory for its {tokens:,} tokens): "
                             "free some, or raise `ulimit -v`") from error
        except OSError as error:
            raise Unreadable(f"cannot read {path} ({error.strerror}): {UNREADABLE}") from error
        ids.flags.writeable = False
        return ids


def _read_header(file: IO[bytes], path: Path, remedy: str) -> Header:
    parse = _parse_npy if path.suffix == ".npy" else _parse_bin
    try:
        shape, dtype = parse(file)
        offset = file.tell()
        size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise Unreadable(f"cannot read {path} ({error.strerror}): {UNREADABLE}") from error
    except Exception as error:  # numpy's parser raises many kinds
        raise Damaged(f"{path} is damaged, or not a shard "
                      f"({type(error).__name__}: {str(error)[:200]}): {remedy}") from error
    if dtype not in (np.uint16, np.uint32) or len(shape) != 1:
        raise Damaged(f"{path} is not a shard: it is a {len(shape)}-dimensional array of "
                      f"{dtype}, not token ids in one dimension, uint16 or uint32: {remedy}")
    if size != offset + shape[0] * dtype.itemsize:
        raise Damaged(f"{path} is damaged (its header does not fit its {size:,} bytes): {remedy}")
    return Header(dtype, shape[0], offset)


def _parse_npy(file: IO) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    parse = {(1, 0): np.lib.format.read_array_header_1_0,
             (2, 0): np.lib.format.read_array_header_2_0}[version]
    shape, _, dtype = parse(file)
    return shape, dtype


def _parse_bin(file: IO) -> tuple[tuple[int, ...], np.dtype]:
    header = np.frombuffer(file.read(4 * BIN_HEADER), dtype=np.int32, count=BIN_HEADER)
    magic, version, tokens = (int(number) for number in header[:3])
    if (magic, version) not in BIN_DTYPES:
        raise ValueError(f"unknown magic number and version {(magic, version)}")
    return (tokens,), np.dtype(BIN_DTYPES[magic, version])


def save_shard(path: Path, ids: np.ndarray) -> None:
    """Write a .npy shard atomically."""
    def write(file):  # np.save would hide the errno of a full disk
        header = np.lib.format.header_data_from_array_1_0(ids)
        np.lib.format.write_array_header_1_0(file, header)
        file.write(ids)

    replace(path, write)


# --------------------------------------------------------------------------------------------------
# The files of a folder


def find_shards(folder: str | Path) -> tuple[dict[str, list[Path]], list[str]]:
    """(split -> sorted paths of its shards, names of other .npy and .bin files) in a folder."""
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        names = []
    except OSError as error:
        raise Unreadable(f"cannot read {folder} ({error.strerror}): {UNREADABLE}") from error
    paths: dict[str, list[Path]] = {split: [] for split in SPLITS}
    others = []
    for name in names:
        split = split_of(name)
        if split:
            paths[split].append(Path(folder) / name)
        elif name.endswith((".npy", ".bin")):
            others.append(name)
    return paths, others


def missing_records(folder: Path, meta: Meta) -> list[Record]:
    """The records of the shards that are missing, damaged, or of another length or dtype.
    Raises Unreadable where a file cannot be read."""
    return [record for record in meta.records
            if not _is_there(folder / record.name, record, meta)]


def _is_there(path: Path, record: Record, meta: Meta) -> bool:
    if not os.path.lexists(path):
        return False
    try:
        header = read_header(path)
    except Damaged:
        return False
    return (header.tokens, header.dtype) == (record.tokens, np.dtype(meta.dtype))


def listed_shards(folder: Path, meta: Meta | None) -> dict[str, list[Path]]:
    """split -> paths of the shards that meta.json lists, up to the first that is not whole.

    A shard is listed once it is whole, but a network file system may show meta.json first.
    """
    paths: dict[str, list[Path]] = {split: [] for split in SPLITS}
    if meta is None:
        return paths
    for record in meta.records:
        path = folder / record.name
        if not _is_there(path, record, meta):
            break
        paths[split_of(record.name)].append(path)  # type: ignore[index]
    return paths


def is_complete(folder: Path, meta: Meta | None) -> bool:
    """Whether a folder is finished and has all shards that its meta.json lists. Raises BadInput if
    its tokenizer is missing."""
    if meta is None or not meta.complete:
        return False
    if meta.shards is None:  # of an older fineweb.py: can be checked, not repaired
        Shards(folder)
    elif missing_records(folder, meta):
        return False
    if meta.tokenizer.endswith(".json"):  # others would need the network
        own_tokenizer(folder, meta)
    return True


# --------------------------------------------------------------------------------------------------
# The folder as data to train on


class Shards:
    """A folder of shards: complete, finished and with one tokenizer. Raises BadInput otherwise.

    train, val: sorted paths. tokens: {"train": count, "val": count}. tokenizer: a spec.
    vocab_size: None if a meta.json written by hand does not have it. keys: what identifies the text
    of each train shard. identity: a hash of the training text, as stored in checkpoints;
    former_identity: as stored by earlier versions.

    needed: the splits that must exist. named_by: the flag that names the folder. unfinished: accept
    a folder that is still being written, with the shards that it has. Every header is read, and no
    file stays open.
    """

    def __init__(self, folder: str | Path, needed: Sequence[str] = SPLITS,
                 named_by: str = "--data", unfinished: bool = False):
        self.folder = Path(folder)
        self.meta = read_meta(folder)
        self.is_finished = self.meta is None or self.meta.complete
        if not self.is_finished and not unfinished:
            raise BadInput(f"{self.folder}/ is not finished: run {self.command()} again to "
                           "continue, or train while it is written with train_gpt2.py --follow")
        paths, others = find_shards(folder)
        if not self.is_finished:
            paths = listed_shards(self.folder, self.meta)
        self.train = paths["train"]
        self.val = paths["val"]
        self.headers = {path: read_header(path) for path in self.train + self.val}
        if self.is_finished:
            self._check_names()
        self._check_needed(needed, named_by, others)
        self._check_dtypes()
        self.tokens = {"train": self._count(self.train), "val": self._count(self.val)}
        if self.is_finished:
            self._check_counts()
        self._check_splits(self.train)
        self.keys = self._keys()
        self.identity = digest(self.keys)
        self.former_identity = digest(self._named())

        self.tokenizer = "gpt2"  # of build-nanogpt and llm.c, whose shards have no meta.json
        self.vocab_size: int | None = 50257
        if self.meta:
            self.tokenizer = tokenizer_spec(self.folder, self.meta)
            self.vocab_size = self.meta.vocab_size
        if names_ids(self.tokenizer):
            self.vocab_size = load_ids(self.tokenizer).vocab_size

    def _count(self, paths: list[Path]) -> int:
        return sum(self.headers[path].tokens for path in paths)

    @property
    def epoch_tokens(self) -> int | None:
        """Train tokens of the finished folder, None if unknown."""
        return self.tokens["train"]

    def command(self) -> str:
        """The command that made the folder, for messages."""
        if self.meta is None or not self.meta.command:
            return "the fineweb.py command that made it"
        return f"`{self.meta.command} --out {shlex.quote(str(self.folder))}`"

    def _keys(self) -> list[tuple]:
        """What identifies the text of each train shard, wherever the folder is.

        That is its length and its checksum in meta.json, as other text may fill shards of the same
        names and lengths (with --max_tokens); without checksums, and in earlier versions, its name
        and length.
        """
        if not self.meta or self.meta.shards is None:
            return self._named()
        checksums = {record.name: record.crc32 for record in self.meta.shards}
        return [(tokens, checksums[name]) for name, tokens in self._named()]

    def _named(self) -> list[tuple]:
        return [(path.name, self.headers[path].tokens) for path in self.train]

    def _check_names(self):
        """Raises BadInput unless the folder has exactly the shards that meta.json lists."""
        if not self.meta or self.meta.shards is None:
            return
        listed = {record.name: record.tokens for record in self.meta.shards}
        found = {path.name: header.tokens for path, header in self.headers.items()}
        for name in sorted(listed):
            if found.get(name) == listed[name]:
                continue
            problem = "is missing"
            if name in found:
                problem = f"has {found[name]:,} tokens, not {listed[name]:,}"
            raise BadInput(f"{self.folder / name} {problem}, says meta.json: "
                           f"run {self.command()} again to rewrite it")
        unlisted = sorted(found.keys() - listed.keys())
        if unlisted:
            raise BadInput(f"{self.folder / unlisted[0]} is not one of the shards that meta.json "
                           "lists: move it to another folder")

    def _check_needed(self, needed, named_by, others):
        found = {"train": self.train, "val": self.val}
        missing = [split for split in SPLITS if not found[split]]
        if not set(missing) & set(needed):
            return
        if self.folder.is_file():
            remedy = "one that fineweb.py --source made of it"
            if self.folder.name.endswith((".npy", ".bin")):
                remedy = "the folder that it is in"
            raise BadInput(f"{named_by} {self.folder} is a file, not a folder of shards: "
                           f"name {remedy}")
        problem = f"does not exist (in {os.getcwd()})"
        if self.folder.is_dir():
            splits = missing[0] if len(missing) == 1 else "any"
            problem = f"does not contain {splits} shards"
            if others:
                problem += f" ({others[0]} does not end in _train_<index> or _val_<index>)"
        raise BadInput(f"{self.folder}/ {problem}: make shards with `{self._maker()}`, "
                       f"or name another {named_by}")

    def _maker(self) -> str:
        """A command that makes such a folder."""
        defaults = {"edu_fineweb10B": "python fineweb.py", "docstrings": "make train"}
        own = ("python fineweb.py --source <text files or dataset id> "
               f"--out {shlex.quote(str(self.folder))}")
        return defaults.get(str(self.folder), own)

    def _check_dtypes(self):
        first = self.train[0] if self.train else self.val[0]
        wanted = self.headers[first].dtype
        by = first.name
        if self.meta and self.meta.dtype:
            wanted = np.dtype(self.meta.dtype)
            by = "meta.json"
        for path, header in self.headers.items():
            if header.dtype != wanted:
                raise BadInput(f"{path} is {header.dtype} and {by} says {wanted}: they are of "
                               "different tokenizers; put each tokenizer's shards into a folder "
                               "of their own")

    def _check_counts(self):
        if not self.meta or not self.meta.splits:
            return
        for split in SPLITS:
            counted = self.meta.splits[split].tokens
            if counted != self.tokens[split]:
                raise BadInput(f"{self.folder}/ has {self.tokens[split]:,} {split} tokens and "
                               f"its meta.json says {counted:,}: shards are missing, or of "
                               f"another source; {OTHER}")

    def _check_splits(self, train):
        """Raises BadInput if a val shard equals one of these train shards in its length and at both
        ends."""
        for val in self.val:
            tokens = self.headers[val].tokens
            same_length = [path for path in train if self.headers[path].tokens == tokens]
            if not tokens or not same_length:
                continue
            ends = ends_of(val)
            for path in same_length:
                if ends_of(path) == ends:
                    raise BadInput(f"{path} and {val.name} have the same tokens: validation would "
                                   "measure the training text; move one of them to another folder")


def ends_of(path: Path) -> bytes:
    """The first and the last EDGE ids of a shard."""
    ids = read_shard(path)
    return ids[:EDGE].tobytes() + ids[-EDGE:].tobytes()


def digest(value: Any) -> str:
    """The SHA-256 of nested lists, tuples, numbers and strings, in hexadecimal."""
    return hashlib.sha256(repr(value).encode()).hexdigest()


def read_validation(shards: Shards, val_tokens: int, block_size: int,
                    tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """The first val_tokens tokens of the val split, whole rows: int64 x, y (rows, block_size).
    Raises BadInput if that is not one row."""
    found = shards.tokens["val"]
    rows = min(val_tokens, found - 1) // block_size
    if rows < 1:
        remedy = "lower --block_size or make a larger val split"
        if val_tokens < found:
            remedy = "raise it"
        raise BadInput(f"validation needs {block_size + 1} tokens: there are {found} in "
                       f"{shards.folder}, and --val_tokens is {val_tokens}; {remedy}")
    pieces = []
    missing = rows * block_size + 1
    for path in shards.val:
        piece = read_shard(path)[:missing]
        check_ids(piece, tokenizer.vocab_size, path)
        pieces.append(piece)
        missing -= len(piece)
    tokens = np.concatenate(pieces).astype(np.int64)
    return tokens[:-1].reshape(rows, block_size), tokens[1:].reshape(rows, block_size)


# --------------------------------------------------------------------------------------------------
# Whether ids are a tokenizer's


def check_ids(ids: np.ndarray, vocab_size: int, path: str | Path,
              remedy: str = f"the folder mixes tokenizers; {OTHER}") -> None:
    """Raises BadInput if a shard contains an id outside its vocabulary."""
    if len(ids) and int(ids.max()) >= vocab_size:
        raise BadInput(f"{path} contains the id {int(ids.max())}, but its tokenizer ends at "
                       f"{vocab_size - 1}: {remedy}")


def check_eot(ids: np.ndarray, tokenizer: Tokenizer, path: str | Path,
              remedy: str = f"it is of another tokenizer; {OTHER}") -> None:
    """Raises BadInput if the first million ids of a shard contain no end-of-text: then they are
    another tokenizer's."""
    if len(ids) >= PROBED and not (ids[:PROBED] == tokenizer.eot).any():
        raise BadInput(f"{path} starts with a million tokens without {tokenizer.name}'s end of "
                       f"text, {tokenizer.eot}: {remedy}")


def check_shards(shards: Shards, tokenizer: Tokenizer) -> None:
    """Raises BadInput if meta.json or the first million ids of a shard do not fit the tokenizer.

    The loader checks the other ids when it reads them.
    """
    check_described(shards.meta, tokenizer)
    # one document may be longer than a million tokens: a checksum is better evidence
    is_certain = shards.meta is not None and shards.meta.tokenizer_crc32 is not None
    for path in shards.train + shards.val:
        ids = read_shard(path)[:PROBED]
        if not tokenizer.is_text:
            check_ids(ids, tokenizer.vocab_size, path, "raise N of ids:N in its meta.json")
            check_eot(ids, tokenizer, path, "name the id that separates documents in its "
                                            'meta.json, as "eot": 0')
            continue
        check_ids(ids, tokenizer.vocab_size, path)
        if not is_certain:
            check_eot(ids, tokenizer, path)
