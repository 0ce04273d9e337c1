"""Recorded guest page walks, predicted entry by entry from the scenario alone (chapter 5).

With npt=0 KVM walks the guest's page tables in software and its tracepoints print each walk: address and access
(``kvm_mmu_pagetable_walk``), every entry read (``kvm_mmu_paging_element``), the fault if it takes one
(``kvm_mmu_walker_error``). :func:`check_walks` takes from the trace a walk's address, its access and its place among
the events (:mod:`mmu.places`), and nothing else; entries, levels and outcome come from the scenario, with the guest's
stores, CR3 and CR0 writes and earlier walks' A and D updates applied up to that place.

Nothing here loops over walks. Guest memory is a list of *versions*: every store to every word with its time. Reading a
word is a binary search for its last version before a time; A and D in a version are the first times at which a walk
that went through set them. Where stores go depends on translations that depend on stores, so stores are placed again
until nothing moves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmu import paging, scenario
from mmu.paging import Format
from mmu.places import FETCHES, MARK, READS, WRITES, Accesses, Places, Trace, follow
from mmu.scenario import Scenario

EVENTS = (  # all that is read of a trace
    *("kvm_mmu_pagetable_walk", "kvm_mmu_paging_element", "kvm_mmu_walker_error"),
    *("kvm_entry", "kvm_exit", "kvm_page_fault", "kvm_inj_exception", "kvm_emulate_insn"),
)
DEEPEST = 5  # levels
NEVER = np.iinfo(np.int64).max
PHYSICAL_BITS = 40  # inferred: what QEMU's CPU models give a guest; the recorded reserved-bit faults use bit 51
ROUNDS = 64  # each round of placing stores is right for one more link in a chain of stores that move tables
CR0_WP = np.uint64(1 << 16)
CR4_PSE, CR4_SMEP, CR4_SMAP, EFER_NXE = 1 << 4, 1 << 20, 1 << 21, 1 << 11


@dataclass(frozen=True)
class Walks:
    """Page walks, one a row; arrays ``# (walk,)`` or ``# (walk, step)``, step 0 being the entry in the root."""

    entry: NDArray[np.uint64]  # (walk, step), 0 where the walk read none
    level: NDArray[np.int64]  # (walk, step), 0 where the walk read none
    fault: NDArray[np.bool]
    code: NDArray[np.uint64]


@dataclass(frozen=True)
class Recorded:
    """The walks that a trace prints: what each is for, and what came of it."""

    mark: NDArray[Any]  # places.MARK  # (walk,)
    user: NDArray[np.bool]
    walks: Walks
    entry_line: NDArray[np.int64]  # (walk, step), 0 where none was printed
    stray: NDArray[np.int64]  # lines of elements and errors that follow no walk, or are more than a walk has


def recorded(trace: Trace) -> Recorded:
    """Collect the walks that a trace prints. Their lines carry no vCPU; those of one task belong together."""
    names = EVENTS[:3]
    walks, elements, errors = (trace[name] for name in names)
    kind = np.repeat(np.arange(3, dtype=np.int64), [len(walks), len(elements), len(errors)])  # (printed line,)
    row = np.concatenate([np.arange(len(part), dtype=np.int64) for part in (walks, elements, errors)])
    line, pid = (np.concatenate([trace[name][field] for name in names]).astype(np.int64) for field in ("line", "pid"))
    order = np.lexsort((line, pid))
    kind, row, line, pid = kind[order], row[order], line[order], pid[order]
    here = np.arange(kind.size, dtype=np.int64)
    opener = np.maximum.accumulate(np.where(kind == 0, here, -1))  # the walk line above, in the same task or another
    step = here - opener - 1
    fits = (opener >= 0) & (pid == pid[opener]) & (step < np.where(kind == 1, DEEPEST, DEEPEST + 1))
    walk = row[opener]

    shape = (len(walks), DEEPEST)
    entry, level, entry_line = (np.zeros(shape, dtype=dtype) for dtype in (np.uint64, np.int64, np.int64))
    printed = (kind == 1) & fits
    where = walk[printed], step[printed]
    entry[where], level[where] = elements["pte"][row[printed]], elements["level"][row[printed]]
    entry_line[where] = line[printed]
    fault, code = np.zeros(len(walks), dtype=np.bool), np.zeros(len(walks), dtype=np.uint64)
    printed = (kind == 2) & fits
    fault[walk[printed]], code[walk[printed]] = True, errors["pferr"][row[printed]]

    mark = np.zeros(len(walks), dtype=MARK)
    for name, field in {"line": "line", "ns": "ns", "pid": "pid", "address": "addr"}.items():
        mark[name] = walks[field]
    write, user, fetch = (walks["pferr"] & bit != 0 for bit in (paging.CODE_W, paging.CODE_U, paging.CODE_F))
    mark["kind"] = np.where(fetch, FETCHES, np.where(write, WRITES, READS))
    return Recorded(mark, user, Walks(entry, level, fault, code), entry_line, np.sort(line[(kind > 0) & ~fits]))


