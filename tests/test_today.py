"""Chapter 12's races, exercises: verdicts, and wrong tries with what shows them."""

import itertools

import pytest

from mmu import spte, update
from mmu.board import board
from mmu.exercise import race
from mmu.exercise import today as checks
from mmu.explore import explore
from mmu.program import Program, edit
from mmu.today import RACES

TWO = (["fault"], ["protect"])
VERDICTS = [  # race, changes, actors, whether some schedule breaks it
    ("two-bits", {}, None, False),
    ("two-bits", {"P2": "old = spte; if not old.w: P4"}, TWO, True),
    ("two-bits", {"F1": "spte.w = 1"}, TWO, True),
    ("two-bits", {"P3": "spte = (old, mmu=0, w=0)"}, TWO, False),
    ("two-bits", {}, (["fault"], ["protect_and_back"], ["protect"]), False),
    ("lost-dirty", {}, None, True),
    ("lost-dirty", {"Z1": "old = spte; if old.w or old.mmu: Z4"}, None, False),
    ("late-flush", {}, None, True),
    ("late-flush", {"P2": "was = xchg spte: (mmu=0, w=0); if not was.mmu: P4"}, None, False),
    ("late-flush", {"D2": "xchg spte: (tlb=0)", "D3": "release lock"}, None, False),
    ("gfn-direct", {}, None, False),
    ("gfn-pinned", {}, None, False),
    ("gfn-pinned", {"HP": "cmpxchg page: (owner=0) -> (owner=1) else H4"}, None, True),
    ("gfn-pinned", {"N": "xchg page: (pin=1)"}, None, True),
]


@pytest.mark.parametrize("memory", ["SC", "TSO"])
@pytest.mark.parametrize(("name", "changes", "actors", "broken"), VERDICTS)
def test_verdicts(name, changes, actors, broken, memory):
    """Each race is safe or broken, and its board has the explorer's states and shortest counterexample."""
    given = RACES[name]
    run = Program(edit(given.text, changes), actors or given.actors)
    game, found = board(run, memory), explore(run, memory)
    assert (not game.safe, found.verdict) == (broken, "OOPS" if broken else "safe")
    assert (len(game.states), len(game.shortest())) == (found.states, len(found.counterexample or []))


def test_a_again_does_no_harm():
    """A cmpxchg that slept through protecting and un-protecting succeeds, and nothing is broken."""
    game = board(Program(RACES["two-bits"].text, [["fault"], ["protect_and_back"]]), "SC")
    moves = game.play("0 1 1 1 1 1 1 1 1 1 0")
    assert moves[-1].kind == "succeeded"
    assert not game.oops[moves[-1].target]


def test_the_late_flush_is_repaired():
    """Judging on mmu passes; judging on w, on both, or leaving mmu alone is answered by a schedule."""
    late = RACES["late-flush"]
    check = race.repair(
        lambda n: late.actors, "TSO", (2,), "spte.tlb", always="wp", oops="wp and not lock and spte.tlb"
    )
    assert check(edit(late.text, {"P2": "was = xchg spte: (mmu=0, w=0); if not was.mmu: P4"})).right
    for step in ("(mmu=0, w=0); if not was.w", "(mmu=0, w=0); if not (was.w and was.mmu)", "(w=0); if not was.w"):
        assert "a way to OOPS" in repr(check(edit(late.text, {"P2": f"was = xchg spte: {step}: P4"})))
    assert "a way to OOPS" in repr(check(edit(late.text, {"P4": "old = spte; if old.w: P3\nP5  release lock"})))


def test_the_dirty_bit_is_lost():
    """The solution's schedule is a shortest one; looking after the cmpxchg, or storing first, loses nothing."""
    check = race.schedule(RACES["lost-dirty"].program(), "TSO")
    assert "no schedule is shorter" in repr(check("0 1 1 0 0 1 1 1d 1d"))
    for wrong in ("0 0 0 1 1 1 1 1 1d 1d", "0 0 1 1 0 1 1 1 1d 1d", "0 1 1 1 1 1d 0 1d"):
        assert "Not yet. After move" in repr(check(wrong))


