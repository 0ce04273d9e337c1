"""A guest: memory slots, vCPUs and an MMU, run on streams of accesses; yields every fault and every dirty bitmap.

:meth:`Guest.run` takes a stream as arrays. It cuts it at *ordering points* (on paged guests: stores to guest page
tables, INVLPG, loads of CR0 and CR3; a full dirty ring) and handles everything between two of them as whole arrays:
the guest's walks, the touches of guest-physical memory they make, the faults, what the reads return. Actions (slots,
dirty log, what the host does) are methods called between runs. Chapter 4.

What one atomic step is: one access with all its faults, one vCPU at a time. The TLB is not modelled: a CPU under test
flushed it at every exit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmu import paging
from mmu.direct import DirectMMU
from mmu.host import PAGE, Backing
from mmu.kernel import FAST_FIXED, FAULT, PATHS, Bools, Index, Kernel, Touches, Words
from mmu.shadow import EXEC, USER, Settled, ShadowMMU, Walk
from mmu.shadow import WRITE as MAY_WRITE
from mmu.slots import GuestMemory, Slot

OPS = ("R", "W", "RMW", "X", "INVLPG", "CR3", "CR0")
"""What an access does: read, write, locked increment, fetch; and the three that only paged guests order by."""
READ, WRITE, INCREMENT, FETCH, INVLPG, CR3, CR0 = np.arange(7, dtype=np.uint8)

CR0_WP, CR4_SMEP, CR4_SMAP = 1 << 16, 1 << 20, 1 << 21
EFER_LMA, EFER_NXE = 1 << 10, 1 << 11
MAXPHYADDR = 40  # of the emulated CPU under the recorded guests
BLOCK = 1 << 16  # accesses of an unpaged guest that are looked at together: their arrays stay in the CPU's cache
WINDOW = 1 << 12  # accesses of a paged guest that are walked at once, up to the next ordering point


@dataclass
class VCPU:
    """One vCPU's control registers, and what follows from them."""

    number: int
    cr0: int = 0x33
    cr3: int = 0
    cr4: int = 0
    efer: int = 0
    maxphyaddr: int = MAXPHYADDR

    @property
    def format(self) -> paging.Format | None:
        """The guest's page-table format; None while paging is off."""
        return paging.format_of(self.cr0, self.cr4, self.efer)

    @property
    def width(self) -> int:
        """Bytes of one access: 8 in long mode, else 4."""
        return 8 if self.efer & EFER_LMA and self.format is not None else 4

    @property
    def flags(self) -> dict[str, bool]:
        """What the CPU is set to, as :func:`mmu.paging.access` takes it."""
        return {
            "wp": bool(self.cr0 & CR0_WP),
            "nxe": bool(self.efer & EFER_NXE),
            "smep": bool(self.cr4 & CR4_SMEP),
            "smap": bool(self.cr4 & CR4_SMAP),
        }


class Stream(NamedTuple):
    """Accesses in order: all arrays ``# (access,)``."""

    op: NDArray[np.uint8]
    gva: Words
    value: Words
    user: Bools

    def take(self, which: slice | Index) -> Stream:
        """Only these accesses."""
        return Stream(*(column[which] for column in self))


def stream(op: ArrayLike, gva: ArrayLike, value: ArrayLike = 0, user: ArrayLike = False) -> Stream:
    """Make a :class:`Stream`; ``value`` and ``user`` may be one for all.

    Raises:
        ValueError: an op is no position in :data:`OPS`.
    """
    gva = np.asarray(gva, dtype=np.uint64)
    op = np.broadcast_to(np.asarray(op, dtype=np.uint8), gva.shape)
    if op.size and op.max() >= len(OPS):
        raise ValueError(f"op is {int(op.max())}; expected 0 to {len(OPS) - 1}, positions in {', '.join(OPS)}")
    value = np.broadcast_to(np.asarray(value, dtype=np.uint64), gva.shape)
    return Stream(op, gva, value, np.broadcast_to(np.asarray(user, dtype=np.bool), gva.shape))


AGAIN = np.dtype([("access", np.int64), ("code", np.uint64)])
"""A #PF whose delivery faulted, so that KVM injected it again: of which access, its error code."""


