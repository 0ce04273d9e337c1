"""Every interleaving of a program, a whole frontier at a time: counts, depth, verdict, shortest counterexample.

:func:`explore` walks the reachable states breadth first with numpy. Chapters 6 to 10 quote its counts and print its
counterexamples. It never runs the program: :class:`mmu.machine.Machine` has turned every move into a table.
:class:`mmu.space.Space` knows every state; :class:`mmu.quotient.Quotient` one of each class of states that differ only
in which of several identical vCPUs is which.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmu.hashset import HashSet
from mmu.machine import OVERFLOW, TSO, Event, Local, Machine
from mmu.program import DONE, OOPS, Expression, Program, ProgramError, expression
from mmu.quotient import Quotient
from mmu.space import MAX_BYTES, OutOfRoom, Space

SAFE, BROKEN, UNKNOWN = "safe", "OOPS", "unknown"

Predicate = Callable[["States"], NDArray[np.bool_]]


@dataclass
class Result:
    """What a search found; ``complete`` tells whether it saw every state, and ``stopped`` why it did not.

    ``transitions`` is None for a search modulo symmetry. ``depth`` is the largest distance from the start.
    ``counterexample`` is a shortest one, and of those the first when actors are tried in order.
    """

    memory: str
    canonical: bool
    states: int = 0
    full_states: int = 0
    transitions: int | None = 0
    depth: int = 0
    verdict: str = UNKNOWN
    counterexample: list[Event] | None = None
    complete: bool = False
    stopped: str | None = None
    machine: Machine | None = field(default=None, repr=False)

    def lines(self) -> list[str]:
        """The counterexample for people: ``v0 F0 reads spte(w=0, id=0)``, one line a step."""
        return [f"v{event.actor} {event.text}" for event in self.counterexample or []]


class States(Mapping[str, Any]):
    """An array of states, column by column and only when asked.

    ``states["spte.w"]`` is a part of a shared word, ``states["0:old.w"]`` a local of vCPU 0 (0 where it has none),
    ``states["done(fault)"]`` where all that run this path have finished, ``states["oops"]`` where somebody reached that
    label, ``states["drained"]`` where every store buffer is empty. An integer or boolean array, one entry a state::

        lambda states: (states["wp"] == 1) & (states["lock"] == 0) & (states["spte.w"] == 1)

    Modulo symmetry a mark in a shared word is 1 where it is anybody's.
    """

    def __init__(self, space: Space | Quotient, frontier: Any) -> None:
        self.machine = space.machine
        self._shared, self._locals = space.shared(frontier), space.locals(frontier)
        program = self.machine.program
        self._paths = list(dict.fromkeys(itertools.chain(*program.actors)))

    def each(self, vcpu: int, value: Callable[[Local], int]) -> NDArray[np.int64]:
        """A value of one vCPU's local state, in every state."""
        values = [value(local) for local in self.machine.actors[vcpu].locals]
        return np.array(values, dtype=np.int64)[self._locals[vcpu]]

    def all(self, vcpus: Iterable[int], test: Callable[[Local], bool]) -> NDArray[np.bool_]:
        """Where the local states of all these vCPUs pass a test."""
        return np.logical_and.reduce([self.each(vcpu, test) != 0 for vcpu in vcpus])

    def at(self, label: str) -> NDArray[np.bool_]:
        """Where some vCPU's next step has this label."""
        return ~self.all(range(len(self.machine.actors)), lambda local: local.label != label)

    def __getitem__(self, name: str) -> NDArray[Any]:
        actors = self.machine.program.actors
        if name in self.machine.place:
            shift, mask = self.machine.place[name]
            return self._shared >> shift & mask
        if name == OOPS:
            return self.at(OOPS)
        if name == "drained":
            return self.all(range(len(actors)), lambda local: not local.buffer)
        if name.startswith("done(") and name[5:-1] in self._paths:
            runners = [vcpu for vcpu, paths in enumerate(actors) if name[5:-1] in paths]
            return self.all(runners, lambda local: local.label == DONE)
        vcpu, colon, of_local = name.partition(":")
        if colon and vcpu.isdigit() and int(vcpu) < len(actors):
            return self.each(int(vcpu), lambda local: dict(local.values).get(of_local, 0))
        raise KeyError(f"states have no {name!r}; they have {', '.join(self)}, and locals such as 0:old")

    def __iter__(self) -> Iterator[str]:
        return iter([*self.machine.place, OOPS, "drained", *(f"done({path})" for path in self._paths)])

    def __len__(self) -> int:
        return len(self._paths) + len(self.machine.place) + 2


