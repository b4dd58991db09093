"""Tokenizers: the one place that names, trains, saves and loads them.

A tokenizer is named by a *spec*, a string that is one of
  - a tiktoken encoding: gpt2, cl100k_base, o200k_base, ...;
  - the path of a `tokenizer.json` (or of a folder that holds one), as `Tokenizer.save` and Hugging Face write it;
  - the text of such a file, which is how a checkpoint carries a trained tokenizer with it.
Whatever its origin, text is encoded by tiktoken (Rust, releases the GIL), so there is one encoder
to trust and to time.

The ids that chat needs (RESERVED) follow right behind those that text can have. They lie in the
rows with which the embeddings are padded to a multiple of 128, so a model has the same shape with
or without them, except where fewer rows than they need are padding, as with exactly 32,000 ids of
text: then it grows when it learns to chat (posttrain.py). Pretraining cuts the logits off in front
of them and can neither meet nor sample one. Text never encodes to them, whatever it says.
"""

import contextlib
import json
import os
import re
import sys
import threading
from pathlib import Path

import numpy as np
import tiktoken

from lib.cli import BadInput
from lib.files import read_text, replace

EOT = "<|endoftext|>"  # separates documents; placed before each one
END = "<|end|>"        # the end of a turn
RESERVED = ("<|system|>", "<|user|>", "<|assistant|>", END)  # and who speaks
MIN_BPE = 256 + 1 + len(RESERVED)  # ids: bytes, end-of-text and those
MAX_BPE = 1_000_000    # ids; the trainer reserves memory for as many as it is asked for
BPE_TEXT = 100_000_000  # characters to train one on, at most
# the rule by which a new BPE splits text: GPT-4's (tiktoken's cl100k_base), written so that
# tiktoken's engine and that of tokenizers agree on every character. Against GPT-2's: contractions
# in capitals, digits in threes, a leading sign joins its word, line ends stay together
SPLIT = (r"'(?:[sdmtSDMT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
         r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
CHANGES_IDS = ("normalizer", "truncation", "padding", "dropout", "continuing_subword_prefix",
               "end_of_word_suffix")
MAKE_ONE = "make one with tokenizer.py train"


class Tokenizer:
    """A `tiktoken.Encoding` with what this project needs to know about it.

    spec: str, loads the same tokenizer again through `load_tokenizer`.
    name: str, short, for people: "gpt2", "bpe4096".
    vocab_size: int, all ids of text are below it. eot: int, the id of the end-of-text token.
    reserved: dict token -> id, from vocab_size on. control: set of int, the ids that end a turn in
    a chat: all of these.
    """

    def __init__(self, encoding, spec):
        self.encoding, self.spec = encoding, spec
        self.name, self.vocab_size, self.eot = encoding.name, encoding.n_vocab, encoding.eot_token
        self.reserved = {token: self.vocab_size + i for i, token in enumerate(RESERVED)}
        self.control = {self.eot, *self.reserved.values()}

    @property
    def is_trained(self):
        """Whether it came from a tokenizer.json rather than from tiktoken's list."""
        return self.spec != self.name

    def same_ids(self, other):
        """Whether another Tokenizer gives every text the same ids.

        Their specs may differ: an exported folder spells "gpt2" out, and leaves the reserved ids
        out.
        """
        mine = self.encoding
        theirs = other.encoding
        return (mine._pat_str == theirs._pat_str and mine._special_tokens == theirs._special_tokens
                and mine._mergeable_ranks == theirs._mergeable_ranks)

    def encode(self, text):
        """str -> uint32 array (n,). Special tokens written out in the text are encoded as plain
        text."""
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # lone surrogates, which Python's str may hold but UTF-8 has no bytes for
            return self.encode(_replace_surrogates(text))
        except ValueError:  # tiktoken's regex engine runs out of stack, as on a million spaces: split with Python's `regex`
            return np.array(self.encoding._encode_only_native_bpe(text), dtype=np.uint32)

    def decode(self, ids):
        """Token ids -> str. Bytes that are not UTF-8 become U+FFFD; unassigned ids are left out."""
        try:
            return self.encoding.decode(ids, errors="replace")
        except KeyError:  # reserved ids; gaps in the numbering, as in cl100k_base: an untrained model samples them, too
            sizes = self.token_bytes()
            return self.encoding.decode(
                [i for i in ids if i < self.vocab_size and (sizes[i] or i == self.eot)],
                errors="replace")

    def token(self, token):
        """The bytes of one id; none for an unassigned id."""
        try:
            return self.encoding.decode_single_token_bytes(token)
        except KeyError:  # a gap in the numbering
            return b""

    def token_bytes(self):
        """int64 array (vocab_size,): UTF-8 bytes each id stands for; 0 for special and unassigned
        ids."""
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        special = {
            self.encoding.encode_single_token(text) for text in self.encoding.special_tokens_set
        }
        for token in range(self.vocab_size):
            if token not in special:
                try:  # noqa: SIM105, contextlib.suppress takes longer than the work
                    sizes[token] = len(self.encoding.decode_single_token_bytes(token))
                except KeyError:  # a gap in the numbering, as in cl100k_base
                    pass
        return sizes

    def to_json(self, chat=False):
        """The text of a tokenizer.json with the same ids, for Hugging Face's tokenizers; the
        reserved ones only for a chat model, others have no logits for them."""
        if self.is_trained:
            data = json.loads(self.spec)
            token = next(token for token in data["added_tokens"] if token["content"] == EOT)
            data["added_tokens"] = [
                token for token in data["added_tokens"] if token["content"] not in RESERVED
            ]
            if chat:
                data["added_tokens"] += [
                    token | {"id": i, "content": name} for name, i in self.reserved.items()
                ]
            return json.dumps(data, ensure_ascii=False)
        from tokenizers import Regex, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as HFTokenizer

        ranks, alphabet = self.encoding._mergeable_ranks, _byte_alphabet()
        special = {
            text: self.encoding.encode_single_token(text)
            for text in self.encoding.special_tokens_set
        }
        special |= self.reserved if chat else {}
        names = {token: "".join(alphabet[byte] for byte in token) for token in ranks}
        merges = [tuple(names[part] for part in parts) for token in sorted(ranks, key=ranks.get)
                  if len(parts := _parts(token, ranks)) == 2]
        bpe = HFTokenizer(
            models.BPE({names[token]: rank for token, rank in ranks.items()} | special, merges,
                       ignore_merges=True))
        # in their regex engine, {1,3}+ is not possessive but repeated
        pattern = re.sub(r"(\{\d+,\d+\})\+", r"\1", self.encoding._pat_str)
        gpt2 = self.encoding._pat_str == _gpt2_rule()  # theirs, too, under a name of its own
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2)
        bpe.pre_tokenizer = bytes_ if gpt2 else pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_])
        bpe.decoder = decoders.ByteLevel()
        bpe.add_special_tokens(sorted(special, key=special.get))
        return bpe.to_str()

    def save(self, path):
        """Write a trained tokenizer's `tokenizer.json`, whole or not at all."""
        replace(path, lambda file: file.write(self.spec.encode()))


