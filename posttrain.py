"""Post-train a checkpoint on your own data: instructions, conversations, or more text.

    python posttrain.py --checkpoint log/<run> --data instructions.jsonl
    # a tenth of the rows is pretraining text
    python posttrain.py --checkpoint log/<run> --data chats.parquet more/ --replay 0.1
    python posttrain.py --model gpt2 --data chats.jsonl                    # OpenAI's weights
    python posttrain.py --checkpoint log/<run> --data book.txt --epochs 1  # continued pretraining
    torchrun --standalone --nproc_per_node=8 posttrain.py --checkpoint log/<run> --data chats.json

The layout of a file (messages, ShareGPT, alpaca, dolly, prompt/completion, text) is detected from
its columns: lib/conversations.py. In conversations only the assistant's turns are learned. Several
are packed into a row without attending to each other, and the model can chat afterwards. A run
starts from the checkpoint's weights with a new optimizer; the checkpoint itself is not changed.

All output goes to log/<run>/, and interrupted runs resume, as in train_gpt2.py.
"""

import lib.startup  # noqa: F401 (before torch)

# isort: split

import contextlib
import hashlib
import math
from collections.abc import Callable, Sized
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from lib import checkpoint, conversations, packing, repeat, streams, summary
from lib.budget import only_length
from lib.chat_template import JINJA, render
from lib.cli import BadInput, flag, launched, path_flag, read_flags, resolve, run
from lib.corpus import Corpus, split_weight
from lib.decoding import SampleConfig, continuations
from lib.devices import Processes
from lib.plan import EVALUATIONS, RunPlan, Settings
from lib.resume import Resume, find_resume
from lib.run_folder import RunFolder
from lib.shards import find_shards, read_validation
from lib.tokenizers import END, RESERVED, Tokenizer, load_tokenizer
from train_gpt2 import (
    GPT,
    LEARNING_RATE,
    OPTIMIZERS,
    SCHEDULES,
    GPTConfig,
    Pretraining,
    TrainConfig,
    adopt,
    fit_vocabulary,
    launch,
    load_checkpoint,
    mean_loss,
    token_stream,
    validation,
)

RATES = ("max_lr", "embedding_lr", "bigram_lr", "head_lr", "vector_lr")
BATCH = 16_384  # most tokens per step, without --total_batch_size
# GPT-3's peak learning rates at these sizes (Brown et al. 2020, table 2.1): GPT-2's are not
# published
GPT3_RATES = {"gpt2": 6e-4, "gpt2-medium": 3e-4, "gpt2-large": 2.5e-4, "gpt2-xl": 2e-4}
# without --total_batch_size, an epoch has at least this many steps; shorter runs print a warning
ENOUGH = 10
SHOWN_LINES = 5  # lines about the data in an error message


