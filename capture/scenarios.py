"""What the recording client is told to do: one script for each scenario, guest mode and seed.

A script is text, one action a line; ``client.c`` carries it out. Scenarios are lettered as the recordings are:
A demand paging, B dirty log, C random accesses with a dirty log, D MMIO, E guest page tables, F read-only slot, G two
vCPUs and a logging thread, G2 two vCPUs in rounds, H what the host does to its mapping, I huge pages, K dirty ring, L
forty rounds, M and N large pages of the guest's, P1 and P3 manual protection; ``random1``, ``random2``, ... are
drawn. ``-flat32``, ``-pae32``, ``-leg32`` or ``-pse32`` behind a name is the guest's mode.

>>> text = script("B", "npt1_tdp1", "qemu")
>>> text.split(chr(10))[:2]
['scenario B npt1_tdp1 long64 qemu', 'slot 0 0 200000 0 anon prefaulted NOHUGEPAGE']
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

PAGE = 0x1000
LOG, READONLY = 1, 2
RAM, WINDOW, ALIAS, TABLES, ROM, DEVICE = 0x1000000, 0x40000000, 0x41000000, 0x4000000, 0x2000000, 0x80000000
"""Guest-physical places of slots 1, 2 and 3 and of the device; guest-virtual places where slots are mapped again."""

SMALL, READY, LARGE = "anon NOHUGEPAGE not prefaulted", "anon prefaulted NOHUGEPAGE", "anon MADV_HUGEPAGE prefaulted"
MODES = {"long64": (4, 9, 8), "pae32": (3, 9, 8), "leg32": (2, 10, 4), "pse32": (2, 10, 4),
         "flat32": (0, 0, 0)}  # fmt: skip
"""Levels of the guest's tables, address bits of each, bytes of an entry."""
LARGE_MODES = ("long64", "pae32", "pse32")

CAP_MANUAL, CAP_RING = 168, 192
NX, RESERVED, LARGE_LEAF = 1 << 63, 1 << 51, 1 << 7
WP_OFF, WP_ON = 0x80000033, 0x80010033
Access = tuple[str, int, int]


class Script:
    """Collects a script's lines, and knows where the client puts guest page tables."""

    def __init__(self, name: str, mode: str, head: str) -> None:
        self.mode = mode
        self.levels, self.bits, self.entry = MODES[mode]
        self.lines = [head]
        self.tables: dict[tuple[int, int, int], int] = {}
        self.free: dict[int, int] = {}
        self.slot(0, 0, 0x200, 0, READY)

    def say(self, action: str, *numbers: int, text: str = "") -> None:
        """One line: an action, hexadecimal numbers, free text."""
        self.lines.append(" ".join([action, *(f"{number:x}" for number in numbers), *([text] if text else [])]))

    def slot(self, number: int, gpa: int, pages: int, flags: int, backing: str) -> None:
        """Create, change or (no pages) delete a slot."""
        self.say("slot", number, gpa, pages * PAGE, flags, text=backing)

    def map(self, root: int, gva: int, gpa: int, pages: int, flags: int, note: str = "") -> None:
        """Write leaf entries of the guest's page tables."""
        self.say("map", root, gva, gpa, pages, flags, text=note)
        for page in range(gva >> 12, (gva >> 12) + pages) if self.levels else ():
            self.leaf(root, page << 12)

    def large(self, root: int, gva: int, gpa: int, pages: int, flags: int) -> None:
        """The same by leaves of level 2: 2 MiB each, or 4 MiB; ``pages`` are of 4K all the same."""
        self.say("large", root, gva, gpa, pages, flags | LARGE_LEAF)
        for page in range(0, pages, 1 << self.bits):
            self.leaf(root, gva + page * PAGE, 2)

    def maps(self, root: int, *ranges: tuple[int, int, int, int]) -> None:
        """The client's own pages in slot 0, then ranges (gva, gpa, pages, flags)."""
        self.map(root, 0x1000, 0x1000, 15, 0x63)
        self.map(root, 0x10000, 0x10000, 496, 0x63)
        self.map(root, 0xA000, 0xA000, 1, 0x65, "user stub")
        for gva, gpa, pages, flags in ranges:
            self.map(root, gva, gpa, pages, flags)

    def leaf(self, root: int, gva: int, leaf: int = 1) -> int:
        """Where the entry of ``gva`` at a level lies: the client takes table pages in ascending order."""
        if root not in self.free:
            self.free[root] = root + PAGE * (5 if self.levels == 3 else 1)
        table = root
        for level in range(self.levels - 1, leaf - 1, -1):
            at = gva >> 12 + self.bits * level
            if self.levels == 3 and level == 2:
                table = root + PAGE * (1 + at)
                continue
            if (root, level, at) not in self.tables:
                self.tables[root, level, at] = self.free[root]
                self.free[root] += PAGE
            table = self.tables[root, level, at]
        return table + (gva >> 12 + self.bits * (leaf - 1) & (1 << self.bits) - 1) * self.entry

    def set_entry(self, root: int, gva: int, entry: int, level: int = 1) -> list[Access]:
        """The guest's own stores that change an entry; a 32-bit guest of PAE stores the high half first."""
        return self.store(self.leaf(root, gva, level), entry)

    def store(self, at: int, entry: int) -> list[Access]:
        """The same for an entry that lies at ``at``."""
        if self.mode != "pae32" or entry >> 32 == 0:
            return [("W", at, entry)]
        return [("W", at + 4, entry >> 32), ("W", at, entry & 0xFFFFFFFF)]

    def phase(self, name: str) -> None:
        """A marker."""
        self.say("phase", text=name)

    def queue(self, name: str, accesses: Iterable[Access], vcpu: int = 0) -> None:
        """Let a run wait for the next go."""
        self.say("run", vcpu, text=name)
        self.lines += [f"{op} {gva:x} {value:x}" for op, gva, value in accesses]

    def run(self, name: str, accesses: Iterable[Access], *slots: int, vcpu: int = 0) -> None:
        """A run, and then the dirty logs of ``slots``."""
        self.queue(name, accesses, vcpu)
        self.say("go")
        self.get(*slots)

    def step(self, name: str, accesses: Iterable[Access], *slots: int, phase: str = "") -> None:
        """A phase with one run, and then the dirty logs of ``slots``."""
        self.phase(phase or name)
        self.run(name, accesses, *slots)

    def get(self, *slots: int) -> None:
        """Fetch dirty logs."""
        for slot in slots:
            self.say("get", slot)

    def clear(self, slot: int, first: int, bits: Iterable[int] | np.ndarray, pages: int) -> None:
        """KVM_CLEAR_DIRTY_LOG of the pages ``bits``, counted from ``first``."""
        bitmap = np.zeros(pages, dtype=np.uint8)
        bitmap[list(bits)] = 1
        self.say("clear", slot, first, pages, text=np.packbits(bitmap, bitorder="little").tobytes().hex())

    def host(self, action: str, page: int = 0, pages: int = 0) -> None:
        """Something that the host does to pages of slot 1, or (no pages) to itself."""
        self.lines.append(f"host {action} {RAM + page * PAGE if pages else 0:x} {pages * PAGE:x}")


