"""Who changes an spte, under which lock, and what the new word is.

The one idea: four states and a handful of writers. The fault handler builds entries, write-protection takes W away,
the fast path gives it back without the mmu-lock, and everything else takes the entry down. Each writer is a function
on whole arrays here, and each change that an spte may legally make is a row of :data:`TRANSITIONS`.
Chapter 3 tells the states apart, chapter 12 the merged protocol.

Facts: Linux 6.1 ``arch/x86/kvm/mmu/{spte.c,mmu.c,tdp_mmu.c}`` and, for the rows that say so, the patch series message
of 29 March 2012 and Linux 3.6 ``mmu.c``; held against recorded changes in ``tests/test_update.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmu.bits import Word, as_words, like
from mmu.spte import (
    ACCESS_TRACKED,
    DEFAULT,
    DIRTY_LOG,
    FROZEN,
    GUEST_TABLE,
    HOST_READ_ONLY,
    LEAVES,
    MARKED,
    MMIO,
    NON_LEAF,
    NONE,
    PROTECTED,
    REMOVED,
    STATES,
    WRITABLE,
    SpteLayout,
    classify,
    is_present,
    layout_named,
)

# Who may change what -------------------------------------------------------------------------------------------------

NO_LOCK = "none"
MMU_LOCK = "mmu-lock"
MMU_LOCK_SHARED = "mmu-lock, shared with other faults where the TDP MMU runs"

_ANY = (NONE, MMIO, NON_LEAF, *LEAVES)
_CAUSES = (WRITABLE, DIRTY_LOG, GUEST_TABLE, HOST_READ_ONLY)
_BUILT = (WRITABLE, GUEST_TABLE, HOST_READ_ONLY, PROTECTED, ACCESS_TRACKED)  # make_spte sets W and MMU_W as one


@dataclass(frozen=True)
class Transition:
    """One way in which an spte changes: from any state of ``old`` to any of ``new``.

    ``who`` names the kernel's function, ``lock`` what it must hold, ``flush`` when other CPUs' TLBs are flushed.
    """

    name: str
    old: tuple[int, ...]
    new: tuple[int, ...]
    who: str
    lock: str
    flush: str
    source: str


TRANSITIONS = (
    Transition(
        "fast repair",
        (DIRTY_LOG,),
        (WRITABLE,),
        "fast_page_fault, one cmpxchg",
        NO_LOCK,
        "never: a right is added",
        "Linux 3.6 to 6.12 mmu.c",
    ),
    Transition(
        "fast restore",
        (ACCESS_TRACKED,),
        _CAUSES,
        "fast_page_fault, one cmpxchg, where A/D bits are off",
        NO_LOCK,
        "never: rights are added",
        "Linux 4.11 to 6.12 mmu.c, restore_acc_track_spte",
    ),
    Transition(
        "the CPU's own",
        (NON_LEAF, *LEAVES),
        (NON_LEAF, *LEAVES),
        "the CPU sets A, or D where W is set",
        NO_LOCK,
        "never",
        "the state stays the same",
    ),
    Transition(
        "map",
        (NONE,),
        (*_BUILT, NON_LEAF, MMIO),
        "a page fault or its prefetch: mmu_set_spte, kvm_tdp_mmu_map, mark_mmio_spte",
        MMU_LOCK_SHARED,
        "not needed",
        "Linux 6.1 mmu.c, tdp_mmu.c",
    ),
    Transition(
        "map over MMIO",
        (MMIO,),
        (*_BUILT, MMIO),
        "a page fault after the memory slots changed: the generation is stale",
        MMU_LOCK_SHARED,
        "not needed: the CPU never caches an entry with a reserved bit",
        "Linux 6.1 mmu.c, check_mmio_spte; recorded in D scenarios",
    ),
    Transition(
        "map anew",
        (*_CAUSES, PROTECTED, MARKED, ACCESS_TRACKED),
        _BUILT,
        "a slow-path fault on the same pfn (make_spte builds the whole word again), or sync_page",
        MMU_LOCK_SHARED,
        "if a right went",
        "Linux 6.1 spte.c, mmu.c, tdp_mmu.c; recorded in G2 and H scenarios",
    ),
    Transition(
        "dirty log",
        (WRITABLE,),
        (DIRTY_LOG,),
        "KVM_GET_DIRTY_LOG, KVM_CLEAR_DIRTY_LOG, a dirty ring's reset, or a slot that starts to be logged",
        MMU_LOCK_SHARED,
        "before the call returns, possibly after the lock is dropped",
        "Linux 6.1 mmu.c, spte_write_protect without pt_protect; tdp_mmu.c, wrprot_gfn_range",
    ),
    Transition(
        "shadow",
        (WRITABLE, DIRTY_LOG),
        (GUEST_TABLE,),
        "the gfn becomes a shadowed guest page table: rmap_write_protect, kvm_tdp_mmu_write_protect_gfn",
        MMU_LOCK,
        "before the lock is dropped",
        "Linux 6.1 mmu.c, spte_write_protect with pt_protect",
    ),
    Transition(
        "age",
        _CAUSES,
        (ACCESS_TRACKED,),
        "the host asks whether the page is used (clear_young notifier), where A/D bits are off",
        MMU_LOCK,
        "not before the lock is dropped",
        "Linux 6.1 spte.c, mark_spte_for_access_track",
    ),
    Transition(
        "split",
        LEAVES,
        (NON_LEAF,),
        "a large page is replaced by a table of small ones, for the dirty log or for an executable 4 KiB page",
        MMU_LOCK_SHARED,
        "before anything of the old page is trusted",
        "Linux 6.1 tdp_mmu.c, tdp_mmu_split_huge_page",
    ),
    Transition(
        "fill",
        (NONE,),
        (*_CAUSES, ACCESS_TRACKED),
        "a split copies the large page's rights into its new table; prints no event",
        MMU_LOCK_SHARED,
        "not needed: nobody can walk the table yet",
        "Linux 6.1 tdp_mmu.c, tdp_mmu_split_huge_page",
    ),
    Transition(
        "collapse",
        (NON_LEAF,),
        LEAVES,
        "a fault maps a large page where a table was",
        MMU_LOCK_SHARED,
        "before the table is freed",
        "Linux 6.1 tdp_mmu.c, tdp_mmu_map_handle_target_level",
    ),
    Transition(
        "freeze",
        _ANY,
        (REMOVED, FROZEN),
        "the TDP MMU takes down the entry, or the table it is in, while others may still run",
        MMU_LOCK_SHARED,
        "before the entry is given free",
        "Linux 6.1 tdp_mmu.c, tdp_mmu_zap_spte_atomic, handle_removed_pt",
    ),
    Transition(
        "release",
        (REMOVED, FROZEN),
        (NONE,),
        "the thread that froze the entry, after its flush; prints no event",
        MMU_LOCK_SHARED,
        "has happened",
        "Linux 6.1 tdp_mmu.c, tdp_mmu_zap_spte_atomic",
    ),
    Transition(
        "zap",
        _ANY,
        (NONE,),
        "an MMU notifier, a memory slot that goes or changes, kvm_mmu_zap_all",
        MMU_LOCK,
        "before the page can be used for something else",
        "Linux 6.1 mmu.c, tdp_mmu.c",
    ),
    Transition(
        "mark (2012)",
        (PROTECTED, MARKED),
        (MARKED,),
        "a faulting vCPU puts its id into the entry; a later one overwrites it",
        NO_LOCK,
        "never",
        "series message of 29 March 2012",
    ),
    Transition(
        "upgrade (2012)",
        (MARKED,),
        (WRITABLE,),
        "the faulting vCPU's cmpxchg: W in, id out",
        NO_LOCK,
        "never: a right is added",
        "series message of 29 March 2012",
    ),
    Transition(
        "write-protect (2012)",
        (WRITABLE, MARKED),
        (PROTECTED,),
        "any write-protection, after it has flagged the rmap: W and id out",
        MMU_LOCK,
        "if W was set",
        "series message of 29 March 2012",
    ),
)
"""Every legal change of an spte's state, with its maker and its lock."""

