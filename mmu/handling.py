"""What KVM does about one fault, step by step: the events it recorded, what lies between them, and who holds the lock.

The one idea: a fault's story is the slice of its thread's events from the VM exit to the next VM entry. What each event
means, which part of the handling it belongs to and whether it was recorded under the mmu-lock is read off the events;
what is done without an event is put between them, marked as such. Chapter 1.

Order of the work: Linux 6.1 ``arch/x86/kvm/mmu/mmu.c``, ``direct_page_fault`` (facts 2.6). That the flags column shows
the lock is inferred (:func:`under_lock`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmu import pfec
from mmu.trace import Trace

OUT, PATH, PREPARE, MAP, REPAIR, BACK = (
    "out of the guest",
    "choose a path",
    "slow path, prepare",
    "slow path, map",
    "fast path",
    "back to the guest",
)
"""The parts of the handling, in their order."""

RETURNED = {1: "RETRY", 2: "EMULATE", 3: "INVALID", 4: "FIXED", 5: "SPURIOUS"}
"""What the numbers that Linux 6.1's fault handler returns are called."""


def under_lock(flags: ArrayLike) -> NDArray[np.bool_]:
    """Whether each event was recorded under the mmu-lock, by its flags column; bytes of any shape to bool.

    The column's characters are irqs-off, need-resched, hardirq, preempt-depth and more. A spinlock or a read-write
    lock that is held counts in the preempt-depth of a kernel that keeps that count; an event recorded with interrupts
    off stands near the guest's entry or exit and is not counted (inferred: it holds in every recording that the book
    was tested with; the kernel promises nothing of the kind). False where a line has no flags.

    >>> under_lock([b"...1.", b".....", b"d..1.", b".N.2.", b"d....", b""]).tolist()
    [True, False, False, True, False, False]
    """
    column = np.asarray(flags, dtype="S8")
    letters = np.ascontiguousarray(column)[..., None].view("S1")  # (..., character)
    irqs, depth = letters[..., 0], letters[..., 3]
    return (irqs == b".") & (depth != b".") & (depth != b"")


class Step(NamedTuple):
    """One step of a fault's handling.

    ``event`` is the kernel's name for it, ``line`` its number in the trace, from 1, and ``flags`` that column as
    printed; empty and 0 where nothing was recorded. ``label`` is a few words, ``said`` a sentence, ``part`` one of the
    parts of the handling; ``locked`` says that it happened under the mmu-lock.
    """

    event: str
    line: int
    flags: str
    label: str
    part: str
    said: str
    locked: bool


def steps(recording: Trace, fault: int) -> list[Step]:
    """How one fault was handled, from the guest's access to its repetition.

    Args:
        recording: the events of a trace; nested paging, Linux 6.1 (other events are named, not explained).
        fault: which of its ``kvm_page_fault`` events.

    Raises:
        IndexError: the recording has no such fault.
        ValueError: the VM exit before it or the VM entry after it was not recorded.
    """
    faults = recording["kvm_page_fault"]
    if not 0 <= fault < len(faults):
        raise IndexError(f"fault {fault} of a recording with {len(faults)}; expected 0 to {len(faults) - 1}")
    which = faults[fault]
    order = recording.order()
    thread = np.concatenate([recording[name]["pid"] for name in recording])
    lines = np.concatenate([recording[name]["line"] for name in recording])
    same = np.isin(order["line"], lines[thread == which["pid"]])
    order = order[same]
    at = int(np.searchsorted(order["line"], which["line"]))
    exits = np.flatnonzero(order["event"][:at] == b"kvm_exit")
    entries = np.flatnonzero(order["event"][at:] == b"kvm_entry")
    if not len(exits) or not len(entries):
        raise ValueError(f"fault {fault}, line {which['line']}: its VM exit or its VM entry was not recorded")
    rows = order[exits[-1] : at + entries[0] + 1]
    records = [(name.decode(), recording[name.decode()][row]) for _, name, row in rows.tolist()]
    code = int(which["error_code"])
    if records[0][1]["reason"] == b"EPT_VIOLATION":
        code = int(pfec.from_ept(code))
    locked = under_lock(np.array([record["flags"] for _, record in records], dtype="S8")).tolist()
    told: list[Step] = [_between("the guest is stopped", OUT, f"The guest makes {_access(code)}, and its CPU refuses.")]
    for i, ((event, record), lock) in enumerate(zip(records, locked, strict=True)):
        if lock and not locked[i - 1]:
            told += _PREPARED
        if not lock and i and locked[i - 1]:
            told.append(_between("drops the mmu-lock", MAP, "The entry is in place. The mmu-lock is dropped."))
        label, part, said = _explained(event, record, code)
        told.append(Step(event, int(record["line"]), record["flags"].decode(), label, part, said, lock))
        if event == "kvm_page_fault":
            told.append(_chosen(code))
    told.append(
        _between("the guest tries again", BACK, "The guest repeats the same instruction, as if for the first time.")
    )
    return told


def _between(label: str, part: str, said: str, locked: bool = False) -> Step:
    return Step("", 0, "", label, part, said, locked)


