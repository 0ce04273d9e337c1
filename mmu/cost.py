"""What faults cost in time: five parts, one of them under the mmu-lock; held against published measurements.

A fault costs *exit* (leave the guest), *walk* (find the spte), *hold* (what is done under the lock), *work* (what is
done outside it) and *entry* (back to the guest). With several vCPUs there is a sixth part, the wait for the lock, which
:mod:`mmu.queueing` computes. Only the sum and the hold can be told from the published figures: exit, entry and walk are
chosen inside published ranges, and work is what remains.

:func:`fit` takes the parameters from a few figures (:data:`FITTED`) and :func:`checks` holds the model against all
others. :func:`forward` says what a fault rate and a saving would gain, :func:`rate_to_explain` which fault rate a gain
would need. All times are microseconds. Chapter 11.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmu import trials
from mmu.queueing import Outcome, bounds, repairman, simulate, uniform
from mmu.trials import PAGES, PER_FAULT
from mmu.workload import play, steady_state, with_policy

Floats = NDArray[np.float64]

EXIT = ENTRY = 0.25
"""Chosen: together 1,500 cycles at 3 GHz, inside the published 1,000 to 2,000 (a VMCALL round trip takes 1,529)."""

WALK = 0.10
"""Chosen: four cached loads of a walk and the checks around them; no published figure was found (inferred)."""

LAWS = ("fixed", "exponential")
"""How times vary: not at all, which gives the shortest waits, or as in the machine repairman's closed form."""


@dataclass(frozen=True)
class Fault:
    """What one fault costs, in microseconds, when nobody else is there."""

    hold: float = 0.0
    work: float = 0.0
    exit: float = EXIT
    walk: float = WALK
    entry: float = ENTRY

    @property
    def outside(self) -> float:
        """All that needs no lock."""
        return self.exit + self.walk + self.work + self.entry

    @property
    def total(self) -> float:
        """Exit to entry, without waiting."""
        return self.outside + self.hold


@dataclass(frozen=True)
class Model:
    """The fitted costs.

    Attributes:
        guest: what the guest itself needs between two faults of these benchmarks: one store to a fresh page.
        lock: a write-protect fault repaired under the lock.
        parallel: the same where the lock is held for reading, so that faults run side by side; what remains of the hold
            is the time for which they still exclude each other (a cache line that all of them write, inferred).
        fast: the fast path, which holds nothing.
    """

    guest: float
    lock: Fault
    parallel: Fault
    fast: Fault

    def cycle(self, fault: Fault | None, vcpus: int, law: str) -> float:
        """Microseconds from one page of a vCPU to its next when ``vcpus`` do the same; without a fault if None."""
        if fault is None:
            return self.guest
        think = self.guest + fault.outside
        if law == "fixed" or not fault.hold:
            return float(vcpus / bounds(vcpus, think, fault.hold or 1e-300)[1])
        return vcpus / repairman(vcpus, think, fault.hold)[0]

    def waiting(self, fault: Fault, vcpus: int, law: str) -> float:
        """Share of a vCPU's time that it waits for the lock."""
        return 1 - (self.guest + fault.total) / self.cycle(fault, vcpus, law)


# Fitting and testing -------------------------------------------------------------------------------------------------

SERIES: dict[str, str | None] = {
    "under the lock, 2021": "lock",
    "idle pages under the lock, 2021": "lock",
    "pages built anew, 2022": "lock",
    "huge pages split on fault, 2022": "parallel",
    "fast path, 2021": "fast",
    "fast path, legacy MMU, 2021": "fast",
    "idle pages, fast path, 2021": "fast",
    "huge pages split beforehand, 2022": None,
}
"""Which cost each series of :data:`mmu.trials.PER_FAULT` pays for a page; None: no fault at all."""

