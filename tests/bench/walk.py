"""How fast fault codes are given and tables walked, against plain Python and C. Run by ``make bench``, or alone."""

from __future__ import annotations

import ctypes
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mmu import formats, nested, paging, tables

ACCESSES, PAGES = 10_000_000, 1_000_000
SIZES = (1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000, 10_000_000)  # of tables, in pages
SAMPLE = 50_000  # plain Python is timed on as many and scaled: all of them would take it a minute and more
RUNS = 5
START = 0x7F00_0000_0000
MAXPHYADDR = 46
OURS, OPTIMISED, TUNED = "the package", "C at -O2", "C at -O3 -march=native"
Row = Chart = dict[str, Any]


class Cpu(ctypes.Structure):
    """The C side's struct cpu."""

    _fields_ = (("reserved", ctypes.c_uint64), ("wp", ctypes.c_int), ("smep", ctypes.c_int), ("smap", ctypes.c_int))


def compiled(*flags: str, beside: str = __file__) -> ctypes.CDLL | None:
    """The C side of the module ``beside``, compiled with gcc and some flags; None without gcc."""
    if not shutil.which("gcc"):
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "walk.so"
        source = Path(beside).with_suffix(".c")
        subprocess.run(["gcc", *flags, "-shared", "-fPIC", "-o", library, source], check=True)
        return ctypes.CDLL(str(library))


def at(array: np.ndarray | None) -> ctypes.c_void_p:
    """A C pointer to an array's first element, or NULL."""
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


def alternate(count: int, *sides: tuple[Callable[[], Any], int]) -> list[float]:
    """Speeds in million a second, medians of RUNS runs in turn; each side with how many of the accesses it does."""
    seconds: list[list[float]] = [[] for _ in sides]
    for _ in range(RUNS):
        for times, (run, share) in zip(seconds, sides, strict=True):
            start = time.perf_counter()
            run()
            times.append((time.perf_counter() - start) / min(share, count))
    return [1e-6 / statistics.median(times) for times in seconds]


def row(name: str, ours: float, peer: str, theirs: float | None, target: float | None) -> Row:
    """A row of the table; ratio and target are in speed, ours to theirs."""
    ratio = None if theirs is None else ours / theirs
    return {
        "name": name,
        "ours": round(ours, 2),
        "peer": peer if theirs is not None else f"{peer}: gcc is not installed",
        "peer_value": None if theirs is None else round(theirs, 3),
        "unit": "million/s",
        "ratio": None if ratio is None else round(ratio, 2),
        "target": target,
        "met": None if target is None or ratio is None else bool(ratio >= target),
    }


def check(same: bool, what: str) -> None:
    """Refuse to time two sides that do not do the same."""
    if not same:
        raise AssertionError(f"{what} differ between the two sides: a speed would mean nothing")


# --- the peers in Python ---


def plain_code(entry: int, kind: int, reserved: int) -> int:
    """The fault code of one access through one leaf with CR0.WP, SMEP and SMAP on; -1 for none."""
    if not entry & 1:
        return kind
    if entry & reserved:
        return kind | 9
    write, user, fetch = kind & 2, kind & 4, kind & 16
    if user:
        bad = not entry & 4 or (write and not entry & 2) or (fetch and entry >> 63)
    else:
        bad = entry & 4 or (write and not entry & 2) or (fetch and entry >> 63)
    return kind | 1 if bad else -1


def plain_walk(words: list[int], address: int, kind: int, reserved: int) -> tuple[int, int, int]:
    """One bare walk with CR0.WP on: physical address, fault code or -1, level."""
    table, allowed, denials = 0, 7, 0
    for level in (4, 3, 2, 1):
        entry = words[(table >> 3) + (address >> 3 + 9 * level & 511)]
        if not entry & 1:
            return 0, kind, level
        leaf = level == 1 or (level < 4 and entry & 0x80)
        low = 0x80 if level == 4 else (1 << 3 + 9 * level) - 0x2000 if leaf and level > 1 else 0
        if entry & (reserved | low):
            return 0, kind | 9, level
        allowed &= entry
        denials |= entry
        if leaf:
            break
        table = entry & 0xFFFFFFFFFF000
    if (kind & 4 and not allowed & 4) or (kind & 2 and not allowed & 2) or (kind & 16 and denials >> 63):
        return 0, kind | 1, level
    inside = (1 << 3 + 9 * level) - 1
    return entry & 0xFFFFFFFFFF000 & ~inside | address & inside, -1, level


