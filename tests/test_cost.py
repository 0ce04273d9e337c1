"""mmu.cost: fitted to some published figures, held against the others, and against the queue it is made of."""

import numpy as np
import pytest

from mmu import cost, trials
from mmu.cost import Fault, checks, fit, forward, price, rate_to_explain, saving_to_explain
from mmu.queueing import repairman, simulate, uniform
from mmu.trials import PER_FAULT, seed
from mmu.workload import frame_buffer_pages


@pytest.mark.parametrize("law", cost.LAWS)
def test_fitted_figures_are_reproduced(law):
    """Each figure that a parameter was fitted to comes out of the model again."""
    fitted = [check for check in checks() if check.fitted]
    assert sorted(check.fitted for check in fitted) == sorted(cost.FITTED.values())
    for check in fitted:
        assert getattr(check, law) == pytest.approx(check.published, rel=1e-3), check.figure


def test_the_parts_of_a_fault():
    """A fault's parts add up, none of the fitted ones is negative, and the lock is a fifth of a slow fault."""
    model = fit()
    for fault in (model.lock, model.parallel, model.fast):
        assert fault.total == pytest.approx(fault.exit + fault.walk + fault.hold + fault.work + fault.entry)
        assert min(fault.hold, fault.work) >= 0
    assert model.fast.hold == 0
    assert model.lock.hold / model.lock.total == pytest.approx(0.21, abs=0.01)


TESTED = [
    ("idle pages under the lock, 2021", 64, 0.10),
    ("pages built anew, 2022", 4, 0.01),
    ("pages built anew, 2022", 8, 0.16),
    ("pages built anew, 2022", 16, 0.13),
    ("pages built anew, 2022", 32, 0.04),
    ("huge pages split on fault, 2022", 4, 0.02),
    ("huge pages split on fault, 2022", 8, 0.02),
    ("huge pages split on fault, 2022", 16, 0.02),
    ("huge pages split on fault, 2022", 32, 0.02),
    ("huge pages split on fault, 2022", 96, 0.02),
    ("fast path, legacy MMU, 2021", 64, 0.05),
    ("idle pages, fast path, 2021", 64, 0.05),
    ("huge pages split beforehand, 2022", 16, 0.07),
    ("waiting for the lock, 2020", 416, 0.01),
    ("parallel faults save, 2020", 416, 0.03),
    ("parallel faults save, 2021", 96, 0.03),
]


@pytest.mark.parametrize(("figure", "vcpus", "off"), TESTED)
def test_figures_that_were_not_fitted(figure, vcpus, off):
    """A figure that nothing was fitted to is met, up to the share named here."""
    (check,) = [check for check in checks() if (check.figure, check.vcpus) == (figure, vcpus)]
    assert not check.fitted
    assert abs(check.off) <= off


def test_figures_that_the_model_misses():
    """The misses are known: beyond 32 vCPUs the hold is not one number, and memory itself slows down."""
    missed = {(check.figure, check.vcpus) for check in checks() if abs(check.off) > 0.16}
    assert missed == {
        ("pages built anew, 2022", 64),
        ("pages built anew, 2022", 96),
        ("huge pages split beforehand, 2022", 32),
        ("huge pages split beforehand, 2022", 64),
        ("huge pages split beforehand, 2022", 96),
    }


def test_every_published_point_is_fitted_or_tested():
    """No published point is left out of the list."""
    listed = {(check.figure, check.vcpus) for check in checks()}
    assert {(series, point.vcpus) for series, points in PER_FAULT.items() for point in points} <= listed


@pytest.mark.parametrize("vcpus", [1, 2, 4, 8, 16, 64])
def test_the_curve_is_the_queue(vcpus):
    """The closed forms bracket the simulated queue when holds vary, but less than exponentially."""
    model = fit("fixed")
    think = model.guest + model.lock.outside
    out = simulate(
        np.full(64, vcpus), think, model.lock.hold, rng=np.random.default_rng(1), faults=2000, hold_law=uniform
    )
    seen = out.cycle(vcpus).mean()
    slowest = vcpus / repairman(vcpus, think, model.lock.hold)[0]
    assert model.cycle(model.lock, vcpus, "fixed") * 0.99 <= seen <= slowest * 1.01


