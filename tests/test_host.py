"""mmu.host: what the host tells KVM of, and what it answers, by the rules of Linux's memory management."""

import numpy as np
import pytest

from mmu.host import HUGE_PAGES, READ, WRITE, Backing
from mmu.vm import READ as LOAD
from mmu.vm import WRITE as STORE
from mmu.vm import Guest
from tests.test_vm import guest, touch

RW = int(READ | WRITE)


def told(page: np.ndarray) -> tuple[int, int]:
    """The one range of pages that the notifier named: first and count."""
    assert np.array_equal(page, np.arange(page[0], page[0] + page.size))
    return int(page[0]), page.size


def serve(ram: Backing, page: int, *, store: bool) -> tuple[bool, bool, bool]:
    """One request of KVM's: may the page be mapped writable, was it replaced, was a huge page split for it."""
    answer = ram.fault(np.array([page], dtype=np.int64), np.array([store]))
    return bool(answer.writable[0]), bool(answer.notified[0]), bool(answer.split[0])


def prefaulted(pages: int = HUGE_PAGES, **how: object) -> Backing:
    """A mapping that the host process has written to in full."""
    ram = Backing(pages, **how)
    ram.populate()
    return ram


@pytest.mark.parametrize(
    ("pages", "ahead", "where", "named"),
    [
        (512, 0, (200, 50), (0, 512)),  # both ends in the one block
        (512, 0, (0, 50), (0, 512)),
        (512, 0, (0, 512), (0, 512)),  # nothing is cut; all pages change
        (64, 0, (10, 5), (10, 5)),  # no huge page fits into the mapping
        (1024, 0, (600, 10), (512, 512)),
        (1024, 0, (500, 40), (0, 1024)),
        (1024, 0, (512, 40), (512, 512)),  # a border between two blocks cuts none
        (1024, 256, (300, 10), (256, 512)),  # the host's blocks begin in the middle of the mapping
        (1024, 256, (100, 10), (100, 10)),
    ],
)
def test_a_mapping_cut_in_two_tells_of_its_whole_block(pages, ahead, where, named) -> None:
    """mprotect of a part names each 2 MiB block that it cuts, huge page or not, and else its range alone.

    vma_adjust_trans_huge splits where a huge page could be, and __split_huge_pmd tells before it looks (6.1, 6.12).
    """
    ram = prefaulted(pages, ahead=ahead)
    assert told(ram.protect(*where, int(READ))) == named


def test_mappings_that_are_alike_again_are_one() -> None:
    """Giving the protection back cuts nothing, for the parts merge; the next cut tells of the whole block again."""
    ram = prefaulted()
    ram.protect(200, 50, 0)
    assert told(ram.protect(200, 50, RW)) == (200, 50)
    assert ram.protect(200, 50, RW).size == 0  # nothing to do, nobody told (mprotect_fixup)
    assert told(ram.protect(300, 1, int(READ))) == (0, HUGE_PAGES)


def test_a_cut_mapping_gets_no_huge_page_there() -> None:
    """A huge page comes to an empty block that one mapping covers, to no block that a border runs through."""
    for cut, huge in ((False, True), (True, False)):
        ram = Backing(HUGE_PAGES, huge=True)
        if cut:
            ram.protect(100, 1, int(READ))
        serve(ram, 5, store=True)
        assert bool(ram.mapped_huge(np.array([5]))[0]) is huge


def test_a_store_to_a_shared_huge_page_splits_it() -> None:
    """With the child alive one 4K page is copied and the other 511 stay shared; they are copied though it is gone.

    do_huge_pmd_wp_page falls back; a page of a huge one counts the references of all, so do_wp_page never reuses it.
    """
    ram = prefaulted(huge=True)
    ram.fork()
    assert serve(ram, 5, store=True) == (True, True, True)
    ram.child_exits()
    assert serve(ram, 5, store=True) == (True, False, False)
    assert serve(ram, 6, store=True) == (True, True, False)


def test_a_huge_page_whose_sharer_is_gone_is_reused_whole() -> None:
    """Nobody else maps it any more: one store gives W to all 512 pages, nothing is copied and KVM is not told."""
    ram = prefaulted(huge=True)
    ram.fork()
    ram.child_exits()
    assert serve(ram, 5, store=True) == (True, False, False)
    assert ram.writable(np.arange(HUGE_PAGES)).all() and ram.mapped_huge(np.array([5])).all()


def test_a_read_maps_the_huge_zero_page() -> None:
    """Where a huge page could come a read finds the huge zero page; a store splits it and copies one page of it."""
    ram = Backing(HUGE_PAGES, huge=True)
    assert serve(ram, 5, store=False) == (False, False, False)
    assert ram.mapped_huge(np.array([500])).all()
    assert serve(ram, 5, store=True) == (True, True, True)
    assert serve(ram, 6, store=False) == (False, False, False)


