"""Traces held against the kernel's rules alone: healthy ones are clean, injected faults and known bugs are found."""

import gzip
import json
import random
import re
import zlib
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmu import conform, histories, infer, ledger, trace
from mmu.__main__ import main

DATA = Path(__file__).parent / "data"
RECORDED = sorted((DATA / "kvm-traces").glob("*.trace.gz"))
PUBLIC = DATA / "public-traces"


def rules(text, layout=None):
    """The names of the rules that findings name, and the layout that was inferred, of a trace as text."""
    source = text.encode("latin-1") if isinstance(text, str) else text
    return {found["rule"] for found in conform.conform(source, layout)["findings"]}


@cache
def lines_of(name):
    """A recorded trace's lines."""
    return tuple(gzip.decompress((DATA / "kvm-traces" / f"{name}.trace.gz").read_bytes()).decode("latin-1").split("\n"))


# Healthy traces ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.name)
def test_no_finding_on_a_recorded_trace_of_a_healthy_kernel(path):
    """Every event of a recorded trace is legal in the state that the trace itself has led to."""
    found = conform.conform(path)
    assert found["findings"] == []
    assert found["agree"] == found["of"] == sum(len(events) for events in trace.read(path).values())
    assert not [rule for rule in found["not_applied"] if "breaks" in rule["reason"]]


@pytest.mark.parametrize("name", ["03-osdev-kvm_page_fault", "07-ept-write-fault", "09-misc-single-lines"])
def test_no_finding_on_public_lines_that_show_no_bug(name):
    """Excerpts of other people's healthy machines, some of several machines in one file, have no finding."""
    [path] = PUBLIC.glob(f"{name}*")
    assert conform.conform(path)["findings"] == []


def test_recordings_in_one_file_are_told_apart():
    """Where time starts again another recording begins, which knows nothing of the one before."""
    names = ("npt1_tdp1_H", "npt0_D-flat32", "npt1_tdp1_H", "npt1_tdp1_G2", "npt1_tdp0_G")
    assert rules("\n".join("\n".join(lines_of(name)) for name in names)) == set()


@pytest.mark.parametrize("name", ["npt1_tdp1_D", "npt1_tdp0_G", "npt0_E"])
def test_where_a_piece_ends_does_not_change_findings(name):
    """Pieces of sixteen kilobytes give what the whole gives, for a healthy trace and for one with a line taken out."""
    lines = list(lines_of(name))
    del lines[len(lines) // 2 : len(lines) // 2 + 2]
    for text in ("\n".join(lines_of(name)).encode("latin-1"), "\n".join(lines).encode("latin-1")):
        whole = trace.read(text)
        signs = infer.Counter(infer.signs_of(whole))
        small = conform.judge(trace.chunks(text, 1 << 14), signs, None)
        large = conform.judge([whole], signs, None)
        assert small["findings"] == large["findings"] and small["agree"] == large["agree"]
    assert small["findings"]


@pytest.mark.parametrize("name", ["npt0_E", "npt1_tdp0_G"])
def test_events_that_were_not_recorded_are_no_findings(name):
    """Without any one kind of event, or with pointers hidden, a healthy trace has no finding either."""
    lines = lines_of(name)
    for kind in sorted({event_of(line) or "" for line in lines}):
        assert rules("\n".join(line for line in lines if event_of(line) != kind)) == set(), kind
    assert rules(re.sub(r"(sptep:?) ?ffff\w+", r"\1(____ptrval____)", "\n".join(lines))) == set()


def test_a_table_may_be_removed_twice_in_two_ways():
    """With the lock shared all 512 entries of a table are removed, with the lock held alone those that were there."""
    shared = [CHANGED.format(0x1000 + i, 1, OK if i == 5 else 0, 0x5A0) for i in range(512)]
    alone = CHANGED.format(0x1005, 1, OK, 0x5A0)
    one = "".join(f" qemu-7 [000] ..... 5.{n:06}: {line}" for n, line in enumerate([*shared]))
    two = "".join(f" qemu-7 [000] ..... 6.{n:06}: {line}\n" for n, line in enumerate(alone.splitlines()))
    appears = " qemu-7 [000] ..... 5.900000: " + CHANGED.format(0x1005, 1, 0, OK)
    assert rules(one + appears + two, "6.1-npt") == set()
    assert rules(one.replace(one.splitlines(keepends=True)[100], "") + appears + two, "6.1-npt")


# Known bugs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("01-nested-ept-spurious", "no storm"),
        ("11-ept-violation-loop", "no refault loop"),
        ("05-cr0wp-ltr", "no stale CR0.WP"),
    ],
)
def test_public_bug_reports_show_their_bug(name, rule):
    """The spurious storm, the refault loop and the CR0.WP bug are findings of the traces that reported them."""
    [path] = PUBLIC.glob(f"{name}*")
    assert any(found.startswith(rule) for found in rules(path.read_bytes()))


