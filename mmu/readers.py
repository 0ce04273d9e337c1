"""Readers and a reclaimer in time: how long freeing a table page has to wait, and what a reader's announcement costs.

Each vCPU walks a page table again and again; a reclaimer takes pages out of the table and may give one back only when
every walk that could still stand on it has ended. Two ways to wait are compared (chapter 5). Both flush the TLBs first.
Linux 3.4 then hands the page to RCU and goes on; in Linux 3.6 the flush itself waits for the readers. And two ways to
announce a walk: one counter that all vCPUs write, and a flag for each. Times are nanoseconds, float64. Whoever draws
hands in a ``numpy.random.Generator``.

The simulation knows no theory: walks are drawn one after the other and looked up by time. The closed forms beside it,
from renewal theory and queueing theory, are what its tests hold it against.

>>> rng = np.random.default_rng(5)
>>> readers = Readers(8, walk=Times(400.0), gap=Times(1600.0))
>>> waits = stalls(rng, readers, replicas=4000, span=40_000.0)
>>> abs(float((waits == 0).mean()) - readers.nobody) < 0.02
True
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Index = NDArray[np.int64]

_AT_ONCE = 1 << 16  # walks drawn at once: few enough to stay in a CPU's cache


@dataclass(frozen=True)
class Times:
    """How long something takes: exponential around a mean, or always the same, or now one and now the other.

    Args:
        usual: the mean of most, ns.
        long: the mean of a few, ns.
        share: how many of all are the long ones, 0 to 1.
        fixed: each takes exactly its mean; otherwise they are exponential around it.

    >>> Times(400.0, long=50_000.0, share=0.001).mean
    449.6

    Raises:
        ValueError: a time is not positive, or ``share`` is no share.
    """

    usual: float
    long: float = 0.0
    share: float = 0.0
    fixed: bool = False

    def __post_init__(self) -> None:
        if self.usual <= 0 or self.long < 0 or not 0 <= self.share <= 1 or (self.share and not self.long):
            raise ValueError(f"{self}; expected a positive usual time, and for a share of 0 to 1 a positive long one")

    @property
    def mean(self) -> float:
        """The mean over all, ns."""
        return (1 - self.share) * self.usual + self.share * self.long

    def draw(self, rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
        """Times in an array of this shape."""
        if self.fixed:
            times = np.full(shape, self.usual, dtype=np.float64)
        else:
            times = rng.standard_exponential(shape, dtype=np.float64)
            times *= self.usual
        if self.share:
            times[rng.random(shape, dtype=np.float32) < self.share] *= self.long / self.usual
        return times

    def rest(self, x: ArrayLike) -> Floats:
        """The probability that an interval seen at a random time ends within ``x`` ns from then.

        Renewal theory: the density of what is left is P(length > x) / mean, so long intervals are met more often than
        their share. For exponential times it is that of a whole interval.
        """
        x = np.maximum(np.asarray(x, dtype=np.float64), 0.0)
        weights = ((1 - self.share) * self.usual, self.share * self.long)  # the time spent in each kind
        parts = [
            weight * (np.minimum(x / mean, 1.0) if self.fixed else -np.expm1(-x / mean))
            for weight, mean in zip(weights, (self.usual, self.long), strict=True)
            if weight
        ]
        return np.asarray(sum(parts) / self.mean, dtype=np.float64)


@dataclass(frozen=True)
class Readers:
    """vCPUs that walk, each for itself: a gap, a walk, a gap, a walk.

    Args:
        vcpus: how many.
        walk: how long a walk takes, from its begin to its end.
        gap: how long it is from one walk's end to the next one's begin.
    """

    vcpus: int
    walk: Times
    gap: Times

    @property
    def cycle(self) -> float:
        """Mean time from one walk's begin to the next, ns."""
        return self.walk.mean + self.gap.mean

    @property
    def busy(self) -> float:
        """The probability that a vCPU is inside a walk at a random time."""
        return self.walk.mean / self.cycle

    @property
    def nobody(self) -> float:
        """The probability that no vCPU is inside a walk at a random time."""
        return float((1 - self.busy) ** self.vcpus)

    def within(self, x: ArrayLike) -> Floats:
        """The probability that all who are reading at a random time have ended within ``x`` ns: (1 - p + p F(x))^n."""
        return np.asarray((1 - self.busy + self.busy * self.walk.rest(x)) ** self.vcpus, dtype=np.float64)

    def mean_wait(self) -> float:
        """The mean of the wait whose distribution is :meth:`within`, ns: the area above it."""
        grid = np.concatenate(
            [np.zeros(1, dtype=np.float64), np.geomspace(1e-3, 60 * max(self.walk.usual, self.walk.long), 1 << 14)]
        )
        return float(np.trapezoid(1 - self.within(grid), grid))

    def quantile(self, q: float) -> float:
        """The wait that is exceeded with probability 1 - q, ns; 0 where it is more likely that nobody reads."""
        low, high = 0.0, 60 * max(self.walk.usual, self.walk.long)
        if self.nobody >= q:
            return 0.0
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if self.within(middle) < q else (low, middle)
        return high


