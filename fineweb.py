"""Tokenize text into shards, by default FineWeb-edu (Penedo et al. 2024,
https://arxiv.org/abs/2406.17557).

    python fineweb.py                                         # 10B tokens -> edu_fineweb10B/
    python fineweb.py --preset fineweb-edu-100BT              # 100B tokens -> edu_fineweb100B/
    python fineweb.py --preset wikipedia --name 20231101.de   # another language of a preset
    python fineweb.py --source a.parquet more/ "*.jsonl.zst" --out mine --tokenizer cl100k_base
    python fineweb.py --docstrings --tokenizer bpe:4096       # needs no download -> docstrings/
    python fineweb.py --pretokenized fineweb-10BT --shards 8  # ready-made -> fineweb10B-gpt2/

A shard is a one-dimensional .npy of uint16 ids (uint32 for large vocabularies), with the
end-of-text id before each document, named <prefix>_{val|train}_<index>.npy. meta.json next to the
shards records how they were made. Text is streamed and encoded by threads, so memory use stays
constant. Run the same command again to continue an interrupted run after its last complete shard,
or to replace missing or damaged shards.
"""

import lib.startup  # noqa: F401 (before torch)

# isort: split

import contextlib
import os
import re
import shlex
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from lib.cli import BadInput, flag, parse, path_flag, run
from lib.docstrings import write_docstrings
from lib.files import DISK_FULL, locked, new_folder
from lib.pretokenized import Request, download_shards
from lib.shard_meta import (
    SPLITS,
    Meta,
    Split,
    check_settings,
    check_tokenizer_place,
    new_meta,
    own_tokenizer,
    read_meta,
)
from lib.shard_writer import Layout, ShardWriter, TokenizedText, heartbeat, rewrite_shard
from lib.shards import find_shards, is_complete, missing_records
from lib.text import Seen, Source, find_parts, is_local
from lib.tokenizers import BPE_TEXT, MAX_BPE, Tokenizer, load_tokenizer, train_bpe

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
LARGEST = 1_000_000_000  # tokens per shard; a shard is assembled in memory
MOST_WORKERS = 1024


class HubCorpus(NamedTuple):
    """A dataset on the hub. Licence and sizes are from its card or the source noted; None: unknown.
    """
    preset: str
    source: str
    name: str | None
    text_column: str | None  # None: shards tokenized with gpt2
    licence: str
    tokens: float | None     # with the gpt2 tokenizer
    disk: float | None       # bytes of its files on the hub

    def __str__(self):
        tokens = "tokens unknown"
        if self.tokens:
            tokens = (f"about {self.tokens / 1e9:,.4g}B tokens, "
                      f"{2 * self.tokens / 1e9:,.4g} GB of shards with gpt2")
        disk = "size on the hub unknown"
        if self.disk:
            disk = f"about {self.disk / 1e9:,.4g} GB on the hub"
        return f"{self.source}, {self.name or 'default'}: {tokens}; {disk}; licence {self.licence}"


