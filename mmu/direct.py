"""The direct MMU: one spte per gfn, because KVM's table maps guest-physical addresses themselves.

This is the MMU of nested paging (EPT, NPT) and of guests that have not switched paging on. Its state is flat: an spte
for each page, one for each 2 MiB block, and the rights that the CPU finds there. :meth:`DirectMMU.settle` takes a
whole array of touches and returns every fault that they cause. Faults on different pages do not disturb each other
(PTE prefetch couples eight neighbours, a huge page 512), so the first faulting touch of every such *unit* is served
at the same time, then the second, and so on: the loop runs over faults per unit, never over touches. Chapters 1, 4.

Facts: Linux 6.1 ``arch/x86/kvm/mmu/mmu.c`` (``direct_page_fault``, ``fast_page_fault``, ``__direct_map``,
``direct_pte_prefetch_many``, ``handle_mmio_page_fault``), ``spte.c`` (``make_spte``), ``tdp_mmu.c``
(``kvm_tdp_mmu_map``; since 6.2 it splits a huge page on a fault where 6.1 zaps it). What the kernel does otherwise:
prefetch goes on behind a slot's border that is no multiple of eight pages; with Intel's page-modification logging KVM
clears D where this module clears W.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mmu.host import HUGE_PAGES
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
    FAST_NOT_FIXED,
    FAULT,
    MMIO,
    PREFETCH,
    RET_EMULATE,
    RET_FIXED,
    RET_NONE,
    RET_RETRY,
    RETRY,
    SLOW,
    Bools,
    Index,
    Kernel,
    Masks,
    Touches,
    Words,
    independent,
    prefetched,
)
from mmu.pfec import PFEC
from mmu.slots import HOLE, GuestMemory, Slot
from mmu.update import make_mmio, make_spte

_FINAL, _WALK = np.uint64(PFEC.mask("GUEST_FINAL")), np.uint64(PFEC.mask("GUEST_PAGE"))
OPEN = CAN_READ | CAN_WRITE | CAN_FETCH
SCAN = 1 << 12  # pages looked at together in the search for one that is not open
HUGE, GROUP, WHOLE = 9, 3, 52  # how far gfns are shifted to number 2M blocks, groups of eight, whole slots
TABLE = np.uint64(1)  # in ``DirectMMU.blocks``: a table of 4K sptes stands below


class DirectMMU:
    """The sptes of one guest's direct MMU.

    Args:
        memory: the guest's slots.
        kernel: whose rules.

    Attributes:
        sptes: the 4K sptes ``# (index,)``.
        rights: what the CPU may do with each page ``# (index,)``, be it through a 4K or a 2M spte.
        mmio: the generation of each MMIO spte ``# (index,)``, -1 where there is none.
        blocks: the 2M entries ``# (block,)``: 0, ``TABLE``, or a large spte.
        fetched: that a fetch made the table there, under ``nx_huge_pages`` ``# (block,)``.
    """

    def __init__(self, memory: GuestMemory, kernel: Kernel) -> None:
        self.memory, self.kernel = memory, kernel
        self.bits = Masks(kernel.layout)
        self.prefetches = not kernel.uses_tdp_mmu
        self.sptes = np.zeros(0, dtype=np.uint64)
        self.rights = np.zeros(0, dtype=np.uint8)
        self.mmio = np.zeros(0, dtype=np.int64)
        self.blocks = np.zeros(0, dtype=np.uint64)
        self.fetched = np.zeros(0, dtype=np.bool)
        self._block_of: dict[int, int] = {}  # a slot's first index -> its first block
        self._lead = np.zeros(0, dtype=np.int64)
        self._closed: dict[int, int] = {}  # a slot's first index -> that of its first page that may not be open
        self.on_dirty: Callable[[Index, NDArray[np.int16], Index], None] = lambda order, slot, index: None
        self.grow()

    # Shape -----------------------------------------------------------------------------------------------------------

    def grow(self) -> None:
        """Follow the slots: every page and every block of theirs gets an entry."""
        more = self.memory.size - self.sptes.size
        if more > 0:
            self.sptes = np.concatenate([self.sptes, np.zeros(more, dtype=np.uint64)])
            self.rights = np.concatenate([self.rights, np.zeros(more, dtype=np.uint8)])
            self.mmio = np.concatenate([self.mmio, np.full(more, -1, dtype=np.int64)])
        for slot in self.memory.slots:
            if slot.first not in self._block_of:
                self._block_of[slot.first] = self.blocks.size
                count = (slot.base + slot.pages - 1) // HUGE_PAGES - slot.base // HUGE_PAGES + 1
                self.blocks = np.concatenate([self.blocks, np.zeros(count, dtype=np.uint64)])
                self.fetched = np.concatenate([self.fetched, np.zeros(count, dtype=np.bool)])

    def slot_added(self, slot: Slot) -> None:
        """A slot came where guests had met holes: their MMIO sptes stay until someone faults on them."""
        self.grow()
        gfn, index = self.memory.holes(slot.base, slot.pages)
        self.mmio[gfn - slot.base + slot.first] = self.mmio[index]

    def _block(self, slot: NDArray[np.int16], gfn: Index) -> Index:
        """The entry of ``blocks`` above each gfn; -1 for a hole."""
        table = np.array(
            [self._block_of[s.first] - s.base // HUGE_PAGES for s in self.memory.slots] + [0], dtype=np.int64
        )
        return np.where(slot == HOLE, np.int64(-1), table[slot] + gfn // HUGE_PAGES)

    def _gfn(self, slot: NDArray[np.int16], index: Index) -> Index:
        """The gfns of pages that lie in slots."""
        return index - self.memory.property_of(slot, "first") + self.memory.property_of(slot, "base")

    def _pages_of(self, slot: NDArray[np.int16], gfn: Index) -> Index:
        """The indices of all pages in each gfn's block ``# (gfn, 512)``; the block must lie wholly in its slot."""
        table = np.array([s.first - s.base for s in self.memory.slots] + [0], dtype=np.int64)
        start = table[slot] + gfn // HUGE_PAGES * HUGE_PAGES
        return start[:, None] + np.arange(HUGE_PAGES, dtype=np.int64)

    # Faults ----------------------------------------------------------------------------------------------------------

    def faults_now(self, touches: Touches) -> Bools:
        """Which touches the CPU would not let through as things stand ``# (touch,)``."""
        self.grow()
        need = np.where(touches.write, CAN_WRITE, np.where(touches.fetch, CAN_FETCH, CAN_READ))
        return self.rights.take(touches.index) & need == 0

    def closed(self, slot: Slot) -> bool:
        """Some page of the slot is not open for everything. Cheap: the search goes on where it last stopped."""
        self.grow()
        at, end = self._closed.get(slot.first, slot.first), slot.first + slot.pages
        while at < end:
            shut = self.rights[at : min(at + SCAN, end)] != OPEN
            ahead = int(shut.argmax())
            if shut[ahead]:
                self._closed[slot.first] = at + ahead
                return True
            at += shut.size
        self._closed[slot.first] = end
        return False

    @property
    def has_huge(self) -> bool:
        """Some slot is mapped by large sptes, or could be."""
        return bool((self._units()[0] >= HUGE).any())

    def repair(self, slot: NDArray[np.int16], index: Index, op: NDArray[np.uint8], denied: Index) -> tuple[int, Index]:
        """Serve at once what the fast path repairs among denied accesses; return how many faults it was, and the rest.

        For small sptes alone: a write-protect fault on one sets W, and that is all there is to it.
        """
        page = index[denied]
        word = self.sptes.take(page)
        mine = (op[denied] != 0) & (word & (self.bits.mmu_w | self.bits.w) == self.bits.mmu_w)
        if self.kernel.policy == "none" or not mine.any():
            return 0, denied
        if mine.all():
            left = denied[:0]
        else:
            page, word, left, denied = page[mine], word[mine], denied[~mine], denied[mine]
        here = np.arange(page.size, dtype=np.uint64)
        self.sptes[page] = here  # lent to find one touch of each page: an array of its own would miss the cache again
        first = np.flatnonzero(self.sptes.take(page) == here)
        self.sptes[page] = word | self.bits.w
        self.rights[page] |= CAN_WRITE
        self.on_dirty(first, slot[denied[first]], page[first])
        return first.size, left

    def may_fault(self, touches: Touches) -> Bools:
        """The same, and those that are let through now but lie in a huge page, which may go with all it maps."""
        return self.faults_now(touches) | (self._units()[0][touches.slot] >= HUGE)

    def settle(self, vcpu: int, touches: Touches) -> tuple[NDArray[np.void], Bools]:
        """Let touches happen; return their faults in order, and which touches ended in emulation ``# (touch,)``."""
        emulated = np.zeros(touches.index.shape, dtype=np.bool)
        shift, start, total = self._units()
        waiting = np.flatnonzero(self.may_fault(touches))
        if self._lead.size < total + self.memory.size:
            self._lead = np.zeros(total + self.memory.size, dtype=np.int64)
        records = [np.zeros(0, dtype=FAULT)]
        while waiting.size:
            t = touches.take(waiting)
            unit = start[t.slot] + (t.gpa.astype(np.int64) >> 12 + shift[t.slot])
            hole = t.slot == HOLE
            unit[hole] = total + t.index[hole]
            allowed = ~self.faults_now(t)
            lead, now = independent(unit, allowed, self._inert(t), self._lead)
            record, ends = self._fault(vcpu, touches.take(waiting[now]))
            records.append(record)
            emulated[waiting[now]] = ends
            over = allowed & (np.arange(waiting.size, dtype=np.int64) < lead)
            waiting = waiting[~over & ~emulated[waiting]]
        faults = np.concatenate(records)
        return faults[np.argsort(faults["order"], kind="stable")], emulated  # rounds stay in order within a touch

    def _inert(self, t: Touches) -> Bools:
        """Touches whose fault will change no state."""
        readonly = self.memory.property_of(t.slot, "readonly").astype(np.bool)
        if not readonly.any() and not (t.slot == HOLE).any():
            return np.zeros(t.index.shape, dtype=np.bool)
        known = self.mmio[t.index] == self.memory.generation
        uncached = (t.slot == HOLE) & (not self.kernel.mmio_caching)
        return known | uncached | (readonly & t.write & (self.mmio[t.index] < 0))

    def _units(self) -> tuple[Index, Index, int]:
        """For each slot (and, last, for holes) how far gfns are shifted to make unit numbers, and where they start."""
        shift, start, total = [], [], 0
        for slot in self.memory.slots:
            first = self._block_of[slot.first]
            count = (slot.base + slot.pages - 1) // HUGE_PAGES - slot.base // HUGE_PAGES + 1
            large = slot.backing.huge or bool((self.blocks[first : first + count] & self.bits.large).any())
            skew = slot.base - slot.offset - slot.backing.ahead
            width = GROUP if self.prefetches else 0
            if large:
                width = WHOLE if skew % HUGE_PAGES else HUGE  # the host's blocks lie across the guest's
            shift.append(width)
            start.append(total - (slot.base >> width))
            total += ((slot.base + slot.pages - 1) >> width) - (slot.base >> width) + 1
        return np.array([*shift, 0], dtype=np.int64), np.array([*start, 0], dtype=np.int64), total

    def _fault(self, vcpu: int, t: Touches) -> tuple[NDArray[np.void], Bools]:
        """Serve faults on pages of different units: the error code, the path, the return, and the new state."""
        bits, memory = self.bits, self.memory
        gfn = (t.gpa >> np.uint64(12)).astype(np.int64)
        block = self._block(t.slot, gfn)
        entry = np.where(block < 0, np.uint64(0), self.blocks[block] if self.blocks.size else np.uint64(0))
        large = entry & bits.large != 0
        old = np.where(large, entry, self.sptes[t.index])
        present = old & bits.present != 0
        special = ~present & (self.mmio[t.index] >= 0)
        current = special & (self.mmio[t.index] == memory.generation)
        logged = memory.property_of(t.slot, "logged").astype(np.bool)

        record = np.zeros(t.index.shape, dtype=FAULT)
        record["access"], record["vcpu"], record["gva"], record["address"] = t.access, vcpu, t.gva, t.gpa
        record["gfn"], record["order"] = gfn, t.order
        record["code"] = self._code(t, present | special, special)
        record["old"] = self._shown(old, t.index, gfn)
        record["path"], record["ret"] = SLOW, RET_FIXED

        # A valid MMIO spte needs no handler: the instruction is emulated.
        record["path"][current], record["ret"][current] = MMIO, RET_NONE
        # The fast path looks at every store that met a present spte, and says so.
        tried = present & t.write & (self.kernel.policy != "none")
        refused = large & logged if self.kernel.policy in ("6.1", "6.12") else np.zeros_like(large)
        fixed = tried & (old & bits.mmu_w != 0) & ~refused
        record["printed"] = tried
        self._set_w(t.take(np.flatnonzero(fixed)), block[fixed], large[fixed], gfn[fixed])
        self._dirty(t, fixed)
        record["path"][fixed] = FAST_FIXED
        slow = ~current & ~fixed

        hole = slow & (t.slot == HOLE)
        record["path"][hole], record["ret"][hole] = MMIO, RET_EMULATE
        if self.kernel.mmio_caching:
            self.mmio[t.index[hole]] = memory.generation
        refuse = slow & ~hole & t.write & memory.property_of(t.slot, "readonly").astype(np.bool)
        record["path"][refuse], record["ret"][refuse] = EMULATE, RET_EMULATE
        ask = np.flatnonzero(slow & ~hole & ~refuse)
        if ask.size:
            self._map(t.take(ask), gfn[ask], block[ask], large[ask], logged[ask], ask, record)
        record["path"] = np.where(tried & (record["path"] == SLOW), FAST_NOT_FIXED, record["path"])
        record["new"] = self._shown(self._entry(t.index, block), t.index, gfn)
        return record, current | hole | refuse | (record["path"] == FAILED)

    def _map(
        self,
        t: Touches,
        gfn: Index,
        block: Index,
        large: Bools,
        logged: Bools,
        where: Index,
        record: NDArray[np.void],
    ) -> None:
        """The slow path: ask the host for the page, choose the level, install the spte, prefetch around it."""
        bits, memory = self.bits, self.memory
        answer = memory.ask_host(t.slot, t.index, t.write)
        readonly = memory.property_of(t.slot, "readonly").astype(np.bool)
        writable = answer.writable & ~readonly
        self._zap(t.slot[answer.notified], t.index[answer.notified], gfn[answer.notified])
        if answer.split.any():
            slot, index = memory.same_block(t.slot[answer.split], t.index[answer.split])
            self._zap(slot, index, self._gfn(slot, index))
        record["path"][where[answer.notified]], record["ret"][where[answer.notified]] = RETRY, RET_RETRY
        record["path"][where[answer.failed]], record["ret"][where[answer.failed]] = FAILED, RET_NONE

        done = ~answer.notified & ~answer.failed
        wants_huge = (
            done & self.memory.may_be_huge(t.slot, gfn) & ~logged & memory.host_property(t.slot, t.index, "mapped_huge")
        )
        if self.kernel.nx_huge_pages:  # small sptes stay: 6.1 all of them, 6.12 those that were made for a fetch
            stays = (self.blocks[block] == TABLE) & (self.fetched[block] | np.bool(self.kernel.release == "6.1"))
            wants_huge &= ~t.fetch & ~stays
        self._install_huge(t, gfn, block, wants_huge, answer.pfn, writable)
        small = done & ~wants_huge
        made = np.flatnonzero(small & (self.blocks[block] != TABLE))[::-1]  # of several faults the first decides
        self.fetched[block[made]] = t.fetch[made]
        self._make_table(t.slot[small], gfn[small], block[small], large[small])
        which = t.index[small]
        self.sptes[which] = self._make(
            answer.pfn[small], writable[small], self._shown(self.sptes[which], which, gfn[small])
        )
        self.rights[which] = bits.rights(self.sptes[which])
        self.mmio[which] = -1
        self._dirty(t, small & writable)
        if self.prefetches and small.any():
            self._prefetch(t.slot[small], gfn[small], which)

    def _make(
        self,
        pfn: Words,
        host_writable: Bools | bool = True,
        old: Words | int = 0,
        *,
        level: int = 1,
        prefetch: bool = False,
    ) -> Words:
        """The leaf for each pfn; a direct MMU leaves rights to the host."""
        return make_spte(
            pfn, level=level, host_writable=host_writable, prefetch=prefetch, old=old,
            nx_huge_pages=self.kernel.nx_huge_pages, layout=self.kernel.layout,
        )  # fmt: skip

    def _dirty(self, t: Touches, which: Bools) -> None:
        if which.any():
            self.on_dirty(t.order[which], t.slot[which], t.index[which])

    def _install_huge(self, t: Touches, gfn: Index, block: Index, which: Bools, pfn: Words, writable: Bools) -> None:
        """Map whole blocks by large sptes; what stood below is gone."""
        if not which.any():
            return
        pages = self._pages_of(t.slot[which], gfn[which])  # (fault, 512)
        entry = self._make(pfn[which] & ~np.uint64(HUGE_PAGES - 1), writable[which], level=2)
        self.blocks[block[which]] = entry
        self.sptes[pages] = 0
        self.rights[pages] = self.bits.rights(entry)[:, None]
        self.mmio[pages] = -1

    def _make_table(self, slot: NDArray[np.int16], gfn: Index, block: Index, large: Bools) -> None:
        """Put tables of 4K sptes where large sptes stood: split by 6.12's TDP MMU, else zapped and left empty."""
        self._closed.clear()
        if large.any():
            if self.kernel.uses_tdp_mmu and self.kernel.release == "6.12":
                self._split(slot[large], gfn[large], block[large])
            else:
                self.rights[self._pages_of(slot[large], gfn[large])] = 0
        self.blocks[block] = TABLE

    def _split(self, slot: NDArray[np.int16], gfn: Index, block: Index) -> None:
        """Replace large sptes by 512 small ones each, which keep W, A and D (``make_huge_page_split_spte``)."""
        pages = self._pages_of(slot, gfn)  # (block, 512)
        entry = self.blocks[block] & ~self.bits.large
        if self.kernel.nx_huge_pages:
            entry = entry & ~self.bits.no_execute | self.bits.execute
        frames = np.arange(HUGE_PAGES, dtype=np.uint64) << self.bits.frame
        self.sptes[pages] = entry[:, None] | frames
        self.rights[pages] = self.bits.rights(entry)[:, None]
        self.blocks[block] = TABLE

    def _prefetch(self, slot: NDArray[np.int16], gfn: Index, index: Index) -> None:
        """Fill the up to seven aligned neighbours of each freshly mapped page from writable, resident host pages.

        Logged and read-only slots give nothing at all.
        """
        memory, bits = self.memory, self.bits
        base, pages, first = (memory.property_of(slot, name) for name in ("base", "pages", "first"))
        logged, readonly = (memory.property_of(slot, name).astype(np.bool) for name in ("logged", "readonly"))
        group = gfn & ~np.int64(PREFETCH - 1)
        neighbour = group[:, None] + np.arange(PREFETCH, dtype=np.int64)  # (fault, 8) gfns
        inside = (neighbour >= base[:, None]) & (neighbour < (base + pages)[:, None])
        at = np.where(inside, neighbour - base[:, None] + first[:, None], index[:, None])
        empty = ~inside | (self.sptes[at] & bits.present == 0)  # a neighbour outside the slot has no spte either
        ready = inside & memory.host_property(np.repeat(slot, PREFETCH), at.ravel(), "writable").reshape(at.shape)
        fill = prefetched(empty, ready, inside, ~logged & ~readonly)
        target = at[fill]
        if target.size:
            where = np.repeat(slot, PREFETCH).reshape(at.shape)[fill]
            self.sptes[target] = self._make(memory.frames(where, target), prefetch=True)
            self.rights[target] = bits.rights(self.sptes[target])
            self.mmio[target] = -1

    def _set_w(self, t: Touches, block: Index, large: Bools, gfn: Index) -> None:
        self.sptes[t.index[~large]] |= self.bits.w
        self.rights[t.index] |= CAN_WRITE
        if large.any():
            self.blocks[block[large]] |= self.bits.w
            self.rights[self._pages_of(t.slot[large], gfn[large])] |= CAN_WRITE

    def _code(self, t: Touches, present: Bools, special: Bools) -> Words:
        """The error code: as nested paging reports it, or as a #PF of an unpaged guest.

        NPT counts every guest access as a user's; for EPT KVM makes U of a read, and an MMIO spte is a
        misconfiguration, which says RSVD and nothing else.
        """
        code = present * CODE_P | t.write * CODE_W | special * CODE_RSVD | t.fetch * CODE_F
        if not self.kernel.nested_paging:
            return code | t.user * CODE_U
        where = np.where(t.walk, _WALK, _FINAL)
        if self.bits.execute:
            return np.where(special, CODE_RSVD, code | (~t.write & ~t.fetch) * CODE_U | where)
        return code | CODE_U | where

    def _entry(self, index: Index, block: Index) -> Words:
        entry = np.where(block < 0, np.uint64(0), self.blocks[block] if self.blocks.size else np.uint64(0))
        return np.where(entry & self.bits.large != 0, entry, self.sptes[index])

    def _shown(self, word: Words, index: Index, gfn: Index) -> Words:
        """The spte as KVM would print it: an MMIO spte carries its generation."""
        special = (word & self.bits.present == 0) & (self.mmio[index] >= 0)
        if special.any():
            generation = np.maximum(self.mmio[index], 0).astype(np.uint64)
            frame, access = gfn.astype(np.uint64), np.uint64(6)
            entry = make_mmio(frame, access=access, generation=generation, layout=self.kernel.layout)
            word = np.where(special, entry, word)
        return word

    # What others do to the sptes -------------------------------------------------------------------------------------

    def _zap(self, slot: NDArray[np.int16], index: Index, gfn: Index) -> None:
        """The host takes pages back: their sptes go, a large one with all that it mapped."""
        self._closed.clear()
        if not index.size:
            return
        self.sptes[index] = 0
        self.rights[index] = 0
        block = self._block(slot, gfn)
        large = self.blocks[block] & self.bits.large != 0
        if large.any():
            self.rights[self._pages_of(slot[large], gfn[large])] = 0
            self.blocks[block[large]] = 0

    def zap(self, slot: Slot, page: Index) -> None:
        """The mmu notifier's unmap of some pages of a slot."""
        position = np.full(page.shape, self.memory.slots.index(slot), dtype=np.int16)
        self._zap(position, slot.first + page, slot.base + page)

    def zap_all(self) -> None:
        """``kvm_mmu_zap_all_fast``: a slot was deleted, every spte goes, MMIO ones too."""
        self._closed.clear()
        self.sptes[:], self.rights[:], self.mmio[:], self.blocks[:] = 0, 0, -1, 0

    def protect(self, index: Index) -> None:
        """Write-protect 4K pages for the dirty log: only W goes, so that the fast path may bring it back."""
        self._closed.clear()
        word = self.sptes.take(index) & ~self.bits.w
        self.sptes[index] = word
        small = word != 0
        self.rights[index if small.all() else index[small]] &= ~CAN_WRITE

    def log_cleared(self, slot: Slot, index: Index) -> None:
        """KVM_CLEAR_DIRTY_LOG found these pages dirty: huge pages left alone until now (initially-all-set) are split.

        Those that cannot be split are write-protected for good; :meth:`protect` sees to the small ones.
        """
        if not (self.memory.manual and self.memory.initially_set and index.size):
            return
        page = index - slot.first
        word = page // 64
        last = np.append(word[1:] != word[:-1], True)
        head = np.append(True, last[:-1])
        low, high = slot.base + page[head], slot.base + page[last]  # (bitmap word,)
        blocks, high = np.concatenate([low, high]) // HUGE_PAGES, np.tile(high, 2)
        if self.kernel.eager_page_split and self.kernel.uses_tdp_mmu:
            # 6.1 splits up to ``high`` without it: a block whose first page is the last one named stays whole.
            reached = (blocks * HUGE_PAGES < high) | np.bool(self.kernel.release == "6.12")
            self._split_at(slot, np.unique(blocks[reached]))
        self._protect_large(slot, np.unique(blocks), for_good=True)

    def _large_blocks(self, slot: Slot, number: Index) -> tuple[NDArray[np.int16], Index, Index]:
        gfn = number * HUGE_PAGES
        position = np.full(gfn.shape, self.memory.slots.index(slot), dtype=np.int16)
        block = self._block(position, gfn)
        large = self.blocks[block] & self.bits.large != 0
        return position[large], gfn[large], block[large]

    def _split_at(self, slot: Slot, number: Index) -> None:
        position, gfn, block = self._large_blocks(slot, number)
        if block.size:
            self.fetched[block] = False
            self._split(position, gfn, block)

    def _protect_large(self, slot: Slot, number: Index, *, for_good: bool = False) -> None:
        position, gfn, block = self._large_blocks(slot, number)
        if block.size:
            self.blocks[block] &= ~(self.bits.w | self.bits.mmu_w) if for_good else ~self.bits.w
            self.rights[self._pages_of(position, gfn)] &= ~CAN_WRITE

    def log_started(self, slot: Slot) -> None:
        """Dirty logging was switched on: split huge pages where asked to, and write-protect everything."""
        self._closed.clear()
        number = np.arange(slot.base // HUGE_PAGES, -(-(slot.base + slot.pages) // HUGE_PAGES), dtype=np.int64)
        if self.kernel.eager_page_split and self.kernel.uses_tdp_mmu:
            self._split_at(slot, number)
        self._protect_large(slot, number)
        self.protect(np.arange(slot.first, slot.first + slot.pages, dtype=np.int64))

    def log_stopped(self, slot: Slot) -> None:
        """Dirty logging was switched off: small sptes that a huge page could replace are zapped, W is not restored."""
        self._closed.clear()
        number = np.arange(slot.base // HUGE_PAGES, -(-(slot.base + slot.pages) // HUGE_PAGES), dtype=np.int64)
        position = np.full(number.shape, self.memory.slots.index(slot), dtype=np.int16)
        gfn = number * HUGE_PAGES
        inside = self.memory.may_be_huge(position, gfn)
        position, gfn = position[inside], gfn[inside]
        block = self._block(position, gfn)
        host = self.memory.host_property(position, slot.first + gfn - slot.base, "mapped_huge")
        collapsible = host & (self.blocks[block] == TABLE)
        pages = self._pages_of(position[collapsible], gfn[collapsible])
        self.sptes[pages], self.rights[pages] = 0, 0
        if self.kernel.uses_tdp_mmu:
            self.blocks[block[collapsible]] = 0
