"""mmu.nested: EPT violations as kvm-unit-tests expects them, NPT codes as recorded, and walks one by one."""

import numpy as np
import pytest

from mmu import formats, nested, paging
from mmu.nested import walk_nested
from mmu.tables import BLOCK, PageTable
from tests import plain

WRITE_BACK = 6 << 3
ADDRESS, FRAME, TABLES_AT = 0x40201234, 0x999, 0x7000000

# What kvm-unit-tests' EPT access tests expect of a leaf with these R, W and X: read, write, fetch; None goes through.
EXPECTED = {
    0b000: (0x181, 0x182, 0x184),
    0b001: (None, 0x18A, 0x18C),
    0b011: (None, None, 0x19C),
    0b100: (0x1A1, 0x1A2, None),
    0b101: (None, 0x1AA, None),
    0b111: (None, None, None),
    0b010: ("misconfiguration",) * 3,
    0b110: ("misconfiguration",) * 3,
}
# And of the EPT leaf under a guest table: without A/D bits by whether a bit must be set in the table, and with them.
TABLES = {
    0b000: (0x81, 0x81, 0x83),
    0b001: (None, 0x8B, 0x8B),
    0b101: (None, 0xAB, 0xAB),
    0b011: (None, None, None),
    0b111: (None, None, None),
}
KINDS = ({}, {"write": True}, {"fetch": True})


def machine(guest_format=formats.LONG4, nested_format=formats.EPT4, flags=0x67):
    """A guest with one mapped page, and a nested table that maps its tables and the page, all allowed."""
    guest, below = PageTable(guest_format, base=TABLES_AT), PageTable(nested_format)
    guest.map(ADDRESS & ~0xFFF, pfn=FRAME, flags=flags)
    guest.words[guest.words != 0] |= np.uint64(0x20)
    frames = np.append(np.arange(guest.live.size, dtype=np.uint64) + np.uint64(TABLES_AT), np.uint64(FRAME))
    allow = WRITE_BACK | 7 if nested_format.memory_type else 7
    below.map(frames << np.uint64(12), pfn=frames + np.uint64(0x5000), flags=allow)
    return guest, below


def outcome(walk):
    if walk.misconfigured[0]:
        return "misconfiguration"
    return int(walk.code[0]) if walk.nested_fault[0] else None


@pytest.mark.parametrize("large", [1, 2, 3])
@pytest.mark.parametrize("rights", EXPECTED)
def test_ept_leaves(rights, large):
    """A read, a write and a fetch through an EPT leaf of each size end as kvm-unit-tests expects."""
    guest, below = machine()
    below.unmap(FRAME << 12)
    page = FRAME << 12 >> formats.EPT4.shift(large) << formats.EPT4.shift(large)
    below.map(page, pfn=0, flags=WRITE_BACK | 7, level=large)
    slot = below.find(page).slot
    below.words[slot] = below.words[slot] & ~np.uint64(7) | np.uint64(rights)
    for kind, expected in zip(KINDS, EXPECTED[rights], strict=True):
        assert outcome(walk_nested(guest, below, [ADDRESS], **kind)) == expected


@pytest.mark.parametrize("level", [2, 3, 4])
@pytest.mark.parametrize("rights", EXPECTED)
def test_ept_upper_levels(rights, level):
    """An upper EPT entry's rights are ANDed with the leaf's: the violation is that of a leaf with those rights."""
    guest, below = machine()
    below.map(0x7F0000000000, pfn=FRAME, flags=WRITE_BACK | 7)  # a path of its own, to the last level
    guest.map(ADDRESS & ~0xFFF, pfn=0x7F0000000, flags=0x67)
    slot = below.find(0x7F0000000000, level).slot
    below.words[slot] = below.words[slot] & ~np.uint64(7) | np.uint64(rights)
    for kind, expected in zip(KINDS, EXPECTED[rights], strict=True):
        assert outcome(walk_nested(guest, below, [ADDRESS], **kind)) == expected


