"""How fast the race pieces are, beside SPIN and scalar C in the same run; ``python -m tests.bench race`` prints it.

SPIN (Debian's package ``spin``) searches ``race.pml``, the looping model on x86-TSO cut into the same steps, compiled
with -O3, breadth first, safety only, without partial-order reduction, which would leave states out. ``race.c`` is what
scalar code makes of this package's own tables: a hash table of keys and a queue. Our own figure includes reading the
text and filling the tables, the peers' is their search alone.
"""

from __future__ import annotations

import functools
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mmu import litmus
from mmu.explore import explore
from mmu.machine import Machine
from mmu.protocols import looping, one_shot

HERE = Path(__file__).parent
TABLE = """seed no-id shared-id protector-w-only no-fault-mb no-protect-mb no-mb cmpxchg-id cmpxchg-id-no-fault-mb
cmpxchg-id-no-protect-mb cmpxchg-shared-id rmw-id rmw-shared-id plain-clear""".split()
GIB = 1 << 30


def seconds(run: Callable[[], Any], times: int = 5) -> float:
    """Median wall time of several runs."""
    taken = []
    for _ in range(times):
        before = time.perf_counter()
        run()
        taken.append(time.perf_counter() - before)
    return statistics.median(taken)


def spin(vcpus: int, times: int) -> tuple[int, float] | None:
    """States of the looping model, and states per second, by SPIN; None where it is not installed."""
    if not shutil.which("spin") or not shutil.which("gcc"):
        return None
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            ["spin", "-a", f"-DN={vcpus}", str(HERE / "race.pml")], cwd=folder, check=True, capture_output=True
        )
        flags = ["-O3", "-w", "-DSAFETY", "-DBFS", "-DNOREDUCE"]
        subprocess.run(["gcc", *flags, "-o", "pan", "pan.c"], cwd=folder, check=True)
        states, rates = 0, []
        for _ in range(times):
            said = subprocess.run(["./pan", "-w25"], cwd=folder, check=True, capture_output=True, text=True).stdout
            states = int(re.search(r"(\d+) states, stored", said)[1])
            rates.append(states / float(re.search(r"elapsed time ([\d.]+)", said)[1]))
        return states, statistics.median(rates)


