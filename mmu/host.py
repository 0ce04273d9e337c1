"""Host backing of a guest's memory: which page stands behind each address, may it be written, who else maps it.

KVM asks the host two questions on a slow fault: *which pfn*, and *may it be mapped writable*. The answer depends on
how the host process came by the page: never touched, the shared zero page, its own anonymous page, one that a forked
child or KSM shares (copy on write), or part of a huge page. When the host changes a page it first tells KVM (the mmu
notifier), and KVM drops what it had mapped: the reason why a first store to a zero page costs two faults.

One :class:`Backing` is one anonymous mapping; its state is one byte a page, and every question is asked of whole
arrays of pages. Chapters 1 and 4.

Facts: Linux 6.1 ``mm/memory.c`` (``do_anonymous_page``, ``do_wp_page``), ``mm/mprotect.c``
(``can_change_pte_writable``) and ``virt/kvm/kvm_main.c`` (``hva_to_pfn``); each rule shows in the recorded scenarios.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Pages = NDArray[np.int64]
Bools = NDArray[np.bool]

PAGE = 4096
HUGE_PAGES = 512  # 4K pages in a huge page

PRESENT, WRITABLE, EXCLUSIVE, SHARED, ZERO = (np.uint8(1 << bit) for bit in range(5))
"""State bits of a host page: its host pte is present; has W; the page is anonymous and this mapping's alone; another
process or KSM's tree maps it too (a store copies it); it is the zero page."""

READ, WRITE = np.uint8(1), np.uint8(2)
"""Protection bits of the host mapping itself (``mprotect``)."""

_OWN = PRESENT | WRITABLE | EXCLUSIVE
ZERO_PFN = 1


class Answer(NamedTuple):
    """What the host gives for each page asked for: all arrays ``# (page,)``."""

    pfn: NDArray[np.uint64]
    writable: Bools  # KVM may map the page writable
    notified: Bools  # the host moved the page to serve the request, and told KVM: the fault is stale
    failed: Bools  # the host mapping forbids the access


