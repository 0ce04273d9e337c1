"""mmu.spte against recorded sptes, the kernels' bit positions and a plain-Python reader of one word."""

import functools
import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmu import spte
from mmu.spte import LAYOUTS, STATES
from mmu.update import l1tf_mask, make_mmio

TRACES = sorted((Path(__file__).parent / "data" / "kvm-traces").glob("*.trace.gz"))
WORDS = st.integers(0, 2**64 - 1)
NAMES = st.sampled_from(sorted(LAYOUTS))

# name -> HOST_W, MMU_W, MMU_P, by Linux 3.4, 3.6, 5.10, 6.1 and 6.12
SOFTWARE = {
    "2012-ept": (9, None, None),
    "2012-shadow": (9, None, None),
    "3.6-ept": (10, 11, None),
    "3.6-shadow": (10, 11, None),
    "5.10-ept": (10, 11, None),
    "5.10-shadow": (10, 11, None),
    "6.1-ept": (57, 58, 11),
    "6.1-npt": (9, 10, 11),
    "6.12-ept": (57, 58, 11),
    "6.12-npt": (9, 10, 11),
}

# sptes that others saw on their machines: traces, bug reports, a dump of 2020
SEEN = [
    (0x61000034D4FE877, "6.1-ept", "writable"),
    (0x61000012EB86877, "6.1-ept", "writable"),
    (0x60000045529CB77, "6.1-ept", "writable"),
    (0x6000002C7C00B77, "6.1-ept", "writable"),
    (0x60000021BE00BF3, "6.1-ept", "writable"),
    (0x6000001C6E00B77, "6.1-ept", "writable"),
    (0x2C583B907, "6.1-ept", "non-leaf"),
    (0x100B1B16827, "6.1-npt", "non-leaf"),
    (0x100B4A00EA7, "6.1-npt", "writable"),
    (0x1003EB27E67, "6.1-npt", "writable"),
    (0x5A0, "6.1-ept", "removed"),
    (0x86000080A5669B37, "6.12-ept", "writable"),
    (0x80000000000005A0, "6.12-ept", "frozen"),
    (0x800000010BC97907, "6.12-ept", "non-leaf"),
    (0x8BE2171025, "5.10-shadow", "write-protected: host read-only"),
    (0x1000007ABB7007, "5.10-ept", "non-leaf"),
    (0x1000005D48FC76, "5.10-ept", "illegal"),  # W and X without R: the reporter's own patch made it
]


def layout_of(trace):
    return "6.12-npt" if trace.name.startswith("k612") else "6.1-npt"


@functools.cache
def text_of(trace):
    with gzip.open(trace, "rt", errors="replace") as lines:
        return lines.read()


def hexadecimal(column):
    return np.array([int(word, 16) for word in column], dtype=np.uint64)


def plain_state(word, name, level=None):
    """The state of one spte, bit by bit: the readable reference of spte.classify."""
    form = LAYOUTS[name]
    ept, kernel = name.endswith("ept"), name.split("-")[0]
    low, high = (9, None) if kernel == "2012" else SOFTWARE[name][:2]
    w, host = word >> 1 & 1, word >> low & 1
    mmu = host if high is None else word >> high & 1
    is_mmio = {
        "2012-ept": word >> 49 & 0xFF == 0xFF and word & 6 == 6,
        "3.6-ept": word >> 49 & 0xFF == 0xFF and word & 6 == 6,
        "2012-shadow": word >> 52 & 0x7FF == 0x7FF,
        "3.6-shadow": word >> 52 & 0x7FF == 0x7FF,
        "5.10-ept": word >> 52 & 3 == 3,
        "5.10-shadow": word >> 52 & 3 == 3,
        "6.1-ept": word & 7 == 6,
        "6.12-ept": word & 7 == 6 and not word >> 63,
        "6.1-npt": word >> 51 & 1 and word & 1,
        "6.12-npt": word >> 51 & 1 and word & 1,
    }[name]
    present = {"6.1": word >> 11 & 1, "6.12": word >> 11 & 1, "5.10": word != 0}.get(kernel, word & 1)
    present = bool(present) and not (is_mmio and not kernel.startswith("6"))
    if word in (0, form.none):
        return "none"
    if is_mmio and not present:
        return "mmio"
    if kernel == "6.1" and word == 0x5A0:
        return "removed"
    if kernel == "6.12" and word == 1 << 63 | 0x5A0:
        return "frozen"
    if not present:
        return "unknown"
    memory_type, kind = word >> 3 & 7, word >> 52 & 3
    if ept and kind == 1 and not word & 7 and kernel in ("5.10", "6.1", "6.12") and (host or not mmu):
        return "access-tracked"
    if (ept and (word & 3 == 2 or memory_type in (2, 3, 7))) or (not ept and not word & 1):
        return "illegal"
    dirty = word >> (9 if ept else 6) & 1 and "D" in form.bits
    if (host, mmu, w) == (0, 0, 1) and level != 1 and not word >> 7 & 1 and not dirty and not (ept and memory_type):
        return "non-leaf"
    state = {
        (1, 1, 1): "writable",
        (1, 1, 0): "write-protected: dirty log",
        (1, 0, 0): "write-protected: guest page table",
        (0, 0, 0): "write-protected: host read-only",
    }.get((host, mmu, w), "illegal")
    if kernel == "2012" and state == "write-protected: dirty log":
        marked = name == "2012-ept" and word >> 49 & 0xFF
        state = "write-protected: marked" if marked else "write-protected"
    return state