JUDGEMENTS = (
    "legal",
    "no such transition",
    "the pfn of a present leaf changed",
    "HOST_W was withdrawn from a present leaf",
)
"""What :func:`judge` finds; the positions are its result."""

_LEGAL = np.zeros((len(STATES), len(STATES)), dtype=np.bool_)  # (old state, new state)
for _row in TRANSITIONS:
    if _row.name != "the CPU's own":
        _LEGAL[np.ix_(_row.old, _row.new)] = True
_LEGAL |= np.eye(len(STATES), dtype=np.bool_)  # A, D, generation, a lower table's address
_LEAF = np.isin(np.arange(len(STATES), dtype=np.int64), np.array(LEAVES, dtype=np.int64))  # (state,)


def judge(old: Word, new: Word, layout: str | SpteLayout = DEFAULT, level: ArrayLike | None = None) -> Any:
    """Whether each change ``old`` to ``new`` of one spte is legal: a position in :data:`JUDGEMENTS`. Chapter 3.

    Any shape, uint8; arguments broadcast. The pfn of a present leaf never changes (Linux 6.1 tdp_mmu.c stops the
    machine over it), and HOST_W is never taken from a present leaf: the host's notifier takes the whole entry away.
    HOST_W may come, though the kernel's comment calls it immutable: once the page's other user is gone the host maps
    it writable without any notice, and the next write fault builds the entry anew (recorded in H scenarios).

    >>> JUDGEMENTS[judge(0x625ae65, 0x625ae67)], JUDGEMENTS[judge(0x625ae67, 0x625be67)]
    ('legal', 'the pfn of a present leaf changed')
    """
    form = layout_named(layout)
    before, after = np.broadcast_arrays(as_words(old, "old"), as_words(new, "new"))
    state_before, state_after = classify(before, form, level), classify(after, form, level)
    both = _LEAF[state_before] & _LEAF[state_after]
    changed = before ^ after
    why = np.where(_LEGAL[state_before, state_after], np.uint8(0), np.uint8(1))
    host = np.uint64(form.bits.mask("HOST_W"))
    why[(why == 0) & both & ((before & changed & host) != 0)] = 3
    why[both & ((changed & np.uint64(form.bits.mask("PFN"))) != 0)] = 2
    return why.item() if np.ndim(old) == 0 and np.ndim(new) == 0 else why


