"""Guest-physical memory: memory slots, which of their pages are dirty, and the bytes behind them.

A gfn means nothing until a slot gives it a host page. This module maps arrays of gfns to slots and to one dense
*index* (slots lie end to end in it), so that everything else can keep its state in flat arrays. It also keeps the
dirty log: a bitmap per slot or a ring per vCPU, cleared at once or by a second call, initially clear or all set.
Chapter 4.

Facts: Linux 6.1 ``virt/kvm/kvm_main.c`` (``kvm_get_dirty_log_protect``, ``kvm_clear_dirty_log_protect``,
``mark_page_dirty_in_slot``), ``virt/kvm/dirty_ring.c``, ``Documentation/virt/kvm/api.rst``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmu.host import HUGE_PAGES, PAGE, Answer, Backing

Index = NDArray[np.int64]
Bools = NDArray[np.bool]

LOG_DIRTY_PAGES, READONLY = 1, 2  # memory slot flags (linux/kvm.h)
RING_RESERVE = 64  # entries of a dirty ring that KVM keeps for itself (6.1 dirty_ring.c); 512 more where PML logs
GENERATION = 2  # what one change adds: one for each address space (6.1 ``kvm_swap_active_memslots``)
HOLE = -1  # the slot of a gfn that no slot covers


@dataclass
class Slot:
    """One memory slot: gfns ``base`` to ``base + pages - 1``, the host pages behind them, and where its state lies.

    ``first`` is the index of gfn ``base`` in every flat array; ``offset`` the page of ``backing`` behind it.
    """

    number: int
    base: int
    pages: int
    flags: int
    backing: Backing
    offset: int = 0
    first: int = 0

    @property
    def logged(self) -> bool:
        """Dirty logging is on."""
        return bool(self.flags & LOG_DIRTY_PAGES)

    @property
    def readonly(self) -> bool:
        """Guest stores leave to user space as MMIO."""
        return bool(self.flags & READONLY)

    @property
    def indices(self) -> slice:
        """The slot's part of every flat array."""
        return slice(self.first, self.first + self.pages)


@dataclass
class Ring:
    """A vCPU's dirty ring: ``entries`` in the order of the pushes, ``# (push,)`` each; full at ``limit``."""

    limit: int
    entries: list[Index] = field(default_factory=list)

    @property
    def used(self) -> int:
        """How many pages wait to be harvested."""
        return sum(part.size for part in self.entries)

    def harvest(self) -> Index:
        """Take all entries out, oldest first."""
        taken = np.concatenate([np.zeros(0, dtype=np.int64), *self.entries])
        self.entries.clear()
        return taken


