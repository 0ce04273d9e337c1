"""mmu.update against every change of an spte that a real KVM printed, and against plain-Python writers."""

import functools
import gzip
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmu import spte, update
from mmu.spte import LAYOUTS, STATES, classify
from mmu.update import ALL, EXEC, FAST, JUDGEMENTS, TRANSITIONS, USER, WRITE

LARGE = np.uint64(1 << 7)
TRACES = sorted((Path(__file__).parent / "data" / "kvm-traces").glob("*.trace.gz"))
SIX = ["6.1-ept", "6.1-npt", "6.12-ept", "6.12-npt"]
P, W, U, A, D, PS, HOST, MMU, PRESENT, NX = 1, 2, 4, 32, 64, 128, 1 << 9, 1 << 10, 1 << 11, 1 << 63


def layout_of(trace):
    return "6.12-npt" if trace.name.startswith("k612") else "6.1-npt"


@functools.cache
def text_of(trace):
    with gzip.open(trace, "rt", errors="replace") as lines:
        return lines.read()


def hexadecimal(column):
    return np.array([int(word, 16) for word in column], dtype=np.uint64)


def changes(trace):
    """(level, old, new) of every change that the TDP MMU printed."""
    found = re.findall(r"spte_changed: .* level (\d) old_spte (\S+) new_spte (\S+)", text_of(trace))
    level = np.array([int(level) for level, _, _ in found], dtype=np.int64)
    return level, hexadecimal([old for _, old, _ in found]), hexadecimal([new for *_, new in found])


def having(event):
    """Parametrises a test over the recorded traces that print this event at least once."""
    traces = [trace for trace in TRACES if f" {event}: " in text_of(trace)]
    return pytest.mark.parametrize("trace", traces, ids=lambda trace: trace.name)


# Transitions


def test_only_the_fast_path_and_the_cpu_go_without_the_lock():
    """Without the mmu-lock an spte gains rights, A, D or a mark, and nothing else."""
    free = {row.name for row in TRANSITIONS if row.lock == update.NO_LOCK}
    assert free == {"fast repair", "fast restore", "the CPU's own", "mark (2012)", "upgrade (2012)"}


def test_every_state_is_reached_and_left():
    """Each legal state is entered by some row and left by another, and no row touches an illegal one."""
    legal = set(range(len(STATES))) - {spte.ILLEGAL, spte.UNKNOWN}
    assert {state for row in TRANSITIONS for state in row.new} == legal
    assert {state for row in TRANSITIONS for state in row.old} == legal


@having("kvm_tdp_mmu_spte_changed")
def test_every_recorded_change_is_legal(trace):
    """Each change that the TDP MMU printed is a legal one, and some row tells who may make it."""
    level, old, new = changes(trace)
    assert old.size and not update.judge(old, new, layout_of(trace), level).any()
    for step in {*zip(old.tolist(), new.tolist(), level.tolist(), strict=True)}:
        assert step[0] == step[1] or update.makers(*step[:2], layout_of(trace), step[2])


@having("kvm_tdp_mmu_spte_changed")
def test_host_w_never_goes_and_comes_only_with_w(trace):
    """While a leaf is present HOST_W is never withdrawn; where it came, a slow-path fault had built the entry anew."""
    level, old, new = changes(trace)
    name = layout_of(trace)
    leaves = [np.isin(classify(words, name, level), spte.LEAVES) for words in (old, new)]
    both = leaves[0] & leaves[1]
    before, after = old[both] & np.uint64(HOST), new[both] & np.uint64(HOST)
    assert not (before & ~after).any()
    came = new[both][before != after]
    assert (classify(came, name) == spte.WRITABLE).all()
    assert came.size == {"npt1_tdp1_H.trace.gz": 40}.get(trace.name, came.size)


def test_forged_changes_are_found():
    """A pfn that changes under a present leaf, a HOST_W that goes and a W out of nowhere are each called by name."""
    leaf = update.make_spte(0x1234)
    forged = [update.make_spte(0x1235), leaf & ~(HOST | MMU | W), 0x5A0, leaf & ~MMU]
    told = [JUDGEMENTS[why] for why in update.judge(leaf, np.array(forged, dtype=np.uint64))]
    assert told == [JUDGEMENTS[2], JUDGEMENTS[3], "legal", "no such transition"]
    assert JUDGEMENTS[update.judge(0x5A0, leaf)] == "no such transition"
    assert update.makers(leaf, forged[0]) == ()


