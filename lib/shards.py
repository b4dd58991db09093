"""A folder of token shards: what is in it, whether it is whole, whose tokens they are. fineweb.py
makes one.

A shard is one array of token ids in a file <prefix>_{train|val}_<index>.npy, or .bin as llm.c and
modded-nanogpt write it; that ending decides the split, nothing else in the name. meta.json beside
the shards says what made them.
"""

import hashlib
import os
import re
import shlex
import zlib
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from lib.cli import BadInput, check, flag
from lib.files import Unreadable, open_file, read_json, read_text

ENDING = re.compile(r"_(train|val)_[0-9]+\.(npy|bin)\Z")
BIN_DTYPES = {(20240520, 1): np.uint16,
              (20240801, 7): np.uint32}  # llm.c's and modded-nanogpt's (magic, version)
SPLITS = ("val", "train")
EDGE = 4096  # ids compared at each end of two shards of equal length
UNREADABLE = "check the disk, the permissions and `ulimit -n`"
REPAIR = "if fineweb.py made the folder, give its command again: it writes what is missing or damaged"
OTHER = "give fineweb.py another --out"


class Damaged(BadInput):
    """A file that was read and is not a whole shard."""


# ----------------------------------------------------------------------------------------------------------------------
# One shard


class Header(NamedTuple):
    dtype: np.dtype
    tokens: int
    offset: int  # bytes in front of the ids


def read_header(path, remedy=REPAIR):
    """What a shard says about itself, compared with the size of its file.

    Raises Damaged, ending in `remedy`, if it is not a whole shard, Unreadable if it could not be
    read, which says nothing about the ids in it.
    """
    with open_file(path, UNREADABLE) as file:
        return _read_header(file, Path(path), remedy)