class Backing:
    """One anonymous host mapping of ``pages`` pages, nothing resident yet.

    Args:
        pages: how many 4K pages.
        huge: True when transparent huge pages may back it (``MADV_HUGEPAGE``) and it starts on a huge-page boundary.
        content: True to keep the bytes too (needed only to predict what reads return).

    ``state`` and ``protection`` hold one byte a page, ``pfn`` one number, ``pmd`` one flag per 2 MiB block that a huge
    page backs. ``bytes`` is ``# (page, 4096)`` or None.

    >>> ram = Backing(4)
    >>> page = np.array([0], dtype=np.int64)
    >>> ram.fault(page, write=np.array([False])).writable, ram.fault(page, write=np.array([True])).notified
    (array([False]), array([ True]))
    """

    def __init__(self, pages: int, *, huge: bool = False, content: bool = False) -> None:
        if pages < 1:
            raise ValueError(f"a backing has {pages} pages; expected at least 1")
        self.pages, self.huge = pages, huge
        self.state = np.zeros(pages, dtype=np.uint8)
        self.protection = np.full(pages, READ | WRITE, dtype=np.uint8)
        self.pfn = np.zeros(pages, dtype=np.uint64)
        self.pmd = np.zeros(-(-pages // HUGE_PAGES), dtype=np.bool)
        self.bytes: NDArray[np.uint8] | None = np.zeros((pages, PAGE), dtype=np.uint8) if content else None
        self._next_pfn = 0x1000

    def _allocate(self, page: Pages) -> None:
        """Give each page a frame of its own; a first touch of an empty block of a huge mapping fills the block."""
        if self.huge:
            block = np.unique(page // HUGE_PAGES)
            first = block[:, None] * HUGE_PAGES + np.arange(HUGE_PAGES, dtype=np.int64)  # (block, page)
            whole = (block + 1) * HUGE_PAGES <= self.pages
            whole[whole] &= ~(self.state[first[whole]] & PRESENT).any(axis=1)
            if whole.any():
                self.pmd[block[whole]] = True
                self._own(first[whole].ravel(), aligned=True)
                page = page[~whole[np.searchsorted(block, page // HUGE_PAGES)]]
        self._own(page)

    def _own(self, page: Pages, *, aligned: bool = False) -> None:
        base = -(-self._next_pfn // HUGE_PAGES) * HUGE_PAGES if aligned else self._next_pfn
        self.pfn[page] = np.arange(base, base + page.size, dtype=np.uint64)
        self._next_pfn = base + page.size
        self.state[page] = _OWN

    def populate(self, first: int = 0, count: int | None = None) -> None:
        """Let the host process itself write pages: each becomes its own, resident and writable."""
        page = np.arange(first, self.pages if count is None else first + count, dtype=np.int64)
        absent = self.state[page] & PRESENT == 0
        self._allocate(page[absent])
        self.fault(page[~absent], np.ones(int((~absent).sum()), dtype=np.bool))

    def fault(self, page: Pages, write: Bools) -> Answer:
        """Serve KVM's requests for pages, each page named at most once, as ``hva_to_pfn`` does.

        A read of an absent page maps the zero page; a store gives the page a frame, copying where it was shared. A
        page that is already writable may be mapped writable for a read too: that is why a read can dirty a page.
        """
        state = self.state[page]
        failed = self.protection[page] & np.where(write, WRITE, READ) == 0
        absent = (state & PRESENT == 0) & ~failed
        store = write & ~failed
        copied = store & (state & PRESENT != 0) & (state & (SHARED | ZERO) != 0)
        reused = store & ~absent & ~copied & (state & WRITABLE == 0)
        self.state[page[absent & ~write]] = PRESENT | ZERO
        self.pfn[page[absent & ~write]] = ZERO_PFN
        self._allocate(page[absent & write])
        self._own(page[copied])
        self.pmd[page[copied] // HUGE_PAGES] = False
        self.state[page[reused]] = _OWN
        return Answer(self.pfn[page], self.state[page] & WRITABLE != 0, copied, failed)

    def writable(self, page: Pages) -> Bools:
        """Which pages a prefetch could take at once: present with W in the host pte (``get_user_pages_fast``)."""
        return self.state[page] & WRITABLE != 0

    def mapped_huge(self, page: Pages) -> Bools:
        """Which pages lie in a block that one huge page backs (``host_pfn_mapping_level``)."""
        return self.pmd[page // HUGE_PAGES]

    def discard(self, first: int, count: int) -> None:
        """``madvise(MADV_DONTNEED)``: nothing is resident any more, the bytes read as zero."""
        where = slice(first, first + count)
        self.state[where], self.pfn[where] = 0, 0
        self._split(first, count)
        if self.bytes is not None:
            self.bytes[where] = 0

    def fork(self) -> None:
        """``fork``: every anonymous page is now shared with the child and loses W in the host pte."""
        own = (self.state & PRESENT != 0) & (self.state & ZERO == 0)
        self.state[own] = PRESENT | SHARED

    def child_exits(self) -> None:
        """The child is gone: its share ends, but W and the mark of exclusive use come back only with the next store."""
        self.state &= ~SHARED

    def protect(self, first: int, count: int, protection: int) -> None:
        """``mprotect``: W leaves the host ptes, or comes back at once to pages known to be exclusive."""
        where = slice(first, first + count)
        self.protection[where] = protection
        state = self.state[where]
        state &= ~WRITABLE
        if protection & WRITE:
            state[state & EXCLUSIVE != 0] |= WRITABLE
        self._split(first, count)

    def clear_refs(self) -> None:
        """``echo 4 > clear_refs``: soft-dirty tracking takes W from every host pte; the pages stay exclusive."""
        self.state &= ~WRITABLE

    def merge(self, first: int, count: int) -> Pages:
        """KSM: pages of equal bytes become one shared, read-only page; returns the pages that were merged.

        Without ``bytes`` every own page in the range counts as equal.
        """
        page = np.arange(first, first + count, dtype=np.int64)
        page = page[(self.state[page] & PRESENT != 0) & (self.state[page] & ZERO == 0)]
        if self.bytes is not None and page.size:
            _, kind, size = np.unique(self.bytes[page], axis=0, return_inverse=True, return_counts=True)
            page = page[size[kind.ravel()] > 1]
        self.state[page] = PRESENT | SHARED
        return page

    def _split(self, first: int, count: int) -> None:
        """A change to part of a huge page splits it into small ones."""
        if self.pmd.any():
            self.pmd[first // HUGE_PAGES : -(-(first + count) // HUGE_PAGES)] = False
