"""Rules on what follows an exit besides the repair of a fault: emulation, MMIO, injected faults, user space, the ring.

The one idea: each of these is a short piece of kernel code that prints its events in a fixed order, so each event says
what stands before or behind it. Chapter 13.

Facts: Linux 6.1 ``x86.c`` (emulator_read_write, vcpu_mmio_gva_to_gpa, kvm_inject_exception), ``mmu/mmu.c``
(handle_mmio_page_fault, mark_mmio_spte), ``mmu/tdp_mmu.c`` (tdp_mmu_split_huge_page), ``virt/kvm/dirty_ring.c``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mmu import spte
from mmu.histories import unhashed
from mmu.ledger import Rule
from mmu.order import (
    ABIT,
    CHANGE,
    CHECK,
    ELEM,
    EMUL,
    ENTRY,
    EPT,
    EXCEPTION,
    EXIT,
    FAST,
    FAULT,
    FRET,
    FULL,
    HANDLE,
    INJ,
    IO,
    MARK,
    MATCH,
    NESTED,
    NOTE,
    NPF,
    OTHER,
    PAGE,
    PUSH,
    REQ,
    RET,
    SET,
    SPLIT,
    USER,
    WALK,
    WERR,
    ZAP,
    Order,
    Visit,
)
from mmu.spte import LEAVES, NON_LEAF
from mmu.values import states

_RUN, _MMU, _TDP = (f"Linux 6.1 {name}" for name in ("x86.c", "mmu.c", "tdp_mmu.c"))
_RING = "Linux 6.1 dirty_ring.c"

EMUL_RIP = Rule("what a fault has emulated is the instruction that faulted", f"{_RUN}, kvm_mmu_page_fault", "order")
FETCHED = Rule(
    "what is emulated was fetched, and what was fetched is emulated", f"{_RUN}, x86_emulate_instruction", "order"
)
MATCH_PAGE = Rule("MMIO that was matched lies at the same place of its page", f"{_RUN}, vcpu_mmio_gva_to_gpa", "order")
MATCH_KIND = Rule("MMIO that was matched is a read or a write as it was matched", f"{_RUN}, vcpu_is_mmio_gpa", "order")
MATCH_GPA = Rule(
    "with nested paging MMIO is matched by its guest-physical address", f"{_RUN}, vcpu_cache_mmio_info", "order"
)
MATCH_WALK = Rule("MMIO is matched at the address that was walked for", f"{_RUN}, vcpu_mmio_gva_to_gpa", "order")
MATCHED = Rule("MMIO at the address of an MMIO fault is matched first", f"{_RUN}, vcpu_is_mmio_gpa", "order")
IO_LEAVES = Rule("MMIO that KVM could not read goes to user space next", f"{_RUN}, read_exit_mmio", "order")
IO_BACK = Rule("MMIO that user space has read is what was asked for", f"{_RUN}, complete_emulated_mmio", "order")
USER_MMIO = Rule("KVM goes to user space for MMIO that was begun", f"{_RUN}, x86_emulate_instruction", "order")
USER_IO = Rule("KVM goes to user space for port IO after an exit for it", f"{_RUN}, kvm_fast_pio", "order")
USER_FULL = Rule("KVM goes to user space for a full dirty ring, and says so", f"{_RING}, kvm_dirty_ring_check_request",
                 "order")  # fmt: skip
NOTED = Rule("who writes a mark has left KVM", f"{_RUN}, kvm_arch_vcpu_ioctl_run", "order")
INJ_MISSING = Rule("a #PF that a walk found for the guest is injected", "Linux 6.1 paging_tmpl.h, page_fault", "order")
INJ_ONCE = Rule("an exception is injected once", f"{_RUN}, kvm_inject_exception", "order")
INJ_AGAIN = Rule(
    "a #PF that is injected again is the one that the exit interrupted",
    "Linux 6.1 svm_complete_interrupts, __vmx_complete_interrupts", "order",
)  # fmt: skip
MARK_CHANGE = Rule(
    "an MMIO mark says of its spte what the change to it says",
    f"{_TDP}, tdp_mmu_map_handle_target_level", "order, layout",
)  # fmt: skip
MARK_SLOT = Rule("what is marked as MMIO lies in no slot", f"{_MMU}, kvm_handle_noslot_fault", "order")
MARK_PLACE = Rule("an MMIO spte lies where its address says", f"{_MMU}, mark_mmio_spte", "order")
MARK_ACCESS = Rule("an MMIO mark's access is one that a guest's mapping gives", f"{_MMU}, make_mmio_spte")
MARK_FRESH = Rule("an MMIO spte is marked with the generation that it was found stale by, or a later one",
                  f"{_MMU}, check_mmio_spte", "order")  # fmt: skip
HANDLE_ADDRESS = Rule("an MMIO fault is handled at its address, or at none", f"{_MMU}, handle_mmio_page_fault", "order")
REQUEST_PFN = Rule(
    "a large page's gfn and pfn are at the same place in it", f"{_MMU}, kvm_mmu_hugepage_adjust", "order"
)
SET_LEVEL = Rule("an spte is set at the level requested", f"{_MMU}, direct_map; {_TDP}, kvm_tdp_mmu_map", "order")
SET_FRAME = Rule("entries of one table lie in one page", f"{_MMU}, kvm_mmu_get_page", "order")
SPURIOUS_SET = Rule("an spte that was there already is not set", f"{_MMU}, mmu_set_spte", "order, layout")
INNER_MISSING = Rule("a fault asks the fast path first", "Linux 6.12 mmu.c, kvm_tdp_page_fault", "order")
INNER_SAYS = Rule("what the fast path returns is what its event says", "Linux 6.12 mmu.c, fast_page_fault",
                  "order, layout")  # fmt: skip
SPACE = Rule("a task's changes in a row are in one address space", f"{_TDP}, for_each_tdp_mmu_root", "order")
SPLIT_OF = Rule("a split that succeeded has changed that spte", f"{_TDP}, tdp_mmu_split_huge_page", "order, layout")
SPLIT_TOLD = Rule("a large page is split by a fault, or a split tells of it", f"{_TDP}, tdp_mmu_split_huge_page",
                  "order, layout")  # fmt: skip
PUSH_RING = Rule("a vCPU pushes to its own dirty ring", f"{_RING}, kvm_dirty_ring_push", "order")
PUSH_FIRST = Rule(
    "a page is pushed before the repair of its fault is printed", f"{_MMU}, fast_pf_fix_direct_spte", "order"
)
PUSH_PAGE = Rule("a push's slot and offset name the page that became writable", f"{_RING}, mark_page_dirty_in_slot",
                 "order")  # fmt: skip

_MMIO_EXIT, _IO_EXIT, _FULL_EXIT = 6, 2, 31  # KVM_EXIT_MMIO, KVM_EXIT_IO, KVM_EXIT_DIRTY_RING_FULL
_PAGE = np.uint64(0xFFF)
_NO = np.uint64(0xFFFFFFFFFFFFFFFF)


def judge(order: Order, v: Visit) -> None:
    """Hold one visit's emulation, MMIO, injections, exits to user space and pushes against the rules."""
    _emulation(order, v)
    _users(order, v)
    _injections(order, v)
    _marks(order, v)
    _requests(order, v)
    _spaces(order, v)
    _pushes(v)


