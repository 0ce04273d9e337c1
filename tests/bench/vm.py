"""How fast a simulated guest makes accesses, against plain Python and C, and in how much memory. Run by ``make bench``.

The steady state: every page is mapped and logged; reads, stores and fetches come at random, and after each round of
them the dirty log is fetched, which write-protects what was dirty. Every fault is then one that the fast path repairs.
Once all pages of the slot have been stored to, no access can fault before the next fetch, and the package skips the
rest of the round, which C and plain Python look at one by one; a page that is never stored to makes all look at all.
"""

from __future__ import annotations

import array
import ctypes
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mmu.host import Backing
from mmu.kernel import FAST_FIXED, Kernel, Masks
from mmu.slots import LOG_DIRTY_PAGES
from mmu.vm import FETCH, INCREMENT, READ, VCPU, WRITE, Guest, Stream, stream
from tests.bench.walk import OPTIMISED, OURS, SAMPLE, Row, at, check, compiled, row

SIZES = {1 << 10: 80.0, 1 << 16: None, 1 << 20: None, 1 << 24: 20.0}  # gfns; how many times plain Python at least
NO_SKIP = (1 << 10, 1 << 16)  # the sizes at which whole rounds could be skipped: measured without that too
ROUND, ROUNDS = 10_000_000, 4  # accesses between two fetches of the log, and how many rounds a run makes
PIECE = 1 << 18  # accesses handed over at once: they stay in the CPU's cache
RUNS = 3
BASE = 0x100  # the slot's first gfn
LONG, SHORT, LONG_PAGES = 10**9, 10**7, 1 << 16  # for the row on memory: accesses in one run, gfns
HERE = Path(__file__)


class State(ctypes.Structure):
    """The C side's struct guest."""

    _fields_ = (
        ("sptes", ctypes.c_void_p), ("rights", ctypes.c_void_p), ("dirty", ctypes.c_void_p),
        ("base", ctypes.c_uint64), ("w", ctypes.c_uint64), ("mmu_w", ctypes.c_uint64),
    )  # fmt: skip


def pieces(dice: np.random.Generator, pages: int, count: int) -> Iterator[Stream]:
    """A stream of random accesses in pieces: half of them stores, of which some are locked increments."""
    kinds = np.array([READ] * 7 + [WRITE] * 7 + [INCREMENT, FETCH], dtype=np.uint8)
    for start in range(0, count, PIECE):
        size = min(PIECE, count - start)
        op = kinds[dice.integers(0, kinds.size, size, dtype=np.uint8)]
        page = dice.integers(BASE, BASE + pages, size, dtype=np.uint64)
        yield stream(op, page << np.uint64(12))


def steady(pages: int) -> Guest:
    """A guest whose pages are all mapped, logged and write-protected."""
    guest, backing = Guest(Kernel()), Backing(pages)
    guest.vcpus[0] = VCPU(0)
    backing.populate()
    slot = guest.add_slot(0, BASE, pages, LOG_DIRTY_PAGES, backing)
    for start in range(BASE, BASE + pages, PIECE):
        page = np.arange(start, min(start + PIECE, BASE + pages), dtype=np.uint64)
        guest.drive(0, [stream(WRITE, page << np.uint64(12))])
    check(bool(guest.get_dirty_log(slot).all()), "first stores")
    return guest


class InC:
    """The C side with a copy of a guest's state."""

    def __init__(self, library: ctypes.CDLL, guest: Guest) -> None:
        self.library, direct, bits = library, guest.direct, Masks(guest.kernel.layout)
        self.sptes, self.rights, self.dirty = direct.sptes.copy(), direct.rights.copy(), guest.memory.dirty.copy()
        self.bitmap = np.empty_like(self.dirty)
        self.state = State(*(at(kept) for kept in (self.sptes, self.rights, self.dirty)), BASE, bits.w, bits.mmu_w)
        library.drive.restype = ctypes.c_int64

    def round(self, accesses: list[Stream]) -> int:
        """One round; leaves the bitmap in ``bitmap``."""
        fixed = 0
        for part in accesses:
            count = ctypes.c_size_t(part.gva.size)
            fixed += self.library.drive(ctypes.byref(self.state), at(part.op), at(part.gva), count)
        self.library.get_dirty_log(ctypes.byref(self.state), at(self.bitmap), ctypes.c_size_t(self.dirty.size))
        return fixed


