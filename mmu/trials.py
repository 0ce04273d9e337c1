"""Before and after the fast path: every point that was measured, and what few runs can show (exact tests).

:data:`SEED` holds every run of the 2012 message's tables. :data:`PER_FAULT` lists the later benchmarks in which every
page of a guest is written once after it was write-protected. Nothing here is computed by a model; :mod:`mmu.cost` is
held against it. Chapter 11.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmu.published import FAST_TDP, MIGRATION_2012, PAGES_PER_GIB, SPLIT_ON_FAULT, X11PERF_2012, per_page

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """One benchmark before and after the fast path: all points, in the order of the runs.

    Attributes:
        test, mmu: which benchmark on which MMU, ``EPT`` or ``soft MMU``.
        unit: ``s``, where less is better, or ``operations/s``.
        source: whose message.
    """

    test: str
    mmu: str
    before: Sequence[float]
    after: Sequence[float]
    unit: str = "s"
    source: str = "Xiao Guangrong, 2012-03-29"

    def times(self) -> tuple[Floats, Floats]:
        """Each run as a time, where less is better; rates become microseconds an operation; ``# (run,)``."""
        before, after = np.array(self.before, dtype=np.float64), np.array(self.after, dtype=np.float64)
        return (before, after) if self.unit == "s" else (1e6 / before, 1e6 / after)

    @property
    def gain(self) -> float:
        """Share of the time that was saved, from the means."""
        before, after = self.times()
        return float(1 - after.mean() / before.mean())


def _x11perf(mmu: str) -> Comparison:
    before, after = X11PERF_2012[mmu]
    return Comparison("x11perf -comppixwin500", mmu, (before,), (after,), "operations/s")


SEED = (
    _x11perf("EPT"),
    _x11perf("soft MMU"),
    Comparison("migrate .unix", "EPT", (102.0, 68.0, 67.0), (103.0, 67.0, 64.0)),
    Comparison("migrate dbench", "EPT", (204.0, 203.0, 218.0), (189.0, 188.0, 202.0)),
    Comparison("migrate total", "EPT", *MIGRATION_2012["EPT"]),
    Comparison("migrate .unix", "soft MMU", (102.0, 68.0, 68.0), (104.0, 68.0, 66.0)),
    Comparison("migrate dbench", "soft MMU", (262.0, 220.0, 234.0), (231.0, 218.0, 205.0)),
    Comparison("migrate total", "soft MMU", *MIGRATION_2012["soft MMU"]),
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
    """Seconds in which ``vcpus`` vCPUs each wrote 1 GiB, page by page."""

    vcpus: int
    seconds: float

    @property
    def microseconds(self) -> float:
        """For one page of one vCPU."""
        return float(per_page(self.seconds))


def _points(column: str) -> tuple[Point, ...]:
    return tuple(Point(int(row["vcpus"]), float(row[column])) for row in SPLIT_ON_FAULT)


PAGES = PAGES_PER_GIB
PER_FAULT: dict[str, tuple[Point, ...]] = {
    "under the lock, 2021": (Point(64, float(FAST_TDP["before"][0])),),
    "fast path, 2021": (Point(64, float(FAST_TDP["after"][0])),),
    "fast path, legacy MMU, 2021": (Point(64, 0.300802793),),
    "idle pages under the lock, 2021": (Point(64, float(FAST_TDP["before"][1])),),
    "idle pages, fast path, 2021": (Point(64, float(FAST_TDP["after"][1])),),
    "pages built anew, 2022": _points("built"),
    "huge pages split on fault, 2022": _points("split"),
    "huge pages split beforehand, 2022": _points("eager"),
}
"""Sources: :data:`mmu.published.FAST_TDP`, whose message also has the legacy MMU, and ``SPLIT_ON_FAULT``."""

WAITING_416 = 0.98
"""Share of the time that 416 vCPUs waited for the mmu-lock while they touched 4 GiB each.

Source: Ben Gardon, series of 2020-10-14, which brought the TDP MMU."""

CUT_416 = 0.89
"""How much less time they needed when the TDP MMU's faults ran side by side. Source: as above."""

POPULATE_96 = (110.193, 16.112)
"""Seconds in which 96 vCPUs touched 3 GiB each for the first time, before and after faults ran side by side.

Source: Ben Gardon, series of 2021-01-12."""


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
    return _count(*deals(before, after))


def stratified(*pairs: tuple[ArrayLike, ArrayLike]) -> Permutation:
    """Several experiments judged together: runs are dealt within each, and the differences add up. Chapter 11."""
    totals, happened = np.zeros(1, dtype=np.float64), 0.0
    for before, after in pairs:
        differences, seen = deals(before, after)
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


def deals(before: ArrayLike, after: ArrayLike) -> tuple[Floats, float]:
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