Judge = Callable[[Space | Quotient, Any], NDArray[np.bool_]]


def _judge(machine: Machine, space: Space | Quotient, bad: str | Predicate | None) -> Judge:
    """A function that tells which states of a frontier break the invariant."""
    if callable(bad):
        return lambda space, frontier: np.asarray(bad(States(space, frontier)), dtype=np.bool_)
    test = machine.program.oops if bad is None else expression(bad)
    if isinstance(space, Quotient):
        _refuse_telling_apart(space, test)
    ends = any(local.label == OOPS for actor in machine.actors for local in actor.locals)
    if test.names <= set(machine.place) and not ends:  # judged once for each value of the shared words
        shared = machine.unpack(np.arange(1 << machine.shared_bits, dtype=np.int32))
        verdict = np.broadcast_to(np.asarray(test.value(shared), dtype=np.bool_), 1 << machine.shared_bits)
        return lambda space, frontier: verdict[space.shared(frontier)]

    def judge(space: Space | Quotient, frontier: Any) -> NDArray[np.bool_]:
        states = States(space, frontier)
        return np.asarray(test.value(states), dtype=np.bool_) | (states[OOPS] if ends else np.False_)

    return judge


def _refuse_telling_apart(space: Quotient, test: Expression) -> None:
    """Modulo symmetry an invariant may ask whether a mark is there, but not whose it is."""
    shared = space.machine.unpack(np.arange(1 << space.machine.shared_bits, dtype=np.int32))
    others = sorted(test.names - set(shared))
    for values in itertools.product((False, True), repeat=len(others)):
        verdict = np.asarray(test.value({**shared, **dict(zip(others, values, strict=True))}), dtype=np.bool_)
        if space.tells_apart(np.broadcast_to(verdict, 1 << space.machine.shared_bits)):
            raise ProgramError(f"{test.text!r} tells vCPUs apart by their marks; search without symmetry")


def explore(
    program: Program,
    memory: str = TSO,
    *,
    canonical: bool = False,
    bad: str | Predicate | None = None,
    max_states: int | None = None,
    max_bytes: int = MAX_BYTES,
    progress: Callable[[Result], None] | None = None,
) -> Result:
    """Search every interleaving of a program, breadth first.

    The whole space is searched, a broken program's too. Ctrl-C or a bound stops early: the result then holds what was
    counted in whole levels, ``complete`` is False, and the verdict is ``unknown`` unless a bad state was already met.

    Args:
        program: what to run.
        memory: ``"SC"`` or ``"TSO"``.
        canonical: count states modulo a permutation of identical vCPUs; ``full_states`` stays the full count.
        bad: a condition in the program's language, or a predicate on :class:`States`, in place of the program's own.
        max_states: stop after the level that exceeds it.
        max_bytes: how many bytes marks on seen states may take.
        progress: called with the result so far after each level.

    Raises:
        ProgramError: a field is too small for a value that a reachable step stores, or ``bad`` cannot be read; modulo
            symmetry also where the invariant tells vCPUs apart, or those that remember each other's marks are too many.

    >>> from mmu.protocols import one_shot
    >>> result = explore(one_shot(3), "SC")
    >>> result.states, result.transitions, result.depth, result.verdict
    (471, 1099, 14, 'safe')
    """
    result = Result(memory, canonical, transitions=None if canonical else 0)
    bad_depth = None
    try:
        machine = result.machine = Machine(program, memory)
        space = (Quotient if canonical else Space)(machine, max_bytes)
        judge = _judge(machine, space, bad)
        frontier, depth = space.begin(), 0
        while frontier.shape[-1]:
            result.states += frontier.shape[-1]
            result.full_states += space.full_count(frontier)
            result.depth = depth
            if machine.overflows and States(space, frontier).at(OVERFLOW).any():
                raise ProgramError(machine.overflows[0])
            if bad_depth is None and judge(space, frontier).any():
                bad_depth, result.verdict = depth, BROKEN
            if progress:
                progress(result)
            if max_states is not None and result.states > max_states:
                raise OutOfRoom(f"more than {max_states} states")
            frontier, moves = space.advance(frontier)
            if result.transitions is not None:
                result.transitions += moves
            depth += 1
        result.complete = not machine.bounded
        if machine.bounded:
            result.stopped = "a store buffer was full; what a longer one would allow was not searched"
        elif bad_depth is None:
            result.verdict = SAFE
    except KeyboardInterrupt:
        result.complete, result.stopped = False, "interrupted"
    except (OutOfRoom, MemoryError) as error:
        result.stopped = str(error) or "out of memory"
    try:
        if bad_depth is not None:
            result.counterexample = _shortest(space, judge, bad_depth)
    except KeyboardInterrupt:
        result.complete, result.stopped = False, "interrupted"
    return result


