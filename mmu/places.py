"""How far each vCPU of a recorded scenario had come at each line of its trace (chapters 5 and 13).

A trace does not say which access of the scenario a line belongs to. Its exits do, in order: a page walk names the
address that it is for, INVLPG, CR3 and CR0 writes have exits of their own, and an access is over once its #PF is
injected or KVM has emulated it. Under nested paging CR3 and CR0 writes have none; there the nested fault of an
emulated access names the guest-physical address that this is for. :func:`follow` lays these marks along the accesses,
each at the first access that it can be for and no earlier than the mark before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmu import scenario
from mmu.paging import CODE_F, CODE_W
from mmu.scenario import Gmap, Scenario, Vcpu

Trace = Mapping[str, NDArray[Any]]  # event name to structured array, as mmu.trace.read gives it

# What a mark is: a page walk for a read, a write or a fetch; a control operation's exit; how the exit goes on; that an
# access at CPL 3 is over.
READS, WRITES, FETCHES, INVLPG, CR3, CR0, EMULATED, INJECTED, RESUMED, LEFT = range(10)
MARK = np.dtype([(name, np.int64) for name in ("line", "ns", "pid", "kind")] + [("address", np.uint64)])

CLOCK_GRAIN = 999  # ns: a trace prints microseconds
_SHOWN_BY = {
    scenario.READ: (READS,),
    scenario.WRITE: (WRITES,),
    scenario.RMW: (READS, WRITES),
    scenario.CALL: (FETCHES,),
    scenario.INVLPG: (INVLPG,),
    scenario.CR3: (CR3,),
    scenario.CR0: (CR0,),
}
PHYSICAL = np.uint64(1 << 63)  # in a mark's address: it is guest-physical
_EXITS = {INVLPG: [b"invlpg"], CR3: [b"write_cr3"], CR0: [b"write_cr0", b"cr0_sel_write"]}


@dataclass(frozen=True)
class Accesses:
    """One vCPU's accesses over all its runs, end to end; arrays ``# (access,)``."""

    vcpu: Vcpu
    first: NDArray[np.int64]  # (run + 1,): where each run's accesses begin; the last entry is their number
    ns: NDArray[np.int64]  # (run,): when each run began
    run: NDArray[np.int64]  # (run,): its place among all runs of the scenario
    op: NDArray[np.uint8]
    user: NDArray[np.bool]
    gva: NDArray[np.uint64]
    value: NDArray[np.uint64]

    def register(self, op: int, initial: int) -> NDArray[np.uint64]:
        """What the register that ``op`` loads holds when each access begins, and at the end  # (access + 1,)."""
        loader = np.append(-1, np.where(self.op == op, np.arange(self.op.size, dtype=np.int64), -1))
        return np.append(self.gva, np.uint64(initial))[np.maximum.accumulate(loader)]


def accesses(scene: Scenario) -> dict[int, Accesses]:
    """Each vCPU's accesses, its runs in the order of time."""
    kinds = {"op": np.uint8, "user": np.bool, "gva": np.uint64, "value": np.uint64}
    out = {}
    for vcpu in scene.of(Vcpu):
        mine = [place for place, run in enumerate(scene.runs) if run.vcpu == vcpu.vcpu]
        mine.sort(key=lambda place: scene.runs[place].ns)
        runs = [scene.runs[place] for place in mine]
        first = np.cumsum([0, *map(len, runs)], dtype=np.int64)
        ns = np.array([run.ns for run in runs], dtype=np.int64)
        columns = ([np.zeros(0, dtype=kind), *(getattr(run, name) for run in runs)] for name, kind in kinds.items())
        where = np.array(mine, dtype=np.int64)
        out[vcpu.vcpu] = Accesses(vcpu, first, ns, where, *map(np.concatenate, columns))
    return out


def vcpu_of(trace: Trace, pid: NDArray[np.int64], line: NDArray[np.int64]) -> NDArray[np.int64]:
    """The vCPU that a task was running at a line: that of its last line which names one; -1 where none does."""
    named = [trace[event][["pid", "line", "vcpu"]] for event in ("kvm_entry", "kvm_exit", "kvm_page_fault")]
    known = np.concatenate([part[part["vcpu"] >= 0] for part in named])
    known = np.append(known[np.lexsort((known["line"], known["pid"]))], np.array([(-1, -1, -1)], dtype=known.dtype))
    pids, lines = np.append(known["pid"][:-1], pid), np.append(known["line"][:-1], line)  # (known and asked,)
    order = np.lexsort((lines, pids))  # stable: a known line comes before an asked one of the same number
    latest = np.empty(order.size, dtype=np.int64)
    latest[order] = np.maximum.accumulate(np.where(order < known.size - 1, order, -1))
    found = known[latest[known.size - 1 :]]
    return np.where(found["pid"] == pid, found["vcpu"], -1).astype(np.int64)


