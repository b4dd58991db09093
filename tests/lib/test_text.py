"""Text from files and from a hub. Run: python -m pytest tests/lib/test_text.py"""

import json
import random
import tracemalloc

import numpy as np
import pytest
import tiktoken

from lib import text as texts
from lib.cli import BadInput
from lib.tokenizers import EOT, SPLIT

EOT_ID = 50256


def other_rule(name, monkeypatch):
    """Another encoding's splitting rule over GPT-2's vocabulary, as its own files are not here."""
    import tiktoken_ext.openai_public as public

    ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
    rule = SPLIT
    if name != "ours":
        monkeypatch.setattr(public, "load_tiktoken_bpe", lambda *_, **__: dict(ranks))
        rule = getattr(public, name)()["pat_str"]
    return tiktoken.Encoding(f"{name}-rule", pat_str=rule, mergeable_ranks=ranks,
                             special_tokens={EOT: EOT_ID})


def read_pieces(path, state=None):
    """A .txt as fineweb.py reads it -> list of (its text, the state after it)."""
    return [(rows[0], after) for rows, after in texts.read_txt(str(path), "text", state)]


def join(pieces):
    return "".join(text for text, _ in pieces)


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base", "ours"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("seed", range(4))
def test_pieces_of_a_txt_encode_as_the_whole(name, newline, seed, tmp_path, monkeypatch):
    encoding = tiktoken.get_encoding("gpt2")
    if name != "gpt2":
        encoding = other_rule(name, monkeypatch)
    rng = random.Random(seed)
    bits = ["word", "Über", "a", " ", " ", "  ", newline, newline * 2, "\t", "3", "45", "½", "!",
            "/", "。", "字", "'s", "e\u0301", "_", "🙂"]
    text = "".join(rng.choices(bits, k=3000))
    path = tmp_path / "a.txt"
    codec = "utf-8-sig" if seed == 3 else "utf-8"  # with a byte order mark
    path.write_bytes(text.encode(codec))
    text = text.replace("\r\n", "\n")  # all line ends are read as \n
    monkeypatch.setattr(texts, "TXT_LINES", rng.choice([2, 7, 30]))

    pieces = read_pieces(path)
    assert len(pieces) > 5 and join(pieces) == text
    ids = []
    for piece, _ in pieces:
        ids += encoding.encode_ordinary(piece)
    assert ids == encoding.encode_ordinary(text)
    for middle in (0, len(pieces) // 2, len(pieces) - 2):
        state = json.loads(json.dumps(pieces[middle][1]))  # as in meta.json
        assert join(read_pieces(path, state)) == join(pieces[middle + 1:])


def test_a_txt_without_a_place_to_cut_is_read_in_bounded_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "TXT_LINES", 2)
    (tmp_path / "a.txt").write_text("-\n" * 1000)
    pieces = read_pieces(tmp_path / "a.txt")
    assert join(pieces) == "-\n" * 1000
    assert max(len(text) for text, _ in pieces) == 2 * 65 * 2


def test_seen_forgets_only_when_full_and_is_restored_at_any_position(tmp_path, monkeypatch):
    monkeypatch.setattr(texts.Seen, "BUCKETS", 4)
    seen = texts.Seen(tmp_path / "hashes.bin")
    documents = [str(n % 20) for n in range(50)]
    seen.rewind(0)
    assert seen.new(documents) == documents[:20] and seen.count == 20  # 20 hashes in 32 slots
    many = [f"document {n}" for n in range(500)]
    assert seen.new(many) == many
    assert len(seen.new(many)) > 400  # forgotten: they are kept, nothing new is dropped
    other = texts.Seen(tmp_path / "hashes.bin")
    other.rewind(10)
    assert other.new(documents) == documents[10:20]
    with pytest.raises(BadInput, match="has .* hashes, not the 9,999"):
        other.rewind(9999)


def test_seen_is_restored_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(texts.Seen, "BUCKETS", 2)
    monkeypatch.setattr(texts, "HASHES", 1000)
    np.arange(1, 20_001, dtype=np.uint64).tofile(tmp_path / "hashes.bin")
    tracemalloc.start()
    texts.Seen(tmp_path / "hashes.bin").rewind(20_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200_000  # all at once: 160,000 bytes, and 700,000 as Python integers
