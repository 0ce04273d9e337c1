"""A small workload on two kinds of machine: rounds of reads and writes under a dirty log, and a little page-table work.

The one idea: what a guest does is one thing, what its faults are is another. :func:`scene` lays the workload down as a
scenario, as if somebody had recorded it; :func:`run` plays the same scenario on nested paging, on the soft MMU of today
and on the one that the series of 2012 would have made. Chapter 4, and a section each in chapters 2, 3 and 8.

What is chosen, not measured: all sizes, the uniform choice of pages, and how often the guest works on its own tables.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmu import causes, play
from mmu.causes import CAUSES, Caused
from mmu.scenario import CR3, INVLPG, LOG_DIRTY_PAGES, READ, WRITE, DirtyGet, Event, Gmap, Memslot, Run, Scenario, Vcpu

MACHINES = {
    "NPT": (True, ""),
    "soft MMU": (False, ""),
    "soft MMU, series of 2012": (False, "2012"),
}
"""Machine: whether nested paging is used, and a fast-path policy, empty for the kernel's own."""

PAGES, ROUNDS, EDITS = 128, 8, 4
RAM, DATA, ROOT, TABLE = 0x1000000, 0x40000000, 0x4000000, 0x4005000
"""Where the guest's memory lies, where its program sees it, its root table, and the table with the memory's entries."""
WRITABLE = 0x67  # P, W, U, A, D
CLEAN = 0x27  # the same without D


@dataclass(frozen=True)
class Rounds:
    """What a run showed; all arrays of faults hold those of the rounds, not the first touches before them.

    Attributes:
        machine: one of :data:`MACHINES`.
        faults: what the simulated guest reports  # (fault,) of dtype :data:`mmu.kernel.FAULT`.
        caused: their causes, and which were repaired without the lock; ``epoch`` counts rounds from 1.
        dirty: how many pages the log named after each round  # (round,).
        written: how many pages the guest's program wrote in each round  # (round,).
    """

    machine: str
    faults: NDArray[np.void]
    caused: Caused
    dirty: NDArray[np.int64]
    written: NDArray[np.int64]

    def table(self) -> NDArray[np.int64]:
        """How many faults of each cause each round had  # (round, cause)."""
        cell = (self.caused.epoch - 1) * len(CAUSES) + self.caused.cause
        return np.bincount(cell, minlength=self.dirty.size * len(CAUSES)).reshape(-1, len(CAUSES))


def run(machine: str, interval: int = 256, writes: float = 0.5, **sizes: int) -> Rounds:
    """Play the workload on a machine; the arguments are those of :func:`scene`.

    >>> npt, soft = run("NPT"), run("soft MMU")
    >>> npt.caused.counts()["dirty log"] == npt.caused.fast.sum() == npt.dirty.sum()
    np.True_
    >>> int(soft.caused.fast.sum()), [cause for cause in soft.caused.counts() if cause not in npt.caused.counts()]
    (0, ['guest page table', "guest's entry"])

    Raises:
        ValueError: no such machine, or an argument that :func:`scene` refuses.
    """
    if machine not in MACHINES:
        raise ValueError(f"machine is {machine!r}; expected one of {', '.join(MACHINES)}")
    nested, policy = MACHINES[machine]
    laid = scene(nested, interval, writes, **sizes)
    said = play.predict(laid, policy)
    caused = causes.predicted_causes(laid, said)
    faults = said.faults[causes.compared(laid, said)]
    steady = caused.epoch > 0
    named = [np.unpackbits(np.frombuffer(bytes.fromhex(item.predicted), np.uint8)).sum() for item in said.bitmaps[1:]]
    written = [np.unique(_stored(round)).size for round in laid.runs[1:]]
    return Rounds(
        machine, faults[steady], caused.take(steady), np.array(named, dtype=np.int64), np.array(written, dtype=np.int64)
    )