def _before(times: Floats, at: Floats) -> Index:
    """How many entries of each row of ``times (..., k)``, sorted, are <= each of ``at (..., q)``: (..., q)."""
    count = times.shape[-1]
    found = np.zeros(np.broadcast_shapes((*times.shape[:-1], 1), at.shape), dtype=np.int64)
    step = 1 << count.bit_length()
    while step := step >> 1:
        probe = found + step
        there = np.take_along_axis(times, np.minimum(probe, count) - 1, axis=-1) <= at
        found += step * (there & (probe <= count))
    return found


@dataclass(frozen=True)
class Walks:
    """Drawn walks: begin and end of each, in order, ns ``# (replica, vcpu, walk)``; complete up to ``span``."""

    begin: Floats = field(repr=False)
    end: Floats = field(repr=False)
    span: float = 0.0

    def quiet(self, at: ArrayLike) -> Floats:
        """When all walks that were under way at each time have ended; that time itself where none was.

        Args:
            at: times up to ``span`` ``# (replica, query)``.

        Raises:
            ValueError: a time after the span.
        """
        at = np.asarray(at, dtype=np.float64)
        if at.size and at.max() > self.span:
            raise ValueError(f"a time of {at.max():.0f} ns; walks were drawn up to {self.span:.0f}: draw a longer span")
        times = np.broadcast_to(at[:, None, :], (*self.begin.shape[:2], at.shape[1]))  # (replica, vcpu, query)
        place = _before(self.end, times)  # the first walk that ends later
        begin, end = (np.take_along_axis(edge, place, axis=-1) for edge in (self.begin, self.end))
        return np.where(begin <= times, end, times).max(axis=1)


def draw(rng: np.random.Generator, readers: Readers, replicas: int, span: float) -> Walks:
    """Draw what every vCPU of every replica does from time 0 until after ``span`` ns.

    Each begins at a point of its own, up to a cycle before time 0, so that nobody walks in step.
    """
    rows = (replicas, readers.vcpus)
    late = -rng.random((*rows, 1), dtype=np.float64) * readers.cycle
    parts: list[tuple[Floats, Floats]] = []
    while not parts or late.min() <= span:
        ahead = (span - float(late.min())) / readers.cycle
        count = int(ahead + 3 * ahead**0.5) + 4
        walk = readers.walk.draw(rng, (*rows, count))
        end = readers.gap.draw(rng, (*rows, count))
        end += walk
        np.cumsum(end, axis=-1, out=end)
        end += late
        parts.append((np.subtract(end, walk, out=walk), end))
        late = end[..., -1:]
    begin, end = (np.concatenate(edge, axis=-1) if len(parts) > 1 else edge[0] for edge in zip(*parts, strict=True))
    return Walks(begin, end, span)


def stalls(rng: np.random.Generator, readers: Readers, replicas: int, span: float) -> Floats:
    """How long a reclaimer that comes once, at a random time, waits for the readers it meets, ns ``# (replica,)``.

    It comes in the second half of the span, which is to be some tens of cycles; by then the start is forgotten.
    """
    each = readers.vcpus * (span / readers.cycle + 8)
    batch = max(1, int(_AT_ONCE / each))
    waits = np.empty(replicas, dtype=np.float64)
    for first in range(0, replicas, batch):
        some = slice(first, min(first + batch, replicas))
        walks = draw(rng, readers, some.stop - some.start, span)
        at = (0.5 + 0.5 * rng.random((some.stop - some.start, 1), dtype=np.float64)) * span
        waits[some] = (walks.quiet(at) - at)[:, 0]
    return waits


@dataclass(frozen=True)
class Freeing:
    """What became of pages: unlinked, then freed, ns ``# (replica, page)``; inf where the drawn walks ended before."""

    unlinked: Floats = field(repr=False)
    freed: Floats = field(repr=False)

    def waiting(self, at: ArrayLike) -> Index:
        """How many pages are unlinked and not yet freed at each time ``# (replica, query)``."""
        at = np.asarray(at, dtype=np.float64)
        return _before(self.unlinked, at) - _before(np.sort(self.freed, axis=-1), at)

    def average(self, first: float, last: float) -> float:
        """How many pages wait on average over the time from ``first`` to ``last`` ns and over all replicas."""
        waited = np.clip(self.freed, first, last) - np.clip(self.unlinked, first, last)
        return float(waited.sum() / (last - first) / len(waited))


