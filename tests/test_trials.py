"""mmu.trials: the means that the facts give, and exact tests against plain enumeration."""

from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmu import trials
from mmu.trials import Comparison, paired, permutation, seed, stratified

MEANS = [
    ("migrate total", "EPT", 291.0, 275.0, -5.5),
    ("migrate dbench", "EPT", 208.3, 193.0, -7.4),
    ("migrate total", "soft MMU", 322.3, 301.7, -6.4),
    ("migrate dbench", "soft MMU", 238.7, 218.0, -8.7),
]


@pytest.mark.parametrize(("test", "mmu", "before", "after", "percent"), MEANS)
def test_means_of_the_seed(test, mmu, before, after, percent):
    """The points of 2012 give the published means and differences."""
    row = seed(test, mmu)
    assert (np.mean(row.before), np.mean(row.after)) == pytest.approx((before, after), abs=0.06)
    assert -100 * row.gain == pytest.approx(percent, abs=0.06)


@pytest.mark.parametrize(("mmu", "percent"), [("EPT", 1.3), ("soft MMU", 7.3)])
def test_x11perf_rates(mmu, percent):
    """More operations a second are a shorter time for each, and the rates differ by the published percentage."""
    row = seed("x11perf -comppixwin500", mmu)
    before, after = row.times()
    assert 100 * (row.after[0] / row.before[0] - 1) == pytest.approx(percent, abs=0.05)
    assert row.gain == pytest.approx(1 - after[0] / before[0])


def test_total_is_the_sum_up_to_overhead():
    """In each run the total is what .unix and dbench took together, and 3 to 5 seconds more."""
    for mmu in ("EPT", "soft MMU"):
        parts = [seed(f"migrate {name}", mmu) for name in (".unix", "dbench", "total")]
        for arm in ("before", "after"):
            unix, dbench, total = (np.array(getattr(part, arm)) for part in parts)
            assert np.all((total - unix - dbench >= 3) & (total - unix - dbench <= 6))


def test_published_times_per_fault():
    """64 vCPUs take 13.5 us a page under the lock and 1.19 us without, as the facts derive."""
    slow, fast = (trials.PER_FAULT[name][0] for name in ("under the lock, 2021", "fast path, 2021"))
    assert (slow.microseconds, fast.microseconds) == pytest.approx((13.5, 1.19), rel=0.002)


def test_unknown_row():
    """A row that the message does not have is refused with those that it has."""
    with pytest.raises(KeyError, match="migrate dbench on EPT"):
        seed("kernbench", "EPT")


RUNS = st.lists(st.integers(1, 30), min_size=1, max_size=3)


@given(before=RUNS, after=RUNS)
def test_permutation_against_enumeration(before, after):
    """Of all orders of the runs, the same shares look as good, and as far, as plain enumeration finds."""
    seen = np.mean(after) - np.mean(before)
    orders = list(permutations(before + after))
    differences = [np.mean(order[len(before) :]) - np.mean(order[: len(before)]) for order in orders]
    test = permutation(before, after)
    assert test.one_sided == pytest.approx(np.mean([d <= seen + 1e-9 for d in differences]))
    assert test.two_sided == pytest.approx(np.mean([abs(d) >= abs(seen) - 1e-9 for d in differences]))


@given(pairs=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=6))
def test_paired_against_enumeration(pairs):
    """Of all ways to swap pairs, the same shares look as good, and as far, as plain enumeration finds."""
    seen = sum(after - before for before, after in pairs)
    sums = [
        sum(sign * (after - before) for sign, (before, after) in zip(signs, pairs, strict=True))
        for signs in product((1, -1), repeat=len(pairs))
    ]
    test = paired([before for before, _ in pairs], [after for _, after in pairs])
    assert test.as_good == sum(each <= seen for each in sums)
    assert test.at_least_as_far == sum(abs(each) >= abs(seen) for each in sums)


def test_three_runs_cannot_reach_five_percent():
    """With three runs an arm no data at all gives a two-sided p below 0.1; four runs can give 0.029."""
    assert permutation([10, 11, 12], [1, 2, 3]).two_sided == pytest.approx(2 / 20)
    assert permutation([10, 11, 12, 13], [1, 2, 3, 4]).two_sided == pytest.approx(2 / 70)


def test_experiments_together():
    """Two experiments dealt within themselves make 400 ways; as one they would make 924 and mix the machines."""
    both = stratified(([10, 11, 12], [1, 2, 3]), ([20, 21, 22], [11, 12, 13]))
    assert (both.as_good, both.ways, both.at_least_as_far) == (1, 400, 2)


def test_no_runs():
    """An arm without runs is refused."""
    with pytest.raises(ValueError, match="at least one"):
        permutation([], [1.0])


def test_gain_of_a_made_up_row():
    """Half the time is a gain of one half, be it given as a time or as a rate."""
    assert Comparison("t", "EPT", (4.0,), (2.0,)).gain == Comparison("t", "EPT", (2.0,), (4.0,), "1/s").gain == 0.5
