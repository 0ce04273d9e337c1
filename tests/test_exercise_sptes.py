"""mmu.exercise.sptes: right answers pass, each listed wrong try meets a case that breaks it; the map of changes."""

import numpy as np
import pytest

from mmu import figures, spte, update
from mmu.exercise import sptes
from mmu.exercise.sptes import WANTED, judged, read_only_upgradable


def denies(entries):
    """The first level whose entry lacks W or U, one entry at a time."""
    for level, entry in zip((4, 3, 2, 1), entries, strict=True):
        if entry & 0b110 != 0b110:
            return level
    return None


def state(host_w, mmu_w, w):
    """The four legal states and the rest."""
    return {
        (1, 1, 1): "writable",
        (1, 1, 0): "write-protected: dirty log",
        (1, 0, 0): "write-protected: guest page table",
        (0, 0, 0): "write-protected: host read-only",
    }.get((host_w, mmu_w, w), "illegal")


def protected(spte, shadow):
    """W goes, and with it MMU_W where the gfn is shadowed, whatever W was."""
    return spte & ~(1 << 10 | 1 << 1) if shadow else spte & ~(1 << 1)


def repaired(spte):
    """W, where KVM says that a page is there, that it may be written, and that it is not yet writable."""
    return spte | 2 if spte & 1 << 11 and spte & 1 << 10 and not spte & 2 else None


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        (
            sptes.denying_levels(),
            denies,
            [
                lambda entries: None if entries[-1] & 2 else 1,
                lambda entries: next((4 - i for i, e in enumerate(entries) if not e & 2), None),
                lambda entries: next((i + 1 for i, e in enumerate(entries[::-1]) if e & 6 != 6), None),
            ],
        ),
        (
            sptes.states(),
            state,
            [
                lambda host_w, mmu_w, w: "writable" if w else "write-protected: dirty log",
                lambda host_w, mmu_w, w: state(1, mmu_w, w),
            ],
        ),
        (
            sptes.protections(),
            protected,
            [
                lambda spte, shadow: protected(spte, shadow) if spte & 2 else spte,
                lambda spte, shadow: protected(spte, False),
                lambda spte, shadow: protected(spte, True),
            ],
        ),
        (
            sptes.repairs(),
            repaired,
            [
                lambda spte: spte | 2 if spte & 1 << 10 and not spte & 2 else None,
                lambda spte: spte | 2 if spte & 1 << 11 and spte & 1 << 9 and not spte & 2 else None,
                lambda spte: spte | 2 if spte & 1 << 11 and spte & 1 << 10 else None,
            ],
        ),
    ],
)
def test_chapter_3(check, right, wrong):
    """The solutions of chapter 3 pass and each of its listed wrong tries gets a counterexample."""
    assert check(right).right
    for answer in wrong:
        result = check(answer)
        assert not result.right
        assert "The first is " in repr(result)


@pytest.mark.parametrize(
    ("layout", "right", "wrong"),
    [
        (
            "6.1-npt",
            lambda pfn: pfn << 12 | 0xE05,
            {
                0x005: "MMU_P is clear",
                0xE07: "writable, to the CPU",
                0xE01: "unreadable",
                0xC05: "no kernel makes",
                0xA05: "refused by the fast path",
            },
        ),
        (
            "6.1-ept",
            lambda pfn: pfn << 12 | 3 << 57 | 1 << 11 | 6 << 3 | 1,
            {
                0xE01: "refused by the fast path",
                3 << 57 | 0x802: "write without read",
                3 << 57 | 0x811: "memory type",
                3 << 57 | 0x803: "writable, to the CPU",
                1 << 62 | 3 << 57 | 0x801: "no name",
            },
        ),
    ],
)
def test_built_words(layout, right, wrong):
    """A read-only upgradable word passes for every page frame; each wrong one is told what it is instead."""
    check = read_only_upgradable(layout)
    assert check(right).right
    assert "of another page" in repr(check(lambda pfn: right(pfn ^ 1)))
    for low, why in wrong.items():
        assert why in repr(check(lambda pfn, low=low: pfn << 12 | low))


@pytest.mark.parametrize("layout", ["6.1-npt", "6.1-ept", "6.12-npt", "6.12-ept"])
def test_what_the_dirty_log_makes_is_wanted(layout):
    """The word that the dirty log makes of a fresh mapping is read-only for the CPU and upgradable."""
    word = update.write_protect(update.make_spte(0x625A, layout=layout), layout=layout)
    assert judged(word, 0x625A, layout) == WANTED


@pytest.mark.parametrize("layout", ["6.1-npt", "6.1-ept"])
def test_one_change_needs_no_lock(layout):
    """Of the changes between the four states and none, one takes no lock: that of a dirty-logged entry to writable."""
    assert figures.transitions(layout).alt.endswith(
        "15 are legal; 1 of them needs no lock: write-protected: dirty log to writable."
    )


def test_a_removed_entry_has_the_bit_that_invites():
    """The constant of a removed entry has MMU_W's bit set in the NPT layout, so MMU_P must be asked first."""
    removed, _ = spte.LAYOUTS["6.1-npt"].busy
    assert spte.LAYOUTS["6.1-npt"].bits.field(removed, "MMU_W") == 1
    assert not spte.is_present(removed)
    assert update.fast_page_fault(np.array([removed], dtype=np.uint64))[0].tolist() == [removed]
