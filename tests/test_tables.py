"""mmu.tables: page tables in flat arrays against dicts of dicts, and their walks against one plain walk at a time."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mmu import formats
from mmu.tables import BLOCK, NOWHERE, PageTable
from tests import plain

FORMATS = (formats.LONG4, formats.PAE, formats.LEGACY_PSE, formats.EPT4, formats.LONG5)
NAMES = {
    formats.LONG4.name: "long4", formats.LONG5.name: "long5", formats.PAE.name: "pae",
    formats.LEGACY.name: "legacy", formats.LEGACY_PSE.name: "legacy-pse",
}  # fmt: skip
PLACES = st.sampled_from([0, 1, 511])


class Radix(RuleBasedStateMachine):
    """The same changes made to a PageTable and to a dict of dicts: {index: an entry's bits, or the table below}."""

    @initialize(fmt=st.sampled_from(FORMATS), base=st.sampled_from([0, 0x4000]))
    def start(self, fmt, base):
        self.fmt, self.table, self.model = fmt, PageTable(fmt, base=base), {}
        if fmt.plain:
            self.model = {directory: {} for directory in range(4)}

    def parts(self, address, level):
        return [self.fmt.index(address, here) for here in range(self.fmt.levels, level - 1, -1)]

    def address(self, places, level=1):
        tops = [1 << bits for bits in self.fmt.index_bits]
        within = [place % top for place, top in zip(places, tops, strict=False)]
        shifts = [self.fmt.shift(here) for here in range(self.fmt.levels, level - 1, -1)]
        return sum(place << shift for place, shift in zip(within, shifts, strict=False))

    def lookup(self, address):
        """The leaf that translates an address and its level, or (None, the level where the walk ends)."""
        node = self.model
        for level, part in zip(range(self.fmt.levels, 0, -1), self.parts(address, 1), strict=True):
            node = node.get(part)
            if not isinstance(node, dict):
                return node, level
        raise AssertionError("level 1 holds leaves only")

    def levels(self):
        return (1, *self.fmt.large)

    @rule(
        places=st.lists(st.lists(PLACES, min_size=5, max_size=5), min_size=1, max_size=4),
        choice=st.integers(0, 2), frame=st.integers(0, 15), flags=st.sampled_from([7, 5, 0x67]),
    )  # fmt: skip
    def map(self, places, choice, frame, flags):
        """Map pages of one size; where another size is mapped, both refuse and nothing changes."""
        level = self.levels()[choice % len(self.levels())]
        pages = [self.address(place, level) for place in places]
        frames = [(frame + i) << self.fmt.shift(level) - 12 for i in range(len(pages))]
        blocked = False
        for address in pages:
            node = self.model
            for part in self.parts(address, level)[:-1]:
                node = node.get(part, {})
                if not isinstance(node, dict):
                    blocked = True
                    break
            else:
                blocked |= isinstance(node.get(self.parts(address, level)[-1]), dict)
        before = self.table.words.copy()
        try:
            self.table.map(
                np.array(pages, dtype=np.uint64), pfn=np.array(frames, dtype=np.uint64), flags=flags, level=level
            )
        except ValueError as error:
            assert blocked and "split, collapse or unmap it first" in str(error)
            assert np.array_equal(before, self.table.words)
            return
        assert not blocked
        for address, pfn in zip(pages, frames, strict=True):
            node, parts = self.model, self.parts(address, level)
            for part in parts[:-1]:
                node = node.setdefault(part, {})
            node[parts[-1]] = pfn << 12 | flags | (0x80 if level > 1 else 0)

    @rule(places=st.lists(PLACES, min_size=5, max_size=5), frame=st.integers(0, 3), odd=st.integers(-1, 511))
    def fill(self, places, frame, odd):
        """Map a whole table's worth of 4K pages, so that it can be collapsed unless one frame is not in its place."""
        start = self.address(places, 2)
        if self.lookup(start)[1] > 2 and self.lookup(start)[0] is not None:
            return
        if 2 in self.fmt.large and self.lookup(start)[1] == 2 and self.lookup(start)[0] is not None:
            return
        count = 1 << self.fmt.index_bits[-1]
        frames = np.arange(count, dtype=np.uint64) + np.uint64(frame << self.fmt.shift(2) - 12)
        if odd >= 0:
            frames[odd] += np.uint64(1)
        pages = np.uint64(start) + np.arange(count, dtype=np.uint64) * np.uint64(4096)
        self.table.map(pages, pfn=frames, flags=0x67)
        node, parts = self.model, self.parts(start, 2)
        for part in parts:
            node = node.setdefault(part, {})
        node.update({i: int(frame) << 12 | 0x67 for i, frame in enumerate(frames)})

    @rule(places=st.lists(st.lists(PLACES, min_size=5, max_size=5), min_size=1, max_size=6))
    def unmap(self, places):
        """Unmap whatever leaves translate some addresses; tables left empty go as well."""
        pages = [self.address(place) for place in places]
        mapped = self.table.unmap(np.array(pages, dtype=np.uint64))
        assert mapped.tolist() == [self.lookup(address)[0] is not None for address in pages]
        for address in pages:
            leaf, level = self.lookup(address)
            if leaf is None:
                continue
            node, trail = self.model, []
            for part in self.parts(address, level):
                trail.append((node, part))
                node = node[part]
            del trail[-1][0][trail[-1][1]]
            for holder, part in reversed(trail[:-1]):
                if not holder[part] and not (self.fmt.plain and holder is self.model):
                    del holder[part]

    @rule(places=st.lists(st.lists(PLACES, min_size=5, max_size=5), min_size=1, max_size=3))
    def split(self, places):
        """Split large leaves into a table of smaller ones with the same rights."""
        pages = [self.address(place) for place in places]
        self.table.split(np.array(pages, dtype=np.uint64))
        for address, level in {(address, self.lookup(address)[1]) for address in pages}:
            leaf, here = self.lookup(address)
            if leaf is None or here == 1 or here != level:
                continue
            node = self.model
            for part in self.parts(address, level)[:-1]:
                node = node[part]
            small = leaf if level - 1 in self.fmt.large else leaf & ~0x80
            count, step = self.table.fanout, 1 << self.fmt.shift(level - 1)
            node[self.parts(address, level)[-1]] = {i: small + i * step for i in range(count)}

    @rule(places=st.lists(st.lists(PLACES, min_size=5, max_size=5), min_size=1, max_size=3), choice=st.integers(0, 1))
    def collapse(self, places, choice):
        """Collapse tables whose leaves lie one after the other, and leave the rest alone."""
        level = self.fmt.large[choice % len(self.fmt.large)]
        pages = [self.address(place) for place in places]
        done = self.table.collapse(np.array(pages, dtype=np.uint64), level)
        marks, step, span = (
            self.fmt.accessed | self.fmt.dirty,
            1 << self.fmt.shift(level - 1),
            1 << self.fmt.shift(level),
        )
        expected = []
        for address in pages:
            node, parts = self.model, self.parts(address, level)
            for part in parts[:-1]:
                node = node.get(part) if isinstance(node, dict) else None
            below = node.get(parts[-1]) if isinstance(node, dict) else None
            whole = isinstance(below, dict) and len(below) == self.table.fanout and isinstance(below[0], int)
            whole = whole and all(entry & ~marks == (below[0] & ~marks) + i * step for i, entry in below.items())
            expected.append((node, parts[-1], below) if whole and not below[0] & ~0xFFF & span - 1 else None)
        assert done.tolist() == [change is not None for change in expected]
        for node, part, below in filter(None, expected):
            node[part] = below[0] & ~marks | 0x80
            for entry in below.values():
                node[part] |= entry & marks

    @invariant()
    def the_same_leaves(self):
        """Both hold the same leaves at the same addresses, in as many table pages."""
        leaves, tables = {}, 0
        level, stack = self.fmt.levels, [(0, self.model)]
        while stack:
            tables += len(stack)
            below = []
            for prefix, node in stack:
                for part, entry in node.items():
                    address = prefix | part << self.fmt.shift(level)
                    if isinstance(entry, dict):
                        below.append((address, entry))
                    else:
                        leaves[address, level] = entry
            level, stack = level - 1, below
        ours = self.table.leaves()
        keys = zip(ours.address.tolist(), ours.level.tolist(), strict=True)
        assert dict(zip(keys, ours.entry.tolist(), strict=True)) == leaves
        assert self.table.pages == tables

    @invariant()
    def the_books_are_kept(self):
        """Each table's count of present entries and its parent are what its entries say; free tables are empty."""
        words = self.table.words.reshape(-1, self.table.fanout)
        present = words & np.uint64(self.fmt.present) != 0
        assert np.array_equal(self.table.live, present.sum(axis=1))
        used = np.flatnonzero(self.table.parent != NOWHERE)
        held = self.table.words[self.table.parent[used]] >> np.uint64(12)
        assert (held & np.uint64((1 << 40) - 1)).tolist() == (used + self.table.base).tolist()
        assert used.size == self.table.pages - 1 and not words[self.table.live == 0].any()


TestRadix = Radix.TestCase
TestRadix.settings = settings(max_examples=60, stateful_step_count=12, deadline=None)


def scatter(fmt, seed):
    """A table with leaves of every size, and upper and lower entries with all manner of bits."""
    dice = np.random.default_rng(seed)
    table = PageTable(fmt, base=0x300, maxphyaddr=40)
    for level in (*fmt.large[::-1], 1):
        span = np.uint64(fmt.shift(level))
        wide = 1 << sum(fmt.index_bits) - (fmt.shift(level) - 12)
        pages = np.unique(dice.integers(0, max(wide, 2), 60, dtype=np.uint64)) << span
        found = table.find(pages, level)
        pages = pages[(~found.present) & ((found.level > level) | (table.words[found.slot] == 0))]
        pfn = dice.integers(0, 1 << 6, pages.size, dtype=np.uint64) << span - np.uint64(12)
        table.map(pages, pfn=pfn, flags=7, level=level)
    pages, used = table.leaves().address, np.flatnonzero(table.words)
    flips = np.array([0, 0, 0, 0, 1, 2, 4, 0x20, 0x40, 0x60, 1 << 63, 1 << 45, 0x2000, 0x100], dtype=np.uint64)
    if fmt.entry_bytes == 4:
        flips &= np.uint64(0xFFFFFFFF)
    keep = np.uint64(0xFFFFFFFFFFFFDFFF)  # flip bit 13 in leaves only: in a pointer it would lead out of the table
    leaf = np.isin(used, table.find(pages).slot)
    flip = np.where(leaf | (dice.random(used.size) < 0.2), dice.choice(flips, used.size), np.uint64(0))
    table.words[used] ^= np.where(leaf, flip, flip & keep)
    addresses = dice.choice(pages, 400) | dice.integers(0, 1 << fmt.shift(1), 400, dtype=np.uint64)
    addresses[:40] = dice.integers(0, 1 << 56, 40, dtype=np.uint64)
    return table, addresses, dice


def one_walk(table, address):
    """The entries on the way to one address, in plain Python, and where they lie."""
    fmt, slots, base = table.fmt, [], 0
    for level in range(fmt.levels, 0, -1):
        slots.append(base + fmt.index(address, level))
        entry = int(table.words[slots[-1]])
        if not entry & fmt.present or level == 1 or (level in fmt.large and entry & 0x80):
            break
        base = ((entry >> 12 & (1 << 40) - 1) - table.base) * table.fanout
        if not 0 <= base < table.words.size:
            break  # the pointer has a reserved bit set: no one follows it
    return slots, [int(table.words[slot]) for slot in slots]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if fmt.name in NAMES], ids=lambda fmt: NAMES[fmt.name])