def _emulation(order: Order, v: Visit) -> None:
    kind, rows, behind = v.kind, v.rows, v.previous()
    last, exit_, emulated = v.before(ENTRY, EXIT), v.before(EXIT), v.before(EMUL)
    inside = (last >= 0) & (v.at("kind", last) == EXIT)
    faulted = np.isin(v.at("sub", last), (NPF, EPT, EXCEPTION)) & (v.before(FAULT) > last)
    faulted |= np.bool_(not order.ept)  # on Intel guests without paging or in odd states are emulated at length
    first = (kind == EMUL) & inside & faulted & (emulated < last) & (v.before(USER, NESTED) < last)
    v.find(EMUL_RIP, first, (rows["a"] != v.at("c", exit_)) & (v.at("c", exit_) != _NO), exit_)
    walk = v.before(WALK)
    earlier = walk[np.maximum(walk, 0)]
    fetched = first & (walk > last) & (earlier < last) & (v.at("b", walk) & np.uint64(16) != 0)
    fetched &= v.before(FAULT, RET) < walk
    v.find(EMUL_RIP, fetched, v.at("a", walk) != rows["a"] + rows["b"], walk)
    fetch = v.at("b", walk) & np.uint64(16) != 0
    read = (kind == EMUL) & (behind >= 0) & np.isin(v.at("kind", behind), (ELEM, ABIT)) & inside
    read &= np.bool_(not order.foreign and "kvm_mmu_pagetable_walk" in order.seen)
    v.find(FETCHED, read, ~fetch, walk)
    apart = (walk > last) & (v.before(FAULT, NESTED) <= np.maximum(v.before(RET), last)) & inside & fetch
    ended = (kind != OTHER) & (behind >= 0) & np.isin(v.at("kind", behind), (ELEM, ABIT))
    ended &= apart & np.isin(kind, (ENTRY, MATCH, IO, USER))
    v.find(FETCHED, ended & np.bool_("kvm_emulate_insn" in order.seen), ended, walk)
    match = kind == MATCH
    v.find(MATCH_PAGE, match, (rows["a"] ^ rows["b"]) & _PAGE != 0, last)
    nested_paging = np.isin(v.at("sub", last), (NPF, EPT)) & inside
    v.find(MATCH_GPA, match & nested_paging & np.bool_(not order.nested), rows["sub"] == 0, last)
    asked = (
        match
        & (rows["sub"] == 1)
        & np.isin(v.at("kind", behind), (ELEM, ABIT))
        & (walk > emulated)
        & (emulated > last)
        & inside
        & (v.at("b", walk) & np.uint64(16) == 0)
    )
    v.find(MATCH_WALK, asked, (v.at("a", walk) ^ rows["b"]) & ~_PAGE != 0, walk)
    matched = (kind == IO) & (behind >= 0) & (v.at("kind", behind) == MATCH)
    write = v.at("c", behind) == 1
    v.find(MATCH_KIND, matched, write != (rows["sub"] == 1), behind)
    # The fault itself filled the cache that is asked; only the first MMIO of the exit is surely of its address.
    told = v.before(HANDLE, MARK)
    begun = (kind == IO) & (rows["sub"] > 0) & inside & (told > last) & (emulated > told) & (v.before(IO, USER) < told)
    begun &= rows["a"] >> np.uint64(12) == v.at("a", told)
    v.find(MATCHED, begun & np.bool_("vcpu_match_mmio" in order.seen), ~matched, told)
    asked_io = (kind != OTHER) & (behind >= 0) & (v.at("kind", behind) == IO) & (v.at("sub", behind) == 2)
    asked_io &= kind != NOTE
    asked_io &= np.bool_("kvm_userspace_exit" in order.seen)
    v.find(IO_LEAVES, asked_io, ~np.isin(kind, (USER, IO, MATCH)), behind)
    before = v.before(IO)
    user = v.before(USER)
    owed = (before >= 0) & (v.at("sub", before) == 2) & (user > before) & (v.at("a", user) == _MMIO_EXIT)
    owed &= inside & (before > last)
    other = (kind != IO) | (rows["sub"] != 0) | (rows["a"] != v.at("a", before)) | (rows["b"] != v.at("b", before))
    v.find(IO_BACK, owed & np.isin(kind, (IO, ENTRY)), other, before)


