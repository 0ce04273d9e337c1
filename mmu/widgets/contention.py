"""The player of contention: what the lock costs, and the fast path gains, at any setting (chapter 11)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from mmu.cost import price
from mmu.widgets.player import Player

VCPUS = (1, 2, 4, 8, 16, 32, 64, 128, 254)
WRITE_SHARES = (0.0, 0.01, 0.1, 0.5, 1.0)
HOLDS = (0.05, 0.1, 0.2, 0.5, 1.0)
MOST = 1024  # vCPUs of a live run


class ContentionPlayer(Player):
    """Choose vCPUs, the share of writes and how long the lock is held; see the accesses a second with and without it.

    Each setting is a run of the core: ``mmu.vm`` counts the faults, :mod:`mmu.queueing` lets them wait. With a
    kernel, any other setting is one too. Chapter 11.

    Args:
        vcpus, write_shares, holds: what the three sliders offer, ascending; ``holds`` in µs.
        start: which of each is shown first; the middle ones unless given.
        seed: of the runs.
        faults: how many each replica counts.

    Raises:
        ValueError: a list is empty or does not ascend.
    """

    module = "contention"
    fields = (("vCPUs", 48), ("writes, %", 30), ("lock held, µs", 0.15))

    def __init__(
        self,
        vcpus: Sequence[int] = VCPUS,
        write_shares: Sequence[float] = WRITE_SHARES,
        holds: Sequence[float] = HOLDS,
        *,
        start: tuple[int, int, int] | None = None,
        seed: int = 2012,
        faults: int = 1000,
    ) -> None:
        lists = {"vcpus": vcpus, "write_shares": write_shares, "holds": holds}
        for name, values in lists.items():
            if not len(values) or any(b <= a for a, b in pairwise(values)):
                raise ValueError(f"{name} is {list(values)}; expected at least one value, each greater than the last")
        sizes = [len(values) for values in lists.values()]
        self._runs = {"seed": seed, "faults": faults}
        columns = np.meshgrid(*(np.asarray(values, dtype=np.float64) for values in lists.values()), indexing="ij")
        states = self._states(*(column.ravel() for column in columns))  # (setting,)
        first = start or tuple(size // 2 for size in sizes)
        at = int(np.ravel_multi_index(first, sizes))
        super().__init__(
            alt=f"Three sliders: vCPUs ({_ends(vcpus)}), share of writes, and how long the lock is held. Two bars "
            f"compare the accesses a second under the lock and with the fast path. At first: {states[at]['said']}",
            data={
                "sliders": [
                    {"name": "vCPUs", "key": "← →", "values": [f"{value}" for value in vcpus]},
                    {"name": "writes", "key": "W", "values": [f"{100 * value:g} %" for value in write_shares]},
                    {"name": "lock held", "key": "↑ ↓", "values": [f"{value:g} µs" for value in holds]},
                ],
                "states": states,
                "start": at,
            },
        )

    def _states(self, *settings: NDArray[np.float64]) -> list[dict[str, object]]:
        settings = settings[0].astype(np.int64), *settings[1:]
        found = price(*settings, rng=np.random.default_rng(self._runs["seed"]), faults=self._runs["faults"])
        return [state(*row) for row in zip(*(column.tolist() for column in (*settings, *found)), strict=True)]

    def run(self, vcpus: float, percent: float, hold: float) -> dict[str, object]:
        """One setting, run now; writes are a percentage here.

        Raises:
            ValueError: a setting that no machine has.
        """
        if not (1 <= vcpus <= MOST and vcpus == int(vcpus)):
            raise ValueError(f"vCPUs is {vcpus:g}; expected a whole number from 1 to {MOST}")
        if not 0 <= percent <= 100:
            raise ValueError(f"writes is {percent:g} %; expected 0 to 100")
        if not 0 < hold <= 1000:
            raise ValueError(f"the lock is held for {hold:g} µs; expected more than 0, and at most 1,000")
        values = (vcpus, percent / 100, hold)
        return {"state": self._states(*(np.array([value], dtype=np.float64) for value in values))[0]}


def _ends(values: Sequence[int]) -> str:
    return f"{values[0]} to {values[-1]}"


def state(
    vcpus: int, share: float, hold: float, per_access: float, lock: float, fast: float, waiting: float
) -> dict[str, object]:
    """One setting as the player shows it: the two bars, and the sentence under them.

    >>> state(64, 0.5, 0.2, 0.25, 20.0, 80.0, 0.75)["said"][:62]
    '64 vCPUs, 50 % writes, the lock held for 0.2 µs a fault: under'
    """
    who = "1 vCPU" if vcpus == 1 else f"{vcpus} vCPUs"
    said = f"{who}, {100 * share:g} % writes, the lock held for {hold:g} µs a fault: "
    if per_access:
        said += (
            f"under the lock {lock:.1f} million accesses a second, with the fast path {fast:.1f}, "
            f"{fast / lock:.2f} times as many. Of {1 / per_access:.1f} accesses one faults; "
            f"under the lock a vCPU waits for {100 * waiting:.0f} % of its time."
        )
        if fast < lock:
            said += " Held so briefly, the fault under the lock is cheaper in itself than the measured fast one."
    else:
        said += f"nobody writes, nobody faults, {lock:.1f} million accesses a second either way."
    return {"said": said, "lock": round(lock, 2), "fast": round(fast, 2), "waiting": round(100 * waiting, 1)}
