"""The states of a machine modulo a permutation of identical vCPUs, a whole frontier at a time; see :mod:`mmu.explore`.

Of states that differ only in which vCPU is which, one stands for all, and how many it stands for is known: the sum is
the full count, a free check. Growth is polynomial in the number of vCPUs. Chapter 9 goes to ten vCPUs with it.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmu.hashset import HashSet
from mmu.machine import Local, Machine, State
from mmu.program import ProgramError
from mmu.space import CHUNK, MAX_BYTES, OutOfRoom

MAX_PERMUTATIONS = 720

Columns = NDArray[np.unsignedinteger[Any]]


@dataclass
class _Group:
    """Identical vCPUs and their moves, in relative terms: a mark in the shared words is nobody's (0) or somebody's (1).

    A field is a local state and, for each part that holds marks, one flag: set where the mark is this vCPU's own.
    ``loses`` are the flags that all other vCPUs lose by a move.
    """

    vcpus: list[int]
    flags: int
    to_field: NDArray[np.int32]  # (move, field, shared)
    to_shared: NDArray[np.int32]  # (move, field, shared)
    loses: NDArray[np.uint8]  # (move, field, shared)

    @property
    def fields(self) -> int:
        return self.to_field.shape[1]


class Quotient:
    """The states of a machine modulo a permutation of identical vCPUs.

    A state is a column: one field for each vCPU, sorted within each group of identical ones, and the shared words. That
    a mark is vCPU k's is a flag in k's own field, so sorting carries it along. Where vCPUs also remember each other's
    marks no flag can say so; then a state is the least of all its permutations, if there are no more than 720.

    Raises:
        ProgramError: too many vCPUs to permute, or to number their states in 64 bits.
    """

    def __init__(self, machine: Machine, max_bytes: int = MAX_BYTES) -> None:
        self.machine, self.max_bytes = machine, max_bytes
        program = machine.program
        self.marked = sorted(program.marked) if program.unique and len(program.marks) > 1 else []
        identical: list[list[int]] = []
        for vcpu in range(len(program.actors)):
            for group in identical:
                same_mark = program.marks[vcpu] == program.marks[group[0]]
                if program.paths[vcpu] == program.paths[group[0]] and (self.marked or same_mark or not program.marked):
                    group.append(vcpu)
                    break
            else:
                identical.append([vcpu])
        self.permutations: list[tuple[int, ...]] = []
        self.size = math.prod(math.factorial(len(group)) for group in identical)  # of the group of permutations
        if any(self._remembers_others(group[0]) for group in identical):
            self._permute(identical)
            self.marked, identical = [], [[vcpu] for group in identical for vcpu in group]
        self.groups = [self._relative(group) for group in identical]
        self.order = [vcpu for group in identical for vcpu in group]  # row of a column -> vCPU
        self._number()

    # -- from one machine's tables to those of a group --

    def _relative(self, vcpus: list[int]) -> _Group:
        machine, marks = self.machine, self.machine.program.marks
        actor, flags = machine.actors[vcpus[0]], len(self.marked)
        if not flags:
            return _Group(vcpus, 0, actor.to_local, actor.to_shared, np.zeros(actor.to_local.shape, dtype=np.uint8))
        me = marks[vcpus[0]]
        other = next(mark for mark in marks if mark != me)
        shared = np.arange(1 << machine.shared_bits, dtype=np.int32)
        local = np.repeat(np.arange(len(actor.locals), dtype=np.int32), 1 << flags)[:, None]  # (field, 1)
        flag = np.tile(np.arange(1 << flags, dtype=np.int32), len(actor.locals))[:, None]  # (field, 1)
        real, possible = shared, np.ones((len(local), len(shared)), dtype=np.bool_)  # (field, shared)
        for number, name in enumerate(self.marked):
            shift, mask = machine.place[name]
            owned, mine = shared >> shift & mask, flag >> number & 1
            real = real & ~(mask << shift) | np.where(mine == 1, me, np.where(owned == 1, other, 0)) << shift
            possible &= (owned <= 1) & (mine <= owned)
        there, after = actor.to_local[:, local, real], actor.to_shared[:, local, real]  # (move, field, shared)
        can = (there >= 0) & possible
        to_field, to_shared, loses = there << flags, after, np.zeros(there.shape, dtype=np.uint8)
        for number, name in enumerate(self.marked):
            shift, mask = machine.place[name]
            value = after >> shift & mask
            before = real >> shift & mask
            if (can & (value != before) & (value != 0) & (value != me)).any():
                raise ProgramError(f"{name} is given a mark that is not the writer's own: search without symmetry")
            to_field = to_field | (value == me).astype(np.int32) << number
            to_shared = to_shared & ~(mask << shift) | (value != 0).astype(np.int32) << shift
            loses |= (value != other).astype(np.uint8) << number
        return _Group(vcpus, flags, np.where(can, to_field, -1), to_shared, loses)

    def _marked_names(self, vcpu: int) -> set[str]:
        """The parts that hold marks, and the locals that were read from one."""
        steps = itertools.chain(*self.machine.program.paths[vcpu].values())
        return {*self.marked, *(name for step in steps for name, part in step.into if part in self.marked)}

    def _remembers_others(self, vcpu: int) -> bool:
        """Whether some local state of a vCPU holds another one's mark, in a local or in a buffered store."""
        names, own = self._marked_names(vcpu), (0, self.machine.program.marks[vcpu])
        held = ((local.values, *local.buffer) for local in self.machine.actors[vcpu].locals)
        return any(name in names and value not in own for writes in held for name, value in itertools.chain(*writes))

    def _permute(self, identical: list[list[int]]) -> None:
        """For each permutation of identical vCPUs, what each one's local state and the shared words become."""
        if self.size > MAX_PERMUTATIONS:
            raise ProgramError(
                f"these vCPUs remember each other's marks, and their {self.size} permutations are more than "
                f"{MAX_PERMUTATIONS}; search without symmetry"
            )
        machine = self.machine
        marks, locals_ = machine.program.marks, [actor.locals for actor in machine.actors]
        number = [{local: place for place, local in enumerate(known)} for known in locals_]
        names = [self._marked_names(vcpu) for vcpu in range(len(marks))]
        shared = np.arange(1 << machine.shared_bits, dtype=np.int64)
        self.relabel: list[tuple[list[NDArray[np.int64]], NDArray[np.int64]]] = []  # ([(local,), ...], (shared,))
        for images in itertools.product(*(itertools.permutations(group) for group in identical)):
            to = dict(zip(itertools.chain(*identical), itertools.chain(*images), strict=True))
            mark = {0: 0, **{marks[vcpu]: marks[image] for vcpu, image in to.items()}}
            self.permutations.append(tuple(to[vcpu] for vcpu in range(len(marks))))
            tables = []
            for vcpu, known in enumerate(locals_):

                def moved(writes: Any, vcpu: int = vcpu, mark: dict[int, int] = mark) -> Any:
                    return tuple((name, mark[value] if name in names[vcpu] else value) for name, value in writes)

                images_of = [
                    Local(local.path, local.label, moved(local.values), tuple(map(moved, local.buffer)))
                    for local in known
                ]
                tables.append(np.array([number[to[vcpu]][image] for image in images_of], dtype=np.int64))
            renamed = shared.copy()
            for name in self.marked:
                shift, mask = machine.place[name]
                meaning = np.zeros(mask + 1, dtype=np.int64)
                meaning[list(mark)] = list(mark.values())
                renamed = renamed & ~(mask << shift) | meaning[shared >> shift & mask] << shift
            self.relabel.append((tables, renamed))

    def _number(self) -> None:
        """Prepare to number columns: sorted fields f0 <= f1 <= ... are number C(f0, 1) + C(f1 + 1, 2) + ... of all."""
        kinds = [math.comb(group.fields + len(group.vcpus) - 1, len(group.vcpus)) for group in self.groups]
        bits = self.machine.shared_bits
        if math.prod(kinds) << bits >= 1 << 63:
            raise ProgramError(f"{len(self.order)} vCPUs are too many: their states modulo symmetry do not fit 63 bits")
        self.rank: list[NDArray[np.uint64]] = []  # of each row of a column: (field,)
        for at, group in enumerate(self.groups):
            weight = math.prod(kinds[:at]) << bits
            for place in range(len(group.vcpus)):
                ranks = [math.comb(value + place, place + 1) * weight for value in range(group.fields)]
                self.rank.append(np.array(ranks, dtype=np.uint64))
        top = max(1 << bits, *(group.fields for group in self.groups)) - 1
        self.dtype = np.min_scalar_type(top)
        self.swaps = []
        at = 0
        for group in self.groups:
            self.swaps += [(at + low, at + high) for low, high in network(len(group.vcpus))]
            at += len(group.vcpus)

    # -- states --

    def begin(self) -> Columns:
        """Forget what was seen, and return the start as a frontier of one column."""
        self.seen = HashSet(words=1)
        column = self._column(self.machine.start)
        self.seen.add(self.codes(column)[:, None])
        return column

    def _column(self, state: State) -> Columns:
        """The column of one state."""
        shared, marks = state.shared, self.machine.program.marks
        held = [shared >> self.machine.place[name][0] & self.machine.place[name][1] for name in self.marked]
        fields = []
        for group in self.groups:
            flags = {vcpu: sum((mark == marks[vcpu]) << at for at, mark in enumerate(held)) for vcpu in group.vcpus}
            fields += sorted(state.locals[vcpu] << group.flags | flags[vcpu] for vcpu in group.vcpus)
        for name, mark in zip(self.marked, held, strict=True):
            shift, mask = self.machine.place[name]
            shared = shared & ~(mask << shift) | (mark != 0) << shift
        return np.array([*fields, shared], dtype=self.dtype)[:, None]

    def key(self, state: State) -> int:
        """The code of the class that a state belongs to."""
        return int(self.codes(self._column(state))[0])

    def codes(self, columns: Columns) -> NDArray[np.uint64]:
        """One number for each column, the same for all states of a class."""
        if not self.permutations:
            code = columns[-1].astype(np.uint64)
            for rank, fields in zip(self.rank, columns, strict=False):
                code += rank[fields]
            return code
        return np.minimum.reduce([self._image(columns, number) for number in range(self.size)])

    def _image(self, columns: Columns, number: int) -> NDArray[np.uint64]:
        """The code of a column after one permutation."""
        tables, shared = self.relabel[number]
        code = shared[columns[-1]].astype(np.uint64)
        row = {vcpu: at for at, vcpu in enumerate(self.order)}
        for vcpu, image in enumerate(self.permutations[number]):
            code += self.rank[row[image]][tables[vcpu][columns[row[vcpu]]]]
        return code

    def advance(self, frontier: Columns) -> tuple[Columns, int]:
        """The classes first reached one move after these; moves between classes are not counted."""
        fresh = [frontier[:, :0]]
        for at in range(0, frontier.shape[1], CHUNK):
            _, target = self._step(frontier[:, at : at + CHUNK])
            fresh.append(target[:, self.seen.add(self.codes(target)[:, None])])
            if self.seen.nbytes > self.max_bytes:
                raise OutOfRoom(
                    f"{self.seen.nbytes} bytes for the states seen are more than the {self.max_bytes} allowed"
                )
        return np.concatenate(fresh, axis=1), 0

    def _step(self, columns: Columns) -> tuple[NDArray[np.intp], Columns]:
        """Every move of these states: which of them it is a move of, and the column that it leads to.

        Of vCPUs with equal fields one moves for all.
        """
        sources, targets = [np.zeros(0, dtype=np.intp)], [columns[:, :0]]
        at = 0
        for group in self.groups:
            fields = columns[at : at + len(group.vcpus)]  # (place, state)
            first = np.ones(fields.shape, dtype=np.bool_)
            first[1:] = fields[1:] != fields[:-1]
            cell = fields.astype(np.intp) << self.machine.shared_bits | columns[-1]
            for move in range(len(group.to_field)):
                there = group.to_field[move].ravel()[cell]
                place, source = np.nonzero((there >= 0) & first)
                if not len(place):
                    continue
                cells = cell[place, source]
                target = columns[:, source]
                target[-1] = group.to_shared[move].ravel()[cells]
                if self.marked:
                    target[:-1] &= ~group.loses[move].ravel()[cells].astype(self.dtype)
                target[at + place, np.arange(len(place), dtype=np.intp)] = there[place, source]
                sources.append(source)
                targets.append(target)
            at += len(group.vcpus)
        target = np.concatenate(targets, axis=1)
        for low, high in self.swaps:
            target[low], target[high] = np.minimum(target[low], target[high]), np.maximum(target[low], target[high])
        return np.concatenate(sources), target

    def edges(self, frontier: Columns) -> dict[str, NDArray[Any]]:
        """The moves of these classes: ``source`` (column of the frontier) and ``target`` (code)."""
        source, target = self._step(frontier)
        return {"source": source, "target": self.codes(target)}

    def full_count(self, columns: Columns) -> int:
        """How many states these classes hold: all permutations over those that change nothing."""
        if self.permutations:
            least = self.codes(columns)
            idle = sum((self._image(columns, number) == least).astype(np.int64) for number in range(self.size))
        else:  # swapping vCPUs with equal fields changes nothing: m1! m2! ...
            idle, at = np.ones(columns.shape[1], dtype=np.int64), 0
            for group in self.groups:
                equal = np.ones(columns.shape[1], dtype=np.int64)
                for row in range(at + 1, at + len(group.vcpus)):
                    equal = np.where(columns[row] == columns[row - 1], equal + 1, 1)
                    idle *= equal
                at += len(group.vcpus)
        sizes, times = np.unique(idle, return_counts=True)
        return sum(self.size // int(size) * int(count) for size, count in zip(sizes, times, strict=True))

    def shared(self, columns: Columns) -> NDArray[np.int64]:
        """The shared words of each class, as one number; a mark is 1 where it is somebody's."""
        return columns[-1].astype(np.int64)

    def locals(self, columns: Columns) -> list[NDArray[np.intp]]:
        """The local states in each class, by vCPU; which of identical ones is which means nothing."""
        found, row = {}, 0
        for group in self.groups:
            for vcpu in group.vcpus:
                found[vcpu] = columns[row].astype(np.intp) >> group.flags
                row += 1
        return [found[vcpu] for vcpu in range(len(found))]


def network(size: int) -> list[tuple[int, int]]:
    """Batcher's merge exchange: the compare-and-swaps that sort ``size`` values, whatever they are (Knuth 5.2.2, M).

    >>> network(3)
    [(0, 2), (0, 1), (1, 2)]
    """
    pairs = []
    top = p = 1 << max(size - 1, 0).bit_length() >> 1
    while p > 0:
        q, r, d = top, 0, p
        while True:
            pairs += [(low, low + d) for low in range(size - d) if low & p == r]
            if q == p:
                break
            d, q, r = q - p, q >> 1, p
        p >>= 1
    return pairs