def _users(order: Order, v: Visit) -> None:
    kind, rows, behind = v.kind, v.rows, v.previous()
    last = v.before(ENTRY, EXIT)
    inside = (last >= 0) & (v.at("kind", last) == EXIT)
    user, code = kind == USER, rows["a"]
    io = v.before(IO)
    v.find(USER_MMIO, user & inside & (code == _MMIO_EXIT) & np.bool_("kvm_mmio" in order.seen),
           (io < last) | (v.at("sub", io) == 0), last)  # fmt: skip
    ports = v.at("sub", last) == 0  # of a kind that is no fault
    v.find(USER_IO, user & inside & (code == _IO_EXIT), ~ports & (v.before(EMUL) < last), last)
    full = v.at("kind", behind) == FULL
    known = (behind >= 0) & np.bool_({"kvm_dirty_ring_exit", "kvm_userspace_exit"} <= order.seen)
    v.find(USER_FULL, user & known, full != (code == _FULL_EXIT), behind)
    v.find(USER_FULL, known & full & (kind != OTHER), ~user, behind)
    of = (kind == NOTE) & (last >= 0) & np.bool_("kvm_userspace_exit" in order.seen)
    v.find(NOTED, of, v.before(USER) < last, last)


def _injections(order: Order, v: Visit) -> None:
    kind, rows = v.kind, v.rows
    last, fault, error = v.before(ENTRY, EXIT), v.before(FAULT), v.before(WERR)
    shot, done, walk = v.before(INJ), v.before(RET), v.before(WALK)
    inside = (last >= 0) & (v.at("kind", last) == EXIT)
    closing = (kind == ENTRY) & inside & (error > fault) & (fault > last) & (done > error) & (walk > fault)
    closing &= v.before(NESTED, EMUL, USER) < fault
    closing &= np.bool_({"kvm_inj_exception", "kvm_emulate_insn"} <= order.seen)
    closing &= v.at("a", done) == np.uint64(order.numbers["RETRY"])
    v.find(INJ_MISSING, closing, (shot < error) | (v.at("sub", shot) & 2 == 0), error)
    fresh = (kind == INJ) & (rows["sub"] & 1 == 0)
    again = (shot >= 0) & (shot > v.before(ENTRY, EXIT, USER, NESTED)) & (v.at("sub", shot) & 1 == 0)
    v.find(INJ_ONCE, fresh & (last >= 0), again, shot)
    # An exit may have interrupted the delivery of a #PF: valid (31), an exception (10 to 8), vector 14; its error code.
    info = v.at("d", last)
    interrupted = inside & (info != _NO) & (info & np.uint64(0x800007FF) == np.uint64(0x8000030E))
    repeated = (kind == INJ) & (rows["sub"] == 3) & interrupted & (v.before(NESTED, USER) < last)
    v.find(INJ_AGAIN, repeated, rows["a"] != info >> np.uint64(32), last)
    lost = (kind == ENTRY) & interrupted & np.bool_(order.reinjects) & (v.before(NESTED, USER) < last)
    v.find(INJ_AGAIN, lost, (shot < last) | (v.at("sub", shot) & 2 == 0), last)


