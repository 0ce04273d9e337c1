"""How many reader walks a second the replica simulation of chapter 5 draws. Run by ``make bench``, or alone.

Here the target is a speed, in million walks a second, and no ratio.
"""

from __future__ import annotations

import random
import statistics
import time

import numpy as np

from mmu.readers import Readers, Times, stalls

VCPUS = (1, 64, 512)
WALKS = 10_000_000
CYCLES = 40  # walks of each vCPU in one replica
SAMPLE = 100_000  # plain Python draws as many, and is scaled
TARGET = 10.0


def plain(readers: Readers, replicas: int, span: float, seed: int) -> list[float]:
    """What a reclaimer waits in each replica, one walk at a time."""
    draw = random.Random(seed).expovariate
    uniform = random.Random(seed + 1).random
    walk, gap, waits = 1 / readers.walk.mean, 1 / readers.gap.mean, []
    for _ in range(replicas):
        at, wait = (0.5 + 0.5 * uniform()) * span, 0.0
        for _ in range(readers.vcpus):
            end = -uniform() * readers.cycle
            while end <= span:
                begin = end + draw(gap)
                end = begin + draw(walk)
                if begin <= at < end:
                    wait = max(wait, end - at)
        waits.append(wait)
    return waits


def rows(walks: int = WALKS, runs: int = 5) -> list[dict[str, object]]:
    """A row for each number of vCPUs, after both sides' mean waits have come out alike."""
    found = []
    for vcpus in VCPUS:
        readers = Readers(vcpus, Times(400.0), Times(9_600.0))
        span = CYCLES * readers.cycle
        replicas, few = walks // (vcpus * CYCLES), max(SAMPLE // (vcpus * CYCLES), 2)
        ours, peer, theirs_mean = [], [], []
        for run in range(runs):
            start = time.perf_counter()
            waits = stalls(np.random.default_rng(run), readers, replicas, span)
            ours.append(replicas * vcpus * CYCLES / (time.perf_counter() - start))
            start = time.perf_counter()
            theirs_mean += plain(readers, few, span, run)
            peer.append(few * vcpus * CYCLES / (time.perf_counter() - start))
        spread = float(waits.std()) * (1 / len(theirs_mean) + 1 / replicas) ** 0.5
        if abs(float(waits.mean()) - statistics.mean(theirs_mean)) > 4 * spread:
            raise AssertionError(f"the mean waits with {vcpus} vCPUs differ: a speed would mean nothing")
        mine, theirs = 1e-6 * statistics.median(ours), 1e-6 * statistics.median(peer)
        found.append(
            {
                "name": f"walks of {vcpus} vCPUs in {replicas:,} replicas, each met by a reclaimer (target in walks)",
                "ours": round(mine, 2),
                "peer": "plain Python, one walk at a time",
                "peer_value": round(theirs, 3),
                "unit": "million walks/s",
                "ratio": round(mine / theirs, 1),
                "target": TARGET,
                "met": mine >= TARGET,
            }
        )
    return found


if __name__ == "__main__":
    for row in rows():
        print(row)
