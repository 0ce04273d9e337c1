"""The exercises of chapter 4: who took W away, how many faults a round makes, and what a store to host memory costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mmu import causes, rounds
from mmu.exercise import Case, Exercise, Result, count
from mmu.host import PAGE, Backing
from mmu.kernel import INJECTED, Kernel
from mmu.play import predict
from mmu.scenario import WRITE, DirtyGet, Run, Scenario
from mmu.spte import layout_named
from mmu.trace import Trace
from mmu.vm import READ, VCPU, Guest, stream


def took_w(recordings: Sequence[tuple[Trace, Scenario]]) -> Exercise:
    """The cause of a fault; the answer takes six bools and gives a name of :data:`mmu.causes.CAUSES`.

    The bools are ``p`` (an entry stood there), ``host_w`` and ``mmu_w`` (its software bits), ``table`` (the page holds
    a guest page table), ``passed_on`` (the guest got the fault) and ``touched`` (the page had faulted before). They are
    what the simulated MMU held; the right answer is what the trace shows.
    """
    seen: dict[tuple[bool, ...], str] = {}
    for t, scene in recordings:
        said = predict(scene)
        faults = said.faults[causes.compared(scene, said)]
        bits = layout_named(said.kernel.layout).bits
        _, first = np.unique(faults["address"] >> np.uint64(12), return_index=True)
        touched = np.ones(faults.shape, dtype=np.bool)
        touched[first] = False
        tables = causes.own_tables(scene) if not said.kernel.nested_paging else np.zeros(0, dtype=np.int64)
        columns = (
            faults["code"] & np.uint64(1) != 0,
            faults["old"] & np.uint64(bits.mask("HOST_W")) != 0,
            faults["old"] & np.uint64(bits.mask("MMU_W")) != 0,
            np.isin(faults["gfn"], tables),
            faults["path"] == INJECTED,
            touched,
        )
        told = [causes.CAUSES[cause] for cause in causes.recorded_causes(t, scene).cause.tolist()]
        rows = zip(*(column.tolist() for column in columns), strict=True)
        seen |= dict(zip(rows, told, strict=True))
    names = ("p", "host_w", "mmu_w", "table", "passed_on", "touched")
    cases = []
    for row, cause in sorted(seen.items(), key=lambda pair: (sum(pair[0]), pair[0])):
        said_of = ", ".join(name for name, on in zip(names, row, strict=True) if on) or "none of the six"
        cases.append(Case(dict(zip(names, row, strict=True)), cause, said_of))
    return Exercise("kinds of recorded faults", cases)


def faults_of_a_round() -> Exercise:
    """How many faults a round makes under nested paging; the answer takes ``pages`` and ``writes`` of its accesses.

    Each is a list with one entry an access: the page, and whether it is written. Cases are rounds of the simulated
    guest, shortest first.
    """
    cases = []
    for interval, share in ((8, 0.5), (32, 0.1), (128, 0.5), (512, 1.0)):
        laid = rounds.scene(True, interval, share, edits=0)
        faults = rounds.run("NPT", interval, share, edits=0).table().sum(axis=1).tolist()
        for number, (run, right) in enumerate(zip(laid.runs[1:], faults, strict=True)):
            data = run.gva >= rounds.DATA
            pages = ((run.gva[data] - np.uint64(rounds.DATA)) >> np.uint64(12)).tolist()
            writes = (run.op[data] == WRITE).tolist()
            text = "".join(f" {'w' if write else 'r'}{page}" for page, write in zip(pages, writes, strict=True))
            told = f"round {number + 1} of {interval} accesses:" + (text if interval <= 8 else f"{text[:40]} ...")
            cases.append(Case({"pages": pages, "writes": writes}, right, told))
    return Exercise("rounds", cases)


HOST_STATES = ("absent", "own", "zero page", "shared", "once shared")
"""How the host may stand behind a page: never touched; its own; the zero page; shared with a forked child; not any
more, but still read-only."""


def faults_of_a_store() -> Exercise:
    """How many faults one store takes under nested paging; the answer takes ``entry`` and ``host``.

    ``entry`` is whether KVM has mapped the page (read-only), ``host`` one of :data:`HOST_STATES`. Cases are runs of the
    simulated guest with the TDP MMU of Linux 6.1.
    """
    cases = []
    for host in HOST_STATES:
        for entry in (False, True):
            faults = _store(host, entry)
            if faults is not None:
                told = f"host page {host}, {'mapped read-only' if entry else 'not mapped'} by KVM"
                cases.append(Case({"entry": entry, "host": host}, faults, told))
    return Exercise("stores", cases)


def _store(host: str, entry: bool) -> int | None:
    """The faults of one store; None where KVM would not have mapped such a page read-only."""
    backing, gva = Backing(1), np.array([0x1000000], dtype=np.uint64)
    guest = Guest(Kernel())
    guest.vcpus[0] = VCPU(0)
    guest.add_slot(1, 0x1000, 1, 0, backing)
    page = np.zeros(1, dtype=np.int64)
    if host == "zero page":
        backing.fault(page, np.zeros(1, dtype=np.bool))
    elif host != "absent":
        backing.populate()
    if "shared" in host:
        backing.fork()
    if host == "once shared":
        backing.child_exits()
    if entry:
        if host in ("absent", "own"):
            return None
        guest.run(0, stream([READ], gva))
    return int(guest.run(0, stream([WRITE], gva)).faults.size)


def twice_faulted(caused: causes.Caused) -> Callable[[int], Result]:
    """Count exercise: the faults on a page that the host had lent, with the entry dropped before the store's retry.

    Args:
        caused: the faults of one vCPU under nested paging, in order.
    """
    lent, dropped = (caused.cause == causes.CAUSES.index(name) for name in ("host read-only", "entry dropped"))
    page = caused.address // np.uint64(PAGE)
    again = dropped[1:] & (page[1:] == page[:-1])  # (fault,) without the first
    return count("faults", lent & np.append(again, False))


def named_unwritten(run: Run, log: DirtyGet, window: int) -> Callable[[int], Result]:
    """Count exercise: the pages that a log names though the run before it stored to none of them.

    Args:
        run: the accesses since the log was last read; what the guest was refused does not count.
        log: what KVM reported.
        window: the guest-virtual address at which the log's first page is mapped, the others behind it.
    """
    stored = (run.op == WRITE) & ~run.faulted
    page = (run.gva[stored].astype(np.int64) - window) // PAGE
    written = np.zeros(log.bitmap.size, dtype=np.bool)
    written[page[(page >= 0) & (page < written.size)]] = True
    return count("pages of the log", log.bitmap & ~written)
