"""The pictures of measurements: every point of 2012, the model's curves, what would explain a gain, all deals of runs.

They draw what :mod:`mmu.trials` and :mod:`mmu.cost` hold. Under the lock is grey and thick, the fast path green and
thin; a filled mark is a figure that the model was fitted to, an open one a test. Chapter 11.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from mmu import cost, trials
from mmu.picture import FAINT, FAST, INK, LOCK, PAPER, Picture, canvas, is_narrow, two_widths
from mmu.trials import SEED, Comparison, permutation
from mmu.workload import frame_buffer_pages


@two_widths
def seed_points(rows: Sequence[Comparison] = SEED) -> Picture:
    """Every run of the message's tables, as a share of the mean before; runs of the same number are joined.

    >>> seed_points(SEED[:1]).alt
    'Of 1 comparison 1 has a shorter mean after the patch; 1 of 1 runs was shorter than the run of its number before.'
    """
    shorter = sum(row.gain > 0 for row in rows)
    paired = [(b, a) for row in rows for b, a in zip(*row.times(), strict=True)]
    names = [row.test.replace(" -", "\n-") if is_narrow() else row.test for row in rows]
    with canvas(7.0, 0.9 + 0.52 * len(rows), narrow=0.9 + 0.6 * len(rows)) as figure:
        axes = figure.add_subplot()
        for place, row in enumerate(rows):
            before, after = (100 * runs / row.times()[0].mean() for runs in row.times())
            for run, (was, now) in enumerate(zip(before, after, strict=True)):
                y = place - 0.26 + 0.26 * run if before.size > 1 else place
                axes.plot([was, now], [y, y], color=FAINT, linewidth=1)
                axes.plot(was, y, marker="s", color=LOCK, markersize=7, linestyle="")
                axes.plot(now, y, marker="o", color=FAST, markerfacecolor=PAPER, markeredgewidth=1.8, linestyle="")
            axes.text(
                148,
                place,
                f"{-100 * row.gain:+.1f} %".replace("-0.0", "0.0").replace("-", "−"),
                ha="right",
                va="center",
                size=9,
            )
        axes.plot([100, 100], [-0.6, len(rows) - 0.4], color=INK, linewidth=0.8, linestyle=":", zorder=0)
        axes.set_yticks(range(len(rows)), [f"{name}\n{row.mmu}" for name, row in zip(names, rows, strict=True)], size=8)
        axes.set(xlim=(68, 149), ylim=(len(rows) - 0.4, -1.0), xlabel="time of a run, % of the mean before")
        key = "■ before   ○ after" if is_narrow() else "■ before   ○ after the patch, one row a run"
        axes.text(69, -0.75, key, size=9, va="center", color=INK)
        axes.text(148, -0.75, "means", size=9, ha="right", va="center", color=INK)
        axes.tick_params(axis="y", length=0)
    plural, has = ("", "has") if len(rows) == 1 else ("s", "have")
    won = sum(a < b for b, a in paired)
    return Picture(
        figure,
        f"Of {len(rows)} comparison{plural} {shorter} {has} a shorter mean after the patch; {won} of {len(paired)} "
        f"runs {'was' if won == 1 else 'were'} shorter than the run of its number before.",
    )


_LINES = {
    "lock": ("under the lock", LOCK, 3.0, "-"),
    "parallel": ("lock for reading", INK, 1.6, "--"),
    "fast": ("fast path", FAST, 1.4, "-"),
    "guest": ("no fault", FAINT, 1.2, ":"),
}


@two_widths
def curves() -> Picture:
    """The model's time for a page against the number of vCPUs, with every published figure beside it. Chapter 11."""
    many = np.unique(np.geomspace(1, 128, 60).astype(np.int64))
    models = {law: cost.fit(law) for law in cost.LAWS}
    rows = [check for check in cost.checks() if check.unit == "µs"]
    with canvas(7.0, 4.2, narrow=4.2) as figure:
        axes = figure.add_subplot()
        for name, (label, colour, width, style) in _LINES.items():
            low, high = (
                np.array([m.cycle(None if name == "guest" else getattr(m, name), n, law) for n in many.tolist()])
                for law, m in models.items()
            )
            axes.fill_between(many, low, high, color=colour, alpha=0.25, linewidth=0)
            axes.plot(many, low, color=colour, linewidth=width, linestyle=style)
            axes.text(140, low[-1], label, color=colour, size=9, va="center")
        for row in rows:
            _, colour, _, _ = _LINES[cost.SERIES[row.figure] or "guest"]
            fill = colour if row.fitted else PAPER
            style = {"color": colour, "markerfacecolor": fill, "markeredgewidth": 1.6, "markersize": 7}
            axes.plot(row.vcpus, row.published, marker="o", linestyle="", clip_on=False, **style)
        _log(axes, "x", [1, 2, 4, 8, 16, 32, 64, 128])
        _log(axes, "y", [0.2, 0.5, 1, 2, 5, 10, 20])
        axes.set(xlim=(0.9, 130), ylim=(0.18, 30), xlabel="vCPUs that fault at the same time", ylabel="µs for one page")
        axes.text(1, 17, "● fitted   ○ tested", size=9, va="center")
    tests = [row for row in rows if not row.fitted]
    close = sum(abs(row.off) <= 0.16 for row in tests)
    lock = models["fixed"]
    ratio = lock.cycle(lock.lock, 64, "fixed") / lock.cycle(lock.fast, 64, "fixed")
    return Picture(
        figure,
        f"At 64 vCPUs a fault under the lock takes {ratio:.0f} times as long as on the fast path, at 2 about the "
        f"same. {len(rows) - len(tests)} figures were fitted; of the {len(tests)} others the model meets {close} "
        f"within 16 %, and misses {len(tests) - close}, all at 32 vCPUs or more.",
    )