def scalar(vcpus: int, times: int, expected: int) -> tuple[int, float] | None:
    """The same by scalar C over this package's tables; None where there is no compiler."""
    if not shutil.which("gcc"):
        return None
    machine = Machine(looping(vcpus), "TSO")
    words = [np.array([len(machine.actors), machine.shared_bits, machine.start.shared], dtype="<i4")]
    for actor in machine.actors:
        moves, locals_, _ = actor.to_local.shape
        words.append(np.array([moves, locals_], dtype="<i4"))
        both = np.stack([actor.to_local, actor.to_shared], axis=-1)  # (move, local, shared, 2)
        words.append(np.ascontiguousarray(both.transpose(1, 2, 0, 3), dtype="<i4").ravel())
    with tempfile.TemporaryDirectory() as folder:
        np.concatenate(words).tofile(Path(folder) / "tables")
        subprocess.run(["gcc", "-O3", "-march=native", "-o", "race", str(HERE / "race.c")], cwd=folder, check=True)
        states, rates, slots = 0, [], str((expected * 3 // 2).bit_length())  # a hash table at most two thirds full
        for _ in range(times):
            said = subprocess.run(["./race", "tables", slots], cwd=folder, check=True, capture_output=True, text=True)
            counts = said.stdout.split()
            states = int(counts[0])
            rates.append(states / float(counts[3]))
        return states, statistics.median(rates)


def peak(vcpus: int) -> tuple[int, int]:
    """States, and bytes that a process of its own takes at most for the search."""
    code = (
        "import resource; from mmu.explore import explore; from mmu.protocols import looping;"
        f"print(explore(looping({vcpus}), 'TSO').states, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    said = subprocess.run([sys.executable, "-c", code], cwd=HERE.parents[1], check=True, capture_output=True, text=True)
    states, kib = map(int, said.stdout.split())
    return states, kib * 1024


def variants() -> None:
    """Every variant of the protocol's table for two and three vCPUs under both memory models."""
    for variant in TABLE:
        for vcpus in (2, 3):
            for memory in ("SC", "TSO"):
                explore(one_shot(vcpus, variant), memory)


def storm(size: int = 1000) -> list[dict[str, Any]]:
    """So many litmus tests: store buffering and message passing, with and without fences and locked operations."""
    tests = []
    middle: list[list[list[Any]]] = [[], [["F"]], [["X", "t", "z", 1]], [["R", "t", "x"]], [["W", "z", 2]]]
    for number in range(size):
        a, b = middle[number % 5], middle[number // 5 % 5]
        first, second = (["x", "y"], ["y", "x"])[:: 1 if number // 25 % 2 else -1]
        sb = [[["W", first[0], 1], *a, ["R", "r", first[1]]], [["W", second[0], 1], *b, ["R", "r", second[1]]]]
        mp = [[["W", "x", 1], *a, ["W", "y", 1]], [["R", "r", "y"], *b, ["R", "s", "x"]]]
        exists = (
            ["and", ["eq", "0:r", 0], ["eq", "1:r", 0]] if number % 2 else ["and", ["eq", "1:r", 1], ["eq", "1:s", 0]]
        )
        tests.append({"name": f"{number}", "threads": sb if number % 2 else mp, "exists": exists})
    return tests


def _row(
    name: str, ours: float, unit: str, target: float | None = None, peer: str = "-", value: float | None = None
) -> dict[str, Any]:
    """One line of the table; against a peer the target is a ratio, alone it is a bound in the unit itself."""
    ratio = ours / value if value else None
    if target is None or (peer != "-" and ratio is None):
        met = None
    elif peer == "-":
        met = bool(ours <= target if unit in ("s", "bytes") else ours >= target)
    else:
        met = bool(ratio >= target)
    if peer != "-" and value is None:
        peer += " (not installed)"
    keys = ("name", "ours", "peer", "peer_value", "unit", "ratio", "target", "met")
    return dict(zip(keys, (name, ours, peer, value, unit, ratio, target, met), strict=True))


def speeds(vcpus: int) -> tuple[int, float, float | None, float | None]:
    """States of the looping model, and states per second of the package, of SPIN and of scalar C.

    Raises:
        AssertionError: two sides count different states.
    """
    search = functools.partial(explore, looping(vcpus), "TSO")
    states = search().states
    taken = [seconds(search, 2)]  # our own runs lie before, between and after the peers'
    by_spin = spin(vcpus, 1 if vcpus > 5 else 3) if vcpus > 3 else None  # its clock counts hundredths of a second
    taken.append(seconds(search, 2))
    by_c = scalar(vcpus, 3, states)
    taken.append(seconds(search, 2))
    for peer, measured in (("SPIN", by_spin), ("scalar C", by_c)):
        assert measured is None or measured[0] == states, f"{peer} counts {measured[0]} states, not {states}"
    return states, states / statistics.median(taken), by_spin and by_spin[1], by_c and by_c[1]


def growth() -> dict[str, dict[str, Any]]:
    """How the search's time grows with the number of vCPUs, and states per second beside the peers'."""
    took: dict[str, list[Any]] = {"every state": [], "modulo symmetry": []}
    rates: dict[str, list[Any]] = {"the package": [], "SPIN": [], "scalar C": []}
    for vcpus in range(2, 7):
        states, *measured = speeds(vcpus)
        took["every state"].append((vcpus, states / measured[0]))
        for line, rate in zip(rates.values(), measured, strict=True):
            line += [(vcpus, rate / 1e6)] if rate else []
    for vcpus in range(2, 11):
        taken = seconds(lambda vcpus=vcpus: explore(looping(vcpus), "TSO", canonical=True))
        took["modulo symmetry"].append((vcpus, taken))
    shown = ("seconds for the search", took), ("million states a second", rates)
    return {"race": {"panels": [{"x": "vCPUs", "y": y, "lines": lines} for y, lines in shown], "marks": {}}}


def rows() -> list[dict[str, Any]]:
    """The measurements, each with its target if it has one; what is compared has first counted the same.

    Raises:
        AssertionError: two sides count different states.
    """
    table = []
    for vcpus, against_spin, against_c in ((5, 10, 0.5), (6, 12, 0.5)):
        states, ours, by_spin, by_c = speeds(vcpus)
        for peer, target, measured in (("SPIN", against_spin, by_spin), ("scalar C", against_c, by_c)):
            name = f"looping, TSO, n={vcpus}: {states} states"
            table.append(_row(name, ours, "states/s", target, peer, measured))
    states, used = peak(6)
    table.append(_row(f"looping, TSO, n=6: peak memory of the process, {states} states", used, "bytes", GIB))
    small = explore(looping(10), "TSO", canonical=True)
    name = f"looping, TSO, n=10 modulo symmetry: {small.states} classes of {small.full_states} states"
    table.append(_row(name, seconds(lambda: explore(looping(10), "TSO", canonical=True)), "s", 0.5))
    variants()  # the texts are read once in a process
    table.append(_row("every variant of the table, n=2 and 3, SC and TSO", seconds(variants), "s", 0.5))
    tests = storm()
    verdicts = litmus.run(tests).verdicts
    alone = np.concatenate([litmus.run([test]).verdicts for test in tests[:50]])
    assert (verdicts[:50] == alone).all(), "a batch answers otherwise than its tests by themselves"
    per_second = len(tests) / seconds(lambda: litmus.run(tests))
    table.append(_row("litmus tests under both models, one batch", per_second, "tests/s", 1000))
    return table
