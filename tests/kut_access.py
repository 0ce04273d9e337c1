"""The states and the plain rules of kvm-unit-tests' x86/access.c, restated: an oracle for the page walk's rules.

A state is one uint32 of flags: the bits of a PTE and of the PDE above it, the access, and the CPU's settings; the
upper levels are permissive, but for the PDPTE's W. :func:`expect` says in that test's own order of steps what must
come out, for an array of states; :func:`expect_one` says it again for a single state in plain Python, bit by bit.
"""

import itertools
from typing import NamedTuple

import numpy as np

NAMES = (
    *(f"PTE_{bit}" for bit in ("P", "W", "U", "A", "D", "NX", "51", "36")),
    *(f"PDE_{bit}" for bit in ("P", "W", "U", "A", "D", "PSE", "NX", "51", "36", "13")),
    *("PDPTE_NO_W", "PKU_AD", "PKU_WD", "PKU_PKEY", "USER", "WRITE", "FETCH", "TWICE"),
    *("EFER_NX", "CR0_WP", "CR4_SMEP", "CR4_PKE"),
)
BIT = {name: 1 << place for place, name in enumerate(NAMES)}
ENTRY_BITS = {"P": 0, "W": 1, "U": 2, "A": 5, "D": 6, "PSE": 7, "NX": 63, "51": 51, "36": 36, "13": 13}
UPPER, TABLE_ADDRESS, LARGE_ADDRESS, PAGE_ADDRESS = 0x7, 0x2000000, 0x4000000, 0x4000000
P, W, U, A, D, RSVD, F, PK = 1, 2, 4, 0x20, 0x40, 8, 0x10, 0x20
PKU_FLAGS = ("PKU_AD", "PKU_WD", "PKU_PKEY", "CR4_PKE")
RESERVED_FLAGS = ("PDE_51", "PDE_36", "PDE_13", "PTE_51", "PTE_36")


def has(states, name):
    return states & np.uint32(BIT[name]) != 0


def masked(maxphyaddr, pku):
    """Flags that a CPU of this kind cannot vary: address bits that it has, keys that it has not."""
    names = ["CR4_SMEP"]  # the main loop leaves it clear
    names += ["PTE_51", "PDE_51"] * (maxphyaddr >= 52) + ["PTE_36", "PDE_36"] * (maxphyaddr >= 37)
    return names + list(PKU_FLAGS) * (not pku)


def legal(states, maxphyaddr, pku):
    """Which states the test would run."""
    good = ~np.any([has(states, name) for name in masked(maxphyaddr, pku)], axis=0)
    good &= ~(has(states, "FETCH") & has(states, "WRITE"))
    good &= has(states, "CR4_PKE") | ~(has(states, "PKU_AD") | has(states, "PKU_WD"))
    good &= has(states, "PDE_PSE") | ~has(states, "PDE_13")
    causes = sum(has(states, name).astype(np.uint8) for name in RESERVED_FLAGS)
    causes += (has(states, "PDE_NX") & ~has(states, "EFER_NX")).astype(np.uint8)
    causes += (has(states, "PTE_NX") & ~has(states, "EFER_NX")).astype(np.uint8)
    return good & (causes <= 1)


def subsets(names):
    """Every combination of the named flags, as states."""
    states = np.zeros(1, dtype=np.uint32)
    for name in names:
        states = np.concatenate([states, states | np.uint32(BIT[name])])
    return states


def blocks(maxphyaddr, pku):
    """All legal states, block by block. Each legality clause stays within one group of flags, so they multiply."""
    groups = [(*RESERVED_FLAGS, "PDE_PSE", "PDE_NX", "PTE_NX", "EFER_NX"), ("FETCH", "WRITE"), PKU_FLAGS]
    grouped = {name for group in groups for name in group}
    free = subsets(name for name in NAMES if name not in grouped and name not in masked(maxphyaddr, pku))
    chosen = [states[legal(states, maxphyaddr, pku)] for states in map(subsets, groups)]
    for combination in itertools.product(*(states.tolist() for states in chosen[:2])):
        yield (np.uint32(sum(combination)) | free[:, None] | chosen[2]).ravel()


class Setting(NamedTuple):
    """A state's entries before the access (root first) and its protection-key register."""

    entries: np.ndarray  # (state, 4)
    pkru: np.ndarray


def setting(states):
    """Turn flags into the page-table entries and the PKRU value that the test would write."""

    def entry(kind):
        bits = ((has(states, f"{kind}_{name}"), bit) for name, bit in ENTRY_BITS.items() if f"{kind}_{name}" in BIT)
        return np.bitwise_or.reduce([flag.astype(np.uint64) << np.uint64(bit) for flag, bit in bits])

    keyed, large = has(states, "PKU_PKEY"), has(states, "PDE_PSE")
    pte = entry("PTE") | np.uint64(PAGE_ADDRESS) | keyed * np.uint64(1 << 59)
    pde = entry("PDE") | np.where(large, np.uint64(LARGE_ADDRESS), np.uint64(TABLE_ADDRESS))
    pde |= keyed * np.where(large, np.uint64(1 << 59), np.uint64(2 << 59))
    pdpte = np.uint64(UPPER) & ~(has(states, "PDPTE_NO_W") * np.uint64(W))
    pkru = np.uint64(0x30) | has(states, "PKU_AD") * np.uint64(4) | has(states, "PKU_WD") * np.uint64(8)
    return Setting(np.stack([np.full_like(pte, UPPER), pdpte, pde, pte], axis=-1), pkru)


