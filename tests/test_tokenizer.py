"""tokenizer.py, launched for real. Run: python -m pytest tests/test_tokenizer.py"""

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


def test_train_then_compare(source, launch, tmp_path):
    done = launch("tokenizer.py", "train", "--source", source, "--vocab_size", 300, "--out", "bpe")
    assert done.returncode == 0 and "300 ids" in done.stdout, done.stderr
    tokenizer, theirs = load_tokenizer(str(tmp_path / "bpe")), AutoTokenizer.from_pretrained(
        tmp_path / "bpe")
    assert tokenizer.spec == train_bpe(
        TEXTS, 300).spec and theirs.eos_token == EOT and theirs.eos_token_id == tokenizer.eot
    assert [theirs(text)["input_ids"]
            for text in TEXTS] == [tokenizer.encode(text).tolist() for text in TEXTS]
    done = launch("tokenizer.py", "compare", "--source", source, "--tokenizer", "bpe", "gpt2",
                  "nowhere", "--width", 100)
    assert done.returncode == 0 and "left out: unknown tokenizer 'nowhere'" in done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[2:]]
    size = sum(len(text.encode()) for text in TEXTS)
    for row, one, rows_padded in zip(rows, (tokenizer, load_tokenizer("gpt2")), (384, 50304),
                                     strict=True):
        tokens = sum(len(one.encode(text)) for text in TEXTS)
        assert (row[1], row[2], row[5]) == (f"{one.vocab_size:,}", f"{size / tokens:.3f}",
                                            f"{100 * rows_padded:,}")


@pytest.mark.parametrize("word", ["train", "compare"])
def test_help_says_how_a_command_is_given(word, capsys):
    with pytest.raises(SystemExit):
        main([word, "--help"])
    assert re.match(rf"usage: \S+ {word} \[flags\]\n", told := capsys.readouterr().out)
    assert ("at least 261" in told) == (word == "train")


@pytest.mark.parametrize("words, says", [
    ([], "say what to do first, train or compare"), (["merge"], "merge is neither"),
    (["--source", "a"], "--source is neither"),
    (["train", "--out", "x"], "name the text by --source"),
    (["train", "--source", "SOURCE"], "name the folder of the tokenizer by --out"),
    (["train", "--source", "SOURCE", "--out", "full"], "full/ holds a tokenizer.json already"),
    (["train", "--source", "SOURCE", "--out", "slow"
      ], "slow/ holds a tokenizer_config.json already"),
    (["train", "--source", "nowhere.jsonl", "--out", "x"], "no file nowhere.jsonl"),
    (["train", "--source", "SOURCE", "--out", "x", "--vocab_size", "100000"
      ], "too small for a BPE of 100000"),
    (["train", "--source", "SOURCE", "--out", "x", "--vocab_size", "260"
      ], "--vocab_size must be at least 261 and at most 1,000,000, not 260"),
    (["compare", "--source", "SOURCE", "--tokenizer", "full"], "damaged, or not a byte-level BPE"),
    (["compare", "--source", "SOURCE", "--tokenizer", "full", "nowhere"
      ], "no tokenizer is left to compare"),
    (["compare", "--source", "empty.jsonl", "--tokenizer", "gpt2"], "holds no text to compare on"),
])
def test_bad_input(words, says, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, name in (("full", "tokenizer.json"), ("slow", "tokenizer_config.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text("{}")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(BadInput, match=says):
        main([str(source) if word == "SOURCE" else word for word in words])
    assert (tmp_path / "full"
            / "tokenizer.json").read_text() == "{}" and not (tmp_path / "x").exists()
    assert (tmp_path / "slow" / "tokenizer_config.json").read_text() == "{}"
