"""Page-fault error codes: their bits, the codes that EPT and nested paging turn into, and what KVM may do with each.

The one idea: a page-fault error code (PFEC) answers five questions before any walk, and Intel's exit qualification,
AMD's nested-fault code and the code of an ordinary #PF all become the same word before KVM's MMU looks at it.
Chapter 2 builds everything here from the five bits up.

Facts: Linux 6.1 ``arch/x86/kvm/{mmu/mmu.c,vmx/vmx.c,svm/svm.c}``; kvm-unit-tests ``x86/vmx_tests.c`` for what the
hardware reports; the patch series message of 29 March 2012 for its own rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmu.bits import Field, Layout, Word, as_words, like

PFEC = Layout(
    "page-fault error code",
    Field("P", 0, meaning="every level of the walk was present; clear: some entry was not"),
    Field("W", 1, meaning="the access was a write"),
    Field("U", 2, meaning="the access came from user mode (CPL 3)"),
    Field("RSVD", 3, meaning="an entry had a reserved bit set"),
    Field("F", 4, meaning="the access was an instruction fetch (I/D); reported only with EFER.NXE or CR4.SMEP"),
    Field("PK", 5, meaning="a protection key refused the access"),
    Field("SS", 6, meaning="shadow-stack access"),
    Field("HLAT", 7, meaning="the walk was a HLAT walk"),
    Field("SGX", 15, meaning="SGX access control refused the access"),
    Field("RMP", 31, meaning="SEV-SNP's reverse map refused the access"),
    Field("GUEST_FINAL", 32, meaning="nested fault on the final address of the guest's access"),
    Field("GUEST_PAGE", 33, meaning="nested fault while the guest's own page tables were walked"),
    Field("GUEST_ENC", 34, meaning="SEV-SNP: the guest's mapping was encrypted"),
    Field("GUEST_SIZEM", 35, meaning="SEV-SNP: page size mismatch"),
    Field("GUEST_VMPL", 36, meaning="SEV-SNP: the VM privilege level refused the access"),
    Field("IMPLICIT_ACCESS", 48, meaning="set by KVM alone: a supervisor access that an instruction implies"),
    Field("PRIVATE_ACCESS", 49, meaning="set by KVM alone, since 6.10: the access was to private memory"),
    source="Linux 6.1 and 6.12 asm/kvm_host.h; bit 7 from memory of Intel's manual, to be confirmed",
)
"""The bits of a page-fault error code, architectural (0 to 31), nested (32 to 36) and KVM's own (48 and up)."""

EPT_QUALIFICATION = Layout(
    "EPT exit qualification",
    Field("READ", 0, meaning="the access was a data read"),
    Field("WRITE", 1, meaning="the access was a data write"),
    Field("FETCH", 2, meaning="the access was an instruction fetch"),
    Field("ENTRY_R", 3, meaning="the EPT entries, ANDed over the levels, allow reads"),
    Field("ENTRY_W", 4, meaning="the EPT entries allow writes"),
    Field("ENTRY_X", 5, meaning="the EPT entries allow fetches (with MBEC: supervisor fetches)"),
    Field("ENTRY_XU", 6, meaning="with MBEC: the EPT entries allow user fetches; KVM 6.1 does not look"),
    Field("GLA_VALID", 7, meaning="the guest linear address is known"),
    Field("FINAL", 8, meaning="the fault was on the final address; clear: on a guest page-table entry"),
    Field("GLA_USER", 9, meaning="advanced information: user-mode linear address"),
    Field("GLA_WRITE", 10, meaning="advanced information: the linear address is writable"),
    Field("GLA_NX", 11, meaning="advanced information: the linear address is not executable"),
    Field("NMI_UNBLOCK", 12, meaning="an IRET had unblocked NMIs"),
    Field("SHADOW_STACK", 13, meaning="shadow-stack access (from memory of Intel's manual)"),
    Field("SUPERVISOR_SS", 14, meaning="supervisor shadow-stack bit of the entries (from memory of Intel's manual)"),
    Field("GUEST_PAGING", 15, meaning="guest-paging verification (from memory of Intel's manual)"),
    Field("ASYNC", 16, meaning="not caused by an instruction's own access (from memory of Intel's manual)"),
    source="bits 0 to 8: Linux 6.1 vmx.c and kvm-unit-tests vmx_tests.c; 9 to 12: kvm-unit-tests and recorded traces",
)
"""The bits of the exit qualification that an EPT violation (VM exit 48) leaves."""

