"""Train, save and load tokenizers.

A tokenizer is named by a *spec*, a string that is one of
  - a tiktoken encoding: gpt2, cl100k_base, o200k_base, ...;
  - the path of a `tokenizer.json`, or of a folder with one, in Hugging Face's format;
  - the content of such a file, which is how checkpoints store a trained tokenizer;
  - ids:1500, for ids from 0 to 1499 that are not text (`Ids`).
All text is encoded by tiktoken (Rust, releases the GIL), so there is only one encoder to test and
to time.

The ids for chat (RESERVED) come right after the ids of text. They use rows of the embedding that
are otherwise padding, so the model has the same shape with or without them. Only if there are too
few padding rows, as with exactly 32,000 ids of text, does the model grow when it learns to chat
(posttrain.py). In pretraining the logits are cut off before these ids, so they are neither trained
nor sampled. No text encodes to them.
"""

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import tiktoken
import tiktoken.load

from lib.cli import BadInput
from lib.files import read_text, replace
from lib.network import is_reachable

EOT = "<|endoftext|>"  # separates documents; placed before each one
END = "<|end|>"        # the end of a turn
RESERVED = ("<|system|>", "<|user|>", "<|assistant|>", END)  # roles, and the end of a turn
MIN_BPE = 256 + 1 + len(RESERVED)  # ids: bytes, end-of-text, reserved
MAX_BPE = 1_000_000    # ids; the trainer allocates memory for the number requested
BPE_TEXT = 100_000_000  # characters to train on, at most
# The rule by which a new BPE splits text: GPT-4's (tiktoken's cl100k_base), written so that
# tiktoken's regex engine and Hugging Face's agree on every character. Unlike GPT-2's it handles
# contractions in capitals, splits digits into groups of three, joins a leading sign to its word and
# keeps line ends together.
SPLIT = (r"'(?:[sdmtSDMT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
         r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
CHANGES_IDS = ("normalizer", "truncation", "padding", "dropout", "continuing_subword_prefix",
               "end_of_word_suffix")
MAKE_ONE = "make one with tokenizer.py train"
IDS = re.compile(r"ids:([0-9]{1,9})(?::([0-9]{1,9}))?")  # ids:N, or ids:N:EOT
MAX_IDS = 2**24  # of an `Ids`; as GPTConfig's vocab_size


class Tokenizer:
    """A `tiktoken.Encoding` with its spec, name and special ids.

    spec: `load_tokenizer(spec)` loads the same tokenizer again.
    name: a short label: "gpt2", "bpe4096".
    vocab_size: number of ids; every id of text is below it. eot: the end-of-text id.
    reserved: dict token -> id, from vocab_size on. control: set of the ids that end a turn in a
    chat: end-of-text and the reserved ones. is_text: whether it encodes text, unlike an `Ids`.
    """

    is_text = True

    def __init__(self, encoding: tiktoken.Encoding, spec: str):
        self.encoding = encoding
        self.spec = spec
        self.name = encoding.name
        self.vocab_size = encoding.n_vocab
        self.eot = encoding.eot_token
        self.reserved = {token: self.vocab_size + i for i, token in enumerate(RESERVED)}
        self.control = {self.eot, *self.reserved.values()}
        self._token_bytes: np.ndarray | None = None

    @property
    def is_trained(self) -> bool:
        """Whether it comes from a tokenizer.json, not from tiktoken's list."""
        return self.spec != self.name

    def same_ids(self, other: "Tokenizer") -> bool:
        """Whether another Tokenizer encodes every text to the same ids.

        Their specs may differ: an exported folder spells "gpt2" out, without reserved ids.
        """
        if not other.is_text:
            return False
        mine = self.encoding
        theirs = other.encoding
        return (mine._pat_str == theirs._pat_str and mine._special_tokens == theirs._special_tokens
                and mine._mergeable_ranks == theirs._mergeable_ranks)

    def require_text(self, what: str) -> None:
        """Raises BadInput, which says that `what` needs text, if the ids are not text."""

    def encode(self, text: str) -> np.ndarray:
        """Text -> uint32 (n,). Special tokens written out in the text are plain text."""
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # lone surrogates, which UTF-8 cannot represent
            return self.encode(_replace_surrogates(text))
        except ValueError:  # a million spaces overflow the regex engine's stack: split in Python
            return np.array(self.encoding._encode_only_native_bpe(text), dtype=np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids -> text. Bytes that are not UTF-8 become U+FFFD; unassigned ids are left out.
        """
        try:
            return self.encoding.decode(ids, errors="replace")
        except KeyError:  # reserved ids, or gaps in the numbering, which untrained models sample
            sizes = self.token_bytes()
            known = [i for i in ids if i < self.vocab_size and (sizes[i] or i == self.eot)]
            return self.encoding.decode(known, errors="replace")

    def token(self, token: int) -> bytes:
        """The bytes of one id; empty for an unassigned id."""
        try:
            return self.encoding.decode_single_token_bytes(token)
        except KeyError:  # a gap in the numbering
            return b""

    def token_bytes(self) -> np.ndarray:
        """int64 (vocab_size,), read-only: UTF-8 bytes of each id; 0 for special and unassigned ids.
        """
        if self._token_bytes is None:
            sizes = np.array([len(self.token(i)) for i in range(self.vocab_size)], dtype=np.int64)
            sizes[list(self._special().values())] = 0
            sizes.flags.writeable = False
            self._token_bytes = sizes
        return self._token_bytes

    def _special(self) -> dict[str, int]:
        names = self.encoding.special_tokens_set
        return {name: self.encoding.encode_single_token(name) for name in names}

    def to_json(self, chat: bool = False) -> str:
        """The text of a tokenizer.json with the same ids, for Hugging Face's libraries.

        chat: include the reserved ids; only chat models have logits for them.
        """
        if not self.is_trained:
            return self._tiktoken_to_json(chat)
        data = json.loads(self.spec)
        added = [token for token in data["added_tokens"] if token["content"] not in RESERVED]
        if chat:
            eot = next(token for token in added if token["content"] == EOT)
            added += [eot | {"id": i, "content": name} for name, i in self.reserved.items()]
        data["added_tokens"] = added
        return json.dumps(data, ensure_ascii=False)

    def _tiktoken_to_json(self, chat: bool) -> str:
        from tokenizers import Regex, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as HFTokenizer

        ranks = self.encoding._mergeable_ranks
        alphabet = _byte_alphabet()
        special = self._special()
        if chat:
            special |= self.reserved
        names = {}
        for token in ranks:
            names[token] = "".join(alphabet[byte] for byte in token)
        vocab = {names[token]: rank for token, rank in ranks.items()}
        merges = []
        for token in sorted(ranks, key=ranks.__getitem__):
            parts = _parts(token, ranks)
            if len(parts) == 2:
                merges.append((names[parts[0]], names[parts[1]]))
        bpe = HFTokenizer(models.BPE(vocab | special, merges, ignore_merges=True))

        by_gpt2 = self.encoding._pat_str == _gpt2_rule()  # built into ByteLevel
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=by_gpt2)
        if by_gpt2:
            bpe.pre_tokenizer = byte_level
        else:
            # in their regex engine, {1,3}+ is not possessive but repeated
            pattern = re.sub(r"(\{\d+,\d+\})\+", r"\1", self.encoding._pat_str)
            split = pre_tokenizers.Split(Regex(pattern), "isolated")
            bpe.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        bpe.decoder = decoders.ByteLevel()
        bpe.add_special_tokens(sorted(special, key=special.__getitem__))
        return bpe.to_str()

    def save(self, path: str | Path) -> None:
        """Write a trained tokenizer's tokenizer.json atomically."""
        replace(path, lambda file: file.write(self.spec.encode()))


class Ids(Tokenizer):
    """Ids that are not text, such as notes, chess moves or actions, in a Tokenizer's place.

    They are read and printed as numbers separated by spaces. eot: the id that separates documents;
    the last one by default. There are no reserved ids.
    """

    is_text = False

    def __init__(self, vocab_size: int, eot: int | None = None):
        last = vocab_size - 1
        self.vocab_size = vocab_size
        self.eot = last if eot is None else eot
        self.spec = f"ids:{vocab_size}"
        if self.eot != last:
            self.spec += f":{self.eot}"
        self.name = self.spec
        self.reserved = {}
        self.control = {self.eot}

    def same_ids(self, other: Tokenizer) -> bool:
        return self.spec == other.spec

    def require_text(self, what: str) -> NoReturn:
        raise BadInput(f"{what} needs text, but {self.spec} is a vocabulary without text: "
                       "use a model or shards that have a text tokenizer")

    def encode(self, text: str) -> np.ndarray:
        """Numbers separated by spaces -> uint32 (n,). Raises BadInput for anything else."""
        ids = []
        for word in text.split():
            if not re.fullmatch("[0-9]{1,9}", word) or int(word) >= self.vocab_size:
                raise BadInput(f"{text[:40]!r} is not a list of ids: give numbers from 0 to "
                               f"{self.vocab_size - 1}, separated by spaces")
            ids.append(int(word))
        return np.array(ids, dtype=np.uint32)

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(token) for token in ids)

    def token(self, token: int) -> bytes:
        """What follows the ids before it in a text."""
        return f" {token}".encode()

    def token_bytes(self) -> np.ndarray:
        self.require_text("counting bytes")

    def to_json(self, chat: bool = False) -> str:
        self.require_text("a tokenizer.json")


def names_ids(spec: str) -> bool:
    """Whether a spec is that of an `Ids`."""
    return spec.startswith("ids:")


def load_ids(spec: str, eot: int | None = None) -> Ids:
    """ids:N -> Ids. eot: used unless the spec names one, as ids:N:EOT. Raises BadInput."""
    match = IDS.fullmatch(spec)
    if match is None or not 2 <= int(match[1]) <= MAX_IDS:
        raise BadInput(f"{spec[:80]!r} does not name a vocabulary: write ids:N, as in ids:1500, "
                       f"with 2 to {MAX_IDS:,} ids")
    vocab_size = int(match[1])
    if match[2]:
        eot = int(match[2])
    if eot is not None and eot >= vocab_size:
        raise BadInput(f"{spec} has the ids 0 to {vocab_size - 1}, and its eot is {eot}: "
                       "name one of these ids")
    return Ids(vocab_size, eot)


# --------------------------------------------------------------------------------------------------
# Load


def load_tokenizer(spec: str) -> Tokenizer:
    """A spec (see above) -> Tokenizer. Raises BadInput if it is unknown, damaged, or cannot be
    downloaded."""
    if spec.lstrip().startswith("{"):
        return _from_json(spec, "the checkpoint's tokenizer")
    if names_ids(spec):
        return load_ids(spec)
    if spec in tiktoken.list_encoding_names():
        return _from_tiktoken(spec)
    path = Path(spec)
    if os.path.isdir(path):
        path = path / "tokenizer.json"
    if path.suffix == ".json":
        return _from_json(read_text(path, f"name another --tokenizer, or {MAKE_ONE}"), str(path))
    known = ", ".join(tiktoken.list_encoding_names())
    raise BadInput(
        f"unknown tokenizer {spec[:80]!r}: name one of {known}, or the path of a tokenizer.json")


def _from_tiktoken(name: str) -> Tokenizer:
    try:
        with _network_checked():
            encoding = tiktoken.get_encoding(name)
    except Exception as error:  # of requests, of the disk, or a file with the wrong hash
        raise BadInput(
            f"cannot download the tokenizer {name} ({type(error).__name__}): fetch it once on a "
            "machine with internet and point TIKTOKEN_CACHE_DIR at its folder") from error
    return Tokenizer(encoding, name)


@contextlib.contextmanager
def _network_checked() -> Iterator[None]:
    """Let tiktoken raise ConnectionError where it would wait for a dead network forever.

    It calls `read_file` only for a file that is not in its cache. A cached file is read without a
    time limit, however slow the disk.
    """
    read_file = tiktoken.load.read_file

    def download(url):
        if not is_reachable(url):
            raise ConnectionError(f"{url} does not answer")
        return read_file(url)

    tiktoken.load.read_file = download
    try:
        yield
    finally:
        tiktoken.load.read_file = read_file


def _from_json(text: str, origin: str) -> Tokenizer:
    """The text of a byte-level BPE's tokenizer.json -> Tokenizer. origin: names it in messages.

    tiktoken merges by the id of the merged bytes, Hugging Face by the order of its merge list.
    Both encode alike if ids were assigned in merge order, as `train_bpe` and GPT-2 do (compared in
    tests/lib/test_tokenizers.py). Anything else that would silently change ids is refused: another
    order, a normalizer, dropout, another splitting rule.
    """
    try:
        data = json.loads(text)
        ranks, special = _vocabulary(data)
        pattern = _pattern_of(data["pre_tokenizer"])
        reserved = {token: special.pop(token) for token in RESERVED if token in special}
        size = len(ranks) + len(special) + len(reserved)
        usable = (pattern and EOT in special
                  and list(reserved.values()) in ([], list(range(size - len(RESERVED), size)))
                  and _merges_in_order(data["model"], ranks)
                  and not _changes_ids(data))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        usable = False
    if not usable:
        raise BadInput(
            f"{origin} is damaged, or not a byte-level BPE with GPT-2's splitting rule or ours, "
            f"{EOT}, ids in merge order, and nothing else that changes ids: {MAKE_ONE}")
    encoding = tiktoken.Encoding(f"bpe{size}", pat_str=str(pattern), mergeable_ranks=ranks,
                                 special_tokens=special, explicit_n_vocab=size - len(reserved))
    return Tokenizer(encoding, text)


def _vocabulary(data: dict[str, Any]) -> tuple[dict[bytes, int], dict[str, int]]:
    """({bytes: id}, {special token: id}) of a tokenizer.json. Raises ValueError unless its ids are
    0, 1, 2, ... and include every byte."""
    to_byte = {char: byte for byte, char in _byte_alphabet().items()}
    special = {token["content"]: token["id"] for token in data["added_tokens"]}
    ranks = {}
    for token, rank in data["model"]["vocab"].items():
        if token not in special:
            ranks[bytes(to_byte[char] for char in token)] = rank
    ids = [*ranks.values(), *special.values()]
    if not all(type(i) is int for i in ids) or sorted(ids) != list(range(len(ids))):
        raise ValueError("ids have gaps")
    if not all(bytes([byte]) in ranks for byte in range(256)):
        raise ValueError("a byte has no id")
    return ranks, special


def _merges_in_order(model: dict[str, Any], ranks: dict[bytes, int]) -> bool:
    """Whether every token of several bytes comes from one merge, in the order of the ids."""
    merged = []
    for pair in model["merges"]:
        parts = pair if isinstance(pair, list) else pair.split(" ")
        merged.append(model["vocab"]["".join(parts)])
    return merged == sorted(rank for token, rank in ranks.items() if len(token) > 1)


def _changes_ids(data: dict[str, Any]) -> bool:
    """Whether a tokenizer.json does more to ids than a byte-level BPE."""
    model = data["model"]
    if model.get("type", "BPE") != "BPE" or not _adds_no_ids(data.get("post_processor")):
        return True
    if not all(token["special"] is True for token in data["added_tokens"]):
        return True
    return any(model.get(key) or data.get(key) for key in CHANGES_IDS)


def _adds_no_ids(post_processor: dict[str, Any] | None) -> bool:
    """Whether a tokenizer.json's post_processor leaves ids as they are.

    ByteLevel only moves offsets. transformers writes a template without special tokens for GPT-2.
    """
    if post_processor is None or post_processor["type"] == "ByteLevel":
        return True
    return post_processor["type"] == "TemplateProcessing" and not post_processor["special_tokens"]


def _pattern_of(splitter: dict[str, Any]) -> str | None:
    """The regular expression by which a tokenizer.json's pre_tokenizer splits text: GPT-2's or
    SPLIT; None for any other."""
    steps = splitter["pretokenizers"] if splitter["type"] == "Sequence" else [splitter]
    *before, last = steps
    if last["type"] != "ByteLevel" or last.get("add_prefix_space", True):
        return None
    if last.get("use_regex", True):
        return None if before else _gpt2_rule()
    ours = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    return SPLIT if before == [ours] else None


def _gpt2_rule() -> str:
    """GPT-2's splitting rule, a regular expression."""
    from tiktoken_ext.openai_public import r50k_pat_str

    return r50k_pat_str


# --------------------------------------------------------------------------------------------------
# Train


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909), split by
    SPLIT.

    Keeps all of `texts` in memory, so callers limit it to BPE_TEXT characters. The Tokenizer has
    exactly `vocab_size` ids; the last ones are end-of-text and the reserved ones. Raises BadInput
    if vocab_size is out of bounds or the text too small for it.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as HFTokenizer

    special = [EOT, *RESERVED]
    if not MIN_BPE <= vocab_size <= MAX_BPE:
        raise BadInput(f"a byte-level BPE has {MIN_BPE} (256 bytes, end-of-text and "
                       f"{len(RESERVED)} reserved ones) to {MAX_BPE:,} ids, not {vocab_size:,}")
    bpe = HFTokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(special),
                                  show_progress=sys.stderr.isatty(),
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    # A list, not an iterator: tokenizers steps an iterator in its own threads, and anything that
    # Python frees there, such as a tensor found by the garbage collector, crashes torch 2.11 and
    # 2.12.
    bpe.train_from_iterator([_replace_surrogates(text) for text in texts], trainer)
    bpe.add_special_tokens(special)
    size = bpe.get_vocab_size()
    if size != vocab_size:
        raise BadInput(f"the text is too small for a BPE of {vocab_size} ids (it yields {size}): "
                       "lower the number of ids or give more text")
    return _from_json(bpe.to_str(), "the tokenizer just trained")


# --------------------------------------------------------------------------------------------------
# Bytes and characters


def _replace_surrogates(text: str) -> str:
    """`text` with U+FFFD for lone surrogates, which JSON can escape but UTF-8 cannot represent."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _parts(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens that a byte-level BPE merges last into `token`; a single byte is one part."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = enumerate(zip(parts, parts[1:]))
        _, i = min((ranks.get(a + b, len(ranks)), i) for i, (a, b) in pairs)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _byte_alphabet() -> dict[int, str]:
    """Byte -> the printable character for it in a byte-level vocabulary file (GPT-2's
    encoder.json)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {byte: chr(byte) for byte in printable}
    return alphabet | {byte: chr(256 + i) for i, byte in enumerate(others)}
