"""The exercises of chapter 12: what the fast path may touch, what access tracking must save, a counter in an int."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mmu import spte, update
from mmu.exercise import Case, Exercise, Result

LAYOUTS = ("3.6-ept", "3.6-shadow", "5.10-ept", "5.10-shadow", "6.1-ept", "6.1-npt", "6.12-ept", "6.12-npt")


def fixable() -> Exercise:
    """Whether the fast path may set W in a 4 KiB entry of a direct table; the answer takes ``word`` and ``layout``.

    The words are the four legal leaves of each layout, and what stands in an entry that maps nothing.
    """
    cases = []
    for name in LAYOUTS:
        form = spte.LAYOUTS[name]
        common = {"P": 1, "R": 1, "U": 1, "X": 1, "MT": 6, "A": 1, "MMU_P": 1, "PFN": 0x34D4F}
        present = {field: value for field, value in common.items() if field in form.bits}
        words = {
            f"HOST_W={host} MMU_W={mmu} W={w}": form.bits.pack(**present, HOST_W=host, MMU_W=mmu, W=w)
            for host, mmu, w in ((1, 1, 0), (1, 1, 1), (1, 0, 0), (0, 0, 0))
        }
        words["nothing mapped"] = form.none
        if form.busy is not None:
            words[spte.STATES[form.busy[1]]] = form.busy[0]
        for said, word in words.items():
            right = bool(spte.classify(word, form, 1) == spte.DIRTY_LOG)
            cases.append(Case({"word": word, "layout": name}, right, f"{word:#x} in {form.kernel}", said))
    return Exercise("entries", cases)


START = 0x21000034D4FE875 | 1 << 58
"""An entry of EPT without A/D bits: R and X, HOST_W and MMU_W; the dirty log has just taken W away."""


def tracking(layout: str = "6.1-ept", longest: int = 6) -> Callable[..., Result]:
    """Access tracking: the answer is ``hide(word)`` and ``give_back(word, write)``; every short history is tried.

    A history is any order of the host asking whether the page is used (*age*), the dirty log being read (*log*), and
    the guest's *read* and *write*. A fault that newly sets W notes the page as dirty, as Linux 6.1 does. The note must
    at all times say whether the page was written since the log was last read.
    """
    form = spte.LAYOUTS[layout]
    rights = form.bits.mask("R", "W", "X")
    r, w, x = (form.bits.mask(name) for name in ("R", "W", "X"))

    def answer(hide: Callable[[int], int], give_back: Callable[[int, bool], int]) -> Result:
        states: dict[tuple[int, bool, bool], tuple[str, ...]] = {(START, False, False): ()}
        queue = list(states)
        for here in queue:  # breadth first: the list grows while it is walked
            (word, noted, written), before = here, states[here]
            if len(before) == longest:
                continue
            for event in ("age", "log", "read", "write"):
                told = ", ".join([*before, event])
                old, note, wrote = word, noted, written
                new = old
                if event == "age" and old & rights:
                    new = hide(old)
                    if new & rights:
                        return Result(False, f"Not yet: {told}: the CPU still sees rights in {new:#x}.")
                elif event == "log":
                    new, note, wrote = update.write_protect(old, layout=form), False, False
                elif event == "read" and not old & r:
                    new = give_back(old, False)
                    if (new & (r | x)) != r | x:
                        return Result(False, f"Not yet: {told}: R and X are not back in {new:#x}.")
                elif event == "write":
                    if not old & w:
                        new = give_back(old, True) if not old & rights else old | w
                    wrote = True
                    if not new & w:
                        return Result(False, f"Not yet: {told}: the guest still cannot write with {new:#x}.")
                if event in ("read", "write"):
                    note = note or bool(new & w and not old & w)
                    if form.bits.field(new, "SAVED_R") or form.bits.field(new, "SAVED_X") or new & 1 << 55:
                        return Result(False, f"Not yet: {told}: {new:#x} still keeps saved rights.")
                if note != wrote:
                    fault = "was written, and is not noted" if wrote else "is noted as dirty, and nobody wrote"
                    return Result(False, f"Not yet: {told}: the page {fault}.")
                if (new, note, wrote) not in states:
                    states[new, note, wrote] = (*before, event)
                    queue.append((new, note, wrote))
        return Result(True, f"Right: {len(states)} states, in all histories of up to {longest} events.")

    return answer


def hangs() -> Exercise:
    """Whether every fault is stale once the 64-bit counter has this value and is kept in an int; takes ``seq``."""
    near = [1 << 31, 1 << 32, 1 << 33, 1 << 63]
    seqs = [0, 1, 0x2DC25, *(n + step for n in near for step in (-1, 0, 1)), 0x8002DC25, 0x18002DC25, (1 << 64) - 1]
    seqs += [(1 << 64) - (1 << 31) - 1, (1 << 64) - (1 << 31)]
    counter = np.array(sorted(seqs), dtype=np.uint64)  # (case,)
    kept = counter.astype(np.uint32).view(np.int32)  # what an int keeps
    stale = kept.astype(np.int64).view(np.uint64) != counter  # widened again, with its sign
    return Exercise(
        "values of the counter",
        [
            Case({"seq": seq}, again, f"seq={seq:#x}", f"comes back as {back:#x}")
            for seq, again, back in zip(
                counter.tolist(), stale.tolist(), kept.astype(np.int64).view(np.uint64).tolist(), strict=True
            )
        ],
    )
