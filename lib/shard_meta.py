"""meta.json next to token shards: their tokenizer, how they were made, and the progress.

fineweb.py updates it after every shard, so the same command can continue an interrupted run.
Shards from other programs need none (GPT-2's tokenizer is assumed), or one written by hand that
names the tokenizer.
"""

import os
import re
import zlib
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lib.cli import BadInput, check, flag
from lib.files import read_json, read_text, write_json
from lib.tokenizers import Tokenizer, load_ids, load_tokenizer, names_ids

ENDING = re.compile(r"_(train|val)_[0-9]+\.(npy|bin)\Z")
SPLITS = ("val", "train")
OTHER_OUT = "give another --out"
OTHER = "give fineweb.py another --out"  # in messages that other scripts may print
WRITING = "writing"  # a file next to the shards while fineweb.py writes them, touched every BEAT
BEAT = 5.0           # seconds


def split_of(name: str) -> str | None:
    """"train" or "val"; None for a file that is not named like a shard."""
    ending = ENDING.search(name)
    if ending is None or name.startswith("."):
        return None
    return ending[1]


@dataclass
class Start:
    """Where a shard starts: `drop` ids after the position `source` of the text (None: its start).
    """
    source: dict | None = flag(None, None)
    drop: int = flag(0, None, at_least=0, at_most=2**53)


@dataclass
class Record:
    """One shard as listed in meta.json."""
    name: str = flag(MISSING, None)
    tokens: int = flag(MISSING, None, at_least=1, at_most=2**53)
    crc32: int = flag(MISSING, None, at_least=0, below=2**32)
    start: Start | None = flag(MISSING, None)


@dataclass
class Split:
    """Totals over the shards of a split; `bytes` of UTF-8 text."""
    shards: int = flag(0, None, at_least=0, at_most=2**53)
    tokens: int = flag(0, None, at_least=0, at_most=2**53)
    documents: int = flag(0, None, at_least=0, at_most=2**53)
    bytes: int = flag(0, None, at_least=0, at_most=2**53)


@dataclass
class Meta:
    """The content of meta.json. Written by hand, it only needs the tokenizer."""
    tokenizer: str = flag(MISSING, None)  # tokenizer.json next to it, a tiktoken name, or ids:N
    tokenizer_crc32: int | None = flag(None, None, at_least=0, below=2**32)  # of its spec
    vocab_size: int | None = flag(None, None, at_least=1, at_most=2**32)
    eot: int | None = flag(None, None, at_least=0, below=2**32)
    dtype: Literal["uint16", "uint32"] | None = flag(None, None)
    splits: dict | None = flag(None, None)    # split -> Split
    skipped_rows: int = flag(0, None, at_least=0, at_most=2**53)
    duplicates: int = flag(0, None, at_least=0, at_most=2**53)  # dropped by --dedup
    command: str | None = flag(None, None)    # what made the folder, without --out
    settings: dict | None = flag(None, None)  # must be equal for fineweb.py to continue
    shards: list | None = flag(None, None)    # of Record; None: from an older fineweb.py
    complete: bool = flag(True, None)
    resume: Start | None = flag(None, None)   # of the shard after the last one listed
    # train tokens that the finished folder will have, exact or from the dataset's card
    promised: int | None = flag(None, None, at_least=1, at_most=2**53)

    @property
    def records(self) -> list[Record]:
        """`shards`, empty where it is not known."""
        return self.shards or []

    @property
    def tokens(self) -> int:
        return sum(split.tokens for split in (self.splits or {}).values())

    @property
    def documents(self) -> int:
        return sum(split.documents for split in (self.splits or {}).values())

    def split(self, name: str) -> Split:
        """The totals of a split, zeros where they are not known."""
        return (self.splits or {}).get(name) or Split()

    def setting(self, name: str) -> Any:
        return (self.settings or {}).get(name)

    def add(self, record: Record, ids: np.ndarray, tokenizer: Tokenizer) -> None:
        """List a shard and add its content to the totals."""
        assert self.splits is not None and self.shards is not None
        counts = count_ids(ids, tokenizer.vocab_size)
        split = self.splits[split_of(record.name)]
        split.shards += 1
        split.tokens += len(ids)
        split.documents += int(counts[tokenizer.eot])
        split.bytes += int(counts @ tokenizer.token_bytes())
        self.shards.append(record)

    def write(self, folder: Path) -> None:
        write_json(folder / "meta.json", asdict(self))


