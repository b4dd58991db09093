"""Encode text in threads and write the ids into shards, so that a killed run can continue.

`TokenizedText` encodes a lib/text.py Source batch by batch. `ShardWriter` cuts the ids into shards
and updates meta.json after each. `rewrite_shard` makes a single shard again. `heartbeat` shows
readers of the folder that its writer is alive.
"""

import contextlib
import zlib
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lib.background import every
from lib.cli import BadInput
from lib.shard_meta import BEAT, WRITING, Meta, Record, Start
from lib.shards import save_shard
from lib.text import Batch, Source
from lib.tokenizers import Tokenizer

# --------------------------------------------------------------------------------------------------
# Text -> ids


def encode(batch: Batch, tokenizer: Tokenizer, dtype: np.dtype) -> np.ndarray:
    """The ids of a Batch, with the end-of-text id before each document."""
    eot = np.array([tokenizer.eot])
    pieces = [np.empty(0, dtype)]
    for i, text in enumerate(batch.texts):
        if i > 0 or not batch.continues:
            pieces.append(eot)
        pieces.append(tokenizer.encode(text))
    return np.concatenate(pieces).astype(dtype)


def encode_batches(batches: Generator[Batch, None, None], tokenizer: Tokenizer, dtype: np.dtype,
                   workers: int) -> Iterator[tuple[Batch, np.ndarray]]:
    """(Batch, its ids), in order. tiktoken releases the GIL, so threads encode in parallel; at most
    3 * workers + 1 batches are in memory."""
    executor = ThreadPoolExecutor(workers)
    waiting: deque = deque()
    failure = None

    def oldest():
        batch, future = waiting.popleft()
        return batch, future.result()

    try:
        while True:
            try:
                batch = next(batches, None)
            except Exception as error:  # a damaged file: what comes before still goes into shards
                failure = error
                break
            if batch is None:
                break
            waiting.append((batch, executor.submit(encode, batch, tokenizer, dtype)))
            if len(waiting) > 3 * workers:
                yield oldest()
        while waiting:
            yield oldest()
        if failure:
            raise failure
    finally:
        batches.close()
        executor.shutdown(cancel_futures=True)


class TokenizedText:
    """The documents of a Source as a stream of ids that starts at any position."""

    def __init__(self, source: Source, tokenizer: Tokenizer, dtype: np.dtype, workers: int):
        self.source = source
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.workers = workers

    def batches(self, position: dict | None = None,
                keep: bool = True) -> contextlib.AbstractContextManager:
        """A context manager for the stream of (Batch, its ids). keep: as in `Source.batches`."""
        batches = self.source.batches(position, keep)
        return contextlib.closing(
            encode_batches(batches, self.tokenizer, self.dtype, self.workers))

    def find(self, start: Start | None, tokens: int) -> tuple[dict | None, int]:
        """(position in the source, ids to drop after it) of a Start that is `tokens` ids into the
        stream.

        Positions from an older fineweb.py cannot be read: then all ids before it are dropped.
        """
        if start is not None and self.source.understands(start.source):
            return start.source, start.drop
        return None, tokens


# --------------------------------------------------------------------------------------------------
# Ids -> shards


@dataclass(frozen=True)
class Layout:
    """How a stream of ids is cut into shards, in tokens. val_tokens: None means one shard, or a
    tenth of a source that does not fill one."""
    prefix: str
    shard_size: int
    val_tokens: int | None = None

    @property
    def val_size(self) -> int:
        return self.shard_size if self.val_tokens is None else self.val_tokens


