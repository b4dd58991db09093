"""Several texts in one row: which go together, and what a model needs to keep them apart.

`Packing` cuts conversations into rows, `Joined` plain text; `Rows` is the stream of batches of such
rows, with replay among them. A row is int64 (3, T): ids, targets (-1: not learned) and documents,
the number within the row of each position's text.
"""

import numpy as np
import torch
import torch.nn.functional as F

from lib.attention import attention
from lib.devices import to_device
from lib.mixture import Stream

OPEN = 1000  # the newest rows are those that first-fit tries: the others are as good as full


class Packed:
    """The AttentionContext of a packed batch: every text begins at position 0 and attends to
    itself only.

    documents: int64 (B, T), the same number throughout a text and another one next to it.
    """

    def __init__(self, documents):
        B, T = documents.shape
        at = torch.arange(T, device=documents.device)
        self.starts = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)  # (B, T)
        self.positions = at - torch.where(self.starts, at,
                                          0).cummax(dim=1).values  # (B, T), new in each text
        self.numbers = self.starts.cumsum(dim=1)                                        # (B, T)

    @property
    def mask(self):
        """bool (B, 1, T, T), causal within a text. Made anew for each layer (compiled, for each
        pass) and not kept: the masks of a whole batch of 524,288 tokens would take half a gigabyte.
        """
        return (self.numbers[:, None, :, None] == self.numbers[:, None, None, :]).tril()

    def attend(self, layer, q, k, v, dropout=0.0):
        """A layer's attention, (B, T, H, D) each."""
        return attention(q, k, v, self.mask, dropout)

    def previous(self, layer, x):
        """What stands before each position of x (B, T, C): zeros where a text begins."""
        return F.pad(x, (0, 0, 1, 0))[:, :-1].masked_fill(self.starts[..., None], 0.0)


def first_fit(lengths, room):
    """Lengths, none above `room`, each put into the first row that still has room for it -> lists
    of their indices."""
    rows, left = [], np.full(len(lengths), room)
    for i, n in enumerate(lengths):
        begin = max(len(rows) - OPEN, 0)
        fits = left[begin:len(rows)] >= n
        row = begin + int(fits.argmax()) if fits.any() else len(rows)
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        left[row] -= n
    return rows


class RowSource:
    """Rows of a data set in memory, in an order drawn anew from (seed, epoch); in the order given
    without a seed (None).

    A subclass has `arrange`, epoch -> what `row` is made from, and how many rows that makes.
    """

    names = "epoch", "row"

    def __init__(self, block_size, seed, eot):
        self.block_size, self.seed, self.eot = block_size, seed, eot
        self.position, self.arranged = (0, 0), {}

    def order(self, epoch, n, salt=0):
        return np.arange(n) if self.seed is None else np.random.default_rng(
            (self.seed, epoch, salt)).permutation(n)

    def of(self, epoch):
        """-> what an epoch's rows are made from, and their number."""
        found = self.arranged.get(epoch)
        if found is None:
            found = self.arrange(epoch)
            self.arranged = {epoch: found}
        return found

    def __len__(self):
        """Rows of the first epoch; others may have a few more or less."""
        return self.of(0)[1]

    def read_batch(self, n, epoch, row):
        """-> (the rows of n tokens from a position on, int64 (n / T, 3, T); the position after
        them)."""
        rows = []
        while len(rows) < n // self.block_size:
            if row >= self.of(epoch)[1]:
                epoch, row = epoch + 1, 0
            rows.append(self.row(self.of(epoch)[0], row))
            row += 1
        return np.stack(rows), epoch, row

    def all(self):
        """All rows once: ids, targets, documents, int64 (rows, T) each."""
        rows, *_ = self.read_batch(len(self) * self.block_size, 0, 0)
        return rows.transpose(1, 0, 2)

    def progress(self, position):
        """How far a position is, by tag for TensorBoard."""
        return {"data/epoch": position[0]}

    def where(self, state):
        """A position as text. Raises IndexError if there is none such."""
        epoch, row = state["epoch"], state["row"]
        # the prefetch thread may be in another epoch, whose arrangement must stay
        if epoch < 0 or not 0 <= row <= (self.arranged.get(epoch) or self.arrange(epoch))[1]:
            raise IndexError(row)
        return f"epoch {epoch}, from row {row:,}"


