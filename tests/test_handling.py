"""mmu.handling and mmu.published: faults step by step, costs by the sources' digits."""

from pathlib import Path

import numpy as np
import pytest

from mmu import handling, published, trace

TRACES = Path(__file__).parent / "data/kvm-traces"
RECORDED = sorted(TRACES.glob("*.trace.gz"))
UNDER = {  # events that the source has inside the mmu-lock, for reading or alone
    *("kvm_mmu_get_page", "kvm_mmu_set_spte", "kvm_mmu_spte_requested", "kvm_mmu_sync_page", "kvm_mmu_unsync_page"),
    *("kvm_mmu_prepare_zap_page", "kvm_mmu_zap_all_fast", "kvm_mmu_split_huge_page", "kvm_tdp_mmu_spte_changed"),
    *("kvm_set_spte_hva", "mark_mmio_spte"),
}
B = TRACES.parents[2] / "book/data/npt1_tdp1_B.trace.gz"


def plain_under_lock(flags):
    """One flags column, the readable way."""
    text = flags.decode()
    return len(text) >= 4 and text[0] == "." and text[3] != "."


@pytest.fixture(scope="module")
def recording():
    return trace.read(B)


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.name.partition(".")[0])
def test_each_kind_of_event_stands_on_one_side_of_the_lock(path):
    """In each recording the flags put an event under the lock if and only if the source has it there."""
    events = trace.read(path)
    for name in events:
        held = handling.under_lock(events[name]["flags"])
        assert held.dtype == np.bool_ and held.shape == events[name].shape
        assert held.tolist() == [plain_under_lock(flags) for flags in events[name]["flags"].tolist()]
        assert held.all() if name in UNDER else not held.any(), name


def test_flags_of_any_shape():
    """Scalars and empty arrays are answered like columns, and a line without flags is not under the lock."""
    assert handling.under_lock(b"...1.") and not handling.under_lock(b"")
    assert handling.under_lock(np.zeros((0, 3), dtype="S8")).shape == (0, 3)
    assert handling.under_lock([[b"...1", b"...."]]).tolist() == [[True, False]]


def test_every_fault_of_a_recording_has_a_story(recording):
    """Each of 1174 faults goes out and comes back, and only those whose P is clear take the lock."""
    faults = recording["kvm_page_fault"]
    tries = set(recording["fast_page_fault"]["line"].tolist())
    for fault in range(0, len(faults), 7):
        steps = handling.steps(recording, fault)
        events = [step.event for step in steps if step.event]
        assert events[:2] == ["kvm_exit", "kvm_page_fault"] and events[-1] == "kvm_entry"
        lines = [step.line for step in steps if step.event]
        assert lines == sorted(lines) and int(faults["line"][fault]) in lines
        built = not faults["error_code"][fault] & np.uint64(1)
        assert any(step.locked for step in steps) == built == (not tries.intersection(lines))
        assert [step.part for step in steps][-1] == handling.BACK
        assert all(step.said[0].isupper() and step.said.endswith(".") for step in steps)


def test_the_lock_is_taken_before_and_dropped_after_what_is_under_it(recording):
    """In a slow fault the steps under the lock are one run, between a step that takes it and one that drops it."""
    steps = handling.steps(recording, 0)
    held = [step.locked for step in steps]
    first, last = held.index(True), len(held) - 1 - held[::-1].index(True)
    assert all(held[first : last + 1])
    assert steps[first].label == "takes the mmu-lock" and steps[last + 1].label == "drops the mmu-lock"
    assert sum(step.event == "kvm_mmu_get_page" for step in steps) == 3  # the first fault of all builds three tables


def test_two_vcpus_do_not_mix():
    """With vCPUs running freely on three threads, a fault's story holds events of its own thread alone."""
    events = trace.read(TRACES / "npt1_tdp0_G.trace.gz")
    pid = {line: thread for name in events for line, thread in events[name][["line", "pid"]].tolist()}
    faults = events["kvm_page_fault"]
    assert len(np.unique(faults["pid"])) == 3  # the client's own, and two that run freely
    for fault in range(20, len(faults), 50):
        steps = handling.steps(events, fault)
        assert {pid[step.line] for step in steps if step.event} == {int(faults["pid"][fault])}


def test_a_fault_that_is_not_there_is_refused(recording):
    """A number beyond the last fault, and a fault without its VM exit, are refused with what was expected."""
    with pytest.raises(IndexError, match="expected 0 to 1173"):
        handling.steps(recording, 1174)
    alone = trace.read(b"a-1 [000] ..... 1.0: kvm_page_fault: vcpu 0 rip 0x1 address 0x2000 error_code 0x6")
    with pytest.raises(ValueError, match="its VM exit or its VM entry was not recorded"):
        handling.steps(alone, 0)


def test_an_ept_violation_is_told_by_its_error_code():
    """On Intel the recorded number is a qualification: 0x182 is told as a write that met nothing."""
    head = b"qemu-9 [001] ..... 1.%d: "
    lines = [
        b"kvm_exit: vcpu 0 reason EPT_VIOLATION rip 0x10 info1 0x182 info2 0x0 intr_info 0x0 error_code 0x0",
        b"kvm_page_fault: vcpu 0 rip 0x10 address 0x5000 error_code 0x182",
        b"kvm_entry: vcpu 0, rip 0x10",
    ]
    events = trace.read(b"\n".join(head % i + line for i, line in enumerate(lines)))
    steps = handling.steps(events, 0)
    assert "an EPT violation" in steps[1].said and "A write met a missing entry" in steps[2].said
    assert steps[3].label == "not for the fast path"


def test_rounds_of_the_dirty_log_are_what_kvm_reported(recording):
    """In each of six rounds as many faults were repaired as KVM then reported dirty pages."""
    counted, reported = handling.rounds(recording)
    assert counted.dtype == reported.dtype == np.int64
    assert counted.tolist() == reported.tolist() == [0, 256, 86, 52, 0, 256]


def test_costs_are_the_sources_own_arithmetic():
    """The costs that the facts derive from the published times come out: 13.5, 1.19, 1.21, 10.2 and 0.22 us, 211 ns."""
    fast, split = published.FAST_TDP, published.SPLIT_ON_FAULT
    assert published.per_page(fast["before"][0]).round(1) == 13.5
    assert published.per_page(fast["after"][0]).round(2) == 1.19
    assert published.per_page(split["built"])[[0, -1]].round(2).tolist() == [1.21, 10.23]
    assert published.per_page(split["eager"])[[0, -1]].round(2).tolist() == [0.22, 0.63]
    assert published.serial_section(fast["before"][0], 64).round() == 211
    assert published.per_page(2.0, gib=2) == published.per_page(1.0)


def test_the_series_of_2012_has_the_means_that_were_derived_from_it():
    """Means of the migrations: EPT 291.0 to 275.0 s, soft MMU 322.3 to 301.7 s."""
    means = {mmu: [round(float(np.mean(runs)), 1) for runs in arms] for mmu, arms in published.MIGRATION_2012.items()}
    assert means == {"EPT": [291.0, 275.0], "soft MMU": [322.3, 301.7]}
