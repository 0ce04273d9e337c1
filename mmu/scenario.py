"""What went into a recorded run: memslots, guest page tables, vCPU state, accesses, dirty-log calls, in order.

A scenario is the JSON that stands beside a recorded trace (``X.json.gz`` beside ``X.trace.gz``). :func:`load` turns it
into typed events whose lists of accesses are arrays, so that :mod:`mmu.walks` and :mod:`mmu.vm` can predict from it.
Numbers are hexadecimal text in the JSON and uint64 here. Chapter 13 reads scenarios of its own traces.

>>> text = '''{"scenario": "A", "prefix": "npt0", "guest_mode": "flat32", "params": {"kvm_amd.npt": "N"}, "events": [
...     {"t": "vcpu", "vcpu": 0, "gmode": "flat32", "cr0": "0x10033", "cr3": "0x0", "cr4": "0x0", "efer": "0x0"},
...     {"t": "run", "vcpu": 0, "phase": "A1", "ns": 5, "ns_end": 9, "n": 2, "accesses": [
...         ["R", "0x1000000", "0x0", "0x7", null], ["uW", "0x1001000", "0x1", "0x0", "0x7", "0x1001000"]]}]}'''
>>> run = parse(text).runs[0]
>>> [OPS[op] for op in run.op], run.user.tolist(), run.faulted.tolist(), hex(run.cr2[1])
(['R', 'W'], [False, True], [False, True], '0x1001000')
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmu.paging import PTE, Format, format_of

PAGE, MOST_PAGES = 0x1000, 1 << 22  # no recorded guest has more than 16 GiB
UPPER = PTE.mask("P", "W", "U", "A")
OPS = ("R", "W", "RMW", "X", "INVLPG", "CR3", "CR0")
READ, WRITE, RMW, CALL, INVLPG, CR3, CR0 = range(len(OPS))
LOG_DIRTY_PAGES, READONLY = 1, 2
P_DROPPED_SINCE = (7, 2)  # of QEMU

_CODE = {name: (place, False) for place, name in enumerate(OPS)}
_CODE |= {"u" + name: (place, True) for place, name in enumerate(OPS[:4])}  # a leading u: at CPL 3


class Memslot(NamedTuple):
    """KVM_SET_USER_MEMORY_REGION; size 0 deletes the slot."""

    slot: int
    gpa: int
    size: int
    flags: int
    hva: int
    backing: str
    ns: int
    ns_end: int


class Gmap(NamedTuple):
    """Leaf entries that the host wrote under the guest's ``root``: ``pages`` from gva to gpa, with ``flags``.

    The leaves are of ``level``: 1, or 2 where the guest maps by large pages (then ``flags`` has PS). Pages are of 4K.
    """

    root: int
    gva: int
    gpa: int
    pages: int
    flags: int
    level: int = 1


class Vcpu(NamedTuple):
    """A vCPU's control registers before its first run."""

    vcpu: int
    gmode: str
    cr0: int
    cr3: int
    cr4: int
    efer: int


class EnableCap(NamedTuple):
    """KVM_ENABLE_CAP: 168 is KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 192 the dirty ring."""

    cap: int
    arg0: int


class Phase(NamedTuple):
    """A marker in the recording, without effect."""

    name: str
    ns: int


class DirtyGet(NamedTuple):
    """KVM_GET_DIRTY_LOG and the bitmap that it returned."""

    slot: int
    seq: int
    ns: int
    ns_end: int
    bitmap: NDArray[np.bool]  # (page,)


class DirtyClear(NamedTuple):
    """KVM_CLEAR_DIRTY_LOG of ``num_pages`` pages from ``first_page``; the bitmap's page 0 is ``first_page``."""

    slot: int
    first_page: int
    num_pages: int
    ns: int
    ns_end: int
    bitmap: NDArray[np.bool]  # (page,)


class DirtyRing(NamedTuple):
    """A harvest of one vCPU's dirty ring and its reset: slot and page, in ring order."""

    vcpu: int
    why: str
    ns: int
    ns_end: int
    entries: NDArray[np.int64]  # (entry, 2)