def makers(old: int, new: int, layout: str | SpteLayout = DEFAULT, level: int | None = None) -> tuple[Transition, ...]:
    """The rows of :data:`TRANSITIONS` that explain one change of an spte; none where it is illegal. Chapter 3.

    >>> [row.name for row in makers(0x625ae65, 0x625ae67)]
    ['fast repair', 'map anew']
    """
    form = layout_named(layout)
    if judge(old, new, form, level) or old == new:
        return ()
    before, after = classify(old, form, level), classify(new, form, level)
    used = form.bits.mask(*(name for name in ("A", "D") if name in form.bits))
    own = before == after and before in (NON_LEAF, *LEAVES) and not (old ^ new) & ~used and not old & ~new
    rows = (row for row in TRANSITIONS if before in row.old and after in row.new)
    return tuple(row for row in rows if own or row.name != "the CPU's own")


def changed(old: int, new: int, layout: str | SpteLayout = DEFAULT) -> str:
    """What differs between two values of one spte, field by field. Chapter 3.

    >>> changed(0x625ae65, 0x625ae67), changed(0x625ae67, 0)
    ('W 0→1', 'writable → none')
    """
    form = layout_named(layout)
    before, after = (int(classify(word, form)) for word in (old, new))
    if old == new:
        return "nothing"
    if not (is_present(old, form) and is_present(new, form)):
        return f"{STATES[before]} → {STATES[after]}" if before != after else f"{old:#x} → {new:#x}"
    parts = []
    for name in form.bits:
        was, now = form.bits.field(old, name), form.bits.field(new, name)
        if was != now:
            parts.append(f"{name} {was}→{now}" if form.bits[name].width == 1 else f"{name} {was:#x}→{now:#x}")
    rest = form.bits.unnamed(old ^ new)
    return ", ".join(parts + ([f"unnamed {rest:#x}"] if rest else []))


# The fast path -------------------------------------------------------------------------------------------------------

