"""Endless streams of training batches, and the interfaces of training data and tasks.

`StreamLike`, `CorpusLike` and `TaskLike` are the interfaces. `Stream` implements the first with a
prefetch thread; train_gpt2.py's `ShardLoader` reads shards, `FollowingStream` shards that are still
being written, `Mixture` several sources of tokens, `Rows` packed conversations with replay,
`IteratorStream` any iterator (docs/streams.md). All processes read the same global batches;
`micro_batches` and `row_micro_batches` cut out each process's share.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterable
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch

from lib.cli import BadInput, RankError
from lib.corpus import Corpus
from lib.devices import Processes, to_device
from lib.follow import POLL, GrowingShards, Watch
from lib.packing import Packed
from lib.tokenizers import Tokenizer

# (idx, targets), int64 (B, T) each, and a Packed where rows contain several texts; targets of -1
# are ignored
MicroBatch = tuple[torch.Tensor, torch.Tensor] | tuple[torch.Tensor, torch.Tensor, Packed]
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / the golden ratio


# --------------------------------------------------------------------------------------------------
# Interfaces


class StreamLike(Protocol):
    """The stream that `train` reads: endless global batches, with a position for checkpoints.

    The batches must be the same on every process and after a resume.
    """

    def next(self, n: int) -> list[MicroBatch]:
        """This process's micro-batches of the next n tokens, equally many on every process.
        Advances by n."""

    def wait(self, n: int, stopped: Callable[[], bool],
             say: Callable[[str], Any]) -> BadInput | None:
        """Wait until `next(n)` has its tokens, or `stopped()`, which every process calls equally
        often. -> None, or the error if they will not arrive. say: prints a line."""

    def prefetch(self, n: int) -> None:
        """A hint that `next(n)` comes soon."""

    def state_dict(self) -> dict[str, Any]:
        """The position: a dict of numbers, or nested lists or tuples of numbers."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position. Raises ValueError, KeyError, IndexError or TypeError for a position of
        another stream."""

    def resume_at(self, step: int) -> None:
        """Called on resume after `step` steps; the position may be the start of other data."""

    def where(self, state: dict[str, Any]) -> str:
        """A position as text, to find the batch of a loss spike. Raises like `load_state_dict`."""

    def progress(self) -> dict[str, float]:
        """{TensorBoard tag: value}, logged every step."""


class CorpusLike(Protocol):
    """What `launch` needs to know about the training data before reading it.

    tokens: {"train": tokens of an epoch}. vocab_size: None if unknown. identity: changes with the
    text; a checkpoint matches if it has this identity or former_identity (of older versions).
    """

    tokens: dict[str, int]
    vocab_size: int | None
    identity: str
    former_identity: str

    def check_length(self, cfg: Any, steps: int) -> None:
        """Raises BadInput if a run of `steps` does not fit the data."""

    def most_repeated(self, tokens: float) -> tuple[float, str]:
        """(epochs, name) of the part that a run of `tokens` tokens repeats most."""

    def describe(self, cfg: Any, plan: Any) -> list[str]:
        """Lines to print at the start of a run. plan: a lib.plan.RunPlan."""


class TaskLike(Protocol):
    """The task that `launch` trains, such as train_gpt2.py's `Pretraining` or posttrain.py's
    `PostTraining`.

    weights: [the initial state dict], or empty. extra: more entries for checkpoints.
    """

    corpus: CorpusLike
    weights: Any
    extra: dict[str, Any]

    def vocabulary(self, model_cfg: Any) -> tuple[Tokenizer, Any]:
        """-> (the data's Tokenizer, model_cfg with its vocabulary)."""

    def evaluations(self, cfg: Any, plan: Any, tokenizer: Tokenizer,
                    processes: Processes) -> list:
        """List of train_gpt2.py's Evaluation. Raises BadInput if something they need is missing."""

    def stream(self, cfg: Any, plan: Any, tokenizer: Tokenizer,
               processes: Processes) -> StreamLike:
        """The training data."""

    def packed(self, idx: torch.Tensor) -> tuple:
        """More inputs of the model for a micro-batch of these ids: (a Packed,) or ()."""

    def conclude(self, run: Any) -> None:
        """Print a closing summary."""


# --------------------------------------------------------------------------------------------------
# A stream with prefetching


class Stream:
    """A StreamLike that prepares the next batch in a background thread.

    A subclass names the parts of its position in `names` and implements `read_batch`.
    """

    names: tuple[str, ...] = ()

    def __init__(self, *position):
        """position: where the stream starts, one value per name."""
        self.position = position
        self.ahead = {}  # (n, *position) -> future of that batch
        self.cutter = ThreadPoolExecutor(max_workers=1)

    def read_batch(self, n: int, *position) -> tuple:
        """-> (the batch of n tokens from `position` on, *the position after it)."""
        raise NotImplementedError

    def next(self, n: int) -> Any:
        """The next batch, of n tokens. Advances by n."""
        self.prefetch(n)
        (future,) = self.ahead.values()
        try:
            batch, *position = future.result()
        except BadInput as error:  # possibly on this process only
            raise RankError(str(error)) from error
        self.position = tuple(position)
        self.prefetch(n)
        return batch

    def wait(self, n: int, stopped: Callable[[], bool],
             say: Callable[[str], Any]) -> BadInput | None:
        return None

    def prefetch(self, n: int) -> None:
        """Read the next n tokens in the background."""
        key = n, *self.position
        if key not in self.ahead:
            self.ahead = {key: self.cutter.submit(self.read_batch, *key)}

    def state_dict(self) -> dict[str, Any]:
        return dict(zip(self.names, self.position, strict=True))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = tuple(_frozen(state[name]) for name in self.names)

    def resume_at(self, step: int) -> None:
        """Called on resume after `step` steps; the position may be the start of other data."""

    def where(self, state: dict[str, Any]) -> str:
        """A position as text, to find the batch of a loss spike."""
        return ", ".join(f"{name} {state[name]}" for name in self.names)

    def progress(self) -> dict[str, float]:
        """{TensorBoard tag: value}, logged every step."""
        return {}


def _frozen(value):
    """Convert nested lists to tuples, which can be dict keys; numbers stay as they are."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    return value


def unchanged(batch: Any) -> Any:
    return batch


class IteratorStream(Stream):
    """The tokens of any iterator, restarted at its end. The position is the number of tokens read:
    a resumed run restarts the iterator and skips them.

    begin: returns a new iterator over sequences of token ids, the same every time. transform:
    callable run in the prefetch thread, int64 tokens (n + 1,) -> the return value of `next`.
    """

    names = ("tokens",)

    def __init__(self, begin: Callable[[], Iterable], transform: Callable = unchanged):
        super().__init__(0)
        self.begin = begin
        self.transform = transform
        self._restart()

    def _restart(self):
        self.pieces = iter(self.begin())
        self.first = 0  # position of the first token in the buffer
        self.buffer = np.empty(0, dtype=np.int64)

    def _next_piece(self) -> np.ndarray:
        piece = next(self.pieces, None)
        if piece is None:
            self.pieces = iter(self.begin())  # the next epoch
            piece = next(self.pieces, None)
        if piece is None:
            raise ValueError("the iterator is empty")
        return np.asarray(piece, dtype=np.int64)

    def read_batch(self, n: int, tokens: int) -> tuple:
        """-> (n + 1 tokens from position `tokens` on, transformed; tokens + n)."""
        if tokens < self.first:
            self._restart()
        while self.first + len(self.buffer) <= tokens:  # skip
            self.first += len(self.buffer)
            self.buffer = self._next_piece()
        pieces = [self.buffer[tokens - self.first:]]
        missing = n + 1 - len(pieces[0])
        while missing > 0:
            piece = self._next_piece()
            pieces.append(piece)
            missing -= len(piece)
        self.first = tokens
        self.buffer = np.concatenate(pieces)
        return self.transform(self.buffer[:n + 1]), tokens + n


# --------------------------------------------------------------------------------------------------
# Shards that are still being written


class FollowingStream(Stream):
    """--follow: the tokens of a ShardLoader whose folder is still being written.

    Call `wait` before `next`. The state also has `text`, a hash of the shards that were read: those
    up to the position in the first epoch, all from the second epoch on.
    """

    names = "epoch", "shard", "offset"

    def __init__(self, loader: Any, shards: GrowingShards, processes: Processes):
        """loader: a ShardLoader of these shards."""
        super().__init__(*loader.position)
        self.loader = loader
        self.shards = shards
        self.processes = processes
        self.confirmed = 0  # what `_needed` returned when all processes last had it
        self.resumed: dict[str, Any] | None = None  # a state whose text is not yet compared
        self.hashes: dict[int, int] = {}  # number of shards -> hash of their text

    def read_batch(self, n: int, *position: Any) -> tuple:
        return self.loader.read_batch(n, *position)

    def prefetch(self, n: int) -> None:
        with contextlib.suppress(BadInput):  # `wait` meets it again
            self.shards.refresh()
        if self._needed(n) is None:
            self.ahead = {}
        else:
            super().prefetch(n)

    def _needed(self, n: int) -> int | None:
        """What the next n tokens need, see `GrowingShards.needed`."""
        epoch, shard, offset = self.position
        return self.shards.needed(epoch, shard, offset + n + 1)  # with the last target

    def wait(self, n: int, stopped: Callable[[], bool],
             say: Callable[[str], Any]) -> BadInput | None:
        needed = self._needed(n)
        if needed is not None and needed <= self.confirmed:  # the same on every process
            return None
        watch = Watch(self.shards.folder)
        started = time.monotonic()
        missing = ""  # the shard, once printed
        while True:
            needed, problem = self._look(n, watch)
            text = self._hash(needed or 0) % 2**32
            requests = [needed is not None, problem is not None, text]
            having, failing, texts = self.processes.sum(requests)
            if failing:
                return self._error(problem, failing)
            if having == self.processes.world_size:
                break
            if stopped():
                return None
            if not missing:
                number = max(len(self.shards.train), self.position[1]) + 1
                missing = f"train shard {number} of {self.shards.folder}/"
                say(f"waiting for {missing}")
            time.sleep(POLL)
        if texts != text * self.processes.world_size:
            return BadInput(f"{self.shards.folder}/ is not the same for every process: give all of "
                            "them the same shards")
        assert needed is not None
        self.confirmed = needed
        if missing:
            self.prefetch(n)
            futures.wait(self.ahead.values())  # reading the shard is not part of the step, either
            say(f"waited {time.monotonic() - started:.0f} s for {missing}")
        return None

    def _look(self, n: int, watch: Watch) -> tuple[int | None, str | None]:
        """(what the next n tokens need if it has arrived, an error or None)."""
        try:
            self.shards.refresh()
            if self.resumed and self.shards.has(*self.position[:2]):
                self._compare(self.resumed)
                self.resumed = None
        except BadInput as error:
            return None, str(error)
        needed = self._needed(n)
        if needed is None and watch.is_silent():
            return None, self.shards.died()
        return needed, None

    def _error(self, problem: str | None, failing: float) -> BadInput:
        if problem is None:
            return BadInput("another process cannot read its data: see its error")
        if failing == self.processes.world_size:
            return BadInput(problem)
        return RankError(problem)

    # -- position --

    def _hash(self, count: int) -> int:
        if count not in self.hashes:
            self.hashes[count] = self.shards.fingerprint(count)
        return self.hashes[count]

    def _text(self, epoch: int, shard: int) -> int:
        """The hash of the shards that were read up to a position."""
        return self._hash(len(self.shards.train) if epoch else shard + 1)

    def _compare(self, state: dict[str, Any]) -> None:
        """Raises BadInput if the shards before a position are not those that were read."""
        if state["text"] != self._text(state["epoch"], state["shard"]):
            raise BadInput(f"{self.shards.folder}/ no longer contains the text that this run was "
                           "trained on: restore it, or start another --run_name")

    def state_dict(self) -> dict[str, Any]:
        if self.resumed:  # its shards may not have arrived yet
            text = self.resumed["text"]
        else:
            text = self._text(*self.position[:2])
        return super().state_dict() | {"text": text}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.resumed = {name: state[name] for name in (*self.names, "text")}

    def where(self, state: dict[str, Any]) -> str:
        if not self.shards.has(state["epoch"], state["shard"]):  # resumed elsewhere
            return f"train shard {state['shard'] + 1}, which has not arrived yet"
        self._compare(state)
        return self.loader.where(state)

    def progress(self) -> dict[str, float]:
        return {"data/epoch": self.position[0]}


# --------------------------------------------------------------------------------------------------
# Tokens of several sources


class Mixture(Stream):
    """Rows from several streams of tokens, the same on every process and for any batch size and
    micro-batch.

    A row is block_size tokens of one source and the target of the last. The sources divide [0, 1)
    by their shares, and row k is from the source whose part contains k / golden ratio mod 1. This
    additive recurrence (Weyl 1916) spreads so evenly that after n rows each source is within a few
    rows of its share. So the position is a few integers: rows, and for each source its tokens so
    far and its position.
    """

    names = "rows", "tokens", "places"

    def __init__(self, corpus: Corpus, streams: list, block_size: int,
                 transform: Callable = unchanged):
        """streams: one per source of the corpus, with `read_batch(n, *position)`, like ShardLoader.
        transform: callable run in the prefetch thread, int64 tokens (rows * (block_size + 1),) ->
        the return value of `next`."""
        self.corpus = corpus
        self.streams = streams
        self.block_size = block_size
        self.transform = transform
        self.before = 0  # tokens of the run that are not in this position, such as other data's
        places = tuple(stream.position for stream in streams)
        super().__init__(0, (0,) * len(streams), places)

    def resume_at(self, step: int) -> None:
        # counted from the run's first step, so that a finished curriculum does not start again
        self.before = self.corpus.tokens_of(step) - sum(self.position[1])

    def read_batch(self, n: int, rows: int, tokens: Any, places: Any) -> tuple:
        """-> (n tokens from a position on as whole rows, each with its last target, transformed;
        the next position: rows, tokens, places)."""
        T = self.block_size
        chosen = self._choose(n // T, rows, self.before + sum(tokens))
        batch = np.empty((len(chosen), T + 1), dtype=np.int64)
        tokens = list(tokens)
        places = list(places)
        for i in np.unique(chosen):
            mine = chosen == i
            count = T * int(mine.sum())
            piece, *place = self.streams[i].read_batch(count, *places[i])
            batch[mine] = np.lib.stride_tricks.sliding_window_view(piece, T + 1)[::T]
            tokens[i] += count
            places[i] = tuple(place)
        batch = self.transform(batch.reshape(-1))
        return batch, rows + len(chosen), tuple(tokens), tuple(places)

    def _choose(self, n, first, tokens):
        """The source of each of n rows from row `first` on, after `tokens` tokens of the run: int64
        (n,)."""
        k = np.arange(first, first + n, dtype=np.uint64)
        points = (k * GOLDEN >> np.uint64(11)) * 2.0**-53  # k / golden ratio mod 1
        ends = self.corpus.shares(tokens + self.block_size * np.arange(n)).cumsum(axis=1)
        return (points[:, None] >= ends[:, :-1] / ends[:, -1:]).sum(axis=1)

    def where(self, state: dict[str, Any]) -> str:
        texts = []
        places = zip(self.corpus.sources, self.streams, state["places"], strict=True)
        for source, stream, place in places:
            position = dict(zip(stream.names, place, strict=True))
            texts.append(f"{source.name} {stream.where(position)}")
        return "; ".join(texts)

    def progress(self) -> dict[str, float]:
        """Tokens and epoch of each source so far, and its share of the next row."""
        _, tokens, places = self.position
        shares = self.corpus.shares(np.array([self.before + sum(tokens)]))[0]
        epochs = [place[0] for place in places]
        return {
            **self.corpus.tags("data/tokens", tokens),
            **self.corpus.tags("data/epoch", epochs),
            **self.corpus.tags("data/share", shares.tolist()),
        }


# --------------------------------------------------------------------------------------------------
# Rows, (3, T) each, as lib/packing.py defines them


class TokenRows:
    """Rows cut from a stream of tokens, for `Rows`. stride: tokens from one row to the next, as in
    `micro_batches`."""

    def __init__(self, stream: Stream, block_size: int, stride: int):
        self.stream = stream
        self.block_size = block_size
        self.stride = stride
        self.names = stream.names
        self.position = stream.position
        self.where = stream.where

    def read_batch(self, n: int, *position: Any) -> tuple:
        tokens, *position = self.stream.read_batch(n, *position)  # type: ignore[assignment]
        rows = np.lib.stride_tricks.sliding_window_view(tokens, self.block_size + 1)[::self.stride]
        documents = np.zeros_like(rows[:, 1:])
        return np.stack((rows[:, :-1], rows[:, 1:], documents), axis=1), *position

    def progress(self, position: tuple) -> dict[str, float]:
        """The stream's own progress at a position."""
        self.stream.position = position
        return self.stream.progress()


class Rows(Stream):
    """Rows of `data` with rows of `replay` evenly spread among them, a constant `share`.

    The same for any number of processes, micro-batch and batch size. The position is the number of
    rows so far and the positions of both sources.
    """

    names = "rows", "data", "replay"

    def __init__(self, data: Any, replay: Any = None, share: float = 0.0,
                 transform: Callable = unchanged):
        """data, replay: a lib.packing.RowSource or TokenRows each. transform: callable run in the
        prefetch thread, rows (n, 3, T) -> the return value of `next`."""
        self.sources = (data, replay)
        self.share = 0.0 if replay is None else share
        self.transform = transform
        super().__init__(0, data.position, () if replay is None else replay.position)

    def read_batch(self, n: int, rows: int, *places: Any) -> tuple:
        """-> (the rows of n tokens from a position on, transformed; the next position: rows, data,
        replay)."""
        T = self.sources[0].block_size
        numbers = np.arange(rows, rows + n // T)
        replayed = np.floor((numbers + 1) * self.share) > np.floor(numbers * self.share)
        batch = np.empty((len(numbers), 3, T), dtype=np.int64)
        places = list(places)  # type: ignore[assignment]
        for i, mine in enumerate((~replayed, replayed)):
            if mine.any():
                count = int(mine.sum()) * T
                batch[mine], *place = self.sources[i].read_batch(count, *places[i])
                places[i] = tuple(place)  # type: ignore[index]
        return self.transform(batch), rows + len(numbers), *places

    def where(self, state: dict[str, Any]) -> str:
        texts = []
        for source, name in zip(self.sources, ("data", "replay")):
            if source is not None:
                position = dict(zip(source.names, state[name], strict=True))
                texts.append(source.where(position))
        return "; replay ".join(texts)

    def progress(self) -> dict[str, float]:
        return self.sources[0].progress(self.position[1])


# --------------------------------------------------------------------------------------------------
# A global batch -> this process's micro-batches


def micro_batches(tokens: np.ndarray, block_size: int, stride: int, micro_batch: int,
                  processes: Processes) -> list[MicroBatch]:
    """A global batch of tokens, int64 (n,) -> this process's (idx, targets) on its device.

    Rows of block_size tokens and their last target start `stride` tokens apart: block_size in a
    stream, where the last target is also the next row's first token; block_size + 1 in a Mixture,
    whose rows are separate.
    """
    rows = len(tokens) // stride // processes.world_size
    first = processes.rank * rows * stride
    mine = tokens[first:first + (rows - 1) * stride + block_size + 1]
    windows = to_device(mine, processes.device).unfold(0, block_size + 1, stride)  # (rows, T + 1)
    x = windows[:, :-1].contiguous()
    y = windows[:, 1:].clone(memory_format=torch.contiguous_format)
    size = math.gcd(rows, micro_batch)  # of half a batch, maybe less than micro_batch
    return list(zip(x.split(size), y.split(size), strict=True))


def row_micro_batches(rows: np.ndarray, micro_batch: int, processes: Processes,
                      packed: bool) -> list[MicroBatch]:
    """A global batch of rows, int64 (n, 3, T) -> this process's (idx, targets) on its device, and a
    Packed if `packed`."""
    n = len(rows) // processes.world_size
    mine = rows[processes.rank * n:(processes.rank + 1) * n].transpose(1, 0, 2)  # (3, n, T)
    parts = to_device(np.ascontiguousarray(mine), processes.device).split(micro_batch, dim=1)
    if packed:
        return [(idx, targets, Packed(documents)) for idx, targets, documents in parts]
    return [(idx, targets) for idx, targets, _ in parts]
