"""mmu.scenario: the recorded JSON, read into arrays, and the guest page tables that it implies."""

import gzip
import json
from pathlib import Path

import pytest

from mmu import paging, scenario

DATA = Path(__file__).parent / "data" / "kvm-traces"
SCENARIOS = sorted(DATA.glob("*.json.gz"))
VCPU = {"t": "vcpu", "vcpu": 0, "gmode": "leg32", "cr0": "0x80010033", "cr3": "0x10000", "cr4": "0x0", "efer": "0x0"}


def write(events, **more):
    return json.dumps({"scenario": "A", "prefix": "npt0", "guest_mode": "leg32", "events": events} | more)


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.name)
def test_every_access_survives(path):
    """Each access of a recorded scenario has its operation, mode, numbers and page fault in the arrays."""
    raw = json.loads(gzip.decompress(path.read_bytes()))
    runs = [event for event in raw["events"] if event["t"] == "run"]
    for run, event in zip(scenario.load(path).runs, runs, strict=True):
        rows = [
            [
                "u" * bool(user) + scenario.OPS[op], hex(gva), hex(value), hex(result),
                *([hex(error), hex(cr2)] if faulted else [None]),
            ]
            for op, user, gva, value, result, error, cr2, faulted in zip(
                run.op, run.user, run.gva, run.value, run.result, run.error, run.cr2, run.faulted, strict=True
            )
        ]  # fmt: skip
        assert rows == event["accesses"] and len(run) == event["n"]


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.name)
def test_leaves_lie_where_the_client_says(path):
    """The client noted where the first and last leaf of each range lie, and the rebuilt tables have them there."""
    words = dict(zip(*(column.tolist() for column in scenario.table_writes(scenario.load(path))[:2]), strict=True))
    ranges = [e for e in json.loads(gzip.decompress(path.read_bytes()))["events"] if e["t"] == "gmap_range"]
    large = 1024 if "pse32" in path.name else 512
    for event in ranges:
        first, last = int(event["first_pte_gpa"], 16), int(event["last_pte_gpa"], 16)
        end = int(event["gpa"], 16) + (event["n"] - (large if "level" in event else 1)) * 4096
        assert words[first] == int(event["gpa"], 16) | int(event["flags"], 16)
        assert words[last] == end | int(event["flags"], 16)


@pytest.mark.parametrize(
    ("cr4", "efer", "size", "places"), [("0x20", "0xd01", 1 << 21, 8), ("0x10", "0x0", 1 << 22, 4)]
)
def test_large_leaves_stand_one_level_up(cr4, efer, size, places):
    """A range of level 2 has one leaf for each 2 MiB, or 4 MiB under PSE, one behind the other, and no table below."""
    gmap = {"t": "gmap_range", "root": "0x10000", "gva": "0x40000000", "gpa": "0x1000000", "n": 2 * size >> 12,
            "flags": "0x87", "level": 2}  # fmt: skip
    writes = scenario.table_writes(scenario.parse(write([VCPU | {"cr4": cr4, "efer": efer}, gmap])))
    pairs = list(zip(writes.gpa.tolist(), writes.entry.tolist(), strict=True))
    (first, entry), (second, other) = [(gpa, entry) for gpa, entry in pairs if entry & 0x80]
    assert (entry, other, second - first) == (0x1000087, 0x1000087 + size, places)
    assert len(pairs) == (4 if places == 8 else 2)


def test_dirty_bitmaps_count_what_the_client_counted():
    """A bitmap has as many bits set as the client counted when it recorded it."""
    path = DATA / "npt0_B-pae32.json.gz"
    counts = [e["ndirty"] for e in json.loads(gzip.decompress(path.read_bytes()))["events"] if e["t"] == "dirty_get"]
    gets = scenario.load(path).of(scenario.DirtyGet)
    assert [int(event.bitmap.sum()) for event in gets] == counts