def _marks(order: Order, v: Visit) -> None:
    kind, rows, behind = v.kind, v.rows, v.previous()
    last, fault = v.before(ENTRY, EXIT), v.before(FAULT)
    within = (fault >= 0) & (fault > last)
    mark = kind == MARK
    access = rows["d"]
    if order.form is not None and not order.form.ept:
        none = np.full(len(kind), -1, dtype=np.int64)
        v.find(MARK_ACCESS, mark, (access & np.uint64(1) == 0) | (access > 7), none)
        direct = mark & within & (v.before(WALK) < fault) & np.bool_(not order.nested)
        v.find(MARK_ACCESS, direct, access != 7, fault)
    request = v.before(REQ)
    v.find(MARK_SLOT, mark & within & (request > fault), v.at("b", request) >> np.uint64(63) == 0, request)
    real = mark & within & unhashed(rows["c"])
    page = v.at("a", fault) >> np.uint64(12)
    index = rows["c"] >> np.uint64(3) & np.uint64(511)
    v.find(MARK_PLACE, real, (index != page & np.uint64(511)) | (rows["c"] & np.uint64(7) != 0), fault)
    check = v.before(CHECK)
    anew = mark & within & (check > fault) & (v.at("sub", check) == 0) & (rows["b"] != _NO)
    kvm = v.at("c", check)
    v.find(MARK_FRESH, anew, (rows["b"] < kvm) | ((rows["b"] ^ kvm) & np.uint64(1) != 0), check)
    handled = (kind == HANDLE) & within
    v.find(HANDLE_ADDRESS, handled, (rows["c"] != 0) & ((rows["c"] ^ v.at("a", fault)) & ~_PAGE != 0), fault)
    form = order.form
    if form is None or "GEN_LOW" not in form.mmio:
        return
    told = mark & (behind >= 0) & (v.at("kind", behind) == CHANGE) & (v.at("a", behind) == rows["a"])
    word = v.at("b", behind)
    said = spte.mmio(word, form)
    wrong = ~spte.is_mmio(word, form) | (said["generation"] != rows["b"])
    wrong |= np.bool_(not form.ept) & (word & np.uint64(7) != access)
    v.find(MARK_CHANGE, told & (rows["b"] != _NO), wrong, behind)


