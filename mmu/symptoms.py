"""Bugs that break no rule of any one event: storms of spurious faults, refault loops, churn and death by CR0.WP.

The one idea: a repaired fault lets the guest go on. So a vCPU that faults again and again at the same spte, or at the
same instruction and address, while nothing changes, has met a bug, each of its faults legal by itself. Chapter 13.

Sources: the reports that public traces come from (facts 7): spurious faults without end under nested EPT (9 September
2024), a 6.1 host whose every fault was stale (30 May 2023), and CR0.WP (Krause, 2023).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmu import pfec, trace
from mmu.histories import FAST, UNNAMED
from mmu.ledger import Ledger, Rule
from mmu.scan import MISSING

STORM = Rule(
    "no storm: a spurious fault is not repeated while nothing changes",
    "a fault drops the stale translation that caused it (from memory); storm of 9 September 2024, kvm list",
    "since",
)
LOOP = Rule(
    "no refault loop: a fault is not repeated at once at the same instruction and address while nothing changes",
    "Linux 6.1 mmu.c, is_page_fault_stale; loop of 30 May 2023, kvm list (mmu_invalidate_seq)",
    "since",
)
STUCK = Rule(
    "no refault loop: some vCPU gets beyond the instruction at which it faults",
    "Linux 6.1 mmu.c, is_page_fault_stale; loop of 30 May 2023, kvm list (mmu_invalidate_seq)",
)
CHURN = Rule(
    "no churn: CR0.WP is not toggled all the time",
    "each toggle made KVM load a new MMU context, 46,754 cycles before the series of Krause, 2023",
)
REFUSED = Rule(
    "no stale CR0.WP: a supervisor's write that only CR0.WP refuses does not kill the guest",
    "Krause, 2023: KVM judged by a CR0.WP that the guest had cleared; Linux 6.1 mmu.h, permission_fault",
    "since",
)

TIMES = 4  # so often is too often: two faults in a row have lawful causes (copy-on-write, a stale translation)
CLOSE = 100_000  # ns
TOGGLES = 16
WP = np.uint64(1 << 16)
_NO = np.uint64(MISSING)
_MOST = 1 << 12

_RUN = np.dtype(
    [
        ("who", np.int64),  # vCPU, and above it the era
        ("key", np.uint64),
        ("since", np.int64),  # line of the change before
        ("count", np.int64),
        ("first", np.int64),
        ("last", np.int64),
    ]
)
_FAULT = np.dtype(
    [
        ("who", np.int64),
        ("pid", np.int32),
        ("line", np.int64),
        ("ns", np.int64),
        ("count", np.int64),
        ("rip", np.uint64),
        ("page", np.uint64),
        ("code", np.uint64),
        ("run", np.int64),  # identical faults in a row, this one counted
        ("first", np.int64),
    ]
)

_FATE = np.dtype([("who", np.int64), ("line", np.int64), ("kind", np.int8)])


class Symptoms:
    """Watches for each; :meth:`add` pieces, then :meth:`finish`."""

    def __init__(self, ledger: Ledger, *, ept: bool) -> None:
        self.ledger, self.ept = ledger, ept
        self._changed = np.zeros(0, dtype=[("key", np.uint64), ("line", np.int64)])  # the last change of each spte
        self._storms = np.zeros(0, dtype=_RUN)
        self._faults = np.zeros(0, dtype=_FAULT)  # the last of each vCPU
        self._loops = np.zeros(0, dtype=_RUN)
        self._acts = np.zeros(0, dtype=np.int64)
        self._steps = 0  # exits beyond the instruction of entry
        self._stays: dict[int, list[int]] = {}  # vCPU: lines of exits for a fault at the instruction of entry
        self._entered = np.zeros(0, dtype=[("who", np.int64), ("rip", np.uint64), ("line", np.int64)])
        self._toggles: dict[int, list[int]] = {}  # task: WP, toggles, first and last line
        self._fate = np.zeros(0, dtype=_FATE)  # each task's last two steps towards a triple fault

    def add(self, piece: trace.Trace, rows: NDArray[Any], era: Any) -> None:
        """Watch one piece; ``rows`` are its changes, ``era`` tells which lines belong together."""
        self._storm(rows, era)
        self._loop(piece, rows, era)
        self._progress(piece, era)
        self._churn(piece, era)
        self._refused(piece, era)

    # Spurious storms -------------------------------------------------------------------------------------------------

    def _storm(self, rows: NDArray[Any], era: Any) -> None:
        rows = rows[(rows["key"] != UNNAMED) & ~rows["restated"]]
        if not len(rows):
            return
        rows = rows[np.lexsort((rows["line"], rows["key"]))]
        fast = rows["event"] == FAST
        acts = ~fast | (rows["fixed"] & 2 != 0) & (rows["fixed"] & 1 == 0)
        begins = np.concatenate([[True], rows["key"][1:] != rows["key"][:-1]])
        here = np.arange(len(rows), dtype=np.int64)
        last = np.maximum.accumulate(np.where(acts, here, np.int64(-1)))
        start = np.maximum.accumulate(np.where(begins, here, 0))
        since = np.where(last >= start, rows["line"][np.maximum(last, 0)], self._change_of(rows["key"]))
        spurious = fast & (rows["fixed"] & 1 != 0)
        if spurious.any():
            runs = np.zeros(int(spurious.sum()), dtype=_RUN)
            runs["who"] = rows["vcpu"][spurious].astype(np.int64) | era(rows["line"][spurious]) << 32
            for name in ("key", "count"):
                runs[name] = rows[name][spurious]
            runs["since"], runs["first"], runs["last"] = since[spurious], rows["line"][spurious], rows["line"][spurious]
            self._storms = _merged(np.concatenate([self._storms, runs]))
        ends = np.flatnonzero(np.concatenate([begins[1:], [True]]))
        moved = np.zeros(len(ends), dtype=self._changed.dtype)
        moved["key"], moved["line"] = (
            rows["key"][ends],
            np.where(last[ends] >= start[ends], rows["line"][last[ends]], 0),
        )
        both = np.concatenate([self._changed, moved[moved["line"] > 0]])
        both = both[np.lexsort((both["line"], both["key"]))]
        both = both[np.append(both["key"][1:] != both["key"][:-1], np.ones(min(len(both), 1), dtype=np.bool_))]
        if len(both) > 1 << 20:
            both = both[np.sort(np.argsort(both["line"], kind="stable")[len(both) - (1 << 19) :])]
        self._changed = both

    def _change_of(self, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
        if not len(self._changed):
            return np.zeros(len(keys), dtype=np.int64)
        place = np.minimum(np.searchsorted(self._changed["key"], keys), len(self._changed) - 1)
        return np.where(self._changed["key"][place] == keys, self._changed["line"][place], np.int64(0))

    # Refault loops ---------------------------------------------------------------------------------------------------

    def _loop(self, piece: trace.Trace, rows: NDArray[Any], era: Any) -> None:
        """Runs of identical faults of one vCPU, close in time, with no change of that page and no emulation between."""
        events = piece["kvm_page_fault"]
        events = events[events["vcpu"] >= 0]
        emulated = [piece[name]["line"] for name in ("kvm_emulate_insn", "kvm_mmio", "kvm_fast_mmio")]
        emulators = [piece[name]["pid"] for name in ("kvm_emulate_insn", "kvm_mmio", "kvm_fast_mmio")]
        faults = np.zeros(len(events), dtype=_FAULT)
        for name in ("pid", "line", "ns", "count", "rip"):
            faults[name] = events[name]
        faults["who"] = events["vcpu"] | era(events["line"]) << 32
        faults["page"], faults["code"] = events["address"] >> np.uint64(12), events["error_code"]
        fresh = len(faults)
        faults = np.concatenate([self._faults, faults])
        if not fresh:
            return
        faults = faults[np.lexsort((faults["line"], faults["who"]))]
        a, b = faults[:-1], faults[1:]
        same = (a["who"] == b["who"]) & (a["rip"] == b["rip"]) & (a["page"] == b["page"]) & (a["code"] == b["code"])
        same &= (b["ns"] < 0) | (a["ns"] < 0) | (b["ns"] - a["ns"] <= CLOSE)
        code = pfec.from_ept(b["code"]) if self.ept else b["code"]
        same &= code & np.uint64(8) == 0
        acts = rows[(rows["event"] != FAST) | (rows["fixed"] & 3 == 2)]
        same &= ~_between(acts["gfn"], acts["line"], b["page"], a["line"], b["line"])
        same &= ~_between(acts["pid"].astype(np.uint64), acts["line"], b["pid"].astype(np.uint64), a["line"], b["line"])
        pids, lines = np.concatenate(emulators).astype(np.uint64), np.concatenate(emulated)
        same &= ~_between(pids, lines, b["pid"].astype(np.uint64), a["line"], b["line"])
        begins = np.concatenate([[True], ~same])
        group = np.cumsum(begins) - 1
        first = np.flatnonzero(begins)
        carried = faults["run"][first]  # of a run that goes on from the piece before
        total = np.add.reduceat(np.where(faults["run"] > 0, 0, faults["count"]), first) + carried
        ends = np.append(first[1:], len(faults)) - 1
        started = np.where(carried > 0, faults["first"][first], faults["line"][first])
        runs = np.zeros(len(first), dtype=_RUN)
        runs["who"], runs["key"], runs["since"] = faults["who"][first], faults["page"][first], started
        runs["count"], runs["first"], runs["last"] = total, started, faults["line"][ends]
        done = runs[runs["count"] >= 2]
        self._loops = _merged(np.concatenate([self._loops, done]), np.maximum)
        newest = np.flatnonzero(np.append(faults["who"][1:] != faults["who"][:-1], True))
        kept = faults[newest].copy()
        kept["run"], kept["first"] = total[group[newest]], started[group[newest]]
        self._faults = kept[-_MOST:]

    # Does anyone get on? ---------------------------------------------------------------------------------------------

    def _progress(self, piece: trace.Trace, era: Any) -> None:
        """Pairs of an entry and the exit behind it: how many left the instruction at which they entered."""
        entries, exits = piece["kvm_entry"], piece["kvm_exit"]
        both = np.zeros(len(entries) + len(exits), dtype=[*self._entered.dtype.descr, ("exit", np.int8)])
        for part, events, kind in ((both[: len(entries)], entries, 0), (both[len(entries) :], exits, 1)):
            part["who"] = events["pid"].astype(np.int64) | era(events["line"]) << 32
            part["rip"], part["line"], part["exit"] = events["rip"], events["line"], kind
        faulted = np.isin(exits["reason"], (b"EPT_VIOLATION", b"npf", b"EXIT_NPF", b"PF excp"))
        both["exit"][len(entries) :] += faulted.astype(np.int8)
        kept = np.zeros(len(self._entered), dtype=both.dtype)
        for name in self._entered.dtype.names:
            kept[name] = self._entered[name]
        both = np.concatenate([kept, both])
        both = both[np.lexsort((both["line"], both["who"]))]
        if not len(both):
            return
        a, b = both[:-1], both[1:]
        pair = (
            (a["who"] == b["who"])
            & (a["exit"] == 0)
            & (b["exit"] > 0)
            & (b["rip"] != _NO)
            & (a["who"] & 0xFFFFFFFF > 0)
        )
        stays = pair & (a["rip"] == b["rip"]) & (b["exit"] == 2)
        self._steps += int(np.count_nonzero(pair & ~stays))
        if not self._steps:
            for who, line in zip(b["who"][stays][:64].tolist(), b["line"][stays][:64].tolist(), strict=True):
                self._stays.setdefault(who, []).append(line)
        newest = both[np.append(both["who"][1:] != both["who"][:-1], True)]
        self._entered = newest[newest["exit"] == 0][list(self._entered.dtype.names)][-_MOST:]

    # CR0.WP ----------------------------------------------------------------------------------------------------------

    def _churn(self, piece: trace.Trace, era: Any) -> None:
        writes = piece["kvm_cr"]
        writes = writes[(writes["write"] == 1) & (writes["cr"] == 0)]
        if not len(writes):
            return
        who = writes["pid"].astype(np.int64) | era(writes["line"]) << 32
        for task in np.unique(who).tolist():
            mine = writes[who == task]
            wp = (mine["value"] & WP != 0).astype(np.int64)
            old = self._toggles.get(task, [int(wp[0]), 0, int(mine["line"][0]), 0])
            toggles = int(np.count_nonzero(np.diff(np.concatenate([[old[0]], wp]))))
            self._toggles[task] = [int(wp[-1]), old[1] + toggles, old[2], int(mine["line"][-1])]

    def _refused(self, piece: trace.Trace, era: Any) -> None:
        """A walk for a supervisor's write, refused though all is present; the #PF for it; then a triple fault."""
        errors = piece["kvm_mmu_walker_error"]
        errors = errors[errors["pferr"] & np.uint64(0b111) == np.uint64(0b011)]
        shots = piece["kvm_inj_exception"]
        shots = shots[(shots["exception"] == b"#PF") & (shots["error_code"] & np.uint64(0b111) == np.uint64(0b011))]
        exits = piece["kvm_exit"]
        dead = np.isin(exits["reason"], (b"TRIPLE_FAULT", b"shutdown"))
        parts = [self._fate]
        for events, kind in ((errors, 0), (shots, 1), (exits[dead], 2), (exits[~dead], 3)):
            part = np.zeros(len(events), dtype=_FATE)
            part["who"] = events["pid"].astype(np.int64) | era(events["line"]) << 32
            part["line"], part["kind"] = events["line"], kind
            parts.append(part)
        steps = np.concatenate(parts)
        steps = steps[np.lexsort((steps["line"], steps["who"]))]
        a, b, c = steps[:-2], steps[1:-1], steps[2:]
        hit = (a["who"] == b["who"]) & (b["who"] == c["who"]) & (a["kind"] == 0) & (b["kind"] == 1) & (c["kind"] == 2)
        lines = tuple(part["line"] for part in (a, b, c))
        self.ledger.judge(
            REFUSED, len(errors), np.flatnonzero(hit), lines,
            lambda i: "refused with P|W, injected as #PF, then a triple fault",
        )  # fmt: skip
        newest = np.searchsorted(steps["who"], steps["who"], side="right") - np.arange(len(steps), dtype=np.int64)
        self._fate = steps[newest <= 2][-_MOST:]

    # The end ---------------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Enter what was seen."""
        storms = self._storms[self._storms["count"] >= TIMES]
        self._report(STORM, storms, len(self._storms), "spurious faults")
        loops = self._loops[self._loops["count"] >= TIMES]
        self._report(LOOP, loops, len(self._loops), "faults")
        stuck = [line for lines in self._stays.values() for line in lines]
        if not self._steps and len(self._stays) > 1 and (self._loops["count"] >= 2).any():
            lines = np.array([stuck[:8]], dtype=np.int64)
            what = f"{len(self._stays)} vCPUs fault again where they were let in, and none of the trace gets on"
            self.ledger.judge(STUCK, 1, np.zeros(1, dtype=np.int64), tuple(lines.T), lambda i: what)
        churn = [record for record in self._toggles.values() if record[1] >= TOGGLES]
        if self._toggles:
            first, last, times = (np.array([record[k] for record in churn], dtype=np.int64) for k in (2, 3, 1))
            bad = np.arange(len(churn), dtype=np.int64)
            self.ledger.judge(CHURN, len(self._toggles), bad, (first, last), lambda i: f"toggled {times[i]:,} times")

    def _report(self, rule: Rule, runs: NDArray[Any], of: int, what: str) -> None:
        def say(i: int) -> str:
            return f"{int(runs['count'][i]):,} {what} of vCPU {int(runs['who'][i]) & 0xFFFFFFFF}"

        self.ledger.judge(rule, of, np.arange(len(runs), dtype=np.int64), (runs["first"], runs["last"]), say)


