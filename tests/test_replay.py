"""Every recorded run held against its prediction; corrupted and shuffled ones must not agree."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmu import explain, play, replay, scenario, trace

DATA = Path(__file__).parent / "data" / "kvm-traces"
NAMES = sorted(
    {path.name.split(".")[0] for path in DATA.glob("*.trace.gz")}
    & {path.name.split(".")[0] for path in DATA.glob("*.json.gz")}
)
RACING = [name for name in NAMES if "_G" in name]
ORDERED = [name for name in NAMES if name not in RACING]


def load(name: str) -> tuple[trace.Trace, scenario.Scenario]:
    """A recorded trace and its scenario."""
    return trace.read(DATA / f"{name}.trace.gz"), scenario.load(DATA / f"{name}.json.gz")


def total(result: dict[str, Any]) -> tuple[int, int]:
    """Agree and of over all kinds."""
    counts = result["counts"].values()
    return sum(count["agree"] for count in counts), sum(count["of"] for count in counts)


@pytest.mark.parametrize("name", NAMES)
def test_recorded_run_agrees_in_full(name: str) -> None:
    """Every fault, event, return, injection, value and bitmap of the recorded run is as predicted, or explained."""
    result = replay.check(DATA / f"{name}.trace.gz", scenario.load(DATA / f"{name}.json.gz"))
    assert result["disagreements"] == []
    agree, of = total(result)
    assert agree == of > 0
    assert not result["findings"] and not result["unreadable"]


def test_every_scenario_and_mmu_is_among_the_copies() -> None:
    """The copies cover both kernels, all three MMUs, three guest modes and every scenario recorded in full."""
    scenes = {name.split("_")[-1].split("-")[0] for name in NAMES}
    assert scenes >= set("B C D E F G G2 H I K L P1 P3 A".split())
    assert {name.split("_")[0] for name in NAMES} == {"k612", "npt0", "npt1"}


def test_scenario_may_be_given_as_its_json_object() -> None:
    """A dict is taken where a Scenario is."""
    data = json.loads(gzip.decompress((DATA / "npt0_D-flat32.json.gz").read_bytes()))
    text = gzip.decompress((DATA / "npt0_D-flat32.trace.gz").read_bytes())
    assert replay.check(text, data)["counts"]["faults"] == {"agree": 121, "of": 121}


@pytest.mark.parametrize("name", ["npt1_tdp1_H", "npt0_E"])
def test_prediction_does_not_come_from_the_trace(name: str) -> None:
    """An empty trace leaves every prediction standing: nothing is recorded, and as much is predicted as before."""
    scene = scenario.load(DATA / f"{name}.json.gz")
    full = replay.check(DATA / f"{name}.trace.gz", scene)["counts"]
    empty = replay.check(b"", scene)["counts"]
    for kind in ("faults", "fast", "returns", "injected"):
        assert empty[kind] == {"agree": 0, "of": full[kind]["agree"]}
    assert empty["values"] == full["values"] and empty["bitmaps"] == full["bitmaps"]


def test_prediction_ignores_recorded_bitmaps_and_error_codes() -> None:
    """With every recorded bitmap and #PF code of the scenario changed, the predicted faults are the same."""
    _, scene = load("npt0_E")
    events = tuple(
        event._replace(bitmap=~event.bitmap) if isinstance(event, scenario.DirtyGet) else event
        for event in scene.events
    )
    changed = scenario.Scenario(scene.name, scene.config, scene.guest_mode, scene.kernel, scene.params, events)
    assert np.array_equal(play.predict(scene).faults, play.predict(changed).faults)


def edited(t: trace.Trace, **columns: Any) -> trace.Trace:
    """A trace with some event arrays replaced; all lines ten times as far apart, so that events fit between them."""
    events = {name: (columns.get(name, t[name])).copy() for name in t}
    return trace.Trace(events, t.lines, t.other, t.unreadable, t.lost)


def spread(t: trace.Trace) -> trace.Trace:
    """The same trace with all lines ten times as far apart."""
    events = {name: t[name].copy() for name in t}
    for array in events.values():
        array["line"] *= 10
    return trace.Trace(events, t.lines, t.other, t.unreadable, t.lost)


def outside(t: trace.Trace) -> np.ndarray:
    """Rows of faults outside the client's own memory."""
    return np.flatnonzero(t["kvm_page_fault"]["address"] >= np.uint64(0x200000))