def plain_walk_kept(words: list[int], address: int, kind: int, reserved: int) -> tuple[int, int, int, list[int]]:
    """The same with every entry kept, and A and D set in the words."""
    table, allowed, denials, slots, entries = 0, 7, 0, [], []
    for level in (4, 3, 2, 1):
        slot = (table >> 3) + (address >> 3 + 9 * level & 511)
        entry = words[slot]
        slots.append(slot)
        entries.append(entry)
        if not entry & 1:
            return 0, kind, level, entries
        leaf = level == 1 or (level < 4 and entry & 0x80)
        low = 0x80 if level == 4 else (1 << 3 + 9 * level) - 0x2000 if leaf and level > 1 else 0
        if entry & (reserved | low):
            return 0, kind | 9, level, entries
        allowed &= entry
        denials |= entry
        if leaf:
            break
        table = entry & 0xFFFFFFFFFF000
    if (kind & 4 and not allowed & 4) or (kind & 2 and not allowed & 2) or (kind & 16 and denials >> 63):
        return 0, kind | 1, level, entries
    for slot in slots:
        words[slot] |= 0x20
    if kind & 2:
        words[slots[-1]] |= 0x40
    inside = (1 << 3 + 9 * level) - 1
    return entry & 0xFFFFFFFFFF000 & ~inside | address & inside, -1, level, entries


def plain_ept(words: list[int], gpa: int, access: int) -> tuple[int, int]:
    """One walk of an EPT without large leaves: host-physical address, and violation bits or -1."""
    table, rights = 0, 7
    for shift in (39, 30, 21, 12):
        entry = words[(table >> 3) + (gpa >> shift & 511)]
        if not entry & 7:
            return 0, access
        rights &= entry
        table = entry & 0xFFFFFFFFFF000
    if access & ~rights:
        return 0, access | rights << 3
    return table | gpa & 0xFFF, -1


def plain_nested(guest: list[int], base: int, ept: list[int], address: int, kind: int) -> tuple[int, int]:
    """One two-dimensional walk with EPT's A/D bits on: host-physical address, and a fault of either kind or -1."""
    table, allowed = base << 12, 7
    for shift in (39, 30, 21, 12):
        gpa = table + 8 * (address >> shift & 511)
        _, why = plain_ept(ept, gpa, 3)
        if why >= 0:
            return 0, why | 0x80
        entry = guest[(gpa >> 3) - base * 512]
        if not entry & 1:
            return 0, kind
        allowed &= entry
        table = entry & 0xFFFFFFFFFF000
    if (kind & 4 and not allowed & 4) or (kind & 2 and not allowed & 2):
        return 0, kind | 1
    physical, why = plain_ept(ept, table | address & 0xFFF, 2 if kind & 2 else 1)
    return physical, -1 if why < 0 else why | 0x180


# --- the rows ---


def code_rows(fast: ctypes.CDLL | None, tuned: ctypes.CDLL | None) -> list[Row]:
    """Pairs of an spte and an access to fault codes."""
    dice = np.random.default_rng(2012)
    low = np.array([0x867, 0x865, 0x861, 0x863, 0, 0x825, 1 << 63 | 0x867, 1 << 51 | 0x867], dtype=np.uint64)
    sptes = dice.choice(low, ACCESSES) | dice.integers(0, 1 << 34, ACCESSES, dtype=np.uint64) << np.uint64(12)
    kinds = dice.choice(np.array([0, 2, 4, 6, 16, 20], dtype=np.uint8), ACCESSES)
    reserved = formats.LONG4.forbidden(1, True, MAXPHYADDR)
    cpu, settings = Cpu(reserved, 1, 1, 1), {"maxphyaddr": MAXPHYADDR, "smep": True, "smap": True}
    table = paging.decisions(smep=True, smap=True)

    def ours() -> np.ndarray:
        return paging.fault_codes(sptes, kinds, **settings)

    def in_c(library: ctypes.CDLL, name: str, *more: Any) -> np.ndarray:
        codes = np.empty(ACCESSES, dtype=np.int8)
        getattr(library, name)(at(sptes), at(kinds), at(codes), ctypes.c_size_t(ACCESSES), ctypes.byref(cpu), *more)
        return codes

    pairs = list(zip(sptes[:SAMPLE].tolist(), kinds[:SAMPLE].tolist(), strict=True))
    check(ours()[:SAMPLE].tolist() == [plain_code(*pair, reserved) for pair in pairs], "fault codes")
    what = f"{ACCESSES:,} (spte, access) pairs to fault codes"
    speeds = alternate(ACCESSES, (ours, ACCESSES), (lambda: [plain_code(*pair, reserved) for pair in pairs], SAMPLE))
    rows = [row(what, speeds[0], "plain Python", speeds[1], 40.0)]
    for peer, library, name, more, target in (
        (OPTIMISED, fast, "fault_codes", (), 1 / 1.5),
        (TUNED, tuned, "fault_codes", (), None),
        (f"{OPTIMISED}, by the same table", fast, "fault_codes_by_table", (at(table),), None),
    ):
        if library is None:
            rows.append(row(what, alternate(ACCESSES, (ours, ACCESSES))[0], peer, None, target))
            continue
        check(np.array_equal(ours(), in_c(library, name, *more)), "fault codes")
        theirs = (lambda library=library, name=name, more=more: in_c(library, name, *more)), ACCESSES
        speeds = alternate(ACCESSES, (ours, ACCESSES), theirs)
        rows.append(row(what, *speeds[:1], peer, speeds[1], target and round(target, 2)))
    return rows


