"""The shadow MMU: KVM's own page tables in place of the guest's, kept in step with them.

Without nested paging the CPU walks tables that KVM builds: one *shadow page* for each guest table (and for each set of
rights it is reached with), one spte for each guest entry. A guest table whose shadow page must match it is
write-protected; one at the last level may instead go *unsync*: the guest may write it, and KVM catches up when the
guest flushes. Faults fill sptes, set A and D in the guest's entries, prefetch seven neighbours, or are passed on to
the guest as its own #PF.

A large page of the guest's (2 MiB, or 4 MiB under PSE) has no table of its own. KVM maps it by a *direct* shadow page:
nothing to keep in step with, nothing to write-protect. Its role holds the rights of the whole walk, W only once the
guest's entry has D; where they change, another takes its place, and it stays to be found again. Where the host has a
huge page there too, no guest table in it and no dirty log, one large spte takes its place.

:meth:`ShadowMMU.settle` serves, at the same time, the first fault of each group of eight sptes; a fault that needs
another shadow page is served alone, for that may write-protect pages of others. Chapters 3 and 4.

Facts: Linux 6.1 ``arch/x86/kvm/mmu/paging_tmpl.h`` (``page_fault``, ``fetch``, ``protect_clean_gpte``,
``pte_prefetch``, ``invlpg``, ``sync_page``), ``mmu.c`` (``mmu_try_to_unsync_pages``, ``kvm_mmu_get_shadow_page``,
``validate_direct_spte``, ``kvm_mmu_hugepage_adjust``, ``disallowed_hugepage_adjust``, ``mmu_sync_children``,
``kvm_mmu_pte_write``), read in later 6.1 and 6.x trees; 6.4 changed INVLPG to synchronise one spte instead of
rebuilding it. Recordings of 6.1 and 6.12 (scenarios M and N, drawn ones) agree.

What the kernel does otherwise: 6.1 maps a guest's page of 1 GiB in small pages throughout where the tables of the walk
lie in it (``is_self_change_mapping``), here only the blocks with tables are small; a role does not tell EFER.NXE or the
paging mode apart, so that vCPUs in different modes can share shadow pages there; a second increment by the same
instruction of the same guest table is emulated, not tried again (read after 6.12, of 6.1 remembered); 6.1 drops the
shadow pages of a table that the delivery of an event touches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmu import paging
from mmu.host import PAGE
from mmu.kernel import (
    CAN_FETCH,
    CAN_READ,
    CAN_WRITE,
    CODE_F,
    CODE_P,
    CODE_RSVD,
    CODE_U,
    CODE_W,
    EMULATE,
    FAILED,
    FAST_FIXED,
    FAULT,
    INJECTED,
    MMIO,
    PREFETCH,
    RET_EMULATE,
    RET_FIXED,
    RET_NONE,
    RET_RETRY,
    RET_SPURIOUS,
    RET_WRITE_PROTECTED,
    RETRY,
    SLOW,
    SPURIOUS,
    Bools,
    Index,
    Kernel,
    Masks,
    Words,
    independent,
    prefetched,
)
from mmu.slots import HOLE, GuestMemory, Slot
from mmu.update import make_mmio, make_spte

ENTRIES = 512  # sptes in a shadow page
SMALL_OFFSET, LARGE_OFFSET = np.uint64(PAGE - 1), np.uint64(ENTRIES * PAGE - 1)  # of an address in what a leaf maps
EXEC, WRITE, USER, ALL = 1, 2, 4, 7  # role.access
FLOOD = 3  # writes to a write-protected upper table after which KVM gives up shadowing it
CACHED_ROOTS = 3  # previous roots that a vCPU keeps (KVM_MMU_NUM_PREV_ROOTS)


def _stores(op: NDArray[np.uint8]) -> Bools:
    """Which operations store: WRITE and INCREMENT of ``mmu.vm``, whose floor is above this one ``# (access,)``."""
    return (op == 1) | (op == 2)


class Walk(NamedTuple):
    """What the guest's own tables say of each access: all arrays ``# (access,)`` or ``# (access, level)``."""

    gpa: Words
    fault: Bools
    code: Words
    entry_gpa: Words
    used: Bools
    before: Words
    after: Words
    rights: NDArray[np.int64]  # EXEC, WRITE, USER of all levels together
    level: NDArray[np.uint8]  # of the last entry read: above 1 a large page, where there is no fault
    leaf: Words  # that entry, as it was before

    def take(self, which: Index) -> Walk:
        """Only the walks of these accesses."""
        return Walk(*(column[which] for column in self))


@dataclass
class Page:
    """One shadow page: the guest table it shadows and its role; its sptes are a row of :attr:`ShadowMMU.sptes`."""

    gfn: int
    level: int
    access: int
    quadrant: int
    mode: tuple[Any, ...]
    unsync: bool = False
    fetched: bool = False  # made for a fetch under nx_huge_pages, whether or not it could be large otherwise
    roots: int = 0
    valid: bool = True
    parents: set[tuple[int, int]] = field(default_factory=set)  # (page, entry) that point here

    @property
    def role(self) -> tuple[Any, ...]:
        """What two shadow pages of one gfn may differ in."""
        return self.level, self.access, self.quadrant, self.mode


@dataclass
class Roots:
    """A vCPU's roots: ``pages`` is one root page (long mode) or four page directories, -1 where there is none."""

    mode: tuple[Any, ...]
    cr3: int
    pages: tuple[int, ...]
    previous: list[tuple[int, tuple[Any, ...], int]] = field(default_factory=list)  # (cr3, mode, page)


class Settled(NamedTuple):
    """What became of the accesses of one segment: arrays ``# (access,)``, but ``faults`` ``# (fault,)``."""

    faults: NDArray[np.void]
    gpa: Words
    emulated: Bools  # left to the device model
    fault: Bools  # the guest took a #PF
    code: Words


