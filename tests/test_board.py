"""mmu.board: the same graph as the search's, every schedule of it, and what its figures and games say about it."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmu import diagrams, protocols
from mmu.board import KINDS, ScheduleError, board
from mmu.explore import explore
from mmu.machine import Machine
from mmu.program import Program
from mmu.widgets import RacePlayer, counterexample

SMALL = [
    (model, variant, memory)
    for model in ("one-shot", "looping", "merged", "gfn-aba", "zap", "flush", "walk-mode", "walk-rcu")
    for variant in protocols.MODELS[model].variants
    if protocols.MODELS[model].variants[variant].marks not in ("wraps", "slow")
    for memory in ("SC", "TSO")
]

LENGTHS = {  # facts: shortest counterexamples of the one-shot model; None is safe
    "seed": {"SC2": None, "SC3": None, "TSO2": None, "TSO3": None},
    "no-id": {"SC2": 8, "SC3": 8, "TSO2": 10, "TSO3": 10},
    "shared-id": {"SC2": None, "SC3": 13, "TSO2": None, "TSO3": 17},
    "protector-w-only": {"SC2": 10, "SC3": 10, "TSO2": 13, "TSO3": 13},
    "no-fault-mb": {"SC2": None, "SC3": None, "TSO2": 12, "TSO3": 12},
    "no-protect-mb": {"SC2": None, "SC3": None, "TSO2": 12, "TSO3": 12},
    "no-mb": {"SC2": None, "SC3": None, "TSO2": 11, "TSO3": 11},
    "cmpxchg-shared-id": {"SC2": None, "SC3": 13, "TSO2": None, "TSO3": 15},
}


def all_schedules(program, memory):
    """Each complete schedule by plain recursion: whether it meets a broken state, and how likely chance draws it."""
    machine = Machine(program, memory)

    def broken(state):
        return bool(program.oops.value(machine.unpack(state.shared)))

    def below(state):
        events = machine.events(state)
        if broken(state):
            return [True] * len(below_any(state)), Fraction(1)
        if not events:
            return [False], Fraction(0)
        parts = [below(event.target) for event in events]
        return [end for part in parts for end in part[0]], sum(part[1] for part in parts) / len(parts)

    def below_any(state):
        events = machine.events(state)
        return [end for event in events for end in below_any(event.target)] if events else [None]

    return below(machine.start)


@pytest.mark.parametrize(("model", "variant", "memory"), SMALL)
def test_the_graph_is_the_searchs(model, variant, memory):
    """States, moves, depth, verdict and the length of the shortest counterexample are those of the search."""
    program = protocols.program(model, variant, 2)
    game, found = board(program, memory), explore(program, memory)
    assert len(game.states) == found.states
    assert sum(map(len, game.moves)) == found.transitions
    assert game.depth.max() == found.depth
    assert game.safe == (found.verdict == "safe")
    assert len(game.shortest()) == len(found.counterexample or [])
    assert [
        f"v{move.actor} {move.text.replace(' (into its store buffer)', '')}" for move in game.shortest()
    ] == found.lines()


@pytest.mark.parametrize("variant", LENGTHS)
def test_lengths_of_the_variants_table(variant):
    """The shortest counterexamples have the lengths on which independent tools agree."""
    for setting, length in LENGTHS[variant].items():
        game = board(protocols.program("one-shot", variant, int(setting[-1])), setting[:-1])
        assert (None if game.safe else len(game.shortest())) == length


@pytest.mark.parametrize(
    ("variant", "memory"), [("no-id", "SC"), ("no-id", "TSO"), ("protector-w-only", "SC"), ("seed", "SC")]
)
def test_every_schedule(variant, memory):
    """The schedules, their order, their number and their chances are those of plain recursion."""
    program = protocols.program("one-shot", variant, 2)
    game = board(program, memory)
    ends, chance = all_schedules(program, memory)
    assert game.schedules().tolist() == ends
    assert game.count() == (sum(ends), len(ends))
    assert game.chance() == pytest.approx(float(chance), abs=1e-12)
    assert game.ways()[game.ends()].sum() == len(ends)


def test_the_seeds_diagram_step_for_step():
    """With one mark for all, the search's first shortest schedule is the message's diagram: v0, all of v1, v2, v0."""
    program = Program(protocols.SEED_2012, [["fault"], ["protect"], ["fault"]], marks=[1, 1, 1])
    game = board(program, "SC")
    assert "".join(move.code for move in game.shortest()) == "0000111111220"
    assert game.shortest()[-1].kind == "succeeded"
    assert game.count() == (1530, 289490)


def test_two_looping_vcpus_suffice():
    """Two looping vCPUs with one mark break the protocol in 13 steps under SC and 17 under TSO."""
    for memory, length in (("SC", 13), ("TSO", 17)):
        assert len(board(protocols.looping(2, "shared-id"), memory).shortest()) == length


def test_a_program_that_runs_forever_has_no_number_of_schedules():
    """Counting the schedules of a looping program is refused."""
    with pytest.raises(ValueError, match="runs forever"):
        board(protocols.looping(2), "SC").count()


def test_too_many_schedules_for_a_wall():
    """A wall of more than five million cells is refused, while their number is still told."""
    game = board(protocols.one_shot(3), "TSO")
    assert game.count() == (0, 13357522)
    with pytest.raises(ValueError, match="more than 5,000,000 schedules"):
        game.schedules()


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("0 0 2", "move 3 is '2', which is no move"),
        ("0d", "move 1 is '0d', but the store buffer of vCPU 0 is empty"),
        ("0 0 0", "move 3 is '0', but vCPU 0 waits at F2 until its store buffer is empty; possible there: 0d, 1"),
        ("1 1 1d 1 1 1 1d 1", "move 8 is '1', but vCPU 1 is done; possible there: 0"),
    ],
)
def test_an_impossible_schedule_says_why(schedule, message):
    """A move that is not possible is refused with its number, its reason and what was possible."""
    with pytest.raises(ScheduleError) as error:
        board(protocols.one_shot(2), "TSO").play(schedule)
    assert message in str(error.value)


@given(st.lists(st.sampled_from(["0", "1", "0d", "1d"]), max_size=16))
@settings(deadline=None)
def test_playing_follows_the_machine(codes):
    """Any schedule leads where the machine's own moves lead, or is refused at the first that is not possible."""
    program = protocols.one_shot(2, "no-fault-mb")
    game, machine = GAME, GAME.machine
    state, done = machine.start, 0
    for code in codes:
        kind = "flush" if code.endswith("d") else "step"
        event = next((e for e in machine.events(state) if e.actor == int(code[0]) and e.kind == kind), None)
        if event is None:
            break
        state, done = event.target, done + 1
    path = game.play(" ".join(codes[:done]))
    assert game.states[path[-1].target if path else 0] == state
    assert len(program.actors) == 2
    if done < len(codes):
        with pytest.raises(ScheduleError, match=f"move {done + 1} is"):
            game.play(" ".join(codes))


