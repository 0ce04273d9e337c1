"""mmu.readers: the simulation agrees with a plain-Python twin walk by walk, and with renewal and queueing theory."""

import heapq
import itertools

import numpy as np
import pytest

from mmu import readers
from mmu.readers import (
    Readers,
    Times,
    Walks,
    counter_rate,
    deferred,
    draw,
    flag_rate,
    requests,
    shared_counter,
    stalls,
    waited,
)

SHORT = Times(400.0)
INTERRUPTED = Times(400.0, long=8_000.0, share=0.02)
GAP = Times(3_000.0)


def rng(seed=2012):
    return np.random.default_rng(seed)


def scene(vcpus=3, replicas=4, walk=INTERRUPTED, span=60_000.0, pages=60, seed=7):
    """Walks and wanted times of a few replicas."""
    source = rng(seed)
    walks = draw(source, Readers(vcpus, walk, GAP), replicas, span)
    return walks, requests(source, replicas, pages, span / 2)


def plain_quiet(walks, replica, at):
    """When all who read at a time are out, one walk at a time."""
    out = at
    for begins, ends in zip(walks.begin[replica].tolist(), walks.end[replica].tolist(), strict=True):
        for begin, end in zip(begins, ends, strict=True):
            if begin <= at < end:
                out = max(out, end)
    return out


def plain_deferred(walks, replica, wanted, detect, round_trip):
    """Linux 3.4, event by event: unlink, flush, look, and free or leave the page to a callback."""
    freed, queue, over, flushed = {}, [], 0.0, 0.0
    for page, when in enumerate(wanted):
        at = flushed = max(flushed, when) + round_trip
        if plain_quiet(walks, replica, at) == at:
            freed[page] = at
        else:
            queue.append((at, page))
    while queue:
        begin = max(over, queue[0][0])
        over = plain_quiet(walks, replica, begin) + detect
        while queue and queue[0][0] <= begin:
            freed[queue.pop(0)[1]] = over
    return [freed[page] for page in range(len(wanted))]


def plain_waited(walks, replica, wanted, round_trip, batch):
    """Linux 3.6, batch by batch."""
    unlinked, freed, over = [], [], 0.0
    for first in range(0, len(wanted), batch):
        begin = max(over, wanted[first + batch - 1])
        over = plain_quiet(walks, replica, begin) + round_trip
        unlinked += [begin] * batch
        freed += [over] * batch
    return unlinked, freed


def test_walks_follow_one_another_past_the_span():
    """Each vCPU's walks do not overlap, come in order, begin before time 0 and end after the span."""
    walks = draw(rng(), Readers(5, INTERRUPTED, GAP), 7, 40_000.0)
    assert (walks.begin < walks.end).all()
    assert (walks.begin[..., 1:] >= walks.end[..., :-1]).all()
    assert (walks.end[..., -1] > 40_000.0).all()
    assert walks.begin.dtype == walks.end.dtype == np.float64


def test_who_reads_and_until_when():
    """The end of a grace period is what a look at each walk gives."""
    walks, wanted = scene()
    expected = [[plain_quiet(walks, replica, at) for at in row] for replica, row in enumerate(wanted.tolist())]
    assert walks.quiet(wanted).tolist() == expected


def test_edges_of_a_walk():
    """A walk counts from its begin on and no longer at its end."""
    walks = Walks(np.array([[[10.0, 30.0]]]), np.array([[[20.0, 99.0]]]), 50.0)
    assert walks.quiet([[9.0, 10.0, 19.0, 20.0, 30.0]]).tolist() == [[9.0, 20.0, 20.0, 20.0, 99.0]]


def test_a_time_after_the_span_is_refused():
    """Nothing is said about times for which no walks were drawn."""
    walks, _ = scene(span=1000.0)
    with pytest.raises(ValueError, match="draw a longer span"):
        walks.quiet([[1001.0]])


@pytest.mark.parametrize(("detect", "round_trip"), [(0.0, 0.0), (700.0, 0.0), (700.0, 300.0), (0.0, 400.0)])
def test_pages_through_rcu_as_the_twin_has_them(detect, round_trip):
    """Page by page, the freeing of 3.4 happens when the plain version frees, after one flush a page."""
    walks, wanted = scene()
    freeing = deferred(walks, wanted, detect, round_trip=round_trip)
    for replica, row in enumerate(wanted.tolist()):
        expected = plain_deferred(walks, replica, row, detect, round_trip)
        assert freeing.freed[replica].tolist() == pytest.approx(expected, rel=1e-12)
    assert (np.diff(freeing.unlinked) >= round_trip - 1e-6).all()
    assert (freeing.freed - freeing.unlinked >= round_trip - 1e-6).all()


@pytest.mark.parametrize("batch", [1, 4])
def test_pages_after_a_flush_as_the_twin_has_them(batch):
    """Page by page, the freeing of 3.6 happens when the plain version frees."""
    walks, wanted = scene(walk=SHORT)
    freeing = waited(walks, wanted, 300.0, batch)
    for replica, row in enumerate(wanted.tolist()):
        unlinked, freed = plain_waited(walks, replica, row, 300.0, batch)
        assert (freeing.unlinked[replica].tolist(), freeing.freed[replica].tolist()) == (unlinked, freed)


