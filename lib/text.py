"""Text from files and from the Hugging Face hub, as a stream of documents that resumes anywhere.

A source is local parquet, jsonl(.gz|.zst) or txt, or a dataset on the hub. Only the text column is
read, so no other column can make a file fail: parquet by column, JSON row by row. The library
`datasets` finds the files of a dataset on the hub, and reads those of other formats. All Python
code runs in the thread that requests the next batch.
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
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lib import cli, hub
from lib.cli import BadInput, flag
from lib.files import HIDDEN, find_files, is_utf16, json_rows, left_out, naming, open_file

KINDS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "txt"}  # -> READERS
PACKED = (".gz", ".zst")     # may follow any of these but .parquet
FORMATS = "parquet, jsonl(.gz|.zst) and txt"
ON_HUB = re.compile(r"hf://datasets/([^@]+)@[^/]+/")  # a file of a dataset at a commit
BATCH_ROWS = 64              # documents per batch, the unit of work of a thread
# of English text, for the progress bar only
BYTES_PER_TOKEN = {".parquet": 1.3, ".gz": 1.8, ".zst": 1.6}
PLAIN_BYTES_PER_TOKEN = 4.3  # of any other file
TXT_LINES = 4096             # lines of a .txt per batch
HASHES = 2**16               # read from a file at a time, 3 MB as Python integers
SHOWN = 20                   # columns that a message lists


@dataclass
class Place:
    """A position in a Source, as meta.json stores it.

    part, path: index and path of the file. skipped: rows without text so far. duplicates, hashes:
    the counts of a Seen. state: number of rows (in a .txt: lines) before it in that file; None: the
    start; if `datasets` reads the file, its state, a dict. Older versions stored such a dict for
    every file, and a list for a .txt.
    """
    part: int = flag(0, None, at_least=0)
    path: str = flag("", None)
    state: int | dict | list | None = flag(None, None, at_least=0, at_most=2**53)
    skipped: int = flag(0, None, at_least=0, at_most=2**53)
    duplicates: int = flag(0, None, at_least=0, at_most=2**53)
    hashes: int = flag(0, None, at_least=0, at_most=2**53)


@dataclass
class Batch:
    """Documents in order, and the source's position after them (a Place as a dict).

    continues: whether the first one continues a document of an earlier batch.
    """
    texts: list[str]
    continues: bool
    after: dict[str, Any]


class Seen:
    """The documents seen so far, by 64-bit hashes: finds exact duplicates in bounded memory.

    1 GiB, allocated as it fills, is enough for 134 million hashes in buckets of 8. A full bucket,
    first at about 60 million documents, forgets one hash for each new one: a duplicate of a
    forgotten document is kept, but no other document is dropped. A file keeps all hashes, 8 bytes
    each, to restore the state at any earlier position.
    """

    BUCKETS, SLOTS = 2**24, 8

    def __init__(self, path: Path):
        self.path = path

    def rewind(self, count: int, keep: bool = True) -> None:
        """Go back to the state after `count` new documents. keep: overwrite the later hashes in the
        file with those that follow."""
        mode = "r+b" if os.path.lexists(self.path) else "w+b"
        self.file = open(self.path, mode)  # noqa: SIM115 (open as long as it is read from)
        self.count = count
        self.keep = keep
        in_file = os.path.getsize(self.path) // 8
        if in_file < count:
            raise BadInput(f"{self.path} has {in_file:,} hashes, not the {count:,} in meta.json: "
                           "give another --out")
        self.table = np.zeros((self.BUCKETS, self.SLOTS), dtype=np.uint64)
        for first in range(0, count, HASHES):
            hashes = np.fromfile(self.file, dtype=np.uint64, count=min(HASHES, count - first))
            for one in hashes.tolist():
                self._add(one)
        self.file.seek(8 * count)

    def new(self, texts: Iterable[str]) -> list[str]:
        """The documents that were not seen before."""
        kept = []
        hashes = []
        for text in texts:
            digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
            one = int.from_bytes(digest, "little") or 1  # 0 marks an empty slot
            if self._add(one):
                kept.append(text)
                hashes.append(one)
        if self.keep:
            with naming(self.path):
                self.file.write(np.array(hashes, dtype=np.uint64).tobytes())
                self.file.flush()  # before meta.json counts them
        self.count += len(hashes)
        return kept

    def _add(self, one: int) -> bool:
        """Add a hash -> whether it is new."""
        bucket = self.table[one % self.BUCKETS]
        if (bucket == one).any():
            return False
        free = np.flatnonzero(bucket == 0)
        slot = free[0] if len(free) else (one >> 32) % self.SLOTS
        bucket[slot] = one
        return True


class Source:
    """The documents of --source as a stream of Batch, from any earlier position.

    parts: paths of files, as returned by `find_parts`, and ids of datasets on the hub, which are
    replaced by their files when first needed. name: configuration of the datasets. seen: a Seen,
    which drops duplicates, except pieces of a .txt. commits: {dataset: commit}, filled in as
    datasets are opened; an entry that already exists is used.
    """

    def __init__(self, parts: Sequence[str], column: str, name: str | None = None,
                 seen: Seen | None = None):
        self.parts = list(parts)
        self.column = column
        self.name = name
        self.seen = seen
        self.commits: dict[str, str] = {}
        self.replaced: list[str] = []    # datasets whose files are among the parts
        self.others: dict[str, Any] = {}  # datasets in formats that are not read here -> builder
        self.is_resolved = False

    def guess_tokens(self) -> int:
        """Approximate number of tokens in the local files; 0 for a dataset on the hub."""
        tokens = 0
        for part in self.parts:
            if os.path.exists(part):
                ending = Path(part).suffix.lower()
                size = os.path.getsize(part)
                tokens += int(size / BYTES_PER_TOKEN.get(ending, PLAIN_BYTES_PER_TOKEN))
        return tokens

    def batches(self, position: dict[str, Any] | None = None,
                keep: bool = True) -> Generator[Batch, None, None]:
        """The stream, from the `after` of an earlier Batch on. keep: whether `seen` stores new
        hashes for later streams."""
        self._resolve()
        start = self._check(position) if position else Place(path=self.parts[0])
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
                    texts = [row for row in rows if has_text(row, continues)]
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

    def texts(self, characters: int) -> Iterator[str]:
        """The first documents, with at least `characters` characters in total."""
        with contextlib.closing(self.batches()) as batches:
            for batch in batches:
                for text in batch.texts:
                    yield text
                    characters -= len(text)
                    if characters < 0:
                        return

    def understands(self, position: dict[str, Any] | None) -> bool:
        """Whether `batches` can start from a position in a meta.json (None: the start).

        Versions that read files through `datasets` stored its state, which the readers here do not
        support. Raises BadInput if the position is in other files.
        """
        self._resolve()
        if position is None:
            return True
        place = self._check(position)
        return not isinstance(place.state, (dict, list)) or place.path in self.others

    def _check(self, position: dict[str, Any]) -> Place:
        try:
            place = Place(**position)
            cli.check(place)
        except (TypeError, BadInput) as error:
            raise BadInput(f"meta.json is damaged (source: {error}): give another --out") from error
        expected = self.parts[place.part:place.part + 1]
        if place.path not in [*expected, *self.replaced]:
            raise BadInput(f"the files of --source have changed: {place.path} was number "
                           f"{place.part + 1} among them; restore them, or give another --out")
        return place

    def _resolve(self) -> None:
        """Replace datasets on the hub among the parts by their files, once."""
        if self.is_resolved:
            return
        parts = []
        for part in self.parts:
            parts += self._files(part)
        self.parts = parts
        self.is_resolved = True

    def _files(self, part: str) -> list[str]:
        """The files of a dataset; the dataset itself if some are of a format that is not read here.
        """
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

    def _read(self, part: str, state: Any) -> Generator[tuple[list, Any], None, None]:
        """(values of the column, or the next piece of a .txt; `state` after them)."""
        if part in self.others:
            return self._read_other(part, state)
        return READERS[kind_of(part)](part, self.column, state)

    def _read_other(self, name: str, state: Any) -> Generator[tuple[list, Any], None, None]:
        """A dataset on the hub, read by `datasets` in any format."""
        with explained(name):
            dataset = self.others[name].as_streaming_dataset("train").with_format("arrow")
        if state:
            dataset.load_state_dict(state)
        try:
            for table in dataset.iter(batch_size=BATCH_ROWS):
                demand_column(name, self.column, table.column_names)
                yield table[self.column].to_pylist(), dataset.state_dict()
        finally:
            # an unfinished reader must be freed first, or pyarrow aborts (arrow issue 45214)
            del dataset
            gc.collect()


def has_text(row: Any, continues: bool) -> bool:
    """Whether a row is text. Blank lines count within a document that continues."""
    return isinstance(row, str) and (continues or bool(row.strip()))


# --------------------------------------------------------------------------------------------------
# Readers: (path or address of a file, column, number of rows to skip; None: 0)
# -> stream of (values, rows before what follows)


def read_parquet(part: str, column: str,
                 skip: int | None) -> Generator[tuple[list, Any], None, None]:
    """The values of one column. Skipped row groups are not read."""
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


def drop_rows(batches: Iterable[Any], count: int) -> Iterator[list]:
    """pyarrow's batches of one column -> lists of its values, without the first `count` rows."""
    for batch in batches:
        values = batch.column(0).to_pylist()
        if count < len(values):
            yield values[count:]
        count = max(count - len(values), 0)


