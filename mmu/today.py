"""Races of the design that Linux merged, as texts: what two bits in the spte settle, and what they leave open.

The one idea: once all that the fast path decides on lies in one word, a cmpxchg is enough for permission. What is
lost all the same lies elsewhere: a dirty bit that the CPU sets meanwhile, a TLB that is flushed late, the gfn that an
entry stands for. The language is that of ``mmu.program``; :data:`RACES` says who runs what. Chapter 12. What
chapters 8 to 10 show of the merged design is in ``mmu.protocols``.

Facts: Linux 6.1 ``Documentation/virt/kvm/locking.rst`` and ``mmu.c``. A field or word that no kernel has, kept only to
tell what went wrong, is called a ghost in its comment. That pinning the page would repair an indirect entry is said in
that documentation; how ``GFN_PINNED`` does it is this book's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmu.program import Program

TWO_BITS = """
word spte: host = 1, mmu = 1, w
word wp                     # a ghost: the gfn is a guest page table, the fault never reads it
word lock

fault:
    F0  old = spte; if old.w or not (old.host and old.mmu): done
    F1  cmpxchg spte: (old) -> (old, w=1)

protect:
    P0  take lock
    P1  wp = 1
    P2  old = spte; if not (old.w or old.mmu): P4
    P3  xchg spte: (old, mmu=0, w=0)
    P4  release lock

protect_and_back:           # the same, and then the guest gives the page table up
    P0  take lock
    P1  wp = 1
    P2  old = spte; if not (old.w or old.mmu): P4
    P3  xchg spte: (old, mmu=0, w=0)
    P4  release lock
    U0  take lock
    U1  wp = 0
    U2  xchg spte: (mmu=1)
    U3  release lock

oops: wp and not lock and spte.w
"""

LOST_DIRTY = """
word spte: p = 1, mmu = 1, w, d, written    # written is a ghost: the guest's store has reached the page
word told                                   # KVM has told the host that the page is dirty
word lock

fault:
    F0  old = spte; if not (old.p and old.mmu): done
    F1  cmpxchg spte: (old) -> (old, w=1) else done
    C   cmpxchg spte: (p=1, w=1) -> (d=1, written=1)    # the CPU: one store, and D with it

zap:
    Z0  take lock
    Z1  old = spte; if old.w: Z4            # writable: the CPU may set D at any moment, so exchange
    Z2  spte = (p=0, mmu=0, w=0, d=0); if not old.d: Z6
    Z3  told = 1; if old.d: Z6
    Z4  was = xchg spte: (p=0, mmu=0, w=0, d=0); if not was.d: Z6
    Z5  told = 1
    Z6  release lock

oops: done(zap) and not lock and spte.written and not told
"""

LATE_FLUSH = """
word spte: mmu = 1, w = 1, tlb = 1          # tlb is a ghost: some CPU's TLB holds a writable copy
word wp                                     # a ghost: the gfn is a guest page table
word lock

log:
    D0  take lock
    D1  xchg spte: (w=0)
    D2  release lock
    D3  xchg spte: (tlb=0)                  # the flush, for all pages at once, after the lock

protect:
    P0  take lock
    P1  wp = 1
    P2  was = xchg spte: (mmu=0, w=0); if not was.w: P4
    P3  xchg spte: (tlb=0)
    P4  release lock

oops: wp and not lock and spte.tlb
"""

GFN_DIRECT = """
word spte0: p = 1, mmu = 1, w               # direct: this entry is gfn 0's, and for ever
word spte1: p, mmu, w                       # and this one gfn 1's
word marked(3)                              # 0, or 1 + the gfn whose bit in the dirty bitmap was set last
word lock

fault:
    F0  old = spte0; if old.w or not (old.p and old.mmu): done
    F1  cmpxchg spte0: (old) -> (old, w=1) else done
    M   marked = 1

remap:
    H0  take lock
    H1  xchg spte0: (p=0, mmu=0, w=0)
    H3  spte1 = (p=1, mmu=1, w=0)
    H4  release lock

oops: done(fault) and spte1.w and marked == 1
"""

GFN_PINNED = """
word spte: p = 1, mmu = 1, w
word gfn
word page: owner, pin                       # the host's page: which gfn has it, and whether somebody holds it there
word marked(3)
word lock

fault:
    F0  old = spte; if old.w or not (old.p and old.mmu): done
    G   g = gfn
    N   cmpxchg page: (owner=g) -> (pin=1) else done
    F1  cmpxchg spte: (old) -> (old, w=1) else R
    M   marked = g + 1
    R   xchg page: (pin=0)

remap:
    H0  take lock
    H1  xchg spte: (p=0, mmu=0, w=0)
    HP  cmpxchg page: (owner=0, pin=0) -> (owner=1) else H4
    H2  gfn = 1
    H3  spte = (p=1, mmu=1, w=0)
    H4  release lock

oops: done(fault) and spte.w and gfn == 1 and marked == 1
"""


@dataclass(frozen=True)
class Race:
    """A text, who runs which of its paths, and what its OOPS means, as the end of "OOPS: ..."."""

    text: str
    actors: Sequence[Sequence[str]]
    oops: str

    def program(self) -> Program:
        """The program that is searched and played."""
        return Program(self.text, self.actors)


RACES = {
    "two-bits": Race(
        TWO_BITS,
        (["fault"], ["protect"], ["fault"]),
        "the page is write-protected, nobody is at work on it, and it is writable",
    ),
    "lost-dirty": Race(LOST_DIRTY, (["fault"], ["zap"]), "the guest wrote to the page, and the host was never told"),
    "late-flush": Race(
        LATE_FLUSH,
        (["log"], ["protect"]),
        "a guest page table, the lock free, and a TLB that still lets a CPU write",
    ),
    "gfn-direct": Race(GFN_DIRECT, (["fault"], ["remap"]), "gfn 1 is written, and gfn 0 is noted as dirty"),
    "gfn-pinned": Race(GFN_PINNED, (["fault"], ["remap"]), "gfn 1 is written, and gfn 0 is noted as dirty"),
}
"""The races of chapter 12 by name."""
