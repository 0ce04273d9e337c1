"""mmu.placing: of all ways to place begin, end, look and barriers one is right, and the texts are what they say."""

import pytest

from mmu.board import board
from mmu.explore import explore
from mmu.placing import ALL, BETWEEN, FIRST, IN_TIME, LAST, NOWHERE, TOO_EARLY, Placing
from mmu.protocols import program

RIGHT = Placing(FIRST, LAST, True, IN_TIME, True)


@pytest.mark.parametrize("vcpus", [2, 3])
def test_one_is_right(vcpus):
    """On x86-TSO one placing is safe, under SC that one with or without its barriers, with two vCPUs and with three."""
    safe = {memory: [p for p in ALL if explore(p.program(vcpus), memory).verdict == "safe"] for memory in ("SC", "TSO")}
    assert safe["TSO"] == [RIGHT]
    assert safe["SC"] == [Placing(FIRST, LAST, a, IN_TIME, b) for a in (False, True) for b in (False, True)]


def test_each_is_there_once():
    """Seven places of begin and end, two barriers and three looks make 84, all different."""
    assert len(set(ALL)) == len(ALL) == 84


@pytest.mark.parametrize(
    ("reader_mb", "reclaimer_mb", "variant"),
    [(True, True, "no-end-mb"), (False, True, "no-fault-mb"), (True, False, "no-protect-mb"), (False, False, "no-mb")],
)
def test_the_right_one_is_that_of_linux_36(reader_mb, reclaimer_mb, variant):
    """With and without its barriers it breaks in as many moves as the model of Linux 3.6 does."""
    ours = board(Placing(FIRST, LAST, reader_mb, IN_TIME, reclaimer_mb).program(), "TSO")
    assert ours.left[0] == board(program("walk-mode", variant, 2), "TSO").left[0]


def test_steps_stand_where_they_are_placed():
    """Begin, end, barriers and look appear at their places in the text."""
    other = Placing(BETWEEN, BETWEEN, True, TOO_EARLY, True)
    assert [step.split()[0] for step in other.walk()] == ["R2", "R1", "RB", "R4", "R3"]
    assert [step.split()[0] for step in other.free()] == ["Z2[r]", "Z1", "Z0", "Z3"]
    assert [step.split()[0] for step in ALL[0].walk() + ALL[0].free()] == ["R2", "R3", "Z0", "Z3"]


@pytest.mark.parametrize(("begin", "end"), [(LAST, FIRST), (FIRST, NOWHERE), (NOWHERE, LAST), ("here", LAST)])
def test_an_end_before_its_begin_is_refused(begin, end):
    """A begin without an end, or after it, is no placing."""
    with pytest.raises(ValueError, match="in that order"):
        Placing(begin, end, True, IN_TIME, True)