CR0 = " qemu-77 [000] ..... {}: kvm_cr: cr_write 0 = {:#x}\n"


def test_cr0_wp_churn_is_found_and_a_single_toggle_is_not():
    """A guest that toggles CR0.WP again and again is pointed at; one that does so twice is not."""
    often = "".join(CR0.format(f"5.{i:06}", 0x80050033 ^ (i % 2) << 16) for i in range(40))
    assert any("churn" in rule for rule in rules(often))
    assert rules("".join(often.splitlines(keepends=True)[:3])) == set()


# One event altered, dropped, doubled or moved ------------------------------------------------------------------------

EVENT = re.compile(r"\d\.\d{6}: (\w+): ")
HEAD = re.compile(r".*?\d+\.\d{6}: ")
TASK = re.compile(r"-(\d+)\s+\[")
BEFORE, BEHIND = 240, 120  # lines around the event that are judged with it
CASES = 3  # places at which each thing is done to each event
WHERE = "npt1_tdp1_D npt1_tdp1_K npt1_tdp1_H npt1_tdp1_I npt1_tdp0_G npt0_E npt0_C-flat32".split()
NEWER = ["k612_npt1_tdp1_B"]  # whose events the older kernel does not print

FIELDS = {  # event: its fields
    "kvm_entry": "vcpu",
    "kvm_exit": "vcpu reason rip info1 info2",
    "kvm_page_fault": "vcpu rip address error_code",
    "fast_page_fault": "vcpu gva error_code sptep old new spurious fixed",
    "kvm_tdp_mmu_spte_changed": "gfn level old_spte new_spte",
    "kvm_mmu_set_spte": "gfn spte level at",
    "kvm_mmu_spte_requested": "gfn pfn level",
    "direct_page_fault_ret": "ret",
    "paging64_page_fault_ret": "ret",
    "kvm_tdp_page_fault_ret": "ret",
    "fast_page_fault_ret": "ret",
    "kvm_mmu_pagetable_walk": "addr pferr",
    "kvm_mmu_paging_element": "pte level",
    "kvm_mmu_walker_error": "pferr",
    "kvm_mmu_set_accessed_bit": "gpa",
    "kvm_mmu_set_dirty_bit": "gpa",
    "check_mmio_spte": "spte kvm_gen spte-gen valid",
    "mark_mmio_spte": "gfn access gen",
    "handle_mmio_page_fault": "addr gfn access",
    "vcpu_match_mmio": "gva gpa",
    "kvm_mmio": "gpa len",
    "kvm_dirty_ring_push": "dirty reset offset slot used",
    "kvm_mmu_get_page": "gfn",
    "kvm_mmu_split_huge_page": "gfn spte level",
}  # fmt: skip


@cache
def event_of(line):
    """The event that a line tells of; None for the client's markers and for other lines."""
    match = EVENT.search(line)
    return match[1] if match and match[1] != "tracing_mark_write" else None


def traded(lines, i, j):
    """What two lines tell changed places; the columns in front of it did not. None where both tell the same."""
    a, b = HEAD.match(lines[i]), HEAD.match(lines[j])
    first, second = a[0] + lines[j][b.end() :], b[0] + lines[i][a.end() :]
    return None if first == lines[i] else [*lines[:i], first, *lines[i + 1 : j], second, *lines[j + 1 :]]


def dropped(lines, i, rng):
    """The line is not there."""
    return [*lines[:i], *lines[i + 1 :]]


def doubled(lines, i, rng):
    """The line is there twice."""
    return [*lines[: i + 1], *lines[i:]]


def late(lines, i, rng):
    """The line stands three lines too late."""
    return [*lines[:i], *lines[i + 1 : i + 4], lines[i], *lines[i + 4 :]]


def swapped(lines, i, rng):
    """What the line and the next of the same task tell changed places."""
    task = TASK.search(lines[i])[1]
    nearby = range(i + 1, min(i + 60, len(lines)))
    return next((traded(lines, i, j) for j in nearby if event_of(lines[j]) and f"-{task} " in lines[j]), None)


