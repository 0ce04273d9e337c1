"""The protocols of the book as texts, and their variants as edits of a few lines.

``one-shot`` and ``looping`` are the fast page fault as Xiao Guangrong's message of 2012-03-29 has it (chapters 6 to
10); ``merged`` is the design that Linux 3.6 took instead (chapter 12); ``gfn-aba``, ``zap`` and ``flush`` are the
book's own findings beyond the message (chapters 8 and 12); the ``walk-`` models are a page walk against the freeing of
the page (chapter 5): unprotected, and as in Linux 3.4, in Linux 3.6, and in the TDP MMU. Each text is in the language
of :mod:`mmu.program`; a variant names the steps that it changes, so that two versions differ by what one can read.

What the models leave out: addresses (there is one spte), the TLB (but in ``flush``), the slow path (but past the limit
of marks), and everything of a CPU but its store buffer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mmu.program import Program, edit

SEED_2012 = """
word spte: w, id(vcpu)      # two fields of one 64-bit word; id is 0, or the mark of the vCPU that wants to repair it
word wp                     # PTE_LIST_WRITE_PROTECT, kept in the gfn's rmap
word lock                   # the mmu-lock

fault:                      # the fast path, without the lock
    F0  if spte.w: done
    F1  spte.id = me
    F2  smp_mb
    F3  if wp: done
    F4  cmpxchg spte: (w=0, id=me) -> (w=1, id=0)

protect:                    # write-protect the page, for dirty logging or because it became a page table
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

SLOW_PATH = """
slow:                       # a vCPU without a mark of its own repairs under the lock
    S0  take lock
    S1  if wp: S3
    S2  xchg spte: (w=1, id=0)
    S3  release lock
"""

MERGED = """
word spte: host = 1, mmu = 1, w     # SPTE_HOST_WRITEABLE, SPTE_MMU_WRITEABLE, and the W bit that hardware reads
word lock

fault:
    F0  old = spte; if old.w or not (old.host and old.mmu): done
    F1  cmpxchg spte: (old) -> (old, w=1)

log:                        # dirty logging takes W away, and lets the fast path give it back
    D0  take lock
    D1  old = spte; if not old.w: D3
    D2  xchg spte: (old, w=0)
    D3  release lock

protect:                    # the page became a guest page table: nobody may give W back
    P0  take lock
    P1  old = spte; if not (old.w or old.mmu): P3
    P2  xchg spte: (old, mmu=0, w=0)
    P3  release lock

unprotect:
    U0  take lock
    U1  old = spte
    U2  xchg spte: (old, mmu=1)
    U3  release lock

oops: spte.w and not spte.mmu
"""

GFN_ABA = """
word spte: p = 1, w, id(vcpu)
word gfn                    # which of two gfns this slot of an indirect shadow page stands for
word rmap: wp0, wp1 = 1     # each gfn's PTE_LIST_WRITE_PROTECT: gfn 1 is write-protected from the start
word lock

fault:
    F0  if spte.w or not spte.p: done
    G   g = gfn
    F1  spte.id = me
    F2  smp_mb
    F3  if (g == 0 and rmap.wp0) or (g == 1 and rmap.wp1): done
    F4  cmpxchg spte: (p=1, w=0, id=me) -> (p=1, w=1, id=0)

remap:                      # the host takes the page from gfn 0, and the same pfn comes back for gfn 1
    H0  take lock
    H1  xchg spte: (p=0, w=0, id=0)
    H2  gfn = 1
    H3  spte = (p=1, w=0, id=0)
    H4  release lock

oops: spte.w and gfn == 1 and rmap.wp1 and not lock
"""

GFN_ABA_MERGED = """
word spte: p = 1, mmu = 1, w
word gfn
word marked(3)              # 0, or 1 + the gfn whose bit in the dirty bitmap was set last
word lock

fault:
    F0  old = spte; if old.w or not (old.p and old.mmu): done
    G   g = gfn
    F1  cmpxchg spte: (old) -> (old, w=1) else done
    M   marked = g + 1

remap:
    H0  take lock
    H1  xchg spte: (p=0, mmu=0, w=0)
    H2  gfn = 1
    H3  spte = (p=1, mmu=1, w=0)
    H4  release lock

oops: done(fault) and spte.w and gfn == 1 and marked == 1
"""

ZAP = """
word spte: p = 1, w, id(vcpu)
word wp
word lock

fault:
    F0  if spte.w or not spte.p: done
    F1  spte.id = me
    F2  smp_mb
    F3  if wp: done
    F4  cmpxchg spte: (p=1, w=0, id=me) -> (p=1, w=1, id=0)

zap:                        # the host takes the page back: the spte must stay non-present from now on
    Z0  take lock
    Z1  xchg spte: (p=0, w=0, id=0)
    Z2  release lock

oops: done(zap) and spte.p
"""

