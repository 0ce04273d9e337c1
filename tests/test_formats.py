"""mmu.formats: which bits an entry may have in each paging mode, listed one by one."""

import numpy as np
import pytest

from mmu import formats
from tests import plain

GUESTS = {
    "long4": formats.LONG4, "long5": formats.LONG5, "pae": formats.PAE,
    "legacy": formats.LEGACY, "legacy-pse": formats.LEGACY_PSE,
}  # fmt: skip
# What kvm-unit-tests' EPT reserved-bit test sets at each level, below MAXPHYADDR: a leaf's bits, and a pointer's.
EPT_LEAF = {1: set(), 2: set(range(12, 20)), 3: set(range(12, 29))}
EPT_POINTER = {2: set(range(3, 7)), 3: set(range(3, 7)), 4: set(range(3, 8))}


@pytest.mark.parametrize("maxphyaddr", [32, 36, 40, 52])
@pytest.mark.parametrize("name", GUESTS)
def test_each_bit_of_a_guest_entry(name, maxphyaddr):
    """Setting one bit of a present entry makes it malformed exactly where the manuals list that bit as reserved."""
    fmt = GUESTS[name]
    for level in range(fmt.levels, 0, -1):
        for leaf in {level == 1, level == 1 or level in fmt.large}:
            for nxe in (True, False):
                base = np.uint64(1 | (0x80 if leaf and level > 1 else 0))
                bits = np.arange(1, 8 * fmt.entry_bytes, dtype=np.uint64)
                bits = bits[(bits != 7) | (level not in fmt.large)]  # PS there makes another kind of entry
                _, malformed, is_leaf = fmt.examine(base | np.uint64(1) << bits, level, maxphyaddr, nxe)
                listed = plain.reserved_bits(name, level, leaf, maxphyaddr, nxe)
                assert malformed.tolist() == [bit in listed for bit in bits.tolist()]
                assert (is_leaf == leaf).all()


@pytest.mark.parametrize("level", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["leaf", "pointer"])
def test_each_bit_of_an_ept_entry(level, kind):
    """The bits that kvm-unit-tests finds reserved in EPT entries are, and the ignored ones are not."""
    listed = (EPT_LEAF if kind == "leaf" else EPT_POINTER).get(level)
    if listed is None:
        return
    base = np.uint64(7 | (0x80 if kind == "leaf" and level > 1 else 0))
    ignored = {8, 9, 10, 11} | set(range(52, 64))
    for bit in listed | set(range(40, 52)) | ignored:
        _, malformed, _ = formats.EPT4.examine(np.array([base | np.uint64(1 << bit)]), level, 40)
        assert malformed.tolist() == [bit not in ignored], (bit, level)


def test_ept_rights_and_types():
    """W without R is a misconfiguration, X alone is not; memory types 2, 3 and 7 are in a leaf."""
    rights = np.arange(8, dtype=np.uint64)
    present, malformed, _ = formats.EPT4.examine(rights | np.uint64(6 << 3), 1, 40)
    assert present.tolist() == [False] + [True] * 7
    assert np.flatnonzero(malformed).tolist() == [0b010, 0b110]
    types = np.arange(8, dtype=np.uint64) << np.uint64(3) | np.uint64(7)
    assert np.flatnonzero(formats.EPT4.examine(types, 1, 40)[1]).tolist() == [2, 3, 7]


@pytest.mark.parametrize(
    ("registers", "fmt"),
    [
        ((0x80010033, 0x1020, 0xD01), formats.LONG5),
        ((0x80010033, 0x20, 0xD01), formats.LONG4),
        ((0x80010033, 0x1020, 0x800), formats.PAE),
        ((0x80010033, 0x10, 0), formats.LEGACY_PSE),
        ((0x80010033, 0, 0), formats.LEGACY),
        ((0x00010033, 0x1030, 0xD01), None),
    ],
)
def test_the_mode_that_registers_select(registers, fmt):
    """CR0.PG, CR4.PAE, CR4.PSE, CR4.LA57 and EFER.LMA decide how tables are read."""
    assert formats.format_of(*registers) is fmt
