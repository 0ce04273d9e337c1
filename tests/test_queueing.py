"""mmu.queueing: against a plain event loop with the same times, and against closed forms."""

import heapq

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmu import queueing
from mmu.queueing import bounds, exponential, fixed, repairman, simulate, simulate_memoryless, uniform

RNG = np.random.default_rng


def plain(vcpus, think, hold, fast, *, seed, faults, warmup, think_law, hold_law):
    """One row, one fault at a time: a heap of who arrives when."""
    rng = RNG(seed)
    coming = [(think * time, vcpu) for vcpu, time in enumerate(think_law(rng, (1, vcpus))[0])]
    heapq.heapify(coming)
    free = begin = arrival = waited = held = 0.0
    for step in range(warmup + faults):
        place = step % queueing.STEPS
        if not place:
            thinks = think_law(rng, (queueing.STEPS, 1)) * think
            holds = hold_law(rng, (queueing.STEPS, 1)) * hold
            beside = rng.random((queueing.STEPS, 1)) < fast if fast else np.zeros((queueing.STEPS, 1), bool)
        if step == warmup:
            begin, waited, held = arrival, 0.0, 0.0
        arrival, vcpu = heapq.heappop(coming)
        if beside[place, 0]:
            leaves = arrival
        else:
            start = max(arrival, free)
            leaves = free = start + holds[place, 0]
            waited += start - arrival
            held += holds[place, 0]
        heapq.heappush(coming, (leaves + thinks[place, 0], vcpu))
    return faults / (arrival - begin), waited / faults, held / (arrival - begin)


@given(
    vcpus=st.integers(1, 20),
    think=st.floats(0.01, 30),
    hold=st.floats(0.0, 5),
    fast=st.sampled_from([0.0, 0.3, 1.0]),
    laws=st.tuples(*[st.sampled_from([exponential, fixed, uniform])] * 2),
    seed=st.integers(0, 9),
)
def test_the_same_times_give_the_same_run(vcpus, think, hold, fast, laws, seed):
    """With the same times a row does exactly what a plain event loop does, for every law."""
    how = {"faults": 150, "warmup": 30, "think_law": laws[0], "hold_law": laws[1]}
    ours = simulate(vcpus, think, hold, fast=fast, rng=RNG(seed), **how)
    theirs = plain(vcpus, think, hold, fast, seed=seed, **how)
    assert (ours.rate[0], ours.wait[0], ours.busy[0]) == pytest.approx(theirs, rel=1e-9, abs=1e-9)


SETTINGS = [(1, 3.0, 1.0), (2, 3.0, 1.0), (8, 10.0, 1.0), (16, 10.0, 1.0), (64, 60.0, 1.0), (64, 5.0, 1.0)]


@pytest.mark.parametrize(("vcpus", "think", "hold"), SETTINGS)
@pytest.mark.parametrize("think_law", [exponential, fixed])
def test_machine_repairman(vcpus, think, hold, think_law):
    """Exponential holds give the closed form within four standard errors, whatever the law of thinking."""
    out = simulate(
        np.full(300, vcpus), think, hold, rng=RNG(7), faults=1500, warmup=30 * vcpus + 200, think_law=think_law
    )
    rate, wait = repairman(vcpus, think, hold)
    for seen, right in ((out.rate, rate), (out.wait, wait), (out.busy, rate * hold)):
        error = seen.std(ddof=1) / np.sqrt(seen.size)
        assert abs(seen.mean() - right) < 4 * error + 2e-3 * right + 1e-12


@pytest.mark.parametrize(("vcpus", "think", "hold"), SETTINGS)
def test_memoryless_chain(vcpus, think, hold):
    """The chain that knows only how many are at the lock gives the closed form's rate and share of busy time."""
    rate, busy = simulate_memoryless(np.full(300, vcpus), think, hold, rng=RNG(7), events=6000)
    right, _ = repairman(vcpus, think, hold)
    for seen, expected in ((rate, right), (busy, right * hold)):
        error = seen.std(ddof=1) / np.sqrt(seen.size)
        assert abs(seen.mean() - expected) < 4 * error + 1e-2 * expected