ZAP_JUNK = "done(zap) and not spte.p and spte.id"  # the lesser evil: a mark left behind in a non-present spte

FLUSH = """
word spte: w, id(vcpu), tlb # tlb is no bit of the spte: some CPU's TLB holds a writable copy. It stands here because
word wp                     # the hardware's walk reads the spte and fills the TLB at once
word lock

fault:
    F0  if spte.w: A
    F1  spte.id = me
    F2  smp_mb
    F3  if wp: done
    F4  cmpxchg spte: (w=0, id=me) -> (w=1, id=0)
    A   cmpxchg spte: (w=1) -> (tlb=1)      # the guest's store goes through, if hardware finds W

protect:
    W0  take lock
    W1  wp = 1
    W2  smp_mb
    W3  old = spte; if not (old.w or old.id): W6
    W4  xchg spte: (w=0, id=0); if not old.w: W6
    W5  xchg spte: (tlb=0)
    W6  release lock

oops: wp and not lock and spte.tlb
"""

FLUSH_MERGED = """
word spte: mmu = 1, w, tlb
word lock

fault:
    F0  old = spte; if old.w or not old.mmu: A
    F1  cmpxchg spte: (mmu=1, w=0) -> (mmu=1, w=1)
    A   cmpxchg spte: (w=1) -> (tlb=1)      # the guest's store goes through, if hardware finds W

protect:
    P0  take lock
    P1  old = spte
    P2  xchg spte: (mmu=0, w=0); if not old.w: P4
    P3  xchg spte: (tlb=0)
    P4  release lock

oops: not spte.mmu and not lock and spte.tlb
"""

WALK_NONE = """
word entry = 1              # the entry above the page: 0 once the page is unlinked
word freed                  # the page went back to the allocator

walk:
    R2  if not entry: done
    R3  if freed: oops

free:
    Z0  entry = 0
    Z1  smp_mb              # in kvm_flush_remote_tlbs
    Z3  freed = 1
"""

WALK_READER_COUNTER = """
word entry = 1
word freed
word readers(READERS)       # kvm->arch.reader_counter, which every walk writes
word rcu[vcpu]              # 1 while this vCPU is inside rcu_read_lock: a state of its CPU, no store

walk:
    R0  mark rcu[me] = 1
    R1  atomic_inc readers
    RB  smp_mb
    R2  if not entry: RE
    R3  if freed: oops
    RE  smp_mb
    R4  atomic_dec readers
    R5  mark rcu[me] = 0

free:
    Z0  entry = 0
    Z1  smp_mb
    Z2  if not readers: Z4
    Z3[r]  wait not rcu[r]  # somebody reads: call_rcu
    Z4  freed = 1
"""

WALK_MODE = """
word entry = 1
word freed
word mode[vcpu]             # vcpu->mode: 1 READING_SHADOW_PAGE_TABLES, with interrupts off; 0 OUTSIDE_GUEST_MODE

walk:
    R1  mode[me] = 1
    RB  smp_mb
    R2  if not entry: RE
    R3  if freed: oops
    RE  smp_mb
    R4  mode[me] = 0

free:
    Z0  entry = 0
    Z1  smp_mb
    Z2[r]  wait not mode[r] # a vCPU that reads takes the flush's IPI only after its walk, and the sender waits
    Z3  freed = 1
"""

WALK_RCU = """
word entry = 1
word freed
word rcu[vcpu]              # 1 while this vCPU is inside rcu_read_lock: a state of its CPU, no store

walk:
    R1  mark rcu[me] = 1
    R2  if not entry: R4
    R3  if freed: oops
    R4  mark rcu[me] = 0

free:
    Z0  entry = 0
    Z1  smp_mb              # a grace period is a full barrier for whoever waits for it
    Z2[r]  wait not rcu[r]
    Z3  freed = 1
"""


@dataclass(frozen=True)
class Variant:
    """What a variant changes: steps by label (None leaves one out), or the whole text; and how marks are given out."""

    meaning: str
    changes: Mapping[str, str | None] = field(default_factory=dict)
    text: str = ""
    marks: str = "unique"  # or "shared" by all, or the last vCPU of several that fault "wraps" around, or is "slow"


@dataclass(frozen=True)
class Model:
    """A protocol with its variants. ``roles`` are the paths of most vCPUs and of the last one, or of all of them."""

    meaning: str
    text: str
    variants: Mapping[str, Variant]
    roles: Sequence[Sequence[str]]
    forever: bool = False


MOST_VCPUS = 64
"""More are refused: no search of so many would end, and writing their programs down takes long."""

