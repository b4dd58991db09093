"""Train a tokenizer on your own text, and compare tokenizers.

    python tokenizer.py train --source a.parquet folder/ --vocab_size 32768 --out bpe32k
    python tokenizer.py compare --source val.parquet --tokenizer gpt2 o200k_base bpe32k --width 768
    python fineweb.py --source a.parquet folder/ --tokenizer bpe32k/tokenizer.json --out mine

Hugging Face's libraries load the folder, too: AutoTokenizer.from_pretrained("bpe32k") has the same
ids.
"""

import lib.startup  # noqa: F401 (before torch)

# isort: split

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lib.cli import BadInput, flag, parse, path_flag, run, subcommand
from lib.files import new_folder, write_json
from lib.text import Source, find_parts
from lib.tokenizers import (
    BPE_TEXT,
    EOT,
    MAX_BPE,
    MIN_BPE,
    RESERVED,
    Tokenizer,
    load_tokenizer,
    train_bpe,
)

COMPARED = 20_000_000  # characters of --source on which tokenizers are compared
PADDED = 128           # embedding rows are padded to a multiple of this, as in train_gpt2.py


@dataclass
class Text:
    source: tuple[str, ...] = path_flag(
        (), "local files, folders and globs of parquet, jsonl(.gz|.zst) or txt, or a dataset id of "
        "the hub")
    name: str | None = flag(None, "configuration of the dataset")
    text_column: str = flag("text", "column with the text")


@dataclass
class Train:
    vocab_size: int = flag(
        32_768, f"ids: bytes, merges, end-of-text and {len(RESERVED)} reserved for chat",
        at_least=MIN_BPE, at_most=MAX_BPE)
    out: str | None = path_flag(None, "folder of the tokenizer")


@dataclass
class Compare:
    tokenizer: tuple[str, ...] = path_flag(
        ("gpt2", "cl100k_base", "o200k_base"),
        "tiktoken names, and tokenizer.json files or folders with one")
    width: int = flag(768, "n_embd of the model", above=0, at_most=65_536)


def main(argv: list[str]) -> None:
    command, flags = subcommand(argv, {"train": train, "compare": compare}, __doc__)
    command(flags)


def read(cfg: Text, characters: int) -> Iterator[str]:
    """The first documents of --source, with at least `characters` characters in total."""
    if not cfg.source:
        raise BadInput("name the text with --source")
    parts, left_out = find_parts(cfg.source, cfg.text_column)
    for line in left_out:
        print(line)
    return Source(parts, cfg.text_column, cfg.name).texts(characters)


def train(argv: list[str]) -> None:
    (text, cfg), _ = parse((Text, Train), argv, __doc__, command="train")
    if cfg.out is None:
        raise BadInput("name the folder of the tokenizer with --out")
    out = Path(cfg.out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if os.path.lexists(out / name):
            raise BadInput(f"{out}/ already has a {name}: give another --out")
    texts = read(text, BPE_TEXT)
    with new_folder(out, "give another --out"):  # before the work, which may take long
        started = time.perf_counter()
        print(f"training a BPE of {cfg.vocab_size:,} ids on up to {BPE_TEXT:,} characters",
              flush=True)
        tokenizer = train_bpe(texts, cfg.vocab_size)
        write_json(out / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": EOT,
            "eos_token": EOT,
        })
        tokenizer.save(out / "tokenizer.json")
    print(f"{out}/tokenizer.json: {cfg.vocab_size:,} ids after "
          f"{time.perf_counter() - started:.1f} s, the last {1 + len(RESERVED)} are {EOT} "
          f"{' '.join(RESERVED)}")


def compare(argv: list[str]) -> None:
    (text, cfg), _ = parse((Text, Compare), argv, __doc__, command="compare")
    texts = read(text, COMPARED)
    tokenizers = load_all(cfg.tokenizer)
    documents = list(texts)
    size = sum(len(document.encode(errors="replace")) for document in documents)
    if not size:
        raise BadInput("the source has no text to compare on: check --source and --text_column")
    print(f"{size:,} bytes of {len(documents):,} documents, one thread")
    print(f"{'tokenizer':28} {'ids':>9} {'bytes/token':>12} {'tokens/s':>12} {'MB/s':>7} "
          f"{f'embedding parameters at {cfg.width}':>33}")
    for spec, tokenizer in tokenizers:
        started = time.perf_counter()
        tokens = sum(len(tokenizer.encode(document)) for document in documents)
        seconds = time.perf_counter() - started
        rows = -(-tokenizer.vocab_size // PADDED) * PADDED
        print(f"{spec[-28:]:28} {tokenizer.vocab_size:9,} {size / max(tokens, 1):12.3f} "
              f"{tokens / seconds:12,.0f} {size / seconds / 1e6:7.1f} {rows * cfg.width:33,}")


def load_all(specs: tuple[str, ...]) -> list[tuple[str, Tokenizer]]:
    """(spec, Tokenizer) of each that can be loaded. Raises BadInput if none can."""
    tokenizers = []
    for spec in specs:
        try:
            tokenizer = load_tokenizer(spec)
            tokenizer.require_text("compare")
            tokenizers.append((spec, tokenizer))
        except BadInput as error:
            if len(specs) == 1:
                raise
            print(f"left out: {error}", file=sys.stderr)
    if not tokenizers:
        raise BadInput("no tokenizer is left to compare: name others with --tokenizer")
    return tokenizers


if __name__ == "__main__":
    run(main)