def corrupt_code(t: trace.Trace, rng: np.random.Generator) -> trace.Trace:
    """Flip one bit of one fault's error code."""
    faults = t["kvm_page_fault"].copy()
    faults["error_code"][rng.choice(outside(t))] ^= np.uint64(1 << rng.integers(5))
    return edited(t, kvm_page_fault=faults)


def corrupt_address(t: trace.Trace, rng: np.random.Generator) -> trace.Trace:
    """Flip one bit of one fault's address."""
    faults = t["kvm_page_fault"].copy()
    faults["address"][rng.choice(outside(t))] ^= np.uint64(1 << rng.integers(3, 20))
    return edited(t, kvm_page_fault=faults)


def corrupt_w(t: trace.Trace, rng: np.random.Generator) -> trace.Trace:
    """Flip W in one fast-path event's old spte."""
    events = t["fast_page_fault"].copy()
    rows = np.flatnonzero(events["gva"] >= np.uint64(0x200000))
    events["old"][rng.choice(rows)] ^= np.uint64(2)
    return edited(t, fast_page_fault=events)


def corrupt_order(t: trace.Trace, rng: np.random.Generator) -> trace.Trace:
    """Move a fault, its events and its return behind the dirty log that followed it."""
    marks = t["tracing_mark_write"]
    gets = marks["line"][np.char.startswith(marks["text"], b"DIRTY_GET_END")]
    lines = t["kvm_page_fault"]["line"][outside(t)]
    get = rng.choice(gets[gets > lines[0]])
    last = lines[lines < get].max()
    stop = min([line for name in t for line in t[name]["line"].tolist() if line > last and name == "kvm_entry"] + [get])
    events = {name: t[name].copy() for name in t}
    for name, array in events.items():
        if name not in ("kvm_entry", "tracing_mark_write"):
            moved = (array["line"] >= last) & (array["line"] < stop)
            array["line"][moved] = get + 1 + (array["line"][moved] - last) // 10
    return trace.Trace(events, t.lines, t.other, t.unreadable, t.lost)


CORRUPTIONS: list[tuple[str, list[Callable[[trace.Trace, np.random.Generator], trace.Trace]]]] = [
    ("npt1_tdp1_H", [corrupt_code, corrupt_address, corrupt_w, corrupt_order]),
    ("npt1_tdp1_E", [corrupt_code, corrupt_address, corrupt_w, corrupt_order]),
    ("npt0_E", [corrupt_code, corrupt_address, corrupt_order]),
    ("npt0_C-flat32", [corrupt_code, corrupt_address, corrupt_w, corrupt_order]),
    ("npt1_tdp1_G2", [corrupt_code, corrupt_address, corrupt_w, corrupt_order]),
]


@pytest.mark.parametrize(("name", "ways"), CORRUPTIONS, ids=[name for name, _ in CORRUPTIONS])
def test_every_corruption_lowers_the_agreement(name: str, ways: list[Callable[..., trace.Trace]]) -> None:
    """Each of 200 seeded corruptions of a recorded event (code, address, W, order across a dirty log) is noticed."""
    t, scene = load(name)
    t, said = spread(t), play.predict(scene)
    agree, of = total(replay.compare(t, scene, said))
    assert agree == of
    rng = np.random.default_rng(20120329)
    for number in range(200):
        way = ways[number % len(ways)]
        worse, now = total(replay.compare(way(t, rng), scene, said))
        assert worse * of < agree * now, (number, way.__name__)


@pytest.mark.parametrize("name", RACING)
def test_shuffled_racing_events_are_not_explained(name: str) -> None:
    """With the faults of a racing trace dealt out anew over their lines, most of them are no longer explained."""
    t, scene = load(name)
    rng = np.random.default_rng(1)
    faults = t["kvm_page_fault"].copy()
    rows = outside(t)
    for column in ("address", "error_code"):
        faults[column][rows] = t["kvm_page_fault"][column][rng.permutation(rows)]
    counts = replay.compare(edited(t, kvm_page_fault=faults), scene, play.predict(scene))["counts"]["faults"]
    assert counts["agree"] < counts["of"] / 3


