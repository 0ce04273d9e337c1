"""Schedules played by hand: a program's whole state graph for a player, and what became of one schedule.

The board of a race game is the explorer's own state graph, so a level is either beaten or proved unbeatable. Chapters 0
and 5 to 10 embed :func:`graph` in their pages; exercises judge a reader's schedule with :func:`replay`.

A schedule is a list of moves in words: ``0`` lets vCPU 0 take its next step, ``0f`` drains the oldest store of its
buffer (flush), ``0:W0`` takes the step labelled W0 where vCPU 0 has a choice of paths. ``0`` alone also drains where
draining is all that vCPU 0 can do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mmu.machine import TSO, Event, Machine, State
from mmu.program import Program

MAX_GRAPH = 100_000


@dataclass
class Board:
    """A program's whole state graph. States are numbered breadth first, the start being 0."""

    machine: Machine
    states: list[State]
    events: list[list[Event]]  # of each state, every move that is possible in it
    number: dict[State, int]
    depth: list[int]  # moves from the start
    bad: list[bool]  # whether the invariant is broken
    to_bad: list[int]  # moves to the nearest bad state, -1 where none can be reached any more


def board(program: Program, memory: str = TSO, max_states: int = MAX_GRAPH) -> Board:
    """Every state and every move of a small program.

    Raises:
        ValueError: there are more than ``max_states`` states.

    >>> from mmu.protocols import one_shot
    >>> small = board(one_shot(3), "SC")
    >>> len(small.states), sum(map(len, small.events)), max(small.depth), any(small.bad)
    (471, 1099, 14, False)
    """
    machine = Machine(program, memory)
    states, number, depth, events = [machine.start], {machine.start: 0}, [0], []
    for place, state in enumerate(states):  # the list grows while it is walked
        events.append(machine.events(state))
        for event in events[-1]:
            if event.target not in number:
                number[event.target] = len(states)
                states.append(event.target)
                depth.append(depth[place] + 1)
        if len(states) > max_states:
            raise ValueError(
                f"{program.name or 'the program'} has more than {max_states} states; a board holds no more"
            )
    before: list[list[int]] = [[] for _ in states]
    for place, moves in enumerate(events):
        for event in moves:
            before[number[event.target]].append(place)
    bad = [machine.broken(state) for state in states]
    to_bad = [0 if is_bad else -1 for is_bad in bad]
    reached = [place for place, is_bad in enumerate(bad) if is_bad]
    for place in reached:  # breadth first, against the moves
        for source in before[place]:
            if to_bad[source] < 0:
                to_bad[source] = to_bad[place] + 1
                reached.append(source)
    return Board(machine, states, events, number, depth, bad, to_bad)


def graph(board: Board) -> dict[str, Any]:
    """A board as plain lists for a page: numbers throughout, and each text once.

    ============= ================================================================================================
    ``name``      the program's name; ``memory`` its memory model; ``text`` the protocol itself
    ``parts``     names of the shared words' parts; ``values[s]`` what they are in state s
    ``vcpus``     how many; ``locals[v]`` vCPU v's local states in words (``F2 [spte.id=1]``: next step, buffer),
                  ``at[s][v]`` which of them it is in
    ``texts``     what moves say; ``first[s]`` .. ``first[s + 1]`` the moves of state s; ``actor``, ``flush`` (1 for the
                  draining of a buffer), ``says`` (a text's number) and ``to`` (a state) of each move
    ``depth``     of each state, moves from the start, which is state 0; ``bad`` 1 where the invariant is broken;
                  ``to_bad`` moves to the nearest bad state, -1 where there is none any more
    ============= ================================================================================================

    The shortest win takes ``to_bad[0]`` moves; -1 means that the level cannot be won.
    """
    machine = board.machine
    moves = [event for events in board.events for event in events]
    texts = list(dict.fromkeys(event.text for event in moves))
    text_number = {text: number for number, text in enumerate(texts)}
    first = [0]
    for events in board.events:
        first.append(first[-1] + len(events))
    return {
        "name": machine.program.name,
        "memory": machine.memory,
        "text": machine.program.text.strip("\n"),
        "parts": list(machine.place),
        "values": [list(machine.unpack(state.shared).values()) for state in board.states],
        "vcpus": len(machine.actors),
        "locals": [[local.show() for local in actor.locals] for actor in machine.actors],
        "at": [list(state.locals) for state in board.states],
        "texts": texts,
        "first": first,
        "actor": [event.actor for event in moves],
        "flush": [int(event.kind == "flush") for event in moves],
        "says": [text_number[event.text] for event in moves],
        "to": [board.number[event.target] for event in moves],
        "depth": board.depth,
        "bad": [int(bad) for bad in board.bad],
        "to_bad": board.to_bad,
    }


