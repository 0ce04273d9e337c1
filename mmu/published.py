"""Published measurements, each with its source, and what few runs can show: exact permutation tests.

:data:`SEED` holds every point of the 2012 message's tables. :data:`PER_FAULT` holds later benchmarks of Linux
developers in which every page of a guest is written once after it was write-protected, as seconds for 262,144 pages
a vCPU. Nothing here is computed by a model; :mod:`mmu.cost` is held against it. Chapter 11.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

XIAO_2012 = "Xiao Guangrong, message of 2012-03-29, 4F742951.7080003@linux.vnet.ibm.com"
MATLACK_2021 = "David Matlack, message of 2021-06-11, 20210611235701.3941724-1-dmatlack@google.com"
MATLACK_2022 = "David Matlack, series of 2022-04-01, 20220401233737.3021889-1-dmatlack@google.com"
GARDON_2020 = "Ben Gardon, series of 2020-10-14 (TDP MMU)"
GARDON_2021 = "Ben Gardon, series of 2021-01-12 (parallel faults)"

PAGES = 262_144
"""4K pages that each vCPU writes in a round of dirty_log_perf_test: 1 GiB, its default."""


@dataclass(frozen=True)
class Comparison:
    """One benchmark before and after the fast path: all points, in the order of the runs.

    Attributes:
        test, mmu: which benchmark on which MMU, ``EPT`` or ``soft MMU``.
        unit: ``s``, where less is better, or ``operations/s``.
    """

    test: str
    mmu: str
    before: tuple[float, ...]
    after: tuple[float, ...]
    unit: str = "s"
    source: str = XIAO_2012

    def times(self) -> tuple[Floats, Floats]:
        """Each run as a time, where less is better; rates become microseconds an operation; ``# (run,)``."""
        before, after = np.array(self.before, dtype=np.float64), np.array(self.after, dtype=np.float64)
        return (before, after) if self.unit == "s" else (1e6 / before, 1e6 / after)

    @property
    def gain(self) -> float:
        """Share of the time that was saved, from the means."""
        before, after = self.times()
        return float(1 - after.mean() / before.mean())


SEED = (
    Comparison("x11perf -comppixwin500", "EPT", (7060.0,), (7150.0,), "operations/s"),
    Comparison("x11perf -comppixwin500", "soft MMU", (6980.0,), (7490.0,), "operations/s"),
    Comparison("migrate .unix", "EPT", (102.0, 68.0, 67.0), (103.0, 67.0, 64.0)),
    Comparison("migrate dbench", "EPT", (204.0, 203.0, 218.0), (189.0, 188.0, 202.0)),
    Comparison("migrate total", "EPT", (309.0, 275.0, 289.0), (295.0, 259.0, 271.0)),
    Comparison("migrate .unix", "soft MMU", (102.0, 68.0, 68.0), (104.0, 68.0, 66.0)),
    Comparison("migrate dbench", "soft MMU", (262.0, 220.0, 234.0), (231.0, 218.0, 205.0)),
    Comparison("migrate total", "soft MMU", (368.0, 292.0, 307.0), (341.0, 289.0, 275.0)),
)
"""Every point of the tables of 2012. The unit of the migration rows is not stated there; seconds are inferred."""

RESUME = (
    Comparison("writing again, v5", "not stated", (0.512466818,), (0.269231261,), "s", "Xiao Guangrong, v5, 2012"),
    Comparison("writing again, v7", "not stated", (0.538233957,), (0.249809853,), "s", "Xiao Guangrong, v7, 2012"),
)
"""Re-spins of the series: how long a guest takes to write its memory again after a dirty-log read; v5 a mean of ten."""


def seed(test: str, mmu: str) -> Comparison:
    """One row of :data:`SEED`. Raises KeyError, with the names that there are, for any other."""
    for row in SEED:
        if (row.test, row.mmu) == (test, mmu):
            return row
    raise KeyError(f"{test!r} on {mmu!r}; expected one of {', '.join(f'{r.test} on {r.mmu}' for r in SEED)}")


class Point(NamedTuple):
    """Seconds in which ``vcpus`` vCPUs each wrote :data:`PAGES` pages."""

    vcpus: int
    seconds: float

    @property
    def microseconds(self) -> float:
        """For one page of one vCPU."""
        return self.seconds / PAGES * 1e6


_VCPUS = (2, 4, 8, 16, 32, 64, 96)  # the record names 2 and 96 and gives seven points; the five between are inferred

