"""The exercises of chapter 11: the chapter's solutions pass, and each listed wrong try meets a case that breaks it."""

from itertools import combinations
from math import comb, factorial

import pytest

from mmu.exercise import altered, pay


def leave(arrivals, holds):
    """First come, first served."""
    free, out = 0, []
    for arrival, hold in zip(arrivals, holds, strict=True):
        free = max(arrival, free) + hold
        out.append(free)
    return out


def cycle(vcpus, think, hold):
    """Whichever is longer: the round of a vCPU alone, or everyone's turn at the lock."""
    return max(think + hold, vcpus * hold)


def as_good(before, after):
    """Deal the runs in every way and count."""
    runs, n = before + after, len(after)
    seen = sum(after) / n - sum(before) / len(before)
    count = 0
    for chosen in combinations(range(len(runs)), n):
        mine = [runs[i] for i in chosen]
        rest = [runs[i] for i in range(len(runs)) if i not in chosen]
        count += sum(mine) / n - sum(rest) / len(rest) <= seen + 1e-9
    return count


def least(level):
    """Deal one more run until the best deal is rare enough."""
    n = 1
    while 2 / comb(2 * n, n) > level:
        n += 1
    return n


def rate(before, after, saved):
    """The time saved in a second, in savings of one fault."""
    return round((1 - before / after) * 1e6 / saved)


SOLVED = [
    (pay.departures, leave), (pay.cycles, cycle), (pay.deals, as_good), (pay.enough_runs, least), (pay.rates, rate),
]  # fmt: skip


@pytest.mark.parametrize(("exercise", "solution"), SOLVED)
def test_solutions(exercise, solution):
    """Each solution of the chapter agrees with every case."""
    result = exercise()(solution)
    assert result.right, result


WRONG = [
    (pay.departures, altered(leave, "max(arrival, free)", "arrival")),
    (pay.departures, altered(leave, "max(arrival, free)", "free")),
    (pay.departures, altered(leave, "out.append(free)", "out.append(free - hold)")),
    (pay.cycles, altered(cycle, "max(think + hold, vcpus * hold)", "think + hold")),
    (pay.cycles, altered(cycle, "max(think + hold, vcpus * hold)", "think + vcpus * hold")),
    (pay.cycles, altered(cycle, "max(think + hold, vcpus * hold)", "vcpus * hold")),
    (pay.deals, altered(as_good, "<= seen + 1e-9", "< seen - 1e-9")),
    (pay.deals, altered(as_good, "<= seen + 1e-9", ">= seen - 1e-9")),
    (pay.deals, lambda before, after: 1),
    (pay.enough_runs, altered(least, "2 / comb", "1 / comb")),
    (pay.enough_runs, lambda level: next(n for n in range(1, 20) if 2 / factorial(2 * n) <= level)),
    (pay.enough_runs, lambda level: 3),
    (pay.rates, altered(rate, "before / after)", "after / before)")),
    (pay.rates, lambda before, after, saved: round((after / before - 1) * 1e6 / saved)),
    (pay.rates, lambda before, after, saved: round((after - before) / saved)),
]


@pytest.mark.parametrize(("exercise", "answer"), WRONG)
def test_wrong_tries(exercise, answer):
    """Each listed wrong try is refused with a counterexample."""
    result = exercise()(answer)
    assert not result.right
    assert "The first is" in repr(result)
