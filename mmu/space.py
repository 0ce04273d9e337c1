"""Every state of a machine as one 64-bit key, and one move of a whole frontier of them: what :mod:`mmu.explore` drives.

The actors are split into two halves. Joint local states of a half are numbered as they are met, so a key has three
parts: number of the first half, shared words, number of the second half. What a half may do at one value of the shared
words is looked up once; from then on a move is an addition to a key. Chapter 9 counts with it.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from mmu.hashset import HashSet
from mmu.machine import Actor, Machine, State

MAX_BYTES = 1 << 30
MAX_JOINT = 1 << 26
SMALL = 1 << 14  # rows of a half that are looked up all at once rather than as they are met
SMALL_KEYS = 1 << 18  # keys that get a byte each rather than row by row
CHUNK = 1 << 13  # frontier states at a time: what they lead to still fits a second-level cache

Keys = NDArray[np.int64]


class OutOfRoom(Exception):
    """A bound on states or bytes was reached; what was counted so far stands, the verdict does not."""


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
        if math.prod(self.sizes) > MAX_JOINT:
            raise OutOfRoom(
                f"{len(vcpus)} actors have {math.prod(self.sizes)} joint local states, more than {MAX_JOINT}"
            )
        self.number = np.full(math.prod(self.sizes), -1, dtype=np.int32)  # (joint code,)
        self.number[0] = 0
        self.codes = np.zeros(1, dtype=np.int64)  # (number,)
        self.bits = 0  # room for 2**bits joint states
        self.whole = False  # whether every row was met
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
        rows = _distinct(rows)
        state, shared = self.split(rows)
        codes = self.codes[state]
        source = [np.zeros(0, dtype=np.intp)]
        to_code, to_shared, who, which = ([np.zeros(0, dtype=np.int64)] for _ in range(4))
        for vcpu, actor, stride, local in zip(
            self.vcpus, self.actors, self.strides, self.locals_of(state), strict=True
        ):
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
        new = _distinct(code[self.number[code] < 0])
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

    def prepare(self, shared: int) -> None:
        """Meet every row there can be, or when they are many, those that these actors reach by themselves."""
        if len(self.number) << self.shared_bits <= SMALL:
            self.codes = np.arange(len(self.number), dtype=np.int64)
            self.number = self.codes.astype(np.int32)
            self.make_room()
            rows = np.arange(len(self.number) << self.shared_bits, dtype=np.int64)
            self.meet(self.row(rows >> self.shared_bits, rows & (1 << self.shared_bits) - 1))
            self.whole = True
            return
        rows = self.row(np.zeros(1, dtype=np.int64), np.full(1, shared, dtype=np.int64))
        while rows.size:
            known = len(self.edges["state"])
            self.meet(rows)
            self.make_room()
            rows = self.row(self.edges["to_state"][known:], self.edges["to_shared"][known:])
            rows = rows[self.count[rows] == self.UNMET]


class Space:
    """Every state of a machine, each a key of 64 bits: joint state of the first half, shared words, of the second half.

    One byte a state tells whether it was seen. The bytes lie row by row; a row is what the first half and the shared
    words are, numbered when first met, so what excludes each other (two vCPUs holding the lock) takes no room. When the
    bytes outgrow their bound, which they do before the states do, a hash set of keys takes their place.
    """

    _NOWHERE = np.int64(1) << np.int64(62)

    def __init__(self, machine: Machine, max_bytes: int = MAX_BYTES) -> None:
        self.machine, self.max_bytes, self.max_map = machine, max_bytes, max_bytes
        vcpus = len(machine.actors)
        # the second half takes the odd actor: a row is then as long, and rows as few, as can be
        self.high = _Half(machine, range(vcpus // 2), ends_key=False)
        self.low = _Half(machine, range(vcpus // 2, vcpus), ends_key=True)
        for half in (self.high, self.low):
            half.prepare(machine.start.shared)
        self.whole = self.high.whole and self.low.whole
        self._lay_out()

    def _lay_out(self) -> None:
        """Place the parts of a key; forget what was seen."""
        self.hash: HashSet | None = None
        self.low_bits = self.low.bits
        self.low_mask = (1 << self.low_bits) - 1
        self.row_mask = (1 << self.low_bits + self.machine.shared_bits) - 1
        self.low.aim(1)
        self.high.aim(1 << self.low_bits)
        self.rows = 0
        self.base = np.full(1 << self.high.bits + self.machine.shared_bits, self._NOWHERE, dtype=np.int64)  # (row,)
        self.seen = np.zeros(0, dtype=np.uint8)  # (place,)
        if self.whole and len(self.base) << self.low_bits <= SMALL_KEYS:
            self.base[:] = 0  # a key's place is the key itself
            self.rows = len(self.base)
            self._reserve(self.rows << self.low_bits)

    def begin(self) -> Keys:
        """Forget what was seen, and return the start as a frontier."""
        self._lay_out()
        return self._fresh(np.full(1, self.machine.start.shared << self.low_bits, dtype=np.int64))

    def _places(self, keys: Keys) -> NDArray[np.intp]:
        """Where the bytes of keys lie; rows that are met for the first time get the next places."""
        rows = keys >> self.low_bits
        base = self.base[rows]
        if base.max(initial=0) == self._NOWHERE:
            new = _distinct(rows[base == self._NOWHERE])
            self.base[new] = (np.arange(self.rows, self.rows + len(new), dtype=np.int64) - new) << self.low_bits
            self.rows += len(new)
            self._reserve(self.rows << self.low_bits)
            base = self.base[rows]
        return (base + keys).astype(np.intp, copy=False)

    def _reserve(self, need: int) -> None:
        """Room for this many seen-bytes, and some to spare; where there is none, a hash set takes over."""
        if need > self.max_map:
            known = self._known()
            self.seen = np.zeros(0, dtype=np.uint8)
            self._hash(known)
        elif need > len(self.seen):
            room = min(need + (need >> 2 if need > 1 << 24 else need), self.max_map)
            self.seen.resize(room, refcheck=False)  # in place, where a copy would take the bytes twice

    def _known(self) -> Keys:
        """Every key whose byte is set."""
        rows = np.flatnonzero(self.base != self._NOWHERE)
        of_number = np.zeros(self.rows, dtype=np.int64)
        of_number[(self.base[rows] >> self.low_bits) + rows] = rows
        length = 1 << self.low_bits
        found = [np.zeros(0, dtype=np.int64)]
        for at in range(0, len(self.seen), MAX_JOINT):
            places = np.flatnonzero(self.seen[at : at + MAX_JOINT]).astype(np.int64) + at
            found.append(of_number[places >> self.low_bits] << self.low_bits | places & length - 1)
        return np.concatenate(found)

    def _hash(self, known: Keys) -> None:
        """Keep what was seen in a hash set, which takes more bytes a state but none for states that are not there."""
        self.hash = HashSet(words=1)
        self.hash.add(self.codes(known))

    def _fresh(self, keys: Keys) -> Keys:
        """The keys not seen before, each once; they are marked as seen.

        A key that stands twice must count once. All its copies write into one byte and one of them prevails; a byte has
        255 tags for 65,025 copies at most, so a second round with a second tag tells those apart that shared the first.
        """
        if self.hash is None:
            places = self._places(keys)
        if self.hash is not None:
            if self.hash.bytes_for(len(keys)) > self.max_bytes:
                raise OutOfRoom(f"{self.hash.size} states and more do not fit into {self.max_bytes} bytes")
            return keys[self.hash.add(self.codes(keys))]
        pick = np.flatnonzero(self.seen[places] == 0)
        places, keys = places[pick], keys[pick]
        tag = _TAG[: len(keys)]
        self.seen[places] = tag
        pick = np.flatnonzero(self.seen[places] == tag)
        places, keys, tag = places[pick], keys[pick], _SECOND_TAG[pick]
        self.seen[places] = tag
        return keys[np.flatnonzero(self.seen[places] == tag)]

    def _rows(self, half: _Half, keys: Keys) -> Keys:
        """The row of a half that each key holds."""
        return keys & self.row_mask if half.ends_key else keys >> self.low_bits

    def _meet(self, frontier: Keys) -> Keys:
        """See to it that every row of the frontier is known; keys change when the second half needs more room."""
        for half, unit in ((self.high, 1 << self.low_bits), (self.low, 1)):
            rows = self._rows(half, frontier)
            new = rows[half.count[rows] == _Half.UNMET]
            if new.size:
                half.meet(new)
                half.aim(unit)
        return self._widen(frontier)

    def _widen(self, frontier: Keys) -> Keys:
        """Give the halves the room that they need; keys of the frontier, and of what was seen, change with it."""
        old = self.low_bits
        if self.high.make_room() and self.hash is None:
            base = np.full(1 << self.high.bits + self.machine.shared_bits, self._NOWHERE, dtype=np.int64)
            base[: len(self.base)] = self.base
            self.base = base
        if self.low.make_room():
            known = self._known() if self.hash is None else self.hash.words[0, : self.hash.size].astype(np.int64)
            hashed = self.hash is not None
            self._lay_out()
            frontier, known = (keys >> old << self.low_bits | keys & (1 << old) - 1 for keys in (frontier, known))
            if hashed:
                self._hash(known)
            else:
                for at in range(0, len(known), len(_TAG)):
                    self._fresh(known[at : at + len(_TAG)])
        return frontier

    def _moves(self, half: _Half, keys: Keys) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """The moves of these keys in one half, key by key: the numbers of the edges, and how many each key has."""
        rows = self._rows(half, keys)
        count = half.count[rows]
        last = np.cumsum(count, dtype=np.int64)
        edge = np.repeat(half.first[rows] - last + count, count)
        edge += np.arange(len(edge), dtype=np.int64)
        return edge, count

    def advance(self, frontier: Keys) -> tuple[Keys, int]:
        """The states first reached one move after these, and how many moves there are."""
        if not self.whole:
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

    def moves(self, frontier: Keys) -> dict[str, Keys]:
        """Every move of these states: ``source`` (position in the frontier), ``target`` (key), ``actor``, ``move``."""
        parts = []
        for half in (self.high, self.low):
            edge, count = self._moves(half, frontier)
            source = np.repeat(np.arange(len(frontier), dtype=np.int64), count)
            target = frontier[source] + half.change[edge]
            parts.append((source, target, half.edges["actor"][edge], half.edges["move"][edge]))
        columns = (np.concatenate(column) for column in zip(*parts, strict=True))
        return dict(zip(("source", "target", "actor", "move"), columns, strict=True))

    def edges(self, frontier: Keys) -> tuple[Keys, NDArray[np.uint64]]:
        """The moves of these states: which of the frontier it is a move of, and the code of the state it leads to."""
        moves = self.moves(frontier)
        return moves["source"], self.codes(moves["target"])

    def shared(self, keys: Keys) -> Keys:
        """The shared words of each state, as one number."""
        return keys >> self.low_bits & (1 << self.machine.shared_bits) - 1

    def locals(self, keys: Keys) -> list[Keys]:
        """The local state of each actor in each state."""
        high = self.high.locals_of(keys >> self.low_bits + self.machine.shared_bits)
        return high + self.low.locals_of(keys & self.low_mask)

    def codes(self, keys: Keys) -> NDArray[np.uint64]:
        """The number of each state as a row of one word: its key."""
        return keys.astype(np.uint64)[:, None]

    def code(self, state: State) -> NDArray[np.uint64]:
        """The code of one state; that of no state when the search has not met its parts."""
        numbers = []
        for half in (self.high, self.low):
            code = sum(state.locals[vcpu] * stride for vcpu, stride in zip(half.vcpus, half.strides, strict=True))
            numbers.append(int(half.number[code]))
        if min(numbers) < 0:
            return np.full((1, 1), ~np.uint64(0), dtype=np.uint64)
        key = (numbers[0] << self.machine.shared_bits | state.shared) << self.low_bits | numbers[1]
        return np.full((1, 1), key, dtype=np.uint64)

    def full_count(self, keys: Keys) -> int:
        """How many states of the full space these stand for: here, themselves."""
        return len(keys)


def _distinct(values: Keys) -> Keys:
    """The different values, in order; np.unique takes several times as long on short arrays."""
    values = np.sort(values)
    return values[np.append(True, values[1:] != values[:-1])[: len(values)]]


_TAG = (np.arange(255 * 255, dtype=np.int64) % 255 + 1).astype(np.uint8)  # (position,)
_SECOND_TAG = (np.arange(255 * 255, dtype=np.int64) // 255 + 1).astype(np.uint8)  # (position,)
