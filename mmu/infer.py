"""Which kernel and which MMU a trace is of: a trace does not say, but its exits, error codes and sptes show it.

The one idea: every piece of a trace is counted for signs (:func:`signs_of`), and what all signs agree on is said, with
the reason (:func:`infer_layout`); where they disagree, or there are none, nothing is said. Chapter 13.

Facts: the bits of sptes by kernel (facts 3.6 and 3.7), the reasons of exits (facts 4).
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from mmu import trace

_EXITS = {  # kvm_exit reasons as the kernel and trace-cmd name them, and whose paging they show
    b"npf": "npt",
    b"EXIT_NPF": "npt",
    b"EPT_VIOLATION": "ept",
    b"EPT_MISCONFIG": "ept",
}


def _bits(*positions: int) -> np.uint64:
    return np.uint64(sum(1 << position for position in positions))


def signs_of(piece: trace.Trace) -> dict[str, int]:
    """What the piece shows of the layout of its sptes, counted; :func:`infer_layout` judges.

    Bits as in facts 3.6 and 3.7: HOST and MMU-writable are 10 and 11 up to 5.12; from 5.13 on 9 and 10, under EPT 57
    and 58, and every present spte has bit 11. From 6.10 on a not-present spte has bit 63 (and a frozen one too).
    """
    changed, fast = piece["kvm_tdp_mmu_spte_changed"], piece["fast_page_fault"]
    moved = np.concatenate([changed["old_spte"], changed["new_spte"]])
    sptes = np.concatenate([moved, piece["kvm_mmu_set_spte"]["spte"], fast["old"], fast["new"]])
    codes = piece["kvm_page_fault"]["error_code"]
    signs = Counter({f"exit {kind}": 0 for kind in ("npt", "ept")})
    exits = piece["kvm_exit"]
    for reason, kind in _EXITS.items():
        signs[f"exit {kind}"] += int(np.count_nonzero(exits["reason"] == reason))
    nested = codes >> np.uint64(32) != 0
    qualified = ~nested & (codes & _bits(7) != 0)  # GLA valid; no page-fault error code of these CPUs has bit 7
    signs["code npt"], signs["code ept"] = int(nested.sum()), int(qualified.sum())
    signs["code pfec"] = len(codes) - signs["code npt"] - signs["code ept"]

    special = sptes & _bits(52, 53) == _bits(52, 53)  # MMIO up to 5.12
    for kind, present, mmio in (
        ("ept", sptes & _bits(0, 1, 2) != 0, sptes & _bits(0, 1, 2) == _bits(1, 2)),
        ("npt", sptes & _bits(0) != 0, sptes & _bits(0, 51) == _bits(0, 51)),
    ):
        ours = sptes[present & ~mmio & ~special]
        writable = ours & _bits(1) != 0
        signs[f"{kind} present"] = len(ours)
        signs[f"{kind} without 11"] = int(np.count_nonzero(ours & _bits(11) == 0))
        signs[f"{kind} 11 without 10"] = int(np.count_nonzero(ours & _bits(10, 11) == _bits(11)))
        signs[f"{kind} writable 9, 10, 11"] = int(
            np.count_nonzero(writable & (ours & _bits(9, 10, 11) == _bits(9, 10, 11)))
        )
        elsewhere = _bits(57, 58) if kind == "ept" else _bits(9)
        signs[f"{kind} writable 10, 11"] = int(
            np.count_nonzero(writable & (ours & _bits(10, 11) == _bits(10, 11)) & (ours & elsewhere == 0))
        )
        signs[f"{kind} 57, 58"] = int(np.count_nonzero(writable & (ours & _bits(57, 58) == _bits(57, 58))))
        signs[f"{kind} 63"] = int(np.count_nonzero(ours & _bits(63)))
    absent = moved & ~_bits(63)
    absent = moved[(absent == 0) | (absent == np.uint64(0x5A0))]
    signs["absent with 63"] = int(np.count_nonzero(absent & _bits(63)))
    signs["absent without 63"] = len(absent) - signs["absent with 63"]
    signs["wide pferr"] = int(np.count_nonzero(fast["error_code"] >> np.uint64(32)))
    signs["narrow pferr"] = len(fast) - signs["wide pferr"]
    spurious, fixed = fast["spurious"] == 1, fast["fixed"] == 1
    signs["fast"], signs["flags both"] = len(fast), int(np.count_nonzero(spurious & fixed))
    signs["flags apart"] = int(np.count_nonzero(spurious & ~fixed & (fast["new"] & _bits(1) != 0)))
    for event in piece:
        if event.endswith("_page_fault_ret") and event != "fast_page_fault_ret":
            for value in (4, 5):
                signs[f"returned {value}"] += int(np.count_nonzero(piece[event]["ret"] == value))
    signs["inner returned"] = len(piece["fast_page_fault_ret"])
    signs["reinjected"] = int(np.count_nonzero(piece["kvm_inj_exception"]["reinjected"] == 1))
    signs["walk"] = len(piece["kvm_mmu_pagetable_walk"])
    for event in piece:
        signs[f"event {'*_page_fault_ret' if event.endswith('_page_fault_ret') else event}"] += len(piece[event])
    return signs


FEW = 2, 20
"""So many signs, of at least so many times as many that say otherwise, are taken for damage, not for another kernel."""


def _but_few(ours: int, others: int) -> int:
    most, times = FEW
    return 0 if ours <= most and ours * times <= others else ours


def infer_mmu(signs: Counter[str]) -> str | None:
    """``"npt"``, ``"ept"`` or ``"shadow"``: how the host translates; None where the trace does not tell."""
    for sign in ("exit", "code"):
        npt, ept, pfec = (signs[f"{sign} {kind}"] for kind in ("npt", "ept", "pfec"))
        counts = {"npt": _but_few(npt, max(ept, pfec)), "ept": _but_few(ept, max(npt, pfec))}
        kinds = {kind for kind, count in counts.items() if count}
        if kinds:
            return kinds.pop() if len(kinds) == 1 else None
    if signs["code pfec"]:
        return "shadow"
    return "ept" if signs["ept 57, 58"] else None


def events_of(signs: Counter[str]) -> set[str]:
    """The names of the trace's events; ``*_page_fault_ret`` stands for all that end so."""
    return {sign.removeprefix("event ") for sign in signs if sign.startswith("event ")}


