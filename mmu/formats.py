"""The formats of page tables: what the bits of an entry mean in each paging mode, and which of them must be clear.

Guest page tables come in four shapes (32-bit, PAE, long mode with 4 or 5 levels), and nested paging adds a fifth: NPT
uses the long-mode format, EPT has one of its own. :mod:`mmu.paging` walks them, :mod:`mmu.tables` builds them; chapter
3 sets them side by side.

Sources: Intel SDM 3A chapter 4 and 3C 29.3; for the bits that must be clear Linux 6.1 ``arch/x86/kvm/mmu``
(``__reset_rsvds_bits_mask``, ``__reset_rsvds_bits_mask_ept``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmu.bits import Field, Layout

Bools = NDArray[np.bool]

PTE = Layout(
    "page-table entry",
    Field("P", 0, meaning="present; clear: the other bits mean nothing to the CPU"),
    Field("W", 1, meaning="writable"),
    Field("U", 2, meaning="user-mode accesses allowed"),
    Field("PWT", 3, meaning="write-through"),
    Field("PCD", 4, meaning="cache disabled"),
    Field("A", 5, meaning="accessed: set by the CPU when a walk uses the entry"),
    Field("D", 6, meaning="dirty: set by the CPU in a leaf when a write goes through it"),
    Field("PS", 7, meaning="page size: this entry above level 1 is a leaf"),
    Field("G", 8, meaning="global"),
    Field("AVL", 9, 3, "ignored by the CPU"),
    Field("PFN", 12, 40, "page frame number"),
    Field("IGNORED", 52, 7, "ignored by the CPU"),
    Field("PKEY", 59, 4, "protection key, read in a leaf when CR4.PKE is set"),
    Field("NX", 63, meaning="no instruction fetches; a reserved bit while EFER.NXE is clear"),
    source="Intel SDM 3A 4.5",
)
P, W, U, A, D, PS, NX = (np.uint64(PTE[name].mask) for name in ("P", "W", "U", "A", "D", "PS", "NX"))
PFN = np.uint64(PTE["PFN"].mask)


def bits_between(low: int, top: int) -> int:
    """The mask of bits ``low`` to ``top``; empty when ``top < low``.

    >>> hex(bits_between(13, 20)), bits_between(52, 51)
    ('0x1fe000', 0)
    """
    return (1 << max(top + 1, low)) - (1 << low)


EPT_ENTRY = Layout(
    "EPT entry",
    Field("R", 0, meaning="data reads allowed; with W and X clear too, the entry is not present"),
    Field("W", 1, meaning="writes allowed"),
    Field("X", 2, meaning="instruction fetches allowed (with mode-based execute control: the supervisor's)"),
    Field("MT", 3, 3, "memory type of a leaf: 0 UC, 1 WC, 4 WT, 5 WP, 6 WB; 2, 3 and 7 are misconfigurations"),
    Field("IPAT", 6, meaning="the guest's PAT is ignored"),
    Field("PS", 7, meaning="page size: this entry above level 1 is a leaf"),
    Field("A", 8, meaning="accessed, where EPT's A/D bits are on"),
    Field("D", 9, meaning="dirty, in a leaf, where EPT's A/D bits are on"),
    Field("XU", 10, meaning="user-mode fetches allowed, under mode-based execute control"),
    Field("PFN", 12, 40, "page frame number"),
    Field("SVE", 63, meaning="suppress #VE"),
    source="Intel SDM 3C 29.3.2",
)


@dataclass(frozen=True)
class Format:
    """One kind of page table: how many levels, how wide an entry is, what its bits allow, which of them must be clear.

    ``large`` names the levels where PS makes a leaf, ``plain`` those whose entries carry neither rights nor an A bit
    (PAE's four page-directory pointers). ``reserved(level, leaf, maxphyaddr)`` is the mask of bits that must be 0,
    NX not among them: it is one only while EFER.NXE is clear, and only in formats that have it (``nx``).
    ``rights`` are the bits that are ANDed down a walk, those in ``denials`` inverted first.
    """

    name: str
    levels: int
    entry_bytes: int
    index_bits: tuple[int, ...]  # root first
    large: tuple[int, ...]
    plain: tuple[int, ...]
    nx: bool
    reserved: Callable[[int, bool, int], int]
    present: int = PTE.mask("P")  # any of these bits
    rights: int = PTE.mask("W", "U", "NX")
    denials: int = PTE.mask("NX")
    accessed: int = PTE.mask("A")
    dirty: int = PTE.mask("D")
    table: int = PTE.mask("P", "W", "U")  # the flags of an entry that allows everything and points to a table
    memory_type: bool = False  # EPT: of a leaf's memory types and of R, W and X not all combinations are legal

    def forbidden(self, level: int, leaf: bool, maxphyaddr: int, nxe: bool = True) -> int:
        """The bits that must be 0 in a present entry.

        >>> hex(LONG4.forbidden(2, True, 40, nxe=False))
        '0x800fff00001fe000'
        """
        return self.reserved(level, leaf, maxphyaddr) | (0 if nxe or not self.nx else int(NX))

    def examine(
        self, entry: NDArray[np.uint64], level: int, maxphyaddr: int, nxe: Any = True
    ) -> tuple[Bools, Bools, Bools]:
        """Say of each entry whether it is present, whether it is malformed (if present), and whether it is a leaf."""
        present = entry & np.uint64(self.present) != 0
        if level in self.large:
            leaf = entry & PS != 0
            as_leaf, as_table = (np.uint64(self.reserved(level, kind, maxphyaddr)) for kind in (True, False))
            malformed = entry & np.where(leaf, as_leaf, as_table) != 0
        else:
            leaf = np.full(np.shape(entry), level == 1, dtype=np.bool)
            malformed = entry & np.uint64(self.reserved(level, level == 1, maxphyaddr)) != 0
        if self.nx and not np.all(nxe):
            malformed = malformed | (~np.asarray(nxe, dtype=np.bool) & (entry & NX != 0))
        if self.memory_type:
            low = (entry & np.uint64(7)).astype(np.intp)
            malformed = (
                malformed
                | _BAD_RIGHTS[low]
                | (leaf & _BAD_TYPE[(entry >> np.uint64(3) & np.uint64(7)).astype(np.intp)])
            )
        return present, malformed, leaf

    def shift(self, level: int) -> int:
        """How far right an address is shifted so that its lowest bits are the index at ``level``.

        >>> LONG4.shift(1), LONG4.shift(4), LEGACY.shift(2)
        (12, 39, 22)
        """
        return 12 + sum(self.index_bits[self.levels - level + 1 :])

    def index(self, address: Any, level: int) -> Any:
        """The entry that translates ``address`` in a table of ``level``; an int for an int, else a uint64 array.

        >>> LONG4.index(0x40001000, 3), PAE.index(0xC0000000, 3)
        (1, 3)
        """
        top = (1 << self.index_bits[self.levels - level]) - 1
        if isinstance(address, int):
            return address >> self.shift(level) & top
        return address >> np.uint64(self.shift(level)) & np.uint64(top)


def _long_reserved(level: int, leaf: bool, maxphyaddr: int) -> int:
    """Physical address bits the CPU lacks; PS at levels 4 and 5; the low address bits of a large leaf."""
    low = bits_between(13, 9 * level + 2) if leaf and level > 1 else int(PS) if level > 3 else 0
    return bits_between(maxphyaddr, 51) | low


def _pae_reserved(level: int, leaf: bool, maxphyaddr: int) -> int:
    """As in long mode, but physical addresses end where NX begins, and the pointers have no rights to hold."""
    pointer = bits_between(1, 2) | bits_between(5, 8) | int(NX)
    low = pointer if level == 3 else bits_between(13, 20) if leaf and level == 2 else 0
    return bits_between(maxphyaddr, 62) | low


def _legacy_reserved(level: int, leaf: bool, maxphyaddr: int) -> int:
    """Only a 4M leaf has reserved bits: bits 13 to 16 are bits 32 to 35 of its address (PSE-36), 17 to 21 nothing."""
    return bits_between(17, 21) if level == 2 and leaf else 0


def _ept_reserved(level: int, leaf: bool, maxphyaddr: int) -> int:
    """As in long mode; where long mode has PCD and PWT, an entry that points to a table has reserved bits."""
    low = bits_between(12, 9 * level + 2) if leaf and level > 1 else 0
    pointer = 0 if leaf else bits_between(3, 7) if level > 3 else bits_between(3, 6)
    return bits_between(maxphyaddr, 51) | low | pointer


_BAD_RIGHTS = np.isin(np.arange(8, dtype=np.uint8), (0b010, 0b110))  # W without R; X alone is legal on today's CPUs
_BAD_TYPE = np.isin(np.arange(8, dtype=np.uint8), (2, 3, 7))

LONG4 = Format("long mode, 4 levels", 4, 8, (9, 9, 9, 9), (2, 3), (), True, _long_reserved)
LONG5 = Format("long mode, 5 levels", 5, 8, (9, 9, 9, 9, 9), (2, 3), (), True, _long_reserved)
PAE = Format("PAE, 3 levels", 3, 8, (2, 9, 9), (2,), (3,), True, _pae_reserved)
LEGACY = Format("32-bit, 2 levels, CR4.PSE=0", 2, 4, (10, 10), (), (), False, _legacy_reserved)
LEGACY_PSE = Format("32-bit, 2 levels, CR4.PSE=1", 2, 4, (10, 10), (2,), (), False, _legacy_reserved)
EPT4, EPT5 = (
    Format(
        f"EPT, {levels} levels", levels, 8, (9,) * levels, (2, 3), (), False, _ept_reserved,
        present=7, rights=7, denials=0, table=7, memory_type=True,
        accessed=EPT_ENTRY.mask("A"), dirty=EPT_ENTRY.mask("D"),
    )
    for levels in (4, 5)
)  # fmt: skip


def format_of(cr0: int, cr4: int, efer: int) -> Format | None:
    """The paging mode that the control registers select; None while CR0.PG is clear.

    >>> format_of(0x80010033, 0x20, 0xD01).name, format_of(0x80010033, 0x20, 0x800).name, format_of(0x10033, 0, 0)
    ('long mode, 4 levels', 'PAE, 3 levels', None)
    """
    pg, pse, pae, la57, lma = cr0 >> 31 & 1, cr4 >> 4 & 1, cr4 >> 5 & 1, cr4 >> 12 & 1, efer >> 10 & 1
    if not pg:
        return None
    if not pae:
        return LEGACY_PSE if pse else LEGACY
    return PAE if not lma else LONG5 if la57 else LONG4
