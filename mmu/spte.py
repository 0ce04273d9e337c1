"""Shadow page-table entries (sptes): their bits by format and kernel, the states they can be in, the legal changes.

The one idea: an spte is one 64-bit word that two readers share. The CPU reads some bits, only KVM reads others, and
three of them (HOST_W, MMU_W, W) say whether a page may be written, and if not, who forbade it and who may lift that.
Chapter 3 builds such a word bit by bit.

Facts: Linux 3.4 and 3.6 ``arch/x86/kvm/mmu.c``; 5.10, 6.1 and 6.12 ``arch/x86/kvm/mmu/spte.{h,c}``; the patch series
message of 29 March 2012. What no source states is marked inferred.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmu.bits import Field, Layout, Word, as_words, like

# The states an spte can be in ----------------------------------------------------------------------------------------

STATES = (
    "none",
    "removed",
    "frozen",
    "mmio",
    "non-leaf",
    "writable",
    "write-protected: dirty log",
    "write-protected: guest page table",
    "write-protected: host read-only",
    "write-protected",
    "write-protected: marked",
    "access-tracked",
    "illegal",
    "unknown",
)
"""Every state's name; :func:`classify` returns positions in this tuple."""

(
    NONE,
    REMOVED,
    FROZEN,
    MMIO,
    NON_LEAF,
    WRITABLE,
    DIRTY_LOG,
    GUEST_TABLE,
    HOST_READ_ONLY,
    PROTECTED,
    MARKED,
    ACCESS_TRACKED,
    ILLEGAL,
    UNKNOWN,
) = range(len(STATES))

MEANINGS = (
    "nothing is mapped here",
    "another thread is taking this entry away: hands off until the TLBs are flushed (TDP MMU only)",
    "another thread is changing this entry: hands off until it is done (TDP MMU only)",
    "no memory slot covers the gfn, so each access faults with a reserved bit and is emulated",
    "points to the next lower page table; it grants everything and leaves the decision to the leaf",
    "the guest may write",
    "W alone was taken away, to learn of the next write, and a fault may set it without the mmu-lock",
    "KVM has withheld MMU_W as well: the gfn is a shadowed guest page table, or the guest's own entry grants no write",
    "the host maps the page read-only (zero page, copy-on-write, read-only slot) and must be asked first",
    "W was taken away, and why is not said here: the 2012 series keeps that in the rmap (PTE_LIST_WRITE_PROTECT)",
    "a vCPU has left its identification here and will set W, if nobody else touches the word before",
    "the CPU sees no rights, so that KVM learns of the next access, which brings the saved ones back",
    "this is what no kernel makes: W needs MMU_W, MMU_W needs HOST_W, and the CPU must accept the entry",
    "not present, and none of the special values",
)
"""What each state means, in a few words, in the order of :data:`STATES`."""

LEAVES = (WRITABLE, DIRTY_LOG, GUEST_TABLE, HOST_READ_ONLY, PROTECTED, MARKED, ACCESS_TRACKED)
"""The states of a present leaf, an entry that maps a page."""


# Layouts -------------------------------------------------------------------------------------------------------------

_FIELDS = {
    # Linux 3.4 with the 2012 series: one software bit, and an id where there was room
    "2012-ept": "R:0 W:1 X:2 MT:3-5 IPAT:6 PS:7 HOST_W:9 PFN:12-48 ID:49-56",
    "2012-shadow": "P:0 W:1 U:2 PWT:3 PCD:4 A:5 D:6 PS:7 G:8 HOST_W:9 PFN:12-51 AVL:52-62 NX:63",
    # Linux 3.6, what was merged: two software bits and no id
    "3.6-ept": "R:0 W:1 X:2 MT:3-5 IPAT:6 PS:7 A:8 D:9 HOST_W:10 MMU_W:11 PFN:12-51",
    "3.6-shadow": "P:0 W:1 U:2 PWT:3 PCD:4 A:5 D:6 PS:7 G:8 HOST_W:10 MMU_W:11 PFN:12-51 AVL:52-62 NX:63",
    # Linux 5.10: accesses can be tracked without A/D bits
    "5.10-ept": "R:0 W:1 X:2 MT:3-5 IPAT:6 PS:7 A:8 D:9 HOST_W:10 MMU_W:11 PFN:12-51 AD_KIND:52-53 "
    "SAVED_R:54 SAVED_X:56 SSS:60 SPP:61 SVE:63",
    "5.10-shadow": "P:0 W:1 U:2 PWT:3 PCD:4 A:5 D:6 PS:7 G:8 HOST_W:10 MMU_W:11 PFN:12-51 AD_KIND:52-53 NX:63",
    # Linux 6.1 and 6.12: a present bit of KVM's own, and EPT's software bits moved out of the way
    "6.1-ept": "R:0 W:1 X:2 MT:3-5 IPAT:6 PS:7 A:8 D:9 XU:10 MMU_P:11 PFN:12-51 AD_KIND:52-53 "
    "SAVED_R:54 SAVED_X:56 HOST_W:57 MMU_W:58 SSS:60 SPP:61 SVE:63",
    "6.1-npt": "P:0 W:1 U:2 PWT:3 PCD:4 A:5 D:6 PS:7 G:8 HOST_W:9 MMU_W:10 MMU_P:11 PFN:12-51 AD_KIND:52-53 NX:63",
}
_FIELDS |= {name.replace("6.1-", "6.12-"): fields for name, fields in _FIELDS.items() if name.startswith("6.1-")}