def load_tokenizer(spec):
    """spec (see the module's docstring) -> Tokenizer. Raises BadInput if there is none or it cannot
    be downloaded."""
    if spec.lstrip().startswith("{"):
        return _from_json(spec, "the checkpoint's tokenizer")
    if spec in tiktoken.list_encoding_names():
        return _from_tiktoken(spec)
    path = Path(spec)
    path = path / "tokenizer.json" if os.path.isdir(path) else path
    if path.suffix == ".json":
        return _from_json(read_text(path, f"name another --tokenizer, or {MAKE_ONE}"), path)
    known = ", ".join(tiktoken.list_encoding_names())
    raise BadInput(
        f"unknown tokenizer {spec[:80]!r}: name one of {known}, or the path of a tokenizer.json")


def _from_tiktoken(name):
    """tiktoken downloads without a time limit, so a network that never answers is found out while
    it tries."""
    done = []

    def get():
        try:
            done.append(tiktoken.get_encoding(name))
        except Exception as error:  # of requests, of the disk, of a file that is not the one expected
            done.append(error)

    thread = threading.Thread(target=get, daemon=True)
    thread.start()
    thread.join(2)
    if thread.is_alive() and is_reachable("https://openaipublic.blob.core.windows.net"):
        thread.join()
    encoding = done[0] if done else TimeoutError()
    if isinstance(encoding, Exception):
        raise BadInput(f"cannot download the tokenizer {name} ({type(encoding).__name__}): fetch it once on a machine "
                       "with internet and point TIKTOKEN_CACHE_DIR at the folder that holds it") from encoding
    return Tokenizer(encoding, name)


def is_reachable(url, seconds=4):
    """Whether a server answers within `seconds`, whatever its answer."""
    answered = threading.Event()

    def ask():
        import requests

        with contextlib.suppress(requests.RequestException, OSError):
            requests.head(url, timeout=seconds)
            answered.set()

    thread = threading.Thread(target=ask,
                              daemon=True)  # looking up a name has no time limit of its own
    thread.start()
    thread.join(seconds)
    return answered.is_set()