FAST = (
    "fixed",
    "spurious",
    "not present",
    "not the last level",
    "more than W is missing",
    "large page in a logged slot",
)
"""What :func:`fast_page_fault` comes to; from 2 up the fault goes on to the slow path (RET_PF_INVALID)."""


def allows(
    words: Word, *, write: ArrayLike = False, fetch: ArrayLike = False, layout: str | SpteLayout = DEFAULT
) -> Any:
    """True where the spte lets the access through (``is_access_allowed``); any shape, bool. Chapter 3.

    A fetch asks for X (or for NX clear), a write for W, a read for bit 0. Only KVM's own three questions are asked:
    U, and what the levels above say, are the CPU's affair.

    >>> allows(0x625ae65), allows(0x625ae65, write=True)
    (True, False)
    """
    form = layout_named(layout)
    w = as_words(words, form.bits.name)
    bit = {name: np.uint64(form.bits.mask(name)) for name in form.bits}
    executable = (w & bit["X"]) != 0 if form.ept else (w & bit["NX"]) == 0
    asked = np.where(write, (w & bit["W"]) != 0, (w & np.uint64(1)) != 0)
    return like(words, np.where(fetch, executable, asked))


def fast_page_fault(
    words: Word,
    *,
    write: ArrayLike = True,
    fetch: ArrayLike = False,
    level: ArrayLike = 1,
    logged: ArrayLike = True,
    ad_bits: bool = True,
    layout: str | SpteLayout = DEFAULT,
) -> tuple[Any, Any]:
    """What Linux 6.1's fast path makes of each spte: the word its cmpxchg writes, and the outcome. Chapters 3 and 12.

    Args:
        words: the last spte that the lockless walk found; direct shadow pages only.
        write, fetch: the access; neither is a read.
        level: the page-table level of each spte, 1 for 4 KiB pages.
        logged: the memory slot has a dirty log.
        ad_bits: KVM uses A/D bits, so nothing is ever access-tracked.
        layout: the layout of ``words``.

    Returns:
        ``(new, outcome)``: uint64 and a position in :data:`FAST` (uint8). ``new`` differs from the old word where
        the outcome is ``fixed`` alone.

    >>> new, outcome = fast_page_fault(0x625ae65)
    >>> hex(new), FAST[outcome]
    ('0x625ae67', 'fixed')
    """
    form = layout_named(layout)
    scalar = all(np.ndim(value) == 0 for value in (words, write, fetch, level, logged))
    w, write, fetch, level, logged = np.broadcast_arrays(
        as_words(words, form.bits.name),
        np.asarray(write, dtype=np.bool_),
        np.asarray(fetch, dtype=np.bool_),
        np.asarray(level, dtype=np.int64),
        np.asarray(logged, dtype=np.bool_),
    )
    bit = {name: np.uint64(form.bits.mask(name)) for name in form.bits}
    last = (level == 1) | ((w & bit["PS"]) != 0)
    new = w if ad_bits else np.where(_access_tracked(w, form), restore(w, form), w)
    upgrade = write & ((w & bit["MMU_W"]) != 0)
    new = np.where(upgrade, new | bit["W"], new)
    outcome = np.zeros(w.shape, dtype=np.uint8)
    outcome[(new == w) | ~allows(new, write=write, fetch=fetch, layout=form)] = 4
    outcome[upgrade & (level > 1) & logged] = 5
    outcome[allows(w, write=write, fetch=fetch, layout=form)] = 1
    outcome[~last] = 3
    outcome[~is_present(w, form)] = 2
    new = np.where(outcome == 0, new, w)
    return (new.item(), outcome.item()) if scalar else (new, outcome)


def _access_tracked(w: NDArray[np.uint64], form: SpteLayout) -> NDArray[np.bool_]:
    if "SAVED_R" not in form.bits:  # only EPT can do without A/D bits
        return np.zeros(w.shape, dtype=np.bool_)
    kind, rights = np.uint64(form.bits.mask("AD_KIND")), np.uint64(form.bits.mask("R", "W", "X"))
    return ((w & kind) == np.uint64(1 << form.bits["AD_KIND"].low)) & ((w & rights) == 0)