class Machine:
    """A four-level table that maps pages one after the other to frames in no order, and accesses all over it."""

    def __init__(self, pages: int, accesses: int = ACCESSES) -> None:
        dice = np.random.default_rng(pages)
        self.table = tables.PageTable(maxphyaddr=MAXPHYADDR)
        address = np.uint64(START) + np.arange(pages, dtype=np.uint64) * np.uint64(4096)
        flags = dice.choice(np.array([7, 7, 7, 5], dtype=np.uint64), pages)
        self.table.map(address, pfn=dice.permutation(pages).astype(np.uint64), flags=flags)
        self.clean = self.table.words.copy()
        self.addresses = np.uint64(START) + dice.integers(0, pages * 4096, accesses, dtype=np.uint64)
        self.write = dice.integers(0, 2, accesses, dtype=np.uint8).astype(np.bool)
        self.kinds = self.write * np.uint8(2) | np.uint8(4)
        self.reserved = formats.LONG4.reserved(1, True, MAXPHYADDR)

    def ours(self, keep: bool) -> tables.Walk:
        """Bare, or with entries kept and A and D set in a fresh table."""
        if keep:
            self.table.words[:] = self.clean
        return self.table.walk(self.addresses, write=self.write, user=True, keep=keep, update=keep)

    def in_c(self, library: ctypes.CDLL, keep: bool) -> tuple[np.ndarray, ...]:
        """The same in C; words, physical addresses, codes, levels, entries."""
        count, cpu = self.addresses.size, Cpu(self.reserved, 1, 0, 0)
        words = self.clean.copy() if keep else self.clean
        physical, codes, levels = (np.empty(count, dtype=kind) for kind in (np.uint64, np.int8, np.uint8))
        entries = np.empty((count, 4), dtype=np.uint64) if keep else None
        inputs = at(words), at(self.addresses), at(self.kinds), ctypes.c_size_t(count), ctypes.byref(cpu), int(keep)
        library.walk(*inputs, at(physical), at(codes), at(levels), at(entries))
        return words, physical, codes, levels, entries

    def same_as_c(self, library: ctypes.CDLL, keep: bool) -> bool:
        """Whether both sides give the same; C sees in entries what the walks before marked, so marks are left out."""
        walk, (words, physical, codes, levels, entries) = self.ours(keep), self.in_c(library, keep)
        same = np.array_equal(walk.physical, physical) and np.array_equal(walk.level, levels)
        same &= np.array_equal(np.where(walk.fault, walk.code.astype(np.int8), -1), codes)
        if keep:
            marks = np.uint64(0x60)
            same &= np.array_equal(words, self.table.words) and np.array_equal(walk.entries & ~marks, entries & ~marks)
        return bool(same)


