"""The folders of token shards of --data and --curriculum as one corpus: mixed by weight, after the
curriculum. lib/streams.py reads from it."""

import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lib.budget import tokens_of
from lib.cli import BadInput
from lib.follow import GrowingShards
from lib.shard_meta import SPLITS
from lib.shards import Shards, check_shards, digest
from lib.tokenizers import Tokenizer, load_tokenizer

MOST_WEIGHT = 1_000_000_000
MOST_EPOCHS = 100  # over one of several sources in a run: beyond, it has run dry
TAKEN = ("bpb", "pretraining", "pretraining_bpb")  # after Loss/val_ in TensorBoard: no source names
CURRICULUM_MIX = {  # share of the curriculum by its progress p, 0 <= p < 1
    "cosine": lambda p: (1 + np.cos(np.pi * p)) / 2,
    "linear": lambda p: 1 - p,
    "step": np.ones_like,
}


class ShardSource(NamedTuple):
    name: str  # for people and for TensorBoard
    shards: Shards


class Corpus:
    """The folders of --data, DIR[:WEIGHT] each, and of --curriculum, which is last in `sources`.

    tokens: {"train": count} of --data without sources of weight 0; None if unknown, as it is
    still being written. weights: float64 (sources,), each source's share of the tokens after the
    curriculum, and of the validation loss; by size unless given. growing: the folder of --follow,
    else None. tokenizer, vocab_size: as in Shards, the same for every folder. identity,
    former_identity: as in Shards.

    needed: the splits that every folder must have. Raises BadInput, also for folders of different
    tokenizers.
    """

    def __init__(self, cfg: Any, needed: Sequence[str] = SPLITS):
        if bool(cfg.curriculum) != bool(cfg.curriculum_steps):
            raise BadInput("--curriculum and --curriculum_steps need each other: "
                           "give both, or neither")
        words = [split_weight(word) for word in cfg.data]
        data = [folder for folder, _ in words]
        curriculum = [cfg.curriculum] if cfg.curriculum else []
        check_distinct(data, curriculum)
        self.growing: GrowingShards | None = None
        if cfg.follow:
            if len(data + curriculum) > 1:
                raise BadInput("--follow reads a single folder: name one by --data, without "
                               "--curriculum, or leave it out once all are finished")
            self.growing = GrowingShards(data[0], needed)
            shards: list[Shards] = [self.growing]
        else:
            shards = [Shards(folder, needed, "--data") for folder in data]
            shards += [Shards(folder, needed, "--curriculum") for folder in curriculum]
        names = short_names(data + curriculum)
        self.sources = [ShardSource(name, own) for name, own in zip(names, shards)]
        for own in shards:
            if not own.tokens["train"]:
                raise BadInput(f"the train shards of {own.folder} contain no tokens: "
                               "make them again, or leave it out")

        sizes = [own.tokens["train"] for own in shards[:len(data)]]
        weights = normalize([weight for _, weight in words], sizes)
        self.tokens: dict[str, Any] = {
            "train": sum(size for size, weight in zip(sizes, weights) if weight)}
        if self.growing:
            self.tokens = {"train": self.growing.epoch_tokens}
        self.weights = np.append(weights, [0.0] * len(curriculum))
        self.mix: Any = CURRICULUM_MIX[cfg.curriculum_mix] if cfg.curriculum else None
        self.tokens_of = partial(tokens_of, cfg=cfg)  # steps of the run -> tokens
        self.stage = self.tokens_of(cfg.curriculum_steps or 0)  # tokens before the curriculum ends

        self._compare_tokenizers()
        first = shards[0]
        self.tokenizer = first.tokenizer
        self.vocab_size = first.vocab_size
        self.identity = first.identity
        self.former_identity = first.former_identity
        if self.is_mixed:
            self.identity = digest([own.identity for own in shards])
            self.former_identity = digest([own.former_identity for own in shards])

    @property
    def is_mixed(self) -> bool:
        return len(self.sources) > 1

    def _compare_tokenizers(self):
        """Raises BadInput unless all folders have the same tokenizer, wherever its files are."""
        first = self.sources[0]
        spec = first.shards.tokenizer
        text = None
        for other in self.sources[1:]:
            other_spec = other.shards.tokenizer
            if other_spec == spec:
                continue
            text = text or load_tokenizer(spec).spec
            if load_tokenizer(other_spec).spec != text:
                raise BadInput(
                    f"{first.name} has tokens of {spec}, and {other.name} of {other_spec}: their "
                    "ids mean different text; make one of them again with fineweb.py --tokenizer")

    def shares(self, tokens: np.ndarray) -> np.ndarray:
        """Each source's share of the batch after `tokens` tokens of the run, int64 (n,) -> float64
        (n, sources); rows sum to 1."""
        shares = np.repeat(self.weights[None], len(tokens), axis=0)
        if self.mix:
            progress = tokens / self.stage
            curriculum = np.where(progress < 1, self.mix(np.minimum(progress, 1.0)), 0.0)
            shares *= 1 - curriculum[:, None]
            shares[:, -1] = curriculum
        return shares

    def epochs(self, tokens: float) -> np.ndarray:
        """Epochs of each source in a run of `tokens` tokens, float64 (sources,); 0 if its size is
        unknown."""
        sizes = np.array([source.shards.epoch_tokens or math.inf for source in self.sources])
        points = (np.arange(10_000) + 0.5) / 10_000 * tokens
        return self.shares(points).mean(axis=0) * tokens / sizes

    def most_repeated(self, tokens: float) -> tuple[float, str]:
        """(epochs, name) of the source with the most epochs in a run of `tokens` tokens."""
        return max(zip(self.epochs(tokens).tolist(), [source.name for source in self.sources]))

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises BadInput if the folders' tokenizer is not a model's."""
        own = load_tokenizer(self.tokenizer)
        if not own.same_ids(tokenizer):
            raise BadInput(f"{self.sources[0].shards.folder} has tokens of another tokenizer "
                           f"than the checkpoint's, {tokenizer.name}: make the shards again with "
                           "fineweb.py --tokenizer, or name another --data")
        self.check_shards(own)

    def check_shards(self, tokenizer: Tokenizer) -> None:
        """Raises BadInput if a shard does not fit the tokenizer."""
        for source in self.sources:
            check_shards(source.shards, tokenizer)

    def check_length(self, cfg: Any, steps: int) -> None:
        """Raises BadInput if a run of `steps` is shorter than the curriculum, or repeats a source
        of a mixture more than MOST_EPOCHS times. The length of --minutes is not known yet:
        lib/description.py's `warnings` checks it later."""
        if cfg.minutes:
            return
        if (cfg.curriculum_steps or 0) > steps:
            raise BadInput(f"--curriculum_steps {cfg.curriculum_steps} is longer than the run of "
                           f"{steps} steps: shorten it")
        if not self.is_mixed:
            return
        epochs = self.epochs(tokens_of(steps, cfg))
        for source, weight, passes in zip(self.sources, self.weights, epochs):
            if passes > MOST_EPOCHS:
                lower = "its weight" if weight else "--curriculum_steps"
                raise BadInput(f"{source.name} runs dry: the run would pass over its "
                               f"{source.shards.tokens['train']:,} tokens {passes:,.0f} times, "
                               f"more than {MOST_EPOCHS}; lower {lower}, train for less, "
                               "or give it more text")

    def describe(self, cfg: Any, plan: Any) -> list[str]:
        """Lines for the start of a run. plan: its lib.plan.RunPlan."""
        lines = []
        for source in self.sources:
            shards = source.shards
            rows = min(cfg.val_tokens, shards.tokens["val"] - 1) // plan.block_size
            count = f"{len(shards.train)} shards"
            if not shards.is_finished:
                count += " so far"
                if shards.epoch_tokens:
                    count += f" of about {shards.epoch_tokens:,}"
            lines.append(f"data    {shards.folder}: {shards.tokens['train']:,} train tokens in "
                         f"{count}, validation on {rows * plan.block_size:,} tokens")
        if not self.is_mixed:
            return lines
        for i, share in enumerate(self.weights):
            lines[i] += f"; {share:.1%} of the mixture"
        if not cfg.minutes:
            for i, epochs in enumerate(self.epochs(tokens_of(plan.steps, cfg))):
                lines[i] += f", {epochs:.2f} epochs"
        if cfg.curriculum:
            lines[-1] += (f"; the curriculum of the first {cfg.curriculum_steps:,} steps, "
                          f"{cfg.curriculum_mix}")
        return lines

    def tags(self, prefix: str, values: Iterable) -> dict[str, Any]:
        """{f"{prefix}_{name}": value} for the sources of a mixture; empty for a single source."""
        if not self.is_mixed:
            return {}
        names = [f"{prefix}_{source.name}" for source in self.sources]
        return dict(zip(names, values, strict=True))


