"""Nested paging: EPT's own rules, and the two-dimensional walk of a guest's table through a nested one (chapter 5).

Under EPT or NPT each entry of the guest's page tables lies at a guest-physical address, which the nested table
translates before the entry can be read, and so does the address that comes out at last: with four levels of each up
to 24 reads. A nested table is a :class:`mmu.tables.PageTable`: of format EPT4, or LONG4 for NPT, which takes every
access for a user's.

>>> from mmu.formats import EPT4, LONG4
>>> guest, ept = PageTable(LONG4, base=0x40), PageTable(EPT4)
>>> guest.map(0x1000, pfn=0x99, flags=0x7)
>>> ept.map(np.arange(0x40, 0x44, dtype=np.uint64) << np.uint64(12), pfn=np.arange(0x140, 0x144), flags=0x37)
>>> walk = walk_nested(guest, ept, np.array([0x1234], np.uint64), write=True)  # nothing is mapped at 0x99000 yet
>>> bool(walk.nested_fault[0]), hex(walk.gpa[0]), hex(walk.code[0])
(True, '0x99234', '0x182')
>>> ept.map(0x99000, pfn=0x555, flags=0x37)
>>> hex(walk_nested(guest, ept, np.array([0x1234], np.uint64), write=True).physical[0])
'0x555234'
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmu import paging
from mmu.bits import as_words
from mmu.formats import PFN, Bools
from mmu.tables import BLOCK, NOWHERE, Marks, PageTable, Path, Resolved, Walk, Words

READ, WRITE, FETCH = 1, 2, 4  # an EPT access, as in bits 0 to 2 of the exit qualification
MISCONFIGURED = 64  # what ept_decisions says of a malformed entry; a violation is below
LINEAR, FINAL = np.uint64(1 << 7), np.uint64(1 << 8)  # exit qualification: the linear address is known; not a table
USER = np.uint8(paging.CODE_U)  # NPT takes every access for a user's
GUEST_FINAL, GUEST_PAGE = np.uint64(1 << 32), np.uint64(1 << 33)  # NPT's error code: the same distinction


def ept_decisions() -> NDArray[np.int8]:
    """What becomes of an access under EPT, for each of 256 combinations: -1 goes through.

    The index is the access (READ, WRITE, FETCH), 8 if the last entry is misconfigured, and 32 times R|W|X of the
    rights. A violation is bits 0 to 5 of its exit qualification: the access, and the rights three bits further up.
    Source: Intel SDM 3C 29.3.3 and table 28-7; a CPU that can do execute-only.

    >>> table = ept_decisions()
    >>> hex(table[WRITE | 32 * 0b101]), int(table[FETCH | 32 * 0b101]), int(table[READ | 8])
    ('0x2a', -1, 64)
    """
    index = np.arange(256, dtype=np.int64)
    access, rights = index & 7, index >> 5
    verdict = np.where(access & ~rights != 0, access | rights << 3, -1)
    return np.where(index & 8 != 0, MISCONFIGURED, verdict).astype(np.int8)


class NestedWalk(NamedTuple):
    """What each access came to; arrays ``# (access,)``."""

    guest: Walk  # the guest's part: ``physical`` is guest-physical, and there is no fault where the nested table cut in
    nested_fault: Bools  # an EPT violation or misconfiguration, or an NPT fault
    misconfigured: Bools  # of these the EPT misconfigurations
    step: NDArray[np.uint8]  # the guest level whose table could not be reached; 0: what the guest's table led to
    gpa: Words  # the guest-physical address that faulted, or that was reached at last; 0 with a guest fault
    code: Words  # exit qualification (EPT; 0 for a misconfiguration) or error code (NPT); 0 without a nested fault
    physical: Words  # the host-physical address; 0 with a fault of either kind
    nested_entries: (
        Words | None
    )  # (access, step, level): for the guest's tables from the root down, last for the access


class _Tables(NamedTuple):
    """How the nested table lets each guest table be read and written; arrays ``# (table,)``."""

    read: Resolved
    write: Resolved  # the very same where reading counts as writing
    used: Bools  # read by some walk
    open: bool  # no table in use is out of reach


