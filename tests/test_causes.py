"""mmu.causes, mmu.rounds, mmu.faultlanes: why each fault happened, recorded and predicted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mmu import causes, faultlanes, rounds, scenario, trace
from mmu.causes import CAUSES, DIRTY_LOG, Caused

TRACES = Path(__file__).parent / "data/kvm-traces"
NAMES = [
    "k612_npt1_tdp1_B", "npt1_tdp1_C", "npt1_tdp1_D", "npt1_tdp1_F", "npt1_tdp1_H", "npt1_tdp1_I", "npt1_tdp1_K",
    "npt1_tdp0_B", "npt0_B-pae32", "npt0_C", "npt0_C-flat32", "npt0_E", "npt0_H-flat32", "k612_npt0_E",
]  # fmt: skip


def opened(name):
    return trace.read(TRACES / f"{name}.trace.gz"), scenario.load(TRACES / f"{name}.json.gz")


@pytest.mark.parametrize("name", NAMES)
def test_every_fault_has_its_predicted_cause(name):
    """In a recording of one vCPU each fault has, in its place, the cause that the scenario alone predicts."""
    t, scene = opened(name)
    seen, said = causes.recorded_causes(t, scene), causes.predicted_causes(scene)
    assert seen.cause.size > 0
    assert np.array_equal(seen.cause, said.cause)
    assert np.array_equal(seen.fast, said.fast)
    assert np.array_equal(seen.code, said.code)


def test_another_cause_is_seen():
    """A trace whose guest entries are given a D bit, or whose sptes lose HOST_W, shows other causes than predicted."""
    t, scene = opened("npt0_E")
    seen = causes.recorded_causes(t, scene)
    for event, column, bit in (("kvm_mmu_paging_element", "pte", 0x42), ("kvm_mmu_set_spte", "spte", 0)):
        changed = t[event].copy()
        changed[column] = changed[column] | np.uint64(bit) if bit else changed[column] & ~np.uint64(1 << 9)
        other = causes.recorded_causes({name: t[name] for name in [*t, "fast_page_fault"]} | {event: changed}, scene)
        assert (other.cause != seen.cause).sum() > 20


def plain_faults(run, written_before, pages):
    """One dirty-log round on NPT in plain Python: a fault at the first store to each page that lost W."""
    closed, faults = set(written_before), 0
    for op, gva in zip(run.op.tolist(), run.gva.tolist(), strict=True):
        page = (gva - rounds.DATA) >> 12
        if scenario.OPS[op] == "W" and 0 <= page < pages and page in closed:
            closed.discard(page)
            faults += 1
    return faults


@pytest.mark.parametrize(("interval", "share"), [(16, 0.5), (64, 0.2), (300, 1.0)])
def test_rounds_are_the_first_stores(interval, share):
    """On NPT a round has one fault for each page first stored to since the log was read, and all are repaired fast."""
    laid = rounds.scene(True, interval, share, pages=40, edits=0)
    result = rounds.run("NPT", interval, share, pages=40, edits=0)
    expected = [plain_faults(run, range(40), 40) for run in laid.runs[1:]]
    assert result.table()[:, DIRTY_LOG].tolist() == expected == result.dirty.tolist() == result.written.tolist()
    assert result.caused.fast.all()
    assert result.table().sum() == sum(expected)


def test_machines_differ_in_who_repairs():
    """Without table edits the three machines have the same faults; only the soft MMU of today repairs none fast."""
    runs = {name: rounds.run(name, 64, edits=0) for name in rounds.MACHINES}
    tables = [result.table().tolist() for result in runs.values()]
    assert tables[0] == tables[1] == tables[2]
    fast = {name: int(result.caused.fast.sum()) for name, result in runs.items()}
    total = int(np.sum(tables[0]))
    assert fast == {"NPT": total, "soft MMU": 0, "soft MMU, series of 2012": total}


def test_a_reloaded_root_opens_what_the_log_closed():
    """With table edits the soft MMU has fewer faults than NPT, and its log names pages that nobody wrote."""
    npt, soft = rounds.run("NPT", 64), rounds.run("soft MMU", 64)
    assert np.array_equal(npt.written, soft.written)
    assert soft.faults.size < npt.faults.size
    assert (soft.dirty[1:] > soft.written[1:]).all()
    assert {"guest page table", "guest's entry"} <= set(soft.caused.counts())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("EPT",), "expected one of NPT"), (("NPT", 8, 2.0), "between 0 and 1"), (("NPT", 8, 0.5), "pages is 600")],
)
def test_rounds_refuse_nonsense(arguments, said):
    """A machine, share or size that does not exist is refused with what was expected."""
    with pytest.raises(ValueError, match=said):
        rounds.run(*arguments, **({"pages": 600} if "600" in said else {}))


def test_lanes_count_places_that_differ():
    """The picture's text counts the faults whose cause is the predicted one in that place."""
    one = Caused(*(np.array([2, 2, 5], dtype=np.int64) for _ in Caused._fields))
    other = one._replace(cause=np.array([2, 5, 5], dtype=np.int64))
    alt = faultlanes.fault_lanes({"a": (one, other)}).alt
    assert alt == (
        "a: 3 faults, 2 with the cause that was predicted in that place: "
        f"dirty log 2 (predicted 1), {CAUSES[5]} 1 (predicted 2)."
    )