@pytest.mark.parametrize("name", RACING)
def test_swapped_runs_are_not_explained(name: str) -> None:
    """The tasks of the two vCPUs exchanged: their faults do not follow the other's program."""
    t, scene = load(name)
    faults = t["kvm_page_fault"].copy()
    faults["vcpu"] ^= 1
    counts = replay.compare(edited(t, kvm_page_fault=faults), scene, play.predict(scene))["counts"]["faults"]
    assert counts["agree"] < counts["of"] / 2


def test_a_lost_fault_is_missed_in_a_race() -> None:
    """Without the line of one fault, an access is left that could not have succeeded, or a return without its fault."""
    t, scene = load("npt0_G2")
    said = play.predict(scene)
    for row in outside(t)[100:300:20]:
        counts = replay.compare(edited(t, kvm_page_fault=np.delete(t["kvm_page_fault"], row)), scene, said)["counts"]
        assert sum(count["agree"] for count in counts.values()) < sum(count["of"] for count in counts.values())


def test_only_overlapping_runs_race() -> None:
    """The scenarios of two vCPUs at once race, those of one vCPU do not."""
    assert all(explain.races(load(name)[1]) for name in RACING)
    assert not any(explain.races(load(name)[1]) for name in ORDERED)


def test_disagreements_name_the_line_and_both_sides() -> None:
    """A changed error code gives two disagreements: what was predicted, and what line says instead."""
    t, scene = load("npt0_D-flat32")
    faults = t["kvm_page_fault"].copy()
    row = outside(t)[5]
    faults["error_code"][row] ^= np.uint64(2)
    result = replay.compare(edited(t, kvm_page_fault=faults), scene, play.predict(scene))
    assert result["counts"]["faults"] == {"agree": 120, "of": 122}
    one, other = result["disagreements"]
    assert one["predicted"] and one["recorded"] is None and one["line"] is None
    assert other["line"] == faults["line"][row] and hex(int(faults["error_code"][row])) in other["recorded"]


def test_unknown_host_action_is_a_finding() -> None:
    """What the scenario does to the host mapping and no rule knows is said, not passed over."""
    _, scene = load("npt1_tdp1_H")
    events = (*scene.events, scenario.Host("swapoff", 0x1000000, 0x1000, 0))
    odd = scenario.Scenario(scene.name, scene.config, scene.guest_mode, scene.kernel, scene.params, events)
    assert "swapoff" in replay.check(b"", odd)["findings"][0]["rule"]


def longest(a: list[int], b: list[int]) -> int:
    """The length of a longest common subsequence, by the textbook's table."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


@given(st.lists(st.integers(0, 3), max_size=30), st.lists(st.integers(0, 3), max_size=30))
@settings(max_examples=200, deadline=None)
def test_alignment_is_a_longest_common_subsequence(a: list[int], b: list[int]) -> None:
    """What is matched is common to both, in order in both, and as long as can be."""
    left, right = replay.common(np.array(a, dtype=np.int64), np.array(b, dtype=np.int64))
    assert [a[i] for i in left] == [b[j] for j in right]
    assert np.all(np.diff(left) > 0) and np.all(np.diff(right) > 0)
    assert len(left) == longest(a, b)


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 5), st.integers(0, 2)), max_size=8),
    st.tuples(st.integers(0, 20), st.integers(0, 5)),
    st.integers(0, 2),
)
@settings(max_examples=300, deadline=None)
def test_possible_states_are_those_some_order_shows(
    spans: list[tuple[int, int, int]], window: tuple[int, int], state: int
) -> None:
    """A state is possible exactly when changes and look can be placed in their spans so that the look sees it."""
    begin = window[0] * 2 + 1  # looks lie between the lines that changes lie between
    end = begin + window[1] * 2
    changes = [(-1, -1, 0)] + [(2 * a, 2 * (a + length), s) for a, length, s in spans]
    # A change to the state may be the last before a look at time x unless another surely came between.
    seen = any(
        s == state
        and any(t0 <= x and all(not (u0 > t1 and u1 < x) for u0, u1, _ in changes) for x in range(begin, end + 1))
        for t0, t1, s in changes
    )
    order = np.argsort(np.zeros(len(changes)), kind="stable")
    columns = [np.array([change[k] for change in changes], dtype=np.int64)[order] for k in range(3)]
    table = explain.Changes(np.zeros(len(changes), dtype=np.int64), *columns, np.zeros(len(changes), dtype=np.bool))
    one = np.zeros(1, dtype=np.int64)
    assert bool(explain.possible(table, one, one + begin, one + end, one + state)[0]) == seen
