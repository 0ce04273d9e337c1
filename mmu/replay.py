"""A recorded run held against its prediction: faults, fast-path events, returns, injected #PFs, values, bitmaps.

The prediction comes from the scenario alone (:mod:`mmu.play`); the trace is only what it is compared with. Lists are
aligned per vCPU by longest common subsequence, so that one missing event costs one and not all that follow. Where
vCPUs raced, no order can be predicted: there every recorded event must be *explained* instead (:mod:`mmu.explain`).
Chapters 4 and 13.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmu import explain, scenario, trace
from mmu.host import PAGE
from mmu.kernel import FAST_FIXED, RET_FIXED, RET_INVALID, RET_NONE, RETURN_NUMBERS, RETURNS, SPURIOUS
from mmu.places import vcpu_of
from mmu.play import Prediction, predict
from mmu.scenario import Gmap, Memslot, Scenario
from mmu.spte import layout_named

KINDS = ("faults", "fast", "returns", "injected", "values", "bitmaps")


@dataclass
class Recorded:
    """The faults of a trace and what KVM said of each: columns ``# (fault,)``.

    ``fast`` is -1 where no fast_page_fault event was printed, else spurious | fixed << 1 | W of old << 2; ``row`` is
    its row among the fast_page_fault events; ``epoch`` how many dirty logs the client had fetched by then, as its
    markers say, of ``markers`` in all. ``returns`` are the probes' lines: (line, vcpu, fault, fast path's own,
    number), ``injected`` (line, vcpu, code, again).
    """

    line: NDArray[np.int64]
    vcpu: NDArray[np.int64]
    address: NDArray[np.uint64]
    code: NDArray[np.uint64]
    fast: NDArray[np.int64]
    row: NDArray[np.int64]
    epoch: NDArray[np.int64]
    markers: int
    returns: NDArray[np.int64]  # (return, 5)
    injected: NDArray[np.int64]  # (injection, 4)


def recorded(t: trace.Trace) -> Recorded:
    """Read the faults of a trace, each with the fast-path event and the returns that follow it on its task."""
    faults = t["kvm_page_fault"]
    key = faults["pid"].astype(np.int64) << 40 | faults["line"]
    order = np.argsort(key)

    def fault_of(events: NDArray[Any]) -> NDArray[np.int64]:
        """The last fault of the same task before each event; -1 where there is none."""
        if not len(faults):
            return np.full(len(events), -1, dtype=np.int64)
        at = np.searchsorted(key[order], events["pid"].astype(np.int64) << 40 | events["line"]) - 1
        found = order[np.maximum(at, 0)]
        return np.where((at >= 0) & (faults["pid"][found] == events["pid"]), found, np.int64(-1))

    vcpu = faults["vcpu"].astype(np.int64)
    fast, row = np.full(len(faults), -1, dtype=np.int64), np.full(len(faults), -1, dtype=np.int64)
    events = t["fast_page_fault"]
    whose = fault_of(events)
    said = (
        events["spurious"] | events["fixed"] << 1 | (events["old"] >> np.uint64(1) & np.uint64(1)).astype(np.int64) << 2
    )
    fast[whose[whose >= 0]], row[whose[whose >= 0]] = said[whose >= 0], np.flatnonzero(whose >= 0)
    parts = [np.zeros((0, 5), dtype=np.int64)]
    for name in t:
        if name.endswith("_page_fault_ret"):
            probe = t[name]
            whose = fault_of(probe)
            own = np.full(len(probe), name.startswith("fast_"), dtype=np.int64)
            part = np.stack([probe["line"], vcpu[whose], whose, own, probe["ret"]], axis=1)
            parts.append(part[whose >= 0].astype(np.int64))
    returns = np.concatenate(parts)
    marks = t["tracing_mark_write"]
    gets = marks["line"][np.char.startswith(marks["text"], b"DIRTY_GET_BEGIN")]
    shots = t["kvm_inj_exception"]
    shots = shots[shots["exception"] == b"#PF"]
    injected = np.stack(
        [shots["line"], vcpu_of(t, shots["pid"].astype(np.int64), shots["line"]), shots["error_code"].astype(np.int64),
         shots["reinjected"].astype(np.int64)], axis=1,
    )  # fmt: skip
    return Recorded(
        faults["line"].astype(np.int64), vcpu, faults["address"], faults["error_code"], fast, row,
        np.searchsorted(gets, faults["line"]), len(gets), returns[np.argsort(returns[:, 0], kind="stable")],
        injected.astype(np.int64),
    )  # fmt: skip


def check(source: trace.Source, scene: Scenario | dict[str, Any], layout: str | None = None) -> dict[str, Any]:
    """Compare a trace with what its scenario predicts.

    Args:
        source: the trace: a path, its bytes (plain or gzipped), or an open file.
        scene: the scenario, or its JSON object.
        layout: the spte layout; by default that of the recording's kernel.

    Returns:
        ``counts`` (a kind: agree, of), ``disagreements`` (line, kind, predicted, recorded, reason), ``findings``,
        ``unreadable``, ``layout``: the keys of the command line's JSON for one file.

    Raises:
        ValueError: the object is no scenario, or no such layout. OSError: the trace cannot be read.
    """
    scene = scenario.parse(json.dumps(scene)) if isinstance(scene, dict) else scene
    return compare(trace.read(source), scene, predict(scene), layout)


def compare(t: trace.Trace, scene: Scenario, said: Prediction, layout: str | None = None) -> dict[str, Any]:
    """The same for a trace already read and a prediction already made; see :func:`check`."""
    form = layout_named(layout or said.kernel.layout)
    seen = recorded(t)
    out = Comparison(said, seen, scene)
    if explain.races(scene):
        out.explain(explain.explain(t, scene, seen))
    else:
        out.events()
        out.items("bitmaps", said.bitmaps)
    out.items("values", said.values)
    return {
        "kind": "trace",
        "layout": form.name,
        "counts": {kind: out.counts[kind] for kind in KINDS},
        "disagreements": out.disagreements,
        "findings": [
            {"lines": [], "rule": f"unexplained: {what} is not modelled", "source": "the scenario"}
            for what in dict.fromkeys(said.unexplained)
        ],
        "unreadable": [{"line": bad.line, "reason": bad.reason} for bad in t.unreadable],
    }


class Comparison:
    """Counts agreement kind by kind, and keeps each disagreement."""

    def __init__(self, said: Prediction, seen: Recorded, scene: Scenario) -> None:
        self.said, self.seen = said, seen
        self.counts = {kind: {"agree": 0, "of": 0} for kind in KINDS}
        self.disagreements: list[dict[str, Any]] = []
        self.outside = Outside(scene, translated=not said.kernel.nested_paging)

    def note(self, kind: str, agree: int, of: int) -> None:
        """Count."""
        self.counts[kind]["agree"] += agree
        self.counts[kind]["of"] += of

    def differ(self, kind: str, line: int | None, predicted: Any, recorded: Any, reason: str) -> None:
        """Keep one disagreement."""
        self.disagreements.append(
            {"line": line, "kind": kind, "predicted": predicted, "recorded": recorded, "reason": reason}
        )

    def items(self, kind: str, items: list[Any]) -> None:
        """Values and bitmaps: one by one."""
        bad = [item for item in items if not item.agrees]
        self.note(kind, len(items) - len(bad), len(items))
        for item in bad:
            self.differ(kind, None, item.predicted, item.recorded, f"{item.where}: {item.kind} differs")

    def explain(self, verdicts: list[explain.Verdict]) -> None:
        """Racing runs: each recorded event is explained or not."""
        for kind in KINDS:
            mine = [verdict for verdict in verdicts if verdict.kind == kind]
            self.note(kind, sum(not verdict.reason for verdict in mine), len(mine))
        for verdict in verdicts:
            if verdict.reason:
                self.differ(verdict.kind, verdict.line, None, verdict.what, f"unexplained: {verdict.reason}")

    def events(self) -> None:
        """Faults, fast-path events, returns and injections, aligned per vCPU."""
        seen, said = self.seen, self.said.faults
        keep = self.outside(seen.address)
        mine = said[self.outside(said["address"])]
        numbers = RETURN_NUMBERS[self.said.kernel.release]
        fixed, spurious = mine["path"] == FAST_FIXED, mine["path"] == SPURIOUS
        w = (mine["old"] >> np.uint64(1) & np.uint64(1)).astype(np.int64)
        fast = np.where(mine["printed"], spurious | fixed.astype(np.int64) << 1 | w << 2, np.int64(-1))
        marked = np.uint64(seen.markers == len(self.said.bitmaps))
        epoch = self.said.epoch[self.outside(said["address"])].astype(np.uint64) * marked
        seen_epoch = seen.epoch.astype(np.uint64) * marked
        places = seen.returns[keep[seen.returns[:, 2]]]
        ret = np.array([numbers[name] for name in RETURNS], dtype=np.int64)[mine["ret"]]
        called = mine["ret"] != RET_NONE
        first = np.where(fixed, numbers[RETURNS[RET_FIXED]], numbers[RETURNS[RET_INVALID]])
        both = called & self.probed_twice()
        # On 6.12 the fast path is a function of its own: its return is recorded before the handler's.
        rank = np.concatenate([np.flatnonzero(both) * 2, np.flatnonzero(called) * 2 + 1])
        column = np.concatenate(
            [np.stack([mine["vcpu"][both], np.ones_like(ret[both]), first[both]], axis=1),
             np.stack([mine["vcpu"][called], np.zeros_like(ret[called]), ret[called]], axis=1)]
        )[np.argsort(rank, kind="stable")]  # fmt: skip
        for vcpu in np.unique(np.concatenate([mine["vcpu"], seen.vcpu[keep]])).tolist():
            a, b = mine["vcpu"] == vcpu, keep & (seen.vcpu == vcpu)
            lines = seen.line[b]
            # A fault on the other side of a dirty log is another fault.
            mine_here = np.stack([mine["address"][a], mine["code"][a], epoch[a]], axis=1)
            seen_here = np.stack([seen.address[b], seen.code[b], seen_epoch[b]], axis=1)
            self.align("faults", mine_here, seen_here, lines, _fault_text)
            self.align("fast", fast[a][:, None], seen.fast[b][:, None], lines, _fast_text)
            r = places[places[:, 1] == vcpu]
            self.align("returns", column[column[:, 0] == vcpu][:, 1:], r[:, 3:], r[:, 0], _return_text)
        shots = np.array(self.said.injected, dtype=np.int64).reshape(-1, 3)
        for vcpu in np.unique(np.concatenate([shots[:, 0], seen.injected[:, 1]])).tolist():
            r = seen.injected[seen.injected[:, 1] == vcpu]
            self.align("injected", shots[shots[:, 0] == vcpu][:, 1:], r[:, 2:], r[:, 0], _injection_text)

    def probed_twice(self) -> bool:
        """The fast path's own return is probed as well, and it is called: a direct MMU on 6.12."""
        paged = any(self.outside.formats)
        return self.said.kernel.release == "6.12" and (self.said.kernel.nested_paging or not paged)

    def align(
        self, kind: str, predicted: NDArray[Any], seen: NDArray[Any], lines: NDArray[np.int64], text: Any
    ) -> None:
        """Align two ordered lists; agree is the length of what they have in common."""
        a, b = _same_words(predicted, seen)
        left, right = common(a, b)
        self.note(kind, len(left), len(a) + len(b) - len(left))
        unmatched = np.ones(len(a), dtype=np.bool)
        unmatched[left] = False
        for row in np.flatnonzero(unmatched).tolist():
            self.differ(kind, None, text(predicted[row]), None, "predicted, not recorded")
        unmatched = np.ones(len(b), dtype=np.bool)
        unmatched[right] = False
        for row in np.flatnonzero(unmatched).tolist():
            self.differ(kind, int(lines[row]), None, text(seen[row]), "recorded, not predicted")


