"""Text out of files and of the Hugging Face hub, as a stream of documents that can be taken up again anywhere.

A source is local parquet, jsonl(.gz|.zst) or txt, or a dataset of the hub. All of it is read
by the library `datasets`, as a stream.
"""

import contextlib
import gc
import glob
import hashlib
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib import cli, hub
from lib.cli import BadInput, flag
from lib.files import naming, open_file

BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}  # format -> loader of `datasets`
FORMATS = (".parquet", *(f"{end}{packed}" for end in (".jsonl", ".json", ".txt") for packed in ("", ".gz", ".zst")))
BATCH_ROWS = 64              # documents per batch, the unit of work of a thread
BYTES_PER_TOKEN = {".parquet": 1.3, ".gz": 1.8, ".zst": 1.6}  # of English, else 4.3: a guess, for the time left alone
TXT_LINES = 4096             # lines of a .txt per batch
HASHES = 2**16               # read back from a file at a time, 3 MB as Python's integers


@dataclass
class Place:
    """Where a Source stands, as meta.json keeps it: after `state` (of `datasets`) in a part, `skipped` rows left out."""
    part: int = flag(0, None, at_least=0)
    path: str = flag("", None)
    state: dict | list | None = flag(None, None)
    skipped: int = flag(0, None, at_least=0, at_most=2**53)
    duplicates: int = flag(0, None, at_least=0, at_most=2**53)
    hashes: int = flag(0, None, at_least=0, at_most=2**53)


@dataclass
class Batch:
    """Documents in order, and where the source stands after them (a Place as a dict).

    continues: the first is the rest of a document that began in an earlier batch.
    """
    texts: list
    continues: bool
    after: dict


