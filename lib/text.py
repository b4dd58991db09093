"""Text out of files and of the Hugging Face hub, as a stream of documents that can be resumed
anywhere.

A source is local parquet, jsonl(.gz|.zst) or txt, or a dataset of the hub. Only the column of the
text is read, so no other column can make a file fail: parquet by column, JSON row by row. All
Python runs in the thread that asks for the next batch. The library `datasets` finds the files of
a dataset of the hub, and reads them where they have another format.
"""

import contextlib
import gc
import glob
import gzip
import hashlib
import io
import itertools
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lib import cli, hub
from lib.cli import BadInput, flag
from lib.files import HIDDEN, find_files, json_rows, left_out, naming, open_file

KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "txt"}  # -> READERS
PACKED = (".gz", ".zst")     # behind any of these but .parquet
FORMATS = "parquet, jsonl(.gz|.zst) and txt"
ON_HUB = re.compile(r"hf://datasets/([^@]+)@[^/]+/")  # a file of a dataset at a commit
BATCH_ROWS = 64              # documents per batch, the unit of work of a thread
BYTES_PER_TOKEN = {".parquet": 1.3, ".gz": 1.8,
                   ".zst": 1.6}  # of English, else 4.3: a guess, for the time left alone
TXT_LINES = 4096             # lines of a .txt per batch
HASHES = 2**16               # read back from a file at a time, 3 MB as Python's integers
SHOWN = 20                   # columns that are named where the one asked for is missing