class Host(NamedTuple):
    """Something that the host did to the memory behind a slot: ``what`` names it in words."""

    what: str
    gpa: int
    length: int
    ns: int


class Note(NamedTuple):
    """Everything that informs and does nothing: seeds, notes, checks of final values."""

    kind: str
    facts: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One KVM_RUN loop: the accesses that a vCPU made, in order; every array is ``# (access,)``."""

    vcpu: int
    phase: str
    ns: int
    ns_end: int
    op: NDArray[np.uint8]  # index into OPS
    user: NDArray[np.bool]  # made at CPL 3
    gva: NDArray[np.uint64]  # for CR3 and CR0: the value loaded
    value: NDArray[np.uint64]  # what a store stores
    result: NDArray[np.uint64]  # what a load returned
    faulted: NDArray[np.bool]  # the guest saw a #PF
    error: NDArray[np.uint64]  # its error code, where faulted
    cr2: NDArray[np.uint64]  # and its address
    mmio_exits: tuple[tuple[int, int, str, int], ...]  # gpa, length, R or W, value

    def __len__(self) -> int:
        return len(self.op)


Event = Memslot | Gmap | Vcpu | EnableCap | Phase | DirtyGet | DirtyClear | DirtyRing | Host | Note | Run


@dataclass(frozen=True)
class Scenario:
    """A whole recording's input: where it ran, and its events in order."""

    name: str
    config: str
    guest_mode: str
    kernel: str
    params: dict[str, str]
    events: tuple[Event, ...]
    host: str = ""

    def of(self, kind: type) -> list[Any]:
        """The events of one kind, in order."""
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def runs(self) -> list[Run]:
        """The runs, in the order of the recording; two vCPUs' runs may overlap in time."""
        return self.of(Run)

    @property
    def nested_paging(self) -> bool:
        """Whether KVM used NPT or EPT: the CPU walks the guest's tables itself, and sets their A and D bits."""
        return any(self.params.get(name) in ("Y", "1") for name in ("kvm_amd.npt", "kvm_intel.ept"))

    @property
    def reserved_without_p(self) -> bool:
        """Whether the CPU under the recording left P clear in the error code of a reserved-bit fault.

        QEMU's emulated MMU does since version 7.2: measured with 7.2.22; ``mmu_translate`` of its ``excp_helper.c`` set
        both bits before, and still sets RSVD alone in the source of 2025. A recording says so by naming the version;
        the project's older ones name none, and were made with a QEMU that had been corrected.

        >>> [Scenario("", "", "", "", {}, (), host).reserved_without_p for host in ("qemu 7.2.22 TCG", "qemu TCG")]
        [True, False]
        """
        version = re.match(r"qemu (\d+)\.(\d+)", self.host)
        return bool(version) and (int(version[1]), int(version[2])) >= P_DROPPED_SINCE


def number(value: Any) -> int:
    """An unsigned 64-bit number given as JSON number or hexadecimal text.

    >>> number("0x4006000"), number(3)
    (67133440, 3)
    """
    parsed = int(value, 16) if isinstance(value, str) else value
    if isinstance(parsed, bool) or not isinstance(parsed, int) or not 0 <= parsed < 1 << 64:
        raise ValueError(f"{value!r} is no unsigned 64-bit number; expected hexadecimal text such as '0x1000'")
    return parsed


def bitmap(text: str, pages: int | None = None) -> NDArray[np.bool]:
    """A dirty bitmap from little-endian hexadecimal bytes: page i is bit i % 8 of byte i // 8.

    >>> np.flatnonzero(bitmap("0180")).tolist()
    [0, 15]
    """
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8), bitorder="little").astype(np.bool)
    return bits if pages is None else bits[:pages]


def _words(values: list[Any]) -> NDArray[np.uint64]:
    return np.array([number(value) for value in values], dtype=np.uint64)