def restore(words: Word, layout: str | SpteLayout = "6.1-ept") -> Any:
    """Access-tracked sptes with their saved R and X given back (``restore_acc_track_spte``); W is never saved.

    >>> hex(restore(0x75000034d4fe870))
    '0x61000034d4fe875'
    """
    form = layout_named(layout)
    w = as_words(words, form.bits.name)
    if "SAVED_R" not in form.bits:
        return like(words, w)
    saved = np.uint64(form.bits.mask("SAVED_R", "SAVED_X"))
    rights = np.uint64(form.bits.mask("R", "W", "X"))
    return like(words, w & ~saved & ~rights | (w & saved) >> np.uint64(form.bits["SAVED_R"].low))


# The writers under the lock ------------------------------------------------------------------------------------------


def age(words: Word, layout: str | SpteLayout = DEFAULT) -> Any:
    """Sptes after KVM was asked whether their pages are used (``mark_spte_for_access_track``). Chapter 3.

    Where the entry has A/D bits, A is cleared. Where not (AD_KIND 1), the CPU loses every right and R and X are saved.

    >>> hex(age(0x625ae65)), hex(age(0x61000034d4fe877, "6.1-ept"))
    ('0x625ae45', '0x75000034d4fe870')
    """
    form = layout_named(layout)
    w = as_words(words, form.bits.name)
    result = w & ~np.uint64(form.bits.mask("A"))
    if "SAVED_R" in form.bits:
        kept, rights = np.uint64(form.bits.mask("R", "X")), np.uint64(form.bits.mask("R", "W", "X"))
        hidden = w & ~rights | (w & kept) << np.uint64(form.bits["SAVED_R"].low)
        kind = w & np.uint64(form.bits.mask("AD_KIND"))
        off = kind == np.uint64(1 << form.bits["AD_KIND"].low)
        result = np.where(off, np.where(_access_tracked(w, form), w, hidden), result)
    return like(words, result)


def write_protect(words: Word, *, shadow: bool = False, layout: str | SpteLayout = DEFAULT) -> Any:
    """Sptes after write-protection (``spte_write_protect``): W goes, and with ``shadow`` MMU_W as well. Chapter 3.

    Without ``shadow`` this is the dirty log's, which the fast path may undo; with it the gfn has become a shadowed
    guest page table, which it must not.

    >>> hex(write_protect(0x625ae67)), hex(write_protect(0x625ae67, shadow=True))
    ('0x625ae65', '0x625aa65')
    """
    form = layout_named(layout)
    gone = form.bits.mask("W", "MMU_W") if shadow else form.bits.mask("W")
    return like(words, as_words(words, form.bits.name) & ~np.uint64(gone))


EXEC, WRITE, USER = 1, 2, 4
ALL = EXEC | WRITE | USER
"""Rights for :func:`make_spte`, as KVM numbers them; on EPT, USER stands for reading."""