def each(op: str, pages: Iterable[int], offset: int = 0, value: Callable[[int], int] = lambda page: 0) -> list[Access]:
    """One access a page of slot 1."""
    return [(op, RAM + page * PAGE + offset, value(page)) for page in pages]


def over(pages: Iterable[int], accesses: Callable[[int], list[Access]]) -> list[Access]:
    """The same accesses for page after page."""
    return [access for page in pages for access in accesses(page)]


def own(page: int) -> int:
    """A page's number as the value to store."""
    return page


def plain(s: Script, pages: int, *more: tuple[int, int, int, int], backing: str = SMALL, vcpus: int = 1) -> None:
    """Slot 1, identity-mapped by tables in slot 0, and the vCPUs."""
    s.slot(1, RAM, pages, 0, backing)
    finish(s, (RAM, RAM, pages, 0x67), *more, vcpus=vcpus)


def finish(s: Script, *ranges: tuple[int, int, int, int], vcpus: int = 1) -> None:
    """Tables in slot 0 and the vCPUs."""
    s.maps(0x10000, *ranges)
    for vcpu in range(vcpus):
        s.say("vcpu", vcpu, 0x10000)


def demand_paging(s: Script) -> None:
    """A: demand paging."""
    plain(s, 256)
    for phase, accesses in {
        "A1_write_fresh": [
            (op, at + page * 8, 0x1000 + page) for page, (op, at, _) in enumerate(each("W", range(192)))
        ],
        "A2_read_written": [(op, at + page * 8, 0) for page, (op, at, _) in enumerate(each("R", range(192)))],
        "A3_read_fresh": each("R", range(192, 256)),
        "A4_write_after_read": each("W", range(192, 256), value=lambda page: 0x2000 + page),
        "A5_rewrite_all": each("RMW", range(256)),
    }.items():
        s.step(phase, accesses)


def dirty_log(s: Script) -> None:
    """B: dirty log, several rounds."""
    every = range(256)
    plain(s, 256)
    s.step("B0_populate", each("W", every, 0, own))
    s.phase("B1_enable_log")
    s.slot(1, RAM, 256, LOG, SMALL)
    s.get(1)
    for phase, accesses in {
        "B2_round1_all": each("W", every, 0x8, own),
        "B3_round2_third": each("W", every[::3], 0x10, own),
        "B4_round3_read_all_write_fifth_twice": [
            access
            for page in every
            for access in each("R", [page])
            + (each("RMW", [page], 0x18) + each("W", [page], 0x20, own) if page % 5 == 0 else [])
        ],
        "B5_no_access": [],
        "B6_round4_all_rmw": each("RMW", every[::-1], 0x28),
    }.items():
        s.phase(phase)
        if accesses:
            s.run(phase, accesses)
        s.get(1)
    s.phase("B7_disable_log")
    s.slot(1, RAM, 256, 0, SMALL)
    s.step("B8_write_after_disable", each("W", every, 0x30, own))


def congruential(seed: int) -> Iterable[int]:
    """A linear congruential generator's upper 31 bits."""
    while True:
        seed = (seed * 6364136223846793005 + 1442695040888963407) % (1 << 64)
        yield seed >> 33


def drawn(numbers: Iterable[int], count: int, op: Callable[[int], str]) -> list[Access]:
    """Accesses whose page, offset, value and kind all come from one number each."""
    return [(op(r), RAM + r % 128 * PAGE + (r >> 16) % 512 * 8, r) for _, r in zip(range(count), numbers, strict=False)]