def test_layout_names_are_the_command_line_s():
    """The ten layouts carry the names that the command line promises."""
    assert set(LAYOUTS) == set(SOFTWARE)


@pytest.mark.parametrize("name", LAYOUTS)
def test_software_bits_are_where_the_kernel_has_them(name):
    """HOST_W, MMU_W and MMU_P stand at each kernel's own positions, and only software reads them."""
    form = LAYOUTS[name]
    for field, low in zip(("HOST_W", "MMU_W", "MMU_P"), SOFTWARE[name], strict=True):
        assert (form.bits[field].low if field in form.bits else None) == low
        assert low is None or field in form.software
    assert sorted((*form.hardware, *form.software)) == sorted(form.bits)


@pytest.mark.parametrize(("word", "name", "state"), SEEN)
def test_sptes_seen_on_other_machines(word, name, state):
    """Each spte in a public trace or report has the state its kernel gave it, and no bit without a name."""
    assert STATES[spte.classify(word, name)] == state
    assert spte.unnamed(word, name) == 0


@given(st.lists(WORDS | WORDS.map(lambda word: word & 0xFFF | word & 0x7F << 52), min_size=1), NAMES, st.booleans())
def test_states_equal_the_plain_reader(words, name, last):
    """The state of every word of an array is the one that a reader of single bits finds."""
    level = 1 if last else None
    found = spte.classify(np.array(words, dtype=np.uint64), name, level)
    assert [STATES[state] for state in found] == [plain_state(word, name, level) for word in words]


@pytest.mark.parametrize("name", LAYOUTS)
def test_low_and_software_bits_exhaustively(name):
    """All 2^12 low parts under each setting of the high software bits agree with the plain reader."""
    high = [0, 1 << 52, 2 << 52, 3 << 52, 1 << 57, 1 << 58, 3 << 57, 1 << 63, 0xFF << 49, 0x7FF << 52, 1 << 51]
    words = [low | top | 0x1234000 for low in range(1 << 12) for top in high]
    found = spte.classify(np.array(words, dtype=np.uint64), name)
    assert [STATES[state] for state in found] == [plain_state(word, name) for word in words]


@given(st.lists(WORDS, min_size=1), NAMES)
def test_columns_equal_fields_of_single_words(words, name):
    """Decoding an array gives, field by field, what shifting and masking each word gives."""
    columns = spte.decode(np.array(words, dtype=np.uint64), name)
    for field in LAYOUTS[name].bits.values():
        assert columns[field.name].tolist() == [word >> field.low & (1 << field.width) - 1 for word in words]
    assert [int(state) for state in columns["state"]] == [int(spte.classify(word, name)) for word in words]


