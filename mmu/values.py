"""Rules on single events: what an spte, a change of one, or a fast path's verdict can never be, whatever went before.

The one idea: an event prints words whose bits depend on one another, and says what KVM made of them, so much of what
is wrong shows in the event alone. :mod:`mmu.chains` holds events against their forerunners. Chapter 13.

Facts: Linux 6.1 ``mmu/spte.c``, ``mmu/mmu.c``, ``mmu/tdp_mmu.c``, ``mmu/mmutrace.h`` (facts 2.4, 2.6, 3.6 and 4).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmu import spte, trace, update
from mmu.histories import unhashed
from mmu.ledger import Ledger, Rule
from mmu.scan import MISSING
from mmu.spte import FROZEN, ILLEGAL, LEAVES, NON_LEAF, REMOVED, UNKNOWN, SpteLayout

Words = NDArray[np.uint64]
Bools = NDArray[np.bool_]

_FAST = "Linux 6.1 mmu.c, fast_page_fault"
_TDP = "Linux 6.1 tdp_mmu.c, handle_changed_spte"
_TRACE = "Linux 6.1 mmu/mmutrace.h"
_STATES = "Linux 6.1 mmu/spte.h, the comment on SPTE_MMU_WRITABLE"

W_ALONE = Rule("W is set in a leaf only where HOST_W and MMU_W are", _STATES, "layout")
MMU_ALONE = Rule("MMU_W is set only where HOST_W is", _STATES, "layout")
MALFORMED = Rule("a present leaf is one that the CPU accepts", "Linux 6.1 mmu/spte.c, make_spte", "layout")
NO_VALUE = Rule("an spte is present, MMIO, removed or nothing", "Linux 6.1 mmu/spte.h", "layout, seldom")
NEVER = Rule("bits that KVM never sets are clear", "Linux 6.1 mmu/spte.c, make_spte", "layout, seldom")
ALIGNED = Rule("an entry's level is 1 to 5, and its gfn a multiple of what it maps", _TDP)
SAME = Rule("kvm_tdp_mmu_spte_changed is printed only for a change", _TDP)
RELEASED = Rule("who removed an entry gives it free without an event", "Linux 6.1 tdp_mmu.c, tdp_mmu_zap_spte_atomic")
TRANSITION = Rule("an spte changes as one of its makers changes it", "mmu.update.TRANSITIONS", "layout")
NEW_PFN = Rule("the pfn of a present leaf does not change", f"{_TDP}, which stops the machine over it", "layout")
HOST_GONE = Rule("HOST_W is not withdrawn from a present leaf", f"{_STATES}: immutable while present", "layout")
LETTERS = Rule("the letters of kvm_mmu_set_spte are those of its spte", _TRACE, "layout")
SET_LEAF = Rule("kvm_mmu_set_spte prints no table and no MMIO spte", "Linux 6.1 mmu.c, mmu_set_spte", "layout")
TABLE = Rule("a direct table's gfn is a multiple of what it covers", "Linux 6.1 mmu.c, direct_map; tdp_mmu.c")
INDEX = Rule("the fast path's entry lies where the address says", "Linux 6.1 mmu.c, shadow_walk_init")
FAST_CODE = Rule("the fast path is for writes to present pages, or where A/D bits are off", f"{_FAST}: can_be_fast")
FAST_FLAGS = Rule("a fast fault is fixed or spurious, not both", _TRACE)
FAST_PFN = Rule("a fast fix keeps the pfn", f"{_FAST}: the cmpxchg adds rights alone", "layout")
FAST_MORE = Rule("a fast fix adds W, or gives saved rights back, and changes nothing else", _FAST, "layout")
FAST_ABSENT = Rule("the spte of a fixed fault was present, or access-tracked", _FAST, "layout")
FAST_LACKS = Rule("a fixed fault lacked W alone, and HOST_W and MMU_W were set", _FAST, "layout")
FAST_NOTHING = Rule("the spte of a fixed fault forbade the access", f"{_FAST}: is_access_allowed", "layout")
FAST_SPURIOUS = Rule("the spte of a spurious fault allowed the access", f"{_FAST}: is_access_allowed", "layout")
FAST_ALLOWED = Rule("a fault that its spte allowed is spurious", f"{_FAST}: is_access_allowed", "layout")
FAST_MISSED = Rule("a fault that the fast path can fix is fixed", f"{_FAST} gives up only after five races", "layout")
STALE = Rule("a valid MMIO spte is of the present generation", "Linux 6.1 mmu.c, check_mmio_spte")
GENERATION = Rule(
    "check_mmio_spte prints the generation of its spte", "Linux 6.1 spte.h, get_mmio_spte_generation", "layout"
)
NO_PLACE = Rule("the fast path names the entry that it looked at", f"{_FAST}: sptep is of the last level found")
PAGE_NEW = Rule("a new shadow page is in sync and unused; one of entries of 8 bytes has no quadrant", f"{_TRACE}: role")
RANGE = Rule("the host's notifier names whole pages of user space", "Linux 6.1 kvm_main.c, mmu_notifier_range")
USER_NAME = Rule("an exit to user space has the number of its name", "Linux 6.1 include/uapi/linux/kvm.h")
RING_USED = Rule("a dirty ring holds what was pushed and not reset", "Linux 6.1 dirty_ring.c, kvm_dirty_ring_used")

LAYOUT_RULES = tuple(rule for rule in list(globals().values()) if isinstance(rule, Rule) and "layout" in rule.needs)
FAST_RULES = (FAST_PFN, FAST_MORE, FAST_ABSENT, FAST_LACKS, FAST_NOTHING, FAST_SPURIOUS, FAST_ALLOWED, FAST_MISSED)

_W, _U, _RSVD, _P, _F = (np.uint64(bit) for bit in (2, 4, 8, 1, 16))
_REMOVED_5 = np.array([0x5A0, 1 << 59], dtype=np.uint64)  # 5.11 and 5.12, whose other words are 5.10's (from memory)


def states(words: Words, form: SpteLayout, level: NDArray[Any] | None) -> NDArray[np.uint8]:
    """Like :func:`mmu.spte.classify`, and the removed entries of 5.11 and 5.12 are known."""
    found = spte.classify(words, form, level)
    if form.present is None:
        found[np.isin(words, _REMOVED_5)] = REMOVED
    return found


def judge(ledger: Ledger, piece: trace.Trace, form: SpteLayout | None, *, ept: bool, old_flags: bool) -> None:
    """Hold every event of a piece that names an spte against the rules.

    Args:
        ledger: takes the findings.
        piece: the events.
        form: the sptes' layout; None where it is not known, then only rules that need none are applied.
        ept: error codes are of a machine with EPT.
        old_flags: ``spurious`` and ``fixed`` tell of W in the old and the new spte, as up to 5.13.
    """
    _changed(ledger, piece["kvm_tdp_mmu_spte_changed"], form)
    if form is not None:
        _set(ledger, piece["kvm_mmu_set_spte"], form)
    _fast(ledger, piece["fast_page_fault"], form, ept=ept, old_flags=old_flags)
    pages = piece["kvm_mmu_get_page"]
    pages = pages[(pages["direct"] == 1) & (pages["level"] > 0) & (pages["level"] < 6)]
    covers = np.uint64(9) * pages["level"].astype(np.uint64)
    bad = np.flatnonzero(pages["gfn"] & ((np.uint64(1) << covers) - np.uint64(1)) != 0)
    ledger.judge(TABLE, len(pages), bad, (pages["line"],), lambda i: f"gfn {int(pages['gfn'][i]):#x}")
    pages = piece["kvm_mmu_get_page"]
    used = pages["root"] > 0
    odd = ((pages["created"] == 1) & (used | (pages["unsync"] == 1))) | (
        (pages["gpte_bytes"] == 8) & (pages["quadrant"] > 0)
    )
    ledger.judge(
        PAGE_NEW, len(pages), np.flatnonzero(odd), (pages["line"],), lambda i: f"gfn {int(pages['gfn'][i]):#x}"
    )
    _host(ledger, piece)
    _mmio(ledger, piece["check_mmio_spte"], form)
    for event in ("kvm_dirty_ring_push", "kvm_dirty_ring_reset"):
        ring = piece[event]
        used = (ring["dirty"] - ring["reset"]) & np.uint64(0xFFFFFFFF)
        bad = np.flatnonzero(used != ring["used"].astype(np.uint64))
        ledger.judge(RING_USED, len(ring), bad, (ring["line"],), lambda i, r=ring: f"used {r['used'][i]}")


def _word(ledger: Ledger, events: NDArray[Any], field: str, form: SpteLayout, level: NDArray[Any] | None) -> Any:
    """The rules of one value; returns its state."""
    words, line = events[field], (events["line"],)
    state = states(words, form, level)
    w, host = (words & np.uint64(form.bits.mask(name)) != 0 for name in ("W", "HOST_W"))
    mmu = words & np.uint64(form.bits.mask("MMU_W")) != 0 if "MMU_W" in form.bits else host

    def say(i: int) -> str:
        return f"{field} {int(words[i]):#x}"

    illegal = state == ILLEGAL
    w_alone, mmu_alone = illegal & w & ~(mmu & host), illegal & mmu & ~host & ~w
    ledger.judge(W_ALONE, len(words), np.flatnonzero(w_alone), line, say)
    ledger.judge(MMU_ALONE, len(words), np.flatnonzero(mmu_alone), line, say)
    ledger.judge(MALFORMED, len(words), np.flatnonzero(illegal & ~w_alone & ~mmu_alone), line, say)
    unused = () if form.ept else ("PWT", "PCD", "G", "AD_KIND")
    never = words & np.uint64(sum(form.bits.mask(name) for name in unused if name in form.bits))
    never = never | form.bits.unnamed(words)
    present = np.isin(state, (*LEAVES, NON_LEAF))
    ledger.judge(NEVER, int(present.sum()), np.flatnonzero(present & (never != 0)), line, say)
    ledger.judge(NO_VALUE, len(words), np.flatnonzero(state == UNKNOWN), line, say)
    return state


def _misplaced(gfn: Words, level: NDArray[np.int64]) -> Bools:
    bad = (level < 1) | (level > 5)
    span = np.uint64(9) * (np.where(bad, 1, level) - 1).astype(np.uint64)
    return bad | (gfn & ((np.uint64(1) << span) - np.uint64(1)) != 0)


def _changed(ledger: Ledger, events: NDArray[Any], form: SpteLayout | None) -> None:
    line, level, old, new = (events[name] for name in ("line", "level", "old_spte", "new_spte"))

    def say(i: int) -> str:
        words = f"gfn {int(events['gfn'][i]):#x} level {level[i]}: {int(old[i]):#x} -> {int(new[i]):#x}"
        return words + (f" ({update.changed(int(old[i]), int(new[i]), form)})" if form else "")

    place = _misplaced(events["gfn"], level) | (events["as_id"] > 1)
    ledger.judge(ALIGNED, len(events), np.flatnonzero(place), (line,), say)
    ledger.judge(SAME, len(events), np.flatnonzero(old == new), (line,), say)
    if form is None or not len(events):
        return
    before, after = (_word(ledger, events, name, form, level) for name in ("old_spte", "new_spte"))
    removed = (before == REMOVED) | (before == FROZEN)
    ledger.judge(RELEASED, len(events), np.flatnonzero(removed), (line,), say)
    sound = ~(np.isin(before, (ILLEGAL, UNKNOWN)) | np.isin(after, (ILLEGAL, UNKNOWN))) & ~removed
    if form.present is None:
        new = np.where(after == REMOVED, np.uint64(0), new)
    why = np.where(sound, update.judge(old, new, form, level), np.uint8(0))
    for verdict, rule in ((1, TRANSITION), (2, NEW_PFN), (3, HOST_GONE)):
        ledger.judge(rule, len(events), np.flatnonzero(why == verdict), (line,), say)


def _set(ledger: Ledger, events: NDArray[Any], form: SpteLayout) -> None:
    if not len(events):
        return
    line, words, level = (events["line"],), events["spte"], events["level"]
    state = _word(ledger, events, "spte", form, level)

    def say(i: int) -> str:
        return f"gfn {int(events['gfn'][i]):#x} level {level[i]}: {int(words[i]):#x}"

    ledger.judge(ALIGNED, len(events), np.flatnonzero(_misplaced(events["gfn"], level)), line, say)
    other = np.isin(state, (NON_LEAF, spte.MMIO))  # nothing: zapped between the set and its event
    ledger.judge(SET_LEAF, len(events), np.flatnonzero(other), line, say)
    bit = {
        name: words & np.uint64(form.bits.mask(name)) != 0
        for name in ("W", "R", "X", "P", "U", "NX")
        if name in form.bits
    }
    letters = {"r": bit["R"], "w": bit["W"], "x": bit["X"], "u": bit["R"]} if form.ept else {
        "r": bit["P"], "w": bit["W"], "x": ~bit["NX"], "u": bit["U"]
    }  # fmt: skip
    tracked = state == spte.ACCESS_TRACKED
    there = np.isin(state, (*LEAVES, ILLEGAL))
    wrong = np.zeros(len(events), dtype=np.bool_)
    for letter, has in letters.items():
        wrong |= (events[letter] >= 0) & (events[letter] != has) & ~(tracked & np.bool_(letter == "r"))
    ledger.judge(LETTERS, len(events), np.flatnonzero(wrong & there), line, say)


def fixes(events: NDArray[Any], form: SpteLayout, level: NDArray[Any]) -> tuple[Words, NDArray[np.uint8]]:
    """What the fast path makes of each event's old spte: the word it would write, and a position in update.FAST."""
    code = events["error_code"]
    return update.fast_page_fault(
        events["old"], write=code & _W != 0, fetch=code & _F != 0, level=level, logged=False, ad_bits=False, layout=form
    )


