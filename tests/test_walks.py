"""mmu.walks: what a real KVM printed, and a guest in plain Python that edits its own page tables."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from mmu import scenario, trace, walks
from tests.guest import DATA as DATA_PAGES
from tests.guest import MODES, ROOTS, Guest

DATA = Path(__file__).parent / "data" / "kvm-traces"
# Elements that the kernel printed, and one outcome a walk.
RECORDED = {"npt0_E": 1584 + 396, "k612_npt0_E": 1600 + 400, "npt0_B-pae32": 3495 + 1165, "npt0_G2": 2680 + 670}
RECORDED |= {"npt1_tdp1_E": 12 + 3, "npt1_tdp1_D": 480 + 120}


def load(name):
    return trace.read(DATA / f"{name}.trace.gz"), scenario.load(DATA / f"{name}.json.gz")


def edited(events, name, **columns):
    """The events of a trace, with some columns of one of them replaced."""
    out = {event: events[event].copy() for event in walks.EVENTS}
    for column, values in columns.items():
        out[name][column] = values
    return out


@pytest.mark.parametrize("name", RECORDED)
def test_every_recorded_walk(name):
    """Each element and outcome of each walk that the kernel printed follows from the scenario."""
    check = walks.check_walks(*load(name))
    assert (check.agree, check.of, check.disagreements) == (RECORDED[name], RECORDED[name], [])


@pytest.mark.parametrize("nested", [False, True], ids=["shadow", "nested"])
@pytest.mark.parametrize("mode", MODES)
def test_guests_that_edit_their_tables(mode, nested):
    """Guests in every paging mode store to their tables, switch CR3 and CR0.WP, and every walk is still predicted."""
    codes = set()
    for seed in range(12):
        guest = Guest(mode, seed, nested)
        for length in (70, 0, 50, 60):
            guest.run(length)
            guest.gmap(ROOTS[0], DATA_PAGES + 0x2000, 0x1005000, 3, 0x5)  # the host writes entries between runs, too
        events = guest.trace()
        check = walks.check_walks(events, scenario.parse(guest.scenario()))
        assert check.agree == check.of > 300 and not check.disagreements
        codes |= set(events["kvm_mmu_walker_error"]["pferr"].tolist())
    assert {0, 2, 3, 5, 6, 7} <= codes


def test_a_wrong_element_is_named():
    """An entry, a level or an outcome that the scenario does not imply is reported at its line, the rest agrees."""
    events, scene = load("npt0_E")
    pte, level = (events["kvm_mmu_paging_element"][column].copy() for column in ("pte", "level"))
    pte[700] ^= 0x20
    level[3] = 2
    pferr = events["kvm_mmu_walker_error"]["pferr"].copy()
    pferr[9] ^= 2
    bad = edited(events, "kvm_mmu_paging_element", pte=pte, level=level)
    check = walks.check_walks(edited(bad, "kvm_mmu_walker_error", pferr=pferr), scene)
    elements = events["kvm_mmu_paging_element"]["line"]
    assert (check.agree, check.of) == (1977, 1980)
    first, second, third = check.disagreements
    assert (first["line"], first["predicted"], first["recorded"]) == (
        elements[3], f"pte {events['kvm_mmu_paging_element']['pte'][3]:x} level 1", f"pte {pte[3]:x} level 2",
    )  # fmt: skip
    assert second["line"] == elements[700] or third["line"] == elements[700]
    assert {first["kind"], second["kind"], third["kind"]} == {"walks"}


def test_the_prediction_reads_no_element():
    """A trace whose elements and errors are all replaced is predicted as before: they are never looked at."""
    events, scene = load("k612_npt0_E")
    blank = edited(events, "kvm_mmu_paging_element", pte=0xDEAD, level=1)
    blank = edited(blank, "kvm_mmu_walker_error", pferr=0x1F)

    def predicted(what):
        return walks.predict(scene, walks.follow(what, scene, walks.recorded(what).mark), walks.recorded(what))

    for ours, same in zip(vars(predicted(events)).values(), vars(predicted(blank)).values(), strict=True):
        assert np.array_equal(ours, same)


@pytest.mark.parametrize(
    ("op", "most"), [("W", 1900), ("CR3", 1950), ("CR0", 1972)], ids=["stores", "CR3 switches", "CR0 writes"]
)
def test_the_scenario_is_what_predicts(op, most):
    """Take the guest's table stores, its CR3 or its CR0 writes out of the scenario, and walks no longer agree."""
    raw = json.loads(gzip.decompress((DATA / "npt0_E.json.gz").read_bytes()))
    for event in raw["events"]:
        for access in event.get("accesses", []):
            if access[0] == op and (op != "W" or 0x4006000 <= int(access[1], 16) < 0x4007000):
                access[:3] = ["INVLPG", "0x0", "0x0"]
    check = walks.check_walks(load("npt0_E")[0], scenario.parse(json.dumps(raw)))
    assert check.of >= 1980 and 1000 < check.agree <= most


def test_lines_that_belong_to_no_walk():
    """An element without its walk, and a sixth one, count against the trace instead of vanishing."""
    _, scene = load("npt0_E")
    lines = "".join(f"x-1 [000] ..... 12.3: {text}\n" for text in (
        "kvm_mmu_paging_element: pte 1 level 4", "kvm_mmu_walker_error: pferr 0",
        "kvm_mmu_pagetable_walk: addr 1080 pferr 10 F", *["kvm_mmu_paging_element: pte 27 level 4"] * 6,
    ))  # fmt: skip
    check = walks.check_walks(trace.read(lines.encode()), scene)
    assert (check.agree, check.of) == (0, 2 + 5 + 1 + 1)
    assert [entry["line"] for entry in check.disagreements] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert "has no place in the scenario" in check.disagreements[3]["reason"]


def test_a_guest_without_paging_has_no_walks():
    """A walk recorded for a guest whose paging is off is not agreed to, and nothing to compare is no agreement."""
    flat = json.dumps(
        {"events": [{"t": "vcpu", "vcpu": 0, "gmode": "flat32", "cr0": "0x33", "cr3": 0, "cr4": 0, "efer": 0}]}
    )
    check = walks.check_walks(load("npt0_E")[0], scenario.parse(flat))
    assert (check.agree, check.of) == (0, 1980)
    nothing = walks.check_walks(trace.read(b""), scenario.parse('{"events": []}'))
    assert (nothing.agree, nothing.of) == (0, 0)