def read_json(part: str, column: str,
              skip: int | None) -> Generator[tuple[list, Any], None, None]:
    """The values of one key, None where a row lacks it."""
    done = skip or 0
    with open_part(part) as file:
        rows = itertools.islice(objects(file), done, None)
        while batch := list(itertools.islice(rows, BATCH_ROWS)):
            done += len(batch)
            yield [row.get(column) for row in batch], done


def read_txt(part: str, column: str,
             skip: int | None) -> Generator[tuple[list, Any], None, None]:
    """A text file, one document -> stream of ([its next piece], lines up to its end).

    It is cut where a line starts with a letter or digit and the line above is not blank: every
    tiktoken encoding always splits there, so the pieces have the same ids as the whole text.
    """
    done = skip or 0
    kept: list[str] = []  # lines after the last cut
    with open_part(part) as packed, io.TextIOWrapper(packed, encoding="utf-8-sig") as file:
        for _ in itertools.islice(file, done):
            pass
        while new := list(itertools.islice(file, TXT_LINES)):
            lines = kept + new
            cut = last_cut(lines, len(kept))
            if cut is None and len(lines) > 64 * TXT_LINES:
                cut = len(lines)  # cut anywhere rather than fill the memory
            if cut is not None:
                done += cut
                yield ["".join(lines[:cut])], done
            kept = lines[cut or 0:]
    if kept or skip is None and not done:
        yield ["".join(kept)], done + len(kept)


