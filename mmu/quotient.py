"""The states of a machine modulo a permutation of identical vCPUs, a whole frontier at a time; see :mod:`mmu.explore`.

Of states that differ only in which vCPU is which, one stands for all, and how many it stands for is known: the sum is
the full count, a free check. Growth is polynomial in the number of vCPUs. Chapter 9 goes to ten vCPUs with it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
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
Codes = NDArray[np.uint64]  # (state, word)


@dataclass
class _Group:
    """Identical vCPUs and their moves, in relative terms: a mark in the shared words is nobody's (0) or somebody's (1).

    A field is a local state and, for each part that holds marks, a flag: set where the mark is this vCPU's own. A cell
    is a field beside a value of the shared words; its moves are ``count`` edges from ``first`` on.
    """

    vcpus: list[int]
    flags: int
    fields: int  # how many different ones
    count: NDArray[np.uint8]  # (cell,)
    first: NDArray[np.int64]  # (cell,)
    to_field: NDArray[Any]  # (edge,)
    to_shared: NDArray[Any]  # (edge,)
    keeps: NDArray[Any]  # (edge,) a mask: all but the flags that all others lose


class Quotient:
    """The states of a machine modulo a permutation of identical vCPUs.

    A state is a column: one field for each vCPU, sorted within each group of identical ones, and the shared words. That
    a mark is vCPU k's is a flag in k's own field, so sorting carries it along. Where vCPUs also remember each other's
    marks no flag can say so; then a state is the least of all its permutations, if there are no more than 720.

    vCPUs are identical when they run the same paths and exchanging them, with their marks, exchanges their tables; a
    program that tells them apart, by comparing a mark with a number for one, keeps all its states.

    Raises:
        ProgramError: too many vCPUs to permute.
    """

    def __init__(self, machine: Machine, max_bytes: int = MAX_BYTES) -> None:
        self.machine, self.max_bytes = machine, max_bytes
        self.dtype = np.min_scalar_type((1 << machine.shared_bits) - 1)  # of columns; wide fields widen it
        self.marked = sorted(machine.program.marked)
        self.permutations: list[tuple[int, ...]] = []
        identical, relative = self._identical()
        self.size = math.prod(math.factorial(len(group)) for group in identical)  # how many permutations there are
        if self.marked and not relative:
            self._permute(identical)
            self.marked, identical = [], [[vcpu] for group in identical for vcpu in group]
        self.groups = [self._relative(group) for group in identical]
        self.order = [vcpu for group in identical for vcpu in group]  # row of a column -> vCPU
        self._number()

    # -- which vCPUs are identical --

    def _identical(self) -> tuple[list[list[int]], bool]:
        """Groups of identical vCPUs, and whether marks can be told in relative terms.

        Forgets about marks where they do not make up the whole difference between vCPUs.
        """
        program, actors = self.machine.program, self.machine.actors
        vcpus = range(len(actors))
        start = self.machine.unpack(self.machine.start.shared)
        if self.marked and program.unique and len(vcpus) > 1 and not any(start[name] for name in self.marked):
            groups = _grouped(vcpus, lambda a, b: program.paths[a] == program.paths[b])
            swaps = [swap for group in groups for swap in itertools.pairwise(group)]
            if all(self._same_after(swap, vcpus) for swap in swaps):
                pairs = itertools.pairwise(vcpus)  # every other mark means the same to a vCPU: it is another's
                alike = all(self._same_after(pair, set(vcpus) - set(pair), stay=True) for pair in pairs)
                return groups, alike and not any(self._remembers_others(group[0]) for group in groups)
        self.marked = []

        def equal(a: int, b: int) -> bool:
            one, two = actors[a], actors[b]
            tables = ((one.to_local, two.to_local), (one.to_shared, two.to_shared))
            same = program.paths[a] == program.paths[b] and one.locals == two.locals
            return same and all(np.array_equal(mine, its) for mine, its in tables)

        return _grouped(vcpus, equal), False

    def _same_after(self, swap: tuple[int, int], vcpus: Iterable[int], stay: bool = False) -> bool:
        """Whether exchanging two marks, and their vCPUs themselves unless they ``stay``, changes no move of these."""
        to = {vcpu: vcpu for vcpu in range(len(self.machine.actors))} | {swap[0]: swap[1], swap[1]: swap[0]}
        try:
            places, shared = self._renamed(to, vcpus, stay)
        except KeyError:  # a local state that its likes do not have
            return False
        for vcpu in vcpus:
            here, there = self.machine.actors[vcpu], self.machine.actors[vcpu if stay else to[vcpu]]
            place = places[vcpu]
            if len(here.locals) != len(there.locals) or len(here.to_local) != len(there.to_local):
                return False
            can = here.to_local >= 0
            renamed = np.ix_(range(len(there.to_local)), place, shared)
            if not np.array_equal(np.where(can, place[here.to_local], -1), there.to_local[renamed]):
                return False
            if (can & (shared[here.to_shared] != there.to_shared[renamed])).any():
                return False
        return True

    def _renamed(
        self, to: dict[int, int], vcpus: Iterable[int], stay: bool = False
    ) -> tuple[dict[int, NDArray[np.intp]], NDArray[np.intp]]:
        """What local states, and the shared words, become when vCPU v takes the place and the mark of ``to[v]``.

        Raises:
            KeyError: a local state is none of that vCPU's.
        """
        machine = self.machine
        marks = machine.program.marks
        mark = {0: 0, **{marks[vcpu]: marks[image] for vcpu, image in to.items()}}
        places = {}
        for vcpu in vcpus:
            names = self._marked_names(vcpu)

            def moved(writes: Any, names: set[str] = names) -> Any:
                return tuple((name, mark[value] if name in names else value) for name, value in writes)

            number = {local: at for at, local in enumerate(machine.actors[vcpu if stay else to[vcpu]].locals)}
            images = [
                Local(local.path, local.label, moved(local.values), tuple(map(moved, local.buffer)))
                for local in machine.actors[vcpu].locals
            ]
            places[vcpu] = np.array([number[image] for image in images], dtype=np.intp)
        shared = np.arange(1 << machine.shared_bits, dtype=np.intp)
        for name in self.marked:
            shift, mask = machine.place[name]
            meaning = np.arange(mask + 1, dtype=np.intp)
            meaning[list(mark)] = list(mark.values())
            shared = shared & ~(mask << shift) | meaning[shared >> shift & mask] << shift
        return places, shared

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
        self.relabel = []  # of each permutation what local states, by vCPU, and the shared words become
        for images in itertools.product(*(itertools.permutations(group) for group in identical)):
            to = dict(zip(itertools.chain(*identical), itertools.chain(*images), strict=True))
            self.permutations.append(tuple(to[vcpu] for vcpu in sorted(to)))
            self.relabel.append(self._renamed(to, to))

    def tells_apart(self, bad: NDArray[np.bool_]) -> bool:
        """Whether a verdict on every value of the shared words ``(..., shared)`` depends on whose a mark is."""
        vcpus = range(len(self.machine.actors))
        marked = sorted(self.machine.program.marked)
        shared = np.arange(1 << self.machine.shared_bits, dtype=np.intp)
        for name in marked if self.marked or self.permutations else []:
            shift, mask = self.machine.place[name]
            for one, two in itertools.pairwise(self.machine.program.marks[vcpu] for vcpu in vcpus):
                meaning = np.arange(mask + 1, dtype=np.intp)
                meaning[[one, two]] = two, one
                renamed = shared & ~(mask << shift) | meaning[shared >> shift & mask] << shift
                if (bad != bad[..., renamed]).any():
                    return True
        return False

    # -- from one machine's tables to those of a group --

    def _relative(self, vcpus: list[int]) -> _Group:
        machine, marks = self.machine, self.machine.program.marks
        actor, flags = machine.actors[vcpus[0]], len(self.marked)
        if not flags:
            return self._group(vcpus, 0, actor.to_local, actor.to_shared, np.zeros_like(actor.to_local))
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
        to_field, to_shared, loses = there << flags, after, np.zeros_like(there)
        for number, name in enumerate(self.marked):
            shift, mask = machine.place[name]
            value = after >> shift & mask
            to_field = to_field | (value == me).astype(np.int32) << number
            to_shared = to_shared & ~(mask << shift) | (value != 0).astype(np.int32) << shift
            loses |= (value != other).astype(np.int32) << number
        return self._group(vcpus, flags, np.where(can, to_field, -1), to_shared, loses)

    def _group(self, vcpus: list[int], flags: int, to_field: Any, to_shared: Any, loses: Any) -> _Group:
        """Tables by (move, field, shared) as edges, cell by cell."""
        fields = to_field.shape[1]
        self.dtype = np.promote_types(self.dtype, np.min_scalar_type(fields - 1))
        by_cell = [table.reshape(len(table), -1).T for table in (to_field, to_shared, loses)]  # (cell, move)
        can = by_cell[0] >= 0
        count = can.sum(axis=1, dtype=np.int64)
        return _Group(
            vcpus,
            flags,
            fields,
            count.astype(np.uint8),
            np.cumsum(count, dtype=np.int64) - count,
            by_cell[0][can].astype(self.dtype),
            by_cell[1][can].astype(self.dtype),
            (~by_cell[2][can]).astype(self.dtype),
        )

    def _number(self) -> None:
        """Prepare to number columns: as digits of as many words of 64 bits as it takes, and to sort them."""
        self.digits: list[list[tuple[int, int]]] = [[(len(self.order), 1 << self.machine.shared_bits)]]  # [(row, base)]
        self.swaps: list[tuple[int, int]] = []
        row = 0
        for group in self.groups:
            self.swaps += [(row + low, row + high) for low, high in network(len(group.vcpus))]
            for _ in group.vcpus:
                if math.prod(base for _, base in self.digits[-1]) * group.fields >= 1 << 64:
                    self.digits.append([])
                self.digits[-1].append((row, group.fields))
                row += 1

    # -- states --

    def begin(self) -> Columns:
        """Forget what was seen, and return the start as a frontier of one column."""
        self.seen = HashSet(words=len(self.digits))
        column = self._column(self.machine.start)
        self.seen.add(self.codes(column))
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

    def code(self, state: State) -> Codes:
        """The code of the class that a state belongs to."""
        return self.codes(self._column(state))

    def codes(self, columns: Columns) -> Codes:
        """The number of each column, the same for all states of a class."""
        if self.permutations:
            return np.minimum.reduce([self._image(columns, number) for number in range(self.size)])[:, None]
        codes = np.zeros((len(self.digits), columns.shape[1]), dtype=np.uint64)
        for code, digits in zip(codes, self.digits, strict=True):
            for row, base in digits:
                code *= np.uint64(base)
                code += columns[row]
        return codes.T

    def _image(self, columns: Columns, number: int) -> NDArray[np.uint64]:
        """The code of a column after one permutation."""
        tables, shared = self.relabel[number]
        row = {vcpu: at for at, vcpu in enumerate(self.order)}
        moved = [shared[columns[-1]]] * (len(self.order) + 1)
        for vcpu, image in enumerate(self.permutations[number]):
            moved[row[image]] = tables[vcpu][columns[row[vcpu]]]
        code = np.zeros(columns.shape[1], dtype=np.uint64)
        for at, base in self.digits[0]:
            code *= np.uint64(base)
            code += moved[at].astype(np.uint64)
        return code

    def advance(self, frontier: Columns) -> tuple[Columns, int]:
        """The classes first reached one move after these; moves between classes are not counted."""
        fresh = [frontier[:, :0]]
        for at in range(0, frontier.shape[1], CHUNK):
            _, target = self._step(frontier[:, at : at + CHUNK])
            fresh.append(target.take(self.seen.add(self.codes(target)), axis=1))
            if self.seen.nbytes > self.max_bytes:
                raise OutOfRoom(
                    f"{self.seen.nbytes} bytes for the states seen are more than the {self.max_bytes} allowed"
                )
        return np.concatenate(fresh, axis=1), 0

    def _step(self, columns: Columns) -> tuple[NDArray[np.intp], Columns]:
        """Every move of these states: which of them it is a move of, and the column that it leads to.

        Of vCPUs with equal fields one moves for all.
        """
        sources, targets = [], []
        states, row = columns.shape[1], 0
        for group in self.groups:
            fields = columns[row : row + len(group.vcpus)]  # (place, state)
            cell = (fields.astype(np.intp) << self.machine.shared_bits | columns[-1]).ravel()  # (place and state,)
            count = group.count[cell].reshape(fields.shape)
            count[1:][fields[1:] == fields[:-1]] = 0
            count = count.ravel()
            last = np.cumsum(count, dtype=np.int64)
            edge = np.repeat(group.first[cell] - last + count, count)
            edge += np.arange(len(edge), dtype=np.int64)
            source = np.repeat(np.tile(np.arange(states, dtype=np.intp), len(fields)), count)
            target = columns.take(source, axis=1)
            if self.marked:
                target &= group.keeps[edge]
            target[-1] = group.to_shared[edge]
            moves = count.reshape(fields.shape).sum(axis=1, dtype=np.int64)  # of each row's vCPU: they lie side by side
            for place, end in enumerate(np.cumsum(moves, dtype=np.int64)):
                mine = slice(end - moves[place], end)
                target[row + place, mine] = group.to_field[edge[mine]]
            sources.append(source)
            targets.append(target)
            row += len(group.vcpus)
        target = np.concatenate(targets, axis=1)
        for low, high in self.swaps:
            target[low], target[high] = np.minimum(target[low], target[high]), np.maximum(target[low], target[high])
        return np.concatenate(sources), target

    def edges(self, frontier: Columns) -> tuple[NDArray[np.intp], Codes]:
        """The moves of these classes: which column of the frontier it is a move of, and the code that it leads to."""
        source, target = self._step(frontier)
        return source, self.codes(target)

    def full_count(self, columns: Columns) -> int:
        """How many states these classes hold: all permutations over those that change nothing."""
        if self.permutations:
            least = self.codes(columns)[:, 0]
            idle = sum((self._image(columns, number) == least).astype(np.int64) for number in range(self.size))
        else:  # swapping vCPUs with equal fields changes nothing: m1! m2! ...
            exact = np.int64 if len(self.order) <= 20 else object  # 21! leaves 64 bits
            idle, row = np.ones(columns.shape[1], dtype=exact), 0
            for group in self.groups:
                equal = np.ones(columns.shape[1], dtype=np.int64)
                for at in range(row + 1, row + len(group.vcpus)):
                    equal = np.where(columns[at] == columns[at - 1], equal + 1, 1)
                    idle *= equal
                row += len(group.vcpus)
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


def _grouped(vcpus: Iterable[int], same: Callable[[int, int], bool]) -> list[list[int]]:
    groups: list[list[int]] = []
    for vcpu in vcpus:
        for group in groups:
            if same(group[0], vcpu):
                group.append(vcpu)
                break
        else:
            groups.append([vcpu])
    return groups


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