def make_spte(
    pfn: Word,
    *,
    level: ArrayLike = 1,
    access: ArrayLike = ALL,
    host_writable: ArrayLike = True,
    shadowed: ArrayLike = False,
    prefetch: ArrayLike = False,
    old: Word = 0,
    ad_kind: int = 0,
    nx_huge_pages: bool = False,
    memory_type: int = 6,
    ipat: bool = True,
    exec_only: bool = True,
    old_tables_count: bool = False,
    layout: str | SpteLayout = DEFAULT,
) -> Any:
    """The leaf that Linux 6.1 and 6.12 build for each pfn (``make_spte``); arguments broadcast, uint64. Chapter 3.

    Args:
        pfn: page frame numbers.
        level: 1 for 4 KiB pages, 2 for 2 MiB, 3 for 1 GiB.
        access: what the guest's own tables allow: EXEC, WRITE, USER; a direct MMU allows ALL.
        host_writable: the host maps the page writable, and its memory slot is not read-only.
        shadowed: the gfn is a shadowed guest page table that cannot be left out of sync: W must stay clear.
        prefetch: the guest has not asked for this page yet: A stays clear (without A/D bits: access-tracked).
        old: the word that is there now. A writable leaf, or an MMIO word with W in it, skips both the question
            whether the gfn is shadowed and D: that is why recorded sptes now and then lack D.
        ad_kind: 0 with A/D bits, 1 without, 2 write-protection instead of D.
        nx_huge_pages: the mitigation that keeps large pages from being executable is on.
        memory_type, ipat: EPT's memory type; 6 is write-back.
        exec_only: the CPU allows EPT entries that can be executed but not read.
        old_tables_count: before 6.1.120 and 6.12.2, a pointer to a lower table in ``old`` counted as writable too.
        layout: 6.1's or 6.12's.

    Raises:
        ValueError: another layout, or a pfn, level or kind that does not fit.

    >>> hex(make_spte(0x625a)), hex(make_spte(0x625a, host_writable=False)), hex(make_spte(0x625a, prefetch=True))
    ('0x625ae67', '0x625a825', '0x625ae47')
    """
    form = _linux_6(layout)
    bit = {name: np.uint64(form.bits.mask(name)) for name in form.bits}
    scalar = all(np.ndim(value) == 0 for value in (pfn, level, access, host_writable, shadowed, prefetch, old))
    frames, level, access, host, shadowed, prefetch, before = np.broadcast_arrays(
        as_words(pfn, "pfn"),
        np.asarray(level, dtype=np.int64),
        np.asarray(access, dtype=np.int64),
        np.asarray(host_writable, dtype=np.bool_),
        np.asarray(shadowed, dtype=np.bool_),
        np.asarray(prefetch, dtype=np.bool_),
        as_words(old, "old"),
    )
    if frames.size and int(frames.max()) >> form.bits["PFN"].width:
        raise ValueError(f"pfn is {int(frames.max()):#x}; expected at most {form.bits['PFN'].width} bits")
    if level.size and not (1 <= level.min() and level.max() <= 3):
        raise ValueError(f"level is {level.min()} to {level.max()}; expected 1, 2 or 3: no larger page exists")
    if ad_kind not in (0, 1, 2) or (ad_kind and not form.ept):
        raise ValueError(f"ad_kind is {ad_kind}; expected 0, or on EPT 1 or 2")

    def where(condition: NDArray[np.bool_], *names: str) -> NDArray[np.uint64]:
        return np.where(condition, np.uint64(form.bits.mask(*names)), np.uint64(0))

    large = level > 1
    executable = ((access & EXEC) != 0) & ~(large & nx_huge_pages)
    wanted = ((access & WRITE) != 0) & host
    was_writable = ((before & bit["W"]) != 0) & (old_tables_count | ~large | ((before & bit["PS"]) != 0))
    writable = wanted & (was_writable | ~shadowed)
    word = frames << np.uint64(12) | bit["MMU_P"] | np.uint64(ad_kind << form.bits["AD_KIND"].low)
    word = word | where(large, "PS") | where(host, "HOST_W") | where(writable, "W", "MMU_W")
    if form.ept:
        word = (
            word | np.uint64(form.none) | np.uint64(memory_type << form.bits["MT"].low | ipat << form.bits["IPAT"].low)
        )
        word = word | where(((access & USER) != 0) | (not exec_only), "R") | where(executable, "X")
    else:
        word = word | bit["P"] | where(~executable, "NX") | where((access & USER) != 0, "U")
    if ad_kind != 1:
        word = word | where(~prefetch, "A") | where(writable & ~was_writable, "D")
    word = np.where(prefetch, age(word, form), word)
    return word.item() if scalar else word


def make_table(pfn: Word, *, ad_bits: bool = True, exec_only: bool = True, layout: str | SpteLayout = DEFAULT) -> Any:
    """The entry that points to a lower table at each pfn (``make_nonleaf_spte``): it grants everything. Chapter 3.

    >>> hex(make_table(0x100b1b16)), hex(make_table(0x2c583b, layout="6.1-ept"))
    ('0x100b1b16827', '0x2c583b907')
    """
    form = _linux_6(layout)
    rights = form.bits.mask("R", "W", "X") | form.none if form.ept else form.bits.mask("P", "W", "U")
    word = as_words(pfn, "pfn") << np.uint64(12) | np.uint64(rights | form.bits.mask("MMU_P"))
    return like(pfn, word | np.uint64(form.bits.mask("A") if ad_bits else 1 << form.bits["AD_KIND"].low))


