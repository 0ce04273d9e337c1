"""Why each fault happened: which right was missing, and who had taken it away.

The one idea: a write fault says *that* W is missing; the entry it met says *who* took it. :func:`recorded_causes` tells
it from a trace alone, :func:`predicted_causes` from a prediction, which knows the scenario alone. The two look at
different evidence for the same thing, so that setting them side by side means something. Chapter 4.

Facts: Linux 6.1 ``arch/x86/kvm/mmu/spte.h`` (what HOST_W, MMU_W and W say together) and
``Documentation/virt/kvm/x86/mmu.rst`` (the causes of a fault). Which trace event betrays which cause on a shadow MMU is
inferred from ``paging_tmpl.h``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmu import replay, scenario, trace
from mmu.kernel import FAST_FIXED, INJECTED
from mmu.paging import PFN, PTE
from mmu.pfec import PFEC
from mmu.play import Prediction, kernel_of, predict
from mmu.scenario import Scenario
from mmu.spte import layout_named

CAUSES = (
    "first touch",
    "entry dropped",
    "dirty log",
    "guest page table",
    "guest's entry",
    "host read-only",
    "guest's fault",
    "MMIO",
    "other",
)
"""Why a fault came. The first two find no entry, the next four an entry without W; ``guest's fault`` is passed on."""

(FIRST, DROPPED, DIRTY_LOG, TABLE, ENTRY, HOST, OWN, DEVICE, OTHER) = np.arange(len(CAUSES), dtype=np.uint8)
TOOK_W = (DIRTY_LOG, TABLE, ENTRY, HOST)
"""The causes for which an entry stands there and lacks W."""

_W_AND_D = np.uint64(PTE.mask("W", "D"))
P, W, RSVD = (np.uint64(PFEC.mask(name)) for name in ("P", "W", "RSVD"))


class Caused(NamedTuple):
    """Faults with their causes, in order; every array is ``# (fault,)``."""

    cause: NDArray[np.uint8]  # position in CAUSES
    fast: NDArray[np.bool]  # repaired without the mmu-lock
    code: NDArray[np.uint64]
    address: NDArray[np.uint64]
    epoch: NDArray[np.int64]  # how many dirty logs were fetched before
    line: NDArray[np.int64]  # of the trace; -1 for what is predicted

    def counts(self) -> dict[str, int]:
        """How many faults each cause has, in the order of :data:`CAUSES`; causes without a fault are left out."""
        found = np.bincount(self.cause, minlength=len(CAUSES))
        return {name: n for name, n in zip(CAUSES, found.tolist(), strict=True) if n}

    def take(self, which: NDArray) -> Caused:
        """Only these faults."""
        return Caused(*(column[which] for column in self))


def judge(
    code: NDArray[np.uint64],
    place: NDArray[np.uint64],
    *,
    host_w: NDArray[np.bool],
    table: NDArray[np.bool],
    withheld: NDArray[np.bool],
    own: NDArray[np.bool],
) -> NDArray[np.uint8]:
    """The cause of each fault, all arrays ``# (fault,)``.

    Args:
        code: error codes.
        place: what each fault's entry is known by (its page); a place without an earlier fault was never touched.
        host_w: the host lets KVM map the page writable.
        table: the page holds a guest page table that KVM shadows.
        withheld: the guest's own entry lacks W, or lacks D: then KVM holds W back, to set D at the first write.
        own: the fault was passed on to the guest.

    >>> no, yes = np.zeros(1, dtype=np.bool), np.ones(1, dtype=np.bool)
    >>> write = np.array([3], dtype=np.uint64)
    >>> CAUSES[judge(write, write, host_w=yes, table=no, withheld=no, own=no)[0]]
    'dirty log'
    >>> CAUSES[judge(write, write, host_w=no, table=no, withheld=no, own=no)[0]]
    'host read-only'
    """
    _, first = np.unique(place, return_index=True)
    new = np.zeros(code.shape, dtype=np.bool)
    new[first] = True
    present, write, rsvd = code & P != 0, code & W != 0, code & RSVD != 0
    lacks_w = present & write & ~rsvd
    return np.select(
        [own, rsvd, ~present & new, ~present, lacks_w & ~host_w, lacks_w & table, lacks_w & withheld, lacks_w],
        [OWN, DEVICE, FIRST, DROPPED, HOST, TABLE, ENTRY, DIRTY_LOG],
        default=OTHER,
    ).astype(np.uint8)


def predicted_causes(scene: Scenario, said: Prediction | None = None) -> Caused:
    """The causes of the faults that a scenario predicts, from the entries that the simulated MMU held.

    Faults outside what is predicted (the recording client's own pages) are left out.
    """
    said = predict(scene) if said is None else said
    keep = compared(scene, said)
    faults, epoch = said.faults[keep], said.epoch[keep]
    bits = layout_named(said.kernel.layout).bits
    host_w = faults["old"] & np.uint64(bits.mask("HOST_W")) != 0
    mmu_w = faults["old"] & np.uint64(bits.mask("MMU_W")) != 0
    tables = own_tables(scene) if not said.kernel.nested_paging else np.zeros(0, dtype=np.int64)
    cause = judge(
        faults["code"],
        faults["address"] >> np.uint64(12),
        host_w=host_w,
        table=np.isin(faults["gfn"], tables),
        withheld=~mmu_w,
        own=faults["path"] == INJECTED,
    )
    return Caused(
        cause,
        faults["path"] == FAST_FIXED,
        faults["code"],
        faults["address"],
        epoch,
        np.full(cause.shape, -1, dtype=np.int64),
    )