class Outside:
    """Which addresses lie outside slot 0, where the client's own code and data are.

    A shadow-paged guest's faults name virtual addresses: the client's own are those that it maps into slot 0.
    """

    def __init__(self, scene: Scenario, *, translated: bool) -> None:
        self.formats = [scenario.paging_format(scene) is not None]
        slot = next((m for m in scene.of(Memslot) if m.slot == 0), None)
        self.low, self.high = (slot.gpa // PAGE, (slot.gpa + slot.size) // PAGE) if slot else (0, 0)
        self.own: NDArray[np.int64] | None = None
        if translated and self.formats[0]:
            pages = [np.arange(g.pages, dtype=np.int64) + (g.gva // PAGE) for g in scene.of(Gmap) if self._inside(g)]
            self.own = np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *pages]))

    def _inside(self, gmap: Gmap) -> bool:
        return self.low <= gmap.gpa // PAGE < self.high

    def __call__(self, address: NDArray[np.uint64]) -> NDArray[np.bool]:
        page = (address >> np.uint64(12)).astype(np.int64)
        return (page < self.low) | (page >= self.high) if self.own is None else ~np.isin(page, self.own)


def _same_words(a: NDArray[Any], b: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Number the rows of two lists so that equal rows have equal numbers."""
    rows = np.concatenate([a.astype(np.uint64), b.astype(np.uint64)])
    _, number = np.unique(rows, axis=0, return_inverse=True)
    number = number.ravel().astype(np.int64)
    return number[: len(a)], number[len(a) :]


def common(a: NDArray[np.int64], b: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A longest common subsequence of two sequences: the positions of its elements in each.

    What both begin and end with is matched at once. For the rest, one integer holds a whole row of the usual table, a
    bit for each element of ``a`` (the bit-parallel algorithm of Hyyro, 2004), so a row costs a few machine words.

    >>> [positions.tolist() for positions in common(np.array([1, 2, 3, 4]), np.array([1, 3, 2, 4]))]
    [[0, 1, 3], [0, 2, 3]]
    """
    shorter = min(len(a), len(b))
    differs = np.flatnonzero(a[:shorter] != b[:shorter])
    head = int(differs[0]) if differs.size else shorter
    differs = np.flatnonzero(a[::-1][: shorter - head] != b[::-1][: shorter - head])
    tail = int(differs[0]) if differs.size else shorter - head
    x, y = a[head : len(a) - tail].tolist(), b[head : len(b) - tail].tolist()
    where: dict[int, int] = {}
    for place, value in enumerate(x):
        where[value] = where.get(value, 0) | 1 << place
    full = (1 << len(x)) - 1
    rows = [full]
    for value in y:
        found = rows[-1] & where.get(value, 0)
        rows.append(((rows[-1] + found) | (rows[-1] - found)) & full)
    i, j, left, right = len(x), len(y), [], []
    while i and j:
        if x[i - 1] == y[j - 1]:
            i, j = i - 1, j - 1
            left.append(head + i)
            right.append(head + j)
        elif rows[j] >> (i - 1) & 1:
            i -= 1
        else:
            j -= 1
    begin, end = np.arange(head, dtype=np.int64), np.arange(tail, dtype=np.int64)
    middle = (np.array(part[::-1], dtype=np.int64) for part in (left, right))
    return tuple(
        np.concatenate([begin, part, end + len(whole) - tail]) for part, whole in zip(middle, (a, b), strict=True)
    )


def _fault_text(row: NDArray[np.uint64]) -> str:
    return f"address {int(row[0]):#x} code {int(row[1]):#x}"


def _fast_text(row: NDArray[np.int64]) -> str:
    word = int(row[0])
    return "none printed" if word < 0 else f"spurious {word & 1} fixed {word >> 1 & 1}, W of old {word >> 2}"


def _return_text(row: NDArray[np.int64]) -> str:
    return f"{'fast_page_fault' if row[0] else 'the handler'} returned {int(row[1])}"


def _injection_text(row: NDArray[np.int64]) -> str:
    return f"#PF {int(row[0]):#x}{' again' if row[1] else ''}"