def test_the_makers_of_a_change():
    """W coming back may be the fast path's or the slow path's work; D alone is the CPU's own."""
    leaf = update.make_spte(0x1234)
    assert [row.name for row in update.makers(leaf & ~W, leaf)] == ["fast repair", "map anew"]
    assert "the CPU's own" in [row.name for row in update.makers(leaf & ~D, leaf)]
    assert "the CPU's own" not in [row.name for row in update.makers(leaf, leaf & ~D)]
    assert [row.name for row in update.makers(leaf, leaf & ~W)] == ["dirty log"]
    assert [row.name for row in update.makers(leaf & ~W, leaf & ~W & ~MMU)] == ["map anew", "shadow"]


def test_changes_in_words():
    """A change between present entries is told field by field, any other by its states."""
    leaf = update.make_spte(0x1234)
    assert update.changed(leaf, update.write_protect(leaf, shadow=True)) == "W 1→0, MMU_W 1→0"
    assert update.changed(leaf, leaf + 0x1000) == "PFN 0x1234→0x1235"
    assert update.changed(leaf, leaf | 1 << 60) == "unnamed 0x1000000000000000"
    assert update.changed(0, leaf) == "none → writable"
    assert update.changed(0x8000080000027, 0x8000080000037) == "0x8000080000027 → 0x8000080000037"
    assert update.changed(leaf, leaf) == "nothing"


# The fast path


@having("fast_page_fault")
def test_recorded_fast_page_faults(trace):
    """Spurious, fixed and refused fast page faults come out as recorded, and a repair is exactly W."""
    found = re.findall(
        r" fast_page_fault: .* error_code (\S*) sptep \S+ old 0x(\S+) new (\S+) spurious (\d) fixed (\d)",
        text_of(trace),
    )
    code, old, recorded, spurious, fixed = (np.array(column) for column in zip(*found, strict=True))
    write = np.array(["W" in flags.split("|") for flags in code], dtype=np.bool_)
    fetch = np.array(["F" in flags.split("|") for flags in code], dtype=np.bool_)
    old = hexadecimal(old)
    level = np.where(old & LARGE != 0, 2, 1)  # where a huge page was looked at, its slot was logged
    new, outcome = update.fast_page_fault(old, write=write, fetch=fetch, level=level, layout=layout_of(trace))
    assert (outcome == FAST.index("spurious")).tolist() == (spurious == "1").tolist()
    assert (outcome == FAST.index("fixed")).tolist() == (fixed == "1").tolist()
    repaired = outcome == 0
    assert set((old ^ new)[repaired].tolist()) <= {W} and (old == new)[~repaired].all()
    # the event reads the spte again when it is recorded: another GET_DIRTY_LOG may have taken W away meanwhile
    assert (((hexadecimal(recorded) ^ new) & ~np.uint64(W))[repaired] == 0).all()


def plain_fast(word, name, write, fetch, level, logged, ad_bits):
    """The fast path on one spte, in the kernel's order: the readable reference."""
    bits = LAYOUTS[name].bits

    def allows(value):
        executable = value >> bits["X"].low & 1 if "X" in bits else not value >> 63
        return bool(executable if fetch else value >> 1 & 1 if write else value & 1)

    if not word >> 11 & 1:
        return word, "not present"
    if level > 1 and not word & PS:
        return word, "not the last level"
    if allows(word):
        return word, "spurious"
    new = word
    if not ad_bits and name.endswith("ept") and word >> 52 & 3 == 1 and not word & 7:
        new = word & ~7 & ~(0b101 << 54) | word >> 54 & 0b101
    if write and word >> bits["MMU_W"].low & 1:
        new |= W
        if level > 1 and logged:
            return word, "large page in a logged slot"
    return (new, "fixed") if new != word and allows(new) else (word, "more than W is missing")


