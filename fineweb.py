"""Any text -> shards of token ids, FineWeb-edu (Penedo et al. 2024,
https://arxiv.org/abs/2406.17557) by default.

    python fineweb.py                                              # 10B tokens of FineWeb-edu -> edu_fineweb10B/
    python fineweb.py --preset fineweb-edu-100BT                   # 100B tokens -> edu_fineweb100B/
    python fineweb.py --preset wikipedia --name 20231101.de        # another language of a preset
    python fineweb.py --source a.parquet more/ "*.jsonl.zst" --out mine --tokenizer cl100k_base
    python fineweb.py --docstrings --tokenizer bpe:4096            # needs no download -> docstrings/
    python fineweb.py --pretokenized fineweb-10BT --shards 8       # shards that others have made -> fineweb10B-gpt2/

A shard is a one-dimensional .npy of uint16 ids (uint32 when the vocabulary needs it), the
end-of-text id before each document, named <prefix>_{val|train}_<index>.npy; meta.json beside the
shards says what made them. Text is read as a stream and encoded by threads (tiktoken releases the
interpreter lock), so memory stays flat on every platform. The same command given again continues
after the last whole shard of an interrupted run, and writes anew what is missing or damaged.
"""

import lib.startup  # noqa: F401 (before torch)

# isort: split

import ast
import contextlib
import importlib.util
import json
import os
import re
import shlex
import sys
import sysconfig
import time
import traceback
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from lib import hub
from lib.cli import BadInput, flag, parse, path_flag, run
from lib.files import DISK_FULL, check_room, locked, move, new_folder, open_file, read_text, replace, write_json
from lib.shards import (
    SPLITS,
    Meta,
    Record,
    Shards,
    Split,
    Start,
    check_eot,
    check_ids,
    check_tokenizer,
    check_tokenizer_file,
    find_shards,
    missing_records,
    read_meta,
    read_shard,
    split_of,
)
from lib.text import Seen, Source, find_parts, is_local
from lib.tokenizers import BPE_TEXT, MAX_BPE, load_tokenizer, train_bpe

FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"


class Hub(NamedTuple):
    """A dataset of the hub. Licence and sizes: from its card or the source noted, not counted here;
    None: not known."""
    preset: str
    source: str
    name: str | None
    text_column: str | None  # None: shards of gpt2, nothing to tokenize
    licence: str
    tokens: float | None     # as gpt2 counts; in shards, 2 bytes each
    disk: float | None       # bytes of its files on the hub

    def __str__(self):
        tokens, disk = "tokens not known", "size on the hub not known"
        if self.tokens:
            tokens = f"about {self.tokens / 1e9:,.4g}B tokens, {2 * self.tokens / 1e9:,.4g} GB of shards with gpt2"
        if self.disk:
            disk = f"about {self.disk / 1e9:,.4g} GB on the hub"
        return f"{self.source}, {self.name or 'default'}: {tokens}; {disk}; licence {self.licence}"


CORPORA = (  # --name takes another language, as the card of the dataset lists them
    # the card; its 1.3T are those of version 1.0.0, crawls were added since
    Hub("fineweb-edu-10BT", FINEWEB_EDU, "sample-10BT", "text", "ODC-By 1.0", 10e9, None),
    Hub("fineweb-edu-100BT", FINEWEB_EDU, "sample-100BT", "text", "ODC-By 1.0", 100e9, None),
    Hub("fineweb-edu-350BT", FINEWEB_EDU, "sample-350BT", "text", "ODC-By 1.0", 350e9, None),
    Hub("fineweb-edu", FINEWEB_EDU, "default", "text", "ODC-By 1.0", 1300e9, None),
    # github.com/huggingface/fineweb-2, fineweb2-language-distribution.csv: 262e9 words,
    # 772,108,850,771 bytes of parquet
    Hub("fineweb-2", "HuggingFaceFW/fineweb-2", "deu_Latn", "text", "ODC-By 1.0", None, 772.1e9),
    # 11,630,929,031 bytes of parquet in 41 files, as others quote the card
    Hub("wikipedia", "wikimedia/wikipedia", "20231101.en", "text", "CC BY-SA 3.0, GFDL", None,
        11.63e9),
    # 48,284 books; bytes as projects that download them report
    Hub("books", "sedthh/gutenberg_english", None, "TEXT",
        "MIT; the books are in the public domain of the US", None, 10.75e9),
    # nvidia/Nemotron-ClimbMix shuffled, its licence and tokens; 6,543 files of about 100 MB:
    # nanochat, runs/speedrun.sh
    Hub("climbmix", "karpathy/climbmix-400b-shuffle", None, "text", "CC BY-NC 4.0", 400e9, 650e9),
    # .bin shards: one to validate, then those to train; 100M tokens in each, fewer in the last one
    # 1 + 102 shards and 55,324,043 tokens: github.com/swookey-thinky/minllm,
    # minllm/datasets/fineweb.py
    Hub("fineweb-10BT", "kjj0/fineweb10B-gpt2", None, None, "MIT; the text is FineWeb's, ODC-By",
        10_355_324_043, 20.71e9),
    # 1 + 1,030 shards: modded-nanogpt, data/cached_fineweb100B.py; other scripts download 1,028
    Hub("fineweb-100BT", "kjj0/fineweb100B-gpt2", None, None, "MIT; the text is FineWeb's, ODC-By",
        103e9, 206e9),
    # 1 + 98 shards and 53,989,344 tokens, as projects that read them report; modded-nanogpt
    # downloads 1 + 99 as well
    Hub("fineweb-edu-10BT", "kjj0/finewebedu10B-gpt2", None, None,
        "not stated; the text is FineWeb-edu's, ODC-By 1.0", 9_953_989_344, 19.91e9),
    # 1 + 1,001 shards: llm.c, dev/data/edu_fineweb.sh
    Hub("fineweb-edu-100BT", "karpathy/fineweb-edu-100B-gpt2-token-shards", None, None, "ODC-By",
        100.2e9, 200.4e9),
)
HUB = {row.preset: row for row in CORPORA if row.text_column}
PRETOKENIZED = {row.preset: row.source for row in CORPORA if not row.text_column}
DOCSTRINGS = "docstrings.jsonl"
DOCSTRING_PACKAGES = ("numpy", "torch", "pandas", "networkx", "sympy"
                      )  # the wordiest packages that requirements.txt installs