def test_shapes_blocks_and_scalars():
    """Any shape keeps its shape, also beyond one block of entries, and a scalar becomes ints."""
    words = np.arange(3 * 20_000, dtype=np.uint64).reshape(3, 20_000) << np.uint64(7)
    columns = spte.decode(words, level=np.array([[1], [2], [3]], dtype=np.int64))
    assert {column.shape for column in columns.values()} == {words.shape}
    assert columns["PFN"].tolist() == (words >> np.uint64(12)).tolist()
    assert spte.classify(words[0], level=1).tolist() == columns["state"][0].tolist()
    assert spte.decode(np.array([], dtype=np.uint64))["W"].shape == (0,)
    assert all(isinstance(value, int) for value in spte.decode(0x625AE65).values())


@pytest.mark.parametrize("trace", TRACES, ids=lambda trace: trace.name)
def test_every_recorded_spte_is_legal(trace):
    """Every spte that a recorded trace prints is in a legal state and has no bit without a name."""
    text, name = text_of(trace), layout_of(trace)
    seen = re.findall(r"kvm_mmu_set_spte: gfn \S+ spte (\S+) \((\S+)\) level (\d)", text)
    changes = re.findall(r"spte_changed: .* level (\d) old_spte (\S+) new_spte (\S+)", text)
    fast = re.findall(r"fast_page_fault: .* old 0x(\S+) new (\S+) spurious", text)
    words = hexadecimal([word for word, _, _ in seen])
    columns = spte.decode(words, name, np.array([int(level) for *_, level in seen], dtype=np.int64))
    letters = ["".join((r, w, x, u)) for r, w, x, u in zip(
        np.where(columns["P"], "r", "-"), np.where(columns["W"], "w", "-"),
        np.where(columns["NX"], "-", "x"), np.where(columns["U"], "u", "-"), strict=True)]  # fmt: skip
    assert letters == [printed for _, printed, _ in seen]
    levels = [int(level) for level, _, _ in changes] * 2 + [1] * 2 * len(fast)
    more = hexadecimal([c[1] for c in changes] + [c[2] for c in changes] + [f[0] for f in fast] + [f[1] for f in fast])
    states = np.concatenate([columns["state"], spte.classify(more, name, np.array(levels, dtype=np.int64))])
    assert states.size
    assert not np.isin(states, [spte.ILLEGAL, spte.UNKNOWN]).any()
    assert not spte.unnamed(np.concatenate([words, more]), name).any()


@pytest.mark.parametrize("trace", [t for t in TRACES if "check_mmio_spte" in text_of(t)], ids=lambda trace: trace.name)
def test_recorded_mmio_sptes(trace):
    """The generation in each recorded MMIO spte is the printed one, and building the spte again gives the same word."""
    text, name = text_of(trace), layout_of(trace)
    checked = re.findall(r"check_mmio_spte: spte (\S+) kvm_gen \S+ spte-gen (\S+) valid", text)
    marked = {int(gfn, 16) for gfn in re.findall(r"mark_mmio_spte: sptep:\S+ gfn (\S+) access", text)}
    words = hexadecimal([word for word, _ in checked])
    said = spte.mmio(words, name)
    assert words.size and spte.is_mmio(words, name).all()
    assert said["generation"].tolist() == [int(generation, 16) for _, generation in checked]
    assert set(said["gfn"].tolist()) <= marked
    again = make_mmio(said["gfn"], access=said["access"], generation=said["generation"], layout=name)
    assert again.tolist() == words.tolist()


def test_generation_is_split_as_the_kernel_splits_it():
    """Generation 0x12345 stands as 0x45 from bit 3 and 0x123 from bit 52 in Linux 6.1, one bit further in 5.10."""
    assert make_mmio(0, access=0, generation=0x12345, layout="6.1-npt") == 0x45 << 3 | 0x123 << 52 | 1 << 51 | 1
    assert make_mmio(0, generation=0x12345, layout="6.1-ept") == 0x45 << 3 | 0x123 << 52 | 6
    assert make_mmio(0, generation=0x12345, layout="5.10-ept") == 0x145 << 3 | 0x91 << 54 | 3 << 52 | 6