def read_shard(path, remedy=REPAIR):
    """A shard -> read-only token ids (n,), uint16 or uint32, memory-mapped where that is possible.

    Raises Damaged and Unreadable as `read_header`.
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


def _read_header(file, path, remedy):
    """Of .npy, and of .bin: 256 int32 (magic, version, tokens), then the ids."""
    try:
        if path.suffix == ".npy":
            version = np.lib.format.read_magic(file)
            parse = {(1, 0): np.lib.format.read_array_header_1_0,
                     (2, 0): np.lib.format.read_array_header_2_0}[version]
            shape, _, dtype = parse(file)
        else:
            header = np.frombuffer(file.read(1024), dtype=np.int32, count=256)
            kind = int(header[0]), int(header[1])
            if kind not in BIN_DTYPES:
                raise ValueError(f"unknown magic number and version {kind}")
            shape, dtype = (int(header[2]),), np.dtype(BIN_DTYPES[kind])
        offset, size = file.tell(), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise Unreadable(f"cannot read {path} ({error.strerror}): {UNREADABLE}") from error
    except Exception as error:  # numpy's parser of headers raises many kinds
        raise Damaged(
            f"{path} is damaged, or not a shard ({type(error).__name__}: {str(error)[:200]}): {remedy}"
        ) from error
    if dtype not in (np.uint16, np.uint32) or len(shape) != 1:
        raise Damaged(f"{path} is not a shard: it holds a {len(shape)}-dimensional array of {dtype}, not token ids in one "
                      f"dimension, uint16 or uint32: {remedy}")
    if size != offset + shape[0] * dtype.itemsize:
        raise Damaged(f"{path} is damaged (its header does not fit its {size:,} bytes): {remedy}")
    return Header(dtype, shape[0], offset)


# ----------------------------------------------------------------------------------------------------------------------
# meta.json


@dataclass
class Start:
    """Where a shard begins: `drop` ids after the place `source` of the text (None: its beginning).
    """
    source: dict | None = flag(None, None)
    drop: int = flag(0, None, at_least=0, at_most=2**53)


@dataclass
class Record:
    """One shard as meta.json lists it."""
    name: str = flag(MISSING, None)
    tokens: int = flag(MISSING, None, at_least=1, at_most=2**53)
    crc32: int = flag(MISSING, None, at_least=0, below=2**32)
    start: dict = flag(MISSING, None)  # a Start


@dataclass
class Split:
    """What the shards of a split hold together; `bytes` of UTF-8 text."""
    shards: int = flag(0, None, at_least=0, at_most=2**53)
    tokens: int = flag(0, None, at_least=0, at_most=2**53)
    documents: int = flag(0, None, at_least=0, at_most=2**53)
    bytes: int = flag(0, None, at_least=0, at_most=2**53)


@dataclass
class Meta:
    """meta.json. Written by hand beside shards of another program, it needs nothing but the
    tokenizer."""
    tokenizer: str = flag(MISSING, None)  # tokenizer.json beside it, or a tiktoken name
    tokenizer_crc32: int | None = flag(None, None, at_least=0,
                                       below=2**32)  # of the text of tokenizer.json
    vocab_size: int | None = flag(None, None, at_least=1, at_most=2**32)
    eot: int | None = flag(None, None, at_least=0, below=2**32)
    dtype: Literal["uint16", "uint32"] | None = flag(None, None)
    splits: dict | None = flag(None, None)        # split -> a Split
    skipped_rows: int = flag(0, None, at_least=0, at_most=2**53)
    duplicates: int = flag(0, None, at_least=0, at_most=2**53)  # documents left out by --dedup
    command: str | None = flag(None, None)        # what made the folder, without --out
    settings: dict | None = flag(None, None)      # what fineweb.py compares before it continues
    shards: list | None = flag(
        None, None)  # of Record; None: it does not list them, as by an older fineweb.py
    complete: bool = flag(True, None)
    resume: dict | None = flag(None, None)        # the Start of the shard after the last one listed


def read_meta(folder, remedy=OTHER):
    """The Meta of a folder, None without a meta.json. Raises BadInput, ending in `remedy`, whatever
    else stands in the file."""
    path = Path(folder) / "meta.json"
    if not os.path.lexists(path):
        return None
    values = read_json(path, remedy)
    try:
        meta = _typed(Meta, values)
        if meta.splits is not None:
            meta.splits = {split: _typed(Split, meta.splits.get(split)) for split in SPLITS}
        if meta.shards is not None:
            meta.shards = [_typed(Record, record) for record in meta.shards]
            for record in meta.shards:
                record.start = _typed(Start, record.start)
            meta.resume = meta.resume and _typed(Start, meta.resume)
            _check_records(meta)
    except BadInput as error:
        raise BadInput(f"{path} is damaged ({error}): {remedy}") from error
    return meta


def _typed(cls, values):
    """A dict out of JSON -> a dataclass, every type and bound checked by lib/cli.py; keys of other
    programs are left out."""
    if not isinstance(values, dict):
        raise BadInput(f"{cls.__name__.lower()}: not an object")
    for field in fields(cls):
        if field.name not in values and field.default is MISSING:
            raise BadInput(f"no {field.name}")
    config = cls(
        **{field.name: values[field.name] for field in fields(cls) if field.name in values})
    check(config)
    return config


def _check_records(meta):
    names = [record.name for record in meta.shards]
    plain = all(split_of(name) and not {"/", "\\", "\0"} & set(name) for name in names)
    if not plain or len(set(names)) < len(names):
        raise BadInput("its list of shards does not name shards")
    if None in (meta.splits, meta.settings, meta.dtype, meta.vocab_size,
                meta.eot) or (meta.resume is None) != meta.complete:
        raise BadInput("parts of it are missing")
    for split in SPLITS:
        tokens = [record.tokens for record in meta.shards if split_of(record.name) == split]
        if (len(tokens), sum(tokens)) != (meta.splits[split].shards, meta.splits[split].tokens):
            raise BadInput(f"its counts of {split} tokens contradict each other")


def missing_records(folder, meta):
    """The records of the shards that are missing, damaged, or not those listed. Raises Unreadable
    where that cannot be told."""
    found = []
    for record in meta.shards:
        path = Path(folder) / record.name
        try:
            header = read_header(path) if os.path.lexists(path) else None
        except Damaged:
            header = None
        if header is None or (header.tokens, header.dtype) != (record.tokens, np.dtype(meta.dtype)):
            found.append(record)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# The folder


def split_of(name):
    """"train", "val", or None for a file that is not named as a shard."""
    ending = ENDING.search(name)
    return ending and not name.startswith(".") and ending[1] or None


def find_shards(folder):
    """(dict split -> sorted paths of its shards, other .npy and .bin files) of a folder."""
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        names = []
    except OSError as error:
        raise Unreadable(f"cannot read {folder} ({error.strerror}): {UNREADABLE}") from error
    paths = {
        split: [Path(folder) / name
                for name in names
                if split_of(name) == split]
        for split in SPLITS
    }
    return paths, [name for name in names if name.endswith((".npy", ".bin")) and not split_of(name)]


class Shards:
    """A folder of shards: `folder`, `train` and `val` (sorted paths), `tokens` (dict split ->
    count), `tokenizer` (a spec), `meta`, `identity` (of the training text, as a checkpoint
    remembers it) and `former_identity` (as checkpoints of earlier versions remember it).

    Reads every header and holds no file open. needed: the splits without which it is of no use.
    named_by: the flag that names it. Raises BadInput unless the folder has these splits, is whole,
    finished and of one tokenizer.
    """

    def __init__(self, folder, needed=SPLITS, named_by="--data"):
        self.folder = folder = Path(folder)
        self.meta = read_meta(folder)
        command = self.meta and self.meta.command
        command = f"`{command} --out {shlex.quote(str(folder))}`" if command else "the fineweb.py command that made it"
        if self.meta and not self.meta.complete:
            raise BadInput(f"{folder}/ is not finished: give {command} again, which continues")
        paths, others = find_shards(folder)
        self.train, self.val = paths["train"], paths["val"]
        headers = {path: read_header(path) for path in self.train + self.val}
        if self.meta and self.meta.shards is not None:
            self._compare_names(folder, headers, command)
        self._check_needed(folder, others, needed, named_by)
        self._compare_dtypes(headers)
        self.identity, self.former_identity = self._identify(headers)
        self.tokens = {
            split: sum(headers[p].tokens for p in paths[split]) for split in ("train", "val")
        }
        for split in SPLITS if self.meta and self.meta.splits else ():
            if (told := self.meta.splits[split].tokens) != self.tokens[split]:
                raise BadInput(f"{folder}/ holds {self.tokens[split]:,} {split} tokens and its meta.json says {told:,}: "
                               f"shards are missing, or of another source; {OTHER}")
        self._compare_splits(headers)
        spec = self.meta.tokenizer if self.meta else "gpt2"  # shards of build-nanogpt and llm.c have no meta.json
        self.tokenizer = str(folder / spec) if spec.endswith(".json") else spec
        if spec.endswith(".json"):
            check_tokenizer_file(folder / spec, self.meta)
        self.vocab_size = self.meta.vocab_size if self.meta else 50257  # None where meta.json, written by hand, does not say

    def _identify(self, headers):
        """(identity, former_identity): hashes that are the same wherever the shards lie.

        By the checksums that meta.json lists: other text may fill shards of the same names and
        lengths, as it does with --max_tokens. Without them, and in earlier versions, by names and
        lengths.
        """
        named = [(path.name, headers[path].tokens) for path in self.train]
        if not self.meta or self.meta.shards is None:
            return digest(named), digest(named)
        checksums = {record.name: record.crc32 for record in self.meta.shards}
        summed = [(tokens, checksums[name]) for name, tokens in named]
        return digest(summed), digest(named)

    def _compare_names(self, folder, headers, command):
        listed = {record.name: record.tokens for record in self.meta.shards}
        found = {path.name: header.tokens for path, header in headers.items()}
        if odd := sorted(name for name in listed if found.get(name) != listed[name]):
            what = f"holds {found[odd[0]]:,} tokens, not {listed[odd[0]]:,}" if odd[
                0] in found else "is missing"
            raise BadInput(
                f"{folder / odd[0]} {what}, says meta.json: give {command} again, which writes it anew"
            )
        if more := sorted(found.keys() - listed.keys()):
            raise BadInput(
                f"{folder / more[0]} is not one of the shards that meta.json lists: move it to another folder"
            )

    def _check_needed(self, folder, others, needed, named_by):
        found = {"train": self.train, "val": self.val}
        if any(not found[split] for split in needed):
            missing = "train" if self.val else "val" if self.train else "any"
            make = {"edu_fineweb10B": "python fineweb.py", "docstrings": "make train"}.get(
                str(folder), "python fineweb.py --source <text files or dataset id> "
                             f"--out {shlex.quote(str(folder))}")
            if folder.is_file():
                shard = folder.name.endswith((".npy", ".bin"))
                raise BadInput(f"{named_by} {folder} is a file, not a folder of shards: name "
                               + ("the folder that it is in"
                                  if shard else "one that fineweb.py --source made of it"))
            named = f" ({others[0]} does not end in _train_<index> or _val_<index>)" if others else ""
            lack = f"does not hold {missing} shards{named}" if folder.is_dir(
            ) else f"is not there (in {os.getcwd()})"
            raise BadInput(f"{folder}/ {lack}: make them with `{make}`, "
                           f"or name another {named_by}")

    def _compare_dtypes(self, headers):
        want = np.dtype(
            self.meta.dtype) if self.meta and self.meta.dtype else headers[self.train[0]].dtype
        if odd := next((p for p in headers if headers[p].dtype != want), None):
            other = "meta.json" if self.meta and self.meta.dtype else self.train[0].name
            raise BadInput(f"{odd} holds {headers[odd].dtype} and {other} says {want}: they are of different tokenizers; "
                           "put each tokenizer's shards into a folder of their own")

    def _compare_splits(self, headers):
        """Raises BadInput if a val shard is also a train shard, told from the length and both ends.
        """
        def ends(path):
            tokens = read_shard(path)
            return tokens[:EDGE].tobytes() + tokens[-EDGE:].tobytes()

        for val in self.val:
            same = [p for p in self.train if headers[p].tokens == headers[val].tokens > 0]
            if same and (twin := next(
                (p for p, first in ((p, ends(val)) for p in same) if ends(p) == first), None)):
                raise BadInput(f"{twin} and {val.name} hold the same tokens: validation would measure the training "
                               "text; move one of them to another folder")


def digest(value):
    """The SHA-256 of nested lists, tuples, numbers and strings, as hexadecimal digits."""
    return hashlib.sha256(repr(value).encode()).hexdigest()


def read_validation(shards, val_tokens, block_size, tokenizer):
    """The first val_tokens tokens of the val split, whole rows: int64 arrays x, y (rows,
    block_size). Raises BadInput if there is no row."""
    rows = min(val_tokens, shards.tokens["val"] - 1) // block_size
    if rows < 1:
        raise BadInput(
            f"validation needs {block_size + 1} tokens: there are {shards.tokens['val']} in {shards.folder}, and "
            f"--val_tokens is {val_tokens}; "
            + ("raise it" if val_tokens <
               shards.tokens["val"] else "lower --block_size or make a larger val split"))
    pieces, missing = [], rows * block_size + 1
    for path in shards.val:
        pieces.append(read_shard(path)[:missing])
        check_ids(pieces[-1], tokenizer.vocab_size, path)
        missing -= len(pieces[-1])
    tokens = np.concatenate(pieces).astype(np.int64)
    return tokens[:-1].reshape(rows, block_size), tokens[1:].reshape(rows, block_size)


def check_ids(tokens, vocab_size, path, remedy=f"the folder mixes tokenizers; {OTHER}"):
    """Raises BadInput if a shard holds an id beyond its vocabulary."""
    if len(tokens) and int(tokens.max()) >= vocab_size:
        raise BadInput(
            f"{path} holds the id {int(tokens.max())}, but its tokenizer ends at {vocab_size - 1}: {remedy}"
        )


def check_eot(tokens, tokenizer, path, remedy=f"it is of another tokenizer; {OTHER}"):
    """Raises BadInput if the first million ids of a shard hold no end of text: they are of another
    tokenizer."""
    if len(tokens) >= 1_000_000 and not (tokens[:1_000_000] == tokenizer.eot).any():
        raise BadInput(
            f"{path} begins with a million tokens without {tokenizer.name}'s end of text, {tokenizer.eot}: {remedy}"
        )


def check_shards(shards, tokenizer):
    """Raises BadInput if meta.json or a shard cannot be the tokenizer's, told from the first
    million ids of each shard.

    The loader checks the other ids as it comes to them.
    """
    check_tokenizer(shards.meta, tokenizer)
    for path in shards.train + shards.val:
        tokens = read_shard(path)[:1_000_000]
        check_ids(tokens, tokenizer.vocab_size, path)
        if shards.meta is None or shards.meta.tokenizer_crc32 is None:  # else check_tokenizer knows: a text may be that long
            check_eot(tokens, tokenizer, path)


def check_tokenizer_file(path, meta):
    """Raises BadInput if the file of a folder's tokenizer is missing or not the shards' own: one
    made anew would not do, its ids mean other text."""
    mend = f"put back the one that was made with these shards, or {OTHER}"
    text = read_text(path, mend)
    if meta.tokenizer_crc32 not in (None, zlib.crc32(text.encode())):
        raise BadInput(f"{path} is damaged, or of other shards than those beside it: {mend}")


def check_tokenizer(meta, tokenizer, remedy=OTHER):
    """Raises BadInput if what meta.json (None: there is none) says of the tokenizer is not so."""
    for name in ("vocab_size", "eot"):
        if meta and getattr(meta, name) not in (None, getattr(tokenizer, name)):
            raise BadInput(f"the shards' meta.json says {name} {getattr(meta, name):,}, but their tokenizer "
                           f"{tokenizer.name} has {getattr(tokenizer, name):,}: they are of another tokenizer; {remedy}")
    if meta and meta.tokenizer_crc32 not in (None, zlib.crc32(tokenizer.spec.encode())):
        raise BadInput(
            f"the tokenizer.json beside the shards is not the one they were made with: put that back, or {remedy}"
        )