LARGEST = 1_000_000_000      # tokens per shard; a shard is made in memory


@dataclass
class Config:
    preset: Literal[tuple(HUB)] | None = flag(
        None, "a corpus of the hub: sets --source, --name and --text_column")
    source: tuple[str, ...] = path_flag((FINEWEB_EDU,), "a dataset id, or local files, folders and globs of "
                                        "parquet, jsonl(.gz|.zst) or txt, read in the order given; a .txt is one document")
    name: str | None = flag(
        None,
        "configuration of the dataset; FineWeb-edu: sample-10BT, sample-100BT, sample-350BT, ...")
    text_column: str = flag("text", "column that holds the text")
    dedup: bool = flag(False, "leave out documents met before, told by a hash, in about 1.1 GB of memory; "
                       "a .txt is read as it is")
    pretokenized: str | None = flag(None, f"download shards instead of making them: {', '.join(PRETOKENIZED)}, or a dataset of "
                                    "the hub that holds .npy or .bin shards, as id or id:folder or id:pattern")
    shards: int | None = flag(
        None,
        "train shards that --pretokenized downloads; without it, all, or enough for --max_tokens",
        at_least=1)
    docstrings: bool = flag(
        False, "the documentation strings of this Python's packages, instead of a source")
    tokenizer: str = path_flag("gpt2", "a tiktoken name, a tokenizer.json, or bpe:4096 to train one of 4096 ids on the source; "
                               "of --pretokenized shards, theirs, where they bring no meta.json")
    out: str | None = path_flag(None, "folder of the shards; without it, named after the source")
    shard_size: int = flag(100_000_000, "tokens per shard", at_least=1, at_most=LARGEST)
    val_tokens: int | None = flag(None, "tokens of the validation shard, the first; without it, one shard, or a tenth of a "
                                  "source that is smaller", at_least=0, at_most=LARGEST)
    max_tokens: int | None = flag(
        None, "stop after this many tokens; --pretokenized: after the shard that reaches them",
        at_least=2)
    workers: int | None = flag(None, "encoding threads; without it, one per core", at_least=1,
                               at_most=1024)


def configured(argv):
    """The command line -> a complete Config and the names given."""
    presets = {
        name: dict(source=(hub.source,), name=hub.name, text_column=hub.text_column)
        for name, hub in HUB.items()
    }
    (cfg,), given = parse((Config,), argv, __doc__, presets)
    complete_config(cfg, given)
    return cfg, given


def main(argv):
    cfg, given = configured(argv)
    out = Path(cfg.out)
    meta = read_own_meta(out, cfg)
    if is_enough(cfg, meta) and is_done(out, meta):
        return
    parts = [str(out / DOCSTRINGS)]
    if not (cfg.pretokenized or cfg.docstrings):
        parts, left_out = find_parts(cfg.source, cfg.text_column)
        for line in left_out:
            print(line)
    if "name" in given and any(map(is_local, parts)):
        raise BadInput(
            "--name is a configuration of a dataset of the hub: leave it out with local files")
    with writing(out):
        meta = read_own_meta(out, cfg)  # another process may have gone on in the meantime
        if cfg.pretokenized:
            meta = download_shards(cfg, out, meta, given)
        else:
            meta = make_shards(cfg, out, parts, meta, given)
        is_done(out, meta)


