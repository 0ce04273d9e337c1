"""The exercises of chapter 2: error codes, exit qualifications, and the rules of a page fault."""

from __future__ import annotations

import csv

import numpy as np
from numpy.typing import NDArray

from mmu import pfec, trace
from mmu.exercise import Case, Exercise


def code_rule(rule: str) -> Exercise:
    """Which codes may try the fast path under ``rule``; the answer takes ``code``, gives a bool."""
    return Exercise(
        "error codes",
        [
            Case({"code": code}, pfec.can_be_fast(code, rule), f"{code:#04x} ({pfec.PFEC.text(code)})", because)
            for code in range(32)
            if not pfec.impossible(code)
            for because in [pfec.verdict(code, rule).reason]
        ],
    )


def impossible_codes() -> Exercise:
    """Which of the 32 codes cannot occur; the answer takes ``code``, gives a bool."""
    return Exercise(
        "error codes",
        [
            Case({"code": code}, pfec.impossible(code), f"{code:#04x} ({pfec.PFEC.text(code)})", because)
            for code in range(32)
            for because in [pfec.verdict(code).reason]
        ],
    )


def qualifications() -> Exercise:
    """What KVM makes of each exit qualification that EPT can give; the answer takes and gives an int."""
    rights, access = np.meshgrid(np.arange(8, dtype=np.int64), np.array([1, 2, 4], dtype=np.int64), indexing="ij")
    final = pfec.ept_violation(rights, access).ravel()
    walks = [pfec.ept_walk_violation(np.arange(8, dtype=np.int64), ept_ad=ad, update=True) for ad in (False, True)]
    seen = np.unique(np.concatenate([final, *walks]))
    return Exercise(
        "exit qualifications",
        [
            Case({"qualification": q}, pfec.from_ept(q), f"{q:#x} ({pfec.EPT_QUALIFICATION.text(q)})")
            for q in seen[seen > 0].tolist()
        ],
        show=lambda code: f"{pfec.PFEC.text(code)} ({code:#x})" if isinstance(code, int) else repr(code),
    )


ENTRY_FLAGS, CPU_FLAGS = ("p", "w", "u", "nx", "rsvd"), ("wp", "nxe", "smep", "smap", "ac")


def recorded_faults(table: str) -> Exercise:
    """The error code of each recorded access, or None where it passed; ``table`` is the table's CSV text.

    The answer takes the entry's ``p w u nx rsvd``, the access's ``write fetch user`` and the CPU's
    ``wp nxe smep smap ac``, all bools.
    """
    rows = list(csv.DictReader(line for line in table.splitlines() if not line.startswith("#")))
    rows.sort(
        key=lambda row: sum(row[name] == "1" for name in (*ENTRY_FLAGS, *CPU_FLAGS))
    )  # the plainest counterexample first
    access = {"R": "read", "W": "write", "X": "fetch"}
    cases = []
    for row in rows:
        flags = {name: row[name] == "1" for name in (*ENTRY_FLAGS, *CPU_FLAGS)}
        flags |= {"write": row["access"] == "W", "fetch": row["access"] == "X", "user": row["mode"] == "U"}
        mode = "user" if flags["user"] else "supervisor"
        entry, cpu = (
            " ".join(name.upper() for name in names if flags[name]) or "nothing" for names in (ENTRY_FLAGS, CPU_FLAGS)
        )
        said = f"a {mode} {access[row['access']]}; set in the entry: {entry}; in the CPU: {cpu}"
        cases.append(Case(flags, None if row["err"] == "-" else int(row["err"], 16), said))
    return Exercise("recorded accesses", cases, show=lambda code: "no fault" if code is None else f"{code:#x}")


def handed_back(recording: trace.Trace) -> NDArray[np.bool_]:
    """Which ``kvm_page_fault`` events of a recording KVM handed back to the guest; bool ``# (fault,)``.

    A fault was handed back when an exception was injected between it and the next time the guest was entered; a fault
    with no entry after it counts as not handed back.
    """
    fault, entry, injected = (recording[name]["line"] for name in ("kvm_page_fault", "kvm_entry", "kvm_inj_exception"))
    after = np.searchsorted(entry, fault)  # (fault,)
    entered = np.append(entry, fault[-1:])[after]
    return np.searchsorted(injected, entered) > np.searchsorted(injected, fault)