def altered(field):
    """The field has another value: one bit, or another flag of an error code, or another reason."""

    def alter(lines, i, rng):
        head = HEAD.match(lines[i]).end()
        match = re.search(rf"\b{re.escape(field)}[ =:](?:0x)?([\w|]+)", lines[i][head:])
        if not match:
            return None
        old = match[1]
        if re.fullmatch("[0-9a-f]+", old):
            number = int(old, 16)
            new = f"{number ^ 1 << rng.randrange(max(min(number.bit_length(), 44), 3)):x}".zfill(len(old))
        else:
            new = rng.choice([word for word in ("P|W|U", "W|U", "P|U", "P|W", "npf", "io", "hlt") if word != old])
        line = lines[i][: head + match.start(1)] + new + lines[i][head + match.end(1) :]
        return [*lines[:i], line, *lines[i + 1 :]]

    alter.__name__ = field
    return alter


def what_is_legal(event, what, lines, i, broken):
    """Why the trace with this fault in it is one that a healthy kernel may have printed; None: it is not."""
    name, line = what.__name__, lines[i]
    task = f"-{TASK.search(line)[1]} "
    mine = [other for other in lines[i + 1 :] if event_of(other) and task in other]
    behind = mine[0] if mine else ""
    before = next((other for other in reversed(lines[:i]) if event_of(other) and task in other), "")
    new = broken[i]

    def word(field, text):
        return int(re.search(rf"\b{field}[ :](?:0x)?(\w+)", text)[1], 16)

    def bits(field):
        return word(field, line) ^ word(field, new)

    if not any(event_of(other) == "kvm_exit" for other in mine):
        return "the task does nothing behind it that would show"
    if what in (late, swapped, doubled) and name != "doubled" and task not in "".join(lines[i + 1 : i + 4]):
        return "of two tasks' events either may come first"
    if event == "kvm_exit" and name == "info1" and "reason io" in line:
        return "which port, the guest knows"
    if event in ("kvm_entry", "kvm_exit") and name == "rip" and not ("npf" in line or "PF excp" in line):
        return "where the guest stands, the guest knows"
    if event in ("kvm_exit",) and name in ("info1", "info2", "rip", "reason") and event_of(behind) != "kvm_page_fault":
        return "only a fault tells of its exit a second time"
    if event == "kvm_tdp_mmu_spte_changed":
        place = re.search(r"gfn \w+ level \d", line)[0]
        near = [*lines[max(0, i - BEFORE) : i], *lines[i + 1 : i + BEHIND]]
        alone = not any(place in other for other in near if "spte_changed" in other)
        if what in (swapped, late) and "spte_changed" in behind + before:
            return "two entries change one after the other"
        if alone:
            return "the entry never shows again"
        if what is dropped and not any(place in other for other in lines[i + 1 : i + BEHIND]):
            return "the entry never shows again"
        if name in ("old_spte", "new_spte") and bits(name) & ~0x60 == 0:
            return "A and D come by the CPU, and go by aging"
    if event == "fast_page_fault":
        if name == "new" and "fixed 1" in line and bits("new") & ~0x462 == 0:
            return "new is read again: others may have taken W or MMU_W, and the CPU may have set A or D"
        if name == "old" and bits("old") & ~0x60 == 0:
            return "A and D come by the CPU, and go by aging"
        if what is dropped and "ret=2" in "".join(lines[i : i + 3]):
            return "a fault that is emulated may have been write-tracked, which is asked first"
        if what in (late, swapped) and "fixed 0" in line and "k612" not in line:
            return "what it refused is repaired, or not, behind it"
    if event == "kvm_mmu_set_spte":
        if event_of(before) in ("kvm_mmu_set_spte", "kvm_emulate_insn"):
            return "a prefetched neighbour: nobody asked for it"
        if name == "spte" and bits("spte") == 0x40:
            return "D depends on what was there before"
        if name == "at":
            return "no other entry of that table shows"
    if event == "kvm_mmu_paging_element" and name == "pte":
        if "level 1" not in line or "emulate_insn" in "".join(lines[i : i + 6]) or bits("pte") & 1 == 0:
            return "a guest may change its entries, and which bits it has there is its own affair"
    if event in ("kvm_mmu_get_page",) and what in (dropped, late):
        return "a page that is there needs none"
    if event in ("kvm_mmio", "vcpu_match_mmio") and name in ("gpa", "len", "gva", "dropped"):
        return "without the match of the same fault the guest's register names the address"
    if event == "check_mmio_spte" and name in ("kvm_gen", "spte") and "valid 0" in line:
        return "it is stale by any generation"
    if event == "mark_mmio_spte" and name == "gen":
        return "no check shows what was marked"
    if event == "kvm_dirty_ring_push" and name in ("slot", "offset"):
        return "no neighbour tells which page"
    return None


