"""The mmu-lock as a queue: vCPUs that fault, wait their turn, hold the lock, and come back with the next fault.

Each vCPU goes round: it *thinks* (the guest runs, then the parts of a fault that need no lock), arrives at the lock,
waits until everyone who arrived before it is through, *holds* the lock, and thinks again. Queueing theory calls this
the machine repairman: N machines, one repairman. A fault of the fast path goes beside the queue.

:func:`simulate` advances thousands of replicas and whole grids of settings together: one step serves the next fault
of every row. It is exact for any law of times: the next to be served is always the earliest arrival of the row, since
whoever is served comes back later. :func:`simulate_memoryless` is the special case in which all laws are exponential,
and :func:`repairman` its closed form. Times have no unit here. Chapter 11.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Law = Callable[[Generator, tuple[int, int]], Floats]
"""Draws times of mean 1, of the shape asked for; a setting scales them."""

STEPS = 64  # steps whose times are drawn at once
TILE = 1 << 16  # arrival times that advance together: 512 KiB, which stay in a core's own cache


def exponential(rng: Generator, shape: tuple[int, int]) -> Floats:
    """Memoryless times."""
    return rng.standard_exponential(shape, dtype=np.float64)


def fixed(rng: Generator, shape: tuple[int, int]) -> Floats:
    """Always the same time."""
    return np.ones(shape, dtype=np.float64)


def uniform(rng: Generator, shape: tuple[int, int]) -> Floats:
    """Anything from none to twice the mean."""
    return 2 * rng.random(shape, dtype=np.float64)


class Outcome(NamedTuple):
    """What a simulation saw of each row after its warm-up: all arrays ``# (row,)``."""

    faults: NDArray[np.int64]  # faults counted
    rate: Floats  # faults of all vCPUs together in one unit of time
    wait: Floats  # mean time in the queue, over all faults; those of the fast path wait 0
    busy: Floats  # share of the time in which the lock is held

    def cycle(self, vcpus: ArrayLike) -> Floats:
        """Time from one fault of a vCPU to its next ``# (row,)``."""
        return np.asarray(vcpus, dtype=np.float64) / self.rate