def test_walks_equal_plain_python(fmt, seed):
    """Fault, code, level, address, entries and the A and D bits left behind are those of plain walks, one by one."""
    table, addresses, dice = scatter(fmt, seed)
    kinds = dice.integers(0, 3, addresses.size)
    write, fetch, user = kinds == 1, kinds == 2, dice.integers(0, 2, addresses.size).astype(bool)
    cpu = {name: bool(dice.integers(0, 2)) for name in ("wp", "nxe", "smep", "smap", "ac")}
    before, expected_words = table.words.copy(), table.words.copy()
    paths = [one_walk(table, int(address)) for address in addresses]
    walk = table.walk(addresses, write=write, fetch=fetch, user=user, **cpu)
    faults = 0
    for place, (slots, entries) in enumerate(paths):
        code, after = plain.access(
            entries, name=NAMES[fmt.name], maxphyaddr=40, levels=fmt.levels,
            write=bool(write[place]), fetch=bool(fetch[place]), user=bool(user[place]), **cpu,
        )  # fmt: skip
        assert (bool(walk.fault[place]), int(walk.code[place])) == (code is not None, code or 0)
        reached = int(walk.level[place])
        count = fmt.levels - reached + 1
        assert walk.entries[place].tolist() == entries[:count] + [0] * (reached - 1)
        faults += code is not None
        if code is None:
            assert count == len(entries)
            offset = (1 << fmt.shift(reached)) - 1
            physical = entries[-1] & (1 << 52) - (1 << 12) & ~offset | int(addresses[place]) & offset
            assert int(walk.physical[place]) == physical
            for slot, entry in zip(slots, after, strict=True):
                expected_words[slot] |= np.uint64(entry)
        else:
            assert walk.physical[place] == 0
    assert 40 < faults < 380
    assert np.array_equal(table.words, expected_words) and not np.array_equal(before, expected_words)


