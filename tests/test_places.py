"""mmu.places: which access a line of a trace stands at."""

import json
import re

import numpy as np
import pytest

from mmu import places, scenario, trace

VCPU = {"t": "vcpu", "gmode": "long64", "cr0": "0x80010033", "cr3": "0x10000", "cr4": "0x20", "efer": "0xd01"}
WALK = "kvm_mmu_pagetable_walk"


def scene(*runs):
    """Runs of (vcpu, accesses), each beginning a second after the other."""
    events = [VCPU | {"vcpu": vcpu} for vcpu in sorted({vcpu for vcpu, _ in runs})]
    for second, (vcpu, accesses) in enumerate(runs):
        rows = [[op, gva, "0x0", "0x0", None] for op, gva in accesses]
        times = {"ns": (second + 1) * 10**9, "ns_end": (second + 1) * 10**9 + 9}
        events.append({"t": "run", "vcpu": vcpu, "phase": "", "accesses": rows} | times)
    return scenario.parse(json.dumps({"events": events}))


def follow(story, what):
    """The place of each walk in a trace of (second, text) lines; one task a vCPU."""
    lines, task = [], 1
    for second, text in story:
        named = re.search(r"vcpu (\d+)", text)
        task = int(named[1]) + 1 if named else task
        lines.append(f"qemu-{task} [000] ..... {second}.000000: {text}\n")
    events = trace.read("".join(lines).encode())
    walk = events[WALK]
    marks = np.zeros(walk.size, dtype=places.MARK)
    for name, field in {"line": "line", "ns": "ns", "pid": "pid", "address": "addr"}.items():
        marks[name] = walk[field]
    marks["kind"] = np.select(
        [walk["pferr"] & 16 != 0, walk["pferr"] & 2 != 0], [places.FETCHES, places.WRITES], places.READS
    )
    out = np.full(walk.size, -1, dtype=np.int64)
    ways = places.follow(events, what, marks)
    for way in ways:
        out[way.walks] = way.place
    return out.tolist(), ways


ENTRY, PF = "kvm_entry: vcpu 0", "kvm_exit: reason PF excp rip 0x1 vcpu 0"
INVLPG = "kvm_exit: vcpu 0 reason invlpg rip 0x1 info1 0x0 info2 0x0"
READ, STORE, CODE = f"{WALK}: addr 5000 pferr 0 ", f"{WALK}: addr 5000 pferr 2 W", f"{WALK}: addr 10ee pferr 10 F"
INJECTED, EMULATED = "kvm_inj_exception: #PF (0x2)", "kvm_emulate_insn: 0:1:90 (prot64)"
R, W, FLUSH = ("R", "0x5000"), ("W", "0x5000"), ("INVLPG", "0x5000")


@pytest.mark.parametrize(
    ("accesses", "story", "expected"),
    [
        ([R, W, R], [ENTRY, STORE, READ], [1, 2]),
        ([R, R], [ENTRY, READ, ENTRY, READ], [0, 0]),
        ([R, FLUSH, R], [ENTRY, READ, INVLPG, CODE, ENTRY, READ], [0, 1, 2]),
        ([R, FLUSH, R], [ENTRY, INVLPG, ENTRY, READ], [2]),
        ([W, W], [ENTRY, STORE, INJECTED, ENTRY, STORE], [0, 1]),
        ([W, W], [ENTRY, STORE, CODE, EMULATED, ENTRY, STORE], [0, 0, 1]),
        ([R, W], [ENTRY, READ, CODE, ENTRY, CODE, STORE], [0, 0, 0, 1]),
        ([("RMW", "0x5000")], [ENTRY, READ, STORE], [0, 0]),
        ([R], [ENTRY, READ, STORE], [0, 0]),
        ([("uW", "0x5000"), ("X", "0x10ee")], [ENTRY, STORE, CODE], [0, 1]),
    ],
)
def test_places(accesses, story, expected):
    """A walk stands at the first access that it can be for, after what the lines before it show to be over."""
    assert follow([(1, line) for line in story], scene((0, accesses)))[0] == expected


def test_a_run_begins_anew():
    """A walk is never laid to an access of another run, whatever its address."""
    what = scene((0, [R]), (0, [W, R]))
    assert follow([(1, ENTRY), (1, STORE), (2, READ), (2, READ)], what)[0] == [0, 2, 2]


def test_two_vcpus():
    """Walk lines carry no vCPU: they are laid along the accesses of the vCPU that their task last ran."""
    what = scene((0, [R, W]), (1, [W, R]))
    story = [(1, ENTRY), (1, STORE), (2, ENTRY[:-1] + "1"), (2, STORE), (2, READ), (2, ENTRY), (2, STORE)]
    assert follow(story, what)[0] == [1, 0, 1, 1]


def test_when_accesses_took_effect():
    """An access took effect after the last line that is not yet past it; before all lines when none comes earlier."""
    (way,) = follow([(1, ENTRY), (1, STORE), (1, READ)], scene((0, [R, W, R, W])))[1]
    assert way.after.tolist() == [1, 2, 3, 3]
    assert follow([], scene((0, [R])))[1][0].after.tolist() == [0]


def test_registers_over_time():
    """A register holds what the last load before an access put there, and its first value until then."""
    steps = places.accesses(scene((0, [R, ("CR3", "0x7000"), R, ("CR3", "0x8000")])))[0]
    assert steps.register(scenario.CR3, 0x10000).tolist() == [0x10000, 0x10000, 0x7000, 0x7000, 0x8000]


MAP = {"t": "gmap_range", "root": "0x10000", "gva": "0x7000", "gpa": "0x80007000", "n": 1, "flags": "0x63"}
NPF = "kvm_page_fault: vcpu 0 rip 0x10b2 address 0x{:x} error_code 0x10000000{:x}"
SOFT = "kvm_exit: vcpu 0 reason npf rip 0x{:x} info1 0x0 info2 0x0 intr_info 0x80000480 error_code 0x0"
LOAD, DEVICE, LOWER = ("CR3", "0x20000"), ("R", "0x7008"), ("uR", "0x5000")


@pytest.mark.parametrize(
    ("accesses", "story", "expected"),
    [
        ([LOAD, DEVICE, LOAD, DEVICE], [NPF.format(0x80007008, 4), CODE, EMULATED, ENTRY], [1]),
        ([DEVICE, LOAD, DEVICE], [NPF.format(0x80007008, 13), CODE, EMULATED, ENTRY] * 2, [0, 2]),
        ([DEVICE, LOAD, ("W", "0x7008")], [NPF.format(0x80007008, 6), CODE, EMULATED, ENTRY], [2]),
        ([DEVICE, LOAD, DEVICE], [NPF.format(0x80007008, 4), ENTRY, CODE], [0]),  # KVM emulated nothing there
        ([LOAD, LOWER, LOAD], [SOFT.format(0xA003), NPF.format(0x3800, 4), CODE, EMULATED, ENTRY], [2]),
        ([LOAD, LOWER], [*[SOFT.format(0xA003), NPF.format(0x3800, 4), CODE, EMULATED, ENTRY] * 2], [2, 2]),
    ],
)
def test_nested_faults_place_the_walks_of_emulation(accesses, story, expected):
    """CR3 loads do not exit under nested paging: the fault before an emulation, or within an interrupt, tells where."""
    what = scene((0, accesses))
    nested = {"kvm_amd.npt": "Y"}
    mapped = scenario.parse(json.dumps({"events": [MAP]})).events
    what = scenario.Scenario("", "", "", "", nested, (*mapped, *what.events))
    assert follow([(1, line) for line in [ENTRY, *story]], what)[0] == expected