def field(word, layout, name):
    return bool(spte.LAYOUTS[layout].bits.field(word, name))


def test_what_may_be_fixed():
    """The solution passes; the bits of 3.6, a missing look at presence, and HOST_W alone each meet a counterexample."""
    check = checks.fixable()
    assert check(
        lambda word, layout: (
            bool(spte.is_present(word, layout)) and field(word, layout, "MMU_W") and not field(word, layout, "W")
        )
    ).right
    assert "Linux 6.1, EPT" in repr(check(lambda word, layout: word >> 10 & 3 == 3 and not word & 2))
    assert "0x5a0" in repr(check(lambda word, layout: field(word, layout, "MMU_W") and not field(word, layout, "W")))
    assert "MMU_W=0" in repr(check(lambda word, layout: field(word, layout, "HOST_W") and not field(word, layout, "W")))


def test_what_may_be_fixed_is_what_the_fast_path_fixes():
    """On every entry of Linux 6 the exercise expects what the package's fast path does."""
    for case in checks.fixable().cases:
        if case.arguments["layout"].startswith("6"):
            _, outcome = update.fast_page_fault(case.arguments["word"], layout=case.arguments["layout"])
            assert case.expected == (update.FAST[outcome] == "fixed")


def hide(word):
    return word & ~7 | (word & 0b101) << 54


def give_back(word, write):
    return word & ~(7 << 54) | word >> 54 & 7 | 2 * bool(write)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((lambda word: word & ~7 | (word & 7) << 54, give_back), "write, age, log, read: the page is noted"),
        ((lambda word: word & ~2, give_back), "age: the CPU still sees rights"),
        ((hide, lambda word, write: give_back(word, False)), "age, write: the guest still cannot write"),
        ((hide, lambda word, write: give_back(word, True)), "age, read: the page is noted"),
        ((lambda word: word & ~7, give_back), "age, read: R and X are not back"),
        ((hide, lambda word, write: word | 7), "age, read: 0x75000034d4fe877 still keeps saved rights"),
    ],
)
def test_access_tracking_is_refused(given, said):
    """Each wrong pair of functions is answered with the shortest history that shows it."""
    assert said in repr(checks.tracking()(*given))


def test_access_tracking():
    """The solution passes, and it is what the package does with the same entries."""
    assert checks.tracking()(hide, give_back).right
    word = checks.START
    assert hide(word) == update.age(word, "6.1-ept")
    for write in (False, True):
        new, _ = update.fast_page_fault(hide(word), write=write, ad_bits=False, layout="6.1-ept")
        assert give_back(hide(word), write) == new


def test_every_short_history_of_tracking():
    """Played one by one, all histories of five events keep the note exact with the package's own functions."""
    form = spte.LAYOUTS["6.1-ept"]
    for events in itertools.product(("age", "log", "read", "write"), repeat=5):
        word, noted, written = checks.START, False, False
        for event in events:
            old = word
            if event == "age":
                word = update.age(word, form)
            elif event == "log":
                word, noted, written = update.write_protect(word, layout=form), False, False
            else:
                write = event == "write"
                word, _ = update.fast_page_fault(word, write=write, ad_bits=False, layout=form)
                written |= write
                noted |= bool(word & 2 and not old & 2)
            assert noted == written


def test_the_counter():
    """Exactly the values that an int with its sign widened cannot become are stale for ever, that of the report too."""
    check = checks.hangs()
    assert check(lambda seq: 1 << 31 <= seq < (1 << 64) - (1 << 31)).right
    assert "seq=0x80000000" in repr(check(lambda seq: seq == 0x8002DC25))
    assert "seq=0x100000000" in repr(check(lambda seq: bool(seq >> 31 & 1)))
    assert "seq=0xffffffff80000000" in repr(check(lambda seq: seq >= 1 << 31))
    reported = next(case for case in check.cases if case.arguments["seq"] == 0x8002DC25)
    assert (reported.expected, reported.why) == (True, "comes back as 0xffffffff8002dc25")