def test_the_bounds_at_one_vcpu_and_at_saturation():
    """One vCPU pays the fault's sum; past saturation each further vCPU adds one hold to everyone's cycle."""
    for law in cost.LAWS:
        model = fit(law)
        assert model.cycle(model.lock, 1, law) == pytest.approx(model.guest + model.lock.total)
        step = model.cycle(model.lock, 101, law) - model.cycle(model.lock, 100, law)
        assert step == pytest.approx(model.lock.hold, rel=1e-6)
        assert model.waiting(model.lock, 1, law) == pytest.approx(0, abs=1e-9)


def test_gain_and_rate_are_inverse():
    """What a rate gains, explained backwards, gives the rate again, and so does the saving."""
    rate, saved = 12_345.0, 0.7
    gain = forward(rate, saved)
    assert rate_to_explain(gain, saved) == pytest.approx(rate)
    assert saving_to_explain(gain, rate) == pytest.approx(saved)


def test_x11perf_on_ept_is_plausible_and_the_soft_mmu_needs_more():
    """At a refresh every 30 ms the EPT gain needs 0.4 to 1.5 us a fault, the re-spins' 0.9 and 1.1 lie inside; the soft
    MMU's gain needs at least twice that."""
    rates = np.array([frame_buffer_pages(500, 2000, stride).size / 0.030 for stride in (2000, 4096)])
    needed = {mmu: saving_to_explain(seed("x11perf -comppixwin500", mmu).gain, rates) for mmu in ("EPT", "soft MMU")}
    assert needed["EPT"].min() < min(cost.saved_a_page()) < max(cost.saved_a_page()) < needed["EPT"].max()
    assert needed["soft MMU"].min() > 2 * max(cost.saved_a_page())


def test_migration_gain_is_more_than_its_faults():
    """Pre-copy at 32 MiB a second cannot take enough faults to explain dbench's gain at a microsecond each."""
    for mmu in ("EPT", "soft MMU"):
        gain = seed("migrate dbench", mmu).gain
        assert rate_to_explain(gain, max(cost.saved_a_page())) > 5 * cost.MIGRATION_PAGES


def test_seconds_saved_a_page():
    """The re-spins saved 0.93 and 1.10 us a page if their guest had 1 GiB."""
    assert cost.saved_a_page() == pytest.approx([0.928, 1.100], abs=0.001)
    assert trials.PAGES * 4096 == 1 << 30


def test_price_at_the_ends():
    """A guest that only reads takes no fault and gains nothing; 64 vCPUs that only write gain several times."""
    out = price([1, 64, 64], [0.0, 0.0, 1.0], 0.2, rng=np.random.default_rng(1), faults=500)
    assert out.per_access.tolist()[:2] == [0.0, 0.0]
    assert out.lock[0] == out.fast[0] and out.lock[1] == out.fast[1] == 64 * out.lock[0]
    assert out.fast[2] > 3 * out.lock[2]
    assert out.waiting[2] > 0.7


def test_price_grows_with_the_hold():
    """A longer hold never makes the lock faster, and leaves the fast path alone."""
    out = price(32, 0.5, [0.1, 0.3, 1.0], rng=np.random.default_rng(1), faults=500)
    assert np.all(np.diff(out.lock) < 0)
    assert np.all(np.diff(out.waiting) > 0)
    assert np.ptp(out.fast) == 0


def test_price_repeats():
    """The same generator gives the same prices."""
    one, two = (price([4, 8], 0.5, 0.2, rng=np.random.default_rng(3), faults=200) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))


def test_saturated_price_is_the_lock():
    """Past saturation the lock serves one fault a hold, whoever asks."""
    out = price(128, 1.0, 0.5, rng=np.random.default_rng(3), faults=3000)
    assert out.lock[0] * out.per_access[0] == pytest.approx(1 / 0.5, rel=0.02)


def test_fault_without_lock():
    """A fault that holds nothing costs the same however many vCPUs fault."""
    model = fit()
    assert model.cycle(Fault(), 1, "fixed") == pytest.approx(model.cycle(Fault(), 500, "fixed"))