def test_blocks_do_not_show():
    """A walk of more addresses than fit in a block gives what it gives address by address, A and D included."""
    table, addresses, dice = scatter(formats.LONG4, 1)
    many = dice.choice(addresses, 2 * BLOCK + 77)
    write = dice.integers(0, 2, many.size).astype(bool)
    before = table.words.copy()
    walk = table.walk(many, write=write)
    together, table.words = table.words, before
    half = BLOCK // 3
    for start in range(0, many.size, half):
        part = slice(start, start + half)
        alone = table.walk(many[part], write=write[part], update=False)
        for ours, same in zip(alone, walk, strict=True):
            assert np.array_equal(ours, same[part])
    bare = table.walk(many, write=write, keep=False)
    assert bare.entries is None and np.array_equal(bare.physical, walk.physical)
    assert np.array_equal(table.words, together)


def test_walks_without_update_leave_the_table_alone():
    """With update=False not a bit of the table changes."""
    table, addresses, _ = scatter(formats.LONG4, 2)
    before = table.words.copy()
    table.walk(addresses, write=True, update=False)
    assert np.array_equal(table.words, before)


def test_the_pat_bit_moves():
    """Split and collapse move the PAT bit between its place in a large leaf and its place in a 4K one."""
    table = PageTable(formats.LONG4)
    table.map(0x200000, pfn=0x200, flags=1 << 12 | 7, level=2)
    table.split(0x200000)
    assert {int(entry) & 0x1FFF for entry in table.leaves().entry} == {0x87, 0x1087}
    assert table.collapse(0x200000).tolist() == [True]
    assert [hex(entry) for entry in table.leaves().entry] == ["0x201087"]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"addresses": 0x1000, "pfn": 1, "flags": 7, "level": 4}, "has no leaves at level 4"),
        ({"addresses": 0x1000, "pfn": 0x200, "flags": 7, "level": 2}, "0x1000 to frame 0x200.*aligned to 0x200000"),
        ({"addresses": 0x200000, "pfn": 1, "flags": 7, "level": 2}, "aligned to 0x200000"),
        ({"addresses": 0x1000, "pfn": 1, "flags": 6}, "flags of a present entry"),
        ({"addresses": -1, "pfn": 1, "flags": 7}, "unsigned 64-bit"),
    ],
)
def test_unusable_pages(what, message):
    """A page that no entry can map is refused by its address, with what was expected."""
    with pytest.raises(ValueError, match=message):
        PageTable(formats.LONG4).map(**what)


def test_entries_of_four_bytes():
    """A frame that a 32-bit entry cannot name is refused."""
    with pytest.raises(ValueError, match="4 bytes in all"):
        PageTable(formats.LEGACY).map(0x1000, pfn=1 << 20, flags=7)
    with pytest.raises(ValueError, match="has no leaves at level 2"):
        PageTable(formats.LEGACY).collapse(0x1000)


def test_an_access_is_one_thing():
    """A walk for an access that both writes and fetches is refused."""
    with pytest.raises(ValueError, match="expected read, write or fetch"):
        PageTable().walk(np.array([0, 1], dtype=np.uint64), write=True, fetch=np.array([False, True]))


@given(st.lists(st.integers(0, (1 << 48) - 1), max_size=40))
@settings(deadline=None)
def test_an_empty_table(addresses):
    """Every walk of an empty table ends at the root with a fault whose code says not present."""
    walk = PageTable().walk(np.array(addresses, dtype=np.uint64))
    assert walk.fault.all() and not walk.code.any() and (walk.level == 4).all()