class ShardWriter:
    """Cuts a stream of ids into shards and updates meta.json after each one.

    The first shard is the validation shard, unless its size is 0.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, meta: Meta, layout: Layout):
        self.folder = folder
        self.tokenizer = tokenizer
        self.meta = meta
        self.layout = layout
        self.pieces: list[np.ndarray] = []  # of the shard in progress
        self.count = 0  # its ids so far

    def add(self, ids: np.ndarray, used: int, before: dict | None) -> None:
        """Take the ids of one batch from number `used` on. before: the source's position before
        the batch."""
        while True:
            split, size = self._in_progress()
            end = used + size - self.count  # where the shard is full
            if end > len(ids):
                break
            if end == len(ids) and split == "val":  # this may be all: leave some for training
                break
            whole = np.concatenate([*self.pieces, ids[used:end]])
            self._write(split, whole, Start(before, end))
            self.pieces = []
            self.count = 0
            used = end
        self.pieces.append(ids[used:])
        self.count += len(ids) - used

    def finish(self) -> None:
        """Write the remaining ids as the last shard. Raises BadInput if there were none."""
        rest = np.concatenate([np.empty(0, self.meta.dtype), *self.pieces])
        if not len(rest) and not self.meta.tokens:
            raise BadInput(
                "the source contains no documents: nothing was written; check --source and "
                f"--text_column ({self.meta.skipped_rows:,} rows were without text)")
        if self._needs_val():
            cut = self._val_cut(rest)
            self._write("val", rest[:cut], Start(None, cut))
            rest = rest[cut:]
        if len(rest):
            self._write("train", rest, None)
        self.meta.complete = True
        self.meta.resume = None
        self.meta.write(self.folder)

    def _needs_val(self) -> bool:
        return bool(self.layout.val_size and not self.meta.split("val").shards)

    def _in_progress(self) -> tuple[str, int]:
        """(split, size) of the shard in progress."""
        if self._needs_val():
            return "val", self.layout.val_size
        return "train", self.layout.shard_size

    def _val_cut(self, ids: np.ndarray) -> int:
        """Number of validation ids of a source that does not fill the validation shard: a tenth, or
        up to a fifth to end with a document. Raises BadInput if --val_tokens takes all of them."""
        if self.layout.val_tokens is not None:
            raise BadInput(f"--val_tokens {self.layout.val_size:,} leaves nothing of the source's "
                           f"{len(ids):,} tokens for training: lower it")
        if len(ids) < 2:
            raise BadInput("the source has a single token, too few to train and validate: "
                           "give more text")
        tenth = max(len(ids) // 10, 1)
        starts = np.flatnonzero(ids == self.tokenizer.eot)
        near = starts[(starts >= tenth) & (starts <= 2 * tenth)]
        return int(near[0]) if len(near) else tenth

    def _write(self, split: str, ids: np.ndarray, resume: Start | None) -> None:
        """Write one shard. resume: the Start of the next one; None after the last."""
        if not self.meta.tokens:  # a run killed after its first shard must find whose it is
            self.meta.write(self.folder)
            if self.tokenizer.is_trained:
                self.tokenizer.save(self.folder / "tokenizer.json")
        name = f"{self.layout.prefix}_{split}_{len(self.meta.records):06d}.npy"
        save_shard(self.folder / name, ids)
        record = Record(name, len(ids), zlib.crc32(ids.data), self.meta.resume)
        self.meta.add(record, ids, self.tokenizer)
        self.meta.resume = resume
        self.meta.complete = resume is None
        self.meta.write(self.folder)
        tqdm.write(f"{name}: {self.meta.tokens:,} tokens so far")


def rewrite_shard(folder: Path, text: TokenizedText, meta: Meta, record: Record) -> None:
    """Rewrite a missing or damaged shard from its position in the source. Raises BadInput if the
    ids are not the same."""
    print(f"{record.name} is missing or damaged: writing it again")
    earlier = sum(other.tokens for other in meta.records[:meta.records.index(record)])
    position, drop = text.find(record.start, earlier)
    pieces = [np.empty(0, text.dtype)]
    count = 0
    # keep=False: if the source has changed, its documents must not count as seen
    with text.batches(position, keep=False) as stream:
        for _, ids in stream:
            piece = ids[drop:][:record.tokens - count]
            pieces.append(piece)
            count += len(piece)
            drop = max(drop - len(ids), 0)
            if count == record.tokens:
                break
    whole = np.concatenate(pieces)
    if zlib.crc32(whole.data) != record.crc32:
        raise BadInput(f"{folder / record.name} cannot be rewritten, as the source has changed: "
                       "restore the source, or give another --out")
    save_shard(folder / record.name, whole)


# --------------------------------------------------------------------------------------------------
# Signs of life


@contextlib.contextmanager
def heartbeat(folder: Path) -> Iterator[None]:
    """Touch the file WRITING in a folder every BEAT seconds during the block, then remove it.

    `train_gpt2.py --follow` watches it (lib/follow.py). Unlike a lock, it works on network file
    systems. A killed writer leaves it behind, untouched.
    """
    path = folder / WRITING

    def touch():
        with contextlib.suppress(OSError):  # a full disk is reported by the writer
            path.touch()

    touch()
    try:
        with every(BEAT, touch):
            yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