@dataclass
class Replay:
    """What became of a schedule: the events that happened, whether it broke the invariant, and where it went otherwise.

    ``lost_at`` is the position of the first move after which no schedule whatever breaks the invariant any more, or of
    the first move that was not possible; None where there is no such move.
    """

    board: Board
    events: list[Event] = field(default_factory=list)
    won: bool = False
    lost_at: int | None = None
    reason: str = ""

    def lines(self) -> list[str]:
        """The events for people, one line each."""
        return [f"v{event.actor} {event.text}" for event in self.events]


_MOVE = re.compile(r"v?(\d+)(f)?(?::(\w+(?:\[\d+\])?))?")


def replay(board: Board, schedule: str | Sequence[str]) -> Replay:
    """Play a schedule from the start, and say which move, if any, spoilt it.

    >>> from mmu.protocols import one_shot
    >>> level = board(one_shot(3, "shared-id"), "SC")
    >>> replay(level, "0 0 0 0 1 2 2 2 2 2 1 0 2").won
    True
    >>> print(replay(level, "0 0 0 0 1 2 2 2 2 2 0 1 2").reason)
    move 11, v0 F4 cmpxchg spte (w=0, id=1) -> (w=1, id=0) fails on spte(w=0, id=0): from here no schedule breaks it
    """
    played, state = Replay(board), board.machine.start
    moves = schedule.replace(",", " ").split() if isinstance(schedule, str) else list(schedule)
    for position, move in enumerate(moves):
        events = board.events[board.number[state]]
        event, reason = _choose(board.machine, state, events, move)
        if event is None:
            if played.lost_at is None:
                played.lost_at = position
                played.reason = f"move {position + 1}, {move}: {reason}"
            return played
        played.events.append(event)
        state = event.target
        number = board.number[state]
        if board.bad[number]:
            played.won, played.reason = True, f"OOPS after {position + 1} moves: {board.machine.show(state)}"
            return played
        if board.to_bad[number] < 0 <= board.to_bad[0] and played.lost_at is None:
            played.lost_at = position
            played.reason = f"move {position + 1}, v{event.actor} {event.text}: from here no schedule breaks it"
    left = board.to_bad[board.number[state]]
    if board.to_bad[0] < 0:
        played.reason = f"no OOPS, and there is none: it is in none of the {len(board.states)} reachable states"
    elif left > 0:
        played.reason = f"not yet: OOPS is {left} more move{'s' if left > 1 else ''} away"
    return played


def _choose(machine: Machine, state: State, events: list[Event], move: str) -> tuple[Event | None, str]:
    """The event that a move in words means, or why there is none."""
    found = _MOVE.fullmatch(move)
    if not found or int(found[1]) >= len(machine.actors):
        last = len(machine.actors) - 1
        return None, f"expected a vCPU from 0 to {last}, with f to drain its buffer or :LABEL to choose a step"
    vcpu, flush, label = int(found[1]), bool(found[2]), found[3]
    mine = [event for event in events if event.actor == vcpu]
    steps = [event for event in mine if event.kind == "step"]
    here = machine.show_local(vcpu, state)
    if not mine:
        return None, f"vCPU {vcpu} is at {here} and cannot move"
    if flush:
        drains = [event for event in mine if event.kind == "flush"]
        return (drains[0], "") if drains else (None, f"vCPU {vcpu}'s store buffer is empty")
    if label:
        named = [event for event in steps if event.label == label]
        return (named[0], "") if named else (None, f"vCPU {vcpu} is at {here}; {label} is not possible there")
    if len(steps) > 1:
        return None, f"vCPU {vcpu} may choose; say {' or '.join(f'{vcpu}:{step.label}' for step in steps)}"
    return (steps or mine)[0], ""
