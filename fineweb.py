"""Any text -> shards of token ids, FineWeb-edu (Penedo et al. 2024, https://arxiv.org/abs/2406.17557) by default.

    python fineweb.py                                              # 10B tokens of FineWeb-edu -> edu_fineweb10B/
    python fineweb.py --name sample-100BT                          # 100B tokens -> edu_fineweb100B/
    python fineweb.py --source a.parquet more/ "*.jsonl.zst" --out mine --tokenizer cl100k_base
    python fineweb.py --docstrings --tokenizer bpe:4096            # needs no download -> docstrings/

A shard is a one-dimensional .npy of uint16 ids (uint32 when the vocabulary needs it), the end-of-text id before each
document, named <prefix>_{val|train}_<index>.npy; meta.json beside the shards says what made them. Text is read as a
stream and encoded by threads (tiktoken works outside the interpreter lock), so memory stays flat and nothing depends on
how processes start. An interrupted run continues after its last whole shard when the same command is given again.
"""

import ast
import errno
import glob
import importlib.util
import json
import os
import sys
import sysconfig
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cli import BadInput, flag, parse, run
from tokenizer import load_tokenizer, train_bpe

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}  # `datasets`' loaders
COMPRESSED = (".gz", ".zst")
BATCH_ROWS = 64              # documents a thread encodes at a time
TXT_LINES = 4096             # lines of a .txt a thread encodes at a time
BPE_TEXT = 100_000_000       # characters a BPE is trained on, at most
DOCSTRING_PACKAGES = ("numpy", "torch", "pandas", "networkx", "sympy")  # what requirements.txt brings, the wordiest of it


@dataclass
class Config:
    source: tuple[str, ...] = flag((FINEWEB_EDU,), "a dataset id, or local files, folders and globs of "
                                   "parquet, jsonl(.gz|.zst) or txt, read in the order given; a .txt is one document")
    name: str | None = flag(None, "configuration of the dataset; FineWeb-edu: sample-10BT, sample-100BT, sample-350BT, ...")
    text_column: str = flag("text", "column that holds the text")
    docstrings: bool = flag(False, "the documentation strings of this Python's packages, instead of a source")
    tokenizer: str = flag("gpt2", "a tiktoken name, a tokenizer.json, or bpe:4096 to train one of 4096 ids on the source")
    out: str | None = flag(None, "folder of the shards; without it, named after the source")
    shard_size: int = flag(100_000_000, "tokens a shard")
    val_tokens: int | None = flag(None, "tokens of the validation shard, the first; without it, one shard, or a tenth "
                                  "of a source smaller than that")
    max_tokens: int | None = flag(None, "stop after so many tokens")
    workers: int | None = flag(None, "encoding threads; without it, one a core")


def main(argv):
    (cfg,), given = parse((Config,), argv, __doc__)
    check(cfg, given)
    out = Path(cfg.out)
    meta = read_meta(out, cfg)
    if meta.get("complete"):
        print(f"{out}/ is complete: {summary(meta)}")
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        source = Source(cfg, out)
        tokenizer = find_tokenizer(cfg, out, source)
        write_shards(cfg, out, source, tokenizer, meta)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise BadInput(f"the disk of {out}/ is full: free some space and give the same command again; "
                           "the shards already there stay") from error
        raise BadInput(f"cannot write {out}/ ({error}): give another --out") from error


def check(cfg, given):
    """Fill in what follows from other flags; BadInput on what cannot work."""
    if cfg.docstrings and "source" in given:
        raise BadInput("--docstrings and --source both name the text: give one of them")
    for field in ("shard_size", "max_tokens", "workers"):
        if getattr(cfg, field) is not None and getattr(cfg, field) < 1:
            raise BadInput(f"--{field} must be at least 1, not {getattr(cfg, field)}")
    if cfg.val_tokens is not None and cfg.val_tokens < 0:
        raise BadInput(f"--val_tokens must not be negative, not {cfg.val_tokens}")
    if cfg.tokenizer.startswith("bpe:") and not cfg.tokenizer[4:].isdigit():
        raise BadInput(f"--tokenizer {cfg.tokenizer}: write bpe:<number of ids>, for instance bpe:4096")
    if cfg.source == (FINEWEB_EDU,) and not cfg.docstrings:
        cfg.name = cfg.name or "sample-10BT"
        cfg.out = cfg.out or f"edu_fineweb{cfg.name.removeprefix('sample-').removesuffix('T')}"
    if cfg.docstrings:
        cfg.out = cfg.out or "docstrings"
    cfg.out = cfg.out or Path(cfg.source[0]).name.split(".")[0].replace("*", "") or "shards"
    cfg.workers = cfg.workers or os.cpu_count()


