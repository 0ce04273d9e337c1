"""mmu.exercise: right answers pass, and each listed wrong try meets a case that breaks it."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from mmu import exercise, pfec
from mmu.exercise import codes

TABLE = gzip.decompress((Path(__file__).parents[1] / "book/data/page-fault-error-codes.csv.gz").read_bytes()).decode()


def fault(p, w, u, nx, rsvd, write, fetch, user, wp, nxe, smep, smap, ac):
    """Plain rules of a page fault, one access at a time."""
    code = 2 * write + 4 * user + 16 * (fetch and (nxe or smep))
    if not p:
        return code
    if rsvd or (nx and not nxe):
        return code | 1 | 8
    denied = user and not u
    denied |= write and not w and (user or wp)
    denied |= fetch and nx
    denied |= fetch and smep and u and not user
    denied |= smap and u and not user and not fetch and not ac
    return code | 1 if denied else None


def test_the_dozen_lines_reproduce_the_recording():
    """The chapter's dozen lines give the recorded code, or none, in all 7,680 rows."""
    result = codes.recorded_faults(TABLE)(fault)
    assert result.right
    assert repr(result) == "Right: all 7,680 recorded accesses agree."


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("write and not w and (user or wp)", "write and not w"),
        ("rsvd or (nx and not nxe)", "rsvd"),
        ("(fetch and (nxe or smep))", "fetch"),
        ("not fetch and not ac", "not fetch"),
        ("not user and not fetch and not ac", "not user and not ac"),
        ("code | 1 | 8", "code | 1 if user and not u else code | 1 | 8"),
        ("fetch and nx", "False"),
        ("user and not u\n", "False\n"),
        ("fetch and smep and u and not user", "fetch and smep and not user"),
    ],
)
def test_changing_any_line_breaks_it(old, new):
    """Each listed change of one line is refused with a counterexample."""
    result = codes.recorded_faults(TABLE)(exercise.altered(fault, old, new))
    assert not result.right
    assert "The first is a " in repr(result)


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        (
            codes.impossible_codes(),
            lambda code: bool((code & 8 and not code & 1) or (code & 2 and code & 16)),
            [
                lambda code: bool(code & 2 and code & 16),
                lambda code: bool(code & 8 and not code & 1),
                lambda code: False,
            ],
        ),
        (
            codes.code_rule(pfec.SERIES_2012),
            lambda code: bool(code & 1) and not code & 8,
            [lambda code: bool(code & 1), lambda code: code & 3 == 3 and not code & 8],
        ),
        (
            codes.code_rule(pfec.LINUX_61_NO_AD),
            lambda code: not code & 8 and (not code & 1 or bool(code & 2)),
            [lambda code: not code & 8, lambda code: not code & 1],
        ),
        (
            codes.qualifications(),
            lambda qualification: pfec.from_ept(qualification),
            [
                lambda qualification: pfec.from_ept(qualification) & ~1 | (qualification >> 3 & 1),
                lambda qualification: pfec.from_ept(qualification) & ~4,
                lambda qualification: pfec.from_ept(qualification ^ 0x100),
            ],
        ),
    ],
)
def test_chapter_2(check, right, wrong):
    """The solutions of chapter 2 pass and each of its listed wrong tries gets a counterexample."""
    assert check(right).right
    for answer in wrong:
        result = check(answer)
        assert not result.right
        assert "The first is 0x" in repr(result)


def test_an_answer_that_raises_is_shown_what_it_raised():
    """An answer that raises is refused with the error's own words, not with a traceback."""
    result = codes.impossible_codes()(lambda code: 1 // 0)
    assert not result.right
    assert "ZeroDivisionError" in repr(result)


def test_counting():
    """A count that is off is told in which direction, and where the first ones are."""
    odd = exercise.count("numbers", np.array([False, True, False, True], dtype=np.bool_))
    assert odd(2).right
    assert "too many" in repr(odd(3)) and "at place 1 (counting from 0), the next at 3" in repr(odd(3))
    assert "there are none" in repr(exercise.count("ghosts", np.zeros(3, dtype=np.bool_))(1))


def test_altering_needs_a_piece_that_stands_there_once():
    """A change to a line that does not stand in the function, or stands there twice, is refused."""
    with pytest.raises(ValueError, match="stands 0 times in fault"):
        exercise.altered(fault, "no such line", "")