def _stored(run: Run) -> NDArray[np.uint64]:
    """The pages of the program's stores, the guest kernel's work on its tables not counted."""
    page = run.gva >> np.uint64(12)
    return page[(run.op == WRITE) & (page >= DATA >> 12)]


def scene(
    nested: bool,
    interval: int = 256,
    writes: float = 0.5,
    *,
    pages: int = PAGES,
    rounds: int = ROUNDS,
    edits: int = EDITS,
    seed: int = 4,
) -> Scenario:
    """The workload as a scenario.

    The dirty log is on. The guest writes each of its pages once, and the log is read. Then, in each round, the guest
    loads CR3, clears D in ``edits`` of its own page-table entries, each with an INVLPG, makes ``interval`` accesses to
    pages chosen at random, and the log is read.

    Args:
        nested: NPT rather than the soft MMU.
        interval: accesses between two readings of the log.
        writes: the share of writes among them, 0 to 1.
        pages, rounds, edits, seed: sizes, and the seed of the random choices.

    Raises:
        ValueError: a share outside 0 to 1, more edits than pages, or more pages than one table holds.
    """
    if not 0 <= writes <= 1:
        raise ValueError(f"writes is {writes}; expected a share between 0 and 1")
    if not edits <= pages <= 512:
        raise ValueError(f"pages is {pages}; expected between {edits} (the edits of a round) and 512 (one table)")
    rng = np.random.default_rng(seed)
    size = pages * 0x1000

    def slot(number: int, gpa: int, size: int, flags: int = 0) -> Memslot:
        return Memslot(number, gpa, size, flags, number << 40, "anon prefaulted", 0, 0)

    def accesses(op: NDArray, gva: NDArray, value: NDArray) -> Run:
        none = np.zeros(op.shape, dtype=np.uint64)
        no = np.zeros(op.shape, dtype=np.bool)
        op, gva = op.astype(np.uint8), gva.astype(np.uint64)
        return Run(0, "", 0, 0, op, no, gva, value.astype(np.uint64), none, no, none, none, ())

    def read_log(seq: int) -> DirtyGet:
        return DirtyGet(1, seq, 0, 0, np.zeros(pages, dtype=np.bool))

    every = np.arange(pages, dtype=np.int64)
    events: list[Event] = [
        slot(0, 0, 0x10000), slot(1, RAM, size, LOG_DIRTY_PAGES), slot(2, ROOT, 0x10000),
        Gmap(ROOT, 0x1000, 0x1000, 15, 0x63), Gmap(ROOT, DATA, RAM, pages, WRITABLE),
        Gmap(ROOT, ROOT, ROOT, 16, 0x63),
        Vcpu(0, "long64", 0x80010033, ROOT, 0x20, 0xD01),
        accesses(np.full(pages, WRITE, dtype=np.int64), DATA + every * 0x1000, every),
        read_log(0),
    ]  # fmt: skip
    for number in range(rounds):
        edited = rng.choice(pages, edits, replace=False).astype(np.int64)  # (edit,)
        page = rng.integers(0, pages, interval, dtype=np.int64)  # (access,)
        store = rng.random(interval) < writes  # (access,)
        op = np.concatenate([[CR3], np.tile([WRITE, INVLPG], edits), np.where(store, WRITE, READ)])
        work = np.stack([TABLE + edited * 8, DATA + edited * 0x1000], axis=1)  # (edit, 2)
        gva = np.concatenate([[ROOT], work.ravel(), DATA + page * 0x1000])
        entry = np.stack([RAM + edited * 0x1000 | CLEAN, np.zeros_like(edited)], axis=1)
        value = np.concatenate([[0], entry.ravel(), page])
        events += [accesses(op, gva, value), read_log(number + 1)]
    params = {"kvm_amd.npt": "Y" if nested else "N", "kvm.tdp_mmu": "Y" if nested else "N"}
    return Scenario("rounds", "", "long64", "6.1", params, tuple(events))