@dataclass(frozen=True)
class Places:
    """One vCPU's way through its accesses, as the trace shows it."""

    accesses: Accesses
    walks: NDArray[np.int64]  # which of the walks asked for are this vCPU's  # (its walk,)
    place: NDArray[np.int64]  # the access that is under way, or next, at each of them  # (its walk,)
    after: NDArray[np.int64]  # the line after which each access took effect; 0: before any line  # (access,)


def marks(trace: Trace) -> NDArray[Any]:
    """The marks in a trace beside its walks: control exits, what came of them, and entries; a MARK array."""
    exits, entries, injections = trace["kvm_exit"], trace["kvm_entry"], trace["kvm_inj_exception"]
    injections = injections[(injections["exception"] == b"#PF") & (injections["reinjected"] == 0)]
    groups = [(exits[np.isin(exits["reason"], reasons)], kind) for kind, reasons in _EXITS.items()]
    groups += [(trace["kvm_emulate_insn"], EMULATED), (injections, INJECTED), (entries, RESUMED)]
    groups.append((departures(trace)[1], LEFT))
    return np.concatenate([_as_marks(*group) for group in groups])


def emulated_faults(trace: Trace) -> NDArray[Any]:
    """The nested page faults after which KVM emulated an instruction, as marks; a MARK array."""
    faults, emulations, entries = (trace[name] for name in ("kvm_page_fault", "kvm_emulate_insn", "kvm_entry"))
    kind = np.repeat(np.arange(3, dtype=np.int64), [len(faults), len(emulations), len(entries)])
    line, pid = (np.concatenate([part[name] for part in (faults, emulations, entries)]) for name in ("line", "pid"))
    order = np.lexsort((line, pid))
    first, then = order[:-1], order[1:]
    faults = faults[first[(kind[first] == 0) & (kind[then] == 1) & (pid[first] == pid[then])]]
    write, fetch = (faults["error_code"] & bit != 0 for bit in (CODE_W, CODE_F))
    return _as_marks(faults, np.where(fetch, FETCHES, np.where(write, WRITES, READS)), faults["address"] | PHYSICAL)


def departures(trace: Trace) -> tuple[NDArray[Any], NDArray[Any]]:
    """The exits within the delivery of a software interrupt, by which a guest leaves CPL 3, and the first of each run.

    The CPU begins the delivery anew after each, so those that follow with the same ``rip`` belong to the first.
    """
    exits = trace["kvm_exit"]
    exits = exits[exits["reason"] != b"interrupt"]
    exits = exits[np.lexsort((exits["line"], exits["pid"]))]
    soft = exits["intr_info"] & np.uint64(0x80000700) == np.uint64(0x80000400)
    same = (exits["rip"][1:] == exits["rip"][:-1]) & (exits["pid"][1:] == exits["pid"][:-1])
    again = np.append(False, soft[:-1] & same)
    return exits[soft], exits[soft & ~again]


def _within(trace: Trace, exits: NDArray[Any], marks: NDArray[Any]) -> NDArray[np.bool]:
    """Which marks lie between one of these exits and the task's next entry  # (mark,)."""
    every = exits, trace["kvm_entry"], marks
    opens, shuts, asked = (part["pid"].astype(np.int64) << 40 | part["line"] for part in every)
    begun, over = (np.append(-1, np.sort(keys))[np.searchsorted(np.sort(keys), asked)] for keys in (opens, shuts))
    return (begun > over) & (begun >> 40 == marks["pid"])


def _as_marks(events: NDArray[Any], kind: Any, address: Any = 0) -> NDArray[Any]:
    out = np.zeros(len(events), dtype=MARK)
    out["kind"], out["address"] = kind, address
    for name in ("line", "ns", "pid"):
        out[name] = events[name]
    return out


def follow(trace: Trace, scene: Scenario, walks: NDArray[Any]) -> list[Places]:
    """Lay ``walks`` (a MARK array) along their vCPUs' accesses: where each stands, when each access took effect.

    A walk for an address that no access is for (the guest's own code, its stack) stands at the access under way.
    """
    mapped = [event for event in scene.of(Gmap) if scene.nested_paging]
    walks = walks.copy()
    # Within the delivery KVM fetches the instruction that interrupts: no access at that address is under way.
    walks["address"][_within(trace, departures(trace)[0], walks)] |= PHYSICAL
    every = np.concatenate([walks, marks(trace), *[emulated_faults(trace)] * scene.nested_paging])
    order = np.argsort(every["line"], kind="stable")
    every, vcpu = every[order], vcpu_of(trace, every["pid"], every["line"])[order]
    out = []
    for number, steps in accesses(scene).items():
        mine = np.flatnonzero(vcpu == number)
        place = _lay(_Candidates(steps, every[mine], mapped), every[mine])
        last = np.searchsorted(place, np.arange(steps.op.size, dtype=np.int64), side="right")
        after = np.append(0, every["line"][mine])[last]
        asked = order[mine] < walks.size
        out.append(Places(steps, order[mine][asked], place[asked], after))
    return out