# ----------------------------------------------------------------------------------------------------------------------
# meta.json: what made the shards, how far it came


def settings(cfg):
    """What must be equal for a run to continue another's shards."""
    source = "docstrings" if cfg.docstrings else list(cfg.source)
    return {"source": source, "name": cfg.name, "text_column": cfg.text_column, "shard_size": cfg.shard_size,
            "val_tokens": cfg.val_tokens, "max_tokens": cfg.max_tokens, "tokenizer_flag": cfg.tokenizer}


def read_meta(out, cfg):
    """meta.json of a folder, {} if it has none. BadInput if its shards were made by other settings."""
    try:
        meta = json.loads((out / "meta.json").read_text())
        made_by = meta["settings"]
    except FileNotFoundError:
        shards = sorted(out.glob("*_*_*.npy")) + sorted(out.glob("*.bin"))
        if shards:
            raise BadInput(f"{out}/ holds shards of another program ({shards[0].name}): give another --out") from None
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"cannot read {out}/meta.json ({error}): delete the folder, or give another --out") from error
    for key, value in settings(cfg).items():
        if made_by.get(key) != value:
            key_flag = "--tokenizer" if key == "tokenizer_flag" else f"--{key}"
            raise BadInput(f"{out}/ holds shards made with {key_flag} {made_by.get(key)}, not {value}: "
                           "give another --out, or delete the folder")
    return meta


def write_meta(out, meta):
    replace(out / "meta.json", lambda path: path.write_text(json.dumps(meta, indent=1)))