@given(
    st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 0xFFF).map(lambda low: low | 0x7_5000_0000_0000_0), min_size=1),
    st.sampled_from(SIX),
    st.sampled_from(["read", "write", "fetch"]),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
)
def test_fast_path_equals_the_plain_one(words, name, access, level, logged, ad_bits):
    """On any words, accesses and levels the vectorised fast path does what the plain one does step by step."""
    keywords = {"write": access == "write", "fetch": access == "fetch", "level": level, "logged": logged}
    array = np.array(words, dtype=np.uint64)
    new, outcome = update.fast_page_fault(array, **keywords, ad_bits=ad_bits, layout=name)
    plain = [plain_fast(word, name, *keywords.values(), ad_bits) for word in words]
    assert list(zip(new.tolist(), [FAST[code] for code in outcome], strict=True)) == plain
    assert update.fast_page_fault(words[0], **keywords, ad_bits=ad_bits, layout=name) == (new[0], outcome[0])


def test_access_tracked_entries_come_back_without_w_first():
    """A read gives R and X back but not W; a write sets W as well, where MMU_W allows it."""
    leaf = 0x61000034D4FE877
    hidden = update.age(leaf, "6.1-ept")
    assert STATES[classify(hidden, "6.1-ept")] == "access-tracked" and update.age(hidden, "6.1-ept") == hidden
    keywords = {"layout": "6.1-ept", "ad_bits": False}
    assert update.fast_page_fault(hidden, write=False, **keywords) == (leaf & ~W, 0)
    assert update.fast_page_fault(hidden, write=True, **keywords) == (leaf, 0)


@given(st.integers(0, 2**40 - 1), st.sampled_from(SIX), st.integers(0, 7), st.booleans())
def test_ageing_and_restoring(pfn, name, access, host):
    """Ageing clears A; where there are no A/D bits it hides the entry, and restoring gives all back but W."""
    for kind in (0, 1) if name.endswith("ept") else (0,):
        leaf = update.make_spte(pfn, access=access, host_writable=host, ad_kind=kind, layout=name)
        aged = update.age(leaf, name)
        if kind:
            assert aged & 7 == 0 and update.restore(aged, name) == leaf & ~W
        else:
            assert leaf ^ aged == LAYOUTS[name].bits.mask("A")


# Building entries


def direct(trace):
    return " direct " in re.search(r"kvm_mmu_get_page: (.*)", text_of(trace))[0]


@pytest.mark.parametrize("trace", [trace for trace in TRACES if direct(trace)], ids=lambda trace: trace.name)
def test_recorded_sptes_of_direct_mmus_are_built(trace):
    """From the pfn asked for, the old value, host permission and prefetch, the very word that KVM wrote is built."""
    text, name = text_of(trace), layout_of(trace)
    events = re.findall(r"(mark_mmio_spte|spte_requested|spte_changed|mmu_set_spte): (.*)", text)
    asked, old, was_mmio, rows = (None, 0), {}, set(), []
    for event, rest in events:
        if event == "mark_mmio_spte":
            was_mmio.add(int(rest.split()[2], 16))
            continue
        field = dict(re.findall(r"(gfn|pfn|level|old_spte|spte) (\w+)", rest))
        gfn = int(field["gfn"], 16)
        if event == "spte_requested":
            asked = gfn, int(field["pfn"], 16)
        elif event == "spte_changed":
            old[gfn, field["level"]] = int(field["old_spte"], 16)
        else:
            below = (1 << 9 * (int(field["level"]) - 1)) - 1  # a fault anywhere in a huge page builds its one spte
            word, prefetch = int(field["spte"], 16), asked[0] & ~below != gfn
            # only the TDP MMU prints the old word; elsewhere it matters where it was an MMIO spte
            before = old.pop((gfn, field["level"]), 2 if "tdp1" not in trace.name and gfn in was_mmio else 0)
            was_mmio.discard(gfn)
            pfn = word >> 12 & (1 << 40) - 1 if prefetch else asked[1] & ~below
            rows.append((pfn, int(field["level"]), "(rw" in rest, prefetch, before, word))
    pfn, level, host, prefetch, before, word = zip(*rows, strict=True)
    built = update.make_spte(
        np.array(pfn, dtype=np.uint64),
        level=level,
        host_writable=host,
        prefetch=prefetch,
        old=np.array(before, dtype=np.uint64),
        layout=name,
    )
    assert [hex(made) for made in built.tolist()] == [hex(recorded) for recorded in word]