def places_of(event):
    """Where the event stands in the recordings, most of them far apart."""
    return [
        (name, i)
        for name in (NEWER if event in ("kvm_tdp_page_fault_ret", "fast_page_fault_ret") else WHERE)
        for i, line in enumerate(lines_of(name))
        if event_of(line) == event
    ]


def at_another_time(lines, seconds):
    """The same lines, that much later."""
    return [
        re.sub(r" (\d+)(\.\d{6}: )", lambda match: f" {int(match[1]) + seconds}{match[2]}", line, count=1)
        for line in lines
    ]


@pytest.mark.parametrize("event", FIELDS)
def test_a_single_fault_is_found_wherever_it_leaves_no_legal_trace(event, monkeypatch):
    """One event dropped, doubled, moved or altered in any field is found, but for what is named as legal."""
    # All are judged in one go, so a rule that they break often is not the less a rule.
    monkeypatch.setattr(ledger, "_too_often", lambda rule, record: False)
    rng = random.Random(zlib.crc32(event.encode()))
    places = places_of(event)
    text, spans, start = [], [], 0
    for what in (dropped, doubled, late, swapped, *map(altered, FIELDS[event].split())):
        for name, i in rng.sample(places, min(len(places), CASES)):
            lines = list(lines_of(name))
            broken = what(lines, i, rng)
            if broken is None:
                continue
            # Each is a recording of its own, of an earlier time.
            part = at_another_time(broken[max(0, i - BEFORE) : i + BEHIND], 100 * (2000 - len(spans)))
            spans.append((start + 1, start + len(part), what, name, i, what_is_legal(event, what, lines, i, broken)))
            text += part
            start += len(part)
    found = conform.conform("\n".join(text).encode("latin-1"))
    seen = [max(one["lines"]) for one in found["findings"] if one["lines"]]
    missed = [
        (what.__name__, name, i + 1)
        for first, last, what, name, i, legal in spans
        if not legal and not any(first <= line <= last for line in seen)
    ]
    assert spans and not missed, (missed, found["not_applied"])


# Single rules --------------------------------------------------------------------------------------------------------

