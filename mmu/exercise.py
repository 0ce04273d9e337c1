"""Exercises that check themselves: an answer is right on every case, or it gets one case on which it is not.

The one idea: an exercise is a list of cases with the right result for each, computed or recorded elsewhere. A wrong
answer is never told that it is wrong without the smallest thing that shows it: a counterexample.
"""

from __future__ import annotations

import csv
import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmu import pfec


@dataclass(frozen=True)
class Case:
    """One call of the answer: keyword arguments, the expected result, and how to say both to a reader."""

    arguments: Mapping[str, Any]
    expected: Any
    said: str
    why: str = ""


@dataclass(frozen=True)
class Result:
    """How an answer fared; its ``repr`` is what the reader sees under the cell."""

    right: bool
    message: str = field(repr=False)

    def __repr__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Exercise:
    """A question with its cases; call it with a function to have the answer checked.

    Args:
        what: what a case is called, in the plural ("error codes").
        cases: in the order in which a counterexample shall be looked for, simplest first.
        show: how to print a result; ``repr`` when not given.

    >>> double = Exercise("numbers", [Case({"n": n}, 2 * n, f"n={n}", "twice is n + n") for n in range(4)])
    >>> double(lambda n: n + n)
    Right: all 4 numbers agree.
    >>> double(lambda n: n * n)
    Not yet: 2 of 4 numbers differ. The first is n=1: you answered 1, expected 2. (twice is n + n)
    """

    what: str
    cases: Iterable[Case]
    show: Callable[[Any], str] = repr

    def __call__(self, answer: Callable[..., Any]) -> Result:
        """Check ``answer`` on every case; whatever it raises is part of the counterexample."""
        cases, wrong = list(self.cases), []
        for case in cases:
            try:
                given = answer(**case.arguments)
                failed = bool(given != case.expected)
                told = self.show(given) if failed else ""
            except Exception as error:  # a reader's half-written function may raise anything
                failed, told = True, f"{type(error).__name__}: {error}"
            if failed:
                wrong.append((case, told))
        if not wrong:
            return Result(True, f"Right: all {len(cases):,} {self.what} agree.")
        first, told = wrong[0]
        because = f" ({first.why})" if first.why else ""
        return Result(
            False,
            f"Not yet: {len(wrong):,} of {len(cases):,} {self.what} differ. The first is {first.said}: "
            f"you answered {told}, expected {self.show(first.expected)}.{because}",
        )


def altered(function: Callable[..., Any], old: str, new: str) -> Callable[..., Any]:
    """``function`` with one piece of its source text replaced: the wrong try that differs from a solution by one line.

    Raises:
        ValueError: ``old`` does not stand in the function's source exactly once.
    """
    source = textwrap.dedent(inspect.getsource(function))
    if source.count(old) != 1:
        raise ValueError(f"{old!r} stands {source.count(old)} times in {function.__name__}; expected exactly once")
    names = dict(function.__globals__)
    exec(source.replace(old, new), names)  # the reader's own function, changed by one line
    return names[function.__name__]


# Chapter 2 ------------------------------------------------------------------------------------------------------------


def code_rule(rule: str) -> Exercise:
    """Chapter 2: which codes may try the fast path under ``rule``; the answer takes ``code``, gives a bool."""
    return Exercise(
        "error codes",
        [
            Case({"code": code}, pfec.can_be_fast(code, rule), f"{code:#04x} ({pfec.PFEC.text(code)})", because)
            for code in range(32)
            if not pfec.impossible(code)
            for because in [pfec.verdict(code, rule).reason]
        ],
    )


def impossible_codes() -> Exercise:
    """Chapter 2: which of the 32 codes cannot occur; the answer takes ``code``, gives a bool."""
    return Exercise(
        "error codes",
        [
            Case({"code": code}, pfec.impossible(code), f"{code:#04x} ({pfec.PFEC.text(code)})", because)
            for code in range(32)
            for because in [pfec.verdict(code).reason]
        ],
    )


def qualifications() -> Exercise:
    """Chapter 2: what KVM makes of each exit qualification that EPT can give; the answer takes and gives an int."""
    rights, access = np.meshgrid(np.arange(8, dtype=np.int64), np.array([1, 2, 4], dtype=np.int64), indexing="ij")
    final = pfec.ept_violation(rights, access).ravel()
    walks = [pfec.ept_walk_violation(np.arange(8, dtype=np.int64), ept_ad=ad, update=True) for ad in (False, True)]
    seen = np.unique(np.concatenate([final, *walks]))
    return Exercise(
        "exit qualifications",
        [
            Case({"qualification": q}, pfec.from_ept(q), f"{q:#x} ({pfec.EPT_QUALIFICATION.text(q)})")
            for q in seen[seen > 0].tolist()
        ],
        show=lambda code: f"{pfec.PFEC.text(code)} ({code:#x})" if isinstance(code, int) else repr(code),
    )


ROW_FLAGS = ("p", "w", "u", "nx", "rsvd", "wp", "nxe", "smep", "smap", "ac")


def recorded_faults(table: str) -> Exercise:
    """Chapter 2: the error code of each recorded access, or None where it passed; ``table`` is the table's CSV text.

    The answer takes the entry's ``p w u nx rsvd``, the access's ``write fetch user`` and the CPU's
    ``wp nxe smep smap ac``, all bools.
    """
    rows = list(csv.DictReader(line for line in table.splitlines() if not line.startswith("#")))
    rows.sort(key=lambda row: sum(row[name] == "1" for name in ROW_FLAGS))  # the plainest counterexample first
    access = {"R": "read", "W": "write", "X": "fetch"}
    cases = []
    for row in rows:
        flags = {name: row[name] == "1" for name in ROW_FLAGS}
        flags |= {"write": row["access"] == "W", "fetch": row["access"] == "X", "user": row["mode"] == "U"}
        mode = "user" if flags["user"] else "supervisor"
        on = " ".join(name.upper() for name in ROW_FLAGS if flags[name]) or "nothing"
        said = f"a {mode} {access[row['access']]} with {on} set"
        cases.append(Case(flags, None if row["err"] == "-" else int(row["err"], 16), said))
    return Exercise("recorded accesses", cases, show=lambda code: "no fault" if code is None else f"{code:#x}")


def count(what: str, counts: NDArray[np.bool]) -> Callable[[int], Result]:
    """An exercise whose answer is a number: how many entries of ``counts`` ``# (item,)`` are True.

    >>> count("odd numbers", np.arange(5) % 2 == 1)(1)
    Not yet: 1 is too few odd numbers of 5; number 1 (from 0) is one, number 3 is the next.
    """
    places = np.flatnonzero(counts).tolist()

    def answer(guess: int) -> Result:
        if guess == len(places):
            return Result(True, f"Right: {len(places)} {what} of {len(counts)}.")
        amount = "few" if guess < len(places) else "many"
        hint = "; there are none"
        if places:
            hint = f"; number {places[0]} (from 0) is one"
            hint += f", number {places[1]} is the next" if places[1:] else " and the only one"
        return Result(False, f"Not yet: {guess} is too {amount} {what} of {len(counts)}{hint}.")

    return answer
