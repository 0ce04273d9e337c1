"""When things happened in a trace: faults by cause, what the fast path did, MMIO, and rounds of the dirty log.

The one idea: time is cut into at most :data:`BINS` slices, and where a trace outgrows them, neighbours are joined; so a
trace of any length needs the memory of one picture. ``python -m mmu report`` shows it; chapters 4 and 13.

>>> seen = Timeline()
>>> seen.add(trace.read(b"qemu-1 [0] .... 7.5: kvm_page_fault: vcpu 0 rip 0x1 address 0x1000 error_code 0x100000006"))
>>> seen.answer()["causes"]["not present"]
[1]

Facts: what error codes say is :mod:`mmu.pfec`'s; that the dirty log takes W alone is Linux 6.1 ``spte_write_protect``.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmu import pfec, trace

BINS = 96
CAUSES = ("not present", "write-protected", "MMIO", "other rights")
"""Why faults happened: P clear; a write with P set; the reserved bit, or EPT's misconfiguration; the rest."""

FAST = ("fixed", "spurious", "not fixed")
ROUNDS = 2048
_PAUSE = 200_000  # ns without a write-protection that make the next one the start of another round
_MANY = 4096  # MMIO pages that are counted
_P, _W, _RSVD, _GLA = (np.uint64(bit) for bit in (1, 2, 8, 0x80))


