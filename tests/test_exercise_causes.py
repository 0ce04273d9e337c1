"""mmu.exercise.causes: the solutions of chapter 4 pass, and each listed wrong try meets a case that breaks it."""

from itertools import pairwise
from pathlib import Path

import pytest

from mmu import scenario, trace
from mmu.causes import CAUSES, recorded_causes
from mmu.exercise import causes

BOOK = Path(__file__).parents[1] / "book/data"


def opened(name):
    return trace.read(BOOK / f"{name}.trace.gz"), scenario.load(BOOK / f"{name}.json.gz")


def cause(p, host_w, mmu_w, table, passed_on, touched):
    if passed_on:
        return "guest's fault"
    if not p:
        return "entry dropped" if touched else "first touch"
    if not host_w:
        return "host read-only"
    if table:
        return "guest page table"
    return "dirty log" if mmu_w else "guest's entry"


def without(change):
    """The right answer after a change to its arguments."""
    return lambda **bits: cause(**(bits | change(bits)))


@pytest.mark.parametrize(
    ("exercise", "right", "wrong"),
    [
        (
            lambda: causes.took_w([opened(name) for name in ("npt1_tdp1_C", "npt1_tdp1_H", "npt0_E")]),
            cause,
            [
                without(lambda _: {"passed_on": False}),
                without(lambda _: {"table": False}),
                without(lambda _: {"mmu_w": True}),
                without(lambda _: {"host_w": True}),
                without(lambda _: {"touched": False}),
                lambda p, **_: "dirty log" if p else "first touch",
            ],
        ),
        (
            causes.faults_of_a_round,
            lambda pages, writes: len({page for page, write in zip(pages, writes, strict=True) if write}),
            [
                lambda pages, writes: sum(writes),
                lambda pages, writes: len(set(pages)),
                lambda pages, writes: len(pages),
            ],
        ),
        (
            causes.faults_of_a_store,
            lambda entry, host: 2 if host in ("zero page", "shared") else 1,
            [
                lambda entry, host: 1,
                lambda entry, host: 1 + entry,
                lambda entry, host: 1 if host in ("absent", "own") else 2,
            ],
        ),
    ],
)
def test_chapter_4(exercise, right, wrong):
    """The solution passes on every case, and each wrong try is shown the first case that contradicts it."""
    check = exercise()
    assert check(right).right
    for answer in wrong:
        result = check(answer)
        assert not result.right
        assert "The first is " in repr(result)


def test_counts():
    """The two counts of chapter 4 accept the counted number and say where the first one is to any other."""
    caused = recorded_causes(*opened("npt1_tdp1_H"))
    story = [
        (CAUSES[cause], address >> 12) for cause, address in zip(caused.cause, caused.address.tolist(), strict=True)
    ]
    pairs = [
        place
        for place, ((was, here), (then, next_to)) in enumerate(pairwise(story))
        if (was, then) == ("host read-only", "entry dropped") and here == next_to
    ]
    check = causes.twice_faulted(caused)
    assert check(len(pairs)).right
    assert f"the first is at place {pairs[0]} " in repr(check(0))
    assert not check(caused.counts()["host read-only"]).right
    scene = opened("npt0_E")[1]
    run = next(run for run in scene.runs if run.phase == "E13_cr0_wp0")
    log = next(log for log in scene.of(scenario.DirtyGet) if log.ns > run.ns and log.slot == 1)
    named = set(log.bitmap.nonzero()[0].tolist())
    check = causes.named_unwritten(run, log, 0x40000000)
    assert check(len(named - set(range(8)))).right
    assert not check(len(named)).right
