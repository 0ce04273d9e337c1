"""Reading a trace as a story: which path each fault took, an example of each, and what several threads did in turn.

The one idea: what one thread recorded between a fault and its next VM entry is how that fault was handled. Its events
alone tell the path, on any kernel that names them so, and a fault of which they do not tell is said to be just that.
Chapter 13.

>>> from mmu import trace
>>> lines = [b"kvm_page_fault: vcpu 0 rip 0x10df address 0x5000 error_code 0x7",
...          b"fast_page_fault: vcpu 0 gva 5000 error_code P|W|U sptep 0 old 0x5e65 new 5e67 spurious 0 fixed 1",
...          b"kvm_entry: vcpu 0, rip 0x10df"]
>>> recording = trace.read(b"\\n".join(lines))
>>> counted(recording)
{'fast': 1}

Order of the work: Linux 6.1 ``arch/x86/kvm/mmu/mmu.c``, ``kvm_mmu_page_fault`` and ``direct_page_fault`` (facts 2.6).
"""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmu import handling, histories, update
from mmu.scan import MISSING
from mmu.trace import Trace

PATHS = ("no repair seen", "slow", "MMIO", "handed back", "already allowed", "fast")
"""The paths that :func:`paths` tells apart; where a fault shows several, the one that stands latest here."""

NOTHING, SLOW, MMIO, GUEST, ALLOWED, FAST = range(len(PATHS))

# Not kvm_tdp_mmu_spte_changed: the host's taking a page away in the middle of a fault records it as well. Nor
# check_mmio_spte: where it finds the mark out of date, memory may have come to this address.
_SHOWS = {
    "kvm_mmu_set_spte": SLOW,
    "kvm_mmu_spte_requested": SLOW,
    "kvm_mmu_get_page": SLOW,
    "mark_mmio_spte": MMIO,
    "handle_mmio_page_fault": MMIO,
    "kvm_inj_exception": GUEST,
}
LANES = 3
_MANY = 14


