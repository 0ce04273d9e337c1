"""A recorded scenario played on a simulated guest: what should have happened, predicted from its input alone.

The scenario says what the recording client did; this module does the same to a :class:`mmu.vm.Guest` and collects the
faults, the values and the bitmaps. What the client did without saying so is here too, each habit under its own name:
it fetched its own code before the first access of a run and after a load of CR0 or CR3, it filled pages with one byte,
it wrote return instructions where the guest was to call, it reaped its forked children. Chapters 4 and 13.

Never used for a prediction: the trace, the bitmaps, a fault's code. Results of reads are used for one thing: the byte
that the client filled a page with is input that the scenario does not state; the first read of the page tells it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmu import host, paging, pfec, scenario
from mmu.host import HUGE_PAGES, PAGE, Backing
from mmu.kernel import FAULT, INJECTED, Kernel
from mmu.scenario import (
    DirtyClear,
    DirtyGet,
    DirtyRing,
    EnableCap,
    Gmap,
    Host,
    Memslot,
    Phase,
    Run,
    Scenario,
    Vcpu,
)
from mmu.slots import Slot
from mmu.vm import CR0, CR3, FETCH, READ, VCPU, WRITE, Delivery, Guest, Stream, stream

CAP_MANUAL_DIRTY_LOG_PROTECT2, CAP_DIRTY_LOG_RING, CAP_DIRTY_LOG_RING_ACQ_REL = 168, 192, 223
RING_ENTRY = 16  # bytes

CODE = 0x1080  # the client's loop in the guest
GATES, DESCRIPTORS, TASK, STACK = 0x3000, 0x2000, 0x4000, 0x8000  # its IDT, GDT, task state segment; its stack's top
STUB = 0xA000  # its code at CPL 3, which ends in a software interrupt, where no gmap line of its own memory allows U
VECTOR_PF = 14
RETURN = 0xC3  # the instruction that a called page holds
# The first release that is predicted by the rules of 6.12. Its TDP MMU came in 6.2, its shadow MMU in 6.4, what it
# returns for a store to a guest table after 6.6: recordings of releases in between may disagree where these differ.
SIMPLIFIED = (6, 4)


@dataclass
class Item:
    """One thing that the scenario records and the prediction says too."""

    kind: str
    predicted: Any
    recorded: Any
    where: str

    @property
    def agrees(self) -> bool:
        """They are the same."""
        return bool(self.predicted == self.recorded)


@dataclass
class Prediction:
    """What a scenario's run should show.

    Attributes:
        faults: every fault, in order  # (fault,) of dtype FAULT.
        epoch: how many dirty logs were fetched before each  # (fault,).
        injected: vCPU, error code, whether injected again, in order.
        values: results of reads, error codes and addresses of #PFs.
        bitmaps: one for each KVM_GET_DIRTY_LOG.
        rings: one for each harvest of a dirty ring.
        unexplained: what the scenario did that is not modelled.
    """

    kernel: Kernel
    faults: NDArray[np.void] = field(default_factory=lambda: np.zeros(0, dtype=FAULT))
    epoch: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    injected: list[tuple[int, int, bool]] = field(default_factory=list)
    values: list[Item] = field(default_factory=list)
    bitmaps: list[Item] = field(default_factory=list)
    rings: list[Item] = field(default_factory=list)
    unexplained: list[str] = field(default_factory=list)


def kernel_of(scene: Scenario) -> Kernel:
    """The kernel and its switches, as the recording states them.

    >>> text = '{"events": [], "kernel": "6.12.1 x", "params": {"kvm_amd.npt": "Y", "kvm.tdp_mmu": "N"}}'
    >>> kernel_of(scenario.parse(text)).release, kernel_of(scenario.parse(text)).uses_tdp_mmu
    ('6.12', False)
    """
    numbers = re.match(r"(\d+)\.(\d+)", scene.kernel)
    release = "6.12" if numbers and (int(numbers[1]), int(numbers[2])) >= SIMPLIFIED else "6.1"

    def on(name: str, default: str) -> bool:
        return scene.params.get(name, default) in ("Y", "1", "y", "force")

    nested = scene.nested_paging or not any(name in scene.params for name in ("kvm_amd.npt", "kvm_intel.ept"))
    return Kernel(
        release=release,
        nested_paging=nested,
        tdp_mmu=on("kvm.tdp_mmu", "Y"),
        eager_page_split=on("kvm.eager_page_split", "Y"),
        nx_huge_pages=on("kvm.nx_huge_pages", "N"),
        mmio_caching=on("kvm.mmio_caching", "Y"),
        policy=release,
        layout=f"{release}-npt",
    )


def predict(scene: Scenario, policy: str = "") -> Prediction:
    """Play a whole scenario; vCPUs' runs go one after the other, in the order in which they began.

    Args:
        scene: what the client did.
        policy: one of :data:`mmu.kernel.POLICIES`, to play it on a kernel that never was; empty: the recorded one's.
    """
    return Player(scene, policy).play()


class Player:
    """Plays a scenario's events, one method for each kind."""

    def __init__(self, scene: Scenario, policy: str = "") -> None:
        self.scene = scene
        recorded = kernel_of(scene)
        self.out = Prediction(replace(recorded, policy=policy) if policy else recorded)
        self.guest = Guest(self.out.kernel)
        self.backings: dict[int, Backing] = {}  # by host address
        self.faults: list[NDArray[np.void]] = [self.out.faults]
        self.epochs: list[NDArray[np.int64]] = [self.out.epoch]
        self.child = False  # a forked child is alive, and no event will say that it exits
        self.full: list[DirtyRing] = []  # harvests of full rings, to happen within the next run
        self.runs = 0
        self.tables = scenario.table_writes(scene)
        self.fills = Fills(scene)
        self.huge = {event.hva for event in scene.of(Memslot) if "MADV_HUGEPAGE" in event.backing}
        own = next((event.size for event in scene.of(Memslot) if event.slot == 0), 0)
        stubs = [event.gva for event in scene.of(Gmap) if event.flags & int(paging.U) and event.gpa < own]
        self.stub = next(iter(stubs), STUB)
        self.do = {
            Memslot: self.memslot, EnableCap: self.enable, Gmap: self.gmap, Vcpu: self.vcpu, Phase: self.phase,
            Run: self.run, DirtyGet: self.dirty_get, DirtyClear: self.dirty_clear, DirtyRing: self.dirty_ring,
            Host: self.host,
        }  # fmt: skip

    def play(self) -> Prediction:
        """Play every event."""
        for place, event in enumerate(self.scene.events):
            if type(event) in self.do:
                self.do[type(event)](event, place)
        self.out.faults = np.concatenate(self.faults)
        self.out.epoch = np.concatenate(self.epochs)
        return self.out

    # Setting up ------------------------------------------------------------------------------------------------------

    def memslot(self, event: Memslot, place: int) -> None:
        """Create, delete or change a slot; its backing stays with its host address."""
        slot = self.guest.memory.slot(event.slot)
        base, pages = event.gpa // PAGE, event.size // PAGE
        if not pages:
            if slot:
                self.guest.remove_slot(slot)
            return
        if slot and (slot.base, slot.pages) == (base, pages):
            self.guest.set_flags(slot, event.flags)
            return
        if slot:
            self.guest.remove_slot(slot)  # moved: KVM deletes it first
        if event.hva not in self.backings:
            most = max(other.size for other in self.scene.of(Memslot) if other.hva == event.hva) // PAGE
            backing = Backing(
                most, huge=event.hva in self.huge, content=True, ahead=event.hva // PAGE % HUGE_PAGES,
                upgrades=self.out.kernel.release == "6.12",
            )  # fmt: skip
            self.backings[event.hva] = backing
            if prefaulted(self.scene, event) or self.fills.called(base, pages):
                backing.populate()
        slot = self.guest.add_slot(event.slot, base, pages, event.flags, self.backings[event.hva])
        self.fill(place, slot)

    def fill(self, place: int, slot: Slot | None = None) -> None:
        """Let the client write what it wrote at this event without saying so."""
        for first, count, byte in self.fills.at.get(place, ()):
            for target in [slot] if slot else self.guest.memory.slots:
                low, high = max(first, target.base), min(first + count, target.base + target.pages)
                if low < high:
                    start = low - target.base + target.offset
                    self.guest.unmapped(target.backing, target.backing.populate(start, high - low))
                    target.backing.bytes[start : start + high - low] = byte
        if slot:
            for gpa in self.fills.calls:
                if slot.base <= gpa // PAGE < slot.base + slot.pages:
                    slot.backing.bytes[gpa // PAGE - slot.base + slot.offset, gpa % PAGE] = RETURN

    def enable(self, event: EnableCap, _: int) -> None:
        """KVM_ENABLE_CAP."""
        memory = self.guest.memory
        if event.cap == CAP_MANUAL_DIRTY_LOG_PROTECT2:
            memory.manual, memory.initially_set = bool(event.arg0 & 1), bool(event.arg0 & 2)
        elif event.cap in (CAP_DIRTY_LOG_RING, CAP_DIRTY_LOG_RING_ACQ_REL):
            memory.ring_size = event.arg0 // RING_ENTRY
        else:
            self.out.unexplained.append(f"capability {event.cap}")

    def gmap(self, _: Gmap, __: int) -> None:
        """Write the guest page-table entries that are due by now, upper levels and all."""
        fmt = scenario.paging_format(self.scene)
        due = self.tables.before_run <= self.runs
        for gpa, entry in zip(self.tables.gpa[due].tolist(), self.tables.entry[due].tolist(), strict=True):
            self.guest.memory.store(gpa, entry, fmt.entry_bytes)
        rest = ~due
        self.tables = scenario.TableWrites(*(column[rest] for column in self.tables))

    def vcpu(self, event: Vcpu, _: int) -> None:
        """A vCPU with its control registers; a #PF reaches it through the client's descriptor tables."""
        cpu = VCPU(event.vcpu, event.cr0, event.cr3, event.cr4, event.efer)
        self.guest.vcpus[event.vcpu] = cpu
        if cpu.format is not None:
            self.guest.delivery[event.vcpu] = Delivery(
                GATES + VECTOR_PF * 2 * cpu.width, DESCRIPTORS + 8, TASK + 4, STACK + event.vcpu * PAGE - 8
            )

    # Running ---------------------------------------------------------------------------------------------------------

    def run(self, run: Run, _: int) -> None:
        """One run's accesses, with the client's own fetches among them."""
        if run.vcpu not in self.guest.vcpus:
            raise ValueError(
                f"vCPU {run.vcpu} runs ({run.phase}) before its registers are set; expected a vcpu event first"
            )
        self.runs += 1
        own, accesses = self._with_habits(run)
        device = [value for _, _, way, value in run.mmio_exits if way == "R"]
        result = self.guest.run(run.vcpu, accesses, device)
        if self.scene.reserved_without_p:
            _drop_p(result.faults["code"])
            if self.out.kernel.nested_paging:  # else KVM's own walk makes the guest's error code
                _drop_p(result.code)
                _drop_p(result.reinjected["code"])
        full = self.guest.full_rings
        for event in self.full:
            self._ring(event, full.pop(0) if full else None)
        self.full.clear()
        faults = result.faults
        if not self._shadow_paged(run.vcpu):
            codes = np.zeros(0, dtype=faults.dtype)
        else:
            codes = faults[faults["path"] == INJECTED]
        events = [(int(f["access"]), 0, int(result.code[f["access"]]), False) for f in codes]
        events += [(access, 1, code, True) for access, code in result.reinjected.tolist()]
        self.out.injected += [(run.vcpu, code, again) for _, _, code, again in sorted(events)]
        faults["access"] = own[faults["access"]]
        self.faults.append(faults)
        self.epochs.append(np.full(faults.shape, len(self.out.bitmaps), dtype=np.int64))
        mine = own >= 0
        self._values(run, result.value[mine], result.fault[mine], result.code[mine])

    def _with_habits(self, run: Run) -> tuple[NDArray[np.int64], Stream]:
        """A run's accesses with the client's own among them; and which access each is, -1 for the client's own."""
        none, top = np.zeros(0, dtype=np.int64), STACK + run.vcpu * PAGE - 8
        reload = np.append(0, np.flatnonzero((run.op == CR0) | (run.op == CR3)) + 1)
        paged = self.guest.vcpus[run.vcpu].format is not None
        lower = np.flatnonzero(run.user)
        habits = (
            (reload if paged else none, FETCH, CODE),  # it fetches its code before these accesses
            # A call pushes its return address; so does what leads to CPL 3, by IRET, to a stub there.
            (np.flatnonzero(run.user | (run.op == FETCH)), WRITE, top),
            (lower, READ, DESCRIPTORS + 24),
            (lower, FETCH, self.stub),
        )
        at = np.concatenate([where for where, _, _ in habits])
        op, gva = (
            np.repeat(np.array(values, dtype=kind), [where.size for where, _, _ in habits])
            for kind, values in ((np.uint8, [op for _, op, _ in habits]), (np.uint64, [gva for _, _, gva in habits]))
        )
        own = np.insert(np.arange(len(run), dtype=np.int64), at, -1)
        return own, stream(
            np.insert(run.op, at, op), np.insert(run.gva, at, gva), np.insert(run.value, at, 0),
            np.insert(run.user, at, gva == self.stub),
        )  # fmt: skip

    def _shadow_paged(self, vcpu: int) -> bool:
        return not self.out.kernel.nested_paging and self.guest.vcpus[vcpu].format is not None

    def _values(self, run: Run, value: NDArray[np.uint64], fault: NDArray[np.bool], code: NDArray[np.uint64]) -> None:
        """What the guest saw: results of reads, and its #PFs."""

        def say(kind: str, access: int, predicted: Any, recorded: Any) -> None:
            where = f"run {self.runs} ({run.phase}), access {access} at {int(run.gva[access]):#x}"
            self.out.values.append(Item(kind, predicted, recorded, where))

        for access in np.flatnonzero(run.faulted | fault).tolist():
            say("pf_error", access, hex(code[access]) if fault[access] else None,
                hex(run.error[access]) if run.faulted[access] else None)  # fmt: skip
            if run.faulted[access]:
                say("pf_cr2", access, hex(run.gva[access]) if fault[access] else None, hex(run.cr2[access]))
        for access in np.flatnonzero((run.op == scenario.READ) & ~run.faulted).tolist():
            say("value", access, None if fault[access] else hex(value[access]), hex(run.result[access]))

    # Looking at the log ----------------------------------------------------------------------------------------------

    def dirty_get(self, event: DirtyGet, _: int) -> None:
        """KVM_GET_DIRTY_LOG."""
        slot = self.guest.memory.slot(event.slot)
        bitmap = self.guest.get_dirty_log(slot) if slot and slot.logged else np.zeros(0, dtype=np.bool)
        recorded = event.bitmap[: slot.pages] if slot else event.bitmap
        self.out.bitmaps.append(
            Item("bitmap", _hex(bitmap), _hex(recorded), f"slot {event.slot}, dirty log {event.seq}")
        )

    def dirty_clear(self, event: DirtyClear, _: int) -> None:
        """KVM_CLEAR_DIRTY_LOG."""
        slot = self.guest.memory.slot(event.slot)
        if slot and slot.logged:
            self.guest.clear_dirty_log(slot, event.first_page, event.bitmap)

    def dirty_ring(self, event: DirtyRing, _: int) -> None:
        """A harvest. One at a full ring is recorded before the run within which it happens: the vm makes it itself."""
        if event.why == "ring_full_exit":
            self.full.append(event)
        else:
            self._ring(event, self.guest.harvest(event.vcpu))

    def _ring(self, event: DirtyRing, taken: NDArray[np.int64] | None) -> None:
        predicted = None if taken is None else self._places(taken)
        self.out.rings.append(Item("ring", predicted, event.entries.tolist(), f"vCPU {event.vcpu}, {event.why}"))

    def _places(self, index: NDArray[np.int64]) -> list[list[int]]:
        slots = self.guest.memory.slots
        return [
            next([slot.number, at - slot.first] for slot in slots if slot.first <= at < slot.first + slot.pages)
            for at in index.tolist()
        ]

    # The host --------------------------------------------------------------------------------------------------------

    def phase(self, _: Phase, place: int) -> None:
        """A new phase: by then the client has reaped its child, if no event says so; here it may fill pages."""
        if self.child:
            self._reap()
        self.fill(place)

    def _reap(self) -> None:
        self.child = False
        for backing in self.backings.values():
            backing.child_exits()

    def host(self, event: Host, place: int) -> None:
        """An action on the host mapping, known by its words; KVM hears of it through the mmu notifier."""
        first, count = event.gpa // PAGE, event.length // PAGE
        parts = [
            (slot.backing, max(first, slot.base) - slot.base + slot.offset,
             min(first + count, slot.base + slot.pages) - max(first, slot.base))
            for slot in self.guest.memory.slots
            if first < slot.base + slot.pages and slot.base < first + count
        ]  # fmt: skip
        what = event.what
        if what.startswith("child exits"):
            self._reap()
        elif what.startswith("fork"):
            later = [event.what for event in self.scene.events[place + 1 :] if isinstance(event, Host)]
            self.child = not next((w for w in later if w.startswith(("fork", "child"))), "").startswith("child")
            for backing in self.backings.values():
                self.guest.unmapped(backing, backing.fork())
        elif "clear_refs" in what:
            for backing in self.backings.values():
                self.guest.unmapped(backing, backing.clear_refs())
        elif "MADV_DONTNEED" in what:
            for backing, *where in parts:
                self.guest.unmapped(backing, backing.discard(*where))
        elif what.startswith("mprotect"):
            meaning, both = {"PROT_NONE": 0, "PROT_READ": int(host.READ)}, int(host.READ | host.WRITE)
            for step in re.findall(r"PROT_NONE|PROT_READ\|PROT_WRITE|PROT_READ|RW", what):
                for backing, *where in parts:
                    self.guest.unmapped(backing, backing.protect(*where, meaning.get(step, both)))
        elif "MADV_MERGEABLE" in what:
            for backing, *where in parts:
                self.guest.unmapped(backing, backing.merge(*where))
        elif "ksm stop" not in what:
            self.out.unexplained.append(f"host action {what!r}")


class Fills:
    """What the client wrote into guest memory from the host without an event of its own.

    Attributes:
        at: for a place among the events, the fills that happened there: (first gfn, pages, byte).
        calls: guest-physical addresses that the guest was to call: the client wrote a return instruction there.
    """

    def __init__(self, scene: Scenario) -> None:
        self.at: dict[int, list[tuple[int, int, int]]] = {}
        pages: dict[int, int] = {}
        for gmap in scene.of(Gmap):
            pages.update({gmap.gva // PAGE + k: gmap.gpa // PAGE + k for k in range(gmap.pages)})
        runs = [(place, event) for place, event in enumerate(scene.events) if isinstance(event, Run)]
        columns: list[list[NDArray[Any]]] = [[], [], [], []]
        self.calls: list[int] = []
        for place, run in runs:
            gva = run.gva.tolist()
            gpa = np.array([pages.get(a // PAGE, a // PAGE) * PAGE + a % PAGE for a in gva], dtype=np.int64)
            memory_op = (run.op < scenario.INVLPG) & ~run.faulted
            for column, values in zip(
                columns,
                (gpa, run.op, run.result.astype(np.uint64), np.full(len(run), place, dtype=np.int64)),
                strict=True,
            ):
                column.append(values[memory_op])
            self.calls += gpa[(run.op == scenario.CALL) & ~run.user].tolist()
        if not runs:
            return
        self._gpa, self._op, self._result, self._place = (np.concatenate(column) for column in columns)
        self._find(scene)

    def called(self, base: int, pages: int) -> bool:
        """The guest calls into these gfns: the client has touched all their pages beforehand (inferred)."""
        return any(base <= gpa // PAGE < base + pages for gpa in self.calls)

    def _find(self, scene: Scenario) -> None:
        phase, known, readonly = 0, set(), []
        fills: list[tuple[int, int, int]] = []  # (place, first gfn, pages)
        for place, event in enumerate(scene.events):
            if isinstance(event, Memslot):
                if event.size and event.hva not in known and prefaulted(scene, event):
                    fills.append((place, event.gpa // PAGE, event.size // PAGE))
                known.add(event.hva)
                readonly = [m for m in readonly if m.slot != event.slot]
                readonly += [event] if event.flags & scenario.READONLY and event.size else []
            elif isinstance(event, Phase):
                phase = place
                if "host_writes" in event.name:  # the client rewrites what the guest may only read
                    fills += [(place, slot.gpa // PAGE, slot.size // PAGE) for slot in readonly]
            elif isinstance(event, Host) and "MADV_MERGEABLE" in event.what:
                # KSM merges equal pages: the client made them equal when the phase began.
                fills.append((phase, event.gpa // PAGE, event.length // PAGE))
        for number, (place, first, count) in enumerate(fills):
            here = self._after(place, first, count)
            for later in fills[number + 1 :]:
                here &= ~self._after(*later)
            self._note(place, first, count, here)

    def _after(self, place: int, first: int, count: int) -> NDArray[np.bool]:
        """The accesses to gfns from a place on."""
        page = self._gpa // PAGE
        return (self._place > place) & (page >= first) & (page < first + count)

    def _note(self, place: int, first: int, count: int, here: NDArray[np.bool]) -> None:
        """A fill of gfns at a place; its byte is what the first read there finds, if no store came before."""
        word, op, result = self._gpa[here] // 8, self._op[here], self._result[here]
        if not word.size:
            return
        _, earliest = np.unique(word, return_index=True)
        earliest = np.sort(earliest[op[earliest] == scenario.READ])
        if earliest.size:
            byte = int(result[earliest[0]]) >> 8 & 0xFF  # the lowest may be a return instruction
            self.at.setdefault(place, []).append((first, count, byte))


def prefaulted(scene: Scenario, event: Memslot) -> bool:
    """Whether the client wrote to all of a slot's memory before it made the slot.

    What a later event says of huge pages held from the start: the first of the older recordings' texts is wrong there.
    """
    same = [other for other in scene.of(Memslot) if other.hva == event.hva and "MADV_HUGEPAGE" in other.backing]
    return any("prefaulted" in m.backing and "not prefaulted" not in m.backing for m in (event, *same))


def _drop_p(code: NDArray[np.uint64]) -> None:
    """Clear P in error codes that have RSVD, in place."""
    code[code & pfec.RSVD != 0] &= ~pfec.P


def _hex(bitmap: NDArray[np.bool]) -> str:
    return np.packbits(bitmap, bitorder="little").tobytes().hex()