PER_FAULT: dict[str, tuple[Point, ...]] = {
    "under the lock, 2021": (Point(64, 3.545),),
    "fast path, 2021": (Point(64, 0.312),),
    "fast path, legacy MMU, 2021": (Point(64, 0.301),),
    "idle pages under the lock, 2021": (Point(64, 3.250),),
    "idle pages, fast path, 2021": (Point(64, 0.298),),
    "huge pages zapped on fault, 2022": tuple(
        map(Point, _VCPUS, (0.318, 0.337, 0.386, 0.791, 1.720, 2.528, 2.681))
    ),
    "huge pages split on fault, 2022": tuple(
        map(Point, _VCPUS, (0.296, 0.300, 0.297, 0.299, 0.313, 0.456, 0.674))
    ),
    "huge pages split eagerly, 2022": tuple(
        map(Point, _VCPUS, (0.0587, 0.0603, 0.0604, 0.0625, 0.0760, 0.0798, 0.165))
    ),
}  # fmt: skip
"""Sources: rows of 2021 :data:`MATLACK_2021` (Cascade Lake, without A/D bits and PML), of 2022 :data:`MATLACK_2022`."""

WAITING_416 = 0.98
"""Share of the time that 416 vCPUs waited for the mmu-lock while they touched 4 GiB each (:data:`GARDON_2020`)."""

CUT_416 = 0.89
"""By how much parallel faults of the TDP MMU shortened that run (:data:`GARDON_2020`)."""

POPULATE_96 = (110.193, 16.112)
"""Seconds in which 96 vCPUs touched 3 GiB each for the first time, before and after faults ran side by side in the TDP
MMU (:data:`GARDON_2021`)."""


# What few runs can show ----------------------------------------------------------------------------------------------


class Permutation(NamedTuple):
    """An exact test: of all ways to deal the runs, how many look at least as good as the one that happened."""

    as_good: int
    ways: int
    at_least_as_far: int

    @property
    def one_sided(self) -> float:
        """The p-value of "after is less"."""
        return self.as_good / self.ways

    @property
    def two_sided(self) -> float:
        """The p-value of "after differs"."""
        return self.at_least_as_far / self.ways


_SLACK = 1e-9  # sums of the same numbers in another order differ by less


def permutation(before: ArrayLike, after: ArrayLike) -> Permutation:
    """Deal all runs anew into two heaps in every possible way, and compare the difference of their means. Chapter 11.

    If the patch did nothing, each way was as likely as the one that happened.

    >>> permutation([204, 203, 218], [189, 188, 202])
    Permutation(as_good=1, ways=20, at_least_as_far=2)
    """
    return _count(*_deals(before, after))


def stratified(*pairs: tuple[ArrayLike, ArrayLike]) -> Permutation:
    """Several experiments judged together: runs are dealt within each, and the differences add up. Chapter 11."""
    totals, happened = np.zeros(1, dtype=np.float64), 0.0
    for before, after in pairs:
        differences, seen = _deals(before, after)
        totals = (totals[:, None] + differences).ravel()
        happened += seen
    return _count(totals, happened)


def paired(before: ArrayLike, after: ArrayLike) -> Permutation:
    """Compare run 1 with run 1, run 2 with run 2: each pair may be swapped or not. Chapter 11.

    >>> paired([204, 203, 218], [189, 188, 202])
    Permutation(as_good=1, ways=8, at_least_as_far=2)
    """
    difference = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    swaps = np.arange(1 << difference.size, dtype=np.int64)[:, None] >> np.arange(difference.size, dtype=np.int64)
    signs = 1.0 - 2 * (swaps & 1)  # (way, run)
    return _count(signs @ difference / difference.size, float(difference.mean()))


def _deals(before: ArrayLike, after: ArrayLike) -> tuple[Floats, float]:
    """The difference of means, after less before, for every way to deal ``# (way,)``, and the one that happened."""
    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if not first.size or not second.size:
        raise ValueError(f"{first.size} runs before and {second.size} after; expected at least one of each")
    runs = np.concatenate([first, second])
    chosen = np.array(list(combinations(range(runs.size), second.size)), dtype=np.int64)  # (way, run after)
    after_sum = runs[chosen].sum(axis=1)
    difference = after_sum / second.size - (runs.sum() - after_sum) / first.size
    return difference, float(second.mean() - first.mean())


def _count(differences: Floats, happened: float) -> Permutation:
    slack = _SLACK * (1 + abs(happened))
    return Permutation(
        int((differences <= happened + slack).sum()),
        differences.size,
        int((np.abs(differences) >= abs(happened) - slack).sum()),
    )