def requests(rng: np.random.Generator, replicas: int, pages: int, span: float) -> Floats:
    """When somebody wants a page gone: so many random times before ``span`` ns, in order ``# (replica, page)``."""
    return np.sort(rng.random((replicas, pages), dtype=np.float64) * span, axis=-1)


def deferred(
    walks: Walks, wanted: Floats, detect: float = 0.0, at_once: bool = True, round_trip: float = 0.0
) -> Freeing:
    """Linux 3.4: unlink and flush, never wait for readers; if any read, a callback frees after a grace period.

    One grace period runs at a time. It begins when a page needs one and none is under way, or when the last one ends;
    it ends when all who were reading at its begin are out, ``detect`` ns later. It frees what was unlinked before it.

    Args:
        walks: what the readers do.
        wanted: when each page is to go, in order ``# (replica, page)``.
        detect: how long it takes to notice that a grace period is over, ns.
        at_once: free at once what nobody reads after the flush, as 3.4 did after a look at its counter.
        round_trip: what a flush costs, ns; the reclaimer flushes for one page after the other, and looks then.
    """
    spent = round_trip * np.arange(1, wanted.shape[-1] + 1, dtype=np.float64)
    looks = np.maximum.accumulate(wanted - spent, axis=-1) + spent + round_trip  # (replica, page) its flush is over
    unlinked = looks - round_trip
    seen = np.minimum(looks, walks.span)
    free = (walks.quiet(seen) == seen) & (looks <= walks.span) & at_once
    freed = np.where(free, looks, np.inf)
    queue = np.where(free, np.inf, looks)  # (replica, page) unlinked pages that need a grace period
    over = np.zeros((wanted.shape[0], 1), dtype=np.float64)
    while True:
        begin = np.maximum(over, queue.min(axis=-1, keepdims=True))
        running = begin <= walks.span  # (replica, 1)
        if not running.any():
            return Freeing(unlinked, freed)
        over = np.where(running, walks.quiet(np.minimum(begin, walks.span)) + detect, np.inf)
        covered = (queue <= begin) & running
        freed = np.where(covered, over, freed)
        queue[covered] = np.inf


def waited(walks: Walks, wanted: Floats, round_trip: float = 0.0, batch: int = 1) -> Freeing:
    """Linux 3.6: unlink a batch of pages, flush and wait until all who were reading are out, free the batch.

    The reclaimer does one batch after the other; a page wanted meanwhile stays in the table, in use, until its turn.

    Args:
        walks: what the readers do.
        wanted: when each page is to go, in order ``# (replica, page)``.
        round_trip: what the flush costs beside waiting for readers: looking at every flag, sending the IPIs, ns.
        batch: pages to a flush; what is left over at the end of a row is not freed.
    """
    replicas, pages = wanted.shape
    rounds = pages // batch
    unlinked = np.full((replicas, pages), np.inf, dtype=np.float64)
    freed = np.full((replicas, pages), np.inf, dtype=np.float64)
    over = np.zeros((replicas, 1), dtype=np.float64)
    for number in range(rounds):  # a round needs the end of the one before
        mine = slice(number * batch, (number + 1) * batch)
        begin = np.maximum(over, wanted[:, mine.stop - 1 : mine.stop])
        running = begin <= walks.span
        over = np.where(running, walks.quiet(np.minimum(begin, walks.span)) + round_trip, np.inf)
        unlinked[:, mine] = np.where(running, begin, np.inf)
        freed[:, mine] = over
    return Freeing(unlinked, freed)