def cause(codes: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The position in :data:`CAUSES` of each code of kvm_page_fault, on AMD and on Intel.

    >>> [CAUSES[i] for i in cause(np.array([0x100000007, 0x181, 0x10000000d, 0x15], dtype=np.uint64))]
    ['write-protected', 'not present', 'MMIO', 'other rights']
    """
    qualified = (codes & _GLA != 0) & (codes >> np.uint64(32) == 0)
    code = np.where(qualified, pfec.from_ept(codes), codes)
    found = np.full(len(codes), 3, dtype=np.int64)
    found[code & (_P | _W) == _P | _W] = 1
    found[code & _P == 0] = 0
    found[code & _RSVD != 0] = 2
    return found


class Timeline:
    """Counts over time; :meth:`add` pieces, then :meth:`answer`."""

    def __init__(self) -> None:
        self._bins = {name: np.zeros(2 * BINS, dtype=np.int64) for name in (*CAUSES, *FAST)}
        self._clocked: bool | None = None
        self._origin, self._width, self._end = 0, 1, 0
        self._rounds: list[dict[str, int]] = []  # of write-protections
        self._marked: list[dict[str, int]] = []  # of the client's own marks
        self._more = 0
        self._protected = (0, -1)  # line and time of the last write-protection
        self._repaired = 0  # repairs since
        self.mmio: Counter[str] = Counter()
        self._pages: Counter[int] = Counter()

    def add(self, piece: trace.Trace) -> None:
        """Count one piece."""
        faults, fast = piece["kvm_page_fault"], piece["fast_page_fault"]
        exits = piece["kvm_exit"]
        misconfigured = exits[exits["reason"] == b"EPT_MISCONFIG"]
        spurious = fast["spurious"] == 1
        fixed = ~spurious & (fast["fixed"] == 1)
        which = cause(faults["error_code"])
        for i, name in enumerate(CAUSES):
            self._count(name, faults[which == i])
        self._count("MMIO", misconfigured)
        for name, those in zip(FAST, (fixed, spurious, ~spurious & ~fixed), strict=True):
            self._count(name, fast[those])
        self._round(piece, fast[fixed])
        self._io(piece)

    def _count(self, name: str, events: NDArray[Any]) -> None:
        if not len(events):
            return
        if self._clocked is None:
            self._clocked = bool((events["ns"] >= 0).any())
            self._origin = int(events["ns" if self._clocked else "line"][0])
        when = events["ns" if self._clocked else "line"]
        events, when = events[when >= 0], when[when >= 0]
        if not len(when):
            return
        high = int(when.max())
        while (high - self._origin) // self._width >= 2 * BINS:
            self._join()
        place = np.maximum((when - self._origin) // self._width, 0)  # earlier than the first: another clock
        np.add.at(self._bins[name], place, events["count"])
        self._end = max(self._end, high)

    def _join(self) -> None:
        self._width *= 2
        for name, bins in self._bins.items():
            self._bins[name] = np.concatenate([bins.reshape(-1, 2).sum(axis=1), np.zeros(BINS, dtype=np.int64)])

    # Rounds ----------------------------------------------------------------------------------------------------------

    def _round(self, piece: trace.Trace, repairs: NDArray[Any]) -> None:
        """Sweeps of write-protection: a pause, with a repair in it, parts one from the next."""
        changed = piece["kvm_tdp_mmu_spte_changed"]
        taken = (changed["old_spte"] ^ changed["new_spte"] == _W) & (changed["old_spte"] & _W != 0)
        swept = changed[taken & (changed["new_spte"] & _P != 0)]
        marks = piece["tracing_mark_write"]
        for mark in marks[np.char.startswith(marks["text"], b"DIRTY_GET_BEGIN")][:ROUNDS]:
            self._marked.append({"line": int(mark["line"]), "ns": int(mark["ns"]), "repairs": 0})
        self._marked = self._marked[:ROUNDS]
        starts = np.array([mark["line"] for mark in self._marked], dtype=np.int64)
        behind = np.searchsorted(starts, repairs["line"]) - 1
        for i, n in zip(*np.unique(behind[behind >= 0], return_counts=True), strict=True):
            self._marked[int(i)]["repairs"] += int(n)
        if not len(swept):
            self._repaired += len(repairs)
            if self._rounds:
                self._rounds[-1]["repairs"] += len(repairs)
            return
        line, ns = swept["line"], swept["ns"]
        earlier = np.concatenate([np.array([self._protected[0]], dtype=np.int64), line[:-1]])
        before = np.concatenate([np.array([self._protected[1]], dtype=np.int64), ns[:-1]])
        mended = np.searchsorted(repairs["line"], line) - np.searchsorted(repairs["line"], earlier)
        mended[0] += self._repaired
        pause = (ns < 0) | (before < 0) | (ns - before > _PAUSE)
        begins = (mended > 0) & pause
        begins[0] |= not self._rounds and not self._more
        if self._rounds:
            self._rounds[-1]["repairs"] += int(np.searchsorted(repairs["line"], line[0]))
        number = np.cumsum(begins)
        for k in range(int(number[-1]) + 1):
            mine = np.flatnonzero(number == k) if k < ROUNDS else np.zeros(0, dtype=np.intp)
            if not len(mine):
                continue
            first, last = int(mine[0]), int(mine[-1])
            if k and len(self._rounds) >= ROUNDS:
                self._more += int(number[-1]) + 1 - k
                break
            if k:
                self._rounds.append({"line": int(line[first]), "ns": int(ns[first]), "pages": 0, "repairs": 0})
            if self._rounds:
                after = line[last + 1] if last + 1 < len(line) else np.int64(1 << 62)
                self._rounds[-1]["pages"] += int(swept["count"][mine].sum())
                low = np.searchsorted(repairs["line"], line[first])
                self._rounds[-1]["repairs"] += int(np.searchsorted(repairs["line"], after) - low)
        self._protected = int(line[-1]), int(ns[-1])
        self._repaired = int(len(repairs) - np.searchsorted(repairs["line"], line[-1]))

    # MMIO ------------------------------------------------------------------------------------------------------------

    def _io(self, piece: trace.Trace) -> None:
        done = piece["kvm_mmio"]
        for i, name in enumerate(("read", "write", "unsatisfied read")):
            self.mmio[name] += int(done["count"][done["kind"] == i].sum())
        self.mmio["fast write"] += int(piece["kvm_fast_mmio"]["count"].sum())
        checks = piece["check_mmio_spte"]
        self.mmio["stale spte"] += int(checks["count"][checks["valid"] == 0].sum())
        self.mmio["marked spte"] += int(piece["mark_mmio_spte"]["count"].sum())
        gpas = np.concatenate([done["gpa"], piece["kvm_fast_mmio"]["gpa"]]) >> np.uint64(12)
        weights = np.concatenate([done["count"], piece["kvm_fast_mmio"]["count"]])
        pages, place = np.unique(gpas, return_inverse=True)
        total = np.zeros(len(pages), dtype=np.int64)
        np.add.at(total, place, weights)
        self._pages.update(dict(zip(pages.tolist(), total.tolist(), strict=True)))
        if len(self._pages) > 2 * _MANY:
            self._pages = Counter(dict(self._pages.most_common(_MANY)))

    def answer(self) -> dict[str, Any]:
        """What was counted, ready for JSON.

        Returns:
            ``unit`` (``"s"``, or ``"lines"`` where no event has a time), ``start`` and ``width`` of a slice in it,
            ``causes`` and ``fast`` (a list of counts each, a number for each slice), ``rounds`` (line, at, pages that
            were write-protected, repairs until the next; ``pages`` is None where only a mark tells of the round),
            ``rounds_cut``, ``mmio`` (counts, and ``pages``: the busiest).
        """
        while (self._end - self._origin) // self._width >= BINS:
            self._join()
        used = (self._end - self._origin) // self._width + 1 if self._clocked is not None else 0
        scale = 10**9 if self._clocked else 1
        rounds = self._rounds or [{**mark, "pages": None} for mark in self._marked]
        return {
            "unit": "lines" if self._clocked is False else "s",
            "start": self._origin / scale,
            "width": self._width / scale,
            "causes": {name: self._bins[name][:used].tolist() for name in CAUSES},
            "fast": {name: self._bins[name][:used].tolist() for name in FAST},
            "rounds": [
                {
                    "line": found["line"],
                    "at": found["ns"] / 10**9 if found["ns"] >= 0 else None,
                    "pages": found["pages"],
                    "repairs": found["repairs"],
                }
                for found in rounds
            ],
            "rounds_cut": self._more,
            "mmio": {
                **{name: n for name, n in self.mmio.items() if n},
                "pages": [list(item) for item in sorted(self._pages.items(), key=lambda i: (-i[1], i[0]))[:10]],
            },
        }
