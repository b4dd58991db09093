"""Text of every format -> shards, against a plain reference. Run: python -m pytest
tests/test_fineweb.py"""

import gc
import gzip
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
from helpers import ROOT, sentences
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import fineweb
import tokenizer
from lib import cli, docstrings, files, shard_writer
from lib import text as text_files
from lib.shards import Shards
from lib.tokenizers import EOT, load_tokenizer, train_bpe

EOT_ID = 50256


def make_documents(count, seed=0):
    """Words, blank lines, indents, digits and scripts in turn; document 5 is longer than several
    shards of the tests."""
    random.seed(seed)
    words = ["the", "quick", "naïve", "日本語", "fox's", "12,345", "🙂", "\n", "\n\n", "  ",
             "\t", "x_y", "don't", "Привет", ".", ")!", EOT]
    return [
        "doc " + "".join(
            random.choice(words) + random.choice(["", " ", " ", "\n"])
            for _ in range(2500 if i == 5 else random.randrange(1, 60)))
        for i in range(count)
    ]


DOCUMENTS = make_documents(150)


def reference(documents):
    """The plain way: end-of-text before each document, tiktoken's own encoding, all in one list."""
    gpt2 = tiktoken.get_encoding("gpt2")
    return [token for text in documents for token in (EOT_ID, *gpt2.encode_ordinary(text))]


def cut(ids, shard_size, val_tokens=None, max_tokens=None):
    """ids -> the list of (split, ids of a shard) that fineweb.py must write."""
    ids, shards = ids[:max_tokens], []
    val = shard_size if val_tokens is None else val_tokens
    if val and len(
            ids
    ) <= val:  # no more than a shard: a tenth for validation, up to the start of a document if one is near
        tenth = max(len(ids) // 10, 1)
        val = next((i for i in range(tenth, 2 * tenth + 1) if ids[i] == EOT_ID), tenth)
    if val:
        shards, ids = [("val", ids[:val])], ids[val:]
    return shards + [("train", ids[i:i + shard_size]) for i in range(0, len(ids), shard_size)]


def read_shards(out):
    """[(split, ids)] in the order of their numbers, which leave no gap; and no temporary file is
    left."""
    files = sorted(out.glob("*.npy"), key=lambda p: p.name[-10:])
    assert [int(p.stem[-6:])
            for p in files] == list(range(len(files))) and not list(out.glob("*.tmp"))
    return [(p.stem.split("_")[-2], np.load(p).tolist()) for p in files]


def check_meta(out, expected, documents, skipped=0):
    """meta.json counts what the shards hold."""
    meta = json.loads((out / "meta.json").read_text())
    sizes = load_tokenizer("gpt2").token_bytes()
    for split in ("val", "train"):
        shards = [ids for name, ids in expected if name == split]
        flat = [token for ids in shards for token in ids]
        assert meta["splits"][split] == {
            "shards": len(shards), "tokens": len(flat), "documents": flat.count(EOT_ID),
            "bytes": int(sizes[flat].sum())
        }
    if documents is not None:  # the whole source was read: bytes and documents are those of the text itself
        assert sum(s["bytes"] for s in meta["splits"].values()) == sum(
            len(text.encode()) for text in documents)
        assert sum(s["documents"] for s in meta["splits"].values()) == len(documents)
    shards = sorted(out.glob("*.npy"), key=lambda p: p.name[-10:])
    assert [(r["name"], r["tokens"], r["crc32"]) for r in meta["shards"]] == [
        (p.name, len(np.load(p)), zlib.crc32(np.load(p))) for p in shards]
    assert meta["complete"] and meta["skipped_rows"] == skipped
    assert (meta["tokenizer"], meta["vocab_size"], meta["eot"], meta["dtype"]) == ("gpt2", 50257,
                                                                                   EOT_ID, "uint16")


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n"
                   for i, row in enumerate(rows)).encode()


def write_source(folder, form, documents=DOCUMENTS, column="text"):
    """Write documents in one of the formats -> what --source takes."""
    folder.mkdir(exist_ok=True)
    rows = [{"id": i, column: text} for i, text in enumerate(documents)]
    if form == "txt":
        (folder / "texts").mkdir()
        for i, text in enumerate(documents):
            (folder / "texts" / f"{i:05d}.txt").write_bytes(text.encode())
        return folder / "texts"
    path = folder / f"data.{form}"
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=37)
    elif form == "json":
        path.write_text(json.dumps(rows))
    else:
        packed = {"jsonl": bytes, "jsonl.gz": gzip.compress,
                  "jsonl.zst": lambda data: zstd(data)}[form](jsonl(rows))
        path.write_bytes(packed)
    return path


def zstd(data):
    return pa.Codec("zstd").compress(data, asbytes=True)


def make(source, out, *flags):
    sources = source if isinstance(source, (list, tuple)) else [source]
    fineweb.main(["--source", *map(str, sources), "--out", str(out), *map(str, flags)])


# ----------------------------------------------------------------------------------------------------------------------
# The same ids as the plain reference


@pytest.mark.parametrize("form", ["parquet", "jsonl", "jsonl.gz", "jsonl.zst", "json", "txt"])
def test_every_format_gives_the_reference_ids(form, tmp_path, capsys):
    expected = cut(reference(DOCUMENTS), 1000)
    source = write_source(tmp_path / "in", form)
    for workers in (1, 3):
        out = tmp_path / f"out{workers}"
        make(source, out, "--shard_size", 1000, "--workers", workers)
        assert read_shards(out) == expected
        check_meta(out, expected, DOCUMENTS)
    in_val = expected[0][1].count(EOT_ID)
    assert f"val 1,000 tokens of {in_val} documents" in capsys.readouterr().out


def test_a_split_within_a_document_has_no_number_of_documents(tmp_path, capsys):
    make(write_source(tmp_path, "jsonl", ["one word after another " * 50]), tmp_path / "out")
    said = capsys.readouterr().out
    assert "tokens of 1 documents, train " in said and "of 0 documents" not in said


FIRST = len(reference(DOCUMENTS[:3]))
TOTAL = len(reference(DOCUMENTS))


@pytest.mark.parametrize(
    "flags",
    [
        dict(shard_size=97),
        dict(shard_size=1, max_tokens=40),  # a document runs through several shards
        dict(shard_size=FIRST),
        dict(shard_size=TOTAL),
        dict(shard_size=TOTAL - 1),
        dict(shard_size=TOTAL + 1),  # to the point
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
    ],
    ids=lambda flags: " ".join(f"{k}={v}" for k, v in flags.items()))
def test_awkward_sizes(flags, tmp_path):
    expected = cut(reference(DOCUMENTS), **flags)
    source = write_source(tmp_path / "in", "jsonl")
    make(source, tmp_path / "out", *[word for k, v in flags.items() for word in (f"--{k}", v)],
         "--workers", 2)
    assert read_shards(tmp_path / "out") == expected
    check_meta(tmp_path / "out", expected,
               DOCUMENTS if flags.get("max_tokens", TOTAL) >= TOTAL else None)