_MMIO_FIELDS = {
    "3-ept": "MISCONFIG:1-2 GFN:12-48 MAGIC:49-56",
    "3-shadow": "P:0 W:1 U:2 GFN:12-51 MAGIC:52-62",
    "5.10-ept": "MISCONFIG:0-2 GEN_LOW:3-11 GFN:12-51 MAGIC:52-53 GEN_HIGH:54-62",
    "5.10-shadow": "P:0 W:1 U:2 GEN_LOW:3-11 GFN:12-50 RSVD:51 MAGIC:52-53 GEN_HIGH:54-62",
    "6-ept": "MISCONFIG:0-2 GEN_LOW:3-10 GFN:12-51 GEN_HIGH:52-62",
    "6-npt": "P:0 W:1 U:2 GEN_LOW:3-10 GFN:12-50 RSVD:51 GEN_HIGH:52-62",
}

_MEANING = {
    "P": "present: clear, and the CPU ignores every other bit",
    "R": "the CPU may read",
    "W": "the CPU may write",
    "U": "user mode may use the page; nested paging requires it",
    "X": "the CPU may execute",
    "NX": "no execute",
    "XU": "with mode-based execute control: user mode may execute; these kernels leave it clear",
    "PWT": "memory type, with PCD and PAT",
    "PCD": "memory type, with PWT and PAT",
    "MT": "memory type of a leaf: 0 UC, 1 WC, 4 WT, 5 WP, 6 WB",
    "IPAT": "ignore the guest's PAT: the memory type in MT is final",
    "PS": "above the last level: a large page, not a table",
    "A": "accessed: the CPU has walked through this entry",
    "D": "dirty: the CPU has written through this leaf",
    "G": "global: survives a CR3 load; KVM never sets it",
    "SSS": "supervisor shadow stack (from memory of Intel's manual)",
    "SPP": "sub-page write permission (from memory of Intel's manual)",
    "SVE": "suppress #VE: a violation here is a VM exit, never a virtualization exception",
    "PFN": "page frame number: of the page, or of the next table",
    "HOST_W": "the host's own mapping of the page is writable",
    "MMU_W": "nothing in KVM forbids writing: W may be set without the mmu-lock",
    "MMU_P": "KVM's own present bit: memory stands behind the entry, readable or not",
    "AD_KIND": "how accesses and writes are learnt: 0 by A/D bits, 1 without them, 2 A by its bit, writes by faults",
    "SAVED_R": "R of an access-tracked entry, kept while the CPU sees none",
    "SAVED_X": "X of an access-tracked entry, kept while the CPU sees none",
    "ID": "vCPU id, 0 nobody: 8 bits by the message; that they are 49 to 56 is inferred",
    "AVL": "ignored by the CPU, unused by KVM; whether the 7 id bits of 2012 are among these is unknown",
    "MISCONFIG": "write and execute without read: each access is an EPT misconfiguration",
    "MAGIC": "all ones: MMIO",
    "RSVD": "a reserved address bit: each access faults with RSVD",
    "GFN": "guest frame number",
    "GEN_LOW": "memslot generation, its low bits",
    "GEN_HIGH": "memslot generation, its high bits",
}

_SOFTWARE = ("HOST_W", "MMU_W", "MMU_P", "AD_KIND", "SAVED_R", "SAVED_X", "ID", "AVL")