def random_accesses(s: Script) -> None:
    """C: drawn accesses, a dirty log from the third round on."""
    plain(s, 128)
    s.say(
        "json",
        text='{"t":"seed","lcg":"0x20240601","note":"lcg=lcg*6364136223846793005+1442695040888963407; rnd=lcg>>33"}',
    )
    numbers = congruential(0x20240601)
    for turn in range(6):
        s.phase(f"C_round{turn}")
        if turn == 2:
            s.slot(1, RAM, 128, LOG, SMALL)
        accesses = drawn(numbers, 300, lambda r: ("R", "W", "RMW")[(r >> 10) % 10 // 5 + ((r >> 10) % 10 >= 8)])
        s.run(f"C_round{turn}", accesses, *([1] if turn >= 2 else []))


def mmio(s: Script) -> None:
    """D: MMIO, a slot laid over it and taken away."""

    def device(pages: Iterable[int], *accesses: tuple[str, int, int, int]) -> list[Access]:
        """Per page: (op, offset, value, factor of the page number in it)."""
        return [
            (op, DEVICE + page * PAGE + offset, value + factor * page)
            for page in pages
            for op, offset, value, factor in accesses
        ]

    plain(s, 64, (DEVICE, DEVICE, 16, 0x63))
    low, high = range(8), range(8, 12)
    s.step("D1_first_touch_rw", device(low, ("R", 0x10, 0, 0), ("W", 0x20, 0xABC0, 1)))
    s.step("D2_second_touch_cached", device(low, ("R", 0x30, 0, 0), ("W", 0x40, 0xDEF0, 1)) * 3)
    s.step("D3_write_first", device(high, ("W", 0, 0, 1), ("R", 0, 0, 1)))
    s.phase("D4_memslot_generation_bump")
    s.slot(5, 0x5000000, 16, 0, "anon, unrelated (bumps memslot generation)")
    s.run("D4_after_gen_bump", device(low, ("R", 0x50, 0, 0), ("R", 0x58, 0, 0)))
    s.phase("D5_memslot_added_over_mmio")
    s.slot(6, DEVICE, 8, 0, "anon prefaulted at former MMIO gpa")
    s.say("fill", DEVICE, 8 * PAGE, 0x77)
    s.run("D5_after_slot_added", device([*low, *high], ("R", 0x60, 0, 0), ("W", 0x68, 0, 1)))
    s.phase("D6_memslot_removed")
    s.slot(6, DEVICE, 0, 0, "anon prefaulted at former MMIO gpa")
    s.run("D6_after_slot_removed", device([*low, *high], ("R", 0x70, 0, 0), ("R", 0x78, 0, 1)))


def page_tables(s: Script) -> None:
    """E: the guest edits tables that lie in a slot of their own; the window maps slot 1 a second time."""
    roots = (TABLES, TABLES + (8 if s.mode == "long64" else 16) * PAGE)
    s.slot(1, RAM, 64, 0, SMALL)
    s.slot(2, TABLES, 256, 0, "anon prefaulted, guest page tables")
    window, tables = (WINDOW, RAM, 64, 0x7), (TABLES, TABLES, 64, 0x63)
    s.maps(roots[0], (RAM, RAM, 64, 0x67), window, tables)
    s.maps(roots[1], window, tables)
    s.say("json", text=f'{{"t":"note","root1":"{roots[0]:#x}","root2":"{roots[1]:#x}"}}')
    for page in range(64):
        s.say("code", RAM + page * PAGE)
    s.say("vcpu", 0, roots[0])
    logs: list[int] = []

    def at(op: str, page: int, offset: int = 0, value: int = 0) -> Access:
        return op, WINDOW + page * PAGE + offset, value

    def entry(page: int, gpa_page: int, flags: int) -> list[Access]:
        return s.set_entry(roots[0], WINDOW + page * PAGE, RAM + gpa_page * PAGE | flags if flags else 0)

    def edited(page: int, flags: int) -> list[Access]:
        return [*entry(page, page, flags), at("INVLPG", page)]

    def run(name: str, accesses: Iterable[Access], phase: str = "") -> None:
        s.step(name, accesses, *logs, phase=phase)

    run("E1_read_clean_AD0", [at("R", p) for p in range(32)])
    run("E2_write_clean_to_dirty", [at("W", p, 0, 0x100 + p) for p in range(32)])
    run("E3_write_fresh_AD0", [at("W", p, 0, 0x100 + p) for p in range(32, 48)])
    run("E4_read_guest_ptes", [("R", s.leaf(roots[0], WINDOW) + p * s.entry, 0) for p in range(56)])
    run(
        "E5_guest_pte_write_remap",
        over(range(16), lambda p: [*entry(p, (p + 1) % 16, 0x7), at("INVLPG", p), at("R", p), at("W", p, 8, p)]),
    )
    run("E6_wrprotect_then_pf_inject", over(range(8), lambda p: [*edited(p, 0x65), at("R", p), at("W", p, 0, 1)]))

    def gone(p: int) -> list[Access]:
        return [*edited(p, 0), at("R", p), at("W", p, 0, 1), *entry(p, p, 0x7), at("R", p), at("W", p, 0, 2)]

    run("E7_not_present_pf", over(range(8, 12), gone))
    s.phase("E8_dirty_log_on")
    s.slot(1, RAM, 64, LOG, SMALL)
    s.slot(2, TABLES, 256, LOG, "anon prefaulted, guest page tables")
    logs += [1, 2]
    s.get(*logs)
    for _ in range(2):
        s.run("E8_rmw", [at("RMW", p, 8) for p in range(16, 48)], *logs)
    cleared = over(range(16, 24), lambda p: [*edited(p, 0x27), at("R", p), at("W", p, 0, 3)])
    run("E9_clear_D", cleared, "E9_clear_D_in_pte_with_log")

    def user(p: int, value: int) -> list[Access]:
        return [at("uR", p), at("uW", p, 0, value), at("uX", p, 0xFE0)]

    run(
        "E10_user_access",
        over(range(24, 28), lambda p: user(p, 0x55))
        + over(range(28, 32), lambda p: [*edited(p, 0x3), *user(p, 1), at("R", p), at("W", p, 0, 1)]),
    )
    fetch = ("X", 0xFF0), ("uX", 0xFE0)
    no_fetch = 0x3 | (NX if s.entry == 8 else 0)
    run(
        "E11_nx_fetch",
        over(
            range(32, 36),
            lambda p: [at("X", p, 0xFF0), *edited(p, no_fetch), at("R", p), *(at(op, p, where) for op, where in fetch)],
        ),
    )
    if s.entry == 8:
        reserved = over(range(36, 38), lambda p: [*edited(p, 0x7 | RESERVED), at("R", p), at("W", p), at("uR", p)])
        run("E12_rsvd_bit", reserved)
    run(
        "E13_cr0_wp0",
        [("CR0", WP_OFF, 0), *over(range(8), lambda p: [at("W", p, 0x10, 7), at("R", p, 0x10)]), ("CR0", WP_ON, 0)]
        + [at("W", p, 0x18, 8) for p in range(8)],
        "E13_cr0_wp0_write_ro",
    )
    there = [("CR3", roots[1], 0), *over(range(40, 48), lambda p: [at("R", p), at("W", p, 0x20, 9)])]
    back = [("CR3", roots[0], 0), *(at("RMW", p, 0x28) for p in range(40, 48))]
    run("E14_cr3_switch", (there + back) * 3)
    run(
        "E15_sync",
        over(
            range(3),
            lambda turn: [
                *over(range(48, 56), lambda p: entry(p, p + turn, 0x7)),
                ("CR3", roots[0], 0),
                *(at("W", p, 0x30, turn) for p in range(48, 56)),
            ],
        ),
        "E15_pt_write_sync_via_cr3",
    )


def read_only(s: Script) -> None:
    """F: stores to a read-only slot leave KVM as MMIO."""

    def at(op: str, page: int, offset: int = 0, value: int = 0) -> Access:
        return op, ROM + page * PAGE + offset, value

    backing = "anon prefaulted READONLY memslot"
    s.slot(1, RAM, 64, 0, SMALL)
    s.maps(0x10000, (RAM, RAM, 64, 0x67), (ROM, ROM, 32, 0x67))
    s.slot(3, ROM, 32, READONLY, backing)
    s.say("fill", ROM, 32 * PAGE, 0x33)
    s.say("vcpu", 0, 0x10000)
    s.step("F1_read_ro", [at("R", p) for p in range(16)])
    s.step("F2_write_ro_after_read", [at("W", p, 8, 0xF0 + p) for p in range(16)])
    s.step("F3_write_ro_first", [at("W", p, 8, 0xF0 + p) for p in range(16, 24)])
    s.step("F4_rw_again", over(range(24), lambda p: [at("R", p, 8), at("W", p, 0x10, p)]))
    s.phase("F5_host_writes_ro_backing")
    s.say("fill", ROM, 32 * PAGE, 0x44)
    s.run("F5", [at("R", p) for p in range(8)])
    s.phase("F6_slot_made_writable")
    s.slot(3, ROM, 0, READONLY, backing)
    s.slot(3, ROM, 32, 0, "anon prefaulted, now writable")
    s.run("F6", over(range(32), lambda p: [at("W", p, 0x18, p), at("R", p, 0x18)]))


def two_vcpus(s: Script) -> None:
    """G: both run freely while the log is fetched again and again."""
    pages = range(48)
    plain(s, 64, vcpus=2)
    s.step("G0_populate", each("W", range(64)))
    s.run("G0_v1", each("R", [0]), vcpu=1)
    s.phase("G1_enable_log")
    s.slot(1, RAM, 64, LOG, SMALL)
    s.phase("G2_race")
    for turn in range(6):
        s.queue(f"G_iter{turn}", each("RMW", pages) * 10, 0)
        s.queue(f"G_iter{turn}", each("RMW", pages[:: -1 if turn % 2 else 1], 0x40) * 10, 1)
    s.say("go log", 1)
    s.phase("G3_final")
    s.get(1)
    s.say("counters", RAM, 48, 60)


def two_in_step(s: Script) -> None:
    """G2: both vCPUs in rounds."""
    plain(s, 64, vcpus=2)
    s.step("G0_populate", each("W", range(64)))
    s.run("G0_v1", each("R", [0]), vcpu=1)
    s.slot(1, RAM, 64, LOG, SMALL)
    s.get(1)
    for turn in range(8):
        for vcpu in range(2):
            s.queue(f"G2_iter{turn}", each("RMW", range(48), 0x40 * vcpu), vcpu)
        s.say("go")
        s.get(1)
    s.say("counters", RAM, 48, 8)


def host_side(s: Script) -> None:
    """H: what the host does to the mapping behind a slot."""
    every, third, even = range(64), range(32, 48), range(0, 64, 2)
    plain(s, 64)
    s.step("H0_populate", each("W", every, 0, own))
    s.phase("H1_dontneed")
    s.host("dontneed", 0, 16)
    s.run("H1_after_dontneed", over(range(24), lambda p: each("R", [p]) + each("W", [p], 8, own)))
    s.phase("H2_fork_cow")
    s.host("fork", 0, 64)
    s.run("H2_cow_writes", each("R", even) + each("W", every, 0x10, own))
    s.host("reap")
    s.run("H2_after_child_exit", each("RMW", every, 0x10))
    s.phase("H3_mprotect_ro")
    s.host("readonly", 32, 16)
    s.run("H3_read_under_mprotect_ro", each("R", third))
    s.host("writable", 32, 16)
    s.run("H3_write_after_mprotect_rw", each("W", third, 0x18, own))
    s.phase("H4_log_plus_dontneed")
    s.slot(1, RAM, 64, LOG, SMALL)
    s.get(1)
    s.run("H4_write_logged", each("RMW", every), 1)
    s.host("dontneed", 8, 8)
    s.run("H4_write_after_zap_logged", each("RMW", every), 1)
    s.host("fork", 0, 64)
    s.run("H4_cow_logged", each("RMW", even), 1)
    s.host("reap")
    s.phase("H5_mprotect_none_then_rw")
    s.host("blink", 0, 8)
    s.run("H5", over(range(16), lambda p: each("R", [p]) + each("W", [p], 0, own)), 1)
    s.phase("H6_clear_refs_soft_dirty")
    s.host("clear_refs", 0, 64)
    s.run("H6_after_clear_refs", over(even, lambda p: each("R", [p], 8) + each("W", [p], 0, own)), 1)
    s.slot(1, RAM, 64, 0, SMALL)
    s.phase("H7_ksm")
    s.say("fill", RAM + 32 * PAGE, 16 * PAGE, 0xAA)
    s.run("H7_read_before_ksm", each("R", third))
    s.host("ksm", 32, 16)
    s.host("ksm_stop")
    s.run("H7_after_ksm", over(third, lambda p: each("R", [p]) + each("W", [p], 0, own) + each("R", [p])))


def huge_pages(s: Script) -> None:
    """I: huge pages, split by a dirty log and rebuilt."""
    plain(s, 1024, backing=LARGE)
    s.say("fill", RAM, 1024 * PAGE, 0x01)
    for page in range(0, 1024, 128):
        s.say("code", RAM + page * PAGE)
    steps = range(0, 1024, 64)
    s.step("I0_populate_huge", each("W", steps, 0, own))
    s.phase("I0b_fetch_huge")

    def call(p):
        return each("X", [p], 0xFF0) + each("R", [p], 0xFF0)

    s.run("I0b_fetch_huge", over(range(0, 1024, 256), lambda p: call(p) + each("W", [p], 0xFE0, lambda _: 1)))
    s.phase("I1_enable_log")
    s.slot(1, RAM, 1024, LOG, LARGE)
    s.step("I2_write_some", each("W", range(0, 1024, 16), 8, own), 1)
    s.phase("I3_write_some_again")
    again = over(range(0, 1024, 32), lambda p: each("R", [p + 1]) + each("W", [p], 0x10, own))
    s.run("I3", again, 1)
    s.step("I3b_fetch", over(range(0, 1024, 128), call), 1)
    s.phase("I4_disable_log")
    s.slot(1, RAM, 1024, 0, LARGE)
    s.run("I4_after_disable", each("RMW", steps))


def large_pages(s: Script, backing: str = SMALL) -> None:
    """M: the guest maps slot 1, and its own tables once more, by large pages, and edits the entries that do so."""
    size = 1 << s.bits
    s.slot(1, RAM, 2 * size, 0, backing)
    s.slot(2, TABLES, 256, 0, "anon prefaulted, guest page tables")
    s.maps(TABLES, (RAM, RAM, 64, 0x67), (TABLES, TABLES, 64, 0x63))
    s.large(TABLES, WINDOW, RAM, 2 * size, 0x7)
    s.large(TABLES, ALIAS, TABLES, size, 0x7)
    for page in range(2 * size):
        s.say("code", RAM + page * PAGE)
    s.say("vcpu", 0, TABLES)
    table = TABLES + 48 * PAGE
    logs: list[int] = []

    def at(op: str, page: int, offset: int = 0, value: int = 0) -> Access:
        return op, WINDOW + page * PAGE + offset, value

    def entry(page: int, gpa: int, flags: int) -> list[Access]:
        return s.set_entry(TABLES, WINDOW + page * PAGE, gpa | flags, 2)

    def edited(page: int, gpa_page: int, flags: int) -> list[Access]:
        return [*entry(page, RAM + gpa_page * PAGE, flags | LARGE_LEAF), *flushed(page)]

    def flushed(page: int) -> list[Access]:
        """INVLPG is for a whole large page; under nested paging the emulated CPU drops only 4K of it, so CR3 too."""
        return [at("INVLPG", page), ("CR3", TABLES, 0)]

    def run(name: str, accesses: Iterable[Access]) -> None:
        s.step(name, accesses, *logs)

    some = (0, 1, 2, 9, 40, 300, size - 1)
    run("M1_read_clean", [at("R", p) for p in (*some, size, size + 5)])
    run("M2_write_sets_D", [at("W", p, 0, 0x100 + p) for p in (*some, 3, 11, size + 5)])
    run("M3_read_entries", [("R", s.leaf(TABLES, WINDOW, 2) + n * s.entry, 0) for n in range(2)])
    run("M4_small_pages_too", over(range(8), lambda p: each("R", [p]) + each("W", [p], 8, own) + [at("RMW", p, 16)]))
    run("M5_clear_D", [*edited(0, 0, 0x27), *(at("R", p) for p in some), *(at("W", p, 0, 5) for p in some)])
    run("M6_remap", [*edited(0, size, 0x7), *over((0, 5, 7), lambda p: [at("R", p), at("W", p, 8, 6)])])
    split = [access for p in range(16) for access in s.store(table + p * s.entry, RAM + p * PAGE | 0x67)]
    small = [at("R", p) for p in range(4)] + [at("W", p, 0, 7) for p in range(8)]
    run("M7_split", [*split, *entry(0, table, 0x67), *flushed(0), *small, at("R", 16)])
    run("M8_large_again", [*edited(0, 0, 0x67), *(at(op, p) for p in (0, 9, 41) for op in ("R", "W"))])
    user = [at(op, p, o) for p in (40, 41) for op, o in (("uR", 0), ("uW", 8), ("uX", 0xFE0), ("R", 0), ("W", 8))]
    run("M9_user", [*user, *edited(0, 0, 0x63), *user])
    wp = [at("W", p, 8, 9) for p in (0, 9, 60)]
    lent = [("CR0", WP_OFF, 0), *wp, at("uR", 9), ("CR0", WP_ON, 0)]
    run("M10_read_only", [*edited(0, 0, 0x65), *wp, at("R", 9), *lent, *wp, *edited(0, 0, 0x67), *wp])
    fetch = [at(op, p, o) for p in (42, size - 8) for op, o in (("X", 0xFF0), ("R", 0), ("uX", 0xFE0))]
    nx = NX if s.entry == 8 else 0
    run("M11_fetch", [*fetch, *edited(0, 0, 0x67 | nx), *fetch, *edited(0, 0, 0x67), *fetch])
    run("M12_reserved", [*edited(0, 0, 0x67 | 1 << 21 - (s.entry == 8)), at("R", 3), at("uW", 3), *edited(0, 0, 0x7)])
    s.phase("M13_dirty_log_on")
    s.slot(1, RAM, 2 * size, LOG, backing)
    s.slot(2, TABLES, 256, LOG, "anon prefaulted, guest page tables")
    logs += [1, 2]
    s.get(*logs)
    for _ in range(2):
        s.run("M13_logged", [at(op, p, 8) for p in some for op in ("R", "RMW")], *logs)
    run("M14_clear_D_logged", [*edited(0, 0, 0x27), *(at(op, p, 8) for p in some[:4] for op in ("R", "W"))])
    there = [
        (op, ALIAS + s.leaf(TABLES, RAM) - TABLES + p * s.entry, RAM + p * PAGE | 0x67) for p in (20, 30) for op in "RW"
    ]
    run("M15_small_tables_by_large_page", [*there, *each("R", (20, 30)), *there, *each("W", (20, 30), 8)])
    upper = ALIAS + s.leaf(TABLES, WINDOW, 2) - TABLES
    run("M16_upper_table_by_large_page", [("R", upper, 0), ("W", upper, RAM | 0xA7), at("INVLPG", 0), at("R", 0)])
    run("M17_beyond_the_slot", [(op, ALIAS + p * PAGE + 8, 0) for p in (255, 256, 400) for op in "RWR"])
    flood = [access for turn in range(4) for access in entry(size, RAM + size * PAGE, (0xE7, 0x87)[turn % 2])]
    run("M18_flood", [at("R", size), *flood, at("INVLPG", size), at("R", size), at("W", size + 1)])
    s.phase("M19_dirty_log_off")
    s.slot(1, RAM, 2 * size, 0, backing)
    s.host("dontneed", 0, 8)
    s.run("M19_after", [at(op, p, 8) for p in (*some, size + 5) for op in ("R", "W")])


def dirty_ring(s: Script) -> None:
    """K: dirty ring, filled once."""
    every = range(256)

    def harvest(why: str = "round") -> None:
        s.say("ring", 0, text=why)

    s.slot(1, RAM, 256, 0, SMALL)
    s.say("cap", CAP_RING, 4096)
    finish(s, (RAM, RAM, 256, 0x67))
    s.step("K0_populate", each("W", every, 0, own))
    s.phase("K1_enable_log")
    s.slot(1, RAM, 256, LOG, SMALL)
    s.step("K2_write_64", each("W", range(64), 8, own))
    harvest()
    s.step("K3_write_all_ring_full", each("W", every, 0x10, own))
    harvest()
    s.phase("K4_write_every_4th_twice")
    s.run("K4", each("RMW", every[::4], 0x18) * 2)
    harvest()
    harvest("empty")


def steady_state(s: Script) -> None:
    """L: forty rounds alike."""
    plain(s, 128)
    s.say("json", text='{"t":"seed","lcg":"0x77"}')
    numbers = congruential(0x77)
    s.step("L0_populate", each("W", range(128), 0, own))
    s.slot(1, RAM, 128, LOG, SMALL)
    for turn in range(40):
        s.step(f"L_round{turn}", drawn(numbers, 60, lambda r: "RW"[(r >> 8) % 20 >= 10]), 1)


def manual_protect(s: Script, how: int) -> None:
    """P1 and P3: manual protection; 3 is initially all set."""
    every = range(256)
    s.slot(1, RAM, 256, 0, SMALL)
    s.say("cap", CAP_MANUAL, how)
    finish(s, (RAM, RAM, 256, 0x67))
    s.step("P0_populate", each("W", every, 0, own))
    s.phase("P1_enable_log")
    s.slot(1, RAM, 256, LOG, SMALL)
    s.get(1)
    s.step("P2_write_all", each("W", every, 0x8, own), 1)
    s.step("P3_write_without_clear", each("W", every[::2], 0x10, own), 1)
    s.phase("P4_clear_first_half")
    s.clear(1, 0, range(128), 128)
    s.run("P4_write_fourth", each("W", every[::4], 0x18, own), 1)
    s.phase("P5_clear_every_third_of_2nd_half")
    s.clear(1, 128, range(0, 128, 3), 128)
    s.run("P5_write_all", each("W", every, 0x20, own), 1)
    s.phase("P6_clear_all")
    s.clear(1, 0, every, 256)
    s.get(1)
    s.phase("P7_read_all_then_write_64")
    s.run("P7", each("R", every) + each("RMW", range(64)), 1)


class Drawn:
    """random: slots, logging, what the host does, edits of page tables and accesses, all drawn."""

    def __init__(self, s: Script, rng: np.random.Generator) -> None:
        self.s, self.rng = s, rng
        self.pages = int(rng.choice([32, 64, 160, 512, 1024]))
        self.window = min(self.pages, 64)
        self.backing = str(rng.choice([SMALL, SMALL, READY, LARGE]))
        self.manual = int(rng.choice([0, 0, 1, 3]))
        self.ring = not self.manual and rng.random() < 0.2
        self.calls = rng.random() < 0.5
        self.paged = bool(s.levels)
        self.roots = (TABLES, TABLES + 0x20 * PAGE)
        # Drawn apart from the rest, which stays as it is without large pages.
        self.large = s.mode in LARGE_MODES and rng.spawn(1)[0].random() < 0.5
        self.root, self.wp = 0, True
        self.logged: list[int] = []

    def set_up(self) -> None:
        """Slot 1, the guest's tables in slot 2, a device; pages that are to be called are written beforehand."""
        s = self.s
        s.slot(1, RAM, self.pages, 0, self.backing)
        s.slot(2, TABLES, 256, 0, "anon prefaulted, guest page tables")
        if self.manual:
            s.say("cap", CAP_MANUAL, self.manual)
        if self.ring:
            s.say("cap", CAP_RING, 4096)
        ranges = (RAM, RAM, self.pages, 0x67), (WINDOW, RAM, self.window, 0x7), (DEVICE, DEVICE, 4, 0x63)
        for root in self.roots:
            s.maps(root, *ranges, (TABLES, TABLES, 64, 0x63))
            if self.large:
                s.large(root, ALIAS, RAM, -(-self.pages // (1 << s.bits)) << s.bits, 0x7)
        for page in range(self.pages if self.calls else 0):
            s.say("code", RAM + page * PAGE)
        s.say("vcpu", 0, self.roots[0])

    def accesses(self, count: int, ops: tuple[str, ...]) -> list[Access]:
        """Strides over neighbouring pages, in RAM or the window, and an odd access to the device."""
        rng, out = self.rng, []
        while len(out) < count:
            through = self.paged and rng.random() < 0.4
            room, base = (self.window, WINDOW) if through else (self.pages, RAM)
            if through and self.large and rng.random() < 0.6:
                room, base = self.pages, ALIAS
            first, step = int(rng.integers(room)), int(rng.choice([1, 1, 2, 7, -1]))
            op, offset = str(rng.choice(ops)), int(rng.integers(500)) * 8
            user = "u" if self.paged and rng.random() < 0.15 else ""
            offset = (0xFE0 if user else 0xFF0) if op == "X" else offset
            for page in range(first, first + step * int(rng.integers(1, 24)), step):
                if 0 <= page < room:
                    out.append((user + op, base + page * PAGE + offset, len(out)))
            if rng.random() < 0.05:
                out.append((str(rng.choice(["R", "W"])), DEVICE + int(rng.integers(4)) * PAGE + 8, len(out)))
        return out[:count]

    def large_edits(self) -> list[Access]:
        """The guest changes the entry of a large page, and uses what it maps; CR3 is loaded as in scenario M."""
        s, rng = self.s, self.rng
        kinds = [0x7, 0x67, 0x67, 0x27, 0x5, 0x65, 0x3, *([0x67 | NX, 0x7 | RESERVED] if s.entry == 8 else [])]
        flags, at = kinds[rng.integers(len(kinds))] | LARGE_LEAF, int(rng.integers(-(-self.pages >> s.bits)))
        gva, root = ALIAS + (at << s.bits) * PAGE, self.roots[self.root]
        ops = rng.choice(["R", "W", "uR", "uW", "RMW"], 6)
        pages = rng.integers(min(self.pages, 1 << s.bits), size=6)
        return [
            *s.set_entry(root, gva, RAM + gva - ALIAS | flags, 2), ("INVLPG", gva, 0), ("CR3", root, 0),
            *((str(op), gva + int(page) * PAGE + 0x48, 1) for op, page in zip(ops, pages, strict=True)),
        ]  # fmt: skip

    def edits(self) -> list[Access]:
        """The guest changes some leaf entries of the window, and uses what they map."""
        s, rng, out = self.s, self.rng, []
        kinds = [0x7, 0x67, 0x27, 0x5, 0x65, 0x3, 0, *([0x67 | NX, 0x7 | RESERVED] if s.entry == 8 else [])]
        for page in rng.choice(self.window, int(rng.integers(1, 9)), replace=False).tolist():
            flags, gpa, gva = kinds[rng.integers(len(kinds))], RAM + int(rng.integers(self.window)) * PAGE, page * PAGE
            out += s.set_entry(self.roots[self.root], WINDOW + gva, gpa | flags if flags else 0)
            out.append(("INVLPG", WINDOW + gva, 0))
            out += [(str(op), WINDOW + gva + 0x40, page) for op in rng.choice(["R", "W", "uR", "uW", "RMW"], 2)]
        return out

    def log(self) -> None:
        """Switch the dirty log of slot 1 on or off, or that of the tables on."""
        s = self.s
        if 1 not in self.logged:
            self.logged.append(1)
            s.slot(1, RAM, self.pages, LOG, self.backing)
        elif self.rng.random() < 0.3 and not self.manual:
            self.logged.remove(1)
            s.slot(1, RAM, self.pages, 0, self.backing)
        elif 2 not in self.logged and not self.ring:
            self.logged.append(2)
            s.slot(2, TABLES, 256, LOG, "anon prefaulted, guest page tables")

    def round(self, turn: int, ops: tuple[str, ...]) -> None:
        """One change, one run, and a look at the logs."""
        s, rng, before, after = self.s, self.rng, [], None
        what = str(rng.choice(["log", "log", "host", "host", "none", *(["edit", "edit", "cr3", "wp"] * self.paged)]))
        if what == "log":
            self.log()
        elif what == "host":
            first = int(rng.integers(self.pages))
            where = first, int(rng.integers(1, self.pages - first + 1))
            # What is called must stay.
            action = str(
                rng.choice(["fork", "readonly", "blink", "clear_refs", *(["dontneed"] * 2 * (not self.calls))])
            )
            s.host(action, *where)
            after = {"readonly": ("writable", *where), "fork": ("reap",)}.get(action)
            ops = ("R",) if action == "readonly" else ops
        elif what == "edit":
            before = self.large_edits() if self.large and rng.random() < 0.7 else self.edits()
        elif what == "cr3":
            self.root ^= 1
            before = [("CR3", self.roots[self.root], 0)]
        elif what == "wp":
            self.wp = not self.wp
            before = [("CR0", WP_ON if self.wp else WP_OFF, 0)]
        s.run(f"random{turn}", [*before, *self.accesses(int(rng.integers(20, 160)), ops)])
        if after:
            s.host(*after)
        if self.ring and self.logged:
            s.say("ring", 0, text="round")
        elif not self.ring:
            s.get(*self.logged)
        if self.manual and 1 in self.logged and rng.random() < 0.7:
            first = int(rng.integers(self.pages // 64)) * 64 if self.pages % 64 == 0 else 0
            s.clear(1, first, np.flatnonzero(rng.random(self.pages - first) < 0.6), self.pages - first)

    def draw(self) -> None:
        """The whole scenario."""
        self.set_up()
        ops = ("R", "W", "W", "RMW", *(["X"] * self.calls))
        if self.calls:
            self.s.run("random_call", each("X", [0], 0xFF0))
        for turn in range(int(self.rng.integers(5, 12))):
            self.s.phase(f"random{turn}")
            self.round(turn, ops)


SCENARIOS: dict[str, Callable[[Script], None]] = {
    "A": demand_paging, "B": dirty_log, "C": random_accesses, "D": mmio, "E": page_tables, "F": read_only,
    "G": two_vcpus, "G2": two_in_step, "H": host_side, "I": huge_pages, "K": dirty_ring, "L": steady_state,
    "M": large_pages, "N": lambda s: large_pages(s, LARGE),
    "P1": lambda s: manual_protect(s, 1), "P3": lambda s: manual_protect(s, 3),
}  # fmt: skip


def fits(kind: str, mode: str) -> bool:
    """Whether a lettered scenario can be had in a guest mode: tables of its own need paging, large pages PSE."""
    return mode != "flat32" if kind == "E" else mode in LARGE_MODES if kind in ("M", "N") else True


def names(config: str) -> list[str]:
    """All scenarios that a configuration can show: with shadow paging, in every guest mode."""
    modes = MODES if config.startswith("npt0") else ("long64",)
    kinds = {mode: ("M", "N") if mode == "pse32" else SCENARIOS for mode in modes}
    return [kind + f"-{mode}" * (mode != "long64") for mode in modes for kind in kinds[mode] if fits(kind, mode)]


def script(name: str, config: str, host: str, seed: int = 1) -> str:
    """The script of one scenario.

    Args:
        name: such as ``B``, ``H-flat32``, ``random7-pae32``.
        config: the configuration's name, which the recording states.
        host: what it is recorded on, which the recording states too.
        seed: of drawn scenarios; each number draws its own from it.

    Raises:
        ValueError: there is no such scenario or guest mode.
    """
    kind, _, mode = name.partition("-")
    mode = mode or "long64"
    number = kind.removeprefix("random")
    drawn = kind != number and number.isdigit()
    if mode not in MODES or not (drawn or kind in SCENARIOS) or not fits(kind, mode):
        raise ValueError(f"scenario {name!r}; expected {', '.join(SCENARIOS)} or random1, random2, ..., "
                         f"behind it nothing, -flat32 (not E, M, N), -pae32, -leg32 (not M, N), -pse32")  # fmt: skip
    s = Script(name, mode, f"scenario {name} {config} {mode} {host}")
    if drawn:
        s.say("json", text=f'{{"t":"seed","seed":{seed},"number":{number}}}')
        Drawn(s, np.random.default_rng([seed, int(number)])).draw()
    else:
        SCENARIOS[kind](s)
    return "\n".join([*s.lines, ""])
