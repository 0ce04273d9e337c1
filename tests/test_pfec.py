"""mmu.pfec against kvm-unit-tests' tables, recorded exits and the rules as their sources state them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmu import pfec
from mmu.pfec import EPT_QUALIFICATION, PFEC, R_EPT, W_EPT, X_EPT, XU_EPT

READ, WRITE, FETCH = 1, 2, 4
BAD = int(pfec.MISCONFIGURED)

# kvm-unit-tests x86/vmx_tests.c: what an entry's rights make of a read, a write and a fetch (0: the access passes)
FINAL = {
    0: (0x181, 0x182, 0x184),
    R_EPT: (0, 0x18A, 0x18C),
    W_EPT: (BAD, BAD, BAD),
    R_EPT | W_EPT: (0, 0, 0x19C),
    X_EPT: (0x1A1, 0x1A2, 0),
    R_EPT | X_EPT: (0, 0x1AA, 0),
    W_EPT | X_EPT: (BAD, BAD, BAD),
    R_EPT | W_EPT | X_EPT: (0, 0, 0),
}
# the same on a guest page-table page: (EPT A/D, guest A or D must be set) -> qualification
WALK = {
    0: {(0, 0): 0x81, (0, 1): 0x81, (1, 0): 0x83, (1, 1): 0x83},
    R_EPT: {(0, 0): 0, (0, 1): 0x8B, (1, 0): 0x8B, (1, 1): 0x8B},
    R_EPT | X_EPT: {(0, 0): 0, (0, 1): 0xAB, (1, 0): 0xAB, (1, 1): 0xAB},
    R_EPT | W_EPT: dict.fromkeys([(0, 0), (0, 1), (1, 0), (1, 1)], 0),
    R_EPT | W_EPT | X_EPT: dict.fromkeys([(0, 0), (0, 1), (1, 0), (1, 1)], 0),
}
# mode-based execute control: (rights, access, user) -> rights that the qualification reports, None where it passes
MBEC = [
    (X_EPT, FETCH, True, X_EPT),
    (X_EPT, FETCH, False, None),
    (XU_EPT, READ, False, XU_EPT),
    (XU_EPT, WRITE, False, XU_EPT),
    (XU_EPT, FETCH, False, XU_EPT),
    (XU_EPT, FETCH, True, None),
    (X_EPT | XU_EPT, READ, True, X_EPT | XU_EPT),
    (X_EPT | XU_EPT, WRITE, True, X_EPT | XU_EPT),
    (X_EPT | XU_EPT, FETCH, True, None),
    (R_EPT | X_EPT, FETCH, True, R_EPT | X_EPT),
    (R_EPT | XU_EPT, WRITE, False, R_EPT | XU_EPT),
    (R_EPT | XU_EPT, FETCH, False, R_EPT | XU_EPT),
    (0, FETCH, True, 0),
    (R_EPT, FETCH, True, R_EPT),
    (R_EPT | W_EPT, FETCH, True, R_EPT | W_EPT),
]


@pytest.mark.parametrize("rights", FINAL)
def test_final_accesses(rights):
    """An access to a final address gets the qualification that kvm-unit-tests expects of the hardware."""
    assert tuple(pfec.ept_violation(rights, [READ, WRITE, FETCH]).tolist()) == FINAL[rights]


def test_execute_only_needs_the_capability():
    """Without execute-only support, an entry that can be executed but not read is malformed for each access."""
    assert pfec.ept_violation(X_EPT, [READ, WRITE, FETCH], exec_only=False).tolist() == [BAD] * 3
    assert pfec.ept_violation(XU_EPT, [READ, WRITE, FETCH], exec_only=False, mbec=True).tolist() == [BAD] * 3


@pytest.mark.parametrize("rights", WALK)
def test_accesses_to_guest_page_tables(rights):
    """A guest walk reads first, writes when A or D must be set, and always counts as a write under EPT A/D."""
    for (ept_ad, update), expected in WALK[rights].items():
        assert pfec.ept_walk_violation(rights, ept_ad=bool(ept_ad), update=bool(update)).item() == expected


@pytest.mark.parametrize(("rights", "access", "user", "reported"), MBEC)
def test_mode_based_execute_control(rights, access, user, reported):
    """Under MBEC a user fetch is judged by bit 10 and a supervisor fetch by bit 2; bits 3 to 6 report all rights."""
    expected = 0 if reported is None else 0x180 | access | reported << 3
    assert pfec.ept_violation(rights, access, mbec=True, user=user).item() == expected


def test_what_linux_6_1_concludes_of_user_executable_pages():
    """KVM 6.1 ignores bit 6: a page that only user mode may execute looks absent to it, though it is present."""
    qualification = pfec.ept_violation(XU_EPT, READ, mbec=True).item()
    assert EPT_QUALIFICATION.text(qualification) == "READ|ENTRY_XU|GLA_VALID|FINAL"
    assert PFEC.text(pfec.from_ept(qualification)) == "U|GUEST_FINAL"


@pytest.mark.parametrize(
    ("qualification", "code"),
    [
        (0x181, "U|GUEST_FINAL"),
        (0x182, "W|GUEST_FINAL"),
        (0x184, "F|GUEST_FINAL"),
        (0x683, "W|U|GUEST_PAGE"),
        (0xD82, "W|GUEST_FINAL"),
        (0xDAA, "P|W|GUEST_FINAL"),
        (0xF82, "W|GUEST_FINAL"),
        (0x18A, "P|W|GUEST_FINAL"),
        (0x18C, "P|F|GUEST_FINAL"),
        (0x1A1, "P|U|GUEST_FINAL"),
        (0x8B, "P|W|U|GUEST_PAGE"),
    ],
)
def test_recorded_qualifications(qualification, code):
    """Qualifications seen on real machines become the codes that Linux 6.1 makes of them."""
    assert PFEC.text(pfec.from_ept(qualification)) == code


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1))
def test_ept_arrays_equal_plain_python(values):
    """Whole arrays of qualifications turn into the codes that a plain reading of handle_ept_violation gives."""

    def plain(q):
        code = (4 if q & 1 else 0) | (2 if q & 2 else 0) | (16 if q & 4 else 0)
        return code | (1 if q & 0x38 else 0) | (1 << 32 if q & 0x100 else 1 << 33)

    codes = pfec.from_ept(np.array(values, dtype=np.uint64))
    assert codes.dtype == np.uint64
    assert codes.tolist() == [plain(q) for q in values] == [pfec.from_ept(q) for q in values]


def test_misconfiguration_is_rsvd_without_p():
    """KVM's own code for an EPT misconfiguration is RSVD alone, which no walk of page tables can give."""
    assert PFEC.text(pfec.EPT_MISCONFIG) == "RSVD"
    assert pfec.impossible(pfec.EPT_MISCONFIG)


