"""Radix page tables in one flat array, and the walk of many addresses through them at once (chapter 5).

A :class:`PageTable` is physical memory that holds nothing but table pages: ``words[a // entry size]`` is the entry at
address ``a``, counted from the root, so following a pointer is a shift and a gather. Map, unmap, split and collapse
change whole arrays of pages; :meth:`PageTable.walk` reads the entries as the CPU does.

>>> table = PageTable(LONG4)
>>> table.map(np.array([0x400000, 0x401000], np.uint64), pfn=np.array([0x77, 0x78], np.uint64), flags=0x5)
>>> walk = table.walk(np.array([0x400123, 0x401456], np.uint64), write=np.array([False, True]), user=True)
>>> walk.fault.tolist(), walk.code.tolist(), hex(walk.physical[0]), walk.level.tolist()
([False, True], [0, 7], '0x77123', [1, 1])
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmu import paging
from mmu.bits import as_words
from mmu.formats import LONG4, PFN, PS, Bools, Format, P

PAT_LARGE, PAT_SMALL = np.uint64(1 << 12), PS  # where the PAT bit lies in a large leaf and in a 4K one
BLOCK = 1 << 14  # addresses walked at a time: what one step writes is still in the cache when the next reads it
NOWHERE = -1
WRITES = np.uint8(paging.CODE_W)  # of an access's bits that which makes a leaf dirty; EPT's is the same

Words = NDArray[np.uint64]
Ints = NDArray[np.int64]


class Walk(NamedTuple):
    """What each address came to; arrays ``# (access,)``."""

    fault: Bools
    code: NDArray[np.uint8]  # the error code, 0 without a fault
    level: NDArray[np.uint8]  # of the last entry read
    physical: Words  # the address that it translates to, 0 with a fault
    entries: Words | None  # (access, level) as read, root first, 0 below ``level``; None if not kept


class Resolved(NamedTuple):
    """What each walk came to by a decision table; arrays ``# (access,)``."""

    verdict: NDArray[np.int8]  # what the table says; negative: no fault
    level: NDArray[np.uint8]
    physical: Words
    entries: Words | None  # (access, level)


class Leaves(NamedTuple):
    """Leaf entries; arrays ``# (leaf,)``."""

    address: Words  # the first that it translates
    level: Ints
    entry: Words


class Found(NamedTuple):
    """Where the entries that decide about addresses lie; arrays ``# (address,)``."""

    slot: Ints  # index in PageTable.words
    level: Ints
    present: Bools  # the entry is a leaf; otherwise it is not present, or the table at the level asked for


