"""The player of dirty-log rounds: how often the log is read against the faults that come of it (chapter 4)."""

from __future__ import annotations

from collections.abc import Sequence

from mmu import rounds
from mmu.causes import CAUSES, DIRTY_LOG
from mmu.widgets.player import Player

INTERVALS = (32, 128, 512, 2048)
SHARES = (0.1, 0.5, 1.0)
EDITS = (0, 4)
SHOWN = 6  # rounds
MACHINES = ("NPT", "soft MMU")


def told(machine: str, result: rounds.Rounds) -> str:
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


class RoundsPlayer(Player):
    """Choose how often the dirty log is read and how much is written; see each round's faults on NPT and the soft MMU.

    Every setting is a run of the simulated guest, made here. Chapter 4.

    Args:
        intervals: accesses between two readings of the log.
        shares: shares of writes, 0 to 1.
        edits: page-table entries that the guest edits in a round.
    """

    module = "rounds"

    def __init__(
        self,
        intervals: Sequence[int] = INTERVALS,
        shares: Sequence[float] = SHARES,
        edits: Sequence[int] = EDITS,
    ) -> None:
        runs, used = [], set()
        for interval in intervals:
            for share in shares:
                for edit in edits:
                    results = [rounds.run(name, interval, share, edits=edit, rounds=SHOWN) for name in MACHINES]
                    shown = []
                    for name, result in zip(MACHINES, results, strict=True):
                        table = result.table()
                        used |= set(table.any(axis=0).nonzero()[0].tolist())
                        fast = bool(result.caused.fast[result.caused.cause == DIRTY_LOG].any())
                        shown.append({
                            "rounds": table.tolist(), "dirty": result.dirty.tolist(),
                            "written": result.written.tolist(), "fast": fast, "told": told(name, result),
                        })  # fmt: skip
                    runs.append({"asked": asked(interval, share, edit), "machines": shown})
        columns = sorted(used)
        for setting in runs:
            for machine in setting["machines"]:
                machine["rounds"] = [[row[cause] for cause in columns] for row in machine["rounds"]]
        super().__init__(
            alt=f"Three choices, how often the dirty log is read, how much is written and whether the guest edits its "
            f"page tables, make {len(runs)} settings; for each, the faults of {SHOWN} rounds by cause on NPT and on "
            "the soft MMU, and the pages that the log named.",
            data={
                "choices": [
                    {"name": "accesses between two readings", "values": [str(interval) for interval in intervals]},
                    {"name": "writes among them", "values": [f"{share:.0%}" for share in shares]},
                    {"name": "table entries edited a round", "values": [str(edit) for edit in edits]},
                ],
                "causes": [CAUSES[cause] for cause in columns],
                "log": columns.index(int(DIRTY_LOG)) if DIRTY_LOG in columns else -1,
                "machines": list(MACHINES),
                "most": rounds.PAGES,
                "runs": runs,
            },
        )