@dataclass(frozen=True)
class Config(TrainConfig, checkpoint.ModelConfig):
    """The flags of train_gpt2.py, some with other defaults, then this script's own."""
    # data
    data: tuple[str, ...] | None = path_flag(
        None, ".json, .jsonl, .parquet and .txt files, or folders of them or of token shards")
    val_tokens: int = flag(
        1_048_576, "validation tokens per folder of token shards, from the start of its val split; "
                   "unset: no more than in pretraining", above=0)
    # length and batch: small steps, for little data
    epochs: float = flag(3.0, "passes over the training data", above=0)
    total_batch_size: int | None = flag(
        None, "tokens per optimizer step, padding included, over all processes and accumulation; "
              f"unset: {BATCH:,}, or with little data fewer, for {ENOUGH} to {2 * ENOUGH} steps "
              "per epoch", above=0, at_most=2**28)
    # optimizer: a lower learning rate than in pretraining, without warm-up, decaying to 0
    optimizer: str | None = flag(
        None, "as in train_gpt2.py; unset: the checkpoint's", choices=lambda: OPTIMIZERS)
    max_lr: float | None = flag(
        None, "peak learning rate; unset, this and the next four are --lr_scale times the "
              "checkpoint's", **LEARNING_RATE)
    embedding_lr: float | None = flag(
        None, "peak learning rate of embeddings", **LEARNING_RATE)
    bigram_lr: float | None = flag(
        None, "peak learning rate of a table of bigrams", **LEARNING_RATE)
    head_lr: float | None = flag(None, "peak learning rate of an untied head", **LEARNING_RATE)
    vector_lr: float | None = flag(
        None, "peak learning rate of norms, biases and scalars", **LEARNING_RATE)
    warmup_steps: int | None = flag(0, "steps of linear warm-up", at_least=0)
    schedule: str = flag(
        "linear", "learning rate after the warm-up", choices=lambda: SCHEDULES)
    min_lr_frac: float = flag(
        0.0, "final learning rate as a fraction of the peak", at_least=0, at_most=1)
    momentum: float | None = flag(
        None, "Muon's momentum; unset: the checkpoint's", at_least=0, below=1)
    weight_decay: float = flag(
        0.0, "on matrices; with AdamW also on embeddings and head", at_least=0, at_most=1e6)
    # what happens along the way
    eval_every: int | None = flag(
        None, f"steps between validations, 0: never; unset: {EVALUATIONS} per run", at_least=0)
    hellaswag_every: int = flag(0, "steps between HellaSwag evaluations", at_least=0)
    sample_every: int | None = flag(
        None, "steps between printed samples, 0: never; unset: as --eval_every", at_least=0)
    sample_prompt: str | None = flag(
        None, "prompt of the samples: a user message, or text to continue; unset: a held-out "
              "question")
    keep_best: bool = flag(
        True, "also save and keep the checkpoint with the lowest validation loss on the new data")
    patience: int | None = flag(
        None, "stop once N validations in a row have not lowered the validation loss", above=0)
    # the run
    seed: int = flag(
        1337, "seed of the validation split, shuffling and dropout", at_least=0, below=2**63)
    # post-training only
    val_share: float = flag(
        0.05, "share of the rows held out for validation, at least one, by --seed; 0: none",
        at_least=0, below=1)
    val_data: tuple[str, ...] | None = path_flag(
        None, "files of validation data, instead of --val_share")
    strict: bool = flag(
        False, "stop at the first row that is malformed or too long, instead of skipping or "
               "cutting it")
    replay: float = flag(
        0.0, "share of pretraining text among the rows, against forgetting",
        at_least=0, below=1)
    replay_data: tuple[str, ...] | None = path_flag(
        None, "folders of token shards, DIR[:WEIGHT], for --replay and to measure forgetting; "
              "unset: the data that the checkpoint was trained on")
    lr_scale: float | None = flag(
        None, "factor on the checkpoint's peak learning rates; unset: 0.1 after pretraining, 1 "
              "after post-training", above=0, at_most=1e3)
    dropout: float | None = flag(
        None, "as in train_gpt2.py; unset: the checkpoint's", at_least=0, below=1)
    # settings of pretraining only, not flags here
    preset: str = flag("posttrain", None)
    init_from: str | None = flag(None, None)
    size: str | None = flag(None, None)
    depth: int | None = flag(None, None)
    curriculum: str | None = flag(None, None)
    curriculum_steps: int | None = flag(None, None)
    curriculum_mix: str = flag("cosine", None)
    follow: bool = flag(False, None)
    shuffle: bool = flag(True, None)
    minutes: float | None = flag(None, None)
    tokens_per_param: float | None = flag(None, None)
    dollars: float | None = flag(None, None)
    batch_warmup: int = flag(0, None)
    context_warmup: float = flag(0.0, None)
    plan: bool = flag(False, None)
    doctor: bool = flag(False, None)
    tok_per_sec: float | None = flag(None, None)


# --------------------------------------------------------------------------------------------------
# Data