class PageTable:
    """A page table of one format, in flat arrays that grow.

    Args:
        fmt: one of the formats in :mod:`mmu.formats`.
        base: page frame number of the root; the other table pages follow it.
        maxphyaddr: the CPU's physical address bits; an entry's bits above must be 0.

    Attributes:
        words: the entries ``# (entry,)``, table after table.
        live: how many present entries each table has ``# (table,)``.
        parent: index in ``words`` of the entry that points to each table; NOWHERE for the root and for free ones.
    """

    def __init__(self, fmt: Format = LONG4, *, base: int = 0, maxphyaddr: int = 52) -> None:
        self.fmt, self.base, self.maxphyaddr = fmt, base, maxphyaddr
        self.fanout = 4096 // fmt.entry_bytes
        self.words = np.zeros(self.fanout, dtype=np.uint64)
        self.live, self.parent = np.zeros(1, dtype=np.int64), np.full(1, NOWHERE, dtype=np.int64)
        self._free = np.zeros(0, dtype=np.int64)
        self._to_word = np.uint64(fmt.entry_bytes.bit_length() - 1)  # from a byte address to an index in words
        self._origin = base * self.fanout
        if fmt.plain:  # PAE's pointers are loaded with CR3, and this model keeps all four present
            pointer = np.arange(1 << fmt.index_bits[0], dtype=np.int64)
            self._link(pointer, self._take(pointer.size), np.uint64(P))

    @property
    def pages(self) -> int:
        """Table pages in use."""
        return self.live.size - self._free.size

    def _take(self, count: int) -> Ints:
        """The numbers of ``count`` empty tables, freed ones first."""
        if (short := count - self._free.size) > 0:
            size, grow = self.live.size, short + self.live.size // 2
            self.words = np.concatenate([self.words, np.zeros(grow * self.fanout, dtype=np.uint64)])
            self.live = np.concatenate([self.live, np.zeros(grow, dtype=np.int64)])
            self.parent = np.concatenate([self.parent, np.full(grow, NOWHERE, dtype=np.int64)])
            self._free = np.concatenate([self._free, np.arange(size, size + grow, dtype=np.int64)])
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def _store(self, slot: Ints, entry: Words) -> None:
        """Write entries to different slots, keeping count of the present ones."""
        present = np.uint64(self.fmt.present)
        change = (entry & present != 0).astype(np.int64) - (self.words[slot] & present != 0)
        np.add.at(self.live, slot // self.fanout, change)
        self.words[slot] = entry

    def _link(self, slot: Ints, table: Ints, flags: np.uint64) -> None:
        """Make the entries at ``slot`` point to ``table``."""
        self._store(slot, (table.astype(np.uint64) + np.uint64(self.base)) << np.uint64(12) | flags)
        self.parent[table] = slot

    def _below(self, entry: Words) -> Ints:
        """Index in ``words`` of the table that each entry points to."""
        return ((entry & PFN) >> self._to_word).view(np.int64) - self._origin

    def _prune(self, table: Ints) -> None:
        """Free those of the tables that are empty, and then their parents."""
        while table.size:
            table = np.unique(table)
            table = table[(self.live[table] == 0) & (self.parent[table] != NOWHERE)]
            if self.fmt.plain:
                table = table[self.parent[table] >= self.fanout]  # directories stay
            slot = self.parent[table]
            self._store(slot, np.zeros(slot.size, dtype=np.uint64))
            self.parent[table] = NOWHERE
            self._free = np.concatenate([table, self._free])
            table = slot // self.fanout

    def find(self, addresses: ArrayLike, level: int = 1) -> Found:
        """Follow the pointers down to a leaf, to an entry that is not present, or to ``level``."""
        address = as_words(addresses, "addresses").ravel()
        base, slot, at = (np.zeros(address.size, dtype=np.int64) for _ in range(3))
        leaf, open_ = np.zeros(address.size, dtype=np.bool), np.ones(address.size, dtype=np.bool)
        for here in range(self.fmt.levels, level - 1, -1):
            slot = np.where(open_, base + self.fmt.index(address, here).view(np.int64), slot)
            at = np.where(open_, here, at)
            entry = self.words[slot]
            present, _, is_leaf = self.fmt.examine(entry, here, self.maxphyaddr)
            leaf |= open_ & present & is_leaf
            open_ &= present & ~is_leaf
            base = np.where(open_, self._below(entry), 0)
        return Found(slot, at, leaf)

    def leaves(self) -> Leaves:
        """All leaves, from the root's level down and by address within a level."""
        base, prefix = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.uint64)
        found = []
        for level in range(self.fmt.levels, 0, -1):
            place = np.arange(1 << self.fmt.index_bits[self.fmt.levels - level], dtype=np.int64)
            slot = (base[:, None] + place).ravel()
            address = (prefix[:, None] | place.astype(np.uint64) << np.uint64(self.fmt.shift(level))).ravel()
            entry = self.words[slot]
            present, _, leaf = self.fmt.examine(entry, level, self.maxphyaddr)
            here, below = present & leaf, present & ~leaf
            found.append(Leaves(address[here], np.full(here.sum(), level, dtype=np.int64), entry[here]))
            base, prefix = self._below(entry[below]), address[below]
        return Leaves(*map(np.concatenate, zip(*found, strict=True)))

    def map(self, addresses: ArrayLike, *, pfn: ArrayLike, flags: ArrayLike, level: int = 1) -> None:
        """Map pages of ``level``'s size: write their leaves, and make the tables on the way.

        Args:
            addresses: of the pages ``# (page,)``; of equal ones the last counts. A leaf that is there is replaced.
            pfn: page frame numbers, one for all or ``# (page,)``.
            flags: the leaf's bits beside its PFN and PS, one for all or ``# (page,)``.
            level: 1, or one of the format's ``large``.

        Raises:
            ValueError: the format has no such leaves, ``flags`` make no present entry, an address or PFN is not
                aligned to the page, or a larger page or a whole table is mapped there. Nothing is changed then.
        """
        if level != 1 and level not in self.fmt.large:
            raise ValueError(f"{self.fmt.name} has no leaves at level {level}; expected 1 or one of {self.fmt.large}")
        named = {"addresses": addresses, "pfn": pfn, "flags": flags}
        address, pfn, flags = (as_words(value, name) for name, value in named.items())
        address, pfn, flags = (np.broadcast_to(value, address.shape).ravel() for value in (address, pfn, flags))
        _, last = np.unique(address[::-1], return_index=True)
        address, pfn, flags = (value[::-1][last] for value in (address, pfn, flags))  # ascending, each once
        shift = np.uint64(self.fmt.shift(level))
        entry = pfn << np.uint64(12) | flags | (PS if level > 1 else np.uint64(0))
        odd = (address | pfn << np.uint64(12)) & ((np.uint64(1) << shift) - np.uint64(1)) != 0
        widest = np.uint64((1 << 8 * self.fmt.entry_bytes) - 1)
        unfit = odd | (flags & np.uint64(self.fmt.present) == 0) | (entry > widest)
        if unfit.any():
            at = int(np.argmax(unfit))
            raise ValueError(
                f"page {int(address[at]):#x} to frame {int(pfn[at]):#x} with flags {int(flags[at]):#x}: expected both "
                f"aligned to {1 << int(shift):#x}, flags of a present entry, and {self.fmt.entry_bytes} bytes in all"
            )
        found = self.find(address, level)
        present, _, leaf = self.fmt.examine(self.words[found.slot], level, self.maxphyaddr)
        taken = (found.present & (found.level > level)) | ((found.level == level) & present & ~leaf)
        if taken.any():
            at = int(np.argmax(taken))
            raise ValueError(
                f"{int(address[at]):#x} is mapped by other leaves, through level {int(found.level[at])}; "
                f"expected none or one of level {level}: split, collapse or unmap it first"
            )
        base = np.zeros(address.size, dtype=np.int64)
        for here in range(self.fmt.levels, level, -1):
            slot = base + self.fmt.index(address, here).view(np.int64)
            missing = np.unique(slot[self.words[slot] & np.uint64(self.fmt.present) == 0])
            self._link(missing, self._take(missing.size), np.uint64(self.fmt.table))
            base = self._below(self.words[slot])
        self._store(base + self.fmt.index(address, level).view(np.int64), entry)

    def unmap(self, addresses: ArrayLike) -> Bools:
        """Clear the leaf, of whatever size, that translates each address, and free tables that are empty then.

        Returns: which addresses were mapped ``# (address,)``.
        """
        found = self.find(addresses)
        slot = np.unique(found.slot[found.present])
        self._store(slot, np.zeros(slot.size, dtype=np.uint64))
        self._prune(slot // self.fanout)
        return found.present

    def split(self, addresses: ArrayLike) -> Bools:
        """Replace the large leaf that translates each address by a table of leaves one size smaller, alike in all else.

        Returns: which addresses were mapped by a large leaf ``# (address,)``.
        """
        found = self.find(addresses)
        large = found.present & (found.level > 1)
        for level in np.unique(found.level[large]).tolist():
            slot = np.unique(found.slot[large & (found.level == level)])
            leaf, step = self.words[slot][:, None], np.uint64(1 << self.fmt.shift(level - 1))  # (leaf, 1)
            if level - 1 not in self.fmt.large:  # 4K leaves have PAT where larger ones have PS
                pat = np.where(leaf & PAT_LARGE != 0, PAT_SMALL, np.uint64(0))
                leaf = leaf & ~(PS | PAT_LARGE) | (np.uint64(0) if self.fmt.memory_type else pat)
            child = leaf + np.arange(self.fanout, dtype=np.uint64) * step  # (leaf, entry)
            table = self._take(slot.size)
            inside = table[:, None] * self.fanout + np.arange(self.fanout, dtype=np.int64)
            self._link(slot, table, np.uint64(self.fmt.table))
            self._store(inside.ravel(), child.ravel())
        return large

    def collapse(self, addresses: ArrayLike, level: int = 2) -> Bools:
        """Replace a table by one large leaf of ``level`` where all of its entries are leaves that together make one.

        They must lie one after the other in aligned memory and agree in every bit but A and D, which the new leaf has
        if any of them had.

        Returns: which addresses lie in a table that was replaced ``# (address,)``.
        """
        if level not in self.fmt.large:
            raise ValueError(f"{self.fmt.name} has no leaves at level {level}; expected one of {self.fmt.large}")
        found = self.find(addresses, level)
        entry = self.words[found.slot]
        present, _, leaf = self.fmt.examine(entry, level, self.maxphyaddr)
        points = (found.level == level) & present & ~leaf
        slot, which = np.unique(found.slot[points], return_inverse=True)
        table = self._below(self.words[slot]) // self.fanout
        child = self.words.reshape(-1, self.fanout)[table]  # (table, entry)
        present, _, leaf = self.fmt.examine(child, level - 1, self.maxphyaddr)
        marks = np.uint64(self.fmt.accessed | self.fmt.dirty)
        step = np.arange(self.fanout, dtype=np.uint64) * np.uint64(1 << self.fmt.shift(level - 1))
        first = child[:, :1] & ~marks
        whole = (present & leaf).all(axis=1) & ((child & ~marks) == first + step).all(axis=1)
        new = first[:, 0] | np.bitwise_or.reduce(child & marks, axis=1)
        inside = PFN & np.uint64((1 << self.fmt.shift(level)) - 1)  # address bits that the large leaf does not have
        if level - 1 in self.fmt.large:
            inside &= ~PAT_LARGE
        else:
            pat = np.where(new & PAT_SMALL != 0, PAT_LARGE, np.uint64(0))
            new = new & ~PAT_SMALL | (np.uint64(0) if self.fmt.memory_type else pat)
        whole &= first[:, 0] & inside == 0
        table, slot, new = table[whole], slot[whole], new[whole]
        cleared = table[:, None] * self.fanout + np.arange(self.fanout, dtype=np.int64)  # (table, entry)
        self._store(cleared.ravel(), np.zeros(cleared.size, dtype=np.uint64))
        self.parent[table] = NOWHERE
        self._free = np.concatenate([table, self._free])
        self._store(slot, new | PS)
        done = points.copy()
        done[points] = whole[which]
        return done

    def walk(
        self,
        addresses: ArrayLike,
        *,
        write: paging.Flags = False,
        fetch: paging.Flags = False,
        user: paging.Flags = False,
        keep: bool = True,
        update: bool = True,
        nxe: bool = True,
        **cpu: bool,
    ) -> Walk:
        """Walk guest page tables (or NPT, whose walks are all ``user``) for many addresses at once.

        All walks read the table as it stands; A in every entry that a successful one used, and D in the leaves of
        writes, are set afterwards. Protection keys are left to :func:`mmu.paging.access`.

        Args:
            addresses: any addresses ``# (access,)``; bits above the format's are not looked at.
            write, fetch, user: what each access is, one for all or ``# (access,)``.
            keep: also return every entry that was read.
            update: set A and D.
            nxe: EFER.NXE.
            cpu: ``wp``, ``smep``, ``smap`` and ``ac``, as in :func:`mmu.paging.decisions`.

        Raises:
            ValueError: some access both writes and fetches.
        """
        kind = paging.access_bits(write, fetch, user)
        verdicts = paging.decisions(nxe=nxe, **cpu)
        marks = Marks(self) if update else None
        made = self.resolve(addresses, kind, verdicts, nxe=nxe, keep=keep, marks=marks)
        if marks is not None:
            marks.set()
        fault = made.verdict >= 0
        return Walk(fault, made.verdict.view(np.uint8) * fault, made.level, made.physical, made.entries)

    def resolve(
        self,
        addresses: ArrayLike,
        kind: ArrayLike,
        verdicts: NDArray[np.int8],
        *,
        nxe: bool = True,
        keep: bool = True,
        marks: Marks | None = None,
    ) -> Resolved:
        """Walk by a decision table: what :meth:`walk` and the nested formats have in common.

        Args:
            addresses: ``# (access,)``.
            kind: each access's bits in the index of ``verdicts``, one for all or ``# (access,)``; WRITES dirties.
            verdicts: what 256 combinations come to, negative where the access goes through: the access's bits, 1 if
                fetches are denied, 8 if the last entry is malformed, 32 times the low three bits of all entries ANDed.
            nxe: EFER.NXE.
            keep: also return every entry that was read.
            marks: where to note the entries that get A and D.
        """
        address = as_words(addresses, "addresses").ravel()
        kind = np.broadcast_to(np.asarray(kind, dtype=np.uint8), address.shape)
        entries = np.empty((self.fmt.levels, address.size if keep else min(BLOCK, address.size)), dtype=np.uint64)
        out = Resolved(
            *(np.empty(address.size, dtype=dtype) for dtype in (np.int8, np.uint8, np.uint64)),
            entries.T if keep else None,
        )
        for start in range(0, address.size, BLOCK):
            part = slice(start, min(start + BLOCK, address.size))
            path = self.descend(address[part], nxe, entries[:, part] if keep else entries[:, : part.stop - start])
            out.verdict[part], out.level[part] = path.judge(kind[part], verdicts, self.fmt.nx), path.level
            through = out.verdict[part] < 0
            np.multiply(path.physical, through, out=out.physical[part])
            if marks is not None:
                marks.note(path, through, kind[part] & WRITES != 0)
        return out

    def _usual(self, level: int, nxe: bool) -> tuple[np.uint64, np.uint64]:
        """A mask and what is left under it of an entry that is present and well formed, and a leaf at level 1 alone."""
        fmt = self.fmt
        mask = fmt.forbidden(level, level == 1, self.maxphyaddr, nxe) | fmt.present
        mask |= int(PS) if level in fmt.large else 0
        value = fmt.present
        if fmt.memory_type and level == 1:
            mask, value = mask | 7 << 3, value | 6 << 3  # write-back
        return np.uint64(mask), np.uint64(value)

    def descend(self, address: Words, nxe: bool, entries: Words) -> Path:
        """Go down with one block of addresses, and fill ``entries`` ``# (level, access)``.

        All walks go on to level 1. Those that end above it are rare, or else the table is small: what is known of
        them is put aside when they end, and put back at last.
        """
        fmt = self.fmt
        anded, ored = np.full(address.size, ~np.uint64(0), dtype=np.uint64), np.zeros(address.size, dtype=np.uint64)
        ended, aside = np.zeros(address.size, dtype=np.bool), []
        slots, slot = [], fmt.index(address, fmt.levels).view(np.int64)
        for entry, level in zip(entries, range(fmt.levels, 0, -1), strict=True):
            self.words.take(slot, out=entry, mode="clip")  # a walk that has ended may point anywhere
            slots.append(slot)
            if level not in fmt.plain:
                anded &= entry
                ored |= entry
            mask, value = self._usual(level, nxe)
            at = np.flatnonzero(entry & mask != value)
            if at.size:
                at = at[~ended[at]]
                present, malformed, leaf = fmt.examine(entry[at], level, self.maxphyaddr, nxe)
                over = np.flatnonzero(~present | malformed | leaf)
                at, present, malformed = at[over], present[over], malformed[over]
                aside.append((level, at, present & malformed, anded[at] * present, ored[at]))
                ended[at] = True
            if level > 1:
                slot = self._below(entry) + fmt.index(address, level - 1).view(np.int64)
        reached, bad = np.ones(address.size, dtype=np.uint8), np.zeros(address.size, dtype=np.bool)
        physical = (entries[-1] & PFN) | (address & np.uint64(0xFFF))
        for level, at, malformed, rights, denials in aside:
            reached[at], bad[at], anded[at], ored[at] = level, malformed, rights, denials
            inside = np.uint64((1 << fmt.shift(level)) - 1)
            physical[at] = (entries[-level, at] & PFN & ~inside) | (address[at] & inside)
            entries[fmt.levels - level + 1 :, at] = 0
        return Path(anded, ored, bad, reached, physical, slots)


class Path(NamedTuple):
    """One block's way down a table; arrays ``# (access,)``."""

    anded: Words  # all entries on the way; 0 where the last one is not present
    ored: Words
    malformed: Bools
    level: NDArray[np.uint8]  # of the last entry read
    physical: Words  # what that entry translates to
    slots: list[Ints]  # of the entry at each level, root first; below ``level`` they mean nothing

    def judge(self, kind: NDArray[np.uint8], verdicts: NDArray[np.int8], nx: bool) -> NDArray[np.int8]:
        """Look up what each access comes to; ``nx``: the format has an NX bit."""
        index = self.anded.astype(np.uint8) * np.uint8(32)
        index |= kind
        if nx:
            index |= (self.ored.view(np.int64) < 0).view(np.uint8)  # NX is the sign
        index |= self.malformed.view(np.uint8) * np.uint8(8)
        return np.frombuffer(index.tobytes().translate(verdicts.tobytes()), dtype=np.int8)


class Marks:
    """Which entries of a table are to get A, and which D: noted block by block, then set at once."""

    def __init__(self, table: PageTable) -> None:
        self.table = table
        self.accessed, self.dirty = (np.zeros(table.words.size, dtype=np.bool) for _ in range(2))  # (entry,)

    def note(self, path: Path, through: Bools, writes: Bools) -> None:
        """Note the entries that the walks of one block used, where they went ``through``."""
        fmt = self.table.fmt
        fresh = np.flatnonzero(through & (path.anded & np.uint64(fmt.accessed) == 0))  # some entry on the way lacks A
        writes = np.flatnonzero(through & writes)
        for slot, level in zip(path.slots, range(fmt.levels, 0, -1), strict=True):
            if level not in fmt.plain:
                self.accessed[slot[fresh[path.level[fresh] <= level]]] = True
            if level == 1 or level in fmt.large:
                self.dirty[slot[writes[path.level[writes] == level]]] = True

    def set(self) -> None:
        """Set what was noted."""
        self.table.words[self.accessed] |= np.uint64(self.table.fmt.accessed)
        self.table.words[self.dirty] |= np.uint64(self.table.fmt.dirty)
