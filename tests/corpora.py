"""Folders of shards whose ids show their source, as a Corpus: for lib/test_corpus.py and
lib/test_streams.py."""

from types import SimpleNamespace

import numpy as np

from lib.corpus import Corpus

T = 8  # block_size
TOKENIZER = SimpleNamespace(vocab_size=60_000, eot=0)
SIZES = (3000, 1000, 500)  # tokens of the first train shard; the second has half as many
CONFIG = dict(follow=False, curriculum=None, curriculum_steps=None, curriculum_mix="cosine",
              total_batch_size=100 * T, batch_warmup=0)


def corpus_of(*data, **changes):
    return Corpus(SimpleNamespace(data=tuple(map(str, data)), **CONFIG | changes))


def write_folders(root):
    """Three folders, a, b and c, of two train shards each, with ids from 10,000 to 19,999 in the
    first, and so on."""
    rng = np.random.default_rng(0)
    folders = []
    for i, size in enumerate(SIZES):
        folder = root / "abc"[i]
        folder.mkdir()
        for split, index, n in (("val", 0, 50), ("train", 1, size), ("train", 2, size // 2)):
            ids = 10_000 * (i + 1) + 3 * np.arange(n) % 9_000 + index
            ids[rng.integers(0, n, n // 20)] = TOKENIZER.eot
            np.save(folder / f"x_{split}_{index:06d}.npy", ids.astype(np.uint16))
        folders.append(folder)
    return folders