def test_files_are_read_in_the_order_given_and_folders_and_globs_by_name(tmp_path, monkeypatch):
    parts = [make_documents(7, seed) for seed in range(4)]
    folder = tmp_path / "in[1] * a::b"  # glob's and fsspec's characters in a real name mean themselves
    (folder / "deep").mkdir(parents=True)
    b = write_source(folder / "deep", "parquet", parts[1]).rename(folder / "deep" / "b[0].parquet")
    write_source(folder / "deep", "jsonl.gz", parts[0]).rename(folder / "deep" / "a.jsonl.gz")
    (folder / "notes.md").write_text("no source")
    c = write_source(tmp_path / "c", "jsonl", parts[2])
    d = tmp_path / "d::e.txt"
    d.write_bytes(parts[3][0].encode())
    monkeypatch.chdir(tmp_path)
    make([d.name, folder, "c/*.js*l", "--source", b, str(c)], tmp_path / "out", "--shard_size", 200)
    order = [parts[3][0], *parts[0], *parts[1], *parts[2], *parts[1], *parts[2]]
    assert read_shards(tmp_path / "out") == cut(reference(order), 200)


def test_hidden_files_are_no_text_and_what_a_folder_holds_besides_is_named(
        tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    far = write_source(tmp_path / "far", "jsonl", DOCUMENTS[10:20]).parent
    source = write_source(tmp_path / "in", "jsonl", DOCUMENTS[:10])
    source.rename(tmp_path / "in" / "a.JSONL")
    (tmp_path / "in" / "linked").symlink_to(far)
    (tmp_path / "in" / ".ipynb_checkpoints").mkdir()
    for name in (".ipynb_checkpoints/a.jsonl", "_a.jsonl"):
        (tmp_path / "in" / name).write_bytes(jsonl([{"text": "hidden"}]))
    for name in ("._a.jsonl", "b.jsonl.bz2", "data.arrow"):
        (tmp_path / "in" / name).write_bytes(b"\xff\xfe")
    for out, sources in (("folder", ["in"]), ("pattern", ["in/*.[jJ]*[lL]", "in/linked/*",
                                                          "in/_*"])):
        hidden = [] if out == "folder" else ["hidden"]
        make(sources, tmp_path / out, "--val_tokens", 0)
        assert [ids for _, ids in read_shards(tmp_path / out)
                ] == [reference([*DOCUMENTS[:20], *hidden])]
    assert capsys.readouterr().out.count("left out of ") == 4
    capsys.readouterr()
    (tmp_path / "in" / "dataset_infos.json").write_text(
        json.dumps({"default": {"features": {}}}, indent=1))
    with pytest.raises(
            cli.BadInput,
            match="in/dataset_infos.json has no column text: name one of default .*or leave it out"
    ):
        make("in", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    assert capsys.readouterr().out == ""


def test_a_column_by_name_and_a_folder_named_after_the_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_source(tmp_path, "parquet", column="content").rename("books.v2.parquet")
    fineweb.main(
        ["--source", "books.v2.parquet", "--text_column", "content", "--shard_size", "900"])
    assert read_shards(tmp_path / "books") == cut(reference(DOCUMENTS), 900)
    assert (tmp_path / "books" / "books_val_000000.npy").exists()
    write_source(tmp_path / "texts", "jsonl")  # not into the folder that is read
    fineweb.main(["--source", "texts", "--shard_size", "900"])
    assert read_shards(tmp_path / "texts_shards") == cut(reference(DOCUMENTS), 900)


def test_a_bounded_number_of_batches_is_in_work():
    pulled = 0

    def endless():
        nonlocal pulled
        while True:
            pulled += 1
            yield text_files.Batch(["text"], False, {})

    stream = shard_writer.encode_batches(endless(), load_tokenizer("gpt2"), np.uint16, workers=2)
    for taken in range(1, 50):
        assert next(stream)[1].tolist() == [EOT_ID, 5239]
        assert pulled <= taken + 2 * 3
    stream.close()


# ----------------------------------------------------------------------------------------------------------------------
# Rows that hold no text


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet"])
def test_rows_without_text_are_counted_and_skipped(form, tmp_path, capsys):
    odd = [
        None, "", "  \n\t ",
        *([] if form == "parquet" else [3, 4.5, True, ["a list"], {"a": "dict"}])
    ]
    rows = ["first", *odd, "second", *odd, "third"]
    source = write_source(tmp_path / "in", form, rows)
    if form == "jsonl":  # rows that lack the column
        source.write_bytes(source.read_bytes() + b'{"id": 1}\nnull\n[1]\n')
    skipped = 2 * len(odd) + (3 if form == "jsonl" else 0)
    make(source, tmp_path / "out", "--shard_size", 4)
    expected = cut(reference(["first", "second", "third"]), 4)
    assert read_shards(tmp_path / "out") == expected
    check_meta(tmp_path / "out", expected, ["first", "second", "third"], skipped)
    assert f"{skipped} rows skipped (without text)" in capsys.readouterr().out


def test_numbers_and_bytes_are_not_text(tmp_path):
    source = write_source(tmp_path / "in", "jsonl",
                          ["x y " * 30] * 300 + [5, "end"])  # a number late in a file of text
    make(source, tmp_path / "out", "--shard_size", 10**6)
    check_meta(tmp_path / "out", read_shards(tmp_path / "out"), ["x y " * 30] * 300 + ["end"],
               skipped=1)
    for values in ([1, 2], [b"a", b"b"], [["a"], ["b"]]):
        pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
        with pytest.raises(cli.BadInput, match=r"no documents.*\(2 rows were without text\)"):
            make(tmp_path / "a.parquet", tmp_path / "none")


def test_blank_txt_files_are_skipped_and_null_parquet_rows_of_large_strings_too(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text("\n \n")
    (tmp_path / "c.txt").write_text("text\n\n")
    pq.write_table(pa.table({"text": pa.array(["one", None], pa.large_string())}),
                   tmp_path / "d.parquet")
    make([tmp_path / name for name in ("a.txt", "b.txt", "c.txt", "d.parquet")], tmp_path / "out",
         "--shard_size", 3)
    expected = cut(reference(["text\n\n", "one"]), 3)
    assert read_shards(tmp_path / "out") == expected
    check_meta(tmp_path / "out", expected, ["text\n\n", "one"], skipped=3)


def test_only_the_column_of_the_text_is_read_whatever_the_others_hold(tmp_path, capsys):
    """Through `datasets`, a column that changes type, comes late or is unknown to it made a file
    fail."""
    padding = "x" * 4000  # 12 MB of JSON: the library infers types of 10 MB at a time
    rows = [{"text": text, "score": None, "padding": padding} for text in (DOCUMENTS * 20)[:3000]]
    rows[10] |= {"score": [1], "late": {"a": 1}}
    rows[2900] |= {"score": "high", "late": "x", "text": None}
    rows[2950] |= {"score": {"value": 0.5}}
    del rows[2999]["text"]
    lines = jsonl(rows) + b'{"text": "digits", "id": ' + b"9" * 5000 + b"}\n"
    (tmp_path / "a.jsonl").write_bytes(lines)
    features = {"text": {"dtype": "string", "_type": "Value"}, "tags": {"_type": "Hologram"}}
    schema = pa.schema({"tags": pa.map_(pa.string(), pa.int64()), "text": pa.string()},
                       metadata={"huggingface": json.dumps({"info": {"features": features}})})
    columns = {"tags": [[("a", 1)], None, []], "text": ["map one", "map two", None]}
    pq.write_table(pa.table(columns, schema), tmp_path / "b.parquet")
    make([tmp_path / "a.jsonl", tmp_path / "b.parquet"], tmp_path / "out")
    documents = [row["text"] for row in rows if row.get("text")] + ["digits", "map one", "map two"]
    assert [token for _, ids in read_shards(tmp_path / "out")
            for token in ids] == reference(documents)
    assert "3 rows skipped (without text)" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["skipped_rows"] == 3


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers


def test_a_bpe_is_trained_once_kept_and_used_again(tmp_path, capsys):
    source = write_source(tmp_path / "in", "jsonl")
    make(source, tmp_path / "out", "--tokenizer", "bpe:400", "--shard_size", 2000)
    tokenizer = load_tokenizer(str(tmp_path / "out"))
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert (tokenizer.vocab_size, meta["tokenizer"], meta["vocab_size"],
            meta["eot"]) == (396, "tokenizer.json", 396, 395)
    ids = [token for text in DOCUMENTS for token in (395, *tokenizer.encode(text).tolist())]
    assert read_shards(tmp_path / "out")[0] == ("val", ids[:2000])
    assert [t for _, shard in read_shards(tmp_path / "out") for t in shard] == ids
    assert sum(s["bytes"]
               for s in meta["splits"].values()) == sum(len(text.encode()) for text in DOCUMENTS)
    assert "training a BPE of 400 ids" in capsys.readouterr().out
    make(source, tmp_path / "other", "--tokenizer", tmp_path / "out" / "tokenizer.json",
         "--shard_size", 2000)
    assert read_shards(tmp_path / "other") == read_shards(tmp_path / "out")
    assert load_tokenizer(str(tmp_path / "other")).spec == tokenizer.spec
    make(source, tmp_path / "other", "--tokenizer", tmp_path / "out", "--shard_size",
         2000)  # the same file
    (tmp_path / "another").mkdir()
    train_bpe(DOCUMENTS, 300).save(tmp_path / "another" / "tokenizer.json")
    with pytest.raises(
            cli.BadInput,
            match="holds shards made with --tokenizer .*tokenizer.json, not with .*another"):
        make(source, tmp_path / "other", "--tokenizer", tmp_path / "another", "--shard_size", 2000)


def test_a_tokenizer_of_a_run_that_came_to_no_shard_is_not_taken_for_another(tmp_path):
    source = write_source(tmp_path / "in", "jsonl")
    with pytest.raises(cli.BadInput, match="leaves nothing"):
        make(source, tmp_path / "out", "--tokenizer", "bpe:300", "--val_tokens", 10**6)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    train_bpe(DOCUMENTS, 300).save(
        tmp_path / "out" / "tokenizer.json")  # as of one that was killed right after writing it
    make(source, tmp_path / "out", "--shard_size", 1000)
    check_meta(tmp_path / "out", cut(reference(DOCUMENTS), 1000), DOCUMENTS)
    assert read_shards(tmp_path / "out") == cut(reference(DOCUMENTS), 1000)


@pytest.mark.parametrize("flag", ["bpe:300", "other/tokenizer.json"])
def test_a_tokenizer_of_another_command_is_not_replaced(flag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source, mine, other = write_source(tmp_path / "in", "jsonl"), Path("mine"), Path("other")
    for folder, size in ((mine, 320), (other, 310)):
        tokenizer.main(
            ["train", "--source",
             str(source), "--vocab_size",
             str(size), "--out",
             str(folder)])
    before = {path.name: path.read_bytes() for path in mine.iterdir()}
    with pytest.raises(cli.BadInput, match="mine/tokenizer.json was made by another command and would be replaced: "
                                           "give another --out, or --tokenizer mine/tokenizer.json"):
        make(source, mine, "--tokenizer", flag, "--shard_size", 2000)
    assert {path.name: path.read_bytes() for path in mine.iterdir()} == before
    make(source, mine, "--tokenizer", mine / "tokenizer.json", "--shard_size",
         2000)  # its own, beside its shards
    assert (mine / "tokenizer.json").read_bytes() == before["tokenizer.json"]


@pytest.mark.parametrize("missing", [True, False])
def test_a_run_killed_before_its_first_shard_trains_its_tokenizer_again(
        missing, tmp_path, monkeypatch):
    source, out = write_source(tmp_path / "in", "jsonl"), tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shard_writer, "save_shard", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        make(source, out, "--tokenizer", "bpe:300", "--shard_size", 2000)
    assert {path.name for path in out.iterdir()} == {"meta.json", "tokenizer.json"}
    if missing:  # killed between the two
        (out / "tokenizer.json").unlink()
    make(source, out, "--tokenizer", "bpe:300", "--shard_size", 2000)
    assert load_tokenizer(str(out)).vocab_size == 296 and Shards(out).tokens["val"] == 2000


def test_a_vocabulary_beyond_uint16_gives_uint32(tmp_path, monkeypatch):
    gpt2 = load_tokenizer("gpt2")
    monkeypatch.setattr(fineweb, "load_tokenizer", lambda spec: gpt2)
    monkeypatch.setattr(gpt2, "vocab_size", 2**16 + 1)
    monkeypatch.setattr(gpt2, "token_bytes", lambda: np.ones(2**16 + 1, dtype=np.int64))
    make(write_source(tmp_path / "in", "jsonl"), tmp_path / "out", "--shard_size", 1000)
    assert np.load(tmp_path / "out" / "out_val_000000.npy").dtype == np.uint32
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["dtype"] == "uint32"
    assert read_shards(tmp_path / "out") == cut(reference(DOCUMENTS), 1000)


def test_docstrings_are_cached_and_hold_real_text(tmp_path, monkeypatch, capsys):
    (tmp_path / "library").mkdir()
    for name in "abc":
        (tmp_path / "library"
         / f"{name}.py").write_text(f'"""{name} {"long enough " * 20}end"""\ndef f():\n  "short"\n')
    (tmp_path / "library" / "broken.py").write_text("def (")
    monkeypatch.setattr(docstrings, "PACKAGES", ("no_such_package",))
    monkeypatch.setattr(docstrings.sysconfig, "get_path", lambda name: str(tmp_path / "library"))
    monkeypatch.chdir(tmp_path)
    fineweb.main(["--docstrings", "--shard_size", "1000"])
    texts = [
        json.loads(line)["text"]
        for line in (tmp_path / "docstrings" / "docstrings.jsonl").read_text().splitlines()
    ]
    assert sorted(texts) == [f"{name} {'long enough ' * 20}end" for name in "abc"]
    assert read_shards(tmp_path / "docstrings") == cut(reference(texts), 1000)


# ----------------------------------------------------------------------------------------------------------------------
# Interrupted runs


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """fineweb.py collects garbage at its end: leave out torch's objects, which conftest.py has
    loaded."""
    gc.freeze()
    yield
    gc.unfreeze()


class Died(BaseException):
    pass


def mixed_source(folder):
    """Files of every format in turn, with a txt of many pieces -> (list for --source, the
    documents)."""
    documents, sources = [], []
    folder.mkdir()
    for i, form in enumerate(["jsonl.gz", "txt", "parquet", "jsonl", "jsonl.zst"]):
        part = make_documents(70, seed=i) if form != "txt" else [
            " ".join(make_documents(90, seed=9)) * 3, "short text\n"
        ]
        sources.append(write_source(folder / str(i), form, part))
        documents += part
    gz = folder / "last.txt.gz"
    gz.write_bytes(gzip.compress("\n\n".join(make_documents(60, seed=8)).encode()))
    return [*sources, gz], [*documents, "\n\n".join(make_documents(60, seed=8))]


@pytest.mark.parametrize("when, flags", [("before", ()), ("after", ()),
                                         ("before", ("--val_tokens", 17)),
                                         ("after", ("--max_tokens", 30_011)),
                                         ("after", ("--val_tokens", 0)),
                                         ("after", ("--shard_size", 10**7)),
                                         ("before", ("--dedup",)), ("after", ("--dedup",))],
                         ids=str)
def test_a_run_that_dies_at_every_single_write_gives_the_same_shards(when, flags, tmp_path,
                                                                     monkeypatch):
    monkeypatch.setattr(text_files, "TXT_LINES", 7)
    monkeypatch.setattr(text_files, "BATCH_ROWS", 40)
    sources, documents = mixed_source(tmp_path / "in")
    flags = ["--shard_size", 9000, "--workers", 2, *flags]
    make(sources, tmp_path / "whole", *flags)
    whole_replace, left = os.replace, 0

    def replace(*paths):
        nonlocal left
        if left == 0 and when == "before":
            raise Died
        whole_replace(*paths)
        left -= 1
        if left < 0 and when == "after":
            raise Died

    monkeypatch.setattr(files.os, "replace", replace)
    deaths = 0
    while True:
        left = 7 if when == "before" and deaths % 2 else 3 if when == "before" else deaths % 3
        try:
            make(sources, tmp_path / "dies", *flags)
            break
        except Died:
            deaths += 1
            assert deaths < 500
    assert deaths
    shards = [p.name for p in sorted((tmp_path / "whole").glob("*.npy"))]
    assert [p.name.replace("dies", "whole")
            for p in sorted((tmp_path / "dies").glob("*.npy"))] == shards
    for name in shards:
        assert (tmp_path / "whole"
                / name).read_bytes() == (tmp_path / "dies"
                                         / name.replace("whole", "dies")).read_bytes()
    check_meta(tmp_path / "dies", read_shards(tmp_path / "whole"),
               None if "--max_tokens" in flags else documents)
    if "--max_tokens" not in flags:
        assert [t for _, ids in read_shards(tmp_path / "dies") for t in ids] == reference(documents)


def test_exact_duplicates_are_left_out_and_counted(tmp_path, capsys):
    distinct = [text for i, text in enumerate(DOCUMENTS) if text not in DOCUMENTS[:i]]
    twice = [*distinct[:90], *distinct[40:], distinct[0], distinct[0] + " ", *distinct]
    source = write_source(tmp_path / "in", "jsonl", twice)
    make(source, tmp_path / "out", "--shard_size", 2000, "--dedup")
    assert read_shards(tmp_path / "out") == cut(reference([*distinct, distinct[0] + " "]), 2000)
    assert f"{len(twice) - len(distinct) - 1:,} duplicates left out" in capsys.readouterr().out
    before = read_shards(tmp_path / "out")
    (tmp_path / "out" / "out_train_000003.npy").unlink()  # written again from its own place
    make(source, tmp_path / "out", "--shard_size", 2000, "--dedup")
    assert read_shards(tmp_path / "out") == before
    with pytest.raises(cli.BadInput, match="holds shards made with --dedup, not with no --dedup"):
        make(source, tmp_path / "out", "--shard_size", 2000)


def test_presets_name_datasets_of_the_hub():
    for flags, want in [
        (["--preset", "fineweb-edu-100BT"], ((fineweb.FINEWEB_EDU,), "sample-100BT", "text",
                                             "edu_fineweb100B")),
        (["--preset", "fineweb-edu"], ((fineweb.FINEWEB_EDU,), "default", "text", "edu_fineweb")),
        (["--preset", "wikipedia", "--name", "20231101.de"],
         (("wikimedia/wikipedia",), "20231101.de", "text", "wikipedia_20231101.de")),
        (["--preset", "books", "--out", "x"], (("sedthh/gutenberg_english",), None, "TEXT", "x")),
        ([], ((fineweb.FINEWEB_EDU,), "sample-10BT", "text", "edu_fineweb10B"))
    ]:
        job = fineweb.resolve(flags)
        cfg = job.cfg
        assert (cfg.source, cfg.name, cfg.text_column, str(job.out)) == want
    for flags, want in [(["--preset", "wikipedia"], "wikimedia/wikipedia, 20231101.en: tokens not known; "
                                                    "about 11.63 GB on the hub; licence CC BY-SA 3.0, GFDL"),
                        (["--preset", "wikipedia", "--name", "20231101.de"],
                         "wikimedia/wikipedia, 20231101.de: tokens not known; "
                         "size on the hub not known; licence CC BY-SA 3.0, GFDL"),
                        (["--name", "CC-MAIN-2024-10"],
                         "HuggingFaceFW/fineweb-edu, CC-MAIN-2024-10: tokens not known; "
                         "size on the hub not known; licence ODC-By 1.0"),
                        (["--docstrings"], "None"), (["--source", "a/b"], "None")]:
        assert str(fineweb.corpus_of(fineweb.resolve(flags).cfg)) == want
    for flags in (["--preset", "books", "--source", "a"], ["--preset", "books", "--docstrings"],
                  ["--docstrings", "--name", "x"]):
        with pytest.raises(cli.BadInput, match="each name the text: give one of them"):
            fineweb.resolve(flags)


def start(tmp_path, *flags):
    return subprocess.Popen([sys.executable, ROOT / "fineweb.py", *map(str, flags)], cwd=tmp_path,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for_shards(process, out, count):
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.npy"))) < count:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)


def test_killed_processes_continue_to_identical_shards(tmp_path, launch, monkeypatch, capsys):
    sources, documents = mixed_source(tmp_path / "in")
    flags = ["--source", *sources, "--out", "out", "--shard_size", 1000, "--workers", 2]
    out, kept = tmp_path / "out", {}
    for count in (1, 15):
        process = start(tmp_path, *flags)
        wait_for_shards(process, out, count)
        process.kill()  # SIGKILL: no handler can tidy up
        process.communicate()
        now = {p.name: p.read_bytes() for p in out.glob("*.npy")}
        assert all(now[name] == data for name, data in kept.items())
        for path in out.glob("*.npy"):
            assert len(np.load(path)) == 1000  # whole, whatever the moment
        kept = now
    done = launch("fineweb.py", *flags)
    assert done.returncode == 0 and "continuing after" in done.stdout and done.stderr == ""
    expected = cut(reference(documents), 1000)
    assert read_shards(out) == expected and all(
        (out / name).read_bytes() == data for name, data in kept.items())
    check_meta(out, expected, documents)
    before = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    monkeypatch.chdir(tmp_path)
    started = time.monotonic()
    fineweb.main([str(flag) for flag in flags])  # a second start of a finished run
    assert "out/ is complete: val 1,000 tokens" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns
            for p in out.iterdir()} == before and time.monotonic() - started < 0.5


def test_ctrl_c_says_how_to_continue(tmp_path):
    source = write_source(tmp_path / "in", "parquet", make_documents(3000))
    flags = ["--source", source, "--out", "out", "--shard_size", 200, "--workers", 2]
    process = start(tmp_path, *flags)
    wait_for_shards(process, tmp_path / "out", 3)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in stderr
    assert stderr == "\nstopped: the shards in out/ are whole; the same command continues after them\n"
    assert all(len(ids) == 200 for _, ids in read_shards(tmp_path / "out"))


def test_a_run_that_leaves_most_of_a_parquet_unread_exits_cleanly(tmp_path, launch):
    source = write_source(tmp_path / "in", "parquet",
                          make_documents(3000))  # pyarrow aborted at exit, six times in ten
    done = launch("fineweb.py", "--source", source, "--out", "out", "--shard_size", 2000,
                  "--max_tokens", 9000, "--workers", 2)
    assert (done.returncode, done.stderr) == (0, "")


def test_spawned_and_forked_children_do_the_same(tmp_path):
    source = write_source(tmp_path / "in", "parquet")
    (tmp_path / "children.py").write_text(f"""
import multiprocessing, sys
sys.path.insert(0, {str(ROOT)!r})
import fineweb
if __name__ == "__main__":
    children = [multiprocessing.get_context(method).Process(
        target=fineweb.main, args=(["--source", {str(source)!r}, "--out", method, "--shard_size", "700"],))
        for method in ("fork", "spawn")]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
""")
    done = subprocess.run([sys.executable, "children.py"], cwd=tmp_path, capture_output=True,
                          text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert read_shards(tmp_path / "spawn") == read_shards(tmp_path / "fork") == cut(
        reference(DOCUMENTS), 700)


def test_a_source_whose_files_changed_is_not_continued(tmp_path, monkeypatch):
    folder = tmp_path / "in"
    for name in "bcd":
        write_source(folder, "jsonl", make_documents(20,
                                                     ord(name))).rename(folder / f"{name}.jsonl")
    (folder / "d.jsonl").write_text('{"text": "whole"}\n{torn')
    with pytest.raises(cli.BadInput, match="d.jsonl"):
        make(folder, tmp_path / "out", "--shard_size", 100)
    write_source(folder, "jsonl", make_documents(20, 1)).rename(folder / "a.jsonl")
    with pytest.raises(cli.BadInput,
                       match="files of --source have changed: .*[bcd].jsonl was number"):
        make(folder, tmp_path / "out", "--shard_size", 100)
    (folder / "a.jsonl").unlink()
    write_source(folder, "jsonl", make_documents(20, ord("d"))).rename(folder / "d.jsonl")
    make(folder, tmp_path / "out", "--shard_size", 100)
    documents = [text for name in "bcd" for text in make_documents(20, ord(name))]
    assert read_shards(tmp_path / "out") == cut(reference(documents), 100)


def test_a_source_that_became_shorter_is_not_called_complete(tmp_path):
    folder = write_source(tmp_path / "in", "jsonl", ["one two three " * 100] * 3).parent
    (folder / "last.jsonl").write_text('{"text": "whole"}\n{torn')
    with pytest.raises(cli.BadInput, match="last.jsonl"):
        make(folder, tmp_path / "out", "--shard_size", 100)
    write_source(folder, "jsonl", ["one two three"])
    (folder / "last.jsonl").write_text("")
    with pytest.raises(cli.BadInput, match="cannot be continued: the source has become shorter"):
        make(folder, tmp_path / "out", "--shard_size", 100)


@pytest.mark.parametrize(
    "change, message",
    [(Path.unlink, "cannot read .*tokenizer.json"),
     (lambda path: path.write_text('{"model": {'), "damaged, or of other shards"),
     (None, "damaged, or of other shards")])
@pytest.mark.parametrize("complete", [True, False])
def test_shards_whose_tokenizer_is_gone_are_not_called_complete(complete, change, message,
                                                                tmp_path):
    """Nor continued. A tokenizer made anew is no remedy: its ids mean other text."""
    source = write_source(tmp_path / "in", "jsonl", sentences(60))
    make(source, tmp_path / "out", "--tokenizer", "bpe:285")
    change = change or train_bpe(DOCUMENTS, 285).save  # as many ids, of other text
    change(tmp_path / "out" / "tokenizer.json")
    if not complete:
        next((tmp_path / "out").glob("*_train_*")).unlink()
    with pytest.raises(cli.BadInput, match=f"{message}.*: put back the one that was made with these shards, "
                                           "or give fineweb.py another --out$"):
        make(source, tmp_path / "out", "--tokenizer", "bpe:285")


# ----------------------------------------------------------------------------------------------------------------------
# What is missing or damaged is made again


def test_a_shard_deleted_or_damaged_is_written_again_with_the_same_ids(
        tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(text_files, "TXT_LINES", 7)
    sources, documents = mixed_source(tmp_path / "in")
    flags = ["--shard_size", 5000, "--workers", 2]
    out = tmp_path / "out"
    make(sources, out, *flags)
    whole = {path: path.read_bytes() for path in out.iterdir()}
    shards = sorted(out.glob("*.npy"), key=lambda p: p.name[-10:])
    for number, path in enumerate(
            shards):  # in turn: deleted, cut off, of another length, not a shard
        [
            path.unlink, lambda p=path: p.write_bytes(whole[p][:-2]),
            lambda p=path: np.save(p, np.zeros(3, np.uint16)), lambda p=path: p.write_text("x")
        ][number % 4]() if number % 5 else None
    capsys.readouterr()
    make(sources, out, *flags)
    said = capsys.readouterr().out
    assert said.count("is missing or damaged: writing it again") == sum(
        number % 5 > 0 for number in range(len(shards)))
    assert f"{out}/ is complete" in said and {path: path.read_bytes()
                                              for path in out.iterdir()} == whole
    assert [t for _, ids in read_shards(out) for t in ids] == reference(documents)

    shards[0].unlink()  # the source is another now
    write_source(tmp_path / "in" / "0", "jsonl.gz", make_documents(70, seed=99))
    with pytest.raises(cli.BadInput, match="cannot be made again, as the source has changed"):
        make(sources, out, *flags)
    assert not shards[0].exists()
    shards[0].symlink_to("an_unmounted_disk")  # what cannot be read may be good
    with pytest.raises(files.Unreadable, match="a link to an_unmounted_disk"):
        make(sources, out, *flags)


def test_a_repair_that_fails_leaves_what_dedup_has_met(tmp_path, monkeypatch):
    """Of two files, the second torn, a shard of the first is missing, whose file then holds
    the second's text for a while: short documents."""
    monkeypatch.setattr(text_files, "BATCH_ROWS", 5)
    first, second = jsonl([{"text": text} for text in DOCUMENTS]), jsonl([{"text": f"short {i}"}
                                                                          for i in range(2000)])
    names, flags = [tmp_path / "1.jsonl",
                    tmp_path / "2.jsonl"], ["--shard_size", 2000, "--workers", 1, "--dedup"]

    def attempt(out, *contents):
        for name, content in zip(names, contents, strict=True):
            name.write_bytes(content)
        make(names, tmp_path / out, *flags)

    attempt("whole", first, second)
    with pytest.raises(cli.BadInput, match="cannot read .*2.jsonl"):
        attempt("out", first, second[:-9])
    (tmp_path / "out" / "out_train_000001.npy").unlink()
    with pytest.raises(cli.BadInput, match="cannot be made again"):
        attempt("out", second, second)
    attempt("out", first, second)
    assert read_shards(tmp_path / "out") == read_shards(tmp_path / "whole")


def test_the_meta_json_of_an_older_fineweb_is_checked_but_not_continued(tmp_path, capsys):
    source = write_source(tmp_path / "in", "jsonl")
    make(source, tmp_path / "out", "--shard_size", 1000)
    path = tmp_path / "out" / "meta.json"
    older = {
        key: value
        for key, value in json.loads(path.read_text()).items()
        if key not in ("shards", "command")
    }
    path.write_text(json.dumps(older))
    make(source, tmp_path / "out", "--shard_size", 1000)
    assert "out/ is complete" in capsys.readouterr().out
    path.write_text(json.dumps(older | {"complete": False, "resume": {"source": None, "drop": 0}}))
    with pytest.raises(cli.BadInput, match="begun by an older fineweb.py.*another --out"):
        make(source, tmp_path / "out", "--shard_size", 1000)
    (tmp_path / "out" / "out_train_000001.npy").unlink()
    path.write_text(json.dumps(older))
    with pytest.raises(cli.BadInput, match="train tokens and its meta.json says"):
        make(source, tmp_path / "out", "--shard_size", 1000)


def test_a_run_that_an_older_fineweb_began_is_continued_and_repaired(tmp_path):
    """It noted the state of `datasets` where a row number stands now."""
    source = write_source(tmp_path / "in", "jsonl")
    make(source, tmp_path / "whole", "--shard_size", 1000)
    (tmp_path / "in" / "whole.jsonl").write_bytes(source.read_bytes())
    source.write_bytes(source.read_bytes()[:-9])
    with pytest.raises(cli.BadInput, match="cannot read"):
        make(source, tmp_path / "out", "--shard_size", 1000)
    path = tmp_path / "out" / "meta.json"
    meta = json.loads(path.read_text())
    assert len(meta["shards"]) > 3
    for start in [meta["resume"], *(record["start"] for record in meta["shards"])]:
        if start["source"]:
            start["source"]["state"] = {
                "examples_iterable": {"shard_idx": 0, "shard_example_idx": 64}
            }
    path.write_text(json.dumps(meta))
    (tmp_path / "out" / "out_train_000002.npy").unlink()
    (tmp_path / "in" / "whole.jsonl").replace(source)
    make(source, tmp_path / "out", "--shard_size", 1000)
    assert read_shards(tmp_path / "out") == read_shards(tmp_path / "whole")
    check_meta(tmp_path / "out", cut(reference(DOCUMENTS), 1000), DOCUMENTS)


def test_a_million_spaces_and_shards_before_a_text_that_cannot_be_encoded(tmp_path, monkeypatch):
    documents = ["one " * 300, "before" + " " * 10**6 + "after", "two " * 300]
    source = write_source(tmp_path / "in", "jsonl", documents)
    make(source, tmp_path / "out", "--shard_size", 10**5)
    ids = [token for _, shard in read_shards(tmp_path / "out") for token in shard]
    assert tiktoken.get_encoding("gpt2").decode(ids) == "".join(EOT + text for text in documents)

    whole, encode = reference(["good " * 300] * 3), shard_writer.encode
    source = write_source(tmp_path / "in", "jsonl", ["good " * 300] * 3 + ["bad"])
    monkeypatch.setattr(text_files, "BATCH_ROWS", 1)

    def fails(batch, *rest):
        if batch.texts == ["bad"]:
            raise MemoryError
        return encode(batch, *rest)

    monkeypatch.setattr(shard_writer, "encode", fails)
    with pytest.raises(MemoryError):
        make(source, tmp_path / "fails", "--shard_size", 200, "--workers", 4)
    assert [ids for _, ids in read_shards(tmp_path / "fails")
            ] == [whole[i:i + 200] for i in range(0,
                                                  len(whole) - 199, 200)]


# ----------------------------------------------------------------------------------------------------------------------
# Bad input: one line, exit code 2


@pytest.fixture
def fails(tmp_path, monkeypatch, capfd):
    """fails(flags...) runs fineweb.py as its `__main__` does, in tmp_path -> the one line it ends
    with."""
    def run(*flags):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["fineweb.py", *map(str, flags)])
        with pytest.raises(SystemExit) as caught:
            cli.run(fineweb.main)
        stderr = capfd.readouterr().err
        assert caught.value.code == 2 and stderr.startswith("fineweb.py: error: ") and stderr.count(
            "\n") == 1, stderr
        return stderr
    return run


@pytest.mark.parametrize("form", ["parquet", "jsonl", "jsonl.gz", "json"])
def test_a_missing_column_names_those_there_are(form, tmp_path, fails):
    source = write_source(tmp_path / "in", form, column="content")
    assert f"{source} has no column text: name one of content, id by --text_column" in fails(
        "--source", source).replace("id, content", "content, id")


def good(tmp_path):
    return write_source(tmp_path / "good", "jsonl")


def parquet(documents):
    file = io.BytesIO()
    pq.write_table(pa.table({"text": documents}), file)
    return file.getvalue()


DAMAGED = {
    "torn.jsonl": jsonl([{"text": "ok"}] * 70)[:-5],
    "torn.json": b'[{"text": "ok"}, {"te',
    "wrong.jsonl": b'{"text": "\xff\xfe"}\n',
    "bad.jsonl.gz": b"no gzip",
    "short.jsonl.gz": gzip.compress(jsonl([{"text": str(i)} for i in range(999)]))[:-300],
    "bad.jsonl.zst": b"no zstd",
    "short.jsonl.zst": zstd(jsonl([{"text": str(i)} for i in range(9999)]))[:-300],
    "torn.parquet": b"PAR1 torn",
    "inside.parquet": parquet(DOCUMENTS)[:2000] + bytes(4000) + parquet(DOCUMENTS)[6000:],
    "wrong.txt": b"caf\xe9 latin-1",
    "short.txt.gz": gzip.compress(b"words " * 999)[:-9],
}


LATE = ("torn.jsonl", "short.jsonl.gz", "inside.parquet")  # the beginning of the file is whole


@pytest.mark.parametrize(
    "name", DAMAGED)  # the bytes hold the time: they must not become the name of a test
def test_a_damaged_file_is_named_and_what_is_written_stays(name, tmp_path, fails):
    (tmp_path / name).write_bytes(DAMAGED[name])
    flags = ["--source", good(tmp_path), tmp_path / name, "--out", "out", "--shard_size", 300]
    line = fails(*flags)
    assert f"cannot read {tmp_path / name} (" in line and "repair it or leave it out" in line
    if name not in LATE:  # before the first token
        assert not (tmp_path / "out").exists()
        return
    shards = read_shards(tmp_path / "out")
    whole = cut(reference(DOCUMENTS), 300)[:-1]  # all that stands before the damage
    assert shards[:len(whole)] == whole
    assert name in fails(*flags)  # again: it continues, up to the same place
    assert read_shards(tmp_path / "out") == shards


VALUE = st.one_of(st.text(max_size=12), st.text(max_size=12), st.none(), st.integers(-9, 9),
                  st.just(""), st.just(" \n"), st.lists(st.text(max_size=2), max_size=2))


@st.composite
def any_jsonl(draw):
    """Lines of a jsonl, mostly as they should be, then with luck something cut out or put in."""
    rows = draw(
        st.lists(st.fixed_dictionaries({"text": VALUE}, optional={"id": st.integers(0, 9)}),
                 max_size=4))
    data = b"".join(
        json.dumps(row, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass") + b"\n"
        for row in rows)
    if draw(st.booleans()):
        start = draw(st.integers(0, len(data)))
        data = data[:start] + draw(st.binary(max_size=6)) + data[start + draw(st.integers(0, 6)):]
    return data


def texts_of(data):
    """What a reader of JSON finds in the bytes of a jsonl; None if a line is none."""
    try:
        rows = [json.loads(line) for line in data.decode().split("\n") if line.strip()]
        return [
            row["text"] for row in rows if isinstance(row.get("text"), str) and row["text"].strip()
        ]
    except (ValueError, AttributeError, KeyError):
        return None


def test_any_bytes_are_bad_input_or_shards_of_what_json_finds_in_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    count, found = iter(range(10**6)), []

    @settings(derandomize=True, deadline=None, max_examples=25,
              suppress_health_check=list(HealthCheck))
    @given(data=st.one_of(any_jsonl(), any_jsonl(), any_jsonl(), st.binary(max_size=60)))
    @example(b'{"text": "a"}\n{"text": "b c"}\n')
    @example(b'{"text": "\\u00e4 b", "id": 1}\n\n{"text": ""}\n')
    @example(b'{"text": null}\n{"text": "a b c"}')
    @example(b'{"text": "a"}\n{"text": "b')
    @example(b'\xff\xfe{"text": "a"}\n')
    @example(b"[" * 100_000)
    def check(data):
        name = f"case{next(count)}"
        Path(f"{name}.jsonl").write_bytes(data)
        try:
            make(f"{name}.jsonl", name, "--workers", 1)
        except cli.BadInput as error:
            assert name in str(error) or "no documents" in str(error)
            assert not list(Path(name).glob("*.npy"))
            found.append(False)
            return
        want = texts_of(data)
        assert want, data  # the folder is complete: then there was something to read
        ids = [token for _, shard in read_shards(Path(name)) for token in shard]
        assert ids == reference(want)
        assert tiktoken.get_encoding("gpt2").decode(ids) == "".join(EOT + text for text in want)
        found.append(True)

    check()
    assert 4 < sum(found) < len(found) - 4  # the test did see both


@pytest.mark.parametrize("rows", [[], [None, "", "  "]])
@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "parquet", "json"])
def test_no_documents(rows, form, tmp_path, fails):
    source = write_source(tmp_path / "in", form, rows)
    if form == "parquet":
        pq.write_table(pa.table({"text": pa.array(rows, pa.string())}), source)
    train_bpe(DOCUMENTS, 300).save(tmp_path / "mine.json")
    line = fails("--source", source, "--tokenizer", "mine.json", "--out", "a/b")
    assert not (tmp_path / "a").exists()
    assert f"the source holds no documents: nothing was written; check --source and --text_column ({len(rows)} rows" in line


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--source", "absent.parquet"], "no file absent.parquet"),
        (["--source", "*.jsonl.gz"], "no file *.jsonl.gz"),
        (["--source", "empty_folder"], "empty_folder holds no file of text"),
        (["--source", "gone/"], "no file gone/"),
        (["--source", "notes.*"], "cannot tell what notes.md is"),
        (["--source", "pipe.jsonl"], "cannot read pipe.jsonl (not a regular file)"),
        (["--source", "good", "links"
          ], "cannot read links/dangling.txt (a link to nowhere, which does not exist)"),
        (["--source", "some/dataset"], "cannot reach the dataset some/dataset (ConnectionError: "),
        ([], "cannot reach the dataset HuggingFaceFW/fineweb-edu"),
        (["--docstrings", "--source", "good/data.jsonl"], "each name the text"),
        (["--source", "good/data.jsonl", "--name", "sample-10BT"
          ], "--name is a configuration of a dataset of the hub"),
        (["--source", "good", "--out", "good/out"], "--out good/out is in the folder good"),
        (["--source", "good/data.jsonl", "--out", "notes.md"], "cannot write to notes.md"),
        (["--source", "good/data.jsonl", "--tokenizer", "gpt5"], "unknown tokenizer 'gpt5'"),
        (["--source", "good/data.jsonl", "--tokenizer", "torn.json"], "torn.json is damaged"),
        (["--source", "good/data.jsonl", "--tokenizer", "bpe:x"], "write bpe:<number of ids>"),
        (["--source", "good/data.jsonl", "--tokenizer", "bpe:1000000000000"
          ], "write bpe:<number of ids>"),
        (["--source", "good/data.jsonl", "--tokenizer", "bpe:1000001"], "to 1,000,000 ids"),
        (["--source", "good/data.jsonl", "--tokenizer", "bpe:99999"
          ], "too small for a BPE of 99999"),
        (["--source", "good/data.jsonl", "--shard_size", "0"], "--shard_size must be at least 1"),
        (["--source", "good/data.jsonl", "--max_tokens", "1"
          ], "--max_tokens must be at least 2"),  # one to train, one to validate
        (["--source", "good/data.jsonl", "--val_tokens", "1e9"
          ], "--val_tokens 1,000,000,000 leaves nothing"),
        (["--source", "good/data.jsonl", "--val_tokens", TOTAL
          ], f"--val_tokens {TOTAL:,} leaves nothing"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "")
def test_bad_input(flags, message, tmp_path, fails):
    good(tmp_path)
    (tmp_path / "empty_folder").mkdir()
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "dangling.txt").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "notes.md").write_text("notes")
    (tmp_path / "torn.json").write_text('{"model": ')
    assert message in fails(*flags)
    assert not list(tmp_path.rglob("*.npy")) and (tmp_path / "notes.md").read_text() == "notes"
    assert not [
        path for path in tmp_path.iterdir()
        if path.is_dir() and path.name not in ("good", "in", "links", "empty_folder")
    ]  # no --out


def test_shards_of_other_settings_are_not_touched(tmp_path, fails, monkeypatch):
    source = good(tmp_path)
    flags = ["--source", source, "--out", "out", "--shard_size", 500]
    monkeypatch.chdir(tmp_path)
    fineweb.main([str(flag) for flag in flags])
    before = {p: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    for changed in (["--shard_size", 400], ["--tokenizer",
                                            "cl100k_base"], ["--tokenizer", "bpe:300"],
                    ["--val_tokens", 0], ["--max_tokens", 9], ["--text_column",
                                                               "body"], ["--source", "x.txt"]):
        line = fails(*flags, *changed)
        assert re.search(f"out/ holds shards made with (no )?{changed[0]}[ ,]",
                         line) and "give another --out" in line
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    np.save(foreign / "edufineweb_train_000001.npy", np.zeros(3, np.uint16))
    assert "shards of another program (edufineweb_train_000001.npy)" in fails(
        "--source", source, "--out", "foreign")
    (tmp_path / "busy").mkdir()
    with files.locked(tmp_path / "busy", ""):
        assert "busy is in use by another process: wait until it is done" in fails(
            "--source", source, "--out", "busy")
    assert not list((tmp_path / "busy").iterdir())
    assert {p: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_full_disk_keeps_what_is_written_and_the_run_continues(tmp_path, fails, monkeypatch):
    flags = ["--source", good(tmp_path), "--out", "out", "--shard_size", 500]
    for name in ("out_val_000000.npy", "out_train_000002.npy", "meta.json"):
        def open_full(path, mode, name=name):
            full = mode == "xb" and path.name.startswith(f"{name}.")
            return open("/dev/full", "wb") if full else open(path, mode)

        with monkeypatch.context() as patch:
            patch.setattr(files, "open", open_full, raising=False)
            assert "the disk of out/ is full: free some space and give the same command again" in fails(
                *flags)
        shards = read_shards(tmp_path / "out")
        assert shards == cut(reference(DOCUMENTS), 500)[:len(shards)]
    fineweb.main([str(flag) for flag in flags])
    assert read_shards(tmp_path / "out") == cut(reference(DOCUMENTS), 500)
    check_meta(tmp_path / "out", cut(reference(DOCUMENTS), 500), DOCUMENTS)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
@pytest.mark.parametrize(
    "to, says",
    [("> /dev/full",
      "fineweb.py: error: cannot go on (No space left on device): free some disk space\n"),
     ("| true", "")], ids=["full", "closed"])
def test_an_output_that_cannot_be_written_is_not_called_the_folders_disk(to, says, tmp_path):
    source = write_source(tmp_path / "in", "jsonl")
    words = f"{sys.executable} {ROOT / 'fineweb.py'} --source {source} --out out --shard_size 500 {to}"
    done = subprocess.run(words, shell=True, cwd=tmp_path,
                          env=os.environ | {"PYTHONUNBUFFERED": "1"}, capture_output=True,
                          text=True, timeout=120, check=False)
    assert done.stderr == says


def test_local_files_need_no_network_and_no_home(tmp_path, launch):
    """Through `datasets`, each file and pass asked the hub, 10 s each where packets are dropped,
    and wrote to HOME."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("""
import os, sys

def watch(event, args):
    if event in ("socket.getaddrinfo", "socket.connect"):
        os.write(2, b"asked the network\\n")
        os._exit(9)

sys.addaudithook(watch)
""")
    write_source(tmp_path / "in", "parquet")
    write_source(tmp_path / "in", "jsonl.zst")
    env = {"HF_HUB_OFFLINE": "0", "HOME": "/proc/none", "PYTHONPATH": str(tmp_path / "site")}
    done = launch("fineweb.py", "--source", "in", "--out", "out", "--tokenizer", "bpe:300", env=env)
    assert (done.returncode, done.stderr) == (0, "") and "out/ is complete" in done.stdout


def test_the_script_itself(tmp_path, launch):
    """Bad input: one line, code 2, also without a network. A source of two documents: a warning."""
    done = launch("fineweb.py", "--source", "some/dataset",
                  env={"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}, timeout=30)
    assert done.returncode == 2 and "cannot reach the dataset some/dataset" in done.stderr and done.stderr.count(
        "\n") == 1
    write_source(tmp_path, "jsonl", ["one", "two"])
    done = launch("fineweb.py", "--source", "data.jsonl")
    assert done.returncode == 0 and done.stderr.count("\n") == 1
    assert "warning: the source has fewer than 3 documents (2)" in done.stderr