def walk_nested(
    guest: PageTable,
    nested: PageTable,
    addresses: ArrayLike,
    *,
    write: paging.Flags = False,
    fetch: paging.Flags = False,
    user: paging.Flags = False,
    ad: bool = True,
    keep: bool = True,
    update: bool = True,
    nxe: bool = True,
    **cpu: bool,
) -> NestedWalk:
    """Walk a guest's page tables through a nested table for many addresses at once.

    The nested table stops a walk where it does not let a guest table be reached; a guest fault comes before the
    translation of what the walk would have led to. A guest table is translated once for all walks that read it: within
    one page the answer is the same. The guest's A and D bits are set where the whole access goes through, the nested
    table's wherever it translated (inferred: the manuals leave open which are set on the way to a fault).

    Args:
        guest: the guest's table; its ``base`` says at which guest-physical address it lies.
        nested: the table that translates those: EPT4, EPT5 or, as NPT, LONG4, LONG5.
        addresses: linear addresses ``# (access,)``.
        write, fetch, user: what each access is, one for all or ``# (access,)``.
        ad: EPT's A/D bits are on. Reading a guest table then counts as writing it, as it always does under NPT;
            otherwise a guest table is written to only where a bit has to be set in it.
        keep: also return every entry that was read, in both dimensions.
        update: set A and D.
        nxe: EFER.NXE of the guest.
        cpu: the guest's ``wp``, ``smep``, ``smap`` and ``ac``, as in :func:`mmu.paging.decisions`.

    Raises:
        ValueError: the nested table has a format that no CPU uses so, or some access both writes and fetches.
    """
    ept, address = nested.fmt.memory_type, as_words(addresses, "addresses").ravel()
    if nested.fmt.entry_bytes != 8 or nested.fmt.plain:
        raise ValueError(f"the nested table's format is {nested.fmt.name}; expected EPT, or long mode's for NPT")
    kind = np.broadcast_to(paging.access_bits(write, fetch, user), address.shape)
    writes, fetches = (kind & np.uint8(bit) != 0 for bit in (paging.CODE_W, paging.CODE_F))
    last_kind = np.where(writes, WRITE, np.where(fetches, FETCH, READ)).astype(np.uint8) if ept else kind | USER
    verdicts, nested_verdicts = paging.decisions(nxe=nxe, **cpu), ept_decisions() if ept else paging.decisions()
    tables = _tables(guest, nested, nested_verdicts, ad)

    count, steps, depth = address.size, guest.fmt.levels, nested.fmt.levels
    entries = np.empty((steps, count if keep else min(count, BLOCK)), dtype=np.uint64)
    last_entries = np.empty((depth, count if keep else min(count, BLOCK)), dtype=np.uint64)
    verdict, nested_verdict = np.empty(count, dtype=np.int8), np.empty(count, dtype=np.int8)
    level, step = np.empty(count, dtype=np.uint8), np.empty(count, dtype=np.uint8)
    gpa, physical = np.empty(count, dtype=np.uint64), np.empty(count, dtype=np.uint64)
    guest_marks, nested_marks = Marks(guest), Marks(nested)
    for start in range(0, count, BLOCK):
        part = slice(start, min(start + BLOCK, count))
        block = part if keep else slice(0, part.stop - start)
        path = guest.descend(address[part], nxe, entries[:, block])
        said = path.judge(kind[part], verdicts, guest.fmt.nx)
        stop, why = _reach(guest, path, said, writes[part], entries[:, block], tables)
        go = (said < 0) & (stop == 0)
        target = path.physical * go
        last = nested.descend(target, True, last_entries[:, block])
        last_said = last.judge(last_kind[part], nested_verdicts, nested.fmt.nx)
        through = go & (last_said < 0)
        verdict[part], level[part], step[part] = np.where(stop == 0, said, np.int8(-1)), path.level, stop
        nested_verdict[part] = np.where(go, last_said, why)
        gpa[part], physical[part] = target, last.physical * through
        if (stop > 0).any():
            at = np.flatnonzero(stop)
            slot = np.stack(path.slots)[steps - stop[at].astype(np.int64), at]
            gpa[part][at] = (np.uint64(guest.base) << np.uint64(12)) + slot.view(np.uint64) * np.uint64(
                guest.fmt.entry_bytes
            )
        if not go.all():
            last_entries[:, block][:, ~go] = 0
        if update:
            guest_marks.note(path, through, writes[part])
            nested_marks.note(last, through, writes[part])
    if update:
        guest_marks.set()
        if ad or not ept:
            pages = _pages(guest)[tables.used]
            nested.resolve(pages, _table_kinds(ept, ad)[0], nested_verdicts, marks=nested_marks)
            nested_marks.set()

    fault, nested_fault, final = verdict >= 0, nested_verdict >= 0, step == 0
    misconfigured = nested_fault & (nested_verdict == MISCONFIGURED) & np.bool(ept)
    where = np.where(final, LINEAR | FINAL, LINEAR) if ept else np.where(final, GUEST_FINAL, GUEST_PAGE)
    code = (nested_verdict.view(np.uint8).astype(np.uint64) | where) * (nested_fault & ~misconfigured)
    walk = Walk(fault, verdict.view(np.uint8) * fault, level, gpa * (final & ~fault), entries.T if keep else None)
    read = _nested_entries(guest, walk, step, tables, last_entries) if keep else None
    return NestedWalk(walk, nested_fault, misconfigured, step, gpa, code, physical, read)


