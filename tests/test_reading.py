"""mmu.reading and the exercises of chapter 13: paths, lanes, and the chapter's cells on files that it has not seen."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from mmu import reading, trace
from mmu.exercise import reading as exercises

ROOT = Path(__file__).parents[1]
BOOK = ROOT / "book/data"
PUBLIC = sorted((ROOT / "tests/data/public-traces").glob("*.txt"))
RECORDED = sorted((ROOT / "tests/data/kvm-traces").glob("*.trace.gz"))
LINUX_61 = [path for path in RECORDED if not path.name.startswith("k612")]  # 6.12 counts its return values differently
BUGS = ("01-nested-ept-spurious-2024-09-09.txt", "11-ept-violation-loop-6.1host-2023-05-30.txt")


def plain_paths(recording):
    """The path of each fault, one event after the other."""
    thread = {int(row["line"]): int(row["pid"]) for name in recording for row in recording[name]}
    found, now = np.zeros(len(recording["kvm_page_fault"]), dtype=np.int8), {}
    for line, event, row in recording.order().tolist():
        name, pid = event.decode(), thread[line]
        if name in ("kvm_entry", "kvm_exit"):
            now.pop(pid, None)
        elif name == "kvm_page_fault":
            now[pid] = row
        elif pid in now:
            path = reading.NOTHING
            if name == "fast_page_fault":
                tried = recording[name][row]
                path = reading.ALLOWED if tried["spurious"] == 1 else reading.FAST if tried["fixed"] == 1 else path
            elif name in ("kvm_mmu_set_spte", "kvm_mmu_spte_requested", "kvm_mmu_get_page"):
                path = reading.SLOW
            elif name in ("mark_mmio_spte", "handle_mmio_page_fault"):
                path = reading.MMIO
            elif name == "kvm_inj_exception":
                path = reading.GUEST
            found[now[pid]] = max(found[now[pid]], path)
    return found


@pytest.mark.parametrize("path", [*RECORDED[::3], *PUBLIC], ids=lambda path: path.name.split(".")[0])
def test_paths_are_those_of_a_plain_reading(path):
    """The path of every fault is the one that a reading event by event gives."""
    recording = trace.read(path)
    assert reading.paths(recording).tolist() == plain_paths(recording).tolist()


@pytest.mark.parametrize("path", LINUX_61, ids=lambda path: path.name.split(".")[0])
def test_a_fixed_fault_has_a_repair(path):
    """On 6.1 a fault whose handler returns FIXED was repaired, and one that is SPURIOUS was allowed or built before."""
    recording = trace.read(path)
    returned = recording["direct_page_fault_ret"]
    faults, which = recording["kvm_page_fault"], reading.paths(recording)
    for ret, allowed in ((4, {reading.FAST, reading.SLOW, reading.GUEST}), (5, {reading.ALLOWED, reading.SLOW})):
        for pid in np.unique(faults["pid"]).tolist():
            mine, own = np.flatnonzero(faults["pid"] == pid), returned[returned["pid"] == pid]
            at = np.searchsorted(faults["line"][mine], own["line"][own["ret"] == ret]) - 1
            assert set(which[mine[at[at >= 0]]].tolist()) <= allowed


def test_public_bugs_by_path():
    """The storm's faults were all already allowed, the loop's have no repair."""
    storm, loop = (reading.counted(trace.read(BOOK / name)) for name in BUGS)
    assert list(storm) == ["already allowed"]
    assert list(loop) == ["no repair seen"]


def test_no_events():
    """A trace without events has no faults, no examples, no change and no lively stretch."""
    empty = trace.read(b"")
    assert reading.counted(empty) == reading.examples(empty) == {}
    assert reading.first_change(empty) is None
    assert reading.liveliest(empty) == 0
    assert reading.lanes(empty, 0) == ([], [])


def test_lanes_keep_the_order_of_the_file():
    """Rows stand in the order of their lines, in at most three lanes, each thread in its own."""
    recording = trace.read(BOOK / BUGS[1])
    rows, names = reading.lanes(recording, 1)
    lines = [int(row[4]) for row in rows]
    assert lines == sorted(lines)
    assert len(names) == 3 == len(set(names))
    vcpu = dict(recording["kvm_page_fault"][["line", "vcpu"]].tolist())
    assert all(names[row[0]] == f"vCPU {vcpu[int(row[4])]}" for row in rows if int(row[4]) in vcpu)


def chapter_cells():
    notebook = json.loads((ROOT / "book/13-reading-traces.ipynb").read_text())
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code" and "fetch" not in cell["metadata"].get("tags", []):
            yield "".join(cell["source"])


@pytest.mark.parametrize(
    "name",
    ["public-traces/03-osdev-kvm_page_fault-2025-05-20.txt", "public-traces/" + BUGS[0], "kvm-traces/npt0_E.trace.gz"],
)
def test_a_readers_file_in_the_chapter(name, monkeypatch):
    """The chapter's cells run on another file, and count that file's faults."""
    pytest.importorskip("myst_nb", reason="the book's requirements are not installed")
    pytest.importorskip("matplotlib", reason="the book's requirements are not installed")
    monkeypatch.chdir(ROOT / "book")
    names = {}
    for source in chapter_cells():
        if source.startswith("PATH = "):
            source = f"PATH = {str(ROOT / 'tests/data' / name)!r}"
        if "exercise" in source:
            break
        exec(source, names)
    faults = trace.read(ROOT / "tests/data" / name)["kvm_page_fault"]
    assert len(names["recording"]["kvm_page_fault"]) == len(faults)


FILES = [
    BOOK / name
    for name in (
        "npt1_tdp1_B.trace.gz",
        "npt1_tdp0_G.trace.gz",
        "npt1_tdp1_H.trace.gz",
        "npt0_E.trace.gz",
        "01-nested-ept-spurious-2024-09-09.txt",
    )
]


def test_twelve_lines():
    """Two lines of each kind are shown; the solution passes, and each wrong try is told its first wrong line."""
    shown, check = exercises.twelve(*FILES)
    assert len(shown) == len(set(shown)) == 12
    assert check("ZFBF BZAP AGGP").right
    for guess, wrong in (("ZFBF BZFP FGGP", "line 7"), ("BFBF BBAB AGGB", "line 1"), ("ZF", "expected 12 letters")):
        assert wrong in check(guess).message
        assert not check(guess).right
    with pytest.raises(ValueError, match="fewer than two different lines of F, A, B, Z, P"):
        exercises.twelve(FILES[3])


def path(events, fixed, spurious, built=frozenset({"kvm_mmu_spte_requested", "kvm_mmu_set_spte"}), injected=True):
    if fixed and not spurious:
        return "fast"
    if spurious:
        return "already allowed"
    if injected and "kvm_inj_exception" in events:
        return "handed back"
    return "slow" if built & set(events) else "no repair seen"


def longest(faults):
    best = now = 1
    for before, after in pairwise(faults):
        now = now + 1 if before == after else 1
        best = max(best, now)
    return best


TRACES = {file.name.split(".")[0].replace("-", "_"): trace.read(file) for file in [*FILES[1:], BOOK / BUGS[1]]}


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        (
            exercises.path_of(*TRACES.values()),
            path,
            [
                lambda events, fixed, spurious: "fast" if "fast_page_fault" in events else "slow",
                lambda events, fixed, spurious: path(
                    events, fixed, spurious, {"kvm_mmu_set_spte", "kvm_tdp_mmu_spte_changed"}
                ),
                lambda events, fixed, spurious: path(events, fixed, spurious, injected=False),
            ],
        ),
        (
            exercises.longest_run(**TRACES),
            longest,
            [
                lambda faults: max(faults.count(fault) for fault in set(faults)),
                lambda faults: longest([address for _, address in faults]),
            ],
        ),
        (
            exercises.buffer_size(),
            lambda faults_per_second, seconds, bytes_per_fault: (
                -(-max(faults_per_second) * seconds * bytes_per_fault // 1024)
            ),
            [
                lambda faults_per_second, seconds, bytes_per_fault: (
                    -(-sum(faults_per_second) * seconds * bytes_per_fault // 1024)
                ),
                lambda faults_per_second, seconds, bytes_per_fault: (
                    max(faults_per_second) * seconds * bytes_per_fault // 1024
                ),
            ],
        ),
    ],
)
def test_exercises(check, right, wrong):
    """The solution passes on every case, and each wrong try is shown the first case that contradicts it."""
    assert check(right).right, check(right)
    for answer in wrong:
        assert not check(answer).right
        assert "The first is " in repr(check(answer))


def test_kernel_lines_plain_or_gzipped(tmp_path):
    """The lines of a file are the same packed and not, and a line's number finds it."""
    text = b"first\nkvm_entry: vcpu 3\n"
    (tmp_path / "a").write_bytes(text)
    (tmp_path / "b").write_bytes(gzip.compress(text))
    assert reading.kernel_lines(tmp_path / "a") == reading.kernel_lines(tmp_path / "b")
    assert reading.kernel_lines(tmp_path / "a")[trace.read(text)["kvm_entry"]["line"][0] - 1] == "kvm_entry: vcpu 3"
