"""Every interleaving of a program, a whole frontier at a time: counts, depth, verdict, shortest counterexample.

:func:`explore` walks the reachable states breadth first with numpy. Chapters 6 to 10 quote its counts, print its
counterexamples and play on its state graph. It never runs the program: :class:`mmu.machine.Machine` has turned every
move into a table, so a step is a gather and an addition.

:class:`mmu.space.Space` knows every state; :class:`mmu.quotient.Quotient` one of each class of states that differ only in
which of several identical vCPUs is which.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmu.machine import OVERFLOW, Event, Machine
from mmu.program import DONE, OOPS, Program, ProgramError, expression
from mmu.quotient import Quotient
from mmu.space import MAX_BYTES, OutOfRoom, Space

SAFE, BROKEN, UNKNOWN = "safe", "OOPS", "unknown"

Predicate = Callable[["States"], NDArray[np.bool_]]


@dataclass
class Result:
    """What a search found; ``complete`` tells whether it saw every state.

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
    stopped: str | None = None  # why it is not complete
    machine: Machine | None = field(default=None, repr=False)

    def lines(self) -> list[str]:
        """The counterexample for people: ``v0 F0 reads spte(w=0, id=0)``, one line a step."""
        return [f"v{event.actor} {event.text}" for event in self.counterexample or []]


# --- what is bad ---------------------------------------------------------------------------------------------------------


class States(Mapping[str, Any]):
    """An array of states, column by column and only when asked: every part of a word by name, ``done(path)``, ``oops``.

    ``states["spte.w"]`` is an integer array with one entry a state. An invariant's opposite is a predicate on this:
    ``lambda states: (states["wp"] == 1) & (states["lock"] == 0) & (states["spte.w"] == 1)``.
    """

    def __init__(self, space: Space | Quotient, frontier: Any) -> None:
        self.space, self.machine = space, space.machine
        self._shared, self._frontier = space.shared(frontier), frontier
        self._locals: list[Any] | None = None

    def at(self, vcpu: int, test: Callable[[str], bool]) -> NDArray[np.bool_]:
        """Where one vCPU's next step has a label that passes the test; modulo symmetry, one of its likes."""
        if self._locals is None:
            self._locals = self.space.locals(self._frontier)
        passes = np.array([test(local.label) for local in self.machine.actors[vcpu].locals], dtype=np.bool_)
        return passes[self._locals[vcpu]]

    def any_at(self, label: str) -> NDArray[np.bool_]:
        """Where some vCPU's next step has this label."""
        return np.logical_or.reduce([self.at(vcpu, label.__eq__) for vcpu in range(len(self.machine.actors))])

    def __getitem__(self, name: str) -> Any:
        if name in self.machine.place:
            shift, mask = self.machine.place[name]
            return self._shared >> shift & mask
        actors = range(len(self.machine.actors))
        if name == OOPS:
            return self.any_at(OOPS)
        if name.startswith("done("):
            runners = [vcpu for vcpu in actors if name[5:-1] in self.machine.program.actors[vcpu]]
            return np.logical_and.reduce([self.at(vcpu, lambda label: label == DONE) for vcpu in runners])
        raise KeyError(f"states have no {name!r}; they have {', '.join(self)}")

    def __iter__(self) -> Iterator[str]:
        return iter(
            [
                *self.machine.place,
                OOPS,
                *(f"done({path})" for path in dict.fromkeys(itertools.chain(*self.machine.program.actors))),
            ]
        )

    def __len__(self) -> int:
        return len(list(iter(self)))


def _judge(machine: Machine, bad: str | Predicate | None) -> Callable[[Space | Quotient, Any], NDArray[np.bool_]]:
    """A function that tells which states of a frontier break the invariant."""
    if callable(bad):
        return lambda space, frontier: np.asarray(bad(States(space, frontier)), dtype=np.bool_)
    test: Expression = machine.program.oops if bad is None else expression(bad)
    ends = any(local.label == OOPS for actor in machine.actors for local in actor.locals)
    if test.names <= set(machine.place) and not ends:  # judged once for each value of the shared words
        shared = machine.unpack(np.arange(1 << machine.shared_bits, dtype=np.int32))
        verdict = np.broadcast_to(np.asarray(test.value(shared), dtype=np.bool_), 1 << machine.shared_bits)
        return lambda space, frontier: verdict[space.shared(frontier)]

    def judge(space: Space | Quotient, frontier: Any) -> NDArray[np.bool_]:
        states = States(space, frontier)
        return np.asarray(test.value(states), dtype=np.bool_) | (states[OOPS] if ends else False)

    return judge


# --- the search ----------------------------------------------------------------------------------------------------------


def explore(
    program: Program,
    memory: str = "TSO",
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

    Raises:
        ProgramError: a field is too small for a value that a reachable step stores.

    Args:
        memory: ``"SC"`` or ``"TSO"``.
        canonical: count states modulo a permutation of identical vCPUs; ``full_states`` stays the full count.
        bad: a condition in the program's language, or a predicate on :class:`States`, in place of the program's own.
        max_states: stop after the level that exceeds it.
        max_bytes: how many bytes marks on seen states may take.
        progress: called with the result so far after each level.

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
        judge = _judge(machine, bad)
        frontier, depth = space.begin(), 0
        while frontier.shape[-1]:
            result.states += frontier.shape[-1]
            result.full_states += space.full_count(frontier)
            result.depth = depth
            if bad_depth is None and judge(space, frontier).any():
                bad_depth, result.verdict = depth, BROKEN
            if machine.overflows and States(space, frontier).any_at(OVERFLOW).any():
                raise ProgramError(machine.overflows[0])
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
        if bad_depth is not None:
            result.counterexample = _shortest(space, judge, bad_depth)
    except KeyboardInterrupt:
        result.complete, result.stopped = False, "interrupted"
    except (OutOfRoom, MemoryError) as error:
        result.stopped = str(error) or "out of memory"
    if bad_depth is not None and result.counterexample is None and result.stopped != "interrupted":
        result.counterexample = _shortest(space, judge, bad_depth)
    return result


def _shortest(space: Space | Quotient, judge: Callable[..., NDArray[np.bool_]], depth: int) -> list[Event]:
    """A shortest way to a bad state, the first when actors are tried in order.

    From the bad states of that depth back, level by level, the states that still lead there; then forward along them.
    """
    levels = [space.begin()]
    for _ in range(depth):
        levels.append(space.advance(levels[-1])[0])
    last = levels[-1]
    bad = judge(space, last)
    targets = space.codes(last)[bad]
    leading = [set(targets.tolist())]
    for level in reversed(levels[:-1]):
        edges = space.edges(level)
        sources = np.unique(edges["source"][np.isin(edges["target"], targets)])
        targets = space.codes(level)[sources]
        leading.append(set(targets.tolist()))
    events: list[Event] = []
    state = space.machine.start
    for goals in reversed(leading[:-1]):
        event = next(event for event in space.machine.events(state) if space.key(event.target) in goals)
        events.append(event)
        state = event.target
    return events
