"""tokenizer.py: train and compare. Run: python -m pytest tests/test_tokenizer.py"""

import re

import pytest
from helpers import sentences, write_lines
from transformers import AutoTokenizer

from lib.cli import BadInput
from lib.tokenizers import EOT, load_tokenizer, train_bpe
from tokenizer import main

TEXTS = [*sentences(200), "naïve 🙂 it's 12345\r\n\r\n  x"]


@pytest.fixture
def source(tmp_path):
    return write_lines(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS])


def test_a_trained_tokenizer_has_the_ids_of_transformers(source, launch, tmp_path):
    done = launch("tokenizer.py", "train", "--source", source, "--vocab_size", 300, "--out", "bpe")
    assert done.returncode == 0 and "300 ids" in done.stdout, done.stderr
    tokenizer = load_tokenizer(str(tmp_path / "bpe"))
    assert tokenizer.spec == train_bpe(TEXTS, 300).spec
    theirs = AutoTokenizer.from_pretrained(tmp_path / "bpe")
    assert (theirs.eos_token, theirs.eos_token_id) == (EOT, tokenizer.eot)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == tokenizer.encode(text).tolist()


def test_tokenizers_are_compared(source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bpe = train_bpe(TEXTS, 300)
    bpe.save(tmp_path / "tokenizer.json")
    main(["compare", "--source", str(source), "--tokenizer", "tokenizer.json", "gpt2", "nowhere",
          "--width", "100"])
    printed = capsys.readouterr()
    assert "left out: unknown tokenizer 'nowhere'" in printed.err
    rows = [line.split() for line in printed.out.splitlines()[2:]]
    size = len("".join(TEXTS).encode())
    for row, one, padded in zip(rows, (bpe, load_tokenizer("gpt2")), (384, 50304), strict=True):
        tokens = sum(len(one.encode(text)) for text in TEXTS)
        assert row[1:3] == [f"{one.vocab_size:,}", f"{size / tokens:.3f}"]
        assert row[5] == f"{100 * padded:,}"


@pytest.mark.parametrize("word", ["train", "compare"])
def test_help_names_the_flags_of_a_command(word, capsys):
    with pytest.raises(SystemExit):
        main([word, "--help"])
    printed = capsys.readouterr().out
    assert re.match(rf"usage: \S+ {word} \[flags\]\n", printed)
    assert ("at least 261" in printed) == (word == "train")


TRAIN = ["train", "--source", "SOURCE"]
COMPARE = ["compare", "--source", "SOURCE", "--tokenizer"]


@pytest.mark.parametrize("words, says", [
    ([], "train or compare"),
    (["merge"], "merge is neither"),
    (["--source", "a"], "--source is neither"),
    (["train", "--out", "x"], "--source"),
    (TRAIN, "--out"),
    ([*TRAIN, "--out", "full"], "full/ already has a tokenizer.json"),
    ([*TRAIN, "--out", "slow"], "slow/ already has a tokenizer_config.json"),
    (["train", "--source", "nowhere.jsonl", "--out", "x"], "no file nowhere.jsonl"),
    ([*TRAIN, "--out", "x", "--vocab_size", "100000"], "too small for a BPE of 100000"),
    ([*TRAIN, "--out", "x", "--vocab_size", "260"], "--vocab_size must be at least 261"),
    ([*COMPARE, "full"], "damaged, or not a byte-level BPE"),
    ([*COMPARE, "full", "nowhere"], "no tokenizer is left to compare"),
    (["compare", "--source", "empty.jsonl", "--tokenizer", "gpt2"], "no text to compare on"),
])
def test_bad_input(words, says, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = {"full": "tokenizer.json", "slow": "tokenizer_config.json"}
    for folder, name in kept.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text("{}")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(BadInput, match=says):
        main([str(source) if word == "SOURCE" else word for word in words])
    assert not (tmp_path / "x").exists()
    for folder, name in kept.items():
        assert (tmp_path / folder / name).read_text() == "{}"
