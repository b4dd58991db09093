"""Shards and meta.json against independent parsers. Run: python -m pytest tests/lib/test_shards.py
"""

import errno
import io
import json
import mmap
import os
import struct
import subprocess
import sys
import zlib
from functools import partial

import numpy as np
import pytest
from helpers import ROOT, write_bin, write_lines
from hypothesis import example, given, settings
from hypothesis import strategies as st

import fineweb
from lib.cli import BadInput
from lib.files import Unreadable
from lib.shard_meta import read_meta
from lib.shards import Damaged, Shards, check_ids, check_shards, read_shard
from lib.tokenizers import load_tokenizer

# --------------------------------------------------------------------------------------------------
# One shard


IDS = np.arange(1000, dtype=np.uint16)
NOT_SHARDS = {  # arrays in a .npy
    "float": IDS.astype(np.float32), "2d": IDS.reshape(10, 100), "int64": IDS.astype(np.int64),
    "big": IDS.astype(">u2"), "0d": IDS[7], "pickle": np.array([IDS, None], dtype=object)}


@pytest.mark.parametrize("kind", NOT_SHARDS)
def test_an_array_that_is_not_a_shard_is_damaged(kind, tmp_path):
    path = tmp_path / f"{kind}.npy"
    np.save(path, NOT_SHARDS[kind])
    check_damaged(path)


@pytest.mark.parametrize("name, magic, count", [
    ("magic.bin", 1, None), ("more.bin", 20240520, 1001), ("negative.bin", 20240520, -1)])
def test_a_bin_with_a_wrong_header_is_damaged(name, magic, count, tmp_path):
    write_bin(tmp_path / name, IDS, magic, 1, count)
    check_damaged(tmp_path / name)


@pytest.mark.parametrize("name", ["longer.npy", "longer.bin"])
def test_ids_after_a_header_without_them_are_damaged(name, tmp_path):
    path = tmp_path / name
    if name.endswith(".bin"):
        write_bin(path, IDS[:0], 20240520, 1)
    else:
        np.save(path, IDS[:0])
    assert len(read_shard(path)) == 0
    path.write_bytes(path.read_bytes() + bytes(200))
    check_damaged(path)


def test_other_files_are_damaged(tmp_path):
    with open(tmp_path / "zip.npy", "wb") as file:
        np.savez(file, IDS)
    check_damaged(tmp_path / "zip.npy")
    (tmp_path / "text.npy").write_text("no tokens here")
    check_damaged(tmp_path / "text.npy")


def check_damaged(path):
    with pytest.raises(Damaged, match=f"{path.name} is (damaged|not a shard)"):
        read_shard(path)


def test_an_unreadable_file_is_not_called_damaged(tmp_path):
    os.mkfifo(tmp_path / "pipe.npy")
    (tmp_path / "link.npy").symlink_to("nowhere")
    (tmp_path / "folder.bin").mkdir()
    for name, reason in (("pipe.npy", "not a regular file"), ("link.npy", "a link to nowhere"),
                         ("folder.bin", "a folder")):
        with pytest.raises(Unreadable, match=f"cannot read .*{name} .{reason}"):
            read_shard(tmp_path / name)


def parse_npy(data):
    """The ids in a .npy's bytes, read without a memory map; None if it is not a whole shard."""
    file = io.BytesIO(data)
    try:
        ids = np.load(file)
    except Exception:  # noqa: BLE001 (numpy raises many kinds)
        return None
    if not isinstance(ids, np.ndarray) or ids.ndim != 1 or file.tell() != len(data):
        return None
    return ids if ids.dtype in (np.uint16, np.uint32) else None


def parse_bin(data):
    """The ids in the bytes of llm.c's .bin, by hand; None if it is not a whole shard."""
    if len(data) < 1024:
        return None
    magic, version, count = struct.unpack("<3i", data[:12])
    size = {(20240520, 1): 2, (20240801, 7): 4}.get((magic, version))
    if size is None or len(data) != 1024 + size * count:
        return None
    letter = {2: "H", 4: "I"}[size]
    return np.array(struct.unpack(f"<{count}{letter}", data[1024:]), dtype=f"<u{size}")


