"""How fast sptes are decoded to named fields, against plain Python. Run by ``make bench``, or alone."""

from __future__ import annotations

import statistics
import time

import numpy as np

from mmu import spte

ENTRIES = 10_000_000
SAMPLE = 100_000  # plain Python is timed on as many and scaled: all of them would take it about a minute
TARGET = 50.0
STATE_OF = {0b111: spte.WRITABLE, 0b110: spte.DIRTY_LOG, 0b100: spte.GUEST_TABLE, 0b000: spte.HOST_READ_ONLY}


def entries(count: int) -> np.ndarray:
    """Sptes of Linux 6.1 under NPT in the mix of a guest with a dirty log: leaves of every kind, tables, MMIO, none."""
    rng = np.random.default_rng(2012)
    low = np.array([0xE67, 0xE65, 0x825, 0xA21, 0x827, 0, 0x5A0, 1 << 51 | 0x27], dtype=np.uint64)
    kind = rng.choice(low, count, p=[0.5, 0.3, 0.05, 0.02, 0.05, 0.05, 0.01, 0.02])
    mapped = (kind & np.uint64(1)) != 0
    pfn = rng.integers(0, 1 << 36, count, dtype=np.uint64) << np.uint64(12)
    return kind | np.where(mapped, pfn, np.uint64(0))


def plain(word: int) -> dict[str, int]:
    """One spte of 6.1-npt to named fields and state, as one writes it in plain Python."""
    present = word >> 11 & 1
    if word == 0:
        state = spte.NONE
    elif word == 0x5A0:
        state = spte.REMOVED
    elif not present:
        state = spte.MMIO if word >> 51 & 1 and word & 1 else spte.UNKNOWN
    elif not word & 1:
        state = spte.ILLEGAL
    else:
        three = word >> 9 & 1, word >> 10 & 1, word >> 1 & 1
        if three == (0, 0, 1) and not word & 0xC0:
            state = spte.NON_LEAF
        else:
            state = STATE_OF.get(three[0] << 2 | three[1] << 1 | three[2], spte.ILLEGAL)
    return {
        "P": word & 1,
        "W": word >> 1 & 1,
        "U": word >> 2 & 1,
        "PWT": word >> 3 & 1,
        "PCD": word >> 4 & 1,
        "A": word >> 5 & 1,
        "D": word >> 6 & 1,
        "PS": word >> 7 & 1,
        "G": word >> 8 & 1,
        "HOST_W": word >> 9 & 1,
        "MMU_W": word >> 10 & 1,
        "MMU_P": present,
        "PFN": word >> 12 & (1 << 40) - 1,
        "AD_KIND": word >> 52 & 3,
        "NX": word >> 63,
        "state": state,
    }


def rows(count: int = ENTRIES, runs: int = 5) -> list[dict[str, object]]:
    """One row: the median of ``runs`` runs of each side, after both have given the same fields for the same sptes."""
    words = entries(count)
    sample = words[:SAMPLE].tolist()
    columns = spte.decode(words)
    expected = [plain(word) for word in sample]
    for name, column in columns.items():
        if column[:SAMPLE].tolist() != [entry[name] for entry in expected]:
            raise AssertionError(f"field {name} differs between the two sides: a speed would mean nothing")
    ours, peer = [], []
    for _ in range(runs):
        start = time.perf_counter()
        columns = spte.decode(words)
        ours.append((time.perf_counter() - start) / count)
        start = time.perf_counter()
        expected = [plain(word) for word in sample]
        peer.append((time.perf_counter() - start) / len(sample))
    mine, theirs = 1e-6 / statistics.median(ours), 1e-6 / statistics.median(peer)
    return [
        {
            "name": f"spte decode of {count:,} entries to {len(columns)} named fields",
            "ours": round(mine, 2),
            "peer": "plain Python, one entry at a time",
            "peer_value": round(theirs, 3),
            "unit": "million entries/s",
            "ratio": round(mine / theirs, 1),
            "target": TARGET,
            "met": mine / theirs >= TARGET,
        }
    ]


if __name__ == "__main__":
    for row in rows():
        print(row)