def replace(path, write):
    """Let `write` fill a temporary file, then give it its name: `path` is whole or absent, also after a crash."""
    partial = path.with_name(path.name + ".tmp")
    try:
        write(partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def summary(meta):
    text = ", ".join(f"{split} {s['tokens']:,} tokens of {s['documents']:,} documents" for split, s in meta["splits"].items())
    return f"{text}; tokenizer {meta['tokenizer']}; {meta['skipped_rows']:,} rows skipped (empty or not text)"


# ----------------------------------------------------------------------------------------------------------------------
# Reading


@dataclass
class Batch:
    """Documents in order. continues: the first is the rest of a document that began in an earlier batch.

    after: where the source stands behind this batch, JSON. skipped: rows left out so far, since the very start.
    """
    texts: list
    continues: bool
    after: dict
    skipped: int


class Source:
    """The documents of --source as a stream of Batch, from the start or from the `after` of an earlier batch."""

    def __init__(self, cfg, out):
        self.column, self.name = cfg.text_column, cfg.name
        if cfg.docstrings:
            self.parts = [extract_docstrings(out)]
        else:
            self.parts = [part for source in cfg.source for part in find_parts(source)]

    def batches(self, start=None):
        start = start or {"part": 0, "state": None, "skipped": 0, "continues": False}
        skipped = start["skipped"]
        for index in range(start["part"], len(self.parts)):
            part, at_start = self.parts[index], index == start["part"]
            is_txt = part.removesuffix(".gz").removesuffix(".zst").endswith(".txt")
            continues = is_txt and at_start and start["continues"]
            try:
                dataset = self._open(part)
                if at_start and start["state"]:
                    dataset.load_state_dict(start["state"])
                for table in dataset.iter(batch_size=TXT_LINES if is_txt else BATCH_ROWS):
                    rows = self._texts(table, dataset, part)
                    texts = ["".join(rows)] if is_txt else [text for text in rows if isinstance(text, str) and text.strip()]
                    skipped += 0 if is_txt else len(rows) - len(texts)
                    after = {"part": index, "state": dataset.state_dict(), "skipped": skipped, "continues": True}
                    yield Batch(texts, continues, after, skipped)
                    continues = is_txt
            except (BadInput, GeneratorExit, KeyboardInterrupt):
                raise
            except Exception as error:  # pyarrow, json, zstd, fsspec and the hub each raise their own
                raise BadInput(f"cannot read {part} ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}): "
                               "repair or leave out the file; the shards already written stay") from error

    def _open(self, part):
        """One file, or a dataset of the hub, as a stream of arrow tables."""
        if sys.version_info < (3, 14):
            _register_zstd()
        import datasets

        datasets.utils.logging.set_verbosity_error()
        stem = part.removesuffix(".gz").removesuffix(".zst")
        builder = BUILDERS.get(Path(stem).suffix) if os.path.exists(part) else None
        options = {"sample_by": "line", "keep_linebreaks": True} if builder == "text" else {}
        try:
            if builder:
                dataset = datasets.load_dataset(builder, data_files=[part], split="train", streaming=True, **options)
            else:
                dataset = datasets.load_dataset(part, self.name, split="train", streaming=True)
        except Exception as error:
            if builder:
                raise
            raise BadInput(f"cannot reach the dataset {part} ({type(error).__name__}): it is no local file or folder, and the "
                           "hub does not answer or does not have it; check the name, or give local files") from error
        return dataset.with_format("arrow")

    def _texts(self, table, dataset, part):
        column = "text" if part.endswith(".txt") else self.column
        if column not in table.column_names:
            raise BadInput(f"{part} has no column {column}: name one of {', '.join(table.column_names)} by --text_column")
        values = table[column].to_pylist()
        kind = (dataset.features or {}).get(column)
        if type(kind).__name__ == "Json":  # rows of mixed types: `datasets` hands each one over as JSON
            values = [json.loads(value) if value is not None else None for value in values]
        return values


def find_parts(source):
    """A --source word -> files to read, or the dataset id itself. BadInput if a path holds nothing that can be read."""
    names = [f"{end}{packed}" for end in BUILDERS for packed in ("", *COMPRESSED)]
    if os.path.isdir(source):
        files = sorted(str(p) for p in Path(source).rglob("*") if p.name.endswith(tuple(names)))
    elif os.path.exists(source) or glob.has_magic(source) or source.endswith(tuple(names)):
        files = sorted(glob.glob(source, recursive=True)) if glob.has_magic(source) else [source]
    else:
        return [source]
    missing = [f for f in files if not os.path.isfile(f)]
    if not files or missing:
        raise BadInput(f"no file {(missing or [source])[0]}: --source takes parquet, jsonl(.gz|.zst) and txt")
    wrong = [f for f in files if not f.endswith(tuple(names))]
    if wrong:
        raise BadInput(f"cannot tell what {wrong[0]} is: --source takes parquet, jsonl(.gz|.zst) and txt")
    unreadable = [f for f in files if not os.access(f, os.R_OK)]
    if unreadable:
        raise BadInput(f"no permission to read {unreadable[0]}: change it or leave the file out")
    return files


def _register_zstd():
    """Let `datasets` read .zst with the codec that pyarrow brings, where Python itself has none (before 3.14)."""
    import fsspec
    import pyarrow

    if "zstd" not in fsspec.available_compressions():
        fsspec.compression.register_compression(
            "zstd", lambda file, mode="rb", **_: pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd"), "zst")


def extract_docstrings(out):
    """Docstrings of the standard library and DOCSTRING_PACKAGES, one document a module, cached in a jsonl file.

    Real English of several MB that every Python brings along: enough to see a small model learn. Returns the path.
    """
    path = out / "docstrings.jsonl"
    if path.exists():
        return str(path)
    roots = [Path(sysconfig.get_path("stdlib"))]
    for package in DOCSTRING_PACKAGES:
        spec = importlib.util.find_spec(package)  # finds it, also in the system's site-packages, without importing it
        roots += [Path(spec.origin).parent] if spec and spec.origin else []
    unwanted = {"test", "tests", "testing", "site-packages", "dist-packages"}
    modules = sorted({p for root in roots for p in root.rglob("*.py") if not unwanted & set(p.relative_to(root).parts)})
    seen, documents = set(), []
    for module in tqdm(modules, desc="docstrings", unit="module", disable=not sys.stderr.isatty()):
        try:
            tree = ast.parse(module.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError, RecursionError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        strings = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        new = [s for s in dict.fromkeys(strings) if s and len(s) > 100 and s not in seen]
        seen.update(new)
        if new:
            documents.append("\n\n".join(new))
    order = np.random.default_rng(0).permutation(len(documents))  # validation is the first part: let it be of all packages
    lines = "".join(json.dumps({"text": documents[i]}) + "\n" for i in order)
    replace(path, lambda partial: partial.write_text(lines, encoding="utf-8"))
    return str(path)


# ----------------------------------------------------------------------------------------------------------------------
# Encoding and writing


def find_tokenizer(cfg, out, source):
    """The --tokenizer; bpe:<n> is trained on the source once and kept in the folder as tokenizer.json."""
    kept = out / "tokenizer.json"
    if kept.exists():
        return load_tokenizer(str(kept))
    if not cfg.tokenizer.startswith("bpe:"):
        tokenizer = load_tokenizer(cfg.tokenizer)
        if tokenizer.spec != tokenizer.name:
            tokenizer.save(kept)
        return tokenizer

    def texts(left=BPE_TEXT):
        for batch in source.batches():
            for text in batch.texts:
                yield text
                left -= len(text)
                if left < 0:
                    return

    print(f"training a BPE of {cfg.tokenizer[4:]} ids")
    tokenizer = train_bpe(texts(), int(cfg.tokenizer[4:]))
    tokenizer.save(kept)
    return tokenizer


def encode(batch, tokenizer, dtype):
    """A Batch -> its ids, the end-of-text id before each document."""
    eot = np.array([tokenizer.eot])
    pieces = [piece for text in batch.texts for piece in (eot, tokenizer.encode(text))][batch.continues:]
    return np.concatenate([np.empty(0, dtype), *pieces]).astype(dtype)


def encoded(batches, tokenizer, dtype, workers):
    """Stream of (Batch, its ids), in order; a bounded number of batches is in work at a time."""
    executor, waiting = ThreadPoolExecutor(workers), deque()
    try:
        for batch in batches:
            waiting.append((batch, executor.submit(encode, batch, tokenizer, dtype)))
            if len(waiting) > 3 * workers:
                batch, future = waiting.popleft()
                yield batch, future.result()
        while waiting:
            batch, future = waiting.popleft()
            yield batch, future.result()
    finally:
        executor.shutdown(cancel_futures=True)


class Writer:
    """Cuts the stream of ids into shards, and keeps meta.json at the last whole one."""

    def __init__(self, cfg, out, tokenizer, meta):
        self.out, self.tokenizer = out, tokenizer
        self.prefix = "edufineweb" if cfg.source == (FINEWEB_EDU,) and not cfg.docstrings else out.resolve().name
        self.val_size = cfg.shard_size if cfg.val_tokens is None else cfg.val_tokens
        self.val_given, self.shard_size = cfg.val_tokens is not None, cfg.shard_size
        self.dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
        self.sizes = tokenizer.token_bytes()
        self.meta = meta or {
            "tokenizer": "tokenizer.json" if (out / "tokenizer.json").exists() else tokenizer.spec,
            "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot, "dtype": np.dtype(self.dtype).name,
            "splits": {split: {"shards": 0, "tokens": 0, "documents": 0, "bytes": 0} for split in ("val", "train")},
            "skipped_rows": 0, "settings": settings(cfg), "complete": False, "resume": {"source": None, "drop": 0}}
        self.pieces, self.count = [], 0

    @property
    def written(self):
        return sum(split["tokens"] for split in self.meta["splits"].values())

    @property
    def room(self):
        """Tokens the shard in work takes: the first one is the validation shard."""
        return self.val_size if self.val_size and not self.meta["splits"]["val"]["shards"] else self.shard_size

    def add(self, ids, before, skipped):
        """Take the ids of one batch; `before` is where the source stood in front of it."""
        used = 0
        while len(ids) - used >= self.room - self.count:
            take = self.room - self.count
            self.pieces.append(ids[used:used + take])
            used += take
            self._write("val" if self.room == self.val_size and not self.meta["splits"]["val"]["shards"] and self.val_size
                        else "train", np.concatenate(self.pieces), {"source": before, "drop": used}, skipped)
            self.pieces, self.count = [], 0
        self.pieces.append(ids[used:])
        self.count += len(ids) - used

    def finish(self, skipped):
        """Write what is left as the last shard. A source that never filled the first shard gives a tenth to validation."""
        splits = self.meta["splits"]
        rest = np.concatenate([np.empty(0, self.dtype), *self.pieces])
        if not len(rest) and not self.written:
            raise BadInput("the source holds no documents: nothing was written; check --source and --text_column "
                           f"({skipped:,} rows were empty or not text)")
        if self.val_size and not splits["val"]["shards"]:
            if self.val_given:
                raise BadInput(f"the source holds {len(rest):,} tokens, fewer than --val_tokens {self.val_size:,}: lower it")
            starts = np.flatnonzero(rest == self.tokenizer.eot)  # cut between two documents if there is a good place
            near = starts[(starts >= len(rest) // 10) & (starts <= len(rest) // 5)]
            cut = int(near[0]) if len(near) else len(rest) // 10
            self._write("val", rest[:cut], {"source": None, "drop": cut}, skipped)
            rest = rest[cut:]
        if len(rest):
            self._write("train", rest, None, skipped)
        self.meta |= {"complete": True, "resume": None, "skipped_rows": skipped}
        write_meta(self.out, self.meta)

    def _write(self, split, ids, resume, skipped):
        stats, index = self.meta["splits"][split], sum(s["shards"] for s in self.meta["splits"].values())

        def save(path):
            with open(path, "wb") as file:
                np.save(file, ids)

        replace(self.out / f"{self.prefix}_{split}_{index:06d}.npy", save)
        counts = sum(np.bincount(ids[i:i + 2**20], minlength=self.tokenizer.vocab_size) for i in range(0, len(ids), 2**20))
        stats["shards"] += 1
        stats["tokens"] += len(ids)
        stats["documents"] += int(counts[self.tokenizer.eot])
        stats["bytes"] += int(counts @ self.sizes)
        self.meta |= {"resume": resume, "skipped_rows": skipped}
        write_meta(self.out, self.meta)


def write_shards(cfg, out, source, tokenizer, meta):
    """The whole job: read, encode, write, say how far it is; continue where `meta` says an earlier run stopped."""
    writer = Writer(cfg, out, tokenizer, meta)
    resume = writer.meta["resume"]
    before, drop, skipped = resume["source"], resume["drop"], writer.meta["skipped_rows"]
    if writer.written:
        print(f"continuing after {writer.written:,} tokens")
    known = {"sample-10BT": 10e9, "sample-100BT": 100e9, "sample-350BT": 350e9}.get(cfg.name)
    total = min(filter(None, (cfg.max_tokens, known)), default=None)
    stream = encoded(source.batches(before), tokenizer, writer.dtype, cfg.workers)
    documents, started = 0, time.perf_counter()
    bar = tqdm(total=total, initial=writer.written, unit="tok", unit_scale=True, dynamic_ncols=True, mininterval=1.0)
    try:
        for batch, ids in stream:
            ids, drop = ids[drop:], max(drop - len(ids), 0)
            left = None if cfg.max_tokens is None else cfg.max_tokens - writer.written - writer.count
            writer.add(ids[:left], before, batch.skipped)
            before, skipped = batch.after, batch.skipped
            documents += len(batch.texts)
            bar.update(len(ids))
            bar.set_postfix_str(f"{documents:,} documents", refresh=False)
            if left is not None and left <= len(ids):
                break
        writer.finish(skipped)
    except KeyboardInterrupt:
        bar.close()
        sys.exit(f"stopped: {writer.written:,} tokens are in whole shards in {out}/; the same command continues there")
    finally:
        stream.close()
        bar.close()
    print(f"{out}/ is complete: {summary(writer.meta)}; {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    run(main)