def walk_rows(fast: ctypes.CDLL | None) -> list[Row]:
    """The four-level walk, bare and with all that a walk leaves behind."""
    machine, rows = Machine(PAGES), []
    sample = list(zip(machine.addresses[:SAMPLE].tolist(), machine.kinds[:SAMPLE].tolist(), strict=True))
    for keep, plain, target, how in (
        (False, plain_walk, 35.0, "bare"),
        (True, plain_walk_kept, 15.0, "entries kept, A/D set"),
    ):
        what = f"four-level walk of {ACCESSES:,} addresses, {PAGES:,} pages, {how}"
        words, walk = machine.clean.tolist(), machine.ours(keep)
        codes = np.where(walk.fault, walk.code.astype(np.int64), -1)[:SAMPLE].tolist()
        expected = [plain(words, address, kind, machine.reserved) for address, kind in sample]
        ours = zip(walk.physical[:SAMPLE].tolist(), codes, walk.level[:SAMPLE].tolist(), strict=True)
        check([one[:3] for one in expected] == list(ours), "walks")

        def in_python(plain: Callable = plain, words: list[int] = words) -> None:
            [plain(words, address, kind, machine.reserved) for address, kind in sample]

        def mine(keep: bool = keep) -> None:
            machine.ours(keep)

        speeds = alternate(ACCESSES, (mine, ACCESSES), (in_python, SAMPLE))
        rows.append(row(what, speeds[0], "plain Python", speeds[1], target))
        if fast is None:
            rows.append(row(what, speeds[0], OPTIMISED, None, 0.4))
            continue
        check(machine.same_as_c(fast, keep), "walks")
        speeds = alternate(ACCESSES, (mine, ACCESSES), (lambda keep=keep: machine.in_c(fast, keep), ACCESSES))
        rows.append(row(what, speeds[0], OPTIMISED, speeds[1], 0.4))
    return rows


def nested_rows() -> list[Row]:
    """The two-dimensional walk: four levels through four."""
    machine = Machine(PAGES, ACCESSES // 5)
    guest, ept = tables.PageTable(base=1 << 24), tables.PageTable(formats.EPT4)
    address = np.uint64(START) + np.arange(PAGES, dtype=np.uint64) * np.uint64(4096)
    guest.map(address, pfn=np.random.default_rng(5).permutation(PAGES).astype(np.uint64), flags=7)
    frames = np.concatenate([np.arange(PAGES), (1 << 24) + np.arange(guest.live.size)]).astype(np.uint64)
    ept.map(frames << np.uint64(12), pfn=frames, flags=6 << 3 | 7)

    def ours() -> nested.NestedWalk:
        how = {"write": machine.write, "user": True, "keep": False, "update": False}
        return nested.walk_nested(guest, ept, machine.addresses, **how)

    sample = list(zip(machine.addresses[:SAMPLE].tolist(), machine.kinds[:SAMPLE].tolist(), strict=True))
    words = guest.words.tolist(), guest.base, ept.words.tolist()

    def in_python() -> list[tuple[int, int]]:
        return [plain_nested(*words, address, kind) for address, kind in sample]

    walk = ours()
    check(not (walk.guest.fault | walk.nested_fault).any(), "faults")
    check(walk.physical[:SAMPLE].tolist() == [physical for physical, _ in in_python()], "addresses")
    count = machine.addresses.size
    speeds = alternate(count, (ours, count), (in_python, SAMPLE))
    what = f"two-dimensional walk of {count:,} addresses, {PAGES:,} pages, four levels through four"
    return [row(what, speeds[0], "plain Python", speeds[1], 15.0)]


def caches() -> dict[str, int]:
    """The sizes of this machine's data caches in bytes, as far as the C library tells them."""
    sizes: dict[str, int] = {}
    if not shutil.which("getconf"):
        return sizes
    for level, name in (("L1", "LEVEL1_DCACHE_SIZE"), ("L2", "LEVEL2_CACHE_SIZE"), ("L3", "LEVEL3_CACHE_SIZE")):
        told = subprocess.run(["getconf", name], capture_output=True, text=True, check=False).stdout.strip()
        if told.isdigit() and int(told):
            sizes[level] = int(told)
    return sizes


def growth() -> dict[str, Chart]:
    """What a bare walk costs by the size of the table: its lowest level is the first that leaves a cache."""
    fast, mine, theirs = compiled("-O2"), [], []
    for pages in SIZES:
        machine = Machine(pages, ACCESSES // 5)
        count = machine.addresses.size
        sides = [(lambda machine=machine: machine.ours(False), count)]
        if fast is not None:
            check(machine.same_as_c(fast, False), "walks")
            sides.append((lambda machine=machine: machine.in_c(fast, False), count))
        for line, speed in zip((mine, theirs), alternate(count, *sides), strict=False):
            line.append((pages, 1000 / speed))
    panel = {"x": "pages in the table", "y": "ns for an address", "lines": {OURS: mine, OPTIMISED: theirs}}
    return {"walk": {"panels": [panel], "marks": {level: size / 8 for level, size in caches().items()}}}


def rows() -> list[Row]:
    """All rows, fault codes first; a ratio is of speeds, so that C in 1.5 times our time is a ratio of 0.67."""
    fast, tuned = compiled("-O2"), compiled("-O3", "-march=native")
    return [*code_rows(fast, tuned), *walk_rows(fast), *nested_rows()]


if __name__ == "__main__":
    for one in rows():
        print(one)