@dataclass(frozen=True)
class Identification:
    """The 2012 series' vCPU id inside an spte: 0 is nobody, each vCPU has its own number (chapters 9 and 10).

    ``low`` is None where the field's position is not known.
    """

    width: int
    low: int | None
    note: str


@dataclass(frozen=True)
class SpteLayout:
    """How one kernel lays out the sptes of one kind of page table. Chapter 3.

    Attributes:
        name: as the command line knows it, for example ``6.1-npt``.
        kernel: in words.
        bits: the fields of a present spte.
        mmio: the fields of an MMIO spte.
        mmio_mask, mmio_value: the word is an MMIO spte when ``word & mmio_mask == mmio_value``. Bit 51 must be a
            reserved address bit for that: on a CPU with 52 address bits KVM caches no MMIO in ordinary tables.
        present: the field that is set in every present spte; None where any word but 0 and MMIO is present.
        none: the value of an entry that maps nothing.
        busy: the value that keeps other threads off, and its state; None before the TDP MMU's threads ran in parallel.
        identification: the vCPU id, in the 2012 series alone.
    """

    name: str
    kernel: str
    bits: Layout
    mmio: Layout
    mmio_mask: int
    mmio_value: int
    present: str | None
    none: int = 0
    busy: tuple[int, int] | None = None
    identification: Identification | None = None

    @property
    def ept(self) -> bool:
        """Intel's extended page tables; else the ordinary format, which shadow paging and AMD's NPT share."""
        return "R" in self.bits

    @property
    def software(self) -> tuple[str, ...]:
        """The fields that only KVM reads."""
        return tuple(name for name in self.bits if name in _SOFTWARE)

    @property
    def hardware(self) -> tuple[str, ...]:
        """The fields that the CPU reads or writes."""
        return tuple(name for name in self.bits if name not in _SOFTWARE)

    @property
    def usable_ids(self) -> int:
        """How many vCPUs can have an id of their own; 0 where sptes carry none.

        Of ``2**width`` values 0 means nobody. One more is lost where an id of all ones, on a leaf with its rights set,
        would have every bit of the MMIO mask set. That this is why the message says 254 on EPT and not 255 is
        inferred; that 7 bits give 127 on shadow paging needs no position: 7 bits cannot fill the mask's 11.

        >>> LAYOUTS["2012-ept"].usable_ids, LAYOUTS["2012-shadow"].usable_ids, LAYOUTS["6.1-ept"].usable_ids
        (254, 127, 0)
        """
        if self.identification is None:
            return 0
        width, low = self.identification.width, self.identification.low
        leaf = 0 if low is None else self.bits.mask("ID", "R", "W", "X")
        return (1 << width) - 1 - (low is not None and self.mmio_mask & ~leaf == 0)


def _fields(text: str) -> list[Field]:
    found = []
    for word in text.split():
        name, _, where = word.partition(":")
        low, _, top = where.partition("-")
        found.append(Field(name, int(low), int(top or low) - int(low) + 1, _MEANING[name]))
    return found


_KERNEL = {
    "2012": "Linux 3.4 with the series of 29 March 2012",
    "3.6": "Linux 3.6",
    "5.10": "Linux 5.10",
    "6.1": "Linux 6.1",
    "6.12": "Linux 6.12",
}
_SOURCE = {
    "2012": "Linux 3.4 mmu.c, vmx.c, x86.c; the series message for the width of the id",
    "3.6": "Linux 3.6 mmu.c (a72faf2504df), vmx.c, x86.c",
    "5.10": "Linux 5.10 mmu/spte.h (6facedb196ba), spte.c",
    "6.1": "Linux 6.1 mmu/spte.h, spte.c",
    "6.12": "Linux 6.12 mmu/spte.h, spte.c",
}


def _layout(name: str, mmio: str, mask: int, value: int, present: str | None, **rest: Any) -> SpteLayout:
    kernel, table = name.split("-")
    serves = "EPT" if table == "ept" else "shadow paging" if kernel == "2012" else "NPT and shadow paging"
    bits = Layout(f"{name} spte", *_fields(_FIELDS[name]), source=_SOURCE[kernel])
    special = Layout(f"{name} MMIO spte", *_fields(_MMIO_FIELDS[mmio]), source=_SOURCE[kernel])
    return SpteLayout(name, f"{_KERNEL[kernel]}, {serves}", bits, special, mask, value, present, **rest)