def large(old: Words, form: SpteLayout) -> Bools:
    """True where a present leaf is a large one."""
    return spte.is_present(old, form) & (old & np.uint64(form.bits.mask("PS")) != 0)


def _fast(ledger: Ledger, events: NDArray[Any], form: SpteLayout | None, *, ept: bool, old_flags: bool) -> None:
    line, code, old, new = events["line"], events["error_code"], events["old"], events["new"]
    spurious, fixed = events["spurious"] == 1, events["fixed"] == 1

    def say(i: int) -> str:
        outcome = "fixed" if fixed[i] else "spurious" if spurious[i] else "not fixed"
        return f"sptep {int(events['sptep'][i]):#x}: {int(old[i]):#x} -> {int(new[i]):#x}, {outcome}"

    def find(rule: Rule, bad: Bools, of: Bools | None = None) -> None:
        ledger.judge(rule, len(events) if of is None else int(of.sum()), np.flatnonzero(bad), (line,), say)

    real = unhashed(events["sptep"])
    index, page = events["sptep"] >> np.uint64(3) & np.uint64(511), events["gva"] >> np.uint64(12)
    fits = np.zeros(len(events), dtype=np.bool_)
    small = np.zeros(len(events), dtype=np.bool_)  # surely of the last level
    if form is not None:
        small = np.isin(states(old, form, None), LEAVES) & ~large(old, form)
    for up in (0, 9, 18, 27, 36):
        fits |= (index == page >> np.uint64(up) & np.uint64(511)) & (np.bool_(up == 0) | ~small)
    find(INDEX, real & ~(fits & (events["sptep"] & np.uint64(7) == 0)), real)
    find(NO_PLACE, events["sptep"] == 0)
    impossible = (code & _RSVD != 0) | ((code & (_P | _W) != (_P | _W)) & np.bool_(not ept))
    find(FAST_CODE, impossible)
    flags = (events["spurious"] > 1) | (events["fixed"] > 1)
    find(FAST_FLAGS, flags | (spurious & fixed & np.bool_(not old_flags)))
    if form is None or not len(events) or "MMU_W" not in form.bits:
        return
    is_large = large(old, form)
    level = np.where(is_large, np.int64(2), np.int64(1))
    before, after = (_word(ledger, events, name, form, None) for name in ("old", "new"))
    sound = ~np.isin(before, (ILLEGAL, UNKNOWN)) & ~np.isin(after, (ILLEGAL, UNKNOWN))
    expected, outcome = fixes(events, form, level)
    outcome = np.where(before == NON_LEAF, np.uint8(3), outcome)
    leaves = np.isin(before, LEAVES) & np.isin(after, LEAVES)
    pfn = np.uint64(form.bits.mask("PFN"))
    moved = leaves & ((old ^ new) & pfn != 0)
    find(FAST_PFN, moved)
    if old_flags:  # spurious: W was set; fixed: it is now
        w = np.uint64(form.bits.mask("W"))
        find(FAST_SPURIOUS, sound & spurious & (old & w == 0), spurious)
        find(FAST_LACKS, sound & fixed & ~spurious & (outcome != 0), fixed)
        return
    find(FAST_ABSENT, sound & fixed & (outcome == 2), fixed)
    find(FAST_LACKS, sound & fixed & (outcome >= 3), fixed)
    find(FAST_NOTHING, sound & fixed & (outcome == 1), fixed)
    used = np.uint64(sum(form.bits.mask(name) for name in ("A", "D") if name in form.bits))
    taken = np.uint64(sum(form.bits.mask(name) for name in ("W", "MMU_W") if name in form.bits))
    more = (new ^ expected) & ~used
    added = (new & ~expected & ~used != 0) | (more & ~taken != 0)
    again = after == spte.ACCESS_TRACKED  # aged at once
    find(FAST_MORE, sound & fixed & (outcome == 0) & leaves & ~moved & added & ~again, fixed)
    find(FAST_SPURIOUS, sound & spurious & ~fixed & (outcome != 1), spurious)
    rest = sound & ~spurious & ~fixed
    find(FAST_ALLOWED, rest & (outcome == 1), ~spurious & ~fixed)
    find(FAST_MISSED, rest & (outcome == 0) & ~is_large, ~spurious & ~fixed)


