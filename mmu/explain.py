"""Racing vCPUs explained: is every recorded event legal in the state that the trace itself has led to?

When vCPUs and a logging thread run at the same time no one can predict who comes first. But the trace leaves tracks:
every change of an spte happened between two lines of the task that made it, and every observation (a fault's error
code, the old spte of a fast-path event, an access that did *not* fault) was made between two lines as well. An
observation is explained when some order of the changes, within those bounds, shows it what it saw. Chapter 13.

:func:`explain` gives one verdict for each fault, fast-path event, return and dirty bitmap. Rules:

- lines follow one another in time;
- a vCPU's faults follow its accesses in program order, and the accesses in between must have been able to succeed;
- P and W of an error code match a state the spte could have had while the guest ran;
- a direct MMU prints a fast-path event for each write-protect fault, and its old spte, outcome and return agree; two
  repairs of one page need a write-protection between them;
- a page is in a dirty bitmap exactly when a writable spte was installed, or could have been, since the last one.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmu import scenario, trace
from mmu.host import PAGE
from mmu.kernel import RETURN_NUMBERS, Masks
from mmu.play import kernel_of
from mmu.scenario import DirtyClear, DirtyGet, EnableCap, Gmap, Host, Memslot, Run, Scenario

Ints = NDArray[np.int64]
Bools = NDArray[np.bool]

ABSENT, READ_ONLY, WRITABLE = 0, 1, 2  # what an spte can be, to those who use it
GRAIN = 1000  # ns: a trace prints microseconds
END = 1 << 60  # later than any line
WALK = 1 << 33  # error code: the CPU was walking guest tables


class Verdict(NamedTuple):
    """One event, and why it is not explained; no reason: it is."""

    kind: str
    line: int | None
    what: str
    reason: str


class Changes(NamedTuple):
    """Everything that happened to sptes: columns ``# (change,)``, sorted by gfn.

    Each happened after line ``t0`` and before line ``t1``; ``marks`` says that it entered the page into the dirty log.
    """

    gfn: Ints
    t0: Ints
    t1: Ints
    state: Ints
    marks: Bools


def races(scene: Scenario) -> bool:
    """Whether anything overlaps a run in time: another vCPU's run, or a call that looks at or changes the slots."""
    runs = sorted(scene.runs, key=lambda run: run.ns)
    overlap = any(a.ns_end > b.ns and a.vcpu != b.vcpu for a, b in pairwise(runs))
    begin = np.array([run.ns for run in runs], dtype=np.int64)
    end = np.maximum.accumulate(np.array([run.ns_end for run in runs], dtype=np.int64)) if runs else begin
    calls = np.array(
        [e.ns for e in scene.events if isinstance(e, DirtyGet | DirtyClear | Memslot | Host)], dtype=np.int64
    )
    before = np.searchsorted(begin, calls, side="right") - 1
    return overlap or bool(((before >= 0) & (calls < end[np.maximum(before, 0)])).any() if runs else False)


def explain(t: trace.Trace, scene: Scenario, seen: Any) -> list[Verdict]:
    """A verdict on each compared event of a racing scenario.

    Args:
        t: the trace.
        scene: its scenario.
        seen: the trace's faults, as :func:`mmu.replay.recorded` gives them.
    """
    return Explainer(t, scene, seen).verdicts()


def possible(changes: Changes, gfn: Ints, a: Ints, b: Ints, state: Ints) -> Bools:
    """Whether each page could have been in a state at some time between lines ``a`` and ``b``  # (observation,).

    That is so when a change to that state may fall into the window, or may be the last one before it: no other change
    that was surely complete by then began after it was over.
    """
    low, high = np.searchsorted(changes.gfn, gfn, "left"), np.searchsorted(changes.gfn, gfn, "right")
    count = high - low
    who = np.repeat(np.arange(gfn.size, dtype=np.int64), count)  # (pair,)
    which = np.arange(who.size, dtype=np.int64) - np.repeat(np.cumsum(count) - count, count) + low[who]
    t0, t1 = changes.t0[which], changes.t1[which]
    before = t1 < a[who]
    newest = np.full(gfn.size, -1, dtype=np.int64)
    np.maximum.at(newest, who[before], t0[before])
    counts = (before & (t1 >= newest[who])) | ((t0 <= b[who]) & (t1 >= a[who]))
    hit = counts & (changes.state[which] == state[who])
    return np.bincount(who[hit], minlength=gfn.size) > 0