CORPORA = (  # --name chooses another language, as listed on the dataset card
    # the card; its 1.3T are for version 1.0.0, crawls have been added since
    HubCorpus("fineweb-edu-10BT", FINEWEB_EDU, "sample-10BT", "text", "ODC-By 1.0", 10e9, None),
    HubCorpus("fineweb-edu-100BT", FINEWEB_EDU, "sample-100BT", "text", "ODC-By 1.0", 100e9, None),
    HubCorpus("fineweb-edu-350BT", FINEWEB_EDU, "sample-350BT", "text", "ODC-By 1.0", 350e9, None),
    HubCorpus("fineweb-edu", FINEWEB_EDU, "default", "text", "ODC-By 1.0", 1300e9, None),
    # github.com/huggingface/fineweb-2, fineweb2-language-distribution.csv: 262e9 words,
    # 772,108,850,771 bytes of parquet
    HubCorpus("fineweb-2", "HuggingFaceFW/fineweb-2", "deu_Latn", "text", "ODC-By 1.0",
              None, 772.1e9),
    # 11,630,929,031 bytes of parquet in 41 files, quoted from the card
    HubCorpus("wikipedia", "wikimedia/wikipedia", "20231101.en", "text", "CC BY-SA 3.0, GFDL",
              None, 11.63e9),
    # 48,284 books; bytes as reported by projects that download them
    HubCorpus("books", "sedthh/gutenberg_english", None, "TEXT",
              "MIT; the books are in the public domain of the US", None, 10.75e9),
    # nvidia/Nemotron-ClimbMix shuffled, its licence and tokens; 6,543 files of about 100 MB:
    # nanochat, runs/speedrun.sh
    HubCorpus("climbmix", "karpathy/climbmix-400b-shuffle", None, "text", "CC BY-NC 4.0",
              400e9, 650e9),
    # .bin shards: one for validation, then those for training; 100M tokens each, fewer in the last.
    # 1 + 102 shards and 55,324,043 tokens: github.com/swookey-thinky/minllm,
    # minllm/datasets/fineweb.py
    HubCorpus("fineweb-10BT", "kjj0/fineweb10B-gpt2", None, None,
              "MIT; the text is FineWeb's, ODC-By", 10_355_324_043, 20.71e9),
    # 1 + 1,030 shards: modded-nanogpt, data/cached_fineweb100B.py; other scripts download 1,028
    HubCorpus("fineweb-100BT", "kjj0/fineweb100B-gpt2", None, None,
              "MIT; the text is FineWeb's, ODC-By", 103e9, 206e9),
    # 1 + 98 shards and 53,989,344 tokens, as reported by projects that read them; modded-nanogpt
    # downloads 1 + 99
    HubCorpus("fineweb-edu-10BT", "kjj0/finewebedu10B-gpt2", None, None,
              "not stated; the text is FineWeb-edu's, ODC-By 1.0", 9_953_989_344, 19.91e9),
    # 1 + 1,001 shards: llm.c, dev/data/edu_fineweb.sh
    HubCorpus("fineweb-edu-100BT", "karpathy/fineweb-edu-100B-gpt2-token-shards", None, None,
              "ODC-By", 100.2e9, 200.4e9),
)
TEXTS = {row.preset: row for row in CORPORA if row.text_column}
PRETOKENIZED = {row.preset: row.source for row in CORPORA if not row.text_column}


# --------------------------------------------------------------------------------------------------
# Flags


@dataclass
class Config:
    preset: Literal[tuple(TEXTS)] | None = flag(  # type: ignore[valid-type]
        None, "a corpus on the hub: sets --source, --name and --text_column")
    source: tuple[str, ...] = path_flag(
        (FINEWEB_EDU,), "a dataset id, or local files, folders and globs of parquet, "
        "jsonl(.gz|.zst) or txt, read in the order given; a .txt is one document")
    name: str | None = flag(None, "configuration of the dataset; FineWeb-edu: sample-10BT, "
                            "sample-100BT, sample-350BT, ...")
    text_column: str = flag("text", "column with the text")
    dedup: bool = flag(False, "drop exact duplicates of earlier documents, by hash; takes about "
                       "1.1 GB of memory; not for .txt")
    pretokenized: str | None = flag(
        None, f"download shards instead of making them: {', '.join(PRETOKENIZED)}, or a dataset "
        "on the hub with .npy or .bin shards, as id or id:folder or id:pattern")
    shards: int | None = flag(None, "train shards that --pretokenized downloads; by default all, "
                              "or enough for --max_tokens", at_least=1)
    docstrings: bool = flag(
        False, "read the docstrings of the installed Python packages instead of a source")
    tokenizer: str = path_flag(
        "gpt2", "a tiktoken name, a tokenizer.json, or bpe:4096 to train one of 4096 ids on the "
        "source; with --pretokenized, for shards without a meta.json")
    out: str | None = path_flag(None, "folder of the shards; by default named after the source")
    shard_size: int = flag(100_000_000, "tokens per shard", at_least=1, at_most=LARGEST)
    val_tokens: int | None = flag(
        None, "tokens of the validation shard, taken first; by default one shard, or a tenth of a "
        "smaller source", at_least=0, at_most=LARGEST)
    max_tokens: int | None = flag(
        None, "stop after this many tokens; with --pretokenized, after the shard that reaches them",
        at_least=2)
    workers: int | None = flag(None, "encoding threads; by default one per core", at_least=1,
                               at_most=MOST_WORKERS)
    finish: bool = flag(
        False, "declare an unfinished folder complete with the shards that it has; reads no text")


