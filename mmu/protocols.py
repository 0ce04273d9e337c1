"""The protocols of the book as texts: the race of 2012 and its variants."""
SEED_2012 = """
word spte: w, id(vcpu)      # two fields of one 64-bit word; id is 0, or the mark of the vCPU that wants to repair it
word wp                     # PTE_LIST_WRITE_PROTECT, kept in the gfn's rmap
word lock                   # the mmu-lock

fault:                      # the fast path: no lock
    F0  if spte.w: done
    F1  spte.id = me
    F2  smp_mb
    F3  if wp: done
    F4  cmpxchg spte: (w=0, id=me) -> (w=1, id=0)

protect:                    # the write-protect path
    W0  take lock
    W1  wp = 1
    W2  smp_mb
    W3  if not (spte.w or spte.id): W5
    W4  xchg spte: (w=0, id=0)
    W5  release lock

unprotect:
    U0  take lock
    U1  wp = 0
    U2  release lock

oops: wp and not lock and spte.w
"""

from mmu.program import Program, edit


def one_shot(n=3):
    return Program(SEED_2012, [["fault"]] * (n - 1) + [["protect"]])


def looping(n=3):
    return Program(SEED_2012, [["fault", "protect", "unprotect"]] * n, forever=True)
