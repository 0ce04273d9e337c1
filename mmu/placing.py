"""Where to begin and where to end: each way to place a reader's announcement and a reclaimer's look, as a program.

A walk has two steps: it reads the entry that leads to a page, and it uses the page. Around and between them stand a
begin and an end, which set and clear a flag; the reclaimer unlinks the page and looks at the flag, in some order or
not at all; on each side a barrier may stand. :data:`ALL` has every combination. Chapter 5 plays with them, and what is
said about each comes from its state graph, :func:`mmu.board.board`. A step is labelled as in the model of Linux 3.6
(``walk-mode`` in :mod:`mmu.protocols`).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from mmu.program import Program

NOWHERE, FIRST, BETWEEN, LAST = "nowhere", "before", "between", "after"
PLACES = (FIRST, BETWEEN, LAST)
"""Where a begin or an end may stand: before the entry is read, between that and the use of the page, after it."""
NEVER, TOO_EARLY, IN_TIME = "never", "before unlinking", "after unlinking"
LOOKS = (NEVER, TOO_EARLY, IN_TIME)
"""When the reclaimer looks at the flag, and waits while it is set."""


@dataclass(frozen=True)
class Placing:
    """One way to do it.

    Args:
        begin: where the flag is set, one of :data:`PLACES` or ``"nowhere"``.
        end: where it is cleared; not before ``begin``, and nowhere if there is no begin.
        reader_mb: a full barrier stands behind the begin.
        looks: when the reclaimer looks, one of :data:`LOOKS`.
        reclaimer_mb: a full barrier stands between the reclaimer's first two steps.
    """

    begin: str
    end: str
    reader_mb: bool
    looks: str
    reclaimer_mb: bool

    def __post_init__(self) -> None:
        if self.begin == self.end == NOWHERE:
            return
        if self.begin not in PLACES or self.end not in PLACES or PLACES.index(self.end) < PLACES.index(self.begin):
            raise ValueError(f"begin {self.begin!r} and end {self.end!r}; expected places of {PLACES} in that order")

    def walk(self) -> list[str]:
        """The reader's steps."""
        steps = []
        for place, own in zip(PLACES, ("R2  page = entry", "R3  if page and freed: oops", ""), strict=True):
            if self.begin == place:
                steps += ["R1  mode[me] = 1"] + ["RB  smp_mb"] * self.reader_mb
            if self.end == place:
                steps += ["R4  mode[me] = 0"]
            steps += [own] * bool(own)
        return steps

    def free(self) -> list[str]:
        """The reclaimer's steps."""
        unlink, look = "Z0  entry = 0", "Z2[r]  wait not mode[r]"
        first, *rest = {NEVER: [unlink], TOO_EARLY: [look, unlink], IN_TIME: [unlink, look]}[self.looks]
        return [first, *["Z1  smp_mb"] * self.reclaimer_mb, *rest, "Z3  freed = 1"]

    def program(self, vcpus: int = 2) -> Program:
        """The program for so many vCPUs, of which the last frees.

        >>> print(Placing("before", "after", True, "after unlinking", True).program().text.partition("free:")[2])
        <BLANKLINE>
            Z0  entry = 0
            Z1  smp_mb
            Z2[r]  wait not mode[r]
            Z3  freed = 1
        oops: 0
        <BLANKLINE>
        """
        walk, free = ("".join(f"    {step}\n" for step in steps) for steps in (self.walk(), self.free()))
        text = f"word entry = 1\nword freed\nword mode[vcpu]\nwalk:\n{walk}free:\n{free}oops: 0\n"
        return Program(text, [["walk"]] * (vcpus - 1) + [["free"]])


_PAIRS = [(NOWHERE, NOWHERE), *((b, e) for b, e in product(PLACES, PLACES) if PLACES.index(b) <= PLACES.index(e))]
ALL = tuple(
    Placing(begin, end, reader_mb, looks, reclaimer_mb)
    for (begin, end), reader_mb, looks, reclaimer_mb in product(_PAIRS, (False, True), LOOKS, (False, True))
)
"""Every combination."""