@dataclass(frozen=True)
class Job:
    """The flags with all defaults filled in.

    explicit: names of the flags given. settings: the flags that determine which ids are written; a
    run only continues shards made with the same ones. command: command line that makes the same
    shards, without --out. request: for --pretokenized, else None.
    """
    cfg: Config
    explicit: set[str]
    out: Path
    workers: int
    settings: dict
    command: str
    request: Request | None


def read_flags(argv: list[str]) -> Job:
    """Read the command line. Raises BadInput if flags contradict each other."""
    presets = {}
    for preset, row in TEXTS.items():
        presets[preset] = dict(source=(row.source,), name=row.name, text_column=row.text_column)
    (cfg,), explicit = parse((Config,), argv, __doc__, presets)
    if cfg.pretokenized:
        dataset = PRETOKENIZED.get(cfg.pretokenized, cfg.pretokenized)
        check_pretokenized(cfg, explicit, dataset)
        cfg = replace(cfg, pretokenized=dataset)
    else:
        check_text(cfg, explicit)
    if reads_fineweb_edu(cfg):
        cfg = replace(cfg, name=cfg.name or "sample-10BT")
    out = Path(cfg.out or default_folder(cfg))
    check_folder(cfg, out)
    workers = cfg.workers or min(os.cpu_count() or 1, MOST_WORKERS)
    command = command_of(cfg, explicit)
    settings = settings_of(cfg)
    request = None
    if cfg.pretokenized:
        tokenizer = cfg.tokenizer if "tokenizer" in explicit else None
        request = Request(cfg.pretokenized, cfg.shards, cfg.max_tokens, tokenizer, command)
        settings = request.settings
    return Job(cfg, explicit, out, workers, settings, command, request)


def reads_fineweb_edu(cfg: Config) -> bool:
    return cfg.source == (FINEWEB_EDU,) and not cfg.docstrings


def default_folder(cfg: Config) -> str:
    """The default of --out, named after the source."""
    if cfg.pretokenized:
        return cfg.pretokenized.partition(":")[0].partition("/")[2]
    if cfg.docstrings:
        return "docstrings"
    if reads_fineweb_edu(cfg):
        sample = (cfg.name or "").removeprefix("sample-").removesuffix("T")
        return "edu_fineweb" if sample == "default" else f"edu_fineweb{sample}"
    if cfg.preset:
        return f"{cfg.preset}_{cfg.name}" if cfg.name else cfg.preset
    stem = Path(cfg.source[0]).name.split(".")[0].replace("*", "") or "shards"
    is_read = os.path.isdir(stem) and stem in map(os.path.normpath, cfg.source)
    return f"{stem}_shards" if is_read else stem


def check_text(cfg: Config, explicit: set[str]) -> None:
    if cfg.shards:
        raise BadInput("--shards is the number of shards that --pretokenized downloads: give both, "
                       "or --max_tokens")
    is_named_twice = len(explicit & {"docstrings", "source", "preset"}) > 1
    if is_named_twice or (cfg.docstrings and "name" in explicit):
        raise BadInput("--preset, --docstrings and --source (with its --name) each name the text: "
                       "give one of them")
    if trains_tokenizer(cfg) and not re.fullmatch("bpe:[0-9]{1,9}", cfg.tokenizer):
        raise BadInput(f"--tokenizer {cfg.tokenizer[:80]}: write bpe:<number of ids>, as in "
                       f"bpe:4096, at most {MAX_BPE:,}")


