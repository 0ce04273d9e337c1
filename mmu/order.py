"""Rules on each task's events: what must stand before, behind and between them.

The one idea: a vCPU's thread runs through the same code for each exit, so its events follow one another in few ways:
exit, fault, fast path, request, change, set, return, entry. Each rule looks, for all events at once, at the last event
of some kind that the same task had before. Chapter 13.

Events that were not recorded at all, or were filtered out, break these rules often; the ledger then reports the rule
as not applied (:mod:`mmu.ledger`).

Facts: Linux 6.1 ``x86.c``, ``svm/svm.c``, ``vmx/vmx.c``, ``mmu/mmu.c``, ``mmu/tdp_mmu.c``, ``mmu/paging_tmpl.h``
(facts 2.6 and 4).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmu import pfec, spte, trace, update
from mmu.kernel import RETURN_NUMBERS
from mmu.ledger import Ledger, Rule
from mmu.scan import MISSING
from mmu.spte import FROZEN, LEAVES, MMIO, NON_LEAF, NONE, REMOVED, SpteLayout
from mmu.values import states

Index = NDArray[np.int64]
Bools = NDArray[np.bool_]

_RUN, _MMU, _TDP, _WALKER = (f"Linux 6.1 {name}" for name in ("x86.c", "mmu.c", "tdp_mmu.c", "paging_tmpl.h"))

ENTER = Rule("a vCPU leaves the guest before it enters it again", f"{_RUN}, vcpu_enter_guest", "order")
LEAVE = Rule("a vCPU enters the guest before it leaves it again", f"{_RUN}, vcpu_enter_guest", "order")
SAME_VCPU = Rule("a task's events from entry to entry are one vCPU's", f"{_RUN}, vcpu_run", "order")
FAULT_EXIT = Rule(
    "a fault is the one that the exit before it says", "Linux 6.1 npf_interception, handle_ept_violation", "order"
)
FAULT_ONCE = Rule("an exit has one fault", "Linux 6.1 npf_interception, handle_ept_violation", "order")
FAULT_MISSING = Rule("an exit for a fault has its fault", "Linux 6.1 npf_interception, handle_ept_violation", "order")
AGAIN = Rule("after a repaired fault the guest runs the same instruction", f"{_MMU}, kvm_mmu_page_fault", "order")
FAST_FAULT = Rule("the fast path is about the fault before it", f"{_MMU}, fast_page_fault", "order")
FAST_ONCE = Rule("a fault goes through the fast path once", f"{_MMU}, direct_page_fault", "order")
FAST_FIRST = Rule("the fast path is tried before anything else", f"{_MMU}, direct_page_fault", "order")
FAST_MISSING = Rule("a write to a present page goes through the fast path", f"{_MMU}, page_fault_can_be_fast", "order")
RETURN_ONCE = Rule("a fault returns once", f"{_MMU}, kvm_mmu_do_page_fault", "order")
RETURN_LAST = Rule("a fault maps nothing after it has returned", f"{_MMU}, kvm_mmu_do_page_fault", "order")
RETURN_MISSING = Rule("a fault returns", f"{_MMU}, kvm_mmu_do_page_fault", "order")
RETURN_FAST = Rule("what the fast path did is what the fault returns", f"{_MMU}, direct_page_fault", "order, layout")
RETURN_FIXED = Rule("a fault that returns FIXED has changed an spte", f"{_MMU}, direct_page_fault", "order, layout")
RETURN_RETRY = Rule("a fault that returns RETRY has set none", f"{_MMU}, direct_page_fault", "order, layout")
RETURN_KNOWN = Rule(
    "a fault returns one of the values that leave the handler", f"{_MMU}, kvm_mmu_do_page_fault", "order, layout"
)
RETURN_SPURIOUS = Rule(
    "a fault that returns SPURIOUS met an spte that was there", f"{_MMU}, direct_page_fault", "order, layout"
)
RETURN_EMULATE = Rule(
    "what is set with all that was asked for is not emulated", f"{_MMU}, mmu_set_spte", "order, layout"
)
RETURN_INNER = Rule(
    "the fast path returns once, before the fault does", "Linux 6.12 mmu.c, kvm_tdp_page_fault", "order"
)
EMULATED = Rule("a fault that returns EMULATE is emulated", f"{_MMU}, kvm_mmu_page_fault", "order, layout")
REQUEST_FAULT = Rule("what is requested is what faulted", f"{_MMU}, direct_map; tdp_mmu.c, kvm_tdp_mmu_map", "order")
REQUEST_ONCE = Rule("a fault requests one spte", f"{_MMU}, direct_map; tdp_mmu.c, kvm_tdp_mmu_map", "order")
SET_REQUEST = Rule("an spte is set on a request, to the pfn requested", f"{_MMU}, mmu_set_spte", "order, layout")
SET_ONCE = Rule("a fault sets an spte once", f"{_MMU}, mmu_set_spte", "order")
SET_FIRST = Rule("what was requested is set first", f"{_MMU}, direct_map, FNAME(fetch)", "order")
SET_PLACE = Rule("an entry lies where its gfn says", f"{_MMU}, shadow_walk_init: the index is of the address", "order")
SET_ACCESSED = Rule("what a fault sets is accessed", "Linux 6.1 spte.c, make_spte", "order, layout")
CHANGE_ONE = Rule(
    "no change but a fault's does more than take W, A or D, or age", f"{_TDP}, its callers", "order, layout"
)
CHANGE_REQUEST = Rule("a fault maps and links on a request", f"{_TDP}, kvm_tdp_mmu_map", "order, layout")
TABLE_GFN = Rule("a table that a fault makes covers what was requested", f"{_MMU}, direct_map; tdp_mmu.c", "order")
CHANGE_SET = Rule("what the TDP MMU maps it prints as set", f"{_TDP}, tdp_mmu_map_handle_target_level", "order, layout")
SET_CHANGE = Rule("what the TDP MMU fixed it has changed", f"{_TDP}, tdp_mmu_map_handle_target_level", "order, layout")
TABLE_GONE = Rule("a table that is cut off is zapped next", f"{_TDP}, handle_removed_pt", "order, layout")
TABLE_NEW = Rule("a table that is linked was made just before", f"{_TDP}, tdp_mmu_init_child_sp", "order, layout")
TABLE_ALL = Rule(
    "a table's entries are removed one after the other, all 512", f"{_TDP}, handle_removed_pt", "order, layout"
)
WALK_LEVELS = Rule("a walk goes down level by level", f"{_WALKER}, walk_addr_generic", "order")
WALK_TOP = Rule(
    "a walk begins at the same level as those before and after it", f"{_WALKER}, walk_addr_generic", "order"
)
WALK_END = Rule("a walk ends at a leaf or in an error", f"{_WALKER}, walk_addr_generic", "order")
ERROR_AFTER = Rule(
    "an error of a walk stands behind the entry that refused it", f"{_WALKER}, walk_addr_generic", "order"
)
WALK_WHOLE = Rule("what a walk maps it has walked down to a leaf", f"{_WALKER}, walk_addr_generic", "order")
RUNNING = Rule("while the guest runs, its vCPU's task does nothing else", f"{_RUN}, vcpu_enter_guest", "order")
WALK_FAULT = Rule("the guest's tables are walked for the access that faulted", f"{_WALKER}, page_fault", "order")
INJECTED = Rule(
    "the #PF that is injected is the one that a walk found", f"{_RUN}, kvm_inject_emulated_page_fault", "order"
)
LEAF_REQUESTED = Rule("what is requested is what the guest's leaf maps", f"{_WALKER}, page_fault", "order")
MMIO_VALID = Rule("an MMIO spte is used after it was found valid", f"{_MMU}, handle_mmio_page_fault", "order")
MMIO_STALE = Rule(
    "a reserved-bit fault maps anew only what was found stale", f"{_MMU}, handle_mmio_page_fault", "order"
)
MMIO_MARKED = Rule("what lies in no slot is marked as MMIO", f"{_MMU}, mmu_set_spte; tdp_mmu.c", "order")
MMIO_SAME = Rule("MMIO is done at the address that was matched", f"{_RUN}, emulator_read_write_onepage", "order")
MMIO_DONE = Rule("MMIO that was matched is done next", f"{_RUN}, emulator_read_write_onepage", "order")
MMIO_FAULT = Rule(
    "the MMIO spte is the one of the address that faulted", f"{_MMU}, handle_mmio_page_fault", "order, layout"
)
MMIO_EMULATED = Rule("MMIO is done by an instruction that is emulated", f"{_RUN}, x86_emulate_instruction", "order")
USER_AFTER = Rule("KVM returns to user space from outside the guest", f"{_RUN}, kvm_arch_vcpu_ioctl_run", "order")

LAYOUT_RULES = tuple(rule for rule in list(globals().values()) if isinstance(rule, Rule) and "layout" in rule.needs)

NEEDED = {  # events without which a rule says nothing; the kvm_ of their names left out
    ENTER: ("exit",), LEAVE: ("entry",), RUNNING: ("exit", "entry"),
    SAME_VCPU: ("entry", "exit", "userspace_exit"), WALK_WHOLE: ("mmu_pagetable_walk",), FAULT_EXIT: ("exit",),
    FAULT_MISSING: ("page_fault",),
    FAST_FAULT: ("page_fault",), FAST_MISSING: ("fast_page_fault",), RETURN_MISSING: ("*_page_fault_ret",),
    RETURN_FIXED: ("mmu_set_spte",), REQUEST_FAULT: ("page_fault",), SET_REQUEST: ("mmu_spte_requested",),
    SET_FIRST: ("mmu_spte_requested",), CHANGE_SET: ("mmu_set_spte",), SET_CHANGE: ("mmu_set_spte",),
    CHANGE_REQUEST: ("mmu_spte_requested",), CHANGE_ONE: ("mmu_set_spte",), TABLE_GFN: ("mmu_spte_requested",),
    TABLE_GONE: ("mmu_prepare_zap_page",), WALK_LEVELS: ("mmu_pagetable_walk",), WALK_TOP: ("mmu_pagetable_walk",),
    WALK_END: ("mmu_walker_error",),
    INJECTED: ("mmu_walker_error",), MMIO_VALID: ("check_mmio_spte", "handle_mmio_page_fault"),
    MMIO_STALE: ("check_mmio_spte",), MMIO_MARKED: ("mark_mmio_spte",), MMIO_DONE: ("mmio",),
    MMIO_EMULATED: ("emulate_insn",), EMULATED: ("emulate_insn",), USER_AFTER: ("entry", "exit"),
    RETURN_ONCE: ("page_fault",), RETURN_LAST: ("page_fault",),
}  # fmt: skip

KINDS = (
    "ENTRY EXIT FAULT FAST RET FRET REQ CHANGE SET MARK CHECK HANDLE WALK ELEM WERR INJ ZAP PAGE USER NESTED EMUL "
    "MATCH IO ABIT DBIT UNSYNC SYNC SPLIT PUSH FULL NOTE OTHER"
).split()
(
    ENTRY, EXIT, FAULT, FAST, RET, FRET, REQ, CHANGE, SET, MARK, CHECK, HANDLE, WALK, ELEM, WERR, INJ, ZAP, PAGE, USER,
    NESTED, EMUL, MATCH, IO, ABIT, DBIT, UNSYNC, SYNC, SPLIT, PUSH, FULL, NOTE, OTHER,
) = range(len(KINDS))  # fmt: skip

_COLUMNS = {  # event: kind, vcpu, a, b, c, sub, d
    "kvm_entry": (ENTRY, "vcpu", "rip", None, None, None, None),
    "kvm_exit": (EXIT, "vcpu", "info1", "info2", "rip", None, "intr_info"),
    "kvm_page_fault": (FAULT, "vcpu", "address", "error_code", "rip", None, None),
    "fast_page_fault": (FAST, "vcpu", "gva", "error_code", None, "fixed", "sptep"),
    "kvm_mmu_spte_requested": (REQ, None, "gfn", "pfn", None, "level", None),
    "kvm_tdp_mmu_spte_changed": (CHANGE, None, "gfn", "new_spte", "old_spte", "level", "as_id"),
    "kvm_mmu_set_spte": (SET, None, "gfn", "spte", "sptep", "level", None),
    "mark_mmio_spte": (MARK, None, "gfn", "gen", "sptep", None, "access"),
    "check_mmio_spte": (CHECK, None, "spte", "spte_gen", "kvm_gen", "valid", None),
    "handle_mmio_page_fault": (HANDLE, None, "gfn", "access", "addr", None, None),
    "kvm_mmu_pagetable_walk": (WALK, None, "addr", "pferr", None, None, None),
    "kvm_mmu_paging_element": (ELEM, None, "pte", None, None, "level", None),
    "kvm_mmu_walker_error": (WERR, None, "pferr", None, None, None, None),
    "kvm_inj_exception": (INJ, None, "error_code", None, None, "reinjected", None),
    "kvm_mmu_prepare_zap_page": (ZAP, None, "gfn", "unsync", None, "level", None),
    "kvm_mmu_get_page": (PAGE, None, "gfn", "created", "direct", "level", "gpte_bytes"),
    "kvm_mmu_unsync_page": (UNSYNC, None, "gfn", "unsync", "quadrant", "level", "gpte_bytes"),
    "kvm_mmu_sync_page": (SYNC, None, "gfn", "unsync", "quadrant", "level", "gpte_bytes"),
    "kvm_mmu_set_accessed_bit": (ABIT, None, "gpa", None, None, None, None),
    "kvm_mmu_set_dirty_bit": (DBIT, None, "gpa", None, None, None, None),
    "kvm_mmu_split_huge_page": (SPLIT, None, "gfn", "spte", "errno", "level", None),
    "kvm_userspace_exit": (USER, None, "code", None, None, None, None),
    "kvm_emulate_insn": (EMUL, None, "rip", "csbase", None, None, None),
    "vcpu_match_mmio": (MATCH, None, "gpa", "gva", "write", "gpa_match", None),
    "kvm_mmio": (IO, None, "gpa", "len", "val", "kind", None),
    "kvm_dirty_ring_push": (PUSH, "ring", "offset", "slot", None, None, None),
    "kvm_dirty_ring_exit": (FULL, "vcpu", None, None, None, None, None),
    "tracing_mark_write": (NOTE, None, None, None, None, None, None),
}

STEP = np.dtype(
    [
        ("task", np.int64),  # pid, and above it the era: a task of one era knows nothing of the one before
        ("line", np.int64),
        ("kind", np.int8),
        ("sub", np.int16),
        ("vcpu", np.int32),
        ("fresh", np.bool_),
        ("a", np.uint64),
        ("b", np.uint64),
        ("c", np.uint64),
        ("d", np.uint64),
    ]
)
"""One event of a task; what a, b, c, d and sub hold depends on the kind."""

_NOT_RUNNING = (
    FAULT, FAST, RET, FRET, REQ, SET, MARK, CHECK, HANDLE, WALK, ELEM, WERR, INJ, PAGE, EMUL, MATCH, IO, ABIT, DBIT,
    UNSYNC, PUSH, NOTE,
)  # fmt: skip
_NO = np.uint64(MISSING)
_REMEMBERED = 4096  # a task's events that are remembered from piece to piece
_TASKS = 1 << 12
NPF, EPT, EXCEPTION, NMI = 1, 2, 3, 4  # sub of an EXIT
_EXITS = {b"npf": NPF, b"EXIT_NPF": NPF, b"EPT_VIOLATION": EPT, b"PF excp": EXCEPTION, b"EXCEPTION_NMI": NMI}
_P, _W, _RSVD, _LOW = (np.uint64(bits) for bits in (1, 2, 8, 31))


def steps(piece: trace.Trace, era: Any) -> NDArray[Any]:
    """Every event of the piece that names a task, in the order of the file.

    Args:
        piece: the events.
        era: a function from lines to eras.
    """
    parts = [np.zeros(0, dtype=STEP)]
    for name in piece:
        events = piece[name]
        rows = np.zeros(len(events), dtype=STEP)
        rows["task"], rows["line"], rows["kind"], rows["vcpu"], rows["fresh"] = (
            events["pid"],
            events["line"],
            OTHER,
            -1,
            True,
        )
        if name in _COLUMNS:
            kind, *columns = _COLUMNS[name]
            rows["kind"] = kind
            for target, column in zip(("vcpu", "a", "b", "c", "sub", "d"), columns, strict=True):
                if column is not None:
                    rows[target] = events[column].astype(rows.dtype[target])
        elif name.endswith("_page_fault_ret"):
            rows["kind"], rows["a"] = FRET if name.startswith("fast_") else RET, events["ret"].astype(np.uint64)
        elif name.startswith(("kvm_nested", "kvm_async_pf")):
            rows["kind"] = NESTED
        if name == "kvm_exit":
            for reason, sub in _EXITS.items():
                rows["sub"][events["reason"] == reason] = sub
            known = (events["intr_info"] != _NO) & (events["error_code"] != _NO)
            rows["d"] |= np.where(known, events["error_code"], np.uint64(0)) << np.uint64(32)
        elif name == "fast_page_fault":
            rows["sub"] = (events["spurious"] == 1) | (events["fixed"] == 1).astype(np.int16) << np.int16(1)
        elif name == "kvm_inj_exception":
            rows["sub"] |= (events["exception"] == b"#PF").astype(np.int16) << np.int16(1)
        parts.append(rows[events["pid"] > 0])
    rows = np.concatenate(parts)
    rows = rows[np.argsort(rows["line"], kind="stable")]
    rows["task"] |= era(rows["line"]) << 32
    return rows


class Order:
    """The rules of order; :meth:`add` the steps of each piece.

    Args:
        ledger: takes the findings.
        form: the sptes' layout, None where it is not known.
        ept: error codes are of a machine with EPT.
        seen: the names of the trace's events.
        inner: a probe on fast_page_fault itself is among them.
        reinjects: the kernel prints exceptions that are injected again.
        more: further rules, on the same steps.
    """

    def __init__(
        self,
        ledger: Ledger,
        form: SpteLayout | None,
        *,
        ept: bool,
        seen: Collection[str],
        inner: bool = False,
        reinjects: bool = False,
        more: Collection[Callable[[Order, Visit], None]] = (),
    ) -> None:
        self.ledger, self.form, self.ept = ledger, form, ept
        for rule, events in NEEDED.items():
            missing = [name for name in events if not {name, f"kvm_{name}"} & set(seen)]
            if missing:
                named = [name if name[0] == "*" or name in trace.FORMATS else f"kvm_{name}" for name in missing]
                ledger.excused[rule] = f"the trace has no {' or '.join(named)}"
        self.numbers = RETURN_NUMBERS["6.12" if form and form.name.startswith("6.12") else "6.1"]
        self.seen, self.more = set(seen), tuple(more)
        self.nested = any(name.startswith("kvm_nested") for name in seen)
        self.foreign = ept  # walks may be of a guest's own EPT, whose bits are others
        self.tdp_mmu = "kvm_tdp_mmu_spte_changed" in self.seen
        self.inner, self.reinjects = inner, reinjects
        self.large = False  # large pages have been seen that may be executed: no mitigation makes them smaller
        self._kept = np.zeros(0, dtype=STEP)

    def add(self, rows: NDArray[Any]) -> None:
        """Judge one piece's steps, in the light of those of each task that are remembered."""
        if not len(rows):
            return
        rows = np.concatenate([self._kept, rows])
        rows = rows[np.lexsort((rows["line"], rows["task"]))]
        self.large |= self._has_large(rows)
        self._judge(Visit(rows, self.ledger))
        self._keep(rows)

    def _has_large(self, rows: NDArray[Any]) -> bool:
        """Whether a large leaf is executable; where none is, faults may set a smaller page than they requested."""
        if self.form is None:
            return False
        bits, large = self.form.bits, rows["b"][(rows["kind"] == SET) & (rows["sub"] > 1)]
        if self.form.ept:
            return bool((large & np.uint64(bits.mask("X")) != 0).any())
        return bool((large & np.uint64(bits.mask("NX")) == 0).any())

    def _keep(self, rows: NDArray[Any]) -> None:
        n = len(rows)
        here = np.arange(n, dtype=np.int64)
        end = np.searchsorted(rows["task"], rows["task"], side="right")  # (step,) behind the task's last
        exits = np.where(rows["kind"] == EXIT, here, -1)
        tasks, first = np.unique(rows["task"], return_index=True)
        newest = np.maximum.reduceat(exits, first)  # (task,)
        last = newest[np.searchsorted(tasks, rows["task"])]
        start = np.where(last >= 0, last, end - 64)
        keep = here >= np.maximum(start, end - _REMEMBERED)
        kept = rows[keep]
        kept["fresh"] = False
        recent = np.maximum.reduceat(rows["line"], first)
        if len(tasks) > _TASKS:
            alive = np.sort(tasks[np.argsort(recent, kind="stable")[-_TASKS:]])
            kept = kept[np.isin(kept["task"], alive)]
        self._kept = kept

    # The rules -------------------------------------------------------------------------------------------------------

    def _judge(self, v: Visit) -> None:
        self._entries(v)
        self._faults(v)
        self._fast(v)
        self._returns(v)
        self._sets(v)
        self._tables(v)
        self._walks(v)
        self._mmio(v)
        for judge in self.more:
            judge(self, v)

    def _entries(self, v: Visit) -> None:
        last = v.before(ENTRY, EXIT)
        known = last >= 0
        entry, exit_ = v.kind == ENTRY, v.kind == EXIT
        v.find(ENTER, entry & known, v.at("kind", last) == ENTRY, last)
        v.find(LEAVE, exit_ & known, v.at("kind", last) == EXIT, last)
        v.find(RUNNING, known & np.isin(v.kind, _NOT_RUNNING), v.at("kind", last) == ENTRY, last)
        user = v.before(USER)
        moved = entry & (v.at("kind", last) == EXIT) & (user > last)  # the thread may run another vCPU now
        of = known & (entry | exit_ | (v.kind == FAULT) | (v.kind == FAST)) & ~moved
        of &= (v.rows["vcpu"] >= 0) & (v.at("vcpu", last) >= 0)
        v.find(SAME_VCPU, of, v.rows["vcpu"] != v.at("vcpu", last), last)

    def _faults(self, v: Visit) -> None:
        last, fault = v.before(ENTRY, EXIT), v.before(FAULT)
        here = (v.kind == FAULT) & (last >= 0)
        exit_ = v.at("kind", last) == EXIT
        sub = v.at("sub", last)
        address, code, rip = v.rows["a"], v.rows["b"], v.rows["c"]
        info1, info2, exit_rip = (v.at(name, last) for name in ("a", "b", "c"))
        narrow = code < np.uint64(1 << 32)  # older kernels print the lower half
        other = (code != info1) & ~(narrow & (code == info1 & np.uint64(0xFFFFFFFF)))
        other |= np.isin(sub, (NPF, EXCEPTION)) & (address != info2)
        other |= (rip != exit_rip) & (rip != _NO) & (exit_rip != _NO)
        wrong = ~exit_ | (sub == 0) | ((info1 != _NO) & (sub != NMI) & other)
        v.find(FAULT_EXIT, here, wrong, last)
        v.find(FAULT_ONCE, here & exit_, fault > last, fault)
        closing = np.isin(v.kind, (ENTRY, EXIT)) & exit_ & np.isin(sub, (NPF, EPT, EXCEPTION))
        v.find(FAULT_MISSING, closing & (v.before(NESTED) < last), fault < last, last)
        quiet = (v.before(EMUL, USER, NESTED, INJ, WERR) < fault) & (fault > last) & exit_ & (v.kind == ENTRY)
        fast, ret = v.before(FAST), v.before(RET)
        done = (fast > fault) & (v.at("sub", fast) > 0)
        done |= (ret > fault) & np.isin(v.at("a", ret), [self.numbers[name] for name in ("RETRY", "FIXED", "SPURIOUS")])
        v.find(AGAIN, quiet & done, (v.rows["a"] != exit_rip) & (exit_rip != _NO), last)

    def _code(self, code: NDArray[np.uint64]) -> NDArray[np.uint64]:
        return pfec.from_ept(code) if self.ept else code

    def _fast(self, v: Visit) -> None:
        last, fault, fast = v.before(ENTRY, EXIT), v.before(FAULT), v.before(FAST)
        here = (v.kind == FAST) & (last >= 0)
        code = self._code(v.at("b", fault))
        other = (fault < last) | (v.rows["a"] != v.at("a", fault)) | ((v.rows["b"] ^ code) & _LOW != 0)
        v.find(FAST_FAULT, here, other, fault)
        v.find(FAST_ONCE, here & (fault > last), fast > fault, fast)
        later = v.before(REQ, SET, CHANGE, RET, FRET, MARK)
        v.find(FAST_FIRST, here & (fault > last), later > fault, later)
        closing = np.isin(v.kind, (ENTRY, EXIT)) & (v.at("kind", last) == EXIT) & (fault > last)
        closing &= (code & (_P | _W | _RSVD) == _P | _W) & (v.before(WALK, EMUL, NESTED) < fault)
        ret = v.before(RET)
        emulated = (ret > fault) & (v.at("a", ret) == np.uint64(self.numbers["EMULATE"]))
        v.find(FAST_MISSING, closing & ~emulated, fast < fault, fault)

    def _returns(self, v: Visit) -> None:
        last, fault, ret, fast = v.before(ENTRY, EXIT), v.before(FAULT), v.before(RET), v.before(FAST)
        here = (v.kind == RET) & (last >= 0) & (v.before(NESTED) < last)
        late = v.before(INJ) > fault
        v.find(RETURN_ONCE, here, (fault < last) | (ret > fault) | late, np.where(ret > fault, ret, last))
        closing = np.isin(v.kind, (ENTRY, EXIT)) & (v.at("kind", last) == EXIT) & (fault > last)
        check = v.before(CHECK)
        closing &= (self._code(v.at("b", fault)) & _RSVD == 0) | ((check > fault) & (v.at("sub", check) == 0))
        v.find(RETURN_MISSING, closing, ret < fault, fault)
        if self.form is None:
            return
        said = v.rows["a"]
        number = {name: np.uint64(n) for name, n in self.numbers.items()}
        within = ((v.kind == RET) | (v.kind == FRET)) & (fault >= 0) & (fault > last)
        did = np.where(fast > fault, v.at("sub", fast), np.int16(0))
        wrong = ((did == 2) & (said != number["FIXED"])) | ((did == 1) & (said != number["SPURIOUS"]))
        v.find(RETURN_FAST, within & (did > 0), wrong, fast)
        handler = within & (v.kind == RET)
        known = [number[name] for name in ("RETRY", "EMULATE", "WRITE_PROTECTED", "FIXED", "SPURIOUS")]
        v.find(RETURN_KNOWN, handler, ~np.isin(said, known), fault)
        inner = (v.kind == FRET) & (last >= 0)
        twice = v.before(FRET)
        wrong = (fault < last) | (ret > fault) | (twice > fault)
        v.find(RETURN_INNER, inner, wrong, np.where(twice > fault, twice, np.where(ret > fault, ret, last)))
        sets, change = v.before(SET), v.before(CHANGE)
        mapped = (sets > fault) & (v.at("kind", v.at_index(v.previous(), sets)) == CHANGE) & (change > fault)
        was_there = (did == 1) | ((v.before(REQ) > fault) & ~mapped)
        if "fast_page_fault" not in self.seen:  # then that the fast path said so was perhaps not recorded
            was_there |= self._code(v.at("b", fault)) & (_P | _W) == _P | _W
        v.find(RETURN_SPURIOUS, handler & (said == number["SPURIOUS"]), ~was_there, fault)
        nothing = (did != 2) & (v.before(SET, CHANGE, MARK) < fault)
        v.find(RETURN_FIXED, handler & (said == number["FIXED"]), nothing, fault)
        walked = v.before(WERR) > fault  # a #PF for the guest drops, and may at once refill, what it was refused by
        v.find(RETURN_RETRY, handler & ~walked & (said == number["RETRY"]), v.before(SET) > fault, v.before(SET))
        write = self._code(v.at("b", fault)) & _W != 0
        asked = v.before_where((v.kind == SET) & (sets < v.before(REQ)))  # the others are neighbours
        protected = write & (v.at("b", asked) & np.uint64(self.form.bits.mask("W")) == 0)
        emulates = handler & ~walked & (said == number["EMULATE"])
        v.find(RETURN_EMULATE, emulates, (asked > fault) & (v.before(REQ) > fault) & ~protected, asked)
        direct = v.before(WALK) < fault
        unchanged = (sets > fault) & ~mapped
        at_work = np.bool_((v.kind == CHANGE).any())
        v.find(SET_CHANGE, handler & at_work & direct & (said == number["FIXED"]), unchanged, sets)
        asked = (v.kind == ENTRY) & (fault > last) & (ret > fault) & (v.at("a", ret) == number["EMULATE"])
        asked &= v.at("b", fault) >> np.uint64(33) & np.uint64(1) == 0  # a guest's table is only unprotected
        v.find(EMULATED, asked, v.before(EMUL, USER) < ret, ret)

    def _sets(self, v: Visit) -> None:
        last, fault, request = v.before(ENTRY, EXIT), v.before(FAULT), v.before(REQ)
        within = (fault >= 0) & (fault > last) & (v.before(USER, WERR, NESTED) < fault)
        direct = v.before(WALK) < fault
        here = (v.kind == REQ) & (last >= 0) & (v.before(NESTED) < last)
        other = (fault < last) | (direct & (v.rows["a"] != v.at("a", fault) >> np.uint64(12)))
        v.find(REQUEST_FAULT, here, other, fault)
        v.find(REQUEST_ONCE, here & within, request > fault, request)
        done = v.before(RET)
        late = np.isin(v.kind, (REQ, SET, MARK)) & within & (v.before(EMUL) < fault)
        v.find(RETURN_LAST, late, done > fault, done)
        previous = v.before(SET)
        sets = (v.kind == SET) & within
        twice = (previous > fault) & (v.at("c", previous) == v.rows["c"]) & (v.rows["c"] != _NO)
        v.find(SET_ONCE, sets, twice, previous)
        level = np.clip(v.rows["sub"].astype(np.int64), 1, 5)
        below = np.uint64(9) * (level - 1).astype(np.uint64)
        same = v.rows["a"] >> below == v.at("a", request) >> below
        first = sets & (request > fault) & (previous < request)
        v.find(SET_FIRST, first, ~same | (v.rows["sub"] > v.at("sub", request)), request)
        page = np.where(direct, v.rows["a"], v.at("a", fault) >> np.uint64(12))
        index = v.rows["c"] >> np.uint64(3) & np.uint64(511)
        wrong = (index != page >> below & np.uint64(511)) | (v.rows["c"] & np.uint64(7) != 0)
        v.find(SET_PLACE, (first | (sets & direct)) & (v.rows["c"] != _NO), wrong, np.where(first, request, fault))
        made = (v.kind == PAGE) & within & direct
        span = np.uint64(9) * level.astype(np.uint64)
        other = (request < fault) | (v.rows["a"] != v.at("a", request) >> span << span)
        v.find(TABLE_GFN, made, other, np.where(request > fault, request, fault))
        marks = (v.kind == MARK) & within
        v.find(SET_FIRST, marks, (request < fault) | (v.rows["a"] != v.at("a", request)), fault)
        if self.form is None:
            return
        pfn = self.form.bits["PFN"]
        frame = (v.rows["b"] & np.uint64(pfn.mask)) >> np.uint64(pfn.low)
        wrong = same & (frame >> below != v.at("b", request) >> below)
        v.find(SET_REQUEST, sets, (request < fault) | wrong, np.where(request > fault, request, fault))
        # A change that maps what was requested: the next event prints it.
        behind = v.previous()
        change = (v.kind != OTHER) & (v.at("kind", behind) == CHANGE) & (behind >= 0)
        asked = v.at_index(request, behind)
        since = v.at_index(fault, behind)
        state = states(v.at("b", behind), self.form, v.at("sub", behind))
        mapped = np.isin(state, (*LEAVES, MMIO)) & (asked > since) & (since > v.at_index(last, behind))
        mapped &= (v.at_index(v.before(RET), behind) < since) & (v.at_index(v.before(USER), behind) < since)
        span = np.uint64(9) * np.clip(v.at("sub", behind).astype(np.int64) - 1, 0, 4).astype(np.uint64)
        mapped &= v.at("a", asked) >> span == v.at("a", behind) >> span
        bits = self.form.bits
        used = np.uint64(sum(bits.mask(name) for name in ("A", "D") if name in bits))
        rights = np.uint64(sum(bits.mask(name) for name in ("W", "MMU_W") if name in bits))
        gained, lost = v.rows["b"] & ~v.at("b", behind), v.at("b", behind) & ~v.rows["b"]
        alike = (v.kind == MARK) | ((gained & ~used == 0) & (lost & ~rights == 0))
        alike |= v.rows["b"] & ~np.uint64(1 << 63) == 0  # the spte is read again: somebody may have zapped it
        shown = np.isin(v.kind, (SET, MARK)) & (v.rows["a"] == v.at("a", behind)) & alike
        v.find(CHANGE_SET, change & mapped, ~shown, behind)
        accessed = np.uint64(bits.mask("A") if "A" in bits else 0)
        if accessed:
            kind = np.uint64(bits.mask("AD_KIND") if "AD_KIND" in bits else 0)
            tracks = (v.rows["b"] & kind == np.uint64(1 << 52)) & (kind > 0)
            v.find(SET_ACCESSED, first & same & ~tracks, v.rows["b"] & accessed == 0, request)
            tracks = (v.at("b", behind) & kind == np.uint64(1 << 52)) & (kind > 0)
            leaf = change & mapped & (state != MMIO) & ~tracks
            v.find(SET_ACCESSED, leaf, v.at("b", behind) & accessed == 0, behind)
        alone = change & (v.kind != SET) & np.isin(state, LEAVES)
        old, new = v.at("c", behind), v.at("b", behind)
        alone &= np.isin(states(old, self.form, v.at("sub", behind)), LEAVES)
        took, gave = old & ~new, new & ~old
        single = np.array([bits.mask(name) for name in ("A", "D") if name in bits], dtype=np.uint64)
        one = (gave == 0) & ((took & ~rights == 0) | np.isin(took, single))
        v.find(CHANGE_ONE, alone, ~one & (new != update.age(old, self.form)), behind)
        changes = (v.kind == CHANGE) & within & (v.before(RET) < fault) & direct
        there = np.zeros(len(v.kind), dtype=np.bool_)
        there[changes] = np.isin(
            states(v.rows["b"][changes], self.form, v.rows["sub"][changes]), (*LEAVES, MMIO, NON_LEAF)
        )
        other = (request < fault) | ~same
        v.find(CHANGE_REQUEST, there, other, np.where(request > fault, request, fault))

    def _tables(self, v: Visit) -> None:
        if self.form is None:
            return
        changes = v.kind == CHANGE
        if not changes.any():
            return
        level = v.rows["sub"].astype(np.int64)
        old = np.zeros(len(v.kind), dtype=np.uint8)
        new = old.copy()
        old[changes] = states(v.rows["c"][changes], self.form, level[changes])
        new[changes] = states(v.rows["b"][changes], self.form, level[changes])
        table = np.uint64(self.form.bits.mask("PFN"))
        cut = changes & (old == NON_LEAF) & ((new != NON_LEAF) | ((v.rows["b"] ^ v.rows["c"]) & table != 0))
        behind = v.previous()
        after_cut = (v.kind != OTHER) & (behind >= 0) & cut[np.maximum(behind, 0)]
        zapped = (v.kind == ZAP) & (v.rows["a"] == v.at("a", behind)) & (level == v.at("sub", behind) - 1)
        v.find(TABLE_GONE, after_cut, ~zapped, behind)
        linked = changes & (new == NON_LEAF) & (old != NON_LEAF)
        made, used = v.before(PAGE), v.before_where(linked)
        fits = (v.at("a", made) == v.rows["a"]) & (v.at("sub", made) == level - 1) & (used < made)
        fits &= v.at("b", made) == 1
        v.find(TABLE_NEW, linked & (made >= 0), ~fits, made)
        # While others run, all 512 entries of a table are removed, empty ones too, in order.
        gone = np.flatnonzero(changes & np.isin(new, (REMOVED, FROZEN)))
        unit = np.uint64(9) * np.clip(level[gone] - 1, 0, 4).astype(np.uint64)
        slot = v.rows["a"][gone] >> unit
        order = np.lexsort((v.rows["line"][gone], slot >> np.uint64(9), level[gone], v.rows["task"][gone]))
        gone, slot = gone[order], slot[order]
        if len(gone) < 2:
            return
        a, b = gone[:-1], gone[1:]
        same = (v.rows["task"][a] == v.rows["task"][b]) & (level[a] == level[b])
        same &= slot[:-1] >> np.uint64(9) == slot[1:] >> np.uint64(9)
        empty = old[a] == NONE
        follows = slot[:-1] + np.uint64(1) == slot[1:]
        ended = slot[:-1] & np.uint64(511) == np.uint64(511)
        begins = (slot[1:] & np.uint64(511) == 0) & (~empty | ended)
        begins |= ended & (old[b] != NONE)  # another time, with the lock held alone: empty entries stay as they are
        empty, follows = empty | (old[b] == NONE), follows | begins
        of, wrong = np.zeros(len(v.kind), dtype=np.bool_), np.zeros(len(v.kind), dtype=np.bool_)
        of[b], wrong[b] = same & empty, ~follows
        context = np.full(len(v.kind), -1, dtype=np.int64)
        context[b] = a
        v.find(TABLE_ALL, of, wrong, context)

    def _walks(self, v: Visit) -> None:
        last = v.before(ENTRY, EXIT, FAULT, WALK, ELEM)
        first = v.before_where((v.kind == ELEM) & (v.at("kind", last) == WALK))
        kind, level, above = v.at("kind", last), v.rows["sub"], v.at("sub", last)
        top = np.where(kind == WALK, (level >= 2) & (level <= 5), level == above - 1)
        top |= (kind == ELEM) & (level == v.at("sub", first)) & (first >= 0)
        here = (v.kind == ELEM) & (last >= 0)
        v.find(WALK_LEVELS, here, ~np.isin(kind, (WALK, ELEM)) | ~top, last)
        tops = np.flatnonzero((v.kind == ELEM) & (kind == WALK))
        if len(tops) > 2:
            a, b, c = tops[:-2], tops[1:-1], tops[2:]
            same = (v.rows["task"][a] == v.rows["task"][c]) & (level[a] == level[c])
            of, odd = np.zeros(len(v.kind), dtype=np.bool_), np.zeros(len(v.kind), dtype=np.bool_)
            of[c], odd[c] = same, level[b] != level[c]
            context = np.full(len(v.kind), -1, dtype=np.int64)
            context[c] = b
            v.find(WALK_TOP, of, odd, context)
        behind = v.previous()
        entry = v.at("a", behind)
        ended = (v.at("sub", behind) == 1) | (entry & np.uint64(1) == 0) | (entry & np.uint64(0x80) != 0)
        after = (behind >= 0) & (v.at("kind", behind) == ELEM) & ~np.isin(v.kind, (ELEM, OTHER))
        v.find(WALK_END, after, ~ended & (v.kind != WERR), behind)
        unbroken = np.isin(v.at("kind", behind), (WALK, ELEM, ABIT, DBIT))
        v.find(WALK_WHOLE, here & (behind >= 0), ~unbroken, behind)
        v.find(WALK_WHOLE, after & np.isin(v.kind, (REQ, ABIT, DBIT, PAGE)), ~ended, behind)
        v.find(ERROR_AFTER, (v.kind == WERR) & (behind >= 0), v.at("kind", behind) != ELEM, behind)
        fault = (behind >= 0) & (v.at("kind", behind) == FAULT) & (v.kind == WALK)
        exit_ = v.before(EXIT)
        code = v.at("b", behind)
        fault &= (v.at("sub", exit_) == EXCEPTION) & (code & _RSVD == 0)
        delivers = (v.at("d", exit_) >> np.uint64(31) & np.uint64(1) != 0) | (v.at("d", exit_) == _NO)
        to_unprotect = delivers & (v.rows["b"] & ~np.uint64(4) == 0)  # while an event is delivered: a read, by the CPL
        other = (v.rows["a"] != v.at("a", behind)) | ((v.rows["b"] != code) & ~to_unprotect)
        v.find(WALK_FAULT, fault, other, behind)
        last_fault, leaf = v.before(FAULT), v.before(ELEM)
        asks = (v.kind == REQ) & (leaf > last_fault) & (last_fault > v.before(EXIT)) & (v.at("sub", leaf) == 1)
        maps = v.at("a", leaf) >> np.uint64(12) & np.uint64((1 << 40) - 1)
        v.find(LEAF_REQUESTED, asks, maps != v.rows["a"], leaf)
        error, entered = v.before(WERR), v.before(ENTRY)
        shot = (v.kind == INJ) & (v.rows["sub"] == 2) & (entered >= 0)
        v.find(INJECTED, shot, (error < entered) | (v.at("a", error) != v.rows["a"]), error)

    def _mmio(self, v: Visit) -> None:
        behind = v.previous()
        checked = (v.kind != OTHER) & (behind >= 0) & (v.at("kind", behind) == CHECK)
        valid = v.at("sub", behind) == 1
        handled = v.kind == HANDLE
        wrong = valid != handled
        if self.form is not None:
            said = spte.mmio(v.at("a", behind), self.form)
            wrong |= handled & (said["gfn"] != v.rows["a"])
            if not self.form.ept:
                wrong |= handled & (said["access"] != v.rows["b"])
        of = checked | (handled & (behind >= 0))
        v.find(MMIO_VALID, of, wrong | (handled & ~checked), behind)
        matched = (v.kind != OTHER) & (behind >= 0) & (v.at("kind", behind) == MATCH)
        v.find(MMIO_DONE, matched, v.kind != IO, behind)
        v.find(MMIO_SAME, matched & (v.kind == IO), v.rows["a"] != v.at("a", behind), behind)
        last, emulated = v.before(ENTRY, EXIT), v.before(EMUL)
        exit_ = (last >= 0) & (v.at("kind", last) == EXIT)
        fault, request, check = v.before(FAULT), v.before(REQ), v.before(CHECK)
        within = exit_ & (fault > last)
        anew = (v.kind == REQ) & within & (self._code(v.at("b", fault)) & _RSVD != 0)
        v.find(MMIO_STALE, anew, (check < fault) | (v.at("sub", check) == 1), fault)
        nowhere = (v.kind == RET) & within & (request > fault) & (v.at("b", request) >> np.uint64(63) != 0)
        nowhere &= v.rows["a"] == np.uint64(self.numbers["EMULATE"])
        v.find(MMIO_MARKED, nowhere, v.before(MARK) < request, request)
        begun = (v.kind == MATCH) | ((v.kind == IO) & (v.rows["sub"] > 0))
        v.find(MMIO_EMULATED, begun & exit_ & (v.before(USER) < last), emulated < last, last)
        v.find(USER_AFTER, (v.kind == USER) & (last >= 0), ~exit_, last)
        if self.form is None:
            return
        fault = v.before(FAULT)
        named = (v.kind == CHECK) & (fault > last) & exit_ & np.isin(v.at("sub", last), (NPF, EPT))
        v.find(MMIO_FAULT, named, spte.mmio(v.rows["a"], self.form)["gfn"] != v.at("a", fault) >> np.uint64(12), fault)