class Seen:
    """The documents met so far, by a hash of 64 bits each: tells exact duplicates in bounded memory.

    1 GiB (of which the system hands out what is used) holds 134 million hashes in buckets of 8. A bucket that is full forgets
    one for each that it takes, the first ones at about 60 million documents: a duplicate of a forgotten document stays, no
    other document is dropped. All hashes are kept in a file, 8 bytes each, from which the state at any earlier
    place is restored.
    """

    BUCKETS, SLOTS = 2**24, 8

    def __init__(self, path):
        self.path = path

    def rewind(self, count, keep=True):
        """Back to where `count` documents were new. keep: whether those that come go into the file,
        over those that came then."""
        mode = "r+b" if os.path.lexists(self.path) else "w+b"
        self.file, self.count, self.keep = open(self.path, mode), count, keep  # noqa: SIM115 (open as long as it is read from)
        if (held := os.path.getsize(self.path) // 8) < count:
            raise BadInput(f"{self.path} holds {held:,} hashes, not the {count:,} that meta.json says: give another --out")
        self.table = np.zeros((self.BUCKETS, self.SLOTS), dtype=np.uint64)
        for first in range(0, count, HASHES):
            for one in np.fromfile(self.file, dtype=np.uint64, count=min(HASHES, count - first)).tolist():
                self._add(one)
        self.file.seek(8 * count)

    def new(self, texts):
        """Those of the documents that were not met before."""
        kept, hashes = [], []
        for text in texts:
            digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
            one = int.from_bytes(digest, "little") or 1  # 0: an empty slot
            if self._add(one):
                kept.append(text)
                hashes.append(one)
        if self.keep:
            with naming(self.path):
                self.file.write(np.array(hashes, dtype=np.uint64).tobytes())
                self.file.flush()  # before meta.json counts them
        self.count += len(hashes)
        return kept

    def _add(self, one):
        bucket = self.table[one % self.BUCKETS]
        if (bucket == one).any():
            return False
        free = np.flatnonzero(bucket == 0)
        bucket[free[0] if len(free) else (one >> 32) % self.SLOTS] = one
        return True


class Source:
    """The documents of --source as a stream of Batch, from the start or from the `after` of an earlier batch.

    seen: a Seen, which drops documents met before; not the pieces of a .txt.
    commits: dict from a dataset of the hub to its commit, filled in as it is opened; one that stands there is read again.
    """

    def __init__(self, cfg, parts, seen=None):
        self.seen, self.column, self.name, self.parts, self.links = seen, cfg.text_column, cfg.name, parts, None
        self.commits = {}

    def guess_tokens(self):
        """About how many tokens the local files hold; 0 where the source is a dataset of the hub."""
        return sum(int(os.path.getsize(part) / BYTES_PER_TOKEN.get(Path(part).suffix, 4.3))
                   for part in self.parts if os.path.exists(part))

    def batches(self, start=None, keep=True):
        """The stream. keep: whether what `seen` meets is kept for later streams."""
        start = self._check(start) if start else Place(path=self.parts[0])
        skipped, duplicates = start.skipped, start.duplicates
        if self.seen:
            self.seen.rewind(start.hashes, keep)
        for index, part in enumerate(self.parts[start.part:], start.part):
            state = start.state if index == start.part else None
            is_txt = builder_of(part) == "text"
            continues = is_txt and state is not None
            try:
                for rows, after in (read_txt if is_txt else self._read_rows)(self._open(part), part, state):
                    texts = [row for row in rows if isinstance(row, str) and (continues or row.strip())]
                    skipped += len(rows) - len(texts)
                    place = {"part": index, "path": part, "state": after, "skipped": skipped}
                    if self.seen:
                        found, texts = len(texts), texts if is_txt else self.seen.new(texts)
                        duplicates += found - len(texts)
                        place |= {"duplicates": duplicates, "hashes": self.seen.count}
                    yield Batch(texts, continues, place)
                    continues = is_txt
            except BadInput:
                raise
            except StopIteration:  # what `datasets` makes of a JSON file without rows
                continue
            except Exception as error:  # pyarrow, pandas, gzip, fsspec and the hub each raise their own
                cause = f"{type(error).__name__}: {error}".splitlines()[0]
                mend = "mend it and give" if builder_of(part) else "give"
                raise BadInput(f"cannot read {part} ({cause}): {mend} the same command again; "
                               "the shards already written stay") from error

    def texts(self, characters):
        """Its documents, until so many characters are read."""
        with contextlib.closing(self.batches()) as batches:
            for text in (text for batch in batches for text in batch.texts):
                yield text
                characters -= len(text)
                if characters < 0:
                    break
        gc.collect()  # an unfinished parquet reader must go before the interpreter, or pyarrow aborts (arrow issue 45214)

    def _check(self, start):
        try:
            place = Place(**start)
            cli.check(place)
        except (TypeError, BadInput) as error:
            raise BadInput(f"meta.json is damaged (source: {error}): give another --out") from error
        if place.path not in self.parts[place.part:place.part + 1]:
            raise BadInput(f"the files of --source have changed: {place.path} stood at place {place.part + 1} "
                           "among them; put them back, or give another --out")
        return place

    def _open(self, part):
        """A local file, or a dataset of the hub, as a streaming dataset of arrow tables."""
        builder = builder_of(part)
        if not builder:
            hub.check_answers(part)  # before the slow import
        import datasets

        if sys.version_info < (3, 14):
            _register_zstd()
        datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)  # what it logs is raised as well
        if not builder:
            return self._open_hub(part, datasets)
        options = {"parquet": {"batch_size": 16 * BATCH_ROWS}, "text": {"keep_linebreaks": True}}.get(builder, {})
        files = [glob.escape(self._plain_path(part))]
        return datasets.load_dataset(builder, data_files=files, split="train", streaming=True, **options).with_format("arrow")

    def _open_hub(self, name, datasets):
        try:
            if name not in self.commits and not hub.is_offline():
                self.commits[name] = hub.client().HfApi().dataset_info(name).sha
            hub.demand_whole_answers()
            commit = self.commits.get(name)
            return datasets.load_dataset(name, self.name, revision=commit, split="train", streaming=True).with_format("arrow")
        except Exception as error:  # of the client, of `datasets`, of the readers that look at the first file
            raise hub.explain(error, name, "check --source and --name, or give local files") from error

    def _plain_path(self, part):
        """The path, or a link to it where the path holds "::", at which fsspec, below `datasets`, would split it."""
        if "::" not in os.path.abspath(part):
            return part
        self.links = self.links or tempfile.TemporaryDirectory(prefix="fineweb_")
        link = Path(self.links.name) / f"{self.parts.index(part)}{next(end for end in FORMATS if part.endswith(end))}"
        if not link.is_symlink():
            link.symlink_to(os.path.abspath(part))
        return str(link)

    def _read_rows(self, dataset, part, state):
        """-> stream of (values of --text_column, state of `datasets` after them)."""
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
    """A text file, one document -> stream of ([its next piece], [state of `datasets`, lines after it]).

    It is cut where a line begins with a letter or digit and the line above is not blank: every tiktoken encoding splits
    there whatever stands further left and right, so the pieces give the ids of the whole.
    """
    before, skip = state or (None, 0)
    if before:
        dataset.load_state_dict(before)
    kept = []  # lines after the last cut
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
    return BUILDERS[Path(part.removesuffix(".gz").removesuffix(".zst")).suffix] if os.path.lexists(part) else None


def find_parts(source):
    """A --source word -> files to read, or the dataset id itself. Raises BadInput if a path holds nothing that can be read."""
    if os.path.isdir(source):
        files = sorted(str(path) for path in Path(source).rglob("*") if path.name.endswith(FORMATS))
    elif os.path.lexists(source):
        files = [source]
    elif glob.has_magic(source):
        files = sorted(path for path in glob.glob(source, recursive=True) if not os.path.isdir(path))
    elif source.endswith((*FORMATS, "/")):  # no name of a dataset
        files = []
    else:
        return [source]
    if not files:
        there = f"{source} holds no file of text" if os.path.isdir(source) else f"no file {source}"
        raise BadInput(f"{there}: --source takes parquet, jsonl(.gz|.zst) and txt")
    for file in files:
        if not file.endswith(FORMATS):
            raise BadInput(f"cannot tell what {file} is: --source takes parquet, jsonl(.gz|.zst) and txt")
        open_file(file, "mend it or leave the file out").close()
    return files


def _register_zstd():
    """Let `datasets` read .zst with the codec that pyarrow brings, where Python itself has none (before 3.14)."""
    import fsspec
    import pyarrow

    if "zstd" not in fsspec.available_compressions():
        fsspec.compression.register_compression(
            "zstd", lambda file, mode="rb", **_: pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd"), "zst")
