"""Several folders of token shards as one corpus and one stream of batches: mixed by weight, and
with a curriculum before them.

`Corpus` is what --data and --curriculum name, `Stream` the base of what training reads, with the
next batch made ready in the background, and `Mixture` the stream of more than one folder.
"""

import math
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from lib.budget import tokens_of
from lib.cli import BadInput, RankError
from lib.devices import to_device
from lib.shards import SPLITS, Shards, check_shards, digest
from lib.tokenizers import load_tokenizer

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / the golden ratio
MOST_WEIGHT = 1_000_000_000
MOST_EPOCHS = 100  # passes over one source of several in a run: beyond, it has run dry
TAKEN = ("bpb", "pretraining", "pretraining_bpb"
         )  # behind Loss/val_ in TensorBoard: no names of sources
CURRICULUM_MIX = {  # share of the curriculum, by how far its stage has come, 0 <= p < 1
    "cosine": lambda p: (1 + np.cos(np.pi * p)) / 2,
    "linear": lambda p: 1 - p,
    "step": np.ones_like,
}


class Source(NamedTuple):
    name: str  # for people and for TensorBoard
    shards: Shards


class Corpus:
    """The folders that --data, DIR[:WEIGHT] each, and --curriculum name; the latter stands last
    among `sources`.

    tokens: {"train": count} of --data alone, without sources of weight 0. weights: float64
    (sources,), shares of the tokens once the curriculum is over, and of the sources' losses in the
    validation loss of the whole; without a weight given, by size. tokenizer, vocab_size: as of
    Shards, the same in every folder. identity, former_identity: as of Shards; those of a single
    folder are its own. needed: the splits that every folder must have. Raises BadInput, also for
    folders of different tokenizers, naming both.
    """

    def __init__(self, cfg, needed=SPLITS):
        if bool(cfg.curriculum) != bool(cfg.curriculum_steps):
            raise BadInput(
                "--curriculum and --curriculum_steps belong together: give the folder and the steps, or neither"
            )
        words = [split_weight(word) for word in cfg.data]
        folders = [folder for folder, _ in words] + ([cfg.curriculum] if cfg.curriculum else [])
        resolved = [os.path.realpath(folder) for folder in folders]
        if twice := [
                folder for folder, path in zip(folders, resolved[:len(words)])
                if resolved.count(path) > 1
        ]:
            both = os.path.realpath(twice[0]) in resolved[len(words):]
            raise BadInput(f"{twice[0]} is named " + (
                "by both --data and --curriculum: name another folder for one of them" if both else
                "twice by --data: name it once, with the sum of the weights"))
        short = Counter([*TAKEN, *(Path(path).name for path in resolved)])
        names = [
            Path(path).name if short[Path(path).name] == 1 else path.strip(os.sep).replace(
                os.sep, "_") for path in resolved
        ]
        self.sources = [
            Source(name, Shards(folder, needed, named_by))
            for name, folder, named_by in zip(names, folders, ["--data"] * len(words)
                                              + ["--curriculum"])
        ]
        if empty := [
                source.shards.folder for source in self.sources if not source.shards.tokens["train"]
        ]:
            raise BadInput(
                f"the train shards of {empty[0]} hold no tokens: make them again, or leave it out")
        data = self.sources[:len(words)]
        self.weights = self._weigh([weight for _, weight in words],
                                   [source.shards.tokens["train"] for source in data])
        self.tokens = {
            "train": sum(source.shards.tokens["train"]
                         for source, weight in zip(data, self.weights)
                         if weight)
        }
        self.mix = CURRICULUM_MIX[cfg.curriculum_mix] if cfg.curriculum else None
        self.tokens_of = partial(tokens_of, cfg=cfg)  # so many steps of the run
        self.stage = self.tokens_of(cfg.curriculum_steps
                                    or 0)  # tokens of the run until the curriculum is over
        self._compare_tokenizers()
        first = self.sources[0].shards
        self.tokenizer, self.vocab_size = first.tokenizer, first.vocab_size
        self.identity, self.former_identity = first.identity, first.former_identity
        if self.is_mixed:
            self.identity = digest([source.shards.identity for source in self.sources])
            self.former_identity = digest(
                [source.shards.former_identity for source in self.sources])

    @property
    def is_mixed(self):
        return len(self.sources) > 1

    def _weigh(self, weights, sizes):
        given = [weight for weight in weights if weight is not None]
        if given and len(given) < len(weights):
            raise BadInput(
                "some of --data have a weight and some have none: give every one a weight, or none")
        weights = np.array(given or sizes, dtype=np.float64)
        if not weights.sum():
            raise BadInput("the weights of --data add up to 0: give at least one above 0")
        return np.append(weights / weights.sum(), [0.0] * (len(self.sources) - len(weights)))

    def _compare_tokenizers(self):
        (name, first), *others = ((s.name, s.shards.tokenizer) for s in self.sources)
        text = None
        for other_name, other in others:  # a trained tokenizer is the same wherever its file lies
            if other != first:
                text = text or load_tokenizer(first).spec
                if load_tokenizer(other).spec != text:
                    raise BadInput(f"{name} holds tokens of {first}, and {other_name} of {other}: "
                                   "their ids mean different text; make one of them anew with fineweb.py --tokenizer")

    def shares(self, tokens):
        """How the batch after so many tokens of the run, int64 (n,), is shared out:
        float64 (n, sources), rows that add up to 1."""
        shares = np.repeat(self.weights[None], len(tokens), axis=0)
        if self.mix:
            progress = tokens / self.stage
            curriculum = np.where(progress < 1, self.mix(np.minimum(progress, 1.0)), 0.0)
            shares *= 1 - curriculum[:, None]
            shares[:, -1] = curriculum
        return shares

    def epochs(self, tokens):
        """Passes over each source in a run of so many tokens, float64 (sources,)."""
        sizes = np.array([source.shards.tokens["train"] for source in self.sources])
        return self.shares(
            (np.arange(10_000) + 0.5) / 10_000 * tokens).mean(axis=0) * tokens / sizes

    def most_repeated(self, tokens):
        """The most passes over one source in a run of so many tokens, and its name."""
        return max(zip(self.epochs(tokens).tolist(), [source.name for source in self.sources]))

    def check_tokenizer(self, tokenizer):
        """Raises BadInput if the folders hold tokens of another tokenizer than a model's,
        `tokenizer`."""
        own = load_tokenizer(self.tokenizer)
        if not own.same_ids(tokenizer):
            raise BadInput(f"{self.sources[0].shards.folder} holds tokens of another tokenizer than "
                           f"the checkpoint's, {tokenizer.name}: make the shards again with "
                           "fineweb.py --tokenizer, or name another --data")
        self.check_shards(own)

    def check_shards(self, tokenizer):
        """Raises BadInput if a shard cannot be the tokenizer's."""
        for source in self.sources:
            check_shards(source.shards, tokenizer)

    def check_length(self, cfg, steps):
        """Raises BadInput if a run of `steps` is too short for the curriculum, or so long that a
        source of several runs dry; not for one of --minutes, whose length comes later:
        lib/description.py's `warnings`."""
        if cfg.minutes:
            return
        if (cfg.curriculum_steps or 0) > steps:
            raise BadInput(
                f"--curriculum_steps {cfg.curriculum_steps} is longer than the run of {steps} steps: shorten it"
            )
        passes = zip(self.sources, self.weights, self.epochs(tokens_of(
            steps, cfg))) if self.is_mixed else ()
        for source, weight, epochs in passes:
            if epochs > MOST_EPOCHS:
                raise BadInput(f"{source.name} runs dry: the run would pass over its {source.shards.tokens['train']:,} tokens "
                               f"{epochs:,.0f} times, more than {MOST_EPOCHS}; lower "
                               f"{'its weight' if weight else '--curriculum_steps'}, train for less, or give it more text")

    def describe(self, cfg, plan):
        """Lines for the start of a run. plan: its lib.plan.RunPlan."""
        val = [
            min(cfg.val_tokens, s.shards.tokens["val"] - 1) // plan.block_size * plan.block_size
            for s in self.sources
        ]
        lines = [f"data    {s.shards.folder}: {s.shards.tokens['train']:,} train tokens in {len(s.shards.train)} shards, "
                 f"validation on {n:,}" for s, n in zip(self.sources, val)]
        if self.is_mixed:
            lines = [
                f"{line}; {share:.1%} of the mixture" + ("" if cfg.minutes else f", {n:.2f} epochs")
                for line, share, n in zip(lines, self.weights, self.epochs(tokens_of(
                    plan.steps, cfg)))
            ]
        if self.is_mixed and cfg.curriculum:
            lines[
                -1] += f"; the curriculum of the first {cfg.curriculum_steps:,} steps, {cfg.curriculum_mix}"
        return lines

    def tags(self, prefix, values):
        """{f"{prefix}_{name}": value} for the sources of a mixture; a single source has no tags of
        its own."""
        pairs = zip(self.sources, values, strict=True) if self.is_mixed else ()
        return {f"{prefix}_{source.name}": value for source, value in pairs}