@having("kvm_tdp_mmu_spte_changed")
def test_recorded_pointers_to_tables_are_built(trace):
    """Every pointer to a lower table that the TDP MMU printed is what make_table builds from its pfn."""
    level, _, new = changes(trace)
    name = layout_of(trace)
    tables = new[classify(new, name, level) == spte.NON_LEAF]
    pfn = LAYOUTS[name].bits.field(tables, "PFN")
    assert tables.size and update.make_table(pfn, layout=name).tolist() == tables.tolist()


def test_a_recorded_split():
    """The 4 KiB entries that KVM write-protected after a split are those that the large leaf splits into."""
    trace = next(trace for trace in TRACES if trace.name.startswith("npt1_tdp1_I"))
    found = re.findall(r"spte_changed: as id \d+ gfn (\S+) level (\d) old_spte (\S+) new_spte (\S+)", text_of(trace))
    small, checked = {}, 0
    for gfn, level, old, new in ((int(g, 16), int(n), int(o, 16), int(w, 16)) for g, n, o, w in found):
        if level == 2 and old & PS and not new & PS and new:
            small |= dict(enumerate(update.split(old).tolist(), start=gfn))
        elif level == 1 and gfn in small:
            assert old == small.pop(gfn)
            checked += 1
    assert checked == 1024


@pytest.mark.parametrize("trace", [trace for trace in TRACES if "npt0_G2" in trace.name], ids=lambda trace: trace.name)
def test_recorded_sptes_of_shadow_paging_are_built(trace):
    """Under shadow paging the guest's own tables, ANDed down the walk, give the rights of the spte that KVM wrote."""
    events = re.findall(r"(pagetable_walk|paging_element|spte_requested|mmu_set_spte): (.*)", text_of(trace))
    access, asked, there, checked = ALL, (None, 0), {}, 0
    for event, rest in events:
        if event == "pagetable_walk":
            access = ALL
        elif event == "paging_element":
            entry = int(rest.split()[1], 16)
            access &= entry & (WRITE | USER) | (0 if entry >> 63 else EXEC)
        elif event == "spte_requested":
            asked = tuple(int(word, 16) for word in rest.split()[1:4:2])
        else:
            gfn, word, place = int(rest.split()[1], 16), int(rest.split()[3], 16), rest.split()[-1]
            if gfn == asked[0]:  # else a prefetch: its walk is not printed
                fresh = update.make_spte(asked[1], access=access)  # nothing there, or write-protected meanwhile
                over = update.make_spte(asked[1], access=access, old=there.get(place, 0))
                assert word in (fresh, over)
                checked += 1
            there[place] = word
    assert checked > 600


def plain_make(pfn, level, access, host, shadowed, prefetch, old, nx_huge_pages):
    """make_spte for NPT in the kernel's order, one entry at a time: the readable reference."""
    word = PRESENT | P
    if not prefetch:
        word |= A
    if level > 1 and nx_huge_pages:
        access &= ~EXEC
    if not access & EXEC:
        word |= NX
    if access & USER:
        word |= U
    if level > 1:
        word |= PS
    if host:
        word |= HOST
    else:
        access &= ~WRITE
    word |= pfn << 12
    if access & WRITE:
        word |= W | MMU
        if old & W and (level == 1 or old & PS):
            return word
        if shadowed:
            return word & ~(W | MMU)
        word |= D
    return word