@pytest.mark.parametrize(
    "free", [lambda walks, wanted: deferred(walks, wanted), lambda walks, wanted: waited(walks, wanted, 300.0)]
)
def test_no_page_is_freed_under_a_reader(free):
    """No walk that was under way when a page was unlinked is still under way when it is freed."""
    walks, wanted = scene(vcpus=6)
    freeing = free(walks, wanted)
    at, freed = freeing.unlinked[:, None, None, :], freeing.freed[:, None, None, :]
    begin, end = walks.begin[..., None], walks.end[..., None]
    assert not ((begin <= at) & (at < end) & (freed < end)).any()


def test_pages_that_wait():
    """A page waits from its unlinking up to its freeing; a batch of 4 never leaves more than 4 waiting."""
    walks, wanted = scene()
    at = np.sort(rng(3).random((4, 50)) * 30_000.0, axis=-1)
    freeing = deferred(walks, wanted)
    both = zip(freeing.unlinked, freeing.freed, at, strict=True)
    expected = [[int(((row <= t) & (gone > t)).sum()) for t in times] for row, gone, times in both]
    assert freeing.waiting(at).tolist() == expected
    assert freeing.average(2_000.0, 25_000.0) == pytest.approx(
        np.mean([freeing.waiting(np.linspace(2_000.0, 25_000.0, 20_001)[None, :].repeat(4, axis=0))]), rel=1e-2
    )
    batched = waited(walks, wanted, 300.0, 4)
    assert int(batched.waiting(at).max()) == 4


@pytest.mark.parametrize("walk", [SHORT, Times(400.0, fixed=True), INTERRUPTED])
@pytest.mark.parametrize("vcpus", [1, 8, 64])
def test_stalls_follow_renewal_theory(walk, vcpus):
    """The wait of a reclaimer has the distribution (1 - p + p F(x))^n, its atom at 0 and its mean included."""
    model = Readers(vcpus, walk, GAP)
    waits = stalls(rng(), model, 20_000, 40 * model.cycle)
    grid = np.array([0.0, 50.0, 200.0, 400.0, 800.0, 2_000.0, 10_000.0])
    seen = (waits[:, None] <= grid).mean(axis=0)
    assert np.abs(seen - model.within(grid)).max() < 0.016
    assert waits.mean() == pytest.approx(model.mean_wait(), rel=0.04)
    assert model.within(0.0) == pytest.approx(model.nobody)
    q = model.quantile(0.99)
    assert (waits <= q).mean() == pytest.approx(0.99, abs=0.004)


def test_long_walks_are_met_more_often_than_they_happen():
    """One walk in fifty is long, and of the walks that a reclaimer meets more than one in four is."""
    walks = draw(rng(), Readers(1, INTERRUPTED, GAP), 4_000, 200_000.0)
    at = np.full((4_000, 1), 150_000.0)
    met = (walks.begin <= at[..., None]) & (at[..., None] < walks.end)
    share = 0.02 * 8_000 / INTERRUPTED.mean
    assert (walks.end - walks.begin)[met].mean() == pytest.approx(2 * (share * 8_000 + (1 - share) * 400), rel=0.1)
    assert share > 0.28


def test_little():
    """Pages waiting on average are pages a nanosecond times how long each waits: Little's law."""
    source = rng()
    walks = draw(source, Readers(8, INTERRUPTED, GAP), 400, 600_000.0)
    wanted = requests(source, 400, 2_000, 500_000.0)
    freeing = deferred(walks, wanted)
    middle = (wanted > 100_000.0) & (wanted < 400_000.0)
    assert np.isfinite(freeing.freed[middle]).all()
    each = (freeing.freed - freeing.unlinked)[middle].mean()
    assert freeing.average(100_000.0, 400_000.0) == pytest.approx(each * 2_000 / 500_000.0, rel=0.03)


def test_back_to_back_grace_periods():
    """Where noticing takes D and pages keep coming, a page waits D, and half of D before that on average."""
    source = rng()
    walks = draw(source, Readers(2, Times(5.0), Times(5.0)), 50, 200_000.0)
    wanted = requests(source, 50, 6_000, 150_000.0)
    freeing = deferred(walks, wanted, detect=5_000.0, at_once=False)
    middle = (wanted > 20_000.0) & (wanted < 120_000.0)
    assert (freeing.freed - freeing.unlinked)[middle].mean() == pytest.approx(1.5 * 5_000.0, rel=0.01)


def test_pages_freed_at_once():
    """Linux 3.4 frees at once with probability (1 - p)^n."""
    source = rng()
    for vcpus in (1, 4, 16):
        model = Readers(vcpus, SHORT, GAP)
        walks = draw(source, model, 500, 100_000.0)
        wanted = 20_000.0 + requests(source, 500, 40, 50_000.0)
        freeing = deferred(walks, wanted)
        assert (freeing.freed == wanted).mean() == pytest.approx(model.nobody, abs=0.02)


