"""The loss of models on texts: a table of nats and perplexity per token and bits per byte.

    python loss.py --checkpoint log/first log/second --model gpt2 --text book.txt notes/
    python loss.py --checkpoint log/first --text edu_fineweb10B       # a folder of token shards
    python loss.py --checkpoint PATH --text notes/ --by_file --by_position --json loss.json
    torchrun --standalone --nproc_per_node=8 loss.py --checkpoint PATH --text book.txt

A text is a file or a folder of files: .txt, or .json, .jsonl and .parquet with a column `text`
whose rows are documents; a .md file if it is named itself. Every document begins with an
end-of-text token, which is not scored. Of a folder of token shards, the val split is scored as in
training, documents joined.

A document longer than the model's context is scored in windows. By default they do not overlap, so
the first token of a window is predicted from one token; only the last window of a document is
filled up with tokens that were scored before. With --stride N, every window but the first scores
its last N tokens. Bits per byte compare models with different tokenizers, the other figures do not.
"""

import lib.startup  # noqa: F401 (before torch)

# isort: split

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from lib import checkpoint, conversations, files
from lib.cli import BadInput, flag, note, parse, path_flag, run
from lib.decoding import NonFinite
from lib.devices import Processes, autocast, dtype_flag
from lib.evals.loss import Document, Sums, context_edges, measure
from lib.rope import ContextConfig, extend
from lib.shards import Shards, check_shards, find_shards, read_validation
from lib.tokenizers import Tokenizer, load_tokenizer
from train_gpt2 import TrainConfig, load_checkpoint


@dataclass(frozen=True)
class Config(checkpoint.ModelConfig):
    checkpoint: tuple[str, ...] | None = path_flag(  # type: ignore[assignment]
        None, "run folders, ckpt_<step>.pt or weights_<step>.pt files, folders that export_hf.py "
              "made")
    text: tuple[str, ...] | None = path_flag(
        None, "files, folders of files, folders of token shards")
    stride: int | None = flag(
        None, "tokens between the windows of a document; unset: the context, no overlap",
        at_least=1)
    val_tokens: int = flag(
        TrainConfig.val_tokens, "tokens of a shard folder's val split, as in training", above=0)
    by_file: bool = flag(False, "also a row for each file of a folder")
    by_position: bool = flag(
        False, "also a row for each range of positions in the window: the number of tokens that a "
               "token is predicted from")
    json: str | None = path_flag(None, "a new file for the table as json")
    device: Literal["auto", "cuda", "mps", "cpu"] = flag("auto", "auto: cuda, then mps, then cpu")
    dtype: str = dtype_flag()


# --------------------------------------------------------------------------------------------------
# Texts


class File(NamedTuple):
    """A file of documents."""
    word: str  # of --text
    path: str
    documents: list[str]

    def check(self, name: str, tokenizer: Tokenizer, block_size: int) -> None:
        """Any model can score it."""

    def ids(self, tokenizer: Tokenizer, block_size: int) -> Iterator[np.ndarray]:
        for text in self.documents:
            yield np.concatenate([[tokenizer.eot], tokenizer.encode(text)])


class ValSplit(NamedTuple):
    """The val split of a folder of token shards, one document."""
    word: str
    path: str
    shards: Shards
    val_tokens: int

    def check(self, name: str, tokenizer: Tokenizer, block_size: int) -> None:
        """Raises BadInput unless the shards are of the tokenizer of the model `name`, and fill a
        window."""
        own = load_tokenizer(self.shards.tokenizer)
        if not own.same_ids(tokenizer):
            raise BadInput(f"{self.word} holds tokens of another tokenizer than {name}'s, "
                           f"{tokenizer.name}: give text files, or leave one of them out")
        check_shards(self.shards, own)
        try:
            read_validation(self.shards, self.val_tokens, block_size, own)
        except BadInput as error:
            raise BadInput(str(error).replace("--block_size", "--context")) from error

    def ids(self, tokenizer: Tokenizer, block_size: int) -> Iterator[np.ndarray]:
        x, y = read_validation(self.shards, self.val_tokens, block_size, tokenizer)
        yield np.append(x, y[-1, -1])


