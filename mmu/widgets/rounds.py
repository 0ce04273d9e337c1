"""The player of dirty-log rounds: how often the log is read against the faults that come of it (chapter 4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mmu import pfec, rounds, spte
from mmu.causes import CAUSES
from mmu.kernel import PATHS, SPURIOUS
from mmu.rounds import Rounds
from mmu.widgets.player import Player

INTERVALS = (32, 128, 512, 2048)
SHARES = (0.1, 0.5, 1.0)
EDITS = (0, 4)
SHOWN = 6  # rounds
LONGEST = 100_000  # accesses between two readings that a live run may have
MACHINES = ("NPT", "soft MMU")
PATTERNS = ("hatched", "solid", "dashed", "outlined", "dotted", "thick")
"""How the bars of one kind are drawn under the lock, in the order in which kinds are met there; green without it."""


def _code(result: Rounds) -> list[str]:
    return [pfec.PFEC.text(code) or "none" for code in pfec.handled(result.faults["code"]).tolist()]


def _entry(result: Rounds) -> list[str]:
    states = spte.classify(result.faults["old"], "6.1-npt", level=1)
    return [spte.STATES[state] for state in states.tolist()]


KINDS: Mapping[str, Callable[[Rounds], list[str]]] = {
    "cause": lambda result: [CAUSES[cause] for cause in result.caused.cause.tolist()],
    "code": _code,
    "entry met": _entry,
    "walk": lambda result: [
        "walk without the lock" if path <= SPURIOUS else "walk under the lock"
        for path in result.faults["path"].tolist()
    ],
    "path": lambda result: [PATHS[path] for path in result.faults["path"].tolist()],
}
"""What faults can be sorted by: cause, error code, the spte they met, how KVM walked to it, what became of them."""


def told(machine: str, result: Rounds) -> str:
    """The sentence on one machine's run."""
    count, fast = result.caused.cause.size, int(result.caused.fast.sum())
    return (
        f"{machine}: {count} faults in {result.dirty.size} rounds, {fast} repaired without the lock; "
        f"the log named {int(result.dirty.sum())} pages, and {int(result.written.sum())} were written."
    )


def asked(interval: int, share: float, edits: int) -> str:
    """The sentence on one setting."""
    tables = f"edits {edits} of its page-table entries a round" if edits else "leaves its page tables alone"
    return f"The log is read every {interval} accesses, {share:.0%} of them writes, and the guest {tables}."


def _count(result: Rounds, kind: NDArray[np.int64], kinds: int) -> list[list[list[int]]]:
    """For each round its ``[kind, repaired without the lock, faults]``, without those that have no fault."""
    table = np.zeros((result.dirty.size, kinds, 2), dtype=np.int64)
    np.add.at(table, (result.caused.epoch - 1, kind, result.caused.fast.astype(np.int64)), 1)
    return [[[k, fast, int(row[k, fast])] for k, fast in np.argwhere(row).tolist()] for row in table]


class RoundsPlayer(Player):
    """Choose how often the dirty log is read and how much is written; see each round's faults on several machines.

    Every setting is a run of the simulated guest, made here; with a kernel, any other one too. Chapter 4; with other
    kinds in chapters 2, 3, 5 and 8.

    Args:
        by: what faults are sorted by, a key of ``KINDS``.
        machines: keys of ``mmu.rounds.MACHINES``.
        intervals: accesses between two readings of the log.
        shares: shares of writes, 0 to 1.
        edits: page-table entries that the guest edits in a round.
    """

    module = "rounds"
    fields = (("accesses", 64), ("writes, %", 25), ("entries edited", 2))

    def __init__(
        self,
        by: str = "cause",
        machines: Sequence[str] = MACHINES,
        intervals: Sequence[int] = INTERVALS,
        shares: Sequence[float] = SHARES,
        edits: Sequence[int] = EDITS,
    ) -> None:
        self._by, self._machines = by, tuple(machines)
        settings = [(interval, share, edit) for interval in intervals for share in shares for edit in edits]
        kinds, runs = self._shown(settings)
        super().__init__(
            alt=f"{len(settings)} settings of how often the dirty log is read, how much is written and whether the "
            f"guest edits its page tables; for each, the faults of {SHOWN} rounds by {by} on {len(machines)} "
            f"machines ({', '.join(machines)}), and the pages that the log named.",
            data={
                "by": by,
                "choices": [
                    {"name": "accesses between two readings", "values": [str(interval) for interval in intervals]},
                    {"name": "writes among them", "values": [f"{share:.0%}" for share in shares]},
                    {"name": "table entries edited a round", "values": [str(edit) for edit in edits]},
                ],
                "kinds": kinds,
                "machines": list(machines),
                "most": rounds.PAGES,
                "runs": runs,
            },
        )  # fmt: skip

    def _shown(self, settings: Sequence[tuple[int, float, int]]) -> tuple[list, list]:
        """The kinds that faults have, and each setting's run in their numbers."""
        results = [
            [rounds.run(name, interval, share, edits=edit, rounds=SHOWN) for name in self._machines]
            for interval, share, edit in settings
        ]
        sorts = [[KINDS[self._by](result) for result in row] for row in results]
        kinds = list(dict.fromkeys(name for row in sorts for names in row for name in names))
        number = {name: place for place, name in enumerate(kinds)}
        shown = [
            [
                {
                    "rounds": _count(result, np.array([number[name] for name in names], dtype=np.int64), len(kinds)),
                    "dirty": result.dirty.tolist(),
                    "written": result.written.tolist(),
                    "told": told(machine, result),
                }
                for machine, result, names in zip(self._machines, row, sort, strict=True)
            ]
            for row, sort in zip(results, sorts, strict=True)
        ]
        parts = [part for row in shown for machine in row for round in machine["rounds"] for part in round]
        fast, slow = (
            sorted({kind for kind, without, _ in parts if bool(without) == wanted}) for wanted in (True, False)
        )
        described = [
            {
                "name": name,
                "pattern": PATTERNS[(slow.index(place) if place in slow else 0) % len(PATTERNS)],
                "fast": place in fast,
                "slow": place in slow,
            }
            for place, name in enumerate(kinds)
        ]
        runs = [{"asked": asked(*setting), "machines": row} for setting, row in zip(settings, shown, strict=True)]
        return described, runs

    def run(self, interval: float, percent: float, edits: float) -> dict[str, object]:
        """One setting, run now; writes are a percentage here.

        Raises:
            ValueError: a setting that :func:`mmu.rounds.scene` refuses, or one that would take minutes.
        """
        if not 1 <= interval <= LONGEST or interval % 1 or edits % 1 or edits < 0:
            raise ValueError(
                f"{interval:g} accesses, {edits:g} entries; expected whole numbers, 1 to {LONGEST:,} accesses"
            )
        kinds, (run,) = self._shown([(int(interval), percent / 100, int(edits))])
        return {"kinds": kinds, "run": run}