def test_both_schemes_pay_for_the_flush():
    """Charged the same flush, 3.4 keeps a page as long as 3.6 does where no walk is long, and no shorter than that."""
    source = rng()
    walks = draw(source, Readers(32, SHORT, GAP), 400, 120_000.0)
    wanted = requests(source, 400, 10, 100_000.0)
    rcu, flush = deferred(walks, wanted, round_trip=1_200.0), waited(walks, wanted, round_trip=1_200.0)
    kept = [(each.freed - each.unlinked).mean() for each in (rcu, flush)]
    assert kept[0] == pytest.approx(kept[1], rel=0.05)
    assert min(kept) > 1_200.0


@pytest.mark.parametrize("vcpus", [1, 2, 5, 20, 60])
def test_the_counter_is_a_queue(vcpus):
    """Exponential thinking and one fixed service: the rate of the closed queue M/D/1, from idle to saturated."""
    model = Readers(vcpus, Times(1_000.0), Times(1_000.0))
    rates = shared_counter(rng(), model, 60, 50.0, 50.0)
    assert 2 * rates.mean() == pytest.approx(counter_rate(vcpus, 1_000.0, 50.0), rel=0.01)


@pytest.mark.parametrize("vcpus", [1, 3, 12, 40])
def test_in_lockstep_the_line_is_idle_or_full(vcpus):
    """With fixed times the rate is the smaller of n / (think + service) and 1 / service."""
    model = Readers(vcpus, Times(900.0, fixed=True), Times(900.0, fixed=True))
    rates = shared_counter(rng(), model, 8, 100.0, 100.0, accesses=100)
    assert 2 * rates.mean() == pytest.approx(min(vcpus / 1000.0, 1 / 100.0) * 1e9, rel=1e-3)


def plain_counter(source, vcpus, think, transfer, own, operations):
    """Operations per second on a line, event by event."""
    heap = [(float(source.random()) * think, vcpu) for vcpu in range(vcpus)]
    heapq.heapify(heap)
    free, owner = 0.0, -1
    for number in itertools.count():
        came, vcpu = heapq.heappop(heap)
        free = max(free, came) + (own if vcpu == owner else transfer)
        owner = vcpu
        if number == operations // 5:
            start = free
        if number == operations:
            return 0.8 * operations / (free - start) * 1e9
        heapq.heappush(heap, (free + float(source.exponential(think)), vcpu))


@pytest.mark.parametrize(("vcpus", "own"), [(1, 5.0), (2, 5.0), (6, 20.0), (20, 5.0)])
def test_a_line_that_stays_is_cheap(vcpus, own):
    """With two prices, for a line that is here and one that is elsewhere, the rate is that of the plain queue."""
    model = Readers(vcpus, Times(600.0), Times(600.0))
    rates = shared_counter(rng(), model, 60, 80.0, own)
    assert 2 * rates.mean() == pytest.approx(plain_counter(rng(), vcpus, 600.0, 80.0, own, 60_000), rel=0.015)


def test_flags_of_their_own_scale():
    """A flag costs what its own line costs, for each vCPU alike; a look at every walk makes each write a fetch."""
    model = Readers(100, SHORT, GAP)
    assert flag_rate(model, 100.0, 5.0, 1e15) == pytest.approx(100 / (model.cycle + 10.0) * 1e9)
    assert flag_rate(model, 100.0, 5.0, 1e-6) == pytest.approx(100 / (model.cycle + 200.0) * 1e9)
    source, looks = rng(), 2_000.0
    paid = 0.0
    for times in (SHORT, GAP):
        seen = source.exponential(looks, 200_000) < times.draw(source, (200_000,))
        paid += 5.0 + 95.0 * seen.mean()
    assert flag_rate(model, 100.0, 5.0, looks) == pytest.approx(100 / (model.cycle + paid) * 1e9, rel=1e-3)
    fixed = Readers(1, Times(400.0, fixed=True), Times(400.0, fixed=True))
    each = 400.0 + 5.0 + 95.0 * -np.expm1(-400.0 / looks)
    assert flag_rate(fixed, 100.0, 5.0, looks) == pytest.approx(1e9 / (2 * each))


def test_the_same_seed_gives_the_same_numbers(monkeypatch):
    """A generator with the same seed gives the same waits, drawn in one batch or in many."""
    model = Readers(4, INTERRUPTED, GAP)
    assert stalls(rng(), model, 500, 40_000.0).tolist() == stalls(rng(), model, 500, 40_000.0).tolist()
    monkeypatch.setattr(readers, "_AT_ONCE", 1)
    single = stalls(rng(), model, 2_000, 40_000.0)
    assert single.shape == (2_000,)
    assert single.mean() == pytest.approx(model.mean_wait(), rel=0.15)


@pytest.mark.parametrize(
    "bad", [{"usual": 0.0}, {"usual": 1.0, "share": 0.5}, {"usual": 1.0, "long": 2.0, "share": 2.0}]
)
def test_times_that_are_none(bad):
    """A time that is not positive, and a share that is none, are refused by name."""
    with pytest.raises(ValueError, match="expected a positive usual time"):
        Times(**bad)
