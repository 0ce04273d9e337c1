"""Exercises that check themselves: an answer is right on every case, or it gets one case on which it is not.

The one idea: an exercise is a list of cases with the right result for each, computed or recorded elsewhere. A wrong
answer is never told that it is wrong without the smallest thing that shows it: a counterexample.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


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


def count(what: str, counts: NDArray[np.bool]) -> Callable[[int], Result]:
    """An exercise whose answer is a number: how many entries of ``counts`` ``# (item,)`` are True.

    Args:
        what: what each entry of ``counts`` stands for, in the plural.
        counts: bool, True for those that the reader has to count.

    >>> count("numbers", np.arange(5) % 2 == 1)(1)
    Not yet: of 5 numbers, 1 is too few; the first is at place 1 (counting from 0), the next at 3.
    """
    places = np.flatnonzero(counts).tolist()

    def answer(guess: int) -> Result:
        if guess == len(places):
            return Result(True, f"Right: {len(places)} of {len(counts)} {what}.")
        amount = "few" if guess < len(places) else "many"
        hint = "there are none"
        if places:
            hint = f"the first is at place {places[0]} (counting from 0), "
            hint += f"the next at {places[1]}" if places[1:] else "and it is the only one"
        return Result(False, f"Not yet: of {len(counts)} {what}, {guess} is too {amount}; {hint}.")

    return answer
