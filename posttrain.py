"""Post-train a checkpoint on your own data: instructions, conversations, or more text.

    python posttrain.py --checkpoint log/<run> --data instructions.jsonl
    python posttrain.py --checkpoint PATH --data chats.parquet more/ --replay 0.1      # a tenth of the rows is pretraining text
    python posttrain.py --model gpt2 --data chats.jsonl                                # OpenAI's weights
    python posttrain.py --checkpoint PATH --data book.txt --epochs 1                   # continued pretraining
    torchrun --standalone --nproc_per_node=8 posttrain.py --checkpoint PATH --data chats.json

The layout of a file (messages, ShareGPT, alpaca, dolly, prompt/completion, text) is told by its
columns: lib/conversations.py. Of conversations only what the assistant says is learned; they are
packed into rows without seeing each other, and the model can chat afterwards. A run begins with the
checkpoint's weights and an optimizer of its own; the checkpoint itself stays as it is.

Everything a run makes goes to log/<run>/, and an interrupted one goes on, as with train_gpt2.py.
"""

import lib.startup  # noqa: F401 (before torch)

# isort: split

import hashlib
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch

from lib import checkpoint, conversations, packing
from lib.chat_template import JINJA, render
from lib.cli import BadInput, check, flag, launched, parse, path_flag, run
from lib.decoding import SampleConfig, continuations
from lib.mixture import Corpus, split_weight
from lib.resume import find_resume
from lib.shards import find_shards, read_validation
from lib.tokenizers import END, RESERVED, load_tokenizer
from train_gpt2 import (
    GPTConfig,
    Pretraining,
    TrainConfig,
    adopt,
    evaluate,
    fit_vocabulary,
    launch,
    load_checkpoint,
    token_stream,
    validation,
)

RATES = ("max_lr", "embedding_lr", "head_lr", "vector_lr")
MOMENTS = 10  # validations in a run, without --eval_every
BATCH = 16_384  # tokens per step at most, without --total_batch_size
# GPT-3's peak learning rates at these sizes (Brown et al. 2020, table 2.1): GPT-2's are not
# published
GPT3_RATES = {"gpt2": 6e-4, "gpt2-medium": 3e-4, "gpt2-large": 2.5e-4, "gpt2-xl": 2e-4}
ENOUGH = 10  # steps: at least so many per epoch without --total_batch_size, and fewer in all are warned of
MOST_TOLD = 5  # lines about the data in an error