_ID_EPT = Identification(
    8,
    49,
    "8 bits for 254 vCPUs by the message; that they are bits 49 to 56, where the MMIO mask of Linux 3.4 has its ones, "
    "is inferred from the one id that is missing",
)
_ID_SHADOW = Identification(7, None, "7 bits for 127 = 2^7-1 vCPUs by the message; their position is unknown")
_ONES_EPT = 0xFF << 49 | 0b110
_ONES = 0x7FF << 52  # the mask is bits MAXPHYADDR to 62 and bit 0: of these, 52 to 62 are set on every machine
_KIND_3 = 3 << 52
_RSVD_P = 1 << 51 | 1
_REMOVED = {"busy": (0x5A0, REMOVED)}
_SVE = 1 << 63  # since 6.10 in every entry that maps nothing, and in EPT's present ones, so that #VE is suppressed
_FROZEN = {"none": _SVE, "busy": (_SVE | 0x5A0, FROZEN)}

LAYOUTS = {
    layout.name: layout
    for layout in (
        _layout("2012-ept", "3-ept", _ONES_EPT, _ONES_EPT, "R", identification=_ID_EPT),
        _layout("2012-shadow", "3-shadow", _ONES, _ONES, "P", identification=_ID_SHADOW),
        _layout("3.6-ept", "3-ept", _ONES_EPT, _ONES_EPT, "R"),
        _layout("3.6-shadow", "3-shadow", _ONES, _ONES, "P"),
        _layout("5.10-ept", "5.10-ept", _KIND_3, _KIND_3, None),
        _layout("5.10-shadow", "5.10-shadow", _KIND_3, _KIND_3, None),
        _layout("6.1-ept", "6-ept", 0b111, 0b110, "MMU_P", **_REMOVED),
        _layout("6.1-npt", "6-npt", _RSVD_P, _RSVD_P, "MMU_P", **_REMOVED),
        _layout("6.12-ept", "6-ept", 0b111 | _SVE, 0b110, "MMU_P", **_FROZEN),
        _layout("6.12-npt", "6-npt", _RSVD_P, _RSVD_P, "MMU_P", **_FROZEN),
    )
}
"""Every layout by its name. ``-npt`` also serves shadow paging: from 5.13 on one set of bits serves both."""

DEFAULT = "6.1-npt"
"""The layout that is meant when none is named."""


def layout_named(name: str | SpteLayout) -> SpteLayout:
    """The layout of that name (a layout passes through).

    Raises:
        ValueError: there is no such layout; the message lists those that exist.
    """
    if isinstance(name, SpteLayout):
        return name
    try:
        return LAYOUTS[name]
    except KeyError:
        raise ValueError(f"layout is {name!r}; expected one of {', '.join(LAYOUTS)}") from None


# Reading -------------------------------------------------------------------------------------------------------------

_BLOCK = 1 << 14  # entries at a time: all temporaries of a block stay in the CPU's L2 cache

_LEAF_STATE = np.full(8, ILLEGAL, dtype=np.uint8)  # (HOST_W MMU_W W)
_LEAF_STATE[[0b111, 0b110, 0b100, 0b000]] = WRITABLE, DIRTY_LOG, GUEST_TABLE, HOST_READ_ONLY


def _mask(layout: SpteLayout, *names: str) -> np.uint64:
    return np.uint64(sum(layout.bits[name].mask for name in names if name in layout.bits))


def is_mmio(words: Word, layout: str | SpteLayout = DEFAULT) -> Any:
    """True where the word is an MMIO spte; any shape, bool. Chapter 3.

    >>> is_mmio(0x8000080000027)
    True
    """
    form = layout_named(layout)
    w = as_words(words, form.bits.name)
    return like(words, (w & np.uint64(form.mmio_mask)) == np.uint64(form.mmio_value))


def is_present(words: Word, layout: str | SpteLayout = DEFAULT) -> Any:
    """True where memory stands behind the entry (``is_shadow_present_pte``); any shape, bool. Chapter 3.

    Bit 11 says so since 5.13. Before, any word but 0 and MMIO was present (5.10), or any with P set (3.6).

    >>> is_present(0x5a0), is_present(0x625ae65)
    (False, True)
    """
    form = layout_named(layout)
    w = as_words(words, form.bits.name)
    present = (w != 0) if form.present is None else (w & _mask(form, form.present)) != 0
    if form.present != "MMU_P":
        present = present & ~is_mmio(w, form)
    return like(words, present)