@dataclass
class Result:
    """What a run did: per access ``# (access,)``, and its faults in order."""

    value: Words  # what a read returned
    fault: Bools  # the guest took a #PF
    code: Words  # its error code
    faults: NDArray[np.void]  # of dtype FAULT
    exits: list[tuple[int, int, bool]] = field(default_factory=list)  # MMIO: access, address, is a write
    reinjected: NDArray[np.void] = field(default_factory=lambda: np.zeros(0, dtype=AGAIN))  # #PFs injected again


class Driven(NamedTuple):
    """What :meth:`Guest.drive` did: accesses made, faults by path ``# (path,)``, and the faults if they were kept."""

    accesses: int
    counts: Index
    faults: NDArray[np.void]


class Delivery(NamedTuple):
    """Virtual addresses of the guest's that the CPU touches to deliver an interrupt or a #PF, in this order."""

    gate: int  # in the IDT: read
    descriptor: int  # in the GDT: read
    task: int  # the stack pointer in the task state segment: read when CPL 3 is left
    stack: int  # written

    def path(self, user: bool) -> Stream:
        """The touches as accesses of the guest at CPL 0."""
        gva = np.array([self.gate, self.descriptor, *[self.task] * user, self.stack], dtype=np.uint64)
        op = np.full(gva.shape, READ, dtype=np.uint8)
        op[-1] = WRITE
        return stream(op, gva)