_EXITS = dict(enumerate(
    "UNKNOWN EXCEPTION IO HYPERCALL DEBUG HLT MMIO IRQ_WINDOW_OPEN SHUTDOWN FAIL_ENTRY INTR SET_TPR TPR_ACCESS".split()
))  # fmt: skip
_USER_TOP = np.uint64(1 << 56)  # user addresses end there where page tables have five levels


def _host(ledger: Ledger, piece: trace.Trace) -> None:
    for name in ("kvm_unmap_hva_range", "kvm_age_hva"):
        ranges = piece[name]
        wrong = (ranges["start"] >= ranges["end"]) | (ranges["end"] > _USER_TOP)
        wrong |= (ranges["start"] | ranges["end"]) & np.uint64(0xFFF) != 0
        wrong &= (ranges["start"] > 0) | (ranges["end"] != np.uint64(MISSING))  # all there is
        ledger.judge(
            RANGE, len(ranges), np.flatnonzero(wrong), (ranges["line"],),
            lambda i, r=ranges: f"{int(r['start'][i]):#x} to {int(r['end'][i]):#x}",
        )  # fmt: skip
    pages = piece["kvm_set_spte_hva"]
    wrong = (pages["hva"] & np.uint64(0xFFF) != 0) | (pages["hva"] >= _USER_TOP)
    ledger.judge(RANGE, len(pages), np.flatnonzero(wrong), (pages["line"],), lambda i: f"{int(pages['hva'][i]):#x}")
    users = piece["kvm_userspace_exit"]
    wrong = np.zeros(len(users), dtype=np.bool_)
    named = np.char.startswith(users["reason"], b"KVM_EXIT_")
    for number, name in _EXITS.items():
        wrong |= named & ((users["reason"] == f"KVM_EXIT_{name}".encode()) != (users["code"] == number))
    plain = np.char.startswith(users["reason"], b"0x")
    wrong[plain] |= users["reason"][plain] != np.char.mod(b"0x%x", users["code"][plain])
    ledger.judge(
        USER_NAME, len(users), np.flatnonzero(wrong), (users["line"],),
        lambda i: f"{users['reason'][i].decode('latin-1')} ({int(users['code'][i])})",
    )  # fmt: skip


def _mmio(ledger: Ledger, events: NDArray[Any], form: SpteLayout | None) -> None:
    kvm, own, valid = events["kvm_gen"], events["spte_gen"], events["valid"] == 1

    def say(i: int) -> str:
        generations = f"generation {int(own[i]):#x}, KVM's {int(kvm[i]):#x}"
        return f"spte {int(events['spte'][i]):#x}, {generations}, valid {int(events['valid'][i])}"

    ledger.judge(
        STALE, len(events), np.flatnonzero((valid != (kvm == own)) | (events["valid"] > 1)), (events["line"],), say
    )
    if form is None or not len(events) or "GEN_LOW" not in form.mmio:
        return
    wrong = ~spte.is_mmio(events["spte"], form) | (spte.mmio(events["spte"], form)["generation"] != own)
    ledger.judge(GENERATION, len(events), np.flatnonzero(wrong & (own != np.uint64(MISSING))), (events["line"],), say)
