"""Shards and meta.json as fineweb.py writes, continues and repairs them, against a plain reference.
Run: python -m pytest tests/lib/test_shard_writer.py"""

import gzip
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from helpers import sentences
from texts import (
    DOCUMENTS,
    EOT_ID,
    FIRST,
    IDS,
    TOTAL,
    all_ids,
    check_meta,
    contents,
    cut,
    jsonl,
    make,
    make_documents,
    no_waiting,
    read_meta,
    read_shards,
    reference,
    shard_paths,
    write_mixed,
    write_source,
)

import fineweb
from lib import cli, files, shard_writer
from lib import text as text_files
from lib.shards import Shards
from lib.tokenizers import EOT, load_tokenizer, train_bpe


@pytest.fixture(scope="module", autouse=True)
def quick():
    with no_waiting():
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """DOCUMENTS as a jsonl file, to be read only."""
    return write_source(tmp_path_factory.mktemp("source"), "jsonl")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Files of every format -> (list for --source, the documents). To be read only."""
    return write_mixed(tmp_path_factory.mktemp("mixed"))


# --------------------------------------------------------------------------------------------------
# Ids cut into shards


SIZES = [
    dict(shard_size=97),
    dict(shard_size=1, max_tokens=40),
    dict(shard_size=FIRST),  # ends with a document
    dict(shard_size=TOTAL),
    dict(shard_size=TOTAL - 1),
    dict(shard_size=TOTAL + 1),
    dict(shard_size=10**8),
    dict(shard_size=10**8, max_tokens=500),
    dict(shard_size=10**8, max_tokens=7),  # less than a shard
    dict(shard_size=500, val_tokens=0),
    dict(shard_size=10**6, val_tokens=0),
    dict(shard_size=500, val_tokens=123),
    dict(shard_size=100, val_tokens=2000),
    dict(shard_size=500, val_tokens=FIRST),
    dict(shard_size=500, val_tokens=TOTAL - 1),
    dict(shard_size=300, max_tokens=1234),
    dict(shard_size=300, max_tokens=1200),
    dict(shard_size=300, max_tokens=300),
    dict(shard_size=300, max_tokens=TOTAL),
    dict(shard_size=300, max_tokens=TOTAL + 1),
    dict(shard_size=300, max_tokens=FIRST + 1),
]


def as_words(flags):
    words = []
    for name, value in flags.items():
        words += [f"--{name}", value]
    return words


@pytest.mark.parametrize("flags", SIZES, ids=lambda flags: " ".join(map(str, as_words(flags))))
def test_shards_of_any_size(flags, source, tmp_path):
    make(source, tmp_path / "out", *as_words(flags), "--workers", 2)
    assert read_shards(tmp_path / "out") == cut(IDS, **flags)
    is_whole = flags.get("max_tokens", TOTAL) >= TOTAL
    check_meta(tmp_path / "out", DOCUMENTS if is_whole else None)


def test_a_split_within_a_document_counts_no_documents(tmp_path, capsys):
    make(write_source(tmp_path, "jsonl", ["one word after another " * 50]), tmp_path / "out")
    printed = capsys.readouterr().out
    assert "tokens of 1 documents, train " in printed and "of 0 documents" not in printed


def test_the_number_of_batches_in_memory_is_bounded():
    pulled = 0

    def endless():
        nonlocal pulled
        while True:
            pulled += 1
            yield text_files.Batch(["text"], False, {})

    gpt2 = load_tokenizer("gpt2")
    stream = shard_writer.encode_batches(endless(), gpt2, np.dtype(np.uint16), workers=2)
    for taken in range(1, 50):
        assert next(stream)[1].tolist() == [EOT_ID, 5239]
        assert pulled <= taken + 2 * 3
    stream.close()


def test_a_million_spaces(tmp_path):
    documents = ["one " * 300, "before" + " " * 10**6 + "after", "two " * 300]
    make(write_source(tmp_path / "in", "jsonl", documents), tmp_path / "out")
    text = tiktoken.get_encoding("gpt2").decode(all_ids(tmp_path / "out"))
    assert text == "".join(EOT + document for document in documents)


def test_shards_before_a_text_that_cannot_be_encoded_are_written(tmp_path, monkeypatch):
    good = ["good " * 300] * 3
    source = write_source(tmp_path / "in", "jsonl", [*good, "bad"])
    monkeypatch.setattr(text_files, "BATCH_ROWS", 1)
    encode = shard_writer.encode

    def encode_good(batch, *rest):
        if batch.texts == ["bad"]:
            raise MemoryError
        return encode(batch, *rest)

    monkeypatch.setattr(shard_writer, "encode", encode_good)
    with pytest.raises(MemoryError):
        make(source, tmp_path / "out", "--shard_size", 200, "--workers", 4)
    whole = reference(good)
    assert all_ids(tmp_path / "out") == whole[:len(whole) // 200 * 200]


# --------------------------------------------------------------------------------------------------
# Tokenizers


def test_a_bpe_is_trained_once_kept_and_used_again(source, tmp_path, capsys):
    out, other = tmp_path / "out", tmp_path / "other"
    make(source, out, "--tokenizer", "bpe:400", "--shard_size", 2000)
    assert "training a BPE of 400 ids" in capsys.readouterr().out
    tokenizer = load_tokenizer(str(out))
    meta = read_meta(out)
    assert (tokenizer.vocab_size, meta["vocab_size"], meta["eot"]) == (396, 396, 395)
    assert meta["tokenizer"] == "tokenizer.json"
    ids = []
    for text in DOCUMENTS:
        ids += [395, *tokenizer.encode(text).tolist()]
    assert read_shards(out)[0] == ("val", ids[:2000]) and all_ids(out) == ids
    text_bytes = sum(split["bytes"] for split in meta["splits"].values())
    assert text_bytes == len("".join(DOCUMENTS).encode())

    make(source, other, "--tokenizer", out / "tokenizer.json", "--shard_size", 2000)
    assert read_shards(other) == read_shards(out)
    assert load_tokenizer(str(other)).spec == tokenizer.spec
    make(source, other, "--tokenizer", out, "--shard_size", 2000)  # the same file
    (tmp_path / "another").mkdir()
    train_bpe(DOCUMENTS, 300).save(tmp_path / "another" / "tokenizer.json")
    with pytest.raises(cli.BadInput, match="made with --tokenizer .*, not with .*another"):
        make(source, other, "--tokenizer", tmp_path / "another", "--shard_size", 2000)


def test_a_tokenizer_left_by_a_run_without_shards_is_not_used(source, tmp_path, tokenizer):
    with pytest.raises(cli.BadInput, match="leaves nothing"):
        make(source, tmp_path / "out", "--tokenizer", "bpe:300", "--val_tokens", 10**6)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    tokenizer.save(tmp_path / "out" / "tokenizer.json")
    make(source, tmp_path / "out", "--shard_size", 1000)
    check_meta(tmp_path / "out", DOCUMENTS)
    assert read_shards(tmp_path / "out") == cut(IDS, 1000)


@pytest.mark.parametrize("flag", ["bpe:300", "other/tokenizer.json"])
def test_a_tokenizer_of_another_command_is_not_replaced(flag, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = Path("mine")
    for folder, size in ((mine, 320), (Path("other"), 310)):
        folder.mkdir()
        train_bpe(DOCUMENTS, size).save(folder / "tokenizer.json")
    before = contents(mine)
    with pytest.raises(cli.BadInput, match="mine/tokenizer.json .* would be replaced"):
        make(source, mine, "--tokenizer", flag, "--shard_size", 2000)
    assert contents(mine) == before
    make(source, mine, "--tokenizer", mine / "tokenizer.json", "--shard_size", 2000)
    assert contents(mine)["tokenizer.json"] == before["tokenizer.json"]


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_a_run_killed_before_its_first_shard_trains_its_tokenizer_again(
        has_tokenizer, source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    flags = ["--tokenizer", "bpe:300", "--shard_size", 2000]

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shard_writer, "save_shard", interrupt)
        make(source, out, *flags)
    assert set(contents(out)) == {"meta.json", "tokenizer.json"}
    if not has_tokenizer:  # killed between the two
        (out / "tokenizer.json").unlink()
    make(source, out, *flags)
    assert load_tokenizer(str(out)).vocab_size == 296
    assert Shards(out).tokens["val"] == 2000


def test_a_vocabulary_beyond_uint16_uses_uint32(source, tmp_path, monkeypatch):
    gpt2 = load_tokenizer("gpt2")
    monkeypatch.setattr(fineweb, "load_tokenizer", lambda spec: gpt2)
    monkeypatch.setattr(gpt2, "vocab_size", 2**16 + 1)
    monkeypatch.setattr(gpt2, "token_bytes", lambda: np.ones(2**16 + 1, dtype=np.int64))
    make(source, tmp_path / "out", "--shard_size", 1000)
    assert np.load(tmp_path / "out" / "out_val_000000.npy").dtype == np.uint32
    assert read_meta(tmp_path / "out")["dtype"] == "uint32"
    assert read_shards(tmp_path / "out") == cut(IDS, 1000)


BPE = ["--tokenizer", "bpe:285"]


@pytest.fixture(scope="module")
def bpe_made(tmp_path_factory):
    """(source, folder of its shards with a trained tokenizer), to be copied."""
    folder = tmp_path_factory.mktemp("bpe")
    source = write_source(folder / "in", "jsonl", sentences(60))
    make(source, folder / "out", *BPE)
    return source, folder / "out"


def tear(path):
    path.write_text('{"model": {')


def train_another(path):
    train_bpe(DOCUMENTS, 285).save(path)  # as many ids, of other text


@pytest.mark.parametrize("change", [Path.unlink, tear, train_another])
@pytest.mark.parametrize("complete", [True, False])
def test_shards_without_their_own_tokenizer_are_neither_complete_nor_continued(
        complete, change, bpe_made, tmp_path):
    """A newly trained tokenizer would not help, as its ids mean other text."""
    source, folder = bpe_made
    out = shutil.copytree(folder, tmp_path / "out")
    change(out / "tokenizer.json")
    if not complete:
        next(out.glob("*_train_*")).unlink()
    with pytest.raises(cli.BadInput, match="tokenizer.json .*: restore the one that was made"):
        make(source, out, *BPE)


# --------------------------------------------------------------------------------------------------
# Interrupted runs


class Died(BaseException):
    pass


@pytest.mark.parametrize(
    "when, flags",
    [("before", ()), ("after", ()), ("before", ("--val_tokens", 17)),
     ("after", ("--max_tokens", 20_011)), ("after", ("--val_tokens", 0)),
     ("after", ("--shard_size", 10**7)), ("before", ("--dedup",)), ("after", ("--dedup",))],
    ids=str)
def test_a_run_that_dies_at_every_single_write_has_the_same_shards(
        when, flags, mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "TXT_LINES", 7)
    monkeypatch.setattr(text_files, "BATCH_ROWS", 40)
    monkeypatch.setattr(text_files.Seen, "BUCKETS", 2**12)
    sources, documents = mixed
    flags = ["--shard_size", 6000, "--workers", 2, *flags]
    whole = tmp_path / "whole" / "out"
    whole.parent.mkdir()
    make(sources, whole, *flags)
    real_replace = os.replace
    left = 0  # writes until the next death

    def replace(*paths):
        nonlocal left
        if left == 0 and when == "before":
            raise Died
        real_replace(*paths)
        left -= 1
        if left < 0 and when == "after":
            raise Died

    monkeypatch.setattr(files.os, "replace", replace)
    dies = tmp_path / "out"
    deaths = 0
    while deaths < 500:
        left = deaths % 3 if when == "after" else 3 + 4 * (deaths % 2)
        try:
            make(sources, dies, *flags)
            break
        except Died:
            deaths += 1
    assert 0 < deaths < 500
    for path in whole.glob("*.npy"):
        assert path.read_bytes() == (dies / path.name).read_bytes()
    assert len(shard_paths(dies)) == len(shard_paths(whole))
    is_whole = "--max_tokens" not in flags
    check_meta(dies, documents if is_whole else None)
    if is_whole:
        assert all_ids(dies) == reference(documents)


def test_a_source_whose_files_changed_is_not_continued(tmp_path):
    folder = tmp_path / "in"
    parts = {name: make_documents(9, ord(name)) for name in "abcd"}

    def write(name):
        write_source(folder, "jsonl", parts[name]).rename(folder / f"{name}.jsonl")

    for name in "bcd":
        write(name)
    (folder / "d.jsonl").write_text('{"text": "whole"}\n{torn')
    with pytest.raises(cli.BadInput, match="d.jsonl"):
        make(folder, tmp_path / "out", "--shard_size", 100)
    write("a")
    with pytest.raises(cli.BadInput, match="files of --source have changed: .*[bcd].jsonl"):
        make(folder, tmp_path / "out", "--shard_size", 100)
    (folder / "a.jsonl").unlink()
    write("d")
    make(folder, tmp_path / "out", "--shard_size", 100)
    documents = [*parts["b"], *parts["c"], *parts["d"]]
    assert read_shards(tmp_path / "out") == cut(reference(documents), 100)


def test_a_source_that_became_shorter_is_not_called_complete(tmp_path):
    folder = write_source(tmp_path / "in", "jsonl", ["one two three " * 100] * 3).parent
    (folder / "last.jsonl").write_text('{"text": "whole"}\n{torn')
    with pytest.raises(cli.BadInput, match="last.jsonl"):
        make(folder, tmp_path / "out", "--shard_size", 100)
    write_source(folder, "jsonl", ["one two three"])
    (folder / "last.jsonl").write_text("")
    with pytest.raises(cli.BadInput, match="the source has become shorter"):
        make(folder, tmp_path / "out", "--shard_size", 100)


def test_the_meta_json_of_an_older_fineweb_is_checked_but_not_continued(source, tmp_path, capsys):
    out = tmp_path / "out"
    make(source, out, "--shard_size", 1000)
    older = read_meta(out)
    del older["shards"], older["command"]

    def make_with(**changes):
        (out / "meta.json").write_text(json.dumps(older | changes))
        make(source, out, "--shard_size", 1000)

    make_with()
    assert "out/ is complete" in capsys.readouterr().out
    with pytest.raises(cli.BadInput, match="started by an older fineweb.py.*another --out"):
        make_with(complete=False, resume={"source": None, "drop": 0})
    (out / "out_train_000001.npy").unlink()
    with pytest.raises(cli.BadInput, match="train tokens and its meta.json says"):
        make_with()


def test_a_run_begun_by_an_older_fineweb_is_continued_and_repaired(source, tmp_path):
    """It stored the state of `datasets` in place of a row number."""
    mine = tmp_path / "data.jsonl"
    data = source.read_bytes()
    mine.write_bytes(data[:-9])
    out = tmp_path / "out"
    with pytest.raises(cli.BadInput, match="cannot read"):
        make(mine, out, "--shard_size", 1000)
    meta = read_meta(out)
    assert len(meta["shards"]) > 3
    state = {"examples_iterable": {"shard_idx": 0, "shard_example_idx": 64}}
    for start in [meta["resume"], *(record["start"] for record in meta["shards"])]:
        if start["source"]:
            start["source"]["state"] = state
    (out / "meta.json").write_text(json.dumps(meta))
    (out / "out_train_000002.npy").unlink()
    mine.write_bytes(data)
    make(mine, out, "--shard_size", 1000)
    assert read_shards(out) == cut(IDS, 1000)
    check_meta(out, DOCUMENTS)


# --------------------------------------------------------------------------------------------------
# Missing or damaged shards are rewritten


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-2])


def shorten(path):
    np.save(path, np.zeros(3, np.uint16))


def overwrite(path):
    path.write_text("x")


def test_a_shard_deleted_or_damaged_is_written_again_with_the_same_ids(
        mixed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(text_files, "TXT_LINES", 7)
    sources, documents = mixed
    first = tmp_path / "first.jsonl.gz"  # changed below
    shutil.copy(sources[0], first)
    sources = [first, *sources[1:]]
    out = tmp_path / "out"
    flags = ["--shard_size", 5000, "--workers", 2]
    make(sources, out, *flags)
    before = contents(out)
    damaged = [path for i, path in enumerate(shard_paths(out)) if i % 5]
    for i, path in enumerate(damaged):
        (Path.unlink, cut_off, shorten, overwrite)[i % 4](path)
    capsys.readouterr()
    make(sources, out, *flags)
    printed = capsys.readouterr().out
    assert printed.count("is missing or damaged: writing it again") == len(damaged) > 4
    assert f"{out}/ is complete" in printed
    assert contents(out) == before and all_ids(out) == reference(documents)

    shard = shard_paths(out)[0]
    shard.unlink()
    first.write_bytes(gzip.compress(jsonl([{"text": "another source"}] * 70)))
    with pytest.raises(cli.BadInput, match="cannot be rewritten, as the source has changed"):
        make(sources, out, *flags)
    assert not shard.exists()
    shard.symlink_to("an_unmounted_disk")  # what cannot be read may be good
    with pytest.raises(files.Unreadable, match="a link to an_unmounted_disk"):
        make(sources, out, *flags)


def test_a_repair_that_fails_leaves_what_dedup_has_seen(tmp_path, monkeypatch):
    """The second of two files is torn. While a shard of the first is missing, that file has the
    second's text for a while: short documents."""
    monkeypatch.setattr(text_files, "BATCH_ROWS", 5)
    monkeypatch.setattr(text_files.Seen, "BUCKETS", 2**12)
    first = jsonl([{"text": text} for text in DOCUMENTS])
    second = jsonl([{"text": f"short {i}"} for i in range(1000)])
    names = [tmp_path / "1.jsonl", tmp_path / "2.jsonl"]

    def attempt(out, *texts):
        for name, text in zip(names, texts, strict=True):
            name.write_bytes(text)
        make(names, tmp_path / out, "--shard_size", 2000, "--workers", 1, "--dedup")

    attempt("whole", first, second)
    with pytest.raises(cli.BadInput, match="cannot read .*2.jsonl"):
        attempt("out", first, second[:-9])
    (tmp_path / "out" / "out_train_000001.npy").unlink()
    with pytest.raises(cli.BadInput, match="cannot be rewritten"):
        attempt("out", second, second)
    attempt("out", first, second)
    assert read_shards(tmp_path / "out") == read_shards(tmp_path / "whole")