def check_pretokenized(cfg: Config, explicit: set[str], dataset: str) -> None:
    allowed = {"pretokenized", "shards", "max_tokens", "tokenizer", "out", "finish"}
    for field in fields(cfg):
        if field.name in explicit - allowed:
            raise BadInput("--pretokenized downloads shards as they are: "
                           f"leave out --{field.name}")
    if {"shards", "max_tokens"} <= explicit:
        raise BadInput("--shards and --max_tokens both limit the download: give one of them")
    if trains_tokenizer(cfg):
        raise BadInput("--pretokenized shards already have a tokenizer: name it with --tokenizer, "
                       "or leave that out")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(:.+)?", dataset):
        raise BadInput(f"--pretokenized {dataset[:80]}: name one of "
                       f"{', '.join(PRETOKENIZED)}, or a dataset on the hub as owner/name")


def check_folder(cfg: Config, out: Path) -> None:
    place = Path(os.path.realpath(out))  # Path.resolve raises for a link to itself
    for source in filter(os.path.isdir, cfg.source):
        if Path(source).resolve() in (place, *place.parents):
            raise BadInput(f"--out {out} is in the folder {source} of --source: "
                           "give another --out")


def trains_tokenizer(cfg: Config) -> bool:
    return cfg.tokenizer.startswith("bpe:")


def settings_of(cfg: Config) -> dict:
    """The flags that determine which ids are written, as stored in meta.json."""
    return {
        "pretokenized": None,
        "source": "docstrings" if cfg.docstrings else list(cfg.source),
        "name": cfg.name,
        "text_column": cfg.text_column,
        "shard_size": cfg.shard_size,
        "val_tokens": cfg.val_tokens,
        "max_tokens": cfg.max_tokens,
        "tokenizer_flag": cfg.tokenizer,
        "dedup": cfg.dedup,
    }


def command_of(cfg: Config, explicit: set[str]) -> str:
    """The command line that makes the same shards, without --out."""
    words = ["python", "fineweb.py"]
    for field in fields(cfg):
        value = getattr(cfg, field.name)
        if field.name not in explicit - {"out", "workers", "finish"} or value is False:
            continue
        words.append(f"--{field.name}")
        if value is not True:
            words += map(str, value if isinstance(value, tuple) else [value])
    return shlex.join(words)


# --------------------------------------------------------------------------------------------------
# The pipeline


def main(argv: list[str]) -> None:
    job = read_flags(argv)
    if job.cfg.finish:
        finish(job)
        return
    if is_finished(job, own_meta(job)):
        return
    parts = find_text(job)
    with writing(job.out):
        meta = own_meta(job)  # another process may have continued it meanwhile
        if job.request:
            print_corpora(job.request.name)
            meta = download_shards(job.request, job.out, meta)
        else:
            meta = make_shards(job, parts, meta)
        is_finished(job, meta)


def finish(job: Job) -> None:
    """Declare the folder complete with the shards that it has. Raises BadInput unless these are
    whole and enough to train on."""
    meta = own_meta(job)
    if meta is None or not meta.split("train").shards:
        raise BadInput(f"{job.out}/ has no train shards yet: make them without --finish")
    with writing(job.out):
        meta = own_meta(job)
        assert meta is not None
        for record in missing_records(job.out, meta):
            raise BadInput(f"{job.out / record.name} is missing or damaged: give the command "
                           "without --finish, which writes it again")
        if not meta.complete:
            meta.complete = True
            meta.resume = None
            meta.write(job.out)
        print_summary(job, meta)


def own_meta(job: Job) -> Meta | None:
    """The Meta of the folder, None if it has no shards. Raises BadInput if its shards were made by
    another command."""
    meta = read_meta(job.out)
    if meta:
        check_settings(job.out, meta, job.settings)
        return meta
    paths, _ = find_shards(job.out)
    shards = paths["val"] + paths["train"]
    if shards:
        raise BadInput(f"{job.out}/ contains shards of another program ({shards[0].name}): "
                       "give another --out")
    if trains_tokenizer(job.cfg):
        check_tokenizer_place(job.out, None)
    return None


def find_text(job: Job) -> list[str]:
    """The files and datasets to read, in order."""
    if job.cfg.pretokenized:
        return []
    if job.cfg.docstrings:
        return [str(job.out / "docstrings.jsonl")]
    parts, left_out = find_parts(job.cfg.source, job.cfg.text_column)
    for line in left_out:
        print(line)
    if "name" in job.explicit and any(map(is_local, parts)):
        raise BadInput("--name is a configuration of a dataset on the hub: "
                       "leave it out with local files")
    return parts