_READ_ALL = "old = spte; if old.w: done"
_SEED = {
    "seed": Variant("as the message of 2012 has it"),
    "no-id": Variant("no identification", {"F1": None, "F2": None, "F4": "cmpxchg spte: (w=0, id=0) -> (w=1, id=0)"}),
    "shared-id": Variant("identification not unique", marks="shared"),
    "protector-w-only": Variant("the protector looks only at w", {"W3": "if not spte.w: W5"}),
    "no-fault-mb": Variant("no smp_mb on the fault side", {"F2": None}),
    "no-protect-mb": Variant("no smp_mb on the protect side", {"W2": None}),
    "no-mb": Variant("no smp_mb at all", {"F2": None, "W2": None}),
    "cmpxchg-id": Variant(
        "id set by a cmpxchg", _CMPXCHG := {"F0": _READ_ALL, "F1": "cmpxchg spte: (old) -> (old, id=me) else done"}
    ),
    "cmpxchg-id-no-fault-mb": Variant("id set by a cmpxchg, no smp_mb on the fault side", {**_CMPXCHG, "F2": None}),
    "cmpxchg-id-no-protect-mb": Variant("id set by a cmpxchg, no smp_mb on the protect side", {**_CMPXCHG, "W2": None}),
    "cmpxchg-shared-id": Variant("id set by a cmpxchg, not unique", _CMPXCHG, marks="shared"),
    "rmw-id": Variant(
        "id set by a 64-bit read-modify-write that is not atomic",
        _RMW := {"F0": _READ_ALL, "F1": "spte = (old, id=me)"},
    ),
    "rmw-shared-id": Variant("the same, not unique", _RMW, marks="shared"),
    "plain-clear": Variant("the protector clears by a plain store", {"W4": "spte = (w=0, id=0)"}),
    "wrapped-id": Variant("one vCPU more than there are marks, and marks wrap around", marks="wraps"),
    "slow-past-limit": Variant(
        "the same, and the vCPU without a mark takes the slow path", text=SEED_2012 + SLOW_PATH, marks="slow"
    ),
}
_READ_PRESENT = "old = spte; if old.w or not old.p: done"
_WALK = {
    "seed": Variant("with every barrier"),
    "no-fault-mb": Variant("no smp_mb between the reader's announcement and its walk", {"RB": None}),
    "no-protect-mb": Variant("no smp_mb between unlinking the page and looking for readers", {"Z1": None}),
    "no-mb": Variant("neither of the two", {"RB": None, "Z1": None}),
    "no-end-mb": Variant("no smp_mb at the end of the walk", {"RE": None}),
}

MODELS: dict[str, Model] = {
    "one-shot": Model(
        "each vCPU runs once: one write-protects, the others fault", SEED_2012, _SEED, (["fault"], ["protect"])
    ),
    "looping": Model(
        "each vCPU faults, write-protects and un-protects for ever",
        SEED_2012,
        _SEED,
        (["fault", "protect", "unprotect"],),
        forever=True,
    ),
    "merged": Model(
        "the design of Linux 3.6: all that is decided on is in one word",
        MERGED,
        {
            "seed": Variant("as merged"),
            "plain-clear": Variant(
                "bits are taken away by plain stores", {"D2": "spte = (old, w=0)", "P2": "spte = (old, mmu=0, w=0)"}
            ),
            "no-cmpxchg": Variant("the fast path sets W by a plain store", {"F1": "spte.w = 1"}),
        },
        (["fault", "log", "protect", "unprotect"],),
        forever=True,
    ),
    "gfn-aba": Model(
        "an indirect spte whose slot comes to stand for another gfn",
        GFN_ABA,
        {
            "seed": Variant("the gfn is read before the spte is marked"),
            "gfn-after": Variant("the gfn is read after the spte is marked", {"G": None, "F2": "smp_mb\nG   g = gfn"}),
            "merged": Variant("a whole-word cmpxchg in the style that was merged", text=GFN_ABA_MERGED),
        },
        (["fault"], ["remap"]),
    ),
    "zap": Model(
        "the host zaps the spte while it is being marked",
        ZAP,
        {
            "seed": Variant("id set by a byte store"),
            "shared-id": Variant("id set by a byte store, not unique", marks="shared"),
            "rmw-id": Variant(_SEED["rmw-id"].meaning, _RMW := {**_RMW, "F0": _READ_PRESENT}),
            "rmw-shared-id": Variant("the same, not unique", _RMW, marks="shared"),
            "cmpxchg-id": Variant("id set by a cmpxchg", _CMPXCHG := {**_CMPXCHG, "F0": _READ_PRESENT}),
            "cmpxchg-shared-id": Variant("id set by a cmpxchg, not unique", _CMPXCHG, marks="shared"),
        },
        (["fault"], ["zap"]),
    ),
    "flush": Model(
        "which write-protection must flush the TLBs",
        FLUSH,
        {
            "seed": Variant("flush if the w that was read was set"),
            "flush-if-cleared": Variant("flush whenever something was cleared", {"W4": "xchg spte: (w=0, id=0)"}),
            "flush-on-xchg": Variant(
                "flush if the w that the xchg returned was set",
                {"W4": "was = xchg spte: (w=0, id=0); if not was.w: W6"},
            ),
            "merged": Variant("the merged design, flush if the w that was read was set", text=FLUSH_MERGED),
            "merged-on-xchg": Variant(
                "the merged design, flush if the w that the xchg returned was set",
                {"P1": None, "P2": "was = xchg spte: (mmu=0, w=0); if not was.w: P4"},
                text=FLUSH_MERGED,
            ),
        },
        (["fault"], ["protect"]),
    ),
    "walk-none": Model(
        "a page walk against the freeing of the page, unprotected",
        WALK_NONE,
        {"seed": _WALK["seed"]},
        (["walk"], ["free"]),
    ),
    "walk-reader-counter": Model(
        "Linux 3.4: a shared counter of readers, and call_rcu while there are any",
        WALK_READER_COUNTER,
        _WALK,
        (["walk"], ["free"]),
    ),
    "walk-mode": Model(
        "Linux 3.6: vcpu->mode tells who reads, and the flush's IPI waits for the end of the walk",
        WALK_MODE,
        _WALK,
        (["walk"], ["free"]),
    ),
    "walk-rcu": Model(
        "the TDP MMU: RCU",
        WALK_RCU,
        {"seed": _WALK["seed"], "no-protect-mb": Variant("a grace period that is no barrier", {"Z1": None})},
        (["walk"], ["free"]),
    ),
}