def _merged(runs: NDArray[Any], join: Any = np.add) -> NDArray[Any]:
    """Runs of the same vCPU at the same place as one; the longest, where there are too many."""
    runs = runs[np.lexsort((runs["last"], runs["since"], runs["key"], runs["who"]))]
    if not len(runs):
        return runs
    same = np.ones(len(runs) - 1, dtype=np.bool_)
    for name in ("who", "key", "since"):
        same &= runs[name][1:] == runs[name][:-1]
    first = np.flatnonzero(np.concatenate([[True], ~same]))
    whole = runs[first].copy()
    whole["count"] = join.reduceat(runs["count"], first)
    whole["first"] = np.minimum.reduceat(runs["first"], first)
    whole["last"] = np.maximum.reduceat(runs["last"], first)
    if len(whole) > _MOST:
        whole = whole[np.sort(np.argsort(-whole["count"], kind="stable")[: _MOST // 2])]
    return whole


def _between(
    keys: NDArray[np.uint64],
    lines: NDArray[np.int64],
    key: NDArray[np.uint64],
    a: NDArray[np.int64],
    b: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """Whether some line of the same key lies between lines a and b."""
    _, where = np.unique(np.concatenate([keys, key]), return_inverse=True)
    number = where.astype(np.int64) << 40
    whole = np.sort(number[: len(keys)] | lines)
    low = np.searchsorted(whole, number[len(keys) :] | a, side="right")
    return low < np.searchsorted(whole, number[len(keys) :] | b, side="left")
