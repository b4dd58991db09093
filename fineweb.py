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
import gc
import glob
import importlib.util
import json
import os
import sys
import sysconfig
import time
import traceback
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lib.cli import BadInput, flag, parse, run
from lib.tokenizers import load_tokenizer, train_bpe

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}  # format -> loader of `datasets`
FORMATS = (".parquet", *(f"{end}{packed}" for end in (".jsonl", ".json", ".txt") for packed in ("", ".gz", ".zst")))
BATCH_ROWS = 64              # documents a thread encodes at a time
BYTES_PER_TOKEN = {".parquet": 1.3, ".gz": 1.8, ".zst": 1.6}  # of English, else 4.3: a guess, for the time left alone
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
    if out.exists() and not out.is_dir():
        raise BadInput(f"--out {out} is a file: name a folder")
    meta = read_meta(out, cfg)
    if meta.get("complete"):
        print(f"{out}/ is complete: {summary(meta)}")
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        source = Source(cfg, out)
        tokenizer = find_tokenizer(cfg, out, source, meta)
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
    if cfg.tokenizer.startswith("bpe:") and not cfg.tokenizer[4:].isdecimal():
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
        with open(partial, "r+b") as file:  # Windows syncs only what is open for writing
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

    after: where the source stands behind this batch, JSON; `skipped` in it counts the rows left out since the very start.
    """
    texts: list
    continues: bool
    after: dict


class Source:
    """The documents of --source as a stream of Batch, from the start or from the `after` of an earlier batch."""

    def __init__(self, cfg, out):
        self.column, self.name = cfg.text_column, cfg.name
        if cfg.docstrings:
            self.parts = [extract_docstrings(out)]
        else:
            self.parts = [part for source in cfg.source for part in find_parts(source)]

    def guess_tokens(self):
        """About how many tokens the local files hold; 0 where the source is a dataset of the hub."""
        return sum(int(os.path.getsize(part) / BYTES_PER_TOKEN.get(Path(part).suffix, 4.3))
                   for part in self.parts if os.path.exists(part))

    def batches(self, start=None):
        start = start or {"part": 0, "path": self.parts[0], "state": None, "skipped": 0}
        skipped = start["skipped"]
        if start["path"] not in self.parts[start["part"]:start["part"] + 1]:
            raise BadInput(f"the files of --source have changed: {start['path']} stood at place {start['part'] + 1} "
                           "among them; put them back, or give another --out")
        for index, part in enumerate(self.parts[start["part"]:], start["part"]):
            state = start["state"] if index == start["part"] else None
            is_txt = builder_of(part) == "text"
            continues = is_txt and state is not None
            try:
                for rows, after in (read_txt if is_txt else self._read_rows)(self._open(part), part, state):
                    texts = [row for row in rows if isinstance(row, str) and (continues or row.strip())]
                    skipped += len(rows) - len(texts)
                    yield Batch(texts, continues, {"part": index, "path": part, "state": after, "skipped": skipped})
                    continues = is_txt
            except BadInput:
                raise
            except StopIteration:  # what `datasets` makes of a JSON file without rows
                continue
            except Exception as error:  # pyarrow, pandas, gzip, fsspec and the hub each raise their own
                cause = f"{type(error).__name__}: {error}".splitlines()[0]
                raise BadInput(f"cannot read {part} ({cause}): mend it and give the same command again; "
                               "the shards already written stay") from error

    def _open(self, part):
        """A local file, or a dataset of the hub, as a streaming dataset of arrow tables."""
        if sys.version_info < (3, 14):
            _register_zstd()
        import datasets

        datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)  # what it logs is raised as well
        builder = builder_of(part)
        options = {"parquet": {"batch_size": 16 * BATCH_ROWS}, "text": {"keep_linebreaks": True}}.get(builder, {})
        try:
            if builder:
                dataset = datasets.load_dataset(builder, data_files=[glob.escape(part)], split="train", streaming=True, **options)
            else:
                dataset = datasets.load_dataset(part, self.name, split="train", streaming=True)
        except Exception as error:
            if builder:
                raise
            raise BadInput(f"cannot reach the dataset {part} ({type(error).__name__}): it is no local file or folder, and "
                           "the hub does not answer or does not have it; check the name, or give local files") from error
        return dataset.with_format("arrow")

    def _read_rows(self, dataset, part, state):
        """-> stream of (values of --text_column, state of `datasets` behind them)."""
        if state:
            dataset.load_state_dict(state)
        for table in dataset.iter(batch_size=BATCH_ROWS):
            if self.column not in table.column_names:
                raise BadInput(f"{part} has no column {self.column}: name one of {', '.join(table.column_names) or '(none)'} "
                               "by --text_column")
            values = table[self.column].to_pylist()
            if str(table.schema.field(self.column).type) == "extension<arrow.json>":  # how rows of mixed types come
                values = [json.loads(value) if value is not None else None for value in values]
            yield values, dataset.state_dict()


def read_txt(dataset, part, state):
    """A text file, one document -> stream of ([its next piece], [state of `datasets`, lines behind it]).

    It is cut where a line begins with a letter or digit and the line above is not blank: every tiktoken encoding splits
    there whatever stands further left and right, so the pieces give the ids of the whole.
    """
    before, skip = state or (None, 0)
    if before:
        dataset.load_state_dict(before)
    kept = []  # lines behind the last cut
    for table in dataset.iter(batch_size=TXT_LINES):
        lines = kept + table["text"].to_pylist()[skip:]
        places = range(len(lines) - 1, len(kept), -1)
        cut = next((i for i in places if lines[i][:1].isalnum() and lines[i - 1].rstrip("\r\n")[-1:].strip()), None)
        if cut is None and len(lines) > 64 * TXT_LINES:
            cut = len(lines)  # no such place: cut anyway rather than fill the memory
        if cut is not None:
            yield ["".join(lines[:cut])], [before, skip + cut - len(kept)]
        kept = lines[cut or 0:]
        before, skip = dataset.state_dict(), 0
    if kept or not before:
        yield ["".join(kept)], [before, 0]


def builder_of(part):
    """The loader of `datasets` for a local file; None for a dataset of the hub."""
    return BUILDERS[Path(part.removesuffix(".gz").removesuffix(".zst")).suffix] if os.path.exists(part) else None


def find_parts(source):
    """A --source word -> files to read, or the dataset id itself. BadInput if a path holds nothing that can be read."""
    if os.path.isdir(source):
        files = sorted(str(path) for path in Path(source).rglob("*") if path.name.endswith(FORMATS))
    elif os.path.exists(source):
        files = [source]
    elif glob.has_magic(source):
        files = sorted(path for path in glob.glob(source, recursive=True) if not os.path.isdir(path))
    elif source.endswith(FORMATS):
        files = []
    else:
        return [source]
    if not files:
        raise BadInput(f"no file {source}: --source takes parquet, jsonl(.gz|.zst) and txt")
    for file in files:
        if not file.endswith(FORMATS):
            raise BadInput(f"cannot tell what {file} is: --source takes parquet, jsonl(.gz|.zst) and txt")
        if not os.access(file, os.R_OK):
            raise BadInput(f"no permission to read {file}: change it or leave the file out")
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


def find_tokenizer(cfg, out, source, meta):
    """The --tokenizer; bpe:<n> is trained on the source once and kept in the folder as tokenizer.json."""
    kept = out / "tokenizer.json"
    if meta:  # a tokenizer.json without meta.json may be of a run with other settings that came to no shard
        return load_tokenizer(str(kept) if meta["tokenizer"] == kept.name else meta["tokenizer"])
    if not cfg.tokenizer.startswith("bpe:"):
        tokenizer = load_tokenizer(cfg.tokenizer)
        if tokenizer.is_trained:
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
    pieces = [piece for text in batch.texts for piece in (eot, tokenizer.encode(text))]
    return np.concatenate([np.empty(0, dtype), *pieces[1 if batch.continues else 0:]]).astype(dtype)


def encoded(batches, tokenizer, dtype, workers):
    """Stream of (Batch, its ids), in order; a bounded number of batches is in work at a time."""
    executor, waiting, failure = ThreadPoolExecutor(workers), deque(), None
    try:
        try:
            for batch in batches:
                waiting.append((batch, executor.submit(encode, batch, tokenizer, dtype)))
                if len(waiting) > 3 * workers:
                    batch, future = waiting.popleft()
                    yield batch, future.result()
        except BadInput as error:  # a damaged file: what stands before the damage still goes into shards
            failure = error
        while waiting:
            batch, future = waiting.popleft()
            yield batch, future.result()
        if failure:
            raise failure
    finally:
        batches.close()
        gc.collect()  # an unfinished parquet reader must go before the interpreter, or pyarrow aborts (arrow issue 45214)
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
            "tokenizer": "tokenizer.json" if tokenizer.is_trained else tokenizer.spec,
            "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot, "dtype": np.dtype(self.dtype).name,
            "splits": {split: {"shards": 0, "tokens": 0, "documents": 0, "bytes": 0} for split in ("val", "train")},
            "skipped_rows": 0, "settings": settings(cfg), "complete": False, "resume": {"source": None, "drop": 0}}
        self.pieces, self.count = [], 0

    @property
    def written(self):
        return sum(split["tokens"] for split in self.meta["splits"].values())

    @property
    def shard(self):
        """(split, tokens) of the shard in work: the first one is the validation shard."""
        is_val = self.val_size and not self.meta["splits"]["val"]["shards"]
        return ("val", self.val_size) if is_val else ("train", self.shard_size)

    def add(self, ids, used, before):
        """Take the ids of one batch behind the first `used`; `before` is where the source stood in front of the batch."""
        split, size = self.shard
        while len(ids) - used >= size - self.count:
            end = used + size - self.count
            self._write(split, np.concatenate([*self.pieces, ids[used:end]]), {"source": before, "drop": end})
            self.pieces, self.count, used = [], 0, end
            split, size = self.shard
        self.pieces.append(ids[used:])
        self.count += len(ids) - used

    def finish(self):
        """Write what is left as the last shard. A source that never filled the first shard gives a tenth to validation."""
        splits = self.meta["splits"]
        rest = np.concatenate([np.empty(0, self.dtype), *self.pieces])
        if not len(rest) and not self.written:
            raise BadInput("the source holds no documents: nothing was written; check --source and --text_column "
                           f"({self.meta['skipped_rows']:,} rows were empty or not text)")
        if self.val_size and not splits["val"]["shards"]:
            if self.val_given:
                raise BadInput(f"the source holds {len(rest):,} tokens, fewer than --val_tokens {self.val_size:,}: lower it")
            starts = np.flatnonzero(rest == self.tokenizer.eot)  # cut between two documents if there is a good place
            tenth = max(len(rest) // 10, 1)
            near = starts[(starts >= tenth) & (starts <= 2 * tenth)]
            cut = int(near[0]) if len(near) else tenth
            self._write("val", rest[:cut], {"source": None, "drop": cut})
            rest = rest[cut:]
        if len(rest):
            self._write("train", rest, None)
        self.meta |= {"complete": True, "resume": None}
        write_meta(self.out, self.meta)

    def _write(self, split, ids, resume):
        """Write one shard. resume: the next begins `drop` ids behind the place `source`; None behind the very last one."""
        if not self.written:  # a run killed behind its very first shard must find whose it is
            write_meta(self.out, self.meta)
        stats, index = self.meta["splits"][split], sum(s["shards"] for s in self.meta["splits"].values())

        def save(path):
            with open(path, "wb") as file:  # np.save would hide the errno of a full disk
                np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(ids))
                file.write(ids)

        name = f"{self.prefix}_{split}_{index:06d}.npy"
        replace(self.out / name, save)
        counts = sum(np.bincount(ids[i:i + 2**20], minlength=self.tokenizer.vocab_size) for i in range(0, len(ids), 2**20))
        stats["shards"] += 1
        stats["tokens"] += len(ids)
        stats["documents"] += int(counts[self.tokenizer.eot])
        stats["bytes"] += int(counts @ self.sizes)
        self.meta |= {"resume": resume, "complete": resume is None}
        write_meta(self.out, self.meta)
        tqdm.write(f"{name}: {self.written:,} tokens so far")


def write_shards(cfg, out, source, tokenizer, meta):
    """The whole job: read, encode, write, say how far it is; continue where `meta` says an earlier run stopped."""
    writer = Writer(cfg, out, tokenizer, meta)
    before, drop = writer.meta["resume"]["source"], writer.meta["resume"]["drop"]
    if writer.written:
        print(f"continuing after {writer.written:,} tokens")
    known = {"sample-10BT": 10e9, "sample-100BT": 100e9, "sample-350BT": 350e9}.get(cfg.name)
    total = min(filter(None, (cfg.max_tokens, known or source.guess_tokens())), default=None)
    stream = encoded(source.batches(before), tokenizer, writer.dtype, cfg.workers)
    documents, started = sum(split["documents"] for split in writer.meta["splits"].values()), time.perf_counter()
    bar = tqdm(total=total, initial=writer.written, unit="tok", unit_scale=True, dynamic_ncols=True, mininterval=1.0,
               disable=None)  # None: no bar where nobody watches a terminal
    try:
        for batch, ids in stream:
            used = min(drop, len(ids))  # the first of these ids are in shards already
            end = None if cfg.max_tokens is None else used + cfg.max_tokens - writer.written - writer.count
            writer.meta["skipped_rows"] = batch.after["skipped"]
            writer.add(ids[:end], used, before)
            before, drop = batch.after, drop - used
            documents += len(batch.texts) - batch.continues
            bar.update(len(ids) - used)
            bar.set_postfix_str(f"{documents:,} documents", refresh=False)
            if end is not None and end <= len(ids):
                break
        writer.finish()
    except KeyboardInterrupt as interrupt:
        traceback.clear_frames(interrupt.__traceback__)  # they may hold a reader of pyarrow, which aborts at exit
        raise KeyboardInterrupt(f"stopped: the shards in {out}/ are whole; the same command continues after them") from None
    finally:
        stream.close()
        bar.close()
    print(f"{out}/ is complete: {summary(writer.meta)}; {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    run(main)