def _run(event: dict[str, Any]) -> Run:
    rows = [[*row, None, None][:6] for row in event["accesses"]]
    ops, gvas, values, results, errors, cr2s = zip(*rows, strict=True) if rows else ((),) * 6
    if unknown := sorted({str(op) for op in ops} - set(_CODE)):
        raise ValueError(f"operation {unknown[0]!r}; expected one of {', '.join(_CODE)}")
    codes = [_CODE[op] for op in ops]
    faulted = [error is not None for error in errors]
    exits = (
        (number(gpa), int(length), str(way), number(value)) for gpa, length, way, value in event.get("mmio_exits", ())
    )
    return Run(
        int(event["vcpu"]), event["phase"], int(event["ns"]), int(event["ns_end"]),
        np.array([code for code, _ in codes], dtype=np.uint8), np.array([user for _, user in codes], dtype=np.bool),
        _words(list(gvas)), _words(list(values)), _words(list(results)), np.array(faulted, dtype=np.bool),
        _words([error or 0 for error in errors]), _words([cr2 or 0 for cr2 in cr2s]), tuple(exits),
    )  # fmt: skip


def _event(event: dict[str, Any]) -> Event:
    def numbers(*names: str) -> list[int]:
        return [number(event[name]) for name in names]

    match event["t"]:
        case "run":
            return _run(event)
        case "memslot":
            slot, gpa, size, flags, hva = numbers("slot", "gpa", "size", "flags", "hva")
            return Memslot(slot, gpa, size, flags, hva, event["backing"], *numbers("ns", "ns_end"))
        case "gmap" | "gmap_range":
            pages = int(event.get("n", 1))
            if not 0 < pages <= MOST_PAGES:
                raise ValueError(f"n is {pages}; expected 1 to {MOST_PAGES:,} pages")
            level = int(event.get("level", 1))
            if level not in (1, 2):
                raise ValueError(f"level is {level}; expected 1, or 2 for large pages")
            return Gmap(*numbers("root", "gva", "gpa"), pages, number(event["flags"]), level)
        case "vcpu":
            return Vcpu(number(event["vcpu"]), event["gmode"], *numbers("cr0", "cr3", "cr4", "efer"))
        case "enable_cap":
            return EnableCap(*numbers("cap", "arg0"))
        case "phase":
            return Phase(event["name"], number(event["ns"]))
        case "dirty_get":
            return DirtyGet(*numbers("slot", "seq", "ns", "ns_end"), bitmap(event["bitmap"]))
        case "dirty_clear":
            where = numbers("slot", "first_page", "num_pages", "ns", "ns_end")
            return DirtyClear(*where, bitmap(event["bitmap"], where[2]))
        case "dirty_ring":
            entries = np.array(event["entries"], dtype=np.int64).reshape(-1, 2)
            return DirtyRing(number(event["vcpu"]), event["why"], *numbers("ns", "ns_end"), entries)
        case "host":
            return Host(event["what"], *numbers("gpa", "len", "ns"))
        case kind:
            return Note(str(kind), {name: value for name, value in event.items() if name != "t"})


def parse(text: str | bytes) -> Scenario:
    """Read a scenario from JSON text.

    Raises:
        ValueError: the text is no JSON, no scenario, or an event lacks a key or holds something else than it should;
            the message names the event's place and kind.
    """
    try:
        data = json.loads(text)
        kinds = [event["t"] for event in data["events"]]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the scenario is no JSON: {error}") from None
    except (KeyError, TypeError):
        raise ValueError("the JSON is no scenario; expected an object with 'events', each with a kind 't'") from None
    events: list[Event] = []
    for place, (kind, event) in enumerate(zip(kinds, data["events"], strict=True)):
        try:
            events.append(_event(event))
        except KeyError as error:
            raise ValueError(f"event {place} ({kind}) of the scenario lacks {error}") from None
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"event {place} ({kind}) of the scenario: {error}") from None
    words = {name: str(data.get(name, "")) for name in ("scenario", "prefix", "guest_mode", "kernel", "host")}
    params = {str(name): str(value) for name, value in dict(data.get("params") or {}).items()}
    head = (words[name] for name in ("scenario", "prefix", "guest_mode", "kernel"))
    return Scenario(*head, params, tuple(events), words["host"])