def new_meta(tokenizer: Tokenizer, settings: dict[str, Any], command: str) -> Meta:
    """The Meta of a folder without shards."""
    return Meta(
        tokenizer="tokenizer.json" if tokenizer.is_trained else tokenizer.spec,
        tokenizer_crc32=crc32_of(tokenizer.spec),
        vocab_size=tokenizer.vocab_size,
        eot=tokenizer.eot,
        dtype="uint16" if tokenizer.vocab_size <= 2**16 else "uint32",
        splits={split: Split() for split in SPLITS},
        command=command,
        settings=settings,
        shards=[],
        complete=False,
        resume=Start(),
    )


def crc32_of(spec: str) -> int:
    return zlib.crc32(spec.encode())


def count_ids(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """How often each id occurs, int64 (vocab_size,)."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for i in range(0, len(ids), 2**20):  # bincount copies its input to int64
        counts += np.bincount(ids[i:i + 2**20], minlength=vocab_size)
    return counts


# --------------------------------------------------------------------------------------------------
# Read


def read_meta(folder: str | Path, remedy: str = OTHER) -> Meta | None:
    """The Meta of a folder, None without a meta.json. Raises BadInput, ending in `remedy`, if it
    cannot be read or is damaged."""
    path = Path(folder) / "meta.json"
    if not os.path.lexists(path):
        return None
    values = read_json(path, remedy)
    try:
        return _parse(values)
    except BadInput as error:
        raise BadInput(f"{path} is damaged ({error}): {remedy}") from error


def _parse(values: Any) -> Meta:
    """The object in a meta.json -> Meta. Raises BadInput."""
    if not isinstance(values, dict):
        raise BadInput("meta: not an object")
    values = dict(values)
    splits = values.get("splits")
    if isinstance(splits, dict):
        values["splits"] = {split: _typed(Split, splits.get(split)) for split in SPLITS}
    records = values.get("shards")
    if records is None:
        values["resume"] = None  # of an older fineweb.py, which cannot be continued
    elif isinstance(records, list):
        values["shards"] = [_record(record) for record in records]
    if values.get("resume") is not None:
        values["resume"] = _typed(Start, values["resume"])
    meta = _typed(Meta, values)
    if meta.shards is not None:
        _check_records(meta, meta.shards)
    return meta


def _record(values: Any) -> Record:
    if not isinstance(values, dict):
        raise BadInput("record: not an object")
    return _typed(Record, values | {"start": _typed(Start, values.get("start"))})


def _typed(cls: type, values: Any) -> Any:
    """A dict from JSON -> a dataclass, with types and bounds checked. Unknown keys are ignored.
    Raises BadInput."""
    if not isinstance(values, dict):
        raise BadInput(f"{cls.__name__.lower()}: not an object")
    known = {}
    for field in fields(cls):
        if field.name in values:
            known[field.name] = values[field.name]
        elif field.default is MISSING:
            raise BadInput(f"no {field.name}")
    config = cls(**known)
    check(config)
    return config


def _check_records(meta: Meta, records: list[Record]) -> None:
    """Raises BadInput if the list of shards and the counts contradict each other."""
    names = [record.name for record in records]
    if len(set(names)) < len(names) or not all(map(_is_plain_name, names)):
        raise BadInput("its list of shards does not name shards")
    needed = (meta.settings, meta.dtype, meta.vocab_size, meta.eot)
    if meta.splits is None or None in needed or (meta.resume is None) != meta.complete:
        raise BadInput("parts of it are missing")
    for split in SPLITS:
        tokens = [record.tokens for record in records if split_of(record.name) == split]
        counted = meta.splits[split]
        if (len(tokens), sum(tokens)) != (counted.shards, counted.tokens):
            raise BadInput(f"its counts of {split} tokens contradict each other")


def _is_plain_name(name: str) -> bool:
    """Whether a file is named like a shard and cannot be in another folder."""
    return split_of(name) is not None and not {"/", "\\", "\0"} & set(name)


# --------------------------------------------------------------------------------------------------
# Continue


def check_settings(folder: Path, meta: Meta, settings: dict[str, Any]) -> None:
    """Raises BadInput if the shards of a folder were not made with these settings, or if the
    folder cannot be continued."""
    if meta.settings is None:
        raise BadInput(
            f"{folder}/ contains shards of another program, says its meta.json: {OTHER_OUT}")
    for name, value in settings.items():
        default = False if name == "dedup" else None  # older folders lack some settings
        made = meta.settings.get(name, default)
        if made == value or (name == "tokenizer_flag" and _is_same_tokenizer(value, meta)):
            continue
        flag_name = name.removesuffix("_flag")
        then = as_flag(flag_name, made)
        now = as_flag(flag_name, value)
        raise BadInput(f"{folder}/ has shards made with {then}, not with {now}: {OTHER_OUT}")
    if meta.shards is None and not meta.complete:
        raise BadInput(f"{folder}/ was started by an older fineweb.py, whose meta.json does not "
                       f"say how to continue: {OTHER_OUT}")


def as_flag(name: str, value: Any) -> str:
    """A setting as on the command line."""
    if value is None or value is False:
        return f"no --{name}"
    if value is True:
        return f"--{name}"
    if isinstance(value, list):
        value = " ".join(value)
    return f"--{name} {value}"


def _is_same_tokenizer(path: str, meta: Meta) -> bool:
    """Whether `path` is the tokenizer.json that the shards were made with, wherever it was."""
    return os.path.exists(path) and crc32_of(load_tokenizer(path).spec) == meta.tokenizer_crc32


# --------------------------------------------------------------------------------------------------
# The tokenizer of a folder


def own_tokenizer(folder: Path, meta: Meta) -> Tokenizer:
    """The Tokenizer of a folder's shards. Raises BadInput if it is missing or another one."""
    tokenizer = load_tokenizer(tokenizer_spec(folder, meta))
    check_described(meta, tokenizer)
    return tokenizer


def tokenizer_spec(folder: Path, meta: Meta) -> str:
    """The spec of a folder's tokenizer, for `load_tokenizer`.

    Raises BadInput if tokenizer.json is missing or another one. A newly trained one would not do,
    as its ids mean other text.
    """
    if names_ids(meta.tokenizer):
        return load_ids(meta.tokenizer, meta.eot).spec
    if not meta.tokenizer.endswith(".json"):
        return meta.tokenizer
    path = folder / meta.tokenizer
    remedy = f"restore the one that was made with these shards, or {OTHER}"
    text = read_text(path, remedy)
    if meta.tokenizer_crc32 not in (None, crc32_of(text)):
        raise BadInput(f"{path} is damaged, or does not belong to the shards next to it: {remedy}")
    return str(path)


def check_described(meta: Meta | None, tokenizer: Tokenizer, remedy: str = OTHER) -> None:
    """Raises BadInput if a meta.json, or None, describes another tokenizer."""
    if meta is None:
        return
    for name in ("vocab_size", "eot"):
        described = getattr(meta, name)
        own = getattr(tokenizer, name)
        if described not in (None, own):
            raise BadInput(f"the shards' meta.json says {name} {described:,}, but their tokenizer "
                           f"{tokenizer.name} has {own:,}: they are of another tokenizer; {remedy}")
    if meta.tokenizer_crc32 not in (None, crc32_of(tokenizer.spec)):
        raise BadInput("the tokenizer.json next to the shards is not the one they were made with: "
                       f"restore that one, or {remedy}")


def check_tokenizer_place(folder: Path, meta: Meta | None,
                          tokenizer: Tokenizer | None = None) -> None:
    """Raises BadInput if the folder has a tokenizer.json that is neither its own nor `tokenizer`'s.

    It may have taken hours to train, and shards elsewhere may need it.
    """
    path = folder / "tokenizer.json"
    if not os.path.lexists(path):
        return
    ours = []
    if meta:
        ours.append(meta.tokenizer_crc32)
    if tokenizer:
        ours.append(crc32_of(tokenizer.spec))
    if crc32_of(read_text(path, OTHER_OUT)) not in ours:
        raise BadInput(f"{path} was made by another command and would be replaced: {OTHER_OUT}, "
                       f"or --tokenizer {path} to use it")