_PREPARED = [
    _between(
        "looks up the host’s page",
        PREPARE,
        "Spare pages for new tables are put aside, and the host is asked which of its pages stands behind the gfn. "
        "It may have to find one first.",
    ),
    _between(
        "takes the mmu-lock",
        MAP,
        "The mmu-lock is taken, and if the host has changed its mind about the page meanwhile, all of it starts over.",
        locked=True,
    ),
]


def _access(code: int) -> str:
    return "a store" if pfec.PFEC.field(code, "W") else "a fetch" if pfec.PFEC.field(code, "F") else "a load"


def _chosen(code: int) -> Step:
    low = pfec.handled(code)
    if pfec.can_be_fast(low):
        said = "P and W are set: worth a try. KVM walks its table down to the entry, without the mmu-lock."
        return _between("walks to the entry", REPAIR, said)
    why = "P is clear: something has to be built" if not pfec.PFEC.field(low, "P") else "this is not a refused write"
    return _between("not for the fast path", PATH, f"{why}. The fast path is not tried, and leaves no event.")


def _explained(event: str, record: Any, code: int) -> tuple[str, str, str]:
    """Label, part and sentence of one event."""
    match event:
        case "kvm_exit":
            reason = record["reason"].decode()
            why = {"npf": "a nested page fault", "EPT_VIOLATION": "an EPT violation"}.get(reason, "its reason is given")
            return "VM exit", OUT, f"The CPU leaves the guest: {reason}, {why}. KVM is in charge now."
        case "kvm_page_fault":
            address = int(record["address"])
            said = f"KVM reads what the CPU left: the address, {address:#x}, and the error code. {pfec.describe(code)}."
            return "address and code", OUT, said.replace(". a", ". A")
        case "fast_page_fault":
            old, new = int(record["old"]), int(record["new"])
            if record["fixed"]:
                bits = [str(bit) for bit in range(64) if (old ^ new) >> bit & 1]
                done = f"{old:#x} becomes {new:#x}: {len(bits)} bit differs, bit {', '.join(bits)}"
                return "one cmpxchg", REPAIR, f"One atomic instruction, and the entry is repaired. {done}."
            if record["spurious"]:
                return "nothing to do", REPAIR, f"The entry, {old:#x}, allows the access already."
            return "gives up", REPAIR, f"The entry, {old:#x}, is not one to repair here. The slow path takes over."
        case "kvm_mmu_spte_requested":
            size = {1: "4 KiB", 2: "2 MiB", 3: "1 GiB"}.get(int(record["level"]), "huge")
            return (
                "what is to be mapped",
                MAP,
                f"The gfn {int(record['gfn']):#x} is to map the host’s page frame {int(record['pfn']):#x}, "
                f"as a page of {size}.",
            )
        case "kvm_mmu_get_page":
            level = int(record["level"])
            return "a new table", MAP, f"On the way down a table of level {level} is missing: a page is made into one."
        case "kvm_tdp_mmu_spte_changed":
            level, new = int(record["level"]), int(record["new_spte"])
            what = "maps the page" if level == 1 else "points to the table below"
            said = f"The entry at level {level}, {int(record['old_spte']):#x} so far, becomes {new:#x}: it {what}."
            return f"writes level {level}", MAP, said
        case "kvm_mmu_set_spte":
            rights = [word for word in ("r", "w", "x") if record[word]]
            names = {"r": "read", "w": "written", "x": "executed"}
            said = f"Noted for the record: the page may be {', '.join(names[right] for right in rights)}."
            return "notes the rights", MAP, said
        case "kvm_entry":
            return (
                "VM entry",
                BACK,
                f"Interrupts are off, and the CPU goes back to the guest at {int(record['rip']):#x}.",
            )
    if event.endswith("_page_fault_ret"):
        value = int(record["ret"])
        name = RETURNED.get(value, "unknown")
        return "the handler returns", BACK, f"The fault handler returns {value}: {name}, as Linux 6.1 calls it."
    return event, MAP, "Another event of this fault, which this chapter does not explain."


def rounds(recording: Trace, event: str = "fast_page_fault") -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Events in each round of the dirty log, and the dirty pages reported at its end: two int64 arrays ``# (round,)``.

    A round ends where the client has read the log, which it marked with ``DIRTY_GET_END slot=S seq=Q n=PAGES``; it
    begins where the round before ended, the first at the recording's begin. Recordings of one logged slot.

    >>> from mmu import trace
    >>> lines = [b"fast_page_fault: vcpu 0 gva 1000 error_code P|W sptep 0 old 0x5 new 7 spurious 0 fixed 1"] * 3
    >>> mark = b"c-1 [000] ..... 1.0: tracing_mark_write: DIRTY_GET_END slot=1 seq=0 n=2"
    >>> rounds(trace.read(b"\\n".join([*lines[:2], mark, lines[2]])))
    (array([2]), array([2]))
    """
    marks = recording["tracing_mark_write"]
    ends = marks[np.char.startswith(marks["text"], b"DIRTY_GET_END")]
    reported = np.array([int(text.rpartition(b"n=")[2]) for text in ends["text"].tolist()], dtype=np.int64)
    happened = recording[event]["line"]
    before = np.searchsorted(happened, ends["line"]).astype(np.int64)  # (round,)
    return np.diff(before, prepend=np.int64(0)), reported
