"""The exercises of chapter 1: what was recorded under the lock, what a fault repairs, and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mmu import handling, published
from mmu.exercise import Case, Exercise, Result
from mmu.trace import Trace


def lock_flags(*recordings: Trace) -> Exercise:
    """Which events were recorded under the mmu-lock; the answer takes the ``flags`` column as text, gives a bool.

    Each pair of an event and its flags that occurs in the recordings is a case.
    """
    seen = {}
    for recording in recordings:
        for event in recording:
            if event != "tracing_mark_write":
                for flags in np.unique(recording[event]["flags"]).tolist():
                    seen[flags.decode(), event] = None
    pairs = sorted(seen, key=lambda pair: (sum(letter != "." for letter in pair[0]), pair))
    held = handling.under_lock([flags.encode() for flags, _ in pairs]).tolist()
    return Exercise(
        "pairs of event and flags",
        [
            Case({"flags": flags}, lock, f"{flags} of {event}", _why(flags))
            for (flags, event), lock in zip(pairs, held, strict=True)
        ],
    )


def _why(flags: str) -> str:
    if flags[0] == "d":
        return "interrupts are off: the guest is about to be entered, or a table is being walked without the lock"
    return "nothing is held" if flags[3] == "." else f"{flags[3]} held, interrupts on"


def changed_bits(recording: Trace) -> Exercise:
    """Which bits of an entry changed; the answer takes ``old`` and ``new``, gives their numbers in ascending order.

    Each change of an entry that the recording shows is a case, repairs first.
    """
    columns = {"fast_page_fault": ("old", "new"), "kvm_tdp_mmu_spte_changed": ("old_spte", "new_spte")}
    cases = []
    for event, (old, new) in columns.items():
        pairs, first = np.unique(recording[event][[old, new]], return_index=True)
        for before, after in pairs[np.argsort(first)].tolist():
            bits = [bit for bit in range(64) if (before ^ after) >> bit & 1]
            cases.append(Case({"old": before, "new": after}, bits, f"{before:#x} to {after:#x} ({event})"))
    return Exercise("changes", cases)


def per_fault() -> Exercise:
    """Microseconds a page from published times; the answer takes ``seconds``, ``vcpus`` and ``gib`` of each vCPU.

    It gives microseconds rounded to two decimals.
    """
    return Exercise("published times", [_cost(*row, 2, published.per_page(row[0])) for row in _published()])


def turns() -> Exercise:
    """How long each fault would hold a lock if nothing but the lock took time; arguments as in :func:`per_fault`.

    The answer gives nanoseconds rounded to a whole number.
    """
    return Exercise("published times", [_cost(*row, 0, published.serial_section(*row)) for row in _published()])


def _published() -> list[tuple[float, int]]:
    table, fast = published.SPLIT_ON_FAULT, published.FAST_TDP
    contended = (float(fast["before"][0]), int(fast["vcpus"][0]))
    return [contended, *zip(table["built"].tolist(), table["vcpus"].tolist(), strict=True)]


def _cost(seconds: float, vcpus: int, digits: int, exact: float) -> Case:
    said = f"{vcpus} vCPUs, {seconds:.3f} s for 1 GiB each"
    return Case({"seconds": seconds, "vcpus": vcpus, "gib": 1}, round(float(exact), digits or None), said)


def dirty_rounds(recording: Trace) -> Callable[[Sequence[int]], Result]:
    """An exercise whose answer is a list: the faults of each round, held against the dirty pages that KVM reported."""
    reported = handling.rounds(recording)[1].tolist()

    def answer(guess: Sequence[int]) -> Result:
        told = [int(number) for number in guess]
        if told == reported:
            return Result(True, f"Right: {told}, the numbers of dirty pages that KVM reported, round by round.")
        if len(told) != len(reported):
            return Result(False, f"Not yet: you gave {len(told)} rounds, the log was read {len(reported)} times.")
        wrong = next(i for i, (mine, its) in enumerate(zip(told, reported, strict=True)) if mine != its)
        return Result(
            False,
            f"Not yet: in round {wrong} (counting from 0) you counted {told[wrong]} faults, and KVM reported "
            f"{reported[wrong]} dirty pages.",
        )

    return answer
