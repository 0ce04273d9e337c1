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
from mmu.picture import FAINT, FAST, INK, LOCK, PAPER, PIXEL, VCPU, Picture, canvas, is_narrow, two_widths

_ROW = 22


@two_widths
def side_by_side(faults: Mapping[str, Sequence[Step]]) -> Picture:
    """The handling of several faults, one lane each, time downward; a band beside what is done under the mmu-lock.

    Filled marks are recorded events, hollow ones lie between them. A fault that takes the fast path has its colour and
    a thin line. Chapter 1.

    Args:
        faults: for each fault's name its :func:`mmu.handling.steps`.
    """
    width = 360 if is_narrow() else 700
    longest = max(len(steps) for steps in faults.values())
    height = 42 + _ROW * longest + (44 if is_narrow() else 26)
    findings = []
    with canvas(width * PIXEL, height * PIXEL) as figure:
        figure.set_layout_engine("none")
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.set_axis_off()
        for lane, (name, steps) in enumerate(faults.items()):
            _draw_lane(axes, 8 + lane * (width - 8) / len(faults), name, steps)
            events = [step for step in steps if step.event]
            held = sum(step.locked for step in events)
            findings.append(f"{name}: {len(events)} recorded events, {held or 'none'} of them under the mmu-lock")
        x, above = (8, 28) if is_narrow() else (262, 10)
        axes.text(8, height - above, "● recorded   ○ done without an event   ", size=8.5, va="center", color=FAINT)
        axes.add_patch(Rectangle((x, height - 16), 9, 12, facecolor=PAPER, edgecolor=LOCK, hatch="/////"))
        axes.text(x + 15, height - 10, "under the mmu-lock", size=8.5, va="center", color=FAINT)
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
        size = 8 if is_narrow() else 9
        axes.text(x + 15, at + 4, step.label, size=size, color=INK if step.event else FAINT)


_LABELS = {
    "built": "small page built anew:\nslow path",
    "split": "small page in place,\nW missing (inferred)",
    "eager": "nothing to repair",
}


@two_widths
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
    with canvas(7.0, 3.4, narrow=4.4) as figure:
        axes = figure.add_subplot()
        for row, way in enumerate(ways):
            axes.plot(table["vcpus"], cost[way], **style[way])
            end = (table["vcpus"][-1], cost[way][-1])
            text = f"{end[1]:.1f} µs  {_LABELS[way]}"
            if is_narrow():  # no room at the right: a key above the curves
                axes.plot(2, 22 - 1.5 * row, **style[way])
                axes.text(2.5, 22 - 1.5 * row, text.replace("\n", " "), va="center", size=8)
                continue
            axes.annotate(text, end, xytext=(9, 0), textcoords="offset points", va="center", size=9)
        starts = [cost[way][0] for way in ways[:2]]
        text = f"{starts[0]:.2f} and {starts[1]:.2f} µs"
        axes.annotate(
            text,
            (table["vcpus"][0], max(starts)),
            xytext=(-5, 26 if is_narrow() else 10),
            textcoords="offset points",
            size=9,
        )
        pair = published.per_page([other["before"], other["after"]])
        axes.plot([other["vcpus"]] * 2, pair, color=FAINT, linewidth=0.8, linestyle=":", zorder=0)
        said = [f"slow path {pair[0]:.1f} µs", f"fast path {pair[1]:.2f} µs"]
        if is_narrow():
            said = ["\n".join(["another test,", "2021:", *said]), ""]
        else:
            said[0] = f"another test, 2021: {said[0]}"
        for value, way, text, lift in zip(pair, ways, said, (0, 19), strict=False):
            axes.plot(other["vcpus"], value, marker="D", markersize=7, color=style[way]["color"], zorder=3)
            beside = {"ha": "right", "va": "center", "size": 9}
            axes.annotate(text, (other["vcpus"], value), xytext=(-9, lift), textcoords="offset points", **beside)
        axes.set_xscale("log", base=2)
        axes.set_xticks(table["vcpus"], [str(n) for n in table["vcpus"].tolist()])
        axes.minorticks_off()
        top = ceil(1.08 * max(max(c.max() for c in cost.values()), pair.max()))
        axes.set(xlim=(1.8, 120 if is_narrow() else 500), ylim=(0, 24 if is_narrow() else top))
        axes.set(xlabel="vCPUs, all writing at once", ylabel="µs for a page’s first write")
        if not is_narrow():
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
