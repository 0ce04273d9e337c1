"""Rules on the guest's own entries: what a walk prints of them, and what KVM makes of it.

The one idea: a walk prints each entry that it read, so what it must then do is known: set A where it was clear, refuse
what an entry refuses, make the shadow pages that the entries name. Chapter 13.

Entries above the last level lie in shadowed tables that the guest cannot write to without an exit; while no vCPU has
had one that could tell of a write, they read the same.

Facts: Linux 6.1 ``mmu/paging_tmpl.h`` (walk_addr_generic, update_accessed_dirty_bits, fetch), ``mmu/mmu.c``
(mmu_try_to_unsync_pages, kvm_unlink_unsync_page).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mmu.ledger import Rule
from mmu.order import (
    ABIT,
    DBIT,
    ELEM,
    EMUL,
    ENTRY,
    EXCEPTION,
    EXIT,
    FAULT,
    MARK,
    NESTED,
    OTHER,
    PAGE,
    REQ,
    RET,
    SET,
    SYNC,
    UNSYNC,
    WALK,
    WERR,
    ZAP,
    Order,
    Visit,
)

_WALKER, _MMU = "Linux 6.1 paging_tmpl.h", "Linux 6.1 mmu.c"

ACCESSED = Rule(
    "a walk sets A in each entry that lacked it, and D in the leaf that is written to",
    f"{_WALKER}, update_accessed_dirty_bits", "order",
)  # fmt: skip
ACCESSED_WHERE = Rule(
    "A and D are set where the walk found the entry", f"{_WALKER}, update_accessed_dirty_bits", "order"
)
ERROR_WALK = Rule("an error of a walk is one of the access that it was for", f"{_WALKER}, walk_addr_generic", "order")
ERROR_WHY = Rule("a walk is refused by one of its entries", f"{_WALKER}, walk_addr_generic", "order")
ALLOWED = Rule("a walk that is not refused was allowed by all its entries", f"{_WALKER}, permission_fault", "order")
WALK_ACCESS = Rule(
    "a walk is for a write or a fetch, and only a fault's own is for a page that was present", f"{_MMU}, gva_to_gpa",
    "order",
)  # fmt: skip
UPPER = Rule(
    "a guest's upper entry reads the same until somebody may have written to it",
    f"{_MMU}, mmu_try_to_unsync_pages: only tables of the last level may go out of sync", "order",
)  # fmt: skip
SHADOW_GFN = Rule("a shadow page is made for the guest's table that an entry names", f"{_WALKER}, fetch", "order")
PAGE_DOWN = Rule("new shadow pages lead down level by level to what is set", f"{_MMU}, direct_map; fetch", "order")
UNSYNC_GFN = Rule("a table goes out of sync when it is mapped writable", f"{_MMU}, mmu_try_to_unsync_pages", "order")
UNSYNC_KIND = Rule(
    "a table of the last level goes out of sync from in sync, and back from out of it",
    f"{_MMU}, kvm_unsync_page and kvm_unlink_unsync_page",
)  # fmt: skip

RULES = (ACCESSED, ACCESSED_WHERE, ERROR_WALK, ERROR_WHY, ALLOWED, WALK_ACCESS, UPPER)
"""Those that know the bits of the guest's entries."""

_P, _W, _U, _F, _A, _D, _PS = (np.uint64(bit) for bit in (1, 2, 4, 16, 32, 64, 128))
_RSVD, _PK, _NX = np.uint64(8), np.uint64(32), np.uint64(1 << 63)
_FRAME = np.uint64(((1 << 40) - 1) << 12)


def judge(order: Order, v: Visit) -> None:
    """Hold one visit's walks, shadow pages and their synchronisation against the rules."""
    _walks(order, v)
    _pages(v)


