"""A set of fixed-size rows of uint64 words that takes whole arrays: what a search has seen, when it cannot be a map.

Open addressing with no loop over rows. Chapter 9's search modulo symmetry and the litmus tests of chapter 6 use it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2**64 over the golden ratio (Knuth 6.4): spreads neighbouring keys
_SHIFT = np.uint64(29)

Rows = NDArray[np.uint64]  # (row, word)


class HashSet:
    """Rows of ``words`` uint64 each; exact: two rows are one only if all their words are equal.

    >>> seen = HashSet(words=1)
    >>> seen.add(np.array([[7], [5], [7]], dtype=np.uint64)).size
    2
    >>> seen.add(np.array([[5], [6]], dtype=np.uint64)).tolist()
    [1]
    >>> seen.has(np.array([[6], [8]], dtype=np.uint64)).tolist()
    [True, False]
    """

    def __init__(self, words: int) -> None:
        self.words = np.zeros((words, 1024), dtype=np.uint64)  # (word, row)
        self.size = 0
        self._clear(12)

    def _clear(self, bits: int) -> None:
        self.bits = bits
        self.slots = np.zeros(0, dtype=np.int32)  # let go of the old slots before asking for more
        self.slots = np.full(1 << bits, -1, dtype=np.int32)  # (slot,) -> row

    @property
    def nbytes(self) -> int:
        """How much room the set takes."""
        return self.words.nbytes + self.slots.nbytes

    def bytes_for(self, more: int) -> int:
        """How much room adding so many rows may take, old arrays beside new ones included."""
        most = self.size + more
        words, slots = self.words.nbytes, self.slots.nbytes
        if most > self.words.shape[1]:
            words += 8 * len(self.words) * self._roomier(most)
        if 2 * most > len(self.slots):
            slots = 4 << int(2 * most).bit_length() + 1
        return words + slots

    def add(self, rows: Rows) -> NDArray[np.intp]:
        """Add rows; returns the positions of those that were not in the set, in order, each value once."""
        self._reserve(self.size + len(rows))
        # all go behind the known rows and look for a slot; those that find an equal row there are dropped again
        self.words[:, self.size : self.size + len(rows)] = rows.T
        row, slot = self._place(np.arange(self.size, self.size + len(rows), dtype=np.intp), self._slot(rows))
        order = np.argsort(row)
        row, slot = row[order], slot[order]
        end = self.size + len(row)
        self.words[:, self.size : end] = self.words[:, row]
        self.slots[slot] = np.arange(self.size, end, dtype=np.int32)
        row -= self.size
        self.size = end
        return row

    def has(self, rows: Rows) -> NDArray[np.bool_]:
        """Which of these rows are in the set."""
        found = np.zeros(len(rows), dtype=np.bool_)
        alive, slot = np.arange(len(rows), dtype=np.intp), self._slot(rows)
        while alive.size:
            holder = self.slots[slot]
            taken = np.flatnonzero(holder >= 0)
            alive, slot = alive[taken], slot[taken]
            equal = (self.words[:, holder[taken]] == rows[alive].T).all(axis=0)
            found[alive[equal]] = True
            alive, slot = alive[~equal], (slot[~equal] + 1) & (len(self.slots) - 1)
        return found

    def _reserve(self, most: int) -> None:
        """Room for so many rows, with half of the slots free."""
        if most > self.words.shape[1]:
            wider = np.zeros((len(self.words), self._roomier(most)), dtype=np.uint64)
            wider[:, : self.size] = self.words[:, : self.size]
            self.words = wider
        if 2 * most > len(self.slots):
            self._clear(int(2 * most).bit_length() + 1)
            self._place(np.arange(self.size, dtype=np.intp), self._slot(self.words[:, : self.size].T))

    def _roomier(self, most: int) -> int:
        return max(most, self.words.shape[1] * 3 // 2)

    def _slot(self, rows: Rows) -> NDArray[np.intp]:
        mixed = np.zeros(len(rows), dtype=np.uint64)
        for word in rows.T:
            mixed = (mixed ^ word) * _MULTIPLIER
            mixed ^= mixed >> _SHIFT
        return (mixed * _MULTIPLIER >> np.uint64(64 - self.bits)).astype(np.intp)

    def _place(self, row: NDArray[np.intp], slot: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Give each row a slot, unless an equal row has one; returns the rows that got one, and where."""
        rows, slots = [row[:0]], [slot[:0]]
        while row.size:
            holder = self.slots[slot].astype(np.intp)
            empty = np.flatnonzero(holder < 0)
            mine, its = slot[empty], row[empty]
            self.slots[mine] = its  # of all rows that want a slot one prevails
            holder[empty] = now = self.slots[mine]
            won = np.flatnonzero(now == its)
            rows.append(its[won])
            slots.append(mine[won])
            differs = self.words[0][holder] != self.words[0][row]
            for word in self.words[1:]:
                differs |= word[holder] != word[row]
            left = np.flatnonzero(differs)
            row, slot = row[left], (slot[left] + 1) & (len(self.slots) - 1)
        return np.concatenate(rows), np.concatenate(slots)
