"""What became of each spte: its changes in the order of the trace, the busiest sptes of any trace in bounded memory.

The one idea: four events of KVM tell of a change of an spte, each in its own way, so all are first brought into one
array, :data:`CHANGE`, under one name for each spte. ``kvm_tdp_mmu_spte_changed`` names an entry of the TDP MMU by
address space, level and gfn; the other three by where the entry lies in memory. ``python -m mmu report`` prints the
histories of the busiest sptes, :mod:`mmu.conform` holds every change against the kernel's rules; chapter 13.

>>> text = b'''kvm_tdp_mmu_spte_changed: as id 0 gfn 1000 level 1 old_spte 5712e67 new_spte 5712e65
... fast_page_fault: vcpu 0 gva 1000008 error_code P|W|U sptep ffff888009988000 old 0x5712e65 new 5712e67 spurious 0 \
fixed 1'''
>>> found = Histories()
>>> _ = found.add(trace.read(text))
>>> [change["changed"] for change in found.answer("6.1-npt")["sptes"][0]["history"]]
['W 1→0', 'W 0→1']

Facts: Linux 6.1 ``mmu/mmutrace.h``, ``mmu/tdp_mmu.c``, ``mmu/mmu.c`` (facts 2.6 and 4). ``at`` of kvm_mmu_set_spte is a
physical address, ``sptep`` a virtual one, hashed where the kernel hides pointers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmu import spte, trace, update
from mmu.scan import MISSING

EVENTS = ("kvm_tdp_mmu_spte_changed", "fast_page_fault", "kvm_mmu_set_spte", "mark_mmio_spte")
"""The events that tell of a change; ``event`` of a :data:`CHANGE` is a position in this tuple."""

TDP, FAST, SET, MARK = range(len(EVENTS))

CHANGE = np.dtype(
    [
        ("key", np.uint64),  # the spte's name, see Names; UNNAMED where the line does not tell
        ("line", np.int64),
        ("count", np.int64),
        ("ns", np.int64),
        ("cpu", np.int32),
        ("pid", np.int32),
        ("vcpu", np.int32),  # -1: the event names none
        ("event", np.uint8),
        ("level", np.int8),  # 0: not known
        ("fixed", np.int8),  # of a fast path's event: spurious | fixed << 1, else 0
        ("restated", np.bool_),  # the same task's kvm_tdp_mmu_spte_changed just before tells of the same change
        ("gfn", np.uint64),  # MISSING: not known
        ("at", np.uint64),  # where the entry lies, physical; MISSING: not known
        ("sptep", np.uint64),  # the same, virtual or hashed
        ("old", np.uint64),  # MISSING: not printed
        ("new", np.uint64),  # MISSING: not printed
        ("code", np.uint64),  # of MARK: generation << 3 | access; of FAST: the error code
    ]
)

_NONE = np.uint64(MISSING)
UNNAMED = _NONE
_BY_TDP, _BY_AT, _BY_SPTEP, _BY_GFN = 1, 2, 3, 4  # the highest bits of a key
_SETS = 1 << 16  # sets remembered until the kernel's map of memory is known
_PIDS = 1 << 14  # tasks whose last change is remembered from piece to piece


def key_of_gfn(
    as_id: NDArray[Any], level: NDArray[Any], gfn: NDArray[np.uint64], kind: int = _BY_TDP
) -> NDArray[np.uint64]:
    """The name of an entry of the TDP MMU; UNNAMED where a number is larger than any that exists."""
    as_id, level = as_id.astype(np.uint64), level.astype(np.uint64)
    key = np.uint64(kind << 61) | as_id << np.uint64(52) | level << np.uint64(48) | gfn
    fits = (as_id < np.uint64(16)) & (level < np.uint64(8)) & (gfn < np.uint64(1 << 48))
    return np.where(fits, key, UNNAMED)


def key_of_address(address: NDArray[np.uint64], kind: int) -> NDArray[np.uint64]:
    """The name of an entry that lies at an address, physical (2) or virtual (3)."""
    low = address & np.uint64((1 << 57) - 1)
    top = address >> np.uint64(57)
    fits = (top == 0) | (top == np.uint64(127))
    return np.where(fits, np.uint64(kind << 61) | (top & np.uint64(1)) << np.uint64(57) | low, UNNAMED)


def unhashed(pointers: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """True where the kernel printed a pointer as it is; it may hash pointers, or hide them altogether.

    >>> unhashed(np.array([0xFFFF888009988000, 0x3A5C11D2, trace.MISSING], dtype=np.uint64)).tolist()
    [True, False, False]
    """
    return (pointers >= np.uint64(1 << 63)) & (pointers != _NONE)


class Names:
    """Gives every change its spte's name, piece by piece.

    A fast path's event is of a direct MMU, so its address is a guest-physical one. Where the trace shows the TDP MMU
    at work it is named as the TDP MMU's own events name it; else by its address, made physical once the two events
    that print the same entry's virtual and physical address have shown where the kernel maps memory (inferred: the
    difference is the same for all entries, and a multiple of 1 GiB).
    """

    def __init__(self) -> None:
        self.tdp_mmu = False  # the trace shows it at work
        self.spaces = False  # in more than one address space: then a gfn alone does not tell the entry
        self.offset: int | None = None  # virtual minus physical
        self._last = np.zeros(0, dtype=CHANGE)  # each task's last change
        self._sets = np.zeros(0, dtype=[("gfn", np.uint64), ("at", np.uint64)])  # until the offset is known

    def changes(self, piece: trace.Trace) -> NDArray[Any]:
        """The changes that one piece tells of, in the order of its lines."""
        parts = [self._last]
        for position, event in enumerate(EVENTS):
            if len(piece[event]):
                parts.append(_read(piece[event], position))
        rows = np.concatenate(parts)
        if len(rows) == len(self._last):
            return rows[:0]
        rows[len(self._last) :] = rows[len(self._last) :][np.argsort(rows["line"][len(self._last) :], kind="stable")]
        self._learn(rows[len(self._last) :])
        self._restate(rows)
        fresh = rows[len(self._last) :]
        self._name(fresh)
        by_task = rows[np.argsort(rows["pid"], kind="stable")]
        self._last = by_task[np.append(by_task["pid"][1:] != by_task["pid"][:-1], True)][-_PIDS:]
        return fresh

    def joined(self, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Names by virtual address made names by physical one, once it is known where the kernel maps memory."""
        if self.offset is None:
            return keys
        real = keys >> np.uint64(57) == np.uint64(_BY_SPTEP << 4 | 1)
        physical = (keys | np.uint64(127 << 57)) - np.uint64(self.offset)
        return np.where(real, key_of_address(physical, _BY_AT), keys)

    def _learn(self, rows: NDArray[Any]) -> None:
        spaces = rows["key"][rows["event"] == TDP]  # not named yet: the address space
        self.tdp_mmu |= len(spaces) > 0
        self.spaces |= bool((spaces > 0).any())
        if self.offset is not None:
            return
        sets = rows[(rows["event"] == SET) & (rows["at"] != _NONE)][["gfn", "at"]]
        sets = np.concatenate([self._sets, sets])[::-1]  # newest first
        _, newest = np.unique(sets["gfn"], return_index=True)
        self._sets = sets = sets[newest][:_SETS]  # (gfn,) sorted
        fast = rows[(rows["event"] == FAST) & unhashed(rows["sptep"])]
        if not len(sets) or not len(fast):
            return
        place = np.minimum(np.searchsorted(sets["gfn"], fast["gfn"]), len(sets) - 1)
        offset = fast["sptep"] - sets["at"][place]
        likely = (sets["gfn"][place] == fast["gfn"]) & (offset & np.uint64((1 << 30) - 1) == 0)
        values, times = np.unique(offset[likely], return_counts=True)
        if len(values):
            self.offset, self._sets = int(values[np.argmax(times)]), sets[:0]

    def _restate(self, rows: NDArray[Any]) -> None:
        """Find the events that tell once more of the change of which the same task's line before told."""
        order = np.argsort(rows["pid"], kind="stable")
        before, after = order[:-1], order[1:]
        same = (rows["pid"][before] == rows["pid"][after]) & (rows["event"][before] == TDP)
        same &= (rows["event"][after] == SET) | (rows["event"][after] == MARK)
        same &= (rows["gfn"][before] == rows["gfn"][after]) & (rows["level"][before] == rows["level"][after])
        rows["restated"][after[same]] = True

    def _name(self, rows: NDArray[Any]) -> None:
        event, gfn = rows["event"], rows["gfn"]
        key = np.where(event == TDP, key_of_gfn(rows["key"], rows["level"], gfn), UNNAMED)
        fast = event == FAST
        rows["level"][fast] = _fast_level(rows[fast])
        by_gfn = rows["restated"] | (fast & np.bool_(self.tdp_mmu and not self.spaces))
        span = (np.uint64(1) << (np.uint64(9) * (np.maximum(rows["level"], 1) - 1).astype(np.uint64))) - np.uint64(1)
        key = np.where(by_gfn, key_of_gfn(np.zeros_like(gfn), rows["level"], gfn & ~span), key)
        virtual, physical = rows["sptep"], rows["at"]
        rest = (key == UNNAMED) & (event != TDP)
        key = np.where(rest & (physical != _NONE), key_of_address(physical, _BY_AT), key)
        rest = (key == UNNAMED) & (event != TDP) & (virtual != _NONE)
        key = np.where(rest, self.joined(key_of_address(virtual, _BY_SPTEP)), key)
        rest = (event == SET) & (physical == _NONE) & ~rows["restated"]  # older kernels do not print where it lies
        rows["key"] = np.where(rest, key_of_gfn(np.zeros_like(gfn), rows["level"], gfn, _BY_GFN), key)


