"""The pictures of chapter 5: a grace period among the walks it waits for, and the curves of the two schemes.

They draw what :mod:`mmu.readers` simulated and what its formulas say, and compute only the numbers of their text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from mmu.picture import FAINT, FAST, INK, LOCK, PAPER, Picture, canvas, is_narrow, two_widths
from mmu.readers import Freeing, Walks

_STYLE = (
    {"color": INK, "linestyle": "-", "marker": "o"},
    {"color": FAST, "linestyle": "--", "marker": "s"},
    {"color": FAINT, "linestyle": ":", "marker": "^"},
)


@two_widths
def grace_period(walks: Walks, at: float, before: float, after: float) -> Picture:
    """One replica's walks around the unlinking of a page, one lane a vCPU, time downward; beside them the freer.

    Args:
        walks: drawn walks; the first replica is shown.
        at: when the page is unlinked, ns.
        before, after: how much is shown before that, and after the page is freed, ns.
    """
    begin, end = walks.begin[0], walks.end[0]  # (vcpu, walk)
    freed = float(walks.quiet(np.full((walks.begin.shape[0], 1), at, dtype=np.float64))[0, 0])
    top, bottom = at - before, freed + after
    met = (begin <= at) & (at < end)
    later = (begin > at) & (begin < freed)
    vcpus = begin.shape[0]
    sep = "\n" if is_narrow() else " "
    with canvas(7.0, 4.4, narrow=4.8) as figure:
        axes = figure.add_subplot()
        for vcpu in range(vcpus):
            axes.axvline(vcpu, color=FAINT, linewidth=0.6, zorder=0)
            for walk in np.flatnonzero((end[vcpu] > top) & (begin[vcpu] < bottom)).tolist():
                held = bool(met[vcpu, walk])
                first, last = max(begin[vcpu, walk], top), min(end[vcpu, walk], bottom)
                axes.plot(
                    [vcpu, vcpu], [first, last], color=FAST, linewidth=6.0 if held else 2.0, solid_capstyle="butt"
                )
                for edge in (begin[vcpu, walk], end[vcpu, walk]):
                    if top <= edge <= bottom:
                        axes.plot(vcpu, edge, marker="o", color=FAST, markerfacecolor=PAPER, markersize=6)
                room = not is_narrow() and (min(last, freed) - max(first, at)) > 0.09 * (bottom - top)
                middle = (max(first, at) + min(last, freed)) / 2
                if held and room:
                    axes.text(vcpu + 0.12, middle, "may stand\non the page", size=8.5, va="center", color=INK)
                elif later[vcpu, walk] and room:
                    axes.text(vcpu + 0.12, middle, "too late\nto find it", size=8.5, va="center", color=FAINT)
        band = {"facecolor": PAPER, "edgecolor": LOCK, "hatch": "/////", "linewidth": 1.2}
        axes.add_patch(Rectangle((vcpus - 0.13, at), 0.26, freed - at, **band))
        axes.text(
            vcpus + 0.2,
            (at + freed) / 2,
            f"grace\nperiod\n{freed - at:.0f} ns" if is_narrow() else f"grace period\n{freed - at:.0f} ns",
            size=9,
            va="center",
        )
        for when, word in ((at, "unlinked"), (freed, "freed")):
            axes.axhline(when, color=INK, linewidth=1.0, linestyle=(0, (4, 3)), zorder=0)
            axes.text(vcpus + 0.2, when, word, size=9.5, weight="bold", va="center", backgroundcolor=PAPER)
        heads = [*(f"vCPU{sep}{vcpu}" for vcpu in range(vcpus)), f"the{sep}freer"]
        axes.set_xticks(range(vcpus + 1), heads)
        if is_narrow():
            axes.set_xlabel("thick: may stand on the page;\nthin: gone before, or too late to find it", size=9)
        axes.set(
            xlim=(-0.4, vcpus + (1.5 if is_narrow() else 1.0)), ylim=(bottom, top), ylabel="ns after the unlinking"
        )
        axes.xaxis.tick_top()
        axes.xaxis.set_label_position("bottom")
        axes.tick_params(axis="x", length=0)
        ticks = np.arange(np.ceil((top - at) / 200) * 200, bottom - at, 200, dtype=np.float64)
        axes.set_yticks(at + ticks, [f"{tick:.0f}" for tick in ticks])
        axes.spines[:].set_visible(False)
    return Picture(
        figure,
        f"{vcpus} vCPUs walk; when the page is unlinked, {int(met.sum())} of them are inside a walk. The last of "
        f"these ends {freed - at:.0f} ns later, and then the page is freed. Not waited for: walks that began in "
        f"between, {int(later.sum())} in all.",
    )


class Curve(NamedTuple):
    """One line of a diagram: where a formula goes, and dots where simulations came out; either may be missing."""

    name: str
    x: Sequence[float]
    line: Sequence[float] | None = None
    dots: Sequence[float] | None = None


@two_widths
def curves(
    panels: Mapping[str, Sequence[Curve]], x: str | Sequence[str], marks: Mapping[str, float] | None = None
) -> Picture:
    """Diagrams on logarithmic axes; lines are formulas, dots simulations or measurements, each named at its right end.

    Two stand side by side, more than two one below the other.

    Args:
        panels: what each upward axis measures, with its curves.
        x: what the axes to the right measure, all of them or one by one.
        marks: places along the axes to the right that have a name.
    """
    findings = []
    below = is_narrow() or len(panels) > 2
    shape = (len(panels), 1) if below else (1, len(panels))
    axis_of = [x] * len(panels) if isinstance(x, str) else x
    with canvas(7.0, 2.4 * len(panels) if below else 3.5, narrow=2.8 * len(panels)) as figure:
        every = figure.subplots(*shape, squeeze=False).ravel()
        for axes, (measure, lines), x in zip(every, panels.items(), axis_of, strict=True):
            axes.set(xscale="log", yscale="log", xlabel=x, ylabel=measure)
            points = sorted({value for curve in lines for value in curve.x})
            axes.set_xticks(points[:: max(1, -(-len(points) // (3 if is_narrow() else 4)))], minor=False)
            _draw_marks(axes, marks or {})
            axes.xaxis.set_minor_locator(NullLocator())
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
            for style, curve in zip(_STYLE, lines, strict=False):
                _draw_curve(axes, curve, style)
            _name_curves(axes, lines)
            _few_ticks(axes)
            findings.append(f"{' '.join(measure.split())}: {'; '.join(_told(curve, x) for curve in lines)}")
    off = [_farthest(curve) for lines in panels.values() for curve in lines if curve.line and curve.dots]
    compared = f" Simulation and formula differ by {100 * max(off):.1f} % at most." if off else ""
    marked = (
        " Dotted rules: " + ", ".join(f"{name} at {_short(at)}" for name, at in marks.items()) + "." if marks else ""
    )
    return Picture(figure, ". ".join(findings) + "." + compared + marked)


def _few_ticks(axes: Axes) -> None:
    """Label 1, 2 and 5 of each power where few powers are seen, and never in between."""
    low, high = np.log10(axes.get_ylim())
    if high - low < 2:
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_marks(axes: Axes, marks: Mapping[str, float]) -> None:
    for name, at in marks.items():
        axes.axvline(at, color=FAINT, linewidth=1.0, linestyle=":", zorder=0)
        place = {"transform": axes.get_xaxis_transform(), "ha": "right", "va": "bottom", "size": 8.5, "color": FAINT}
        axes.text(at, 1.0, name, **place)


def _draw_curve(axes: Axes, curve: Curve, style: Mapping[str, str]) -> None:
    if curve.line is not None:
        axes.plot(curve.x, curve.line, color=style["color"], linestyle=style["linestyle"], linewidth=1.6)
    if curve.dots is not None:
        joined = (
            {"linestyle": "none"} if curve.line is not None else {"linestyle": style["linestyle"], "linewidth": 1.0}
        )
        mark = {"marker": style["marker"], "markersize": 5.0, "markerfacecolor": PAPER, "color": style["color"]}
        axes.plot(curve.x, curve.dots, **mark, **joined)


def _name_curves(axes: Axes, lines: Sequence[Curve]) -> None:
    """Names at the right ends, pushed apart where they would lie on one another."""
    low, high = np.log10(axes.get_ylim())
    least = 0.065 * (high - low)
    ends = sorted((np.log10(_values(curve)[-1]), place) for place, curve in enumerate(lines))
    height = -np.inf
    right = max(max(curve.x) for curve in lines)
    for value, place in ends:
        lines_in_name = 1 + lines[place].name.count("\n")
        height = max(value, height + least * lines_in_name)
        axes.annotate(
            lines[place].name, (right, 10**height), xytext=(7, 0), textcoords="offset points", va="center", size=8.5,
            color=_STYLE[place]["color"], annotation_clip=False,
        )  # fmt: skip


def _values(curve: Curve) -> Sequence[float]:
    return curve.line if curve.line is not None else curve.dots or ()


def _told(curve: Curve, x: str) -> str:
    values, name = _values(curve), curve.name.replace("\n", " ")
    return f"{name}, {_short(values[0])} at {x} {_short(curve.x[0])}, {_short(values[-1])} at {_short(curve.x[-1])}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _farthest(curve: Curve) -> float:
    line, dots = (np.asarray(values, dtype=np.float64) for values in (curve.line, curve.dots))
    return float(np.max(np.abs(dots / line - 1)))


@two_widths
def pages_waiting(runs: Mapping[str, Freeing], span: float) -> Picture:
    """Pages unlinked and not yet freed over time, the first replica of each run, one panel a run, time to the right.

    Args:
        runs: for each scheme's name what became of its pages.
        span: the last time shown, ns.
    """
    findings = []
    with canvas(7.0, 1.2 + 1.0 * len(runs)) as figure:
        panels = figure.subplots(len(runs), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for axes, style, (name, run) in zip(panels, _STYLE, runs.items(), strict=False):
            edges = np.concatenate([run.unlinked[:1], run.freed[:1]], axis=-1)
            edges = np.unique(
                np.concatenate([np.zeros((1, 1), dtype=np.float64), edges[edges <= span][None, :]], axis=-1)
            )[None, :]
            count = run.waiting(edges)[0]
            axes.fill_between(edges[0] / 1e6, count, step="post", color=style["color"], alpha=0.18, linewidth=0)
            axes.step(edges[0] / 1e6, count, where="post", color=style["color"], linewidth=1.2)
            axes.set_ylabel("pages")
            axes.text(0.01, 0.97, name, transform=axes.transAxes, va="top", color=style["color"], weight="bold", size=9)
            findings.append(f"{name}: at most {int(count.max())} waiting at a time")
        panels[-1].set(xlabel="milliseconds", xlim=(0, span / 1e6), ylim=(0, 1.25 * panels[-1].get_ylim()[1]))
    return Picture(figure, f"Pages that wait to be freed, over {span / 1e6:g} ms. {'; '.join(findings)}.")
