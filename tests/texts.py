"""Text in every format, and the shards that fineweb.py must make of it: for test_fineweb.py and
lib/test_shard_writer.py."""

import contextlib
import gc
import gzip
import json
import os
import random
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken

import fineweb
from lib.tokenizers import EOT, load_tokenizer

EOT_ID = 50256
WORDS = ["the", "quick", "naïve", "日本語", "fox's", "12,345", "🙂", "\n", "\n\n", "  ", "\t",
         "x_y", "don't", "Привет", ".", ")!", EOT]


def make_documents(count, seed=0):
    """Documents in several scripts; number 5 is longer than several shards of the tests."""
    rng = random.Random(seed)
    documents = []
    for i in range(count):
        length = 2500 if i == 5 else rng.randrange(1, 60)
        words = [rng.choice(WORDS) + rng.choice(["", " ", " ", "\n"]) for _ in range(length)]
        documents.append("doc " + "".join(words))
    return documents


def reference(documents):
    """A plain reference: end-of-text before each document, tiktoken's own encoding, in one list."""
    gpt2 = tiktoken.get_encoding("gpt2")
    ids = []
    for text in documents:
        ids += [EOT_ID, *gpt2.encode_ordinary(text)]
    return ids


def cut(ids, shard_size, val_tokens=None, max_tokens=None):
    """ids -> the list of (split, ids of a shard) that fineweb.py must write."""
    ids = ids[:max_tokens]
    val = shard_size if val_tokens is None else val_tokens
    if val and len(ids) <= val:  # a tenth, or up to the start of a document near it
        tenth = max(len(ids) // 10, 1)
        near = [i for i in range(tenth, 2 * tenth + 1) if ids[i] == EOT_ID]
        val = near[0] if near else tenth
    shards = [("val", ids[:val])] if val else []
    rest = ids[val:]
    return shards + [("train", rest[i:i + shard_size]) for i in range(0, len(rest), shard_size)]


DOCUMENTS = make_documents(100)
IDS = reference(DOCUMENTS)
FIRST = len(reference(DOCUMENTS[:3]))
TOTAL = len(IDS)


@contextlib.contextmanager
def no_waiting():
    """Leave torch's objects, loaded by conftest.py, out of garbage collections, and do not wait for
    the disk: tests/lib/test_files.py checks that files are flushed."""
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield
    gc.unfreeze()


# --------------------------------------------------------------------------------------------------
# Sources


def jsonl(rows):
    lines = [json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(rows)]
    return "".join(lines).encode()


def zstd(data):
    return pa.Codec("zstd").compress(data, asbytes=True)


def write_source(folder, form, documents=DOCUMENTS, column="text"):
    """Write documents in one of the formats -> what --source takes."""
    folder.mkdir(exist_ok=True)
    if form == "txt":
        (folder / "texts").mkdir()
        for i, text in enumerate(documents):
            (folder / "texts" / f"{i:05d}.txt").write_bytes(text.encode())
        return folder / "texts"
    path = folder / f"data.{form}"
    rows = [{"id": i, column: text} for i, text in enumerate(documents)]
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=37)
    elif form == "json":
        path.write_text(json.dumps(rows))
    else:
        pack = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstd}[form]
        path.write_bytes(pack(jsonl(rows)))
    return path


def write_mixed(folder):
    """Files of every format in turn, with a txt of many pieces -> (list for --source, the
    documents)."""
    documents = []
    sources = []
    for i, form in enumerate(["jsonl.gz", "txt", "parquet", "jsonl", "jsonl.zst"]):
        part = make_documents(40, seed=i)
        if form == "txt":
            part = [" ".join(make_documents(60, seed=9)) * 3, "short text\n"]
        sources.append(write_source(folder / str(i), form, part))
        documents += part
    last = "\n\n".join(make_documents(40, seed=8))
    gz = folder / "last.txt.gz"
    gz.write_bytes(gzip.compress(last.encode()))
    return [*sources, gz], [*documents, last]


# --------------------------------------------------------------------------------------------------
# Shards


def make(source, out, *flags):
    sources = source if isinstance(source, (list, tuple)) else [source]
    fineweb.main(["--source", *map(str, sources), "--out", str(out), *map(str, flags)])


def shard_paths(out):
    return sorted(out.glob("*.npy"), key=lambda path: path.name[-10:])


def read_shards(out):
    """[(split, ids)] in the order of their numbers, which have no gap; no temporary file is left.
    """
    paths = shard_paths(out)
    assert [int(path.stem[-6:]) for path in paths] == list(range(len(paths)))
    assert not list(out.glob("*.tmp"))
    return [(path.stem.split("_")[-2], np.load(path).tolist()) for path in paths]


def all_ids(out):
    ids = []
    for _, shard in read_shards(out):
        ids += shard
    return ids


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_meta(out):
    return json.loads((out / "meta.json").read_text())


def check_meta(out, documents=None, skipped=0):
    """Check the counts in meta.json against the shards, and against `documents` if all were read.
    """
    meta = read_meta(out)
    sizes = load_tokenizer("gpt2").token_bytes()
    shards = read_shards(out)
    for split in ("val", "train"):
        own = [ids for name, ids in shards if name == split]
        flat = [token for ids in own for token in ids]
        assert meta["splits"][split] == {
            "shards": len(own), "tokens": len(flat), "documents": flat.count(EOT_ID),
            "bytes": int(sizes[flat].sum())}
    if documents is not None:
        splits = meta["splits"].values()
        assert sum(split["bytes"] for split in splits) == len("".join(documents).encode())
        assert sum(split["documents"] for split in splits) == len(documents)
    for record, path in zip(meta["shards"], shard_paths(out), strict=True):
        ids = np.load(path)
        assert (record["name"], record["tokens"]) == (path.name, len(ids))
        assert record["crc32"] == zlib.crc32(ids)
    assert meta["complete"] and meta["skipped_rows"] == skipped
    assert (meta["tokenizer"], meta["vocab_size"]) == ("gpt2", 50257)
    assert (meta["eot"], meta["dtype"]) == (EOT_ID, "uint16")