@pytest.mark.parametrize("rights", TABLES)
@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_ept_under_guest_tables(rights, level):
    """A guest table that EPT protects faults as kvm-unit-tests expects: when it is read, or when A or D must be set."""
    for marked in (True, False):
        guest, below = machine()
        slot = int(guest.find(ADDRESS, level).slot[0])
        if not marked:
            guest.words[slot] &= ~np.uint64(0x20)
        page = (slot // guest.fanout + guest.base) << 12
        leaf = below.find(page).slot
        below.words[leaf] = below.words[leaf] & ~np.uint64(7) | np.uint64(rights)
        for kind in KINDS:
            off, on = (walk_nested(guest, below, [ADDRESS], ad=ad, update=False, **kind) for ad in (False, True))
            assert outcome(off) == TABLES[rights][0 if marked and rights else 1]
            assert outcome(on) == TABLES[rights][2]
            for walk in (off, on):
                if walk.nested_fault[0]:
                    assert (int(walk.step[0]), int(walk.gpa[0])) == (level, (slot % 512) * 8 + page)


@pytest.mark.parametrize(
    ("bits", "level"),
    [
        (2 << 3, 1),
        (3 << 3, 1),
        (7 << 3, 1),
        (1 << 45, 1),
        (1 << 45, 3),
        (1 << 3, 2),
        (1 << 6, 3),
        (1 << 7, 4),
        (1 << 3, 4),
    ],
)
def test_ept_misconfigurations(bits, level):
    """A reserved memory type or a reserved bit at any level is a misconfiguration, whatever the access."""
    guest, below = machine()
    below.maxphyaddr = 40
    below.map(0x7F0000000000, pfn=FRAME, flags=7)
    guest.map(ADDRESS & ~0xFFF, pfn=0x7F0000000, flags=0x67)
    slot = below.find(0x7F0000000000, level).slot
    below.words[slot] |= np.uint64(bits)
    for kind in KINDS:
        walk = walk_nested(guest, below, [ADDRESS], **kind)
        assert outcome(walk) == "misconfiguration" and int(walk.code[0]) == 0


def test_npt_codes():
    """NPT reports what real traces show: U always, and whether a guest table or the access itself faulted."""
    guest, below = machine(nested_format=formats.LONG4)
    below.unmap(FRAME << 12)
    assert hex(walk_nested(guest, below, [ADDRESS], fetch=True).code[0]) == "0x100000014"
    below.map(FRAME << 12, pfn=1, flags=5)
    assert hex(walk_nested(guest, below, [ADDRESS], write=True).code[0]) == "0x100000007"
    below.unmap(TABLES_AT + 1 << 12)
    assert hex(walk_nested(guest, below, [ADDRESS]).code[0]) == "0x200000006"
    below.map(TABLES_AT + 1 << 12, pfn=1, flags=5)
    assert hex(walk_nested(guest, below, [ADDRESS]).code[0]) == "0x200000007"


def test_marks_in_the_nested_table():
    """After an allowed access A is set at every nested level, and D in the leaves of guest tables and of writes."""
    guest, below = machine()
    walk_nested(guest, below, [ADDRESS])
    leaves = below.leaves()
    dirty = leaves.entry & np.uint64(1 << 9) != 0
    assert (leaves.entry & np.uint64(1 << 8) != 0).all()
    assert (leaves.address[~dirty] >> np.uint64(12)).tolist() == [FRAME]
    assert not (below.words[below.parent[1:4]] & np.uint64(1 << 9)).any()
    walk_nested(guest, below, [ADDRESS], write=True)
    assert (below.leaves().entry & np.uint64(1 << 9) != 0).all()


def test_no_marks_without_ad_bits():
    """With EPT's A/D bits off the nested table stays as it is, while the guest's own bits are set."""
    guest, below = machine(flags=0x7)
    guest.words[guest.find(ADDRESS).slot] &= ~np.uint64(0x60)
    before = below.words.copy()
    walk_nested(guest, below, [ADDRESS], write=True, ad=False)
    assert np.array_equal(below.words, before)
    assert hex(guest.words[guest.find(ADDRESS).slot][0]) == "0x999067"


def one_nested(below, gpa, read, write, fetch):
    """One plain walk of a nested table: ("ok", address), or ("fault", code), and the entries read."""
    ept, seen, base, rights = below.fmt.memory_type, [], 0, 7
    if not ept:
        slots = []
        for level in range(4, 0, -1):
            slots.append(base + below.fmt.index(gpa, level))
            entry = int(below.words[slots[-1]])
            if not entry & 1 or (level in (2, 3) and entry & 0x80):
                break
            base = (entry >> 12 & (1 << 40) - 1) * 512
        entries = [int(below.words[slot]) for slot in slots]
        code, _ = plain.access(entries, maxphyaddr=below.maxphyaddr, write=write, fetch=fetch, user=True, levels=4)
        inside = (1 << below.fmt.shift(5 - len(entries))) - 1
        if code is not None:
            return "fault", code, entries
        return "ok", entries[-1] & (1 << 52) - (1 << 12) & ~inside | gpa & inside, entries
    for level in range(4, 0, -1):
        entry = int(below.words[base + below.fmt.index(gpa, level)])
        seen.append(entry)
        access = read | write << 1 | fetch << 2
        if not entry & 7:
            return "fault", access, seen
        leaf = level == 1 or (level in (2, 3) and bool(entry & 0x80))
        bad = entry & 7 in (2, 6) or entry >> below.maxphyaddr & (1 << 52 - below.maxphyaddr) - 1
        bad = (
            bad
            or (leaf and entry >> 3 & 7 in (2, 3, 7))
            or (not leaf and entry & 0x78)
            or (level == 4 and entry & 0x80)
        )
        bad = bad or (leaf and level == 2 and entry & 0x1FF000) or (leaf and level == 3 and entry & 0x3FFFF000)
        if bad:
            return "misconfiguration", 0, seen
        rights &= entry
        if leaf:
            break
        base = (entry >> 12 & (1 << 40) - 1) * 512
    inside = (1 << 3 + 9 * level) - 1
    if access & ~rights:
        return "fault", access | rights << 3, seen
    return "ok", entry & (1 << 52) - (1 << 12) & ~inside | gpa & inside, seen


def one_walk(guest, below, address, ad, write, fetch, user, cpu):
    """One plain two-dimensional walk: what it came to, and every entry that it read."""
    ept, slots, reads = below.fmt.memory_type, [], []
    slot = guest.fmt.index(address, 4)
    entries = []
    for level in range(4, 0, -1):
        gpa = (guest.base << 12) + slot * 8
        how = {"read": True, "write": ad or not ept, "fetch": False}
        what, value, seen = one_nested(below, gpa, **how)
        reads.append(seen)
        if what != "ok":
            return (what, level, gpa, value | (0x80 if ept else 1 << 33)), entries, reads
        entries.append(int(guest.words[slot]))
        slots.append((level, gpa))
        if not entries[-1] & 1 or (level in (2, 3) and entries[-1] & 0x80):
            break
        slot = ((entries[-1] >> 12 & (1 << 40) - 1) - guest.base) * 512 + (
            guest.fmt.index(address, level - 1) if level > 1 else 0
        )
    code, after = plain.access(
        entries, maxphyaddr=guest.maxphyaddr, levels=4, write=write, fetch=fetch, user=user, **cpu
    )
    if code is not None:
        return ("guest", code), entries, reads
    for (level, gpa), entry, marked in zip(slots, entries, after, strict=True):
        if ept and not ad and entry != marked:
            what, value, _ = one_nested(below, gpa, True, True, False)
            if what != "ok":
                return (what, level, gpa, value | 0x80), entries, reads
    inside = (1 << 3 + 9 * (5 - len(entries))) - 1
    gpa = entries[-1] & (1 << 52) - (1 << 12) & ~inside | address & inside
    what, value, seen = one_nested(below, gpa, read=not write and not fetch, write=write, fetch=fetch)
    reads.append(seen)
    if what != "ok":
        return (what, 0, gpa, value | (0x180 if ept else 1 << 32)), entries, reads
    return ("ok", gpa, value), entries, reads


@pytest.mark.parametrize("ad", [True, False])
@pytest.mark.parametrize("fmt", [formats.EPT4, formats.LONG4], ids=["EPT", "NPT"])
def test_walks_equal_plain_python(fmt, ad):
    """Every entry read, every fault of either kind and every address is that of plain walks, one by one."""
    kinds = set().union(*(compare(fmt, ad, seed) for seed in range(6)))
    assert {("ok", None), ("guest", None), ("fault", 0), ("fault", 1)} <= kinds
    assert not fmt.memory_type or any(kind == "misconfiguration" for kind, _ in kinds)


def compare(fmt, ad, seed):
    """Hold 500 accesses in a machine of random tables against plain walks; return the kinds of ends that they had."""
    dice = np.random.default_rng(seed)
    guest, below = PageTable(base=0x200, maxphyaddr=46), PageTable(fmt, maxphyaddr=46)
    pages = np.unique(
        dice.integers(0, 64, 40, dtype=np.uint64) << np.uint64(12)
        | dice.integers(0, 5, 40, dtype=np.uint64) << np.uint64(30)
    )
    guest.map(pages, pfn=dice.integers(0x1000, 0x1040, pages.size, dtype=np.uint64), flags=7)
    large = np.unique(dice.integers(100, 110, 6, dtype=np.uint64)) << np.uint64(21)
    guest.map(large, pfn=np.uint64(0x1000), flags=7, level=2)
    allow = WRITE_BACK | 7 if fmt.memory_type else 7
    frames = np.concatenate([np.arange(0x200, 0x200 + guest.live.size), np.arange(0x1000, 0x1200)]).astype(np.uint64)
    below.map(frames << np.uint64(12), pfn=frames + np.uint64(0x8000), flags=allow)
    last_tables = guest.find(pages).slot // guest.fanout
    for table, rate in ((guest, 0.3), (below, 0.15)):
        used = np.flatnonzero(table.words)
        flips = dice.choice(np.array([0, 0, 1, 2, 4, 0x20, 1 << 47, 1 << 63, 3, 5], dtype=np.uint64), used.size)
        if fmt.memory_type and table is below:
            flips &= ~np.uint64(1 << 63)
        rare = np.isin(used, table.parent) & (dice.random(used.size) > 0.03)
        table.words[used] ^= flips * ((dice.random(used.size) < rate) & ~rare)
    below.words[below.find(0x200 << 12).slot] = np.uint64(0x8200 << 12 | allow)  # the root stays in reach
    lowest = np.unique(last_tables)[::2]  # EPT lets some of the guest's lowest tables be read only, one not at all
    guarded = below.find((lowest.astype(np.uint64) + np.uint64(0x200)) << np.uint64(12)).slot
    below.words[guarded] &= ~np.where(np.arange(guarded.size) == 1, np.uint64(7), np.uint64(2))
    addresses = dice.choice(np.concatenate([pages, large]), 500) | dice.integers(0, 4096, 500, dtype=np.uint64)
    kinds = dice.integers(0, 3, addresses.size)
    write, fetch, user = kinds == 1, kinds == 2, dice.integers(0, 2, addresses.size).astype(bool)
    cpu = {"wp": bool(dice.integers(0, 2)), "smep": bool(dice.integers(0, 2))}
    walk = walk_nested(guest, below, addresses, write=write, fetch=fetch, user=user, ad=ad, update=False, **cpu)
    kinds = set()
    for place, address in enumerate(addresses.tolist()):
        args = ad, bool(write[place]), bool(fetch[place]), bool(user[place]), cpu
        result, entries, reads = one_walk(guest, below, address, *args)
        kinds.add((result[0], result[1] if result[0] in ("fault", "misconfiguration") else None))
        got = walk.nested_entries[place]
        assert walk.guest.entries[place].tolist() == entries + [0] * (4 - len(entries))
        final = got[-1][got[-1] != 0].tolist() if len(reads) > len(entries) and walk.step[place] == 0 else []
        steps = [row[: len(seen)].tolist() for row, seen in zip(got, reads, strict=False)]
        assert steps[: len(reads) - bool(final)] + ([final] if final else []) == reads
        if result[0] == "ok":
            assert not walk.guest.fault[place] and not walk.nested_fault[place]
            assert (int(walk.gpa[place]), int(walk.physical[place])) == result[1:]
        elif result[0] == "guest":
            assert (bool(walk.guest.fault[place]), int(walk.guest.code[place])) == (True, result[1])
            assert not walk.nested_fault[place] and walk.gpa[place] == walk.physical[place] == 0
        else:
            what, step, gpa, code = result
            assert walk.nested_fault[place] and not walk.guest.fault[place] and walk.physical[place] == 0
            assert (int(walk.step[place]), int(walk.gpa[place])) == (step, gpa)
            assert walk.misconfigured[place] == (what == "misconfiguration")
            assert int(walk.code[place]) == (0 if what == "misconfiguration" else code)
    return kinds


def test_blocks_do_not_show():
    """Accesses beyond one block come to what they come to alone, entries kept or not."""
    guest, below = machine()
    guest.map(0x5000, pfn=0x12345, flags=0x7)
    many = np.where(np.arange(BLOCK + 500) % 3 == 0, 0x5000, ADDRESS).astype(np.uint64)
    kept = walk_nested(guest, below, many, update=False)
    bare = walk_nested(guest, below, many, keep=False, update=False)
    for name in ("nested_fault", "gpa", "code", "physical", "step"):
        ours, same = getattr(kept, name), getattr(bare, name)
        assert np.array_equal(ours, same) and np.array_equal(
            ours[BLOCK:], np.resize(ours[BLOCK % 3 : BLOCK % 3 + 3], 500)
        )
    assert bare.nested_entries is None and bare.guest.entries is None
    assert kept.nested_entries.shape == (BLOCK + 500, 5, 4)


def test_formats_that_nest():
    """A nested table of a format that no CPU nests with is refused by its name."""
    with pytest.raises(ValueError, match="PAE, 3 levels; expected EPT"):
        walk_nested(PageTable(), PageTable(formats.PAE), [0])
    assert paging.NO_FAULT == -1 and nested.ept_decisions().dtype == np.int8