def last_cut(lines: list[str], first: int) -> int | None:
    """The last index after `first` at which a .txt may be cut, or None."""
    for i in range(len(lines) - 1, first, -1):
        if lines[i][:1].isalnum() and lines[i - 1].rstrip("\r\n")[-1:].strip():
            return i
    return None


READERS = {"parquet": read_parquet, "json": read_json, "txt": read_txt}


def objects(file: BinaryIO) -> Iterator[dict]:
    """The rows of a JSON file, as dicts. A row that is not an object has no columns.

    Raises ValueError if the file has anything but JSON.
    """
    for place, row in json_rows(file):
        if isinstance(row, ValueError):
            raise ValueError(f"{place}: {row}")
        yield row if isinstance(row, dict) else {}


@contextlib.contextmanager
def open_part(part: str) -> Iterator[Any]:
    """A local file, or one on the hub, opened for reading bytes; .gz and .zst are decompressed."""
    with contextlib.ExitStack() as stack:
        if is_local(part):
            file: Any = stack.enter_context(open_file(part, LEAVE_OUT))
        else:
            from datasets.utils.file_utils import xopen  # retries after network errors

            file = stack.enter_context(xopen(part, "rb"))
        if part.lower().endswith(".gz"):
            file = stack.enter_context(gzip.GzipFile(fileobj=file))  # type: ignore[arg-type]
        if part.lower().endswith(".zst"):
            import pyarrow  # Python itself has no codec before 3.14

            packed = pyarrow.PythonFile(file, "r")
            stream = stack.enter_context(pyarrow.CompressedInputStream(packed, "zstd"))
            file = stack.enter_context(io.BufferedReader(stream, 2**20))
        yield file


@contextlib.contextmanager
def open_parquet(part: str) -> Iterator[Any]:
    import pyarrow.parquet

    with open_part(part) as file, pyarrow.parquet.ParquetFile(file) as parquet:
        yield parquet


# --------------------------------------------------------------------------------------------------
# What can be read


LEAVE_OUT = "make it readable, or leave it out"


def is_local(part: str) -> bool:
    """Whether a part is a local path; else it is a dataset on the hub, or a file of one."""
    return os.path.lexists(part)


def is_read_here(address: str) -> bool:
    """Whether READERS has a reader for a file on the hub. Not for .txt: a line is a document there.
    """
    return bool(ON_HUB.match(address)) and kind_of(address) in ("parquet", "json")


def shown(part: str) -> str:
    """The name of a part in messages."""
    return ON_HUB.sub(r"\1: ", part)


