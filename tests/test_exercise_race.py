"""The exercises of chapters 6 to 10: solutions pass, each wrong try is answered with what shows it."""

import pytest

from mmu import protocols
from mmu.board import board
from mmu.exercise import race
from mmu.program import Program, edit

SEED = protocols.SEED_2012
ROLES = [["fault"], ["protect"]]
PLAN = edit(
    protocols.text("one-shot", "no-id", 2),
    {"F4": "cmpxchg spte: (w=0) -> (w=1)", "W3": "if not spte.w: W5", "W4": "xchg spte: (w=0)"},
).replace("w, id(vcpu)", "w")
LATER = edit(SEED, {"F1": "if wp: done", "F2": None, "F3": "spte.id = me"})
RULE = """
word flag0
word flag1
word in0
word in1
left:
    A0  flag0 = 1
    A1  if flag1: done
    A2  mark in0 = 1
right:
    B0  flag1 = 1
    B1  if flag0: done
    B2  mark in1 = 1
oops: in0 and in1
"""
TWO = [["left"], ["right"]]
SHARED = Program(SEED, [["fault"], ["protect"], ["fault"]], marks=[1, 1, 1])


@pytest.mark.parametrize(
    ("program", "memory", "right", "wrong"),
    [
        (
            Program(edit(RULE, {"A0": "flag0 = 1\nAB  smp_mb"}), TWO),
            "TSO",
            "1 1 1 0 0d 0 0 0",
            {"0 0d 0 0 0 1 1": "After move 2 (", "0 1 0 1 0 1 0": "waits at AB", "0 0d 1 1d 0 0 1": "After move 2 ("},
        ),
        (
            Program(PLAN, ROLES),
            "TSO",
            "0 0 1 1 1d 1 1 0 1 1d",
            {
                "0 0 1 1 1 1 0 1": "waits at W2",
                "1 1 1d 1 1 1 1d 0 0": "After move 3 (",
                "0 0 1 1 1d 1 1 0 1": "it is still 1 move away",
            },
        ),
        (
            protocols.program("one-shot", "protector-w-only", 2),
            "SC",
            "0 0 0 0 1 1 1 1 0 1",
            {
                "0 0 0 0 0 1 1 1 1 1": "After move 5 (",
                "1 1 1 1 1 0 0 0 0": "After move 2 (",
                "0 0 1 1 1 1 0 0": "After move 4 (",
            },
        ),
        (
            Program(LATER, ROLES),
            "SC",
            "0 0 1 1 1 1 0 0 1",
            {"0 0 0 1 1 1 1 1 1": "After move 3 (", "1 1 1 1 1 0 0": "After move 2 ("},
        ),
        (
            SHARED,
            "SC",
            "0 0 0 0  1 1 1 1 1 1  2 2  0",
            {"0 0 0 0  1 1 1 1 1 1  0": "After move 11 (", "0 0 0 0  1 1  2 2  1 1 1 1  0": "After move 8 ("},
        ),
        (
            protocols.program("one-shot", "cmpxchg-shared-id", 3),
            "SC",
            "0 0 0 0 2 2 2 2 2 1 1 0 2",
            {"0 0 0 0 1 2 2 2 2 2 1 0 2": "After move 5 (", "0 1 0 1 0 0 2 2 2 2 2 0": "After move 4 ("},
        ),
        (
            protocols.program("one-shot", "wrapped-id", 3),
            "TSO",
            "0 0 0d 0 0  2 2 2d 2 2 2  1 1 1d  0  2 2d",
            {"0 0 0d 0 0 2 2 2d 2 2 2 1 1 0 2 2d": "After move 14 ("},
        ),
        (
            protocols.program("merged", "no-cmpxchg", 2),
            "SC",
            "0 1.2 1 1 0",
            {"0 1.1 1 1 0": "no OOPS", "1.2 1 1 1 0": "no OOPS"},
        ),
    ],
)
def test_schedules(program, memory, right, wrong):
    """The solution's schedule is a shortest one; each wrong one is told after which move OOPS is out of reach."""
    check = race.schedule(program, memory)
    assert check(right).right
    assert "no schedule is shorter" in repr(check(right))
    for schedule, said in wrong.items():
        assert not check(schedule).right
        assert said in repr(check(schedule))


def roles(n):
    return [["fault"]] * (n - 1) + [["protect"]]


MARK = "if spte.w: done\nF1  spte.id = me"