def split(
    word: int, *, level: int = 2, nx_huge_pages: bool = False, layout: str | SpteLayout = DEFAULT
) -> NDArray[np.uint64]:
    """The 512 entries that replace one large leaf (``make_huge_page_split_spte``): its rights, smaller pages.

    Args:
        word: the large leaf.
        level: its level: 2 for 2 MiB, 3 for 1 GiB.
        nx_huge_pages: the mitigation is on: 4 KiB entries become executable again.

    Returns:
        ``(entry,)`` uint64. Under a dirty log every one of them is then write-protected by itself.

    >>> [hex(small) for small in split(0x6200ee7)[:2].tolist()]
    ['0x6200e67', '0x6201e67']
    """
    form = _linux_6(layout)
    if level not in (2, 3) or not int(word) & form.bits.mask("PS"):
        raise ValueError(f"{int(word):#x} at level {level} is no large leaf; expected PS set, and level 2 or 3")
    step = np.uint64(12 + 9 * (level - 2))
    small = as_words(int(word)) | np.arange(512, dtype=np.uint64) << step  # (entry,)
    if level == 2:
        small &= ~np.uint64(form.bits.mask("PS"))
        if nx_huge_pages:
            hidden = _access_tracked(small, form)
            seen = np.where(hidden, restore(small, form), small) if form.ept else small
            seen = seen | np.uint64(form.bits.mask("X")) if form.ept else seen & ~np.uint64(form.bits.mask("NX"))
            small = np.where(hidden, age(seen, form), seen)
    return small


def _linux_6(layout: str | SpteLayout) -> SpteLayout:
    form = layout_named(layout)
    if form.present != "MMU_P":
        raise ValueError(f"layout is {form.name}; expected one of Linux 6: how older kernels build entries is not here")
    return form


def l1tf_mask(cache_bits: int) -> int:
    """The five address bits that a CPU with the L1TF bug must find set in an entry that it shall not follow.

    Args:
        cache_bits: how many physical address bits the CPU's L1 cache uses, 44 for example.

    Source: Linux 6.1 spte.c, ``kvm_mmu_reset_all_pte_masks``. Chapter 3.

    >>> hex(l1tf_mask(44))
    '0xf8000000000'
    """
    if not 17 <= cache_bits <= 46:
        raise ValueError(f"cache_bits is {cache_bits}; expected 17 to 46: beyond, KVM takes the CPU to be safe")
    return 0b11111 << (cache_bits - 5)


def make_mmio(
    gfn: Word,
    *,
    access: Word = 0b110,
    generation: Word = 0,
    layout: str | SpteLayout = DEFAULT,
    l1tf: int = 0,
) -> Any:
    """The MMIO spte for each gfn (``make_mmio_spte``, ``mark_mmio_spte``); any shape, uint64. Chapter 3.

    Args:
        gfn: guest frame numbers that no memory slot covers.
        access: what the guest's mapping allowed: W is 2, U is 4 (EPT keeps neither).
        generation: the memory slots' generation; only its low 19 bits are kept (18 in 5.10, none before).
        layout: the layout of the result.
        l1tf: :func:`l1tf_mask` of the CPU, 0 on a CPU without the bug: the gfn's bits there move up by five.

    >>> hex(make_mmio(0x80000, generation=4))
    '0x8000080000027'
    """
    form = layout_named(layout)
    gpa = as_words(gfn, "gfn") << np.uint64(12)
    mask = np.uint64(l1tf)
    word = np.uint64(form.mmio_value) | gpa | mask | (gpa & mask) << np.uint64(5)
    if not form.ept:
        word = word | np.uint64(1) | (as_words(access, "access") & np.uint64(0b110))
    if "GEN_LOW" in form.mmio:
        low, high = form.mmio["GEN_LOW"], form.mmio["GEN_HIGH"]
        g = as_words(generation, "generation")
        word = word | g << np.uint64(low.low) & np.uint64(low.mask)
        word = word | g >> np.uint64(low.width) << np.uint64(high.low) & np.uint64(high.mask)
    if form.ept:
        word = word | np.uint64(0b110)
    return word.item() if all(np.ndim(value) == 0 for value in (gfn, access, generation)) else word
