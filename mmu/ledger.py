"""What was judged and what was found: rules with their sources, findings with their lines, what was not applied.

The one idea: a rule is tried on many occasions and fails on few. So the ledger counts occasions and failures of each
rule; a rule that a trace breaks again and again says more of the trace (events were filtered out, several guests are
in it) than of the kernel, and is reported as not applied instead. :mod:`mmu.conform` fills it; chapter 13.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

LISTED = 200  # findings of one rule that are kept with their words
KEPT = 1 << 16  # findings of one rule whose lines are kept
WINDOW = np.dtype([("first", np.int64), ("last", np.int64)])


@dataclass(frozen=True)
class Rule:
    """What a healthy kernel's trace obeys, and where that is written.

    Attributes:
        name: the rule, as a finding quotes it.
        source: the kernel's function, or what else is known to say so.
        needs: words that say on what it depends. ``layout``: sptes are decoded. ``history``: what went before counts,
            so a loss of events in between excuses. ``since``: likewise, however often it fails. ``order``: likewise,
            of one task. ``seldom``: a trace that breaks the rule often has a kernel that the rule does not know.
    """

    name: str
    source: str
    needs: str = ""


@dataclass
class _Record:
    occasions: int = 0
    failures: int = 0
    blamed: list[NDArray[np.int64]] = field(default_factory=list)  # (finding, 3): blamed line, first, last
    listed: list[tuple[tuple[int, ...], str]] = field(default_factory=list)


class Ledger:
    """Collects what rules find; :meth:`findings` at the end."""

    def __init__(self) -> None:
        self._records: dict[Rule, _Record] = {}
        self.excused: dict[Rule, str] = {}  # rules that cannot be applied, and why

    def judge(
        self,
        rule: Rule,
        occasions: int,
        bad: NDArray[Any],
        lines: tuple[NDArray[np.int64], ...],
        say: Callable[[int], str],
    ) -> None:
        """Count one rule's occasions, and keep its failures.

        Args:
            rule: the rule.
            occasions: how often it was tried.
            bad: the positions where it failed.
            lines: columns of line numbers, indexed by position; the last is the line that is to blame.
            say: words for a position.
        """
        record = self._records.setdefault(rule, _Record())
        record.occasions += occasions
        if not len(bad):
            return
        record.failures += len(bad)
        columns = np.stack([column[bad] for column in lines], axis=1).astype(np.int64)
        room = KEPT - sum(map(len, record.blamed))
        if room > 0:
            known = np.where(columns > 0, columns, columns[:, -1:])
            record.blamed.append(np.stack([columns[:, -1], known.min(axis=1), known.max(axis=1)], axis=1)[:room])
        for i in range(min(len(bad), LISTED - len(record.listed))):
            numbers = tuple(dict.fromkeys(int(line) for line in columns[i] if line > 0))
            record.listed.append((tuple(sorted(numbers)), say(int(bad[i]))))

    def close(self, lost: NDArray[Any], events: int) -> dict[str, Any]:
        """What was found, ready for JSON.

        Args:
            lost: :data:`WINDOW` records: between these lines a CPU lost events.
            events: how many events there were.

        Returns:
            ``findings`` (lines, rule, source, what), ``not_applied`` (rule, reason), ``agree`` and ``of`` (events).
        """
        findings, not_applied = [], []
        for rule, why in self.excused.items():
            not_applied.append({"rule": rule.name, "reason": why})
        blamed = [np.zeros(0, dtype=np.int64)]
        lost = np.sort(lost, order="first")
        reach = np.maximum.accumulate(lost["last"]) if len(lost) else lost["last"]

        def spans(first: NDArray[np.int64], last: NDArray[np.int64]) -> NDArray[np.bool_]:
            """Whether a loss overlaps from first to last."""
            if not len(lost):
                return np.zeros(len(first), dtype=np.bool_)
            place = np.searchsorted(lost["first"], last, side="right") - 1
            return (place >= 0) & (reach[np.maximum(place, 0)] >= first)

        for rule, record in self._records.items():
            if not record.failures or rule in self.excused:
                continue
            if _too_often(rule, record):
                share = f"{record.failures:,} of {record.occasions:,} times"
                why = next(words for need, words in _WHY.items() if need in rule.needs)
                not_applied.append({"rule": rule.name, "reason": f"the trace breaks it {share}: {why}"})
                continue
            rows = np.concatenate(record.blamed)
            remembers = any(need in rule.needs for need in ("history", "order", "since"))
            excused = spans(rows[:, 1], rows[:, 2]) & np.bool_(remembers)
            blamed.append(rows[~excused, 0])
            for (lines, what), forgiven in zip(record.listed, excused.tolist(), strict=False):
                if not forgiven:
                    findings.append({"lines": list(lines), "rule": rule.name, "source": rule.source, "what": what})
            more = int(np.count_nonzero(~excused)) - sum(not f for f in excused[: len(record.listed)].tolist())
            if more > 0:
                findings.append(
                    {"lines": [], "rule": rule.name, "source": rule.source, "what": f"and {more:,} more like these"}
                )
        wrong = len(np.unique(np.concatenate(blamed)))
        findings.sort(key=lambda found: (not found["lines"], found["lines"][-1:], found["rule"]))
        return {"findings": findings, "not_applied": not_applied, "agree": max(events - wrong, 0), "of": events}


_WHY = {
    "order": "not every event was recorded",
    "history": "several guests or roots share the names of entries, or not every event was recorded",
    "seldom": "it is of a kernel or of settings that the rule does not know",
}


def _too_often(rule: Rule, record: _Record) -> bool:
    """A rule that fails more than rarely is not a rule of this trace; only rules that others' events excuse."""
    if "order" in rule.needs:
        return record.failures > 3 and record.failures * 50 > record.occasions
    return any(need in rule.needs for need in ("history", "seldom")) and (
        record.failures > 7 and record.failures * 20 > record.occasions
    )