def _pages(guest: PageTable) -> Words:
    """The guest-physical addresses of a guest's table pages ``# (table,)``."""
    return (np.arange(guest.live.size, dtype=np.uint64) + np.uint64(guest.base)) << np.uint64(12)


def _table_kinds(ept: bool, ad: bool) -> tuple[np.uint8, np.uint8]:
    """What kind of access reading a guest table is to the nested table, and what kind setting a bit in it."""
    if not ept:
        return (np.uint8(paging.CODE_W) | USER,) * 2
    return np.uint8(READ | WRITE if ad else READ), np.uint8(READ | WRITE)


def _tables(guest: PageTable, nested: PageTable, verdicts: NDArray[np.int8], ad: bool) -> _Tables:
    reading, writing = _table_kinds(nested.fmt.memory_type, ad)
    read = nested.resolve(_pages(guest), reading, verdicts)
    write = read if reading == writing else nested.resolve(_pages(guest), writing, verdicts)
    in_use = guest.parent != NOWHERE
    in_use[0] = True
    return _Tables(read, write, np.zeros(guest.live.size, dtype=np.bool), bool((write.verdict[in_use] < 0).all()))


def _reach(
    guest: PageTable, path: Path, said: NDArray[np.int8], writes: Bools, entries: Words, tables: _Tables
) -> tuple[NDArray[np.uint8], NDArray[np.int8]]:
    """Where the nested table stops the walks of one block: the guest level of the table (0: nowhere), and why.

    Cuts the guest's part of such a walk off: ``path.level`` and ``entries`` ``# (step, access)`` are changed.
    """
    fmt = guest.fmt
    stop, why = np.zeros(said.size, dtype=np.uint8), np.full(said.size, -1, dtype=np.int8)
    ways = []  # one a step: its level, the table, and which walks read it
    for slot, level in zip(path.slots, range(fmt.levels, 0, -1), strict=True):
        reads = path.level <= level
        if level not in fmt.plain:  # PAE's pointers were read when CR3 was loaded
            ways.append((level, np.where(reads, slot, 0) // guest.fanout, reads))
    for level, table, reads in ways:
        hit = np.zeros(0, dtype=np.int64)
        if not tables.open:
            hit = np.flatnonzero(reads & (stop == 0) & (tables.read.verdict[table] >= 0))
            stop[hit], why[hit] = level, tables.read.verdict[table[hit]]
            path.level[hit] = level + 1
            entries[fmt.levels - level :, hit] = 0
        tables.used[table[reads & (stop == 0)]] = True
    if tables.open or tables.write is tables.read:
        return stop, why
    for level, table, reads in ways:
        bits = np.uint64(fmt.accessed) | (writes & (path.level == level)) * np.uint64(fmt.dirty)
        lacks = reads & (said < 0) & (stop == 0) & (entries[fmt.levels - level] & bits != bits)
        hit = np.flatnonzero(lacks & (tables.write.verdict[table] >= 0))
        stop[hit], why[hit] = level, tables.write.verdict[table[hit]]
    return stop, why


def _nested_entries(guest: PageTable, walk: Walk, step: NDArray[np.uint8], tables: _Tables, last: Words) -> Words:
    """Every entry that was read of the nested table ``# (access, step, level)``."""
    fmt = guest.fmt
    out = np.zeros((walk.level.size, fmt.levels + 1, last.shape[0]), dtype=np.uint64)
    table = np.zeros(walk.level.size, dtype=np.int64)
    for place, level in enumerate(range(fmt.levels, 0, -1)):
        reached = (walk.level <= level) | (step == level)
        if level not in fmt.plain:
            out[:, place] = tables.read.entries[table] * reached[:, None]
        below = ((walk.entries[:, place] & PFN) >> np.uint64(12)).view(np.int64) - guest.base
        table = np.where((walk.level < level) | (step == level - 1), below, 0) if level > 1 else table
    out[:, -1] = last.T
    return out