def test_discarded_pages_come_back_as_they_went() -> None:
    """A block discarded whole is empty and gets a huge page again; one discarded by parts keeps its table of ptes."""
    for parts, huge in (((0, 512),), True), (((0, 256), (256, 256)), False):
        ram = prefaulted(huge=True)
        named = [told(ram.discard(*part)) for part in parts]
        assert named[0] == (0, 512)  # a part of a huge page: it is split first, which is told of whole
        serve(ram, 5, store=True)
        assert bool(ram.mapped_huge(np.array([5]))[0]) is huge


@pytest.mark.parametrize("upgrades", [False, True])
def test_who_gets_w_back_from_mprotect(upgrades: bool) -> None:
    """W comes back at once to exclusive pages: to those with D alone in 6.1, and to huge pages only since 6.2.

    can_change_pte_writable asked for pte_dirty until 6.2; the ptes that a huge page is split into have no D.
    """
    small, whole, split = (prefaulted(huge=huge, upgrades=upgrades) for huge in (False, True, True))
    for ram, where in (small, (0, 512)), (whole, (0, 512)), (split, (0, 500)):
        ram.protect(*where, 0)
        ram.protect(*where, RW)
    page = np.array([5])
    assert [bool(ram.writable(page)[0]) for ram in (small, whole, split)] == [True, upgrades, upgrades]
    assert not any(serve(ram, 5, store=True)[1] for ram in (small, whole, split))  # theirs alone: nothing is copied


def test_soft_dirty_tracking_outlasts_mprotect() -> None:
    """After clear_refs a page must fault on its next store, so mprotect does not give W back to it."""
    ram = prefaulted(4)
    ram.clear_refs()
    serve(ram, 0, store=True)
    ram.protect(0, 4, int(READ))
    ram.protect(0, 4, RW)
    assert ram.writable(np.arange(4)).tolist() == [True, False, False, False]


def test_fork_leaves_a_mapping_alone_that_never_held_a_page() -> None:
    """Zero pages alone need no copy (vma_needs_copy): KVM is told of nothing; of all once a page was stored to."""
    ram = Backing(4)
    serve(ram, 0, store=False)
    assert ram.fork().size == 0
    serve(ram, 1, store=True)
    assert told(ram.fork()) == (0, 4)


def huge_guest(**switches: object) -> tuple[Guest, Backing]:
    """A guest on huge pages, all mapped by KVM."""
    ram = prefaulted(huge=True)
    machine = guest(HUGE_PAGES, backing=ram, **switches)
    assert touch(machine, (STORE, 0), (LOAD, 400)) == ["slow"]
    return machine, ram


@pytest.mark.parametrize("tdp_mmu", [False, True])
def test_a_huge_page_split_by_a_store_is_gone_from_kvm(tdp_mmu: bool) -> None:
    """The store finds the large spte of the shared page read-only; its copy takes the spte of the whole block away."""
    machine, ram = huge_guest(tdp_mmu=tdp_mmu)
    machine.unmapped(ram, ram.fork())
    assert touch(machine, (LOAD, 400), (STORE, 5)) == ["slow", "retry", "slow"]
    assert touch(machine, (LOAD, 400), (LOAD, 5)) == ["slow"]


@pytest.mark.parametrize("tdp_mmu", [False, True])
def test_pages_outside_the_range_fault_again_after_a_cut(tdp_mmu: bool) -> None:
    """KVM maps 4K pages of a block that a page in its middle is protected in: all of them fault again."""
    ram = prefaulted()
    machine = guest(HUGE_PAGES, backing=ram, tdp_mmu=tdp_mmu)
    pages = [(LOAD, page) for page in range(0, HUGE_PAGES, 8)]
    assert touch(machine, *pages) == ["slow"] * 64
    machine.unmapped(ram, ram.protect(100, 1, int(READ)))
    assert touch(machine, *pages) == ["slow"] * 64


def test_ksm_looks_again_at_what_was_made_mergeable_before() -> None:
    """A store takes a page out; once its bytes are those of a merged page again, the next pass of KSM takes it back."""
    ram = prefaulted(8, content=True)
    assert told(ram.merge(0, 4)) == (0, 4)
    assert serve(ram, 1, store=True) == (True, True, False)
    assert serve(ram, 2, store=True) == (True, True, False)
    ram.bytes[2] = 7
    assert ram.merge(4, 2).tolist() == [1, 4, 5]
    assert ram.writable(np.arange(8)).tolist() == [False, False, True, False, False, False, True, True]