def whole_shard(kind, ids):
    """(the bytes of a shard, where its header ends)."""
    if kind == "npy":
        file = io.BytesIO()
        np.save(file, ids)
        return file.getvalue(), 128
    magic, version = (20240520, 1) if ids.dtype == np.uint16 else (20240801, 7)
    return struct.pack("<256i", magic, version, len(ids), *[0] * 253) + ids.tobytes(), 12


@st.composite
def shard_bytes(draw, kind):
    """A shard, most of them damaged."""
    dtype = draw(st.sampled_from([np.uint16, np.uint32]))
    ids = np.arange(draw(st.sampled_from([0, 1, 2, 64])), dtype=dtype) * 3
    data, header = whole_shard(kind, ids)
    data = bytearray(data)
    kinds = st.sampled_from(["flip", "flip", "truncate", "append", "replace"])
    for damage in draw(st.lists(kinds, max_size=3)):
        if damage == "flip" and len(data) >= header:
            bit = draw(st.integers(0, 8 * header - 1))
            data[bit // 8] ^= 1 << bit % 8
        elif damage == "truncate":
            del data[draw(st.integers(0, len(data))):]
        elif damage == "append":
            data += draw(st.binary(max_size=9))
        elif damage == "replace":
            start = draw(st.integers(0, max(header - 1, 0)))
            data[start:start + draw(st.integers(0, 9))] = draw(st.binary(max_size=9))
    return bytes(data)


def test_a_shard_is_read_where_mmap_is_refused(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr(mmap, "mmap", refuse)
    np.save(tmp_path / "a_train_000001.npy", np.arange(99, dtype=np.uint16))
    ids = read_shard(tmp_path / "a_train_000001.npy")
    assert ids.tolist() == list(range(99)) and not ids.flags.writeable


def check_read_shard(data, kind, folder):
    """Compare with an independent parser -> whether it is a whole shard."""
    parse = {"npy": parse_npy, "bin": parse_bin}[kind]
    want = parse(data)
    path = folder / f"shard.{kind}"
    path.unlink(missing_ok=True)  # an earlier one may still be mapped
    path.write_bytes(data)
    if want is None:
        with pytest.raises(BadInput, match=f"shard.{kind}"):
            read_shard(path)
        return False
    ids = read_shard(path)
    assert ids.dtype == want.dtype and np.array_equal(ids, want)
    return True


@pytest.mark.filterwarnings("ignore")  # numpy's, about strange headers
@pytest.mark.parametrize("kind", ["npy", "bin"])
def test_a_damaged_shard_is_bad_input_or_read_as_an_independent_parser_does(kind, tmp_path):
    outcomes = set()

    @settings(derandomize=True, deadline=None, max_examples=150)
    @given(data=shard_bytes(kind))
    @example(data=whole_shard(kind, IDS)[0])
    @example(data=whole_shard(kind, IDS)[0][:-1])
    def check(data):
        outcomes.add(check_read_shard(data, kind, tmp_path))

    check()
    assert outcomes == {True, False}


# --------------------------------------------------------------------------------------------------
# The folder


def save(folder, **shards):
    """save(folder, a_val_0=ids, ...) writes .npy shards -> the folder."""
    folder.mkdir(exist_ok=True)
    for name, ids in shards.items():
        np.save(folder / f"{name}.npy", np.asarray(ids, dtype=np.uint16))
    return folder


def test_the_end_of_the_name_decides_the_split(tmp_path):
    save(tmp_path, wiki_train_val_000000=[1], my_val_set_train_000001=[2], train_000002=[3],
         other_val_x_train_000003=[4, 5])
    shards = Shards(tmp_path)
    assert [path.name for path in shards.val] == ["wiki_train_val_000000.npy"]
    names = [path.name for path in shards.train]
    assert names == ["my_val_set_train_000001.npy", "other_val_x_train_000003.npy"]
    assert shards.tokens == {"train": 3, "val": 1} and shards.tokenizer == "gpt2"
    for path in shards.train:
        path.rename(path.with_name(path.name.replace("_0", "_part0")))
    with pytest.raises(BadInput, match="not contain train shards .my_val_set_train_part000001"):
        Shards(tmp_path)


def test_the_same_tokens_in_both_splits_are_refused(tmp_path):
    ids = np.arange(10_000)
    save(tmp_path, a_train_000001=ids, a_val_000000=ids[::-1], a_train_000002=ids[::-1])
    with pytest.raises(BadInput,
                       match="a_train_000002.npy and a_val_000000.npy have the same tokens"):
        Shards(tmp_path)
    save(tmp_path, a_train_000002=np.append(ids[1:], 0))
    assert Shards(tmp_path).tokens == {"train": 20_000, "val": 10_000}


def test_more_shards_than_files_may_be_open(tmp_path):
    save(tmp_path, a_val_000000=[1, 2], **{f"a_train_{i:06d}": [3, i] for i in range(1, 80)})
    code = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
from lib.shards import Shards, read_shard
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
shards = Shards({str(tmp_path)!r})
print(shards.tokens)
held = [read_shard(path) for path in shards.train]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "{'train': 158, 'val': 2}\n"
    assert "lib.files.Unreadable: cannot read" in done.stderr  # not damaged
    assert "Too many open files" in done.stderr


def fineweb_flags(source, out):
    return ["--source", str(source), "--out", str(out), "--shard_size", "200"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of three shards that fineweb.py made."""
    folder = tmp_path_factory.mktemp("made")
    write_lines(folder / "a.jsonl", [{"text": f"document number {i}"} for i in range(100)])
    fineweb.main(fineweb_flags(folder / "a.jsonl", folder / "out"))
    return folder / "out"


def read_meta_json(folder):
    return json.loads((folder / "meta.json").read_text())


def copy(made, folder, **changes):
    """The folder's shards, hard links, with changes in meta.json (None: a missing entry)."""
    folder.mkdir()
    for path in made.glob("*.npy"):
        os.link(path, folder / path.name)
    meta = read_meta_json(made) | changes
    meta = {key: value for key, value in meta.items() if value is not None}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def check_refused(folder, says):
    with pytest.raises(BadInput, match=says) as caught:
        check_shards(Shards(folder), load_tokenizer("gpt2"))
    assert "delete" not in str(caught.value)


def test_a_whole_folder_is_accepted(made):
    check_shards(Shards(made), load_tokenizer("gpt2"))


@pytest.mark.parametrize("changes, says", [
    (dict(complete=False, resume={"source": None, "drop": 0}),
     "is not finished: run `python fineweb.py --source .*a.jsonl.? --shard_size 200 --out .*`"),
    (dict(dtype="uint32"), "says uint32"),
    (dict(vocab_size=512), "says vocab_size 512"),
    (dict(eot=7), "says eot 7,"),
    (dict(tokenizer_crc32=7), "tokenizer.json next to the shards is not the one"),
    (dict(tokenizer="tokenizer.json"), "cannot read .*tokenizer.json .*: restore the one"),
], ids=str)
def test_meta_json_is_compared_with_the_folder_and_the_tokenizer(changes, says, made, tmp_path):
    check_refused(copy(made, tmp_path / "out", **changes), says)


def test_counts_in_meta_json_are_compared(made, tmp_path):
    splits = read_meta_json(made)["splits"]
    splits["train"]["tokens"] += 1
    check_refused(copy(made, tmp_path / "a", splits=splits), "counts of train tokens contradict")
    older = copy(made, tmp_path / "b", splits=splits, shards=None)
    check_refused(older, "has .* train tokens and its meta.json says")


def test_shards_are_compared_with_those_that_meta_json_lists(made, tmp_path):
    missing = copy(made, tmp_path / "a")
    (missing / "out_train_000001.npy").unlink()
    check_refused(missing, "out_train_000001.npy is missing.*python fineweb.py --source")
    save(missing, out_train_000001=[1, 2, 3])
    check_refused(missing, "has 3 tokens, not 200")
    more = save(copy(made, tmp_path / "b"), b_train_000009=[1, 2, 3])
    check_refused(more, "b_train_000009.npy is not one of the shards")


def test_a_damaged_tokenizer_json_is_refused(made, tmp_path):
    folder = copy(made, tmp_path / "out", tokenizer="tokenizer.json")
    (folder / "tokenizer.json").write_text('{"model": {')
    check_refused(folder, "tokenizer.json is damaged, or does not belong .*: restore the one")


def test_an_id_beyond_the_vocabulary_and_a_million_ids_without_an_end_of_text(tmp_path):
    gpt2 = load_tokenizer("gpt2")
    with pytest.raises(BadInput, match="contains the id 60000"):
        check_ids(np.array([1, 60_000]), gpt2.vocab_size, "a.npy")
    save(tmp_path, a_val_000000=[1, 2], a_train_000001=np.ones(1_000_001))
    with pytest.raises(BadInput, match="without gpt2's end of text"):
        check_shards(Shards(tmp_path), gpt2)
    meta = {"tokenizer": "gpt2", "tokenizer_crc32": zlib.crc32(gpt2.spec.encode())}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    check_shards(Shards(tmp_path), gpt2)  # of that very tokenizer: one long text


TORN = [b"", b"{", b"5", b"null", b"[]", b"{}", b"\xff\xfe{}", b"[" * 300_000,
        b'{"tokenizer": ' + b"9" * 5000 + b"}"]
ELSEWHERE = {"name": "../x_val_000000.npy", "tokens": 200, "crc32": 0, "start": {}}
WRONG = [
    dict(tokenizer=5), dict(tokenizer=None), dict(vocab_size="many"), dict(vocab_size=-1),
    dict(dtype="float32"), dict(splits=[]), dict(splits={}),
    dict(splits={"val": {"tokens": -1}, "train": {}}), dict(complete="yes"), dict(settings=5),
    dict(settings=None), dict(skipped_rows=1e999), dict(shards=5), dict(shards=[5]),
    dict(shards=[{}]), dict(resume="here"), dict(complete=False), dict(resume={"drop": -1}),
    dict(complete=False, resume={"source": 5}), dict(shards=[ELSEWHERE]),
]


def check_damaged_meta(folder, source):
    """Training and fineweb.py both refuse the folder in one line, and change nothing."""
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for read in (partial(fineweb.main, fineweb_flags(source, folder)), partial(Shards, folder)):
        with pytest.raises(BadInput, match="meta.json is.*another --out") as caught:
            read()
        assert "delete" not in str(caught.value) and len(str(caught.value)) < 600
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("number", range(len(TORN)))  # bytes would not do as a test's name
def test_a_torn_meta_json_is_one_line(number, made, tmp_path):
    folder = copy(made, tmp_path / "out")
    (folder / "meta.json").write_bytes(TORN[number])
    check_damaged_meta(folder, made.parent / "a.jsonl")


@pytest.mark.parametrize("changes", WRONG, ids=str)
def test_a_wrong_meta_json_is_one_line(changes, made, tmp_path):
    check_damaged_meta(copy(made, tmp_path / "out", **changes), made.parent / "a.jsonl")


def test_a_meta_json_by_hand_only_needs_the_tokenizer(tmp_path):
    save(tmp_path, a_val_000000=[1, 2], a_train_000001=[3])
    (tmp_path / "meta.json").write_text('{"tokenizer": "o200k_base", "by": "hand"}')
    assert Shards(tmp_path).tokenizer == "o200k_base"
    (tmp_path / "meta.json").unlink()
    assert read_meta(tmp_path) is None
    os.mkfifo(tmp_path / "meta.json")
    with pytest.raises(Unreadable, match="not a regular file"):
        Shards(tmp_path)