@dataclass
class Config(TrainConfig, checkpoint.ModelConfig):
    """Flags of train_gpt2.py, some with other defaults, and this script's own behind them."""
    # data
    data: tuple[str, ...] | None = path_flag(
        None, ".json, .jsonl, .parquet and .txt files, or folders of them or of token shards")
    val_tokens: int = flag(1_048_576, "validation tokens of token shards, from the start of each folder's val split; "
                           "if unset, no more than in pretraining", above=0)
    # length and batch: small steps, for there is little data
    epochs: float = flag(3.0, "passes over the training data", above=0)
    total_batch_size: int | None = flag(
        None, f"tokens per optimizer step, padding included, over all processes and accumulation; if unset, {BATCH:,}, or "
              f"with little data fewer, for {ENOUGH} to {2 * ENOUGH} steps per epoch", above=0, at_most=2**28)
    # optimizer: a lower rate than pretraining's, without a warm-up, down to 0
    optimizer: Literal["adamw", "muon"] | None = flag(None, "if unset, the checkpoint's")
    max_lr: float | None = flag(
        None, "peak learning rate; if unset, as the next three, --lr_scale times the checkpoint's",
        above=0, at_most=1e6)
    embedding_lr: float | None = flag(None, "peak learning rate of the embeddings", above=0,
                                      at_most=1e6)
    head_lr: float | None = flag(None, "peak learning rate of an untied head", above=0, at_most=1e6)
    vector_lr: float | None = flag(None, "peak learning rate of norms, biases and scalars", above=0,
                                   at_most=1e6)
    warmup_steps: int | None = flag(0, "steps of linear warm-up", at_least=0)
    schedule: Literal["cosine", "wsd",
                      "linear"] = flag("linear",
                                       "learning rate after the warm-up, see lr_multiplier")
    min_lr_frac: float = flag(0.0, "final learning rate as a fraction of the peak", at_least=0,
                              at_most=1)
    momentum: float | None = flag(None, "Muon's momentum; if unset, the checkpoint's", at_least=0,
                                  below=1)
    weight_decay: float = flag(
        0.0, "on matrices, with AdamW on embeddings and head, too; vectors are never decayed",
        at_least=0, at_most=1e6)
    # what happens along the way
    eval_every: int | None = flag(
        None, f"steps between validations, 0: never; if unset, {MOMENTS} times in all", at_least=0)
    hellaswag_every: int = flag(0, "steps between HellaSwag evaluations", at_least=0)
    sample_every: int | None = flag(
        None, "steps between printed samples, 0: never; if unset, as --eval_every", at_least=0)
    sample_prompt: str | None = flag(
        None, "what a user says, or a text begins with, in samples; if unset, a held-out question")
    keep_best: bool = flag(
        True, "save and keep the checkpoint of the lowest validation loss on the new data, too")
    # the run
    seed: int = flag(1337, "seed of what is held out, of shuffling and of dropout", at_least=0,
                     below=2**63)
    # its own
    val_share: float = flag(
        0.05, "share of the rows held out for validation, at least one, by --seed; 0: none",
        at_least=0, below=1)
    val_data: tuple[str, ...] | None = path_flag(
        None, "files of validation data, instead of --val_share")
    strict: bool = flag(
        False,
        "end at the first row that is malformed, or too long, instead of leaving it out, or cutting it"
    )
    replay: float = flag(0.0, "share of the rows that is pretraining text, against forgetting",
                         at_least=0, below=1)
    replay_data: tuple[str, ...] | None = path_flag(None, "folders of token shards, DIR[:WEIGHT], for --replay and to measure "
                                                    "what is forgotten; if unset, those the checkpoint was trained on")
    lr_scale: float | None = flag(None, "of the checkpoint's peak learning rates; if unset, 0.1 after pretraining, "
                                  "1 after post-training", above=0, at_most=1e3)
    dropout: float | None = flag(None, "if unset, the checkpoint's", at_least=0, below=1)
    # what only pretraining has, no flags here
    preset: Literal["posttrain"] = flag("posttrain", None)
    init_from: str | None = flag(None, None)
    size: str | None = flag(None, None)
    curriculum: str | None = flag(None, None)
    curriculum_steps: int | None = flag(None, None)
    curriculum_mix: str = flag("cosine", None)
    shuffle: bool = flag(True, None)
    minutes: float | None = flag(None, None)
    tokens_per_param: float | None = flag(None, None)
    batch_warmup: int = flag(0, None)
    plan: bool = flag(False, None)
    tok_per_sec: float | None = flag(None, None)


# ----------------------------------------------------------------------------------------------------------------------
# Data


