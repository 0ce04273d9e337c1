"""The player of a page walk: four levels whose rights are ANDed on the way down (chapter 3)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mmu import paging, pfec
from mmu.widgets.player import Player

LEVELS = (4, 3, 2, 1)
RIGHTS = ("W", "U", "X")
ACCESSES = {
    "a user's read": {"user": True},
    "a user's write": {"user": True, "write": True},
    "a user's fetch": {"user": True, "fetch": True},
    "the kernel's write": {"write": True},
}
"""The accesses that the player makes, with CR0.WP and EFER.NXE set, SMEP and SMAP clear."""
NEEDS = {"a user's read": "U", "a user's write": "WU", "a user's fetch": "UX", "the kernel's write": "W"}

CASES = (
    ("Every level permits it.", "a user's write", {}),
    ("A program stores, and is stopped. Which level said no?", "a user's write", {3: "W"}),
    ("The same store, stopped again. Which level?", "a user's write", {1: "W"}),
    ("A program only reads, and is stopped.", "a user's read", {4: "U"}),
    ("A program jumps to an address of its own.", "a user's fetch", {2: "X"}),
    ("Two levels say no. Is it enough to convince one of them?", "a user's write", {3: "W", 1: "W"}),
    ("The kernel writes to a page that user mode may not touch.", "the kernel's write", {4: "U", 3: "U", 2: "U"}),
)
"""What the player starts from: a sentence, an access, and the rights that a level lacks."""

_TABLES = {4: 0x1021, 3: 0x2021, 2: 0x3021, 1: 0x1A2B021}  # P and A, and where the next table or the page is


def entries(states: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The four entries of each state ``# (state,)``, root first ``# (state, level)``.

    A state is a 12-bit number: three bits a level, W, U and X from the lowest, level 1 in the lowest three.
    """
    words = []
    for level in LEVELS:
        rights = states >> 3 * (level - 1)
        word = np.full(states.shape, _TABLES[level], dtype=np.uint64)
        for bit, (flag, on) in enumerate([(paging.W, True), (paging.U, True), (paging.NX, False)]):
            word |= np.where((rights >> bit & 1 == 1) == on, flag, np.uint64(0))
        words.append(word)
    return np.stack(words, axis=-1)


def left_below(path: NDArray[np.uint64]) -> NDArray[np.int64]:
    """What is left of W, U and X below each level of each path ``# (state, level)``, as a number of three bits."""
    permits = entries(np.array((1 << 12) - 1, dtype=np.int64))  # (level,) an entry that takes nothing away
    column = np.arange(len(LEVELS), dtype=np.int64)
    left = []
    for depth in column:
        walk = paging.descend(np.where(column <= depth, path, permits))
        left.append(walk.writable * 1 + walk.user_page * 2 + walk.executable * 4)
    return np.stack(left, axis=-1)  # (state, level)


def verdicts(name: str, path: NDArray[np.uint64]) -> list[str]:
    """A sentence on the access called ``name`` through each path ``# (path, level)``."""
    out = paging.access(path, **ACCESSES[name])
    said = []
    for rest, fault, code in zip(left_below(path)[:, -1].tolist(), out.fault.tolist(), out.code.tolist(), strict=True):
        if fault:
            gone, verb = _lacking(name, rest)
            said.append(f"{name} faults with {code:#04x} {pfec.PFEC.text(code)}: {gone} {verb[0]} not reach the page")
        else:
            reach = "reaches" if len(NEEDS[name]) == 1 else "reach"
            said.append(f"{name} passes: {' and '.join(NEEDS[name])} {reach} the page")
    return said


def _lacking(name: str, rights: int) -> tuple[str, tuple[str, str]]:
    gone = [right for right in NEEDS[name] if not rights >> RIGHTS.index(right) & 1]
    return " and ".join(gone), ("do", "are") if gone[1:] else ("does", "is")


def pointed(name: str, level: int, rights: int) -> str:
    """What is said to a reader who points at ``level``, whose entry has ``rights``, as the one that denies."""
    gone, verb = _lacking(name, rights)
    if gone:
        return f"Level {level} denies it: {gone} {verb[1]} clear there."
    return f"Level {level} permits it: it has {' and '.join(NEEDS[name])}."


class WalkPlayer(Player):
    """Clear and set W, U and X at each of four levels and see what is left of them at the page. Chapter 3."""

    module = "walk"

    def __init__(self) -> None:
        states = np.arange(1 << 12, dtype=np.int64)
        path = entries(states)  # (state, level)
        at_the_page = np.arange(8, dtype=np.int64) | (1 << 12) - 8  # what the leaf has, below levels that permit all
        words = [entries(np.arange(8, dtype=np.int64) << 3 * (level - 1))[:, 4 - level].tolist() for level in LEVELS]
        cases = []
        for sentence, access, lacks in CASES:
            lacking = [3 * (level - 1) + RIGHTS.index(right) for level, right in lacks.items()]
            state = (1 << 12) - 1 - sum(1 << bit for bit in lacking)
            cases.append({"text": sentence, "access": list(ACCESSES).index(access), "state": state})
        super().__init__(
            alt="A page walk over four levels with switches for W, U and X at each, what is left of these rights below "
            f"each level, and whether an access passes; {len(CASES)} cases ask which level denies.",
            data={
                "levels": list(LEVELS),
                "rights": list(RIGHTS),
                "words": [[f"{word:#x}" for word in column] for column in words],
                "left": ["".join(str(rest) for rest in column) for column in left_below(path).T.tolist()],
                "accesses": list(ACCESSES),
                "said": [verdicts(name, entries(at_the_page)) for name in ACCESSES],
                "pointed": [
                    [[pointed(name, level, rights) for rights in range(8)] for level in LEVELS] for name in ACCESSES
                ],
                "cases": cases,
            },
        )
