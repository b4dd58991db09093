"""Log-likelihoods of texts under a language model, many at a time: what all multiple-choice evaluations rest on."""

import collections
from array import array

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from lib.devices import any_shape, to_device


@torch.no_grad()
def score(model, pairs, window, device, batch_tokens, batch_size=None, progress=False, stopped=lambda: False):
    """Log-likelihoods of continuations given their contexts, in batches of like length.

    model: callable, int64 (B, T) and logits_at=(rows, columns), int64 (n,) each -> the logits at these positions (n, vocab_size).
    Autocast and evaluation mode are the caller's business.
    pairs: iterable of (context, continuation), lists of token ids, the context not empty. What is longer than the window loses the
    beginning of its context; a continuation longer than the window is scored in pieces, each with all the context that fits,
    as lm-evaluation-harness's rolling windows do.
    batch_tokens: tokens a forward pass, padding included, where batch_size, sequences a forward pass, is None.
    stopped: asked before every forward pass; once it says so, the rest is left out, and the result worth nothing.
    Returns float64 (pairs,), nats, and bool (pairs,), whether greedy decoding would write the continuation.
    """
    # ids as bytes: hundreds of thousands of lists would keep Python's garbage collector busy longer than the GPU
    rows = collections.defaultdict(list)  # input -> what is read off its end; answers of one token share their question's input
    number, ids = 0, array("i")
    for index, (context, continuation) in enumerate(pairs):
        number, ids = index + 1, array("i", context + continuation)
        for start in range(len(context), len(ids), window):
            end = min(start + window, len(ids))
            rows[ids[max(end - 1 - window, 0):end - 1].tobytes()].append((index, ids[start:end].tobytes()))
    order = sorted(rows, key=len, reverse=True)  # the longest first: what does not fit into memory says so at once
    owners, nats, hits, bar = [], [], [], tqdm(total=len(order), desc="scoring", disable=not progress)
    while order and not stopped():
        n = batch_size or max(batch_tokens // (len(order[0]) // ids.itemsize), 1)
        batch, order = order[:n], order[n:]
        length = np.array([len(row) for row in batch]) // ids.itemsize
        tokens = np.zeros((len(batch), length[0]), dtype=np.int64)  # padded to the right, where a causal model never looks
        tokens[np.arange(length[0]) < length[:, None]] = np.frombuffer(b"".join(batch), ids.typecode)
        parts = [(row, index, targets) for row, key in enumerate(batch) for index, targets in rows[key]]
        row, index, count = np.array([(row, index, len(targets) // ids.itemsize) for row, index, targets in parts]).T
        ahead = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)  # 0, 1, ... in every part
        column = np.repeat(length[row] - count, count) + ahead
        target = np.frombuffer(b"".join(targets for _, _, targets in parts), ids.typecode)
        target = to_device(target.astype(np.int64), device)                                          # (n,) tokens scored
        with any_shape():
            logits = model(to_device(tokens, device), logits_at=(to_device(np.repeat(row, count), device), to_device(column, device))).float()  # (n, vocab_size)
        owners.append(np.repeat(index, count))
        nats.append(-F.cross_entropy(logits, target, reduction="none"))
        hits.append(logits.argmax(dim=-1) == target)
        bar.update(len(batch))
    bar.close()
    if not owners:  # nothing, or nothing but empty continuations: certain
        return np.zeros(number), np.ones(number, dtype=bool)
    nats, misses = torch.cat(nats).cpu().numpy(), ~torch.cat(hits).cpu().numpy()
    total, missed = (np.bincount(np.concatenate(owners), weights=values, minlength=number) for values in (nats, misses))
    return total, missed == 0
