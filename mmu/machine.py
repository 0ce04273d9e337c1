"""A program under a memory model, as tables: every local state of every actor, and what each of its moves does.

A vCPU's whole local state (the step it is at, its locals, its store buffer) becomes one small number. One step touches
one word, so the program's text is run once for each local state and value of that word, and never again: a search looks
moves up. The readable definition and the fast engine are one definition. Chapter 6 tells sequential consistency (SC)
from x86-TSO with it.

x86-TSO (Owens, Sarkar, Sewell 2009): a plain store enters the vCPU's own first-in first-out store buffer, and draining
its head is a move of its own; a load is answered by the newest entry of the own buffer, else by memory; a fence or a
locked step waits until the own buffer is empty. Under SC a store acts at once.

A program that loops without ever draining would fill a buffer without end. Here a buffer holds at most BUFFER stores,
or as many as a path has; ``Machine.bounded`` says whether a store ever had to wait for that reason. What is bad with a
bounded buffer is bad without; what is safe with it is not thereby proved safe.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmu.program import DONE, OOPS, Program, ProgramError, Step, Word

SC, TSO = "SC", "TSO"
MEMORY_MODELS = (SC, TSO)
MAX_SHARED_BITS = 20
BUFFER = 4
OVERFLOW = "overflow"  # the label of an actor that stored a value its field cannot hold

Writes = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Local:
    """One actor's local state: its next step's label, its live locals, its store buffer with the oldest store first."""

    path: str = ""
    label: str = ""  # "" at the choice of a path, else the next step, DONE or OOPS
    values: Writes = ()
    buffer: tuple[Writes, ...] = ()

    def show(self) -> str:
        """``F4``, ``F2 [spte.id=1]`` with a store in the buffer, ``start`` before the first step."""
        text = self.label or "start"
        if self.values:
            text += f" {', '.join(f'{name}={value}' for name, value in self.values)}"
        if self.buffer:
            text += f" [{'; '.join(', '.join(f'{name}={value}' for name, value in entry) for entry in self.buffer)}]"
        return text


@dataclass(frozen=True)
class Move:
    """One thing an actor may do next: a step of a path, or (``step`` None) draining its oldest store."""

    path: str
    step: Step | None


@dataclass
class Actor:
    """One actor's local states and, for each move and value of the shared words, where it leads.

    ``to_local[move, local, shared]`` is the next local state, -1 where the move is not possible;
    ``to_shared[move, local, shared]`` is the next value of the shared words.
    """

    locals: list[Local]
    moves: list[list[Move]]  # of each local state
    to_local: NDArray[np.int32] = field(repr=False)  # (move, local, shared)
    to_shared: NDArray[np.int32] = field(repr=False)  # (move, local, shared)


@dataclass(frozen=True)
class State:
    """A whole state: the shared words as one number, and the number of each actor's local state."""

    shared: int
    locals: tuple[int, ...]


@dataclass(frozen=True)
class Event:
    """One move of one actor as it happened: who, what kind, in words, and the state it led to."""

    actor: int
    kind: str  # "step" or "flush"
    label: str  # of the step, "" for a flush
    text: str
    target: State