def make_shards(job: Job, parts: list[str], meta: Meta | None) -> Meta:
    """Tokenize text into shards. meta: of an earlier run to continue, or None. Returns the Meta of
    the complete folder."""
    cfg = job.cfg
    if cfg.docstrings:
        write_docstrings(Path(parts[0]))
    seen = Seen(job.out / "hashes.bin") if cfg.dedup else None
    source = Source(parts, cfg.text_column, cfg.name, seen)
    tokenizer = find_tokenizer(job, source, meta)
    if meta is None or not meta.records:
        meta = new_meta(tokenizer, job.settings, job.command)
    if not all(map(is_local, parts)):  # a continued run reads the same commits as before
        source.commits |= meta.setting("commits") or {}
        meta.settings = (meta.settings or {}) | {"commits": source.commits}
    text = TokenizedText(source, tokenizer, np.dtype(meta.dtype), job.workers)
    for record in missing_records(job.out, meta):
        rewrite_shard(job.out, text, meta, record)
    if not meta.complete:
        write_shards(job, text, meta)
    return meta


def find_tokenizer(job: Job, source: Source, meta: Meta | None) -> Tokenizer:
    """Load --tokenizer, or for bpe:<n> train it once on the source; saved next to meta.json."""
    spec = job.cfg.tokenizer
    if meta and meta.records:
        return own_tokenizer(job.out, meta)
    if trains_tokenizer(job.cfg):
        check_tokenizer_place(job.out, meta)
        size = spec.removeprefix("bpe:")
        print(f"training a BPE of {size} ids")
        return train_bpe(source.texts(BPE_TEXT), int(size))
    tokenizer = load_tokenizer(spec)
    tokenizer.require_text("fineweb.py")
    if tokenizer.is_trained:
        check_tokenizer_place(job.out, meta, tokenizer)
    return tokenizer


def write_shards(job: Job, text: TokenizedText, meta: Meta) -> None:
    """Read, encode and write, from the last complete shard to the end of the source or
    --max_tokens."""
    cfg = job.cfg
    prefix = "edufineweb" if reads_fineweb_edu(cfg) else job.out.resolve().name
    layout = Layout(prefix, cfg.shard_size, cfg.val_tokens)
    writer = ShardWriter(job.out, text.tokenizer, meta, layout)
    before, drop = text.find(meta.resume, meta.tokens)
    if meta.tokens:
        print(f"continuing after {meta.tokens:,} tokens")
    total = expect_tokens(cfg, text.source)
    warn_of_large_val(cfg, meta, total)
    documents = meta.documents
    started = time.perf_counter()
    # disable=None: no bar unless stderr is a terminal
    bar = tqdm(total=total, initial=meta.tokens, unit="tok", unit_scale=True, dynamic_ncols=True,
               mininterval=1.0, disable=None)
    meta.promised = promise_train_tokens(cfg, text, layout, meta)
    with text.batches(before) as stream, bar:
        for batch, ids in stream:
            used = min(drop, len(ids))  # ids that are already in shards
            drop -= used
            end = len(ids)
            is_last = False
            if cfg.max_tokens is not None:
                limit = used + cfg.max_tokens - meta.tokens - writer.count
                is_last = limit <= len(ids)
                end = min(end, limit)
            meta.skipped_rows = batch.after["skipped"]
            meta.duplicates = batch.after.get("duplicates", 0)
            writer.add(ids[:end], used, before)
            before = batch.after
            documents += len(batch.texts) - batch.continues
            bar.update(len(ids) - used)
            bar.set_postfix_str(f"{documents:,} documents", refresh=False)
            if is_last:
                break
        else:
            if drop:
                raise BadInput(f"{job.out}/ cannot be continued: the source has become shorter; "
                               "restore it, or give another --out")
        writer.finish()
    print(f"{meta.tokens:,} tokens after {time.perf_counter() - started:.1f} s")


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """Lock the folder while its shards are made. Messages of errors and Ctrl-C say how to continue.
    """
    remedy = "give another --out"
    try:
        lock = locked(out, f"wait until it is done, or {remedy}")
        with new_folder(out, remedy), lock, heartbeat(out):
            yield
    except KeyboardInterrupt as interrupt:
        # its frames may refer to a pyarrow reader, which aborts at exit
        traceback.clear_frames(interrupt.__traceback__)
        raise KeyboardInterrupt(f"stopped: the shards in {out}/ are complete; "
                                "the same command continues after them") from None
    except OSError as error:
        if error.filename is None:  # the console's
            raise
        if error.errno in DISK_FULL:
            raise BadInput(f"the disk of {out}/ is full: free some space and run the same command "
                           "again; complete shards are kept") from error
        raise BadInput(f"cannot write {out}/ ({error}): {remedy}") from error


