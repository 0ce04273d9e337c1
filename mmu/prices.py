"""The pictures of chapter 1: recorded faults side by side, and what a page's first write costs.

They draw what :mod:`mmu.handling` tells and :mod:`mmu.published` holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from mmu import published
from mmu.handling import REPAIR, Step
from mmu.picture import FAINT, FAST, INK, LOCK, PAPER, VCPU, Picture, canvas

_PIXEL = 1 / 100  # of the page, in inches
_ROW = 22


def side_by_side(faults: Mapping[str, Sequence[Step]]) -> Picture:
    """The handling of several faults, one lane each, time downward; a band beside what is done under the mmu-lock.

    Filled marks are recorded events, hollow ones lie between them. A fault that takes the fast path has its colour and
    a thin line. Chapter 1.

    Args:
        faults: for each fault's name its :func:`mmu.handling.steps`.
    """
    width = 700
    longest = max(len(steps) for steps in faults.values())
    height = 42 + _ROW * longest + 26
    findings = []
    with canvas(width * _PIXEL, height * _PIXEL) as figure:
        figure.set_layout_engine("none")
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.set_axis_off()
        for lane, (name, steps) in enumerate(faults.items()):
            _draw_lane(axes, 8 + lane * (width - 8) / len(faults), name, steps)
            events = [step for step in steps if step.event]
            held = sum(step.locked for step in events)
            findings.append(f"{name}: {len(events)} recorded events, {held or 'none'} of them under the mmu-lock")
        axes.text(8, height - 10, "● recorded   ○ done without an event   ", size=8.5, va="center", color=FAINT)
        axes.add_patch(Rectangle((262, height - 16), 9, 12, facecolor=PAPER, edgecolor=LOCK, hatch="/////"))
        axes.text(277, height - 10, "under the mmu-lock", size=8.5, va="center", color=FAINT)
    return Picture(figure, "; ".join(findings) + ".")


def _draw_lane(axes: Axes, left: float, name: str, steps: Sequence[Step]) -> None:
    fast = any(step.part == REPAIR for step in steps)
    colour, line = (FAST, 1.2) if fast else (VCPU[0], 2.4)
    x, top = left + 34, 46.0
    y = [top + _ROW * i for i in range(len(steps))]
    axes.text(left + 18, 17, name, size=10.5, weight="bold", va="center", color=colour)
    axes.plot([x, x], [y[0] - 8, y[-1] + 8], color=colour, linewidth=line, zorder=1)
    held = [i for i, step in enumerate(steps) if step.locked]
    if held:
        first, last = y[held[0]], y[held[-1]] + _ROW  # up to the step that drops it
        band = {"facecolor": PAPER, "edgecolor": LOCK, "hatch": "/////", "linewidth": 1.2}
        axes.add_patch(Rectangle((left + 9, first - 6), 12, last - first + 12, **band))
    for step, at in zip(steps, y, strict=True):
        fill = colour if step.event else PAPER
        axes.plot(x, at, marker="o", color=colour, markerfacecolor=fill, markersize=7, markeredgewidth=1.5, zorder=2)
        axes.text(x + 15, at + 4, step.label, size=9, color=INK if step.event else FAINT)


_LABELS = {
    "built": "small page built anew:\nslow path",
    "split": "small page in place,\nW missing (inferred)",
    "eager": "nothing to repair",
}


def price_by_vcpus(
    table: NDArray[np.void] = published.SPLIT_ON_FAULT, other: np.void = published.FAST_TDP[0]
) -> Picture:
    """Microseconds for the first write to one page against the number of vCPUs, for three kernels, as published.

    Args:
        table: like :data:`mmu.published.SPLIT_ON_FAULT`.
        other: one row like those of :data:`mmu.published.FAST_TDP`, drawn as two diamonds.

    Chapter 1.
    """
    ways = [name for name in table.dtype.names if name != "vcpus"]
    cost = {way: published.per_page(table[way]) for way in ways}  # (vcpus,) each
    style = {
        "built": {"color": LOCK, "linewidth": 3.0, "marker": "s", "markersize": 7},
        "split": {"color": FAST, "linewidth": 1.4, "marker": "o", "markersize": 7},
        "eager": {"color": FAINT, "linewidth": 1.2, "marker": "^", "markersize": 6, "linestyle": "--"},
    }
    with canvas(7.0, 3.4) as figure:
        axes = figure.add_subplot()
        for way in ways:
            axes.plot(table["vcpus"], cost[way], **style[way])
            end = (table["vcpus"][-1], cost[way][-1])
            text = f"{end[1]:.1f} µs  {_LABELS[way]}"
            axes.annotate(text, end, xytext=(9, 0), textcoords="offset points", va="center", size=9)
        starts = [cost[way][0] for way in ways[:2]]
        text = f"{starts[0]:.2f} and {starts[1]:.2f} µs"
        axes.annotate(text, (table["vcpus"][0], max(starts)), xytext=(-5, 10), textcoords="offset points", size=9)
        pair = published.per_page([other["before"], other["after"]])
        axes.plot([other["vcpus"]] * 2, pair, color=FAINT, linewidth=0.8, linestyle=":", zorder=0)
        for value, way, words in zip(pair, ways, ("slow path", "fast path"), strict=False):
            axes.plot(other["vcpus"], value, marker="D", markersize=7, color=style[way]["color"], zorder=3)
            beside = {"ha": "right", "va": "center", "size": 9}
            text = f"another test, 2021: {words} {value:.1f} µs" if way == "built" else f"{words} {value:.2f} µs"
            lift = 0 if way == "built" else 19
            axes.annotate(text, (other["vcpus"], value), xytext=(-9, lift), textcoords="offset points", **beside)
        axes.set_xscale("log", base=2)
        axes.set_xticks(table["vcpus"], [str(n) for n in table["vcpus"].tolist()])
        axes.minorticks_off()
        axes.set(xlim=(1.8, 500), ylim=(0, ceil(1.08 * max(max(c.max() for c in cost.values()), pair.max()))))
        axes.set(xlabel="vCPUs, all writing at once", ylabel="µs for a page’s first write")
        axes.xaxis.set_label_coords(0.36, -0.13)
        axes.spines["bottom"].set_bounds(1.8, table["vcpus"][-1])
    few, many = table["vcpus"][[0, -1]].tolist()
    said = [
        f"{name} {cost[way][0]:.2f} to {cost[way][-1]:.2f} µs"
        for way, name in (("built", "where the page is built anew"), ("split", "where only W is missing"),
                          ("eager", "where nothing is to be repaired"))
    ]  # fmt: skip
    return Picture(
        figure,
        f"From {few} to {many} vCPUs the first write to a page costs, {', '.join(said)}; "
        f"in another test with {other['vcpus']} vCPUs {pair[0]:.1f} µs slow, {pair[1]:.2f} µs fast.",
    )