def split_weight(word):
    """DIR[:WEIGHT] -> (folder, weight or None). A number behind the last colon is a weight;
    raises BadInput for one out of bounds."""
    folder, colon, number = word.rpartition(":")
    if not colon or os.path.lexists(word):
        return word, None
    try:
        weight = float(number)
    except ValueError:
        if not os.path.isdir(folder):
            return word, None  # C:\data, say
        weight = math.nan
    if not 0 <= weight <= MOST_WEIGHT:
        raise BadInput(f"--data {word}: a weight is a number from 0 to {MOST_WEIGHT:,}")
    return folder, weight


def micro_batches(tokens, block_size, stride, micro_batch, processes):
    """A global batch, int64 (n,) -> this process's micro-batches on its device: list of (idx,
    targets), int64 (B, T) each.

    A row is block_size tokens and the last target, and begins `stride` tokens behind the one
    before: in a stream of tokens the last target is the next row's first token too, the rows of a
    Mixture stand apart.
    """
    rows = len(tokens) // stride // processes.world_size
    tokens = to_device(
        tokens[processes.rank * rows * stride:][:(rows - 1) * stride + block_size + 1],
        processes.device)
    rows = tokens.unfold(0, block_size + 1, stride)  # (rows, T + 1), a view
    x, y = rows[:, :-1].contiguous(), rows[:, 1:].clone(memory_format=torch.contiguous_format)
    return list(zip(x.split(micro_batch), y.split(micro_batch), strict=True))


