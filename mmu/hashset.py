"""A set of fixed-size rows of uint64 words that takes whole arrays: what a search has seen, when it cannot be a map.

Open addressing with no loop over rows. Chapter 9's search modulo symmetry and the litmus tests of chapter 6 use it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio (Knuth 6.4): spreads neighbouring keys
_SHIFT = np.uint64(29)


class HashSet:
    """Rows of ``words`` uint64 each; exact: two rows are one only if all their words are equal.

    >>> seen = HashSet(words=1)
    >>> seen.add(np.array([[7], [5], [7]], dtype=np.uint64)).size
    2
    >>> seen.add(np.array([[5], [6]], dtype=np.uint64)).tolist()
    [1]
    """

    def __init__(self, words: int) -> None:
        self.rows = np.zeros((1024, words), dtype=np.uint64)  # (row, word)
        self.size = 0
        self._clear(12)

    def _clear(self, bits: int) -> None:
        self.bits = bits
        self.slots = np.full(1 << bits, -1, dtype=np.int32)  # (slot,) -> row

    @property
    def nbytes(self) -> int:
        """How much room the set takes."""
        return self.rows.nbytes + self.slots.nbytes

    def add(self, rows: NDArray[np.uint64]) -> NDArray[np.intp]:
        """Add rows, shape (row, word); returns the positions of those that were not in the set, each value once."""
        most = self.size + len(rows)
        if most > len(self.rows):
            wider = np.zeros((max(most, 2 * len(self.rows)), self.rows.shape[1]), dtype=np.uint64)
            wider[: self.size] = self.rows[: self.size]
            self.rows = wider
        if 2 * most > len(self.slots):
            self._clear(int(2 * most).bit_length() + 1)
            self._place(np.arange(self.size, dtype=np.int32), self._slot(self.rows[: self.size]))
        # all go behind the known rows and look for a slot; those that find an equal row there are dropped again
        self.rows[self.size : most] = rows
        row, slot = self._place(np.arange(self.size, most, dtype=np.int32), self._slot(rows))
        order = np.argsort(row)
        row, slot = row[order], slot[order]
        self.rows[self.size : self.size + len(row)] = self.rows[row]
        self.slots[slot] = np.arange(self.size, self.size + len(row), dtype=np.int32)
        new = (row - self.size).astype(np.intp)
        self.size += len(row)
        return new

    def _slot(self, rows: NDArray[np.uint64]) -> NDArray[np.intp]:
        mixed = np.zeros(len(rows), dtype=np.uint64)
        for word in rows.T:
            mixed = (mixed ^ word) * _MULTIPLIER
            mixed ^= mixed >> _SHIFT
        return (mixed * _MULTIPLIER >> np.uint64(64 - self.bits)).astype(np.intp)

    def _place(self, row: NDArray[np.int32], slot: NDArray[np.intp]) -> tuple[NDArray[np.int32], NDArray[np.intp]]:
        """Give each row a slot, unless an equal row has one; returns the rows that got one, and where."""
        rows, slots = [row[:0]], [slot[:0]]
        while row.size:
            empty = np.flatnonzero(self.slots[slot] < 0)
            self.slots[slot[empty]] = row[empty]  # of all rows that want a slot one prevails
            holder = self.slots[slot]
            won = holder == row
            rows.append(row[won])
            slots.append(slot[won])
            left = np.flatnonzero((self.rows[holder] != self.rows[row]).any(axis=1))
            row, slot = row[left], (slot[left] + 1) & (len(self.slots) - 1)
        return np.concatenate(rows), np.concatenate(slots)
