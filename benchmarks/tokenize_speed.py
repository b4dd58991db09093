"""fineweb.py against plain tiktoken: tokens per second from parquet to shards, and of encoding in
memory.

    python benchmarks/tokenize_speed.py --source some.parquet

Both encode the same documents with GPT-2's tokenizer. The two alternate, so that load on the
machine affects both. tiktoken: `encode_ordinary_batch` on a list in memory. fineweb: reads parquet,
encodes, cuts and writes shards.
"""

import contextlib
import io
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fineweb  # noqa: E402
from lib.cli import BadInput, flag, parse, run  # noqa: E402
from lib.files import read_json  # noqa: E402
from lib.tokenizers import load_tokenizer  # noqa: E402


@dataclass
class Config:
    source: tuple[str, ...] = flag((), "parquet files, with the text in a column named text")
    megabytes: int = flag(30, "megabytes of text to encode", at_least=1)
    repetitions: int = flag(5, "timed runs of each", at_least=1)
    shard_size: int = flag(1_000_000, "tokens per shard", at_least=1)


def main(argv):
    (cfg,), _ = parse((Config,), argv, __doc__)
    documents = read(cfg)
    encoding = load_tokenizer("gpt2").encoding
    cores = os.cpu_count()
    size = sum(len(text.encode()) for text in documents)
    print(f"{len(documents):,} documents, {size / 1e6:.1f} MB; {cores} cores; medians of "
          f"{cfg.repetitions} alternating runs\n")
    print("| threads | what | tiktoken | fineweb.py | fineweb / tiktoken (median of the pairs; "
          "lowest, highest) |")
    print("|---:|---|---:|---:|---|")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "documents.parquet"
        write(documents, path)
        for threads in sorted({1, cores}):
            plain = []  # per run: tokens per second, and per second of CPU time
            ours = []
            for i in range(cfg.repetitions + 1):
                seconds, tokens = timed(encode, encoding, documents, threads)
                plain.append(tokens / seconds)
                out = Path(folder) / f"{threads}_{i}"
                seconds, written = timed(make_shards, path, out, threads, cfg)
                ours.append(tokens / seconds)
                assert written == tokens, (written, tokens)
            for column, what in enumerate(("tokens per second", "tokens per second of CPU time")):
                # the first run warms up
                print_row(threads, what, [run[column] for run in plain[1:]],
                          [run[column] for run in ours[1:]])


def print_row(threads, what, plain, ours):
    ratios = sorted(b / a for a, b in zip(plain, ours))
    print(f"| {threads} | {what} | {statistics.median(plain):,.0f} | {statistics.median(ours):,.0f}"
          f" | {statistics.median(ratios):.3f} ({ratios[0]:.3f}, {ratios[-1]:.3f}) |", flush=True)


def read(cfg):
    """The first `megabytes` of text as a list of str."""
    import pyarrow.parquet

    if not cfg.source:
        raise BadInput("no --source: name parquet files")
    documents = []
    left = cfg.megabytes * 10**6
    for path in cfg.source:
        try:
            batches = pyarrow.parquet.ParquetFile(path).iter_batches(
                batch_size=64, columns=["text"])
            for batch in batches:
                for text in filter(None, batch["text"].to_pylist()):
                    if left <= 0:
                        return documents
                    documents.append(text)
                    left -= len(text.encode())
        except (OSError, ValueError) as error:
            raise BadInput(f"cannot read {path}: {error}") from error
    return documents


def write(documents, path):
    """Write a parquet file like the hub's: zstd, row groups of a thousand rows."""
    import pyarrow

    pyarrow.parquet.write_table(pyarrow.table({"text": documents}), path, compression="zstd",
                                row_group_size=1000)


def timed(work, *given):
    """-> (array of wall seconds and CPU seconds of all threads, the result of `work`)."""
    started = np.array([time.perf_counter(), time.process_time()])
    result = work(*given)
    return np.array([time.perf_counter(), time.process_time()]) - started, result


def encode(encoding, documents, threads):
    """The number of tokens, with one end-of-text per document, as fineweb.py writes them."""
    encoded = encoding.encode_ordinary_batch(documents, num_threads=threads)
    return sum(map(len, encoded)) + len(documents)


def make_shards(path, out, threads, cfg):
    """The number of tokens that fineweb.py writes."""
    with contextlib.redirect_stdout(io.StringIO()):
        fineweb.main(["--source", str(path), "--out", str(out), "--workers", str(threads),
                      "--shard_size", str(cfg.shard_size)])
    splits = read_json(out / "meta.json", "")["splits"]
    return sum(split["tokens"] for split in splits.values())


if __name__ == "__main__":
    run(main)