def load(path: str | Path) -> Scenario:
    """Read a scenario from a file, plain or gzipped.

    Raises:
        OSError: the file cannot be read. ValueError: it holds no scenario.
    """
    data = Path(path).read_bytes()
    try:
        return parse(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is no complete gzip file: {error}") from None


class TableWrites(NamedTuple):
    """The guest page-table entries that the client wrote, in order; every array is ``# (write,)``."""

    gpa: NDArray[np.uint64]  # where the entry lies
    entry: NDArray[np.uint64]  # paging.Format.entry_bytes wide
    before_run: NDArray[np.int64]  # how many runs had begun by then


def paging_format(scenario: Scenario) -> Format | None:
    """The guest's paging mode, from its first vCPU's control registers; None while CR0.PG is clear."""
    vcpus = scenario.of(Vcpu)
    return format_of(vcpus[0].cr0, vcpus[0].cr4, vcpus[0].efer) if vcpus else None


def table_writes(scenario: Scenario) -> TableWrites:
    """Lay out the guest's page tables as the recording client did.

    The ``gmap`` lines give leaves. Table pages are taken in ascending order from ``root + 0x1000`` as the lines need
    them, and an upper entry is its table's address with P, W, U and A set; under PAE the four page directories come
    first, each pointer with P alone. A guest without paging has no tables.
    """
    fmt = paging_format(scenario)
    tables: dict[tuple[int, int, int], int] = {}  # (root, level, gva bits above the table) -> its address
    free: dict[int, int] = {}  # root -> the next unused page
    writes: list[tuple[NDArray[np.uint64], NDArray[np.uint64], int]] = []
    runs = 0

    def note(gpa: Any, entry: Any) -> None:
        writes.append((np.atleast_1d(np.asarray(gpa, np.uint64)), np.atleast_1d(np.asarray(entry, np.uint64)), runs))

    def table(root: int, level: int, gva: int) -> int:
        """The table of ``level`` that translates ``gva``, taken from the free pages if it is not there yet."""
        key = (root, level, gva >> fmt.shift(level + 1))
        if level == fmt.levels:
            return root
        if key not in tables:
            above = table(root, level + 1, gva) + fmt.index(gva, level + 1) * fmt.entry_bytes
            tables[key], free[root] = free[root], free[root] + PAGE
            note(above, tables[key] | (1 if level + 1 in fmt.plain else UPPER))
        return tables[key]

    for event in scenario.events:
        runs += isinstance(event, Run)
        if not isinstance(event, Gmap) or fmt is None:
            continue
        if event.root not in free:
            free[event.root] = event.root + PAGE
            for directory in range(1 << fmt.index_bits[0]) if fmt.plain else ():
                table(event.root, fmt.levels - 1, directory << fmt.shift(fmt.levels))
        level = event.level
        offset = np.arange(0, event.pages * PAGE, 1 << fmt.shift(level), dtype=np.uint64)  # (leaf,)
        gvas, gpas = np.uint64(event.gva) + offset, np.uint64(event.gpa) + offset
        region = gvas >> np.uint64(fmt.shift(level + 1))  # (leaf,): which leaf table
        first = np.flatnonzero(np.diff(region, prepend=~region[:1])).tolist()
        for begin, end in zip(first, [*first[1:], offset.size], strict=True):
            place = fmt.index(gvas[begin:end], level) * np.uint64(fmt.entry_bytes)
            note(table(event.root, level, int(gvas[begin])) + place, gpas[begin:end] | np.uint64(event.flags))
    if not writes:
        return TableWrites(*(np.zeros(0, dtype=kind) for kind in (np.uint64, np.uint64, np.int64)))
    before = [np.full(gpa.size, run, dtype=np.int64) for gpa, _, run in writes]
    return TableWrites(*map(np.concatenate, ([gpa for gpa, _, _ in writes], [entry for _, entry, _ in writes], before)))