@dataclass
class Graph:
    """Every state and every move of a program, as arrays; states are numbered level by level, the start being 0."""

    machine: Machine
    shared: NDArray[np.int64]  # (state,) the shared words as one number, see Machine.unpack
    locals: NDArray[np.int32]  # (state, actor) numbers of local states
    depth: NDArray[np.int32]  # (state,)
    bad: NDArray[np.bool_]  # (state,)
    source: NDArray[np.int64]  # (move,) state
    target: NDArray[np.int64]  # (move,) state
    actor: NDArray[np.int64]  # (move,)
    choice: NDArray[np.int64]  # (move,) which of the actor's moves in its local state, see Actor.moves


def state_graph(program: Program, memory: str = TSO, max_bytes: int = MAX_BYTES) -> Graph:
    """The whole state graph.

    Raises:
        OutOfRoom: it takes more than ``max_bytes`` to search.

    >>> from mmu.protocols import one_shot
    >>> graph = state_graph(one_shot(3), "TSO")
    >>> len(graph.shared), len(graph.source), int(graph.depth.max())
    (738, 1793, 18)
    """
    machine = Machine(program, memory)
    space = Space(machine, max_bytes)
    judge = _judge(machine, space, None)
    levels = [space.begin()]
    while levels[-1].size:
        levels.append(space.advance(levels[-1])[0])
    levels = [space.begin()]  # once more: by now every part of a key has its final place
    while levels[-1].size:
        levels.append(space.advance(levels[-1])[0])
    keys = np.concatenate(levels)
    moves = space.moves(keys)
    order = np.argsort(keys)
    depth = np.repeat(np.arange(len(levels), dtype=np.int32), [len(level) for level in levels])
    return Graph(
        machine,
        space.shared(keys),
        np.stack(space.locals(keys), axis=1).astype(np.int32),
        depth,
        judge(space, keys),
        moves["source"],
        order[np.searchsorted(keys, moves["target"], sorter=order)].astype(np.int64),
        moves["actor"],
        moves["move"],
    )


def _shortest(space: Space | Quotient, judge: Judge, depth: int) -> list[Event]:
    """A shortest way to a bad state at this depth, the first when actors are tried in order.

    From the bad states back, level by level, the states that still lead there; then forward along them.
    """
    levels = [space.begin()]
    for _ in range(depth):
        levels.append(space.advance(levels[-1])[0])
    leading = [_members(space, levels[-1][..., judge(space, levels[-1])])]
    for level in reversed(levels[:-1]):
        source, target = space.edges(level)
        leading.append(_members(space, level[..., np.unique(source[leading[-1].has(target)])]))
    events: list[Event] = []
    state = space.machine.start
    for goals in reversed(leading[:-1]):
        event = next(event for event in space.machine.events(state) if goals.has(space.code(event.target))[0])
        events.append(event)
        state = event.target
    return events


def _members(space: Space | Quotient, frontier: Any) -> HashSet:
    codes = space.codes(frontier)
    members = HashSet(codes.shape[1])
    members.add(codes)
    return members