def _requests(order: Order, v: Visit) -> None:
    kind, rows = v.kind, v.rows
    last, fault, request = v.before(ENTRY, EXIT), v.before(FAULT), v.before(REQ)
    level = rows["sub"].astype(np.int64)
    span = np.uint64(9) * np.clip(level - 1, 0, 4).astype(np.uint64)
    low = (np.uint64(1) << span) - np.uint64(1)
    none = np.full(len(kind), -1, dtype=np.int64)
    wrong = (level < 1) | (level > 3) | ((rows["a"] ^ rows["b"]) & low != 0)
    v.find(REQUEST_PFN, kind == REQ, wrong, none)
    within = (fault > last) & (request > fault)
    previous = v.before(SET)
    frame, low_level = rows["c"] >> np.uint64(12), (level == 1) & (v.at("sub", previous) == 1)
    row = (kind == SET) & within & (previous > request) & low_level & (rows["c"] != _NO)
    row &= np.bool_("kvm_exit" in order.seen)
    v.find(SET_FRAME, row, frame != v.at("c", previous) >> np.uint64(12), previous)
    if "kvm_exit" in order.seen:
        _frames(v, within)
    sets = (kind == SET) & within & (v.before(SET, WERR, NESTED) < request)
    v.find(SET_LEVEL, sets & np.bool_(order.large), v.at("sub", request) != rows["sub"], request)
    if order.form is None:
        return
    said, walk, change = rows["a"], v.before(WALK), v.before(CHANGE)
    number = {name: np.uint64(n) for name, n in order.numbers.items()}
    handler = (kind == RET) & (fault >= 0) & (fault > last)
    legacy = handler & ((walk > fault) | np.bool_(not order.tdp_mmu)) & (change < fault)
    v.find(SPURIOUS_SET, legacy & (said == number["SPURIOUS"]) & (request > fault), v.before(SET) > request, request)
    inner, fast = v.before(FRET), v.before(FAST)
    if order.inner and order.numbers["FIXED"] == 5:
        asks = handler & (walk < fault) & (said != number["EMULATE"]) & (said != number["WRITE_PROTECTED"])
        v.find(INNER_MISSING, asks & (v.before(NESTED) < fault), inner < fault, fault)
        result = (kind == FRET) & (fault > last)
        did = np.where(fast > fault, v.at("sub", fast), np.int16(0))
        v.find(INNER_SAYS, result & (did == 0), said != number["INVALID"], fault)
        settled = handler & (inner > fault) & (v.at("a", inner) != number["INVALID"])
        v.find(INNER_SAYS, settled, said != v.at("a", inner), inner)


def _frames(v: Visit, within: Any) -> None:
    """Of three sets in one table of a direct MMU, made at no time in between, none lies elsewhere."""
    kind, rows = v.kind, v.rows
    direct = (kind == SET) & within & (v.before(WALK) < v.before(FAULT)) & (rows["sub"] == 1) & (rows["c"] != _NO)
    sets = np.flatnonzero(direct)
    if len(sets) < 3:
        return
    order = np.lexsort((rows["line"][sets], rows["a"][sets] >> np.uint64(9), rows["task"][sets]))
    sets = sets[order]
    a, b, c = sets[:-2], sets[1:-1], sets[2:]
    table, frame = rows["a"] >> np.uint64(9), rows["c"] >> np.uint64(12)
    made = np.sort(rows["line"][(kind == PAGE) | (kind == ZAP)])
    same = (rows["task"][a] == rows["task"][c]) & (table[a] == table[c]) & (table[a] == table[b])
    same &= (frame[a] == frame[c]) & (np.searchsorted(made, rows["line"][a]) == np.searchsorted(made, rows["line"][c]))
    of, odd = np.zeros(len(kind), dtype=np.bool_), np.zeros(len(kind), dtype=np.bool_)
    of[c], odd[c] = same, frame[b] != frame[a]
    context = np.full(len(kind), -1, dtype=np.int64)
    context[c] = b
    v.find(SET_FRAME, of, odd, context)