def _walks(order: Order, v: Visit) -> None:
    walks = np.flatnonzero(v.kind == WALK)
    if not len(walks) or order.foreign:
        return
    rows, kind = v.rows, v.kind
    behind, walk = v.previous(), v.before(WALK)
    run = np.isin(kind, (ELEM, ABIT, DBIT))  # what one walk prints, unbroken
    last = v.at("kind", behind)
    joined = run & (behind >= 0) & np.isin(last, (WALK, ELEM, ABIT, DBIT))
    level = rows["sub"].astype(np.int64)
    first = (kind == ELEM) & joined & (last == WALK)
    top = v.before_where(first)
    top = np.where(first, np.arange(len(kind), dtype=np.int64), top)
    again = (kind == ELEM) & joined & (last != WALK) & (level == v.at("sub", top))  # the walk is tried anew
    starts = first | again
    walk_no = np.cumsum(starts)  # (step,) the attempt that a step of a run belongs to
    member = joined & (top >= 0) & (walk >= 0) & (top > walk)
    mine = np.flatnonzero(member)
    if not len(mine):
        return
    # One record an attempt: its first and last step, what it read.
    number = walk_no[mine]
    begins = np.flatnonzero(np.concatenate([[True], number[1:] != number[:-1]]))
    ends = np.append(begins[1:], len(mine)) - 1
    start, end = mine[begins], mine[ends]  # (attempt,)
    whole = starts[start]
    pae = rows["sub"][start] == 3  # the four pointers of PAE have neither rights nor A
    element = kind[mine] == ELEM
    attempt = np.cumsum(np.concatenate([[True], number[1:] != number[:-1]])) - 1  # (member,)
    entry = rows["a"][mine]
    pointer = pae[attempt] & (rows["sub"][mine] == 3)
    real = element & ~pointer
    ones = np.uint64(0xFFFFFFFFFFFFFFFF)
    both = np.bitwise_and.reduceat(np.where(real, entry, ones), begins)
    any_ = np.bitwise_or.reduceat(np.where(real, entry, np.uint64(0)), begins)
    leaf_at = np.maximum.reduceat(np.where(element, mine, -1), begins)
    leaf = v.at("a", leaf_at)
    leaf_level = v.at("sub", leaf_at).astype(np.int64)
    ended = (leaf_level == 1) | ((leaf & _PS != 0) & (leaf_level < 4)) | (leaf & _P == 0)
    want_a = np.add.reduceat((real & (entry & _A == 0)).astype(np.int64), begins)
    got_a = np.add.reduceat((kind[mine] == ABIT).astype(np.int64), begins)
    got_d = np.add.reduceat((kind[mine] == DBIT).astype(np.int64), begins)
    access = v.at("b", walk[start])
    want_d = ((access & _W != 0) & (leaf & _D == 0)).astype(np.int64)
    # What comes behind an attempt: the task's next step of a known kind.
    n = len(kind)
    known = np.where(kind != OTHER, np.arange(n, dtype=np.int64), n)
    following = np.minimum.accumulate(known[::-1])[::-1]
    next_ = np.where(end + 1 < n, following[np.minimum(end + 1, n - 1)], n)
    there = (next_ < n) & whole
    next_ = np.minimum(next_, n - 1)
    there &= rows["task"][next_] == rows["task"][start]
    refused = kind[next_] == WERR
    retried = again[next_]
    code = rows["a"][next_]

    stray = np.isin(kind, (ABIT, DBIT)) & (behind >= 0)
    misplaced = ~np.isin(last, (ELEM, ABIT, DBIT)) | ((kind == ABIT) & (last == DBIT))
    v.find(ACCESSED, stray, misplaced, behind)
    faults, done = v.before(FAULT), v.before(RET, EMUL)
    asked = kind == WALK
    hit = asked & (rows["b"] & _P != 0)
    exits = v.before(EXIT)
    foreign = ((rows["b"] ^ v.at("b", faults)) & ~_RSVD != 0) | (v.at("sub", exits) != EXCEPTION)
    foreign |= (faults < exits) | (done > faults)
    wrong = (rows["b"] & (_W | _F) == _W | _F) | (rows["b"] & _RSVD != 0) | (hit & foreign & np.bool_(not order.nested))
    v.find(WALK_ACCESS, asked, wrong, behind)

    def find(rule: Rule, of: Any, wrong: Any, where: Any, context: Any) -> None:
        """The same for attempts: blamed is the step that closes each."""
        here = np.zeros(n, dtype=np.bool_)
        bad, seen = np.zeros(n, dtype=np.bool_), np.full(n, -1, dtype=np.int64)
        here[where[of]], bad[where[of & wrong]], seen[where] = True, True, context
        v.find(rule, here, bad, seen)

    well = there & ~refused & ~retried & ended & (leaf & _P != 0)
    # An error that was not recorded looks like none; what maps or is emulated next was surely not refused.
    told = np.bool_("kvm_mmu_walker_error" in order.seen)
    well &= told | np.isin(kind[next_], (REQ, PAGE, EMUL))
    a_told, d_told = (np.bool_(f"kvm_mmu_set_{bit}_bit" in order.seen) for bit in ("accessed", "dirty"))
    unlike = ((got_a != want_a) & a_told) | ((got_d != want_d) & d_told)
    find(ACCESSED, well, unlike, next_, leaf_at)
    find(ACCESSED, there & refused, (got_a > 0) | (got_d > 0), next_, leaf_at)
    wrong = ((access & _U != 0) & (both & _U == 0)) | ((access & _F != 0) & (any_ & _NX != 0))
    wrong |= (access & (_U | _W) == _U | _W) & (both & _W == 0)
    find(ALLOWED, well, wrong, next_, leaf_at)
    absent = leaf & _P == 0
    find(ALLOWED, there & ~refused & ~retried & told, absent, next_, leaf_at)
    said = refused & there
    other = ((code ^ access) & (_W | _U) != 0) | (code & ~access & _F != 0)
    other |= (code & (_RSVD | _PK) != 0) & (code & _P == 0)
    find(ERROR_WALK, said, other, next_, walk[start])
    present = (code & _P != 0) != ~absent
    reserved = code & (_RSVD | _PK) != 0
    user = code & _U != 0
    lacks = ((code & _W != 0) & (both & _W == 0)) | ((access & _F != 0) & (any_ & _NX != 0))
    lacks |= np.where(user, both & _U == 0, both & _U != 0)  # or SMEP and SMAP, for a supervisor
    find(ERROR_WHY, said & ended, present | (~absent & ~reserved & ~lacks), next_, leaf_at)
    _where(v, mine, attempt, entry, real, well & (got_a == want_a) & (got_d == want_d), start, leaf_at, find)
    if {"kvm_exit", "kvm_emulate_insn"} <= order.seen:
        _upper(order, v, mine, element, walk)


