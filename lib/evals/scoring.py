"""Log-likelihoods of texts under a language model, many at a time: what all multiple-choice
evaluations rest on.

Several processes share out the batches. Each makes the same number of forward passes, as a sharded
model needs, and has all results.
"""

import collections
import contextlib
import zlib
from array import array

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from lib.cli import BadInput, RankError
from lib.decoding import NonFinite
from lib.devices import any_shape, to_device


@torch.no_grad()
def score(model, pairs, processes, batch_tokens, batch_size=None, progress=False,
          stopped=lambda: False):
    """Log-likelihoods of continuations given their contexts, in batches of similar length.

    model: callable, int64 (B, T) and logits_at=(rows, columns), int64 (n,) each -> the logits at
    these positions, fp32 (n, vocab_size); its config.block_size is the window. The caller sets
    autocast and eval mode. pairs: iterable of (context, continuation), lists of token ids, the
    context not empty; the same on every process. What exceeds the window loses the beginning of its
    context; a continuation longer than the window is scored in pieces, each with all the context
    that fits, as lm-evaluation-harness's rolling windows do. batch_tokens: tokens per forward pass,
    padding included. batch_size: sequences per forward pass instead. stopped: asked before every
    forward pass, equally often on every process, and answering the same on all; once true, the rest
    is left out and the result meaningless.

    Returns, whole on every process, float64 (pairs,), nats, and bool (pairs,), whether greedy
    decoding would generate the continuation. Raises NonFinite, and RankError for what one process
    of several meets alone.
    """
    # ids as bytes: hundreds of thousands of lists would keep Python's garbage collector busy longer
    # than the GPU
    rows = collections.defaultdict(
        list)  # input -> what is read off its end; answers of one token share the input
    number, ids, digest, window = 0, array("i"), 0, model.config.block_size
    for index, (context, continuation) in enumerate(pairs):
        number, ids = index + 1, array("i", context + continuation)
        digest = zlib.crc32(ids, digest)
        for start in range(len(context), len(ids), window):
            end = min(start + window, len(ids))
            rows[ids[max(end - 1 - window, 0):end - 1].tobytes()].append(
                (index, ids[start:end].tobytes()))
    if processes.sum([digest,
                      number]) != [digest * processes.world_size, number * processes.world_size]:
        raise RankError(
            "the processes were given different texts: see that all read the same files, and start again"
        )
    batches, start = [], 0
    order = sorted(rows, key=len,
                   reverse=True)  # the longest first: what does not fit into memory says so at once
    while start < len(order):
        n = batch_size or max(batch_tokens // (len(order[start]) // ids.itemsize), 1)
        batches.append(order[start:start + n])
        start += n

    owners, nats, hits, bar = [], [], [], tqdm(
        total=len(rows), desc="scoring", leave=False, delay=2,
        disable=None if progress else True)  # None: only without a terminal
    for first in range(0, len(batches), processes.world_size):
        if stopped():
            break
        mine = first + processes.rank
        batch = batches[min(
            mine,
            len(batches) - 1)]  # none left for this process: one again, for the sake of equal work
        length = np.array([len(row) for row in batch]) // ids.itemsize
        tokens = np.zeros((len(batch), length[0]),
                          dtype=np.int64)  # padded on the right, where a causal model never looks
        tokens[np.arange(length[0]) < length[:,
                                             None]] = np.frombuffer(b"".join(batch), ids.typecode)
        parts = [(row, index, targets)
                 for row, key in enumerate(batch)
                 for index, targets in rows[key]]
        row, index, count = np.array([(row, index, len(targets) // ids.itemsize)
                                      for row, index, targets in parts]).T
        ahead = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count,
                                                   count)  # 0, 1, ... in every part
        column = np.repeat(length[row] - count, count) + ahead
        target = np.frombuffer(b"".join(targets for _, _, targets in parts), ids.typecode)
        with failing_alone(processes), any_shape():
            target = to_device(target.astype(np.int64), processes.device)  # (n,) tokens scored
            at = to_device(np.repeat(row, count),
                           processes.device), to_device(column, processes.device)
            logits = model(to_device(tokens, processes.device), logits_at=at)  # (n, vocab_size)
            if mine < len(batches):
                owners.append(np.repeat(index, count))
                nats.append(-F.cross_entropy(logits, target, reduction="none"))
                hits.append(logits.argmax(dim=-1) == target)
        bar.update(sum(map(len, batches[first:first + processes.world_size])))
    bar.close()
    totals = np.zeros(
        (2, number)
    )  # nats, and tokens that greedy decoding would not generate; zero for empty continuations
    if owners:
        nats, misses = torch.cat(nats).cpu().numpy(), ~torch.cat(hits).cpu().numpy()
        owners = np.concatenate(owners)
        totals = np.stack(
            [np.bincount(owners, weights=values, minlength=number) for values in (nats, misses)])
    nats, missed = np.reshape(processes.sum(totals.flatten().tolist()), (2, number))
    if not np.isfinite(nats).all():
        raise NonFinite
    return nats, missed == 0


@contextlib.contextmanager
def failing_alone(processes):
    """Of several processes, one that fails in the block raises RankError, which ends all: the
    others would wait for it."""
    try:
        yield
    except (BadInput, dist.DistBackendError):
        raise
    except Exception as error:
        if processes.world_size == 1 or "gloo" in str(
                error):  # gloo: another process has failed, and says why
            raise
        memory = isinstance(error, torch.OutOfMemoryError)
        reason = "out of memory" if memory else f"{type(error).__name__}: {str(error)[:100]}"
        raise RankError(
            f"an evaluation failed on process {processes.rank} ({reason}): mend that and start again"
        ) from error
