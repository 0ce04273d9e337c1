"""How fast the lock's queue is simulated, against a plain event loop. Run by ``make bench``, or alone."""

from __future__ import annotations

import heapq
import statistics
import time

import numpy as np

from mmu.queueing import repairman, simulate, simulate_memoryless, uniform

VCPUS = 64
VCPU_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 254)  # for how the cost grows
REPLICAS, FAULTS, WARMUP = 4096, 2000, 700
THINK, HOLD = 100.0, 1.0  # near the knee: the lock is held about two thirds of the time
TARGET = 8e6  # fault events a second, all replicas together


def plain(faults: int, seed: int) -> float:
    """One replica in plain Python: a heap of arrivals, uniform holds; returns the rate after the warm-up."""
    draw = np.random.default_rng(seed)
    thinks = draw.exponential(THINK, VCPUS + WARMUP + faults).tolist()
    holds = draw.uniform(0, 2 * HOLD, WARMUP + faults).tolist()
    coming = [thinks.pop() for _ in range(VCPUS)]
    heapq.heapify(coming)
    free = begin = 0.0
    for step in range(WARMUP + faults):
        now = coming[0]
        if step == WARMUP:
            begin = now
        free = max(now, free) + holds[step]
        heapq.heapreplace(coming, free + thinks[step])
    return faults / (now - begin)


def rows(replicas: int = REPLICAS, faults: int = FAULTS, runs: int = 3) -> list[dict[str, object]]:
    """Arbitrary times with a queue, and the memoryless special case; both have shown the right rate before."""
    rng = np.random.default_rng(2012)
    many = np.full(replicas, VCPUS, dtype=np.int64)
    general, special, peer = [], [], []
    for run in range(runs):
        start = time.perf_counter()
        out = simulate(many, THINK, HOLD, rng=rng, faults=faults, warmup=WARMUP, hold_law=uniform)
        general.append(replicas * (faults + WARMUP) / (time.perf_counter() - start))
        start = time.perf_counter()
        theirs = plain(30 * faults, run)
        peer.append((30 * faults + WARMUP) / (time.perf_counter() - start))
        if abs(out.rate.mean() / theirs - 1) > 0.05:
            raise AssertionError(f"rates differ: {out.rate.mean()} against {theirs}; a speed would mean nothing")
        start = time.perf_counter()
        rate, _ = simulate_memoryless(many, THINK, HOLD, rng=rng, events=2 * faults)
        special.append(replicas * faults / (time.perf_counter() - start))
        right, _ = repairman(VCPUS, THINK, HOLD)
        if abs(rate.mean() / right - 1) > 0.05:
            raise AssertionError(f"rates differ: {rate.mean()} against {right}; a speed would mean nothing")
    theirs = statistics.median(peer)
    names = [f"FIFO lock, arbitrary times, {VCPUS} vCPUs", f"the memoryless special case, {VCPUS} vCPUs"]
    return [
        {
            "name": f"{name}, {replicas:,} replicas",
            "ours": round(mine / 1e6, 2),
            "peer": "plain Python, a heap of arrivals",
            "peer_value": round(theirs / 1e6, 2),
            "unit": "million faults/s",
            "ratio": round(mine / theirs, 1),
            "target": f"at least {TARGET / 1e6:.0f} million faults/s",
            "met": mine >= TARGET,
        }
        for name, mine in zip(names, map(statistics.median, (general, special)), strict=True)
    ]


def growth() -> dict[str, dict[str, object]]:
    """What a fault in the lock's queue costs by the number of vCPUs."""
    rng, line = np.random.default_rng(2012), []
    for vcpus in VCPU_COUNTS:
        many = np.full(1024, vcpus, dtype=np.int64)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            simulate(many, THINK, HOLD, rng=rng, faults=1000, warmup=0, hold_law=uniform)
            times.append(time.perf_counter() - start)
        line.append((vcpus, 1e9 * statistics.median(times) / (1024 * 1000)))
    panel = {"x": "vCPUs", "y": "ns for a fault in the queue", "lines": {"the package": line}}
    return {"queue": {"panels": [panel], "marks": {}}}


if __name__ == "__main__":
    for row in rows():
        print(row)