class Machine:
    """A program under one memory model.

    Args:
        program: what to run.
        memory: ``"SC"`` or ``"TSO"``.

    Raises:
        ValueError: an unknown memory model. ProgramError: too many shared bits.

    >>> from mmu.program import Program
    >>> two = Program("word w\\nset:\\n    S0  w = 1\\n", actors=[["set"], ["set"]])
    >>> [local.show() for local in Machine(two, "TSO").actors[0].locals]
    ['start', 'done [w=1]', 'done']
    """

    def __init__(self, program: Program, memory: str = TSO) -> None:
        if memory not in MEMORY_MODELS:
            raise ValueError(f"memory model {memory!r}; expected one of {', '.join(MEMORY_MODELS)}")
        self.program, self.memory = program, memory
        self.place: dict[str, tuple[int, int]] = {}  # part -> (shift, mask) inside the shared number
        self.span: dict[str, tuple[int, int]] = {}  # word -> (shift, mask)
        shift = start = 0
        for word in program.words:
            low = shift
            for part in word.parts:
                width = max(1, (int(part.size) - 1).bit_length())
                self.place[part.name] = (shift, (1 << width) - 1)
                start |= part.start << shift
                shift += width
            self.span[word.name] = (low, (1 << (shift - low)) - 1)
        self.shared_bits = shift
        if shift > MAX_SHARED_BITS:
            raise ProgramError(f"the shared words need {shift} bits; the tables hold {MAX_SHARED_BITS} at most")
        self.bounded = False
        self.overflows: list[str] = []
        self.actors = [_Closure(self, vcpu).actor() for vcpu in range(len(program.actors))]
        self.start = State(start, (0,) * len(self.actors))

    # -- shared words as one number --

    def pack(self, values: Mapping[str, int]) -> tuple[int, int]:
        """``(mask, bits)`` that write these parts into the shared number."""
        mask = bits = 0
        for name, value in values.items():
            shift, top = self.place[name]
            mask |= top << shift
            bits |= value << shift
        return mask, bits

    def word_values(self, word: Word) -> list[dict[str, int]]:
        """Every value that a word can have, as ``{part: value}``."""
        names = [part.name for part in word.parts]
        ranges = [range(int(part.size)) for part in word.parts]
        return [dict(zip(names, values, strict=True)) for values in itertools.product(*ranges)]

    def unpack(self, shared: Any) -> dict[str, Any]:
        """Every part's value, of one shared number or of an array of them."""
        return {name: shared >> shift & mask for name, (shift, mask) in self.place.items()}

    # -- one state at a time --

    def events(self, state: State) -> list[Event]:
        """Every move that is possible in a state, actor by actor, an actor's steps before its draining."""
        found = []
        for vcpu, actor in enumerate(self.actors):
            here = state.locals[vcpu]
            for number, move in enumerate(actor.moves[here]):
                there = int(actor.to_local[number, here, state.shared])
                if there < 0:
                    continue
                after = int(actor.to_shared[number, here, state.shared])
                target = State(after, (*state.locals[:vcpu], there, *state.locals[vcpu + 1 :]))
                kind, label = ("step", move.step.label) if move.step else ("flush", "")
                found.append(Event(vcpu, kind, label, self._tell(vcpu, actor.locals[here], move, state.shared), target))
        return found

    def _tell(self, vcpu: int, local: Local, move: Move, shared: int) -> str:
        if move.step is None:
            return f"drains {', '.join(f'{name} = {value}' for name, value in local.buffer[0])}"
        env = {**dict(local.values), "me": self.program.marks[vcpu]}
        seen = {}
        if move.step.word is not None:
            seen = self.unpack(shared)
            seen = {part.name: seen[part.name] for part in move.step.word.parts}
            seen = _forward(seen, local.buffer)
        outcome = move.step.act(env, seen)
        assert outcome is not None
        return move.step.tell(seen, outcome)

    def show(self, state: State) -> str:
        """The shared words of a state in words: ``spte(w=0, id=1) wp=0 lock=0``."""
        values = self.unpack(state.shared)
        return " ".join(word.show(values) for word in self.program.words)

    def show_local(self, vcpu: int, state: State) -> str:
        """One actor's local state in words, see :meth:`Local.show`."""
        return self.actors[vcpu].locals[state.locals[vcpu]].show()


def _forward(seen: dict[str, int], buffer: Sequence[Writes]) -> dict[str, int]:
    """What a load sees: memory, with the own buffered stores laid over it, the newest last."""
    for entry in buffer:
        for name, value in entry:
            if name in seen:
                seen[name] = value
    return seen


