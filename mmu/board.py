"""A program's whole state graph, small enough to be shown: the board of a race game, and every schedule of it.

:mod:`mmu.explore` answers whether some interleaving breaks a protocol; a board keeps each state and each move with its
words, so that a reader can walk there. Chapters 6 to 10 play on boards; the wall of chapter 9 is every path through
one. What is here is for looking at, hence small, hence in plain Python but for the wall.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mmu.explore import state_graph
from mmu.machine import Event, Machine, State
from mmu.program import DONE, OOPS, Program

MAX_STATES = 20_000
MAX_SCHEDULES = 5_000_000
KINDS = ("step", "barrier", "succeeded", "failed", "locks", "unlocks", "drain")


class ScheduleError(ValueError):
    """A schedule names a move that is not possible; the message says which, and what that actor waits for."""


@dataclass(frozen=True)
class Move:
    """One move: who, its code in a schedule (``0``, ``1d``), its kind, in words, and the state it leads to."""

    actor: int
    code: str
    kind: str
    text: str
    target: int


@dataclass(frozen=True)
class Board:
    """Every reachable state of a program under one memory model, in the order of a breadth-first search.

    ``states[0]`` is the start. ``moves`` lists for each state what can be done next, actors in order, an actor's steps
    before the draining of its buffer. ``oops`` tells which states break the invariant, ``depth`` how many moves each is
    from the start, both ``# (state,)``.
    """

    machine: Machine
    states: tuple[State, ...] = field(repr=False)
    moves: tuple[tuple[Move, ...], ...] = field(repr=False)
    oops: NDArray[np.bool_] = field(repr=False)
    depth: NDArray[np.int32] = field(repr=False)

    @cached_property
    def _into(self) -> list[list[int]]:
        """Where the moves into each state come from."""
        into: list[list[int]] = [[] for _ in self.states]
        for here, moves in enumerate(self.moves):
            for move in moves:
                into[move.target].append(here)
        return into

    @cached_property
    def left(self) -> NDArray[np.int64]:
        """How many moves each state is from the nearest that breaks the invariant, -1 where none can be reached."""
        left = np.where(self.oops, 0, -1).astype(np.int64)
        queue = deque(np.flatnonzero(self.oops).tolist())
        while queue:
            here = queue.popleft()
            for before in self._into[here]:
                if left[before] < 0:
                    left[before] = left[here] + 1
                    queue.append(before)
        return left

    @property
    def safe(self) -> bool:
        """Whether no reachable state breaks the invariant."""
        return not self.oops.any()

    def verdict(self) -> str:
        """The verdict in one sentence with its numbers, as it stands beside a protocol."""
        vcpus = len(self.machine.actors)
        where = f"{self.machine.memory}, {vcpus} vCPUs, {len(self.states):,} states"
        if self.machine.program.forever:
            return (
                f"Safe: no OOPS anywhere ({where})."
                if self.safe
                else f"Broken: OOPS after {self.left[0]} moves ({where})."
            )
        bad, total = self.count()
        if self.safe:
            return f"Safe: none of {total:,} schedules ends in OOPS ({where})."
        return f"Broken: {bad:,} of {total:,} schedules end in OOPS, the shortest after {self.left[0]} moves ({where})."

    def shortest(self, start: int = 0) -> list[Move]:
        """A shortest way from a state into the broken invariant, the first when actors are tried in order."""
        path, here = [], start
        while self.left[here] > 0:
            move = next(move for move in self.moves[here] if self.left[move.target] == self.left[here] - 1)
            path.append(move)
            here = move.target
        return path

    def path_to(self, there: int) -> list[Move]:
        """A shortest way from the start to a state."""
        path: list[Move] = []
        while there:
            before = min(self._into[there], key=lambda here: (self.depth[here], here))
            path.append(next(move for move in self.moves[before] if move.target == there))
            there = before
        return path[::-1]

    def ways(self) -> NDArray[np.int64]:
        """How many ways lead from the start to each state ``# (state,)``; counts schedules by how they end.

        Raises:
            ValueError: the graph has a cycle.
        """
        ways = np.zeros(len(self.states), dtype=np.int64)
        ways[0] = 1
        for here in reversed(self._order()):
            for move in self.moves[here]:
                ways[move.target] += ways[here]
        return ways

    def count(self) -> tuple[int, int]:
        """How many complete schedules pass through a broken state, and how many there are.

        Raises:
            ValueError: the graph has a cycle.
        """
        total, bad = [0] * len(self.states), [0] * len(self.states)
        for here in self._order():
            targets = [move.target for move in self.moves[here]]
            total[here] = sum(total[target] for target in targets) or 1
            bad[here] = total[here] if self.oops[here] else sum(bad[target] for target in targets)
        return bad[0], total[0]

    def chance(self) -> float:
        """How likely OOPS is when each move is drawn at random, all possible ones alike: what a random tester meets.

        Raises:
            ValueError: the graph has a cycle.
        """
        chance = np.zeros(len(self.states), dtype=np.float64)
        for here in self._order():
            moves = self.moves[here]
            chance[here] = 1.0 if self.oops[here] else sum(chance[move.target] for move in moves) / max(1, len(moves))
        return float(chance[0])

    def _order(self) -> list[int]:
        """The states, each after all that it leads to."""
        open_moves = [len(moves) for moves in self.moves]
        ready = self.ends()
        for here in ready:  # the list grows while it is walked
            for before in self._into[here]:
                open_moves[before] -= 1
                if not open_moves[before]:
                    ready.append(before)
        if len(ready) < len(self.states):
            raise ValueError("the program runs forever, so its schedules cannot be counted; expected a one-shot one")
        return ready

    def play(self, schedule: str) -> list[Move]:
        """The moves of a schedule such as ``"0 0 1 2d"``: the actor of each step, with ``d`` for draining its buffer.

        Raises:
            ScheduleError: a move that is not possible there.
        """
        path, here = [], 0
        for number, code in enumerate(re.findall(r"[^\s,]+", schedule), 1):
            found = next((move for move in self.moves[here] if move.code == code), None)
            if found is None:
                can = ", ".join(move.code for move in self.moves[here]) or "nothing: all are done"
                raise ScheduleError(f"move {number} is {code!r}, {self._why_not(here, code)}; possible there: {can}")
            path.append(found)
            here = found.target
        return path

    def _why_not(self, here: int, code: str) -> str:
        found = re.fullmatch(r"(\d)(d?)(\.\d)?", code)
        if not found or int(found[1]) >= len(self.machine.actors):
            return "which is no move: write the actor's number, with d behind it to drain its store buffer"
        actor = int(found[1])
        local = self.machine.actors[actor].locals[self.states[here].locals[actor]]
        if found[2]:
            return f"but the store buffer of vCPU {actor} is empty"
        if local.label in (DONE, OOPS):
            return f"but vCPU {actor} is done"
        steps = [step for path in self.machine.program.paths[actor].values() for step in path]
        waiting = next((step for step in steps if step.label == local.label), None)
        if waiting and waiting.text.startswith("wait "):
            return f"but vCPU {actor} waits at {local.label} until {waiting.text.removeprefix('wait ')}"
        if local.buffer:
            return f"but vCPU {actor} waits at {local.label or 'its start'} until its store buffer is empty"
        return f"but vCPU {actor} waits at {local.label or 'its first step'} for the lock"

    def schedules(self) -> NDArray[np.bool_]:
        """Every complete schedule, in the order of their codes: True where it passes through a broken state.

        Raises:
            ValueError: the graph has a cycle, or more than 5 million schedules.
        """
        if self.count()[1] > MAX_SCHEDULES:
            raise ValueError(f"more than {MAX_SCHEDULES:,} schedules; the wall would have too many cells")
        ways: list[NDArray[np.bool_]] = [np.zeros(0, dtype=np.bool_)] * len(self.states)
        for here in self._order():
            below = np.concatenate([ways[move.target] for move in self.moves[here]] or [np.zeros(1, dtype=np.bool_)])
            ways[here] = np.ones_like(below) if self.oops[here] else below
        return ways[0]

    def ending(self, here: int) -> dict[str, int]:
        """What the locals of all actors hold in a state, by name: the registers of a litmus test at its end."""
        values: dict[str, int] = {}
        for actor, local in zip(self.machine.actors, self.states[here].locals, strict=True):
            values.update(actor.locals[local].values)
        return values

    def endings(self, *names: str) -> dict[tuple[int, ...], int]:
        """How many schedules end with which values of these locals; the program must observe them."""
        ways, counted = self.ways(), {}
        for here in self.ends():
            values = tuple(self.ending(here)[name] for name in names)
            counted[values] = counted.get(values, 0) + int(ways[here])
        return dict(sorted(counted.items()))

    def ends(self) -> list[int]:
        """The states in which nothing more can be done."""
        return [here for here, moves in enumerate(self.moves) if not moves]


def board(program: Program, memory: str = "TSO") -> Board:
    """The state graph of a program.

    Args:
        program: what is run.
        memory: ``"SC"`` or ``"TSO"``.

    Raises:
        ValueError: more than 20,000 states, too many for anything that is to be looked at.

    >>> from mmu.program import Program
    >>> text = "word w\\nset:\\n    S0  w = 1\\nsee:\\n    L0  if w: done\\n    L1  w = 0\\noops: w\\n"
    >>> game = board(Program(text, [["set"], ["see"]]), "SC")
    >>> len(game.states), [move.text for move in game.shortest()]
    (7, ['S0 sets w = 1'])
    """
    graph = state_graph(program, memory)
    if len(graph.shared) > MAX_STATES:
        raise ValueError(
            f"{len(graph.shared):,} states are more than {MAX_STATES:,}; search them with mmu.explore instead"
        )
    machine = graph.machine
    rows = zip(graph.shared.tolist(), graph.locals.tolist(), strict=True)
    states = [State(shared, tuple(local)) for shared, local in rows]
    number = {state: place for place, state in enumerate(states)}
    moves = tuple(tuple(_moves(machine, state, machine.events(state), number)) for state in states)
    return Board(machine, tuple(states), moves, graph.bad, graph.depth)


def kind_of(event: Event) -> str:
    """What a move looks like in a lane: one of :data:`KINDS`."""
    if event.kind == "flush":
        return "drain"
    verb = event.text.split()[1]
    if verb == "smp_mb":
        return "barrier"
    if verb == "cmpxchg":
        return "failed" if " fails on " in event.text else "succeeded"
    return {"takes": "locks", "releases": "unlocks"}.get(verb, "step")


def _moves(machine: Machine, state: State, events: list[Event], number: dict[State, int]) -> list[Move]:
    moves: list[Move] = []
    for event in events:
        actor = event.actor
        before, after = (len(machine.actors[actor].locals[s.locals[actor]].buffer) for s in (state, event.target))
        here = machine.actors[actor].locals[state.locals[actor]]
        begins = [steps[0].label for steps in machine.program.paths[actor].values()] if not here.label else []
        label = event.text.split()[0]
        choice = begins.index(label) if label in begins else 0  # which of its paths the actor begins
        code = f"{actor}d" if event.kind == "flush" else f"{actor}.{choice}" if choice else f"{actor}"
        text = f"{event.text} (into its store buffer)" if after > before else event.text
        moves.append(Move(actor, code, kind_of(event), text, number[event.target]))
    return moves
