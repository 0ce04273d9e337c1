"""Random guests and streams for the tests of :mod:`mmu.vm`: all kinds of slots, tables and accesses, from one seed."""

from __future__ import annotations

import numpy as np

from mmu import host
from mmu.host import Backing
from mmu.kernel import Kernel
from mmu.vm import CR0, CR3, FETCH, INCREMENT, INVLPG, READ, VCPU, WRITE, Guest, Stream, stream

LOW, RAM, ROM, ALIAS, TABLES, HOLE, LARGE = 0x0, 0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x8000  # where regions begin
LONG = {"cr0": 0x80010033, "cr3": 0x10000, "cr4": 0x20, "efer": 0xD01}
FLAGS = (
    0x67,
    0x7,
    0x27,
    0x5,
    0x63,
    0x6,
)  # of leaf entries: all set; A, D clear; D clear; read-only; supervisor; absent


class Machine:
    """A guest with RAM, a read-only slot and holes; paged ones have aliases, and can write their own page tables.

    One of the aliases is made of large pages, which reach into a hole where RAM is small.
    """

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.kernel = Kernel(
            release=str(rng.choice(["6.1", "6.12"])),
            nested_paging=bool(rng.integers(2)),
            tdp_mmu=bool(rng.integers(2)),
            nx_huge_pages=bool(rng.integers(2)),
            mmio_caching=bool(rng.integers(4)),
            eager_page_split=bool(rng.integers(2)),
        )
        self.paged, self.huge, ring = bool(rng.integers(2)), not rng.integers(3), not rng.integers(4)
        self.guest = guest = Guest(self.kernel)
        low = Backing(512, content=True)
        low.populate()
        guest.add_slot(0, LOW, 512, 0, low)
        upgrades = self.kernel.release == "6.12"
        self.ram = Backing(1024 if self.huge else 64, huge=self.huge, content=True, upgrades=upgrades)
        if self.huge:
            self.ram.populate()
        guest.add_slot(1, RAM, self.ram.pages, 0, self.ram)
        rom = Backing(16, content=True)
        rom.populate()
        rom.bytes[:] = 0x33
        guest.add_slot(2, ROM, 16, 2, rom)
        guest.memory.ring_size = 72 if ring else 0
        guest.vcpus[0] = VCPU(0, **LONG) if self.paged else VCPU(0)
        if self.paged:
            self._map_all(rng)

    def _map_all(self, rng: np.random.Generator) -> None:
        self.free = 0x11000
        for page in range(1, 512):
            self.map(page, page, 0x63)
        for page in range(64):
            self.map(RAM + page, RAM + page, int(rng.choice(FLAGS)))
        for page in range(16):
            self.map(ROM + page, ROM + page, 0x67)
            self.map(ALIAS + page, RAM + page * 3 % 16, 0x7)
        for page in range(8):
            self.map(HOLE + page, HOLE + page, 0x67)
            self.map(TABLES + page, 0x10 + page, 0x63)
        for page in (0, 512):
            self.map(LARGE + page, RAM + page, int(rng.choice(FLAGS[:5])) | 0x80, 2)

    def map(self, page: int, frame: int, flags: int, leaf: int = 1) -> None:
        """One guest page-table entry, and the upper ones above it."""
        memory, table = self.guest.memory, LONG["cr3"]
        for level in range(4, leaf, -1):
            at = table + (page >> 9 * (level - 1) & 511) * 8
            entry = int(memory.load(np.array([at], dtype=np.uint64), 8)[0])
            if not entry:
                entry, self.free = self.free | 0x27, self.free + 0x1000
                memory.store(at, entry, 8)
            table = entry & ~0xFFF
        memory.store(table + (page >> 9 * (leaf - 1) & 511) * 8, frame << 12 | flags, 8)

    def stream(self, rng: np.random.Generator, count: int) -> Stream:
        """Accesses to all regions; on a paged guest with stores to its tables, INVLPG and loads of CR3 and CR0."""
        region = rng.choice(5, size=count, p=[0.6, 0.1, 0.05, 0.15, 0.1])
        pages = 1024 if self.huge and not self.paged else 64
        near = rng.integers(0, 16, count)
        page = np.choose(
            region,
            [RAM + rng.integers(0, pages, count), ROM + near, HOLE + near % 8,
             (ALIAS if self.paged else RAM) + near, (TABLES if self.paged else RAM) + near % 8],
        )  # fmt: skip
        op = rng.choice([READ, WRITE, INCREMENT, FETCH], size=count, p=[0.4, 0.35, 0.15, 0.1])
        op = np.where((region == 2) & (op == FETCH), READ, op)  # no code in holes, no increments in ROM
        op = np.where((region == 1) & (op == INCREMENT), WRITE, op)
        gva = (page << 12 | rng.integers(0, 512, count) * 8).astype(np.uint64)
        value = rng.integers(0, 1 << 32, count)
        user = (rng.random(count) < 0.2) & self.paged & (region != 2)
        if self.paged:
            store = (region == 4) & ((op == WRITE) | (op == INCREMENT))
            last_level = (page == TABLES + 6) | (page == TABLES + 7)
            op = np.where(store, np.where(last_level, WRITE, READ), op)
            value = np.where(store, (RAM + value % 16) << 12 | 0x67, value)
            what = rng.random(count)
            op = np.where(what < 0.03, INVLPG, np.where(what > 0.98, CR3, np.where(what > 0.96, CR0, op)))
            gva = np.where(op == CR3, np.uint64(LONG["cr3"]), gva)
            gva = np.where(op == CR0, rng.choice(np.array([0x80010033, 0x80000033], dtype=np.uint64), count), gva)
            user &= op < INVLPG
            # And large pages: accesses to them, and stores to the entry of the first.
            large = (rng.random(count) < 0.3) & (op < INVLPG)
            page = LARGE + rng.choice([0, 8, 16, 512], count) + near
            gva = np.where(large, (page << 12).astype(np.uint64) | gva & np.uint64(0xFFF), gva)
            op = np.where(large & (page >= LARGE + self.ram.pages) & (op > WRITE), READ, op)
            value[large] &= 0xFFFFFFFF
            edits = np.flatnonzero(large & (rng.random(count) < 0.15))
            op[edits], user[edits] = WRITE, False
            gva[edits] = TABLES + 2 << 12 | 0x200  # in the table that the first upper entries lead to
            value[edits] = RAM << 12 | 0x80 | rng.choice(FLAGS, edits.size)
        return stream(op, gva, value, user)

    def act(self, rng: np.random.Generator) -> None:
        """One action of the host or on the log."""
        guest, slot = self.guest, self.guest.memory.slot(1)
        match int(rng.integers(8)):
            case 0:
                guest.set_flags(slot, slot.flags ^ 1)
            case 1 | 2 if slot.logged and not guest.memory.ring_size:
                guest.get_dirty_log(slot)
            case 3:
                first = int(rng.integers(self.ram.pages - 4))
                where = (0, 512) if self.huge and rng.integers(2) else (first, 4)
                guest.unmapped(self.ram, self.ram.discard(*where))
            case 4:
                guest.unmapped(self.ram, self.ram.fork())
            case 5:
                self.ram.child_exits()
            case 6:
                guest.unmapped(self.ram, self.ram.clear_refs())
            case 7:
                first = int(rng.integers(63))
                count = int(rng.integers(1, self.ram.pages - first))
                for protection in (0, int(host.READ | host.WRITE)):
                    guest.unmapped(self.ram, self.ram.protect(first, count, protection))