def _where(
    v: Visit, mine: Any, attempt: Any, entry: Any, real: Any, sound: Any, start: Any, leaf_at: Any, find: Any
) -> None:
    """Hold the address of each A and D against that of the entry: the frame from the entry above, the index."""
    kind, level = v.kind[mine], v.rows["sub"][mine].astype(np.int64)
    tops = v.rows["sub"][start].astype(np.int64)[attempt]
    narrow = tops == 2  # two levels: entries of four bytes
    width = np.where(narrow, np.int64(10), np.int64(9)).astype(np.uint64)
    address = v.at("a", v.before(WALK)[mine])
    index = address >> (np.uint64(12) + width * (np.maximum(level, 1) - 1).astype(np.uint64))
    index = (index & ((np.uint64(1) << width) - np.uint64(1))) * np.where(narrow, np.uint64(4), np.uint64(8))
    above = np.concatenate([np.zeros(1, dtype=np.uint64), entry[:-1]]) & _FRAME
    is_top = np.concatenate([[True], attempt[1:] != attempt[:-1]])
    place = np.where(is_top, np.uint64(0), above) | index
    lacks = real & (entry & _A == 0) & sound[attempt]
    for bit, asked in ((ABIT, lacks), (DBIT, None)):
        got = (kind == bit) & sound[attempt]
        if asked is None:
            at = np.searchsorted(mine, leaf_at[attempt[got]])
        else:
            at = np.flatnonzero(asked)
        told = mine[got]
        if len(at) != len(told):
            continue
        gpa, expected = v.rows["a"][told], place[at]
        mask = np.where(is_top[at], np.uint64(0xFFF), np.uint64(0xFFFFFFFFFFFFFFFF))
        wrong = (gpa ^ expected) & mask != 0
        find(ACCESSED_WHERE, np.ones(len(told), dtype=np.bool_), wrong, told, mine[at])