def kind_of(path: str) -> Any:
    """The key in READERS for a file, by its ending in any case; None if unsupported."""
    stem, ending = os.path.splitext(path.lower())
    packed = ending in PACKED
    if packed:
        ending = os.path.splitext(stem)[1]
    kind = KINDS.get(ending)
    if packed and kind == "parquet":
        return None
    return kind


@contextlib.contextmanager
def reading(part: str) -> Iterator[None]:
    """Turn any error of reading a part into BadInput."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:  # pyarrow, gzip, fsspec and the hub each raise their own
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        raise BadInput(f"cannot read {shown(part)} ({cause}): {_remedy(part, error)} the same "
                       "command again; what is already written stays") from error


def _remedy(part: str, error: Exception) -> str:
    """How to make a part readable. Only a file whose content is wrong is called broken."""
    if isinstance(error, MemoryError):
        return "free some memory and give"
    if not is_local(part):
        return "give"
    if isinstance(error, UnicodeError):
        return "convert it to UTF-8 or leave it out, and give"
    if isinstance(error, NotImplementedError):  # of pyarrow
        return "save its text in a column of plain strings, or leave it out, and give"
    if getattr(error, "errno", None):
        return "make it readable and give"
    return "repair it or leave it out, and give"


@contextlib.contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn errors of the hub's client and of `datasets` into BadInput."""
    try:
        yield
    except Exception as error:
        raise hub.explain(error, name, "check --source and --name, or give local files") from error


def demand_column(part: str, column: str, names: Iterable[str]) -> None:
    """Raises BadInput if a part has no such column."""
    if column not in names:
        known = ", ".join(list(names)[:SHOWN]) or "(none)"
        raise BadInput(f"{shown(part)} has no column {column}: name one of {known} by "
                       "--text_column, or leave it out")


def check_part(part: str, column: str) -> None:
    """Raises BadInput if the start of a file cannot be read, or the file lacks the column."""
    with reading(part):
        if kind_of(part) == "parquet":
            with open_parquet(part) as parquet:
                demand_column(part, column, parquet.schema_arrow.names)
        elif kind_of(part) == "json":
            check_json(part, column)
        else:
            with contextlib.closing(read_txt(part, column, None)) as pieces:
                [start], _ = next(pieces)
            if is_utf16(start):
                raise UnicodeError("it is UTF-16 or UTF-32, or not text")


def check_json(part: str, column: str) -> None:
    """Raises BadInput if no row has the column."""
    names: dict[str, None] = {}
    is_empty = True
    with open_part(part) as file:
        for row in objects(file):
            if column in row:
                return
            names |= dict.fromkeys(row)
            is_empty = False
    if not is_empty:
        demand_column(part, column, names)


def find_parts(sources: Sequence[str], column: str) -> tuple[list[str], list[str]]:
    """--source -> (paths of files and ids of datasets, in order; lines about files left out).

    Raises BadInput for a path with nothing to read, and for a file without the column.
    """
    parts = []
    lines = []
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


def _find(source: str) -> tuple[list[str], list[str]]:
    """One word of --source -> (files, lines about those that are left out)."""
    files: list[str] = []
    lines: list[str] = []
    missing = f"no file {source}"
    if os.path.isdir(source):
        files, lines = find_files(source, kind_of)
        missing = f"{source} has no text files"
    elif os.path.lexists(source):
        return [source], []
    elif glob.has_magic(source):
        files, lines = _match(source)
    elif not kind_of(source) and not source.endswith("/"):  # a dataset of the hub
        return [source], []
    if not files:
        raise BadInput("; ".join([f"{missing}: --source takes {FORMATS}", *lines]))
    return files, lines


def _match(pattern: str) -> tuple[list[str], list[str]]:
    """(files that match a pattern, lines about those that are left out). Hidden files only match a
    pattern that starts with a dot, too."""
    words = Path(pattern).parts
    fixed = next(i for i, word in enumerate(words) if glob.has_magic(word))
    asks_hidden = any(word.startswith(HIDDEN) for word in words[fixed:])
    files = []
    others: dict[str, list[str]] = {}
    for path in sorted(glob.glob(pattern, recursive=True)):
        is_hidden = any(part.startswith(HIDDEN) for part in Path(path).parts[fixed:])
        if is_hidden and not asks_hidden:
            others.setdefault("hidden or temporary", []).append(path)
        elif not os.path.isdir(path):
            files.append(path)
        elif "**" not in words:  # which descends into folders
            others.setdefault("folders", []).append(path)
    return files, left_out(pattern, others)