# --------------------------------------------------------------------------------------------------
# What is printed


def corpus_of(cfg: Config) -> HubCorpus | None:
    """The row of TEXTS for --source and --name; without sizes if only the dataset is known; None if
    neither is known."""
    if cfg.docstrings:
        return None
    rows = [row for row in TEXTS.values() if (row.source,) == cfg.source]
    for row in rows:
        if row.name == cfg.name:
            return row
    return rows[0]._replace(name=cfg.name, tokens=None, disk=None) if rows else None


def print_corpora(source: str) -> None:
    """Print what is known about a dataset."""
    for row in CORPORA:
        if row.source == source:
            print(row)


def expect_tokens(cfg: Config, source: Source) -> float | None:
    """Print what is known about the source -> the approximate number of tokens to write, None if
    unknown."""
    row = corpus_of(cfg)
    if row:
        print(row)
    in_source = row.tokens if row and row.tokens else source.guess_tokens()
    return min(filter(None, (cfg.max_tokens, in_source)), default=None)


def promise_train_tokens(cfg: Config, text: TokenizedText, layout: Layout,
                         meta: Meta) -> int | None:
    """The train tokens that the finished folder will have, None if unknown: --max_tokens, or the
    size on the card of a corpus. The size of local files says too little."""
    row = corpus_of(cfg)
    total = row.tokens if row and cfg.tokenizer == "gpt2" else None
    if cfg.max_tokens is not None:
        in_source = total or text.source.guess_tokens()
        if not in_source or cfg.max_tokens <= in_source:
            total = cfg.max_tokens
    elif cfg.dedup:  # it drops an unknown share
        total = None
    if total is None:
        return None
    val = meta.split("val").tokens or layout.val_size
    return int(total - val) if total > val else None


def warn_of_large_val(cfg: Config, meta: Meta, total: float | None) -> None:
    if cfg.val_tokens is not None or meta.tokens or not total:
        return
    if cfg.shard_size <= total < 5 * cfg.shard_size:
        print(f"warning: the first {cfg.shard_size:,} of about {total:,} tokens go to validation: "
              "give --val_tokens for fewer")


def is_finished(job: Job, meta: Meta | None) -> bool:
    """Whether the folder has everything that the flags ask for, complete. If so, prints a summary.
    """
    if meta is None or (job.request and not job.request.is_met(meta)):
        return False
    if not is_complete(job.out, meta):
        return False
    print_summary(job, meta)
    return True


def print_summary(job: Job, meta: Meta) -> None:
    """Print the size of a complete folder, and what was left out."""
    splits = ", ".join(f"{split} {amount(meta.split(split))}" for split in SPLITS)
    line = f"{job.out}/ is complete: {splits}; tokenizer {meta.tokenizer}"
    if not job.request:
        line += f"; {meta.skipped_rows:,} rows skipped (without text)"
    if job.cfg.dedup:
        line += f"; {meta.duplicates:,} duplicates left out"
    print(line)
    if meta.documents < 3 and meta.split("val").shards:
        print(f"warning: the source has fewer than 3 documents ({meta.documents}): validation says "
              "little about other text", file=sys.stderr)


def amount(split: Split) -> str:
    """The size of a split as text. A document counts where it starts, so a split that lies within
    one document has none."""
    if not split.documents:
        return f"{split.tokens:,} tokens"
    return f"{split.tokens:,} tokens of {split.documents:,} documents"


if __name__ == "__main__":
    run(main)
