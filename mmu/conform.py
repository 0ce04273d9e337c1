"""A trace held against the kernel's rules alone: no scenario, only what its own events have led to.

The one idea: every event says something of the state it found, and the events before it made that state. So each value
and verdict is judged by itself (:mod:`mmu.values`), each spte's history is replayed (:mod:`mmu.chains`), each task's
events must follow one another as the kernel's code does (:mod:`mmu.order`), and what breaks no rule but gets nowhere
is known by its symptoms (:mod:`mmu.symptoms`). ``python -m mmu check TRACE --no-scenario`` prints it; chapter 13.

>>> wrong = b"kvm_mmu_set_spte: gfn 5 spte 29f0867 (rwxu) level 1 at 99bd028"
>>> [found["rule"] for found in conform(wrong, "6.1-npt")["findings"]]
['W is set in a leaf only where HOST_W and MMU_W are']

Where the kernel lost events, or another recording begins, what was known is forgotten. A root of the TDP MMU that was
given up has other entries than the new one of the same gfns.

Facts: those of the modules above; that ftrace prints events in the order of time
(Linux 6.1 ring_buffer.c and trace.c).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmu import chains, elements, exits, histories, infer, order, progress, spte, trace, values
from mmu.histories import TDP
from mmu.ledger import WINDOW, Ledger, Rule
from mmu.symptoms import Symptoms

Lines = NDArray[np.int64]

CPU_TIME = Rule("a CPU's events are printed in the order of time", "Linux 6.1 ring_buffer.c", "history")
TIME = Rule("events are printed in the order of time", "Linux 6.1 trace.c, __find_next_entry", "order")
TWICE = Rule("a task prints each event once", "Linux 6.1 trace_events.c: one record an event", "order")
RING = Rule("a dirty ring's pushes count up one by one", "Linux 6.1 dirty_ring.c, kvm_dirty_ring_push", "history")
MARKED = Rule("an MMIO spte is found as it was marked", "Linux 6.1 mmu.c, mark_mmio_spte", "layout, history")
BACKWARDS = Rule("the memslot generation never goes back", "Linux 6.1 kvm_main.c, kvm_swap_active_memslots", "history")

_AHEAD = 16  # events that stay behind a step back in time make it the start of another recording
_FAR = 10 * 10**9  # ns: no event stands so far out of place
_ZAPS = 16
_CPUS = 1 << 14
_KEPT = 1 << 16  # MMIO marks that are remembered
_SAID = np.dtype([("era", np.int64), ("key", np.uint64), ("line", np.int64), ("kind", np.int8), ("word", np.uint64)])
_TICK = np.dtype([("line", np.int64), ("ns", np.int64), ("cpu", np.int32)])


def conform(source: trace.Source, layout: str | None = None) -> dict[str, Any]:
    """Hold a trace against the rules.

    Args:
        source: a path, or the text as bytes; it is read twice, so not an open file.
        layout: the sptes' layout; inferred where it is not given.

    Returns:
        ``findings``, a list of ``lines``, ``rule``, ``source``, ``what``; ``not_applied``, a list of ``rule`` and
        ``reason``; ``agree`` of ``of`` events are legal; ``layout`` and ``layout_reason``; ``unreadable``;
        ``complete``, False where Ctrl-C ended it early; ``damage``, what is wrong with the file itself, or None.

    Raises:
        OSError: the source cannot be read. ValueError: no such layout.
    """
    signs: Counter[str] = Counter()
    if layout is not None:
        spte.layout_named(layout)
    try:
        for piece in _pieces(source):
            signs.update(infer.signs_of(piece))
    except KeyboardInterrupt:
        return {**judge([], signs, layout), "complete": False}
    return judge(_pieces(source), signs, layout)


def _pieces(source: trace.Source) -> Iterator[trace.Trace]:
    if not isinstance(source, str | os.PathLike) or source == "-":
        yield from trace.chunks(source)
        return
    file, bar = progress.opened(source)
    with file:
        yield from trace.chunks(bar)


def judge(pieces: Iterable[trace.Trace], signs: Counter[str], layout: str | None) -> dict[str, Any]:
    """The same, with the signs already counted; see :func:`conform`."""
    inferred, reason = infer.infer_layout(signs)
    judged = Conformance(layout or inferred, signs)
    unreadable, damage, complete = [], None, True
    try:
        for piece in pieces:
            judged.add(piece)
            unreadable += [line._asdict() for line in piece.unreadable]
            if not piece.complete:
                damage = f"line {piece.unreadable[-1].line}: {piece.unreadable[-1].reason}"
    except KeyboardInterrupt:
        complete = False
    return {
        **judged.finish(),
        "layout": layout or inferred,
        "layout_reason": "given" if layout else reason,
        "unreadable": unreadable,
        "damage": damage,
        "complete": complete,
    }


class Conformance:
    """Judges a trace piece by piece; :meth:`add` each, then :meth:`finish`."""

    def __init__(self, layout: str | None, signs: Counter[str]) -> None:
        self.ledger = Ledger()
        self.form = None if layout is None else spte.layout_named(layout)
        mmu = infer.infer_mmu(signs)
        self.ept = mmu == "ept" or (mmu is None and self.form is not None and self.form.ept)
        self.unknown = mmu is None and self.form is None
        self.old_flags = infer.old_flags(signs)
        self.names = histories.Names()
        # The series of 2012 had no event for its fast path, and its sptes tell less.
        self.old = self.form is not None and "MMU_W" not in self.form.bits
        self.chains = None
        if self.form is not None and not self.old:
            self.chains = chains.Chains(self.ledger, self.form, self.names, fast_printed=signs["fast"] > 0)
        self.order = order.Order(
            self.ledger, None if self.old else self.form, ept=self.ept, seen=infer.events_of(signs),
            inner=signs["inner returned"] > 0, reinjects=signs["reinjected"] > 0, more=(elements.judge, exits.judge),
        )  # fmt: skip
        if self.ept:
            for rule in elements.RULES:
                self.ledger.excused[rule] = "with EPT walks may be of a guest's own EPT, whose bits are others"
        self.symptoms = Symptoms(self.ledger, ept=self.ept)
        self.events = 0
        self.lost: list[NDArray[Any]] = [np.zeros(0, dtype=WINDOW)]
        self._eras = self._epochs = 0
        self._clock = np.zeros(0, dtype=_TICK)  # the last events
        self._cpus = np.zeros(0, dtype=_TICK)  # and that of each CPU
        self._zapping: list[tuple[int, int, int]] = []  # line, pid, epoch before
        self._rings: dict[int, tuple[int, int]] = {}
        self._generations: dict[int, tuple[int, int]] = {}
        self._marks = np.zeros(0, dtype=_SAID)
        if self.old:
            for rule in (*values.FAST_RULES, *chains.RULES, *order.LAYOUT_RULES):
                self.ledger.excused[rule] = "sptes of 2012 tell too little, and their fast path prints no event"
        if self.form is None:
            for rule in (*values.LAYOUT_RULES, *chains.RULES, *order.LAYOUT_RULES):
                self.ledger.excused[rule] = "the sptes' layout could not be inferred; --layout names it"

    def add(self, piece: trace.Trace) -> None:
        """Judge one piece."""
        self.events += sum(len(piece[name]) for name in piece)
        breaks = self._times(piece)
        breaks = np.sort(np.concatenate([breaks, self._losses(piece)]))
        if len(breaks):
            self._rings.clear()
            self._generations.clear()
        eras = self._eras
        self._eras += len(breaks)

        def era(lines: Lines) -> Lines:
            return eras + np.searchsorted(breaks, lines, side="right").astype(np.int64)

        values.judge(self.ledger, piece, self.form, ept=self.ept or self.unknown, old_flags=self.old_flags)
        self.order.add(order.steps(piece, era))
        rows = self.names.changes(piece)
        if self.chains is not None:
            self.chains.add(piece, rows, self._epoch(piece, rows, breaks))
        self.symptoms.add(piece, rows, era)
        self._twice(piece)
        self._ring(piece["kvm_dirty_ring_push"])
        self._generation(piece)
        self._marked(piece, era)

    def finish(self) -> dict[str, Any]:
        """What was found; see :meth:`mmu.ledger.Ledger.close`."""
        if self.chains is not None:
            self.chains.finish()
        self.symptoms.finish()
        return self.ledger.close(np.concatenate(self.lost), self.events)

    # Time ------------------------------------------------------------------------------------------------------------

    def _times(self, piece: trace.Trace) -> Lines:
        """Judge the order of TIMESTAMPs; returns the lines with which another recording begins."""
        parts = [self._clock]
        for name in piece:
            ticks = np.zeros(len(piece[name]), dtype=_TICK)
            for field in _TICK.names:
                ticks[field] = piece[name][field]
            parts.append(ticks[ticks["ns"] >= 0])
        ticks = np.concatenate(parts)
        old = len(self._clock)
        ticks = np.concatenate([ticks[:old], ticks[old:][np.argsort(ticks["line"][old:], kind="stable")]])
        n, ns = len(ticks), ticks["ns"]
        self._clock = ticks[-3:]
        back = np.flatnonzero(ns[1:] < ns[:-1]) + 1
        back = back[back >= old]
        ahead = np.minimum(back[:, None] + np.arange(_AHEAD, dtype=np.int64), n - 1)  # (step back, event)
        highest = ns[ahead].max(axis=1, initial=0)
        new = (highest < ns[back - 1]) & (ns[back] < ns[np.maximum(back - 2, 0)]) & (n - back >= 3)
        new |= ns[back - 1] - ns[back] > _FAR
        self._cpu_times(ticks[old:], ticks["line"][back[new]])
        # One event that stands too late or too early: after it, time goes on as before it.
        early = (ns[back] >= ns[np.maximum(back - 2, 0)]) & (back >= 2)
        blame = np.where(early, back - 1, back)[~new]
        other = np.where(early, back, back - 1)[~new]
        lines, words = ticks["line"], (lambda i: f"{ns[i] / 1e9:.6f} s")
        context = np.zeros(n, dtype=np.int64)
        context[blame] = lines[other]
        self.ledger.judge(TIME, max(n - old, 0), np.unique(blame), (context, lines), words)
        return lines[back[new]]

    def _cpu_times(self, ticks: NDArray[Any], restarts: Lines) -> None:
        """Judge each CPU's own order, and remember the last event of each."""
        fresh = np.concatenate([self._cpus[:0] if len(restarts) else self._cpus, ticks[ticks["cpu"] >= 0]])
        fresh = fresh[np.lexsort((fresh["line"], fresh["cpu"]))]
        if not len(fresh):
            return
        a, b = fresh[:-1], fresh[1:]
        own = a["cpu"] == b["cpu"]
        own &= np.searchsorted(restarts, a["line"], "right") == np.searchsorted(restarts, b["line"], "right")
        bad = np.flatnonzero(own & (b["ns"] < a["ns"]))
        self.ledger.judge(
            CPU_TIME, int(own.sum()), bad, (a["line"], b["line"]),
            lambda i: f"CPU {int(b['cpu'][i])}: {a['ns'][i] / 1e9:.6f} s, then {b['ns'][i] / 1e9:.6f} s",
        )  # fmt: skip
        newest = fresh[np.append(fresh["cpu"][1:] != fresh["cpu"][:-1], True)]
        self._cpus = newest[newest["line"] >= restarts.max(initial=0)][-_CPUS:]

    def _losses(self, piece: trace.Trace) -> Lines:
        """Where a CPU lost events; the time from its last event on is not known. Returns the lines of the losses."""
        lost = piece.lost
        if not len(lost):
            return np.zeros(0, dtype=np.int64)
        parts = [self._cpus]
        for name in piece:
            ticks = np.zeros(len(piece[name]), dtype=_TICK)
            for field in _TICK.names:
                ticks[field] = piece[name][field]
            parts.append(ticks[ticks["cpu"] >= 0])
        ticks = np.concatenate(parts)
        ticks = ticks[np.lexsort((ticks["line"], ticks["cpu"]))]
        windows = np.zeros(len(lost), dtype=WINDOW)
        windows["last"] = lost["line"]
        code = ticks["cpu"].astype(np.int64) << 40 | ticks["line"]
        place = np.searchsorted(code, lost["cpu"] << 40 | lost["line"]) - 1
        hit = (place >= 0) & (lost["cpu"] >= 0)
        hit &= ticks["cpu"][np.maximum(place, 0)] == lost["cpu"] if len(ticks) else False
        windows["first"][hit] = ticks["line"][place[hit]]
        self.lost.append(windows)
        return lost["line"].astype(np.int64)

    # Roots -----------------------------------------------------------------------------------------------------------

    def _epoch(self, piece: trace.Trace, rows: NDArray[Any], breaks: Lines) -> Lines:
        """Which changes are of one history: a loss, another recording, and each new root begin another.

        The tables of a root that was given up are still taken down, by who gave it up or by a worker of the kernel:
        these changes are of the history before.
        """
        pages, zaps = piece["kvm_mmu_get_page"], piece["kvm_mmu_zap_all_fast"]
        roots = pages["line"][(pages["level"] >= 4) & (pages["direct"] == 1) & (pages["created"] == 1)]
        bounds = np.sort(np.concatenate([breaks, roots, zaps["line"]]).astype(np.int64))
        epochs, self._epochs = self._epochs, self._epochs + len(bounds)

        def at(lines: Lines) -> Lines:
            return epochs + np.searchsorted(bounds, lines, side="right").astype(np.int64)

        epoch = at(rows["line"])
        if len(breaks):
            self._zapping.clear()
        for line, pid in zip(zaps["line"][-_ZAPS:].tolist(), zaps["pid"][-_ZAPS:].tolist(), strict=True):
            self._zapping.append((line, pid, int(at(np.array([line - 1], dtype=np.int64))[0])))
        if not self._zapping:
            return epoch
        removes = (rows["event"] == TDP) & self._gone(rows["new"]) & ~self._gone(rows["old"])
        removes |= (rows["event"] == TDP) & (rows["new"] != 0) & self._gone(rows["new"])
        changed = piece["kvm_tdp_mmu_spte_changed"]
        workers = np.isin(rows["line"], changed["line"][np.char.startswith(changed["comm"], b"kworker")])
        still = []
        for line, pid, before in self._zapping[-_ZAPS:]:
            others = [
                piece[name]["line"][piece[name]["pid"] == pid]
                for name in piece
                if name not in ("kvm_tdp_mmu_spte_changed", "kvm_mmu_prepare_zap_page", "kvm_mmu_zap_all_fast")
            ]
            lines = np.concatenate([np.zeros(0, dtype=np.int64), *others])
            end = int(lines[lines > line].min(initial=1 << 60))
            mine = removes & (rows["line"] > line) & (workers | ((rows["pid"] == pid) & (rows["line"] < end)))
            epoch[mine] = before
            if end == 1 << 60:
                still.append((line, pid, before))
        self._zapping = still
        return epoch

    def _gone(self, words: NDArray[np.uint64]) -> NDArray[np.bool_]:
        return np.isin(words & ~np.uint64(1 << 63), np.array([0, 0x5A0], dtype=np.uint64))

    def _twice(self, piece: trace.Trace) -> None:
        """An event that stands there twice, line after line, to the microsecond; an emulated REP may repeat itself."""
        for name in piece:
            events = piece[name]
            known = name in trace.FORMATS or name.endswith("_page_fault_ret")
            if not known or name == "tracing_mark_write":
                continue
            same = (np.diff(events["line"]) == 1) & (events["ns"][1:] >= 0) & (events["count"][1:] == 1)
            if name == "kvm_emulate_insn":  # a REP prefix may have it emulated again
                for prefix in (b"f2", b"f3"):
                    same &= np.char.find(events["insn"][1:], prefix, 0, 8) < 0
            next_ = np.flatnonzero(same) + 1
            equal = np.ones(len(next_), dtype=np.bool_)
            for field in events.dtype.names:
                if field != "line":
                    equal &= events[field][next_] == events[field][next_ - 1]
            lines = np.concatenate([np.zeros(1, dtype=np.int64), events["line"][:-1]])
            self.ledger.judge(TWICE, len(events), next_[equal], (lines, events["line"]), lambda i, n=name: n)

    # Counters --------------------------------------------------------------------------------------------------------

    def _ring(self, pushes: NDArray[Any]) -> None:
        for ring in np.unique(pushes["ring"]).tolist()[:1024]:
            mine = pushes[pushes["ring"] == ring]
            dirty, line = mine["dirty"].astype(np.int64), mine["line"]
            before, before_line = self._rings.get(ring, (int(dirty[0]) - 1, int(line[0])))
            previous = np.concatenate([np.array([before], dtype=np.int64), dirty[:-1]])
            lines = np.concatenate([np.array([before_line], dtype=np.int64), line[:-1]])
            bad = np.flatnonzero((previous + 1) & 0xFFFFFFFF != dirty)
            self.ledger.judge(
                RING, len(mine), bad, (lines, line),
                lambda i, p=previous, d=dirty: f"{int(p[i]):#x}, then {int(d[i]):#x}",
            )  # fmt: skip
            self._rings[ring] = int(dirty[-1]), int(line[-1])

    def _generation(self, piece: trace.Trace) -> None:
        """KVM's generation as marks and checks print it; an address space has the even ones, the other the odd."""
        parts = [
            np.stack([piece[name]["line"], piece[name][field].astype(np.int64)], axis=1)
            for name, field in (("mark_mmio_spte", "gen"), ("check_mmio_spte", "kvm_gen"))
        ]
        both = np.concatenate(parts)
        both = both[np.argsort(both[:, 0], kind="stable")]
        both = both[(both[:, 1] >= 0) & (both[:, 1] < 1 << 19)]
        for parity in (0, 1):
            mine = both[both[:, 1] & 1 == parity]
            if not len(mine):
                continue
            line, own = self._generations.get(parity, (int(mine[0, 0]), int(mine[0, 1])))
            lines = np.concatenate([np.array([line], dtype=np.int64), mine[:-1, 0]])
            before = np.concatenate([np.array([own], dtype=np.int64), mine[:-1, 1]])
            fell = before - mine[:, 1]
            bad = np.flatnonzero((fell > 0) & (fell < 1 << 18))  # it wraps at 2^19
            self.ledger.judge(
                BACKWARDS, len(mine), bad, (lines, mine[:, 0]),
                lambda i, b=before, m=mine: f"{int(b[i]):#x}, then {int(m[i, 1]):#x}",
            )  # fmt: skip
            self._generations[parity] = int(mine[-1, 0]), int(mine[-1, 1])

    # MMIO -------------------------------------------------------------------------------------------------

    def _marked(self, piece: trace.Trace, era: Any) -> None:
        """Checks of MMIO sptes against the marks of the same gfn: the last, or, of another root, the one before."""
        if self.form is None or "GEN_LOW" not in self.form.mmio:
            return
        marks, checks = piece["mark_mmio_spte"], piece["check_mmio_spte"]
        said = spte.mmio(checks["spte"], self.form)
        access = np.uint64(0 if self.form.ept else 6)  # EPT keeps none
        rows = np.zeros(len(marks) + len(checks), dtype=_SAID)
        for part, events, kind, gfn, gen, rights in (
            (rows[: len(marks)], marks, 0, marks["gfn"], marks["gen"], marks["access"]),
            (rows[len(marks) :], checks, 1, said["gfn"], said["generation"], said["access"]),
        ):
            part["era"], part["line"], part["kind"], part["key"] = era(events["line"]), events["line"], kind, gfn
            part["word"] = gen << np.uint64(3) | rights & access
        rows = np.concatenate([self._marks, rows[rows["word"] < np.uint64(1 << 32)]])
        rows = rows[np.lexsort((rows["line"], rows["key"], rows["era"]))]
        here, mark = np.arange(len(rows), dtype=np.int64), rows["kind"] == 0
        last = np.maximum.accumulate(np.where(mark, here, -1))
        before = np.maximum.accumulate(np.where(mark, np.concatenate([[-1], last[:-1]]), -1)) if len(rows) else last

        def mine(index: Lines) -> NDArray[np.bool_]:
            at = np.maximum(index, 0)
            return (index >= 0) & (rows["era"][at] == rows["era"]) & (rows["key"][at] == rows["key"])

        judged = ~mark & mine(last)
        fits = rows["word"][np.maximum(last, 0)] == rows["word"]
        fits |= mine(before) & (rows["word"][np.maximum(before, 0)] == rows["word"])
        self.ledger.judge(
            MARKED, int(judged.sum()), np.flatnonzero(judged & ~fits),
            (rows["line"][np.maximum(last, 0)], rows["line"]) if len(rows) else (rows["line"],),
            lambda i: f"gfn {int(rows['key'][i]):#x}: marked with {int(rows['word'][last[i]]):#x}, "
            f"found with {int(rows['word'][i]):#x} (generation and access)",
        )  # fmt: skip
        kept = rows[mark]
        self._marks = kept[np.sort(np.argsort(kept["line"], kind="stable")[-_KEPT:])]
