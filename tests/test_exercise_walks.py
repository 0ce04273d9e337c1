"""mmu.exercise.walks: right answers pass, each wrong try meets a schedule, a case or a count that breaks it."""

import pytest

from mmu.exercise import walks
from mmu.program import edit
from mmu.protocols import text

RIGHT = """
word entry = 1
word freed
word mode[vcpu]
walk:
    R1  mode[me] = 1
    RB  smp_mb
    R2  if not entry: R4
    R3  if freed: oops
    R4  mode[me] = 0
free:
    Z0  entry = 0
    Z1  smp_mb
    Z2[r]  wait not mode[r]
    Z3  freed = 1
"""


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"RB": None}, "there is a way to OOPS"),
        ({"Z1": None}, "there is a way to OOPS"),
        ({"Z2[r]": None}, "there is a way to OOPS"),
        ({"R1": "mode[me] = 0"}, "there is a way to OOPS"),
        ({"R4": None}, "the page may never be freed"),
        ({"R2": "if not entry: done"}, "the page may never be freed"),
        ({"R3": None}, "must touch entry and freed by"),
        ({"Z3": None}, "must touch entry and freed by"),
        ({"Z3": "freed = 1\nZ4  freed = 0"}, "must touch entry and freed by"),
        ({"R2": "if not entry or 1: R4"}, "no schedule uses the page"),
        ({"R1": "mood = 1"}, "cannot be read"),
    ],
)
def test_protecting_a_walk(changes, told):
    """The scheme of 3.6 passes; without one of its parts, or with one that cheats, it is refused with the reason."""
    check = walks.protected("TSO")
    assert check(RIGHT).right
    result = check(edit(RIGHT, changes))
    assert not result.right and told in result.message


def test_a_walk_that_writes_nothing():
    """RCU alone passes where the walk must not write; the counter and the flag do not."""
    check = walks.protected("TSO", no_shared_writes=True)
    then = text("walk-reader-counter", "seed", 3)
    bare = {"R1": None, "RB": None, "RE": None, "R4": None, "Z2": None}
    assert check(edit(then, bare)).right
    assert check(text("walk-rcu", "seed", 3)).right
    for refused in (then, RIGHT, edit(then, {"R1": None}), edit(then, {**bare, "Z3[r]": None})):
        assert not check(refused).right


def test_barriers():
    """One condition tells all verdicts; each simpler one is refused with a schedule or a number of states."""

    def breaks(scheme, left_out, memory):
        reclaimer = left_out in ("no-protect-mb", "no-mb")
        return memory == "TSO" and (reclaimer or (left_out == "no-fault-mb" and scheme == "walk-mode"))

    check = walks.barriers()
    assert check(breaks).right
    assert "it does: 0 " in check(lambda scheme, left_out, memory: False).message
    assert "none of the" in check(lambda scheme, left_out, memory: memory == "TSO" and left_out != "nothing").message
    for flipped in list(check.cases):
        wrong = check(lambda *, _case=flipped, **given: breaks(**given) != (given == _case.arguments))
        assert not wrong.right


def test_the_wait():
    """The law of the wait passes, others meet the simulation."""
    check = walks.wait_law(2_000)
    assert check(lambda vcpus, busy, left: (1 - busy + busy * left) ** vcpus).right
    for law in (
        lambda vcpus, busy, left: left**vcpus,
        lambda vcpus, busy, left: 1 - busy + busy * left,
        lambda vcpus, busy, left: 1 - busy * (1 - left) ** vcpus,
        lambda vcpus, busy, left: left ** (vcpus * busy),
        lambda vcpus, busy, left: float("nan"),
    ):
        result = check(law)
        assert not result.right and "simulated reclaimers" in result.message