GAME = board(protocols.one_shot(2, "no-fault-mb"), "TSO")


def test_store_buffering_endings():
    """Store buffering: both loads miss in no schedule under SC, in some under TSO."""
    text = "word x\nword y\nl:\n    A  x = 1\n    B  a = y\nr:\n    C  y = 1\n    D  b = x\n"
    program = Program(text, [["l"], ["r"]], observe=("a", "b"))
    assert board(program, "SC").endings("a", "b") == {(0, 1): 1, (1, 0): 1, (1, 1): 4}
    assert set(board(program, "TSO").endings("a", "b")) == {(0, 0), (0, 1), (1, 0), (1, 1)}


@pytest.mark.parametrize("memory", ["SC", "TSO"])
def test_the_players_data_is_the_graph(memory):
    """Unpacked as its module unpacks it, a race player's data has the board's states, words, moves and distances."""
    program = protocols.one_shot(3, "shared-id")
    game, data = board(program, memory), RacePlayer(program, memory, "x", "x").data
    place = {name: (shift, mask) for word in data["words"] for name, shift, mask in word["parts"]}
    assert data["left"] == game.left.tolist()
    for number, state in enumerate(game.states):
        values = game.machine.unpack(state.shared)
        assert {name: data["shared"][number] >> shift & mask for name, (shift, mask) in place.items()} == values
        flat = data["moves"][data["first"][number] : data["first"][number + 1]]
        moves = [tuple(flat[i : i + 5]) for i in range(0, len(flat), 5)]
        assert moves == [
            (m.actor, data["codes"].index(m.code), KINDS.index(m.kind), data["says"].index(m.text), m.target)
            for m in game.moves[number]
        ]
        for vcpu, local in enumerate(state.locals):
            known = game.machine.actors[vcpu].locals[local]
            assert len(data["locals"][vcpu][data["here"][vcpu][number]]["buffer"]) == len(known.buffer)