class InPython:
    """The plain loop with a copy of a guest's state."""

    def __init__(self, guest: Guest) -> None:
        direct, bits = guest.direct, Masks(guest.kernel.layout)
        self.sptes = array.array("Q", direct.sptes.tobytes())
        self.rights, self.dirty = bytearray(direct.rights), bytearray(guest.memory.dirty)
        self.w, self.mmu_w = int(bits.w), int(bits.mmu_w)

    def drive(self, ops: list[int], addresses: list[int]) -> int:
        """Let accesses happen; return how many faults the fast path repaired."""
        sptes, rights, dirty, w, mmu_w, fixed = self.sptes, self.rights, self.dirty, self.w, self.mmu_w, 0
        for op, address in zip(ops, addresses, strict=True):
            index = (address >> 12) - BASE
            if rights[index] >> op & 1:
                continue
            spte = sptes[index]
            if not 1 <= op <= 2 or spte & w or not spte & mmu_w:
                raise AssertionError("not the steady state")
            sptes[index] = spte | w
            rights[index] |= 6
            dirty[index] = 1
            fixed += 1
        return fixed

    def get_dirty_log(self) -> bytes:
        """Take the dirty bitmap; its pages become clean and write-protected."""
        bitmap, sptes, rights, w = bytes(self.dirty), self.sptes, self.rights, self.w
        for index, dirty in enumerate(bitmap):
            if dirty:
                sptes[index] &= ~w
                rights[index] &= ~6
        self.dirty = bytearray(len(bitmap))
        return bitmap


def seconds(run: Callable[[], Any]) -> float:
    """How long a call takes, of this program's own time: what else runs on the machine does not count."""
    start = time.process_time()
    run()
    return time.process_time() - start


def speed_rows(library: ctypes.CDLL | None, pages: int, target: float | None, spared: int = 0) -> list[Row]:
    """One size, some of its pages spared from all accesses; both sides have done the same before they are timed."""
    guest = steady(pages)
    slot = guest.memory.slots[0]
    accesses = list(pieces(np.random.default_rng(pages), pages - spared, ROUND))

    def ours() -> tuple[int, np.ndarray]:
        counts = guest.drive(0, accesses).counts
        check(counts.sum() == counts[FAST_FIXED], "paths")
        return int(counts[FAST_FIXED]), guest.get_dirty_log(slot)

    plain, in_python = InPython(guest), 0.0
    twin = InC(library, guest) if library is not None else None
    faults, bitmap = ours()
    if twin is not None:
        check((twin.round(accesses), twin.bitmap.tobytes()) == (faults, bitmap.tobytes()), "faults or dirty bitmaps")
        check(np.array_equal(twin.sptes, guest.direct.sptes), "sptes")
    fixed = 0
    for part in accesses:
        ops, addresses = part.op.tolist(), part.gva.tolist()
        start = time.process_time()
        fixed += plain.drive(ops, addresses)
        in_python += time.process_time() - start
    in_python += seconds(lambda: check((fixed, plain.get_dirty_log()) == (faults, bitmap.tobytes()), "plain Python"))
    mine: list[float] = []
    theirs: list[float] = []
    for _ in range(RUNS):
        mine.append(seconds(lambda: [ours() for _ in range(ROUNDS)]) / ROUNDS)
        if twin is not None:
            theirs.append(seconds(lambda: [twin.round(accesses) for _ in range(ROUNDS)]) / ROUNDS)
    speed, *peer = (1e-6 * ROUND / statistics.median(times) for times in (mine, theirs) if times)
    what = f"steady state, 2^{pages.bit_length() - 1} gfns, rounds of 10^7 accesses with {faults:,} faults each"
    what += f", {spared} gfn never stored to" if spared else ""
    return [
        row(what, speed, OPTIMISED, peer[0] if peer else None, 0.5),
        row(what, speed, "plain Python", 1e-6 * ROUND / in_python, target),
    ]


# --- growth ---


