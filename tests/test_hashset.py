"""mmu.hashset against Python's own sets."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmu.hashset import HashSet

WORDS = st.one_of(st.integers(0, 40), st.integers(0, 2**64 - 1))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3).flatmap(
        lambda words: st.lists(st.lists(st.tuples(*[WORDS] * words)), max_size=6).map(lambda lots: (words, lots))
    )
)
def test_equal_to_a_set(drawn):
    """Lot by lot exactly the rows that are new are reported, each once and in order, and later found again."""
    words, lots = drawn
    seen, plain = HashSet(words), set()
    for lot in lots:
        rows = np.array(lot, dtype=np.uint64).reshape(len(lot), words)
        assert seen.has(rows).tolist() == [row in plain for row in lot]
        new = seen.add(rows)
        assert sorted(lot[at] for at in new) == sorted(set(lot) - plain)
        assert new.tolist() == sorted(new.tolist())
        plain |= set(lot)
        assert seen.has(rows).all()
    assert seen.size == len(plain)


@pytest.mark.parametrize("words", [1, 2])
def test_it_grows(words):
    """A hundred thousand rows in lots of all sizes are each new once, and neighbours do not get in each other's way."""
    rows = np.zeros((100_000, words), dtype=np.uint64)
    rows[:, -1] = np.arange(100_000, dtype=np.uint64) // 2
    seen, new = HashSet(words), 0
    for at in range(0, 100_000, 7_777):
        new += len(seen.add(rows[at : at + 7_777]))
    assert (new, seen.size) == (50_000, 50_000)
    assert seen.nbytes >= 8 * words * 50_000
    assert not seen.has(rows[:10] + np.uint64(50_000)).any()