def make_shards(cfg, out, parts, meta, given):
    """Text -> shards; `meta` says how far an earlier run came. Returns the Meta of the whole
    folder."""
    if cfg.docstrings:
        extract_docstrings(out)
    source = Source(cfg, parts, Seen(out / "hashes.bin") if cfg.dedup else None)
    tokenizer = find_tokenizer(cfg, out, source, meta)
    if not meta or not meta.shards:
        meta = new_meta(cfg, tokenizer, given)
    if not all(map(is_local, parts)):  # a run goes on in the text that it began with
        source.commits = meta.settings["commits"] = source.commits | meta.settings.get(
            "commits", {})
    for record in missing_records(out, meta):
        write_again(out, source, tokenizer, meta, record, cfg.workers)
    if not meta.complete:
        write_shards(cfg, out, source, tokenizer, meta)
    return meta


@contextlib.contextmanager
def writing(out):
    """Hold the folder while its shards are made. What ends that early says how to go on."""
    try:
        with new_folder(out, "give another --out"), locked(
                out, "wait until it is done, or give another --out"):
            yield
    except KeyboardInterrupt as interrupt:
        traceback.clear_frames(
            interrupt.__traceback__)  # they may hold a reader of pyarrow, which aborts at exit
        raise KeyboardInterrupt(
            f"stopped: the shards in {out}/ are whole; the same command continues after them"
        ) from None
    except OSError as error:
        if error.filename is None:  # the console's
            raise
        if error.errno in DISK_FULL:
            raise BadInput(f"the disk of {out}/ is full: free some space and give the same command again; "
                           "the shards already there stay") from error
        raise BadInput(f"cannot write {out}/ ({error}): give another --out") from error


def complete_config(cfg, given):
    """Fill in what follows from other flags. Raises BadInput if they contradict each other."""
    if cfg.pretokenized:
        complete_pretokenized(cfg, given)
    elif cfg.shards:
        raise BadInput(
            "--shards counts the shards that --pretokenized downloads: give both, or --max_tokens")
    if len(given & {"docstrings", "source", "preset"}) > 1 or (cfg.docstrings and "name" in given):
        raise BadInput(
            "--preset, --docstrings and --source (with its --name) each name the text: give one of them"
        )
    if cfg.tokenizer.startswith("bpe:") and not re.fullmatch("bpe:[0-9]{1,9}", cfg.tokenizer):
        raise BadInput(
            f"--tokenizer {cfg.tokenizer[:80]}: write bpe:<number of ids>, as in bpe:4096, at most {MAX_BPE:,}"
        )
    if cfg.source == (FINEWEB_EDU,) and not cfg.docstrings:
        cfg.name = cfg.name or "sample-10BT"
        cfg.out = cfg.out or f"edu_fineweb{'' if cfg.name == 'default' else cfg.name.removeprefix('sample-').removesuffix('T')}"
    if cfg.docstrings:
        cfg.out = cfg.out or "docstrings"
    if cfg.preset and not cfg.out:
        cfg.out = "_".join(filter(None, (cfg.preset, cfg.name)))
    if not cfg.out:
        cfg.out = Path(cfg.source[0]).name.split(".")[0].replace("*", "") or "shards"
        cfg.out += "_shards" if os.path.isdir(cfg.out) and cfg.out in map(
            os.path.normpath, cfg.source) else ""
    out = Path(cfg.out).resolve()
    if odd := [
            source for source in cfg.source
            if os.path.isdir(source) and Path(source).resolve() in (out, *out.parents)
    ]:
        raise BadInput(
            f"--out {cfg.out} is in the folder {odd[0]} that --source reads: give another --out")
    cfg.workers = cfg.workers or min(os.cpu_count(), 1024)


def complete_pretokenized(cfg, given):
    allowed = {"pretokenized", "shards", "max_tokens", "tokenizer", "out"}
    if odd := [field.name for field in fields(cfg) if field.name in given - allowed]:
        raise BadInput(f"--pretokenized downloads shards as they are: leave out --{odd[0]}")
    if len(given & {"shards", "max_tokens"}) > 1:
        raise BadInput("--shards and --max_tokens both say how much to download: give one of them")
    if cfg.tokenizer.startswith("bpe:"):
        raise BadInput(
            "--pretokenized shards have a tokenizer already: name it by --tokenizer, or leave that out"
        )
    cfg.pretokenized = PRETOKENIZED.get(cfg.pretokenized, cfg.pretokenized)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(:.+)?", cfg.pretokenized):
        raise BadInput(f"--pretokenized {cfg.pretokenized[:80]}: name one of {', '.join(PRETOKENIZED)}, "
                       "or a dataset of the hub as owner/name")
    cfg.out = cfg.out or cfg.pretokenized.partition(":")[0].partition("/")[2]