@given(
    st.sampled_from([name for name in LAYOUTS if name.startswith(("5", "6"))]),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**18 - 1),
    st.sampled_from([0, 2, 4, 6]),
    st.sampled_from([0, 36, 39, 44, 46]),
)
def test_mmio_round_trip(name, gfn, generation, access, cache_bits):
    """What is put into an MMIO spte comes out of it, with the L1TF bits displaced or not, and it is one."""
    l1tf = l1tf_mask(cache_bits) if cache_bits else 0
    gfn &= (1 << (cache_bits or 44) - 12) - 1
    word = make_mmio(gfn, access=access, generation=generation, layout=name, l1tf=l1tf)
    kept = 0 if LAYOUTS[name].ept else access
    assert spte.mmio(word, name, l1tf=l1tf) == {"gfn": gfn, "generation": generation, "access": kept}
    assert word & l1tf == l1tf and spte.is_mmio(word, name) and not spte.is_present(word, name)
    assert STATES[spte.classify(word, name)] == "mmio"


@pytest.mark.parametrize("name", ["2012-ept", "2012-shadow", "3.6-ept", "3.6-shadow"])
def test_mmio_sptes_before_generations(name):
    """Until 3.6 an MMIO spte holds the gfn and the access alone."""
    said = spte.mmio(make_mmio(0xFEE00, access=2, generation=9, layout=name), name)
    assert said["gfn"] == 0xFEE00 and said["generation"] == 0
    assert said["access"] == (0 if name.endswith("ept") else 2)


def test_ids_of_2012():
    """254 vCPUs can be told apart on EPT, where the 255th id would look like MMIO, and 127 on shadow paging."""
    ept, shadow = LAYOUTS["2012-ept"], LAYOUTS["2012-shadow"]
    leaf = ept.bits.pack(R=1, W=1, X=1, HOST_W=1, PFN=0x1234)
    ids = np.arange(256, dtype=np.uint64)
    lookalike = spte.is_mmio(np.uint64(leaf) | ids << np.uint64(49), ept)
    assert np.flatnonzero(lookalike).tolist() == [255]
    assert np.count_nonzero(~lookalike[1:]) == ept.usable_ids == 254
    assert shadow.usable_ids == 127 == 2**7 - 1 and shadow.identification.low is None
    assert "unknown" in shadow.identification.note and "inferred" in ept.identification.note
    assert [form.usable_ids for form in LAYOUTS.values() if form.identification is None] == [0] * 8


def test_marks_of_2012():
    """A write-protected entry with an id in it is marked; with W it is writable, whatever id was left behind."""
    bits = LAYOUTS["2012-ept"].bits
    words = [bits.pack(R=1, X=1, HOST_W=1, W=w, ID=number, PFN=5) for w, number in ((0, 0), (0, 7), (1, 0), (1, 7))]
    names = [STATES[spte.classify(word, "2012-ept")] for word in words]
    assert names == ["write-protected", "write-protected: marked", "writable", "writable"]


@pytest.mark.parametrize("name", [name for name in LAYOUTS if not name.startswith("2012")])
def test_the_three_bits(name):
    """Of the eight settings of HOST_W, MMU_W and W four are legal, and one more is a pointer to a lower table."""
    bits, read = LAYOUTS[name].bits, 0x800 if name.startswith("6") else 0
    table = {}
    for three in range(8):
        host, mmu, w = three >> 2, three >> 1 & 1, three & 1
        word = bits.pack(**{"R" if "R" in bits else "P": 1}, HOST_W=host, MMU_W=mmu, W=w, PFN=9) | read
        table[host, mmu, w] = STATES[spte.classify(word, name)]
    assert table == {
        (1, 1, 1): "writable",
        (1, 1, 0): "write-protected: dirty log",
        (1, 0, 0): "write-protected: guest page table",
        (0, 0, 0): "write-protected: host read-only",
        (0, 0, 1): "non-leaf",
        (1, 0, 1): "illegal",
        (0, 1, 0): "illegal",
        (0, 1, 1): "illegal",
    }


