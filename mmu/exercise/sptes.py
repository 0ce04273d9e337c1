"""The exercises of chapter 3: who denies, who write-protected, and what may be repaired."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mmu import paging, spte, update
from mmu.exercise import Case, Exercise, Result

FRAMES = (0x625A, 0, 1, 0x1000, 0xABCDE, (1 << 40) - 1)
"""Page frames that an answer is tried with, the last with every bit of the field set."""


def denying_levels() -> Exercise:
    """The first level, from the root, that denies a user's write; the answer takes ``entries``, gives it or None.

    ``entries`` are four ints, root first; every combination of W and U at each of the four levels is a case.
    """
    clear = np.arange(1 << 8, dtype=np.int64)  # which of W and U are clear: two bits a level, the root's highest
    clear = clear[np.argsort(np.bitwise_count(clear), kind="stable")]
    place = np.array([6, 4, 2, 0], dtype=np.int64)
    lacking = (clear[:, None] >> place & 3).astype(np.uint64) << np.uint64(1)  # (case, level)
    full = np.array([0x1027, 0x2027, 0x3027, 0x1A2B067], dtype=np.uint64)
    paths = full ^ lacking
    column = np.arange(4, dtype=np.int64)
    denied = np.stack(
        [paging.access(np.where(column <= c, paths, full), user=True, write=True).fault for c in column], axis=-1
    )  # (case, level) by this level or one above
    first = np.where(denied.any(axis=-1), 4 - denied.argmax(axis=-1), 0)
    return Exercise(
        "walks",
        [
            Case({"entries": path}, level or None, " ".join(f"{entry:#x}" for entry in path))
            for path, level in zip(paths.tolist(), first.tolist(), strict=True)
        ],
    )


def states() -> Exercise:
    """What HOST_W, MMU_W and W say of a leaf; the answer takes ``host_w, mmu_w, w``, gives a state's name."""
    bits = spte.LAYOUTS["6.1-npt"].bits
    cases = []
    for three in (7, 6, 4, 0, 1, 2, 3, 5):
        host, mmu, w = three >> 2 & 1, three >> 1 & 1, three & 1
        word = bits.pack(P=1, U=1, MMU_P=1, PFN=0x625A, HOST_W=host, MMU_W=mmu, W=w)
        name = spte.STATES[spte.classify(word, "6.1-npt", 1)]
        cases.append(Case({"host_w": host, "mmu_w": mmu, "w": w}, name, f"HOST_W={host} MMU_W={mmu} W={w}"))
    return Exercise("combinations", cases)


def protections(layout: str = spte.DEFAULT) -> Exercise:
    """The word after write-protection; the answer takes ``spte`` and ``shadow`` (a bool), gives the new word."""
    bits = spte.LAYOUTS[layout].bits
    cases = []
    for shadow in (False, True):
        for host, mmu, w in ((1, 1, 1), (1, 1, 0), (1, 0, 0), (0, 0, 0)):
            for dirty in (1, 0):
                word = update.make_spte(0x625A, layout=layout) & ~bits.mask("HOST_W", "MMU_W", "W", "D")
                word |= bits.pack(HOST_W=host, MMU_W=mmu, W=w, D=dirty)
                why = f"it was {spte.STATES[spte.classify(word, layout, 1)]}"
                whose = "a shadowed guest page table" if shadow else "dirty-logged"
                new = update.write_protect(word, shadow=shadow, layout=layout)
                cases.append(Case({"spte": word, "shadow": shadow}, new, f"{word:#x}, now {whose}", why))
    return Exercise("protections", cases, show=_hex)


def repairs(layout: str = spte.DEFAULT) -> Exercise:
    """What the fast path writes for a guest's write; the answer takes ``spte``, gives the new word or None.

    Every combination of the bits that matter, and the special values: nothing, a removed entry, MMIO.
    """
    form = spte.LAYOUTS[layout]
    names = ("MMU_P", "MMU_W", "HOST_W", "W", "D")
    number = np.arange(1 << len(names), dtype=np.int64)
    words = np.full(number.shape, update.make_spte(0x625A, layout=layout) & ~form.bits.mask(*names), dtype=np.uint64)
    for place, name in enumerate(names):
        words |= np.where(number >> place & 1 == 1, np.uint64(form.bits.mask(name)), np.uint64(0))
    states_of = spte.classify(words, layout, 1)
    words = np.concatenate(
        [
            words[(states_of != spte.ILLEGAL) & (states_of != spte.UNKNOWN)],
            np.array([0, form.busy[0] if form.busy else 0, update.make_mmio(0x80000, layout=layout)], dtype=np.uint64),
        ]
    )
    new, outcome = update.fast_page_fault(words, layout=layout)
    return Exercise(
        "sptes",
        [
            Case({"spte": word}, after if what == 0 else None, f"{word:#x}", _state(word, layout))
            for word, after, what in zip(words.tolist(), new.tolist(), outcome.tolist(), strict=True)
        ],
        show=_hex,
    )


def _state(word: int, layout: str) -> str:
    return f"its state: {spte.STATES[spte.classify(word, layout, 1)]}"


def _hex(word: object) -> str:
    return f"{word:#x}" if isinstance(word, int) else repr(word)


WANTED = "read-only for the CPU, and upgradable without the lock"


def read_only_upgradable(layout: str) -> Callable[[Callable[[int], int]], Result]:
    """Build an spte that the CPU reads as read-only and KVM may upgrade; the answer takes ``pfn``, gives the word."""
    exercise = Exercise(
        f"page frames ({layout})", [Case({"pfn": pfn}, WANTED, f"pfn {pfn:#x}") for pfn in FRAMES], show=str
    )

    def check(answer: Callable[[int], int]) -> Result:
        return exercise(lambda pfn: judged(answer(pfn), pfn, layout))

    return check


def judged(word: int, pfn: int, layout: str) -> str:
    """What a word that shall be read-only for the CPU and upgradable by KVM really is; ``WANTED`` if it is that."""
    form = spte.LAYOUTS[layout]
    reads = _cpu_allows(word, form, write=False)
    new, outcome = update.fast_page_fault(word, layout=layout)
    if form.bits.field(word, "PFN") != pfn:
        found = f"of another page, {form.bits.field(word, 'PFN'):#x}"
    elif form.bits.unnamed(word):
        found = f"with bits {form.bits.unnamed(word):#x}, which have no name here"
    elif form.ept and spte.ept_misconfigured(word, 1, maxphyaddr=52) > 1:
        found = "malformed, to the CPU: " + spte.EPT_CHECKS[spte.ept_misconfigured(word, 1, maxphyaddr=52)]
    elif not reads:
        found = "unreadable, to the CPU"
    elif _cpu_allows(word, form, write=True):
        found = "writable, to the CPU"
    elif not spte.is_present(word, form):
        found = "not present, to KVM: MMU_P is clear"
    elif outcome:
        found = f"refused by the fast path: {update.FAST[outcome]}"
    elif (state := spte.classify(word, form, 1)) != spte.DIRTY_LOG:
        found = f"{spte.STATES[state]}: {spte.MEANINGS[state]}"
    elif not _cpu_allows(new, form, write=True):
        found = "refused by the CPU even after the upgrade"
    else:
        return WANTED
    return f"{word:#x}, which is {found}"


def _cpu_allows(word: int, form: spte.SpteLayout, *, write: bool) -> bool:
    if form.ept:
        sound = spte.ept_misconfigured(word, 1, maxphyaddr=52) == 0
        return bool(sound and update.allows(word, write=write, layout=form))
    return not paging.access(np.array([[word]], dtype=np.uint64), user=True, write=write).fault[0]