def old_flags(signs: Counter[str]) -> bool:
    """Whether ``spurious`` and ``fixed`` of fast_page_fault tell of W in the old and in the new spte, as up to 5.13.

    Since then they tell what the fast path returned, so that never both are 1.
    """
    return _but_few(signs["flags both"], signs["flags apart"]) > signs["flags apart"]


def infer_layout(signs: Counter[str]) -> tuple[str | None, str]:
    """The layout of a trace's sptes, None where it cannot be told, and why in one sentence."""
    mmu = infer_mmu(signs)
    if mmu is None:
        return None, "neither exits nor error codes tell one kind of paging: none is shown, or several are mixed"
    view = "ept" if mmu == "ept" else "npt"
    shown = {"npt": "nested paging (npf exits)", "ept": "EPT violations", "shadow": "shadow paging (no nested faults)"}[
        mmu
    ]
    present = signs[f"{view} present"]
    if not present:
        return None, f"{shown}, but no present spte is printed, so the kernel's layout cannot be told"
    if view == "npt" and _but_few(signs["npt 57, 58"], present):
        return None, f"{shown}, but sptes carry EPT's bits 57 and 58: lines of several machines are mixed"
    fives = signs[f"{view} without 11"] + signs[f"{view} writable 10, 11"]
    sixes = signs["ept 57, 58"] if view == "ept" else signs["npt writable 9, 10, 11"]
    sixes += signs[f"{view} 11 without 10"]
    new, old = _but_few(sixes, fives), _but_few(fives, sixes)
    if new and old:
        return None, f"{shown}, but some present sptes carry bit 11 as from 5.13 on and some do not: kernels are mixed"
    if old:
        name = "5.10-ept" if view == "ept" else "5.10-shadow"
        return name, f"{shown}; bit 11 is not in every present spte: up to 5.12 (3.6 has the same bits here)"
    if not new:
        return None, f"{shown}; the few sptes fit 5.10 as well as 6.1"
    home = "57 and 58" if view == "ept" else "9 and 10"
    why = f"{shown}; bit 11 in every present spte, host and MMU-writable in {home}: 5.13 or newer"
    with_63, without_63 = signs["absent with 63"], signs["absent without 63"]
    fixed_4, fixed_5 = signs["returned 4"], signs["returned 5"]  # RET_PF_FIXED is 4 in 6.1 and 5 in 6.12, where 4
    fixed_4 = _but_few(fixed_4, fixed_5)  # never leaves the handler; in 6.1 5 does
    wide = _but_few(signs["wide pferr"], signs["narrow pferr"])
    newer = [
        what
        for sign, what in (
            (_but_few(with_63, without_63), "not-present sptes have bit 63"),
            (wide, "error codes of fast_page_fault have more than 32 bits"),
            (view == "ept" and _but_few(signs["ept 63"], present), "present sptes have bit 63"),
            (fixed_5 and not fixed_4, "fault handlers return 5 and never 4"),
        )
        if sign
    ]
    older = [
        what
        for sign, what in (
            (_but_few(without_63, with_63), "not-present sptes are 0, removed ones 0x5a0"),
            (fixed_4, "fault handlers return 4 for a fixed fault"),
        )
        if sign
    ]
    if newer and older:
        return None, f"{why}; {newer[0]}, as from 6.10 on, but {older[0]}, as before: kernels are mixed"
    if newer:
        return f"6.12-{view}", f"{why}; {newer[0]}: 6.10 or newer"
    if older:
        return f"6.1-{view}", f"{why}; {older[0]}: older than 6.10"
    return f"6.1-{view}", f"{why}; nothing tells 6.1 from 6.12, whose present sptes are alike"
