"""How fast the race pieces are, beside SPIN and scalar C in the same run; ``python -m tests.bench.race`` prints the table.

SPIN (Debian's package ``spin``) searches ``race.pml``, the looping model on x86-TSO cut into the same steps, compiled
with -O3, breadth first, safety only, without partial-order reduction, which would leave states out. ``race.c`` is what
scalar code makes of this package's own tables. Before anything is compared, all sides must have counted the same states.
"""

from __future__ import annotations

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
    name: str, ours: float, unit: str, target: float, peer: str = "", value: float | None = None
) -> dict[str, Any]:
    """One line of the table; a peer's target is a ratio, any other a bound in the unit itself."""
    ratio = ours / value if value else None
    met = None if peer and value is None else ratio >= target if ratio is not None else None
    if not peer:
        met = ours <= target if unit in ("s", "bytes") else ours >= target
    return {
        "name": name,
        "ours": ours,
        "peer": f"{peer} (not installed)" if peer and value is None else peer,
        "peer_value": value,
        "unit": unit,
        "ratio": ratio,
        "target": target,
        "met": met,
    }


def rows() -> list[dict[str, Any]]:
    """The measurements, each with its target; both sides have counted the same before they are compared.

    Raises:
        AssertionError: two sides count different states.
    """
    table = []
    for vcpus, against_spin, spin_runs in ((5, 10, 3), (6, 12, 1)):
        states = explore(looping(vcpus), "TSO").states
        ours = states / seconds(lambda vcpus=vcpus: explore(looping(vcpus), "TSO"), 5 if vcpus == 5 else 3)
        for peer, target, measured in (
            ("SPIN", against_spin, spin(vcpus, spin_runs)),
            ("scalar C", 0.5, scalar(vcpus, 3, states)),
        ):
            assert measured is None or measured[0] == states, f"{peer} counts {measured[0]} states, not {states}"
            value = measured and measured[1]
            table.append(_row(f"looping, TSO, n={vcpus}: {states} states", ours, "states/s", target, peer, value))
    states, used = peak(6)
    table.append(_row(f"looping, TSO, n=6: peak memory of the process, {states} states", used, "bytes", GIB))
    small = explore(looping(10), "TSO", canonical=True)
    taken = seconds(lambda: explore(looping(10), "TSO", canonical=True))
    table.append(_row(f"looping, TSO, n=10 modulo symmetry: {small.full_states} states behind", taken, "s", 0.5))
    variants()  # the texts are read once in a process
    table.append(_row("every variant of the table, n=2 and 3, SC and TSO", seconds(variants), "s", 0.5))
    tests = storm()
    verdicts = litmus.run(tests).verdicts
    alone = np.concatenate([litmus.run([test]).verdicts for test in tests[:50]])
    assert (verdicts[:50] == alone).all(), "a batch answers otherwise than its tests by themselves"
    per_second = len(tests) / seconds(lambda: litmus.run(tests))
    table.append(_row("litmus tests under both models, one batch", per_second, "tests/s", 1000))
    return table


def growth(largest: int = 6) -> list[dict[str, Any]]:
    """How cost grows with the number of vCPUs: states, seconds and states per second of the looping model on x86-TSO."""
    chart = []
    for vcpus in range(2, largest + 1):
        for canonical in (False, True):
            found = explore(looping(vcpus), "TSO", canonical=canonical)
            taken = seconds(lambda vcpus=vcpus, c=canonical: explore(looping(vcpus), "TSO", canonical=c), 3)
            entry = {"vcpus": vcpus, "canonical": canonical, "states": found.states, "full_states": found.full_states}
            chart.append({**entry, "seconds": taken, "states_per_second": found.states / taken})
    return chart


if __name__ == "__main__":
    for row in rows():
        value = "" if row["peer_value"] is None else f"{row['peer_value']:14,.0f}"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:7.1f}x"
        print(
            f"{row['name']:66} {row['ours']:16,.3f} {row['unit']:9} {row['peer']:10} {value:14} {ratio:8} {row['target']} {row['met']}"
        )
    for entry in growth():
        print(entry)