class Data:
    """--data and --val_data as rows: what `launch` asks of a corpus, and what a stream and a
    validation are made from.

    chat: whether conversations are among those to learn from; then rows are packed. question: a
    conversation to ask for samples. source, val: a lib.packing.RowSource each, val None where
    nothing is held out. lines: what to say of them.
    """

    vocab_size, val = None, None

    def __init__(self, cfg, tokenizer, block_size):
        self.tokenizer, self.T, self.strict = tokenizer, block_size, cfg.strict
        train, self.lines = self._read(cfg.data)
        val, lines = self._read(cfg.val_data or ())
        self.lines += [f"validation on {line}" for line in lines]
        try:
            self._prepare(cfg, train, val)
        except BadInput as error:  # malformed rows are among what was found
            found = "; ".join(self.lines[:MOST_TOLD]) + "; ..." * (len(self.lines) > MOST_TOLD)
            raise BadInput(f"{error} ({found})") from error
        self.tokens = {"train": int(len(self.source) * block_size /
                                    (1 - cfg.replay))}  # with the rows of --replay among them
        self.identity = self.former_identity = self._hash(self.source)

    def _read(self, words):
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
        """Examples -> question, chat, source and val. Raises BadInput if nothing is left of them.
        """
        if not cfg.val_data:
            train, val = conversations.hold_out(train, cfg.val_share, cfg.seed)
        self.question = next((example for example in val + train if not isinstance(example, str)),
                             None)
        self.chat = not all(isinstance(example, str) for example in train)
        if self.question and not self.chat:
            raise BadInput("there are conversations to validate on and none to learn from: give --data with more of them, "
                           "or other --val_data")
        self.source = self._cut(train, cfg.seed, "training")
        self.val = self._cut(val, None, "validation") if val else None
        for rows, what in ((self.source, "--data"),
                           (self.val, "--val_data" if cfg.val_data else "what is held out")):
            if rows is not None and not len(rows):
                raise BadInput(
                    f"nothing of {what} can be learned, it is empty or too long: see what it holds, or give more"
                )

    def _cut(self, examples, seed, what):
        """Examples -> rows of training or validation."""
        if not self.chat:
            return packing.Joined([self._ids(text) for text in examples], self.T, seed,
                                  self.tokenizer.eot)
        items, counts = [], dict.fromkeys(("whole", "cut", "truncated", "dropped"), 0)
        for example in examples:
            if isinstance(example,
                          str):  # a text among conversations: pieces of a row each, all learned
                ids = self._ids(example)
                pieces = [ids[at:at + self.T + 1] for at in range(0, len(ids) - 1, self.T)]
                items += [(piece, [True] * len(piece)) for piece in pieces]
                continue
            ids, learned, how = conversations.truncate(example, self.tokenizer, self.T + 1)
            counts[how] += 1
            items += [(ids, learned)] if ids else []
            if self.strict and how != "whole":
                raise BadInput(f"a conversation is longer than the context of {self.T} tokens, "
                               f"{example[0]['content'][:60]!r}...: shorten it, or leave out --strict")
        rows = packing.Packing(items, self.T, seed, self.tokenizer.eot)
        ids, learned = sum(len(ids) - 1 for ids, _ in items), sum(
            int(np.sum(learned[1:])) for _, learned in items)
        filled = ids / max(len(rows) * self.T, 1)
        told = (f"{what}: {len(items):,} in {len(rows):,} rows of {self.T}, filled to {filled:.0%}; of {ids:,} tokens "
                f"{learned:,} are learned")
        odd = {
            "cut": "cut after an answer", "truncated": "truncated on the right",
            "dropped": "left out, as no answer fits"
        }
        told += "".join(f"; {counts[how]:,} too long, {words}" for how, words in odd.items()
                        if counts[how])
        self.lines.append(told)
        return rows

    def _ids(self, text):
        return [self.tokenizer.eot, *self.tokenizer.encode(text).tolist()]

    @staticmethod
    def _hash(source):
        told = hashlib.sha256(str(source.block_size).encode())
        for item in getattr(source, "items", None) or source.documents:
            for part in item if isinstance(item, tuple) else (item,):
                told.update(len(part).to_bytes(8, "big") + part.tobytes())
        return told.hexdigest()

    def rows(self):
        """The validation rows as `evaluate` takes them."""
        return self.val.all()[:3 if self.chat else 2]

    def check_length(self, cfg):
        """A run may pass over it as often as it is told to."""

    def most_repeated(self, tokens):
        """Passes over it in a run of so many tokens, and what it is called."""
        return tokens / self.tokens["train"], "--data"

    def describe(self, cfg, block_size):
        return described(self.lines)


class ShardData(Corpus):
    """--data that is folders of token shards, of the checkpoint's tokenizer, with a val split of
    their own."""

    chat = False

    def __init__(self, cfg, tokenizer, block_size):
        super().__init__(TrainConfig(data=cfg.data))
        self.check_tokenizer(tokenizer)
        self.source = token_rows(self, tokenizer, cfg.seed, block_size)
        self.tokens, self.replay = {"train": int(self.tokens["train"] /
                                                 (1 - cfg.replay))}, cfg.replay
        self.lines = []

    def epochs(self, tokens):
        return super().epochs(tokens * (1 - self.replay))

    def describe(self, cfg, block_size):
        return super().describe(cfg, block_size) + described(self.lines)


def described(lines):
    """What is said of data at the start of a run."""
    return [f"data    {line}" for line in lines]


def token_rows(corpus, tokenizer, seed, block_size):
    """The training tokens of a Corpus as a source of rows."""
    return packing.Tokens(token_stream(corpus, tokenizer, seed, block_size), block_size,
                          block_size + corpus.is_mixed)