class Versions:
    """Guest-physical memory over time: what each 4-byte word held from each store on, and when A and D came into it."""

    def __init__(self, word: NDArray[np.uint64], value: NDArray[np.uint64], time: NDArray[np.int64]) -> None:
        """Take stores ``# (store,)`` of words; of stores to one word at the same time the later in the array wins."""
        self.words, ids = np.unique(word, return_inverse=True)
        key = self._key(ids.astype(np.int64), time)
        order = np.argsort(key, kind="stable")
        self.key, self.id = key[order], np.append(ids[order], -1)
        self.value = np.append(value[order], np.uint64(0))  # the last version is that of memory never stored to
        self.accessed, self.dirtied = (np.full(self.value.size, NEVER, dtype=np.int64) for _ in range(2))

    @staticmethod
    def _key(ids: NDArray[np.int64], time: NDArray[np.int64]) -> NDArray[np.int64]:
        return ids << 40 | time  # one number that orders by word, then by time; times are ranks

    def version(self, gpa: NDArray[np.uint64], time: NDArray[np.int64]) -> NDArray[np.int64]:
        """The version of the word at ``gpa`` just before ``time``."""
        word = gpa >> np.uint64(2)
        ids = np.searchsorted(self.words, word)
        stored = np.append(self.words, ~np.uint64(0))[ids] == word
        version = np.searchsorted(self.key, self._key(ids, time)) - 1
        return np.where(stored & (self.id[version] == ids), version, self.value.size - 1)

    def entry(self, gpa: NDArray[np.uint64], size: int, time: NDArray[np.int64]) -> tuple[Any, NDArray[np.int64]]:
        """The page-table entry at ``gpa`` just before ``time``, and the version of its low word, where A and D are."""
        low = self.version(gpa, time)
        word = self.value[low] | (self.accessed[low] < time) * paging.A | (self.dirtied[low] < time) * paging.D
        if size == 8:
            word = word | self.value[self.version(gpa + np.uint64(4), time)] << np.uint64(32)
        return word, low

    def mark(self, version: NDArray[np.int64], time: NDArray[np.int64], dirty: NDArray[np.bool]) -> None:
        """Set A in versions from a time on, and D where ``dirty``."""
        np.minimum.at(self.accessed, version, time)
        np.minimum.at(self.dirtied, version[dirty], time[dirty])