class _Closure:
    """Closes one actor's local states over everything that the shared words may hold."""

    def __init__(self, machine: Machine, vcpu: int) -> None:
        self.machine, self.vcpu = machine, vcpu
        self.program, self.buffered = machine.program, machine.memory == TSO
        self.paths = self.program.paths[vcpu]
        self.steps = {(path, step.label): step for path, steps in self.paths.items() for step in steps}
        stores = (sum(step.kind == "store" for step in steps) for steps in self.paths.values())
        self.buffer = max(BUFFER, *stores)
        self.sizes = {part.name: int(part.size) for part in self.program.parts}
        self.locals = [Local()]
        self.number = {self.locals[0]: 0}
        self.moves: list[list[Move]] = []
        self.effects: list[tuple[int, int, Any, Any]] = []  # (move, local, next local by shared, next shared)
        self.shared = np.arange(1 << machine.shared_bits, dtype=np.int32)
        self.word_bits = {name: self.shared >> shift & mask for name, (shift, mask) in machine.span.items()}

    def actor(self) -> Actor:
        for here, local in enumerate(self.locals):  # the list grows while it is walked
            self.moves.append(self._moves(local))
            for number, move in enumerate(self.moves[here]):
                self.effects.append((number, here, *self._effect(local, move)))
        width = max(map(len, self.moves))
        to_local = np.full((width, len(self.locals), len(self.shared)), -1, dtype=np.int32)
        to_shared = np.zeros_like(to_local)
        for number, here, there, after in self.effects:
            to_local[number, here] = there
            to_shared[number, here] = after
        return Actor(self.locals, self.moves, to_local, to_shared)

    def _moves(self, local: Local) -> list[Move]:
        moves = []
        if not local.label:
            moves = [Move(path, steps[0]) for path, steps in self.paths.items()]
        elif local.label not in (DONE, OOPS, OVERFLOW):
            moves = [Move(local.path, self.steps[local.path, local.label])]
        if self.buffered and local.buffer:
            full = len(local.buffer) >= self.buffer
            self.machine.bounded |= full and any(move.step.kind == "store" for move in moves if move.step)
            moves = [
                move for move in moves if move.step and not (move.step.drains or (full and move.step.kind == "store"))
            ]
            moves.append(Move("", None))
        return moves

    def _effect(self, local: Local, move: Move) -> tuple[Any, Any]:
        """Next local state and next shared number, each for every shared number."""
        step = move.step
        if step is None:
            return self._there(Local(local.path, local.label, local.values, local.buffer[1:])), self._written(
                local.buffer[0]
            )
        env = {**dict(local.values), "me": self.program.marks[self.vcpu]}
        if step.reads:
            return self._read(local, move.path, step, env)
        outcome = step.act(env, {})
        assert outcome is not None
        writes = tuple(outcome.writes.items())
        if self._overflows(step, writes):
            return self._there(Local(label=OVERFLOW)), self.shared
        buffer = local.buffer
        if step.kind == "store" and self.buffered:
            buffer, writes = (*buffer, writes), ()
        return self._there(self._next(move.path, step, outcome, buffer)), self._written(writes)

    def _read(self, local: Local, path: str, step: Step, env: Mapping[str, int]) -> tuple[Any, Any]:
        """The same for a step that depends on its word: run the text once for each value of that word."""
        assert step.word is not None
        shift, mask = self.machine.span[step.word.name]
        there = np.full(mask + 1, -1, dtype=np.int32)  # (value of the word,)
        after = np.zeros(mask + 1, dtype=np.int32)
        for memory in self.machine.word_values(step.word):
            code = self.machine.pack(memory)[1] >> shift
            outcome = step.act(env, _forward(dict(memory), local.buffer))
            if outcome is None:
                continue
            if self._overflows(step, outcome.writes.items()):
                there[code], after[code] = self._there(Local(label=OVERFLOW)), code
                continue
            there[code] = self._there(self._next(path, step, outcome, local.buffer))
            after[code] = self.machine.pack({**memory, **outcome.writes})[1] >> shift
        value = self.word_bits[step.word.name]
        return there[value], self.shared & ~(mask << shift) | after[value] << shift

    def _overflows(self, step: Step, writes: Any) -> bool:
        """Whether a value does not fit; no error yet, because the closure also meets values that no search reaches."""
        for name, value in writes:
            if not 0 <= value < self.sizes[name]:
                self.machine.overflows.append(
                    f"`{step.label} {step.text}` puts {value} into {name}, which holds 0 to {self.sizes[name] - 1}"
                )
                return True
        return False

    def _next(self, path: str, step: Step, outcome: Any, buffer: tuple[Writes, ...]) -> Local:
        kept = tuple(sorted((name, int(outcome.env[name])) for name in step.live(outcome.label) if name in outcome.env))
        if outcome.label == DONE and self.program.forever:
            return Local(buffer=buffer)
        return Local("" if outcome.label in (DONE, OOPS) else path, outcome.label, kept, buffer)

    def _written(self, writes: Writes) -> Any:
        mask, bits = self.machine.pack(dict(writes))
        return self.shared & ~mask | bits

    def _there(self, local: Local) -> int:
        if local not in self.number:
            self.number[local] = len(self.locals)
            self.locals.append(local)
        return self.number[local]
