"""Every interleaving of a program, a whole frontier at a time: counts, depth, verdict, shortest counterexample.

:func:`explore` walks the reachable states breadth first with numpy. Chapters 6 to 10 quote its counts, print its
counterexamples and play on its state graph. It never runs the program: :class:`mmu.machine.Machine` has turned every
move into a table, so a step is a gather and an addition.

Two spaces share one interface. :class:`Space` holds every state. :class:`Quotient` holds one state for each class of
states that differ only in which of several identical vCPUs is which; the sizes of the classes sum back to the full count.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmu.machine import Actor, Event, Machine, State
from mmu.program import DONE, OOPS, Expression, Program, ProgramError, expression

SAFE, BROKEN, UNKNOWN = "safe", "OOPS", "unknown"
MAX_BYTES = 1 << 30
CHUNK = 1 << 13  # frontier states at a time: what they lead to still fits a second-level cache

Keys = NDArray[np.int64]
Predicate = Callable[["States"], NDArray[np.bool_]]


class OutOfRoom(Exception):
    """A bound on states or bytes was reached; what was counted so far stands, the verdict does not."""


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
    machine: Machine | None = field(default=None, repr=False)

    def lines(self) -> list[str]:
        """The counterexample for people: ``v0 F0 reads spte(w=0, id=0)``, one line a step."""
        return [f"v{event.actor} {event.text}" for event in self.counterexample or []]


# --- half of the actors: their joint local states, numbered as they are met, and their moves ---------------------------


class _Half:
    """Some actors together. A *row* is one of their joint local states beside one value of the shared words.

    Joint states get numbers when they are first met, so only reachable ones take room, and a row's moves are looked up
    in the actors' tables when the row is first met. Rows lie in an array of (state, shared), or of (shared, state) for
    the half whose number ends a key; a move adds ``change`` to a key.
    """

    UNMET = 255

    def __init__(self, machine: Machine, vcpus: range, ends_key: bool) -> None:
        self.actors: list[Actor] = [machine.actors[vcpu] for vcpu in vcpus]
        self.vcpus, self.ends_key, self.shared_bits = vcpus, ends_key, machine.shared_bits
        self.sizes = [len(actor.locals) for actor in self.actors]
        self.strides = [math.prod(self.sizes[:place]) for place in range(len(self.sizes))]
        self.number = np.full(math.prod(self.sizes), -1, dtype=np.int32)  # (joint code,)
        self.number[0] = 0
        self.codes = np.zeros(1, dtype=np.int64)  # (number,)
        self.bits = 0  # room for 2**bits joint states
        none = np.zeros(0, dtype=np.int64)
        self.edges = {name: none for name in ("state", "shared", "to_state", "to_shared", "actor", "move")}
        self.change = none  # (edge,)
        self.count = np.full(1 << self.shared_bits, self.UNMET, dtype=np.uint8)  # (row,) number of moves
        self.first = np.zeros(1 << self.shared_bits, dtype=np.int64)  # (row,) of its moves, the first edge

    def row(self, state: Keys, shared: Keys) -> Keys:
        """Where a joint state beside a shared value lies."""
        return shared << self.bits | state if self.ends_key else state << self.shared_bits | shared

    def split(self, rows: Keys) -> tuple[Keys, Keys]:
        """The joint state and the shared value of rows."""
        if self.ends_key:
            return rows & (1 << self.bits) - 1, rows >> self.bits
        return rows >> self.shared_bits, rows & (1 << self.shared_bits) - 1

    def locals_of(self, state: Keys) -> list[Keys]:
        """Each actor's own local state."""
        codes = self.codes[state]
        return [codes // stride % size for stride, size in zip(self.strides, self.sizes, strict=True)]

    def meet(self, rows: Keys) -> None:
        """Look up the moves of rows that are met for the first time, numbering the joint states they lead to."""
        rows = np.unique(rows)
        state, shared = self.split(rows)
        codes = self.codes[state]
        source, to_code, to_shared, who, which = ([np.zeros(0, dtype=np.int64)] for _ in range(5))
        for vcpu, actor, stride, local in zip(self.vcpus, self.actors, self.strides, self.locals_of(state), strict=True):
            for move in range(len(actor.to_local)):
                there = actor.to_local[move, local, shared]
                can = np.flatnonzero(there >= 0)
                source.append(can)
                to_code.append(codes[can] + (there[can] - local[can]) * stride)
                to_shared.append(actor.to_shared[move, local[can], shared[can]].astype(np.int64))
                who.append(np.full(can.size, vcpu, dtype=np.int64))
                which.append(np.full(can.size, move, dtype=np.int64))
        order = np.argsort(at := np.concatenate(source), kind="stable")
        at, code = at[order], np.concatenate(to_code)[order]
        new = np.unique(code[self.number[code] < 0])
        self.number[new] = np.arange(len(self.codes), len(self.codes) + len(new), dtype=np.int32)
        self.codes = np.concatenate([self.codes, new])
        count = np.bincount(at, minlength=len(rows))
        self.count[rows] = count
        self.first[rows] = len(self.edges["state"]) + np.cumsum(count, dtype=np.int64) - count
        found = {
            "state": state[at],
            "shared": shared[at],
            "to_state": self.number[code].astype(np.int64),
            "to_shared": np.concatenate(to_shared)[order],
            "actor": np.concatenate(who)[order],
            "move": np.concatenate(which)[order],
        }
        self.edges = {name: np.concatenate([self.edges[name], found[name]]) for name in found}

    def make_room(self) -> bool:
        """Widen the rows when there are more joint states than room; says whether it did."""
        bits = int(len(self.codes) - 1).bit_length()
        if bits <= self.bits:
            return False
        old, shared = 1 << self.bits, 1 << self.shared_bits
        for name, empty in (("count", self.UNMET), ("first", 0)):
            values = getattr(self, name)
            if self.ends_key:
                wide = np.full((shared, 1 << bits), empty, dtype=values.dtype)
                wide[:, :old] = values.reshape(shared, old)
            else:
                wide = np.full((1 << bits, shared), empty, dtype=values.dtype)
                wide[:old] = values.reshape(old, shared)
            setattr(self, name, wide.ravel())
        self.bits = bits
        return True

    def aim(self, unit: int) -> None:
        """What each move adds to a key, when one row of this half is worth ``unit``."""
        edges = self.edges
        there, here = self.row(edges["to_state"], edges["to_shared"]), self.row(edges["state"], edges["shared"])
        self.change = (there - here) * unit

    def alone(self, shared: int) -> None:
        """Meet every row that these actors reach by themselves: most of what they will ever need, in one go."""
        rows = self.row(np.zeros(1, dtype=np.int64), np.full(1, shared, dtype=np.int64))
        while rows.size:
            known = len(self.edges["state"])
            self.meet(rows)
            self.make_room()
            rows = self.row(self.edges["to_state"][known:], self.edges["to_shared"][known:])
            rows = rows[self.count[rows] == self.UNMET]


# --- every state -------------------------------------------------------------------------------------------------------


class Space:
    """Every state of a machine, each a key of 64 bits: joint state of the first half, shared words, of the second half.

    One byte a state tells whether it was seen. The bytes lie row by row, a row being what the first half and the shared
    words are, numbered as they are met: two halves that exclude each other (only one of them holds the lock) take no room.
    """

    canonical = False
    _NOWHERE = np.int64(1) << np.int64(62)

    def __init__(self, machine: Machine, max_bytes: int = MAX_BYTES) -> None:
        self.machine, self.max_bytes = machine, max_bytes
        vcpus = len(machine.actors)
        # the second half takes the odd actor: a row is then as long, and rows as few, as can be
        self.high = _Half(machine, range(vcpus // 2), ends_key=False)
        self.low = _Half(machine, range(vcpus // 2, vcpus), ends_key=True)
        for half in (self.high, self.low):
            half.alone(machine.start.shared)
        self._lay_out()

    def _lay_out(self) -> None:
        """Place the parts of a key; forget what was seen."""
        self.low_bits = self.low.bits
        self.low_mask = (1 << self.low_bits) - 1
        self.row_mask = (1 << self.low_bits + self.machine.shared_bits) - 1
        self.low.aim(1)
        self.high.aim(1 << self.low_bits)
        self.rows = 0
        self.base = np.full(1 << self.high.bits + self.machine.shared_bits, self._NOWHERE, dtype=np.int64)  # (row,)
        self.seen = np.zeros(0, dtype=np.uint8)  # (place,)

    def begin(self) -> Keys:
        """Forget what was seen, and return the start as a frontier."""
        self._lay_out()
        return self._fresh(np.full(1, self.machine.start.shared << self.low_bits, dtype=np.int64))

    def _places(self, keys: Keys) -> NDArray[np.intp]:
        """Where the bytes of keys lie; rows that are met for the first time get the next places."""
        rows = keys >> self.low_bits
        base = self.base[rows]
        if base.max(initial=0) == self._NOWHERE:
            new = np.unique(rows[base == self._NOWHERE])
            self.base[new] = (np.arange(self.rows, self.rows + len(new), dtype=np.int64) - new) << self.low_bits
            self.rows += len(new)
            self._reserve(self.rows << self.low_bits)
            base = self.base[rows]
        return (base + keys).astype(np.intp, copy=False)

    def _reserve(self, need: int) -> None:
        """Room for this many seen-bytes, and some to spare."""
        if need > self.max_bytes:
            raise OutOfRoom(f"{need} bytes to mark the states seen are more than the {self.max_bytes} allowed")
        if need > len(self.seen):
            spare = need + (need >> 2 if need > 1 << 24 else need)
            self.seen.resize(min(spare, self.max_bytes), refcheck=False)  # in place, where a copy would double the bytes

    def _fresh(self, keys: Keys) -> Keys:
        """The keys not seen before, each once; they are marked as seen.

        A key that stands twice must count once. All its copies write into one byte and one of them prevails; a byte has
        255 tags for 65,025 copies at most, so a second round with a second tag tells those apart that shared the first.
        """
        places = self._places(keys)
        pick = np.flatnonzero(self.seen[places] == 0)
        places, keys = places[pick], keys[pick]
        tag = _TAG[: len(keys)]
        self.seen[places] = tag
        pick = np.flatnonzero(self.seen[places] == tag)
        places, keys, tag = places[pick], keys[pick], _SECOND_TAG[pick]
        self.seen[places] = tag
        return keys[np.flatnonzero(self.seen[places] == tag)]

    def _moves(self, half: _Half, keys: Keys) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Of each key, its moves in one half: edge numbers, key by key, and how many each key has."""
        rows = keys & self.row_mask if half.ends_key else keys >> self.low_bits
        count = half.count[rows]
        last = np.cumsum(count, dtype=np.int64)
        total = int(last[-1])
        edge = np.repeat(half.first[rows] - last + count, count)
        edge += np.arange(total, dtype=np.int64)
        return edge, count

    def _meet(self, frontier: Keys) -> Keys:
        """See to it that every row of the frontier is known; keys change when the second half needs more room."""
        for half, unit in ((self.high, 1 << self.low_bits), (self.low, 1)):
            rows = frontier & self.row_mask if half.ends_key else frontier >> self.low_bits
            new = rows[half.count[rows] == _Half.UNMET]
            if new.size:
                half.meet(new)
                half.aim(unit)
        return self._widen(frontier)

    def _widen(self, frontier: Keys) -> Keys:
        old = self.low_bits
        if self.high.make_room():
            base = np.full(1 << self.high.bits + self.machine.shared_bits, self._NOWHERE, dtype=np.int64)
            base[: len(self.base)] = self.base
            self.base = base
        if self.low.make_room():  # every row becomes longer: lay the seen-bytes out anew
            seen = self.seen[: self.rows << old].reshape(-1, 1 << old)
            known = np.flatnonzero(self.base != self._NOWHERE)
            number = (self.base[known] >> old) + known
            self._lay_out()
            self.rows = len(seen)
            self.base[known] = (number - known) << self.low_bits
            self._reserve(self.rows << self.low_bits)
            self.seen[: self.rows << self.low_bits].reshape(self.rows, -1)[:, : 1 << old] = seen
            frontier = frontier >> old << self.low_bits | frontier & (1 << old) - 1
        return frontier

    def _moves(self, half: _Half, keys: Keys) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """The moves of these keys in one half, key by key: the numbers of the edges, and how many each key has."""
        rows = keys & self.row_mask if half.ends_key else keys >> self.low_bits
        count = half.count[rows]
        last = np.cumsum(count, dtype=np.int64)
        edge = np.repeat(half.first[rows] - last + count, count)
        edge += np.arange(len(edge), dtype=np.int64)
        return edge, count

    def advance(self, frontier: Keys) -> tuple[Keys, int]:
        """The states first reached one move after these, and how many moves there are."""
        frontier = self._meet(frontier)
        frontier.sort()  # neighbours share rows, and the bytes of a row lie together
        transitions, fresh = 0, []
        for at in range(0, len(frontier), CHUNK):
            keys = frontier[at : at + CHUNK]
            for half in (self.high, self.low):
                edge, count = self._moves(half, keys)
                there = np.repeat(keys, count)
                there += half.change[edge]
                transitions += len(there)
                fresh += [self._fresh(there[part : part + len(_TAG)]) for part in range(0, len(there), len(_TAG))]
        return np.concatenate(fresh) if fresh else frontier[:0], transitions

    def edges(self, frontier: Keys) -> dict[str, Keys]:
        """Every move of these states: ``source`` (position in the frontier), ``target`` (key), ``actor``, ``move``."""
        parts = []
        for half in (self.high, self.low):
            edge, count = self._moves(half, frontier)
            source = np.repeat(np.arange(len(frontier), dtype=np.int64), count)
            target = frontier[source] + half.change[edge]
            parts.append((source, target, half.edges["actor"][edge], half.edges["move"][edge]))
        columns = (np.concatenate(column) for column in zip(*parts, strict=True))
        return dict(zip(("source", "target", "actor", "move"), columns, strict=True))

    def shared(self, keys: Keys) -> Keys:
        """The shared words of each state, as one number."""
        return keys >> self.low_bits & (1 << self.machine.shared_bits) - 1

    def locals(self, keys: Keys) -> list[Keys]:
        """The local state of each actor in each state."""
        high = self.high.locals_of(keys >> self.low_bits + self.machine.shared_bits)
        return high + self.low.locals_of(keys & self.low_mask)

    def key(self, state: State) -> int:
        """The key of one state, -1 when the search has not met its parts."""
        numbers = []
        for half in (self.high, self.low):
            code = sum(state.locals[vcpu] * stride for vcpu, stride in zip(half.vcpus, half.strides, strict=True))
            numbers.append(int(half.number[code]))
        if min(numbers) < 0:
            return -1
        return (numbers[0] << self.machine.shared_bits | state.shared) << self.low_bits | numbers[1]

    def full_count(self, keys: Keys) -> int:
        """How many states of the full space these stand for: here, themselves."""
        return len(keys)


_TAG = (np.arange(255 * 255, dtype=np.int64) % 255 + 1).astype(np.uint8)  # (position,)
_SECOND_TAG = (np.arange(255 * 255, dtype=np.int64) // 255 + 1).astype(np.uint8)  # (position,)


# --- states modulo a permutation of identical vCPUs ----------------------------------------------------------------------


class _HashSet:
    """A set of 64-bit codes by open addressing; it takes whole arrays."""

    def __init__(self) -> None:
        self.used, self.bits = 0, 10
        self._clear()

    def _clear(self) -> None:
        self.slots = np.zeros(1 << self.bits, dtype=np.uint64)  # 0 is empty, so a code is kept plus one
        self.owner = np.zeros(1 << self.bits, dtype=np.int32)

    def fresh(self, codes: NDArray[np.uint64]) -> NDArray[np.intp]:
        """Positions of the codes that are new, one for each; they are in the set from now on."""
        if self.used + len(codes) > 1 << self.bits - 1:
            kept = self.slots[self.slots != 0] - np.uint64(1)
            self.bits = int(2 * (self.used + len(codes)) - 1).bit_length() + 1
            self._clear()
            self._insert(kept)
        new = self._insert(codes)
        self.used += len(new)
        return new

    def _insert(self, codes: NDArray[np.uint64]) -> NDArray[np.intp]:
        found = []
        alive, key = np.arange(len(codes), dtype=np.intp), codes + np.uint64(1)
        slot = (key * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(64 - self.bits)).astype(np.intp)
        while alive.size:
            empty = np.flatnonzero(self.slots[slot] == 0)
            mine = slot[empty]
            self.owner[mine] = empty  # of all that want a slot, one finds itself in it
            won = empty[self.owner[mine] == empty]
            self.slots[slot[won]] = key[won]
            found.append(alive[won])
            left = np.flatnonzero(self.slots[slot] != key)  # whoever finds its own code is in, or a copy of one that is
            alive, key = alive[left], key[left]
            slot = (slot[left] + 1) & (1 << self.bits) - 1
        return np.concatenate(found) if found else alive


@dataclass
class _Group:
    """Identical vCPUs, their tables in relative terms: a mark is nobody's, its own, or another's.

    A field is a local state and one flag for each part that holds a mark, set where the mark is this vCPU's own.
    Tables are indexed by (move, field, shared), a mark in the shared words being 0 or 1: whether it is anybody's.
    """

    vcpus: list[int]
    flags: int
    to_field: NDArray[np.int32]
    to_shared: NDArray[np.int32]
    loses: NDArray[np.uint8]  # flags that all others lose


class Quotient:
    """The states of a machine modulo a permutation of identical vCPUs.

    A state is a column: one field for each vCPU, sorted within each group of identical ones, and the shared words. That a
    mark is vCPU k's is a flag in k's own field, so that sorting carries it along.

    Raises:
        ProgramError: a vCPU remembers or buffers another one's mark, which a flag in one field cannot say.
    """

    canonical = True

    def __init__(self, machine: Machine, max_bytes: int = MAX_BYTES) -> None:
        self.machine, self.max_bytes = machine, max_bytes
        program = machine.program
        self.marked = sorted(program.marked) if program.unique and len(program.marks) > 1 else []
        groups: list[list[int]] = []
        for vcpu in range(len(program.actors)):
            for group in groups:
                same = program.paths[vcpu] == program.paths[group[0]]
                if same and (self.marked or program.marks[vcpu] == program.marks[group[0]] or not program.marked):
                    group.append(vcpu)
                    break
            else:
                groups.append([vcpu])
        self.groups = [self._relative(group) for group in groups]
        self.order = [vcpu for group in groups for vcpu in group]  # column row -> vCPU
        ranks = [math.comb(group.to_field.shape[1] + len(group.vcpus) - 1, len(group.vcpus)) for group in self.groups]
        if math.prod(ranks) << machine.shared_bits >= 1 << 64:
            raise ProgramError(f"{len(self.order)} vCPUs are too many: their states modulo symmetry do not fit 64 bits")
        wide = max(group.to_field.shape[1] for group in self.groups) > 256
        self.dtype = np.uint16 if wide else np.uint8
        self.weights = [math.prod(ranks[:place]) << machine.shared_bits for place in range(len(ranks))]
        # sorted fields f0 <= f1 <= ... have the rank  C(f0, 1) + C(f1 + 1, 2) + ...  among all of their kind
        self.rank = [
            np.array(
                [[math.comb(f + place, place + 1) for f in range(group.to_field.shape[1])] for place in range(len(group.vcpus))],
                dtype=np.uint64,
            )  # (place, field)
            for group in self.groups
        ]

    def _relative(self, vcpus: list[int]) -> _Group:
        machine, program = self.machine, self.machine.program
        actor, flags = machine.actors[vcpus[0]], len(self.marked)
        shared = np.arange(1 << machine.shared_bits, dtype=np.int32)
        if not flags:
            return _Group(vcpus, 0, actor.to_local, actor.to_shared, np.zeros_like(actor.to_local, dtype=np.uint8))
        me = program.marks[vcpus[0]]
        other = next(mark for mark in program.marks if mark != me)
        self._refuse_foreign(vcpus[0], me)
        local = np.repeat(np.arange(len(actor.locals), dtype=np.int32), 1 << flags)[:, None]  # (field, 1)
        flag = np.tile(np.arange(1 << flags, dtype=np.int32), len(actor.locals))[:, None]  # (field, 1)
        real, possible = shared, np.ones((len(local), len(shared)), dtype=bool)
        for number, name in enumerate(self.marked):
            shift, mask = machine.place[name]
            owned, mine = shared >> shift & mask, flag >> number & 1
            real = real & ~(mask << shift) | np.where(mine, me, np.where(owned, other, 0)) << shift
            possible &= (owned <= 1) & (mine <= owned)
        to_local, to_shared = actor.to_local[:, local, real], actor.to_shared[:, local, real]  # (move, field, shared)
        field_, after, loses = to_local << flags, to_shared, np.zeros(to_local.shape, dtype=np.uint8)
        for number, name in enumerate(self.marked):
            shift, mask = machine.place[name]
            value = to_shared >> shift & mask
            field_ = field_ | (value == me).astype(np.int32) << number
            after = after & ~(mask << shift) | (value != 0).astype(np.int32) << shift
            loses |= (value != other).astype(np.uint8) << number
        return _Group(vcpus, flags, np.where((to_local >= 0) & possible, field_, -1), after, loses)

    def _refuse_foreign(self, vcpu: int, me: int) -> None:
        """A local or a buffered store that holds another's mark cannot be said in relative terms."""
        marked = set(self.marked)
        marked |= {name for steps in self.machine.program.paths[vcpu].values() for step in steps for name, part in step.into if part in marked}
        for local in self.machine.actors[vcpu].locals:
            for name, value in itertools.chain(local.values, *local.buffer):
                if name in marked and value not in (0, me):
                    raise ProgramError(
                        f"a vCPU at {local.label} keeps {name}, which may be another's mark: vCPUs are not interchangeable; "
                        "search without symmetry"
                    )

    def begin(self) -> NDArray[Any]:
        """The start as a frontier of one column."""
        self.known = _HashSet()
        column = self._column(self.machine.start)
        self.known.fresh(self.codes(column))
        return column

    def _column(self, state: State) -> NDArray[Any]:
        """One state as a sorted column: fields, then the shared words."""
        fields, shared = [], state.shared
        owner = {name: shared >> self.machine.place[name][0] & self.machine.place[name][1] for name in self.marked}
        for group in self.groups:
            of_group = []
            for vcpu in group.vcpus:
                mark = self.machine.program.marks[vcpu]
                flags = sum((owner[name] == mark) << number for number, name in enumerate(self.marked))
                of_group.append(state.locals[vcpu] << group.flags | flags)
            fields += sorted(of_group)
        for name in self.marked:
            shift, mask = self.machine.place[name]
            shared = shared & ~(mask << shift) | (owner[name] != 0) << shift
        return np.array([*fields, shared], dtype=np.int32)[:, None]

    def key(self, state: State) -> int:
        """The code of the class that a state belongs to."""
        return int(self.codes(self._column(state))[0])

    def codes(self, columns: NDArray[Any]) -> NDArray[np.uint64]:
        """One number for each column, different for different ones."""
        code = columns[-1].astype(np.uint64)
        at = 0
        for group, rank, weight in zip(self.groups, self.rank, self.weights, strict=True):
            for place in range(len(group.vcpus)):
                code += rank[place][columns[at + place]] * np.uint64(weight)
            at += len(group.vcpus)
        return code

    def _step(self, columns: NDArray[Any]) -> tuple[NDArray[np.intp], NDArray[Any]]:
        """Every move of these states: the column that it is a move of, and the sorted column that it leads to.

        Of vCPUs in equal states one moves for all.
        """
        shared = columns[-1]
        sources, targets = [np.zeros(0, dtype=np.intp)], [columns[:, :0]]
        at = 0
        for group in self.groups:
            fields = columns[at : at + len(group.vcpus)]  # (place, state)
            first = np.ones(fields.shape, dtype=bool)
            first[1:] = fields[1:] != fields[:-1]
            size, width = group.to_field.shape[1:]
            index = fields * width + shared
            for move in range(len(group.to_field)):
                there = group.to_field[move].ravel()[index]
                place, source = np.nonzero((there >= 0) & first)
                if not len(place):
                    continue
                cell = index[place, source]
                target = columns[:, source]
                target[-1] = group.to_shared[move].ravel()[cell]
                if self.marked:
                    target[:-1] &= ~group.loses[move].ravel()[cell].astype(target.dtype)
                target[at + place, np.arange(len(place), dtype=np.intp)] = there[place, source]
                sources.append(source)
                targets.append(target)
            at += len(group.vcpus)
        return np.concatenate(sources), self._sorted(np.concatenate(targets, axis=1))

    def _sorted(self, columns: NDArray[Any]) -> NDArray[Any]:
        at = 0
        for group in self.groups:
            for low, high in _network(len(group.vcpus)):
                a, b = columns[at + low], columns[at + high]
                columns[at + low], columns[at + high] = np.minimum(a, b), np.maximum(a, b)
            at += len(group.vcpus)
        return columns

    def advance(self, frontier: NDArray[Any]) -> tuple[NDArray[Any], int]:
        """The classes first reached one move after these; moves between classes are not counted."""
        fresh = [frontier[:, :0]]
        for at in range(0, frontier.shape[1], CHUNK):
            _, target = self._step(frontier[:, at : at + CHUNK])
            fresh.append(target[:, self.known.fresh(self.codes(target))])
        if len(self.known.slots) * 12 > self.max_bytes:
            raise OutOfRoom(f"{len(self.known.slots) * 12} bytes to remember the states seen are more than {self.max_bytes}")
        return np.concatenate(fresh, axis=1), 0

    def edges(self, frontier: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """The moves of these classes: ``source`` (column of the frontier) and ``target`` (code)."""
        source, target = self._step(frontier)
        return {"source": source, "target": self.codes(target)}

    def full_count(self, columns: NDArray[Any]) -> int:
        """How many states these classes hold: of n identical vCPUs n! / (m1! m2! ...), m being how many are in equal states."""
        whole = math.prod(math.factorial(len(group.vcpus)) for group in self.groups)
        divisor = np.ones(columns.shape[1], dtype=np.int64)
        at = 0
        for group in self.groups:
            equal = np.ones(columns.shape[1], dtype=np.int64)
            for place in range(at + 1, at + len(group.vcpus)):
                equal = np.where(columns[place] == columns[place - 1], equal + 1, 1)
                divisor *= equal
            at += len(group.vcpus)
        sizes, times = np.unique(divisor, return_counts=True)
        return sum(whole // int(size) * int(count) for size, count in zip(sizes, times, strict=True))

    def shared(self, columns: NDArray[Any]) -> NDArray[Any]:
        """The shared words of each class, as one number; a mark is 1 where it is anybody's."""
        return columns[-1]

    def locals(self, columns: NDArray[Any]) -> list[NDArray[Any]]:
        """The local states in each class, in the order of ``order``."""
        found = [columns[0]] * len(self.order)
        at = 0
        for group in self.groups:
            for place, vcpu in enumerate(group.vcpus):
                found[vcpu] = columns[at + place] >> group.flags
            at += len(group.vcpus)
        return found


def _network(size: int) -> list[tuple[int, int]]:
    """Batcher's merge exchange: the comparisons that sort ``size`` values whatever they are (Knuth, 5.2.2 M)."""
    pairs = []
    top = 1 << max(size - 1, 0).bit_length() >> 1
    p = top
    while p > 0:
        q, r, d = top, 0, p
        while True:
            pairs += [(i, i + d) for i in range(size - d) if i & p == r]
            if q == p:
                break
            d, q, r = q - p, q >> 1, p
        p >>= 1
    return pairs


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

    def __getitem__(self, name: str) -> Any:
        if name in self.machine.place:
            shift, mask = self.machine.place[name]
            return self._shared >> shift & mask
        actors = range(len(self.machine.actors))
        if name == OOPS:
            return np.logical_or.reduce([self.at(vcpu, lambda label: label == OOPS) for vcpu in actors])
        if name.startswith("done("):
            runners = [vcpu for vcpu in actors if name[5:-1] in self.machine.program.actors[vcpu]]
            return np.logical_and.reduce([self.at(vcpu, lambda label: label == DONE) for vcpu in runners])
        raise KeyError(f"states have no {name!r}; they have {', '.join(self)}")

    def __iter__(self) -> Iterator[str]:
        return iter([*self.machine.place, OOPS, *(f"done({path})" for path in dict.fromkeys(itertools.chain(*self.machine.program.actors)))])

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
    machine = Machine(program, memory)
    space: Space | Quotient = (Quotient if canonical else Space)(machine, max_bytes)
    judge = _judge(machine, bad)
    result = Result(memory, canonical, transitions=None if canonical else 0, machine=machine)
    bad_depth = None
    try:
        frontier, depth = space.begin(), 0
        while True:
            result.states += frontier.shape[-1]
            result.full_states += space.full_count(frontier)
            result.depth = depth
            if bad_depth is None and judge(space, frontier).any():
                bad_depth, result.verdict = depth, BROKEN
            if progress:
                progress(result)
            if max_states is not None and result.states > max_states:
                raise OutOfRoom(f"{result.states} states are more than {max_states}")
            frontier, moves = space.advance(frontier)
            if result.transitions is not None:
                result.transitions += moves
            if not frontier.shape[-1]:
                break
            depth += 1
        result.complete = True
        result.verdict = SAFE if bad_depth is None else BROKEN
    except (KeyboardInterrupt, OutOfRoom, MemoryError):
        pass
    if bad_depth is not None:
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
    targets = (space.codes(last) if isinstance(space, Quotient) else last)[bad]
    leading = [set(targets.tolist())]
    for level in reversed(levels[:-1]):
        edges = space.edges(level)
        sources = np.unique(edges["source"][np.isin(edges["target"], targets)])
        targets = (space.codes(level) if isinstance(space, Quotient) else level)[..., sources]
        leading.append(set(targets.tolist()))
    events: list[Event] = []
    state = space.machine.start
    for goals in reversed(leading[:-1]):
        event = next(event for event in space.machine.events(state) if space.key(event.target) in goals)
        events.append(event)
        state = event.target
    return events
