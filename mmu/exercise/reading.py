"""The exercises of chapter 13: what a line tells, which path a fault took, who gets nowhere, and room for a trace."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mmu import reading, report, spte, trace
from mmu.exercise import Case, Exercise, Result
from mmu.trace import Trace

LETTERS = {
    "F": "a fault is repaired without the mmu-lock",
    "A": "the entry already allowed the access",
    "B": "an entry is built, where none was",
    "Z": "an entry is taken out",
    "P": "an entry is write-protected",
    "G": "the guest is given a fault of its own",
}
"""What a line of :func:`twelve` may tell."""

_EVENT = re.compile(r"(?:kvm_\w+|fast_page_fault): .*")


def _told(recording: Trace, layout: str) -> dict[str, NDArray[np.int64]]:
    """For each of :data:`LETTERS` the lines that tell it."""
    tried, changed = recording["fast_page_fault"], recording["kvm_tdp_mmu_spte_changed"]
    old, new, leaf = changed["old_spte"], changed["new_spte"], changed["level"] == 1
    was, now = spte.is_present(old, layout) & leaf, spte.is_present(new, layout) & leaf
    spurious = tried["spurious"] == 1
    return {
        "F": tried["line"][(tried["fixed"] == 1) & ~spurious],
        "A": tried["line"][spurious],
        "B": changed["line"][leaf & (old == 0) & now],
        "Z": changed["line"][was & ~now],
        "P": changed["line"][was & now & (old ^ new == np.uint64(2)) & (old & np.uint64(2) != 0)],
        "G": recording["kvm_inj_exception"]["line"],
    }


def twelve(*paths: str | os.PathLike[str]) -> tuple[list[str], Callable[[str], Result]]:
    """Twelve lines of recordings, two of each of :data:`LETTERS`, and the check of an answer of twelve letters.

    Raises:
        ValueError: the recordings together have fewer than two different lines of one kind.
    """
    found: dict[str, list[str]] = {letter: [] for letter in LETTERS}
    for path in paths:
        kernel, recording = reading.kernel_lines(path), trace.read(path)
        for letter, lines in _told(recording, report.report(path)["layout"]).items():
            found[letter] += [_EVENT.search(kernel[line - 1])[0].strip() for line in lines.tolist()]
    found = {letter: list(dict.fromkeys(lines)) for letter, lines in found.items()}
    few = [letter for letter, lines in found.items() if len(lines) < 2]
    if few:
        raise ValueError(f"fewer than two different lines of {', '.join(few)}; expected recordings that have all kinds")
    pairs = [(line, letter) for letter, lines in found.items() for line in (lines[0], lines[-1])]
    order = np.random.default_rng(13).permutation(len(pairs)).tolist()
    shown = [pairs[i][0] for i in order]
    right = "".join(pairs[i][1] for i in order)

    def answer(guess: str) -> Result:
        told = "".join(guess.upper().split())
        if len(told) != len(right) or set(told) - set(LETTERS):
            return Result(False, f"Not yet: expected {len(right)} letters of {''.join(LETTERS)}, you gave {guess!r}.")
        wrong = [i for i, (mine, its) in enumerate(zip(told, right, strict=True)) if mine != its]
        if not wrong:
            return Result(True, f"Right: all {len(right)} lines.")
        first = wrong[0]
        return Result(
            False,
            f"Not yet: {len(wrong)} of {len(right)} lines differ. The first is line {first + 1}: you answered "
            f"{told[first]}, {LETTERS[told[first]]}; it tells that {LETTERS[right[first]]}.",
        )

    return shown, answer


def path_of(*recordings: Trace) -> Exercise:
    """Which path a fault took; the answer takes ``events``, ``fixed`` and ``spurious``, gives one of the six names.

    ``events`` are the names of the thread's events between the fault and its next VM entry, each once. Each
    combination that occurs in the recordings is a case.
    """
    seen: dict[tuple[tuple[str, ...], bool, bool], str] = {}
    for recording in recordings:
        which = reading.paths(recording).tolist()
        order = recording.order()
        thread = {int(row["line"]): int(row["pid"]) for name in recording for row in recording[name]}
        now: dict[int, tuple[int, dict[str, None], list[bool]]] = {}
        for line, event, row in order.tolist():
            name, pid = event.decode(), thread[line]
            ending = name in ("kvm_entry", "kvm_exit", "kvm_page_fault")
            if ending and pid in now:
                fault, names, (fixed, spurious) = now.pop(pid)
                seen[tuple(sorted(names)), fixed, spurious] = reading.PATHS[which[fault]]
            if name == "kvm_page_fault":
                now[pid] = (row, {}, [False, False])
            elif pid in now:
                now[pid][1][name] = None
                if name == "fast_page_fault":
                    record = recording[name][row]
                    now[pid][2][:] = [record["fixed"] == 1, record["spurious"] == 1]
    cases = [
        Case({"events": list(names), "fixed": fixed, "spurious": spurious}, path, _said(names, fixed, spurious))
        for (names, fixed, spurious), path in sorted(seen.items(), key=lambda item: (len(item[0][0]), item[0]))
    ]
    return Exercise("kinds of faults", cases)


def _said(names: tuple[str, ...], fixed: bool, spurious: bool) -> str:
    outcome = f" with fixed {int(fixed)}, spurious {int(spurious)}" if "fast_page_fault" in names else ""
    return (", ".join(names) or "no event at all") + outcome


def longest_run(**recordings: Trace) -> Exercise:
    """How often a vCPU faults in a row at one instruction and address; the answer takes ``faults``, gives the number.

    ``faults`` is a list of (instruction, address). Each vCPU of each recording is a case.
    """
    cases = []
    for name, recording in recordings.items():
        table = recording["kvm_page_fault"]
        for vcpu in np.unique(table["vcpu"]).tolist():
            mine = table[table["vcpu"] == vcpu]
            same = (mine["rip"][1:] == mine["rip"][:-1]) & (mine["address"][1:] == mine["address"][:-1])
            breaks = np.flatnonzero(np.concatenate([[True], ~same, [True]]))
            faults = list(zip(mine["rip"].tolist(), mine["address"].tolist(), strict=True))
            cases.append(Case({"faults": faults}, int(np.diff(breaks).max()), f"vCPU {vcpu} of {name}"))
    return Exercise("vCPUs", sorted(cases, key=lambda case: len(case.arguments["faults"])))


def buffer_size() -> Exercise:
    """KiB of buffer a CPU that lose nothing; the answer takes ``faults_per_second``, ``seconds``, ``bytes_per_fault``.

    ``faults_per_second`` is a list, one number a CPU; every CPU's buffer gets the same size, whole KiB.
    """
    cases = []
    for rates, seconds, size in (
        ([1024], 1, 512),
        ([1000], 1, 700),
        ([100, 300], 10, 512),
        ([31_377, 0, 0, 0], 5, 1100),
        ([3906, 3695, 3824, 3605, 4196, 4444, 4151, 3556], 200, 700),
    ):
        arguments = {"faults_per_second": rates, "seconds": seconds, "bytes_per_fault": size}
        said = f"{rates} faults a second, {seconds} s, {size} bytes each"
        cases.append(Case(arguments, math.ceil(max(rates) * seconds * size / 1024), said))
    return Exercise("loads", cases)