def kernel_lines(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a trace as the kernel printed them, plain or gzipped.

    Raises:
        OSError: the file cannot be read.
    """
    packed = Path(path).read_bytes()
    text = gzip.decompress(packed) if packed.startswith(b"\x1f\x8b") else packed
    return text.decode("utf-8", "replace").split("\n")


def _threads(recording: Trace) -> tuple[NDArray[Any], NDArray[np.int32]]:
    """All events in the order of the file, and the thread of each: two arrays ``# (event,)``."""
    order = recording.order()
    lines = np.concatenate([np.zeros(0, dtype=np.int64)] + [recording[name]["line"] for name in recording])
    pids = np.concatenate([np.zeros(0, dtype=np.int32)] + [recording[name]["pid"] for name in recording])
    return order, pids[np.argsort(lines, kind="stable")]


def paths(recording: Trace) -> NDArray[np.int8]:
    """The path that each fault took, a position in :data:`PATHS`; int8 ``# (fault,)``.

    ``fast``: repaired without the mmu-lock. ``already allowed``: the entry permitted the access when it was looked at.
    ``handed back``: injected into the guest. ``MMIO``: no memory is there. ``slow``: an entry was made or changed.
    ``no repair seen``: none of these between the fault and the thread's next VM exit, entry or fault; a retry, or an
    event that was not enabled.
    """
    order, thread = _threads(recording)
    mine = np.argsort(thread, kind="stable")  # each thread's events together, in their order
    event = order["event"][mine]
    begins = event == b"kvm_page_fault"
    ends = np.isin(event, [b"kvm_entry", b"kvm_exit"]) | np.concatenate(
        [np.ones(min(1, len(mine)), dtype=np.bool_), thread[mine][1:] != thread[mine][:-1]]
    )
    start = np.maximum.accumulate(np.where(begins | ends, np.arange(len(mine), dtype=np.int64), 0))  # (event,)
    shown = np.zeros(len(mine), dtype=np.int8)
    for name, path in _SHOWS.items():
        shown[event == name.encode()] = path
    tried = recording["fast_page_fault"]
    outcome = np.where(tried["spurious"] == 1, ALLOWED, np.where(tried["fixed"] == 1, FAST, NOTHING))
    is_try = event == b"fast_page_fault"
    shown[is_try] = outcome[order["row"][mine][is_try]]
    best = np.zeros(len(mine), dtype=np.int8)
    np.maximum.at(best, start, shown)
    found = np.zeros(len(recording["kvm_page_fault"]), dtype=np.int8)
    found[order["row"][mine][begins]] = best[begins]
    return found


def counted(recording: Trace) -> dict[str, int]:
    """How many faults took each path that any took, in the order of :data:`PATHS`, lines with their multiplicity."""
    which = paths(recording)
    total = np.zeros(len(PATHS), dtype=np.int64)
    np.add.at(total, which, recording["kvm_page_fault"]["count"])
    return {PATHS[path]: n for path, n in enumerate(total.tolist()) if n}


def examples(recording: Trace) -> dict[str, list[handling.Step]]:
    """For each path the steps of the first fault that took it and whose VM exit and entry were recorded."""
    which = paths(recording)
    told: dict[str, list[handling.Step]] = {}
    for path in range(len(PATHS) - 1, -1, -1):
        for fault in np.flatnonzero(which == path)[:_MANY].tolist():
            try:
                told[PATHS[path]] = handling.steps(recording, fault)
            except ValueError:  # at the very begin or end of the recording
                continue
            break
    return told


def liveliest(recording: Trace, events: int = _MANY) -> int:
    """The line at which the stretch of ``events`` events begins in which threads take turns most often; 0: no events.

    Only stretches with a fault count, where there is one; of equal ones the first.
    """
    order, thread = _threads(recording)
    if not len(order):
        return 0
    turns = np.concatenate([np.zeros(1, dtype=np.int64), thread[1:] != thread[:-1]]).cumsum()  # (event,)
    faults = np.isin(order["event"], [b"kvm_page_fault", b"fast_page_fault"]).cumsum()
    last = np.minimum(np.arange(len(order), dtype=np.int64) + events - 1, len(order) - 1)
    score = (turns[last] - turns) * 2 + (faults[last] > faults)
    return int(order["line"][np.argmax(score)])


def lanes(
    recording: Trace, line: int, layout: str | None = None, events: int = _MANY
) -> tuple[list[tuple[int, str, str, str, str]], list[str]]:
    """What up to three threads did from a line on: the rows of :func:`mmu.figures.lanes`, and the lanes' names.

    Args:
        recording: the events of a trace.
        line: the number of the first line to look at.
        layout: of the sptes; None: changes are told as the numbers of the bits that differ.
        events: how many events to tell; those of a fourth thread and more are left out.

    Returns:
        rows (lane, text, kind, "", line number) in the order of the file; the first event of a thread under the
        mmu-lock is of the kind that begins a band, the first without it ends it.
    """
    order, thread = _threads(recording)
    begin = int(np.searchsorted(order["line"], line))
    seen = list(dict.fromkeys(thread[begin : begin + events].tolist()))[:LANES]
    rows: list[tuple[int, str, str, str, str]] = []
    held = [False] * LANES
    names = [_named(recording, pid) for pid in seen]
    for (at, name, row), pid in zip(
        order[begin : begin + events].tolist(), thread[begin : begin + events].tolist(), strict=True
    ):
        if pid not in seen:
            continue
        lane, event = seen.index(pid), name.decode()
        record = recording[event][row]
        text, kind = _told(event, record, layout)
        locked = bool(handling.under_lock(record["flags"]))
        if locked != held[lane] and kind == "step":
            kind = "takes the lock" if locked else "drops the lock"
            held[lane] = locked
        rows.append((lane, text, kind, "", str(at)))
    return rows, names


def _named(recording: Trace, pid: int) -> str:
    """What a thread is called: the vCPU that it runs, by any event of the recording that tells."""
    for event in ("kvm_page_fault", "kvm_entry", "kvm_exit"):
        own = recording[event][recording[event]["pid"] == pid]
        own = own[own["vcpu"] >= 0]
        if len(own) and pid >= 0:
            return f"vCPU {int(own['vcpu'][0])}"
    return f"thread {pid}" if pid >= 0 else "unknown thread"


def _told(event: str, record: Any, layout: str | None) -> tuple[str, str]:
    """A few words for one event, and what kind of step it is."""
    match event:
        case "kvm_exit":
            return f"VM exit: {record['reason'].decode()}", "step"
        case "kvm_entry":
            return "VM entry", "step"
        case "kvm_page_fault":
            return f"fault at {int(record['address']):#x}, code {int(record['error_code']):#x}", "step"
        case "fast_page_fault":
            old, new = int(record["old"]), int(record["new"])
            if record["spurious"] == 1:
                return f"{old:#x} allows it already", "step"
            if record["fixed"] == 1:
                return f"fast path: {_changed(old, new, layout)}", "cmpxchg that succeeded"
            return "fast path gives up", "step"
        case "kvm_tdp_mmu_spte_changed":
            old, new = int(record["old_spte"]), int(record["new_spte"])
            return f"gfn {int(record['gfn']):#x} level {int(record['level'])}: {_changed(old, new, layout)}", "step"
        case "kvm_mmu_set_spte":
            return f"gfn {int(record['gfn']):#x} is mapped: {int(record['spte']):#x}", "step"
        case "kvm_mmu_paging_element":
            return f"the guest's entry, level {int(record['level'])}: {int(record['pte']):#x}", "step"
        case "kvm_mmu_walker_error":
            return f"refused, code {int(record['pferr']):#x}", "step"
        case "kvm_inj_exception":
            return f"handed to the guest: {record['exception'].decode('utf-8', 'replace')}", "step"
        case "tracing_mark_write":
            return f"note: {record['text'].decode('utf-8', 'replace')[:40]}", "step"
    if event.endswith("_page_fault_ret"):
        return f"the handler returns {int(record['ret'])}", "step"
    return event.removeprefix("kvm_").replace("_", " "), "step"


def _changed(old: int, new: int, layout: str | None) -> str:
    if layout:
        return update.changed(old, new, layout)
    return f"bits {old ^ new:#x} change" if old != new else "nothing changes"


def first_change(recording: Trace) -> tuple[int, int, int] | None:
    """The line, old and new value of the first fast repair; where there is none, of the first change of a present spte.

    None: no event of the trace prints both values.
    """
    rows = histories.Names().changes(recording)
    known = (rows["old"] != np.uint64(MISSING)) & (rows["new"] != np.uint64(MISSING))
    known &= rows["old"] != rows["new"]
    repairs = known & (rows["event"] == histories.FAST)
    for those in (repairs, known & (rows["old"] != 0) & (rows["new"] != 0), known):
        if those.any():
            first = rows[np.argmax(those)]
            return int(first["line"]), int(first["old"]), int(first["new"])
    return None