class Data:
    """--data and --val_data as rows, a CorpusLike.

    chat: whether there are conversations to learn from; then rows are packed. question: a
    conversation to prompt samples with, or None. source, val: a lib.packing.RowSource each, val
    None if nothing is held out. lines: a description to print.
    """

    vocab_size = None

    def __init__(self, cfg: Config, tokenizer: Tokenizer, block_size: int):
        self.tokenizer = tokenizer
        self.block_size = block_size
        self.strict = cfg.strict
        train, self.lines = self._read(cfg.data)
        val, lines = self._read(cfg.val_data or ())
        self.lines += [f"validation on {line}" for line in lines]
        try:
            self._prepare(cfg, train, val)
        except BadInput as error:  # the lines, such as on malformed rows, may explain it
            found = "; ".join(self.lines[:SHOWN_LINES])
            if len(self.lines) > SHOWN_LINES:
                found += "; ..."
            raise BadInput(f"{error} ({found})") from error
        own_tokens = len(self.source) * block_size
        self.tokens = {"train": int(own_tokens / (1 - cfg.replay))}  # with the rows of --replay
        self.identity = self.former_identity = self._hash(self.source)

    def _read(self, words):
        """Files and folders -> (examples, lines about them)."""
        examples = []
        paths, lines = conversations.find_paths(words)
        for path in paths:
            try:
                more, line = conversations.read(path, self.strict)
            except BadInput as error:
                if path in words:
                    raise
                raise BadInput(f"{error}, or move it out of the folder") from error
            examples += more
            lines.append(line)
        return examples, lines

    def _prepare(self, cfg, train, val):
        """Set question, chat, source and val. Raises BadInput if no examples remain."""
        if not cfg.val_data:
            train, val = conversations.hold_out(train, cfg.val_share, cfg.seed)
        chats = [example for example in val + train if not isinstance(example, str)]
        self.question = chats[0] if chats else None
        self.chat = not all(isinstance(example, str) for example in train)
        if self.question and not self.chat:
            raise BadInput("there are conversations to validate on, but none to train on: give "
                           "--data with conversations, or other --val_data")
        self.source = self._rows(train, cfg.seed, "training")
        self.val = self._rows(val, None, "validation") if val else None
        check_learnable(self.source, "--data")
        check_learnable(self.val, "--val_data" if cfg.val_data else "the held-out rows")

    def _rows(self, examples, seed, what):
        """Examples -> a RowSource for training or validation, with a line about it."""
        if not self.chat:
            documents = [self._ids(text) for text in examples]
            return packing.Joined(documents, self.block_size, seed, self.tokenizer.eot)
        items = []
        counts = {"whole": 0, "cut": 0, "truncated": 0, "dropped": 0}
        for example in examples:
            if isinstance(example, str):
                items += self._pieces(example)
                continue
            ids, learned, how = conversations.truncate(example, self.tokenizer,
                                                       self.block_size + 1)
            if self.strict and how != "whole":
                raise BadInput(f"a conversation is longer than the context of {self.block_size} "
                               f"tokens, {example[0]['content'][:60]!r}...: shorten it, or leave "
                               "out --strict")
            counts[how] += 1
            if ids:
                items.append((ids, learned))
        rows = packing.Packing(items, self.block_size, seed, self.tokenizer.eot)
        self.lines.append(self._line(what, items, rows, counts))
        return rows

    def _pieces(self, text):
        """A text among conversations -> items of at most one row each, with all tokens learned."""
        ids = self._ids(text)
        pieces = [ids[at:at + self.block_size + 1]
                  for at in range(0, len(ids) - 1, self.block_size)]
        return [(piece, [True] * len(piece)) for piece in pieces]

    def _line(self, what, items, rows, counts):
        n_ids = sum(len(ids) - 1 for ids, _ in items)
        n_learned = sum(int(np.sum(learned[1:])) for _, learned in items)
        filled = n_ids / max(len(rows) * self.block_size, 1)
        line = (f"{what}: {len(items):,} in {len(rows):,} rows of {self.block_size}, filled to "
                f"{filled:.0%}; of {n_ids:,} tokens {n_learned:,} are learned")
        fates = {"cut": "cut after an answer", "truncated": "truncated on the right",
                 "dropped": "dropped, as no answer fits"}
        for how, fate in fates.items():
            if counts[how]:
                line += f"; {counts[how]:,} too long, {fate}"
        return line

    def _ids(self, text):
        return [self.tokenizer.eot, *self.tokenizer.encode(text).tolist()]

    @staticmethod
    def _hash(source):
        """A hash of the rows' content, to check that a resumed run has the same data."""
        digest = hashlib.sha256(str(source.block_size).encode())
        for item in getattr(source, "items", None) or source.documents:
            for part in item if isinstance(item, tuple) else (item,):
                digest.update(len(part).to_bytes(8, "big") + part.tobytes())
        return digest.hexdigest()

    def rows(self) -> tuple:
        """The validation rows for `mean_loss`."""
        parts = self.val.all()
        return parts if self.chat else parts[:2]

    def check_length(self, cfg: Config, steps: int) -> None:
        """Any number of epochs is allowed."""

    def most_repeated(self, tokens: float) -> tuple[float, str]:
        """(epochs in `tokens`, name of the data)."""
        return tokens / self.tokens["train"], "--data"

    def describe(self, cfg: Config, plan: RunPlan) -> list[str]:
        return as_data_lines([*self.lines, *few_steps(cfg, plan)])