def simulate(
    vcpus: ArrayLike,
    think: ArrayLike,
    hold: ArrayLike,
    *,
    rng: Generator,
    faults: int,
    warmup: int | None = None,
    fast: ArrayLike = 0.0,
    think_law: Law = exponential,
    hold_law: Law = exponential,
) -> Outcome:
    """Let vCPUs queue for one lock, first come, first served. Chapter 11.

    Args:
        vcpus: how many there are, 1 or more; this and the next two, and ``fast``, broadcast to ``# (row,)``.
        think: mean time from leaving the lock to asking for it again.
        hold: mean time for which the lock is held.
        rng: where all randomness comes from.
        faults: how many faults each row counts.
        warmup: how many it serves before that; as many as ten for each vCPU unless given.
        fast: share of the faults that need no lock.
        think_law, hold_law: how times vary about their mean.

    Raises:
        ValueError: a setting is out of its range.

    >>> out = simulate([1, 8], 3.0, 1.0, rng=np.random.default_rng(0), faults=100, think_law=fixed, hold_law=fixed)
    >>> out.rate.round(3).tolist(), out.wait.round(3).tolist()
    ([0.25, 1.0], [0.0, 4.0])
    """
    rows = [np.asarray(part) for part in (vcpus, think, hold, fast)]
    shape = np.broadcast_shapes((1,), *(row.shape for row in rows))
    many = np.broadcast_to(rows[0], shape).astype(np.int64)
    means, holds, share = (np.broadcast_to(row, shape).astype(np.float64) for row in rows[1:])
    if many.min(initial=1) < 1 or min(means.min(), holds.min()) < 0 or not (0 <= share.min() <= share.max() <= 1):
        raise ValueError("a setting is out of range; expected vcpus of 1 or more, times not negative, fast of 0 to 1")
    skip = 10 * int(many.max()) if warmup is None else warmup
    if faults < 1 or skip < 0:
        raise ValueError(f"faults is {faults} and warmup {skip}; expected at least 1 and 0")
    tile = max(1, TILE // int(many.max()))
    parts = [
        _advance(many[at], means[at], holds[at], share[at], rng, faults, skip, think_law, hold_law)
        for at in (slice(start, start + tile) for start in range(0, many.size, tile))
    ]
    return Outcome(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _advance(
    vcpus: NDArray[np.int64], think: Floats, hold: Floats, fast: Floats, rng: Generator, faults: int, skip: int,
    think_law: Law, hold_law: Law,
) -> Outcome:  # fmt: skip
    """Serve ``skip + faults`` faults of every row, one of each row at a step."""
    rows, columns = vcpus.size, int(vcpus.max())
    arrival = think[:, None] * think_law(rng, (rows, columns))  # (row, vcpu)
    arrival[np.arange(columns, dtype=np.int64) >= vcpus[:, None]] = np.inf  # vCPUs that the row does not have
    flat = arrival.reshape(-1)
    base = np.arange(rows, dtype=np.int64) * columns
    free, begin = np.zeros(rows, dtype=np.float64), np.zeros(rows, dtype=np.float64)
    waited, held = np.zeros(rows, dtype=np.float64), np.zeros(rows, dtype=np.float64)
    some_fast, now = bool(fast.any()), begin
    for step in range(skip + faults):
        place = step % STEPS
        if not place:
            thinks, holds = think_law(rng, (STEPS, rows)) * think, hold_law(rng, (STEPS, rows)) * hold
            if some_fast:
                beside = rng.random((STEPS, rows), dtype=np.float64) < fast
                holds[beside] = 0
        if step == skip:
            begin, waited[:], held[:] = now, 0, 0
        who = arrival.argmin(axis=1) + base  # (row,): the next in line
        now = flat[who]
        start = np.maximum(now, free)
        done = start + holds[place]
        if some_fast:
            start = np.where(beside[place], now, start)
            free = np.where(beside[place], free, done)
            done = np.where(beside[place], now, done)
        else:
            free = done
        waited += start - now
        held += holds[place]
        flat[who] = done + thinks[place]
    span = now - begin
    return Outcome(np.full(rows, faults, dtype=np.int64), faults / span, waited / faults, held / span)


def simulate_memoryless(
    vcpus: ArrayLike, think: ArrayLike, hold: ArrayLike, *, rng: Generator, events: int
) -> tuple[Floats, Floats]:
    """The special case of exponential times: only the number of vCPUs at the lock matters. Chapter 11.

    Each event is an arrival or a departure, so two events are one fault. Returns the rate of faults and the share of
    the time in which the lock is held, both ``# (row,)``. The rows start with nobody at the lock.
    """
    many, means, holds = np.broadcast_arrays(*(np.asarray(part, dtype=np.float64) for part in (vcpus, think, hold)))
    many, up, down = np.atleast_1d(many), 1 / np.atleast_1d(means), 1 / np.atleast_1d(holds)
    here = np.zeros(many.shape, dtype=np.float64)  # vCPUs at the lock
    time, busy, served = (np.zeros(many.shape, dtype=np.float64) for _ in range(3))
    for step in range(events):
        place = step % STEPS
        if not place:
            spans = rng.standard_exponential((STEPS, many.size), dtype=np.float64)
            throws = rng.random((STEPS, many.size), dtype=np.float64)
        held = here > 0
        arriving = (many - here) * up
        total = arriving + held * down
        span = spans[place] / total
        time += span
        busy += span * held
        leaves = throws[place] * total >= arriving
        served += leaves
        here += 1 - 2 * leaves.astype(np.float64)
    return served / time, busy / time


def repairman(vcpus: int, think: float, hold: float) -> tuple[float, float]:
    """The closed form for exponential holds, M/M/1//N: rate of faults, and mean wait in the queue. Chapter 11.

    With k vCPUs at the lock, each state's weight is that of k - 1 times ``(N - k + 1) * hold / think``. The law of the
    thinking does not matter, only its mean.

    >>> rate, wait = repairman(1, 3.0, 1.0)
    >>> round(rate, 12), round(wait, 12)
    (0.25, 0.0)
    """
    step = np.arange(vcpus, 0, -1, dtype=np.float64) * hold / think
    weight = np.concatenate([[0.0], np.cumsum(np.log(step))])  # (k,) logarithms, as products of hundreds overflow
    idle = 1 / np.exp(weight - weight.max()).sum() * np.exp(-weight.max())
    rate = (1 - idle) / hold
    return float(rate), float(vcpus / rate - think - hold)


def bounds(vcpus: ArrayLike, think: ArrayLike, hold: ArrayLike) -> tuple[Floats, Floats]:
    """The least and the greatest rate of faults that any law of times allows. Chapter 11.

    At best nobody ever waits, until the lock is never free; at worst each fault waits for all others. With fixed times
    the greatest is reached.
    """
    many, z, s = (np.asarray(part, dtype=np.float64) for part in (vcpus, think, hold))
    return many / (z + many * s), np.minimum(many / (z + s), 1 / s)