def _lay(candidates: _Candidates, seen: NDArray[Any]) -> NDArray[np.int64]:
    """The access under way at each of one vCPU's marks, never falling from mark to mark  # (mark,)."""
    steps = candidates.steps
    run = np.searchsorted(steps.ns, seen["ns"] + CLOCK_GRAIN, side="right")  # runs begun by then
    begin, end = steps.first[np.maximum(run - 1, 0)], steps.first[run]
    kind = seen["kind"]
    control = (kind >= INVLPG) & (kind <= CR0)
    entered = np.append(-1, _latest(kind == RESUMED)[:-1])  # the entry after which a mark's exit came
    walk, emulation = _latest(kind <= FETCHES), _latest(kind == EMULATED)
    place = begin
    while True:
        floor = np.maximum(begin, np.append(0, place[:-1]))
        found = candidates.at_or_after(floor)
        hit = (found < end) | (kind == LEFT) & (found == end)
        laid = np.where(hit, found, floor)
        over = np.where(kind == INJECTED, walk, _latest(hit))  # the mark whose access may be over here
        is_over = (kind == INJECTED) | ((kind == RESUMED) & (control[over] | (emulation > entered)))
        is_over &= (over > entered) & hit[over] & (kind[over] != LEFT)
        laid = np.maximum.accumulate(np.where(is_over, np.maximum(laid, laid[over] + 1), laid))
        if (laid <= place).all():
            return place
        place = np.maximum(place, laid)


def _latest(what: NDArray[np.bool]) -> NDArray[np.int64]:
    """The last mark up to and with each one of which ``what`` is true; -1: none yet  # (mark,)."""
    return np.maximum.accumulate(np.where(what, np.arange(what.size, dtype=np.int64), -1))


def _mapped_to(gva: NDArray[np.uint64], mapped: list[Gmap]) -> NDArray[np.uint64]:
    """Where the host's entries map virtual addresses; an address that none maps stands for itself."""
    out = gva.copy()
    for event in mapped:
        inside = (gva >= np.uint64(event.gva)) & (gva < np.uint64(event.gva + event.pages * scenario.PAGE))
        out[inside] = gva[inside] - np.uint64(event.gva) + np.uint64(event.gpa)
    return out


class _Candidates:
    """Which accesses a mark can be for: those at its address that show themselves by its kind.

    Where the host's entries map an access is where it is guest-physically, unless the guest has changed them.
    """

    def __init__(self, steps: Accesses, seen: NDArray[Any], mapped: list[Gmap]) -> None:
        self.steps = steps
        here = np.arange(steps.op.size, dtype=np.int64)
        of_op = [here[steps.op == op] for op, kinds in _SHOWN_BY.items() for _ in kinds]  # one array a pair
        every = np.array([kind for kinds in _SHOWN_BY.values() for kind in kinds], dtype=np.int64)
        kinds = np.repeat(every, [part.size for part in of_op])
        access = np.concatenate(of_op)
        address = np.where(kinds <= FETCHES, steps.gva[access], np.uint64(0))  # control exits do not tell theirs
        touches = np.flatnonzero(kinds <= FETCHES)
        physical = _mapped_to(address[touches], mapped) | PHYSICAL
        left = np.flatnonzero(steps.user)
        kinds = np.concatenate([kinds, kinds[touches], np.full(left.shape, LEFT, dtype=np.int64)])
        access = np.concatenate([access, access[touches], left + 1])  # what comes after the access at CPL 3
        address = np.concatenate([address, physical, np.zeros(left.shape, dtype=np.uint64)])
        _, ids = np.unique(np.append(address, seen["address"]), return_inverse=True)
        self.span = steps.op.size + 1
        keys = ids.astype(np.int64) * (LEFT + 1) + np.append(kinds, seen["kind"])
        self.sorted = np.append(np.sort(keys[: access.size] * self.span + access), np.iinfo(np.int64).max)
        self.wanted = keys[access.size :] * self.span  # (mark,)

    def at_or_after(self, floor: NDArray[np.int64]) -> NDArray[np.int64]:
        """The first access at or after ``floor`` that each mark can be for; past the last one if there is none."""
        found = self.sorted[np.searchsorted(self.sorted, self.wanted + floor)]
        return np.where(found - self.wanted < self.span, found - self.wanted, self.span)