def train_bpe(texts, vocab_size):
    """Train a byte-level BPE (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909; split by
    SPLIT) on an iterable of str.

    Reads `texts` to its end and holds it in memory: callers bound it, by BPE_TEXT characters.
    Returns a Tokenizer of exactly `vocab_size` ids, the last of them end-of-text and the reserved
    ones. Raises BadInput if vocab_size is out of bounds or the text is too small to fill it.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as HFTokenizer

    special = [EOT, *RESERVED]
    if not MIN_BPE <= vocab_size <= MAX_BPE:
        raise BadInput(f"a byte-level BPE has {MIN_BPE} (256 bytes, end-of-text and {len(RESERVED)} reserved ones) "
                       f"to {MAX_BPE:,} ids, not {vocab_size:,}")
    bpe = HFTokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ])
    bpe.decoder = decoders.ByteLevel()
    # tokenizers steps an iterator in threads of its own. Whatever Python frees there, such as a
    # tensor that the garbage collector finds, meets a thread state that is gone: torch 2.11 and
    # 2.12 crash. A list runs no Python
    texts = [_replace_surrogates(text) for text in texts]
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=vocab_size - len(special), show_progress=sys.stderr.isatty(),
                            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    bpe.add_special_tokens(special)
    if bpe.get_vocab_size() != vocab_size:
        raise BadInput(f"the text is too small for a BPE of {vocab_size} ids (it gives {bpe.get_vocab_size()}): "
                       "ask for fewer ids or give more text")
    return _from_json(bpe.to_str(), "the tokenizer just trained")


def _replace_surrogates(text):
    """`text` with U+FFFD for lone surrogates, which JSON can escape and UTF-8 has no bytes for."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _from_json(text, origin):
    """The text of a byte-level BPE's tokenizer.json -> Tokenizer.

    tiktoken merges by the id of the merged bytes, tokenizers by the order of its merge list: the
    same thing for a BPE whose ids were given out in merge order, as `train_bpe` and GPT-2 do
    (compared in tests/lib/test_tokenizers.py). Whatever else would silently change the ids is
    refused: another order, a normalizer, dropout, another splitting rule.
    """
    to_byte = {char: byte for byte, char in _byte_alphabet().items()}
    try:
        data = json.loads(text)
        model, pattern = data["model"], _pattern_of(data["pre_tokenizer"])
        special = {token["content"]: token["id"] for token in data["added_tokens"]}
        ranks = {bytes(to_byte[char] for char in token): rank
                 for token, rank in model["vocab"].items() if token not in special}
        ids = [*ranks.values(), *special.values()]
        # every token of several bytes is made by one merge, in the order of the ids
        merged = [
            model["vocab"]["".join(pair if isinstance(pair, list) else pair.split(" "))]
            for pair in model["merges"]
        ]
        reserved = {token: special.pop(token) for token in RESERVED if token in special}
        usable = (model.get("type", "BPE") == "BPE" and pattern and EOT in special and list(
            reserved.values()) in ([], list(range(len(ids) - len(RESERVED), len(ids))))
                  and all(token["special"] is True for token in data["added_tokens"])
                  and all(type(rank) is int
                          for rank in ids) and sorted(ids) == list(range(len(ids)))
                  and all(bytes([byte]) in ranks for byte in range(256))
                  and merged == sorted(rank for token, rank in ranks.items() if len(token) > 1)
                  and not any(model.get(key) for key in CHANGES_IDS)
                  and not any(data.get(key)
                              for key in CHANGES_IDS) and _adds_no_ids(data.get("post_processor")))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        usable = False
    if not usable:
        raise BadInput(f"{origin} is damaged, or not a byte-level BPE with GPT-2's splitting rule or ours, "
                       f"{EOT}, ids in merge order, and nothing else that changes ids: {MAKE_ONE}")
    encoding = tiktoken.Encoding(f"bpe{len(ids)}", pat_str=pattern, mergeable_ranks=ranks,
                                 special_tokens=special, explicit_n_vocab=len(ids) - len(reserved))
    return Tokenizer(encoding, text)


def _adds_no_ids(post_processor):
    """Whether a tokenizer.json's post_processor leaves ids as they are.

    So do none, ByteLevel, which moves offsets, and a template without special tokens, as
    transformers writes for GPT-2.
    """
    if post_processor is None or post_processor["type"] == "ByteLevel":
        return True
    return post_processor["type"] == "TemplateProcessing" and not post_processor["special_tokens"]


def _pattern_of(splitter):
    """The regular expression by which a tokenizer.json's pre_tokenizer splits text: GPT-2's, SPLIT,
    or None for any other."""
    *before, last = splitter["pretokenizers"] if splitter["type"] == "Sequence" else [splitter]
    if last["type"] != "ByteLevel" or last.get("add_prefix_space", True):
        return None
    ours = [{"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}]
    return {True: _gpt2_rule() if not before else None,
            False: SPLIT if before == ours else None}[last.get("use_regex", True)]


def _gpt2_rule():
    """GPT-2's splitting rule, a regular expression."""
    from tiktoken_ext.openai_public import r50k_pat_str

    return r50k_pat_str


def _parts(token, ranks):
    """The two tokens that a byte-level BPE merges last into this one; a single byte is one part.
    token: bytes. ranks: {bytes: id}."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, i = min(
            (ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _byte_alphabet():
    """dict byte -> printable character that stands for it in a byte-level vocabulary file (GPT-2's
    encoder.json)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte)
            for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