@two_widths
def explained(interval: float = 0.030, strides: Sequence[int] = (2000, 4096)) -> Picture:
    """Which fault rates and savings would explain the two gains of x11perf, and what is known of either. Chapter 11.

    Args:
        interval: seconds between two refreshes of the display.
        strides: bytes from line to line of the frame buffer, the least and the most plausible.
    """
    rates = [frame_buffer_pages(500, 2000, stride).size / interval for stride in strides]
    saved = cost.saved_a_page()
    span = np.geomspace(0.1, 30, 50)  # µs
    needed = []
    with canvas(7.0, 3.8, narrow=4.6) as figure:
        axes = figure.add_subplot()
        band = {"facecolor": PAPER, "edgecolor": FAINT, "linewidth": 0.8, "hatch": "///", "zorder": 0}
        axes.axhspan(min(rates) / 1e3, max(rates) / 1e3, **band)
        axes.axvspan(min(saved), max(saved), facecolor="#DFE3E8", edgecolor=FAINT, linewidth=0.8, zorder=0)
        plate = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.5}
        middle = np.sqrt(min(rates) * max(rates)) / 1e3
        sep = "\n" if is_narrow() else " "
        axes.text(0.115, middle, f"500 rows{sep}at each refresh", va="center", size=9, bbox=plate)
        known = "saved a page,\nre-spins of 2012\n(1 GiB inferred)"
        axes.text(max(saved) * 1.06, 250, known, size=9, va="center")
        for mmu, style, x, y in (
            ("EPT", "-", 0.115, 29 if is_narrow() else 26),
            ("soft MMU", "--", 2.9 if is_narrow() else 2.2, 45),
        ):
            gain = trials.seed("x11perf -comppixwin500", mmu).gain
            rate = cost.rate_to_explain(gain, span) / 1e3
            axes.plot(span, rate, color=INK, linewidth=2, linestyle=style)
            axes.text(x, y, f"{mmu}:{sep}{100 * gain:.1f} % of{sep}the time", size=9, va="center")
            low, high = (float(cost.saving_to_explain(gain, each)) for each in (max(rates), min(rates)))
            needed.append(f"{mmu} {low:.1f} to {high:.1f}")
        _log(axes, "x", [0.1, 0.3, 1, 3, 10, 30])
        _log(axes, "y", [1, 3, 10, 30, 100, 300])
        axes.set(xlim=(0.1, 30), ylim=(1, 600), xlabel="µs saved by each fault", ylabel="thousand faults a second")
    return Picture(
        figure,
        f"At {min(rates):,.0f} to {max(rates):,.0f} faults a second the gains of x11perf need so many µs saved by "
        f"each: {'; '.join(needed)}. The re-spins saved {min(saved):.2f} and {max(saved):.2f}.",
    )


@two_widths
def deals(row: Comparison) -> Picture:
    """Every way to deal a comparison's runs into two heaps, by the difference of their means. Chapter 11."""
    before, after = row.times()
    differences, seen = trials.deals(before, after)
    test = permutation(before, after)
    order = np.sort(differences)
    with canvas(7.0, 1.7) as figure:
        axes = figure.add_subplot()
        as_good = order <= seen + 1e-9
        place = np.arange(order.size, dtype=np.int64)
        axes.bar(place[as_good], order[as_good], color=FAST, width=0.8)
        rest = {"color": PAPER, "edgecolor": LOCK, "hatch": "////", "linewidth": 1}
        axes.bar(place[~as_good], order[~as_good], width=0.8, **rest)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.axhline(seen, color=INK, linewidth=1, linestyle="--")
        measured = f"as measured: {seen:+.1f} s".replace("-", "−")
        axes.text(order.size - 0.4, seen, measured, size=9, va="bottom", ha="right")
        axes.set(xlim=(-0.7, order.size - 0.3), ylabel="after − before, s", xlabel="all ways to deal the runs")
        axes.set_xticks([])
    return Picture(
        figure,
        f"{row.test}, {row.mmu}: the runs differ by {seen:+.1f} s; of {test.ways} ways to deal them {test.as_good} "
        f"{'is' if test.as_good == 1 else 'are'} at least as good, p = {test.one_sided:.3g} one-sided, "
        f"{test.two_sided:.3g} two-sided.",
    )


def _log(axes: Axes, which: str, ticks: Sequence[float]) -> None:
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_ticks(list(ticks), [f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)