class Explainer:
    """Holds a trace against the rules."""

    def __init__(self, t: trace.Trace, scene: Scenario, seen: Any) -> None:
        self.t, self.scene, self.seen = t, scene, seen
        self.shadow = not scene.nested_paging and scenario.paging_format(scene) is not None
        kernel = kernel_of(scene)
        self.name = {number: name for name, number in RETURN_NUMBERS[kernel.release].items()}
        self.bits = Masks(kernel.layout)
        self._lines()
        self.gpa_page: dict[int, int] = {}
        for gmap in scene.of(Gmap):
            self.gpa_page.update({gmap.gva // PAGE + k: gmap.gpa // PAGE + k for k in range(gmap.pages)})
        slot = next((m for m in scene.of(Memslot) if m.slot == 0), None)
        self.own = (slot.gpa // PAGE, (slot.gpa + slot.size) // PAGE) if slot else (0, 0)
        gfn = self._gfn(seen.address, translated=self.shadow)
        self.keep = np.flatnonzero((gfn < self.own[0]) | (gfn >= self.own[1]))
        self.gfn = gfn[self.keep]
        self.changes = self._changes()

    # Lines and times -------------------------------------------------------------------------------------------------

    def _lines(self) -> None:
        """All event lines with their task and time, in order; and for each the line of the same task before it."""
        parts = [self.t[name][["line", "pid", "ns"]] for name in self.t]
        every = np.concatenate(parts) if parts else np.zeros(0, dtype=[("line", "i8"), ("pid", "i4"), ("ns", "i8")])
        every = every[np.argsort(every["line"], kind="stable")]
        self.line, self.ns = every["line"].astype(np.int64), every["ns"].astype(np.int64)
        self._task_key = np.sort(every["pid"].astype(np.int64) << 40 | self.line)
        late = self.ns < np.maximum.accumulate(self.ns) - GRAIN if self.ns.size else np.zeros(0, dtype=np.bool)
        self.late = self.line[late]
        entries = self.t["kvm_entry"]
        self._entry_key = np.sort(entries["pid"].astype(np.int64) << 40 | entries["line"])

    def _previous(self, pid: NDArray[Any], line: NDArray[Any], keys: Ints | None = None) -> Ints:
        """The line of the same task (or of its last kvm_entry) before each line; 0 where there is none."""
        keys = self._task_key if keys is None else keys
        asked = pid.astype(np.int64) << 40 | line.astype(np.int64)
        if not keys.size:
            return np.zeros(asked.size, dtype=np.int64)
        found = keys[np.maximum(np.searchsorted(keys, asked) - 1, 0)]
        return np.where((found < asked) & (found >> 40 == pid), found & ((1 << 40) - 1), np.int64(0))

    def _next_entry(self, pid: NDArray[Any], line: NDArray[Any]) -> Ints:
        """The line of the same task's first kvm_entry after each line; the line itself where there is none."""
        asked = pid.astype(np.int64) << 40 | line.astype(np.int64)
        keys = np.append(self._entry_key, np.int64(-1))
        found = keys[np.searchsorted(self._entry_key, asked, side="right")]
        return np.where(found >> 40 == pid, found & ((1 << 40) - 1), line.astype(np.int64))

    def _span(self, begin: int, end: int) -> tuple[int, int]:
        """The lines between which something happened that the scenario times."""
        low = int(np.searchsorted(self.ns, begin - GRAIN)) - 1
        high = int(np.searchsorted(self.ns, end + GRAIN, side="right"))
        return (int(self.line[low]) if low >= 0 else 0), (int(self.line[high]) if high < self.line.size else END)

    def _gfn(self, address: NDArray[np.uint64], *, translated: bool) -> Ints:
        page = (address >> np.uint64(12)).astype(np.int64)
        if not translated:
            return page
        gva = np.array(sorted(self.gpa_page), dtype=np.int64)
        gpa = np.array([self.gpa_page[key] for key in gva.tolist()], dtype=np.int64)
        at = np.minimum(np.searchsorted(gva, page), max(gva.size - 1, 0))
        return np.where(gva[at] == page, gpa[at], page) if gva.size else page

    # What happened to sptes ------------------------------------------------------------------------------------------

    def _state(self, spte: NDArray[np.uint64]) -> Ints:
        present = spte & self.bits.present != 0
        return np.where(present, np.where(spte & self.bits.w != 0, WRITABLE, READ_ONLY), ABSENT).astype(np.int64)

    def _changes(self) -> Changes:
        columns: list[list[Ints]] = [[], [], [], [], []]

        def add(gfn: Ints, t0: Any, t1: Any, state: Any, marks: Any = False) -> None:
            for column, values in zip(columns, (gfn, t0, t1, state, marks), strict=True):
                column.append(np.broadcast_to(np.asarray(values, dtype=np.int64), gfn.shape))

        t = self.t
        exact = "kvm_tdp_mmu_spte_changed" in t
        everyone = np.unique(np.concatenate([self.gfn, self._accessed()]))
        add(everyone, -1, -1, ABSENT)
        events = t["kvm_mmu_set_spte"]
        events = events[events["level"] == 1]
        self.installed = np.stack([events["gfn"], events["spte"] >> self.bits.frame], axis=1).astype(np.int64)
        if not exact:
            state = self._state(events["spte"])
            before = self._previous(events["pid"], events["line"])
            add(events["gfn"].astype(np.int64), before, events["line"], state, state == WRITABLE)
        else:
            events = t["kvm_tdp_mmu_spte_changed"]
            events = events[events["level"] == 1]
            state, old = self._state(events["new_spte"]), self._state(events["old_spte"])
            before = self._previous(events["pid"], events["line"])
            marks = (state == WRITABLE) & (old != WRITABLE)
            add(events["gfn"].astype(np.int64), before, events["line"], state, marks)
        events = t["fast_page_fault"]
        events = events[events["fixed"] == 1]
        gfn = (events["gva"] >> np.uint64(12)).astype(np.int64)
        add(gfn, self._previous(events["pid"], events["line"]), events["line"], WRITABLE, True)
        self.gets: list[tuple[DirtyGet, int, int]] = []
        self._slot_changes(add, exact)
        order = np.argsort(np.concatenate(columns[0]), kind="stable")
        gfn, t0, t1, state, marks = (np.concatenate(column)[order] for column in columns)
        return Changes(gfn, t0, t1, state, marks.astype(np.bool))

    def _slot_changes(self, add: Any, exact: bool) -> None:
        """Write-protection by calls that the scenario times; printed line by line only by the TDP MMU."""
        manual = initially_set = False
        slots: dict[int, Memslot] = {}
        for event in self.scene.events:
            if isinstance(event, EnableCap) and event.cap == 168:
                manual, initially_set = bool(event.arg0 & 1), bool(event.arg0 & 2)
            elif isinstance(event, Memslot):
                begin, end = self._span(event.ns, event.ns_end)
                old = slots.get(event.slot)
                size = event.size or (old.size if old else 0)
                pages = np.arange(event.gpa // PAGE, (event.gpa + size) // PAGE, dtype=np.int64)
                started = event.flags & 1 and old is not None and not old.flags & 1
                if not event.size and not exact:
                    add(pages, begin, end, ABSENT)
                elif started and not exact and not (manual and initially_set):
                    add(pages, begin, end, READ_ONLY)
                slots[event.slot] = event
            elif isinstance(event, DirtyGet | DirtyClear) and event.slot in slots:
                begin, end = self._span(event.ns, event.ns_end)
                first = slots[event.slot].gpa // PAGE + (event.first_page if isinstance(event, DirtyClear) else 0)
                if isinstance(event, DirtyGet):
                    self.gets.append((event, begin, end))
                if not exact and (isinstance(event, DirtyClear) or not manual):
                    add(first + np.flatnonzero(event.bitmap).astype(np.int64), begin, end, READ_ONLY)
        self.manual = manual
        unmaps = self.t["kvm_unmap_hva_range"]
        for slot in slots.values() if not exact else ():
            first = np.maximum(unmaps["start"].astype(np.int64), slot.hva)
            last = np.minimum(unmaps["end"].astype(np.int64), slot.hva + slot.size)
            hit = first < last
            for begin, end, pid, line in zip(
                first[hit], last[hit], unmaps["pid"][hit], unmaps["line"][hit], strict=True
            ):
                pages = np.arange((begin - slot.hva) // PAGE, -(-(end - slot.hva) // PAGE), dtype=np.int64)
                after = np.searchsorted(self._task_key, (int(pid) << 40) + int(line), side="right")
                next_line = int(self._task_key[after]) & ((1 << 40) - 1) if after < self._task_key.size else END
                add(slot.gpa // PAGE + pages, int(line), next_line, ABSENT)

    # The program's order ---------------------------------------------------------------------------------------------

    def _runs(self, vcpu: int) -> list[Run]:
        return sorted((run for run in self.scene.runs if run.vcpu == vcpu), key=lambda run: run.ns)

    def _accessed(self) -> Ints:
        parts = [self._gfn(run.gva, translated=True) for run in self.scene.runs]
        return np.concatenate([np.zeros(0, dtype=np.int64), *parts])

    def _follow(self, vcpu: int) -> tuple[Ints, Ints, list[Verdict]]:
        """Place one vCPU's faults among its accesses: rows of ``keep``, a reason number for each, and missing faults.

        Each fault goes to the first access that can be its own, no earlier than the fault before it. Reasons: 0 none,
        1 no access is left that it could be for, 2 an access before it would have had to fault.
        """
        seen = self.seen
        rows = np.flatnonzero(seen.vcpu[self.keep] == vcpu)
        rows = rows[np.argsort(seen.line[self.keep[rows]], kind="stable")]
        runs = self._runs(vcpu)
        if not runs:
            return rows, np.ones(rows.size, dtype=np.int64), []
        gva, op = np.concatenate([run.gva for run in runs]), np.concatenate([run.op for run in runs])
        page = self._gfn(gva, translated=True)
        target = gva if self.shadow else page.astype(np.uint64) << np.uint64(12) | (gva & np.uint64(0xFFF))
        first = np.cumsum([0, *map(len, runs)], dtype=np.int64)
        starts, ends = np.array([self._span(run.ns, run.ns_end) for run in runs], dtype=np.int64).T  # (run,) lines
        lines = seen.line[self.keep[rows]]
        which = np.searchsorted(starts, lines, side="left") - 1
        inside = (which >= 0) & (lines <= ends[np.maximum(which, 0)])
        which = np.maximum(which, 0)
        place, found = self._lay(target, seen.address[self.keep[rows]], first[which], first[which + 1])
        code = seen.code[self.keep[rows]]
        walks = code & np.uint64(WALK) != 0
        at = np.minimum(place, max(gva.size - 1, 0))
        stores = (op[at] == scenario.WRITE) | (op[at] == scenario.RMW)
        fits = found & (walks | (stores == (code & np.uint64(2) != 0)))
        reason = np.where(inside & (fits | walks), 0, 1)

        # Accesses from one fault to the next succeeded between the two: the spte must have allowed it then.
        # Other exits may lie between, so the time begins at the entry that follows the fault before.
        entry = self._next_entry(self._pid(rows), lines)
        leave = self._previous(self._pid(rows), lines)
        good = np.flatnonzero(reason == 0)
        step = np.searchsorted(place[good], np.arange(gva.size, dtype=np.int64), side="right")
        run_of = np.searchsorted(first, np.arange(gva.size, dtype=np.int64), side="right") - 1
        bounded = step < good.size
        follower = good[np.minimum(step, max(good.size - 1, 0))] if good.size else np.zeros(gva.size, dtype=np.int64)
        same = bounded & (which[follower] == run_of) if good.size else np.zeros(gva.size, dtype=np.bool)
        begin, finish = starts[run_of], ends[run_of]
        a = begin
        if good.size:
            leader = good[np.maximum(step - 1, 0)]
            a = np.where((step > 0) & (which[leader] == run_of), entry[leader], begin)
        b = np.where(same, leave[follower], finish) if good.size else finish
        real = op < scenario.INVLPG
        store = (op == scenario.WRITE) | (op == scenario.RMW)
        allowed = possible(self.changes, page, a, b, np.full(page.size, WRITABLE, dtype=np.int64))
        allowed |= ~store & possible(self.changes, page, a, b, np.full(page.size, READ_ONLY, dtype=np.int64))
        outside = (page < self.own[0]) | (page >= self.own[1])
        stuck = real & outside & ~allowed
        reason[np.unique(follower[stuck & same])] = 2
        missing = [
            Verdict(
                "faults", None, f"vCPU {vcpu}, access at {int(gva[access]):#x}", "no fault is recorded that it needs"
            )
            for access in np.flatnonzero(stuck & ~same).tolist()
        ]
        self.stores.append((page[store & outside], a[store & outside], b[store & outside]))
        return rows, reason, missing

    def _pid(self, rows: Ints) -> Ints:
        return self.t["kvm_page_fault"]["pid"].astype(np.int64)[self.keep[rows]]

    @staticmethod
    def _lay(target: NDArray[np.uint64], address: NDArray[np.uint64], begin: Ints, end: Ints) -> tuple[Ints, Bools]:
        """The access that each fault is for, never falling; and whether there is one  # (fault,)."""
        order = np.argsort(target, kind="stable")
        names, start = np.unique(target[order], return_index=True)
        name = np.minimum(np.searchsorted(names, address), max(names.size - 1, 0))
        known = names[name] == address if names.size else np.zeros(address.size, dtype=np.bool)
        size = target.size + 1
        keys = np.repeat(np.arange(names.size, dtype=np.int64), np.diff(np.append(start, target.size))) * size + order
        place = begin.copy()
        while True:
            floor = np.maximum(begin, np.append(0, np.maximum.accumulate(place))[:-1]) if place.size else begin
            at = np.searchsorted(keys, name * size + floor)
            key = keys[np.minimum(at, max(keys.size - 1, 0))] if keys.size else np.zeros(address.size, dtype=np.int64)
            found = known & (at < keys.size) & (key // size == name) & (key % size < end)
            laid = np.where(found, key % size, floor)
            if np.array_equal(laid, place):
                return place, found
            place = laid

    # Verdicts --------------------------------------------------------------------------------------------------------

    def verdicts(self) -> list[Verdict]:
        """All of them, kind by kind."""
        self.stores: list[tuple[Ints, Ints, Ints]] = []
        seen, keep = self.seen, self.keep
        order = np.zeros(keep.size, dtype=np.int64)
        missing: list[Verdict] = []
        for vcpu in np.unique(np.concatenate([seen.vcpu[keep], [run.vcpu for run in self.scene.runs]])).tolist():
            rows, reason, more = self._follow(int(vcpu))
            order[rows] = reason
            missing += more
        return [*self._faults(order), *missing, *self._fast(), *self._returns(), *self._bitmaps()]

    def _faults(self, order: Ints) -> list[Verdict]:
        seen, keep = self.seen, self.keep
        line, code = seen.line[keep], seen.code[keep]
        pid = self._pid(np.arange(keep.size, dtype=np.int64))
        a, b = self._previous(pid, line, self._entry_key), self._previous(pid, line)
        present, write = code & np.uint64(1) != 0, code & np.uint64(2) != 0
        wanted = np.where(present, READ_ONLY, ABSENT).astype(np.int64)
        could = possible(self.changes, self.gfn, a, b, wanted) & ~(present & ~write)
        usual = code & ~np.uint64(0x300000007) == 0
        nested = code >> np.uint64(32) != 0
        usual &= nested == self.scene.nested_paging
        usual &= ~nested | (code & np.uint64(4) != 0)
        late = np.isin(line, self.late)
        out = []
        for row in range(keep.size):
            reason = ("", "no access of the vCPU's run is left for it", "an access before it would have had to fault")[
                order[row]
            ]
            if not usual[row]:
                reason = "such an error code does not come from here"
            elif not could[row]:
                state = ("absent", "write-protected")[int(present[row])]
                reason = f"the spte could not be {state} then"
            elif late[row]:
                reason = "it comes after lines that are later"
            what = f"vCPU {seen.vcpu[keep[row]]} address {int(seen.address[keep[row]]):#x} code {int(code[row]):#x}"
            out.append(Verdict("faults", int(line[row]), what, reason))
        return out

    def _fast(self) -> list[Verdict]:
        """Fast-path events: printed for each write-protect fault of a direct MMU, and only there."""
        seen, keep = self.seen, self.keep
        code, said = seen.code[keep], seen.fast[keep]
        due = (code & np.uint64(0xB) == 3) & (not self.shadow)
        printed = said >= 0
        events = self.t["fast_page_fault"][np.maximum(seen.row[keep], 0)] if len(self.t["fast_page_fault"]) else None
        reason = np.zeros(keep.size, dtype=object)
        reason[:] = ""
        reason[due & ~printed] = "a write-protect fault of a direct MMU prints an event"
        reason[~due & printed] = "only a write-protect fault of a direct MMU prints an event"
        if events is not None and printed.any():
            line, last = seen.line[keep], events["line"].astype(np.int64)
            spurious, fixed, w = said & 1 != 0, said & 2 != 0, said & 4 != 0
            here = printed & due
            could_rw = possible(self.changes, self.gfn, line, last, np.full(keep.size, WRITABLE, dtype=np.int64))
            could_ro = possible(self.changes, self.gfn, line, last, np.full(keep.size, READ_ONLY, dtype=np.int64))
            mmu_w = events["old"] & self.bits.mmu_w != 0
            legal = np.where(fixed, ~spurious & ~w & could_ro & mmu_w, np.where(spurious, w & could_rw, ~w & ~mmu_w))
            reason[here & ~legal] = "old spte and outcome do not go together with what the spte could be"
            new_w = events["new"] & self.bits.w != 0
            reason[here & legal & fixed & ~new_w & ~could_ro] = "W was set, and nobody could have taken it away"
            pair = np.stack([self.gfn, (events["old"] >> self.bits.frame).astype(np.int64)], axis=1)
            installed = {(int(g), int(f) & ((1 << 40) - 1)) for g, f in self.installed}
            known = np.array([(int(g), int(f) & ((1 << 40) - 1)) in installed for g, f in pair], dtype=np.bool)
            there = events["old"] & self.bits.present != 0
            reason[here & there & ~known] = "no such page was ever mapped there"
            other = (events["gva"] >> np.uint64(12)).astype(np.int64) != self.gfn
            reason[here & (other | (events["vcpu"] != seen.vcpu[keep]))] = (
                "it is for another page or vCPU than the fault"
            )
            self._twice(np.flatnonzero(here & fixed), line, last, reason)
        texts = [
            "none printed" if s < 0 else f"spurious {s & 1} fixed {s >> 1 & 1}, W of old {s >> 2}"
            for s in said.tolist()
        ]
        return [Verdict("fast", int(seen.line[keep[row]]), texts[row], str(reason[row])) for row in range(keep.size)]

    def _twice(self, rows: Ints, begin: Ints, end: Ints, reason: NDArray[Any]) -> None:
        """Two repairs of one page need a write-protection between them, and one of these serves one pair only."""
        rows = rows[np.lexsort((end[rows], self.gfn[rows]))]
        gfn = self.gfn[rows]
        pairs = np.flatnonzero(gfn[1:] == gfn[:-1])
        if not pairs.size:
            return
        c = self.changes
        clears = np.flatnonzero(c.state == READ_ONLY)
        clears = clears[np.lexsort((c.t1[clears], c.gfn[clears]))]
        key = c.gfn[clears] << 40 | np.minimum(c.t1[clears], (1 << 40) - 1)
        first, second = rows[pairs], rows[pairs + 1]
        earliest = np.searchsorted(key, self.gfn[first] << 40 | begin[first])
        rank = np.arange(pairs.size, dtype=np.int64)
        taken = np.maximum.accumulate(earliest - rank) + rank  # each pair its own: at least one further than the last
        safe = np.minimum(taken, max(clears.size - 1, 0))
        fine = (taken < clears.size) & (c.gfn[clears[safe]] == self.gfn[first]) & (c.t0[clears[safe]] <= end[second])
        reason[second[~fine]] = "the page was repaired already, and nobody write-protected it since"

    def _returns(self) -> list[Verdict]:
        """Each fault's return agrees with its fast-path event, or with the spte that the slow path installed."""
        seen = self.seen
        position = np.full(seen.line.size, -1, dtype=np.int64)
        position[self.keep] = np.arange(self.keep.size, dtype=np.int64)
        rows = seen.returns[position[seen.returns[:, 2]] >= 0]
        out = []
        fault, line, number = rows[:, 2], rows[:, 0], rows[:, 4]
        at = position[fault]
        gfn, begin = self.gfn[at], seen.line[fault]
        said = np.array([self.name.get(n, "?") for n in number.tolist()], dtype=object)
        fast = seen.fast[fault]
        events = self.t["kvm_mmu_set_spte"]
        key = (
            np.sort(events["gfn"].astype(np.int64) << 40 | events["line"])
            if len(events)
            else np.zeros(0, dtype=np.int64)
        )
        low, high = (np.searchsorted(key, gfn << 40 | edge) for edge in (begin, line))
        mapped = high > low
        rw = possible(self.changes, gfn, begin, line, np.full(gfn.size, WRITABLE, dtype=np.int64))
        other = possible(self.changes, gfn, begin, line, np.full(gfn.size, ABSENT, dtype=np.int64)) | rw
        store = seen.code[fault] & np.uint64(2) != 0
        ro = possible(self.changes, gfn, begin, line, np.full(gfn.size, READ_ONLY, dtype=np.int64))
        own = rows[:, 3] != 0
        fixed, spurious = (fast >= 0) & (fast & 2 != 0), (fast >= 0) & (fast & 1 != 0)
        slow = ~fixed & ~spurious
        legal = np.where(fixed, said == "FIXED", np.where(spurious, said == "SPURIOUS", False))
        legal |= slow & own & (said == "INVALID")
        legal |= slow & ~own & (said == "FIXED") & mapped
        legal |= slow & ~own & (said == "SPURIOUS") & np.where(store, rw, rw | ro)
        unmaps = np.sort(self.t["kvm_unmap_hva_range"]["line"].astype(np.int64))
        other |= np.searchsorted(unmaps, line) > np.searchsorted(unmaps, begin)
        legal |= slow & ~own & (said == "RETRY") & ~mapped & other
        for row in range(len(rows)):
            reason = "" if legal[row] else "it does not go together with the fault's events"
            out.append(Verdict("returns", int(line[row]), f"returned {int(number[row])} ({said[row]})", reason))
        answers = np.bincount(at[~own], minlength=self.keep.size)
        for row in np.flatnonzero(answers != 1).tolist() if len(rows) else ():
            what, reason = f"{answers[row]} returns", "a fault returns once"
            out.append(Verdict("returns", int(seen.line[self.keep[row]]), what, reason))
        return out

    def _bitmaps(self) -> list[Verdict]:
        """A set bit has an installed writable spte behind it, and every one of those, and every store, sets its bit."""
        out = []
        c = self.changes
        empty = np.zeros(0, dtype=np.int64)
        page, a, b = (
            (np.concatenate([empty, *parts]) for parts in zip(*self.stores, strict=True))
            if self.stores
            else (empty,) * 3
        )
        started: dict[int, tuple[int, int, NDArray[np.bool]]] = {}
        slots = {m.slot: m for m in self.scene.of(Memslot) if m.size}
        for event, begin, end in self.gets:
            slot = slots[event.slot]
            first, pages = slot.gpa // PAGE, slot.size // PAGE
            since = started.get(event.slot, self._log_started(event.slot))
            bits = event.bitmap[:pages]
            inside = c.marks & (c.gfn >= first) & (c.gfn < first + pages)
            maybe = np.zeros(pages, dtype=np.bool)
            maybe[c.gfn[inside & (c.t1 >= since[0]) & (c.t0 <= end)] - first] = True
            surely = np.zeros(pages, dtype=np.bool)
            surely[c.gfn[inside & (c.t0 > since[1]) & (c.t1 < begin)] - first] = True
            mine = (page >= first) & (page < first + pages) & (a > since[1]) & (b < begin)
            surely[page[mine] - first] = True
            if self.manual and event.slot in started:
                maybe |= since[2]
            wrong = np.flatnonzero((bits & ~maybe) | (~bits & surely))
            reason = ""
            if wrong.size:
                how = "set without" if bits[wrong[0]] else "clear in spite of"
                reason = f"gfn {first + int(wrong[0]):#x} is {how} a store; {wrong.size} pages in all"
            out.append(Verdict("bitmaps", begin, f"slot {event.slot}, dirty log {event.seq}", reason))
            started[event.slot] = (begin, end, bits)
        return out

    def _log_started(self, number: int) -> tuple[int, int, NDArray[np.bool]]:
        for event in self.scene.of(Memslot):
            if event.slot == number and event.flags & 1:
                return (*self._span(event.ns, event.ns_end), np.zeros(0, dtype=np.bool))
        return 0, 0, np.zeros(0, dtype=np.bool)
