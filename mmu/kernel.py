"""What both MMUs share: the kernel and its switches, how a leaf spte is made, what the record of a fault holds.

The direct MMU (:mod:`mmu.direct`) and the shadow MMU (:mod:`mmu.shadow`) differ in what their tables translate; how an
entry is built, which path a fault takes and what KVM says of it are the same words in both. Chapters 1 and 3.

Facts: Linux 6.1 ``arch/x86/kvm/mmu/spte.c`` (``make_spte``), ``mmu_internal.h`` (``RET_PF_*``; 6.12 has one more).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmu.pfec import PFEC
from mmu.spte import layout_named

Index = NDArray[np.int64]
Bools = NDArray[np.bool]
Words = NDArray[np.uint64]

PREFETCH = 8  # sptes filled around a faulting one (PTE_PREFETCH_NUM)

PATHS = ("fast fixed", "fast not fixed", "spurious", "slow", "retry", "emulate", "MMIO", "injected", "failed")
"""What became of a fault; a fault's ``path`` is a position here. ``fast not fixed`` went on to the slow path."""

FAST_FIXED, FAST_NOT_FIXED, SPURIOUS, SLOW, RETRY, EMULATE, MMIO, INJECTED, FAILED = np.arange(9, dtype=np.uint8)

RETURNS = ("none", "RETRY", "EMULATE", "WRITE_PROTECTED", "INVALID", "FIXED", "SPURIOUS")
"""What the common fault handler returned; ``none``: it was not called (a valid MMIO spte says all)."""

(RET_NONE, RET_RETRY, RET_EMULATE, RET_WRITE_PROTECTED, RET_INVALID, RET_FIXED, RET_SPURIOUS) = np.arange(
    7, dtype=np.uint8
)

RETURN_NUMBERS = {
    "6.1": dict(zip(RETURNS, (0, 1, 2, 2, 3, 4, 5), strict=True)),
    "6.12": dict(zip(RETURNS, (0, 1, 2, 3, 4, 5, 6), strict=True)),
}
"""The number of each return (``RET_PF_*``), as the kernel's probes print it."""

POLICIES = ("none", "2012", "3.6", "6.1", "6.12")
"""Who repairs write-protect faults without the lock: nobody; every MMU; direct MMUs; the same, but only 4K sptes."""

FAULT = np.dtype(
    [
        ("access", np.int64),  # position in the run, -1 where the touch is no access of the stream
        ("vcpu", np.int32),
        ("gva", np.uint64),
        ("address", np.uint64),  # what the fault reports: guest-physical with nested paging, else virtual
        ("gfn", np.int64),
        ("code", np.uint64),
        ("path", np.uint8),
        ("ret", np.uint8),
        ("printed", np.bool),  # a fast_page_fault event is printed
        ("old", np.uint64),
        ("new", np.uint64),
        ("order", np.int64),
    ]
)
"""One fault: a structured array of these is what every run yields, in order."""

CODE_P, CODE_W, CODE_U, CODE_RSVD, CODE_F = (np.uint64(PFEC.mask(name)) for name in ("P", "W", "U", "RSVD", "F"))
CAN_READ, CAN_WRITE, CAN_FETCH = np.uint8(0b0001), np.uint8(0b0110), np.uint8(0b1000)
"""Rights to a page: bit k allows the access whose op is k (read; write and increment; fetch)."""


@dataclass(frozen=True)
class Kernel:
    """The kernel and its switches.

    Attributes:
        release: ``6.1`` or ``6.12``: whose rules the slow path follows.
        nested_paging: EPT or NPT is used (``kvm_amd.npt``).
        tdp_mmu: the TDP MMU rather than the legacy one (``kvm.tdp_mmu``; only with nested paging).
        eager_page_split, nx_huge_pages, mmio_caching, flush_on_reuse: as the module parameters.
        policy: one of :data:`POLICIES`.
        layout: the spte layout, for example ``6.1-npt``.
    """

    release: str = "6.1"
    nested_paging: bool = True
    tdp_mmu: bool = True
    eager_page_split: bool = True
    nx_huge_pages: bool = False
    mmio_caching: bool = True
    flush_on_reuse: bool = False
    policy: str = "6.1"
    layout: str = "6.1-npt"

    def __post_init__(self) -> None:
        if self.release not in ("6.1", "6.12"):
            raise ValueError(f"release is {self.release!r}; expected 6.1 or 6.12")
        if self.policy not in POLICIES:
            raise ValueError(f"policy is {self.policy!r}; expected one of {', '.join(POLICIES)}")

    @property
    def uses_tdp_mmu(self) -> bool:
        """The TDP MMU is in charge."""
        return self.nested_paging and self.tdp_mmu