class Expected(NamedTuple):
    """What must come out: fault, error code, both entries, and which bits of the PDE may be either."""

    fault: np.ndarray
    code: np.ndarray
    pde: np.ndarray
    pte: np.ndarray
    ignore_pde: np.ndarray


def expect(states):
    """The expected result of each state: once for the kernel read of TWICE, then for the access itself."""
    f = {name: has(states, name) for name in NAMES}
    entries = setting(states).entries
    pde, pte = entries[:, 2], entries[:, 3]
    off = np.zeros_like(f["USER"])
    _, _, read_pde, read_pte = step(f, pde, pte, user=off, write=off, fetch=off)
    first_pde, first_pte = np.where(f["TWICE"], read_pde, pde), np.where(f["TWICE"], read_pte, pte)
    fault, code, last_pde, last_pte = step(f, first_pde, first_pte, user=f["USER"], write=f["WRITE"], fetch=f["FETCH"])
    return Expected(fault, code, last_pde, last_pte, (fault & ~f["PDE_A"]) * np.uint64(A))


def step(f, pde, pte, *, user, write, fetch):
    """One access of each state after the test's rules, in the test's order."""
    accessed, dirty = np.uint64(A), np.uint64(D)
    code = np.uint64(P) | user * np.uint64(U) | write * np.uint64(W) | fetch * np.uint64(F)
    nx_reserved = ~f["EFER_NX"]

    pde_bad = f["PDE_51"] | f["PDE_36"] | (f["PDE_PSE"] & f["PDE_13"]) | (nx_reserved & f["PDE_NX"])
    pde_invalid = ~f["PDE_P"] | pde_bad
    code = np.where(pde_invalid & f["PDE_P"], code | np.uint64(RSVD), code)
    code = np.where(pde_invalid & ~f["PDE_P"], code & ~np.uint64(P), code)
    stopped = pde_invalid

    writable, user_page, executable = f["PDE_W"] & ~f["PDPTE_NO_W"], f["PDE_U"], ~f["PDE_NX"]
    to_pte = ~stopped & ~f["PDE_PSE"]
    pde = np.where(to_pte, pde | accessed, pde)
    pte_bad = f["PTE_51"] | f["PTE_36"] | (nx_reserved & f["PTE_NX"])
    pte_invalid = to_pte & (~f["PTE_P"] | pte_bad)
    code = np.where(pte_invalid & f["PTE_P"], code | np.uint64(RSVD), code)
    code = np.where(pte_invalid & ~f["PTE_P"], code & ~np.uint64(P), code)
    stopped = stopped | pte_invalid
    writable = np.where(to_pte, writable & f["PTE_W"], writable)
    user_page = np.where(to_pte, user_page & f["PTE_U"], user_page)
    executable = np.where(to_pte, executable & ~f["PTE_NX"], executable)

    kwritable = ~f["CR0_WP"] & ~user
    fault = stopped | (user & ~user_page) | (write & ~writable & ~kwritable) | (fetch & ~executable)
    fault |= f["CR4_SMEP"] & ~user & fetch & user_page
    keyed = ~stopped & f["CR4_PKE"] & user_page & ~fetch & f["PKU_PKEY"]
    key_denies = keyed & (f["PKU_AD"] | (f["PKU_WD"] & write & ~kwritable))
    fault |= key_denies
    code = code | key_denies * np.uint64(PK)
    code = np.where(~f["EFER_NX"] & ~f["CR4_SMEP"], code & ~np.uint64(F), code)

    marks = ~fault * accessed | (~fault & write) * dirty
    pde = np.where(f["PDE_PSE"], pde | marks, pde)
    pte = np.where(f["PDE_PSE"], pte, pte | marks)
    return fault, np.where(fault, code, np.uint64(0)), pde, pte


def expect_one(state):
    """The same for one state, in plain Python with early exits: fault, code, and the A and D bits that were set."""
    on = {name for name, bit in BIT.items() if state & bit}
    set_bits = set()

    def one(user, write, fetch):
        code = P | U * user | W * write | F * (fetch and bool(on & {"EFER_NX", "CR4_SMEP"}))
        for kind in ("PDE", "PTE"):
            if f"{kind}_P" not in on:
                return True, code & ~P
            bad = {f"{kind}_51", f"{kind}_36"} | ({"PDE_13"} if kind == "PDE" and "PDE_PSE" in on else set())
            bad |= set() if "EFER_NX" in on else {f"{kind}_NX"}
            if on & bad:
                return True, code | RSVD
            if "PDE_PSE" in on:
                break
            if kind == "PDE":
                set_bits.add("PDE_A")
        levels = ["PDE"] if "PDE_PSE" in on else ["PDE", "PTE"]
        writable = all(f"{level}_W" in on for level in levels) and "PDPTE_NO_W" not in on
        user_page = all(f"{level}_U" in on for level in levels)
        kwritable = "CR0_WP" not in on and not user
        fault = (user and not user_page) or (write and not writable and not kwritable)
        fault = fault or (fetch and any(f"{level}_NX" in on for level in levels))
        fault = fault or ("CR4_SMEP" in on and fetch and not user and user_page)
        if {"CR4_PKE", "PKU_PKEY"} <= on and user_page and not fetch:
            if "PKU_AD" in on or ("PKU_WD" in on and write and not kwritable):
                fault, code = True, code | PK
        if not fault:
            set_bits.update([f"{levels[-1]}_A"] + [f"{levels[-1]}_D"] * write)
        return fault, code * fault

    if "TWICE" in on:
        one(False, False, False)
    fault, code = one("USER" in on, "WRITE" in on, "FETCH" in on)
    return fault, code, set_bits