def compared(scene: Scenario, said: Prediction) -> NDArray[np.bool]:
    """Which predicted faults lie outside the recording client's own pages  # (fault,)."""
    return replay.Outside(scene, translated=not said.kernel.nested_paging)(said.faults["address"])


def own_tables(scene: Scenario) -> NDArray[np.int64]:
    """The gfns in which the guest's page tables lie."""
    written = scenario.table_writes(scene).gpa >> np.uint64(12)
    roots = np.array([vcpu.cr3 >> 12 for vcpu in scene.of(scenario.Vcpu)], dtype=np.uint64)
    return np.union1d(written, roots).astype(np.int64)


def recorded_causes(t: trace.Trace, scene: Scenario) -> Caused:
    """The causes of the faults in a trace, from its own lines.

    The scenario is asked for two things: which addresses are the recording client's own, and whether the guest ran on
    nested paging. With nested paging, or without guest paging, the ``fast_page_fault`` event shows the entry. On a
    shadow MMU no line does. There KVM's walk of the guest's tables within the fault shows the guest's entry, and its W
    and D; ``kvm_mmu_get_page`` names the gfns whose tables are shadowed; and the entry that KVM last made for a gfn
    says whether the host allowed writing.
    """
    seen = replay.recorded(t)
    host_bit = np.uint64(layout_named(kernel_of(scene).layout).bits.mask("HOST_W"))
    count = seen.line.size
    events = t["fast_page_fault"]
    ends = np.append(seen.line[1:], np.iinfo(np.int64).max)  # one vCPU: a fault is over where the next begins

    def within(name: str) -> NDArray[np.bool]:
        """Which faults have such an event before the next fault."""
        lines = t[name]["line"]
        return np.searchsorted(lines, ends) > np.searchsorted(lines, seen.line)

    gfn = (seen.address >> np.uint64(12)).astype(np.int64)
    shadowed = not scene.nested_paging and scenario.paging_format(scene) is not None
    host_w, own, withheld = (
        np.ones(count, dtype=np.bool),
        np.zeros(count, dtype=np.bool),
        np.zeros(count, dtype=np.bool),
    )
    table = np.zeros(count, dtype=np.bool)
    if not shadowed:
        met = seen.fast >= 0  # (fault,) an entry was looked at
        host_w[met] = events["old"][seen.row[met]] & host_bit != 0
    else:
        own = within("kvm_inj_exception")
        leaf = _walked(t, seen.line, ends)
        withheld = (leaf & P != 0) & (leaf & _W_AND_D != _W_AND_D)
        gfn = ((leaf & PFN) >> np.uint64(12)).astype(np.int64)
        shadow_pages = t["kvm_mmu_get_page"]
        table = np.isin(gfn, shadow_pages["gfn"][shadow_pages["direct"] == 0].astype(np.int64))
        made = _last_made(t, gfn, seen.line)
        host_w = made & host_bit != 0
    cause = judge(seen.code, seen.address >> np.uint64(12), host_w=host_w, table=table, withheld=withheld, own=own)
    fixed = (seen.fast >= 0) & (seen.fast >> 1 & 1 == 1)
    everything = Caused(cause, fixed, seen.code, seen.address, seen.epoch, seen.line)
    return everything.take(replay.Outside(scene, translated=not scene.nested_paging)(seen.address))


def _walked(t: trace.Trace, begins: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The guest's leaf entry that KVM's walk met within each fault; 0 where it met none."""
    leaf = t["kvm_mmu_paging_element"]
    leaf = leaf[leaf["level"] == 1]
    at = np.searchsorted(leaf["line"], begins)
    inside = at < np.searchsorted(leaf["line"], ends)
    found = np.zeros(begins.shape, dtype=np.uint64)
    found[inside] = leaf["pte"][at[inside]]
    return found


def _last_made(t: trace.Trace, gfn: NDArray[np.int64], line: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The entry that KVM last made for each gfn before each line; all ones where the trace shows none."""
    made = t["kvm_mmu_set_spte"]
    made = made[np.lexsort((made["line"], made["gfn"]))]
    page = made["gfn"].astype(np.int64)
    at = np.searchsorted(page << 32 | made["line"].astype(np.int64), gfn << 32 | line) - 1
    found = at >= 0
    found[found] = page[at[found]] == gfn[found]
    word = np.full(gfn.shape, ~np.uint64(0), dtype=np.uint64)
    word[found] = made["spte"][at[found]]
    return word
