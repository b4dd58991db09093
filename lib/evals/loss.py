"""The loss of a language model on documents, by text and by length of context."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from lib.decoding import NonFinite
from lib.devices import Processes
from lib.evals.scoring import (
    ID_TYPE,
    Batch,
    check_same_pairs,
    collect_inputs,
    make_batches,
    run_batches,
)

BATCH_TOKENS = 4096  # per forward pass: the logits of GPT-2's vocabulary take 0.8 GB in fp32
FIRST_EDGE = 16      # of the ranges of context lengths, which double


class Document(NamedTuple):
    text: int        # the index that it is counted under
    ids: np.ndarray  # (n + 1,); the first one is context only


class Sums(NamedTuple):
    """Sums over scored tokens, float64 (texts, ranges of context lengths) each."""
    nats: np.ndarray
    tokens: np.ndarray
    n_bytes: np.ndarray  # of UTF-8 text


@torch.no_grad()
def measure(model: Any, documents: Iterable[Document], token_bytes: np.ndarray,
            processes: Processes, stride: int | None = None) -> Sums:
    """The loss of every id of the documents but the first.

    model: as for scoring.score; its block_size is the window. A document longer than the window is
    scored in several: `window` ids in the first, `stride` (None: window) in each further one, with
    all the context that fits. Only the last window of a document overlaps without a stride.
    token_bytes: int64, bytes per id; other ids have none. Returns the same Sums on every process.
    Raises NonFinite, and RankError for an error of one process of several.
    """
    window = model.config.block_size
    edges = context_edges(window)
    texts: list[int] = []
    inputs, number, digest = collect_inputs(sequences(documents, texts), window, stride or window)
    check_same_pairs(number, digest, processes)
    text_of = np.array(texts)

    def losses(batch: Batch, logits: torch.Tensor, targets: torch.Tensor):
        context = batch.columns + 1
        cells = text_of[batch.owners] * len(edges) + np.searchsorted(edges, context)
        return cells, batch.targets, F.cross_entropy(logits, targets, reduction="none")

    batches = make_batches(inputs, BATCH_TOKENS, None)
    measured = run_batches(model, batches, inputs, processes, losses, progress=processes.main)

    shape = (3, max(texts) + 1, len(edges))
    sums = np.zeros((3, shape[1] * shape[2]))
    sizes = np.zeros(model.config.vocab_size, dtype=np.int64)
    sizes[:len(token_bytes)] = token_bytes
    for cells, ids, nats in measured:
        for total, weights in zip(sums, (nats.cpu().numpy(), None, sizes[ids]), strict=True):
            total += np.bincount(cells, weights, minlength=len(total))
    found = Sums(*np.reshape(processes.sum(sums.flatten().tolist()), shape))
    if not np.isfinite(found.nats).all():
        raise NonFinite
    return found


def sequences(documents: Iterable[Document],
              texts: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Documents as `collect_inputs` takes them; appends the text of each to `texts`."""
    for document in documents:
        texts.append(document.text)
        yield 1, np.asarray(document.ids, dtype=ID_TYPE)


def context_edges(window: int) -> list[int]:
    """The last context length of each range: 16, 32, 64, ..., window."""
    edges = []
    edge = FIRST_EDGE
    while edge < window:
        edges.append(edge)
        edge *= 2
    return [*edges, window]
