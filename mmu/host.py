"""Host backing of a guest's memory: which page stands behind each address, may it be written, who else maps it.

KVM asks the host two questions on a slow fault: *which pfn*, and *may it be mapped writable*. The answer depends on
how the host process came by the page: never touched, the shared zero page, its own anonymous page, one that a forked
child or KSM shares (copy on write), or part of a huge page. When the host changes a page it first tells KVM (the mmu
notifier), and KVM drops what it had mapped: the reason why a first store to a zero page costs two faults.

One :class:`Backing` is one anonymous mapping; its state is one byte a page, and every question is asked of whole
arrays of pages. Every action returns the pages that the notifier named. Chapters 1 and 4.

Facts: Linux 6.1 ``mm/memory.c`` (``do_anonymous_page``, ``do_wp_page``), ``mm/huge_memory.c``
(``do_huge_pmd_wp_page``, ``copy_huge_pmd``, ``__split_huge_pmd``, ``vma_adjust_trans_huge``), ``mm/mmap.c``
(``__split_vma``, ``vma_merge``), ``mm/mprotect.c`` (``can_change_pte_writable``) and ``virt/kvm/kvm_main.c``
(``hva_to_pfn``); each rule shows in the recorded scenarios. Not modelled: in 6.1 a store also copies a page that a
per-CPU batch of ``mm/swap.c`` holds a reference to (inferred); what waits there follows from all that the CPU touched.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Pages = NDArray[np.int64]
Bools = NDArray[np.bool]

PAGE = 4096
HUGE_PAGES = 512  # 4K pages in a huge page

PRESENT, WRITABLE, EXCLUSIVE, SHARED, ZERO, COPIED, SOFT_DIRTY, DIRTY = (np.uint8(1 << bit) for bit in range(8))
"""State bits of a host page: its host pte is present; has W; the page is anonymous and this mapping's alone; a forked
child maps it too; it is the zero page; once it is not exclusive a store copies it, whoever is left (a page of KSM's
tree, or one of a huge page, whose references count for all 512); it was stored to since the last ``clear_refs``; its
host pte has D, which the ptes that a huge page is split into have not."""

READ, WRITE, MERGEABLE = np.uint8(1), np.uint8(2), np.uint8(4)
"""What the host mapping says of a page: its protection (``mprotect``), and that KSM may merge it."""

NO_PMD, TABLE, HUGE = np.arange(3, dtype=np.uint8)  # what a 2 MiB block's pmd is: none, a table of ptes, a huge page

_OWN = PRESENT | WRITABLE | EXCLUSIVE | SOFT_DIRTY | DIRTY
ZERO_PFN, HUGE_ZERO_PFN = 1, HUGE_PAGES


class Answer(NamedTuple):
    """What the host gives for each page asked for: all arrays ``# (page,)``."""

    pfn: NDArray[np.uint64]
    writable: Bools  # KVM may map the page writable
    notified: Bools  # the host moved the page to serve the request, and told KVM: the fault is stale
    failed: Bools  # the host mapping forbids the access
    split: Bools  # it split a huge page for that, and told KVM of all that this one mapped


