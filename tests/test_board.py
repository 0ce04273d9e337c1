"""mmu.board against the explorer: a game is played on the graph that the verdict was found on."""

import numpy as np
import pytest

from mmu.board import ScheduleError, board
from mmu.explore import explore, state_graph
from mmu.machine import State
from mmu.protocols import looping, one_shot, program
from tests import interpreter

PROGRAMS = [one_shot(3), one_shot(3, "no-mb"), looping(2), looping(2, "shared-id"), program("walk-none", "seed", 3)]


@pytest.mark.parametrize("memory", ["SC", "TSO"])
@pytest.mark.parametrize("here", PROGRAMS, ids=lambda here: here.name)
def test_the_board_is_the_state_graph(here, memory):
    """State by state and move by move a board is what the explorer's arrays hold."""
    game, arrays = board(here, memory), state_graph(here, memory)
    states = zip(arrays.shared.tolist(), map(tuple, arrays.locals.tolist()), strict=True)
    place = {state: number for number, state in enumerate(game.states)}
    number = np.array([place[State(shared, locals_)] for shared, locals_ in states], dtype=np.int64)
    assert sorted(number.tolist()) == list(range(len(game.states)))
    assert game.depth[number].tolist() == arrays.depth.tolist()
    assert game.oops[number].tolist() == arrays.bad.tolist()
    arrows = zip(number[arrays.source].tolist(), arrays.actor.tolist(), number[arrays.target].tolist(), strict=True)
    moves = [(source, move.actor, move.target) for source, each in enumerate(game.moves) for move in each]
    assert sorted(arrows) == sorted(moves)
    local = arrays.locals[arrays.source, arrays.actor]
    choices = [len(arrays.machine.actors[actor].moves[at]) for actor, at in zip(arrays.actor, local, strict=True)]
    assert (arrays.choice < choices).all()


@pytest.mark.parametrize("memory", ["SC", "TSO"])
@pytest.mark.parametrize("here", PROGRAMS, ids=lambda here: here.name)
def test_the_shortest_way_is_the_counterexample(here, memory):
    """From the start a board's shortest way to OOPS is the explorer's counterexample, move by move; safe is safe."""
    game, found = board(here, memory), explore(here, memory)
    assert game.safe == (found.verdict == "safe")
    said = [f"v{move.actor} {move.text.removesuffix(' (into its store buffer)')}" for move in game.shortest()]
    assert said == found.lines()
    assert [move.target for move in game.play(" ".join(m.code for m in game.shortest()))][-1:] == [
        move.target for move in game.shortest()[-1:]
    ]
    nearest = interpreter.search(here, memory)[3]
    assert int(game.left[0]) == (-1 if nearest is None else nearest)


def test_the_race_of_the_message_by_hand():
    """The message's own schedule, typed move by move, breaks the shared mark, and no other order of its end does."""
    game = board(one_shot(3, "shared-id"), "SC")
    assert game.oops[game.play("0 0 0 0 1 2 2 2 2 2 1 0 2")[-1].target]
    assert game.left[game.play("0 0 0 0 1 2 2 2 2 2 0")[-1].target] == -1
    with pytest.raises(ScheduleError, match="move 2 is '0d'"):
        game.play("0 0d")


def test_graph_arrays_name_their_dtype():
    """Every array of the state graph names its dtype, whatever the platform's default integer is."""
    arrays = state_graph(one_shot(2), "SC")
    kinds = {name: getattr(arrays, name).dtype for name in ("locals", "depth", "shared", "source", "target", "actor")}
    assert set(kinds.values()) == {np.dtype(np.int32), np.dtype(np.int64)}
    assert (kinds["locals"], kinds["depth"], kinds["target"]) == (np.int32, np.int32, np.int64)
