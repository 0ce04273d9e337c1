"""How long a report on a gigabyte of trace takes, and in how much memory. Run by ``make bench``, or alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests import plain_trace
from tests.bench.trace import peak_row, repeated

SIZE = 1_000_000_000
TARGET = 120.0  # seconds


def reported(path: Path) -> tuple[dict[str, object], float, float]:
    """``report --json --html`` of a trace in a fresh process: what it says, seconds, and megabytes at most."""
    with tempfile.TemporaryFile() as out:
        start = time.perf_counter()
        command = [sys.executable, "-m", "mmu", "report", "--json", "--html", str(path) + ".html", str(path)]
        child = subprocess.Popen(command, stdout=out)
        _, status, used = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise AssertionError(f"report ended with exit code {child.returncode}, expected 0")
        out.seek(0)
        return json.load(out), seconds, used.ru_maxrss / 1024


def rows(size: int = SIZE) -> list[dict[str, object]]:
    """Two rows, time and memory, after the report has counted the events that a plain reader finds."""
    with tempfile.TemporaryDirectory() as folder:
        large, small = Path(folder, "large"), Path(folder, "small")
        once = repeated(size, large).decode()
        repeated(size // 8, small)
        start = time.perf_counter()
        plain = plain_trace.read(once)
        peer = time.perf_counter() - start
        rounds = large.stat().st_size // len(once)
        _, _, little = reported(small)
        found, seconds, much = reported(large)
        if found["events"] != {event: n * rounds for event, n in Counter(event for _, event, *_ in plain).items()}:
            raise AssertionError("the report counts other events than the plain reader: its time would mean nothing")
    return [
        {
            "name": f"trace report with --html, {found['lines']:,} lines ({size / 1e6:.0f} MB)",
            "ours": round(seconds, 1),
            "peer": "plain Python, which only finds the events",
            "peer_value": round(peer * rounds, 1),
            "unit": "s",
            "ratio": round(peer * rounds / seconds, 2),
            "target": TARGET,
            "met": seconds <= TARGET,
        },
        peak_row("trace report", size, much, little),
    ]


if __name__ == "__main__":
    for row in rows():
        print(row)