@given(
    st.lists(
        st.tuples(
            st.integers(0, 2**40 - 1),
            st.integers(1, 3),
            st.integers(0, 7),
            st.booleans(),
            st.booleans(),
            st.booleans(),
            st.sampled_from([0, 2, 0x80, 0x82, 0x827, 0xE67, 0x8000080000027]),
        ),
        min_size=1,
    ),
    st.booleans(),
    st.sampled_from(["6.1-npt", "6.12-npt"]),
)
def test_building_equals_the_plain_way(rows, nx_huge_pages, name):
    """Arrays of entries are built as one builds each entry alone, step by step."""
    pfn, level, access, host, shadowed, prefetch, old = zip(*rows, strict=True)
    keywords = {"nx_huge_pages": nx_huge_pages, "layout": name}
    built = update.make_spte(
        np.array(pfn, dtype=np.uint64),
        level=level,
        access=access,
        host_writable=host,
        shadowed=shadowed,
        prefetch=prefetch,
        old=np.array(old, dtype=np.uint64),
        **keywords,
    )
    assert built.tolist() == [plain_make(*row, nx_huge_pages) for row in rows]
    legal = classify(built, name, np.array(level, dtype=np.int64))
    assert np.isin(legal, [spte.WRITABLE, spte.GUEST_TABLE, spte.HOST_READ_ONLY]).all()
    assert not spte.unnamed(built, name).any()


@pytest.mark.parametrize(
    ("word", "keywords"),
    [
        (0x60000045529CB77, {"layout": "6.1-ept"}),
        (0x61000034D4FE877, {"layout": "6.1-ept", "ad_kind": 1}),
        (0x60000021BE00BF3, {"layout": "6.1-ept", "level": 2, "nx_huge_pages": True}),
        (0x86000080A5669B37, {"layout": "6.12-ept", "ipat": False}),
        (0x1003EB27E67, {}),
        (0x100B4A00EA7, {"level": 2, "old": 0x100B1B16827, "old_tables_count": True}),
        (0x100B4A00EE7, {"level": 2, "old": 0x100B1B16827}),
    ],
)
def test_sptes_seen_on_other_machines_are_built(word, keywords):
    """Sptes of public traces are built from their pfn and what is known of the host."""
    pfn = word >> 12 & (1 << 40) - 1
    assert hex(update.make_spte(pfn, **keywords)) == hex(word)


def test_a_page_that_only_executes():
    """With execute-only support an EPT entry may lack R; without, every present entry has it."""
    assert update.make_spte(1, access=EXEC, layout="6.1-ept") & 7 == 4
    assert update.make_spte(1, access=EXEC, layout="6.1-ept", exec_only=False) & 7 == 5


def test_tables_without_ad_bits():
    """A pointer to a table carries A, or says that there are no A/D bits."""
    assert hex(update.make_table(0x7ABB7, ad_bits=False, layout="6.1-ept")) == "0x1000007abb7807"
    assert update.make_table(1, layout="6.12-ept") >> 63 == 1


def test_splitting_keeps_everything_but_the_size():
    """A 2 MiB leaf becomes 512 neighbours with its rights; under NX huge pages they may be executed again."""
    large = update.make_spte(0x1200, level=2, nx_huge_pages=True)
    small = update.split(large, nx_huge_pages=True)
    assert (small >> np.uint64(12) & np.uint64(2**40 - 1)).tolist() == list(range(0x1200, 0x1400))
    assert set((small & np.uint64(0xFFF)).tolist()) == {large & 0xFFF & ~PS} and not (small >> np.uint64(63)).any()
    huge = update.split(update.make_spte(0x40000, level=3), level=3)
    assert huge[1] - huge[0] == 0x200000 and (huge & np.uint64(PS)).all()
    hidden = update.age(update.make_spte(0x1200, level=2, nx_huge_pages=True, ad_kind=1, layout="6.1-ept"), "6.1-ept")
    shown = update.restore(update.split(hidden, nx_huge_pages=True, layout="6.1-ept")[0].item(), "6.1-ept")
    assert shown & 7 == 5


def test_errors_name_what_is_wrong():
    """What cannot be built is refused with the value and what was expected."""
    with pytest.raises(ValueError, match=r"layout is 3\.6-ept; expected one of Linux 6"):
        update.make_spte(1, layout="3.6-ept")
    with pytest.raises(ValueError, match="pfn is 0x10000000000; expected at most 40 bits"):
        update.make_spte(1 << 40)
    with pytest.raises(ValueError, match="level is 4 to 4"):
        update.make_spte(1, level=4)
    with pytest.raises(ValueError, match="ad_kind is 1; expected 0, or on EPT"):
        update.make_spte(1, ad_kind=1)
    with pytest.raises(ValueError, match="0xe67 at level 2 is no large leaf"):
        update.split(0xE67)
