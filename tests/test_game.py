"""mmu.game: boards are the explorer's own graph, and a schedule is told where it went otherwise."""

import json

import numpy as np
import pytest

from mmu.explore import explore, state_graph
from mmu.game import board, graph, replay
from mmu.machine import State
from mmu.protocols import looping, one_shot, program

BROKEN = board(one_shot(3, "shared-id"), "SC")


@pytest.mark.parametrize("memory", ["SC", "TSO"])
@pytest.mark.parametrize(
    "here", [one_shot(3), one_shot(3, "no-mb"), looping(2), program("walk-none", "seed", 3)], ids=lambda here: here.name
)
def test_the_board_is_the_state_graph(here, memory):
    """State by state and move by move the board is what the explorer's arrays hold."""
    level, arrays = board(here, memory), state_graph(here, memory)
    states = zip(arrays.shared.tolist(), map(tuple, arrays.locals.tolist()), strict=True)
    number = [level.number[State(shared, locals_)] for shared, locals_ in states]
    assert sorted(number) == list(range(len(level.states)))
    assert [level.depth[place] for place in number] == arrays.depth.tolist()
    assert [level.bad[place] for place in number] == arrays.bad.tolist()
    moves = sorted(
        (number[s], int(a), number[t]) for s, a, t in zip(arrays.source, arrays.actor, arrays.target, strict=True)
    )
    assert moves == sorted(
        (s, e.actor, level.number[e.target]) for s, events in enumerate(level.events) for e in events
    )


@pytest.mark.parametrize(
    "here", [one_shot(3, "shared-id"), one_shot(3), program("walk-mode", "no-fault-mb", 2)], ids=lambda here: here.name
)
def test_the_graph_in_a_page(here):
    """A page that walks the embedded lists sees the package's counts, and wins in as many moves as the search says."""
    page = json.loads(json.dumps(graph(board(here, "TSO"))))
    found = explore(here, "TSO")
    depth, queue = {0: 0}, [0]
    for state in queue:
        for move in range(page["first"][state], page["first"][state + 1]):
            if page["to"][move] not in depth:
                depth[page["to"][move]] = depth[state] + 1
                queue.append(page["to"][move])
    assert (len(depth), len(page["to"]), max(depth.values())) == (found.states, found.transitions, found.depth)
    assert [depth[state] for state in range(len(depth))] == page["depth"]
    wins = [depth[state] for state in depth if page["bad"][state]]
    assert min(wins, default=-1) == page["to_bad"][0] == (len(found.lines()) or -1)
    state, said = 0, []
    while page["to_bad"][state] > 0:
        moves = range(page["first"][state], page["first"][state + 1])
        best = next(move for move in moves if page["to_bad"][page["to"][move]] == page["to_bad"][state] - 1)
        said.append(f"v{page['actor'][best]} {page['texts'][page['says'][best]]}")
        state = page["to"][best]
    assert said == found.lines()


def test_a_winning_schedule():
    """The message's race, played move by move, breaks the shared mark."""
    played = replay(BROKEN, "0 0 0 0 1 2 2 2 2 2 1 0 2")
    assert (played.won, played.lost_at) == (True, None)
    assert played.reason == "OOPS after 13 moves: spte(w=1, id=0) wp=1 lock=0"
    assert played.lines() == explore(one_shot(3, "shared-id"), "SC").lines()


@pytest.mark.parametrize(
    ("schedule", "lost_at", "reason"),
    [
        (
            "0 0 0 0 1 2 2 2 2 2 0 1 2",
            10,
            "move 11, v0 F4 cmpxchg spte (w=0, id=1) -> (w=1, id=0) fails on spte(w=0, id=0)",
        ),
        ("2 2 2 2 0 0 0 0", 1, "move 2, v2 W1 sets wp = 1: from here no schedule breaks it"),
        ("0 0 0 0", None, "not yet: OOPS is 9 more moves away"),
        ("0 3", 1, "move 2, 3: expected a vCPU from 0 to 2"),
        ("0 x", 1, "move 2, x: expected a vCPU"),
        ("0 0f", 1, "move 2, 0f: vCPU 0's store buffer is empty"),
        ("0 0:F4", 1, "move 2, 0:F4: vCPU 0 is at F1; F4 is not possible there"),
    ],
)
def test_where_a_schedule_went_otherwise(schedule, lost_at, reason):
    """A schedule that does not win is told the first move after which no schedule wins, or that was not possible."""
    played = replay(BROKEN, schedule)
    assert (played.won, played.lost_at) == (False, lost_at)
    assert played.reason.startswith(reason)


def test_moves_that_need_saying():
    """Draining has a word of its own, a choice of paths must be made, and a vCPU that waits cannot move."""
    level = board(looping(2), "TSO")
    assert replay(level, "0").reason == "move 1, 0: vCPU 0 may choose; say 0:F0 or 0:W0 or 0:U0"
    played = replay(level, "0:F0 0 0f 0 v0 1:F0")
    assert [event.kind for event in played.events] == ["step", "step", "flush", "step", "step", "step"]
    assert played.reason == "no OOPS, and there is none: it is in none of the 1251 reachable states"
    assert replay(level, ["0:F0", "0", "0"]).events[-1].text == "drains spte.id = 1"
    once = board(one_shot(2), "SC")
    assert replay(once, "0 0 0 0 0 0").reason == "move 6, 0: vCPU 0 is at done and cannot move"


def test_boards_are_small():
    """A program with too many states for a page is refused."""
    with pytest.raises(ValueError, match="more than 1000 states"):
        board(looping(3), "TSO", max_states=1000)


def test_graph_arrays_are_named():
    """Every array of the state graph names its dtype, whatever the platform's default integer is."""
    arrays = state_graph(one_shot(2), "SC")
    kinds = {
        name: getattr(arrays, name).dtype
        for name in ("shared", "locals", "depth", "source", "target", "actor", "choice")
    }
    assert kinds == {"locals": np.int32, "depth": np.int32} | dict.fromkeys(
        ("shared", "source", "target", "actor", "choice"), np.int64
    )