# ----------------------------------------------------------------------------------------------------------------------
# meta.json: what made the shards, how far it came


def settings(cfg):
    """What must be equal for a run to continue another's shards."""
    if cfg.pretokenized:
        return {"pretokenized": cfg.pretokenized}
    source = "docstrings" if cfg.docstrings else list(cfg.source)
    return {
        "pretokenized": None, "source": source, "name": cfg.name, "text_column": cfg.text_column,
        "shard_size": cfg.shard_size, "val_tokens": cfg.val_tokens, "max_tokens": cfg.max_tokens,
        "tokenizer_flag": cfg.tokenizer, "dedup": cfg.dedup
    }


def new_meta(cfg, tokenizer, given):
    return Meta(tokenizer="tokenizer.json" if tokenizer.is_trained else tokenizer.spec,
                tokenizer_crc32=zlib.crc32(tokenizer.spec.encode()),
                vocab_size=tokenizer.vocab_size, eot=tokenizer.eot,
                dtype="uint16" if tokenizer.vocab_size <= 2**16 else "uint32",
                splits={split: Split() for split in SPLITS}, command=command_of(cfg, given),
                settings=settings(cfg), shards=[], complete=False, resume=Start())


def command_of(cfg, given):
    """The command line that makes the same shards, without --out."""
    words = ["python", "fineweb.py"]
    for name in [field.name for field in fields(cfg) if field.name in given - {"out", "workers"}]:
        value = getattr(cfg, name)
        if isinstance(value, bool):
            words += [f"--{name}"] * value
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    return shlex.join(words)


def read_own_meta(out, cfg):
    """The Meta of a folder, None if it has none. Raises BadInput if its shards were made by
    anything but this command."""
    meta = read_meta(out)
    if meta is None:
        paths, _ = find_shards(out)
        if shards := paths["val"] + paths["train"]:
            raise BadInput(
                f"{out}/ holds shards of another program ({shards[0].name}): give another --out")
        if cfg.tokenizer.startswith("bpe:"):
            check_tokenizer_place(out, meta)
        return None
    if meta.settings is None:
        raise BadInput(
            f"{out}/ holds shards of another program, says its meta.json: give another --out")
    for key, value in settings(cfg).items():
        made = meta.settings.get(key, False if key == "dedup" else None)  # older folders do not say
        if made != value and not (key == "tokenizer_flag" and is_same_file(value, meta)):
            then, now = (as_flag("tokenizer" if key == "tokenizer_flag" else key, setting)
                         for setting in (made, value))
            raise BadInput(
                f"{out}/ holds shards made with {then}, not with {now}: give another --out")
    if meta.shards is None and not meta.complete:
        raise BadInput(f"{out}/ was begun by an older fineweb.py, whose meta.json does not say how to continue: "
                       "give another --out")
    return meta


def check_tokenizer_place(out, meta, tokenizer=None):
    """Raises BadInput if the folder holds a tokenizer.json that is neither its own nor
    `tokenizer`'s.

    It may have cost hours to train, and shards elsewhere may need it.
    """
    path = out / "tokenizer.json"
    if not os.path.lexists(path):
        return
    ours = [meta.tokenizer_crc32] if meta else []
    if tokenizer:
        ours.append(zlib.crc32(tokenizer.spec.encode()))
    if zlib.crc32(read_text(path, "give another --out").encode()) not in ours:
        raise BadInput(f"{path} was made by another command and would be replaced: give another --out, "
                       f"or --tokenizer {path} to use it")


def as_flag(name, value):
    """A setting as it stands on a command line."""
    if value is None or value is False:
        return f"no --{name}"
    return f"--{name}" if value is True else f"--{name} {' '.join(value) if isinstance(value, list) else value}"


def is_same_file(tokenizer, meta):
    """Whether --tokenizer is the path of the tokenizer.json that a Meta's shards were made with,
    wherever it lay then."""
    return os.path.exists(tokenizer) and zlib.crc32(
        load_tokenizer(tokenizer).spec.encode()) == meta.tokenizer_crc32


def own_tokenizer(out, meta):
    """The Tokenizer of the shards of a folder. Raises BadInput if it is gone or another."""
    kept = meta.tokenizer.endswith(".json")
    if kept:
        check_tokenizer_file(out / meta.tokenizer, meta)
    tokenizer = load_tokenizer(str(out / meta.tokenizer) if kept else meta.tokenizer)
    check_tokenizer(meta, tokenizer)
    return tokenizer


def amount(split):
    """A split's size as text. A document counts where it begins: a split within one has none."""
    documents = f" of {split.documents:,} documents" if split.documents else ""
    return f"{split.tokens:,} tokens{documents}"