class ShardData(Corpus):
    """--data as folders of token shards, made with the checkpoint's tokenizer and with a val split
    of their own."""

    chat = False

    def __init__(self, cfg: Any, tokenizer: Tokenizer, block_size: int):
        super().__init__(TrainConfig(data=cfg.data))
        self.check_tokenizer(tokenizer)
        self.source = token_rows(self, tokenizer, cfg.seed, block_size)
        self.tokens = {"train": int(self.tokens["train"] / (1 - cfg.replay))}
        self.replay = cfg.replay
        self.lines: list[str] = []

    def epochs(self, tokens: float) -> np.ndarray:
        return super().epochs(tokens * (1 - self.replay))

    def describe(self, cfg: Config, plan: RunPlan) -> list[str]:
        return super().describe(cfg, plan) + as_data_lines([*self.lines, *few_steps(cfg, plan)])


def check_learnable(rows: Sized | None, name: str) -> None:
    """Raises BadInput if a RowSource, or None, is empty."""
    if rows is not None and not len(rows):
        raise BadInput(f"nothing in {name} can be learned, it is empty or too long: check its "
                       "content, or give more")


def as_data_lines(lines: list[str]) -> list[str]:
    """Lines about the data as a run prints them."""
    return [f"data    {line}" for line in lines]


def few_steps(cfg: Config, plan: RunPlan) -> list[str]:
    """A warning if a run is very short, unless --max_steps asks for that; else none."""
    if plan.steps >= ENOUGH or cfg.max_steps is not None:
        return []
    remedy = "give more data, or raise --epochs"
    if plan.rows > 1:
        remedy += ", or lower --total_batch_size"
    return [f"warning: a run of {plan.steps} steps teaches little: {remedy}"]


def token_rows(corpus: Corpus, tokenizer: Tokenizer, seed: int,
               block_size: int) -> streams.TokenRows:
    """The training tokens of a Corpus as a source of rows."""
    stream = token_stream(corpus, tokenizer, seed, block_size)
    return streams.TokenRows(stream, block_size, block_size + corpus.is_mixed)


def read_data(cfg: Config, explicit: set[str], tokenizer: Tokenizer,
              block_size: int) -> Data | ShardData:
    """--data -> Data or ShardData.

    Raises BadInput for data that cannot be read, is empty or mixes files and shards, and for flags
    that do not fit.
    """
    words = cfg.data or ()
    shards = [word for word in words if is_shard_folder(word)]
    if not shards:
        return Data(cfg, tokenizer, block_size)
    others = [word for word in words if word not in shards]
    if others:
        conversations.find_paths(others)  # a missing file raises an error of its own
        raise BadInput(f"{shards[0]} is a folder of token shards and cannot be mixed with files "
                       f"such as {others[0]}: give only one kind")
    unused = sorted({"val_data", "val_share", "strict"} & explicit)
    if cfg.val_data and not unused:
        unused = ["val_data"]
    if unused:
        raise BadInput(f"--{unused[0]} is for files, and {shards[0]} is a folder of token shards "
                       "with a val split of its own: leave it out")
    return ShardData(cfg, tokenizer, block_size)


def is_shard_folder(word: str) -> bool:
    folder, _ = split_weight(word)
    shards, *_ = find_shards(folder)
    return any(shards.values())