def classify(words: Word, layout: str | SpteLayout = DEFAULT, level: ArrayLike | None = None) -> Any:
    """The state of each spte, as a position in :data:`STATES`; any shape, uint8 (a scalar gives an int). Chapter 3.

    Args:
        words: sptes.
        layout: their layout, or its name.
        level: the page-table level of each (1 is the last), where known. Without it, an entry that could be a pointer
            to a lower table is taken for one; with level 1 the same word is illegal.

    >>> STATES[classify(0x625ae65)], STATES[classify(0x100b1b16827)], STATES[classify(0x5a0)]
    ('write-protected: dirty log', 'non-leaf', 'removed')
    """
    form = layout_named(layout)
    w = as_words(words, form.bits.name)
    flat = w.reshape(-1)  # (entry,)
    levels = None if level is None else np.broadcast_to(np.asarray(level, dtype=np.int64), w.shape).reshape(-1)
    states = np.empty(flat.shape, dtype=np.uint8)
    for block in _blocks(flat.size):
        states[block] = _classify(flat[block], form, None if levels is None else levels[block] == 1)
    return like(words, states.reshape(w.shape))


def _blocks(size: int) -> list[slice]:
    return [slice(start, min(start + _BLOCK, size)) for start in range(0, size, _BLOCK)]


def _classify(w: NDArray[np.uint64], form: SpteLayout, last: NDArray[np.bool_] | None) -> NDArray[np.uint8]:
    def has(*names: str) -> NDArray[np.bool_]:
        return (w & _mask(form, *names)) != 0

    writable, host = has("W"), has("HOST_W")
    mmu = has("MMU_W") if "MMU_W" in form.bits else host  # before 3.6 nothing but the rmap said why
    three = host.view(np.uint8) << np.uint8(2) | mmu.view(np.uint8) << np.uint8(1) | writable.view(np.uint8)
    state = _LEAF_STATE.take(three)  # (entry,)

    # A pointer to a lower table has W set and neither software bit; no leaf has that.
    table = (three == 1) & ~has("PS", "D", "MT")
    if last is not None:
        table &= ~last
    state[table] = NON_LEAF

    if form.identification is not None:
        state[state == DIRTY_LOG] = PROTECTED
        if "ID" in form.bits:
            state[(state == PROTECTED) & has("ID")] = MARKED
    if form.ept:
        malformed = writable & ~has("R")
        memory_type = (w & _mask(form, "MT")) >> np.uint64(3)
        malformed |= (memory_type == 2) | (memory_type == 3) | (memory_type == 7)
        state[malformed] = ILLEGAL
        if "AD_KIND" in form.bits:
            hidden = ((w & _mask(form, "AD_KIND")) == np.uint64(1 << 52)) & ~has("R", "W", "X")
            state[hidden & (host | ~mmu)] = ACCESS_TRACKED
    else:
        state[~has("P")] = ILLEGAL

    present = is_present(w, form)
    state[~present] = UNKNOWN
    if form.busy is not None:
        state[w == np.uint64(form.busy[0])] = form.busy[1]
    state[is_mmio(w, form) & ~present] = MMIO
    state[(w == 0) | (w == np.uint64(form.none))] = NONE
    return state