def read_data(cfg, explicit, tokenizer, block_size):
    """--data -> Data or ShardData. Raises BadInput for what cannot be read, holds nothing or is a
    mixture of both, and for flags that do not fit."""
    shards = [word for word in cfg.data if any(find_shards(split_weight(word)[0])[0].values())]
    if not shards:
        return Data(cfg, tokenizer, block_size)
    if others := [word for word in cfg.data if word not in shards]:
        conversations.find_paths(others)  # what is missing is told as such
        raise BadInput(f"{shards[0]} is a folder of token shards, which is not mixed with files such as {others[0]}: "
                       "give one kind alone")
    if unused := sorted({"val_data", "val_share", "strict"}
                        & explicit) or (["val_data"] if cfg.val_data else []):
        raise BadInput(f"--{unused[0]} is for files, and {shards[0]} is a folder of token shards with a val split of its own: "
                       "leave it out")
    return ShardData(cfg, tokenizer, block_size)


def find_pretraining(cfg, explicit, tokenizer, block_size):
    """-> the Corpus of pretraining, None if it is not at hand; whether its validation loss can be
    measured; a line about both.

    Raises BadInput where --replay, or --replay_data for the validation alone, asks for what is not
    there. Replay needs no val split.
    """
    def named(error):
        return str(error).replace("--data", "--replay_data")

    try:
        if not cfg.replay_data:
            raise BadInput(
                "the checkpoint does not say what it was trained on: name it by --replay_data")
        corpus = Corpus(TrainConfig(data=cfg.replay_data), needed=("train",))
        corpus.check_tokenizer(tokenizer)
    except BadInput as error:
        if cfg.replay or "replay_data" in explicit:
            raise BadInput(f"pretraining data: {named(error)}") from error
        return None, False, f"not measuring forgetting: {named(error)}"
    folders, share = ", ".join(map(str, cfg.replay_data)), f"{cfg.replay:.1%} of the rows"
    try:
        for source in corpus.sources:
            read_validation(source.shards, cfg.val_tokens, block_size, tokenizer)
    except BadInput as error:
        if not cfg.replay and "replay_data" in explicit:
            raise BadInput(f"pretraining data: {named(error)}") from error
        replayed = f"pretraining text for {share}: {folders}; " if cfg.replay else ""
        return corpus, False, f"{replayed}not measuring forgetting: {named(error)}"
    return corpus, True, f"pretraining text for {f'{share}, and ' if cfg.replay else ''}validation: {folders}"


# ----------------------------------------------------------------------------------------------------------------------
# Weights


@torch.no_grad()
def grow(model, tokenizer):
    """A GPT -> vocab_size and weights of one that has logits for the ids of chat, too.

    These follow behind those of text. Pretraining pushed their rows of the embedding and of the
    head away, so they begin as the mean of the rows of text; so does what pads the tables where
    these have no room and grow. But the end of a turn begins as the end of a text, which the model
    knows: from the mean, a few steps at low rates never make it likely, and replies do not end.
    """
    config, state = replace(model.config,
                            vocab_size=tokenizer.vocab_size + len(RESERVED)), model.state_dict()
    if model.config.vocab_size < config.vocab_size:  # else it was post-trained before
        for name in ("transformer.wte.weight", "lm_head.weight"):
            before, text = state[name], state[name][:tokenizer.vocab_size]
            state[name] = text.mean(dim=0).repeat(config.padded_vocab_size, 1)
            state[name][:tokenizer.vocab_size] = text
            state[name][tokenizer.reserved[END]] = text[tokenizer.eot]
            state[name][config.vocab_size:len(before)] = before[config.vocab_size:]
    return config.vocab_size, state


# ----------------------------------------------------------------------------------------------------------------------
# The run