class Touches(NamedTuple):
    """Touches of guest-physical memory in order: all arrays ``# (touch,)``, see ``DirectMMU.settle``."""

    order: Index  # ascending; equal only for touches that cannot both fault
    access: Index
    gva: Words
    gpa: Words
    slot: NDArray[np.int16]
    index: Index
    write: Bools
    fetch: Bools
    user: Bools
    walk: Bools  # the CPU's own access to a guest page table

    @classmethod
    def of(cls, part: Any, which: Index, slot: NDArray[np.int16], index: Index) -> Touches:
        """The touches that accesses of an unpaged guest make, those at ``which``: one each, at its own address."""
        op, gva = part.op[which], part.gva[which]
        write, none = (op == 1) | (op == 2), np.zeros(which.shape, dtype=np.bool)
        return cls(which, which, gva, gva, slot[which], index[which], write, op == 3, part.user[which], none)

    def take(self, which: Index) -> Touches:
        """Only the touches at these positions."""
        return Touches(*(column[which] for column in self))


class Masks:
    """The bits of one spte layout that faults are decided on, and what the CPU may do through an spte."""

    def __init__(self, layout: str) -> None:
        bits = layout_named(layout).bits
        self.present, self.w = (np.uint64(bits.mask(name)) for name in ("MMU_P", "W"))
        self.a, self.d = (np.uint64(bits.mask(name)) for name in ("A", "D"))
        self.host_w, self.mmu_w, self.large = (np.uint64(bits.mask(name)) for name in ("HOST_W", "MMU_W", "PS"))
        self.user = np.uint64(bits.mask("U") if "U" in bits else 0)
        self.execute = np.uint64(bits.mask("X") if "X" in bits else 0)
        self.no_execute = np.uint64(bits.mask("NX") if "NX" in bits else 0)
        self.frame = np.uint64(bits["PFN"].low)

    def rights(self, word: Words) -> NDArray[np.uint8]:
        """What the CPU may do through each leaf: :data:`CAN_READ`, :data:`CAN_WRITE`, :data:`CAN_FETCH` together."""
        present = word & self.present != 0
        fetch = word & self.execute != 0 if self.execute else word & self.no_execute == 0
        can = present * CAN_READ | (present & (word & self.w != 0)) * CAN_WRITE | (present & fetch) * CAN_FETCH
        return can.astype(np.uint8)


def independent(unit: Index, allowed: Bools, inert: Bools, scratch: Index) -> tuple[Index, Bools]:
    """Of touches in order, those whose faults may be served at the same time: the first of each unit that faults.

    Faults of different units do not disturb each other. A touch whose fault changes nothing (``inert``) goes along
    with every other such touch ahead of its unit's first that does change something.

    Args:
        unit: a number below ``scratch.size`` for each touch; -1 is the unit of all that have none.
        allowed: touches that do not fault.
        inert: touches whose fault changes no state.
        scratch: room for one number a unit; what it holds does not matter.

    Returns:
        The position of its unit's first acting fault for each touch (the number of touches where there is none), and
        the touches to serve now; both ``# (touch,)``.

    >>> lead, now = independent(np.array([0, 1, 0, 1]), np.array([True, False, False, False]), np.zeros(4, np.bool),
    ...                         np.zeros(3, dtype=np.int64))
    >>> lead.tolist(), now.tolist()
    ([2, 1, 2, 1], [False, True, True, False])
    """
    scratch[unit] = unit.size
    acting = np.flatnonzero(~allowed & ~inert)[::-1]
    scratch[unit[acting]] = acting  # the last assignment wins: the first touch of the unit
    lead = scratch[unit]
    here = np.arange(unit.size, dtype=np.int64)
    return lead, ~allowed & ((here == lead) | (inert & (here < lead)))


def prefetched(empty: Bools, ready: Bools, inside: Bools, alive: Bools) -> Bools:
    """Which neighbours of fresh sptes a direct shadow page is filled with (``__direct_pte_prefetch``).

    The empty sptes of a group form runs; a run is filled up to its first page that the host could not give at once,
    and a run whose first page it could not give ends the prefetch. A run that leaves the slot gives nothing at all.

    Args:
        empty, ready, inside: of each spte of the group whether nothing is mapped there, whether the host has its page,
            writable, and whether its gfn lies in the slot; all ``# (fault, 8)``.
        alive: groups in which a prefetch is tried ``# (fault,)``.
    """
    fill = np.zeros(empty.shape, dtype=np.bool)
    alive = alive.copy()
    for start in range(PREFETCH):
        opens = alive & empty[:, start]  # a run begins here
        if start:
            opens &= ~empty[:, start - 1]
        if not opens.any():
            continue
        run = np.logical_and.accumulate(empty[:, start:], axis=1) & opens[:, None]
        whole = (inside[:, start:] | ~run).all(axis=1)
        taken = run & np.logical_and.accumulate(ready[:, start:], axis=1) & whole[:, None]
        fill[:, start:] |= taken
        alive &= ~opens | taken[:, 0]
    return fill
