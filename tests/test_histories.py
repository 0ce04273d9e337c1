"""Histories of sptes, against a plain reading of the same text and against hand-made traces."""

import gzip
import json
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from mmu import histories, report, trace, update

DATA = Path(__file__).parent / "data"
RECORDED = sorted((DATA / "kvm-traces").glob("*.trace.gz"))
NO_MMIO = [path for path in RECORDED if b"mark_mmio_spte" not in gzip.decompress(path.read_bytes())]
STORM = DATA / "public-traces" / "01-nested-ept-spurious-2024-09-09.txt"

CHANGED = "kvm_tdp_mmu_spte_changed: as id {} gfn {:x} level {} old_spte {:x} new_spte {:x}\n"
FAST = "fast_page_fault: vcpu 1 gva {:x} error_code P|W|U sptep {:016x} old {:#x} new {:x} spurious 0 fixed 1\n"
SET = "kvm_mmu_set_spte: gfn {:x} spte {:x} (rwxu) level {} at {:x}\n"
BASE, LARGE = 0xFFFF888000000000, 1 << 7


def answer(text, layout="6.1-npt", **limits):
    """The histories of a trace given as text."""
    found = histories.Histories(**limits)
    for piece in trace.chunks(text.encode()):
        found.add(piece)
    return found.answer(layout)


def steps(one):
    """A history as (old, new) numbers."""
    return [(int(change["old"] or "0", 16), int(change["new"], 16)) for change in one["history"]]


def read_plainly(text):
    """Every event of a recorded trace that tells of a change, by the spte's address or its place in the TDP MMU."""
    by_spte = defaultdict(list)
    tdp_mmu = "kvm_tdp_mmu_spte_changed" in text
    last = None
    for number, line in enumerate(text.split("\n"), 1):
        if match := re.search(r"spte_changed: as id (\d) gfn (\w+) level (\d) old_spte (\w+) new_spte (\w+)", line):
            gfn, level, old, new = int(match[2], 16), int(match[3]), int(match[4], 16), int(match[5], 16)
            last = gfn, level
            by_spte[gfn, level].append((number, old, new))
        elif match := re.search(r"fast_page_fault: vcpu \d gva (\w+) .* sptep (\w+) old 0x(\w+) new (\w+)", line):
            sptep = int(match[2], 16)
            gfn, level = int(match[1], 16) >> 12, 2 if int(match[3], 16) & LARGE else 1
            key = (gfn >> 9 * (level - 1) << 9 * (level - 1), level) if tdp_mmu else sptep - BASE
            by_spte[key].append((number, int(match[3], 16), int(match[4], 16)))
        elif match := re.search(r"kvm_mmu_set_spte: gfn (\w+) spte (\w+) .* level (\d) at (\w+)", line):
            if last != (int(match[1], 16), int(match[3])):
                key, new = int(match[4], 16), int(match[2], 16)
                by_spte[key].append((number, by_spte[key][-1][2] if by_spte[key] else 0, new))
            last = None
    return by_spte


@pytest.mark.parametrize("path", NO_MMIO, ids=lambda path: path.name)  # marks are tested by hand-made traces
def test_histories_of_recorded_traces_are_those_of_a_plain_reading(path):
    """Which sptes are busiest, how often each changed, and from what to what, is what a search of the text gives."""
    text = gzip.decompress(path.read_bytes()).decode()
    plain = read_plainly(text)
    found = report.report(path)
    assert found["sptes_cut"]["events"] == sum(map(len, plain.values()))
    assert len(found["sptes"]) + found["sptes_cut"]["not_listed"] == len(plain)
    assert [one["events"] for one in found["sptes"]] == sorted(map(len, plain.values()), reverse=True)[:10]
    for one in found["sptes"]:
        key = (one["gfn"], one["level"]) if one["as_id"] is not None else int(one["at"] or one["sptep"], 16)
        if isinstance(key, int) and key > BASE:
            key -= BASE
        lines = [change["line"] for change in one["history"]]
        whole = plain[key]
        assert list(zip(lines, *zip(*steps(one), strict=True), strict=True)) == whole[-len(lines) :]
        assert one["cut"] == len(whole) - len(lines)


@pytest.mark.parametrize("name", ["npt1_tdp0_G", "npt0_C-flat32", "npt1_tdp1_D", "k612_npt1_tdp1_B"])
def test_where_a_piece_ends_does_not_change_histories(name):
    """Pieces of eight kilobytes and a whole file give the same answer, and it is JSON."""
    path = DATA / "kvm-traces" / f"{name}.trace.gz"
    whole, small = histories.Histories(), histories.Histories()
    whole.add(trace.read(path))
    for piece in trace.chunks(path, 1 << 13):
        small.add(piece)
    assert small.answer("6.1-npt") == whole.answer("6.1-npt")
    assert json.loads(json.dumps(whole.answer(None)))["sptes_cut"]["unnamed"] == 0


def test_a_set_of_the_tdp_mmu_is_told_once():
    """kvm_mmu_set_spte behind a kvm_tdp_mmu_spte_changed of the same entry tells nothing new."""
    found = answer(CHANGED.format(0, 5, 1, 0, 0x29F0E67) + SET.format(5, 0x29F0E67, 1, 0x99BD028))
    assert found["sptes_cut"]["events"] == 1
    assert [one["as_id"] for one in found["sptes"]] == [0]


def test_a_set_elsewhere_is_told_beside_the_tdp_mmu():
    """A nested guest's shadow page is no entry of the TDP MMU, though both work in one trace."""
    text = CHANGED.format(0, 5, 1, 0, 0x29F0E67) + SET.format(6, 0x29F1E67, 1, 0x88BD030)
    assert [one["as_id"] for one in answer(text)["sptes"]] == [0, None]