P, W, U, RSVD, F, PK = (np.uint64(PFEC.mask(name)) for name in ("P", "W", "U", "RSVD", "F", "PK"))
_GUEST_FINAL, _GUEST_PAGE = np.uint64(PFEC.mask("GUEST_FINAL")), np.uint64(PFEC.mask("GUEST_PAGE"))
_NONE = np.uint64(0)

EPT_MISCONFIG = int(RSVD)
"""KVM answers an EPT misconfiguration (VM exit 49) with this error code, RSVD alone and no P (Linux 6.1 vmx.c)."""


def from_ept(qualification: Word) -> Any:
    """The error code that KVM 6.1 makes of an EPT violation's exit qualification; any shape, uint64.

    A read becomes U, a write W, a fetch F; P is set when the entries allow anything at all (any of bits 3 to 5);
    bit 8 tells GUEST_FINAL from GUEST_PAGE. Bit 6 (MBEC) is not looked at. Source: Linux 6.1 vmx.c,
    ``handle_ept_violation``. Chapter 2.

    >>> PFEC.text(from_ept(0x1aa))
    'P|W|GUEST_FINAL'
    >>> PFEC.text(from_ept(0x683))  # a guest page-table walk, reported as read and write at once
    'W|U|GUEST_PAGE'
    """
    q = as_words(qualification, EPT_QUALIFICATION.name)
    mask = {name: np.uint64(EPT_QUALIFICATION.mask(name)) for name in EPT_QUALIFICATION}
    any_right = mask["ENTRY_R"] | mask["ENTRY_W"] | mask["ENTRY_X"]
    code = (
        np.where(q & mask["READ"], U, _NONE)
        | np.where(q & mask["WRITE"], W, _NONE)
        | np.where(q & mask["FETCH"], F, _NONE)
        | np.where(q & any_right, P, _NONE)
        | np.where(q & mask["FINAL"], _GUEST_FINAL, _GUEST_PAGE)
    )
    return like(qualification, code)


def from_npt(exitinfo1: Word) -> Any:
    """The error code that KVM 6.1 makes of a nested page fault's EXITINFO1: the same word; any shape, uint64.

    AMD reports a nested fault in the layout of a page-fault error code already: low bits as for a #PF, with U set for
    each access of a guest (from memory of AMD's manual; so in every recorded trace), and bit 32 or 33 for the place.
    Only its low 32 bits reach the fault handler (:func:`handled`). Source: Linux 6.1 svm.c, ``npf_interception``.
    Chapter 2.

    >>> PFEC.text(from_npt(0x200000006))
    'W|U|GUEST_PAGE'
    """
    return like(exitinfo1, as_words(exitinfo1, "EXITINFO1"))


def handled(code: Word) -> Any:
    """The part of an error code that reaches KVM 6.1's fault handler: its low 32 bits. Any shape, uint64. Chapter 2.

    >>> hex(handled(0x100000007))
    '0x7'
    """
    return like(code, as_words(code, PFEC.name) & np.uint64(0xFFFF_FFFF))


R_EPT, W_EPT, X_EPT, XU_EPT = 1, 2, 4, 8
"""Rights of an EPT entry for :func:`ept_violation`: read, write, execute and, with MBEC, user execute."""

MISCONFIGURED = np.int64(-1)
"""What :func:`ept_violation` returns for rights that the hardware refuses to read (VM exit 49)."""


def ept_violation(
    rights: ArrayLike, access: ArrayLike, *, exec_only: bool = True, mbec: bool = False, user: ArrayLike = False
) -> NDArray[np.int64]:
    """The exit qualification with which EPT answers an access to a final address, bits 9 and up left out.

    Args:
        rights: the entry's rights, ANDed over the levels: ``R_EPT | W_EPT | X_EPT`` and, with ``mbec``, ``XU_EPT``.
        access: ``READ``, ``WRITE`` or ``FETCH`` bits as in :data:`EPT_QUALIFICATION` (1, 2, 4).
        exec_only: the CPU allows entries that can be executed but not read.
        mbec: mode-based execute control: a user fetch is judged by ``XU_EPT``, a supervisor fetch by ``X_EPT``.
        user: the access comes from user mode; matters to fetches under ``mbec`` alone.

    Returns:
        int64, arguments broadcast: 0 where the access passes, :data:`MISCONFIGURED` where the entry is malformed.

    Source: kvm-unit-tests ``x86/vmx_tests.c``. Chapter 2.

    >>> [hex(q) for q in ept_violation([0, R_EPT, X_EPT], [1, 2, 1]).tolist()]
    ['0x181', '0x18a', '0x1a1']
    """
    return _violation(rights, access, exec_only=exec_only, mbec=mbec, user=user, base=0x180)


