"""The rules of a page walk: permissions ANDed over its levels, the fault an access takes, the bits it leaves behind.

:func:`judge` is the heart, a dozen lines that chapter 2 shows and has the reader write; :func:`descend` follows
entries down to the leaf, :func:`follow` those that are read on the way; :func:`access` is both, for whole arrays at
once. An entry set is an array ``# (access, level)``, root first, its last column the level of 4K pages; every other
argument is a scalar or an array ``# (access,)``. The error code's bits are named in :mod:`mmu.pfec`, the formats of
entries in ``mmu.formats``; tables in memory are ``mmu.tables``. :func:`fault_codes` is the same rule for tens of
millions of leaves, by look-up.

Sources: Intel SDM 3A 4.5 to 4.7 for the rules; Linux 6.1 ``arch/x86/kvm/mmu`` (``permission_fault``,
``reset_rsvds_bits_mask``, ``walk_addr_generic``) for what KVM's own walker makes of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmu.bits import as_words
from mmu.formats import LEGACY as LEGACY
from mmu.formats import LEGACY_PSE as LEGACY_PSE
from mmu.formats import LONG4, LONG5, NX, PTE, A, Bools, D, Format, U, W
from mmu.formats import PAE as PAE
from mmu.formats import PFN as PFN
from mmu.formats import PS as PS
from mmu.formats import P as P
from mmu.formats import bits_between as bits_between
from mmu.formats import format_of as format_of

Flags = bool | np.bool | NDArray[np.bool]
PKEY_LOW, PKEY_TOP = np.uint64(PTE["PKEY"].low), np.uint64(15)

# The low bits of a page-fault error code (Intel SDM 3A 4.7).
CODE_P, CODE_W, CODE_U, CODE_RSVD, CODE_F, CODE_PK = (np.uint64(1 << bit) for bit in range(6))


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
    present: Bools  # it, and so all above it
    reserved: Bools  # it has a bit set that must be 0 (in EPT: is misconfigured)
    rights: NDArray[np.uint64]  # the format's ``rights`` bits, ANDed over the levels; its ``denials`` are inverted

    @property
    def writable(self) -> Bools:
        """W in every entry on the way."""
        return self.rights & W != 0

    @property
    def user_page(self) -> Bools:
        """U in every entry on the way, what SMEP and SMAP call a user page (guest formats)."""
        return self.rights & U != 0

    @property
    def executable(self) -> Bools:
        """NX in no entry on the way (guest formats)."""
        return self.rights & NX != 0


def descend(entries: NDArray[np.uint64], *, nxe: Flags = True, maxphyaddr: int = 52, fmt: Format = LONG4) -> Descent:
    """Follow entries ``# (access, level)`` from the root until one is a leaf, not present, or malformed.

    Entries below that one are not looked at. Fewer columns than the format has levels are its lowest levels, so a
    lone leaf is one column.
    """
    entries = as_words(entries, "entries")  # (access, level)
    shape = np.broadcast_shapes(entries.shape[:-1], np.shape(nxe))
    columns = entries.shape[-1]
    return follow(lambda level, _: entries[..., -level], columns, shape, nxe=nxe, maxphyaddr=maxphyaddr, fmt=fmt)


def follow(
    read: Callable[[int, NDArray[np.uint64]], NDArray[np.uint64]], levels: int, shape: tuple[int, ...], *,
    nxe: Flags = True, maxphyaddr: int = 52, fmt: Format = LONG4,
) -> Descent:  # fmt: skip
    """As :func:`descend`, but what an entry is is asked when the walk gets there: in memory, say.

    The loop runs over the (at most five) levels, never over accesses.

    Args:
        read: of a level and the entries that the walks read last ``# (access,)`` the entries of that level; what it
            gives for a walk that has ended is not looked at.
        levels: how many there are.
        shape: of one level's entries.
    """
    walking, reserved = np.ones(shape, np.bool), np.zeros(shape, np.bool)
    rights, last = np.full(shape, fmt.rights, dtype=np.uint64), np.zeros(shape, dtype=np.uint64)
    level_reached = np.full(shape, levels, dtype=np.uint8)
    used = np.zeros((*shape, levels), dtype=np.bool)
    denials = np.uint64(fmt.denials)
    for level in range(levels, 0, -1):
        entry = read(level, last)
        is_present, malformed, leaf = fmt.examine(entry, level, maxphyaddr, nxe)
        last = np.where(walking, entry, last)
        walking = walking & is_present
        if malformed.any():
            reserved |= walking & malformed
            walking &= ~malformed
        used[..., -level] = walking
        if level not in fmt.plain:
            rights = np.where(walking, rights & (entry ^ denials), rights)
        walking &= ~leaf
        level_reached -= walking.view(np.uint8)
    present = last & np.uint64(fmt.present) != 0
    return Descent(used, level_reached, last, present, reserved, rights)


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
    walk: Descent | None = None,
) -> Outcome:
    """Make accesses through entries ``# (access, level)`` and say of each whether it faults and what it leaves behind.

    ``implicit`` marks the CPU's own supervisor accesses (to descriptor tables, say): they count as supervisor's
    whatever ``user`` says, and EFLAGS.AC does not excuse them from SMAP. An access that faults leaves the entries as
    they were; one that succeeds sets A in every entry it used and, if it writes, D in the leaf. (A CPU may set A on
    the way to a fault; KVM's walker, whose rule this is, does not.) ``walk`` is what :func:`follow` gave for these
    entries, where it was asked.

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
    if walk is None:
        walk = descend(entries, nxe=nxe, maxphyaddr=maxphyaddr, fmt=fmt)
    key = keys >> (walk.leaf >> PKEY_LOW & PKEY_TOP) * np.uint64(2)
    keyed = pke & np.bool(fmt in (LONG4, LONG5))
    fault, code = judge(
        walk.present, walk.reserved, walk.writable, walk.user_page, walk.executable,
        write=write, fetch=fetch, user=user & ~implicit, wp=wp, nxe=nxe, smep=smep, smap=smap, ac=ac & ~implicit,
        access_disable=keyed & (key & np.uint64(1) != 0), write_disable=keyed & (key & np.uint64(2) != 0),
    )  # fmt: skip
    marks = ~fault[..., None] & walk.used  # (access, level)
    carries_a = np.array([level not in fmt.plain for level in range(entries.shape[-1], 0, -1)], dtype=np.bool)
    after = entries | (marks & carries_a) * A
    is_leaf = np.arange(entries.shape[-1], 0, -1, dtype=np.uint8) == walk.level[..., None]  # (access, level)
    return Outcome(fault, code, after | (marks & is_leaf & write[..., None]) * D, walk)


# Where a decision table's index keeps what: the error code's own W, U and F, two bits of the entry, and its P, W and U
# at the top, which a multiplication by 32 in a byte puts there and rids of all other bits.
_DENIES_FETCH, _RESERVED, _ENTRY_LOW = 1, 8, 32
_ACCESS = np.uint8(CODE_W | CODE_U | CODE_F)
_BLOCK = 1 << 16  # pairs at a time: their words stay in the cache between one step and the next
NO_FAULT = -1


def access_bits(write: Flags = False, fetch: Flags = False, user: Flags = False) -> NDArray[np.uint8]:
    """What accesses are, as the bits W, U and F that an error code would have.

    Raises:
        ValueError: some access both writes and fetches.

    >>> access_bits(write=np.array([False, True]), user=True).tolist()
    [4, 6]
    """
    write, fetch, user = (np.asarray(flag, dtype=np.bool) for flag in (write, fetch, user))
    if (write & fetch).any():
        raise ValueError("an access is both write and fetch; expected read, write or fetch")
    bits = (flag * np.uint8(bit) for flag, bit in ((write, CODE_W), (fetch, CODE_F), (user, CODE_U)))
    return np.asarray(sum(bits, np.uint8(0)), dtype=np.uint8)


def decisions(
    *, wp: bool = True, nxe: bool = True, smep: bool = False, smap: bool = False, ac: bool = False
) -> NDArray[np.int8]:
    """Ask :func:`judge` every question once: the error code, or NO_FAULT, for each of 256 combinations.

    The index is made of the access as error-code bits (W 2, U 4, F 16), 1 if fetches are denied, 8 if a reserved bit
    is set, and 32 times P|W|U of the rights.

    >>> table = decisions(smep=True)
    >>> hex(table[0b010 | 32 * 0b101]), int(table[0b000 | 32 * 0b101])  # P|U: a supervisor's write, and its read
    ('0x3', -1)
    """
    index = np.arange(256, dtype=np.int64)
    p, w, u = (index >> bit & 1 != 0 for bit in (5, 6, 7))
    write, user, fetch = (index & int(bit) != 0 for bit in (CODE_W, CODE_U, CODE_F))
    settings = {"wp": wp, "nxe": nxe, "smep": smep, "smap": smap, "ac": ac}
    cpu, off = {name: np.full(256, flag, dtype=np.bool) for name, flag in settings.items()}, np.zeros(256, np.bool)
    fault, code = judge(
        p, index & _RESERVED != 0, w, u, index & _DENIES_FETCH == 0, write=write, fetch=fetch, user=user,
        access_disable=off, write_disable=off, **cpu,
    )  # fmt: skip
    return np.where(fault, code.astype(np.int8), np.int8(NO_FAULT))


def fault_codes(
    entries: NDArray[np.uint64], accesses: NDArray[np.uint8], *, maxphyaddr: int = 52, nxe: bool = True, **cpu: bool
) -> NDArray[np.int8]:
    """The error code of each access through a 4K leaf with the rights of its whole walk, or NO_FAULT, by table.

    What :func:`access` says of a lone leaf, for one setting of the CPU and without protection keys, many times as
    fast: the rules are asked 256 times and the rest is look-up.

    Args:
        entries: leaves ``# (pair,)``.
        accesses: error-code bits W, U and F of each access ``# (pair,)``; a read is 0.
        maxphyaddr: the CPU's physical address bits.
        nxe: EFER.NXE.
        cpu: ``wp``, ``smep``, ``smap`` and ``ac``, as in :func:`decisions`.

    >>> fault_codes(np.array([0x1005, 0x1005, 0], np.uint64), np.array([4, 6, 0], np.uint8)).tolist()
    [-1, 7, 0]
    """
    entries, accesses = as_words(entries, "entries").ravel(), np.asarray(accesses, dtype=np.uint8).ravel()
    table = decisions(nxe=nxe, **cpu).tobytes()
    forbidden = np.uint64(LONG4.forbidden(1, True, maxphyaddr, nxe))
    out = np.empty(entries.shape, dtype=np.int8)
    for start in range(0, entries.size, _BLOCK):
        entry = entries[start : start + _BLOCK]
        index = entry.astype(np.uint8) * np.uint8(_ENTRY_LOW)
        index |= accesses[start : start + _BLOCK] & _ACCESS
        index |= (entry.view(np.int64) < 0).view(np.uint8)  # NX is the sign
        index |= (entry & forbidden != 0).view(np.uint8) * np.uint8(_RESERVED)
        out[start : start + _BLOCK] = np.frombuffer(index.tobytes().translate(table), dtype=np.int8)
    return out
