"""A folder of token shards: what lies in it, whether it is whole, whose tokens they are. fineweb.py makes one."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np

from lib.cli import BadInput

BIN_DTYPES = {(20240520, 1): np.uint16, (20240801, 7): np.uint32}  # llm.c's and modded-nanogpt's (magic, version)


def read_shard(path):
    """A shard -> read-only memory-mapped token ids (n,), uint16 or uint32. BadInput if it is none.

    Reads .npy, and the .bin of llm.c and modded-nanogpt: 256 int32 of header (magic, version, tokens), then the ids.
    """
    try:
        if path.suffix == ".npy":
            tokens = np.load(path, mmap_mode="r")
        else:
            header = np.fromfile(path, dtype=np.int32, count=256)
            dtype = BIN_DTYPES[header[0], header[1]]
            tokens = np.memmap(path, dtype=dtype, mode="r", offset=1024, shape=(int(header[2]),))
        if spare := path.stat().st_size - tokens.offset - tokens.nbytes:
            raise ValueError(f"{spare} bytes more than its header says")
    except Exception as error:  # numpy's header parser raises many kinds
        raise BadInput(f"{path} is not a whole shard ({type(error).__name__}: {error}): delete it and run fineweb.py again") from error
    if tokens.dtype not in (np.uint16, np.uint32) or tokens.ndim != 1:
        raise BadInput(f"{path} holds {tokens.ndim}-dimensional {tokens.dtype}, not one line of uint16 or uint32 ids")
    return tokens


class Shards:
    """A folder of shards: `train` and `val` (lists of paths), `tokens` (dict split -> count), `tokenizer` (a spec)."""

    def __init__(self, folder):
        folder = Path(folder)
        files = sorted(p for p in folder.glob("*") if p.suffix in (".npy", ".bin")) if os.path.isdir(folder) else []
        self.train, self.val = ([p for p in files if f"_{split}_" in p.name] for split in ("train", "val"))
        if not self.train or not self.val:
            missing = "train" if self.val else "val" if self.train else "any"
            make = {"edu_fineweb10B": "python fineweb.py", "docstrings": "make train"}.get(
                str(folder), f"python fineweb.py --source <text files or dataset id> --out {folder}")
            raise BadInput(f"{folder}/ does not hold {missing} shards: make them with `{make}`, or name another --data")
        arrays = {p: read_shard(p) for p in self.train + self.val}
        odd = next((p for p, tokens in arrays.items() if tokens.dtype != arrays[self.train[0]].dtype), None)
        if odd:
            raise BadInput(f"{odd} holds {arrays[odd].dtype} and {self.train[0].name} {arrays[self.train[0]].dtype}: they are of "
                           "different tokenizers; put each tokenizer's shards into a folder of their own")
        self.tokens = {split: sum(len(arrays[p]) for p in getattr(self, split)) for split in ("train", "val")}
        # the same shards give the same stream of tokens, wherever they lie
        self.identity = hashlib.sha256(repr([(p.name, len(arrays[p])) for p in self.train]).encode()).hexdigest()
        try:
            meta = json.loads((folder / "meta.json").read_text())
            spec, splits = meta["tokenizer"], meta.get("splits", {}) if meta.get("complete") else {}
            self.tokenizer = str(folder / spec) if spec.endswith(".json") else spec
            told = {split: int(splits[split]["tokens"]) for split in splits if split in self.tokens}
        except FileNotFoundError:
            self.tokenizer, told = "gpt2", {}  # shards made by build-nanogpt or llm.c have no meta.json
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise BadInput(f"{folder}/meta.json is damaged ({error}): run fineweb.py again into another folder") from error
        for split, count in told.items():
            if count != self.tokens[split]:
                raise BadInput(f"{folder}/ holds {self.tokens[split]:,} {split} tokens, but its meta.json says {count:,}: shards are "
                               "missing, or of another source; make them again with fineweb.py into another folder")


def check_ids(tokens, vocab_size, path):
    if len(tokens) and int(tokens.max()) >= vocab_size:
        raise BadInput(f"{path} holds the id {int(tokens.max())}, but its tokenizer ends at {vocab_size - 1}: "
                       "the folder mixes tokenizers; make the shards again with fineweb.py")


def check_shards(shards, tokenizer):
    """BadInput if a shard cannot be the tokenizer's, told from its first million ids; the loader checks the others later."""
    for path in shards.train + shards.val:
        tokens = read_shard(path)[:1_000_000]
        check_ids(tokens, tokenizer.vocab_size, path)
        if len(tokens) == 1_000_000 and not (tokens == tokenizer.eot).any():
            raise BadInput(f"{path} begins with a million tokens without {tokenizer.name}'s end of text, {tokenizer.eot}: it is of "
                           "another tokenizer; make the shards again with fineweb.py")