def ept_walk_violation(
    rights: ArrayLike, *, ept_ad: bool, update: ArrayLike, exec_only: bool = True
) -> NDArray[np.int64]:
    """The exit qualification with which EPT answers a guest's page walk, when the walk reads a guest page-table page.

    Args:
        rights: what EPT allows on the guest page-table page.
        ept_ad: EPT's accessed and dirty bits are on; each access to a guest page-table entry then counts as a write.
        update: the guest entry's A or D bit must be set for this access.
        exec_only: as for :func:`ept_violation`.

    Returns:
        int64, arguments broadcast: 0 where the walk passes, :data:`MISCONFIGURED` where the entry is malformed.
        With ``ept_ad`` off the entry is read first, then read and written if A or D must be set.

    Source: kvm-unit-tests ``x86/vmx_tests.c``; the row of execute-only pages is inferred from the others. Chapter 2.

    >>> [hex(q) for q in ept_walk_violation([0, R_EPT], ept_ad=True, update=False).tolist()]
    ['0x83', '0x8b']
    """
    write = _violation(rights, 3, exec_only=exec_only, base=0x80)  # (case,)
    first = write if ept_ad else _violation(rights, 1, exec_only=exec_only, base=0x80)  # (case,)
    return np.where(first != 0, first, np.where(np.asarray(update, dtype=np.bool_), write, np.int64(0)))


def _violation(
    rights: ArrayLike,
    access: ArrayLike,
    *,
    exec_only: bool,
    base: int,
    mbec: bool = False,
    user: ArrayLike = False,
) -> NDArray[np.int64]:
    rights, access, user = np.broadcast_arrays(
        np.asarray(rights, dtype=np.int64), np.asarray(access, dtype=np.int64), np.asarray(user, dtype=np.bool_)
    )
    limit = 15 if mbec else 7
    if rights.size and (rights.min() < 0 or rights.max() > limit):
        raise ValueError(f"EPT rights are {rights.min()} to {rights.max()}; expected 0 to {limit} (R=1 W=2 X=4 XU=8)")
    if access.size and (access.min() < 1 or access.max() > 7):
        raise ValueError(f"EPT access is {access.min()} to {access.max()}; expected READ=1, WRITE=2, FETCH=4 or a sum")
    judge = np.where(user & mbec, rights >> 3, rights >> 2) & 1  # the bit that a fetch is judged by
    allowed = (rights & 3) | judge << 2
    readable, writable, executable = rights & R_EPT, rights & W_EPT, rights & (X_EPT | XU_EPT)
    malformed = (writable != 0) & (readable == 0)
    if not exec_only:
        malformed |= (executable != 0) & (readable == 0)
    qualification = base | access | rights << 3
    return np.where(malformed, MISCONFIGURED, np.where(access & ~allowed, qualification, np.int64(0)))


# What each error code allows -----------------------------------------------------------------------------------------

SERIES_2012 = "2012 series"
LINUX_61_AD = "Linux 6.1, A/D bits on"
LINUX_61_NO_AD = "Linux 6.1, A/D bits off"

SOURCES = {
    SERIES_2012: "patch series message of 29 March 2012: P=1 and RSVD=0",
    LINUX_61_AD: "Linux 6.1 mmu.c, page_fault_can_be_fast, with accessed/dirty bits in use",
    LINUX_61_NO_AD: "Linux 6.1 mmu.c, page_fault_can_be_fast, without accessed/dirty bits",
}
"""The three rules a verdict answers for, and where each was read."""


@dataclass(frozen=True)
class Verdict:
    """What one rule says of an error code: ``fast``, ``slow`` or ``impossible``, and why."""

    verdict: str
    reason: str


def impossible(code: Word) -> Any:
    """True where no fault can carry this error code: RSVD without P, W with F, PK without P, with RSVD or with F.

    Any shape, bool. A reserved bit is found only in a present entry; no access is both a write and a fetch;
    protection keys are asked last, and not for fetches. KVM *makes* one such code itself: RSVD alone stands for an
    EPT misconfiguration (:data:`EPT_MISCONFIG`). Sources: Linux 6.1 ``__reset_rsvds_bits_mask`` and
    ``permission_fault``; kvm-unit-tests ``x86/access.c``. Chapter 2.

    >>> [hex(code) for code in range(32) if impossible(code)][:4]
    ['0x8', '0xa', '0xc', '0xe']
    """
    c = as_words(code, PFEC.name)
    p, w, rsvd, f, pk = ((c & bit) != 0 for bit in (P, W, RSVD, F, PK))
    return like(code, (rsvd & ~p) | (w & f) | (pk & (~p | rsvd | f)))