def test_verdicts_of_all_low_codes():
    """Of the 32 codes of bits 0 to 4, 14 cannot occur, and the three rules call 6, 2 and 8 of the others candidates."""
    low = np.arange(32, dtype=np.uint64)
    possible = [c for c in range(32) if not (c & 8 and not c & 1) and not (c & 2 and c & 16)]
    assert np.flatnonzero(~pfec.impossible(low)).tolist() == possible
    rules = {
        pfec.SERIES_2012: lambda c: c & 1 and not c & 8,
        pfec.LINUX_61_AD: lambda c: not c & 8 and c & 1 and c & 2,
        pfec.LINUX_61_NO_AD: lambda c: not c & 8 and (c & 2 if c & 1 else True),
    }
    counts = {}
    for rule, plain in rules.items():
        assert pfec.can_be_fast(low, rule).tolist() == [bool(plain(c)) for c in range(32)]
        verdicts = [pfec.verdict(c, rule).verdict for c in range(32)]
        assert verdicts == ["impossible" if c not in possible else "fast" if plain(c) else "slow" for c in range(32)]
        counts[rule] = verdicts.count("fast")
    assert 32 - len(possible) == 14
    assert list(counts.values()) == [6, 2, 8]


def test_every_verdict_has_its_own_reason():
    """Each of the 32 codes gets a reason, and impossible codes say which two bits exclude each other."""
    for code in range(64):
        for rule in pfec.SOURCES:
            answer = pfec.verdict(code, rule)
            excluded = answer.reason.split(":")[0].split(" ")[1:2] in (["with"], ["without"])
            assert (answer.verdict == "impossible") == excluded
    assert pfec.verdict(0x8).reason.startswith("RSVD without P")
    assert pfec.verdict(0x13).reason.startswith("W with F")
    assert pfec.verdict(0x20).reason.startswith("PK without P")
    assert pfec.verdict(0x29).reason.startswith("PK with RSVD")
    assert pfec.verdict(0x31).reason.startswith("PK with F")


def test_only_the_low_half_reaches_the_handler():
    """The nested bits 32 and up are cut off before Linux 6.1's fault handler sees the code."""
    assert pfec.handled(np.array([0x100000007, 0x200000006], dtype=np.uint64)).tolist() == [7, 6]
    assert pfec.from_npt(0x200000006) == 0x200000006


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: pfec.ept_violation(8, READ), "0 to 7"),
        (lambda: pfec.ept_violation(0, 0), "READ=1"),
        (lambda: pfec.can_be_fast(7, "3.6"), "expected one of '2012 series'"),
        (lambda: pfec.from_ept(-1), "-0x1"),
    ],
)
def test_bad_input(call, words):
    """Bad rights, accesses, rules and words are refused by name."""
    with pytest.raises(ValueError, match=words):
        call()
