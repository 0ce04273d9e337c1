"""How fast a kernel trace is read, and in how much memory, against a plain reader. Run by ``make bench``, or alone."""

from __future__ import annotations

import gzip
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mmu import trace
from tests import plain_trace

RECORDED = sorted((Path(__file__).parents[1] / "data" / "kvm-traces").glob("*.trace.gz"))
SIZE = 200_000_000
TARGET = 300_000.0
FLAT = 1.2  # at most this much more memory for eight times as much text

_ALONE = """
import sys
from mmu import trace
lines = sum(piece.lines for piece in trace.chunks(sys.argv[1]))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def repeated(size: int, path: Path) -> bytes:
    """Write a trace of about ``size`` bytes, made of whole recorded ones over and over; return one round of it."""
    once = b"".join(gzip.decompress(recorded.read_bytes()) for recorded in RECORDED)
    with open(path, "wb") as out:
        for _ in range(max(size // len(once), 1)):
            out.write(once)
    return once


def peak(path: Path) -> float:
    """Megabytes that a fresh process takes at most to read this trace in chunks (Linux's VmHWM)."""
    done = subprocess.run([sys.executable, "-c", _ALONE, path], capture_output=True, text=True, check=True)
    return int(done.stdout) / 1024


def peak_row(name: str, size: int, much: float, little: float) -> dict[str, object]:
    """The row on memory: megabytes taken for ``size`` bytes, beside those for an eighth of them."""
    return {
        "name": f"{name}, peak memory for {size / 1e6:.0f} MB",
        "ours": round(much, 1),
        "peer": f"the same for {size / 8e6:.0f} MB",
        "peer_value": round(little, 1),
        "unit": "MB",
        "ratio": round(much / little, 2),
        "target": FLAT,
        "met": much <= FLAT * little,
    }


def rows(size: int = SIZE, runs: int = 3) -> list[dict[str, object]]:
    """Two rows, speed and memory, after both readers have found the same events at the same lines."""
    with tempfile.TemporaryDirectory() as folder:
        large, small = Path(folder, "large"), Path(folder, "small")
        once = repeated(size, large)
        repeated(size // 8, small)
        found = trace.read(once).order()
        plain = plain_trace.read(once.decode())
        if [(line, event.decode()) for line, event, _ in found.tolist()] != [(line, event) for line, event, _ in plain]:
            raise AssertionError("the two readers find different events: a speed would mean nothing")
        ours, theirs = [], []
        for _ in range(runs):
            start = time.perf_counter()
            lines = sum(piece.lines for piece in trace.chunks(large))
            ours.append(lines / (time.perf_counter() - start))
            start = time.perf_counter()
            plain_trace.read(once.decode())
            theirs.append(once.count(b"\n") / (time.perf_counter() - start))
        mine, peer = statistics.median(ours), statistics.median(theirs)
        much, little = peak(large), peak(small)
    return [
        {
            "name": f"trace reading, {lines:,} lines ({size / 1e6:.0f} MB)",
            "ours": round(mine),
            "peer": "plain Python, one regular expression a line",
            "peer_value": round(peer),
            "unit": "lines/s",
            "ratio": round(mine / peer, 1),
            "target": TARGET,
            "met": mine >= TARGET,
        },
        peak_row("trace reading", size, much, little),
    ]


if __name__ == "__main__":
    for row in rows():
        print(row)