def test_two_levels_of_four_bytes():
    """A 32-bit guest's root takes its tables one after the other, ten address bits to a level."""
    gmap = {"t": "gmap_range", "root": "0x10000", "gva": "0x3ff000", "gpa": "0x5000", "n": 2, "flags": "0x67"}
    writes = scenario.table_writes(scenario.parse(write([gmap, VCPU])))
    assert [(hex(gpa), hex(entry)) for gpa, entry in zip(writes.gpa, writes.entry, strict=True)] == [
        ("0x10000", "0x11027"), ("0x11ffc", "0x5067"), ("0x10004", "0x12027"), ("0x12000", "0x6067"),
    ]  # fmt: skip


def test_page_directories_come_first_under_pae():
    """A PAE root takes its four page directories before any table, each pointer with P alone."""
    gmap = {"t": "gmap", "root": "0x10000", "gva": "0x1000", "gpa": "0x5000", "flags": "0x67"}
    writes = scenario.table_writes(scenario.parse(write([VCPU | {"cr4": "0x20"}, gmap])))
    assert [hex(entry) for entry in writes.entry] == ["0x11001", "0x12001", "0x13001", "0x14001", "0x15027", "0x5067"]
    assert scenario.paging_format(scenario.parse(write([VCPU | {"cr4": "0x20"}]))) is paging.PAE


def test_a_guest_without_paging_has_no_tables():
    """With CR0.PG clear nothing is laid out, and none of the recorded flat guests says otherwise."""
    flat = scenario.parse(write([VCPU | {"cr0": "0x33"}]))
    assert scenario.paging_format(flat) is None and not scenario.table_writes(flat).gpa.size


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "is no scenario"),
        ('{"events": 3}', "is no scenario"),
        (write([{"t": "phase", "ns": 1}]), r"event 0 \(phase\) of the scenario lacks 'name'"),
        (write([VCPU | {"cr0": "0xg"}]), r"event 0 \(vcpu\).*invalid literal"),
        (
            write([{"t": "gmap", "root": 0, "gva": 0, "gpa": 0, "n": 1 << 40, "flags": 7}]),
            "expected 1 to 4,194,304 pages",
        ),
        (
            write([{"t": "gmap", "root": 0, "gva": 0, "gpa": 0, "n": 512, "flags": 135, "level": 3}]),
            "level is 3; expected 1, or 2 for large pages",
        ),
        (write([VCPU | {"cr0": -1}]), "-1 is no unsigned 64-bit number"),
        (write([VCPU | {"cr0": True}]), "True is no unsigned 64-bit number"),
        (
            write([{"t": "run", "vcpu": 0, "phase": "", "ns": 0, "ns_end": 0, "accesses": [["Z", 0, 0, 0, None]]}]),
            "operation 'Z'; expected one of R, W",
        ),
        (
            write([{"t": "run", "vcpu": 0, "phase": "", "ns": 0, "ns_end": 0, "accesses": [[]]}]),
            r"event 0 \(run\)",
        ),
    ],
)
def test_a_text_that_is_no_scenario(text, message):
    """What cannot be read is refused with the event's place, its kind and the reason."""
    with pytest.raises(ValueError, match=message):
        scenario.parse(text)


def test_a_file_cut_short(tmp_path):
    """A gzip file that ends too early is refused by its name instead of crashing the reader."""
    whole = (DATA / "npt0_E.json.gz").read_bytes()
    (tmp_path / "cut.json.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.json\.gz is no complete gzip file"):
        scenario.load(tmp_path / "cut.json.gz")


def test_which_kvm_walked():
    """Under nested paging the CPU walks the guest's tables, with npt=0 KVM does."""
    assert scenario.load(DATA / "npt1_tdp1_E.json.gz").nested_paging
    assert not scenario.load(DATA / "npt0_E.json.gz").nested_paging


def test_unknown_events_are_kept():
    """An event kind that the reader does not know stays in its place as a note."""
    assert scenario.parse(write([{"t": "comet", "tail": 2}])).events == (scenario.Note("comet", {"tail": 2}),)