def test_the_gallery_is_complete():
    """Each variant of a protocol that some schedule breaks, with two or three vCPUs, stands in the gallery."""
    shown = (Path(__file__).parents[1] / "book/gallery.ipynb").read_text(encoding="utf-8")
    missing = []
    for model, variants in protocols.MODELS.items():
        for variant in variants.variants if model != "looping" else ["shared-id"]:
            least = 3 if variants.variants[variant].marks in ("wraps", "slow") else 2
            searches = [explore(protocols.program(model, variant, n), m) for n in (least, 3) for m in ("SC", "TSO")]
            if any(found.verdict == "OOPS" for found in searches) and f"#race-{model}-{variant}-" not in shown:
                missing.append((model, variant))
    assert missing == []


def test_a_gallery_piece_needs_a_counterexample():
    """A safe program has nothing to show in the gallery."""
    with pytest.raises(ValueError, match="is safe under TSO"):
        counterexample(protocols.one_shot(2), "TSO", "x", "x")


def test_lanes_end_in_the_violation():
    """The picture of a schedule counts its steps and ends with the broken invariant."""
    game = board(protocols.one_shot(3, "shared-id"), "SC")
    alt = diagrams.schedule(game, game.shortest()).alt
    assert alt.startswith(
        "13 steps (vCPU 0, fault: 5; vCPU 1, fault: 2; vCPU 2, protect: 6); of 1 cmpxchg 1 succeeded; OOPS"
    )


def test_a_diff_shows_only_what_changed():
    """A diff names the paths that differ, marks their lines, and states both verdicts."""
    before, after = (board(protocols.one_shot(2, variant), "SC") for variant in ("protector-w-only", "seed"))
    told = repr(diagrams.Diff.between(before, after)).splitlines()
    assert (
        told[0]
        == "before: Broken: 10 of 147 schedules end in OOPS, the shortest after 10 moves (SC, 2 vCPUs, 43 states)."
    )
    assert told[-1] == "after: Safe: none of 202 schedules ends in OOPS (SC, 2 vCPUs, 49 states)."
    assert [line for line in told[1:-1] if line[0] in "+-"] == [
        "-     W3  if not spte.w: W5",
        "+     W3  if not (spte.w or spte.id): W5",
    ]
    assert "  fault:" not in told


def test_the_wall_of_the_shared_mark_is_sparse():
    """Of 289,490 schedules 1,530 are bad with one mark for all, and the bad ones are spread over the wall."""
    ends = board(Program(protocols.SEED_2012, [["fault"], ["protect"], ["fault"]], marks=[1, 1, 1]), "SC").schedules()
    assert ends.dtype == np.bool_
    assert ends.sum() == 1530
    assert np.unique(np.flatnonzero(ends) * 10 // len(ends)).size > 3
