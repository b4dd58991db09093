"""Log-likelihoods of many texts under a language model, for multiple-choice evaluations.

Batches are distributed over the processes. Every process makes the same number of forward passes,
as a sharded model needs, and gets all results.
"""

import collections
import contextlib
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from lib.cli import BadInput, RankError
from lib.decoding import NonFinite
from lib.devices import Processes, any_shape, to_device

# Token ids are stored as bytes: with hundreds of thousands of lists, Python's garbage collector
# would take longer than the GPU.
ID_TYPE = "i"
ID_BYTES = array(ID_TYPE).itemsize


class Batch(NamedTuple):
    """One forward pass. Each of its n scored tokens has a target and belongs to a pair."""
    tokens: np.ndarray   # int64 (B, T), padded on the right
    rows: np.ndarray     # int64 (n,), where the logits of each target are
    columns: np.ndarray  # int64 (n,)
    targets: np.ndarray  # int64 (n,)
    owners: np.ndarray   # int64 (n,), index of each target's pair


@torch.no_grad()
def score(model: Any, pairs: Iterable[tuple[list[int], list[int]]], processes: Processes,
          batch_tokens: int, *, batch_size: int | None = None, progress: bool = False,
          stopped: Callable[[], bool] = lambda: False) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihoods of continuations given their contexts, in batches of similar length.

    model: callable, int64 (B, T) and logits_at=(rows, columns), int64 (n,) each -> the logits at
    these positions, fp32 (n, vocab_size); model.config.block_size is the window. The caller sets
    autocast and eval mode. pairs: (context, continuation), lists of token ids, the same on every
    process; the context is not empty. A pair longer than the window loses the start of its context.
    A continuation longer than the window is scored in pieces, each with all the context that fits,
    as in lm-evaluation-harness's rolling windows.

    batch_tokens: tokens per forward pass, padding included. batch_size: sequences per forward pass
    instead. stopped: called before every forward pass on every process, with the same answer on
    all; once true, the remaining pairs are skipped and the result is meaningless.

    Returns, on every process, the log-likelihoods in nats, float64 (pairs,), and whether greedy
    decoding would generate each continuation, bool (pairs,). Raises NonFinite, and RankError if one
    process of several fails.
    """
    window = model.config.block_size
    inputs, number, digest = collect_inputs(map(join, pairs), window, window)
    check_same_pairs(number, digest, processes)

    def measure(batch, logits, targets):
        nats = -F.cross_entropy(logits, targets, reduction="none")
        return batch.owners, nats, logits.argmax(dim=-1) == targets

    batches = make_batches(inputs, batch_tokens, batch_size)
    measured = run_batches(model, batches, inputs, processes, measure, progress=progress,
                           stopped=stopped)

    # Per pair: nats, and tokens that greedy decoding would not generate. Both are zero for empty
    # continuations.
    totals = np.zeros((2, number))
    if measured:
        owners, nats, hits = zip(*measured, strict=True)
        owner = np.concatenate(owners)
        misses = ~torch.cat(hits).cpu().numpy()
        totals[0] = np.bincount(owner, torch.cat(nats).cpu().numpy(), minlength=number)
        totals[1] = np.bincount(owner, misses, minlength=number)
    total_nats, missed = np.reshape(processes.sum(totals.flatten().tolist()), (2, number))
    if not np.isfinite(total_nats).all():
        raise NonFinite
    return total_nats, missed == 0


def run_batches(model: Any, batches: list, inputs: dict, processes: Processes,
                measure: Callable, *, progress: bool,
                stopped: Callable[[], bool] = lambda: False) -> list:
    """[measure(batch, logits, targets)] of this process's share of the batches.

    logits: fp32 (n, vocab_size). targets: int64 (n,). Other arguments are as for `score`.
    """
    measured = []
    bar = tqdm(total=len(inputs), desc="scoring", leave=False, delay=2,
               disable=None if progress else True)  # None: only without a terminal
    for first in range(0, len(batches), processes.world_size):
        if stopped():
            break
        mine = first + processes.rank
        # a process without a batch of its own repeats the last one: all make as many passes
        batch = collate(batches[min(mine, len(batches) - 1)], inputs)
        with failing_alone(processes), any_shape():
            targets = to_device(batch.targets, processes.device)
            rows = to_device(batch.rows, processes.device)
            columns = to_device(batch.columns, processes.device)
            tokens = to_device(batch.tokens, processes.device)
            logits = model(tokens, logits_at=(rows, columns))  # (n, vocab_size)
            if mine < len(batches):
                measured.append(measure(batch, logits, targets))
        bar.update(sum(map(len, batches[first:first + processes.world_size])))
    bar.close()
    return measured


def join(pair: tuple[list[int], list[int]]) -> tuple[int, array]:
    """(context, continuation) -> (ids of the context, all ids)."""
    context, continuation = pair
    return len(context), array(ID_TYPE, context + continuation)


def collect_inputs(sequences: Iterable, window: int, stride: int) -> tuple[dict, int, int]:
    """Sequences -> ({input: [(index of the sequence, targets)]}, number of sequences, checksum of
    all ids).

    sequences: (number of ids that are context only, ids as an int32 array) each. The targets are
    scored at the end of the input: `window` of them in the first input of a sequence, `stride` in
    each further one, with all the context that fits. Inputs and targets are ids as bytes. Answers
    of one token share an input.
    """
    inputs = collections.defaultdict(list)
    number = 0
    digest = 0
    for index, (start, ids) in enumerate(sequences):
        number = index + 1
        digest = zlib.crc32(ids, digest)
        end = start + window
        while start < len(ids):
            end = min(end, len(ids))
            last = end - 1  # the last target is not an input
            key = ids[max(last - window, 0):last].tobytes()
            inputs[key].append((index, ids[start:end].tobytes()))
            start = end
            end += stride
    return inputs, number, digest


def check_same_pairs(number: int, digest: int, processes: Processes) -> None:
    """Raises RankError unless all processes have the same pairs."""
    total = processes.sum([number, digest])
    if total != [number * processes.world_size, digest * processes.world_size]:
        raise RankError("the processes have different texts to score: make sure that all read the "
                        "same files, and start again")


def make_batches(inputs: dict, batch_tokens: int, batch_size: int | None) -> list[list[bytes]]:
    """Inputs -> lists of inputs of similar length.

    The longest come first, so that the first batch shows whether memory is enough.
    """
    order = sorted(inputs, key=len, reverse=True)
    batches = []
    start = 0
    while start < len(order):
        longest = len(order[start]) // ID_BYTES
        n = batch_size or max(batch_tokens // longest, 1)
        batches.append(order[start:start + n])
        start += n
    return batches


def collate(batch: list[bytes], inputs: dict) -> Batch:
    """A list of inputs, the longest first -> Batch."""
    lengths = np.array([len(key) for key in batch]) // ID_BYTES
    longest = lengths[0]
    tokens = np.zeros((len(batch), longest), dtype=np.int64)
    tokens[np.arange(longest) < lengths[:, None]] = from_bytes(batch)
    parts = []
    for row, key in enumerate(batch):
        for index, targets in inputs[key]:
            parts.append((row, index, targets))
    row = np.array([part[0] for part in parts])  # type: ignore[assignment]
    index = np.array([part[1] for part in parts])
    count = np.array([len(part[2]) // ID_BYTES for part in parts])
    first = np.repeat(np.cumsum(count) - count, count)
    ahead = np.arange(count.sum()) - first  # 0, 1, ... within every part
    columns = np.repeat(lengths[row] - count, count) + ahead
    targets = from_bytes(part[2] for part in parts)
    return Batch(tokens, np.repeat(row, count), columns, targets, np.repeat(index, count))


def from_bytes(parts: Iterable[bytes]) -> np.ndarray:
    """Ids as bytes, in parts -> one array, int64 (n,)."""
    return np.frombuffer(b"".join(parts), ID_TYPE).astype(np.int64)


@contextlib.contextmanager
def failing_alone(processes: Processes) -> Iterator[None]:
    """Turn an error on one process of several into a RankError, which ends all of them; otherwise
    the others would wait for it."""
    try:
        yield
    except (BadInput, dist.DistBackendError):
        raise
    except Exception as error:
        another_failed = "gloo" in str(error)  # and reports why
        if processes.world_size == 1 or another_failed:
            raise
        reason = f"{type(error).__name__}: {str(error)[:100]}"
        if isinstance(error, torch.OutOfMemoryError):
            reason = "out of memory"
        raise RankError(f"an evaluation failed on process {processes.rank} ({reason}): fix that "
                        "and start again") from error