def _read(events: NDArray[Any], position: int) -> NDArray[Any]:
    rows = np.zeros(len(events), dtype=CHANGE)
    for name in ("line", "count", "ns", "cpu", "pid"):
        rows[name] = events[name]
    rows["event"], rows["vcpu"] = position, -1
    for name in ("at", "sptep", "old", "new"):
        rows[name] = _NONE
    if position == TDP:
        rows["key"], rows["level"], rows["gfn"] = events["as_id"], events["level"], events["gfn"]
        rows["old"], rows["new"] = events["old_spte"], events["new_spte"]
    elif position == FAST:
        rows["vcpu"], rows["gfn"], rows["sptep"] = events["vcpu"], events["gva"] >> np.uint64(12), events["sptep"]
        rows["old"], rows["new"], rows["code"] = events["old"], events["new"], events["error_code"]
        rows["fixed"] = (events["spurious"] == 1) | (events["fixed"] == 1).astype(np.int8) << np.int8(1)
    elif position == SET:
        rows["gfn"], rows["level"], rows["at"] = events["gfn"], events["level"], events["sptep"]
        rows["new"] = events["spte"]
    else:
        rows["gfn"], rows["level"], rows["sptep"] = events["gfn"], 1, events["sptep"]
        rows["code"] = np.where(events["gen"] == _NONE, np.uint64(0), events["gen"]) << np.uint64(3) | events[
            "access"
        ] & np.uint64(7)
    return rows