def can_be_fast(code: Word, rule: str = LINUX_61_AD) -> Any:
    """True where ``rule`` makes a fault with this error code a candidate for repair without the mmu-lock.

    Any shape, bool. A candidate is not yet a repair: the spte decides (chapter 3). The code is taken at its word,
    possible or not.

    Raises:
        ValueError: ``rule`` is none of :data:`SOURCES`.

    >>> can_be_fast(PFEC.parse("P|W")), can_be_fast(PFEC.parse("P|U")), can_be_fast(PFEC.parse("P|U"), SERIES_2012)
    (True, False, True)
    """
    c = as_words(code, PFEC.name)
    p, w, rsvd = ((c & bit) != 0 for bit in (P, W, RSVD))
    if rule == SERIES_2012:
        fast = p & ~rsvd
    elif rule == LINUX_61_AD:
        fast = p & w & ~rsvd
    elif rule == LINUX_61_NO_AD:
        fast = (w | ~p) & ~rsvd
    else:
        raise ValueError(f"rule is {rule!r}; expected one of {', '.join(map(repr, SOURCES))}")
    return like(code, fast)


def verdict(code: int, rule: str = LINUX_61_AD) -> Verdict:
    """What ``rule`` says of one error code, with the reason in a sentence. Chapter 2.

    >>> verdict(0x7)
    Verdict(verdict='fast', reason='a write met a present entry that refused it: setting W may be all it needs')
    """
    if impossible(code):
        return Verdict("impossible", _why_impossible(code))
    fast = can_be_fast(code, rule)
    bit = {name: bool(PFEC.field(code, name)) for name in ("P", "W", "U", "RSVD", "F")}
    if bit["RSVD"]:
        reason = "a reserved bit was set: in a shadow page table that is how KVM marks MMIO, and emulation answers it"
    elif not bit["P"]:
        reason = {
            SERIES_2012: "an entry was missing: someone must find the page and build the path, under the lock",
            LINUX_61_AD: "an entry was missing: someone must find the page and build the path, under the lock",
            LINUX_61_NO_AD: "an entry looked missing: without A/D bits KVM hides pages this way to see them used, "
            "and may give the saved rights back",
        }[rule]
    elif bit["W"]:
        reason = "a write met a present entry that refused it: setting W may be all it needs"
    elif rule == SERIES_2012:
        reason = "every level was present: whatever was refused, more permission in the last entry may be all it needs"
    else:
        access = "fetch" if bit["F"] else "read"
        reason = f"a {access} met a present entry that refused it: no lock-free repair adds that right"
    return Verdict("fast" if fast else "slow", reason)


def _why_impossible(code: int) -> str:
    bit = {name: bool(PFEC.field(code, name)) for name in PFEC}
    if bit["RSVD"] and not bit["P"]:
        return "RSVD without P: a reserved bit is only looked for in a present entry"
    if bit["W"] and bit["F"]:
        return "W with F: no access is both a write and an instruction fetch"
    if not bit["P"]:
        return "PK without P: protection keys are asked only when every level was present"
    if bit["RSVD"]:
        return "PK with RSVD: protection keys are asked only when no reserved bit was found"
    return "PK with F: protection keys do not apply to instruction fetches"


def describe(code: int) -> str:
    """One error code as a sentence; of a nested fault's U it says nothing, since there U is no sign of user mode.

    Chapter 2.

    >>> describe(0x7)
    'a write from user mode was refused by a present entry'
    >>> describe(0x200000006)
    'a write met a missing entry, while the guest’s own page tables were walked'
    """
    bit = {name: bool(PFEC.field(code, name)) for name in PFEC}
    what = " and ".join(name for name, on in (("a write", bit["W"]), ("an instruction fetch", bit["F"])) if on)
    sentence = what or "a read"
    if not (bit["GUEST_FINAL"] or bit["GUEST_PAGE"]):
        sentence += f" from {'user' if bit['U'] else 'supervisor'} mode"
    if bit["RSVD"]:
        sentence += " met an entry with a reserved bit set"
    elif bit["PK"]:
        sentence += " was refused by a protection key"
    elif bit["P"]:
        sentence += " was refused by a present entry"
    else:
        sentence += " met a missing entry"
    if bit["GUEST_PAGE"]:
        sentence += ", while the guest’s own page tables were walked"
    elif bit["GUEST_FINAL"]:
        sentence += ", at the guest’s final address"
    return sentence
