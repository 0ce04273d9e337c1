"""The exercises of chapter 11: a queue, its limits, and what few runs can show."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mmu import trials
from mmu.exercise import Case, Exercise

_LISTS = (
    ([0], [2]),
    ([0, 5], [2, 2]),
    ([0, 1], [2, 2]),
    ([0, 1, 2], [3, 1, 1]),
    ([0, 4, 5, 20], [2, 3, 1, 1]),
    ([1, 1, 1], [2, 2, 2]),
    ([0, 1, 9, 10, 11], [4, 4, 1, 5, 1]),
)


def departures() -> Exercise:
    """When each vCPU lets go of the lock; the answer takes ``arrivals`` in order, and ``holds``, gives a list."""
    cases = []
    for arrivals, holds in _LISTS:
        leaves: list[int] = []
        for arrival, hold in zip(arrivals, holds, strict=True):
            leaves.append(max(arrival, leaves[-1] if leaves else 0) + hold)
        said = f"arrivals {arrivals}, holds {holds}"
        why = "the lock is free only once the one before has let go, and nobody starts before arriving"
        cases.append(Case({"arrivals": arrivals, "holds": holds}, leaves, said, why))
    return Exercise("lists of arrivals", cases)


def cycles() -> Exercise:
    """Fixed times: from a vCPU's fault to its next; the answer takes ``vcpus``, ``think``, ``hold``, gives a number."""
    cases = []
    for vcpus, think, hold in [(1, 3, 1), (2, 3, 1), (4, 3, 1), (5, 3, 1), (64, 10, 1), (8, 100, 5), (416, 9, 2)]:
        enough = "the lock has time to spare" if think + hold >= vcpus * hold else "the lock is never free"
        said = f"{vcpus} vCPU{'s' * (vcpus > 1)}, think {think}, hold {hold}"
        cases.append(
            Case({"vcpus": vcpus, "think": think, "hold": hold}, max(think + hold, vcpus * hold), said, enough)
        )
    return Exercise("settings", cases)


def _compared(row: trials.Comparison) -> tuple[list[float], list[float], str]:
    return list(row.before), list(row.after), f"{row.test}, {row.mmu}"


def deals() -> Exercise:
    """Of all ways to deal the runs, how many look as good; the answer takes ``before``, ``after``, gives a count.

    Cases are the message's migrations and a few that have ties.
    """
    made: list[tuple[Sequence[float], Sequence[float], str]] = [
        ([2.0], [1.0], "one run each, 2 and 1"),
        ([1.0], [2.0], "one run each, 1 and 2"),
        ([5.0, 5.0], [5.0, 5.0], "two runs each, all 5"),
        ([9.0, 8.0], [1.0, 2.0], "two runs each, 9 8 and 1 2"),
    ]
    made += [_compared(row) for row in trials.SEED if len(row.before) > 1]
    return Exercise(
        "comparisons",
        [
            Case(
                {"before": before, "after": after},
                trials.permutation(before, after).as_good,
                said,
                f"there are {math.comb(len(before) + len(after), len(after))} ways, the one that happened among them",
            )
            for before, after, said in made
        ],
    )


def enough_runs() -> Exercise:
    """The fewest runs an arm whose two-sided test can reach ``level`` at all; the answer takes it, gives a number."""
    cases = []
    for level in (0.5, 0.2, 0.1, 0.05, 0.01, 0.001):
        runs = next(n for n in range(1, 20) if 2 / math.comb(2 * n, n) <= level)
        said = f"a level of {level:g}"
        why = f"{runs} and {runs} runs can be dealt in {math.comb(2 * runs, runs):,} ways"
        cases.append(Case({"level": level}, runs, said, why))
    return Exercise("levels", cases)


def rates() -> Exercise:
    """Faults a second that explain a gain; the answer takes operations a second ``before`` and ``after`` and
    ``saved`` in µs a fault, gives a whole number, rounded."""
    cases = []
    for row in trials.SEED:
        if row.unit == "s":
            continue
        for saved in (0.5, 1.0, 4.0):
            before, after = row.before[0], row.after[0]
            rate = round((1 - before / after) / saved * 1e6)
            said = f"{row.mmu}: {before} to {after} operations a second, {saved:g} µs saved a fault"
            why = "in one second of the old run, 1 - before / after of a second is saved"
            cases.append(Case({"before": before, "after": after, "saved": saved}, rate, said, why))
    order = np.argsort([case.arguments["saved"] != 1.0 for case in cases], kind="stable")
    return Exercise("gains", [cases[place] for place in order.tolist()])
