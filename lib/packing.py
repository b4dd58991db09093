"""Packing several texts into a row, and the attention mask that keeps them apart.

`Packing` packs conversations into rows, `Joined` cuts plain text into rows. A row is int64 (3, T):
ids, targets (-1: not learned), and documents, the number of each position's text within the row.
lib/streams.py's `Rows` makes batches of them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.attention import attention

OPEN = 1000  # first-fit tries the newest rows only: older ones are as good as full


class Packed:
    """The AttentionContext of a packed batch: every text starts at position 0 and attends only to
    itself.

    documents: int64 (B, T), the same number throughout a text and another one next to it.
    """

    def __init__(self, documents: torch.Tensor):
        T = documents.size(1)
        changes = documents.diff(dim=1) != 0
        self.starts = F.pad(changes, (1, 0), value=True)    # (B, T)
        at = torch.arange(T, device=documents.device)
        last_start = torch.where(self.starts, at, 0).cummax(dim=1).values
        self.positions = at - last_start                    # (B, T), from 0 in each text
        self.numbers = self.starts.cumsum(dim=1)            # (B, T)

    @property
    def mask(self) -> torch.Tensor:
        """bool (B, 1, T, T), causal within a text. Computed for each layer (once per compiled pass)
        and not stored: masks of 524,288 tokens would take half a gigabyte."""
        numbers = self.numbers[:, None]
        same_text = numbers[..., None] == numbers[..., None, :]
        return same_text.tril()

    def attend(self, layer: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
               dropout: float = 0.0) -> torch.Tensor:
        """A layer's attention, (B, T, H, D) each."""
        return attention(q, k, v, self.mask, dropout)

    def previous(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """x (B, T, C) shifted by one position, zeros where a text starts."""
        shifted = F.pad(x, (0, 0, 1, 0))[:, :-1]
        return shifted.masked_fill(self.starts[..., None], 0.0)


def first_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Pack lengths, none above `room`, each into the first row with enough room -> the indices in
    each row."""
    rows: list[list[int]] = []
    left = np.full(len(lengths), room)
    for i, n in enumerate(lengths):
        begin = max(len(rows) - OPEN, 0)
        fits = left[begin:len(rows)] >= n
        if fits.any():
            row = begin + int(fits.argmax())
        else:
            row = len(rows)
            rows.append([])
        rows[row].append(i)
        left[row] -= n
    return rows


class RowSource:
    """Rows of a dataset in memory, shuffled by (seed, epoch); seed None: in their original order.

    A subclass implements `arrange`, which plans an epoch's rows, and `row`, which makes one.
    """

    names = "epoch", "row"

    def __init__(self, block_size: int, seed: int | None, eot: int):
        self.block_size = block_size
        self.seed = seed
        self.eot = eot
        self.position = (0, 0)
        self.arranged: dict[int, tuple[Any, int]] = {}  # epoch -> its arrangement, the latest only

    def arrange(self, epoch: int) -> tuple[Any, int]:
        """-> (the arrangement of an epoch, as `row` takes it; its number of rows)."""
        raise NotImplementedError

    def row(self, arrangement: Any, number: int) -> np.ndarray:
        """Row `number` of an epoch, int64 (3, T)."""
        raise NotImplementedError

    def order(self, epoch: int, n: int, salt: int = 0) -> np.ndarray:
        """A permutation of n items for an epoch; the identity without a seed."""
        if self.seed is None:
            return np.arange(n)
        return np.random.default_rng((self.seed, epoch, salt)).permutation(n)

    def of(self, epoch: int) -> tuple[Any, int]:
        """`arrange`, cached."""
        found = self.arranged.get(epoch)
        if found is None:
            found = self.arrange(epoch)
            self.arranged = {epoch: found}
        return found

    def __len__(self):
        """Number of rows in the first epoch; other epochs may have a few more or less."""
        return self.of(0)[1]

    def read_batch(self, n: int, epoch: int, row: int) -> tuple[np.ndarray, int, int]:
        """-> (the rows of n tokens from a position on, int64 (n / T, 3, T); the position after
        them)."""
        rows: list[np.ndarray] = []
        while len(rows) < n // self.block_size:
            arrangement, count = self.of(epoch)
            if row >= count:
                epoch += 1
                row = 0
                arrangement, _ = self.of(epoch)
            rows.append(self.row(arrangement, row))
            row += 1
        return np.stack(rows), epoch, row

    def all(self) -> np.ndarray:
        """All rows once: ids, targets, documents, int64 (rows, T) each."""
        rows, *_ = self.read_batch(len(self) * self.block_size, 0, 0)
        return rows.transpose(1, 0, 2)

    def progress(self, position: tuple[int, int]) -> dict[str, float]:
        """The epoch at a position, by tag for TensorBoard."""
        return {"data/epoch": position[0]}

    def where(self, state: dict[str, int]) -> str:
        """A position as text. Raises IndexError if there is no such row."""
        epoch = state["epoch"]
        row = state["row"]
        if epoch < 0:
            raise IndexError(epoch)
        # not `of`: the prefetch thread may be in another epoch, whose arrangement must stay
        _, rows = self.arranged.get(epoch) or self.arrange(epoch)
        if not 0 <= row <= rows:
            raise IndexError(row)
        return f"epoch {epoch}, from row {row:,}"

    def empty_row(self) -> np.ndarray:
        """int64 (3, T): end-of-text ids, none learned."""
        row = np.zeros((3, self.block_size), dtype=np.int64)
        row[0] = self.eot
        row[1] = -1
        return row


class Packing(RowSource):
    """Whole conversations packed into rows by first-fit, in the epoch's order.

    items: (ids, learned) from lib/chat_template.py's `render`, of at most block_size + 1 ids, since
    the last one is only a target.
    """

    def __init__(self, items: list, block_size: int, seed: int | None, eot: int):
        super().__init__(block_size, seed, eot)
        self.items = []
        for ids, learned in items:
            ids = np.asarray(ids, dtype=np.int64)
            learned = np.asarray(learned, dtype=bool)
            self.items.append((ids, learned))

    def arrange(self, epoch: int) -> tuple[list[np.ndarray], int]:
        order = self.order(epoch, len(self.items))
        lengths = [len(ids) - 1 for ids, _ in self.items]
        rows = first_fit([lengths[i] for i in order], self.block_size)
        mixed = self.order(epoch, len(rows), salt=1)  # first-fit leaves the last rows emptier
        return [order[rows[i]] for i in mixed], len(rows)

    def row(self, arrangement: Any, number: int) -> np.ndarray:
        row = self.empty_row()
        start = 0
        for document, i in enumerate(arrangement[number], 1):
            ids, learned = self.items[i]
            end = start + len(ids) - 1
            row[0, start:end] = ids[:-1]
            row[1, start:end] = np.where(learned[1:], ids[1:], -1)
            row[2, start:end] = document
            start = end
        return row


class Joined(RowSource):
    """Plain text as in pretraining: documents, lists of ids, joined in the epoch's order and cut
    into rows."""

    def __init__(self, documents: list, block_size: int, seed: int | None, eot: int):
        super().__init__(block_size, seed, eot)
        self.documents = [np.asarray(ids, dtype=np.int64) for ids in documents]

    def arrange(self, epoch: int) -> tuple[np.ndarray, int]:
        order = self.order(epoch, len(self.documents))
        tokens = np.concatenate([self.documents[i] for i in order])
        return tokens, -(-(len(tokens) - 1) // self.block_size)

    def row(self, arrangement: Any, number: int) -> np.ndarray:
        row = self.empty_row()
        piece = arrangement[number * self.block_size:][:self.block_size + 1]
        n = len(piece) - 1
        row[0, :n] = piece[:-1]
        row[1, :n] = piece[1:]
        return row