def _in_words(
    gpa: NDArray[np.uint64], value: NDArray[np.uint64], time: NDArray[np.int64], size: int
) -> list[NDArray[Any]]:
    """Stores of 4 or 8 bytes as stores of words: which word, its value, when."""
    half = np.arange(size // 4, dtype=np.uint64)
    word = (gpa >> np.uint64(2))[:, None] + half  # (store, half)
    part = value[:, None] >> half * np.uint64(32) & np.uint64(0xFFFFFFFF)
    return [word.ravel(), part.ravel(), np.repeat(time, half.size)]


@dataclass(frozen=True)
class _Asked:
    """Walks to make: what each is for and what its vCPU's registers hold then; arrays ``# (walk,)``."""

    address: NDArray[np.uint64]
    kind: NDArray[np.int64]
    user: NDArray[np.bool]
    cr3: NDArray[np.uint64]
    wp: NDArray[np.bool]
    nxe: NDArray[np.bool]
    smep: NDArray[np.bool]
    smap: NDArray[np.bool]

    @staticmethod
    def join(parts: list[_Asked]) -> _Asked:
        names = _Asked.__dataclass_fields__
        return _Asked(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def _ask(steps: Accesses, place: NDArray[np.int64], *what: NDArray[Any]) -> _Asked:
    """Walks of one vCPU: ``what`` is address, kind and user; the registers are those at ``place``."""
    vcpu = steps.vcpu
    fixed = [vcpu.efer & EFER_NXE, vcpu.cr4 & CR4_SMEP, vcpu.cr4 & CR4_SMAP]
    cr3, cr0 = (steps.register(*load)[place] for load in ((scenario.CR3, vcpu.cr3), (scenario.CR0, vcpu.cr0)))
    return _Asked(*what, cr3, cr0 & CR0_WP != 0, *(np.full(place.size, bool(bit), dtype=np.bool) for bit in fixed))


class _Made(NamedTuple):
    """Walks made: what they read and came to, where they led, and the entries that they used."""

    walks: Walks
    gpa: NDArray[np.uint64]  # (walk,): what the address translates to, where there is no fault
    table: NDArray[np.uint64]  # (walk, step): the page that the entry lies in
    version: NDArray[np.int64]  # (walk, step): of the entry's low word
    used: NDArray[np.bool]  # (walk, step): the entry gets A; none in a walk that faults


def _make(memory: Versions, fmt: Format, asked: _Asked, time: NDArray[np.int64]) -> _Made:
    """Make walks through guest memory, each as of its own time."""
    table = asked.cr3 & (np.uint64(0xFFFFFFE0) if fmt is paging.PAE else paging.PFN)
    read = []
    for level in range(fmt.levels, 0, -1):
        gpa = table + fmt.index(asked.address, level) * np.uint64(fmt.entry_bytes)
        read.append((gpa >> np.uint64(12), *memory.entry(gpa, fmt.entry_bytes, time)))
        table = read[-1][1] & paging.PFN
    tables, entries, versions = (np.stack(column, axis=-1) for column in zip(*read, strict=True))  # (walk, step)
    out = paging.access(
        entries, write=asked.kind == WRITES, fetch=asked.kind == FETCHES, user=asked.user,
        wp=asked.wp, nxe=asked.nxe, smep=asked.smep, smap=asked.smap, maxphyaddr=PHYSICAL_BITS, fmt=fmt,
    )  # fmt: skip
    levels = np.arange(fmt.levels, 0, -1, dtype=np.int64)
    read_at_all = levels >= out.walk.level[:, None]  # (walk, step)
    offset = np.array([0, *((1 << fmt.shift(level)) - 1 for level in range(1, fmt.levels + 1))], dtype=np.uint64)
    within = offset[out.walk.level]
    gpa = (out.walk.leaf & paging.PFN & ~within) | (asked.address & within)
    used = out.walk.used & ~out.fault[:, None] & ~np.isin(levels, fmt.plain)
    shown = np.where(read_at_all, entries, np.uint64(0)), np.where(read_at_all, levels, 0)
    return _Made(Walks(*shown, out.fault, out.code), gpa, tables, versions, used)


class _Story(NamedTuple):
    """All that happens, each at its time: walks that were printed, accesses, and what the client wrote beforehand."""

    asked: _Asked  # (event,): the recorded walks and the accesses, each of which walks as well
    time: NDArray[np.int64]  # (event,): ranks
    row: NDArray[np.int64]  # (event,): which recorded walk it is; -1: an access
    op: NDArray[np.uint8]  # (event,)
    value: NDArray[np.uint64]  # (event,): what a store stores
    host: scenario.TableWrites
    host_time: NDArray[np.int64]  # (write,)


def _tell(scene: Scenario, ways: list[Places], rec: Recorded) -> _Story:
    """Put the recorded walks, the accesses and the client's own writes into one order of time.

    A walk is made when its line is printed. An access happens after the last line that is not past it, in its turn.
    """
    host = scenario.table_writes(scene)
    asked, rows, ops, values, lines, turns = [], [], [], [], [], []
    end = np.zeros((len(scene.runs) + 1, 2), dtype=np.int64)  # (run + 1, 2): line and turn past each run's last access
    end[0] = -1  # before the first run there is nothing
    for way in ways:
        steps, mark = way.accesses, rec.mark[way.walks]
        does = np.flatnonzero(steps.op <= scenario.CALL)
        kind = np.array([READS, WRITES, WRITES, FETCHES], dtype=np.int64)[steps.op[does]]
        asked.append(_ask(steps, way.place, mark["address"], mark["kind"], rec.user[way.walks]))
        asked.append(_ask(steps, does, steps.gva[does], kind, steps.user[does]))
        rows += [way.walks, np.full(does.size, -1, dtype=np.int64)]
        ops += [np.full(way.walks.size, scenario.READ, dtype=np.uint8), steps.op[does]]
        values += [np.zeros(way.walks.size, dtype=np.uint64), steps.value[does]]
        lines += [mark["line"], way.after[does]]
        turns += [np.zeros(way.walks.size, dtype=np.int64), 2 * does + 2]
        end[steps.run + 1, 0] = np.append(0, way.after)[steps.first[1:]]
        end[steps.run + 1, 1] = 2 * steps.first[1:] + 1
    latest, run = np.maximum.accumulate(end[:, 0]), np.arange(len(end), dtype=np.int64)
    last = np.maximum.accumulate(np.where(end[:, 0] == latest, run, 0))  # of the runs so far the one that ended last
    for column, of_host in zip((lines, turns), end[last[host.before_run]].T, strict=True):
        column.append(of_host)  # what the client wrote is there before all, or once the runs before it are over

    line, turn = np.concatenate(lines), np.concatenate(turns)
    order = np.lexsort((turn, line))
    later = (np.diff(line[order], prepend=-2) != 0) | (np.diff(turn[order], prepend=-2) != 0)
    rank = np.empty(line.size, dtype=np.int64)
    rank[order] = np.cumsum(later, dtype=np.int64)
    row, op, value = map(np.concatenate, (rows, ops, values))
    return _Story(_Asked.join(asked), rank[: row.size], row, op, value, host, rank[row.size :])


def _settle(story: _Story, fmt: Format, nested_paging: bool) -> Versions:
    """What guest memory holds over time, once it is clear where every store goes and which walks mark what."""
    asked, time = story.asked, story.time
    writes, adds = np.isin(story.op, (scenario.WRITE, scenario.RMW)), story.op == scenario.RMW
    marks = (story.row >= 0) | nested_paging  # under nested paging the CPU itself sets A and D, at every access
    by_host = _in_words(story.host.gpa, story.host.entry, story.host_time, fmt.entry_bytes)
    width = 8 if fmt in (paging.LONG4, paging.LONG5) else 4  # of the guest's stores
    stored, where, value = np.zeros(time.size, dtype=np.bool), np.zeros(time.size, dtype=np.uint64), story.value
    for _ in range(ROUNDS):
        by_guest = _in_words(where[stored], value[stored], time[stored], width)
        memory = Versions(*(np.concatenate(pair) for pair in zip(by_guest, by_host, strict=True)))
        made = _make(memory, fmt, asked, time)
        used = made.used & marks[:, None]
        walk, step = np.nonzero(used)
        is_leaf = step == used.sum(axis=1, dtype=np.int64)[walk] + len(fmt.plain) - 1
        memory.mark(made.version[used], time[walk], is_leaf & (asked.kind == WRITES)[walk])
        held = memory.entry(made.gpa, width, time)[0]
        before = stored, where, value
        stored = writes & ~made.walks.fault & np.isin(made.gpa >> np.uint64(12), made.table)  # others are never read
        where, value = np.where(stored, made.gpa, where), np.where(stored & adds, held + np.uint64(1), value)
        if all(map(np.array_equal, before, (stored, where, value))):
            break
    return memory


def predict(scene: Scenario, ways: list[Places], rec: Recorded) -> Walks:
    """Say what each recorded walk must have read and come to; a walk that cannot be placed has level 0 throughout.

    Args:
        scene: what went in.
        ways: where the walks stand among the accesses, from :func:`mmu.places.follow`.
        rec: the walks; of them only the marks and ``user`` are looked at.
    """
    fmt, count = scenario.paging_format(scene), rec.mark.size
    kinds = ((count, DEEPEST), np.uint64), ((count, DEEPEST), np.int64), (count, np.bool), (count, np.uint64)
    out = Walks(*(np.zeros(shape, dtype=kind) for shape, kind in kinds))
    if fmt is None or not ways:
        return out
    story = _tell(scene, ways, rec)
    walks = _make(_settle(story, fmt, scene.nested_paging), fmt, story.asked, story.time).walks
    mine, row = story.row >= 0, story.row[story.row >= 0]
    out.entry[row, : fmt.levels], out.level[row, : fmt.levels] = walks.entry[mine], walks.level[mine]
    out.fault[row], out.code[row] = walks.fault[mine], walks.code[mine]
    return out


@dataclass(frozen=True)
class WalkCheck:
    """How many printed elements and outcomes of walks the scenario predicts, and those that it does not."""

    agree: int
    of: int
    disagreements: list[dict[str, str | int]]


def check_walks(trace: Trace, scene: Scenario) -> WalkCheck:
    """Compare every walk that a trace prints with what its scenario implies.

    Counted is each element, printed or predicted, by its entry and level, and each walk's outcome: the code of its
    ``kvm_mmu_walker_error``, or that there is none.

    Args:
        trace: from :func:`mmu.trace.read`.
        scene: from :func:`mmu.scenario.load`.
    """
    rec = recorded(trace)
    said, real = predict(scene, follow(trace, scene, rec.mark), rec), rec.walks
    either = (said.level > 0) | (rec.entry_line > 0)  # (walk, step)
    wrong = either & ((said.entry != real.entry) | (said.level != real.level))
    placed = said.level[:, 0] > 0
    wrong_end = ~placed | (said.fault != real.fault) | (said.code != real.code)
    of = int(either.sum()) + len(wrong_end) + len(rec.stray)

    def element(walks: Walks, walk: int, step: int) -> str:
        level = int(walks.level[walk, step])
        return f"pte {int(walks.entry[walk, step]):x} level {level}" if level else "no element"

    def outcome(walks: Walks, walk: int) -> str:
        return f"walker_error {int(walks.code[walk]):x}" if walks.fault[walk] else "no walker_error"

    def why(walk: int, reason: str) -> str:
        address = int(rec.mark["address"][walk])
        return f"walk of {address:x}: {reason}" if placed[walk] else f"walk of {address:x} has no place in the scenario"

    out = []
    for walk, step in np.argwhere(wrong).tolist():
        line = int(rec.entry_line[walk, step]) or int(rec.mark["line"][walk])
        reason = why(walk, "the guest's tables hold another entry here at this place in the scenario")
        out.append((line, element(said, walk, step), element(real, walk, step), reason))
    for walk in np.flatnonzero(wrong_end).tolist():
        predicted = outcome(said, walk) if placed[walk] else "nothing"
        reason = why(walk, "the entries' rights give this access another outcome")
        out.append((int(rec.mark["line"][walk]), predicted, outcome(real, walk), reason))
    for line in rec.stray.tolist():
        out.append((line, "nothing", "an element or an error", "no walk of this task is under way at this line"))
    fields = ("line", "predicted", "recorded", "reason")
    found = [{"kind": "walks"} | dict(zip(fields, row, strict=True)) for row in sorted(out)]
    return WalkCheck(of - len(found), of, found)