def test_virtual_and_physical_addresses_of_one_spte_are_joined():
    """Where set and fast path print one gfn's entry, the difference of their addresses joins all other entries too."""
    text = SET.format(16, 0x1000E67, 1, 0x5000080) + FAST.format(16 << 12, BASE + 0x5000080, 0x1000E65, 0x1000E67)
    text += SET.format(17, 0x1001E67, 1, 0x5000088) + FAST.format(17 << 12, BASE + 0x5000088, 0x1001E65, 0x1001E67)
    found = answer(text)["sptes"]
    assert [(one["events"], one["at"], int(one["sptep"], 16) - BASE) for one in found] == [
        (2, "0x5000080", 0x5000080),
        (2, "0x5000088", 0x5000088),
    ]
    assert [change["meanwhile"] for change in found[0]["history"]] == [None, "W 1→0"]


def test_hashed_pointers_keep_histories_apart():
    """A hashed sptep names its spte still, but is not joined with a physical address."""
    text = SET.format(16, 0x1000E67, 1, 0x5000080) + FAST.format(16 << 12, 0xFD98C937, 0x1000E65, 0x1000E67) * 2
    assert [(one["events"], one["at"], one["sptep"]) for one in answer(text)["sptes"]] == [
        (2, None, "0xfd98c937"),
        (1, "0x5000080", None),
    ]


@pytest.mark.parametrize(
    ("gfn", "level", "old"), [(0x12345, 1, 0x5000E65), (0x12345, 2, 0x6200AE5), (0x54321234, 3, 0x40000AE5)]
)
def test_level_of_a_fast_fault_is_told_by_its_place_in_the_table(gfn, level, old):
    """A large leaf's fast-path event joins the history of the large entry, whose gfn is rounded down."""
    base = gfn >> 9 * (level - 1) << 9 * (level - 1)
    index = gfn >> 9 * (level - 1) & 511
    text = CHANGED.format(0, base, level, 0, old | 2)
    text += FAST.format(gfn << 12, BASE + 0x5000000 + index * 8, old, old | 2)
    [one] = answer(text)["sptes"]
    assert (one["gfn"], one["level"], one["events"]) == (gfn, level, 2)


def test_mmio_spte_is_told_from_its_mark():
    """mark_mmio_spte prints no word; with the layout known the word is made from gfn, access and generation."""
    [one] = answer("mark_mmio_spte: sptep:ffff8880065c2000 gfn 80000 access 7 gen 4\n")["sptes"]
    assert one["history"][0]["new"] == "0x8000080000027" and one["history"][0]["state"] == "mmio"


def test_histories_are_bounded_and_say_what_was_cut():
    """Of many sptes the busiest are kept, of each the newest changes; counts given up are said to be so."""
    word = 0x1000E67
    text = "".join(CHANGED.format(0, gfn, 1, word, word ^ 2) for gfn in range(300))
    text += "".join(CHANGED.format(0, 7, 1, word + n, word + n + 1) for n in range(50))
    found = answer(text, sptes=2, length=3, distinct=100)
    assert found["sptes"][0]["gfn"] == 7 and found["sptes"][0]["events"] == 51 and found["sptes"][0]["cut"] == 48
    assert steps(found["sptes"][0])[-1] == (word + 49, word + 50)
    assert found["sptes_cut"] == {"sptes": None, "events": 350, "not_listed": 298, "at_most": 1, "unnamed": 0}


def test_memory_does_not_grow_with_the_trace():
    """What is kept after many pieces is no more than after few."""
    found = histories.Histories()
    rng = np.random.default_rng(3)
    sizes = []
    for _ in range(12):
        gfns = rng.integers(0, 1 << 16, 20_000)
        found.add(trace.read("".join(CHANGED.format(0, int(gfn), 1, 0, 0x1000E67) for gfn in gfns).encode()))
        sizes.append(sum(len(rows) for rows in found._rows))
    assert max(sizes) <= (1 << 17) + 20_000 + (1 << 12) * 17
    assert found.answer("6.1-npt")["sptes_cut"]["events"] == 240_000


def test_numbers_that_cannot_be_are_not_named():
    """A level, address space or pointer that does not exist names no spte, and is counted."""
    text = CHANGED.format(0, 1 << 60, 1, 0, 1) + CHANGED.format(99, 1, 1, 0, 1) + SET.format(2, 1, 1, 1 << 60)
    assert answer(text)["sptes_cut"] == {"sptes": 0, "events": 3, "not_listed": 0, "at_most": 0, "unnamed": 3}


def test_without_a_layout_bits_are_given_bare():
    """Where the layout is not known a change is the bits that differ, and no state is claimed."""
    [one] = answer(CHANGED.format(0, 5, 1, 0x29F0E67, 0x29F0E65), None)["sptes"]
    assert one["history"][0]["changed"] == "bits 0x2" and one["history"][0]["state"] is None


def test_storm_is_one_history():
    """The public spurious storm is one spte, hit millions of times without a change."""
    found = report.report(STORM)
    assert found["sptes"][0]["events"] == 6_275_388
    assert {change["changed"] for change in found["sptes"][0]["history"]} == {"nothing"}
    assert "6,275,388  gfn 0x20fe level 1, sptep 0xfd98c937" in report.text(found, "storm")


def test_changes_are_named_as_update_names_them():
    """What changed is said in the words of mmu.update."""
    [one] = answer(CHANGED.format(0, 5, 1, 0x29F0E67, 0x5A0))["sptes"]
    assert one["history"][0]["changed"] == update.changed(0x29F0E67, 0x5A0) == "writable → removed"
