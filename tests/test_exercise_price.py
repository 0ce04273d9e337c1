"""mmu.exercise.price: the solutions of chapter 1 pass, and each listed wrong try meets a case that breaks it."""

from pathlib import Path

import numpy as np
import pytest

from mmu import trace
from mmu.exercise import price

BOOK = Path(__file__).parents[1] / "book/data"
RECORDINGS = [trace.read(BOOK / f"{name}.trace.gz") for name in ("npt1_tdp1_B", "npt1_tdp0_G", "npt0_E")]
PAGES = 1 << 18


def bits(old, new):
    return [bit for bit in range(64) if (old ^ new) >> bit & 1]


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        (
            price.lock_flags(*RECORDINGS),
            lambda flags: flags[0] == "." and flags[3] != ".",
            [lambda flags: flags[3] != ".", lambda flags: flags == "...1.", lambda flags: flags[0] == "."],
        ),
        (
            price.changed_bits(RECORDINGS[0]),
            bits,
            [lambda old, new: old ^ new, lambda old, new: bits(0, new & ~old), lambda old, new: bits(old, new)[:1]],
        ),
        (
            price.per_fault(),
            lambda seconds, vcpus, gib: round(seconds * 1e6 / (gib * PAGES), 2),
            [
                lambda seconds, vcpus, gib: round(seconds * 1e6 / (vcpus * gib * PAGES), 2),
                lambda seconds, vcpus, gib: round(seconds * 1e6 / (gib * 1e9 / 4096), 2),
            ],
        ),
        (
            price.turns(),
            lambda seconds, vcpus, gib: round(seconds * 1e9 / (vcpus * gib * PAGES)),
            [
                lambda seconds, vcpus, gib: round(seconds * 1e9 / (gib * PAGES)),
                lambda seconds, vcpus, gib: round(seconds * 1e9 / vcpus),
            ],
        ),
    ],
)
def test_chapter_1(check, right, wrong):
    """The solution passes on every case, and each wrong try is shown the first case that contradicts it."""
    assert check(right).right
    for answer in wrong:
        result = check(answer)
        assert not result.right
        assert "The first is " in repr(result)


def test_faults_of_each_round():
    """The faults between two readings of the log are right; running totals, all faults and a short list are not."""
    recording = RECORDINGS[0]
    check = price.dirty_rounds(recording)
    marks = recording["tracing_mark_write"]
    ends = marks["line"][np.char.startswith(marks["text"], b"DIRTY_GET_END")]
    before = np.searchsorted(recording["fast_page_fault"]["line"], ends)
    assert check(np.diff(before, prepend=0)).right
    assert "in round 2 (counting from 0) you counted 342 faults" in repr(check(before))
    everything = np.diff(np.searchsorted(recording["kvm_page_fault"]["line"], ends), prepend=0)
    assert "in round 0" in repr(check(everything))
    assert "the log was read 6 times" in repr(check([256]))