Parts = Sequence[File | ValSplit]


def read_texts(cfg: Config) -> Parts:
    """--text, a part per file or folder of shards. Raises BadInput for what cannot be scored."""
    parts: list = []
    for word in dict.fromkeys(cfg.text or ()):
        shards, _ = find_shards(word)
        if any(shards.values()):
            folder = Shards(word, needed=("val",), named_by="--text")
            parts.append(ValSplit(word, word, folder, cfg.val_tokens))
            continue
        paths, lines = conversations.find_paths([word])
        for path in paths:
            examples, line = conversations.read(path)
            texts = [example for example in examples if isinstance(example, str)]
            if len(texts) < len(examples):
                raise BadInput(f"{path} holds conversations, not text: name files whose rows have "
                               "a column text")
            parts.append(File(word, path, texts))
            if not line.endswith(" texts"):  # rows were skipped, columns not used
                lines.append(line)
        for line in lines:
            note(line)
    if not parts:
        raise BadInput("name --text, the files or folders to score")
    return parts


# --------------------------------------------------------------------------------------------------
# Models


class Model(NamedTuple):
    name: str  # on the command line
    gpt: Any
    tokenizer: Tokenizer
    step: int | None


def load(cfg: Config, context: ContextConfig, parts: Parts) -> list[Model]:
    """The models that the flags name, on the CPU. Raises BadInput if one does not fit the texts."""
    names = list(cfg.checkpoint or ())
    if cfg.model:
        names.append(cfg.model)
    if not names:
        raise BadInput("name --checkpoint or --model, for instance --checkpoint log/<run>")
    models = []
    for name in dict.fromkeys(names):
        gpt, tokenizer, state = load_checkpoint(name, dtype=cfg.dtype)
        extend(gpt, context)
        with_padding(gpt)
        block_size = gpt.config.block_size
        if cfg.stride and cfg.stride > block_size:
            raise BadInput(f"--stride {cfg.stride} is longer than the context of {name}, "
                           f"{block_size}: lower it")
        for part in parts:
            part.check(name, tokenizer, block_size)
        models.append(Model(name, gpt, tokenizer, state.get("step")))
    return models


def with_padding(gpt: Any) -> None:
    """Let the softmax include the padding of the vocabulary, as in training's loss."""
    gpt.config = replace(gpt.config, vocab_size=gpt.config.padded_vocab_size)


def documents(model: Model, parts: Parts) -> Iterator[Document]:
    for i, part in enumerate(parts):
        for ids in part.ids(model.tokenizer, model.gpt.config.block_size):
            yield Document(i, ids)


def evaluate(model: Model, parts: Parts, processes: Processes, stride: int | None) -> Sums:
    """The Sums of a model, a row per part."""
    gpt = model.gpt.to(processes.device)
    token_bytes = model.tokenizer.token_bytes()
    try:
        with autocast(gpt):
            return measure(gpt, documents(model, parts), token_bytes, processes, stride)
    except NonFinite as error:
        raise BadInput(f"{model.name}: {error}") from error


# --------------------------------------------------------------------------------------------------
# The table

HEADERS = ["model", "context", "text", "position", "tokens", "nats/token", "perplexity",
           "bits/byte"]


def tabulate(model: Model, parts: Parts, sums: Sums, cfg: Config) -> list[dict]:
    """The rows of a model, as --json has them."""
    block_size = model.gpt.config.block_size
    ranges: list[tuple] = [(None, slice(None))]
    if cfg.by_position:
        ranges += position_ranges(block_size)
    rows = []
    for name, indexes in row_groups(parts, cfg.by_file):
        for position, columns in ranges:
            own = [part[indexes, columns].sum() for part in sums]
            row = {"model": model.name, "step": model.step, "context": block_size, "text": name,
                   "position": position, **figures(*own)}
            if row["tokens"]:
                rows.append(row)
    return rows


