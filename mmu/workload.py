"""What guests do: streams of accesses, and the actions between them, of the benchmarks that the book speaks of.

A :class:`Workload` is a shape of memory and a function that yields steps: accesses of a vCPU, dirty-log reads. The same
steps run on any kernel: :func:`play` lets a guest of ``mmu.vm`` take them and counts its faults, round by round.
Guest page tables are real: under EPT or NPT the CPU walks them, under the soft MMU KVM shadows them.

Every parameter of a workload has its source in :data:`SOURCES`; all chance comes from the generator that the caller
hands in. Chapters 4 and 11.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmu.host import PAGE, Backing
from mmu.kernel import PATHS, Index, Kernel
from mmu.slots import LOG_DIRTY_PAGES
from mmu.vm import CR3, INVLPG, READ, VCPU, WRITE, Guest, Stream, stream

Random = np.random.Generator

RAM, FRAME_BUFFER, TABLES = 0, 1, 2
"""Memory slots: the guest's memory, the display's, and the pages of the guest's own page tables."""

KERNELS = {
    "EPT": Kernel(layout="6.1-ept"),
    "NPT": Kernel(),
    "soft MMU": Kernel(nested_paging=False, tdp_mmu=False),
}
"""Linux 6.1 on each MMU; ``with_policy`` says who may repair faults without the lock."""

_CR0, _CR4, _EFER = 0x80010033, 0x20, 0xD01  # long mode, CR0.WP, EFER.NXE
_LEAF = np.uint64(0x67)  # P, W, U, A, D
_TABLE = np.uint64(0x27)  # P, W, U, A
_READ_ONLY = np.uint64(0x25)  # P, U, A
_ENTRIES = 512


def with_policy(mmu: str, policy: str) -> Kernel:
    """A kernel of :data:`KERNELS` with another of the policies of ``mmu.kernel``."""
    return replace(KERNELS[mmu], policy=policy)


# Steps ---------------------------------------------------------------------------------------------------------------


class Access(NamedTuple):
    """One vCPU makes accesses."""

    accesses: Stream
    vcpu: int = 0


class Sync(NamedTuple):
    """User space reads a slot's dirty log, which write-protects what was dirty, and ends a round.

    The answer is the number of dirty pages.
    """

    slot: int


class Log(NamedTuple):
    """User space switches the dirty log of a slot on or off."""

    slot: int
    on: bool


Step = Access | Sync | Log
Steps = Generator[Step, int, None]


@dataclass(frozen=True)
class Workload:
    """A guest's shape, and what it does.

    ``ram`` and ``frame_buffer`` are pages (no frame buffer where that is 0). ``steps``, given a generator and the
    guest's layout, yields steps; a :class:`Sync` is answered by the number of dirty pages. ``vcpus`` make accesses, and
    ``processes`` address spaces have page tables beside the first. ``fresh``: no page is mapped yet. A round lasts
    ``seconds`` on the machine that was measured; 0 where that has no meaning.
    """

    name: str
    ram: int
    frame_buffer: int
    steps: Callable[[Random, Layout], Steps]
    vcpus: int = 1
    processes: int = 0
    fresh: bool = False
    seconds: float = 0.0


