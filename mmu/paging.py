"""The rules of a page walk: permissions ANDed over its levels, the fault an access takes, the bits it leaves behind.

:func:`judge` is the heart, a dozen lines that chapter 2 shows and has the reader write; :func:`descend` follows
entries down to the leaf; :func:`access` is both, for whole arrays at once. An entry set is an array
``# (access, level)``, root first, its last column the level of 4K pages; every other argument is a scalar or an array
``# (access,)``. The error code's bits are named in :mod:`mmu.pfec`.

Sources: Intel SDM 3A 4.5 to 4.7 for the rules; Linux 6.1 ``arch/x86/kvm/mmu`` (``permission_fault``,
``reset_rsvds_bits_mask``, ``walk_addr_generic``) for what KVM's own walker makes of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmu.bits import Field, Layout, as_words

Flags = bool | np.bool | NDArray[np.bool]
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
PKEY_LOW, PKEY_TOP = np.uint64(PTE["PKEY"].low), np.uint64(15)

# The low bits of a page-fault error code (Intel SDM 3A 4.7).
CODE_P, CODE_W, CODE_U, CODE_RSVD, CODE_F, CODE_PK = (np.uint64(1 << bit) for bit in range(6))


def bits_between(low: int, top: int) -> int:
    """The mask of bits ``low`` to ``top``; empty when ``top < low``.

    >>> hex(bits_between(13, 20)), bits_between(52, 51)
    ('0x1fe000', 0)
    """
    return (1 << max(top + 1, low)) - (1 << low)


@dataclass(frozen=True)
class Format:
    """One guest paging mode: how many levels, how wide an entry is, which bits of it must be clear.

    ``large`` names the levels where PS makes a leaf, ``plain`` those whose entries carry neither rights nor an A bit
    (PAE's four page-directory pointers). ``reserved(level, leaf, maxphyaddr)`` is the mask of bits that must be 0,
    NX not among them: it is one only while EFER.NXE is clear, and only in formats that have it (``nx``).
    """

    name: str
    levels: int
    entry_bytes: int
    index_bits: tuple[int, ...]  # root first
    large: tuple[int, ...]
    plain: tuple[int, ...]
    nx: bool
    reserved: Callable[[int, bool, int], int]


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


LONG4 = Format("long mode, 4 levels", 4, 8, (9, 9, 9, 9), (2, 3), (), True, _long_reserved)
LONG5 = Format("long mode, 5 levels", 5, 8, (9, 9, 9, 9, 9), (2, 3), (), True, _long_reserved)
PAE = Format("PAE, 3 levels", 3, 8, (2, 9, 9), (2,), (3,), True, _pae_reserved)
LEGACY = Format("32-bit, 2 levels, CR4.PSE=0", 2, 4, (10, 10), (), (), False, _legacy_reserved)
LEGACY_PSE = Format("32-bit, 2 levels, CR4.PSE=1", 2, 4, (10, 10), (2,), (), False, _legacy_reserved)


class Judgement(NamedTuple):
    """``fault`` and the error ``code`` of each access; without a fault the code is 0, but 0 is a legal code too."""

    fault: Bools  # (access,)
    code: NDArray[np.uint64]  # (access,)


def judge(
    present: Bools,
    reserved: Bools,
    writable: Bools,
    user_page: Bools,
    executable: Bools,
    *,
    write: Bools,
    fetch: Bools,
    user: Bools,
    wp: Bools,
    nxe: Bools,
    smep: Bools,
    smap: Bools,
    ac: Bools,
    access_disable: Bools,
    write_disable: Bools,
) -> Judgement:
    """Give the fault and the error code of each access from what its walk found and what the CPU is set to.

    Every argument is a bool array, broadcast together. ``reserved`` counts where ``present``; the rights are those of
    all levels ANDed; the two ``_disable`` are the protection key's (False where keys are off). Chapter 2 builds this
    function line by line. Source: Intel SDM 3A 4.6 and 4.7; Linux 6.1 ``permission_fault``.

    >>> on, off = np.array(True), np.array(False)
    >>> cpu = dict(wp=on, nxe=on, smep=on, smap=on, ac=off, access_disable=off, write_disable=off)
    >>> fault, code = judge(on, off, off, on, on, write=on, fetch=off, user=on, **cpu)  # user store, W clear
    >>> bool(fault), hex(code)
    (True, '0x7')
    """
    usable = present & ~reserved
    confined = user | wp  # with CR0.WP clear a supervisor's store ignores W
    denied = user & ~user_page
    denied = denied | (write & ~writable & confined)
    denied = denied | (fetch & ~executable)
    denied = denied | (~user & user_page & smep & fetch)
    denied = denied | (~user & user_page & smap & ~fetch & ~ac)
    locked = user_page & ~fetch & (access_disable | (write_disable & write & confined))
    fault = ~usable | denied | locked
    code = present * CODE_P | write * CODE_W | user * CODE_U | (fetch & (nxe | smep)) * CODE_F
    code = code | (present & reserved) * CODE_RSVD | (usable & locked) * CODE_PK
    return Judgement(fault, np.where(fault, code, np.uint64(0)))


class Descent(NamedTuple):
    """Where each walk ended and what it may do: all arrays ``# (access,)``, but ``used`` is ``# (access, level)``."""

    used: Bools  # (access, level): entries that were read, present and well formed
    level: NDArray[np.uint8]  # of the last entry read
    leaf: NDArray[np.uint64]  # the last entry read
    present: Bools
    reserved: Bools
    writable: Bools
    user_page: Bools
    executable: Bools


def descend(entries: NDArray[np.uint64], *, nxe: Flags = True, maxphyaddr: int = 52, fmt: Format = LONG4) -> Descent:
    """Follow entries ``# (access, level)`` from the root until one is a leaf, not present, or malformed.

    Entries below that one are not looked at. Fewer columns than the format has levels are its lowest levels, so a
    lone leaf is one column. The loop runs over the (at most five) levels, never over accesses.
    """
    entries = as_words(entries, "entries")  # (access, level)
    nx_reserved = ~np.asarray(nxe, dtype=np.bool)
    shape = np.broadcast_shapes(entries.shape[:-1], nx_reserved.shape)
    walking = np.ones(shape, dtype=np.bool)
    present, reserved = np.ones(shape, dtype=np.bool), np.zeros(shape, dtype=np.bool)
    rights = np.full(shape, W | U | NX, dtype=np.uint64)  # NX stored inverted, so that all three AND alike
    level_reached = np.zeros(shape, dtype=np.uint8)
    last, used = np.zeros(shape, dtype=np.uint64), np.zeros((*shape, entries.shape[-1]), dtype=np.bool)
    for level in range(entries.shape[-1], 0, -1):
        entry = entries[..., -level]
        leaf = entry & PS != 0 if level in fmt.large else np.full((), level == 1, dtype=np.bool)
        forbidden = np.where(leaf, *(np.uint64(fmt.reserved(level, kind, maxphyaddr)) for kind in (True, False)))
        if fmt.nx:
            forbidden = forbidden | nx_reserved * NX
        level_reached[walking] = level
        last = np.where(walking, entry, last)
        present &= ~walking | (entry & P != 0)
        reserved |= walking & present & (entry & forbidden != 0)
        walking &= present & ~reserved
        used[..., -level] = walking
        if level not in fmt.plain:
            rights = np.where(walking, rights & (entry ^ NX), rights)
        walking &= ~leaf
    return Descent(used, level_reached, last, present, reserved, *(rights & right != 0 for right in (W, U, NX)))


@dataclass(frozen=True)
class Outcome:
    """What became of each access: its fault, its error code, and the entries as it leaves them."""

    fault: Bools  # (access,)
    code: NDArray[np.uint64]  # (access,)
    entries: NDArray[np.uint64]  # (access, level)
    walk: Descent


def access(
    entries: NDArray[np.uint64],
    *,
    write: Flags = False,
    fetch: Flags = False,
    user: Flags = False,
    wp: Flags = True,
    nxe: Flags = True,
    smep: Flags = False,
    smap: Flags = False,
    ac: Flags = False,
    pke: Flags = False,
    pkru: ArrayLike = 0,
    implicit: Flags = False,
    maxphyaddr: int = 52,
    fmt: Format = LONG4,
) -> Outcome:
    """Make accesses through entries ``# (access, level)`` and say of each whether it faults and what it leaves behind.

    ``implicit`` marks the CPU's own supervisor accesses (to descriptor tables, say): they count as supervisor's
    whatever ``user`` says, and EFLAGS.AC does not excuse them from SMAP. An access that faults leaves the entries as
    they were; one that succeeds sets A in every entry it used and, if it writes, D in the leaf. (A CPU may set A on
    the way to a fault; KVM's walker, whose rule this is, does not.)

    Raises:
        ValueError: some access both writes and fetches, or ``entries`` has no level, or ``pkru`` leaves 32 bits.

    >>> path = np.array([[0x1027, 0x2027, 0x3027, 0x5005]], dtype=np.uint64)  # the leaf: present, user, not writable
    >>> out = access(path, user=True)
    >>> bool(out.fault[0]), [hex(entry) for entry in out.entries[0]]
    (False, ['0x1027', '0x2027', '0x3027', '0x5025'])
    >>> hex(access(path, user=True, write=True).code[0])
    '0x7'
    """
    entries = as_words(entries, "entries")
    if entries.ndim == 0 or not 1 <= entries.shape[-1] <= fmt.levels:
        raise ValueError(f"entries have shape {entries.shape}; expected (access, level) with 1 to {fmt.levels} levels")
    flags = (write, fetch, user, wp, nxe, smep, smap, ac, pke, implicit)
    write, fetch, user, wp, nxe, smep, smap, ac, pke, implicit = (np.asarray(flag, dtype=np.bool) for flag in flags)
    if (write & fetch).any():
        raise ValueError("an access is both write and fetch; expected read, write or fetch")
    if (keys := as_words(pkru, "pkru")).size and keys.max() > 0xFFFFFFFF:
        raise ValueError(f"pkru is {int(keys.max()):#x}; expected 32 bits, two a key")
    walk = descend(entries, nxe=nxe, maxphyaddr=maxphyaddr, fmt=fmt)
    key = keys >> (walk.leaf >> PKEY_LOW & PKEY_TOP) * np.uint64(2)
    keyed = pke & np.bool(fmt in (LONG4, LONG5))
    fault, code = judge(
        *walk[3:],
        write=write, fetch=fetch, user=user & ~implicit, wp=wp, nxe=nxe, smep=smep, smap=smap, ac=ac & ~implicit,
        access_disable=keyed & (key & np.uint64(1) != 0), write_disable=keyed & (key & np.uint64(2) != 0),
    )  # fmt: skip
    marks = ~fault[..., None] & walk.used  # (access, level)
    carries_a = np.array([level not in fmt.plain for level in range(entries.shape[-1], 0, -1)], dtype=np.bool)
    after = entries | (marks & carries_a) * A
    is_leaf = np.arange(entries.shape[-1], 0, -1, dtype=np.uint8) == walk.level[..., None]  # (access, level)
    return Outcome(fault, code, after | (marks & is_leaf & write[..., None]) * D, walk)