def row_groups(parts: Parts, by_file: bool) -> list[tuple[str, list[int]]]:
    """(name, indexes of its parts) for each word of --text, and before it for its files."""
    groups = []
    for word in dict.fromkeys(part.word for part in parts):
        own = [i for i, part in enumerate(parts) if part.word == word]
        is_folder = parts[own[0]].path != word
        if by_file and is_folder:
            groups += [(parts[i].path, [i]) for i in own]
        groups.append((word, own))
    return groups


def position_ranges(block_size: int) -> list[tuple]:
    """([first, last] position, columns of Sums) of each range."""
    found: list[tuple] = []
    first = 1
    for i, last in enumerate(context_edges(block_size)):
        found.append(([first, last], slice(i, i + 1)))
        first = last + 1
    return found


def figures(nats: float, tokens: float, n_bytes: float) -> dict:
    """What a row says of the sums over its tokens; bits per byte are None without bytes."""
    loss = nats / max(tokens, 1)
    bits_per_byte = nats / math.log(2) / n_bytes if n_bytes else None
    return {"tokens": int(tokens), "bytes": int(n_bytes), "nats_per_token": float(loss),
            "perplexity": float(np.exp(loss)), "bits_per_byte": bits_per_byte}


def cells(row: dict) -> list[str]:
    """A row as text, for HEADERS."""
    position = "all"
    if row["position"]:
        position = "-".join(map(str, row["position"]))
    bits_per_byte = "n/a"
    if row["bits_per_byte"] is not None:
        bits_per_byte = f"{row['bits_per_byte']:.4f}"
    return [row["model"], f"{row['context']:,}", row["text"], position, f"{row['tokens']:,}",
            f"{row['nats_per_token']:.4f}", f"{row['perplexity']:.2f}", bits_per_byte]


def show(rows: list[dict], stride: int | None) -> None:
    """Print the table."""
    windows = "no overlap (--stride): a window's first token is predicted from one token"
    if stride:
        windows = f"--stride {stride}: every window but a document's first scores {stride} tokens"
    print(f"windows of the model's context; {windows}")
    lines = [HEADERS, *map(cells, rows)]
    if not any(row["position"] for row in rows):
        lines = [line[:3] + line[4:] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        padded = []
        for header, cell, width in zip(lines[0], line, widths, strict=True):
            is_name = header in ("model", "text")
            padded.append(cell.ljust(width) if is_name else cell.rjust(width))
        print("  ".join(padded))


def check_output(path: str) -> None:
    """Raises BadInput unless a new file can be written there."""
    if os.path.lexists(path):
        raise BadInput(f"{path} exists: name another --json")
    files.make_folder(Path(path).parent, "name another --json")


def write(path: str, rows: list[dict], stride: int | None) -> None:
    try:
        files.write_json(path, {"stride": stride, "rows": rows})
    except OSError as error:
        raise BadInput(f"cannot write {path} ({error.strerror}): name another --json") from error


def main(argv: list[str]) -> None:
    (cfg, context), _ = parse((Config, ContextConfig), argv, __doc__)
    if cfg.json:
        check_output(cfg.json)
    parts = read_texts(cfg)
    rows = []
    with Processes(cfg.device) as processes:
        with processes.main_first():  # it may download
            models = load(cfg, context, parts)
        for model in models:
            processes.check_same(model.step or 0, checkpoint.DIFFERENT)
        while models:
            model = models.pop(0)  # so that it leaves memory afterwards
            sums = evaluate(model, parts, processes, cfg.stride)
            rows += tabulate(model, parts, sums, cfg)
        if processes.main:
            show(rows, cfg.stride)
            if cfg.json:
                write(cfg.json, rows, cfg.stride)


if __name__ == "__main__":
    run(main)