class Stream:
    """An endless stream of batches, read ahead in a background thread. A subclass has `read_batch`:
    n and a position, a tuple of what `names` names -> the batch of n tokens from there on, and the
    position after it, item by item."""

    names = ()

    def __init__(self, *position):
        self.position = position
        self.ahead, self.cutter = {}, ThreadPoolExecutor(
            max_workers=1)  # the next batch, by its size and position

    def next(self, n):
        """The stream's next batch, of n tokens. Advances by n."""
        self.prefetch(n)
        (future,) = self.ahead.values()
        try:
            batch, *position = future.result()
        except BadInput as error:  # one process may meet it alone
            raise RankError(str(error)) from error
        self.position = tuple(position)
        self.prefetch(n)
        return batch

    def prefetch(self, n):
        """Have the next n tokens made ready in the background."""
        key = n, *self.position
        if key not in self.ahead:
            self.ahead = {key: self.cutter.submit(self.read_batch, *key)}

    def state_dict(self):
        return dict(zip(self.names, self.position, strict=True))

    def load_state_dict(self, state):
        self.position = tuple(_frozen(state[name]) for name in self.names)

    def resume_at(self, step):
        """The run has so many steps behind it; its position may be one of other data."""


def _frozen(value):
    """A number, or nested lists of them as tuples, which a dict can look up."""
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


class Mixture(Stream):
    """An endless stream of batches whose rows come from several streams; the same for every
    process, any batch size and micro-batch.

    A row is block_size tokens of one source and the target of the last. Row k of the run is the
    source's into whose share of [0, 1) the point k / golden ratio mod 1 falls: an additive
    recurrence (Weyl 1916), whose points are spread so evenly that after n rows each source had its
    share to within a few rows. So the state is a few integers: rows, and for each source its
    position and how many tokens it gave.
    """

    names = "rows", "tokens", "places"

    def __init__(self, corpus, streams, block_size, transform=None):
        """streams: one for each of the corpus's sources, with `read_batch(n, *position)`,
        `state_dict` and `where` of their own.

        transform: callable run in the prefetch thread, (rows x (block_size + 1),) tokens -> what
        `next` returns.
        """
        self.corpus, self.streams, self.block_size = corpus, streams, block_size
        self.transform = transform or (lambda tokens: tokens)
        self.before = 0  # tokens of the run that other data gave, or batches of another size
        super().__init__(0, (0,) * len(streams), tuple(stream.position for stream in streams))

    def resume_at(self, step):
        self.before = self.corpus.tokens_of(step) - sum(
            self.position[1])  # a curriculum that is over does not come back

    def read_batch(self, n, rows, tokens, places):
        """-> (n tokens from a position on, whole rows, each with its last target: int64 (n /
        block_size x (block_size + 1),), transformed; the position after it: rows, tokens, places).
        """
        T, chosen = self.block_size, self._choose(n // self.block_size, rows,
                                                  self.before + sum(tokens))
        counts = np.bincount(chosen, minlength=len(self.streams)) * T
        batch, after = np.empty((len(chosen), T + 1), dtype=np.int64), list(places)
        for i in np.flatnonzero(counts):
            piece, *after[i] = self.streams[i].read_batch(int(counts[i]), *places[i])
            batch[chosen == i] = np.lib.stride_tricks.sliding_window_view(piece, T + 1)[::T]
        return (self.transform(batch.reshape(-1)), rows + len(chosen),
                tuple(a + int(b) for a, b in zip(tokens, counts)), tuple(map(tuple, after)))

    def _choose(self, n, first, tokens):
        """The sources of n rows, from row number `first` on, before which the run saw so many
        tokens: int64 (n,)."""
        points = (np.arange(first, first + n, dtype=np.uint64) * GOLDEN >>
                  np.uint64(11)) * 2.0**-53  # k / golden ratio mod 1
        ends = self.corpus.shares(tokens + self.block_size * np.arange(n)).cumsum(axis=1)
        return (points[:, None] >= ends[:, :-1] / ends[:, -1:]).sum(axis=1)

    def where(self, state):
        """A position as text: what to look at after a spike."""
        return "; ".join(
            f"{source.name} {stream.where(dict(zip(stream.names, place, strict=True)))}" for source,
            stream, place in zip(self.corpus.sources, self.streams, state["places"], strict=True))

    def progress(self):
        """By tag, for TensorBoard: the tokens of each source so far, its epoch, its share of the
        next row."""
        _, tokens, places = self.position
        shares = self.corpus.shares(np.array([self.before + sum(tokens)]))[0]
        return {
            **self.corpus.tags("data/tokens", tokens),
            **self.corpus.tags("data/epoch", [place[0] for place in places]),
            **self.corpus.tags("data/share", shares.tolist())
        }