def split_weight(word: str) -> tuple[str, float | None]:
    """DIR[:WEIGHT] -> (folder, weight or None). A number after the last colon is a weight. Raises
    BadInput for one out of bounds."""
    folder, colon, number = word.rpartition(":")
    if not colon or os.path.lexists(word):
        return word, None
    try:
        weight = float(number)
    except ValueError:
        if not os.path.isdir(folder):
            return word, None  # C:\data, for example
        weight = math.nan
    if not 0 <= weight <= MOST_WEIGHT:
        raise BadInput(f"--data {word}: a weight is a number from 0 to {MOST_WEIGHT:,}")
    return folder, weight


def check_distinct(data: list[str], curriculum: list[str]) -> None:
    """Raises BadInput if a folder is named twice."""
    resolved = [os.path.realpath(folder) for folder in data]
    others = [os.path.realpath(folder) for folder in curriculum]
    for folder, path in zip(data, resolved):
        if path in others:
            raise BadInput(f"{folder} is named by both --data and --curriculum: "
                           "name another folder for one of them")
        if resolved.count(path) > 1:
            raise BadInput(f"{folder} is named twice by --data: name it once, "
                           "with the sum of the weights")


def short_names(folders: list[str]) -> list[str]:
    """The last part of each path; the whole path if that is ambiguous or TAKEN."""
    resolved = [os.path.realpath(folder) for folder in folders]
    counts = Counter([*TAKEN, *(Path(path).name for path in resolved)])
    names = []
    for path in resolved:
        name = Path(path).name
        if counts[name] > 1:
            name = path.strip(os.sep).replace(os.sep, "_")
        names.append(name)
    return names


def normalize(weights: list[float | None], sizes: list[int]) -> np.ndarray:
    """Weights of --data -> float64 that sum to 1; `sizes` where none is given. Raises BadInput."""
    given = [weight for weight in weights if weight is not None]
    if given and len(given) < len(weights):
        raise BadInput("some of --data have a weight and some have none: "
                       "give every one a weight, or none")
    shares = np.array(given or sizes, dtype=np.float64)
    if not shares.sum():
        raise BadInput("the weights of --data add up to 0: give at least one above 0")
    return shares / shares.sum()