def shared_counter(
    rng: np.random.Generator, readers: Readers, replicas: int, transfer: float, own: float, accesses: int = 400
) -> Floats:
    """Walks per second of all vCPUs together when each walk adds to a shared counter and takes away again.

    The counter's cache line is served first come, first served: ``transfer`` ns when the last to write it was another
    vCPU, ``own`` ns when it was the same. The walk and the gap are what passes between two of a vCPU's writes.

    Args:
        transfer, own: ns for one atomic operation on a line that is elsewhere, or here.
        accesses: how many operations each vCPU makes on average before counting, and again while counting.

    Returns:
        Walks per second ``# (replica,)``.
    """
    n = readers.vcpus
    row = np.arange(replicas, dtype=np.int64)[:, None]
    arrival = rng.random((replicas, n), dtype=np.float64) * readers.cycle  # (replica, vcpu) its next operation
    inside = np.zeros((replicas, n), dtype=np.bool)
    free, owner = np.zeros((replicas, 1), dtype=np.float64), np.full((replicas, 1), -1, dtype=np.int64)
    done = np.zeros((replicas, 1), dtype=np.int64)
    since, counted = np.zeros((replicas, 1), dtype=np.float64), np.zeros((replicas, 1), dtype=np.int64)
    warm, enough = accesses * n, 2 * accesses * n
    while done.min() < enough:
        # Nobody who is served from now on is back before this, so all who come earlier are served in their order.
        bound = np.maximum(free, arrival.min(axis=-1, keepdims=True)) + min(own, transfer)
        now = arrival < bound
        many = int(now.sum(axis=-1).max())
        who = np.argsort(np.where(now, arrival, np.inf), axis=-1)[:, :many]  # (replica, place in the queue)
        served = now[row, who]
        came = np.where(served, arrival[row, who], np.inf)
        last = np.concatenate([owner, who[:, :-1]], axis=-1)
        cost = np.where(who == last, own, transfer)
        # leave[k] = max(leave[k-1], came[k]) + cost[k], unrolled: a running sum of costs, a running max of starts
        total = np.cumsum(cost, axis=-1)
        leave = total + np.maximum(np.maximum.accumulate(came - total + cost, axis=-1), free)
        count = served.sum(axis=-1, keepdims=True)
        place = count - 1
        free, owner = np.take_along_axis(leave, place, axis=-1), np.take_along_axis(who, place, axis=-1)
        begins = ~inside[row, who]
        think = np.where(begins, readers.walk.draw(rng, who.shape), readers.gap.draw(rng, who.shape))
        arrival[row, who] = np.where(served, leave + think, arrival[row, who])
        inside[row, who] = np.where(served, begins, inside[row, who])
        starting = (done < warm) & (done + count >= warm)
        since, counted = np.where(starting, free, since), np.where(starting, done + count, counted)
        done += count
    return ((done - counted) / (free - since) / 2 * 1e9)[:, 0]


def counter_rate(vcpus: int, think: float, service: float) -> float:
    """Operations per second on one line by vCPUs that think for an exponential time and are served for a fixed one.

    The queue M/D/1 with so many customers. Seen when an operation ends: while it was served, each of the vCPUs that
    were away came with probability 1 - exp(-service / think). The chain's stationary distribution gives how often the
    line is left idle, and an idle line waits think / vcpus on average.

    Args:
        vcpus: how many.
        think: mean time between a vCPU's operations, ns.
        service: what one operation takes, ns.

    >>> round(counter_rate(1, 900.0, 100.0))
    1000000
    """
    counted = np.arange(vcpus, dtype=np.int64)
    waiting = np.maximum(counted, 1)[:, None]  # (left behind, 1): an idle line is first waited for, then one has come
    new = counted - (waiting - 1)  # (left behind, left behind by the next): how many came meanwhile
    away = vcpus - waiting
    log_factorial = np.concatenate(
        [np.zeros(1, dtype=np.float64), np.cumsum(np.log(np.arange(1, vcpus + 1, dtype=np.float64)))]
    )
    possible = (new >= 0) & (new <= away)
    new = np.where(possible, new, 0)
    ways = log_factorial[away] - log_factorial[new] - log_factorial[away - new]
    odds = ways + new * np.log(-np.expm1(-service / think)) - (away - new) * (service / think)
    step = np.where(possible, np.exp(odds), 0.0)
    system = step.T - np.eye(vcpus, dtype=np.float64)
    system[-1] = 1.0  # one balance equation follows from the others; the probabilities add up to 1
    stationary = np.linalg.solve(system, (counted == vcpus - 1).astype(np.float64))
    return 1e9 / (service + float(stationary[0]) * think / vcpus)


def flag_rate(readers: Readers, transfer: float, own: float, looks: float) -> float:
    """Walks per second of all vCPUs together when each announces its walks in a flag of its own.

    A flag's line stays with its vCPU until a reclaimer has looked at it; then the next write must fetch it. Reclaimers
    come as a Poisson stream.

    Args:
        transfer, own: ns for a write with a full barrier to a line that is elsewhere, or here.
        looks: ns between two reclaimers.
    """
    total = readers.cycle
    for times in (readers.walk, readers.gap):  # a look while walking costs the end's write, one in the gap the begin's
        means = ((1 - times.share, times.usual), (times.share, times.long))
        if times.fixed:
            seen = sum(share * -np.expm1(-mean / looks) for share, mean in means)
        else:
            seen = sum(share * mean / (mean + looks) for share, mean in means)
        total += own + (transfer - own) * float(seen)
    return readers.vcpus / total * 1e9