CHANGED = "kvm_tdp_mmu_spte_changed: as id 0 gfn {:x} level {} old_spte {:x} new_spte {:x}\n"
FAST = "fast_page_fault: vcpu 0 gva {:x} error_code {} sptep ffff888005000000 old {:#x} new {:x} spurious {} fixed {}\n"
SET = "kvm_mmu_set_spte: gfn {:x} spte {:x} ({}) level {} at {:x}\n"
CHECK = "check_mmio_spte: spte {:x} kvm_gen {:x} spte-gen {:x} valid {}\n"
OK, RO = 0x1000E67, 0x1000E65
ADDS_W = "a fast fix adds W, or gives saved rights back, and changes nothing else"
LACKED_W = "a fixed fault lacked W alone, and HOST_W and MMU_W were set"
FOR_WRITES = "the fast path is for writes to present pages, or where A/D bits are off"
LINKED = "an entry of the TDP MMU changes from what its last event left"
APPEARS = "a leaf appears, moves or gains rights only by a set, a fast fix or a split"


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (CHANGED.format(1, 1, 0, 0x1000867), "W is set in a leaf only where HOST_W and MMU_W are"),
        (CHANGED.format(1, 1, 0, 0x1000A67), "W is set in a leaf only where HOST_W and MMU_W are"),
        (CHANGED.format(1, 1, 0, 0x1000C65), "MMU_W is set only where HOST_W is"),
        (CHANGED.format(1, 1, 0, 0x1000E66), "a present leaf is one that the CPU accepts"),
        (CHANGED.format(1, 1, 0, 0x40), "an spte is present, MMIO, removed or nothing"),
        (CHANGED.format(1, 2, 0, 0x1000EE7), "an entry's level is 1 to 5, and its gfn a multiple of what it maps"),
        (CHANGED.format(0, 7, 0, OK), "an entry's level is 1 to 5, and its gfn a multiple of what it maps"),
        (CHANGED.format(1, 1, OK, OK), "kvm_tdp_mmu_spte_changed is printed only for a change"),
        (CHANGED.format(1, 1, 0x5A0, OK), "who removed an entry gives it free without an event"),
        (CHANGED.format(1, 1, OK, 0x8000000001027), "an spte changes as one of its makers changes it"),
        (CHANGED.format(1, 1, OK, OK + 0x1000), "the pfn of a present leaf does not change"),
        (CHANGED.format(1, 1, RO, 0x1000825), "HOST_W is not withdrawn from a present leaf"),
        (SET.format(1, RO, "rwxu", 1, 8), "the letters of kvm_mmu_set_spte are those of its spte"),
        (SET.format(0x80000, 0x8000080000027, "rwxu", 1, 0), "kvm_mmu_set_spte prints no table and no MMIO spte"),
        (FAST.format(0x1000000, "P|W|U", RO, OK + 0x1000, 0, 1), "a fast fix keeps the pfn"),
        (FAST.format(0x1000000, "P|W|U", RO, OK | 1 << 63, 0, 1), ADDS_W),
        (FAST.format(0x1000000, "P|W|U", 0, OK, 0, 1), "the spte of a fixed fault was present, or access-tracked"),
        (FAST.format(0x1000000, "P|W|U", 0x5A0, OK, 0, 1), "the spte of a fixed fault was present, or access-tracked"),
        (FAST.format(0x1000000, "P|W|U", 0x1000825, 0x1000825, 0, 1), LACKED_W),
        (FAST.format(0x1000000, "P|W|U", OK, OK, 0, 1), "the spte of a fixed fault forbade the access"),
        (FAST.format(0x1000000, "P|W|U", RO, RO, 1, 0), "the spte of a spurious fault allowed the access"),
        (FAST.format(0x1000000, "P|W|U", OK, OK, 0, 0), "a fault that its spte allowed is spurious"),
        (FAST.format(0x1000000, "P|W|U", RO, RO, 0, 0), "a fault that the fast path can fix is fixed"),
        (FAST.format(0x1000000, "W|U", RO, OK, 0, 1), FOR_WRITES),
        (FAST.format(0x1001000, "P|W|U", RO, OK, 0, 1), "the fast path's entry lies where the address says"),
        (CHECK.format(0x8000080000027, 5, 4, 1), "a valid MMIO spte is of the present generation"),
        (CHECK.format(0x8000080000027, 4, 4, 0), "a valid MMIO spte is of the present generation"),
        (CHECK.format(0x8000080000027, 5, 5, 1), "check_mmio_spte prints the generation of its spte"),
        ("kvm_dirty_ring_push: ring 0: dirty 0x5 reset 0x2 slot 1 offset 0x5 (used 4)\n",
         "a dirty ring holds what was pushed and not reset"),
        (CHANGED.format(1, 1, 0, OK) + CHANGED.format(1, 1, OK + 0x1000, 0), LINKED),
        (SET.format(0x1000, OK, "rwxu", 1, 0x5000000)
         + FAST.format(0x1000000, "P|W|U", RO + 0x1000, OK + 0x1000, 0, 1), APPEARS),
        (CHANGED.format(0x1000, 1, 0, RO) + FAST.format(0x1000000, "P|W|U", OK, OK, 1, 0),
         "the fast path finds what the entry's events left"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_found_with_its_rule(text, rule):
    """A value, a change or a verdict that no kernel makes is a finding that names the rule, its source and the line."""
    exits = "kvm_exit: vcpu 0 reason npf rip 0x1 info1 0x0000000000000000 info2 0x0000000000000000\n"
    found = conform.conform((exits + text).encode(), "6.1-npt")
    mine = [one for one in found["findings"] if one["rule"] == rule]
    assert mine and mine[0]["source"] and mine[0]["lines"][-1] > 1
    assert found["agree"] < found["of"]


@pytest.mark.parametrize(
    "text",
    [
        # the CPU's own A and D; release of a removed entry; W lost by the log, printed
        CHANGED.format(1, 1, 0, 0x1000E07) + CHANGED.format(1, 1, OK, RO),
        CHANGED.format(1, 1, OK, 0x5A0) + CHANGED.format(1, 1, 0, OK + 0x1000),
        # a split makes the small entries without an event
        CHANGED.format(0x1001, 1, OK, 0) + CHANGED.format(0x1000, 2, 0x6200EE7, 0x9000827)
        + CHANGED.format(0x1001, 1, 0x6201E67, 0x6201E65),
        # new is read again when the event is printed
        FAST.format(0x1000000, "P|W|U", RO, RO, 0, 1),
        # outside the TDP MMU rights go without an event
        SET.format(0x1000, OK, "rwxu", 1, 0x5000000) + FAST.format(0x1000000, "P|W|U", 0x1000A25, 0x1000A25, 0, 0),
    ],
)  # fmt: skip
def test_what_needs_no_event_is_no_finding(text):
    """A, D, releases, splits, a second look and silent write-protection are legal."""
    assert rules(text, "6.1-npt") == set()


ACCESS_TRACKED = 0x75000034D4FE870
EPT = "kvm_exit: vcpu 0 reason EPT_VIOLATION rip 0x1 info1 0x0000000000000184 info2 0x0000000000000000\n"


def test_a_fixed_fault_may_have_been_access_tracked():
    """On EPT without A/D bits a fixed fault's spte may have had no rights, if they were saved."""
    fixed = FAST.format(0x34D4FE000, "F", ACCESS_TRACKED, 0x61000034D4FE875, 0, 1).replace("5000000", "50007f0")
    assert rules(EPT + fixed, "6.1-ept") == set()
    assert rules(EPT + fixed.replace("75000034d4fe870", "61000034d4fe870"), "6.1-ept")


def stamped(*rows):
    """Lines of (time, CPU, task, event)."""
    return "".join(f" qemu-{task} [{cpu:03}] ..... {time:.6f}: {event}" for time, cpu, task, event in rows)


WRITE_PROTECT = CHANGED.format(0x1000, 1, OK, RO)
FIX = FAST.format(0x1000000, "P|W|U", RO, RO, 0, 1)


def test_a_fast_fix_may_be_printed_behind_what_undid_it():
    """Another CPU's write-protection may stand before the repair that it undid; the same task's may not."""
    start = (1.0, 0, 1, CHANGED.format(0x1000, 1, OK, RO))
    assert rules(stamped(start, (1.1, 1, 2, WRITE_PROTECT), (1.101, 0, 1, FIX)), "6.1-npt") == set()
    assert rules(stamped(start, (1.1, 0, 1, WRITE_PROTECT), (1.2, 0, 1, FIX)), "6.1-npt")


def test_three_racing_events_may_stand_in_any_order_of_three_tasks():
    """Repair, write-protection and repair again of three CPUs are legal in an order that time did not have."""
    start = (1.0, 0, 9, CHANGED.format(0x1000, 1, OK, RO))
    again = FAST.format(0x1000008, "P|W|U", RO, OK, 0, 1).replace("vcpu 0", "vcpu 1")
    end = (1.5, 0, 9, CHANGED.format(0x1000, 1, OK, 0))
    for order in ((FIX, WRITE_PROTECT, again), (WRITE_PROTECT, again, FIX), (again, FIX, WRITE_PROTECT)):
        rows = [(1.1 + n / 1000, n, 1 + n, event) for n, event in enumerate(order)]
        assert rules(stamped(start, *rows, end), "6.1-npt") == set()


def test_without_a_taker_w_is_not_gone_again():
    """In the TDP MMU a repair whose new value lacks W needs an event that tells who took it."""
    start = (0.9, 0, 9, CHANGED.format(0x1000, 1, 0, OK)), (1.0, 0, 9, CHANGED.format(0x1000, 1, OK, RO))
    found = rules(stamped(*start, (1.1, 0, 1, FIX)), "6.1-npt")
    assert found == {"when a fast fix is gone again at once, an event tells who undid it"}


# Losses, layouts, damage ---------------------------------------------------------------------------------------------


def test_lost_events_excuse_what_they_may_have_told():
    """After a loss nothing is known of before, and what stood beside it is not judged either."""
    lines = list(lines_of("npt1_tdp1_C"))
    for i in range(800, 3000, 400):
        gap = 40
        text = [*lines[:i], *lines[i + gap :]]
        assert rules("\n".join(text))
        assert rules("\n".join([*text[:i], f"CPU:0 [LOST {gap} EVENTS]", *text[i:]])) == set()


def test_the_loss_of_one_cpu_excuses_what_others_printed_meanwhile():
    """From the CPU's last event to the line that tells of the loss, what others found may come from what was lost."""
    start = (1.0, 1, 1, CHANGED.format(0x1000, 1, 0, OK))
    other = (1.2, 0, 2, CHANGED.format(0x1000, 1, RO, 0))
    lost = "CPU:1 [LOST 1 EVENTS]\n"
    behind = stamped((1.3, 1, 1, CHANGED.format(0x1001, 1, 0, OK)))
    assert rules(stamped(start, other) + behind, "6.1-npt")
    assert rules(stamped(start, other) + lost + behind, "6.1-npt") == set()


def test_rules_without_a_layout_are_reported_as_not_applied():
    """Where the layout cannot be inferred it says so, rules that need none are applied all the same."""
    found = conform.conform(CHANGED.format(1, 1, OK, OK).encode())
    assert found["layout"] is None and "neither exits nor error codes" in found["layout_reason"]
    assert [one["rule"] for one in found["findings"]] == ["kvm_tdp_mmu_spte_changed is printed only for a change"]
    skipped = {one["rule"]: one["reason"] for one in found["not_applied"]}
    assert "could not be inferred" in skipped["the pfn of a present leaf does not change"]


def test_one_damaged_spte_does_not_hide_the_layout():
    """A bit that is another kernel's, in one event of many, is a finding and not another layout."""
    lines = list(lines_of("npt1_tdp1_C"))
    i = next(i for i, line in enumerate(lines) if "fixed 1" in line)
    for bit in (9, 10, 11, 57, 63):
        line = re.sub(r"old 0x(\w+)", lambda match, bit=bit: f"old {int(match[1], 16) ^ 1 << bit:#x}", lines[i])
        found = conform.conform("\n".join([*lines[:i], line, *lines[i + 1 :]]).encode("latin-1"))
        assert found["layout"] == "6.1-npt" and found["findings"]


def test_a_rule_that_a_trace_breaks_all_the_time_is_not_applied():
    """Where exits were filtered out, entries follow one another: that is said, and is no finding."""
    lines = [line for line in lines_of("npt1_tdp1_C") if "kvm_exit" not in line or "reason io" in line]
    found = conform.conform("\n".join(lines).encode("latin-1"))
    assert not [one for one in found["findings"] if "leaves the guest" in one["rule"]]
    assert any("leaves the guest" in one["rule"] and "breaks it" in one["reason"] for one in found["not_applied"])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_hostile_text_never_raises(picks, rng):
    """Lines in any order, with any digits, are judged without an exception, and agree of of holds."""
    pool = [line for name in ("npt1_tdp1_D", "npt0_E", "npt1_tdp1_K") for line in lines_of(name)[60:]][::200]
    lines = []
    for pick in picks:
        line = pool[pick % len(pool)]
        lines.append(
            "".join(rng.choice("0123456789abcdef") if c in "0123456789" and rng.random() < 0.3 else c for c in line)
        )
    found = conform.conform(
        "\n".join(lines).encode("latin-1"), rng.choice([None, "6.1-npt", "6.12-ept", "5.10-ept", "2012-ept"])
    )
    assert 0 <= found["agree"] <= found["of"]
    json.dumps(found)


@pytest.mark.parametrize("layout", ["2012-ept", "2012-shadow", "3.6-ept", "5.10-ept", "5.10-shadow", "6.12-ept"])
def test_every_layout_can_be_judged_by(layout):
    """A trace held against a layout that is not its own is judged without an exception, and not found healthy."""
    found = conform.conform(DATA / "kvm-traces" / "npt1_tdp1_C.trace.gz", layout)
    assert found["layout"] == layout
    assert found["findings"] or [
        rule for rule in found["not_applied"] if "2012" in rule["reason"] or "breaks" in rule["reason"]
    ]


# A plain reading -----------------------------------------------------------------------------------------------------


def broken_links(text):
    """The lines at which an entry of the TDP MMU changed from something else than its last event left, read plainly."""
    left, splits, wrong = {}, {}, []
    for number, line in enumerate(text.split("\n"), 1):
        if "kvm_mmu_zap_all_fast" in line:
            return None  # another root: the plain reading does not know of roots
        if match := re.search(r"spte_changed: as id 0 gfn (\w+) level (\d) old_spte (\w+) new_spte (\w+)", line):
            gfn, level, old, new = int(match[1], 16), int(match[2]), int(match[3], 16), int(match[4], 16)
            after = new
        elif match := re.search(r"fast_page_fault: .* gva (\w+) .* old 0x(\w+) new (\w+) spurious 0 fixed 1", line):
            gfn, level, old = int(match[1], 16) >> 12, 1, int(match[2], 16)
            after = old | 2
        else:
            continue
        key = gfn, level
        if key in left:
            before, at = left[key]
            parent = gfn >> 9 * level << 9 * level, level + 1
            same = before == old or (before in (0, 0x5A0) and old == 0)
            used = before | old == old and (before ^ old) & ~0x60 == 0 and (not (before ^ old) & 0x40 or old & 2)
            if not (same or used or splits.get(parent, 0) > at):
                wrong.append(number)
        if level > 1 and old & 0x80 and old & 1 and new & 0x81 == 1:
            splits[key] = number
        left[key] = after, number
    return wrong


@pytest.mark.parametrize("name", ["npt1_tdp1_C", "npt1_tdp1_H", "npt1_tdp1_I", "npt1_tdp1_L", "npt1_tdp1_P1"])
def test_links_are_those_of_a_plain_reading(name):
    """With changes taken out here and there, the broken links are the ones that a plain reading finds."""
    rng = random.Random(5)
    lines = list(lines_of(name))
    changes = [i for i, line in enumerate(lines) if "spte_changed" in line]
    for i in sorted(rng.sample(changes, 12), reverse=True):
        del lines[i]
    text = "\n".join(lines)
    found = conform.conform(text.encode("latin-1"))["findings"]
    mine = [one["lines"][-1] for one in found if one["rule"].startswith("an entry of the TDP MMU changes from")]
    assert sorted(mine) == broken_links(text) and mine


# The command line ----------------------------------------------------------------------------------------------------


def run(capsys, *arguments):
    """Run ``python -m mmu`` with --json: exit code and object."""
    code = main([*map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out), err


def test_check_without_a_scenario_counts_events(capsys, tmp_path):
    """``--no-scenario``, or no scenario beside the trace, counts legal events; exit codes are 0, 1 for a finding."""
    path = DATA / "kvm-traces" / "npt1_tdp1_C.trace.gz"
    code, record, _ = run(capsys, "check", "--no-scenario", path)
    [file] = record["files"]
    assert (code, file["counts"], file["layout"]) == (0, {"events": {"agree": 4103, "of": 4103}}, "6.1-npt")
    lines = list(lines_of("npt1_tdp1_C"))
    i = next(i for i, line in enumerate(lines) if "fixed 1" in line)
    bad = tmp_path / "alone.txt"
    bad.write_text("\n".join([*lines[:i], re.sub(r"old 0x\w+", "old 0x0", lines[i]), *lines[i + 1 :]]))
    code, record, _ = run(capsys, "check", bad, path)
    assert code == 1 and record["complete"]
    assert record["files"][0]["findings"] and not record["files"][1]["findings"]
    assert record["files"][0]["findings"][0].keys() >= {"lines", "rule", "source"}
    assert record["files"][1]["scenario"]


def test_check_prints_findings_and_what_was_not_applied(capsys):
    """The text names the layout, each finding with its lines and source, and the rules that were not applied."""
    assert main(["check", str(PUBLIC / "05-cr0wp-ltr-nested-2023.txt")]) == 1
    out = capsys.readouterr().out
    assert "layout 6.1-ept" in out and "lines 42, 43, 45" in out and "not applied" in out
    assert out.splitlines()[-1] == "agree 39 of 40"


def test_a_finding_beside_a_scenario_is_an_exit_code_too(capsys, tmp_path):
    """With a scenario the rules are applied as well: a fault that the prediction does not see is a finding."""
    lines = list(lines_of("npt1_tdp1_C"))
    i = max(i for i, line in enumerate(lines) if "spte_changed" in line and "old_spte 0 " not in line)
    lines[i] = re.sub(r"new_spte \w+", lambda match: match[0][:-3] + "867", lines[i])
    (tmp_path / "C.trace").write_text("\n".join(lines))
    (tmp_path / "C.json.gz").write_bytes((DATA / "kvm-traces" / "npt1_tdp1_C.json.gz").read_bytes())
    code, record, _ = run(capsys, "check", tmp_path / "C.trace")
    assert code == 1 and record["agree"] == record["of"]
    assert "W is set in a leaf only where HOST_W and MMU_W are" in [f["rule"] for f in record["files"][0]["findings"]]


def test_a_cut_off_file_is_unusable(capsys, tmp_path):
    """A gzip stream that ends too early is said to, with exit code 2, and the next file is still judged."""
    cut = tmp_path / "cut.trace.gz"
    cut.write_bytes((DATA / "kvm-traces" / "npt1_tdp1_C.trace.gz").read_bytes()[:30_000])
    code, record, err = run(capsys, "check", cut, PUBLIC / "07-ept-write-fault-set-spte-gvisor-amdgpu.txt")
    assert code == 2 and str(cut) in err and record["of"] == 5


def test_histories_and_rules_name_changes_alike():
    """The changes that are judged are the changes that the report tells of."""
    piece = trace.read(DATA / "kvm-traces" / "npt1_tdp1_C.trace.gz")
    rows = histories.Names().changes(piece)
    assert len(rows) == sum(len(piece[event]) for event in histories.EVENTS)