class ShadowMMU:
    """All shadow pages of one guest.

    Args:
        memory: the guest's slots.
        kernel: whose rules.
        walk: walks the guest's tables as they are now: ``walk(cpu, accesses)``.

    Attributes:
        sptes: ``# (page, 512)``; ``child`` the shadow page that an upper entry points to, -1 for a leaf;
            ``gfn`` and ``index`` what a leaf maps, -1 for nothing; ``mmio`` the generation of an MMIO spte, or -1;
            ``access`` the rights that a leaf was made with.
        writes, granted, base: of each shadow page the stores to its guest table since a fault last came by
            (``write_flooding_count``), the rights of its role, a direct one's first gfn (else -1) ``# (page,)``.
        tracked: how many upper-level shadow pages there are for each page ``# (index,)``: their gfns stay protected.
    """

    def __init__(self, memory: GuestMemory, kernel: Kernel, walk: Callable[..., Walk]) -> None:
        self.memory, self.kernel, self.walk = memory, kernel, walk
        self.bits = Masks(kernel.layout)
        self.on_dirty: Callable[[Index, NDArray[np.int16], Index], None] = lambda order, slot, index: None
        self.zap_all()

    def zap_all(self) -> None:
        """Forget every shadow page (``kvm_mmu_zap_all_fast``); vCPUs load new roots when they run."""
        self.pages: list[Page] = []
        self.sptes = np.zeros((0, ENTRIES), dtype=np.uint64)
        self.child = np.zeros((0, ENTRIES), dtype=np.int64)
        self.gfn, self.index, self.mmio, self.access = (np.zeros((0, ENTRIES), dtype=np.int64) for _ in range(4))
        self.writes, self.granted, self.base = (np.zeros(0, dtype=np.int64) for _ in range(3))
        self.tracked = np.zeros(0, dtype=np.int64)
        self.roots: dict[int, Roots] = {}
        self._of_gfn: dict[int, list[int]] = {}  # of guest tables
        self.has_large = False  # a leaf has been set one level up
        self._of_large: dict[tuple[int, tuple[Any, ...]], int] = {}  # direct shadow pages, by gfn and role
        self._lead = np.zeros(0, dtype=np.int64)

    # Shadow pages ----------------------------------------------------------------------------------------------------

    def _new(self, page: Page) -> int:
        number = len(self.pages)
        self.pages.append(page)
        if number == len(self.sptes):
            more = max(8, number)
            for name, empty in (("sptes", 0), ("child", -1), ("gfn", -1), ("index", -1), ("mmio", -1), ("access", 0)):
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.full((more, ENTRIES), empty, dtype=old.dtype)]))
            self.writes, self.granted, self.base = (
                np.concatenate([old, np.zeros(more, dtype=np.int64)]) for old in (self.writes, self.granted, self.base)
            )
        self.granted[number], self.base[number] = page.access, -1
        return number

    def _indices(self, gfn: Index) -> Index:
        _, index = self.memory.locate(gfn)
        if self.tracked.size < self.memory.size:
            more = np.zeros(self.memory.size - self.tracked.size, dtype=np.int64)
            self.tracked = np.concatenate([self.tracked, more])
        return index

    def _get(self, cpu: Any, gfn: int, role: tuple[Any, ...]) -> int:
        """The shadow page for a guest table in a role: found and brought up to date, or made and write-protected."""
        level, access, quadrant, mode = role
        for number in list(self._of_gfn.get(gfn, ())):
            page = self.pages[number]
            if page.role == role:
                if page.unsync:
                    self._sync(cpu, number)
                self.writes[number] = 0
                return number
            if level > 1 and page.unsync:
                self._zap_page(number)
        number = self._new(Page(gfn, level, access, quadrant, mode))
        self._of_gfn.setdefault(gfn, []).insert(0, number)
        index = self._indices(np.array([gfn], dtype=np.int64))
        if level > 1:
            self.tracked[index] += 1
        self._protect_tables(index)
        return number

    def _get_direct(self, gfn: int, role: tuple[Any, ...]) -> int:
        """The shadow page for a part of a large guest page in a role: no guest table, so nothing to write-protect."""
        if (gfn, role) not in self._of_large:
            level, access, quadrant, mode = role
            self._of_large[gfn, role] = self._new(Page(gfn, level, access, quadrant, mode))
            self.base[self._of_large[gfn, role]] = gfn
        return self._of_large[gfn, role]

    def _link(self, parent: int, entry: int, child: int) -> None:
        self._clear(np.array([parent], dtype=np.int64), np.array([entry], dtype=np.int64))
        self.sptes[parent, entry] = self.bits.present | self.bits.w | np.uint64(child << int(self.bits.frame))
        self.child[parent, entry] = child
        self.pages[child].parents.add((parent, entry))

    def _unlink(self, parent: int, entry: int) -> None:
        self.pages[int(self.child[parent, entry])].parents.discard((parent, entry))
        self._clear(np.array([parent], dtype=np.int64), np.array([entry], dtype=np.int64))

    def _clear(self, page: Index, entry: Index) -> None:
        self.sptes[page, entry] = 0
        for part in (self.child, self.gfn, self.index, self.mmio):
            part[page, entry] = -1

    def _zap_page(self, number: int) -> None:
        """``kvm_mmu_prepare_zap_page``: unlink children and parents; a root in use becomes invalid."""
        page = self.pages[number]
        for unsync in self._unsync_below(number):
            if unsync != number:
                self._zap_page(unsync)
        for entry in np.flatnonzero(self.child[number] >= 0).tolist():
            self._unlink(number, entry)
        self._clear(np.full(ENTRIES, number, dtype=np.int64), np.arange(ENTRIES, dtype=np.int64))
        for parent, entry in list(page.parents):
            self._unlink(parent, entry)
        page.valid, page.unsync = False, False
        self._of_gfn[page.gfn].remove(number)
        if page.level > 1:
            self.tracked[self._indices(np.array([page.gfn], dtype=np.int64))] -= 1
        if page.roots:
            self.roots = {
                cpu: roots
                for cpu, roots in self.roots.items()
                if number not in roots.pages and all(number != old for _, _, old in roots.previous)
            }

    def _unsync_below(self, number: int) -> list[int]:
        """The unsync shadow pages reachable from one, itself included."""
        seen, todo = [], [number]
        while todo:
            here = todo.pop()
            if self.pages[here].unsync:
                seen.append(here)
            todo.extend(self.child[here][self.child[here] >= 0].tolist())
        return sorted(set(seen))

    def _protect_tables(self, index: Index) -> None:
        """Write-protect the pages of guest tables for good: MMU_W goes too."""
        self.sptes[self._mapping(index)] &= ~(self.bits.w | self.bits.mmu_w)

    def _mapping(self, index: Index) -> Bools:
        """Which sptes map any of these pages ``# (page, 512)``: the reverse map."""
        wanted = np.zeros(self.memory.size + 1, dtype=np.bool)  # the last entry: what index -1 finds
        wanted[index] = True
        wanted[-1] = False
        found = wanted[self.index] & (self.sptes & self.bits.present != 0)
        if self.has_large:
            large = np.nonzero(self._is_large(self.sptes))
            first = self.index[large]
            within = np.append(0, np.cumsum(wanted, dtype=np.int64))
            found[large] = within[first + ENTRIES] > within[first]
        return found

    def _is_large(self, word: Words) -> Bools:
        """Which sptes map 2 MiB."""
        both = self.bits.present | self.bits.large
        return word & both == both

    def _unsync_gfns(self, gfn: Index) -> None:
        """A writable mapping of guest tables appears: their last-level shadow pages go unsync."""
        for table in np.unique(gfn).tolist():
            for number in self._of_gfn.get(table, ()):
                self.pages[number].unsync = True

    def _shadowed(self, gfn: Index, *, sync_only: bool) -> Bools:
        """Pages that are shadowed guest tables; with ``sync_only`` unsync ones do not count."""
        tables = [
            table
            for table, numbers in self._of_gfn.items()
            if any(not (sync_only and self.pages[number].unsync) for number in numbers)
        ]
        return np.isin(gfn, np.array(tables, dtype=np.int64))

    # Roots -----------------------------------------------------------------------------------------------------------

    @staticmethod
    def mode(cpu: Any) -> tuple[Any, ...]:
        """The part of a role that the control registers decide."""
        flags = cpu.flags
        wp = flags["wp"]
        return cpu.format.name, flags["nxe"], wp, flags["smep"] and not wp, flags["smap"] and not wp

    def _root(self, cpu: Any) -> Roots:
        """The vCPU's roots, loaded if need be."""
        if cpu.number not in self.roots:
            self.roots[cpu.number] = Roots(self.mode(cpu), cpu.cr3, self._load(cpu))
            self._sync_roots(cpu)
        return self.roots[cpu.number]

    def _load(self, cpu: Any) -> tuple[int, ...]:
        fmt, mode = cpu.format, self.mode(cpu)
        if fmt.levels >= 4:
            pages = (self._get(cpu, cpu.cr3 >> 12, (fmt.levels, ALL, 0, mode)),)
        elif fmt is paging.PAE:
            start = np.uint64(cpu.cr3 & ~0x1F) + np.arange(4, dtype=np.uint64) * np.uint64(8)
            pointers = self.memory.load(start, 8)
            present = pointers & paging.P != 0
            frames = (pointers & paging.PFN) >> np.uint64(12)
            pages = tuple(
                self._get(cpu, int(frame), (2, ALL, 0, mode)) if there else -1
                for frame, there in zip(frames, present, strict=True)
            )
        else:
            pages = tuple(self._get(cpu, cpu.cr3 >> 12, (2, ALL, quarter, mode)) for quarter in range(4))
        for page in pages:
            if page >= 0:
                self.pages[page].roots += 1
        return pages

    def _free(self, pages: tuple[int, ...]) -> None:
        for page in pages:
            if page >= 0:
                self.pages[page].roots -= 1

    def load_cr3(self, cpu: Any) -> None:
        """A CR3 load: switch roots, using a cached one where there is one, then synchronise what lies below."""
        roots = self.roots.get(cpu.number)
        if roots is None:
            return
        if cpu.format.levels < 4:
            self._free(roots.pages)
            del self.roots[cpu.number]
        elif cpu.cr3 != roots.cr3:
            current = (roots.cr3, roots.mode, roots.pages[0])
            held = [old for old in roots.previous if old[:2] == (cpu.cr3, roots.mode)]
            rest = [current, *(old for old in roots.previous if old not in held)]
            for _, _, page in rest[CACHED_ROOTS:]:
                self._free((page,))
            pages = (held[0][2],) if held else self._load(cpu)
            self.writes[pages[0]] = 0  # a root that is taken up again counts its stores anew
            self.roots[cpu.number] = Roots(roots.mode, cpu.cr3, pages, rest[:CACHED_ROOTS])
        self._root(cpu)
        self._sync_roots(cpu)

    def load_cr0(self, cpu: Any, before: int) -> None:
        """A CR0 load: where WP or PG changed, all roots go, for shadow pages have roles of their own then."""
        roots = self.roots.get(cpu.number)
        if roots is None or not (before ^ cpu.cr0) & (1 << 16 | 1 << 31):
            return
        self._free(roots.pages + tuple(page for _, _, page in roots.previous))
        del self.roots[cpu.number]

    def _sync_roots(self, cpu: Any) -> None:
        """``kvm_mmu_sync_roots``: synchronise what lies below each root."""
        for page in self.roots[cpu.number].pages:
            if page >= 0:
                self._sync_below(cpu, page)

    def _sync_below(self, cpu: Any, page: int) -> None:
        """``mmu_sync_children``: write-protect the unsync guest tables, then bring their shadow pages up to date."""
        found = self._unsync_below(page)
        if not found:
            return
        self._protect_tables(self._indices(np.array([self.pages[number].gfn for number in found], dtype=np.int64)))
        for number in found:
            self.pages[number].unsync = False
            self._sync(cpu, number)

    def _table_entries(self, cpu: Any, number: int, entry: Index) -> Words:
        """The guest entries that sptes of a last-level shadow page stand for."""
        page, width = self.pages[number], cpu.format.entry_bytes
        first = (page.gfn << 12) + (page.quadrant * ENTRIES * 4 if width == 4 else 0)
        return self.memory.load(np.uint64(first) + entry.astype(np.uint64) * np.uint64(width), width)

    def _sync(self, cpu: Any, number: int, only: Index | None = None) -> None:
        """``sync_page``: make the sptes of a last-level shadow page (or some of them) follow the guest's entries."""
        here = np.flatnonzero((self.sptes[number] != 0) | (self.mmio[number] >= 0))
        entry = here if only is None else np.intersect1d(here, only)
        if not entry.size:
            return
        page = self.pages[number]
        gpte = self._table_entries(cpu, number, entry)
        usable, access, gfn = self._judge_entries(cpu, page, gpte)
        at = np.full(entry.shape, number, dtype=np.int64)
        special = self.mmio[number, entry] >= 0
        same = usable & (gfn == self.gfn[number, entry])
        self._clear(at[~same], entry[~same])
        renew = same & special
        self.mmio[number, entry[renew]] = self.memory.generation
        keep = same & ~special
        if self.kernel.release == "6.12":  # since 6.4 an spte whose rights stay the same is left alone
            keep &= access != self.access[number, entry]
        entry, gfn, access = entry[keep], gfn[keep], access[keep]
        old = self.sptes[number, entry]
        new = make_spte(
            (old >> self.bits.frame) & np.uint64((1 << 40) - 1), access=access, old=old, prefetch=True,
            host_writable=old & self.bits.host_w != 0, shadowed=self._shadowed(gfn, sync_only=False),
            layout=self.kernel.layout,
        )  # fmt: skip
        self.sptes[number, entry], self.access[number, entry] = new, access
        written = new & self.bits.w != 0
        slot, index = self.memory.locate(gfn[written])
        self.on_dirty(np.full(index.shape, -1, dtype=np.int64), slot, index)

    def _judge_entries(self, cpu: Any, page: Page, gpte: Words) -> tuple[Bools, NDArray[np.int64], Index]:
        """Of guest leaf entries: which a prefetch may use, with which rights, and the gfns they name."""
        fmt = cpu.format
        forbidden = np.uint64(fmt.reserved(1, True, cpu.maxphyaddr))
        if fmt.nx and not cpu.flags["nxe"]:
            forbidden |= paging.NX
        usable = (gpte & (paging.P | paging.A) == paging.P | paging.A) & (gpte & forbidden == 0)
        access = (gpte & np.uint64(WRITE | USER)).astype(np.int64) | EXEC * (gpte & paging.NX == 0)
        access = np.where(gpte & paging.D == 0, access & ~WRITE, access) & page.access
        return usable, access, ((gpte & paging.PFN) >> np.uint64(12)).astype(np.int64)

    # INVLPG and writes to guest tables -------------------------------------------------------------------------------

    def invlpg(self, cpu: Any, gva: int, *, everywhere: bool = True) -> None:
        """INVLPG: if the leaf's shadow page is unsync, rebuild (6.1) or synchronise (6.12) its one spte."""
        roots = self._root(cpu)
        starts = [roots.pages] + [(page,) for _, _, page in roots.previous if everywhere]
        for pages in starts:
            page, entry = self._find(pages, np.array([gva], dtype=np.uint64))
            number = int(page[0])
            if number < 0 or not self.pages[number].unsync:
                continue
            if self.kernel.release == "6.12":
                self._sync(cpu, number, entry)
            else:
                self._clear(page, entry)
                self._prefetch_entries(cpu, page, entry, logged_too=True)

    def emulate_store(self, gpa: int, width: int, order: int) -> None:
        """KVM makes a store to a write-protected guest table itself: the sptes made from that entry go."""
        gfn = gpa >> 12
        slot, index = self.memory.locate(np.array([gfn], dtype=np.int64))
        self.on_dirty(np.array([order], dtype=np.int64), slot, index)
        for number in list(self._of_gfn.get(gfn, ())):
            page = self.pages[number]
            size = 4 if page.mode[0] in (paging.LEGACY.name, paging.LEGACY_PSE.name) else 8
            offset = gpa & 0xFFF
            if width > size or offset % size + width > size:
                self._zap_page(number)  # not how a page table is written
                continue
            if page.level > 1:
                self.writes[number] += 1
                if self.writes[number] >= FLOOD:
                    self._zap_page(number)
                    continue
            entry, count = offset // size, 1
            if size == 4:
                if page.level > 1:  # a 4M directory entry is two of KVM's
                    entry, count = entry * 2, 2
                quadrant, entry = divmod(entry, ENTRIES)
                if quadrant != page.quadrant:
                    continue
            for each in range(entry, entry + count):
                if self.child[number, each] >= 0:
                    self._unlink(number, each)
                else:
                    self._clear(np.array([number], dtype=np.int64), np.array([each], dtype=np.int64))

    # Faults ----------------------------------------------------------------------------------------------------------

    def _find(self, pages: tuple[int, ...], gva: Words) -> tuple[Index, Index]:
        """The last-level shadow page (-1: not built) and the entry in it for each address."""
        *_, found = self._way(pages, gva)
        return found

    def _way(self, pages: tuple[int, ...], gva: Words) -> Iterator[tuple[Index, Index]]:
        """Level by level, the shadow page (-1: not built) and the entry in it for each address.

        Where a large spte ends the way, that one again.
        """
        gva, large = gva.astype(np.int64), np.zeros(gva.shape, dtype=np.bool)
        last = np.zeros(gva.shape, dtype=np.int64)
        if len(pages) == 1:
            here, level = np.full(gva.shape, pages[0], dtype=np.int64), self.pages[pages[0]].level
        else:
            here, level = np.array(pages, dtype=np.int64)[gva >> 30 & 3], 2
        for upper in range(level, 0, -1):
            entry = np.where(large, last, gva >> (12 + 9 * (upper - 1)) & (ENTRIES - 1))
            yield here, entry
            below = np.where(here >= 0, self.child[here, entry], np.int64(-1))
            if self.has_large:
                large = (here >= 0) & (below < 0) & self._is_large(self.sptes[here, entry])
            here, last = np.where(large, here, below), entry

    def settle(self, cpu: Any, part: Any, walks: Walk) -> Settled:
        """Let one segment's accesses happen: their faults in order, and what became of each.

        ``walks`` are the guest's walks of these accesses; its tables do not change within a segment, but for A and D.
        """
        count = part.gva.size
        out = Settled(
            np.zeros(0, dtype=FAULT), np.zeros(count, dtype=np.uint64), np.zeros(count, dtype=np.bool),
            np.zeros(count, dtype=np.bool), np.zeros(count, dtype=np.uint64),
        )  # fmt: skip
        waiting = np.flatnonzero(part.op <= 3)
        coupled = self._coupled(cpu, walks)
        records = [out.faults]
        while waiting.size:
            page, entry, word, allowed = self._look(cpu, part.take(waiting))
            known = (page >= 0) & (self.mmio[page, entry] == self.memory.generation)
            unit = np.where(page >= 0, page * (ENTRIES // PREFETCH) + entry // PREFETCH, np.int64(-1))
            unit[coupled[waiting]] = -1
            lead, now = independent(unit, allowed, known, self._scratch())
            denied = np.flatnonzero(~allowed)
            walk = self.walk(cpu, part.take(waiting[denied]))
            alone = np.flatnonzero(page < 0)
            large = np.flatnonzero((walk.level > 1) & ~walk.fault & ~known[denied] & (page[denied] >= 0))
            if large.size:  # the whole shadow page may make way for another
                misfit = denied[large]
                misfit = misfit[self._misfit(cpu, part.take(waiting[misfit]), walk.take(large), page[misfit])]
                way = np.full(len(self.sptes) + 1, waiting.size, dtype=np.int64)
                np.minimum.at(way, page[misfit], misfit)
                lead, alone = np.minimum(lead, way[page]), np.union1d(alone, misfit)
            # What a fault does to a page (a copy, for example) reaches its other addresses through the reverse map.
            tables = (walk.gpa >> np.uint64(12)).astype(np.int64)
            mapped = self._mapped(page, entry, word, part.gva[waiting])
            lead = np.minimum(lead, _first_of(tables, denied, mapped, waiting.size))
            done = allowed & (np.arange(waiting.size, dtype=np.int64) < lead)
            store = done & _stores(part.op[waiting])
            self.sptes[page[done], entry[done]] |= self.bits.a
            self.sptes[page[store], entry[store]] |= self.bits.d
            frame = self.gfn[page[done], entry[done]].astype(np.uint64) << np.uint64(12)
            offset = np.where(self.has_large & self._is_large(word[done]), LARGE_OFFSET, SMALL_OFFSET)
            out.gpa[waiting[done]] = frame | (part.gva[waiting[done]] & offset)
            serve = self._may_go_together(np.flatnonzero(now), alone, denied, tables)
            finished = np.zeros(waiting.size, dtype=np.bool)
            if serve.size:
                rows = walk.take(np.searchsorted(denied, serve))
                record, end = self._serve(cpu, part, waiting[serve], rows, page[serve], entry[serve], word[serve], out)
                records.append(record)
                finished[serve] = end
            waiting = waiting[~done & ~finished]
        faults = np.concatenate(records)
        return out._replace(faults=faults[np.argsort(faults["order"], kind="stable")])

    def faults_now(self, cpu: Any, part: Any) -> Bools:
        """Which accesses the CPU would not let through as things stand ``# (access,)``."""
        return (part.op <= 3) & ~self._look(cpu, part)[3]

    def _look(self, cpu: Any, part: Any) -> tuple[Index, Index, Words, Bools]:
        """The CPU's walk of the shadow pages: last-level page, entry, spte, and whether it allows the access."""
        page, entry = self._find(self._root(cpu).pages, part.gva)
        word = np.where(page >= 0, self.sptes[page, entry], np.uint64(0))
        write, fetch = _stores(part.op), part.op == 3
        need = np.where(write, CAN_WRITE, np.where(fetch, CAN_FETCH, CAN_READ))
        allowed = (self.bits.rights(word) & need != 0) & (~part.user | (word & self.bits.user != 0))
        return page, entry, word, allowed

    def _coupled(self, cpu: Any, walks: Walk) -> Bools:
        """Accesses whose group of eight guest entries shares a gfn with another group ``# (access,)``.

        What one does to the host's page the other's prefetch would see, so all such go one after the other; and so do
        those with a page that the host may replace together with its neighbours, a huge page's.
        """
        width = cpu.format.entry_bytes
        group = np.where(walks.used[:, -1], walks.entry_gpa[:, -1] & ~np.uint64(PREFETCH * width - 1), np.uint64(0))
        both = paging.P | paging.PS
        large = (walks.level > 1) & (walks.leaf & both == both)
        # The groups of a large page: a number for each, made of its entry's address and the group's place in it.
        at = np.flatnonzero(large)
        last = walks.entry_gpa[at, cpu.format.levels - walks.level[at].astype(np.int64)]
        inside = walks.gpa[at] >> np.uint64(12) & np.uint64((1 << 18) - PREFETCH)  # of 1 GiB
        group[at] = last << np.uint64(18) | inside | np.uint64(1)
        names, first, which = np.unique(group, return_index=True, return_inverse=True)
        entry = self.memory.load(
            (names[:, None] + np.arange(PREFETCH, dtype=np.uint64) * np.uint64(width)).ravel(), width
        )
        gfn = np.where(entry & paging.P != 0, entry >> np.uint64(12) & np.uint64((1 << 40) - 1), np.uint64(0))
        if at.size:
            own = walks.gpa[first] >> np.uint64(15) << np.uint64(3)
            own = own[:, None] + np.arange(PREFETCH, dtype=np.uint64)
            gfn = np.where(np.repeat(large[first], PREFETCH), own.ravel(), gfn)
        pair = np.unique(np.stack([gfn, np.repeat(names, PREFETCH)], axis=1)[gfn > 0], axis=0)
        _, first, count = np.unique(pair[:, 0], return_inverse=True, return_counts=True)
        shared = np.isin(names, pair[count[first.ravel()] > 1, 1])
        slot, index = self.memory.locate(gfn.astype(np.int64))
        shared |= self.memory.host_property(slot, index, "tied").reshape(-1, PREFETCH).any(axis=1)
        return shared[which.ravel()]

    def _scratch(self) -> Index:
        units = self.sptes.size // PREFETCH + 1  # the last one is for what has to go one by one
        if self._lead.size < units:
            self._lead = np.zeros(2 * units, dtype=np.int64)
        return self._lead

    def _mapped(self, page: Index, entry: Index, word: Words, gva: Words) -> Index:
        """The gfn that each address maps now, -1 for none."""
        gfn = self.gfn[page, entry]
        if self.has_large:
            gfn += np.where(self._is_large(word), gva.astype(np.int64) >> 12 & (ENTRIES - 1), np.int64(0))
        return np.where(page >= 0, gfn, np.int64(-1))

    def _rights(self, cpu: Any, part: Any, walk: Walk) -> Index:
        """What KVM grants by the guest's walks: W waits for the store that sets D."""
        write = _stores(part.op)
        rights = walk.rights.copy()
        rights[~write & (walk.leaf & paging.D == 0)] &= ~WRITE
        lent = write & (rights & WRITE == 0)  # CR0.WP is clear, and a supervisor stores through a read-only entry
        if lent.any():
            lent &= self.memory.locate((walk.gpa >> np.uint64(12)).astype(np.int64))[0] != HOLE
            rights[lent] = (rights[lent] | WRITE) & ~USER & ~(EXEC if cpu.flags["smep"] else 0)
        return rights

    def _misfit(self, cpu: Any, part: Any, walk: Walk, page: Index) -> Bools:
        """Faults in large guest pages whose shadow page has other rights in its role than the guest's entry now.

        Where the host may have a huge page, another spte may take the place of the whole shadow page too.
        """
        slot, _ = self.memory.locate((walk.gpa >> np.uint64(12)).astype(np.int64))
        huge = np.array([slot.backing.huge for slot in self.memory.slots] + [False], dtype=np.bool)[slot]
        return huge | (self.granted[page] != self._rights(cpu, part, walk))

    def _goal(self, walk: Walk, slot: NDArray[np.int16], index: Index) -> int:
        """The level that KVM maps one access at (``kvm_mmu_hugepage_adjust``), once the host's page is there.

        2 where guest and host both have a large page there, none of which is a shadowed guest table or logged.
        """
        gfn = walk.gpa.astype(np.int64) >> 12
        if walk.level[0] < 2 or slot[0] == HOLE or self.memory.slots[slot[0]].logged:
            return 1
        huge = self.memory.may_be_huge(slot, gfn) & self.memory.host_property(slot, index, "mapped_huge")
        return 2 if huge[0] and not self._tables_within(int(gfn[0])) else 1

    def _stays_small(self, child: int) -> bool:
        """With ``nx_huge_pages``, small sptes that were made for a fetch stay; 6.1 lets all small ones stay."""
        return self.kernel.nx_huge_pages and (self.kernel.release == "6.1" or self.pages[child].fetched)

    def _tables_within(self, gfn: int) -> bool:
        """Shadowed guest tables lie in the gfn's 2 MiB block."""
        return any(table // ENTRIES == gfn // ENTRIES for table, numbers in self._of_gfn.items() if numbers)

    @staticmethod
    def _may_go_together(serve: Index, alone: Index, denied: Index, tables: Index) -> Index:
        """Of each group's first fault: those ahead of the first that needs another shadow page, else that one alone.

        Of two that touch the same gfn by different addresses only the first goes.
        """
        if alone.size:
            ahead = serve[serve < alone[0]]
            serve = ahead if ahead.size else serve[serve == alone[0]]
        _, first = np.unique(tables[np.searchsorted(denied, serve)], return_index=True)
        return serve[np.sort(first)]

    def _serve(
        self, cpu: Any, part: Any, which: Index, walk: Walk, page: Index, entry: Index, word: Words, out: Settled
    ) -> tuple[NDArray[np.void], Bools]:
        """Serve faults of different groups; say which accesses are over (the others are tried again)."""
        bits, memory = self.bits, self.memory
        part = part.take(which)
        write, fetch = _stores(part.op), part.op == 3
        gfn = (walk.gpa >> np.uint64(12)).astype(np.int64)
        special = (page >= 0) & (self.mmio[page, entry] >= 0)
        present = word & bits.present != 0
        record = np.zeros(which.shape, dtype=FAULT)
        record["access"] = record["order"] = which
        record["vcpu"], record["gva"], record["address"], record["gfn"] = cpu.number, part.gva, part.gva, gfn
        record["code"] = (present | special) * CODE_P | write * CODE_W | part.user * CODE_U | fetch * CODE_F
        record["code"] |= special * CODE_RSVD
        record["old"] = self._shown(page, entry, word, gfn)
        record["path"], record["ret"] = SLOW, RET_FIXED

        known = special & (self.mmio[page, entry] == memory.generation)
        record["path"][known], record["ret"][known] = MMIO, RET_NONE
        fixed = np.zeros(which.shape, dtype=np.bool)
        if self.kernel.policy == "2012":
            record["printed"] = present & write
            fixed = present & write & (word & bits.mmu_w != 0)
            self.sptes[page[fixed], entry[fixed]] |= bits.w
            record["path"][fixed] = FAST_FIXED
            slot, index = memory.locate(self.gfn[page[fixed], entry[fixed]])
            self.on_dirty(which[fixed], slot, index)
        injected = ~known & ~fixed & walk.fault
        record["path"][injected], record["ret"][injected] = INJECTED, RET_RETRY
        out.fault[which[injected]], out.code[which[injected]] = True, walk.code[injected]
        for row in np.flatnonzero(injected & (walk.code & (CODE_P | CODE_RSVD) == CODE_P)).tolist():
            self.invlpg(cpu, int(part.gva[row]), everywhere=False)

        go = np.flatnonzero(~known & ~fixed & ~injected)
        if go.size:
            self._fill(cpu, part.take(go), which[go], walk.take(go), page[go], entry[go], word[go], go, record)
        device = (record["path"] == MMIO) | (record["path"] == EMULATE) & self._left_to_device(gfn)
        stored = (record["path"] == EMULATE) & ~device
        out.emulated[which[device]] = True
        out.gpa[which[device | stored]] = walk.gpa[device | stored]
        page, entry = self._find(self._root(cpu).pages, part.gva)
        after = np.where(page >= 0, self.sptes[page, entry], np.uint64(0))
        record["new"] = self._shown(page, entry, after, gfn)
        return record, injected | device | stored | (record["path"] == FAILED)

    def _left_to_device(self, gfn: Index) -> Bools:
        slot, _ = self.memory.locate(gfn)
        return (slot == HOLE) | self.memory.property_of(slot, "readonly").astype(np.bool)

    def _fill(
        self, cpu: Any, part: Any, which: Index, walk: Walk, page: Index, entry: Index, word: Words, at: Index,
        record: NDArray[np.void],
    ) -> None:  # fmt: skip
        """The guest allows these accesses: mark its entries, find the host pages, build the sptes, prefetch."""
        bits, memory = self.bits, self.memory
        write = _stores(part.op)
        gfn = (walk.gpa >> np.uint64(12)).astype(np.int64)
        index = self._indices(gfn)
        slot, _ = memory.locate(gfn)
        self._mark_entries(cpu, which, walk)
        rights = self._rights(cpu, part, walk)

        refused = np.uint8(RET_EMULATE if self.kernel.release == "6.1" else RET_WRITE_PROTECTED)
        present = word & bits.present != 0
        tracked = write & present & (self.tracked[index] > 0)
        self._calm(cpu, part.gva[tracked])
        self._emulate(cpu, part, which, walk, at, record, tracked, refused)
        hole = ~tracked & (slot == HOLE)
        readonly = ~tracked & write & memory.property_of(slot, "readonly").astype(np.bool)
        record["path"][at[readonly]], record["ret"][at[readonly]] = EMULATE, RET_EMULATE
        record["path"][at[hole]], record["ret"][at[hole]] = MMIO, RET_EMULATE

        ask = np.flatnonzero(~tracked & ~hole & ~readonly)
        answer = memory.ask_host(slot[ask], index[ask], write[ask])
        if answer.notified.any():
            _, block = memory.same_block(slot[ask][answer.split], index[ask][answer.split])
            self._clear(*np.nonzero(self._mapping(np.append(block, index[ask][answer.notified]))))
        record["path"][at[ask[answer.notified]]], record["ret"][at[ask[answer.notified]]] = RETRY, RET_RETRY
        record["path"][at[ask[answer.failed]]], record["ret"][at[ask[answer.failed]]] = FAILED, RET_NONE
        done = np.zeros(which.shape, dtype=np.bool)
        done[ask] = ~answer.notified & ~answer.failed
        if self.kernel.mmio_caching:
            done |= hole
        if not done.any():
            return
        goal = 1
        if page[0] < 0 or (walk.level[0] > 1 and page.size == 1):  # what needs another shadow page is served alone
            *where, goal = self._build(cpu, part, walk, int(rights[0]), slot, index)
            page, entry = np.array(where, dtype=np.int64)[:, None]
        self._calm(cpu, part.gva[done])
        special = done & hole
        self.mmio[page[special], entry[special]] = memory.generation
        self.gfn[page[special], entry[special]] = gfn[special]

        mapped = np.flatnonzero(done & ~hole)
        inside = np.isin(ask, mapped)
        pfn, host = answer.pfn[inside], answer.writable[inside]
        host &= ~memory.property_of(slot[mapped], "readonly").astype(np.bool)
        within = gfn[mapped] & (ENTRIES - 1) if goal > 1 else np.zeros_like(mapped)
        pfn -= within.astype(np.uint64)
        old = self.sptes[page[mapped], entry[mapped]]
        moved = (old & bits.present != 0) & (old >> bits.frame & np.uint64((1 << 40) - 1) != pfn)
        old[moved] = 0
        wants = (rights[mapped] & WRITE != 0) & host & (old & bits.w == 0)
        barred = self.tracked[index[mapped]] > 0
        self._unsync_gfns(gfn[mapped][wants & ~barred])
        new = make_spte(
            pfn, level=goal, access=rights[mapped], host_writable=host, shadowed=barred, layout=self.kernel.layout,
            nx_huge_pages=self.kernel.nx_huge_pages, old=self._shown(page[mapped], entry[mapped], old, gfn[mapped]),
        )  # fmt: skip
        self._put(page[mapped], entry[mapped], new, gfn[mapped] - within, index[mapped] - within, rights[mapped])
        self.has_large |= goal > 1
        same = new == old
        record["path"][at[mapped[same]]], record["ret"][at[mapped[same]]] = SPURIOUS, RET_SPURIOUS
        dirtied = new & bits.w != 0
        self.on_dirty(which[mapped[dirtied]], slot[mapped[dirtied]], index[mapped[dirtied]])
        emulate = np.zeros(which.shape, dtype=np.bool)
        emulate[mapped] = wants & barred & write[mapped]
        self._emulate(cpu, part, which, walk, at, record, emulate, refused)
        again = done.copy()
        again[mapped[same]] = False
        again &= goal == 1
        direct = self.base[page] >= 0
        self._prefetch(cpu, page[again & ~direct], entry[again & ~direct])
        self._prefetch_direct(page[again & direct], entry[again & direct])

    def _emulate(
        self,
        cpu: Any,
        part: Any,
        which: Index,
        walk: Walk,
        at: Index,
        record: NDArray[np.void],
        rows: Bools,
        ret: np.uint8,
    ) -> None:
        """Stores to write-protected guest tables: KVM makes them itself, or gives up shadowing and lets them retry.

        An increment is no instruction that page tables are written with, so KVM unprotects the page for it.
        """
        for row in np.flatnonzero(rows).tolist():
            gpa = int(walk.gpa[row])
            record["path"][at[row]], record["ret"][at[row]] = EMULATE, ret
            if part.op[row] == 2:
                for number in list(self._of_gfn.get(gpa >> 12, ())):
                    self._zap_page(number)
                record["path"][at[row]] = RETRY
            else:
                self.emulate_store(gpa, cpu.width, int(which[row]))

    def _mark_entries(self, cpu: Any, which: Index, walk: Walk) -> None:
        """Set A in the guest's entries and D in its leaf, where they are not set; the log sees it."""
        changed = walk.used & (walk.after != walk.before)
        if changed.any():
            where = walk.entry_gpa[changed]
            self.memory.set_bits(where, walk.after[changed], cpu.format.entry_bytes)
            slot, index = self.memory.locate((where >> np.uint64(12)).astype(np.int64))
            self.on_dirty(which[np.nonzero(changed)[0]], slot, index)

    def _put(self, page: Index, entry: Index, word: Words, gfn: Index, index: Index, access: Index) -> None:
        self.sptes[page, entry] = word
        self.gfn[page, entry], self.index[page, entry], self.mmio[page, entry] = gfn, index, -1
        self.access[page, entry] = access

    def _calm(self, cpu: Any, gva: Words) -> None:
        """Faults come by: the shadow pages on the way are in use, so stores to their guest tables count anew."""
        if gva.size and self.writes.any():
            for here, _ in self._way(self._root(cpu).pages, gva):
                self.writes[here[here >= 0]] = 0

    def _build(
        self, cpu: Any, part: Any, walk: Walk, rights: int, slot: NDArray[np.int16], index: Index
    ) -> tuple[int, int, int]:
        """Make the shadow pages that are missing on the way to one address; return the last, the entry and its level.

        Below the entry that maps a large page they are direct, and have the rights of the whole walk in their roles.
        Where the rights are others now, they make way (``validate_direct_spte``); they stay to be found again.
        """
        fmt, roots, gva = cpu.format, self._root(cpu), int(part.gva[0])
        fetched = self.kernel.nx_huge_pages and bool(part.op[0] == 3)  # no large page may be executed
        here = roots.pages[0] if len(roots.pages) == 1 else roots.pages[gva >> 30 & 3]
        access, goal, gfn = ALL, 0, int(walk.gpa[0]) >> 12
        for level in range(self.pages[here].level, 0, -1):
            entry = gva >> (12 + 9 * (level - 1)) & (ENTRIES - 1)
            quadrant = entry & 1 if fmt.entry_bytes == 4 else 0
            child = int(self.child[here, entry])
            if level <= walk.level[0]:
                goal = goal or (1 if fetched else self._goal(walk, slot, index))  # the shadow pages above are there now
            if level == goal > 1 and child >= 0 and self._stays_small(child):
                goal -= 1
            if level == goal:
                break
            if not goal:
                guest = int(walk.before[0, fmt.levels - level])
                access &= guest & (WRITE | USER) | (0 if fmt.nx and guest & int(paging.NX) else EXEC)
                if child < 0:
                    table = int(walk.entry_gpa[0, fmt.levels - level + 1]) >> 12
                    child = self._get(cpu, table, (level - 1, access, quadrant, roots.mode))
                    if level > 2:
                        self._sync_below(cpu, child)
                    self._link(here, entry, child)
            elif child < 0 or self.granted[child] != rights:
                if child >= 0:
                    self._unlink(here, entry)
                base = gfn >> 9 * (level - 1) << 9 * (level - 1)
                child = self._get_direct(base, (level - 1, rights, quadrant, roots.mode))
                self._link(here, entry, child)
                self.pages[child].fetched |= fetched
            here = int(self.child[here, entry])
        if int(self.child[here, entry]) >= 0:
            self._unlink(here, entry)  # a large spte in place of a table
        return here, entry, goal

    def _prefetch(self, cpu: Any, page: Index, entry: Index) -> None:
        """Fill the empty neighbours of fresh sptes, from the left, until one cannot be filled."""
        alive = np.ones(page.shape, dtype=np.bool)
        group = entry & ~np.int64(PREFETCH - 1)
        for column in range(PREFETCH if page.size else 0):
            here = group + column
            try_it = np.flatnonzero(alive & (here != entry) & (self.sptes[page, here] & self.bits.present == 0))
            if try_it.size:
                alive[try_it] = self._prefetch_entries(cpu, page[try_it], here[try_it])

    def _prefetch_direct(self, page: Index, entry: Index) -> None:
        """The same in parts of large guest pages, whose neighbours are those in guest-physical memory."""
        if not page.size:
            return
        memory, bits, shape = self.memory, self.bits, (page.size, PREFETCH)
        base, access = self.base[page], np.repeat(self.granted[page], PREFETCH)
        here = ((entry & ~np.int64(PREFETCH - 1))[:, None] + np.arange(PREFETCH, dtype=np.int64)).ravel()  # (8 faults,)
        gfn, page = np.repeat(base, PREFETCH) + here, np.repeat(page, PREFETCH)
        index = self._indices(gfn)
        slot, _ = memory.locate(gfn)
        own = np.repeat(memory.locate(base + entry)[0], PREFETCH)
        logged, readonly = (memory.property_of(own, name).astype(np.bool) for name in ("logged", "readonly"))
        empty = self.sptes[page, here] & bits.present == 0
        inside = (slot == own) & (own != HOLE)
        ready = inside & memory.host_property(slot, index, "writable")
        alive = (~readonly & ~(logged & (access & WRITE != 0))).reshape(shape)[:, 0]
        fill = prefetched(empty.reshape(shape), ready.reshape(shape), inside.reshape(shape), alive).ravel()
        page, here, gfn, index, access, slot = (column[fill] for column in (page, here, gfn, index, access, slot))
        barred = (self.tracked[index] > 0) | self._shadowed(gfn, sync_only=True)
        new = make_spte(
            memory.frames(slot, index), access=access, shadowed=barred, prefetch=True, layout=self.kernel.layout
        )
        self._put(page, here, new, gfn, index, access)

    def _prefetch_entries(self, cpu: Any, page: Index, entry: Index, *, logged_too: bool = False) -> Bools:
        """``prefetch_gpte``: fill one spte of each page, if the guest's entry has A and the host has the page."""
        memory = self.memory
        gpte = np.zeros(page.shape, dtype=np.uint64)
        access, gfn = np.zeros(page.shape, dtype=np.int64), np.zeros(page.shape, dtype=np.int64)
        good = np.zeros(page.shape, dtype=np.bool)
        for number in np.unique(page).tolist():
            mine = page == number
            gpte[mine] = self._table_entries(cpu, number, entry[mine])
            good[mine], access[mine], gfn[mine] = self._judge_entries(cpu, self.pages[number], gpte[mine])
        self._clear(page[~good], entry[~good])
        index = self._indices(gfn)
        slot, _ = memory.locate(gfn)
        writes = access & WRITE != 0
        logged, readonly = (memory.property_of(slot, name).astype(np.bool) for name in ("logged", "readonly"))
        good &= (slot != HOLE) & ~readonly & ~(logged & writes & (not logged_too))
        good &= memory.host_property(slot, index, "writable")
        barred = (self.tracked[index] > 0) | self._shadowed(gfn, sync_only=True)
        new = make_spte(
            memory.frames(slot, index), access=access, shadowed=barred, prefetch=True, layout=self.kernel.layout
        )
        self._put(page[good], entry[good], new[good], gfn[good], index[good], access[good])
        dirtied = good & (new & self.bits.w != 0)
        self.on_dirty(np.full(int(dirtied.sum()), -1, dtype=np.int64), slot[dirtied], index[dirtied])
        return good

    def _shown(self, page: Index, entry: Index, word: Words, gfn: Index) -> Words:
        """The spte as KVM would print it: an MMIO spte carries its generation."""
        if not len(self.mmio):
            return word
        generation = np.where(page >= 0, self.mmio[page, entry], np.int64(-1))
        special = (word & self.bits.present == 0) & (generation >= 0)
        if special.any():
            entry_word = make_mmio(
                gfn.astype(np.uint64), generation=np.maximum(generation, 0).astype(np.uint64), layout=self.kernel.layout
            )
            word = np.where(special, entry_word, word)
        return word

    # What others do to the sptes -------------------------------------------------------------------------------------

    def protect(self, index: Index) -> None:
        """Write-protect pages for the dirty log, wherever they are mapped: only W goes."""
        if index.size and len(self.sptes):
            self.sptes[self._mapping(index)] &= ~self.bits.w

    def log_cleared(self, index: Index) -> None:
        """KVM_CLEAR_DIRTY_LOG found these pages dirty: large sptes left alone until now lose W for good."""
        if self.memory.manual and self.memory.initially_set and self.has_large:
            where = self._mapping(index) & self._is_large(self.sptes)
            self.sptes[where] &= ~(self.bits.w | self.bits.mmu_w)

    def log_stopped(self, slot: Slot) -> None:
        """The dirty log is off: small sptes of large guest pages go where the host has a huge page."""
        for (gfn, (level, *_)), number in self._of_large.items():
            where, index = self.memory.locate(np.array([gfn], dtype=np.int64))
            huge = self.memory.may_be_huge(where, np.array([gfn], dtype=np.int64))
            huge &= self.memory.host_property(where, index, "mapped_huge")
            if level == 1 and slot.base <= gfn < slot.base + slot.pages and huge[0] and not self._tables_within(gfn):
                entry = np.flatnonzero(self.sptes[number] & self.bits.present != 0)
                self._clear(np.full(entry.shape, number, dtype=np.int64), entry)

    def zap(self, slot: Slot, page: Index) -> None:
        """The mmu notifier's unmap of some pages of a slot."""
        if len(self.sptes):
            self._clear(*np.nonzero(self._mapping(slot.first + page)))


def _first_of(tables: Index, denied: Index, gfn: Index, none: int) -> Index:
    """For each touch the position of the first faulting touch of the same gfn; ``none`` where there is none."""
    names, first = np.unique(tables, return_index=True)
    if not names.size:
        return np.full(gfn.shape, none, dtype=np.int64)
    at = np.minimum(np.searchsorted(names, gfn), names.size - 1)
    return np.where(names[at] == gfn, denied[first[at]], np.int64(none))