class PostTraining(Pretraining):
    """What `launch` trains on and measures here. pretraining: its Corpus, or None. forgetting:
    whether that is measured."""

    has_learned = True

    def __init__(self, cfg, model_cfg, explicit, state, model):
        """state: the checkpoint to begin with, or resumed. model: its GPT, None if resumed. Sets
        model_cfg.vocab_size."""
        self.explicit = explicit
        self.own_tokenizer = tokenizer = load_tokenizer(state["tokenizer"])
        self.corpus = read_data(cfg, explicit, tokenizer, model_cfg.block_size)
        self.pretraining, self.forgetting, line = find_pretraining(cfg, explicit, tokenizer,
                                                                   model_cfg.block_size)
        self.corpus.lines.append(line)
        if cfg.replay:
            self.corpus.identity += self.pretraining.identity
            self.corpus.former_identity += self.pretraining.former_identity
        if model:
            fit_vocabulary(model, model_cfg.vocab_size)
            weights = model.state_dict()
            if self.corpus.chat:
                model_cfg.vocab_size, weights = grow(model, tokenizer)
            self.weights = [weights]
        elif self.corpus.chat and model_cfg.vocab_size < tokenizer.vocab_size + len(RESERVED):
            raise BadInput("the run that goes on has learned plain text and has no ids for conversations: "
                           "begin another --run_name")
        template = JINJA if self.corpus.chat else state.get("chat_template")
        self.extra = {"chat_template": template} if template else {}

    def tokenizer(self, model_cfg):
        return self.own_tokenizer

    def evaluations(self, cfg, tokenizer, block_size, processes):
        self.steps = cfg.steps
        if cfg.eval_every is None:
            cfg.eval_every = -(-cfg.steps // MOMENTS)
        if cfg.sample_every is None:
            cfg.sample_every = cfg.eval_every
        if cfg.steps < ENOUGH and cfg.max_steps is None:
            smaller = ", or lower --total_batch_size" if cfg.total_batch_size > block_size * processes.world_size else ""
            self.corpus.lines.append(
                f"warning: {cfg.steps} steps in all teach little: give more data, or raise --epochs{smaller}"
            )
        return super().evaluations(cfg, tokenizer, block_size, processes)

    def validation(self, cfg, tokenizer, block_size, processes):
        new, runs = self.corpus, []
        if isinstance(new, Corpus):
            runs.append(validation(cfg, new, tokenizer, block_size, processes))
        elif new.val:
            rows = new.rows()
            runs.append(lambda model, stopped: {
                "Loss/val": evaluate(model, rows, cfg.sequences, processes, stopped)})
        if self.forgetting:
            runs.append(
                validation(cfg, self.pretraining, tokenizer, block_size, processes,
                           "Loss/val_pretraining"))
        return lambda *args: {tag: value for run in runs for tag, value in run(*args).items()}

    def samples(self, cfg, tokenizer):
        if not self.corpus.chat:
            cfg.sample_prompt = cfg.sample_prompt or TrainConfig.sample_prompt
            return super().samples(cfg, tokenizer)
        question = self.corpus.question[:1 + (self.corpus.question[0]["role"] == "system")]
        if cfg.sample_prompt:
            question = [{"role": "user", "content": cfg.sample_prompt}]
        ids, settings = render(question, tokenizer,
                               reply=True)[0], SampleConfig(max_new_tokens=64, samples=2)

        def run(model, stopped):
            texts = continuations(model, tokenizer, [ids] * settings.samples, settings)
            return {"samples": [f"{question[-1]['content']} -> {text}" for text in texts]}

        return run

    def stream(self, cfg, tokenizer, block_size, processes):
        replay = token_rows(self.pretraining, tokenizer, cfg.seed,
                            block_size) if cfg.replay else None
        batches = partial(packing.micro_batches, micro_batch=cfg.sequences, processes=processes,
                          packed=self.corpus.chat)
        return packing.Rows(self.corpus.source, replay, cfg.replay, batches)

    def packed(self, idx):
        """What else the model gets with a batch of these ids, as `pick_micro_batch` tries it."""
        return (packing.Packed(torch.zeros_like(idx)),) if self.corpus.chat else ()

    def conclude(self, run):
        losses = run.recorded("val_pretraining") or {}
        if len(
                losses
        ) > 1 and self.steps in losses:  # an older one is no end: pretraining data may be gone since
            first, last = min(losses), self.steps
            best = run.best[1] if run.best else last
            told = f"{losses[last]:.4f} ({losses[last] - losses[first]:+.4f} nats per token)"
            at_best = f", {losses[best]:.4f} at the best checkpoint" if best != last and best in losses else ""
            run.say(
                f"forgetting: pretraining validation loss {losses[first]:.4f} -> {told}{at_best}")


def pick_batch(tokens, row):
    """--total_batch_size where the flag is not given, for an epoch of so many tokens. row: tokens
    of one row per process, or of a micro-batch where --micro_batch is given.

    A power of two of these, so that micro-batches divide it: BATCH tokens, or as many as make
    ENOUGH to twice ENOUGH steps per epoch; at least one.
    """
    rows = max(min(BATCH, tokens // ENOUGH) // row, 1)
    return row << rows.bit_length() - 1


def settle(cfg, before, explicit):
    """Fill in what the checkpoint decides. before: its train_config, or {}. Raises BadInput if that
    gives no rate."""
    again = "checkpoint" in before  # its rates are those of post-training
    if cfg.optimizer not in (None, before.get("optimizer", "adamw")) and cfg.max_lr is None:
        raise BadInput(
            f"--optimizer {cfg.optimizer} is not the checkpoint's, whose rates do not fit it: give --max_lr, too"
        )
    if cfg.optimizer in (None, before.get("optimizer", "adamw")):
        cfg.lr_scale = cfg.lr_scale or (1.0 if again else 0.1)
        for name in RATES:
            if getattr(cfg, name) is None and isinstance(before.get(name), float):
                setattr(cfg, name, before[name] * cfg.lr_scale)
    if cfg.max_lr is None:
        raise BadInput("the checkpoint does not say its learning rate: give --max_lr")
    cfg.optimizer = cfg.optimizer or before.get("optimizer", "adamw")
    cfg.momentum = before.get("momentum",
                              TrainConfig.momentum) if cfg.momentum is None else cfg.momentum
    if "val_tokens" not in explicit:  # which suit the machine that it was made on
        cfg.val_tokens = min(cfg.val_tokens, before.get("val_tokens", cfg.val_tokens))
    folders = cfg.replay_data or before.get("replay_data" if again else "data") or ()
    cfg.replay_data = (folders,) if isinstance(folders, str) else tuple(folders)


def begun(resume):
    """The GPTConfig of a Resume. Raises BadInput unless it is of this script."""
    before, config = resume.state.get("train_config"), resume.state.get("model_config")
    if not isinstance(before, dict) or not isinstance(config, dict) or "checkpoint" not in before:
        raise BadInput(f"{resume.path} is not a checkpoint of a post-training run: name it by --checkpoint, to begin with, "
                       "and give another --run_name")
    try:
        return GPTConfig(**config)
    except TypeError as error:
        raise BadInput(
            f"{resume.path} is of another version of this project ({error}): name another one"
        ) from error


def prepare(cfg, explicit, resume):
    """-> the GPTConfig and the PostTraining of a run. Sets what cfg leaves open.
    Holds nothing else of the checkpoint: a run may be long."""
    if resume:
        state, model, model_cfg = resume.state, None, begun(resume)
    else:
        start = checkpoint.pick(checkpoint.named(cfg))
        if cfg.checkpoint:
            cfg.checkpoint = start
        if cfg.data is None:
            raise BadInput("name --data, what to train on")
        model, _, state = load_checkpoint(start)
        checkpoint.check_finite(model.state_dict(), start)
        model_cfg = model.config
        before = state.get("train_config", {"max_lr": GPT3_RATES[cfg.model]} if cfg.model else {})
        settle(cfg, before if isinstance(before, dict) else {}, explicit)
    if cfg.dropout is not None:
        model_cfg.dropout, cfg.dropout = cfg.dropout, None  # the model's setting from here on
    adopt(resume, cfg, model_cfg, explicit)
    check(cfg)
    task = PostTraining(cfg, model_cfg, explicit, state, model)
    if cfg.total_batch_size is None:  # a run that goes on keeps what it began with
        world_size = (launched() or {"world_size": 1})["world_size"]
        row = model_cfg.block_size * world_size * (1 if cfg.micro_batch == "auto" else
                                                   cfg.micro_batch)
        cfg.total_batch_size = pick_batch(task.corpus.tokens["train"], row)
    return model_cfg, task


def main(argv):
    (cfg,), explicit = parse((Config,), argv, __doc__)
    resume = find_resume(cfg, explicit)
    model_cfg, task = prepare(cfg, explicit, resume)
    launch(cfg, model_cfg, explicit, resume, task)


if __name__ == "__main__":
    run(main)