class GuestMemory:
    """All slots of one guest.

    Attributes:
        slots: in no order; a slot's position in this list is what :meth:`locate` returns.
        size: length that flat per-page arrays need: all slots ever added, and the holes touched.
        dirty: the dirty bitmap of every page ``# (index,)``.
        generation: changes with every change to the slots; an MMIO spte of another generation is stale.
        manual, initially_set: ``KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`` with its two bits.
        ring_size: entries of each vCPU's dirty ring, 0 without one.
    """

    def __init__(self) -> None:
        self.slots: list[Slot] = []
        self.size = 0
        self.dirty = np.zeros(0, dtype=np.bool)
        self.generation = 0
        self.manual = self.initially_set = False
        self.ring_size = 0
        self.rings: dict[int, Ring] = {}
        self._holes = np.zeros(0, dtype=np.int64)  # (hole,) gfns, ascending
        self._hole_index = np.zeros(0, dtype=np.int64)  # (hole,)

    def _extend(self, pages: int) -> int:
        first, self.size = self.size, self.size + pages
        self.dirty = np.concatenate([self.dirty, np.zeros(pages, dtype=np.bool)])
        return first

    def add(self, number: int, base: int, pages: int, flags: int, backing: Backing, offset: int = 0) -> Slot:
        """Add a slot. Raises ValueError when it overlaps another or leaves its backing."""
        for other in self.slots:
            if base < other.base + other.pages and other.base < base + pages:
                raise ValueError(f"slot {number} at gfn {base:#x} overlaps slot {other.number} at {other.base:#x}")
        if offset + pages > backing.pages:
            raise ValueError(f"slot {number} has {pages} pages; its backing has {backing.pages - offset} from there on")
        slot = Slot(number, base, pages, flags, backing, offset, self._extend(pages))
        self.slots.append(slot)
        self._start_log(slot)
        self.generation += GENERATION
        return slot

    def remove(self, slot: Slot) -> None:
        """Delete a slot: KVM installs it as invalid first, then takes it away, so the generation changes twice."""
        self.slots.remove(slot)
        self.generation += 2 * GENERATION

    def set_flags(self, slot: Slot, flags: int) -> None:
        """Change a slot's flags; a log that is switched on starts all clear, or all set where that was asked for."""
        started = not slot.logged and bool(flags & LOG_DIRTY_PAGES)
        slot.flags = flags
        if started:
            self._start_log(slot)
        self.generation += GENERATION

    def _start_log(self, slot: Slot) -> None:
        self.dirty[slot.indices] = slot.logged and self.manual and self.initially_set and not self.ring_size

    def slot(self, number: int) -> Slot | None:
        """The slot of that number, or None."""
        return next((slot for slot in self.slots if slot.number == number), None)

    def locate(self, gfn: Index) -> tuple[NDArray[np.int16], Index]:
        """The slot's position (or ``HOLE``) and the index of each gfn; a hole gets its index at first use."""
        where = np.full(gfn.shape, HOLE, dtype=np.int16)
        index = np.empty(gfn.shape, dtype=np.int64)
        for position, slot in enumerate(self.slots):
            offset = gfn - slot.base
            inside = offset.view(np.uint64) < np.uint64(slot.pages)  # a negative offset is a large number
            if inside.all():
                return np.full(gfn.shape, position, dtype=np.int16), offset + slot.first
            where[inside] = position
            np.add(offset, slot.first, out=index, where=inside)
        outside = where == HOLE
        if outside.any():
            wanted = np.unique(gfn[outside])
            fresh = np.setdiff1d(wanted, self._holes, assume_unique=True)
            if fresh.size:
                self._holes = np.concatenate([self._holes, fresh])
                first = self._extend(fresh.size)
                added = np.arange(first, first + fresh.size, dtype=np.int64)
                self._hole_index = np.concatenate([self._hole_index, added])
                order = np.argsort(self._holes)
                self._holes, self._hole_index = self._holes[order], self._hole_index[order]
            index[outside] = self._hole_index[np.searchsorted(self._holes, gfn[outside])]
        return where, index

    def holes(self, base: int, pages: int) -> tuple[Index, Index]:
        """The gfns in a range that were touched as holes, and their indices."""
        inside = (self._holes >= base) & (self._holes < base + pages)
        return self._holes[inside], self._hole_index[inside]

    def property_of(self, position: NDArray[np.int16], name: str) -> NDArray[Any]:
        """A slot's attribute for each position, as an array; 0 or False for a hole."""
        values = [getattr(slot, name) for slot in self.slots]
        table = np.array([*values, 0], dtype=np.bool if all(type(v) is bool for v in values) and values else np.int64)
        return table[position]

    # The host's side -------------------------------------------------------------------------------------------------

    def ask_host(self, position: NDArray[np.int16], index: Index, write: Bools) -> Answer:
        """Pass each request to the backing of its slot (no holes among them; each page once)."""
        answer = Answer(
            np.zeros(index.shape, dtype=np.uint64), *(np.zeros(index.shape, dtype=np.bool) for _ in range(4))
        )
        for slot, mask, page in self._by_slot(position, index):
            for whole, part in zip(answer, slot.backing.fault(page, write[mask]), strict=True):
                whole[mask] = part
        return answer

    def may_be_huge(self, position: NDArray[np.int16], gfn: Index) -> Bools:
        """Which gfns lie in a 2 MiB block that one spte can map: wholly in its slot, and aligned as the host's are."""
        base, pages, offset = (self.property_of(position, name) for name in ("base", "pages", "offset"))
        ahead = np.array([slot.backing.ahead for slot in self.slots] + [0], dtype=np.int64)[position]
        start = gfn // HUGE_PAGES * HUGE_PAGES
        inside = (start >= base) & (start + HUGE_PAGES <= base + pages)
        return inside & ((offset + ahead - base) % HUGE_PAGES == 0)

    def same_block(self, position: NDArray[np.int16], index: Index) -> tuple[NDArray[np.int16], Index]:
        """All pages of their slots that share a 2 MiB block of the host's with any of these: slots and indices."""
        where, out = [position[:0]], [index[:0]]
        for slot, mask, page in self._by_slot(position, index):
            other = np.arange(slot.pages, dtype=np.int64)
            block = (other + slot.offset + slot.backing.ahead) // HUGE_PAGES
            out.append(slot.first + other[np.isin(block, (page + slot.backing.ahead) // HUGE_PAGES)])
            where.append(np.full(out[-1].shape, position[mask][0], dtype=np.int16))
        return np.concatenate(where), np.concatenate(out)

    def host_property(self, position: NDArray[np.int16], index: Index, name: str) -> Bools:
        """``Backing.writable``, ``mapped_huge`` or ``tied`` of each page (False for a hole)."""
        out = np.zeros(index.shape, dtype=np.bool)
        for slot, mask, page in self._by_slot(position, index):
            out[mask] = getattr(slot.backing, name)(page)
        return out

    def frames(self, position: NDArray[np.int16], index: Index) -> NDArray[np.uint64]:
        """The host frame behind each page (0 for a hole, or where nothing is resident)."""
        out = np.zeros(index.shape, dtype=np.uint64)
        for slot, mask, page in self._by_slot(position, index):
            out[mask] = slot.backing.pfn[page]
        return out

    def _by_slot(self, position: NDArray[np.int16], index: Index) -> list[tuple[Slot, Any, Index]]:
        parts: list[tuple[Slot, Any, Index]] = []
        for number in range(len(self.slots)) if index.size else ():
            slot = self.slots[number]
            mask = position == number
            if mask.any():
                parts.append((slot, mask, index[mask] - slot.first + slot.offset))
        return parts

    # The log ---------------------------------------------------------------------------------------------------------

    def mark_dirty(self, vcpu: int, position: NDArray[np.int16], index: Index) -> None:
        """Note stores to pages, in order; only logged slots keep note of them."""
        index = index[self.property_of(position, "logged").astype(np.bool)]
        if not self.ring_size:
            self.dirty[index] = True
        elif index.size:
            self.ring(vcpu).entries.append(index)

    def ring(self, vcpu: int) -> Ring:
        """The dirty ring of a vCPU."""
        return self.rings.setdefault(vcpu, Ring(self.ring_size - RING_RESERVE))

    def get_dirty_log(self, slot: Slot) -> tuple[Bools, Index]:
        """KVM_GET_DIRTY_LOG: the bitmap ``# (page,)`` and the indices of pages to write-protect (none if manual)."""
        bitmap = self.dirty[slot.indices].copy()
        if self.manual:
            return bitmap, np.zeros(0, dtype=np.int64)
        self.dirty[slot.indices] = False
        return bitmap, np.flatnonzero(bitmap) + slot.first

    def clear_dirty_log(self, slot: Slot, first: int, bits: Bools) -> Index:
        """KVM_CLEAR_DIRTY_LOG: clear the named bits; returns the indices of those that were set, to write-protect."""
        named = np.flatnonzero(bits) + slot.first + first
        found = named[self.dirty[named]]
        self.dirty[found] = False
        return found

    # The bytes -------------------------------------------------------------------------------------------------------

    def words(self, slot: Slot, width: int) -> NDArray[Any]:
        """The slot's memory as words of ``width`` bytes ``# (word,)``, a view. Raises ValueError without content."""
        if slot.backing.bytes is None:
            raise ValueError(f"slot {slot.number} keeps no bytes; expected a Backing with content=True")
        start, stop = slot.offset, slot.offset + slot.pages
        return slot.backing.bytes[start:stop].reshape(-1).view(f"<u{width}")

    def load(self, address: NDArray[np.uint64], width: int) -> NDArray[np.uint64]:
        """Read words of ``width`` bytes at guest-physical addresses; 0 where no slot is or no bytes are kept."""
        out = np.zeros(address.shape, dtype=np.uint64)
        for slot in self.slots:
            if slot.backing.bytes is None:
                continue
            offset = address - np.uint64(slot.base * PAGE)  # below the slot it wraps, so one comparison is enough
            inside = offset < np.uint64(slot.pages * PAGE)
            word = offset >> np.uint64(width.bit_length() - 1)
            if inside.all():
                return self.words(slot, width)[word.view(np.int64)].astype(np.uint64)
            out[inside] = self.words(slot, width)[word[inside].view(np.int64)]
        return out

    def set_bits(self, address: NDArray[np.uint64], bits: NDArray[np.uint64], width: int) -> None:
        """Set bits in words, as a CPU sets A and D in page-table entries; the same word may be named twice."""
        for slot in self.slots:
            offset = address.astype(np.int64) - slot.base * PAGE
            inside = (offset >= 0) & (offset < slot.pages * PAGE)
            if slot.backing.bytes is not None and inside.any():
                words = self.words(slot, width)
                np.bitwise_or.at(words, offset[inside] // width, bits[inside].astype(words.dtype))

    def store(self, address: int, value: int, width: int) -> None:
        """Write one word, as the host process would (the log does not see it)."""
        for slot in self.slots:
            offset = address - slot.base * PAGE
            if 0 <= offset < slot.pages * PAGE:
                self.words(slot, width)[offset // width] = value & ((1 << 8 * width) - 1)
                return
        raise ValueError(f"no slot covers {address:#x}; expected an address in guest memory")