class Guest:
    """One virtual machine.

    Args:
        kernel: the host kernel and its switches.
    """

    def __init__(self, kernel: Kernel | None = None) -> None:
        self.kernel = Kernel() if kernel is None else kernel
        self.memory = GuestMemory()
        self.vcpus: dict[int, VCPU] = {}
        self.direct = DirectMMU(self.memory, self.kernel)
        self.shadow = ShadowMMU(self.memory, self.kernel, self._walk)
        self.direct.on_dirty = self.shadow.on_dirty = self._dirtied
        self.full_rings: list[Index] = []  # what was harvested at full rings within runs
        self.delivery: dict[int, Delivery] = {}  # by vCPU; an access at CPL 3 ends in a software interrupt then
        self.tables = np.zeros(0, dtype=np.bool)  # (index,) pages that guest page tables lie in
        self._marks: list[tuple[Index, NDArray[np.int16], Index]] = []
        self._device: list[int] = []

    # Actions ---------------------------------------------------------------------------------------------------------

    def add_slot(
        self, number: int, base: int, pages: int, flags: int = 0, backing: Backing | None = None, offset: int = 0
    ) -> Slot:
        """KVM_SET_USER_MEMORY_REGION with a new slot; gets a backing of its own when none is given."""
        slot = self.memory.add(number, base, pages, flags, backing or Backing(pages), offset)
        self.direct.slot_added(slot)
        return slot

    def remove_slot(self, slot: Slot) -> None:
        """Delete a slot: KVM drops every spte of the guest."""
        self.memory.remove(slot)
        self.direct.zap_all()
        self.shadow.zap_all()

    def set_flags(self, slot: Slot, flags: int) -> None:
        """Change a slot's flags; switching the dirty log on write-protects, off lets huge pages come back."""
        was = slot.logged
        self.memory.set_flags(slot, flags)
        if slot.logged and not was and not (self.memory.manual and self.memory.initially_set):
            self.direct.log_started(slot)
            self.shadow.protect(np.arange(slot.first, slot.first + slot.pages, dtype=np.int64))
        elif was and not slot.logged:
            self.direct.log_stopped(slot)
            self.shadow.log_stopped(slot)

    def get_dirty_log(self, slot: Slot) -> Bools:
        """The dirty bitmap ``# (page,)``; without manual protection the dirty pages are write-protected again."""
        bitmap, protect = self.memory.get_dirty_log(slot)
        self._protect(protect)
        return bitmap

    def clear_dirty_log(self, slot: Slot, first: int, bits: Bools) -> None:
        """KVM_CLEAR_DIRTY_LOG for pages ``first`` on: the named dirty pages become clean and write-protected."""
        found = self.memory.clear_dirty_log(slot, first, bits)
        self.direct.log_cleared(slot, found)
        self.shadow.log_cleared(found)
        self._protect(found)

    def harvest(self, vcpu: int) -> Index:
        """Collect a vCPU's dirty ring and reset it: the pages (indices, in order) are write-protected again."""
        taken = self.memory.ring(vcpu).harvest()
        self._protect(np.unique(taken))
        return taken

    def _protect(self, index: Index) -> None:
        self.direct.protect(index)
        self.shadow.protect(index)

    def unmapped(self, backing: Backing, page: Index) -> None:
        """The host tells KVM that pages of a backing go or change (mmu notifier)."""
        for slot in self.memory.slots:
            mine = page - slot.offset
            mine = mine[(mine >= 0) & (mine < slot.pages)]
            if slot.backing is backing and mine.size:
                self.direct.zap(slot, mine)
                self.shadow.zap(slot, mine)

    # Running ---------------------------------------------------------------------------------------------------------

    def run(self, vcpu: int, accesses: Stream, device: list[int] | None = None) -> Result:
        """Let a vCPU make accesses; ``device`` holds what reads of MMIO addresses get, in order.

        Raises:
            ValueError: there is no such vCPU.
        """
        if vcpu not in self.vcpus:
            raise ValueError(f"vCPU {vcpu} does not exist; expected one of {sorted(self.vcpus)}")
        cpu = self.vcpus[vcpu]
        count = accesses.gva.size
        result = Result(
            np.zeros(count, dtype=np.uint64), np.zeros(count, dtype=np.bool), np.zeros(count, dtype=np.uint64),
            np.zeros(0, dtype=FAULT),
        )  # fmt: skip
        self._device = list(device or [])
        parts: list[NDArray[np.void]] = [result.faults]
        start = 0
        while start < count:
            if accesses.op[start] >= INVLPG and not accesses.user[start]:  # touches no memory
                self._order(cpu, int(accesses.op[start]), int(accesses.gva[start]))
                start += 1
                continue
            stop, walks = self._segment(cpu, accesses, start, count)
            part, walks = accesses.take(slice(start, stop)), walks.take(slice(stop - start))
            room = self._ring_room(cpu, part, walks)
            part, walks, stop = part.take(slice(room)), walks.take(slice(room)), start + room
            settled = self.shadow.settle(cpu, part, walks) if self._shadowed(cpu) else self._settle(cpu, part, walks)
            self._log(cpu)
            settled.faults["access"] += start
            parts.append(settled.faults)
            if self.memory.ring_size and self.memory.ring(vcpu).used >= self.memory.ring(vcpu).limit:
                self.full_rings.append(self.harvest(vcpu))  # the vCPU leaves before the access that filled it is made
                continue
            if not self._shadowed(cpu):
                self._mark_tables(cpu, walks)
            if cpu.number in self.delivery:
                user = bool(accesses.user[stop - 1])
                leaves = user and not accesses.user[stop : stop + 1].any()
                self._deliver(cpu, user, leaves, settled, stop - 1, parts, result)
            self._transfer(cpu, part, settled, start, result)
            if stop == start + 1:
                self._order(cpu, int(accesses.op[start]), int(accesses.gva[start]))
            start = stop
        result.faults = np.concatenate(parts)
        return result

    def drive(self, vcpu: int, accesses: Iterable[Stream], *, keep: bool = False) -> Driven:
        """Let a vCPU of an unpaged guest make accesses for their faults alone; memory does not grow with the stream.

        What :meth:`run` does, less what each access returned. The common case is fast: a block of accesses that are all
        allowed costs a gather and two byte operations each, and write-protect faults that the fast path repairs are
        served without looking further.

        Args:
            vcpu: which one.
            accesses: pieces of the stream; reads, writes, increments and fetches only.
            keep: True to keep the faults themselves too; ``access`` then counts from the first piece's start.

        Raises:
            ValueError: the guest is paged, has a dirty ring, keeps bytes, or a piece holds another op.
        """
        cpu, memory, direct = self.vcpus[vcpu], self.memory, self.direct
        if cpu.format is not None or memory.ring_size or any(s.backing.bytes is not None for s in memory.slots):
            raise ValueError("drive is for unpaged guests without a dirty ring and without bytes; use run")
        counts = np.zeros(len(PATHS), dtype=np.int64)
        kept: list[NDArray[np.void]] = [np.zeros(0, dtype=FAULT)]
        total = 0
        for piece in accesses:
            if piece.op.size and piece.op.max() > FETCH:
                raise ValueError(f"op is {int(piece.op.max())}; drive takes 0 to {int(FETCH)} only, use run")
            slot, huge = self._only_slot(piece.gva), direct.has_huge
            for start in range(0, piece.gva.size, BLOCK):
                if slot is not None and not direct.closed(slot):
                    break  # every page of the one slot is open for everything: no access can fault any more
                part = piece.take(slice(start, start + BLOCK))
                index = (part.gva >> np.uint64(12)).view(np.int64)
                if slot is None:
                    position, index = memory.locate(index)
                    direct.grow()  # a hole met for the first time has an index of its own now
                else:
                    index += slot.first - slot.base
                allowed = direct.rights.take(index)  # (access,)
                np.right_shift(allowed, part.op, out=allowed)
                np.bitwise_and(allowed, np.uint8(1), out=allowed)
                if not huge and allowed.view(np.bool).all():
                    continue
                if slot is not None:
                    position = np.full(index.shape, memory.slots.index(slot), dtype=np.int16)
                left = np.arange(index.size, dtype=np.int64) if huge else np.flatnonzero(allowed == 0)
                if not keep and not huge:
                    fixed, left = direct.repair(position, index, part.op, left)
                    counts[FAST_FIXED] += fixed
                if left.size:
                    faults, _ = direct.settle(vcpu, Touches.of(part, left, position, index))
                    counts += np.bincount(faults["path"], minlength=counts.size)
                    if keep:
                        faults["access"] += total + start
                        kept.append(faults)
                self._log(cpu)
            total += piece.gva.size
        return Driven(total, counts, np.concatenate(kept) if keep else kept[0])

    def _only_slot(self, gva: Words) -> Slot | None:
        """The slot that all these addresses lie in; None where there is no such slot."""
        if not gva.size:
            return None
        low, high = int(gva.min()) >> 12, int(gva.max()) >> 12
        return next((s for s in self.memory.slots if s.base <= low and high < s.base + s.pages), None)

    def _segment(self, cpu: VCPU, accesses: Stream, start: int, count: int) -> tuple[int, Walk]:
        """Walk ahead from ``start``; return the segment's end, and the walks of the accesses in it."""
        if cpu.format is None:
            part = accesses.take(slice(start, count))
            ordering = np.flatnonzero(part.op >= INVLPG)
            stop = start + max(int(ordering[0]), 1) if ordering.size else count
            return stop, self._walk(cpu, part)
        part = accesses.take(slice(start, min(start + WINDOW, count)))
        walks = self._walk(cpu, part)
        _, index = self.memory.locate((walks.gpa >> np.uint64(12)).astype(np.int64))
        self._find_tables(cpu)
        table = self.tables[index] & ~walks.fault
        store = (part.op == WRITE) | (part.op == INCREMENT)
        ordering = (part.op >= INVLPG) | (table & store)
        looks = table & ~store & (part.op < INVLPG)  # reads of page tables see A and D: a segment of their own
        cut = ordering | (looks != looks[0])
        leaves = accesses.user & ~np.append(accesses.user[1:], False)
        cut[1:] |= self._interrupted(cpu, walks.fault, part.user, leaves[start : start + part.gva.size])[:-1]
        cut[0] = False
        first = np.flatnonzero(cut)
        stop = 1 if ordering[0] else int(first[0]) if first.size else part.gva.size
        return start + stop, walks

    def _ring_room(self, cpu: VCPU, part: Stream, walks: Walk) -> int:
        """How many accesses can be made before a dirty ring could fill; one at least, which may fill it."""
        count = part.gva.size
        if not self.memory.ring_size:
            return count
        ring = self.memory.ring(cpu.number)
        if self._shadowed(cpu):
            pushes = self.shadow.faults_now(cpu, part) * (
                1 + walks.entry_gpa.shape[1]
            )  # the page, and A and D in tables
        else:
            touches = self._touches(part, walks)
            denied = self.direct.may_fault(touches) & self.memory.property_of(touches.slot, "logged").astype(np.bool)
            _, first = np.unique(np.where(denied, touches.index, np.int64(-1)), return_index=True)
            pushes = np.bincount(touches.access[first[denied[first]]], minlength=count)
        safe = int(np.searchsorted(np.cumsum(pushes), ring.limit - ring.used))
        return max(safe, 1)

    def _shadowed(self, cpu: VCPU) -> bool:
        return cpu.format is not None and not self.kernel.nested_paging

    def _walk(self, cpu: VCPU, part: Stream) -> Walk:
        """The guest's page walks of a part of the stream, none of them taken yet."""
        count = part.gva.size
        none = np.zeros((count, 0), dtype=np.uint64)
        fmt = cpu.format
        if fmt is None:
            clean, zero = np.zeros(count, dtype=np.bool), np.zeros(count, dtype=np.uint64)
            rights, level = zero.astype(np.int64), np.ones(count, dtype=np.uint8)
            return Walk(part.gva, clean, zero, none, none.astype(np.bool), none, none, rights, level, zero)
        shape = (count, fmt.levels)
        entry_gpa, entries = np.zeros(shape, dtype=np.uint64), np.zeros(shape, dtype=np.uint64)
        root = np.full(count, cpu.cr3 & ~(0x1F if fmt is paging.PAE else 0xFFF), dtype=np.uint64)

        def read(level: int, above: Words) -> Words:
            column = fmt.levels - level
            table = above & paging.PFN if column else root
            entry_gpa[:, column] = table + fmt.index(part.gva, level) * np.uint64(fmt.entry_bytes)
            entries[:, column] = self.memory.load(entry_gpa[:, column], fmt.entry_bytes)
            return entries[:, column]

        flags = cpu.flags
        found = paging.follow(
            read, fmt.levels, (count,), nxe=flags["nxe"], maxphyaddr=cpu.maxphyaddr, fmt=fmt
        )  # fmt: skip
        memory_op = part.op < INVLPG
        store = (part.op == WRITE) | (part.op == INCREMENT)
        out = paging.access(
            entries, write=store, fetch=part.op == FETCH, user=part.user, maxphyaddr=cpu.maxphyaddr, fmt=fmt,
            walk=found, **flags,
        )  # fmt: skip
        size = np.uint64(1) << np.array([0, *(fmt.shift(level) for level in range(1, fmt.levels + 1))], dtype=np.uint64)
        offset = size[found.level] - np.uint64(1)
        gpa = (found.leaf & paging.PFN & ~offset) | (part.gva & offset)
        last = found.level[:, None] <= np.arange(fmt.levels, 0, -1, dtype=np.uint8)  # (access, level)
        rights = found.executable * EXEC | found.writable * MAY_WRITE | found.user_page * USER
        return Walk(
            gpa, out.fault & memory_op, out.code, entry_gpa, last & memory_op[:, None], entries, out.entries,
            rights.astype(np.int64), found.level, found.leaf,
        )  # fmt: skip

    def _touches(self, part: Stream, walks: Walk) -> Touches:
        """All touches of guest-physical memory: with nested paging the CPU's walks of guest tables, then the page."""
        count = part.gva.size
        access = np.arange(count, dtype=np.int64)
        store = (part.op == WRITE) | (part.op == INCREMENT)
        nested = self.kernel.nested_paging
        levels = walks.entry_gpa.shape[1] if nested else 0
        real = (part.op < INVLPG) & ~walks.fault  # (access,)
        exists = np.concatenate([walks.used[:, :levels], real[:, None]], axis=1)  # (access, level + 1)
        gpa = np.concatenate([walks.entry_gpa[:, :levels], walks.gpa[:, None]], axis=1)[exists]
        row, column = np.nonzero(exists)
        walk = column < levels
        slot, index = self.memory.locate((gpa >> np.uint64(12)).astype(np.int64))
        return Touches(
            order=row * (levels + 1) + column,
            access=access[row],
            gva=part.gva[row],
            gpa=gpa,
            slot=slot,
            index=index,
            write=walk | store[row],  # the CPU may set A, so nested paging treats a walk as a store
            fetch=(part.op == FETCH)[row] & ~walk,
            user=part.user[row],
            walk=walk,
        )

    def _settle(self, cpu: VCPU, part: Stream, walks: Walk) -> Settled:
        """One segment on the direct MMU."""
        touches = self._touches(part, walks) if cpu.format is not None else self._plain_touches(part)
        faults, device = self.direct.settle(cpu.number, touches)
        emulated = np.zeros(part.gva.shape, dtype=np.bool)
        emulated[touches.access[device & ~touches.walk]] = True
        return Settled(faults, walks.gpa, emulated, walks.fault, walks.code)

    def _plain_touches(self, part: Stream) -> Touches:
        """The touches of an unpaged guest, one an access; only those that could fault."""
        slot, index = self.memory.locate((part.gva >> np.uint64(12)).view(np.int64))
        self.direct.grow()
        open_now = self.direct.rights.take(index) >> np.minimum(part.op, FETCH) & np.uint8(1)
        may = (part.op <= FETCH) & ((open_now == 0) | self.direct.has_huge)
        return Touches.of(part, np.flatnonzero(may), slot, index)

    def _mark_tables(self, cpu: VCPU, walks: Walk) -> None:
        """The CPU's own walks set A and D in the guest's entries."""
        changed = (walks.after != walks.before) & walks.used
        if changed.any():
            self.memory.set_bits(walks.entry_gpa[changed], walks.after[changed], cpu.format.entry_bytes)

    def _interrupted(self, cpu: VCPU, fault: Bools, user: Bools, leaves: Bools) -> Bools:
        """Accesses that end in a #PF or an interrupt whose delivery would fault as things stand ``# (access,)``."""
        ends = fault | leaves
        if cpu.number not in self.delivery or not ends.any():
            return np.zeros(ends.shape, dtype=np.bool)
        path = self.delivery[cpu.number].path(True)
        if self._shadowed(cpu):
            cold = np.flatnonzero(self.shadow.faults_now(cpu, path))
        else:
            touches = self._touches(path, self._walk(cpu, path))
            cold = touches.access[self.direct.faults_now(touches)]
        return ends & (cold.size > 0) & (user | bool((cold != Delivery._fields.index("task")).any()))

    def _deliver(
        self, cpu: VCPU, user: bool, leaves: bool, settled: Settled, access: int, parts: list[NDArray[np.void]],
        result: Result,
    ) -> None:  # fmt: skip
        """The CPU delivers a #PF, or the interrupt by which CPL 3 is left, through memory that may fault in turn.

        Only a segment's last access can meet missing pages there. After such a fault KVM injects a #PF again.
        """
        fault = bool(settled.fault[-1])
        if not (fault or leaves):
            return
        path = self.delivery[cpu.number].path(user)
        walks = self._walk(cpu, path)
        more = self.shadow.settle(cpu, path, walks) if self._shadowed(cpu) else self._settle(cpu, path, walks)
        self._log(cpu)
        again = np.zeros(fault * len(more.faults), dtype=AGAIN)
        again["access"], again["code"] = access, settled.code[-1]
        result.reinjected = np.concatenate([result.reinjected, again])
        more.faults["access"] = access
        parts.append(more.faults)

    def _dirtied(self, order: Index, slot: NDArray[np.int16], index: Index) -> None:
        self._marks.append((order, slot, index))

    def _log(self, cpu: VCPU) -> None:
        """Enter the pages dirtied in a segment into the log, in the order of the touches, which a ring records."""
        if not self.memory.ring_size:
            for _, slot, index in self._marks:
                self.memory.mark_dirty(cpu.number, slot, index)
            self._marks.clear()
        if self._marks:
            order, slot, index = (np.concatenate(parts) for parts in zip(*self._marks, strict=True))
            by_order = np.argsort(order, kind="stable")
            self.memory.mark_dirty(cpu.number, slot[by_order], index[by_order])
            self._marks.clear()

    def _transfer(self, cpu: VCPU, part: Stream, settled: Settled, start: int, result: Result) -> None:
        """Move data: reads return what was last written, devices answer, stores land in memory."""
        stop = start + part.gva.size
        result.fault[start:stop], result.code[start:stop] = settled.fault, settled.code
        width = cpu.width
        top = np.uint64((1 << 8 * width) - 1)
        store = (part.op == WRITE) | (part.op == INCREMENT)
        for access in np.flatnonzero(settled.emulated):
            result.exits.append((start + int(access), int(settled.gpa[access]), bool(store[access])))
            if not store[access] and self._device:
                result.value[start + access] = np.uint64(self._device.pop(0)) & top
        moves = np.flatnonzero(~settled.fault & ~settled.emulated & (part.op <= INCREMENT))
        address = settled.gpa[moves].astype(np.int64)
        slot, _ = self.memory.locate(address >> 12)
        for position, place in enumerate(self.memory.slots):
            mine = slot == position
            if place.backing.bytes is None or not mine.any():
                continue
            which = moves[mine]
            word = (address[mine] - place.base * PAGE) // width
            found = replay_words(self.memory.words(place, width), word, part.op[which], part.value[which] & top)
            result.value[start + which] = found & top

    def _order(self, cpu: VCPU, op: int, gva: int) -> None:
        """What an ordering access does to the vCPU, and to a shadow MMU."""
        if op == CR3:
            cpu.cr3 = gva
        elif op == CR0:
            before, cpu.cr0 = cpu.cr0, gva
        if cpu.format is None or self.kernel.nested_paging:
            return
        if op == INVLPG:
            self.shadow.invlpg(cpu, gva)
        elif op == CR3:
            self.shadow.load_cr3(cpu)
        elif op == CR0:
            self.shadow.load_cr0(cpu, before)
        self._log(cpu)

    def _find_tables(self, cpu: VCPU) -> None:
        """Mark the pages that the vCPU's page tables lie in, in :attr:`tables`."""
        fmt = cpu.format
        assert fmt is not None
        page = np.array([cpu.cr3 >> 12], dtype=np.int64)
        for column in range(fmt.levels):
            _, index = self.memory.locate(page)  # a table may lie where no slot is, in a hole met for the first time
            more = np.zeros(self.memory.size - self.tables.size, dtype=np.bool)
            self.tables = np.concatenate([self.tables, more])
            self.tables[index] = True
            if column == fmt.levels - 1:
                break
            first = 4 if column == 0 and fmt is paging.PAE else PAGE // fmt.entry_bytes
            offset = np.arange(first, dtype=np.uint64) * np.uint64(fmt.entry_bytes)
            start = np.uint64(cpu.cr3 & 0xFE0) if column == 0 and fmt is paging.PAE else np.uint64(0)
            gpa = (page.astype(np.uint64) << np.uint64(12))[:, None] + start + offset
            entry = self.memory.load(gpa.ravel(), fmt.entry_bytes)
            follow = entry & paging.P != 0
            if fmt.levels - column in fmt.large:
                follow &= entry & paging.PS == 0
            page = np.unique((entry[follow] & paging.PFN) >> np.uint64(12)).astype(np.int64)