def text(model: str = "one-shot", variant: str = "seed", vcpus: int = 3) -> str:
    """The text of a variant, as a chapter prints it.

    >>> print(text("one-shot", "no-mb").partition("protect:")[0].partition("fault:")[2].rstrip())
                          # the fast path, without the lock
        F0  if spte.w: done
        F1  spte.id = me
        F3  if wp: done
        F4  cmpxchg spte: (w=0, id=me) -> (w=1, id=0)

    Raises:
        ValueError: no such model, or the model has no such variant.
    """
    if model not in MODELS:
        raise ValueError(f"there is no model {model!r}; there are {', '.join(MODELS)}")
    variants = MODELS[model].variants
    if variant not in variants:
        raise ValueError(f"variant {variant!r} means nothing for the model {model}; it has {', '.join(variants)}")
    whole = variants[variant].text or MODELS[model].text
    return edit(whole, variants[variant].changes).replace("READERS", str(vcpus))


def program(model: str = "one-shot", variant: str = "seed", vcpus: int = 3) -> Program:
    """A variant of a model, bound to so many vCPUs; all but the last do what most do, see :class:`Model`.

    >>> program("looping", "shared-id", 2).marks
    (1, 1)

    Raises:
        ValueError: no such model or variant, or too few vCPUs for it, or more than ``MOST_VCPUS``.
    """
    body, chosen = text(model, variant, vcpus), MODELS[model]
    marks, most = chosen.variants[variant].marks, chosen.roles[0]
    least = len(chosen.roles) + (marks in ("wraps", "slow"))
    if vcpus < least:
        raise ValueError(f"{model} {variant} with {vcpus} vCPUs: it takes {least} at least")
    if vcpus > MOST_VCPUS:
        raise ValueError(f"{model} {variant} with {vcpus} vCPUs: it takes {MOST_VCPUS} at most")
    actors = [most] * (vcpus - len(chosen.roles) + 1) + list(chosen.roles[1:])
    own = list(range(1, vcpus + 1))
    last = vcpus - len(chosen.roles)  # the last of those that fault
    if marks == "shared":
        own = [1] * vcpus
    elif marks == "wraps":
        own[last] = 1
    elif marks == "slow":
        actors[last] = [path if path != "fault" else "slow" for path in most]
    return Program(body, actors, forever=chosen.forever, marks=own, name=f"{model} {variant}")


def one_shot(vcpus: int = 3, variant: str = "seed") -> Program:
    """The one-shot model: the last vCPU write-protects once, the others fault once. The message pictures three."""
    return program("one-shot", variant, vcpus)


def looping(vcpus: int = 3, variant: str = "seed") -> Program:
    """The looping model: every vCPU chooses again and again what to do."""
    return program("looping", variant, vcpus)