def is_done(out, meta):
    """Whether every shard is there and whole; says so."""
    if not meta or not meta.complete:
        return False
    if meta.shards is None:  # of an older fineweb.py: it can be checked, not mended
        Shards(out)
    elif missing_records(out, meta):
        return False
    if meta.tokenizer.endswith(".json"):  # another would be on the network
        own_tokenizer(out, meta)
    text = ", ".join(f"{split} {amount(stats)}" for split, stats in meta.splits.items())
    settings = meta.settings or {}
    print(f"{out}/ is complete: {text}; tokenizer {meta.tokenizer}"
          + f"; {meta.skipped_rows:,} rows skipped (without text)"
          * (not settings.get("pretokenized"))
          + f"; {meta.duplicates:,} duplicates left out" * bool(settings.get("dedup")))
    documents = sum(split.documents for split in meta.splits.values())
    if documents < 3 and meta.splits["val"].shards:
        print(
            f"warning: the source has fewer than 3 documents ({documents}): validation says little about other text",
            file=sys.stderr)
    return True


# ----------------------------------------------------------------------------------------------------------------------
# Shards that others have made


def is_enough(cfg, meta):
    """Whether meta.json counts what the flags ask for; shards beyond that stay."""
    if not meta or not cfg.pretokenized:
        return True
    train = meta.splits["train"].shards
    if cfg.shards:
        return train >= cfg.shards
    written = sum(split.tokens for split in meta.splits.values())
    return train == meta.settings.get("train_shards") or bool(cfg.max_tokens and train
                                                              and written >= cfg.max_tokens)