def _upper(order: Order, v: Visit, mine: Any, element: Any, walk: Any) -> None:
    """Upper entries that one task's walks read twice, while nothing happened that could have changed them."""
    rows, kind = v.rows, v.kind
    exits = kind == EXIT
    harmless = ~exits | ((rows["sub"] == EXCEPTION) & (rows["d"] >> np.uint64(31) & np.uint64(1) == 0))
    moved = ~harmless | ~np.isin(
        kind, (ENTRY, EXIT, FAULT, RET, REQ, SET, MARK, WALK, ELEM, ABIT, DBIT, PAGE, UNSYNC, SYNC)
    )
    moved |= (kind == RET) & (rows["a"] == np.uint64(order.numbers["EMULATE"]))
    # What others do counts as well: emulation, zaps and everything that is not a repaired fault, by line.
    lines = np.sort(rows["line"][moved])
    upper = mine[element & (rows["sub"][mine] > 1)]
    if len(upper) < 2:
        return
    level = rows["sub"][upper].astype(np.int64)
    tops = v.at("sub", v.before_where((kind == ELEM) & (v.at("kind", v.previous()) == WALK))[upper]).astype(np.int64)
    first = v.at("kind", v.previous()[upper]) == WALK
    tops = np.where(first, level, tops)
    width = np.where(tops == 2, np.int64(10), np.int64(9)).astype(np.uint64)
    prefix = v.at("a", walk[upper]) >> (np.uint64(12) + width * (level - 1).astype(np.uint64))
    sort = np.lexsort((rows["line"][upper], prefix, level, tops, rows["task"][upper]))
    upper, level, prefix, tops = upper[sort], level[sort], prefix[sort], tops[sort]
    a, b = upper[:-1], upper[1:]
    same = (rows["task"][a] == rows["task"][b]) & (level[:-1] == level[1:]) & (prefix[:-1] == prefix[1:])
    same &= tops[:-1] == tops[1:]
    quiet = np.searchsorted(lines, rows["line"][a]) == np.searchsorted(lines, rows["line"][b])
    of, bad = np.zeros(len(kind), dtype=np.bool_), np.zeros(len(kind), dtype=np.bool_)
    of[b] = same & quiet
    before, after = rows["a"][a], rows["a"][b]
    dirtied = (before & _PS != 0) & (level[:-1] < 4) & (before & _D == 0)  # a walk for a store sets D in a large leaf
    bad[b] = (before ^ after) & ~np.where(dirtied, _A | _D, _A) != 0
    seen = np.full(len(kind), -1, dtype=np.int64)
    seen[b] = a
    v.find(UPPER, of, bad, seen)


def _pages(v: Visit) -> None:
    kind, rows = v.kind, v.rows
    fault, last, done = v.before(FAULT), v.before(ENTRY, EXIT), v.before(RET)
    within = (fault >= 0) & (fault > last) & (done < fault) & (v.before(EMUL, NESTED) < fault)
    page, level = kind == PAGE, rows["sub"].astype(np.int64)
    # The entry that names the guest's table of this level: the walk's element one level up.
    walk = v.before(WALK)
    for above in range(2, 6):
        of = page & within & (rows["c"] == 0) & (level == above - 1) & (walk > fault)
        if not of.any():
            continue
        element = v.before_where((kind == ELEM) & (rows["sub"] == above))
        of &= element > walk
        tables = v.at("a", element)
        named = (tables & _FRAME) >> np.uint64(12)
        of &= (tables & _PS == 0) | np.bool_(above > 3)
        narrow = rows["d"] == np.uint64(4)
        v.find(SHADOW_GFN, of & ~narrow, rows["a"] != named, element)
    behind = v.before(PAGE, SET, MARK, RET, ENTRY, EXIT)
    new = (v.at("kind", behind) == PAGE) & (v.at("b", behind) == 1) & (behind > fault) & within
    lower = v.at("sub", behind).astype(np.int64)
    wrong = np.where(page, level != lower - 1, np.where(kind == SET, level, 1) != lower)
    v.find(PAGE_DOWN, new & np.isin(kind, (PAGE, SET, MARK)), wrong, behind)
    unsync = kind == UNSYNC
    request = v.before(REQ)
    late = v.before(SET) > request
    v.find(UNSYNC_GFN, unsync & within & (request > fault), (rows["a"] != v.at("a", request)) | late, request)
    none = np.full(len(kind), -1, dtype=np.int64)
    both = unsync | (kind == SYNC)
    bad = (level != 1) | (rows["b"] != np.where(unsync, np.uint64(0), np.uint64(1)))
    bad |= (rows["d"] == np.uint64(8)) & (rows["c"] != 0)
    v.find(UNSYNC_KIND, both, bad, none)
    after = (v.at("kind", v.previous()) == ZAP) & (v.previous() >= 0) & (kind != OTHER)
    zap = v.previous()
    loose = v.at("b", zap) == 1
    told = (kind == SYNC) & (rows["a"] == v.at("a", zap))
    v.find(UNSYNC_KIND, after & (v.at("sub", zap) == 1) & (loose | told), loose != told, zap)