def find_pretraining(cfg: Config, explicit: set[str], tokenizer: Tokenizer,
                     block_size: int) -> tuple[Corpus | None, bool, str]:
    """-> (the Corpus of pretraining, None if missing; whether forgetting can be measured; a line
    about both).

    Raises BadInput if data that --replay or --replay_data needs is missing. Replay itself needs no
    val split.
    """
    try:
        if not cfg.replay_data:
            raise BadInput("the checkpoint does not record its training data: name it with "
                           "--replay_data")
        corpus = Corpus(TrainConfig(data=cfg.replay_data), needed=("train",))
        corpus.check_tokenizer(tokenizer)
    except BadInput as error:
        problem = str(error).replace("--data", "--replay_data")
        if cfg.replay or "replay_data" in explicit:
            raise BadInput(f"pretraining data: {problem}") from error
        return None, False, f"not measuring forgetting: {problem}"
    folders = ", ".join(map(str, cfg.replay_data))
    share = f"{cfg.replay:.1%} of the rows"
    try:
        for source in corpus.sources:
            read_validation(source.shards, cfg.val_tokens, block_size, tokenizer)
    except BadInput as error:
        problem = str(error).replace("--data", "--replay_data")
        if not cfg.replay and "replay_data" in explicit:
            raise BadInput(f"pretraining data: {problem}") from error
        line = f"not measuring forgetting: {problem}"
        if cfg.replay:
            line = f"pretraining text for {share}: {folders}; {line}"
        return corpus, False, line
    uses = f"{share}, and validation" if cfg.replay else "validation"
    return corpus, True, f"pretraining text for {uses}: {folders}"


# --------------------------------------------------------------------------------------------------
# Weights


@torch.no_grad()
def grow(model: GPT, tokenizer: Tokenizer) -> tuple[int, dict]:
    """A GPT -> vocab_size and weights with logits for the ids of chat, too.

    The new ids follow the ids of text. Pretraining pushed their rows of the embedding and the head
    away, so these start as the mean of the rows of text, and so do new padding rows. The end of a
    turn starts as the end of a text, which the model knows: from the mean, a few steps at low
    learning rates would not make it likely, and replies would not end.
    """
    config = replace(model.config, vocab_size=tokenizer.vocab_size + len(RESERVED))
    state = model.state_dict()
    if model.config.vocab_size >= config.vocab_size:  # already post-trained
        return config.vocab_size, state
    for name in ("transformer.wte.weight", "lm_head.weight"):
        before = state[name]
        text = before[:tokenizer.vocab_size]
        rows = text.mean(dim=0).repeat(config.padded_vocab_size, 1)
        rows[:tokenizer.vocab_size] = text
        rows[tokenizer.reserved[END]] = text[tokenizer.eot]
        rows[config.vocab_size:len(before)] = before[config.vocab_size:]
        state[name] = rows
    return config.vocab_size, state


# --------------------------------------------------------------------------------------------------
# The run