class Packing(RowSource):
    """Conversations packed into rows, whole, by first-fit in the epoch's order.

    items: list of (ids, learned), as lib/chat_template.py's `render` makes them, of at most
    block_size + 1 ids, since the last is only a target.
    """

    def __init__(self, items, block_size, seed, eot):
        super().__init__(block_size, seed, eot)
        self.items = [(np.asarray(ids, dtype=np.int64), np.asarray(learned, dtype=bool))
                      for ids, learned in items]

    def arrange(self, epoch):
        order = self.order(epoch, len(self.items))
        rows = first_fit([len(self.items[i][0]) - 1 for i in order], self.block_size)
        mixed = self.order(epoch, len(rows),
                           salt=1)  # first-fit leaves the last rows emptier than the others
        return [order[rows[i]] for i in mixed], len(rows)

    def row(self, rows, number):
        row, at = np.zeros((3, self.block_size), dtype=np.int64), 0
        row[0], row[1] = self.eot, -1
        for document, i in enumerate(rows[number], 1):
            ids, learned = self.items[i]
            end = at + len(ids) - 1
            row[0, at:end], row[1,
                                at:end], row[2,
                                             at:end] = ids[:-1], np.where(learned[1:], ids[1:],
                                                                          -1), document
            at = end
        return row


class Joined(RowSource):
    """Plain text as pretraining reads it: documents, lists of ids, joined in the epoch's order and
    cut where rows end."""

    def __init__(self, documents, block_size, seed, eot):
        super().__init__(block_size, seed, eot)
        self.documents = [np.asarray(ids, dtype=np.int64) for ids in documents]

    def arrange(self, epoch):
        tokens = np.concatenate([self.documents[i] for i in self.order(epoch, len(self.documents))])
        return tokens, -(-(len(tokens) - 1) // self.block_size)

    def row(self, tokens, number):
        piece = tokens[number * self.block_size:][:self.block_size + 1]
        row, n = np.zeros((3, self.block_size), dtype=np.int64), len(piece) - 1
        row[0], row[1] = self.eot, -1
        row[0, :n], row[1, :n] = piece[:-1], piece[1:]
        return row


class Tokens:
    """Rows out of a Stream of tokens, for `Rows`: `stride` apart, as lib/mixture.py's
    `micro_batches` cuts them."""

    def __init__(self, stream, block_size, stride):
        self.stream, self.block_size, self.stride = stream, block_size, stride
        self.names, self.position, self.where = stream.names, stream.position, stream.where

    def read_batch(self, n, *position):
        tokens, *position = self.stream.read_batch(n, *position)
        rows = np.lib.stride_tricks.sliding_window_view(tokens, self.block_size + 1)[::self.stride]
        return np.stack((rows[:, :-1], rows[:, 1:], np.zeros_like(rows[:, 1:])), axis=1), *position

    def progress(self, position):
        """As the stream's own, of a position; every source's, of a mixture."""
        self.stream.position = position
        return self.stream.progress()


class Rows(Stream):
    """An endless stream of batches of rows: those of `data`, and among them those of `replay`, a
    constant `share` of any span.

    The same for any processes, micro-batch and batch size. The state: how many rows there were, and
    both sources' positions.
    """

    names = "rows", "data", "replay"

    def __init__(self, data, replay=None, share=0.0, transform=None):
        """data, replay: a RowSource or Tokens each. transform: callable run in the prefetch thread,
        rows (n, 3, T) -> what `next` returns."""
        self.sources, self.share = (data, replay), 0.0 if replay is None else share
        self.transform = transform or (lambda rows: rows)
        super().__init__(0, data.position, () if replay is None else replay.position)

    def read_batch(self, n, rows, *places):
        """-> (the rows of n tokens from a position on, transformed; the position after them: rows,
        data, replay)."""
        T = self.sources[0].block_size
        numbers, places = np.arange(rows, rows + n // T), list(places)
        replayed = np.floor((numbers + 1) * self.share) > np.floor(numbers * self.share)
        batch = np.empty((len(numbers), 3, T), dtype=np.int64)
        for i, mine in enumerate((~replayed, replayed)):
            if mine.any():
                batch[mine], *places[i] = self.sources[i].read_batch(
                    int(mine.sum()) * T, *places[i])
        return self.transform(batch), rows + len(numbers), *map(tuple, places)

    def where(self, state):
        """A position as text: what to look at after a spike."""
        return "; replay ".join(
            source.where(dict(zip(source.names, state[name], strict=True)))
            for source, name in zip(self.sources, ("data", "replay"))
            if source is not None)

    def progress(self):
        """How far the stream is, by tag for TensorBoard."""
        return self.sources[0].progress(self.position[1])


def micro_batches(rows, micro_batch, processes, packed):
    """A global batch of rows, int64 (n, 3, T) -> this process's micro-batches on its device: list
    of (idx, targets), int64 (B, T) each, and where they are packed a Packed."""
    n = len(rows) // processes.world_size
    mine = rows[processes.rank * n:(processes.rank + 1) * n].transpose(1, 0, 2)
    parts = to_device(np.ascontiguousarray(mine), processes.device).split(micro_batch, dim=1)
    return [(idx, targets, Packed(documents)) if packed else (idx, targets)
            for idx, targets, documents in parts]