def _spaces(order: Order, v: Visit) -> None:
    kind, rows, behind = v.kind, v.rows, v.previous()
    changes = np.flatnonzero(kind == CHANGE)
    last = v.before(ENTRY, EXIT)
    if len(changes) > 2:
        a, b, c = changes[:-2], changes[1:-1], changes[2:]
        same = (rows["task"][a] == rows["task"][c]) & (rows["d"][a] == rows["d"][c]) & (last[a] == last[c])
        of, odd = np.zeros(len(kind), dtype=np.bool_), np.zeros(len(kind), dtype=np.bool_)
        of[c], odd[c] = same, rows["d"][b] != rows["d"][a]
        context = np.full(len(kind), -1, dtype=np.int64)
        context[c] = b
        v.find(SPACE, of, odd, context)
    if order.form is None or not order.tdp_mmu:
        return
    split = (kind == SPLIT) & (rows["c"] == 0)
    told = (behind >= 0) & (v.at("kind", behind) == CHANGE)
    same = told & (v.at("a", behind) == rows["a"]) & (v.at("sub", behind) == rows["sub"])
    same &= v.at("c", behind) == rows["b"]
    v.find(SPLIT_OF, split, ~same, behind)
    if "kvm_mmu_split_huge_page" not in order.seen or not told.any():
        return
    fault = v.before(FAULT)
    level = v.at("sub", behind)
    cut = told & (kind != OTHER) & (level > 1) & (level < 4)
    cut[cut] &= np.isin(states(v.at("c", behind[cut]), order.form, level[cut]), LEAVES)
    cut[cut] &= states(v.at("b", behind[cut]), order.form, level[cut]) == NON_LEAF
    by_fault = (fault > last) & (v.at("kind", last) == EXIT) & (last >= 0)
    v.find(SPLIT_TOLD, cut & ~by_fault, kind != SPLIT, behind)


def _pushes(v: Visit) -> None:
    kind, rows, behind = v.kind, v.rows, v.previous()
    last = v.before(ENTRY, EXIT)
    push = (kind == PUSH) & (last >= 0)
    if not push.any():
        return
    v.find(PUSH_RING, push, rows["vcpu"] != v.at("vcpu", last), last)
    fault = v.before(FAULT)
    fast = v.before(FAST)
    repaired = (fast > fault) & (v.at("sub", fast) == 2) & (v.before(RET, EMUL, USER) < fault) & (fault > last)
    v.find(PUSH_FIRST, push, repaired, fault)
    # What comes next tells which page: a repair, a change or a set of the page that faulted.
    mine = np.isin(kind, (FAST, CHANGE, SET)) & (behind >= 0) & (v.at("kind", behind) == PUSH) & (fault > last)
    mine &= v.before(WALK) < fault
    page = v.at("a", fault) >> np.uint64(12)
    mine &= np.where(kind == FAST, rows["a"] >> np.uint64(12), rows["a"]) == page
    of = np.flatnonzero(mine)
    pushes = behind[of]
    slot, base = rows["b"][pushes], page[of] - rows["a"][pushes]
    for key, value in ((slot, base), (base, slot)):
        order = np.lexsort((rows["line"][pushes], key))
        at, k, x = pushes[order], key[order], value[order]
        if len(at) < 3:
            return
        same = (k[:-2] == k[2:]) & (k[:-2] == k[1:-1]) & (x[:-2] == x[2:])
        judged, odd = np.zeros(len(kind), dtype=np.bool_), np.zeros(len(kind), dtype=np.bool_)
        judged[at[2:]], odd[at[2:]] = same, x[1:-1] != x[:-2]
        context = np.full(len(kind), -1, dtype=np.int64)
        context[at[2:]] = at[1:-1]
        v.find(PUSH_PAGE, judged, odd, context)