def test_repairman_of_two_by_hand():
    """With two vCPUs, think 3 and hold 1, the three states weigh 1, 2/3, 2/9: the lock is idle 9/17 of the time."""
    rate, wait = repairman(2, 3.0, 1.0)
    assert rate == pytest.approx(8 / 17)
    assert wait == pytest.approx(2 / (8 / 17) - 4)


@pytest.mark.parametrize("vcpus", [1, 3, 64, 416, 2000])
def test_repairman_stays_within_the_bounds(vcpus):
    """The closed form lies between the bounds up to thousands of vCPUs, and reaches both ends."""
    for think in (0.0001, 1.0, 1e6):
        rate, _ = repairman(vcpus, think, 1.0)
        least, greatest = bounds(vcpus, think, 1.0)
        assert least * (1 - 1e-9) <= rate <= greatest * (1 + 1e-9)


def test_one_vcpu_never_waits():
    """A vCPU alone never waits, so its cycle is thinking and holding."""
    out = simulate(1, 3.0, 1.0, rng=RNG(1), faults=2000, think_law=uniform, hold_law=uniform)
    assert out.wait[0] == 0
    assert out.cycle(1)[0] == pytest.approx(4.0, rel=0.05)


def test_a_saturated_lock_is_never_free():
    """Past saturation the lock is always held, and the cycle grows with the number of vCPUs."""
    many = np.array([32, 64, 128], dtype=np.int64)
    out = simulate(many, 2.0, 1.0, rng=RNG(1), faults=4000, hold_law=fixed)
    assert out.busy == pytest.approx(np.ones(3), rel=0.01)
    assert out.cycle(many) == pytest.approx(many, rel=0.01)


def test_fixed_times_reach_the_greatest_rate():
    """Fixed times give the greatest rate of the bounds on both sides of saturation."""
    many = np.array([1, 2, 4, 5, 8, 50], dtype=np.int64)
    out = simulate(many, 4.0, 1.0, rng=RNG(1), faults=3000, think_law=fixed, hold_law=fixed)
    assert out.rate == pytest.approx(bounds(many, 4.0, 1.0)[1], rel=2e-3)


def test_the_fast_path_goes_beside_the_queue():
    """When every fault is fast nobody waits and the lock is never held, however many vCPUs there are."""
    out = simulate(64, 2.0, 1.0, rng=RNG(1), faults=5000, fast=1.0)
    assert out.wait[0] == out.busy[0] == 0
    assert out.cycle(64)[0] == pytest.approx(2.0, rel=0.05)


def test_half_fast_is_half_the_holding():
    """A saturated lock serves the slow half; the fast half doubles the rate of all faults."""
    out = simulate(64, 2.0, 1.0, rng=RNG(1), faults=20_000, fast=0.5)
    assert out.rate[0] == pytest.approx(2.0, rel=0.03)


def test_first_come_first_served():
    """Times can be traced: three vCPUs that arrive at 0.5, 1 and 2 and hold for 2 wait 0, 1.5 and 2.5."""
    times = iter([np.array([[0.5, 1.0, 2.0]])])

    def arrive(rng, shape):
        return next(times, np.full(shape, 1e9))

    out = simulate(3, 1.0, 2.0, rng=RNG(0), faults=3, warmup=0, think_law=arrive, hold_law=fixed)
    assert out.wait[0] == pytest.approx((0 + 1.5 + 2.5) / 3)


@pytest.mark.parametrize(
    "wrong", [{"vcpus": 0}, {"think": -1.0}, {"hold": -1.0}, {"fast": 1.5}, {"faults": 0}, {"warmup": -1}]
)
def test_settings_out_of_range(wrong):
    """A setting that makes no sense is refused, with what was expected."""
    setting = {"vcpus": 2, "think": 1.0, "hold": 1.0, "faults": 10} | wrong
    with pytest.raises(ValueError, match="expected"):
        simulate(**setting, rng=RNG(0))


def test_rows_are_independent_of_the_tiles(monkeypatch):
    """Fixed times give the same answer however many rows advance together."""
    how = {"rng": RNG(0), "faults": 200, "think_law": fixed, "hold_law": fixed}
    whole = simulate(np.arange(1, 40), 3.0, 1.0, **how)
    monkeypatch.setattr(queueing, "TILE", 80)
    parts = simulate(np.arange(1, 40), 3.0, 1.0, **how)
    assert np.array_equal(whole.rate, parts.rate)