def decode(words: Word, layout: str | SpteLayout = DEFAULT, level: ArrayLike | None = None) -> dict[str, Any]:
    """Every field of each spte by name, and its ``state``; any shape. Chapter 3.

    Returns:
        A dict of arrays of the words' shape (ints for a scalar): one for each field of ``layout.bits``, uint8 where
        the field has at most 8 bits and lies within one byte, else uint64; and ``state``, uint8, positions in
        :data:`STATES`. The fields are those of a present spte; what an MMIO spte says is read by :func:`mmio`.

    >>> entry = decode(0x625ae65)
    >>> hex(entry["PFN"]), entry["W"], entry["MMU_W"], STATES[entry["state"]]
    ('0x625a', 0, 1, 'write-protected: dirty log')
    """
    form = layout_named(layout)
    w = as_words(words, form.bits.name)
    flat = np.ascontiguousarray(w.reshape(-1), dtype="<u8")  # (entry,) the bytes below count from the lowest
    levels = None if level is None else np.broadcast_to(np.asarray(level, dtype=np.int64), w.shape).reshape(-1)
    small = [field for field in form.bits.values() if field.low // 8 == field.top // 8]
    large = [field for field in form.bits.values() if field not in small]
    columns: dict[str, NDArray[Any]] = {
        name: np.empty(flat.shape, dtype=np.uint64 if form.bits[name] in large else np.uint8) for name in form.bits
    }
    columns["state"] = np.empty(flat.shape, dtype=np.uint8)
    for block in _blocks(flat.size):
        entries = flat[block]  # (entry,)
        by_byte = np.ascontiguousarray(entries.view(np.uint8).reshape(-1, 8).T)  # (byte, entry)
        for field in small:
            shift, mask = field.low % 8, (1 << field.width) - 1
            np.bitwise_and(by_byte[field.low // 8] >> np.uint8(shift), np.uint8(mask), out=columns[field.name][block])
        for field in large:
            shift, mask = np.uint64(field.low), np.uint64(field.mask >> field.low)
            np.bitwise_and(entries >> shift, mask, out=columns[field.name][block])
        columns["state"][block] = _classify(entries, form, None if levels is None else levels[block] == 1)
    return {name: like(words, column.reshape(w.shape)) for name, column in columns.items()}


def unnamed(words: Word, layout: str | SpteLayout = DEFAULT) -> Any:
    """The bits of each spte that its layout has no name for, in place; any shape, uint64. Chapter 3.

    An MMIO spte is judged by the fields of an MMIO spte, and a removed or frozen one is a constant: nothing is left.

    >>> hex(unnamed(0x625ae65)), hex(unnamed(1 << 62 | 0x625ae65))
    ('0x0', '0x4000000000000000')
    """
    form = layout_named(layout)
    w = as_words(words, form.bits.name)
    states = classify(w, form)
    rest = np.where(states == MMIO, form.mmio.unnamed(w), form.bits.unnamed(w))
    constant = (states == NONE) | (states == REMOVED) | (states == FROZEN)
    return like(words, np.where(constant, np.uint64(0), rest))


# MMIO sptes ----------------------------------------------------------------------------------------------------------


def mmio(words: Word, layout: str | SpteLayout = DEFAULT, *, l1tf: int = 0) -> dict[str, Any]:
    """What each MMIO spte says: ``gfn``, ``generation`` and ``access`` (W is 2, U is 4); any shape, uint64. Chapter 3.

    ``l1tf`` is :func:`mmu.update.l1tf_mask` of the CPU, 0 on a CPU without that bug. Words that are no MMIO spte
    (:func:`is_mmio`) give values without a meaning.

    >>> mmio(0x8000080000027)
    {'gfn': 524288, 'generation': 4, 'access': 6}
    """
    form = layout_named(layout)
    w = as_words(words, form.mmio.name)
    gfn = form.mmio["GFN"].mask
    below = gfn & ((l1tf & -l1tf) - 1) if l1tf else gfn  # what lies under the five bits stayed where it was
    gpa = w & np.uint64(below) | w >> np.uint64(5) & np.uint64(l1tf)
    generation = np.zeros(w.shape, dtype=np.uint64)
    if "GEN_LOW" in form.mmio:
        low = form.mmio["GEN_LOW"].width
        generation = form.mmio.field(w, "GEN_LOW") | form.mmio.field(w, "GEN_HIGH") << np.uint64(low)
    access = w & np.uint64(0 if form.ept else 0b110)
    found = {"gfn": gpa >> np.uint64(12), "generation": generation, "access": access}
    return {name: like(words, column) for name, column in found.items()}


# What the CPU refuses ------------------------------------------------------------------------------------------------

EPT_CHECKS = (
    "well-formed",
    "not present",
    "memory type",
    "write without read",
    "execute without read",
    "reserved bits",
)
"""What :func:`ept_misconfigured` finds, in its order; from 2 up the CPU answers with an EPT misconfiguration."""


def ept_misconfigured(
    words: Word, level: ArrayLike, *, maxphyaddr: int, exec_only: bool = True, large_1g: bool = True
) -> Any:
    """Which EPT entries the CPU refuses to read, and why: a position in :data:`EPT_CHECKS`; any shape, uint8.

    Args:
        words: EPT entries, leaves and pointers alike.
        level: the level of each, 1 (4 KiB) to 5.
        maxphyaddr: the CPU's physical address width: address bits from there to 51 are reserved.
        exec_only: the CPU allows entries that can be executed but not read.
        large_1g: the CPU has 1 GiB pages.

    Raises:
        ValueError: a level or an address width that does not exist.

    Source: Linux 6.1 mmu.c, ``__reset_rsvds_bits_mask_ept``; Intel's rule is the same. Chapter 3.

    >>> EPT_CHECKS[ept_misconfigured(0x1000005d48fc76, 1, maxphyaddr=46)]  # a real one, reported in 2020
    'write without read'
    """
    w = as_words(words, "EPT entry")
    levels = np.broadcast_to(np.asarray(level, dtype=np.int64), w.shape)
    if levels.size and (levels.min() < 1 or levels.max() > 5):
        raise ValueError(f"level is {levels.min()} to {levels.max()}; expected 1 (4 KiB pages) to 5")
    if not 32 <= maxphyaddr <= 52:
        raise ValueError(f"maxphyaddr is {maxphyaddr}; expected 32 to 52 bits")
    address = ((1 << 52) - 1) >> maxphyaddr << maxphyaddr
    table, large_2m, large_1 = 0b1111 << 3, 0x1FF << 12, 0x3FFFF << 12
    # (bit 7, level): the bits that must be clear
    reserved = np.array(
        [
            [0, 0, table, table, table | 0x80, table | 0x80],
            [0, 0, large_2m, large_1 if large_1g else table | 0x80, table | 0x80, table | 0x80],
        ],
        dtype=np.uint64,
    ) | np.uint64(address)
    rights = (w & np.uint64(7)).astype(np.uint8)  # X W R
    memory_type = (w >> np.uint64(3) & np.uint64(7)).astype(np.uint8)
    bit7 = (w >> np.uint64(7) & np.uint64(1)).astype(np.int64)
    why = np.zeros(w.shape, dtype=np.uint8)
    why[(w & reserved[bit7, levels]) != 0] = 5
    if not exec_only:
        why[rights == 0b100] = 4
    why[(rights == 0b010) | (rights == 0b110)] = 3
    why[(memory_type == 2) | (memory_type == 3) | (memory_type == 7)] = 2
    why[rights == 0] = 1
    return like(words, why)


# In words ------------------------------------------------------------------------------------------------------------


def verdict(word: int, layout: str | SpteLayout = DEFAULT, level: int | None = None) -> tuple[str, str]:
    """What a guest's write meets at one spte, in a word and in a sentence. Chapter 3.

    The word is ``writable``, ``fast``, ``slow``, ``rmap decides``, ``next level``, ``emulate``, ``retry``,
    ``illegal`` or ``unknown``. Fast is meant for direct shadow pages: a shadow of guest page tables is never
    repaired without the lock (from 3.6 on).

    >>> verdict(0x625ae65)[0], verdict(0x1003eb27e67)[0], verdict(0x8000080000027)[0]
    ('fast', 'writable', 'emulate')
    """
    form = layout_named(layout)
    state = classify(word, form, level)
    large = bool(form.bits.field(word, "PS")) and level != 1
    if state == DIRTY_LOG and large and form.present == "MMU_P":
        return "slow", "a large page that is write-protected for the dirty log must be split, which takes the mmu-lock"
    if state == ACCESS_TRACKED and not form.bits.field(word, "MMU_W"):
        return "slow", "the saved rights come back without the lock, but W does not: MMU_W is clear"
    return {
        NONE: ("slow", "no page is mapped: someone must find one, and map it under the mmu-lock"),
        REMOVED: ("retry", "another thread is taking the entry away"),
        FROZEN: ("retry", "another thread is changing the entry"),
        MMIO: ("emulate", "no memory slot covers the gfn, if the generation is still the present one"),
        NON_LEAF: ("next level", "the walk goes on one level down"),
        WRITABLE: ("writable", "W is set: a fault on this entry is spurious"),
        DIRTY_LOG: ("fast", "HOST_W and MMU_W are set: one cmpxchg sets W, without the mmu-lock"),
        GUEST_TABLE: ("slow", "MMU_W is clear: only the holder of the mmu-lock knows whether W may be set"),
        HOST_READ_ONLY: ("slow", "HOST_W is clear: the host must first make the page writable, by a copy for example"),
        PROTECTED: ("rmap decides", "fast, unless the rmap carries PTE_LIST_WRITE_PROTECT (2012 series)"),
        MARKED: ("fast", "the marking vCPU sets W by cmpxchg, if the mark is still its own (2012 series)"),
        ACCESS_TRACKED: ("fast", "MMU_W is set: one cmpxchg gives the saved rights back and sets W"),
        ILLEGAL: ("illegal", MEANINGS[ILLEGAL]),
        UNKNOWN: ("unknown", MEANINGS[UNKNOWN]),
    }[state]


def describe(word: int, layout: str | SpteLayout = DEFAULT, level: int | None = None) -> str:
    """One spte in a sentence. Chapter 3.

    >>> describe(0x625ae65).split("; ")  # doctest: +NORMALIZE_WHITESPACE
    ['0x625ae65 maps the 4 KiB page at pfn 0x625a',
     'the CPU may read and execute it, but not write',
     'accessed and dirty',
     'with HOST_W and MMU_W set, W alone was taken away, to learn of the next write, and a fault may set it without the
      mmu-lock (0x625ae67).']
    """
    form = layout_named(layout)
    state = classify(word, form, level)
    fields = form.bits.unpack(word)
    if state == MMIO:
        said = mmio(word, form)
        allowed = "|".join(name for name, bit in (("W", 2), ("U", 4)) if said["access"] & bit)
        details = [f"generation {said['generation']:#x}"] if "GEN_LOW" in form.mmio else []
        details += [] if form.ept else [f"access {allowed or 'none'}"]
        text = f" marks gfn {said['gfn']:#x} as MMIO ({', '.join(details) or 'nothing else'}): {MEANINGS[MMIO]}"
    elif state == NON_LEAF:
        text = f" {MEANINGS[NON_LEAF]}".replace("table;", f"table, at pfn {fields['PFN']:#x};")
    elif state in (*LEAVES, ILLEGAL):
        parts = [_target(fields, state, level), _rights(fields, form)]
        used = [name for bit, name in (("A", "accessed"), ("D", "dirty")) if fields.get(bit)]
        learnt = {1: "accesses and writes are learnt without A/D bits", 2: "writes are learnt by faults, not by D"}
        parts += [" and ".join(used)] if used else []
        parts += [learnt[kind]] if (kind := fields.get("AD_KIND")) in learnt else []
        parts.append(f"with {_software(fields)} set, {MEANINGS[state]}")
        text = " " + "; ".join(parts)
        if state == DIRTY_LOG and verdict(word, form, level)[0] == "fast":
            text += f" ({word | 2:#x})"
    else:
        text = f": {MEANINGS[state]}"
    rest = unnamed(word, form)
    return f"{word:#x}{text}{f'; bits {rest:#x} have no name here' if rest else ''}."


def _software(fields: dict[str, int]) -> str:
    names = [name for name in ("HOST_W", "MMU_W") if name in fields]
    there = [name for name in names if fields[name]]
    return " and ".join(there) if there else f"neither {' nor '.join(names)}" if names[1:] else f"no {names[0]}"


def _target(fields: dict[str, int], state: int, level: int | None) -> str:
    frame = f"pfn {fields['PFN']:#x}"
    size = {1: "4 KiB ", 2: "2 MiB ", 3: "1 GiB "}.get(level or (0 if fields["PS"] else 1), "large ")
    return f"{'would map' if state == ILLEGAL else 'maps'} the {size}page at {frame}"


def _rights(fields: dict[str, int], form: SpteLayout) -> str:
    read = fields["R"] if form.ept else fields["P"]
    execute = fields["X"] if form.ept else not fields["NX"]
    rights = {"read": read, "write": fields["W"], "execute": execute}
    may = [name for name, on in rights.items() if on]
    may_not = [name for name, on in rights.items() if not on]
    if not may:
        return "the CPU may not touch it"
    text = f"the CPU may {', '.join(may[:-1]) + ' and ' if may[1:] else ''}{may[-1]} it"
    if not form.ept and not fields["U"]:
        text += " from supervisor mode alone"
    return text + (f", but not {' or '.join(may_not)}" if may_not else "")


def decode_report(value: int, layout: str = DEFAULT) -> dict[str, Any]:
    """What ``python -m mmu decode spte VALUE`` says of one spte, ready for JSON. Chapter 3.

    Raises:
        ValueError: no such layout, or ``value`` is no 64-bit word.

    >>> report = decode_report(0x625ae65)
    >>> report["state"], report["verdict"], report["fields"]["PFN"]
    ('write-protected: dirty log', 'fast', 25178)
    """
    form = layout_named(layout)
    state = classify(value, form)
    fields = form.mmio.unpack(value) if state == MMIO else form.bits.unpack(value)
    if state == MMIO:
        fields |= {name.upper(): number for name, number in mmio(value, form).items()}
    word, reason = verdict(value, form)
    text = f"{form.kernel}: {describe(value, form)}"
    if form.identification is not None:
        text += f" The id: {form.identification.note}."
    return {
        "kind": "spte",
        "value": f"{value:#x}",
        "layout": form.name,
        "fields": fields,
        "state": STATES[state],
        "verdict": word,
        "reason": reason,
        "text": text,
    }