def _fast_level(rows: NDArray[Any]) -> NDArray[np.int8]:
    """The level of the entry that a fast path's event is about: where in its table it lies, and PS, tell."""
    gfn, old = rows["gfn"], rows["old"]
    large = (old & np.uint64(0x80) != 0) & (old & np.uint64(7) != 0)
    real = unhashed(rows["sptep"])
    index = rows["sptep"] >> np.uint64(3) & np.uint64(511)
    level = np.where(large, np.int8(2), np.int8(1))
    for above in (4, 3, 2, 1):
        fits = real & (gfn >> np.uint64(9 * (above - 1)) & np.uint64(511) == index) & ~(large & (above == 1))
        level[fits] = above
    return level


class Histories:
    """The histories of the busiest sptes of a trace; :meth:`add` a piece, then :meth:`answer`.

    What is kept is bounded: of each history the last ``length`` changes, of all sptes the ``sptes`` busiest, and
    counts of at most ``distinct`` sptes. What was cut is counted.
    """

    def __init__(self, sptes: int = 10, length: int = 16, distinct: int = 1 << 20) -> None:
        self.sptes, self.length, self.distinct = sptes, length, distinct
        self.names = Names()
        self.events = 0
        self.unnamed = 0
        self._keys = np.zeros(0, dtype=np.uint64)  # sorted
        self._counts = np.zeros(0, dtype=np.int64)
        self._forgotten = 0  # sptes whose count was given up
        self._floor = 0  # the largest of these counts
        self._rows = [np.zeros(0, dtype=CHANGE)]
        self._pending = 0

    def add(self, piece: trace.Trace) -> NDArray[Any]:
        """Count and keep the changes of one piece; returns all :data:`CHANGE` records of it."""
        every = self.names.changes(piece)
        rows = every[~every["restated"]]
        self.events += int(rows["count"].sum())
        self.unnamed += int(rows["count"][rows["key"] == UNNAMED].sum())
        rows = rows[rows["key"] != UNNAMED]
        self._rows.append(rows)
        self._pending += len(rows)
        if self._pending > 1 << 17:
            self._compact()
        return every

    def _compact(self, kept: int = 1 << 12) -> None:
        rows = np.concatenate(self._rows)
        rows["key"] = self.names.joined(rows["key"])
        fresh = rows[len(self._rows[0]) :]
        keys = np.concatenate([self.names.joined(self._keys), fresh["key"]])
        keys, place = np.unique(keys, return_inverse=True)
        counts = np.zeros(len(keys), dtype=np.int64)
        np.add.at(counts, place, np.concatenate([self._counts, fresh["count"]]))
        if len(keys) > self.distinct:
            few = np.argsort(counts, kind="stable")[: len(keys) - self.distinct // 2]
            self._forgotten += len(few)
            self._floor = max(self._floor, int(counts[few].max()))
            stay = np.ones(len(keys), dtype=np.bool_)
            stay[few] = False
            keys, counts = keys[stay], counts[stay]
        self._keys, self._counts = keys, counts
        if len(rows) > kept * self.length:
            busiest = np.sort(keys[np.argsort(-counts, kind="stable")[:kept]])
            rows = rows[np.isin(rows["key"], busiest)]
        order = np.argsort(rows["key"], kind="stable")  # each history together, oldest first
        end = np.searchsorted(rows["key"][order], rows["key"][order], side="right")
        age = end - np.arange(len(rows), dtype=np.int64)  # (change,) 1 is the newest of its history
        self._rows = [rows[np.sort(order[age <= self.length + 1])]]  # one more: it tells the old value of the first
        self._pending = 0

    def answer(self, layout: str | None) -> dict[str, Any]:
        """The busiest sptes, the busiest first, ready for JSON; sptes are told apart, not judged.

        Args:
            layout: the sptes' layout, None where it is not known; then changes are given as the bits that differ.

        Returns:
            ``sptes``, a list: ``as_id``, ``level``, ``gfn``, ``at``, ``sptep`` (None: not known), ``events``,
            ``cut`` (how many older ones are not listed) and ``history``, a list of ``line``, ``count``, ``event``,
            ``vcpu``, ``old`` (where the event prints none: what the one before left), ``new``, ``state``,
            ``changed`` and ``meanwhile`` (what had changed since the event before, of which no event tells; None:
            nothing, or not known); and ``sptes_cut``: of ``sptes`` in all (None: more than are counted, those that
            were given up had at most ``at_most`` events) ``not_listed`` were cut; ``events`` in all, of which
            ``unnamed`` do not tell their spte.
        """
        self._compact()
        rows = self._rows[0]
        order = np.lexsort((self._keys, -self._counts))[: self.sptes]
        found = [self._one(rows[rows["key"] == self._keys[i]], int(self._counts[i]), layout) for i in order.tolist()]
        return {
            "sptes": found,
            "sptes_cut": {
                "sptes": len(self._keys) if not self._forgotten else None,
                "events": self.events,
                "not_listed": max(len(self._keys) + self._forgotten - len(found), 0),
                "at_most": self._floor,
                "unnamed": self.unnamed,
            },
        }

    def _one(self, rows: NDArray[Any], events: int, layout: str | None) -> dict[str, Any]:
        key = int(rows["key"][0])
        level = int(rows["level"].max())
        history, last = [], None
        for row in rows:
            history.append(_change(row, last, layout, level))
            last = history[-1]["new"]
        history = history[-self.length :]
        listed = sum(change["count"] for change in history)
        gfn, at, sptep = (_last_known(rows[name]) for name in ("gfn", "at", "sptep"))
        return {
            "as_id": key >> 52 & 15 if key >> 61 == _BY_TDP else None,
            "level": level or None,
            "gfn": gfn,
            "at": None if at is None else f"{at:#x}",
            "sptep": None if sptep is None else f"{sptep:#x}",
            "events": events,
            "cut": events - listed,
            "history": history,
        }


def _change(row: Any, last: str | None, layout: str | None, level: int) -> dict[str, Any]:
    """One change in words; ``last`` is what the change before it left."""
    old, new = (None if row[name] == _NONE else int(row[name]) for name in ("old", "new"))
    known = None if last is None else int(last, 16)
    if row["event"] == MARK and layout is not None:
        mark = int(row["code"])
        new = update.make_mmio(int(row["gfn"]), access=mark & 6, generation=mark >> 3, layout=layout)
    before = known if old is None else old
    difference = None if before is None or new is None else _difference(before, new, layout)
    if old is None and known == new is not None:
        difference = "set again; what it was meanwhile, no event tells"
    meanwhile = None if old is None or known is None or old == known else _difference(known, old, layout)
    return {
        "line": int(row["line"]),
        "count": int(row["count"]),
        "event": EVENTS[row["event"]],
        "vcpu": int(row["vcpu"]) if row["vcpu"] >= 0 else None,
        "meanwhile": meanwhile,
        "old": None if before is None else f"{before:#x}",
        "new": None if new is None else f"{new:#x}",
        "state": None if new is None or layout is None else spte.STATES[spte.classify(new, layout, level or None)],
        "changed": difference,
    }


def _difference(old: int, new: int, layout: str | None) -> str:
    return update.changed(old, new, layout) if layout else "nothing" if old == new else f"bits {old ^ new:#x}"


def _last_known(values: NDArray[np.uint64]) -> int | None:
    known = values[values != _NONE]
    return int(known[-1]) if len(known) else None


def name(found: dict[str, Any]) -> str:
    """One spte's name in a report for people.

    >>> name({"as_id": 0, "level": 1, "gfn": 4096, "at": None, "sptep": None})
    'gfn 0x1000 level 1, as id 0'
    """
    where = [f"gfn {found['gfn']:#x}{' level ' + str(found['level']) if found['level'] else ''}"]
    if found["as_id"] is not None:
        return f"{where[0]}, as id {found['as_id']}"
    where += [f"sptep {found['sptep']}"] if found["sptep"] else [f"at {found['at']}"] if found["at"] else []
    return ", ".join(where)