class Visit:
    """Steps sorted by task, and for each the last one of some kind before it; judged are the fresh ones."""

    def __init__(self, rows: NDArray[Any], ledger: Ledger) -> None:
        self.rows, self.ledger, self.kind = rows, ledger, rows["kind"]
        n = len(rows)
        self._here = np.arange(n, dtype=np.int64)
        begins = np.concatenate([[True], rows["task"][1:] != rows["task"][:-1]])
        self._start = np.maximum.accumulate(np.where(begins, self._here, 0))  # (step,) its task's first step
        self._cache: dict[tuple[int, ...], Index] = {}

    def before_where(self, mask: Bools) -> Index:
        """The last step of the same task before each step at which the mask is set; -1: none."""
        found = np.maximum.accumulate(np.where(mask, self._here, np.int64(-1)))
        found = np.concatenate([np.full(1, -1, dtype=np.int64), found[:-1]])
        return np.where(found >= self._start, found, np.int64(-1))

    def before(self, *kinds: int) -> Index:
        """The last step of one of these kinds before each step, of the same task; -1: none."""
        if kinds not in self._cache:
            self._cache[kinds] = self.before_where(np.isin(self.kind, kinds))
        return self._cache[kinds]

    def previous(self) -> Index:
        """The step before each, of the same task and of a kind that is known here; -1: none."""
        return self.before(*range(OTHER))

    def at(self, name: str, index: Index) -> NDArray[Any]:
        """A column at other steps; what stands at -1 has no meaning."""
        return self.rows[name][np.maximum(index, 0)]

    def at_index(self, column: Index, index: Index) -> Index:
        """The same for an array of indices."""
        return column[np.maximum(index, 0)]

    def find(self, rule: Rule, of: Bools, wrong: Bools, context: Index) -> None:
        """Enter what a rule finds among the fresh steps."""
        of = of & self.rows["fresh"]
        bad = np.flatnonzero(of & wrong)
        if not len(bad):
            self.ledger.judge(rule, int(np.count_nonzero(of)), bad, (), str)
            return
        line = self.rows["line"]
        seen = np.where(context >= 0, line[np.maximum(context, 0)], np.int64(0))
        kinds = self.kind

        def say(i: int) -> str:
            before = f" after {KINDS[kinds[context[i]]].lower()}" if context[i] >= 0 else ""
            return f"{KINDS[kinds[i]].lower()}{before}"

        self.ledger.judge(rule, int(np.count_nonzero(of)), bad, (seen, line), say)