class Patience:
    """Stops a run after `limit` validations in a row without a lower loss.

    It has the interface of train_gpt2.py's Evaluation and follows the validation, which sets
    `loss`. That loss is the same on every process, and so is the decision.
    """

    name = "patience"

    def __init__(self, limit: int, every: int):
        self.limit = limit
        self.every = every
        self.loss = math.inf
        self.best = math.inf
        self.best_step = 0
        self.failures = 0  # validations since the best one
        self.stopped_at: int | None = None  # step

    def resume(self, best: list, step: int) -> None:
        """Continue at `step`. best: [validation loss, step] so far."""
        self.best, self.best_step = best
        # those before `step`: a validation that is due at `step` runs again
        self.failures = max((step - 1) // self.every - self.best_step // self.every, 0)

    def mode(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def is_due(self, step: int, last: bool) -> bool:
        self.step = step
        return not last and step > 0 and step % self.every == 0

    def run(self, model: Any, micro_batch: int, stopped: Callable[..., bool]) -> dict[str, Any]:
        """Request a stop if the validation of this step was one too many."""
        if self.loss < self.best:
            self.best = self.loss
            self.best_step = self.step
        if self.step == self.best_step:  # also if a resumed run measures it again
            self.failures = 0
        else:
            self.failures += 1
        if self.failures >= self.limit:
            self.stopped_at = self.step
            stopped(requests=1)
        return {}


class PostTraining(Pretraining):
    """The task of this script.

    pretraining: the Corpus of pretraining, or None. forgetting: whether its validation loss is
    measured. resume: the Resume of an interrupted run, or None. patience: a Patience, or None.
    """

    has_learned = True
    pretraining: Any
    resume: Any = None
    patience: Any = None

    def __init__(self, cfg: Config, explicit: set[str], tokenizer: Tokenizer, block_size: int):
        """Read the data. Raises BadInput."""
        self.explicit = explicit
        self.tokenizer = tokenizer
        self.corpus = read_data(cfg, explicit, tokenizer, block_size)
        self.pretraining, self.forgetting, line = find_pretraining(cfg, explicit, tokenizer,
                                                                   block_size)
        self.corpus.lines.append(line)
        if cfg.replay:
            self.corpus.identity += self.pretraining.identity
            self.corpus.former_identity += self.pretraining.former_identity

    def begin_with(self, model: Any, model_cfg: GPTConfig) -> GPTConfig:
        """Take the model's weights as initial weights -> model_cfg with its vocabulary."""
        fit_vocabulary(model, model_cfg.vocab_size)
        model_cfg = replace(model_cfg, vocab_multiple=model.config.vocab_multiple)
        if not self.corpus.chat:
            self.weights = [model.state_dict()]
            return model_cfg
        vocab_size, weights = grow(model, self.tokenizer)
        self.weights = [weights]
        return replace(model_cfg, vocab_size=vocab_size)

    def continue_with(self, model_cfg: GPTConfig) -> None:
        """Raises BadInput if a resumed model has no ids for the data."""
        needed = self.tokenizer.vocab_size + len(RESERVED)
        if self.corpus.chat and model_cfg.vocab_size < needed:
            raise BadInput("the resumed run was trained on plain text and has no ids for "
                           "conversations: start another --run_name")

    def vocabulary(self, model_cfg: GPTConfig) -> tuple[Tokenizer, GPTConfig]:
        return self.tokenizer, model_cfg

    def evaluations(self, cfg: Any, plan: RunPlan, tokenizer: Tokenizer,
                    processes: Processes) -> list:
        self.last_step = plan.steps
        found = super().evaluations(cfg, plan, tokenizer, processes)
        if cfg.patience:
            self.patience = Patience(cfg.patience, plan.eval_every)
            best = self.resume.best() if self.resume else None
            if best:
                self.patience.resume(best, self.resume.state["step"])
            found.append(self.patience)
        return found

    def validation(self, cfg: Any, plan: RunPlan, tokenizer: Tokenizer,
                   processes: Processes) -> Callable:
        runs = []
        if isinstance(self.corpus, Corpus):
            runs.append(validation(cfg, plan, self.corpus, tokenizer, processes))
        elif self.corpus.val:
            runs.append(self._own_validation(processes))
        if self.forgetting:
            runs.append(validation(cfg, plan, self.pretraining, tokenizer, processes,
                                   "Loss/val_pretraining"))

        def run(model, micro_batch, stopped):
            results = {}
            for measure in runs:
                results.update(measure(model, micro_batch, stopped))
            if self.patience:
                self.patience.loss = results["Loss/val"]
            return results

        return run

    def _own_validation(self, processes):
        rows = self.corpus.rows()

        def run(model, micro_batch, stopped):
            return {"Loss/val": mean_loss(model, rows, micro_batch, processes, stopped)}

        return run

    def samples(self, cfg: Any, tokenizer: Tokenizer) -> Callable:
        if not self.corpus.chat:
            return super().samples(cfg, tokenizer)
        question = first_turn(self.corpus.question)
        if cfg.sample_prompt:
            question = [{"role": "user", "content": cfg.sample_prompt}]
        ids, _ = render(question, tokenizer, reply=True)
        sampling = SampleConfig(max_new_tokens=64, samples=2)

        def run(model, micro_batch, stopped):
            texts = continuations(model, tokenizer, [ids] * sampling.samples, sampling)
            return {"samples": [f"{question[-1]['content']} -> {text}" for text in texts]}

        return run

    def stream(self, cfg: Any, plan: Any, tokenizer: Tokenizer,
               processes: Processes) -> streams.StreamLike:
        replay = None
        if cfg.replay:
            replay = token_rows(self.pretraining, tokenizer, cfg.seed, plan.block_size)
        batches = partial(streams.row_micro_batches, micro_batch=plan.micro_batch,
                          processes=processes,
                          packed=self.corpus.chat)
        return streams.Rows(self.corpus.source, replay, cfg.replay, batches)

    def packed(self, idx: torch.Tensor) -> tuple:
        return (packing.Packed(torch.zeros_like(idx)),) if self.corpus.chat else ()

    def conclude(self, run: RunFolder) -> None:
        if self.patience and self.patience.stopped_at is not None:
            self.last_step = self.patience.stopped_at
            self._say_patience(run)
        self._say_forgotten(run)

    def _say_patience(self, run: RunFolder) -> None:
        """Print why the run stopped before its last step, and how to try its best checkpoint."""
        if not run.recorded("val"):  # off rank 0
            return
        patience = self.patience
        run.outcome = "finished"
        run.say(f"patience: the last {patience.failures} validations were not below "
                f"{patience.best:.4f} of step {patience.best_step}; a higher --patience continues "
                "the run")
        if run.best:
            path = checkpoint.path_of(run.folder, run.best[1])
            prompt = run.config["train"]["sample_prompt"]
            run.say(summary.what_next(path, self.corpus.chat, prompt))

    def _say_forgotten(self, run: RunFolder) -> None:
        """Print how much was forgotten, if that was measured at the start and the end."""
        losses = run.recorded("val_pretraining") or {}
        if len(losses) < 2 or self.last_step not in losses:  # the data may have been removed
            return
        start = losses[min(losses)]
        end = losses[self.last_step]
        line = (f"forgetting: pretraining validation loss {start:.4f} -> {end:.4f} "
                f"({end - start:+.4f} nats per token)")
        best = run.best[1] if run.best else self.last_step
        if best != self.last_step and best in losses:
            line += f", {losses[best]:.4f} at the best checkpoint"
        run.say(line)


def first_turn(conversation: list[dict]) -> list[dict]:
    """A conversation up to the user's first message."""
    has_system = conversation[0]["role"] == "system"
    return conversation[:1 + has_system]


def pick_batch(tokens: int, row: int) -> int:
    """The default of --total_batch_size for an epoch of `tokens`.

    row: tokens of one row per process, or of one micro-batch if --micro_batch is given. The result
    is a power of two times `row`, so that micro-batches divide it: at most BATCH tokens, and few
    enough for ENOUGH to twice ENOUGH steps per epoch, but at least one `row`.
    """
    rows = max(min(BATCH, tokens // ENOUGH) // row, 1)
    return row << rows.bit_length() - 1


def inherited(cfg: Config, before: dict, explicit: set[str]) -> dict:
    """The settings that a new run inherits from its checkpoint, as a dict.

    before: the checkpoint's train_config, or {}. Raises BadInput if it has no learning rate.
    """
    was_posttrained = "checkpoint" in before
    optimizer = before.get("optimizer", "adamw")
    settings = {"optimizer": cfg.optimizer or optimizer}
    if settings["optimizer"] != optimizer and cfg.max_lr is None:
        raise BadInput(f"--optimizer {cfg.optimizer} is not the checkpoint's, whose learning rates "
                       "do not fit: give --max_lr, too")
    if settings["optimizer"] == optimizer:
        scale = cfg.lr_scale or (1.0 if was_posttrained else 0.1)
        settings["lr_scale"] = scale
        for name in RATES:
            if getattr(cfg, name) is None and isinstance(before.get(name), float):
                settings[name] = before[name] * scale
    if cfg.max_lr is None and "max_lr" not in settings:
        raise BadInput("the checkpoint does not record its learning rate: give --max_lr")
    if cfg.momentum is None:
        settings["momentum"] = before.get("momentum", TrainConfig.momentum)
    if "val_tokens" not in explicit:  # pretraining's number suits the machine
        settings["val_tokens"] = min(cfg.val_tokens, before.get("val_tokens", cfg.val_tokens))
    folders = cfg.replay_data or before.get("replay_data" if was_posttrained else "data") or ()
    settings["replay_data"] = (folders,) if isinstance(folders, str) else tuple(folders)
    return settings


def resumed_model(resume: Resume) -> GPTConfig:
    """The GPTConfig of a Resume. Raises BadInput unless posttrain.py wrote it."""
    before = resume.state.get("train_config")
    config = resume.state.get("model_config")
    if not isinstance(before, dict) or not isinstance(config, dict) or "checkpoint" not in before:
        raise BadInput(f"{resume.path} is not a checkpoint of a post-training run: to start from "
                       "it, name it with --checkpoint and give another --run_name")
    try:
        return GPTConfig(**config)
    except TypeError as error:
        raise BadInput(f"{resume.path} was written by another version of this project ({error}): "
                       "name another") from error


def load_start(cfg: Config, explicit: set[str]) -> tuple[Config, GPT, dict]:
    """Load the checkpoint that a new run starts from -> (cfg with settings inherited from it, its
    GPT, its state)."""
    start = checkpoint.pick(checkpoint.named(cfg))
    if cfg.data is None:
        raise BadInput("there is nothing to train on: give --data")
    model, tokenizer, state = load_checkpoint(start)
    tokenizer.require_text("post-training")
    checkpoint.check_finite(model.state_dict(), start)
    before = state.get("train_config")
    if before is None and cfg.model:
        before = {"max_lr": GPT3_RATES[cfg.model]}
    if not isinstance(before, dict):
        before = {}
    if cfg.checkpoint:
        cfg = replace(cfg, checkpoint=start)
    return resolve(cfg, inherited(cfg, before, explicit)), model, state


def prepare(argv: list[str]) -> tuple[Settings, PostTraining]:
    """Parse the command line -> (Settings, PostTraining). Later sources win: defaults, the
    checkpoint that the run starts from, --config, the run's own checkpoint, flags; then defaults
    that depend on the data.

    Keeps no other reference to the checkpoint, so that its memory is free during the run.
    """
    flags = read_flags((Config,), argv, __doc__)
    explicit = set(flags)
    cfg = resolve(Config(), repeat.read_settings(flags, Config), superseded(explicit), flags)
    resume, folder = find_resume(cfg, explicit)
    cfg = resolve(cfg, folder)
    if resume:
        state = resume.state
        model = None
        model_cfg = resumed_model(resume)
    else:
        cfg, model, state = load_start(cfg, explicit)
        model_cfg = model.config
    if cfg.dropout is not None:  # from here on the model's setting
        model_cfg = replace(model_cfg, dropout=cfg.dropout)
        cfg = replace(cfg, dropout=None)
    if resume:
        cfg, model_cfg = adopt(resume, cfg, model_cfg, explicit)
    cfg = resolve(cfg, only_length(explicit))

    task = PostTraining(cfg, explicit, load_tokenizer(state["tokenizer"]), model_cfg.block_size)
    if resume:
        task.continue_with(model_cfg)
        task.resume = resume
    else:
        model_cfg = task.begin_with(model, model_cfg)
    template = JINJA if task.corpus.chat else state.get("chat_template")
    if template:
        task.extra = {"chat_template": template}
    check_patience(cfg, task.corpus)
    if cfg.total_batch_size is None:  # in a new run; a resumed one keeps its own
        cfg = replace(cfg, total_batch_size=batch_for(task.corpus, cfg, model_cfg.block_size))
    if cfg.sample_prompt is None and not task.corpus.chat:
        cfg = replace(cfg, sample_prompt=TrainConfig.sample_prompt)
    return Settings(cfg, model_cfg, explicit, resume), task


def check_patience(cfg: Config, corpus: Any) -> None:
    """Raises BadInput if --patience has no validations to watch, or no best checkpoint to keep."""
    if not cfg.patience:
        return
    if cfg.eval_every == 0:
        raise BadInput("--patience needs validations: give --eval_every above 0")
    if not isinstance(corpus, Corpus) and not corpus.val:
        raise BadInput("--patience needs validation data: give --val_share above 0, or --val_data")
    if not cfg.keep_best:
        raise BadInput("--patience keeps the best checkpoint: leave --no-keep_best out")


def superseded(explicit: set[str]) -> dict:
    """The settings of --config that explicit flags of other names replace, as unset."""
    names: tuple[str, ...] = ()
    if explicit & {"checkpoint", "model"}:
        names += ("checkpoint", "model")
    if explicit & {"optimizer", "lr_scale"}:
        names += ("lr_scale", *RATES)
    return dict.fromkeys(names)


def batch_for(corpus: streams.CorpusLike, cfg: Config, block_size: int) -> int:
    """The default of --total_batch_size for this data, over all processes."""
    processes = launched()
    row = block_size * (processes["world_size"] if processes else 1)
    if cfg.micro_batch != "auto":
        row *= cfg.micro_batch
    return pick_batch(corpus.tokens["train"], row)


def main(argv: list[str]) -> None:
    settings, task = prepare(argv)
    repeat.note_differences(settings, task.corpus)
    launch(settings, task)


if __name__ == "__main__":
    run(main)