FITTED = {
    ("huge pages split beforehand, 2022", 2): "guest",
    ("under the lock, 2021", 64): "lock.hold",
    ("pages built anew, 2022", 2): "lock.work",
    ("huge pages split on fault, 2022", 64): "parallel.hold",
    ("huge pages split on fault, 2022", 2): "parallel.work",
    ("fast path, 2021", 64): "fast.work",
}
"""The figures that the parameters are fitted to: (series, vCPUs) to parameter. All others are for testing."""


def _figure(series: str, vcpus: int) -> float:
    return next(point.microseconds for point in PER_FAULT[series] if point.vcpus == vcpus)


def fit(law: str = "fixed") -> Model:
    """The parameters that reproduce the figures of :data:`FITTED`. Chapter 11.

    >>> model = fit()
    >>> round(model.lock.hold, 3), round(model.lock.total, 2), round(model.fast.total, 2)
    (0.211, 0.99, 0.97)
    """
    by_parameter = {parameter: _figure(*figure) for figure, parameter in FITTED.items()}
    guest = by_parameter["guest"]

    def locked(name: str) -> Fault:
        hold = by_parameter[f"{name}.hold"] / 64  # 64 vCPUs keep the lock busy all the time
        low, high = 0.0, by_parameter[f"{name}.work"]
        for _ in range(60):  # halve the interval: a longer work makes a longer cycle
            work = (low + high) / 2
            model = Model(guest, Fault(hold, work), Fault(), Fault())
            short = model.cycle(model.lock, 2, law) < by_parameter[f"{name}.work"]
            low, high = (work, high) if short else (low, work)
        return Fault(hold, low)

    fast = Fault(work=by_parameter["fast.work"] - guest - Fault().total)
    return Model(guest, locked("lock"), locked("parallel"), fast)


class Check(NamedTuple):
    """One published figure and what the model says of it, under both laws."""

    figure: str
    vcpus: int
    published: float
    fixed: float
    exponential: float
    unit: str  # "µs" a page, or "%"
    fitted: str  # the parameter that was fitted to it; empty where the figure is a test

    @property
    def off(self) -> float:
        """How far the nearer of the two laws, or what lies between them, is from the figure, as a share of it."""
        low, high = sorted((self.fixed, self.exponential))
        if low <= self.published <= high:
            return 0.0
        nearest = low if self.published < low else high
        return nearest / self.published - 1


def checks() -> list[Check]:
    """Every published figure that the model speaks of, those it was fitted to marked. Chapter 11."""
    models = {law: fit(law) for law in LAWS}
    out = []
    for series, cost in SERIES.items():
        for point in PER_FAULT[series]:
            said = [m.cycle(cost and getattr(m, cost), point.vcpus, law) for law, m in models.items()]
            fitted = FITTED.get((series, point.vcpus), "")
            out.append(Check(series, point.vcpus, point.microseconds, *said, "µs", fitted))
    waits = [100 * m.waiting(m.lock, 416, law) for law, m in models.items()]
    out.append(Check("waiting for the lock, 2020", 416, 100 * trials.WAITING_416, *waits, "%", ""))
    before, after = trials.POPULATE_96
    for name, vcpus, share in (
        ("parallel faults save, 2020", 416, trials.CUT_416),
        ("parallel faults save, 2021", 96, 1 - after / before),
    ):
        cuts = [100 * (1 - m.cycle(m.parallel, vcpus, law) / m.cycle(m.lock, vcpus, law)) for law, m in models.items()]
        out.append(Check(name, vcpus, 100 * share, *cuts, "%", ""))
    return out


# 2012, forward and backward ------------------------------------------------------------------------------------------


def forward(rate: ArrayLike, saved: ArrayLike) -> Floats:
    """The share of a vCPU's time that is gained when each of ``rate`` faults a second takes ``saved`` µs less."""
    return np.asarray(rate, dtype=np.float64) * np.asarray(saved, dtype=np.float64) * 1e-6


def rate_to_explain(gain: ArrayLike, saved: ArrayLike) -> Floats:
    """Faults a second that would explain a gain, if each takes ``saved`` µs less. Chapter 11.

    >>> round(float(rate_to_explain(0.0126, 1.0)))
    12600
    """
    return np.asarray(gain, dtype=np.float64) / np.asarray(saved, dtype=np.float64) * 1e6