def plain_misconfiguration(entry, level, maxphyaddr, exec_only, large_1g):
    """Why one EPT entry is malformed: the readable reference of spte.ept_misconfigured."""
    xwr, memory_type, large = entry & 7, entry >> 3 & 7, entry >> 7 & 1
    if xwr == 0:
        return "not present"
    if memory_type in (2, 3, 7):
        return "memory type"
    if xwr in (0b010, 0b110):
        return "write without read"
    if xwr == 0b100 and not exec_only:
        return "execute without read"
    reserved = set(range(maxphyaddr, 52))
    if level >= 4:
        reserved |= set(range(3, 8))
    elif level >= 2 and not large:
        reserved |= set(range(3, 7))
    elif level == 3:
        reserved |= set(range(12, 30)) if large_1g else set(range(3, 8))
    elif level == 2:
        reserved |= set(range(12, 21))
    return "reserved bits" if any(entry >> bit & 1 for bit in reserved) else "well-formed"


@given(
    st.lists(WORDS | st.integers(0, 2**12 - 1) | st.integers(0, 63).map(lambda bit: 1 << bit | 7), min_size=1),
    st.integers(1, 5),
    st.sampled_from([36, 39, 46, 52]),
    st.booleans(),
    st.booleans(),
)
def test_ept_misconfigurations(entries, level, maxphyaddr, exec_only, large_1g):
    """Each malformed EPT entry is refused for the first reason that applies: rights, memory type, reserved bits."""
    keywords = {"maxphyaddr": maxphyaddr, "exec_only": exec_only, "large_1g": large_1g}
    found = spte.ept_misconfigured(np.array(entries, dtype=np.uint64), level, **keywords)
    expected = [plain_misconfiguration(entry, level, **keywords) for entry in entries]
    assert [spte.EPT_CHECKS[why] for why in found] == expected


@given(WORDS | WORDS.map(lambda word: word & 0x0600_0000_0FFF_FFFF), NAMES)
def test_every_word_has_a_report(word, name):
    """Any 64-bit word gets a report of fixed keys that survives JSON and names its bits, state and verdict."""
    report = spte.decode_report(word, name)
    assert list(report) == ["kind", "value", "layout", "fields", "state", "verdict", "reason", "text"]
    assert json.loads(json.dumps(report)) == report
    assert report["state"] in STATES and report["text"].endswith(".") and int(report["value"], 16) == word


def test_a_real_spte_reads_like_a_sentence():
    """0x625ae65 is told to be read-only, and repairable by one bit without the lock."""
    text = spte.describe(0x625AE65)
    assert "may read and execute it, but not write" in text and "without the mmu-lock (0x625ae67)." in text
    assert spte.decode_report(0x625AE65)["verdict"] == "fast"


@pytest.mark.parametrize(
    ("word", "name", "level", "word_for_it"),
    [
        (0x625AE67, "6.1-npt", 1, "writable"),
        (0x625AEE5, "6.1-npt", 2, "slow"),  # a large page in a logged slot must be split
        (0x625A825, "6.1-npt", 1, "slow"),
        (0x625AA65, "6.1-npt", 1, "slow"),
        (0x75000034D4FE870, "6.1-ept", 1, "fast"),
        (0x35000034D4FE870, "6.1-ept", 1, "slow"),  # access-tracked without MMU_W
        (0x5A0, "6.1-npt", 1, "retry"),
        (0, "6.1-npt", 1, "slow"),
        (0x8000080000027, "6.1-npt", 1, "emulate"),
        (0x65BF827, "6.1-npt", 4, "next level"),
        (0x65BF827, "6.1-npt", 1, "illegal"),
    ],
)
def test_verdicts(word, name, level, word_for_it):
    """What a guest's write meets follows from the state and the level."""
    assert spte.verdict(word, name, level)[0] == word_for_it


def test_errors_name_what_is_wrong():
    """Unknown layouts, levels, widths and words are refused by name, with what was expected."""
    with pytest.raises(ValueError, match=r"layout is '6\.1'; expected one of 2012-ept"):
        spte.classify(0, "6.1")
    with pytest.raises(ValueError, match="level is 0 to 0"):
        spte.ept_misconfigured(7, 0, maxphyaddr=46)
    with pytest.raises(ValueError, match="maxphyaddr is 53"):
        spte.ept_misconfigured(7, 1, maxphyaddr=53)
    with pytest.raises(ValueError, match=r"6\.1-npt spte is -0x1"):
        spte.decode(-1)
    with pytest.raises(ValueError, match="cache_bits is 50"):
        l1tf_mask(50)