def per_access(library: ctypes.CDLL | None, pages: int, count: int, vcpus: int = 1) -> list[float]:
    """ns an access of the package, of C where it is known, and of plain Python: the log fetched after ``count``.

    One gfn is never stored to, so that nothing can be skipped. The accesses are dealt to the vCPUs piece by piece.
    """
    guest = steady(pages)
    slot = guest.memory.slots[0]
    for vcpu in range(1, vcpus):
        guest.vcpus[vcpu] = VCPU(vcpu)
    accesses = list(pieces(np.random.default_rng(pages), pages - 1, count))
    plain = InPython(guest)
    few = [(part.op[:SAMPLE].tolist(), part.gva[:SAMPLE].tolist()) for part in accesses[:1]]
    share = sum(len(ops) for ops, _ in few) / count

    def ours() -> None:
        for place in range(0, len(accesses), vcpus):
            for vcpu, part in enumerate(accesses[place : place + vcpus]):
                guest.drive(vcpu, [part])
        guest.get_dirty_log(slot)

    sides: list[tuple[Callable[[], Any], float]] = [(ours, 1.0)]
    if library is not None:
        twin = InC(library, guest)
        sides.append((lambda: twin.round(accesses), 1.0))
    sides.append((lambda: [plain.drive(*part) for part in few], share))
    times = [statistics.median([seconds(run) for _ in range(RUNS + 1)][1:]) / part for run, part in sides]
    return [1e9 * taken / count for taken in times]


def growth() -> dict[str, dict[str, Any]]:
    """What an access costs by how many there are, by the guest's size and by its vCPUs; each panel varies one."""
    library = compiled("-O2", beside=__file__)
    names = [OURS, *([OPTIMISED] if library is not None else []), "plain Python"]
    panels = []
    for x, fixed, values, setting in (
        ("accesses", "2^16 gfns", [10**3, 10**4, 10**5, 10**6, 10**7], lambda count: (1 << 16, count, 1)),
        ("gfns", "10^7 accesses", [1 << bits for bits in range(10, 25, 2)], lambda pages: (pages, ROUND, 1)),
        ("vCPUs", "2^16 gfns,\n10^7 accesses", [1 << bits for bits in range(7)], lambda n: (1 << 16, ROUND, n)),
    ):
        table = [(value, per_access(library, *setting(value))) for value in values]
        lines = {name: [(value, found[i]) for value, found in table] for i, name in enumerate(names)}
        panels.append({"x": x, "y": f"ns an access, {fixed}", "lines": lines})
    return {"guest": {"panels": panels, "marks": {}}}


# --- memory ---


def long_run(count: int) -> None:
    """One call of ``drive`` with a dirty log fetched every 10^7 accesses; prints the seconds and the peak in kB."""
    guest = steady(LONG_PAGES)
    slot = guest.memory.slots[0]

    def rounds() -> Iterator[Stream]:
        dice = np.random.default_rng(9)
        for _ in range(0, count, ROUND):
            yield from pieces(dice, LONG_PAGES - 1, ROUND)
            guest.get_dirty_log(slot)

    start = time.perf_counter()
    check(guest.drive(0, rounds()).accesses == count, "accesses")
    # VmHWM is of this program alone; ru_maxrss would remember the parent it was started from
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(time.perf_counter() - start, peak.split()[1])


def memory_row() -> Row:
    """The peak of a stream of 10^9 accesses beside that of one a hundredth as long, each in a process of its own."""
    if not Path("/proc/self/status").exists():
        told = [(0.0, 0.0)] * 2
    else:
        command = [sys.executable, "-m", "tests.bench.vm"]
        root = HERE.parents[2]
        outs = [subprocess.check_output([*command, str(count)], text=True, cwd=root) for count in (LONG, SHORT)]
        told = [(float(out.split()[0]), int(out.split()[1]) / 1024) for out in outs]
    (took, long), (_, short) = told
    known = short > 0
    return {
        "name": f"peak memory of one run of 10^9 accesses, 2^16 gfns, made in {took:.0f} s with the stream itself",
        "ours": round(long, 1),
        "peer": "the same with 10^7 accesses" if known else "not measured: there is no /proc/self/status",
        "peer_value": round(short, 1) if known else None,
        "unit": "MiB",
        "ratio": round(long / short, 3) if known else None,
        "target": "at most 1.1",
        "met": long <= 1.1 * short if known else None,
    }


def rows() -> list[Row]:
    """Each size against C and against plain Python, and the memory of a long stream."""
    library = compiled("-O2", beside=__file__)
    found = [line for pages, target in SIZES.items() for line in speed_rows(library, pages, target)]
    found += [line for pages in NO_SKIP for line in speed_rows(library, pages, None, 1)]
    return [*found, memory_row()]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        long_run(int(sys.argv[1]))
    else:
        for one in rows():
            print(one)