def saving_to_explain(gain: ArrayLike, rate: ArrayLike) -> Floats:
    """What each of ``rate`` faults a second must save, in µs, to explain a gain."""
    return np.asarray(gain, dtype=np.float64) / np.asarray(rate, dtype=np.float64) * 1e6


def saved_a_page(pages: int = PAGES) -> list[float]:
    """µs saved a page in the re-spins' own test, for a guest of that many pages (1 GiB is inferred)."""
    return [(row.before[0] - row.after[0]) / pages * 1e6 for row in trials.RESUME]


MIGRATION_PAGES = 32 * 2**20 / 4096
"""Pages a second that QEMU of 2012 sends at most unless told otherwise (``MAX_THROTTLE``, 32 MiB a second).

Pre-copy sends each page that a fault has marked, so its faults cannot outnumber the pages that are sent.
"""


# Any setting ---------------------------------------------------------------------------------------------------------

SPREAD = 8  # replicas of each setting


class Price(NamedTuple):
    """What a setting costs under the lock and with the fast path: all arrays ``# (setting,)``."""

    per_access: Floats  # write-protect faults an access
    lock: Floats  # millions of accesses a second, all vCPUs together
    fast: Floats
    waiting: Floats  # share of the time that a vCPU waits for the lock


def faults_per_access(write_share: float, rng: np.random.Generator) -> float:
    """Write-protect faults an access of a settled guest under EPT, one dirty-log read every four accesses a page.

    Counted by ``mmu.vm``, not computed.
    """
    tally = play(steady_state(write_share=write_share), with_policy("EPT", "6.1"), rng)
    return float(tally.write_protect[1:-1].sum() / tally.accesses[1:-1].sum())


def price(
    vcpus: ArrayLike,
    write_share: ArrayLike,
    hold: ArrayLike,
    *,
    rng: np.random.Generator,
    faults: int = 2000,
    access: float | None = None,
) -> Price:
    """Run settings, all of them at the same time: fault rates by the machine, waits by the queue. Chapter 11.

    Args:
        vcpus, write_share, hold: the settings ``# (setting,)``; ``hold`` in µs replaces the fitted one.
        rng: where all randomness comes from.
        faults: faults counted in each of 8 replicas.
        access: µs of guest time an access; the fitted model's unless given.
    """
    model = fit()
    many, share, held = np.broadcast_arrays(
        np.atleast_1d(np.asarray(vcpus, dtype=np.int64)),
        np.asarray(write_share, dtype=np.float64),
        np.asarray(hold, dtype=np.float64),
    )
    shares, which = np.unique(share, return_inverse=True)
    rates = np.array([faults_per_access(float(each), rng) for each in shares], dtype=np.float64)
    per_access = rates[which.ravel()]
    spent = model.guest if access is None else access
    between = np.divide(
        spent, per_access, out=np.full(per_access.shape, np.inf, dtype=np.float64), where=per_access > 0
    )
    slow, fast = np.zeros(many.shape, dtype=np.float64), many / (between + model.fast.total)
    waiting = np.zeros(many.shape, dtype=np.float64)
    some = per_access > 0
    for count in np.unique(many[some]):
        mine = np.flatnonzero(some & (many == count))
        think = between[mine] + model.lock.outside
        out: Outcome = simulate(
            int(count), np.repeat(think, SPREAD), np.repeat(held[mine], SPREAD), rng=rng, faults=faults,
            hold_law=uniform,
        )  # fmt: skip
        slow[mine] = out.rate.reshape(-1, SPREAD).mean(axis=1)
        waiting[mine] = (out.wait / out.cycle(int(count))).reshape(-1, SPREAD).mean(axis=1)
    free = many / spent
    return Price(
        per_access,
        np.divide(slow, per_access, out=free.copy(), where=some),
        np.divide(fast, per_access, out=free.copy(), where=some),
        waiting,
    )
