"""shards.py against parsers written anew: python -m pytest tests/test_shards.py -n 2"""

import io
import struct

import numpy as np
import pytest
from helpers import write_bin
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lib.cli import BadInput
from lib.shards import read_shard

PROPERTY = settings(derandomize=True, deadline=None, max_examples=150,
                    suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("damage", ["truncated.npy", "truncated.bin", "empty.npy", "empty.bin", "float.npy", "2d.npy",
                                    "int64.npy", "magic.bin", "text.npy", "header.bin", "big.npy", "behind.npy", "behind.bin",
                                    "more.bin", "negative.bin", "zip.npy", "pickle.npy", "0d.npy", "folder.npy", "link.bin"])
def test_damaged_shards_are_bad_input(damage, tmp_path):
    path, ids = tmp_path / damage, np.arange(1000, dtype=np.uint16)
    kind = damage.split(".")[0]
    if damage.endswith(".bin"):
        write_bin(path, ids, 20240520 if kind != "magic" else 1, 1, {"more": 1001, "negative": -1}.get(kind))
    else:
        odd = {"float": ids.astype(np.float32), "2d": ids.reshape(10, 100), "int64": ids.astype(np.int64),
               "big": ids.astype(">u2"),
               "0d": ids[7], "pickle": np.array([ids, None], dtype=object)}
        np.save(path, odd.get(kind, ids))
    if kind == "behind":
        path.write_bytes(path.read_bytes() + b"\0\0")
    if kind == "zip":
        np.savez(path.open("wb"), ids)
    keep = {"truncated": path.stat().st_size - 100, "empty": 0, "header": 100}.get(kind)
    if keep is not None:
        path.write_bytes(path.read_bytes()[:keep])
    if kind == "text":
        path.write_text("no tokens here")
    if kind in ("folder", "link"):
        path.unlink()
        path.mkdir() if kind == "folder" else path.symlink_to("nowhere")
    with pytest.raises(BadInput, match=damage):
        read_shard(path)


def parse_npy(data):
    """The ids in a .npy's bytes, read without a memory map; None if it is no whole shard."""
    file = io.BytesIO(data)
    try:
        ids = np.load(file)
    except Exception:  # noqa: BLE001 (whatever numpy says: it is none)
        return None
    whole = isinstance(ids, np.ndarray) and ids.ndim == 1 and ids.dtype in (np.uint16, np.uint32) and file.tell() == len(data)
    return ids if whole else None


def parse_bin(data):
    """The ids in the bytes of llm.c's .bin, by hand; None if it is no whole shard."""
    if len(data) < 1024:
        return None
    magic, version, count = struct.unpack("<3i", data[:12])
    size = {(20240520, 1): 2, (20240801, 7): 4}.get((magic, version))
    if size is None or len(data) != 1024 + size * count:
        return None
    return np.array(struct.unpack(f"<{count}{'H' if size == 2 else 'I'}", data[1024:]), dtype=f"<u{size}")


@st.composite
def shard_bytes(draw, kind):
    """A shard with something done to it, or with luck nothing."""
    ids = np.arange(draw(st.sampled_from([0, 1, 2, 64])), dtype=draw(st.sampled_from([np.uint16, np.uint32]))) * 3
    if kind == "npy":
        file = io.BytesIO()
        np.save(file, ids)
        data, header = file.getvalue(), 128
    else:
        head = (20240520, 1) if ids.dtype == np.uint16 else (20240801, 7)
        data, header = struct.pack("<256i", *head, len(ids), *[0] * 253) + ids.tobytes(), 12
    data = bytearray(data)
    for damage in draw(st.lists(st.sampled_from(["flip", "flip", "truncate", "append", "replace"]), max_size=3)):
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


def check_read_shard(data, kind, folder):
    path, want = folder / f"shard.{kind}", {"npy": parse_npy, "bin": parse_bin}[kind](data)
    path.unlink(missing_ok=True)  # an earlier one may still be mapped
    path.write_bytes(data)
    if want is None:
        with pytest.raises(BadInput, match=f"shard.{kind}"):
            read_shard(path)
    else:
        have = read_shard(path)
        assert have.dtype == want.dtype and have.dtype in (np.uint16, np.uint32) and have.ndim == 1
        assert np.array_equal(have, want)
    return want is not None


@pytest.mark.filterwarnings("ignore")  # numpy's, about odd headers
@pytest.mark.parametrize("kind", ["npy", "bin"])
def test_a_damaged_shard_is_bad_input_or_read_as_an_independent_parser_does(kind, tmp_path):
    whole = []

    @PROPERTY
    @given(data=shard_bytes(kind))
    def check(data):
        whole.append(check_read_shard(data, kind, tmp_path))

    check()
    assert 10 < sum(whole) < len(whole) - 10  # the test did see both


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["npy", "bin"])
@PROPERTY
@given(start=st.sampled_from([b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00", b"PK\x03\x04", b"\x80\x04",
                              struct.pack("<3i", 20240520, 1, 4)]),
       data=st.one_of(st.binary(max_size=2000), st.binary(min_size=1000, max_size=1100)))
def test_random_bytes_are_no_shard(start, data, kind, tmp_path):
    check_read_shard(start + data, kind, tmp_path)


@pytest.mark.parametrize("kind", ["npy", "bin"])
def test_an_empty_shard_with_bytes_behind_it_is_damaged(kind, tmp_path):
    path = tmp_path / f"a.{kind}"
    if kind == "npy":
        np.save(path, np.zeros(0, dtype=np.uint16))
    else:
        write_bin(path, np.zeros(0, dtype=np.uint16), 20240520, 1)
    assert len(read_shard(path)) == 0
    with open(path, "ab") as file:  # a header that lost its count
        file.write(bytes(200))
    with pytest.raises(BadInput, match=f"a.{kind} is not a whole shard"):
        read_shard(path)