class Backing:
    """One anonymous host mapping of ``pages`` pages, nothing resident yet.

    Args:
        pages: how many 4K pages.
        huge: True when transparent huge pages may back it (``MADV_HUGEPAGE``).
        content: True to keep the bytes too (needed only to predict what reads return).
        ahead: how many pages its start lies behind a huge-page boundary of the host's addresses.
        upgrades: True when ``mprotect`` gives W back to all exclusive pages (Linux 6.2 and later), huge ones and
            those without D included.

    ``state`` and ``mapping`` hold one byte a page, ``pfn`` one number, ``pmd`` one byte per 2 MiB block.
    ``bytes`` is ``# (page, 4096)`` or None.

    >>> ram = Backing(4)
    >>> page = np.array([0], dtype=np.int64)
    >>> ram.fault(page, write=np.array([False])).writable, ram.fault(page, write=np.array([True])).notified
    (array([False]), array([ True]))
    """

    def __init__(
        self, pages: int, *, huge: bool = False, content: bool = False, ahead: int = 0, upgrades: bool = False
    ) -> None:
        if pages < 1:
            raise ValueError(f"a backing has {pages} pages; expected at least 1")
        self.pages, self.huge, self.ahead, self.upgrades = pages, huge, ahead, upgrades
        self.state = np.zeros(pages, dtype=np.uint8)
        self.mapping = np.full(pages, READ | WRITE, dtype=np.uint8)
        self.pfn = np.zeros(pages, dtype=np.uint64)
        self.pmd = np.full((ahead + pages - 1) // HUGE_PAGES + 1, NO_PMD, dtype=np.uint8)
        self.bytes: NDArray[np.uint8] | None = np.zeros((pages, PAGE), dtype=np.uint8) if content else None
        self._next_pfn = 2 * HUGE_PAGES

    def _block(self, page: Pages) -> Pages:
        return (page + self.ahead) // HUGE_PAGES

    def _of_block(self, block: Pages) -> Pages:
        """All pages of blocks that lie wholly in the mapping  # (block, 512)."""
        return block[:, None] * HUGE_PAGES - self.ahead + np.arange(HUGE_PAGES, dtype=np.int64)

    def _within(self, block: Pages, first: int, end: int) -> Bools:
        """Which blocks lie wholly in pages ``first`` to ``end - 1``."""
        start = block * HUGE_PAGES - self.ahead
        return (start >= first) & (start + HUGE_PAGES <= end)

    def _borders(self) -> Pages:
        """Where one host mapping ends and the next begins: neighbours with the same flags are one."""
        return np.flatnonzero(self.mapping[1:] != self.mapping[:-1]).astype(np.int64) + 1

    # Pages come and go -----------------------------------------------------------------------------------------------

    def _touch(self, page: Pages, write: Bools) -> None:
        """First touches of absent pages: a frame, or the zero page; of an empty block a huge one of either."""
        self.pmd[self._block(page[~self._touch_huge(page, write)])] = TABLE
        small = self.state[page] & PRESENT == 0
        self.state[page[small & ~write]], self.pfn[page[small & ~write]] = PRESENT | ZERO, ZERO_PFN
        self._own(page[small & write])

    def _touch_huge(self, page: Pages, write: Bools) -> Bools:
        """Back empty blocks that one host mapping covers by huge pages; which pages lie in such blocks."""
        block = self._block(page)
        empty = (self.pmd[block] == NO_PMD) & self.huge & self._within(block, 0, self.pages)
        if not empty.any():
            return np.zeros(page.shape, dtype=np.bool)
        borders, start = self._borders(), block * HUGE_PAGES - self.ahead
        empty &= np.searchsorted(borders, start, "right") == np.searchsorted(borders, start + HUGE_PAGES, "left")
        stored = np.unique(block[empty & write])
        read = np.setdiff1d(block[empty], stored)
        self.pmd[stored], self.pmd[read] = HUGE, HUGE
        self._own(self._of_block(stored).ravel(), aligned=True)
        self.state[self._of_block(stored)] |= COPIED
        self.state[self._of_block(read)] = PRESENT | ZERO
        self.pfn[self._of_block(read)] = HUGE_ZERO_PFN + np.arange(HUGE_PAGES, dtype=np.uint64)
        return empty

    def _own(self, page: Pages, *, aligned: bool = False) -> None:
        base = -(-self._next_pfn // HUGE_PAGES) * HUGE_PAGES if aligned else self._next_pfn
        self.pfn[page] = np.arange(base, base + page.size, dtype=np.uint64)
        self._next_pfn = base + page.size
        self.state[page] = _OWN

    def populate(self, first: int = 0, count: int | None = None) -> Pages:
        """Let the host process itself write pages: each becomes its own, resident and writable."""
        page = np.arange(first, self.pages if count is None else first + count, dtype=np.int64)
        answer = self.fault(page, np.ones(page.shape, dtype=np.bool))
        self.state[page] |= DIRTY
        return self._notified(page, answer)

    def _notified(self, page: Pages, answer: Answer) -> Pages:
        """The pages that the notifier names while requests are served."""
        whole = self._of_block(np.unique(self._block(page[answer.split])))
        return np.union1d(page[answer.notified], whole)

    def fault(self, page: Pages, write: Bools) -> Answer:
        """Serve KVM's requests for pages, each page named at most once, as ``hva_to_pfn`` does.

        A read of an absent page maps the zero page; a store gives the page a frame, copying where it was shared. A
        page that is already writable may be mapped writable for a read too: that is why a read can dirty a page.
        """
        failed = self.mapping[page] & np.where(write, WRITE, READ) == 0
        absent = (self.state[page] & PRESENT == 0) & ~failed
        self._touch(page[absent], write[absent])
        state, block = self.state[page], self._block(page)
        late = write & ~failed & (state & WRITABLE == 0)  # a store finds no W in the host pte, or pmd
        alone = (state & EXCLUSIVE != 0) | (state & (SHARED | ZERO | COPIED) == 0)
        huge = self.pmd[block] == HUGE
        alone |= huge & (state & (SHARED | ZERO) == 0)  # a whole huge page is one page, with references of its own
        copied = late & ~alone
        split = copied & huge
        whole = np.unique(block[late & alone & huge])
        self._split(block[split])
        self.state[page[late & alone]] |= _OWN
        self.state[self._of_block(whole)] |= _OWN
        self.pfn[self._of_block(np.unique(block[split & (state & ZERO != 0)]))] = ZERO_PFN
        self._own(page[copied])
        return Answer(self.pfn[page], self.state[page] & WRITABLE != 0, copied, failed, split)

    def writable(self, page: Pages) -> Bools:
        """Which pages a prefetch could take at once: present with W in the host pte (``get_user_pages_fast``)."""
        return self.state[page] & WRITABLE != 0

    def mapped_huge(self, page: Pages) -> Bools:
        """Which pages lie in a block that one huge page backs (``host_pfn_mapping_level``)."""
        return self.pmd[self._block(page)] == HUGE

    def tied(self, page: Pages) -> Bools:
        """Which pages a store to a neighbour in their block can change: a huge page to come, to go or to be reused."""
        block = self.pmd[self._block(page)]
        return (block == HUGE) & (self.state[page] & WRITABLE == 0) | (block == NO_PMD) & self.huge

    # What the host process does --------------------------------------------------------------------------------------

    def discard(self, first: int, count: int) -> Pages:
        """``madvise(MADV_DONTNEED)``: nothing is resident any more, the bytes read as zero."""
        block = np.arange(self._block(first), self._block(first + count - 1) + 1, dtype=np.int64)
        whole = self._within(block, first, first + count)
        huge = self.pmd[block] == HUGE
        self.pmd[block[huge & whole]] = NO_PMD
        self._split(block[huge & ~whole])
        where = slice(first, first + count)
        self.state[where], self.pfn[where] = 0, 0
        if self.bytes is not None:
            self.bytes[where] = 0
        return np.union1d(np.arange(first, first + count, dtype=np.int64), self._of_block(block[huge & ~whole]))

    def fork(self) -> Pages:
        """``fork``: every anonymous page is now shared with the child and loses W in the host pte, or pmd.

        A mapping that never held a page of its own is not copied at all (``vma_needs_copy``).
        """
        own = (self.state & PRESENT != 0) & (self.state & ZERO == 0)
        self.state[own] = self.state[own] & ~(WRITABLE | EXCLUSIVE) | SHARED
        written = self._next_pfn > 2 * HUGE_PAGES
        return np.arange(self.pages if written else 0, dtype=np.int64)

    def child_exits(self) -> None:
        """The child is gone: its share ends, but W and the mark of exclusive use come back only with the next store."""
        self.state &= ~SHARED

    def protect(self, first: int, count: int, protection: int) -> Pages:
        """``mprotect``: W leaves the host ptes, or comes back at once to pages known to be exclusive.

        Where that cuts a host mapping in two within a block, the block's huge page is split, and the notifier names
        the whole block, be there a huge page or not. A part that has this protection already is left alone.
        """
        said = [np.zeros(0, dtype=np.int64)]
        for start, end in self._vmas(first, first + count):
            flags = self.mapping[start] & MERGEABLE | np.uint8(protection)
            if flags == self.mapping[start]:
                continue
            low, high = max(start, first), min(end, first + count)
            said += [self._cut(low, start, end), self._cut(high, low, end), np.arange(low, high, dtype=np.int64)]
            where = slice(low, high)
            self.mapping[where] = flags
            state = self.state[where]
            state &= ~WRITABLE
            if protection & WRITE:
                back = state & (EXCLUSIVE | SOFT_DIRTY) == EXCLUSIVE | SOFT_DIRTY
                if not self.upgrades:
                    back &= (state & DIRTY != 0) & ~self.mapped_huge(said[-1])
                state[back] |= WRITABLE
        return np.unique(np.concatenate(said))

    def clear_refs(self) -> Pages:
        """``echo 4 > clear_refs``: soft-dirty tracking takes W from every host pte; the pages stay exclusive."""
        self.state &= ~(WRITABLE | SOFT_DIRTY)
        return np.arange(self.pages, dtype=np.int64)

    def merge(self, first: int, count: int) -> Pages:
        """KSM: pages of equal bytes become one shared, read-only page; returns the pages that the notifier named.

        It looks at all that was ever made mergeable, so a page that a store took out may go in again. Without
        ``bytes`` all pages count as equal.
        """
        said = [np.zeros(0, dtype=np.int64)]
        for start, end in self._vmas(first, first + count):
            if not self.mapping[start] & MERGEABLE:
                low, high = max(start, first), min(end, first + count)
                said += [self._cut(low, start, end), self._cut(high, low, end)]
        self.mapping[first : first + count] |= MERGEABLE
        page = np.flatnonzero((self.mapping & MERGEABLE != 0) & (self.state & PRESENT != 0) & (self.state & ZERO == 0))
        if self.bytes is not None and page.size:
            _, kind, size = np.unique(self.bytes[page], axis=0, return_inverse=True, return_counts=True)
            page = page[size[kind.ravel()] > 1]
        page = page[self.state[page] & (COPIED | EXCLUSIVE) != COPIED]  # the others are merged already
        self.state[page] = PRESENT | COPIED
        return np.unique(np.concatenate([*said, page]))

    def _vmas(self, first: int, end: int) -> list[tuple[int, int]]:
        """The host mappings that cover pages ``first`` to ``end - 1``, each by its first page and its end."""
        borders = [0, *self._borders().tolist(), self.pages]
        return [(low, high) for low, high in pairwise(borders) if low < end and first < high]

    def _cut(self, at: int, start: int, end: int) -> Pages:
        """A border appears in the mapping from ``start`` to ``end``: its huge page is split, the notifier told."""
        block = self._block(np.array([at], dtype=np.int64))
        if (at + self.ahead) % HUGE_PAGES == 0 or not self._within(block, start, end).all():
            return np.zeros(0, dtype=np.int64)
        self._split(block[self.pmd[block] == HUGE])
        return self._of_block(block).ravel()

    def _split(self, block: Pages) -> None:
        """Huge pages become tables of ptes that map the same pages."""
        self.pmd[block] = TABLE
        self.state[self._of_block(block)] &= ~DIRTY