def download_shards(cfg, out, meta, given):
    """Shards of the hub -> the folder, each checked before it gets its name, and counted in
    meta.json. Returns the Meta.

    A folder begun earlier, also with fewer shards, is continued from the same commit of the
    dataset.
    """
    name, _, pattern = cfg.pretokenized.partition(":")
    dataset = hub.find_dataset(name, pattern, meta and meta.settings.get("commit"))
    val, train = dataset.shards["val"], dataset.shards["train"]
    if cfg.shards and cfg.shards > len(train):
        raise BadInput(
            f"{cfg.pretokenized} holds {len(train):,} train shards: lower --shards {cfg.shards:,}")
    theirs, tokenizer = find_their_tokenizer(cfg, out, dataset, meta, given)
    meta = meta or new_meta(cfg, tokenizer, given)
    meta.settings |= {"commit": dataset.commit, "train_shards": len(train)}
    meta.command = command_of(cfg, given)

    missing = {record.name for record in missing_records(out, meta)}
    there = {record.name for record in meta.shards} - missing
    files = val + [
        file for i, file in enumerate(train)
        if cfg.shards is None or i < cfg.shards or file.name in missing
    ]
    ends = np.cumsum([file.size // 2 for file in files])  # in tokens: about, and never too few
    count = max(len(val) + 1,
                int(np.searchsorted(ends, cfg.max_tokens)) + 1) if cfg.max_tokens else len(files)
    needed = [file.size for file in files[:count] if file.name not in there]
    for row in CORPORA:
        if row.source == name:
            print(row)
    print(
        f"{name} at commit {dataset.commit[:7]}: {len(needed):,} shards to download, {sum(needed) / 1e9:.1f} GB"
    )
    check_room(out, sum(needed) + 2**20, f"downloading {len(needed):,} shards",
               "free some space, ask for fewer by --shards, or give another --out")

    sizes = tokenizer.token_bytes()
    for file in tqdm(files, total=count, desc=name, unit="shard", disable=None):
        if file.name in missing or (file.name not in there and not is_enough(cfg, meta)):
            take_shard(out, dataset, file, meta, (tokenizer, sizes, theirs))
    meta.complete, meta.resume = True, None
    write_json(out / "meta.json", asdict(meta))
    hub.forget(out)
    return meta


def find_their_tokenizer(cfg, out, dataset, meta, given):
    """(The Meta beside the shards on the hub, or None; their tokenizer, kept in the folder if it is
    not a tiktoken name)."""
    odd, theirs = f"{dataset.id} cannot be used as it is: name another dataset, or tokenize text with --source", None
    if "meta.json" in dataset.beside:
        theirs = read_meta(hub.download(dataset, dataset.beside["meta.json"], out).parent, odd)
    spec = theirs.tokenizer if theirs else cfg.tokenizer
    if theirs and spec == "tokenizer.json" and spec in dataset.beside:
        tokenizer = load_tokenizer(str(hub.download(dataset, dataset.beside[spec], out)))
    elif theirs and not re.fullmatch(r"[\w-]+", spec):  # a path would be one of this machine
        raise BadInput(
            f"the meta.json of {dataset.id} names the tokenizer {spec[:80]}, which does not lie beside it: {odd}"
        )
    elif meta and "tokenizer" not in given:
        tokenizer = own_tokenizer(out, meta)
    else:
        tokenizer = load_tokenizer(spec)
    if "tokenizer" in given and load_tokenizer(cfg.tokenizer).spec != tokenizer.spec:
        raise BadInput(f"the meta.json of {dataset.id} says that its tokenizer is {spec}, not {cfg.tokenizer}: "
                       "leave --tokenizer out")
    check_tokenizer(theirs, tokenizer, odd)
    check_tokenizer(meta, tokenizer)
    if tokenizer.is_trained:
        check_tokenizer_place(out, meta, tokenizer)
        tokenizer.save(out / "tokenizer.json")
    return theirs, tokenizer


def take_shard(out, dataset, file, meta, known):
    """Bring one file of the hub here, check every id of it, then give it its name and a place in
    `meta`."""
    (tokenizer, sizes, theirs), path = known, out / file.name
    if not (path.is_file()
            and hub.is_whole(path, file)):  # else a run was killed before it could note it
        path = hub.download(dataset, file, out)
    odd = f"name the tokenizer of {dataset.id} by --tokenizer, or name another dataset"
    ids = read_shard(path, odd)
    check_ids(ids, tokenizer.vocab_size, path, odd)
    check_eot(ids, tokenizer, path, odd)
    if not meta.shards:
        meta.dtype = ids.dtype.name
    if ids.dtype != meta.dtype:
        raise BadInput(f"{file.path} of {dataset.id} holds {ids.dtype}, others hold {meta.dtype}: "
                       f"they are of different tokenizers; choose a folder, as in {dataset.id}:folder")
    record = Record(file.name, len(ids), zlib.crc32(ids), Start())
    listed = {told.name: told for told in [*(theirs and theirs.shards or ()), *meta.shards]}
    told = listed.get(file.name, record)
    if (told.tokens, told.crc32) != (record.tokens, record.crc32):
        raise BadInput(
            f"{file.path} of {dataset.id} is not the shard that meta.json lists: name another dataset"
        )

    if file.name in {listed.name for listed in meta.shards}:  # it was missing or damaged
        move(path, out / file.name)
    else:
        counts = sum(
            np.bincount(ids[i:i + 2**20], minlength=len(sizes)) for i in range(0, len(ids), 2**20))
        meta.complete, meta.resume = False, Start()
        write_json(out / "meta.json",
                   asdict(meta))  # a run killed right after its first shard must find whose it is
        move(path, out / file.name)
        stats = meta.splits[split_of(file.name)]
        stats.shards, stats.tokens = stats.shards + 1, stats.tokens + len(ids)
        stats.documents, stats.bytes = stats.documents + int(
            counts[tokenizer.eot]), stats.bytes + int(counts @ sizes)
        meta.shards.append(record)
        write_json(out / "meta.json", asdict(meta))
    tqdm.write(
        f"{file.name}: {sum(split.tokens for split in meta.splits.values()):,} tokens so far")


# ----------------------------------------------------------------------------------------------------------------------
# Documentation strings, for want of other text


def extract_docstrings(out):
    """Docstrings of the standard library and DOCSTRING_PACKAGES, one document per module, cached in
    a jsonl file.

    Real English of several MB that every Python brings along: enough to see a small model learn.
    """
    path = out / DOCSTRINGS
    if os.path.lexists(path):
        open_file(path, "give another --out").close()
        return
    roots = [Path(sysconfig.get_path("stdlib"))]
    for package in DOCSTRING_PACKAGES:
        spec = importlib.util.find_spec(
            package)  # finds it, also in the system's site-packages, without importing it
        roots += [Path(spec.origin).parent] if spec and spec.origin else []
    unwanted = {"test", "tests", "testing", "site-packages", "dist-packages"}
    modules = sorted({
        p for root in roots for p in root.rglob("*.py")
        if not unwanted & set(p.relative_to(root).parts)
    })
    seen, documents = set(), []
    for module in tqdm(modules, desc="docstrings", unit="module", disable=not sys.stderr.isatty()):
        try:
            tree = ast.parse(module.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError, RecursionError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        strings = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        new = [s for s in dict.fromkeys(strings) if s and len(s) > 100 and s not in seen]
        seen.update(new)
        if new:
            documents.append("\n\n".join(new))
    order = np.random.default_rng(0).permutation(
        len(documents))  # validation is the first part: let it be of all packages
    lines = "".join(json.dumps({"text": documents[i]}) + "\n" for i in order)
    replace(path, lambda file: file.write(lines.encode()))


# ----------------------------------------------------------------------------------------------------------------------
# Encoding and writing


def find_tokenizer(cfg, out, source, meta):
    """The --tokenizer; bpe:<n> is trained on the source once. The Writer keeps a trained one beside
    meta.json."""
    if meta and meta.shards:
        return own_tokenizer(out, meta)
    if not cfg.tokenizer.startswith("bpe:"):
        tokenizer = load_tokenizer(cfg.tokenizer)
        if tokenizer.is_trained:
            check_tokenizer_place(out, meta, tokenizer)
        return tokenizer
    check_tokenizer_place(out, meta)
    print(f"training a BPE of {cfg.tokenizer[4:]} ids")
    return train_bpe(source.texts(BPE_TEXT), int(cfg.tokenizer[4:]))


def encode(batch, tokenizer, dtype):
    """A Batch -> its ids, the end-of-text id before each document."""
    eot = np.array([tokenizer.eot])
    pieces = [piece for text in batch.texts for piece in (eot, tokenizer.encode(text))]
    return np.concatenate([np.empty(0, dtype), *pieces[1 if batch.continues else 0:]]).astype(dtype)


def encoded(batches, tokenizer, dtype, workers):
    """Stream of (Batch, its ids), in order; a bounded number of batches is in progress at a time.
    """
    executor, waiting, failure = ThreadPoolExecutor(workers), deque(), None
    try:
        while True:
            try:
                batch = next(batches, None)
            except Exception as error:  # a damaged file, say: what stands before the damage still goes into shards
                batch, failure = None, error
            if batch:
                waiting.append((batch, executor.submit(encode, batch, tokenizer, dtype)))
            elif not waiting:
                break
            if not batch or len(waiting) > 3 * workers:
                batch, future = waiting.popleft()
                yield batch, future.result()
        if failure:
            raise failure
    finally:
        batches.close()
        executor.shutdown(cancel_futures=True)


class Writer:
    """Cuts the stream of ids into shards, and keeps meta.json up to date with the last whole one.
    """

    def __init__(self, cfg, out, tokenizer, meta):
        self.out, self.tokenizer, self.meta = out, tokenizer, meta
        self.prefix = "edufineweb" if cfg.source == (
            FINEWEB_EDU,) and not cfg.docstrings else out.resolve().name
        self.val_size = cfg.shard_size if cfg.val_tokens is None else cfg.val_tokens
        self.val_given, self.shard_size = cfg.val_tokens is not None, cfg.shard_size
        self.dtype, self.sizes = np.dtype(meta.dtype), tokenizer.token_bytes()
        self.pieces, self.count = [], 0

    @property
    def written(self):
        return sum(split.tokens for split in self.meta.splits.values())

    @property
    def shard(self):
        """(split, tokens) of the shard in progress: the first one is the validation shard."""
        is_val = self.val_size and not self.meta.splits["val"].shards
        return ("val", self.val_size) if is_val else ("train", self.shard_size)

    def add(self, ids, used, before):
        """Take the ids of one batch after the first `used`; `before` is where the source stood
        before the batch."""
        split, size = self.shard
        while (rest := len(ids) - used - size
               + self.count) >= 0 and (rest or split == "train"):  # val leaves some for train
            end = used + size - self.count
            self._write(split, np.concatenate([*self.pieces, ids[used:end]]), Start(before, end))
            self.pieces, self.count, used = [], 0, end
            split, size = self.shard
        self.pieces.append(ids[used:])
        self.count += len(ids) - used

    def finish(self):
        """Write what is left as the last shard. A source that never filled the first shard gives a
        tenth to validation."""
        rest = np.concatenate([np.empty(0, self.dtype), *self.pieces])
        if not len(rest) and not self.written:
            raise BadInput("the source holds no documents: nothing was written; check --source and --text_column "
                           f"({self.meta.skipped_rows:,} rows were without text)")
        if self.val_size and not self.meta.splits["val"].shards:
            if self.val_given:
                raise BadInput(f"--val_tokens {self.val_size:,} leaves nothing of the source's {len(rest):,} tokens for "
                               "training: lower it")
            if len(rest) < 2:
                raise BadInput(
                    "the source holds a single token, too few to train and validate: give more text"
                )
            starts = np.flatnonzero(
                rest == self.tokenizer.eot)  # cut between two documents if there is a good place
            tenth = max(len(rest) // 10, 1)
            near = starts[(starts >= tenth) & (starts <= 2 * tenth)]
            cut = int(near[0]) if len(near) else tenth
            self._write("val", rest[:cut], Start(None, cut))
            rest = rest[cut:]
        if len(rest):
            self._write("train", rest, None)
        self.meta.complete, self.meta.resume = True, None
        write_json(self.out / "meta.json", asdict(self.meta))

    def _write(self, split, ids, resume):
        """Write one shard. resume: the Start of the next one; None after the very last."""
        if not self.written:  # a run killed right after its first shard must find whose it is
            write_json(self.out / "meta.json", asdict(self.meta))  # whose tokenizer.json comes next
            if self.tokenizer.is_trained:
                self.tokenizer.save(self.out / "tokenizer.json")
        name = f"{self.prefix}_{split}_{len(self.meta.shards):06d}.npy"
        save_shard(self.out / name, ids)
        counts = sum(
            np.bincount(ids[i:i + 2**20], minlength=self.tokenizer.vocab_size)
            for i in range(0, len(ids), 2**20))
        stats = self.meta.splits[split]
        stats.shards += 1
        stats.tokens += len(ids)
        stats.documents += int(counts[self.tokenizer.eot])
        stats.bytes += int(counts @ self.sizes)
        self.meta.shards.append(Record(name, len(ids), zlib.crc32(ids), self.meta.resume))
        self.meta.resume, self.meta.complete = resume, resume is None
        write_json(self.out / "meta.json", asdict(self.meta))
        tqdm.write(f"{name}: {self.written:,} tokens so far")


def save_shard(path, ids):
    def write(file):  # np.save would hide the errno of a full disk
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(ids))
        file.write(ids)

    replace(path, write)


def resume_point(source, start, tokens):
    """(place in the source, ids to drop behind it) of a Start, `tokens` ids into the stream.

    A place that an older fineweb.py noted cannot be read: all before it is read again, and dropped.
    """
    if source.understands(start.source):
        return start.source, start.drop
    return None, tokens


def write_again(out, source, tokenizer, meta, record, workers):
    """Make a shard that is missing or damaged from its own place in the source: the same ids, or
    BadInput."""
    print(f"{record.name} is missing or damaged: writing it again")
    earlier = sum(other.tokens for other in meta.shards[:meta.shards.index(record)])
    start, drop = resume_point(source, record.start, earlier)
    pieces, count = [np.empty(0, meta.dtype)], 0
    # keep=False: another source's documents would be taken for met before
    batches = source.batches(start, keep=False)
    with contextlib.closing(encoded(batches, tokenizer, np.dtype(meta.dtype), workers)) as stream:
        for _, ids in stream:
            pieces.append(ids[drop:][:record.tokens - count])
            count, drop = count + len(pieces[-1]), max(drop - len(ids), 0)
            if count == record.tokens:
                break
    ids = np.concatenate(pieces)
    if zlib.crc32(ids) != record.crc32:
        raise BadInput(f"{out / record.name} cannot be made again, as the source has changed: put the source back, or give "
                       "another --out")
    save_shard(out / record.name, ids)


def row_of(cfg):
    """The row of CORPORA that --source and --name are of; without sizes where only the dataset is
    one of them. None: neither is."""
    rows = [] if cfg.docstrings else [row for row in HUB.values() if (row.source,) == cfg.source]
    other = rows[0]._replace(name=cfg.name, tokens=None, disk=None) if rows else None
    return next((row for row in rows if row.name == cfg.name), other)


def write_shards(cfg, out, source, tokenizer, meta):
    """The whole job: read, encode, write, say how far it is; continue where `meta` says an earlier
    run stopped."""
    writer = Writer(cfg, out, tokenizer, meta)
    before, drop = resume_point(source, meta.resume, writer.written)
    if writer.written:
        print(f"continuing after {writer.written:,} tokens")
    row = row_of(cfg)
    if row:
        print(row)
    total = min(filter(None, (cfg.max_tokens, row and row.tokens or source.guess_tokens())),
                default=None)
    if cfg.val_tokens is None and not writer.written and total and cfg.shard_size <= total < 5 * cfg.shard_size:
        print(
            f"warning: the first {cfg.shard_size:,} of about {total:,} tokens go to validation: give --val_tokens for fewer"
        )
    documents, started = sum(split.documents for split in meta.splits.values()), time.perf_counter()
    with (contextlib.closing(encoded(source.batches(before), tokenizer, writer.dtype,
                                     cfg.workers)) as stream,
          tqdm(total=total, initial=writer.written, unit="tok", unit_scale=True, dynamic_ncols=True,
               mininterval=1.0, disable=None) as
          bar):  # None: no bar where nobody watches a terminal
        for batch, ids in stream:
            used = min(drop, len(ids))  # the first of these ids are in shards already
            end = None if cfg.max_tokens is None else used + cfg.max_tokens - writer.written - writer.count
            meta.skipped_rows, meta.duplicates = batch.after["skipped"], batch.after.get(
                "duplicates", 0)
            writer.add(ids[:end], used, before)
            before, drop = batch.after, drop - used
            documents += len(batch.texts) - batch.continues
            bar.update(len(ids) - used)
            bar.set_postfix_str(f"{documents:,} documents", refresh=False)
            if end is not None and end <= len(ids):
                break
        else:
            if drop:
                raise BadInput(
                    f"{out}/ cannot be continued: the source has become shorter; put it back, or give another --out"
                )
        writer.finish()
    print(f"{writer.written:,} tokens after {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    run(main)