@dataclass(frozen=True)
class Layout:
    """Where things lie in a guest.

    Virtual and guest-physical page numbers are the same: memory, the frame buffer, and from the next 2 MiB on the page
    tables, so that no leaf table maps both data and tables.
    """

    ram: int
    frame_buffer: int
    spaces: int

    @property
    def data_leaves(self) -> int:
        """Leaf tables that an address space needs for memory and frame buffer."""
        return -(-(self.ram + self.frame_buffer) // _ENTRIES)

    @property
    def tables_first(self) -> int:
        """The first page of page tables."""
        return self.data_leaves * _ENTRIES

    @property
    def tables(self) -> int:
        """Table pages of one address space: three upper ones and the leaf tables, which map all tables, too."""
        count = 4 + self.data_leaves
        while (count - 3 - self.data_leaves) * _ENTRIES < self.spaces * count:
            count += 1
        return count

    @property
    def table_pages(self) -> int:
        """Table pages of all address spaces."""
        return self.spaces * self.tables

    def root(self, space: int) -> int:
        """CR3 of an address space."""
        return (self.tables_first + space * self.tables) * PAGE

    def directory_entry(self, space: int) -> NDArray[np.uint64]:
        """Where the entries lie that point to the leaf tables of data ``# (leaf table,)``."""
        return np.uint64(self.root(space) + 2 * PAGE) + np.arange(self.data_leaves, dtype=np.uint64) * np.uint64(8)

    def leaf_table(self, space: int) -> NDArray[np.uint64]:
        """The addresses of the leaf tables of data ``# (leaf table,)``."""
        return np.uint64(self.root(space) + 3 * PAGE) + np.arange(self.data_leaves, dtype=np.uint64) * np.uint64(PAGE)

    def entry(self, space: int, page: Index) -> NDArray[np.uint64]:
        """Where the leaf entries of pages lie ``# (page,)``."""
        return np.uint64(self.root(space) + 3 * PAGE) + page.astype(np.uint64) * np.uint64(8)


def addresses(page: Index, offset: int = 0) -> NDArray[np.uint64]:
    """The virtual addresses of pages ``# (page,)``."""
    return page.astype(np.uint64) * np.uint64(PAGE) + np.uint64(offset)


def build(workload: Workload, kernel: Kernel) -> tuple[Guest, Layout]:
    """A guest in long mode whose first address space maps every page; the others map the tables alone."""
    layout = Layout(workload.ram, workload.frame_buffer, 1 + workload.processes)
    guest = Guest(kernel)
    slots = [
        (RAM, 0, workload.ram), (FRAME_BUFFER, workload.ram, workload.frame_buffer),
        (TABLES, layout.tables_first, layout.table_pages),
    ]  # fmt: skip
    for number, base, pages in slots:
        if pages:
            backing = Backing(pages, content=number == TABLES)
            if number == TABLES or not workload.fresh:
                backing.populate()
            guest.add_slot(number, base, pages, backing=backing)
    tables = guest.memory.slot(TABLES)
    assert tables is not None
    words = guest.memory.words(tables, 8).reshape(-1, _ENTRIES)  # (table page, entry)
    every = np.arange((layout.tables - 3) * _ENTRIES, dtype=np.uint64)
    data = every < workload.ram + workload.frame_buffer
    table = (every >= layout.tables_first) & (every < layout.tables_first + layout.table_pages)
    for space in range(layout.spaces):
        row = space * layout.tables
        below = np.arange(1, layout.tables, dtype=np.uint64) + np.uint64(layout.tables_first + row)  # pages
        entry = (below << np.uint64(12)) | _TABLE
        words[row, 0], words[row + 1, 0] = entry[0], entry[1]
        words[row + 2, : layout.tables - 3] = entry[2:]
        if space:
            words[row + 2, : layout.data_leaves] = 0
        mapped = table | (data & (space == 0))
        leaves = np.where(mapped, (every << np.uint64(12)) | _LEAF, np.uint64(0))
        words[row + 3 : row + layout.tables] = leaves.reshape(-1, _ENTRIES)
    for vcpu in range(workload.vcpus):
        guest.vcpus[vcpu] = VCPU(vcpu, _CR0, layout.root(0), _CR4, _EFER)
    return guest, layout


class Tally(NamedTuple):
    """What a workload cost, round by round; a round ends with a dirty-log read, the last with the workload."""

    accesses: NDArray[np.int64]  # (round,)
    dirty: NDArray[np.int64]  # (round,), -1 for the rest after the last read
    paths: NDArray[np.int64]  # (round, path), columns as mmu.kernel.PATHS
    write_protect: NDArray[np.int64]  # (round,): faults with P and W, on pages (not on the guest's page tables)

    def by_path(self, name: str) -> NDArray[np.int64]:
        """Faults that took one path ``# (round,)``."""
        return self.paths[:, PATHS.index(name)]

    @property
    def faults(self) -> NDArray[np.int64]:
        """All faults ``# (round,)``."""
        return self.paths.sum(axis=1)


def play(workload: Workload, kernel: Kernel, rng: Random) -> Tally:
    """Run a workload on a kernel and count its faults. Chapters 4 and 11."""
    guest, layout = build(workload, kernel)
    steps = workload.steps(rng, layout)
    rounds: list[tuple[int, int, NDArray[np.int64], int]] = []
    accesses, write_protect, paths = 0, 0, np.zeros(len(PATHS), dtype=np.int64)
    answer = None
    while True:
        try:
            step = steps.send(answer)
        except StopIteration:
            break
        answer = None
        if isinstance(step, Access):
            faults = guest.run(step.vcpu, step.accesses).faults
            accesses += step.accesses.gva.size
            paths = paths + np.bincount(faults["path"], minlength=len(PATHS))
            data = faults["gfn"] < layout.tables_first
            write_protect += int((data & (faults["code"] & np.uint64(3) == 3)).sum())
        elif isinstance(step, Log):
            guest.set_flags(guest.memory.slot(step.slot), LOG_DIRTY_PAGES if step.on else 0)
        else:
            answer = int(guest.get_dirty_log(guest.memory.slot(step.slot)).sum())
            rounds.append((accesses, answer, paths, write_protect))
            accesses, write_protect, paths = 0, 0, np.zeros(len(PATHS), dtype=np.int64)
    rounds.append((accesses, -1, paths, write_protect))
    columns = list(zip(*rounds, strict=True))
    return Tally(*(np.array(column, dtype=np.int64) for column in columns))


# Workloads -----------------------------------------------------------------------------------------------------------


def frame_buffer_pages(rows: int, row_bytes: int, stride: int) -> Index:
    """Pages of a window's rows in a frame buffer whose lines are ``stride`` bytes apart.

    >>> [frame_buffer_pages(500, 2000, stride).size for stride in (2000, 4096, 7680)]
    [245, 500, 689]
    """
    start = np.arange(rows, dtype=np.int64) * stride
    return np.unique(np.concatenate([start // PAGE, (start + row_bytes - 1) // PAGE]))


def x11perf(
    *, rows: int = 500, row_bytes: int = 2000, stride: int = 4096, operations: int = 212, refreshes: int = 4,
    interval: float = 0.030,
) -> Workload:  # fmt: skip
    """x11perf -comppixwin500: a pixmap composited onto a window, while the display is refreshed from the dirty log.

    Every operation reads the pixmap, packed in memory, and writes all rows of the window. Between two refreshes there
    are ``operations`` of them, and each refresh reads the frame buffer's log, which write-protects it again.
    """
    source = np.arange(-(-rows * row_bytes // PAGE), dtype=np.int64)
    target = frame_buffer_pages(rows, row_bytes, stride)

    def steps(_: Random, layout: Layout) -> Steps:
        page = np.concatenate([source, layout.ram + target])
        op = np.repeat(np.array([READ, WRITE], dtype=np.uint8), [source.size, target.size])
        one = stream(op, addresses(page))
        yield Log(FRAME_BUFFER, True)
        for _refresh in range(refreshes):
            for _operation in range(operations):
                yield Access(one)
            yield Sync(FRAME_BUFFER)

    return Workload("x11perf", source.size, int(target[-1]) + 1, steps, seconds=interval)


def migration(
    *, ram: int = 8192, writes_per_page: float = 0.5, hot: float = 0.1, hot_share: float = 0.7, stop: int = 64,
    rounds: int = 30, vcpus: int = 2,
) -> Workload:  # fmt: skip
    """Pre-copy migration under dbench: each round sends what was dirty, and meanwhile the guest dirties more.

    A round lasts as long as its pages take to be sent, so it sees ``writes_per_page`` writes for each page sent. Of
    the writes, ``hot_share`` go to the ``hot`` part of memory. It ends when at most ``stop`` pages are dirty.
    """

    def steps(rng: Random, layout: Layout) -> Steps:
        yield Access(stream(READ, addresses(np.arange(ram, dtype=np.int64))))  # the guest has been running for long
        yield Log(RAM, True)
        to_send = ram
        for _round in range(rounds):
            writes = max(1, int(to_send * writes_per_page / vcpus))
            for vcpu in range(vcpus):
                warm = rng.random(writes, dtype=np.float64) < hot_share
                span = np.where(warm, max(1, int(hot * ram)), ram)
                page = (rng.random(writes, dtype=np.float64) * span).astype(np.int64)
                yield Access(stream(WRITE, addresses(page)), vcpu)
            to_send = yield Sync(RAM)
            if to_send <= stop:
                return

    return Workload("migration", ram, 0, steps, vcpus=vcpus)


def kernbench(*, processes: int = 6, pages: int = 32, copied: float = 0.25) -> Workload:
    """A kernel build in text mode: processes come and go, each with page tables that the guest fills and empties.

    For each, the guest switches to its tables, links in a leaf table, maps ``pages`` pages one by one and writes them;
    ``copied`` of them read-only at first, as after a fork, so that the guest takes a page fault of its own and maps
    them again. At its end the guest clears all these entries. No log is on.
    """
    ram = processes * pages

    def steps(_: Random, layout: Layout) -> Steps:
        mine = np.arange(pages, dtype=np.int64)
        cow = mine < round(copied * pages)
        for process in range(processes):
            page, space = process * pages + mine, 1 + process
            entry = layout.entry(space, page)
            frame = page.astype(np.uint64) << np.uint64(12)
            yield Access(stream(CR3, np.array([layout.root(space)], dtype=np.uint64)))
            directory, leaf_table = layout.directory_entry(space), layout.leaf_table(space)
            yield Access(stream(WRITE, directory, leaf_table | _TABLE))
            yield Access(stream(WRITE, entry, frame | np.where(cow, _READ_ONLY, _LEAF)))
            yield Access(stream(WRITE, addresses(page)))
            again = np.flatnonzero(cow)
            op = np.tile(np.array([WRITE, INVLPG, WRITE], dtype=np.uint8), again.size)
            where = np.stack([entry[again], addresses(page[again]), addresses(page[again])], axis=1).ravel()
            value = np.stack([frame[again] | _LEAF, frame[again], frame[again]], axis=1).ravel()
            yield Access(stream(op, where, value))
            yield Access(stream(READ, np.tile(addresses(page, 8), 4)))
            yield Access(stream(WRITE, np.concatenate([entry, directory]), 0))
            yield Access(stream(CR3, np.array([layout.root(0)], dtype=np.uint64)))

    return Workload("kernbench", ram, 0, steps, processes=processes)


def demand_paging(*, ram: int = 4096, write_share: float = 1.0, vcpus: int = 2) -> Workload:
    """Every page is touched for the first time, each vCPU in a part of its own."""

    def steps(rng: Random, layout: Layout) -> Steps:
        parts = np.array_split(np.arange(ram, dtype=np.int64), vcpus)
        for vcpu, page in enumerate(parts):
            op = np.where(rng.random(page.size, dtype=np.float64) < write_share, WRITE, READ)
            yield Access(stream(op, addresses(page)), vcpu)

    return Workload("demand paging", ram, 0, steps, vcpus=vcpus, fresh=True)


def steady_state(
    *, ram: int = 1024, accesses: int = 4096, write_share: float = 0.5, rounds: int = 4, logged: bool = True
) -> Workload:
    """A settled guest that reads and writes at random, ``accesses`` times between two dirty-log reads."""

    def steps(rng: Random, layout: Layout) -> Steps:
        everything = np.arange(ram, dtype=np.int64)
        yield Access(stream(WRITE, addresses(everything)))
        if logged:
            yield Log(RAM, True)
        for _round in range(rounds):
            page = rng.integers(0, ram, accesses, dtype=np.int64)
            op = np.where(rng.random(accesses, dtype=np.float64) < write_share, WRITE, READ)
            yield Access(stream(op, addresses(page)))
            if logged:
                yield Sync(RAM)

    return Workload("steady state", ram, 0, steps)


WORKLOADS: dict[str, Callable[..., Workload]] = {
    "x11perf": x11perf,
    "migration": migration,
    "kernbench": kernbench,
    "demand paging": demand_paging,
    "steady state": steady_state,
}

_CHOSEN = "chosen: small enough to run in a moment"
SOURCES: dict[str, dict[str, str]] = {
    "x11perf": {
        "rows": "the test's name: a window of 500 by 500 pixels",
        "row_bytes": "500 pixels of 4 bytes; the depth of the display is inferred",
        "stride": "inferred: 1024 pixels of 4 bytes; packed lines would be 2000 bytes apart, 1920 pixels 7680",
        "operations": "7060 a second, as the message of 2012 reports, in one interval",
        "refreshes": _CHOSEN,
        "interval": "QEMU's default, GUI_REFRESH_INTERVAL, 30 ms; the display of the measurement is not known",
    },
    "migration": {
        "ram": _CHOSEN,
        "writes_per_page": "chosen: below 1, or pre-copy would not come to an end",
        "hot": "chosen: no published access pattern of dbench was found",
        "hot_share": "chosen, as above",
        "stop": "chosen: what remains is sent while the guest stands still",
        "rounds": "chosen: a guard against a guest that writes too fast",
        "vcpus": "the message of 2012: smp2",
    },
    "kernbench": {
        "processes": _CHOSEN,
        "pages": _CHOSEN,
        "copied": "chosen: some pages are shared after a fork, and copied at their first write",
    },
    "demand paging": {
        "ram": _CHOSEN,
        "write_share": "demand_paging_test writes every page",
        "vcpus": _CHOSEN,
    },
    "steady state": {
        "ram": _CHOSEN,
        "accesses": "chosen: four for each page",
        "write_share": "a slider of chapter 11",
        "rounds": _CHOSEN,
        "logged": "the message of 2012 speaks of faults once the table is stable, with a log or without",
    },
}
"""Where each parameter's default comes from, by workload and name."""