@dataclass
class Place:
    """A position in a Source, as meta.json keeps it.

    part, path: which of its files. skipped: rows without text so far. duplicates, hashes: what a
    Seen has met. state: rows, of a .txt lines, before it in that file, None for none. Where
    `datasets` reads, its state, a dict; older versions noted that everywhere, of a .txt in a list.
    """
    part: int = flag(0, None, at_least=0)
    path: str = flag("", None)
    state: int | dict | list | None = flag(None, None, at_least=0, at_most=2**53)
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
    """The documents met so far, by a hash of 64 bits each: tells exact duplicates in bounded
    memory.

    1 GiB (of which the system hands out what is used) holds 134 million hashes in buckets of 8. A
    bucket that is full forgets one for each that it takes, the first ones at about 60 million
    documents: a duplicate of a forgotten document stays, no other document is dropped. All hashes
    are kept in a file, 8 bytes each, from which the state at any earlier place is restored.
    """

    BUCKETS, SLOTS = 2**24, 8

    def __init__(self, path):
        self.path = path

    def rewind(self, count, keep=True):
        """Back to where `count` documents were new. keep: whether those that come go into the file,
        over those that came then."""
        mode = "r+b" if os.path.lexists(self.path) else "w+b"
        self.file = open(self.path, mode)  # noqa: SIM115 (open as long as it is read from)
        self.count = count
        self.keep = keep
        if (held := os.path.getsize(self.path) // 8) < count:
            raise BadInput(
                f"{self.path} holds {held:,} hashes, not the {count:,} that meta.json says: give another --out"
            )
        self.table = np.zeros((self.BUCKETS, self.SLOTS), dtype=np.uint64)
        for first in range(0, count, HASHES):
            for one in np.fromfile(self.file, dtype=np.uint64, count=min(HASHES,
                                                                         count - first)).tolist():
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
    """The documents of --source as a stream of Batch, from the start or from the `after` of an
    earlier batch.

    parts: paths of files, as `find_parts` returns them, and ids of datasets of the hub, replaced by
    their files once they are asked for. seen: a Seen, which drops documents met before; not the
    pieces of a .txt. commits: dict from a dataset of the hub to its commit, filled in as it is
    opened; one that is there is read again.
    """

    def __init__(self, parts, column, name=None, seen=None):
        self.parts = parts
        self.column = column
        self.name = name
        self.seen = seen
        self.commits = {}
        self.others = None

    def guess_tokens(self):
        """About how many tokens the local files hold; 0 where the source is a dataset of the hub.
        """
        return sum(int(os.path.getsize(part) / BYTES_PER_TOKEN.get(Path(part).suffix.lower(), 4.3))
                   for part in self.parts if os.path.exists(part))

    def batches(self, start=None, keep=True):
        """The stream. keep: whether what `seen` meets is kept for later streams."""
        self._resolve()
        start = self._check(start) if start else Place(path=self.parts[0])
        skipped = start.skipped
        duplicates = start.duplicates
        if self.seen:
            self.seen.rewind(start.hashes, keep)
        for index, part in enumerate(self.parts[start.part:], start.part):
            state = start.state if index == start.part else None
            is_txt = is_local(part) and kind_of(part) == "txt"
            continues = is_txt and state is not None
            with reading(part), contextlib.closing(self._read(part, state)) as stream:
                for rows, after in stream:
                    texts = [
                        row for row in rows if isinstance(row, str) and (continues or row.strip())
                    ]
                    skipped += len(rows) - len(texts)
                    place = {"part": index, "path": part, "state": after, "skipped": skipped}
                    if self.seen:
                        found = len(texts)
                        if not is_txt:
                            texts = self.seen.new(texts)
                        duplicates += found - len(texts)
                        place |= {"duplicates": duplicates, "hashes": self.seen.count}
                    yield Batch(texts, continues, place)
                    continues = is_txt

    def texts(self, characters):
        """Its documents, until so many characters are read."""
        with contextlib.closing(self.batches()) as batches:
            for text in (text for batch in batches for text in batch.texts):
                yield text
                characters -= len(text)
                if characters < 0:
                    break

    def understands(self, place):
        """Whether `batches` can start from a place out of meta.json (None: the beginning).

        Versions that read files through `datasets` noted its state, which no reader here
        understands. Raises BadInput if the place is of other files.
        """
        self._resolve()
        if place is None:
            return True
        place = self._check(place)
        return not isinstance(place.state, (dict, list)) or place.path in self.others

    def _check(self, start):
        try:
            place = Place(**start)
            cli.check(place)
        except (TypeError, BadInput) as error:
            raise BadInput(f"meta.json is damaged (source: {error}): give another --out") from error
        if place.path not in [*self.parts[place.part:place.part + 1], *self.replaced]:
            raise BadInput(f"the files of --source have changed: {place.path} stood at place {place.part + 1} "
                           "among them; put them back, or give another --out")
        return place

    def _resolve(self):
        """Replace the datasets of the hub among the parts by their files; `replaced` are their
        names. One that has files of another format stays, and is kept in `others`: {name: its
        builder}."""
        if self.others is None:
            self.others = {}
            self.replaced = []
            self.parts = [file for part in self.parts for file in self._files(part)]

    def _files(self, part):
        if is_local(part):
            return [part]
        hub.check_answers(part)  # before the slow import
        datasets = hub.datasets_library()
        with explained(part):
            if part not in self.commits and not hub.is_offline():
                self.commits[part] = hub.client().HfApi().dataset_info(part).sha
            hub.demand_whole_answers()
            commit = self.commits.get(part)
            builder = datasets.load_dataset_builder(part, self.name, revision=commit)
        files = list((builder.config.data_files or {}).get("train", ()))
        is_nested = getattr(builder.config, "field", None)  # rows of JSON below a key
        if files and not is_nested and all(map(is_read_here, files)):
            check_part(files[0], self.column)
            self.replaced.append(part)
            return files
        self.others[part] = builder
        return [part]

    def _read(self, part, state):
        """-> stream of (values of the column, or the next piece of a .txt; `state` after them)."""
        if part in self.others:
            return self._read_other(part, state)
        return READERS[kind_of(part)](part, self.column, state)

    def _read_other(self, name, state):
        """A dataset of the hub that `datasets` reads, whatever its format."""
        with explained(name):
            dataset = self.others[name].as_streaming_dataset("train").with_format("arrow")
        if state:
            dataset.load_state_dict(state)
        try:
            for table in dataset.iter(batch_size=BATCH_ROWS):
                demand_column(name, self.column, table.column_names)
                yield table[self.column].to_pylist(), dataset.state_dict()
        finally:
            del dataset
            gc.collect(
            )  # an unfinished reader must go first, or pyarrow aborts (arrow issue 45214)


# ----------------------------------------------------------------------------------------------------------------------
# Readers: (path or address of a file, column, how many rows come before; None: the beginning)
# -> stream of (values, rows before what follows)


def read_parquet(part, column, skip):
    """The values of one column. Row groups that are skipped are not read."""
    done = skip or 0
    first = 0  # row of the file at which a row group begins
    with open_parquet(part) as parquet:
        demand_column(part, column, parquet.schema_arrow.names)
        for group in range(parquet.num_row_groups):
            end = first + parquet.metadata.row_group(group).num_rows
            if end > done:
                # a file of the hub is a Python object, which must not run in threads of pyarrow
                batches = parquet.iter_batches(BATCH_ROWS, [group], [column], use_threads=False)
                for values in drop_rows(batches, done - first):
                    done += len(values)
                    yield values, done
            first = end


def drop_rows(batches, count):
    """Batches of pyarrow, of one column -> lists of its values, without the first `count` rows."""
    for batch in batches:
        values = batch.column(0).to_pylist()
        if count < len(values):
            yield values[count:]
        count = max(count - len(values), 0)


def read_json(part, column, skip):
    """The values of one key, None where a row lacks it."""
    done = skip or 0
    with open_part(part) as file:
        rows = itertools.islice(objects(file), done, None)
        while batch := list(itertools.islice(rows, BATCH_ROWS)):
            done += len(batch)
            yield [row.get(column) for row in batch], done


def read_txt(part, column, skip):
    """A text file, one document -> stream of ([its next piece], lines up to its end).

    It is cut where a line begins with a letter or digit and the line above is not blank: every
    tiktoken encoding splits there whatever stands further left and right, so the pieces give the
    ids of the whole.
    """
    done = skip or 0
    kept = []  # lines after the last cut
    with open_part(part) as packed, io.TextIOWrapper(packed, encoding="utf-8-sig") as file:
        for _ in itertools.islice(file, done):
            pass
        while new := list(itertools.islice(file, TXT_LINES)):
            lines = kept + new
            cut = last_cut(lines, len(kept))
            if cut is None and len(lines) > 64 * TXT_LINES:
                cut = len(lines)  # no such place: cut anyway rather than fill the memory
            if cut is not None:
                done += cut
                yield ["".join(lines[:cut])], done
            kept = lines[cut or 0:]
    if kept or skip is None and not done:
        yield ["".join(kept)], done + len(kept)


def last_cut(lines, first):
    """The last place behind `first` where a .txt may be cut, or None."""
    for i in range(len(lines) - 1, first, -1):
        if lines[i][:1].isalnum() and lines[i - 1].rstrip("\r\n")[-1:].strip():
            return i
    return None


READERS = {"parquet": read_parquet, "json": read_json, "txt": read_txt}


def objects(file):
    """The rows of a JSON file, as dicts. One that is not an object has no columns.

    Raises ValueError where it holds anything but JSON.
    """
    for place, row in json_rows(file):
        if isinstance(row, ValueError):
            raise ValueError(f"{place}: {row}")
        yield row if isinstance(row, dict) else {}


@contextlib.contextmanager
def open_part(part):
    """A local file, or one of the hub, opened for reading bytes; .gz and .zst unpacked."""
    with contextlib.ExitStack() as stack:
        if is_local(part):
            file = stack.enter_context(open_file(part, LEAVE_OUT))
        else:
            from datasets.utils.file_utils import xopen  # tries again after errors of the network

            file = stack.enter_context(xopen(part, "rb"))
        if part.lower().endswith(".gz"):
            file = stack.enter_context(gzip.open(file))
        if part.lower().endswith(".zst"):
            import pyarrow  # Python itself has no codec before 3.14

            packed = pyarrow.PythonFile(file, "r")
            stream = stack.enter_context(pyarrow.CompressedInputStream(packed, "zstd"))
            file = stack.enter_context(io.BufferedReader(stream, 2**20))
        yield file


@contextlib.contextmanager
def open_parquet(part):
    import pyarrow.parquet

    with open_part(part) as file, pyarrow.parquet.ParquetFile(file) as parquet:
        yield parquet


# ----------------------------------------------------------------------------------------------------------------------
# What can be read


LEAVE_OUT = "make it readable, or leave it out"


def is_local(part):
    """Whether a part is a path: else it is a dataset of the hub, or a file of one."""
    return os.path.lexists(part)


def is_read_here(address):
    """Whether a file on the hub is for one of READERS. A .txt is not: there, a line is a document.
    """
    return bool(ON_HUB.match(address)) and kind_of(address) in ("parquet", "json")


def shown(part):
    """A part as messages name it."""
    return ON_HUB.sub(r"\1: ", part)


def kind_of(path):
    """Which of READERS a file is for, by its ending, whatever its case; None: for none of them."""
    stem, ending = os.path.splitext(path.lower())
    packed = ending in PACKED
    if packed:
        ending = os.path.splitext(stem)[1]
    kind = KINDS.get(ending)
    return None if packed and kind == "parquet" else kind


@contextlib.contextmanager
def reading(part):
    """Whatever reading a part raises ends as BadInput."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:  # pyarrow, gzip, fsspec and the hub each raise their own
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        raise BadInput(f"cannot read {shown(part)} ({cause}): {_remedy(part, error)} the same "
                       "command again; the shards already written stay") from error


def _remedy(part, error):
    """What makes a part readable. Only a file whose content is wrong is called broken."""
    if isinstance(error, MemoryError):
        return "free some memory and give"
    if not is_local(part):
        return "give"
    if isinstance(error, NotImplementedError):  # of pyarrow
        return "save its text in a column of plain strings, or leave it out, and give"
    if getattr(error, "errno", None):
        return "make it readable and give"
    return "repair it or leave it out, and give"


@contextlib.contextmanager
def explained(name):
    """Errors of the hub's client, of `datasets`, of readers that look at the first file, as
    BadInput."""
    try:
        yield
    except Exception as error:
        raise hub.explain(error, name, "check --source and --name, or give local files") from error


def demand_column(part, column, names):
    """Raises BadInput if the text's column is not among those that a part has."""
    if column not in names:
        known = ", ".join(list(names)[:SHOWN]) or "(none)"
        raise BadInput(f"{shown(part)} has no column {column}: name one of {known} by --text_column, "
                       "or leave it out")


def check_part(part, column):
    """Raises BadInput if the beginning of a file cannot be read, or the file lacks the column."""
    with reading(part):
        if kind_of(part) == "parquet":
            with open_parquet(part) as parquet:
                demand_column(part, column, parquet.schema_arrow.names)
        elif kind_of(part) == "json":
            names = {}
            is_empty = True
            with open_part(part) as file:
                for row in objects(file):
                    if column in row:
                        return
                    names |= dict.fromkeys(row)
                    is_empty = False
            if not is_empty:
                demand_column(part, column, names)
        else:
            with contextlib.closing(read_txt(part, column, None)) as pieces:
                next(pieces)


def find_parts(sources, column):
    """--source -> (paths of files and ids of datasets, in order; lines about files left out).

    Raises BadInput where a path holds nothing that can be read, and for a file without the column.
    """
    parts, lines = [], []
    for source in sources:
        files, left_out = _find(source)
        for file in files:
            if not is_local(file):
                continue
            if not kind_of(file):
                raise BadInput(f"cannot tell what {file} is: --source takes {FORMATS}")
            open_file(file, LEAVE_OUT).close()
            check_part(file, column)
        parts += files
        lines += left_out
    return parts, lines


def _find(source):
    """One word of --source -> (files, lines about those that are left out)."""
    if os.path.isdir(source):
        files, lines = find_files(source, kind_of)
        missing = f"{source} holds no file of text"
    elif os.path.lexists(source):
        return [source], []
    elif glob.has_magic(source):
        files, lines = _match(source)
        missing = f"no file {source}"
    elif kind_of(source) or source.endswith("/"):  # no name of a dataset
        files, lines = [], []
        missing = f"no file {source}"
    else:
        return [source], []
    if not files:
        raise BadInput("; ".join([f"{missing}: --source takes {FORMATS}", *lines]))
    return files, lines


def _match(pattern):
    """The files that a pattern matches, without hidden ones where it does not ask for them."""
    words = Path(pattern).parts
    fixed = next(i for i, word in enumerate(words) if glob.has_magic(word))
    asked = any(word.startswith(HIDDEN) for word in words[fixed:])
    files = []
    others = {}
    for path in sorted(glob.glob(pattern, recursive=True)):
        if not asked and any(part.startswith(HIDDEN) for part in Path(path).parts[fixed:]):
            others.setdefault("hidden or temporary", []).append(path)
        elif not os.path.isdir(path):
            files.append(path)
        elif "**" not in words:  # which goes through folders
            others.setdefault("folders", []).append(path)
    return files, left_out(pattern, others)