@pytest.mark.parametrize(
    ("check", "text", "right", "wrong"),
    [
        (
            race.repair(roles),
            protocols.text("one-shot", "no-id", 2),
            [{"F0": f"{MARK}\nF2  smp_mb", "F4": "cmpxchg spte: (w=0, id=me) -> (w=1, id=0)"}],
            [
                ({"F0": MARK, "F4": "cmpxchg spte: (w=0, id=me) -> (w=1, id=0)"}, "drains spte.id = 1"),
                ({"F0": f"{MARK}\nF2  smp_mb", "F4": "cmpxchg spte: (w=0) -> (w=1, id=0)"}, "there is a way to OOPS"),
                ({"F4": "smp_mb"}, "ever sets spte.w"),
                ({"W1": None}, "ends without wp"),
                ({"F4": "fly"}, "cannot be read"),
            ],
        ),
        (
            race.repair(roles, oops="wp and not lock and spte.w"),
            PLAN,
            [{"F3": "take lock\nG3  if wp: G5", "F4": "cmpxchg spte: (w=0) -> (w=1)\nG5  release lock"}],
            [
                ({"F4": "take lock\nG4  cmpxchg spte: (w=0) -> (w=1)\nG5  release lock"}, "there is a way to OOPS"),
                (
                    {
                        "F3": "take lock\nG3  if wp: G7\nG4  release lock",
                        "F4": "cmpxchg spte: (w=0) -> (w=1)\nG6  if wp: done\nG7  release lock",
                    },
                    "there is a way to OOPS",
                ),
                ({"F4": "smp_mb"}, "ever sets spte.w"),
            ],
        ),
        (
            race.repair(lambda n: TWO, sizes=(2,), useful="in0", always=None, oops="in0 and in1"),
            RULE,
            [
                {"A0": "flag0 = 1\nAB  smp_mb", "B0": "flag1 = 1\nBB  smp_mb"},
                {"A0": "xchg flag0: 1", "B0": "xchg flag1: 1"},
            ],
            [
                ({"A0": "smp_mb\nAB  flag0 = 1", "B0": "smp_mb\nBB  flag1 = 1"}, "there is a way to OOPS"),
                ({"A1": "if flag1: done\nAB  smp_mb", "B1": "if flag0: done\nBB  smp_mb"}, "there is a way to OOPS"),
                ({"A2": "smp_mb"}, "ever sets in0"),
            ],
        ),
        (
            race.repair(lambda n: [["fault"]] * (n - 1) + [["remap"]], always="gfn"),
            protocols.text("gfn-aba", "seed", 2),
            [{"G": None, "F2": "smp_mb\nG   g = gfn"}],
            [
                ({"G": None, "F1": "spte.id = me\nG   g = gfn"}, "drains spte.id = 1"),
                ({"G": None, "F3": "if rmap.wp0: done"}, "there is a way to OOPS"),
            ],
        ),
    ],
)
def test_repairs(check, text, right, wrong):
    """Each solution is safe and useful; each wrong repair is answered by a schedule, or by what it lacks."""
    for changes in right:
        assert check(edit(text, changes)).right
    for changes, said in wrong:
        result = check(edit(text, changes))
        assert not result.right
        assert said in repr(result)


def test_a_repair_keeps_the_invariant():
    """A repair that changes what OOPS means is refused."""
    check = race.repair(roles, oops="wp and not lock and spte.w")
    assert "must keep its last line" in repr(check(PLAN.replace("oops: wp and", "oops: lock and wp and")))


def test_marks():
    """Unique marks pass, and shared ones get the schedule that breaks them."""

    def run(given):
        return Program(protocols.text("one-shot", "seed", len(given)), roles(len(given)), marks=given)

    check = race.marks(run, (2, 3, 4))
    assert check(lambda n: range(1, n + 1)).right
    assert check(lambda n: [*range(1, n), 1]).right
    assert "4 vCPUs get (1, 2, 1, 2), and there is a way to OOPS" in repr(
        check(lambda n: [1 + v % 2 for v in range(n)])
    )
    assert "3 vCPUs get (1, 1, 1)" in repr(check(lambda n: [1] * n))
    assert "none below 1" in repr(check(lambda n: range(n)))


@pytest.mark.parametrize(
    ("body", "names", "right", "wrong", "said"),
    [
        (
            "A0 data = 1;A1 flag = 1|B0 f = flag;B1 d = data",
            "fd",
            {(0, 0), (0, 1), (1, 1)},
            {(0, 0), (1, 1)},
            "(0, 1) can happen",
        ),
        (
            "A0 data = 1;A1 flag = 1|B0 f = flag;B1 d = data",
            "fd",
            {(0, 0), (0, 1), (1, 1)},
            {(0, 0), (0, 1), (1, 0), (1, 1)},
            "(1, 0) never happens",
        ),
    ],
)
def test_outcomes(body, names, right, wrong, said):
    """A missing outcome of a litmus test is shown a schedule, a surplus one the number of states without it."""
    left, after = (part.replace(";", "\n    ") for part in body.split("|"))
    text = f"word data\nword flag\nleft:\n    {left}\nright:\n    {after}\n"
    check = race.outcomes(Program(text, TWO, observe=tuple(names)), "TSO", tuple(names))
    assert check(right).right
    assert not check(wrong).right
    assert said in repr(check(wrong))


def test_counts():
    """A wrong number of bad schedules is told the direction and one schedule; none is said where there is none."""
    twice = edit(PLAN, {"F3": "if wp: done\nG3  if wp: done"})
    check = race.count(board(Program(twice, roles(3)), "SC"))
    assert check(4880).right
    assert "8 is too few. One that does: 0 0 0 2 2 2 2 0 2." in repr(check(8))
    assert "too many. There is none." in repr(race.count(board(protocols.one_shot(2), "SC"))(1))


def test_ids():
    """The solutions on id fields pass, and each listed wrong try meets a field or a machine that breaks it."""

    def usable(low, width):
        return 2**width - 1 - (2 ** (width - 8) if low <= 49 and low + width > 56 else 0)

    check = race.usable_ids()
    assert check(usable).right
    assert "8 bits from bit 49 up" in repr(check(lambda low, width: 2**width - 1))
    assert not check(lambda low, width: 2**width - 2).right
    assert "9 bits from bit 49 up" in repr(check(lambda low, width: 2**width - 1 - (low == 49 and width >= 8)))
    slow = race.slow_vcpus()
    assert slow(lambda table, vcpus: max(0, vcpus - (254 if table == "ept" else 127))).right
    assert "128 vCPUs on ept" in repr(slow(lambda table, vcpus: max(0, vcpus - 127)))
    assert "128 vCPUs on shadow" in repr(slow(lambda table, vcpus: max(0, vcpus - (254 if table == "ept" else 128))))