def replay_words(memory: NDArray, word: Index, op: NDArray[np.uint8], value: Words) -> Words:
    """Make reads, writes and increments on memory words in order; return what each read (or found) ``# (access,)``.

    Sorted by word, the accesses to one word lie together: what each finds is the last write before it, or what memory
    held, plus the increments since. No loop over accesses.

    >>> memory = np.zeros(2, dtype=np.uint64)
    >>> op = np.array([WRITE, READ, INCREMENT, READ, READ], dtype=np.uint8)
    >>> word = np.array([0, 0, 0, 0, 1], dtype=np.int64)
    >>> replay_words(memory, word, op, np.array([5, 0, 0, 0, 0], dtype=np.uint64)).tolist(), memory.tolist()
    ([0, 5, 0, 6, 0], [6, 0])
    """
    order = np.argsort(word, kind="stable")
    w, o, v = word[order], op[order], value[order]
    place = np.arange(w.size, dtype=np.int64)
    head = np.append(True, w[1:] != w[:-1])
    written = np.maximum.accumulate(np.where((o == WRITE) | head, place, 0))  # last write up to and with this one
    adds = np.cumsum(o == INCREMENT).astype(np.int64)
    is_write = o[written] == WRITE
    base = np.where(is_write, v[written], memory[w].astype(np.uint64))
    before = np.where(written == 0, 0, adds[written - 1])
    after = base + (adds - before).astype(np.uint64)  # the word once this access is made
    last = np.append(head[1:], True)
    memory[w[last]] = after[last].astype(memory.dtype)
    found = np.zeros(w.size, dtype=np.uint64)
    reads = o == READ
    found[order[reads]] = after[reads]
    return found
